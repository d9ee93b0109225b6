"""Check a model/guide pair on a batch, before any work is spent on it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.poutine import Trace
from torch import Tensor

from ppvae.check.behaviour import (
    NO_INVERSE,
    detached_latents,
    is_deterministic,
    leakage_faults,
    parameters_without_gradient,
    particle_faults,
    point_masses,
    possible_gradients,
    same_support,
    trainable_parameters,
)
from ppvae.check.sites import (
    check_support,
    describe,
    latent_faults,
    observation_fault,
    plate_faults,
    weight_faults,
)
from ppvae.pairs import Site, reason, sample_sites, unnoticed
from ppvae.program import local_parameters, module_of
from ppvae.weights import log_weights

# The position of an argument, and what raises ValueError for values of it that cannot be used.
RowCheck = tuple[int, Callable[[Tensor], None]]
Checks = Iterable[RowCheck]


class PairError(ValueError):
    """A model/guide pair, or the data it is given, cannot work; the message lists every fault."""


@dataclass(frozen=True)
class PairReport:
    """What :func:`check_pair` found right with a pair; its repr is for reading.

    Attributes:
        holds: what was checked and holds, one line each.
        notes: what could not be checked, and why, or is worth knowing.
        gradients: for each gradient of :mod:`ppvae.elbo` why the pair cannot be trained with it;
            an empty string if it can.
        row_checks: the checks of single arguments (support, labels) that hold beyond the batch, by
            position of the argument. Iterating over the report gives them.
    """

    holds: tuple[str, ...]
    notes: tuple[str, ...]
    gradients: dict[str, str]
    row_checks: tuple[RowCheck, ...]

    def __iter__(self) -> Iterator[RowCheck]:
        return iter(self.row_checks)

    def __repr__(self) -> str:
        usable = [name for name, why in self.gradients.items() if not why]
        lines = ["The pair fits together.", *(f"  + {line}" for line in self.holds)]
        lines.append(f"  + gradients of ppvae.elbo: {', '.join(usable)}")
        for why in dict.fromkeys(filter(None, self.gradients.values())):
            refused = [name for name, other in self.gradients.items() if other == why]
            lines.append(f"  - not {', '.join(refused)}: {why}")
        return "\n".join([*lines, *(f"  ? {note}" for note in self.notes)])


def check_pair(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    joint: bool = False,
    **kwargs: Any,
) -> PairReport:
    """Run the pair on a batch, in evaluation mode, and raise if anything about it is wrong.

    Beyond what :func:`check_batch` looks at, it checks that a gradient reaches every trainable
    parameter, that no datapoint's log-probability changes with the data or draws of another, and
    that K particles at once are weighed as one by one. It takes about a dozen runs of the pair.
    Parameters, random stream and batch-norm statistics are left as they were.

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
        ppvae.check.pair.PairError: site 'x': argument 'x': 20 of 20 values lie outside the ...
    """
    row_checks = check_batch(model, guide, *args, joint=joint, **kwargs)
    pair = (model, guide, args, kwargs)
    holds, notes, faults = [], [], []
    with unnoticed(model, guide), local_parameters(), pyro.validation_enabled(False):
        with torch.enable_grad():
            weights = log_weights(model, guide, *args, joint=joint, **kwargs)
            detached = detached_latents(weights)
            missing = parameters_without_gradient(weights, model, guide)
            gradients = possible_gradients(weights, *pair)
        points = point_masses(weights)
        invertible = gradients["dreg"] != NO_INVERSE  # or draws cannot be weighed again
        repeatable = invertible and is_deterministic(weights, *pair)
        leaks = leakage_faults(weights, *pair) if repeatable and not joint else None
        apart = particle_faults(weights, *pair) if repeatable and not points else None
    latents, observed = list(weights.latents), sorted(weights.observed)
    nodes = [t.nodes for t in (weights.guide_trace, weights.model_trace)]
    narrower = [
        name
        for name in latents
        if name in weights.log_p
        and name not in weights.enumerated
        and not points
        and not same_support(*(by_name[name]["fn"] for by_name in nodes))
    ]
    equal = "equal event shapes" if narrower else "equal event shapes and support"
    holds.append(f"latents {latents} of the guide are those of the model, with {equal}")
    notes += [
        f"latent {name!r}: the guide's support is not all of the model's, "
        f"{describe(nodes[1][name]['fn'].support)}: the ELBO stays a lower bound, but log p(x), "
        "IWELBO and k-hat know nothing of the rest"
        for name in narrower
    ]
    holds.append(f"data {observed} have the likelihood's shape and lie in its support")
    where = "" if joint else "every site lies in the plate 'data', and "
    holds.append(f"{where}all log-probabilities are numbers")
    faults += [
        f"parameter {name!r} gets no gradient: no log-probability depends on it, so it would never "
        "be trained; use it in the program, do not detach() what it makes, or freeze it with "
        "requires_grad_(False)"
        for name in missing
    ]
    notes += [
        f"latent {name!r}: no gradient leads from the model's other sites to it, so the guide "
        "learns from its KL alone; if the model uses it, do not detach() it"
        for name in detached
    ]
    count = len(trainable_parameters(model, guide))
    if not missing and count:
        holds.append(f"gradients reach all {count} trainable parameters")
    faults += leaks or []
    if leaks == []:
        holds.append("no row's log-probability changes with the other rows")
    faults += apart or []
    if apart == []:
        holds.append("3 particles at once are weighed as one by one")
    if not invertible:
        notes.append("leakage and particles are not checked: draws cannot be weighed again")
    elif not repeatable:
        notes.append(
            "leakage and particles are not checked: log-probabilities of the same draws differ "
            "between two runs, since a program draws noise outside its sites"
        )
    elif leaks is None and not joint:
        notes.append("leakage is not checked: it takes a batch with two different rows")
    if isinstance(guide, AutoGuide) and guide.create_plates is None and not joint:
        notes.append(
            f"the parameters of {type(guide).__name__} belong to positions in the batch; for "
            "minibatches wrap it in guides.Auto, which gives each row of the data its own"
        )
    if points:
        notes.append(
            f"latent {points[0]!r} is a point mass: the ELBO is then log p(x, z) at that point, no "
            "bound on log p(x), and there is no evidence or k-hat"
        )
    if faults:
        raise PairError("\n".join(faults))
    return PairReport(tuple(holds), tuple(notes), gradients, tuple(row_checks))


def check_batch(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    *args: Any,
    joint: bool = False,
    **kwargs: Any,
) -> list[RowCheck]:
    """The quick part of :func:`check_pair`: two runs of the pair, for every first batch.

    Checked: the data are finite, of equal length and not empty; both programs run; the guide has
    the model's latents and no others, with the same event shapes and in their support; every site
    lies in the plate ``"data"`` and declares its other dimensions as event; the observations fit
    the likelihood's shape and support; no log-probability is NaN or infinitely large. A module
    with a method ``check(values)``, such as ``nets.OneHot``, is asked about an argument it is
    called with.

    Args:
        model, guide, args, joint, kwargs: as in :func:`check_pair`.

    Returns:
        The checks of single arguments that also hold beyond this batch (support, labels), by
        position: :func:`ppvae.fit` applies them to the whole data set.

    Raises:
        PairError: with one line per fault, naming the site or argument, what was seen, the cure.
    """
    check_tensors(model, args)
    faults: list[str] = []
    with (
        unnoticed(model, guide),
        local_parameters(),
        pyro.validation_enabled(False),
        _module_checks(model, guide, args) as checks,
    ):
        try:
            guide_sites = sample_sites(_run("guide", guide, args, kwargs))
        except PairError as error:  # the model may name the cause in the data
            with suppress(Exception):  # what the guide lacks is to be said
                model_sites = sample_sites(_run("model", model, args, kwargs))
                faults += _data_faults(model, args, model_sites, checks)
            raise PairError("\n".join([*faults, str(error)])) from error
        model_sites = sample_sites(_run("model", model, args, kwargs))  # from its own prior
        faults += latent_faults(model_sites, guide_sites)
        if not joint:
            faults += plate_faults("model", model_sites) + plate_faults("guide", guide_sites)
        faults += _data_faults(model, args, model_sites, checks)
        if not faults:
            faults = weight_faults(log_weights(model, guide, *args, joint=joint, **kwargs))
    if faults:
        raise PairError("\n".join(faults))
    return checks


def check_tensors(program: Callable[..., Any], args: Sequence[Any]) -> None:
    """Raise :class:`PairError` unless the tensors are finite, not empty and of equal length."""
    labels = names(program, args)
    tensors = {
        label: arg for label, arg in zip(labels, args, strict=True) if isinstance(arg, Tensor)
    }
    for label, tensor in tensors.items():
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise PairError(
                f"argument {label!r} is empty: shape {tuple(tensor.shape)}; its first dimension is "
                "the datapoints, and there must be at least one"
            )
        # A finite sum has no NaN or infinity in it, and costs a fraction of looking at each value.
        if not tensor.is_floating_point() or torch.isfinite(tensor.sum()):
            continue
        if not (finite := torch.isfinite(tensor)).all():
            rows = (
                (~finite).flatten(1).any(1).nonzero() if tensor.dim() > 1 else (~finite).nonzero()
            )
            raise PairError(
                f"argument {label!r} has {int((~finite).sum())} NaN or infinite values in "
                f"{len(rows)} rows, the first is row {int(rows[0])}; drop or impute them"
            )
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        seen = ", ".join(f"{label}: {tuple(t.shape)}" for label, t in tensors.items())
        raise PairError(
            f"the arguments differ in length ({seen}); each needs one row per datapoint"
        )


def names(program: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    """What a program calls its positional arguments."""
    function = program.forward if isinstance(program, torch.nn.Module) else program
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return [known[i] if i < len(known) else f"argument {i}" for i in range(len(args))]


def _run(
    role: str, program: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> Trace:
    try:
        return poutine.trace(program).get_trace(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, PairError):
            raise PairError(reason(error)) from error
        seen = ", ".join(
            f"{name}: {arg.dtype} {tuple(arg.shape)}"
            if isinstance(arg, Tensor)
            else f"{name}: {type(arg).__name__}"
            for name, arg in [*zip(names(program, args), args, strict=True), *kwargs.items()]
        )
        raise PairError(
            f"the {role} ({type(program).__name__}) fails when called with ({seen}): "
            f"{reason(error)}"
        ) from error


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
                    label = names(model, args)[position]
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
            label = "obs" if position is None else f"argument {names(model, args)[position]!r}"
            fault = observation_fault(site)
            faults += [f"site {name!r}: {label}{fault}"] if fault else []
            if position is not None and not fault and not _by_row(site):
                check = functools.partial(check_support, support=site["fn"].support)
                checks.append((position, check))
    return faults


def _by_row(site: Site) -> bool:
    """Whether the support differs by datapoint, so that it says nothing about other rows."""
    inside = site["fn"].support.check(site["value"][:1])
    return inside.dim() > 0 and len(inside) != 1
