"""What the draws tell about single latents: KL by site and dimension, activity, information."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppvae.diagnostics.rows import count_rows, evaluating, rows_first, standard_error, take
from ppvae.elbo.kl import closed_form_kl, dimension_rates, independent_units
from ppvae.elbo.standard import ELBO
from ppvae.enumeration import total
from ppvae.pairs import DATA_PLATE, PARTICLE_PLATE, Program, Site, sample_sites, structure, trace
from ppvae.processes import Processes
from ppvae.terms import distribution_mask, sum_plates, term, unmasked
from ppvae.weights import LogWeights

_CLOSED = ELBO(kl="mixed")  # closed forms where they are valid, draws elsewhere
Absent = dict[str, str]  # quantity -> why there is none


class SiteTerms:
    """Means over the particles, gathered piece by piece from the pass over the weights.

    Attributes:
        absent: what is not defined for this pair, and why.
    """

    def __init__(self, rows: int, num_particles: int) -> None:
        self.rows, self.num_particles = rows, num_particles
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.absent: Absent = {}

    def __call__(self, part: slice, weights: LogWeights) -> None:
        """Take in the weights of some particles of the datapoints ``part``."""
        share = weights.num_particles / self.num_particles
        for key, values in _terms(weights, self.absent).items():
            mean = values.mean(-2, dtype=torch.float64)  # (..., n)
            if key not in self.sums:
                self.sums[key] = mean.new_zeros(*mean.shape[:-1], self.rows)
            self.sums[key][..., part] += share * mean

    def gather(self, processes: Processes) -> None:
        """Take in what other processes were shown: each has zeros where it was shown nothing."""
        shown = processes.gather(({key: v.cpu() for key, v in self.sums.items()}, self.absent))
        keys = dict.fromkeys(key for sums, _ in shown for key in sums)
        self.sums = {
            key: torch.stack([sums[key] for sums, _ in shown if key in sums]).sum(0) for key in keys
        }
        for _, absent in shown:
            self.absent |= absent

    def column(self, quantity: str) -> dict[str, Tensor]:
        """By site, ``(N,)`` or ``(N, D)``, on the CPU."""
        return {s: v.movedim(-1, 0).cpu() for (q, s), v in self.sums.items() if q == quantity}

    def activity(self) -> dict[str, Tensor]:
        r"""By site, the variance over datapoints of :math:`E_q[z_d \mid x]`, ``(D,)``.

        The variance that a mean of K draws has of its own is taken off.
        """
        if self.rows == 1:
            return {}
        found = {}
        squares = self.column("square")
        for name, mean in self.column("mean").items():
            noise = (squares[name] - mean.square()).clamp(min=0) / max(self.num_particles - 1, 1)
            found[name] = (mean.var(0) - noise.mean(0)).clamp(min=0)
        return found


class AveragedTerms(SiteTerms):
    """The mean of several passes, each at a draw of the globals; activity is that at a draw."""

    def __init__(self, rows: int, num_particles: int) -> None:
        super().__init__(rows, num_particles)
        self.activities: dict[str, Tensor] = {}

    def take_in(self, terms: SiteTerms, share: float) -> None:
        """Add a pass, of which there are 1 / ``share``."""
        self.absent |= terms.absent
        for key, values in terms.sums.items():
            self.sums[key] = self.sums.get(key, 0) + share * values
        for name, values in terms.activity().items():
            self.activities[name] = self.activities.get(name, 0) + share * values

    def activity(self) -> dict[str, Tensor]:
        return self.activities


def _terms(weights: LogWeights, absent: Absent) -> dict[tuple[str, str], Tensor]:
    """By quantity and site, ``(..., K or 1, N or 1)``."""
    weights = replace(weights, site_scales={})  # a scale belongs to an objective
    if weights.enumerated:
        return _enumerated_terms(weights, absent)
    closed = closed_form_kl(_CLOSED.kl, weights)
    observed = [weights.log_p[name] for name in weights.observed]
    found = {("reconstruction", ""): functools.reduce(torch.add, observed)}
    for name, log_q in weights.log_q.items():
        log_p = weights.log_p.get(name, torch.zeros_like(log_q))
        found["kl", name] = closed.get(name, log_q - log_p)
        q, p = weights.guide_trace.nodes[name], weights.model_trace.nodes.get(name)
        if p is not None and independent_units(q) and independent_units(p):
            found["kl_per_dimension", name] = dimension_rates(weights, name, name in closed)
        else:
            absent[f"KL per dimension of {name!r}"] = (
                "guide and model must both draw it from a vector or map of independent dimensions"
            )
        found |= _moments(name, q, weights.leftmost, absent)
    return found


def _moments(name: str, site: Site, leftmost: int, absent: Absent) -> dict[tuple[str, str], Tensor]:
    """Mean, squared mean and variance of every unit of a latent given x and what it depends on."""
    fn = site["fn"]
    inner = {frame.name for frame in site["cond_indep_stack"]} - {DATA_PLATE, PARTICLE_PLATE}
    if inner:
        absent[f"activity of {name!r}"] = f"it lies in the inner plate {min(inner)!r}"
        return {}
    try:
        mean, variance = fn.mean, fn.variance
    except (NotImplementedError, AttributeError):  # a flow, say: then by its draws
        mean, variance = site["value"], torch.zeros_like(site["value"])
    if not (mean.is_floating_point() and mean.isfinite().all()):
        absent[f"activity of {name!r}"] = "its values have no mean (unordered classes)"
        return {}
    mean, variance = _by_unit(site, mean, leftmost), _by_unit(site, variance, leftmost)
    return {
        ("mean", name): mean,
        ("square", name): mean.double().square(),
        ("variance", name): variance,
    }


def _by_unit(site: Site, values: Tensor, leftmost: int) -> Tensor:
    """Values of a site, batch and event shape, as ``(D, K or 1, N or 1)``."""
    batch = site["fn"].batch_shape
    values = values.expand(batch + site["fn"].event_shape).reshape(*batch, -1).movedim(-1, 0)
    values = values.reshape(len(values), *(1,) * (-leftmost - len(batch)), *batch)
    values = sum_plates(site, values, leftmost)
    # What depends on x alone is the same for all particles: one is enough.
    return values[:, :1] if values.stride(1) == 0 else values


def _enumerated_terms(weights: LogWeights, absent: Absent) -> dict[tuple[str, str], Tensor]:
    """With latents summed out: KL by group of sites, and no moments of single units."""
    names = ", ".join(sorted(weights.enumerated))
    in_model = {letter for name, letter in weights.enumerated.items() if name not in weights.q}
    reached = any(in_model & set(weights.p[name].letters) for name in weights.observed)
    found = {}
    if reached:
        absent["KL and reconstruction"] = (
            f"{names} is summed out in the model and the data depend on it, so they are one number"
        )
    else:
        likelihood, rates = _CLOSED.terms(weights)
        found = {("reconstruction", ""): likelihood}
        found |= {("kl", name): rate for name, rate in rates.items()}
    for name in weights.log_q.keys() - weights.enumerated.keys():
        site = weights.guide_trace.nodes[name]
        if not weights.q[name].letters:
            found |= _moments(name, site, weights.leftmost, absent)
        else:
            absent[f"activity of {name!r}"] = "it depends on a latent that is summed out"
    for name in weights.log_q.keys() & weights.enumerated.keys():
        absent[f"activity of {name!r}"] = "it is summed out"
    absent["KL per dimension"] = f"{names} is summed out"
    return found


# ------------------------------------------------------------------------------ all datapoints


@dataclass(frozen=True)
class Aggregate:
    r"""The aggregated posterior :math:`q(z) = \frac1N \sum_n q(z \mid x_n)` of N datapoints.

    Attributes:
        mutual_information: :math:`I_q = E\,\log q(z \mid x) / q(z)`, nats: that of these N
            datapoints up to its standard error; in expectation a lower bound for the distribution
            they come from; never above ``ceiling``.
        mutual_information_se: its standard error over draws and datapoints.
        mutual_information_upper: the same with the datapoint itself left out of q(z): in
            expectation an upper bound for the distribution the datapoints come from (NaN for one).
        ceiling: log N, the largest value that N datapoints can show.
        prior_differs: whether p(z) depends on the datapoint, as p(z | y) does.
        masked: whether a mask hides a latent's density. The information is that of what the guide
            draws, whatever is masked, as activity is; the KL of every latent counts the rest.
        ks: by site and unit, the largest distance between the distribution functions of q(z) and
            of the prior, from the same number of draws of each, ``(D,)``.
        num_draws: M, how many draws of z all this was estimated from.
    """

    mutual_information: float
    mutual_information_se: float
    mutual_information_upper: float
    ceiling: float
    prior_differs: bool
    masked: bool
    ks: dict[str, Tensor]
    num_draws: int


def aggregate(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    max_pairs: int,
    num_draws: int,
    seed: int | None,
) -> Aggregate | None:
    r"""Mutual information of datapoint and latents under the guide, all latents together.

    .. math:: \hat I = \frac1M \sum_m \log q(z_m \mid x_m) - \log\frac1N \sum_n q(z_m \mid x_n)

    Args:
        model, guide, args: as :func:`ppvae.diagnose` has them.
        max_pairs: densities q(z_m | x_n) computed at once, which bounds the memory.
        num_draws: about so many draws, of datapoints spread over the data.
        seed: as there.

    Returns:
        None for a guide that draws no latents.

    Raises:
        NotImplementedError: the guide has no density at a given point (a flow without inverse).

    Source: Hoffman & Johnson, ELBO surgery, 2016; the bounds: Poole et al., On variational bounds
    of mutual information, 2019, sections 2.1 and 2.3.
    """
    args, rows = tuple(args), count_rows(args)
    chosen = torch.linspace(0, rows - 1, min(rows, num_draws), dtype=torch.float64).round().long()
    repeats = -(-num_draws // len(chosen))
    chosen = chosen.repeat_interleave(repeats)
    nesting = structure(model, guide, args, {}).nesting
    with evaluating(model, guide, args, seed):
        some = take(args, chosen)
        drawn, from_prior = _latents(guide, some), _latents(model, some)
        z, prior = (
            {name: rows_first(site) for name, site in sites.items()}
            for sites in (drawn, from_prior)
        )
        if not z:
            return None
        at_one = _log_density(model, some, {n: v[:1] for n, v in prior.items()}, nesting)
        own, among_all, among_others = _densities(guide, args, z, chosen, max_pairs, nesting)
    by_datapoint = (own - among_all).reshape(-1, repeats).mean(1)
    return Aggregate(
        mutual_information=by_datapoint.mean().item(),
        mutual_information_se=standard_error(by_datapoint),
        mutual_information_upper=(own - among_others).mean().item() if rows > 1 else math.nan,
        ceiling=math.log(rows),
        prior_differs=bool(at_one.max() - at_one.min() > 1e-4 * (1 + at_one.abs().max())),
        masked=any(_is_masked(site) for site in (*drawn.values(), *from_prior.values())),
        ks={n: _distance(z[n], prior[n]) for n in z if n in prior},
        num_draws=len(chosen),
    )


def _densities(
    guide: Program,
    args: tuple[Any, ...],
    z: dict[str, Tensor],
    chosen: Tensor,
    max_pairs: int,
    nesting: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """log q(z_m | x_m), and the log of its mean over all x and over all other x; ``(M,)`` each."""
    rows = count_rows(args)
    wide = min(rows, max(1, math.isqrt(max_pairs)))
    parts = [take(args, slice(start, start + wide)) for start in range(0, rows, wide)]
    found = []
    for block in torch.arange(len(chosen)).split(max(1, max_pairs // wide)):
        here = {name: values[block.to(values.device)] for name, values in z.items()}
        log_q = torch.cat([_log_density(guide, part, here, nesting) for part in parts], 1)
        log_q = log_q.double().cpu()  # (m, N)
        itself = (torch.arange(len(block)), chosen[block])
        own, among_all = log_q[itself], log_q.logsumexp(1) - math.log(rows)
        log_q[itself] = -math.inf
        found.append((own, among_all, log_q.logsumexp(1) - math.log(max(rows - 1, 1))))
    own, among_all, among_others = (torch.cat(column) for column in zip(*found, strict=True))
    return own, among_all, among_others


def _latents(program: Program, args: tuple[Any, ...]) -> dict[str, Site]:
    """The sites of a program that it draws."""
    sites = sample_sites(trace(program, args, {}))
    return {name: site for name, site in sites.items() if not site["is_observed"]}


def _is_masked(site: Site) -> bool:
    masks = site["mask"], distribution_mask(site["fn"])
    return any(not torch.as_tensor(mask).all() for mask in masks if mask is not None)


def _log_density(
    program: Program, args: tuple[Any, ...], z: dict[str, Tensor], nesting: int
) -> Tensor:
    """Log-density of the latents at draws m given the datapoints n, ``(m, n)``, unmasked."""
    count = len(next(iter(z.values())))
    plate = pyro.plate(PARTICLE_PLATE, count, dim=-1 - nesting)
    with plate, AtDraws(z, nesting):
        sites = sample_sites(trace(program, args, {}))
    shown = [
        {**site, "fn": unmasked(site["fn"]), "mask": None}
        for name, site in sites.items()
        if name in z
    ]
    terms = [term(site, -1 - nesting) for site in shown]
    return total(terms).expand(count, count_rows(args))


class AtDraws(Messenger):
    """Puts given draws in the place of particles, each of them at every datapoint.

    Args:
        z: by site, ``(m, *batch dims other than the data plate's, *event)``.
        nesting: how many plate dims the pair uses.
    """

    def __init__(self, z: dict[str, Tensor], nesting: int) -> None:
        super().__init__()
        self.z, self.nesting = z, nesting

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] not in self.z or msg["is_observed"]:
            return
        values, event_dim = self.z[msg["name"]], msg["fn"].event_dim
        (frame,) = (f for f in msg["cond_indep_stack"] if f.name == DATA_PLATE)
        values = values.unsqueeze(values.dim() + 1 + frame.dim - event_dim)
        missing = self.nesting + 1 + event_dim - values.dim()
        values = values.reshape(len(values), *(1,) * missing, *values.shape[1:])
        shape = list(values.shape)
        shape[frame.dim - event_dim] = frame.size
        msg["value"] = values.expand(shape)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Kolmogorov and Smirnov's distance of two samples ``(M, ...)``, unit by unit, ``(D,)``."""
    a, b = (v.detach().reshape(len(v), -1).double().cpu().T.contiguous() for v in (a, b))
    points = torch.cat([a, b], 1)
    below = [torch.searchsorted(v.sort(1).values, points, right=True) / v.shape[1] for v in (a, b)]
    return (below[0] - below[1]).abs().amax(1)
