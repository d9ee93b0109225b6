"""The variational autoencoder's model: p(z) p(x | z)."""

from __future__ import annotations

import inspect
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.arguments import number, takes_numbers
from ppvae.chain import require_likelihood
from ppvae.conditionals import StandardNormal
from ppvae.program import Program, data_plate


class VAE(Program):
    r"""A latent-variable model with a neural likelihood.

    .. math:: z \sim p(z),\qquad x \sim p_\theta(x \mid z)

    Args:
        likelihood: the conditional p(x | z), as ``conditionals.Bernoulli(nets.mlp(16, 256, 64))``.
        latent_dim: the size of z, for the standard normal prior.
        prior: another prior in its place, called without arguments, e.g.
            ``conditionals.Mixture(10, 16)`` or ``conditionals.VampPrior(...)``.

    Raises:
        ValueError: neither or both of ``latent_dim`` and ``prior`` are given.
        TypeError: the likelihood gives no distribution, as a bare network does.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2014.

    A model of your own takes an offset, of counts, as one more argument, and hands it on:
    ``pyro.sample("x", self.likelihood(z, offset=offset), obs=x)``.

    Example:
        >>> from ppvae import conditionals, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(16, 256, 64)), latent_dim=16)
        >>> model(size=5).shape  # five images from the prior
        torch.Size([5, 64])
    """

    @takes_numbers
    def __init__(
        self,
        likelihood: nn.Module,
        latent_dim: int | None = None,
        prior: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.likelihood = likelihood
        self.prior = choose_prior(prior, latent_dim)
        require_likelihood(self, lambda model: [torch.zeros(2, *model.prior().event_shape)])

    def forward(
        self, x: Tensor | None = None, offset: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """Observe ``x``, ``(N, ...)``; or draw ``size`` new rows if x is None. Returns x.

        With both, x is a minibatch of a data set of ``size`` rows, and Pyro scales the plate's
        terms by size / N. ``offset``, ``(N,)`` or ``(N, 1)``, is the log exposure of each row, of
        a likelihood of counts; without it the exposure is 1.
        """
        with data_plate(x, offset, size=size):
            z = pyro.sample("z", self.prior())
            value: Tensor = pyro.sample("x", with_offset(self.likelihood, offset, z), obs=x)
        return value


def choose_prior(prior: nn.Module | None, latent_dim: int | None) -> nn.Module:
    """The given prior, or the standard normal of the given size; exactly one must be given."""
    if prior is not None and latent_dim is None:
        if not isinstance(prior, nn.Module):
            raise TypeError(f"prior is a module that gives p(z), got {prior!r}")
        return prior
    if prior is None and latent_dim is not None:
        given = latent_dim if isinstance(latent_dim, tuple) else (latent_dim,)
        sizes = [number("latent_dim", size, int) for size in given]
        if not all(1 <= size < 2**31 for size in sizes):
            raise ValueError(f"latent_dim must be at least 1, and below 2 ** 31, got {latent_dim}")
        return StandardNormal(tuple(sizes) if isinstance(latent_dim, tuple) else sizes[0])
    raise ValueError(f"give either latent_dim or prior, got {latent_dim} and {prior}")


def with_offset(likelihood: nn.Module, offset: Tensor | None, *inputs: Tensor) -> Any:
    """p(x | inputs), with its rates times e^offset."""
    if offset is None:
        return likelihood(*inputs)
    if isinstance(offset, Tensor) and offset.dtype == torch.bool:
        raise TypeError(
            "offset is torch.bool, and is the log exposure of each row: a mask of what is observed "
            "is for models.Masked(model), called as (x, observed) or (x, offset, observed)"
        )
    takes = inspect.signature(likelihood.forward).parameters
    named = "offset" in takes or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    if not isinstance(offset, Tensor) or not named:
        raise TypeError(
            f"offset is {type(offset).__name__}, and {type(likelihood).__name__} was to take it: "
            "it is the log exposure of each row, a tensor (N,), of a likelihood of counts. Labels "
            "y are for models.CVAE; to draw rows, call model(size=5)"
        )
    return likelihood(*inputs, offset=offset)
