"""A run of :func:`ppvae.fit`: how far it is, how it is written down and taken up again."""

from __future__ import annotations

import math
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from ppvae.processes import Processes
from ppvae.train.batches import Batch, Source
from ppvae.train.callbacks import Callback, overridden
from ppvae.train.checkpoint import (
    CheckpointError,
    Checkpoints,
    plain,
    require_unused,
    rng_state,
    set_rng_state,
)
from ppvae.train.history import History
from ppvae.train.svi import SVI
from ppvae.wrapped import title

_ADDRESS = re.compile(" at 0x[0-9a-f]+")  # of a function: another in each process


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

    def start_clock(self, svi: SVI) -> None:
        """Start to measure the current epoch, on top of what it took before a resume."""
        self.built_before = svi.build_seconds
        self._skipped_before = svi.num_skipped - self.skipped
        self._started = time.perf_counter() - svi.build_seconds - self.seconds

    def read_clock(self, svi: SVI) -> None:
        """Set ``seconds``, without those of compiling, and ``skipped``."""
        self.seconds = time.perf_counter() - svi.build_seconds - self._started
        self.skipped = svi.num_skipped - self._skipped_before

    def begin_epoch(self) -> None:
        """Nothing of the next epoch is done."""
        self.total, self.count = torch.zeros_like(self.total), 0
        self.batch, self.seconds, self.skipped = 0, 0.0, 0


@dataclass
class Run:
    """What :func:`ppvae.fit` trains, with what, and how far it is.

    ``check_model`` is what the model's ``before_fit`` returned; the rest are arguments of ``fit``,
    or were made from them.
    """

    svi: SVI
    progress: Progress
    data: Source
    valid: Source | None
    check_model: Callable[[], None] | None
    scheduler: LRScheduler | None
    callbacks: Sequence[Callback]
    loggers: Sequence[Any]
    processes: Processes
    files: Checkpoints | None
    epochs: int
    seed: int
    patience: int | None
    has_bound: bool  # whether what validation gives is a bound on log p(x)
    _shares: dict[int, float] = field(default_factory=dict)

    def of_its_rows(self, loss: Tensor, batch: Batch) -> Tensor:
        """The loss of a batch as a sum over its rows, and not over the data set it is part of.

        A data plate with a size scales it. Which share of that the rows are follows from their
        number, so it is found once for each.
        """
        rows = len(batch[0])
        if rows not in self._shares:
            if not loss.isfinite():  # a draw may have failed, and would again
                return loss
            self._shares[rows] = rows / self.svi.full_size(*batch)
        share = self._shares[rows]
        return loss if share == 1 else loss * share

    @property
    def stateful(self) -> list[Callback]:
        """The callbacks that have something to find again."""
        return [c for c in self.callbacks if type(c).state_dict is not Callback.state_dict]

    def is_over(self) -> bool:
        """Whether the run has come to its end; the end of patience is noted in the history."""
        history = self.progress.history
        if self.patience is not None and history.best_epoch is not None:
            since_best = history.rows[-1]["epoch"] - history.best_epoch
            history.stopped_early = since_best >= self.patience
        stopped = self.progress.stopped or history.stopped_early
        return stopped or len(history.rows) >= self.epochs

    def keep_best(self, valid_bound: float | None) -> bool:
        """Note the best validation bound, after the warm-up of beta; True if this one is."""
        svi, progress = self.svi, self.progress
        warm_up = getattr(getattr(svi.elbo, "beta", None), "steps", 0)
        if valid_bound is None or svi.num_steps < warm_up:
            return False
        score = getattr(svi.elbo, "sign", 1) * valid_bound
        if not score > progress.best:
            return False
        progress.best, progress.history.best_epoch = score, svi.num_epochs
        if self.patience is not None:
            state = svi.objective.state_dict()  # its step count is not a tensor
            progress.best_state = {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}
        return True

    def facts(self) -> dict[str, Any]:
        """What must be the same for a resumed run to be the run that was interrupted."""
        optimizer = self.svi.optimizer
        assert optimizer is not None
        given = ", ".join(f"{k}={v}" for k, v in optimizer.defaults.items())
        return {
            "data": self.data.facts(),
            "valid": "none" if self.valid is None else self.valid.facts(),
            "batch_size": self.data.batch_size,
            "seed": self.seed,
            "processes": self.processes.size,
            "precision": self.processes.precision,
            "loss": _ADDRESS.sub("", repr(self.svi.elbo)),
            "optimiser": f"{type(optimizer).__name__}({given})",
            "parameters in its groups": [len(group["params"]) for group in optimizer.param_groups],
            "clip_norm": self.svi.clip_norm,
            "regularizer": None if self.svi.regularizer is None else repr(self.svi.regularizer),
            "beside": self.svi.turns.facts() if self.svi.turns is not None else None,
            "lr_scheduler": type(self.scheduler).__name__,
            "patience": "none" if self.patience is None else "some",  # the number may change
            "callbacks with a state": [type(callback).__name__ for callback in self.stateful],
        }

    def facts_of_ranks(self, resume: bool | str | os.PathLike[str]) -> dict[str, str]:
        """What must be the same in all processes; of parameters only the shapes."""
        svi, files = self.svi, self.files
        parameters, buffers = svi.objective.named_parameters(), svi.objective.named_buffers()
        facts = {
            "epochs": self.epochs,
            "batches of data": self.data.num_batches(),
            "batches of valid": self.valid.num_batches() if self.valid is not None else "none",
            "checkpoint": f"every={files.every}, every_steps={files.every_steps}"
            if files
            else "none",
            "resume": resume,
            "model": title(svi.model),
            "guide": title(svi.guide),
            **self.facts(),
            "compile": svi.compile,
            "skip_nonfinite": svi.skip_nonfinite,
            "device": self.progress.total.device.type,
            "versions": f"python {platform.python_version()}, torch {torch.__version__}, "
            f"pyro {pyro.__version__}, numpy {np.__version__}",
        }
        for name, tensor in parameters:
            frozen = "" if tensor.requires_grad else ", frozen"
            facts[name] = f"{tuple(tensor.shape)} {tensor.dtype}{frozen}"
        facts |= {name: f"{tuple(tensor.shape)} {tensor.dtype}" for name, tensor in buffers}
        return {name: _ADDRESS.sub("", str(fact)) for name, fact in facts.items()}

    @contextmanager
    def folder(self, resume: bool | str | os.PathLike[str]) -> Iterator[None]:
        """Have the folder of checkpoints to itself.

        Raises:
            FileExistsError: another process is writing to it, or has been meanwhile.
            TypeError: the state of a callback cannot be saved.
        """
        if self.files is None:
            yield
            return
        for callback in self.stateful:
            plain(callback.state_dict(), f"{type(callback).__name__}.state_dict()")
        with ExitStack() as stack:
            refused: OSError | None = None
            if self.processes.rank == 0:
                try:
                    stack.enter_context(self.files.held())
                    require_unused(self.files, resume)
                except OSError as error:
                    refused = error
            for found in self.processes.gather(refused):
                if found is not None:
                    raise found
            yield

    def write(self, best: bool = False) -> None:
        """Write a checkpoint; all processes meet here, and the first one writes.

        Raises:
            NonFiniteError, FloatingPointError: the state is not worth keeping.
        """
        svi, progress, files = self.svi, self.progress, self.files
        assert files is not None
        svi.check_finite()
        buffers = {k: v.cpu() for k, v in svi.objective.named_buffers()}
        shown = getattr(state_of(svi), "shown", {})
        own = {
            "random": rng_state(),
            "data": self.data.state_dict(progress.batch),
            "valid": self.valid.state_dict(0) if self.valid is not None else {},
            "total": progress.total.cpu(),
            "count": int(progress.count),
            "shown": {column: weight.cpu() for column, weight in shown.items()},
            "buffers": buffers if self.processes.size > 1 else {},
            "callbacks": [callback.state_dict() for callback in self.stateful],
            "reported": svi.turns.reported if svi.turns is not None else {},
        }
        each = self.processes.gather(own)
        if self.processes.rank == 0:
            _require_finite(svi)
            common = {f.name: getattr(progress, f.name) for f in fields(progress)}
            common |= {"history": vars(progress.history)}
            state = {
                "facts": self.facts(),
                "svi": svi.state_dict(),
                "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
                "progress": {name: common[name] for name in common.keys() - own.keys()},
                "processes": each,
            }
            files.write(state, svi.num_steps, best)
        self.processes.wait()
        for call in overridden(self.callbacks, "on_checkpoint"):
            call(svi, files.path(svi.num_steps))

    def resume(self, which: bool | str | os.PathLike[str]) -> None:
        """Go on from a file, or, for True, from the latest one if there is any.

        Raises:
            FileNotFoundError: the file is absent.
            CheckpointError: it is damaged, or of another run.
        """
        assert self.files is not None
        latest = self.files.paths()[-1:]
        path = Path(which) if not isinstance(which, bool) else latest[0] if latest else None
        if len({str(other) for other in self.processes.gather(path)}) > 1:
            raise CheckpointError(
                f"the processes see different files in {self.files.folder}: share one folder"
            )
        if path is not None:
            self._load(self.files.load(path), path)
        self.processes.wait()  # nobody writes before everybody has read
        if self.processes.rank == 0:
            self.files.set_aside_after(self.svi.num_steps)

    def _load(self, state: dict[str, Any], path: Path) -> None:
        _require_same_run(self, state, path)
        svi, progress = self.svi, self.progress
        svi.load_state_dict(state["svi"])
        own = state["processes"][self.processes.rank]
        buffers = dict(svi.objective.named_buffers())
        with torch.no_grad():
            for name, saved in own["buffers"].items():
                buffers[name].copy_(saved)
        device = progress.total.device
        for column, weight in own["shown"].items():
            state_of(svi).shown[column] = weight.to(device)
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
            if svi.num_steps > 0:  # else a first step of the scheduler warns
                svi.optimizer._opt_called = True  # type: ignore[union-attr]
        for name, value in state["progress"].items():
            setattr(progress, name, value)
        progress.history = History(**state["progress"]["history"])
        progress.total, progress.count = own["total"].to(device), own["count"]
        if svi.turns is not None:
            svi.turns.reported = {
                column: (value.to(device), steps)
                for column, (value, steps) in own["reported"].items()
            }
        self.data.load_state_dict(own["data"])
        if self.valid is not None:
            self.valid.load_state_dict(own["valid"])
        for callback, saved in zip(self.stateful, own["callbacks"], strict=True):
            callback.load_state_dict(saved)
        set_rng_state(own["random"])


def state_of(svi: SVI) -> Any:
    """What the estimator remembers; None under an ELBO of Pyro's."""
    return getattr(svi.objective, "state", None)


def _require_parts(state: Any, path: Path, **kinds: type) -> None:
    """Raise ``CheckpointError`` unless a part of the state holds these, each of its type."""
    for name, kind in kinds.items():
        if not isinstance(state, dict) or not isinstance(state.get(name), kind):
            raise CheckpointError(
                f"{path} was not written by ppvae.fit: it holds no run, for want of {name!r}"
            )


def _require_same_run(run: Run, state: Any, path: Path) -> None:
    """The parameters and buffers, and all facts, must be those of the file."""
    _require_parts(state, path, facts=dict, svi=dict, progress=dict, processes=list)
    counts = {"num_steps": int, "num_epochs": int, "num_skipped": int}
    _require_parts(state["svi"], path, objective=dict, optimizer=dict, **counts)
    _require_parts(state["progress"], path, history=dict)
    was, now = _shapes(state["svi"]["objective"]), _shapes(run.svi.objective.state_dict())
    if differ := _differences(was, now):
        raise CheckpointError(
            f"{path} belongs to another model or guide; {len(differ)} of {len(was | now)} "
            "parameters and buffers differ. Build the pair that was trained, or give checkpoint= "
            "another folder:\n  " + "\n  ".join(differ[:5])
        )
    facts = run.facts()
    was = {name: repr(state["facts"].get(name)) for name in facts}
    if differ := _differences(was, {name: repr(fact) for name, fact in facts.items()}):
        raise CheckpointError(
            f"{path} is of another run. Pass the same again, or start a new one in another folder "
            'from svi.load_state_dict(Checkpoints(...).load()["svi"]):\n  ' + "\n  ".join(differ)
        )
    own = state["processes"][run.processes.rank :][:1]  # as many as there are processes now
    parts = {"shown": dict, "buffers": dict, "callbacks": list, "total": Tensor, "count": int}
    _require_parts(own[0] if own else None, path, random=dict, data=dict, **parts)


def _shapes(state: dict[str, Any]) -> dict[str, str]:
    tensors = {name: value for name, value in state.items() if torch.is_tensor(value)}
    return {name: f"{tuple(t.shape)} {t.dtype}" for name, t in tensors.items()}


def _differences(was: dict[str, str], now: dict[str, str]) -> list[str]:
    return [
        f"{name}: {was.get(name, 'absent')} then, {now.get(name, 'absent')} now"
        for name in {**was, **now}
        if was.get(name) != now.get(name)
    ]


def _require_finite(svi: SVI) -> None:
    """A bad state is never written over a good one."""
    for name, parameter in svi.objective.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise FloatingPointError(
                f"parameter {name!r} became NaN or infinite at step {svi.num_steps}; no checkpoint "
                "was written of it: lower the learning rate, or clip: SVI(clip_norm=...)"
            )
