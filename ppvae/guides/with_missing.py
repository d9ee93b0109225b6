"""The guide of missing values that are not missing at random."""

from __future__ import annotations

from typing import Any

import pyro
from torch import Tensor, nn

from ppvae.distributions import masked
from ppvae.models.masked import MissingNotAtRandom
from ppvae.program import Program, data_plate


class WithMissing(Program):
    r"""Draw z from a guide, then the missing values from the model's own p(x | z).

    .. math:: q(z, x_{\mathrm{mis}} \mid x_{\mathrm{obs}}, m) = q(z \mid x_{\mathrm{obs}}, m)\,
              p_\theta(x_{\mathrm{mis}} \mid z)

    So p(x_mis | z) cancels in the weight, and p(m | x) is what tells one draw from another.

    Args:
        guide: draws z, called as ``(x, observed)``, as ``guides.Normal(nets.Masked(net))``.
        model: the :class:`ppvae.models.MissingNotAtRandom`; it is used, and is no part of the
            guide.

    Raises:
        TypeError: the model is another one.

    Source: Ipsen, Mattei & Frellsen, not-MIWAE, 2021, equation 5.

    Example: see :class:`ppvae.models.MissingNotAtRandom`.
    """

    def __init__(self, guide: nn.Module, model: MissingNotAtRandom) -> None:
        super().__init__()
        if not isinstance(model, MissingNotAtRandom):
            raise TypeError(
                f"WithMissing is the guide of models.MissingNotAtRandom, got a "
                f"{type(model).__name__}"
            )
        self.guide = guide
        self._model = (model,)  # in a tuple, so that it is no submodule

    def posterior(self, x: Tensor, observed: Tensor) -> Any:
        """q(z | x_obs, m)."""
        return self.guide.posterior(x, observed)

    def forward(self, x: Tensor, observed: Tensor, size: int | None = None) -> Tensor:
        """Draw z and the site ``"x_missing"``; returns z."""
        given = {} if size is None else {"size": size}
        z: Tensor = self.guide(x, observed, **given)
        with data_plate(x, size=size):
            pyro.sample("x_missing", masked(self._model[0].likelihood(z), ~observed))
        return z
