"""VaDE: clusters found by a VAE with a mixture prior, from pretraining to scores over seeds.

    python examples/vade.py                            # handwritten digits
    python examples/vade.py --data mnist --hidden 500 500 2000 --epochs 300 --num-seeds 5
    python examples/vade.py --data har                 # any features: also rcv1, or my.npz
    python examples/vade.py --quick                    # a check that all runs, in seconds

Everything a result depends on is here: the autoencoder that starts the networks, the mixture that
starts the prior, and every seed is reported. Labels are used for the scores alone.

Source: Jiang, Zheng, Tan, Tang and Zhou, Variational Deep Embedding, 2017.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import reporting
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, elbo, guides, metrics, models, nets, plots
from ppvae.train import resolve_device

FILES = ["results.json", "scores.csv", "accuracy.png", "latents.png", "clusters.png"]
METHODS = ["k-means", "GMM", "VAE + GMM", "AE + GMM", "VaDE"]


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

    # The data: all rows, as in the paper, which scores the rows it trains on. No binarisation.
    dataset = data.load(args.data, binarize=None)
    if dataset.num_classes is None:
        raise ValueError(
            f"{dataset.name!r} has no labels, and the scores need them: give an .npz arrays x and y"
        )
    parts = (dataset.train, dataset.valid, dataset.test)
    rows = 300 if args.quick else None
    x = torch.cat([part.x[:rows] for part in parts]).flatten(1).to(device)
    y = torch.cat([part.y[:rows] for part in parts if part.y is not None])
    likelihood = choose_likelihood(dataset)
    clusters = args.clusters or dataset.num_classes
    if len(x) < clusters:
        raise ValueError(f"{len(x)} rows are fewer than {clusters} clusters: give more rows")
    print(f"{dataset}\n\nAll {len(x):,} rows, {clusters} clusters, on {device}", flush=True)

    scores: dict[str, list[metrics.Clustering]] = {method: [] for method in METHODS}
    started, best = time.perf_counter(), -1.0
    for seed in range(args.seed, args.seed + args.num_seeds):
        score = functools.partial(metrics.clustering, labels=y, num_clusters=clusters)
        for method, found in baselines(x, clusters, seed, args.num_starts).items():
            scores[method].append(score(found))

        # VAE + GMM: a VAE from scratch, then a mixture on its means.
        pyro.set_rng_seed(seed)
        encoder, decoder = networks(args, x.shape[1])
        vae, guide = models.VAE(likelihood(decoder), args.latent_dim), guides.Normal(encoder)
        train(vae, guide, x, args.pretrain_epochs + args.epochs, args, device, seed)
        by_gmm = models.VaDE(likelihood(decoder), mixture(args, clusters).to(device))
        codes = means(guide, x)
        scores["VAE + GMM"].append(
            score(by_gmm.initialise(codes, seed, args.num_starts).predict(codes.cpu()))
        )

        # AE + GMM: an autoencoder, then a mixture on its codes. This is where VaDE starts.
        pyro.set_rng_seed(seed)
        encoder, decoder = networks(args, x.shape[1])
        autoencoder = models.Autoencoder(likelihood(decoder), args.latent_dim)
        train(autoencoder, guides.PointMass(Means(encoder)), x, args.pretrain_epochs, args, device,
              seed)  # fmt: skip
        model = models.VaDE(likelihood(decoder), mixture(args, clusters).to(device))
        guide = guides.Normal(encoder)
        codes = means(guide, x)
        start = model.initialise(codes, seed, args.num_starts).predict(codes.cpu())
        scores["AE + GMM"].append(score(start))

        # VaDE: the same networks go on, with the mixture as prior.
        track = Track(model, guide, x, y, args.epochs)
        train(model, guide, x, args.epochs, args, device, seed, [track])
        found = model.clusters(guide.posterior(x)).argmax(1).cpu()
        scores["VaDE"].append(score(found))
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


def choose_likelihood(dataset: data.Dataset) -> Any:
    """Cross-entropy for values in [0, 1], and the squared error, sigma^2 = 1/2, for others."""
    if dataset.support in ("binary", "unit_interval"):
        return functools.partial(conditionals.Bernoulli, grey=True)
    return functools.partial(conditionals.Normal, scale=0.5**0.5)


def networks(args: argparse.Namespace, x_dim: int) -> tuple[nn.Module, nn.Module]:
    """Encoder to means and log-sigmas of z, decoder back."""
    z, hidden = args.latent_dim, args.hidden
    return nets.mlp(x_dim, *hidden, 2 * z), nets.mlp(z, *reversed(hidden), x_dim)


def mixture(args: argparse.Namespace, clusters: int) -> conditionals.Mixture:
    return conditionals.Mixture(clusters, args.latent_dim)


def train(
    model: ppvae.Program,
    guide: ppvae.Program,
    x: Tensor,
    epochs: int,
    args: argparse.Namespace,
    device: torch.device,
    seed: int,
    callbacks: Sequence[ppvae.Callback] = (),
) -> None:
    """The paper's schedule: Adam, x 0.9 every 10 epochs down to a tenth."""
    adam = functools.partial(torch.optim.Adam, lr=args.lr)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO(), clip_norm=args.clip_norm, compile=args.compile)
    ppvae.fit(
        svi,
        x,
        epochs=epochs,
        batch_size=args.batch_size,
        device=device,
        seed=seed,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: max(0.1, 0.9 ** (epoch // 10))
        ),
        callbacks=callbacks,
    )


@torch.no_grad()
def means(guide: guides.Normal, x: Tensor) -> Tensor:
    """The means of q(z | x)."""
    mean: Tensor = guide.to(x.device).posterior(x).mean
    return mean


def baselines(x: Tensor, clusters: int, seed: int, starts: int) -> dict[str, Any]:
    """scikit-learn on the data themselves."""
    from sklearn.cluster import KMeans
    from sklearn.mixture import GaussianMixture

    rows = x.cpu().double().numpy()
    gmm = GaussianMixture(
        clusters, covariance_type="diag", reg_covar=1e-3, n_init=starts, random_state=seed
    )
    return {
        "k-means": KMeans(clusters, n_init=starts, random_state=seed).fit_predict(rows),
        "GMM": gmm.fit_predict(rows),
    }


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
        z = means(self.guide, self.x)
        found = self.model.responsibilities(z).argmax(1)
        self.accuracy[epoch] = metrics.clustering_accuracy(found, self.y)
        if epoch in (0, self.epochs // 2, self.epochs):
            self.latents[epoch] = (z[:1000].cpu(), self.model.prior.loc.detach().cpu().clone())

    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        epoch = len(history.rows)
        if epoch % self.every == 0 or epoch in (self.epochs // 2, self.epochs):
            self.record(epoch)

    def plot_accuracy(self) -> Any:
        """Accuracy against epochs; epoch 0 is AE + GMM."""
        from matplotlib import pyplot as plt

        _, ax = plt.subplots(figsize=(5.0, 3.2), layout="constrained")
        ax.plot(list(self.accuracy), [100 * a for a in self.accuracy.values()], color="#0072B2")
        ax.set(xlabel="epoch of VaDE (0: AE + GMM)", ylabel="clustering accuracy [%]")
        ax.spines[["top", "right"]].set_visible(False)
        return ax

    def plot_latents(self) -> Any:
        """Means of q(z | x) on the two main axes of the last ones, coloured by the true class."""
        from matplotlib import pyplot as plt
        from sklearn.decomposition import PCA

        pca = PCA(2).fit(self.latents[max(self.latents)][0].numpy())
        _, axes = plt.subplots(
            1, len(self.latents), figsize=(4.2 * len(self.latents), 4.0), layout="constrained",
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
        f"Clustering accuracy of {rows:,} rows: median (worst to best) of {seeds} seeds", lines
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
    add("--num-starts", type=int, default=10, help="of each mixture and of k-means; the most "
        "likely is taken (default: %(default)s)")  # fmt: skip
    add("--pretrain-epochs", type=int, default=60, help="of the autoencoder (default: "
        "%(default)s)")  # fmt: skip
    add("--epochs", type=int, default=200, help="of VaDE; the paper on MNIST: 3000 (default: "
        "%(default)s)")  # fmt: skip
    add("--batch-size", type=int, default=100, help="rows per step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="Adam's first learning rate (default: %(default)s)")
    add("--clip-norm", type=float, help="largest norm of the gradient (default: no clipping)")
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
        "latent_dim",
        "pretrain_epochs",
        "epochs",
        "batch_size",
    ):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.quick:
        args.hidden, args.num_seeds = [32], 1
        args.pretrain_epochs, args.epochs = min(args.pretrain_epochs, 8), min(args.epochs, 4)
    if args.device != "cuda" and max(args.hidden) <= 256:
        torch.set_num_threads(1)  # small steps gain nothing from a second
    return args


if __name__ == "__main__":
    reporting.run(main)
