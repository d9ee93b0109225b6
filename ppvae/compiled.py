"""Tracing a whole computation with a pair, gradient included, into one compiled graph.

A Pyro program is static Python around tensors: once traced, neither Pyro nor Python is left in
the step. What a graph must not contain are values that change. Parameters, buffers, arguments and
every other tensor that the programs reach are its inputs; weights that follow a schedule are
tensors too (:meth:`ppvae.elbo.estimator.State.at_step`); everything else that is baked in is in
the key under which a graph is kept.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from tqdm.auto import tqdm

from ppvae.pairs import seeded
from ppvae.program import local_parameters, require_own_parameters

Graph = Callable[..., Sequence[Tensor]]


class NotCompiled(RuntimeError):
    """A computation cannot be compiled; the message says why."""


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


class CompiledGradients:
    """Loss and gradient of an objective by compiled graphs, one for each thing baked in.

    A graph is built at the first step with arguments of its shapes, in the modes the modules are
    in, and compared with an eager step at the same draws before it is used.

    Args:
        objective: a module whose ``forward(*args)`` is the loss.
        required: raise where no graph can be built, instead of running eagerly.

    Attributes:
        build_seconds: time spent building graphs.
        reason: why steps run eagerly, where they do; None otherwise.
    """

    max_graphs = 8

    def __init__(self, objective: nn.Module, required: bool) -> None:
        self.objective, self.required = objective, required
        self.build_seconds = 0.0
        self.reason: str | None = None
        self._graphs: dict[Any, _Step | None] = {}
        self._modules = list(objective.modules())
        self._parameters = list(objective.parameters())

    def __call__(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The loss, with the gradients in the parameters' ``grad``; None: run eagerly.

        Raises:
            NotCompiled: no graph can be built, and one is required.
        """
        key = self._key(args, kwargs)
        try:
            step = self._graphs[key]
        except KeyError:
            step = self._graphs[key] = self._build(args, kwargs)
        except TypeError:
            step = self._refuse("an argument that is no tensor is not hashable")
        return step(args) if step is not None else None

    def _key(self, args: tuple, kwargs: dict) -> Any:
        """What a graph depends on besides the values of tensors."""
        first = self._parameters[0]
        device = first.device.type
        return (
            tuple(_kind(arg) for arg in args),
            tuple((name, _kind(arg)) for name, arg in kwargs.items()),
            tuple([module.training for module in self._modules]),
            tuple([parameter.requires_grad for parameter in self._parameters]),
            first.dtype,
            first.device,
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        )

    def _build(self, args: tuple, kwargs: dict) -> _Step | None:
        if any(isinstance(arg, Tensor) for arg in kwargs.values()):
            return self._refuse("tensors are passed by keyword; pass them by position")
        if len(self._graphs) >= self.max_graphs:
            return self._refuse(
                f"there are {self.max_graphs} graphs already, for other shapes or modes; give the "
                "batches one size"
            )
        started = time.perf_counter()
        with tqdm(total=3, desc="compiling the step", leave=False, disable=None) as bar:
            try:
                step = _Step(self.objective, args, kwargs, bar.update)
            except NotCompiled as error:
                return self._refuse(str(error))
            finally:
                self.build_seconds += time.perf_counter() - started
        return step

    def _refuse(self, reason: str) -> None:
        if self.required:
            raise NotCompiled(f"compile=True, but the step cannot be compiled: {reason}")
        if self.reason is None:
            warnings.warn(f"some steps run eagerly: {reason}", RuntimeWarning, stacklevel=5)
        self.reason = reason


class _Step:
    """One graph: loss and gradients for arguments of one kind."""

    def __init__(
        self, objective: nn.Module, args: tuple, kwargs: dict, progress: Callable[[], Any]
    ) -> None:
        self.objective = objective
        self.state: Any = getattr(objective, "state", None)  # Pyro's own objectives have none
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.inputs: list[Tensor] = [*self.parameters, *objective.buffers()]
        self.positions = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        used: list[bool] = []
        weighs: list[bool] = []

        def loss_and_gradients(*inputs: Tensor) -> list[Tensor]:
            given = list(args)
            for position, tensor in zip(self.positions, inputs[len(self.inputs) :], strict=True):
                given[position] = tensor
            with torch.enable_grad(), local_parameters(), pyro.validation_enabled(False):
                wanted = [t.detach().requires_grad_() for t in inputs[: len(self.parameters)]]
                buffers = inputs[len(self.parameters) : len(self.inputs)]
                with _in_place_of(objective, self.inputs, [*wanted, *buffers]):
                    loss = objective(*given, **kwargs)
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            used[:] = [gradient is not None for gradient in gradients]
            weight = getattr(self.state, "weight", None)
            weighs[:] = [weight is not None]
            outputs = [loss.detach(), *(g for g in gradients if g is not None)]
            return outputs if weight is None else [*outputs, weight.detach().clone()]

        tensors = [args[i] for i in self.positions]
        like = self.parameters[0]
        traced = self.state.traced(like) if self.state is not None else nullcontext([])
        with traced as self.slots:
            self.graph = compile_graph(loss_and_gradients, [*self.inputs, *tensors])
        progress()
        self.used, self.weighs = used, weighs[0]
        self._check(args, kwargs)
        progress()

    def __call__(self, args: tuple) -> Tensor:
        for schedule, slot in self.slots:
            slot.fill_(schedule(self.state.num_steps))
        loss, *outputs = self.graph(*self.inputs, *(args[i] for i in self.positions))
        if self.weighs:
            self.state.weight = outputs.pop()
        gradients = iter(outputs)
        for parameter, used in zip(self.parameters, self.used, strict=True):
            parameter.grad = next(gradients) if used else None
        if self.state is not None and self.state.training:
            self.state.num_steps += 1
        return loss

    def _check(self, args: tuple, kwargs: dict) -> None:
        """Compare with an eager loss and gradient at the same draws.

        Raises:
            NotCompiled: they differ by more than rounding.
        """
        with unmoved(self.objective), seeded(0, *self.parameters):
            with local_parameters(), pyro.validation_enabled(False):
                loss = self.objective(*args, **kwargs)
                require_own_parameters(loss, self.objective)
                gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        with unmoved(self.objective), seeded(0, *self.parameters):
            found = self(args)
        computed = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        half = torch.is_autocast_enabled(loss.device.type)
        tolerance = 0.1 if half else 1e-3 if loss.dtype == torch.float32 else 1e-9
        largest = max(float(g.norm()) for g in gradients if g is not None)
        for eager, compiled in zip([loss, *gradients], [found, *computed], strict=True):
            if eager is None or compiled is None:
                same = eager is compiled
            else:
                eager = eager.detach()
                error = float((eager - compiled).norm())
                same = not error > tolerance * float(eager.norm()) + 1e-3 * tolerance * largest
            if not same:
                raise NotCompiled(
                    f"at the same draws the compiled loss is {float(found)}, the eager one "
                    f"{float(loss)}, and a gradient differs by more than rounding; this is a fault "
                    "of the compiler or of a program that changes from call to call"
                )


@contextmanager
def unmoved(objective: nn.Module) -> Iterator[None]:
    """Put the buffers of an objective, and its estimator's state, back on leaving."""
    state: Any = getattr(objective, "state", None)
    buffers = list(objective.buffers())
    kept, known = _copies(buffers), vars(state).copy() if state is not None else {}
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
        if state is not None:
            vars(state).update(known)


@contextmanager
def _in_place_of(
    module: nn.Module, originals: Sequence[Tensor], tensors: Sequence[Tensor]
) -> Iterator[None]:
    """Run a module with other tensors as its parameters and buffers, shared ones included."""
    replacement = {id(old): new for old, new in zip(originals, tensors, strict=True)}
    places = [
        (owned, name, value)
        for part in module.modules()
        for owned in (part._parameters, part._buffers)
        for name, value in owned.items()
        if id(value) in replacement
    ]
    try:
        for owned, name, value in places:
            owned[name] = replacement[id(value)]  # type: ignore[assignment]
        yield
    finally:
        for owned, name, value in places:
            owned[name] = value


def _kind(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.shape, arg.stride(), arg.dtype, arg.device
    return arg
