"""How far a guide is from the posterior, on data drawn from the model: no posterior is needed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    evaluating,
    require_numbers,
    simulations,
    standard_error,
    take,
)
from ppvae.intake import takes_rows
from ppvae.pairs import Program, replay, sample_sites, simulate
from ppvae.terms import log_density
from ppvae.weights import whole_weights


@dataclass(frozen=True, eq=False, repr=False)
class Divergence:
    """The symmetric KL divergence of guide and posterior over simulated datapoints.

    Attributes:
        values: of each simulation, whose mean is the divergence, ``(S,)`` nats, float64. One may be
            negative; infinite where the guide gives the true latents no density.
        num_draws: L, draws of q(z | x) per simulation.
    """

    values: Tensor
    num_draws: int

    @property
    def mean(self) -> float:
        """The divergence, nats per datapoint: 0 if and only if the guide is the posterior."""
        return self.values.mean().item()

    @property
    def mean_se(self) -> float:
        """Its standard error over simulations."""
        return standard_error(self.values)

    @property
    def shift(self) -> float:
        """The same divergence as a shift: of a normal by so many of its standard deviations."""
        return math.sqrt(max(self.mean, 0.0))

    @property
    def verdict(self) -> list[str]:
        """What it means, and what to do next."""
        if not math.isfinite(self.mean):
            share = (~self.values.isfinite()).double().mean().item()
            return [
                f"In {share:.1%} of simulations the guide gives the true latents no density: the "
                "posterior is wider than its support. Try a guide with another support."
            ]
        if self.mean < 3 * self.mean_se:
            return ["No sign that the guide differs from the posterior on the model's own data."]
        said = f"On the model's data the guide is {self.mean:.2f} nats from the posterior, as a "
        said += f"normal is that is shifted by {self.shift:.1f} standard deviations."
        said += " If k-hat is small all the same, the guide misses a part of the posterior, where "
        said += "none of its draws go."
        return [said]

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"Divergence over {len(self.values)} simulations, {self.num_draws} draws each",
                f"KL(p || q) + KL(q || p)  {self.mean:.2f} ± {self.mean_se:.2f} nats per datapoint",
                *(f"- {sentence}" for sentence in self.verdict),
            ]
        )


@takes_numbers
@takes_rows
def simulated_divergence(
    model: Program,
    guide: Program,
    *args: Any,
    num_simulations: int = 1000,
    num_draws: int = 10,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> Divergence:
    r"""Symmetric divergence of an amortised guide from the posterior, over simulations.

    .. math:: \mathrm{KL}\big(p(z, x) \,\|\, p(x) q(z \mid x)\big) +
              \mathrm{KL}\big(p(x) q(z \mid x) \,\|\, p(z, x)\big)
              = E_{p(z^*, x)}\Big[\log w(z^*, x) - E_{q(z \mid x)} \log w(z, x)\Big],
              \quad w = \frac{p(x, z)}{q(z \mid x)}

    Since log p(x) cancels, it is known without a posterior, up to the noise of the draws. The first
    term looks where the posterior is, the second where the guide is: a mode that the guide misses,
    which no importance weight of its own draws can show, costs what it weighs. It judges the guide
    on the *model's* data, like :func:`sbc`, which says in what way it is wrong.

    Args:
        model, guide: Pyro programs; the guide is amortised, so that it takes simulated rows.
        *args: data, as both are called, of any number of rows. What the model observes is replaced
            by what it draws; conditions such as y are used as they are, row after row, again from
            the first when they are used up.
        num_simulations: S >= 100.
        num_draws: L >= 1, of the inner expectation.
        max_rows: largest number of (draw, simulation) rows computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole.

    Returns:
        :class:`Divergence`.

    Raises:
        ValueError: bad arguments; the model cannot draw x; the value of an observed site is none
            of the arguments; a log-density is an estimate, or NaN; the guide does not look at x.

    Source: Domke, An Easy to Interpret Diagnostic for Approximate Inference: Symmetric Divergence
    Over Simulations, 2021, arXiv:2103.01030.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):  # the posterior is N(x / 2, 1/2); this is shifted by 1.5 of its sd
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2 + 1.5 * 0.5 ** 0.5, 0.5 ** 0.5))
        >>> found = diagnostics.simulated_divergence(model, guide, torch.zeros(1), seed=0)
        >>> abs(found.mean - 1.5 ** 2) < 4 * found.mean_se
        True
    """
    model, guide = bound(model, guide, kwargs)
    check_at_least(100, num_simulations=num_simulations)
    check_at_least(1, num_draws=num_draws, max_rows=max_rows)
    rows = check_pair_and_data(model, guide, args)
    return over_simulations(model, guide, args, rows, num_simulations, num_draws, max_rows, seed)


def over_simulations(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    rows: int,
    num_simulations: int,
    num_draws: int,
    max_rows: int,
    seed: int | None,
) -> Divergence:
    """:func:`simulated_divergence` of a pair and data that are checked."""
    values = []
    with evaluating(model, guide, args, seed):
        _require_amortised(model, guide, take(args, torch.arange(20) % rows))
        drawn = simulations(model, args, rows, num_simulations, num_draws, max_rows)
        for data, truth in drawn:
            of_q = whole_weights(model, guide, data, {}, num_draws)
            require_numbers(of_q, where="on data drawn from the model, ")
            at_truth = poutine.replay(guide, trace=truth)
            of_p = whole_weights(model, at_truth, data, {}, 1)
            values.append((of_p.log_w[0].double() - of_q.log_w.double().mean(0)).cpu())
    return Divergence(torch.cat(values), num_draws)


def _require_amortised(model: Program, guide: Program, args: tuple[Any, ...]) -> None:
    """Raise ``ValueError`` for a guide that is the same whatever the model draws."""
    data, truth = simulate(model, args, {})
    other = tuple(a if a is given else a.roll(1, 0) for a, given in zip(data, args, strict=True))
    here, there = (
        [log_density(site) for site in sample_sites(replay(guide, truth, x, {})).values()]
        for x in (data, other)
    )
    if here and all(torch.equal(a, b) for a, b in zip(here, there, strict=True)):
        raise ValueError(
            "the guide gives every simulated row the same q(z | x): its parameters belong to the "
            "rows of your data, or it does not look at x. Pass an amortised guide"
        )
