"""A program: an ``nn.Module`` whose ``forward`` is a Pyro program; and where parameters live.

They live in modules, and :func:`module_of` finds these behind wrappers. Pyro's global parameter
store is touched only by who listens to it: a *stock* Pyro engine, or an estimator called as one.
What ppvae runs itself is inside :func:`local_parameters`, and leaves the store as it is.
"""

from __future__ import annotations

import inspect
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import FunctionType
from typing import Any
from weakref import WeakKeyDictionary

import pyro
import torch
from pyro.nn import module as pyro_module
from pyro.nn.module import _Context
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import am_i_wrapped
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor, nn

from ppvae.wrapped import announced, mentioned, parts, title

_parameters_are_local: ContextVar[bool] = ContextVar("_parameters_are_local", default=False)
# Keyed by the module itself, so that a deep copy gets a name of its own and two equal programs in
# one process never meet in Pyro's store.
_store_names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_count = itertools.count()


class Program(nn.Module):
    r"""An ``nn.Module`` whose ``forward`` is a Pyro program: a model or a guide.

    Calling it runs ``forward`` under whatever Pyro handlers are active. When one of Pyro's own
    engines (``pyro.infer.SVI`` with ``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceEnum_ELBO``,
    ``RenyiELBO``) is listening, the parameters are announced to it under a name unique to this
    object, so every ppvae pair also trains there. Subclass it and write ``forward``.

    Example:
        >>> import torch, pyro, pyro.distributions as dist, ppvae
        >>> class Coin(ppvae.Program):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.logit = torch.nn.Parameter(torch.zeros(()))
        ...     def forward(self, x):
        ...         with pyro.plate("data", len(x)):
        ...             return pyro.sample("x", dist.Bernoulli(logits=self.logit), obs=x)
        >>> trace = pyro.poutine.trace(Coin()).get_trace(torch.ones(3))
        >>> round(trace.log_prob_sum().item(), 4)  # 3 log(1/2) nats
        -2.0794
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if am_i_wrapped() and not _parameters_are_local.get():
            _announce_parameters(self)
        return super().__call__(*args, **kwargs)


def _announce_parameters(program: Program) -> None:
    """Run one ``pyro.param`` statement per trainable parameter, in the order of the module."""
    if program not in _store_names:
        _store_names[program] = f"{type(program).__name__}_{next(_count)}"
    prefix = _store_names[program]
    store = pyro.get_param_store()
    for name, parameter in program.named_parameters():
        if not parameter.requires_grad:
            continue
        full_name = f"{prefix}$$${name}"
        if full_name in store and store[full_name].unconstrained() is not parameter:
            del store[full_name]  # the module's parameter was replaced: the store follows it
        pyro.param(full_name, parameter)
        if store[full_name].unconstrained() is not parameter:
            raise ValueError(
                f"parameter {name!r} of {type(program).__name__} is not contiguous, so Pyro's "
                "store would train a copy of it; make it contiguous: "
                "module.weight.data = module.weight.data.contiguous()"
            )


class _LocalState:
    """The local parameter state of a ``PyroModule``, made when first asked for.

    Pyro 1.9 makes it only for modules *built* while ``module_local_params`` is on, and otherwise
    fails with AttributeError when one is called in that mode.
    """

    def __get__(self, context: Any, owner: type | None = None) -> Any:
        if context is None:
            return self
        return vars(context).setdefault("param_state", {"params": {}, "constraints": {}})


@contextmanager
def _local_state() -> Iterator[None]:
    """Let every ``PyroModule`` run with local parameters while inside.

    That is ``pyro.settings.context(module_local_params=True)``, which would import modules by name
    at every step, and what Pyro 1.9 lacks for it.
    """
    if hasattr(_Context, "param_state"):  # already inside
        yield
        return
    usual = pyro_module._MODULE_LOCAL_PARAMS
    pyro_module._MODULE_LOCAL_PARAMS = True
    _Context.param_state = _LocalState()
    try:
        yield
    finally:
        del _Context.param_state
        pyro_module._MODULE_LOCAL_PARAMS = usual


class _Store(Messenger):
    """Keeps parameters of modules out of Pyro's store; ``bare`` says what other ones may do."""

    def __init__(self, bare: Callable[[Any], None]) -> None:
        super().__init__()
        self.bare = bare

    def _pyro_param(self, msg: Any) -> None:
        if getattr(msg["fn"], "__self__", None) is pyro.get_param_store():
            self.bare(msg)
        # else it is a PyroModule's own parameter, and local already


def refused(msg: Any) -> None:
    """What a ``pyro.param`` is where ppvae trains: it would be neither optimised nor saved."""
    if not _is_of_module(msg):
        raise ValueError(
            f"pyro.param({msg['name']!r}) lives in Pyro's global store, and ppvae trains nothing "
            "there: make it an attribute, self.theta = torch.nn.Parameter(...), or PyroParam(...) "
            "of a PyroModule; or train it by pyro.infer.SVI(..., loss=elbo.ELBO())"
        )


def read(msg: Any) -> None:
    """What a ``pyro.param`` is where ppvae evaluates: the value that a stock engine has trained."""
    if not _is_of_module(msg) and msg["name"] not in pyro.get_param_store():
        raise ValueError(
            f"pyro.param({msg['name']!r}) has no value in Pyro's global store; train it first, "
            "by pyro.infer.SVI(..., loss=elbo.ELBO()), or make it an attribute of the program, "
            "self.theta = torch.nn.Parameter(...), which ppvae trains"
        )


def stored(msg: Any) -> None:
    """What a ``pyro.param`` is for an estimator called as one of Pyro's: a value in the store."""
    _is_of_module(msg)


def _is_of_module(msg: Any) -> bool:
    """Whether it is a statement of ``pyro.module(...)``, which then has the module's value."""
    if "$$$" in msg["name"] and isinstance(msg["args"][-1], Tensor):
        msg["value"], msg["done"] = msg["args"][-1], True
        return True
    return False


# ------------------------------------------------------------------------------ whose parameters


def module_of(program: Any) -> nn.Module | None:
    """The module whose parameters a program uses; where there are several, they are its parts.

    That is the program itself, or the owner of a bound method; what ``functools.partial`` binds
    and what Pyro's handlers are put around; the attributes of another object that can be called.
    A plain function has the programs that it calls, since these announce themselves to Pyro too,
    and the networks that it passes to ``pyro.module``; no other network from outside.

    Example:
        >>> import functools, pyro, torch
        >>> net = torch.nn.Linear(2, 2)
        >>> module_of(pyro.poutine.scale(functools.partial(net), scale=0.1)) is net
        True
    """
    found = _own_modules(program)
    if len(found) > 1:
        return nn.ModuleList(found)
    return found[0] if found else None


def all_modules(*programs: Any) -> list[nn.Module]:
    """Every module that programs run, each once: bare networks that functions use, too."""
    found: dict[int, nn.Module] = {}
    for program in programs:
        for owner in (*_own_modules(program), *outside_networks(program).values()):
            found |= {id(module): module for module in owner.modules()}
    return list(found.values())


def method_owners(*programs: Any) -> nn.ModuleList:
    """The modules of programs that are none themselves: these hold the parameters."""
    others = [program for program in programs if not isinstance(program, nn.Module)]
    owners = {id(owner): owner for program in others for owner in _own_modules(program)}
    return nn.ModuleList(owners.values())


def outside_networks(program: Any) -> dict[str, nn.Module]:
    """Bare networks that a program's functions use from outside, by the names they have there."""
    return {
        name: value
        for part in parts(program, _announces_itself)
        if isinstance(part, FunctionType)
        for name, value in mentioned(part).items()
        if isinstance(value, nn.Module) and not _announces_itself(value)
        if name not in announced(part)
    }


def _own_modules(program: Any) -> list[nn.Module]:
    return [part for part in parts(program, _announces_itself) if isinstance(part, nn.Module)]


def _announces_itself(value: Any) -> bool:
    return isinstance(value, (Program, pyro_module.PyroModule))


def require_own_parameters(loss: Tensor, module: nn.Module) -> None:
    """Raise ``ValueError`` if a loss depends on a parameter that no program owns.

    It would never be trained: a network that a plain function uses from outside, for example.

    Args:
        loss: of an objective.
        module: the objective; its ``model`` and ``guide`` are looked through for the network.
    """
    own = {id(p) for p in module.parameters()}
    pending, seen = [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, nn.Parameter) and id(leaf) not in own:
            raise ValueError(
                f"the loss depends on a parameter {tuple(leaf.shape)}{_where(leaf, module)} that "
                "neither model nor guide owns, so it would never be trained; make its network an "
                "attribute, self.net = net, or bind it: functools.partial(model, net)"
            )
        pending.extend(parent for parent, _ in node.next_functions)


def _where(parameter: nn.Parameter, module: nn.Module) -> str:
    """Which network from outside has a parameter, as a part of a message."""
    for program in (getattr(module, "model", None), getattr(module, "guide", None)):
        for name, network in outside_networks(program).items():
            if any(parameter is other for other in network.parameters()):
                return f" of {name!r}, outside of {title(program)},"
    return ""


def data_plate(*data: Tensor | None, size: int | None = None) -> Any:
    """The plate ``"data"``, rightmost, over the rows of the first tensor that is given.

    Args:
        *data: tensors with N rows each, or None, e.g. ``x, y``.
        size: with no tensor, how many rows to draw; with one, the size of the data set of which
            the rows are a minibatch (Pyro then scales the plate's terms by size / N).

    Raises:
        ValueError: neither a tensor nor ``size`` is given.

    Example:
        >>> import torch, ppvae
        >>> plate = ppvae.program.data_plate(torch.zeros(20, 3), size=100)
        >>> plate.size, plate.subsample_size, plate.dim
        (100, 20, -1)
    """
    rows = next((tensor for tensor in data if tensor is not None), None)
    if rows is None:
        if size is None:
            raise ValueError("nothing says how many rows to draw: pass data, or size=100")
        return _WholePlate("data", size, dim=-1)
    if size is None:
        return _WholePlate("data", len(rows), dim=-1)
    return pyro.plate("data", size, subsample=rows, dim=-1)


# Without the filter of warnings that it enters at every site, which is for ``torch.jit``.
_broadcast = inspect.unwrap(BroadcastMessenger._pyro_sample)


class _WholePlate(pyro.plate):
    """A plate over all its rows: it asks no handler which of them, and draws no permutation."""

    @staticmethod
    def _subsample(name: str, size: int, *_: Any) -> tuple[int, int, None]:
        return size, size, None

    def _process_message(self, msg: Any) -> None:
        SubsampleMessenger._process_message(self, msg)
        (BroadcastMessenger._pyro_sample if torch._C._is_tracing() else _broadcast)(msg)


class _OneThread:
    """Which thread runs pairs; in a forked child, none does."""

    def __init__(self) -> None:
        self.lock, self.name = threading.RLock(), ""
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.renew)

    def renew(self) -> None:
        self.lock = threading.RLock()  # another thread may have held it, which is not here


_running = _OneThread()


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep other threads out: Pyro's handlers and validation, and torch's random stream, are one.

    They belong to the process, so two threads that run pairs would run under each other's handlers
    and take each other's random numbers. ppvae enters it wherever it runs a pair itself, and
    ``ppvae.fit`` for the whole run.

    Raises:
        RuntimeError: another thread is inside.
    """
    lock = _running.lock
    if not lock.acquire(blocking=False):
        raise RuntimeError(
            f"thread {threading.current_thread().name!r} would run a pair while thread "
            f"{_running.name!r} does, and Pyro has one stack of handlers for both: give each run a "
            "process of its own, or let one thread wait for the other (threading.Lock)"
        )
    _running.name = threading.current_thread().name
    try:
        yield
    finally:
        lock.release()


@contextmanager
def local_parameters(bare: Callable[[Any], None] = refused) -> Iterator[None]:
    """Run programs with parameters in their modules only; Pyro's store stays untouched.

    ppvae enters it wherever it runs a pair itself. Inside, a :class:`Program` announces nothing, a
    ``PyroModule`` keeps its parameters local, and a bare ``pyro.param`` raises ``ValueError``.

    Args:
        bare: what a bare ``pyro.param`` may do: :func:`refused`, :func:`read` or :func:`stored`.

    Example:
        >>> import pyro, ppvae, torch
        >>> with ppvae.program.local_parameters():
        ...     pyro.param("theta", torch.zeros(1))
        Traceback (most recent call last):
        ...
        ValueError: pyro.param('theta') lives in Pyro's global store, and ppvae trains ...
    """
    token = _parameters_are_local.set(True)
    try:
        with one_thread(), _local_state(), _Store(bare):
            yield
    finally:
        _parameters_are_local.reset(token)
