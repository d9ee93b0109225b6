"""Codes of a VQ-VAE: how often each is used, and where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ppvae.plots.common import BLUE, GREY, Values, array, axes, shaped
from ppvae.plots.images import image_grid

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def code_usage(counts: Values, ax: Axes | None = None) -> Axes:
    """Draw the share of each code, from the most to the least used; the title has the perplexity.

    Args:
        counts: ``(K,)``, how often each code was used, >= 0.
        ax: Axes to draw on.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If counts are not ``(K,)``, negative, or all zero.

    Example:
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> ax = plots.code_usage([10, 0, 30, 20], ax=Figure().subplots())
        >>> ax.get_title()
        '3 of 4 codes used, perplexity 2.7'
    """
    used = shaped("counts", counts, "K", finite="all")
    if (used < 0).any() or not used.sum():
        raise ValueError(f"counts must be >= 0 and not all 0; got {used.min():.4g} at least.")
    share = np.sort(used / used.sum())[::-1]
    positive = share[share > 0]
    perplexity = np.exp(-(positive * np.log(positive)).sum())
    ax = axes(ax, (5.0, 3.0))
    ax.bar(np.arange(len(share)), 100 * share, width=1.0, color=BLUE, edgecolor="white")
    ax.axhline(100 / len(share), color=GREY, linestyle="--", linewidth=1)
    ax.annotate("used alike", (len(share) - 0.5, 100 / len(share)), ha="right", va="bottom",
                color=GREY, fontsize="small")  # fmt: skip
    ax.set(xlabel="code, from the most used", ylabel="share [%]", xlim=(-0.5, len(share) - 0.5))
    ax.set_title(f"{len(positive)} of {len(share)} codes used, perplexity {perplexity:.1f}")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def code_maps(indices: Values, codes: Values, ax: Axes | None = None) -> Axes:
    """Draw maps of codes; codes that are near each other have colours that are.

    The colours are the codes on their three main axes, as red, green and blue.

    Args:
        indices: ``(M, h, w)``, numbers of codes; or ``(R, C, h, w)``, R rows of C maps.
        codes: ``(K, D)``, their vectors.
        ax: Axes to draw on.

    Returns:
        The axes drawn on.

    Raises:
        ValueError: If shapes are others, or an index is not one of K codes.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import plots
        >>> maps = torch.randint(8, (6, 4, 4))
        >>> ax = plots.code_maps(maps, torch.randn(8, 5), ax=Figure().subplots())
        >>> ax.images[0].get_array().shape
        (8, 12, 4)
    """
    vectors, numbers = shaped("codes", codes, "K", "D", finite="all"), array(indices)
    if numbers.ndim not in (3, 4) or not numbers.size:
        raise ValueError(f"indices must be (M, h, w) or (R, C, h, w); got shape {numbers.shape}.")
    if numbers.min() < 0 or numbers.max() >= len(vectors):
        raise ValueError(
            f"indices must lie in 0 .. {len(vectors) - 1}, one for each of the codes; got "
            f"{numbers.min():.0f} .. {numbers.max():.0f}."
        )
    centred = vectors - vectors.mean(0)
    _, _, main = np.linalg.svd(centred, full_matrices=False)
    axis = np.zeros((len(vectors), 3))
    axis[:, : len(main[:3])] = centred @ main[:3].T
    ranks = axis.argsort(0).argsort(0) / max(1, len(vectors) - 1)  # spread evenly
    colours = 0.1 + 0.85 * ranks
    pictures = np.moveaxis(colours[numbers.astype(int)], -1, -3)
    shape = pictures.shape[-3:]
    ax = image_grid(pictures.reshape(*pictures.shape[:-3], -1), shape, ax)
    for lines in ax.collections:
        lines.set(color="white", linewidth=2.5)  # as wide as to be no code's colour
    return ax
