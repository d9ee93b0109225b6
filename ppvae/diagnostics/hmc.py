"""Hamiltonian Monte Carlo on the posteriors of many datapoints at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.chains import Point, PosteriorDraws, Settings, Transition, sample
from ppvae.diagnostics.joint import Joint, traced
from ppvae.diagnostics.rows import bound, check_at_least
from ppvae.intake import takes_rows

Gradient = Callable[[Tensor], tuple[Tensor, Tensor]]
JITTER = (0.3, 1.2)  # wide: a narrow one lets the variances mix slowly (periodic trajectories)


@takes_numbers
@takes_rows
def hmc(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_chains: int = 4,
    num_warmup: int = 200,
    num_draws: int = 600,
    num_leapfrog: int = 6,
    target_accept: float = 0.8,
    step_size: float | None = None,
    start: Literal["guide", "prior"] = "guide",
    max_rows: int = 2_000,
    max_reruns: int = 2,
    seed: int | None = None,
    **kwargs: Any,
) -> PosteriorDraws:
    r"""Draw from the exact posterior p(z | x) of every datapoint: a reference for the guide.

    Chains x datapoints move together in one tensor, while step size and diagonal mass matrix are
    each datapoint's own. A transition draws momenta r ~ N(0, I) and a jitter
    :math:`c \sim U(0.3, 1.2)`, takes L leapfrog steps of size :math:`c \epsilon_n` under

    .. math:: H(u, r) = -\log p(x_n, u) + \tfrac12 \|r\|^2

    in coordinates scaled by the posterior's standard deviations, and accepts with probability
    :math:`\min(1, e^{-\Delta H})`. During the warm-up, dual averaging brings the acceptance to
    ``target_accept``, and the scales are estimated from the chains. Then the gates of
    :class:`~ppvae.diagnostics.PosteriorDraws` are applied, and only the datapoints that fail are
    run again, longer and with smaller steps.

    R-hat sees only the modes that chains reach. Chains that start from a guide which misses a mode
    may agree on missing it: compare with ``start="prior"`` if you suspect that.

    Args:
        model, guide: Pyro programs with continuous latents in the plate ``"data"``; discrete ones
            must be marked ``infer={"enumerate": "parallel"}`` and are summed out. The guide only
            says where chains start.
        *args: data, as both are called, ``(N, ...)`` each. The cost is linear in N: pass the
            datapoints you want to look at.
        num_chains: C >= 2 per datapoint.
        num_warmup: transitions before draws are kept.
        num_draws: draws kept per chain.
        num_leapfrog: L, gradients per transition.
        target_accept: mean acceptance aimed at, in (0, 1).
        step_size: a fixed step size for all datapoints, relative to the scales; None adapts it.
        start: where chains begin: draws of the guide, or of the prior.
        max_rows: largest C x N run together, which bounds the memory.
        max_reruns: how often datapoints that fail are run again.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`~ppvae.diagnostics.PosteriorDraws`.

    Raises:
        ValueError: a discrete latent, a latent outside the data plate, a log-joint that is NaN or
            infinite where chains start, settings that cannot work; it says which, and what to do.
        PairError: empty, NaN or infinite data.

    Source: Neal, MCMC using Hamiltonian dynamics, 2011; step sizes: Hoffman & Gelman, 2014; gates:
    Vehtari, Gelman, Simpson, Carpenter & Bürkner, 2021.

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
        >>> draws = diagnostics.hmc(model, guide, torch.tensor([0., 2.]), seed=0)
        >>> draws.draws["z"].shape, bool(draws.converged.all())
        (torch.Size([4, 600, 2]), True)
        >>> bool(((draws.mean("z") - torch.tensor([0., 1.])).abs() < 0.1).all())
        True
    """
    model, guide = bound(model, guide, kwargs)
    check_at_least(1, num_leapfrog=num_leapfrog)
    settings = Settings(num_chains, num_warmup, num_draws, 1, target_accept, step_size, start)

    def transition(joint: Joint, u: Tensor) -> Transition:
        density = traced(joint.value_and_grad, u)

        def move(point: Point, step: Tensor, scale: Tensor) -> tuple[Point, Tensor, Tensor]:
            return leapfrog(density, point, step, scale, num_leapfrog)

        return move

    joint = Joint(model, guide, *args)
    return sample(joint, transition, settings, "HMC", max_rows, max_reruns, seed)


def leapfrog(
    density: Gradient, start: Point, step: Tensor, scale: Tensor, num_steps: int
) -> tuple[Point, Tensor, Tensor]:
    """One HMC transition of chains x datapoints.

    Args:
        density: from u to log-density and gradient.
        start: where chains are.
        step: step sizes before jitter, ``(N,)``.
        scale: scales of the coordinates ``(N, D)``.
        num_steps: leapfrog steps.

    Returns:
        Where chains are then, acceptance probabilities ``(C, N)``, and which diverged ``(C, N)``.
    """
    low, high = JITTER
    jitter = low + (high - low) * torch.rand_like(start.value)
    step = (step * jitter).unsqueeze(-1)  # (C, N, 1)
    move = step * scale
    momentum = torch.randn_like(start.u)
    energy = start.value - 0.5 * momentum.square().sum(-1)

    u, gradient = start.u, start.gradient
    value = start.value
    momentum = momentum + 0.5 * move * gradient
    for i in range(num_steps):
        u = u + move * momentum
        value, gradient = density(u)
        momentum = momentum + (1.0 if i + 1 < num_steps else 0.5) * move * gradient
    change = value - 0.5 * momentum.square().sum(-1) - energy
    diverged = ~(change > -1_000.0)  # NaN too
    probability = torch.where(diverged, 0.0, change.clamp(max=0.0).exp())
    accepted = (torch.rand_like(probability) < probability).unsqueeze(-1)
    point = Point(
        torch.where(accepted, u, start.u),
        torch.where(accepted.squeeze(-1), value, start.value),
        torch.where(accepted, gradient, start.gradient),
    )
    return point, probability, diverged
