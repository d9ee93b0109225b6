"""The diagrams of docs/programs.md, drawn from the programs themselves when the site is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from torch import nn

from ppvae import conditionals, guides, models, nets, plots
from ppvae.check import structure

FOLDER = Path(__file__).parent / "plates"
D, Z, C = 6, 2, 3


def vae() -> tuple[Any, ...]:
    """x from z."""
    model = models.VAE(conditionals.Bernoulli(nets.mlp(Z, D)), latent_dim=Z)
    return model, guides.Normal(nets.mlp(D, 2 * Z)), torch.zeros(4, D)


def cvae() -> tuple[Any, ...]:
    """A prior that sees y."""
    y = nets.OneHot(C)
    likelihood = conditionals.Bernoulli(nets.mlp(Z + C, D))
    model = models.CVAE(likelihood, prior=conditionals.Normal(nets.mlp(C, 2 * Z)), condition=y)
    guide = guides.Normal(nets.mlp(D + C, 2 * Z), condition=y)
    return model, guide, torch.zeros(4, D), torch.tensor([0, 1, 2, 0])


def m2() -> tuple[Any, ...]:
    """A class that is known for some rows, and a style."""
    model = models.M2(conditionals.Bernoulli(nets.mlp(Z + C, D)), Z, num_classes=C)
    guide = guides.M2(nets.mlp(D, C), conditionals.Normal(nets.mlp(D + C, 2 * Z)))
    return model, guide, torch.zeros(4, D), torch.tensor([0, -1, 2, -1])


def mixture() -> tuple[Any, ...]:
    """c summed out or given by an E step."""
    model = models.GaussianMixture(C, D)
    return model, guides.Responsibilities(model), torch.randn(4, D)


def vade() -> tuple[Any, ...]:
    """A mixture as the prior."""
    model = models.VaDE(conditionals.Bernoulli(nets.mlp(Z, D)), conditionals.Mixture(C, Z))
    return model, guides.Normal(nets.mlp(D, 2 * Z)), torch.zeros(4, D)


def hierarchy() -> models.Hierarchical:
    """Three levels."""
    levels = [conditionals.Normal(nets.mlp(Z, 2 * Z)) for _ in range(2)]
    return models.Hierarchical(conditionals.Bernoulli(nets.mlp(Z, D)), levels, latent_dim=Z)


def bottom_up() -> tuple[Any, ...]:
    """z1 from x, z2 from z1, z3 from z2."""
    levels = [conditionals.Normal(nets.mlp(n, 2 * Z)) for n in (D, Z, Z)]
    model = hierarchy()
    return model, guides.BottomUp(model, levels), torch.zeros(4, D)


def ladder() -> tuple[Any, ...]:
    """Every level from x, and from the one above."""
    model, blocks = hierarchy(), [nets.mlp(n, 4) for n in (D, 4, 4)]
    return (
        model,
        guides.Ladder(model, blocks, [conditionals.Normal(nn.Linear(4, 2 * Z)) for _ in blocks]),
        torch.zeros(4, D),
    )


def top_down() -> tuple[Any, ...]:
    """Groups that hang on all groups above."""
    parts = nets.nvae((1, 6, 6), (1, 2), channels=2, latent_channels=2, blocks=1, expansion=1)
    model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
    return model, guides.TopDown(model, parts.encoder, parts.heads), torch.zeros(4, 1, 6, 6)


PAIRS = {f.__name__: f for f in (vae, cvae, m2, mixture, vade, bottom_up, ladder, top_down)}


def draw() -> None:
    """One SVG for each pair."""
    FOLDER.mkdir(exist_ok=True)
    plt.rcParams["svg.hashsalt"] = "ppvae"  # the same file from the same program
    with torch.random.fork_rng():
        for name, pair in PAIRS.items():
            model, guide, *args = pair()
            ax = plots.plates(structure(model, *args), structure(guide, *args))
            ax.figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})
            plt.close(ax.figure)


if __name__ == "__main__":
    draw()
