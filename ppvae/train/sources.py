"""Where a batch is cut: from tensors that are kept, from a file, or by a ``DataLoader``.

:func:`source` chooses one class for each kind of data. Whoever has a :class:`Source` asks it for
batches, checks and numbers of rows, and never which kind it is.
"""

from __future__ import annotations

import functools
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from ppvae.check.pair import Checks, check_values
from ppvae.data.split import check_unit_interval
from ppvae.intake import by_name
from ppvae.processes import Processes
from ppvae.train.checkpoint import CheckpointError, rng_state, set_rng_state
from ppvae.train.reader import read_ahead

Batch = tuple[Tensor, ...]
CountedBatches = Generator[tuple[Batch, int], None, None]  # and how many rows of each count
Device = torch.device | None
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
            f"steps_per_epoch={steps} is for a DataLoader: an epoch of {_kind(data)} has each row "
            "once"
        )
    if getattr(data, "rows", None) is not None:
        return Streamed(data, *common)
    if hasattr(data, "batch"):
        split = data if device is None else data.to(device)
        return Kept(split.batch, _stored(split), *common)
    placed = _placed((data,) if isinstance(data, Tensor) else data, device)
    return Kept(lambda epoch: placed, (placed, ""), *common)


class Source(ABC):
    """One part of the data: its batches, its checks, and what a resumed run needs to know of it.

    Args:
        label, batch_size, device, processes: as :func:`source` has them.

    Attributes:
        num_rows: rows of the data set; None: not known.
        how_to_drop: a row, for messages.
        only_cuts: whether cutting a batch runs no code of a user's.
    """

    num_rows: int | None
    only_cuts = False
    how_to_drop = "leave a row out"

    def __init__(self, label: str, batch_size: int, device: Device, processes: Processes) -> None:
        self.label, self.batch_size = label, batch_size
        self.device, self.processes = device, processes
        self._to_check: tuple[Any, Any, Checks] | None = None  # the pair, and its checks of rows

    # -- batches ---------------------------------------------------------------------------------
    @abstractmethod
    def epoch(self, seed: int, epoch: int, skip: int = 0) -> CountedBatches:
        """This process's part of each batch of an epoch, and how many of its rows count.

        Every process gets the same number of batches. If a batch is too small for all of them, a
        process without a part of it gets other rows in its place, and the number is 0.

        Args:
            seed: the order of the rows is a function of (seed, epoch).
            epoch: 1, 2, ...
            skip: how many batches to pass over: they were used before a resume.
        """

    @abstractmethod
    def evaluation(self) -> Iterator[Batch]:
        """This process's part of the rows, each once, in their order."""

    @abstractmethod
    def first(self) -> Batch:
        """One batch to check the pair on."""

    def whole(self) -> Batch | None:
        """All rows in one batch, if they are in memory."""
        return None

    @property
    def is_one_batch(self) -> bool:
        """Whether all rows come at once, and in their order."""
        return self.num_rows is not None and self.num_rows <= self.batch_size

    def _order(self, seed: int, epoch: int) -> Tensor:
        """The order of the rows: shuffled, unless all are one batch.

        Then it tells a pair nothing, unless its parameters or data belong to positions in a batch.
        """
        assert self.num_rows is not None
        if self.is_one_batch:
            return torch.arange(self.num_rows)
        return _shuffled(self.num_rows, seed, epoch)

    def _shares(self, order: Tensor, skip: int = 0) -> list[Tensor]:
        """This process's part of each batch of rows in this order; it may be empty."""
        return [self.processes.share(index) for index in order.split(self.batch_size)[skip:]]

    def keep_drawn(self) -> None:  # noqa: B027
        """Keep what is drawn for an epoch, for others that ask for the same one."""

    # -- rows and checks -------------------------------------------------------------------------
    def single_row(self) -> tuple[int, int] | None:
        """Rows of an epoch and of a batch, if the last batch is known to have only one row."""
        return None if self.num_rows is None else _single_row(self.num_rows, self.batch_size)

    def fewest_rows(self) -> int | None:
        """How many rows the smallest batch has, in the process that has fewest; None: not known."""
        if self.num_rows is None:
            return None
        last = self.num_rows % self.batch_size or min(self.num_rows, self.batch_size)
        size = self.processes.size
        return min(2, last) if size > 1 and last < 2 * size else last // size

    def check(self, model: Any, guide: Any, checks: Checks) -> None:
        """Check all rows: of one length, and numbers in the likelihood's support, unless masked.

        Rows in memory are checked now, others when they are read, until all have been seen.
        """
        self._to_check = model, guide, checks
        whole = self.whole()
        if whole is not None:
            self._check_rows(whole)
            self._to_check = None

    def _check_rows(self, batch: Batch) -> None:
        if self._to_check is not None:
            model, guide, checks = self._to_check
            trains = self.label == "data"
            check_values(model, guide, batch, checks, where=f" in {self.label}", trains=trains)

    def num_batches(self) -> int | None:
        """How many batches an epoch of a ``DataLoader`` has; of other data it follows."""
        return None

    def check_processes(self) -> None:  # noqa: B027
        """Raise if the processes would train on the same rows; here each gets its own."""

    def check_passes(self, epochs: int) -> None:  # noqa: B027
        """Raise if there are not so many passes in the data; here there are."""

    # -- for checkpoints -------------------------------------------------------------------------
    @abstractmethod
    def facts(self) -> str:
        """A cheap fingerprint, to tell other data from these."""

    def state_dict(self, batch: int) -> dict[str, Any]:
        """What is needed to go on after ``batch`` batches of an epoch, except that number."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Take over what :meth:`state_dict` returned."""


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
    """A split whose rows stay where they are, such as a file: a thread reads them ahead.

    Args:
        split: a ``data.Split`` with ``rows``.
        *args: of :class:`Source`.
    """

    num_rows: int

    def __init__(self, split: Any, *args: Any) -> None:
        super().__init__(*args)
        self._split, self.num_rows = split, len(split)

    def epoch(self, seed: int, epoch: int, skip: int = 0) -> CountedBatches:
        order = self._order(seed, epoch)
        shares = self._shares(order, skip)
        parts = [share if len(share) else order[:2] for share in shares]
        with closing(self._read(parts, epoch)) as batches:
            yield from zip(batches, map(len, shares), strict=True)

    def evaluation(self) -> Iterator[Batch]:
        shares = self._shares(torch.arange(self.num_rows))
        return self._read([share for share in shares if len(share)], 0)

    def first(self) -> Batch:
        rows = min(max(self.batch_size, 2), self.num_rows)
        with closing(self._read([torch.arange(rows)], 0)) as batches:
            return next(batches)

    def _read(self, parts: list[Tensor], epoch: int) -> Generator[Batch, None, None]:
        """The rows of each part. The thread reads; on CUDA it leaves the rest to the device."""
        pins = self.device is not None and self.device.type == "cuda"
        unseen = epoch == 0 or self._to_check is not None

        def read(part: Tensor) -> Any:
            rows = self._split.read(part)
            if unseen and self._split.binarize is not None:
                check_unit_interval(rows[0], f"{self.label} (binarize='dynamic')")
            if pins:
                return [None if tensor is None else tensor.pin_memory() for tensor in rows]
            return present(rows, part)

        def present(rows: Any, part: Tensor) -> Batch:
            moved = (None if t is None else _placed([t], self.device)[0] for t in rows)
            # an epoch has each row once, so the first row tells its batches apart
            return self._split.present(*moved, epoch=epoch, key=int(part[0]))

        with closing(read_ahead(read, parts)) as ahead:
            for part, rows in zip(parts, ahead, strict=True):
                batch = present(rows, part) if pins else rows
                self._check_rows(batch)
                yield batch
        self._to_check = None  # all have been seen

    def facts(self) -> str:
        return _fingerprint(*_stored(self._split))


class Loaded(Source):
    """A ``DataLoader``, which cuts and shuffles its batches itself.

    To go on within an epoch, it is started again with the random streams of the start of the epoch,
    and the batches that were used are loaded again; the last of them must be the same as then.

    Args:
        loader: a ``DataLoader``; it yields a tensor, tensors in tuples, or a dictionary of them.
        saved: whether checkpoints are written.
        names: of the model's arguments.
        steps: of an epoch; None: until the loader ends. With a number the next epoch goes on where
            the last one ended, and the loader starts anew when it ends.
        *args: of :class:`Source`; a loader has its own size of a batch.
    """

    how_to_drop = "leave a row out (drop_last=True)"

    def __init__(
        self, loader: Any, saved: bool, names: Sequence[str], steps: int | None, *args: Any
    ) -> None:
        super().__init__(*args)
        self._loader, self._names, self._steps = loader, names, steps
        self._running: Iterator[Batch] | None = None  # through epochs of so many steps
        self._taken = 0  # batches since the loader was started
        self._started = 0  # in which epoch that was: a sampler's order follows it
        # What the check has read of a stream, which may not be there a second time.
        self._first: Batch | None = None
        self._begun: tuple[Iterator[Any], dict[str, Any], Any] | None = None
        # The number of rows is known only if the loader itself puts single rows together.
        takes_rows = loader.batch_size is not None and loader.collate_fn is default_collate
        self._counts_rows = takes_rows and hasattr(loader.sampler, "__len__")
        is_counted = self._counts_rows and hasattr(loader.dataset, "__len__")
        self.num_rows = len(loader.dataset) if is_counted else None
        # Without workers, its transforms draw from the same random streams as the particles.
        self._keeps_streams = saved and loader.num_workers == 0
        self._streams_at_start: dict[str, Any] | None = None  # of the epoch, and own generators
        self._streams_before_last: dict[str, Any] | None = None  # before the last batch was loaded
        self._last_batch: Batch = ()
        self._last_checksum: int | None = None  # of the last batch, in a checkpoint

    @property
    def is_one_batch(self) -> bool:
        in_order = isinstance(self._loader.sampler, SequentialSampler)
        rows, size = self.num_rows, self._loader.batch_size
        return in_order and rows is not None and size is not None and rows <= size

    def epoch(self, seed: int, epoch: int, skip: int = 0) -> CountedBatches:
        batches = self._load(epoch, skip)
        if self._steps is not None:
            batches = islice(self._endless(epoch), self._steps - skip)
        for batch in batches:
            yield batch, len(batch[0])

    def _endless(self, epoch: int) -> Iterator[Batch]:
        """Batches of one start of the loader after the other, from where the last epoch ended."""
        while True:
            if self._running is None:
                self._running = self._load(epoch, self._taken)
            yield from _left_open(self._running)
            self._running, self._taken = None, 0

    def evaluation(self) -> Iterator[Batch]:
        return self._load(0)

    def first(self) -> Batch:
        """One batch; of a stream it is kept, and is the first of the first epoch too."""
        if self._first is not None:
            return self._first
        streams = isinstance(self._loader.dataset, IterableDataset)
        with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws
            states = self._generator_states()
            began = {"streams": rng_state(), "generators": states}
            batches = iter(self._loader)
            before = rng_state() if self._keeps_streams else None
            loaded = next(batches, _END)
            self._set_generators(states)
        if loaded is _END:
            raise ValueError(f"{self.label} is empty: the DataLoader yields no batch")
        if streams:
            self._begun = chain([loaded], batches), began, before
        first = _placed(self._as_batch(loaded), self.device)
        self._first = first if streams else None
        return first

    def _load(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        if not (
            skip and self._steps is not None
        ):  # else it goes on with what an epoch before began
            self._started = epoch
        for sampler in (self._loader.sampler, self._loader.batch_sampler):
            if hasattr(sampler, "set_epoch"):
                sampler.set_epoch(self._started)
        begun, self._begun = self._begun, None
        before = None
        if skip:
            batches = self._start_after(skip, epoch)
        elif begun is not None:
            batches, self._streams_at_start, before = begun
        else:
            generators = self._generator_states()
            self._streams_at_start = {"streams": rng_state(), "generators": generators}
            batches = iter(self._loader)
        self._taken = skip
        while True:
            self._streams_before_last = before or (rng_state() if self._keeps_streams else None)
            before = None
            loaded = next(batches, _END)
            if loaded is _END:
                break
            self._last_batch, self._taken = self._as_batch(loaded), self._taken + 1
            batch = _placed(self._last_batch, self.device)
            self._check_rows(batch)
            yield batch
        if not self._taken:
            raise ValueError(
                f"{self.label}: the DataLoader has yielded all it had, and gives no batch a second "
                f"time. {_CURE_OF_STREAMS}"
            )
        self._to_check = None  # all have been seen

    def _start_after(self, skip: int, epoch: int) -> Iterator[Any]:
        """Start the epoch again and pass over ``skip`` batches; leave the random streams as now.

        Raises:
            CheckpointError: the last of these batches is not what it was.
        """
        assert self._streams_at_start is not None
        now = rng_state()
        set_rng_state(self._streams_at_start["streams"])
        self._set_generators(self._streams_at_start["generators"])
        batches = iter(self._loader)
        for _ in range(skip - 1):  # only their order has to be right: what transforms draw differs,
            next(batches, _END)  # since no particles are drawn between them
        if self._streams_before_last is not None:
            set_rng_state(self._streams_before_last)
        batch = next(batches, _END)
        if batch is _END or _checksum(self._as_batch(batch)) != self._last_checksum:
            raise CheckpointError(
                f"{self.label}: the DataLoader does not yield the batches again that it yielded in "
                f"epoch {epoch}: let order and transforms follow torch's stream or its generator=, "
                "or resume from the end of an epoch (every_steps=None)"
            )
        set_rng_state(now)
        return batches

    def _as_batch(self, loaded: Any) -> Batch:
        batch = list(_flat(loaded))
        if isinstance(loaded, Mapping):
            batch = by_name(loaded, self._names, f"{self.label}: the DataLoader yields")
        if not _are_tensors(batch):
            raise TypeError(
                f"{self.label}: the DataLoader must yield a tensor, a tuple of tensors or a "
                f"dictionary of them, as model and guide are called, got {_kind(loaded)}; give it "
                "a collate_fn, such as lambda rows: torch.stack([row.x for row in rows])"
            )
        if batch[0].dim() == 0 or not len(batch[0]):
            raise ValueError(
                f"{self.label}: the DataLoader yields a batch without rows, of shape "
                f"{tuple(batch[0].shape)}: pass over it there"
            )
        return tuple(batch)

    def single_row(self) -> tuple[int, int] | None:
        size = self._loader.batch_size
        if not self._counts_rows or (self._loader.drop_last and size > 1):
            return None
        return _single_row(len(self._loader.sampler), size)

    def fewest_rows(self) -> int | None:
        size = self._loader.batch_size
        if not self._counts_rows:
            return None
        rows = len(self._loader.sampler)
        return min(size, rows) if self._loader.drop_last else rows % size or min(size, rows)

    def check_processes(self) -> None:
        """Raise unless rows are dealt to the processes, equally many batches to each."""
        if self.processes.size == 1:
            return
        samplers = (self._loader.sampler, getattr(self._loader.batch_sampler, "sampler", None))
        if not any(isinstance(sampler, DistributedSampler) for sampler in samplers):
            raise ValueError(
                f"{self.label}: {self.processes.size} processes would each see every row of this "
                "DataLoader; give it sampler=torch.utils.data.DistributedSampler(dataset)"
            )

    def num_batches(self) -> int | None:
        return len(self._loader) if self._counts_rows else None

    def check_passes(self, epochs: int) -> None:
        """Raise for a stream that is known to end before the last epoch."""
        dataset, several = self._loader.dataset, epochs > 1 and self._steps is None
        if several and isinstance(dataset, IterableDataset) and _is_read_once(dataset):
            raise ValueError(
                f"{self.label}: the DataLoader's dataset can be read once, and epochs={epochs} ask "
                f"for as many passes. {_CURE_OF_STREAMS}"
            )

    def facts(self) -> str:
        dataset = self._loader.dataset
        rows = len(dataset) if hasattr(dataset, "__len__") else "unknown"
        endless = "" if self._steps is None else f", {self._steps} steps an epoch"
        return f"DataLoader, {rows} rows in batches of {self._loader.batch_size}{endless}"

    def state_dict(self, batch: int) -> dict[str, Any]:
        taken = batch if self._steps is None else self._taken
        inside = taken > 0  # the epoch has begun
        # a run that was taken up again at the last step of an epoch has loaded nothing itself
        known = _checksum(self._last_batch) if self._last_batch else self._last_checksum
        return {  # the names are those of the file format
            "taken": taken,
            "started": self._started,
            "generators": self._generator_states(),
            "began": self._streams_at_start if inside else None,
            "before": self._streams_before_last if inside else None,
            "known": known if inside else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set_generators(state["generators"])
        self._streams_at_start, self._streams_before_last = state["began"], state["before"]
        self._last_checksum = state["known"]
        if self._steps is not None:
            self._taken = state["taken"]
            self._started = state.get("started", 0)  # absent in files of older versions
        if self._begun is not None and not _is_read_once(self._loader.dataset):
            self._begun = None  # it starts anew, with the random streams of the run

    def _generators(self) -> list[torch.Generator]:
        """The random streams that the loader has of its own."""
        batches = self._loader.batch_sampler
        owners = [self._loader, self._loader.sampler, batches, getattr(batches, "sampler", None)]
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())

    def _generator_states(self) -> list[Tensor]:
        return [generator.get_state() for generator in self._generators()]

    def _set_generators(self, states: list[Tensor]) -> None:
        for generator, state in zip(self._generators(), states, strict=True):
            generator.set_state(state)


def _shuffled(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of rows in an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator)


def _rows(whole: Batch, index: Tensor) -> Batch:
    return tuple(tensor.index_select(0, index) for tensor in whole)


def _single_row(rows: int, size: int) -> tuple[int, int] | None:
    return (rows, size) if size == 1 or rows % size == 1 else None


_END: Any = object()  # of a loader; None is a batch that it should not yield
_CURE_OF_STREAMS = (
    "Let its __iter__ begin anew each time, or give steps_per_epoch= such that the rows last"
)


def _left_open(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; the iterator is not closed when nobody asks for more."""
    for batch in batches:  # noqa: UP028 - yield from would close it
        yield batch


def _is_read_once(dataset: Any) -> bool:
    """Whether each ``iter`` of a dataset is the same iterator, as of a file or a generator."""
    return iter(dataset) is iter(dataset)


def _flat(value: Any) -> Iterator[Any]:
    """What is in tuples and lists, in their order."""
    if isinstance(value, (tuple, list)):
        for part in value:
            yield from _flat(part)
    else:
        yield value


def _listed(names: Iterable[Any]) -> str:
    return ", ".join(map(repr, names)) or "none by name"


def _kind(value: Any) -> str:
    """What a value is, in a word or two for messages."""
    name = type(value).__name__
    if isinstance(value, dict):
        return f"{name} of {', '.join(map(repr, list(value)[:3]))}"
    if isinstance(value, (tuple, list)):
        kinds = dict.fromkeys(type(part).__name__ for part in value)
        return f"{name} of {', '.join(list(kinds)[:3]) or 'nothing'}"
    return name


def _are_tensors(values: Sequence[Any]) -> bool:
    return len(values) > 0 and all(isinstance(value, Tensor) for value in values)


def _placed(tensors: Iterable[Tensor], device: Device) -> Batch:
    if device is None:
        return tuple(tensors)
    cuda = device.type == "cuda"  # a non-blocking copy to the CPU may not have its values yet
    return tuple(tensor.to(device, non_blocking=cuda) for tensor in tensors)


def _stored(split: Any) -> Stored:
    """A split's tensors, and in words what else makes it up."""
    held = split.columns if hasattr(split, "columns") else (split.values, split.y)
    tensors = [tensor for tensor in (*held, getattr(split, "observed", None)) if tensor is not None]
    return tensors, f", binarize={split.binarize!r}, seed={split.seed}"


def _fingerprint(tensors: Sequence[Tensor], other: str) -> str:
    """Sizes, types, the other text, and a checksum of up to 64 rows."""
    shapes = [f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in tensors]
    checksum = 0
    for tensor in tensors:
        index = torch.linspace(0, len(tensor) - 1, min(64, len(tensor))).long()
        checksum = _checksum([tensor[index.to(tensor.device)]], checksum)
    return f"{', '.join(shapes)}{other}, checksum {checksum:08x}"


def _checksum(tensors: Iterable[Tensor], start: int = 0) -> int:
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start = zlib.crc32(flat.numpy().tobytes(), start)
    return start
