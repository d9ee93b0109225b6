"""The weight on the KL: fixed, on a schedule, or learned so that a target is met.

    python examples/constrained.py
    python examples/constrained.py --latent-dim 16 --epochs 200

One VAE on handwritten digits, trained with all that ``elbo.ELBO(beta=...)`` takes: numbers, linear
and cyclical warm-up, free bits, capacity, and a constraint on the rate or the distortion, whose
multiplier is found by dual ascent. Sources: Higgins et al. 2017; Sønderby et al. 2016; Fu et al.
2019; Kingma et al. 2016; Burgess et al. 2018; Rezende & Viola 2018.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets
from ppvae.plots.common import BLUE, GREY, ORANGE

FILES = ["weights.csv", "curves.csv", "curves.png"]
BATCH_SIZE = 64
FREE, HIGH, LOW, DISTORTION = 0.6, 7.0, 2.0, 16.0  # targets, nats; FREE is of each dimension
GREEN = "#009E73"  # with BLUE and ORANGE of Okabe & Ito, for the colour-blind


class Choice(NamedTuple):
    """What ``beta`` is, which quantity it sets, the target for that, and the look of its line."""

    beta: Any
    sets: str
    target: float
    colour: str
    style: str


def choices(steps: int, latent_dim: int) -> dict[str, Choice]:
    """What is trained, each for so many steps."""
    half, fifth, none = max(1, steps // 2), max(1, steps // 5), math.nan
    capacity = elbo.LinearWarmup(half, 0.0, HIGH)
    return {
        "beta = 1": Choice(1.0, "weight", none, GREY, "-"),
        "beta = 2": Choice(2.0, "weight", none, "black", "-."),
        "linear warm-up": Choice(elbo.LinearWarmup(half), "weight", none, BLUE, "-"),
        "cyclical warm-up": Choice(
            elbo.CyclicalWarmup(fifth, cycles=4), "weight", none, ORANGE, "-"
        ),
        "free bits": Choice(
            elbo.FreeBits(FREE, per_dimension=True), "rate", FREE * latent_dim, GREEN, "-"
        ),
        "capacity": Choice(elbo.Capacity(capacity, gamma=2.0), "rate", HIGH, ORANGE, "-"),
        "constraint, high rate": Choice(elbo.Constraint(max_rate=HIGH), "rate", HIGH, BLUE, "-"),
        "constraint, low rate": Choice(elbo.Constraint(max_rate=LOW), "rate", LOW, "black", "-."),
        "constraint, distortion": Choice(
            elbo.Constraint(max_distortion=DISTORTION), "distortion", DISTORTION, BLUE, "-"
        ),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    torch.set_num_threads(1)  # the networks are small
    digits = data.load("digits")  # binary pixels, drawn anew for each epoch
    x = digits.test.x[:300]

    Z, steps = args.latent_dim, args.epochs * math.ceil(len(digits.train.x) / BATCH_SIZE)
    chosen, curves, rows = choices(steps, Z), {}, []
    for name, choice in chosen.items():
        pyro.set_rng_seed(args.seed)
        model = models.VAE(conditionals.Bernoulli(nets.mlp(Z, 64, 64)), latent_dim=Z)
        guide = guides.Normal(nets.mlp(64, 64, 2 * Z))
        curves[name] = train(model, guide, digits.train, choice.beta, args.epochs)
        last = curves[name].iloc[-1]
        report = ppvae.diagnose(model, guide, x, num_particles=args.particles, seed=args.seed)
        target = "" if choice.sets == "weight" else f"{choice.sets} {choice.target:g}"
        rows.append({"beta": name, "target": target,
                     **last[["rate", "distortion", "KL weight"]],
                     "ELBO": report.elbo.mean().item(), "log p(x)": report.mean,
                     "active units": report.active_units})  # fmt: skip
    table = pd.DataFrame(rows).set_index("beta")
    print(
        f"\n{Z} latents, {steps} steps [nats per datapoint]; rate, distortion: "
        f"{len(digits.train.x)} training digits;\nELBO, log p(x), active units: {len(x)} test "
        "digits; the weight on the KL is 1 / lambda for a\ndistortion, and free bits and capacity "
        "have none\n"
    )
    print(table.to_string(float_format="%.2f", na_rep="-"))
    table.to_csv(out / "weights.csv")
    pd.concat(curves, names=["beta"]).to_csv(out / "curves.csv")
    draw_curves(chosen, curves, out)
    reporting.print_files(out, FILES)


def train(
    model: models.VAE, guide: guides.Amortized, split: data.Split, beta: Any, epochs: int
) -> pd.DataFrame:
    """After each epoch: rate and distortion of the training data, and the weight on the KL."""
    rows = []

    def follow(svi: ppvae.SVI, history: ppvae.History) -> None:
        weight = beta if isinstance(beta, float) else history.rows[-1].get("kl_weight", math.nan)
        rows.append({"step": history.rows[-1]["step"], "KL weight": weight,
                     **rate_and_distortion(model, guide, split.x)})  # fmt: skip

    adam = functools.partial(torch.optim.Adam, lr=2e-3)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO(beta=beta, kl="mixed"))
    ppvae.fit(svi, split, epochs=epochs, batch_size=BATCH_SIZE, progress=False, on_epoch_end=follow)
    return pd.DataFrame(rows)


@torch.no_grad()
def rate_and_distortion(model: models.VAE, guide: guides.Amortized, x: Tensor) -> dict[str, float]:
    """KL(q || p) and -E log p(x | z), means over the data in nats."""
    q = guide.posterior(x)
    rate = torch.distributions.kl_divergence(q, model.prior().expand(q.batch_shape))
    fit = model.likelihood(q.rsample((5,))).log_prob(x)
    return {"rate": rate.mean().item(), "distortion": -fit.mean().item()}


def draw_curves(chosen: dict[str, Choice], curves: dict[str, pd.DataFrame], out: Path) -> None:
    """Above what is to be set, its target dashed; below the weight that this takes."""
    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), sharex=True)
    for column, sets in zip(axes.T, ("weight", "rate", "distortion"), strict=True):
        above, below = column
        shown = "distortion" if sets == "distortion" else "rate"
        for name, (beta, of, target, colour, style) in chosen.items():
            if of != sets:
                continue
            curve, steps = curves[name], curves[name]["step"]
            aim = [beta.nats(t) for t in steps] if isinstance(beta, elbo.Capacity) else target
            above.plot(steps, curve[shown], color=colour, ls=style, label=name)
            above.plot(steps, aim + 0 * steps, color=colour, ls="--", lw=1)
            below.plot(steps, curve["KL weight"], color=colour, ls=style)
        if sets != "weight":
            above.plot([], [], color="black", ls="--", lw=1, label="target")
        if shown == "rate":
            limits = 0.0, 2 * HIGH
        else:
            every = [curves[n]["distortion"] for n, c in chosen.items() if c[1] == sets]
            limits = (min(DISTORTION - 4, *(v.min() - 1 for v in every)),
                      max(DISTORTION + 4, *(v.max() + 1 for v in every)))  # fmt: skip
        above.set(ylabel=f"{shown} [nats per digit]", ylim=limits)
        above.set_title(f"the {sets} is set", pad=54)  # the legend between
        above.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
        below.set(xlabel="optimisation step", ylabel="weight on the KL", ylim=(0, 2.2))
    figure.savefig(out / "curves.png")
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/constrained")
    parser.add_argument("--latent-dim", type=int, default=8, help="size of z (default: 8)")
    parser.add_argument("--epochs", type=int, default=100, help="of each (default: 100)")
    parser.add_argument("--particles", type=int, default=500, metavar="K",
                        help="to evaluate (default: 500)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.particles = 2, 50
    return args


if __name__ == "__main__":
    reporting.run(main)
