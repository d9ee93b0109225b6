"""A run of :func:`ppvae.fit`: how far it is, how it is written down and taken up again."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ppvae.train.callbacks import Callback, overridden
from ppvae.train.checkpoint import CheckpointError, Checkpoints, rng_state, set_rng_state
from ppvae.train.history import History
from ppvae.train.processes import Processes
from ppvae.train.sources import Source
from ppvae.train.svi import SVI


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        history: the epochs that are done.
        total: what is maximised, summed over the current epoch so far, in nats; a 0-d tensor.
        count: datapoints in it.
        batch: batches of the current epoch that are done.
        seconds: training time of the current epoch so far.
        skipped: updates of the current epoch that were withheld.
        best: the best validation bound, its sign such that larger is better.
        best_state: the parameters and buffers there, if patience may return to them.
        stopped: whether a callback ended the run.
    """

    history: History
    total: Tensor
    count: int | Tensor = 0
    batch: int = 0
    seconds: float = 0.0
    skipped: int = 0
    best: float = -math.inf
    best_state: dict[str, Tensor] | None = None
    stopped: bool = False

    def add(self, loss: Tensor, rows: int, skip_nonfinite: bool) -> None:
        """Count a step of ``rows`` datapoints; one that was skipped counts as none."""
        self.batch += 1
        if rows and skip_nonfinite:
            finite = loss.isfinite()
            self.total = self.total - torch.where(finite, loss, 0.0)
            self.count = self.count + rows * finite
        elif rows:
            self.total = self.total - loss
            self.count += rows

    def begin_epoch(self) -> None:
        """Nothing of the next epoch is done."""
        self.total, self.count = torch.zeros_like(self.total), 0
        self.batch, self.seconds, self.skipped = 0, 0.0, 0

    def over(self, epochs: int, patience: int | None) -> bool:
        """Whether the run has come to its end."""
        history = self.history
        if patience is not None and history.best_epoch is not None:
            history.stopped_early = history.rows[-1]["epoch"] - history.best_epoch >= patience
        return self.stopped or history.stopped_early or len(history.rows) >= epochs


@dataclass
class Run:
    """What :func:`ppvae.fit` trains, and with what; for checkpoints."""

    svi: SVI
    at: Progress
    data: Source
    valid: Source | None
    scheduler: LRScheduler | None
    callbacks: Sequence[Callback]
    processes: Processes
    batch_size: int
    seed: int
    patience: int | None

    @property
    def stateful(self) -> list[Callback]:
        """The callbacks that have something to find again."""
        return [c for c in self.callbacks if type(c).state_dict is not Callback.state_dict]

    def facts(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the run that was interrupted."""
        optimizer = self.svi.optimizer
        assert optimizer is not None
        given = ", ".join(f"{k}={v}" for k, v in optimizer.defaults.items())
        return {
            "data": self.data.facts(),
            "valid": "none" if self.valid is None else self.valid.facts(),
            "batch_size": self.batch_size,
            "seed": self.seed,
            "processes": self.processes.size,
            "precision": self.processes.precision,
            # the address of a function differs between processes
            "loss": re.sub(" at 0x[0-9a-f]+", "", repr(self.svi.elbo)),
            "optimiser": f"{type(optimizer).__name__}({given})",
            "parameters in its groups": [len(group["params"]) for group in optimizer.param_groups],
            "clip_norm": self.svi.clip_norm,
            "lr_scheduler": type(self.scheduler).__name__,
            "patience": "none" if self.patience is None else "some",  # the number may change
            "callbacks with a state": [type(callback).__name__ for callback in self.stateful],
        }

    def write(self, files: Checkpoints, best: bool = False) -> None:
        """Write a checkpoint; all processes meet here, and the first one writes.

        Raises:
            NonFiniteError, FloatingPointError: the state is not worth keeping.
        """
        svi, at, scheduler = self.svi, self.at, self.scheduler
        svi.check_finite()
        buffers = {k: v.cpu() for k, v in svi.objective.named_buffers()}
        weight = getattr(state_of(svi), "weight", None)
        own = {
            "random": rng_state(),
            "data": self.data.state_dict(at.batch),
            "valid": self.valid.state_dict(0) if self.valid is not None else {},
            "total": at.total.cpu(),
            "count": int(at.count),
            "kl_weight": weight.cpu() if torch.is_tensor(weight) else weight,
            "buffers": buffers if self.processes.size > 1 else {},
            "callbacks": [callback.state_dict() for callback in self.stateful],
        }
        each = self.processes.gather(own)
        path = files.path(svi.num_steps)
        if self.processes.rank == 0:
            _require_finite(svi)
            shared = {f.name for f in dataclasses.fields(at)} - own.keys()
            progress = {name: getattr(at, name) for name in shared}
            state = {
                "facts": self.facts(),
                "svi": svi.state_dict(),
                "scheduler": None if scheduler is None else scheduler.state_dict(),
                "progress": progress | {"history": dataclasses.asdict(at.history)},
                "processes": each,
            }
            files.write(state, svi.num_steps, best)
        self.processes.wait()
        for call in overridden(self.callbacks, "on_checkpoint"):
            call(svi, path)

    def resume(self, files: Checkpoints, which: bool | str | os.PathLike[str]) -> None:
        """Go on from a file, or, for True, from the latest one if there is any.

        Raises:
            FileNotFoundError: the file is absent.
            CheckpointError: it is damaged, or of another run.
        """
        there = files.paths()
        path = Path(which) if not isinstance(which, bool) else there[-1] if there else None
        if len({str(other) for other in self.processes.gather(path)}) > 1:
            raise CheckpointError(
                f"the processes do not see the same files in {files.folder}: it must be a folder "
                "that all machines share"
            )
        if path is not None:
            self._load(files.load(path), path)
        self.processes.wait()  # nobody writes before everybody has read
        if self.processes.rank == 0:
            files.set_aside_after(self.svi.num_steps)

    def _load(self, state: dict[str, Any], path: Path) -> None:
        if not isinstance(state, dict) or "facts" not in state:
            raise CheckpointError(f"{path} was not written by ppvae.fit: it holds no run")
        _require_same_model(self.svi, state["svi"]["objective"], path)
        was, now = state["facts"], self.facts()
        changed = [f"{k}: {was.get(k)!r} then, {now[k]!r} now" for k in now if was.get(k) != now[k]]
        if changed:
            raise CheckpointError(
                f"{path} is of another run, which this one cannot continue bit for bit:\n  "
                + "\n  ".join(changed)
                + "\nPass the same again; or start a new run from its parameters, in another "
                'folder: svi.load_state_dict(Checkpoints(...).load()["svi"]), then fit'
            )
        svi, at = self.svi, self.at
        svi.load_state_dict(state["svi"])
        own = state["processes"][self.processes.rank]
        buffers = dict(svi.objective.named_buffers())
        with torch.no_grad():
            for name, saved in own["buffers"].items():
                buffers[name].copy_(saved)
        device = at.total.device
        weight = own["kl_weight"]
        if weight is not None:
            state_of(svi).weight = weight.to(device) if torch.is_tensor(weight) else weight
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
            if svi.num_steps > 0:  # else a first step of the scheduler warns
                svi.optimizer._opt_called = True  # type: ignore[union-attr]
        for name, value in state["progress"].items():
            setattr(at, name, value)
        at.history = History(**state["progress"]["history"])
        at.history.interrupted = False
        at.total, at.count = own["total"].to(device), own["count"]
        self.data.load_state_dict(own["data"])
        if self.valid is not None:
            self.valid.load_state_dict(own["valid"])
        for callback, saved in zip(self.stateful, own["callbacks"], strict=True):
            callback.load_state_dict(saved)
        set_rng_state(own["random"])


@contextmanager
def signals(wanted: bool) -> Iterator[SimpleNamespace]:
    """Inside, the first Ctrl-C or termination signal sets ``asked``; the next acts as ever.

    Only the main thread gets signals; a signal that is ignored stays so.
    """
    heard = SimpleNamespace(asked=False)
    before: dict[int, Any] = {}

    def hear(number: int, frame: Any) -> None:
        heard.asked = True
        signal.signal(number, before[number])

    if wanted and threading.current_thread() is threading.main_thread():
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):
                before[number] = handler
                signal.signal(number, hear)
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def state_of(svi: SVI) -> Any:
    """What the estimator remembers; None under an ELBO of Pyro's."""
    return getattr(svi.objective, "state", None)


def _require_same_model(svi: SVI, saved: dict[str, Any], path: Path) -> None:
    """The names, shapes and types of all parameters and buffers must be those of the pair."""

    def described(state: dict[str, Any]) -> dict[str, str]:
        tensors = {k: v for k, v in state.items() if torch.is_tensor(v)}
        return {k: f"{tuple(v.shape)} {v.dtype}" for k, v in tensors.items()}

    was, now = described(saved), described(svi.objective.state_dict())
    differ = [k for k in {**was, **now} if was.get(k) != now.get(k)]
    if differ:
        shown = [f"{k}: {was.get(k, 'absent')} then, {now.get(k, 'absent')} now" for k in differ]
        raise CheckpointError(
            f"{path} belongs to another model or guide; {len(differ)} of {len({**was, **now})} "
            "parameters and buffers differ:\n  "
            + "\n  ".join(shown[:5])
            + "\nBuild the pair that was trained, or give checkpoint= another folder"
        )


def _require_finite(svi: SVI) -> None:
    """A bad state is never written over a good one."""
    for name, parameter in svi.objective.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FloatingPointError(
                f"parameter {name!r} became NaN or infinite at step {svi.num_steps}, and no "
                "checkpoint was written of it: lower the learning rate, or clip the gradient with "
                "SVI(clip_norm=...)"
            )
