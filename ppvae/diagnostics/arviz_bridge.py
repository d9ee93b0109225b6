"""Export to ArviZ: a pair's draws and numbers as data sets with named dimensions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from pyro.poutine import Trace
from pyro.poutine.replay_messenger import ReplayMessenger
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.arviz_versions import Variables, bundle, require_arviz
from ppvae.diagnostics.evidence import Evidence, refuse_point_masses, summarise
from ppvae.diagnostics.given_globals import Given, each_draw, joint_log_weight
from ppvae.diagnostics.rows import bound, check_at_least, check_pair_and_data, evaluating, take
from ppvae.enumeration import draw
from ppvae.intake import takes_rows
from ppvae.pairs import (
    DATA_PLATE,
    PARTICLE_PLATE,
    Args,
    Program,
    Site,
    evaluation_mode,
    own_path,
    particle_plate,
    reason,
    replay,
    sample_sites,
    seeded,
    structure,
    trace,
    unconditioned,
)
from ppvae.terms import laid_out, unmasked
from ppvae.weights import LogWeights, drawn_log_q, whole_weights
from ppvae.wrapped import argument_labels

_LARGEST = 125_000_000  # values in one export of a report: half a gigabyte in float32
_LABELS = {DATA_PLATE: "datapoint", PARTICLE_PLATE: "draw"}  # of plates; others keep their name


@takes_numbers
@takes_rows
def to_arviz(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_draws: int = 100,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    joint: bool = False,
    predictive: bool = True,
    num_particles: int = 100,
    max_rows: int = 10_000,
    seed: int | None = None,
    **kwargs: Any,
) -> Any:
    """Draws of the guide, the prior and the predictive distribution in ArviZ's format.

    Groups: ``posterior`` (the guide's draws of the latents; one that is summed out is drawn from
    its exact conditional given the others; the model's ``pyro.deterministic`` sites at them),
    ``sample_stats`` (``log_weight``, the importance weights of these draws, nats; ``khat``, ``ess``
    and ``log_evidence_se`` of each datapoint), ``log_likelihood`` (the *marginal* log p(x) of each
    datapoint by importance sampling, without chain and draw), ``posterior_predictive``, ``prior``
    (with ``pyro.deterministic`` sites), ``prior_predictive``, ``observed_data`` and
    ``constant_data`` (what the programs are conditioned on, e.g. y).

    There is one chain: the guide's draws are independent, so R-hat means nothing for them. The
    conditional log p(x | z) at draws of a local z is not written: LOO and WAIC computed from it
    are wrong by hundreds of nats. Compare models by their marginal log p(x) of held-out data.

    Of a pair with latents outside the data plate each draw is one of these, and of the locals given
    it. ``log_likelihood`` then has chain and draw, (chain, draw, datapoint): log p(x | g) with the
    locals integrated, of which ``az.loo`` is right. ``log_weight`` is that of all data at a draw.

    Args:
        model, guide: Pyro programs.
        *args: data, as both are called, e.g. ``x`` or ``x, y``; every draw is kept for every
            datapoint and pixel, so pass the few datapoints you want to look at.
        num_draws: draws per datapoint.
        coords: coordinate values by dimension, e.g. ``{"datapoint": names}``.
        dims: names of the event dimensions by site; by default ``latent`` for the only latent,
            ``z_dim`` for one of several, and ``x_dim`` for data; those of maps and images are
            numbered from the left, ``latent_0`` the channel, ``latent_1`` the row.
        joint: for a pair with latents outside the data plate: one weight per draw for the whole
            batch.
        predictive: draw x too; False where the likelihood cannot be drawn from.
        num_particles, max_rows: for latents outside the data plate: how many particles integrate
            the locals at each draw, and how many rows of these are computed at once.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        ``arviz.InferenceData`` (ArviZ 0.x) or ``xarray.DataTree`` (1.x); latents have dims
        ``(chain, draw, datapoint, latent)``. ``.to_netcdf(path)`` saves it, with the extra
        ``netcdf`` installed.

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
    model, guide = bound(model, guide, kwargs)
    require_arviz()
    check_at_least(1, num_draws=num_draws)
    _check_labels(coords, dims)
    check_at_least(1, num_particles=num_particles, max_rows=max_rows)
    check_pair_and_data(model, guide, args, joint=joint, with_globals=True)
    if not joint and structure(model, guide, args, {}).has_globals:
        with evaluating(model, guide, args, seed):
            found = each_draw(model, guide, args, num_draws, num_particles, max_rows)
            return bundle(_by_global(model, guide, args, found, dims, predictive), coords)
    weights, traces = _draw(model, guide, args, num_draws, joint, predictive, seed)
    numbers = summarise(weights.log_w) if num_draws > 1 else {}
    return _export(weights, traces, numbers, _constants(model, args, weights), coords, dims)


def export_rows(
    pair: tuple[Program, Program, Args],
    evidence: Evidence,
    datapoints: Any = None,
    num_draws: int = 100,
    coords: dict[str, Any] | None = None,
    dims: dict[str, list[str]] | None = None,
    predictive: bool = True,
    seed: int | None = None,
) -> Any:
    """:func:`to_arviz` for some datapoints of a report, with the report's own ``evidence``.

    See :meth:`ppvae.diagnostics.Report.to_arviz`.
    """
    require_arviz()
    check_at_least(1, num_draws=num_draws)
    model, guide, args = pair
    index = _chosen(datapoints, len(evidence.khat))
    width = sum(arg[0].numel() for arg in args if isinstance(arg, Tensor))
    if (size := 2 * num_draws * len(index) * width) > _LARGEST:
        raise ValueError(
            f"{num_draws} draws of {len(index)} datapoints are about {size:.1e} values; choose "
            "some, report.to_arviz(report.worst(10)), or fewer draws"
        )
    some = take(args, index)
    weights, traces = _draw(model, guide, some, num_draws, False, predictive, seed)
    wanted = ("log_evidence", "log_evidence_se", "khat", "ess")
    numbers = {name: getattr(evidence, name)[index] for name in wanted}
    coords = {"datapoint": index.numpy(), **(coords or {})}
    return _export(weights, traces, numbers, _constants(model, some, weights), coords, dims)


def _check_labels(coords: Any, dims: Any) -> None:
    """Raise ``TypeError`` unless coordinates and dimensions are given by name."""
    for name, value in (("coords", coords), ("dims", dims)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(f"{name} takes a dictionary, {{name: ...}}, got {value!r}")


def _chosen(datapoints: Any, count: int) -> Tensor:
    """Indices of datapoints, ``(n,)``, from indices, a slice, a mask or None for all."""
    if isinstance(datapoints, Tensor):
        datapoints = datapoints.cpu().numpy()
    wanted: Any = slice(None) if datapoints is None else datapoints
    try:
        index: Any = np.atleast_1d(np.arange(count)[wanted if np.size(wanted) else []])
    except IndexError:
        index = None
    if index is None or index.ndim > 1:
        raise ValueError(
            f"datapoints must be indices of the report's {count} datapoints, or a mask of them, "
            f"got {datapoints!r}"
        )
    if not len(index):
        raise ValueError("datapoints is empty: give indices, e.g. report.worst(10)")
    return torch.from_numpy(index)


# -- draws -------------------------------------------------------------------------------------


def _draw(
    model: Program,
    guide: Program,
    args: Args,
    num_draws: int,
    joint: bool,
    predictive: bool,
    seed: int | None,
) -> tuple[LogWeights, dict[str, Trace]]:
    """Log-weights, and traces by name: posterior, prior and, if wanted, predictive."""
    traces: dict[str, Trace] = {}
    with torch.no_grad(), evaluation_mode(model, guide), own_path(), seeded(seed, *args):
        weights = whole_weights(model, guide, args, {"joint": joint}, num_draws)
        traces["posterior"] = _with_summed_out(weights)
        with particle_plate(structure(model, guide, args, {}), num_draws, joint):
            _draw_model(model, args, traces, predictive)
    return weights, traces


def _draw_model(model: Program, args: Args, traces: dict[str, Trace], predictive: bool) -> None:
    """Add what the model draws, on its own and at the latents of ``traces["posterior"]``."""
    traces["conditional"] = replay(model, traces["posterior"], args, {})
    if not predictive:
        traces["prior"] = trace(model, args, {})
        return
    free = unconditioned(model)
    try:
        traces["predictive"] = replay(free, traces["posterior"], args, {})
        traces["prior"] = trace(free, args, {})
    except (ValueError, NotImplementedError) as error:
        raise ValueError(
            f"x cannot be drawn from the model: {reason(error)}. predictive=False exports "
            "the latents without posterior_predictive and prior_predictive"
        ) from error


def _by_global(
    model: Program,
    guide: Program,
    args: Args,
    found: Iterable[Given],
    dims: dict[str, list[str]] | None,
    predictive: bool,
) -> dict[str, Variables]:
    """All groups of a pair with global latents, draw by draw."""
    each: list[dict[str, Variables]] = []
    for given in found:
        refuse_point_masses(given.weights)
        at = ReplayMessenger(trace=given.drawn)(guide)
        weights = whole_weights(model, at, args, {}, 1, with_globals=True)
        traces = {"posterior": _with_summed_out(weights)}
        _draw_model(model, args, traces, predictive)
        groups = _groups(weights, traces, dims)
        name = min(weights.observed) if len(weights.observed) == 1 else "joint"
        log_p, log_w = given.log_p[None, None].numpy(), joint_log_weight(given)[None, None].numpy()
        groups["log_likelihood"] = {name: (["chain", "draw", "datapoint"], log_p)}
        groups["sample_stats"] = {"log_weight": (["chain", "draw"], log_w)}
        each.append(groups)
    together = {}
    for group, variables in each[0].items():
        together[group] = {
            name: (labels, values)
            if labels[:1] != ["chain"]
            else (labels, np.concatenate([groups[group][name][1] for groups in each], 1))
            for name, (labels, values) in variables.items()
        }
    return together | {"constant_data": _constants(model, args, weights)}


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


# -- data sets ---------------------------------------------------------------------------------


def _export(
    weights: LogWeights,
    traces: dict[str, Trace],
    numbers: Mapping[str, Tensor],
    constants: Variables,
    coords: dict[str, Any] | None,
    dims: dict[str, list[str]] | None,
) -> Any:
    """All groups; ``numbers`` are columns of :class:`~ppvae.diagnostics.Evidence`, or nothing."""
    observed = weights.observed
    groups = _groups(weights, traces, dims)

    def by_datapoint(values: Tensor, *labels: str) -> tuple[list[str], Any]:
        array = values.detach().cpu().numpy()
        # With joint=True there is one value for the whole batch.
        return ([*labels], array[..., 0]) if weights.joint else ([*labels, "datapoint"], array)

    statistics = {"log_weight": by_datapoint(weights.log_w[None], "chain", "draw")}
    if numbers:
        statistics |= {name: by_datapoint(numbers[name]) for name in ("khat", "ess")}
        name = min(observed) if len(observed) == 1 else "joint"
        groups["log_likelihood"] = {name: by_datapoint(numbers["log_evidence"])}
        # no log-likelihood: ArviZ would add it up as one
        statistics["log_evidence_se"] = by_datapoint(numbers["log_evidence_se"])
    groups |= {"sample_stats": statistics, "constant_data": constants}
    return bundle(groups, coords)


def _groups(
    weights: LogWeights, traces: dict[str, Trace], dims: dict[str, list[str]] | None
) -> dict[str, Variables]:
    """The groups of draws and of data."""
    observed = weights.observed
    known = weights.log_p.keys() | weights.global_p.keys()
    latents = [n for n in traces["posterior"].nodes if n in known and n not in observed]
    posterior, prior = (
        _variables(traces[name], latents, dims, draws=True, only="latent")
        for name in ("posterior", "prior")
    )
    posterior |= _deterministic(traces["conditional"], dims)
    prior |= _deterministic(traces["prior"], dims)
    groups = {"posterior": posterior, "prior": prior}
    groups["observed_data"] = _variables(weights.model_trace, observed, dims)
    if "predictive" in traces:
        for group, drawn in (("posterior", traces["predictive"]), ("prior", traces["prior"])):
            groups[f"{group}_predictive"] = _variables(drawn, observed, dims, draws=True)
    return groups


def _constants(model: Program, args: Args, weights: LogWeights) -> Variables:
    """The arguments that the programs are conditioned on: those that are not observed."""
    seen = [weights.model_trace.nodes[name]["value"] for name in weights.observed]
    return {
        name: (["datapoint", *(f"{name}_dim_{d}" for d in range(a.dim() - 1))], a.cpu().numpy())
        for name, a in zip(argument_labels(model, len(args)), args, strict=True)
        if isinstance(a, Tensor) and not any(a is value for value in seen)
    }


def _variables(
    drawn: Trace,
    wanted: Collection[str],
    dims: dict[str, list[str]] | None,
    draws: bool = False,
    only: str = "",
) -> Variables:
    """The wanted sites as arrays, of draws with dims of chain and draw; see :func:`event_names`."""
    sites = {name: site for name, site in sample_sites(drawn).items() if name in wanted}
    events = {name: site["fn"].event_dim for name, site in sites.items()}
    labels = event_names(events, dims, only)
    return {name: _variable(site, labels[name], draws) for name, site in sites.items()}


def _deterministic(drawn: Trace, dims: dict[str, list[str]] | None) -> Variables:
    """The ``pyro.deterministic`` sites of a trace of draws."""
    sites, events = {}, {}
    for name, site in drawn.nodes.items():
        if site["type"] != "sample" or not site["infer"].get("_deterministic"):
            continue
        value = site["value"]
        if not isinstance(value, Tensor):
            continue
        frames = [frame for frame in site["cond_indep_stack"] if frame.vectorized]
        depth = max((-frame.dim for frame in frames), default=0)
        events[name] = site["fn"].event_dim
        # Without event_dim Pyro takes all dims for the event, those of the plates, too.
        if events[name] >= value.dim() >= depth and all(
            value.shape[depth + frame.dim] in (1, frame.size) for frame in frames
        ):
            events[name] = value.dim() - depth
        sites[name] = site
    labels = event_names(events, dims)
    return {
        name: _variable(site, labels[name], draws=True, event_dim=events[name])
        for name, site in sites.items()
    }


def _variable(
    site: Site, event: list[str], draws: bool, event_dim: int | None = None
) -> tuple[list[str], Any]:
    """A site's value with named dimensions: its plates, then those of the event."""
    value = site["value"].detach().cpu()
    batch = value.dim() - (site["fn"].event_dim if event_dim is None else event_dim)
    plates = {f.dim: _LABELS.get(f.name, f.name) for f in site["cond_indep_stack"]}
    labels = {d: plates.get(d - batch, "") for d in range(batch)}  # "": broadcast, of size one
    kept = [d for d, label in labels.items() if label and (draws or label != "draw")]
    array = value.reshape([value.shape[d] for d in (*kept, *range(batch, value.dim()))]).numpy()
    named = [*(labels[d] for d in kept), *event]
    if not draws:
        return named, array
    if "draw" not in named:
        array, named = array[None], ["draw", *named]
    return ["chain", *named], array[None]


def event_names(
    event_dims: Mapping[str, int], dims: dict[str, list[str]] | None = None, only: str = ""
) -> dict[str, list[str]]:
    """What the event dims of each variable are called: as ``dims`` says, or ``z_dim``.

    Args:
        event_dims: by variable, how many there are.
        dims: what a user calls them.
        only: what those of an only variable are called instead, unless it has that name itself.
    """
    alone = only and len(event_dims) == 1 and only not in event_dims
    stems = {name: only if alone else f"{name}_dim" for name in event_dims}
    default = {
        name: [stems[name]] if count == 1 else [f"{stems[name]}_{d}" for d in range(count)]
        for name, count in event_dims.items()
    }
    return default | {name: asked for name, asked in (dims or {}).items() if name in default}
