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

from ppvae.train import fused_adam

_CHEAPER: dict[Any, Any] = {Adam: fused_adam.Adam, AdamW: fused_adam.AdamW}


def build_optimizer(optim: Any, module: nn.Module) -> torch.optim.Optimizer:
    """A torch optimiser over a module's trainable parameters; ``optim``: see :class:`ppvae.SVI`."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "model and guide have no trainable parameters: make the networks attributes of them"
        )
    if isinstance(optim, torch.optim.Optimizer):
        held = {id(p) for group in optim.param_groups for p in group["params"]}
        if not any(id(p) in held for p in parameters):
            raise ValueError("the optimiser holds none of the pair's parameters: pass its class")
        return optim
    if isinstance(optim, pyro.optim.PyroOptim):
        optim = _from_pyro(optim)
    if not callable(optim):
        raise TypeError(f"optim takes a torch.optim class, a factory or a PyroOptim, got {optim!r}")
    made = functools.partial(optim)  # equal to ``optim``, if that is a partial already
    _check_first_order(made.func)
    if {"fused", "foreach"} & made.keywords.keys() or not _can_fuse(made.func, parameters):
        return optim(parameters)
    factory = _CHEAPER.get(made.func, made.func)
    return factory(*made.args, parameters, **made.keywords, fused=True)


def _check_first_order(factory: Any) -> None:
    """Raise ``TypeError`` for an optimiser whose step needs the loss as a function."""
    closure = inspect.signature(getattr(factory, "step", lambda closure=None: None)).parameters
    if "closure" in closure and closure["closure"].default is inspect.Parameter.empty:
        raise TypeError(
            f"{factory.__name__} evaluates the loss several times in a step, SVI once: use Adam"
        )


def _can_fuse(factory: Any, parameters: list[nn.Parameter]) -> bool:
    is_class = inspect.isclass(factory) and issubclass(factory, torch.optim.Optimizer)
    return (
        is_class
        and "fused" in inspect.signature(factory).parameters
        and all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
    )


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
