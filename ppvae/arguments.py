"""Numbers as callers give them: Python's, NumPy's, tensors of one number."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import numpy as np
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
_KINDS = {"int": int, "float": float}
_WORDS = {int: "a whole number", float: "a number"}


def takes_numbers(function: Callable[P, R]) -> Callable[P, R]:
    """Give a function Python's ints and floats where its annotations say ``int`` or ``float``.

    Numbers of NumPy, and arrays and tensors that hold one, are converted; anything else raises a
    ``TypeError`` that names the argument. ``int | None`` takes None as well; of other unions
    nothing is assumed. A bool is no number.

    Example:
        >>> @takes_numbers
        ... def double(size: int, scale: float = 1.0) -> float:
        ...     return 2 * size * scale
        >>> double(np.int64(3), scale=np.ones(()))
        6.0
        >>> double(size=2.5)
        Traceback (most recent call last):
        TypeError: size must be a whole number, got 2.5
    """
    wanted: dict[str, tuple[type, bool]] = {}
    positions: dict[str, int] = {}
    for i, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        annotation = parameter.annotation
        annotation = annotation.__name__ if annotation in (int, float) else str(annotation)
        options = set(annotation.split(" | "))
        kind = _KINDS.get(next(iter(options - {"None"}), ""))
        if kind is None or len(options - {"None"}) > 1:
            continue
        wanted[name] = kind, "None" in options
        if parameter.kind is not parameter.KEYWORD_ONLY:
            positions[name] = i

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = list(args)
        for name, (kind, optional) in wanted.items():
            if name in kwargs:
                kwargs[name] = number(name, kwargs[name], kind, optional)
            elif name in positions and positions[name] < len(given):
                given[positions[name]] = number(name, given[positions[name]], kind, optional)
        return function(*given, **kwargs)  # type: ignore[arg-type]

    return call


def number(name: str, value: Any, kind: type, optional: bool = False) -> Any:
    """An argument as an ``int`` or a ``float``.

    Raises:
        TypeError: it is no such number.
        ValueError: a whole number that takes more than 64 bits.
    """
    if value is None and optional:
        return None
    plain = value
    if isinstance(value, (np.ndarray, np.generic, Tensor)) and value.ndim == 0:
        plain = value.item()
    if type(plain) not in (int, kind):
        if kind is int and isinstance(plain, float) and plain.is_integer():
            raise TypeError(
                f"{name} must be a whole number, got {value!r}: give {name}={int(plain)}"
            )
        raise TypeError(f"{name} must be {_WORDS[kind]}, got {_shown(value)}")
    if type(plain) is int and not -(2**63) <= plain < 2**64:
        raise ValueError(f"{name} takes more than 64 bits: {plain}")
    return kind(plain)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__}"
