"""What a graph of a pair has as it was when it was built, and how a change of it is noticed."""

from __future__ import annotations

import copy
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from types import FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from ppvae.compile.graph import INTERNAL
from ppvae.wrapped import mentioned, owner_of, parts

_PLAIN = (int, float, str, type(None))
_LIBRARIES = {"torch", "pyro", "ppvae"}  # nothing changes there between steps
_ABSENT = object()
_LONGEST = 100  # of a list from outside whose contents are looked at

Place = tuple[Mapping[str, Any], str]


class Fixed:
    """What a computation with a pair reads and that is not the value of a tensor.

    That is which modules, parameters and buffers there are, their modes, numbers, words and
    functions in attributes; and of the globals and closed-over names that the programs' own code
    mentions numbers, words, lists of them, functions, and which tensors and objects they are.

    Args:
        module: has the parameters and buffers; not looked at is its ``state``, which changes.
        programs: model and guide.

    Attributes:
        parameters: of the module.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> fixed = Fixed(net)
        >>> before = fixed.key()
        >>> nn.init.zeros_(net.weight) is net.weight, fixed.key() == before
        (True, True)
        >>> net.weight = nn.Parameter(net.weight.detach().clone())
        >>> fixed.renew(), fixed.key() == before
        (True, False)
    """

    def __init__(self, module: nn.Module, programs: Sequence[Any] = ()) -> None:
        self.module, self.programs = module, programs
        self.look()

    def __deepcopy__(self, memo: dict[int, Any]) -> Fixed:
        """Of a copy's own modules."""
        return Fixed(*copy.deepcopy((self.module, self.programs), memo))

    def look(self) -> None:
        """Find the places where something may change."""
        state = getattr(self.module, "state", None)
        self._modules = [part for part in self.module.modules() if part is not state]
        self._dicts: list[Any] = [  # looked through at every step
            contents
            for p in self._modules
            for contents in (p._modules, p._parameters, p._forward_pre_hooks, p._forward_hooks)
        ]
        found = {id(part): part for p in self.programs for part in parts(p, _is_module)}
        others = [owner_of(part) for part in found.values() if not isinstance(part, FunctionType)]
        objects = [*self._modules, *(o for o in others if not isinstance(o, nn.Module))]
        attributes = [
            (vars(o), name)
            for o in objects
            for name, value in getattr(o, "__dict__", {}).items()
            if name not in INTERNAL and _is_looked_at(value)
        ]
        attributes += [
            (mapping, name)
            for o in objects
            for key, value in getattr(o, "__dict__", {}).items()
            if key not in INTERNAL
            for mapping in _namespaces(value)  # as self.settings.scale
            for name, held in mapping.items()
            if isinstance(held, _PLAIN) and not name.startswith("__")
        ]
        classes = {kind for o in objects for kind in type(o).__mro__ if _is_own(kind)}
        # What an object has not itself is that of its class, until it is given its own.
        self._defaults = [
            (o, name)
            for o in objects
            for kind in type(o).__mro__
            if kind in classes
            for name, value in vars(kind).items()
            if isinstance(value, _PLAIN) and not name.startswith("__")
        ]
        held = [mapping[name] for mapping, name in attributes]
        methods = [v for kind in classes for name, v in vars(kind).items() if name != "__init__"]
        self._outside, self._cells = _places([*found.values(), *held, *methods])
        self._attributes = attributes
        self._buffers: list[Place] = [
            (p._buffers, name) for p in self._modules for name in p._buffers
        ]
        self.parameters = list(self.module.parameters())
        self._structure = self._made_of()

    def _made_of(self) -> list[Any]:
        """The modules, parameters, hooks, and what is called from outside."""
        found = list(chain.from_iterable(map(dict.values, self._dicts)))
        outside = [mapping.get(name) for mapping, name in self._outside]
        return found + [v for v in (*outside, *map(_content, self._cells)) if callable(v)]

    def renew(self) -> bool:
        """Whether there are other modules, parameters or functions than before; then look anew."""
        now = self._made_of()
        if len(now) == len(self._structure) and all(map(operator.is_, now, self._structure)):
            return False
        self.look()
        return True

    def key(self) -> Any:
        """Equal for equal contents, of objects and tensors for the same ones."""
        return (
            tuple([part.training for part in self._modules]),
            tuple([parameter.requires_grad for parameter in self.parameters]),
            tuple(map(id, self._structure)),
            tuple([_value(mapping.get(name)) for mapping, name in self._attributes]),
            tuple([getattr(owner, name, None) for owner, name in self._defaults]),
            tuple([id(mapping.get(name)) for mapping, name in self._buffers]),
            tuple([_value(mapping.get(name), True) for mapping, name in self._outside]),
            tuple([_value(_content(cell), True) for cell in self._cells]),
        )

    def objects(self) -> list[Any]:
        """What a key knows by its address, which is no other's as long as this list is kept."""
        places = (*self._attributes, *self._buffers, *self._outside)
        values = [*(mapping.get(name) for mapping, name in places), *map(_content, self._cells)]
        inside = [list(v) for v in values if isinstance(v, list)]
        inside += [list(v.values()) for v in values if isinstance(v, dict)]
        return [*self._structure, *values, *inside]


def _places(values: Iterable[Any]) -> tuple[list[Place], list[Any]]:
    """Where functions, and those that they call in turn, have what they mention: by name, cells."""
    pending, seen = [f for value in values for f in _functions(value)], set()
    places: dict[tuple[int, str], Place] = {}
    cells: dict[int, Any] = {}
    while pending:
        function = pending.pop()
        if id(function) in seen or not _is_own(function):
            continue
        seen.add(id(function))
        cells |= {id(cell): cell for cell in function.__closure__ or ()}
        for name, value in mentioned(function).items():
            if name not in function.__code__.co_freevars and not isinstance(value, ModuleType):
                places[id(function.__globals__), name] = function.__globals__, name
            pending += _functions(value)
            for mapping in _namespaces(value):
                for attribute in _names(function.__code__):
                    held = mapping.get(attribute, _ABSENT)
                    if isinstance(held, (*_PLAIN, Tensor)):
                        places[id(mapping), attribute] = mapping, attribute
    return list(places.values()), list(cells.values())


def _functions(value: Any) -> list[FunctionType]:
    """The functions of Python's that a value is, or that a class has in it."""
    if isinstance(value, property):
        return [f for f in (value.fget,) if isinstance(f, FunctionType)]
    value = getattr(value, "__func__", value)  # of methods, of what is static
    return [value] if isinstance(value, FunctionType) else []


def _names(code: Any) -> Iterator[str]:
    """The names of globals and attributes in code, in functions inside of it too."""
    yield from code.co_names
    for constant in code.co_consts:
        if hasattr(constant, "co_names"):
            yield from _names(constant)


def _namespaces(value: Any) -> list[Mapping[str, Any]]:
    """Where a value that code mentions has attributes, such as those of a module of settings."""
    if isinstance(value, (nn.Module, Tensor, FunctionType, MethodType)):
        return []
    if isinstance(value, (type, ModuleType)):
        return [vars(value)] if _is_own(value) else []
    return [
        vars(o) for o in (value, type(value)) if hasattr(o, "__dict__") and _is_own(type(value))
    ]


def _is_own(value: Any) -> bool:
    """Whether a class, function or module is the user's, and not of a library that is built on."""
    home = value.__name__ if isinstance(value, ModuleType) else value.__module__ or ""
    return home.partition(".")[0] not in _LIBRARIES


def _is_module(value: Any) -> bool:
    return isinstance(value, nn.Module)


def _is_looked_at(value: Any) -> bool:
    """Whether an attribute is a number, a word, a tensor, a function, or holds some."""
    return isinstance(value, (*_PLAIN, list, tuple, dict, Tensor)) or callable(value)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _value(value: Any, tensors: bool = False) -> Any:
    """Of numbers and words, and those in lists, the values; else which object it is.

    Args:
        value: an attribute, or what a name from outside stands for.
        tensors: look at which tensors are in lists, too; modules keep caches in theirs.
    """
    if isinstance(value, _PLAIN):
        return value
    if not isinstance(value, (list, tuple, dict)) or (tensors and len(value) > _LONGEST):
        return id(value)
    return tuple(
        [
            (name, held if isinstance(held, _PLAIN) else id(held))
            for name, held in (value.items() if isinstance(value, dict) else enumerate(value))
            if isinstance(held, _PLAIN) or (tensors and isinstance(held, Tensor))
        ]
    )
