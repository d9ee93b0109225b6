"""Whether a program can be run on its arguments at all, and what is said if it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from ppvae.arguments import require_programs
from ppvae.pairs import FAILURES, Site, own_path, reason, sample_sites, unnoticed
from ppvae.program import module_of
from ppvae.wrapped import argument_labels, title


class PairError(ValueError):
    """A model/guide pair, or the data it is given, cannot work; the message lists every fault."""


def check_programs(**programs: Any) -> None:
    """Raise ``TypeError`` unless each, passed by its name, can be run as a program.

    Its parameters must have values, so none may be on the device "meta".
    """
    require_programs(**programs)
    for name, program in programs.items():
        owner = module_of(program)
        if owner is not None and any(parameter.is_meta for parameter in owner.parameters()):
            raise TypeError(
                f"{name} has parameters on the device 'meta', which keeps no values: build it on "
                f"another, or load a state after {name}.to_empty(device=...)"
            )


def require_runs(args: Sequence[Any], **programs: Any) -> None:
    """Raise :class:`PairError` unless each program, passed by its name, runs on its own."""
    first, *_, last = [*programs.values()] * 2
    with own_path(), unnoticed(first, last), pyro.validation_enabled(False):
        for role, program in programs.items():
            run_alone(role, program, args, {})


def failed(
    role: str,
    program: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    error: Exception,
) -> PairError:
    """What to raise where a program fails on its arguments."""
    if isinstance(error, PairError):
        return PairError(reason(error))
    labels = argument_labels(program, len(args))
    seen = ", ".join(
        f"{name}: {arg.dtype} {tuple(arg.shape)}"
        if isinstance(arg, Tensor)
        else f"{name}: {type(arg).__name__}"
        for name, arg in [*zip(labels, args, strict=True), *kwargs.items()]
    )
    return PairError(
        f"the {role} ({title(program)}) fails when called with ({seen}): {reason(error)}"
    )


def run_alone(
    role: str, program: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]
) -> dict[str, Site]:
    """The sites of a program that is run on its own."""
    try:
        drawn = sample_sites(poutine.trace(program).get_trace(*args, **kwargs))
    except FAILURES as error:
        raise failed(role, program, args, kwargs, error) from error
    for name, site in drawn.items():
        if not hasattr(site["fn"], "log_prob"):
            raise PairError(
                f"site {name!r} of the {role} has a {type(site['fn']).__name__} in the place of a "
                "distribution; put a network into a conditional, as conditionals.Normal(net)"
            )
    return drawn
