"""The hierarchical VAE's model: a Markov chain of latents from the top down to the data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
from torch import Tensor, nn

from ppvae.arguments import require_has, takes_numbers
from ppvae.chain import Chain, require_distribution
from ppvae.models.vae import choose_prior
from ppvae.program import Program, data_plate


class Hierarchical(Program):
    r"""A latent-variable model with L levels of latents, ``"z1"`` next to the data.

    .. math:: z_L \sim p(z_L),\qquad z_l \sim p_\theta(z_l \mid z_{l+1}),\qquad
              x \sim p_\theta(x \mid z_1)

    One more level is one more conditional in ``levels``; MLP or convolutional is a matter of the
    networks. Guides for it: :class:`~ppvae.guides.BottomUp` and :class:`~ppvae.guides.Ladder`.

    Args:
        likelihood: the conditional p(x | z1).
        levels: p(z1 | z2), p(z2 | z3), ..., from the bottom up as the latents are numbered: L - 1
            conditionals, none for a plain VAE.
        latent_dim: the size of the top latent, for a standard normal prior.
        prior: another prior of the top latent in its place, called without arguments.

    Attributes:
        shapes: event shape of every latent, top first, and of ``"x"``, as they were found when
            the chain was run once.
        integer: whether x is of integers, as ``conditionals.Categorical`` has them.

    Raises:
        ValueError: a level does not take what the level above it gives; neither or both of
            ``latent_dim`` and ``prior`` are given.
        TypeError: the prior, a level or the likelihood gives no distribution, as a bare
            network does; the prior cannot be called without arguments.

    Source: Rezende, Mohamed & Wierstra 2014; Sønderby et al., Ladder Variational Autoencoders,
    2016.

    Example:
        >>> from ppvae import conditionals, models, nets
        >>> model = models.Hierarchical(
        ...     conditionals.Bernoulli(nets.mlp(16, 64, 784)),
        ...     levels=[
        ...         conditionals.Normal(nets.mlp(8, 32, 2 * 16)),  # p(z1 | z2)
        ...         conditionals.Normal(nets.mlp(4, 16, 2 * 8)),  # p(z2 | z3)
        ...     ],
        ...     latent_dim=4,
        ... )
        >>> model.shapes
        {'z3': (4,), 'z2': (8,), 'z1': (16,), 'x': (784,)}
        >>> model(size=5).shape
        torch.Size([5, 784])
    """

    @takes_numbers
    def __init__(
        self,
        likelihood: nn.Module,
        levels: Sequence[nn.Module] = (),
        latent_dim: int | None = None,
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__()
        require_has("likelihood", likelihood, "parameters", "conditionals.Bernoulli(net)")
        self.likelihood = likelihood
        self.levels = nn.ModuleList(levels)
        self.prior = choose_prior(prior, latent_dim)
        chain = self._chain()
        self.shapes, self.integer = chain.shapes, chain.integer

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Observe ``x``, ``(N, ...)``; or draw ``size`` new rows if x is None. Returns x.

        With both, x is a minibatch of a data set of ``size`` rows.
        """
        with data_plate(x, size=size):
            z = pyro.sample(f"z{len(self.levels) + 1}", self.prior())
            for level in range(len(self.levels), 0, -1):
                z = pyro.sample(f"z{level}", self.levels[level - 1](z))
            value: Tensor = pyro.sample("x", self.likelihood(z), obs=x)
        return value

    def _chain(self) -> Chain:
        """The levels and the likelihood run once, from the top; raises if they do not chain."""
        top = len(self.levels) + 1
        chain = Chain(f"z{top}", tuple(self._top().event_shape), like=self)
        for level in range(top - 1, 0, -1):
            label, conditional = f"p(z{level} | z{level + 1})", self.levels[level - 1]
            chain.follow(label, f"z{level}", conditional, argument=f"levels[{level - 1}]")
        chain.follow("p(x | z1)", "x", self.likelihood, argument="likelihood")
        return chain

    def _top(self) -> Any:
        try:
            found = self.prior()
        except (TypeError, ValueError) as error:
            seen = f"prior, a {type(self.prior).__name__}, fails when called without arguments"
            cure = "give latent_dim, or a prior such as conditionals.Mixture"
            raise TypeError(f"{seen}: {cure}. It said: {error}") from error
        return require_distribution("prior", found)


def softplus_variance(raw: Tensor) -> Tensor:
    r"""Raw scale to scale, the variance being a softplus: for ``conditionals.Normal(positive=)``.

    .. math:: \sigma^2 = \log(1 + e^r) + 10^{-5}

    The variance of the ladder VAE (its code adds the constant, which keeps the gradient finite).

    Example:
        >>> import torch
        >>> softplus_variance(torch.zeros(())).square()  # log 2, and a little
        tensor(0.6932)
    """
    return (nn.functional.softplus(raw) + 1e-5).sqrt()
