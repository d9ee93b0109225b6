"""A mixture of diagonal normals whose draws carry the gradient of all its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.conditionals import Conditional
from ppvae.distributions import promoted
from ppvae.posteriors.normals import check_width


class Mixture(Conditional):
    r"""The posterior q(z | x) as a mixture of normals, every parameter predicted from x.

    :class:`ppvae.conditionals.Mixture` is the prior p(z) with parameters of its own.

    .. math:: q(z \mid x) = \sum_{c=1}^C \pi_c(x)\, N(z; \mu_c(x), \operatorname{diag}\sigma_c(x)^2)

    Args:
        net: outputs ``(..., C * (1 + 2 * Z))``: C logits, then C x Z means, C x Z raw scales.
        num_components: C >= 1.
        positive: maps raw scales to (0, inf).

    Raises:
        ValueError: for ``num_components < 1``; when called, if the outputs do not split.

    Example:
        >>> q = Mixture(nn.Linear(8, 4 * (1 + 2 * 3)), num_components=4)(torch.zeros(5, 8))
        >>> q.batch_shape, q.event_shape, q.has_rsample
        (torch.Size([5]), torch.Size([3]), True)
    """

    @takes_numbers(num_components=1)
    def __init__(
        self,
        net: nn.Module,
        num_components: int,
        positive: Callable[[Tensor], Tensor] = torch.exp,
    ) -> None:
        super().__init__(net)
        if num_components < 1:
            raise ValueError(f"Mixture(num_components) must be at least 1, got {num_components}")
        self.num_components = num_components
        self.positive = positive

    def forward(self, *inputs: Tensor) -> MixtureOfNormals:
        outputs, C = self.outputs(*inputs), self.num_components
        dim = (outputs.shape[-1] // C - 1) // 2
        check_width(outputs, C * (1 + 2 * max(dim, 0)), f"Mixture(num_components={C})")
        logits, loc, raw = outputs.split([C, C * dim, C * dim], -1)
        loc, raw = loc.unflatten(-1, (C, dim)), raw.unflatten(-1, (C, dim))
        return MixtureOfNormals(logits, loc, self.positive(raw))


class MixtureOfNormals(dist.TorchDistribution):
    r"""A mixture of C diagonal normals in Z dimensions, with implicitly reparameterised draws.

    A draw takes one component, so it has no explicit sample path. It has an implicit one: with
    :math:`F_d(z) = P(Z_d \le z_d \mid z_{<d})` the vector F is uniform whatever the parameters
    :math:`\lambda`, so holding it fixed gives

    .. math:: \frac{\partial z}{\partial \lambda}
        = -\Big(\frac{\partial F}{\partial z}\Big)^{-1} \frac{\partial F}{\partial \lambda}

    where the first factor is lower triangular. The gradient is unbiased for the weights too.
    Only first derivatives are right: the inverse is a constant to automatic differentiation.
    A draw takes memory for ``C x Z + Z x Z`` numbers.

    Args:
        logits: ``(..., C)``, unnormalised log-weights.
        loc: ``(..., C, Z)``.
        scale: ``(..., C, Z)``, positive.

    Source: Figurnov, Mohamed & Mnih, Implicit Reparameterization Gradients, 2018, section 4.

    Example:
        >>> logits = torch.zeros(2, requires_grad=True)
        >>> q = MixtureOfNormals(logits, torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
        >>> _ = torch.manual_seed(0)
        >>> q.rsample((20_000,)).mean().backward()  # d/dlogits of the mean is (-0.5, 0.5)
        >>> [round(g, 1) for g in logits.grad.tolist()]
        [-0.5, 0.5]
    """

    arg_constraints: ClassVar = {
        "logits": constraints.real_vector,
        "loc": constraints.independent(constraints.real, 2),
        "scale": constraints.independent(constraints.positive, 2),
    }
    support = constraints.real_vector
    has_rsample = True

    def __init__(
        self, logits: Tensor, loc: Tensor, scale: Tensor, validate_args: bool | None = None
    ) -> None:
        self.logits, self.loc, self.scale = logits.log_softmax(-1), loc, scale
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> MixtureOfNormals:
        new = self._get_checked_instance(MixtureOfNormals, _instance)
        new.logits, new.loc, new.scale = self.logits, self.loc, self.scale  # they broadcast
        batch_shape = torch.Size(batch_shape)
        super(MixtureOfNormals, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        weights = self.logits.exp().unsqueeze(-1)
        return (weights * self.loc).sum(-2).expand(self.batch_shape + self.event_shape)

    @property
    def variance(self) -> Tensor:
        weights = self.logits.exp().unsqueeze(-1)
        second = (weights * (self.scale.square() + self.loc.square())).sum(-2)
        return second.expand(self.batch_shape + self.event_shape) - self.mean.square()

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        by_dim = self._by_dim(promoted(value, self.loc))[1]
        result = (self.logits + by_dim.sum(-1)).logsumexp(-1)
        return result.expand(torch.broadcast_shapes(result.shape, self.batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        z = self._draw(torch.Size(sample_shape))
        if not torch.is_grad_enabled():
            return z
        with torch.no_grad():
            relative, slope, density, uniform = self._conditionals(z)
            # row d, column j < d: the derivative of F_d in z_j, over the density of z_d
            jacobian = (relative.mT @ slope) / density.unsqueeze(-1)
        moved = (self._conditionals(z)[3] - uniform) / density  # zero, with a gradient
        eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
        step = torch.linalg.solve_triangular(
            jacobian.tril(-1) + eye, moved.unsqueeze(-1), upper=False, unitriangular=True
        )
        return z - step.squeeze(-1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._draw(torch.Size(sample_shape))

    @torch.no_grad()
    def _draw(self, sample_shape: torch.Size) -> Tensor:
        shape = sample_shape + self.batch_shape
        logits = self.logits.expand(shape + self.logits.shape[-1:])
        chosen = (logits - torch.empty_like(logits).exponential_().log()).argmax(-1)
        index = chosen[..., None, None].expand(*shape, 1, *self.event_shape)
        loc = self.loc.expand(shape + self.loc.shape[-2:]).gather(-2, index).squeeze(-2)
        scale = self.scale.expand(shape + self.scale.shape[-2:]).gather(-2, index).squeeze(-2)
        return loc + scale * torch.randn_like(loc)

    def _by_dim(self, value: Tensor) -> tuple[Tensor, Tensor]:
        """Standardised values and log-densities of each component and dim, ``(..., C, Z)``."""
        standard = (value.unsqueeze(-2) - self.loc) / self.scale
        return standard, -0.5 * (standard.square() + math.log(2 * math.pi)) - self.scale.log()

    def _conditionals(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What the implicit derivative is made of.

        Returns:
            weight of a component given z_<d times (its distribution function - F_d), and
            d log-density / dz, both ``(..., C, Z)``; the density of z_d given z_<d and F,
            both ``(..., Z)``.
        """
        standard, log_density = self._by_dim(z)
        of_earlier_dims = log_density.cumsum(-1) - log_density
        weights = (self.logits.unsqueeze(-1) + of_earlier_dims).softmax(-2)
        below = torch.special.ndtr(standard)
        uniform = (weights * below).sum(-2)
        density = (weights * log_density.exp()).sum(-2)
        relative = weights * (below - uniform.unsqueeze(-2))
        return relative, -standard / self.scale, density, uniform
