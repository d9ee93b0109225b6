"""Log-weights: the only place in the package that forms log p(x, z) - log q(z | x).

Every bound and gradient estimator, and every diagnostic, is a function of what
:func:`log_weights` returns, so training and diagnosis cannot disagree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, cast
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from pyro.poutine import Trace
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae.program import local_parameters, module_of

DATA_PLATE = "data"
_PARTICLE_PLATE = "particles"
Site = dict[str, Any]
# How deep the plates of a (model, guide) pair nest, found once per pair.
_nesting: WeakKeyDictionary[Any, WeakKeyDictionary[Any, int]] = WeakKeyDictionary()
# Which latents of a pair have a valid closed-form KL, found once per pair.
_valid: WeakKeyDictionary[Any, WeakKeyDictionary[Any, frozenset[str]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class LogWeights:
    r"""Log-weights of K particles for each of N datapoints, and the terms they are made of.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n)

    Attributes:
        log_w: ``(K, N)``, nats, masked, not scaled by any plate or ``poutine.scale``.
        log_p: model terms by site name, latent and observed, each broadcastable to ``(K, N)``.
        log_q: guide terms by site name.
        observed: names of the observed sites.
        scale: N_total / N of the data plate: 1 for full data and for hand-made minibatches. It
            belongs outside the logarithm of a bound.
        site_scales: what ``poutine.scale`` or an inner subsampled plate put on single sites,
            beyond ``scale``, by ``("model" | "guide", site name)``; empty for an ordinary pair.
            Only a linear bound may use it.
        joint: whether there is one weight per batch (N = 1) instead of one per datapoint.
        guide_trace, model_trace: the Pyro traces, with the draws.
        pair: model, guide, args and kwargs they came from.
    """

    log_w: Tensor
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    observed: frozenset[str]
    scale: float
    site_scales: dict[tuple[str, str], Any] = field(repr=False)
    joint: bool
    guide_trace: Trace = field(repr=False)
    model_trace: Trace = field(repr=False)
    pair: tuple[Any, Any, tuple[Any, ...], dict[str, Any]] = field(repr=False)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the latent sites, in the guide's order."""
        return tuple(self.log_q)

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_w.shape[0]

    def stop_guide(self) -> LogWeights:
        """The same values, without the gradient of log q: that of the model's terms is left."""
        log_q = {name: term.detach() for name, term in self.log_q.items()}
        log_w = cast(Tensor, sum(self.log_p.values()) - sum(log_q.values()))
        return replace(self, log_w=log_w, log_q=log_q)

    def kl_valid(self) -> frozenset[str]:
        """Latents whose closed-form KL(q || p) has the expectation of log q - log p.

        That fails for a latent on which, in the guide, a latent depends that the model draws it
        from: the usual bottom-up guide. Found by tracking what each site's distribution is computed
        from (never by the order of sites), once per pair.
        """
        if len(self.log_q) == 1:
            return frozenset(self.log_q)
        return _kl_valid(*self.pair)


def log_weights(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1,
    joint: bool = False,
    **kwargs: Any,
) -> LogWeights:
    r"""Draw K particles per datapoint from the guide and weigh them under the model.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n),\qquad
              z_{kn} \sim q(z \mid x_n)

    Args:
        model: a Pyro program; its latents and observations live in a plate named ``"data"``.
        guide: a Pyro program with the same latents, taking the same arguments.
        *args: what both are called with, e.g. ``x`` or ``x, y``.
        num_particles: K >= 1, drawn in one vectorised pass.
        joint: for a pair with latents outside the data plate: one weight per particle for the
            whole batch, ``log_w`` of shape ``(K, 1)``.
        **kwargs: passed to both programs.

    Returns:
        :class:`LogWeights`, with ``log_w`` of shape ``(K, N)`` in nats.

    Raises:
        ValueError: the sites of model and guide differ, a site lies outside the data plate, or a
            program calls ``pyro.param``; the message names the site and the cure.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, ppvae
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):  # the exact posterior
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5 ** 0.5))
        >>> x = torch.tensor([0., 2.])
        >>> weights = ppvae.log_weights(model, guide, x, num_particles=5)
        >>> weights.log_w.shape
        torch.Size([5, 2])
        >>> exact = dist.Normal(0., 2 ** 0.5).log_prob(x)
        >>> torch.allclose(weights.log_w, exact.expand(5, 2), atol=1e-5)  # constant, and log p(x)
        True
    """
    if num_particles < 1:
        raise ValueError(f"num_particles must be at least 1, got {num_particles}")
    with own_path(), particle_plate(model, guide, args, kwargs, num_particles):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        model_trace = replay(model, guide_trace, args, kwargs)
        return _weigh(model_trace, guide_trace, num_particles, joint, (model, guide, args, kwargs))


def log_weights_at_leaves(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1,
    joint: bool = False,
    **kwargs: Any,
) -> tuple[LogWeights, list[tuple[Tensor, Tensor]]]:
    """Log-weights as a function of detached draws, for gradients along the sample path only.

    Args:
        model, guide, args, num_particles, joint, kwargs: as in :func:`log_weights`.

    Returns:
        The log-weights at leaves z' = z.detach(), and the pairs ``(z, z')``: z still depends on
        the guide's parameters. With several latents the guide is replayed at z', so that each
        level sees the leaves above it.
    """
    with own_path(), particle_plate(model, guide, args, kwargs, num_particles):
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        guide_trace, pairs = drawn.copy(), []
        for name, site in sample_sites(drawn).items():
            leaf = site["value"].detach().requires_grad_(site["value"].requires_grad)
            guide_trace.nodes[name] = {**site, "value": leaf}
            if leaf.requires_grad:
                pairs.append((site["value"], leaf))
        if len(pairs) > 1:
            guide_trace = replay(guide, guide_trace, args, kwargs)
        model_trace = replay(model, guide_trace, args, kwargs)
        weights = _weigh(
            model_trace, guide_trace, num_particles, joint, (model, guide, args, kwargs)
        )
        return weights, pairs


def replay(
    program: Callable[..., Any], trace: Trace, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Trace:
    """The trace of a program run at the draws of another."""
    replayed = poutine.trace(poutine.replay(program, trace=trace)).get_trace(*args, **kwargs)
    return cast(Trace, replayed)


@contextmanager
def own_path() -> Iterator[None]:
    """:func:`~ppvae.program.local_parameters`, unless a stock Pyro engine is listening."""
    with nullcontext() if am_i_wrapped() else local_parameters():
        yield


def _weigh(
    model_trace: Trace, guide_trace: Trace, num_particles: int, joint: bool, pair: Any
) -> LogWeights:
    """Log-weights from a guide's trace and the model's trace replayed against it."""
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    observed = frozenset(name for name, site in model_sites.items() if site["is_observed"])
    check_latents(model_sites, guide_sites)

    scale, site_scales = _scales({"model": model_sites, "guide": guide_sites}, joint)
    log_p = {name: _log_prob(site, joint) for name, site in model_sites.items()}
    log_q = {name: _log_prob(site, joint) for name, site in guide_sites.items()}
    log_w = cast(Tensor, sum(log_p.values()) - sum(log_q.values()))
    if log_w.shape[0] != num_particles:  # no latent at all: every particle is the same
        log_w = log_w.expand(num_particles, -1)
    return LogWeights(
        log_w, log_p, log_q, observed, scale, site_scales, joint, guide_trace, model_trace, pair
    )


def sample_sites(trace: Trace) -> dict[str, Site]:
    """The random sites of a trace: no plates' subsample sites, no ``pyro.deterministic``."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def check_latents(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    """Raise ``ValueError`` unless model and guide have the same latent sites."""
    latents = {name for name, site in model_sites.items() if not site["is_observed"]}
    if latents == guide_sites.keys() and model_sites.keys() > latents:
        return
    missing = sorted(latents - guide_sites.keys())
    auxiliary = {n for n, site in guide_sites.items() if site["infer"].get("is_auxiliary")}
    extra = sorted(guide_sites.keys() - latents - auxiliary)
    if missing:
        raise ValueError(
            f"the guide has no site for the model's latent {missing}; it has "
            f"{sorted(guide_sites)}. Sample every latent of the model in the guide, under the "
            "same name"
        )
    if extra:
        raise ValueError(
            f"the guide samples {extra}, which the model does not have as latent; the model's "
            f"latents are {sorted(latents)}. Remove the site from the guide, or mark it with "
            "infer={'is_auxiliary': True}"
        )
    if not model_sites.keys() - latents:
        raise ValueError(
            "the model has no observed site, so there is nothing to fit; pass the data as "
            "obs=x to pyro.sample, and call the pair with x"
        )


def _log_prob(site: Site, joint: bool) -> Tensor:
    """log-prob of one site: unscaled, masked, at least float32, ``(K or 1, N or 1)``."""
    log_prob: Tensor = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    if log_prob.dtype in (torch.float16, torch.bfloat16):
        log_prob = log_prob.float()
    return reduce_site(site, log_prob, joint)


def reduce_site(site: Site, values: Tensor, joint: bool = False) -> Tensor:
    """Mask values of a site's batch shape, and sum them to ``(K or 1, N or 1)``."""
    mask = site["mask"]
    if mask is False:
        values = torch.zeros_like(values)
    elif mask is not None and mask is not True:
        values = torch.where(mask, values, values.new_zeros(()))

    data_dim, particle_dim = _dims(site)
    if joint:
        data_dim = None
    elif data_dim is None:
        raise ValueError(
            f"site {site['name']!r} lies outside the plate {DATA_PLATE!r}, so there is no weight "
            f"per datapoint (its plates: {[f.name for f in site['cond_indep_stack']]}). Put it "
            f'inside `with pyro.plate("{DATA_PLATE}", len(x)):` in both model and guide; if it is '
            "a global latent, ask for one weight per batch with joint=True"
        )
    kept = [dim for dim in (particle_dim, data_dim) if dim is not None]
    width = max([values.dim(), *(-dim for dim in kept)])
    values = values.reshape((1,) * (width - values.dim()) + values.shape)
    summed = [dim for dim in range(-width, 0) if dim not in kept]
    if summed:
        values = values.sum(summed)
    if particle_dim is None:
        values = values.unsqueeze(0)
    if data_dim is None:
        values = values.unsqueeze(-1)
    return values


def _dims(site: Site) -> tuple[int | None, int | None]:
    """Where the data plate and the particle plate lie at a site (negative dims)."""
    data_dim = particle_dim = None
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE:
            data_dim = frame.dim
        elif frame.name == _PARTICLE_PLATE:
            particle_dim = frame.dim
    if particle_dim is not None and data_dim is not None and particle_dim > data_dim:
        raise ValueError(
            f"site {site['name']!r}: its plates nest deeper than when this pair was first run "
            "(a plate lies left of the particles); give inner plates explicit dims, e.g. "
            f'pyro.plate("pixels", P, dim=-2) with pyro.plate("{DATA_PLATE}", N, dim=-1)'
        )
    return data_dim, particle_dim


def _scales(
    programs: dict[str, dict[str, Site]], joint: bool
) -> tuple[float, dict[tuple[str, str], Any]]:
    """The data plate's N_total / N, and what single sites carry beyond it."""
    sites = [(program, site) for program, by_name in programs.items() for site in by_name.values()]
    plates = {
        (frame.full_size, frame.size): program
        for program, site in sites
        for frame in site["cond_indep_stack"]
        if frame.name == DATA_PLATE
    }
    if len(plates) > 1:
        seen = ", ".join(f"{b} of {n} rows in the {p}" for (n, b), p in plates.items())
        raise ValueError(
            f"the plate {DATA_PLATE!r} differs between sites ({seen}), so their terms would be "
            "scaled differently; give model and guide the same plate (size=..., subsample)"
        )
    scale = 1.0
    for full_size, size in plates:
        if not joint:
            scale = full_size / size
    site_scales = {}
    for program, site in sites:
        # A tensor may hold anything: looking would stall the device, so it always counts.
        if isinstance(site["scale"], Tensor) or abs(site["scale"] - scale) > 1e-9 * scale:
            site_scales[program, site["name"]] = site["scale"] / scale
    return scale, site_scales


def particle_plate(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    num_particles: int,
) -> Any:
    """The leftmost plate, of K particles; nothing for K = 1."""
    if num_particles == 1:
        return nullcontext()
    nesting = plate_nesting(model, guide, args, kwargs)
    return pyro.plate(_PARTICLE_PLATE, num_particles, dim=-1 - nesting)


def plate_nesting(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> int:
    """How many plate dims the pair uses; found by running it once, remembered for the pair."""
    by_guide = _nesting.setdefault(model, WeakKeyDictionary())
    if guide not in by_guide:
        with unnoticed(model, guide):
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = replay(model, guide_trace, args, kwargs)
        sites = [*guide_trace.nodes.values(), *model_trace.nodes.values()]
        dims = [
            frame.dim for s in sites if s["type"] == "sample" for frame in s["cond_indep_stack"]
        ]
        by_guide[guide] = -min([dim for dim in dims if dim is not None], default=0)
    return by_guide[guide]


def _kl_valid(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> frozenset[str]:
    """The latents s of which no parent in the model is a descendant of s in the guide."""
    by_guide = _valid.setdefault(model, WeakKeyDictionary())
    if guide not in by_guide:
        with unnoticed(model, guide), TrackProvenance():
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = replay(model, guide_trace, args, kwargs)
        in_guide, in_model = _parents(guide_trace), _parents(model_trace)
        ancestors: dict[str, frozenset[str]] = {}
        for name, parents in in_guide.items():  # in the order of drawing: parents come first
            ancestors[name] = parents.union(*(ancestors[parent] for parent in parents))
        by_guide[guide] = frozenset(
            name
            for name in in_guide
            if not any(name in ancestors[u] | {u} for u in in_model.get(name, ()))
        )
    return by_guide[guide]


def _parents(trace: Trace) -> dict[str, frozenset[str]]:
    """The latent sites that each site's distribution is directly computed from."""
    sites = sample_sites(trace)
    latents = {name for name, site in sites.items() if not site["is_observed"]}
    return {
        name: (get_provenance(site["fn"].log_prob(site["value"])) & latents) - {name}
        for name, site in sites.items()
        if name in latents
    }


@contextmanager
def unnoticed(model: Callable[..., Any], guide: Callable[..., Any]) -> Iterator[None]:
    """Run a pair for its structure only: gradients, random stream, buffers and handlers unmoved."""
    hidden = poutine.block(expose_types=["param"])  # still seen by local_parameters
    with evaluation_mode(model, guide), torch.no_grad(), torch.random.fork_rng(), hidden:
        yield


@contextmanager
def evaluation_mode(*programs: Callable[..., Any]) -> Iterator[None]:
    """``eval()`` for the programs that are modules, then each module's own mode again."""
    modules = [m for p in programs if (owner := module_of(p)) is not None for m in owner.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
