"""What all pictures share: arrays from tensors, axes, colour-blind-safe colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Values: TypeAlias = torch.Tensor | np.ndarray | Sequence[Any]

BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#C1272D", "#8A8A8A"
MISSING = "#D9B382"  # sand: no grey level looks like it
SEPARATOR = "#4F7CAC"  # seen on black and on white
# Petroff (2021), "Accessible color sequences": ten colours that colour-blind readers tell apart.
PALETTE = ("#3f90da", "#ffa90e", "#bd1f01", "#94a4a2", "#832db6",
           "#a96b59", "#e76300", "#b9ac70", "#717581", "#92dadd")  # fmt: skip
MARKERS = "osD^vPX<>*"
LINES = ("-", "--", ":", "-.")

# What k-hat means: above, up to, colour, name.
KHAT_BANDS = (
    (-np.inf, 0.5, BLUE, "good"),
    (0.5, 0.7, ORANGE, "usable"),
    (0.7, np.inf, RED, "unreliable"),
)
KHAT_LIMITS = ((0.5, ":"), (0.7, "--"))  # with the style of their line


def array(values: Values) -> np.ndarray:
    """Return values as float64 on the CPU, cut off from any gradient."""
    if isinstance(values, torch.Tensor):
        return values.detach().cpu().double().numpy()
    if isinstance(values, list | tuple):
        return np.array([array(value) for value in values], dtype=np.float64)
    return np.asarray(values, dtype=np.float64)


def shaped(
    name: str,
    values: Values,
    *shape: int | str,
    finite: Literal["all", "some", "any"] = "any",
    cure: str = "",
) -> np.ndarray:
    """Return :func:`array` of an argument, with its shape checked.

    Args:
        name: of the argument.
        values: its values.
        *shape: sizes that are required; a letter stands for any size but 0.
        finite: how many values must be finite: ``"all"``, ``"some"`` or ``"any"`` number.
        cure: what to do otherwise, for the message.

    Raises:
        ValueError: with name, required shape, shape seen and cure.
    """
    found = array(values)
    fits = len(shape) == found.ndim and all(
        size == seen if isinstance(size, int) else seen > 0
        for size, seen in zip(shape, found.shape, strict=True)
    )
    numbers = np.isfinite(found)
    enough, also = {
        "all": (numbers.all(), " and finite"),
        "some": (numbers.any(), ", not all NaN"),
        "any": (True, ""),
    }[finite]
    if not (fits and enough):
        required = str(shape).replace("'", "") + also
        raise ValueError(f"{name} must be {required}; got shape {found.shape}. {cure}".rstrip())
    return found


def number(value: float, form: str) -> str:
    """Return a formatted number with the minus sign that matplotlib uses on its ticks."""
    return f"{value:{form}}".replace("-", "\N{MINUS SIGN}")


def axes(ax: Axes | None, size: tuple[float, float] = (6.0, 4.0)) -> Axes:
    """Return the axes given, or those of a new figure; ``TypeError`` for anything else."""
    if ax is None:
        from matplotlib import pyplot as plt

        _, ax = plt.subplots(figsize=size, layout="constrained")
    if not hasattr(ax, "add_patch"):  # a figure, or an array of axes
        raise TypeError(f"ax must be one Axes of matplotlib, got {type(ax).__name__}")
    return ax
