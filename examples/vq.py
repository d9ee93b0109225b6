r"""A VQ-VAE: images as maps of codes, and what a prior over the codes is worth, in nats.

    python examples/vq.py                           # handwritten digits, 4 x 4 codes
    python examples/vq.py --data mnist --batch-size 64 --epochs 4 --prior-epochs 4
    python examples/vq.py --levels 2 --data freyfaces     # VQ-VAE-2: a coarse and a fine map
    python examples/vq.py --quick                   # a check that all runs, in seconds

Encoder, decoder and codebook are trained first, under a uniform prior. Then everything is frozen,
and priors are fitted by maximum likelihood of the codes: one distribution for all places, and a
network that sees the codes before. A VAE with an equal decoder stands beside them.

Source: van den Oord, Vinyals & Kavukcuoglu, 2017; Razavi, van den Oord & Vinyals, 2019.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
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
from ppvae.pairs import evaluation_mode
from ppvae.train.fit import resolve_device

FILES = ["results.json", "usage.png", "codes.png", "samples.png"]
PRIORS = ["uniform", "unigram", "network"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = resolve_device(args.device)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    dataset = load(args)
    print(f"{dataset}\n", flush=True)
    x = dataset.test.args[0][: args.num_test].to(device)
    started = time.perf_counter()

    model, guide = quantised(dataset, args)
    train(model, guide, dataset, args.epochs, args, elbo.VQELBO(commitment=args.commitment))
    lengths, fitted = {"uniform": code_length(model, guide, x)}, {"uniform": model}
    for kind in PRIORS[1:]:
        fitted[kind] = with_prior(model, guide, kind, args)
        if kind == "unigram":
            count(fitted[kind], guide, dataset.train.args[0].to(device))
        else:
            train_prior(fitted[kind], guide, dataset, args)
        lengths[kind] = code_length(fitted[kind], guide, x)
    vae = plain(dataset, args)
    train(*vae, dataset, args.epochs, args, elbo.ELBO())
    with evaluation_mode(*vae):
        terms = ppvae.log_weights(*vae, x)
    pixels = -float(terms.log_p["x"].detach().mean())
    lengths["VAE"] = {"data": pixels, "codes": -float(terms.log_w.detach().mean()) - pixels}

    numbers = all_numbers(guide, dataset.valid.args[0].to(device))
    used = {name: metrics.code_perplexity(n, args.codes) for name, n in numbers.items()}
    report(lengths, used, args)
    reporting.clear(out, FILES)
    write(out, args, dataset, lengths, used, time.perf_counter() - started)
    draw(dataset, fitted, guide, x[:10], numbers, out, args)
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ the pairs


def load(args: argparse.Namespace) -> data.Dataset:
    """The data set; it must be of images, whose sides the convolutions can halve and double."""
    dataset = reporting.load(args)
    if not reporting.is_image(dataset):
        raise ValueError(f"{dataset.name!r} has rows of shape {dataset.shape}: give images")
    side = min(dataset.shape[-2:])
    args.halvings = args.halvings or max(1, round(math.log2(side / 7)))
    shrunk = [size / 2**args.halvings for size in dataset.shape[-2:]]
    if any(size != int(size) for size in shrunk):
        raise ValueError(
            f"images of {dataset.shape[-2:]} cannot be halved {args.halvings} times: --halvings"
        )
    args.image = (1, *dataset.shape)[-3:]
    args.map = tuple(int(size) for size in shrunk)
    return dataset


def quantised(dataset: data.Dataset, args: argparse.Namespace) -> tuple[Any, Any]:
    """A VQ-VAE under a uniform prior, or a VQ-VAE-2: model and guide."""
    pyro.set_rng_seed(args.seed)
    narrow, wide = widths(args)
    fine = nets.Codebook(args.codes, args.dim)
    bottom = conditionals.CodePrior(fine, args.map)
    if args.levels == 1:
        encoder = nn.Sequential(from_image(args, inwards(args, args.dim)), at(args, args.map))
        likelihood = to_image(dataset, args, nets.upsample(args.dim, args.image[0], wide))
        return models.VAE(likelihood, prior=bottom), guides.Quantized(encoder, fine)
    coarse = nets.Codebook(args.codes, args.dim)
    top = conditionals.CodePrior(coarse, coarse_map(args))
    decoder = nets.MergeMaps(nets.upsample(2 * args.dim, args.image[0], wide))
    model = models.CodeHierarchy(to_image(dataset, args, decoder), bottom, top)
    features = narrow[-1]
    merge = nets.flat_batch(nn.Conv2d(features + args.dim, args.dim, 1), event_dim=3)
    upper = nets.downsample(features, args.dim, [features])
    guide = guides.QuantizedLevels(
        from_image(args, inwards(args, features)),
        nn.Sequential(upper, at(args, top.shape)),
        nets.MergeMaps(nn.Sequential(merge, at(args, args.map))),
        (fine, coarse),
    )
    return model, guide


def plain(dataset: data.Dataset, args: argparse.Namespace) -> tuple[Any, Any]:
    """A VAE whose latent is a map of the same size, with the same decoder."""
    pyro.set_rng_seed(args.seed)
    _, wide = widths(args)
    encoder = from_image(args, inwards(args, 2 * args.dim))
    likelihood = to_image(dataset, args, nets.upsample(args.dim, args.image[0], wide))
    prior = conditionals.StandardNormal((args.dim, *args.map))
    guide = guides.Amortized(conditionals.Normal(encoder, event_dim=3))
    return models.VAE(likelihood, prior=prior), guide


def with_prior(model: Any, guide: Any, kind: str, args: argparse.Namespace) -> Any:
    """The model with another prior of its codes; all else, and the guide, frozen."""
    pyro.set_rng_seed(args.seed)
    fitted = copy.copy(model)
    fitted._modules = dict(model._modules)
    model.likelihood.requires_grad_(False)
    guide.requires_grad_(False)
    if args.levels == 1:
        fitted.prior = prior_of(model.prior, kind, args)
    else:
        fitted.top = prior_of(model.top, kind, args)
        fitted.bottom = prior_of(model.bottom, kind, args, context_dim=args.dim)
    return fitted


def prior_of(old: Any, kind: str, args: argparse.Namespace, context_dim: int = 0) -> Any:
    """A prior of the codes of another one."""
    K, shape, net = args.codes, old.shape, nets.Unigram(args.codes)
    if kind == "network" and args.prior == "gru":
        net = nets.CausalGRU(K, shape, hidden=args.prior_width, context_dim=context_dim)
    elif kind == "network":
        net = nets.CausalConv(K, args.prior_width, layers=6, context_dim=context_dim)
    return conditionals.CodePrior(old.quantizer, shape, net)


def count(model: Any, guide: Any, x: Tensor) -> None:
    """Set unigram priors to the frequencies of the codes of some rows."""
    priors = [model.bottom, model.top] if hasattr(model, "bottom") else [model.prior]
    for prior, numbers in zip(priors, all_numbers(guide, x).values(), strict=True):
        prior.net.to(x.device).initialise(numbers)


def coarse_map(args: argparse.Namespace) -> tuple[int, int]:
    """The size of the coarse map of codes: half that of the fine one, rounded up."""
    height, width = (-(-size // 2) for size in args.map)
    return height, width


def inwards(args: argparse.Namespace, width_out: int) -> nn.Module:
    """From images to maps; by its residual blocks each place sees most of the image."""
    narrow, _ = widths(args)
    return nets.downsample(args.image[0], width_out, narrow, residual_blocks=args.blocks)


def at(args: argparse.Namespace, shape: tuple[int, int]) -> nn.Module:
    """What gives the places of a map codes of their own."""
    return nets.PositionEmbedding(args.dim, shape, args.places)


def widths(args: argparse.Namespace) -> tuple[list[int], list[int]]:
    """Channels from the image inwards, and from the codes outwards."""
    narrow = [args.width * 2**i for i in range(args.halvings)]
    return narrow, narrow[::-1]


def from_image(args: argparse.Namespace, net: nn.Module) -> nn.Module:
    """A network of images as one of rows, as the data sets have them."""
    return nn.Sequential(nn.Unflatten(-1, args.image), net)


def to_image(dataset: data.Dataset, args: argparse.Namespace, net: nn.Module) -> Any:
    """The likelihood of rows by a network that gives images."""
    return reporting.likelihood(dataset, math.prod(args.image))(Flattened(net))


class Flattened(nn.Module):
    """The images that a network gives, as rows."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *maps: Tensor) -> Tensor:
        rows: Tensor = self.net(*maps).flatten(-3)
        return rows


def train(
    model: Any,
    guide: Any,
    dataset: data.Dataset,
    epochs: int,
    args: argparse.Namespace,
    loss: elbo.ELBO,
    **options: Any,
) -> ppvae.History:
    """Train a pair."""
    pyro.set_rng_seed(args.seed)
    compile = "auto" if args.compile else False
    svi = ppvae.SVI(model, guide, adam(args), loss, compile=compile)
    return whole(ppvae.fit(svi, dataset.train, **settings(epochs, args), **options))


def train_prior(
    model: Any, guide: Any, dataset: data.Dataset, args: argparse.Namespace, **options: Any
) -> ppvae.History:
    """Train the networks of a model's prior by maximum likelihood of the codes.

    One map of codes is drawn once for each row. Two are trained by the ELBO, which is the same
    but for a constant, and has codes of other binary pixels in each epoch.
    """
    if args.levels == 2:
        return train(model, guide, dataset, args.prior_epochs, args, elbo.ELBO(), **options)
    pyro.set_rng_seed(args.seed)
    how = settings(args.prior_epochs, args) | options
    guide.to(how["device"])
    rows = dataset.train.to(how["device"])
    return whole(ppvae.fit_prior(model.prior, guide, rows, optim=adam(args), **how))


def adam(args: argparse.Namespace) -> Any:
    """The optimiser."""
    return functools.partial(torch.optim.Adam, lr=args.lr)


def settings(epochs: int, args: argparse.Namespace) -> dict[str, Any]:
    """For the loop: the learning rate falls to a twentieth along a cosine."""
    anneal = functools.partial(
        torch.optim.lr_scheduler.CosineAnnealingLR, T_max=epochs, eta_min=args.lr / 20
    )
    device = resolve_device(args.device)
    return {"epochs": epochs, "batch_size": args.batch_size, "lr_scheduler": anneal,
            "device": device, "seed": args.seed}  # fmt: skip


def whole(history: ppvae.History) -> ppvae.History:
    """A history, unless a signal has ended it."""
    if history.interrupted:
        raise KeyboardInterrupt
    return history


# ------------------------------------------------------------------------------ what is reported


@torch.no_grad()
def code_length(model: Any, guide: Any, x: Tensor) -> dict[str, float]:
    """Nats per image: of the data given the codes, and of the codes."""
    with evaluation_mode(model, guide):
        parts = [ppvae.log_weights(model, guide, rows).log_p for rows in x.split(500)]
    sums = {name: -sum(float(p[name].sum()) for p in parts) / len(x) for name in parts[0]}
    pixels = sums.pop("x")
    return {"data": pixels, "codes": sum(sums.values())}


@torch.no_grad()
def all_numbers(guide: Any, x: Tensor) -> dict[str, Tensor]:
    """The codes of each row, by latent, the finest first."""
    with evaluation_mode(guide):
        found = [guide.indices(rows) for rows in x.split(500)]
    if isinstance(found[0], Tensor):
        return {"z": torch.cat(found)}
    return {f"z{i + 1}": torch.cat([n[i] for n in found]) for i in range(2)}


def report(
    lengths: dict[str, dict[str, float]], used: dict[str, float], args: argparse.Namespace
) -> None:
    """The table, and how many codes are used."""
    names = {"uniform": "VQ-VAE, uniform prior", "unigram": "VQ-VAE, one distribution",
             "network": f"VQ-VAE, {args.prior} prior", "VAE": "VAE, equal decoder"}  # fmt: skip
    rows = [
        (names[name], f"{sum(part.values()):8.2f} = {part['data']:7.2f} + {part['codes']:7.2f}")
        for name, part in lengths.items()
    ]
    reporting.print_table("Test -ELBO [nats per image] = data given latent + latent", rows)
    shown = ", ".join(f"{name}: {value:.1f}" for name, value in used.items())
    print(f"\nCode perplexity over the validation set, of {args.codes}: {shown}")


def write(
    out: Path,
    args: argparse.Namespace,
    dataset: data.Dataset,
    lengths: dict[str, dict[str, float]],
    used: dict[str, float],
    seconds: float,
) -> None:
    """The numbers, with all settings."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    results = {
        "data": dataset.name,
        "negative_elbo_nats": {name: sum(part.values()) for name, part in lengths.items()},
        "parts_nats": lengths,
        "code_perplexity": used,
        "seconds": seconds,
        "settings": settings,
        "torch": torch.__version__,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")


# ------------------------------------------------------------------------------ pictures


def draw(
    dataset: data.Dataset,
    fitted: dict[str, Any],
    guide: Any,
    x: Tensor,
    numbers: dict[str, Tensor],
    out: Path,
    args: argparse.Namespace,
) -> None:
    """How often each of the finest codes is used, codes of some images, samples."""
    count = torch.bincount(next(iter(numbers.values())).flatten(), minlength=args.codes)
    reporting.save(plots.code_usage(count), out / "usage.png")
    draw_codes(dataset, fitted["uniform"], guide, x, out / "codes.png")
    draw_samples(dataset, fitted, out / "samples.png", args.seed)


@torch.no_grad()
def draw_codes(dataset: data.Dataset, model: Any, guide: Any, x: Tensor, path: Path) -> None:
    """Images, their codes, and what is decoded from these."""
    from matplotlib import pyplot as plt

    with evaluation_mode(model, guide):
        latents = guide(x)
        latents = latents if isinstance(latents, tuple) else (latents,)
        decoded = reporting.to_pixels(dataset, model.likelihood(*latents).mean)
        priors = [model.prior] if len(latents) == 1 else [model.bottom, model.top]
    height = 1.2 * args_of(dataset)
    size = (0.75 * len(x) + 1.2, 0.75 * height * (2 + len(latents)))
    ratios = [2, *[1] * len(latents)]
    _, axes = plt.subplots(1 + len(latents), 1, figsize=size, height_ratios=ratios)
    plots.reconstructions(reporting.to_pixels(dataset, x), decoded, dataset.shape, ax=axes[0])
    for ax, prior, z in zip(axes[1:], priors, latents, strict=True):
        maps, book = prior.quantizer.indices(z), prior.quantizer.table()
        plots.code_maps(maps.unsqueeze(0), book, ax=ax)
        ax.set_yticks([(maps.shape[1] - 1) / 2], [f"{maps.shape[1]} x {maps.shape[2]} codes"])
    reporting.save(axes[0], path)


def args_of(dataset: data.Dataset) -> float:
    """Height over width of an image."""
    return dataset.shape[-2] / dataset.shape[-1]


@torch.no_grad()
def draw_samples(dataset: data.Dataset, fitted: dict[str, Any], path: Path, seed: int) -> None:
    """Means of x at codes from the uniform and from the fitted prior."""
    from matplotlib import pyplot as plt

    shown = {"uniform": "uniform prior", "network": "fitted prior"}
    side = 2.6 * args_of(dataset)
    _, axes = plt.subplots(1, 2, figsize=(5.6, side + 0.3))
    for ax, (kind, title) in zip(axes, shown.items(), strict=True):
        pyro.set_rng_seed(seed)
        model = fitted[kind]
        with evaluation_mode(model):
            if isinstance(model, models.CodeHierarchy):
                z2 = model.top().expand((36,)).sample()
                latents = model.bottom(z2).sample() if kind == "network" else (
                    model.bottom(z2).expand((36,)).sample())  # fmt: skip
                mean = model.likelihood(latents, z2).mean
            else:
                mean = model.likelihood(model.prior().expand((36,)).sample()).mean
        images = reporting.to_pixels(dataset, mean)
        plots.image_grid(images, dataset.shape, columns=6, ax=ax, title=title)
    reporting.save(axes[0], path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, mnist, freyfaces, ... or your own images, "
        "(default: %(default)s)")  # fmt: skip
    add("--label", metavar="COLUMN", help="label column of a .csv")
    add("--shape", type=int, nargs="+", metavar="N", help="of one image, where rows are flat")
    add("--binarize", choices=["default", "dynamic", "static", "none"], default="default",
        help="draw 0/1 pixels from grey levels (default: as the data set is known)")  # fmt: skip
    add("--levels", type=int, choices=[1, 2], default=1, help="2: VQ-VAE-2 (default: 1)")
    add("--codes", type=int, default=64, help="size of each codebook (default: %(default)s)")
    add("--dim", type=int, default=16, help="numbers per code (default: %(default)s)")
    add("--halvings", type=int, help="of the image's sides (default: to about 7)")
    add("--width", type=int, default=24, help="channels of the outermost convolution; each further "
        "one has twice as many (default: %(default)s)")  # fmt: skip
    add("--blocks", type=int, default=1, help="residual blocks after each convolution of the "
        "encoder (default: %(default)s)")  # fmt: skip
    add("--places", type=float, default=0.5, help="first size of the vectors by which places "
        "differ, per number of a code (default: %(default)s)")  # fmt: skip
    add("--commitment", type=float, default=0.25, help="nats per squared distance (default: "
        "%(default)s)")  # fmt: skip
    add("--prior", choices=["gru", "conv"], default="gru", help="the network (default: gru)")
    add("--prior-width", type=int, default=128, help="of the network (default: %(default)s)")
    add("--epochs", type=int, default=60, help="of codes, and of the VAE (default: %(default)s)")
    add("--prior-epochs", type=int, default=60, help="of each prior (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="rows per step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="Adam's first learning rate (default: %(default)s)")
    add("--num-test", type=int, default=10_000, help="rows to report on (default: %(default)s)")
    add("--compile", action="store_true", help="compile the steps; needs a C++ compiler")
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--out", type=Path, default=Path("out/vq"), metavar="FOLDER", help="where the files go "
        "(default: %(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--quick", "--smoke", dest="smoke", action="store_true", help="a check, in seconds")
    args = parser.parse_args(argv)
    for name in ("epochs", "prior_epochs", "batch_size", "width", "num_test"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.smoke:
        args.codes, args.width, args.prior_width = 8, 4, 8
        args.epochs = args.prior_epochs = 1
    if args.device != "cuda":
        torch.set_num_threads(1)
    return args


if __name__ == "__main__":
    reporting.run(main)
