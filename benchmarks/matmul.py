"""The matmul limit: what the matrix products and convolutions of one step take by themselves.

For every linear and convolutional layer, on operands of the sizes that one loss and its gradient
meet: the forward product, that of the weights' gradient, and that of the input's gradient where
there is one (the data need none). No biases, activations, densities, random numbers or optimiser.
Operands exist beforehand. Float32, the same threads and device as everything else.

On a CPU there are two, since PyTorch holds two libraries: ``"aten"`` calls what ``nn.Linear`` and
autograd call (``torch.mm``, MKL in the usual builds; results go to memory that exists beforehand),
``"onednn"`` the linear kernel of oneDNN for the same matrix products. Which is faster depends on
the processor: the limit is the faster of the two. Convolutions are the same in both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from columns import handwritten_loss, waiter
from torch import Tensor, nn
from workloads import Networks

Products = list[Callable[[], Any]]


def libraries(device: torch.device) -> list[str]:
    """The libraries to take the limit of."""
    return (
        ["aten", "onednn"]
        if device.type == "cpu" and torch.backends.mkldnn.is_available()
        else ["aten"]
    )


def training_products(
    networks: Networks, x: Tensor, num_particles: int, library: str = "aten"
) -> Products:
    """The products of one step: forward, then backward."""
    met: list[tuple[nn.Module, Tensor]] = []
    handles = [
        layer.register_forward_pre_hook(lambda module, inputs: met.append((module, inputs[0])))
        for layer in networks.modules()
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d)
    ]
    handwritten_loss(networks, x, num_particles)
    for handle in handles:
        handle.remove()
    forward: Products = []
    backward: Products = []
    for module, inputs in met:
        if isinstance(module, nn.Linear):
            rows = inputs.numel() // module.in_features
            first, *rest = linear(module.weight, rows, inputs.requires_grad, library)
        else:
            first, *rest = convolution(module, inputs)
        forward.append(first)
        backward = rest + backward  # last layer first, as in a step
    return forward + backward


def linear(
    weight: Tensor, rows: int, inputs_gradient: bool | None = None, library: str = "aten"
) -> Products:
    """Products of a linear layer on so many rows; forward only if ``inputs_gradient`` is None."""
    weight = torch.randn_like(weight, requires_grad=False)
    inputs = torch.randn(rows, weight.shape[1], device=weight.device)
    slope = torch.randn(rows, weight.shape[0], device=weight.device)
    calls = [_product(inputs, weight.t(), library)]
    if inputs_gradient is not None:
        calls.append(_product(slope.t(), inputs, library))
    if inputs_gradient:
        calls.append(_product(slope, weight, library))
    return calls


def _product(a: Tensor, b: Tensor, library: str) -> Callable[[], Any]:
    if library == "onednn":
        return lambda: torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    out = torch.empty(len(a), b.shape[1], device=a.device)
    return lambda: torch.mm(a, b, out=out)


def convolution(module: nn.Conv2d | nn.ConvTranspose2d, inputs: Tensor) -> Products:
    """Convolutions of a layer, forward and backward, without its bias."""
    weight, needs_slope = torch.randn_like(module.weight, requires_grad=False), inputs.requires_grad
    inputs = torch.randn_like(inputs, requires_grad=False)
    transposed = isinstance(module, nn.ConvTranspose2d)
    settings = (
        list(module.stride),
        list(module.padding),
        list(module.dilation),
        transposed,
        list(module.output_padding),
        module.groups,
    )
    forward = torch.ops.aten.convolution.default
    backward = torch.ops.aten.convolution_backward.default
    slope = torch.randn_like(forward(inputs, weight, None, *settings))
    mask = [needs_slope, True, False]
    return [
        lambda: forward(inputs, weight, None, *settings),
        lambda: backward(slope, inputs, weight, None, *settings, mask),
    ]


def runner(calls: Products, device: torch.device) -> Callable[[int], None]:
    """Does all products so many times; on CUDA as one graph, so that launching costs nothing."""

    def once() -> None:
        for call in calls:
            call()

    if device.type == "cuda":
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                once()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            once()
        once = graph.replay
    wait = waiter(device)

    def run(times: int) -> None:
        for _ in range(times):
            once()
        wait()

    return run
