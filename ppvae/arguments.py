"""Arguments as callers give them: numbers of NumPy and torch, and what is no number or program."""

from __future__ import annotations

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

P = ParamSpec("P")
R = TypeVar("R")
_KINDS: dict[str, type] = {
    "int": int, "float": float, "bool": bool, "str": str, "nn.Module": nn.Module
}  # fmt: skip
_ROW = re.compile(r"(?P<what>tuple|Sequence|Iterable(?=\[nn))\[(?P<of>(int|nn\.Module)\b.*)\]")
_WORDS = {int: "a whole number", float: "a number"}
_LARGEST_SIZE = 2**31 - 1


class _Wanted(NamedTuple):
    """What an annotation says of an argument."""

    kind: type | None = None  # one of it, if any
    row: type | None = None  # int or nn.Module: several of it
    length: int | None = None  # how many, if that is said
    optional: bool = False
    at_least: float | None = None


@overload
def takes_numbers(function: Callable[P, R], /) -> Callable[P, R]: ...
@overload
def takes_numbers(**at_least: float) -> Callable[[Callable[P, R]], Callable[P, R]]: ...
def takes_numbers(function: Any = None, /, **at_least: float) -> Any:
    """Check the arguments of a function by its annotations: numbers, sizes, flags, words, modules.

    - ``int`` and ``float``: numbers of NumPy, and arrays and tensors that hold one, become
      Python's. A bool is no number.
    - ``tuple[int, ...]`` and ``Sequence[int]``: sizes, each at least 1, which become a tuple.
    - ``bool``: True or False, NumPy's and torch's too, and no number.
    - ``str`` and a ``Literal`` of words: a word; which ones there are, the function says itself.
    - ``nn.Module``, one or a sequence: what can be called and is no class does for a module.

    Anything else raises a ``TypeError`` that names the argument. ``... | None`` takes None as well;
    of other annotations, and of arguments without one, nothing is assumed.

    Args:
        function: what is called; or None, to be decorated later.
        **at_least: the least value of an argument, by its name. It must be finite then, and a size.

    Example:
        >>> @takes_numbers(size=1)
        ... def double(size: int, scale: float = 1.0) -> float:
        ...     return 2 * size * scale
        >>> double(np.int64(3), scale=np.ones(()))
        6.0
        >>> double(size=2.5)
        Traceback (most recent call last):
        TypeError: size must be a whole number, got 2.5
        >>> double(-3)
        Traceback (most recent call last):
        ValueError: size must be at least 1, got -3
    """
    if function is None:
        return functools.partial(_takes, at_least)
    return _takes(at_least, function)


def _takes(at_least: Mapping[str, float], function: Callable[P, R]) -> Callable[P, R]:
    wanted: dict[str, _Wanted] = {}
    positions: dict[str, int] = {}
    rest: tuple[str, int] | None = None  # of *names, and where they begin
    for i, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        one = _wanted(parameter.annotation)
        if one is None:
            continue
        wanted[name] = one._replace(at_least=at_least.get(name, one.at_least))
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = name, i
        elif parameter.kind is not parameter.KEYWORD_ONLY:
            positions[name] = i

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = list(args)
        for name, one in wanted.items():
            if name in kwargs:
                kwargs[name] = _read(name, kwargs[name], one)
            elif name in positions and positions[name] < len(given):
                given[positions[name]] = _read(name, given[positions[name]], one)
        if rest is not None:
            name, first = rest
            given[first:] = [_read(name, value, wanted[name]) for value in given[first:]]
        return function(*given, **kwargs)  # type: ignore[arg-type]

    return call


def _wanted(annotation: Any) -> _Wanted | None:
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if text.startswith("Literal["):
        text = "str" + " | None" * text.endswith(" | None")
    options = set(text.split(" | "))
    single, optional = options - {"None"}, "None" in options
    for option in options:
        if found := _ROW.fullmatch(option):
            several = found["of"].split(", ")
            length = None if found["what"] != "tuple" or "..." in several else len(several)
            kind = _KINDS[several[0]]
            if single - {option, several[0]} or kind not in (int, nn.Module):
                return None
            one = kind if several[0] in single else None
            return _Wanted(one, kind, length, optional, 1 if kind is int else None)
    if len(single) != 1 or not single <= set(_KINDS):
        return None
    return _Wanted(_KINDS[single.pop()], optional=optional)


def _read(name: str, value: Any, wanted: _Wanted) -> Any:
    """An argument as it is wanted."""
    kind, row = wanted.kind, wanted.row
    if value is None and wanted.optional:
        return None
    if row is not None and _is_row(value):
        if wanted.length not in (None, len(value)):
            raise ValueError(f"{name} must have {wanted.length} values, got {_shown(value)}")
        items = tuple(_one(name, item, row, wanted.at_least) for item in value)
        return value if isinstance(value, nn.Module) else items
    if kind is None:
        what = "whole numbers" if row is int else "modules"
        raise TypeError(f"{name} must be several {what}, as a tuple, got {_shown(value)}")
    return _one(name, value, kind, wanted.at_least)


def _is_row(value: Any) -> bool:
    if isinstance(value, (str, bytes)):
        return False
    return isinstance(value, (Sequence, nn.ModuleList, nn.Sequential)) or (
        isinstance(value, (np.ndarray, Tensor)) and value.ndim == 1
    )


def _one(name: str, value: Any, kind: type, at_least: float | None) -> Any:
    if kind in _WORDS:
        return _bounded(name, value, kind, at_least)
    if kind is nn.Module:
        _require_callable(name, value, "a module, as nets.mlp(...)")
    elif kind is str and not isinstance(value, str):
        raise TypeError(f"{name} must be a word, got {_shown(value)}")
    elif kind is bool:
        value = single(value)
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {_shown(value)}")
    return value


def _bounded(name: str, value: Any, kind: type, at_least: float | None) -> Any:
    plain = number(name, value, kind)
    if at_least is not None:
        if not at_least <= plain < math.inf:
            raise ValueError(f"{name} must be at least {at_least}, got {plain}")
        if kind is int and plain > _LARGEST_SIZE:
            raise ValueError(f"{name} must be below 2 ** 31, got {plain}")
    return plain


def single(value: Any) -> Any:
    """Python's number in place of one of NumPy's, or of an array or tensor that holds one.

    Anything else comes back as it is: a time, a value that is hidden, a tensor without memory.

    Example:
        >>> single(np.float32(0.5)), single(torch.tensor(3)), single(np.ma.masked)
        (0.5, 3, masked)
    """
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        held = value.dtype.kind in "biufcO" and not np.ma.is_masked(value)
        return value.item() if held else value
    if isinstance(value, Tensor) and is_dense(value) and value.dim() == 0:
        return value.item()
    return value


def is_dense(value: Tensor) -> bool:
    """Whether a tensor is a block of memory that holds its numbers one by one."""
    if value.is_nested:
        return False
    return value.layout == torch.strided and not (value.is_quantized or value.is_meta)


def require_dense(name: str, value: Any) -> Tensor:
    """A tensor; raises ``TypeError`` for what is none, or has no dense block of numbers.

    Example:
        >>> require_dense("values", torch.eye(2).to_sparse())
        Traceback (most recent call last):
        TypeError: values is a tensor without a dense block of numbers (torch.sparse_coo, \
torch.float32, cpu): give values.to_dense() or values.dequantize()
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, as torch.as_tensor({name}), got {_shown(value)}")
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor, of rows of different lengths: pad them")
    if not is_dense(value):
        raise TypeError(
            f"{name} is a tensor without a dense block of numbers ({value.layout}, "
            f"{value.dtype}, {value.device}): give {name}.to_dense() or {name}.dequantize()"
        )
    return value


def real(name: str, value: Any) -> Any:
    """As :func:`single`; whole numbers that do not fit into 64 bits, as torch has them, as floats.

    Raises:
        TypeError: a time, which NumPy counts among the whole numbers.
        ValueError: a number too large for that, too.
    """
    plain = single(value)
    if isinstance(plain, np.timedelta64):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if type(plain) is int and not -(2**63) <= plain < 2**63:
        try:
            return float(plain)
        except OverflowError as error:
            raise ValueError(f"{name} is too large: it has {plain.bit_length()} bits") from error
    return plain


def set_numbers(owner: Any, **kinds: type) -> None:
    """Give attributes of a frozen dataclass Python's numbers, as :func:`number` reads them."""
    for name, kind in kinds.items():
        object.__setattr__(owner, name, number(name, getattr(owner, name), kind))


def number(name: str, value: Any, kind: type, optional: bool = False) -> Any:
    """An argument as an ``int`` or a ``float``.

    Raises:
        TypeError: it is no such number.
        ValueError: a whole number that takes more than 64 bits.
    """
    if value is None and optional:
        return None
    plain = single(value)
    if type(plain) not in (int, kind):
        if kind is int and isinstance(plain, float) and plain.is_integer():
            raise TypeError(
                f"{name} must be a whole number, got {value!r}: give {name}={int(plain)}"
            )
        raise TypeError(f"{name} must be {_WORDS[kind]}, got {_shown(value)}")
    if type(plain) is int and not -(2**63) <= plain < 2**64:
        raise ValueError(f"{name} takes more than 64 bits: {plain}")
    return kind(plain)


def number_or_tensor(name: str, value: Any) -> Tensor:
    """An argument as a tensor."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        value = torch.from_numpy(value)
    if not isinstance(value, Tensor):
        value = torch.tensor(number(name, value, float))
    elif value.is_complex():
        raise TypeError(f"{name} must be a number or a tensor of them, got {value.dtype}")
    value = require_dense(name, value)
    return value.clone() if value.is_inference() else value


def require_programs(**programs: Any) -> None:
    """Raise ``TypeError`` for what cannot be run as a Pyro program; each is passed by its name.

    Example:
        >>> require_programs(model=lambda x: None, guide=3)
        Traceback (most recent call last):
        TypeError: guide must be a Pyro program, something to call with the data, got 3
    """
    for name, program in programs.items():
        _require_callable(name, program, "a Pyro program, something to call with the data")
        if isinstance(program, Distribution):
            raise TypeError(
                f"{name} must be a Pyro program, got the distribution {_shown(program)}: give a "
                "function of the data that draws from it by pyro.sample"
            )


def _require_callable(name: str, value: Any, what: str) -> None:
    if isinstance(value, type):
        raise TypeError(
            f"{name} is the class {value.__name__}: give an object, {value.__name__}(...)"
        )
    if not callable(value):
        raise TypeError(f"{name} must be {what}, got {_shown(value)}")


def require_has(name: str, value: Any, attributes: str, example: str) -> None:
    """Raise ``TypeError`` for what lacks one of the attributes it is asked for.

    Example:
        >>> require_has("quantizer", 3, "num_codes codes", "nets.Codebook(512, 64)")
        Traceback (most recent call last):
        TypeError: quantizer must have num_codes, as nets.Codebook(512, 64) has, got 3
    """
    for attribute in attributes.split():
        if isinstance(value, type) or not hasattr(value, attribute):
            raise TypeError(f"{name} must have {attribute}, as {example} has, got {_shown(value)}")


def require_functions(name: str, functions: Any) -> None:
    """Raise ``TypeError`` unless an argument holds functions by their names."""
    if not isinstance(functions, Mapping) or not all(map(callable, functions.values())):
        raise TypeError(
            f'{name} takes functions by name, {{"mean": lambda ...}}, got {_shown(functions)}'
        )


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{type(value).__name__}"
