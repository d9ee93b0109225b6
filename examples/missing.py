"""Digits of which half is missing, in training too: what could stand in the gaps, and k-hat.

    python examples/missing.py                      # a minute on one core
    python examples/missing.py --smoke              # a check that all runs, in seconds

Of each image of the digits a share of the pixels between none and 90 % is hidden at random, and put
aside; nothing trains on a complete image. Test images are imputed by importance weights: the
posterior mean of each hidden pixel, and joint draws of all that are hidden in an image. Errors are
beside those of the most frequent value and of the nearest rows. k-hat by the share that is missing
says where the weights can be trusted, for the masks of training and for another kind of mask, the
lower half. Source: Mattei & Frellsen, MIWAE, 2019.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import reporting
import torch
from torch import Tensor

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, plots
from ppvae.plots.common import BLUE, ORANGE, RED

FILES = ["errors.csv", "imputed.png", "khat.png"]
EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    torch.set_num_threads(1)  # the networks are small
    pyro.set_rng_seed(args.seed)
    dataset = data.load("digits", seed=args.seed)
    train, valid, test = (
        (part.x, scattered(part.x)) for part in (dataset.train, dataset.valid, dataset.test)
    )

    decoder = nets.mlp(args.latent_dim, args.width, 64, dropout=args.dropout)
    model = models.Masked(models.VAE(conditionals.Bernoulli(decoder), args.latent_dim))
    encoder = nets.mlp(2 * 64, args.width, 2 * args.latent_dim)
    guide = guides.Normal(nets.Masked(encoder, fill=0.5))
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    svi = ppvae.SVI(model, guide, adam, elbo.IWELBO(num_particles=10))
    history = ppvae.fit(
        svi, hidden(*train), valid=hidden(*valid), epochs=args.epochs, batch_size=64,
        seed=args.seed, patience=args.epochs // 5 or 1, progress=False,
    )  # fmt: skip
    print(f"Trained for {len(history.rows)} epochs, the best is {history.best_epoch}.")

    weigh = functools.partial(
        ppvae.impute, model, guide, num_particles=args.particles, seed=args.seed
    )
    x = test[0][: args.num_test]
    found = weigh(*hidden(x, test[1][: args.num_test]))
    lower = weigh(*hidden(x, upper_half(x)))
    table = errors(found, x, dataset.test.values[: len(x)], *train)
    print(f"\nHidden pixels that are wrong, by how much of an image is missing:\n"
          f"{table.to_string(float_format='%.3f')}\n")  # fmt: skip
    for name, each in (("pixels here and there", found), ("the lower half", lower)):
        print(f"Missing {name}: k-hat above 0.7 on {(each.khat > 0.7).double().mean():.1%} "
              f"of {len(x)} test images, median {each.khat.median():.2f}")  # fmt: skip

    table.to_csv(out / "errors.csv")
    draw_images(weigh, dataset, out / "imputed.png", args.seed)
    draw_khat(found, lower, out / "khat.png")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ masks


def scattered(x: Tensor, share: float | None = None) -> Tensor:
    """Which pixels are seen: each row hides a share of its own, from none to 90 %, or this one."""
    shares = 0.9 * torch.rand(len(x), 1) if share is None else torch.full((len(x), 1), share)
    seen = torch.rand(x.shape) >= shares
    seen[~seen.any(1), 0] = True
    return seen


def upper_half(x: Tensor) -> Tensor:
    """The first 32 of 64 pixels are seen."""
    return (torch.arange(x.shape[1]) < x.shape[1] // 2).expand_as(x)


def hidden(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as a user has them, NaN in the gaps, and the mask."""
    return x.masked_fill(~seen, torch.nan), seen


# ------------------------------------------------------------------------------ how good they are


def errors(
    found: diagnostics.Imputation, x: Tensor, grey: Tensor, train: Tensor, seen: Tensor
) -> pd.DataFrame:
    """The share of hidden pixels that are wrong, by rows' share of hidden ones.

    Pixels were drawn from grey levels, so somebody who knows these is wrong, too.
    """
    from sklearn.impute import KNNImputer

    known = found.observed
    mean = (train * seen).sum(0) / seen.sum(0)
    nearest = KNNImputer(n_neighbors=10).fit(hidden(train, seen)[0].numpy())
    guesses = {
        "most frequent": mean.round().expand_as(x),
        "10 nearest": torch.from_numpy(nearest.transform(hidden(x, known)[0].numpy())).round(),
        "imputed": found.filled,
        "grey level known": grey.round(),
    }
    missing = (~known).double().mean(1)
    lines = []
    for low, high in itertools.pairwise(EDGES):
        rows = (missing > low) & (missing <= high)
        line: dict[str, Any] = {"missing": f"{low:.0%} to {high:.0%}", "images": int(rows.sum())}
        gaps = ~known & rows[:, None]
        line |= {n: (g != x)[gaps].double().mean().item() for n, g in guesses.items()}
        lines.append(line | {"k-hat > 0.7": (found.khat[rows] > 0.7).double().mean().item()})
    return pd.DataFrame(lines).set_index("missing")


# ------------------------------------------------------------------------------ pictures


def draw_images(weigh: Any, dataset: data.Dataset, path: Path, seed: int) -> None:
    """Test images of each class: what was seen, the mean, joint draws, and the truth."""
    x, y = dataset.test.x, dataset.test.y
    rows = [int((y == c).nonzero()[0]) for c in range(10)]
    x = x[[*rows[:5], *rows[5:]]]
    half = scattered(x, 0.5)
    half[5:] = upper_half(x[5:])
    found = weigh(*hidden(x, half), num_draws=3)
    shown = [x.masked_fill(~half, torch.nan), found.mean.float(), *found.draws.float(), x]
    labels = ["seen", "mean", "draw 1", "draw 2", "draw 3", "truth"]
    ax = plots.image_grid(torch.stack(shown), dataset.shape, row_labels=labels)
    ax.set_title("half of the pixels missing, or the lower half", fontsize="medium")
    reporting.save(ax, path)


def draw_khat(found: diagnostics.Imputation, lower: diagnostics.Imputation, path: Path) -> None:
    from matplotlib import pyplot as plt

    missing = (~found.observed).double().mean(1)
    _, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    ax.plot(missing, found.khat, "o", ms=3, alpha=0.5, color=BLUE, label="pixels here and there")
    half = 0.5 + 0.03 * (torch.rand(len(lower.khat)) - 0.5)
    ax.plot(half, lower.khat, "s", ms=3, alpha=0.5, color=ORANGE, label="the lower half")
    ax.axhline(0.7, color=RED, linestyle="--", linewidth=1, label="0.7: above, do not trust it")
    ax.set(xlabel="share of an image that is missing", ylabel="k-hat of its weights")
    ax.xaxis.set_major_formatter("{x:.0%}")
    ax.legend(frameon=False, loc="upper right")
    reporting.save(ax, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/missing")
    add: Any = functools.partial(parser.add_argument, help="(default: %(default)s)")
    add("--epochs", type=int, default=300)
    add("--latent-dim", type=int, default=8)
    add("--width", type=int, default=128)
    add("--dropout", type=float, default=0.0)
    add("--particles", type=int, default=2000)
    add("--num-test", type=int, default=300)
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.width, args.particles, args.num_test = 2, 16, 30, 100
    return args


if __name__ == "__main__":
    reporting.run(main)
