"""SVI: one optimisation step of a pair under any estimator."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pyro.infer
import pyro.optim
import torch
from torch import Tensor, nn

from ppvae.check import Checks, check_pair
from ppvae.elbo import ELBO, Estimator
from ppvae.program import local_parameters, method_owners


class SVI(pyro.infer.SVI):
    r"""Stochastic variational inference with parameters in modules and one fused optimiser.

    Used like ``pyro.infer.SVI``; Pyro's global parameter store is not touched.

    Args:
        model, guide: Pyro programs: ``ppvae.Program``, any ``nn.Module`` or ``PyroModule``, or a
            method of one. They may share modules.
        optim: a ``torch.optim`` class or a factory ``parameters -> optimiser`` such as
            ``functools.partial(torch.optim.Adam, lr=1e-3)``; a torch optimiser; or a ``PyroOptim``
            with one dictionary of arguments. Where torch has a fused implementation it is used,
            unless ``fused`` is set.
        loss: an estimator from :mod:`ppvae.elbo`; or a Pyro ELBO that is differentiable
            (``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceEnum_ELBO``).
        clip_norm: largest allowed global 2-norm of the gradient of the loss (summed over the
            batch), over what the optimiser holds; None for no clipping.

    Attributes:
        num_steps: optimisation steps taken.

    Raises:
        PairError: at the first step, if the pair or the batch is wrong, before any update.
        ValueError, TypeError: an optimiser or loss that cannot work.

    Example:
        >>> import functools, torch, ppvae
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> adam = functools.partial(torch.optim.Adam, lr=1e-2)
        >>> svi = ppvae.SVI(model, guide, adam, elbo.IWELBO(num_particles=8))
        >>> x = torch.bernoulli(torch.full((20, 4), 0.5))
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> losses[-1] < losses[0]
        True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any = torch.optim.Adam,
        loss: pyro.infer.ELBO | None = None,
        *,
        clip_norm: float | None = None,
    ) -> None:
        loss = loss if loss is not None else ELBO()
        if not isinstance(loss, pyro.infer.ELBO) or not hasattr(loss, "differentiable_loss"):
            raise TypeError(
                f"loss must be an estimator from ppvae.elbo, or a differentiable Pyro ELBO, got "
                f"{loss!r}; for pyro.infer.RenyiELBO use elbo.RenyiELBO or elbo.IWELBO"
            )
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(
                f"clip_norm must be positive, got {clip_norm}; use None for no clipping"
            )
        self.model, self.guide, self.elbo, self.clip_norm = model, guide, loss, clip_norm
        self.objective: nn.Module = loss(model, guide)
        if not isinstance(loss, Estimator):  # Pyro's own module of a pair does not look for them
            self.objective.owners = method_owners(model, guide)
        self.optim = optim
        self.optimizer: torch.optim.Optimizer | None = None
        self.num_steps = self.num_epochs = 0

    def prepare(self, *args: Any, **kwargs: Any) -> Checks:
        """Check the pair on a batch and build the optimiser; :meth:`step` does it when needed.

        Returns:
            What :func:`ppvae.check_pair` returns.
        """
        checks = check_pair(self.model, self.guide, *args, **kwargs)
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.optim, self.objective)
        return checks

    def update(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; the loss as a 0-d tensor, so that nothing waits for the device."""
        if self.optimizer is None:
            self.prepare(*args, **kwargs)
        assert self.optimizer is not None
        with local_parameters(), pyro.validation_enabled(False):  # validated once, in prepare
            self.optimizer.zero_grad()
            loss: Tensor = self.objective(*args, **kwargs)
            if self.num_steps == 0:
                require_own_parameters(loss, self.objective)
            loss.backward()
        if self.clip_norm is not None:
            # only what is optimised: gradients of other parameters are never set to zero
            optimised = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(optimised, self.clip_norm)
        self.optimizer.step()
        self.num_steps += 1
        return loss.detach()

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One optimisation step on a batch; returns the loss, summed over the batch, in nats."""
        return self.update(*args, **kwargs).item()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss on a batch, without a step."""
        with torch.no_grad(), local_parameters():
            loss: float = self.objective(*args, **kwargs).item()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers, the step count and the optimiser's state; no pickled code."""
        optimizer = self.optimizer.state_dict() if self.optimizer is not None else None
        objective = self.objective.state_dict()
        counts = {"num_steps": self.num_steps, "num_epochs": self.num_epochs}
        return {"objective": objective, "optimizer": optimizer, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state made by :meth:`state_dict` of an equal pair."""
        self.objective.load_state_dict(state["objective"])
        self.num_steps, self.num_epochs = state["num_steps"], state["num_epochs"]
        if state["optimizer"] is not None:
            if self.optimizer is None:
                self.optimizer = build_optimizer(self.optim, self.objective)
            self.optimizer.load_state_dict(state["optimizer"])


def require_own_parameters(loss: Tensor, module: nn.Module) -> None:
    """Raise ``ValueError`` if a loss depends on a parameter that no program owns.

    It would never be trained: a network that a plain function uses from outside, for example.
    """
    own = {id(p) for p in module.parameters()}
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            raise ValueError(
                f"the loss depends on a parameter of shape {tuple(leaf.shape)} that neither model "
                "nor guide owns, so it would never be trained; make its network an attribute of "
                "the program: class Model(ppvae.Program) with self.net = net"
            )
        pending.extend(parent for parent, _ in node.next_functions)


def build_optimizer(optim: Any, module: nn.Module) -> torch.optim.Optimizer:
    """A torch optimiser over a module's trainable parameters; see :class:`SVI` for ``optim``."""
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
    given = optim.keywords if isinstance(optim, functools.partial) else {}
    if "fused" not in given and "foreach" not in given and _can_fuse(factory, parameters):
        return optim(parameters, fused=True)
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
