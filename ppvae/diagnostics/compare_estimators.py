"""Compare estimators on one pair and one batch: bound, gap, gradient noise, time, memory."""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ppvae.check.pair import check_batch
from ppvae.diagnostics.evidence import log_evidence as importance_log_evidence
from ppvae.elbo import Estimator, Objective
from ppvae.pairs import evaluation_mode, seeded
from ppvae.program import local_parameters, module_of


def compare(
    model: Callable[..., Any],
    guide: Callable[..., Any],
    data: Tensor | Sequence[Tensor],
    estimators: Mapping[str, Estimator] | Sequence[Estimator],
    *,
    repeats: int = 100,
    log_evidence: Tensor | None = None,
    evidence_particles: int = 5000,
    timing_rounds: int = 20,
    seed: int = 0,
) -> Any:
    r"""Measure estimators side by side, at the pair's present parameters.

    The signal-to-noise ratio of a gradient g of P parameters, over independent draws, is

    .. math:: \mathrm{SNR} = \lVert \mathbb E g \rVert / \sqrt{\operatorname{tr} \mathrm{Var}\, g}

    with the numerator's own noise, tr Var / repeats, taken off its square. Programs run in
    evaluation mode; nothing is trained.

    Args:
        model, guide: Pyro programs.
        data: a batch ``x``, or a tuple ``(x, y)``.
        estimators: a list, or a mapping from the names to show.
        repeats: R >= 2 independent gradients and bounds per estimator.
        log_evidence: exact log p(x) of each datapoint, ``(N,)`` nats, where it is known; otherwise
            it is estimated by importance sampling.
        evidence_particles: particles of that estimate.
        timing_rounds: rounds of loss and gradient that are timed, all estimators in turn in each,
            in alternating order; the median is reported. 0 leaves time out.
        seed: of all draws; the random stream is left as it was.

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
    import pandas

    if repeats < 2:
        raise ValueError(f"repeats must be at least 2, got {repeats}")
    args = (data,) if isinstance(data, Tensor) else tuple(data)
    check_batch(model, guide, *args)
    named = _checked(estimators)
    given = getattr(log_evidence, "shape", ())
    if log_evidence is not None and tuple(given) != (len(args[0]),):
        raise ValueError(
            f"log_evidence must be a tensor of one value per datapoint, ({len(args[0])},), got "
            f"shape {tuple(given)}"
        )
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
            rows = {
                name: _row(objective, args, repeats, truth)
                for name, objective in objectives.items()
            }
            for name, milliseconds in _times(objectives, args, timing_rounds).items():
                rows[name]["ms"] = milliseconds
            for name, objective in objectives.items():
                rows[name]["peak_mb"] = _peak_megabytes(objective, args)
    table = pandas.DataFrame.from_dict(rows, orient="index")
    table.attrs = {
        "log_evidence": truth,
        "reference": reference,
        "repeats": repeats,
        "datapoints": len(args[0]),
        "device": str(args[0].device),
        "threads": torch.get_num_threads(),
    }
    return table


def _checked(estimators: Any) -> dict[str, Estimator]:
    if isinstance(estimators, pyro.infer.ELBO):
        estimators = [estimators]
    mapped = isinstance(estimators, Mapping)
    given = list(estimators.values() if mapped else estimators)
    wrong = next((e for e in given if not isinstance(e, Estimator)), None)
    if wrong is not None or not given:
        raise TypeError(
            "estimators must be values from ppvae.elbo, such as [elbo.ELBO(), elbo.IWELBO(8)], got "
            f"{'none' if wrong is None else repr(wrong)}"
        )
    return dict(estimators) if mapped else _named(given)


def _named(estimators: Sequence[Estimator]) -> dict[str, Estimator]:
    named: dict[str, Estimator] = {}
    for estimator in estimators:
        bound, _, gradient = _family(estimator).partition(" ")
        name = f"{bound}-{estimator.num_draws} {gradient}".rstrip()
        if repr(estimator) in map(repr, named.values()):
            raise ValueError(f"{estimator} is given twice; name the two with a mapping")
        named[repr(estimator) if name in named else name] = estimator
    return named


def _family(estimator: Estimator) -> str:
    default = type(estimator).__dataclass_fields__["gradient"].default
    name = type(estimator).__name__
    return name if estimator.gradient == default else f"{name} {estimator.gradient}"


def _row(objective: Objective, args: tuple[Tensor, ...], repeats: int, truth: float) -> dict:
    estimator, rows = objective.elbo, len(args[0])
    bounds = torch.stack(
        [
            estimator.evaluate(objective.model, objective.guide, *args).double().mean()
            for _ in range(repeats)
        ]
    )
    bound, bound_se = bounds.mean().item(), bounds.std().item() / math.sqrt(repeats)
    row: dict[str, Any] = {
        "estimator": repr(estimator),
        "family": _family(estimator),
        "particles": estimator.num_draws,
        "bound": bound,
        "bound_se": bound_se,
        "gap": truth - bound,
        "gap_se": bound_se,
    }
    parts = {"model": _parameters(objective.model), "guide": _parameters(objective.guide)}
    noise = _gradient_noise(objective, args, parts, repeats, rows)
    row |= {f"snr_{part}": snr for part, (snr, _, _) in noise.items()}
    row |= {f"snr_floor_{part}": floor for part, (_, floor, _) in noise.items()}
    row |= {f"var_{part}": variance for part, (_, _, variance) in noise.items()}
    return row


def _parameters(program: Any) -> list[nn.Parameter]:
    owner = module_of(program)
    return [p for p in owner.parameters() if p.requires_grad] if owner is not None else []


def _gradient_noise(
    objective: Objective,
    args: tuple[Tensor, ...],
    parts: dict[str, list[nn.Parameter]],
    repeats: int,
    rows: int,
) -> dict[str, tuple[float, float, float]]:
    """SNR, its floor and the total variance of each part's gradient, by Welford's moments."""
    union = list({id(p): p for part in parts.values() for p in part}.values())
    mean = [torch.zeros_like(p, dtype=torch.float64) for p in union]
    spread = [torch.zeros_like(m) for m in mean]
    for count in range(1, repeats + 1 if union else 1):
        gradients = torch.autograd.grad(objective(*args) / rows, union, allow_unused=True)
        for g, m, s in zip(gradients, mean, spread, strict=True):
            if g is not None:
                delta = g.double() - m
                m += delta / count
                s += delta * (g.double() - m)
    moments = {id(p): (m, s / (repeats - 1)) for p, m, s in zip(union, mean, spread, strict=True)}
    found = {}
    for part, parameters in parts.items():
        variance = sum(moments[id(p)][1].sum().item() for p in parameters)
        signal = sum(moments[id(p)][0].square().sum().item() for p in parameters)
        signal = max(signal - variance / repeats, 0.0)
        # Without a signal, the squared norm of the mean has this standard deviation.
        chance = sum(moments[id(p)][1].square().sum().item() for p in parameters)
        chance = math.sqrt(2 * chance) / repeats
        snr, floor = (
            math.sqrt(square / variance) if variance else math.nan
            for square in (signal, 2 * chance)
        )
        found[part] = (snr, floor, variance)
    return found


def _times(
    objectives: dict[str, Objective], args: tuple[Tensor, ...], rounds: int
) -> dict[str, float]:
    """Median milliseconds of one loss and gradient, the estimators in turn."""
    seen: dict[str, list[float]] = {name: [] for name in objectives}
    for i in range(rounds):
        order = list(objectives) if i % 2 == 0 else list(objectives)[::-1]
        for name in order:
            _synchronize(args[0])
            started = time.perf_counter()
            _loss_and_gradient(objectives[name], args)
            _synchronize(args[0])
            seen[name].append(1e3 * (time.perf_counter() - started))
    return {name: sorted(times)[len(times) // 2] for name, times in seen.items() if times}


def _loss_and_gradient(objective: Objective, args: tuple[Tensor, ...]) -> None:
    parameters = [p for p in objective.parameters() if p.requires_grad]
    loss = objective(*args)
    if parameters:
        torch.autograd.grad(loss, parameters, allow_unused=True)


def _synchronize(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)


def _peak_megabytes(objective: Objective, args: tuple[Tensor, ...]) -> float:
    with PeakMemory() as memory:
        _loss_and_gradient(objective, args)
    return memory.peak / 2**20


class PeakMemory(TorchDispatchMode):
    """Peak bytes of tensors made inside the block and alive at one time, on any device."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.alive -= size
