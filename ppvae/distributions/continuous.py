"""Numbers of the real line, of a half-line, of an interval, on a circle."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid

from ppvae.distributions.counts import log_rising
from ppvae.distributions.supports import Image, OpenUnit
from ppvae.distributions.values import Law, real
from ppvae.distributions.vectors import _expanded


class Laplace(Law):
    r"""A double exponential law.

    .. math:: \log p(x) = -|x - \mu| / b - \log 2b

    Args:
        loc: :math:`\mu`, of any shape.
        log_scale: log b.

    Example:
        >>> Laplace(torch.tensor(0.0), torch.tensor(0.0)).log_prob(torch.tensor(0.0))  # -log 2
        tensor(-0.6931)
    """

    arg_constraints: ClassVar = real("loc", "log_scale")
    support, wide, has_rsample = constraints.real, False, True

    def terms(  # type: ignore[override]
        self, value: Tensor, loc: Tensor, log_scale: Tensor
    ) -> Tensor:
        return -(value - loc).abs() * (-log_scale).exp() - log_scale - math.log(2)

    def library(self, loc: Tensor, log_scale: Tensor) -> Any:  # type: ignore[override]
        return dist.Laplace(loc, log_scale.exp(), validate_args=False)


class StudentT(Law):
    r"""A Student t law, whose tails are heavier the fewer degrees of freedom it has.

    .. math:: \log p(x) = \log\frac{\Gamma(\frac{\nu + 1}2)}{\Gamma(\frac\nu2) \sqrt{\pi\nu}}
              - \log\sigma - \frac{\nu + 1}2 \log\Big(1 + \frac{(x - \mu)^2}{\nu\sigma^2}\Big)

    scipy's ``t(nu, mu, sigma)``. As :math:`\nu` grows it becomes normal.

    Args:
        loc: :math:`\mu`, of any shape.
        log_scale: :math:`\log\sigma`.
        log_df: :math:`\log\nu`.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> StudentT(zero, zero, torch.tensor(3.0).log()).log_prob(torch.tensor(1.5))
        tensor(-2.1201)
    """

    arg_constraints: ClassVar = real("loc", "log_scale", "log_df")
    support, has_rsample = constraints.real, True

    def terms(  # type: ignore[override]
        self, value: Tensor, loc: Tensor, log_scale: Tensor, log_df: Tensor
    ) -> Tensor:
        df, y = log_df.exp(), (value - loc) * (-log_scale).exp()
        constant = log_rising(torch.full_like(df, 0.5), log_df - math.log(2))
        tail = 0.5 * (df + 1) * torch.log1p(y.square() / df)
        return constant - 0.5 * math.log(2 * math.pi) - log_scale - tail

    def library(  # type: ignore[override]
        self, loc: Tensor, log_scale: Tensor, log_df: Tensor
    ) -> Any:
        return dist.StudentT(log_df.exp(), loc, log_scale.exp(), validate_args=False)


class LogNormal(Law):
    r"""Positive numbers whose logarithm is normal.

    .. math:: \log p(x) = \log N(\log x; \mu, \sigma^2) - \log x

    Args:
        loc: :math:`\mu`, the logarithm of the median.
        log_scale: :math:`\log\sigma`.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> LogNormal(zero, zero).log_prob(torch.tensor(1.0))  # -log(2 pi) / 2
        tensor(-0.9189)
    """

    arg_constraints: ClassVar = real("loc", "log_scale")
    support, wide, has_rsample = constraints.positive, False, True

    def terms(  # type: ignore[override]
        self, value: Tensor, loc: Tensor, log_scale: Tensor
    ) -> Tensor:
        log_x = value.log()
        y = (log_x - loc) * (-log_scale).exp()
        return -0.5 * y.square() - log_scale - 0.5 * math.log(2 * math.pi) - log_x

    def library(self, loc: Tensor, log_scale: Tensor) -> Any:  # type: ignore[override]
        return dist.LogNormal(loc, log_scale.exp(), validate_args=False)


class Gamma(Law):
    r"""Positive numbers by mean and shape; their coefficient of variation is one over its root.

    .. math:: p(x) = \frac{(a / \mu)^a}{\Gamma(a)}\, x^{a - 1} e^{-a x / \mu}

    Pyro's ``Gamma(a, a / mu)``, scipy's ``gamma(a, scale=mu / a)``.

    Args:
        log_mean: :math:`\log\mu`.
        log_concentration: log a.

    Example:
        >>> zero = torch.tensor(0.0)
        >>> Gamma(zero, zero).log_prob(torch.tensor(2.0))  # an exponential law: -2
        tensor(-2.)
    """

    arg_constraints: ClassVar = real("log_mean", "log_concentration")
    support, has_rsample = constraints.positive, True

    def terms(  # type: ignore[override]
        self, value: Tensor, log_mean: Tensor, log_concentration: Tensor
    ) -> Tensor:
        a, log_x = log_concentration.exp(), value.log()
        log_ratio = log_x - log_mean
        of_shape = a * log_concentration - torch.lgamma(a)
        return a * (log_ratio - log_ratio.exp()) + of_shape - log_x

    def library(  # type: ignore[override]
        self, log_mean: Tensor, log_concentration: Tensor
    ) -> Any:
        rate = (log_concentration - log_mean).exp()
        return dist.Gamma(log_concentration.exp(), rate, validate_args=False)


class Beta(Law):
    r"""Numbers between 0 and 1, without the ends, by mean and concentration.

    .. math:: p(x) = \frac{x^{a - 1} (1 - x)^{b - 1}}{B(a, b)},
              \quad a = \sigma(m)\, c,\ b = \sigma(-m)\, c

    At 0 and 1 it is zero or infinite; data that hold these need :class:`ContinuousBernoulli`.

    Args:
        logits: m, of the mean.
        log_concentration: log c.

    Example:
        >>> uniform = Beta(torch.tensor(0.0), torch.tensor(2.0).log())
        >>> uniform.log_prob(torch.tensor(0.3)).abs() < 1e-6
        tensor(True)
    """

    arg_constraints: ClassVar = real("logits", "log_concentration")
    support, has_rsample = OpenUnit(), True

    def terms(  # type: ignore[override]
        self, value: Tensor, logits: Tensor, log_concentration: Tensor
    ) -> Tensor:
        a, b = _shares(logits, log_concentration)
        log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(log_concentration.exp())
        return (a - 1) * value.log() + (b - 1) * torch.log1p(-value) - log_beta

    def library(  # type: ignore[override]
        self, logits: Tensor, log_concentration: Tensor
    ) -> Any:
        return dist.Beta(*_shares(logits, log_concentration), validate_args=False)


def _shares(logits: Tensor, log_concentration: Tensor) -> tuple[Tensor, Tensor]:
    a, b = (logsigmoid(sign * logits) + log_concentration for sign in (1, -1))
    return a.exp(), b.exp()


class ContinuousBernoulli(Law):
    r"""Numbers in [0, 1] with the Bernoulli's formula and the constant that makes it a density.

    .. math:: p(x) = \frac{a}{e^a - 1}\, e^{a x}, \quad
              \log p(x) = -|a|\, t + \log|a| - \log(1 - e^{-|a|}),

    where t is the distance of x from the end that a favours.

    Args:
        logits: a, of any shape.

    Example:
        >>> p = ContinuousBernoulli(torch.tensor([-5.0, 0.1, 100.0]))
        >>> p.log_prob(torch.tensor([0.3, 0.3, 1.0])), p.mean
        (tensor([ 0.1162, -0.0204,  4.6052]), tensor([0.1932, 0.5083, 0.9900]))

    References:
        Loaiza-Ganem and Cunningham (2019), arXiv:1907.06845.
    """

    arg_constraints: ClassVar = real("logits")
    support, wide, has_rsample = constraints.unit_interval, False, True

    def terms(self, value: Tensor, logits: Tensor) -> Tensor:  # type: ignore[override]
        small = logits.abs() < 0.6
        a = torch.where(small, torch.ones_like(logits), logits).abs()
        away = torch.where(logits > 0, 1 - value, value)
        far = a.log() - torch.log(-torch.expm1(-a)) - a * away
        s = torch.where(small, logits, torch.zeros_like(logits)).square() / 4
        near = logits * (value - 0.5) - s * (1 / 6 - s * (1 / 180 - s * (1 / 2835 - s / 37800)))
        return torch.where(small, near, far)

    def library(self, logits: Tensor) -> Any:  # type: ignore[override]
        return dist.ContinuousBernoulli(logits=logits, validate_args=False)

    @property
    def mean(self) -> Tensor:
        r""":math:`1/2 + (\coth h - 1/h) / 2` for h = a / 2."""
        h = self.logits.double() / 2
        small = h.abs() < 0.05
        safe = torch.where(small, torch.ones_like(h), h)
        s = h.square()
        near = h * (1 / 3 - s * (1 / 45 - s * (2 / 945 - s / 4725)))
        coth = torch.where(small, near, 1 / safe.tanh() - 1 / safe)
        return (0.5 + 0.5 * coth).to(self.logits).expand(self.batch_shape)

    @property
    def variance(self) -> Tensor:
        r""":math:`(1/h^2 - 1/\sinh^2 h) / 4` for h = a / 2."""
        h = self.logits.double() / 2
        small = h.abs() < 0.05
        safe = torch.where(small, torch.ones_like(h), h.clamp(-300, 300))
        s = h.square()
        near = 1 / 3 - s * (1 / 15 - s * (2 / 189 - s / 675))
        variance = torch.where(small, near, 1 / safe.square() - 1 / safe.sinh().square()) / 4
        return variance.to(self.logits).expand(self.batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """By the inverse of the distribution function, in float64."""
        shape = self._extended_shape(torch.Size(sample_shape))
        u = torch.rand(shape, dtype=self.logits.dtype, device=self.logits.device).double()
        h = self.logits.double().abs()
        small = h < 1e-4
        safe = torch.where(small, torch.ones_like(h), h)
        away = torch.where(
            small, u - 0.5 * h * u * (1 - u), -torch.log1p(u * torch.expm1(-safe)) / safe
        )
        return torch.where(self.logits > 0, 1 - away, away).to(self.logits)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)


class VonMises(Law):
    r"""Angles in radians, around a direction.

    .. math:: p(x) = \frac{e^{\kappa \cos(x - \mu)}}{2\pi I_0(\kappa)}

    Any turn of x and :math:`\mu` will do; draws lie in :math:`(-\pi, \pi]`.

    Args:
        loc: :math:`\mu`.
        log_concentration: :math:`\log\kappa`.

    Example:
        >>> p = VonMises(torch.tensor(0.0), torch.tensor(5.0).log())
        >>> p.log_prob(torch.tensor(1.0))
        tensor(-2.4410)
    """

    arg_constraints: ClassVar = real("loc", "log_concentration")
    support = constraints.real

    def terms(  # type: ignore[override]
        self, value: Tensor, loc: Tensor, log_concentration: Tensor
    ) -> Tensor:
        kappa = log_concentration.exp()
        small = kappa < 200
        bessel = torch.special.i0e(torch.where(small, kappa, torch.ones_like(kappa))).log()
        large = torch.where(small, torch.full_like(kappa, 200.0), kappa)
        w = 1 / (8 * large)
        series = w * (1 + w * (9 / 2 + w * (75 / 2 + w * (3675 / 8 + w * 59535 / 8))))
        log_i0e = torch.where(
            small, bessel, torch.log1p(series) - 0.5 * (2 * math.pi * large).log()
        )
        apart = 2 * kappa * torch.sin(0.5 * (value - loc)).square()
        return -apart - math.log(2 * math.pi) - log_i0e

    def library(  # type: ignore[override]
        self, loc: Tensor, log_concentration: Tensor
    ) -> Any:
        return dist.VonMises(loc, log_concentration.exp(), validate_args=False)


class Affine(dist.TorchDistribution):
    r"""loc + scale v, for v of another distribution of single numbers.

    .. math:: \log p(x) = \log p_v\big((x - \mathrm{loc}) / \mathrm{scale}\big)
              - \log \mathrm{scale}

    Args:
        base: the distribution of v, of any batch shape.
        loc: broadcasts to it.
        scale: > 0.

    Example:
        >>> from ppvae.distributions import Laplace
        >>> grams = Affine(Laplace(torch.zeros(1), torch.zeros(1)), 4000.0, torch.tensor([500.0]))
        >>> grams.mean, grams.log_prob(torch.tensor([4000.0]))  # -log(2 * 500)
        (tensor([4000.]), tensor([-6.9078]))
    """

    arg_constraints: ClassVar = {"scale": constraints.positive}

    def __init__(
        self,
        base: Any,
        loc: Tensor | float,
        scale: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.base, self.loc, self.scale = base, torch.as_tensor(loc).to(scale), scale
        shape = torch.broadcast_shapes(base.batch_shape, self.loc.shape, scale.shape)
        super().__init__(shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=0)
    def support(self) -> Any:
        inner = self.base.support
        return inner if inner is constraints.real else Image(inner, self.loc, self.scale)

    @property
    def has_rsample(self) -> bool:
        """Whether draws have a sample path."""
        return bool(self.base.has_rsample)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        wider = torch.promote_types(value.dtype, self.scale.dtype)
        inner = self.base.log_prob((value.to(wider) - self.loc) / self.scale)
        return _expanded(inner - self.scale.log(), self.batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * self.base.expand(self.batch_shape).rsample(sample_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.loc + self.scale * self.base.expand(self.batch_shape).sample(sample_shape)

    @property
    def mean(self) -> Tensor:
        """The mean, in the units of the data."""
        return self.loc + self.scale * self.base.mean

    @property
    def variance(self) -> Tensor:
        """The variance, in the units of the data."""
        return self.scale.square() * self.base.variance

    def expand(self, batch_shape: Any, _instance: Any = None) -> Affine:
        base = self.base.expand(torch.Size(batch_shape))
        return Affine(base, self.loc, self.scale, validate_args=self._validate_args)
