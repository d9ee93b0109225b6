r"""Draws of discrete latents for gradients that need more than one draw, or a slope.

``"disarm"``
    Pairs of antithetic draws. A site's draw is made of independent bits b = 1[u > 1 - sigmoid(a)],
    and its partner's of 1 - u. With f the log-weights of the two, the gradient in each logit is
    :math:`\tfrac12 (f(b) - f(b')) (-1)^{b'} 1[b \ne b']\, \sigma(|a|)`. Unbiased. A categorical
    latent is the first 1 of such bits, one for each class but the last (stick-breaking); bits
    behind the later of the two first ones change neither, and have no term. Dong, Mnih & Tucker,
    DisARM, 2020, and Coupled Gradient Estimators, 2021.
``"straight_through"``, ``"gumbel"``
    **Biased.** The slope of the draw is taken to be that of its probability, or of a softmax at
    temperature 1/2 of the logits with the noise it was drawn with. What is between two values the
    densities alone decide. Bengio et al. 2013; Jang, Gu & Poole 2017; Maddison et al. 2017.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, OneHotCategorical

from ppvae.pairs import (
    PARTICLE_PLATE,
    Leaves,
    Memory,
    Site,
    is_discrete,
    kind,
    latent_parents,
    law,
    signature,
)
from ppvae.terms import term
from ppvae.weights import LogWeights

TEMPERATURE = 0.5


class Bits(Leaves):
    """Draws discrete sites anew, as functions of noise; the others stay as they are drawn.

    Attributes:
        drawn: by site, what its draw was made of.
    """

    gradient = ""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[str, Any] = {}

    def _pyro_post_sample(self, msg: Any) -> None:
        fn = msg["fn"]
        enumerated = msg["infer"].get("enumerate") == "parallel"
        if msg["is_observed"] or enumerated or fn.has_rsample or site_is_subsample(msg):
            return
        if not (is_discrete(fn) and isinstance(law(fn), self.laws)):
            names = " or ".join(known.__name__ for known in self.laws)
            raise ValueError(
                f'gradient="{self.gradient}" draws latents of {names}, and site {msg["name"]!r} is '
                f'{kind(fn)}; use gradient="score"'
            )
        msg["value"] = self.draw(msg, law(fn))

    laws: tuple[type, ...] = (Bernoulli, OneHotCategorical)

    def draw(self, site: Site, of: Any) -> Tensor:
        """The value of a site with this law."""
        raise NotImplementedError


class Antithetic(Bits):
    """Particle k and k + K/2 are partners: of the same noise u, and 1 - u."""

    gradient = "disarm"
    laws = (Bernoulli, Categorical, OneHotCategorical)

    def draw(self, site: Site, of: Any) -> Tensor:
        logits = of.logits
        if not isinstance(of, Bernoulli):
            rest = logits.flip(-1).logcumsumexp(-1).flip(-1)
            logits = logits[..., :-1] - rest[..., 1:]  # of stopping at a class, if not before
        name, dim = site["name"], self._dim(site, logits, of)
        one = logits.detach().chunk(2, dim)[0]
        u = torch.rand_like(one)
        p = one.sigmoid()
        bits = torch.cat([u > 1 - p, u < p], dim)
        self.drawn[name] = logits, bits, dim
        if isinstance(of, Bernoulli):
            return bits.to(site["value"].dtype)
        first = (bits.cumsum(-1) == 0).sum(-1)
        if not isinstance(of, OneHotCategorical):
            return first
        hot = torch.nn.functional.one_hot(first, bits.shape[-1] + 1)
        return hot.to(site["value"].dtype)

    @staticmethod
    def _dim(site: Site, logits: Tensor, of: Any) -> int:
        frame = next(f for f in site["cond_indep_stack"] if f.name == PARTICLE_PLATE)
        return int(frame.dim) - site["fn"].event_dim - (type(of).__name__ == "Categorical")

    def surrogate(self, weights: LogWeights, log_w: Tensor) -> Tensor:
        """A scalar with the gradient of the mean log-weight in the logits."""
        K = len(log_w)
        f = log_w.detach().double()
        half = (f - f.roll(K // 2, 0)) / (2 * K)  # each pair counts from both sides
        total = log_w.new_zeros(())
        require_apart(weights, self.drawn, 'gradient="disarm"')
        for name, (logits, bits, dim) in self.drawn.items():
            site = weights.guide_trace.nodes[name]
            partner = bits.roll(K // 2, dim)
            sign = bits.to(logits.dtype) - partner.to(logits.dtype)
            if not isinstance(law(site["fn"]), Bernoulli):
                reached = torch.cat([torch.ones_like(bits[..., :1]), ~bits[..., :-1]], -1)
                reached = reached.cumprod(-1).bool()
                sign = sign * (reached | reached.roll(K // 2, dim))
            at = torch.where(sign == 0, torch.zeros_like(logits), logits)  # it may be infinite
            slopes = sign * at.detach().abs().sigmoid() * at
            batch = len(site["fn"].batch_shape)
            summed = slopes.flatten(batch).sum(-1) if slopes.dim() > batch else slopes
            shaped = term(site, weights.leftmost, weights.joint, weights.letters, summed)
            if shaped.letters:
                raise ValueError(
                    f"latent {name!r} depends on an enumerated one; enumerate both, or draw both"
                )
            total = total + (half.to(logits.dtype) * shaped.values).sum()
        return total


def require_apart(weights: LogWeights, names: Iterable[str], asked_by: str) -> None:
    """Raise ``ValueError`` if one of some latents depends on another latent of the guide."""
    if len(weights.q) == 1:
        return
    model, guide, args, kwargs = weights.pair
    known, call = _parents.of(model, guide), signature(args, kwargs)
    if call not in known:
        known[call] = latent_parents(functools.partial(guide, **kwargs), args)
    for name in names:
        if known[call][name]:
            raise ValueError(
                f"{asked_by} needs discrete latents that depend on x alone, and {name!r} depends "
                f'on {min(known[call][name])!r} in the guide; use elbo.ELBO(gradient="score")'
            )


_parents = Memory()


class StraightThrough(Bits):
    """A draw with the slope of its probability."""

    gradient = "straight_through"

    def draw(self, site: Site, of: Any) -> Tensor:
        hard: Tensor = site["value"].detach()
        return hard + (of.probs - of.probs.detach())


class Gumbel(Bits):
    """A draw with the slope of a softmax, of the logits and the noise that it was drawn with."""

    gradient = "gumbel"

    def draw(self, site: Site, of: Any) -> Tensor:
        if isinstance(of, Bernoulli):
            noisy = of.logits + logistic(torch.rand_like(of.logits))
            hard, soft = noisy > 0, (noisy / TEMPERATURE).sigmoid()
        else:
            noisy = of.logits - torch.empty_like(of.logits).exponential_().log()
            hard = torch.nn.functional.one_hot(noisy.argmax(-1), noisy.shape[-1])
            soft = (noisy / TEMPERATURE).softmax(-1)
        return hard.to(soft.dtype) + (soft - soft.detach())


def logistic(u: Tensor) -> Tensor:
    """The logit of uniform noise, finite."""
    return u.clamp(torch.finfo(u.dtype).tiny, 1 - torch.finfo(u.dtype).eps).logit()


THROUGH: dict[str, type[Bits]] = {"straight_through": StraightThrough, "gumbel": Gumbel}
