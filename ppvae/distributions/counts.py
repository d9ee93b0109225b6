"""Counts: 0, 1, 2, ..."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from ppvae.distributions.values import Law, real
from ppvae.distributions.vectors import WordCounts, _expanded


class Poisson(Law):
    r"""A Poisson law by the logarithm of its rate.

    .. math:: \log p(x) = x \log\mu - \mu - \log x!

    Args:
        log_rate: :math:`\log\mu`, of any shape.

    Example:
        >>> Poisson(torch.tensor(0.0)).log_prob(torch.tensor(0.0))  # exp(-1)
        tensor(-1.)
    """

    arg_constraints: ClassVar = real("log_rate")
    support = constraints.nonnegative_integer

    def terms(self, value: Tensor, log_rate: Tensor) -> Tensor:  # type: ignore[override]
        return value * log_rate - log_rate.exp() - torch.lgamma(value + 1)

    def library(self, log_rate: Tensor) -> Any:  # type: ignore[override]
        return dist.Poisson(log_rate.exp(), validate_args=False)


class NegativeBinomial(Law):
    r"""Counts more dispersed than a Poisson law's: its rate is gamma-distributed.

    .. math:: p(x) = \frac{\Gamma(x + \theta)}{x!\, \Gamma(\theta)}
              \Big(\frac{\theta}{\theta + \mu}\Big)^\theta
              \Big(\frac{\mu}{\theta + \mu}\Big)^x,
              \quad \mathrm{Var} = \mu + \mu^2 / \theta

    scipy's ``nbinom(theta, theta / (theta + mu))``. As theta grows it becomes Poisson's.

    Args:
        log_mean: :math:`\log\mu`.
        log_theta: :math:`\log\theta`.

    Example:
        >>> p = NegativeBinomial(torch.tensor(3.5).log(), torch.tensor(2.0).log())
        >>> p.log_prob(torch.tensor(7.0)), p.variance
        (tensor(-3.1077), tensor(9.6250))
    """

    arg_constraints: ClassVar = real("log_mean", "log_theta")
    support = constraints.nonnegative_integer

    def terms(  # type: ignore[override]
        self, value: Tensor, log_mean: Tensor, log_theta: Tensor
    ) -> Tensor:
        odds = _softplus(log_mean - log_theta)  # log(1 + mu / theta)
        of_parameters = value * (log_mean - odds) - log_theta.exp() * odds
        return of_parameters + log_rising(value, log_theta) - torch.lgamma(value + 1)

    def library(self, log_mean: Tensor, log_theta: Tensor) -> Any:  # type: ignore[override]
        logits = log_mean - log_theta
        return dist.NegativeBinomial(log_theta.exp(), logits=logits, validate_args=False)


class BetaBinomial(Law):
    r"""Successes in n trials whose probability is beta-distributed.

    .. math:: p(x) = \binom nx \frac{B(x + a,\, n - x + b)}{B(a, b)},
              \quad a = \sigma(m)\, c,\ b = \sigma(-m)\, c

    scipy's ``betabinom(n, a, b)``. As c grows it becomes binomial.

    Args:
        logits: m, of the mean share.
        log_concentration: log c.
        total_count: n, a whole number or a tensor of them that broadcasts to the logits.

    Example:
        >>> a, b = torch.tensor(2.0), torch.tensor(3.0)
        >>> p = BetaBinomial((a / b).log(), (a + b).log(), total_count=10)
        >>> p.log_prob(torch.tensor(4.0)), p.mean
        (tensor(-1.9671), tensor(4.0000))
    """

    arg_constraints: ClassVar = real("logits", "log_concentration")

    def __init__(
        self,
        logits: Tensor,
        log_concentration: Tensor,
        total_count: int | Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.total_count = torch.as_tensor(total_count, device=logits.device)
        logits = logits.expand(torch.broadcast_shapes(logits.shape, self.total_count.shape))
        super().__init__(logits, log_concentration, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return constraints.integer_interval(0, self.total_count)

    def terms(  # type: ignore[override]
        self, value: Tensor, logits: Tensor, log_concentration: Tensor
    ) -> Tensor:
        n = self.total_count.to(value)
        yes, no = logsigmoid(logits), logsigmoid(-logits)
        rising = (
            log_rising(value, yes + log_concentration)
            + log_rising(n - value, no + log_concentration)
            - log_rising(n, log_concentration)
        )
        chosen = torch.lgamma(n + 1) - torch.lgamma(value + 1) - torch.lgamma(n - value + 1)
        return value * yes + (n - value) * no + rising + chosen

    def library(self, logits: Tensor, log_concentration: Tensor) -> Any:  # type: ignore[override]
        a, b = (logsigmoid(sign * logits) + log_concentration for sign in (1, -1))
        n = self.total_count.to(logits).expand(logits.shape)
        return dist.BetaBinomial(a.exp(), b.exp(), n, validate_args=False)


class ZeroInflated(dist.TorchDistribution):
    r"""Counts with zeros beyond what a law of counts explains.

    .. math:: p(x) = \sigma(g)\, [x = 0] + \sigma(-g)\, p_0(x)

    Args:
        base: the law :math:`p_0` of single counts, of any batch shape.
        gate_logits: g, of the same shape; scvi's ``zi_logits``.

    Example:
        >>> base = Poisson(torch.tensor(2.0).log())
        >>> gate = torch.tensor(0.3).logit()
        >>> ZeroInflated(base, gate).log_prob(torch.tensor(0.0))
        tensor(-0.9295)
    """

    arg_constraints: ClassVar = real("gate_logits")
    has_rsample = False

    def __init__(self, base: Any, gate_logits: Tensor, validate_args: bool | None = None) -> None:
        self.base, self.gate_logits = base, gate_logits
        shape = torch.broadcast_shapes(base.batch_shape, gate_logits.shape)
        super().__init__(shape, validate_args=validate_args)

    @constraints.dependent_property(is_discrete=True, event_dim=0)
    def support(self) -> Any:
        return self.base.support

    def log_prob(self, value: Tensor) -> Tensor:
        kept = logsigmoid(-self.gate_logits) + self.base.log_prob(value)
        zero = torch.logaddexp(logsigmoid(self.gate_logits).to(kept), kept)
        return _expanded(torch.where(value == 0, zero, kept), self.batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            kept = torch.bernoulli(torch.sigmoid(-self.gate_logits).expand(shape))
            draw: Tensor = self.base.expand(self.batch_shape).sample(sample_shape)
            return torch.where(kept == 1, draw, torch.zeros_like(draw))

    @property
    def mean(self) -> Tensor:
        """The mean, zeros beyond ``base`` included."""
        return torch.sigmoid(-self.gate_logits) * self.base.mean

    @property
    def variance(self) -> Tensor:
        """The variance, zeros beyond ``base`` included."""
        kept = torch.sigmoid(-self.gate_logits)
        return kept * self.base.variance + kept * (1 - kept) * self.base.mean.square()

    def expand(self, batch_shape: Any, _instance: Any = None) -> ZeroInflated:
        batch_shape = torch.Size(batch_shape)
        base, gate = self.base.expand(batch_shape), self.gate_logits.expand(batch_shape)
        return ZeroInflated(base, gate, validate_args=self._validate_args)


# ------------------------------------------------------------------------------ rows of counts


class Multinomial(WordCounts):
    r"""How often each of V outcomes was seen in n draws, n being that of the row.

    .. math:: \log p(x) = \log n! - \sum_v \log x_v! + \sum_v x_v \log\mathrm{softmax}(\ell)_v

    Args:
        logits: unnormalised log-probabilities, ``(..., V)``.
        total_count: n, needed only to sample.

    Example:
        >>> Multinomial(torch.zeros(2)).log_prob(torch.tensor([1.0, 1.0])).exp()
        tensor(0.5000)
    """

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        dtype = torch.promote_types(value.dtype, self.logits.dtype)
        log_prob = self._log_prob(value.double()).to(dtype)
        return _expanded(log_prob, self.batch_shape)

    def _log_prob(self, value: Tensor) -> Tensor:
        return coefficient(value) + (value * self.logits.double().log_softmax(-1)).sum(-1)


class DirichletMultinomial(Multinomial):
    r"""A multinomial whose probabilities are Dirichlet-distributed: counts that vary more.

    .. math:: p(x) = \frac{n!\,\Gamma(c)}{\Gamma(n + c)}
              \prod_v \frac{\Gamma(x_v + \alpha_v)}{x_v!\, \Gamma(\alpha_v)},
              \quad \alpha = c\, \mathrm{softmax}(\ell)

    As c grows it becomes multinomial.

    Args:
        logits: :math:`\ell`, ``(..., V)``.
        log_concentration: log c, of the shape of the logits but for their last dimension.
        total_count: n, needed only to sample.

    Example:
        >>> uniform = DirichletMultinomial(torch.zeros(2), torch.tensor(2.0).log())
        >>> uniform.log_prob(torch.tensor([3.0, 0.0])).exp()  # of 0, 1, 2 or 3
        tensor(0.2500)
    """

    arg_constraints: ClassVar = {
        "logits": constraints.independent(constraints.real, 1),
        "log_concentration": constraints.real,
    }
    log_concentration: Tensor

    def __init__(
        self,
        logits: Tensor,
        log_concentration: Tensor,
        total_count: Tensor | int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.log_concentration = log_concentration
        super().__init__(logits, total_count, validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> DirichletMultinomial:
        new = self._get_checked_instance(DirichletMultinomial, _instance)
        new.log_concentration = self.log_concentration
        expanded: DirichletMultinomial = super().expand(batch_shape, new)
        return expanded

    def _log_prob(self, value: Tensor) -> Tensor:
        shares = self.logits.double().log_softmax(-1)
        log_c = self.log_concentration.double()
        each = value * shares + log_rising(value, shares + log_c.unsqueeze(-1))
        return coefficient(value) + each.sum(-1) - log_rising(value.sum(-1), log_c)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw probabilities, then ``total_count`` outcomes."""
        total_count = self._require_total_count()
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            log_c = self.log_concentration.unsqueeze(-1)
            shares = dist.Dirichlet((self.logits.log_softmax(-1) + log_c).exp().expand(shape))
            return WordCounts(shares.sample().log(), total_count).sample()


# ------------------------------------------------------------------------------ functions


def coefficient(counts: Tensor) -> Tensor:
    r"""The multinomial's, :math:`\log n! - \sum_v \log x_v!`, of rows of counts ``(..., V)``."""
    return torch.lgamma(counts.sum(-1) + 1) - torch.lgamma(counts + 1).sum(-1)


def log_rising(k: Tensor, log_a: Tensor) -> Tensor:
    r"""The part of a rising factorial that vanishes for large a.

    .. math:: \log \frac{\Gamma(a + k)}{\Gamma(a)\, a^k} = \sum_{i < k} \log(1 + i / a)
              \ \text{for whole } k

    A difference of two log-gamma functions loses all digits where a is large. Here a is raised to
    b = a + 4, where Stirling's series holds to 3e-11, and leading terms cancel on paper.

    Args:
        k: >= 0, float64.
        log_a: log a, between -170 and 170.

    Example:
        >>> log_rising(torch.tensor(3.0), torch.tensor(0.0)).exp().round()  # 1 * 2 * 3
        tensor(6.)
    """
    a = log_a.exp()
    b = a + 4
    u = k / b
    log1p_u = torch.log1p(u)
    at_b = b * ((1 + u) * log1p_u - u) - 0.5 * log1p_u + _stirling(b + k) - _stirling(b)
    y = a + k
    lowered = (y * (y + 1) * (y + 2) * (y + 3)) / (a * (a + 1) * (a + 2) * (a + 3))
    return at_b + k * torch.log1p(4 / a) - lowered.log()


def _stirling(x: Tensor) -> Tensor:
    """log Gamma(x) less (x - 1/2) log x - x + log(2 pi) / 2, for x >= 4."""
    y = 1 / x
    w = y * y
    series = 1 / 1260 - w * (1 / 1680 - w * (1 / 1188 - w * (691 / 360360 - w / 156)))
    return y * (1 / 12 - w * (1 / 360 - w * series))


def _softplus(x: Tensor) -> Tensor:
    """torch's takes x itself from 20 on, where float64 still has the rest."""
    return softplus(x, threshold=40.0)
