"""Where a loss or gradient that is not finite comes from."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.pairs import Site
from ppvae.weights import LogWeights


class NonFiniteError(FloatingPointError):
    """A loss or gradient is NaN or infinite; the parameters are still those before the step."""


def blame(weights: LogWeights) -> str | None:
    """The first site, guide before model, whose draws, parameters or log-density are not finite.

    Example:
        >>> import pyro, pyro.distributions as dist, torch, ppvae
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0., 1.))
        ...         pyro.sample("x", dist.Normal(z, x.square()), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 1.))
        >>> with pyro.validation_enabled(False):
        ...     weights = ppvae.log_weights(model, guide, torch.tensor([1., 0.]))
        >>> print(ppvae.nonfinite.blame(weights))
        site 'x' of the model: its log-density is not finite for 1 of 2 datapoints, the first is row
        1; Normal(loc: ..., scale: 0 to 1)
    """
    programs = (
        ("guide", weights.guide_trace, weights.log_q),
        ("model", weights.model_trace, weights.log_p),
    )
    for role, trace, terms in programs:
        for name, term in terms.items():
            site = trace.nodes[name]
            wrong = [label for label, value in parameters(site) if _bad(value)]
            if _bad(site["value"]):
                wrong.insert(0, "its value")
            bad = (
                ~torch.isfinite(term).flatten(0, -2).all(0) if term.dim() > 1 else ~term.isfinite()
            )
            if not wrong and not bad.any():
                continue
            what = (
                f"{' and '.join(wrong)} not finite"
                if wrong
                else (
                    f"its log-density is not finite for {int(bad.sum())} of {len(bad)} datapoints, "
                    f"the first is row {int(bad.nonzero()[0])}"
                )
            )
            return f"site {name!r} of the {role}: {what}; {describe(site)}"
    return None


def parameters(site: Site) -> Iterator[tuple[str, Tensor]]:
    """The tensors that a site's distribution was made of, by name."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    for name in getattr(fn, "arg_constraints", {}):
        if name in vars(fn) and isinstance(vars(fn)[name], Tensor):  # not what is derived lazily
            yield name, vars(fn)[name]


def describe(site: Site) -> str:
    """A site's distribution with the range of each of its parameters."""
    fn = site["fn"]
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    ranges = ", ".join(f"{name}: {_range(value)}" for name, value in parameters(site))
    return f"{type(fn).__name__}({ranges})"


def bad_gradients(module: nn.Module) -> list[str]:
    """The parameters of a module whose gradient is not finite."""
    return [n for n, p in module.named_parameters() if p.grad is not None and _bad(p.grad)]


def _bad(value: Any) -> bool:
    return isinstance(value, Tensor) and not bool(torch.isfinite(value).all())


def _range(value: Tensor) -> str:
    finite = value[torch.isfinite(value)]
    missing = value.numel() - finite.numel()
    text = f"{finite.min():.3g} to {finite.max():.3g}" if finite.numel() else "none finite"
    return text + (f", {missing} of {value.numel()} not finite" if missing else "")
