"""How a graph on the CPU computes what networks for images are made of: other sums, same numbers.

``torch`` leaves batch norm to code that inductor vectorises badly, and the gradient of a depthwise
convolution's kernel to code of oneDNN that does not know depthwise. Design, decision 53, says what
each is worth.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_KERNEL = 64  # so many sums at once stay in registers

# A value that is to be in memory: what is computed of few numbers, as those of channels, would
# else be computed anew for each of the many that it is used for.
_library = torch.library.Library("ppvae", "FRAGMENT")
_library.define("kept(Tensor x) -> Tensor")
_library.impl("kept", lambda x: x.clone(), "CPU")
_library.impl("kept", torch.empty_like, "Meta")


@functools.cache
def lower() -> None:
    """Tell inductor what ``ppvae::kept`` is."""
    from torch._inductor.lowering import register_lowering

    @register_lowering(torch.ops.ppvae.kept.default, type_promotion_kind=None)
    def kept(x: Any) -> Any:
        x.realize()
        return x


def _kept(x: Tensor) -> Tensor:
    value: Tensor = torch.ops.ppvae.kept.default(x)
    return value


def _in_full_precision(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def _over_images(x: Tensor) -> Tensor:
    """The sum of each channel, ``(C,)``: of each image, which stays in the cache, then of all."""
    return x.flatten(2).sum(2).sum(0) if x.dim() > 2 else x.sum(0)


def _of_channels(values: Tensor, like: Tensor) -> Tensor:
    """Values ``(C,)`` as they broadcast to images."""
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    """In training mode; mean and variance by two sums, and one product and sum for each value."""
    if not training or not _in_full_precision(x) or x.dim() < 2 or not x.numel():
        return NotImplemented
    count = x.numel() // x.shape[1]
    mean = _kept(_over_images(x) / count)
    variance = _kept(_over_images((x - _of_channels(mean, x)).square()) / count)
    inverse = _kept((variance + eps).rsqrt())
    scale = inverse if weight is None else _kept(inverse * weight)
    shift = _kept(-mean * scale if bias is None else bias - mean * scale)
    if running_mean is not None:
        running_mean.copy_((1 - momentum) * running_mean + momentum * mean)
    if running_var is not None:
        unbiased = variance * (count / (count - 1))
        running_var.copy_((1 - momentum) * running_var + momentum * unbiased)
    return x * _of_channels(scale, x) + _of_channels(shift, x), mean, inverse


def _batch_norm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor | None,
    inverse: Tensor | None,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> Any:
    """Of what :func:`_batch_norm` computes: dx = a g + c x + d, with numbers a, c, d by channel."""
    if not training or not _in_full_precision(x) or x.dim() < 2 or not x.numel():
        return NotImplemented
    assert mean is not None and inverse is not None
    count = x.numel() // x.shape[1]
    total = _kept(_over_images(gradient))
    along = _kept(_over_images(gradient * (x - _of_channels(mean, x))))
    a = inverse if weight is None else _kept(inverse * weight)
    c = _kept(-a * along * inverse.square() / count)
    d = _kept(-a * total / count - c * mean)
    dx = gradient * _of_channels(a, x) + (x * _of_channels(c, x) + _of_channels(d, x))
    return dx, along * inverse if wanted[1] else None, total if wanted[2] else None


def _convolution_backward(
    gradient: Tensor,
    x: Tensor,
    kernel: Tensor,
    bias_sizes: Any,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> Any:
    r"""Of a depthwise convolution, in which each channel has a kernel of its own.

    .. math:: \frac{\partial}{\partial w_{cij}} = \sum_{nhw} g_{nchw}\, x_{n,c,h+i,w+j}

    A row of the kernel is one sum over x, seen through a window that moves along the row.
    """
    depthwise = groups > 1 and groups == x.shape[1] == kernel.shape[0] and kernel.dim() == 4
    small = kernel.shape[2:].numel() <= LARGEST_KERNEL
    plain = not transposed and all(n == 1 for n in (*stride, *dilation)) and gradient.numel()
    if not wanted[1] or not (depthwise and small and plain and _in_full_precision(x)):
        return NotImplemented
    last: dict[str, Any] = {"memory_format": torch.channels_last}
    rows, (height, width) = kernel.shape[2], gradient.shape[2:]
    g = gradient.contiguous(**last)
    padded = F.pad(x, (padding[1], padding[1], padding[0], padding[0])).contiguous(**last)
    sums = []
    for i in range(rows):
        window = padded[:, :, i : i + height].unfold(3, width, 1).permute(0, 1, 3, 2, 4)
        sums.append((window * g.unsqueeze(2)).sum((3, 4)).sum(0))
    dw = torch.stack(sums, 1).view(kernel.shape)
    dx = None
    if wanted[0]:
        dx = torch.ops.aten.convolution_backward.default(
            gradient, x, kernel, bias_sizes, stride, padding, dilation, transposed,
            output_padding, groups, [True, False, False],
        )[0]  # fmt: skip
    return dx, dw, _over_images(gradient) if wanted[2] else None


IMAGES: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_batch_norm_backward.default: _batch_norm_backward,
    torch.ops.aten.convolution_backward.default: _convolution_backward,
}
