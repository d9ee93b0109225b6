"""Annealed importance bounds that are differentiated through."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, ClassVar

import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from ppvae.elbo.estimator import Estimator
from ppvae.elbo.gradients import Given
from ppvae.elbo.importance import log_mean_exp, require_number
from ppvae.elbo.state import State
from ppvae.enumeration import total
from ppvae.pairs import Site, kind
from ppvae.terms import Term, term
from ppvae.weights import LogWeights, drawn_log_q, weigh, whole_weights

_JUMPS = (  # operations whose slope jumps, as autograd calls them
    *("ReluBackward", "LeakyReluBackward", "PreluKernelBackward", "RreluWithNoiseBackward"),
    *("ThresholdBackward", "HardtanhBackward", "HardswishBackward", "HardsigmoidBackward"),
    *("MaxPool", "HardshrinkBackward", "SoftshrinkBackward"),
)


@dataclass(frozen=True, eq=False)
class AnnealedELBO(Estimator):
    r"""The importance-weighted bound of K draws that are moved towards the posterior in T steps.

    From :math:`z_0 \sim q` and momenta :math:`v \sim \mathcal N(0, I)`, step t is one leapfrog step
    on :math:`\log \pi_t = (1 - \tfrac tT) \log q(z \mid x) + \tfrac tT \log p(x, z)`, after which
    the momentum is partly drawn anew. No step is rejected, so everything has a gradient:

    .. math:: \log w = \log p(x, z_T) - \log q(z_0 \mid x)
              + \sum_{t=1}^T \log \frac{\mathcal N(v_t)}{\mathcal N(v_{t-1})}, \qquad
              \mathcal L(x) = \mathbb E\left[\log \frac1K \sum_k w_k\right] \le \log p(x)

    with :math:`v_{t-1}` before and :math:`v_t` after the step. It is a bound whatever the step
    size, and :class:`IWELBO` for a step of 0. It rises with T if the step is small enough for
    the posterior's narrowest direction.

    The slope of :math:`\log p(x, z)` in z is differentiated, so it must not jump: a decoder with
    ReLUs has a bound, by ``evaluate``, and the gradient of what is drawn would be none of it.

    It takes T + 2 decoder rows for each draw, T of them with a gradient in z, and as many of the
    encoder, whose slope there is taken too.

    Args:
        num_particles: K >= 1.
        gradient: ``"pathwise"``.
        num_temperatures: T >= 1.
        step: of the leapfrog, >= 0: in standard deviations of the guide where the pair has one
            latent and its distribution has them, otherwise in units of the latents.
        keep: how much of a momentum stays after a step, in [0, 1); 0 draws all of it anew.

    Raises:
        ValueError: bad arguments; a drawn latent whose values are not all real numbers; a guide
            without a density at given latents; a ``poutine.scale`` on a site; in training, a
            piecewise-linear activation or a Laplace density of what is moved.

    Source: Geffner & Domke, MCMC Variational Inference via Uncorrected Hamiltonian Annealing, 2021;
    Zhang, Hsu, Li, Finn & Grosse, Differentiable Annealed Importance Sampling, 2021; Thin et al.,
    Monte Carlo Variational Auto-Encoders, 2021.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> decoder = nets.mlp(2, 8, 4, activation=torch.nn.Softplus)
        >>> model = models.VAE(conditionals.Bernoulli(decoder), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> elbo.AnnealedELBO(num_temperatures=3)(model, guide)(torch.ones(5, 4)).shape
        torch.Size([])
    """

    num_temperatures: int = 4
    step: float = 0.3
    keep: float = 0.9

    gradients: ClassVar[tuple[str, ...]] = ("pathwise",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.num_temperatures, Integral) or not self.num_temperatures >= 1:
            raise ValueError(
                "AnnealedELBO: num_temperatures must be at least 1 and a whole number, got "
                f"{self.num_temperatures!r}"
            )
        require_number(self, "step")
        require_number(self, "keep")
        if not 0 <= self.step < math.inf or not 0 <= self.keep < 1:
            raise ValueError(
                f"AnnealedELBO needs step >= 0 and keep in [0, 1), got {self.step}, {self.keep}"
            )

    def bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    def evaluate(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            weights = whole_weights(model, guide, args, kwargs, self.num_particles)
            return self.bound(self.annealed(weights))

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        weights = weigh(model, guide, args, kwargs, self.num_particles)
        self.effective(weights, state)
        self.require_reparameterised(weights)
        return weights.scale * self.bound(self.annealed(weights)).sum()

    def annealed(self, weights: LogWeights) -> Tensor:
        """The log-weights ``(K, N)`` of draws that begin where those of ``weights`` are."""
        names = [name for name in weights.q if name not in weights.enumerated]
        if not names:
            return weights.log_w
        sites = [weights.guide_trace.nodes[name] for name in names]
        for site in sites:
            _require_real(site)
        scales = [_scale(site) if len(sites) == 1 else 1.0 for site in sites]
        z, log_w = [site["value"] for site in sites], -drawn_log_q(weights)
        v = [torch.randn_like(value) for value in z]
        for t in range(1, self.num_temperatures + 1):
            z = [a + 0.5 * self.step * s * b for a, s, b in zip(z, scales, v, strict=True)]
            slopes = self._slopes(weights, names, z, t)
            kicks = [self.step * s * g for s, g in zip(scales, slopes, strict=True)]
            # log N(v + kick) - log N(v), per row
            change = [-(kick * (b + 0.5 * kick)) for kick, b in zip(kicks, v, strict=True)]
            log_w = log_w + total([_row(weights, n, c) for n, c in zip(names, change, strict=True)])
            v = [b + kick for b, kick in zip(v, kicks, strict=True)]
            z = [a + 0.5 * self.step * s * b for a, s, b in zip(z, scales, v, strict=True)]
            fresh = math.sqrt(1 - self.keep**2)
            v = [self.keep * b + fresh * torch.randn_like(b) for b in v]
        at = _at(weights, dict(zip(names, z, strict=True)))
        return log_w + at.log_w + drawn_log_q(at)

    def _slopes(
        self, weights: LogWeights, names: list[str], z: list[Tensor], t: int
    ) -> tuple[Tensor, ...]:
        """The slope of the annealed log-density of step t in each latent."""
        training = torch.is_grad_enabled()
        with torch.enable_grad():
            z = [value if value.requires_grad else value.detach().requires_grad_() for value in z]
            at = _at(weights, dict(zip(names, z, strict=True)))
            log_pi = drawn_log_q(at) + t / self.num_temperatures * at.log_w
            if training and t == 1 and self.step:
                _require_smooth(log_pi, z, at)
            return torch.autograd.grad(log_pi.sum(), z, create_graph=training)


def _at(weights: LogWeights, values: dict[str, Tensor]) -> LogWeights:
    """The pair weighed at values of the guide's latents."""
    model, guide, args, kwargs = weights.pair
    kwargs = {**kwargs, "joint": weights.joint}
    return weigh(model, guide, args, kwargs, weights.num_particles, leaves=Given(values))


def _require_smooth(log_pi: Tensor, z: Sequence[Tensor], at: LogWeights) -> None:
    """Raise ``ValueError`` if the slope of ``log_pi`` in z jumps: what jumps has no derivative."""
    ends = {get_gradient_edge(value).node for value in z}
    behind: dict[Any, bool] = {}  # of each operation, whether z is
    stack: list[Any] = [log_pi.grad_fn]
    while stack:
        inputs = [node for node, _ in stack[-1].next_functions if node is not None]
        if waiting := [node for node in inputs if node not in behind and node not in ends]:
            stack += waiting
            continue
        behind[stack.pop()] = any(node in ends or behind[node] for node in inputs)
    found = {node.name() for node, moved in behind.items() if moved}
    jumps = [name.split("Backward")[0] for name in sorted(found) if name.startswith(_JUMPS)]
    nodes = (*at.model_trace.nodes.values(), *at.guide_trace.nodes.values())
    jumps += [kind(n["fn"]) for n in nodes if n["type"] == "sample" and kind(n["fn"]) == "Laplace"]
    if jumps:
        raise ValueError(
            f"AnnealedELBO differentiates the slope of log p(x, z) in z, which jumps ({jumps[0]}), "
            "so that its gradient would be wrong; train with smooth activations, as in "
            "nets.mlp(..., activation=nn.Softplus), or with elbo.IWELBO"
        )


def _row(weights: LogWeights, name: str, values: Tensor) -> Term:
    """Values of a latent's shape, summed over its events and inner plates."""
    site = weights.guide_trace.nodes[name]
    n = site["fn"].event_dim
    values = values.flatten(-n).sum(-1) if n else values
    return term(site, weights.leftmost, weights.joint, weights.letters, values)


def _scale(site: Site) -> Tensor | float:
    """The guide's standard deviations, constant; 1 where its distribution has none to tell."""
    try:
        scale: Tensor = site["fn"].variance.detach().sqrt()
    except (NotImplementedError, AttributeError):
        return 1.0
    return torch.where(scale.isfinite(), scale, 1.0)


def _require_real(site: Site) -> None:
    support: Any = site["fn"].support
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support not in (constraints.real, constraints.real_vector):
        raise ValueError(
            f"AnnealedELBO moves latents on the real line, and the values of {site['name']!r} are "
            f"{support}; use elbo.IWELBO, or draw a real number and transform it in the model"
        )
