"""Clusters against classes: accuracy, mutual information, the adjusted Rand index."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import numpy as np

from ppvae.metrics.arrays import host


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
        raise ValueError(f"clusters has the number {found.max()}, and num_clusters={num_clusters}")
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


def _assignments(clusters: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Both as int64 ``(N,)``, checked."""
    found, given = host(clusters, name="clusters"), host(labels, name="labels")
    if found.shape != given.shape or found.ndim != 1 or not len(found):
        seen = f"clusters has shape {found.shape} and labels {given.shape}"
        cure = "give one number of each per datapoint, (N,); of probabilities take argmax(1)"
        raise ValueError(f"{seen}: {cure}")
    for name, array in (("clusters", found), ("labels", given)):
        if array.dtype.kind not in "iubf":
            raise ValueError(f"{name} holds {array.dtype}: give whole numbers from 0")
        if array.dtype.kind in "bf":
            array = array.astype(np.float64)  # 2**63 does not fit into smaller ones
        bad = ~np.isfinite(array) | (array != np.round(array)) | (array < 0) | (array >= 2**63)
        if bad.any():
            raise ValueError(f"{name} must be whole numbers from 0, not {array[bad][:5]}")
    return found.astype(np.int64), given.astype(np.int64)
