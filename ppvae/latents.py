"""The latents that a model and a guide share, and what Pyro may be told to do with them."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Delta
from torch.distributions import biject_to

from ppvae.pairs import Site, is_enumerated, is_global


def check_latents(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    """Raise ``ValueError`` unless model and guide have the same latent sites."""
    for site in (*model_sites.values(), *guide_sites.values()):
        if site["infer"] and not site["is_observed"]:
            _check_infer(site)
    latents = {name for name, site in model_sites.items() if not site["is_observed"]}
    if latents == guide_sites.keys() and len(latents) < len(model_sites):
        return  # nearly always
    # A latent that only the model has may be summed out there.
    latents -= {n for n in latents - guide_sites.keys() if is_enumerated(model_sites[n])}
    missing = sorted(latents - guide_sites.keys())
    extra = sorted(
        name
        for name in guide_sites.keys() - latents
        if not guide_sites[name]["infer"].get("is_auxiliary")
    )
    if missing:
        raise ValueError(
            f"the guide has no site for the model's latent {missing}; it has "
            f"{sorted(guide_sites)}. Sample every latent of the model in the guide, under the "
            'same name, or mark a discrete one in the model with infer={"enumerate": "parallel"}'
        )
    if extra:
        raise ValueError(
            f"the guide samples {extra}, which the model does not have as latent; the model's "
            f"latents are {sorted(latents)}. Remove the site from the guide, or give the model a "
            "density of it, r(a | z), under the same name"
        )
    if not any(site["is_observed"] for site in model_sites.values()):
        raise ValueError(
            "the model has no observed site, so there is nothing to fit; pass the data as "
            "obs=x to pyro.sample, and call the pair with x"
        )


def _check_infer(site: Site) -> None:
    """Refuse what Pyro would do with a latent that is not done here."""
    how = site["infer"].get("enumerate")
    if how not in (None, False, "parallel"):
        raise ValueError(
            f"site {site['name']!r}: infer={{'enumerate': {how!r}}} is not done here, and it would "
            'be drawn instead; use "parallel", or leave it out to draw the latent'
        )


def check_auxiliary(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    """Refuse a guide's own site with a density, unless it is the noise of all its latents.

    That is how Pyro's autoguides write a density: one draw, and latents that are functions of it,
    whose Jacobians are the log-densities of their ``Delta``. It may be the noise of the global
    latents alone, beside a guide of the others.
    """
    if guide_sites.keys() <= model_sites.keys():
        return
    fault = _noise_fault(model_sites, guide_sites)
    for apart in (True, False) if fault else ():
        p = {name: site for name, site in model_sites.items() if is_global(site) == apart}
        q = {name: site for name, site in guide_sites.items() if is_global(site) == apart}
        if _noise_fault(p, q):
            raise ValueError(fault)


def _noise_fault(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> str:
    """What is wrong with the guide's own sites; "": nothing."""
    names = guide_sites.keys() - model_sites.keys()
    noise = {n: guide_sites[n] for n in names if not _is_point(guide_sites[n]["fn"])}
    size = sum(site["value"].numel() for site in noise.values())
    if size == 0:  # a factor has no value
        return ""
    latents = names ^ guide_sites.keys()
    functions = all(_is_point(guide_sites[name]["fn"]) for name in latents)
    if functions and size == sum(_unconstrained_size(model_sites[name]) for name in latents):
        return ""
    return (
        f"the guide draws {sorted(noise)} beside the model's latents, and q(z | x) would take an "
        "integral over it, so no log-weight can be formed. Give the model a site of that name, "
        "with any density r(a | z): the bound is then one of the pair with both latents"
    )


def _is_point(fn: Any) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Delta)


def _unconstrained_size(site: Site) -> int:
    transform = biject_to(site["fn"].support)
    return torch.Size(transform.inverse_shape(site["value"].shape)).numel()
