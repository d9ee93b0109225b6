"""Columns of different kinds in one tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppvae.distributions.supports import ByColumn, joined
from ppvae.distributions.vectors import _expanded


class Columns(dist.TorchDistribution):
    """Independent columns of a table, each with a law of its own, in one packed tensor.

    Its batch shape ends with the columns: ``log_prob`` is element-wise. A row is
    ``Columns(...).to_event(1)``.

    Args:
        names: of the D columns.
        parts: distributions of single values, of batch shapes ``(..., n)``, sum n = D.
        places: for each part the columns that it is of.

    Example:
        >>> from ppvae.distributions import Laplace, Poisson
        >>> zero = torch.zeros(1)
        >>> p = Columns(("size", "visits"), [Laplace(zero, zero), Poisson(zero)], [[0], [1]])
        >>> p.log_prob(torch.tensor([0.0, 0.0]))  # -log 2, and -1
        tensor([-0.6931, -1.0000])
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = False

    def __init__(
        self,
        names: Sequence[str],
        parts: Sequence[Any],
        places: Sequence[Sequence[int]],
        validate_args: bool | None = None,
    ) -> None:
        self.names, self.parts, self.places = tuple(names), list(parts), places
        leading = torch.broadcast_shapes(*(part.batch_shape[:-1] for part in parts))
        super().__init__((*leading, len(names)), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return ByColumn(self.names, [part.support for part in self.parts], self.places)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        if value.dtype in (torch.bool, torch.float16, torch.bfloat16):  # not for Pyro's densities
            value = value.to(torch.get_default_dtype())
        return self._gathered(lambda part, columns: part.log_prob(value[..., columns]))

    def by_column(self, value: Tensor) -> dict[str, Tensor]:
        """Nats of each column, ``(...)``: of a density, per unit of that column."""
        return dict(zip(self.names, self.log_prob(value).unbind(-1), strict=True))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self._gathered(lambda part, _: part.sample(torch.Size(sample_shape)))

    @property
    def mean(self) -> Tensor:
        """The mean of each column; of classes there is none: NaN."""
        return self._gathered(lambda part, _: part.mean)

    @property
    def variance(self) -> Tensor:
        """The variance of each column."""
        return self._gathered(lambda part, _: part.variance)

    def _gathered(self, ask: Callable[[Any, list[int]], Tensor]) -> Tensor:
        """What every part answers, in the order of the columns, of the batch shape at least."""
        parts = zip(self.parts, self.places, strict=True)
        found = joined([ask(part, list(columns)) for part, columns in parts], self.places)
        if not found.is_floating_point():  # classes, in every column
            found = found.to(torch.get_default_dtype())
        return _expanded(found, self.batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Columns:
        leading = tuple(batch_shape)[:-1]
        parts = [part.expand((*leading, part.batch_shape[-1])) for part in self.parts]
        return Columns(self.names, parts, self.places, validate_args=self._validate_args)
