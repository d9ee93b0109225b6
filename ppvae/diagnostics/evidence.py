"""Held-out log-evidence by importance sampling from the guide, per datapoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.check.behaviour import point_masses
from ppvae.check.programs import PairError
from ppvae.compile.compiled import Compiled, CompiledWeights
from ppvae.diagnostics.psis import khat
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_pair_and_data,
    count_rows,
    evaluating,
    modules_of,
    pieces,
    require_numbers,
    rows_per_piece,
    standard_error,
    take,
)
from ppvae.intake import takes_rows
from ppvae.pairs import Program, by_position, rewinder
from ppvae.processes import Processes, checksum
from ppvae.weights import LogWeights, whole_weights

_BLOCK = 256  # datapoints whose weights are summarised at once


@dataclass(frozen=True)
class Estimates:
    """Estimates of log p(x) per datapoint, from weights, and their mean."""

    log_evidence: Tensor
    log_evidence_se: Tensor
    ess: Tensor

    @property
    def mean(self) -> float:
        """Mean log p(x), nats per datapoint."""
        return self.log_evidence.mean().item()

    @property
    def mean_mc_se(self) -> float:
        """Monte-Carlo standard error of :attr:`mean` for these very datapoints."""
        return self.log_evidence_se.square().sum().sqrt().item() / len(self.log_evidence)


@dataclass(frozen=True)
class Evidence(Estimates):
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

    khat: Tensor
    elbo: Tensor
    gap_se: Tensor
    num_particles: int

    @property
    def gap(self) -> Tensor:
        """Log p(x) - ELBO = KL(q(z | x) || p(z | x)), nats: what the guide loses, ``(N,)``."""
        return self.log_evidence - self.elbo

    @property
    def mean_se(self) -> float:
        """Standard error of :attr:`mean` over datapoints (NaN for one)."""
        return standard_error(self.log_evidence)

    @property
    def unreliable(self) -> float:
        """The share of datapoints whose k-hat exceeds 0.7, of those that have one."""
        defined = self.khat[~self.khat.isnan()]
        return (defined > 0.7).double().mean().item() if len(defined) else math.nan

    def __repr__(self) -> str:
        tail = (
            "none: it takes more than 20 particles"
            if self.khat.isnan().all()
            else f"median {self.khat.median().item():.2f}, above 0.7 on {self.unreliable:.0%} of "
            "points"
        )
        return (
            f"Evidence of {len(self.log_evidence)} datapoints, K = {self.num_particles} particles "
            "[nats per datapoint]\n"
            f"log p(x)  {self.mean:.2f} ± {self.mean_se:.2f} over datapoints, "
            f"± {self.mean_mc_se:.3f} Monte Carlo\n"
            f"ELBO      {self.elbo.mean().item():.2f}  (gap {self.gap.mean().item():.2f})\n"
            f"ESS       median {self.ess.median().item():.0f} of {self.num_particles}\n"
            f"k-hat     {tail}"
        )


@takes_numbers
@takes_rows
def log_evidence(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    num_particles: int = 1000,
    max_rows: int = 2_500,
    seed: int | None = None,
    compile: bool | str = False,
    fabric: Any = None,
    **kwargs: Any,
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
        fabric: a launched ``lightning_fabric.Fabric``: each process is given all rows and the same
            arguments, weighs its part, and gets the numbers of all, in the order of the rows. The
            draws then follow from the seed and the number of processes.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        :class:`Evidence`.

    Raises:
        ValueError: NaN, infinite or empty data; fewer than two particles; the pair does not fit;
            a weight is NaN or infinite, with the datapoint and the site.
        NotCompiled: with ``compile=True``, where no graph can be built.
        RuntimeError: another process has raised, was killed or does not answer.

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
    with together(fabric) as processes:
        model, guide = bound(model, guide, kwargs)
        check_at_least(2, num_particles=num_particles)
        check_pair_and_data(model, guide, args)
        settings = {"num_particles": num_particles, "max_rows": max_rows, "seed": seed}
        require_alike(processes, model, guide, args, **settings)
        return weigh(
            model, guide, args, num_particles, max_rows, seed, compile=compile, processes=processes
        )


@contextmanager
def together(fabric: Any) -> Iterator[Processes | None]:
    """The processes of a Fabric, of which what ends one inside ends all; None: this one alone."""
    if fabric is None:
        yield None
        return
    processes = Processes(fabric)
    with processes.connected():
        yield processes


def require_alike(
    processes: Processes | None,
    model: Program,
    guide: Program,
    args: Sequence[Any],
    **settings: Any,
) -> None:
    """Raise unless all processes were given the same, of which each can take its part.

    Raises:
        ValueError: settings, parameters, the number of rows or some of these differ.
        PairError: parameters of the guide belong to rows, which processes cannot share.
    """
    if processes is None or processes.size == 1:
        return
    if by_position(guide):
        raise PairError(
            "parameters of the guide belong to positions in the data, and processes take a "
            "part of the rows each: evaluate in one, without fabric="
        )
    rows = count_rows(args)
    some = torch.linspace(0, rows - 1, min(64, rows)).long()
    state = modules_of(model, guide).state_dict().values()
    facts = {
        "rows": rows,
        "checksum of up to 64 rows": checksum(
            arg[some.to(arg.device)] for arg in args if isinstance(arg, Tensor)
        ),
        "checksum of the parameters": checksum(v for v in state if isinstance(v, Tensor)),
    }
    processes.require_equal(facts | settings)


def weigh(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    num_particles: int,
    max_rows: int,
    seed: int | None,
    visit: Callable[[slice, LogWeights], None] | None = None,
    compile: bool | str = False,
    processes: Processes | None = None,
) -> Evidence:
    """Weigh all particles of all datapoints in one pass; data and pair have been checked.

    Args:
        model, guide, args, num_particles, max_rows, seed, compile: as :func:`log_evidence` has
            them.
        visit: is shown every piece, with the datapoints it is about, as soon as it is drawn; then
            nothing is compiled.
        processes: that share the datapoints; each is shown its own.
    """
    check_at_least(1, max_rows=max_rows)
    if not isinstance(compile, (bool, str)) or compile not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto", got {compile!r}')
    rows = count_rows(args)
    own = slice(0, rows) if processes is None else processes.part(rows)
    last = own.stop - rows_per_piece(num_particles, max_rows)  # where the last full piece begins
    compiled = _compiled(model, guide, compile is True) if compile and visit is None else None

    def weights_of(part: slice, particles: int) -> Tensor:
        batch = take(args, part)
        # The first piece runs eagerly, to be checked; a shorter last one is not worth a graph.
        if compiled is not None and own.start < part.start <= last:
            rewind = rewinder(*batch, *compiled.module.parameters())
            log_w = compiled(batch, {"num_particles": particles})
            if log_w is not None and (log_w < math.inf).all():
                return log_w
            rewind()  # draw the same again, to name the site
        weights = whole_weights(model, guide, batch, {}, particles)
        require_numbers(weights, part.start)
        if part.start == own.start:
            refuse_point_masses(weights)
        if visit is not None:
            visit(part, weights)
        return weights.log_w

    block: list[Tensor] = []
    summaries = []
    with evaluating(model, guide, args, seed if processes is None else processes.draws(seed)):
        for piece, sizes in pieces(own.stop - own.start, num_particles, max_rows):
            part = slice(own.start + piece.start, own.start + piece.stop)
            block.append(torch.cat([weights_of(part, particles) for particles in sizes]))
            start = part.stop - sum(log_w.shape[1] for log_w in block)
            if part.stop - start >= _BLOCK or part.stop == own.stop:
                summaries.append(summarise(torch.cat(block, 1), start))
                block = []
    if processes is not None:
        summaries = [found for of_rank in processes.gather(summaries) for found in of_rank]
    columns = {name: torch.cat([found[name] for found in summaries]) for name in summaries[0]}
    return Evidence(**columns, num_particles=num_particles)


def _compiled(model: Program, guide: Program, required: bool) -> Compiled:
    """The graphs of a pair; those of the last few pairs are kept, for the next call."""
    owners = modules_of(model, guide)
    # A network that has been replaced since is another pair.
    identity = tuple(
        id(part) for owner in owners for part in (*owner.modules(), *owner.parameters())
    )
    return _kept(model, guide, required, identity)


@functools.lru_cache(maxsize=4)
def _kept(model: Program, guide: Program, required: bool, identity: tuple[int, ...]) -> Compiled:
    build = functools.partial(CompiledWeights, model, guide)
    return Compiled(modules_of(model, guide), build, required, (model, guide))


def refuse_point_masses(weights: LogWeights, but: Collection[str] = ()) -> None:
    """Raise ``ValueError`` where all mass of a latent is on one point, of those not in ``but``."""
    for name in (name for name in point_masses(weights) if name not in but):
        raise ValueError(
            f"latent {name!r} is a point mass in the guide, so it has no importance weights, "
            "log p(x) or k-hat; use a guide with a density, e.g. guides.Normal or "
            "guides.Prior(model), and AutoNormal for what is global"
        )


def summarise(log_w: Tensor, start: int = 0) -> dict[str, Tensor]:
    """The columns of :class:`Evidence` from log-weights ``(K, N)`` of datapoints ``start``, ..."""
    k = khat(log_w)
    log_w = log_w.double().cpu()
    log_mean, se, ess = log_mean_weight(log_w)
    if (empty := log_mean == -math.inf).any():
        raise ValueError(
            f"all {len(log_w)} weights of datapoint {start + int(empty.nonzero()[0])} are zero, so "
            "its evidence cannot be estimated: it must lie in the likelihood's support, and draws "
            "of the guide in the prior's"
        )
    gap_se = (((log_w - log_mean).exp() - log_w).var(0) / len(log_w)).sqrt()
    return {
        "log_evidence": log_mean,
        "log_evidence_se": se,
        "ess": ess,
        "khat": k,
        "elbo": log_w.mean(0),
        "gap_se": gap_se,
    }


def log_mean_weight(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log of the mean weight, its standard error and the effective sample size, ``(N,)`` each.

    The standard error is by the delta method; ``log_w`` is ``(K, N)``.
    """
    K = len(log_w)
    log_mean = log_w.logsumexp(0) - math.log(K)
    relative = (log_w - log_mean).exp()
    return log_mean, (relative.var(0) / K).sqrt(), K / relative.square().mean(0)
