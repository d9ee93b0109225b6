"""What a graph does differently from its program, to be faster; numbers differ in the last bits.

Each pass changes a traced graph in place, before it is compiled. Design, decision 31, says what
each is worth, and what was tried without gain.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ppvae.compile import images


def _softplus_backward(gradient: Tensor, x: Tensor, beta: float, threshold: float) -> Tensor:
    """By a sigmoid; torch has a quotient of exponentials, which are kept in memory."""
    slope = gradient * (x * beta).sigmoid()
    # beyond this the sigmoid is 1 up to rounding
    enough = 37 if x.dtype == torch.float64 else 20
    return slope if threshold >= enough else torch.where(x * beta > threshold, gradient, slope)


def _add(x: Tensor, y: Any, *, alpha: Any = 1) -> Any:
    """With the factor as a product: inductor of torch 2.13 drops it where y is a matrix product."""
    return NotImplemented if alpha == 1 else x + alpha * y


def _add_(x: Tensor, y: Any, *, alpha: Any = 1) -> Any:
    return NotImplemented if alpha == 1 else x.add_(alpha * y)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.softplus_backward.default: _softplus_backward,
    torch.ops.aten.add.Tensor: _add,
    torch.ops.aten.add_.Tensor: _add_,
    **images.IMAGES,
}


def rewrite(traced: GraphModule, differentiates: bool) -> None:
    """Run all passes over a graph, which computes gradients or does not."""
    images.lower()
    _draw_in_order_of_memory(traced)
    _sum_softplus_as_products(traced)
    if onednn_is_faster(differentiates):
        _lower_to_onednn()
        _take_batches_apart(traced)
        _multiply_with_onednn(traced)


def _draw_in_order_of_memory(traced: GraphModule) -> None:
    """Draw the mask of a dropout in the order of memory, as torch does where it is transposed.

    A graph gives the mask another layout, and would draw in the order of its dimensions.
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
        value = softplus.meta["val"]
        if node.kwargs or not dims or not value.numel():  # kwargs: a dtype; no dims: all of them
            continue
        in_float32 = value.device.type == "cpu" and value.dtype == torch.float32
        if not in_float32 or len(softplus.users) > 1 or not {-1, value.dim() - 1} & set(dims):
            continue
        products = _number_of_products(value.shape[-1])
        if products < value.shape[-1]:
            node.target, node.args = _sum_softplus, (softplus.args[0], products, *node.args[1:])
            traced.graph.erase_node(softplus)
    traced.recompile()


def _number_of_products(size: int) -> int:
    """Into how many products to put the factors: few, but enough to fill a vector register."""
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


# One matrix product by oneDNN, x w' + bias. Inductor's passes take the weights of torch's own
# operator for constants, so in a graph it has another name until they are done.
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
    """Tell inductor that ``ppvae::linear`` is a call of oneDNN, made from C++."""
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
def onednn_is_faster(differentiates: bool) -> bool:
    """Whether oneDNN multiplies float32 matrices faster here than ``torch.mm``.

    Without gradients it does: bias and activation take it no pass over the product. With gradients
    there are transposed operands, and it depends on ``torch.mm``, which is MKL and has its best
    kernels for Intel's processors. The maker of the processor decides, and not a measurement,
    since a resumed run has to compute what it would have computed.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if not differentiates:
        return True
    if not torch.backends.mkl.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (cpuinfo.read_text() if cpuinfo.exists() else platform.processor())


def _multiply_with_onednn(traced: GraphModule) -> None:
    """Replace products of float32 matrices on the CPU, but for the small ones."""
    for node in list(traced.graph.nodes):
        if node.op == "call_function" and node.target in _PRODUCTS and _is_worth_it(node):
            _replace_product(traced, node)
    traced.recompile()


# Multiply-adds of a matrix from which a batch of products is faster as so many calls of oneDNN.
MIN_OF_BATCH = 2**22


def _take_batches_apart(traced: GraphModule) -> None:
    """Replace a batch of large products, as of stacked networks, by one product after the other."""
    aten, call = torch.ops.aten, traced.graph.call_function

    def row(batch: Node, i: int) -> Node:
        """One matrix; a transposed one is seen to be so."""
        matrix, (_, along, across) = _value(batch)[0], _value(batch).stride()
        if not along == 1 < across:
            found = call(aten.select.int, (batch, 0, i))
        else:
            found = call(aten.select.int, (call(aten.transpose.int, (batch, 1, 2)), 0, i))
            found.meta["val"] = matrix.t()
            found = call(aten.t.default, (found,))
        found.meta["val"] = matrix
        return found

    for node in traced.graph.find_nodes(op="call_function", target=aten.bmm.default):
        x, w = cast("list[Node]", node.args)
        value = _value(node)
        in_float32 = value.device.type == "cpu" and value.dtype == torch.float32
        if not in_float32 or value[0].numel() * _value(x).shape[2] < MIN_OF_BATCH:
            continue
        with traced.graph.inserting_before(node):
            products = []
            for i in range(len(value)):
                products.append(call(aten.mm.default, (row(x, i), row(w, i))))
                products[-1].meta["val"] = value[0]
            together = call(aten.stack.default, (products,))
        together.meta["val"] = value
        node.replace_all_uses_with(together)
        traced.graph.erase_node(node)
    traced.recompile()


_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


def _is_worth_it(product: Node) -> bool:
    value, (*bias, x, _) = _value(product), cast("list[Node]", product.args)
    in_float32 = value.device.type == "cpu" and value.dtype == torch.float32
    vectors = all(_value(b).shape == value.shape[1:] for b in bias)
    large = value.numel() * _value(x).shape[1] >= MIN_PRODUCT
    return in_float32 and vectors and large and not product.kwargs


def _replace_product(traced: GraphModule, node: Node) -> None:
    """Put oneDNN's product in the place of torch's, x w or bias + x w.

    oneDNN copies a transposed first operand, so the compiler is told to write it out; or, where
    that copies less, to write out the other operand and the result of (x w)' = w' x'.
    """
    aten, (*bias, x, w) = torch.ops.aten, cast("list[Node]", node.args)
    activation = _activation(node)
    then = _ACTIVATIONS[activation.target] if activation else "none"
    less = _value(w).numel() + _value(node).numel() < _value(x).numel()
    with traced.graph.inserting_before(node):
        call = traced.graph.call_function

        def transposed(matrix: Node) -> Node:
            return call(aten.t.default, (matrix,))

        def written(matrix: Node) -> Node:
            how: dict[str, Any] = {"memory_format": torch.contiguous_format}
            return call(aten.clone.default, (matrix,), how)

        swap = x.target is aten.t.default and not bias and less
        if swap:
            x, w = transposed(w), cast(Node, x.args[0])
        if x.target is aten.t.default:
            x = written(x)
        arguments = (x, transposed(w), bias[0] if bias else None, then)
        product = call(torch.ops.ppvae.linear.default, arguments)
        if swap:
            product = written(transposed(product))
    product.meta["val"] = _value(node)  # it may be an operand of another
    node.replace_all_uses_with(product)
    traced.graph.erase_node(node)
    if activation:
        activation.replace_all_uses_with(cast(Node, activation.args[0]))
        traced.graph.erase_node(activation)


def _value(node: Node) -> Tensor:
    """What the tracer knows of a value: shape, strides and type."""
    value: Tensor = node.meta["val"]
    return value


# What oneDNN can apply to a product before it leaves the cache.
_ACTIVATIONS: dict[Any, str] = {
    torch.ops.aten.tanh.default: "tanh",
    torch.ops.aten.relu.default: "relu",
    torch.ops.aten.sigmoid.default: "sigmoid",
}


def _activation(product: Node) -> Any:
    """The activation of a layer, if nothing else uses its product.

    The gradients of these activations are functions of their values alone.
    """
    users = list(product.users)
    if len(users) == 1 and users[0].target is torch.ops.aten.view.default:
        users = list(users[0].users)
    return users[0] if len(users) == 1 and users[0].target in _ACTIVATIONS else None
