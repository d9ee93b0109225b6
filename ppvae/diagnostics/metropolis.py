"""Random-walk Metropolis: the simplest reference, to teach and to compare with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.chains import Point, PosteriorDraws, Settings, Transition, sample
from ppvae.diagnostics.joint import Joint, traced
from ppvae.diagnostics.rows import bound
from ppvae.intake import takes_rows


@takes_numbers
@takes_rows
def metropolis(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_chains: int = 4,
    num_warmup: int = 1_000,
    num_draws: int = 500,
    thin: int = 10,
    step_size: float | None = None,
    start: Literal["guide", "prior"] = "guide",
    max_rows: int = 2_000,
    max_reruns: int = 0,
    seed: int | None = None,
    **kwargs: Any,
) -> PosteriorDraws:
    r"""Draw from p(z | x) of every datapoint by a random walk.

    .. math:: u' = u + \epsilon_n\, s_n \odot \eta,\quad \eta \sim N(0, I),\qquad
              \text{accepted with probability } \min\left(1, \frac{p(x_n, u')}{p(x_n, u)}\right)

    It needs no gradient, and mixes in a time that grows with the number of latents: use it for a
    handful of them, or to see why :func:`~ppvae.diagnostics.hmc` is used. The step size is brought
    to an acceptance of 0.3 during the warm-up; the gates are those of HMC.

    Args:
        model, guide, args: as in :func:`~ppvae.diagnostics.hmc`.
        num_chains, num_warmup, num_draws, step_size, start: as there.
        thin: transitions per draw that is kept.
        max_rows, max_reruns, seed: as there.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`~ppvae.diagnostics.PosteriorDraws`.

    Raises:
        ValueError, PairError: as :func:`~ppvae.diagnostics.hmc`.

    Source: Metropolis et al., 1953; the acceptance: Roberts, Gelman & Gilks, 1997.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(0., 1.))
        >>> draws = diagnostics.metropolis(model, guide, torch.tensor([0., 2.]), seed=0)
        >>> bool(((draws.mean("z") - torch.tensor([0., 1.])).abs() < 0.15).all())
        True
    """
    model, guide = bound(model, guide, kwargs)
    settings = Settings(num_chains, num_warmup, num_draws, thin, 0.3, step_size, start)

    def transition(joint: Joint, u: Tensor) -> Transition:
        density = traced(lambda u: (joint(u).detach(),), u)

        @torch.no_grad()
        def move(point: Point, step: Tensor, scale: Tensor) -> tuple[Point, Tensor, Tensor]:
            u = point.u + step.unsqueeze(-1) * scale * torch.randn_like(point.u)
            (value,) = density(u)
            change = value - point.value
            impossible = change.isnan()
            probability = torch.where(impossible, 0.0, change.clamp(max=0.0).exp())
            accepted = torch.rand_like(probability) < probability
            u = torch.where(accepted.unsqueeze(-1), u, point.u)
            value = torch.where(accepted, value, point.value)
            return Point(u, value, point.gradient), probability, impossible

        return move

    joint = Joint(model, guide, *args)
    return sample(joint, transition, settings, "Metropolis", max_rows, max_reruns, seed)
