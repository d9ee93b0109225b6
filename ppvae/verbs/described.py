"""A module as plain data, and back: what :func:`ppvae.save` writes of the package's own pairs.

A description says of each module its class, its attributes, its parameters and its parts, each
once, so that what is shared is shared again. It names classes and functions of a closed set:
modules of ppvae and of ``torch.nn``, and a few functions of torch. The names are looked up in the
tables here, made from what ``import ppvae`` has imported; nothing is imported or called by name.
"""

from __future__ import annotations

import math
import sys
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

_ROOMS = ("models", "guides", "conditionals", "posteriors", "nets", "local", "auxiliary")
_INTERNAL = frozenset(vars(nn.Module()))  # of every module: hooks, parameters, parts
_PLAIN = (bool, int, str, type(None))
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    f"{room}.{name}": getattr(owner, name)
    for room, owner, names in (
        ("torch", torch, "exp sigmoid tanh relu"),
        ("torch.nn.functional", nn.functional, "softplus elu gelu silu relu leaky_relu"),
    )
    for name in names.split()
}


class NotDescribed(TypeError):
    """Part of a module is nothing that a description can hold; the message names it."""


def _known() -> dict[str, Any]:
    """Classes of modules and functions, by the names they have in a description."""
    found: dict[str, Any] = {
        f"torch.nn.{name}": value for name, value in vars(nn).items() if _is(value)
    }
    for title, room in list(sys.modules.items()):
        package, _, rest = title.partition(".")
        of_pyro = title.startswith(("pyro.distributions.transforms.", "pyro.nn."))
        if of_pyro or (package == "ppvae" and rest.split(".")[0] in _ROOMS):
            for name, value in vars(room).items():
                is_public = isinstance(value, FunctionType) and not name.startswith("_")
                of_here = getattr(value, "__module__", None) == title
                if of_here and (_is(value) or is_public or (_is_plain(value) and not of_pyro)):
                    found[f"{title}.{name}"] = value
    return found | _FUNCTIONS


def _is(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module)


def _is_plain(value: Any) -> bool:
    """A class whose objects are their attributes."""
    is_class = isinstance(value, type) and getattr(value, "__new__", None) is object.__new__
    return is_class and not _is(value) and not hasattr(value, "__slots__")


class Describing:
    """From modules to plain data; tensors are numbered, in ``tensors``."""

    def __init__(self) -> None:
        self.modules: list[dict[str, Any] | None] = []
        self.tensors: list[Tensor] = []
        self._numbers: dict[int, int] = {}  # of modules and tensors, by their identity
        self._kept: list[Any] = []  # so that no identity is taken again
        self._names = {id(value): name for name, value in _known().items()}

    def module(self, module: nn.Module, where: str) -> int:
        """A module's number.

        Raises:
            NotDescribed: its class is of the user; it has hooks, or attributes that are no data.
        """
        if id(module) in self._numbers:
            return self._numbers[id(module)]
        name = self._names.get(id(type(module)))
        if name is None:
            kind = type(module)
            raise NotDescribed(f"{where} is {kind.__qualname__} of {kind.__module__}")
        number = self._numbers[id(module)] = len(self.modules)
        self.modules.append(None)
        self._kept.append(module)
        # what a class leaves out of its state it makes anew, as a GRU its references to its weights
        own = getattr(module, "__getstate__", None)
        state = vars(module) if own is None else own()
        if hooks := [key for key in _INTERNAL if "hooks" in key and state.get(key)]:
            raise NotDescribed(f"{where} has hooks ({hooks[0]})")
        attributes = {
            key: self.value(value, f"{where}.{key}")
            for key, value in state.items()
            if key not in _INTERNAL
        }
        self.modules[number] = {
            "class": name,
            "training": module.training,
            "attributes": attributes,
            "parameters": self._tensors(module._parameters, where),
            "buffers": self._tensors(module._buffers, where),
            "transient": sorted(module._non_persistent_buffers_set),
            "parts": {
                key: None if part is None else self.module(part, f"{where}.{key}")
                for key, part in module._modules.items()
            },
        }
        return number

    def _tensors(self, held: Any, where: str) -> dict[str, Any]:
        return {
            key: None if tensor is None else self._tensor(tensor, f"{where}.{key}")
            for key, tensor in held.items()
        }

    def _tensor(self, tensor: Tensor, where: str) -> dict[str, Any]:
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer):
            raise NotDescribed(f"{where} is a {type(tensor).__name__}")
        if id(tensor) not in self._numbers:
            self._numbers[id(tensor)] = len(self.tensors)
            self._kept.append(tensor)
            self.tensors.append(tensor.detach())
        kind = "parameter" if isinstance(tensor, nn.Parameter) else "tensor"
        return {kind: self._numbers[id(tensor)], "trains": tensor.requires_grad and tensor.is_leaf}

    def value(self, value: Any, where: str) -> Any:
        """An attribute as JSON: plain values as they are, others as a mapping of one key."""
        if type(value) in _PLAIN or (type(value) is float and math.isfinite(value)):
            return value
        if type(value) is float:
            return {"float": repr(value)}
        if type(value) is list:
            return [self.value(item, f"{where}[{i}]") for i, item in enumerate(value)]
        if type(value) in (tuple, torch.Size):
            kind = "tuple" if type(value) is tuple else "size"
            return {kind: [self.value(item, f"{where}[{i}]") for i, item in enumerate(value)]}
        if type(value) in (dict, OrderedDict):
            items = [
                [self.value(key, where), self.value(item, f"{where}[{key!r}]")]
                for key, item in value.items()
            ]
            return {"dict": items}
        if isinstance(value, Tensor):
            return self._tensor(value, where)
        if isinstance(value, nn.Module):
            return {"module": self.module(value, where)}
        if isinstance(value, (torch.dtype, torch.device)):
            return {type(value).__name__: str(value).removeprefix("torch.")}
        if callable(value) and (name := self._names.get(id(value))) is not None:
            return {"known": name}
        if type(value) is slice:
            parts = (value.start, value.stop, value.step)
            return {"slice": [self.value(part, where) for part in parts]}
        if (name := self._names.get(id(type(value)))) is not None:
            # what reduces itself to its class remembers nothing, such as a cache
            remembers = getattr(type(value), "__reduce__", None) is object.__reduce__
            held = vars(value) if remembers else {}
            attributes = {key: self.value(item, f"{where}.{key}") for key, item in held.items()}
            return {"object": [name, attributes]}
        own: Any = value if isinstance(value, FunctionType) else type(value)
        raise NotDescribed(f"{where} is {own.__qualname__} of {own.__module__}")


class Rebuilding:
    """From plain data to modules.

    Args:
        modules: what :class:`Describing` found.
        tensors: by their numbers.

    Raises:
        ValueError: a class or function that is not of the closed set, or no description at all.
    """

    def __init__(self, modules: list[dict[str, Any]], tensors: list[Tensor]) -> None:
        self._stored = tensors
        self._made: dict[int, Tensor] = {}
        self._known = _known()
        self.modules: list[nn.Module] = []
        for described in modules:  # all of them first: they may be in each other
            kind = self._lookup(described["class"])
            if not _is(kind):
                raise ValueError(f"{described['class']!r} is no class of modules")
            self.modules.append(object.__new__(kind))
        for module, described in zip(self.modules, modules, strict=True):
            nn.Module.__init__(module)
            self._fill(module, described)

    def _fill(self, module: nn.Module, described: dict[str, Any]) -> None:
        attributes = {key: self._value(value) for key, value in described["attributes"].items()}
        if overlap := _INTERNAL.intersection(attributes):
            raise ValueError(f"attribute {min(overlap)!r} is the module's own")
        internal = {key: vars(module)[key] for key in _INTERNAL}
        for key, held in described["parameters"].items():
            internal["_parameters"][key] = held if held is None else self._tensor(held)
        for key, held in described["buffers"].items():
            internal["_buffers"][key] = held if held is None else self._tensor(held)
        for key, number in described["parts"].items():
            internal["_modules"][key] = None if number is None else self.modules[number]
        internal["_non_persistent_buffers_set"] = set(described["transient"])
        internal["training"] = bool(described["training"])
        # as unpickling does, so that a class may take over what an older torch has written
        module.__setstate__({**internal, **attributes})

    def _tensor(self, held: dict[str, Any]) -> Tensor:
        is_parameter = "parameter" in held
        number = held["parameter"] if is_parameter else held["tensor"]
        if number not in self._made:
            tensor = self._stored[number]
            made = nn.Parameter(tensor, held["trains"]) if is_parameter else tensor
            self._made[number] = made if is_parameter else made.requires_grad_(held["trains"])
        return self._made[number]

    def _value(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._value(item) for item in value]
        if not isinstance(value, dict):
            return value
        if "parameter" in value or "tensor" in value:
            return self._tensor(value)
        ((kind, inner),) = value.items()
        if kind == "float":
            return float(inner)
        if kind in ("tuple", "size"):
            items = [self._value(item) for item in inner]
            return tuple(items) if kind == "tuple" else torch.Size(items)
        if kind == "dict":
            return {self._value(key): self._value(item) for key, item in inner}
        if kind == "module":
            return self.modules[inner]
        if kind == "slice":
            return slice(*inner)
        if kind == "object" and _is_plain(self._lookup(inner[0])):
            made = object.__new__(self._lookup(inner[0]))
            vars(made).update({key: self._value(item) for key, item in inner[1].items()})
            return made
        if kind == "dtype" and isinstance(dtype := getattr(torch, inner), torch.dtype):
            return dtype
        if kind == "device":
            return torch.device(inner)
        if kind == "known":
            return self._lookup(inner)
        raise ValueError(f"{kind!r} is no kind of value")

    def _lookup(self, name: str) -> Any:
        try:
            return self._known[name]
        except KeyError:
            raise ValueError(f"{name!r} is no class or function of ppvae or torch.nn") from None
