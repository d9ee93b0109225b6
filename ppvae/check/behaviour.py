"""What a pair is fit for: points and supports of its latents, gradients that reach parameters.

Each function asks one question of the log-weights of a pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import IndependentTransform, Transform, biject_to, constraints

from ppvae.check.sites import innermost, is_point, known_support
from ppvae.pairs import (
    Leaves,
    NotAtCopies,
    Program,
    is_rounded,
    kind,
    sample_sites,
)
from ppvae.program import method_owners, module_of, require_own_parameters
from ppvae.terms import NoInverse
from ppvae.weights import LogWeights, weigh

GRADIENTS = ("pathwise", "stl", "dreg", "score", "vimco")
NO_INVERSE = "a flow of the guide has no inverse, so it can only weigh its own draws"


# ------------------------------------------------------------------------------ supports


def support_of(fn: Any) -> Any:
    """A distribution's support; a mixture's is that of its components, for which there is a map."""
    support, mixture = fn.support, getattr(constraints, "MixtureSameFamilyConstraint", ())
    while isinstance(support, mixture):
        support = support.base_constraint
    return support


def same_support(q: Any, p: Any) -> bool:
    """Whether two distributions' supports have the same unconstrained coordinates."""
    first, second = support_of(q), support_of(p)
    if first.is_discrete or second.is_discrete:
        return bool(first.is_discrete and second.is_discrete)
    one, other = (_elementwise(biject_to(support)) for support in (first, second))
    if type(one) is not type(other) or type(one).__eq__ is Transform.__eq__:
        return type(one) is type(other)  # one that has no parameters, and no comparison
    return bool(one == other)


def _elementwise(transform: Transform) -> Transform:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return transform


def uncovered_latents(weights: LogWeights) -> dict[str, str]:
    """Latents of whose support the guide does not cover all, or does not say, and what is known."""
    found = {}
    for name in weights.q.keys() & weights.p.keys() - weights.enumerated.keys():
        q, p = (t.nodes[name]["fn"] for t in (weights.guide_trace, weights.model_trace))
        if known_support(q) is None or known_support(p) is None:
            found[name] = f"{kind(q)} does not say its support"
        elif not same_support(q, p):
            found[name] = "the guide's support is not all of the model's"
    return found


def point_masses(weights: LogWeights) -> list[str]:
    """Latents at which the guide puts all mass on one point.

    Not the ``Delta`` by which a program hands on a draw that was made before: it has a density of
    its own, or stands beside an auxiliary site, as in Pyro's autoguides.
    """
    sites = sample_sites(weights.guide_trace)
    if any(site["infer"].get("is_auxiliary") for site in sites.values()):
        return []
    return [
        name
        for name, site in sites.items()
        if is_point(site["fn"]) and not torch.as_tensor(innermost(site["fn"]).log_density).any()
    ]


# ------------------------------------------------------------------------------ gradients


def trainable_parameters(model: Program, guide: Program) -> dict[int, tuple[str, Tensor]]:
    """Name and value of each trainable parameter of a pair, by its id."""
    found: dict[int, tuple[str, Tensor]] = {}
    for role, program in (("model", model), ("guide", guide)):
        owner = module_of(program)
        for name, parameter in owner.named_parameters() if owner is not None else ():
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
    return torch.stack([t.sum() for t in (*weights.log_p.values(), *weights.log_q.values())]).sum()


def possible_gradients(weights: LogWeights) -> dict[str, str]:
    """For each gradient of :mod:`ppvae.elbo` why this pair cannot use it; "" if it can."""
    reasons = dict.fromkeys(GRADIENTS, "")
    if points := point_masses(weights):
        only = f"latent {points[0]!r} is a point mass, drawn once: only elbo.ELBO(), pathwise"
        return reasons | dict.fromkeys(GRADIENTS[1:], only)
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
            weigh(model, guide, args, {**kwargs, "joint": weights.joint}, 1, leaves=Leaves())
        except NoInverse:
            reasons |= dict.fromkeys(("stl", "dreg"), NO_INVERSE)
        except NotAtCopies as error:
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
