"""A vector's distribution as that of a feature map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

__all__ = ["Reshaped"]


class Reshaped(dist.TorchDistribution):
    r"""A distribution of vectors ``(D,)`` whose values are laid out as ``shape``, row by row.

    .. math:: \log p(x) = \log p_\text{base}(\operatorname{flatten}(x))

    Laying out moves no volume. A draw remembers the vector it was made of, so that a base which
    knows its own draws alone, as a flow without inverse, can weigh them.

    Args:
        base_dist: of event shape ``(D,)``.
        shape: D numbers, as ``(C, H, W)``.

    Raises:
        ValueError: ``base_dist`` has another event shape.

    Example:
        >>> base = dist.MultivariateNormal(torch.zeros(5, 12), torch.eye(12))
        >>> Reshaped(base, (3, 2, 2)).sample((10,)).shape
        torch.Size([10, 5, 3, 2, 2])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, base_dist: Any, shape: Sequence[int]) -> None:
        if tuple(base_dist.event_shape) != (math.prod(shape),):
            seen = f"values of shape {tuple(base_dist.event_shape)}"
            raise ValueError(
                f"Reshaped({tuple(shape)}) lays out vectors of {math.prod(shape)}, and was given "
                f"{type(base_dist).__name__} with {seen}"
            )
        self.base_dist = base_dist
        super().__init__(base_dist.batch_shape, torch.Size(shape), validate_args=False)
        self._validate_args = base_dist._validate_args

    @property
    def has_rsample(self) -> bool:
        return bool(self.base_dist.has_rsample)

    @property
    def support(self) -> Any:
        inner = self.base_dist.support
        while isinstance(inner, constraints.independent):
            inner = inner.base_constraint
        if inner is constraints.real_vector:
            inner = constraints.real
        if inner.event_dim:
            raise NotImplementedError(f"Reshaped: values in {inner} are no map of single ones")
        return constraints.independent(inner, len(self.event_shape))

    def expand(self, batch_shape: Any, _instance: Any = None) -> Reshaped:
        return Reshaped(self.base_dist.expand(torch.Size(batch_shape)), self.event_shape)

    @property
    def mean(self) -> Tensor:
        mean: Tensor = self.base_dist.mean
        return mean.unflatten(-1, self.event_shape)

    @property
    def variance(self) -> Tensor:
        variance: Tensor = self.base_dist.variance
        return variance.unflatten(-1, self.event_shape)

    def entropy(self) -> Tensor:
        entropy: Tensor = self.base_dist.entropy()
        return entropy

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self._laid_out(self.base_dist.rsample(sample_shape))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self._laid_out(self.base_dist.sample(sample_shape))

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = self.base_dist.log_prob(self._vector(value))
        return log_prob

    def log_prob_along_path(self, value: Tensor) -> Tensor:
        """As the base has it for its own last draw; :meth:`log_prob` where it has none."""
        density = getattr(self.base_dist, "log_prob_along_path", self.base_dist.log_prob)
        log_prob: Tensor = density(self._vector(value))
        return log_prob

    def _laid_out(self, vector: Tensor) -> Tensor:
        value = vector.unflatten(-1, self.event_shape)
        self._drawn = value, vector
        return value

    def _vector(self, value: Tensor) -> Tensor:
        drawn, vector = self.__dict__.get("_drawn", (None, None))
        return vector if drawn is value else value.flatten(-len(self.event_shape))


@register_kl(Reshaped, Reshaped)
def _kl(q: Reshaped, p: Reshaped) -> Tensor:
    kl: Tensor = kl_divergence(q.base_dist, p.base_dist)
    return kl
