"""fit: one visible training loop."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from tqdm.auto import tqdm

from ppvae.arguments import takes_numbers
from ppvae.check.pair import check_batch
from ppvae.elbo.standard import ELBO
from ppvae.intake import for_training, part_of
from ppvae.pairs import evaluation_mode, seeded
from ppvae.processes import Processes
from ppvae.program import one_thread
from ppvae.train import refusals
from ppvae.train.batches import Batch, Source
from ppvae.train.callbacks import Callback, all_callbacks, all_loggers, log, overridden
from ppvae.train.checkpoint import Checkpoints, checkpoints_for
from ppvae.train.history import History
from ppvae.train.interrupt import Interrupt, interrupts
from ppvae.train.optimizer import moved
from ppvae.train.refusals import resolve_device
from ppvae.train.run import Progress, Run, state_of
from ppvae.train.sources import source
from ppvae.train.svi import SVI
from ppvae.wrapped import argument_names


@takes_numbers
def fit(
    svi: SVI,
    data: Any,
    *,
    epochs: int,
    batch_size: int = 128,
    steps_per_epoch: int | None = None,
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
            splits; an array, frame or tensor ``(N, ...)``; a tuple of these for ``model(x, y)``, or
            a dictionary of them by the names of the model's arguments; scipy's sparse rows or an
            AnnData, made dense batch by batch; a data set of torch or Hugging Face; a mapped file,
            an array of zarr or h5py, a table or Parquet file of pyarrow, which stay where they are
            (``ppvae.data.Stored``); or a ``DataLoader`` that yields such batches, in nested tuples
            too, or dictionaries.
        epochs: passes over the data, >= 1; of a resumed run, those before it included.
        batch_size: datapoints per step, over all processes, >= 1; the last batch may be smaller,
            but of one row only where no layer of batch norm would see a single value.
        steps_per_epoch: of a ``DataLoader`` without an end: call so many steps an epoch. The next
            one goes on from there, and the loader starts anew when it ends. None: until it ends.
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
        PairError, ValueError, TypeError: before the first step: bad data, values outside the
            likelihood's support or NaN (unless model and guide mask them), a pair that does not fit
            together, or that has no bound per datapoint to validate it by, a last batch too small
            for batch norm, fewer points than a mixture has components, a device that is not there.
            The batches of a ``DataLoader`` or a file are checked in the first epoch, each before
            its step.
        NonFiniteError: a loss or gradient became NaN or infinite; see :class:`ppvae.SVI`. The
            checkpoints written before stay.
        CollapsedComponent: after an epoch, by ``models.GaussianMixture``; checkpoints stay, too.
        FileExistsError: ``checkpoint`` has a run in it, and ``resume`` is False; or another process
            is writing to it.
        TypeError: the state of a callback holds what no checkpoint can.
        CheckpointError: a checkpoint is damaged, or of another model, data or set of arguments.
        RuntimeError: another thread runs a pair; or, with several processes, another one has
            raised, was killed or does not answer.

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
    processes = Processes(fabric)
    with one_thread(), processes.connected():
        valid = part_of(data, "valid", None) if valid is None else part_of(valid, "valid", valid)
        refusals.check_arguments(
            epochs, batch_size, steps_per_epoch, patience, valid, lr_scheduler, device, fabric
        )
        files = checkpoints_for(checkpoint, resume)
        callbacks = all_callbacks(on_epoch_end, callbacks)
        loggers = all_loggers(loggers, fabric)
        target = None if device is None else resolve_device(device)
        if fabric is not None:
            target = fabric.device
        of_batches = (batch_size, target, processes, files is not None)
        run = begin(
            svi,
            *sources(svi, data, valid, seed, steps_per_epoch, *of_batches),
            processes=processes,
            target=target,
            callbacks=callbacks,
            loggers=loggers if processes.rank == 0 else [],
            lr_scheduler=lr_scheduler,
            files=files,
            epochs=epochs,
            seed=seed,
            patience=patience,
        )
        if processes.size > 1:
            processes.require_equal(run.facts_of_ranks(resume))
        processes.copy_from_first(svi.objective)
        processes.own_draws()
        with run.folder(resume):
            if resume:
                run.resume(resume)
            rows = run.progress.history.rows
            log(run.loggers, rows)  # a logger of a resumed run has all of it
            disabled = None if progress and processes.rank == 0 else True  # None: in a terminal
            bar = tqdm(total=epochs, initial=len(rows), unit="epoch", disable=disabled)
            with bar, processes.joined(svi), interrupts(files is not None) as interrupt:
                with closing(train(run, bar, interrupt)) as steps:
                    loss = None
                    while (batch := next_batch(steps, loss)) is not None:
                        loss = svi.update(*batch)
        return run.progress.history


def sources(
    svi: SVI,
    data: Any,
    valid: Any,
    seed: int,
    steps_per_epoch: int | None,
    batch_size: int,
    target: torch.device | None,
    processes: Processes,
    saved: bool,
) -> tuple[Source, Source | None]:
    """Where training and validation batches are cut, of what :func:`fit` was given."""
    pair = svi.model, svi.guide
    common = (batch_size, target, processes, saved, argument_names(svi.model))
    data = for_training(part_of(data, "train", data), "data", batch_size, seed, *pair)
    if valid is not None:
        valid = for_training(valid, "valid", batch_size, seed, *pair)
    for given in (data, valid):
        refusals.check_tensors(svi.model, given)
    train_data = source("data", data, *common, steps_per_epoch)
    return train_data, None if valid is None else source("valid", valid, *common)


def begin(
    svi: SVI,
    data: Source,
    valid: Source | None,
    *,
    target: torch.device | None,
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None,
    epochs: int,
    patience: int | None,
    **others: Any,
) -> Run:
    """A run before its first step: the pair is moved and checked on the data.

    Args:
        others: what else a :class:`Run` has.
    """
    pair = svi.model, svi.guide
    data.check_processes()
    data.check_passes(epochs)
    refusals.require_whole(svi.guide, data)
    if target is not None:
        _move(svi, target)
    if data.num_rows is not None:
        svi.num_rows = data.num_rows
    first = data.first()
    data.check(*pair, refusals.prepare(svi, first))
    refusals.require_rows(svi, data, first)
    refusals.require_two_rows(svi, data, first)
    refusals.require_rows_beside(svi, data, first)
    check_model = refusals.before_fit(svi.model, data, first)
    has_bound = True
    if valid is not None:
        valid.check_passes(epochs)
        first = valid.first()
        valid.check(*pair, check_batch(*pair, *first))
        has_bound = refusals.require_bound(svi, first, patience)
    assert svi.optimizer is not None
    if svi.turns is not None:
        svi.turns.reported = {}  # of steps before this call
    return Run(
        svi=svi,
        progress=Progress(History(_name(svi.elbo)), torch.zeros((), device=target)),
        data=data,
        valid=valid,
        check_model=check_model,
        scheduler=lr_scheduler(svi.optimizer) if lr_scheduler is not None else None,
        epochs=epochs,
        patience=patience,
        has_bound=has_bound,
        **others,
    )


Steps = Generator[Batch, Tensor | None, None]


def next_batch(steps: Steps, loss: Tensor | None) -> Batch | None:
    """What to take the next step on, given the loss of the last; None: the run is over."""
    try:
        return steps.send(loss)
    except StopIteration:
        return None


def train(run: Run, bar: Any, interrupt: Interrupt) -> Steps:
    """The loop: epoch after epoch, until there are enough, or something else ends the run.

    It yields the batch of each step, and is sent the loss of the step taken.
    """
    svi, progress, files = run.svi, run.progress, run.files
    history = progress.history
    while not run.is_over():
        history.interrupted = yield from _epoch(run, interrupt)
        if history.interrupted:
            return
        row = _row(run)
        history.rows.append(row)
        _step_schedule(run.scheduler, row)
        _show(bar, history)
        stops = [call(svi, history) for call in overridden(run.callbacks, "on_epoch_end")]
        progress.stopped = run.processes.any(any(stops))
        improved = run.keep_best(row.get("valid_bound"))
        progress.begin_epoch()
        if svi.turns is not None:
            svi.turns.reported = {}
        log(run.loggers, [row])
        if files is not None:
            is_over, asked = run.is_over(), run.processes.any(interrupt.asked)
            if is_over or asked or improved or len(history.rows) % files.every == 0:
                run.write(best=improved)
            history.interrupted = asked and not is_over
            if history.interrupted:
                return
    if progress.best_state is not None:
        svi.objective.load_state_dict(progress.best_state, strict=False)  # not the step count


def _epoch(run: Run, interrupt: Interrupt) -> Generator[Batch, Tensor, bool]:
    """Take the steps of an epoch that are left; True if a signal stopped it, and it is saved."""
    svi, progress, processes = run.svi, run.progress, run.processes
    after_step = overridden(run.callbacks, "on_step_end")
    every_steps = run.files.every_steps if run.files is not None else None
    may_stop = run.files is not None and processes.size == 1  # several must stop together
    # without these no code of a user's runs between two steps
    own_update = getattr(svi.update, "__func__", None) is SVI.update
    undisturbed = run.data.only_cuts and own_update and not after_step
    progress.start_clock(svi)
    batches = run.data.epoch(run.seed, svi.num_epochs + 1, progress.batch)
    try:
        for batch, rows in batches:
            processes.contributes = rows > 0
            loss = yield batch
            progress.add(run.of_its_rows(loss, batch), rows, svi.skip_nonfinite)
            for call in after_step:
                call(svi, loss)
            is_due = every_steps is not None and svi.num_steps % every_steps == 0
            if is_due or (may_stop and interrupt.asked):
                progress.read_clock(svi)
                run.write()
                if processes.any(interrupt.asked):
                    return True
            svi.undisturbed = undisturbed and not is_due
    finally:
        batches.close()
        svi.look_anew()
    svi.check_finite()
    if run.check_model is not None:
        processes.together(run.check_model)
    svi.num_epochs += 1  # so a second call goes on with new shuffles and draws
    processes.average_buffers(svi.objective)
    return False


def _row(run: Run) -> dict[str, float]:
    """The row of the history for an epoch that has just ended; it runs the validation."""
    svi, progress, processes = run.svi, run.progress, run.processes
    total, count = processes.sum(float(progress.total), float(progress.count))
    progress.read_clock(svi)  # float(total) has waited for the device
    objective = total / count if count else math.nan
    row = {"epoch": svi.num_epochs, "step": svi.num_steps, "train_objective": objective}
    if run.valid is not None:
        own_seed = processes.own_seed(run.seed)
        if svi.turns is not None:  # a normaliser may be out of date by now
            run.has_bound = refusals.has_bound(svi, run.valid.first())
        column = "valid_bound" if run.has_bound else "valid_estimate"
        batches = run.valid.evaluation()
        row[column] = mean_bound(svi, batches, own_seed, processes, run.has_bound)
    for column, weight in getattr(state_of(svi), "shown", {}).items():
        row[column] = processes.sum(float(weight))[0] / processes.size
    for column, (value, steps) in (svi.turns.reported if svi.turns is not None else {}).items():
        summed, number = processes.sum(float(value), float(steps))
        row[column] = summed / number
    if svi.skip_nonfinite:
        row["skipped"] = progress.skipped
    assert svi.optimizer is not None
    row |= {"lr": float(svi.optimizer.param_groups[0]["lr"]), "seconds": progress.seconds}
    if svi.build_seconds > progress.built_before:
        row["build_seconds"] = svi.build_seconds - progress.built_before
    return row


def _step_schedule(scheduler: LRScheduler | None, row: dict[str, float]) -> None:
    if isinstance(scheduler, ReduceLROnPlateau):
        scheduler.step(row.get("valid_bound", row["train_objective"]))
    elif scheduler is not None:
        scheduler.step()


def _show(bar: Any, history: History) -> None:
    row = history.rows[-1]
    bar.set_description(f"{history.name} [nats per datapoint]")
    shown = [k for k in ("train_objective", "valid_bound", "valid_estimate") if k in row]
    bar.set_postfix({k: f"{row[k]:.2f}" for k in shown})
    bar.update()


def mean_bound(
    svi: SVI,
    batches: Iterable[Batch],
    seed: int,
    processes: Processes | None = None,
    has_bound: bool = True,
) -> float:
    """The bound on log p(x) over batches, nats per datapoint, in evaluation mode, same draws.

    Where the pair has no bound, :meth:`ppvae.elbo.ELBO.estimate`.
    """
    estimate = ELBO(svi.evaluator.num_draws).estimate
    evaluate = svi.evaluator.evaluate if has_bound else estimate
    with evaluation_mode(svi.objective), seeded(seed, *svi.objective.parameters()):
        total: Any = 0.0  # a tensor of float64 on the device, so that no batch waits for another
        count = 0.0
        for batch in batches:
            total = total + evaluate(svi.model, svi.guide, *batch).sum().double()
            count += len(batch[0])
        total = float(total)
    if processes is not None:
        total, count = processes.sum(total, count)
    return total / count


def _move(svi: SVI, device: torch.device) -> None:
    svi.objective.to(device)
    if svi.optimizer is not None:
        moved(svi.optimizer)
    if svi.turns is not None:
        svi.turns.load_state_dict(svi.turns.state_dict())


def _name(elbo: Any) -> str:
    elbo = getattr(elbo, "estimator", elbo)  # of elbo.Plus: what is reported is its bound
    K = getattr(elbo, "num_draws", elbo.num_particles)
    return f"{type(elbo).__name__}-{K}" if K > 1 else type(elbo).__name__
