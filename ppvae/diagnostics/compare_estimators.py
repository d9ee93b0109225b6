"""Compare estimators on one pair and one batch: bound, gap, gradient noise, time, memory."""

from __future__ import annotations

import math
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppvae.arguments import takes_numbers
from ppvae.diagnostics.evidence import log_evidence as importance_log_evidence
from ppvae.diagnostics.rows import (
    bound,
    check_at_least,
    check_log_evidence,
    check_pair_and_data,
    standard_error,
    trainable,
)
from ppvae.elbo import Estimator, Objective
from ppvae.elbo.discrete import THROUGH
from ppvae.intake import tensors
from ppvae.pairs import evaluation_mode, seeded
from ppvae.program import local_parameters


@takes_numbers
def compare(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Any,
    estimators: Mapping[str, Estimator] | Sequence[Estimator],
    *,
    repeats: int = 100,
    log_evidence: Tensor | None = None,
    evidence_particles: int = 5000,
    timing_rounds: int = 20,
    seed: int = 0,
    **kwargs: Any,
) -> Any:
    r"""Measure estimators side by side, at the pair's present parameters.

    The signal-to-noise ratio of a gradient g of P parameters, over independent draws, is

    .. math:: \mathrm{SNR} = \lVert \mathbb E g \rVert / \sqrt{\operatorname{tr} \mathrm{Var}\, g}

    with the numerator's own noise, tr Var / repeats, taken off its square. Programs run in
    evaluation mode; nothing is trained.

    Args:
        model, guide: Pyro programs.
        data: a batch ``x``, or a tuple ``(x, y)``; arrays, frames and the other containers of
            :func:`ppvae.fit`.
        estimators: a list, or a mapping from the names to show.
        repeats: R >= 2 independent gradients and bounds per estimator.
        log_evidence: exact log p(x) of each datapoint, ``(N,)`` nats, where it is known; otherwise
            it is estimated by importance sampling.
        evidence_particles: particles of that estimate.
        timing_rounds: rounds of loss and gradient that are timed, all estimators in turn in each,
            in alternating order; the median is reported. 0 leaves time out.
        seed: of all draws; the random stream is left as it was.
        **kwargs: passed to both programs whole: tables, flags. Only ``args`` are cut by rows.

    Returns:
        A ``pandas.DataFrame``, one row per estimator: ``estimator`` (its repr), ``family`` (bound
        and gradient), ``particles`` (draws per datapoint), ``bound``, ``bound_se``, ``gap`` (to
        ``log_evidence``), ``gap_se`` (that of the bound), ``snr_model``, ``snr_guide``,
        ``snr_floor_model``, ``snr_floor_guide`` (below it, a ratio cannot be told from zero at this
        many repeats), ``var_model``, ``var_guide`` (tr Var of the gradient of the mean loss per
        datapoint), ``ms`` (one loss and gradient), ``peak_mb`` (of live tensors in it, parameters
        excluded). Nats per datapoint. ``table.attrs`` has ``log_evidence``, ``reference`` ("exact"
        or "IWELBO-5000"), ``repeats``, ``device`` and ``threads``. Parameters that model and guide
        share count in both.

    Raises:
        PairError, ValueError: the pair or an estimator does not fit the data.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> x = torch.bernoulli(torch.full((20, 4), 0.5))
        >>> table = ppvae.compare(model, guide, x, [elbo.ELBO(), elbo.IWELBO(num_particles=8)],
        ...                       repeats=20, evidence_particles=500, timing_rounds=2)
        >>> bool(table.loc["IWELBO-8", "bound"] > table.loc["ELBO-1", "bound"])
        True
    """
    model, guide = bound(model, guide, kwargs)
    import pandas

    check_at_least(2, repeats=repeats)
    check_at_least(2 if log_evidence is None else 0, evidence_particles=evidence_particles)
    check_at_least(0, timing_rounds=timing_rounds)
    args = tensors(data if isinstance(data, (tuple, list)) else (data,), model, guide)
    rows = check_pair_and_data(model, guide, args)
    if log_evidence is not None:
        check_log_evidence(log_evidence, rows)
    named = _by_name(estimators)
    with seeded(seed, *args):
        reference = "exact"
        if log_evidence is None:
            found = importance_log_evidence(model, guide, *args, num_particles=evidence_particles)
            log_evidence, reference = found.log_evidence, f"IWELBO-{evidence_particles}"
        truth = log_evidence.double().mean().item()
        objectives = {name: estimator(model, guide) for name, estimator in named.items()}
        with (
            evaluation_mode(*objectives.values()),
            local_parameters(),
            pyro.validation_enabled(False),
        ):
            found_by_name = {
                name: _bound(objective, args, repeats, truth)
                | _gradient_noise(objective, args, repeats)
                for name, objective in objectives.items()
            }
            for name, milliseconds in _times(objectives, args, timing_rounds).items():
                found_by_name[name]["ms"] = milliseconds
            for name, objective in objectives.items():
                with PeakMemory() as memory:
                    _gradient(objective, args, trainable(objective))
                found_by_name[name]["peak_mb"] = memory.peak / 2**20
    table = pandas.DataFrame.from_dict(found_by_name, orient="index")
    table.attrs = {
        "log_evidence": truth,
        "reference": reference,
        "repeats": repeats,
        "datapoints": rows,
        "device": str(args[0].device),
        "threads": torch.get_num_threads(),
    }
    return table


def _by_name(estimators: Any) -> dict[str, Estimator]:
    """The estimators by name: as given, or made from family and number of draws."""
    if isinstance(estimators, pyro.infer.ELBO):
        estimators = [estimators]
    mapped = isinstance(estimators, Mapping)
    if not mapped and not isinstance(estimators, Sequence):
        estimators = [estimators]  # which is refused by its name
    values = list(estimators.values() if mapped else estimators)
    wrong = next((repr(e) for e in values if not isinstance(e, Estimator)), None)
    if wrong or not values:
        raise TypeError(
            "estimators must be values from ppvae.elbo, such as [elbo.ELBO(), elbo.IWELBO(8)], got "
            f"{wrong or 'none'}"
        )
    if mapped:
        return dict(estimators)
    named: dict[str, Estimator] = {}
    for estimator in values:
        bound, _, gradient = _family(estimator).partition(" ")
        name = f"{bound}-{estimator.num_draws} {gradient}".rstrip()
        if repr(estimator) in map(repr, named.values()):
            raise ValueError(f"{estimator} is given twice; name the two with a mapping")
        named[repr(estimator) if name in named else name] = estimator
    return named


def _family(estimator: Estimator) -> str:
    default = type(estimator).__dataclass_fields__["gradient"].default
    name = type(estimator).__name__
    biased = " (biased)" if estimator.gradient in THROUGH else ""
    return name if estimator.gradient == default else f"{name} {estimator.gradient}{biased}"


def _bound(
    objective: Objective, args: tuple[Tensor, ...], repeats: int, truth: float
) -> dict[str, Any]:
    """What an estimator is, its bound and the gap to log p(x)."""
    estimator = objective.elbo
    bounds = torch.stack(
        [
            estimator.evaluate(objective.model, objective.guide, *args).double().mean()
            for _ in range(repeats)
        ]
    )
    bound, se = bounds.mean().item(), standard_error(bounds)
    return {
        "estimator": repr(estimator),
        "family": _family(estimator),
        "particles": estimator.num_draws,
        "bound": bound,
        "bound_se": se,
        "gap": truth - bound,
        "gap_se": se,
    }


def _gradient(
    objective: Objective, args: tuple[Tensor, ...], parameters: Sequence[nn.Parameter]
) -> tuple[Tensor | None, ...]:
    """The gradient of the mean loss per datapoint; without parameters only the loss is computed."""
    loss = objective(*args) / len(args[0])
    return torch.autograd.grad(loss, parameters, allow_unused=True) if parameters else ()


def _gradient_noise(
    objective: Objective, args: tuple[Tensor, ...], repeats: int
) -> dict[str, float]:
    """Signal-to-noise ratio, its floor, and total variance of the gradients of model and guide."""
    parts = {"model": trainable(objective.model), "guide": trainable(objective.guide)}
    every = list(dict.fromkeys([*parts["model"], *parts["guide"]]))
    mean = {p: torch.zeros_like(p, dtype=torch.float64) for p in every}
    squares = {p: torch.zeros_like(p, dtype=torch.float64) for p in every}
    for count in range(1, repeats + 1 if every else 1):
        for p, gradient in zip(every, _gradient(objective, args, every), strict=True):
            if gradient is not None:  # Welford's moments
                delta = gradient.double() - mean[p]
                mean[p] += delta / count
                squares[p] += delta * (gradient.double() - mean[p])
    snr, floor, variance = {}, {}, {}
    for part, parameters in parts.items():
        variances = [squares[p] / (repeats - 1) for p in parameters]
        total = variance[part] = sum(v.sum().item() for v in variances)
        signal = sum(mean[p].square().sum().item() for p in parameters) - total / repeats
        # Without a signal, the squared norm of the mean has this standard deviation.
        chance = math.sqrt(2 * sum(v.square().sum().item() for v in variances)) / repeats
        snr[part] = math.sqrt(max(signal, 0.0) / total) if total else math.nan
        floor[part] = math.sqrt(2 * chance / total) if total else math.nan
    columns = {"snr": snr, "snr_floor": floor, "var": variance}
    return {f"{name}_{part}": v for name, by_part in columns.items() for part, v in by_part.items()}


def _times(
    objectives: dict[str, Objective], args: tuple[Tensor, ...], rounds: int
) -> dict[str, float]:
    """Median milliseconds of one loss and gradient, the estimators in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in objectives}
    for i in range(rounds):
        for name in list(objectives)[:: 1 if i % 2 == 0 else -1]:
            parameters = trainable(objectives[name])
            _synchronize(args[0])
            started = time.perf_counter()
            _gradient(objectives[name], args, parameters)
            _synchronize(args[0])
            seconds[name].append(time.perf_counter() - started)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items() if times}


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


class PeakMemory(TorchDispatchMode):
    """Peak bytes of tensors made inside the block and alive at one time, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._watched: dict[int, weakref.finalize] = {}

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for watch in self._watched.values():  # of what lives on: nobody counts it any more
            watch.detach()
        self._watched.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._watched:
            return
        self.alive += size
        self.peak = max(self.peak, self.alive)
        self._watched[key] = weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._watched.pop(key, None)
        self.alive -= size
