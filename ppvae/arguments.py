"""Arguments as callers give them: numbers of NumPy and torch, and what is no number or program."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
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
    rest: tuple[str, int] | None = None  # of *names, and where they begin
    for i, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        annotation = parameter.annotation
        annotation = annotation.__name__ if annotation in (int, float) else str(annotation)
        options = set(annotation.split(" | "))
        kind = _KINDS.get(next(iter(options - {"None"}), ""))
        if kind is None or len(options - {"None"}) > 1:
            continue
        wanted[name] = kind, "None" in options
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = name, i
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            positions[name] = i

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = list(args)
        for name, (kind, optional) in wanted.items():
            if name in kwargs:
                kwargs[name] = number(name, kwargs[name], kind, optional)
            elif name in positions and positions[name] < len(given):
                given[positions[name]] = number(name, given[positions[name]], kind, optional)
        if rest is not None:
            name, first = rest
            given[first:] = [number(name, value, *wanted[name]) for value in given[first:]]
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


def require_programs(**programs: Any) -> None:
    """Raise ``TypeError`` for what cannot be run as a Pyro program; each is passed by its name.

    Example:
        >>> require_programs(model=lambda x: None, guide=3)
        Traceback (most recent call last):
        TypeError: guide must be a Pyro program, something to call with the data, got 3
    """
    for name, program in programs.items():
        if isinstance(program, type):
            raise TypeError(
                f"{name} is the class {program.__name__}: give an object, {program.__name__}(...)"
            )
        if not callable(program):
            raise TypeError(
                f"{name} must be a Pyro program, something to call with the data, got "
                f"{_shown(program)}"
            )


def require_functions(name: str, functions: Any) -> None:
    """Raise ``TypeError`` unless an argument holds functions by their names."""
    if not isinstance(functions, Mapping) or not all(map(callable, functions.values())):
        raise TypeError(
            f'{name} takes functions by name, {{"mean": lambda ...}}, got {_shown(functions)}'
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__}"
