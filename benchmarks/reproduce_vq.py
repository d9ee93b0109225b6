"""Code lengths of MNIST by VQ-VAEs, beside a VAE of equal decoder: van den Oord et al., 2017.

28 x 28 binary pixels (drawn anew in each epoch), 7 x 7 codes of 64, by the networks and the
training of examples/vq.py: convolutions of 24 and 48 channels (in the encoder a residual block
after each), codes of 16 numbers, Adam at 2e-3, falling to a twentieth along a cosine, batches of
64. First encoder, decoder and codes under a uniform prior, then a prior with all else frozen.
`two-levels-SEED` has a second map of 4 x 4 codes above, as VQ-VAE-2 (Razavi et al., 2019).

The encoder ends in a vector for each place (nets.PositionEmbedding), so that places which look
alike have codes of their own; `alike-SEED` is without, in more epochs. Without the residual blocks
a place of the map sees 7 pixels of the image's 28, and all places that are black look alike: after
7 epochs seed 1 had a perplexity of 22.

With --full (--cells mnist-1 --device cuda) it is another recipe, not run so far: CIFAR-10 by the
networks of DeepMind's Sonnet (its example vqvae_example.ipynb), 10,000 steps, K = 512, whose
notebook reports a reconstruction error of 0.056 of the data's variance and a perplexity of 326 in
batches of 32 images. It reads cifar10.npz in the folder PPVAE_DATA: an array x of bytes, (60000,
32, 32, 3), the 10,000 test images last. Other than there, a code that is hardly used is put where
an output of the encoder is.
"""

from __future__ import annotations

import argparse
import functools
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from example_scripts import example
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, elbo, guides, metrics, models, nets
from ppvae.nets.dense import Residual
from ppvae.pairs import evaluation_mode

vq = example("vq")

BASE = {
    "data": "mnist",
    "levels": 1,
    "codes": 64,
    "dim": 16,
    "width": 24,
    "blocks": 1,
    "places": 0.5,
    "commitment": 0.25,
    "prior": "gru",
    "prior_width": 128,
    "batch_size": 64,
    "lr": 2e-3,
    "epochs": 2,
    "prior_epochs": 3,
    "vae_epochs": 0,
    "num_test": 10_000,
}
CELLS: dict[str, dict[str, Any]] = {f"mnist-{seed}": BASE | {"seed": seed} for seed in range(1, 4)}
CELLS["mnist-1"]["vae_epochs"] = 4
CELLS |= {"conv-1": BASE | {"seed": 1, "prior": "conv", "prior_width": 48}}
CELLS |= {"alike-1": BASE | {"seed": 1, "places": 0.0, "epochs": 4, "prior_epochs": 4}}
CELLS |= {"two-levels-1": BASE | {"seed": 1, "levels": 2}}
QUICK = {
    "codes": 8, "width": 4, "prior_width": 8, "epochs": 1, "prior_epochs": 1, "num_test": 200,
    "smoke": True, "steps": 3,
}  # fmt: skip
CIFAR = {
    "data": "cifar10.npz", "steps": 10_000, "batch_size": 32, "lr": 3e-4, "codes": 512, "dim": 64,
    "width": 128, "beta": 0.25, "num_train": 40_000,
}  # fmt: skip
NOTEBOOK = {"nmse": 0.056, "perplexity": 326.0}


def full(recipe: dict[str, Any]) -> dict[str, Any]:
    return CIFAR | {"seed": recipe["seed"]}


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    if recipe["data"] == CIFAR["data"]:
        return run_cifar(recipe, folder)
    kept = {"smoke": False, "device": "cpu", "label": None, "shape": None, "binarize": "default",
            "halvings": None, "compile": False, "out": folder}  # fmt: skip
    args = argparse.Namespace(**kept | recipe)
    torch.set_num_threads(1)
    dataset = vq.load(args)
    x = dataset.test.args[0][: args.num_test]

    def stage(name: str) -> dict[str, Any]:
        return {"checkpoint": ppvae.Checkpoints(folder / name, keep=1), "resume": True}

    spent: dict[str, float] = {}

    def timed(name: str, train: Any, *what: Any) -> None:
        started = time.process_time()
        train(*what, **stage(name))
        spent[name] = time.process_time() - started

    model, guide = vq.quantised(dataset, args)
    commitment = elbo.VQELBO(commitment=args.commitment)
    timed("codes", vq.train, model, guide, dataset, args.epochs, args, commitment)
    lengths, fitted = {"uniform": vq.code_length(model, guide, x)}, {"uniform": model}
    for kind in vq.PRIORS[1:]:
        fitted[kind] = vq.with_prior(model, guide, kind, args)
        if kind == "unigram":
            vq.count(fitted[kind], guide, dataset.train.args[0])
        else:
            timed(kind, vq.train_prior, fitted[kind], guide, dataset, args)
        lengths[kind] = vq.code_length(fitted[kind], guide, x)
    numbers = vq.all_numbers(guide, dataset.valid.args[0])
    found = {
        "lengths": lengths,
        "perplexity": {n: metrics.code_perplexity(c, args.codes) for n, c in numbers.items()},
    }
    print(found, flush=True)
    vq.draw(dataset, fitted, guide, x[:10], numbers, folder, args)
    if args.vae_epochs:
        vae = vq.plain(dataset, args)
        timed("vae", vq.train, *vae, dataset, args.vae_epochs, args, elbo.ELBO())
        with evaluation_mode(*vae):
            pyro.set_rng_seed(args.seed)
            parts = [ppvae.log_weights(*vae, rows) for rows in x.split(500)]
        total = -sum(float(part.log_w.detach().sum()) for part in parts) / len(x)
        pixels = -sum(float(part.log_p["x"].detach().sum()) for part in parts) / len(x)
        lengths["VAE"] = {"data": pixels, "codes": total - pixels}
    return found | {"cpu_seconds_by_stage": spent}


# ------------------------------------------------------------------------------ CIFAR-10


def run_cifar(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    images = cifar()
    train, test = images[: recipe["num_train"]], images[-10_000:]
    pyro.set_rng_seed(recipe["seed"])
    variance = float(train.var())
    model, guide = cifar_pair(recipe, variance)
    # the notebook's weight belongs to means over the numbers of a map, and of an image
    map_size = 8 * 8 * recipe["dim"]
    commitment = recipe["beta"] * train[0].numel() / (2 * map_size)
    adam = functools.partial(torch.optim.Adam, lr=recipe["lr"])
    compile = "auto" if "device" in recipe else False  # on the CPU the build takes a minute
    svi = ppvae.SVI(model, guide, adam, elbo.VQELBO(commitment=commitment), compile=compile)
    steps_per_epoch = -(-len(train) // recipe["batch_size"])
    ppvae.fit(
        svi,
        train,
        epochs=-(-recipe["steps"] // steps_per_epoch),
        batch_size=recipe["batch_size"],
        device=recipe.get("device", "cpu"),
        seed=recipe["seed"],
        checkpoint=ppvae.Checkpoints(folder / "codes", keep=1),
        resume=True,
    )
    device = next(model.parameters()).device
    errors, numbers = [], []
    with evaluation_mode(model, guide), torch.no_grad():
        for rows in test.to(device).split(recipe["batch_size"]):
            mean = model.likelihood(guide(rows)).mean
            errors.append((mean - rows).square().mean(dim=(1, 2, 3)).cpu())
            numbers.append(guide.indices(rows).cpu())
    by_batch = [metrics.code_perplexity(batch, recipe["codes"]) for batch in numbers]
    return {
        "nmse": float(torch.cat(errors).mean()) / variance,
        "perplexity": metrics.code_perplexity(torch.cat(numbers), recipe["codes"]),
        "perplexity_in_batches": sum(by_batch) / len(by_batch),
        "steps": svi.num_steps,
    }


def cifar() -> Tensor:
    """All images, in [-0.5, 0.5], ``(60000, 3, 32, 32)``."""
    path = Path(os.environ.get("PPVAE_DATA", ".")) / CIFAR["data"]
    if not path.exists():
        raise FileNotFoundError(
            f"{path}: write CIFAR-10 there, numpy.savez(path, x=images) with bytes of shape "
            "(60000, 32, 32, 3), the test images last, and name the folder in PPVAE_DATA"
        )
    images = torch.from_numpy(np.load(path)["x"])
    return images.movedim(-1, 1).float() / 255 - 0.5


def cifar_pair(recipe: dict[str, Any], variance: float) -> tuple[models.VAE, guides.Quantized]:
    """The notebook's networks."""
    width, dim = recipe["width"], recipe["dim"]

    def blocks() -> list[nn.Module]:
        narrow = width // 4
        return [
            Residual(nn.ReLU(), nn.Conv2d(width, narrow, 3, padding=1),
                     nn.ReLU(), nn.Conv2d(narrow, width, 1))
            for _ in range(2)
        ]  # fmt: skip

    encoder = nn.Sequential(
        nn.Conv2d(3, width // 2, 4, 2, 1), nn.ReLU(), nn.Conv2d(width // 2, width, 4, 2, 1),
        nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), *blocks(), nn.ReLU(),
        nn.Conv2d(width, dim, 1),
    )  # fmt: skip
    decoder = nn.Sequential(
        nn.Conv2d(dim, width, 3, padding=1), *blocks(), nn.ReLU(),
        nn.ConvTranspose2d(width, width // 2, 4, 2, 1), nn.ReLU(),
        nn.ConvTranspose2d(width // 2, 3, 4, 2, 1),
    )  # fmt: skip
    book = nets.Codebook(recipe["codes"], dim)
    likelihood = conditionals.Normal(
        nets.flat_batch(decoder, event_dim=3), scale=variance**0.5, event_dim=3
    )
    model = models.VAE(likelihood, prior=conditionals.CodePrior(book, (8, 8)))
    return model, guides.Quantized(nets.flat_batch(encoder, event_dim=3), book)


# ------------------------------------------------------------------------------ the table


def report(found: dict[str, Any]) -> str:
    if any("nmse" in cell for cell in found.values()):
        rows = [f"| notebook | {NOTEBOOK['nmse']} | | {NOTEBOOK['perplexity']:.0f} |"]
        rows += [
            f"| {name} | {cell['nmse']:.4f} | {cell['perplexity']:.0f} | "
            f"{cell['perplexity_in_batches']:.0f} |"
            for name, cell in found.items()
        ]
        head = "| CIFAR-10 | error / variance | perplexity, test images | in batches |"
        return "\n".join([head, "|---|---|---|---|", *rows])
    lines = [
        "Test -ELBO, nats per image, and of these the pixels given the latents.",
        "",
        "| cell | pixels | uniform | unigram | network | VAE, equal decoder (pixels) | "
        "perplexity, validation | CPU minutes: codes + network |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in found.items():
        lengths = {kind: sum(parts.values()) for kind, parts in cell["lengths"].items()}
        vae, spent = cell["lengths"].get("VAE"), cell["cpu_seconds_by_stage"]
        shown = "" if vae is None else f"{lengths['VAE']:.1f} ({vae['data']:.1f})"
        used = ", ".join(f"{p:.1f}" for p in cell["perplexity"].values())
        lines.append(
            f"| {name} | {cell['lengths']['uniform']['data']:.1f} | {lengths['uniform']:.1f} | "
            f"{lengths['unigram']:.1f} | {lengths['network']:.1f} | {shown} | {used} | "
            f"{spent['codes'] / 60:.1f} + {spent['network'] / 60:.1f} |"
        )
    return "\n".join(lines)
