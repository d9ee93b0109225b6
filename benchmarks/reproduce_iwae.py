"""Importance weighted autoencoders on dynamic MNIST: Burda, Grosse & Salakhutdinov, 2016.

One stochastic layer: 784-200-200-z50-200-200-784. Two: z1 of 100 between 784-200-200, z2 of 50
between 100-100-100. tanh, sigma = exp, Glorot uniform weights, output bias the logit of the mean
image. Adam (0.9, 0.999, eps 1e-4), batch 20, losses summed over the batch; stage i = 0, 1, ... has
3^i epochs at 1e-3 * 10^(-i/7). The paper has 8 stages, 3,280 epochs; here `num_stages` of them.
Training images binarised afresh in each epoch, test images once; IWELBO-5000 of all 10,000.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets

BASE = {
    "num_stages": 5,
    "seed": 0,
    "batch_size": 20,
    "num_train": 59_600,
    "num_test": 10_000,
    "num_particles": 5_000,
}
CELLS = {
    f"{layers}L-{k}": BASE | {"layers": layers, "K": k} for layers in (1, 2) for k in (1, 5, 50)
}
QUICK = {"num_stages": 1, "num_train": 200, "num_test": 20, "num_particles": 50}
# -log p(x) of the full schedule, dynamic MNIST: the paper's table 1 (IWAE).
PAPER = {"1L-1": 86.76, "1L-5": 85.54, "1L-50": 84.78, "2L-1": 85.33, "2L-5": 83.89, "2L-50": 82.90}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    return recipe | {"num_stages": 8}


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    dataset = data.load("mnist", num_valid=400, seed=recipe["seed"])  # held out and never used
    grey = dataset.train.values[: recipe["num_train"]]
    train = dataclasses.replace(dataset.train, values=grey, y=None)
    pyro.set_rng_seed(recipe["seed"])
    model, guide = pair(recipe["layers"])
    start(model, guide, grey.mean(0))

    ends = [sum(3**j for j in range(i + 1)) for i in range(recipe["num_stages"])]
    adam = functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-4)
    bound = elbo.IWELBO(num_particles=recipe["K"]) if recipe["K"] > 1 else elbo.ELBO(kl="sampled")
    history = ppvae.fit(
        ppvae.SVI(model, guide, adam, bound, compile="auto"),
        train,
        epochs=ends[-1],
        batch_size=recipe["batch_size"],
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda epoch: 10 ** (-sum(epoch >= end for end in ends) / 7)
        ),
        seed=recipe["seed"],
        device=recipe.get("device", "cpu"),
        checkpoint=folder,
        resume=True,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    x = dataset.test.x[: recipe["num_test"]].to(recipe.get("device", "cpu"))
    evidence = diagnostics.log_evidence(
        model,
        guide,
        x,
        num_particles=recipe["num_particles"],
        seed=0,
        compile="auto",
    )
    report = ppvae.diagnose(model, guide, x[:500], num_particles=1_000, seed=0)
    return {
        "log_evidence": evidence.mean,
        "se": evidence.mean_se,
        "mc_se": evidence.mean_mc_se,
        "elbo": evidence.elbo.mean().item(),
        "values": [round(value, 4) for value in evidence.log_evidence.tolist()],
        # Var_x(E_q[z | x]) > 0.01; the paper's code looks at 500 images.
        "active": {name: int(units.sum()) for name, units in report.active.items()},
        "train_objective": history.rows[-1]["train_objective"],
    }


def pair(layers: int) -> tuple[ppvae.Program, ppvae.Program]:
    mlp = functools.partial(nets.mlp, activation=nn.Tanh)
    if layers == 1:
        decoder, encoder = mlp(50, 200, 200, 784), mlp(784, 200, 200, 2 * 50)
        return models.VAE(conditionals.Bernoulli(decoder), 50), guides.Normal(encoder)
    model = models.Hierarchical(
        conditionals.Bernoulli(mlp(100, 200, 200, 784)),
        levels=[conditionals.Normal(mlp(50, 100, 100, 2 * 100))],
        latent_dim=50,
    )
    upward = [mlp(784, 200, 200, 2 * 100), mlp(100, 100, 100, 2 * 50)]
    return model, guides.BottomUp(model, [conditionals.Normal(net) for net in upward])


def start(model: Any, guide: Any, mean_image: torch.Tensor) -> None:
    """The paper's initial weights."""
    for module in [*model.modules(), *guide.modules()]:
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        if isinstance(module, conditionals.Normal):
            # A layer for the means and one for the scales, as one: each has its own width.
            for head in linears(module)[-1].weight.data.chunk(2):
                nn.init.xavier_uniform_(head)
    last = linears(model.likelihood)[-1]
    last.bias.data.copy_(torch.logit(mean_image.flatten().clamp(0.001, 0.999)))


def linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def report(found: dict[str, Any]) -> str:
    lines = [
        "| model | K | -log p(x) | s.e. over images | active units | paper, 8 stages | CPU hours |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in found.items():
        layers, k = name.split("-")
        active = " + ".join(str(cell["active"][latent]) for latent in sorted(cell["active"]))
        lines.append(
            f"| {layers} | {k} | {-cell['log_evidence']:.2f} | {cell['se']:.2f} | {active} | "
            f"{PAPER[name]:.2f} | {cell['cpu_seconds'] / 3600:.1f} |"
        )
    lines += ["", "| difference, paired by image | nats ± s.e. |", "|---|---|"]
    for less, more in [(1, 5), (5, 50)]:
        for layers in (1, 2):
            names = f"{layers}L-{more}", f"{layers}L-{less}"
            if set(names) <= set(found):
                a, b = (torch.tensor(found[name]["values"]).double() for name in names)
                value, error = (a - b).mean().item(), (a - b).std().item() / len(a) ** 0.5
                lines.append(f"| {names[0]} - {names[1]} | {value:+.3f} ± {error:.3f} |")
    return "\n".join(lines)
