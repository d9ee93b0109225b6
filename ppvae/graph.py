"""One compiled graph of a computation with a module, and what keeps one honest.

A Pyro program is static Python around tensors: once traced, neither Pyro nor Python is left. What
a graph must not contain are values that change, so every tensor that the traced function reaches
is an input of its graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae.pairs import NotCompiled, seeded

Graph = Callable[..., Sequence[Tensor]]


def compile_graph(function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> Graph:
    """One compiled graph of a function of tensors, for inputs of these shapes.

    Tensors that the function reaches otherwise are read anew at each call. Draws follow
    ``torch.manual_seed`` and are those of the function run eagerly.

    Raises:
        NotCompiled: the function looks at a tensor's value, or there is no C++ compiler.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    inputs = [tensor.detach() for tensor in inputs]
    try:
        traced = make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*inputs)
        reached = _lift_constants(traced)
        with torch.no_grad(), config.patch(fallback_random=True), seeded(0, *inputs):
            compiled = compile_fx(traced, [*inputs, *reached])
            compiled(*_copies(inputs), *_copies(reached))  # what is left to compile is compiled now
    except Exception as error:  # whatever the tracer and the compiler raise: there is no list
        raise NotCompiled(_reason(error)) from error

    def graph(*inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs: Sequence[Tensor] = compiled(*inputs, *reached)
        return outputs

    return graph


def _lift_constants(traced: GraphModule) -> list[Tensor]:
    """Make every tensor that a graph holds an input of it; returns them, in the order of inputs."""
    held: dict[str, list[Any]] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and isinstance(getattr(traced, node.target, None), Tensor):
            held.setdefault(node.target, []).append(node)
    last = [node for node in traced.graph.nodes if node.op == "placeholder"][-1]
    for name, nodes in held.items():
        with traced.graph.inserting_after(last):
            last = traced.graph.placeholder(f"reached_{name.strip('_')}")
        for node in nodes:
            node.replace_all_uses_with(last)
            traced.graph.erase_node(node)
    traced.recompile()
    return [getattr(traced, name) for name in held]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    first = lines[0] if lines else ""
    if "compiler" in str(error).lower() and "c++" in str(error).lower():
        return f"no working C++ compiler was found ({first}); install g++ or clang"
    hint = ""
    if any(word in str(error) for word in ("_local_scalar_dense", "item()", "data-dependent")):
        hint = (
            "; a program or the loss looks at a tensor's value (.item(), float(t), if t > 0, "
            "nonzero), which a graph cannot: use torch.where and tensors of fixed shape"
        )
    return f"{type(error).__name__}: {first[:300]}{hint}"


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Put the tensors of a module that are no parameters, and an estimator's state, back."""
    state: Any = getattr(module, "state", None)
    attributes = [value for _, _, value in _attributes(module)]
    tensors = [*module.buffers(), *attributes]
    kept, known = _copies(tensors), vars(state).copy() if state is not None else {}
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        if state is not None:
            vars(state).clear()
            vars(state).update(known)


@contextmanager
def standing_in(
    module: nn.Module, originals: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Run a module with other tensors as its parameters and buffers, shared ones included.

    Raises:
        NotCompiled: the module assigns one of its tensors anew, which a graph cannot.
    """
    replacement = {id(old): new for old, new in zip(originals, tensors, strict=True)}
    places = [
        (owned, name, value)
        for part in module.modules()
        for owned in (part._parameters, part._buffers)
        for name, value in owned.items()
        if id(value) in replacement
    ]
    attributes = list(_attributes(module))
    try:
        for owned, name, value in places:
            owned[name] = replacement[id(value)]  # type: ignore[assignment]
        yield
        assigned = [
            name for owned, name, value in places if owned[name] is not replacement[id(value)]
        ]
        assigned += [name for part, name, value in attributes if vars(part)[name] is not value]
        if assigned:
            raise NotCompiled(
                f"a module assigns its tensor {assigned[0]!r} anew in forward, which a graph would "
                f"lose; change it in place: self.{assigned[0]}.copy_(...), and make it a buffer"
            )
    finally:
        for owned, name, value in places:
            owned[name] = value
        for part, name, value in attributes:
            vars(part)[name] = value


def _attributes(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors that are plain attributes, neither parameters nor buffers."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, Tensor):
                yield part, name, value
