"""VAE, beta-VAE, beta-TCVAE and FactorVAE over five seeds on sprites: Kim & Mnih, 2018.

Sprites of 32 pixels, all 13,824 of them (`data.sprites`), for training and for the scores, as the
literature has it; Bernoulli on black and white. Encoder 1024-128-128-z10, decoder mirrored, ReLU;
Adam at 1e-3, batch 64, 93 epochs, 20,088 steps. FactorVAE's critic has 2 layers of 128, Adam at
1e-3 with betas (0.5, 0.9), and 4 steps to each of the pair's; gamma rises over a fifth of the
steps. The papers train convolutions on dSprites of 64 pixels for 300,000 steps and more: that is
`full`, with the networks' widths, critic and rates of Locatello et al., 2019.

The weights were chosen on seed 100, which is none of the cells'.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from example_scripts import example

import ppvae
from ppvae import data

factor = example("factor")

BASE = {
    "data": "sprites",
    "channels": [],
    "hidden": [128, 128],
    "latent_dim": 10,
    "critic": [128, 128],
    "critic_steps": 4,
    "critic_lr": 1e-3,
    "lr": 1e-3,
    "batch_size": 64,
    "epochs": 93,
    "beta": 4.0,
    "tc_beta": 2.0,
    "gamma": 6.4,
    "ratio_steps": 2_000,
    "score_rows": 10_000,
    "votes": 10_000,
    "dci_rows": 2_000,
    "dci_trees": 30,
    "compile": True,
}
CELLS = {
    f"{method}-{seed}": BASE | {"method": method, "seed": seed}
    for seed in range(5)
    for method in factor.METHODS
}
QUICK = {
    "data": "small sprites",
    "hidden": [16],
    "critic": [16],
    "epochs": 2,
    "ratio_steps": 10,
    "votes": 100,
    "dci_rows": 300,
    "dci_trees": 2,
    "compile": False,
}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    """300,000 steps on dSprites, whose file is in the folder PPVAE_DATA."""
    return recipe | {
        "data": "dsprites",
        "channels": [32, 32, 64, 64],
        "hidden": [256],
        "critic": [1000] * 6,
        "critic_steps": 1,
        "critic_lr": 1e-4,
        "lr": 1e-4,
        "epochs": 26,  # of 11,520 steps
        "gamma": 35.0,
        "dci_rows": 15_000,
        "dci_trees": 100,
    }


def images(name: str) -> data.Factors:
    if name == "dsprites":
        file = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
        return data.dsprites(Path(os.environ["PPVAE_DATA"]) / file)
    return data.sprites(16, sizes=(3, 3, 3, 4, 4)) if name == "small sprites" else data.sprites(32)


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    factors, seed, device = images(recipe["data"]), recipe["seed"], recipe.get("device", "cpu")
    args = argparse.Namespace(**recipe, shape=tuple(factors.images.shape[1:]))
    generator = torch.Generator().manual_seed(0)
    x = factors[torch.randperm(len(factors), generator=generator)[:15_000]]
    svi, history = factor.train(
        recipe["method"],
        x if len(x) == len(factors) else factors.dataset(valid=1, test=1).train,
        args,
        seed,
        device=device,
        callbacks=[factor.Track(x[:2_000])],
        checkpoint=ppvae.Checkpoints(folder, every=10, keep=1),
        resume=True,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    svi.objective.cpu()
    model, guide = svi.model, svi.guide
    found = factor.evaluate(model, guide, x, seed)
    found["tc_ratio"] = factor.tc_by_ratio(guide, x, args, seed)
    if recipe["method"] == "Factor":
        found["tc_own_ratio"] = factor.mean_ratio(factor.ratio_of(svi), guide, x)
    return found | {
        "scores": factor.scores(guide, factors, args, seed),
        "steps": svi.num_steps,
        # over training: the objective, and the total correlation of 2,000 rows
        "epochs": [
            {key: row[key] for key in row if key in ("epoch", "step", *CURVES)}
            for row in history.rows
            if "tc_gaussian" in row
        ],
        "train_seconds": sum(history.column("seconds")),
    }


CURVES = ("train_objective", "tc_gaussian", "tc_ratio", "ratio_loss", "ratio_accuracy")
NUMBERS = {
    "TC, fitted Gaussian": "tc_gaussian",
    "TC, ratio": "tc_ratio",
    "TC, mixture q(z)": "tc_aggregate",
    "reconstruction": "reconstruction",
    "KL": "kl",
    "ELBO": "elbo",
    "active units": "active_units",
}


def report(found: dict[str, Any]) -> str:
    groups = {m: [c for c in found.values() if c["recipe"]["method"] == m] for m in factor.METHODS}
    groups = {method: cells for method, cells in groups.items() if cells}
    seeds = {m: ", ".join(str(c["recipe"]["seed"]) for c in cells) for m, cells in groups.items()}
    lines = [
        "Seeds: " + "; ".join(f"{method} {found}" for method, found in seeds.items()) + ".",
        "",
        "| nats, median (quartiles) | " + " | ".join(groups) + " |",
        "|---" * (len(groups) + 1) + "|",
    ]
    for name, key in NUMBERS.items():
        values = {m: [cell[key] for cell in cells] for m, cells in groups.items()}
        lines.append(f"| {name} | " + " | ".join(spread(v, 2) for v in values.values()) + " |")
    lines += ["", "| score, median (quartiles) | " + " | ".join(groups) + " |"]
    lines.append("|---" * (len(groups) + 1) + "|")
    for name in next(iter(found.values()))["scores"]:
        values = {m: [cell["scores"][name] for cell in cells] for m, cells in groups.items()}
        lines.append(f"| {name} | " + " | ".join(spread(v, 3) for v in values.values()) + " |")
    lines += ["", "| seed: TC by fitted Gaussian, ratio, mixture | " + " | ".join(groups) + " |"]
    lines.append("|---" * (len(groups) + 1) + "|")
    for seed in sorted({cell["recipe"]["seed"] for cell in found.values()}):
        of_seed = {
            m: [c for c in cells if c["recipe"]["seed"] == seed] for m, cells in groups.items()
        }
        kinds = ("tc_gaussian", "tc_ratio", "tc_aggregate")
        told = [
            ", ".join(f"{c[k]:.3f}" for k in kinds) for cells in of_seed.values() for c in cells
        ]
        if len(told) == len(groups):
            lines.append(f"| {seed} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def spread(values: list[float], digits: int) -> str:
    """The median with the quartiles; of one value this alone."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f}, {high:.{digits}f})"
