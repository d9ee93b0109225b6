"""ArviZ export of a pair's draws, with named dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppvae.check import check_tensors, names
from ppvae.pairs import (
    PARTICLE_PLATE,
    Site,
    evaluation_mode,
    own_path,
    particle_plate,
    replay,
    sample_sites,
    seeded,
    structure,
)
from ppvae.weights import log_weights


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 100,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    seed: int | None = None,
) -> Any:
    """Draws of the guide, the prior and the predictive, as ArviZ has them.

    Groups: ``posterior`` (the guide's draws of the latents), ``sample_stats`` (``log_weight``, the
    importance weights of these draws, nats), ``posterior_predictive``, ``prior``,
    ``prior_predictive``, ``observed_data`` and ``constant_data`` (what the programs are
    conditioned on, e.g. y). There is one chain: the guide's draws are independent, so R-hat means
    nothing for them. No ``log_likelihood`` is written: log p(x | z) at draws of a local z is not
    what model comparison by LOO needs, and gives wrong answers.

    Args:
        model, guide: Pyro programs.
        *args: data, as both are called, e.g. ``x`` or ``x, y``; every draw is kept for every
            datapoint and pixel, so pass the few datapoints you want to look at.
        num_draws: draws per datapoint.
        coords: coordinate values by dimension, e.g. ``{"datapoint": names}``.
        dims: names of the event dimensions by site; by default ``latent`` for the only latent,
            ``z_dim`` for one of several, and ``x_dim`` for data.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x); latents have dims
        ``(chain, draw, datapoint, latent)``. ``.to_netcdf(path)`` saves it.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, diagnostics, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> idata = diagnostics.to_arviz(model, guide, torch.ones(5, 4), num_draws=10)
        >>> dict(idata.posterior["z"].sizes)
        {'chain': 1, 'draw': 10, 'datapoint': 5, 'latent': 2}
    """
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    check_tensors(model, args)
    free = poutine.uncondition(model)
    with torch.no_grad(), evaluation_mode(model, guide), own_path():
        with seeded(seed, *args):
            weights = log_weights(model, guide, *args, num_particles=num_draws)
            with particle_plate(structure(model, guide, args, {}), num_draws):
                predictive = replay(free, weights.guide_trace, args, {})
                prior = poutine.trace(free).get_trace(*args)

    observed = weights.observed
    latents = [name for name in weights.latents if name in weights.log_p]
    # A dimension may not have a variable's name, so the only latent's own name decides.
    alone = len(latents) == 1 and latents[0] != "latent"
    stems = {name: "latent" if alone else f"{name}_dim" for name in latents}
    stems |= {name: f"{name}_dim" for name in observed}

    def group(trace: Trace, keep: Any, draws: bool = True) -> dict[str, tuple[list[str], Any]]:
        sites = sample_sites(trace)
        return {
            n: _variable(sites[n], (dims or {}).get(n), stems[n], num_draws if draws else None)
            for n in sites
            if n in keep
        }

    groups = {
        "posterior": group(weights.guide_trace, latents),
        "sample_stats": {
            "log_weight": (
                ["chain", "draw", "datapoint"],
                weights.log_w.detach().cpu().numpy()[None],
            )
        },
        "posterior_predictive": group(predictive, observed),
        "prior": group(prior, latents),
        "prior_predictive": group(prior, observed),
        "observed_data": group(weights.model_trace, observed, draws=False),
    }
    seen = [weights.model_trace.nodes[n]["value"] for n in observed]
    given = {
        name: (["datapoint", *(f"{name}_dim_{d}" for d in range(a.dim() - 1))], a.cpu().numpy())
        for name, a in zip(names(model, args), args, strict=True)
        if isinstance(a, Tensor) and not any(a is value for value in seen)
    }
    if given:
        groups["constant_data"] = given
    return _bundle(groups, coords or {})


def _variable(
    site: Site, event_names: list[str] | None, stem: str, num_draws: int | None
) -> tuple[list[str], Any]:
    """A site's value with its dimensions named: plates by their name, events by ``stem``."""
    value, event_dim = site["value"], site["fn"].event_dim
    plates = {f.dim: f.name for f in site["cond_indep_stack"] if f.dim is not None}
    plates = {d: {"data": "datapoint", PARTICLE_PLATE: "draw"}.get(n, n) for d, n in plates.items()}
    batch_dim = value.dim() - event_dim
    kept, labels = [], []
    for position in range(batch_dim):
        dim = position - batch_dim
        label = plates.get(dim)
        if label is None or (label == "draw" and num_draws is None):
            continue  # a broadcast dim of size one
        kept.append(position)
        labels.append(label)
    if event_names is None:
        event_names = [stem] if event_dim == 1 else [f"{stem}_{d}" for d in range(event_dim)]
    shape = [value.shape[p] for p in kept] + list(value.shape[batch_dim:])
    array = value.detach().cpu().reshape(shape).numpy()
    if num_draws is None:
        return [*labels, *event_names], array
    if "draw" not in labels:
        array, labels = array[None], ["draw", *labels]
    return ["chain", *labels, *event_names], array[None]


def _bundle(groups: dict[str, dict[str, Any]], coords: dict[str, Any]) -> Any:
    """``InferenceData`` on ArviZ 0.x, ``DataTree`` on 1.x, from plain xarray data sets."""
    import arviz
    import xarray

    datasets: dict[str, Any] = {}
    for name, variables in groups.items():
        sizes = {d: n for ds, a in variables.values() for d, n in zip(ds, a.shape, strict=True)}
        index = {d: coords.get(d, np.arange(n)) for d, n in sizes.items()}
        datasets[name] = xarray.Dataset(variables, coords=index)
    if arviz.__version__.startswith("0."):
        return arviz.InferenceData(**datasets)
    return xarray.DataTree.from_dict(datasets)
