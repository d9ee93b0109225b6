"""A guide's posterior beside a reference, and the gaps it leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.plots.common import BLUE, ORANGE, PALETTE, Values, array, axes, number, shaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELLS = 80
_CURE = (
    "Pass draws of one datapoint, guide's and reference's with the same d; a reference that did "
    "not converge is NaN."
)
BROWN = "#B35900"  # told from blue by every reader, and dark enough for lines


def posterior_contours(
    guide_draws: Values,
    reference_draws: Values,
    latents: tuple[int, int] = (0, 1),
    mass: tuple[float, ...] = (0.5, 0.9),
    ax: Axes | None = None,
    name: str = "z",
) -> Axes:
    """Draw q(z | x) of one datapoint over a reference posterior, for two of its latents.

    The reference is drawn as points with filled regions, the guide as dashed lines; each line
    encloses the densest region that holds so much of the mass (of a smoothed histogram).

    Args:
        guide_draws, reference_draws: ``(S, d)`` draws of one datapoint, as
            ``comparison.guide_draws[:, n]`` of ``diagnostics.compare_posteriors``.
        latents: which two of the d latents.
        mass: shares of the mass to enclose, each in (0, 1).
        ax: Axes to draw on.
        name: of the latent site.

    Returns:
        The axes.

    Raises:
        ValueError: the draws do not have these latents, or are not finite.

    Example:
        >>> import torch
        >>> from matplotlib import pyplot as plt
        >>> _ = torch.manual_seed(0)
        >>> posterior_contours(torch.randn(500, 2), 1.5 * torch.randn(500, 2)).get_xlabel()
        'z[0]'
        >>> plt.close("all")
    """
    guide, reference = (
        _two(draws, latents, label)
        for draws, label in ((guide_draws, "guide_draws"), (reference_draws, "reference_draws"))
    )
    shares = sorted(mass)
    if not shares or shares[0] <= 0 or shares[-1] >= 1:
        raise ValueError(f"mass must lie in (0, 1), got {mass}")
    both = np.concatenate([guide, reference])
    low, high = np.quantile(both, [0.0005, 0.9995], axis=0)
    margin = 0.1 * (high - low)
    extent = [(low[i] - margin[i], high[i] + margin[i]) for i in range(2)]
    ax = axes(ax, (5.0, 4.5))
    shown = reference[:: max(1, len(reference) // 1000)]
    ax.scatter(shown[:, 0], shown[:, 1], s=5, color="#555555", alpha=0.35,
               linewidth=0, label="reference draws")  # fmt: skip
    x, y, density = _density(reference, extent)
    levels = _levels(density, shares)
    ax.contourf(x, y, density, levels=[*levels, density.max()], colors=[BLUE],
                alpha=0.25)  # fmt: skip
    ax.contour(x, y, density, levels=levels, colors=[BLUE], linewidths=1.4)
    x, y, density = _density(guide, extent)
    ax.contour(x, y, density, levels=_levels(density, shares), colors=[BROWN],
               linewidths=1.6, linestyles="--")  # fmt: skip
    percent = ", ".join(f"{share:.0%}" for share in shares)
    ax.plot([], [], color=BLUE, label=f"p(z | x): {percent}")
    ax.plot([], [], color=BROWN, linestyle="--", label=f"q(z | x): {percent}")
    ax.set(xlabel=f"{name}[{latents[0]}]", ylabel=f"{name}[{latents[1]}]",
           xlim=extent[0], ylim=extent[1])  # fmt: skip
    ax.legend(frameon=False, fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1), ncols=2,
              markerscale=2)  # fmt: skip
    return ax


def posterior_intervals(
    guide_draws: Values, reference_draws: Values, ax: Axes | None = None, name: str = "z"
) -> Axes:
    """Draw the marginals of every latent of one datapoint: medians, 50 % and 95 % intervals.

    Args:
        guide_draws, reference_draws: ``(S, d)`` draws of one datapoint.
        ax: Axes to draw on.
        name: of the latent site.

    Returns:
        The axes.

    Raises:
        ValueError: the draws differ in their number of latents, or are not finite.

    Example:
        >>> import torch
        >>> from matplotlib import pyplot as plt
        >>> _ = torch.manual_seed(0)
        >>> posterior_intervals(torch.randn(500, 4), torch.randn(500, 4)).get_xlabel()
        'value of the latent'
        >>> plt.close("all")
    """
    guide = shaped("guide_draws", guide_draws, "S", "d", finite="all", cure=_CURE)
    reference = shaped(
        "reference_draws", reference_draws, "S", guide.shape[1], finite="all", cure=_CURE
    )
    d = guide.shape[1]
    ax = axes(ax, (6.0, 0.9 + 0.32 * d))
    rows = np.arange(d)
    for draws, shift, colour, marker, label in (
        (reference, -0.16, BLUE, "o", "p(z | x), reference"),
        (guide, 0.16, BROWN, "s", "q(z | x), guide"),
    ):
        q = np.quantile(draws, [0.025, 0.25, 0.5, 0.75, 0.975], axis=0)
        ax.hlines(rows + shift, q[0], q[4], color=colour, linewidth=1)
        ax.hlines(rows + shift, q[1], q[3], color=colour, linewidth=3.5)
        ax.plot(q[2], rows + shift, marker, color="white", markeredgecolor=colour, markersize=4.5,
                linestyle="none", label=f"{label}: median, 50 %, 95 %")  # fmt: skip
    ax.set_yticks(rows, [f"{name}[{row}]" for row in rows])
    ax.invert_yaxis()
    ax.set_xlabel("value of the latent")
    ax.legend(frameon=False, fontsize="x-small", loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def gap_bars(gaps: Mapping[str, Any], ax: Axes | None = None) -> Axes:
    """Draw the approximation and amortisation gaps of several guides as stacked bars.

    Args:
        gaps: by label, results of ``diagnostics.gaps``: anything with ``approximation`` and
            ``amortisation``, one value per datapoint, nats. Bars are means over datapoints, the
            error bar two standard errors of the total.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: nothing to draw.

    Example:
        >>> from types import SimpleNamespace
        >>> from matplotlib import pyplot as plt
        >>> one = SimpleNamespace(approximation=[0.5, 0.7], amortisation=[1.0, 1.2])
        >>> gap_bars({"diagonal": one}).get_ylabel()
        'gap to log p(x) [nats per datapoint]'
        >>> plt.close("all")
    """
    if not gaps:
        raise ValueError("no gaps to draw: pass results by label, {'diagonal': gaps}")
    ax = axes(ax, (1.6 + 1.3 * len(gaps), 4.0))
    approximation = {name: array(g.approximation) for name, g in gaps.items()}
    amortisation = {name: array(g.amortisation) for name, g in gaps.items()}
    place = np.arange(len(gaps))
    lower = np.array([values.mean() for values in approximation.values()])
    upper = np.array([values.mean() for values in amortisation.values()])
    # Below 0 (noise) a part starts at 0 of its own, so that no bar is hidden.
    base = np.where((lower > 0) & (upper > 0), lower, 0.0)
    ax.bar(place, lower, 0.6, color=PALETTE[0], label="approximation (the family)")
    ax.bar(place, upper, 0.6, base, color=ORANGE, label="amortisation (the encoder)", hatch="//",
           edgecolor="white", linewidth=0)  # fmt: skip
    for i, name in enumerate(gaps):
        total = approximation[name] + amortisation[name]
        if len(total) > 1:
            error = 2 * total.std(ddof=1) / np.sqrt(len(total))
            ax.errorbar(i + 0.2, total.mean(), error, color="black", capsize=4, linewidth=1)
        box = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1}
        for middle, value in ((lower[i] / 2, lower[i]), (base[i] + upper[i] / 2, upper[i])):
            below = value < 0  # beside the axis, not on it
            ax.annotate(number(value, ".2f"), (i, 0 if below else middle), (0, -8 if below else 0),
                        textcoords="offset points", ha="center", va="center", fontsize="small",
                        bbox=box)  # fmt: skip
    ax.set_xticks(place, list(gaps))
    ax.set_ylabel("gap to log p(x) [nats per datapoint]")
    ax.axhline(0, color="black", linewidth=0.8)
    ax.margins(y=0.12)
    ax.legend(frameon=False, fontsize="small", loc="lower left", bbox_to_anchor=(0, 1))
    return ax


def _two(draws: Values, latents: tuple[int, int], label: str) -> np.ndarray:
    values = shaped(label, draws, "S", "d", cure=_CURE)
    if not all(-values.shape[1] <= i < values.shape[1] for i in latents):
        raise ValueError(f"{label} of shape {values.shape} has no latents {latents}")
    return shaped(label, values[:, list(latents)], "S", 2, finite="all", cure=_CURE)


def _density(draws: np.ndarray, extent: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A smoothed histogram: cell centres and ``(rows of y, columns of x)``."""
    from scipy.ndimage import gaussian_filter

    counts, x, y = np.histogram2d(draws[:, 0], draws[:, 1], bins=CELLS, range=extent)
    cells = [(high - low) / CELLS for low, high in extent]
    widths = np.maximum(0.5, draws.std(0) * len(draws) ** (-1 / 6) / cells)  # Scott, in cells
    smooth = gaussian_filter(counts, widths, mode="constant", truncate=8)
    return (x[1:] + x[:-1]) / 2, (y[1:] + y[:-1]) / 2, smooth.T


def _levels(density: np.ndarray, shares: list[float]) -> list[float]:
    """Heights above which lies so much of the mass, rising."""
    ordered = np.sort(density.ravel())[::-1]
    mass = ordered.cumsum() / ordered.sum()
    levels = [float(ordered[np.searchsorted(mass, share)]) for share in shares]
    return sorted(set(levels))
