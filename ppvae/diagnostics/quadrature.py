"""Quadrature over one or two latents: log p(x) and posterior moments to rounding error."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.joint import Joint
from ppvae.diagnostics.rows import bound
from ppvae.intake import takes_rows
from ppvae.pairs import seeded

EDGE = 36.0  # nats below the highest mode at which a density is cut: 2e-16
COUNTS = 30.0  # nats below it down to which a mode is given points
COARSE, ROUNDS = 49, 12  # points per axis of the grid that finds how far a mode reaches
SCANNED, STARTS, CLIMBS = 2304, 24, 60  # points where modes are looked for; steps uphill
MOST_MODES = 16


@dataclass(frozen=True)
class Quadrature:
    """log p(x) and posterior moments of N datapoints by a grid. All float64, on the CPU.

    Attributes:
        log_evidence: ``(N,)``, log p(x), nats.
        error: ``(N,)``, how far it moved when every second point was left out, nats: the true
            error is far smaller while this is small. Infinite where a mode that was found lies
            between the points, or where the density does not fall off.
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


@takes_numbers
@takes_rows
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

    A scan over where prior and guide have mass, and draws of both, give the points to climb from.
    Around each mode that is found and counts, a box grows or shrinks until the density has fallen
    by 36 nats at every edge; the grid of a datapoint covers all its boxes. On a smooth density that
    is cut so far out the rule converges faster than any power of the number of points, to the
    rounding error of the model's dtype. Modes that are far apart for their width take many points:
    it is said how many.

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
        ValueError: more than two latents; modes so narrow for their distance that the grid does
            not resolve them (which datapoint, how many points would); as
            :func:`~ppvae.diagnostics.hmc`.

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
    if not tolerance > 0:
        raise ValueError(f"tolerance must be positive, got {tolerance}")
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
    narrow, *columns = (torch.cat(column) for column in zip(*parts, strict=True))
    result = Quadrature(*columns)
    bad = (~(result.error <= tolerance)).nonzero().flatten().tolist()
    if bad:
        moved = result.error[bad[0]].item()
        seen = f"moved by {moved:.2g} nats on refining" if moved < math.inf else "lacks a part"
        points = max(round(num_points / narrow[bad].min().item()), 2 * num_points) // 2 * 2 + 1
        raise ValueError(
            f"the grid does not resolve the posterior of {len(bad)} datapoints: log p(x) of "
            f"datapoint {bad[0]} {seen}; raise num_points={num_points} to {points}, say, or use "
            "diagnostics.ais"
        )
    return result


def _integrate(joint: Joint, num_points: int, max_rows: int) -> tuple[Tensor, ...]:
    """The columns of :class:`Quadrature`, behind the narrowest mode's share of the grid."""
    N, D = joint.num_datapoints, joint.dim
    u, height, scale = _look(joint, max_rows)
    middle, half, narrow = _all_modes(joint, u, height, scale, max_rows)
    axes = _axes(middle, half, num_points)
    values = _evaluate(joint, axes, max_rows)
    missed = _between(axes, values, u, height) | _open(values)
    values, axes = values.double().cpu(), axes.double().cpu()

    log_evidence = _log_integral(axes, values)
    coarse = _log_integral(axes[..., ::2], values[(slice(None), *[slice(None, None, 2)] * D)])
    error = torch.where(missed.cpu(), math.inf, (log_evidence - coarse).abs())
    log_density = values - log_evidence.reshape(N, *[1] * D)
    mass = log_density.flatten(1).softmax(-1)
    points = _points(axes)  # (G^D, N, D)
    mean = torch.einsum("ng,gnd->nd", mass, points)
    centred = points - mean
    covariance = torch.einsum("ng,gnd,gne->nde", mass, centred, centred)
    return narrow.double().cpu(), log_evidence, error, mean, covariance, axes, log_density


# -- where the density lies ----------------------------------------------------------------------


def _look(joint: Joint, max_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Points ``(M, N, D)``, log p(x, u) there ``(M, N)``, and the width of a scan, ``(N, D)``.

    The points are draws of prior and guide, and the tops reached from the highest of these and of
    a scan: a narrow mode is found by its slopes, or because it is drawn from.
    """
    D = joint.dim
    draws = torch.cat([joint.draw_prior(500), joint.draw_q(500)])
    joint.require_finite(draws[:1], "prior")
    drawn = _at(joint, draws, max_rows)
    low, high = draws.amin(0), draws.amax(0)  # (N, D)
    axes = _axes((low + high) / 2, 0.75 * (high - low) + 1e-6, round(SCANNED ** (1 / D)))
    values = _evaluate(joint, axes, max_rows)
    around = F.max_pool1d if D == 1 else F.max_pool2d
    summit = values == around(values.unsqueeze(1), 3, 1, 1).squeeze(1)
    scanned = torch.where(summit, values, -math.inf).flatten(1).T  # (G^D, N)
    starts = [_highest(_points(axes), scanned), _highest(draws, drawn)]
    u, height = (torch.cat(parts) for parts in zip(*starts, strict=True))
    scale = axes[..., 1] - axes[..., 0]
    u, height = _climb(joint, u, height, scale, max_rows)
    return torch.cat([u, draws]), torch.cat([height, drawn]), scale


def _highest(u: Tensor, height: Tensor) -> tuple[Tensor, Tensor]:
    """The highest points of each datapoint."""
    height, which = height.topk(min(STARTS, len(height)), 0)
    return u.gather(0, which.unsqueeze(-1).expand(-1, -1, u.shape[-1])), height


def _climb(
    joint: Joint, u: Tensor, height: Tensor, scale: Tensor, max_rows: int
) -> tuple[Tensor, Tensor]:
    """Where steps to the best neighbour lead; a step that no neighbour is worth is halved."""
    moves = torch.cartesian_prod(*[torch.tensor([0.0, 1.0, -1.0]).to(u)] * joint.dim)
    moves = moves.reshape(-1, 1, 1, joint.dim)  # the first stays
    step = scale.expand_as(u)
    for _ in range(CLIMBS):
        tried = u + moves * step
        values = _at(joint, tried[1:].flatten(0, 1), max_rows).unflatten(0, (-1, len(u)))
        height, which = torch.cat([height[None], values]).max(0)
        u = tried.gather(0, which[None, ..., None].expand(1, *u.shape))[0]
        step = torch.where(which.unsqueeze(-1) == 0, step / 2, step)
    return u, height


def _all_modes(
    joint: Joint, u: Tensor, height: Tensor, scale: Tensor, max_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Middle and half width ``(N, D)`` of a box around all modes, and the narrowest one's share."""
    best = height.amax(0)
    boxes: list[tuple[Tensor, Tensor]] = []
    left = height > best - COUNTS  # in no box yet
    while left.any() and len(boxes) < MOST_MODES:
        # The highest that is left; where none is, the highest of all once more.
        which = torch.where(left, height, height - 2 * EDGE).argmax(0)
        peak = u[which, torch.arange(len(best), device=u.device)]
        boxes.append(_mode(joint, peak, best - EDGE, scale, max_rows))
        middle, half = boxes[-1]
        left = left & ((u - middle).abs() > half).any(-1)
    low = torch.stack([middle - half for middle, half in boxes]).amin(0)
    high = torch.stack([middle + half for middle, half in boxes]).amax(0)
    narrowest = torch.stack([half for _, half in boxes]).amin(0)
    half = (high - low) / 2
    return (low + high) / 2, half, (narrowest / half).amin(-1)


def _mode(
    joint: Joint, peak: Tensor, floor: Tensor, scale: Tensor, max_rows: int
) -> tuple[Tensor, Tensor]:
    """Middle and half width of a box around a peak, beyond which the density is below ``floor``."""
    D = joint.dim
    sizes = 2.0 ** torch.arange(-40, 20, device=peak.device, dtype=peak.dtype)
    along = torch.eye(D, device=peak.device, dtype=peak.dtype)[:, None, None]  # (D, 1, 1, D)
    steps = along * (sizes[:, None, None] * scale)  # (D, sizes, N, D)
    both = torch.stack([peak + steps, peak - steps])
    values = _at(joint, both.flatten(0, 2), max_rows).unflatten(0, both.shape[:3])
    fallen = (values < floor).all(0).to(torch.uint8)  # (D, sizes, N)
    first = torch.where(fallen.amax(1) > 0, fallen.argmax(1), len(sizes) - 1)
    middle, half = peak, sizes[first].T * scale
    for _ in range(ROUNDS):
        axes = _axes(middle, half, COARSE)
        middle, half, settled = _box(axes, _evaluate(joint, axes, max_rows), floor)
        if settled:
            break
    return middle, half


def _between(axes: Tensor, values: Tensor, u: Tensor, height: Tensor) -> Tensor:
    """Of which datapoints a point that counts is in none of the grid's cells, or rises above one.

    A density that a grid resolves exceeds the corners of a cell by a fraction of a nat.
    """
    _, D, G = axes.shape
    cell = (u - axes[..., 0]) / (axes[..., 1] - axes[..., 0])  # (M, N, D)
    outside = ((cell < 0) | (cell > G - 1)).any(-1)
    first = cell.nan_to_num(0.0).clamp(0, G - 2).long()
    corners = []
    for corner in torch.cartesian_prod(*[torch.arange(2, device=u.device)] * D).reshape(-1, D):
        at = first + corner
        index = at[..., 0] if D == 1 else at[..., 0] * G + at[..., 1]
        corners.append(values.flatten(1).gather(1, index.T).T)
    above = height > torch.stack(corners).amax(0) + 1.0
    return ((outside | above) & (height > height.amax(0) - COUNTS)).any(0)


def _open(values: Tensor) -> Tensor:
    """Of which datapoints the density has not fallen at an edge of the grid, ``(N,)``."""
    highest = values.flatten(1).amax(1)
    edges = [values.select(d, end) for d in range(1, values.dim()) for end in (0, -1)]
    return torch.stack([edge.reshape(len(edge), -1).amax(1) for edge in edges]).amax(0) > (
        highest - COUNTS
    )


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
    return _at(joint, _points(axes), max_rows).T.reshape(N, *[G] * D)


def _at(joint: Joint, u: Tensor, max_rows: int) -> Tensor:
    """log p(x, u), ``(C, N, D)`` to ``(C, N)``; -inf where it is NaN."""
    values = torch.cat([joint(part) for part in u.split(max(1, max_rows // u.shape[1]))])
    return torch.where(values.isnan(), -math.inf, values)


def _box(axes: Tensor, values: Tensor, floor: Tensor) -> tuple[Tensor, Tensor, bool]:
    """Middle and half width of the box around what lies above ``floor``, ``(N, D)``."""
    N, D, G = axes.shape
    floor = torch.minimum(floor, values.flatten(1).amax(-1) - 1)  # something lies above it
    inside = values > floor.reshape(N, *[1] * D)
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
        fits = ~out_low & ~out_high & (last - first >= 3 * G // 4)
        settled = settled and bool(fits.all())
    bottom, top = torch.stack(low, -1), torch.stack(high, -1)
    return (bottom + top) / 2, (top - bottom) / 2, settled


def _log_integral(axes: Tensor, values: Tensor) -> Tensor:
    log_cell = (axes[..., 1] - axes[..., 0]).log().sum(-1)
    return values.flatten(1).logsumexp(-1) + log_cell
