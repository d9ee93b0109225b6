"""One compiled graph of a computation with a module, and what keeps one honest.

A Pyro program is static Python around tensors: once traced, neither Pyro nor Python is left. What
a graph must not contain are values that change, so every tensor that the traced function reaches
is an input of its graph.
"""

from __future__ import annotations

import copy
import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae.pairs import NotCompiled, seeded

INTERNAL = set(vars(nn.Module()))  # attributes that every module has


class Graph:
    """One compiled graph of a function of tensors, for inputs of these shapes.

    Tensors that the function reaches otherwise are read anew at each call. Draws follow
    ``torch.manual_seed`` and are those of the function run eagerly.

    Args:
        function: from tensors to a list of tensors; it may differentiate.
        inputs: tensors of the shapes it will be called with.

    Attributes:
        reached: tensors that the function reaches otherwise.

    Raises:
        NotCompiled: the function looks at a tensor's value, or there is no C++ compiler.

    Example:
        >>> graph = Graph(lambda x: [x.square().sum()], [torch.ones(3)])
        >>> graph(torch.full((3,), 2.0))
        [tensor(12.)]
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor]) -> None:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        inputs = [tensor.detach() for tensor in inputs]
        _keep_memory_between_calls()
        try:
            # a fake tensor has a shape and no value: nothing of this run can be baked in
            trace = make_fx(
                function,
                decomposition_table=_DECOMPOSITIONS,
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )
            traced = trace(*inputs)
            self.reached = _lift_constants(traced)
            _draw_in_order_of_memory(traced)
            _sum_softplus_as_products(traced)
            if onednn_is_faster():
                _lower_to_onednn()
                _multiply_with_onednn(traced)
            how = {
                "fallback_random": True,
                "cpp_wrapper": _on_cpu(traced),  # calls are made from C++, not from Python
                "reorder_for_peak_memory": False,  # it would change the order of draws
            }
            with torch.no_grad(), config.patch(how), seeded(0, *inputs), warnings.catch_warnings():
                # the compiler calls what torch has deprecated
                warnings.simplefilter("ignore", FutureWarning)
                compiler = cast(Callable[..., Any], compile_fx)
                self._call = compiler(traced, [*inputs, *self.reached])
                # compiles what is left; what a copy would lay out otherwise is no buffer
                tensors = [*inputs, *self.reached]
                pairs = zip(copies(tensors), tensors, strict=True)
                self._call(*(c if c.stride() == t.stride() else t for c, t in pairs))
        except NotCompiled:
            raise
        except Exception as error:  # whatever the tracer and the compiler raise: there is no list
            raise NotCompiled(_reason(error)) from error

    def __call__(self, *inputs: Tensor) -> Sequence[Tensor]:
        with torch.no_grad():
            outputs: Sequence[Tensor] = self._call(*inputs, *self.reached)
        return outputs


def _on_cpu(traced: GraphModule) -> bool:
    """Whether no tensor of a graph is elsewhere."""
    values = [node.meta.get("val") for node in traced.graph.nodes]
    return all(value.is_cpu for value in values if isinstance(value, Tensor))


def _keep_memory_between_calls() -> None:
    """Have glibc keep up to 64 MB of freed memory, where it would give back all beyond some MB.

    It gives back twice the largest block, of at most 32 MB, that it has seen freed. A graph frees
    all its intermediates at each call, and at the next would be handed new pages to be zeroed: with
    50 particles that took a tenth of a step. Nothing is touched here, so it costs nothing.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


# As torch has it, the derivative of softplus is an exponential kept in memory, then a quotient.
_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.softplus_backward.default: lambda gradient, x, beta, threshold: (
        gradient * (x * beta).sigmoid()
    )
}


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


def _draw_in_order_of_memory(traced: GraphModule) -> None:
    """Draw a dropout's mask as torch does, in the order of memory, if its tensor is transposed.

    A graph lays it out anew, and would draw in the order of its dimensions.
    """
    aten = torch.ops.aten
    for node in traced.graph.find_nodes(op="call_function", target=aten.bernoulli_.float):
        value = node.meta["val"]
        if value.is_contiguous():
            continue
        order = sorted(range(value.dim()), key=lambda dim: -value.stride(dim))
        with traced.graph.inserting_before(node):
            ordered = traced.graph.call_function(aten.permute.default, (node.args[0], order))
        node.args = (ordered, *node.args[1:])
        back = [order.index(dim) for dim in range(value.dim())]
        with traced.graph.inserting_after(node):
            mask = traced.graph.call_function(aten.permute.default, (node, back))
        node.replace_all_uses_with(mask, delete_user_cb=lambda user, mask=mask: user is not mask)
    traced.recompile()


# A product of so many numbers in (1, 2] is finite in float32.
MAX_FACTORS = 100


def _sum_softplus_as_products(traced: GraphModule) -> None:
    """On the CPU, one logarithm for many terms of a sum of softplus, see :func:`_sum_softplus`."""
    aten = torch.ops.aten
    for node in traced.graph.find_nodes(op="call_function", target=aten.sum.dim_IntList):
        softplus, (dims, *_) = node.args[0], node.args[1:]
        if softplus.target is not aten.softplus.default or len(softplus.args) > 1:
            continue
        if node.kwargs or not dims:  # another dtype; the sum of all by an empty list
            continue
        value = softplus.meta["val"]
        in_float32 = value.device.type == "cpu" and value.dtype == torch.float32
        if not in_float32 or len(softplus.users) > 1 or not {-1, value.dim() - 1} & set(dims):
            continue
        products = _number_of_products(value.shape[-1])
        if products < value.shape[-1]:
            node.target, node.args = _sum_softplus, (softplus.args[0], products, *node.args[1:])
            traced.graph.erase_node(softplus)
    traced.recompile()


def _number_of_products(size: int) -> int:
    """How many products to make of so many factors: few, but enough to fill a vector register."""
    possible = [n for n in range(1, size + 1) if size % n == 0 and size // n <= MAX_FACTORS]
    return min(possible, key=lambda n: (n % 16 > 0, n % 8 > 0, n))


def _sum_softplus(a: Tensor, products: int, dims: list[int], keepdim: bool = False) -> Tensor:
    r"""The sum over some dimensions, the last among them, of softplus.

    .. math:: \sum_i \log(1 + e^{a_i}) = \sum_i \max(a_i, 0) + \log \prod_i (1 + e^{-|a_i|})

    A decoder of binary pixels spends two thirds of its elementwise time in the logarithms. The
    factors of a product lie apart, so that neighbours are multiplied into a vector of products.
    """
    factors = (1 + torch.exp(-a.abs())).unflatten(-1, (-1, products))
    linear = a.clamp(min=0).sum(dims, keepdim)
    return linear + factors.prod(-2).log().sum(dims, keepdim)


# One matrix product by oneDNN, x w' + bias. Passes over a graph that know torch's own op take its
# weights for constants, so in a graph it has another name until they are done.
_library = torch.library.Library("ppvae", "FRAGMENT")
_library.define("linear(Tensor x, Tensor w, Tensor? bias, str activation) -> Tensor")
_library.impl(
    "linear",
    lambda x, w, bias, then: torch.ops.mkldnn._linear_pointwise.default(x, w, bias, then, [], ""),
    "CPU",
)
_library.impl("linear", lambda x, w, bias, then: x.new_empty(x.shape[0], w.shape[0]), "Meta")


@functools.cache
def _lower_to_onednn() -> None:
    """Tell inductor what ``ppvae::linear`` is: a call of oneDNN, made from C++."""
    from torch._inductor import ir, mkldnn_ir
    from torch._inductor.lowering import register_lowering

    @register_lowering(torch.ops.ppvae.linear.default, type_promotion_kind=None)
    def linear(x: Any, w: Any, bias: Any, activation: str) -> Any:
        call = mkldnn_ir.LinearUnary
        x = call.require_contiguous(call.realize_input(x))
        w = call.realize_input(w)  # transposed or not
        constants: list[Any] = [activation, [-1], ""]
        if bias is None:
            inputs, constants = [x, w], [None, *constants]
        else:
            inputs = [x, w, call.require_contiguous(call.realize_input(bias))]
        size = [x.get_size()[0], w.get_size()[0]]
        layout = ir.FixedLayout(device=x.get_device(), dtype=x.get_dtype(), size=size)
        return ir.TensorBox.create(call(layout, inputs, constants))


# Multiply-adds of a product from which oneDNN, whose calls cost some 10 us more, is faster.
MIN_PRODUCT = 2**20


@functools.cache
def onednn_is_faster() -> bool:
    """Whether oneDNN multiplies float32 matrices clearly faster here than what ``torch.mm`` calls.

    MKL keeps its best kernels for Intel's processors; ``benchmarks/speed.py`` shows the difference.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    x, w = (torch.ones(256, 256, dtype=torch.float32) for _ in range(2))
    times: dict[Callable[[], Tensor], float] = {
        (lambda: torch.mm(x, w)): math.inf,
        (lambda: torch.ops.ppvae.linear(x, w, None, "none")): math.inf,
    }
    with torch.no_grad():
        for _ in range(20):
            for multiply in times:
                started = time.perf_counter()
                multiply()
                times[multiply] = min(times[multiply], time.perf_counter() - started)
    usual, onednn = times.values()
    return onednn < 0.8 * usual


def _multiply_with_onednn(traced: GraphModule) -> None:
    """Replace products of float32 matrices on the CPU, but for the small ones."""
    aten = torch.ops.aten
    mm, addmm = aten.mm.default, aten.addmm.default
    for node in list(traced.graph.nodes):
        if node.op != "call_function" or node.target not in (mm, addmm) or node.kwargs:
            continue
        value = node.meta["val"]
        if value.dtype != torch.float32 or value.device.type != "cpu":
            continue
        bias = node.args[0] if node.target is addmm else None
        if bias is not None and bias.meta["val"].dim() != 1:
            continue
        x, w = node.args[-2:]
        sizes = [operand.meta["val"].numel() for operand in (x, w)]
        if value.numel() * w.meta["val"].shape[0] < MIN_PRODUCT:
            continue
        with traced.graph.inserting_before(node):
            call: Any = traced.graph.call_function
            copied = {"memory_format": torch.contiguous_format}
            # A transposed first operand oneDNN copies, so the compiler writes it out; or, where
            # that is less, the other operand and the result of (x w)' = w' x'.
            less = sizes[1] + value.numel() < sizes[0]
            swap = x.target is aten.t.default and bias is None and less
            if swap:
                x, w = call(aten.t.default, (w,)), x.args[0]
            if x.target is aten.t.default:
                x = call(aten.clone.default, (x,), copied)
            transposed = call(aten.t.default, (w,))
            activation = _activation(node)
            then = _ACTIVATIONS[activation.target] if activation else "none"
            product = call(torch.ops.ppvae.linear.default, (x, transposed, bias, then))
            if swap:
                product = call(aten.clone.default, (call(aten.t.default, (product,)),), copied)
        product.meta["val"] = value  # it may be an operand of another
        node.replace_all_uses_with(product)
        traced.graph.erase_node(node)
        if activation:
            activation.replace_all_uses_with(activation.args[0])
            traced.graph.erase_node(activation)
    traced.recompile()


# What oneDNN can apply to a product before it leaves the cache.
_ACTIVATIONS: dict[Any, str] = {
    torch.ops.aten.tanh.default: "tanh",
    torch.ops.aten.relu.default: "relu",
    torch.ops.aten.sigmoid.default: "sigmoid",
}


def _activation(product: torch.fx.Node) -> Any:
    """The activation of a layer that is not differentiated, if nothing else sees its product.

    A gradient needs the activation's value again, and copies, which the compiler writes with it.
    """
    users = list(product.users)
    if len(users) == 1 and users[0].target is torch.ops.aten.view.default:
        users = list(users[0].users)
    found = users[0] if len(users) == 1 and users[0].target in _ACTIVATIONS else None
    return found if found is not None and len(found.users) == 1 else None


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The values, in memory of their own."""
    return [tensor.detach().clone() for tensor in tensors]


def _reason(error: BaseException) -> str:
    """What a failure of the tracer or the compiler means, with a cure where one is known."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    names, texts = [type(e).__name__ for e in chain], [str(e).strip() for e in chain]
    said = next((text.splitlines()[0] for text in texts if text), "")
    everything = " ".join([*names, *texts])
    if "cxx" in everything.lower() or "c++ compiler" in everything.lower():
        return f"no working C++ compiler was found ({said[:200]}); install g++ or clang"
    hint = ""
    if "DataDependent" in everything or "item()" in everything or "_local_scalar" in everything:
        hint = (
            "; a program or the loss looks at a tensor's value (.item(), float(t), if t > 0, "
            "nonzero), which a graph cannot: use torch.where and tensors of fixed shape"
        )
    elif "SymInt" in everything:
        hint = "; a loop over pyro.plate(...) asks for values: loop over range(n), or vectorise it"
    return f"{names[0]}: {said[:300]}{hint}"


@contextmanager
def unmoved(module: nn.Module) -> Iterator[None]:
    """Put back, on leaving, all that a module keeps besides its parameters' values."""
    parts = [(part, vars(part).copy(), part._buffers.copy()) for part in module.modules()]
    logs = [  # what a program appends to, or counts in
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
        for part, known, buffers in parts:
            vars(part).clear()
            vars(part).update(known)
            part._buffers.clear()
            part._buffers.update(buffers)
        for value, before in logs:
            value.clear()
            value.extend(before) if isinstance(value, list) else value.update(before)
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)


def attributes(module: nn.Module) -> Iterator[tuple[dict[str, Any], str, Tensor]]:
    """Where a module keeps tensors that are no parameters: buffers and plain attributes."""
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


def require_kept(before: Sequence[tuple[dict[str, Any], str, Tensor]], graph: Graph) -> None:
    """Raise :class:`NotCompiled` if an attribute that a graph reads was assigned anew meanwhile.

    One that is only written, as the caches of Pyro's flows are, does no harm.
    """
    read = {id(tensor) for tensor in graph.reached}
    for owned, name, value in before:
        if owned.get(name) is not value and id(value) in read:
            raise _assigned(name)


def _assigned(name: str) -> NotCompiled:
    return NotCompiled(
        f"a module assigns its tensor {name!r} anew in forward, which a graph would lose; change "
        f"it in place: self.{name}.copy_(...)"
    )
