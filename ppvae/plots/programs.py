"""A program as a picture: circles, arrows, plates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from ppvae.plots.common import BLUE, GREY, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RADIUS, DOWN, ACROSS = 0.36, 1.3, 1.4


def plates(model: Any, guide: Any = None, ax: Axes | None = None) -> Axes:
    """Draw a pair as a plate diagram: the model's arrows in black, the guide's dashed in blue.

    Latents are white circles, what is observed is grey, inputs are squares. A child stands
    below its parents in the model.

    Args:
        model: :func:`ppvae.check.structure` of the model.
        guide: that of the guide; its sites are the model's latents.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: a latent of the guide that the model does not have.
        TypeError: a program in the place of its structure.

    Example:
        >>> import torch
        >>> from matplotlib.figure import Figure
        >>> from ppvae import conditionals, guides, models, nets, plots
        >>> from ppvae.check import structure
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 5)), latent_dim=2)
        >>> guide, x = guides.Normal(nets.mlp(5, 4)), torch.zeros(3, 5)
        >>> ax = plots.plates(structure(model, x), structure(guide, x), ax=Figure().subplots())
        >>> [text.get_text() for text in ax.texts]
        ['z', 'x', 'data']
    """
    from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Rectangle

    for name, given in (("model", model), ("guide", guide)):
        if not hasattr(given, "parents") and not (given is None and name == "guide"):
            raise TypeError(
                f"{name} must be what ppvae.check.structure({name}, ...) gives, got "
                f"{type(given).__name__}"
            )
    if not model.parents:
        raise ValueError("the model has no site, so there is nothing to draw")
    places = _places(model, guide)
    if guide is not None and (other := [site for site in guide.parents if site not in places]):
        raise ValueError(
            f"the guide has {other} and the model has not: give the guide of this model"
        )
    xs, ys = np.array(list(places.values())).T
    width, height = np.ptp(xs) + 2.4, np.ptp(ys) + 2.4
    ax = axes(ax, (0.75 * width, 0.75 * height))
    nodes: dict[str, Any] = {}
    for name, (x, y) in places.items():
        grey = "0.82" if name in model.observed else "white"
        square = Rectangle((x - 0.25, y - 0.25), 0.5, 0.5, fc="white", ec="black", lw=1.2, zorder=3)
        circle = Circle((x, y), RADIUS, fc=grey, ec="black", lw=1.2, zorder=3)
        nodes[name] = ax.add_patch(circle if name in model.parents else square)
        ax.text(x, y, name, ha="center", va="center", style="italic", zorder=4)

    def arrows(parents: dict[str, tuple[str, ...]], bend: float, **look: Any) -> None:
        for child, above in parents.items():
            for parent in above:
                far = abs(places[child][1] - places[parent][1]) > 1.5 * DOWN
                ax.add_patch(FancyArrowPatch(places[parent], places[child], arrowstyle="-|>",
                             mutation_scale=12, patchA=nodes[parent], patchB=nodes[child],
                             shrinkA=1, shrinkB=1, zorder=2, lw=1.2,
                             connectionstyle=f"arc3,rad={bend + 0.25 * far}", **look))  # fmt: skip

    arrows(model.parents, 0.0, color="black")
    if guide is not None:
        arrows(guide.parents, 0.35, color=BLUE, ls="--")
    everywhere = sorted(model.plates.items(), key=lambda item: -len(item[1]))
    for depth, (plate, members) in enumerate(everywhere):
        around = np.array([places[member] for member in members])
        pad = 0.75 - 0.12 * depth
        (left, bottom), (right, top) = around.min(0) - pad, around.max(0) + pad
        bottom -= 0.15
        ax.add_patch(FancyBboxPatch((left, bottom), right - left, top - bottom, fc="none", ec=GREY,
                     boxstyle="round,pad=0,rounding_size=0.15", lw=1.1, zorder=1))  # fmt: skip
        ax.text(
            right - 0.08,
            bottom + 0.08,
            plate,
            ha="right",
            va="bottom",
            fontsize="small",
            color="0.35",
        )
    ax.set(
        xlim=(xs.min() - 1.2, xs.max() + 1.2), ylim=(ys.min() - 1.2, ys.max() + 1.2), aspect="equal"
    )
    ax.set_axis_off()
    return ax


def _places(model: Any, guide: Any) -> dict[str, tuple[float, float]]:
    """Where each site and input stands: sites by how far they are below a root, inputs beside."""
    level: dict[str, int] = {}
    for site, parents in model.parents.items():  # in the order of the program: parents come first
        level[site] = 1 + max((level[p] for p in parents if p in level), default=-1)
    rows: dict[int, list[str]] = {}
    for site, row in level.items():
        rows.setdefault(row, []).append(site)
    places = {
        site: (ACROSS * (i - (len(sites) - 1) / 2), -DOWN * row)
        for row, sites in rows.items()
        for i, site in enumerate(sites)
    }
    used = [*model.inputs, *(guide.inputs if guide is not None else ())]
    inputs = [name for name in dict.fromkeys(used) if name not in places]
    right = max(x for x, _ in places.values()) + 1.2 * ACROSS
    for i, name in enumerate(inputs):
        children = [level[s] for s, parents in model.parents.items() if name in parents]
        places[name] = (right + ACROSS * i, -DOWN * float(np.mean(children or [0])))
    return places
