"""What ``check_pair`` says of a pair: one answer to each question, and all of them as a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from torch import Tensor

from ppvae.check.apart import Apart
from ppvae.check.behaviour import (
    detached_latents,
    different_supports,
    drawn_once,
    foreign_parameter,
    parameters_without_gradient,
    point_masses,
    trainable_parameters,
)
from ppvae.pairs import by_position, is_discrete, is_rounded
from ppvae.weights import LogWeights

# The position of an argument, and what raises ValueError for values of it that cannot be used.
RowCheck = tuple[int, Callable[[Tensor], None]]


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

    def _repr_html_(self) -> str:
        head, *lines = repr(self).splitlines()
        marks = {"+": "&#10003;", "-": "&#10007;", "?": "?"}
        left = "<td style='text-align: left'>"
        rows = (
            f"<tr><td>{marks[line[2]]}</td>{left}{escape(line[4:])}</td></tr>" for line in lines
        )
        return f"<p>{escape(head)}</p><table>{''.join(rows)}</table>"


class Answer(NamedTuple):
    """To one question about a pair.

    Attributes:
        holds: what is right, a line each.
        faults: what is wrong, a line each.
        notes: what could not be asked, or is worth knowing.
    """

    holds: Sequence[str] = ()
    faults: Sequence[str] = ()
    notes: Sequence[str] = ()


def answer(weights: LogWeights, apart: Apart) -> Iterator[Answer]:
    """The answers to all questions, in the order of the report.

    Args:
        weights: of one particle, with gradients.
        apart: whether its rows and particles keep apart.
    """
    yield _latents(weights)
    yield _data(weights)
    yield _gradients(weights)
    yield from _rows_and_particles(weights, apart)
    yield _positions(weights)
    yield _points(weights)


def _latents(weights: LogWeights) -> Answer:
    """Whether the guide's latents are the model's, and cover them."""
    known = {**weights.global_p, **weights.p}
    latents = [name for name in (*weights.global_q, *weights.latents) if name in known]
    different = {} if point_masses(weights) else different_supports(weights)
    equal = "equal event shapes" if different else "equal event shapes and support"
    notes = [f"latent {name!r}: {why}" for name, why in different.items()]
    guide = weights.guide_trace.nodes
    for name in (n for n in latents if n not in weights.enumerated and is_rounded(guide[n])):
        also = ", and a sampled KL has none" if is_discrete(guide[name]["fn"]) else ""
        notes.append(
            f"latent {name!r} is straight-through: the gradients through it are those of another "
            f"function, so they are biased{also}"
        )
    holds = f"latents {latents} of the guide are those of the model, with {equal}"
    return Answer([holds], notes=notes)


def _data(weights: LogWeights) -> Answer:
    """What is observed; that it fits has been looked at before."""
    nodes = weights.model_trace.nodes
    observed = [n for n in sorted(weights.observed) if not nodes[n]["infer"].get("is_auxiliary")]
    shared = [name for name in weights.global_q if name in weights.global_p]
    but = f" but {shared}, drawn once for all rows," if shared else ""
    plates = "" if weights.joint else f"every site{but} lies in the plate 'data', and "
    fits = f"data {observed} have the likelihood's shape and lie in its support"
    return Answer([fits, f"{plates}all log-probabilities are numbers"])


def _gradients(weights: LogWeights) -> Answer:
    """Whether training would reach every parameter, and no other one."""
    missing = parameters_without_gradient(weights)
    faults = [
        f"parameter {name!r} gets no gradient: no log-probability depends on it, so it would never "
        "be trained; use it in the program, do not detach() what it makes, or freeze it with "
        "requires_grad_(False)"
        for name in missing
    ]
    foreign = foreign_parameter(weights)
    notes = [
        f"latent {name!r}: no gradient leads from the model's other sites to it, so the guide "
        "learns from its KL alone; if the model uses it, do not detach() it"
        for name in detached_latents(weights)
    ]
    count = len(trainable_parameters(*weights.pair[:2]))
    holds = [f"gradients reach all {count} trainable parameters"] if count and not missing else []
    return Answer(holds, [*faults, foreign] if foreign else faults, notes)


def _rows_and_particles(weights: LogWeights, apart: Apart) -> Iterator[Answer]:
    """Whether each row, each particle and each enumerated value is weighed by itself."""
    rows, particles, values, unseen = apart
    if rows is not None:
        holds = [] if rows else ["no row's log-probability changes with the other rows"]
        yield Answer(holds, rows)
    if particles is not None:
        holds = [] if particles else ["3 particles at once are weighed as one by one"]
        yield Answer(holds, particles)
    if values is not None:
        holds = [] if values else ["enumerated values at once are weighed as one by one"]
        yield Answer(holds, values)
    if unseen:
        what = "leakage is" if particles is not None else "leakage and particles are"
        yield Answer(notes=[f"{what} not checked: {unseen}"])


def _positions(weights: LogWeights) -> Answer:
    """Whether parameters belong to positions in the batch."""
    auto = None if weights.joint else by_position(weights.pair[1])
    if auto is None:
        return Answer()
    note = (
        f"the parameters of {type(auto).__name__} belong to positions in the batch; for "
        "minibatches wrap it in guides.Auto, which gives each row of the data its own"
    )
    return Answer(notes=[note])


def _points(weights: LogWeights) -> Answer:
    """Whether the guide has a density."""
    once = drawn_once(weights)
    if not once:
        return Answer()
    name, points = next(iter(once)), point_masses(weights)
    note = (
        f"latent {points[0]!r} is a point mass: the ELBO is then log p(x, z) at that point, no "
        "bound on log p(x), and there is no evidence or k-hat"
        if points
        else f"latent {name!r} is deterministic: its log q = 0 is a probability, and the ELBO a "
        "bound; all draws are equal, so there is no evidence or k-hat"
    )
    return Answer(notes=[note])
