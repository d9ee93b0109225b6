"""Held-out log-evidence by importance sampling from the guide, per datapoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.check import check_tensors
from ppvae.diagnostics.psis import khat
from ppvae.pairs import evaluation_mode, seeded
from ppvae.weights import log_weights


@dataclass(frozen=True)
class Evidence:
    """Importance-sampling estimates per datapoint, each ``(N,)``, float64, on the CPU.

    Attributes:
        log_evidence: estimate of log p(x), nats; its expectation is IWELBO-K, a lower bound.
        log_evidence_se: its Monte-Carlo standard error (delta method), nats; unreliable where
            ``khat`` exceeds 0.7.
        ess: effective sample size of the weights, between 1 and K.
        khat: Pareto shape of the weights' tail, see :func:`ppvae.diagnostics.khat`.
        elbo: the evidence lower bound from the same draws, nats.
        num_particles: K.
    """

    log_evidence: Tensor
    log_evidence_se: Tensor
    ess: Tensor
    khat: Tensor
    elbo: Tensor
    num_particles: int

    @property
    def mean(self) -> float:
        """Mean log p(x), nats per datapoint."""
        return self.log_evidence.mean().item()

    @property
    def mean_se(self) -> float:
        """Standard error of :attr:`mean` over datapoints (NaN for one)."""
        N = len(self.log_evidence)
        return self.log_evidence.std().item() / math.sqrt(N) if N > 1 else math.nan

    @property
    def mean_mc_se(self) -> float:
        """Monte-Carlo standard error of :attr:`mean` for these very datapoints."""
        return self.log_evidence_se.square().sum().sqrt().item() / len(self.log_evidence)

    def __repr__(self) -> str:
        bad = (self.khat > 0.7).double().mean().item()
        return "\n".join(
            [
                f"Evidence of {len(self.log_evidence)} datapoints, K = {self.num_particles} "
                "particles [nats per datapoint]",
                f"log p(x)  {self.mean:.2f} ± {self.mean_se:.2f} over datapoints, "
                f"± {self.mean_mc_se:.3f} Monte Carlo",
                f"ELBO      {self.elbo.mean().item():.2f}  "
                f"(gap {self.mean - self.elbo.mean().item():.2f})",
                f"ESS       median {self.ess.median().item():.0f} of {self.num_particles}",
                f"k-hat     median {self.khat.median().item():.2f}, "
                f"above 0.7 on {bad:.0%} of points",
            ]
        )


def log_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    max_rows: int = 10_000,
    seed: int | None = None,
) -> Evidence:
    r"""Estimate log p(x) of every datapoint by importance sampling from the guide.

    .. math:: \widehat{\log p}(x) = \log \frac 1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}

    Its expectation is the IWELBO of K particles: a lower bound, that K = 5000 makes tight for a
    good guide. For a conditional pair, called with ``x, y``, it is log p(x | y). Programs run in
    evaluation mode.

    Args:
        model, guide: Pyro programs; ``guides.Prior(model)`` as guide gives plain Monte Carlo.
        *args: data, as both are called; the first dimension of each tensor is the datapoints.
        num_particles: K >= 2.
        max_rows: largest number of (particle, datapoint) rows computed at once, which bounds the
            memory: with a 784-200-200-784 decoder 10,000 rows take about 0.2 GB.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.

    Returns:
        :class:`Evidence`.

    Raises:
        ValueError: NaN, infinite or empty data; fewer than two particles; the pair does not fit.

    Source: Rezende, Mohamed & Wierstra 2014, appendix E; Burda et al. 2016.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.))  # too wide
        >>> x = torch.tensor([0., 2.])
        >>> result = diagnostics.log_evidence(model, guide, x, num_particles=5000, seed=0)
        >>> exact = dist.Normal(0., 2 ** 0.5).log_prob(x)
        >>> bool(((result.log_evidence - exact).abs() < 4 * result.log_evidence_se).all())
        True
    """
    if num_particles < 2:
        raise ValueError(
            f"num_particles must be at least 2 for a standard error, got {num_particles}"
        )
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    check_tensors(model, args)
    rows = next((len(arg) for arg in args if isinstance(arg, Tensor)), 0)
    if rows == 0:
        raise ValueError("no data: call log_evidence(model, guide, x), with tensors")
    particles = min(num_particles, max_rows)
    datapoints = max(1, max_rows // particles)
    chunks = []
    with torch.no_grad(), evaluation_mode(model, guide):
        with seeded(seed, *args):
            for start in range(0, rows, datapoints):
                part = [
                    arg[start : start + datapoints] if isinstance(arg, Tensor) else arg
                    for arg in args
                ]
                drawn = [
                    log_weights(model, guide, *part, num_particles=size).log_w
                    for size in _sizes(num_particles, particles)
                ]
                chunks.append(_summary(torch.cat(drawn)))
    value, se, ess, k, elbo = (torch.cat(column) for column in zip(*chunks, strict=True))
    return Evidence(value, se, ess, k, elbo, num_particles)


def _sizes(total: int, at_once: int) -> list[int]:
    full, rest = divmod(total, at_once)
    return [at_once] * full + ([rest] if rest else [])


def _summary(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    k = khat(log_w)
    log_w = log_w.double().cpu()
    K = log_w.shape[0]
    log_mean = torch.logsumexp(log_w, 0) - math.log(K)
    relative = (log_w - log_mean).exp()  # w / mean(w)
    ess = K / relative.square().mean(0)
    se = (relative.var(0) / K).sqrt()
    return log_mean, se, ess, k, log_w.mean(0)
