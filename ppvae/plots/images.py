"""Grids of images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.plots.common import MISSING, SEPARATOR, Values, array, axes, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
    pixels = array(images)
    pixels = _images("images", pixels, shape, "(R, C, D)" if pixels.ndim == 3 else "(M, D)")
    if columns is not None and (columns < 1 or pixels.ndim == 3):
        raise ValueError(f"columns must be >= 1, and for images (M, D); got columns={columns} for "
                         f"images of shape {pixels.shape}. Leave it out.")  # fmt: skip
    if pixels.ndim == 3:
        rows, columns = pixels.shape[:2]
    else:
        columns = columns or math.ceil(math.sqrt(len(pixels)))
        rows = math.ceil(len(pixels) / columns)
    _check_labels("row_labels", row_labels, rows, "rows")
    _check_labels("column_labels", column_labels, columns, "columns")

    _, height, width = (1, *shape)[-3:]
    ratio, right, bottom = width / height, columns * width - 0.5, rows * height - 0.5
    inch = min(0.6, 6 / (columns * ratio), 6 / rows)  # of one image, in a figure of our own
    ax = axes(ax, (max(3.0, inch * columns * ratio + 1.2), max(1.5, inch * rows + 0.6)))
    _draw_tiles(ax, pixels, shape, rows, columns)
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


def _draw_tiles(
    ax: Axes, pixels: np.ndarray, shape: Sequence[int], rows: int, columns: int
) -> None:
    """Images side by side as one picture; cells without an image stay transparent."""
    from matplotlib import colormaps
    from matplotlib.colors import to_rgb

    channels, height, width = (1, *shape)[-3:]
    count = math.prod(pixels.shape[:-1])
    tiles = np.full((rows * columns, channels, height, width), 2.0)  # 2: a cell with no image
    tiles[:count] = pixels.reshape(count, channels, height, width)
    tiles = tiles.reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    picture = tiles.reshape(rows * height, columns * width, channels)
    if channels == 1:
        colours = colormaps["gray"].with_extremes(bad=MISSING, over=(0, 0, 0, 0))
        ax.imshow(picture[..., 0], cmap=colours, vmin=0, vmax=1, interpolation_stage="rgba")
    else:
        empty = (picture > 1).any(-1, keepdims=True)
        missing = np.isnan(picture).any(-1, keepdims=True)
        colour = np.where(missing, to_rgb(MISSING), np.where(empty, 1.0, picture))
        ax.imshow(np.concatenate([colour, ~empty], axis=-1))


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
    _check_labels("class_names", class_names, len(pixels), "classes")
    names = [str(k) for k in range(len(pixels))] if class_names is None else class_names
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


def manifold(
    images: Values,
    shape: Sequence[int],
    grid: Values,
    ax: Axes | None = None,
    name: str = "z",
) -> Axes:
    """Draw what two latent units decode to: unit 0 grows to the right, unit 1 upwards.

    Args:
        images: ``(G * G, D)``: decoded ``torch.cartesian_prod(grid, grid)``, so unit 1 varies
            fastest.
        shape: ``(H, W)``, ``(1, H, W)`` or ``(3, H, W)`` with product D.
        grid: ``(G,)`` latent values along each axis, such as quantiles of the prior.
        ax: Axes to draw on.
        name: Name of the latent site.

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
    pixels, values = _images("images", images, shape, "(G * G, D)"), array(grid)
    if values.ndim != 1 or len(pixels) != len(values) ** 2:
        raise ValueError(
            f"images must be (G * G, D) for a grid (G,); got {len(pixels)} images and a grid of "
            f"shape {values.shape}. Decode torch.cartesian_prod(grid, grid)."
        )
    size = len(values)
    ax = image_grid(pixels.reshape(size, size, -1).swapaxes(0, 1)[::-1], shape, ax)
    shown = np.linspace(0, size - 1, min(size, 5)).round().astype(int)
    labels = [number(values[k], ".2g") for k in shown]
    height, width = tuple(shape)[-2:]
    ax.set_xticks((shown + 0.5) * width - 0.5, labels)
    ax.set_yticks((size - shown - 0.5) * height - 0.5, labels)
    ax.tick_params(length=3)
    ax.set(xlabel=f"{name}[0]", ylabel=f"{name}[1]")
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
        raise ValueError(f"images must be (R, S, D) with S >= 2 steps; got {pixels.shape}.")
    return image_grid(pixels, shape, ax, column_labels=["start", *[""] * (steps - 2), "end"])


def _check_labels(name: str, labels: Sequence[str] | None, count: int, what: str) -> None:
    if labels is not None and len(labels) != count:
        raise ValueError(f"{name} has {len(labels)} labels for {count} {what}; give one for each.")


def _images(
    name: str, values: Values, shape: Sequence[int], layout: str, like: np.ndarray | None = None
) -> np.ndarray:
    """Return images as an array in the stated layout, checked against ``shape`` and [0, 1]."""
    pixels, shape = array(values), tuple(shape)
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
                         f"got shape {pixels.shape}.")  # fmt: skip
    if (pixels < -1e-6).any() or (pixels > 1 + 1e-6).any():
        low, high = np.nanmin(pixels), np.nanmax(pixels)
        raise ValueError(f"{name} must be in [0, 1], or NaN where missing; got {low:.4g} to "
                         f"{high:.4g}. Rescale them, or pass probabilities.")  # fmt: skip
    return np.clip(pixels, 0, 1)
