"""Importance-weighted and Rényi bounds: nonlinear functions of K log-weights."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ppvae.elbo.estimator import Estimator


@dataclass(frozen=True, eq=False)
class IWELBO(Estimator):
    r"""The importance-weighted bound of K particles, per datapoint.

    .. math:: \mathcal L_K(x) = \mathbb E\left[\log \frac 1K \sum_{k=1}^K w_k\right]
              \le \mathcal L_{K+1}(x) \le \log p(x)

    Args:
        num_particles: K >= 1; the bound tightens with K.
        gradient: ``"pathwise"``, ``"dreg"``, ``"score"`` or ``"vimco"``, see
            :mod:`ppvae.elbo.gradients`. The pathwise gradient of the guide loses signal as K
            grows (Rainforth et al. 2018); ``"dreg"`` does not.

    Raises:
        ValueError: bad arguments; a ``poutine.scale`` on a site (the bound is not linear).

    Source: Burda et al., Importance Weighted Autoencoders, 2016.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> loss = elbo.IWELBO(num_particles=8)(model, guide)
        >>> loss(torch.ones(5, 4)).shape
        torch.Size([])
    """

    def bound(self, log_w: Tensor) -> Tensor:
        return torch.logsumexp(log_w, 0) - math.log(log_w.shape[0])

    def dreg_coefficient(self, log_w: Tensor) -> Tensor:
        return torch.softmax(log_w, 0).square()


@dataclass(frozen=True, eq=False)
class RenyiELBO(Estimator):
    r"""The variational Rényi bound of order alpha, per datapoint.

    .. math:: \mathcal L_\alpha(x) = \frac{1}{1-\alpha}
              \log \frac 1K \sum_{k=1}^K w_k^{1-\alpha}

    alpha = 0 is :class:`IWELBO`; alpha -> 1 is the ELBO (use :class:`ELBO`, it raises here);
    alpha = -inf is VR-max, the largest log-weight. For alpha >= 0 its expectation is a lower bound
    on log p(x) at every K; for alpha < 0 only small K keep it below, so it is no bound.

    Args:
        num_particles: K >= 1.
        gradient: ``"pathwise"``, ``"dreg"``, ``"score"`` or ``"vimco"``, see
            :mod:`ppvae.elbo.gradients`.
        alpha: the order, any number but 1.

    Raises:
        ValueError: alpha is 1; K < 1; a ``poutine.scale`` on a site.

    Source: Li & Turner, Rényi Divergence Variational Inference, 2016.

    Example:
        >>> from ppvae import elbo
        >>> log_w = torch.tensor([[-3.0], [-1.0]])
        >>> elbo.RenyiELBO(num_particles=2, alpha=-math.inf).bound(log_w)
        tensor([-1.])
        >>> zero = elbo.RenyiELBO(num_particles=2, alpha=0.0).bound(log_w)
        >>> torch.equal(zero, elbo.IWELBO(num_particles=2).bound(log_w))
        True
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha == 1 or math.isnan(self.alpha) or self.alpha == math.inf:
            raise ValueError(
                f"RenyiELBO needs a finite alpha other than 1 (or -inf for VR-max), got "
                f"{self.alpha}; the limit alpha -> 1 is elbo.ELBO"
            )
        if self.alpha == -math.inf and self.gradient == "dreg":
            raise ValueError(
                'VR-max (alpha=-inf) has weights that jump, so gradient="dreg" is not defined; use '
                '"pathwise"'
            )

    def bound(self, log_w: Tensor) -> Tensor:
        if self.alpha == -math.inf:
            return log_w.amax(0)
        order = 1 - self.alpha
        return (torch.logsumexp(order * log_w, 0) - math.log(log_w.shape[0])) / order

    def dreg_coefficient(self, log_w: Tensor) -> Tensor:
        weights = torch.softmax((1 - self.alpha) * log_w, 0)
        return self.alpha * weights + (1 - self.alpha) * weights.square()
