"""Perplexity of documents, by both definitions in use."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ppvae.metrics.arrays import host


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
    values, words = host(log_p, np.float64), host(num_words, np.float64)
    _check(values, words)
    rates = -values / words
    per_document, corpus = rates.mean(), -values.sum() / words.sum()
    if max(per_document, corpus) > np.log(np.finfo(np.float64).max):
        seen = f"log_p is {rates.max():.4g} nats below 0 per word for document {rates.argmax()}"
        cure = "the model diverged, or num_words belongs to other documents"
        raise ValueError(f"{seen}, too much for exp: {cure}")
    return Perplexity(float(np.exp(per_document)), float(np.exp(corpus)))


def _check(values: np.ndarray, words: np.ndarray) -> None:
    if values.ndim != 1 or values.shape != words.shape or not len(values):
        seen = f"log_p has shape {values.shape} and num_words {words.shape}"
        raise ValueError(f"{seen}: give one number of each per document, (D,)")
    faults = [
        ("log_p", "NaN or infinite values", ~np.isfinite(values)),
        ("num_words", "NaN or infinite values", ~np.isfinite(words)),
        ("num_words", "documents without words", words < 1),
    ]
    for name, what, bad in faults:
        if bad.any():
            raise ValueError(f"{name} has {bad.sum()} {what}, the first is document {bad.argmax()}")
