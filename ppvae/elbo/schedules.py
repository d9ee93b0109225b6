"""Weights that change while training: callables of the optimisation step."""

from __future__ import annotations

from dataclasses import dataclass


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
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}; use a number instead")

    def __call__(self, step: int) -> float:
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)
