"""Frames of pandas, and of libraries that narwhals knows, as columns of cells; and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Number
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Cells:
    """One column of a frame.

    Args:
        observed: what is not missing: numbers, int64 or float64; of words the place in ``levels``.
        missing: ``(N,)``, which cells are not there.
        dtype: of the column, in words.
        levels: of words and categories; None for numbers.
        is_categorical: whether the frame itself says that they are levels.
        has_order: whether somebody chose the order of the levels.
        is_ordered: whether the frame says that it means something.
    """

    observed: np.ndarray
    missing: np.ndarray
    dtype: str
    levels: tuple[Any, ...] | None = None
    is_categorical: bool = False
    has_order: bool = False
    is_ordered: bool = False

    def filled(self, observed: np.ndarray) -> np.ndarray:
        """A whole column, ``(N,)``, with NaN where cells are missing."""
        values = np.full(len(self.missing), np.nan)
        values[~self.missing] = observed
        return values


def is_frame(value: Any) -> bool:
    """Whether it is a frame of pandas, or of a library that narwhals knows.

    Raises:
        TypeError: it is one that holds no rows yet.
    """
    kind = type(value)
    if hasattr(kind, "collect") and hasattr(kind, "columns") and not hasattr(kind, "__len__"):
        raise TypeError(f"a {kind.__name__} holds no rows yet: give frame.collect()")
    return hasattr(value, "columns") and hasattr(value, "dtypes") and not hasattr(value, "obs")


def backend_of(frame: Any) -> str:
    """The library that a frame is of."""
    return type(frame).__module__.partition(".")[0]


def cells_of(frame: Any) -> dict[Any, Cells]:
    """The columns of a frame by name.

    Raises:
        TypeError: it is no frame; a column holds what is no number, word or category.
        ValueError: no column or row; a name is there twice; infinite numbers.
    """
    if not is_frame(frame):
        raise TypeError(f"a frame of pandas or polars is needed, got {type(frame).__name__}")
    names = list(frame.columns)
    if not names or not len(frame):
        raise ValueError(f"the frame is empty: {len(frame)} rows and {len(names)} columns")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"column {twice!r} is in the frame twice: rename or drop one")
    if backend_of(frame) == "pandas":
        return {name: _of_pandas(name, frame[name]) for name in names}
    native = _narwhals().from_native(frame, eager_only=True)
    return {name: _of_narwhals(name, native[name]) for name in names}


def numeric(frame: Any, name: str) -> np.ndarray:
    """A frame whose columns are all numbers as one array, ``(N, D)``, missing cells NaN.

    Raises:
        TypeError: a column holds something else; the message names it.
    """
    cells = cells_of(frame)
    words = [column for column, cell in cells.items() if cell.levels not in (None, (False, True))]
    if words:
        raise TypeError(
            f"{name} has columns of words, such as {words[0]!r}: fit a table to the frame, "
            "table = data.Table.fit(frame), and give table.to_tensor(frame)"
        )
    columns = [c.filled(c.observed) if c.missing.any() else c.observed for c in cells.values()]
    array = np.stack(columns, 1)
    return array.astype(bool) if all(c.levels for c in cells.values()) else array


def _narwhals() -> Any:
    try:
        import narwhals
    except ImportError as error:
        raise ImportError("frames other than pandas' are read by narwhals: install it") from error
    return narwhals


def _of_pandas(name: Any, series: Any) -> Cells:
    import pandas as pd

    missing, dtype = series.isna().to_numpy(), series.dtype
    there = series[~missing]
    if isinstance(dtype, pd.CategoricalDtype):
        kind = "ordered" if dtype.ordered else "category"
        return Cells(
            there.cat.codes.to_numpy(np.int64),
            missing,
            f"{kind}:{dtype.categories.dtype}",
            tuple(dtype.categories.tolist()),
            is_categorical=True,
            has_order=True,
            is_ordered=bool(dtype.ordered),
        )
    is_numeric = pd.api.types.is_numeric_dtype(dtype) and not pd.api.types.is_complex_dtype(dtype)
    if is_numeric:
        return _numbers(name, there.to_numpy(), missing, str(dtype))
    return _objects(name, there.tolist(), missing, str(dtype))


def _of_narwhals(name: Any, series: Any) -> Cells:
    nw = _narwhals()
    missing, dtype = series.is_null().to_numpy(), series.dtype
    if dtype.is_float():
        missing = missing | series.is_nan().fill_null(True).to_numpy()
    there = series.filter((~missing).tolist())
    if isinstance(dtype, (nw.Categorical, nw.Enum)):
        words = there.cast(nw.String).to_list()
        has_order = isinstance(dtype, nw.Enum)  # a Categorical's is that of appearance
        levels = tuple(dtype.categories) if has_order else tuple(sorted(set(words)))
        place = {level: code for code, level in enumerate(levels)}
        codes = np.array([place[word] for word in words], np.int64)
        return Cells(codes, missing, type(dtype).__name__, levels, True, has_order)
    if dtype.is_integer() or dtype.is_float() or isinstance(dtype, nw.Boolean):
        return _numbers(name, there.to_numpy(), missing, type(dtype).__name__)
    return _objects(name, there.to_list(), missing, type(dtype).__name__)


def _objects(name: Any, there: list[Any], missing: np.ndarray, dtype: str) -> Cells:
    """Words, or numbers that a frame keeps as objects."""
    if all(isinstance(cell, bool) for cell in there):
        return _numbers(name, np.array(there, bool), missing, dtype)
    if all(isinstance(cell, Number) and not isinstance(cell, complex) for cell in there):
        return _numbers(name, np.array(there), missing, dtype)
    odd = [cell for cell in there if not isinstance(cell, str)]
    if odd and len(odd) < len(there):
        word = next(cell for cell in there if isinstance(cell, str))
        raise TypeError(
            f"column {name!r} holds numbers and words, such as {odd[0]!r} and {word!r}: make the "
            "words missing, by pandas.to_numeric(column, errors='coerce')"
        )
    if odd:
        cure = "give the time since a date, as a number" if hasattr(odd[0], "year") else "drop it"
        raise TypeError(
            f"column {name!r} holds {type(odd[0]).__name__}, no numbers or words: {cure}"
        )
    words = np.array(there, object)
    numeric = sum(map(_is_number, there))
    if numeric and 2 * numeric > len(there):
        rest = next((repr(cell) for cell in there if not _is_number(cell)), None)
        seen = f"and {rest}" if rest else "as words"
        raise TypeError(
            f"column {name!r} holds numbers {seen}, such as {there[0]!r}: "
            "pandas.to_numeric(column, errors='coerce') makes numbers, and the rest missing"
        )
    levels, codes = np.unique(words.astype(str), return_inverse=True)
    return Cells(codes.astype(np.int64), missing, dtype, tuple(levels.tolist()))


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _numbers(name: Any, there: np.ndarray, missing: np.ndarray, dtype: str) -> Cells:
    whole = there.dtype.kind in "biu"
    if there.dtype.kind == "u" and len(there):
        whole = int(there.max()) <= np.iinfo(np.int64).max
    values = there.astype(np.int64 if whole else np.float64)
    if not np.isfinite(values).all():
        rows = np.flatnonzero(~missing)[~np.isfinite(values)]
        raise ValueError(
            f"column {name!r} has {len(rows)} infinite cells, the first in row {rows[0]}: make "
            "them missing (NaN)"
        )
    levels = (False, True) if there.dtype.kind == "b" else None
    return Cells(values, missing, dtype, levels, is_categorical=levels is not None)


# -- and back ----------------------------------------------------------------------------------


def frame_of(
    backend: str,
    cells: Mapping[Any, np.ndarray],
    dtypes: Mapping[Any, tuple[str, tuple[Any, ...]]],
    index: Any = None,
) -> Any:
    """A frame of columns; each has its dtype again, if that holds the values."""
    if backend == "pandas":
        import pandas as pd

        columns = {name: _to_pandas(cells[name], *dtypes[name]) for name in cells}
        frame = pd.DataFrame(dict(enumerate(columns.values())))
        frame.columns = pd.Index(list(columns))
        return frame if index is None else frame.set_axis(index, axis=0)
    nw = _narwhals()
    series = [_to_narwhals(nw, backend, name, cells[name], *dtypes[name]) for name in cells]
    return nw.from_dict({s.name: s for s in series}).to_native()


def frame_of_numbers(backend: str, array: np.ndarray, names: list[Any], index: Any = None) -> Any:
    """A frame of an array ``(N, D)``, or a column of ``(N,)``, of the array's dtype."""
    if backend == "pandas":
        import pandas as pd

        if array.ndim == 1:
            return pd.Series(array, index, name=names[0])
        return pd.DataFrame(array, index, pd.Index(names))
    nw = _narwhals()
    parts = array[:, None] if array.ndim == 1 else array
    series = [nw.new_series(n, parts[:, i], backend=backend) for i, n in enumerate(names)]
    if array.ndim == 1:
        return series[0].to_native()
    return nw.from_dict({s.name: s for s in series}).to_native()


def _to_pandas(values: np.ndarray, dtype: str, levels: tuple[Any, ...]) -> Any:
    import pandas as pd

    kind, is_category, inner = dtype.partition(":")
    if is_category:
        target: Any = pd.CategoricalDtype(pd.Index(levels, dtype=inner), kind == "ordered")
        return pd.Series(values, dtype=object).astype(target)
    target = pd.api.types.pandas_dtype(dtype)
    series = pd.Series(values, dtype=values.dtype)
    missing = series.isna()
    if values.dtype == object:  # levels
        series = series.where(~missing, np.nan)
        if missing.any() and isinstance(target, np.dtype) and target.kind in "biu":
            return series if target.kind == "b" else series.astype(float)
    elif target.kind in "biu" and not _is_whole(values, not isinstance(target, np.dtype)):
        return series
    return series.astype(target)


def _is_whole(values: np.ndarray, may_be_missing: bool) -> bool:
    """Whether all are whole numbers, or missing where they may be."""
    missing = np.isnan(values)
    return bool((missing & may_be_missing | (values == np.round(values))).all())


def _to_narwhals(
    nw: Any, backend: str, name: Any, values: np.ndarray, dtype: str, levels: tuple[Any, ...]
) -> Any:
    target = nw.Enum(levels) if dtype == "Enum" else getattr(nw, dtype)()
    cells = [None if value is None or value != value else value for value in values.tolist()]
    if values.dtype != object and not _is_whole(values, True):
        return nw.new_series(name, cells, nw.Float64(), backend=backend)
    return nw.new_series(name, cells, backend=backend).cast(target)
