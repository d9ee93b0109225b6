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
    Sites without a reparameterised sampler get a score-function term
    :math:`\sum_k (B - B_{-k}) \nabla_\phi \log q(z_k)`, with the bound of the other K - 1
    particles as baseline (none for K = 1); the others stay pathwise. Unbiased.
``"vimco"``
    As ``"score"``; in the baseline particle k is replaced by the geometric mean of the others'
    weights. Needs K >= 2. Unbiased. Mnih & Rezende 2016.

The model's parameters always receive the gradient of B itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppvae.weights import LogWeights, log_weights, log_weights_at_leaves

if TYPE_CHECKING:
    from ppvae.elbo.estimator import Estimator


def surrogate(
    estimator: Estimator, model: Any, guide: Any, args: tuple, kwargs: dict, step: int
) -> tuple[Tensor, float]:
    """The bound summed over the batch, with the estimator's gradient, and the data scale."""
    K = estimator.num_particles
    along_path = estimator.gradient in ("stl", "dreg") and torch.is_grad_enabled()
    if along_path:
        weights, draws = log_weights_at_leaves(model, guide, *args, num_particles=K, **kwargs)
        return _path(estimator, weights, draws, step), weights.scale
    weights = log_weights(model, guide, *args, num_particles=K, **kwargs)
    if estimator.gradient in ("score", "vimco"):
        return _score(estimator, weights, step), weights.scale
    _require_reparameterised(estimator, weights)
    return estimator.bound(estimator.effective(weights, step)).sum(), weights.scale


def _path(
    estimator: Estimator, weights: LogWeights, draws: list[tuple[Tensor, Tensor]], step: int
) -> Tensor:
    _require_reparameterised(estimator, weights)
    log_w = estimator.effective(weights, step)
    with torch.enable_grad():
        at = log_w.detach().requires_grad_()
        value = estimator.bound(at)
        (c,) = torch.autograd.grad(value.sum(), at)
    coefficient = c if estimator.gradient == "stl" else estimator.dreg_coefficient(log_w.detach())
    for_model = (c * estimator.effective(weights.stop_guide(), step)).sum()
    if not draws:  # nothing in the guide is trained
        return _with_gradient(value.detach().sum(), for_model)
    z, leaves = zip(*draws, strict=True)
    slopes = torch.autograd.grad((coefficient * log_w).sum(), leaves, retain_graph=True)
    for_guide = sum((g * draw).sum() for g, draw in zip(slopes, z, strict=True))
    return _with_gradient(value.detach().sum(), for_model + for_guide)


def _score(estimator: Estimator, weights: LogWeights, step: int) -> Tensor:
    log_w = estimator.effective(weights, step)
    bound = estimator.bound(log_w)
    scored = [
        weights.log_q[name]
        for name in weights.log_q
        if not weights.guide_trace.nodes[name]["fn"].has_rsample
    ]
    if not scored:
        return bound.sum()
    advantage = bound.detach() - _baseline(estimator, log_w.detach())
    return _with_gradient(bound.sum(), (advantage * sum(scored)).sum())


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
    """A scalar with the first argument's value, and both arguments' gradients."""
    return value + (surrogate - surrogate.detach())


def _require_reparameterised(estimator: Estimator, weights: LogWeights) -> None:
    if not torch.is_grad_enabled():
        return
    for name in weights.log_q:
        fn = weights.guide_trace.nodes[name]["fn"]
        if not fn.has_rsample:
            raise ValueError(
                f"{type(estimator).__name__}(gradient={estimator.gradient!r}) cannot "
                f"differentiate through site {name!r}: {type(fn).__name__} has no reparameterised "
                'sampler, and its parameters would get no gradient. Use gradient="score", or '
                '"vimco" with num_particles >= 2'
            )
