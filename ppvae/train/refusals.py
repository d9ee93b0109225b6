"""What ``fit`` refuses before its first step, apart from the checks that every batch passes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ppvae.check.apart import position_faults
from ppvae.check.pair import Checks, check_batch, check_shapes
from ppvae.check.programs import PairError
from ppvae.pairs import own_path, unnoticed
from ppvae.program import local_parameters, module_of
from ppvae.train.batches import Batch, Source
from ppvae.train.svi import SVI
from ppvae.weights import log_weights
from ppvae.wrapped import argument_labels


def check_arguments(
    epochs: int,
    batch_size: int,
    steps_per_epoch: int | None,
    patience: int | None,
    valid: Any,
    lr_scheduler: Any,
    device: Any,
    fabric: Any,
) -> None:
    """Raise for arguments of ``fit`` that mean nothing, alone or together."""
    numbers = {
        "epochs": epochs,
        "batch_size": batch_size,
        "steps_per_epoch": steps_per_epoch,
        "patience": patience,
    }
    for name, value in numbers.items():
        if value is not None and not 1 <= value < 2**63:
            raise ValueError(f"{name} must be at least 1, and below 2 ** 63, got {value}")
    if patience is not None and valid is None:
        raise ValueError("patience needs a validation bound: pass valid=..., or a data.Dataset")
    makes = callable(lr_scheduler) and not isinstance(lr_scheduler, nn.Module)
    if isinstance(lr_scheduler, type):
        makes = hasattr(lr_scheduler, "step")
    if lr_scheduler is not None and not makes:
        kind = getattr(lr_scheduler, "__name__", type(lr_scheduler).__name__)
        raise TypeError(
            f"lr_scheduler takes a function from the optimiser to a scheduler, got a {kind}: give "
            f"lambda optimizer: {kind}(optimizer, ...)"
        )
    if device is not None and not isinstance(device, (str, torch.device)):
        raise TypeError(f'device takes "cpu", "cuda:1" or "auto", got {device!r}')
    if fabric is not None and device is not None:
        raise ValueError(f"the Fabric says where to train: leave out device={str(device)!r}")


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` is CUDA if there is one, else the CPU.

    Raises:
        ValueError: an unknown device, or one that is not there.

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
        raise ValueError(f'device={device!r} is unknown: use "auto", "cpu" or "cuda:1"') from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device={str(device)!r}, but this PyTorch sees no CUDA device: use 'cpu' or 'auto'"
        )
    try:
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        raise ValueError(
            f"device={str(device)!r}, but this PyTorch sees no such device: use 'cpu' or 'auto'"
        ) from error
    return resolved


def check_tensors(model: Any, data: Any) -> None:
    """Raise ``PairError`` for tensors that cannot be cut into batches; leave other data alone."""
    tensors = (data,) if isinstance(data, Tensor) else data
    if isinstance(tensors, (tuple, list)):
        check_shapes(model, tensors)


def require_whole(guide: Any, data: Source) -> None:
    """Refuse minibatches for a guide whose parameters belong to positions in a batch."""
    if not isinstance(guide, AutoGuide) or guide.create_plates is not None:
        return
    whole = data.whole()
    if whole is None or len(whole[0]) > data.batch_size:
        raise ValueError(
            f"{type(guide).__name__} has parameters for the positions of a batch, and minibatches "
            "would share them; wrap it (guides.Auto; of global latents alone guides.Global), or "
            "train on all data at once (batch_size)"
        )


def before_fit(model: Any, data: Source, first: Batch) -> Callable[[], None] | None:
    """Let a model that has a method ``before_fit`` look at the data; see :func:`ppvae.fit`.

    Args:
        model: the pair's.
        data: the training data.
        first: one batch, which stands for data that ``fit`` does not keep.

    Returns:
        What to call after each epoch; None: the model has no such method.
    """
    ask = getattr(module_of(model), "before_fit", None)
    if ask is None:
        return None
    after_epoch: Callable[[], None] | None = ask(data.num_rows, *(data.whole() or first))
    return after_epoch or (lambda: None)  # all processes meet to call it, so each has one


def prepare(svi: SVI, batch: Batch) -> Checks:
    """Check the pair on a batch; where whole numbers are all that is wrong with it, say so."""
    try:
        return svi.prepare(*batch)
    except PairError as error:
        for i, label in enumerate(argument_labels(svi.model, len(batch))):
            if batch[i].is_floating_point():
                continue
            try:
                check_batch(svi.model, svi.guide, *batch[:i], batch[i].float(), *batch[i + 1 :])
            except PairError:
                continue
            raise PairError(
                f"argument {label!r} holds {batch[i].dtype}, and the pair needs floating-point "
                f"numbers: give {label}.float(). {error}"
            ) from error
        raise


def require_rows(svi: SVI, data: Source, batch: Batch) -> None:
    """Refuse rows in any order for a pair of which a part belongs to positions in a batch."""
    if data.is_one_batch:
        return
    pair = svi.model, svi.guide
    with own_path(), unnoticed(*pair), pyro.validation_enabled(False):
        faults = position_faults(log_weights(*pair, *batch))
    if faults:
        raise PairError("\n".join(faults))


def has_bound(svi: SVI, batch: Batch) -> bool:
    """Whether each log-density of the pair is one, as it is now: else it has no bound to report."""
    return not _not_densities(svi, batch)


def _not_densities(svi: SVI, batch: Batch) -> dict[str, str]:
    """Sites whose log-density is none, and why."""
    with own_path(), unnoticed(svi.model, svi.guide), pyro.validation_enabled(False):
        weights = log_weights(svi.model, svi.guide, *batch)
    return weights.estimated | weights.unnormalised


def require_bound(svi: SVI, batch: Batch, patience: int | None) -> bool:
    """Refuse validation of a pair that has no bound per datapoint, before it is trained.

    Where log-densities are estimates there is one to be shown, and nothing to stop by: False.
    """
    for site, why in _not_densities(svi, batch).items():
        if patience is not None:
            raise ValueError(
                f"patience={patience} waits for a validation bound, and there is none, since site "
                f"{site!r} has no log-density: {why}. Leave patience out"
            )
        return False
    with own_path(), unnoticed(svi.model, svi.guide), pyro.validation_enabled(False):
        try:
            svi.evaluator.evaluate(svi.model, svi.guide, *batch)
        except ValueError as error:
            raise PairError(
                f"no validation bound: {error}, or train without valid= (of a Dataset: pass its "
                "train)"
            ) from error
    return True


def require_two_rows(svi: SVI, data: Source, batch: Batch) -> None:
    """Refuse a last batch of one row where batch norm would have one value per channel."""
    single = data.single_row()
    layer = _layer_of_single_values(svi, batch) if single is not None else None
    if single is None or layer is None:
        return
    rows, size = single
    cure = "give more rows, or normalise by nn.LayerNorm"
    if rows > 1:
        works = next(b for b in itertools.count(size + 1) if rows % b != 1)
        cure = f"use batch_size={works}" + (f", or {data.how_to_drop}" if size > 1 else "")
    raise ValueError(
        f"{data.label} has {rows} rows, so batch_size={size} leaves one row for the last batch, "
        f"and the batch-norm layer {layer!r} cannot train on a single value per channel; {cure}"
    )


def require_rows_beside(svi: SVI, data: Source, batch: Batch) -> None:
    """Let what stands beside the pair draw from as few rows as the smallest batch will have."""
    rows = data.fewest_rows()
    if svi.turns is not None and rows is not None:
        svi.turns.check(tuple(tensor[:rows] for tensor in batch), {})


def _layer_of_single_values(svi: SVI, batch: Batch) -> str | None:
    """The batch-norm layer that has one value per channel when the pair is run on one row.

    A layer that normalises a feature map, or several particles, has more.
    """
    layers = {
        module: name
        for name, module in svi.objective.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    }
    if not layers:
        return None
    found: list[str] = []

    def note(layer: Any, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].numel() == inputs[0].shape[1]:
            found.append(layers[layer])

    hooks = [layer.register_forward_pre_hook(note) for layer in layers]
    row = [tensor[:1] for tensor in batch]
    try:
        with unnoticed(svi.model, svi.guide), local_parameters(), pyro.validation_enabled(False):
            log_weights(svi.model, svi.guide, *row, num_particles=svi.particles_at_once)
    except ValueError:  # from a layer without running statistics, which needs two values
        if not found:
            raise
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None
