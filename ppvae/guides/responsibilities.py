"""The exact posterior of a mixture's cluster, at parameters of its own: the E step of EM."""

from __future__ import annotations

import copy
from typing import Any

import pyro
from torch import Tensor, nn

from ppvae.arguments import require_has, takes_numbers
from ppvae.program import Program, data_plate


class Responsibilities(Program):
    r"""q(c | x): what a copy of a mixture, held fixed, says about the cluster.

    .. math:: q(c \mid x) = p_{\bar\theta}(c \mid x) =
              \frac{\bar\pi_c\, p_{\bar\theta}(x \mid c)}
                   {\sum_{c'} \bar\pi_{c'}\, p_{\bar\theta}(x \mid c')}

    :meth:`e_step` copies the model's parameters, :math:`\bar\theta \leftarrow \theta`. That is the
    guide's maximum of the ELBO, which is then log p(x). As the model moves on, the guide stays, and
    :math:`\log p(x) - \text{ELBO} = KL(q(c \mid x) \,\|\, p_\theta(c \mid x))` opens again.

    Args:
        model: a mixture with ``posterior(x)``, p(c | x).
        draw: draw c instead of summing over it, for importance sampling.
        latent: the name of the latent site.

    Example:
        >>> import torch
        >>> from ppvae import elbo, guides, models
        >>> model = models.GaussianMixture(3, dim=2)
        >>> guide = guides.Responsibilities(model)
        >>> x = torch.randn(5, 2)
        >>> bound = elbo.ELBO().evaluate(model, guide, x)
        >>> torch.allclose(bound, model.log_evidence(x), atol=1e-5)
        True
    """

    @takes_numbers
    def __init__(self, model: nn.Module, draw: bool = False, latent: str = "c") -> None:
        super().__init__()
        require_has("model", model, "requires_grad_", "models.GaussianMixture(3, 2)")
        self.fixed: Any = copy.deepcopy(model).requires_grad_(False)
        self.draw = draw
        self.latent = latent

    def e_step(self, model: nn.Module) -> None:
        """Take over the model's parameters: the maximum of the ELBO over guides."""
        self.fixed.load_state_dict(model.state_dict())

    def posterior(self, x: Tensor) -> Any:
        """q(c | x): batch shape ``(N,)``."""
        return self.fixed.posterior(x)

    def forward(self, x: Tensor, size: int | None = None) -> Tensor:
        """Draw c, ``(N,)``, or have it enumerated, in the plate ``"data"``."""
        infer = {} if self.draw else {"enumerate": "parallel"}
        with data_plate(x, size=size):
            c: Tensor = pyro.sample(self.latent, self.posterior(x), infer=infer)
        return c
