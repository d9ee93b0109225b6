"""A step on a GPU as a CUDA graph. What depends on the device is in three functions here.

Tests replace them (``tests/cuda_emulation.py``), so that all around them runs on a CPU, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_gpu(tensor: Tensor) -> bool:
    """Whether work on a tensor is only asked for and done later, and can be captured."""
    return tensor.is_cuda


def capturing() -> bool:
    """Whether what is asked for now is captured instead of done."""
    return torch.cuda.is_current_stream_capturing()


def record(function: Callable[[], Any], device: torch.device) -> tuple[Any, Callable[[], Any]]:
    """Capture a function without arguments: what it returns, and what fills that anew.

    Another thread may use the device meanwhile, as one that pins memory for batches does.

    Raises:
        RuntimeError: something in it cannot be captured. Draws go on as if nothing had been tried.
    """
    with torch.cuda.device(device):
        _try(function)
        return _captured(function)


def _captured(function: Callable[[], Any]) -> tuple[Any, Callable[[], Any]]:
    """Capture on the current device, on a stream of that device's."""
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = _stream(torch.cuda.current_device())
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            outputs = function()
    finally:
        torch.cuda.set_stream(before)  # torch does not, where the capture fails
    return outputs, graph.replay


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """The stream for captures on a device: torch's own is of the device that captured first.

    One for all, since cuBLAS keeps megabytes for each.
    """
    return torch.cuda.Stream(device)


def _try(function: Callable[[], Any]) -> None:
    """Capture once with a copy of the generator's state, and forget it.

    The state that a failed capture has used takes itself for capturing ever after, and raises at
    the next draw.
    """
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    try:
        _captured(function)
    finally:
        generator.graphsafe_set_state(state)


class CudaGraph:
    """A function of tensors captured as one CUDA graph, to be replayed on other values.

    Args:
        function: what is captured; it must have been run before.
        args: arguments of the shapes that it will be replayed with; they are copied.
        device: where it runs.

    Attributes:
        outputs: what the function returned; a replay writes new values on it.

    Raises:
        RuntimeError: something in it cannot be captured.
    """

    def __init__(self, function: Callable[..., Any], args: tuple, device: torch.device) -> None:
        self.args = [_copy(arg) if isinstance(arg, Tensor) else arg for arg in args]
        self.outputs, self._replay = record(lambda: function(*self.args), device)

    def __call__(self, *args: Any) -> Any:
        """Replay it; returns ``outputs``."""
        for kept, arg in zip(self.args, args, strict=True):
            if isinstance(kept, Tensor):
                _own(kept).copy_(_own(arg), non_blocking=True)
        self._replay()
        return self.outputs


def _copy(tensor: Tensor) -> Tensor:
    """A copy with the very strides, which ``clone`` does not keep: they are part of a key."""
    tensor = tensor.detach()
    made = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    _own(made).copy_(_own(tensor))
    return made


def _own(tensor: Tensor) -> Tensor:
    """A tensor without the repetitions that ``expand`` makes: each place of memory once."""
    if 0 not in tensor.stride():
        return tensor
    once = [slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride()]
    return tensor[tuple(once)]
