"""Running a model/guide pair: particles, enumeration, and what one run tells about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro import poutine
from pyro.infer.inspect import TrackProvenance
from pyro.ops.provenance import get_provenance
from pyro.poutine import Trace
from pyro.poutine.enum_messenger import EnumMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.trace_messenger import TraceHandler, TraceMessenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from ppvae.program import local_parameters, module_of

DATA_PLATE = "data"
PARTICLE_PLATE = "_ppvae_particles"  # not to meet a plate of the user's
Site = dict[str, Any]
Program = Callable[..., Any]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class NotCompiled(RuntimeError):
    """A computation cannot be one compiled graph; the message says why, and the cure."""


@dataclass(frozen=True)
class Structure:
    """What is the same at every run of a pair.

    Attributes:
        nesting: how many plate dims it uses.
        enumerates: whether a latent is marked ``infer={"enumerate": "parallel"}``.
    """

    nesting: int
    enumerates: bool


# Found once per pair: model -> guide -> what is known.
_structures: WeakKeyDictionary[Any, WeakKeyDictionary[Any, Structure]] = WeakKeyDictionary()
_kl_valid: WeakKeyDictionary[Any, WeakKeyDictionary[Any, frozenset[str]]] = WeakKeyDictionary()


def structure(model: Program, guide: Program, args: Args, kwargs: Kwargs) -> Structure:
    """Found by running the pair once, unnoticed; remembered for the pair."""
    by_guide = _structures.setdefault(model, WeakKeyDictionary())
    if guide not in by_guide:
        with unnoticed(model, guide):
            guide_trace = trace(guide, args, kwargs)
            model_trace = replay(model, guide_trace, args, kwargs)
        sites = [*sample_sites(guide_trace).values(), *sample_sites(model_trace).values()]
        dims = [frame.dim for site in sites for frame in site["cond_indep_stack"]]
        by_guide[guide] = Structure(
            nesting=-min([dim for dim in dims if dim is not None], default=0),
            enumerates=any(is_enumerated(site) for site in sites),
        )
    return by_guide[guide]


def run(
    model: Program,
    guide: Program,
    args: Args,
    kwargs: Kwargs,
    num_particles: int,
    leaves: Leaves | None = None,
) -> tuple[Trace, Trace]:
    """Trace the guide, then the model at its draws: K particles, discrete sites enumerated.

    With ``leaves``, every draw that has a gradient is replaced by a detached leaf as soon as it is
    made, so that later sites of the guide, and the model, see the leaves.
    """
    found = structure(model, guide, args, kwargs)
    drawing, scoring = guide, model
    if found.enumerates:
        leftmost = found.nesting + (num_particles > 1)
        drawing = EnumMessenger(first_available_dim=-1 - leftmost)(guide)
        scoring = EnumMessenger()(model)
    with particle_plate(found, num_particles):
        with leaves or nullcontext():
            guide_trace = trace(drawing, args, kwargs)
        return guide_trace, replay(scoring, guide_trace, args, kwargs)


class Leaves(Messenger):
    """Cuts each draw z from the guide's parameters; ``pairs`` holds (z, z.detach())."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def _pyro_post_sample(self, msg: Any) -> None:
        value = msg["value"]
        if isinstance(value, Tensor) and value.requires_grad and not msg["is_observed"]:
            msg["value"] = value.detach().requires_grad_()
            self.pairs.append((value, msg["value"]))


def particle_plate(found: Structure, num_particles: int) -> Any:
    """The plate left of all others, of K particles; nothing for K = 1."""
    if num_particles == 1:
        return nullcontext()
    return pyro.plate(PARTICLE_PLATE, num_particles, dim=-1 - found.nesting)


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

    What is not observed (a condition y) stays; the trace holds the latents the data came from.

    Raises:
        ValueError: an observed value is none of the arguments, or x cannot be drawn.
    """
    observed = sample_sites(trace(model, args, kwargs))
    try:
        dream = trace(poutine.uncondition(model), args, kwargs)
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
        dreamt[position] = dream.nodes[name]["value"]
    return tuple(dreamt), dream


def reason(error: Exception) -> str:
    """What an error says, without the table of shapes that Pyro appends."""
    return str(error).partition("\nTrace Shapes:")[0]


def sample_sites(drawn: Trace) -> dict[str, Site]:
    """The random sites of a trace: no plates' subsample sites, no ``pyro.deterministic``."""
    return {
        name: site
        for name, site in drawn.nodes.items()
        if site["type"] == "sample"
        and not site_is_subsample(site)
        and not site["infer"].get("_deterministic")
    }


def is_enumerated(site: Site) -> bool:
    """Whether a latent is to be summed out instead of drawn."""
    return not site["is_observed"] and site["infer"].get("enumerate") == "parallel"


def closed_form_kl_valid(
    model: Program, guide: Program, args: Args, kwargs: Kwargs
) -> frozenset[str]:
    """The latents s of which no parent in the model is a descendant of s in the guide.

    For the others (a bottom-up guide) KL(q || p) has not the expectation of log q - log p. Found
    by tracking what each site's distribution is computed from, never by the order of sites.
    """
    by_guide = _kl_valid.setdefault(model, WeakKeyDictionary())
    if guide not in by_guide:
        with unnoticed(model, guide), TrackProvenance():
            guide_trace = trace(guide, args, kwargs)
            model_trace = replay(model, guide_trace, args, kwargs)
        in_guide, in_model = _parents(guide_trace), _parents(model_trace)
        ancestors: dict[str, frozenset[str]] = {}
        for name, parents in in_guide.items():  # in the order of drawing: parents come first
            ancestors[name] = parents.union(*(ancestors[parent] for parent in parents))
        by_guide[guide] = frozenset(
            name
            for name in in_guide
            if not any(name in ancestors.get(u, ()) or name == u for u in in_model.get(name, ()))
        )
    return by_guide[guide]


def _parents(drawn: Trace) -> dict[str, frozenset[str]]:
    """The latent sites that each latent's distribution is directly computed from."""
    sites = sample_sites(drawn)
    latents = {name for name, site in sites.items() if not site["is_observed"]}
    return {
        name: (get_provenance(site["fn"].log_prob(site["value"])) & latents) - {name}
        for name, site in sites.items()
        if name in latents
    }


@contextmanager
def own_path() -> Iterator[None]:
    """:func:`~ppvae.program.local_parameters`, unless a stock Pyro engine is listening."""
    with nullcontext() if am_i_wrapped() else local_parameters():
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
    cuda = {
        tensor.device.index for tensor in tensors if isinstance(tensor, Tensor) and tensor.is_cuda
    }
    with torch.random.fork_rng(devices=sorted(cuda)):
        torch.manual_seed(seed)
        yield


@contextmanager
def evaluation_mode(*programs: Program) -> Iterator[None]:
    """``eval()`` for the programs that are modules, then each module's own mode again."""
    modules = [m for p in programs if (owner := module_of(p)) is not None for m in owner.modules()]
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
