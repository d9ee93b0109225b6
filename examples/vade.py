r"""VaDE: clusters found by a VAE with a mixture prior, from pretraining to scores over seeds.

    python examples/vade.py                            # handwritten digits
    python examples/vade.py --data mnist --hidden 500 500 2000 --num-seeds 5 --batch-size 256 \
        --pretrain-epochs 40 --epochs 15 --bf16
    python examples/vade.py --data har                 # any features: also rcv1, or my.npz
    python examples/vade.py --quick                    # a check that all runs, in seconds

Everything a result depends on is here: the autoencoder that starts the networks, the mixture that
starts the prior, and every seed is reported. Labels are used for the scores alone.

Source: Jiang, Zheng, Tan, Tang and Zhou, Variational Deep Embedding, 2017.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import reporting
import torch
from torch import Tensor, nn
from torch.nn.functional import affine_grid, grid_sample

import ppvae
from ppvae import conditionals, data, elbo, guides, metrics, models, nets, plots
from ppvae.pairs import evaluation_mode
from ppvae.train.fit import resolve_device

FILES = ["results.json", "scores.csv", "accuracy.png", "latents.png", "clusters.png"]
METHODS = ["k-means", "GMM", "VAE + GMM", "AE + GMM", "VaDE, start", "VaDE"]


class Distorted(nn.Module):
    """A network that in training sees images moved, turned, scaled and sheared at random.

    The likelihood has the image itself, so an autoencoder becomes a denoising one, whose codes
    depend less on place and slant. For a VAE, q(z | x) is then drawn before z is; the ELBO is a
    bound with each such q, so with their mean. In evaluation mode the image is seen as it is.

    Args:
        net: a network of flat images.
        shape: of one image, ``(channels, height, width)``.
        strength: of all distortions, which are uniform; at 1, up to 3/28 of the width, 15 degrees,
            factors of exp(0.15) and shears of 0.3; at 0, ``net`` as it is.
    """

    def __init__(self, net: nn.Module, shape: tuple[int, ...], strength: float = 1.0) -> None:
        super().__init__()
        self.net, self.shape, self.strength = net, shape, strength

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.strength:
            x = self.distort(x)
        outputs: Tensor = self.net(x)
        return outputs

    def distort(self, x: Tensor) -> Tensor:
        images = x.reshape(-1, *self.shape)
        # grid_sample's image is 2 wide
        largest = self.strength * x.new_tensor([3 / 14, 3 / 14, 0.26, 0.15, 0.15, 0.3])
        right, down, angle, wide, high, shear = (
            largest * (2 * torch.rand(len(images), 6, device=x.device) - 1)
        ).unbind(1)
        cos, sin, wide, high = angle.cos(), angle.sin(), wide.exp(), high.exp()
        rows = [
            torch.stack([wide * cos, wide * (shear * cos - sin), right], 1),
            torch.stack([high * sin, high * (shear * sin + cos), down], 1),
        ]
        grid = affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        moved: Tensor = grid_sample(images, grid, align_corners=False)
        return moved.reshape(x.shape)


class Means(nn.Module):
    """The first half of a network's outputs: the means, of means and raw scales."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.net(x)
        return outputs.chunk(2, -1)[0]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = resolve_device(args.device)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    dataset = data.load(args.data, binarize=None)
    x, y = pooled(dataset, 300 if args.quick else None)
    x = x.to(device)
    clusters = args.clusters or dataset.num_classes
    if len(x) < clusters:
        raise ValueError(f"{len(x)} rows are fewer than {clusters} clusters: give more rows")
    print(f"{dataset}\n\nAll {len(x):,} rows, {clusters} clusters, on {device}", flush=True)

    scores: dict[str, list[metrics.Clustering]] = {method: [] for method in METHODS}
    started, best = time.perf_counter(), -1.0
    for seed in range(args.seed, args.seed + args.num_seeds):
        found = baselines(x, clusters, seed, args.num_starts)
        epochs = args.pretrain_epochs + args.epochs
        guide = by_vae(dataset, x, args, seed, epochs)
        found["VAE + GMM"] = likeliest(means(guide, x), clusters, seed, args.num_starts)

        encoder, decoder = pretrained(dataset, x, args, seed)
        model = models.VaDE(
            choose_likelihood(dataset)(decoder), conditionals.Mixture(clusters, args.latent_dim)
        ).to(device)
        guide = guides.Normal(encoder)
        found["AE + GMM"] = likeliest(means(guide, x), clusters, seed, args.num_starts)
        found["VaDE, start"] = start(model, guide, x, args, seed)
        track = Track(model, guide, x, y, args.epochs)
        train(model, guide, x, args.epochs, args, seed, args.vade_lr, callbacks=[track])
        found["VaDE"] = assigned(model, guide, x)

        for method in METHODS:
            scores[method].append(metrics.clustering(found[method], y, clusters))
        print(
            f"seed {seed}: "
            + ", ".join(f"{name} {100 * s[-1].accuracy:.1f} %" for name, s in scores.items()),
            flush=True,
        )
        if scores["VaDE"][-1].accuracy > best:
            best, best_seed, kept, final = scores["VaDE"][-1].accuracy, seed, track, model

    report(scores, len(x))
    reporting.clear(out, FILES)
    write(out, args, scores, dataset.name, time.perf_counter() - started)
    reporting.save(kept.plot_accuracy(), out / "accuracy.png")
    reporting.save(kept.plot_latents(), out / "latents.png")
    if reporting.is_image(dataset):
        reporting.save(draw_clusters(final, dataset), out / "clusters.png")
    print(f"The pictures are of seed {best_seed}, the best by accuracy.")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ the pieces


def pooled(dataset: data.Dataset, limit: int | None = None) -> tuple[Tensor, Tensor]:
    """All rows and labels, as in the paper, which scores the rows it trains on; not binarised."""
    if dataset.num_classes is None:
        raise ValueError(
            f"{dataset.name!r} has no labels, and the scores need them: give an .npz arrays x and y"
        )
    parts = (dataset.train, dataset.valid, dataset.test)
    x = torch.cat([part.x[:limit] for part in parts]).flatten(1)
    return x, torch.cat([part.y[:limit] for part in parts if part.y is not None])


def choose_likelihood(dataset: data.Dataset) -> Any:
    """Cross-entropy for values in [0, 1], and the squared error, sigma^2 = 1/2, for others."""
    if dataset.support in ("binary", "unit_interval"):
        return functools.partial(conditionals.Bernoulli, grey=True)
    return functools.partial(conditionals.Normal, scale=0.5**0.5)


def networks(dataset: data.Dataset, args: argparse.Namespace) -> tuple[nn.Module, nn.Module]:
    """Encoder to means and log-sigmas of z, which sees images distorted, and decoder back."""
    x_dim, z, hidden = math.prod(dataset.shape), args.latent_dim, args.hidden
    encoder: nn.Module = nets.mlp(x_dim, *hidden, 2 * z)
    if reporting.is_image(dataset):
        encoder = Distorted(encoder, dataset.shape, args.distortion)
    return encoder, nets.mlp(z, *reversed(hidden), x_dim)


def by_vae(
    dataset: data.Dataset,
    x: Tensor,
    args: argparse.Namespace,
    seed: int,
    epochs: int,
    **options: Any,
) -> guides.Normal:
    """The encoder of a VAE, from scratch."""
    pyro.set_rng_seed(seed)
    encoder, decoder = networks(dataset, args)
    vae = models.VAE(choose_likelihood(dataset)(decoder), args.latent_dim)
    guide = guides.Normal(encoder)
    train(vae, guide, x, epochs, args, seed, **options)
    return guide


def pretrained(
    dataset: data.Dataset, x: Tensor, args: argparse.Namespace, seed: int, **options: Any
) -> tuple[nn.Module, nn.Module]:
    """The networks of an autoencoder."""
    pyro.set_rng_seed(seed)
    encoder, decoder = networks(dataset, args)
    autoencoder = models.Autoencoder(choose_likelihood(dataset)(decoder), args.latent_dim)
    guide = guides.PointMass(Means(encoder))
    train(autoencoder, guide, x, args.pretrain_epochs, args, seed, **options)
    return encoder, decoder


@torch.no_grad()
def start(
    model: models.VaDE, guide: guides.Normal, x: Tensor, args: argparse.Namespace, seed: int
) -> Tensor:
    """Start the prior at a mixture of the codes: the clusters of x that it finds.

    EM ends in many places, and the most likely one may merge two classes and split a third. So that
    fit is taken which the others agree with most, by the mean of the adjusted Rand index; a fit
    with a collapsed component is left out. The fits see every k-th row, 25,000 at most. log sigma
    has had no training yet: it starts at -2.
    """
    codes = means(guide, x)
    some = codes[:: math.ceil(len(codes) / 25_000)]
    fits, found, errors = [], [], []
    for number in range(args.num_starts):
        try:
            mixture = model.initialise(some, 1_000 * seed + number, 1, args.covariance)
        except ValueError as error:
            errors.append(error)
            continue
        fits.append((mixture, copy.deepcopy(model.prior.state_dict())))
        found.append(mixture.predict(some.double().cpu().numpy()))
    if not fits:
        raise ValueError(
            f"seed {seed}: none of {args.num_starts} mixtures (--num-starts) can start VaDE; the "
            f"last: {errors[-1]}"
        ) from errors[-1]
    if errors:
        print(f"seed {seed}: left out {len(errors)} of {args.num_starts} mixtures, the last since "
              f"{errors[-1]}", flush=True)  # fmt: skip
    agreement = [
        statistics.fmean(metrics.adjusted_rand_index(one, other) for other in found)
        for one in found
    ]
    mixture, prior = fits[agreement.index(max(agreement))]
    model.prior.load_state_dict(prior)
    last = [layer for layer in guide.modules() if isinstance(layer, nn.Linear)][-1]
    last.weight[args.latent_dim :].zero_()
    last.bias[args.latent_dim :].fill_(-2.0)
    return torch.as_tensor(mixture.predict(codes.double().cpu().numpy()))


def train(
    model: ppvae.Program,
    guide: ppvae.Program,
    x: Tensor,
    epochs: int,
    args: argparse.Namespace,
    seed: int,
    lr: float | None = None,
    **options: Any,
) -> ppvae.History:
    """Adam; its learning rate falls to a twentieth along a cosine."""
    lr = args.lr if lr is None else lr
    adam = functools.partial(torch.optim.Adam, lr=lr)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO(), clip_norm=args.clip_norm, compile=args.compile)
    if args.bf16:
        from lightning_fabric import Fabric

        fabric = Fabric(accelerator=x.device.type, devices=1, precision="bf16-mixed")
        fabric.launch()
        options["fabric"] = fabric
    else:
        options["device"] = x.device
    history = ppvae.fit(
        svi,
        x,
        epochs=epochs,
        batch_size=args.batch_size,
        seed=seed,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, epochs, lr / 20
        ),
        **options,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    return history


@torch.no_grad()
def means(guide: guides.Normal, x: Tensor) -> Tensor:
    """The means of q(z | x), of images that are not distorted."""
    with evaluation_mode(guide.to(x.device)):
        return torch.cat([guide.posterior(rows).mean for rows in x.split(10_000)])


@torch.no_grad()
def assigned(model: models.VaDE, guide: guides.Normal, x: Tensor) -> Tensor:
    """The most likely cluster of each row at the mean of q(z | x), as the authors score it."""
    return model.responsibilities(means(guide, x)).argmax(1).cpu()


def baselines(x: Tensor, clusters: int, seed: int, starts: int) -> dict[str, Tensor]:
    """On the data themselves."""
    from sklearn.cluster import KMeans

    kmeans = KMeans(clusters, n_init=starts, random_state=seed)
    return {
        "k-means": torch.as_tensor(kmeans.fit_predict(x.cpu().numpy())),
        "GMM": likeliest(x, clusters, seed, starts, floor=1e-3),
    }


def likeliest(
    x: Tensor, clusters: int, seed: int, starts: int, floor: float = 1e-6, covariance: str = "diag"
) -> Tensor:
    """GMM: the most likely of scikit-learn's mixtures."""
    from sklearn.mixture import GaussianMixture

    gmm = GaussianMixture(
        clusters, covariance_type=covariance, reg_covar=floor, n_init=starts, random_state=seed
    )
    return torch.as_tensor(gmm.fit_predict(x.cpu().numpy()))


# ------------------------------------------------------------------------------ what is reported


class Track(ppvae.Callback):
    """Accuracy and latents while VaDE trains: before, halfway, after."""

    def __init__(
        self, model: models.VaDE, guide: guides.Normal, x: Tensor, y: Tensor, epochs: int
    ) -> None:
        self.model, self.guide, self.x, self.y = model, guide, x, y
        self.epochs, self.every = epochs, max(1, epochs // 30)
        self.accuracy: dict[int, float] = {}
        self.latents: dict[int, tuple[Tensor, Tensor]] = {}
        self.record(0)

    @torch.no_grad()
    def record(self, epoch: int) -> None:
        found = assigned(self.model, self.guide, self.x)
        self.accuracy[epoch] = metrics.clustering_accuracy(found, self.y)
        if epoch in (0, self.epochs // 2, self.epochs):
            z = means(self.guide, self.x[:1000])
            self.latents[epoch] = (z.cpu(), self.model.prior.loc.detach().cpu().clone())

    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        epoch = len(history.rows)
        if epoch % self.every == 0 or epoch in (self.epochs // 2, self.epochs):
            self.record(epoch)

    def plot_accuracy(self) -> Any:
        """Accuracy against epochs; epoch 0 is the start."""
        from matplotlib import pyplot as plt

        _, ax = plt.subplots(figsize=(5.0, 3.2))
        ax.plot(list(self.accuracy), [100 * a for a in self.accuracy.values()], color="#0072B2")
        ax.set(xlabel="epoch of VaDE", ylabel="clustering accuracy [%]")
        ax.spines[["top", "right"]].set_visible(False)
        return ax

    def plot_latents(self) -> Any:
        """Means of q(z | x) on the two main axes of the last ones, coloured by the true class."""
        from matplotlib import pyplot as plt
        from sklearn.decomposition import PCA

        pca = PCA(2).fit(self.latents[max(self.latents)][0].numpy())
        _, axes = plt.subplots(
            1, len(self.latents), figsize=(4.2 * len(self.latents), 4.0),
            squeeze=False,
        )  # fmt: skip
        for ax, (epoch, (z, loc)) in zip(axes[0], self.latents.items(), strict=True):
            plots.latent_scatter(pca.transform(z.numpy()), self.y[: len(z)], ax=ax)
            ax.scatter(*pca.transform(loc.numpy()).T, s=90, c="black", marker="+", zorder=5)
            ax.set(title=f"epoch {epoch}", xlabel="first main axis", ylabel="second main axis")
            if ax is not axes[0, -1] and ax.get_legend() is not None:
                ax.get_legend().remove()
        return axes[0, 0]


@torch.no_grad()
def draw_clusters(model: models.VaDE, dataset: data.Dataset) -> Any:
    """Ten images of each cluster: means of p(x | z) at draws z ~ p(z | c)."""
    clusters = torch.arange(len(model.prior.loc), device=model.prior.loc.device)
    z = model.component(clusters).sample((10,)).swapaxes(0, 1)
    images = reporting.to_pixels(dataset, model.likelihood(z).mean)
    ax = plots.class_grid(images, dataset.shape)
    ax.set_ylabel("cluster")
    return ax


def report(scores: dict[str, list[metrics.Clustering]], rows: int) -> None:
    """Median, worst and best over the seeds."""
    seeds = len(scores["VaDE"])
    lines = []
    for method, found in scores.items():
        accuracy = [100 * s.accuracy for s in found]
        lines.append(
            (
                method,
                f"{statistics.median(accuracy):6.1f} %  ({min(accuracy):.1f} to "
                f"{max(accuracy):.1f})   NMI {statistics.median(s.nmi for s in found):.3f}   "
                f"ARI {statistics.median(s.ari for s in found):.3f}",
            )
        )
    reporting.print_table(
        f"Clustering accuracy of {rows:,} rows: median (worst to best) of "
        f"{reporting.of_seeds(seeds)}",
        lines,
    )


def write(
    out: Path,
    args: argparse.Namespace,
    scores: dict[str, list[metrics.Clustering]],
    name: str,
    seconds: float,
) -> None:
    """Every score of every seed."""
    lines = ["method,seed,accuracy,nmi,ari"]
    for method, found in scores.items():
        for seed, s in enumerate(found, start=args.seed):
            lines.append(f"{method},{seed},{s.accuracy:.4f},{s.nmi:.4f},{s.ari:.4f}")
    (out / "scores.csv").write_text("\n".join(lines) + "\n")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    accuracies = {method: [s.accuracy for s in found] for method, found in scores.items()}
    results = {
        "data": name,
        "accuracy": accuracies,
        "median_accuracy": {m: statistics.median(a) for m, a in accuracies.items()},
        "seconds": seconds,
        "settings": settings,
        "torch": torch.__version__,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, mnist, har, rcv1, ... or a file with labels "
        "(default: %(default)s)")  # fmt: skip
    add("--clusters", type=int, help="how many (default: as many as classes)")
    add("--num-seeds", type=int, default=3, help="runs (default: %(default)s)")
    add("--seed", type=int, default=0, help="the first of them (default: %(default)s)")
    add("--hidden", type=int, nargs="+", default=[256, 256], metavar="N",
        help="widths of the encoder, mirrored in the decoder; the paper: 500 500 2000 "
        "(default: 256 256)")  # fmt: skip
    add("--latent-dim", type=int, default=10, help="size of z (default: %(default)s)")
    add("--num-starts", type=int, default=20, help="of k-means and each mixture; the most likely "
        "is taken, for VaDE's start the most typical (default: %(default)s)")  # fmt: skip
    add("--covariance", choices=["diag", "full"], default="full", help="of the mixture that VaDE "
        "starts from; its own are diagonal (default: %(default)s)")  # fmt: skip
    add("--distortion", type=float, default=1.0, help="how much images are moved and turned "
        "before the encoder sees them in training; 0: not (default: %(default)s)")  # fmt: skip
    add("--pretrain-epochs", type=int, default=200, help="of the autoencoder (default: "
        "%(default)s)")  # fmt: skip
    add("--epochs", type=int, default=30, help="of VaDE; the paper on MNIST: 3000 (default: "
        "%(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=100, help="rows per step (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="Adam's first learning rate for the autoencoder "
        "and the VAE (default: %(default)s)")  # fmt: skip
    add("--vade-lr", type=float, default=3e-4, help="and for VaDE (default: %(default)s)")
    add("--clip-norm", type=float, help="largest norm of the gradient (default: no clipping)")
    add("--bf16", action="store_true", help="matrix products in bfloat16")
    add("--compile", action="store_true", help="compile the step; needs a C++ compiler")
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--out", type=Path, default=Path("out/vade"), metavar="FOLDER", help="where the files go "
        "(default: %(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--quick", "--smoke", action="store_true", help="a check that all runs, in seconds")
    args = parser.parse_args(argv)
    for name in (
        "num_seeds",
        "num_starts",
        "pretrain_epochs",
        "epochs",
        "batch_size",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.latent_dim < 2:
        raise ValueError("--latent-dim must be 2 or more: the picture of z has two axes")
    if args.quick:
        args.hidden, args.num_seeds = [32], 1
        args.pretrain_epochs, args.epochs = min(args.pretrain_epochs, 8), min(args.epochs, 4)
    if args.device != "cuda" and max(args.hidden) <= 256:
        torch.set_num_threads(1)  # small steps gain nothing from a second
    return args


if __name__ == "__main__":
    reporting.run(main)
