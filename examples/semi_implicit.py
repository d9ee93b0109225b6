"""A posterior that is a ring: what a normal, a flow and a semi-implicit posterior make of it.

    python examples/semi_implicit.py

Only the length of z is seen, x = |z| + noise, so p(z | x) is a ring whatever x is. The model is
known and fixed; each guide is trained under it, then compared with log p(x) by quadrature. Source:
Yin & Zhou, Semi-Implicit Variational Inference, 2018.
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
from ppvae import conditionals, diagnostics, elbo, guides, models, nets, posteriors
from ppvae.plots.common import RED

FILES = ["guides.csv", "ring.png"]
SIGMA = 0.2


class Length(nn.Module):
    """|z|, as the only "pixel" of x."""

    def forward(self, z: Tensor) -> Tensor:
        return (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def semi_implicit(num_mixing: int) -> guides.Amortized:
    """The whole posterior: a normal psi in 4 dimensions, and a network that bends it."""
    mixing = conditionals.Normal(nets.mlp(1, 64, 64, 2 * 4))
    head = conditionals.Normal(nets.mlp(4, 64, 64, 2 * 2))
    return guides.Amortized(posteriors.SemiImplicit(mixing, head, num_mixing))


def three_guides(num_mixing: int) -> dict[str, guides.Amortized]:
    layers = posteriors.iaf(2, context_dim=16, num_layers=4)
    flow = posteriors.Flow(nets.mlp(1, 64, 64, 2 * 2 + 16), layers, dim=2, context_dim=16)
    return {
        "diagonal normal": guides.Normal(nets.mlp(1, 64, 64, 2 * 2)),
        "IAF (4 layers)": guides.Amortized(flow),
        f"semi-implicit (J = {num_mixing})": semi_implicit(num_mixing),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    torch.set_num_threads(1)  # the networks are small
    pyro.set_rng_seed(args.seed)
    model = models.VAE(conditionals.Normal(Length(), scale=SIGMA), latent_dim=2)
    train, test = (model(size=rows) for rows in (2000, args.rows))

    rows, trained = [], three_guides(args.num_mixing)
    for name, guide in trained.items():
        started = time.perf_counter()
        adam = functools.partial(torch.optim.Adam, lr=2e-3)
        svi = ppvae.SVI(model, guide, adam, elbo.ELBO())
        ppvae.fit(svi, train, epochs=args.epochs, batch_size=100, seed=args.seed, progress=False)
        seconds = time.perf_counter() - started
        evidence = diagnostics.log_evidence(
            model, guide, test, num_particles=args.particles, seed=args.seed
        )
        rows.append(
            {
                "guide": name,
                "ELBO": evidence.elbo.mean().item(),
                f"IWELBO-{args.particles}": evidence.mean,
                "MC se": evidence.mean_mc_se,
                "median k-hat": evidence.khat.median().item(),
                "train [s]": seconds,
            }
        )
    table = pd.DataFrame(rows).set_index("guide")
    exact = diagnostics.quadrature(model, guide, test).log_evidence
    print(f"\n{len(test)} test points [nats per datapoint, larger is better]")
    print(f"log p(x) by quadrature: {exact.mean():.3f}\n")
    print(table.to_string(float_format="%.3f"))
    sandwich(model, guide, test, args)
    draw(model, trained, args.x).savefig(out / "ring.png")
    table.to_csv(out / "guides.csv")
    reporting.print_files(out, FILES)


def sandwich(
    model: models.VAE, guide: guides.Amortized, x: Tensor, args: argparse.Namespace
) -> None:
    """The trained q between its two estimates, with more and more psi beside the one drawn."""
    print("\nThe ELBO of the trained q lies, on average, between those with and without the psi")
    print(f"that drew z ({args.sandwich} draws of each point):\n\n   J         with   without")
    for J in (1, 10, 50, 500):
        q = guide.conditional
        q.num_mixing = J
        without = guides.Amortized(q.without_own())
        bound, sums = elbo.ELBO(), torch.zeros(2)
        torch.manual_seed(args.seed)
        for _ in range(args.sandwich):  # one draw at a time, for the head runs on J + 1 psi of each
            below, above = bound.evaluate(model, guide, x), bound.estimate(model, without, x)
            sums += torch.stack([below.mean(), above.mean()]) / args.sandwich
        print(f"{J:4d}{sums[0]:13.3f}{sums[1]:10.3f}")
    q.num_mixing = args.num_mixing


@torch.no_grad()
def draw(model: models.VAE, trained: dict[str, guides.Amortized], at: float) -> plt.Figure:
    """p(z | x) on a grid, and draws of each guide over it."""
    x = torch.tensor([[at]])
    side = torch.linspace(-2.6, 2.6, 201)
    grid = torch.cartesian_prod(side, side)
    log_p = model.prior().log_prob(grid) + model.likelihood(grid).log_prob(x)
    density = (log_p - log_p.max()).exp().reshape(201, 201).numpy()
    figure, axes = plt.subplots(1, len(trained), figsize=(9, 3.4))
    for ax, (name, guide) in zip(axes, trained.items(), strict=True):
        z = guide.posterior(x.expand(600, 1)).sample()
        levels = [0.05, 0.35, 0.7, 1.01]
        ax.contourf(side.numpy(), side.numpy(), density, levels, cmap="Blues", vmin=-0.3)
        ax.scatter(z[:, 0], z[:, 1], s=4, color=RED, linewidth=0, alpha=0.7)
        ax.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), title=name, xlabel="z[0]")
        ax.set_aspect("equal")
    axes[0].set_ylabel("z[1]")
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/semi_implicit")
    parser.add_argument("--epochs", type=int, default=200, help="per guide (default: 200)")
    parser.add_argument("--num-mixing", type=int, default=50, metavar="J",
                        help="psi beside the one that draws z (default: 50)")  # fmt: skip
    parser.add_argument("--rows", type=int, default=200, help="test points (default: 200)")
    parser.add_argument("--particles", type=int, default=1000, help="to evaluate (default: 1000)")
    parser.add_argument("--x", type=float, default=1.3, help="in the picture (default: 1.3)")
    args = parser.parse_args(argv)
    args.sandwich = 100
    if args.quick:
        args.epochs, args.rows, args.particles, args.sandwich = 1, 4, 30, 5
    return args


if __name__ == "__main__":
    reporting.run(main)
