"""What every estimator shares: from a pair's log-weights to a loss with the right gradient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import pyro.infer
import torch
from torch import Tensor, nn

from ppvae.elbo.gradients import surrogate
from ppvae.program import module_of
from ppvae.weights import LogWeights, log_weights, own_path

# Stock Pyro engines pass no step count, which schedules need: estimator -> guide -> steps taken.
_stock_steps: WeakKeyDictionary[Any, WeakKeyDictionary[Any, int]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Estimator(pyro.infer.ELBO):
    r"""A bound on log p(x) for each datapoint, and how its gradient is estimated.

    A leaf implements :meth:`bound`, from log-weights ``(K, N)`` to one value per datapoint
    ``(N,)`` in nats, larger is better. The loss is Pyro's: minus the sum over the batch, times
    N_total / N if the data plate is subsampled (outside the logarithm).

    .. math:: \text{loss} = -\tfrac{N_\text{total}}{N} \sum_n B(\log w_{1n}, \dots, \log w_{Kn})

    Args:
        num_particles: K >= 1 draws from the guide per datapoint.
        gradient: how the guide's gradient is estimated, see :mod:`ppvae.elbo.gradients`.
    """

    num_particles: int = 1
    gradient: str = "pathwise"

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "dreg", "score", "vimco")

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.num_particles < 1:
            raise ValueError(f"{name}: num_particles must be at least 1, got {self.num_particles}")
        if self.gradient not in self.gradients:
            raise ValueError(
                f"{name}: gradient={self.gradient!r} is not defined; use one of {self.gradients}"
            )
        if self.gradient == "vimco" and self.num_particles < 2:
            raise ValueError(
                f'{name}: gradient="vimco" compares particles, so it needs num_particles >= 2; '
                'use gradient="score" for one particle'
            )

    @abstractmethod
    def bound(self, log_w: Tensor) -> Tensor:
        """The bound of each datapoint: log-weights ``(K, N)`` to ``(N,)``, in nats."""

    def dreg_coefficient(self, log_w: Tensor) -> Tensor:
        r""":math:`c_k - \partial c_k / \partial \ell_k`, ``(K, N)``; see ``"dreg"``."""
        raise NotImplementedError(f"{type(self).__name__} defines no dreg_coefficient")

    def effective(self, weights: LogWeights, step: int) -> Tensor:
        """The log-weights that enter :meth:`bound`, ``(K, N)``; a linear bound may temper them."""
        for program, site in weights.site_scales:
            raise ValueError(
                f"{type(self).__name__} is not linear in the log-weights, so the scale on site "
                f"{site!r} of the {program} has no meaning under it (inside the logarithm it is "
                "not a bound). Remove poutine.scale and inner subsampled plates: minibatches need "
                "no scale but the data plate's, and a weight on the KL is elbo.ELBO(beta=...)"
            )
        return weights.log_w

    def evaluate(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The bound on log p(x) of each datapoint, ``(N,)`` nats, unweighted, no gradient."""
        with torch.no_grad():
            K = self.num_particles
            return self.bound(log_weights(model, guide, *args, num_particles=K, **kwargs).log_w)

    def loss_tensor(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, step: int = 0
    ) -> Tensor:
        """The loss as a differentiable scalar; ``step`` is what schedules are called with."""
        with own_path():
            bound, scale = surrogate(self, model, guide, args, kwargs, step)
        return -scale * bound

    # -- the interface of pyro.infer.ELBO --------------------------------------------------------
    def __call__(self, model: Callable, guide: Callable) -> Objective:
        """An ``nn.Module`` whose ``forward(*args)`` is the loss."""
        return Objective(model, guide, self)

    def differentiable_loss(
        self, model: Callable, guide: Callable, *args: Any, **kwargs: Any
    ) -> Tensor:
        """The loss as a differentiable scalar."""
        step = _stock_steps.setdefault(self, WeakKeyDictionary()).get(guide, 0)
        return self.loss_tensor(model, guide, args, kwargs, step)

    def loss(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss as a number."""
        with torch.no_grad():
            return self.differentiable_loss(model, guide, *args, **kwargs).item()

    def loss_and_grads(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> float:
        """The loss as a number; adds its gradient to the parameters'. One step of stock SVI."""
        loss = self.differentiable_loss(model, guide, *args, **kwargs)
        loss.backward()  # type: ignore[no-untyped-call]
        steps = _stock_steps[self]
        steps[guide] = steps.get(guide, 0) + 1
        return loss.item()

    def _get_trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("ppvae's estimators draw their traces in ppvae.log_weights")


class Objective(nn.Module):
    """A pair and an estimator as one module whose ``forward(*args)`` is the loss.

    Made by calling an estimator: ``elbo.IWELBO(num_particles=8)(model, guide)``. The loss is
    summed over the batch, as in Pyro. ``step`` counts the training losses computed so far and is
    what schedules are called with; it is saved with ``state_dict()``.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> import torch
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> loss = elbo.ELBO()(model, guide)(torch.ones(5, 4))
        >>> loss.shape, loss.requires_grad
        (torch.Size([]), True)
    """

    def __init__(self, model: Callable, guide: Callable, elbo: Estimator) -> None:
        super().__init__()
        self.model, self.guide, self.elbo = model, guide, elbo
        self.step = 0
        # A bound method of a module is a program too; its owner holds the parameters.
        owners = {id(p): module_of(p) for p in (model, guide) if not isinstance(p, nn.Module)}
        self.owners = nn.ModuleList([owner for owner in owners.values() if owner is not None])

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = self.elbo.loss_tensor(self.model, self.guide, args, kwargs, self.step)
        if self.training and torch.is_grad_enabled():
            self.step += 1
        return loss

    def get_extra_state(self) -> dict[str, int]:
        return {"step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.step = state["step"]
