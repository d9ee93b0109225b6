"""Whether datapoints, and particles, keep apart when a pair is run again at given draws."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from pyro.poutine.replay_messenger import ReplayMessenger
from torch import Tensor, nn

from ppvae.check.behaviour import point_masses
from ppvae.pairs import (
    DATA_PLATE,
    PARTICLE_PLATE,
    ROUNDING,
    Args,
    Kwargs,
    Program,
    by_position,
    moved,
    reason,
    sample_sites,
    seeded,
)
from ppvae.program import all_modules, module_of
from ppvae.terms import NoInverse
from ppvae.weights import LogWeights, log_weights
from ppvae.wrapped import argument_names

_RTOL = 1e-3  # of a log-probability in float32; a fault is far larger, rounding far smaller
Terms = dict[tuple[str, str], Tensor]  # by ("model" | "guide", site)


class Apart(NamedTuple):
    """Whether rows and particles keep apart.

    Attributes:
        rows: sites that mix rows, as lines of a message; None: that was not looked at.
        particles: sites that mix particles; None: not looked at.
        unseen: why one of them was not looked at, though it is asked.
    """

    rows: list[str] | None
    particles: list[str] | None
    unseen: str = ""


def keeps_apart(weights: LogWeights, num_particles: int, keywords: bool = False) -> Apart:
    """Run a pair on two rows: at copies of draws, at copies of rows, and with several particles.

    All rows are taken where it does not run on two of them.

    Args:
        weights: of a batch.
        num_particles: how many there will be; one is nothing to be looked at.
        keywords: whether tensors that are passed by keyword are rows, too.
    """
    model, guide, _, _ = weights.pair
    with _perturbed_statistics(model, guide):
        again = _Replays(weights, keywords)
        drawn = again.drawn
        try:
            terms = again.terms(drawn)
            other_noise = _different(terms, again.terms(drawn, seed=1))
            at_copies = _different(_terms(again.weights), terms, ROUNDING)
            at_copies += _different(terms, again.terms(_with_values(drawn, _copy)))
        except _ONE_WAY:
            return Apart(None, None, "draws cannot be weighed again")
        if at_copies and not other_noise:
            unseen = f"a copy of the draw of {at_copies[0][1]!r} has another density than the draw"
            return Apart(None, None, unseen)
        leaks = leakage_faults(again, terms) if again.differ and not other_noise else None
        apart = None
        if num_particles > 1 and not other_noise and not point_masses(weights):
            apart = particle_faults(again)
        if other_noise or ((leaks or apart) and _different(terms, again.terms(drawn))):
            unseen = "a program draws noise outside its sites, or counts its calls"
            return Apart(None, None, unseen)
    alike = not again.differ and not weights.joint
    return Apart(leaks, apart, "it takes a batch with two different rows" if alike else "")


_ONE_WAY = (NoInverse, NotImplementedError, KeyError)  # of flows that cannot be inverted


@contextmanager
def _perturbed_statistics(model: Program, guide: Program) -> Iterator[None]:
    """Statistics of normalisation layers that differ by channel, and are restored on leaving.

    Those of a new layer are 0 and 1, so that nothing shows which axis it takes for channels.
    """
    modules: list[Any] = all_modules(model, guide)
    layers = [layer for layer in modules if getattr(layer, "running_mean", None) is not None]
    kept = [(layer.running_mean, layer.running_var) for layer in layers]
    try:
        for layer, (mean, var) in zip(layers, kept, strict=True):
            by_channel = torch.linspace(0.5, 1.5, len(mean)).to(mean)
            layer.running_mean = mean + by_channel * var.sqrt()
            layer.running_var = var * by_channel
        yield
    finally:
        for layer, (mean, var) in zip(layers, kept, strict=True):
            layer.running_mean, layer.running_var = mean, var


def leakage_faults(again: _Replays, terms: Terms) -> list[str]:
    """Sites at which one row's log-probability changes with the other rows.

    One row is kept, with its draws, and all others become copies of it, with its draws. An argument
    without which that changes nothing is named, since it may not be rows at all.

    Args:
        again: runs the pair.
        terms: the log-probabilities at the draws as they are.
    """
    changed = _leaks(again, terms, again.cut)
    alone = [
        label
        for label in again.cut
        if changed and len(again.cut) > 1 and not _leaks(again, terms, again.cut - {label})
    ]
    if any(isinstance(label, str) and _is_table(again, terms, label) for label in alone):
        return []  # which is never cut
    tables = [label for label in alone if isinstance(label, int)]
    labels = argument_names(again.weights.pair[0])
    faults = [
        f"argument {labels[i] if i < len(labels) else i!r} has {again.rows} rows, and is not used "
        "row by row: cut with the data it gives other numbers. If it is a table, pass it by "
        "keyword, which is never cut"
        for i in tables
    ]
    return faults + [
        f"site {name!r} of the {role}: the log-probability of one datapoint changes with the data "
        "or draws of the others, so there is no weight per datapoint. Compute each from its own "
        "data: no mean over dim 0, attention over rows, batch norm without running statistics"
        for role, name in changed
    ]


def _is_table(again: _Replays, terms: Terms, label: str) -> bool:
    """Whether no row depends on its own row of an argument more than on another one."""
    index = torch.arange(again.weights.log_w.shape[1])
    index[[0, -1]] = index[[-1, 0]]
    return not _different(terms, again.terms(again.drawn, {label}, index))


def _leaks(again: _Replays, terms: Terms, cut: set[int | str]) -> list[tuple[str, str]]:
    """Terms of a row that change when all others, in some arguments, become copies of it."""
    rows = again.weights.log_w.shape[1]
    changed: dict[tuple[str, str], None] = {}
    for kept in (0, rows - 1):  # the last one too: a row may see only those before it
        index = torch.full((rows,), kept)
        drawn = _with_values(again.drawn, functools.partial(_rows_of, index=index))
        after = again.terms(drawn, cut, index)
        for key, term in terms.items():
            if _differ(_row(term, kept), _row(after[key], kept)):
                changed[key] = None
    return list(changed)


def particle_faults(again: _Replays) -> list[str] | None:
    """Whether 3 particles at once are weighed as one by one; None if that cannot be compared."""
    model, guide, args, kwargs = again.weights.pair
    K, joint = 3, again.weights.joint
    with _misled_layers(model, guide, K) as misled:
        try:
            many = log_weights(model, guide, *args, num_particles=K, joint=joint, **kwargs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            seen = "".join(misled) or f"{reason(error)}. "
            return [f"the pair runs with one particle but not with {K}: {seen}{_FOLD}"]
    if many.enumerated:
        return None
    faults: dict[tuple[str, str], None] = {}
    together = _terms(many)
    for k in range(K):
        drawn = _with_values(many.guide_trace, functools.partial(_particle, k=k))
        for key, term in again.terms(drawn).items():
            both = together[key]
            if _differ(term[0], both[k if both.shape[0] > 1 else 0]):
                faults[key] = None
    return [
        f"site {name!r} of the {role}: {K} particles at once have other log-probabilities than "
        f"one by one at the same draws. {''.join(misled)}{_FOLD}"
        for role, name in faults
    ]


@contextmanager
def _misled_layers(model: Program, guide: Program, K: int) -> Iterator[list[str]]:
    """Layers of batch norm that take another dimension for their channels, as parts of a message.

    Yields:
        One sentence for each that is called so inside.
    """
    found: list[str] = []

    def note(layer: Any, inputs: tuple[Any, ...], name: str) -> None:
        shape = tuple(inputs[0].shape)
        sentence = f"Layer {name!r} (batch norm) gets (K, N, C), and takes dim 1 for channels. "
        if len(shape) > 2 and shape[0] == K and shape[-1] == layer.num_features:
            found.extend([sentence] if sentence not in found else [])

    handles = []
    for role, program in (("model", model), ("guide", guide)):
        owner = module_of(program)
        for name, layer in owner.named_modules() if owner is not None else ():
            if isinstance(layer, nn.BatchNorm1d):
                hook = functools.partial(note, name=f"{role}.{name}")
                handles.append(layer.register_forward_pre_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


_FOLD = (
    "Particles add a dimension on the left, (K, N, ...): count dims from the right, and put "
    "nets.flat_batch around a network that wants one batch dimension (Conv2d, BatchNorm, Flatten)"
)


# ------------------------------------------------------------------------------ replays


class _Replays:
    """A pair that is run again at given draws, on two rows of a batch if it does run on two.

    Args:
        weights: of the batch.
        keywords: whether tensors that are passed by keyword are rows, too.

    Attributes:
        rows: of the batch.
        cut: positions and names of the arguments that have these rows.
        differ: whether there are two rows with different data.
        weights: of what is run.
        drawn: the draws of the guide in them.
    """

    def __init__(self, weights: LogWeights, keywords: bool) -> None:
        _, guide, args, kwargs = weights.pair
        self.rows = weights.log_w.shape[1]
        known = [*enumerate(args), *(kwargs.items() if keywords else ())]
        rows = {label: value for label, value in known if _has_rows(value, self.rows)}
        self.cut: set[int | str] = set(rows)
        index = None if weights.joint else _two_different(rows.values())
        self.differ = index is not None
        self.weights = self._of_rows(weights, index)
        self.drawn = _with_values(self.weights.guide_trace, lambda site: site["value"])
        self._replay = ReplayMessenger(trace=self.drawn)
        self._guide = self._replay(guide)

    def _of_rows(self, weights: LogWeights, index: Tensor | None) -> LogWeights:
        """Log-weights of some rows; of all where the pair does not run on these."""
        model, guide, args, kwargs = weights.pair
        if index is not None and by_position(guide) is None:
            some, named = _taken(args, kwargs, self.cut, index)
            with suppress(RuntimeError, ValueError, IndexError):
                return log_weights(model, guide, *some, joint=weights.joint, **named)
        return log_weights(model, guide, *args, joint=weights.joint, **kwargs)

    def terms(
        self, drawn: Trace, cut: Collection[int | str] = (), index: Any = None, seed: int = 0
    ) -> Terms:
        """Log-probabilities at draws; other noise of the programs follows the seed.

        Args:
            drawn: a trace of the guide.
            cut: of which arguments the rows ``index`` are given.
            index: numbers of rows.
            seed: of what is drawn besides.
        """
        model, _, args, kwargs = self.weights.pair
        args, kwargs = _taken(args, kwargs, cut, index)
        self._replay.trace = drawn
        with seeded(seed, *args):
            weights = log_weights(model, self._guide, *args, joint=self.weights.joint, **kwargs)
        return _terms(weights)


def _two_different(tensors: Iterable[Tensor]) -> Tensor | None:
    """Numbers of two rows with different data; None if there are none."""
    found = [
        int(rows.nonzero()[-1])
        for tensor in tensors
        if (rows := _different_from_first(tensor)).any()
    ]
    return torch.tensor([0, max(found)]) if found else None


def _different_from_first(tensor: Tensor) -> Tensor:
    other = (tensor != tensor[:1]) & ~(tensor.isnan() & tensor[:1].isnan())
    return other.reshape(len(tensor), -1).any(1)


def _taken(args: Args, kwargs: Kwargs, cut: Collection[int | str], index: Any) -> Any:
    """Arguments of which some are cut to rows."""

    def take(label: int | str, value: Any) -> Any:
        return value.index_select(0, index.to(value.device)) if label in cut else value

    return (
        tuple(take(i, arg) for i, arg in enumerate(args)),
        {name: take(name, value) for name, value in kwargs.items()},
    )


def _with_values(trace: Trace, value_of: Callable[[Any], Tensor]) -> Trace:
    """What a guide has drawn, with other values; what it enumerates is enumerated again."""
    new = Trace()
    for name, site in sample_sites(trace).items():
        if "_enumerate_dim" not in site["infer"]:
            new.add_node(name, **{**site, "value": value_of(site)})
    return new


def _copy(site: Any) -> Tensor:
    return moved(site["value"], torch.clone)


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _rows_of(site: Any, index: Tensor) -> Tensor:
    value: Tensor = site["value"]
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE:
            dim = frame.dim - site["fn"].event_dim
            if -dim <= value.dim() and value.shape[dim] == len(index):
                index = index.to(value.device)
                return moved(value, functools.partial(torch.index_select, dim=dim, index=index))
    return value


def _row(term: Tensor, row: int) -> Tensor:
    return term[..., row if term.shape[-1] > 1 else 0]


def _particle(site: Any, k: int) -> Tensor:
    value: Tensor = site["value"]
    for frame in site["cond_indep_stack"]:
        if frame.name == PARTICLE_PLATE and value.dim() == site["fn"].event_dim - frame.dim:
            return moved(value, lambda tensor: tensor[k])
    return value


def _terms(weights: LogWeights) -> Terms:
    programs = (("model", weights.log_p), ("guide", weights.log_q))
    return {(role, name): t.detach() for role, terms in programs for name, t in terms.items()}


def _different(terms: Terms, others: Terms, tolerance: float = _RTOL) -> list[tuple[str, str]]:
    return [key for key, term in terms.items() if _differ(term, others[key], tolerance)]


def _differ(a: Tensor, b: Tensor, tolerance: float = _RTOL) -> bool:
    return not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
