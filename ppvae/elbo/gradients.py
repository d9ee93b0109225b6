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
    (for IWELBO :math:`\tilde w_k^2`). Unbiased. Tucker et al. 2018.
``"score"``
    Beside the gradient of B at fixed draws, sites without a reparameterised sampler get the
    score-function term :math:`\sum_k (B - B_{-k}) \nabla_\phi \log q(z_k)`, with the bound of
    the other K - 1 particles as baseline (none for K = 1); the others stay pathwise. Unbiased.
``"vimco"``
    As ``"score"``; in the baseline particle k is replaced by the geometric mean of the others'
    weights. Needs K >= 2. Unbiased. Mnih & Rezende 2016.

The model's parameters always receive the gradient of B itself. Latents that are summed out
(``infer={"enumerate": "parallel"}``) need no estimator; ``"stl"`` refuses them in the guide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppvae.weights import LogWeights, log_weights_along_paths, log_weights_at_leaves

if TYPE_CHECKING:
    from ppvae.elbo.estimator import Estimator, State


def surrogate(
    estimator: Estimator, model: Any, guide: Any, args: tuple, kwargs: dict, state: State
) -> Tensor:
    """The bound summed over the data set, with the estimator's gradient; a scalar."""
    draws = estimator.num_draws
    if estimator.gradient in ("stl", "dreg") and torch.is_grad_enabled():
        weights, pairs = log_weights_at_leaves(model, guide, *args, num_particles=draws, **kwargs)
        value = _along_path(estimator, weights, pairs, state)
    else:
        weights = log_weights_along_paths(model, guide, *args, num_particles=draws, **kwargs)
        log_w = estimator.effective(weights, state)
        value = estimator.bound(log_w).sum()
        if estimator.gradient in ("score", "vimco"):
            value = _with_gradient(value, value + _score(estimator, weights, log_w))
        else:
            require_reparameterised(estimator, weights)
    return value if weights.scale == 1 else weights.scale * value


def _along_path(
    estimator: Estimator, weights: LogWeights, pairs: list[tuple[Tensor, Tensor]], state: State
) -> Tensor:
    require_reparameterised(estimator, weights)
    if estimator.gradient == "stl" and weights.enumerated.keys() & weights.log_q.keys():
        raise ValueError(
            'gradient="stl" drops the gradient of log q, which an enumerated latent in the guide '
            'needs; use gradient="pathwise"'
        )
    log_w = estimator.effective(weights, state)
    value, c = coefficient(estimator.bound, log_w)
    for_model = (c * estimator.effective(weights.stop_guide(), state)).sum()
    if estimator.gradient == "dreg":
        c = estimator.dreg_coefficient(log_w.detach())
    return _with_gradient(value, for_model + through_draws(c, log_w, pairs))


def coefficient(bound: Any, log_w: Tensor) -> tuple[Tensor, Tensor]:
    """A bound's value summed over the batch, and its slope c in each log-weight, both detached."""
    with torch.enable_grad():
        at = log_w.detach().requires_grad_()
        value = bound(at).sum()
        (c,) = torch.autograd.grad(value, at)
    return value.detach(), c


def through_draws(c: Tensor, log_w: Tensor, pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """A scalar with the gradient of sum c log w along the guide's sample path only.

    The slope in each leaf z' goes through its draw z to the guide's parameters, and, last draw
    first, through z to the leaves drawn before it.
    """
    if not pairs:  # nothing in the guide is trained
        return c.new_zeros(())
    leaves = [leaf for _, leaf in pairs]
    slopes = list(torch.autograd.grad((c * log_w).sum(), leaves, retain_graph=True))
    for j in reversed(range(1, len(pairs))):
        z, _ = pairs[j]
        upstream = torch.autograd.grad(
            z, leaves[:j], slopes[j], retain_graph=True, allow_unused=True
        )
        for i, slope in enumerate(upstream):
            slopes[i] = slopes[i] if slope is None else slopes[i] + slope
    total = sum((slope * z).sum() for slope, (z, _) in zip(slopes, pairs, strict=True))
    assert isinstance(total, Tensor)
    return total


def _score(estimator: Estimator, weights: LogWeights, log_w: Tensor) -> Tensor | float:
    sites = weights.guide_trace.nodes
    scored = [
        term
        for name, term in weights.log_q.items()
        if name not in weights.enumerated and not sites[name]["fn"].has_rsample
    ]
    if not scored:
        return 0.0
    if any(term.dim() > 2 for term in scored):
        raise ValueError(
            "a guide's site that is drawn by the score function depends on an enumerated one; "
            "enumerate both, or draw both"
        )
    log_w = log_w.detach()
    advantage = estimator.bound(log_w) - _baseline(estimator, log_w)
    return (advantage * sum(scored)).sum()


def _baseline(estimator: Estimator, log_w: Tensor) -> Tensor:
    """The bound without particle k, ``(K, N)``: it does not depend on z_k, so it adds no bias."""
    K = log_w.shape[0]
    if K == 1:
        return torch.zeros_like(log_w)
    others = ~torch.eye(K, dtype=torch.bool, device=log_w.device)
    rows = log_w.expand(K, K, -1)  # row k: all particles, as seen by particle k
    if estimator.gradient == "vimco":
        means = (log_w.sum(0) - log_w) / (K - 1)
        left = torch.where(others.unsqueeze(-1), rows, means.unsqueeze(1))
    else:
        left = rows[others].reshape(K, K - 1, -1)
    return torch.stack([estimator.bound(row) for row in left.unbind()])


def _with_gradient(value: Tensor, surrogate: Tensor) -> Tensor:
    """The first argument's value with the second's gradient."""
    return value.detach() + (surrogate - surrogate.detach())


def require_reparameterised(estimator: Estimator, weights: LogWeights) -> None:
    """Raise ``ValueError`` for a drawn site whose draws carry no gradient."""
    if not torch.is_grad_enabled():
        return
    for name in weights.log_q.keys() - weights.enumerated.keys():
        fn = weights.guide_trace.nodes[name]["fn"]
        if not fn.has_rsample:
            raise ValueError(
                f"{type(estimator).__name__}(gradient={estimator.gradient!r}) cannot "
                f"differentiate through site {name!r}: {type(fn).__name__} has no reparameterised "
                f"sampler, and its parameters would get no gradient. Use {_without_path(estimator)}"
                ', or sum the site out with infer={"enumerate": "parallel"}'
            )


def _without_path(estimator: Estimator) -> str:
    """The gradients of this estimator, or else of another one, that need no reparameterisation."""
    possible = [
        g for g in ("covariance", "reweighted", "score", "vimco") if g in estimator.gradients
    ]
    if not possible:
        return 'another bound, such as elbo.IWELBO(num_particles=8, gradient="vimco")'
    cure = "gradient=" + " or ".join(f'"{gradient}"' for gradient in possible)
    return cure + " (with num_particles >= 2)" if possible[-1] == "vimco" else cure
