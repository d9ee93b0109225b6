"""Where a loss or gradient that is not finite comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from torch import Tensor, nn

from ppvae.auxiliary import own_parameters
from ppvae.pairs import Program, Site
from ppvae.program import module_of
from ppvae.weights import log_weights


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; the parameters are still those before the step."""


def blame(model: Program, guide: Program, *args: Any, num_particles: int = 1, **kwargs: Any) -> str:
    """The site that makes a loss or its gradient not finite, or "" if none is found.

    The pair is run once more, at the draws that follow now. The first site is named, guide before
    model, whose distribution has parameters that are not finite, else whose log-density is not,
    else whose log-density has a gradient that is not.

    Args:
        model, guide, args, num_particles, kwargs: as in :func:`ppvae.log_weights`.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, ppvae
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(torch.zeros(2), x.square()), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 1.))
        >>> print(ppvae.check.nonfinite.blame(model, guide, torch.tensor([1., 0.])))
        site 'x' of the model: its log-density is not finite for 1 of 2 datapoints, ...
    """
    try:
        with pyro.validation_enabled(False), torch.enable_grad(), _Watch():
            weights = log_weights(model, guide, *args, num_particles=num_particles, **kwargs)
    except _Found as found:
        return str(found)
    except (ValueError, RuntimeError):  # the pair has no weights per datapoint
        return ""
    owners = [owner for owner in map(module_of, (model, guide)) if owner is not None]
    trained = [p for o in owners for p in own_parameters(o).values() if p.requires_grad]
    programs = (
        ("guide", weights.guide_trace, weights.all_terms("guide")),
        ("model", weights.model_trace, weights.all_terms("model")),
    )
    for role, trace, terms in programs:
        for name, term in terms.items():
            good = torch.isfinite(term)
            if name in weights.enumerated:  # a class that a row cannot have
                good |= term == -torch.inf
            bad = ~good.flatten(0, -2).all(0)
            if bad.any():
                where = (
                    f"its log-density is not finite for {int(bad.sum())} of {len(bad)} "
                    f"datapoints, the first is row {int(bad.nonzero()[0])}"
                )
                return f"site {name!r} of the {role}: {where}; {describe(trace.nodes[name])}"
    for role, trace, terms in programs:
        for name, term in terms.items():
            if not term.requires_grad:
                continue
            slopes = torch.autograd.grad(term.sum(), trained, retain_graph=True, allow_unused=True)
            if any(slope is not None and _bad(slope) for slope in slopes):
                where = "its log-density is finite but has a gradient that is not"
                return f"site {name!r} of the {role}: {where}; {describe(trace.nodes[name])}"
    return ""


class _Found(Exception):
    pass


class _Watch(Messenger):
    """Stops a run at the first site whose distribution has parameters that are not finite."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if site_is_subsample(msg):
            return
        in_model = msg["is_observed"] or msg["name"] in self.seen
        self.seen.add(msg["name"])
        wrong = [label for label, value in parameters(msg) if _bad(_allowed(label, value))]
        if wrong:
            role = "model" if in_model else "guide"
            what = f"{' and '.join(wrong)} not finite"
            raise _Found(f"site {msg['name']!r} of the {role}: {what}; {describe(msg)}")


def parameters(site: Site) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a site's distribution was made of, by name."""
    fn = _innermost(site["fn"])
    for name in getattr(fn, "arg_constraints", {}):
        if name in vars(fn) and isinstance(vars(fn)[name], Tensor):  # not what is derived lazily
            yield name, vars(fn)[name]


def describe(site: Site) -> str:
    """A site's distribution with the range of each of its parameters."""
    fn = _innermost(site["fn"])
    ranges = ", ".join(f"{name}: {_range(value)}" for name, value in parameters(site))
    return f"{type(fn).__name__}({ranges})"


def bad_gradients(module: nn.Module) -> str:
    """What is wrong with the gradients of a module's parameters."""
    known = [(n, p.grad) for n, p in own_parameters(module).items() if p.grad is not None]
    bad = [name for name, gradient in known if _bad(gradient)]
    if bad:
        return f"the gradient of {', '.join(bad[:3])} is not finite"
    largest = max(known, key=lambda pair: float(pair[1].abs().max()), default=("", None))[0]
    return f"the norm of the gradient overflows (its largest entry is that of {largest})"


def _innermost(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def _allowed(label: str, value: Tensor) -> Tensor:
    """A parameter without what is in order: a logit of minus infinity is a probability of 0."""
    return value[value != -torch.inf] if label == "logits" else value


def _bad(value: Any) -> bool:
    return isinstance(value, Tensor) and not bool(torch.isfinite(value).all())


def _range(value: Tensor) -> str:
    finite = value[torch.isfinite(value)]
    missing = value.numel() - finite.numel()
    text = f"{finite.min():.3g} to {finite.max():.3g}" if finite.numel() else "none finite"
    return text + (f", {missing} of {value.numel()} not finite" if missing else "")
