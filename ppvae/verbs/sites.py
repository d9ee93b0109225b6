"""Sites of a pair as the verbs use them: means, most probable classes, values by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Categorical

from ppvae.diagnostics.rows import rows_first
from ppvae.distributions import Columns
from ppvae.global_latents import require_of_rows
from ppvae.pairs import DATA_PLATE, Program, Site, latent_parents, law, sample_sites, trace


class AtMeans(Messenger):
    """Puts a latent's mean, or its most probable class, in the place of its draw."""

    def __init__(self, active: bool) -> None:
        super().__init__()
        self.active = active

    def _pyro_sample(self, msg: Any) -> None:
        if not self.active or msg["is_observed"] or msg["value"] is not None:
            return
        fn = msg["fn"]
        try:
            value = typical(fn)
        except (NotImplementedError, AttributeError):
            return
        if value.isfinite().all():
            msg["value"], msg["done"] = value.expand(fn.shape()), True


def typical(fn: Any) -> Tensor:
    """The mean; where values are classes the most probable."""
    inside = law(fn)
    if isinstance(inside, Categorical):
        return inside.logits.argmax(-1)
    mean: Tensor = inside.mean
    if isinstance(inside, Columns):
        mean = mean.clone()
        for part, at in zip(inside.parts, inside.places, strict=True):
            if isinstance(part, Categorical):
                mean[..., list(at)] = part.logits.argmax(-1).to(mean)
    return mean


def mean_of(site: Site) -> tuple[Tensor, int]:
    """E z of a latent's law, and how many dims it has beyond the latent's own."""
    inside = law(site["fn"])
    if isinstance(inside, Categorical):
        return inside.probs, 1
    try:
        mean: Tensor = inside.mean
    except (NotImplementedError, AttributeError):
        return site["value"], 0
    return mean, 0


def needs_draws(guide: Program, args: tuple[Any, ...]) -> bool:
    """Whether a latent's law depends on another latent, or has no mean."""
    parents = latent_parents(guide, args)
    if any(parents.values()):
        return True
    return any(mean_of(site)[0] is site["value"] for site in latents(guide, args).values())


def latents(guide: Program, args: tuple[Any, ...]) -> dict[str, Site]:
    """The latent sites of one run of a guide, which are of rows."""
    sites = sample_sites(trace(guide, args, {}))
    require_of_rows(sites, "the codes of rows depend on its draw")
    return {name: site for name, site in sites.items() if not site["is_observed"]}


def rows_of(name: str, site: Site, values: Tensor, extra: int = 0) -> Tensor:
    """Values of a site, with the datapoints first."""
    if DATA_PLATE not in (frame.name for frame in site["cond_indep_stack"]):
        raise ValueError(f"site {name!r} lies outside the plate {DATA_PLATE!r}: it is of no row")
    return rows_first(site, values, extra)


def drawn_data(drawn: Any) -> Tensor:
    """What was drawn in the place of data."""
    found = {
        name: site
        for name, site in sample_sites(drawn).items()
        if site["infer"].get("was_observed")
    }
    if len(found) != 1:
        raise ValueError(f"generate draws one observed site, and the model has {sorted(found)}")
    ((name, site),) = found.items()
    return rows_of(name, site, site["value"])


def require_numbers(name: str, values: Tensor, start: int, cure: str = "") -> None:
    """Raise ``ValueError`` if a value is NaN, naming the row, counted from ``start``."""
    bad = values.isnan().flatten(1).any(1) if values.dim() > 1 else values.isnan()
    if bad.any():
        row = start + int(bad.nonzero()[0])
        cure = cure or ": look at this row, and for parameters that are NaN"
        raise ValueError(f"site {name!r} of row {row}{cure}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` unless an argument is one of some words."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, got {value!r}")


def dtype_of(args: Sequence[Any], values: Tensor) -> torch.dtype:
    """The dtype of what a mean of draws, which was summed in float64, goes out as."""
    own = next((a.dtype for a in args if isinstance(a, Tensor) and a.is_floating_point()), None)
    return own if own is not None and values.dtype == torch.float64 else values.dtype
