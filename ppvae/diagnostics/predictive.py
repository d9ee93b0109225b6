"""Predictive checks: do data drawn from the pair look like the data?"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppvae.arguments import require_functions, takes_numbers
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    evaluating,
    pieces,
    rows_first,
    take,
)
from ppvae.intake import takes_rows
from ppvae.pairs import (
    Program,
    particle_plate,
    reason,
    replay,
    sample_sites,
    shown,
    structure,
    trace,
    unconditioned,
)
from ppvae.plots import diagnostics as plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Statistic = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False, repr=False)
class PredictiveCheck:
    r"""Test statistics of the data and of data drawn from the pair.

    Attributes:
        observed: by statistic, T(x) of each datapoint, ``(N,)``.
        replicated: T of each draw of it, ``(K, N)``.
        site: the observed site that was drawn.
    """

    observed: dict[str, Tensor]
    replicated: dict[str, Tensor]
    site: str

    @property
    def p_value(self) -> dict[str, float]:
        """P(T(x_rep) >= T(x)) for T averaged over the datapoints; ties count half."""
        return {
            name: _above(self.replicated[name].mean(1, keepdim=True), value.mean()[None]).item()
            for name, value in self.observed.items()
        }

    @property
    def p_values(self) -> dict[str, Tensor]:
        """The same of every datapoint by itself, ``(N,)``."""
        return {name: _above(self.replicated[name], value) for name, value in self.observed.items()}

    def __repr__(self) -> str:
        draws, rows = next(iter(self.replicated.values())).shape
        lines = [
            f"Predictive check of {self.site!r}: {rows} datapoints, {draws} draws of each",
            "",
            f"{'statistic':20s}{'data':>10s}{'drawn':>10s}{'± sd':>10s}{'p':>8s}"
            f"{'rows with p < 0.01 or > 0.99':>32s}",
        ]
        for name, value in self.observed.items():
            means, single = self.replicated[name].mean(1), self.p_values[name]
            extreme = ((single < 0.01) | (single > 0.99)).double().mean().item()
            lines.append(
                f"{name:20s}{value.mean().item():10.4g}{means.mean().item():10.4g}"
                f"{means.std().item():10.2g}{self.p_value[name]:8.3f}{extreme:32.1%}"
            )
        return "\n".join(lines)

    def plot(self) -> Figure:
        """The distribution of every statistic, and its value for the data."""
        from matplotlib import pyplot as plt

        count = len(self.observed)
        figure, axes = plt.subplots(
            1, count, figsize=(4.5 * count, 3.4), layout="constrained", squeeze=False
        )
        for ax, (name, value) in zip(axes[0], self.observed.items(), strict=True):
            plots.predictive_check(value, self.replicated[name], name, ax=ax)
        return figure


@takes_numbers
@takes_rows
def predictive_check(
    model: Program,
    guide: Program,
    *args: Any,
    statistics: Mapping[str, Statistic],
    num_draws: int = 200,
    site: str | None = None,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> PredictiveCheck:
    r"""Posterior predictive check: draw new data at the guide's draws and compare statistics.

    .. math:: z_k \sim q(z \mid x),\quad x_k \sim p(x \mid z_k),\qquad
              p = P\big(T(x_k) \ge T(x)\big)

    A posterior predictive p-value uses the datapoint twice, so p near 0 or 1 is rarer than under a
    uniform law: extremes mean something, the middle proves nothing. With ``guides.Prior(model)`` as
    guide it is a prior predictive check, uniform if the model is right. Values that a mask hides
    are NaN in the data and in what is drawn, so statistics have to pass over them.

    Args:
        model, guide: Pyro programs.
        *args: data, as both are called.
        statistics: by name, functions of data ``(M, *event)`` that give ``(M,)``.
        num_draws: K >= 20.
        site: the observed site, if there are several.
        max_rows: largest number of (draw, datapoint) rows computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`PredictiveCheck`.

    Raises:
        ValueError: bad arguments; x cannot be drawn; a statistic has another shape, or is NaN.

    Source: Gelman, Meng & Stern, Posterior predictive assessment of model fitness via realized
    discrepancies, 1996.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, diagnostics, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> ink = {"pixels on": lambda x: x.sum(-1)}
        >>> check = diagnostics.predictive_check(model, guide, torch.ones(9, 4), statistics=ink)
        >>> check.p_value["pixels on"]  # nets as initialised never draw only ones
        0.0
    """
    model, guide = bound(model, guide, kwargs)
    check_at_least(20, num_draws=num_draws)
    check_at_least(1, max_rows=max_rows)
    require_functions("statistics", statistics)
    if site is not None and not isinstance(site, str):
        raise TypeError(f"site takes the name of an observed site, got {site!r}")
    if not statistics:
        raise ValueError('statistics is empty: give functions, e.g. {"mean": lambda x: x.mean(-1)}')
    rows = check_pair_and_data(model, guide, args, estimates=True)
    free = unconditioned(model)
    replicated = {label: torch.empty(num_draws, rows, dtype=torch.float64) for label in statistics}
    with evaluating(model, guide, args, seed):
        sites = sample_sites(trace(model, args, {}))
        name = _choose(site, [n for n, found in sites.items() if found["is_observed"]])
        data, observed = rows_first(sites[name]), dict[str, Tensor]()
        visible = shown(sites[name], sites[name]["value"])
        if visible is not None:
            visible = rows_first({**sites[name], "value": visible.expand(data.shape)})
        shape = structure(model, guide, args, {})
        for part, sizes in pieces(rows, num_draws, max_rows):
            batch, start = take(args, part), 0
            for size in sizes:
                drawn = _draw(free, guide, batch, shape, size, name)  # (size, n, *event)
                dtype = _common(data.dtype, drawn.dtype)
                data, drawn = data.to(dtype), drawn.to(dtype)
                if visible is not None:  # as incomplete as the data
                    data = data.masked_fill(~visible, torch.nan)
                    drawn = drawn.masked_fill(~visible[part], torch.nan)
                observed = observed or {
                    label: _of(label, f, data) for label, f in statistics.items()
                }
                for label, f in statistics.items():
                    flat = _of(label, f, drawn.flatten(0, 1)).reshape(size, -1)
                    replicated[label][start : start + size, part] = flat.double()
                start += size
    return PredictiveCheck(
        {label: values.double() for label, values in observed.items()},
        replicated,
        name,
    )


def _draw(
    free: Program, guide: Program, args: tuple[Any, ...], shape: Any, count: int, site: str
) -> Tensor:
    """x at draws of the guide, ``(count, n, *event)``."""
    with particle_plate(shape, count):
        try:
            drawn = trace(guide, args, {})
            predictive = replay(free, drawn, args, {})
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"site {site!r} cannot be drawn: {reason(error)}") from error
    value = rows_first(sample_sites(predictive)[site])
    return value if count > 1 else value[None]


def _common(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    """The coarser of two precisions: T of equal values is equal in one precision only."""
    floats = [dtype for dtype in (one, other) if dtype.is_floating_point]
    if floats:
        return max(floats, key=lambda dtype: torch.finfo(dtype).eps)
    return torch.promote_types(one, other)


def _choose(site: str | None, observed: list[str]) -> str:
    if site is None and len(observed) == 1:
        return observed[0]
    if site not in observed:
        raise ValueError(f"site={site!r}: name one of the observed sites {observed}")
    return site


def _of(name: str, statistic: Statistic, values: Tensor) -> Tensor:
    found = statistic(values).detach().cpu()
    if found.shape != (len(values),):
        raise ValueError(
            f"statistic {name!r} must give one value per row, ({len(values)},), of data "
            f"{tuple(values.shape)}, got {tuple(found.shape)}"
        )
    if (missing := found.isnan()).any():
        raise ValueError(
            f"statistic {name!r} is NaN for {int(missing.sum())} of {len(found)} rows, first in "
            f"row {int(missing.nonzero()[0])}, so it cannot be ranked; choose one that is a number "
            "for every row (values that a mask hides are NaN: torch.nansum, Tensor.nanmean), or "
            "leave out rows with missing values"
        )
    return found


def _above(replicated: Tensor, observed: Tensor) -> Tensor:
    ties = (replicated == observed).double().mean(0)
    return (replicated > observed).double().mean(0) + 0.5 * ties
