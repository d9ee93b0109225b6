"""Weights that change while training: callables of the optimisation step."""

from __future__ import annotations

from dataclasses import dataclass

from ppvae.arguments import set_numbers


@dataclass(frozen=True)
class LinearWarmup:
    r"""A weight that rises linearly, then stays.

    .. math:: \beta_t = \beta_0 + (\beta_1 - \beta_0) \min(t / T, 1)

    Args:
        steps: T >= 1, optimisation steps until ``end`` is reached. ``ppvae.fit`` starts its early
            stopping only after them.
        start: the weight at step 0.
        end: the weight from step ``steps`` on.

    Source: Sønderby et al., Ladder Variational Autoencoders, 2016 (deterministic warm-up).

    Example:
        >>> from ppvae import elbo
        >>> warmup = elbo.LinearWarmup(steps=100)
        >>> warmup(0), warmup(50), warmup(1000)
        (0.0, 0.5, 1.0)
    """

    steps: int
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        set_numbers(self, steps=int)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}; use a number instead")

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)


@dataclass(frozen=True)
class CyclicalWarmup:
    r"""Several warm-ups in a row, each followed by a plateau; after the last the weight stays.

    .. math:: \beta_t = \beta_0 + (\beta_1 - \beta_0)
              \min\left(\frac{t \bmod T}{r T}, 1\right) \quad (t < M T)

    Args:
        period: T >= 1, steps of one cycle.
        cycles: M >= 1, how many.
        rising: r in (0, 1], the share of a cycle that rises.
        start: the weight at the start of each cycle.
        end: the weight on the plateaus and after the last cycle.

    Source: Fu et al., Cyclical Annealing Schedule, 2019.

    Example:
        >>> from ppvae import elbo
        >>> cycles = elbo.CyclicalWarmup(period=100, cycles=2)
        >>> [cycles(t) for t in (0, 25, 50, 99, 100, 125, 500)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0]
    """

    period: int
    cycles: int = 4
    rising: float = 0.5
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        set_numbers(self, period=int, cycles=int, rising=float)
        if self.period < 1 or self.cycles < 1 or not 0 < self.rising <= 1:
            raise ValueError(
                "CyclicalWarmup needs period >= 1, cycles >= 1 and rising in (0, 1], got "
                f"{self.period}, {self.cycles}, {self.rising}"
            )

    @property
    def steps(self) -> int:
        """Steps after which the weight stays."""
        return self.period * self.cycles

    def __call__(self, step: int) -> float:
        if step >= self.steps:
            return self.end
        share = (step % self.period) / (self.rising * self.period)
        return self.start + (self.end - self.start) * min(share, 1.0)
