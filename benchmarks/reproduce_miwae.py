"""MIWAE's imputation of a table: Mattei & Frellsen, 2019, beside what scikit-learn has.

The breast cancer data of scikit-learn, 569 rows of 30 numbers, each column standardised; half of
all values are hidden at random (MCAR), and the mean squared error of these is reported, in units of
a column's variance. Networks of two layers of 128, a Student t likelihood whose df exceeds 3 so
that it has a mean and a variance, K = 20 particles, a latent of 10; Adam at 1e-3, batches of 64.
What is imputed are the rows that were trained on, as in the paper; the hidden values are seen by
nobody before they are compared with. Single numbers are imputed by the posterior mean, from
self-normalised importance weights, and by the mean over the encoder's draws, to compare with.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.nn.functional import softplus

import ppvae
from ppvae import conditionals, diagnostics, distributions, elbo, guides, models, nets

RECIPE = {
    "latent_dim": 10,
    "hidden": [128, 128],
    "num_particles": 20,
    "lr": 1e-3,
    "batch_size": 64,
    "num_epochs": 600,
    "share_missing": 0.5,
    "num_weights": 10_000,
    "compile": "auto",
}
CELLS = {f"miwae-{seed}": RECIPE | {"seed": seed} for seed in range(3)}
QUICK = {"hidden": [8], "num_epochs": 1, "num_weights": 50, "compile": False}


class HeavyTails(conditionals.Elementwise):
    """Student t laws with a mean and a variance, as in the authors' code."""

    family: ClassVar[Any] = staticmethod(
        lambda loc, raw_scale, raw_df: distributions.StudentT(
            loc, (softplus(raw_scale) + 1e-3).log(), (softplus(raw_df) + 3).log()
        )
    )


def pair(dim: int, latent_dim: int, hidden: list[int]) -> tuple[models.Masked, guides.Amortized]:
    likelihood = HeavyTails(nets.mlp(latent_dim, *hidden, 3 * dim), scale=None, df=None)
    model = models.Masked(models.VAE(likelihood, latent_dim=latent_dim))
    encoder = nets.Masked(nets.mlp(2 * dim, *hidden, 2 * latent_dim))
    return model, guides.Normal(encoder, positive=softplus)


def rows(recipe: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Complete standardised rows, and which of their values are observed."""
    from sklearn.datasets import load_breast_cancer

    x = load_breast_cancer().data
    x = torch.as_tensor((x - x.mean(0)) / x.std(0), dtype=torch.get_default_dtype())
    generator = torch.Generator().manual_seed(recipe["seed"])
    return x, torch.rand(x.shape, generator=generator) >= recipe["share_missing"]


def baselines(gaps: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """The three that scikit-learn has, at their defaults."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.experimental import enable_iterative_imputer  # noqa: F401
    from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        return {
            "mean": SimpleImputer().fit_transform(gaps),
            "knn": KNNImputer().fit_transform(gaps),
            "iterative_ridge": IterativeImputer(random_state=seed).fit_transform(gaps),
        }


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    x, observed = rows(recipe)
    gaps = x.masked_fill(~observed, torch.nan)
    found = {
        name: error(x, torch.as_tensor(filled), observed)
        for name, filled in baselines(gaps.numpy(), recipe["seed"]).items()
    }
    pyro.set_rng_seed(recipe["seed"])
    model, guide = pair(x.shape[1], recipe["latent_dim"], recipe["hidden"])
    adam = functools.partial(torch.optim.Adam, lr=recipe["lr"])
    bound = elbo.IWELBO(num_particles=recipe["num_particles"])
    history = ppvae.fit(
        ppvae.SVI(model, guide, adam, bound, compile=recipe["compile"]),
        (gaps, observed),
        epochs=recipe["num_epochs"],
        batch_size=recipe["batch_size"],
        seed=recipe["seed"],
        checkpoint=folder,
        resume=True,
        progress=False,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    imputed = ppvae.impute(
        model, guide, gaps, observed, num_particles=recipe["num_weights"], seed=0
    )
    unweighted = by_draws_of_the_encoder(model, guide, gaps, observed)
    report = diagnostics.diagnose(
        model, guide, gaps, observed, num_particles=max(21, recipe["num_weights"] // 10), seed=0
    )
    print(report.by_missingness().to_string(float_format="%.2f"))
    return found | {
        "miwae": error(x, imputed.mean, observed),
        "unweighted": error(x, unweighted, observed),
        "bad_khat": (imputed.khat > 0.7).double().mean().item(),
        "ess": imputed.ess.median().item(),
        "log_evidence": imputed.evidence.mean,
        "train_objective": history.rows[-1]["train_objective"],
    }


@torch.no_grad()
def by_draws_of_the_encoder(
    model: models.Masked, guide: guides.Amortized, gaps: Tensor, observed: Tensor
) -> Tensor:
    """What is left without weights: the mean of E[x | z] over draws of q(z | x)."""
    z = guide.posterior(gaps, observed).sample((500,))
    return model.model.likelihood(z).mean.mean(0)


def error(x: Tensor, filled: Tensor, observed: Tensor) -> float:
    return (x - filled).square()[~observed].mean().item()


def report(found: dict[str, Any]) -> str:
    columns = {
        "mean": "mean",
        "knn": "5 nearest rows",
        "iterative_ridge": "iterative ridge",
        "unweighted": "pair, without weights",
        "miwae": "pair, `impute`",
    }
    lines = [
        "Mean squared error of the hidden values, in variances of their columns.",
        "",
        f"| seed | {' | '.join(columns.values())} | k-hat > 0.7 |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for name, cell in found.items():
        numbers = " | ".join(f"{cell[key]:.3f}" for key in columns)
        lines.append(f"| {name.split('-')[-1]} | {numbers} | {cell['bad_khat']:.0%} |")
    means = " | ".join(
        f"{statistics.fmean(cell[key] for cell in found.values()):.3f}" for key in columns
    )
    lines.append(f"| mean | {means} | |")
    return "\n".join(lines)
