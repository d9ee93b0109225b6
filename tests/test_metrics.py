"""Clustering scores against every matching by hand; perplexities against their definitions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from ppvae import metrics


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 30), st.integers(0, 99))
def test_accuracy_is_the_best_of_all_matchings(num_clusters, num_classes, rows, seed):
    rng = np.random.default_rng(seed)
    found, given_ = rng.integers(num_clusters, size=rows), rng.integers(num_classes, size=rows)
    targets = range(max(num_clusters, num_classes))  # classes beyond the last are "no class"
    best = max(
        (np.array(matching)[found] == given_).mean()
        for matching in itertools.permutations(targets, num_clusters)
    )
    assert metrics.clustering_accuracy(found, torch.tensor(given_)) == pytest.approx(best)
    shuffled = rng.permutation(num_clusters)[found]
    assert metrics.clustering_accuracy(shuffled, given_) == pytest.approx(best)


def test_nmi_by_its_formula():
    found, given_ = np.array([0, 0, 1, 1, 2, 2, 2]), np.array([0, 1, 1, 1, 0, 0, 1])
    joint = np.zeros((3, 2))
    np.add.at(joint, (found, given_), 1 / 7)
    p, q = joint.sum(1), joint.sum(0)
    information = sum(
        joint[i, j] * math.log(joint[i, j] / (p[i] * q[j])) for i, j in np.argwhere(joint)
    )
    entropies = -(p * np.log(p)).sum() - (q * np.log(q)).sum()
    assert metrics.mutual_information(found, given_) == pytest.approx(2 * information / entropies)


def test_all_scores_at_once():
    rng = np.random.default_rng(0)
    labels = rng.integers(4, size=200)
    clusters = (labels + (rng.random(200) < 0.3)) % 4
    scores = metrics.clustering(torch.tensor(clusters), labels, 4)
    assert scores.nmi == normalized_mutual_info_score(labels, clusters)
    assert scores.ari == adjusted_rand_score(labels, clusters)
    assert scores.sizes == np.bincount(clusters).tolist()
    assert scores.accuracy == (clusters == labels).mean()  # the identity is the best matching here


def test_a_collapsed_cluster_is_named():
    with pytest.warns(metrics.UnusedClusterWarning, match=r"clusters \[1, 3\] of 4 .*initialise"):
        scores = metrics.clustering([0, 0, 2], [0, 1, 1], 4)
    assert scores.sizes == [2, 0, 1, 0]


@pytest.mark.parametrize(
    ("clusters", "labels", "message"),
    [
        ([0, 1], [0], "give one number of each"),
        ([], [], "give one number of each"),
        (np.ones((3, 2)), np.ones((3, 2)), r"argmax\(1\)"),
        ([0.5, 1.0], [0, 1], r"clusters must be whole numbers from 0, not .0\.5"),
        ([math.inf, 0], [0, 1], "clusters must be whole numbers from 0, not .inf"),
        ([0, 1], ["a", "b"], "labels holds <U1"),
        ([0, 1], [0, 1e30], r"labels must be whole numbers from 0, not .1\.?e\+30"),
        ([0, 1], [-1, 0], "labels must be whole numbers from 0, not .-1"),
        ([0, 5], [0, 1], "number 5, and num_clusters=3"),
    ],
)
def test_bad_assignments(clusters, labels, message):
    with pytest.raises(ValueError, match=message):
        metrics.clustering(clusters, labels, 3)


def test_numbers_of_clusters_may_be_large():
    """A table of counts by number would take 149 GB."""
    assert metrics.clustering_accuracy([10**10, 10**10, 7, 7], [0, 0, 10**10, 0]) == 0.75


def test_perplexities_differ_by_how_documents_weigh():
    per_word = torch.tensor([5.0, 6.0, 7.0], dtype=torch.float64)
    words = torch.tensor([100, 10, 1])
    found = metrics.perplexity(-per_word * words, words)
    assert found.per_document == pytest.approx(math.exp(6.0))
    assert found.corpus == pytest.approx(math.exp((500 + 60 + 7) / 111))
    same = metrics.perplexity(-6.0 * words, words)
    assert same.per_document == pytest.approx(same.corpus) == pytest.approx(math.exp(6.0))


def test_guessing_evenly_has_the_perplexity_of_the_vocabulary():
    words = np.array([3, 8, 1])
    assert metrics.perplexity(-words * math.log(2000), words) == pytest.approx((2000, 2000))


@pytest.mark.parametrize(
    ("log_p", "words", "message"),
    [
        ([-1.0, -2.0], [3, 0], "num_words has 1 documents without words, the first is document 1"),
        ([-1.0, math.nan], [3, 1], "log_p has 1 NaN or infinite values, the first is document 1"),
        ([-3.0], [math.nan], "num_words has 1 NaN or infinite values, the first is document 0"),
        ([-1.0, -4e3], [3, 2], "2000 nats below 0 per word for document 1"),
        ([-1.0, -2.0], [3], "one number of each"),
        ([], [], "one number of each"),
    ],
)
def test_documents_without_perplexity(log_p, words, message):
    with pytest.raises(ValueError, match=message):
        metrics.perplexity(log_p, words)
