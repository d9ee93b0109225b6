"""The evidence lower bound, with a weight on its KL term."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from ppvae.elbo.estimator import Estimator
from ppvae.elbo.penalties import Penalty, Tilt
from ppvae.elbo.state import State
from ppvae.weights import LogWeights, log_weights, reduce_site

Weight = float | Tensor | Callable[[int], float] | Penalty


@dataclass(frozen=True, eq=False)
class ELBO(Estimator):
    r"""The evidence lower bound, averaged over K particles.

    .. math:: \mathcal L_\beta(x) = \mathbb E_{q(z \mid x)}\left[\log p(x \mid z)
              - \beta \left(\log q(z \mid x) - \log p(z)\right)\right]
              \qquad (\beta = 1:\ \le \log p(x))

    Args:
        num_particles: K >= 1; averages the estimate, which lowers its variance but does not
            tighten the bound.
        gradient: ``"pathwise"``, ``"stl"``, ``"score"``; see
            :mod:`ppvae.elbo.gradients`.
        beta: the weight on the KL: a number >= 0, a 0-d tensor, a callable of the optimisation
            step such as :class:`~ppvae.elbo.LinearWarmup`, or a penalty:
            :class:`~ppvae.elbo.FreeBits`, :class:`~ppvae.elbo.Capacity`,
            :class:`~ppvae.elbo.Constraint`. With beta < 1 the objective may exceed log p(x):
            reported bounds (:meth:`evaluate`, ``fit``'s table) always have beta = 1.
        kl: ``"sampled"``: log q - log p at the draws. ``"analytic"``: the closed form, for every
            latent; raises where there is none, or where it would be wrong because the model's
            conditional of a latent depends on a latent drawn from it in the guide (a bottom-up
            guide). ``"mixed"``: the closed form where it is valid, draws elsewhere.

    A ``poutine.scale`` on single sites weighs their terms, as in Pyro. Latents marked
    ``infer={"enumerate": "parallel"}`` are summed out: with their probability q(c | x) if the guide
    has them, inside the logarithm if only the model does.

    Raises:
        ValueError: bad arguments; ``kl="analytic"`` where it is not valid; a pathwise gradient of
            a site without reparameterised sampler; a weight on a KL that cannot be told from the
            likelihood because both were summed out together.

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
        if not (isinstance(self.beta, (Real, Tensor, Penalty)) or callable(self.beta)):
            raise TypeError(
                "beta must be a number, a 0-d tensor, a callable of the step such as "
                f"elbo.LinearWarmup, or a penalty such as elbo.FreeBits, got {self.beta!r}"
            )
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
        return log_w.mean(0) if len(log_w) > 1 else log_w.squeeze(0)

    def new_state(self) -> State:
        state = State()
        if isinstance(self.beta, Penalty):
            self.beta.prepare(state)
        return state

    def advance(self, state: State) -> None:
        if isinstance(self.beta, Penalty):
            self.beta.advance(state)

    def evaluate(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            weights = log_weights(model, guide, *args, num_particles=self.num_particles, **kwargs)
            return self.bound(ELBO(self.num_particles).effective(weights, State()))

    def effective(self, weights: LogWeights, state: State) -> Tensor:
        plain = isinstance(self.beta, (int, float)) and self.beta == 1  # a tensor is not looked at
        if plain and self.kl == "sampled" and not weights.site_scales and not weights.enumerated:
            return weights.log_w
        log_likelihood, rates = self.terms(weights)
        tilt = self._tilt(rates, log_likelihood, state)
        effective = tilt.likelihood * log_likelihood - tilt.constant
        for name, rate in rates.items():
            weighted = tilt.kl[name] * rate
            effective = effective - (weighted.sum(0) if weighted.dim() > 2 else weighted)
        return effective.expand(weights.num_particles, -1)

    def _tilt(self, rates: dict[str, Tensor], log_likelihood: Tensor, state: State) -> Tilt:
        if isinstance(self.beta, Penalty):
            detached = {name: rate.detach() for name, rate in rates.items()}
            return self.beta.tilt(detached, log_likelihood.detach(), state)
        beta = state.at_step(self.beta)
        if beta is not self.beta:
            state.weight = torch.as_tensor(beta)
        return Tilt(1.0, dict.fromkeys(rates, beta), 0.0)

    def terms(self, weights: LogWeights) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x | z) and log q - log p of each latent, ``(K or 1, N)``, summed out."""
        scales = weights.site_scales
        if scales and weights.enumerated:
            raise ValueError(
                f"a poutine.scale weighs site {next(iter(scales))[1]!r} while latents are summed "
                f"out ({sorted(weights.enumerated)}), and a scale inside that sum has no meaning; "
                "for a weight on the KL use elbo.ELBO(beta=...)"
            )
        log_p = {n: scales.get(("model", n), 1.0) * t for n, t in weights.log_p.items()}
        log_q = {n: scales.get(("guide", n), 1.0) * t for n, t in weights.log_q.items()}

        in_guide = [name for name in weights.enumerated if name in log_q]
        expected = _expectation([log_q[name] for name in in_guide])
        rates = {n: log_q[n] - log_p[n] if n in log_p else log_q[n] for n in log_q}
        likelihood: Any = sum(log_p[name] for name in weights.observed)
        in_model = [dim for name, dim in weights.enumerated.items() if name not in log_q]
        if in_model:
            # Dims of the model lie left of the guide's; their size is 1 where there is one class.
            carriers = {n for n, t in log_p.items() if t.dim() >= -max(in_model)}
            self._require_separate(carriers & weights.observed)
            marginal = _sum_out(sum(log_p[name] for name in carriers), in_model)
            if carriers & weights.observed:
                likelihood = sum(log_p[n] for n in weights.observed - carriers) + marginal
                for name in carriers & log_q.keys():
                    rates[name] = log_q[name]
            else:
                group = carriers & log_q.keys()
                rates = {name: rate for name, rate in rates.items() if name not in group}
                rates["+".join(sorted(carriers))] = sum(log_q[name] for name in group) - marginal
        rates = {name: expected(rate) for name, rate in rates.items()}
        closed = closed_form_kl(self, weights)
        rates |= closed
        if isinstance(self.beta, Penalty) and self.beta.per_dimension:
            rates = {name: dimension_rates(weights, name, closed=name in closed) for name in rates}
        return expected(likelihood), rates

    def _require_separate(self, merged: frozenset[str] | set[str]) -> None:
        if merged and not (isinstance(self.beta, (int, float)) and self.beta == 1):
            raise ValueError(
                f"the observed site {min(merged)!r} depends on a latent that is summed out in the "
                "model, so its log-likelihood and the KL are one number and the KL cannot be "
                "weighed; put the latent into the guide too, enumerated there, or use beta=1"
            )


def _sum_out(term: Any, dims: list[int]) -> Tensor:
    """logsumexp over enumeration dims of the model, which lie left of the guide's."""
    marginal: Tensor = term.flatten(0, max(dims)).logsumexp(0)
    return marginal


def _expectation(log_q: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """The mean over enumerated latents of the guide: weights exp(log q), dims left of (K, N)."""
    if not log_q:
        return lambda term: term
    weights = torch.stack(torch.broadcast_tensors(*log_q)).sum(0).exp()

    def mean(term: Tensor) -> Tensor:
        if term.dim() <= 2:
            return term
        return (weights * term).flatten(0, -3).sum(0)

    return mean


def closed_form_kl(estimator: ELBO, weights: LogWeights) -> dict[str, Tensor]:
    """KL(q || p) of the latents that are to have it, ``(K or 1, N)`` each.

    Raises:
        ValueError: with ``kl="analytic"``, for a latent that has none or where it is not valid.
    """
    if estimator.kl == "sampled":
        return {}
    valid, closed = weights.kl_valid(), {}
    scaled = {name for _, name in weights.site_scales}
    for name in weights.log_q:
        q, p = weights.guide_trace.nodes[name], weights.model_trace.nodes.get(name)
        if p is None or name in scaled or weights.enumerated or p["mask"] is not q["mask"]:
            reason = (
                "it is auxiliary, weighed by a poutine.scale, beside an enumerated latent, or "
                "masked differently in model and guide"
            )
        elif name not in valid:
            reason = (
                "in the model it depends on a latent that the guide draws from it, so the closed "
                "form would not be its expected log q - log p"
            )
        else:
            try:
                kl = _divergence(q["fn"], p["fn"])
                closed[name] = reduce_site(q, kl, weights.leftmost, weights.joint)
                continue
            except NotImplementedError:
                kinds = f"KL({_kind(q['fn'])} || {_kind(p['fn'])})"
                reason = f"no closed form is known for {kinds}"
        if estimator.kl == "analytic":
            raise ValueError(
                f'kl="analytic" is not possible for latent {name!r}: {reason}. Use kl="mixed" '
                '(closed form where valid, draws elsewhere) or kl="sampled"'
            )
    return closed


def _divergence(q: Any, p: Any) -> Tensor:
    """KL(q || p) of equal batch shapes: that of Bernoullis does not broadcast in torch."""
    if q.batch_shape != p.batch_shape:
        shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        q, p = q.expand(shape), p.expand(shape)
    kl: Tensor = kl_divergence(q, p)
    return kl


def dimension_rates(weights: LogWeights, name: str, closed: bool) -> Tensor:
    """log q - log p (or KL) of every dimension of a latent, ``(D, K or 1, N)``."""
    q, p = weights.guide_trace.nodes.get(name), weights.model_trace.nodes.get(name)
    if (
        q is None
        or p is None
        or weights.enumerated
        or not all(isinstance(site["fn"], Independent) for site in (q, p))
        or len(q["fn"].event_shape) != 1
    ):
        raise ValueError(
            f"FreeBits(per_dimension=True) needs the rate of each dimension of latent {name!r}, so "
            "guide and model must both draw it from a vector of independent dimensions "
            "(.to_event(1)); use per_dimension=False"
        )
    if closed:
        rate = _divergence(q["fn"].base_dist, p["fn"].base_dist)
    else:
        rate = q["fn"].base_dist.log_prob(q["value"]) - p["fn"].base_dist.log_prob(p["value"])
    shape = q["fn"].batch_shape  # dims left of the plates are kept by reduce_site
    rate = rate.expand(shape + q["fn"].event_shape).movedim(-1, 0)
    rate = rate.reshape(rate.shape[:1] + (1,) * (-weights.leftmost - len(shape)) + shape)
    return reduce_site(q, rate, weights.leftmost, weights.joint)


def _kind(fn: Any) -> str:
    """The name of a distribution inside its ``Independent`` and masks."""
    while hasattr(fn, "base_dist") and type(fn).__name__ not in ("TransformedDistribution",):
        fn = fn.base_dist
    return type(fn).__name__
