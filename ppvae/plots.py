"""Pictures of what training and diagnosis return: ``f(values, ax=None) -> ax``.

Values are torch tensors (any device, with or without gradient), numpy arrays or lists. Nothing is
estimated here. ``ax=None`` makes a figure of its own; pass ``ax`` to compose several plots, best on
``plt.subplots(..., layout="constrained")``. Images are rows of pixels in [0, 1], laid out by
``shape``: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)``; NaN pixels are missing and drawn tinted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "class_grid",
    "image_grid",
    "interpolation",
    "khat",
    "latent_scatter",
    "manifold",
    "quadrant_completion",
    "reconstructions",
    "training_curve",
]

Values: TypeAlias = torch.Tensor | np.ndarray | Sequence[Any]

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#C1272D", "#8A8A8A"
MISSING = "#D9B382"  # sand: no grey level looks like it
SEPARATOR = "#4F7CAC"  # seen on black and on white
# Petroff (2021), "Accessible color sequences": ten colours that colour-blind readers tell apart.
PALETTE = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")  # fmt: skip
MARKERS = "osD^vPX<>*"


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

    curves = {"training": _array(train)} | ({} if valid is None else {"validation": _array(valid)})
    epochs = np.arange(1, curves["training"].size + 1)
    for argument, curve in zip(("train", "valid"), curves.values(), strict=False):
        if curve.shape != epochs.shape or not np.isfinite(curve).any():
            raise ValueError(
                f"{argument} must be ({epochs.size},), a value per epoch, not all NaN; "
                f"got shape {curve.shape}. Pass NaN at epochs that were not evaluated."
            )
    ax = _axes(ax)
    for (label, curve), colour in zip(curves.items(), (GREY, BLUE), strict=False):
        seen = np.isfinite(curve)
        dots: dict[str, Any] = {"marker": "o", "ms": 4} if seen.sum() <= 20 else {}
        ax.plot(epochs[seen], curve[seen], color=colour, label=f"{label} {name}", **dots)
    best = int(np.nanargmax(np.where(np.isfinite(curve), curve, np.nan)))
    caption = f"best {label}: {_number(curve[best], '.2f')} at epoch {best + 1}"
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
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax.set(xlabel="epoch", ylabel=ylabel, xlim=(0.5, epochs.size + max(0.5, 0.03 * epochs.size)))
    ax.legend(loc="best", title=note)
    return ax


def image_grid(
    images: Values,
    shape: Sequence[int],
    ax: Axes | None = None,
    columns: int | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    title: str | None = None,
) -> Axes:
    """Draw images as one tiled picture with thin separators, grey for one channel, RGB for three.

    Args:
        images: ``(M, D)``, filled row by row, or ``(R, C, D)``; in [0, 1], NaN where missing.
        shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with product D.
        ax: Axes to draw on.
        columns: Images per row when ``images`` is ``(M, D)``; by default a near-square grid.
        row_labels: One label per row, drawn at the left.
        column_labels: One label per column, drawn on top.
        title: Title over the picture.

    Returns:
        The axes drawn on; ``ax.images[0]`` is the picture.

    Raises:
        ValueError: If images and ``shape`` disagree, pixels leave [0, 1], or labels do not fit.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> ax = plots.image_grid(torch.rand(6, 12), (3, 4), columns=2, ax=Figure().subplots())
        >>> ax.images[0].get_array().shape
        (9, 8)
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    pixels = _array(images)
    pixels = _images("images", pixels, shape, "(R, C, D)" if pixels.ndim == 3 else "(M, D)")
    count = math.prod(pixels.shape[:-1])
    if columns is not None and (columns < 1 or pixels.ndim == 3):
        raise ValueError(
            f"columns must be >= 1, and only with images (M, D); got columns={columns} for images "
            f"of shape {pixels.shape}. Leave it out."
        )
    if pixels.ndim == 3:
        rows, columns = pixels.shape[:2]
    else:
        columns = columns or math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
    for argument, labels, cells in (
        ("row_labels", row_labels, rows), ("column_labels", column_labels, columns)
    ):  # fmt: skip
        if labels is not None and len(labels) != cells:
            raise ValueError(f"{argument} has {len(labels)} labels for {cells}; give one for each.")

    channels, height, width = (1, *shape)[-3:]
    tiles = np.full((rows * columns, channels, height, width), 2.0)  # 2: a cell with no image
    tiles[:count] = pixels.reshape(count, channels, height, width)
    tiles = tiles.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = tiles.reshape(rows * height, columns * width, channels)

    ratio, right, bottom = width / height, columns * width - 0.5, rows * height - 0.5
    inch = min(0.6, 6 / (columns * ratio), 6 / rows)  # of one image, in a figure of our own
    ax = _axes(ax, (max(3.0, inch * columns * ratio + 1.2), max(1.5, inch * rows + 0.6)))
    if channels == 1:
        colours = colormaps["gray"].with_extremes(bad=MISSING, over=(0, 0, 0, 0))
        ax.imshow(picture[..., 0], cmap=colours, vmin=0, vmax=1, interpolation_stage="rgba")
    else:
        empty = (picture > 1).any(-1, keepdims=True)
        missing = np.isnan(picture).any(-1, keepdims=True)
        colour = np.where(missing, to_rgb(MISSING), np.where(empty, 1.0, picture))
        ax.imshow(np.concatenate([colour, ~empty], axis=-1))
    separator: dict[str, Any] = {"colors": SEPARATOR, "linewidth": 1.2}
    ax.vlines(np.arange(1, columns) * width - 0.5, -0.5, bottom, **separator)
    ax.hlines(np.arange(1, rows) * height - 0.5, -0.5, right, **separator)
    ax.set(xlim=(-0.5, right), ylim=(bottom, -0.5), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if row_labels is not None:
        ax.set_yticks((np.arange(rows) + 0.5) * height - 0.5, row_labels)
    if column_labels is not None:
        ax.xaxis.tick_top()
        ax.tick_params(length=0)
        ax.set_xticks((np.arange(columns) + 0.5) * width - 0.5, column_labels)
    if title is not None:
        ax.set_title(title)
    return ax


def reconstructions(
    originals: Values,
    reconstructions: Values,
    shape: Sequence[int],
    samples: Values | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw originals over their reconstructions and, if given, samples: one column per image.

    Args:
        originals: ``(M, D)`` images.
        reconstructions: ``(M, D)`` likelihood means at a draw (or the mean) of q(z | x).
        shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with product D.
        samples: ``(M, D)`` draws, from the prior or of x given the same z.
        ax: Axes to draw on.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If the arguments differ in shape, or as in :func:`image_grid`.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> x = torch.rand(5, 64)
        >>> ax = plots.reconstructions(x, x, (8, 8), samples=x, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['original', 'reconstruction', 'sample']
    """
    first = _images("originals", originals, shape, "(M, D)")
    rows = [first, _images("reconstructions", reconstructions, shape, "(M, D)", first)]
    if samples is not None:
        rows.append(_images("samples", samples, shape, "(M, D)", first))
    labels = ["original", "reconstruction", "sample"][: len(rows)]
    return image_grid(np.stack(rows), shape, ax, row_labels=labels)


def class_grid(
    samples: Values,
    shape: Sequence[int],
    class_names: Sequence[str] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw samples of each class in a row of its own, labelled by the class.

    Args:
        samples: ``(C, S, D)``: S images for each of C classes.
        shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with product D.
        class_names: C names; the class numbers by default.
        ax: Axes to draw on.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If there is not one name per class, or as in :func:`image_grid`.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> ax = plots.class_grid(torch.rand(2, 5, 64), (8, 8), ["cat", "dog"],
        ...                       ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['cat', 'dog']
    """
    pixels = _images("samples", samples, shape, "(C, S, D)")
    names = [str(k) for k in range(len(pixels))] if class_names is None else list(class_names)
    if len(names) != len(pixels):
        raise ValueError(
            f"class_names has {len(names)} names for the {len(pixels)} classes of samples "
            f"{pixels.shape}; give one for each."
        )
    ax = image_grid(pixels, shape, ax, row_labels=names)
    if class_names is None:
        ax.set_ylabel("class")
    return ax


def quadrant_completion(
    visible: Values,
    completions: Values,
    originals: Values,
    shape: Sequence[int],
    ax: Axes | None = None,
) -> Axes:
    """Draw, for each image in a column: what was visible, several completions, and the original.

    Args:
        visible: ``(M, D)`` inputs with NaN at the pixels that were hidden; these are drawn tinted.
        completions: ``(S, M, D)``: S completions of each image, particles leading.
        originals: ``(M, D)`` whole images.
        shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with product D.
        ax: Axes to draw on.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If the arguments differ in M, or as in :func:`image_grid`.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> x = torch.rand(4, 64)
        >>> visible = x.clone()
        >>> visible[:, 32:] = torch.nan
        >>> ax = plots.quadrant_completion(visible, torch.rand(2, 4, 64), x, (8, 8),
        ...                                ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['visible', 'completion 1', 'completion 2', 'original']
    """
    whole = _images("originals", originals, shape, "(M, D)")
    part = _images("visible", visible, shape, "(M, D)", whole)
    draws = _images("completions", completions, shape, "(S, M, D)", whole)
    labels = ["visible", *(f"completion {k + 1}" for k in range(len(draws))), "original"]
    return image_grid(
        np.concatenate([part[None], draws, whole[None]]), shape, ax, row_labels=labels
    )


def manifold(images: Values, shape: Sequence[int], grid: Values, ax: Axes | None = None) -> Axes:
    """Draw what a two-dimensional latent space decodes to: z1 grows to the right, z2 upwards.

    Args:
        images: ``(G * G, D)``: decoded ``torch.cartesian_prod(grid, grid)``, so z2 varies fastest.
        shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with product D.
        grid: ``(G,)`` latent values along each axis, such as quantiles of the prior.
        ax: Axes to draw on.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If there are not G * G images, or as in :func:`image_grid`.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> grid = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.1, 0.9, 5))
        >>> z = torch.cartesian_prod(grid, grid)  # decode these
        >>> ax = plots.manifold(torch.rand(25, 64), (8, 8), grid, ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_xticklabels()][2:]
        ['0', '0.52', '1.3']
    """
    pixels, values = _images("images", images, shape, "(G * G, D)"), _array(grid)
    if values.ndim != 1 or len(pixels) != len(values) ** 2:
        raise ValueError(
            f"images must be (G * G, D) for a grid of (G,) values; got {len(pixels)} images for a "
            f"grid of shape {values.shape}. Decode torch.cartesian_prod(grid, grid)."
        )
    size = len(values)
    ax = image_grid(pixels.reshape(size, size, -1).swapaxes(0, 1)[::-1], shape, ax)
    shown = np.linspace(0, size - 1, min(size, 5)).round().astype(int)
    labels = [_number(values[k], ".2g") for k in shown]
    height, width = tuple(shape)[-2:]
    ax.set_xticks((shown + 0.5) * width - 0.5, labels)
    ax.set_yticks((size - shown - 0.5) * height - 0.5, labels)
    ax.tick_params(length=3)
    ax.set(xlabel="$z_1$", ylabel="$z_2$")
    return ax


def interpolation(images: Values, shape: Sequence[int], ax: Axes | None = None) -> Axes:
    """Draw interpolations between two points, one per row, from "start" to "end".

    Args:
        images: ``(R, S, D)``: R interpolations of S >= 2 steps, both ends included.
        shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with product D.
        ax: Axes to draw on.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If there are fewer than two steps, or as in :func:`image_grid`.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> ax = plots.interpolation(torch.rand(2, 3, 64), (8, 8), ax=Figure().subplots())
        >>> [label.get_text() for label in ax.get_xticklabels()]
        ['start', '', 'end']
    """
    pixels = _images("images", images, shape, "(R, S, D)")
    steps = pixels.shape[1]
    if steps < 2:
        raise ValueError(f"images must be (R, S, D) with S >= 2 steps; got {pixels.shape}. "
                         "Include both ends.")  # fmt: skip
    return image_grid(pixels, shape, ax, column_labels=["start", *[""] * (steps - 2), "end"])


def latent_scatter(
    z: Values,
    labels: Values | None = None,
    ax: Axes | None = None,
    class_names: Sequence[str] | None = None,
) -> Axes:
    """Draw two latent dimensions as points, each class with a colour and a marker of its own.

    Args:
        z: ``(N, 2)`` latent values.
        labels: ``(N,)`` integers >= 0; the same label has the same colour in every figure.
        ax: Axes to draw on; the legend stands at their right.
        class_names: Names indexed by label; the labels themselves by default.

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
    points = _array(z)
    if points.ndim != 2 or points.shape[1] != 2 or not np.isfinite(points).all() or not len(points):
        raise ValueError(
            f"z must be (N, 2) and finite; got shape {points.shape}. Pass two columns, such as "
            "z[:, :2], or a projection, such as sklearn.decomposition.PCA(2).fit_transform(z)."
        )
    classes = np.zeros(len(points)) if labels is None else _array(labels)
    if classes.shape != (len(points),) or (classes < 0).any() or (classes % 1 != 0).any():
        raise ValueError(
            f"labels must be ({len(points)},) integers >= 0, one per row of z; got shape "
            f"{classes.shape}. Pass one_hot.argmax(-1) for one-hot labels."
        )
    if class_names is not None and classes.max() >= len(class_names):
        raise ValueError(f"class_names has {len(class_names)} names but labels go up to "
                         f"{int(classes.max())}; give {int(classes.max()) + 1}.")  # fmt: skip
    ax = _axes(ax, (6.0, 4.5))
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
    ax.set(xlabel="$z_1$", ylabel="$z_2$")
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
    values = _array(khat_values)
    if values.ndim != 1 or not np.isfinite(values).any():
        raise ValueError(f"khat_values must be (N,) with at least one finite value; got shape "
                         f"{values.shape}. Pass one k-hat per datapoint.")  # fmt: skip
    drawn, known = np.sort(values[np.isfinite(values)]), values[~np.isnan(values)]
    ax = _axes(ax)
    rank = np.arange(1, len(drawn) + 1)
    for low, high, colour, label in (
        (-np.inf, 0.5, BLUE, "good"), (0.5, 0.7, ORANGE, "usable"), (0.7, np.inf, RED, "unreliable")
    ):  # fmt: skip
        inside = (drawn > low) & (drawn <= high)
        caption = f"{label} ({((known > low) & (known <= high)).sum()})"
        ax.scatter(rank[inside], drawn[inside], s=12, color=colour, label=caption)
    for threshold, style in ((0.5, ":"), (0.7, "--")):
        ax.axhline(threshold, color="black", ls=style, lw=1, zorder=0)
        ax.annotate(f"{threshold}", (1, threshold), xycoords=ax.get_yaxis_transform(),
                    xytext=(4, 0), textcoords="offset points", va="center")  # fmt: skip
    absent = len(values) - len(drawn)
    note = f" ({absent} infinite or NaN, not drawn)" if absent else ""
    ax.set(xlabel="datapoint, sorted" + note, ylabel=r"Pareto $\hat{k}$")
    share = (known > 0.7).mean()
    ax.set_title(rf"{share:.1%} of {len(known)} datapoints have $\hat{{k}}$ > 0.7")
    ax.legend(loc="best")
    return ax


def _array(values: Values) -> np.ndarray:
    """Return values as float64 on the CPU, cut off from any gradient."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    if isinstance(values, list | tuple):
        return np.array([_array(value) for value in values], dtype=np.float64)
    return np.asarray(values, dtype=np.float64)


def _number(value: float, form: str) -> str:
    """Return a formatted number with the minus sign that matplotlib uses on its ticks."""
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def _images(
    name: str, values: Values, shape: Sequence[int], layout: str, like: np.ndarray | None = None
) -> np.ndarray:
    """Return images as an array in the stated layout, checked against ``shape`` and [0, 1]."""
    pixels, shape = _array(values), tuple(shape)
    if len(shape) not in (2, 3) or (1, *shape)[-3] not in (1, 3):
        raise ValueError(f"shape must be (H, W), (1, H, W) or (3, H, W); got {shape}.")
    size = math.prod(shape)
    if pixels.ndim != layout.count(",") + 1 or pixels.shape[-1] != size or not pixels.size:
        raise ValueError(
            f"{name} must be {layout} with D = {size}, the product of shape {shape}; got shape "
            f"{pixels.shape}. Flatten each image to {size} pixels, or correct shape."
        )
    if like is not None and pixels.shape[-2] != like.shape[-2]:
        raise ValueError(f"{name} must hold {like.shape[-2]} images, as many as originals; "
                         f"got shape {pixels.shape}. Slice both to the same images.")  # fmt: skip
    if (pixels < -1e-6).any() or (pixels > 1 + 1e-6).any():
        low, high = np.nanmin(pixels), np.nanmax(pixels)
        raise ValueError(
            f"{name} must be in [0, 1], or NaN where missing; got shape {pixels.shape} with values "
            f"from {low:.4g} to {high:.4g}. Rescale them, or pass probabilities."
        )
    return np.clip(pixels, 0, 1)


def _axes(ax: Axes | None, size: tuple[float, float] = (6.0, 4.0)) -> Axes:
    """Return the axes given, or those of a new figure."""
    if ax is None:
        from matplotlib import pyplot as plt

        _, ax = plt.subplots(figsize=size, layout="constrained")
    return ax
