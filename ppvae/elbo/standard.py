"""The evidence lower bound, with a weight on its KL term."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppvae.arguments import number_or_tensor, real
from ppvae.elbo.estimator import Estimator
from ppvae.elbo.gradients import mean_of_others
from ppvae.elbo.kl import closed_form_kl, dimension_rates
from ppvae.elbo.penalties import Penalty, Tilt
from ppvae.elbo.state import State
from ppvae.enumeration import groups, mean, sum_of, sum_out
from ppvae.terms import Term, unmasked
from ppvae.weights import LogWeights, whole_weights

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
        gradient: ``"pathwise"``, ``"stl"``, ``"score"``, ``"vargrad"``, ``"disarm"``, or, biased,
            ``"straight_through"`` and ``"gumbel"``; see :mod:`ppvae.elbo.gradients`.
        beta: the weight on the KL: a number >= 0, a 0-d tensor, a callable of the optimisation
            step such as :class:`~ppvae.elbo.LinearWarmup`, or a penalty:
            :class:`~ppvae.elbo.FreeBits`, :class:`~ppvae.elbo.Capacity`,
            :class:`~ppvae.elbo.Constraint`. With beta < 1 the objective may exceed log p(x):
            reported bounds (:meth:`evaluate`, ``fit``'s table) always have beta = 1.
        kl: ``"sampled"``: log q - log p at the draws. ``"analytic"``: the closed form, for every
            latent; raises where there is none, or where it would be wrong because the model's
            conditional of a latent depends on a latent drawn from it in the guide (a bottom-up
            guide). ``"mixed"``: the closed form where it is valid, draws elsewhere.

    Of global latents (outside the plate ``"data"``) ``kl`` holds too; ``beta`` does not weigh them.
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

    gradients: ClassVar[tuple[str, ...]] = (
        *("pathwise", "stl", "score", "vargrad", "disarm"),
        *("straight_through", "gumbel"),  # biased
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.beta, Real):
            object.__setattr__(self, "beta", real("beta", self.beta))
        elif isinstance(self.beta, Tensor):
            object.__setattr__(self, "beta", number_or_tensor("beta", self.beta))
        if not (isinstance(self.beta, (Real, Tensor, Penalty)) or callable(self.beta)):
            raise TypeError(
                "beta must be a number, a 0-d tensor, a callable of the step such as "
                f"elbo.LinearWarmup, or a penalty such as elbo.FreeBits, got {self.beta!r}"
            )
        if isinstance(self.beta, Tensor) and self.beta.dim() != 0:
            raise ValueError(f"beta must be one number, got a tensor {tuple(self.beta.shape)}")
        if isinstance(self.beta, (int, float, Tensor)) and not self.beta >= 0:
            raise ValueError(f"beta weighs the KL, so it must be >= 0, got {self.beta}")
        if not isinstance(self.kl, str) or self.kl not in ("sampled", "analytic", "mixed"):
            raise ValueError(f'kl must be "sampled", "analytic" or "mixed", got {self.kl!r}')
        if self.kl != "sampled" and self.gradient != "pathwise":
            raise ValueError(
                f"gradient={self.gradient!r} is a property of draws of log q, which "
                f'kl={self.kl!r} does not take; use kl="sampled" or gradient="pathwise"'
            )

    def bound(self, log_w: Tensor) -> Tensor:
        return log_w.mean(0) if len(log_w) > 1 else log_w.squeeze(0)

    def bound_of_others(self, log_w: Tensor, put: Tensor | None = None) -> Tensor:
        return mean_of_others(log_w, put)

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
            weights = whole_weights(
                model, guide, args, kwargs, self.num_particles, with_globals=True
            )
            return self._plain(weights)

    def estimate(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """What :meth:`evaluate` gives, with log-densities that are estimates: no bound, ``(N,)``.

        It may lie above log p(x). :func:`ppvae.fit` shows it as ``valid_estimate``.
        """
        with torch.no_grad():
            weights = whole_weights(model, guide, args, kwargs, self.num_particles, estimates=True)
            return self._plain(weights)

    def _plain(self, weights: LogWeights) -> Tensor:
        """The ELBO with every weight at 1, ``(N,)``."""
        plain = replace(weights, site_scales={})
        return self.bound(ELBO(self.num_particles).effective(plain, State()))

    def effective(self, weights: LogWeights, state: State) -> Tensor:
        plain = isinstance(self.beta, (int, float)) and self.beta == 1  # a tensor is not looked at
        if plain and self.kl == "sampled" and not weights.site_scales and not weights.enumerated:
            return weights.log_w
        if isinstance(self.beta, Penalty) and getattr(self.beta, "max_distortion", None) is None:
            self._require_known_rates(weights)
        log_likelihood, rates = self.terms(weights)
        tilt = self._tilt(rates, log_likelihood, state)
        effective = tilt.likelihood * log_likelihood - tilt.constant
        for name, rate in rates.items():
            if isinstance(tilt.kl[name], (int, float)) and tilt.kl[name] == 0:
                continue  # of an infinite rate, too, nothing counts
            weighted = tilt.kl[name] * rate
            effective = effective - (weighted.sum(0) if weighted.dim() > 2 else weighted)
        return effective.expand(weights.num_particles, -1)

    def log_global(self, weights: LogWeights) -> Tensor:
        closed = closed_form_kl(self.kl, weights, of_globals=True)
        p = [t for name, t in weights.global_p.items() if name not in closed]
        q = [t for name, t in weights.global_q.items() if name not in closed]
        return sum_of([*p, *(-t for t in (*q, *closed.values()))])

    def _require_known_rates(self, weights: LogWeights) -> None:
        for name in weights.q:
            site = weights.model_trace.nodes.get(name)
            if site is not None and hasattr(unmasked(site["fn"]), "unnormalised"):
                raise ValueError(
                    f"{type(self.beta).__name__} compares the KL of {name!r} with a number of "
                    "nats, and in training the normaliser of its prior is left out: weigh the KL "
                    "by a number or a schedule"
                )

    def _tilt(self, rates: dict[str, Tensor], log_likelihood: Tensor, state: State) -> Tilt:
        if isinstance(self.beta, Penalty):
            detached = {name: rate.detach() for name, rate in rates.items()}
            return self.beta.tilt(detached, log_likelihood.detach(), state)
        beta = state.at_step(self.beta, "kl_weight")
        return Tilt(1.0, dict.fromkeys(rates, beta), 0.0)

    def terms(self, weights: LogWeights) -> tuple[Tensor, dict[str, Tensor]]:
        """log p(x | z) and log q - log p of each latent, ``(K or 1, N)``, summed out."""
        p, q = weights.weighted("model"), weights.weighted("guide")
        likelihood = {name: p[name] for name in weights.observed}
        # of each rate, the terms that are added and those that are taken off
        rates = {name: ([q[name]], [p[name]] if name in p else []) for name in q}
        for names in _summed_together(weights):
            marginal, label = _marginal(weights, names), "+".join(sorted(names))
            latents = [name for name in names if name in q]
            if data := weights.observed & set(names):
                self._require_separate(data)
                likelihood = {n: t for n, t in likelihood.items() if n not in names}
                likelihood[label] = marginal
                rates |= {name: ([q[name]], []) for name in latents}
            else:
                rates = {name: rate for name, rate in rates.items() if name not in latents}
                rates[label] = ([q[name] for name in latents], [marginal])

        probabilities = {
            letter: weights.factors["guide", name]
            for name, letter in weights.enumerated.items()
            if name in q
        }

        def expected(terms: Iterable[Term]) -> Any:
            return sum_of([mean(term, probabilities) for term in terms])

        found = {
            name: expected(added) - expected(off) if off else expected(added)
            for name, (added, off) in rates.items()
        }
        closed = closed_form_kl(self.kl, weights)
        found |= closed
        if isinstance(self.beta, Penalty) and self.beta.per_dimension:
            found = {name: dimension_rates(weights, name, closed=name in closed) for name in found}
        return expected(likelihood.values()), found

    def _require_separate(self, merged: frozenset[str] | set[str]) -> None:
        if merged and not (isinstance(self.beta, (int, float)) and self.beta == 1):
            raise ValueError(
                f"the observed site {min(merged)!r} depends on a latent that is summed out in the "
                "model, so its log-likelihood and the KL are one number and the KL cannot be "
                "weighed; put the latent into the guide too, enumerated there, or use beta=1"
            )


def _summed_together(weights: LogWeights) -> list[list[str]]:
    """Names of the model's sites, by the latents of the model alone that are summed out of them."""
    latents = {letter for n, letter in weights.enumerated.items() if n not in weights.q}
    return groups(_of_sums(weights), latents) if latents else []


def _of_sums(weights: LogWeights) -> dict[str, Term]:
    """The model's terms; those of its own enumerated latents unmasked."""
    return {n: t if n in weights.q else weights.model_factors()[n] for n, t in weights.p.items()}


def _marginal(weights: LogWeights, names: Sequence[str]) -> Term:
    """log of the sum, over latents of the model alone, of the terms that depend on them.

    Raises:
        ValueError: a scale stands inside that sum, or a latent of the guide in a plate does.
    """
    terms = [_of_sums(weights)[name] for name in names]
    summed = {letter for n, letter in weights.enumerated.items() if n not in weights.q}
    for letter in summed & {letter for t in terms for letter in t.letters}:
        plates = frozenset.intersection(*[t.plates for t in terms if letter in t.letters])
        for (program, name), factor in weights.factors.items():
            inside = any(weights.enumerated[name] in t.letters for t in terms)
            if program == "guide" and inside and not factor.plates <= plates:
                raise ValueError(
                    f"latent {name!r}, which the guide enumerates in an inner plate, stands inside "
                    "a sum over a latent that is outside of it; draw one of the two"
                )
    scales = [weights.site_scales.get(("model", name), 1.0) for name in names]
    if not all(_equal_scales(scale, scales[0]) for scale in scales):
        raise ValueError(
            f"a poutine.scale weighs some of the sites {sorted(names)}, and a latent is summed out "
            "of their product: a scale inside that sum has no meaning. Scale all of them alike, or "
            "for a weight on the KL use elbo.ELBO(beta=...)"
        )
    if isinstance(scales[0], Tensor) and scales[0].dim() > (0 if weights.joint else 1):
        raise ValueError(
            f"a poutine.scale on sites {sorted(names)}, out of which a latent is summed, has the "
            f"shape {tuple(scales[0].shape)}; scale datapoints by a number or by (N,) numbers"
        )
    (marginal,) = sum_out(terms, summed)
    return marginal._replace(values=marginal.values * scales[0])


def _equal_scales(a: Any, b: Any) -> bool:
    """Whether two scales are the same; of tensors the values are compared, so no graph has them."""
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return bool(a == b)
    return torch.equal(*torch.broadcast_tensors(torch.as_tensor(a), torch.as_tensor(b)))
