"""What every source of batches is, whatever its data are kept in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from ppvae.check.pair import Checks, check_values
from ppvae.processes import Processes

Batch = tuple[Tensor, ...]
CountedBatches = Generator[tuple[Batch, int], None, None]  # and how many rows of each count
Device = torch.device | None


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
        return shuffled(self.num_rows, seed, epoch)

    def _shares(self, order: Tensor, skip: int = 0) -> list[Tensor]:
        """This process's part of each batch of rows in this order; it may be empty."""
        return [self.processes.share(index) for index in order.split(self.batch_size)[skip:]]

    def keep_drawn(self) -> None:  # noqa: B027
        """Keep what is drawn for an epoch, for others that ask for the same one."""

    # -- rows and checks -------------------------------------------------------------------------
    def single_row(self) -> tuple[int, int] | None:
        """Rows of an epoch and of a batch, if the last batch is known to have only one row."""
        return None if self.num_rows is None else single_row(self.num_rows, self.batch_size)

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


def shuffled(rows: int, seed: int, epoch: int) -> Tensor:
    """The order of rows in an epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(rows, generator=generator)


def single_row(rows: int, size: int) -> tuple[int, int] | None:
    """Rows of an epoch and of a batch, if the last batch has only one row."""
    return (rows, size) if size == 1 or rows % size == 1 else None


def kind(value: Any) -> str:
    """What a value is, in a word or two for messages."""
    name = type(value).__name__
    if isinstance(value, dict):
        return f"{name} of {', '.join(map(repr, list(value)[:3]))}"
    if isinstance(value, (tuple, list)):
        kinds = dict.fromkeys(type(part).__name__ for part in value)
        return f"{name} of {', '.join(list(kinds)[:3]) or 'nothing'}"
    return name


def placed(tensors: Iterable[Tensor], device: Device) -> Batch:
    """The tensors where the batches go."""
    if device is None:
        return tuple(tensors)
    cuda = device.type == "cuda"  # a non-blocking copy to the CPU may not have its values yet
    return tuple(tensor.to(device, non_blocking=cuda) for tensor in tensors)
