"""Curves and scatters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.plots.common import (
    BLUE,
    GREY,
    KHAT_BANDS,
    KHAT_LIMITS,
    MARKERS,
    ORANGE,
    PALETTE,
    Values,
    axes,
    number,
    shaped,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def training_curve(
    train: Values,
    valid: Values | None = None,
    ax: Axes | None = None,
    ylabel: str = "bound [nats per datapoint]",
    name: str = "ELBO",
) -> Axes:
    """Draw a bound against epochs and mark the best, of validation if given, else of training.

    Larger is better. When the first epochs are far below the rest they are left off the axis, and
    the legend says how many values that hides.

    Args:
        train: ``(E,)`` training bound after each of E epochs.
        valid: ``(E,)`` validation bound; NaN at epochs where it was not evaluated.
        ax: Axes to draw on.
        ylabel: Quantity and unit of the vertical axis.
        name: Name of the bound in the legend, such as ``"IWELBO-50"``.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If a curve is not ``(E,)`` or has no finite value.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> ax = plots.training_curve([-90.0, -80.0, -78.0], [-91.0, -83.0, -84.0],
        ...                           ax=Figure().subplots())
        >>> int(ax.lines[-1].get_xdata()[0])  # the best epoch
        2
    """
    from matplotlib.ticker import MaxNLocator

    cure = "Pass a value per epoch, NaN at those that were not evaluated."
    curves = {"training": shaped("train", train, "E", finite="some", cure=cure)}
    epochs = np.arange(1, curves["training"].size + 1)
    if valid is not None:
        curves["validation"] = shaped("valid", valid, epochs.size, finite="some", cure=cure)
    ax = axes(ax)
    for (label, curve), colour in zip(curves.items(), (GREY, BLUE), strict=False):
        seen = np.isfinite(curve)
        dots: dict[str, Any] = {"marker": "o", "ms": 4} if seen.sum() <= 20 else {}
        ax.plot(epochs[seen], curve[seen], color=colour, label=f"{label} {name}", **dots)
    best = int(np.nanargmax(np.where(np.isfinite(curve), curve, np.nan)))
    caption = f"best {label}: {number(curve[best], '.2f')} at epoch {best + 1}"
    ax.plot(best + 1, curve[best], "*", ms=12, color=ORANGE, mec="black", mew=0.6, label=caption)

    points = [curve[np.isfinite(curve)] for curve in curves.values()]
    low, high = min(p.min() for p in points), max(p.max() for p in points)
    floor = min(np.quantile(p, 0.2, method="higher") for p in points)
    note = None
    if epochs.size >= 10 and high - low > 4 * (high - floor) > 0:
        floor -= 0.1 * (high - floor)
        ax.set_ylim(floor, high + 0.06 * (high - floor))
        hidden = sum(int((p < floor).sum()) for p in points)
        note = f"{hidden} value{'s' * (hidden > 1)} below the axis"
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    ax.set(xlabel="epoch", ylabel=ylabel, xlim=(0.5, epochs.size + max(0.5, 0.03 * epochs.size)))
    ax.legend(loc="best", title=note)
    return ax


def seed_curves(
    curves: Sequence[Values],
    ax: Axes | None = None,
    ylabel: str = "bound [nats per datapoint]",
    name: str = "ELBO",
) -> Axes:
    """Draw a bound against epochs for several seeds, with their mean and quartiles.

    Mean and quartiles go as far as all seeds do. When the first epochs are far below the rest they
    are left off the axis.

    Args:
        curves: S curves, ``(E_s,)`` each: a value per epoch, of as many epochs as a seed had.
        ax: Axes to draw on.
        ylabel: Quantity and unit of the vertical axis.
        name: Name of the bound in the legend, such as ``"validation IWELBO-50"``.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If there is no curve, or one is not ``(E_s,)`` or has no finite value.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> ax = plots.seed_curves([[-90.0, -80.0, -78.0], [-94.0, -84.0]],
        ...                        ax=Figure().subplots())
        >>> ax.lines[-1].get_ydata().tolist()  # the mean
        [-92.0, -82.0]
    """
    from matplotlib.ticker import MaxNLocator

    if not len(curves):
        raise ValueError("curves is empty. Pass a curve for each seed.")
    cure = "Pass a value per epoch, NaN at those that were not evaluated."
    arrays = [
        shaped(f"curves[{i}]", curve, f"E_{i}", finite="some", cure=cure)
        for i, curve in enumerate(curves)
    ]
    ax = axes(ax)
    for i, curve in enumerate(arrays):
        label = "each seed" if i == 0 else None
        ax.plot(np.arange(1, curve.size + 1), curve, color=GREY, lw=0.7, alpha=0.7, label=label)
    common = min(curve.size for curve in arrays)
    together, epochs = np.stack([curve[:common] for curve in arrays]), np.arange(1, common + 1)
    low, high = np.nanquantile(together, [0.25, 0.75], axis=0)
    ax.fill_between(epochs, low, high, color=BLUE, alpha=0.25, lw=0, label="quartiles")
    label = f"mean of {len(arrays)} seeds, {name}"
    dots: dict[str, Any] = {"marker": "o", "ms": 4} if common <= 20 else {}
    ax.plot(epochs, np.nanmean(together, 0), color=BLUE, label=label, **dots)
    longest = max(curve.size for curve in arrays)
    seen = [curve[np.isfinite(curve)] for curve in arrays]
    bottom, top = min(c.min() for c in seen), max(c.max() for c in seen)
    floor = min(np.quantile(c, 0.2, method="higher") for c in seen)
    if longest >= 10 and top - bottom > 4 * (top - floor) > 0:
        ax.set_ylim(floor - 0.1 * (top - floor), top + 0.1 * (top - floor))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set(xlabel="epoch", ylabel=ylabel, xlim=(0.5, longest + max(0.5, 0.03 * longest)))
    ax.legend(loc="best")
    return ax


def latent_scatter(
    z: Values,
    labels: Values | None = None,
    ax: Axes | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "z",
) -> Axes:
    """Draw two latent dimensions as points, each class with a colour and a marker of its own.

    Args:
        z: ``(N, 2)`` latent values.
        labels: ``(N,)`` integers >= 0; the same label has the same colour in every figure.
        ax: Axes to draw on; the legend stands at their right.
        class_names: Names indexed by label; the labels themselves by default.
        name: Name of the latent site; the axes are its units 0 and 1, ``z[0]`` and ``z[1]``.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If ``z`` is not ``(N, 2)`` and finite, or labels or names do not fit it.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> ax = plots.latent_scatter(torch.randn(4, 2), [0, 1, 1, 0], ax=Figure().subplots(),
        ...                           class_names=["cat", "dog"])
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['cat', 'dog']
    """
    points = shaped(
        "z", z, "N", 2, finite="all",
        cure="Pass two columns, such as z[:, :2], or a projection, such as "
        "sklearn.decomposition.PCA(2).fit_transform(z).",
    )  # fmt: skip
    classes = np.zeros(len(points))
    if labels is not None:
        cure = "Pass one label per row of z, one_hot.argmax(-1) for one-hot labels."
        classes = shaped("labels", labels, len(points), cure=cure)
    if (classes < 0).any() or (classes % 1 != 0).any():
        raise ValueError(f"labels must be integers >= 0; got {classes.min()} to {classes.max()}")
    count = int(classes.max()) + 1
    if class_names is not None and count > len(class_names):
        raise ValueError(f"class_names has {len(class_names)} names but labels go up to "
                         f"{count - 1}; give {count}.")  # fmt: skip
    ax = axes(ax, (6.0, 4.5))
    for k in np.unique(classes).astype(int):
        ax.scatter(
            points[classes == k, 0],
            points[classes == k, 1],
            s=18,
            facecolors=PALETTE[k % 10],
            marker=MARKERS[(k + k // 10) % 10],  # colour and marker together: 100 classes
            alpha=0.8,
            edgecolors="black",
            linewidths=0.2,
            label=str(k) if class_names is None else class_names[k],
        )
    low, high = points.min(0), points.max(0)
    centre, reach = (low + high) / 2, 0.55 * float((high - low).max()) or 1.0
    (left, right), (bottom, top) = zip(centre - reach, centre + reach, strict=True)
    ax.set(xlim=(left, right), ylim=(bottom, top), aspect="equal")  # a square at any scale
    ax.set(xlabel=f"{name}[0]", ylabel=f"{name}[1]")
    if labels is not None:
        ax.set_anchor("W")  # leave the spare width to the legend
        ax.legend(title="class", loc="upper left", bbox_to_anchor=(1.02, 1.0), markerscale=1.6,
                  borderaxespad=0, frameon=False, handletextpad=0.3,
                  ncols=math.ceil(len(ax.get_legend_handles_labels()[1]) / 20))  # fmt: skip
    return ax


def khat(khat_values: Values, ax: Axes | None = None) -> Axes:
    r"""Draw sorted Pareto k-hats with the thresholds 0.5 and 0.7, and title the share above 0.7.

    Args:
        khat_values: ``(N,)`` k-hats, one per datapoint. Infinite ones count as above 0.7, NaN is
            left out of the share; neither can be drawn, and the axis label says how many there are.
        ax: Axes to draw on.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If ``khat_values`` is not ``(N,)`` or has no finite value.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> plots.khat([0.1, 0.6, 0.9, 0.3], ax=Figure().subplots()).get_title()
        '25.0% of 4 datapoints have $\\hat{k}$ > 0.7'
    """
    cure = "Pass one k-hat per datapoint."
    values = shaped("khat_values", khat_values, "N", finite="some", cure=cure)
    drawn, defined = np.sort(values[np.isfinite(values)]), values[~np.isnan(values)]
    ax = axes(ax)
    rank = np.arange(1, len(drawn) + 1)
    for low, high, colour, label in KHAT_BANDS:
        inside = (drawn > low) & (drawn <= high)
        caption = f"{label} ({((defined > low) & (defined <= high)).sum()})"
        ax.scatter(rank[inside], drawn[inside], s=12, color=colour, label=caption)
    for limit, style in KHAT_LIMITS:
        ax.axhline(limit, color="black", ls=style, lw=1, zorder=0)
        ax.annotate(f"{limit}", (1, limit), xycoords=ax.get_yaxis_transform(),
                    xytext=(4, 0), textcoords="offset points", va="center")  # fmt: skip
    absent = len(values) - len(drawn)
    note = f" ({absent} infinite or NaN, not drawn)" if absent else ""
    ax.set(xlabel="datapoint, sorted" + note, ylabel=r"Pareto $\hat{k}$")
    share = (defined > 0.7).mean()
    ax.set_title(rf"{share:.1%} of {len(defined)} datapoints have $\hat{{k}}$ > 0.7")
    ax.legend(loc="best")
    return ax
