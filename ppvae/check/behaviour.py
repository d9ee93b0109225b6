"""What a pair is fit for: points and supports of its latents, gradients that reach parameters.

Each function asks one question of the log-weights of a pair.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import IndependentTransform, Transform, biject_to, constraints

from ppvae.auxiliary import own_parameters
from ppvae.check.sites import CIRCLE, describe, is_angle, is_point, latent_support
from ppvae.pairs import (
    Leaves,
    NotAtCopies,
    Program,
    is_rounded,
    kind,
    law,
    sample_sites,
)
from ppvae.program import method_owners, module_of, require_own_parameters
from ppvae.terms import NoInverse
from ppvae.weights import LogWeights, weigh

GRADIENTS = ("pathwise", "stl", "dreg", "score", "vimco")


# ------------------------------------------------------------------------------ supports


class Turn(Transform):
    """From the real line onto the angles in (-pi, pi], by the normal distribution function.

    An entire function with light tails, so that a sum over few points is an integral.
    """

    domain, codomain = constraints.real, CIRCLE
    bijective, sign = True, +1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Turn)

    def _call(self, x: Tensor) -> Tensor:
        return math.pi * torch.erf(x / math.sqrt(2))

    def _inverse(self, y: Tensor) -> Tensor:
        end = 1 - torch.finfo(y.dtype).eps
        return math.sqrt(2) * torch.erfinv((y / math.pi).clamp(-end, end))

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """log |dy / dx|, elementwise."""
        return 0.5 * math.log(2 * math.pi) - 0.5 * x.square()


def coordinates(fn: Any) -> Transform:
    """The map from unconstrained coordinates onto the support of a latent.

    Raises:
        NotImplementedError: there is none, as for a sphere, or the support is not known.
    """
    support = latent_support(fn)
    if support is None:
        raise NotImplementedError(f"{kind(fn)} does not say its support")
    if is_angle(fn):
        return IndependentTransform(Turn(), fn.event_dim) if fn.event_dim else Turn()
    return biject_to(support)


def same_support(q: Any, p: Any) -> bool:
    """Whether two distributions' supports have the same unconstrained coordinates, or none."""
    first, second = latent_support(q), latent_support(p)
    if first is None or second is None:
        return False
    if first.is_discrete or second.is_discrete:
        return bool(first.is_discrete and second.is_discrete)
    try:
        one, other = _elementwise(coordinates(q)), _elementwise(coordinates(p))
    except NotImplementedError:
        return type(first) is type(second)
    if type(one) is not type(other) or type(one).__eq__ is Transform.__eq__:
        return type(one) is type(other)  # one that has no parameters, and no comparison
    return bool(one == other)


def _elementwise(transform: Transform) -> Transform:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def different_supports(weights: LogWeights) -> dict[str, str]:
    """Latents of which the guide has not the model's support, or does not say, and what follows."""
    found = {}
    shared = {**weights.global_p, **weights.p}.keys() & {**weights.global_q, **weights.q}.keys()
    for name in shared - weights.enumerated.keys():
        q, p = (t.nodes[name]["fn"] for t in (weights.guide_trace, weights.model_trace))
        if is_point(q):  # of an autoguide: a function of its noise, into the model's support
            continue
        has, wanted = latent_support(q), latent_support(p)
        if has is None or wanted is None:
            which = q if has is None else p
            found[name] = f"{kind(which)} does not say its support, and {_SMALLER}"
        elif not same_support(q, p) and (what := _consequence(q, p)):
            where = f"{describe(has)} in the guide and {describe(wanted)} in the model"
            found[name] = f"the support is {where}: {what}"
    return found


_LARGER = (
    "a draw of the guide that the model does not allow has log-weight -inf, and the ELBO is then "
    "-inf; log p(x) and IWELBO take it as weight 0"
)
_SMALLER = (
    "of what the guide does not draw, the ELBO stays a lower bound, but log p(x), IWELBO and k-hat "
    "know nothing"
)


def _consequence(q: Any, p: Any) -> str:
    """What it means that the guide's support has not the model's coordinates; "": nothing."""
    try:
        larger, smaller = _exceeds(q, p), _exceeds(p, q)
    except NotImplementedError:  # nothing is known of one of the two
        return _SMALLER
    return "; ".join([_LARGER] * larger + [_SMALLER] * smaller)


def _exceeds(one: Any, other: Any) -> bool:
    """Whether points spread over the support of one distribution leave that of the other."""
    transform, support = coordinates(one), latent_support(other)
    free = torch.Size(transform.inverse_shape(one.batch_shape + one.event_shape))
    reach = 1e6 if is_real(latent_support(one)) else 8.0  # a sigmoid is exactly 1 from 17 on
    return any(
        not support.check(transform(torch.full(free, reach * share))).all()
        for share in (-1.0, -0.1, 0.0, 0.1, 1.0)
    )


def is_real(support: Any) -> bool:
    """Whether a support is the real line, or a space of vectors or matrices."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support is constraints.real


def point_masses(weights: LogWeights) -> list[str]:
    """Latents at which the guide puts all mass on one point.

    Not the ``Delta`` by which a program hands on a draw that was made before: it has a density of
    its own, or stands beside an auxiliary site, as in Pyro's autoguides.
    """
    found = []
    for globals_ in (True, False):  # an autoguide of globals stands beside any guide of rows
        sites = {
            name: site
            for name, site in sample_sites(weights.guide_trace).items()
            if (name in weights.global_q) is globals_
        }
        if not any(site["infer"].get("is_auxiliary") for site in sites.values()):
            found += [
                name
                for name, site in sites.items()
                if is_point(site["fn"]) and not torch.as_tensor(law(site["fn"]).log_density).any()
            ]
    return found


def drawn_once(weights: LogWeights) -> dict[str, str]:
    """Latents of which all draws are equal, and why.

    A point mass; or a distribution that says so itself: ``deterministic``, with a probability of 1
    for its only value.
    """
    found = dict.fromkeys(point_masses(weights), "a point mass")
    for name, site in sample_sites(weights.guide_trace).items():
        if getattr(law(site["fn"]), "deterministic", False):
            found[name] = "deterministic"
    return found


# ------------------------------------------------------------------------------ gradients


def trainable_parameters(model: Program, guide: Program) -> dict[int, tuple[str, Tensor]]:
    """Name and value of each trainable parameter of a pair, by its id."""
    found: dict[int, tuple[str, Tensor]] = {}
    for role, program in (("model", model), ("guide", guide)):
        owner = module_of(program)
        for name, parameter in own_parameters(owner).items() if owner is not None else ():
            if parameter.requires_grad:
                found.setdefault(id(parameter), (f"{role}.{name}", parameter))
    return found


def parameters_without_gradient(weights: LogWeights) -> list[str]:
    """Names of trainable parameters that no log-probability of the pair depends on."""
    named = trainable_parameters(*weights.pair[:2]).values()
    total = _total(weights)
    if not named or not total.requires_grad:
        return [name for name, _ in named]
    grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True, retain_graph=True)
    return [name for (name, _), grad in zip(named, grads, strict=True) if grad is None]


def foreign_parameter(weights: LogWeights) -> str:
    """Which parameter, that neither program owns, the log-probabilities depend on; "": none."""
    model, guide = weights.pair[:2]
    pair: Any = nn.Module()
    pair.model, pair.guide, pair.owners = model, guide, method_owners(model, guide)
    try:
        require_own_parameters(_total(weights), pair)
    except ValueError as error:
        return str(error)
    return ""


def _total(weights: LogWeights) -> Tensor:
    terms = (t for role in ("model", "guide") for t in weights.all_terms(role).values())
    return torch.stack([t.sum() for t in terms]).sum()


def possible_gradients(weights: LogWeights) -> dict[str, str]:
    """For each gradient of :mod:`ppvae.elbo` why this pair cannot use it; "" if it can."""
    reasons = dict.fromkeys(GRADIENTS, "")
    if points := drawn_once(weights):
        name, why = next(iter(points.items()))
        only = f"latent {name!r} is {why}, drawn once: only elbo.ELBO(), pathwise"
        return reasons | dict.fromkeys(GRADIENTS[1:], only)
    for name in weights.global_q:
        fn = weights.guide_trace.nodes[name]["fn"]
        if not fn.has_rsample:
            why = f"{kind(fn)} at the global latent {name!r} has no reparameterised sampler"
            reasons |= dict.fromkeys(GRADIENTS, why)
    for name in weights.latents:
        site = weights.guide_trace.nodes[name]
        which = f"{kind(site['fn'])} at latent {name!r}"
        if name in weights.enumerated:
            reasons["stl"] = f"latent {name!r} is enumerated in the guide"
        elif not site["fn"].has_rsample:
            why = f"{which} has no reparameterised sampler"
            reasons |= dict.fromkeys(("pathwise", "stl", "dreg"), why)
        elif is_rounded(site) and not reasons["dreg"]:
            reasons["dreg"] = f"{which} is straight-through"
    if not reasons["stl"]:
        model, guide, args, kwargs = weights.pair
        try:
            options = {**kwargs, "joint": weights.joint}
            weigh(model, guide, args, options, 1, leaves=Leaves(), with_globals=True)
        except (NoInverse, NotAtCopies) as error:
            reasons |= dict.fromkeys(("stl", "dreg"), str(error))
    return reasons


def detached_latents(weights: LogWeights) -> list[str]:
    """Latents drawn along a sample path that nothing the model samples later depends on."""
    found = []
    for name in weights.latents:
        site = weights.guide_trace.nodes[name]
        others = [term for other, term in weights.log_p.items() if other != name]
        if not site["value"].requires_grad or name in weights.enumerated:
            continue
        later = [term.sum() for term in others if term.requires_grad]
        slopes = [
            torch.autograd.grad(term, site["value"], retain_graph=True, allow_unused=True)[0]
            for term in later
        ]
        if all(slope is None for slope in slopes):
            found.append(name)
    return found
