"""Whole numbers of a range, whose order counts: grey levels, ratings."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppvae.distributions.values import Law, real


class Levels(Law):
    """What laws of the whole numbers ``low .. low + num_levels - 1`` share.

    A leaf defines ``_exceeded``, P(x > l) for each level l but the last, ``(..., num_levels - 1)``.
    """

    wide = False  # the form is exact in float32
    num_levels: int
    low: int = 0

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return constraints.integer_interval(self.low, self.low + self.num_levels - 1)

    def _exceeded(self) -> Tensor:
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """The mean of the levels, as numbers."""
        return (self.low + self._exceeded().sum(-1)).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        """The variance of the levels, as numbers."""
        exceeded = self._exceeded()
        steps = 2 * torch.arange(self.num_levels - 1, device=exceeded.device) + 1
        variance = (steps * exceeded).sum(-1) - exceeded.sum(-1).square()
        return variance.expand(self.batch_shape)


def log_bin(low: Tensor, high: Tensor, width: Tensor, first: Tensor, last: Tensor) -> Tensor:
    r"""The logistic law's log-probability of (low, high], whose end bins are open.

    .. math:: \log(\sigma(h) - \sigma(l)) =
              \log\sigma(h) + \log\sigma(-l) + \log(1 - e^{-(h - l)})

    The difference of two sigmoids is 0 in float32 from 17 scales on, and has no gradient there.

    Args:
        low: l, of any shape.
        high: h.
        width: h - l, where it is known more precisely than by their difference.
        first: bool, the bins that reach down to minus infinity.
        last: bool, those that reach up to infinity.
    """
    above, below = logsigmoid(high), logsigmoid(-low)
    inside = above + below + (-torch.expm1(-width)).log()
    return torch.where(first, above, torch.where(last, below, inside))


def _logistic(like: Tensor) -> Tensor:
    """Draws of the standard logistic law."""
    return torch.rand_like(like).clamp(torch.finfo(like.dtype).tiny).logit()


class DiscretizedLogistic(Levels):
    r"""Whole numbers low, ..., low + L - 1: a mixture of logistic laws, rounded.

    .. math:: p(x) = \sum_m \pi_m \Big[\sigma\Big(\frac{x + \frac12 - \mu_m}{s_m}\Big)
              - \sigma\Big(\frac{x - \frac12 - \mu_m}{s_m}\Big)\Big]

    The first bin reaches down to minus infinity, the last up to infinity, so that it sums to 1.

    Args:
        logits: of the M components, ``(..., M)``.
        loc: their means in levels, ``(..., M)``.
        log_scale: ``(..., M)``.
        num_levels: L, at least 2.
        low: the lowest level.

    Example:
        >>> one = torch.tensor([0.0])
        >>> p = DiscretizedLogistic(one, 127.4 + one, torch.tensor([2.0]).log(), 256)
        >>> p.log_prob(torch.tensor(128.0))
        tensor(-2.1067)

    References:
        Salimans, Karpathy, Chen and Kingma (2017), PixelCNN++, arXiv:1701.05517, section 2.1; the
        mixture alone, not the autoregressive network.
    """

    arg_constraints: ClassVar = real("logits", "loc", "log_scale")
    component_dims = 1

    def __init__(
        self,
        logits: Tensor,
        loc: Tensor,
        log_scale: Tensor,
        num_levels: int,
        low: int = 0,
        validate_args: bool | None = None,
    ) -> None:
        self.num_levels, self.low = num_levels, low
        super().__init__(logits, loc, log_scale, validate_args=validate_args)

    def terms(  # type: ignore[override]
        self, value: Tensor, logits: Tensor, loc: Tensor, log_scale: Tensor
    ) -> Tensor:
        x, rate = value.unsqueeze(-1), (-log_scale).exp()
        first, last = x == self.low, x == self.low + self.num_levels - 1
        each = log_bin((x - 0.5 - loc) * rate, (x + 0.5 - loc) * rate, rate, first, last)
        return torch.logsumexp(each + logits.log_softmax(-1), -1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            parameters = torch.broadcast_tensors(*self.given().values())
            logits, loc, log_scale = (p.expand((*shape, p.shape[-1])) for p in parameters)
            which = torch.distributions.Categorical(logits=logits).sample().unsqueeze(-1)
            loc, log_scale = (p.gather(-1, which).squeeze(-1) for p in (loc, log_scale))
            draw = (loc + log_scale.exp() * _logistic(loc)).round()
            return draw.clamp(self.low, self.low + self.num_levels - 1)

    def _exceeded(self) -> Tensor:
        edges = self.low + 0.5 + torch.arange(self.num_levels - 1, device=self.loc.device)
        rate = (-self.log_scale).exp().unsqueeze(-1)
        beyond = ((self.loc.unsqueeze(-1) - edges) * rate).sigmoid()
        return (self.logits.softmax(-1).unsqueeze(-1) * beyond).sum(-2)


class Ordinal(Levels):
    r"""Ordered categories 0, ..., C - 1: a logistic law cut at C - 1 points.

    .. math:: p(x \le c) = \sigma(\kappa_c - \eta)

    Args:
        predictor: :math:`\eta`, of any shape.
        first: the lowest cutpoint, that broadcasts to the predictor.
        gaps: positive distances of one cutpoint to the next, ``(..., C - 2)``.

    Example:
        >>> p = Ordinal(torch.tensor(30.0), torch.tensor(-1.0), torch.tensor([2.0]))
        >>> p.log_prob(torch.tensor(0.0))  # log sigmoid(-31)
        tensor(-31.)
    """

    arg_constraints: ClassVar = real("predictor", "first")

    def __init__(
        self, predictor: Tensor, first: Tensor, gaps: Tensor, validate_args: bool | None = None
    ) -> None:
        self.gaps, self.num_levels = gaps, gaps.shape[-1] + 2
        super().__init__(predictor, first, validate_args=validate_args)

    @property
    def cutpoints(self) -> Tensor:
        r""":math:`\kappa`, ``(..., C - 1)``."""
        beyond = self.gaps.cumsum(-1)
        first = self.first.expand(beyond.shape[:-1] if self.first.dim() == 0 else self.first.shape)
        first = first.unsqueeze(-1)
        return torch.cat([first, first + beyond], -1)

    def terms(  # type: ignore[override]
        self, value: Tensor, predictor: Tensor, first: Tensor
    ) -> Tensor:
        shape = torch.broadcast_shapes(value.shape, predictor.shape, first.shape)
        level = value.expand(shape).long()
        cuts = self.cutpoints.to(value.dtype)
        low, high = (_at(cuts, level + step) - predictor for step in (-1, 0))
        gaps = self.gaps.to(value.dtype) if self.num_levels > 2 else torch.ones_like(cuts)
        return log_bin(low, high, _at(gaps, level - 1), level == 0, level == self.num_levels - 1)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            predictor = self.predictor.expand(shape)
            above = (predictor + _logistic(predictor)).unsqueeze(-1) > self.cutpoints
            return above.sum(-1).to(predictor.dtype)

    def _exceeded(self) -> Tensor:
        return (self.predictor.unsqueeze(-1) - self.cutpoints).sigmoid()


def _at(table: Tensor, level: Tensor) -> Tensor:
    """Entries of a table ``(..., L)`` at levels ``(...)``; beyond its ends the last ones."""
    table = table.expand((*level.shape, table.shape[-1]))
    return table.gather(-1, level.clamp(0, table.shape[-1] - 1).unsqueeze(-1)).squeeze(-1)
