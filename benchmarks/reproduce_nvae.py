"""A deep hierarchy on dynamic MNIST: NVAE, Vahdat & Kautz, 2020.

The cells are half a million parameters for a CPU: 28 x 28, one group at 4 x 4 and two at 7 x 7,
each of four channels; 12 channels at the size of the image. Adamax at 5e-3, batches of 32; the KL
is balanced by group while its weight rises from 1e-4 to 1 over the first 30 % of the steps; lambda
of singular values and batch norm 1e-2, in `lambda-0` none. The short cells have 2,000 steps at one
learning rate; the long one lowers it along a cosine. Training images are binarised afresh in each
epoch, test images once. -ELBO and the KL of each group are of the first `num_test` test images,
closed forms; IWELBO of the first `num_evidence`.

`--full --device cuda` is the paper's MNIST recipe (78.01 nats), which has not been run: images
padded to 32 x 32, 5 groups at 4 x 4 and 10 at 8 x 8, each of 20 channels; 32 channels at the size
of the image, doubled at each halving; two blocks of three cells on either side; two cells per
group, the path's six times as wide inside; convolutions with weight norm; Adamax from 1e-2 along a
cosine to 1e-4, eps 1e-3, weight decay 3e-4, five epochs of learning-rate warm-up; batch 400; 400
epochs; 59,999 images; 1,000 samples. It differs from the authors' code in one device for two,
float32 for mixed precision, learning rates that change by epoch, and the skips where an image is
halved (a mean over 2 x 2 pixels) and enlarged (the nearest pixel).
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import pyro
import torch
from example_scripts import example
from torch import nn
from torch.nn.utils import parametrizations

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets

nvae = example("nvae")

BASE = {
    "groups": [1, 2],
    "channels": 12,
    "latent_channels": 4,
    "blocks": 2,
    "cells": 1,
    "expansion": 3,
    "block_cells": 1,
    "block_expansion": 3,
    "pad": 0,
    "weight_norm": False,
    "epochs": 4,
    "num_train": 16_000,
    "batch_size": 32,
    "lr": 5e-3,
    "falls": False,
    "lr_warm_up": 0,
    "weight_decay": 0.0,
    "warm_up": 0.3,
    "balance": True,
    "regularizer": 1e-2,
    "num_test": 1_000,
    "num_evidence": 300,
    "num_samples": 100,
    "compile": False,
}
CELLS = {f"seed-{seed}": BASE | {"seed": seed} for seed in range(3)}
CELLS |= {"lambda-0": BASE | {"regularizer": 0.0, "seed": 0}}
CELLS |= {"long": BASE | {"seed": 0, "epochs": 6, "num_train": 48_000, "falls": True}}
QUICK = {
    "channels": 4,
    "groups": [1, 1],
    "cells": 1,
    "block_cells": 1,
    "latent_channels": 2,
    "epochs": 2,
    "num_train": 128,
    "batch_size": 64,
    "num_test": 20,
    "num_evidence": 10,
    "num_samples": 10,
}
FULL = {
    "groups": [5, 10],
    "channels": 32,
    "latent_channels": 20,
    "blocks": 2,
    "cells": 2,
    "expansion": 6,
    "block_cells": 3,
    "block_expansion": 3,
    "pad": 2,
    "weight_norm": True,
    "epochs": 400,
    "num_train": 59_999,
    "batch_size": 400,
    "lr": 1e-2,
    "falls": True,
    "lr_warm_up": 5,
    "weight_decay": 3e-4,
    "num_test": 10_000,
    "num_evidence": 10_000,
    "num_samples": 1_000,
}
PAPER = 78.01  # -log p(x) on MNIST without flows, table 1


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | FULL


def build(recipe: dict[str, Any]) -> tuple[models.TopDown, guides.TopDown]:
    """The example's pair; padded and with weight norm where the recipe says so."""
    args, pad = argparse.Namespace(**recipe), recipe["pad"]
    if not pad and not recipe["weight_norm"]:
        pair: tuple[models.TopDown, guides.TopDown] = nvae.build((1, 28, 28), args)
        return pair
    parts = nets.nvae(
        (1, 28 + 2 * pad, 28 + 2 * pad), args.groups, args.channels, args.latent_channels,
        args.blocks, args.cells, args.expansion, args.block_cells, args.block_expansion,
    )  # fmt: skip
    if recipe["weight_norm"]:
        for part in nn.ModuleList([*parts[:3], *parts.heads]).modules():
            if isinstance(part, nn.Conv2d):
                parametrizations.weight_norm(part)
    out = nn.Sequential(parts.out, nn.ZeroPad2d(-pad))
    encoder = nn.Sequential(nn.ZeroPad2d(pad), parts.encoder)
    model = models.TopDown(
        parts.path, conditionals.Bernoulli(nets.flat_batch(out, event_dim=3), event_dim=3)
    )
    return model, guides.TopDown(model, encoder, parts.heads)


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    device = recipe.get("device", "cpu")
    args = argparse.Namespace(**recipe)
    dataset = data.load("mnist", flatten=False, num_valid=1, seed=0)
    values = dataset.train.values[: args.num_train]
    train = dataclasses.replace(dataset.train, values=values, y=None)
    x = dataset.test.x[: args.num_test].to(device)
    pyro.set_rng_seed(args.seed)
    model, guide = build(recipe)
    size = sum(p.numel() for p in nn.ModuleList([model, guide]).parameters())
    history = nvae.train(
        model, guide, train, args, device=device,
        checkpoint=ppvae.Checkpoints(folder, every_steps=250, keep=1), resume=True,
        progress=False,
    )  # fmt: skip
    bound, total = elbo.ELBO(kl="analytic"), 0.0
    kl = nvae.by_group(model, guide, x)
    with torch.no_grad(), nvae.evaluation_mode(model, guide), nvae.seeded(0, x):
        for rows in x.split(250):
            log_likelihood, rates = bound.terms(ppvae.log_weights(model, guide, rows))
            total += (log_likelihood - sum(rates.values())).sum().item()
    evidence = diagnostics.log_evidence(
        model, guide, x[: args.num_evidence], num_particles=args.num_samples, seed=0
    )
    return {
        "parameters": size,
        "elbo": total / len(x),
        "kl": kl,
        "log_evidence": evidence.mean,
        "se": evidence.mean_se,
        "train_objective": [row["train_objective"] for row in history.rows],
        "seconds": [row["seconds"] for row in history.rows],
    }


def report(found: dict[str, Any]) -> str:
    lines = [
        "| cell | steps | -ELBO | -log p(x), IWELBO | s.e. over images "
        "| KL by group, the top first | CPU minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in found.items():
        recipe = cell["recipe"]
        steps = -(-recipe["num_train"] // recipe["batch_size"]) * recipe["epochs"]
        kl = ", ".join(f"{value:.1f}" for value in cell["kl"].values())
        lines.append(
            f"| {name} | {steps:,} | {-cell['elbo']:.2f} | {-cell['log_evidence']:.2f} | "
            f"{cell['se']:.2f} | {kl} | {cell['cpu_seconds'] / 60:.0f} |"
        )
    return "\n".join(lines)
