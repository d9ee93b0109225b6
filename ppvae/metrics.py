"""Numbers from the literature that are not bounds: clustering scores, perplexity of documents.

They are functions of tensors or arrays, and know nothing of pairs.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

__all__ = [
    "Clustering",
    "Perplexity",
    "UnusedClusterWarning",
    "adjusted_rand_index",
    "clustering",
    "clustering_accuracy",
    "mutual_information",
    "perplexity",
]


class UnusedClusterWarning(UserWarning):
    """Clusters to which no datapoint was assigned: they collapsed in training."""


class Clustering(NamedTuple):
    """Scores of an assignment against labels; larger is better.

    Attributes:
        accuracy: :func:`clustering_accuracy`, in [0, 1].
        nmi: :func:`mutual_information`, normalised, in [0, 1].
        ari: :func:`adjusted_rand_index`, at most 1, 0 by chance.
        sizes: datapoints in each cluster.
    """

    accuracy: float
    nmi: float
    ari: float
    sizes: list[int]


def clustering(clusters: Any, labels: Any, num_clusters: int) -> Clustering:
    """All clustering scores of one assignment.

    Args:
        clusters: ``(N,)`` whole numbers, 0 to ``num_clusters - 1``.
        labels: ``(N,)`` whole numbers from 0: the classes, which the model has not seen.
        num_clusters: how many clusters the model has, used or not.

    Raises:
        ValueError: lengths differ, nothing is given, or a number is out of range.

    Warns:
        UnusedClusterWarning: a cluster holds no datapoint.

    Example:
        >>> scores = clustering([1, 1, 0, 0, 0], [0, 0, 1, 1, 0], num_clusters=2)
        >>> scores.accuracy, scores.sizes
        (0.8, [3, 2])
    """
    found, given = _assignments(clusters, labels)
    if found.max() >= num_clusters:
        raise ValueError(
            f"clusters has the number {found.max()}, and num_clusters={num_clusters}: number them "
            f"0 to {num_clusters - 1}"
        )
    sizes = np.bincount(found, minlength=num_clusters).tolist()
    unused = [cluster for cluster, size in enumerate(sizes) if size == 0]
    if unused:
        warnings.warn(
            f"clusters {unused} of {num_clusters} hold no datapoint: they collapsed. Start from "
            "the codes of a pretrained autoencoder (VaDE.initialise), pretrain longer or with "
            "another seed, lower the learning rate of the prior, or use fewer clusters",
            UnusedClusterWarning,
            stacklevel=2,
        )
    return Clustering(
        clustering_accuracy(found, given),
        mutual_information(found, given),
        adjusted_rand_index(found, given),
        sizes,
    )


def clustering_accuracy(clusters: Any, labels: Any) -> float:
    r"""Share of datapoints whose cluster's class is their own, under the best matching.

    .. math:: \max_{m} \frac1N \sum_n 1[\, m(c_n) = y_n\, ]

    over one-to-one maps m of clusters to classes, found by the Hungarian algorithm. With more
    clusters than classes, those left over count as errors.

    Args:
        clusters: ``(N,)`` whole numbers from 0.
        labels: ``(N,)`` whole numbers from 0.

    Raises:
        ValueError: lengths differ, nothing is given, or a number is negative, infinite or not
            whole.

    Example:
        >>> clustering_accuracy([2, 2, 0, 1], [0, 0, 1, 1])
        0.75

    Source: Yang, Xu, Nie, Yan and Zhuang (2010), as used by Xie et al. (2016), arXiv:1511.06335.
    """
    from scipy.optimize import linear_sum_assignment

    found, given = (
        np.unique(numbers, return_inverse=True)[1] for numbers in _assignments(clusters, labels)
    )
    counts = np.zeros((found.max() + 1, given.max() + 1), np.int64)
    np.add.at(counts, (found, given), 1)
    rows, columns = linear_sum_assignment(counts, maximize=True)
    return float(counts[rows, columns].sum() / len(found))


def mutual_information(clusters: Any, labels: Any) -> float:
    r"""Normalised mutual information, :math:`2 I(c; y) / (H(c) + H(y))`, in [0, 1].

    scikit-learn's ``normalized_mutual_info_score``, with its arithmetic mean of the entropies.

    Args:
        clusters: ``(N,)`` whole numbers from 0.
        labels: ``(N,)`` whole numbers from 0.

    Raises:
        ValueError: as :func:`clustering_accuracy`.

    Example:
        >>> round(mutual_information([1, 1, 0, 0], [0, 0, 1, 1]), 6)
        1.0
    """
    from sklearn.metrics import normalized_mutual_info_score

    found, given = _assignments(clusters, labels)
    return float(normalized_mutual_info_score(given, found))


def adjusted_rand_index(clusters: Any, labels: Any) -> float:
    """The adjusted Rand index: agreement on pairs of datapoints, 0 by chance, 1 at best.

    scikit-learn's ``adjusted_rand_score`` (Hubert and Arabie, 1985).

    Args:
        clusters: ``(N,)`` whole numbers from 0.
        labels: ``(N,)`` whole numbers from 0.

    Raises:
        ValueError: as :func:`clustering_accuracy`.

    Example:
        >>> adjusted_rand_index([1, 1, 0, 0], [0, 0, 1, 1])
        1.0
    """
    from sklearn.metrics import adjusted_rand_score

    found, given = _assignments(clusters, labels)
    return float(adjusted_rand_score(given, found))


class Perplexity(NamedTuple):
    """Two perplexities per word; smaller is better, and V is that of guessing evenly.

    Attributes:
        per_document: exp of the mean over documents of each one's nats per word.
        corpus: exp of all nats over all words.
    """

    per_document: float
    corpus: float


def perplexity(log_p: Any, num_words: Any) -> Perplexity:
    r"""Perplexity per word from log p of documents, by both definitions in use.

    .. math:: \text{per document: } \exp\Big(-\frac1D \sum_d \frac{\log p(x_d)}{N_d}\Big),\qquad
              \text{corpus: } \exp\Big(-\frac{\sum_d \log p(x_d)}{\sum_d N_d}\Big)

    The first is that of Miao et al. (2016) and of RSM, docNADE and SBN before them; short
    documents, which are hard to predict, weigh as much in it as long ones. The second is that of
    LDA (Blei et al., 2003) and scikit-learn. Say which one a number is.

    From a lower bound on log p, such as the ELBO, comes an upper bound on each.

    Args:
        log_p: ``(D,)`` nats: a bound, or log p(x), of each document's words in their order
            (:class:`ppvae.conditionals.BagOfWords`; not the multinomial's).
        num_words: ``(D,)`` words of each document, >= 1.

    Raises:
        ValueError: shapes differ, a value is NaN or infinite, a document has no words, or a
            perplexity is too large for a floating-point number.

    Example:
        >>> import math, torch
        >>> log_p = torch.tensor([-2 * math.log(8), -6 * math.log(2)])  # 2 words, 6 words
        >>> [round(value, 3) for value in perplexity(log_p, [2, 6])]
        [4.0, 2.828]
    """
    values, words = (np.asarray(_host(v), np.float64) for v in (log_p, num_words))
    if values.ndim != 1 or values.shape != words.shape or not len(values):
        raise ValueError(
            f"log_p has shape {values.shape} and num_words {words.shape}: give one number of each "
            "per document, (D,)"
        )
    if not np.isfinite(values).all():
        raise ValueError(
            f"log_p has {int((~np.isfinite(values)).sum())} NaN or infinite values, the first for "
            f"document {int((~np.isfinite(values)).argmax())}: the model diverged, or log_p is "
            "that of words the model excludes"
        )
    if not np.isfinite(words).all():
        raise ValueError(
            f"num_words has {int((~np.isfinite(words)).sum())} NaN or infinite values, the first "
            f"for document {int((~np.isfinite(words)).argmax())}: give the sums of its counts"
        )
    if (words < 1).any():
        raise ValueError(
            f"{int((words < 1).sum())} documents have no words (the first is number "
            f"{int((words < 1).argmax())}), so no perplexity per word: drop them, and say how many"
        )
    rates = -values / words
    per_document, corpus = rates.mean(), -values.sum() / words.sum()
    if max(per_document, corpus) > np.log(np.finfo(np.float64).max):
        raise ValueError(
            f"log_p is {rates.max():.4g} nats below 0 per word for document {int(rates.argmax())}: "
            "a perplexity of its exponential is too large for a number; the model diverged, or "
            "num_words belongs to other documents"
        )
    return Perplexity(float(np.exp(per_document)), float(np.exp(corpus)))


def _host(values: Any) -> Any:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else values


def _assignments(clusters: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as int64 ``(N,)``, checked."""
    arrays = {"clusters": np.asarray(_host(clusters)), "labels": np.asarray(_host(labels))}
    shapes = [array.shape for array in arrays.values()]
    if shapes[0] != shapes[1] or len(shapes[0]) != 1 or not shapes[0][0]:
        raise ValueError(
            f"clusters has shape {shapes[0]} and labels {shapes[1]}: give one number of each per "
            "datapoint, (N,); of probabilities q(c | x) take argmax(1)"
        )
    for name, array in arrays.items():
        if array.dtype.kind not in "iubf":
            raise ValueError(f"{name} holds {array.dtype}: give whole numbers from 0")
        whole = np.isfinite(array) & (array == np.round(array))
        if not whole.all():
            raise ValueError(f"{name} has values that are not whole: {array[~whole][:5]}")
        if array.min() < 0:
            raise ValueError(f"{name} has the negative number {array.min()}: number them from 0")
        if array.max() >= 2**63:
            raise ValueError(f"{name} has the number {array.max()}: number them from 0")
    return arrays["clusters"].astype(np.int64), arrays["labels"].astype(np.int64)
