"""Does the guide differ from the posterior at this row? A two-sample test that is local in x."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    count_rows,
    evaluating,
    pieces,
    rows_first,
    simulations,
    take,
)
from ppvae.intake import takes_rows
from ppvae.pairs import (
    Program,
    Site,
    is_enumerated,
    particle_plate,
    sample_sites,
    structure,
    trace,
)

_WIDTH, _STEPS, _BATCH, _RATE = 16, 300, 200, 0.03  # of the classifiers
_COMPONENTS = 20  # what is kept of wider rows
_PRODUCTS = 16  # latents up to which all products are features
_LEVEL = 0.05


@dataclass(frozen=True, eq=False, repr=False)
class LocalTest:
    r"""Is the guide the posterior, row by row?

    Attributes:
        statistic: mean over the guide's draws at each row of :math:`(d(z, x) - \tfrac12)^2`, with d
            the classifier's probability of a true latent, ``(N,)``: 0 where it sees no difference.
        null: the same of H classifiers whose labels were swapped at random, ``(H, N)``.
        num_simulations: S, pairs of a true and a drawn latent that the classifiers learned from.
    """

    statistic: Tensor
    null: Tensor
    num_simulations: int

    @property
    def p_value(self) -> Tensor:
        """Of each row, ``(N,)``, between 1 / (H + 1) and 1; uniform if the guide is exact."""
        return (1 + (self.null >= self.statistic).sum(0)) / (1.0 + len(self.null))

    @property
    def rejected(self) -> Tensor:
        """Which rows have p <= 0.05, ``(N,)`` bool; 5 % are expected of an exact guide."""
        return self.p_value <= _LEVEL

    @property
    def p_value_of_all(self) -> float:
        """Of all rows together: of the mean statistic, each row's in units of its mean over all d.

        Rows share their classifiers, so the p-values of rows are dependent, and how many are small
        says less than it seems to; this one is uniform, too, if the guide is exact.
        """
        every = torch.cat([self.statistic[None], self.null])
        together = (every / every.mean(0)).mean(1)
        return (together >= together[0]).double().mean().item()

    @property
    def verdict(self) -> list[str]:
        """What the rows say together."""
        said = f"p <= {_LEVEL} on {int(self.rejected.sum())} of {len(self.statistic)} rows; of "
        said += f"all together p = {self.p_value_of_all:.2g}."
        if self.p_value_of_all > _LEVEL:
            return [f"{said} No sign that the guide differs from the posterior at these rows."]
        return [
            f"{said} There the guide is not the posterior, on data as the model draws them: "
            "p_value.argsort() names the rows, sbc says in what way a guide is wrong."
        ]

    def __repr__(self) -> str:
        p = self.p_value
        return "\n".join(
            [
                f"Local two-sample test of {len(p)} rows, {self.num_simulations} simulations, "
                f"{len(self.null)} null classifiers",
                f"p  smallest {p.min().item():.3f}, median {p.median().item():.3f}",
                *(f"- {sentence}" for sentence in self.verdict),
            ]
        )


@takes_numbers
@takes_rows
def local_c2st(
    model: Program,
    guide: Program,
    *args: Any,
    num_simulations: int = 2000,
    num_draws: int = 100,
    num_null: int = 100,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> LocalTest:
    r"""At which rows is the guide not the posterior? A classifier two-sample test, local in x.

    .. math:: (z^*_i, x_i) \sim p(z, x),\quad z_i \sim q(z \mid x_i), \qquad
              t(x) = E_{q(z \mid x)}\big[(d(z, x) - \tfrac12)^2\big]

    A classifier d learns to tell :math:`(z^*_i, x_i)` from :math:`(z_i, x_i)`; where it cannot, at
    a row x, t(x) is small. How small is what H classifiers say that have learned the same with the
    two of a pair swapped at random: if q is the posterior everywhere, so that a true and a drawn
    latent are exchangeable, the p-value of each row is uniform. It takes draws alone, no density,
    and no decoder rows but for the simulations. :func:`sbc` averages over rows, and what it finds
    may be wrong at few of them; this says where, on data as the model draws them.

    The classifiers are networks of one layer on the row, standardised (of more than 20 numbers its
    leading principal components), and on the latents in units of the guide's own mean and standard
    deviation at that row, with their squares and products.

    Args:
        model, guide: Pyro programs; the guide is amortised, so that it takes simulated rows.
        *args: the rows to be tested, as both programs are called. Conditions are those of the
            simulations too, row after row, again from the first when they are used up.
        num_simulations: S >= 100.
        num_draws: L >= 20, of q at each row, and as many again for its mean and scale.
        num_null: H >= 19; the smallest p-value is 1 / (H + 1).
        max_rows: largest number of (draw, row) rows computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole.

    Returns:
        :class:`LocalTest`.

    Raises:
        ValueError: bad arguments; the model cannot draw x; guide and model share no drawn latent.

    Source: Linhart, Gramfort & Rodrigues, L-C2ST: Local Diagnostics for Posterior Approximations in
    Simulation-Based Inference, 2023.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):  # the posterior, but for positive x
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5 ** 0.5 * torch.where(x > 0, 2., 1.)))
        >>> x = torch.tensor([-1.5, 1.5])
        >>> p = diagnostics.local_c2st(model, guide, x, num_null=19, seed=0).p_value
        >>> p[0] > 0.1, p[1] == 1 / 20
        (tensor(True), tensor(True))
    """
    model, guide = bound(model, guide, kwargs)
    check_at_least(100, num_simulations=num_simulations)
    check_at_least(20, num_draws=num_draws)
    check_at_least(19, num_null=num_null)
    check_at_least(1, max_rows=max_rows)
    rows = check_pair_and_data(model, guide, args, estimates=True)
    data, pairs = [], []
    with evaluating(model, guide, args, seed):
        names = _drawn_by_both(model, guide, take(args, slice(1)))
        drawn = simulations(model, args, rows, num_simulations, num_draws + 1, max_rows)
        for simulated, truth in drawn:
            data.append(_numbers(simulated))
            pairs.append(_in_units(guide, simulated, names, num_draws, 1, truth))
        project = _projection(torch.cat(data))
        features = _features(torch.cat(pairs, 1), project(torch.cat(data)))
        with torch.enable_grad():
            weights = _learned(features, num_null)
        found = []
        for part, _ in pieces(rows, 2 * num_draws, max_rows):
            batch = take(args, part)
            z = _in_units(guide, batch, names, num_draws, num_draws)
            x = project(_numbers(batch)).expand(num_draws, -1, -1)
            logits = _logits(_features(z, x).flatten(0, 1), weights)
            away = (logits.sigmoid() - 0.5).square().reshape(num_null + 1, num_draws, -1)
            found.append(away.mean(1).double().cpu())
    statistics = torch.cat(found, 1)
    return LocalTest(statistics[0], statistics[1:], num_simulations)


def _drawn_by_both(model: Program, guide: Program, args: tuple[Any, ...]) -> list[str]:
    """Latents that both programs draw."""
    names = [
        {
            name
            for name, site in sample_sites(trace(program, args, {})).items()
            if not (site["is_observed"] or is_enumerated(site))
        }
        for program in (model, guide)
    ]
    if not names[0] & names[1]:
        raise ValueError(
            f"the model draws {sorted(names[0])} and the guide {sorted(names[1])}: a two-sample "
            "test compares latents that both draw, and what is summed out is exact"
        )
    return sorted(names[0] & names[1])


def _flat(sites: dict[str, Site], names: list[str], *shape: int) -> Tensor:
    """All latents side by side, ``(*shape, D)``, float32."""
    return torch.cat([rows_first(sites[n]).float().reshape(*shape, -1) for n in names], -1)


def _in_units(
    guide: Program,
    args: tuple[Any, ...],
    names: list[str],
    num_moments: int,
    num_used: int,
    truth: Trace | None = None,
) -> Tensor:
    """Draws of q at each row, after the truth if there is one, ``(1 + used, n, D)``.

    In units of the mean and standard deviation of further draws, so that a true latent and a drawn
    one are treated alike.
    """
    with particle_plate(structure(guide, guide, args, {}), num_moments + num_used):
        sites = sample_sites(trace(guide, args, {}))
    n = count_rows(args)
    drawn = _flat(sites, names, num_moments + num_used, n)
    used, others = drawn[:num_used], drawn[num_used:]
    if truth is not None:
        used = torch.cat([_flat(sample_sites(truth), names, 1, n), used])
    spread = others.std(0)
    units = (used - others.mean(0)) / torch.where(spread > 0, spread, 1.0)
    return units.clamp(-10, 10)


def _numbers(args: tuple[Any, ...]) -> Tensor:
    """The rows as numbers, ``(n, F)``; a missing value is 0."""
    tensors = [a.reshape(len(a), -1).float() for a in args if isinstance(a, Tensor) and a.dim()]
    return torch.cat(tensors, -1).nan_to_num()


def _projection(rows: Tensor) -> Callable[[Tensor], Tensor]:
    """Standardises rows as these; of more than 20 columns their leading principal components."""
    mean, spread = rows.mean(0), rows.std(0)
    inverse = torch.where(spread > 0, 1 / spread.clamp(min=1e-12), 0.0)
    if rows.shape[1] <= _COMPONENTS:
        return lambda new: (new - mean) * inverse
    _, scale, axes = torch.linalg.svd((rows - mean) * inverse, full_matrices=False)
    axes, scale = axes[:_COMPONENTS], scale[:_COMPONENTS].clamp(min=1e-6) / len(rows) ** 0.5
    return lambda new: (new - mean) * inverse @ axes.T / scale


def _features(z: Tensor, x: Tensor) -> Tensor:
    """z, its squares and products, and x, ``(..., n, features)``."""
    D = z.shape[-1]
    i, j = torch.triu_indices(D, D) if D <= _PRODUCTS else torch.arange(D).expand(2, D)
    products = z[..., i] * z[..., j] - (i == j).to(z)
    return torch.cat([z, products, x.expand(*z.shape[:-1], -1)], -1)


def _learned(pairs: Tensor, num_null: int) -> list[Tensor]:
    """Weights of 1 + H classifiers that tell the two of a pair apart, for ``pairs (2, S, F)``.

    The first is told which is the truth; the others are told so of one or the other at random.
    """
    _, S, F = pairs.shape
    label = (torch.rand(num_null + 1, S, device=pairs.device) < 0.5).to(pairs)
    label[0] = 1.0  # of the first of the two; the second has the other
    first = torch.randn(F, _WIDTH, device=pairs.device) / F**0.5
    weights = [
        w.expand(num_null + 1, *w.shape).clone().requires_grad_()  # all begin as one
        for w in (first, first.new_zeros(1, _WIDTH), first.new_zeros(_WIDTH, 1))
    ]
    adam = torch.optim.Adam(weights, lr=_RATE)
    for step in range(_STEPS):
        adam.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        rows = torch.randint(S, (min(_BATCH, S),), device=pairs.device)
        logits = _logits(pairs[:, rows].flatten(0, 1), weights)
        told = torch.cat([label[:, rows], 1 - label[:, rows]], 1)
        loss = binary_cross_entropy_with_logits(logits, told, reduction="none").mean(1).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return [w.detach() for w in weights]


def _logits(rows: Tensor, weights: list[Tensor]) -> Tensor:
    """Of every classifier at rows ``(R, F)``, ``(1 + H, R)``."""
    first, bias, last = weights
    return ((rows @ first + bias).tanh() @ last).squeeze(-1)
