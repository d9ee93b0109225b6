r"""Deconvolution of spatial expression: how many cells of each type a spot has, from its counts.

    python examples/deconvolution.py              # 400 spots, 200 genes, 6 types; a minute or two
    python examples/deconvolution.py --spots 1600 # the intervals of the globals shrink
    python examples/deconvolution.py --smoke      # a check that all runs, in seconds

Counts of spot n and gene g add up over cell types f. What types express is known from single cells,
up to an error c; the other technology sees genes with another sensitivity m. Both, and the
over-dispersion, are global latents with an autoguide; the abundances w are local, and an encoder
reads them off the counts. The model is that of cell2location, scaled down. The data are made here,
so abundances, sensitivities and corrections are known, and non-negative least squares on the same
reference shows what the globals are for.

    m_g ~ N(0, 0.5),  c_fg ~ N(0, 0.2),  t_g ~ N(2, 0.5),  log w_nf ~ N(0, 1)
    x_ng ~ NegativeBinomial(mean = e^{m_g} sum_f w_nf reference_fg e^{c_fg},  theta = e^{t_g})
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import reporting
import scipy.optimize
import scipy.stats
import torch
from matplotlib.figure import Figure
from pyro.infer.autoguide import AutoNormal, init_to_mean
from torch import Tensor, nn

import ppvae
from ppvae import diagnostics, distributions, elbo, guides, nets
from ppvae.program import data_plate

FILES = ["results.json", "abundances.png", "globals.png"]
PRIORS = {"sensitivity": (0.0, 0.5), "correction": (0.0, 0.2), "log_theta": (2.0, 0.5)}
GLOBALS = tuple(PRIORS)


class Deconvolution(ppvae.Program):
    """Globals of genes and signatures; for each spot, log-abundances z and counts x."""

    def __init__(self, reference: Tensor) -> None:
        super().__init__()
        self.register_buffer("reference", reference)  # expression, (types, genes), positive

    def forward(self, x: Tensor) -> None:
        types, genes = self.reference.shape
        shapes = {"sensitivity": (genes,), "correction": (types, genes), "log_theta": (genes,)}
        drawn = {}
        for name, (loc, scale) in PRIORS.items():
            law = dist.Normal(x.new_full(shapes[name], loc), scale)
            drawn[name] = pyro.sample(name, law.to_event(len(shapes[name])))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(types), 1.0).to_event(1))
            log_mean = self.log_mean(z, drawn["sensitivity"], drawn["correction"])
            law = distributions.NegativeBinomial(log_mean, drawn["log_theta"])
            pyro.sample("x", law.to_event(1), obs=x)

    def log_mean(self, z: Tensor, sensitivity: Tensor, correction: Tensor) -> Tensor:
        """The log of the mean counts, ``(..., genes)``."""
        return (z.exp() @ (self.reference * correction.exp())).log() + sensitivity


class Encoder(nn.Module):
    """A network of log(1 + counts): means and log-scales of the log-abundances."""

    def __init__(self, genes: int, width: int, types: int) -> None:
        super().__init__()
        self.net = nets.mlp(genes, width, 2 * types)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x.log1p())
        return found


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    pyro.set_rng_seed(args.seed)
    model, truth = make(args)
    x, new = (draw_spots(model, truth, args.spots) for _ in range(2))
    guide = train(model, x["x"], args)

    log_w = guide.local.posterior(x["x"])
    estimates = {
        "global and local latents": log_w.mean.exp().detach(),  # the median of each w
        "non-negative least squares": least_squares(model.reference, x["x"]),
    }
    truly = x["z"].exp()
    options = {"num_globals": args.num_samples, "num_particles": 20, "seed": args.seed}
    predictive = diagnostics.log_predictive(model, guide, new["x"], **options)
    tables = {name: moments(guide, name) for name in GLOBALS}
    means = {name: mean for name, (mean, _) in tables.items()}
    results: dict[str, Any] = {
        name: {"correlation": correlation(w, truly), "of_log": correlation_of_logs(w, truly)}
        for name, w in estimates.items()
    }
    results["global and local latents"] |= {
        "truth_in_90_percent": {
            **{name: inside(*table, truth[name]) for name, table in tables.items()},
            "z": inside(log_w.mean, log_w.stddev, x["z"]),
        },
        "of_globals": {
            name: float(np.corrcoef(table[0].flatten(), truth[name].flatten())[0, 1])
            for name, table in tables.items()
        },
        "mean_error": {n: float((t[0] - truth[n]).mean()) for n, t in tables.items()},
        "sd_of_error": {n: float((t[0] - truth[n]).std()) for n, t in tables.items()},
        "sd_under_q": {n: float(t[1].mean()) for n, t in tables.items()},
        "gene_level_sd_of_error": float((level(model, means) - level(model, truth)).std()),
        "log_predictive": predictive.mean,
        "log_predictive_se": predictive.mean_se,
    }
    results["scipy_largest_difference"] = against_scipy(model, truth, new)
    show(results)
    reporting.clear(out, FILES)
    reporting.write_results(out / "results.json", args, results)
    draw_abundances(estimates, truly, results, out / "abundances.png")
    forest(tables, truth, out / "globals.png")
    reporting.print_files(out, FILES)


def train(model: Deconvolution, x: Tensor, args: argparse.Namespace) -> Any:
    """The guide, trained on minibatches."""
    types, genes = model.reference.shape
    autonormal = functools.partial(AutoNormal, init_loc_fn=init_to_mean, init_scale=0.05)
    local = guides.Normal(Encoder(genes, args.width, types))
    guide = guides.Global(autonormal, model, x, local=local)
    adam = functools.partial(torch.optim.Adam, lr=args.lr)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO(gradient="stl"), compile=args.compile)
    slower = functools.partial(
        torch.optim.lr_scheduler.CosineAnnealingLR, T_max=args.epochs, eta_min=args.lr / 50
    )
    options = {"epochs": args.epochs, "batch_size": args.batch_size, "seed": args.seed}
    ppvae.fit(svi, x, lr_scheduler=slower, **options)
    return guide


# ------------------------------------------------------------------------------ the data


def make(args: argparse.Namespace) -> tuple[Deconvolution, dict[str, Tensor]]:
    """A reference of cell types, most genes low in most types; and globals from their prior."""
    shape = torch.full((args.types, args.genes), 0.5)
    model = Deconvolution(torch.distributions.Gamma(shape, 0.5).sample() + 0.02)
    with torch.no_grad():
        drawn = pyro.poutine.trace(model).get_trace(torch.zeros(1, args.genes))
    return model, {name: drawn.nodes[name]["value"] for name in GLOBALS}


def draw_spots(model: Deconvolution, truth: dict[str, Tensor], spots: int) -> dict[str, Tensor]:
    """Log-abundances z and counts x, by the model at the true globals."""
    with torch.no_grad():
        z = torch.randn(spots, len(model.reference))
        log_mean = model.log_mean(z, truth["sensitivity"], truth["correction"])
        law = distributions.NegativeBinomial(log_mean, truth["log_theta"])
        return {"z": z, "x": law.sample()}


# ------------------------------------------------------------------------------ numbers


def least_squares(reference: Tensor, x: Tensor) -> Tensor:
    """Non-negative least squares of each spot on the reference, ``(spots, types)``."""
    basis = reference.T.double().numpy()
    return torch.tensor(np.array([scipy.optimize.nnls(basis, row)[0] for row in x.numpy()]))


def moments(guide: Any, name: str) -> tuple[Tensor, Tensor]:
    """Mean and sd of a global under q: its law is normal, as the prior is."""
    loc, scale = (getattr(getattr(guide.auto, what), name) for what in ("locs", "scales"))
    return loc.detach(), scale.detach()


def level(model: Deconvolution, found: dict[str, Tensor]) -> Tensor:
    """Log mean counts of each gene where all abundances are 1: m and c of a gene together."""
    z = torch.zeros(len(model.reference))
    return model.log_mean(z, found["sensitivity"], found["correction"])


def inside(mean: Tensor, sd: Tensor, truth: Tensor) -> float:
    """The share of truths in the 90 % intervals of normals."""
    return float(((truth - mean).abs() < 1.645 * sd).double().mean())


def correlation(found: Tensor, truth: Tensor) -> float:
    return float(np.corrcoef(found.flatten(), truth.flatten())[0, 1])


def correlation_of_logs(found: Tensor, truth: Tensor) -> float:
    """Of log(0.1 + w): what least squares calls 0 has no logarithm."""
    return correlation((found + 0.1).log(), (truth + 0.1).log())


def against_scipy(
    model: Deconvolution, truth: dict[str, Tensor], spots: dict[str, Tensor]
) -> float:
    """The largest difference of log p(x_n | z_n, globals) from scipy's, in nats, in float64."""
    given = {name: value.double() for name, value in {**truth, "z": spots["z"]}.items()}
    x = spots["x"].double()
    conditioned = pyro.condition(model.double(), given)
    ours = pyro.poutine.trace(conditioned).get_trace(x)
    ours.compute_log_prob(lambda name, site: name == "x")
    w, theta = given["z"].exp().numpy(), given["log_theta"].exp().numpy()
    signatures = (model.reference * given["correction"].exp()).numpy()
    mean = w @ signatures * given["sensitivity"].exp().numpy()
    theirs = scipy.stats.nbinom.logpmf(x.numpy(), theta, theta / (theta + mean)).sum(-1)
    model.float()
    return float(np.abs(ours.nodes["x"]["log_prob"].numpy() - theirs).max())


def show(results: dict[str, Any]) -> None:
    rows = [
        (name, f"{r['correlation']:.3f}, of log(0.1 + w) {r['of_log']:.3f}")
        for name, r in results.items()
        if isinstance(r, dict)
    ]
    reporting.print_table("Correlation of abundances w with the truth", rows)
    r = results["global and local latents"]
    covered = r["truth_in_90_percent"]
    rows = [(name, f"{share:.0%}") for name, share in covered.items()]
    reporting.print_table("Truths in 90 % intervals of q", rows)
    score = reporting.number(r["log_predictive"], r["log_predictive_se"]).strip()
    errors = f"{r['sd_of_error']['sensitivity']:.3f}, under q {r['sd_under_q']['sensitivity']:.3f}"
    rows = [
        ("log p(x | data) of new spots, nats per spot", score),
        ("scipy differs by", f"{results['scipy_largest_difference']:.1e} nats at most"),
        ("sd of errors of log-sensitivities", errors),
        ("sd of errors of log mean counts at w = 1", f"{r['gene_level_sd_of_error']:.3f}"),
    ]
    reporting.print_table("Numbers", rows)


# ------------------------------------------------------------------------------ pictures


def draw_abundances(
    estimates: dict[str, Tensor], truth: Tensor, results: dict[str, Any], path: Any
) -> None:
    """Estimates against the truth, a colour for each type."""
    figure = Figure(figsize=(7.5, 3.9), layout="constrained")
    axes = figure.subplots(1, 2, sharex=True, sharey=True)
    low, high = float(truth.min()), float(truth.max())
    floor = max(low, 0.02)
    for ax, (name, found) in zip(axes, estimates.items(), strict=True):
        for kind in range(truth.shape[1]):
            ax.plot(
                truth[:, kind], found[:, kind].clamp(min=floor), ".", ms=3, alpha=0.5,
                label=f"type {kind + 1}",
            )  # fmt: skip
        ax.axline((floor, floor), (high, high), color="0.4", linewidth=0.8)
        ax.set(xscale="log", yscale="log", xlabel="true abundance of a type in a spot")
        ax.set_title(f"{name}\ncorrelation of log(0.1 + w) {results[name]['of_log']:.3f}")
    axes[0].set_ylabel("estimate")
    axes[0].legend(loc="upper left", frameon=False, markerscale=3, fontsize="small")
    reporting.save(axes[0], path)


def forest(tables: dict[str, tuple[Tensor, Tensor]], truth: dict[str, Tensor], path: Any) -> None:
    """90 % intervals of the first globals of each kind, and the truth."""
    figure = Figure(figsize=(8.0, 4.2), layout="constrained")
    axes = figure.subplots(1, len(tables))
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        mean, sd, true = (part.flatten()[:20] for part in (*table, truth[name]))
        height = np.arange(len(mean), 0, -1)
        ax.axvline(PRIORS[name][0], color="0.8", linewidth=0.8, zorder=0)
        ax.errorbar(mean, height, xerr=1.645 * sd, fmt="o", ms=3, lw=2, label="under q")
        ax.plot(true, height, "x", color="black", label="truth", zorder=3)
        ax.set_yticks(height[[0, 4, 9, 14, 19]], ["1", "5", "10", "15", "20"])
        ax.set_xlabel(name.replace("_", " ") + (", type 1" if mean.dim() < table[0].dim() else ""))
    axes[0].set_ylabel("gene")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2)
    reporting.save(axes[0], path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/deconvolution")
    parser.add_argument("--spots", type=int, default=400, help="(default: 400)")
    parser.add_argument("--genes", type=int, default=200, help="20 or more (default: 200)")
    parser.add_argument("--types", type=int, default=6, help="(default: 6)")
    parser.add_argument("--width", type=int, default=64, help="of the encoder (default: 64)")
    parser.add_argument("--batch-size", type=int, default=100, help="(default: 100)")
    parser.add_argument("--epochs", type=int, default=3000, help="(default: 3000)")
    parser.add_argument("--lr", type=float, default=5e-3, help="(default: 0.005)")
    parser.add_argument("--num-samples", type=int, default=100, help="of globals (default: 100)")
    parser.add_argument("--compile", action="store_true", help="steps; needs a C++ compiler")
    args = parser.parse_args(argv)
    if args.genes < 20:
        parser.error(f"--genes must be at least 20, got {args.genes}")
    if args.quick:
        args.spots, args.genes, args.epochs, args.num_samples = 100, 60, 80, 20
        args.batch_size = 25
    return args


if __name__ == "__main__":
    reporting.run(main)
