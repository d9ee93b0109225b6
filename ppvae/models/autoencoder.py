"""The autoencoder's model: a decoder under a flat prior."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.models.vae import VAE


class Autoencoder(VAE):
    r"""A decoder without a density for the code: with a point-mass guide, the autoencoder.

    .. math:: p(z) \propto 1,\qquad x \sim p_\theta(x \mid z),\qquad
              q(z \mid x) = \delta(z - f_\phi(x))

    The ELBO of that pair is :math:`\log p_\theta(x \mid f_\phi(x))`, so training minimises the
    cross-entropy with ``conditionals.Bernoulli``, and the squared error over :math:`2\sigma^2`
    with ``conditionals.Normal(net, scale=sigma)``. There is no loss of its own. Shorthand for
    ``VAE(likelihood, prior=Flat(latent_dim))``; with :class:`~ppvae.models.VAE` and its normal
    prior instead, the same guide gives the autoencoder with a penalty on the code's square.

    Args:
        likelihood: the conditional p(x | z).
        latent_dim: the size of the code z.

    Raises:
        ValueError: when called without x.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> decoder, encoder = nets.mlp(2, 16, 64), nets.mlp(64, 16, 2)
        >>> model = models.Autoencoder(conditionals.Bernoulli(decoder), latent_dim=2)
        >>> guide = guides.PointMass(encoder)
        >>> x = torch.ones(5, 64)
        >>> loss = elbo.ELBO()(model, guide)(x)
        >>> by_hand = nn.functional.binary_cross_entropy_with_logits(
        ...     decoder(encoder(x)), x, reduction="sum")
        >>> torch.allclose(loss, by_hand)
        True
    """

    @takes_numbers(latent_dim=1)
    def __init__(self, likelihood: nn.Module, latent_dim: int) -> None:
        super().__init__(likelihood, prior=Flat(latent_dim))

    def forward(
        self, x: Tensor | None = None, offset: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """Observe ``x``, ``(N, ...)``; there is nothing to draw it from."""
        if x is None:
            cure = "fit a density to the codes (ppvae.fit_prior), or train a VAE"
            raise ValueError(f"an autoencoder has no p(z) to draw from; {cure}")
        return super().forward(x, offset, size)


class Flat(nn.Module):
    r"""The prior :math:`p(z) \propto 1`, which is no density: log p(z) counts as 0.

    Args:
        dim: the size of z.
    """

    origin: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("origin", torch.zeros(dim), persistent=False)

    def forward(self, *context: Tensor) -> FlatDistribution:
        return FlatDistribution(self.origin)


class FlatDistribution(dist.TorchDistribution):
    """log p(z) = 0 everywhere. Its "draw" is the origin.

    Where ppvae checks shapes and data it runs the model without a guide.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector

    def __init__(self, origin: Tensor, batch_shape: Any = ()) -> None:
        super().__init__(torch.Size(batch_shape), origin.shape, validate_args=False)
        self.origin = origin

    def expand(self, batch_shape: Any, _instance: Any = None) -> FlatDistribution:
        return FlatDistribution(self.origin, batch_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return torch.zeros_like(value[..., 0])

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.origin.expand(self._extended_shape(torch.Size(sample_shape))).clone()
