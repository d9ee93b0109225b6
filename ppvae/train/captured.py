"""Steps of an SVI captured as CUDA graphs: what is fixed in them, what is read on the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW
from torch.optim.optimizer import _global_optimizer_post_hooks as after_all
from torch.optim.optimizer import _global_optimizer_pre_hooks as before_all

from ppvae.compile import cuda_graph
from ppvae.compile.cuda_graph import CudaGraph
from ppvae.train import fused_adam


class Before(NamedTuple):
    """What a step that makes no update goes back to."""

    parameters: list[nn.Parameter]  # that the optimiser holds and that are trained
    buffers: list[tuple[Tensor, Tensor]]  # with what they were before
    rewind: Callable[[], None] | None  # to the draws; None: the update is withheld on the device

    def put_back(self) -> None:
        """Let the buffers have the values that they had."""
        for buffer, value in self.buffers:
            buffer.copy_(value)


class Begun(NamedTuple):
    """A step before its update."""

    before: Before
    loss: Tensor  # of this process
    total: Tensor  # over all of them


class Captures:
    """The captured steps of an :class:`ppvae.SVI`. On a CPU there are none.

    Attributes:
        steps: by their keys; None: it cannot be captured.
        rates: the learning rates on the device; None: steps read those of the groups.
    """

    max_steps = 16

    def __init__(self) -> None:
        self.steps: dict[Any, CapturedStep | None] = {}
        self.rates: Rates | None = None
        self._told = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Captures:
        """A copy has its own tensors, so it captures steps of its own."""
        return Captures()

    def key(self, svi: Any, args: tuple, kwargs: dict) -> Any:
        """What a step depends on besides the values of tensors; None: do not capture it."""
        if not svi.compile:
            self.rates = None
            return None
        optimizer: torch.optim.Optimizer = svi.optimizer
        held = [p for group in optimizer.param_groups for p in group["params"]]
        first = next((p for p in held if p.requires_grad), None)
        on_gpu = first is not None and cuda_graph.is_gpu(first)
        fixed = settings(optimizer) if on_gpu else None
        if first is None or fixed is None:
            self.rates = None
            return None
        if self.rates is None or not self.rates.is_of(optimizer, first.device):
            self.rates = Rates(optimizer, first.device)
        self.rates.fill()
        svi._skipped = torch.as_tensor(svi._skipped, device=first.device)
        if svi._compiled is None:
            return None
        with svi.autocast():  # as the graph is called: it is part of the key
            key = svi._compiled.key(args, kwargs)
        tensors = svi._compiled.tensors(key)
        if tensors is None:
            return None
        # A capture has addresses, so a tensor in new memory is another one.
        moments = [t for p in held if p in optimizer.state for t in optimizer.state[p].values()]
        tensors = [*tensors, *held, *moments, *self.rates.tensors, svi._skipped]
        where = tuple([tensor.data_ptr() for tensor in tensors if isinstance(tensor, Tensor)])
        return key, svi.clip_norm, svi.synchronize is None, fixed, where

    def step(self, key: Any, svi: Any, args: tuple, kwargs: dict) -> Tensor:
        """The step of a key; the first time it is taken eagerly, and then captured."""
        captured = self.steps.get(key)
        if captured is not None:
            svi._compiled.advance(key[0])
            return captured(svi, args)
        loss = svi._step(args, kwargs)  # capturing needs the optimiser's state to be there
        if key not in self.steps:
            self._capture(key, svi, args, kwargs)
        return loss

    def _capture(self, key: Any, svi: Any, args: tuple, kwargs: dict) -> None:
        if len(self.steps) >= self.max_steps:
            self._tell(
                f"{len(self.steps)} steps were, and this one differs from all in the shape of an "
                "argument, in clip_norm or in a setting of the optimiser other than lr"
            )
            return
        try:
            if waits := svi._compiled.latest.graph.waits:
                raise RuntimeError(f"{waits} waits for the device")
            self.steps[key] = CapturedStep(svi, args, kwargs)
        except RuntimeError as error:
            self.steps[key] = None
            self._tell(str(error).partition("\n")[0][:200])

    def _tell(self, reason: str) -> None:
        if not self._told:
            self._told = True
            remark = f"compiled, but not captured as a CUDA graph: {reason}"
            warnings.warn(remark, RuntimeWarning, stacklevel=6)


class CapturedStep:
    """A step as a CUDA graph; of several processes two, with the sum of gradients between.

    Args:
        svi: whose step is captured; it has taken one with such arguments.
        args, kwargs: of the step.

    Raises:
        RuntimeError: it cannot be captured. Nothing has been updated.
    """

    def __init__(self, svi: Any, args: tuple, kwargs: dict) -> None:
        self.shown: dict[str, Tensor] = getattr(getattr(svi.objective, "state", None), "shown", {})
        held = [p for group in svi.optimizer.param_groups for p in group["params"]]
        device = next(p.device for p in held if p.requires_grad)
        alone = svi.synchronize is None

        def begin(*args: Any) -> tuple[Begun, Tensor]:
            begun = svi._begin(args, kwargs)
            return begun, (svi.end_step(begun, args, kwargs) if alone else begun.loss)

        before = [(parameter, parameter.grad) for parameter in held], dict(self.shown)
        try:
            self._begin = CudaGraph(begin, args, device)
            self.begun, self.loss = self._begin.outputs
            # what a step leaves behind: in the graph's memory, which a replay fills
            self.gradients = [(parameter, parameter.grad) for parameter in held]
            self.weights = dict(self.shown)
            self._end: CudaGraph | None = None
            if not alone:
                self._end = CudaGraph(lambda: svi.end_step(self.begun, args, kwargs), (), device)
        finally:
            self._leave(*before)  # those of the capture have no values yet

    def _leave(self, gradients: list[tuple[Tensor, Tensor | None]], weights: dict) -> None:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        self.shown.update(weights)

    def __call__(self, svi: Any, args: tuple) -> Tensor:
        """Replay it; returns the loss."""
        self._begin(*args)
        self._leave(self.gradients, self.weights)
        if self._end is not None:
            svi._synchronize(self.begun)
            self._end()
        svi.optimizer._opt_called = True  # a scheduler warns where no step has been called
        return self.loss.clone()


class Rates:
    """The learning rates of an optimiser's groups as tensors on its device.

    A captured step reads them there. The groups keep what their owner, a scheduler or a checkpoint
    has put into them, a number or a tensor of any device; it is looked at before each step.

    Args:
        optimizer: a fused Adam or AdamW.
        device: of its parameters.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.optimizer, self.device = optimizer, device
        self.tensors = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._filled: list[float | None] = [None] * len(self.tensors)

    def is_of(self, optimizer: torch.optim.Optimizer, device: torch.device) -> bool:
        """Whether they are those of an optimiser on a device."""
        same = self.optimizer is optimizer and self.device == device
        return same and len(self.tensors) == len(optimizer.param_groups)

    def fill(self) -> None:
        """Take over what is in the groups now."""
        for i, (tensor, group) in enumerate(
            zip(self.tensors, self.optimizer.param_groups, strict=True)
        ):
            rate = group["lr"]
            if isinstance(rate, Tensor) and not rate.is_cpu:
                tensor.copy_(rate)  # nothing waits to hear which number it is
                self._filled[i] = None
            elif self._filled[i] != float(rate):
                tensor.fill_(float(rate))
                self._filled[i] = float(rate)

    @contextmanager
    def read(self) -> Iterator[None]:
        """Steps inside read the tensors."""
        captured = cuda_graph.capturing()
        groups = self.optimizer.param_groups
        given = [(group["lr"], group["capturable"]) for group in groups]
        for group, tensor in zip(groups, self.tensors, strict=True):
            # torch warns of a capturable step that is not captured, and refuses the opposite
            group["lr"], group["capturable"] = tensor, captured
        try:
            yield
        finally:
            for group, (rate, capturable) in zip(groups, given, strict=True):
                group["lr"], group["capturable"] = rate, capturable


def settings(optimizer: torch.optim.Optimizer) -> tuple[Any, ...] | None:
    """What a captured step of an optimiser has as it was, besides its learning rates.

    None: its step cannot be captured. It does more than launch kernels (hooks, a class of the
    user's, no fused implementation), or a setting is a tensor.
    """
    if type(optimizer) not in (Adam, AdamW, fused_adam.Adam, fused_adam.AdamW):
        return None
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    if own or before_all or after_all:
        return None
    groups = optimizer.param_groups
    # a scheduler keeps numbers of its own in a group, which no step reads
    names = [name for name in optimizer.defaults if name not in ("lr", "capturable")]
    found = tuple([tuple([group.get(name) for name in names]) for group in groups])
    flat = [v for values in found for value in values for v in _flat(value)]
    if not all(group.get("fused") for group in groups) or any(isinstance(v, Tensor) for v in flat):
        return None
    return found


def _flat(value: Any) -> Any:
    return value if isinstance(value, (tuple, list)) else (value,)


@contextmanager
def withheld(optimizer: torch.optim.Optimizer, bad: Tensor) -> Iterator[None]:
    """A step of a fused optimiser inside does nothing where ``bad``, and nothing waits to hear.

    What torch reads is removed again: on the CPU another step would obey it, too.
    """
    optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]
