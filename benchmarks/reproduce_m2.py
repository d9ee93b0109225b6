"""Errors of classifiers with few labels, Kingma, Rezende, Mohamed & Welling, 2014: M2 and M1 + M2.

Labels of so many rows of each class, the choice by the seed; all other rows of the training part
without. x is binarised, anew in each epoch. The weight alpha of the classifier's term (equation 9)
is the one of ``alphas`` with the smallest error on the validation part, whose labels are used for
that and for the epoch at which the classifier is taken. The test part is looked at once.

- digits: scikit-learn's, 8 x 8.
- m2: MNIST's pixels.
- m1m2: features, the means of q(z | x) of a VAE that has seen no label (M1), standardised; then M2
  on these with a normal likelihood.

The baseline is the classifier's network trained on the labelled rows alone.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pyro
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, elbo, guides, metrics, models, nets
from ppvae.pairs import evaluation_mode

DIGITS = {
    "data": "digits", "kind": "m2", "alphas": [0.3, 1.0, 3.0], "latent_dim": 8, "width": 256,
    "epochs": 100, "batch_size": 100, "lr": 3e-3, "labelled_per_step": 100, "dropout": 0.0,
    "compile": False,
}  # fmt: skip
MNIST = {
    "data": "mnist", "kind": "m2", "alphas": [30.0, 100.0], "latent_dim": 50, "width": 500,
    "epochs": 40, "batch_size": 200, "lr": 1e-3, "labelled_per_step": 100, "dropout": 0.3,
    "compile": True, "per_class": 100,
}  # fmt: skip
STACK = MNIST | {
    "kind": "m1m2", "alphas": [0.1, 1.0], "latent_dim": 20, "width": 300, "m1_latent_dim": 50,
    "m1_width": 500, "m1_epochs": 15, "epochs": 30, "per_class": 10,
}  # fmt: skip
CELLS: dict[str, dict[str, Any]] = {
    f"digits-{10 * per_class}-{seed}": DIGITS | {"per_class": per_class, "seed": seed}
    for per_class in (3, 10)
    for seed in (1, 2, 3)
}
CELLS |= {f"mnist-m1m2-100-{seed}": STACK | {"seed": seed} for seed in (1, 2, 3)}
CELLS |= {f"mnist-m2-1000-{seed}": MNIST | {"seed": seed} for seed in (1, 2, 3)}
QUICK = {
    "data": "digits", "alphas": [1.0], "latent_dim": 2, "width": 8, "epochs": 1, "m1_width": 8,
    "m1_latent_dim": 4, "m1_epochs": 1, "compile": False, "per_class": 2, "smoke": True,
}  # fmt: skip


class SharedFirst(nn.Module):
    """An MLP of x and a one-hot class, whose first layer sees x once for all classes.

    It is ``nets.mlp`` on both, concatenated, with fewer products.
    """

    def __init__(self, x_dim: int, y_dim: int, width: int, out: int) -> None:
        super().__init__()
        self.of_x = nn.Linear(x_dim, width)
        self.of_y = nn.Linear(y_dim, width, bias=False)
        self.rest = nn.Sequential(nn.ReLU(), nn.Linear(width, out))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out: Tensor = self.rest(self.of_x(x) + self.of_y(y))
        return out


def pair(
    recipe: dict[str, Any], x_dim: int, num_classes: int, binary: bool
) -> tuple[models.M2, guides.M2]:
    """M2 with one hidden layer in each of its networks."""
    z_dim, width = recipe["latent_dim"], recipe["width"]
    decoder = nets.mlp(z_dim + num_classes, width, x_dim if binary else 2 * x_dim)
    likelihood = conditionals.Bernoulli(decoder) if binary else conditionals.Normal(decoder)
    model = models.M2(likelihood, z_dim, num_classes)
    encoder = SharedFirst(x_dim, num_classes, width, 2 * z_dim)
    return model, guides.M2(classifier(recipe, x_dim, num_classes), conditionals.Normal(encoder))


def classifier(recipe: dict[str, Any], x_dim: int, num_classes: int) -> nn.Module:
    return nets.mlp(x_dim, recipe["width"], num_classes, dropout=recipe["dropout"])


@torch.no_grad()
def error(net: nn.Module, x: Tensor, y: Tensor | None) -> float:
    with evaluation_mode(net):
        return metrics.error_rate(torch.cat([net(rows) for rows in x.split(1000)]), y)


class BestByValidation(ppvae.Callback):
    """Keeps the classifier of the epoch with the smallest error on the validation part."""

    def __init__(self, net: nn.Module, x: Tensor, y: Tensor | None, every: int = 1) -> None:
        self.net, self.x, self.y, self.every = net, x, y, every
        self.errors: list[float] = []
        self.best: dict[str, Tensor] = {}

    def on_epoch_end(self, svi: Any, history: Any) -> None:
        found = error(self.net, self.x, self.y)
        if not self.errors or found < min(self.errors):
            self.best = {k: v.detach().clone() for k, v in self.net.state_dict().items()}
        self.errors.append(found)

    def state_dict(self) -> dict[str, Any]:
        return {"errors": self.errors, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.errors, self.best = list(state["errors"]), dict(state["best"])


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    dataset = data.load(recipe["data"], seed=0)
    if recipe.get("smoke"):
        dataset = dataset.map_splits(
            lambda part: data.Split(part.values[:300], part.y[:300], part.binarize, part.seed)
        )
    if recipe["kind"] == "m1m2":
        dataset = features(recipe, dataset, folder)
    train = data.with_labels(dataset.train, recipe["per_class"], recipe["seed"])
    baseline = supervised(recipe, train, dataset)
    found = {}
    for alpha in recipe["alphas"]:
        net, errors = semi_supervised(recipe, alpha, train, dataset, folder / f"alpha-{alpha:g}")
        found[alpha] = (min(errors), net, errors)
    alpha = min(recipe["alphas"], key=lambda a: found[a][0])
    _, net, _ = found[alpha]
    return {
        "alpha": alpha,
        "test_error": error(net, dataset.test.x, dataset.test.y),
        "valid_error": {f"{a:g}": errors for a, (_, _, errors) in found.items()},
        "baseline": baseline,
    }


def semi_supervised(
    recipe: dict[str, Any], alpha: float, train: data.Split, dataset: data.Dataset, folder: Path
) -> tuple[nn.Module, list[float]]:
    """The classifier of the best epoch, and the validation error of each."""
    pyro.set_rng_seed(recipe["seed"])
    binary = dataset.support == "binary"
    x_dim, num_classes = train.values.shape[1], dataset.num_classes or 0
    model, guide = pair(recipe, x_dim, num_classes, binary)
    known = train.y >= 0
    term = guides.Labelled(
        train.values[known],
        train.y[known],
        size=recipe["labelled_per_step"],
        draw=torch.bernoulli if binary else None,
    )
    adam = functools.partial(torch.optim.Adam, lr=recipe["lr"])
    objective = elbo.Plus(elbo.ELBO(), term, alpha)
    svi = ppvae.SVI(model, guide, adam, objective, compile="auto" if recipe["compile"] else False)
    best = BestByValidation(guide.classifier, dataset.valid.x, dataset.valid.y)
    ppvae.fit(
        svi,
        train,
        epochs=recipe["epochs"],
        batch_size=recipe["batch_size"],
        seed=recipe["seed"],
        callbacks=[best],
        checkpoint=ppvae.Checkpoints(folder, keep=1),
        resume=True,
        progress=False,
    )
    guide.classifier.load_state_dict(best.best)
    return guide.classifier, best.errors


def supervised(recipe: dict[str, Any], train: data.Split, dataset: data.Dataset) -> float:
    """The test error of the same network, trained on the labelled rows alone."""
    pyro.set_rng_seed(recipe["seed"])
    net = classifier(recipe, train.values.shape[1], dataset.num_classes or 0)
    known = train.y >= 0
    x, y = train.values[known], train.y[known]
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    best, kept = 1.0, 1.0
    for step in range(1, 2 if recipe.get("smoke") else 1001):
        batch = torch.randint(len(x), (100,))
        rows = torch.bernoulli(x[batch]) if train.binarize else x[batch]
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(rows), y[batch]).backward()
        optimizer.step()
        if step % 50 == 0 or recipe.get("smoke"):
            now = error(net, dataset.valid.x, dataset.valid.y)
            if now <= best:
                best, kept = now, error(net, dataset.test.x, dataset.test.y)
    return kept


def features(recipe: dict[str, Any], dataset: data.Dataset, folder: Path) -> data.Dataset:
    """M1: a VAE without labels; the means of q(z | x), standardised, take the place of x."""
    path = folder.parent / f"m1-{recipe['data']}-{recipe['m1_epochs']}-{recipe['seed']}.pt"
    x_dim, z_dim, width = dataset.train.values.shape[1], recipe["m1_latent_dim"], recipe["m1_width"]
    pyro.set_rng_seed(recipe["seed"])
    likelihood = conditionals.Bernoulli(nets.mlp(z_dim, width, width, x_dim))
    model = models.VAE(likelihood, latent_dim=z_dim)
    guide = guides.Normal(nets.mlp(x_dim, width, width, 2 * z_dim))
    if path.exists():
        guide.load_state_dict(torch.load(path, weights_only=True))
    else:
        adam = functools.partial(torch.optim.Adam, lr=1e-3)
        svi = ppvae.SVI(model, guide, adam, compile="auto" if recipe["compile"] else False)
        ppvae.fit(
            svi,
            dataset.train,
            epochs=recipe["m1_epochs"],
            batch_size=recipe["batch_size"],
            seed=recipe["seed"],
            checkpoint=ppvae.Checkpoints(path.with_suffix(""), keep=1),
            resume=True,
            progress=False,
        )
        torch.save(guide.state_dict(), path)
    with torch.no_grad():
        parts = [
            torch.cat([guide.posterior(rows).mean for rows in part.x.split(1000)])
            for part in (dataset.train, dataset.valid, dataset.test)
        ]
    loc, scale = parts[0].mean(0), parts[0].std(0)
    scale = torch.where(scale > 0.1, scale, 1.0)  # a unit may be off
    splits = (dataset.train, dataset.valid, dataset.test)
    train, valid, test = (
        data.Split((part - loc) / scale, split.y) for part, split in zip(parts, splits, strict=True)
    )
    return data.Dataset(
        f"features of {dataset.name}", train, valid, test, "real", (z_dim,), dataset.num_classes
    )


# ------------------------------------------------------------------------------ the table

PAPER = {("m2", 100): 11.97, ("m2", 1000): 3.60, ("m1m2", 100): 3.33, ("m1m2", 1000): 2.40}


def report(found: dict[str, Any]) -> str:
    lines = [
        "Test error, %, of argmax q(y | x).",
        "",
        "| cell | labels | alpha | validation | test | network on the labels alone | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, cell in found.items():
        recipe = cell["recipe"]
        labels = 10 * recipe["per_class"]
        paper = PAPER.get((recipe["kind"], labels), "") if recipe["data"] == "mnist" else ""
        valid = min(cell["valid_error"][f"{cell['alpha']:g}"])
        lines.append(
            f"| {name} | {labels} | {cell['alpha']:g} | {100 * valid:.1f} | "
            f"{100 * cell['test_error']:.1f} | {100 * cell['baseline']:.1f} | {paper} |"
        )
    return "\n".join(lines)
