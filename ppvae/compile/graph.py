"""One compiled graph of a function, and what keeps it right.

A Pyro program is static Python around tensors: once traced, neither Pyro nor Python is left. A
graph must not contain values that change, so every tensor that the function uses is an input.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae.compile.passes import DECOMPOSITIONS, rewrite
from ppvae.pairs import NotCompiled, seeded

INTERNAL = set(vars(nn.Module()))  # attributes that every module has
LARGEST_CPP = 4_000  # nodes of a graph that is one piece of C++
# Operators that look at a value on the device, so that no CUDA graph can have them.
_WAITING = {"_linalg_check_errors", "_local_scalar_dense", "multinomial", "nonzero"}


class Graph:
    """One compiled graph of a function of tensors, for inputs of these shapes.

    Other tensors that the function uses are read anew at each call. Draws follow
    ``torch.manual_seed`` and are those of the function run eagerly, if all of them are used.

    Args:
        function: from tensors to a list of tensors.
        inputs: tensors of the shapes it will be called with.
        differentiates: whether the function does.
        compiles: False: leave the graph to Python, as it was traced.

    Attributes:
        reached: tensors that the function uses besides its inputs.
        waits: an operator in it that waits for a GPU, by name; "": none is known to.
        traced: the graph, where it is not compiled.

    Raises:
        NotCompiled: the function looks at a tensor's value, or there is no C++ compiler.

    Example:
        >>> graph = Graph(lambda x: [x.square().sum()], [torch.ones(3)])
        >>> graph(torch.full((3,), 2.0))
        [tensor(12.)]
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor],
        differentiates: bool = True,
        compiles: bool = True,
    ) -> None:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        inputs = [tensor.detach() for tensor in inputs]
        _keep_memory_between_calls()
        try:
            # a fake tensor has a shape and no value, so no value can become part of the graph
            trace = make_fx(
                function,
                decomposition_table=DECOMPOSITIONS,
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )
            traced = trace(*inputs)
            self.reached = _lift_constants(traced)
            self.waits = _waiting(traced)
            if not compiles:
                self.traced = self._call = traced
                return
            rewrite(traced, differentiates)
            options = {
                "fallback_random": True,
                # calls are made from C++, not from Python; a large piece takes long to compile
                "cpp_wrapper": _on_cpu(traced) and len(traced.graph.nodes) <= LARGEST_CPP,
                "reorder_for_peak_memory": False,  # it would change the order of draws
                "layout_optimization": False,  # convolutions take images as the eager step does
                "cpp.min_chunk_size": 4096,  # numbers from which a second thread is worth waking
            }
            if not _on_cpu(traced):  # what is timed on a GPU may come out another way each time
                options["shape_padding"] = False
                if hasattr(config, "deterministic"):  # since torch 2.9
                    options["deterministic"] = True
            with torch.no_grad(), config.patch(options), seeded(0, *inputs), _without_remarks():
                compiler = cast(Callable[..., Any], compile_fx)
                self._call = compiler(traced, [*inputs, *self.reached])
                # The first call compiles the rest. It may write on buffers, so it is given copies;
                # a tensor whose copy has another layout, which no buffer has, it gets itself.
                tensors = [*inputs, *self.reached]
                pairs = zip(copies(tensors), tensors, strict=True)
                self._call(*(c if c.stride() == t.stride() else t for c, t in pairs))
        except NotCompiled:
            raise
        except Exception as error:  # nobody lists what the tracer and the compiler raise
            raise NotCompiled(_reason(error)) from error

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        try:
            with torch.no_grad():
                outputs: Sequence[Tensor] = self._call(*inputs, *self.reached)
        except RuntimeError as error:
            if type(error) is not RuntimeError:
                raise
            # C++ raises this whatever the error was, and adds its stack to the text
            text = _text(error)
            singular = text.startswith("linalg.")
            kind: Any = torch.linalg.LinAlgError if singular else RuntimeError  # type: ignore[attr-defined]
            raise kind(text) from None
        return outputs


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Silence what the compiler says of its own code, and that TF32 would be faster.

    Of its code: deprecated calls, indirect operators. TF32 is the user's to choose.
    """
    log = logging.getLogger("torch._inductor.ir")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.filterwarnings("ignore", "TensorFloat32", UserWarning)
            yield
    finally:
        log.setLevel(level)


def _text(error: BaseException) -> str:
    """The text of an error without the stack of C++ functions that torch may add."""
    return str(error).partition("Exception raised from")[0].strip()


def _on_cpu(traced: GraphModule) -> bool:
    """Whether no tensor of a graph is elsewhere."""
    values = [node.meta.get("val") for node in traced.graph.nodes]
    return all(value.is_cpu for value in values if isinstance(value, Tensor))


def _waiting(traced: GraphModule) -> str:
    """An operator of a graph that would wait for a GPU; "" if none is known to."""
    schemas = [getattr(node.target, "_schema", None) for node in traced.graph.nodes]
    names = [schema.name.partition("::")[2] for schema in schemas if schema is not None]
    return next((name for name in names if name in _WAITING), "")


def _keep_memory_between_calls() -> None:
    """Have glibc keep up to 64 MB of freed memory instead of returning it to the system.

    It keeps twice the largest block, of at most 32 MB, that it has seen freed, so one such block is
    freed here; nothing is written to it, so it costs nothing. A graph frees its intermediates at
    each call. Without this the next call gets new pages, which the system has to zero: with 50
    particles that took a tenth of a step.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


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
            last.meta["val"] = getattr(traced, name)
        for node in nodes:
            node.replace_all_uses_with(last)
            traced.graph.erase_node(node)
    traced.recompile()
    return [getattr(traced, name) for name in held]


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values, in memory of their own."""
    return [tensor.detach().clone() for tensor in tensors]


def _reason(error: BaseException) -> str:
    """What a failure of the tracer or the compiler means, with a cure where one is known."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    names, texts = [type(e).__name__ for e in chain], [_text(e) for e in chain]
    first_line = next((text.splitlines()[0] for text in texts if text), "")
    everything = " ".join([*names, *texts])
    if "cxx" in everything.lower() or "c++ compiler" in everything.lower():
        return f"no working C++ compiler was found ({first_line[:200]}); install g++ or clang"
    hint = ""
    if "DataDependent" in everything or "item()" in everything or "_local_scalar" in everything:
        hint = (
            "; a program or the loss looks at a tensor's value (.item(), float(t), if t > 0, "
            "nonzero), which a graph cannot: use torch.where and tensors of fixed shape"
        )
    elif "SymInt" in everything:
        hint = "; a loop over pyro.plate(...) asks for values: loop over range(n), or vectorise it"
    return f"{names[0]}: {first_line[:300]}{hint}"


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """On leaving, put back all that a module holds except the values of its parameters."""
    parts = [(part, vars(part).copy(), part._buffers.copy()) for part in module.modules()]
    containers = [  # a program may append to them, or count in them
        (value, copy.copy(value))
        for part in module.modules()
        for name, value in vars(part).items()
        if type(value) in (list, dict) and name not in INTERNAL
    ]
    tensors = [value for _, _, value in attributes(module)]
    kept = copies(tensors)
    try:
        yield
    finally:
        for part, own, buffers in parts:
            vars(part).clear()
            vars(part).update(own)
            part._buffers.clear()
            part._buffers.update(buffers)
        for value, content in containers:
            value.clear()
            value.extend(content) if isinstance(value, list) else value.update(content)
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def attributes(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where a module has tensors that are not parameters: owner, name and tensor of each."""
    for part in module.modules():
        for owned in (part._buffers, vars(part)):
            for name, value in list(owned.items()):
                if isinstance(value, Tensor):
                    yield owned, name, value


@contextmanager
def standing_in(
    module: nn.Module, originals: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Run a module with other tensors as its parameters and buffers, shared ones included.

    Raises:
        NotCompiled: the module assigns one of them anew, which a graph would lose.
    """
    replacement = {id(old): new for old, new in zip(originals, tensors, strict=True)}
    places: list[tuple[dict[str, Any], str, Tensor]] = [
        (owned, name, value)
        for part in module.modules()
        for owned in cast("list[dict[str, Any]]", [part._parameters, part._buffers])
        for name, value in owned.items()
        if id(value) in replacement
    ]
    try:
        for owned, name, value in places:
            owned[name] = replacement[id(value)]
        yield
        for owned, name, value in places:
            if owned[name] is not replacement[id(value)]:
                raise _assigned(name)
    finally:
        for owned, name, value in places:
            owned[name] = value


def require_kept(places: Sequence[tuple[dict[str, Any], str, Tensor]], graph: Graph) -> None:
    """Raise :class:`NotCompiled` if an attribute that a graph reads now holds another tensor.

    One that is only written, such as the caches of Pyro's flows, does no harm.

    Args:
        places: what :func:`attributes` yielded before the graph was traced.
        graph: that was traced since.
    """
    read = {id(tensor) for tensor in graph.reached}
    for owned, name, value in places:
        if owned.get(name) is not value and id(value) in read:
            raise _assigned(name)


def _assigned(name: str) -> NotCompiled:
    return NotCompiled(
        f"a module assigns its tensor {name!r} anew in forward, which a graph would lose; change "
        f"it in place: self.{name}.copy_(...)"
    )
