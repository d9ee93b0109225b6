"""Where a batch is cut: from tensors that are kept, from a file, or by a ``DataLoader``.

:func:`source` chooses one class for each kind of data. Whoever has a :class:`Source` asks it for
batches, checks and numbers of rows, and never which kind it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ppvae.data.split import check_unit_interval
from ppvae.processes import Processes, checksum
from ppvae.train.batches import Batch, CountedBatches, Device, Source, kind, placed
from ppvae.train.loaded import Loaded
from ppvae.train.reader import AHEAD, read_ahead

Stored = tuple[Sequence[Tensor], str]  # tensors, and in words what else makes up the data


def source(
    label: str,
    data: Any,
    batch_size: int,
    device: Device,
    processes: Processes,
    saved: bool,
    names: Sequence[str] = (),
    steps: int | None = None,
) -> Source:
    """The source of batches for what :func:`ppvae.intake.for_training` makes of the data.

    Args:
        label: "data" or "valid", for messages.
        data: a split, a tensor, tensors or a ``DataLoader``.
        batch_size: rows of a batch over all processes; a ``DataLoader`` has its own.
        device: where batches go; None leaves them where they are.
        processes: that share each batch.
        saved: whether checkpoints are written.
        names: of the model's arguments, for batches that are dictionaries.
        steps: of an epoch, where a ``DataLoader`` has no end, or one that does not matter.

    Raises:
        ValueError: ``steps`` for data that are no ``DataLoader``.
    """
    common = (label, batch_size, device, processes)
    if isinstance(data, DataLoader):
        return Loaded(data, saved, names, steps, *common)
    if steps is not None:
        raise ValueError(
            f"steps_per_epoch={steps} is for a DataLoader: an epoch of {kind(data)} has each row "
            "once"
        )
    if getattr(data, "rows", None) is not None:
        return Streamed(data, *common)
    if hasattr(data, "batch"):
        split = data if device is None else data.to(device)
        return Kept(split.batch, _stored(split), *common)
    whole = placed((data,) if isinstance(data, Tensor) else data, device)
    return Kept(lambda epoch: whole, (whole, ""), *common)


class Kept(Source):
    """Tensors, or a split, that are in memory, on the device of the pair.

    Args:
        draw: from the epoch to all rows as the model sees them; 0 for evaluation.
        stored: the tensors as they are stored, and a text of what else makes up the data.
        *args: of :class:`Source`.
    """

    num_rows: int
    only_cuts = True

    def __init__(self, draw: Callable[[int], Batch], stored: Stored, *args: Any) -> None:
        super().__init__(*args)
        self._draw, self._stored, self.num_rows = draw, stored, len(stored[0][0])

    def epoch(self, seed: int, epoch: int, skip: int = 0) -> CountedBatches:
        whole = self._draw(epoch)
        order = self._order(seed, epoch).to(whole[0].device)
        for share in self._shares(order, skip):
            yield _rows(whole, share if len(share) else order[:2]), len(share)

    def evaluation(self) -> Iterator[Batch]:
        whole = self.whole()
        order = torch.arange(len(whole[0]), device=whole[0].device)
        return (_rows(whole, share) for share in self._shares(order) if len(share))

    def first(self) -> Batch:
        rows = max(self.batch_size, 2)  # a single row does not show what differs between rows
        return tuple(tensor[:rows] for tensor in self.whole())

    def whole(self) -> Batch:
        return self._draw(0)

    def keep_drawn(self) -> None:
        self._draw = functools.lru_cache(maxsize=1)(self._draw)

    def facts(self) -> str:
        return _fingerprint(*self._stored)


class Streamed(Source):
    """A split, or a store, whose rows stay where they are: a thread reads them ahead.

    Args:
        split: a ``data.Split`` with ``rows``, or a ``data.Stored``.
        *args: of :class:`Source`.
    """

    num_rows: int

    def __init__(self, split: Any, *args: Any) -> None:
        super().__init__(*args)
        self._split, self.num_rows = split, len(split)
        # so many batches that the next stretch is read while the last one is used
        self._ahead = max(AHEAD, getattr(split, "stretch", 0) // self.batch_size)

    def epoch(self, seed: int, epoch: int, skip: int = 0) -> CountedBatches:
        order: Iterable[Tensor] = [self._order(seed, epoch)]
        if getattr(self._split, "is_mixed_in_windows", False) and not self.is_one_batch:
            order = self._split.order(seed, epoch)
        with closing(self._read(self._parts(order, skip), epoch)) as batches:
            yield from batches

    def evaluation(self) -> Iterator[Batch]:
        starts = range(0, self.num_rows, self.batch_size)
        order = (torch.arange(i, min(i + self.batch_size, self.num_rows)) for i in starts)
        parts = ((part, rows) for part, rows in self._parts(order) if rows)
        return (batch for batch, _ in self._read(parts, 0))

    def first(self) -> Batch:
        rows = min(max(self.batch_size, 2), self.num_rows)
        with closing(self._read([(torch.arange(rows), rows)], 0)) as batches:
            return next(batches)[0]

    def _parts(self, order: Iterable[Tensor], skip: int = 0) -> Iterator[tuple[Tensor, int]]:
        """This process's rows of each batch, and how many count: 0 if it has none of its own."""
        others: Tensor | None = None
        for i, index in enumerate(_cut(order, self.batch_size)):
            others = index[:2] if others is None else others
            if i >= skip:
                share = self.processes.share(index)
                yield share if len(share) else others, len(share)

    def _read(self, parts: Iterable[tuple[Tensor, int]], epoch: int) -> CountedBatches:
        """The rows of each part. The thread reads; on CUDA it leaves the rest to the device."""
        pins = self.device is not None and self.device.type == "cuda"
        unseen = epoch == 0 or self._to_check is not None

        def read(counted: tuple[Tensor, int]) -> tuple[Tensor, Any, int]:
            part, count = counted
            rows = self._split.read(part)
            if unseen and self._split.binarize is not None:
                check_unit_interval(rows[0], f"{self.label} (binarize='dynamic')")
            if pins:
                return part, [None if t is None else t.pin_memory() for t in rows], count
            return part, present(rows, part), count

        def present(rows: Any, part: Tensor) -> Batch:
            moved = (None if t is None else placed([t], self.device)[0] for t in rows)
            # an epoch has each row once, so the first row tells its batches apart
            return self._split.present(*moved, epoch=epoch, key=int(part[0]))

        with closing(read_ahead(read, parts, self._ahead)) as ready:
            for part, rows, count in ready:
                batch = present(rows, part) if pins else rows
                self._check_rows(batch)
                yield batch, count
        self._to_check = None  # all have been seen

    def facts(self) -> str:
        if hasattr(self._split, "facts"):
            return self._split.facts()
        return _fingerprint(*_stored(self._split))


def _cut(order: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Batches of row numbers that come in pieces."""
    rest = torch.empty(0, dtype=torch.long)
    for rows in order:
        rest = torch.cat([rest, rows]) if len(rest) else rows
        for batch in rest.split(size):
            if len(batch) == size:
                yield batch
        rest = rest[len(rest) // size * size :]
    if len(rest):
        yield rest


def _rows(whole: Batch, index: Tensor) -> Batch:
    return tuple(tensor.index_select(0, index) for tensor in whole)


def _stored(split: Any) -> Stored:
    """A split's tensors, and in words what else makes it up."""
    held = split.columns if hasattr(split, "columns") else (split.values, split.y)
    tensors = [tensor for tensor in (*held, getattr(split, "observed", None)) if tensor is not None]
    return tensors, f", binarize={split.binarize!r}, seed={split.seed}"


def _fingerprint(tensors: Sequence[Tensor], other: str) -> str:
    """Sizes, types, the other text, and a checksum of up to 64 rows."""
    shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors]
    found = 0
    for tensor in tensors:
        index = torch.linspace(0, len(tensor) - 1, min(64, len(tensor))).long()
        found = checksum([tensor[index.to(tensor.device)]], found)
    return f"{', '.join(shapes)}{other}, checksum {found:08x}"
