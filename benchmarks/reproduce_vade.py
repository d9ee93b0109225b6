"""Clusters of MNIST and of the digits by VaDE, beside its baselines: Jiang et al., 2017.

784-500-500-2000-z10, decoder mirrored, ReLU, Bernoulli on grey levels; all 70,000 images, which the
scores are taken on, too. The paper trains VaDE for 3,000 epochs from an autoencoder whose training
is not published. Here all takes 65 epochs, and differs in this:

- in training every encoder sees images moved, turned, scaled and sheared at random (`Distorted` in
  examples/vade.py), and the decoder gives the image as it is;
- the starting mixture has full covariances in EM, on every third code; of 20 fits that one is taken
  which the others agree with most (mean adjusted Rand index); VaDE's own components are diagonal;
- log sigma starts at -2; Adam at 1e-3 for autoencoder and VAE, at 3e-4 for VaDE, falling to a
  twentieth along a cosine; batch 256; matrix products in bfloat16.

Baselines: mixtures with diagonal covariances, the likeliest of 20 (on pixels of 1). The recipe for
MNIST was found with seeds 100 and 0, that for the digits with seeds 100 to 102. Of the seeds below,
labels are used for the scores alone. A VAE whose encoder sees images distorted has codes that a
mixture splits badly, so the cells `vae-SEED` train one, for ten epochs, on images as they are, with
the likeliest of 5 mixtures.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch
from example_scripts import example

import ppvae
from ppvae import conditionals, data, guides, metrics, models
from ppvae.pairs import evaluation_mode

vade = example("vade")

BASE = {
    "data": "mnist",
    "hidden": [500, 500, 2000],
    "latent_dim": 10,
    "pretrain_epochs": 40,
    "epochs": 15,
    "vae_epochs": 10,
    "distortion": 1.0,
    "num_starts": 20,
    "covariance": "full",
    "batch_size": 256,
    "lr": 1e-3,
    "vade_lr": 3e-4,
    "bf16": True,
    "num_rows": None,
}
DIGITS = BASE | {
    "data": "digits",
    "hidden": [256, 256],
    "pretrain_epochs": 200,
    "epochs": 30,
    "vae_epochs": 230,
    "batch_size": 100,
    "bf16": False,
}
CELLS = {f"seed-{seed}": BASE | {"seed": seed} for seed in range(1, 6)}
CELLS |= {f"digits-{seed}": DIGITS | {"seed": seed} for seed in range(1000, 1005)}
VAE = BASE | {"distortion": 0.0, "num_starts": 5, "vae_only": True}
CELLS |= {f"vae-{seed}": VAE | {"seed": seed} for seed in range(1, 6)}
QUICK = {
    "hidden": [32],
    "pretrain_epochs": 2,
    "epochs": 1,
    "vae_epochs": 1,
    "num_starts": 2,
    "num_rows": 200,
}
# Table 2 of the paper: accuracy in %, VaDE's the best of its runs.
PAPER = {"GMM": 53.73, "VAE + GMM": 72.94, "AE + GMM": 82.18, "VaDE": 94.46}


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    args = argparse.Namespace(**recipe, clip_norm=None, compile=False)
    seed = args.seed
    dataset = data.load(args.data, binarize=None)
    x, y = vade.pooled(dataset, args.num_rows)
    clusters = dataset.num_classes

    def kept(stage: str) -> dict[str, Any]:
        return {"checkpoint": ppvae.Checkpoints(folder / stage, keep=1), "resume": True}

    found = {}
    if recipe.get("vae_only"):
        vae = vade.by_vae(dataset, x, args, seed, args.vae_epochs, **kept("vae"))
        codes = vade.means(vae, x)
        for kind in ("diag", "full"):
            found[kind] = vade.likeliest(codes, clusters, seed, args.num_starts, covariance=kind)
        return {"scores": scored(found, y, clusters)}
    encoder, decoder = vade.pretrained(dataset, x, args, seed, **kept("autoencoder"))
    model = models.VaDE(
        vade.choose_likelihood(dataset)(decoder), conditionals.Mixture(clusters, args.latent_dim)
    )
    guide = guides.Normal(encoder)
    found["AE + GMM"] = vade.likeliest(vade.means(guide, x), clusters, seed, args.num_starts)
    found["VaDE, start"] = vade.start(model, guide, x, args, seed)
    score = Score(model, guide, x, y)
    history = vade.train(
        model, guide, x, args.epochs, args, seed, args.vade_lr, callbacks=[score], **kept("vade")
    )
    found["VaDE"] = vade.assigned(model, guide, x)
    with evaluation_mode(guide):  # by the paper; its code takes the mean of z
        by_draws = [model.clusters(guide.posterior(rows)).argmax(1) for rows in x.split(1_000)]
    found["VaDE, equation 16"] = torch.cat(by_draws)
    # The rest is a matter of minutes: a cell that is killed here trains nothing again.
    vae = vade.by_vae(dataset, x, args, seed, args.vae_epochs, **kept("vae"))
    found["VAE + GMM"] = vade.likeliest(vade.means(vae, x), clusters, seed, args.num_starts)
    found |= vade.baselines(x, clusters, seed, starts=1)
    return {
        "scores": scored(found, y, clusters),
        # of VaDE, after each epoch: the training objective in nats and the accuracy at the means
        "epochs": [{k: row[k] for k in ("train_objective", "accuracy")} for row in history.rows],
    }


def scored(found: dict[str, Any], y: torch.Tensor, clusters: int) -> dict[str, dict[str, float]]:
    return {name: metrics.clustering(c, y, clusters)._asdict() for name, c in found.items()}


class Score(ppvae.Callback):
    """The accuracy after each epoch of VaDE, for the record."""

    def __init__(self, *found: Any) -> None:
        self.model, self.guide, self.x, self.y = found

    @torch.no_grad()
    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        clusters = vade.assigned(self.model, self.guide, self.x)
        history.rows[-1]["accuracy"] = metrics.clustering_accuracy(clusters, self.y)


def report(found: dict[str, Any]) -> str:
    lines = []
    for title, prefix in (("MNIST, 70,000 images", "seed-"), ("digits, 1,797 images", "digits-")):
        cells = {name: cell for name, cell in found.items() if name.startswith(prefix)}
        if not cells:
            continue
        seeds = [cell["recipe"]["seed"] for cell in cells.values()]
        rows = {
            method: [cell["scores"][method] for cell in cells.values()]
            for method in [*vade.METHODS, "VaDE, equation 16"]
        }
        if prefix == "seed-":
            rows["VAE + GMM, images distorted"] = rows.pop("VAE + GMM")
            vaes = [cell["scores"] for name, cell in found.items() if name.startswith("vae-")]
            rows["VAE + GMM"] = [scores["diag"] for scores in vaes]
            rows["VAE + GMM, full covariances"] = [scores["full"] for scores in vaes]
        lines += [
            f"{title}: accuracy in %, seeds {', '.join(map(str, seeds))}.",
            "",
            "| | median | best | all seeds | median NMI | paper, best |",
            "|---|---|---|---|---|---|",
        ]
        for method, scores in rows.items():
            if not scores:
                continue
            accuracy = [100 * s["accuracy"] for s in scores]
            paper = PAPER.get(method) if prefix == "seed-" else None
            lines.append(
                f"| {method} | {statistics.median(accuracy):.1f} | {max(accuracy):.1f} | "
                f"{', '.join(f'{a:.1f}' for a in accuracy)} | "
                f"{statistics.median(s['nmi'] for s in scores):.3f} | "
                f"{'' if paper is None else f'{paper:.1f}'} |"
            )
        lines.append("")
    return "\n".join(lines)
