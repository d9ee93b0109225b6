"""Log-weights: the only place in the package that forms log p(x, z) - log q(z | x).

Every bound and gradient estimator, and every diagnostic, is a function of what
:func:`log_weights` returns, so training and diagnosis cannot disagree.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from pyro.poutine import Trace
from torch import Tensor

from ppvae.pairs import (
    DATA_PLATE,
    PARTICLE_PLATE,
    Leaves,
    Program,
    Site,
    closed_form_kl_valid,
    is_enumerated,
    own_path,
    replay,
    run,
    sample_sites,
    simulate,
)


@dataclass(frozen=True)
class LogWeights:
    r"""Log-weights of K particles for each of N datapoints, and the terms they are made of.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n)

    Latents marked ``infer={"enumerate": "parallel"}`` are summed out exactly, in the guide, in the
    model, or in both: with c enumerated, :math:`w_{kn} = \sum_c p(x_n, c, z_{kn}) / q(z_{kn} \mid
    x_n)`. The terms then have enumeration dims left of ``(K, N)``.

    Attributes:
        log_w: ``(K, N)``, nats, masked, not scaled by any plate or ``poutine.scale``.
        log_p: model terms by site name, latent and observed, each broadcastable to ``(K, N)``.
        log_q: guide terms by site name.
        observed: names of the observed sites.
        enumerated: by name of an enumerated latent, its dim in the terms (-3, -4, ...).
        scale: N_total / N of the data plate: 1 for full data and for hand-made minibatches. It
            belongs outside the logarithm of a bound.
        site_scales: what ``poutine.scale`` or an inner subsampled plate put on single sites,
            beyond ``scale``, by ``("model" | "guide", site name)``; empty for an ordinary pair.
            Only a linear bound may use it.
        leftmost: the leftmost plate dim of the traces; enumeration dims lie left of it.
        joint: whether there is one weight per batch (N = 1) instead of one per datapoint.
        guide_trace, model_trace: the Pyro traces, with the draws.
        pair: model, guide, args and kwargs they came from.
    """

    log_w: Tensor
    log_p: dict[str, Tensor]
    log_q: dict[str, Tensor]
    observed: frozenset[str]
    enumerated: dict[str, int]
    scale: float
    site_scales: dict[tuple[str, str], Any] = field(repr=False)
    leftmost: int
    joint: bool
    guide_trace: Trace = field(repr=False)
    model_trace: Trace = field(repr=False)
    pair: tuple[Program, Program, tuple[Any, ...], dict[str, Any]] = field(repr=False)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the guide's sites, in its order."""
        return tuple(self.log_q)

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_w.shape[0]

    def stop_guide(self) -> LogWeights:
        """The same values, without the gradient of log q: that of the model's terms is left."""
        log_q = {name: term.detach() for name, term in self.log_q.items()}
        return replace(self, log_w=_combine(self.log_p, log_q, self.enumerated), log_q=log_q)

    def kl_valid(self) -> frozenset[str]:
        """Latents whose closed-form KL(q || p) has the expectation of log q - log p."""
        if len(self.log_q) == 1:
            return frozenset(self.log_q)
        return closed_form_kl_valid(*self.pair)


def log_weights(
    model: Program,
    guide: Program,
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
    pair = (model, guide, args, kwargs)
    with own_path():
        guide_trace, model_trace = run(*pair, num_particles)
        return _weigh(model_trace, guide_trace, num_particles, joint, pair)


def log_weights_along_paths(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    joint: bool = False,
    **kwargs: Any,
) -> LogWeights:
    """:func:`log_weights` in fewer operations, for total derivatives in the parameters only.

    Log q of a normal draw is a function of the noise, so it has no slope in the draw itself.
    """
    pair = (model, guide, args, kwargs)
    with own_path():
        guide_trace, model_trace = run(*pair, num_particles)
        return _weigh(model_trace, guide_trace, num_particles, joint, pair, along_paths=True)


def log_weights_at_leaves(
    model: Program,
    guide: Program,
    *args: Any,
    num_particles: int = 1,
    joint: bool = False,
    **kwargs: Any,
) -> tuple[LogWeights, list[tuple[Tensor, Tensor]]]:
    """Log-weights as a function of detached draws, for gradients along the sample path only.

    Args:
        model, guide, args, num_particles, joint, kwargs: as in :func:`log_weights`.

    Returns:
        The log-weights at leaves z' = z.detach(), and the pairs ``(z, z')`` in the order of
        drawing: z still depends on the guide's parameters, and on the leaves drawn before it.
    """
    pair, leaves = (model, guide, args, kwargs), Leaves()
    with own_path():
        guide_trace, model_trace = run(*pair, num_particles, leaves)
        return _weigh(model_trace, guide_trace, num_particles, joint, pair), leaves.pairs


def drawn_log_q(weights: LogWeights) -> Tensor:
    """log q of the drawn latents, summed over sites, ``(K, N)``.

    Raises:
        ValueError: a drawn latent depends on an enumerated one, so that there is no such number.
    """
    terms = [term for name, term in weights.log_q.items() if name not in weights.enumerated]
    if any(term.dim() > 2 for term in terms):
        raise ValueError(
            "a latent that the guide draws depends on one that it enumerates; draw both, or "
            "enumerate the discrete one in the model only"
        )
    return sum(terms, torch.zeros_like(weights.log_w))


def dream_log_q(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
    r"""log q(z | x) of one draw (z, x) from the model for each row of the data, ``(1, N)``.

    Args:
        model, guide: Pyro programs.
        *args: data as both are called; the observed ones are replaced by what the model draws.
        **kwargs: passed to both programs.

    Raises:
        ValueError: an observed value is not one of the arguments, so it cannot be replaced.
    """
    with own_path():
        dreamt, dream = simulate(model, args, kwargs)
        sites = sample_sites(replay(guide, dream, dreamt, kwargs))
        leftmost = _leftmost_plate(list(sites.values()))
        terms = [_log_prob(site, leftmost, joint=False) for site in sites.values()]
        return cast(Tensor, sum(terms))


def _weigh(
    model_trace: Trace,
    guide_trace: Trace,
    num_particles: int,
    joint: bool,
    pair: Any,
    along_paths: bool = False,
) -> LogWeights:
    """Log-weights from a guide's trace and the model's trace replayed against it."""
    model_sites, guide_sites = sample_sites(model_trace), sample_sites(guide_trace)
    observed = frozenset(name for name, site in model_sites.items() if site["is_observed"])
    check_latents(model_sites, guide_sites)

    scale, site_scales = _scales({"model": model_sites, "guide": guide_sites}, joint)
    leftmost = _leftmost_plate([*model_sites.values(), *guide_sites.values()])
    log_p = {name: _log_prob(site, leftmost, joint) for name, site in model_sites.items()}
    log_q = {
        name: _log_prob(site, leftmost, joint, along_paths) for name, site in guide_sites.items()
    }
    enumerated = {
        name: site["infer"]["_enumerate_dim"] - leftmost - 2
        for name, site in {**guide_sites, **model_sites}.items()
        if site["infer"].get("_enumerate_dim") is not None
    }
    for name in enumerated:
        frames = {frame.name for frame in (guide_sites | model_sites)[name]["cond_indep_stack"]}
        if joint or frames - {DATA_PLATE, PARTICLE_PLATE}:
            raise ValueError(
                f"latent {name!r} is to be summed out for each datapoint, which is not possible "
                f"with joint=True or inside an inner plate (its plates: {sorted(frames)}); draw it "
                "in the guide, or train with pyro.infer.TraceEnum_ELBO"
            )
    log_w = _combine(log_p, log_q, enumerated)
    if log_w.shape[0] != num_particles:  # no latent at all: every particle is the same
        log_w = log_w.expand(num_particles, -1)
    return LogWeights(
        log_w,
        log_p,
        log_q,
        observed,
        enumerated,
        scale,
        site_scales,
        leftmost,
        joint,
        guide_trace,
        model_trace,
        pair,
    )


def _combine(
    log_p: dict[str, Tensor], log_q: dict[str, Tensor], enumerated: dict[str, int]
) -> Tensor:
    """log of sum over the enumerated latents of p / q of the drawn ones, ``(K, N)``."""
    log_w, *others = log_p.values()  # sum() would begin with 0 + log_w
    for term in others:
        log_w = log_w + term
    for name, term in log_q.items():
        if name not in enumerated:
            log_w = log_w - term
    return sum_out(log_w)


def sum_out(terms: Tensor) -> Tensor:
    """logsumexp over the enumeration dims, which are left of ``(K, N)``."""
    return terms.flatten(0, -3).logsumexp(0) if terms.dim() > 2 else terms


def check_latents(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> None:
    """Raise ``ValueError`` unless model and guide have the same latent sites."""
    latents = {name for name, site in model_sites.items() if not site["is_observed"]}
    if latents == guide_sites.keys() and len(latents) < len(model_sites):
        return
    # A latent that only the model has may be summed out there.
    latents -= {n for n in latents - guide_sites.keys() if is_enumerated(model_sites[n])}
    missing = sorted(latents - guide_sites.keys())
    auxiliary = {n for n, site in guide_sites.items() if site["infer"].get("is_auxiliary")}
    extra = sorted(guide_sites.keys() - latents - auxiliary)
    if missing:
        raise ValueError(
            f"the guide has no site for the model's latent {missing}; it has "
            f"{sorted(guide_sites)}. Sample every latent of the model in the guide, under the "
            'same name, or mark a discrete one in the model with infer={"enumerate": "parallel"}'
        )
    if extra:
        raise ValueError(
            f"the guide samples {extra}, which the model does not have as latent; the model's "
            f"latents are {sorted(latents)}. Remove the site from the guide, or mark it with "
            "infer={'is_auxiliary': True}"
        )
    if not any(site["is_observed"] for site in model_sites.values()):
        raise ValueError(
            "the model has no observed site, so there is nothing to fit; pass the data as "
            "obs=x to pyro.sample, and call the pair with x"
        )


def _log_prob(site: Site, leftmost: int, joint: bool, along_paths: bool = False) -> Tensor:
    """log-prob of one site: unscaled, masked, at least float32, ``(..., K or 1, N or 1)``."""
    fn = site["fn"]
    density = getattr(fn, "log_prob_along_path", fn.log_prob) if along_paths else fn.log_prob
    log_prob: Tensor = density(site["value"], *site["args"], **site["kwargs"])
    if log_prob.dtype in (torch.float16, torch.bfloat16):
        log_prob = log_prob.float()
    return reduce_site(site, log_prob, leftmost, joint)


def reduce_site(site: Site, values: Tensor, leftmost: int, joint: bool = False) -> Tensor:
    """Mask values of a site's batch shape, and sum its inner plates.

    Args:
        site: gives the mask and the plates.
        values: of the site's batch shape; dims left of ``leftmost`` are kept.
        leftmost: the leftmost plate dim of the pair (negative, or 0 without plates).
        joint: sum the data plate too.

    Returns:
        ``(..., K or 1, N or 1)``.
    """
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
            "a global latent, ask for one weight per batch with joint=True, in log_weights(...) or "
            "as svi.step(x, joint=True)"
        )
    if values.dim() < -leftmost:
        values = values.reshape((1,) * (-leftmost - values.dim()) + values.shape)
    summed = [dim for dim in range(leftmost, 0) if dim not in (particle_dim, data_dim)]
    if summed:
        values = values.sum(summed)
    if particle_dim is None:
        values = values.unsqueeze(-1 if data_dim is None else -2)
    if data_dim is None:
        values = values.unsqueeze(-1)
    return values


def _leftmost_plate(sites: list[Site]) -> int:
    """The leftmost plate dim, particles included; enumeration dims lie left of it."""
    dims = [frame.dim for site in sites for frame in site["cond_indep_stack"]]
    return min([dim for dim in dims if dim is not None], default=0)


def _dims(site: Site) -> tuple[int | None, int | None]:
    """Where the data plate and the particle plate lie at a site (negative dims)."""
    data_dim = particle_dim = None
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE:
            data_dim = frame.dim
        elif frame.name == PARTICLE_PLATE:
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
