"""What stands inside a program that handlers, ``functools.partial`` or functions are put around.

Pyro users write ``poutine.scale(model, scale=0.1)``, ``config_enumerate(model)``, a lambda around a
module. What has to be known of the program itself (its parameters, the names of its arguments) is
asked of what is inside.
"""

from __future__ import annotations

import dis
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from pyro.poutine.messenger import _bound_partial, _context_wrap
from pyro.poutine.reparam_messenger import ReparamHandler
from pyro.poutine.trace_messenger import TraceHandler
from torch import nn


def innermost(program: Any) -> Any:
    """What stands inside Pyro's handlers, ``functools.partial`` and ``functools.wraps``."""
    while (inside := _inside(program)) is not None:
        program = inside
    return program


def owner_of(program: Any) -> Any:
    """What lives as long as a program: a bound method is made anew at each mention."""
    return program.__self__ if isinstance(program, MethodType) else program


def method_of(program: Any) -> Any:
    """The function of a bound method, which beside its owner says what runs; None for others."""
    return program.__func__ if isinstance(program, MethodType) else None


def title(program: Any) -> str:
    """What a program is called in a message: its class, or the name of a function."""
    inside = innermost(program)
    name: str = getattr(inside, "__qualname__", type(inside).__name__)
    return name.rpartition("<locals>.")[2]


class Last(str):
    """The name of an argument that comes behind the others, however many of them are given."""


def argument_names(program: Any, by_keyword: bool = False) -> list[str]:
    """What a program calls the arguments that it takes by position, so far as that is known.

    Args:
        program: a Pyro program; a module may have an ``argument_names(by_keyword)`` of its own.
        by_keyword: also those that it takes by keyword alone.
    """
    if isinstance(program, nn.Module):
        own: Any = getattr(program, "argument_names", None)
        return argument_names(program.forward, by_keyword) if own is None else own(by_keyword)
    if (inside := _inside(program)) is not None:
        bound = len(program.args) if type(program) is functools.partial else 0
        if bound and program.func is _context_wrap:  # the handler and the program inside
            bound -= 2
        return argument_names(inside, by_keyword)[bound:]
    try:
        parameters = inspect.signature(program).parameters.values()
    except (TypeError, ValueError):  # what is written in C need not say
        return []
    kinds: list[Any] = [inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD]
    kinds += [inspect.Parameter.KEYWORD_ONLY] if by_keyword else []
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def argument_labels(program: Any, count: int) -> list[str]:
    """What so many positional arguments are called, with a number where a program has no name."""
    names = argument_names(program)
    last = [names.pop()] if names and isinstance(names[-1], Last) else []
    names = [*names, *(f"argument {i}" for i in range(len(names), count))]
    return [*names[: max(count - len(last), 1)], *last][:count]


def parts(program: Any, announces_itself: Callable[[Any], bool]) -> list[Any]:
    """What a program is made of, each part once: itself, what is inside, bound, or called.

    Args:
        program: a Pyro program; a module is one part.
        announces_itself: whether a value that a function takes from outside belongs to the program,
            though it is neither the function's own helper nor passed to ``pyro.module``.
    """
    found: list[Any] = []
    pending, seen = [program], set()
    while pending:
        part = pending.pop(0)
        if id(part) in seen:
            continue
        seen.add(id(part))
        found.append(part)
        if isinstance(part, nn.Module):
            continue
        pending += [value for value in _contents(part) if _can_be_part(value)]
        if isinstance(part, FunctionType):
            pending += [
                value
                for name, value in mentioned(part).items()
                if _is_helper(value, part) or announces_itself(value) or name in announced(part)
            ]
    return found


def _can_be_part(value: Any) -> bool:
    return isinstance(value, nn.Module) or (callable(value) and not isinstance(value, type))


def _is_helper(value: Any, function: FunctionType) -> bool:
    """Whether a function that mentions a value runs what this holds."""
    if isinstance(value, FunctionType):
        return value.__globals__ is function.__globals__
    return isinstance(value, (MethodType, functools.partial))


def mentioned(function: FunctionType) -> dict[str, Any]:
    """Names that a function takes from outside, and their values, so far as they have one."""
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not yet filled
            continue
    known = function.__globals__
    return {name: known[name] for name in _globals_of(function.__code__) if name in known} | found


def announced(function: FunctionType) -> frozenset[str]:
    """Names, of those that a function takes from outside, which it passes to ``pyro.module``."""
    return _announced(function.__code__)


def _inside(program: Any) -> Any:
    """What a wrapper of one program is put around; None: it is no such wrapper."""
    if isinstance(program, nn.Module):
        return None
    if isinstance(program, _bound_partial):  # of Pyro's: partial(run, handler, program)
        return program.func
    if isinstance(program, functools.partial):
        return program.args[1] if program.func is _context_wrap else program.func
    if isinstance(program, (TraceHandler, ReparamHandler)):
        return program.fn
    return getattr(program, "__wrapped__", None)


def _contents(part: Any) -> Iterator[Any]:
    """What a part that is no module was made of."""
    if isinstance(part, functools.partial):
        return _flat([part.func, *part.args, part.keywords])
    if isinstance(part, FunctionType):
        return _flat([getattr(part, "__wrapped__", None), part.__defaults__, part.__kwdefaults__])
    owner = owner_of(part)
    return _flat([owner] if isinstance(owner, nn.Module) else _attributes(owner))


def _attributes(part: Any) -> list[Any]:
    slots = [name for kind in type(part).__mro__ for name in getattr(kind, "__slots__", ())]
    return [*getattr(part, "__dict__", {}).values(), *(getattr(part, name, None) for name in slots)]


def _flat(value: Any) -> Iterator[Any]:
    """A value, or one by one what a container holds."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for held in value:
            yield from _flat(held)
    else:
        yield value


@functools.lru_cache(maxsize=256)
def _globals_of(code: CodeType) -> tuple[str, ...]:
    """Global names that code loads, in functions inside of it too."""
    own = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [_globals_of(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    return tuple(sorted(own.union(*inner)))


@functools.lru_cache(maxsize=256)
def _announced(code: CodeType) -> frozenset[str]:
    names, in_call = set(), False
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("CALL"):
            in_call = False
        elif instruction.argval == "module" and instruction.opname.startswith("LOAD"):
            in_call = True
        elif in_call and instruction.opname in ("LOAD_GLOBAL", "LOAD_DEREF"):
            names.add(instruction.argval)
    return frozenset(names)
