"""A data frame as one tensor of numbers and back: which kind each column is, and its units."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ppvae.data.frames import Cells, backend_of, cells_of, frame_of
from ppvae.data.precision import PrecisionWarning, lossy_columns, warn_of_lost_digits

Kind = Literal["number", "count", "binary", "category", "ordered"]


@dataclass(frozen=True)
class Column:
    """One column of a :class:`Table`: its kind, and how its cells become numbers.

    Args:
        name: in the frame.
        kind: "number"; "count" 0, 1, 2, ...; "binary" 0 and 1; "category" and "ordered" 0..C-1.
        dtype: of the frame's column, in words.
        levels: of "category" and "ordered", and of a binary column of words, what each code
            stands for; else empty.
        loc: mean of what a network sees: of the numbers, and of log(1 + x) for counts.
        scale: their standard deviation, > 0.
    """

    name: Any
    kind: Kind
    dtype: str
    levels: tuple[Any, ...] = ()
    loc: float = 0.0
    scale: float = 1.0

    @property
    def num_levels(self) -> int:
        """C, how many levels there are; 0 for numbers and counts."""
        return 2 if self.kind == "binary" else len(self.levels)


@dataclass(frozen=True, repr=False)
class Table:
    """Typed columns: from a frame of pandas or polars to one tensor ``(N, D)``, and back.

    :meth:`fit` looks at a frame once, and records of each column its kind, its levels and its
    scale; any frame with these columns, in any order, is then the same tensor's kind of rows.
    Numbers stay in their own units, since :func:`ppvae.conditionals.heads_for` puts the change of
    units into the density: log p(x) is of the table as it is. A missing cell is NaN.

    Args:
        columns: in the order of the tensor's columns.
        backend: whose frames :meth:`to_frame` makes, "pandas" or "polars".

    Example:
        >>> import pandas as pd
        >>> people = pd.DataFrame(
        ...     {
        ...         "height": [1.62, 1.80, None],
        ...         "visits": [0, 7, 2],
        ...         "job": ["nurse", "smith", "nurse"],
        ...         "smokes": [False, True, False],
        ...     }
        ... )
        >>> table = Table.fit(people)
        >>> table
        Table of 4 columns
          height  number    mean 1.71, sd 0.127
          visits  count     mean of log(1 + x) 1.06, sd 1.04
          job     binary    nurse, smith
          smokes  binary    False, True
        >>> x = table.to_tensor(people)
        >>> x[1]
        tensor([1.8000, 7.0000, 1.0000, 1.0000])
        >>> table.to_frame(x)["job"].tolist()
        ['nurse', 'smith', 'nurse']
    """

    columns: tuple[Column, ...]
    backend: str = "pandas"

    @staticmethod
    def fit(frame: Any, kinds: Mapping[Any, Kind] | None = None) -> Table:
        """Find out what a frame's columns are.

        Words are categories, and so are pandas' categorical columns, "ordered" if these are; True
        and False, or 0 and 1, are binary; whole numbers of which none is negative are counts; other
        numbers are numbers.

        Args:
            frame: of pandas, or of polars or another library that narwhals knows.
            kinds: by column, where that is not what is meant: ``{"year": "number"}``. "ordered"
                takes the order of a categorical column's levels, or of numbers.

        Raises:
            TypeError: it is no frame; a column holds dates, objects, or numbers and words.
            ValueError: a column has one value only, no cell, or hardly two cells alike; it is twice
                there, or not of the kind that is given.

        Example:
            >>> import pandas as pd
            >>> years = pd.DataFrame({"year": [1990, 2004, 1997]})
            >>> Table.fit(years, {"year": "number"}).columns[0].kind
            'number'
        """
        cells = cells_of(frame)
        if kinds is not None and not isinstance(kinds, Mapping):
            raise TypeError(f"kinds says a kind by column, {{'year': 'number'}}, and is {kinds!r}")
        given = dict(kinds or {})
        if unknown := [name for name in given if name not in cells]:
            raise ValueError(f"kinds names columns that are not there: {unknown}; {_has(cells)}")
        if wrong := [kind for kind in given.values() if kind not in get_args(Kind)]:
            raise ValueError(f"kinds has {wrong[0]!r}: use {', '.join(map(repr, get_args(Kind)))}")
        columns = [_fitted(name, cell, given.get(name)) for name, cell in cells.items()]
        return Table(tuple(columns), backend_of(frame))

    @property
    def names(self) -> tuple[Any, ...]:
        """The columns' names, in the order of the tensor's columns."""
        return tuple(column.name for column in self.columns)

    def to_tensor(self, frame: Any, dtype: torch.dtype | None = None) -> Tensor:
        """The rows of a frame as numbers, ``(N, D)``; missing cells are NaN.

        Columns are found by name, in whatever order; others are left aside.

        Args:
            frame: with the columns that this table was fitted to.
            dtype: float64 keeps all digits, but of whole numbers beyond 2^53; None: the default
                float dtype. A warning names what is lost.

        Raises:
            TypeError: words in a column of numbers.
            ValueError: a column is absent; a level that :meth:`fit` has not seen; a value that is
                not of its column's kind.

        Warns:
            PrecisionWarning: what a column loses.
        """
        cells = cells_of(frame)
        if absent := [name for name in self.names if name not in cells]:
            raise ValueError(f"the frame has no column {absent[0]!r} of the table; {_has(cells)}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        numbers = [_coded(column, cells[column.name]) for column in self.columns]
        for column, values in zip(self.columns, numbers, strict=True):
            observed = values[~np.isnan(values)] if values.dtype.kind == "f" else values
            if dtype != torch.float64 and len(observed) and not column.levels:
                lossy = lossy_columns(observed[:, None])
                warn_of_lost_digits(observed[:, None], lossy, "the frame", [column.name])
            elif values.dtype.kind == "i" and (np.abs(values.astype(np.float64)) > 2**53).any():
                warnings.warn(
                    f"torch.float64 loses digits: column {column.name!r} of the frame has whole "
                    "numbers beyond 2^53. If they are names, drop it",
                    PrecisionWarning,
                    stacklevel=2,
                )
        return torch.from_numpy(np.stack([v.astype(np.float64) for v in numbers], 1)).to(dtype)

    def to_frame(self, x: Tensor | np.ndarray, index: Any = None) -> Any:
        """The inverse: a frame of these rows, each column of the dtype that it had.

        It is exact where the tensor's dtype holds the values: in float64 all but whole numbers
        beyond 2^53. What the column's dtype cannot hold, such as a NaN among whole numbers or a
        mean of counts, makes it float64.

        Args:
            x: ``(N, D)``, a tensor or an array.
            index: of the rows, for pandas.

        Raises:
            ValueError: another number of columns; a code that stands for no level.
        """
        x = torch.as_tensor(x)
        if x.dim() != 2 or x.shape[1] != len(self.columns):
            raise ValueError(f"x has shape {tuple(x.shape)}, not (N, {len(self.columns)}): {self}")
        numbers = x.detach().cpu().to(torch.float64).numpy()
        cells = {c.name: _decoded(c, numbers[:, i]) for i, c in enumerate(self.columns)}
        dtypes = {column.name: (column.dtype, column.levels) for column in self.columns}
        return frame_of(self.backend, cells, dtypes, index)

    def nearest(self, x: Tensor) -> Tensor:
        """Rows whose codes stand for levels: the nearest ones, for means of binary and ordered."""
        columns = [
            x[:, i].round().clamp(0, c.num_levels - 1) if c.levels else x[:, i]
            for i, c in enumerate(self.columns)
        ]
        return torch.stack(columns, 1)

    def __repr__(self) -> str:
        width = max(len(str(name)) for name in self.names)
        lines = [f"  {c.name!s:{width}}  {c.kind:8}  {_shown(c)}" for c in self.columns]
        return "\n".join([f"Table of {len(self.columns)} columns", *lines])


def _shown(column: Column) -> str:
    if column.levels or column.kind == "binary":
        levels = column.levels or (0, 1)
        more = f" and {len(levels) - 5} more" if len(levels) > 5 else ""
        return ", ".join(map(str, levels[:5])) + more
    of = "mean of log(1 + x)" if column.kind == "count" else "mean"
    return f"{of} {column.loc:.3g}, sd {column.scale:.3g}"


def _has(cells: Mapping[Any, Cells]) -> str:
    names = ", ".join(map(repr, list(cells)[:8]))
    return f"it has {names}{', ...' if len(cells) > 8 else ''}"


def _fitted(name: Any, cells: Cells, kind: Kind | None) -> Column:
    """What a column is; raises if it is nothing that a head is for."""
    there = cells.observed
    if len(there) < 2:
        seen = "has no cell that is not missing" if not len(there) else "has one cell"
        raise ValueError(f"column {name!r} {seen}: drop it, or fit the table to more rows")
    distinct = np.unique(there) if cells.levels is None else np.unique(there.astype(np.int64))
    if len(distinct) == 1:
        seen = there[0].item() if cells.levels is None else cells.levels[int(there[0])]
        raise ValueError(f"column {name!r} is {seen!r} in all rows, and tells nothing: drop it")
    kind = kind or _inferred(name, cells, distinct)
    levels: tuple[Any, ...] = cells.levels or ()
    if kind in ("category", "ordered"):
        if cells.levels is not None and kind == "ordered" and not cells.has_order:
            raise ValueError(
                f"column {name!r} holds words without an order: give it one, by "
                f"astype(pandas.CategoricalDtype([...], ordered=True))"
            )
        levels = levels or tuple(distinct.tolist())
    elif kind == "binary":
        if (len(levels) or len(distinct)) != 2:
            raise ValueError(f"column {name!r} has {len(distinct)} different values, not 2")
        if not levels and distinct.tolist() != [0, 1]:
            levels = tuple(distinct.tolist())
    elif cells.levels is not None:
        use = "binary" if _are_bools(cells) else "category"
        raise ValueError(f"column {name!r} holds {_words(cells)}, no {kind}s: use {use!r}")
    column = Column(name, kind, cells.dtype, levels)
    values = _coded(column, cells).astype(np.float64)
    values = values[~np.isnan(values)]
    values = np.log1p(values) if kind == "count" else values
    if kind == "category":
        return column
    scale = float(values.std(ddof=1))
    return Column(name, kind, cells.dtype, levels, float(values.mean()), scale)


def _inferred(name: Any, cells: Cells, distinct: np.ndarray) -> Kind:
    if cells.levels is not None:
        num, rows = len(distinct), len(cells.observed)
        if not cells.is_categorical and num > 10 and 2 * num > rows:
            raise ValueError(
                f"column {name!r} has {num} different words in {rows} rows: drop it if they are "
                f"names, or say kinds={{{name!r}: 'category'}}"
            )
        if len(cells.levels) == 2:
            return "binary"
        return "ordered" if cells.is_ordered else "category"
    if distinct.tolist() == [0, 1]:
        return "binary"
    whole = bool((distinct == np.round(distinct)).all())
    return "count" if whole and distinct[0] >= 0 else "number"


def _coded(column: Column, cells: Cells) -> np.ndarray:
    """A column's cells as numbers, missing ones NaN; whole numbers of a frame stay whole."""
    name, there = column.name, cells.observed
    if column.levels:
        words = there.tolist() if cells.levels is None else [cells.levels[int(i)] for i in there]
        place = {level: code for code, level in enumerate(column.levels)}
        codes = np.array([place.get(word, -1) for word in words], np.float64)
        if (codes < 0).any():
            new = list(dict.fromkeys(w for w, code in zip(words, codes, strict=True) if code < 0))
            raise ValueError(
                f"column {name!r} has {int((codes < 0).sum())} cells of levels that the table was "
                f"not fitted to, such as {new[0]!r}: make them missing, or fit the table to rows "
                "with all levels"
            )
        return cells.filled(codes)
    if cells.levels is not None and not (column.kind == "binary" and _are_bools(cells)):
        raise TypeError(f"column {name!r} holds {_words(cells)}, not numbers")
    if column.kind != "number":
        top = 1 if column.kind == "binary" else math.inf
        bad = there[~((there >= 0) & (there <= top) & (there == np.round(there)))]
        if len(bad):
            raise ValueError(
                f"column {name!r} is a {column.kind}, and has {len(bad)} cells such as {bad[0]}: "
                f"mend them, or Table.fit(frame, kinds={{{name!r}: 'number'}})"
            )
    return cells.filled(there) if cells.missing.any() else there


def _are_bools(cells: Cells) -> bool:
    return cells.levels == (False, True)


def _words(cells: Cells) -> str:
    return "True and False" if _are_bools(cells) else f"words, such as {(cells.levels or '?')[0]!r}"


def _decoded(column: Column, numbers: np.ndarray) -> np.ndarray:
    """Cells from numbers: levels where there are some, None where they are missing."""
    if not column.levels:
        return numbers
    missing = np.isnan(numbers)
    codes = np.where(missing, 0, numbers)
    bad = (codes != np.round(codes)) | (codes < 0) | (codes >= len(column.levels))
    if bad.any():
        raise ValueError(
            f"column {column.name!r} has {codes[bad][0]:g}, which stands for none of its "
            f"{len(column.levels)} levels: of a {column.kind} column give draws, no means"
        )
    cells = np.empty(len(codes), object)
    cells[:] = [column.levels[int(code)] for code in codes]
    cells[missing] = None
    return cells
