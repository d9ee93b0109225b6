"""Pareto k-hat of importance weights, batched over datapoints."""

from __future__ import annotations

import math

import torch
from torch import Tensor

MIN_TAIL = 5  # weights; ArviZ's, too
_CHUNK = 256  # datapoints fitted at once: bounds memory to about 20 MB at K = 5000


def khat(log_w: Tensor) -> Tensor:
    r"""The Pareto shape of the right tail of each datapoint's weights.

    The largest :math:`M = \lceil \min(K/5, 3\sqrt K) \rceil` weights are fitted with a generalised
    Pareto distribution. Below 0.5 importance sampling is reliable; up to 0.7 usable; above 0.7 the
    estimate is not to be trusted at this K, and the guide is far from the posterior.

    Args:
        log_w: log-weights ``(K, N)``, any constant added; minus infinity is a weight of zero.

    Returns:
        ``(N,)``, float64, on the CPU. NaN for K <= 20 (a tail of four points cannot be fitted) and
        where a weight is NaN or infinite, or all are zero; 0 where the weights are constant up to
        rounding (an exact guide: there is no tail), which is never more than half a nat; infinite
        where fewer than five weights of the tail differ from its threshold.

    Source: Vehtari, Simpson, Gelman, Yao & Gabry, Pareto Smoothed Importance Sampling, 2024; the
    fit of Zhang & Stephens, 2009, with the weakly informative prior on k. Equal to ArviZ's.

    Example:
        >>> import torch
        >>> from ppvae import diagnostics
        >>> _ = torch.manual_seed(0)
        >>> pareto = -0.9 * torch.rand(4000, 100, dtype=torch.float64).log()  # tail index 0.9
        >>> round(diagnostics.khat(pareto).mean().item(), 1)
        0.9
    """
    if not isinstance(log_w, Tensor):
        raise TypeError(f"log_w must be a tensor (K, N), got {type(log_w).__name__}")
    if log_w.dim() != 2 or not log_w.is_floating_point():
        seen = f"{log_w.dtype} {tuple(log_w.shape)}"
        raise ValueError(f"log_w must hold log-weights, real numbers (K, N), got {seen}")
    log_w, tail = log_w.detach(), tail_length(log_w.shape[0])
    if tail < MIN_TAIL:
        return torch.full((log_w.shape[1],), math.nan, dtype=torch.float64)
    high, low = log_w.amax(0), log_w.amin(0)
    # Of an infinite range, rounding says nothing.
    unit = torch.finfo(log_w.dtype).eps * torch.maximum(high.abs(), low.abs()).clamp(min=1)
    # Sums of many terms are off by a few units. Far from 0 a unit is a part of a nat, and what
    # varies by more than half a nat is not called constant, however little of log w it is.
    rounding = torch.minimum(64 * unit, (8 * unit).clamp(0.1, 0.5))
    constant = ((high - low <= rounding) & low.isfinite()).cpu()
    undefined = ~high.isfinite().cpu()
    # Only the tail leaves the device. In ascending order, its first value is the threshold.
    largest = log_w.T.topk(tail + 1, dim=1).values.flip(1).double().cpu()
    largest = largest - largest[:, -1:]
    threshold = largest[:, :1].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    excess = largest[:, 1:].exp() - threshold.exp()
    above = largest[:, 1:] > threshold
    k = torch.empty(len(largest), dtype=torch.float64)
    # Ties with the threshold shorten a row's tail, so rows are fitted by the length of theirs.
    for length in above.sum(1).unique().tolist():
        for index in (above.sum(1) == length).nonzero().squeeze(1).split(_CHUNK):
            k[index] = _shape(excess[index, tail - length :]) if length >= MIN_TAIL else math.inf
    return k.masked_fill(constant, 0.0).masked_fill(undefined, math.nan)


def tail_length(num_particles: int) -> int:
    """How many of K weights the Pareto distribution is fitted to."""
    return math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))


def _shape(excess: Tensor) -> Tensor:
    """Empirical-Bayes shape of a generalised Pareto tail, ``(rows, M)`` ascending excesses."""
    M = excess.shape[1]
    num_grid = 30 + int(math.sqrt(M))
    quartile = excess[:, int(M / 4 + 0.5) - 1, None]
    grid = torch.arange(1, num_grid + 1, dtype=excess.dtype) - 0.5
    b = (1 - (num_grid / grid).sqrt()) / (3 * quartile) + 1 / excess[:, -1:]
    k = torch.log1p(-b.unsqueeze(2) * excess.unsqueeze(1)).mean(2)
    profile = M * (torch.log(-b / k) - k - 1)
    weights = torch.softmax(profile, 1)
    weights = weights.where(weights >= 10 * torch.finfo(excess.dtype).eps, 0.0)
    b_mean = (b * weights).sum(1) / weights.sum(1)
    k_mean = torch.log1p(-b_mean[:, None] * excess).mean(1)
    return (M * k_mean + 10 * 0.5) / (M + 10)
