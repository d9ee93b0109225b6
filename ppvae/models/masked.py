"""Models of rows of which only some values are observed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.chain import require_likelihood
from ppvae.distributions import masked
from ppvae.models.vae import choose_prior
from ppvae.program import Program, data_plate
from ppvae.wrapped import Last, argument_names


class Masked(Program):
    r"""A model that takes the mask of what is observed as one more, last, argument.

    .. math:: \log p(x_{\mathrm{obs}} \mid z) = \sum_{d\,:\,\mathrm{observed}_d} \log p(x_d \mid z)

    Any model whose likelihood has independent values, ppvae's or your own, is called as
    ``(x, observed)``, ``(x, y, observed)``, ...: what is hidden is integrated out, so log p(x) and
    every bound are of the observed part, and a row of which nothing is observed has log p = 0.
    That is all there is to know where values are missing at random (given what is observed);
    elsewhere take :class:`MissingNotAtRandom`. IWELBO on this pair is the bound of MIWAE. The guide
    is called the same way: put its network into ``nets.Masked``.

    Args:
        model: a Pyro program.
        site: the observed site that the mask is of.

    Called without data, as ``model(size=5)``, it is the model inside.

    Raises:
        TypeError: when called, if the mask is not bool, or the likelihood has no terms for single
            values.
        ValueError: when called, if the mask has not the shape of the values.

    Source: Mattei & Frellsen, MIWAE: deep generative modelling and imputation of incomplete data
    sets, 2019.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> likelihood = conditionals.Normal(nets.mlp(2, 8, 3), scale=0.5)
        >>> model = models.Masked(models.VAE(likelihood, latent_dim=2))
        >>> guide = guides.Normal(nets.Masked(nets.mlp(2 * 3, 8, 2 * 2)))
        >>> x = torch.tensor([[0.1, float("nan"), 0.3], [float("nan")] * 3])
        >>> ppvae.log_weights(model, guide, x, ~x.isnan()).log_w.isfinite()
        tensor([[True, True]])
    """

    def __init__(self, model: Callable[..., Any], site: str = "x") -> None:
        super().__init__()
        self.model, self.site = model, site

    def argument_names(self, by_keyword: bool = False) -> list[str]:
        """Those of the model inside, and behind them ``"observed"``."""
        return [*argument_names(self.model, by_keyword), Last("observed")]

    def forward(
        self, x: Tensor | None = None, *others: Any, size: int | None = None, **kwargs: Any
    ) -> Any:
        """Called as the model inside, with ``observed`` behind its other arguments.

        Args:
            x: rows, or None to draw new ones.
            others: what else the model takes by position, and last the mask of x, bool.
            size: how many rows to draw; with x, of how many rows it is a minibatch.
            kwargs: passed to the model.
        """
        given = {} if size is None else {"size": size}
        if x is None:
            return self.model(x, *others, **given, **kwargs)
        *others, observed = others or (x,)  # type: ignore[assignment]
        if not isinstance(observed, Tensor) or observed.dtype != torch.bool or observed is x:
            seen = getattr(observed, "dtype", type(observed).__name__)
            raise TypeError(
                f"the last argument of models.Masked says what is observed, and is {seen}: give "
                "bool, of the shape of the values, as (x, ~x.isnan())"
            )
        with _Hide(self.site, observed) as hide:
            value = self.model(x, *others, **given, **kwargs)
        if not hide.found:
            raise ValueError(
                f"models.Masked hides values of the observed site {self.site!r}, and the model has "
                "none: give its name, models.Masked(model, site=...)"
            )
        return value


class _Hide(Messenger):
    """Masks the distribution of an observed site, value by value."""

    def __init__(self, site: str, observed: Tensor) -> None:
        super().__init__()
        self.site, self.observed, self.found = site, observed, False

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] == self.site and msg["is_observed"]:
            self.found = True
            require_mask(msg["value"], self.observed, f"site {self.site!r}")
            msg["fn"] = masked(msg["fn"], self.observed)


class MissingNotAtRandom(Program):
    r"""A model of data and of which of them are missing, where that depends on what is missing.

    .. math:: z \sim p(z),\quad x \sim p_\theta(x \mid z),\quad
              m \sim p_\psi(m \mid x),\qquad m_d = 1: x_d \text{ is missing}

    The sites are ``"z"``, ``"x_missing"`` (a latent: the values that are not there), ``"x"`` and
    ``"missing"``. Its guide is ``guides.WithMissing(guide, model)``, which draws the missing values
    from p(x | z). IWELBO on this pair is the bound of not-MIWAE, a lower bound on log p(x_obs, m).

    What the mechanism may depend on has to be assumed: data alone do not tell it from missing at
    random. A likelihood without sample path (counts, classes) takes ``gradient="vimco"``.

    Args:
        likelihood: the conditional p(x | z), of independent values.
        missing: the conditional p(m | x) of complete rows, 1 where a value is missing, as
            ``conditionals.Bernoulli(nets.SelfMasking(D))``.
        latent_dim, prior: as of :class:`VAE`.

    Raises:
        TypeError: the likelihood gives no distribution; when called, if the mask is not bool.
        ValueError: when called, if the mask has not the shape of the values.

    Source: Ipsen, Mattei & Frellsen, not-MIWAE: deep generative modelling with missing not at
    random data, 2021.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.MissingNotAtRandom(
        ...     conditionals.Normal(nets.mlp(2, 8, 3), scale=0.5),
        ...     conditionals.Bernoulli(nets.SelfMasking(3)),
        ...     latent_dim=2,
        ... )
        >>> guide = guides.WithMissing(guides.Normal(nets.Masked(nets.mlp(6, 8, 4))), model)
        >>> x = torch.tensor([[0.1, float("nan"), 0.3]])
        >>> weights = ppvae.log_weights(model, guide, x, ~x.isnan())
        >>> sorted(weights.p)
        ['missing', 'x', 'x_missing', 'z']
    """

    @takes_numbers
    def __init__(
        self,
        likelihood: nn.Module,
        missing: nn.Module,
        latent_dim: int | None = None,
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.likelihood, self.missing = likelihood, missing
        self.prior = choose_prior(prior, latent_dim)
        require_likelihood(self, lambda model: [torch.zeros(2, *model.prior().event_shape)])

    def forward(
        self, x: Tensor | None = None, observed: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """Observe part of ``x``; or draw ``size`` new rows. Returns complete rows.

        Args:
            x: ``(N, ...)``; what is not observed may hold any number, NaN included.
            observed: bool, of the same shape.
            size: how many rows to draw; with x, of how many rows it is a minibatch.
        """
        with data_plate(x, observed, size=size):
            z = pyro.sample("z", self.prior())
            law = self.likelihood(z)
            if x is None:
                complete: Tensor = pyro.sample("x", law)
                pyro.sample("missing", self.missing(complete))
                return complete
            observed = require_mask(x, observed, "x")
            hidden = pyro.sample("x_missing", masked(law, ~observed))
            pyro.sample("x", masked(law, observed), obs=x)
            complete = torch.where(observed, x, hidden)
            pyro.sample("missing", self.missing(complete), obs=(~observed).to(complete.dtype))
        return complete


def require_mask(values: Tensor, observed: Tensor | None, name: str) -> Tensor:
    """The mask; raises unless it has a bool for each value."""
    if observed is None or observed.dtype != torch.bool:
        seen = "None" if observed is None else observed.dtype
        raise TypeError(f"observed must be bool, and is {seen}: give ~x.isnan() beside x")
    if observed.dim() != values.dim() or any(
        a != b for a, b in zip(observed.shape, values.shape, strict=True)
    ):
        raise ValueError(
            f"observed has shape {tuple(observed.shape)}, and {name} has values "
            f"{tuple(values.shape)}: give one bool for each value, of the same rows"
        )
    return observed
