"""Simulation-based calibration: is q(z | x) the posterior, on data drawn from the model itself?"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro.poutine import Trace
from torch import Tensor

from ppvae.arguments import require_functions, takes_numbers
from ppvae.diagnostics.arviz_versions import bundle, require_arviz
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    count_rows,
    evaluating,
    require_numbers,
    rows_first,
    simulations,
)
from ppvae.diagnostics.uniformity import chi_square, departure, ecdf_band
from ppvae.enumeration import total
from ppvae.intake import takes_rows
from ppvae.pairs import Program, replay, sample_sites
from ppvae.plots import diagnostics as plots
from ppvae.terms import NoInverse, leftmost_plate, term
from ppvae.weights import whole_weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TestQuantity = Callable[..., Tensor]
_LOG_JOINT, _LOG_Q = "log p(x, z)", "log q(z | x)"
_DISTANCE = "distance to a point"


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    r"""Ranks of true latents among a guide's draws, over simulated data sets of one row each.

    If the guide is the posterior, each rank is uniform on 0 .. ``num_draws``.

    Attributes:
        ranks: by quantity, ``(S, D)``: how many of the draws lie below the true value; D units of
            a latent, 1 for a test quantity.
        num_draws: L, draws of q(z | x) per simulation.
        absent: quantities that this pair does not have, and why.
    """

    ranks: dict[str, Tensor]
    num_draws: int
    absent: dict[str, str]

    @property
    def num_simulations(self) -> int:
        """S."""
        return len(next(iter(self.ranks.values())))

    @functools.cached_property
    def p_values(self) -> dict[str, Tensor]:
        """By quantity, the chi-square p-value of every unit, ``(D,)``."""
        return {name: chi_square(ranks, self.num_draws) for name, ranks in self.ranks.items()}

    @property
    def p_value(self) -> float:
        """Of all quantities together: the smallest, times their number (Bonferroni), at most 1."""
        every = torch.cat(list(self.p_values.values()))
        return min(1.0, every.min().item() * len(every))

    def coverage(self, levels: Sequence[float] | Tensor) -> dict[str, Tensor]:
        """How often credible sets of q hold the true value; calibrated if equal to their level.

        Central intervals of every latent unit; of all latents together, for ``"log q(z | x)"`` the
        sets of highest density, and for ``"distance to a point"`` the balls about it.

        Args:
            levels: in (0, 1); multiples of 2 / (num_draws + 1) suffer no rounding.

        Returns:
            By quantity ``(levels, D)``, each with standard error sqrt(level (1 - level) / S).
        """
        wanted = torch.as_tensor(levels, dtype=torch.float64).reshape(-1, 1, 1)
        if not ((wanted > 0) & (wanted < 1)).all():
            raise ValueError(f"levels must lie in (0, 1), got {levels}")
        found = {}
        for name, ranks in self.ranks.items():
            place = (ranks.double() + 0.5) / (self.num_draws + 1)
            # The size of the smallest set around the centre, or the mode, that holds the truth.
            one_sided = {_LOG_Q: 1 - place, _DISTANCE: place}
            size = one_sided.get(name, (2 * place - 1).abs())
            found[name] = (size <= wanted).double().mean(1)
        return found

    def band(self, level: float = 0.95) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The band in which the whole ECDF of uniform ranks stays with this probability.

        Returns:
            ``(points, lower, upper)``, ``(L,)`` each, as fractions.
        """
        return ecdf_band(self.num_simulations, self.num_draws, level)

    @property
    def verdict(self) -> list[str]:
        """What the ranks say, and what to do next."""
        if self.p_value > 0.01:
            return [
                f"No sign of miscalibration in {self.num_simulations} simulations "
                f"(p = {self.p_value:.2g} over {sum(len(p) for p in self.p_values.values())} "
                "quantities)."
            ]
        said = []
        count = sum(len(p) for p in self.p_values.values())
        for name, values in self.p_values.items():
            if name in _TOGETHER:
                continue
            kinds: dict[str, list[int]] = {}
            for unit in (values * count < 0.01).nonzero().flatten().tolist():
                kind = departure(self.ranks[name][:, unit], self.num_draws)
                kinds.setdefault(kind, []).append(unit)
            for kind, units in kinds.items():
                shown = ", ".join(map(str, units[:5])) + (", ..." if len(units) > 5 else "")
                word = "unit" if len(units) == 1 else "units"
                which = f"{name!r}" if len(values) == 1 else f"{name!r}, {word} {shown}"
                said.append(f"{which}: {_MEANING[kind]}")
        if not said:
            said = [
                "Every unit by itself is calibrated, all of them together are not: q drops a "
                "dependence between them. Try a guide with full covariance, or a flow."
            ]
        return [
            f"The guide is not the posterior on the model's own data (p = {self.p_value:.1g}).",
            *said,
        ]

    def __repr__(self) -> str:
        lines = [
            f"Calibration, {self.num_simulations} simulations, {self.num_draws} draws each",
            "",
            f"{'quantity':24s}{'p (chi-square)':>16s}"
            f"{'50 % sets hold':>16s}{'90 % sets hold':>16s}",
        ]
        covered = self.coverage([0.5, 0.9])
        for name, values in self.p_values.items():
            for unit, p in enumerate(values.tolist()):
                label = name if len(values) == 1 else f"{name}[{unit}]"
                shares = [f"{covered[name][i, unit].item():.1%}" for i in (0, 1)]
                lines.append(f"{label:24s}{p:16.2g}{shares[0]:>16s}{shares[1]:>16s}")
        lines += ["", "Verdict", *(f"- {sentence}" for sentence in self.verdict)]
        if self.absent:
            lines += ["", "Absent", *(f"- {what}: {why}." for what, why in self.absent.items())]
        return "\n".join(lines)

    def to_arviz(self) -> Any:
        """The ranks for ArviZ, whose ``plot_ecdf_pit`` (1.x) reads them: the group ``prior_sbc``.

        Returns:
            ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x). A variable for each
            quantity, ``(chain, draw, unit)``, with a draw for each simulation: the place of the
            true value among the guide's draws, (rank + 1/2) / (num_draws + 1), uniform on (0, 1)
            if the guide is the posterior. Units are counted from 0.

        Raises:
            ImportError: ArviZ is not installed.
        """
        require_arviz()
        found = {}
        for name, ranks in self.ranks.items():
            place = ((ranks.double() + 0.5) / (self.num_draws + 1)).numpy()[None]
            alone = place.shape[-1] == 1
            found[name] = (
                (["chain", "draw"], place[..., 0])
                if alone
                else (["chain", "draw", f"{name}_dim"], place)
            )
        return bundle({"prior_sbc": found})

    def plot(self) -> Figure:
        """The ECDFs of the ranks with their band, and the coverage of credible sets."""
        from matplotlib import pyplot as plt

        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
        plots.sbc_ecdf(self.ranks, self.num_draws, self.band(), ax=left)
        levels = torch.arange(1, 50) / 50
        plots.coverage(levels, self.coverage(levels), self.num_simulations, ax=right)
        return figure


_TOGETHER = (_LOG_JOINT, _LOG_Q, _DISTANCE)  # quantities of all latents
_MEANING = {
    "narrow": "q is too narrow; try a guide with full covariance, a flow, or training with IWELBO.",
    "wide": "q is too wide; train the guide for longer.",
    "shifted": "q is shifted; try a larger encoder, or train the guide for longer.",
    "other": "q has the wrong shape; try a flow guide.",
}


@takes_numbers
@takes_rows
def sbc(
    model: Program,
    guide: Program,
    *args: Any,
    num_simulations: int = 1000,
    num_draws: int = 99,
    test_quantities: Mapping[str, TestQuantity] | None = None,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> Calibration:
    r"""Simulation-based calibration of an amortised guide, all simulations in one batched pass.

    .. math:: z^*, x^* \sim p(z)\,p(x \mid z),\qquad z_1, \dots, z_L \sim q(z \mid x^*),\qquad
              r = \#\{l : f(z_l, x^*) < f(z^*, x^*)\}

    If q is the posterior, r is uniform on 0 .. L for every f. The latents' own units alone do not
    see a dropped correlation, so f is also log p(x, z), which depends on the data (Modrák et al.);
    log q(z | x), whose ranks are the coverage of sets of highest density, and the distance to a
    point that depends on x, whose ranks are that of balls about it (TARP). The draws of a guide
    are independent, so none have to be thinned. It tests the guide on the *model's* data; how the
    guide does on yours is what :func:`ppvae.diagnose` tells.

    Args:
        model, guide: Pyro programs; the guide is amortised, so that it takes simulated rows.
        *args: data, as both are called, of any number of rows. What the model observes is replaced
            by what it draws; conditions such as y are used as they are, row after row, again from
            the first when they are used up.
        num_simulations: S >= 100.
        num_draws: L >= 19; L + 1 with many divisors gives even bins.
        test_quantities: further f, by name: ``f(z, *args)`` of ``z``, by site a tensor
            ``(..., S, *event)``, gives ``(..., S)``.
        max_rows: largest number of (draw, simulation) rows computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`Calibration`.

    Raises:
        ValueError: bad arguments; the model cannot draw x; the value of an observed site is none
            of the arguments; a log-density at simulated data is NaN or infinite.

    Source: Talts et al., Validating Bayesian inference algorithms with simulation-based
    calibration, 2018; Säilynoja, Bürkner & Vehtari 2022 (bands); Modrák et al. 2023 (f that depend
    on the data); Lemos et al. 2023 (TARP: tests of accuracy with random points).

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x, sd=0.5 ** 0.5):  # the posterior
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, sd))
        >>> bool(diagnostics.sbc(model, guide, torch.zeros(1), seed=0).p_value > 0.01)
        True
        >>> narrow = lambda x: guide(x, sd=0.7 * 0.5 ** 0.5)
        >>> bool(diagnostics.sbc(model, narrow, torch.zeros(1), seed=0).p_value < 1e-4)
        True
    """
    model, guide = bound(model, guide, kwargs)
    check_at_least(100, num_simulations=num_simulations)
    check_at_least(19, num_draws=num_draws)
    check_at_least(1, max_rows=max_rows)
    rows = check_pair_and_data(model, guide, args, estimates=True)
    if test_quantities is not None:
        require_functions("test_quantities", test_quantities)
    tests, absent = dict(test_quantities or {}), dict[str, str]()
    columns: dict[str, list[Tensor]] = {}
    with evaluating(model, guide, args, seed):
        drawn = simulations(model, args, rows, num_simulations, num_draws, max_rows)
        for simulated, truth in drawn:
            ranks = _ranks(model, guide, truth, simulated, num_draws, tests, absent)
            for name, of_piece in ranks.items():
                columns.setdefault(name, []).append(of_piece)
    return Calibration({n: torch.cat(parts) for n, parts in columns.items()}, num_draws, absent)


def _ranks(
    model: Program,
    guide: Program,
    truth: Trace,
    args: tuple[Any, ...],
    num_draws: int,
    tests: dict[str, TestQuantity],
    absent: dict[str, str],
) -> dict[str, Tensor]:
    """By quantity ``(n, D)``, on the CPU; ``truth`` is the trace that the data came from."""
    weights = whole_weights(model, guide, args, {}, num_draws, estimates=True)
    require_numbers(weights, where="on data drawn from the model, ")
    true_sites, n, found = sample_sites(truth), count_rows(args), {}
    z_true, z_drawn = {}, {}
    for name, site in sample_sites(weights.guide_trace).items():
        if name in weights.enumerated or name not in true_sites:
            absent[name] = "it is summed out or auxiliary, so the guide does not draw it"
            continue
        z_true[name] = rows_first(true_sites[name])  # (n, ...)
        z_drawn[name] = rows_first(site)  # (L, n, ...)
        found[name] = _rank(z_drawn[name].reshape(num_draws, n, -1), z_true[name].reshape(n, -1))
    if z_true:
        at_draws, at_truth = _distances(
            torch.cat([z.reshape(num_draws, n, -1).double() for z in z_drawn.values()], -1),
            torch.cat([z.reshape(1, n, -1).double() for z in z_true.values()], -1),
            args,
        )
        found[_DISTANCE] = _rank(at_draws[..., None], at_truth[0, :, None])
    if weights.enumerated:
        absent["densities"] = "a latent is summed out"
    elif weights.estimated:
        absent["densities"] = f"that of site {min(weights.estimated)!r} is an estimate"
    else:
        for name, program, terms in (
            (_LOG_JOINT, model, weights.log_p), (_LOG_Q, guide, weights.log_q)
        ):  # fmt: skip
            at_draws = functools.reduce(torch.add, terms.values()).expand(num_draws, n)
            try:
                at_truth = _log_density(replay(program, truth, args, {}), n)
            except NoInverse as error:  # of a guide: the truth is none of its draws
                absent[name] = str(error)
                continue
            found[name] = _rank(at_draws[..., None], at_truth[:, None])
    for name, quantity in tests.items():
        at_draws, at_truth = quantity(z_drawn, *args), quantity(z_true, *args)
        if at_draws.shape != (num_draws, n) or at_truth.shape != (n,):
            raise ValueError(
                f"test quantity {name!r} must give (..., S) for z of (..., S, *event), got "
                f"{tuple(at_draws.shape)} for {num_draws} draws of {n} simulations; sum over the "
                "event dims only, as z['z'].sum(-1)"
            )
        found[name] = _rank(at_draws[..., None], at_truth[:, None])
    return found


def _distances(draws: Tensor, truth: Tensor, args: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """How far draws ``(L, n, D)`` and truth ``(1, n, D)`` are from a point that x determines.

    Coordinates are standardised over draws and truth together, which treats these alike, so ranks
    stay uniform. The point is a fixed random projection of the row: one that did not depend on x
    could not tell the posterior from the prior.
    """
    every = torch.cat([draws, truth])
    z = _standardised(every.flatten(0, 1)).reshape(every.shape)
    data = [a.reshape(len(a), -1).double() for a in args if isinstance(a, Tensor) and a.dim()]
    x = _standardised(torch.cat([part.nan_to_num() for part in data], -1))
    mixed = torch.Generator().manual_seed(0)
    projection = torch.randn(x.shape[-1], z.shape[-1], generator=mixed, dtype=x.dtype)
    point = x @ projection.to(x.device) / math.sqrt(x.shape[-1])
    found = (z - point).square().sum(-1)
    return found[:-1], found[-1:]


def _standardised(rows: Tensor) -> Tensor:
    """Columns of mean 0 and standard deviation 1; constant ones are 0."""
    spread = rows.std(0, correction=0)
    return (rows - rows.mean(0)) / torch.where(spread > 0, spread, 1.0)


def _log_density(drawn: Trace, rows: int) -> Tensor:
    """The log-density of a trace, ``(n,)``."""
    sites = list(sample_sites(drawn).values())
    terms = [term(site, leftmost_plate(sites)) for site in sites]
    return total(terms).expand(1, rows)[0]


def _rank(draws: Tensor, truth: Tensor) -> Tensor:
    """How many draws ``(L, n, D)`` lie below the truth ``(n, D)``; ties are broken at random."""
    below, ties = (draws < truth).sum(0), (draws == truth).sum(0)
    below = below + (torch.rand(ties.shape, device=ties.device) * (ties + 1)).long()
    return below.cpu()
