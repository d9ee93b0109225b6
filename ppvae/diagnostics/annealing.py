"""Annealing between a tractable distribution and the posterior: what AIS and its reverse share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.chains import Point
from ppvae.diagnostics.evidence import Estimates, log_mean_weight
from ppvae.diagnostics.hmc import leapfrog
from ppvae.diagnostics.joint import Joint, traced
from ppvae.diagnostics.rows import check_at_least, check_start

TARGET_ACCEPT = 0.8
REFRESH = 10  # transitions at the posterior that separate chains started at one exact draw


@takes_numbers(num_temperatures=1)
def sigmoid_schedule(num_temperatures: int, delta: float = 4.0) -> Tensor:
    r"""Inverse temperatures from 0 to 1, dense at both ends, ``(T + 1,)``.

    .. math:: \beta_t = \frac{\sigma(\delta (2t/T - 1)) - \sigma(-\delta)}
              {\sigma(\delta) - \sigma(-\delta)}

    Source: Grosse, Ghahramani & Adams, 2015.

    Example:
        >>> sigmoid_schedule(4)
        tensor([0.0000, 0.1050, 0.5000, 0.8950, 1.0000], dtype=torch.float64)
    """
    grid = torch.linspace(-delta, delta, num_temperatures + 1, dtype=torch.float64).sigmoid()
    return (grid - grid[0]) / (grid[-1] - grid[0])


@dataclass(frozen=True)
class AnnealedEvidence(Estimates):
    """A stochastic bound on log p(x) for each of N datapoints, from C annealed chains.

    Attributes:
        log_evidence: ``(N,)``, nats. ``side`` says what it is: ``"lower"``: its expectation is at
            most log p(x); ``"upper"``: at least.
        log_evidence_se: ``(N,)``, its Monte-Carlo standard error (delta method over chains); too
            small where ``ess`` is a few chains, or where chains share their start.
        ess: ``(N,)``, effective number of chains, between 1 and C.
        log_w: ``(C, N)``: the log-weights of the chains, of p(x) or, for "upper", of 1 / p(x).
        accept: ``(N,)``, mean acceptance of the transitions.
        side: ``"lower"`` or ``"upper"``.
        note: how it was made, and under what it holds.
    """

    log_w: Tensor = field(repr=False)
    accept: Tensor
    side: Literal["lower", "upper"]
    note: str

    def __repr__(self) -> str:
        C, N = self.log_w.shape
        return (
            f"Annealed importance sampling of {N} datapoints [nats per datapoint]\n"
            f"log p(x)  {self.mean:.2f} ± {self.mean_mc_se:.3f} Monte Carlo, a stochastic "
            f"{self.side} bound: {self.note}\n"
            f"chains    {C}, effective {self.ess.median().item():.1f} (median), acceptance "
            f"{self.accept.mean().item():.2f}"
        )


class Annealing:
    """How chains are annealed: from where, and through which temperatures.

    Arguments are those of :func:`ppvae.diagnostics.ais`; what cannot work raises ``ValueError``.

    Attributes:
        betas: the inverse temperatures, from 0 to 1.
    """

    def __init__(
        self,
        start: str,
        num_chains: int,
        num_temperatures: int,
        num_leapfrog: int,
        temperatures: Tensor | None,
        max_rows: int,
    ) -> None:
        check_at_least(2, num_chains=num_chains)
        check_at_least(1, num_leapfrog=num_leapfrog)
        check_start(start)
        self.betas = _schedule(temperatures, num_temperatures)
        self.start, self.num_chains, self.num_leapfrog = start, num_chains, num_leapfrog
        check_at_least(1, max_rows=max_rows)
        self.max_rows = max_rows

    def paths(self, joint: Joint) -> Iterator[tuple[slice, Path]]:
        """Slices of datapoints with the path of each, as large as ``max_rows`` allows."""
        for part, block in joint.blocks(self.num_chains, self.max_rows):
            yield part, Path(block, self.start, self.betas, self.num_leapfrog, self.num_chains)

    def __str__(self) -> str:
        return f"{len(self.betas) - 1} temperatures"


def _schedule(temperatures: Tensor | None, num_temperatures: int) -> Tensor:
    """The temperatures asked for, or the sigmoid schedule; raises unless they rise from 0 to 1."""
    if temperatures is None:
        check_at_least(1, num_temperatures=num_temperatures)
        return sigmoid_schedule(num_temperatures)
    try:
        betas = torch.as_tensor(temperatures, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise TypeError(
            f"temperatures must be numbers from 0 to 1, a tensor (T + 1,): {error}"
        ) from error
    if betas.layout != torch.strided:
        raise TypeError("temperatures is sparse: give temperatures.to_dense()")
    if betas.dim() != 1 or len(betas) < 2 or betas[0] != 0 or betas[-1] != 1:
        raise ValueError("temperatures must be one-dimensional and go from 0 to 1")
    if not (betas.diff() > 0).all():
        raise ValueError("temperatures must rise: each larger than the one before")
    return betas


class Path:
    """The distributions between r(u) and p(u | x) of a block of datapoints, with a pilot run."""

    def __init__(
        self, joint: Joint, start: str, betas: Tensor, num_leapfrog: int, num_chains: int
    ) -> None:
        self.joint, self.start, self.num_leapfrog = joint, start, num_leapfrog
        self.betas = betas.tolist()
        self.graphs: dict[tuple[int, ...], Callable[..., Any]] = {}
        self._pilot(max(num_chains, 8))

    def draw(self, num_chains: int) -> Tensor:
        """Draws of r, ``(C, N, D)``."""
        guide = self.start == "guide"
        u = self.joint.draw_q(num_chains) if guide else self.joint.draw_prior(num_chains)
        self.joint.require_finite(u, self.start)
        return u

    def ends(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log r(u) and log p(x, u), each ``(C, N)``."""
        if self.start == "prior":
            return self.joint.prior_and_joint(u)
        return self.joint.log_q(u), self.joint(u)

    def run(self, u: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        """Log-weights ``(C, N)`` and mean acceptance ``(N,)`` of chains from u."""
        levels = range(len(self.betas))
        order = list(reversed(levels)) if reverse else list(levels)
        log_w = torch.zeros(u.shape[:2], dtype=torch.float64, device=u.device)
        accept = u.new_zeros(u.shape[1])
        for previous, level in itertools.pairwise(order):
            value, gradient, ratio = self._mixture_at(u, level)
            log_w += (self.betas[level] - self.betas[previous]) * ratio.double()
            if level != order[-1]:
                u, accepted = self._move(Point(u, value, gradient), level)
                accept += accepted
        return log_w, accept / max(1, len(order) - 2)

    def refreshed(self, u: Tensor) -> Tensor:
        """Chains moved by transitions that leave the posterior invariant."""
        last = len(self.betas) - 1
        for _ in range(REFRESH):
            u, _ = self._move(Point(u, *self._mixture_at(u, last)[:2]), last)
        return u

    def _mixture(self, u: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log pi of inverse temperature beta, its gradient, and log p(x, u) / r(u)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            base, joint = self.ends(u)
            value = base + beta * (joint - base)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient, (joint - base).detach()

    def _mixture_at(self, u: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = tuple(u.shape)
        beta = u.new_full((1,), self.betas[level])
        if shape not in self.graphs:
            self.graphs[shape] = traced(self._mixture, u, beta)
        value, gradient, ratio = self.graphs[shape](u, beta)
        return value, gradient, ratio

    def _move(self, point: Point, level: int) -> tuple[Tensor, Tensor]:
        point, accepted, _ = leapfrog(
            lambda u: self._mixture_at(u, level)[:2],
            point,
            self.steps[level],
            self.scales[level],
            self.num_leapfrog,
        )
        return point.u, accepted.mean(0)

    def _pilot(self, num_chains: int) -> None:
        """Step sizes and scales at each temperature, from runs that are thrown away."""
        last = len(self.betas) - 1
        first = self.draw(200).std(0)
        first = first.clamp(min=1e-4 * first.max())
        self.scales = [first] * (last + 1)
        begin = first.new_full(first.shape[:1], 0.5 * self.joint.dim**-0.25)
        # A coarse run, to see how far the posterior spreads ...
        coarse = range(1, last + 1, max(1, last // 50))
        u, _ = self._adapt(self.draw(num_chains), begin, [*coarse, *[last] * 2 * REFRESH])
        spread = u.std(0).clamp(min=1e-3 * first)
        # ... of which the normal distributions between the ends have these scales.
        precisions = [(1 - beta) / first.square() + beta / spread.square() for beta in self.betas]
        self.scales = [precision.rsqrt() for precision in precisions]
        _, steps = self._adapt(
            self.draw(num_chains), begin, [*range(1, last + 1), *[last] * REFRESH]
        )
        logs = torch.stack(steps).log().T.unsqueeze(1)  # (N, 1, T)
        width = min(9, 2 * ((last - 1) // 2) + 1)
        padded = F.pad(logs, (width // 2, width // 2), mode="replicate")
        smooth = F.avg_pool1d(padded, width, 1).squeeze(1).T.exp()
        self.steps = [begin, *smooth[: last - 1], steps[-1]]

    def _adapt(self, u: Tensor, step: Tensor, levels: list[int]) -> tuple[Tensor, list[Tensor]]:
        """Move through the levels, and correct the step sizes ``(N,)`` after each."""
        steps = []
        for level in levels:
            self.steps = [step] * len(self.betas)
            u, accepted = self._move(Point(u, *self._mixture_at(u, level)[:2]), level)
            step = step * (0.7 * (accepted - TARGET_ACCEPT)).exp()
            steps.append(step)
        return u, steps


def annealed_evidence(
    parts: list[tuple[Tensor, Tensor]], side: Literal["lower", "upper"], note: str
) -> AnnealedEvidence:
    """The evidence from log-weights and acceptances of blocks of datapoints."""
    log_w = torch.cat([w for w, _ in parts], 1).cpu()
    accept = torch.cat([accepted for _, accepted in parts]).double().cpu()
    log_mean, se, ess = log_mean_weight(log_w)
    return AnnealedEvidence(
        log_mean if side == "lower" else -log_mean, se, ess, log_w, accept, side, note
    )
