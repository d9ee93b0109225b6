"""Errors of a classifier."""

from __future__ import annotations

from typing import Any

import numpy as np

from ppvae.metrics.arrays import host


def error_rate(scores: Any, labels: Any) -> float:
    r"""Share of rows whose most probable class is not their own, in [0, 1].

    .. math:: \frac1N \sum_n 1\Big[\operatorname*{arg\,max}_c s_{nc} \neq y_n\Big]

    Args:
        scores: ``(N, C)``: probabilities, logits, or anything that is larger where a class is more
            likely, such as ``guide.classes(x).logits``.
        labels: ``(N,)`` whole numbers, 0 to C - 1.

    Raises:
        ValueError: shapes that do not fit, nothing given, scores that are NaN, or labels outside 0
            to C - 1, such as the -1 of rows without one.

    Example:
        >>> error_rate([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], [0, 0, 1])
        0.3333333333333333
    """
    s, y = host(scores), host(labels)
    if s.ndim != 2 or y.shape != s.shape[:1] or not len(y):
        raise ValueError(
            f"scores has shape {s.shape} and labels {y.shape}: give (N, C) scores of C classes, "
            "and one label for each row, (N,)"
        )
    if np.isnan(s).any():
        raise ValueError(f"scores has NaN in {int(np.isnan(s).any(1).sum())} of {len(s)} rows")
    bad = (y != np.round(y)) | (y < 0) | (y >= s.shape[1])
    if bad.any():
        raise ValueError(
            f"labels must be whole numbers, 0 to {s.shape[1] - 1}, not {y[bad][:5]}: count errors "
            "on rows whose class is known"
        )
    return float((s.argmax(1) != y).mean())
