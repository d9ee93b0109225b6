"""What the exercises of the course are checked with; a lesson run elsewhere needs this file."""

from __future__ import annotations

from typing import Any

import torch


class NotYet(AssertionError):
    """The answer is still blank, or it is wrong."""


def check(got: Any, exact: Any, tolerance: float = 1e-4) -> None:
    """Print the answer beside the exact value, or raise.

    Args:
        got: the answer, a number, tensor, or list of either; with ``...`` in it while it is blank.
        exact: the same by another route.
        tolerance: the largest difference allowed, relative to the largest of the exact values if
            that is above 1.

    Raises:
        NotYet: blank, of another shape, or further from the exact value than that.
    """
    if got is ... or (isinstance(got, list | tuple) and any(one is ... for one in got)):
        raise NotYet("still blank: put your code where the dots are")
    got, exact = tensor(got), tensor(exact)
    if got.shape != exact.shape:
        raise NotYet(f"shape {tuple(got.shape)}, should be {tuple(exact.shape)}")
    allowed = tolerance * max(1.0, float(exact.abs().max()))
    if not bool(((got - exact).abs() <= allowed).all()):  # NaN is not
        raise NotYet(f"got {_short(got)}, exact {_short(exact)}")
    print(f"right: {_short(got)}, exact {_short(exact)}")


def tensor(values: Any) -> torch.Tensor:
    """A number, tensor, or list of either, in float64."""
    if isinstance(values, list | tuple):
        return torch.stack([tensor(value) for value in values])
    return torch.as_tensor(values).detach().double()


def _short(values: torch.Tensor) -> str:
    flat = [f"{value:.5g}" for value in values.flatten().tolist()]
    return ", ".join(flat[:4]) + (", ..." if len(flat) > 4 else "")
