"""Penalties on the rate KL(q || p) other than a plain weight: what ``ELBO(beta=...)`` may be.

A penalty turns the rates of a batch into weights, so that the objective of each datapoint is
``likelihood_weight * log p(x|z) - sum_j kl_weight_j * KL_j - constant``: its value and its gradient
are those of the penalised objective, and every gradient estimator applies.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ppvae.arguments import number, set_numbers
from ppvae.elbo.state import State


class Tilt(NamedTuple):
    """Weights of the terms of one datapoint's objective, and a constant taken off it."""

    likelihood: Any
    kl: dict[str, Any]
    constant: Any


class Penalty(ABC):
    """From the rates of a batch to the weights of the objective's terms.

    ``per_dimension`` asks for the rate of every dimension of a latent, ``(D, K, N)``, instead of
    its sum, ``(K, N)``.
    """

    per_dimension: bool = False

    @abstractmethod
    def tilt(self, rates: dict[str, Tensor], log_likelihood: Tensor, state: State) -> Tilt:
        """Weights from detached rates by latent and detached log p(x | z), all in nats."""

    def prepare(self, state: State) -> None:  # noqa: B027 - most penalties keep nothing
        """Add what the penalty remembers to a new state."""

    def advance(self, state: State) -> None:  # noqa: B027
        """Change what it remembers, once after each training loss."""


@dataclass(frozen=True)
class FreeBits(Penalty):
    r"""No penalty on the first nats of each group's rate.

    .. math:: \mathbb E_q \log p(x \mid z)
              - \sum_j \max\left(\lambda, \overline{\mathrm{KL}}_j\right)

    with :math:`\overline{\mathrm{KL}}_j` the mean over the minibatch, for each latent site j or
    each of its dimensions.

    The mean is estimated from the draws, so with few of them a rate near lambda is compared
    noisily: prefer ``kl="mixed"``, whose closed form has no such noise.

    Args:
        nats: lambda >= 0, per group.
        per_dimension: a group is a dimension of a latent (which then must be drawn from
            distributions of independent dimensions) instead of a whole latent site.

    Source: Kingma et al., Improved Variational Inference with Inverse Autoregressive Flow, 2016,
    appendix C.8.

    Example:
        >>> from ppvae import elbo
        >>> elbo.ELBO(beta=elbo.FreeBits(0.1, per_dimension=True)).beta
        FreeBits(nats=0.1, per_dimension=True)
    """

    nats: float
    per_dimension: bool = False

    def __post_init__(self) -> None:
        set_numbers(self, nats=float)
        if not self.nats >= 0:
            raise ValueError(f"FreeBits: nats must be >= 0, got {self.nats}")

    def tilt(self, rates: dict[str, Tensor], log_likelihood: Tensor, state: State) -> Tilt:
        weights: dict[str, Any] = {}
        constant: Any = 0.0
        for name, rate in rates.items():
            paid = (rate.mean((-1, -2), keepdim=True) > self.nats).to(rate.dtype)
            weights[name] = paid
            constant = constant + self.nats * (1 - paid).sum()
        return Tilt(1.0, weights, constant)


@dataclass(frozen=True)
class Capacity(Penalty):
    r"""Hold the total rate at a capacity that usually grows while training.

    .. math:: \mathbb E_q \log p(x \mid z) - \gamma \left| \overline{\mathrm{KL}} - C_t \right|

    with the mean of the total KL over the minibatch.

    Args:
        nats: C, a number >= 0 or a callable of the step, e.g. ``LinearWarmup(10_000, 0.0, 25.0)``.
        gamma: the weight, > 0.

    Source: Burgess et al., Understanding disentangling in beta-VAE, 2018.

    Example:
        >>> from ppvae import elbo
        >>> elbo.ELBO(beta=elbo.Capacity(elbo.LinearWarmup(10_000, 0.0, 25.0))).beta.gamma
        1000.0
    """

    nats: float | Callable[[int], float]
    gamma: float = 1000.0

    def __post_init__(self) -> None:
        set_numbers(self, gamma=float)
        if not self.gamma > 0:
            raise ValueError(f"Capacity: gamma must be positive, got {self.gamma}")

    @property
    def steps(self) -> int:
        """Steps after which a scheduled capacity stays."""
        return getattr(self.nats, "steps", 0)

    def tilt(self, rates: dict[str, Tensor], log_likelihood: Tensor, state: State) -> Tilt:
        capacity = state.at_step(self.nats)
        weight = self.gamma * torch.sign(sum(rates.values()).mean() - capacity)  # type: ignore[union-attr]
        return Tilt(1.0, dict.fromkeys(rates, weight), -weight * capacity)


@dataclass(frozen=True)
class Balanced(Penalty):
    r"""A warm-up that keeps all groups of a hierarchy in use: more weight where the KL is large.

    .. math:: \mathbb E_q \log p(x \mid z) - \beta_t \sum_l c_l \mathrm{KL}_l,\qquad
              c_l \propto \frac{\overline{|\mathrm{KL}_l|} + 0.01}{\alpha_l},\quad
              \frac1L \sum_l c_l = 1

    with the mean over the minibatch, and no gradient of c. A group that x says little about has a
    small weight, so the prior does not take it away while the others learn. Once the weight has
    reached 1, every c is exactly 1 and the objective is the ELBO.

    Args:
        schedule: beta, a callable of the step such as ``LinearWarmup(600, 1e-4)``, or a number.
        alpha: by latent, > 0: how large a KL it may have before its weight grows, as
            ``models.TopDown.balance``; None: the same for all.

    Raises:
        ValueError: an alpha that is not positive; when used, if it names other latents than there
            are.

    Source: Vahdat & Kautz, NVAE, 2020, appendix A.

    Example:
        >>> from ppvae import elbo
        >>> balanced = elbo.Balanced(elbo.LinearWarmup(10))
        >>> rates = {"z2": torch.full((1, 5), 2.99), "z1": torch.full((1, 5), 0.99)}
        >>> state = elbo.State()
        >>> for _ in range(5):
        ...     state.count()
        >>> balanced.tilt(rates, torch.zeros(5), state).kl  # 0.5 times 3/2 and 1/2
        {'z2': tensor(0.7500), 'z1': tensor(0.2500)}
    """

    schedule: float | Callable[[int], float]
    alpha: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.alpha, Mapping | None):
            raise TypeError(
                f"Balanced: alpha is a number for each latent by its name, got {self.alpha!r}"
            )
        bad = [
            n for n, value in (self.alpha or {}).items() if not number("alpha", value, float) > 0
        ]
        if bad:
            raise ValueError(f"Balanced: alpha must be positive, and of {bad[0]!r} it is not")

    @property
    def steps(self) -> int:
        """Steps after which a scheduled weight stays."""
        return getattr(self.schedule, "steps", 0)

    def tilt(self, rates: dict[str, Tensor], log_likelihood: Tensor, state: State) -> Tilt:
        if self.alpha is not None and self.alpha.keys() != rates.keys():
            seen = f"alpha is of {sorted(self.alpha)}, and the latents are {sorted(rates)}"
            raise ValueError(f"Balanced: {seen}; give one for each, or none")
        alpha = self.alpha or dict.fromkeys(rates, 1.0)
        sizes = torch.stack([(r.abs().mean() + 0.01) / alpha[name] for name, r in rates.items()])
        beta = torch.as_tensor(state.at_step(self.schedule, "kl_weight")).to(sizes)
        shares = torch.where(beta < 1, sizes / sizes.mean(), 1.0)
        return Tilt(1.0, dict(zip(rates, beta * shares, strict=True)), 0.0)


@dataclass(frozen=True)
class Constraint(Penalty):
    r"""The best reconstruction at a limited rate, or the least rate at a limited distortion.

    ``max_rate`` maximises :math:`\mathbb E_q \log p(x \mid z)` subject to
    :math:`\overline{\mathrm{KL}} \le \epsilon`; ``max_distortion`` minimises the KL subject to
    :math:`-\overline{\mathbb E_q \log p(x \mid z)} \le \delta` (means over the minibatch). The
    multiplier of the Lagrangian

    .. math:: \log p(x \mid z) - \lambda (\mathrm{KL} - \epsilon) \qquad\text{or}\qquad
              -\mathrm{KL} - \lambda (-\log p(x \mid z) - \delta)

    is learned by dual ascent on its logarithm: after each training step it grows by ``speed`` times
    the violation (a moving average, in nats, clipped to one nat). It starts at 1 (the ELBO), is
    saved with the objective's state and shown by ``ppvae.fit`` as ``kl_weight`` (for a distortion
    target, the weight on the KL relative to the likelihood: 1 / lambda).

    Args:
        max_rate: epsilon, nats per datapoint, >= 0; or
        max_distortion: delta, nats per datapoint.
        speed: step of the dual ascent, > 0.
        memory: of the moving average, in [0, 1).

    Source: Rezende & Viola, Taming VAEs, 2018.

    Example:
        >>> from ppvae import elbo
        >>> elbo.ELBO(beta=elbo.Constraint(max_rate=10.0)).new_state().log_multiplier
        tensor(0.)
    """

    max_rate: float | None = None
    max_distortion: float | None = None
    speed: float = 0.01
    memory: float = 0.9

    limit: ClassVar[float] = 10.0  # the multiplier stays within e^-10 and e^10

    def __post_init__(self) -> None:
        if (self.max_rate is None) == (self.max_distortion is None):
            raise ValueError(
                "Constraint needs exactly one of max_rate and max_distortion, got "
                f"{self.max_rate} and {self.max_distortion}"
            )
        set_numbers(self, speed=float, memory=float)
        speed, memory = self.speed, self.memory
        max_rate = number("max_rate", self.max_rate, float, optional=True)
        max_distortion = number("max_distortion", self.max_distortion, float, optional=True)
        object.__setattr__(self, "max_rate", max_rate)
        object.__setattr__(self, "max_distortion", max_distortion)
        if max_rate is not None and not max_rate >= 0:
            raise ValueError(
                f"a KL is never negative, so max_rate must be >= 0, got {self.max_rate}"
            )
        if not speed > 0 or not 0 <= memory < 1:
            raise ValueError(
                f"Constraint needs speed > 0 and memory in [0, 1), got {self.speed}, {self.memory}"
            )

    def prepare(self, state: State) -> None:
        state.register_buffer("log_multiplier", torch.zeros(()))
        state.register_buffer("violation", torch.zeros(()))

    def tilt(self, rates: dict[str, Tensor], log_likelihood: Tensor, state: State) -> Tilt:
        multiplier = state.log_multiplier.exp()  # a new tensor: the buffer changes below
        if self.max_rate is not None:
            violation = sum(rates.values()).mean() - self.max_rate  # type: ignore[union-attr]
            tilt = Tilt(1.0, dict.fromkeys(rates, multiplier), -multiplier * self.max_rate)
            state.shown["kl_weight"] = multiplier
        else:
            assert self.max_distortion is not None
            violation = -log_likelihood.mean() - self.max_distortion
            tilt = Tilt(multiplier, dict.fromkeys(rates, 1.0), -multiplier * self.max_distortion)
            state.shown["kl_weight"] = 1 / multiplier
        state.latest_violation = violation
        return tilt

    def advance(self, state: State) -> None:
        latest = state.latest_violation
        if state.violation.device != latest.device:  # a stock engine moves no state
            state.to(latest.device)
        state.violation.lerp_(latest.to(state.violation.dtype), 1 - self.memory)
        state.log_multiplier.add_(self.speed * state.violation.clamp(-1.0, 1.0))
        state.log_multiplier.clamp_(-self.limit, self.limit)
