"""Annealed importance sampling: stochastic bounds on log p(x) from below and from above."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.annealing import AnnealedEvidence, Annealing, annealed_evidence
from ppvae.diagnostics.chains import PosteriorDraws
from ppvae.diagnostics.joint import Joint
from ppvae.diagnostics.rows import bound, check_pair_and_data, standard_error
from ppvae.intake import takes_rows
from ppvae.pairs import evaluation_mode, own_path, seeded, simulate


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
        gap = self.gap
        return (
            f"Bidirectional Monte Carlo on {len(gap)} simulated datapoints [nats per datapoint]\n"
            f"lower bound  {self.lower.mean:.3f}\nupper bound  {self.upper.mean:.3f}\n"
            f"gap          {gap.mean().item():.3f} ± {standard_error(gap):.3f} over datapoints, "
            f"largest {gap.max().item():.3f}"
        )


@takes_numbers
@takes_rows
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
    **kwargs: Any,
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
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

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
    model, guide = bound(model, guide, kwargs)
    annealing = Annealing(start, num_chains, num_temperatures, num_leapfrog, temperatures, max_rows)
    joint = Joint(model, guide, *args)
    with seeded(seed, *args):
        parts = [
            path.run(path.draw(num_chains), reverse=False) for _, path in annealing.paths(joint)
        ]
    return annealed_evidence(parts, "lower", f"{annealing} from the {start}")


@takes_numbers
@takes_rows
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
    **kwargs: Any,
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
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

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
    model, guide = bound(model, guide, kwargs)
    annealing = Annealing(start, num_chains, num_temperatures, num_leapfrog, temperatures, max_rows)
    joint = Joint(model, guide, *args)
    if not isinstance(draws, PosteriorDraws):
        raise TypeError(f"draws takes those of diagnostics.hmc, got a {type(draws).__name__}")
    chains, kept, N, D = draws.unconstrained.shape
    if (joint.num_datapoints, joint.dim) != (N, D):
        raise ValueError(
            f"draws are of {N} datapoints with {D} coordinates, but the data have "
            f"{joint.num_datapoints} and the model {joint.dim}; run hmc on these very data"
        )
    if chains * kept < num_chains:
        raise ValueError(f"draws has {chains * kept} draws, fewer than num_chains={num_chains}")
    # All chains in turn, spread over each.
    spread = torch.linspace(0, kept - 1, math.ceil(num_chains / chains)).long()
    u = draws.unconstrained[:, spread].transpose(0, 1).flatten(0, 1)[:num_chains]
    u = u.to(joint.device, joint.dtype)
    with seeded(seed, *args):
        parts = [path.run(u[:, part], reverse=True) for part, path in annealing.paths(joint)]
    note = f"{annealing} from {draws.method} draws, if these are exact"
    result = annealed_evidence(parts, "upper", note)
    for values in (result.log_evidence, result.log_evidence_se, result.ess):
        values[~draws.converged] = math.nan
    return result


@takes_numbers
@takes_rows
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
    **kwargs: Any,
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
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

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
    model, guide = bound(model, guide, kwargs)
    annealing = Annealing(start, num_chains, num_temperatures, num_leapfrog, temperatures, max_rows)
    check_pair_and_data(model, guide, args, estimates=True)  # of a guide that is only drawn from
    lower, upper = [], []
    with seeded(seed, *args):
        with own_path(), evaluation_mode(model):
            simulated, dream = simulate(model, args, {})
        joint = Joint(model, guide, *simulated)
        exact = joint.coordinates(dream)
        for part, path in annealing.paths(joint):
            lower.append(path.run(path.draw(num_chains), reverse=False))
            u = exact[part].expand(num_chains, -1, -1)
            upper.append(path.run(path.refreshed(u), reverse=True))
    note = f"{annealing} between the {start} and the posterior"
    return Sandwich(
        annealed_evidence(lower, "lower", note), annealed_evidence(upper, "upper", note), simulated
    )
