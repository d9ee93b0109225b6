"""What a pair does when it is run: gradients, leakage, particles, and which gradients it allows.

Each function runs a pair that has passed the checks of shapes and sites, and returns what is wrong,
in words; :func:`ppvae.check_pair` puts them together.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor
from torch.distributions import IndependentTransform, Transform, biject_to, constraints

from ppvae.pairs import (
    DATA_PLATE,
    PARTICLE_PLATE,
    Args,
    Kwargs,
    Leaves,
    Program,
    reason,
    sample_sites,
    seeded,
)
from ppvae.program import module_of
from ppvae.terms import NoInverse
from ppvae.weights import LogWeights, log_weights, weigh

GRADIENTS = ("pathwise", "stl", "dreg", "score", "vimco")
NO_INVERSE = "a flow of the guide has no inverse, so it can only weigh its own draws"
_RTOL = 1e-3  # of a log-probability in float32; a fault is far larger, rounding far smaller


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


def parameters_without_gradient(weights: LogWeights, model: Program, guide: Program) -> list[str]:
    """Names of trainable parameters that no log-probability of the pair depends on."""
    named = trainable_parameters(model, guide).values()
    if not named:
        return []
    total = torch.stack([t.sum() for t in (*weights.log_p.values(), *weights.log_q.values())]).sum()
    if not total.requires_grad:
        return [name for name, _ in named]
    grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
    return [name for (name, _), grad in zip(named, grads, strict=True) if grad is None]


def possible_gradients(
    weights: LogWeights, model: Program, guide: Program, args: Args, kwargs: Kwargs
) -> dict[str, str]:
    """For each gradient of :mod:`ppvae.elbo` why this pair cannot use it; "" if it can."""
    reasons = dict.fromkeys(GRADIENTS, "")
    if points := point_masses(weights):
        only = f"latent {points[0]!r} is a point mass, drawn once: only elbo.ELBO(), pathwise"
        return reasons | dict.fromkeys(GRADIENTS[1:], only)
    for name in weights.latents:
        fn = weights.guide_trace.nodes[name]["fn"]
        if name in weights.enumerated:
            reasons["stl"] = f"latent {name!r} is enumerated in the guide"
        elif not fn.has_rsample:
            why = (
                f"{type(_innermost(fn)).__name__} at latent {name!r} has no reparameterised sampler"
            )
            reasons |= dict.fromkeys(("pathwise", "stl", "dreg"), why)
    if not reasons["dreg"]:
        try:
            weigh(model, guide, args, {**kwargs, "joint": weights.joint}, 1, leaves=Leaves())
        except NoInverse:
            reasons |= dict.fromkeys(("stl", "dreg"), NO_INVERSE)
    return reasons


def point_masses(weights: LogWeights) -> list[str]:
    """Latents at which the guide puts all mass on one point.

    Not the ``Delta`` by which Pyro's autoguides hand on a draw that was made at another site.
    """
    sites = sample_sites(weights.guide_trace)
    if any(site["infer"].get("is_auxiliary") for site in sites.values()):
        return []
    return [name for name, site in sites.items() if isinstance(_innermost(site["fn"]), dist.Delta)]


def _innermost(fn: Any) -> Any:
    while isinstance(fn, (dist.Independent, dist.MaskedDistribution)):
        fn = fn.base_dist
    return fn


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


# ------------------------------------------------------------------------------ leakage


def leakage_faults(
    weights: LogWeights, model: Program, guide: Program, args: Args, kwargs: Kwargs
) -> list[str] | None:
    """Sites at which one row's log-probability changes with the other rows; None if not seen.

    One row is kept, with its draws, and all others become copies of it, with its draws.
    """
    rows = weights.log_w.shape[1]
    tensors = [arg for arg in (*args, *kwargs.values()) if _has_rows(arg, rows)]
    if rows < 2 or not any((tensor[:1] != tensor).any() for tensor in tensors):
        return None
    changed: dict[tuple[str, str], None] = {}
    for kept in (0, rows - 1):  # the last one too: a row may see only those before it
        index = torch.full((rows,), kept, device=tensors[0].device)
        drawn = _with_values(weights.guide_trace, functools.partial(_rows_of, index=index))
        other_args = tuple(_take(arg, index, rows) for arg in args)
        other_kwargs = {name: _take(arg, index, rows) for name, arg in kwargs.items()}
        before = _terms(_replayed(model, guide, weights.guide_trace, args, kwargs))
        after = _terms(_replayed(model, guide, drawn, other_args, other_kwargs))
        for key, term in before.items():
            if _differ(_row(term, kept), _row(after[key], kept)):
                changed[key] = None
    return [
        f"site {name!r} of the {role}: the log-probability of one datapoint changes with the data "
        "or draws of the others, so there is no weight per datapoint. Something mixes rows, such "
        "as a mean over dim 0, a reshape that moves rows, attention over the batch, or batch norm "
        "without running statistics; compute each row from its own data"
        for role, name in changed
    ]


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _take(value: Any, index: Tensor, rows: int) -> Any:
    return value.index_select(0, index) if _has_rows(value, rows) else value


def _rows_of(site: Any, index: Tensor) -> Tensor:
    value: Tensor = site["value"]
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE:
            dim = frame.dim - site["fn"].event_dim
            if -dim <= value.dim() and value.shape[dim] == len(index):
                return value.index_select(dim, index)
    return value


def _row(term: Tensor, row: int) -> Tensor:
    return term[..., row if term.shape[-1] > 1 else 0]


# ------------------------------------------------------------------------------ particles


def particle_faults(
    weights: LogWeights, model: Program, guide: Program, args: Args, kwargs: Kwargs
) -> list[str] | None:
    """Whether 3 particles at once are weighed as one by one; None if that cannot be compared."""
    K = 3
    try:
        many = log_weights(model, guide, *args, num_particles=K, joint=weights.joint, **kwargs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        return [f"the pair runs with one particle but not with {K}: {reason(error)}. {_FOLD}"]
    if weights.enumerated:
        return None
    faults: dict[tuple[str, str], None] = {}
    together = _terms(many)
    for k in range(K):
        drawn = _with_values(many.guide_trace, functools.partial(_particle, k=k))
        alone = _terms(_replayed(model, guide, drawn, args, kwargs, weights.joint))
        for key, term in alone.items():
            both = together[key]
            if _differ(term[0], both[k if both.shape[0] > 1 else 0]):
                faults[key] = None
    return [
        f"site {name!r} of the {role}: {K} particles at once have other log-probabilities than "
        f"one by one at the same draws. {_FOLD}"
        for role, name in faults
    ]


_FOLD = (
    "Particles add a dimension on the left, (K, N, ...): use dims counted from the right, and put "
    "nets.flat_batch around a network that wants one batch dimension (Conv2d, BatchNorm, Flatten, "
    "Unflatten); those of ppvae.nets have it"
)


def _particle(site: Any, k: int) -> Tensor:
    value: Tensor = site["value"]
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE:
            dim = frame.dim - site["fn"].event_dim
            if -dim == value.dim():
                return value[k]
    return value


# ------------------------------------------------------------------------------ replays


def is_deterministic(
    weights: LogWeights, model: Program, guide: Program, args: Args, kwargs: Kwargs
) -> bool:
    """Whether log-probabilities of given draws are the same at each run."""
    values = [
        _terms(_replayed(model, guide, weights.guide_trace, args, kwargs, weights.joint, seed))
        for seed in (0, 1)
    ]
    return not any(_differ(values[0][key], values[1][key]) for key in values[0])


def _with_values(trace: Trace, value_of: Callable[[Any], Tensor]) -> Trace:
    """A copy of a guide's trace with other values at its random sites."""
    new = trace.copy()
    for name, site in sample_sites(trace).items():
        new.nodes[name] = {**site, "value": value_of(site)}
    return new


def _replayed(
    model: Program,
    guide: Program,
    drawn: Trace,
    args: Args,
    kwargs: Kwargs,
    joint: bool = False,
    seed: int = 0,
) -> LogWeights:
    """Log-weights at given draws; other noise of the programs follows the seed."""
    with seeded(seed, *args):
        at_draws = poutine.replay(guide, trace=drawn)
        return log_weights(model, at_draws, *args, joint=joint, **kwargs)


def _terms(weights: LogWeights) -> dict[tuple[str, str], Tensor]:
    found: Iterator[tuple[tuple[str, str], Tensor]] = (
        ((role, name), term.detach())
        for role, by_name in (("model", weights.log_p), ("guide", weights.log_q))
        for name, term in by_name.items()
    )
    return dict(found)


def _differ(a: Tensor, b: Tensor) -> bool:
    return not torch.allclose(a, b, rtol=_RTOL, atol=_RTOL, equal_nan=True)
