"""Graphs of a whole computation with a pair, gradient included: when one is built and used.

A graph must not contain values that change. Parameters, buffers, arguments and all other tensors
that the programs use are its inputs, and a weight that follows a schedule is a tensor, too
(:meth:`ppvae.elbo.State.at_step`). Whatever else is fixed in a graph, such as shapes, numbers and
modes, is part of the key under which it is kept.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ppvae.auxiliary import own_parameters
from ppvae.compile import cuda_graph
from ppvae.compile.fixed import Fixed
from ppvae.compile.graph import (
    Graph,
    attributes,
    copies,
    require_kept,
    standing_in,
    unmoved,
)
from ppvae.pairs import NotCompiled, Program, seeded
from ppvae.program import local_parameters, require_own_parameters
from ppvae.weights import log_weights

_UNKNOWN = object()


class Compiled:
    """A computation with a module by compiled graphs, one for each set of fixed values.

    A graph is built at the first call with arguments of such shapes, and modules in such modes. It
    is compared with an eager run at the same draws before it is used.

    Args:
        module: holds all parameters and buffers.
        build: ``build(module, args, kwargs, progress)`` makes what is called with ``args``:
            :class:`CompiledGradients`, :class:`CompiledOutputs` or :class:`CompiledWeights`.
        required: raise where no graph can be built, instead of running eagerly.
        programs: model and guide, whose functions may read names from outside.
        fixed: what is looked at of module and programs, renewed by the caller before each call;
            None: one of its own.

    Attributes:
        build_seconds: time spent building graphs.
        reason: why steps run eagerly, where they do; None otherwise.
        latest: the graph that the last call ran; None: it ran none, the caller runs eagerly.
    """

    max_graphs = 8

    def __init__(
        self,
        module: nn.Module,
        build: Callable[..., Any],
        required: bool,
        programs: Sequence[Program] = (),
        fixed: Fixed | None = None,
    ) -> None:
        self.module, self.build, self.required = module, build, required
        self.programs = programs
        self.build_seconds = 0.0
        self.reason: str | None = None
        self.latest: Any = None
        self._graphs: dict[Any, Any] = {}
        self._fixed, self._renews = fixed or Fixed(module, programs), fixed is None
        self._alive: list[Any] = []  # what keys know by its address

    def __deepcopy__(self, memo: dict[int, Any]) -> Compiled:
        """A copy has its own modules, so it builds graphs of its own."""
        module, build, programs = copy.deepcopy((self.module, self.build, self.programs), memo)
        return Compiled(module, build, self.required, programs)

    def __call__(self, args: tuple, kwargs: dict) -> Any:
        """What the graph computes; None: run eagerly.

        Raises:
            NotCompiled: no graph can be built, and one is required.
        """
        self.latest = None
        key = self.key(args, kwargs)
        try:
            graph = self._graphs.get(key, _UNKNOWN)  # one lookup: a key is long
        except TypeError:
            self._refuse("an argument that is no tensor is not hashable")
            return None
        if graph is _UNKNOWN:
            if len(self._graphs) >= self.max_graphs:
                self._refuse(
                    f"{self.max_graphs} graphs were tried, and this step differs from all in the "
                    "shape of an argument, in a number or mode, or in what has been replaced; give "
                    "batches one size, and make a number that changes a tensor, filled in place"
                )
                return None
            graph = self._graphs[key] = self._build(args, kwargs)
            self._alive.append(self._fixed.objects())
        self.latest = graph
        return graph(args) if graph is not None else None

    def advance(self, key: Any) -> None:
        """What a step does outside its graph; for a step that is replayed."""
        self._graphs[key].advance()

    def tensors(self, key: Any) -> list[Tensor] | None:
        """What the graph of a key reads besides its arguments; None: there is none."""
        try:
            graph = self._graphs.get(key)
        except TypeError:  # an argument is not hashable
            return None
        return None if graph is None else [*graph.inputs, *graph.graph.reached]

    def key(self, args: tuple, kwargs: dict) -> Any:
        """What a graph depends on besides the values of tensors."""
        if self._renews:
            self._fixed.renew()
        parameter = next(iter(self._fixed.parameters), None)
        tensors = [t for t in (parameter, *args) if isinstance(t, Tensor)]
        device = tensors[0].device.type if tensors else "cpu"
        return (
            kinds(args),
            tuple((name, _kind(arg)) for name, arg in kwargs.items()),
            self._fixed.key(),
            None if parameter is None else (parameter.dtype, parameter.device),
            torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
            _precision(device),
        )

    def _build(self, args: tuple, kwargs: dict) -> Any:
        if any(_holds_tensor(arg) for arg in kwargs.values()) or any(
            _holds_tensor(arg) for arg in args if not isinstance(arg, Tensor)
        ):
            self._refuse("tensors are passed by keyword or inside a tuple; pass them by position")
            return None
        started = time.perf_counter()
        with tqdm(total=2, desc="compiling", leave=False, disable=None) as bar:
            try:
                return self.build(self.module, args, kwargs, bar.update)
            except NotCompiled as error:
                self._refuse(str(error))
                return None
            finally:
                self.build_seconds += time.perf_counter() - started

    def _refuse(self, reason: str) -> None:
        if self.required:
            raise NotCompiled(f"compile=True, but no graph can be built: {reason}")
        if self.reason is None:
            warnings.warn(
                f"not compiled, so it runs eagerly: {reason}", RuntimeWarning, stacklevel=5
            )
        self.reason = reason


class CompiledGradients:
    """The loss of an objective, with the gradients in its parameters' ``grad``, by one graph.

    Args:
        objective: a module whose ``forward(*args)`` is the loss.
        args, kwargs: what it is called with; the graph is for tensors of these shapes.
        progress: called after each part of the work.
        compiles: False: leave the graph to Python.

    Attributes:
        parameters: what it differentiates by.
        norm: of the gradient of the last call; None on a GPU, where torch's own takes two kernels
            for all tensors, and a graph one or two for each.

    Raises:
        NotCompiled: no graph can be built, or it gives another loss or gradient.
    """

    norm: Tensor | None

    def __init__(
        self,
        objective: nn.Module,
        args: tuple,
        kwargs: dict,
        progress: Callable[[], Any],
        compiles: bool = True,
    ) -> None:
        self.objective = objective
        self.state: Any = getattr(objective, "state", None)  # Pyro's own objectives have none
        trained = own_parameters(getattr(objective, "trains", objective))  # of a part of it
        self.parameters = [p for p in trained.values() if p.requires_grad]
        self.inputs: list[Tensor] = [*self.parameters, *objective.buffers()]
        self.positions = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        self._kinds = kinds(args)
        self.has_norm = not cuda_graph.is_gpu(self.parameters[0])
        used: list[bool] = []
        shown: list[str] = []

        def loss_and_gradients(*inputs: Tensor) -> list[Tensor]:
            given = list(args)
            for position, tensor in zip(self.positions, inputs[len(self.inputs) :], strict=True):
                given[position] = tensor
            with torch.enable_grad(), local_parameters(), pyro.validation_enabled(False):
                wanted = [t.detach().requires_grad_() for t in inputs[: len(self.parameters)]]
                buffers = inputs[len(self.parameters) : len(self.inputs)]
                with standing_in(objective, self.inputs, [*wanted, *buffers]):
                    loss = objective(*given, **kwargs)
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            used[:] = [gradient is not None for gradient in gradients]
            weights = getattr(self.state, "shown", {})
            shown[:] = weights
            taken = {tensor.untyped_storage()._cdata for tensor in inputs}
            outputs = [loss.detach()]
            if self.has_norm:
                outputs.append(nn.utils.get_total_norm([g for g in gradients if g is not None]))
            for parameter, gradient in zip(wanted, gradients, strict=True):
                if gradient is not None:
                    outputs.append(in_own_memory(gradient, parameter, taken))
            return [*outputs, *(weight.detach().clone() for weight in weights.values())]

        tensors = [args[i] for i in self.positions]
        like = self.parameters[0]
        traced = self.state.traced(like) if self.state is not None else nullcontext([])
        with traced as self.slots:
            first = self.eager(args, kwargs)  # which also makes the slots
            with unmoved(objective):
                owned = list(attributes(objective))
                self.graph = Graph(loss_and_gradients, [*self.inputs, *tensors], compiles=compiles)
                require_kept(owned, self.graph)
            progress()
            again = self.eager(args, kwargs)  # modules with a cache, as an LSTM, notice a trace
        self.used, self.shown = used, shown
        if _difference(first.values, again.values) is not None:
            raise NotCompiled("the program changes from call to call, at the same draws")
        self._compare(again, args, kwargs)
        progress()

    def __call__(self, args: tuple) -> Tensor:
        if not (cuda_graph.is_gpu(self.parameters[0]) and cuda_graph.capturing()):
            self.advance()  # a captured graph would keep this step's numbers
        loss, *outputs = self.graph(*self.inputs, *(args[i] for i in self.positions))
        self.norm = outputs.pop(0) if self.has_norm else None
        if self.shown:
            outputs, weights = outputs[: -len(self.shown)], outputs[-len(self.shown) :]
            self.state.shown.update(zip(self.shown, weights, strict=True))
        gradients = iter(outputs)
        for parameter, used in zip(self.parameters, self.used, strict=True):
            parameter.grad = next(gradients) if used else None
        return loss

    def takes(self, args: tuple) -> bool:
        """Whether arguments are of the shapes, types and values that the graph is for."""
        return kinds(args) == self._kinds

    def advance(self) -> None:
        """Fill in the schedules' values of this step, and count it."""
        for schedule, slot in self.slots:
            slot.fill_(schedule(self.state.step))
        if self.state is not None and self.state.training:
            self.state.count()

    def eager(self, args: tuple, kwargs: dict) -> Outcome:
        """What an eager step gives, with a seed."""
        with unmoved(self.objective), seeded(0, *self.parameters), torch.enable_grad():
            kept = Kept(self.objective)
            with local_parameters(), pyro.validation_enabled(False):
                loss = self.objective(*args, **kwargs)
                require_own_parameters(loss, self.objective)
                gradients = torch.autograd.grad(loss, self.parameters, allow_unused=True)
            return Outcome([loss.detach(), *gradients], kept.changes())

    def _compare(self, expected: Outcome, args: tuple, kwargs: dict) -> None:
        """Compare the graph with the eager step at the same draws."""
        with unmoved(self.objective), seeded(0, *self.parameters):
            kept = Kept(self.objective)
            values = [self(args), *(parameter.grad for parameter in self.parameters)]
            found = Outcome(values, kept.changes())
        for parameter in self.parameters:
            parameter.grad = None
        self.judge(expected, found, args, kwargs)

    def judge(self, expected: Outcome, found: Outcome, args: tuple, kwargs: dict) -> None:
        """Raise :class:`NotCompiled` unless an outcome is the eager one up to rounding."""
        different = self._apart(expected, found)
        if different and not self._is_rounding(expected, found, args, kwargs):
            raise NotCompiled(f"at the same draws {different}, which is more than rounding")

    @staticmethod
    def _apart(expected: Outcome, found: Outcome) -> str:
        """How the outcome of a graph differs from that of an eager step; "": not."""
        different = _difference(expected.values, found.values)
        if different is not None:
            return (
                f"the compiled loss is {found.values[0]}, the eager one {expected.values[0]}, and "
                f"they or a gradient differ by {different:.2g} of its norm"
            )
        return _different_changes(expected.changes, found.changes)

    @torch.no_grad()
    def _is_rounding(self, expected: Outcome, found: Outcome, args: tuple, kwargs: dict) -> bool:
        """Whether the graph computes what the eager step does at parameters a last bit away.

        Where a unit is at the kink of its ReLU, the last bit decides which slope it has. And where
        many layers of batch norm pass rounding on, gradients move by some last bits of parameters
        far more than by one of their own: ten times the least of that, and 0.5 % at most, is no
        difference.
        """
        generator, kept = torch.Generator().manual_seed(0), copies(self.parameters)
        apart, moved = _relative(expected.values, found.values), math.inf
        same_changes = not _different_changes(expected.changes, found.changes)
        try:
            for attempt in range(16):
                for parameter, value in zip(self.parameters, kept, strict=True):
                    sign = 2 * torch.randint(2, value.shape, generator=generator) - 1
                    parameter.copy_(value * (1 + sign.to(value) * torch.finfo(value.dtype).eps))
                near = self.eager(args, kwargs)
                if not self._apart(near, found):
                    return True
                moved = min(moved, _relative(expected.values, near.values))
                if attempt >= 2 and same_changes and apart <= min(10 * moved, 0.005):
                    return True
        finally:
            for parameter, value in zip(self.parameters, kept, strict=True):
                parameter.copy_(value)
        return False


class CompiledOutputs:
    """The tensors that a function gives without gradient, by one graph.

    Args:
        function: called with ``args`` and ``kwargs``; gives a list of tensors, or none.
        module: owns all parameters and buffers that it uses.
        args, kwargs, progress: as :class:`CompiledGradients` has them.

    Raises:
        NotCompiled: as :class:`CompiledGradients`.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        progress: Callable[[], Any],
    ) -> None:
        self.inputs: list[Tensor] = [*module.parameters(), *module.buffers()]
        self.positions = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]

        def outputs(*inputs: Tensor) -> list[Tensor]:
            given = list(args)
            for position, tensor in zip(self.positions, inputs[len(self.inputs) :], strict=True):
                given[position] = tensor
            with torch.no_grad(), local_parameters(), pyro.validation_enabled(False):
                with standing_in(module, self.inputs, inputs[: len(self.inputs)]):
                    found = list(function(*given, **kwargs))
                    return [inputs[0].new_zeros(()), *found]  # of a graph without any, too

        tensors = [args[i] for i in self.positions]
        with unmoved(module), seeded(0, *self.inputs, *tensors):
            kept = Kept(module)
            eager = outputs(*self.inputs, *tensors)  # also finds what is remembered of a pair
            changes = kept.changes()
        with unmoved(module):
            self.graph = Graph(outputs, [*self.inputs, *tensors], differentiates=False)
        progress()
        with unmoved(module), seeded(0, *self.inputs, *tensors):
            kept = Kept(module)
            found = self._run(args)
            different = _different_changes(changes, kept.changes())
        if _difference(_numbers(eager), _numbers(found)) is not None:
            different = "what was compiled gives other numbers than the eager run"
        if different:
            raise NotCompiled(f"at the same draws {different}")
        progress()

    def _run(self, args: tuple) -> Sequence[Tensor]:
        return self.graph(*self.inputs, *(args[i] for i in self.positions))

    def __call__(self, args: tuple) -> Any:
        return self._run(args)[1:]


class CompiledWeights(CompiledOutputs):
    """Log-weights of a pair without gradient, ``(K, N)``, by one graph.

    Args:
        model, guide: the pair.
        module: owns their parameters and buffers.
        args, kwargs, progress: as :class:`CompiledGradients` has them; ``num_particles`` in
            ``kwargs``.

    Raises:
        NotCompiled: as :class:`CompiledGradients`.
    """

    def __init__(
        self,
        model: Program,
        guide: Program,
        module: nn.Module,
        args: tuple,
        kwargs: dict,
        progress: Callable[[], Any],
    ) -> None:
        def weigh(*args: Any, **kwargs: Any) -> list[Tensor]:
            return [log_weights(model, guide, *args, **kwargs).log_w]

        super().__init__(weigh, module, args, kwargs, progress)

    def __call__(self, args: tuple) -> Tensor:
        (log_w,) = super().__call__(args)
        return log_w


def _numbers(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t if t.is_floating_point() else t.double() for t in tensors]


class _Change(NamedTuple):
    """A tensor that a module holds besides its parameters, before and after a step."""

    name: str
    before: Tensor
    after: Tensor


class Outcome(NamedTuple):
    """Loss and gradients of a step, and what it has written."""

    values: list[Tensor | None]
    changes: list[_Change]


class Kept:
    """The buffers and other tensors of a module as they are now."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = [
            (name, tensor, tensor.detach().clone()) for _, name, tensor in attributes(module)
        ]

    def changes(self) -> list[_Change]:
        """What has been written on them since; one that was assigned anew is not looked at."""
        return [_Change(name, before, t.detach().clone()) for name, t, before in self._tensors]


def _different_changes(expected: Sequence[_Change], found: Sequence[_Change]) -> str:
    """Which buffer a graph changes in another way than an eager step, beyond rounding; "": none."""
    numbers = [c for c in expected if c.after.is_floating_point()]
    total = math.hypot(*(float((c.after - c.before).nan_to_num().norm()) for c in numbers))
    for one, other in zip(expected, found, strict=True):
        name, before, after = one
        if not after.is_floating_point():
            different = not torch.equal(after, other.after)
        else:
            half = torch.is_autocast_enabled(after.device.type)
            double = after.dtype == torch.float64
            tolerance = 0.1 if half else 1e-9 if double else _rounding_of_products(after)
            change = float((after - before).nan_to_num().norm()) + 0.03 * total
            rounding = 16 * torch.finfo(after.dtype).eps * float(after.nan_to_num().norm())
            error = float((after - other.after).nan_to_num().norm())
            same = torch.equal(after.isfinite(), other.after.isfinite())
            different = not same or error > tolerance * change + rounding
        if different:
            return f"the graph changes the tensor {name!r} of a module in another way than the step"
    return ""


def in_own_memory(gradient: Tensor, parameter: Tensor, taken: set[int]) -> Tensor:
    """A gradient that shares no memory, laid out as its parameter: an optimiser may write on it."""
    storage = gradient.untyped_storage()._cdata
    if gradient.stride() != parameter.stride() or storage in taken:
        return torch.empty_like(parameter).copy_(gradient)
    taken.add(storage)
    return gradient


def _difference(expected: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> float | None:
    """The largest relative difference of losses and gradients, if it is more than rounding."""
    loss = expected[0]
    assert loss is not None
    half = torch.is_autocast_enabled(loss.device.type)
    single = loss.dtype == torch.float32
    tolerance = 0.1 if half else _rounding_of_products(loss) if single else 1e-9
    largest = _relative(expected, found)
    return largest if largest > tolerance else None


def _rounding_of_products(tensor: Tensor) -> float:
    """The relative difference that products of float32 may make; those of TF32 have ten bits."""
    exact = ("highest", "none", "ieee", False)
    return 1e-3 if all(p in exact for p in _precision(tensor.device.type)[:2]) else 1e-2


def _precision(device: str) -> tuple[Any, ...]:
    """How products and convolutions of float32 may be rounded, which is the user's to set."""
    try:
        products: Any = torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's two ways to set it have been mixed
        products = torch.backends.fp32_precision  # type: ignore[attr-defined]
    if device != "cuda":
        return (products,)
    cuda = torch.backends.cuda.matmul
    try:
        convolutions: Any = torch.backends.cudnn.allow_tf32
    except RuntimeError:
        convolutions = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    return products, getattr(cuda, "fp32_precision", cuda.allow_tf32), convolutions


def _relative(expected: Sequence[Tensor | None], found: Sequence[Tensor | None]) -> float:
    """The largest relative difference of losses and gradients; infinity: not of one kind."""
    largest = 0.0
    # A gradient that cancels (of a bias before batch norm) is the rounding of larger terms.
    norms = [float(tensor.nan_to_num().norm()) for tensor in expected[1:] if tensor is not None]
    floor = 0.03 * math.hypot(*norms)
    for position, (one, other) in enumerate(zip(expected, found, strict=True)):
        if one is None or other is None:
            if one is not other:
                return math.inf
            continue
        if not torch.equal(one.isfinite(), other.isfinite()):
            return math.inf
        error = float((one - other).nan_to_num(0.0, 0.0, 0.0).norm())
        size = float(one.nan_to_num(0.0, 0.0, 0.0).norm())
        scale = size + (floor if position > 0 else 0.0)
        largest = max(largest, error / (scale + 1e-30))
    return largest


def kinds(args: tuple) -> Any:
    """What a graph depends on in arguments."""
    return tuple(map(_kind, args))


def _kind(arg: Any) -> Any:
    """What a graph depends on in an argument."""
    if isinstance(arg, Tensor):
        return arg.shape, arg.stride(), arg.dtype, arg.device
    if isinstance(arg, (tuple, list)):
        return kinds(tuple(arg))
    return arg


def _holds_tensor(arg: Any) -> bool:
    if isinstance(arg, dict):
        return any(map(_holds_tensor, arg.values()))
    if isinstance(arg, (tuple, list)):
        return any(map(_holds_tensor, arg))
    return isinstance(arg, Tensor)
