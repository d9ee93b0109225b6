"""Check a model/guide pair on a batch, before any work is spent on it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppvae.check.apart import Apart, keeps_apart
from ppvae.check.behaviour import possible_gradients
from ppvae.check.data import number_fault, refused_rows, rows_without_numbers, shape_fault
from ppvae.check.nonfinite import blame
from ppvae.check.programs import PairError, check_programs, run_alone
from ppvae.check.report import PairReport, RowCheck, answer
from ppvae.check.sites import (
    check_support,
    known_support,
    latent_faults,
    observation_fault,
    plate_faults,
    weight_faults,
)
from ppvae.intake import takes_rows
from ppvae.pairs import Site, own_path, position_fault, reason, unnoticed
from ppvae.program import local_parameters, module_of
from ppvae.weights import LogWeights, log_weights, weigh, whole_weights
from ppvae.wrapped import argument_labels

__all__ = ["Checks", "PairError", "PairReport", "RowCheck", "check_batch", "check_pair"]

Checks = Iterable[RowCheck]


@takes_rows
def check_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    joint: bool = False,
    **kwargs: Any,
) -> PairReport:
    """Run the pair on a batch, in evaluation mode, and raise if anything about it is wrong.

    Beyond what :func:`check_batch` looks at, that the pair can be trained: a gradient reaches every
    trainable parameter, and no other one. Parameters, random stream and batch-norm statistics are
    left as they were.

    Args:
        model, guide: Pyro programs.
        *args: a batch, as both are called: ``x`` or ``x, y``; two different rows at least show
            leakage.
        joint: allow latents outside the data plate.
        **kwargs: passed to both programs.

    Returns:
        :class:`PairReport`: what is right, and which gradients of :mod:`ppvae.elbo` the pair can
        be trained with.

    Raises:
        PairError: with one line per fault, naming the site, parameter or argument, what was seen,
            and the cure.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> ppvae.check_pair(model, guide, torch.eye(4))
        The pair fits together.
          + latents ['z'] of the guide are those of the model, with equal event shapes and support
          + data ['x'] have the likelihood's shape and lie in its support
          + every site lies in the plate 'data', and all log-probabilities are numbers
          + gradients reach all 8 trainable parameters
          + no row's log-probability changes with the other rows
          + 3 particles at once are weighed as one by one
          + gradients of ppvae.elbo: pathwise, stl, dreg, score, vimco
        >>> ppvae.check_pair(model, guide, torch.full((5, 4), 0.5))
        Traceback (most recent call last):
        ...
        ppvae.check.programs.PairError: site 'x': argument 'x': 20 of 20 values lie outside the ...
    """
    with local_parameters():  # what is trained here would not be in Pyro's store
        seen = _examine(model, guide, args, kwargs, joint, num_particles=3, keywords=True)
        with unnoticed(model, guide), pyro.validation_enabled(False), torch.enable_grad():
            weights = log_weights(model, guide, *args, joint=joint, **kwargs)
            answers = [*answer(weights, seen.apart)]
            gradients = possible_gradients(weights)
    if faults := [fault for answer in answers for fault in answer.faults]:
        raise PairError("\n".join(faults))
    holds = tuple(line for answer in answers for line in answer.holds)
    notes = tuple(note for answer in answers for note in answer.notes)
    return PairReport(holds, notes, gradients, tuple(seen.row_checks))


def check_batch(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    joint: bool = False,
    num_particles: int = 1,
    whole: bool = False,
    **kwargs: Any,
) -> list[RowCheck]:
    """What every pair has to fulfil, for training and for evaluation alike.

    Everything that trains or evaluates calls it on a first batch, so that all accept the same
    pairs. Checked: the data have equal length, are not empty, and dense; both programs run; the
    guide has the model's latents and no others, with the same event shapes and in their support;
    every site lies in the plate ``"data"``, or is a latent outside of it in both programs, and
    declares its other dimensions as event; the observations fit the likelihood's shape and
    support, or are masked; no log-probability is NaN or infinitely large, whatever the data hold;
    none changes with the other rows or their number,
    nor with the other values of an enumerated latent, nor, if there are to be several, with the
    other particles. A module with a method ``check(values)``, such as
    ``nets.OneHot``, is asked about an argument it is called with.

    Args:
        model, guide, args, joint, kwargs: as in :func:`check_pair`.
        num_particles: how many particles the pair is to be run with.
        whole: refuse plates that subsample themselves, for numbers that are to be reported.

    Returns:
        The checks of single arguments that also hold beyond this batch (support, labels), by
        position: :func:`check_values` applies them to all data.

    Raises:
        PairError: with one line per fault, naming the site or argument, what was seen, the cure.
    """
    seen = _examine(model, guide, args, kwargs, joint, num_particles, whole=whole)
    if seen.apart.faults:
        raise PairError("\n".join(seen.apart.faults))
    return seen.row_checks


def check_values(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    checks: Checks,
    *,
    where: str = "",
    trains: bool = False,
) -> None:
    """Raise :class:`PairError` unless a pair takes all rows of the data, as it took a batch.

    Each argument is looked at as a whole. Rows that hold NaN, or values outside the support, are
    given to the pair: it may mask them.

    Args:
        model, guide: Pyro programs that :func:`check_batch` has approved of.
        args: all data, as both are called.
        checks: what :func:`check_batch` has returned.
        where: which data these are, as in ``" in valid"``.
        trains: whether gradients of these rows have to be finite, too.
    """
    tensors = check_shapes(model, args)
    doubtful: dict[int, str] = {}  # by row, why
    for label, tensor in tensors.items():
        if (found := rows_without_numbers(tensor)).any():
            fault = number_fault({label: tensor}, where)
            doubtful |= dict.fromkeys(found.nonzero().flatten().tolist(), fault)
    for position, check in checks:
        values = args[position]
        try:
            check(values)
        except ValueError as error:
            fault = f"argument {argument_labels(model, len(args))[position]!r}{where}: {error}"
            if getattr(check, "func", None) is not check_support:
                raise PairError(fault) from error
            doubtful |= {row: fault for row in refused_rows(check, values) if row not in doubtful}
    rows = sorted(doubtful)
    for start in range(0, len(rows), _MOST_ROWS):
        part = torch.tensor(rows[start : start + _MOST_ROWS])
        batch = [arg[part.to(arg.device)] if isinstance(arg, Tensor) else arg for arg in args]
        with own_path(), unnoticed(model, guide), pyro.validation_enabled(False):
            try:
                _weigh(model, guide, batch, {}, joint=False)
                with torch.enable_grad():
                    why = blame(model, guide, *batch) if trains else ""
                if why:
                    raise PairError(why)
            except PairError as error:
                raise PairError(_with_cure(doubtful[rows[start]], error)) from error


_MOST_ROWS = 100


def check_tensors(program: Callable[..., Any], args: Sequence[Any]) -> None:
    """Raise :class:`PairError` unless the tensors are finite, not empty and of equal length."""
    if fault := number_fault(check_shapes(program, args)):
        raise PairError(f"{fault}; drop or impute them, or put 0 where a mask hides them")


def check_shapes(program: Callable[..., Any], args: Sequence[Any]) -> dict[str, Tensor]:
    """The tensors by name; :class:`PairError` unless they are dense, not empty, of equal length."""
    labels = zip(argument_labels(program, len(args)), args, strict=True)
    tensors = {label: arg for label, arg in labels if isinstance(arg, Tensor)}
    if fault := shape_fault(tensors):
        raise PairError(fault)
    return tensors


class _Seen(NamedTuple):
    row_checks: list[RowCheck]
    apart: Apart


def _examine(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    joint: bool,
    num_particles: int,
    keywords: bool = False,
    whole: bool = False,
) -> _Seen:
    """What every entry point asks of a pair, whether it trains or evaluates.

    Raises:
        PairError: its sites or the batch are wrong. What it mixes up is in the result.
    """
    check_programs(model=model, guide=guide)
    tensors = check_shapes(model, args)
    if fault := position_fault(guide, args, kwargs):
        raise PairError(fault)
    with (
        own_path(),
        unnoticed(model, guide),
        pyro.validation_enabled(False),
        _module_checks(model, guide, args) as checks,
    ):
        try:
            weights, more = _weigh(model, guide, args, kwargs, joint, whole)
        except PairError as error:
            if fault := number_fault(tensors):
                raise PairError(_with_cure(fault, error)) from error
            raise
        return _Seen([*checks, *more], keeps_apart(weights, num_particles, keywords))


def _with_cure(fault: str, error: PairError) -> str:
    """What a message says of data that a pair cannot weigh."""
    if " NaN or infinite values in " not in fault:
        return fault
    why = str(error).splitlines()[0].partition(";")[0]
    cure = "drop or impute them, or let model and guide mask them (models.Masked, nets.Masked)"
    return f"{fault}; {cure}. Now {why}"


def _weigh(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    joint: bool,
    whole: bool = False,
) -> tuple[LogWeights, list[RowCheck]]:
    """Log-weights of one draw, and the checks of arguments that hold for other rows."""
    faults: list[str] = []
    checks: list[RowCheck] = []
    try:
        guide_sites = run_alone("guide", guide, args, kwargs)
    except PairError as error:  # the model may name the cause in the data
        with suppress(Exception):  # what the guide lacks is to be said
            model_sites = run_alone("model", model, args, kwargs)
            faults += _data_faults(model, args, model_sites, checks)
        raise PairError("\n".join([*faults, str(error)])) from error
    model_sites = run_alone("model", model, args, kwargs)  # from its own prior
    faults += latent_faults(_at_draws(model, args, kwargs, guide_sites) or model_sites, guide_sites)
    if not joint:
        faults += plate_faults("model", model_sites, guide_sites)
        faults += plate_faults("guide", guide_sites, model_sites)
    faults += _data_faults(model, args, model_sites, checks)
    if faults:
        raise PairError("\n".join(faults))
    make = functools.partial(whole_weights, estimates=True) if whole else weigh
    try:
        weights = make(model, guide, tuple(args), {**kwargs, "joint": joint}, 1, with_globals=True)
    except ValueError as error:
        raise PairError(reason(error)) from error
    if faults := weight_faults(weights):
        raise PairError("\n".join(faults))
    return weights, checks


def _at_draws(
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    guide_sites: dict[str, Site],
) -> dict[str, Site] | None:
    """The model's sites at the guide's draws, where a support may depend on them; None: it fails.

    It does so at draws of another shape, say.
    """
    drawn = Trace()
    drawn.nodes.update(guide_sites)
    try:
        return run_alone("model", poutine.replay(model, trace=drawn), args, kwargs)
    except PairError:
        return None


@contextmanager
def _module_checks(model: Any, guide: Any, args: Sequence[Any]) -> Iterator[list[RowCheck]]:
    """Let each module with a ``check`` method check the arguments it is called with; note it."""
    noted: list[RowCheck] = []

    def before(module: Any, inputs: tuple[Any, ...]) -> None:
        for position, arg in enumerate(args):
            check = (position, module.check)
            if any(arg is value for value in inputs) and check not in noted:
                try:
                    module.check(arg)
                except ValueError as error:
                    label = argument_labels(model, len(args))[position]
                    raise PairError(f"argument {label!r}: {error}") from error
                noted.append(check)

    owners = [owner for owner in (module_of(model), module_of(guide)) if owner is not None]
    modules = {m for owner in owners for m in owner.modules() if hasattr(m, "check")}
    handles = [module.register_forward_pre_hook(before) for module in modules]
    try:
        yield noted
    finally:
        for handle in handles:
            handle.remove()


def _data_faults(
    model: Any, args: Sequence[Any], model_sites: dict[str, Site], checks: list[RowCheck]
) -> list[str]:
    """What is wrong with the observed data; checks that hold for other rows go to ``checks``."""
    faults = []
    for name, site in model_sites.items():
        if site["is_observed"] and isinstance(site["value"], Tensor):
            position = next((i for i, arg in enumerate(args) if arg is site["value"]), None)
            label = (
                "obs"
                if position is None
                else f"argument {argument_labels(model, len(args))[position]!r}"
            )
            fault = observation_fault(site)
            faults += [f"site {name!r}: {label}{fault}"] if fault else []
            support = known_support(site["fn"])
            if position is None or fault or support is None:
                continue
            if not _by_row(support, site["value"]):
                checks.append((position, functools.partial(check_support, support=support)))
    return faults


def _by_row(support: Any, values: Tensor) -> bool:
    """Whether the support differs by datapoint, so that it says nothing about other rows."""
    inside = support.check(values[:1])
    return inside.dim() > 0 and len(inside) != 1
