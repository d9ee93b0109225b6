"""Rows that stay where they are: one protocol for files, chunked stores and columns of tables."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import cached_property, partial, reduce
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ppvae.data.columnar import adapted, is_chunked
from ppvae.data.split import bernoulli, check_at_least, check_choice

WINDOW = 16_384  # rows that are mixed, of a store with chunks
STRETCHES = 16  # of a window, if chunks are so small


class Stored:
    r"""Rows of a store, read as ``ppvae.fit`` needs them; nothing else of it is in memory.

    A store has ``len(rows)`` and either ``rows[index]`` for ascending row numbers, an int64 array,
    or ``rows[start:stop]`` and ``chunk_offsets``, where its chunks begin and the last one ends,
    ``(0, ..., N)``. Either gives an array, a tuple or a dictionary of arrays of those rows. Mapped
    files, arrays of zarr and h5py, tables, Parquet files and data sets of pyarrow, and data sets of
    Hugging Face are such stores, and ``fit`` takes them as they are.

    **Order.** Where rows are found one by one, an epoch is a uniform permutation of them, that of a
    tensor. Chunks would be read many times so. There, stretches of whole chunks, of 1/16 of
    ``window`` rows or more, are put in an order at random. A window of w = window / stretch of
    them moves along it, each stretch as long in it as the window is over it; its rows are dealt at
    random, in numbers that differ by one at most, to the w places of the window that see it (fewer
    at both ends), and the rows that belong to a place are shuffled and cut into batches. So each
    stretch is read once an epoch, w + 1 are in memory, and a batch mixes w of them. This is **no**
    uniform permutation: the rows of a stretch come within w places of each other, so a batch of
    rows that are stored by class has only the classes of w stretches. The order is a function of
    (seed, epoch).

    Args:
        *rows: a store, or several with the same columns, one after the other. A store may be a
            tuple of stores side by side, or a dictionary of them by the model's arguments.
        window: rows that are mixed; None: all, or 16384 where the store has chunks. With a number
            a mapped file is read in stretches too, which suits disks that are slow at random rows.
        transform: from the rows of a batch, as tensors, a tuple or a dictionary of them, to what
            the model is called with; it draws nothing, since a resumed run would draw otherwise.
        binarize: "dynamic": the first argument holds probabilities, of which each epoch draws
            anew, batch by batch; None.
        seed: of these draws.

    Raises:
        TypeError: what is no store.
        ValueError: lengths differ, ``chunk_offsets`` are not those of the rows, numbers below 1.

    Example:
        >>> grey = np.arange(12, dtype=np.uint8).reshape(6, 2)
        >>> x = Stored(grey, window=4, transform=lambda rows: rows / 255, binarize="dynamic")
        >>> len(x), len(x[:4]), x.read(torch.tensor([5, 0]))[0] * 255
        (6, 4, tensor([[10., 11.],
                [ 0.,  1.]]))
        >>> torch.cat([*x.order(seed=0, epoch=1)]).sort().values
        tensor([0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        *rows: Any,
        window: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        binarize: Literal["dynamic"] | None = None,
        seed: int = 0,
    ) -> None:
        check_choice("binarize", binarize, ("dynamic", None))
        check_at_least(0, seed=seed)
        if window is not None:
            check_at_least(1, window=window)
        self.rows = adapted(rows)
        self.binarize, self.seed, self.transform = binarize, seed, transform
        self.arranged: Callable[[Any], Sequence[Any]] = in_order  # intake knows the arguments
        self.dtype = torch.get_default_dtype()
        self._start, self._stop = 0, len(self.rows)
        self._held: dict[int, Any] = {}  # stretches, those last used at the end
        chunked = is_chunked(self.rows)
        self._window = window or (WINDOW if chunked else None)
        if self._window is not None:
            least = -(-self._window // STRETCHES)
            given = self.rows.chunk_offsets if chunked else np.arange(0, len(self), least)
            self._stretches = stretches(np.asarray(given, np.int64), len(self), least)

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, part: slice) -> Stored:
        """Consecutive rows, as a store of their own: to hold some out for ``valid``."""
        if not isinstance(part, slice) or part.step not in (None, 1):
            raise TypeError(f"Stored takes consecutive rows, as in stored[:1000], got [{part!r}]")
        start, stop, _ = part.indices(len(self))
        found = copy(self)
        found._held = {}
        found.__dict__.pop("_facts", None)
        found._start, found._stop = self._start + start, self._start + max(start, stop)
        if self._window is not None:
            inner = self._stretches[(self._stretches > start) & (self._stretches < stop)]
            found._stretches = np.array([start, *inner, max(start, stop)], np.int64) - start
        return found

    @property
    def is_mixed_in_windows(self) -> bool:
        """Whether an epoch has the order of windows, and no uniform one."""
        return self._window is not None

    @property
    def stretch(self) -> int:
        """How many rows are read at once, at most; 0: those that are asked for."""
        return int(np.diff(self._stretches).max(initial=0)) if self._window is not None else 0

    @property
    def in_window(self) -> int:
        """How many stretches a window has: at least two, if there are two."""
        assert self._window is not None
        count = len(self._stretches) - 1
        return min(count, max(2, -(-self._window * count // max(1, len(self)))))

    def order(self, seed: int, epoch: int) -> Iterator[Tensor]:
        """Row numbers of an epoch, those of one place of the window after the other.

        Args:
            seed: together with the epoch it makes the order.
            epoch: 1, 2, ...
        """
        seed %= 2**63  # a negative one is one, too
        bounds, wide = self._stretches, self.in_window
        count = len(bounds) - 1
        places = count - wide + 1
        stretch = _permutation(count, seed, epoch)
        dealt: list[list[Tensor]] = [[] for _ in range(places)]
        for place in range(places):
            for i in range(wide) if place == 0 else [place + wide - 1]:
                seen_from = range(max(0, i - wide + 1), min(i, places - 1) + 1)
                start, stop = map(int, bounds[stretch[i] : stretch[i] + 2])
                rows = start + _permutation(stop - start, seed, epoch, 1, i)
                parts = rows.tensor_split(len(seen_from))  # the first ones may have a row more
                order = _permutation(len(parts), seed, epoch, 3, i).tolist()
                for j, which in zip(seen_from, order, strict=True):
                    dealt[j].append(parts[which])
            here = torch.cat(dealt[place])
            dealt[place] = []
            yield here[_permutation(len(here), seed, epoch, 2, place)]

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """What the model is called with for some rows, as it is stored, on the host.

        Args:
            index: ``(B,)`` row numbers, in any order.
        """
        ascending, place = index.sort()
        if self._window is None:
            got = self._raw(self._start + ascending.numpy())
        else:
            numbers = ascending.numpy()
            which = np.searchsorted(self._stretches, numbers, side="right") - 1
            parts = []
            needed = np.unique(which).tolist()
            for i, rows in zip(needed, self._held_now(needed), strict=True):
                inside = torch.from_numpy(numbers[which == i] - self._stretches[i])
                parts.append(_each(rows, partial(_at, inside)))
            got = reduce(_joined, parts)
        back = torch.empty_like(place)
        back[place] = torch.arange(len(place))
        got = _each(got, partial(_at, back))
        if self.transform is not None:
            got = self.transform(got)
        return tuple(map(_checked, self.arranged(got)))

    def present(self, *batch: Tensor, epoch: int, key: int) -> tuple[Tensor, ...]:
        """Rows from :meth:`read`, wherever they have been moved: floats in the pair's precision.

        Whole numbers behind the first argument stay whole, as do masks.

        Args:
            batch: what :meth:`read` gave.
            epoch: 0, 1, 2, ...
            key: tells the batches of an epoch apart: a draw is a function of (seed, epoch, key).
        """
        first, *others = batch
        first = first.to(self.dtype)
        if self.binarize is not None:
            first = bernoulli(first, first.device, (self.seed, epoch, key))
        return (first, *(_kept_whole(other, self.dtype) for other in others))

    def facts(self) -> str:
        """Sizes, types, chunks, and a checksum of some rows: up to 64, or of four stretches."""
        return self._facts

    @cached_property
    def _facts(self) -> str:
        start, stop = self._start, self._stop
        looks: list[Any] = [start + np.unique(np.linspace(0, len(self) - 1, 64).astype(np.int64))]
        bounds = ""
        if self._window is not None:
            at = np.unique(np.linspace(0, len(self._stretches) - 2, 4).astype(int))
            looks = [slice(*(start + self._stretches[i : i + 2]).tolist()) for i in at]
            bounds = f", stretches {zlib.crc32(self._stretches.tobytes()):08x} by {self.in_window}"
        found, kinds = 0, ""
        for look in looks:
            tensors = _flat(self._raw(look))
            kinds = ", ".join(f"{(*t.shape[1:],)} {str(t.dtype)[6:]}" for t in tensors)
            for tensor in tensors:
                some = tensor[torch.linspace(0, len(tensor) - 1, min(64, len(tensor))).long()]
                found = zlib.crc32(some.contiguous().flatten().view(torch.uint8).numpy(), found)
        own = f"binarize={self.binarize!r}, seed={self.seed}"
        return f"{stop - start} stored rows of {kinds}{bounds}, {own}, checksum {found:08x}"

    def _held_now(self, needed: Sequence[int]) -> list[Any]:
        """Stretches as they are needed; a window of them and one are kept, those last used."""
        found = {i: self._held.pop(i, None) for i in needed}
        for i in sorted(needed, key=lambda i: found[i] is None):  # what is there first
            if found[i] is None:
                start, stop = (self._start + self._stretches[i : i + 2]).tolist()
                found[i] = self._raw(slice(start, stop))
            self._held[i] = found[i]
            while len(self._held) > max(self.in_window + 1, len(needed)):
                self._held.pop(next(iter(self._held)))
        return list(found.values())

    def _raw(self, which: Any) -> Any:
        """Rows of the store as tensors, a tuple or a dictionary of them."""
        return _each(self.rows[which], _tensor)

    def __repr__(self) -> str:
        how = f"window={self._window}" if self._window is not None else "row by row"
        return f"Stored({len(self)} rows, {how}, binarize={self.binarize!r})"


def stretches(offsets: np.ndarray, num_rows: int, least: int) -> np.ndarray:
    """Bounds of chunks, such that there are ``least`` rows between two of them, but at the end.

    Raises:
        ValueError: they do not ascend from 0 to the number of rows.

    Example:
        >>> stretches(np.array([0, 2, 4, 9, 10]), 10, least=3)
        array([ 0,  4,  9, 10])
    """
    if offsets.ndim != 1 or not len(offsets) or offsets[0] != 0 or (np.diff(offsets) < 0).any():
        raise ValueError(f"chunk_offsets must ascend from 0 to {num_rows}, got {offsets[:5]}...")
    if offsets[-1] > num_rows:
        raise ValueError(f"chunk_offsets end at {offsets[-1]}, and there are {num_rows} rows")
    found = [0]
    while found[-1] < num_rows:
        i = int(np.searchsorted(offsets, found[-1] + least))
        found.append(min(int(offsets[i]) if i < len(offsets) else num_rows, num_rows))
    return np.array(found, np.int64)


def in_order(got: Any) -> list[Any]:
    """What rows come as, flat."""
    return _flat(got)


def _permutation(size: int, *key: int) -> Tensor:
    mixed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    return torch.randperm(size, generator=torch.Generator().manual_seed(int(mixed)))


def _each(got: Any, function: Callable[[Any], Any]) -> Any:
    """The same function of each array in a tuple or a dictionary, or of the one there is."""
    if isinstance(got, Mapping):
        return {name: _each(value, function) for name, value in got.items()}
    if isinstance(got, (tuple, list)):
        return tuple(_each(value, function) for value in got)
    return function(got)


def _at(index: Tensor, tensor: Tensor) -> Tensor:
    return tensor[index]


def _joined(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping):
        return {name: _joined(value, other[name]) for name, value in one.items()}
    if isinstance(one, tuple):
        return tuple(map(_joined, one, other))
    return torch.cat([one, other])


def _flat(got: Any) -> list[Any]:
    if isinstance(got, Mapping):
        got = tuple(got.values())
    if isinstance(got, (tuple, list)):
        return [part for value in got for part in _flat(value)]
    return [got]


def _tensor(array: Any) -> Tensor:
    """A copy in memory, in the byte order of this machine."""
    if isinstance(array, Tensor):
        return array.detach().cpu()
    array = np.array(array)
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"the rows hold {array.dtype}, such as {array.reshape(-1)[:1]}: store numbers, or "
            "lists of one length, and drop columns of words"
        )
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(array.dtype.name)
    return torch.from_numpy(array.astype(wider or array.dtype.newbyteorder("="), copy=False))


def _checked(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"transform must give tensors, and gives {type(value).__name__}")
    return value


def _kept_whole(value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype == torch.bool:
        return value
    return value.to(dtype if value.is_floating_point() else torch.int64)
