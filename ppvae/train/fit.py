"""fit: one visible training loop."""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from ppvae.check.pair import check_batch
from ppvae.elbo import Estimator
from ppvae.pairs import evaluation_mode, seeded
from ppvae.train.callbacks import Callback, overridden
from ppvae.train.checkpoint import Checkpoints
from ppvae.train.history import History
from ppvae.train.processes import Processes
from ppvae.train.refusals import before_fit, prepare, require_two_rows, require_whole
from ppvae.train.run import Progress, Run, signals, state_of
from ppvae.train.sources import Batch, Source
from ppvae.train.svi import SVI


def fit(
    svi: SVI,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    valid: Any = None,
    patience: int | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    device: str | torch.device | None = None,
    seed: int = 0,
    checkpoint: str | os.PathLike[str] | Checkpoints | None = None,
    resume: bool | str | os.PathLike[str] = False,
    progress: bool = True,
    on_epoch_end: Callable[[SVI, History], bool | None] | None = None,
    callbacks: Sequence[Callback] = (),
    loggers: Any = (),
    fabric: Any = None,
) -> History:
    """Train a pair for some epochs: shuffle, step, validate, repeat.

    Shuffling and the draws of the validation bound are a function of ``seed`` (a ``DataLoader``
    shuffles itself), binarisation of the split's own seed; the particles follow
    ``torch.manual_seed``. Weights that change with the step (``elbo.LinearWarmup``) belong to the
    estimator, clipping to :class:`ppvae.SVI`.

    ``fit(..., checkpoint="runs/vae", resume=True)`` starts afresh where there is nothing, and
    otherwise goes on where the run ended: on the CPU bit for bit as if nothing had happened.
    Ctrl-C or a termination signal then ends the current step (with several processes: the epoch,
    or the steps up to the next checkpoint), writes a checkpoint and returns; a second one raises
    at once.

    A model may have a method ``before_fit(rows, *data)``, called before the first step with the
    number of rows of the data set (None if not known) and the rows themselves (of a ``DataLoader``
    or a file: one batch). It raises ``ValueError`` for data that cannot be learned from, and
    returns None, or a function without arguments that is called after each epoch, before its
    checkpoint, and raises if training has gone wrong; ``models.GaussianMixture`` has one.

    Args:
        svi: a :class:`ppvae.SVI`.
        data: a ``ppvae.data.Dataset`` (trains on ``train``, validates on ``valid``) or one of its
            splits; a tensor ``(N, ...)``; a tuple of tensors for ``model(x, y)``; or a
            ``DataLoader`` that yields such batches.
        epochs: passes over the data, >= 1; of a resumed run, those before it included.
        batch_size: datapoints per step, over all processes, >= 1; the last batch may be smaller,
            but of one row only where no layer of batch norm would see a single value.
        valid: validation data, as ``data`` (of a ``Dataset``, its ``valid``); overrides the data
            set's own.
        patience: stop when the validation bound has not improved for so many epochs, and return to
            the best parameters. It counts only after the warm-up of a scheduled beta.
        lr_scheduler: from the optimiser to a ``torch.optim`` scheduler, stepped once per epoch
            (``ReduceLROnPlateau`` sees the validation bound; use ``mode="max"`` and
            ``threshold_mode="abs"``, since a relative threshold on a negative number is wrong).
        device: where to train: ``"auto"`` (CUDA if there is one), ``"cpu"``, ``"cuda"``; None
            leaves model and data where they are.
        seed: of shuffling and the validation draws.
        checkpoint: a folder for the checkpoints of this run, written after each epoch, or a
            :class:`ppvae.Checkpoints`, which says how often and how many.
        resume: True goes on from the latest checkpoint, if there is one; a path from that file;
            False refuses a folder that has checkpoints.
        progress: show a progress bar, if the output is a terminal.
        on_epoch_end: called with ``(svi, history)`` after each epoch; return True to stop.
        callbacks: :class:`ppvae.Callback` objects, called after steps, epochs and checkpoints.
        loggers: one or more loggers of Lightning (``CSVLogger``, ``TensorBoardLogger``), or any
            object with ``log_metrics(metrics, step)``: given each row of the history.
        fabric: a launched ``lightning_fabric.Fabric``, for bf16 and for several devices or
            machines; in place of ``device``.

    Returns:
        :class:`History`, whose repr is a table; ``history.plot()`` draws it.

    Raises:
        PairError, ValueError: before the first step: bad data, values outside the likelihood's
            support, a pair that does not fit together, a last batch too small for batch norm, fewer
            points than a mixture has components, CUDA asked for but absent. The batches of a
            ``DataLoader`` or a file are checked in the first epoch, each before its step.
        NonFiniteError: a loss or gradient became NaN or infinite; see :class:`ppvae.SVI`. The
            checkpoints written before stay.
        CollapsedComponent: after an epoch, by ``models.GaussianMixture``; checkpoints stay, too.
        FileExistsError: ``checkpoint`` has a run in it, and ``resume`` is False.
        CheckpointError: a checkpoint is damaged, or of another model, data or set of arguments.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, data, elbo, guides, models, nets
        >>> digits = data.load("digits")
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(8, 64, 64)), latent_dim=8)
        >>> guide = guides.Normal(nets.mlp(64, 64, 2 * 8))
        >>> svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO())
        >>> history = ppvae.fit(svi, digits, epochs=2, progress=False)
        >>> [row["epoch"] for row in history.rows]
        [1, 2]
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    valid = getattr(data if valid is None else valid, "valid", valid)
    if patience is not None and patience < 1:
        raise ValueError(f"patience must be at least 1, or None for no early stopping: {patience}")
    if patience is not None and valid is None:
        raise ValueError("patience needs a validation bound: pass valid=..., or a data.Dataset")
    if fabric is not None and device is not None:
        raise ValueError(f"the Fabric says where to train: leave out device={str(device)!r}")
    files = _checkpoints(checkpoint, resume)
    callbacks, loggers = _listeners(callbacks, loggers, fabric)
    processes = Processes(fabric)
    target = fabric.device if fabric is not None else None
    target = resolve_device(device) if device is not None else target
    source = functools.partial(
        Source, batch_size=batch_size, device=target, processes=processes, saved=files is not None
    )
    train_data = source("data", getattr(data, "train", data))
    valid_data = source("valid", valid) if valid is not None else None
    train_data.check_processes()
    require_whole(svi.guide, train_data)
    if target is not None:
        _move(svi, target)
    first = train_data.first()
    train_data.check(svi, prepare(svi, first))
    require_two_rows(svi, train_data, first)
    look = before_fit(svi.model, train_data, first)
    if valid_data is not None:
        valid_data.check(svi, check_batch(svi.model, svi.guide, *valid_data.first()))

    assert svi.optimizer is not None
    scheduler = lr_scheduler(svi.optimizer) if lr_scheduler is not None else None
    warm_up = getattr(getattr(svi.elbo, "beta", None), "steps", 0)
    processes.copy_from_first(svi.objective)
    processes.own_draws()
    at = Progress(History(_name(svi.elbo)), torch.zeros((), device=target))
    run = Run(
        svi, at, train_data, valid_data, scheduler, callbacks, processes, batch_size, seed, patience
    )
    if resume:
        assert files is not None
        run.resume(files, resume)
    history = at.history
    if processes.rank == 0:
        _log(loggers, history.rows)  # a logger of a resumed run has all of it
    after_step = overridden(callbacks, "on_step_end")
    after_epoch = overridden(callbacks, "on_epoch_end")
    if on_epoch_end is not None:
        after_epoch.insert(0, on_epoch_end)
    every_steps = files.every_steps if files is not None else None

    def clock() -> float:
        """Seconds of training: compiling is reported apart."""
        return time.perf_counter() - svi.build_seconds

    quiet = None if progress and processes.rank == 0 else True
    bar = tqdm(total=epochs, initial=len(history.rows), unit="epoch", disable=quiet)
    with bar, processes.joined(svi), signals(files is not None) as interrupt:
        while not at.over(epochs, patience):
            epoch, skipped = svi.num_epochs + 1, svi.num_skipped - at.skipped
            built = svi.build_seconds
            started = clock() - at.seconds
            batches = train_data.epoch(seed, epoch, skip=at.batch, training=True)
            for batch, rows in batches:
                processes.contributes = rows > 0
                loss = svi.update(*batch)
                at.add(loss, rows, svi.skip_nonfinite)
                for call in after_step:
                    call(svi, loss)
                due = every_steps is not None and svi.num_steps % every_steps == 0
                alone = processes.size == 1  # several processes stop where they meet
                if files is not None and (due or (interrupt.asked and alone)):
                    at.seconds = clock() - started
                    at.skipped = svi.num_skipped - skipped
                    run.write(files)
                    if processes.any(interrupt.asked):
                        batches.close()
                        history.interrupted = True
                        return history
            svi.check_finite()
            if look is not None:
                processes.together(look)
            # A second call goes on where the first ended: new shuffles and draws.
            svi.num_epochs = epoch
            processes.average_buffers(svi.objective)
            total, count = processes.sum(float(at.total), float(at.count))
            seconds = clock() - started  # float(total) has waited for the device
            objective = total / count if count else math.nan
            row = {"epoch": epoch, "step": svi.num_steps, "train_objective": objective}
            if valid_data is not None:
                evaluated = (batch for batch, _ in valid_data.epoch(None, 0))
                own_seed = processes.own_seed(seed)
                row["valid_bound"] = mean_bound(svi, evaluated, own_seed, processes)
            weight = getattr(state_of(svi), "weight", None)
            if weight is not None:
                row["kl_weight"] = processes.sum(float(weight))[0] / processes.size
            if svi.skip_nonfinite:
                row["skipped"] = svi.num_skipped - skipped
            row |= {"lr": float(svi.optimizer.param_groups[0]["lr"]), "seconds": seconds}
            if svi.build_seconds > built:
                row["build_seconds"] = svi.build_seconds - built
            history.rows.append(row)
            if scheduler is not None:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(row.get("valid_bound", row["train_objective"]))
                else:
                    scheduler.step()
            shown = {k: f"{row[k]:.2f}" for k in ("train_objective", "valid_bound") if k in row}
            bar.set_description(f"{history.name} [nats per datapoint]")
            bar.set_postfix(shown)
            bar.update()

            stops = [bool(call(svi, history)) for call in after_epoch]
            at.stopped = processes.any(any(stops))
            improved = False
            if valid_data is not None and svi.num_steps >= warm_up:
                score = getattr(svi.elbo, "sign", 1) * row["valid_bound"]
                improved = score > at.best
                if improved:
                    at.best, history.best_epoch = score, epoch
                    if patience is not None:
                        at.best_state = _tensors(svi)
            at.begin_epoch()
            if processes.rank == 0:
                _log(loggers, [row])
            if files is not None:
                due = len(history.rows) % files.every == 0 or at.over(epochs, patience)
                asked = processes.any(interrupt.asked)
                if due or improved or asked:
                    run.write(files, best=improved)
                if asked and not at.over(epochs, patience):
                    history.interrupted = True
                    return history
    if at.best_state is not None:
        svi.objective.load_state_dict(at.best_state, strict=False)  # the step count goes on
    return history


def mean_bound(
    svi: SVI, batches: Iterable[Batch], seed: int, processes: Processes | None = None
) -> float:
    """The bound on log p(x) over batches, nats per datapoint, in evaluation mode, same draws."""
    with evaluation_mode(svi.objective), seeded(seed, *svi.objective.parameters()):
        total, count = 0.0, 0.0
        for batch in batches:
            if isinstance(svi.elbo, Estimator):
                total += svi.elbo.evaluate(svi.model, svi.guide, *batch).sum().item()
            else:
                total -= svi.evaluate_loss(*batch)
            count += len(batch[0])
    if processes is not None:
        total, count = processes.sum(total, count)
    return total / count


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or CUDA is asked for but absent.

    Example:
        >>> from ppvae.train.fit import resolve_device
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f'device={device!r} is unknown: use "auto", "cpu", "cuda" or "cuda:1"'
        ) from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={str(device)!r} was asked for, but this PyTorch sees no CUDA device; use "
            '"auto" or "cpu", or install a CUDA build of torch'
        )
    return resolved


def _move(svi: SVI, device: torch.device) -> None:
    svi.objective.to(device)
    if svi.optimizer is not None:  # loading casts the optimiser's state to the parameters' device
        svi.optimizer.load_state_dict(svi.optimizer.state_dict())


def _tensors(svi: SVI) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    state = svi.objective.state_dict()  # the step count is not a tensor
    return {name: value.clone() for name, value in state.items() if torch.is_tensor(value)}


def _name(elbo: Any) -> str:
    K = getattr(elbo, "num_draws", elbo.num_particles)
    return f"{type(elbo).__name__}-{K}" if K > 1 else type(elbo).__name__


def _checkpoints(
    where: str | os.PathLike[str] | Checkpoints | None, resume: bool | str | os.PathLike[str]
) -> Checkpoints | None:
    """The folder to write to and to go on from; refuses to mix two runs."""
    if where is None:
        if resume:
            raise ValueError(
                "resume needs the folder where checkpoints are: fit(..., checkpoint='runs/vae', "
                "resume=True)"
            )
        return None
    files = where if isinstance(where, Checkpoints) else Checkpoints(where)
    there = files.paths() + ([files.best] if files.best.exists() else [])
    elsewhere = (
        not isinstance(resume, bool) and Path(resume).resolve().parent != files.folder.resolve()
    )
    if there and (resume is False or elsewhere):
        raise FileExistsError(
            f"{files.folder} holds the checkpoints of a run ({there[-1].name}), and this one would "
            "replace them: go on with it by resume=True, or give checkpoint= another folder"
        )
    files.folder.mkdir(parents=True, exist_ok=True)  # if that fails, not after an epoch's work
    return files


def _listeners(callbacks: Any, loggers: Any, fabric: Any) -> tuple[list[Callback], list[Any]]:
    """Callbacks and loggers as lists, the Fabric's loggers included."""
    callbacks = [callbacks] if isinstance(callbacks, Callback) else list(callbacks)
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks takes ppvae.Callback objects, got {callback!r}; a function of (svi, "
                "history) goes to on_epoch_end"
            )
    loggers = [loggers] if hasattr(loggers, "log_metrics") else list(loggers)
    loggers += fabric.loggers if fabric is not None else []
    for logger in loggers:
        if not hasattr(logger, "log_metrics"):
            raise TypeError(f"a logger needs log_metrics(metrics, step), and {logger!r} has none")
    return callbacks, loggers


def _log(loggers: list[Any], rows: list[dict[str, float]]) -> None:
    for logger in loggers:
        for row in rows:
            logger.log_metrics(row, int(row["step"]))
        if rows and hasattr(logger, "save"):
            logger.save()
