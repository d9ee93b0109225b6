"""Adversarial variational Bayes beside a VAE on dynamic MNIST, 8 latents: Mescheder et al., 2017.

Three pairs with the same decoder, 8-300-300-784, softplus, and encoders of two hidden layers of
300: a VAE with a diagonal normal; AVB, its draws compared with N(0, I); and AVB with adaptive
contrast. The sampler is the authors' in small: z = z0(x) + sum_i a_i(x) v_i(noise_i), 16 terms,
v_i a network of 4 numbers of noise. T is 792-256-256-1, softplus, of x and z together. Batches of
128, Adam with beta1 = 0.5, T at a larger rate; images binarised afresh in each epoch.

Only annealed importance sampling compares them: AVB's own value is no bound. Chains start at a
normal with the moments of the guide's draws, as the authors' do.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, posteriors
from ppvae.local import Indexed

BASE = {
    "guide": "normal",
    "latent_dim": 8,
    "hidden": 300,
    "critic": [256, 256],
    "num_steps": 20_000,
    "batch_size": 128,
    "lr": 5e-4,
    "critic_lr": 1e-3,
    "critic_steps": 1,
    "num_train": 59_904,  # 468 whole batches
    "num_test": 200,
    "num_chains": 8,
    "num_temperatures": 300,
    "seed": 0,
    "compile": "auto",
}
CELLS = {
    "vae": BASE,
    "avb-ac": BASE | {"guide": "adaptive"},
    "avb": BASE | {"guide": "prior"},
}
QUICK = {
    "hidden": 16,
    "critic": [16],
    "num_steps": 8,
    "num_train": 512,
    "num_test": 10,
    "num_chains": 2,
    "num_temperatures": 5,
    "compile": False,
}
# Table 2 of the paper, 8 latents, nats: by annealed importance sampling, and the bound.
PAPER = {"vae": (-90.9, -98.1), "avb-ac": (-89.6, -96.3), "avb": (-91.2, -83.6)}
NAMES = {"vae": "VAE", "avb-ac": "AVB, adaptive contrast", "avb": "AVB"}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    """The paper's number of steps and learning rates, on its images; these networks still."""
    return recipe | {
        "num_steps": 2_500_000,
        "lr": 5e-5,
        "critic_lr": 1e-4,
        "num_test": 2_560,
        "num_temperatures": 2_000,
        "compile": True,
    }


class Sampler(nn.Module):
    """z0(x) + sum_i a_i(x) v_i(noise_i), with what depends on x alone computed once."""

    def __init__(self, width: int, hidden: int, dim: int, terms: int = 16, noise: int = 4) -> None:
        super().__init__()
        self.dim, self.terms, self.noise = dim, terms, noise
        self.of_x = nets.mlp(width, hidden, hidden, (1 + terms) * dim, activation=nn.Softplus)
        self.first = nn.Parameter(torch.randn(terms, noise, 32) / math.sqrt(noise))
        self.bias = nn.Parameter(torch.zeros(terms, 32))
        self.second = nn.Parameter(torch.randn(terms, 32, dim) / math.sqrt(32))

        self.register_buffer("points", torch.randn(100, terms * noise))

    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        loc, weights = self.loc_and_weights(x)
        drawn: Tensor = loc + (weights * self.parts(noise)).sum(-2)
        return drawn

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of the draws: the parts are independent, and theirs are taken at 100 points of noise."""
        loc, weights = self.loc_and_weights(x)
        parts = self.parts(self.points)
        variance = (weights.square() * parts.var(0)).sum(-2)
        return loc + (weights * parts.mean(0)).sum(-2), variance.sqrt()

    def loc_and_weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        loc, weights = self.of_x(x).split([self.dim, self.terms * self.dim], -1)
        weights = weights.unflatten(-1, (self.terms, self.dim))
        return loc, weights + 1 / math.sqrt(self.terms)

    def parts(self, noise: Tensor) -> Tensor:
        """All v_i, ``(..., terms, dim)``."""
        noise = noise.unflatten(-1, (self.terms, self.noise))
        hidden = torch.einsum("...te,teh->...th", noise, self.first) + self.bias
        return torch.einsum("...th,thd->...td", nn.functional.elu(hidden), self.second)


def pair(recipe: dict[str, Any], width: int) -> tuple[ppvae.Program, ppvae.Program]:
    hidden, dim = recipe["hidden"], recipe["latent_dim"]
    decoder = nets.mlp(dim, hidden, hidden, width, activation=nn.Softplus)
    model = models.VAE(conditionals.Bernoulli(decoder), latent_dim=dim)
    if recipe["guide"] == "normal":
        encoder = nets.mlp(width, hidden, hidden, 2 * dim, activation=nn.Softplus)
        return model, guides.Normal(encoder)
    sampler = Sampler(width, hidden, dim)
    critic = nets.mlp(width + dim, *recipe["critic"], 1, activation=nn.Softplus)
    noise_dim = sampler.terms * sampler.noise
    q = posteriors.Implicit(sampler, critic, dim, noise_dim, contrast=recipe["guide"])
    return model, guides.Amortized(q)


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    dataset = data.load("mnist", num_valid=96, seed=recipe["seed"])  # held out and never used
    train = dataclasses.replace(
        dataset.train, values=dataset.train.values[: recipe["num_train"]], y=None
    )
    device = recipe.get("device", "cpu")
    x = dataset.test.x[: recipe["num_test"]].to(device)
    pyro.set_rng_seed(recipe["seed"])
    model, guide = pair(recipe, x.shape[1])
    adam = functools.partial(torch.optim.Adam, betas=(0.5, 0.999))
    svi = ppvae.SVI(
        model,
        guide,
        functools.partial(adam, lr=recipe["lr"]),
        beside=ppvae.Beside(
            functools.partial(adam, lr=recipe["critic_lr"]), steps=recipe["critic_steps"]
        ),
        compile=recipe["compile"],
    )
    history = ppvae.fit(
        svi,
        train,
        epochs=-(-recipe["num_steps"] * recipe["batch_size"] // len(train)),
        batch_size=recipe["batch_size"],
        seed=recipe["seed"],
        device=device,
        checkpoint=ppvae.Checkpoints(folder, keep=1),
        resume=True,
        progress=False,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    near = guides.moment_match(model, guide, x)
    args = Indexed(model), near, x, torch.arange(len(x), device=device)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        own = torch.cat([elbo.ELBO(100).estimate(model, guide, part) for part in x.split(100)])
    normal = diagnostics.log_evidence(*args, num_particles=1_000, seed=0)
    annealed = diagnostics.ais(
        *args,
        num_chains=recipe["num_chains"],
        num_temperatures=recipe["num_temperatures"],
        seed=0,
    )
    values = annealed.log_evidence
    return {
        "ais": annealed.mean,
        "ais_se": values.std().item() / math.sqrt(len(values)),
        "ais_mc_se": annealed.mean_mc_se,
        "own": own.mean().item(),
        "elbo_of_moments": normal.elbo.mean().item(),
        "values": [round(value, 4) for value in values.tolist()],
        "ratio_loss": history.rows[-1].get("ratio_loss"),
        "epochs": len(history.rows),
    }


def report(found: dict[str, Any]) -> str:
    first = next(iter(found.values()))["recipe"]
    lines = [
        f"{first['num_steps']:,} steps, the first {first['num_test']:,} test images, "
        f"{first['num_chains']} chains and {first['num_temperatures']:,} temperatures; nats per "
        "image, ± standard error over images.",
        "",
        "| | log p(x), AIS | less the VAE's | its own value | ELBO of the normal with its moments "
        "| paper: AIS | own value |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in found.items():
        less = "0"
        if name != "vae" and "vae" in found:
            pairs = zip(cell["values"], found["vae"]["values"], strict=True)
            by_image = torch.tensor([one - other for one, other in pairs], dtype=torch.float64)
            se = by_image.std().item() / math.sqrt(len(by_image))
            less = f"{by_image.mean().item():+.2f} ± {se:.2f}"
        lines.append(
            f"| {NAMES[name]} | {cell['ais']:.2f} ± {cell['ais_se']:.2f} | {less} | "
            f"{cell['own']:.2f} | {cell['elbo_of_moments']:.2f} | "
            f"{PAPER[name][0]:.1f} | {PAPER[name][1]:.1f} |"
        )
    return "\n".join(lines)
