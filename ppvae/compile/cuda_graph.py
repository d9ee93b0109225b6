"""A whole step on a GPU as one CUDA graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class CudaGraph:
    """A whole step captured as one CUDA graph, to be replayed on other values.

    Args:
        step: what is captured, from arguments to the loss; it must have been run before.
        args: arguments of the shapes that it will be replayed with; they are copied.
    """

    def __init__(self, step: Callable[..., Tensor], args: tuple) -> None:
        self.args = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.graph(self.graph):
            self.loss = step(*self.args)

    def __call__(self, args: tuple) -> Tensor:
        """Replay it; returns the loss."""
        for kept, arg in zip(self.args, args, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(arg, non_blocking=True)
        self.graph.replay()
        return self.loss.clone()
