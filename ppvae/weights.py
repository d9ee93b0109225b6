"""Log-weights: the only place in the package that forms log p(x, z) - log q(z | x).

Every bound and gradient estimator, and every diagnostic, is a function of what
:func:`log_weights` returns, so training and diagnosis cannot disagree.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from pyro.poutine import Trace
from torch import Tensor

from ppvae.arguments import require_programs, takes_numbers
from ppvae.enumeration import sum_of, sum_out, total
from ppvae.global_latents import global_names, log_densities, refusal
from ppvae.latents import check_auxiliary, check_latents
from ppvae.pairs import (
    DATA_PLATE,
    Leaves,
    Program,
    Site,
    closed_form_kl_valid,
    own_path,
    replay,
    run,
    sample_sites,
    simulate,
)
from ppvae.terms import (
    Letters,
    Term,
    distribution_mask,
    leftmost_plate,
    log_density,
    not_a_density,
    term,
    unmasked,
)


@dataclass(frozen=True)
class LogWeights:
    r"""Log-weights of K particles for each of N datapoints, and the terms they are made of.

    .. math:: \log w_{kn} = \log p(x_n, z_{kn}) - \log q(z_{kn} \mid x_n)

    Latents marked ``infer={"enumerate": "parallel"}`` are summed out exactly, in the guide, in the
    model, or in both: with c enumerated, :math:`w_{kn} = \sum_c p(x_n, c, z_{kn}) / q(z_{kn} \mid
    x_n)`. A term that depends on one has a dim for it left of ``(K, N)``.

    Attributes:
        log_w: ``(K, N)``, nats, masked, not scaled by any plate or ``poutine.scale``.
        p, q: the :class:`~ppvae.terms.Term` of each site of the model and of the guide.
        observed: names of the observed sites.
        letters: of enumerated latents and inner plates; empty where nothing is enumerated.
        enumerated: the letter of each enumerated latent, by name.
        factors: of each enumerated latent, its unmasked log p or log q by
            ``("model" | "guide", name)``: what it is summed or averaged with. A mask hides its
            term, but its probabilities still sum to 1.
        scale: N_total / N of the data plate: 1 for full data and for hand-made minibatches. It
            belongs outside the logarithm of a bound.
        site_scales: what ``poutine.scale`` or an inner subsampled plate put on single sites,
            beyond ``scale``, by ``("model" | "guide", site name)``; empty for an ordinary pair.
            Only a linear bound may use it.
        leftmost: the leftmost plate dim of the traces; enumeration dims lie left of it.
        joint: whether there is one weight per batch (N = 1) instead of one per datapoint.
        global_p, global_q: log-densities of the latents outside the data plate, 0-d each; they are
            drawn once, and are in none of the above.
        guide_trace, model_trace: the Pyro traces, with the draws.
        pair: model, guide, args and kwargs they came from.
    """

    log_w: Tensor
    p: dict[str, Term] = field(repr=False)
    q: dict[str, Term] = field(repr=False)
    observed: frozenset[str]
    letters: Letters = field(repr=False)
    enumerated: dict[str, str]
    factors: dict[tuple[str, str], Term] = field(repr=False)
    scale: float
    site_scales: dict[tuple[str, str], Any] = field(repr=False)
    leftmost: int
    joint: bool
    guide_trace: Trace = field(repr=False)
    model_trace: Trace = field(repr=False)
    pair: tuple[Program, Program, tuple[Any, ...], dict[str, Any]] = field(repr=False)
    global_p: dict[str, Tensor] = field(default_factory=dict, repr=False)
    global_q: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @property
    def log_global(self) -> Tensor | None:
        """log p(g) - log q(g) of the global latents, 0-d, nats; None: there are none."""
        if not self.global_q:
            return None
        return sum_of([*self.global_p.values(), *(-t for t in self.global_q.values())])

    @cached_property
    def log_p(self) -> dict[str, Tensor]:
        """Model terms by site name, latent and observed, each broadcastable to ``(..., K, N)``."""
        return {name: term.values for name, term in self.p.items()}

    @cached_property
    def log_q(self) -> dict[str, Tensor]:
        """Guide terms by site name."""
        return {name: term.values for name, term in self.q.items()}

    @cached_property
    def estimated(self) -> dict[str, str]:
        """Sites whose log-density is estimated by something else than itself, and why.

        A classifier's, or a mean over draws: the log-weights are then no weights, and only what is
        linear in them has a meaning.
        """
        return not_densities("estimated", self.guide_trace, self.model_trace)

    @cached_property
    def unnormalised(self) -> dict[str, str]:
        """Sites whose log-density lacks a constant that is not known, and why."""
        return not_densities("unnormalised", self.guide_trace, self.model_trace)

    @property
    def latents(self) -> tuple[str, ...]:
        """Names of the guide's sites, in its order."""
        return tuple(self.q)

    @property
    def num_particles(self) -> int:
        """K."""
        return self.log_w.shape[0]

    @property
    def full_size(self) -> float:
        """How many datapoints a loss sums over: N, or N_total of a subsampled data plate."""
        return self.scale * self.log_w.shape[1]

    def weighted(self, program: str) -> dict[str, Term]:
        """The terms of the ``"model"`` or the ``"guide"``, times what is in ``site_scales``."""
        terms, drawn = self.p, self.model_trace
        if program == "guide":
            terms, drawn = self.q, self.guide_trace
        found = dict(terms)
        for owner, name in self.site_scales:
            if owner == program:
                site, scale = drawn.nodes[name], self.site_scales[owner, name]
                if isinstance(scale, Tensor) and scale.dim():  # it may differ within inner plates
                    values = log_density(site) * scale
                    found[name] = term(site, self.leftmost, self.joint, self.letters, values)
                else:
                    found[name] = found[name]._replace(values=found[name].values * scale)
        return found

    def all_terms(self, program: str) -> dict[str, Tensor]:
        """The terms of the ``"model"`` or ``"guide"``, ``(..., K, N)``; of a global, ``(1, 1)``."""
        local, apart = self.log_q, self.global_q
        if program == "model":
            local, apart = self.log_p, self.global_p
        return {**{name: t.reshape(1, 1) for name, t in apart.items()}, **local}

    def model_factors(self) -> dict[str, Term]:
        """What log p is a product of: terms, and of enumerated latents the unmasked ones."""
        return {name: self.factors.get(("model", name), term) for name, term in self.p.items()}

    def stop_guide(self) -> LogWeights:
        """The same values, without the gradient of log q: that of the model's terms is left."""
        q = {name: t._replace(values=t.values.detach()) for name, t in self.q.items()}
        log_w = _combine(self.p, q, self.enumerated, self.factors)
        return replace(self, log_w=log_w.expand_as(self.log_w), q=q)

    def kl_valid(self) -> frozenset[str]:
        """Latents whose closed-form KL(q || p) has the expectation of log q - log p."""
        if len(self.q) == 1 and not self.global_q:
            return frozenset(self.q)
        order = (*self.global_q, *self.q, *self.global_p, *self.p)
        return closed_form_kl_valid(*self.pair, order=order)


@takes_numbers
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
            whole batch, ``log_w`` of shape ``(K, 1)``. By default such latents are drawn once, and
            the weights are those given them.
        **kwargs: passed to both programs.

    Returns:
        :class:`LogWeights`, with ``log_w`` of shape ``(K, N)`` in nats.

    Raises:
        ValueError: the sites of model and guide differ, an observed site lies outside the data
            plate, a latent does so in one program alone, or a program calls ``pyro.param``; the
            message names the site and the cure.

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
    require_programs(model=model, guide=guide)
    if not 1 <= num_particles < 2**63:
        raise ValueError(
            f"num_particles must be at least 1, and below 2 ** 63, got {num_particles}"
        )
    kwargs["joint"] = joint
    return weigh(model, guide, args, kwargs, num_particles, with_globals=True)


def drawn_log_q(weights: LogWeights) -> Tensor:
    """log q of the drawn latents, summed over sites, ``(K, N)``.

    Raises:
        ValueError: a drawn latent depends on an enumerated one, so that there is no such number.
    """
    drawn = [t for name, t in weights.q.items() if name not in weights.enumerated]
    if any(t.letters for t in drawn):
        raise ValueError(
            "a latent that the guide draws depends on one that it enumerates; draw both, or "
            "enumerate the discrete one in the model only"
        )
    return total([Term(torch.zeros_like(weights.log_w)), *drawn])


def log_q_of_draws(weights: LogWeights, names: Collection[str]) -> Tensor:
    """log q by which some latents were drawn, summed over them, ``(K, N)``.

    A mask hides a term of log q, and the latent is drawn from the same distribution still: what
    is a score function has no masks.

    Raises:
        ValueError: one of them depends on an enumerated latent.
    """
    terms = []
    for name in names:
        site, shown = weights.guide_trace.nodes[name], weights.q[name]
        if site["mask"] is not None or distribution_mask(site["fn"]) is not None:
            shown = term(_unhidden(site), weights.leftmost, weights.joint, weights.letters)
        terms.append(shown)
    if any(t.letters for t in terms):
        raise ValueError(
            "a guide's site that is drawn by the score function depends on an enumerated one; "
            "enumerate both, or draw both"
        )
    return total([Term(torch.zeros_like(weights.log_w)), *terms])


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
        leftmost = leftmost_plate(list(sites.values()))
        return total([term(site, leftmost) for site in sites.values()])


def weigh(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_particles: int,
    *,
    leaves: Leaves | None = None,
    along_path: bool = False,
    with_globals: bool = False,
) -> LogWeights:
    """:func:`log_weights`, of the arguments of a call, for gradients of one kind or another.

    Args:
        model, guide, num_particles: as in :func:`log_weights`.
        args, kwargs: what both programs are called with; ``joint`` in ``kwargs`` is for this.
        leaves: collects the draws, and puts detached leaves in their places: the log-weights are
            then functions of these, for gradients along the sample path only.
        along_path: fewer operations, for total derivatives in the parameters only: log q of a
            normal draw is a function of the noise, so it has no slope in the draw itself.
        with_globals: the caller knows what to do with ``global_p`` and ``global_q``; a pair that
            has them is refused otherwise.
    """
    kwargs = dict(kwargs)
    joint: bool = kwargs.pop("joint", False)
    with own_path():
        guide_trace, model_trace = run(model, guide, args, kwargs, num_particles, leaves, joint)
        guide_sites, model_sites = sample_sites(guide_trace), sample_sites(model_trace)
        check_latents(model_sites, guide_sites)
        observed = frozenset(name for name, site in model_sites.items() if site["is_observed"])
        global_p: dict[str, Tensor] = {}
        global_q: dict[str, Tensor] = {}
        if not joint and (names := global_names(model_sites, guide_sites)):
            if not with_globals:
                raise refusal(names)
            global_p = log_densities(model_sites, names, False)
            global_q = log_densities(guide_sites, names, along_path)
            model_sites = {n: site for n, site in model_sites.items() if n not in names}
            guide_sites = {n: site for n, site in guide_sites.items() if n not in names}
            if leaves is not None:
                leaves.not_of_rows(names)
        check_auxiliary(model_sites, guide_sites)
        scale, site_scales = _scales({"model": model_sites, "guide": guide_sites}, joint)
        leftmost, letters = (
            leftmost_plate([*model_sites.values(), *guide_sites.values()]),
            Letters(),
        )
        p, q = (
            {
                name: term(site, leftmost, joint, letters, log_density(site, along))
                for name, site in sites.items()
            }
            for sites, along in ((model_sites, False), (guide_sites, along_path))
        )
        enumerated = {
            name: letters["latent", site["infer"]["_dim_to_id"][site["infer"]["_enumerate_dim"]]]
            for name, site in {**guide_sites, **model_sites}.items()
            if "_enumerate_dim" in site["infer"]
        }
        factors = {
            (program, name): term(_unhidden(sites[name]), leftmost, joint, letters)
            for program, sites in (("model", model_sites), ("guide", guide_sites))
            for name in enumerated.keys() & sites.keys()
        }
        log_w = _combine(p, q, enumerated, factors)
    if log_w.shape[0] != num_particles:  # no latent at all: every particle is the same
        log_w = log_w.expand(num_particles, -1)
    return LogWeights(
        log_w=log_w,
        p=p,
        q=q,
        observed=observed,
        letters=letters,
        enumerated=enumerated,
        factors=factors,
        scale=scale,
        site_scales=site_scales,
        leftmost=leftmost,
        joint=joint,
        guide_trace=guide_trace,
        model_trace=model_trace,
        pair=(model, guide, args, kwargs),
        global_p=global_p,
        global_q=global_q,
    )


def _unhidden(site: Site) -> Site:
    """A site without its masks: how a latent is summed out is not masked."""
    return {**site, "fn": unmasked(site["fn"]), "mask": None}


def whole_weights(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_particles: int,
    estimates: bool = False,
    with_globals: bool = False,
) -> LogWeights:
    """Log-weights of whole datapoints, and of all that the call is given.

    What is reported as a bound, as log p(x) or as information is made of these.

    Args:
        model, guide, args, kwargs, num_particles, with_globals: as :func:`weigh` has them.
        estimates: allow densities that are estimated or not normalised, for what uses draws alone.

    Raises:
        ValueError: a plate subsamples itself; a log-density is none.
    """
    weights = weigh(model, guide, args, kwargs, num_particles, with_globals=with_globals)
    require_whole({"model": weights.model_trace, "guide": weights.guide_trace}, args, kwargs)
    if not estimates:
        require_densities(weights.guide_trace, weights.model_trace)
    return weights


def not_densities(why: str, *traces: Trace) -> dict[str, str]:
    """The sites of traces whose ``log_prob`` is no log-density, with the reasons."""
    found = {}
    for drawn in traces:  # a latent may have a density in one program and none in the other
        for name, site in sample_sites(drawn).items():
            if reason := not_a_density(site["fn"], why):
                found[name] = reason
    return found


def require_densities(*traces: Trace) -> None:
    """Raise ``ValueError`` for a site whose ``log_prob`` is no log-density: name, why, and cure."""
    for why in ("estimated", "unnormalised"):
        for name, reason in not_densities(why, *traces).items():
            raise ValueError(
                f"site {name!r} has no log-density, so there is no bound and no log p(x) made of "
                f"it: {reason}"
            )


def require_whole(
    traces: Mapping[str, Trace], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> None:
    """Raise ``ValueError`` if a plate of a program subsamples itself: see :func:`whole_weights`.

    Args:
        traces: of the ``"model"``, the ``"guide"``, or both.
        args, kwargs: what they were called with.
    """
    given = {len(a) for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim()}
    for program, drawn in traces.items():
        for name, site in sample_sites(drawn).items():
            for frame in site["cond_indep_stack"]:
                # a data plate of the size of an argument was given its rows
                rows = frame.name == DATA_PLATE and frame.size in given
                if frame.full_size not in (None, frame.size) and not rows:
                    raise ValueError(
                        f"site {name!r} of the {program}: plate {frame.name!r} takes "
                        f"{frame.size} of {frame.full_size} by itself, and a bound or log p(x) "
                        "is of whole datapoints. Evaluate a pair whose plates are whole"
                    )


def _combine(
    p: Mapping[str, Term],
    q: Mapping[str, Term],
    enumerated: Mapping[str, str],
    factors: Mapping[tuple[str, str], Term],
) -> Tensor:
    """log of the sum, over the enumerated latents, of p / q of the drawn ones, ``(K, N)``."""
    if enumerated:
        drawn = [t._replace(values=-t.values) for name, t in q.items() if name not in enumerated]
        terms = [factors.get(("model", name), t) for name, t in p.items()]
        return total(sum_out([*terms, *drawn], enumerated.values()))
    log_w = total(p.values())
    for t in q.values():
        log_w = log_w - t.values
    return log_w


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
