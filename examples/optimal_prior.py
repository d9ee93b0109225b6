"""The prior that suits the guide best: four points that a plain VAE cannot tell apart.

    python examples/optimal_prior.py                 # a minute or two
    python examples/optimal_prior.py --quick         # a check that all runs, in seconds

The data are four points of four bits, with one bit set, so log p(x) is at most -log 4 = -1.386
nats. A plain VAE stays below: its aggregate posterior q(z) cannot be both four lumps that do not
overlap and the standard normal. The implicit optimal prior is the standard normal times a learned
ratio, which tends to q(z); a mixture and the VampPrior are beside it.

What training shows of it lacks the normaliser, and may lie above the optimum: see `bound.png`.

Source: Takahashi et al., Variational Autoencoder with Implicit Optimal Priors, 2019 (OneHot).
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, diagnostics, elbo, guides, models, nets, plots
from ppvae.pairs import evaluation_mode, seeded

FILES = ["results.json", "bound.png", "densities.png", "draws.png", "calibration.png"]
PRIORS = {
    "vae": "standard normal",
    "mixture": "mixture of normals",
    "vamp": "VampPrior",
    "iop": "implicit optimal prior",
}
OPTIMUM = -math.log(4)
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    x = torch.eye(4).repeat(25, 1)
    results: dict[str, Any] = {}
    for name, title in PRIORS.items():
        pyro.set_rng_seed(args.seed)
        model, guide = pair(name, width=4, latent_dim=2, hidden=[64, 64], data=torch.eye(4))
        started = time.perf_counter()
        track = Track(model, guide, every=max(1, args.steps // 25)) if name == "iop" else None
        train(model, guide, x, args, track)
        results[name] = {"prior": title} | scores(model, guide, args.num_draws)
        results[name]["seconds"] = time.perf_counter() - started
        print(f"{title}: {results[name]['seconds']:.0f} s", flush=True)
    report(results)
    reporting.clear(out, FILES)
    settings = {k: str(v) for k, v in vars(args).items()}
    (out / "results.json").write_text(
        json.dumps({"optimum": OPTIMUM, "settings": settings} | results, indent=2) + "\n"
    )
    assert track is not None
    reporting.save(track.plot(), out / "bound.png")
    reporting.save(draw_densities(model, guide), out / "densities.png")
    reporting.save(draw_draws(model, guide), out / "draws.png")
    reporting.save(draw_calibration(model, guide, args.seed), out / "calibration.png")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ the pieces


def pair(
    prior: str,
    width: int,
    latent_dim: int,
    hidden: Sequence[int],
    ratio_hidden: Sequence[int] = (64, 64),
    dropout: float = 0.0,
    num_components: int = 4,
    data: Tensor | None = None,
) -> tuple[models.VAE, guides.Normal]:
    """A VAE of tanh layers with one of the priors, and its guide.

    Args:
        prior: a name in ``PRIORS``.
        width: of x.
        latent_dim: of z.
        hidden: widths of the encoder, mirrored in the decoder.
        ratio_hidden: widths of the ratio's network.
        dropout: before the last layer of it.
        num_components: of the mixture and of the VampPrior.
        data: rows that the VampPrior's pseudo-inputs start at; else near 0.05.
    """
    mlp = functools.partial(nets.mlp, activation=nn.Tanh)
    likelihood = conditionals.Bernoulli(mlp(latent_dim, *reversed(hidden), width))
    guide = guides.Normal(mlp(width, *hidden, 2 * latent_dim))
    chosen: nn.Module = conditionals.StandardNormal(latent_dim)
    if prior == "mixture":
        chosen = conditionals.Mixture(num_components, latent_dim)
    elif prior == "vamp":
        chosen = conditionals.VampPrior(guide.conditional, num_components, width, data=data)
    elif prior == "iop":
        body = mlp(latent_dim, *ratio_hidden)
        last = [nn.Tanh(), nn.Dropout(dropout), nn.Linear(ratio_hidden[-1], 1)]
        chosen = conditionals.OptimalPrior(chosen, nn.Sequential(body, *last))
    return models.VAE(likelihood, prior=chosen), guide


def train(
    model: models.VAE,
    guide: guides.Normal,
    x: Tensor,
    args: argparse.Namespace,
    track: Track | None,
) -> None:
    """Adam; the KL's weight rises first, or the four lumps never part."""
    svi = ppvae.SVI(
        model,
        guide,
        functools.partial(torch.optim.Adam, lr=1e-3),
        elbo.ELBO(beta=elbo.LinearWarmup(args.warm_up)),
        beside=ppvae.Beside(steps=args.ratio_steps),
    )
    callbacks = [] if track is None else [track]
    ppvae.fit(
        svi,
        x,
        epochs=args.steps,  # all rows are one batch
        batch_size=len(x),
        seed=args.seed,
        callbacks=callbacks,
        progress=False,
    )


def scores(model: models.VAE, guide: guides.Normal, num_draws: int) -> dict[str, float]:
    """Nats per datapoint; of the optimal prior also its normaliser, and what is shown without."""
    x, found = torch.eye(4), dict[str, float]()
    if isinstance(model.prior, conditionals.OptimalPrior):
        log_z, error = model.prior.normalize(guide, x, num_draws=10 * num_draws)
        found |= {"log_z": log_z, "log_z_se": error}
    evidence = diagnostics.log_evidence(model, guide, x, num_particles=num_draws, seed=0)
    bound = evidence.elbo.mean().item()
    if "log_z" in found:
        found["without_log_z"] = bound + found["log_z"]
    exact = under_the_aggregate(model, guide, x, num_draws)
    return found | {"elbo": bound, "log_evidence": evidence.mean, "elbo_under_q": exact}


@torch.no_grad()
def under_the_aggregate(
    model: models.VAE, guide: guides.Normal, x: Tensor, num_draws: int
) -> float:
    """The ELBO, mean over x, with the prior that is best for this guide: q(z) of these rows."""
    with evaluation_mode(model, guide), seeded(0, x):
        q = guide.posterior(x)
        z = q.sample((num_draws,))  # (S, N, D)
        weights = model.likelihood(z).log_prob(x) + log_aggregate(q, z) - q.log_prob(z)
    return weights.mean().item()


def log_aggregate(q: Any, z: Tensor) -> Tensor:
    """log q(z), the mean of q(z | x) over the rows that q is of, at z ``(..., D)``."""
    rows = q.batch_shape[0]
    each: Tensor = q.log_prob(z.unsqueeze(-2).expand(*z.shape[:-1], rows, -1))
    return each.logsumexp(-1) - math.log(rows)


class Track(ppvae.Callback):
    """Over training, with the KL's weight at 1: the ELBO, and the same without log Z."""

    def __init__(self, model: models.VAE, guide: guides.Normal, every: int) -> None:
        self.model, self.guide, self.every = model, guide, every
        self.shown: dict[int, float] = {}
        self.bounds: dict[int, float] = {}

    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        if svi.num_steps % self.every:
            return
        x = torch.eye(4)
        log_z = self.model.prior.normalize(self.guide, x, num_draws=20_000).log_z
        with evaluation_mode(self.model, self.guide), seeded(0, x):
            bound = elbo.ELBO(5_000).evaluate(self.model, self.guide, x).mean().item()
        self.model.prior.log_z.zero_()  # as it was: training leaves it out
        self.bounds[svi.num_steps] = bound
        self.shown[svi.num_steps] = bound + log_z

    def plot(self) -> Any:
        _, ax = plt.subplots(figsize=(5.4, 3.4))
        ax.plot(list(self.shown), list(self.shown.values()), color="#D55E00", ls="--",
                label="without log Z, as training has it")  # fmt: skip
        ax.plot(list(self.bounds), list(self.bounds.values()), color="#0072B2", label="ELBO")
        ax.axhline(OPTIMUM, color="0.4", lw=0.9, label="optimum, -log 4")
        low = min([*list(self.bounds.values())[3:], -2.0])
        ax.set(xlabel="step", ylabel="nats per datapoint", ylim=(low - 0.05, -1.1))
        ax.legend(loc="lower right")
        ax.spines[["top", "right"]].set_visible(False)
        return ax


# ------------------------------------------------------------------------------ pictures


@torch.no_grad()
def draw_densities(model: models.VAE, guide: guides.Normal) -> Any:
    """The base, the prior that was learned, and the aggregate posterior, on one scale each."""
    q = guide.posterior(torch.eye(4))
    axis = torch.linspace(-4, 4, 161)
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    panels = {
        "base $p_0(z)$": model.prior.base().log_prob(grid),
        "learned prior $p^*(z)$": model.prior().log_prob(grid),
        "aggregate posterior $q(z)$": log_aggregate(q, grid),
    }
    top = max(float(values.exp().max()) for values in list(panels.values())[1:])
    levels = torch.logspace(math.log10(top) - 3, math.log10(top), 10)
    _, axes = plt.subplots(1, 3, figsize=(10.2, 3.5), sharey=True)
    for ax, (title, values) in zip(axes, panels.items(), strict=True):
        ax.contourf(axis, axis, values.exp(), levels=levels, cmap="Blues", extend="max",
                    norm="log")  # fmt: skip
        ax.set(title=title, xlabel="z[0]", aspect="equal")
    axes[0].set_ylabel("z[1]")
    return axes[0]


@torch.no_grad()
def draw_draws(model: models.VAE, guide: guides.Normal) -> Any:
    """Draws of base, prior and guide, coloured by the point that the decoder makes of them."""
    x = torch.eye(4)
    z = {
        "draws of the base": model.prior.base().expand((800,)).sample(),
        "draws of $p^*$": model.prior().expand((800,)).sample(),
        "draws of $q(z)$": guide.posterior(x).sample((200,)).flatten(0, 1),
    }
    _, axes = plt.subplots(1, 3, figsize=(10.2, 3.7), sharey=True)
    for ax, (title, draws) in zip(axes, z.items(), strict=True):
        means = model.likelihood(draws).mean
        sure = means.max(-1).values > 0.9
        ax.scatter(*draws[~sure].T, s=5, c="0.6", label="none")
        for point, colour in enumerate(COLOURS):
            chosen = draws[sure & (means.argmax(-1) == point)]
            ax.scatter(*chosen.T, s=5, c=colour, label=f"bit {point + 1}")
        share = float((~sure).float().mean())
        ax.set(title=f"{title}: {share:.0%} in between", xlabel="z[0]", aspect="equal",
               xlim=(-4, 4), ylim=(-4, 4))  # fmt: skip
    axes[0].set_ylabel("z[1]")
    axes[0].legend(fontsize="x-small", loc="upper left", markerscale=2)
    return axes[0]


@torch.no_grad()
def draw_calibration(model: models.VAE, guide: guides.Normal, seed: int) -> Any:
    """What the ratio says of new draws, against where they came from."""
    with seeded(seed + 1):
        numerator = guide.posterior(torch.eye(4)).sample((1_000,)).flatten(0, 1)
        denominator = model.prior.base().expand((4_000,)).sample()
    t = [model.prior.ratio(z).numpy() for z in (numerator, denominator)]
    _, ax = plt.subplots(figsize=(3.6, 3.6))
    return plots.ratio_calibration(*t, bins=12, ax=ax)


def report(results: dict[str, Any]) -> None:
    print(f"\nNats per datapoint; the optimum is {OPTIMUM:.3f}.\n")
    print(f"  {'prior':<24}{'without log Z':>14}{'ELBO':>9}{'log p(x)':>10}{'ELBO under q(z)':>17}")
    for found in results.values():
        without = f"{found['without_log_z']:.3f}" if "log_z" in found else ""
        print(
            f"  {found['prior']:<24}{without:>14}{found['elbo']:>9.3f}"
            f"{found['log_evidence']:>10.3f}{found['elbo_under_q']:>17.3f}"
        )
    iop = results["iop"]
    print(f"\nlog Z = {iop['log_z']:.3f} ± {iop['log_z_se']:.3f}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/optimal_prior")
    add = parser.add_argument
    add("--steps", type=int, default=2_500, help="of training (default: %(default)s)")
    add("--warm-up", type=int, default=1_000, help="steps in which the KL's weight rises "
        "(default: %(default)s)")  # fmt: skip
    add("--ratio-steps", type=int, default=5, help="of the ratio, after each step of the pair "
        "(default: %(default)s)")  # fmt: skip
    add("--num-draws", type=int, default=10_000, help="for each number (default: %(default)s)")
    args = parser.parse_args(argv)
    for name in ("steps", "warm_up", "ratio_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.num_draws < 100:
        raise ValueError("--num-draws must be 100 or more")
    if args.quick:
        args.steps, args.warm_up, args.num_draws = 30, 10, 200
    torch.set_num_threads(1)
    return args


if __name__ == "__main__":
    reporting.run(main)
