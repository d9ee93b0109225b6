"""Quadrature over one or two latents: log p(x) and posterior moments to rounding error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ppvae.diagnostics.joint import Joint
from ppvae.diagnostics.rows import bound
from ppvae.pairs import seeded

COARSE, ROUNDS, EDGE = 48, 8, 36.0  # nats below the mode at which a density is cut: 2e-16


@dataclass(frozen=True)
class Quadrature:
    """log p(x) and posterior moments of N datapoints by a grid. All float64, on the CPU.

    Attributes:
        log_evidence: ``(N,)``, log p(x), nats.
        error: ``(N,)``, how far it moved when every second point was left out, nats: the true
            error is far smaller while this is small.
        mean: ``(N, D)``, posterior mean of the unconstrained latents (of the latents themselves
            where their support is the real line).
        covariance: ``(N, D, D)``.
        axes: ``(N, D, G)``, the grid's coordinates.
        log_density: ``(N, G)`` or ``(N, G, G)``, log p(u | x) on it; the first axis is the first
            latent.
    """

    log_evidence: Tensor
    error: Tensor
    mean: Tensor
    covariance: Tensor
    axes: Tensor = field(repr=False)
    log_density: Tensor = field(repr=False)

    @property
    def sd(self) -> Tensor:
        """Posterior standard deviations, ``(N, D)``."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).sqrt()

    def __repr__(self) -> str:
        N, D, G = self.axes.shape
        return (
            f"Quadrature of {N} datapoints on {G}{f' x {G}' if D == 2 else ''} points [nats per "
            f"datapoint]\nlog p(x)  {self.log_evidence.mean().item():.4f}, error at most "
            f"{self.error.max().item():.1e} on refining"
        )


def quadrature(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_points: int = 161,
    tolerance: float = 1e-3,
    max_rows: int = 20_000,
    seed: int | None = 0,
    **kwargs: Any,
) -> Quadrature:
    r"""log p(x) and the moments of p(z | x) by the trapezoidal rule, for one or two latents.

    .. math:: \log p(x) = \log \int p(x, u)\, du \approx \log \sum_g h\, p(x, u_g)

    The grid of each datapoint begins around draws of the prior and of the guide, and grows or
    shrinks until the density has fallen by 36 nats at every edge. On a smooth density that is cut
    so far out the rule converges faster than any power of the number of points, to the rounding
    error of the model's dtype.

    Args:
        model, guide, args: as in :func:`~ppvae.diagnostics.hmc`; D <= 2 unconstrained latents per
            datapoint.
        num_points: G, points per axis, odd and >= 33; G^D evaluations per datapoint.
        tolerance: largest ``error`` allowed, nats.
        max_rows: largest number of evaluations at once.
        seed: of the draws that say where to look first.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`~ppvae.diagnostics.Quadrature`.

    Raises:
        ValueError: more than two latents; a posterior so narrow, or so many modes, that the grid
            does not resolve it (which datapoint); as :func:`~ppvae.diagnostics.hmc`.

    Source: Trefethen & Weideman, The exponentially convergent trapezoidal rule, 2014.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0., 1.))
        >>> x = torch.tensor([0., 2.], dtype=torch.float64)
        >>> result = diagnostics.quadrature(model, guide, x)
        >>> exact = dist.Normal(0., 2 ** 0.5).log_prob(x)
        >>> bool(((result.log_evidence - exact).abs() < 1e-5).all())  # float32
        True
        >>> result.mean[1]
        tensor([1.0000], dtype=torch.float64)
    """
    model, guide = bound(model, guide, kwargs)
    if num_points < 33 or num_points % 2 == 0:
        raise ValueError(f"num_points must be odd and at least 33, got {num_points}")
    joint = Joint(model, guide, *args)
    if joint.dim > 2:
        raise ValueError(
            f"quadrature is for one or two latents, and this model has {joint.dim} per datapoint; "
            "use diagnostics.ais or diagnostics.hmc"
        )
    with seeded(seed, *args), torch.no_grad():
        parts = [_integrate(block, num_points, max_rows) for _, block in joint.blocks(1, 64)]
    result = Quadrature(*(torch.cat(column) for column in zip(*parts, strict=True)))
    bad = (~(result.error <= tolerance)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"the grid does not resolve the posterior of {len(bad)} datapoints: log p(x) of "
            f"datapoint {bad[0]} moved by {result.error[bad[0]].item():.2g} nats on refining; "
            f"raise num_points={num_points}, or use diagnostics.ais"
        )
    return result


def _integrate(joint: Joint, num_points: int, max_rows: int) -> tuple[Tensor, ...]:
    N, D = joint.num_datapoints, joint.dim
    draws = torch.cat([joint.draw_prior(500), joint.draw_q(500)])
    joint.require_finite(draws[:1], "prior")
    low, high = draws.amin(0), draws.amax(0)  # (N, D)
    middle, half = (low + high) / 2, 0.75 * (high - low) + 1e-6

    for _ in range(ROUNDS):
        axes = _axes(middle, half, COARSE)
        middle, half, settled = _box(axes, _evaluate(joint, axes, max_rows))
        if settled:
            break
    axes = _axes(middle, half, num_points)
    values = _evaluate(joint, axes, max_rows).double().cpu()
    axes = axes.double().cpu()

    log_evidence = _log_integral(axes, values)
    coarse = _log_integral(axes[..., ::2], values[(slice(None), *[slice(None, None, 2)] * D)])
    log_density = values - log_evidence.reshape(N, *[1] * D)
    mass = log_density.flatten(1).softmax(-1)
    points = _points(axes)  # (G^D, N, D)
    mean = torch.einsum("ng,gnd->nd", mass, points)
    centred = points - mean
    covariance = torch.einsum("ng,gnd,gne->nde", mass, centred, centred)
    return log_evidence, (log_evidence - coarse).abs(), mean, covariance, axes, log_density


def _axes(middle: Tensor, half: Tensor, count: int) -> Tensor:
    """Evenly spaced coordinates, ``(N, D, G)``."""
    grid = torch.linspace(-1, 1, count, dtype=middle.dtype, device=middle.device)
    return middle.unsqueeze(-1) + half.unsqueeze(-1) * grid


def _points(axes: Tensor) -> Tensor:
    """All points of the grids, ``(G^D, N, D)``, the last axis fastest."""
    _, D, G = axes.shape
    index = torch.cartesian_prod(*[torch.arange(G, device=axes.device)] * D).reshape(-1, D)
    return torch.stack([axes[:, d, index[:, d]] for d in range(D)], -1).transpose(0, 1)


def _evaluate(joint: Joint, axes: Tensor, max_rows: int) -> Tensor:
    """log p(x, u) on the grids, ``(N, G)`` or ``(N, G, G)``; -inf where it is NaN."""
    N, D, G = axes.shape
    parts = [joint(u) for u in _points(axes).split(max(1, max_rows // N))]
    values = torch.cat(parts).T.reshape(N, *[G] * D)
    return torch.where(values.isnan(), -math.inf, values)


def _box(axes: Tensor, values: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Middle and half width of the box that lies within ``EDGE`` nats of the peak, ``(N, D)``."""
    N, D, G = axes.shape
    inside = values > values.flatten(1).amax(-1).reshape(N, *[1] * D) - EDGE
    step = axes[..., 1] - axes[..., 0]
    low, high, settled = [], [], True
    for d in range(D):
        other = [i + 1 for i in range(D) if i != d]
        along = inside.any(other[0]) if other else inside  # (N, G)
        index = torch.arange(G, device=axes.device)
        first = torch.where(along, index, G).amin(-1)
        last = torch.where(along, index, -1).amax(-1)
        # Where the density reaches the edge, go twice as far; elsewhere keep one point of margin.
        out_low, out_high = first == 0, last == G - 1
        span = axes[:, d, -1] - axes[:, d, 0]
        left = axes[:, d].gather(-1, first.unsqueeze(-1)).squeeze(-1) - step[:, d]
        right = axes[:, d].gather(-1, last.unsqueeze(-1)).squeeze(-1) + step[:, d]
        low.append(torch.where(out_low, left - span / 2, left))
        high.append(torch.where(out_high, right + span / 2, right))
        fits = ~out_low & ~out_high & (last - first >= G // 2)
        settled = settled and bool(fits.all())
    bottom, top = torch.stack(low, -1), torch.stack(high, -1)
    return (bottom + top) / 2, (top - bottom) / 2, settled


def _log_integral(axes: Tensor, values: Tensor) -> Tensor:
    log_cell = (axes[..., 1] - axes[..., 0]).log().sum(-1)
    return values.flatten(1).logsumexp(-1) + log_cell
