"""The evidence lower bound, with a weight on its KL term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from ppvae.elbo.estimator import Estimator
from ppvae.weights import LogWeights, reduce_site

Weight = float | Tensor | Callable[[int], float]


@dataclass(frozen=True, eq=False)
class ELBO(Estimator):
    r"""The evidence lower bound, averaged over K particles.

    .. math:: \mathcal L_\beta(x) = \mathbb E_{q(z \mid x)}\left[\log p(x \mid z)
              - \beta \left(\log q(z \mid x) - \log p(z)\right)\right] \qquad (\beta = 1:\ \le \log p(x))

    Args:
        num_particles: K >= 1; averages the estimate, which lowers its variance but does not
            tighten the bound.
        gradient: ``"pathwise"``, ``"stl"``, ``"score"``; see :mod:`ppvae.elbo.gradients`.
        beta: the weight on the KL: a number >= 0, a 0-d tensor, or a callable of the optimisation
            step such as :class:`~ppvae.elbo.LinearWarmup`. With beta < 1 the value may exceed
            log p(x): reported bounds (:meth:`evaluate`, ``fit``'s table) always have beta = 1.
        kl: ``"sampled"``: log q - log p at the draws. ``"analytic"``: the closed form, for every
            latent; raises where there is none, or where it would be wrong because the model's
            conditional of a latent depends on a latent drawn from it in the guide (a bottom-up
            guide). ``"mixed"``: the closed form where it is valid, draws elsewhere.

    A ``poutine.scale`` on single sites weighs their terms, as in Pyro.

    Raises:
        ValueError: bad arguments; ``kl="analytic"`` where it is not valid; a pathwise gradient of
            a site without reparameterised sampler.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2014; Higgins et al., beta-VAE, 2017.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> elbo.ELBO(num_particles=3).evaluate(model, guide, torch.ones(5, 4)).shape
        torch.Size([5])
    """

    beta: Weight = 1.0
    kl: str = "sampled"

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "stl", "score")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, (int, float)) and not self.beta >= 0:
            raise ValueError(f"beta weighs the KL, so it must be >= 0, got {self.beta}")
        if self.kl not in ("sampled", "analytic", "mixed"):
            raise ValueError(f'kl must be "sampled", "analytic" or "mixed", got {self.kl!r}')
        if self.kl != "sampled" and self.gradient != "pathwise":
            raise ValueError(
                f"gradient={self.gradient!r} is a property of draws of log q, which "
                f'kl={self.kl!r} does not take; use kl="sampled" or gradient="pathwise"'
            )

    def bound(self, log_w: Tensor) -> Tensor:
        return log_w.mean(0)

    def effective(self, weights: LogWeights, step: int) -> Tensor:
        beta = self.beta(step) if callable(self.beta) else self.beta
        plain = isinstance(self.beta, (int, float)) and self.beta == 1  # a tensor is not looked at
        if self.kl == "sampled" and not weights.site_scales and plain:
            return weights.log_w
        closed = (
            {} if self.kl == "sampled" else closed_form_kl(weights, strict=self.kl == "analytic")
        )
        scales = weights.site_scales

        likelihood: Any = 0.0
        divergence: Any = 0.0
        for name, term in weights.log_p.items():
            term = scales.get(("model", name), 1.0) * term
            if name in weights.observed:
                likelihood = likelihood + term
            elif name not in closed:
                divergence = divergence - term
        for name, term in weights.log_q.items():
            if name not in closed:
                divergence = divergence + scales.get(("guide", name), 1.0) * term
        for kl in closed.values():
            divergence = divergence + kl
        effective: Tensor = likelihood - beta * divergence
        return effective.expand(weights.num_particles, -1)


def closed_form_kl(weights: LogWeights, strict: bool) -> dict[str, Tensor]:
    """KL(q || p) of every latent where a closed form exists and is valid, ``(K or 1, N)`` each."""
    valid = weights.kl_valid()
    closed = {}
    for name in weights.log_q:
        q, p = weights.guide_trace.nodes[name], weights.model_trace.nodes.get(name)
        if (
            p is None
            or ("model", name) in weights.site_scales
            or ("guide", name) in weights.site_scales
        ):
            reason = "it is auxiliary, or a poutine.scale weighs it"
        elif name not in valid:
            reason = (
                "in the model it depends on a latent that the guide draws from it, so the closed "
                "form would not be its expected log q - log p"
            )
        else:
            try:
                closed[name] = reduce_site(q, kl_divergence(q["fn"], p["fn"]), weights.joint)
                continue
            except NotImplementedError:
                reason = f"no closed form is known for KL({_kind(q['fn'])} || {_kind(p['fn'])})"
        if strict:
            raise ValueError(
                f'kl="analytic" is not possible for latent {name!r}: {reason}. Use kl="mixed" '
                '(closed form where valid, draws elsewhere) or kl="sampled"'
            )
    return closed


def _kind(fn: Any) -> str:
    """The name of a distribution inside its ``Independent`` and masks."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution"):
        fn = fn.base_dist
    return type(fn).__name__
