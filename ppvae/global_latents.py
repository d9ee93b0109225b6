r"""Latents of all rows at once: what lies outside the data plate is drawn once and weighed apart.

.. math:: \log p(X) \ge \mathbb E_{q(g)}\Big[\log p(g) - \log q(g)
          + \tfrac{N}{B} \sum_{n \le B} B_K(\log w_{1n}, \dots, \log w_{Kn} \mid g)\Big]

A global latent stands in no row's log-weight: K draws of it inside each row's logarithm would be no
bound on log p(X).
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ppvae.latents import check_auxiliary
from ppvae.pairs import DATA_PLATE, Site, is_enumerated, is_global
from ppvae.terms import log_density, sum_whole

Sites = Mapping[str, Site]
_CURE = (
    'put it inside `with pyro.plate("data", len(x)):` if it is of a row; a global latent goes with '
    "elbo.ELBO, IWELBO, MIWELBO, CIWELBO and RenyiELBO, with diagnostics.log_predictive and "
    "joint_evidence, with all others at one draw (diagnostics.given_globals), or with one weight "
    "for the whole batch: joint=True"
)


def global_names(model_sites: Sites, guide_sites: Sites) -> frozenset[str]:
    """The latents of a pair that lie outside the data plate; empty for nearly all pairs.

    Raises:
        ValueError: one lies outside in one program alone, is enumerated or scaled, or is the noise
            of local latents, too.
    """
    both = (("model", model_sites), ("guide", guide_sites))
    found = frozenset(name for _, sites in both for name, s in sites.items() if is_global(s))
    if not found:
        return found
    for role, sites in both:
        for name in found & sites.keys():
            site = sites[name]
            if not is_global(site):
                other = "guide" if role == "model" else "model"
                raise ValueError(
                    f"latent {name!r} lies in the plate {DATA_PLATE!r} in the {role}, and outside "
                    f"the plate {DATA_PLATE!r} in the {other}: draw it inside in both if it is of "
                    "a row, and outside in both if it is global"
                )
            if is_enumerated(site):
                raise ValueError(
                    f"latent {name!r} lies outside the plate {DATA_PLATE!r} and is marked to be "
                    "enumerated: what is summed out of all rows at once has one weight for the "
                    "whole batch, joint=True"
                )
            if isinstance(site["scale"], Tensor) or site["scale"] != 1:
                raise ValueError(
                    f"site {name!r} of the {role} is a global latent with the scale "
                    f"{site['scale']}: rows are scaled by their plate or by SVI(num_rows=...), and "
                    "nothing else; remove poutine.scale, and plates that subsample themselves"
                )
    own = [{name: s for name, s in sites.items() if name in found} for _, sites in both]
    noise = own[1].keys() - own[0].keys()
    if noise:  # of an autoguide: one draw that all else is a function of
        try:
            check_auxiliary(*own)
        except ValueError as error:
            raise refusal(noise, "is drawn for local latents, too") from error
    return found


def refusal(names: object, why: str = "is global") -> ValueError:
    """What to raise where one weight per datapoint is needed."""
    name = min(names)  # type: ignore[call-overload]
    return ValueError(
        f"site {name!r} lies outside the plate {DATA_PLATE!r}: it {why}, so there is no weight per "
        f"datapoint without it; {_CURE}"
    )


def require_of_rows(sites: Sites, why: str) -> None:
    """Raise ``ValueError`` for a global latent of one program, where ``why`` it has no place."""
    for name, site in sites.items():
        if is_global(site) and not site["infer"].get("was_observed"):
            raise ValueError(
                f"latent {name!r} lies outside the plate {DATA_PLATE!r}, so it is of no row: {why}"
                "; take the pair at one draw of it, diagnostics.given_globals(model, guide, x)"
            )


def log_densities(sites: Sites, names: frozenset[str], along_path: bool) -> dict[str, Tensor]:
    """The log-density of each global latent of a program, summed over its plates, 0-d, nats."""
    return {
        name: sum_whole(site, log_density(site, along_path))
        for name, site in sites.items()
        if name in names
    }
