"""Annealed importance sampling: stochastic bounds on log p(x) from below and from above."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ppvae.diagnostics.chains import Point, PosteriorDraws
from ppvae.diagnostics.hmc import leapfrog
from ppvae.diagnostics.joint import Joint, traced
from ppvae.pairs import evaluation_mode, own_path, seeded, simulate

TARGET_ACCEPT = 0.8
REFRESH = 10  # transitions at the posterior that part chains which start from one exact draw


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
class AnnealedEvidence:
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

    log_evidence: Tensor
    log_evidence_se: Tensor
    ess: Tensor
    log_w: Tensor = field(repr=False)
    accept: Tensor
    side: Literal["lower", "upper"]
    note: str

    @property
    def mean(self) -> float:
        """Mean over datapoints, nats per datapoint."""
        return self.log_evidence.mean().item()

    @property
    def mean_mc_se(self) -> float:
        """Monte-Carlo standard error of :attr:`mean` for these very datapoints."""
        return self.log_evidence_se.square().sum().sqrt().item() / len(self.log_evidence)

    def __repr__(self) -> str:
        C, N = self.log_w.shape
        return (
            f"Annealed importance sampling of {N} datapoints [nats per datapoint]\n"
            f"log p(x)  {self.mean:.2f} ± {self.mean_mc_se:.3f} Monte Carlo, a stochastic "
            f"{self.side} bound: {self.note}\n"
            f"chains    {C}, effective {self.ess.median().item():.1f} (median), acceptance "
            f"{self.accept.mean().item():.2f}"
        )


@dataclass(frozen=True)
class Sandwich:
    """Bounds from both sides on data simulated from the model, where both are strict.

    Attributes:
        lower, upper: :class:`AnnealedEvidence` of the same datapoints.
        args: the simulated data, as model and guide are called.
    """

    lower: AnnealedEvidence
    upper: AnnealedEvidence
    args: tuple[Any, ...] = field(repr=False)

    @property
    def gap(self) -> Tensor:
        """Upper minus lower, ``(N,)``, nats: the mean bounds the mean error of either side."""
        return self.upper.log_evidence - self.lower.log_evidence

    def __repr__(self) -> str:
        gap, N = self.gap, len(self.gap)
        se = gap.std().item() / math.sqrt(N) if N > 1 else math.nan
        return (
            f"Bidirectional Monte Carlo on {N} simulated datapoints [nats per datapoint]\n"
            f"lower bound  {self.lower.mean:.3f}\nupper bound  {self.upper.mean:.3f}\n"
            f"gap          {gap.mean().item():.3f} ± {se:.3f} over datapoints, largest "
            f"{gap.max().item():.3f}"
        )


def ais(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    start: Literal["guide", "prior"] = "guide",
    num_chains: int = 16,
    num_temperatures: int = 200,
    num_leapfrog: int = 3,
    temperatures: Tensor | None = None,
    max_rows: int = 2_000,
    seed: int | None = None,
) -> AnnealedEvidence:
    r"""A stochastic lower bound on log p(x) by annealing from the guide, or from the prior.

    C chains per datapoint start at draws of :math:`r(u)`, the guide's q(u | x) or the prior p(u),
    and pass through

    .. math:: \pi_t(u) \propto r(u)^{1 - \beta_t}\, p(x, u)^{\beta_t},\qquad
              \log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log \frac{p(x, u_{t-1})}{r(u_{t-1})}

    with one HMC transition at each temperature. E w = p(x), so
    :math:`E \log \frac1C \sum_c w_c \le \log p(x)`. Step sizes and scales come from a pilot run
    with draws of its own, and are frozen, which the bound needs.

    With one temperature it is importance sampling. It stays useful where the guide is too poor
    for that (k-hat above 0.7).

    Args:
        model, guide, args: as in :func:`~ppvae.diagnostics.hmc`.
        start: ``"guide"``, or ``"prior"`` for a guide without a density at given latents.
        num_chains: C >= 2.
        num_temperatures: T >= 1; the bias falls as 1/T. The time is linear in T.
        num_leapfrog: gradients per transition.
        temperatures: from 0 to 1, ``(T + 1,)``, in place of the sigmoid schedule.
        max_rows: largest C x N run together.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.

    Returns:
        :class:`~ppvae.diagnostics.AnnealedEvidence`, ``side="lower"``.

    Raises:
        ValueError: as :func:`~ppvae.diagnostics.hmc`; a guide that has no density at given
            latents; temperatures that do not rise from 0 to 1.
        PairError: empty, NaN or infinite data.

    Source: Neal, Annealed Importance Sampling, 2001; Wu, Burda, Salakhutdinov & Grosse, 2017.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2 - 1, 0.3))  # poor
        >>> x = torch.tensor([0., 2.])
        >>> result = diagnostics.ais(model, guide, x, num_temperatures=50, seed=0)
        >>> exact = dist.Normal(0., 2 ** 0.5).log_prob(x)
        >>> bool(((result.log_evidence - exact).abs() < 0.2).all())
        True
    """
    betas = _schedule(temperatures, num_temperatures)
    _check(num_chains, num_leapfrog, start)
    joint = Joint(model, guide, *args)
    note = f"{len(betas) - 1} temperatures from the {start}"
    with seeded(seed, *args):
        parts = []
        for block in blocks(joint, num_chains, max_rows):
            path = _Path(block, start, betas, num_leapfrog, num_chains)
            parts.append(path.run(path.draw(num_chains), reverse=False))
    return _evidence(parts, "lower", note)


def reverse_ais(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    draws: PosteriorDraws,
    start: Literal["guide", "prior"] = "guide",
    num_chains: int = 16,
    num_temperatures: int = 200,
    num_leapfrog: int = 3,
    temperatures: Tensor | None = None,
    max_rows: int = 2_000,
    seed: int | None = None,
) -> AnnealedEvidence:
    r"""Anneal from posterior draws down to the guide or the prior: log p(x) from above.

    .. math:: E \frac1C \sum_c w_c^{-1} = \frac{1}{p(x)} \quad\Rightarrow\quad
              E\Big[-\log \frac1C \sum_c w_c^{-1}\Big] \ge \log p(x)

    if the draws were exact. Draws of :func:`~ppvae.diagnostics.hmc` are nearly so where it
    converged; where it missed a mode this is no bound. For a strict one, on simulated data, use
    :func:`~ppvae.diagnostics.bdmc`.

    Args:
        model, guide, args: as in :func:`~ppvae.diagnostics.hmc`.
        draws: of the same datapoints; C of them are used for each.
        start: what is annealed down to, as in :func:`~ppvae.diagnostics.ais`.
        num_chains, num_temperatures, num_leapfrog, temperatures, max_rows, seed: as there.

    Returns:
        :class:`~ppvae.diagnostics.AnnealedEvidence`, ``side="upper"``; NaN where ``draws`` did not
        converge.

    Raises:
        ValueError, PairError: as :func:`~ppvae.diagnostics.ais`; draws of other datapoints.

    Source: Grosse, Ghahramani & Adams, Sandwiching the marginal likelihood using bidirectional
    Monte Carlo, 2015; Wu et al., 2017, for draws that are not exact.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.))
        >>> x = torch.tensor([0., 2.])
        >>> draws = diagnostics.hmc(model, guide, x, seed=0)
        >>> upper = diagnostics.reverse_ais(
        ...     model, guide, x, draws=draws, num_temperatures=20, seed=0)
        >>> exact = dist.Normal(0., 2 ** 0.5).log_prob(x)
        >>> bool(((upper.log_evidence - exact).abs() < 0.1).all())
        True
    """
    betas = _schedule(temperatures, num_temperatures)
    _check(num_chains, num_leapfrog, start)
    joint = Joint(model, guide, *args)
    chains, kept, N, D = draws.unconstrained.shape
    if (joint.num_datapoints, joint.dim) != (N, D):
        raise ValueError(
            f"draws are of {N} datapoints with {D} coordinates, but the data have "
            f"{joint.num_datapoints} and the model {joint.dim}; run hmc on these very data"
        )
    if chains * kept < num_chains:
        raise ValueError(
            f"draws has {chains * kept} draws per datapoint, fewer than num_chains={num_chains}"
        )
    # All chains in turn, spread over each.
    spread = torch.linspace(0, kept - 1, math.ceil(num_chains / chains)).long()
    first = draws.unconstrained[:, spread].transpose(0, 1).flatten(0, 1)[:num_chains]
    first = first.to(joint.device, joint.dtype)
    note = f"{len(betas) - 1} temperatures from {draws.method} draws, if these are exact"
    with seeded(seed, *args):
        parts, begin = [], 0
        for block in blocks(joint, num_chains, max_rows):
            path = _Path(block, start, betas, num_leapfrog, num_chains)
            end = begin + block.num_datapoints
            parts.append(path.run(first[:, begin:end], reverse=True))
            begin = end
    result = _evidence(parts, "upper", note)
    for values in (result.log_evidence, result.log_evidence_se, result.ess):
        values[~draws.converged] = math.nan
    return result


def bdmc(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    start: Literal["guide", "prior"] = "guide",
    num_chains: int = 16,
    num_temperatures: int = 200,
    num_leapfrog: int = 3,
    temperatures: Tensor | None = None,
    max_rows: int = 2_000,
    seed: int | None = None,
) -> Sandwich:
    r"""Bidirectional Monte Carlo: how wrong annealing is, on data simulated from the model.

    (x*, z*) are drawn from p(x, z), so z* is one exact draw of p(z | x*). Forward AIS bounds
    log p(x*) from below, reverse AIS from z* bounds it from above, both strictly in expectation,
    so the mean gap bounds the bias of :func:`~ppvae.diagnostics.ais` at these settings. On real
    data that is evidence, not proof: they may be harder than the model's own draws.

    The chains of the reverse side all start from z*, and are parted by transitions that leave
    p(z | x*) invariant, so each is exact and the bound holds; they are not independent, so
    ``upper.log_evidence_se`` is too small. Use the spread over datapoints.

    Args:
        model, guide: as in :func:`~ppvae.diagnostics.ais`; every observed value must be one of the
            arguments.
        *args: data that say how many rows to draw; arguments that are not observed (a condition
            y) are kept.
        start, num_chains, num_temperatures, num_leapfrog, temperatures, max_rows, seed: as there.

    Returns:
        :class:`~ppvae.diagnostics.Sandwich`.

    Raises:
        ValueError, PairError: as :func:`~ppvae.diagnostics.ais`; an observed value that is not an
            argument.

    Source: Grosse, Ghahramani & Adams, 2015; Grosse, Ancha & Roy, 2016.

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
        >>> both = diagnostics.bdmc(model, guide, torch.zeros(20), num_temperatures=50, seed=0)
        >>> abs(both.gap.mean().item()) < 0.05
        True
    """
    betas = _schedule(temperatures, num_temperatures)
    _check(num_chains, num_leapfrog, start)
    with seeded(seed, *args):
        with own_path(), evaluation_mode(model):
            simulated, dream = simulate(model, args, {})
        joint = Joint(model, guide, *simulated)
        exact = joint.coordinates(dream)
        lower, upper, begin = [], [], 0
        for block in blocks(joint, num_chains, max_rows):
            path = _Path(block, start, betas, num_leapfrog, num_chains)
            end = begin + block.num_datapoints
            lower.append(path.run(path.draw(num_chains), reverse=False))
            u = exact[begin:end].expand(num_chains, -1, -1)
            upper.append(path.run(path.refreshed(u), reverse=True))
            begin = end
    note = f"{len(betas) - 1} temperatures between the {start} and the posterior"
    return Sandwich(_evidence(lower, "lower", note), _evidence(upper, "upper", note), simulated)


def blocks(joint: Joint, num_chains: int, max_rows: int) -> list[Joint]:
    """The pair on as many datapoints at once as ``max_rows`` allows."""
    size = max(1, max_rows // num_chains)
    if joint.num_datapoints <= size:
        return [joint]
    return [joint.rows(rows) for rows in torch.arange(joint.num_datapoints).split(size)]


class _Path:
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
        for before, level in itertools.pairwise(order):
            value, gradient, ratio = self._at(u, level)
            log_w += (self.betas[level] - self.betas[before]) * ratio.double()
            if level != order[-1]:
                u, accepted = self._move(Point(u, value, gradient), level)
                accept += accepted
        return log_w, accept / max(1, len(order) - 2)

    def refreshed(self, u: Tensor) -> Tensor:
        """Chains moved by transitions that leave the posterior invariant."""
        last = len(self.betas) - 1
        for _ in range(REFRESH):
            u, _ = self._move(Point(u, *self._at(u, last)[:2]), last)
        return u

    def _mixture(self, u: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log pi of inverse temperature beta, its gradient, and log p(x, u) / r(u)."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            base, joint = self.ends(u)
            value = base + beta * (joint - base)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient, (joint - base).detach()

    def _at(self, u: Tensor, level: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = tuple(u.shape)
        beta = u.new_full((1,), self.betas[level])
        if shape not in self.graphs:
            self.graphs[shape] = traced(self._mixture, u, beta)
        value, gradient, ratio = self.graphs[shape](u, beta)
        return value, gradient, ratio

    def _move(self, point: Point, level: int) -> tuple[Tensor, Tensor]:
        point, accepted, _ = leapfrog(
            lambda u: self._at(u, level)[:2],
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
            u, accepted = self._move(Point(u, *self._at(u, level)[:2]), level)
            step = step * (0.7 * (accepted - TARGET_ACCEPT)).exp()
            steps.append(step)
        return u, steps


def _evidence(
    parts: list[tuple[Tensor, Tensor]], side: Literal["lower", "upper"], note: str
) -> AnnealedEvidence:
    log_w = torch.cat([w for w, _ in parts], 1).cpu()
    C = len(log_w)
    log_mean = log_w.logsumexp(0) - math.log(C)
    relative = (log_w - log_mean).exp()
    return AnnealedEvidence(
        log_mean if side == "lower" else -log_mean,
        (relative.var(0) / C).sqrt(),
        C / relative.square().mean(0),
        log_w,
        torch.cat([a for _, a in parts]).double().cpu(),
        side,
        note,
    )


def _schedule(temperatures: Tensor | None, num_temperatures: int) -> Tensor:
    if temperatures is None:
        if num_temperatures < 1:
            raise ValueError(f"num_temperatures must be at least 1, got {num_temperatures}")
        return sigmoid_schedule(num_temperatures)
    betas = torch.as_tensor(temperatures, dtype=torch.float64)
    if betas.dim() != 1 or len(betas) < 2 or betas[0] != 0 or betas[-1] != 1:
        raise ValueError("temperatures must be one-dimensional and go from 0 to 1")
    if not (betas.diff() > 0).all():
        raise ValueError("temperatures must rise: each larger than the one before")
    return betas


def _check(num_chains: int, num_leapfrog: int, start: str) -> None:
    if num_chains < 2:
        raise ValueError(f"num_chains must be at least 2 for a standard error, got {num_chains}")
    if num_leapfrog < 1:
        raise ValueError(f"num_leapfrog must be at least 1, got {num_leapfrog}")
    if start not in ("guide", "prior"):
        raise ValueError(f'start must be "guide" or "prior", got {start!r}')
