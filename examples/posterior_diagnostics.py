"""Can this posterior be trusted? Train a VAE, diagnose its guide, and hand the draws to ArviZ.

    python examples/posterior_diagnostics.py                     # handwritten digits
    python examples/posterior_diagnostics.py --data mnist --epochs 30 --latent-dim 50

Writes the report as a page, calibration on simulated data, predictive checks, and ArviZ's pictures
of the guide's draws beside Markov chains for the worst datapoints. See docs/diagnostics.md.
"""

from __future__ import annotations

import argparse
import functools
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import ppvae
from ppvae import data, diagnostics, guides, models, nets

with warnings.catch_warnings():  # ArviZ 0.23 announces version 1
    warnings.simplefilter("ignore", FutureWarning)
    import arviz as az

FILES = [
    "report.html",
    "report.png",
    "datapoints.csv",
    "posterior.nc",
    "calibration.png",
    "predictive.png",
    "posterior.png",
    "forest.png",
    "pair.png",
    "ppc.png",
    "khat.png",
]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    pyro.set_rng_seed(args.seed)
    dataset = data.load(args.data)
    model, guide = train(dataset, args)
    x, shape = dataset.test.x[: args.rows], dataset.shape

    # One call: every datapoint, every unit, and what to do next.
    report = ppvae.diagnose(model, guide, x, num_particles=args.particles, seed=args.seed)
    print(f"\n{report}\n")
    is_image = len(shape) >= 2
    report.to_html(out / "report.html", image_shape=shape if is_image else None)
    save(report.plot(shape if is_image else None), out / "report.png")
    report.table().to_csv(out / "datapoints.csv")

    # Is q(z | x) the posterior, on data that the model itself draws?
    calibration = diagnostics.sbc(model, guide, x, num_simulations=args.simulations, seed=args.seed)
    print(f"{calibration}\n")
    save(calibration.plot(), out / "calibration.png")

    # Do data drawn at the guide's draws look like the data?
    check = diagnostics.predictive_check(model, guide, x, statistics=statistics(), seed=args.seed)
    print(f"{check}\n")
    save(check.plot(), out / "predictive.png")

    with warnings.catch_warnings():  # ArviZ 0.23 with new versions of matplotlib and pandas
        warnings.simplefilter("ignore")
        show_in_arviz(model, guide, x, report, args, out)
    reporting.print_files(out, FILES)


def show_in_arviz(
    model: Any, guide: Any, x: Tensor, report: diagnostics.Report, args: Any, out: Path
) -> None:
    """The guide's draws, and Markov chains of the two worst datapoints, in ArviZ's own pictures."""
    worst = report.worst(2)
    idata = report.to_arviz(worst, num_draws=500, seed=args.seed)
    idata.to_netcdf(str(out / "posterior.nc"))
    print(az.summary(idata, var_names=["z"], kind="stats").head(8))

    first = {"datapoint": [int(worst[0])], "latent": [0, 1]}
    az.plot_posterior(idata, var_names=["z"], coords=first)
    save(plt.gcf(), out / "posterior.png")
    az.plot_pair(
        idata, var_names=["z"], coords=first, marginals=True, scatter_kwargs={"alpha": 0.4}
    )
    save(plt.gcf(), out / "pair.png")
    az.plot_khat(report.to_elpd(), show_hlines=True, show_bins=True)
    save(plt.gcf(), out / "khat.png")

    # Pixels are 0 or 1, of which a density says nothing: compare their sum over an image.
    many = report.to_arviz(range(min(100, len(x))), num_draws=100, seed=args.seed)
    pixels = [dim for dim in many.observed_data["x"].dims if dim != "datapoint"]
    sums = {
        name: many[name].sum(pixels).rename(x="sum over an image")
        for name in ("posterior_predictive", "observed_data")
    }
    az.plot_ppc(az.InferenceData(**sums), kind="cumulative", num_pp_samples=100)
    save(plt.gcf(), out / "ppc.png")

    # The same two posteriors by Hamiltonian Monte Carlo: chains, so here R-hat means something.
    chains = diagnostics.hmc(
        model, guide, x[worst], num_warmup=args.warmup, num_draws=args.draws, seed=args.seed
    )
    reference = diagnostics.chains_to_arviz(chains, coords={"datapoint": worst.numpy()})
    print(f"\n{az.summary(reference, var_names=['z']).head(8)}\n")
    az.plot_forest(
        [idata, reference],
        model_names=["guide", "HMC"],
        var_names=["z"],
        coords={"datapoint": [int(worst[0])], "latent": list(range(min(6, args.latent_dim)))},
        combined=True,
    )
    save(plt.gcf(), out / "forest.png")


def train(dataset: data.Dataset, args: argparse.Namespace) -> tuple[Any, Any]:
    """A VAE and its amortised normal guide."""
    width, hidden = dataset.train.x.shape[1], args.hidden
    likelihood = reporting.likelihood(dataset, width)
    model = models.VAE(likelihood(nets.mlp(args.latent_dim, hidden, width)), args.latent_dim)
    guide = guides.Normal(nets.mlp(width, hidden, 2 * args.latent_dim))
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    ppvae.fit(ppvae.SVI(model, guide, adam), dataset, epochs=args.epochs, seed=args.seed)
    return model, guide


def statistics() -> dict[str, Any]:
    """What the predictive check compares: functions of rows of x."""
    return {
        "mean of a row": lambda x: x.flatten(1).mean(1),
        "sd of a row": lambda x: x.flatten(1).std(1),
    }


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, bbox_inches="tight")
    plt.close("all")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="digits", help="digits (default), mnist, ...")
    parser.add_argument("--epochs", type=int, default=100, help="of training (default: 100)")
    parser.add_argument("--latent-dim", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--hidden", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--rows", type=int, default=1000, help="test rows (default: 1000)")
    parser.add_argument("--particles", type=int, default=1000, metavar="K", help="(default: 1000)")
    parser.add_argument("--simulations", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--warmup", type=int, default=300, help="of the chains (default: 300)")
    parser.add_argument("--draws", type=int, default=600, help="of each chain (default: 600)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--out", type=Path, default=Path("out/posterior_diagnostics"), metavar="FOLDER"
    )
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a check that all runs, in seconds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.hidden, args.latent_dim, args.rows = 1, 16, 2, 40
        args.particles, args.simulations, args.warmup, args.draws = 50, 100, 30, 30
    return args


if __name__ == "__main__":
    reporting.run(main)
