"""Whether rows, particles and enumerated values keep apart when a pair is run again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from pyro.poutine import Trace
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppvae.check.behaviour import drawn_once
from ppvae.pairs import (
    DATA_PLATE,
    PARTICLE_PLATE,
    ROUNDING,
    Args,
    Kwargs,
    Program,
    Site,
    by_position,
    moved,
    reason,
    replay,
    sample_sites,
    seeded,
)
from ppvae.program import all_modules, module_of
from ppvae.terms import NoInverse, log_density
from ppvae.weights import LogWeights, log_weights
from ppvae.wrapped import argument_labels

_RTOL = 1e-3  # of a log-probability in float32; a fault is far larger, rounding far smaller
Terms = dict[tuple[str, str], Tensor]  # by ("model" | "guide", site)


class Apart(NamedTuple):
    """Whether rows, particles and enumerated values keep apart.

    Attributes:
        rows: sites that mix rows, as lines of a message; None: that was not looked at.
        particles: sites that mix particles; None: not looked at.
        values: sites that mix the values of an enumerated latent; None: not looked at.
        unseen: why one of them was not looked at, though it is asked.
    """

    rows: list[str] | None = None
    particles: list[str] | None = None
    values: list[str] | None = None
    unseen: str = ""

    @property
    def faults(self) -> list[str]:
        """All that was found."""
        return [*(self.rows or ()), *(self.particles or ()), *(self.values or ())]


def keeps_apart(weights: LogWeights, num_particles: int, keywords: bool = False) -> Apart:
    """Run a pair on two rows again: at copies of draws, at copies of rows, with several particles.

    Then on all rows at the same draws, and at single values of what is enumerated. All rows are
    taken throughout where the pair does not run on two of them.

    Args:
        weights: of a batch.
        num_particles: how many there will be; one is nothing to be looked at.
        keywords: whether tensors that are passed by keyword are rows, too.
    """
    model, guide, _, _ = weights.pair
    with _perturbed_statistics(model, guide):
        again = _Replays(weights, keywords)
        if grows := _grows_with_rows(again):
            return Apart(grows)
        drawn = again.drawn
        try:
            terms = again.terms(drawn)
            other_noise = _different(terms, again.terms(drawn, seed=1))
            at_copies = _different(_terms(again.weights), terms, ROUNDING)
            at_copies += _different(terms, again.terms(_with_values(drawn, _copy)))
        except _ONE_WAY:
            return Apart(unseen="draws cannot be weighed again")
        if at_copies and not other_noise:
            unseen = f"a copy of the draw of {at_copies[0][1]!r} has another density than the draw"
            return Apart(unseen=unseen)
        leaks = leakage_faults(again, terms) if again.differ and not other_noise else None
        particles = values = None
        if num_particles > 1 and not other_noise and not drawn_once(weights):
            particles = particle_faults(again)
        if weights.enumerated and not other_noise:
            values = value_faults(again)
        found = Apart(leaks, particles, values)
        if other_noise or (found.faults and _different(terms, again.terms(drawn))):
            unseen = "a program draws noise outside its sites, or counts its calls"
            return Apart(unseen=unseen)
    alike = not again.differ and not weights.joint
    return found._replace(unseen="it takes a batch with two different rows" if alike else "")


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
    labels = argument_labels(again.weights.pair[0], max(tables, default=0) + 1)
    faults = [
        f"argument {labels[i].removeprefix('argument ')!r} has {again.rows} rows, and is not used "
        "row by row: cut with the data it gives other numbers. If it is a table, pass it by "
        "keyword, which is never cut"
        for i in tables
    ]
    apart = again.weights.global_q.keys() | again.weights.global_p.keys()
    faults += [
        f"site {name!r} of the {role}: the density of a global latent changes with the rows that "
        "are given, and the bound of a minibatch would be none of all data. Let it have parameters "
        "of its own, or, for all data at once, ask for one weight: joint=True"
        for role, name in changed
        if name in apart
    ]
    faults += [
        f"site {name!r} of the {role}: the log-probability of one datapoint changes with the data "
        "or draws of the others, so there is no weight per datapoint. Compute each from its own "
        "data: no mean over dim 0, attention over rows, batch norm without running statistics"
        for role, name in changed
        if name not in apart
    ]
    return faults or [
        f"site {name!r} of the {role}: the log-probability of one datapoint changes with how many "
        f"there are: others in a batch of 2 than in one of {again.rows}. Divide "
        "by no number of rows: a minibatch is scaled by pyro.plate(size=...), outside the sites"
        for role, name in _changed_by_size(again)
    ]


def _grows_with_rows(again: _Replays) -> list[str]:
    """Global latents of which there are as many values as there are rows."""
    some, all_rows = again.weights.guide_trace.nodes, again.whole.guide_trace.nodes
    return [
        f"latent {name!r} lies outside the plate {DATA_PLATE!r}, and its shape changes with the "
        f"number of rows: {tuple(some[name]['value'].shape)} for {again.weights.log_w.shape[1]}, "
        f"{tuple(all_rows[name]['value'].shape)} for {again.rows}. Draw it inside of the plate"
        for name in again.weights.global_q
        if some[name]["value"].shape != all_rows[name]["value"].shape
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


def _changed_by_size(again: _Replays) -> list[tuple[str, str]]:
    """Terms of the two rows that are others in the whole batch, at the same draws."""
    # a point is not the same to the last digit in a batch of another size
    if again.index is None or drawn_once(again.whole):
        return []
    drawn, cut = again.whole.guide_trace, functools.partial(_rows_of, index=again.index)
    few = again.terms(_with_values(drawn, cut))
    many = again.weigh(_with_values(drawn, lambda site: site["value"]), *again.whole.pair[2:])
    return [
        key
        for key, term in many.items()
        if _differ(few[key], term[..., again.index] if term.shape[-1] > 1 else term)
    ]


def position_faults(weights: LogWeights) -> list[str]:
    """Sites at which the log-probability of a datapoint belongs to its place in the batch.

    That is right as long as all rows are given in their order, so it is asked where they are not.
    """
    again = _Replays(weights, keywords=False)
    backwards = torch.arange(again.weights.log_w.shape[1]).flip(0)
    try:
        terms = again.terms(again.drawn)
        if drawn_once(weights) or _different(terms, again.terms(again.drawn, seed=1)):
            return []
        drawn = _with_values(again.drawn, functools.partial(_rows_of, index=backwards))
        after = again.terms(drawn, again.cut, backwards)
    except _ONE_WAY:
        return []
    expected = {key: t[..., backwards] if t.shape[-1] > 1 else t for key, t in terms.items()}
    return [
        f"site {name!r} of the {role}: parameters or data of its own belong to positions in the "
        "batch, and rows come in another order in each epoch. Give what belongs to rows as an "
        "argument beside the data, or train on all rows at once: fit(svi, tensors, batch_size=N)"
        for role, name in _different(expected, after)
    ]


def particle_faults(again: _Replays) -> list[str]:
    """Sites at which 3 particles at once are not weighed as one by one."""
    _, _, args, kwargs = again.weights.pair
    K, joint = 3, again.weights.joint
    with _misled_layers(*again.weights.pair[:2], K) as misled:
        try:
            many = log_weights(
                again.model, again.guide, *args, num_particles=K, joint=joint, **kwargs
            )
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            seen = "".join(misled) or f"{reason(error)}. "
            return [f"the pair runs with one particle but not with {K}: {seen}{_FOLD}"]
    faults: dict[tuple[str, str], None] = {}
    together = _terms(many)
    for k in range(K):
        drawn = _with_values(many.guide_trace, functools.partial(_particle, k=k))
        for key, term in again.terms(drawn).items():
            both = together[key]
            if _differ(term[..., 0, :], both[..., k if both.shape[-2] > 1 else 0, :]):
                faults[key] = None
    return [
        f"site {name!r} of the {role}: {K} particles at once have other log-probabilities than "
        f"one by one at the same draws. {''.join(misled)}{_FOLD}"
        for role, name in faults
    ]


def value_faults(again: _Replays) -> list[str]:
    """Sites at which the values of enumerated latents are not weighed as one by one."""
    weights = again.weights
    _, _, args, kwargs = weights.pair
    together = {
        "model": sample_sites(weights.model_trace),
        "guide": sample_sites(weights.guide_trace),
    }
    faults: dict[tuple[str, str], None] = {}
    for i in (0, -1):  # all latents at their first value, and all at their last
        fixed = Trace()
        for name, site in (together["model"] | together["guide"]).items():
            if not site["is_observed"]:
                value = _alone(site, weights.leftmost, i)
                fixed.add_node(name, **{**site, "value": value, "infer": {}})
        alone = {
            "model": sample_sites(replay(again.model, fixed, args, kwargs)),
            "guide": sample_sites(replay(again.guide, fixed, args, kwargs)),
        }
        for role, sites in together.items():
            for name, site in sites.items():
                one = _value_of_all(log_density(site), -weights.leftmost, i)
                if _differ(*torch.broadcast_tensors(one, log_density(alone[role][name]))):
                    faults[role, name] = None
    return [
        f"site {name!r} of the {role}: the values of enumerated latents have other "
        f"log-probabilities at once than one by one. They add dimensions on the left: {_DIMS}"
        for role, name in faults
    ]


def _alone(site: Site, leftmost: int, i: int) -> Tensor:
    """A draw at value ``i`` of the enumerated latents, itself or what it depends on."""
    event_dim = site["fn"].event_dim
    value = _value_of_all(site["value"], event_dim - leftmost, i)
    shape = list(value.shape)
    for frame in site["cond_indep_stack"]:
        dim = frame.dim - event_dim
        if -dim <= len(shape):
            shape[dim] = frame.size
    return moved(value, lambda tensor: tensor.expand(shape))


def _value_of_all(tensor: Tensor, dims: int, i: int) -> Tensor:
    """The entry for value ``i`` of what is enumerated, in the dims left of the last ones."""
    while tensor.dim() > dims:
        tensor = tensor[i]
    return tensor


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


_DIMS = (
    "count dims from the right, and put nets.flat_batch around a network that wants one batch "
    "dimension (Conv2d, BatchNorm, Flatten)"
)
_FOLD = f"Particles add a dimension on the left, (K, N, ...): {_DIMS}"


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
        whole: log-weights of the batch.
        index: numbers of the two rows; None: all are taken.
        weights: of what is run.
        drawn: the draws of the guide in them.
        model, guide: the programs; inner plates that subsample themselves take the same elements.
    """

    def __init__(self, weights: LogWeights, keywords: bool) -> None:
        model, guide, args, kwargs = weights.pair
        self.rows = weights.log_w.shape[1]
        known = [*enumerate(args), *(kwargs.items() if keywords else ())]
        rows = {label: value for label, value in known if _has_rows(value, self.rows)}
        self.cut: set[int | str] = set(rows)
        self.whole = weights
        self.index = None if weights.joint else _two_different(rows.values())
        self.differ = self.index is not None
        self.weights = self._some_rows()
        self.drawn = _with_values(self.weights.guide_trace, lambda site: site["value"])
        self.model = _with_parts(model, self.weights.model_trace)
        self.guide = _with_parts(guide, self.weights.guide_trace)
        self._replay = ReplayMessenger(trace=self.drawn)
        self._guide_at = self._replay(self.guide)

    def _some_rows(self) -> LogWeights:
        """Log-weights of the two rows; of all where the pair does not run on these."""
        (model, guide, args, kwargs), joint = self.whole.pair, self.whole.joint
        if self.index is not None and by_position(guide) is None:
            some, named = _taken(args, kwargs, self.cut, self.index)
            with suppress(RuntimeError, ValueError, IndexError):
                return log_weights(model, guide, *some, joint=joint, **named)
        self.index = None
        return log_weights(model, guide, *args, joint=joint, **kwargs)

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
        _, _, args, kwargs = self.weights.pair
        args, kwargs = _taken(args, kwargs, cut, index)
        return self.weigh(drawn, args, kwargs, seed)

    def weigh(self, drawn: Trace, args: Args, kwargs: Kwargs, seed: int = 0) -> Terms:
        """Log-probabilities of some data at draws."""
        self._replay.trace = drawn
        with seeded(seed, *args):
            weights = log_weights(
                self.model, self._guide_at, *args, joint=self.weights.joint, **kwargs
            )
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


def _with_parts(program: Program, trace: Trace) -> Program:
    """A program whose inner plates that subsample themselves take what they took in a trace."""
    parts = Trace()
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and site_is_subsample(site) and name != DATA_PLATE:
            parts.add_node(name, **site)
    again: Program = ReplayMessenger(trace=parts)(program) if parts.nodes else program
    return again


def _copy(site: Any) -> Tensor:
    return moved(site["value"], torch.clone)


def _has_rows(value: Any, rows: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == rows


def _rows_of(site: Any, index: Tensor) -> Tensor:
    value: Tensor = site["value"]
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE:
            dim = frame.dim - site["fn"].event_dim
            if -dim <= value.dim() and value.shape[dim] == frame.size:
                index = index.to(value.device)
                return moved(value, functools.partial(torch.index_select, dim=dim, index=index))
    return value


def _row(term: Tensor, row: int) -> Tensor:
    return term[..., row if term.shape[-1] > 1 else 0]


def _particle(site: Any, k: int) -> Tensor:
    value: Tensor = site["value"]
    for frame in site["cond_indep_stack"]:
        dim = frame.dim - site["fn"].event_dim
        if frame.name == PARTICLE_PLATE and -dim <= value.dim():
            index = k if value.shape[dim] > 1 else 0
            return moved(value, functools.partial(torch.select, dim=dim, index=index))
    return value


def _terms(weights: LogWeights) -> Terms:
    return {
        (role, name): t.detach()
        for role in ("model", "guide")
        for name, t in weights.all_terms(role).items()
    }


def _different(terms: Terms, others: Terms, tolerance: float = _RTOL) -> list[tuple[str, str]]:
    return [key for key, term in terms.items() if _differ(term, others[key], tolerance)]


def _differ(a: Tensor, b: Tensor, tolerance: float = _RTOL) -> bool:
    return not torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)
