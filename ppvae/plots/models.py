"""Pictures of single model families: EM and mixtures, levels of a hierarchy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from ppvae.plots.common import BLUE, GREY, MARKERS, ORANGE, PALETTE, Values, array, axes

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
    evidence, after_e, after_m = array(evidence), array(after_e), array(after_m)
    steps = len(after_e)
    if not (evidence.shape == (steps + 1,) and after_e.shape == after_m.shape == (steps,)):
        raise ValueError(
            f"evidence must be (T + 1,), after_e and after_m (T,); got {evidence.shape}, "
            f"{after_e.shape} and {after_m.shape}"
        )
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
    x: Values,
    responsibilities: Values,
    loc: Values,
    covariance: Values,
    ax: Axes | None = None,
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
    points, share = array(x), array(responsibilities)
    means, spreads = array(loc), array(covariance)
    C = len(means)
    if points.shape[1:] != (2,) or share.shape != (len(points), C) or spreads.shape != (C, 2, 2):
        raise ValueError(
            f"x must be (N, 2), responsibilities (N, C), loc (C, 2), covariance (C, 2, 2); got "
            f"{points.shape}, {share.shape}, {means.shape} and {spreads.shape}"
        )
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
    at = array(epochs)
    for name, values in levels.items():
        if array(values).shape != at.shape:
            raise ValueError(
                f"level {name!r} must have one value per epoch, {at.shape}, got "
                f"{array(values).shape}"
            )
    ax = axes(ax)
    dense = len(at) > 20
    for i, (name, values) in enumerate(levels.items()):
        ax.plot(at, array(values), color=PALETTE[i % 10], marker=MARKERS[i % 10], ms=5,
                markevery=max(1, len(at) // 12) if dense else 1, label=name)  # fmt: skip
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.axhline(0, color=GREY, lw=0.8, zorder=0)
    ax.set(xlabel="epoch", ylabel=ylabel)
    ax.legend(frameon=False, fontsize="small")
    return ax
