"""Pictures of single model families: EM and mixtures, levels of a hierarchy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ppvae.plots.common import BLUE, GREY, MARKERS, ORANGE, PALETTE, Values, axes, shaped

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def em_steps(
    evidence: Values, after_e: Values, after_m: Values, ax: Axes | None = None, start: int = 0
) -> Axes:
    """Draw log p(x) and the ELBO over the half steps of EM: E up to log p(x), M lifts both.

    Args:
        evidence: ``(T + 1,)`` log p(x), at the start and after each of T iterations, nats.
        after_e: ``(T,)`` ELBO after each E step.
        after_m: ``(T,)`` ELBO after the M step that follows.
        ax: Axes to draw on.
        start: number of the first iteration shown.

    Returns:
        The axes.

    Raises:
        ValueError: if the lengths do not fit together.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = em_steps([-9.0, -7.0, -6.5], [-9.0, -7.0], [-8.0, -6.8], ax=Figure().subplots())
        >>> [float(y) for y in ax.lines[1].get_ydata()]
        [-9.0, -8.0, -7.0, -6.8]
    """
    after_e = shaped("after_e", after_e, "T")
    steps = len(after_e)
    after_m = shaped("after_m", after_m, steps)
    evidence = shaped("evidence", evidence, steps + 1, cure="It has the start, too.")
    ax = axes(ax)
    at_e = start + np.arange(steps, dtype=float)
    # An M step changes log p(x), an E step does not: both are drawn over the same half steps.
    half = np.stack([at_e, at_e + 0.5], 1).ravel()
    stairs = [*np.repeat(evidence, 2)[1:-1], evidence[-1]]
    ax.plot([*half, start + steps], stairs, color=BLUE, lw=2, label="log p(x)")
    ax.plot(half, np.stack([after_e, after_m], 1).ravel(), color=ORANGE, lw=1.2, label="ELBO")
    ax.plot(at_e, after_e, "o", color=ORANGE, mec="black", mew=0.6, ms=5, label="after an E step")
    ax.plot(at_e + 0.5, after_m, "v", color=ORANGE, mec="black", mew=0.6, ms=5,
            label="after an M step")  # fmt: skip
    ax.set(xlabel="iteration of EM", ylabel="nats per datapoint")
    ax.legend(frameon=False, fontsize="small", loc="lower right")
    return ax


def gaussian_components(
    x: Values, responsibilities: Values, loc: Values, covariance: Values, ax: Axes | None = None
) -> Axes:
    """Draw a mixture in the plane: points by their likeliest component, ellipses at 1 and 2 sd.

    Args:
        x: ``(N, 2)`` points.
        responsibilities: ``(N, C)`` q(c | x); the surer, the more opaque a point.
        loc: ``(C, 2)`` means.
        covariance: ``(C, 2, 2)``.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: if the shapes do not fit together, or x is not in the plane.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> ax = gaussian_components(torch.randn(5, 2), torch.ones(5, 1), torch.zeros(1, 2),
        ...                          torch.eye(2)[None], ax=Figure().subplots())
        >>> len(ax.lines)  # two ellipses and the mean
        3
    """
    points, means = shaped("x", x, "N", 2), shaped("loc", loc, "C", 2)
    C = len(means)
    share = shaped("responsibilities", responsibilities, len(points), C)
    spreads = shaped("covariance", covariance, C, 2, 2)
    ax = axes(ax, (5.0, 4.6))
    angle = np.linspace(0, 2 * np.pi, 100)
    circle = np.stack([np.cos(angle), np.sin(angle)])
    for c in range(C):
        mine = share.argmax(1) == c
        colour = PALETTE[c % 10]
        if mine.any():  # matplotlib takes no empty array of alphas
            ax.scatter(points[mine, 0], points[mine, 1], s=14, color=colour, marker=MARKERS[c % 10],
                       alpha=0.25 + 0.65 * share[mine, c], linewidths=0)  # fmt: skip
        factor = np.linalg.cholesky(spreads[c])
        for radius in (1, 2):
            ellipse = means[c][:, None] + radius * factor @ circle
            ax.plot(*ellipse, color="black", lw=3 - radius, alpha=0.7)
        ax.plot(*means[c], MARKERS[c % 10], color=colour, ms=9, mec="black", mew=1.2)
    ax.set(xlabel="$x_1$", ylabel="$x_2$", aspect="equal")
    return ax


def levels_over_training(
    epochs: Values, levels: Mapping[str, Values], ylabel: str, ax: Axes | None = None
) -> Axes:
    """Draw one number of every level of a hierarchy, such as its KL, against epochs.

    Args:
        epochs: ``(T,)``.
        levels: by name, ``(T,)``.
        ylabel: quantity and unit.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: if a level has not one value per epoch.

    Example:
        >>> from matplotlib.figure import Figure
        >>> ax = levels_over_training([1, 2], {"z1": [3.0, 9.0], "z2": [0.0, 1.0]},
        ...                           "KL [nats]", ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['z1', 'z2']
    """
    from matplotlib.ticker import MaxNLocator

    x = shaped("epochs", epochs, "T")
    curves = {name: shaped(f"level {name!r}", y, len(x)) for name, y in levels.items()}
    ax = axes(ax)
    every = max(1, len(x) // 12) if len(x) > 20 else 1
    for i, (name, y) in enumerate(curves.items()):
        ax.plot(x, y, color=PALETTE[i % 10], marker=MARKERS[i % 10], ms=5, markevery=every,
                label=name)  # fmt: skip
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if np.ptp(x) == 0:  # one epoch
        ax.set_xlim(x[0] - 0.5, x[0] + 0.5)
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.set(xlabel="epoch", ylabel=ylabel)
    ax.legend(frameon=False, fontsize="small")
    return ax
