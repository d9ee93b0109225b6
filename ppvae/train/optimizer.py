"""The one torch optimiser of a pair, from whatever the user gives."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pyro.optim
import torch
from torch import nn

from ppvae.train import fused_adam


def build_optimizer(optim: Any, module: nn.Module) -> torch.optim.Optimizer:
    """A torch optimiser over a module's trainable parameters; ``optim``: see :class:`ppvae.SVI`."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "model and guide have no trainable parameters; make the networks attributes of an "
            "nn.Module (a ppvae.Program), so that .parameters() finds them"
        )
    if isinstance(optim, torch.optim.Optimizer):
        known = {id(p) for group in optim.param_groups for p in group["params"]}
        if not any(id(p) in known for p in parameters):
            raise ValueError(
                "the optimiser holds none of the pair's parameters; build it from "
                "[*model.parameters(), *guide.parameters()], or pass the class"
            )
        return optim
    if isinstance(optim, pyro.optim.PyroOptim):
        optim = _from_pyro(optim)
    if not callable(optim):
        raise TypeError(
            "optim must be a torch.optim class, a factory, an optimiser or a PyroOptim, got "
            f"{optim!r}"
        )
    factory = optim.func if isinstance(optim, functools.partial) else optim
    closure = inspect.signature(getattr(factory, "step", lambda closure=None: None)).parameters
    if "closure" in closure and closure["closure"].default is inspect.Parameter.empty:
        raise TypeError(
            f"{factory.__name__} evaluates the loss several times in a step, and a step of SVI is "
            "one loss and one gradient; use torch.optim.Adam or another first-order optimiser"
        )
    given = optim.keywords if isinstance(optim, functools.partial) else {}
    if "fused" not in given and "foreach" not in given and _can_fuse(factory, parameters):
        cheaper: dict[Any, Any] = {
            torch.optim.Adam: fused_adam.Adam,
            torch.optim.AdamW: fused_adam.AdamW,
        }
        arguments = optim.args if isinstance(optim, functools.partial) else ()
        return cheaper.get(factory, factory)(*arguments, parameters, **given, fused=True)
    return optim(parameters)


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
            "a Pyro scheduler keeps one schedule per tensor; pass the torch optimiser class here "
            "and the schedule to ppvae.fit(..., lr_scheduler=...)"
        )
    if callable(optim.pt_optim_args) or optim.pt_clip_args:
        raise TypeError(
            "a PyroOptim with arguments per parameter, or with clip_args, cannot be made one torch "
            "optimiser; pass a factory with parameter groups, and SVI(clip_norm=...)"
        )
    return functools.partial(optim.pt_optim_constructor, **optim.pt_optim_args)
