"""The implicit optimal prior beside VAE, mixture and VampPrior: Takahashi et al., 2019.

OneHot: four points of four bits, 250 times each; log p(x) is at most -log 4 = -1.386. Latent of 2,
networks of two layers of 64 tanh; Adam at 1e-3, batches of 100, 2,500 steps, of which the KL's
weight rises in the first 1,000; five steps of the ratio after each. The aggregate posterior is a
mixture of four normals, so the bound under it is known, too.

MNIST, binarised afresh in each epoch, test images once: 784-200-200-z10 and back, tanh, Adam at
1e-3, batches of 100, 30 epochs, the KL's weight rising in the first 10. The ratio: three layers of
256 tanh, dropout 0.5 before the last, Adam at 1e-3, `steps` steps after each of the pair. The paper
has layers of 500 and 40 latents, 1e-4 and up to 1,000 epochs (`full`); it reports the bound of 10
importance samples, with T as it is, without its normaliser.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from pathlib import Path
from typing import Any

import pyro
import torch
from example_scripts import example
from torch import Tensor

import ppvae
from ppvae import data, diagnostics, elbo

optimal = example("optimal_prior")  # its pairs

ONEHOT = {
    "data": "onehot",
    "latent_dim": 2,
    "hidden": [64, 64],
    "ratio": [64, 64],
    "dropout": 0.0,
    "steps": 5,
    "lr": 1e-3,
    "ratio_lr": 1e-3,
    "batch_size": 100,
    "num_epochs": 250,
    "warm_up": 100,
    "num_train": 1_000,
    "num_test": 4,
    "num_particles": 10_000,
    "num_draws": 100_000,
    "compile": "auto",
}
MNIST = ONEHOT | {
    "data": "mnist",
    "latent_dim": 10,
    "hidden": [200, 200],
    "ratio": [256, 256, 256],
    "dropout": 0.5,
    "num_epochs": 30,
    "warm_up": 10,
    "num_train": 50_000,
    "num_test": 10_000,
    "num_particles": 100,
    "num_draws": 100_000,
    "num_components": 500,
}
PRIORS = ("vae", "iop", "vamp", "mixture")
CELLS = {
    f"onehot-{prior}-{seed}": ONEHOT | {"prior": prior, "seed": seed}
    for prior in ("iop", "vae")
    for seed in range(3)
}
CELLS |= {
    f"{prior}-{seed}": MNIST | {"prior": prior, "seed": seed}
    for seed in range(3)
    for prior in PRIORS
}
# The VampPrior's pseudo-inputs at rows of the data instead of near 0.05, as in the paper.
CELLS |= {
    f"vamp-data-{seed}": MNIST | {"prior": "vamp", "seed": seed, "start_at_data": True}
    for seed in range(3)
}
QUICK = {
    "hidden": [16],
    "ratio": [16],
    "num_epochs": 1,
    "warm_up": 1,
    "num_train": 200,
    "num_test": 4,
    "num_particles": 50,
    "num_draws": 1_000,
    "num_components": 5,
    "compile": False,
}
# log p(x) of MNIST, table 2 of the paper: mean and standard deviation.
PAPER = {"vae": "-85.84 ± 0.07", "vamp": "-83.90 ± 0.08", "iop": "-83.21 ± 0.13"}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    """The paper's networks and schedule, but for its choice of the best epoch."""
    if recipe["data"] == "onehot":
        return recipe  # its schedule is not known to us
    return recipe | {
        "latent_dim": 40,
        "hidden": [500, 500, 500],
        "ratio": [500, 500, 500],
        "steps": 10,
        "lr": 1e-4,
        "num_epochs": 1_000,
        "warm_up": 100,
        "num_particles": 5_000,
    }


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    train, test = rows(recipe)
    device = recipe.get("device", "cpu")
    pyro.set_rng_seed(recipe["seed"])
    model, guide = optimal.pair(
        recipe["prior"],
        test.shape[1],
        recipe["latent_dim"],
        recipe["hidden"],
        recipe["ratio"],
        recipe["dropout"],
        recipe.get("num_components", 4),
        train.x if recipe.get("start_at_data") else None,
    )
    adam = functools.partial(torch.optim.Adam, lr=recipe["lr"])
    ratio_adam = functools.partial(torch.optim.Adam, lr=recipe["ratio_lr"])
    is_iop = recipe["prior"] == "iop"
    warm_up = recipe["warm_up"] * -(-len(train) // recipe["batch_size"])
    history = ppvae.fit(
        ppvae.SVI(
            model,
            guide,
            adam,
            elbo.ELBO(beta=elbo.LinearWarmup(warm_up), kl="mixed"),
            beside=ppvae.Beside(ratio_adam, steps=recipe["steps"]) if is_iop else None,
            compile=recipe["compile"],
        ),
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
    found: dict[str, Any] = {}
    if is_iop:
        x = (train if isinstance(train, Tensor) else train.x).to(device)
        log_z, error = model.prior.normalize(guide, x, num_draws=recipe["num_draws"])
        found |= {"log_z": log_z, "log_z_se": error}
        found |= {key: history.rows[-1][key] for key in ("ratio_loss", "ratio_accuracy")}
    evidence = diagnostics.log_evidence(
        model,
        guide,
        test.to(device),
        num_particles=recipe["num_particles"],
        seed=0,
        compile=recipe["compile"],
    )
    found |= {
        "log_evidence": evidence.mean,
        "se": evidence.mean_se,
        "mc_se": evidence.mean_mc_se,
        "elbo": evidence.elbo.mean().item(),
        "elbo_values": [round(value, 4) for value in evidence.elbo.tolist()],
        "values": [round(value, 4) for value in evidence.log_evidence.tolist()],
        "train_objective": history.rows[-1]["train_objective"],
    }
    if recipe["data"] == "onehot":
        draws = recipe["num_draws"] // 4
        found["exact"] = optimal.under_the_aggregate(model, guide, test, draws)
    return found


def rows(recipe: dict[str, Any]) -> tuple[Any, Tensor]:
    """What is trained on, and the test rows."""
    if recipe["data"] == "onehot":
        return torch.eye(4).repeat(recipe["num_train"] // 4, 1), torch.eye(4)
    dataset = data.load("mnist", num_valid=10_000, seed=recipe["seed"])  # held out and never used
    values = dataset.train.values[: recipe["num_train"]]
    train = dataclasses.replace(dataset.train, values=values, y=None)
    return train, dataset.test.x[: recipe["num_test"]]


def report(found: dict[str, Any]) -> str:
    lines = []
    onehot = {name: cell for name, cell in found.items() if name.startswith("onehot-")}
    if onehot:
        lines += [
            f"OneHot: the optimum of log p(x) is -log 4 = {-math.log(4):.3f}.",
            "",
            "| cell | ELBO, without log Z | log Z | ELBO | log p(x) | ELBO under the exact q(z) |",
            "|---|---|---|---|---|---|",
        ]
    for name, cell in onehot.items():
        without, log_z = "", ""
        if "log_z" in cell:
            without = f"{cell['elbo'] + cell['log_z']:.3f}"
            log_z = f"{cell['log_z']:.3f} ± {cell['log_z_se']:.3f}"
        lines.append(
            f"| {name.removeprefix('onehot-')} | {without} | {log_z} | {cell['elbo']:.3f} | "
            f"{cell['log_evidence']:.3f} | {cell['exact']:.3f} |"
        )
    mnist = {name: cell for name, cell in found.items() if name not in onehot}
    if not mnist:
        return "\n".join(lines)
    lines += [
        "",
        "MNIST, nats per test image, ± standard error over images.",
        "",
        "| cell | log p(x) | ELBO | log Z | ratio_loss | paper, log p(x) |",
        "|---|---|---|---|---|---|",
    ]
    for name, cell in mnist.items():
        log_z, loss = "", ""
        if "log_z" in cell:
            log_z = f"{cell['log_z']:.2f} ± {cell['log_z_se']:.2f}"
            loss = f"{cell['ratio_loss']:.2f}"
        lines.append(
            f"| {name} | {cell['log_evidence']:.2f} ± {cell['se']:.2f} | {cell['elbo']:.2f} | "
            f"{log_z} | {loss} | {PAPER.get(name.split('-')[0], '')} |"
        )
    lines += ["", "| difference to the VAE, paired by image | log p(x) | ELBO |", "|---|---|---|"]
    for prior in ("iop", "vamp", "vamp-data", "mixture"):
        for seed in range(3):
            name, vae = f"{prior}-{seed}", f"vae-{seed}"
            if name in mnist and vae in mnist:
                columns = [
                    difference(mnist[name], mnist[vae], key) for key in ("values", "elbo_values")
                ]
                lines.append(f"| {name} | {' | '.join(columns)} |")
    return "\n".join(lines)


def difference(cell: Any, other: Any, key: str) -> str:
    """Of the values of two cells, with its standard error; that of log Z is added."""
    apart = [a - b for a, b in zip(cell[key], other[key], strict=True)]
    error = statistics.stdev(apart) / len(apart) ** 0.5
    error = math.hypot(error, cell.get("log_z_se", 0.0))
    return f"{statistics.fmean(apart):+.2f} ± {error:.2f}"
