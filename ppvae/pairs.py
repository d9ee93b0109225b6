"""Running a model/guide pair: particles, enumeration, and what one run tells about it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import pyro
import torch
from pyro import poutine
from pyro.distributions.torch_distribution import MaskedDistribution
from pyro.infer.autoguide import AutoGuide
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.trace_messenger import TraceHandler, TraceMessenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor
from torch.distributions import Independent

from ppvae.distributions import NoInverse
from ppvae.program import all_modules, local_parameters, one_thread, read
from ppvae.wrapped import innermost, method_of, owner_of

DATA_PLATE = "data"
PARTICLE_PLATE = "_ppvae_particles"  # not to meet a plate of the user's
Site = dict[str, Any]
Program = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class NotAtCopies(ValueError):
    """A distribution gives a copy of its draw another density than the draw itself."""


class NotCompiled(RuntimeError):
    """A computation cannot be one compiled graph; the message says why, and the cure."""


@dataclass(frozen=True)
class Structure:
    """What has to be known of a call of a pair before it is run.

    Attributes:
        nesting: how many plate dims it uses.
        enumerated: how many latents are marked ``infer={"enumerate": "parallel"}``.
        has_globals: whether a latent lies outside the data plate.
    """

    nesting: int
    enumerated: int
    has_globals: bool = False

    @staticmethod
    def of(*traces: Trace) -> Structure:
        """The structure that a run had."""
        deepest, enumerated, has_globals = 0, set(), False
        for drawn in traces:
            for name, site in sample_sites(drawn).items():
                if site["infer"] and is_enumerated(site):
                    enumerated.add(name)
                for frame in site["cond_indep_stack"]:
                    if frame.dim is not None and frame.name != PARTICLE_PLATE:
                        deepest = min(deepest, frame.dim)
                has_globals = has_globals or is_global(site)
        return Structure(-deepest, len(enumerated), has_globals)

    def allows(self, other: Structure) -> bool:
        """Whether a run prepared for this structure is right for another."""
        deep = self.nesting >= other.nesting and self.enumerated >= other.enumerated
        return deep and self.has_globals >= other.has_globals


class Memory:
    """What is remembered of calls of a pair; gone when one of its programs is.

    Never by the pair alone: labels may be given in one call and not in the next, a plate may be
    there in one mode only. So each entry is of a :func:`signature`.
    """

    def __init__(self) -> None:
        self._known: dict[Any, dict[Any, Any]] = {}
        self._alive: list[Any] = []

    def of(self, model: Program, guide: Program) -> dict[Any, Any]:
        """A dictionary for the pair: these two objects, whatever equals them."""
        owners = owner_of(model), owner_of(guide)
        methods = method_of(model), method_of(guide)
        key = id(owners[0]), id(owners[1]), methods
        entries = self._known.get(key)
        if entries is None:
            entries = self._known[key] = {}
            for owner in owners:
                try:
                    finalize(owner, self._known.pop, key, None)
                except TypeError:  # nothing weak can refer to it
                    self._alive.append(owner)
        if len(entries) >= _MOST_CALLS:
            entries.clear()
        return entries


_MOST_CALLS = 64
_structures, _kl_valid, _weighed = Memory(), Memory(), Memory()


def signature(args: Args, kwargs: Kwargs) -> Any:
    """Of tensors the number of dims; of flags, words and what is None the value; else the type."""
    return tuple([_described(value) for value in (*args, *kwargs, *kwargs.values())])


def _described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dim()
    if isinstance(value, (tuple, list)):
        return signature(tuple(value), {})
    if isinstance(value, dict):
        return signature((), value)
    return value if type(value) in (bool, str, type(None)) else type(value)


def _settings(program: Program) -> Any:
    """Flags, whole numbers and words that a program looks at.

    They are those among its attributes, in its closure, and among the globals that it mentions.
    """
    inside = innermost(program)
    owner = owner_of(inside)
    function = getattr(inside, "forward", inside)
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    values = list(getattr(owner, "__dict__", {}).values())
    if code is not None:
        values += [_content(cell) for cell in function.__closure__ or ()]
        values += [function.__globals__.get(name) for name in code.co_names]
    return tuple([value for value in values if type(value) in (bool, int, str, type(None))])


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def structure(model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Structure:
    """That of a call: remembered, or found by running the pair once, unnoticed."""
    known, call = _structures.of(model, guide), _call(model, guide, args, kwargs)
    if call not in known:
        known[call] = _find_structure(model, guide, args, kwargs)
    found: Structure = known[call]
    return found


def _call(model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Any:
    modes = [getattr(owner_of(innermost(p)), "training", None) for p in (model, guide)]
    return signature(args, kwargs), *modes


def _find_structure(model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Structure:
    with own_path(), unnoticed(model, guide), pyro.validation_enabled(False):
        guide_trace = trace(guide, args, kwargs)
        return Structure.of(guide_trace, replay(model, guide_trace, args, kwargs))


def run(
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs,
    num_particles: int,
    leaves: Leaves | None = None,
    joint: bool = False,
) -> tuple[Trace, Trace]:
    """Trace the guide, then the model at its draws: K particles, discrete sites enumerated.

    With ``leaves``, every draw that has a gradient is replaced by a detached leaf as soon as it is
    made, so that later sites of the guide, and the model, see the leaves. Latents outside the data
    plate are drawn once, or, with ``joint``, once for each particle.
    """
    if fault := position_fault(guide, args, kwargs):
        raise ValueError(fault)
    known, call = _structures.of(model, guide), _call(model, guide, args, kwargs)
    found = known.get(call)
    if leaves is not None:
        leaves.weighed = _weighed.of(model, guide).setdefault("sites", set())
    if found is not None:
        try:
            traces = _run(model, guide, args, kwargs, num_particles, leaves, joint, found)
        except (ValueError, RuntimeError, IndexError):  # an inner plate that was not there before
            if found.allows(_find_structure(model, guide, args, kwargs)):
                raise
        else:
            if found.allows(Structure.of(*traces)):
                return traces
        if leaves is not None:
            leaves.pairs.clear()
            leaves.names.clear()
            leaves.shown.clear()
    found = known[call] = _find_structure(model, guide, args, kwargs)
    return _run(model, guide, args, kwargs, num_particles, leaves, joint, found)


def _run(
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs,
    num_particles: int,
    leaves: Leaves | None,
    joint: bool,
    found: Structure,
) -> tuple[Trace, Trace]:
    drawing, scoring = guide, model
    if found.enumerated:
        leftmost = found.nesting + (num_particles > 1)
        recycles = found.enumerated > _MOST_DIMS
        drawing = Enumerate(recycles, first_available_dim=-1 - leftmost)(guide)
        scoring = Enumerate(recycles)(model)
    with particle_plate(found, num_particles, joint):
        with leaves or nullcontext():
            guide_trace = trace(drawing, args, kwargs)
        return guide_trace, replay(scoring, guide_trace, args, kwargs)


_MOST_DIMS = 40  # of enumerated latents; a tensor has 64 at most


class Enumerate(EnumMessenger):
    """Pyro's enumeration, where it is exact.

    Args:
        recycles: let ``pyro.markov`` give the dim of a latent that is out of scope to another. It
            is done for long chains only: what is out of scope the program says, and a model that
            remembers more steps than it says, or a guide without ``pyro.markov`` beside a model
            with it, would mix up two latents.
        first_available_dim: the rightmost dim for latents.
    """

    def __init__(self, recycles: bool, first_available_dim: int | None = None) -> None:
        super().__init__(first_available_dim)
        self.recycles = recycles

    def _pyro_sample(self, msg: Any) -> None:
        if not self.recycles:
            msg["infer"].pop("_markov_scope", None)
        if is_enumerated(msg) and not msg["done"]:
            if msg["infer"].get("num_samples") is not None:
                raise ValueError(
                    f"site {msg['name']!r}: with infer={{'num_samples': ...}} a few values are "
                    "drawn, and would be summed as if they were all there are; leave it out"
                )
            if not getattr(msg["fn"], "has_enumerate_support", False):
                raise ValueError(
                    f"site {msg['name']!r} is marked to be enumerated, and "
                    f"{kind(msg['fn'])} of event shape {tuple(msg['fn'].event_shape)} has no "
                    "finite support that is listed; draw it, or put its dimensions into a plate"
                )
        super()._pyro_sample(msg)


class Leaves(Messenger):
    """Cuts each draw z from the guide's parameters.

    A straight-through draw is cut where it is smooth: before it is rounded.

    Attributes:
        pairs: (z, z.detach()) of each draw.
        names: of the sites of these draws.
        shown: of each draw the mask of its density, that broadcasts to z; None: nothing is hidden.
        weighed: names of sites whose density is known to be that of the value, whatever tensor
            holds it.

    Raises:
        NotAtCopies: a site weighs a leaf otherwise than its draw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.names: list[str] = []
        self.shown: list[Tensor | None] = []
        self.weighed: set[str] = set()

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.requires_grad and not msg["is_observed"]:
            smooth = unrounded(value)
            leaf = smooth.detach().requires_grad_()
            leaf._cut_from = smooth  # type: ignore[attr-defined]  # a density may belong to it
            self.pairs.append((smooth, leaf))
            self.names.append(msg["name"])
            self.shown.append(shown(msg, smooth))
            msg["value"] = leaf
            if smooth is not value:
                msg["value"] = value.detach() + (leaf - leaf.detach())
                msg["value"]._unquantize = leaf
            if msg["name"] not in self.weighed:
                self._require_equal(msg, value)

    def not_of_rows(self, names: Collection[str]) -> None:
        """Take some draws for such whose log q is in no log-weight: they have no score there."""
        for i, name in enumerate(self.names):
            if name in names:
                self.shown[i] = torch.zeros((), dtype=torch.bool, device=self.pairs[i][0].device)

    def _require_equal(self, msg: Any, value: Tensor) -> None:
        if not weighs_alike(msg, value, msg["value"]):
            raise NotAtCopies(
                f"site {msg['name']!r}: {kind(msg['fn'])} gives a copy of a draw another "
                "density than the draw itself, and this gradient needs it at copies; use "
                'gradient="pathwise", or a log_prob that is a function of the value'
            )
        self.weighed.add(msg["name"])


def shown(site: Site, value: Tensor) -> Tensor | None:
    """What no mask hides of a value: those of the program, and those its distribution carries."""
    fn = site["fn"]
    masks = [(site["mask"], fn.event_dim)]
    while isinstance(fn, (MaskedDistribution, Independent)):
        if isinstance(fn, MaskedDistribution):
            masks.append((fn._mask, fn.event_dim))
        fn = fn.base_dist
    visible: Tensor | None = None
    for mask, event_dim in masks:
        if mask is not None and mask is not True:
            mask = torch.as_tensor(mask, device=value.device)
            mask = mask.reshape(*mask.shape, *(1,) * event_dim)
            visible = mask if visible is None else visible & mask
    return visible


def weighs_alike(site: Site, value: Tensor, other: Tensor) -> bool:
    """Whether a site's density is the same at two tensors of one value, up to rounding."""
    if type(value) is not Tensor or torch._C._is_tracing():  # a graph is traced: no numbers
        return True
    try:
        # with gradients: a flow remembers the inverse of the last tensor for the terms to come
        one, two = (site["fn"].log_prob(tensor).detach() for tensor in (value, other))
    except NoInverse:  # the term of the site says so
        return True
    except KeyError as error:  # the same, of a flow of Pyro
        return "intermediates cache" in str(error)
    except NotImplementedError:
        return False
    return torch.allclose(one, two, rtol=ROUNDING, atol=ROUNDING, equal_nan=True)


ROUNDING = 0.03  # in nats: the inverse of a deep flow is that inexact, a wrong density is far off


def unrounded(value: Tensor) -> Tensor:
    """What Pyro's straight-through draws have a density of; other values as they are."""
    smooth: Tensor = getattr(value, "_unquantize", value)
    return smooth


def is_rounded(site: Site) -> bool:
    """Whether a site's draws are straight-through: discrete, with the gradient of others."""
    fn, value = site["fn"], site["value"]
    return unrounded(value) is not value or (fn.has_rsample and is_discrete(fn))


def is_discrete(fn: Any) -> bool:
    """Whether a distribution's support is; one that does not say has none that is known."""
    try:
        return bool(fn.support.is_discrete)
    except (NotImplementedError, AttributeError):
        return False


def law(fn: Any) -> Any:
    """A distribution without what only declares or masks its dimensions."""
    while isinstance(fn, (Independent, MaskedDistribution)):
        fn = fn.base_dist
    return fn


def kind(fn: Any) -> str:
    """The name of a distribution, without what declares or masks its dimensions."""
    return type(law(fn)).__name__


def moved(value: Tensor, move: Callable[[Tensor], Tensor]) -> Tensor:
    """A draw with its rows moved, and with them what its density belongs to."""
    result, smooth = move(value), unrounded(value)
    if smooth is not value:
        result._unquantize = move(smooth)  # type: ignore[attr-defined]
    return result


def particle_plate(found: Structure, num_particles: int, joint: bool = False) -> Any:
    """The plate left of all others, of K particles; nothing for K = 1."""
    if num_particles == 1:
        return nullcontext()
    plate = _LocalParticles if found.has_globals and not joint else pyro.plate
    return plate(PARTICLE_PLATE, num_particles, dim=-1 - found.nesting)


class _LocalParticles(pyro.plate):
    """Particles of what lies in the data plate; what does not has one draw for all of them."""

    def _process_message(self, msg: Any) -> None:
        if any(frame.name == DATA_PLATE for frame in msg["cond_indep_stack"]):
            super()._process_message(msg)


def trace(program: Program, args: Args, kwargs: Kwargs) -> Trace:
    """The trace of a program; ``poutine.trace`` would wrap the program anew at each call."""
    recorder = TraceMessenger()
    TraceHandler(recorder, program)(*args, **kwargs)
    return recorder.trace


def replay(program: Program, drawn: Trace, args: Args, kwargs: Kwargs) -> Trace:
    """The trace of a program run at the draws of another."""
    with ReplayMessenger(trace=drawn):
        return trace(program, args, kwargs)


@torch.no_grad()
def simulate(model: Program, args: Args, kwargs: Kwargs) -> tuple[Args, Trace]:
    """Data drawn from the model in the place of the observed arguments, and the model's trace.

    What is not observed (a condition y) stays, and so does NaN, which says that a value is missing;
    the trace holds the latents the data came from.

    Raises:
        ValueError: an observed value is none of the arguments, or x cannot be drawn.
    """
    observed = sample_sites(trace(model, args, kwargs))
    try:
        dream = trace(unconditioned(model), args, kwargs)
    except (ValueError, NotImplementedError) as error:
        raise ValueError(f"x cannot be drawn from the model: {reason(error)}") from error
    dreamt = list(args)
    for name, site in observed.items():
        if not site["is_observed"]:
            continue
        position = next((i for i, arg in enumerate(args) if arg is site["value"]), None)
        if position is None:
            raise ValueError(
                f"draws of the model are put in the place of the observed data, but the value of "
                f"site {name!r} is none of the arguments; observe an argument itself, obs=x"
            )
        given, drawn = args[position], dream.nodes[name]["value"]
        missing = given.is_floating_point() and given.shape == drawn.shape
        dreamt[position] = torch.where(given.isnan(), given, drawn) if missing else drawn
    return tuple(dreamt), dream


# what a program raises that does not take its arguments
FAILURES = (
    RuntimeError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError
)  # fmt: skip


def reason(error: Exception) -> str:
    """What an error says, without the table of shapes that Pyro appends."""
    return str(error).partition("\nTrace Shapes:")[0]


class _Uncondition(UnconditionMessenger):
    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic"):
            super()._pyro_sample(msg)


def unconditioned(program: Program) -> Program:
    """A program that draws what it observes; its ``pyro.deterministic`` sites keep their values.

    ``poutine.uncondition`` draws those anew, with the dims of plates twice where no event_dim is.
    """
    return _Uncondition()(program)


def sample_sites(drawn: Trace) -> dict[str, Site]:
    """The random sites of a trace that count.

    No plates' subsample sites, no ``pyro.deterministic``, and no latent that ``poutine.do`` has put
    a value in the place of: nothing depends on it, so it integrates to 1.
    """
    return {
        name: site
        for name, site in drawn.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
        and (site["is_observed"] or "_intervener_id" not in site)
    }


def is_global(site: Site) -> bool:
    """Whether a latent lies outside the data plate: one value for all rows."""
    if site["is_observed"]:
        return False
    names = [frame.name for frame in site["cond_indep_stack"]]
    return DATA_PLATE not in names


def is_enumerated(site: Site) -> bool:
    """Whether a latent is to be summed out instead of drawn."""
    return not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def closed_form_kl_valid(
    model: Program, guide: Program, args: Args, kwargs: Kwargs, order: tuple[str, ...]
) -> frozenset[str]:
    """The latents s of which no parent in the model is a descendant of s in the guide.

    For the others (a bottom-up guide) KL(q || p) has not the expectation of log q - log p. Found
    by tracking what each site's distribution is computed from, never by the order of sites; but
    found anew where ``order``, the sites of this run in their order, is another.
    """
    known = _kl_valid.of(model, guide)
    numbers = tuple(value for value in (*args, *kwargs.values()) if isinstance(value, int))
    call = order, signature(args, kwargs), numbers, _settings(model), _settings(guide)
    if call not in known:
        with own_path(), unnoticed(model, guide), TrackProvenance():
            guide_trace = trace(guide, args, kwargs)
            model_trace = replay(model, guide_trace, args, kwargs)
            in_guide, in_model = _parents(guide_trace), _parents(model_trace)
        ancestors: dict[str, frozenset[str]] = {}
        for name, parents in in_guide.items():  # in the order of drawing: parents come first
            ancestors[name] = parents.union(*(ancestors[parent] for parent in parents))
        known[call] = frozenset(
            name
            for name in in_guide
            if not any(name in ancestors.get(parent, ()) for parent in in_model.get(name, ()))
        )
    valid: frozenset[str] = known[call]
    return valid


def latent_parents(program: Program, args: Args) -> dict[str, frozenset[str]]:
    """The latent sites that each latent of a program directly depends on; the run is unnoticed."""
    with own_path(), unnoticed(program, program), TrackProvenance():
        return _parents(trace(program, args, {}))


def _parents(drawn: Trace) -> dict[str, frozenset[str]]:
    """The latent sites that each latent's term is directly computed from."""
    sites = sample_sites(drawn)
    latents = {name for name, site in sites.items() if not site["is_observed"]}
    return {
        name: (provenance_of(site) & latents) - {name}
        for name, site in sites.items()
        if name in latents
    }


def provenance_of(site: Site) -> frozenset[str]:
    """What a site's term is computed from: its distribution, and the mask of the program."""
    fn = site["fn"]
    try:
        computed = fn.log_prob(site["value"])
    except (NoInverse, KeyError):  # it weighs its own draws only, and tracking has copied this one
        computed = fn.sample()
    provenance: frozenset[str] = get_provenance(computed)
    return provenance | get_provenance(site["mask"])


def by_position(program: Program) -> AutoGuide | None:
    """An autoguide whose parameters belong to positions in a batch, not to datapoints; or None."""
    inside = owner_of(innermost(program))
    if not isinstance(inside, AutoGuide) or inside.create_plates is not None:
        return None
    drawn = inside.prototype_trace
    if drawn is not None and all(is_global(s) for s in sample_sites(drawn).values()):
        return None  # its parameters are of no rows
    return inside


def position_fault(guide: Program, args: Args, kwargs: Kwargs) -> str | None:
    """Why an autoguide cannot be run on other rows than those that it was set up with."""
    auto = by_position(guide)
    if auto is None or auto.prototype_trace is None:
        return None
    tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.dim())
    rows = next((len(tensor) for tensor in tensors), None)
    frames = [f for s in auto.prototype_trace.nodes.values() for f in s.get("cond_indep_stack", ())]
    size = next((frame.size for frame in frames if frame.name == DATA_PLATE), rows)
    if rows in (None, size):
        return None
    return (
        f"{type(auto).__name__} has parameters for the {size} positions of the batch that it was "
        f"set up with, and is run on {rows} rows. Run it on all {size} at once (an evaluator with "
        "max_rows >= num_particles * rows), or wrap it: guides.Auto gives each datapoint its own"
    )


@contextmanager
def own_path(bare: Callable[[Any], None] = read) -> Iterator[None]:
    """:func:`~ppvae.program.local_parameters`, unless somebody is listening who decides that.

    What a stock engine has trained in Pyro's store is read.
    """
    with one_thread() if am_i_wrapped() else local_parameters(bare):
        yield


@contextmanager
def unnoticed(model: Program, guide: Program) -> Iterator[None]:
    """Run a pair for its structure only: gradients, random stream, buffers and handlers unmoved."""
    hidden = poutine.block(expose_types=["param"])  # still seen by local_parameters
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with evaluation_mode(model, guide), torch.no_grad(), hidden:
        with torch.random.fork_rng(devices=devices):
            yield


@contextmanager
def seeded(seed: int | None, *tensors: Any) -> Iterator[None]:
    """Draw with a seed inside, and leave the random stream as it was; None: draw from the stream.

    The tensors say on which CUDA devices there are draws.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=cuda_devices(*tensors)):
        torch.manual_seed(seed)
        yield


def cuda_devices(*tensors: Any) -> list[int]:
    """The numbers of the CUDA devices that tensors are on."""
    return sorted({t.device.index for t in tensors if isinstance(t, Tensor) and t.is_cuda})


def rewinder(*tensors: Any) -> Callable[[], None]:
    """A function that moves the random streams back to where they are now.

    Those are the CPU's, and of the CUDA devices that the tensors are on.
    """
    cpu = torch.get_rng_state()
    cuda = [(device, torch.cuda.get_rng_state(device)) for device in cuda_devices(*tensors)]

    def rewind() -> None:
        torch.set_rng_state(cpu)
        for device, state in cuda:
            torch.cuda.set_rng_state(state, device)

    return rewind


@contextmanager
def evaluation_mode(*programs: Program) -> Iterator[None]:
    """``eval()`` for all modules of the programs, then each module's own mode again."""
    modules = all_modules(*programs)
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
