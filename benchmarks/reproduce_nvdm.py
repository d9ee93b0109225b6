"""NVDM on 20 Newsgroups, 50 dimensions, beside LDA: Miao, Yu & Blunsom, 2016.

As in the paper: V-500-(50, 50) with tanh on the raw counts; sigma = exp, and 1 for every document
at the start; a linear layer and a softmax as decoder; one draw, closed-form KL, losses summed over
a batch of 64, Adam. Other than there: both networks at each step; a learning rate of 2e-3 that
falls to 0 as a cosine, over 100 passes; gradients cut to the norm 1,000, which is half of the
median one and so counts at nearly every step. NVDM-in-turn has the paper's turns of ten passes.

The counts are those of Srivastava and Sutton: 1,995 words; 11,258 and 7,487 documents that have
one. The paper's 2,000 words are others, and its numbers do not compare: look at the unigram.
1,000 training documents are held out, the same ones for all cells: models, and settings of LDA,
are chosen by their perplexity per document; the authors' code chooses by test documents.

Perplexity per document is exp(-mean over d of log p(x_d) / N_d). The paper's has the ELBO in place
of log p. Beside it is that from importance samples, an IWELBO, and those of the whole corpus.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pyro
import torch
from example_scripts import example
from torch import Tensor

import ppvae
from ppvae import data, diagnostics, elbo, metrics

nvdm = example("nvdm")  # the pair; LDA and its bound on single documents; the unigram

DATA = {"num_valid": 1_000, "num_documents": None}  # of each part; None: all
NVDM = DATA | {
    "kind": "nvdm",
    "seed": 0,
    "passes": 0,  # of each network in turn, the paper has 10; 0: both at each step
    "max_passes": 100,  # over the data; the paper: up to 20,000
    "lr": 2e-3,  # the paper: 5e-5
    "clip_norm": 1_000.0,
    "latent_dim": 50,
    "hidden": 500,
    "batch_size": 64,
    "num_particles": 100,
}
LDA = DATA | {
    "kind": "lda",
    "seed": 0,
    "latent_dim": 50,
    "method": "online",
    "max_passes": 20,
    "share_prior": 0.02,  # of the topics in a document; scikit-learn's default is 1 / 50 for both
    "word_prior": 0.02,  # of the words in a topic
}
CELLS: dict[str, dict[str, Any]] = {
    "NVDM-0": NVDM,
    "NVDM-1": NVDM | {"seed": 1},
    "NVDM-2": NVDM | {"seed": 2},
    "NVDM-in-turn": NVDM | {"passes": 10, "max_passes": 200},
    "LDA-online": LDA,
    # The best of eight pairs of priors on held-out documents, after five passes; 1 is the largest
    # word_prior that scikit-learn takes.
    "LDA-online-smooth": LDA | {"word_prior": 1.0, "max_passes": 50},
    "LDA-batch-smooth": LDA | {"word_prior": 1.0, "max_passes": 50, "method": "batch"},
    "LDA-batch-smooth-100": LDA | {"word_prior": 1.0, "max_passes": 100, "method": "batch"},
    "unigram": DATA | {"kind": "unigram"},
}
QUICK = {"num_documents": 200, "num_valid": 50, "max_passes": 2, "hidden": 32, "latent_dim": 5}
# Test, per document: table 1 of the paper.
PAPER = {"NVDM": 836, "LDA": 1091}


class Choice(ppvae.Callback):
    """The parameters that gave held-out counts the smallest perplexity per document, by the ELBO.

    ``fit`` by itself would choose by nats per document. Looks every so many passes.
    """

    def __init__(self, counts: Tensor, every: int) -> None:
        self.counts, self.every = counts, every
        self.best: dict[str, Any] = {"value": math.inf, "epoch": 0, "parameters": {}}

    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        row = history.rows[-1]
        if row["epoch"] % self.every:
            return
        evidence = diagnostics.log_evidence(
            svi.model, svi.guide, self.counts, num_particles=20, seed=0
        )
        value = metrics.perplexity(evidence.elbo, self.counts.sum(1)).per_document
        row["valid_perplexity"] = value
        if value < self.best["value"]:
            parameters = {name: p.detach().clone() for name, p in svi.objective.named_parameters()}
            self.best = {"value": value, "epoch": row["epoch"], "parameters": parameters}

    def restore(self, svi: ppvae.SVI) -> None:
        svi.objective.load_state_dict(self.best["parameters"], strict=False)

    def state_dict(self) -> dict[str, Any]:
        return self.best

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state


def run(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    dataset = data.load("20newsgroups", num_valid=recipe["num_valid"], seed=0)
    cut = recipe["num_documents"]
    dataset = dataset.map_splits(lambda part: dataclasses.replace(part, rows=part.rows[:cut]))
    if recipe["kind"] == "unigram":
        return {"test": {"exact": perplexities(nvdm.unigram(dataset), dataset.test)}}
    if recipe["kind"] == "lda":
        return run_lda(recipe, dataset)
    return run_nvdm(recipe, dataset, folder)


def run_nvdm(recipe: dict[str, Any], dataset: data.Dataset, folder: Path) -> dict[str, Any]:
    pyro.set_rng_seed(recipe["seed"])
    model, guide = nvdm.pair(len(dataset.vocabulary), recipe["latent_dim"], recipe["hidden"])
    adam: Any = functools.partial(torch.optim.Adam, lr=recipe["lr"])
    if recipe["passes"]:
        steps = recipe["passes"] * math.ceil(len(dataset.train) / recipe["batch_size"])
        adam = ppvae.alternate(adam, model, guide, steps=steps)
    svi = ppvae.SVI(
        model, guide, adam, elbo.ELBO(kl="mixed"), clip_norm=recipe["clip_norm"], compile="auto"
    )
    choice = Choice(dataset.valid.x, every=min(5, recipe["max_passes"]))
    history = ppvae.fit(
        svi,
        dataset.train,
        epochs=recipe["max_passes"],
        batch_size=recipe["batch_size"],
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(
            optimizer, recipe["max_passes"]
        ),
        callbacks=[choice],
        seed=recipe["seed"],
        checkpoint=ppvae.Checkpoints(folder, every=5),
        resume=True,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    choice.restore(svi)
    evidence = diagnostics.log_evidence(
        model, guide, dataset.test.x, num_particles=recipe["num_particles"], seed=0, compile="auto"
    )
    looked = [row for row in history.rows if "valid_perplexity" in row]
    return {
        "test": {
            "ELBO": perplexities(evidence.elbo, dataset.test),
            "importance samples": perplexities(evidence.log_evidence, dataset.test),
        },
        "held_out": choice.best["value"],
        "chosen_pass": choice.best["epoch"],
        "held_out_by_pass": [[row["epoch"], round(row["valid_perplexity"], 1)] for row in looked],
        "train_objective": history.rows[-1]["train_objective"],
        "elbo_nats": evidence.elbo.mean().item(),
        "log_evidence_nats": evidence.mean,
        "khat_above_0.7": evidence.unreliable,
    }


def run_lda(recipe: dict[str, Any], dataset: data.Dataset) -> dict[str, Any]:
    topics, alpha = nvdm.fit_lda(
        nvdm.counts_of(dataset.train),
        recipe["latent_dim"],
        recipe["max_passes"],
        recipe["seed"],
        learning_method=recipe["method"],
        doc_topic_prior=recipe["share_prior"],
        topic_word_prior=recipe["word_prior"],
    )
    held_out, test = (
        perplexities(nvdm.lda_bound(nvdm.counts_of(part), topics, alpha), part)
        for part in (dataset.valid, dataset.test)
    )
    return {"test": {"ELBO": test}, "held_out": held_out["per_document"]}


def perplexities(log_p: Any, part: data.Split) -> dict[str, float]:
    """Both definitions, by name."""
    found: dict[str, float] = metrics.perplexity(log_p, part.x.sum(1))._asdict()
    return found


def report(found: dict[str, Any]) -> str:
    lda = {name: cell["held_out"] for name, cell in found.items() if name.startswith("LDA")}
    lines = [
        "| cell | log p from | test, per document | test, corpus | held out, per document | pass | "
        "paper, per document | CPU minutes |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in found.items():
        system = name.split("-")[0]
        shown = f"**{name}**" if lda and name == min(lda, key=lambda n: lda[n]) else name
        fitted = "held_out" in cell
        beside = [
            f"{cell['held_out']:.1f}" if fitted else "",
            str(cell.get("chosen_pass", cell["recipe"]["max_passes"])) if fitted else "",
            str(PAPER.get(system, "")),
            f"{cell['cpu_seconds'] / 60:.0f}",
        ]
        for kind, value in cell["test"].items():
            if system == "NVDM":
                kind += f", {cell['recipe']['num_particles']} draws"
            numbers = [f"{value['per_document']:.1f}", f"{value['corpus']:.1f}", *beside]
            lines.append("| " + " | ".join([shown, kind, *numbers]) + " |")
            shown, beside = "", [""] * len(beside)
    if lda:
        lines += ["", "Bold: the LDA that is best on held-out documents."]
    return "\n".join(lines)
