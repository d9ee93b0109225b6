"""The processes that work on one pair: this one, or those that Lightning Fabric started."""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

_GRACE = 10.0  # seconds for the others to say that they are there, once one does not answer


class LostProcess(RuntimeError):
    """Another process has raised, was killed or is frozen; the message names its rank."""


class Processes:
    """What ``fit`` and the evaluators ask of them; with one process each answer is at hand.

    Args:
        fabric: a launched ``lightning_fabric.Fabric``, or None for this process alone.
        alone: this process alone, though there are others.

    Raises:
        ValueError: a strategy or precision that ``fit`` does not do, a Fabric that was not
            launched, or several processes without a Fabric.
    """

    def __init__(self, fabric: Any = None, alone: bool = False) -> None:
        running = not alone and distributed.is_available() and distributed.is_initialized()
        size = distributed.get_world_size() if running else 1
        _check_fabric(fabric, size)
        self.fabric, self.size = fabric, size
        self.rank = distributed.get_rank() if size > 1 else 0
        self.precision = "32-true" if fabric is None else str(fabric.strategy.precision.precision)
        # Whether this process has rows in the current step; if not, its gradient is taken as zero.
        self.contributes = True
        self._group: Any = None  # of the run that goes on
        self._words: Any = None  # what each rank says of its end, in the store of the group

    # -- together, or not at all -----------------------------------------------------------------
    @contextmanager
    def connected(self) -> Iterator[None]:
        """Inside, what ends one process ends all, and each error names the rank.

        The connections are those of this run alone. A process that raises leaves word of why and
        closes them, which the others see at once; that one is frozen they see when the time-out of
        the process group has passed. Nothing is added to a step.

        Raises:
            LostProcess: another process ended the run, or does not answer.
        """
        if self.size == 1:
            yield
            return
        waits = getattr(self.fabric.strategy, "_timeout", None)
        try:
            self._group = distributed.new_group(timeout=waits)
        except RuntimeError as error:
            raise LostProcess(f"not all {self.size} ranks have called it: {error}") from None
        store = distributed.distributed_c10d._get_default_store()
        where = f"ppvae/{self._group.group_name}"
        self._words = distributed.PrefixStore(where, store)  # type: ignore[attr-defined]
        try:
            yield
        except BaseException as error:
            if not isinstance(error, LostProcess):
                self._say(f"{type(error).__name__}: {error}")
            raise
        finally:
            distributed.destroy_process_group(self._group)
            self._group = self._words = None

    def _say(self, why: str) -> None:
        """Leave word of the end of this rank; if all have come to theirs, each keeps its error."""

        def say(heard: dict[int, str]) -> None:
            self._words.set(str(self.rank), f"raised {why}"[:2000])
            self._listen(heard, until=lambda: len(heard) == self.size - 1, seconds=1.0)

        self._ask_store(say, seconds=2.0)

    def _lost(self, error: RuntimeError) -> LostProcess:
        """What to raise where the others cannot be reached any more."""

        def ask(heard: dict[int, str]) -> None:
            self._words.set(str(self.rank), "waits")
            self._listen(
                heard,
                lambda: len(heard) == self.size - 1 or any(w != "waits" for w in heard.values()),
                _GRACE,
            )

        heard = self._ask_store(ask, _GRACE + 5)
        if heard is None:
            who = "the rank that keeps the store (0, or torchrun) does"
        else:
            for rank, word in sorted(heard.items()):
                if word != "waits":
                    return LostProcess(f"rank {rank} has ended the run: {word[len('raised ') :]}")
            silent = [rank for rank in range(self.size) if rank not in heard and rank != self.rank]
            who = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} "
            who += "do" if len(silent) > 1 else "does"
            if not silent:
                return LostProcess(f"the connections to the other ranks are lost: {error}")
        return LostProcess(
            f"{who} not answer: killed, frozen, or not to be reached. Each step waits as long as "
            f"DDPStrategy(timeout=...) says; checkpoints stay ({str(error).splitlines()[0][-120:]})"
        )

    def _listen(self, heard: dict[int, str], until: Callable[[], bool], seconds: float) -> None:
        """Put the words of other ranks into ``heard``."""
        end = time.monotonic() + seconds
        while True:
            for rank in range(self.size):
                if rank != self.rank and rank not in heard and self._words.check([str(rank)]):
                    heard[rank] = self._words.get(str(rank)).decode()
            if until() or time.monotonic() > end:
                return
            time.sleep(0.02)

    @staticmethod
    def _ask_store(ask: Callable[[dict[int, str]], None], seconds: float) -> dict[int, str] | None:
        """What was heard; None if the store does not answer: it may be that of a frozen rank."""
        heard: dict[int, str] = {}
        answered = threading.Event()

        def call() -> None:
            ask(heard)
            answered.set()

        threading.Thread(target=call, daemon=True).start()
        return heard if answered.wait(seconds) else None

    def _together(self, collective: Callable[..., Any], *args: Any) -> None:
        """Call a function of ``torch.distributed`` with the group of this run."""
        try:
            collective(*args, group=self._group)
        except RuntimeError as error:
            if self._words is None:  # outside of a run
                raise
            raise self._lost(error) from error

    def require_equal(self, facts: dict[str, Any]) -> None:
        """Raise ``ValueError``, in all processes alike, unless they were given the same.

        Args:
            facts: by the name of an argument, or of what it consists of.
        """
        each = self.gather(facts)
        differ = []
        for name in dict.fromkeys(name for facts in each for name in facts):
            seen: dict[str, list[str]] = {}  # the ranks that have a value
            for rank, own in enumerate(each):
                seen.setdefault(str(own.get(name, "absent")), []).append(str(rank))
            if len(seen) > 1:
                by_rank = "; ".join(
                    f"{value[:80]} on rank{'s' * (len(ranks) > 1)} {', '.join(ranks[:8])}"
                    for value, ranks in seen.items()
                )
                differ.append(f"{name}: {by_rank}")
        if differ:
            more = f"\n  and {len(differ) - 5} more" if len(differ) > 5 else ""
            raise ValueError(
                "the processes would work on different things; give all ranks the same:\n  "
                + "\n  ".join(differ[:5])
                + more
            )

    # -- gradients -------------------------------------------------------------------------------
    @contextmanager
    def joined(self, svi: Any) -> Iterator[None]:
        """Train as one: gradients summed over the processes, losses in the Fabric's precision."""
        alone = svi.synchronize, svi.autocast
        if self.size > 1:
            svi.synchronize = self.sum_gradients
        if self.precision != "32-true":
            svi.autocast = self.fabric.autocast
        try:
            yield
        finally:
            svi.synchronize, svi.autocast = alone

    def sum_gradients(self, gradients: list[Tensor]) -> None:
        """Replace each gradient by its sum over the processes: one all-reduce, in place.

        The loss is a sum over datapoints, so this is the gradient of the joint batch.
        """
        if not self.contributes:
            torch._foreach_zero_(gradients)
        self._flat(gradients, self._add)

    def _add(self, flat: Tensor) -> None:
        self._together(distributed.all_reduce, flat)

    def _copy(self, flat: Tensor) -> None:
        self._together(distributed.broadcast, flat, 0)

    # -- module state ----------------------------------------------------------------------------
    def copy_from_first(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of rank 0."""
        if self.size > 1:
            with torch.no_grad():
                tensors = [*module.parameters(), *module.buffers()]
                self._flat(tensors, self._copy)

    def average_buffers(self, module: nn.Module) -> None:
        """Replace floating-point buffers by their mean over the processes, others by rank 0's.

        The statistics of batch norm and the multiplier of a constraint follow each process's own
        rows in between.
        """
        if self.size > 1:
            real = [b for b in module.buffers() if b.is_floating_point()]
            other = [b for b in module.buffers() if not b.is_floating_point()]
            self._flat(real, self._add)
            for buffer in real:
                buffer /= self.size
            self._flat(other, self._copy)

    @staticmethod
    def _flat(tensors: list[Tensor], collective: Callable[[Tensor], Any]) -> None:
        """One collective per dtype, over all tensors in one piece."""
        for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):
            group = [tensor.detach() for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in group])
            collective(flat)
            pieces = flat.split([tensor.numel() for tensor in group])
            shaped = [piece.view_as(t) for piece, t in zip(pieces, group, strict=True)]
            torch._foreach_copy_(group, shaped)

    # -- numbers ---------------------------------------------------------------------------------
    def sum(self, *numbers: float) -> list[float]:
        """Each number summed over the processes."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device=self.fabric.device)
        self._add(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.size == 1 else self.sum(float(flag))[0] > 0

    def together(self, call: Callable[[], Any]) -> None:
        """Call; what raises in one process stops all, so that none waits for it."""
        raised: Exception | None = None
        try:
            call()
        except Exception as error:
            raised = error
        said = self.gather(None if raised is None else f"{type(raised).__name__}: {raised}")
        for rank, word in enumerate(said):
            if word is not None:
                raise raised or LostProcess(f"rank {rank} has ended the run: {word}")

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size
        self._together(distributed.all_gather_object, gathered, value)
        return gathered

    def wait(self) -> None:
        """Until every process is here."""
        self.sum(0.0)

    # -- rows and draws --------------------------------------------------------------------------
    def share(self, index: Tensor) -> Tensor:
        """This process's part of the rows of a joint batch; it may be empty.

        Sizes differ by one at most. A batch of less than two rows for each process is dealt to
        fewer, in twos, since batch norm cannot train on one row.

        Example:
            >>> Processes().share(torch.arange(5))
            tensor([0, 1, 2, 3, 4])
        """
        parts = index.tensor_split(min(self.size, max(1, len(index) // 2)))
        return parts[self.rank] if self.rank < len(parts) else index[:0]

    def part(self, rows: int) -> slice:
        """This process's part of so many rows in their order; parts differ by one row at most.

        Example:
            >>> Processes().part(5)
            slice(0, 5, None)
        """
        first, last = (rank * rows // self.size for rank in (self.rank, self.rank + 1))
        return slice(first, last)

    def own_seed(self, seed: int) -> int:
        """The seed itself on rank 0, another on each other rank."""
        if self.rank == 0:
            return seed
        return int(np.random.SeedSequence([seed, self.rank]).generate_state(1, np.uint64)[0]) >> 1

    def draws(self, seed: int | None) -> int | None:
        """The seed of this process's draws; None if they are drawn from its own stream.

        Streams that were seeded alike would give the rows of two processes the same errors.
        """
        if seed is None and self.rank > 0:
            seed = int(torch.randint(2**62, ()))
        return None if seed is None else self.own_seed(seed)

    def own_draws(self) -> None:
        """Let torch's stream differ between processes that were seeded alike; rank 0 keeps its."""
        if self.rank > 0:
            with torch.random.fork_rng(devices=[]):
                drawn = int(torch.randint(2**62, ()))
            torch.manual_seed(self.own_seed(drawn))


def checksum(tensors: Iterable[Tensor], start: int = 0) -> int:
    """CRC-32 of the bytes of some tensors, on top of that of others."""
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        start = zlib.crc32(flat.numpy().tobytes(), start)
    return start


def _check_fabric(fabric: Any, size: int) -> None:
    """Raise ``ValueError`` unless ``fit`` can train with it, in so many processes."""
    if fabric is None:
        if size > 1:
            raise ValueError(
                f"torch.distributed runs {size} processes, and fit was given no Fabric: pass "
                'fabric=Fabric(devices=..., strategy="ddp") after fabric.launch()'
            )
        return
    if not hasattr(fabric, "strategy") or not hasattr(fabric, "world_size"):
        raise TypeError(
            f"fabric takes a lightning_fabric.Fabric that was launched, got {type(fabric).__name__}"
        )
    strategy, precision = type(fabric.strategy).__name__, fabric.strategy.precision.precision
    if strategy not in ("SingleDeviceStrategy", "DDPStrategy"):
        raise ValueError(f'fit sums gradients over processes: use strategy="ddp", got {strategy}')
    if precision not in ("32-true", "bf16-mixed"):
        raise ValueError(
            f'fit takes precision "32-true" and "bf16-mixed", got {precision!r}: for float64 call '
            "svi.objective.double() and give float64 data"
        )
    if fabric.world_size != size:
        raise ValueError(
            f"Fabric for {fabric.world_size} processes, and {size} run: call fabric.launch() first"
        )
