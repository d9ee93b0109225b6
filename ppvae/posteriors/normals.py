"""Normals with correlations: full covariance, and diagonal plus low rank."""

from __future__ import annotations

from collections.abc import Callable

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.conditionals import Conditional
from ppvae.distributions import ForAnyDtype, MultivariateNormal


class FullNormal(Conditional):
    r"""A normal with full covariance.

    .. math:: N(\mu(x), L(x) L(x)^\top), \quad
              L = \operatorname{diag}(\mathrm{positive}(s)) + \text{strictly lower triangle}

    Args:
        net: outputs ``(..., Z * (Z + 3) / 2)``: Z means, Z raw scales, then the strictly lower
            triangle of L, row by row.
        dim: latent dimension Z.
        positive: maps raw scales to (0, inf).

    Raises:
        ValueError: when called, if the network has another number of outputs.

    Example:
        >>> q = FullNormal(nn.Linear(8, 3 * 6 // 2), dim=3)(torch.zeros(5, 8))
        >>> q.batch_shape, q.event_shape, q.scale_tril.shape
        (torch.Size([5]), torch.Size([3]), torch.Size([5, 3, 3]))
    """

    below: Tensor  # where in the flat matrix the strictly lower triangle lies
    diagonal: Tensor

    @takes_numbers(dim=1)
    def __init__(
        self, net: nn.Module, dim: int, positive: Callable[[Tensor], Tensor] = torch.exp
    ) -> None:
        super().__init__(net)
        self.dim = dim
        self.positive = positive
        row, column = torch.tril_indices(dim, dim, -1)
        self.register_buffer("below", row * dim + column, persistent=False)
        self.register_buffer("diagonal", torch.arange(dim) * (dim + 1), persistent=False)

    def forward(self, *inputs: Tensor) -> dist.MultivariateNormal:
        dim, outputs = self.dim, self.outputs(*inputs)
        check_width(outputs, dim * (dim + 3) // 2, f"FullNormal(dim={dim})")
        loc, raw, below = outputs.split([dim, dim, dim * (dim - 1) // 2], -1)
        flat = outputs.new_zeros((*outputs.shape[:-1], dim * dim))
        flat = flat.index_copy(-1, self.below, below)
        flat = flat.index_copy(-1, self.diagonal, self.positive(raw))
        return MultivariateNormal(loc, scale_tril=flat.unflatten(-1, (dim, dim)))


class LowRankNormal(Conditional):
    r"""A normal whose covariance is diagonal plus low rank.

    .. math:: N(\mu(x), W(x) W(x)^\top + \operatorname{diag} \sigma(x)^2), \quad
              W \in \mathbb R^{Z \times r}

    Args:
        net: outputs ``(..., Z * (2 + rank))``: Z means, Z raw scales, then W row by row.
        rank: number of columns r of W, >= 1.
        positive: maps raw scales to (0, inf).

    Raises:
        ValueError: for ``rank < 1``; when called, if the outputs do not split.

    Example:
        >>> q = LowRankNormal(nn.Linear(8, 3 * (2 + 1)), rank=1)(torch.zeros(5, 8))
        >>> q.batch_shape, q.event_shape, q.cov_factor.shape
        (torch.Size([5]), torch.Size([3]), torch.Size([5, 3, 1]))
    """

    @takes_numbers(rank=1)
    def __init__(
        self, net: nn.Module, rank: int, positive: Callable[[Tensor], Tensor] = torch.exp
    ) -> None:
        super().__init__(net)
        if rank < 1:
            raise ValueError(f"LowRankNormal(rank) must be at least 1, got {rank}")
        self.rank = rank
        self.positive = positive

    def forward(self, *inputs: Tensor) -> dist.LowRankMultivariateNormal:
        outputs = self.outputs(*inputs)
        dim = outputs.shape[-1] // (2 + self.rank)
        check_width(outputs, dim * (2 + self.rank), f"LowRankNormal(rank={self.rank})")
        loc, raw, factor = outputs.split([dim, dim, dim * self.rank], -1)
        factor = factor.unflatten(-1, (dim, self.rank))
        return LowRankMultivariateNormal(loc, factor, self.positive(raw).square())


class LowRankMultivariateNormal(ForAnyDtype, dist.LowRankMultivariateNormal):
    """Pyro's, for values of any dtype."""


def check_width(outputs: Tensor, width: int, head: str) -> None:
    """Raise ``ValueError`` unless a network's last dimension is what a head splits up."""
    if outputs.shape[-1] != width or width == 0:
        seen = tuple(outputs.shape)
        raise ValueError(f"{head} cannot split outputs {seen}: it takes {width or 'more'} per row")
