"""Check a model/guide pair on a batch, before any work is spent on it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from torch import Tensor

from ppvae.weights import DATA_PLATE, Site, check_latents, own_path, sample_sites, unnoticed


class PairError(ValueError):
    """A model/guide pair, or the data it is given, cannot work; the message lists every fault."""


def check_pair(
    model: Callable[..., Any], guide: Callable[..., Any], *args: Any, joint: bool = False
) -> dict[int, Any]:
    """Run the pair once on a batch and raise if anything about it is wrong.

    Checked: the data are finite, of equal length and not empty; both programs run; the guide has
    the model's latents and no others, with the same event shapes and in their support; every site
    lies in the plate ``"data"``; the observations fit the likelihood's shape and support; the
    log-weights are finite. Parameters, random stream and batch-norm statistics are left as they
    were.

    Args:
        model, guide: Pyro programs.
        *args: a batch, as both are called: ``x`` or ``x, y``.
        joint: allow latents outside the data plate.

    Returns:
        The support of the likelihood by the position of the argument it observes.

    Raises:
        PairError: with one line per fault, naming the site or argument, what was seen, the cure.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> _ = ppvae.check_pair(model, guide, torch.ones(5, 4))
        >>> ppvae.check_pair(model, guide, torch.full((5, 4), 0.5))
        Traceback (most recent call last):
        ...
        ppvae.check.PairError: site 'x': 20 of 20 values of argument 'x' lie outside the ...
    """
    check_tensors(model, args)
    with own_path(), pyro.validation_enabled(False), unnoticed(model, guide):
        guide_sites = sample_sites(_run("guide", guide, args))
        model_sites = sample_sites(_run("model", model, args))  # from its own prior
        faults = _latent_faults(model_sites, guide_sites)
        if not joint:
            faults += _plate_faults("model", model_sites) + _plate_faults("guide", guide_sites)
        supports: dict[int, Any] = {}
        for name, site in model_sites.items():
            if site["is_observed"]:
                position = next((i for i, arg in enumerate(args) if arg is site["value"]), None)
                label = (
                    f"argument {names(model, args)[position]!r}" if position is not None else "obs"
                )
                fault = _observation_fault(site, label)
                faults += [fault] if fault else []
                if position is not None:
                    supports[position] = site["fn"].support
    if faults:
        raise PairError("\n".join(faults))
    return supports


def check_tensors(program: Callable[..., Any], args: Sequence[Any]) -> None:
    """Raise :class:`PairError` unless the tensors are finite, not empty and of equal length."""
    labels = names(program, args)
    tensors = {
        label: arg for label, arg in zip(labels, args, strict=True) if isinstance(arg, Tensor)
    }
    for label, tensor in tensors.items():
        if tensor.dim() == 0 or tensor.numel() == 0:
            raise PairError(
                f"argument {label!r} is empty: shape {tuple(tensor.shape)}; its first dimension is "
                "the datapoints, and there must be at least one"
            )
        if tensor.is_floating_point() and not (finite := torch.isfinite(tensor)).all():
            rows = (
                (~finite).flatten(1).any(1).nonzero() if tensor.dim() > 1 else (~finite).nonzero()
            )
            raise PairError(
                f"argument {label!r} has {int((~finite).sum())} NaN or infinite values in "
                f"{len(rows)} rows, the first is row {int(rows[0])}; drop or impute them"
            )
    if len({len(tensor) for tensor in tensors.values()}) > 1:
        seen = ", ".join(f"{label}: {tuple(t.shape)}" for label, t in tensors.items())
        raise PairError(
            f"the arguments differ in length ({seen}); each needs one row per datapoint"
        )


def outside_support(values: Tensor, support: Any, label: str) -> str | None:
    """One line saying which values lie outside a distribution's support, or None."""
    inside = support.check(values)
    if inside.all():
        return None
    elementwise = support.base_constraint if hasattr(support, "base_constraint") else support
    bad = ~elementwise.check(values)
    shown = (
        [round(v, 4) for v in values[bad].unique()[:3].tolist()]
        if bad.shape == values.shape
        else []
    )
    return (
        f"{int(bad.sum())} of {bad.numel()} values of {label} lie outside the likelihood's "
        f"support, {_describe(elementwise)}"
        + (f", e.g. {shown}" if shown else "")
        + ". Rescale or "
        "binarise the data (data.load(..., binarize='dynamic')), or choose a likelihood that fits"
    )


def names(program: Callable[..., Any], args: Sequence[Any]) -> list[str]:
    """What a program calls its positional arguments."""
    function = program.forward if isinstance(program, torch.nn.Module) else program
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    return [known[i] if i < len(known) else f"argument {i}" for i in range(len(args))]


def _run(role: str, program: Callable[..., Any], args: Sequence[Any]) -> Trace:
    try:
        return poutine.trace(program).get_trace(*args)
    except (RuntimeError, TypeError, IndexError) as error:
        shapes = ", ".join(
            f"{name} {tuple(arg.shape)}"
            for name, arg in zip(names(program, args), args, strict=True)
            if isinstance(arg, Tensor)
        )
        raise PairError(
            f"the {role} ({type(program).__name__}) fails when called with {shapes}: {error}"
        ) from error


def _latent_faults(model_sites: dict[str, Site], guide_sites: dict[str, Site]) -> list[str]:
    try:
        check_latents(model_sites, guide_sites)
    except ValueError as error:
        return [str(error)]
    faults = []
    for name, q in guide_sites.items():
        if name not in model_sites:
            continue  # auxiliary
        p = model_sites[name]
        if q["fn"].event_shape != p["fn"].event_shape:
            faults.append(
                f"latent {name!r}: event shape {tuple(q['fn'].event_shape)} in the guide, "
                f"{tuple(p['fn'].event_shape)} in the model; make the guide's last layer fit, and "
                "declare event dimensions with .to_event(1) in both"
            )
        elif not p["fn"].support.check(q["value"]).all():
            faults.append(
                f"latent {name!r}: the guide draws values outside the model's support, "
                f"{_describe(p['fn'].support)}; use a guide distribution with that support"
            )
    return faults


def _plate_faults(role: str, sites: dict[str, Site]) -> list[str]:
    return [
        f"site {name!r} of the {role} lies outside the plate {DATA_PLATE!r}; put it inside "
        f'`with pyro.plate("{DATA_PLATE}", len(x)):`, or pass joint=True if it is global'
        for name, site in sites.items()
        if DATA_PLATE not in {frame.name for frame in site["cond_indep_stack"]}
    ]


def _observation_fault(site: Site, label: str) -> str | None:
    fn, value = site["fn"], site["value"]
    expected = fn.batch_shape + fn.event_shape
    if value.shape != expected:
        return (
            f"site {site['name']!r}: {label} has shape {tuple(value.shape)}, the likelihood "
            f"generates {tuple(expected)}; check the output size of the decoder, the likelihood's "
            "event_dim, and that images are (N, C, H, W) or flattened as the decoder has them"
        )
    fault = outside_support(value, fn.support, label)
    return f"site {site['name']!r}: {fault}" if fault else None


def _describe(support: Any) -> str:
    while hasattr(support, "base_constraint"):
        support = support.base_constraint
    name = str(support)
    return {"Boolean()": "{0, 1}", "Interval(lower_bound=0.0, upper_bound=1.0)": "[0, 1]"}.get(
        name, name
    )
