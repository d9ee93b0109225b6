"""Batches from whatever :func:`ppvae.fit` takes as data."""

from __future__ import annotations

import functools
import queue
import threading
import zlib
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, default_collate

from ppvae.check.pair import Checks, PairError, check_tensors, names
from ppvae.data.split import check_unit_interval
from ppvae.train.checkpoint import CheckpointError, rng_state, set_rng_state
from ppvae.train.processes import Processes
from ppvae.train.svi import SVI

Batch = tuple[Tensor, ...]
AHEAD = 3  # batches read from a file before they are asked for


class Source:
    """One part of the data: its batches by epoch, its checks, what a resumed run needs to know.

    Tensors and splits are kept on the device. A split with ``rows`` stays where it is (on the
    disk), and a thread reads ahead. A ``DataLoader`` reads as it was told to.

    Args:
        label: "data" or "valid", for messages.
        data: what ``fit`` takes.
        batch_size: rows of a batch over all processes; a ``DataLoader`` has its own.
        device: where batches go; None leaves them where they are.
        processes: that share each batch.
        saved: whether checkpoints are written.
    """

    def __init__(
        self,
        label: str,
        data: Any,
        batch_size: int,
        device: torch.device | None,
        processes: Processes,
        saved: bool = False,
    ) -> None:
        self.label, self.batch_size, self.device = label, batch_size, device
        self.processes, self.saved = processes, saved
        if isinstance(data, Tensor):
            data = (data,)
        self.loads = isinstance(data, DataLoader)
        tensors = isinstance(data, (tuple, list)) and all(isinstance(t, Tensor) for t in data)
        if not self.loads and not hasattr(data, "batch") and not (tensors and data):
            raise TypeError(
                f"{label} must be a data.Dataset or one of its splits, a tensor, a tuple of "
                f"tensors or a DataLoader, got {type(data).__name__}; wrap arrays with "
                "data.from_arrays(x, y)"
            )
        if hasattr(data, "batch") and device is not None:
            data = data.to(device)
        self.reads = getattr(data, "rows", None) is not None
        self.data: Any = self._place(data) if tensors else data
        self.check_batch: Callable[[Batch], None] | None = None
        # Of a DataLoader: the random streams at the start of the epoch and before the last batch,
        # and that batch, to know it again.
        self.began: dict[str, Any] | None = None
        self.before: dict[str, Any] | None = None
        self.last: Batch | None = None
        self.known: int | None = None

    # -- batches ---------------------------------------------------------------------------------
    def epoch(
        self, seed: int | None, epoch: int, skip: int = 0, training: bool = False
    ) -> Generator[tuple[Batch, int], None, None]:
        """This process's part of each batch, and how many rows count.

        None count where other processes have rows left and this one has not: it goes along on rows
        that it has had.

        Args:
            seed: shuffle by (seed, epoch); None keeps the order.
            epoch: 1, 2, ..., or 0 for evaluation.
            skip: batches that were had before a resume.
            training: whether this is for steps, so that processes must take equally many steps.
        """
        if self.loads:
            for batch in self._loaded(epoch, skip):
                yield batch, len(batch[0])
            return
        whole = None if self.reads else self.whole(epoch)
        rows = len(self.data) if whole is None else len(whole[0])
        if seed is None:
            order = torch.arange(rows)
        else:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(rows, generator=generator)
        if whole is not None:
            order = order.to(whole[0].device)
        counts, parts = [], []
        for index in order.split(self.batch_size)[skip:]:
            part = self.processes.share(index)
            counts.append(len(part))
            parts.append(part if len(part) else order[:2])
        batches = self._read(parts, epoch) if whole is None else _gather(whole, parts)
        with closing(batches):
            for batch, count in zip(batches, counts, strict=True):
                if count or training:
                    yield batch, count

    def _read(self, parts: list[Tensor], epoch: int) -> Generator[Batch, None, None]:
        """Batches of a split that stays where it is: a thread reads, the device does the rest."""
        pin = self.device is not None and self.device.type == "cuda"
        unseen = epoch == 0 or self.check_batch is not None
        ready: queue.Queue[Any] = queue.Queue(AHEAD)
        began, stop = threading.Event(), threading.Event()

        def put(item: Any) -> None:
            while not stop.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def present(rows: Any, part: Tensor) -> Batch:
            values, y = (None if t is None else self._place([t])[0] for t in rows)
            # a row comes once in an epoch, so the first one tells its batches apart
            batch: Batch = self.data.present(values, y, epoch, int(part[0]))
            return batch

        def read() -> None:
            # With threads of its own it would take the cores from the step: they wait spinning.
            torch.get_num_threads()  # settles this thread, which would take the number anew later
            torch.set_num_threads(1)
            began.set()
            try:
                for part in parts:
                    rows = self.data.read(part)
                    if unseen and self.data.binarize is not None:
                        check_unit_interval(rows[0], f"{self.label} (binarize='dynamic')")
                    if pin:  # the rest is for the device
                        put([None if t is None else t.pin_memory() for t in rows])
                    else:
                        put(present(rows, part))
                    if stop.is_set():
                        return
            except BaseException as error:
                put(error)

        threads = torch.get_num_threads()
        reader = threading.Thread(target=read, name="ppvae reader", daemon=True)
        try:
            reader.start()
            began.wait()
            torch.set_num_threads(threads)  # of this thread already; now of later ones, too
            for part in parts:
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                batch = present(item, part) if pin else item
                if self.check_batch is not None:
                    self.check_batch(batch)
                yield batch
            self.check_batch = None  # all have been seen
        finally:
            stop.set()
            reader.join()

    def _loaded(self, epoch: int, skip: int) -> Iterator[Batch]:
        for sampler in (self.data.sampler, self.data.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)
        if skip:
            assert self.began is not None
            now = rng_state()
            self._set_random(self.began)
        else:
            self.began = {"streams": rng_state(), "generators": self._generators()}
        batches = iter(self.data)
        for number in range(skip):  # their order is right; what transforms draw is not, but
            if number + 1 == skip and self.before is not None:
                set_rng_state(self.before)  # here it is
            batch = next(batches, None)
            if number + 1 == skip and (batch is None or self._known(batch) != self.known):
                raise CheckpointError(
                    f"{self.label}: the DataLoader does not yield the batches again that it had "
                    f"yielded in epoch {epoch}, so this run cannot go on within the epoch. Let its "
                    "order and its transforms follow torch's random stream or its own generator="
                    "..., or resume from a checkpoint at the end of an epoch (every_steps=None)"
                )
        if skip:
            set_rng_state(now)
        # Without workers, transforms draw from the streams that the particles come from.
        draws = self.saved and self.data.num_workers == 0
        while True:
            self.before = rng_state() if draws else None
            batch = next(batches, None)
            if batch is None:
                break
            batch = (batch,) if isinstance(batch, Tensor) else batch
            if not isinstance(batch, (tuple, list)) or not all(map(torch.is_tensor, batch)):
                raise TypeError(
                    f"{self.label}: the DataLoader must yield a tensor or a tuple of tensors, "
                    f"as model and guide are called, got {batch!r:.200}; give it a collate_fn"
                )
            self.last = tuple(batch)
            batch = self._place(batch)
            if self.check_batch is not None:
                self.check_batch(batch)
            yield batch
        self.check_batch = None  # all have been seen

    def whole(self, epoch: int) -> Batch:
        """All rows as tensors on the device (of a split or tensors that are kept there)."""
        whole: Batch = self.data.batch(epoch) if hasattr(self.data, "batch") else self.data
        return whole

    # -- checks ----------------------------------------------------------------------------------
    def batches_of_one(self) -> tuple[int, int] | None:
        """Rows of an epoch and of a batch, if the last batch is known to have only one row."""
        if not self.loads:
            rows = len(self.data if hasattr(self.data, "batch") else self.data[0])
            size = self.batch_size
        else:
            size = self.data.batch_size
            if not self.loads_rows() or (self.data.drop_last and size > 1):
                return None
            rows = len(self.data.sampler)
        return (rows, size) if size == 1 or rows % size == 1 else None

    def loads_rows(self) -> bool:
        """Whether a DataLoader is known to draw single rows, so that its sampler counts them."""
        return (
            self.data.batch_size is not None  # else the batches are made elsewhere
            and self.data.collate_fn is default_collate
            and hasattr(self.data.sampler, "__len__")
        )

    def first(self) -> Batch:
        """One batch to check the pair on."""
        rows = max(self.batch_size, 2)  # one row could not show what differs by row
        if self.reads:
            with closing(self._read([torch.arange(min(rows, len(self.data)))], 0)) as batches:
                return next(batches)
        if not self.loads:
            return tuple(tensor[:rows] for tensor in self.whole(0))
        with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws
            generators = self._generators()
            batch = next(self._loaded(0, 0), None)
            self._set_generators(generators)
        if batch is None:
            raise ValueError(f"{self.label} is empty: the DataLoader yields no batch")
        return batch

    def check(self, svi: SVI, checks: Checks) -> None:
        """All rows: finite, of one length, in the likelihood's support.

        Those of a DataLoader or a file are checked as they come, until all have been seen.
        """
        if self.loads or self.reads:
            self.check_batch = functools.partial(self._check, svi, checks)
        else:
            self._check(svi, checks, self.whole(0))

    def _check(self, svi: SVI, checks: Checks, tensors: Batch) -> None:
        check_tensors(svi.model, tensors)
        for position, check in checks:
            try:
                check(tensors[position])
            except ValueError as error:
                label = names(svi.model, tensors)[position]
                raise PairError(f"argument {label!r} in {self.label}: {error}") from error

    def check_processes(self) -> None:
        """A DataLoader must deal its rows to the processes, equally many batches to each."""
        if not self.loads or self.processes.size == 1:
            return
        samplers = (self.data.sampler, getattr(self.data.batch_sampler, "sampler", None))
        if not any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            raise ValueError(
                f"{self.label}: {self.processes.size} processes would each see every row of this "
                "DataLoader; give it sampler=torch.utils.data.DistributedSampler(dataset)"
            )
        lengths = self.processes.gather(len(self.data))
        if len(set(lengths)) > 1:
            raise ValueError(
                f"{self.label}: the DataLoaders of the processes have {lengths} batches, and the "
                "processes must take equally many steps"
            )

    # -- for checkpoints -------------------------------------------------------------------------
    def facts(self) -> str:
        """A cheap fingerprint: sizes, types, and a checksum of up to 64 rows."""
        if self.loads:
            rows = len(self.data.dataset) if hasattr(self.data.dataset, "__len__") else "unknown"
            return f"DataLoader, {rows} rows in batches of {self.data.batch_size}"
        described, checksum = [], 0
        kept = [self.data.values, self.data.y] if hasattr(self.data, "batch") else self.data
        for tensor in kept:
            if tensor is not None:
                described.append(
                    f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                )
                index = torch.linspace(0, len(tensor) - 1, min(64, len(tensor))).long()
                checksum = _checksum([tensor[index.to(tensor.device)]], checksum)
        if hasattr(self.data, "batch"):
            described.append(f"binarize={self.data.binarize!r}, seed={self.data.seed}")
        return f"{', '.join(described)}, checksum {checksum:08x}"

    def state_dict(self, batch: int) -> dict[str, Any]:
        """Where a DataLoader is, ``batch`` batches into the epoch; nothing for other data."""
        if not self.loads:
            return {}
        return {
            "generators": self._generators(),
            "began": self.began if batch else None,
            "before": self.before if batch else None,
            "known": self._known(self.last) if batch else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if self.loads and state:
            self._set_generators(state["generators"])
            self.began, self.before, self.known = state["began"], state["before"], state["known"]

    def _owners(self) -> list[torch.Generator]:
        """The random streams that a DataLoader has of its own."""
        batches = self.data.batch_sampler
        holders = [self.data, self.data.sampler, batches, getattr(batches, "sampler", None)]
        found = [getattr(holder, "generator", None) for holder in holders]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _generators(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._owners()]

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._owners(), states, strict=True):
            generator.set_state(state)

    def _set_random(self, state: dict[str, Any]) -> None:
        set_rng_state(state["streams"])
        self._set_generators(state["generators"])

    @staticmethod
    def _known(batch: Any) -> int:
        return _checksum([batch] if isinstance(batch, Tensor) else batch)

    def _place(self, tensors: Sequence[Tensor]) -> Batch:
        if self.device is None:
            return tuple(tensors)
        cuda = self.device.type == "cuda"  # to the CPU, it would not wait for the values
        return tuple(tensor.to(self.device, non_blocking=cuda) for tensor in tensors)


def _gather(whole: Batch, parts: list[Tensor]) -> Generator[Batch, None, None]:
    for part in parts:
        yield tuple(tensor.index_select(0, part) for tensor in whole)


def _checksum(tensors: Sequence[Tensor], start: int = 0) -> int:
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start = zlib.crc32(flat.numpy().tobytes(), start)
    return start
