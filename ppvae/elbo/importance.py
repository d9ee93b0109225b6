"""Bounds that are nonlinear functions of K log-weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppvae.arguments import real
from ppvae.elbo.estimator import Estimator
from ppvae.elbo.gradients import coefficient, mean_of_others, through_draws, with_gradient
from ppvae.elbo.state import State
from ppvae.pairs import Leaves
from ppvae.weights import drawn_log_q, weigh


@dataclass(frozen=True, eq=False)
class IWELBO(Estimator):
    r"""The importance-weighted bound of K particles, per datapoint.

    .. math:: \mathcal L_K(x) = \mathbb E\left[\log \frac 1K \sum_{k=1}^K w_k\right]
              \le \mathcal L_{K+1}(x) \le \log p(x)

    Args:
        num_particles: K >= 1; the bound tightens with K.
        gradient: ``"pathwise"``, ``"dreg"``, ``"gdreg"``, ``"score"`` or ``"vimco"``, see
            :mod:`ppvae.elbo.gradients`. The pathwise gradient of the guide loses signal as K
            grows (Rainforth et al. 2018); ``"dreg"`` does not.

    A weight on the KL has no meaning here (the bound is not a sum of a likelihood and a KL), so
    there is none; for bounds between this and the ELBO see :class:`CIWELBO` and
    :class:`RenyiELBO`.

    Raises:
        ValueError: bad arguments; a ``poutine.scale`` on a site (the bound is not linear).

    Source: Burda et al., Importance Weighted Autoencoders, 2016.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> loss = elbo.IWELBO(num_particles=8)(model, guide)
        >>> loss(torch.ones(5, 4)).shape
        torch.Size([])
    """

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "dreg", "gdreg", "score", "vimco")

    def bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    def bound_of_others(self, log_w: Tensor, put: Tensor | None = None) -> Tensor:
        return log_mean_of_others(log_w, put)

    def dreg_coefficient(self, log_w: Tensor) -> Tensor:
        return normalised(log_w).square()


@dataclass(frozen=True, eq=False)
class _Grouped(Estimator):
    """Draws that come in M = ``num_groups`` groups of K = ``num_particles``."""

    num_groups: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.num_groups, Integral) or not 1 <= self.num_groups < 2**63:
            raise ValueError(
                f"{type(self).__name__}: num_groups must be at least 1 and a whole number, got "
                f"{self.num_groups!r}"
            )
        super().__post_init__()

    @property
    def num_draws(self) -> int:
        return self.num_groups * self.num_particles


@dataclass(frozen=True, eq=False)
class MIWELBO(_Grouped):
    r"""The mean of M importance-weighted bounds of K particles each.

    .. math:: \mathcal L_{M,K}(x) = \mathbb E\left[\frac 1M \sum_{m=1}^M
              \log \frac 1K \sum_{k=1}^K w_{mk}\right] = \mathcal L_K(x)

    As tight as IWELBO-K, with the variance of M K particles: a better gradient for the guide.

    Args:
        num_particles: K >= 1 particles per group; ``num_groups * num_particles`` are drawn.
        gradient: ``"pathwise"``, ``"dreg"`` or ``"vimco"``.
        num_groups: M >= 1.

    Source: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> from ppvae import elbo
        >>> estimator = elbo.MIWELBO(num_particles=2, num_groups=2)
        >>> estimator.num_draws
        4
        >>> estimator.bound(torch.tensor([[0.0], [0.0], [-2.0], [-2.0]]))
        tensor([-1.])
    """

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "dreg", "vimco")

    def bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(grouped(log_w, self.num_groups), 1).mean(0)

    def bound_of_others(self, log_w: Tensor, put: Tensor | None = None) -> Tensor:
        M, groups = self.num_groups, grouped(log_w, self.num_groups)
        own = log_mean_of_others(groups, None if put is None else grouped(put, M), dim=1)
        rest = (M - 1) * mean_of_others(log_mean_exp(groups, 1)).unsqueeze(1)  # of other groups
        return ((own + rest) / M).flatten(0, 1)

    def dreg_coefficient(self, log_w: Tensor) -> Tensor:
        weights = normalised(grouped(log_w, self.num_groups), 1)
        return weights.square().flatten(0, 1) / self.num_groups


@dataclass(frozen=True, eq=False)
class CIWELBO(Estimator):
    r"""A convex combination of the ELBO and the importance-weighted bound, from the same draws.

    .. math:: \mathcal L(x) = \mathbb E\left[\beta \frac 1K \sum_k \log w_k
              + (1 - \beta) \log \frac 1K \sum_k w_k\right]

    Args:
        num_particles: K >= 1.
        gradient: ``"pathwise"``, ``"dreg"``, ``"score"`` or ``"vimco"``.
        beta: in [0, 1]; 0 is IWELBO, 1 the ELBO. It mixes two bounds; it does not weigh a KL.

    Source: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> from ppvae import elbo
        >>> elbo.CIWELBO(num_particles=2, beta=0.5).bound(torch.tensor([[-1.0], [-1.0]]))
        tensor([-1.])
    """

    beta: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "beta")
        if not 0 <= self.beta <= 1:
            raise ValueError(f"CIWELBO mixes two bounds with beta in [0, 1], got {self.beta}")

    def bound(self, log_w: Tensor) -> Tensor:
        # A bound of weight 0 is left out: it may be minus infinity.
        if self.beta == 0:
            return log_mean_exp(log_w)
        if self.beta == 1:
            return log_w.mean(0)
        return self.beta * log_w.mean(0) + (1 - self.beta) * log_mean_exp(log_w)

    def bound_of_others(self, log_w: Tensor, put: Tensor | None = None) -> Tensor:
        if self.beta == 0:
            return log_mean_of_others(log_w, put)
        if self.beta == 1:
            return mean_of_others(log_w, put)
        tight = log_mean_of_others(log_w, put)
        return self.beta * mean_of_others(log_w, put) + (1 - self.beta) * tight

    def dreg_coefficient(self, log_w: Tensor) -> Tensor:
        weights = normalised(log_w)
        return self.beta / len(log_w) + (1 - self.beta) * weights.square()


@dataclass(frozen=True, eq=False)
class PIWELBO(_Grouped):
    r"""The tight bound for the model, the low-variance one for the guide, from the same draws.

    The model ascends IWELBO-(M K) :math:`= \mathcal L_{1,MK}`, the guide MIWELBO-(M, K)
    :math:`= \mathcal L_{M,K}`. The reported value is the model's, IWELBO-(M K).

    Args:
        num_particles: K >= 1 particles per group; ``num_groups * num_particles`` are drawn.
        gradient: ``"pathwise"`` or ``"dreg"``.
        num_groups: M >= 1.

    A parameter that model and guide share gets both gradients, each through its own program.

    Source: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> from ppvae import elbo
        >>> elbo.PIWELBO(num_particles=8, num_groups=8).num_draws
        64
    """

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "dreg")

    def bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        leaves = Leaves()
        weights = weigh(model, guide, args, kwargs, self.num_draws, leaves=leaves)
        self.require_reparameterised(weights)
        log_w = self.effective(weights, state)
        value, c = coefficient(self.bound, log_w)
        if not torch.is_grad_enabled():
            return weights.scale * value
        gradient = (c * self.effective(weights.stop_guide(), state)).sum()
        for_guide = MIWELBO(self.num_particles, self.gradient, self.num_groups)
        _, slope = coefficient(for_guide.bound, log_w)
        c = slope
        if self.gradient == "dreg":
            c = for_guide.dreg_coefficient(log_w.detach())
        else:
            gradient = gradient - (c * drawn_log_q(weights)).sum()  # the guide's own score
        gradient = gradient + through_draws(c, log_w, leaves, hidden=slope)
        return weights.scale * with_gradient(value, gradient)


@dataclass(frozen=True, eq=False)
class RenyiELBO(Estimator):
    r"""The variational Rényi bound of order alpha, per datapoint.

    .. math:: \mathcal L_\alpha(x) = \frac{1}{1-\alpha}
              \log \frac 1K \sum_{k=1}^K w_k^{1-\alpha}

    alpha = 0 is :class:`IWELBO`; alpha -> 1 is the ELBO (use :class:`ELBO`, it raises here);
    alpha = -inf is VR-max, the largest log-weight. For alpha >= 0 its expectation is a lower bound
    on log p(x) at every K; for alpha < 0 only small K keep it below, so it is no bound: it is then
    what trains, while :meth:`evaluate` and ``fit``'s ``valid_bound`` report IWELBO at the same K.

    Args:
        num_particles: K >= 1.
        gradient: ``"pathwise"``, ``"dreg"``, ``"score"`` or ``"vimco"``, see
            :mod:`ppvae.elbo.gradients`; VR-max has no ``"dreg"``.
        alpha: the order, any number but 1.

    Raises:
        TypeError: alpha is no number: a schedule of it is not defined.
        ValueError: alpha is 1; K < 1; a ``poutine.scale`` on a site.

    Source: Li & Turner, Rényi Divergence Variational Inference, 2016.

    Example:
        >>> from ppvae import elbo
        >>> log_w = torch.tensor([[-3.0], [-1.0]])
        >>> elbo.RenyiELBO(num_particles=2, alpha=-math.inf).bound(log_w)
        tensor([-1.])
        >>> zero = elbo.RenyiELBO(num_particles=2, alpha=0.0).bound(log_w)
        >>> torch.equal(zero, elbo.IWELBO(num_particles=2).bound(log_w))
        True
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "alpha")
        if self.alpha == 1 or math.isnan(self.alpha) or self.alpha == math.inf:
            raise ValueError(
                f"RenyiELBO needs a finite alpha other than 1 (or -inf for VR-max), got "
                f"{self.alpha}; the limit alpha -> 1 is elbo.ELBO"
            )
        if self.alpha == -math.inf and self.gradient == "dreg":
            raise ValueError(
                'VR-max (alpha=-inf) has weights that jump, so gradient="dreg" is not defined; use '
                '"pathwise"'
            )

    def bound(self, log_w: Tensor) -> Tensor:
        if self.alpha == -math.inf:
            return log_w.amax(0)
        return log_power_mean(log_w, 1 - self.alpha)

    def bound_of_others(self, log_w: Tensor, put: Tensor | None = None) -> Tensor:
        if self.alpha > -math.inf:
            return log_mean_of_others(log_w, put, order=1 - self.alpha)
        first, second = log_w.topk(2, 0)[0]
        largest = torch.where(log_w == first, second, first)
        return largest if put is None else torch.maximum(largest, put)

    def evaluate(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The bound of each datapoint, ``(N,)``; for alpha < 0, which is none, that of IWELBO."""
        if self.alpha < 0:
            return IWELBO(self.num_particles).evaluate(model, guide, *args, **kwargs)
        return super().evaluate(model, guide, *args, **kwargs)

    def dreg_coefficient(self, log_w: Tensor) -> Tensor:
        weights = normalised(centred_powers(log_w, 1 - self.alpha)[1])
        return self.alpha * weights + (1 - self.alpha) * weights.square()


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    """log of the mean of exp, over the particles."""
    return torch.logsumexp(_counting(log_w, dim), dim) - math.log(log_w.shape[dim])


def log_power_mean(log_w: Tensor, order: float) -> Tensor:
    r"""log of the power mean of the weights, over the particles.

    .. math:: \frac 1r \log \frac 1K \sum_k w_k^r
              = m + \frac 1r \log\Big(1 + \frac 1K \sum_k \big(e^{r (\log w_k - m)} - 1\big)\Big)

    The left side divides the rounding of a logarithm by r, so for a small r the right side is
    taken, by ``expm1`` and ``log1p``. Its sum cancels where it is close to -1; there the left side
    is as good.

    Args:
        log_w: ``(K, ...)``.
        order: r, not 0, where it would be the mean of ``log_w``.
    """
    if order == 1:
        return log_mean_exp(log_w)
    m, logs = centred_powers(log_w, order)
    mean = torch.logsumexp(logs, 0) - math.log(len(logs))
    if abs(order) < 0.5:
        shares = torch.expm1(logs).mean(0)
        mean = torch.where(shares > -0.9, torch.log1p(shares), mean)
    return m + mean / order


def log_mean_of_others(
    log_w: Tensor, put: Tensor | None = None, order: float = 1.0, dim: int = 0
) -> Tensor:
    """:func:`log_power_mean` of the other particles, for each, in O(K) time and memory.

    Sums from either end are joined. Nothing is taken off a sum, so it is exact also for the one
    particle that has nearly all the weight.

    Args:
        log_w: ``(..., K, ...)``, float64.
        put: of the same shape, in the place of the one left out; None: K - 1 are left.
        order: r, not 0.
        dim: of the particles.
    """
    powers = order * log_w
    none = torch.full_like(powers.narrow(dim, 0, 1), -math.inf)
    inner = powers.narrow(dim, 0, powers.shape[dim] - 1)
    before = torch.cat([none, inner.logcumsumexp(dim)], dim)
    outer = powers.narrow(dim, 1, powers.shape[dim] - 1).flip(dim)
    after = torch.cat([none, outer.logcumsumexp(dim)], dim).flip(dim)
    total, count = torch.logaddexp(before, after), powers.shape[dim] - 1
    if put is not None:
        total, count = torch.logaddexp(total, order * put), count + 1
    return (total - math.log(count)) / order


def centred_powers(log_w: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """The largest power's log w, constant, and the log-powers of the weights over that one's."""
    fixed, most = log_w.detach(), torch.finfo(log_w.dtype).max
    m = (fixed.amax(0) if order > 0 else fixed.amin(0)).clamp(-most, most)
    return m, _counting(order * (log_w - m), 0)


def normalised(log_w: Tensor, dim: int = 0) -> Tensor:
    """exp, divided by its sum over the particles."""
    return torch.softmax(_counting(log_w, dim), dim)


def _counting(log_w: Tensor, dim: int) -> Tensor:
    """Log-weights, but -inf where a weight is below e^-43 (2e-19) of the largest.

    It would change no digit of the sum. Its gradient would be denormal numbers, with which Intel's
    processors multiply many times slower: with 50 particles a step took two to three times as long.
    The square of what is left is none either, in float32.
    """
    negligible = log_w.detach() < log_w.detach().amax(dim, keepdim=True) - 43
    return log_w.masked_fill(negligible, -math.inf)


def require_number(estimator: Estimator, name: str) -> None:
    """Raise ``TypeError`` unless an argument of an estimator is a number, or a tuple of them."""
    value = getattr(estimator, name)
    parts = [real(name, part) for part in (value if isinstance(value, tuple) else (value,))]
    object.__setattr__(estimator, name, tuple(parts) if isinstance(value, tuple) else parts[0])
    if not all(isinstance(part, Real) for part in parts):
        raise TypeError(
            f"{type(estimator).__name__}: {name} must be a number, got {value!r}; only "
            "elbo.ELBO(beta=...) takes what changes with the step. Make an estimator for each value"
        )


def grouped(log_w: Tensor, num_groups: int) -> Tensor:
    """``(M K, N)`` to ``(M, K, N)``."""
    return log_w.unflatten(0, (num_groups, -1))
