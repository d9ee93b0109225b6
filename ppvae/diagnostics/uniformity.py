"""Are ranks uniform? Pearson's test, and the band that a whole ECDF stays in."""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor


def chi_square(ranks: Tensor, num_draws: int) -> Tensor:
    """The p-value of Pearson's test that ranks ``(S, D)`` are uniform on 0 .. L, ``(D,)``.

    In as many even bins as divide L + 1, at most 20, with at least 5 expected in each.
    """
    from scipy.stats import chisquare

    S = len(ranks)
    bins = max(b for b in range(1, 21) if (num_draws + 1) % b == 0 and (b == 1 or S / b >= 5))
    if bins == 1:
        raise ValueError(
            f"{num_draws + 1} ranks cannot be put in even bins: choose num_draws so that "
            "num_draws + 1 has divisors, e.g. 99"
        )
    binned = ranks // ((num_draws + 1) // bins)
    counts = torch.nn.functional.one_hot(binned, bins).sum(0)  # (D, bins)
    return torch.from_numpy(chisquare(counts.numpy(), axis=-1).pvalue)


@functools.lru_cache(maxsize=32)
def ecdf_band(
    num_simulations: int, num_draws: int, level: float = 0.95, repeats: int = 2000
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The simultaneous band of the ECDF of uniform ranks.

    Pointwise binomial intervals, all of the one level at which the whole ECDF stays inside with
    probability ``level``; that level is found from simulated ECDFs.

    Returns:
        ``(points, lower, upper)``, ``(L,)`` each, fractions: at ``points`` = (r + 1) / (L + 1) the
        ECDF is the share of ranks up to r.

    Source: Säilynoja, Bürkner & Vehtari, Graphical test for discrete uniformity and its
    applications in goodness-of-fit evaluation and multiple sample comparison, 2022, section 2.2.

    Example:
        >>> points, lower, upper = ecdf_band(500, 99)
        >>> bool((lower <= points).all() and (points <= upper).all())
        True
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie in (0, 1), got {level}")
    from scipy.stats import binom

    random = np.random.default_rng(0)
    counts = random.multinomial(
        num_simulations, np.full(num_draws + 1, 1 / (num_draws + 1)), size=repeats
    )
    below = counts.cumsum(1)[:, :-1]  # (repeats, L)
    points = np.arange(1, num_draws + 1) / (num_draws + 1)
    tails = np.minimum(
        binom.cdf(below, num_simulations, points), binom.sf(below - 1, num_simulations, points)
    )
    pointwise = np.quantile(2 * tails.min(1), 1 - level, method="lower")
    lower = binom.ppf(pointwise / 2, num_simulations, points) / num_simulations
    upper = binom.isf(pointwise / 2, num_simulations, points) / num_simulations
    return points, lower, upper


def departure(ranks: Tensor, num_draws: int) -> str:
    """How ranks depart from uniformity: "narrow", "wide", "shifted" or "other"."""
    place = (ranks.double() + 0.5) / (num_draws + 1) - 0.5
    S = len(place)
    slope = place.mean().item() * math.sqrt(12 * S)  # standard errors
    spread = (place.square().mean().item() - 1 / 12) * math.sqrt(180 * S)
    if max(abs(slope), abs(spread)) < 3:
        return "other"
    if abs(slope) > abs(spread):
        return "shifted"
    return "narrow" if spread > 0 else "wide"
