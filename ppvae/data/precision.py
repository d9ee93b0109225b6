"""What numbers lose when they are stored in the default float dtype."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

PIECE = 2**22  # values of a mapped file that are looked at together
SAMPLE = 1000  # rows that tell how finely a column is resolved
TOLERANCE = 1e-3  # error of a value, in standard deviations of its column
SHOWN = 3  # columns that a warning describes


class PrecisionWarning(UserWarning):
    """Numbers lose digits that matter when they are stored in the default float dtype."""


def float_type() -> Any:
    """The NumPy type that numbers have on their way to the default float dtype."""
    return np.float64 if torch.get_default_dtype() == torch.float64 else np.float32


def largest_whole() -> int:
    """Up to where that type holds every whole number: 2^24 or 2^53."""
    return int(2 ** (np.finfo(float_type()).nmant + 1))


def pieces(array: np.ndarray, size: int = PIECE) -> Iterator[tuple[int, np.ndarray]]:
    """Rows of about ``size`` values together, and the number of the first of them."""
    step = max(1, size // max(1, array[0].size))
    for first in range(0, len(array), step):
        yield first, array[first : first + step]


def lossy_columns(array: np.ndarray) -> np.ndarray:
    """Columns of ``(N, ...)`` that the default float dtype cannot hold, by their place in a row.

    A column is one place in a row. It loses digits if its whole numbers do not stay what they are
    (beyond 2^24 in float32), if an error is above a thousandth of its standard deviation (a large
    offset), or if one in ten of its different values become equal. The last two are found in a
    sample of 1000 rows.
    """
    fraction = array.dtype.kind == "f"
    if fraction and array.dtype.itemsize <= np.dtype(float_type()).itemsize:
        return np.empty(0, np.int64)
    if not fraction and (array.dtype.kind == "b" or np.iinfo(array.dtype).max <= largest_whole()):
        return np.empty(0, np.int64)
    largest = np.zeros(array[0].size)
    for _, piece in pieces(array):
        flat = piece.reshape(len(piece), -1)
        largest = np.maximum(largest, np.maximum(flat.max(0), -flat.min(0).astype(np.float64)))
    lossy = np.zeros(array[0].size, bool)
    most = np.inf
    if fraction:
        rows = min(SAMPLE, max(2, PIECE // array[0].size))
        lossy = _unresolved(array[:: math.ceil(len(array) / rows)])
        most = 2.0 ** np.finfo(array.dtype).nmant  # all floats as large as this are whole
    for column in np.flatnonzero((largest >= largest_whole()) & (largest < most) & ~lossy):
        values = _values(array, int(column))
        lossy[column] = bool((values == np.rint(values)).all() and changed(values).any())
    return np.flatnonzero(lossy)


def _values(array: np.ndarray, column: int) -> np.ndarray:
    """All values of a column, ``(N,)``."""
    place: Any = (slice(None), *np.unravel_index(column, array.shape[1:]))
    values: np.ndarray = array[place]
    return values


def changed(values: np.ndarray) -> np.ndarray:
    """Which numbers are others when they are stored."""
    with np.errstate(invalid="ignore"):  # 2^63 - 1 is rounded to 2^63, which is no int64
        other: np.ndarray = values.astype(float_type()).astype(values.dtype) != values
    return other


def _unresolved(rows: np.ndarray) -> np.ndarray:
    """Columns whose errors compare with their spread, or whose values merge."""
    with np.errstate(all="ignore"):  # what is not finite is for others to refuse
        rows = np.sort(rows.reshape(len(rows), -1), axis=0)  # rounding keeps the order
        stored = rows.astype(float_type())
        error, spread = np.abs(rows - stored).max(0), (rows - rows[0]).std(0)
        before = 1 + (np.diff(rows, axis=0) > 0).sum(0)
        after = 1 + (np.diff(stored, axis=0) > 0).sum(0)
        unresolved: np.ndarray = (error > TOLERANCE * spread) & (spread > 0)
    return unresolved | (after < 0.9 * before)


def warn_of_lost_digits(
    array: np.ndarray, lossy: np.ndarray, name: str, columns: Sequence[Any] | None = None
) -> None:
    """Say what the first of the lossy columns lose, with the cure; nothing if there are none.

    Args:
        array: ``(N, ...)``, as they were given.
        lossy: what :func:`lossy_columns` finds.
        name: of the argument.
        columns: names of the columns, if they have any.
    """
    if not len(lossy):
        return
    seen = []
    for column in lossy[:SHOWN].tolist():
        where = np.unravel_index(column, array.shape[1:])
        values = _values(array, column)
        stored = values.astype(float_type())
        error = np.abs(values.astype(np.float64) - stored).max()
        label = f"{name}[:, {', '.join(map(str, where))}]"
        if columns is not None and len(where) == 1:
            label = f"column {columns[column]!r} of {name}"
        seen.append(
            f"{label}, up to {np.abs(stored).max():g}, is off by up to {error:.3g}, and "
            f"{len(np.unique(values))} distinct values become {len(np.unique(stored))}"
        )
    if len(lossy) > SHOWN:
        seen.append(f"{len(lossy) - SHOWN} more columns")
    dtype = torch.get_default_dtype()
    cure = "Subtract an offset before (a shift changes no density)"
    if dtype != torch.float64:
        cure += ", or keep float64 by torch.set_default_dtype(torch.float64) before all else"
    seen_all = "; ".join(seen)
    warnings.warn(f"{dtype} loses digits: {seen_all}. {cure}", PrecisionWarning, stacklevel=3)
