"""Pictures of a diagnosis: k-hat, units, rate and distortion, calibration, predictive checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.plots.common import (
    BLUE,
    GREY,
    KHAT_BANDS,
    KHAT_LIMITS,
    LINES,
    MARKERS,
    PALETTE,
    RED,
    Values,
    array,
    axes,
    number,
    shaped,
)
from ppvae.plots.images import image_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def khat_histogram(khat_values: Values, ax: Axes | None = None) -> Axes:
    r"""Draw the distribution of Pareto k-hat, coloured by what it means, with the thresholds.

    Args:
        khat_values: ``(N,)``; NaN is left out. Values above 2 are gathered in the last bin.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: if there is no k-hat to draw.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = khat_histogram([0.1, 0.2, 0.6, 0.9], ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['good: 2', 'usable: 1', 'unreliable: 1']
    """
    values = shaped("khat_values", khat_values, "N")
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("khat_values are all NaN; k-hat takes more than 20 particles")
    ax = axes(ax)
    low = np.floor(10 * max(values.min(), -1.5) - 1e-6) / 10  # below the smallest, see below
    high = 1.2 if values.max() <= 1.2 else 2.0
    shown = np.clip(values, low + 1e-9, high - 1e-9)
    edges = np.arange(round(low * 20), round(high * 20) + 1) / 20
    for left, right, colour, label in KHAT_BANDS:
        inside = (values > left) & (values <= right)
        # A value on a limit belongs to the bin below it.
        below = np.nextafter(shown[inside], -np.inf)
        ax.hist(below, edges.tolist(), color=colour, edgecolor="white", linewidth=0.4,
                label=f"{label}: {inside.sum():,}")  # fmt: skip
    for limit, style in KHAT_LIMITS:
        ax.axvline(limit, color=GREY, ls=style, lw=1.2)
    note = f" (above {high:g} in the last bar)" if values.max() > high else ""
    ax.set(xlabel=r"Pareto $\hat{k}$" + note, ylabel="datapoints", xlim=(edges[0], edges[-1]))
    ax.legend(loc="best", frameon=False, fontsize="small")
    return ax


def khat_images(
    images: Values, khat_values: Values, shape: Sequence[int], ax: Axes | None = None
) -> Axes:
    r"""Draw the histogram of Pareto k-hat whose bricks are the datapoints themselves.

    Each image stands in the column of its k-hat, 0.05 wide, in the colour of what k-hat means:
    which points are to be trusted is seen at once. Some two hundred images are enough.

    Args:
        images: ``(M, D)``, pixels in [0, 1]; of three channels, their mean is drawn.
        khat_values: ``(M,)``; NaN is left out. Values below 0 and above 2 stand at the ends.
        shape: of one image, ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``.
        ax: Axes to draw on.

    Returns:
        The axes; ``ax.images[0]`` is the picture.

    Raises:
        ValueError: lengths differ, or there is no k-hat to draw.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = khat_images(torch.rand(3, 6), [0.12, 0.15, 0.9], (2, 3), ax=Figure().subplots())
        >>> ax.images[0].get_array().shape  # two images high; columns from 0.1 to 0.9
        (4, 48, 3)
    """
    from matplotlib.colors import to_rgb

    channels, height, width = (1, *shape)[-3:]
    values = shaped("khat_values", khat_values, "M", finite="some", cure="k-hat takes K > 20.")
    pixels = shaped("images", images, len(values), channels * height * width, finite="all")
    ink = pixels.reshape(-1, channels, height, width).mean(1).clip(0, 1)
    known = np.flatnonzero(~np.isnan(values))
    # A value on a limit belongs to the column below it.
    bins = np.ceil(20 * values[known].clip(1e-9, 2) - 1e-9).astype(int) - 1
    first, columns = bins.min(), np.ptp(bins) + 1
    counts = np.bincount(bins - first)
    picture = np.ones((counts.max(), height, columns, width, 3))
    filled = np.zeros(columns, int)
    for i, column in zip(known, bins - first, strict=True):
        colour = next(c for low, high, c, _ in KHAT_BANDS if low < values[i] <= high)
        row = -1 - filled[column]  # from the bottom
        picture[row, :, column] -= ink[i][..., None] * (1 - np.array(to_rgb(colour)))
        filled[column] += 1
    ax = axes(ax)
    left, right = first / 20, (first + columns) / 20
    tall = counts.max() * height / width / 20
    ax.imshow(picture.reshape(-1, columns * width, 3), extent=(left, right, 0, tall))
    ax.set(yticks=[], xlabel=r"Pareto $\hat{k}$ of each datapoint")
    ax.spines[["left", "right", "top"]].set_visible(False)
    for low, high, colour, label in KHAT_BANDS:
        share = ((values > low) & (values <= high)).sum() / len(known)
        ax.plot([], [], "s", color=colour, label=f"{label}: {share:.0%}")
    ax.legend(loc="upper left", frameon=False, fontsize="small", handletextpad=0.1)
    return ax


def worst_points(
    images: Values, khat_values: Values, shape: Sequence[int], ax: Axes | None = None
) -> Axes:
    """Draw the images of the datapoints with the largest k-hat, each with its k-hat below.

    Args:
        images: ``(M, D)``, worst first, pixels in [0, 1].
        khat_values: ``(M,)``.
        shape: of one image, ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``.
        ax: Axes to draw on.

    Returns:
        The axes.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = worst_points(torch.rand(3, 6), [2.0, 1.0, 0.8], (2, 3), ax=Figure().subplots())
        >>> [text.get_text() for text in ax.texts]
        ['2.00', '1.00', '0.80']
    """
    pixels = array(images)
    values = shaped("khat_values", khat_values, len(pixels), cure="Pass one per image.")
    columns = min(5, len(pixels))
    ax = image_grid(pixels.reshape(len(pixels), -1), shape, ax, columns=columns)
    height, width = shape[-2:]
    for i, value in enumerate(values):
        row, column = divmod(i, columns)
        ax.text((column + 0.04) * width - 0.5, (row + 0.97) * height - 0.5, f"{value:.2f}",
                fontsize="small", color="black", va="bottom",
                bbox={"facecolor": "white", "alpha": 0.8, "pad": 1, "linewidth": 0})  # fmt: skip
    return ax


def kl_per_unit(
    kl: Values, active: Values | None = None, name: str = "z", ax: Axes | None = None
) -> Axes:
    """Draw the mean KL of every latent unit, largest first, active units apart from the others.

    Args:
        kl: ``(N, D)`` nats, by datapoint, or ``(D,)``.
        active: ``(D,)`` bool: which units are active; None: they are not told apart.
        name: of the latent.
        ax: Axes to draw on.

    Returns:
        The axes.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = kl_per_unit([0.1, 2.0, 0.0], active=[1, 1, 0], ax=Figure().subplots())
        >>> [float(bar.get_height()) for bar in ax.patches]
        [2.0, 0.1, 0.0]
    """
    values = array(kl)
    values = shaped("kl", values.mean(0) if values.ndim == 2 else values, "D")
    flags = np.ones(len(values)) if active is None else shaped("active", active, len(values))
    order = np.argsort(-values, kind="stable")
    ax = axes(ax)
    place = np.arange(len(values))
    ax.bar(place, values[order], color=[BLUE if flags[i] else GREY for i in order])
    if len(values) <= 32:
        turned = 90 if len(values) > 16 else 0
        ax.set_xticks(place, [str(i) for i in order], fontsize="small", rotation=turned)
    else:
        ax.set_xticks([])
    if active is not None:
        from matplotlib.patches import Patch

        counts = ((BLUE, "active", flags != 0), (GREY, "not active", flags == 0))
        handles = [Patch(color=c, label=f"{label}: {int(of.sum())}") for c, label, of in counts]
        ax.legend(handles=handles, frameon=False, fontsize="small")
    ax.set(xlabel=f"unit of {name}, sorted", ylabel="mean KL(q || p) [nats]",
           xlim=(-0.7, len(values) - 0.3))  # fmt: skip
    return ax


def rate_distortion(points: Mapping[str, tuple[float, float]], ax: Axes | None = None) -> Axes:
    """Draw pairs in the plane of rate and distortion, with the lines of equal ELBO.

    Args:
        points: by name, (rate, distortion), nats, as ``report.rate_distortion`` gives them.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: if there is no finite point.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = rate_distortion({"VAE": (20.0, 80.0), "beta 4": (8.0, 100.0)},
        ...                      ax=Figure().subplots())
        >>> ax.get_xlabel()
        'rate, KL(q || p) [nats]'
    """
    if not points or not np.isfinite(array([list(p) for p in points.values()])).all():
        raise ValueError(f"points must be finite (rate, distortion) by name, got {dict(points)}")
    ax = axes(ax)
    for i, (label, (rate, distortion)) in enumerate(points.items()):
        ax.plot(rate, distortion, MARKERS[i % 10], color=PALETTE[i % 10], ms=9, mec="black",
                mew=0.6, label=label)  # fmt: skip
    rates, distortions = (np.array(v) for v in zip(*points.values(), strict=True))
    reach = max(np.ptp(rates), np.ptp(distortions), 0.2 * float((rates + distortions).max()))
    left, bottom = max(0.0, rates.mean() - reach), distortions.mean() - reach
    if distortions.min() >= 0:
        bottom = max(0.0, bottom)
    right, top = rates.mean() + reach, distortions.mean() + reach
    total = np.linspace(left + bottom, right + top, 7)[1:-1]
    for value in total:
        ax.plot([left, right], [value - left, value - right], color=GREY, lw=0.8, ls=":", zorder=0)
        x = min(right - 0.17 * (right - left), value - bottom - 0.04 * (top - bottom))
        if left < x:  # above the line, which falls
            ax.annotate(f"ELBO {number(-value, '.0f')}", (x, value - x), fontsize="x-small",
                        color=GREY, ha="left", va="bottom")  # fmt: skip
    ax.set(xlim=(left, right), ylim=(bottom, top), xlabel="rate, KL(q || p) [nats]",
           ylabel="distortion, -E log p(x | z) [nats]".replace("-", "\N{MINUS SIGN}"))  # fmt: skip
    ax.legend(frameon=True, framealpha=1, edgecolor="white", fontsize="small", loc="upper right")
    return ax


def sbc_ecdf(
    ranks: Mapping[str, Values], num_draws: int, band: tuple[Any, Any, Any], ax: Axes | None = None
) -> Axes:
    """Draw each ECDF of ranks less the uniform one, with the band that all of it should stay in.

    Args:
        ranks: by quantity, ``(S, D)``, as ``calibration.ranks``.
        num_draws: L, so ranks lie in 0 .. L.
        band: ``(points, lower, upper)``, as ``calibration.band()``.
        ax: Axes to draw on.

    Returns:
        The axes; a line leaves the band where its quantity is not calibrated.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae.plots.diagnostics import sbc_ecdf
        >>> points = torch.arange(1, 20) / 20
        >>> ax = sbc_ecdf({"z": torch.randint(20, (50, 2))}, 19, (points, points - .2, points + .2),
        ...               ax=Figure().subplots())
        >>> len(ax.lines)  # zero, and a line for each unit
        3
    """
    points, lower, upper = (array(b) for b in band)
    ax = axes(ax)
    x = np.concatenate([[0], points, [1]])
    low, high = (np.concatenate([[0], b - points, [0]]) for b in (lower, upper))
    ax.fill_between(x, low, high, color=GREY, alpha=0.3, lw=0, label="95 % band, all of a line")
    ax.axhline(0, color=GREY, lw=0.8)
    inside = outside = 0
    for i, (name, values) in enumerate(ranks.items()):
        columns = array(values)
        for unit, column in enumerate(columns.T):
            counts = np.bincount(column.astype(int), minlength=num_draws + 1)
            ecdf = counts.cumsum()[:-1] / len(column)
            left = (ecdf < lower) | (ecdf > upper)
            outside, inside = outside + bool(left.any()), inside + (not left.any())
            ax.plot(x, np.concatenate([[0], ecdf - points, [0]]), color=PALETTE[i % 10], lw=1.2,
                    ls=LINES[i % 4],
                    label=None if unit else _units(name, columns))  # fmt: skip
    ax.set(xlabel="rank of the true value among the draws, as a fraction",
           ylabel="ECDF less the uniform one", xlim=(0, 1))  # fmt: skip
    ax.set_title(f"{outside} of {inside + outside} lines leave the band", fontsize="medium")
    ax.legend(frameon=False, fontsize="x-small", loc="best")
    return ax


def coverage(
    levels: Values, covered: Mapping[str, Values], num_simulations: int, ax: Axes | None = None
) -> Axes:
    """Draw how often credible sets hold the true value against their level.

    Args:
        levels: ``(levels,)`` in (0, 1).
        covered: by quantity ``(levels, D)``, as ``calibration.coverage(levels)``.
        num_simulations: S, for the band of two standard errors at each level.
        ax: Axes to draw on.

    Returns:
        The axes; below the diagonal a guide is too sure.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = coverage([0.5, 0.9], {"z": [[0.4], [0.8]]}, 100, ax=Figure().subplots())
        >>> ax.get_ylabel()
        'share that hold the true value'
    """
    level = array(levels)
    ax = axes(ax)
    reach = 2 * np.sqrt(level * (1 - level) / num_simulations)
    ax.fill_between(level, level - reach, level + reach, color=GREY, alpha=0.3, lw=0,
                    label="± 2 standard errors")  # fmt: skip
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    for i, (name, values) in enumerate(covered.items()):
        columns = array(values).reshape(len(level), -1)
        for unit, column in enumerate(columns.T):
            ax.plot(level, column, color=PALETTE[i % 10], lw=1.2, ls=LINES[i % 4],
                    label=None if unit else _units(name, columns))  # fmt: skip
    ax.set(xlabel="level of the credible set", ylabel="share that hold the true value",
           xlim=(0, 1), ylim=(0, 1), aspect="equal")  # fmt: skip
    ax.legend(frameon=False, fontsize="x-small", loc="upper left")
    return ax


def ratio_calibration(
    numerator: Values, denominator: Values, bins: int = 10, ax: Axes | None = None
) -> Axes:
    """Draw what a density ratio's network says of draws against where these came from.

    The network's probability that a point is of the numerator is sigmoid(T). Among points of about
    the same one, that share should be of the numerator; bars are two binomial standard errors of
    it. Draws should be new ones, which the network has not been trained on.

    Args:
        numerator: ``(N,)`` T, in nats, at draws from the numerator.
        denominator: ``(N,)`` T at as many from the denominator.
        bins: of equal numbers of points, >= 1.
        ax: Axes to draw on.

    Returns:
        The axes; on the diagonal T is the log-ratio, steeper than it T is too small in size.

    Raises:
        ValueError: arrays of another shape, or not finite; fewer points than bins.

    Example:
        >>> from matplotlib.figure import Figure
        >>> t = np.linspace(-2, 2, 50)
        >>> ax = ratio_calibration(t + 1, t - 1, bins=5, ax=Figure().subplots())
        >>> ax.get_ylabel()
        'share from the numerator'
    """
    of_numerator = shaped("numerator", numerator, "N", finite="all")
    of_denominator = shaped("denominator", denominator, of_numerator.size, finite="all")
    t = np.concatenate([of_numerator, of_denominator])
    if not 1 <= bins <= t.size:
        raise ValueError(f"bins must be 1 to the number of points, {t.size}; got {bins}")
    order = np.argsort(t, kind="stable")
    said, came = 0.5 * (1 + np.tanh(t[order] / 2)), order < of_numerator.size
    parts = list(zip(np.array_split(said, bins), np.array_split(came, bins), strict=True))
    probability = np.array([p.mean() for p, _ in parts])
    share = np.array([c.mean() for _, c in parts])
    # of the share that is expected, so that a bin all of one kind has a bar, too
    reach = 2 * np.sqrt([p.mean() * (1 - p.mean()) / p.size for p, _ in parts])
    ax = axes(ax)
    ax.plot([0, 1], [0, 1], color=GREY, lw=0.8)
    ax.errorbar(probability, share, reach, color=BLUE, marker="o", ms=4, lw=1.2, elinewidth=0.8,
                label="± 2 standard errors")  # fmt: skip
    ax.set(xlabel="sigmoid of T", ylabel="share from the numerator", xlim=(0, 1), ylim=(0, 1),
           aspect="equal")  # fmt: skip
    ax.legend(frameon=False, fontsize="x-small", loc="upper left")
    return ax


def _units(name: str, columns: np.ndarray) -> str:
    return name if columns.shape[1] == 1 else f"{name} ({columns.shape[1]} units)"


def predictive_check(
    observed: Values, replicated: Values, name: str = "statistic", ax: Axes | None = None
) -> Axes:
    """Draw the distribution of a statistic of drawn data, and its value for the data.

    Args:
        observed: ``(N,)``, T(x) of each datapoint.
        replicated: ``(K, N)``, T of every draw of it.
        name: of the statistic.
        ax: Axes to draw on.

    Returns:
        The axes; both are averaged over the datapoints. The title is red where fewer than 2.5 % of
        the draws lie on one side of the data.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> ax = plots.predictive_check([1.0, 2.0], torch.rand(50, 2), ax=Figure().subplots())
        >>> ax.get_title()
        'the data lie above all 50 draws'
    """
    from matplotlib.ticker import MaxNLocator

    value, drawn = array(observed).mean(), array(replicated).mean(1)
    ax = axes(ax, (4.5, 3.4))
    ax.hist(drawn, bins=min(40, max(10, len(drawn) // 10)), color=BLUE, label="drawn")
    ax.axvline(value, color=RED, lw=2, label="data")
    p = (drawn > value).mean() + 0.5 * (drawn == value).mean()
    ax.set(xlabel=f"{name}, mean over datapoints", ylabel="draws")
    ax.ticklabel_format(axis="x", scilimits=(-3, 5), useOffset=False)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    # Near 0 and near 1 are both misfit, and K draws show no p smaller than 1 / K.
    if min(p, 1 - p) * len(drawn) < 1:
        side = "below" if p > 0.5 else "above"
        said, colour = f"the data lie {side} all {len(drawn)} draws", RED
    else:
        said, colour = f"{p:.1%} of draws lie above the data", "black"
        if min(p, 1 - p) < 0.025:
            colour = RED
    ax.set_title(said, fontsize="medium", color=colour)
    ax.legend(frameon=False, fontsize="small")
    return ax
