"""What ``fit`` refuses before its first step, besides what every batch is checked for."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pyro
from pyro.infer.autoguide import AutoGuide
from torch.nn.modules.batchnorm import _BatchNorm

from ppvae.check.pair import Checks, PairError, check_batch, names
from ppvae.elbo import Estimator
from ppvae.pairs import unnoticed
from ppvae.program import local_parameters, module_of
from ppvae.train.sources import Batch, Source
from ppvae.train.svi import SVI
from ppvae.weights import log_weights


def require_whole(guide: Any, data: Source) -> None:
    """Refuse minibatches for a guide whose parameters belong to positions in a batch."""
    if not isinstance(guide, AutoGuide) or guide.create_plates is not None:
        return
    if data.loads or data.reads or len(data.whole(0)[0]) > data.batch_size:
        raise ValueError(
            f"{type(guide).__name__} has parameters for the positions of a batch, not for "
            "datapoints, so minibatches would share them; wrap it (guides.Auto), or train on all "
            "the data at once (batch_size)"
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
    rows = None
    if not data.loads and not data.reads:
        first = data.whole(0)
        rows = len(first[0])
    elif data.reads:
        rows = len(data.data)
    elif data.loads_rows():
        rows = len(data.data.dataset)
    after_epoch: Callable[[], None] | None = ask(rows, *first)
    return after_epoch or (lambda: None)  # in every process, if in one


def prepare(svi: SVI, batch: Batch) -> Checks:
    """Check the pair on a batch; where whole numbers are all that is wrong with it, say so."""
    try:
        return svi.prepare(*batch)
    except PairError as error:
        for i, label in enumerate(names(svi.model, batch)):
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


def require_two_rows(svi: SVI, data: Source, batch: Batch) -> None:
    """Refuse a last batch of one row where batch norm would have one value per channel.

    Layers that normalise a feature map, or several particles, have more: so the pair is run.
    """
    sizes = data.batches_of_one()
    layers = {
        name: module
        for name, module in svi.objective.named_modules()
        if isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)
    }
    if sizes is None or not layers:
        return
    found: list[str] = []

    def look(name: str, module: Any, inputs: tuple[Any, ...]) -> None:
        if inputs and inputs[0].numel() == inputs[0].shape[1]:
            found.append(name)

    handles = [
        module.register_forward_pre_hook(functools.partial(look, name))
        for name, module in layers.items()
    ]
    if isinstance(svi.elbo, Estimator):
        K = svi.elbo.num_draws
    else:  # Pyro's own draw one by one, unless told otherwise
        K = svi.elbo.num_particles if svi.elbo.vectorize_particles else 1
    row = [tensor[:1] for tensor in batch]
    try:
        with unnoticed(svi.model, svi.guide), local_parameters(), pyro.validation_enabled(False):
            log_weights(svi.model, svi.guide, *row, num_particles=K)
    except ValueError:  # a layer without running statistics, which has none to evaluate with
        if not found:
            raise
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        return
    rows, size = sizes
    if rows > 1:
        works = next(b for b in itertools.count(size + 1) if rows % b != 1)
        cure = f"use batch_size={works}, or leave a row out"
        cure += " (drop_last=True)" if data.loads and size > 1 else ""
    else:
        cure = "give more rows, or normalise by nn.LayerNorm"
    raise ValueError(
        f"{data.label} has {rows} rows, so batch_size={size} leaves one row for the last batch, "
        f"and the batch-norm layer {found[0]!r} cannot train on a single value per channel; {cure}"
    )
