"""What :class:`ppvae.data.Stored` reads from, each told by what it can do: none is imported."""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor


def stays(value: Any) -> bool:
    """Whether a value is rows in a file or a store, that a copy in memory would be too much of.

    Example:
        >>> stays(np.zeros((3, 2))), stays({"x": [1.0, 2.0]})
        (False, False)
    """
    if isinstance(value, np.memmap):
        return getattr(value, "_mmap", None) is not None  # else it is what was computed from one
    if isinstance(value, (np.ndarray, Tensor, str)):
        return False
    return _is_array_of_chunks(value) or _is_arrow(value) or is_hugging_face(value)


def is_hugging_face(value: Any) -> bool:
    """Whether a value is a data set of Hugging Face, with rows by number."""
    known = ("with_format", "column_names", "map")
    return all(hasattr(value, name) for name in known) and hasattr(value, "__len__")


def is_chunked(rows: Any) -> bool:
    """Whether a store is read in stretches."""
    return getattr(rows, "chunk_offsets", None) is not None


def adapted(given: Sequence[Any]) -> Any:
    """One store of what :class:`ppvae.data.Stored` was given.

    Raises:
        TypeError, ValueError: see there.
    """
    shards = [_store(value) for value in given]
    if not shards:
        raise TypeError("Stored() has no rows: give an array, a table or a file")
    return shards[0] if len(shards) == 1 else Shards(shards)


class Shards:
    """Stores of the same columns, one after the other.

    Args:
        shards: two or more; some may be empty.

    Example:
        >>> both = Shards([np.arange(3), np.arange(10, 12)])
        >>> len(both), both[np.array([1, 3, 4])], both[2:4]
        (5, array([ 1, 10, 11]), array([ 2, 10]))
    """

    def __init__(self, shards: Sequence[Any]) -> None:
        self.shards = [shard for shard in shards if len(shard)] or [shards[0]]
        self.ends = np.cumsum([len(shard) for shard in self.shards])
        self.chunk_offsets: np.ndarray | None = None
        if any(map(is_chunked, self.shards)):
            starts = self.ends - [len(shard) for shard in self.shards]
            inner = [
                start + np.asarray(shard.chunk_offsets if is_chunked(shard) else [0])
                for start, shard in zip(starts, self.shards, strict=True)
            ]
            self.chunk_offsets = np.unique(np.concatenate([*inner, self.ends]))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, which: Any) -> Any:
        index = np.arange(which.start, which.stop) if isinstance(which, slice) else which
        parts, start = [], 0
        for shard, end in zip(self.shards, self.ends.tolist(), strict=True):
            inside = index[(index >= start) & (index < end)] - start
            if len(inside):
                whole = isinstance(which, slice)
                parts.append(shard[slice(int(inside[0]), int(inside[-1]) + 1) if whole else inside])
            start = end
        return together(parts) if parts else self.shards[0][0:0]


class Beside:
    """Stores of the same rows, side by side.

    Args:
        columns: a tuple of stores, or a dictionary.

    Raises:
        ValueError: their lengths differ.
    """

    def __init__(self, columns: Any) -> None:
        self.columns = columns
        stores = list(columns.values()) if isinstance(columns, Mapping) else list(columns)
        lengths = [len(store) for store in stores]
        if len(set(lengths)) != 1:
            raise ValueError(f"the arguments have {lengths} rows: give each as many")
        self._len = lengths[0]
        offsets = [store.chunk_offsets for store in stores if is_chunked(store)]
        # those of the largest chunks; others are cut where these are
        self.chunk_offsets = min(offsets, key=len) if offsets else None

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, which: Any) -> Any:
        if isinstance(self.columns, Mapping):
            return {name: store[which] for name, store in self.columns.items()}
        return tuple(store[which] for store in self.columns)


class Mapped:
    """A mapped file, whose rows the system fetches at once, and not each when it is touched.

    Args:
        array: a ``np.memmap``, or consecutive rows of one.
    """

    def __init__(self, array: Any) -> None:
        self.array, self._map = array, array._mmap
        begin = np.frombuffer(self._map, np.uint8).__array_interface__["data"][0]
        self._start = array.__array_interface__["data"][0] - begin
        self._asks = hasattr(self._map, "madvise") and array.strides[0] > 0  # not on Windows

    def __len__(self) -> int:
        return len(self.array)

    def __getitem__(self, which: Any) -> Any:
        if self._asks:
            whole = isinstance(which, slice)
            pieces = [(which.start, which.stop)] if whole else ((i, i + 1) for i in which.tolist())
            for first, last in pieces:
                start, end = (self._start + row * self.array.strides[0] for row in (first, last))
                start -= start % mmap.PAGESIZE
                self._map.madvise(mmap.MADV_WILLNEED, start, min(end, len(self._map)) - start)
        return self.array[which]


class ArrayOfChunks:
    """An array of zarr or h5py, whose first chunk says how many rows each has.

    Args:
        array: ``(N, ...)``; ``chunks`` has the shape of one, or is None.
    """

    def __init__(self, array: Any) -> None:
        self.array, (rows, *_) = array, array.shape
        self._len = int(rows)
        each = array.chunks[0] if array.chunks else 64  # no chunks: rows lie side by side
        if isinstance(each, tuple):  # of dask and xarray, the rows of each
            self.chunk_offsets = np.append(0, np.cumsum(each))
        else:
            self.chunk_offsets = np.append(np.arange(0, self._len, each), self._len)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, which: Any) -> Any:
        return self.array[which]


class Groups:
    """Pieces of Parquet files, each read as a whole: row groups.

    Args:
        read: functions without arguments, each of which gives a table of pyarrow.
        sizes: rows of each.
    """

    def __init__(self, read: Sequence[Any], sizes: Sequence[int]) -> None:
        self.read, self.chunk_offsets = read, np.append(0, np.cumsum(sizes)).astype(np.int64)

    def __len__(self) -> int:
        return int(self.chunk_offsets[-1])

    def __getitem__(self, which: slice) -> Any:
        start, stop = which.start, which.stop
        parts = []
        for i, read in enumerate(self.read):
            first, end = self.chunk_offsets[i : i + 2].tolist()
            low, high = max(start, first), min(stop, end)
            if low < high:
                parts.append(columns_of(read().slice(low - first, high - low)))
        return together(parts)


class Columns:
    """A table of pyarrow: in memory, or mapped into it.

    Args:
        table: its columns are the arguments.
    """

    def __init__(self, table: Any) -> None:
        self.table = table

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def __getitem__(self, which: Any) -> Any:
        if isinstance(which, slice):
            return columns_of(self.table.slice(which.start, which.stop - which.start))
        return columns_of(self.table.take(which))


def columns_of(table: Any) -> dict[str, np.ndarray]:
    """A table's columns as arrays; lists of one length are rows, ``(N, D)`` or ``(N, D, E)``.

    Raises:
        ValueError: gaps, or lists of several lengths.
    """
    return {
        name: _array(name, column.combine_chunks(), len(table))
        for name, column in zip(table.column_names, table.columns, strict=True)
    }


def _array(name: str, column: Any, rows: int) -> np.ndarray:
    if column.null_count:
        raise ValueError(
            f"column {name!r} has {column.null_count} gaps: fill them in, and give a mask beside it"
        )
    if hasattr(column, "to_numpy_ndarray"):  # tensors of one shape
        tensors: np.ndarray = column.to_numpy_ndarray()
        return tensors
    shape: list[int] = [rows]
    while hasattr(column.type, "value_type") and hasattr(column, "flatten"):
        size = len(column.flatten()) // max(1, len(column))
        if not hasattr(column.type, "list_size"):
            lengths = column.value_lengths().to_numpy(zero_copy_only=False)
            if len(lengths) and (lengths != lengths[0]).any():
                seen = f"{lengths.min()} to {lengths.max()}"
                raise ValueError(f"column {name!r} has lists of {seen} numbers: give one length")
        column = column.flatten()
        shape.append(size)
    values: np.ndarray = column.to_numpy(zero_copy_only=False).reshape(shape)
    return values


def together(parts: Sequence[Any]) -> Any:
    """Consecutive rows as one; each part is an array, a tuple or a dictionary of them."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Mapping):
        return {name: together([part[name] for part in parts]) for name in parts[0]}
    if isinstance(parts[0], tuple):
        return tuple(together(column) for column in zip(*parts, strict=True))
    return np.concatenate([np.asarray(part) for part in parts])


def _is_array_of_chunks(value: Any) -> bool:
    known = all(hasattr(value, name) for name in ("shape", "dtype", "chunks"))
    return known and len(value.shape) > 0


def _is_arrow(value: Any) -> bool:
    files = hasattr(value, "read_row_group") or hasattr(value, "get_fragments")
    return files or _is_arrow_table(value)


def _is_arrow_table(value: Any) -> bool:
    return all(hasattr(value, name) for name in ("take", "combine_chunks", "num_rows"))


def _store(value: Any) -> Any:
    """A value as a store, by what it can do."""
    if isinstance(value, (tuple, list)):
        return Beside(tuple(_store(part) for part in value))
    if isinstance(value, Mapping):
        return Beside({name: _store(part) for name, part in value.items()})
    if hasattr(value, "read_row_group"):  # a ParquetFile
        groups, data = range(value.num_row_groups), value.metadata
        read = [lambda i=i: value.read_row_group(i) for i in groups]
        return Groups(read, [data.row_group(i).num_rows for i in groups])
    if hasattr(value, "get_fragments"):  # a pyarrow.dataset.Dataset
        pieces = [piece for part in value.get_fragments() for piece in part.split_by_row_group()]
        sizes = [sum(group.num_rows for group in piece.row_groups) for piece in pieces]
        return Groups([piece.to_table for piece in pieces], sizes)
    if _is_arrow_table(value):
        return Columns(value)
    if is_hugging_face(value):
        return value if value.format["type"] else value.with_format("numpy")
    if isinstance(value, (np.ndarray, Tensor)):
        return Mapped(value) if stays(value) else value
    if _is_array_of_chunks(value):
        return ArrayOfChunks(value)
    if hasattr(value, "to_numpy"):  # a column of a frame
        return value.to_numpy()
    if not hasattr(value, "__getitem__") or not hasattr(value, "__len__"):
        raise TypeError(
            f"{type(value).__name__} is no store: it needs a length and rows[index] for an array "
            "of row numbers, or rows[start:stop] and chunk_offsets"
        )
    return value
