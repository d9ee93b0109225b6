"""The amortised diagonal normal guide."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import torch
from torch import Tensor, nn

from ppvae import conditionals
from ppvae.program import Program, data_plate


class Normal(Program):
    r"""The mean-field amortised guide: a diagonal normal whose moments a network computes.

    .. math:: q(z \mid x) = \mathcal N\left(\mu_\phi(x), \operatorname{diag} \sigma_\phi(x)^2\right)

    Args:
        net: from ``x`` to ``2 * latent_dim`` numbers: loc and raw scale. In the conditional form
            q(z | x, y) it is called as ``net(x, features of y)``; ``nets`` concatenate.
        condition: from ``y`` to features, e.g. ``nets.OneHot(10)``; y itself if None.
        positive: raw scale to scale: ``torch.exp`` (log-sigma) or ``torch.nn.Softplus()``.
        latent: the name of the latent site.

    The distribution q(z | x) itself is ``guide.posterior(x)``: written here and nowhere else.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2014.

    Example:
        >>> import torch
        >>> from ppvae import guides, nets
        >>> guide = guides.Normal(nets.mlp(64, 256, 2 * 16))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self,
        net: nn.Module,
        condition: nn.Module | None = None,
        positive: Callable[[Tensor], Tensor] = torch.exp,
        latent: str = "z",
    ) -> None:
        super().__init__()
        self.conditional = conditionals.Normal(net, positive=positive)
        self.condition = condition if condition is not None else nn.Identity()
        self.latent = latent

    def posterior(self, x: Tensor, y: Tensor | None = None) -> pyro.distributions.Distribution:
        """q(z | x), or q(z | x, y): batch shape ``(N,)``, event shape ``(latent_dim,)``."""
        if y is not None:
            return self.conditional(x, self.condition(y))
        if not isinstance(self.condition, nn.Identity):
            raise ValueError(
                "this guide was given a condition, so call it with x and y: data as a tuple "
                "(x, y), or dataset.supervised()"
            )
        return self.conditional(x)

    def forward(self, x: Tensor, y: Tensor | None = None, size: int | None = None) -> Tensor:
        """Draw z, ``(N, latent_dim)``, in the plate ``"data"``; arguments as the model's."""
        with data_plate(x, size=size):
            z: Tensor = pyro.sample(self.latent, self.posterior(x, y))
        return z
