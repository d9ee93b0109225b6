"""NVDM: documents as bags of words; perplexities beside LDA's, near words, topics, a map.

    python examples/nvdm.py                            # 20 Newsgroups, 50 dimensions
    python examples/nvdm.py --passes 10 --epochs 200   # one network at a time, as in the paper
    python examples/nvdm.py --version sklearn          # scikit-learn's download, with labels
    python examples/nvdm.py --quick                    # a check that all runs, in seconds

The model is chosen on held-out training documents, never on the test documents.

Source: Miao, Yu and Blunsom, Neural Variational Inference for Text Processing, 2016.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import reporting
import torch
from torch import Tensor, nn

import ppvae
from ppvae import data, diagnostics, elbo, guides, metrics, models, nets, plots
from ppvae.train.fit import resolve_device

FILES = ["results.json", "words.txt", "training.png", "documents.png"]
QUERIES = ["gun", "space", "god", "car", "windows", "team", "medical", "israel"]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = resolve_device(args.device)
    out = reporting.open_folder(args.out, args.overwrite, FILES)

    # The data: sparse counts, dense only in a batch. Empty documents are dropped and counted.
    dataset = data.load("20newsgroups", version=args.version, num_valid=args.num_valid)
    print(dataset)
    vocabulary = dataset.vocabulary
    assert vocabulary is not None

    pyro.set_rng_seed(args.seed)
    z_dim = args.latent_dim
    model, guide = pair(len(vocabulary), z_dim, args.hidden)
    model.nearest_words(args.words or [], vocabulary)  # an unknown word is an error now

    # Training: both networks at each step, or the decoder for some passes over the data, then the
    # encoder, and so on. Either way with a step size that falls to zero.
    steps = args.passes * math.ceil(len(dataset.train) / args.batch_size)
    adam: Any = functools.partial(torch.optim.Adam, lr=args.lr)
    model.to(device), guide.to(device)
    if args.passes:
        adam = ppvae.alternate(adam, model, guide, steps=steps)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO(kl="mixed"), clip_norm=args.clip_norm)
    turns = f"{args.passes} passes each in turn" if args.passes else "both at each step"
    print(f"\nTraining on {device}: at most {args.epochs} passes, {turns}", flush=True)
    started = time.perf_counter()
    history = ppvae.fit(
        svi,
        dataset,
        epochs=args.epochs,
        batch_size=args.batch_size,
        patience=args.patience,
        lr_scheduler=functools.partial(
            torch.optim.lr_scheduler.LambdaLR,
            lr_lambda=lambda epoch: 0.5 * (1 + math.cos(math.pi * epoch / args.epochs)),
        ),
        device=device,
        seed=args.seed,
        checkpoint=args.checkpoint,
        resume=args.checkpoint is not None,
    )
    seconds = time.perf_counter() - started

    # Evaluation: the ELBO and log p(x) of each test document, and perplexities from both.
    counts = dataset.test.x.to(device)
    words = counts.sum(1).cpu()
    evidence = diagnostics.log_evidence(
        model, guide, counts, num_particles=args.num_samples, seed=args.seed
    )
    lda_log_p = lda_baseline(dataset, args)
    found = {
        "NVDM, ELBO": metrics.perplexity(evidence.elbo, words),
        f"NVDM, log p by {args.num_samples} importance samples": metrics.perplexity(
            evidence.log_evidence, words
        ),
        f"LDA, {z_dim} topics, variational bound": metrics.perplexity(lda_log_p, words),
        "one unigram for all": metrics.perplexity(unigram(dataset), words),
    }
    reporting.print_table(
        f"Perplexity per word of {len(words):,} test documents, {len(vocabulary):,} words; smaller "
        "is better. Bounds on log p make it an upper bound",
        [
            (name, f"{value.per_document:8.1f} per document   {value.corpus:8.1f} corpus")
            for name, value in found.items()
        ],
    )

    # What it learned.
    reporting.clear(out, FILES)
    text = words_and_topics(model, vocabulary, args.words)
    print(f"\n{text}")
    (out / "words.txt").write_text(text)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    results = {
        "data": dataset.source,
        "perplexity": {name: value._asdict() for name, value in found.items()},
        "test_elbo_nats": evidence.elbo.mean().item(),
        "passes": len(history.rows),
        "best_pass": history.best_epoch,
        "train_seconds": seconds,
        "settings": settings,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    reporting.save(history.plot(), out / "training.png")
    spread = torch.linspace(0, len(counts) - 1, min(args.num_map, len(counts))).long()
    reporting.save(document_map(guide, dataset, counts.cpu(), spread), out / "documents.png")
    reporting.print_files(out, FILES)


def pair(num_words: int, latent_dim: int, hidden: int) -> tuple[models.NVDM, guides.Normal]:
    """The paper's; the encoder starts with sigma = 1, whatever the document."""
    model = models.NVDM(num_words, latent_dim)
    encoder = nets.mlp(num_words, hidden, 2 * latent_dim, activation=nn.Tanh)
    *_, last = (layer for layer in encoder.modules() if isinstance(layer, nn.Linear))
    with torch.no_grad():
        last.weight[latent_dim:] = 0
        last.bias[latent_dim:] = 0
    return model, guides.Normal(encoder)


# ------------------------------------------------------------------------------ beside it


def unigram(dataset: data.Dataset) -> Tensor:
    """log p of each test document's words, all drawn with the frequencies of training."""
    total = counts_of(dataset.train).sum(0) + 1.0  # add one: a word may be new
    log_share = torch.tensor(np.log(total / total.sum())).double()
    return dataset.test.x.double() @ log_share


def lda_baseline(dataset: data.Dataset, args: argparse.Namespace) -> np.ndarray:
    """scikit-learn's LDA with as many topics, and its bound on each test document."""
    print(f"\nLDA, {args.latent_dim} topics, {args.lda_iterations} passes", flush=True)
    topics, alpha = fit_lda(
        counts_of(dataset.train),
        args.latent_dim,
        args.lda_iterations,
        args.seed,
        topic_word_prior=1.0,  # better on held-out documents than scikit-learn's own 1 / topics
    )
    return lda_bound(counts_of(dataset.test), topics, alpha)


def fit_lda(
    counts: Any, num_topics: int, passes: int, seed: int = 0, **options: Any
) -> tuple[np.ndarray, float]:
    """Topics, ``(K, V)`` with rows that sum to one, and the prior of their shares.

    ``options`` go to scikit-learn's ``LatentDirichletAllocation``.
    """
    from sklearn.decomposition import LatentDirichletAllocation

    options = {"max_iter": passes, "random_state": seed, "learning_method": "online"} | options
    lda = LatentDirichletAllocation(num_topics, **options).fit(counts)
    return lda.components_ / lda.components_.sum(1, keepdims=True), lda.doc_topic_prior_


def counts_of(split: data.Split) -> Any:
    """The rows of a part as a scipy matrix."""
    rows: Any = split.values
    assert split.rows is not None
    return rows.matrix[split.rows.numpy()]


def lda_bound(counts: Any, topics: np.ndarray, alpha: float, iterations: int = 100) -> np.ndarray:
    r"""The variational bound on log p(words | topics) of each document, ``(D,)`` nats.

    .. math:: \sum_v c_v \log \sum_k e^{E \log \theta_k} \beta_{kv}
              - KL(\mathrm{Dir}(\gamma) \,\|\, \mathrm{Dir}(\alpha))

    Blei, Ng and Jordan (2003), with its fixed point for gamma. scikit-learn has it only for the
    whole corpus, and with the uncertainty of the topics.
    """
    from scipy.special import digamma, gammaln

    bounds = []
    for first in range(0, counts.shape[0], 256):
        c = counts[first : first + 256].toarray().astype(float)
        gamma = alpha + c.sum(1, keepdims=True) / len(topics) * np.ones(len(topics))
        for iteration in range(iterations + 1):
            log_theta = digamma(gamma) - digamma(gamma.sum(1, keepdims=True))
            theta = np.exp(log_theta)
            share = theta @ topics + 1e-300
            if iteration < iterations:
                gamma = alpha + theta * ((c / share) @ topics.T)
        kl = (
            gammaln(gamma.sum(1))
            - gammaln(gamma).sum(1)
            - gammaln(alpha * len(topics))
            + len(topics) * gammaln(alpha)
            + ((gamma - alpha) * log_theta).sum(1)
        )
        bounds.append((c * np.log(share)).sum(1) - kl)
    return np.concatenate(bounds)


# ------------------------------------------------------------------------------ what it learned


def words_and_topics(
    model: models.NVDM, vocabulary: Sequence[str], queries: Sequence[str] | None
) -> str:
    """Near words of some, and both ends of the dimensions with the longest columns of R."""
    queries = queries or [w for w in QUERIES if w in vocabulary] or list(vocabulary[:3])
    lines = ["Nearest words, by the cosine of their vectors R"]
    for word, near in model.nearest_words(queries, vocabulary).items():
        lines.append(f"  {word:<10} {', '.join(near)}")
    lines.append("\nDimensions of z that move words most, from one end to the other")
    topics = model.topics(vocabulary, num=min(7, len(vocabulary) // 2))
    longest = model.word_vectors.detach().norm(dim=0).argsort(descending=True)[:10].tolist()
    for j in longest:
        up, down = topics[j]
        lines.append(f"  z_{j + 1:<3} {' '.join(up)}  <->  {' '.join(down)}")
    return "\n".join(lines) + "\n"


def document_map(guide: guides.Normal, dataset: data.Dataset, counts: Tensor, index: Tensor) -> Any:
    """Means of q(z | x) by t-SNE, coloured by label, or by groups that their words name."""
    from sklearn.cluster import KMeans
    from sklearn.manifold import TSNE

    counts = counts[index]  # the files are in the order of the newsgroups, so not the first ones
    with torch.no_grad():
        z = guide.cpu().posterior(counts).mean.numpy()
    place = TSNE(perplexity=min(30, len(z) // 4), init="pca", random_state=0).fit_transform(z)
    y = dataset.test.y
    if y is not None:
        labels, names = y[index].numpy(), None
    else:
        labels = KMeans(8, n_init=4, random_state=0).fit_predict(z)
        names = [name_of(counts.numpy(), labels == k, dataset) for k in range(8)]
    ax = plots.latent_scatter(place, labels, class_names=names)
    colours = "newsgroup" if y is not None else "k-means groups of z"
    ax.get_legend().set_title("newsgroup" if y is not None else "words that set it apart")
    ax.set(xlabel="t-SNE, first axis", ylabel="t-SNE, second axis", xticks=[], yticks=[])
    ax.set_title(f"{len(z):,} test documents; colour: {colours}")
    return ax


def name_of(counts: np.ndarray, inside: np.ndarray, dataset: data.Dataset) -> str:
    """The three words that a group has most of, beside the other documents."""
    own, rest = counts[inside].sum(0), counts[~inside].sum(0)
    lift = (own + 1) / (own.sum() + 1) / ((rest + 20) / (rest.sum() + 20))
    assert dataset.vocabulary is not None
    return ", ".join(dataset.vocabulary[i] for i in np.argsort(-lift)[:3])


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--version", choices=["clean", "sklearn"], default="clean", help="of 20 Newsgroups, see "
        "ppvae.data.text (default: %(default)s)")  # fmt: skip
    add("--num-valid", type=int, default=1000, help="training documents held out to choose the "
        "model (default: %(default)s)")  # fmt: skip
    add("--latent-dim", type=int, default=50, help="size of z, and LDA's topics (default: "
        "%(default)s)")  # fmt: skip
    add("--hidden", type=int, default=500, help="width of the encoder (default: %(default)s)")
    add("--passes", type=int, default=0, help="over the data, in each turn of one network, the "
        "paper: 10; 0: both at each step (default: %(default)s)")  # fmt: skip
    add("--epochs", type=int, default=100, help="passes in all, at most; the paper: 20 each of up "
        "to 1000 times (default: %(default)s)")  # fmt: skip
    add("--patience", type=int, help="passes without a better validation bound (default: 4 turns, "
        "or 20)")  # fmt: skip
    add("--batch-size", type=int, default=64, help="documents per step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="Adam's learning rate, which falls to 0 as a "
        "cosine; the paper: 5e-5 (default: %(default)s)")  # fmt: skip
    add("--clip-norm", type=float, default=1000, help="largest norm of the gradient, summed over a "
        "batch; both networks count; inf: any (default: %(default)s)")  # fmt: skip
    add("--num-samples", type=int, default=20, help="draws per test document (default: "
        "%(default)s)")  # fmt: skip
    add("--lda-iterations", type=int, default=20, help="passes of LDA (default: %(default)s)")
    add("--num-map", type=int, default=1500, help="documents on the map (default: %(default)s)")
    add("--words", nargs="+", metavar="WORD", help="whose neighbours to print")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--checkpoint", type=Path, metavar="FOLDER", help="write checkpoints there, and go on from "
        "them (default: none)")  # fmt: skip
    add("--out", type=Path, default=Path("out/nvdm"), metavar="FOLDER", help="where the files go "
        "(default: %(default)s)")  # fmt: skip
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--quick", "--smoke", action="store_true", help="a check that all runs, in seconds")
    args = parser.parse_args(argv)
    for name in ("num_valid", "latent_dim", "hidden", "epochs", "batch_size", "lda_iterations"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
    if args.passes < 0 or args.num_map < 40:
        raise ValueError("--passes must be 0 or more, and --num-map 40 or more")
    if args.quick:
        args.hidden, args.epochs, args.passes = 32, 2, min(args.passes, 1)
        args.lda_iterations, args.num_map, args.latent_dim = 1, 100, min(args.latent_dim, 5)
    args.patience = args.patience or max(20, 4 * args.passes)
    return args


if __name__ == "__main__":
    reporting.run(main)
