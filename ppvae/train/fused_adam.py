"""torch's fused Adam on the CPU, without what its step does for each tensor.

At each step torch looks up the state of every tensor, puts it into new lists, and counts the steps
of each tensor by an operation of its own; for many small tensors most of the step is that. Here the
lists are kept for as long as they hold the state's tensors, and a group has one count. Design,
decision 36, has what it is worth.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim.optimizer import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks as after_all
from torch.optim.optimizer import _global_optimizer_pre_hooks as before_all

step_of, average_of, square_of = (
    operator.methodcaller("get", key) for key in ("step", "exp_avg", "exp_avg_sq")
)
Lists = tuple[list[Tensor], list[dict[str, Any]], list[Tensor], list[Tensor], list[Tensor], Tensor]


class Adam(optim.Adam):
    """``torch.optim.Adam`` whose fused steps on the CPU cost less, and are the same to the bit.

    State, hooks and schedulers are those of torch. Where no lists can be kept (the first step,
    amsgrad, another device) the step is torch's own. A parameter without gradient is passed over.

    Example:
        >>> parameter = torch.nn.Parameter(torch.ones(2))
        >>> adam = Adam([parameter], lr=0.1, fused=True)
        >>> for _ in range(2):
        ...     parameter.grad = torch.ones(2)
        ...     adam.step()
        >>> parameter.detach(), adam.state[parameter]["step"]
        (tensor([0.8000, 0.8000]), tensor(2.))
    """

    _kept: Sequence[Lists] = ()  # of each group; not part of a copy or a pickle

    def step(self, closure: Any = None) -> Any:
        hooks = self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks
        if hooks or before_all or after_all or torch.autograd.profiler._is_profiler_enabled:
            return self._hooked_step() if closure is None else self._hooked_step(closure)
        return self._step(closure)

    step.hooked = True  # type: ignore[attr-defined]  # it calls hooks itself, so torch need not add them

    def _step(self, closure: Any = None) -> Any:
        groups = [[p for p in g["params"] if p.grad is not None] for g in self.param_groups]
        if closure is not None or not self._keep_lists(groups):
            self._kept = ()
            return _without_hooks(optim.Adam.step)(self, closure)
        self._update_all()
        return None

    def step_again(self) -> None:
        """A step like the last: what was updated, states, settings and hooks are the same."""
        if self._kept:
            self._update_all()
        else:
            self.step()

    @torch.no_grad()
    def _update_all(self) -> None:
        for group, lists in zip(self.param_groups, self._kept, strict=True):
            params, _, averages, squares, steps, counts = lists
            counts.add_(1)
            gradients = [p.grad for p in params]
            _update(group, params, gradients, averages, squares, [], steps)

    # With what torch puts around every step: the user's hooks, which may change everything.
    _hooked_step = Optimizer.profile_hook_step(_step)

    def _keep_lists(self, groups: list[list[Tensor]]) -> bool:
        """Whether a step may use lists of all groups; where they are out of date, make them.

        Args:
            groups: what has a gradient in each.
        """
        if not all(map(self._is_plain, self.param_groups, groups)):
            return False
        current = len(self._kept) == len(groups) and all(map(self._are_of, self._kept, groups))
        if not current:
            if not all(map(self._can_keep, groups)):
                return False
            self._kept = list(map(self._lists, groups))
        return True

    def _is_plain(self, group: dict[str, Any], params: list[Tensor]) -> bool:
        """Whether a group needs no more than the update itself."""
        unusual = group["amsgrad"] or group["differentiable"] or group["capturable"]
        scaled = getattr(self, "found_inf", None) is not None
        numbers = [group["lr"], *group["betas"]]
        return (
            group["fused"]
            and not (unusual or scaled or any(map(torch.is_tensor, numbers)))
            and not any(p.grad.is_sparse for p in params)  # type: ignore[union-attr]
        )

    def _are_of(self, lists: Lists, params: list[Tensor]) -> bool:
        """Whether lists still hold the very tensors that the parameters' states hold."""
        held_params, states, averages, squares, steps, _ = lists
        held = [(step_of, steps), (average_of, averages), (square_of, squares)]
        return (
            len(states) == len(params)
            and all(map(operator.is_, params, held_params))
            and all(map(operator.is_, map(self.state.get, params), states))
            and all(all(map(operator.is_, map(get, states), tensors)) for get, tensors in held)
        )

    def _can_keep(self, params: list[Tensor]) -> bool:
        """Whether all have been updated before, are of one dtype, and on the CPU."""
        updated = len(params) > 0 and all(self.state.get(p) for p in params)
        return updated and {(p.dtype, p.is_cpu) for p in params} == {(params[0].dtype, True)}

    def _lists(self, params: list[Tensor]) -> Lists:
        """The state of some parameters, whose counts of steps become views of one tensor."""
        states = [self.state[p] for p in params]
        counts = torch.stack([state["step"] for state in states])
        steps = list(counts.unbind())
        for state, step in zip(states, steps, strict=True):
            state["step"] = step
        averages, squares = ([s[key] for s in states] for key in ("exp_avg", "exp_avg_sq"))
        return params, states, averages, squares, steps, counts


class AdamW(Adam, optim.AdamW):
    """``torch.optim.AdamW``, its steps as those of :class:`Adam`."""


SETTINGS = ("lr", "betas", "weight_decay", "eps", "maximize", "decoupled_weight_decay")


class AllAtOnce:
    """The next steps of several Adams by one call, where that is the same as one of each.

    Args:
        optimizers: of equal settings, one group each, that have taken equally many steps.
        parameters: of each, those that have gradients.
        rows: from one tensor of each to one ``(S, ...)`` of which they are views from now on.

    Raises:
        ValueError: each has to take its own step.
    """

    def __init__(
        self,
        optimizers: Sequence[Optimizer],
        parameters: Sequence[Sequence[Tensor]],
        rows: Callable[[Sequence[Tensor]], Tensor],
    ) -> None:
        self._groups = [group for each in optimizers for group in each.param_groups]
        if len(self._groups) > len(optimizers) or not all(map(_is_settled, optimizers, parameters)):
            raise ValueError("optimisers with a first step, hooks or groups of their own")
        states = [[o.state[p] for p in own] for o, own in zip(optimizers, parameters, strict=True)]
        counts = torch.stack([state["step"] for state in chain.from_iterable(states)])
        if not bool((counts == counts[0]).all()):
            raise ValueError("optimisers that have taken different numbers of steps")
        self._params = [rows(of_all) for of_all in zip(*parameters, strict=True)]
        self._averages, self._squares = (
            [rows([state[key] for state in of_all]) for of_all in zip(*states, strict=True)]
            for key in ("exp_avg", "exp_avg_sq")
        )
        self._counts = rows([state["step"] for state in chain.from_iterable(states)])
        self._steps = list(self._counts[: len(self._params)].unbind())

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor]) -> bool:
        """Take the steps, unless the settings differ by now; gradients ``(S, ...)``."""
        group, *others = self._groups
        if any(other[key] != group[key] for other in others for key in SETTINGS):
            return False
        self._counts.add_(1)
        moments: Any = self._averages, self._squares, [], self._steps
        _update(group, self._params, gradients, *moments)
        return True


def _update(group: dict[str, Any], params: Any, *tensors: Any) -> None:
    """Torch's fused step, with the settings of a group."""
    update: Any = torch._fused_adamw_ if group["decoupled_weight_decay"] else torch._fused_adam_
    rest = {key: group[key] for key in ("lr", "weight_decay", "eps", "maximize")}
    beta1, beta2 = group["betas"]
    update(params, *tensors, beta1=beta1, beta2=beta2, amsgrad=False, **rest)


def _is_settled(optimizer: Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Whether an optimiser is an Adam without hooks, whose next step is the update itself."""
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    return (
        isinstance(optimizer, Adam)
        and not (hooks or before_all or after_all)
        and optimizer._is_plain(optimizer.param_groups[0], [])
        and all(optimizer.state.get(parameter) for parameter in parameters)
    )


def _without_hooks(step: Any) -> Any:
    """A step as its class defines it: when an object is made, torch puts the hooks around it."""
    return step.__wrapped__ if getattr(step, "hooked", False) else step
