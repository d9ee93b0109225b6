"""Few labels: M2 learns classes from some labelled rows and many without; style apart from class.

    python examples/few_labels.py                         # digits, 10 to 300 labels; 3 minutes
    python examples/few_labels.py --per-class 3 --seeds 1
    python examples/few_labels.py --data mnist --per-class 10 --epochs 12
    python examples/few_labels.py --smoke                 # a check that all runs, in seconds

Of the same rows a network of the same size is trained on the labelled ones alone. The epoch, for
both, is the one with the smallest error on the validation part, whose labels are used for that.

Source: Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative Models,
2014.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import reporting
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, elbo, guides, metrics, models, nets, plots
from ppvae.pairs import evaluation_mode

FILES = ["results.json", "styles.png", "errors.png", "training.png"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    dataset = data.load(args.data)
    if dataset.train.y is None or dataset.num_classes is None:
        raise ValueError(f"{dataset.name!r} has no labels: an .npz needs an array y of classes")
    if dataset.support != "binary" or not reporting.is_image(dataset):
        raise ValueError(f"{dataset.name!r} is not of binary images, which this example draws")
    if args.quick:
        dataset = dataset.map_splits(
            lambda part: replace(part, values=part.values[:300], y=part.y[:300])
        )
    print(dataset)

    errors: dict[int, list[tuple[float, float]]] = {}  # by labels, of each seed: M2, network alone
    started = time.perf_counter()
    for per_class in args.per_class:
        labels = per_class * dataset.num_classes
        for seed in range(args.seed, args.seed + args.seeds):
            pyro.set_rng_seed(seed)
            train = data.with_labels(dataset.train, per_class, seed)
            alone = supervised(train, dataset, args)
            model, guide, history = semi_supervised(train, dataset, args, seed)
            found = error(guide.classifier, dataset.test), error(alone, dataset.test)
            errors.setdefault(labels, []).append(found)
            print(f"{labels} labels, seed {seed}: test error of M2 {found[0]:.1%}, of a network on "
                  f"the labelled rows alone {found[1]:.1%}", flush=True)  # fmt: skip
    seconds = time.perf_counter() - started

    means = {
        n: [statistics.mean(v) for v in zip(*pairs, strict=True)] for n, pairs in errors.items()
    }
    reporting.print_table(
        f"{dataset.name}: test error of argmax q(y | x), mean of {reporting.of_seeds(args.seeds)}",
        [(f"{n} labels", f"M2 {a:6.1%}   network alone {b:6.1%}") for n, (a, b) in means.items()],
    )
    reporting.clear(out, FILES)
    reporting.write_results(
        out / "results.json", args, {"errors": errors, "means": means, "seconds": seconds}
    )
    draw_styles(dataset, model, guide, out / "styles.png")
    draw_errors(errors, out / "errors.png")
    reporting.save(history.plot(), out / "training.png")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ training


def semi_supervised(
    train: data.Split, dataset: data.Dataset, args: argparse.Namespace, seed: int
) -> tuple[models.M2, guides.M2, ppvae.History]:
    """M2, trained on all rows, with the classifier of its best epoch."""
    x_dim, C, z_dim = train.values.shape[1], dataset.num_classes or 0, args.latent_dim
    decoder = nets.mlp(z_dim + C, args.width, x_dim)
    model = models.M2(conditionals.Bernoulli(decoder), z_dim, C)
    encoder = nets.mlp(x_dim + C, args.width, 2 * z_dim)
    guide = guides.M2(network(x_dim, C, args), conditionals.Normal(encoder))
    known = train.y >= 0
    # the classifier sees the labelled rows at each step, drawn anew from their grey levels
    term = guides.Labelled(train.values[known], train.y[known], size=args.batch_size,
                           draw=torch.bernoulli)  # fmt: skip
    adam = functools.partial(torch.optim.Adam, lr=args.lr)
    svi = ppvae.SVI(model, guide, adam, elbo.Plus(elbo.ELBO(), term, args.alpha))
    best = Best(guide.classifier, dataset.valid)
    history = ppvae.fit(
        svi,
        train,
        valid=dataset.valid,  # without labels: the bound is one on log p(x)
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=seed,
        on_epoch_end=lambda *_: best.look(),
    )
    best.restore()
    return model, guide, history


def supervised(train: data.Split, dataset: data.Dataset, args: argparse.Namespace) -> nn.Module:
    """The same network, trained on the labelled rows alone."""
    net = network(train.values.shape[1], dataset.num_classes or 0, args)
    known = train.y >= 0
    grey, y = train.values[known], train.y[known]
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr)
    best = Best(net, dataset.valid)
    for step in range(5 if args.quick else 600):
        rows = torch.randint(len(y), (args.batch_size,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(torch.bernoulli(grey[rows])), y[rows]).backward()
        optimizer.step()
        if step % 20 == 0:
            best.look()
    best.restore()
    return net


def network(x_dim: int, num_classes: int, args: argparse.Namespace) -> nn.Module:
    """q(y | x), up to its normaliser."""
    return nets.mlp(x_dim, args.width, num_classes, dropout=args.dropout)


class Best:
    """The parameters with the smallest error on a part of the data."""

    def __init__(self, net: nn.Module, part: data.Split) -> None:
        self.net, self.part, self.smallest = net, part, 2.0
        self.kept: dict[str, Tensor] = {}

    def look(self) -> None:
        found = error(self.net, self.part)
        if found < self.smallest:
            self.smallest = found
            self.kept = {name: v.clone() for name, v in self.net.state_dict().items()}

    def restore(self) -> None:
        self.net.load_state_dict(self.kept)


@torch.no_grad()
def error(net: nn.Module, part: data.Split) -> float:
    with evaluation_mode(net):
        return metrics.error_rate(net(part.x), part.y)


# ------------------------------------------------------------------------------ pictures


@torch.no_grad()
def draw_styles(dataset: data.Dataset, model: models.M2, guide: guides.M2, path: Path) -> None:
    """A test image of each class in a column, then its style given to all classes."""
    x, y, C = dataset.test.x, dataset.test.y, dataset.num_classes or 0
    rows = [int((y == c).nonzero()[0]) for c in y.unique().tolist()]
    with evaluation_mode(model, guide):
        classes = guide.classes(x[rows]).probs.argmax(-1)
        z = guide.posterior(x[rows], classes).mean  # the style, given the class it is taken for
        every = torch.arange(C)[:, None].expand(C, len(rows))
        images = model.likelihood(z, model.one_hot(every)).mean  # (class, row, pixel)
    shown = torch.cat([dataset.test.values[rows][None], images])  # its grey levels
    labels = ["image", *(f"as a {c}" for c in range(C))]
    ax = plots.image_grid(reporting.to_pixels(dataset, shown), dataset.shape, row_labels=labels)
    ax.set_title("one style in each column")
    reporting.save(ax, path)


def draw_errors(errors: dict[int, list[tuple[float, float]]], path: Path) -> None:
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(5.5, 3.8))
    labels = list(errors)
    for i, (name, colour) in enumerate((("M2", "C0"), ("network on the labels alone", "C1"))):
        of_seeds = [[100 * pair[i] for pair in errors[n]] for n in labels]
        ax.plot(labels, [statistics.mean(v) for v in of_seeds], "-", color=colour, label=name)
        for n, values in zip(labels, of_seeds, strict=True):
            ax.plot([n] * len(values), values, "o", color=colour, ms=4, alpha=0.6)
    ax.set(xscale="log", xlabel="labels", ylabel="test error, %", ylim=(0, None))
    ax.set_xticks(labels, [str(n) for n in labels], minor=False)
    ax.minorticks_off()
    ax.legend()
    reporting.save(ax, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, out="out/few_labels")
    add: Any = functools.partial(parser.add_argument, help="(default: %(default)s)")
    add("--data", default="digits")
    add("--per-class", type=int, nargs="+", default=[1, 3, 10, 30], metavar="N")
    add("--seeds", type=int, default=3)
    add("--alpha", type=float, default=1.0)
    add("--epochs", type=int, default=60)
    add("--batch-size", type=int, default=100)
    add("--latent-dim", type=int, default=8)
    add("--width", type=int, default=256)
    add("--dropout", type=float, default=0.0)
    add("--lr", type=float, default=3e-3)
    args = parser.parse_args(argv)
    if args.quick:
        args.per_class, args.seeds, args.epochs, args.width = [1, 3], 1, 2, 16
    return args


if __name__ == "__main__":
    reporting.run(main)
