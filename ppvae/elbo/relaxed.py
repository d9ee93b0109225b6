"""RELAX: score functions of binary latents with a control variate that is learned."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pyro
import torch
from torch import Tensor
from torch.distributions import Bernoulli

from ppvae.elbo.discrete import Bits, logistic, require_apart
from ppvae.elbo.gradients import Given, scored_log_q, with_gradient
from ppvae.elbo.standard import ELBO
from ppvae.elbo.state import State
from ppvae.pairs import Site
from ppvae.terms import Term, laid_out
from ppvae.weights import LogWeights, weigh


@dataclass(frozen=True, eq=False)
class RELAX(ELBO):
    r"""The ELBO, binary latents by the score function less a control variate with known mean.

    .. math:: \big(f(b) - c(\tilde z)\big) \nabla_\phi \log q(b)
              + \nabla_\phi c(z) - \nabla_\phi c(\tilde z),\qquad
              c(z) = \eta f\big(\sigma(z / \tau)\big)

    with f the log-weight, z the logits plus logistic noise, b = 1[z > 0], and :math:`\tilde z` a
    second draw of z given b. It is unbiased whatever c is. Here c is the pair itself at relaxed
    latents, as in REBAR; eta and tau are learned: after each training loss they descend the
    squared gradient of the logits, whose mean is the variance and a constant. They are saved with
    the objective's state.

    A loss takes three decoder rows for each draw. All latents that are drawn are Bernoulli, and
    each depends on x alone; the model takes values between 0 and 1 in their place. Latents with a
    sample path and no Bernoulli beside them get the pathwise gradient.

    Args:
        num_particles, beta: as in :class:`~ppvae.elbo.ELBO`.
        gradient: ``"relax"``.
        speed: of the learning of eta and log tau, >= 0; 0: they stay 1 and 1/2 (REBAR).

    Raises:
        ValueError: bad arguments; a drawn latent that is no Bernoulli beside one that is.

    Source: Grathwohl, Choi, Wu, Roeder & Duvenaud, Backpropagation through the Void, 2018; Tucker
    et al., REBAR, 2017.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import elbo
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         h = pyro.sample("h", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(h, 1.), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("h", dist.Bernoulli(logits=x))
        >>> elbo.RELAX(num_particles=4)(model, guide)(torch.zeros(3)).shape
        torch.Size([])
    """

    gradient: str = "relax"
    speed: float = 0.01

    gradients: ClassVar[tuple[str, ...]] = ("relax",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.speed < math.inf:
            raise ValueError(f"RELAX: speed of learning must be a number >= 0, got {self.speed}")

    def new_state(self) -> State:
        state = super().new_state()
        state.register_buffer("control", torch.tensor([1.0, math.log(0.5)]))  # eta, log tau
        state.register_buffer("squares", torch.zeros(2))
        return state

    def advance(self, state: State) -> None:
        super().advance(state)
        slope = state.latest_slope
        if slope is None or not self.speed:
            return
        if state.control.device != slope.device:  # a stock engine moves no state
            state.to(slope.device)
        slope = slope.to(state.control.dtype).nan_to_num(0.0, 0.0, 0.0)
        state.squares.lerp_(slope.square(), 0.05)
        state.control.sub_(self.speed * slope / (state.squares.sqrt() + 1e-12))
        state.control[1].clamp_(-3.0, 3.0)

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        noise, call = Noise(), (model, guide, args, kwargs, self.num_particles)
        weights = weigh(*call, leaves=noise, along_path=True)
        log_w = self.effective(weights, state)
        value = self.bound(log_w).sum()
        state.latest_slope = None
        if not noise.drawn:
            self.require_reparameterised(weights)
        elif torch.is_grad_enabled():
            value = with_gradient(value, value + self._relaxed(call, weights, log_w, noise, state))
        return value if weights.scale == 1 else weights.scale * value

    def _relaxed(
        self, call: tuple, weights: LogWeights, log_w: Tensor, noise: Noise, state: State
    ) -> Tensor:
        """A scalar with the gradient that ``log_w`` at fixed draws lacks."""
        names = weights.q.keys() - weights.enumerated.keys() - noise.drawn.keys()
        if names:
            raise ValueError(
                f"RELAX: latent {min(names)!r} is drawn beside binary ones and is no Bernoulli; "
                'use elbo.ELBO(gradient="score")'
            )
        require_apart(weights, noise.drawn, "RELAX")
        trained = any(part.logits.requires_grad for part in noise.drawn.values())
        learning = state.learning and self.speed > 0 and trained
        control = state.control.detach().to(log_w).requires_grad_(learning)
        drawn = noise.drawn.items()
        _, at = self._control(call, {name: part.z for name, part in drawn}, control, state)
        c, again = self._control(call, {name: part.again for name, part in drawn}, control, state)
        left, log_q = log_w.detach() - c, scored_log_q(weights)
        assert log_q is not None
        total, squared = (left.detach() * log_q).sum(), log_q.new_zeros(())
        for (name, part), one, two in zip(drawn, at, again, strict=True):
            total = total + (one.detach() * part.z - two.detach() * part.again).sum()
            if learning and part.logits.requires_grad:
                site, p = weights.guide_trace.nodes[name], part.logits.detach().sigmoid()
                (moved,) = torch.autograd.grad(part.again.sum(), part.logits, retain_graph=True)
                own = laid_out(Term(left), site, weights.letters)
                own = own.reshape(*own.shape, *(1,) * site["fn"].event_dim)
                squared = squared + (own * (part.hard - p) + one - two * moved).square().sum()
        if learning:
            (slope,) = torch.autograd.grad(squared, control)
            state.latest_slope = slope.detach()
        return total / self.num_particles

    def _control(self, call: tuple, z: dict[str, Tensor], control: Tensor, state: State) -> Any:
        """c at some z, ``(K, N)``, and its slope in each of them."""
        at = {name: value.detach().requires_grad_() for name, value in z.items()}
        soft = {name: (value / control[1].exp()).sigmoid() for name, value in at.items()}
        with pyro.validation_enabled(False):  # Bernoullis take what is between 0 and 1
            weights = weigh(*call, leaves=Given(soft))
        c = control[0] * self.effective(weights, state)
        slopes = torch.autograd.grad(c.sum(), list(at.values()), create_graph=control.requires_grad)
        return c, slopes


class Part(NamedTuple):
    """What a binary site was drawn from, each of its shape."""

    logits: Tensor
    z: Tensor
    again: Tensor  # z, given the draw
    hard: Tensor


class Noise(Bits):
    """Draws binary sites as logits plus noise, above 0 or not, and the noise again given that."""

    gradient = "relax"
    laws = (Bernoulli,)

    def draw(self, site: Site, of: Any) -> Tensor:
        logits = of.logits
        z = logits + logistic(torch.rand_like(logits))
        hard = z.detach() > 0
        p, v = logits.sigmoid(), torch.rand_like(logits)
        again = logits + logistic(torch.where(hard, 1 - p * (1 - v), v * (1 - p)))
        value = hard.to(site["value"].dtype)
        self.drawn[site["name"]] = Part(logits, z, again, value)
        return value
