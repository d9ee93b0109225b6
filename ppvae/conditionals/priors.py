"""Priors p(z): conditionals that ignore what they are called with."""

from __future__ import annotations

from typing import Literal

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.conditionals.heads import full_precision
from ppvae.distributions import DiagonalNormal, UnitNormal


class StandardNormal(nn.Module):
    r"""The prior :math:`N(0, I)`, whatever it is called with.

    Args:
        dim: latent dimension, or a latent shape such as ``(8, 4, 4)``.

    Example:
        >>> StandardNormal(3)().expand((5, 10)).sample().shape
        torch.Size([5, 10, 3])
    """

    loc: Tensor

    @takes_numbers
    def __init__(self, dim: int | tuple[int, ...]) -> None:
        super().__init__()
        shape = (dim,) if isinstance(dim, int) else tuple(dim)
        self.register_buffer("loc", torch.zeros(shape), persistent=False)

    def forward(self, *context: Tensor) -> UnitNormal:
        return UnitNormal(full_precision(self.loc))


class Mixture(nn.Module):
    r"""The prior p(z) as a mixture of diagonal normals with learned parameters.

    It ignores what it is called with; :class:`ppvae.posteriors.Mixture` is the q(z | x) whose
    parameters a network predicts.

    .. math:: p(z) = \sum_{c=1}^C \pi_c\, N(z; \mu_c, \mathrm{diag}\,\sigma_c^2)

    Weights start equal, scales at 1 and means at draws from :math:`N(0, \mathrm{spread}^2 I)`, so
    that components differ. Its ``log_prob`` of ``z (K, N, Z)`` takes ``(K, N, C, Z)`` memory.

    Args:
        num_components: number of components ``C``.
        dim: latent dimension ``Z``, or a latent shape such as ``(8, 4, 4)``.
        spread: standard deviation of the initial means, >= 0.

    Example:
        >>> Mixture(10, 3)().expand((5, 20)).log_prob(torch.zeros(5, 20, 3)).shape
        torch.Size([5, 20])
    """

    @takes_numbers(num_components=1, spread=0)
    def __init__(
        self, num_components: int, dim: int | tuple[int, ...], spread: float = 1.0
    ) -> None:
        super().__init__()
        size = (num_components, *((dim,) if isinstance(dim, int) else dim))
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(spread * torch.randn(size))
        self.log_scale = nn.Parameter(torch.zeros(size))

    @torch.no_grad()
    def initialise(self, weights: Tensor, loc: Tensor, scale: Tensor) -> None:
        """Set the parameters in place, as to those of a fitted GaussianMixture (VaDE).

        Args:
            weights: ``(C,)``, positive; normalised if they do not sum to one.
            loc: ``(C, Z)``.
            scale: ``(C, Z)``, positive standard deviations.

        Raises:
            ValueError: if a shape differs from that of its parameter.

        Example:
            >>> Mixture(2, 1).initialise(torch.ones(2), torch.zeros(2, 1), torch.ones(2, 1))
        """
        new = {"logits": weights.log(), "loc": loc, "log_scale": scale.log()}
        for name, value in new.items():
            parameter = self.get_parameter(name)
            if parameter.shape != value.shape:
                seen, wanted = tuple(value.shape), tuple(parameter.shape)
                raise ValueError(f"Mixture.initialise: {name} has shape {wanted}, but got {seen}")
            parameter.copy_(value)

    def components(self) -> DiagonalNormal:
        """The components p(z | c), of batch shape ``(C,)``."""
        loc, scale = full_precision(self.loc), full_precision(self.log_scale).exp()
        return DiagonalNormal(loc, scale, event_dim=loc.dim() - 1)

    def weights(self) -> dist.Categorical:
        """The weights p(c)."""
        return dist.Categorical(logits=full_precision(self.logits))

    def forward(self, *context: Tensor) -> dist.MixtureSameFamily:
        return dist.MixtureSameFamily(self.weights(), self.components())


class VampPrior(nn.Module):
    r"""The variational mixture of posteriors prior (Tomczak and Welling, 2018, arXiv:1705.07120).

    .. math:: p(z) = \frac1C \sum_{c=1}^C q(z \mid u_c)

    with the guide's own posterior ``q`` and learned pseudo-inputs :math:`u_c`. A call costs one
    pass of the encoder over ``C`` rows, whatever ``K`` and ``N``; ``log_prob`` of ``z (K, N, Z)``
    takes ``(K, N, C, Z)`` memory. Note that batch norm in the encoder, in training mode, sees the
    pseudo-inputs as a batch of their own.

    Args:
        posterior: the guide's conditional q(z | x). It is shared, not copied: its parameters are
            then both the model's and the guide's.
        num_pseudo_inputs: number of components ``C``.
        shape: shape of one input ``x``: ``(784,)``, ``784`` or ``(1, 28, 28)``.
        mean: mean of the initial pseudo-inputs; the paper: 0.05 for MNIST and OMNIGLOT, 0.5 for
            Frey faces and Caltech, 0.4 for histopathology.
        std: their standard deviation; the paper: 0.01, 0.02, 0.05.
        data: if given, ``(M, *shape)`` with ``M >= C``: start from ``C`` rows at random instead.
            With ``"unit_interval"`` they are clamped to [0.05, 0.95], since at 0 and 1 the
            gradient of the paper's hardtanh is zero.
        support: ``"unit_interval"`` passes pseudo-inputs through hardtanh to [0, 1], as the paper
            does; ``"real"`` leaves them free.

    Raises:
        ValueError: for an unknown support, or data of another shape or with too few rows; when
            called, if the posterior does not have batch shape ``(C,)``.

    Example:
        >>> from ppvae.conditionals import Normal
        >>> q = Normal(nn.Linear(64, 2 * 3))
        >>> VampPrior(q, 10, 64)().expand((5, 20)).log_prob(torch.zeros(5, 20, 3)).shape
        torch.Size([5, 20])
    """

    equal: Tensor

    @takes_numbers(num_pseudo_inputs=1, std=0)
    def __init__(
        self,
        posterior: nn.Module,
        num_pseudo_inputs: int,
        shape: int | tuple[int, ...],
        mean: float = 0.05,
        std: float = 0.01,
        data: Tensor | None = None,
        support: Literal["unit_interval", "real"] = "unit_interval",
    ) -> None:
        super().__init__()
        if support not in ("unit_interval", "real"):
            raise ValueError(f'support must be "unit_interval" or "real", got {support!r}')
        size = (num_pseudo_inputs, *((shape,) if isinstance(shape, int) else shape))
        if data is None:
            init = mean + std * torch.randn(size)
        elif data.shape[1:] != size[1:] or len(data) < num_pseudo_inputs:
            wanted = f"at least {num_pseudo_inputs} rows of shape {size[1:]}"
            raise ValueError(f"data must hold {wanted}, got {tuple(data.shape)}")
        else:
            rows = torch.randperm(len(data), device=data.device)[:num_pseudo_inputs]
            init = data[rows].to(torch.get_default_dtype())
            if support == "unit_interval":
                init = init.clamp(0.05, 0.95)
        self.posterior = posterior
        self.support = support
        self.pseudo_inputs = nn.Parameter(init)
        self.register_buffer("equal", torch.zeros(num_pseudo_inputs), persistent=False)

    def inputs(self) -> Tensor:
        """The pseudo-inputs as the posterior sees them, ``(C, *shape)``."""
        u = self.pseudo_inputs
        return nn.functional.hardtanh(u, 0.0, 1.0) if self.support == "unit_interval" else u

    def forward(self, *context: Tensor) -> dist.MixtureSameFamily:
        components = self.posterior(self.inputs())
        if components.batch_shape != self.equal.shape:
            wanted, found = tuple(self.equal.shape), tuple(components.batch_shape)
            raise ValueError(f"posterior's batch shape is {found}, not {wanted}: check event_dim")
        weights = dist.Categorical(logits=full_precision(self.equal))
        return dist.MixtureSameFamily(weights, components)
