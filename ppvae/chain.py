"""The shapes of modules that feed each other, found and checked by running them once on zeros."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.pairs import evaluation_mode

Shape = tuple[int, ...]


class Chain:
    """Runs levels one after the other, so that widths that do not fit are named before training.

    Args:
        name: of the variable that the first level is called with.
        shape: its event shape.
        like: the module whose device and dtype the zeros have.
        integer: whether that variable is of integers.

    Attributes:
        shapes: event shape by name, in the order found.

    Example:
        >>> chain = Chain("x", (5,), like=nn.Linear(5, 3))
        >>> _ = chain.follow("block 1", "d1", nn.Linear(5, 3))
        >>> chain.shapes
        {'x': (5,), 'd1': (3,)}
        >>> chain.follow("block 2", "d2", nn.Linear(4, 2))
        Traceback (most recent call last):
        ...
        ValueError: the levels do not chain: block 2 fails for d1 of shape (3,); so far ...
    """

    def __init__(self, name: str, shape: Shape, like: nn.Module, integer: bool = False) -> None:
        self.shapes = {name: shape}
        floats = (p for p in like.parameters() if p.is_floating_point())
        self._zero = next(floats, torch.zeros(())).new_zeros(())
        self._value = self._zeros(shape, integer)

    def follow(
        self,
        label: str,
        name: str,
        level: nn.Module,
        shape: Shape | None = None,
        argument: str | None = None,
        go_on: bool = True,
    ) -> Any:
        """Run a level on the latest variable; what it gives becomes the latest, ``name``.

        Args:
            label: what the level is called in a message.
            name: of the variable that it gives: a tensor, or the value of a distribution.
            level: a network or a conditional.
            shape: what the event shape must be, if known.
            argument: where the level was given, if it must give a distribution.
            go_on: whether later levels follow this one; False: a branch, which ends here.

        Returns:
            What the level gave.

        Raises:
            ValueError: the level fails, or gives another shape; the message has all shapes so far.
            TypeError: it must give a distribution, and does not.
        """
        latest = next(reversed(self.shapes))
        so_far = ", ".join(f"{variable} {size}" for variable, size in self.shapes.items())
        try:
            with evaluation_mode(level), torch.no_grad():
                found = level(self._value)
        except (RuntimeError, ValueError) as error:
            seen = f"{label} fails for {latest} of shape {self.shapes[latest]}; so far {so_far}"
            cure = "Give its network an input of that shape"
            raise ValueError(f"the levels do not chain: {seen}. {cure}: {error}") from error
        if argument is not None:
            require_distribution(argument, found)
        zeros = self._zeros_of(found)
        gives = tuple(zeros.shape[1:])
        if shape is not None and gives != shape:
            seen = f"{label} gives {name} of shape {gives}, but it has shape {shape} in the model"
            raise ValueError(
                f"the levels do not chain: {seen}; so far {so_far}. Change its last width"
            )
        if go_on:
            self.shapes[name], self._value = gives, zeros
        return found

    @property
    def integer(self) -> bool:
        """Whether the latest variable is of integers, as classes are."""
        return not self._value.is_floating_point()

    def _zeros(self, shape: Shape, integer: bool) -> Tensor:
        return self._zero.new_zeros((2, *shape), dtype=torch.long if integer else None)

    def _zeros_of(self, found: Any) -> Tensor:
        """Zeros for a tensor, or for the value of a distribution."""
        if isinstance(found, Tensor):
            return torch.zeros_like(found)
        integer = isinstance(getattr(found, "base_dist", found), dist.Categorical)
        return self._zeros(found.event_shape, integer)


def require_distribution(argument: str, found: Any) -> Any:
    """What ``pyro.sample`` takes, or ``TypeError``: it can be called, and has a ``log_prob``."""
    if not (callable(found) and callable(getattr(found, "log_prob", None))):
        kind = f"{type(found).__module__}.{type(found).__qualname__}"
        cure = "put a network into a conditional, as conditionals.Normal(net)"
        raise TypeError(
            f"{argument} gives a {kind}, but must give one of pyro.distributions: {cure}"
        )
    return found


def require_likelihood(model: Any, inputs: Callable[[Any], Sequence[Tensor]]) -> None:
    """Raise ``TypeError`` if a model's ``likelihood`` is a network, which gives no distribution.

    A copy of the model is run on two rows. What fails there is left to the first batch of data.

    Args:
        model: has a ``likelihood``.
        inputs: called with the copy, gives what its likelihood is called with.
    """
    found: Any = torch.zeros(()) if _gives_tensors(model.likelihood) else None
    if found is None and isinstance(model.likelihood, nn.Module):
        with suppress(Exception), torch.no_grad(), torch.random.fork_rng(devices=[]):
            copied = copy.deepcopy(model).eval()
            found = copied.likelihood(*inputs(copied))
    if found is not None:
        require_distribution("likelihood", found)


def _gives_tensors(module: Any) -> bool:
    """Whether it is one of torch's or ppvae's networks, or ends with one."""
    if type(module) is nn.Sequential:
        return len(module) > 0 and _gives_tensors(module[-1])
    return type(module).__module__.startswith(("torch.nn.", "ppvae.nets."))
