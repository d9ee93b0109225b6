"""The thermodynamic variational objective."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ppvae.elbo.estimator import Estimator
from ppvae.elbo.gradients import with_gradient
from ppvae.elbo.importance import normalised, require_number
from ppvae.elbo.state import State
from ppvae.pairs import Leaves
from ppvae.weights import log_q_of_draws, weigh


@dataclass(frozen=True, eq=False)
class ThermodynamicELBO(Estimator):
    r"""The thermodynamic variational objective (TVO): a left Riemann sum of the path to log p(x).

    .. math:: \log p(x) = \int_0^1 \mathbb E_{\pi_\beta}[\log w]\, d\beta \ \ge\
              \sum_{j=1}^{J} (\beta_j - \beta_{j-1})\, \mathbb E_{\pi_{\beta_{j-1}}}[\log w],
              \qquad \pi_\beta \propto p(x, z)^\beta q(z \mid x)^{1-\beta}

    with :math:`0 = \beta_0 < \dots < \beta_J = 1`. The expectations are self-normalised importance
    averages over the K draws, so at finite K the value is an estimate, not an unbiased one.

    Args:
        num_particles: K >= 2.
        gradient: ``"covariance"``: the paper's, :math:`\mathbb E_{\pi_\beta}[\nabla \log w] +
            \mathrm{Cov}_{\pi_\beta}(\nabla \log \tilde\pi_\beta, \log w)` at fixed draws, with the
            factor K / (K - 1); it needs no reparameterisation and is the gradient of the objective
            itself as K grows. ``"pathwise"``, ``"score"``, ``"vimco"``: gradients of the K-draw
            estimate, see :mod:`ppvae.elbo.gradients`.
        partition: the inner points :math:`\beta_1 < \dots < \beta_{J-1}` in (0, 1); none gives the
            ELBO.

    Source: Masrani, Le & Wood, The Thermodynamic Variational Objective, 2019.

    Example:
        >>> from ppvae import elbo
        >>> elbo.ThermodynamicELBO(num_particles=2).bound(torch.tensor([[-1.0], [-1.0]]))
        tensor([-1.])
    """

    num_particles: int = 10
    gradient: str = "covariance"
    partition: tuple[float, ...] = (0.03, 0.07, 0.17, 0.41)

    gradients: ClassVar[tuple[str, ...]] = ("covariance", "pathwise", "score", "vimco")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "partition")
        if not isinstance(self.partition, tuple):
            raise TypeError(f"partition is a tuple, as (0.1, 0.5), got {self.partition!r}")
        points = (0.0, *self.partition, 1.0)
        if any(not a < b for a, b in itertools.pairwise(points)):
            raise ValueError(
                f"partition must rise strictly inside (0, 1), got {self.partition}, e.g. (0.1, 0.5)"
            )
        if self.num_particles < 2:
            raise ValueError(
                "ThermodynamicELBO compares particles, so it needs num_particles >= 2; with one, "
                "it is elbo.ELBO"
            )

    def bound(self, log_w: Tensor) -> Tensor:
        """It is minus infinity if any weight is 0: the first average, at beta = 0, is the ELBO."""
        (_, width), *rest = self._intervals()
        first = width * log_w.mean(0)
        log_w = log_w.clamp(min=torch.finfo(log_w.dtype).min)  # 0 times infinity is NaN
        averages = [w * (normalised(point * log_w) * log_w).sum(0) for point, w in rest]
        return torch.stack([first, *averages]).sum(0)

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        if self.gradient != "covariance":
            return super().surrogate(model, guide, args, kwargs, state)
        weights = weigh(model, guide, args, kwargs, self.num_particles, leaves=Leaves())
        log_w = self.effective(weights, state)
        log_q = log_q_of_draws(weights, weights.q.keys() - weights.enumerated.keys())
        fixed = log_w.detach()
        correction = self.num_particles / (self.num_particles - 1)
        gradient = torch.zeros_like(log_w)
        for point, width in self._intervals():
            share = normalised(point * fixed)
            centred = correction * share * (fixed - (share * fixed).sum(0))
            path = log_q + point * log_w  # beta log p + (1 - beta) log q, at the fixed draws
            gradient = gradient + width * (share * log_w + centred * path)
        gradient = gradient.sum()
        return weights.scale * with_gradient(self.bound(fixed).sum(), gradient)

    def _intervals(self) -> list[tuple[float, float]]:
        """The left end and the width of every interval of the path."""
        points = (0.0, *self.partition, 1.0)
        return [(low, high - low) for low, high in itertools.pairwise(points)]
