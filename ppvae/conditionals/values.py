"""Heads of independent values: from a network's outputs to the parameters of each value's law."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, ClassVar

import pyro.distributions as dist
from torch import Tensor, nn

from ppvae.conditionals.heads import Conditional, Scale, full_precision


class Elementwise(Conditional):
    r"""Base of heads of independent values whose law has P parameters each.

    The network gives P blocks of D numbers: all first parameters, all second ones, and so on, as
    :class:`Normal` has means before scales; for images (``event_dim=3``) the blocks are channels.
    Positive parameters are predicted by their logarithms. A leaf names its law, and which of its
    positive parameters may be something else than predicted:

    * None: predicted by the network, one block more;
    * a number > 0, or a tensor of them that broadcasts to the value: fixed (a tensor is a buffer);
    * a :class:`Scale`: learned, one or one per value.

    Args:
        net: outputs ``(..., P * D)``, for images ``(..., P * C, H, W)``.
        event_dim: number of event dimensions, 1 for vectors, 3 for images, 0 for one number.
        parameters: by name, in the law's order, which may be predicted, fixed or learned.

    Raises:
        TypeError: a parameter is none of these; an offset where the law has no rate.
        ValueError: a fixed one is not positive; when called, if the outputs do not split in P, or
            an offset has not one row for each datapoint.

    Example:
        >>> import torch
        >>> class Logistic(Elementwise):  # a head of your own
        ...     family = staticmethod(lambda loc, log_scale: dist.Logistic(loc, log_scale.exp()))
        >>> Logistic(nn.Linear(2, 3), scale=0.5)(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    family: ClassVar[Any]
    rate: ClassVar[bool] = False  # whether the first parameter is the logarithm of a rate

    def __init__(self, net: nn.Module, event_dim: int = 1, **parameters: Any) -> None:
        super().__init__(net)
        self.event_dim = event_dim
        self.names = tuple(parameters)
        for name, value in parameters.items():
            if isinstance(value, Tensor) and not isinstance(value, nn.Parameter):
                self._check(name, bool(((value > 0) & (value < math.inf)).all()), "a tensor")
                self.register_buffer(name, value)
                continue
            if isinstance(value, Real) and not isinstance(value, bool):
                self._check(name, 0 < float(value) < math.inf, value)
            elif value is not None and not isinstance(value, (nn.Module, nn.Parameter)):
                raise TypeError(
                    f"{type(self).__name__}: {name} is {type(value).__name__}; give None for a "
                    "predicted one, a number, a tensor of numbers, or a Scale for a learned one"
                )
            setattr(self, name, value)

    def _check(self, name: str, positive: bool, seen: Any) -> None:
        if not positive:
            raise ValueError(
                f"{type(self).__name__}: {name} must be positive and finite, and is {seen}"
            )

    @property
    def num_blocks(self) -> int:
        """P: how many numbers the network gives for each value."""
        return 1 + sum(getattr(self, name) is None for name in self.names)

    def num_outputs(self, num_values: int = 1) -> int:
        return self.num_blocks * num_values

    def forward(self, *inputs: Tensor, offset: Tensor | None = None) -> dist.TorchDistribution:
        """The law of the values; ``offset`` is the log exposure of each row, for rates alone.

        Args:
            inputs: of the network.
            offset: ``(N,)``, or ``(N, *event)`` for one of each value: added to the log rate.
        """
        blocks = self.split(self.outputs(*inputs), self.num_blocks)
        return self.law(blocks, offset).to_event(self.event_dim)

    def split(self, outputs: Tensor, num_blocks: int) -> Sequence[Tensor]:
        """The blocks of a network's outputs."""
        if num_blocks == 1 and self.event_dim:
            return (outputs,)
        at = -max(self.event_dim, 1)
        size, exact = outputs.shape[at], self.event_dim == 0
        if size % num_blocks or (exact and size != num_blocks):
            where = f"dimension {at} of the outputs {tuple(outputs.shape)}"
            free = [name for name in self.names if getattr(self, name) is None]
            cure = f"{num_blocks}" if exact else f"{num_blocks} * D"
            other = f", or give {' and '.join(free)}" if free else ""
            name = type(self).__name__
            raise ValueError(f"{name} splits {where} in {num_blocks}: make it {cure}{other}")
        return outputs.unbind(-1) if exact else outputs.chunk(num_blocks, dim=at)

    def law(self, blocks: Sequence[Tensor], offset: Tensor | None = None) -> Any:
        """The distribution of single values from blocks ``(..., *event)``."""
        first, *others = blocks
        if offset is not None:
            first = first + self._aligned(offset, first)
        predicted = iter(others)
        given = (self._log(name, first) for name in self.names)
        return self.family(first, *(next(predicted) if log is None else log for log in given))

    def _aligned(self, offset: Tensor, first: Tensor) -> Tensor:
        """An offset with the event dimensions of a block."""
        if not self.rate:
            raise TypeError(f"{type(self).__name__} has no rate, so it takes no offset")
        if not offset.is_floating_point():
            raise TypeError(f"offset is {offset.dtype}: give the log of the exposures, as floats")
        rows = first.shape[: first.dim() - self.event_dim][-1:]
        wanted = (*rows, *first.shape[first.dim() - self.event_dim :])
        shape = tuple(offset.shape)
        if offset.dim() == 1:
            offset = offset.reshape(shape + (1,) * self.event_dim)
        same = all(n in (1, m) for n, m in zip(offset.shape[1:], wanted[1:], strict=False))
        if offset.dim() != len(wanted) or tuple(offset.shape[:1]) != tuple(rows) or not same:
            raise ValueError(
                f"offset has shape {shape}, and there are {tuple(rows)} rows of {wanted[1:]} "
                f"values: give one log exposure for each row, {tuple(rows)}, or for each value"
            )
        return full_precision(offset)

    def _log(self, name: str, like: Tensor) -> Tensor | None:
        """The logarithm of a positive parameter; None: it is predicted."""
        value = getattr(self, name)
        if value is None:
            return None
        if isinstance(value, Scale):
            log = full_precision(value.log_scale)
        elif isinstance(value, (nn.Module, Tensor)):
            log = full_precision(value() if isinstance(value, nn.Module) else value).log()
        else:
            log = like.new_full((), math.log(value))
        return log.to(like.dtype)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value}"
            for name in self.names
            if isinstance(value := getattr(self, name), Real)
        )


class Around(Conditional):
    """Base of heads around another head, whose network it has.

    Args:
        head: with a network.
    """

    def __init__(self, head: Conditional) -> None:
        nn.Module.__init__(self)
        self.head = head

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """The network of the head inside."""
        return self.head.net

    @property
    def event_dim(self) -> int:
        """The number of event dimensions of the head inside."""
        return int(self.head.event_dim)  # type: ignore[arg-type]

    def without_net(self) -> Around:
        around = copy.copy(self)
        around._modules = {**around._modules, "head": self.head.without_net()}
        return around
