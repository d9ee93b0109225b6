"""What all evaluators share: checks of the data, datapoints in pieces, numbers per datapoint."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyro
import torch
from pyro.poutine import Trace
from torch import Tensor, nn

from ppvae.check.pair import check_batch, check_shapes, check_tensors, check_values
from ppvae.check.programs import PairError, check_programs
from ppvae.global_latents import refusal
from ppvae.pairs import (
    DATA_PLATE,
    FAILURES,
    PARTICLE_PLATE,
    Program,
    Site,
    by_position,
    evaluation_mode,
    own_path,
    seeded,
    simulate,
    structure,
    unnoticed,
)
from ppvae.program import module_of
from ppvae.weights import LogWeights, log_weights, require_densities
from ppvae.wrapped import argument_labels

_CHECKED_ROWS = 100  # on which the pair is tried before all of them


# -- before any work ---------------------------------------------------------------------------


def check_data(program: Program, args: Sequence[Any]) -> int:
    """Check the data that a program is to be called with; return N, the number of datapoints.

    Raises:
        ValueError: no argument is a tensor.
        PairError: an argument is an array of another library; a tensor is empty, NaN or infinite,
            or has another number of rows.
    """
    rows = check_rows(program, args)
    check_tensors(program, args)
    return rows


def check_rows(program: Program, args: Sequence[Any]) -> int:
    """:func:`check_data`, but for what the tensors hold."""
    for name, arg in zip(argument_labels(program, len(args)), args, strict=True):
        if (
            not isinstance(arg, (Tensor, np.generic))
            and hasattr(arg, "__array__")
            and np.ndim(arg) > 0
        ):
            seen = type(arg).__name__
            raise PairError(f"argument {name!r} must be a tensor, got {seen}: torch.as_tensor(...)")
    check_shapes(program, args)
    rows = count_rows(args)
    if not rows:
        held = next((" such as its .x" for arg in args if hasattr(arg, "x")), "")
        raise ValueError(
            f"no data: pass tensors with one row per datapoint{held}, e.g. (model, guide, x)"
        )
    return rows


def count_rows(args: Sequence[Any]) -> int:
    """N, the length of the first tensor; 0 if there is none."""
    return next((len(arg) for arg in args if isinstance(arg, Tensor)), 0)


def check_pair_and_data(
    model: Program,
    guide: Program,
    args: Sequence[Any],
    joint: bool = False,
    estimates: bool = False,
    with_globals: bool = False,
) -> int:
    """N; raise as :func:`check_data` does, and ``PairError`` unless the pair takes every row.

    Its plates must be whole. It may mask values that are NaN. For passes over the weights, which
    run with Pyro's validation off. Log-densities that are none are refused, unless ``estimates``,
    and latents outside the data plate, unless ``joint`` or ``with_globals``.
    """
    rows = check_rows(model, args)
    # an autoguide's parameters may belong to all positions
    some = args if by_position(guide) or joint else take(args, slice(_CHECKED_ROWS))
    # several particles, draws or chains are computed at once
    with naming_positions(model, guide, args):
        checks = check_batch(model, guide, *some, joint=joint, num_particles=2, whole=True)
    check_values(model, guide, args, checks)
    refused = not (joint or with_globals) and structure(model, guide, tuple(some), {}).has_globals
    if refused or not estimates:
        with own_path(), unnoticed(model, guide), pyro.validation_enabled(False):
            weights = log_weights(model, guide, *some, joint=joint)
        if refused:
            raise refusal(weights.global_q)
        require_densities(weights.guide_trace, weights.model_trace)
    return rows


@contextmanager
def naming_positions(model: Program, guide: Program, args: Sequence[Any]) -> Iterator[None]:
    """Say so where a pair fails inside since it runs on all rows only, not on a part of them."""
    try:
        yield
    except (RuntimeError, ValueError, IndexError) as error:
        rows = count_rows(args)
        if by_position(guide) or not _runs(model, guide, args):
            raise
        if rows < 2 or _runs(model, guide, take(args, slice(rows - 1))):
            raise
        raise PairError(
            f"the pair runs on all {rows} rows and not on a part of them, so data or parameters of "
            "its own belong to rows. Give these as an argument beside the data, or evaluate all "
            "rows at once, with max_rows >= num_particles * rows"
        ) from error


def _runs(model: Program, guide: Program, args: Sequence[Any]) -> bool:
    """Whether a pair can be weighed at some rows."""
    with torch.no_grad(), own_path(), unnoticed(model, guide), pyro.validation_enabled(False):
        try:
            log_weights(model, guide, *args)
        except FAILURES:
            return False
    return True


def check_at_least(least: int, **arguments: int) -> None:
    """Raise ``ValueError`` for an argument below ``least``; each is passed by its name."""
    for name, value in arguments.items():
        if not least <= value < 2**63:
            most = "" if value < least else ", and below 2 ** 63"
            raise ValueError(f"{name} must be at least {least}{most}, got {value}")


def check_log_evidence(log_evidence: Tensor, rows: int) -> None:
    """Raise ``ValueError`` unless there is one value of log p(x) per datapoint."""
    nested = getattr(log_evidence, "is_nested", False)
    shape = None if nested else getattr(log_evidence, "shape", None)
    if shape != (rows,):
        raise ValueError(
            f"log_evidence must be a tensor of one value per datapoint, ({rows},), got "
            f"{log_evidence if shape is None else f'shape {tuple(shape)}'}"
        )


def check_start(start: str) -> None:
    """Raise ``ValueError`` unless chains start at draws of the guide or the prior."""
    if not isinstance(start, str) or start not in ("guide", "prior"):
        raise ValueError(f'start must be "guide" or "prior", got {start!r}')


def bound(model: Program, guide: Program, kwargs: Mapping[str, Any]) -> tuple[Program, Program]:
    """Both programs with what is passed by keyword: it is no row of the data, and never cut.

    Raises:
        TypeError: one of them is no program.
    """
    check_programs(model=model, guide=guide)
    if not kwargs:
        return model, guide
    return functools.partial(model, **kwargs), functools.partial(guide, **kwargs)


# -- datapoints in pieces ----------------------------------------------------------------------


def take(args: Sequence[Any], rows: Any) -> tuple[Any, ...]:
    """The same rows of every tensor; other arguments as they are."""
    return tuple(
        arg[rows.to(arg.device) if isinstance(rows, Tensor) else rows]
        if isinstance(arg, Tensor)
        else arg
        for arg in args
    )


def rows_per_piece(num_particles: int, max_rows: int) -> int:
    """How many datapoints are computed at once, with this many particles or chains each."""
    return max(1, max_rows // num_particles)


def pieces(rows: int, num_particles: int, max_rows: int) -> Iterator[tuple[slice, list[int]]]:
    """Slices of datapoints, and numbers of particles that add up to K.

    A piece has at most ``max_rows`` rows, datapoints x particles.
    """
    particles = min(num_particles, max_rows)
    full, rest = divmod(num_particles, particles)
    sizes = [particles] * full + ([rest] if rest else [])
    datapoints = rows_per_piece(num_particles, max_rows)
    for start in range(0, rows, datapoints):
        yield slice(start, min(start + datapoints, rows)), sizes


# -- one run of a pair -------------------------------------------------------------------------


@contextmanager
def evaluating(
    model: Program, guide: Program, args: Sequence[Any], seed: int | None
) -> Iterator[None]:
    """Run a pair that has been checked: no gradients, evaluation mode, draws with a seed."""
    with (
        torch.no_grad(),
        evaluation_mode(model, guide),
        own_path(),
        pyro.validation_enabled(False),
        seeded(seed, *args),
        naming_positions(model, guide, args),
    ):
        yield


def modules_of(*programs: Program) -> nn.ModuleList:
    """The modules that hold the programs' parameters, each once."""
    owners = {id(owner): owner for owner in map(module_of, programs) if owner is not None}
    return nn.ModuleList(owners.values())


def trainable(*programs: Program) -> list[nn.Parameter]:
    """The programs' parameters that require a gradient, each once."""
    return [p for p in modules_of(*programs).parameters() if p.requires_grad]


def simulations(
    model: Program, args: Sequence[Any], rows: int, count: int, num_draws: int, max_rows: int
) -> Iterator[tuple[tuple[Any, ...], Trace]]:
    """Data drawn from the model, and the traces they came from, in pieces; ``count`` rows in all.

    What is not observed (a condition y) is used row after row, again from the first at the end.
    """
    for index in (torch.arange(count) % rows).split(rows_per_piece(num_draws, max_rows)):
        yield simulate(model, take(args, index), {})


def rows_first(
    site: Site, values: Tensor | None = None, own: int = 0, columns: Sequence[int] | None = None
) -> Tensor:
    """A site's value, or others of its shape, as ``(particles if any, datapoints, rest)``.

    Args:
        site: of a trace.
        values: what broadcasts to the site's shape, with ``own`` dims behind; None: its value.
        own: how many dims the values have beyond those of its event.
        columns: which of the last event dim the values are of; None: of all.
    """
    fn = site["fn"]
    if values is None:
        values = site["value"]
    else:
        shape = list(fn.batch_shape + fn.event_shape)
        if columns is not None:
            shape[-1] = len(columns)
        values = values.expand(*shape, *values.shape[values.dim() - own :] if own else ())
    dims = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    behind = fn.event_dim + own
    moved = [dims[name] - behind for name in (PARTICLE_PLATE, DATA_PLATE) if name in dims]
    return values.movedim(moved, list(range(len(moved))))


def require_numbers(weights: LogWeights, start: int = 0, where: str = "") -> None:
    """Raise ``ValueError`` if a log-weight is NaN or plus infinity, naming datapoint and site.

    Args:
        weights: of the datapoints from ``start`` on.
        start: number of the first datapoint.
        where: how the message begins.
    """
    bad = ~(weights.log_w < math.inf)
    if not bad.any():
        return
    row = int(bad.any(0).nonzero()[0])
    value = "NaN" if weights.log_w[:, row].isnan().any() else "infinite"
    # Too small a log q is as bad as too large a log p.
    sites = [
        f"{name!r} of the {program}"
        for program, terms, sign in (("model", weights.log_p, 1), ("guide", weights.log_q, -1))
        for name, term in terms.items()
        if not (sign * term.expand(*term.shape[:-1], bad.shape[1])[..., row] < math.inf).all()
    ]
    raise ValueError(
        f"{where}the log-weight of datapoint {start + row} is {value} for {int(bad[:, row].sum())} "
        f"of {len(bad)} particles, because of site {' and '.join(sites)}: look at row "
        f"{start + row} of the data, and for scales that under- or overflow or parameters of NaN"
    )


# -- numbers per datapoint ---------------------------------------------------------------------


def standard_error(values: Tensor) -> float:
    """Standard error of the mean over datapoints; NaN for one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def spread(values: Tensor) -> list[float]:
    """Mean, its standard error, and the 5, 50 and 95 % quantiles of what is not NaN."""
    numbers = values[~values.isnan()]
    if not len(numbers):
        return [math.nan] * 5
    # Infinite values cannot be interpolated.
    how = "linear" if numbers.isfinite().all() else "nearest"
    levels = torch.tensor([0.05, 0.5, 0.95], dtype=numbers.dtype)
    quantiles = numbers.quantile(levels, interpolation=how).tolist()
    return [numbers.mean().item(), standard_error(numbers), *quantiles]
