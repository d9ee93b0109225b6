"""ArviZ export: a pair's draws, a report's numbers and Markov chains, with named dimensions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppvae.check.pair import check_tensors, names
from ppvae.diagnostics.evidence import Evidence, count_rows, reason, summarise, take
from ppvae.enumeration import draw
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
from ppvae.terms import laid_out, unmasked
from ppvae.weights import LogWeights, drawn_log_q, log_weights

if TYPE_CHECKING:
    from ppvae.diagnostics.chains import PosteriorDraws
    from ppvae.diagnostics.report import Report

_LARGEST = 125_000_000  # values in one export of a report: half a gigabyte in float32


def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 100,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    joint: bool = False,
    predictive: bool = True,
    seed: int | None = None,
) -> Any:
    """Draws of the guide, the prior and the predictive, as ArviZ has them.

    Groups: ``posterior`` (the guide's draws of the latents; one that is summed out is drawn from
    its exact conditional given the others), ``sample_stats`` (``log_weight``, the importance
    weights of these draws, nats; ``khat`` and ``ess`` of each datapoint), ``log_likelihood`` (the
    *marginal* log p(x) of each datapoint by importance sampling and its standard error, without
    chain and draw), ``posterior_predictive``, ``prior``, ``prior_predictive``, ``observed_data``
    and ``constant_data`` (what the programs are conditioned on, e.g. y).

    There is one chain: the guide's draws are independent, so R-hat means nothing for them. The
    conditional log p(x | z) at draws of a local z is not written: LOO and WAIC computed from it
    are wrong by hundreds of nats. Compare models by their marginal log p(x) of held-out data.

    Args:
        model, guide: Pyro programs.
        *args: data, as both are called, e.g. ``x`` or ``x, y``; every draw is kept for every
            datapoint and pixel, so pass the few datapoints you want to look at.
        num_draws: draws per datapoint.
        coords: coordinate values by dimension, e.g. ``{"datapoint": names}``.
        dims: names of the event dimensions by site; by default ``latent`` for the only latent,
            ``z_dim`` for one of several, and ``x_dim`` for data.
        joint: for a pair with latents outside the data plate: one weight per draw for the whole
            batch.
        predictive: draw x too; False where the likelihood cannot be drawn from.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x); latents have dims
        ``(chain, draw, datapoint, latent)``. ``.to_netcdf(path)`` saves it.

    Raises:
        ImportError: ArviZ is not installed.
        ValueError: bad arguments or data; x cannot be drawn.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, diagnostics, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> idata = diagnostics.to_arviz(model, guide, torch.ones(5, 4), num_draws=10)
        >>> dict(idata.posterior["z"].sizes)
        {'chain': 1, 'draw': 10, 'datapoint': 5, 'latent': 2}
    """
    require_arviz()
    return _export(
        model, guide, args, num_draws, coords, dims, joint, predictive, seed, evidence=None
    )


def _export(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    num_draws: int,
    coords: dict[str, Any] | None,
    dims: dict[str, list[str]] | None,
    joint: bool,
    predictive: bool,
    seed: int | None,
    evidence: Evidence | None,
) -> Any:
    """As :func:`to_arviz`, with the evidence given or estimated from these draws."""
    args = tuple(args)
    if num_draws < 1:
        raise ValueError(f"num_draws must be at least 1, got {num_draws}")
    check_tensors(model, args)
    count_rows(args)
    free = poutine.uncondition(model)
    traces: dict[str, Trace] = {}
    with torch.no_grad(), evaluation_mode(model, guide), own_path():
        with seeded(seed, *args):
            weights = log_weights(model, guide, *args, num_particles=num_draws, joint=joint)
            drawn = _with_summed_out(weights)
            with particle_plate(structure(model, guide, args, {}), num_draws):
                if predictive:
                    try:
                        traces["predictive"] = replay(free, drawn, args, {})
                        traces["prior"] = poutine.trace(free).get_trace(*args)
                    except (ValueError, NotImplementedError) as error:
                        raise ValueError(
                            f"x cannot be drawn from the model: {reason(error)}. "
                            "predictive=False exports the latents without posterior_predictive "
                            "and prior_predictive"
                        ) from error
                else:
                    traces["prior"] = poutine.trace(model).get_trace(*args)

    observed = weights.observed
    latents = [n for n in drawn.nodes if n in weights.log_p and n not in observed]
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

    statistics = {"log_weight": (["chain", "draw", "datapoint"], weights.log_w[None])}
    likelihood = {}
    if evidence is None and num_draws > 1:
        evidence = summarise(weights.log_w)
    if evidence is not None:
        name = min(observed) if len(observed) == 1 else "joint"
        likelihood[name] = (["datapoint"], evidence.log_evidence)
        likelihood[f"{name}_se"] = (["datapoint"], evidence.log_evidence_se)
        statistics |= {"khat": (["datapoint"], evidence.khat), "ess": (["datapoint"], evidence.ess)}
    groups = {
        "posterior": group(drawn, latents),
        "sample_stats": {n: _plain(v, joint) for n, v in statistics.items()},
        "log_likelihood": {n: _plain(v, joint) for n, v in likelihood.items()},
        "posterior_predictive": group(traces["predictive"], observed) if predictive else {},
        "prior": group(traces["prior"], latents),
        "prior_predictive": group(traces["prior"], observed) if predictive else {},
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
    return _bundle(
        {name: variables for name, variables in groups.items() if variables}, coords or {}
    )


def _plain(variable: tuple[list[str], Tensor], joint: bool) -> tuple[list[str], Any]:
    """As an array; without datapoints where there is one value per batch."""
    labels, values = variable
    if joint:
        return labels[:-1], values[..., 0].detach().cpu().numpy()
    return labels, values.detach().cpu().numpy()


def _with_summed_out(weights: LogWeights) -> Trace:
    """The guide's trace, with a draw of every latent that was summed out.

    Given the drawn latents and x, the summed-out ones have the exact conditional
    p(c | z, x), proportional to p(x, c, z) as a function of c.
    """
    drawn = weights.guide_trace.copy()
    if not weights.enumerated:
        return drawn
    drawn_log_q(weights)  # refuses a drawn latent that depends on one that is summed out
    chosen = draw(weights.model_factors().values(), weights.enumerated.values())
    for name, letter in weights.enumerated.items():
        site = weights.model_trace.nodes[name]
        support = unmasked(site["fn"]).enumerate_support(expand=False)
        event = support.shape[support.dim() - site["fn"].event_dim :]
        index = (
            laid_out(chosen[letter], site, weights.letters) if letter in chosen else torch.tensor(0)
        )
        drawn.nodes[name] = {**site, "value": support.reshape(-1, *event)[index], "infer": {}}
    return drawn


def of_report(
    report: Report,
    datapoints: Any = None,
    num_draws: int = 100,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    predictive: bool = True,
    seed: int | None = None,
) -> Any:
    """See :meth:`ppvae.diagnostics.Report.to_arviz`."""
    require_arviz()
    model, guide, args = report.pair
    rows = len(report.khat)
    if isinstance(datapoints, Tensor):
        datapoints = datapoints.cpu().numpy()
    wanted: Any = slice(None) if datapoints is None else datapoints
    try:
        index = torch.as_tensor(np.arange(rows)[wanted] if np.size(wanted) else [])
    except IndexError:
        index = torch.empty(0, 0)
    if index.dim() > 1:
        raise ValueError(
            f"datapoints must be indices of the report's {rows} datapoints, or a mask of them, got "
            f"{datapoints!r}"
        )
    index = index.reshape(-1)
    if not len(index):
        raise ValueError("datapoints is empty: give indices, e.g. report.worst(10)")
    width = sum(arg[0].numel() for arg in args if isinstance(arg, Tensor))
    if (size := 2 * num_draws * len(index) * width) > _LARGEST:
        raise ValueError(
            f"{num_draws} predictive draws of {len(index)} datapoints are about {size:.1e} values; "
            "choose some, report.to_arviz(report.worst(10)), or fewer draws, or predictive=False"
            if predictive
            else f"{num_draws} draws of {len(index)} datapoints are too many; choose some"
        )
    columns = {
        field.name: getattr(report, field.name)[index]
        for field in fields(Evidence)
        if field.name != "num_particles"
    }
    evidence = Evidence(**columns, num_particles=report.num_particles)
    coords = {"datapoint": index.numpy(), **(coords or {})}
    some = take(args, index)
    return _export(model, guide, some, num_draws, coords, dims, False, predictive, seed, evidence)


def elpd_of_report(report: Report) -> Any:
    """See :meth:`ppvae.diagnostics.Report.to_elpd`."""
    require_arviz()
    import arviz
    import xarray

    count = len(report.khat)
    points, k = (
        xarray.DataArray(v.numpy(), dims=["datapoint"], coords={"datapoint": np.arange(count)})
        for v in (report.log_evidence, report.khat)
    )
    common = {
        "se": report.mean_se * count,
        "n_samples": report.num_particles,
        "n_data_points": count,
        "warning": bool(report.unreliable > 0),
        "pareto_k": k,
        "scale": "log",
        "good_k": 0.7,
    }
    total = float(points.sum())
    if arviz.__version__.startswith("0."):
        from arviz.stats.stats_utils import ELPDData

        values = {"elpd_loo": total, "se": 0.0, "p_loo": np.nan, "loo_i": points, **common}
        return ELPDData(data=list(values.values()), index=list(values))
    from arviz_stats.utils import ELPDDataLOO  # type: ignore[import-not-found, unused-ignore]

    return ELPDDataLOO(elpd=total, p=np.nan, elpd_i=points, **common)


def chains_to_arviz(
    draws: PosteriorDraws,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
) -> Any:
    """Markov chains as ArviZ has them: ``posterior`` with chains, ``sample_stats`` with ``lp``.

    ArviZ's own R-hat and effective sample sizes are then those of each datapoint.

    Args:
        draws: what :func:`ppvae.diagnostics.hmc` and its like return.
        coords, dims: as :func:`to_arviz` has them.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x).

    Raises:
        ImportError: ArviZ is not installed.
    """
    require_arviz()
    alone = len(draws.draws) == 1 and next(iter(draws.draws)) != "latent"
    posterior = {}
    for name, values in draws.draws.items():
        stem, count = "latent" if alone else f"{name}_dim", values.dim() - 3
        event = (dims or {}).get(name)
        if event is None:
            event = [stem] if count == 1 else [f"{stem}_{d}" for d in range(count)]
        posterior[name] = (["chain", "draw", "datapoint", *event], values.numpy())
    lp = (["chain", "draw", "datapoint"], draws.log_joint.numpy())
    return _bundle({"posterior": posterior, "sample_stats": {"lp": lp}}, coords or {})


def require_arviz() -> None:
    """Raise ``ImportError`` with the cure before any work, if ArviZ is missing."""
    try:
        import arviz  # noqa: F401
    except ImportError as error:
        raise ImportError("this needs ArviZ: pip install arviz") from error


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
