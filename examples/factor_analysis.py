r"""Bayesian factor analysis: loadings of all rows, factors of each, and how sure one may be.

    python examples/factor_analysis.py              # made here: 150 rows of 8 features; minutes
    python examples/factor_analysis.py --rows 1000  # the intervals shrink
    python examples/factor_analysis.py --smoke      # a check that all runs, in seconds

The loadings W and the noise of each feature have priors and are global latents: one draw for all
rows. The factors z of a row are local, and have two guides: an encoder, which sees the row alone,
and q(z | x, W, noise), which here is known. An encoder that is made for one W favours that W, so
its intervals are too narrow. Upper loadings are 0, so that factors cannot be rotated. The data are
made here, so the true loadings are known; and the factors can be integrated by hand, which gives
log p(x | W, noise) once more, to compare the package's numbers with.

    W_ij ~ N(0, 1),  log noise_i ~ N(-0.7, 0.5),  z_n ~ N(0, I),  x_n ~ N(W z_n, noise^2)
"""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Sequence
from typing import Any

import pandas
import pyro
import pyro.distributions as dist
import reporting
import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoMultivariateNormal
from torch import Tensor

import ppvae
from ppvae import diagnostics, elbo, guides, nets
from ppvae.program import data_plate

FILES = ["results.json", "loadings.png", "rows.png"]


class FactorAnalysis(ppvae.Program):
    """p(W) p(noise) and, for each row, p(z) p(x | z, W, noise)."""

    def __init__(self, features: int, factors: int) -> None:
        super().__init__()
        self.features, self.factors = features, factors
        self.register_buffer("places", torch.ones(features, factors).tril().nonzero().T)

    def loadings(self, free: Tensor) -> Tensor:
        """The matrix ``(features, factors)`` of the loadings that are not 0."""
        return free.new_zeros(self.features, self.factors).index_put(tuple(self.places), free)

    def forward(self, x: Tensor) -> None:
        count = self.places.shape[1]
        free = pyro.sample("loadings", dist.Normal(x.new_zeros(count), 1.0).to_event(1))
        law = dist.LogNormal(x.new_full((self.features,), -0.7), 0.5)
        noise = pyro.sample("noise", law.to_event(1))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(self.factors), 1.0).to_event(1))
            mean = z @ self.loadings(free).T
            pyro.sample("x", dist.Normal(mean, noise).to_event(1), obs=x)


class GivenGlobals(ppvae.Program):
    """q(z | x, W, noise), the posterior of a row's factors: nothing is learned."""

    def __init__(self, model: FactorAnalysis) -> None:
        super().__init__()
        self.loadings, self.factors = model.loadings, model.factors

    def forward(self, drawn: dict[str, Tensor], x: Tensor) -> None:
        W = self.loadings(drawn["loadings"])
        scaled = W / drawn["noise"].square().unsqueeze(-1)
        precision = torch.eye(self.factors) + W.T @ scaled
        mean = torch.linalg.solve(precision, (x @ scaled).T).T
        with data_plate(x):
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    pyro.set_rng_seed(args.seed)
    model = FactorAnalysis(args.features, args.factors)
    truth = draw_truth(model)
    x, new = draw_rows(model, truth, args.rows), draw_rows(model, truth, args.rows)

    tables, scores, results = {}, {}, {}
    options = {"num_globals": args.num_samples, "num_particles": 100, "seed": args.seed}
    for name in ("encoder", "given W"):
        guide = train(name, model, x, args)
        evidence = diagnostics.joint_evidence(model, guide, x, **options)
        predictive = scores[name] = diagnostics.log_predictive(model, guide, new, **options)
        print(f"\n{name}\n{evidence}\n\nnew rows: {predictive}")
        table = evidence.table.assign(truth=torch.cat([*truth.values()]).numpy())
        table = tables[name] = signed(table, model)
        by_hand = log_marginal(model, evidence.draws, new)
        exact = by_hand.logsumexp(0) - math.log(len(by_hand))
        inside = (table["truth"] - table["mean"]).abs() < 1.645 * table["sd"]
        results[name] = {
            "log_evidence": evidence.log_evidence,
            "log_evidence_se": evidence.se,
            "elbo": evidence.elbo,
            "khat": evidence.khat,
            "log_predictive": predictive.mean,
            "log_predictive_se": predictive.mean_se,
            "by_hand": float(exact.mean()),
            "largest_difference": float((exact - predictive.log_density).abs().max()),
            "truth_in_90_percent": float(inside.mean()),
        }
    known = log_marginal(model, {name: v[None] for name, v in truth.items()}, new)[0]
    fitted = dist.MultivariateNormal(x.mean(0), x.T.cov()).log_prob(new)
    results["truth"] = {"log_p": float(known.mean())}
    results["sample covariance"] = {"log_p": float(fitted.mean())}
    show(results, len(table))
    reporting.clear(out, FILES)
    reporting.write_results(out / "results.json", args, results)
    forest(tables, out / "loadings.png")
    draw_scores(scores["given W"], known, out / "rows.png")
    reporting.print_files(out, FILES)


def train(name: str, model: FactorAnalysis, x: Tensor, args: argparse.Namespace) -> Any:
    """A guide of one kind, trained on minibatches."""
    pyro.set_rng_seed(args.seed)
    make = functools.partial(AutoMultivariateNormal, init_scale=0.1)
    if name == "encoder":
        local = guides.Normal(nets.mlp(args.features, args.width, 2 * args.factors))
        guide = guides.Global(make, model, x, local=local)
    else:
        guide = guides.Global(make, model, x, local=GivenGlobals(model), sees_globals=True)
    adam = functools.partial(torch.optim.Adam, lr=args.lr)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO(num_particles=4, gradient="stl"))
    slower = functools.partial(
        torch.optim.lr_scheduler.CosineAnnealingLR, T_max=args.epochs, eta_min=args.lr / 50
    )
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed}
    ppvae.fit(svi, x, lr_scheduler=slower, **options)
    return guide


# ------------------------------------------------------------------------------ the data


def draw_truth(model: FactorAnalysis) -> dict[str, Tensor]:
    """Loadings and noise, from the prior."""
    with torch.no_grad():
        drawn = pyro.poutine.trace(model).get_trace(torch.zeros(1, model.features))
    return {name: drawn.nodes[name]["value"] for name in ("loadings", "noise")}


def draw_rows(model: FactorAnalysis, truth: dict[str, Tensor], rows: int) -> Tensor:
    z = torch.randn(rows, model.factors)
    return z @ model.loadings(truth["loadings"]).T + truth["noise"] * torch.randn(
        rows, model.features
    )


# ------------------------------------------------------------------------------ numbers


def log_marginal(model: FactorAnalysis, draws: dict[str, Tensor], x: Tensor) -> Tensor:
    """log p(x | W, noise) with the factors integrated, for each draw, ``(S, N)``."""
    found = []
    for free, noise in zip(draws["loadings"].double(), draws["noise"].double(), strict=True):
        W = model.loadings(free)
        covariance = W @ W.T + noise.square().diag()
        law = dist.MultivariateNormal(covariance.new_zeros(len(noise)), covariance)
        found.append(law.log_prob(x.double()))
    return torch.stack(found)


def signed(table: pandas.DataFrame, model: FactorAnalysis) -> pandas.DataFrame:
    """Each factor turned to the side of the truth: both are as likely, and a guide finds one."""
    places = [f"W[{i + 1}, {j + 1}]" for i, j in model.places.T.tolist()]
    table.index = [*places, *(f"noise[{i + 1}]" for i in range(model.features))]
    for factor in range(model.factors):
        own = [place for place in places if place.endswith(f" {factor + 1}]")]
        if (table.loc[own, "truth"] * table.loc[own, "mean"]).sum() < 0:
            table.loc[own, "mean"] *= -1
    return table


def show(results: dict[str, Any], numbers: int) -> None:
    rows = []
    for name in ("encoder", "given W"):
        r = results[name]
        score = reporting.number(r["log_predictive"], r["log_predictive_se"])
        rows.append((
            name,
            f"{score}   by hand {r['by_hand']:.3f}; truths in 90 % intervals: "
            f"{r['truth_in_90_percent']:.0%} of {numbers}",
        ))  # fmt: skip
    rows.append(("the true W and noise", f"{results['truth']['log_p']:.2f}"))
    rows.append(("the sample covariance", f"{results['sample covariance']['log_p']:.2f}"))
    reporting.print_table("log p(x | data) of new rows, nats per row", rows)


# ------------------------------------------------------------------------------ pictures


def forest(tables: dict[str, pandas.DataFrame], path: Any) -> None:
    """90 % intervals of each guide, and the truth."""
    count = len(next(iter(tables.values())))
    figure = Figure(figsize=(5.5, 0.27 * count + 1.0), layout="constrained")
    ax = figure.subplots()
    for i, (name, table) in enumerate(tables.items()):
        height = torch.arange(count, 0, -1) + 0.15 - 0.3 * i
        reach = 1.645 * table["sd"]
        ax.errorbar(table["mean"], height, xerr=reach, fmt="o", ms=3, lw=2, label=name)
    ax.plot(table["truth"], range(count, 0, -1), "x", color="black", label="truth", zorder=3)
    ax.axvline(0, color="0.8", linewidth=0.8, zorder=0)
    ax.set_yticks(range(count, 0, -1), table.index)
    ax.set_ylim(0.3, count + 0.7)
    ax.set_xlabel("mean and 90 % interval under q")
    ax.legend(loc="best", frameon=False)
    reporting.save(ax, path)


def draw_scores(predictive: diagnostics.LogPredictive, known: Tensor, path: Any) -> None:
    """What each new row costs, against the true parameters."""
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    ax = figure.subplots()
    ax.plot(known, predictive.log_density, ".", color="tab:blue", alpha=0.6)
    low = float(torch.minimum(known, predictive.log_density).min())
    ax.axline((low, low), slope=1, color="0.6", linewidth=0.8)
    ax.set_xlabel("log p(x | true W, noise) [nats]")
    ax.set_ylabel("log p(x | data) [nats]")
    ax.set_title("New rows")
    reporting.save(ax, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/factor_analysis")
    parser.add_argument("--rows", type=int, default=150, help="(default: 150)")
    parser.add_argument("--features", type=int, default=8, help="(default: 8)")
    parser.add_argument("--factors", type=int, default=2, help="(default: 2)")
    parser.add_argument("--width", type=int, default=32, help="of the encoder (default: 32)")
    parser.add_argument("--batch-size", type=int, default=50, help="(default: 50)")
    parser.add_argument("--epochs", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--lr", type=float, default=1e-2, help="(default: 0.01)")
    parser.add_argument("--num-samples", type=int, default=300, help="of W (default: 300)")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.epochs, args.num_samples = 40, 5, 25
    return args


if __name__ == "__main__":
    reporting.run(main)
