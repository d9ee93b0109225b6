"""Batches of a ``DataLoader``, and how a run goes on in the middle of its epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import (
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    default_collate,
)

from ppvae.intake import by_name
from ppvae.processes import checksum
from ppvae.train.batches import Batch, CountedBatches, Source, kind, placed, single_row
from ppvae.train.checkpoint import CheckpointError, plain, rng_state, set_rng_state


class Loaded(Source):
    """A ``DataLoader``, which cuts and shuffles its batches itself.

    To go on within an epoch, the loader is put where it was before the last batch, if it can say
    where that is (``state_dict``; without workers its data set's). Else, or if another batch comes
    from there, it is started again with the random streams of the start of the epoch, and the
    batches that were used are loaded again. Either way the last of them must be the same as then.

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
        self._begun: tuple[Iterator[Any], dict[str, Any], Any, Any] | None = None
        # The number of rows is known only if the loader itself puts single rows together.
        takes_rows = loader.batch_size is not None and loader.collate_fn is default_collate
        self._counts_rows = takes_rows and hasattr(loader.sampler, "__len__")
        is_counted = self._counts_rows and hasattr(loader.dataset, "__len__")
        self.num_rows = len(loader.dataset) if is_counted else None
        # Without workers, its transforms draw from the same random streams as the particles.
        self._keeps_streams = saved and loader.num_workers == 0
        # Who can be put in the middle of an epoch, where it was before the last batch, and where
        # the data set begins: that of Hugging Face starts each later epoch where it was last put.
        self._keeper = _keeper(loader) if saved else None
        self._position: Any = None
        self._is_moved = False
        own = self._keeper is not None and _is_stateful(loader.dataset)
        self._origin = loader.dataset.state_dict() if own else None
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
            position = self._where()
            loaded = next(batches, _END)
            self._set_generators(states)
        if loaded is _END:
            raise ValueError(f"{self.label} is empty: the DataLoader yields no batch")
        if streams:
            self._begun = chain([loaded], batches), began, before, position
        first = placed(self._as_batch(loaded), self.device)
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
        before = position = None
        if skip:
            batches = self._start_after(skip, epoch)
        elif begun is not None:
            batches, self._streams_at_start, before, position = begun
        else:
            self._rewind()
            generators = self._generator_states()
            self._streams_at_start = {"streams": rng_state(), "generators": generators}
            batches = iter(self._loader)
        self._taken = skip
        while True:
            self._streams_before_last = before or (rng_state() if self._keeps_streams else None)
            self._position = self._where() if position is None else position
            before = position = None
            loaded = next(batches, _END)
            if loaded is _END:
                break
            self._last_batch, self._taken = self._as_batch(loaded), self._taken + 1
            batch = placed(self._last_batch, self.device)
            self._check_rows(batch)
            yield batch
        if not self._taken:
            raise ValueError(
                f"{self.label}: the DataLoader has yielded all it had, and gives no batch a second "
                f"time. {_CURE_OF_STREAMS}"
            )
        self._to_check = None  # all have been seen

    def _start_after(self, skip: int, epoch: int) -> Iterator[Any]:
        """Go on after ``skip`` batches of the epoch; leave the random streams as now.

        Raises:
            CheckpointError: the last of these batches is not what it was.
        """
        assert self._streams_at_start is not None
        now, places = rng_state(), [None] if self._position is None else [self._position, None]
        generators = self._generator_states()
        for place in places:
            set_rng_state(self._streams_at_start["streams"])
            self._set_generators(self._streams_at_start["generators"])
            self._rewind()
            if place is not None:
                self._keeper.load_state_dict(place)  # type: ignore[union-attr]
                self._is_moved = True
            batches = iter(self._loader)
            for _ in range(skip - 1 if place is None else 0):  # only their order has to be right:
                next(batches, _END)  # transforms draw otherwise, without particles between them
            if self._streams_before_last is not None:
                set_rng_state(self._streams_before_last)
            batch = next(batches, _END)
            if batch is not _END and checksum(self._as_batch(batch)) == self._last_checksum:
                set_rng_state(now)
                self._set_generators(generators)
                return batches
        raise CheckpointError(
            f"{self.label}: the DataLoader does not yield the batches again that it yielded in "
            f"epoch {epoch}: let order and transforms follow torch's stream or its generator=, "
            "or resume from the end of an epoch (every_steps=None)"
        )

    def _where(self) -> Any:
        return None if self._keeper is None else self._keeper.state_dict()

    def _rewind(self) -> None:
        """Let the next pass through the data set begin at its beginning, if it would not."""
        if self._is_moved and self._origin is not None:
            self._loader.dataset.load_state_dict(self._origin)
        self._is_moved = False

    def _as_batch(self, loaded: Any) -> Batch:
        batch = list(_flat(loaded))
        if isinstance(loaded, Mapping):
            batch = by_name(loaded, self._names, f"{self.label}: the DataLoader yields")
        if not _are_tensors(batch):
            raise TypeError(
                f"{self.label}: the DataLoader must yield a tensor, a tuple of tensors or a "
                f"dictionary of them, as model and guide are called, got {kind(loaded)}; give it "
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
        return single_row(len(self._loader.sampler), size)

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
        known = checksum(self._last_batch) if self._last_batch else self._last_checksum
        return {  # the names are those of the file format
            "taken": taken,
            "started": self._started,
            "generators": self._generator_states(),
            "began": self._streams_at_start if inside else None,
            "before": self._streams_before_last if inside else None,
            "known": known if inside else None,
            "position": _if_plain(self._position) if inside else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._set_generators(state["generators"])
        self._streams_at_start, self._streams_before_last = state["began"], state["before"]
        self._last_checksum = state["known"]
        self._position = state.get("position")  # absent in files of older versions
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


_END: Any = object()  # of a loader; None is a batch that it should not yield
_CURE_OF_STREAMS = (
    "Let its __iter__ begin anew each time, or give steps_per_epoch= such that the rows last"
)


def _left_open(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; the iterator is not closed when nobody asks for more."""
    for batch in batches:  # noqa: UP028 - yield from would close it
        yield batch


def _is_stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _keeper(loader: Any) -> Any:
    """The loader, or its data set, if that can say where in an epoch it is, and be put there."""
    if loader.persistent_workers:  # their copies of the data set cannot be put back
        return None
    if _is_stateful(loader):
        return loader
    # with workers each has a copy of the data set, and is some batches ahead
    own = loader.num_workers == 0 and isinstance(loader.dataset, IterableDataset)
    return loader.dataset if own and _is_stateful(loader.dataset) else None


def _if_plain(state: Any) -> Any:
    """A state that a checkpoint can hold; else None, and the batches are loaded again."""
    try:
        return plain(state)
    except TypeError:
        return None


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


def _are_tensors(values: Sequence[Any]) -> bool:
    return len(values) > 0 and all(isinstance(value, Tensor) for value in values)
