"""Arrays with missing values: numbers for all of them, and which were there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def without_gaps(array: np.ndarray, columns: Sequence[Any] | None) -> tuple[np.ndarray, Tensor]:
    """Numbers that can be checked as if nothing was missing, and which of them were there.

    Each gap holds a value of its own column, so what is found of the numbers is found of those
    that are there.

    Args:
        array: ``(N, ...)``, missing values being NaN.
        columns: names of the columns, if they have any.

    Raises:
        ValueError: a row or a column has no value at all.
    """
    if isinstance(array, np.memmap):
        raise ValueError(
            "missing='mask' keeps the mask in memory, and x is a file mapped into it: give "
            "np.asarray(x), or batches (x, observed) of your own by a DataLoader"
        )
    observed = ~np.isnan(array) if array.dtype.kind == "f" else np.ones(array.shape, bool)
    empty = np.flatnonzero(~observed.reshape(len(observed), -1).any(1))
    if len(empty):
        raise ValueError(
            f"x has {len(empty)} rows without any value, the first is row {empty[0]}: they tell "
            "nothing; drop them"
        )
    require_columns(torch.from_numpy(observed), "x", columns)
    first = np.take_along_axis(array, observed.argmax(0)[None], 0)
    return np.where(observed, array, first), torch.from_numpy(observed)


def require_columns(observed: Tensor, where: str, columns: Sequence[Any] | None) -> None:
    """Raise ``ValueError`` for a column of which nothing is observed."""
    never = (~observed.any(0)).nonzero().tolist()
    if never:
        named = columns is not None and observed.dim() == 2
        shown = [repr(columns[i[0]]) if named else str(i[0] if len(i) == 1 else i)  # type: ignore[index]
                 for i in never[:3]]  # fmt: skip
        more = f" and {len(never) - 3} more" if len(never) > 3 else ""
        raise ValueError(
            f"{where} has no value at all in column {', '.join(shown)}{more}, so nothing can be "
            "learned of it: leave it out"
        )
