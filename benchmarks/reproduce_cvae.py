"""Missing quadrants of MNIST, p(x | y): Sohn, Lee & Yan, 2015, and Pyro's CVAE tutorial.

The networks are the tutorial's. A baseline without a latent, visible - 500 - 500 - missing; prior
and recognition network 784 - 500 - 500 - 2 x 200, of which the first sees the baseline's guess in
the place of the missing pixels; decoder 200 - 500 - 500 - missing, of z alone. ReLU, sigma = exp,
Adam at 1e-3, batch 128, ELBO of one draw, at most 101 epochs, stopped after 3 without a better
bound. The tutorial stops by the test set; here by 5,000 training images that are held out.

Cells q1, q2, q3, by the number of visible quadrants, have the tutorial's grey levels as targets of
the cross-entropy: their numbers hold the entropy of the targets. q1-binary etc. draw 0 or 1 for
each pixel, training images anew in each epoch: their numbers are log-probabilities.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyro
import torch
from example_scripts import example
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, diagnostics, guides, models, nets

cvae = example("cvae")  # the baseline network, and what the prior sees of it

BASE = {
    "binarize": None,
    "num_epochs": 101,
    "patience": 3,
    "seed": 0,
    "hidden": [500, 500],
    "latent_dim": 200,
    "batch_size": 128,
    "lr": 1e-3,
    "num_train": 55_000,
    "num_valid": 5_000,
    "num_test": 10_000,
    "num_particles": 100,
    "num_test_prior": 1_000,
    "num_particles_prior": 10_000,
}
CELLS = {
    f"q{visible}{suffix}": BASE | {"visible": visible} | options
    for suffix, options in (("", {}), ("-binary", {"binarize": "dynamic"}))
    for visible in (1, 2, 3)
}
QUICK = {
    "num_epochs": 1,
    "hidden": [16],
    "num_train": 512,
    "num_test": 50,
    "num_test_prior": 20,
    "num_particles_prior": 100,
}
# Negative conditional log-likelihood, nats. The tutorial's is a negative ELBO of grey levels.
TUTORIAL = {1: (100.4, 71.8), 2: (61.9, 51.0), 3: (25.4, 24.2)}  # baseline, CVAE
# Test set: network, CVAE by draws from the prior, CVAE by importance sampling.
PAPER = {1: (99.75, 68.39, 63.91), 2: (62.18, 45.34, 44.73), 3: (25.99, 20.96, 20.95)}


class OfLatent(nn.Module):
    """A decoder that does not look at y: all that it knows of y is in z."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, z: Tensor, features: Tensor) -> Tensor:
        out: Tensor = self.net(z)
        return out


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    whole = data.load(
        "mnist",
        binarize=recipe["binarize"],
        num_valid=recipe["num_valid"],
        seed=recipe["seed"],
    )
    cut = replace(whole.train, values=whole.train.values[: recipe["num_train"]], y=None)
    dataset = data.quadrants(replace(whole, train=cut), missing=4 - recipe["visible"])
    x, y = dataset.test.args
    hidden, z_dim, x_dim, y_dim = recipe["hidden"], recipe["latent_dim"], x.shape[1], y.shape[1]
    bernoulli = functools.partial(conditionals.Bernoulli, grey=recipe["binarize"] is None)
    fit = functools.partial(train, recipe, dataset, folder)

    pyro.set_rng_seed(recipe["seed"])
    baseline = cvae.Baseline(bernoulli(nets.mlp(y_dim, *hidden, x_dim)))
    epochs = {"baseline": fit("baseline", baseline, cvae.no_latents)}
    model = models.CVAE(
        bernoulli(OfLatent(nets.mlp(z_dim, *hidden, x_dim))),
        prior=conditionals.Normal(nets.mlp(y_dim + x_dim, *hidden, 2 * z_dim)),
        condition=cvae.VisibleAndGuess(baseline),  # which freezes it
    )
    guide = guides.Normal(nets.mlp(x_dim + y_dim, *hidden, 2 * z_dim))
    epochs["cvae"] = fit("cvae", model, guide)

    x, y = x[: recipe["num_test"]], y[: recipe["num_test"]]
    few = x[: recipe["num_test_prior"]], y[: recipe["num_test_prior"]]
    with torch.no_grad():
        guess = baseline.likelihood(y).log_prob(x).double()
    evaluate = functools.partial(diagnostics.log_evidence, model, seed=0, compile="auto")
    by_guide = evaluate(guide, x, y, num_particles=recipe["num_particles"])
    by_prior = evaluate(guides.Prior(model), *few, num_particles=recipe["num_particles_prior"])
    same = slice(len(few[0]))
    return {
        "epochs": epochs,
        "baseline": estimate(-guess),
        "negative_elbo": estimate(-by_guide.elbo),
        "importance_sampling": estimate(-by_guide.log_evidence),
        "gap_elbo": estimate(by_guide.elbo - guess),
        "gap_importance_sampling": estimate(by_guide.log_evidence - guess),
        # on the first images only, so the others are given for these too
        "few": {
            "baseline": estimate(-guess[same]),
            "prior_monte_carlo": estimate(-by_prior.log_evidence),
            "prior_monte_carlo_mc_se": by_prior.mean_mc_se,
            "importance_sampling": estimate(-by_guide.log_evidence[same]),
            "negative_elbo": estimate(-by_guide.elbo[same]),
        },
    }


def train(
    recipe: dict[str, Any], dataset: data.Dataset, folder: Path, name: str, model: Any, guide: Any
) -> dict[str, Any]:
    """Adam until the held-out bound gets no better; how many epochs that took."""
    adam = functools.partial(torch.optim.Adam, lr=recipe["lr"])
    history = ppvae.fit(
        ppvae.SVI(model, guide, adam, compile="auto"),
        dataset,
        epochs=recipe["num_epochs"],
        batch_size=recipe["batch_size"],
        patience=recipe["patience"],
        seed=recipe["seed"],
        checkpoint=folder / name,
        resume=True,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    return {"run": len(history.rows), "best": history.best_epoch}


def estimate(values: Tensor) -> list[float]:
    """Mean and its standard error over images."""
    return [values.mean().item(), cvae.standard_error(values)]


def report(found: dict[str, Any]) -> str:
    """Negative conditional log-likelihoods: the tutorial's definition, then the paper's."""
    lines = [
        "| visible, grey levels | baseline | tutorial | -ELBO of the CVAE | tutorial | off by "
        "| gap | tutorial | importance sampling |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    grey: dict[int, Any] = {}
    binary: dict[int, Any] = {}
    for cell in found.values():
        (grey if cell["recipe"]["binarize"] is None else binary)[cell["recipe"]["visible"]] = cell
    for visible, cell in sorted(grey.items()):
        network, bound = TUTORIAL[visible]
        off = cell["negative_elbo"][0] / bound - 1
        lines.append(
            f"| {visible} | {shown(cell['baseline'])} | {network} | "
            f"{shown(cell['negative_elbo'])} | {bound} | {off:+.1%} | "
            f"{shown(cell['gap_elbo'])} | {network - bound:.1f} | "
            f"{shown(cell['importance_sampling'])} |"
        )
    lines += [
        "",
        "| visible | pixels | baseline | -ELBO | prior Monte Carlo | importance sampling "
        "| paper: network | prior | importance |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for pixels, cells in (("grey levels", grey), ("binary", binary)):
        for visible, cell in sorted(cells.items()):
            few = cell["few"]
            ours = ("baseline", "negative_elbo", "prior_monte_carlo", "importance_sampling")
            row = [str(visible), pixels, *(shown(few[name]) for name in ours)]
            lines.append(" | ".join(["", *row, *map(str, PAPER[visible]), ""]).strip())
    first = next(iter(found.values()))["recipe"]
    return "\n".join([
        *lines,
        "",
        f"First table: {first['num_test']:,} test images. Second: the first "
        f"{first['num_test_prior']:,}; {first['num_particles_prior']:,} draws of the prior, "
        f"{first['num_particles']:,} of the guide. Nats per image, ± standard error over images.",
    ])  # fmt: skip


def shown(value: list[float]) -> str:
    mean, error = value
    return f"{mean:.2f} ± {error:.2f}"
