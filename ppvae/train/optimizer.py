"""The one torch optimiser of a pair, from what the user gives."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pyro.optim
import torch
from torch import nn
from torch.optim import Adam, AdamW

from ppvae.auxiliary import own_parameters
from ppvae.train import fused_adam

_CHEAPER: dict[Any, Any] = {Adam: fused_adam.Adam, AdamW: fused_adam.AdamW}


def check_optim(optim: Any) -> None:
    """Raise ``TypeError`` for what is no optimiser and makes none."""
    makes = callable(optim) and not isinstance(optim, nn.Module)
    if isinstance(optim, type):
        makes = issubclass(optim, torch.optim.Optimizer)
    if not makes and not isinstance(optim, torch.optim.Optimizer):
        raise TypeError(f"optim takes a torch.optim class, a factory or a PyroOptim, got {optim!r}")


def build_optimizer(optim: Any, module: nn.Module) -> torch.optim.Optimizer:
    """A torch optimiser over a module's parameters; ``optim``: see :class:`ppvae.SVI`.

    It holds frozen ones too: they have no gradient, so it passes over them until they have one;
    and none of an auxiliary in the module, which has an optimiser of its own.
    """
    named = own_parameters(module).values()
    parameters = [p for p in named if p.is_floating_point() or p.is_complex()]
    if not any(p.requires_grad for p in parameters):
        raise ValueError(
            "model and guide have no trainable parameters: make the networks attributes of them"
        )
    if isinstance(optim, torch.optim.Optimizer):
        held = {id(p) for group in optim.param_groups for p in group["params"]}
        if not any(id(p) in held and p.requires_grad for p in parameters):
            raise ValueError("the optimiser holds none of the pair's parameters: pass its class")
        return optim
    if isinstance(optim, pyro.optim.PyroOptim):
        optim = _from_pyro(optim)
    made = functools.partial(optim)  # equal to ``optim``, if that is a partial already
    _check_first_order(made.func)
    # torch's fused momentum fails where a parameter gets its first gradient after the others
    settled = {"fused", "foreach"} & made.keywords.keys() or made.keywords.get("momentum")
    if settled or not _can_fuse(made.func, parameters):
        return require_optimizer(optim(parameters))
    factory = _CHEAPER.get(made.func, made.func)
    return require_optimizer(factory(*made.args, parameters, **made.keywords, fused=True))


def require_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """What was made, if it is an optimiser."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            "optim must make a torch optimiser from parameters, and made "
            f"{type(optimizer).__name__}: let it return the optimiser"
        )
    return optimizer


def take_up(optimizer: torch.optim.Optimizer, optim: Any, module: nn.Module) -> None:
    """Let an optimiser hold the parameters that a module has now, as one made for it would.

    What it remembers of those that stay is kept, and new ones start without. An optimiser that was
    given as such holds what its owner has put into it.

    Raises:
        ValueError: the factory now makes other groups.
    """
    if isinstance(optim, torch.optim.Optimizer):
        return
    now = build_optimizer(optim, module)
    if now is optimizer:  # a factory that has made it before
        return
    if len(now.param_groups) != len(optimizer.param_groups):
        raise ValueError(
            "the pair has other parameters than before, and of these optim makes "
            f"{len(now.param_groups)} groups in the place of {len(optimizer.param_groups)}: make a "
            "new SVI"
        )
    for group, other in zip(optimizer.param_groups, now.param_groups, strict=True):
        group["params"] = other["params"]
    held = {id(p) for group in now.param_groups for p in group["params"]}
    for gone in [p for p in optimizer.state if id(p) not in held]:
        del optimizer.state[gone]


def left_out(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module, by name, that an optimiser does not hold."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in own_parameters(module).items() if id(p) not in held}


def _check_first_order(factory: Any) -> None:
    """Raise ``TypeError`` for an optimiser whose step needs the loss as a function."""
    closure = inspect.signature(getattr(factory, "step", lambda closure=None: None)).parameters
    if "closure" in closure and closure["closure"].default is inspect.Parameter.empty:
        raise TypeError(
            f"{factory.__name__} evaluates the loss several times in a step, SVI once: use Adam"
        )


def _can_fuse(factory: Any, parameters: list[nn.Parameter]) -> bool:
    is_class = inspect.isclass(factory) and issubclass(factory, torch.optim.Optimizer)
    if not is_class or "fused" not in inspect.signature(factory).parameters:
        return False
    devices = ("cpu",) if issubclass(factory, torch.optim.Adagrad) else ("cpu", "cuda")
    return all(p.is_floating_point() and p.device.type in devices for p in parameters)


def moved(optimizer: torch.optim.Optimizer) -> None:
    """Settle an optimiser whose parameters are on another device now, and its state with them."""
    optimizer.load_state_dict(optimizer.state_dict())  # which casts the state
    for group in optimizer.param_groups:
        if group.get("fused") and not _can_fuse(type(optimizer), group["params"]):
            group["fused"] = False


def _from_pyro(optim: pyro.optim.PyroOptim) -> Callable[..., torch.optim.Optimizer]:
    if isinstance(optim, pyro.optim.PyroLRScheduler):
        raise TypeError(
            "a Pyro scheduler keeps one schedule per tensor: use ppvae.fit(..., lr_scheduler=...)"
        )
    if callable(optim.pt_optim_args) or optim.pt_clip_args:
        raise TypeError(
            "a PyroOptim with arguments per parameter, or clip_args, is no one torch optimiser: "
            "give a factory with parameter groups, and SVI(clip_norm=...)"
        )
    return functools.partial(optim.pt_optim_constructor, **optim.pt_optim_args)
