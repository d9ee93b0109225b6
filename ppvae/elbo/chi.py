"""The chi upper bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ppvae.elbo.estimator import Estimator
from ppvae.elbo.gradients import through_draws, with_gradient
from ppvae.elbo.importance import (
    centred_powers,
    log_power_mean,
    normalised,
    require_number,
)
from ppvae.elbo.state import State
from ppvae.pairs import Leaves
from ppvae.weights import drawn_log_q, log_q_of_draws, weigh


@dataclass(frozen=True, eq=False)
class ChiUpperBound(Estimator):
    r"""The chi upper bound (CUBO) on log p(x), which the guide alone minimises.

    .. math:: \mathcal U_n(x) = \frac 1n \log \mathbb E_q\left[w^n\right] \ge \log p(x),\qquad
              \nabla_\phi\, \mathcal U_n = -\frac{n-1}{n}\,
              \mathbb E_{\pi}\left[\nabla_\phi \log q(z \mid x)\right],\quad \pi \propto q w^n

    The expectation under pi is a self-normalised importance average over the K draws, at fixed
    draws: consistent as K grows. (The gradient of the K-draw estimate itself would reward a guide
    that misses the posterior, because that estimate lies below U.) The model receives no gradient:
    lowering an upper bound does not fit it.

    The value, :math:`\frac 1n \log \frac 1K \sum_k w_k^n`, lies below U in expectation, so **at
    finite K it may lie below log p(x)**; its sign is that of a bound, but smaller is better.

    Args:
        num_particles: K >= 2; hundreds, if the value matters.
        gradient: ``"reweighted"`` as above, or ``"dreg"``: the same average through
            reparameterised draws, with less variance.
        order: n > 1.

    Source: Dieng et al., Variational Inference via chi Upper Bound Minimization, 2017.

    Example:
        >>> from ppvae import elbo
        >>> elbo.ChiUpperBound(num_particles=2).bound(torch.tensor([[-1.0], [-1.0]]))
        tensor([-1.])
    """

    num_particles: int = 100
    gradient: str = "reweighted"
    order: float = 2.0

    gradients: ClassVar[tuple[str, ...]] = ("reweighted", "dreg")
    sign: ClassVar[int] = -1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "order")
        if not 1 < self.order < math.inf:
            raise ValueError(
                f"ChiUpperBound needs a finite order > 1 (at 1 it is log p(x) itself, whatever the "
                f"guide), got {self.order}"
            )
        if self.num_particles < 2:
            raise ValueError("ChiUpperBound compares particles, so it needs num_particles >= 2")

    def bound(self, log_w: Tensor) -> Tensor:
        return log_power_mean(log_w, self.order)

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        leaves = Leaves()
        weights = weigh(model, guide, args, kwargs, self.num_particles, leaves=leaves)
        log_w = self.effective(weights, state)
        value = self.bound(log_w.detach()).sum()
        if not torch.is_grad_enabled():
            return weights.scale * value
        share = normalised(centred_powers(log_w.detach(), self.order)[1])
        if self.gradient == "dreg":
            self.require_reparameterised(weights)
            c = (1 - self.order) * (share - share.square())
            gradient = through_draws(c, log_w, leaves, hidden=share)
        else:
            drawn = log_q_of_draws(weights, weights.q.keys() - weights.enumerated.keys())
            gradient = (share * (drawn / self.order - drawn_log_q(weights))).sum()
        return weights.scale * with_gradient(value, gradient)
