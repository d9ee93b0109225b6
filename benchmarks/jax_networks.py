"""A ``nn.Sequential`` as a JAX function of its parameters, images channels last, as XLA likes them.

Linear layers next to a convolution get their rows or columns in the order of channels-last images,
so that nothing is transposed while running.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import torch
from jax import lax
from jax import numpy as jnp
from torch import nn

Apply = Callable[[Any, Any], Any]
LAYOUT = ("NHWC", "HWIO", "NHWC")


def from_torch(network: nn.Sequential) -> tuple[list[Any], Apply]:
    """Parameters, and the function that takes them and a batch."""
    parameters: list[Any] = []
    layers: list[Apply] = []
    modules = list(network)
    for i, module in enumerate(modules):
        before = modules[i - 1] if i else None
        after = modules[i + 1] if i + 1 < len(modules) else None
        values: Any = ()
        if isinstance(module, nn.Linear):
            weight, bias = module.weight.detach(), module.bias.detach()
            if isinstance(before, nn.Flatten):
                channels = next(m for m in modules[i::-1] if isinstance(m, nn.Conv2d)).out_channels
                side = math.isqrt(module.in_features // channels)
                images = weight.reshape(-1, channels, side, side)
                weight = images.movedim(1, -1).flatten(1)
            if isinstance(after, nn.Unflatten):
                weight = weight.unflatten(0, after.unflattened_size).movedim(0, 2).flatten(0, 2)
                bias = bias.unflatten(0, after.unflattened_size).movedim(0, 2).flatten()
            values = (_array(weight.t()), _array(bias))
        elif isinstance(module, nn.Conv2d):
            values = (_array(module.weight.permute(2, 3, 1, 0)), _array(module.bias))
        elif isinstance(module, nn.ConvTranspose2d):
            flipped = module.weight.flip(2, 3).permute(2, 3, 0, 1)
            values = (_array(flipped), _array(module.bias))
        parameters.append(values)
        layers.append(_layer(module))

    def apply(parameters: Any, x: Any) -> Any:
        for layer, values in zip(layers, parameters, strict=True):
            x = layer(values, x)
        return x

    return parameters, apply


def _array(values: torch.Tensor) -> Any:
    return jnp.asarray(values.detach().cpu().contiguous().numpy())


def _layer(module: nn.Module) -> Apply:
    """One layer as a function of its parameters and its input."""
    if isinstance(module, nn.Linear):
        return lambda values, x: x @ values[0] + values[1]
    if isinstance(module, nn.Tanh):
        return lambda values, x: jnp.tanh(x)
    if isinstance(module, nn.ReLU):
        return lambda values, x: jax.nn.relu(x)
    if isinstance(module, nn.Flatten):
        return lambda values, x: x.reshape(len(x), -1)
    if isinstance(module, nn.Unflatten):
        channels, height, width = module.unflattened_size
        return lambda values, x: x.reshape(len(x), height, width, channels)
    if isinstance(module, nn.Conv2d):
        padding = [(p, p) for p in module.padding]
        return lambda values, x: (
            lax.conv_general_dilated(x, values[0], module.stride, padding, dimension_numbers=LAYOUT)
            + values[1]
        )
    if isinstance(module, nn.ConvTranspose2d):
        padding = [
            (k - 1 - p,) * 2 for k, p in zip(module.kernel_size, module.padding, strict=True)
        ]
        return lambda values, x: (
            lax.conv_transpose(x, values[0], module.stride, padding, dimension_numbers=LAYOUT)
            + values[1]
        )
    raise TypeError(f"no JAX form of {type(module).__name__}")
