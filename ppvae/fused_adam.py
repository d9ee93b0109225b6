"""torch's fused Adam on the CPU, without what its step does tensor by tensor in Python.

That is to look up every state, and to count every tensor's steps by an operation of its own: with
sixty tensors as long as the update itself. Here the lists are kept and the counts are one tensor.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], Tensor]


def keep_lists(optimizer: Optimizer) -> None:
    """Make the steps of a fused Adam or AdamW on the CPU cheaper; leave any other as it is.

    A step computes what torch's does, to the bit, and hooks, schedulers and ``state_dict`` work as
    before. What this has no lists for (the first step, a parameter without gradient, amsgrad) is
    torch's own step.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> adam = Adam([parameter], lr=0.1, fused=True)
        >>> keep_lists(adam)
        >>> for _ in range(2):
        ...     parameter.grad = torch.ones(2)
        ...     adam.step()
        >>> parameter.detach(), adam.state[parameter]["step"]
        (tensor([0.8000, 0.8000]), tensor(2.))
    """
    if type(optimizer) not in (Adam, AdamW):
        return
    kept: list[Lists] = []
    state: Any = None  # of which they are the lists

    def lists(self: Optimizer) -> list[Lists] | None:
        nonlocal state
        if not all(_is_plain(self, group) for group in self.param_groups):
            return None
        sizes = [len(group["params"]) for group in self.param_groups]
        if self.state is not state or sizes != [len(params) for params, *_ in kept]:
            if not all(_is_like_the_first(self, group["params"]) for group in self.param_groups):
                return None
            kept[:] = [_lists(self, group["params"]) for group in self.param_groups]
            state = self.state
        if any(p.grad is None for params, *_ in kept for p in params):
            return None
        return kept

    @Optimizer.profile_hook_step  # the user's hooks
    @torch.no_grad()
    def fused(self: Optimizer) -> None:
        for group, (params, averages, squares, views, counts) in zip(
            self.param_groups, kept, strict=True
        ):
            counts.add_(1)
            decoupled = group["decoupled_weight_decay"]
            update: Any = torch._fused_adamw_ if decoupled else torch._fused_adam_
            update(
                params,
                [p.grad for p in params],
                averages,
                squares,
                [],
                views,
                lr=group["lr"],
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                amsgrad=False,
                maximize=group["maximize"],
            )

    def step(self: Optimizer, *closure: Any, **named: Any) -> Any:
        if closure or named or lists(self) is None:
            return type(self).step(self, *closure, **named)
        return fused(self)

    optimizer.step = MethodType(step, optimizer)  # type: ignore[method-assign]


def _is_plain(optimizer: Optimizer, group: dict[str, Any]) -> bool:
    """Whether a group needs no more than the update itself."""
    unusual = group["amsgrad"] or group["differentiable"] or group["capturable"]
    scaled = getattr(optimizer, "found_inf", None) is not None
    numbers = [group["lr"], *group["betas"]]
    return group["fused"] and not (unusual or scaled or any(map(torch.is_tensor, numbers)))


def _is_like_the_first(optimizer: Optimizer, params: list[Tensor]) -> bool:
    """Whether all have been updated before, are of one dtype, and on the CPU."""
    known = all(p in optimizer.state for p in params)
    return known and {(p.dtype, p.device.type) for p in params} == {(params[0].dtype, "cpu")}


def _lists(optimizer: Optimizer, params: list[Tensor]) -> Lists:
    """The state of some parameters, whose counts of steps become views of one tensor."""
    states = [optimizer.state[p] for p in params]
    counts = torch.stack([state["step"] for state in states])
    views = list(counts.unbind())
    for state, view in zip(states, views, strict=True):
        state["step"] = view
    averages, squares = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
    return params, averages, squares, views, counts
