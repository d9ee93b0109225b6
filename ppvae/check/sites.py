"""What can be wrong with the sites of a traced pair, with what was seen and the cure."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from ppvae.distributions import VonMises, WordCounts
from ppvae.distributions.supports import ByColumn, heads_that_fit
from ppvae.latents import check_auxiliary, check_latents
from ppvae.pairs import (
    DATA_PLATE,
    Site,
    is_discrete,
    is_global,
    kind,
    law,
    shown,
    unrounded,
    weighs_alike,
)
from ppvae.weights import LogWeights


def latent_faults(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> list[str]:
    """Latents that model and guide do not share, in name, event shape or support."""
    try:
        check_latents(model_sites, guide_sites)
        check_auxiliary(model_sites, guide_sites)
    except ValueError as error:
        return [str(error)]
    faults = []
    for name, q in guide_sites.items():
        if name not in model_sites:
            continue  # auxiliary
        p = model_sites[name]
        support = latent_support(p["fn"])
        if q["fn"].event_shape != p["fn"].event_shape:
            faults.append(
                f"latent {name!r}: event shape {tuple(q['fn'].event_shape)} in the guide, "
                f"{tuple(p['fn'].event_shape)} in the model; make the guide's last layer fit, and "
                "declare event dimensions with .to_event(1) in both"
            )
        elif q["value"].isnan().any():
            faults.append(
                f"latent {name!r}: the guide draws {int(q['value'].isnan().sum())} NaN of "
                f"{q['value'].numel()} values; look for NaN in the data or in what its network "
                "makes of them"
            )
        elif is_angle(p["fn"]) and not _stays_on_circle(q, guide_sites):
            faults.append(
                f"latent {name!r}: {kind(p['fn'])} of the model is an angle in (-pi, pi], and "
                f"{kind(q['fn'])} of the guide may draw each angle many times over, so that a "
                "bound may exceed log p(x); use dist.VonMises, or another law within (-pi, pi]"
            )
        elif support is not None and not support.check(q["value"]).all():
            faults.append(
                f"latent {name!r}: the guide draws values outside the model's support, "
                f"{describe(support)}: the prior is 0 there, log p - log q is -inf and so is the "
                "ELBO; use a guide distribution whose support is the model's, or within it"
            )
        elif is_discrete(q["fn"]) != is_discrete(p["fn"]) and not is_point(q["fn"]):
            faults.append(
                f"latent {name!r}: {kind(q['fn'])} in the guide and {kind(p['fn'])} in the model: "
                "a probability over a density bounds nothing; use a relaxed distribution in both, "
                "or a discrete one in both"
            )
        elif _is_weighed_rounded(q, p):
            faults.append(
                f"latent {name!r}: the guide gives the density of its draw before it is rounded, "
                f"and {kind(p['fn'])} of the model that of the rounded value; use "
                f"{kind(q['fn'])} in both"
            )
    return faults


def _stays_on_circle(q: Site, guide_sites: dict[str, Site]) -> bool:
    """Whether a guide's draws of an angle lie in one turn, whatever is drawn."""
    if is_point(q["fn"]):  # of an autoguide it is a function of noise that may be anything
        return not any(site["infer"].get("is_auxiliary") for site in guide_sites.values())
    support = latent_support(q["fn"])
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    ends = (getattr(support, end, math.inf) for end in ("lower_bound", "upper_bound"))
    return all((torch.as_tensor(end).abs() <= math.pi * (1 + 1e-6)).all() for end in ends)


def _is_weighed_rounded(q: Site, p: Site) -> bool:
    """Whether a straight-through draw of the guide has another density than its copies there only.

    A copy does not know what it was before it was rounded.
    """
    value = q["value"]
    if unrounded(value) is value:
        return False
    return weighs_alike(p, value, value.clone()) and not weighs_alike(q, value, value.clone())


def plate_faults(role: str, sites: dict[str, Site], others: dict[str, Site]) -> list[str]:
    """Sites outside the data plate, or with batch dimensions that no plate declares.

    Args:
        role, sites: of one program.
        others: of the other one; a latent that lies outside in both is global, which is no fault.
    """
    faults = []
    for name, site in sites.items():
        plates = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
        shape = tuple(site["fn"].batch_shape)
        is_agreed = is_global(site) and is_global(others.get(name, site))
        if DATA_PLATE not in plates and not is_agreed:
            faults.append(
                f"site {name!r} of the {role} lies outside the plate {DATA_PLATE!r}; put it inside "
                f'`with pyro.plate("{DATA_PLATE}", len(x)):` (of the autoguides, AutoNormal keeps '
                "plates), or, if it is global, call with joint=True, as svi.step(x, joint=True)"
            )
        elif any(shape[d] > 1 and d not in plates.values() for d in range(-len(shape), 0)):
            faults.append(
                f"site {name!r} of the {role} has batch shape {shape}, of which its plates "
                f"{plates} declare only some dimensions; declare the others as event dimensions, "
                "with .to_event(1) on its distribution"
                + (f'; a latent of rows belongs into the plate "{DATA_PLATE}"' if is_agreed else "")
            )
    return faults


def observation_fault(site: Site) -> str | None:
    """What is wrong with an observed value: its shape, or values outside the support."""
    fn, value = site["fn"], site["value"]
    expected = fn.batch_shape + fn.event_shape
    if value.shape != expected:
        if isinstance(fn, WordCounts) and value.dim() and value.shape[:-1] == expected[:-1]:
            words = value.shape[-1]
            return (
                f" counts {words} words, and the model's vocabulary has {expected[-1]}: count with "
                "its vocabulary (CountVectorizer(vocabulary=...)) before data.from_counts, or make "
                f"model and guide for {words} words"
            )
        return (
            f" has shape {tuple(value.shape)}, the likelihood generates {tuple(expected)}; check "
            "the output size of the decoder, the likelihood's event_dim, and that images are "
            "(N, C, H, W) or flattened as the decoder has them"
        )
    support = known_support(fn)
    try:
        if support is not None:
            check_support(value, support, hidden_values(site))
    except ValueError as error:
        return f": {error}"
    return None


def weight_faults(weights: LogWeights) -> list[str]:
    """Sites whose log-probability is not finite."""
    return [
        f"site {name!r} of the {role}: its log-probability is NaN or infinite for "
        f"{int(bad.sum())} of {bad.numel()} datapoints, the first is row "
        f"{int(bad.flatten(0, -2).any(0).nonzero()[0])}; scale the data to about unit size, and "
        "check the initial values and that no predicted scale over- or underflows"
        for role in ("model", "guide")
        for name, term in weights.all_terms(role).items()
        if (bad := ~(term < torch.inf)).any()
    ]


# ------------------------------------------------------------------------------ supports


def known_support(fn: Any) -> Any:
    """A distribution's support; None where it does not say, as flows of other libraries."""
    try:
        return fn.support
    except (NotImplementedError, AttributeError):
        return None


ANGLES = (VonMises, dist.VonMises, dist.SineSkewed, dist.SineBivariateVonMises)
CIRCLE = constraints.interval(-math.pi, math.pi)


def is_angle(fn: Any) -> bool:
    """Whether a distribution is of angles: its density is periodic, its draws lie in one turn."""
    inside = law(fn)
    if isinstance(inside, torch.distributions.MixtureSameFamily):
        return is_angle(inside.component_distribution)
    return isinstance(inside, ANGLES)


def latent_support(fn: Any) -> Any:
    """The support of a latent; None where it is not known.

    Of an angle it is one turn, though torch and Pyro call it the real line: over that a periodic
    density has no integral. A mixture's is that of its components, for which there is a map.
    """
    if is_angle(fn):
        return constraints.independent(CIRCLE, fn.event_dim) if fn.event_dim else CIRCLE
    support, mixture = known_support(fn), getattr(constraints, "MixtureSameFamilyConstraint", ())
    while isinstance(support, mixture):
        support = support.base_constraint
    return support


def check_support(values: Tensor, support: Any, hidden: Tensor | None = None) -> None:
    """Raise ``ValueError``, saying which, if values lie outside a distribution's support.

    Args:
        values: of the distribution's shape; NaN lies nowhere, and is judged by its density.
        support: the distribution's.
        hidden: of the values' shape, which of them a mask hides.
    """
    if support.check(values).all():
        return
    elementwise = support.base_constraint if hasattr(support, "base_constraint") else support
    inside = elementwise.check(values)
    ignored = values.isnan() if hidden is None else values.isnan() | hidden
    bad = ~(inside | ignored.reshape(*inside.shape, -1).any(-1))
    if not bad.any():
        return
    shown = values.masked_fill(ignored, math.nan) if values.is_floating_point() else values
    faults = _outside(shown, bad, elementwise)
    more = f"; and in {len(faults) - 3} columns more" if len(faults) > 3 else ""
    raise ValueError(
        f"{int(bad.sum())} of {bad.numel()} values lie outside the likelihood's support, "
        f"{'; '.join(faults[:3])}{more}. Rescale or binarise the data (data.load(..., "
        "binarize='dynamic')), or choose a likelihood that fits"
    )


def _outside(values: Tensor, bad: Tensor, support: Any) -> list[str]:
    """Each support that is left, where, by which values, and the heads that would take these."""
    if isinstance(support, ByColumn):
        return [
            f"column {support.names[i]!r}: {_left(values[..., i], bad[..., i], support.of(i))}"
            for i in bad.flatten(0, -2).any(0).nonzero().flatten().tolist()
        ]
    if bad.shape != values.shape:
        return [describe(support)]
    if bad.dim() != 2 or bad.any(0).all():
        return [_left(values, bad, support)]
    at = bad.any(0).nonzero().flatten()
    which = f"{at[:3].tolist()}{f' and {len(at) - 3} more' if len(at) > 3 else ''}"
    return [_left(values[:, at], bad[:, at], support, f" in columns {which}")]


def _left(values: Tensor, bad: Tensor, support: Any, where: str = "") -> str:
    examples = [round(value, 4) for value in values[bad].unique()[:3].tolist()]
    what, heads = heads_that_fit(values)
    cure = f" ({what}: conditionals.{' or '.join(heads[:3])})" if heads else ""
    return f"{describe(support)}, e.g. {examples}{where}{cure}"


def hidden_values(site: Site) -> Tensor | None:
    """Which values of an observed site its masks hide, of the value's shape; None: it has none."""
    visible = shown(site, site["value"])
    return None if visible is None else ~visible.expand(site["value"].shape)


_IN_WORDS = {
    "Boolean()": "{0, 1}",
    "Interval(lower_bound=0.0, upper_bound=1.0)": "[0, 1]",
    "GreaterThan(lower_bound=0.0)": "positive numbers",
    "GreaterThanEq(lower_bound=0.0)": "numbers from 0",
    "Real()": "real numbers",
}


def describe(support: Any) -> str:
    """A support as a text for messages."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    if support is CIRCLE:
        return "(-pi, pi]"
    name = str(support)
    if name == "IntegerGreaterThan(lower_bound=0)":
        return "0, 1, 2, ..."
    if name.startswith("IntegerInterval") and torch.as_tensor(support.upper_bound).numel() == 1:
        return f"{int(support.lower_bound)} .. {int(support.upper_bound)}"
    return _IN_WORDS.get(name, name)


def is_point(fn: Any) -> bool:
    """Whether it is a ``Delta``: a point, or a value with a density that it is given."""
    return isinstance(law(fn), dist.Delta)
