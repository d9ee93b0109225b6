"""A mixture of normals: exact log p(x), gradient ascent, EM, and what a proposal is worth.

    python examples/mixture.py
    python examples/mixture.py --components 5 --seed 3

Old Faithful is the usual picture of EM; here it is the first two principal components of the
handwritten digits 0, 1 and 4. Sources: Dempster, Laird & Rubin 1977; Neal & Hinton 1998 (EM as
maximisation of one bound over the guide and the model by turns).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from pyro import poutine
from sklearn.decomposition import PCA
from sklearn.mixture import GaussianMixture
from torch import Tensor

import ppvae
from ppvae import data, elbo, guides, models, plots
from ppvae.plots.common import BLUE, ORANGE, RED

FILES = ["em.png", "likelihood.png", "proposals.png", "proposals.csv"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(args.seed)
    x = digits_in_the_plane()

    model = models.GaussianMixture(args.components, dim=2)
    model.start(x, seed=args.seed)
    evidence, after_e, after_m, guide = em(model, x, args.iterations)
    print(f"\n{len(x)} digits in the plane, {args.components} components [nats per datapoint]\n")
    for name, value in {
        "EM": model.log_evidence(x).mean().item(),
        "gradient ascent": gradient_ascent(x, args).log_evidence(x).mean().item(),
        "scikit-learn's EM": scikit_learn(x, args),
    }.items():
        print(f"  log p(x), {name:20s}{value:10.5f}")

    table = proposals(model, guide, x, args)
    print(f"\nEstimates of p(x) of one digit from K draws, {args.repeats} times each: standard "
          "deviation over p(x), and mean log of the estimate less log p(x)\n")  # fmt: skip
    print(table.to_string(float_format="%.4f"))
    table.to_csv(out / "proposals.csv")

    _, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6))
    tril = model.scale_tril()
    plots.gaussian_components(x, model.posterior(x).probs, model.loc, tril @ tril.mT, left)
    left.set(xlabel="1st principal component", ylabel="2nd principal component")
    shown = slice(1, 8)  # the first iteration, from random rows, would flatten the rest
    plots.em_steps(evidence[1:9], after_e[shown], after_m[shown], right, start=1)
    reporting.save(right, out / "em.png")
    draw_density(model, x, out)
    draw_proposals(table, out)
    reporting.print_files(out, FILES)


def em(
    model: models.GaussianMixture, x: Tensor, iterations: int
) -> tuple[list[float], list[float], list[float], guides.Responsibilities]:
    """Maximise the ELBO over the guide, then over the model, and so on."""
    guide = guides.Responsibilities(model)

    def bound() -> float:
        return elbo.ELBO().evaluate(model, guide, x).mean().item()

    evidence, after_e, after_m = [model.log_evidence(x).mean().item()], [], []
    for _ in range(iterations):
        guide.e_step(model)  # q(c | x) = p(c | x): the ELBO touches log p(x)
        after_e.append(bound())
        model.m_step(x, guide.posterior(x).probs)  # theta = argmax ELBO: a gap opens again
        after_m.append(bound())
        evidence.append(model.log_evidence(x).mean().item())
    return evidence, after_e, after_m, guide


def gradient_ascent(x: Tensor, args: argparse.Namespace) -> models.GaussianMixture:
    """Maximum likelihood with any optimiser: the cluster is summed out, nothing is left to infer.

    The weights, means and factors of the covariances are parameters like those of a network.
    """
    model = models.GaussianMixture(args.components, dim=2)
    model.start(x, seed=args.seed)
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    svi = ppvae.SVI(model, no_guide, adam, elbo.ELBO())
    ppvae.fit(svi, x, epochs=args.epochs, batch_size=len(x), progress=False)
    model.require_spread(x)
    return model


def no_guide(x: Tensor, size: int | None = None) -> None:
    """A guide with no latent to draw."""


def scikit_learn(x: Tensor, args: argparse.Namespace) -> float:
    """From the same start as the others."""
    start = models.GaussianMixture(args.components, dim=2)
    start.start(x, seed=args.seed)
    tril = start.scale_tril().detach()
    theirs = GaussianMixture(
        args.components,
        weights_init=start.weights().probs.detach().numpy(),
        means_init=start.loc.detach().numpy(),
        precisions_init=torch.linalg.inv(tril @ tril.mT).numpy(),
        max_iter=10_000,
        tol=1e-10,
    )
    return float(theirs.fit(x.numpy()).score(x.numpy()))


def proposals(
    model: models.GaussianMixture, guide: guides.Responsibilities, x: Tensor,
    args: argparse.Namespace,
) -> pd.DataFrame:  # fmt: skip
    """The spread of importance-sampling estimates of p(x) under three proposals for c."""
    # The same model without the mark that has its cluster summed out: now c is drawn.
    drawn = poutine.infer_config(model, config_fn=lambda site: {"enumerate": None})
    early = models.GaussianMixture(args.components, dim=2)
    early.start(x, seed=args.seed)
    em(early, x, 2)
    choices = {
        "prior": guides.Prior(drawn),
        "posterior after 2 EM steps": guides.Responsibilities(early, draw=True),
        "posterior": guides.Responsibilities(model, draw=True),
    }
    exact = model.log_evidence(x).detach()
    rows = []
    for name, proposal in choices.items():
        for K in (1, 10, 100):
            with torch.no_grad():
                log_w = torch.stack([
                    ppvae.log_weights(model, proposal, x, num_particles=K).log_w
                    for _ in range(args.repeats)
                ])  # fmt: skip
            log_p = log_w.logsumexp(1) - torch.tensor(float(K)).log()  # (repeats, N)
            ratio = (log_p - exact).exp()
            rows.append({
                "proposal": name,
                "K": K,
                "sd / p(x)": ratio.std(0).mean().item(),
                "log bias [nats]": (log_p - exact).mean().item(),
            })  # fmt: skip
    return pd.DataFrame(rows).set_index(["proposal", "K"])


# ------------------------------------------------------------------------------ data, pictures


def digits_in_the_plane() -> Tensor:
    """0, 1 and 4 in their first two principal components, of unit variance."""
    train = data.load("digits", binarize=None).train
    kept = torch.isin(train.y, torch.tensor([0, 1, 4]))
    plane = PCA(2).fit_transform(train.x[kept].double().numpy())
    x = torch.tensor(plane)
    return x / x.std(0)


def draw_density(model: models.GaussianMixture, x: Tensor, out: Path) -> None:
    side = torch.linspace(-3.2, 3.2, 161)
    grid = torch.cartesian_prod(side, side)
    with torch.no_grad():
        density = model.log_evidence(grid).exp().reshape(161, 161).T
    figure, ax = plt.subplots(figsize=(5.4, 4.6))
    shown = ax.contourf(side.numpy(), side.numpy(), density.numpy(), 12, cmap="Blues")
    ax.scatter(*x.T.numpy(), s=5, color="black", alpha=0.4, linewidths=0)
    figure.colorbar(shown, label="p(x), exact")
    ax.set(xlabel="1st principal component", ylabel="2nd principal component", aspect="equal",
           xlim=(-3.2, 3.2), ylim=(-3.2, 3.2))  # fmt: skip
    reporting.save(ax, out / "likelihood.png")


def draw_proposals(table: pd.DataFrame, out: Path) -> None:
    _, ax = plt.subplots(figsize=(6, 4))
    for (name, rows), colour, marker in zip(
        table.groupby(level=0, sort=False), (RED, ORANGE, BLUE), "osD", strict=True
    ):
        ax.plot(rows.index.get_level_values("K"), rows["sd / p(x)"], color=colour, marker=marker,
                label=name)  # fmt: skip
    ax.set_yscale("symlog", linthresh=0.1)  # zero is on it
    ax.set_yticks([0, 0.1, 0.3, 1, 3], ["0", "0.1", "0.3", "1", "3"])
    ax.set(xscale="log", ylim=(-0.02, 4), xlabel="draws of c, K",
           ylabel="standard deviation of the estimate / p(x)")  # fmt: skip
    ax.legend(title="proposal q(c)", loc="upper right")
    reporting.save(ax, out / "proposals.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/mixture")
    parser.add_argument("--components", type=int, default=3, help="C (default: 3)")
    parser.add_argument("--iterations", type=int, default=100, help="of EM (default: 100)")
    parser.add_argument("--epochs", type=int, default=500, help="of Adam (default: 500)")
    parser.add_argument("--repeats", type=int, default=200, help="per proposal (default: 200)")
    args = parser.parse_args(argv)
    if args.quick:
        args.iterations, args.epochs, args.repeats = 8, 5, 5
    return args


if __name__ == "__main__":
    reporting.run(main)
