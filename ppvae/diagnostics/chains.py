"""Markov chains over all datapoints at once: adaptation, gates, reruns, and their result."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppvae.diagnostics.arviz_bridge import event_names
from ppvae.diagnostics.arviz_versions import bundle, require_arviz
from ppvae.diagnostics.joint import Joint
from ppvae.diagnostics.rows import check_at_least, check_start
from ppvae.pairs import seeded

RHAT, ESS_PER_CHAIN, DIVERGENT = 1.01, 100, 1e-3  # the gates; Vehtari et al. 2021 for the first two


@dataclass(frozen=True)
class PosteriorDraws:
    r"""Draws of p(z | x) for each of N datapoints by MCMC, and whether they can be trusted.

    A datapoint passes (``converged``) if its rank-normalised split R-hat is at most 1.01 and its
    effective sample size, of the bulk and of the tails, at least 100 per chain (the worst over
    coordinates and log p(x, z)), and at most one transition in a thousand diverged. Moments are
    NaN where it does not.

    All tensors are on the CPU.

    Attributes:
        draws: by site, ``(chain, draw, datapoint, ...)``: inner plates, then the event. Latents
            that are summed out are left out.
        unconstrained: ``(chain, draw, datapoint, D)``, the coordinates that were sampled.
        log_joint: ``(chain, draw, datapoint)``, the log-density of ``unconstrained`` with x, nats.
        rhat: ``(N,)``, worst; NaN where a chain did not move.
        ess: ``(N,)``, worst of bulk and tails.
        accept: ``(N,)``, mean acceptance probability.
        divergences: ``(N,)``, transitions whose energy error exceeded 1,000 nats or was NaN.
        step_size: ``(N,)``, before jitter.
        reruns: ``(N,)``, how many times a datapoint was run again because it did not pass.
        method: what made them.
        seconds: wall time.
    """

    draws: dict[str, Tensor] = field(repr=False)
    unconstrained: Tensor
    log_joint: Tensor
    rhat: Tensor
    ess: Tensor
    accept: Tensor
    divergences: Tensor
    step_size: Tensor
    reruns: Tensor
    method: str
    seconds: float

    @property
    def num_datapoints(self) -> int:
        """N."""
        return self.unconstrained.shape[2]

    @property
    def converged(self) -> Tensor:
        """``(N,)``, bool: which datapoints passed every gate."""
        chains, draws = self.unconstrained.shape[:2]
        diverged = self.divergences > DIVERGENT * chains * draws
        return (self.rhat <= RHAT) & (self.ess >= ESS_PER_CHAIN * chains) & ~diverged

    def flat(self, site: str) -> Tensor:
        """All chains' draws of a site in one, ``(chain * draw, datapoint, ...)``."""
        return self.draws[site].flatten(0, 1)

    def mean(self, site: str) -> Tensor:
        """Posterior mean of a site, ``(N, ...)``; NaN where the datapoint did not pass."""
        return self._where_converged(self.flat(site).mean(0))

    def sd(self, site: str) -> Tensor:
        """Posterior standard deviation of a site, ``(N, ...)``; NaN where it did not pass."""
        return self._where_converged(self.flat(site).std(0))

    def _where_converged(self, values: Tensor) -> Tensor:
        shape = (-1,) + (1,) * (values.dim() - 1)
        return torch.where(self.converged.reshape(shape), values, values.new_tensor(math.nan))

    def __repr__(self) -> str:
        chains, draws, N, D = self.unconstrained.shape
        passed = int(self.converged.sum())
        lines = [
            f"{self.method}: p(z | x) of {N} datapoints, {D} coordinates, {chains} chains x "
            f"{draws} draws, {self.seconds / N:.2f} s per datapoint",
            f"R-hat       worst {_nanmax(self.rhat):.3f}, above {RHAT} on "
            f"{int((~(self.rhat <= RHAT)).sum())} datapoints",
            f"ESS         median {self.ess.nanmedian().item():.0f}, below {ESS_PER_CHAIN * chains} "
            f"on {int((~(self.ess >= ESS_PER_CHAIN * chains)).sum())}",
            f"acceptance  median {self.accept.median().item():.2f}, smallest "
            f"{self.accept.min().item():.2f}; {int(self.divergences.sum())} divergences on "
            f"{int((self.divergences > 0).sum())} datapoints",
        ]
        if passed == N:
            lines.append(f"verdict     all {N} datapoints passed: use them as a reference")
        else:
            bad = (~self.converged).nonzero().flatten().tolist()
            shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            cure = "more draws or leapfrog steps" if self.method == "HMC" else "more draws, or HMC"
            lines.append(
                f"verdict     {len(bad)} of {N} datapoints did not pass ({shown}): their moments "
                f"are NaN; {cure}, or look for separate modes"
            )
        return "\n".join(lines)


def _nanmax(values: Tensor) -> float:
    return values[~values.isnan()].max().item() if not values.isnan().all() else math.nan


class Point(NamedTuple):
    """Where chains are: u ``(C, N, D)``, log p(x, u) ``(C, N)``, and its gradient if needed."""

    u: Tensor
    value: Tensor
    gradient: Tensor


# Point, step size (C or 1, N), scale of the coordinates (N, D) -> Point, acceptance probability
# (C, N), diverged (C, N).
Transition = Callable[[Point, Tensor, Tensor], tuple[Point, Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """How long chains run and how steps are adapted; what cannot work raises ``ValueError``."""

    num_chains: int
    num_warmup: int
    num_draws: int
    thin: int
    target_accept: float
    step_size: float | None
    start: Literal["guide", "prior"]

    def __post_init__(self) -> None:
        check_at_least(2, num_chains=self.num_chains)  # which R-hat compares
        check_at_least(8, num_draws=self.num_draws)  # for R-hat and ESS
        check_at_least(20 if self.step_size is None else 0, num_warmup=self.num_warmup)
        check_at_least(1, thin=self.thin)
        check_start(self.start)
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive, got {self.step_size}")
        if not 0 < self.target_accept < 1:
            raise ValueError(f"target_accept must lie in (0, 1), got {self.target_accept}")

    def longer(self, rerun: int) -> Settings:
        """The settings of a rerun: a longer warm-up, draws further apart, smaller steps."""
        return replace(
            self,
            num_warmup=self.num_warmup * 2**rerun,
            thin=self.thin * 2**rerun,
            target_accept=1 - (1 - self.target_accept) / 2**rerun,
        )


def sample(
    joint: Joint,
    transition: Callable[[Joint, Tensor], Transition],
    settings: Settings,
    method: str,
    max_rows: int,
    max_reruns: int,
    seed: int | None,
) -> PosteriorDraws:
    """Run chains on all datapoints, and again, longer and with smaller steps, where they failed.

    Args:
        joint: the pair's densities.
        transition: makes a transition, from densities and an example of where chains are.
        settings: of the first run.
        method: a name for the result.
        max_rows: largest number of chains x datapoints run together.
        max_reruns: how often datapoints that do not pass are run again: each time with twice the
            warm-up, twice the draws (every second kept), and half the distance to acceptance 1.
        seed: None: draw from the global stream.
    """
    require_arviz()  # for R-hat and ESS
    started = time.perf_counter()

    def run(some: Joint, rerun: int) -> PosteriorDraws:
        blocks = some.blocks(settings.num_chains, max_rows)
        how = settings.longer(rerun) if rerun else settings
        return joined([_run(block, transition, how, method, rerun) for _, block in blocks])

    with seeded(seed, *joint.args):
        result = run(joint, 0)
        for rerun in range(1, max_reruns + 1):
            failed = (~result.converged).nonzero().flatten()
            if not len(failed) or settings.step_size is not None:
                break
            result = _replaced(result, failed, run(joint.rows(failed), rerun))
    return replace(result, seconds=time.perf_counter() - started)


def _run(
    joint: Joint,
    make: Callable[[Joint, Tensor], Transition],
    settings: Settings,
    method: str,
    rerun: int,
) -> PosteriorDraws:
    start = joint.draw_q if settings.start == "guide" else joint.draw_prior
    u = start(settings.num_chains)
    joint.require_finite(u, settings.start)
    transition = make(joint, u)
    # A first guess of the scales: how far draws spread.
    spread = start(100).std(0).clamp(min=1e-3)
    point, step, scale = _warm_up(joint, transition, settings, u, spread)

    kept: list[Tensor] = []
    values: list[Tensor] = []
    accept = u.new_zeros(joint.num_datapoints)
    divergences = torch.zeros_like(accept)
    for i in range(settings.num_draws * settings.thin):
        point, accepted, diverged = transition(point, step, scale)
        accept += accepted.mean(0)
        divergences += diverged.sum(0)
        if (i + 1) % settings.thin == 0:
            kept.append(point.u)
            values.append(point.value)
    unconstrained = torch.stack(kept, 1)  # (C, S, N, D)
    log_joint = torch.stack(values, 1).cpu()
    flat = unconstrained.flatten(0, 1)
    parts = [joint.constrain(some) for some in flat.split(max(1, 20_000 // flat.shape[1]))]
    shape = unconstrained.shape[:2]
    draws = {
        site: torch.cat([part[site] for part in parts]).unflatten(0, shape).cpu()
        for site in joint.layouts
    }
    unconstrained = unconstrained.cpu()
    return PosteriorDraws(
        draws,
        unconstrained,
        log_joint,
        *convergence(torch.cat([unconstrained, log_joint.unsqueeze(-1)], -1)),
        accept=(accept / (settings.num_draws * settings.thin)).cpu(),
        divergences=divergences.long().cpu(),
        step_size=step.cpu(),
        reruns=torch.full((joint.num_datapoints,), rerun),
        method=method,
        seconds=0.0,
    )


def _warm_up(
    joint: Joint, transition: Transition, settings: Settings, u: Tensor, scale: Tensor
) -> tuple[Point, Tensor, Tensor]:
    """Adapt step sizes and scales per datapoint: step sizes alone for a fifth of the time."""
    value, gradient = joint.value_and_grad(u)
    point = Point(u, value, gradient)
    W, N = settings.num_warmup, joint.num_datapoints
    first = settings.step_size or 0.5 * joint.dim**-0.25
    step = u.new_full((N,), first)
    averaging = DualAveraging(step, settings.target_accept)
    # Then, in two windows, scales too: at the end of each, from the draws in it.
    ends = [W // 5, 2 * W // 5, 4 * W // 5]
    window: list[Tensor] = []
    for i in range(W):
        if settings.step_size is None:
            step = averaging.step
        point, accepted, _ = transition(point, step, scale)
        averaging.update(accepted.mean(0))
        if ends[0] <= i < ends[2]:
            window.append(point.u)
        if i + 1 in ends[1:]:
            n = len(window) * len(u)
            variance = torch.stack(window).flatten(0, 1).var(0)
            scale = ((n * variance + 5 * scale.square() * 1e-2) / (n + 5)).sqrt()
            averaging = DualAveraging(averaging.smoothed, settings.target_accept)
            window = []
    return point, step if settings.step_size is not None else averaging.smoothed, scale


class DualAveraging:
    """Step sizes per datapoint that bring acceptance to a target (Hoffman & Gelman 2014)."""

    def __init__(self, step: Tensor, target: float) -> None:
        self.mu, self.target = (10 * step).log(), target
        self.step = self.smoothed = step
        self.error = torch.zeros_like(step)
        self.count = 0

    def update(self, accepted: Tensor) -> None:
        """Take in acceptance probabilities ``(N,)``."""
        self.count += 1
        t = self.count
        weight = 1 / (t + 10)
        self.error = (1 - weight) * self.error + weight * (self.target - accepted)
        log_step = self.mu - math.sqrt(t) / 0.05 * self.error
        self.step = log_step.exp()
        share = t**-0.75
        self.smoothed = (share * log_step + (1 - share) * self.smoothed.log()).exp()


def convergence(draws: Tensor) -> tuple[Tensor, Tensor]:
    """Worst R-hat and worst ESS over the last dim of ``(chain, draw, N, D)``, each ``(N,)``.

    By ArviZ: rank-normalised split R-hat, and the smaller of bulk and tail ESS. NaN where a chain
    did not move in one of the coordinates, or is not finite.
    """
    values = draws.double().numpy()
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # chains that do not move: NaN says so
        import arviz  # it adds filters, which end here

        stuck = (~(np.ptp(values, axis=1) > 0)).any(0) | ~np.isfinite(values).all((0, 1))
        data = arviz.convert_to_dataset({"u": values})
        rhat = arviz.rhat(data, method="rank")["u"].values
        # The quantiles of the tails are said: 1.x takes them from its settings otherwise.
        tail = arviz.ess(data, method="tail", prob=(0.05, 0.95))["u"].values
        ess = arviz.ess(data, method="bulk")["u"].values, tail
    worst_rhat = np.where(stuck, np.nan, rhat).max(-1)
    worst_ess = np.where(stuck, np.nan, np.minimum(*ess)).min(-1)
    return torch.from_numpy(worst_rhat), torch.from_numpy(worst_ess)


# -- results of several runs as one ------------------------------------------------------------

_DATAPOINT_DIM = {"unconstrained": 2, "log_joint": 2} | dict.fromkeys(
    ("rhat", "ess", "accept", "divergences", "step_size", "reruns"), 0
)


def joined(parts: list[PosteriorDraws]) -> PosteriorDraws:
    """Results of different datapoints as one."""
    return parts[0] if len(parts) == 1 else _combined(parts, torch.cat)


def _replaced(result: PosteriorDraws, rows: Tensor, again: PosteriorDraws) -> PosteriorDraws:
    """Results, with those of the datapoints ``rows`` replaced by what a rerun gave."""

    def put(old_and_new: list[Tensor], dim: int) -> Tensor:
        old, new = old_and_new
        return old.index_copy(dim, rows, new.to(old.dtype))

    return _combined([result, again], put)


def _combined(
    results: list[PosteriorDraws], combine: Callable[[list[Tensor], int], Tensor]
) -> PosteriorDraws:
    """Results combined tensor by tensor; ``combine`` gets tensors and the dim of the datapoints."""
    columns: dict[str, Any] = {
        name: combine([getattr(result, name) for result in results], dim)
        for name, dim in _DATAPOINT_DIM.items()
    }
    columns["draws"] = {
        site: combine([result.draws[site] for result in results], 2) for site in results[0].draws
    }
    return replace(results[0], **columns)


def chains_to_arviz(
    draws: PosteriorDraws,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
) -> Any:
    """Markov chains in ArviZ's format: ``posterior`` with chains, ``sample_stats`` with ``lp``.

    ArviZ's own R-hat and effective sample sizes are then those of each datapoint.

    Args:
        draws: what :func:`ppvae.diagnostics.hmc` and its like return.
        coords, dims: as :func:`to_arviz` has them.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x).

    Raises:
        ImportError: ArviZ is not installed.
    """
    require_arviz()
    event_dims = {site: values.dim() - 3 for site, values in draws.draws.items()}
    names = event_names(event_dims, dims, only="latent")
    plain = ["chain", "draw", "datapoint"]
    posterior = {s: ([*plain, *names[s]], values.numpy()) for s, values in draws.draws.items()}
    lp = (plain, draws.log_joint.numpy())
    return bundle({"posterior": posterior, "sample_stats": {"lp": lp}}, coords)
