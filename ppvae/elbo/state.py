"""What an estimator remembers between steps, and the schedules that it asks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.pairs import NotCompiled
from ppvae.weights import LogWeights

Schedule = Callable[[int], float]


class State(nn.Module):
    """What an estimator remembers between steps; saved with ``state_dict()``.

    Attributes:
        shown: weights that change, at the last training loss, by their column in the history:
            ``"kl_weight"``, and others as their estimator names them; 0-d tensors.
        num_rows: of the data set that batches are cut from; None: a batch is all there is, unless
            the data plate has a size.
    """

    log_multiplier: Tensor  # of a Constraint
    violation: Tensor
    latest_violation: Tensor  # of the last loss; not saved
    ratio: nn.Module  # of a FactorELBO
    control: Tensor  # of RELAX: eta, log tau
    squares: Tensor
    latest_slope: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self._num_steps = 0
        self.num_rows: int | None = None
        self.shown: dict[str, Tensor] = {}
        self._slots: tuple[Tensor, list[tuple[Schedule, Tensor]]] | None = None  # see traced
        self._asked = 0  # how many of them this loss has asked for

    @property
    def step(self) -> int:
        """Training losses computed so far; what schedules are called with."""
        if self._slots is not None:
            raise NotCompiled(
                "the estimator reads state.step, and a graph would keep the step it was built at "
                "for ever; let it ask for what changes: state.at_step(schedule)"
            )
        return self._num_steps

    def at_step(self, weight: float | Tensor | Schedule, column: str | None = None) -> Any:
        """A weight as it is now: a schedule's value at this step, anything else as given.

        In a graph it is a tensor, which is filled anew before each step.

        Args:
            weight: a number, a 0-d tensor, or a callable of the step.
            column: of the history, that shows a schedule's value; None: none does.
        """
        if isinstance(weight, Tensor) or not callable(weight):
            return weight
        now = weight(self._num_steps) if self._slots is None else self._slot(weight)
        if column is not None:
            self.shown[column] = torch.as_tensor(now)
        return now

    def _slot(self, weight: Schedule) -> Tensor:
        """The tensor that stands for a schedule's value in a graph."""
        assert self._slots is not None
        like, slots = self._slots
        if self._asked == len(slots):
            value = float(weight(self._num_steps))
            slot = torch.full((), value, dtype=like.dtype, device=like.device)
            if type(slot) is not Tensor:  # made while tracing: it would hold this value for ever
                raise NotCompiled("the estimator asks at_step more often in one loss than another")
            slots.append((weight, slot))
        self._asked += 1
        return slots[self._asked - 1][1]

    @contextmanager
    def traced(self, like: Tensor) -> Iterator[list[tuple[Schedule, Tensor]]]:
        """Inside, a graph is traced: schedules give tensors, of the dtype and device of ``like``.

        Yields:
            The schedules that were asked for, each with the tensor that holds its value.
        """
        slots: list[tuple[Schedule, Tensor]] = []
        kept, self._slots, self._asked = vars(self).copy(), (like, slots), 0
        kept["shown"] = dict(self.shown)
        try:
            yield slots
        finally:
            vars(self).clear()
            vars(self).update(kept)

    def times(self, weights: LogWeights) -> float:
        """N / B, how many times a batch is in the data set: what a global term is divided by.

        Raises:
            ValueError: the data plate has another size than the data set.
        """
        if self.num_rows is None:
            return weights.scale
        if weights.scale != 1 and abs(weights.full_size - self.num_rows) > 0.5:
            raise ValueError(
                f"the plate 'data' has {weights.full_size:.6g} rows, and there are "
                f"num_rows={self.num_rows}: the global latents would be weighed by one of the two"
            )
        return self.num_rows / weights.log_w.shape[1]

    def count(self) -> None:
        """One more training loss was computed."""
        self._num_steps += 1

    @property
    def learning(self) -> bool:
        """Whether a loss computed now is a training step."""
        return self.training and torch.is_grad_enabled()

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self._num_steps}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self._num_steps = state["step"]
