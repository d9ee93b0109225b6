"""The processes that train one pair together: this one, or those that Lightning Fabric started."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed, nn

from ppvae.train.svi import SVI


class Processes:
    """What :func:`ppvae.fit` asks of them; with one process each answer is at hand.

    Args:
        fabric: a launched ``lightning_fabric.Fabric``, or None for this process alone.

    Raises:
        ValueError: a strategy or precision that ``fit`` does not do, a Fabric that was not
            launched, or several processes without a Fabric.
    """

    def __init__(self, fabric: Any = None) -> None:
        running = distributed.is_available() and distributed.is_initialized()
        size = distributed.get_world_size() if running else 1
        _check_fabric(fabric, size)
        self.fabric, self.size = fabric, size
        self.rank = distributed.get_rank() if size > 1 else 0
        self.precision = "32-true" if fabric is None else str(fabric.strategy.precision.precision)
        # Whether this process has rows in the current step; if not, its gradient is taken as zero.
        self.contributes = True

    # -- gradients -------------------------------------------------------------------------------
    @contextmanager
    def joined(self, svi: SVI) -> Iterator[None]:
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
        self._flat(gradients, distributed.all_reduce)

    # -- module state ----------------------------------------------------------------------------
    def copy_from_first(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of rank 0."""
        if self.size > 1:
            with torch.no_grad():
                tensors = [*module.parameters(), *module.buffers()]
                self._flat(tensors, lambda flat: distributed.broadcast(flat, 0))

    def average_buffers(self, module: nn.Module) -> None:
        """Replace floating-point buffers by their mean over the processes, others by rank 0's.

        The statistics of batch norm and the multiplier of a constraint follow each process's own
        rows in between.
        """
        if self.size > 1:
            real = [b for b in module.buffers() if b.is_floating_point()]
            other = [b for b in module.buffers() if not b.is_floating_point()]
            self._flat(real, distributed.all_reduce)
            for buffer in real:
                buffer /= self.size
            self._flat(other, lambda flat: distributed.broadcast(flat, 0))

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
        distributed.all_reduce(total)
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
        if self.any(raised is not None):
            raise raised or RuntimeError("another process has stopped; its error says why")

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, by rank."""
        if self.size == 1:
            return [value]
        gathered = [None] * self.size
        distributed.all_gather_object(gathered, value)
        return gathered

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            self.fabric.barrier()

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

    def own_seed(self, seed: int) -> int:
        """The seed itself on rank 0, another on each other rank."""
        if self.rank == 0:
            return seed
        return int(np.random.SeedSequence([seed, self.rank]).generate_state(1, np.uint64)[0]) >> 1

    def own_draws(self) -> None:
        """Let torch's stream differ between processes that were seeded alike; rank 0 keeps its."""
        if self.rank > 0:
            with torch.random.fork_rng(devices=[]):
                drawn = int(torch.randint(2**62, ()))
            torch.manual_seed(self.own_seed(drawn))


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
