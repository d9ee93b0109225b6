"""What a pair with global latents is worth: new rows, all data at once, and rows given a draw."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.replay_messenger import ReplayMessenger
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.evidence import log_mean_weight, refuse_point_masses
from ppvae.diagnostics.psis import khat
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    count_rows,
    evaluating,
    pieces,
    require_numbers,
    standard_error,
    take,
)
from ppvae.intake import takes_rows
from ppvae.pairs import Program, structure
from ppvae.weights import LogWeights, whole_weights


@dataclass(frozen=True)
class LogPredictive:
    """Log predictive densities of rows, each ``(N,)``, float64, on the CPU.

    Attributes:
        log_density: log of the mean over q(g) of p(x_n | g), nats.
        se: its Monte-Carlo standard error over the draws of g (delta method), nats.
        num_globals, num_particles: S and K.
    """

    log_density: Tensor
    se: Tensor
    num_globals: int
    num_particles: int

    @property
    def mean(self) -> float:
        """Nats per datapoint."""
        return self.log_density.mean().item()

    @property
    def mean_se(self) -> float:
        """Standard error of :attr:`mean` over datapoints (NaN for one)."""
        return standard_error(self.log_density)

    def __repr__(self) -> str:
        mc = self.se.square().mean().sqrt().item()
        return (
            f"log p(x | g), averaged over {self.num_globals} draws of the globals, of "
            f"{len(self.log_density)} datapoints [nats per datapoint]\n"
            f"{self.mean:.3f} ± {self.mean_se:.3f} over datapoints; of each, ± {mc:.3f} Monte Carlo"
        )


@dataclass(frozen=True)
class JointEvidence:
    """An estimate of log p(X), the evidence of all rows together, and the globals it is made of.

    Attributes:
        log_evidence: nats, of all rows; in expectation a lower bound.
        se: its Monte-Carlo standard error (delta method); unreliable where ``khat`` exceeds 0.7.
        ess: effective sample size of the draws of g, between 1 and S.
        khat: Pareto shape of their weights' tail; NaN for S <= 20.
        elbo: the mean of their log-weights, nats.
        kl: log q(g) - log p(g) of each global latent, averaged over the draws, nats.
        draws: by global latent, ``(S, *shape)``.
        log_weights: ``(S,)``, nats.
        log_global: their part log p(g) - log q(g), ``(S,)``; the rest is the rows'.
        num_particles: K.
    """

    log_evidence: float
    se: float
    ess: float
    khat: float
    elbo: float
    kl: dict[str, float]
    draws: dict[str, Tensor]
    log_weights: Tensor
    log_global: Tensor
    num_particles: int

    @property
    def table(self) -> Any:
        """Each number of each global latent: mean and sd under q, and by the weights."""
        import pandas

        weights = self.log_weights.softmax(0)
        rows, index = [], []
        for name, values in self.draws.items():
            flat = values.double().reshape(len(values), -1)
            mean = weights @ flat
            sd = (weights @ (flat - mean).square()).sqrt()
            own = flat.std(0) if len(flat) > 1 else torch.full_like(mean, math.nan)
            columns = (flat.mean(0), own, mean, sd)
            rows += torch.stack(columns, 1).tolist()
            places = np.ndindex(*values.shape[1:])
            index += [f"{name}{list(place)}" if place else name for place in places]
        return pandas.DataFrame(rows, index, ["mean", "sd", "weighted_mean", "weighted_sd"])

    def __repr__(self) -> str:
        kl = ", ".join(f"{name} {value:.2f}" for name, value in self.kl.items())
        return (
            f"Evidence of all rows together, from {len(self.log_weights)} draws of the globals, "
            f"K = {self.num_particles} [nats]\n"
            f"log p(X)  {self.log_evidence:.3f} ± {self.se:.3f} Monte Carlo\n"
            f"ELBO      {self.elbo:.3f}  (gap {self.log_evidence - self.elbo:.3f})\n"
            f"KL        {kl}\n"
            f"ESS       {self.ess:.0f} of {len(self.log_weights)}\n"
            f"k-hat     {self.khat:.2f}"
        )


class Given(NamedTuple):
    """One draw of the globals, and the rows given it.

    Attributes:
        drawn: the guide's sites of the globals.
        weights: of the first rows.
        log_p: estimates of log p(x_n | g), locals integrated by K draws, ``(N,)``, float64.
    """

    drawn: Trace
    weights: LogWeights
    log_p: Tensor


def each_draw(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    num_globals: int,
    num_particles: int,
    max_rows: int,
) -> Iterator[Given]:
    """Draws of the globals, one after the other; inside of ``evaluating``."""
    for _ in range(num_globals):
        first: LogWeights | None = None
        drawn, found = Trace(), []
        for part, sizes in pieces(count_rows(args), num_particles, max_rows):
            blocks = []
            for particles in sizes:
                at = guide if first is None else ReplayMessenger(trace=drawn)(guide)
                batch = take(args, part)
                weights = whole_weights(model, at, batch, {}, particles, with_globals=True)
                require_numbers(weights, part.start)
                if first is None:
                    first = weights
                    refuse_point_masses(weights, but=weights.global_q)  # p(x | a point) is one
                    for name in weights.global_q:
                        drawn.add_node(name, **weights.guide_trace.nodes[name])
                blocks.append(weights.log_w.double().cpu())
            log_w = torch.cat(blocks)
            found.append(log_w.logsumexp(0) - math.log(len(log_w)))
        assert first is not None
        yield Given(drawn, first, torch.cat(found))


@takes_numbers
@takes_rows
def log_predictive(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_globals: int = 200,
    num_particles: int = 100,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> LogPredictive:
    r"""The log predictive density of each row, given what the globals have learned.

    .. math:: \log p(x_n \mid X) \approx \log \frac 1S \sum_{s=1}^S
              \frac 1K \sum_{k=1}^K \frac{p(x_n, z_{sk} \mid g_s)}{q(z_{sk} \mid x_n, g_s)},
              \qquad g_s \sim q(g)

    Of rows that the pair was not trained on it is what models are compared by. Of the training
    rows it is the lppd of Gelman et al.: too high, since g has seen them.

    Args:
        model, guide: Pyro programs with latents outside the data plate.
        *args: data, as both are called; the first dimension of each tensor is the datapoints.
        num_globals: S >= 2 draws of the globals, one after the other.
        num_particles: K >= 1 draws of the locals for each of them.
        max_rows: largest number of (particle, datapoint) rows computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole.

    Returns:
        :class:`LogPredictive`.

    Raises:
        ValueError: bad data or arguments; the pair does not fit, or has no global latents.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     g = pyro.sample("g", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(g, 1.), obs=x)
        >>> def guide(x):  # the posterior of three rows with the mean 1
        ...     pyro.sample("g", dist.Normal(0.75, 0.5))
        >>> new = torch.tensor([0., 1.])
        >>> found = diagnostics.log_predictive(model, guide, new, num_globals=1000, seed=0)
        >>> exact = dist.Normal(0.75, 1.25 ** 0.5).log_prob(new)
        >>> bool(((found.log_density - exact).abs() < 4 * found.se).all())
        True
    """
    model, guide = bound(model, guide, kwargs)
    _check(model, guide, args, num_globals, num_particles, max_rows)
    with evaluating(model, guide, args, seed):
        draws = each_draw(model, guide, args, num_globals, num_particles, max_rows)
        log_p = torch.stack([given.log_p for given in draws])
    log_mean, se, _ = log_mean_weight(log_p)
    return LogPredictive(log_mean, se, num_globals, num_particles)


@takes_numbers
@takes_rows
def joint_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_globals: int = 200,
    num_particles: int = 100,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> JointEvidence:
    r"""Estimate log p(X), the evidence of all rows together, by importance sampling.

    .. math:: \widehat{\log p}(X) = \log \frac 1S \sum_{s=1}^S \frac{p(g_s)}{q(g_s)}
              \prod_{n=1}^N \frac 1K \sum_{k=1}^K
              \frac{p(x_n, z_{sk} \mid g_s)}{q(z_{sk} \mid x_n, g_s)}

    Unbiased for p(X) at every K, so in expectation a lower bound on log p(X), which rises with S
    and with K. The error of the N inner estimates adds up: K is what tightens it where there are
    many rows.

    Args:
        model, guide, num_globals, num_particles, max_rows, seed, kwargs: as
            :func:`log_predictive` has them; more than 20 draws have a k-hat.
        *args: all rows that the pair was trained on.

    Returns:
        :class:`JointEvidence`; its ``table`` shows the globals.

    Raises:
        ValueError: bad data or arguments; the pair does not fit, or has no global latents; a
            latent is a point mass in the guide; all weights are zero.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     g = pyro.sample("g", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("x", dist.Normal(g, 1.), obs=x)
        >>> def guide(x):
        ...     pyro.sample("g", dist.Normal(0.7, 0.6))  # not quite the posterior
        >>> x = torch.tensor([0., 1., 2.])
        >>> found = diagnostics.joint_evidence(model, guide, x, num_globals=1000, seed=0)
        >>> exact = dist.MultivariateNormal(torch.zeros(3), torch.eye(3) + 1).log_prob(x)
        >>> abs(found.log_evidence - exact.item()) < 4 * found.se
        True
    """
    model, guide = bound(model, guide, kwargs)
    _check(model, guide, args, num_globals, num_particles, max_rows)
    with evaluating(model, guide, args, seed):
        found = each_draw(model, guide, args, num_globals, num_particles, max_rows)
        return all_rows_together(found, num_particles)


def all_rows_together(found: Iterable[Given], num_particles: int) -> JointEvidence:
    """:func:`joint_evidence` from draws of the globals."""
    log_w, log_global, rates, draws = [], [], [], []
    for given in found:
        assert given.weights.log_global is not None
        refuse_point_masses(given.weights)
        log_w.append(joint_log_weight(given))
        log_global.append(given.weights.log_global.double().cpu())
        p, q = given.weights.global_p, given.weights.global_q
        rates.append(_rates(p, q))
        draws.append({name: given.drawn.nodes[name]["value"].cpu() for name in p})
    column = torch.stack(log_w).unsqueeze(1)
    log_mean, se, ess = (float(value) for value in log_mean_weight(column))
    if log_mean == -math.inf:
        raise ValueError(
            f"all {len(column)} weights are zero, so log p(X) cannot be estimated: the data must "
            "lie in the likelihood's support, and draws of the guide in the prior's"
        )
    return JointEvidence(
        log_evidence=log_mean,
        se=se,
        ess=ess,
        khat=float(khat(column)),
        elbo=column.mean().item(),
        kl={name: sum(rate[name] for rate in rates) / len(rates) for name in rates[0]},
        draws={name: torch.stack([drawn[name] for drawn in draws]) for name in draws[0]},
        log_weights=column.squeeze(1),
        log_global=torch.stack(log_global),
        num_particles=num_particles,
    )


def joint_log_weight(given: Given) -> Tensor:
    """log of p(g) / q(g) times the product over rows of p(x_n | g), 0-d, float64."""
    log_global = given.weights.log_global
    assert log_global is not None
    return log_global.double().cpu() + given.log_p.sum()


def _rates(p: dict[str, Tensor], q: dict[str, Tensor]) -> dict[str, float]:
    """log q - log p of each latent; of an autoguide's noise, of all together."""
    if p.keys() == q.keys():
        return {name: float(q[name] - p[name]) for name in p}
    return {"+".join(p): float(sum(q.values())) - float(sum(p.values()))}


@takes_numbers
@takes_rows
def given_globals(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    seed: int | None = None,
    **kwargs: Any,
) -> tuple[Program, Program]:
    """The pair at one draw of its globals: with latents of rows only, for every other evaluator.

    What :func:`ppvae.diagnose`, :func:`log_evidence`, :func:`hmc` say of it is given that draw.

    Args:
        model, guide: Pyro programs with latents outside the data plate.
        *args: some rows, as both are called.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole, now and later.

    Returns:
        Model and guide.

    Raises:
        ValueError: the pair does not fit, or has no global latents.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     g = pyro.sample("g", dist.Normal(0., 1.))
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(g, 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     g = pyro.sample("g", dist.Normal(0., 0.5))
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal((g + x) / 2, 0.5 ** 0.5))
        >>> x = torch.tensor([0., 1.])
        >>> pair = diagnostics.given_globals(model, guide, x, seed=0)
        >>> diagnostics.log_evidence(*pair, x, num_particles=30).khat  # the locals are exact
        tensor([0., 0.], dtype=torch.float64)
    """
    model, guide = bound(model, guide, kwargs)
    _check(model, guide, args)
    with evaluating(model, guide, args, seed):
        return at_a_draw(model, guide, args)[0]


def at_a_draw(
    model: Program, guide: Program, args: Sequence[Any]
) -> tuple[tuple[Program, Program], LogWeights]:
    """The pair at a draw of its globals, and the weights of the rows ``args`` at it."""
    weights = whole_weights(model, guide, tuple(args), {}, 1, with_globals=True)
    nodes = weights.guide_trace.nodes
    drawn = {name: nodes[name]["value"].detach() for name in weights.global_q}
    # not poutine.do: under it a sampler outside of the programs still sees the site, and draws it
    at = [poutine.block(poutine.condition(p, data=drawn), hide=[*drawn]) for p in (model, guide)]
    return (at[0], at[1]), weights


def _check(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    num_globals: int = 2,
    num_particles: int = 1,
    max_rows: int = 1,
) -> None:
    check_at_least(2, num_globals=num_globals)
    check_at_least(1, num_particles=num_particles, max_rows=max_rows)
    check_pair_and_data(model, guide, args, with_globals=True)
    if not structure(model, guide, tuple(args), {}).has_globals:
        raise ValueError(
            "the pair has no latents outside the plate 'data'; diagnostics.log_evidence gives "
            "log p(x) of each row"
        )
