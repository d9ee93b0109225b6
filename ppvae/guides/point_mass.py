"""A point instead of a distribution: MAP inference, and the plain autoencoder."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.conditionals import Conditional
from ppvae.guides.amortized import Amortized


class PointMass(Amortized):
    r"""All mass at one point, which a network computes: an autoencoder under the model's prior.

    .. math:: q(z \mid x) = \delta(z - f_\phi(x)), \qquad
              \text{ELBO} := \log p(x, f_\phi(x))

    The second is a convention (log q = 0), and what training maximises: the network learns the
    mode of p(z | x). It is a density in z, not a bound on log p(x), which it can exceed; it does
    not compare with the ELBO of a guide that has a density. Importance weights do not exist, so a
    point mass refuses to be drawn more than once: IWELBO, log p(x), k-hat.

    Args:
        net: from ``x`` to ``latent_dim`` numbers.
        condition: from ``y`` to features, e.g. ``nets.OneHot(10)``; y itself if None.
        latent: the name of the latent site.

    Raises:
        ValueError: for more than one particle.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.PointMass(nets.mlp(4, 8, 2))
        >>> ppvae.log_weights(model, guide, torch.ones(3, 4)).log_q["z"]
        tensor([[0., 0., 0.]])
        >>> ppvae.log_weights(model, guide, torch.ones(3, 4), num_particles=5)
        Traceback (most recent call last):
        ...
        ValueError: a point mass has no density, ...
    """

    @takes_numbers
    def __init__(
        self, net: nn.Module, condition: nn.Module | None = None, latent: str = "z"
    ) -> None:
        super().__init__(_Point(net), condition, latent)


class _Point(Conditional):
    def forward(self, *inputs: Tensor) -> PointDistribution:
        return PointDistribution(self.outputs(*inputs), event_dim=1)


class PointDistribution(dist.Delta):
    """A ``Delta`` that is not to be drawn twice."""

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        if len(batch_shape) > len(self.batch_shape):
            cure = "train it with elbo.ELBO() (one particle); evidence needs a guide with a density"
            raise ValueError(f"a point mass has no density, so no importance weights: {cure}")
        return super().expand(batch_shape, _instance)
