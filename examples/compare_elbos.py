"""Compare ELBO estimators on one pair: bound, gradient noise, time and memory.

    python examples/compare_elbos.py                        # linear-Gaussian pair, log p(x) exact
    python examples/compare_elbos.py --data digits          # a VAE trained on digits for a while
    python examples/compare_elbos.py --particles 1 4 16 64 256

Every estimator sees the same parameters and the same batch; nothing is trained while comparing.
Sources: Burda et al. 2016; Rainforth et al. 2018; Tucker et al. 2018; see docs/estimators.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pyro
import reporting
import torch
from matplotlib import pyplot as plt

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets, plots

FILES = ["estimators.csv", "estimators.png"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    pyro.set_rng_seed(args.seed)
    model, guide, x, exact = linear_gaussian(args) if args.data == "linear_gaussian" else vae(args)

    table = ppvae.compare(
        model, guide, x, estimators(args.particles), repeats=args.repeats, log_evidence=exact,
        seed=args.seed,
    )  # fmt: skip

    truth = table.attrs
    print(
        f"\n{args.data}, {len(x)} datapoints, log p(x) = {truth['log_evidence']:.3f} "
        f"({truth['reference']}) [nats per datapoint]; {args.repeats} repeats, "
        f"{truth['device']}, {truth['threads']} threads\n"
    )
    print(
        table.drop(
            columns=["estimator", "family", "gap_se", "snr_floor_model", "snr_floor_guide"]
        ).to_string(float_format="%.4g")
    )

    figure, axes = plt.subplots(1, 3, figsize=(12, 4))
    plots.bound_against_particles(table, axes[0])
    plots.snr_against_particles(table, "guide", axes[1])
    for ax in axes[:2]:  # one legend serves all three
        ax.get_legend().remove()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=6)
    plots.variance_against_time(table, "guide", axes[2]).get_legend().remove()
    figure.savefig(out / "estimators.png")
    table.to_csv(out / "estimators.csv")
    reporting.print_files(out, FILES)


def estimators(particles: Sequence[int]) -> list[elbo.Estimator]:
    """Every bound and gradient at every number of draws that it has."""
    chosen: list[elbo.Estimator] = []
    for K in particles:
        chosen += [
            elbo.ELBO(num_particles=K),
            elbo.ELBO(num_particles=K, gradient="stl"),
            elbo.IWELBO(num_particles=K),
            elbo.IWELBO(num_particles=K, gradient="dreg"),
            elbo.RenyiELBO(num_particles=K, alpha=0.5),
            elbo.CIWELBO(num_particles=K, beta=0.05),
        ]
        if K >= 2:
            chosen += [elbo.ReweightedWakeSleep(num_particles=K), elbo.ThermodynamicELBO(K)]
        side = round(K**0.5)
        if side > 1 and side * side == K:
            chosen += [elbo.MIWELBO(side, num_groups=side), elbo.PIWELBO(side, num_groups=side)]
    return chosen


def linear_gaussian(args: argparse.Namespace) -> tuple:
    """x = W z + b + noise, whose log p(x) is known, and a guide that is a little off."""
    truth = data.linear_gaussian_parameters(dim=8, latent_dim=4, seed=args.seed)
    decoder = torch.nn.Linear(4, 8)
    decoder.weight.data, decoder.bias.data = truth.W.float(), truth.b.float()
    model = models.VAE(conditionals.Normal(decoder, scale=float(truth.sigma)), latent_dim=4)
    x = data.load("linear_gaussian", dim=8, latent_dim=4, seed=args.seed).test.x[: args.rows]

    posterior = truth.posterior(x)  # in float64
    encoder = torch.nn.Linear(8, 8)  # the exact posterior mean; its scales, but a fifth too wide
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    solution = torch.linalg.lstsq(design, posterior.mean).solution
    scale = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1).reshape(-1, 4)[0].sqrt()
    encoder.weight.data = torch.cat([solution[:-1].T, torch.zeros(4, 8)]).float()
    encoder.bias.data = torch.cat([solution[-1] + 0.1, (1.2 * scale).log()]).float()
    return model, guides.Normal(encoder), x, truth.log_evidence(x)


def vae(args: argparse.Namespace) -> tuple:
    """A VAE trained on a data set for a few epochs; log p(x) by importance sampling."""
    dataset = data.load(args.data)
    width = dataset.train.x.shape[1]
    model = models.VAE(reporting.likelihood(dataset, width)(nets.mlp(8, 256, width)), latent_dim=8)
    guide = guides.Normal(nets.mlp(width, 256, 2 * 8))
    svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO())
    ppvae.fit(svi, dataset, epochs=args.epochs, progress=False)
    return model, guide, dataset.test.x[: args.rows], None


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        default="linear_gaussian",
        help="linear_gaussian (default), or a data set as in examples/vae.py",
    )
    parser.add_argument("--particles", type=int, nargs="+", default=[1, 4, 16, 64], metavar="K")
    parser.add_argument("--repeats", type=int, default=200, help="gradients (default: 200)")
    parser.add_argument("--rows", type=int, default=64, help="datapoints (default: 64)")
    parser.add_argument("--epochs", type=int, default=30, help="of training first (default: 30)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/compare_elbos"), metavar="FOLDER")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a check that all runs, in seconds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.particles, args.repeats, args.rows, args.epochs = [1, 4], 5, 8, 1
    return args


if __name__ == "__main__":
    reporting.run(main)
