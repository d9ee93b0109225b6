"""The guide of missing values that are not missing at random."""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.distributions import masked
from ppvae.models.masked import MissingNotAtRandom
from ppvae.program import Program, data_plate


class WithMissing(Program):
    r"""Draw z from a guide, then the missing values from the model's own p(x | z).

    .. math:: q(z, x_{\mathrm{mis}} \mid x_{\mathrm{obs}}, m) = q(z \mid x_{\mathrm{obs}}, m)\,
              p_\theta(x_{\mathrm{mis}} \mid z)

    So p(x_mis | z) cancels in the weight, and p(m | x) is what tells one draw from another.

    Args:
        guide: of z, with a ``posterior(x, observed)``, as ``guides.Normal(nets.Masked(net))``.
        model: the :class:`ppvae.models.MissingNotAtRandom`; it is used, and is no part of the
            guide.

    Raises:
        TypeError: the model is another one, or the guide has no ``posterior``.

    Source: Ipsen, Mattei & Frellsen, not-MIWAE, 2021, equation 5.

    Example: see :class:`ppvae.models.MissingNotAtRandom`.
    """

    @takes_numbers
    def __init__(self, guide: nn.Module, model: MissingNotAtRandom) -> None:
        super().__init__()
        if not isinstance(model, MissingNotAtRandom) or not hasattr(guide, "posterior"):
            raise TypeError(
                "WithMissing(guide, model) takes a guides.Amortized and a "
                f"models.MissingNotAtRandom, got {type(guide).__name__}, {type(model).__name__}"
            )
        self.guide = guide
        self._model = (model,)  # in a tuple, so that it is no submodule

    def posterior(self, x: Tensor, observed: Tensor) -> Any:
        """q(z | x_obs, m)."""
        posterior: Any = self.guide.posterior
        return posterior(x, observed)

    def forward(self, x: Tensor, observed: Tensor, size: int | None = None) -> Tensor:
        """Draw z and the site ``"x_missing"``; returns z."""
        with data_plate(x, size=size):
            z: Tensor = pyro.sample("z", self.posterior(x, observed))
            pyro.sample("x_missing", masked(self._model[0].likelihood(z), ~observed))
        return z
