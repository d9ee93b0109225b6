"""Guides compared on one trained decoder, one of them written here: whose posterior fits best?

    python examples/custom_guide.py
    python examples/custom_guide.py --latent-dim 8     # no picture of q(z | x), which needs 2

A VAE is trained on digits with a diagonal normal guide. Then the decoder is held fixed, and each
of five guides is trained to infer z under it: what is left of the gap log p(x) - ELBO is the
guide's. Sources: Kingma et al. 2016 (IAF); Kim et al. 2018 (semi-amortised); Cremer et al. 2018,
Inference Suboptimality in Variational Autoencoders (the question).
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyro
import pyro.distributions as dist
import reporting
import torch
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from torch import Tensor

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, posteriors
from ppvae.local import Indexed, fit_local
from ppvae.plots.common import BLUE, RED

FILES = ["guides.csv", "guides.png"]


class StudentT(conditionals.Conditional):
    """A guide of one's own is a head of one's own: normal in the middle, heavier in the tails."""

    def forward(self, *inputs: Tensor) -> dist.TorchDistribution:
        loc, raw, tails = self.outputs(*inputs).chunk(3, -1)
        return dist.StudentT(2 + tails.exp(), loc, raw.exp()).to_event(1)


def five_guides(pixels: int, dim: int, model: models.VAE) -> dict[str, ppvae.Program]:
    """By name; the networks differ in their last layer only."""

    def net(outputs: int) -> torch.nn.Module:
        return nets.mlp(pixels, 128, outputs)

    layers = posteriors.iaf(dim, context_dim=8, hidden=[32])
    flow = posteriors.Flow(net(2 * dim + 8), layers, dim, context_dim=8)
    full = posteriors.FullNormal(net(dim * (dim + 3) // 2), dim)
    return {
        "diagonal normal": guides.Normal(net(2 * dim)),
        "Student-t (own)": guides.Amortized(StudentT(net(3 * dim))),
        "full covariance": guides.Amortized(full),
        "IAF": guides.Amortized(flow),
        "semi-amortised": guides.SemiAmortized(guides.Normal(net(2 * dim)), model, 5, lr=0.02),
    }


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    torch.set_num_threads(1)  # the networks are small
    pyro.set_rng_seed(args.seed)
    digits = data.load("digits")
    x = digits.test.x[: args.rows]
    pixels = x.shape[1]

    decoder = nets.mlp(args.latent_dim, 128, pixels)
    model = models.VAE(conditionals.Bernoulli(decoder), latent_dim=args.latent_dim)
    encoder = guides.Normal(nets.mlp(pixels, 128, 2 * args.latent_dim))
    train(model, encoder, digits, args.epochs, elbo.ELBO())
    model.requires_grad_(False)

    rows, trained = [], {}
    for name, guide in five_guides(pixels, args.latent_dim, model).items():
        started = time.perf_counter()
        train(model, guide, digits, args.guide_epochs, elbo.ELBO(num_particles=4))
        seconds = time.perf_counter() - started
        evidence = diagnostics.log_evidence(
            model, guide, x, num_particles=args.particles, seed=args.seed
        )
        trained[name] = guide
        rows.append(
            {
                "guide": name,
                "ELBO": evidence.elbo.mean().item(),
                f"IWELBO-{args.particles}": evidence.mean,
                "MC se": evidence.mean_mc_se,
                "median k-hat": evidence.khat.median().item(),
                "k-hat > 0.7": (evidence.khat > 0.7).double().mean().item(),
                "train [s]": seconds,
            }
        )
    table = pd.DataFrame(rows).set_index("guide")
    bound = table[f"IWELBO-{args.particles}"]
    table.insert(3, "gap", bound.max() - table["ELBO"])

    print(
        f"\n{len(x)} test digits, one decoder with {args.latent_dim} latents, "
        f"{args.particles} particles [nats per datapoint, larger is better; gap: best "
        f"IWELBO-{args.particles} - ELBO]\n"
    )
    print(table.to_string(float_format="%.3f"))
    print(
        f"\nWith parameters for each digit instead of an encoder, the diagonal normal's gap is "
        f"{bound.max() - individual(model, trained['diagonal normal'], x, args):.3f}."
    )
    if args.latent_dim == 2:
        draw(model, trained, x).savefig(out / "guides.png")
    table.to_csv(out / "guides.csv")
    reporting.print_files(out, [name for name in FILES if (out / name).exists()])


def train(model: models.VAE, guide: ppvae.Program, digits: data.Dataset, epochs: int,
          bound: elbo.Estimator) -> None:  # fmt: skip
    """Whatever of the pair is trainable."""
    adam = functools.partial(torch.optim.Adam, lr=2e-3)
    svi = ppvae.SVI(model, guide, adam, bound)
    ppvae.fit(svi, digits.train, epochs=epochs, batch_size=128, progress=False)


def individual(
    model: models.VAE, guide: guides.Normal, x: Tensor, args: argparse.Namespace
) -> float:
    """The mean ELBO of the best normal for each digit: what is lost then is the family's."""
    index, local = torch.arange(len(x)), guide.local(x)
    fit_local(Indexed(model), local, x, index, steps=10 if args.smoke else 500)
    evidence = diagnostics.log_evidence(
        Indexed(model), local, x, index, num_particles=args.particles, seed=args.seed
    )
    return evidence.elbo.mean().item()


def draw(model: models.VAE, trained: dict[str, ppvae.Program], x: Tensor) -> plt.Figure:
    """The images on which the guides differ most: p(z | x) on a grid, and q(z | x) over it."""
    side = torch.linspace(-4, 4, 121)
    grid = torch.cartesian_prod(side, side)
    step = float(side[1] - side[0])
    with torch.no_grad():
        prior = model.prior().log_prob(grid)
        log_p = torch.stack([model.likelihood(grid).log_prob(row) + prior for row in x])
        log_p = log_p.log_softmax(-1) - 2 * torch.tensor(step).log()  # p(z | x), by quadrature
        log_q = {
            name: guide.posterior(x).log_prob(grid.unsqueeze(1)).T
            for name, guide in trained.items()
        }
        first = log_q["diagonal normal"]
        kl = (first.exp() * (first - log_p)).sum(-1) * step**2
    shown = kl.topk(min(4, len(x))).indices
    figure, axes = plt.subplots(
        len(shown), len(trained) + 1, squeeze=False,
        figsize=(2.1 * (len(trained) + 1), 2.1 * len(shown) + 0.6),
    )  # fmt: skip
    for n, image in zip(shown, axes, strict=True):
        density = log_p[n].exp().reshape(121, 121).T.numpy()
        where = grid[log_p[n] > log_p[n].max() - 8]
        middle = where.mean(0).tolist()
        radius = float((where.amax(0) - where.amin(0)).max()) / 2 + 0.2
        image[0].imshow(x[n].reshape(8, 8).numpy(), cmap="gray_r")
        image[0].set(xticks=[], yticks=[])
        for ax, (name, values) in zip(image[1:], log_q.items(), strict=True):
            q = values[n].exp().reshape(121, 121).T.numpy()
            levels = [float(density.max()) * level for level in (0.05, 0.3, 0.7)]
            ax.contourf(side.numpy(), side.numpy(), density, [*levels, float(density.max()) * 1.01],
                        cmap="Blues", vmin=-0.3 * float(density.max()))  # fmt: skip
            ax.contour(side.numpy(), side.numpy(), q, levels, colors=RED, linewidths=1.2)
            ax.set(
                xlim=(middle[0] - radius, middle[0] + radius),
                ylim=(middle[1] - radius, middle[1] + radius),
            )
            ax.set_aspect("equal")
            ax.tick_params(labelsize="small")
            if n == shown[0]:
                ax.set_title(name)
    for ax in axes[-1][1:]:
        ax.set_xlabel("z[0]")
    for row in axes:
        row[1].set_ylabel("z[1]")
    axes[0][0].set_title("x")
    key = [Line2D([], [], color=BLUE, lw=6, alpha=0.6), Line2D([], [], color=RED, lw=1.2)]
    names = ["p(z | x), on a grid", "q(z | x), at the same levels"]
    figure.legend(key, names, loc="outside upper center", ncols=2)
    return figure


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latent-dim", type=int, default=2, help="size of z, >= 2 (default: 2)")
    parser.add_argument("--epochs", type=int, default=150, help="for the decoder (default: 150)")
    parser.add_argument("--guide-epochs", type=int, default=60, help="per guide (default: 60)")
    parser.add_argument("--rows", type=int, default=200, help="test digits (default: 200)")
    parser.add_argument(
        "--particles", type=int, default=5000, metavar="K", help="to evaluate (default: 5000)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--out", type=Path, default=Path("out/custom_guide"), metavar="FOLDER")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="a check that all runs, in seconds")
    args = parser.parse_args(argv)
    if args.smoke:
        args.epochs, args.guide_epochs, args.rows, args.particles = 1, 1, 8, 50
    return args


if __name__ == "__main__":
    reporting.run(main)
