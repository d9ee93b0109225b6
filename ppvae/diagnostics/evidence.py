"""Held-out log-evidence by importance sampling from the guide, per datapoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.check.behaviour import point_masses
from ppvae.check.pair import PairError, check_batch, check_tensors, names
from ppvae.compile.compiled import Compiled, CompiledWeights
from ppvae.diagnostics.psis import khat
from ppvae.pairs import Program, evaluation_mode, seeded
from ppvae.program import module_of
from ppvae.weights import LogWeights, log_weights

_BLOCK = 256  # datapoints whose weights are summarised at once
_CHECKED_ROWS = 100  # with which the pair is run before all of them


@dataclass(frozen=True)
class Evidence:
    """Importance-sampling estimates per datapoint, each ``(N,)``, float64, on the CPU.

    Attributes:
        log_evidence: estimate of log p(x), nats; its expectation is IWELBO-K, a lower bound.
        log_evidence_se: its Monte-Carlo standard error (delta method), nats; unreliable where
            ``khat`` exceeds 0.7.
        ess: effective sample size of the weights, between 1 and K.
        khat: Pareto shape of the weights' tail, see :func:`ppvae.diagnostics.khat`.
        elbo: the evidence lower bound from the same draws, nats. A latent marked
            ``infer={"enumerate": "parallel"}`` is summed inside the logarithm of each weight, also
            if the guide has it: then this is the bound of the drawn latents alone, at least
            as large as ``elbo.ELBO``, reconstruction less KL, which averages over the guide's
            probabilities.
        gap_se: standard error of ``gap``, nats: smaller than those of its two parts, which share
            their draws.
        num_particles: K.
    """

    log_evidence: Tensor
    log_evidence_se: Tensor
    ess: Tensor
    khat: Tensor
    elbo: Tensor
    gap_se: Tensor
    num_particles: int

    @property
    def gap(self) -> Tensor:
        """Log p(x) - ELBO = KL(q(z | x) || p(z | x)), nats: what the guide loses, ``(N,)``."""
        return self.log_evidence - self.elbo

    @property
    def mean(self) -> float:
        """Mean log p(x), nats per datapoint."""
        return self.log_evidence.mean().item()

    @property
    def mean_se(self) -> float:
        """Standard error of :attr:`mean` over datapoints (NaN for one)."""
        N = len(self.log_evidence)
        return self.log_evidence.std().item() / math.sqrt(N) if N > 1 else math.nan

    @property
    def mean_mc_se(self) -> float:
        """Monte-Carlo standard error of :attr:`mean` for these very datapoints."""
        return self.log_evidence_se.square().sum().sqrt().item() / len(self.log_evidence)

    @property
    def unreliable(self) -> float:
        """The share of datapoints whose k-hat exceeds 0.7, of those that have one."""
        known = self.khat[~self.khat.isnan()]
        return (known > 0.7).double().mean().item() if len(known) else math.nan

    def __repr__(self) -> str:
        return "\n".join(
            [
                f"Evidence of {len(self.log_evidence)} datapoints, K = {self.num_particles} "
                "particles [nats per datapoint]",
                *self._lines(),
            ]
        )

    def _lines(self) -> list[str]:
        tail = (
            f"median {self.khat.median().item():.2f}, above 0.7 on {self.unreliable:.0%} of points"
        )
        if self.khat.isnan().all():
            tail = "none: it takes more than 20 particles"
        return [
            f"log p(x)  {self.mean:.2f} ± {self.mean_se:.2f} over datapoints, "
            f"± {self.mean_mc_se:.3f} Monte Carlo",
            f"ELBO      {self.elbo.mean().item():.2f}  (gap {self.gap.mean().item():.2f})",
            f"ESS       median {self.ess.median().item():.0f} of {self.num_particles}",
            f"k-hat     {tail}",
        ]


def log_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    max_rows: int = 2_500,
    seed: int | None = None,
    compile: bool | str = False,
) -> Evidence:
    r"""Estimate log p(x) of every datapoint by importance sampling from the guide.

    .. math:: \widehat{\log p}(x) = \log \frac 1K \sum_{k=1}^K \frac{p(x, z_k)}{q(z_k \mid x)}

    Its expectation is the IWELBO of K particles: a lower bound, that K = 5000 makes tight for a
    good guide. For a conditional pair, called with ``x, y``, it is log p(x | y). Programs run in
    evaluation mode. :func:`ppvae.diagnose` gives this and what else the same draws tell.

    Args:
        model, guide: Pyro programs; ``guides.Prior(model)`` as guide gives plain Monte Carlo.
        *args: data, as both are called; the first dimension of each tensor is the datapoints.
        num_particles: K >= 2.
        max_rows: largest number of (particle, datapoint) rows computed at once, which bounds the
            memory: with a 784-200-200-784 decoder 2,500 rows take about 0.05 GB, with the default
            convolutional one 0.3 GB. Logits that fit into the cache are quicker, so more is slower.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.
        compile: compile the log-weights of a piece of the data, see :mod:`ppvae.compiled`; worth
            its seconds where there are many pieces, and not done where there is one. ``"auto"``
            warns and runs eagerly where that is not possible, True raises.

    Returns:
        :class:`Evidence`.

    Raises:
        ValueError: NaN, infinite or empty data; fewer than two particles; the pair does not fit;
            a weight is NaN or infinite, with the datapoint and the site.
        NotCompiled: with ``compile=True``, where no graph can be built.

    Source: Rezende, Mohamed & Wierstra 2014, appendix E; Burda et al. 2016.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from ppvae import diagnostics
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, 1.), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 1.))  # too wide
        >>> x = torch.tensor([0., 2.])
        >>> result = diagnostics.log_evidence(model, guide, x, num_particles=5000, seed=0)
        >>> exact = dist.Normal(0., 2 ** 0.5).log_prob(x)
        >>> bool(((result.log_evidence - exact).abs() < 4 * result.log_evidence_se).all())
        True
    """
    if num_particles < 2:
        raise ValueError(
            f"num_particles must be at least 2 for a standard error, got {num_particles}"
        )
    check_data(model, guide, args)
    return weigh(model, guide, args, num_particles, max_rows, seed, compile=compile)


def weigh(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    num_particles: int,
    max_rows: int,
    seed: int | None,
    visit: Callable[[slice, LogWeights], None] | None = None,
    compile: bool | str = False,
) -> Evidence:
    """The one pass over all weights.

    Args:
        model, guide, args, num_particles, max_rows, seed, compile: as :func:`log_evidence` has
            them.
        visit: is shown every piece, with the datapoints it is about, as soon as it is drawn; then
            nothing is compiled.
    """
    if max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    if compile not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto", got {compile!r}')
    rows = count_rows(args)
    columns: list[dict[str, Tensor]] = []
    waiting: list[Tensor] = []
    drawn = 0
    compiled = _compiled(model, guide, compile is True) if compile else None
    with torch.no_grad(), evaluation_mode(model, guide), pyro.validation_enabled(False):
        with seeded(seed, *args):
            for part, sizes in pieces(rows, num_particles, max_rows):
                batch = take(args, part)
                of_part = []
                # the first piece is looked at; a rest at the end is not worth a graph
                like_first = 0 < part.start <= rows - rows_per_piece(num_particles, max_rows)
                for size in sizes:
                    if compiled is not None and visit is None and like_first:
                        random = torch.get_rng_state()
                        log_w = compiled(tuple(batch), {"num_particles": size})
                        if log_w is not None and (log_w < math.inf).all():
                            of_part.append(log_w)
                            continue
                        torch.set_rng_state(random)  # the same draws, to name the site
                    weights = log_weights(model, guide, *batch, num_particles=size)
                    if not (weights.log_w < math.inf).all():
                        raise ValueError(not_finite(weights, part.start))
                    if part.start == 0 and (points := point_masses(weights)):
                        raise ValueError(
                            f"latent {points[0]!r} is a point mass in the guide, so it has no "
                            "importance weights: no log p(x), no k-hat. Use a guide with a "
                            "density, e.g. guides.Normal, or guides.Prior(model)"
                        )
                    if visit is not None:
                        visit(part, weights)
                    of_part.append(weights.log_w)
                waiting.append(torch.cat(of_part))
                drawn += waiting[-1].shape[1]
                if drawn >= _BLOCK or part.stop >= rows:
                    columns.append(_summary(torch.cat(waiting, 1), part.stop - drawn))
                    waiting, drawn = [], 0
    joined = {name: torch.cat([column[name] for column in columns]) for name in columns[0]}
    return Evidence(**joined, num_particles=num_particles)


def _compiled(model: Program, guide: Program, required: bool) -> Compiled:
    """The graphs of a pair; those of the last few pairs are kept, for the next call."""
    owners = {id(m): m for m in map(module_of, (model, guide)) if m is not None}
    parts = [part for owner in owners.values() for part in owner.modules()]
    parameters = [parameter for owner in owners.values() for parameter in owner.parameters()]
    # a network that has been replaced since is another pair
    return _kept(model, guide, required, tuple(map(id, [*parts, *parameters])))


@functools.lru_cache(maxsize=4)
def _kept(model: Program, guide: Program, required: bool, identity: tuple[int, ...]) -> Compiled:
    owners = {id(m): m for m in map(module_of, (model, guide)) if m is not None}
    build = functools.partial(CompiledWeights, model, guide)
    return Compiled(nn.ModuleList(owners.values()), build, required)


def check_data(model: Callable[..., Any], guide: Callable[..., Any], args: Sequence[Any]) -> None:
    """Raise ``PairError`` unless the pair fits and every row is what it takes.

    The pass over the weights has Pyro's validation off, so this comes first.
    """
    check_tensors(model, args)
    count_rows(args)
    for position, check in check_batch(model, guide, *take(args, slice(_CHECKED_ROWS))):
        try:
            check(args[position])
        except ValueError as error:
            raise PairError(f"argument {names(model, args)[position]!r}: {error}") from error


def reason(error: Exception) -> str:
    """What an error says, without the table of shapes that Pyro appends."""
    return str(error).partition("\nTrace Shapes:")[0]


def count_rows(args: Sequence[Any]) -> int:
    """N, the length of the first tensor."""
    rows = next((len(arg) for arg in args if isinstance(arg, Tensor)), 0)
    if rows == 0:
        raise ValueError(
            "no data: call with (model, guide, x), x a tensor of one row per datapoint"
        )
    return rows


def take(args: Sequence[Any], rows: Any) -> list[Any]:
    """The same rows of every tensor; what is no tensor stays."""
    return [arg[rows] if isinstance(arg, Tensor) else arg for arg in args]


def rows_per_piece(num_particles: int, max_rows: int) -> int:
    """Datapoints that are weighed at once."""
    return max(1, max_rows // num_particles)


def pieces(rows: int, num_particles: int, max_rows: int) -> Iterator[tuple[slice, list[int]]]:
    """Datapoints, and numbers of particles that add up to K, of at most ``max_rows`` rows each."""
    particles = min(num_particles, max_rows)
    full, rest = divmod(num_particles, particles)
    sizes = [particles] * full + ([rest] if rest else [])
    datapoints = rows_per_piece(num_particles, max_rows)
    for start in range(0, rows, datapoints):
        yield slice(start, min(start + datapoints, rows)), sizes


def summarise(log_w: Tensor) -> Evidence:
    """What log-weights ``(K, N)`` tell, K >= 2."""
    return Evidence(**_summary(log_w, 0), num_particles=len(log_w))


def _summary(log_w: Tensor, start: int) -> dict[str, Tensor]:
    """By name, what the weights of the datapoints from ``start`` on tell."""
    k = khat(log_w)
    log_w = log_w.double().cpu()
    K = log_w.shape[0]
    log_mean = torch.logsumexp(log_w, 0) - math.log(K)
    if (empty := log_mean == -math.inf).any():
        raise ValueError(
            f"all {K} weights of datapoint {start + int(empty.nonzero()[0])} are zero: p(x, z) = 0 "
            "at every draw of the guide, so its evidence cannot be estimated. Check that the "
            "datapoint lies in the likelihood's support and the guide's draws in the prior's"
        )
    relative = (log_w - log_mean).exp()  # w / mean(w)
    ess = K / relative.square().mean(0)
    se = (relative.var(0) / K).sqrt()
    gap_se = ((relative - log_w).var(0) / K).sqrt()
    return {
        "log_evidence": log_mean,
        "log_evidence_se": se,
        "ess": ess,
        "khat": k,
        "elbo": log_w.mean(0),
        "gap_se": gap_se,
    }


def not_finite(weights: LogWeights, start: int) -> str:
    """Which datapoint, which site."""
    bad = ~(weights.log_w < math.inf)
    row = int(bad.any(0).nonzero()[0])
    value = "NaN" if weights.log_w[:, row].isnan().any() else "infinite"
    # Too small a log q is as bad as too large a log p.
    sites = [
        f"{name!r} of the {program}"
        for program, terms, sign in (("model", weights.log_p, 1), ("guide", weights.log_q, -1))
        for name, term in terms.items()
        if not (sign * term.expand(*term.shape[:-1], bad.shape[1])[..., row] < math.inf).all()
    ]
    return (
        f"the log-weight of datapoint {start + row} is {value} for {int(bad[:, row].sum())} of "
        f"{len(bad)} particles, because of the log-probability of site {' and '.join(sites)}. "
        f"Look at row {start + row} of the data and at what the networks make of it: a scale that "
        "under- or overflows, parameters that are NaN after a training that diverged"
    )
