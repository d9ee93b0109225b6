"""fit: one visible training loop."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from ppvae.check import Checks, PairError, check_pair, check_tensors, names
from ppvae.elbo import Estimator
from ppvae.pairs import evaluation_mode, seeded
from ppvae.svi import SVI

Batch = tuple[Tensor, ...]


@dataclass
class History:
    """What :func:`fit` saw, one row per epoch.

    Attributes:
        name: what the numbers are, e.g. ``"IWELBO-8"``.
        rows: per epoch: ``epoch`` (from 1, going on over calls of ``fit``), ``step`` (updates so
            far), ``train_objective`` (the mean over the epoch of what is maximised, any weight on
            the KL included),
            ``valid_bound`` (the bound on log p(x), its weight always 1; absent without validation
            data), ``kl_weight`` (where it changes), ``lr``, ``seconds`` (training only). Nats per
            datapoint, larger is better.
        best_epoch: the epoch with the largest validation bound after warm-up, or None.
        stopped_early: whether patience ran out.

    Example:
        >>> from ppvae import History
        >>> history = History("ELBO", [dict(epoch=1, step=10, train_objective=-9.5, seconds=0.1)])
        >>> print(history.table())
        ELBO [nats per datapoint]
        epoch  step  train_objective  seconds
            1    10            -9.50     0.10
    """

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    stopped_early: bool = False

    def column(self, name: str) -> list[float]:
        """One column, e.g. ``history.column("valid_bound")``; NaN where a row lacks it."""
        return [row.get(name, math.nan) for row in self.rows]

    def table(self, last: int = 10) -> str:
        """The last rows, and the best, as text."""
        chosen = self.rows[-last:]
        if self.best_epoch is not None and self.best_epoch < chosen[0]["epoch"]:
            chosen = [row for row in self.rows if row["epoch"] == self.best_epoch] + chosen
        if not chosen:
            return f"{self.name}: no epoch yet"
        heads = list(dict.fromkeys(head for row in chosen for head in row))
        cells = [
            [
                format(row[h], {"epoch": ".0f", "step": ".0f", "lr": ".2e"}.get(h, ".2f"))
                if h in row
                else ""
                for h in heads
            ]
            for row in chosen
        ]
        widths = [max(len(h), *(len(row[i]) for row in cells)) for i, h in enumerate(heads)]
        lines = [
            "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True))
            for row in [heads, *cells]
        ]
        for i, row in enumerate(chosen):
            if row["epoch"] == self.best_epoch:
                lines[i + 1] += "  (best)"
        return "\n".join([f"{self.name} [nats per datapoint]", *lines])

    def plot(self, ax: Any = None) -> Any:
        """Training and validation curve, see :func:`ppvae.plots.training_curve`."""
        from ppvae import plots

        has_valid = any("valid_bound" in row for row in self.rows)
        valid = self.column("valid_bound") if has_valid else None
        return plots.training_curve(self.column("train_objective"), valid, ax=ax, name=self.name)

    def __repr__(self) -> str:
        return self.table()


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
    progress: bool = True,
    on_epoch_end: Callable[[SVI, History], bool | None] | None = None,
) -> History:
    """Train a pair for some epochs: shuffle, step, validate, repeat.

    Shuffling and the draws of the validation bound are a function of ``seed`` (a ``DataLoader``
    shuffles itself), binarisation of the split's own seed; the particles follow
    ``torch.manual_seed``. Weights that change with the step (``elbo.LinearWarmup``) belong to the
    estimator, clipping to :class:`ppvae.SVI`.

    Args:
        svi: a :class:`ppvae.SVI`.
        data: a ``ppvae.data.Dataset`` (trains on ``train``, validates on ``valid``) or one of its
            splits; a tensor ``(N, ...)``; a tuple of tensors for ``model(x, y)``; or a
            ``DataLoader`` that yields such batches.
        epochs: passes over the data, >= 1.
        batch_size: datapoints per step, >= 1; the last batch may be smaller.
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
        progress: show a progress bar, if the output is a terminal.
        on_epoch_end: called with ``(svi, history)`` after each epoch; return True to stop. Saving
            ``svi.state_dict()`` here is a checkpoint.

    Returns:
        :class:`History`, whose repr is a table; ``history.plot()`` draws it.

    Raises:
        PairError, ValueError: before the first step: bad data, values outside the likelihood's
            support, a pair that does not fit together, CUDA asked for but absent. The batches of a
            ``DataLoader`` are checked in the first epoch, each before its step.
        FloatingPointError: the loss became NaN or infinite.

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
    target = resolve_device(device) if device is not None else None
    train_data = _Source("data", getattr(data, "train", data), batch_size, target)
    valid_data = _Source("valid", valid, batch_size, target) if valid is not None else None
    if target is not None:
        _move(svi, target)
    train_data.check(svi, svi.prepare(*train_data.first()))
    if valid_data is not None:
        valid_data.check(svi, check_pair(svi.model, svi.guide, *valid_data.first()))

    assert svi.optimizer is not None
    scheduler = lr_scheduler(svi.optimizer) if lr_scheduler is not None else None
    warm_up = getattr(getattr(svi.elbo, "beta", None), "steps", 0)
    history = History(_name(svi.elbo))
    best, best_state = -math.inf, None
    with tqdm(range(epochs), unit="epoch", disable=None if progress else True) as bar:
        for _ in bar:
            svi.num_epochs += (
                1  # a second call goes on where the first ended: new shuffles and draws
            )
            epoch = svi.num_epochs
            started = time.perf_counter()
            total, count = torch.zeros((), device=target), 0
            for batch in train_data.epoch(seed, epoch):
                total = total - svi.update(*batch)
                count += len(batch[0])
            row = {"epoch": epoch, "step": svi.num_steps, "train_objective": float(total) / count}
            seconds = time.perf_counter() - started  # float(total) has waited for the device
            if not math.isfinite(row["train_objective"]):
                raise FloatingPointError(
                    f"the loss became {-row['train_objective']} in epoch {epoch}; lower the "
                    "learning rate, clip the gradient (SVI(clip_norm=...)), or bound the predicted "
                    "scale"
                )
            if valid_data is not None:
                row["valid_bound"] = mean_bound(svi, valid_data.epoch(None, 0), seed)
            weight = getattr(getattr(svi.objective, "state", None), "weight", None)
            if weight is not None:
                row["kl_weight"] = float(weight)
            row |= {"lr": float(svi.optimizer.param_groups[0]["lr"]), "seconds": seconds}
            history.rows.append(row)
            if scheduler is not None:
                if isinstance(scheduler, ReduceLROnPlateau):
                    scheduler.step(row.get("valid_bound", row["train_objective"]))
                else:
                    scheduler.step()
            shown = {k: f"{row[k]:.2f}" for k in ("train_objective", "valid_bound") if k in row}
            bar.set_description(f"{history.name} [nats per datapoint]")
            bar.set_postfix(shown)

            stop = bool(on_epoch_end(svi, history)) if on_epoch_end is not None else False
            if valid_data is not None and svi.num_steps >= warm_up:
                score = getattr(svi.elbo, "sign", 1) * row["valid_bound"]
                if score > best:
                    best, history.best_epoch = score, epoch
                    if patience is not None:
                        state = svi.objective.state_dict()  # the step count is not a tensor
                        best_state = {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}
                elif patience is not None and epoch - (history.best_epoch or epoch) >= patience:
                    history.stopped_early = stop = True
            if stop:
                break
    if best_state is not None:
        svi.objective.load_state_dict(best_state, strict=False)  # the step count goes on
    return history


def mean_bound(svi: SVI, batches: Iterator[Batch], seed: int) -> float:
    """The bound on log p(x) over batches, nats per datapoint, in evaluation mode, same draws."""
    with evaluation_mode(svi.objective), seeded(seed, *svi.objective.parameters()):
        total, count = 0.0, 0
        for batch in batches:
            if isinstance(svi.elbo, Estimator):
                total += svi.elbo.evaluate(svi.model, svi.guide, *batch).sum().item()
            else:
                total -= svi.evaluate_loss(*batch)
            count += len(batch[0])
    return total / count


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or CUDA is asked for but absent.

    Example:
        >>> from ppvae.train import resolve_device
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


class _Source:
    """Batches from whatever :func:`fit` takes as data."""

    def __init__(self, label: str, data: Any, batch_size: int, device: torch.device | None) -> None:
        self.label, self.batch_size, self.device = label, batch_size, device
        if isinstance(data, Tensor):
            data = (data,)
        known = isinstance(data, DataLoader) or hasattr(data, "batch")
        tensors = isinstance(data, (tuple, list)) and all(isinstance(t, Tensor) for t in data)
        if not known and not (tensors and data):
            raise TypeError(
                f"{label} must be a data.Dataset or one of its splits, a tensor, a tuple of "
                f"tensors or a DataLoader, got {type(data).__name__}; wrap arrays with "
                "data.from_arrays(x, y)"
            )
        if hasattr(data, "batch") and device is not None:
            data = data.to(device)
        self.data = self._place(data) if tensors else data
        self.check_batch: Callable[[Batch], None] | None = None

    def whole(self, epoch: int) -> Batch:
        """All rows as tensors (not for a DataLoader)."""
        whole: Batch = self.data.batch(epoch) if hasattr(self.data, "batch") else self.data
        return whole

    def epoch(self, seed: int | None, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch, shuffled by (seed, epoch), or in order if seed is None."""
        if isinstance(self.data, DataLoader):
            for batch in self.data:
                batch = (batch,) if isinstance(batch, Tensor) else batch
                if not isinstance(batch, (tuple, list)) or not all(map(torch.is_tensor, batch)):
                    raise TypeError(
                        f"{self.label}: the DataLoader must yield a tensor or a tuple of tensors, "
                        f"as model and guide are called, got {batch!r:.200}; give it a collate_fn"
                    )
                batch = self._place(batch)
                if self.check_batch is not None:
                    self.check_batch(batch)
                yield batch
            self.check_batch = None  # all have been seen
            return
        tensors = self.whole(epoch)
        rows = len(tensors[0])
        if seed is None:
            order = torch.arange(rows)
        else:
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(rows, generator=generator)
        for index in order.to(tensors[0].device).split(self.batch_size):
            yield tuple(tensor.index_select(0, index) for tensor in tensors)

    def first(self) -> Batch:
        """One batch to check the pair on."""
        if not isinstance(self.data, DataLoader):
            rows = max(self.batch_size, 2)  # one row could not show what differs by row
            return tuple(tensor[:rows] for tensor in self.whole(0))
        with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws
            batch = next(self.epoch(None, 0), None)
        if batch is None:
            raise ValueError(f"{self.label} is empty: the DataLoader yields no batch")
        return batch

    def check(self, svi: SVI, checks: Checks) -> None:
        """All rows: finite, of one length, in the likelihood's support.

        The batches of a DataLoader are checked as they come, until it has yielded all of them.
        """
        if isinstance(self.data, DataLoader):
            self.check_batch = functools.partial(self._check, svi, checks)
        else:
            self._check(svi, checks, self.whole(0))

    def _check(self, svi: SVI, checks: Checks, tensors: Batch) -> None:
        check_tensors(svi.model, tensors)
        for position, check in checks:
            try:
                check(tensors[position])
            except ValueError as error:
                label = names(svi.model, tensors)[position]
                raise PairError(f"argument {label!r} in {self.label}: {error}") from error

    def _place(self, tensors: Sequence[Tensor]) -> Batch:
        if self.device is None:
            return tuple(tensors)
        cuda = self.device.type == "cuda"  # to the CPU, it would not wait for the values
        return tuple(tensor.to(self.device, non_blocking=cuda) for tensor in tensors)


def _move(svi: SVI, device: torch.device) -> None:
    svi.objective.to(device)
    if svi.optimizer is not None:  # loading casts the optimiser's state to the parameters' device
        svi.optimizer.load_state_dict(svi.optimizer.state_dict())


def _name(elbo: Any) -> str:
    K = getattr(elbo, "num_draws", elbo.num_particles)
    return f"{type(elbo).__name__}-{K}" if K > 1 else type(elbo).__name__
