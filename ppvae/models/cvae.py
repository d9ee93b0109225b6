"""The conditional variational autoencoder's model: p(z | y) p(x | z, y)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.chain import require_likelihood
from ppvae.models.vae import choose_prior, with_offset
from ppvae.program import Program, data_plate


class CVAE(Program):
    r"""A latent-variable model of x given y: labels, or the visible part of an image.

    .. math:: z \sim p(z \mid y),\qquad x \sim p_\theta(x \mid z, y)

    Args:
        likelihood: the conditional p(x | z, y), called with z and the features of y.
        latent_dim: the size of z, for a standard normal prior that ignores y.
        prior: another prior in its place, called with the features of y: a learned p(z | y) is
            ``conditionals.Normal(nets.mlp(features, 256, 2 * latent_dim))``.
        condition: from ``y`` to features: ``nets.OneHot(10)`` for labels, any network for vectors
            or images; y itself if None. Model and guide may share it.

    Raises:
        ValueError: neither or both of ``latent_dim`` and ``prior`` are given.
        TypeError: the likelihood gives no distribution, as a bare network does.

    Source: Sohn, Lee & Yan, Learning Structured Output Representation using Deep Conditional
    Generative Models, 2015.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, models, nets
        >>> likelihood = conditionals.Bernoulli(nets.mlp(8 + 10, 256, 64))
        >>> model = models.CVAE(likelihood, latent_dim=8, condition=nets.OneHot(10))
        >>> model(y=torch.arange(10)).shape  # one image of each class
        torch.Size([10, 64])
    """

    @takes_numbers
    def __init__(
        self,
        likelihood: nn.Module,
        latent_dim: int | None = None,
        prior: nn.Module | None = None,
        condition: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.prior = choose_prior(prior, latent_dim)
        self.condition = condition if condition is not None else nn.Identity()
        require_likelihood(self, _for_labels)

    def forward(
        self,
        x: Tensor | None = None,
        y: Tensor | None = None,
        offset: Tensor | None = None,
        size: int | None = None,
    ) -> Tensor:
        """Observe ``x``, ``(N, ...)``, given ``y``, ``(N, ...)``; or draw x if it is None.

        With ``size``, x and y are a minibatch of a data set of that many rows. ``offset``, ``(N,)``
        or ``(N, 1)``, is the log exposure of each row, of a likelihood of counts.
        """
        if y is None:
            raise ValueError("CVAE models x given y: call model(x, y), or model(y=y) to draw x")
        features = self.condition(y)
        with data_plate(x, y, size=size):
            z = pyro.sample("z", self.prior(features))
            value: Tensor = pyro.sample(
                "x", with_offset(self.likelihood, offset, z, features), obs=x
            )
        return value


def _for_labels(model: Any) -> Sequence[Tensor]:
    """What the likelihood is called with for two rows, if y is labels."""
    features = model.condition(torch.zeros(2, dtype=torch.long))
    return [torch.zeros(2, *model.prior(features).event_shape), features]
