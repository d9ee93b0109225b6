"""Independent values: what their distributions share."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

from ppvae.distributions.vectors import _broadcast, _expanded


class Law(dist.TorchDistribution):
    """Base of distributions of single values, whose log-density is exact in float32 too.

    Parameters stay as they are given (plates and particles expand the result), and are free: a
    positive one is given by its logarithm, so that no network output is out of range. A leaf names
    them in ``arg_constraints``, and defines ``support``, :meth:`terms` and :meth:`library`.

    Attributes:
        wide: compute in float64, as whatever has a log-gamma function must; the result has the
            dtype of value and parameters.
    """

    wide: ClassVar[bool] = True
    has_rsample = False
    arg_constraints: ClassVar[dict[str, Any]] = {}
    component_dims: ClassVar[int] = 0  # trailing dims of the parameters that the value has not

    def __init__(self, *parameters: Tensor, validate_args: bool | None = None) -> None:
        for name, parameter in zip(self.arg_constraints, parameters, strict=True):
            setattr(self, name, parameter)
        shape = _broadcast([parameter.shape for parameter in parameters])
        super().__init__(shape[: len(shape) - self.component_dims], validate_args=validate_args)

    def terms(self, value: Tensor, **parameters: Tensor) -> Tensor:
        """The log-density at values, in their dtype, which is that of the parameters."""
        log_prob: Tensor = self.library(**parameters).log_prob(value)
        return log_prob

    def library(self, **parameters: Tensor) -> Any:
        """The same law as one of Pyro's distributions, for draws, moments and KL."""
        raise NotImplementedError(f"{type(self).__name__} has no such form in Pyro")

    def given(self, dtype: torch.dtype | None = None, expand: bool = False) -> dict[str, Tensor]:
        """The parameters by name, in a dtype, or of the batch shape."""
        found = {name: getattr(self, name) for name in self.arg_constraints}
        if dtype is not None:
            found = {name: parameter.to(dtype) for name, parameter in found.items()}
        if expand:
            found = {name: parameter.expand(self.batch_shape) for name, parameter in found.items()}
        return found

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        dtype = torch.promote_types(value.dtype, next(iter(self.given().values())).dtype)
        inside = torch.float64 if self.wide else dtype
        terms = self.terms(value.to(inside), **self.given(inside)).to(dtype)
        return _expanded(terms, self.batch_shape)

    @property
    def _of_library(self) -> Any:
        return self.library(**self.given(expand=True))

    @property
    def mean(self) -> Tensor:
        """The mean, of the batch shape."""
        mean: Tensor = self._of_library.mean
        return mean

    @property
    def variance(self) -> Tensor:
        """The variance, of the batch shape."""
        variance: Tensor = self._of_library.variance
        return variance

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        draw: Tensor = self._of_library.rsample(torch.Size(sample_shape))
        return draw

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            draw: Tensor = self._of_library.sample(torch.Size(sample_shape))
            return draw

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new._batch_shape = torch.Size(batch_shape)
        return new


@register_kl(Law, Law)
def _kl(p: Law, q: Law) -> Tensor:
    """The closed form of Pyro or torch, in float64 where the densities are."""
    dtype = next(iter(p.given().values())).dtype
    wide = torch.float64 if p.wide or q.wide else None
    pair = [fn.library(**fn.given(wide, expand=True)) for fn in (p, q)]
    kl: Tensor = kl_divergence(*pair).to(dtype)
    return kl


def real(*names: str) -> dict[str, Any]:
    """``arg_constraints`` of free parameters."""
    return dict.fromkeys(names, constraints.real)
