"""Without densities: a posterior that is a network of noise, and a likelihood that is a program.

    python examples/implicit.py            # minutes
    python examples/implicit.py --quick    # a check that all runs, in seconds

First adversarial variational Bayes. The model is known and fixed: x = z2 + z1^2 + noise, so that
p(z | x) is a banana. Normal posteriors and one without a density are trained under it, and compared
with quadrature; the value that the latter trains by is put beside log p(x), which it may exceed.

Then a queue of which only a few quantiles are seen (M/G/1): three parameters, no likelihood that
could be computed. Guides learn by a ratio, by the sleep phase (neural posterior estimation), and
without a density of their own; simulation-based calibration says how well.

Source: Mescheder, Nowozin & Geiger, Adversarial Variational Bayes, 2017; Papamakarios & Murray,
Fast epsilon-free inference of simulation models, 2016; Hermans, Begy & Louppe, Likelihood-free MCMC
with amortized approximate ratio estimators, 2020.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence

import pandas as pd
import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, diagnostics, elbo, guides, models, nets, plots, posteriors
from ppvae.plots.common import BLUE, GREY, ORANGE, RED

FILES = ["guides.csv", "banana.png", "values.png", "queue.csv", "calibration.png", "queue.png"]
SIGMA = 0.3
CUSTOMERS = 50
elu = functools.partial(nets.mlp, activation=nn.ELU)
adam = functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.999))


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    torch.set_num_threads(1)  # the networks are small
    banana(args).to_csv(args.out / "guides.csv")
    queue(args).to_csv(args.out / "queue.csv")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ a banana


class Bent(nn.Module):
    """z2 + z1^2."""

    def forward(self, z: Tensor) -> Tensor:
        return z[..., 1:] + z[..., :1].square()


def implicit(width: int, dim: int, noise_dim: int, contrast: str) -> guides.Amortized:
    sampler = elu(width + noise_dim, 64, 64, dim)
    critic = elu(width + dim, 64, 64, 1)
    q = posteriors.Implicit(sampler, critic, dim, noise_dim, contrast=contrast)
    return guides.Amortized(q)


def train(
    model: ppvae.Program,
    guide: ppvae.Program,
    x: Tensor,
    args: argparse.Namespace,
    epochs: int,
    loss: elbo.Estimator | None = None,
) -> ppvae.History:
    svi = ppvae.SVI(model, guide, adam, loss or elbo.ELBO(), beside=ppvae.Beside(adam, steps=2))
    return ppvae.fit(
        svi, x, epochs=epochs, batch_size=args.batch_size, seed=args.seed, progress=False
    )


def banana(args: argparse.Namespace) -> pd.DataFrame:
    pyro.set_rng_seed(args.seed)
    model = models.VAE(conditionals.Normal(Bent(), scale=SIGMA), latent_dim=2)
    x, test = (model(size=rows) for rows in (args.rows, args.num_test))
    trained = {
        "diagonal normal": guides.Normal(elu(1, 64, 64, 4)),
        "full normal": guides.Amortized(posteriors.FullNormal(elu(1, 64, 64, 5), dim=2)),
        "AVB": implicit(1, 2, 4, "prior"),
        "AVB + AC": implicit(1, 2, 4, "adaptive"),
    }
    exact = diagnostics.quadrature(model, trained["diagonal normal"], test).log_evidence
    rows = []
    for name, guide in trained.items():
        started = time.perf_counter()
        train(model, guide, x, args, args.epochs)
        seconds = time.perf_counter() - started
        own = elbo.ELBO(args.particles).estimate(model, guide, test)
        rows.append(
            {
                "guide": name,
                "own value": own.mean().item(),
                "less log p(x)": (own.double() - exact).mean().item(),
                "train [s]": seconds,
            }
        )
    annealed = diagnostics.ais(  # with no density of any guide
        model, guide, test, start="prior", num_temperatures=args.temperatures, seed=args.seed
    )
    table = pd.DataFrame(rows).set_index("guide")
    print(f"\nThe banana, {len(test)} test points [nats per datapoint]")
    print(f"log p(x) by quadrature: {exact.mean():.3f}")
    print(
        f"log p(x) by annealing from the prior: {annealed.mean:.3f} ± {annealed.mean_mc_se:.3f}\n"
    )
    print(table.to_string(float_format="%.3f"))
    draw_banana(model, trained, args.x).savefig(args.out / "banana.png")
    draw_values(table, (annealed.log_evidence - exact).mean().item()).savefig(
        args.out / "values.png", dpi=120
    )
    return table


@torch.no_grad()
def draw_banana(model: models.VAE, trained: dict[str, guides.Amortized], at: float) -> plt.Figure:
    """p(z | x) on a grid, and draws of each guide over it."""
    x = torch.tensor([[at]])
    across, up = torch.linspace(-2.7, 2.7, 201), torch.linspace(-3.2, 2.8, 201)
    grid = torch.cartesian_prod(across, up)
    log_p = model.prior().log_prob(grid) + model.likelihood(grid).log_prob(x)
    density = (log_p - log_p.max()).exp().reshape(201, 201).T.numpy()
    figure, axes = plt.subplots(1, len(trained), figsize=(11, 3.4), sharey=True)
    for ax, (name, guide) in zip(axes, trained.items(), strict=True):
        z = guide.posterior(x.expand(600, 1)).sample()
        levels = [0.05, 0.35, 0.7, 1.01]
        ax.contourf(across.numpy(), up.numpy(), density, levels, cmap="Blues", vmin=-0.3)
        ax.scatter(z[:, 0], z[:, 1], s=4, color=RED, linewidth=0, alpha=0.7)
        ax.set(xlim=(-2.7, 2.7), ylim=(-3.2, 2.8), title=name, xlabel="z[0]")
    axes[0].set_ylabel("z[1]")
    return figure


def draw_values(table: pd.DataFrame, annealed: float) -> plt.Figure:
    """What each guide is trained by, and log p(x) by annealing, against log p(x) by quadrature."""
    figure, ax = plt.subplots(figsize=(7.6, 3.2))
    places = range(len(table))
    bounds = ~table.index.str.startswith("AVB")
    for is_bound, colour, label in (
        (True, BLUE, "ELBO, a bound"), (False, ORANGE, 'AVB\'s "ELBO", no bound')
    ):  # fmt: skip
        chosen = [place for place in places if bounds[place] == is_bound]
        values = table["less log p(x)"].iloc[chosen]
        ax.barh(chosen, values, color=colour, height=0.6, label=label)
    ax.axvline(0.0, color=GREY, lw=1)
    ax.axvline(annealed, color="black", ls="--", lw=1.5, label="annealing, of log p(x)")
    ax.set_yticks(list(places), table.index)
    ax.invert_yaxis()
    ax.set_xlabel("less log p(x) by quadrature [nats per datapoint]")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.22), ncols=3)
    return figure


# ------------------------------------------------------------------------------ a queue


NAMES = ["shortest service", "spread of service", "rate of arrivals"]
LARGEST = torch.tensor([10.0, 10.0, 1 / 3])


def parameters(z: Tensor) -> Tensor:
    """Uniform on [0, 10], [0, 10] and [0, 1/3], of standard normal z."""
    return LARGEST * torch.special.ndtr(z).clamp(1e-6, 1.0)


def simulate(z: Tensor) -> Tensor:
    """Five quantiles of the times between departures of 50 customers, their logarithms.

    Each is served for a time in [shortest, shortest + spread], by one server, in turn.
    """
    shortest, spread, rate = parameters(z).unsqueeze(-1).unbind(1)
    service = shortest + spread * torch.rand(len(z), CUSTOMERS)
    arrival = (torch.empty(len(z), CUSTOMERS).exponential_() / rate).cumsum(1)
    left, gaps = torch.zeros(len(z)), []
    for i in range(CUSTOMERS):
        now = service[:, i] + torch.maximum(left, arrival[:, i])
        gaps.append(now - left)
        left = now
    levels = torch.linspace(0, 1, 5)
    return torch.stack(gaps, 1).quantile(levels, 1).T.clamp(min=1e-4).log() - 2


def queue(args: argparse.Namespace) -> pd.DataFrame:
    rows, checks, trained = [], {}, {}
    for name in ("ratio", "sleep", "ratio, implicit"):
        pyro.set_rng_seed(args.seed)
        likelihood = conditionals.Simulator(simulate, elu(5 + 3, 64, 64, 1), shape=5)
        model = models.VAE(likelihood, latent_dim=3)
        x = model(size=args.rows)
        guide, loss = implicit(5, 3, 6, "adaptive"), None
        if name != "ratio, implicit":
            layers = posteriors.coupling(3, context_dim=16, num_layers=4, hidden=[32])
            net = elu(5, 64, 64, 2 * 3 + 16)
            guide = guides.Amortized(posteriors.Flow(net, layers, dim=3, context_dim=16))
        if name == "sleep":
            likelihood.ratio.requires_grad_(False)  # it is not asked
            loss = elbo.ReweightedWakeSleep(num_particles=1, insomnia=0.0)
        started = time.perf_counter()
        train(model, guide, x, args, 4 * args.epochs, loss)
        seconds = time.perf_counter() - started
        check = diagnostics.sbc(
            model, guide, x[:2], num_simulations=args.simulations, seed=args.seed
        )
        covered = check.coverage([0.5, 0.9])["z"].mean(1).tolist()
        smallest = check.p_values["z"].min().item()
        checks[name], trained[name] = check, guide
        rows.append(
            {
                "guide by": name,
                "50 % sets hold": covered[0],
                "90 % sets hold": covered[1],
                "smallest p of 3": smallest,
                "train [s]": seconds,
            }
        )
    table = pd.DataFrame(rows).set_index("guide by")
    print(f"\nThe queue, calibration on {args.simulations} simulated data sets\n")
    print(table.to_string(float_format="%.3g"))
    figure, axes = plt.subplots(1, len(checks), figsize=(13, 3.8))
    for ax, (name, check) in zip(axes, checks.items(), strict=True):
        plots.sbc_ecdf(check.ranks, check.num_draws, check.band(), ax=ax)
        ax.set(title=name, xlabel="rank of the true value, as a fraction")
    figure.savefig(args.out / "calibration.png")
    draw_queue(trained, args).savefig(args.out / "queue.png")
    return table


@torch.no_grad()
def draw_queue(trained: dict[str, guides.Amortized], args: argparse.Namespace) -> plt.Figure:
    """What the guides say of the parameters of one queue that is simulated, beside the truth."""
    torch.manual_seed(args.seed)
    truth = torch.tensor([[1.0, 4.0, 0.2]])
    x = simulate(torch.special.ndtri(truth / LARGEST))
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2))
    for (name, guide), colour in zip(trained.items(), (BLUE, ORANGE, RED), strict=True):
        drawn = parameters(guide.posterior(x.expand(4_000, -1)).sample())
        for i, ax in enumerate(axes):
            edges = torch.linspace(0, LARGEST[i], 41).tolist()
            ax.hist(drawn[:, i], edges, density=True, histtype="step", color=colour, label=name)
    for i, ax in enumerate(axes):
        ax.axvline(truth[0, i].item(), color=GREY, ls="--", label="truth")
        ax.set(title=NAMES[i], xlim=(0, LARGEST[i].item()), yticks=[])
    axes[0].set_ylabel("density")
    axes[2].legend()
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/implicit")
    parser.add_argument("--epochs", type=int, default=30, help="per guide (default: 30)")
    parser.add_argument("--rows", type=int, default=8_192, help="of training (default: 8192)")
    parser.add_argument("--num-test", type=int, default=50, help="test points (default: 50)")
    parser.add_argument("--x", type=float, default=1.0, help="in the picture (default: 1)")
    args = parser.parse_args(argv)
    args.batch_size, args.particles = 256, 100
    args.temperatures, args.simulations = 200, 1_000
    if args.quick:
        args.epochs, args.rows, args.num_test, args.particles = 1, 64, 3, 5
        args.batch_size, args.temperatures, args.simulations = 32, 4, 100
    return args


if __name__ == "__main__":
    reporting.run(main)
