"""Ladder and bottom-up VAEs of five levels on dynamic MNIST: Sønderby et al., 2016.

Latents 64-32-16-8-4, between neighbours two hidden layers of 512, 256, 128, 64, 32; leaky ReLU of
slope 0.1, variance = softplus, batch norm on every layer but the output. Adam at 1e-3, batch 256,
one draw, sampled KL. The paper trains 2,000 epochs of which 200 are warm-up; here `num_epochs` and
`warm_up`. Training images binarised afresh in each epoch, test images once; IWELBO-5000.

At the end batch norm's statistics are computed again on the training images, as the paper does;
the ELBO by its running averages is given beside.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pyro
import torch
from example_scripts import example
from torch import Tensor, nn

import ppvae
from ppvae import data, diagnostics, elbo

hierarchical = example("hierarchical")  # its networks, and what it counts in a level

BASE = {
    "num_epochs": 200,
    "warm_up": 0,
    "batch_norm": False,
    "seed": 0,
    "latents": [64, 32, 16, 8, 4],
    "hidden": [512, 256, 128, 64, 32],
    "batch_size": 256,
    "lr": 1e-3,
    "num_train": 59_648,  # 233 whole batches
    "num_test": 1_000,
    "num_particles": 5_000,
    "compile": "auto",
}
WITH_BOTH = {"batch_norm": True, "warm_up": 40}
# The authors' code cuts the gradient of a batch's mean to the norm 4; here a batch is summed.
CLIPPED = {"clip_norm": 4.0 * 256}
CELLS = {
    "ladder-BN-WU": BASE | {"guide": "ladder"} | WITH_BOTH,
    "bottom-up-BN-WU": BASE | {"guide": "bottom-up"} | WITH_BOTH,
    "bottom-up": BASE | {"guide": "bottom-up"},
    "ladder": BASE | {"guide": "ladder"},
    "ladder-BN": BASE | {"guide": "ladder", "batch_norm": True},
    "bottom-up-BN": BASE | {"guide": "bottom-up", "batch_norm": True},
    "ladder-WU": BASE | {"guide": "ladder", "warm_up": 40} | CLIPPED,
    "bottom-up-WU": BASE | {"guide": "bottom-up", "warm_up": 40} | CLIPPED,
    "ladder-clipped": BASE | {"guide": "ladder"} | CLIPPED,
    "bottom-up-clipped": BASE | {"guide": "bottom-up"} | CLIPPED,
}
PAIRS = [
    ("ladder-BN-WU", "bottom-up-BN-WU"),
    ("ladder-BN-WU", "bottom-up"),
    ("ladder-BN", "bottom-up-BN"),
    ("ladder-WU", "bottom-up-WU"),
    ("ladder-clipped", "bottom-up-clipped"),
    ("ladder", "bottom-up"),
    ("ladder-BN-WU", "ladder-BN"),
    ("ladder-BN", "ladder"),
    ("bottom-up-BN-WU", "bottom-up"),
]
QUICK = {
    "latents": [8, 4],
    "hidden": [16, 8],
    "num_epochs": 2,
    "num_train": 512,
    "num_test": 20,
    "num_particles": 50,
    "compile": False,
}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    warm_up = 200 if recipe["warm_up"] else 0
    return recipe | {"num_epochs": 2_000, "warm_up": warm_up, "num_test": 10_000}


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    dataset = data.load("mnist", num_valid=352, seed=recipe["seed"])  # held out and never used
    train = dataclasses.replace(
        dataset.train, values=dataset.train.values[: recipe["num_train"]], y=None
    )
    device = recipe.get("device", "cpu")
    x = dataset.test.x[: recipe["num_test"]].to(device)
    pyro.set_rng_seed(recipe["seed"])
    model, by_name = hierarchical.mlp_pair(
        x.shape[1], recipe["latents"], recipe["hidden"], recipe["batch_norm"]
    )
    guide = by_name[recipe["guide"]]

    steps = -(-len(train) // recipe["batch_size"]) * recipe["warm_up"]
    bound = elbo.ELBO(beta=elbo.LinearWarmup(steps) if steps else 1.0)
    adam = functools.partial(torch.optim.Adam, lr=recipe["lr"])
    clip_norm = recipe.get("clip_norm")
    history = ppvae.fit(
        ppvae.SVI(model, guide, adam, bound, clip_norm=clip_norm, compile=recipe["compile"]),
        train,
        epochs=recipe["num_epochs"],
        batch_size=recipe["batch_size"],
        seed=recipe["seed"],
        device=device,
        checkpoint=folder,
        resume=True,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    evaluate = functools.partial(diagnostics.log_evidence, model, guide, x, seed=0)
    by_averages = evaluate(num_particles=100)
    if recipe["batch_norm"]:
        renormalise(model, guide, train.x.to(device))
    evidence = evaluate(num_particles=recipe["num_particles"], compile=recipe["compile"])
    return {
        "log_evidence": evidence.mean,
        "se": evidence.mean_se,
        "mc_se": evidence.mean_mc_se,
        "elbo": evidence.elbo.mean().item(),
        "elbo_by_running_averages": by_averages.elbo.mean().item(),
        "values": [round(value, 4) for value in evidence.log_evidence.tolist()],
        # KL in nats, and units with more than 0.01 nats, of each level
        "levels": hierarchical.by_level(model, guide, x),
        "train_objective": history.rows[-1]["train_objective"],
    }


@torch.no_grad()
def renormalise(model: ppvae.Program, guide: ppvae.Program, x: Tensor) -> None:
    """Batch norm's statistics of all of x, in pieces of 10,000, in place of running averages."""
    for norm in [*model.modules(), *guide.modules()]:
        if isinstance(norm, nn.BatchNorm1d):
            norm.reset_running_stats()
            norm.momentum = None  # the mean over all pieces
    model.train(), guide.train()
    for piece in x.split(10_000):
        ppvae.log_weights(model, guide, piece)


def report(found: dict[str, Any]) -> str:
    lines = [
        "| cell | -log p(x) | s.e. over images | -ELBO | by running averages "
        "| KL by level, z1 first | active units | CPU hours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in found.items():
        levels = cell["levels"]
        kl = ", ".join(f"{levels[key]:.1f}" for key in sorted(levels) if key.startswith("KL"))
        active = ", ".join(str(levels[key]) for key in sorted(levels) if key.startswith("active"))
        lines.append(
            f"| {name} | {-cell['log_evidence']:.2f} | {cell['se']:.2f} | {-cell['elbo']:.2f} | "
            f"{-cell['elbo_by_running_averages']:.2f} | {kl} | {active} | "
            f"{cell['cpu_seconds'] / 3600:.1f} |"
        )
    lines += ["", "| difference of log p(x), paired by image | nats ± s.e. |", "|---|---|"]
    for more, less in PAIRS:
        if more in found and less in found:
            a, b = (torch.tensor(found[name]["values"]).double() for name in (more, less))
            value, error = (a - b).mean().item(), (a - b).std().item() / len(a) ** 0.5
            lines.append(f"| {more} - {less} | {value:+.2f} ± {error:.2f} |")
    return "\n".join(lines)
