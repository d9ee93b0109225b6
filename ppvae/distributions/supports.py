"""Supports that torch does not have, and points of supports for what a mask hides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    ComposeTransform,
    Independent,
    SigmoidTransform,
    Transform,
    biject_to,
    constraints,
    transform_to,
)


class OpenUnit(constraints.Constraint):
    """The numbers between 0 and 1, without the ends."""

    def check(self, value: Tensor) -> Tensor:
        """Which values lie inside."""
        return (value > 0) & (value < 1)

    def __repr__(self) -> str:
        return "(0, 1), without its ends"


@biject_to.register(OpenUnit)
@transform_to.register(OpenUnit)
def _(constraint: OpenUnit) -> Transform:
    return SigmoidTransform()


class Image(constraints.Constraint):
    """What ``loc + scale v`` may be, for v of another support, element-wise."""

    def __init__(self, base: constraints.Constraint, loc: Tensor, scale: Tensor) -> None:
        self.base, self.loc, self.scale = base, loc, scale
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which values lie inside."""
        inside: Tensor = self.base.check((value - self.loc) / self.scale)
        return inside

    def __repr__(self) -> str:
        return f"loc + scale * v for v of {self.base}"


@biject_to.register(Image)
@transform_to.register(Image)
def _(constraint: Image) -> Transform:
    there = AffineTransform(constraint.loc, constraint.scale)
    return ComposeTransform([biject_to(constraint.base), there])


class ByColumn(constraints.Constraint):
    """Supports of the columns of the last dimension, element-wise.

    Args:
        names: of the columns.
        supports: of single values.
        places: the columns that each of them is of.
    """

    is_discrete = True

    def __init__(
        self,
        names: tuple[str, ...],
        supports: list[constraints.Constraint],
        places: Sequence[Sequence[int]],
    ) -> None:
        self.names, self.supports, self.places = names, supports, places
        super().__init__()

    def check(self, value: Tensor) -> Tensor:
        """Which values lie inside."""
        parts = zip(self.supports, self.places, strict=True)
        return joined([s.check(value[..., list(at)]) for s, at in parts], self.places)

    def of(self, column: int) -> constraints.Constraint:
        """The support of the values of one column, or of several like it."""
        return next(s for s, at in zip(self.supports, self.places, strict=True) if column in at)

    def __repr__(self) -> str:
        return "; ".join(f"{name}: {self.of(i)}" for i, name in enumerate(self.names))


def joined(parts: Sequence[Tensor], places: Sequence[Sequence[int]]) -> Tensor:
    """Columns of several tensors, each put at its place."""
    leading = torch.broadcast_shapes(*(part.shape[:-1] for part in parts))
    side_by_side = torch.cat([part.expand((*leading, part.shape[-1])) for part in parts], -1)
    order = [column for at in places for column in at]
    if order == sorted(order):
        return side_by_side
    return side_by_side[..., sorted(range(len(order)), key=order.__getitem__)]


def heads_that_fit(values: Tensor) -> tuple[str, tuple[str, ...]]:
    """What numbers are, and the names of the heads whose support holds all of them.

    Args:
        values: any shape; NaN is passed over.

    Example:
        >>> heads_that_fit(torch.tensor([0.0, 3.0, 7.0]))
        ('counts', ('Poisson', 'NegativeBinomial', 'ZeroInflated'))
    """
    values = values[~values.isnan()] if values.is_floating_point() else values
    real = ("Normal", "Laplace", "StudentT")
    if not values.numel() or values.is_complex():
        return "no numbers", ()
    low, high = values.min(), values.max()
    if not bool((values == values.round()).all() if values.is_floating_point() else True):
        if low < 0 or high > 1:
            positive = ("LogNormal", "Gamma", *real)
            return ("positive numbers", positive) if low > 0 else ("real numbers", real)
        if low > 0 and high < 1:
            return "numbers between 0 and 1", ("Beta", "ContinuousBernoulli", *real)
        return "numbers in [0, 1], ends included", ("ContinuousBernoulli", *real)
    if low < 0:
        return "whole numbers of either sign", ("DiscretizedLogistic",)
    if high <= 1:
        return "0 and 1", ("Bernoulli",)
    return "counts", ("Poisson", "NegativeBinomial", "ZeroInflated")


# ------------------------------------------------------------------------------ masks


class Masked(MaskedDistribution):
    """Pyro's, whose ``log_prob`` replaces what the mask hides before it is looked at.

    So NaN there, or a value outside the support, has no gradient either.
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if isinstance(self._mask, Tensor):
            value = filled(value, self._mask, self.base_dist)
        log_prob: Tensor = super().log_prob(value)
        return log_prob

    def expand(self, batch_shape: Any, _instance: Any = None) -> Masked:
        batch_shape = torch.Size(batch_shape)
        return Masked(self.base_dist.expand(batch_shape), self._mask)


def masked(fn: Any, observed: Tensor) -> Any:
    r"""A distribution of which only some values of each row are observed.

    .. math:: \log p(x_{\mathrm{obs}}) = \sum_{d\,:\,\mathrm{observed}_d} \log p(x_d)

    Args:
        fn: of independent values, as every head of :mod:`ppvae.conditionals` gives but
            ``BagOfWords``, ``Multinomial`` and ``DirichletMultinomial``.
        observed: bool, of the value's shape ``(N, *event_shape)``. What is not observed may hold
            any number, NaN included.

    Raises:
        TypeError: ``fn`` has no terms for single values, or ``observed`` is not bool.

    Example:
        >>> import torch
        >>> from ppvae.distributions import DiagonalNormal
        >>> x = torch.tensor([0.0, float("nan"), 0.0])
        >>> masked(DiagonalNormal(torch.zeros(3), 1.0), ~x.isnan()).log_prob(x)  # -log 2 pi
        tensor(-1.8379)
    """
    if observed.dtype != torch.bool:
        raise TypeError(f"observed must be bool, and is {observed.dtype}: give ~x.isnan()")
    events = fn.reinterpreted_batch_ndims if isinstance(fn, Independent) else 0
    single = fn.base_dist if events else fn
    if single.event_shape:
        raise TypeError(
            f"{type(fn).__name__} has no log-probability of single values, so part of a row cannot "
            "be hidden; hide whole rows by poutine.mask, or take a head of independent values"
        )
    hidden = Masked(single, observed)
    return hidden.to_event(events) if events else hidden


def filled(value: Tensor, mask: Tensor, fn: Any) -> Tensor:
    """A value with a point of the support of ``fn`` where the mask hides it."""
    for _ in range(fn.event_dim):
        mask = mask.unsqueeze(-1)
    return torch.where(mask, value, point_of(fn.support, value))


def point_of(support: Any, value: Tensor) -> Tensor:
    """A point of a support, of a value's shape; the value where none is known."""
    inner = support
    while isinstance(inner, constraints.independent):
        inner = inner.base_constraint
    if inner is constraints.real:
        return value.new_zeros(())
    if isinstance(inner, ByColumn):
        parts = [
            (support, value[..., list(at)])
            for support, at in zip(inner.supports, inner.places, strict=True)
        ]
        return joined([point_of(support, v).expand(v.shape) for support, v in parts], inner.places)
    if inner is constraints.one_hot or isinstance(inner, constraints.multinomial):
        first = torch.arange(value.shape[-1], device=value.device) == 0
        return first.to(value.dtype) * getattr(inner, "upper_bound", 1)
    if support.is_discrete:
        lowest = getattr(inner, "lower_bound", 0 if inner is constraints.boolean else None)
        return value if lowest is None else torch.as_tensor(lowest).to(value)
    try:
        transform = transform_to(support)
        free = transform.inverse_shape(value.shape)
    except NotImplementedError:
        return value
    return transform(value.new_zeros(free))
