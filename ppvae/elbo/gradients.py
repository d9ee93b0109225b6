r"""How the gradient of a bound is estimated, once for every bound.

With log-weights :math:`\ell_k = \log p(x, z_k) - \log q_\phi(z_k \mid x)`, a bound
:math:`B(\ell_{1..K})` and :math:`c_k = \partial B / \partial \ell_k` (for IWELBO the normalised
weights):

``"pathwise"``
    Reparameterised: automatic differentiation of B through the draws. Refused if a guide's site
    has no reparameterised sampler. Kingma & Welling 2014.
``"stl"``
    Sticking the landing: :math:`\sum_k c_k\, \partial_z \ell_k\, \partial_\phi z_k`, without the
    guide's own score. Unbiased for ELBO; biased for K > 1 under IWELBO, and refused there.
    Roeder et al. 2017.
``"dreg"``
    Doubly reparameterised: the score is itself reparameterised, which gives
    :math:`\sum_k (c_k - \partial c_k / \partial \ell_k)\, \partial_z \ell_k\, \partial_\phi z_k`
    (for IWELBO :math:`\tilde w_k^2`). Unbiased. Tucker et al. 2018. A draw whose log q is masked
    has no score in :math:`\ell_k`, so its coefficient stays :math:`c_k`.
``"score"``
    Beside the gradient of B at fixed draws, sites without a reparameterised sampler get the
    score-function term :math:`\sum_k (B - B_{-k}) \nabla_\phi \log q(z_k)`, with the bound of
    the other K - 1 particles as baseline (none for K = 1, or if the others all have weight 0); the
    others stay pathwise. Unbiased.
``"vimco"``
    As ``"score"``; in the baseline particle k is replaced by the geometric mean of the others'
    weights. Needs K >= 2. Unbiased. Mnih & Rezende 2016.

``"vargrad"``
    Half the variance of the K log-weights, at fixed draws of every latent, is lowered:
    :math:`\tfrac1{K-1} \sum_k (\ell_k - \bar\ell)\, \nabla_\phi \log q(z_k)`. It is ``"score"``
    of the ELBO without the term :math:`-\tfrac1K \sum_k \nabla_\phi \log q(z_k)`, whose mean is 0,
    so it vanishes at the exact posterior, and needs no reparameterisation. K >= 2. Unbiased.
    Richter et al. 2020.
``"gdreg"``
    As ``"dreg"``, and for the parameters of normal priors of latents, p(z_j | others), too: their
    score at the guide's draws is put through the sampler of the prior,
    :math:`\sum_k \partial_{z_j}\big((c_k - d_k)\, \ell_k + c_k (\log q - \log p_j)\big)\,
    \partial_\theta T_j(\epsilon; \theta)` with d the coefficient of DReG and
    :math:`\epsilon = T_j^{-1}(z_j; \theta)`. Unbiased. Bauer & Mnih 2021.
``"disarm"``, ``"straight_through"``, ``"gumbel"``
    Of discrete latents, see :mod:`ppvae.elbo.discrete`; the last two are **biased**.

A weight may be 0, its logarithm minus infinity: it then adds nothing to a gradient. Where a bound
itself is minus infinity there is none, and :class:`ppvae.SVI` withholds the step.

The model's parameters always receive the gradient of B itself. Latents that are summed out
(``infer={"enumerate": "parallel"}``) need no estimator; ``"stl"`` refuses them in the guide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.enumeration import total
from ppvae.pairs import Leaves, law, shown
from ppvae.weights import LogWeights, log_q_of_draws

Bound = Callable[[Tensor], Tensor]  # log-weights (K, N) to (N,)
Baseline = Callable[[Tensor, Tensor | None], Tensor]  # and what is put for each, to (K, N)


def with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The first argument's value with the second's gradient, whatever the second's value is.

    It may be NaN: a weight of zero has the coefficient 0 and the logarithm minus infinity.
    """
    combined: Tensor = _WithGradient.apply(value.detach(), surrogate)
    return combined


class _WithGradient(torch.autograd.Function):
    @staticmethod
    def forward(value: Tensor, surrogate: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        return None, gradients[0]


def coefficient(bound: Bound, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """A bound's value summed over the batch, and its slope c in each log-weight, both detached."""
    with torch.enable_grad():
        at = log_w.detach().requires_grad_()
        value = bound(at).sum()
        (c,) = torch.autograd.grad(value, at)
    return value.detach(), c


def through_draws(
    c: Tensor,
    log_w: Tensor,
    leaves: Leaves,
    hidden: Tensor | None = None,
    apart: Tensor | None = None,
) -> Tensor:
    """A scalar with the gradient of sum c log w along the guide's sample path only.

    The slope in each leaf z' goes through its draw z to the guide's parameters, and, last draw
    first, through z to the leaves drawn before it.

    Args:
        c: coefficients, ``(K, N)``.
        log_w: a function of the leaves, ``(K, N)``.
        leaves: of the guide's draws.
        hidden: the coefficients for draws whose log q is masked, or is in no log-weight; None:
            those of the others.
        apart: a function of the leaves that is added to sum c log w, 0-d; None: nothing is.
    """
    if not leaves.pairs:  # nothing in the guide is trained
        return c.new_zeros(())
    slopes = _slopes(c, log_w, leaves, apart)
    if hidden is not None and hidden is not c and any(shown is not None for shown in leaves.shown):
        others = _slopes(hidden, log_w, leaves, apart)
        chosen = zip(leaves.shown, slopes, others, strict=True)
        slopes = [one if shown is None else torch.where(shown, one, o) for shown, one, o in chosen]
    total = sum((slope * z).sum() for slope, (z, _) in zip(slopes, leaves.pairs, strict=True))
    assert isinstance(total, Tensor)
    return total


def _slopes(c: Tensor, log_w: Tensor, leaves: Leaves, apart: Tensor | None) -> list[Tensor]:
    """The total derivative of sum c log w in each draw: through the draws after it, too."""
    pairs, cut = leaves.pairs, [leaf for _, leaf in leaves.pairs]
    weighted = (c * log_w).sum() if apart is None else (c * log_w).sum() + apart
    slopes = list(torch.autograd.grad(weighted, cut, retain_graph=True))
    for j in reversed(range(1, len(pairs))):
        z, _ = pairs[j]
        upstream = torch.autograd.grad(z, cut[:j], slopes[j], retain_graph=True, allow_unused=True)
        for i, slope in enumerate(upstream):
            slopes[i] = slopes[i] if slope is None else slopes[i] + slope
    return slopes


def scored_log_q(weights: LogWeights) -> Tensor | None:
    """log q of the draws that have no reparameterised sampler, unmasked, ``(K, N)``, or None.

    Raises:
        ValueError: one of them depends on an enumerated latent.
    """
    sites = weights.guide_trace.nodes
    scored = [
        name
        for name in weights.q
        if name not in weights.enumerated and not sites[name]["fn"].has_rsample
    ]
    return log_q_of_draws(weights, scored) if scored else None


def score(
    bound: Bound, baseline: Baseline, log_w: Tensor, log_q: Tensor | None, vimco: bool
) -> Tensor:
    """A scalar with the score-function gradient, of ``log_q (K, N)``.

    A bound and its baseline differ by the share of one particle: they are taken in float64, of
    which the difference keeps more digits than float32 has.

    Args:
        bound: of log-weights.
        baseline: the bound of the others, :meth:`ppvae.elbo.Estimator.bound_of_others`.
        log_w: ``(K, N)``.
        log_q: of the draws, ``(K, N)``; None: there is nothing to score.
        vimco: whether the mean log-weight of the others stands in the baseline for particle k.
    """
    if log_q is None:
        return log_w.new_zeros(())
    log_w = log_w.detach().double()
    of_others = torch.zeros_like(log_w)
    if len(log_w) > 1:
        of_others = baseline(log_w, mean_of_others(log_w) if vimco else None)
    # Minus infinity tells nothing; 0 is a function of the others, too, so it adds no bias.
    of_others = of_others.masked_fill(of_others == -math.inf, 0.0)
    return ((bound(log_w) - of_others).to(log_q.dtype) * log_q).sum()


def mean_of_others(log_w: Tensor, put: Tensor | None = None) -> Tensor:
    """The mean log-weight of the other particles, ``(K, N)``, or with ``put`` for the one left out.

    It is 0 where there are none.
    """
    K, zero = len(log_w), log_w == -math.inf
    logs = log_w.masked_fill(zero, 0.0)
    total = (logs.sum(0) - logs).masked_fill((zero.sum(0) - zero.long()) > 0, -math.inf)
    return total / max(K - 1, 1) if put is None else (total + put) / K


def log_variance(weights: LogWeights, log_w: Tensor) -> Tensor:
    """A scalar with minus the gradient of half the variance of ``log_w (K, N)`` at fixed draws."""
    names = weights.q.keys() - weights.enumerated.keys()
    centred = (log_w - log_w.mean(0)).detach() / (len(log_w) - 1)
    return (centred * log_q_of_draws(weights, names)).sum()


def through_priors(
    c: Tensor, d: Tensor, log_w: Tensor, weights: LogWeights, leaves: Leaves, for_model: Tensor
) -> Tensor:
    """``for_model`` with the parameters of normal priors differentiated through their samplers.

    Args:
        c, d: the slope of the bound in each log-weight, and the coefficient of DReG, ``(K, N)``.
        log_w: a function of the leaves, ``(K, N)``.
        weights: of the pair; the values of its sites are the leaves.
        leaves: of the guide's draws.
        for_model: a scalar with the gradient of sum c log p in the model's parameters.
    """
    cut = {id(leaf) for _, leaf in leaves.pairs}
    sites = weights.model_trace.nodes
    for name in weights.q.keys() - weights.enumerated.keys():
        site = sites.get(name)
        if site is None or id(site["value"]) not in cut or shown(site, site["value"]) is not None:
            continue
        prior = law(site["fn"])
        if not isinstance(prior, torch.distributions.Normal):
            continue
        loc, scale = prior.loc, prior.scale
        if not (loc.requires_grad or scale.requires_grad):
            continue
        z, own = site["value"], (c * weights.log_p[name]).sum()
        inside = ((c - d) * log_w).sum() + (c * total(weights.q.values())).sum() - own
        (slope,) = torch.autograd.grad(inside, z, retain_graph=True)
        noise = ((z - loc) / scale).detach()
        for_model = for_model - own + (slope * (loc + scale * noise)).sum()
    return for_model


def without_path(gradients: Sequence[str]) -> str:
    """Those of an estimator's gradients that need no reparameterisation, as a cure."""
    possible = [g for g in ("covariance", "reweighted", "score", "vimco") if g in gradients]
    if not possible:
        return 'another bound, such as elbo.IWELBO(num_particles=8, gradient="vimco")'
    cure = "gradient=" + " or ".join(f'"{gradient}"' for gradient in possible)
    return cure + " (with num_particles >= 2)" if possible[-1] == "vimco" else cure


class Given(Leaves):
    """Puts values in the place of the draws of some sites."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and msg["name"] in self.values:
            msg["value"] = self.values[msg["name"]]
