"""A table with gaps: 30 % of its cells missing, imputed, and whether that can be trusted.

    python examples/table.py
    python examples/table.py --quick                     # a check that all runs, in seconds

442 patients of scikit-learn's diabetes data: nine numbers, a class of two words, and how far the
disease had gone a year later in four ordered levels. Cells are hidden at random (MCAR) and put
aside; the pair sees what is left. Then each hidden cell is compared with its posterior: errors
beside those of a column's mean and of the nearest rows, and the PIT, which is uniform if that
posterior is right. Source: Mattei & Frellsen, MIWAE, 2019.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets, plots
from ppvae.diagnostics.uniformity import ecdf_band
from ppvae.plots.common import BLUE, RED

FILES = ["imputed.csv", "columns.csv", "missingness.csv", "cells.png", "pit.png"]
NAMES = {
    "s1": "cholesterol",
    "s2": "ldl",
    "s3": "hdl",
    "s4": "ratio",
    "s5": "log_trig",
    "s6": "sugar",
}


def patients() -> pd.DataFrame:
    """The complete table, in the units of the patients' records."""
    from sklearn.datasets import load_diabetes

    frame = load_diabetes(as_frame=True, scaled=False).frame.rename(columns=NAMES)
    frame["sex"] = np.where(frame.sex == 1, "one", "other")  # the records do not say which is which
    levels = ["little", "some", "more", "much"]
    frame["course"] = pd.qcut(frame.pop("target"), 4, labels=levels).cat.as_ordered()
    return frame


def hide(frame: pd.DataFrame, share: float, seed: int) -> pd.DataFrame:
    """The same with a share of the cells missing, and no row empty."""
    random = np.random.default_rng(seed)
    hidden = random.random(frame.shape) < share
    hidden[hidden.all(1), 0] = False
    return frame.mask(hidden)


def pair(
    table: data.Table, latent_dim: int, hidden: list[int]
) -> tuple[models.Masked, guides.Normal]:
    heavy_tails = functools.partial(conditionals.StudentT, df=5.0)  # and a variance
    kinds = conditionals.heads_for(table, numbers=heavy_tails)
    decoder = nets.mlp(latent_dim, *hidden, conditionals.Columns.width(kinds))
    model = models.Masked(models.VAE(conditionals.Columns(decoder, kinds), latent_dim=latent_dim))
    features = nets.Columns(table)  # of a NaN they are 0
    width = features.out_features + len(table.columns)
    encoder = nn.Sequential(features, nets.mlp(width, *hidden, 2 * latent_dim))
    return model, guides.Normal(nets.Masked(encoder, fill=math.nan))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    torch.set_num_threads(1)  # the networks are small
    pyro.set_rng_seed(args.seed)
    complete = patients()
    frame = hide(complete, args.missing, args.seed)
    numbers = {name: "number" for name in frame if name not in ("sex", "course")}
    table = data.Table.fit(frame, numbers)  # whole ones would be counts
    x, truth = table.to_tensor(frame), table.to_tensor(complete)
    print(f"{table!r}\n\n{int(x.isnan().sum())} of {x.numel()} cells are missing.")

    parts = data.from_arrays(x, missing="mask", valid=0.15, test=1, seed=args.seed)
    model, guide = pair(table, args.latent_dim, args.hidden)
    adam = functools.partial(torch.optim.Adam, lr=2e-3, weight_decay=1e-4)
    svi = ppvae.SVI(model, guide, adam, elbo.IWELBO(num_particles=20))
    history = ppvae.fit(
        svi, parts.train, valid=parts.valid, epochs=args.epochs, batch_size=64, seed=args.seed,
        patience=args.epochs // 5 or 1, progress=False,
    )  # fmt: skip
    print(f"Trained for {len(history.rows)} epochs, the best is {history.best_epoch}.\n")

    observed = ~x.isnan()
    report = ppvae.diagnose(model, guide, x, observed, num_particles=args.particles, seed=args.seed)
    missingness = report.by_missingness()
    print(f"By how much of a row is missing:\n{missingness.to_string(float_format='%.2f')}\n")
    found = ppvae.impute(
        model, guide, x, observed, num_particles=args.particles, num_draws=99, seed=args.seed
    )
    columns = errors(table, truth, found)
    print(f"Errors of hidden cells:\n{columns.to_string(float_format='%.2f')}\n")

    missingness.to_csv(out / "missingness.csv")
    columns.to_csv(out / "columns.csv")
    imputed = table.to_frame(found.filled).where(frame.isna(), frame)  # with all digits that it had
    imputed.to_csv(out / "imputed.csv", index=False, float_format="%.6g")
    draw_cells(table, truth, found).savefig(out / "cells.png")
    draw_pit(table, truth, found, args.seed).savefig(out / "pit.png")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ how good they are


def errors(table: data.Table, truth: Tensor, found: ppvae.diagnostics.Imputation) -> pd.DataFrame:
    """By column: the error of hidden cells, by ours and by simpler means, and how sure we were.

    Of numbers and counts it is the root of the mean square in standard deviations of the column; of
    classes and levels the share that is wrong, the simple guess being the most frequent one.
    """
    from sklearn.impute import KNNImputer

    gaps = truth.masked_fill(~found.observed, torch.nan)
    scale = torch.from_numpy(np.nanstd(gaps.numpy(), 0))
    nearest = torch.from_numpy(KNNImputer(n_neighbors=10).fit_transform(gaps / scale)) * scale
    lines = []
    for i, column in enumerate(table.columns):
        hidden = ~found.observed[:, i]
        true, values = truth[hidden, i].double(), gaps[~hidden, i].double()
        line = {"column": column.name, "kind": column.kind, "hidden": int(hidden.sum())}
        if column.num_levels:
            guess = values.mode().values
            line["simple"] = (true != guess).double().mean().item()
            line["nearest"] = (true != nearest[hidden, i].round()).double().mean().item()
            line["imputed"] = (true != found.filled[hidden, i]).double().mean().item()
        else:
            unit = values.std()
            line["simple"] = rms(true - values.mean(), unit)
            line["nearest"] = rms(true - nearest[hidden, i], unit)
            line["imputed"] = rms(true - found.mean[hidden, i], unit)
            inside = (true - found.mean[hidden, i]).abs() < 2 * found.sd[hidden, i]
            line["within 2 sd"] = inside.double().mean().item()
        lines.append(line)
    return pd.DataFrame(lines).set_index("column")


def rms(error: Tensor, unit: Tensor) -> float:
    return (error.square().mean().sqrt() / unit).item()


def ranks(true: Tensor, draws: Tensor) -> Tensor:
    """The rank of each true value among its draws ``(S, n)``; where there are ties, any of them."""
    below, ties = (draws < true).sum(0), (draws == true).sum(0)
    return below + (torch.rand(true.shape) * (ties + 1)).floor().long()


# ------------------------------------------------------------------------------ pictures


def draw_cells(table: data.Table, truth: Tensor, found: ppvae.diagnostics.Imputation) -> plt.Figure:
    """Hidden cells: what they are against what was imputed, with two standard deviations."""
    figure, axes = plt.subplots(3, 4, figsize=(11, 8))
    for i, (ax, column) in enumerate(zip(axes.flat, table.columns, strict=False)):
        hidden = ~found.observed[:, i]
        true, mean, sd = truth[hidden, i], found.mean[hidden, i], found.sd[hidden, i]
        if column.num_levels:
            levels = column.levels or (0, 1)
            share = [(found.draws[:, hidden, i] == c).double().mean(0) for c in range(len(levels))]
            right = [[share[c][true == t].mean() for c in range(len(levels))]
                     for t in range(len(levels))]  # fmt: skip
            ax.imshow(np.array(right), cmap="Blues", vmin=0, vmax=1)
            ax.set_xticks(range(len(levels)), levels, rotation=30)
            ax.set_yticks(range(len(levels)), levels)
            for row, line in enumerate(right):
                for place, value in enumerate(line):
                    ax.text(place, row, f"{value:.2f}", ha="center", va="center",
                            color="white" if value > 0.6 else "black")  # fmt: skip
            ax.set(xlabel="probability imputed")
        else:
            ax.errorbar(mean, true, xerr=2 * sd, fmt="o", markersize=2.5, color=BLUE, alpha=0.35,
                        elinewidth=0.6)  # fmt: skip
            ends = [true.min(), true.max()]
            ax.plot(ends, ends, color=RED, linewidth=1)
            ax.set(xlabel="imputed mean ± 2 sd")
        ax.set_title(column.name)
    for ax in axes.flat[len(table.columns) :]:
        ax.set_axis_off()
    figure.supylabel("true value of the hidden cell")
    return figure


def draw_pit(
    table: data.Table, truth: Tensor, found: ppvae.diagnostics.Imputation, seed: int
) -> plt.Figure:
    """By column, whether the rank of the true value among draws is uniform: the randomised PIT."""
    torch.manual_seed(seed)
    figure, axes = plt.subplots(3, 4, figsize=(11, 7), sharex=True, sharey=True)
    for i, (ax, column) in enumerate(zip(axes.flat, table.columns, strict=False)):
        hidden = ~found.observed[:, i]
        among = ranks(truth[hidden, i].double(), found.draws[:, hidden, i])
        band = ecdf_band(len(among), len(found.draws))
        plots.sbc_ecdf({column.name: among[:, None]}, len(found.draws), band, ax=ax)
        ax.set(title=f"{column.name} ({column.kind}, {len(among)} cells)", xlabel="", ylabel="")
        ax.get_legend().remove()
    for ax in axes.flat[len(table.columns) :]:
        ax.set_axis_off()
    axes[-2, -1].tick_params(labelbottom=True)  # the one below is off
    figure.supxlabel("PIT: rank of the true value among 99 draws")
    figure.supylabel("share of hidden cells below, less that of a uniform")
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/table")
    parser.add_argument("--missing", type=float, default=0.3, help="share hidden (default: 0.3)")
    parser.add_argument("--epochs", type=int, default=300, help="at most (default: 300)")
    parser.add_argument("--latent-dim", type=int, default=4, help="(default: 4)")
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 64], help="(default: 64 64)")
    parser.add_argument("--particles", type=int, default=2000, help="to impute (default: 2000)")
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.hidden, args.particles = 2, [8], 50
    return args


if __name__ == "__main__":
    reporting.run(main)
