"""What can be wrong with the sites of a traced pair, with what was seen and the cure."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ppvae.distributions import WordCounts
from ppvae.latents import check_auxiliary, check_latents
from ppvae.pairs import DATA_PLATE, Site
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
        if q["fn"].event_shape != p["fn"].event_shape:
            faults.append(
                f"latent {name!r}: event shape {tuple(q['fn'].event_shape)} in the guide, "
                f"{tuple(p['fn'].event_shape)} in the model; make the guide's last layer fit, and "
                "declare event dimensions with .to_event(1) in both"
            )
        elif not p["fn"].support.check(q["value"]).all():
            faults.append(
                f"latent {name!r}: the guide draws values outside the model's support, "
                f"{describe(p['fn'].support)}; use a guide distribution with that support"
            )
    return faults


def plate_faults(role: str, sites: dict[str, Site]) -> list[str]:
    """Sites outside the data plate, or with batch dimensions that no plate declares."""
    faults = []
    for name, site in sites.items():
        plates = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
        shape = tuple(site["fn"].batch_shape)
        if DATA_PLATE not in plates:
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
            )
    return faults


def observation_fault(site: Site) -> str | None:
    """What is wrong with an observed value: its shape, or values outside the support."""
    fn, value = site["fn"], site["value"]
    expected = fn.batch_shape + fn.event_shape
    if value.shape != expected:
        if isinstance(fn, WordCounts) and value.dim() and value.shape[:-1] == expected[:-1]:
            V, words = expected[-1], value.shape[-1]
            return (
                f" counts {words} words, and the model's vocabulary has {V}; count the documents "
                "with the vocabulary that the model was made for, before data.from_counts "
                "(scikit-learn's CountVectorizer(vocabulary=...)), or make model and guide for "
                f"{words} words, as models.NVDM({words}, ...)"
            )
        return (
            f" has shape {tuple(value.shape)}, the likelihood generates {tuple(expected)}; check "
            "the output size of the decoder, the likelihood's event_dim, and that images are "
            "(N, C, H, W) or flattened as the decoder has them"
        )
    try:
        check_support(value, fn.support)
    except ValueError as error:
        return f": {error}"
    return None


def weight_faults(weights: LogWeights) -> list[str]:
    """Sites whose log-probability is not finite."""
    return [
        f"site {name!r} of the {role}: its log-probability is NaN or infinite for "
        f"{int(bad.sum())} of {bad.numel()} datapoints; scale the data to about unit size, and "
        "check the initial values and that no predicted scale over- or underflows"
        for role, terms in (("model", weights.log_p), ("guide", weights.log_q))
        for name, term in terms.items()
        if (bad := ~(term < torch.inf)).any()
    ]


def check_support(values: Tensor, support: Any) -> None:
    """Raise ``ValueError``, saying which, if values lie outside a distribution's support."""
    if support.check(values).all():
        return
    elementwise = support.base_constraint if hasattr(support, "base_constraint") else support
    bad = ~elementwise.check(values)
    examples = values[bad].unique()[:3].tolist() if bad.shape == values.shape else []
    seen = f", e.g. {[round(value, 4) for value in examples]}" if examples else ""
    raise ValueError(
        f"{int(bad.sum())} of {bad.numel()} values lie outside the likelihood's support, "
        f"{describe(elementwise)}{seen}. Rescale or binarise the data (data.load(..., "
        "binarize='dynamic')), or choose a likelihood that fits"
    )


def describe(support: Any) -> str:
    """A support as a text for messages."""
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    name = str(support)
    return {"Boolean()": "{0, 1}", "Interval(lower_bound=0.0, upper_bound=1.0)": "[0, 1]"}.get(
        name, name
    )
