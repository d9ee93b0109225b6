"""Small random programs, and their log-weights and ELBO by enumeration in plain Python.

A program has T discrete latents c_0 -> c_1 -> ..., data x_t | c_t, and perhaps a continuous latent
z, before them (x_t depends on it too) or after (z | c_last, with data of its own). What varies is
how each latent is treated, where masks come from, plates, particles, and what the first call saw.
Nothing here uses ppvae but to draw: every density is a number of one row and one particle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import ppvae

C, P, N = 2, 2, 3


@dataclass(frozen=True)
class Spec:
    """One program and one way to call it.

    Attributes:
        how: of each discrete latent: "drawn" in the guide, summed out in the "model", averaged in
            the "guide".
        markov: the loop over them is a ``pyro.markov`` loop.
        continuous: None, "before" or "after"; guide's z depends on the last guide latent then, if
            ``follows``.
        plate: None, "all" (everything but the data plate's own lies in an inner plate) or "data"
            (only the x_t do), or "subsampled" (the x_t of half of it).
        mask: None, "site", "distribution", or "observed" (some rows of the first latent are given).
        masked: what a mask hides: "latents", "data" or "both".
        nans: hidden data are NaN.
        expand: enumerated values are expanded to all plates.
        labels_first: a call with all latents given comes before.
        broken: None, or what is wrong with the mean of the data: it sees other "rows", their
            "number", what is "left" of the plates (particles, enumerated values, or else rows), or
            has a dim of its own ("dim").
    """

    how: tuple[str, ...]
    markov: bool = False
    continuous: str | None = None
    follows: bool = False
    plate: str | None = None
    mask: str | None = None
    masked: str = "both"
    nans: bool = False
    expand: bool = False
    labels_first: bool = False
    particles: int = 1
    seed: int = 0
    broken: str | None = None

    @property
    def steps(self) -> int:
        return len(self.how)

    @property
    def latents_in_plate(self) -> bool:
        return self.plate == "all"


class Numbers(nn.Module):
    """Every parameter of model and guide, float64."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(spec.seed)

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64))

        self.start, self.step = new(C), new(C, C)
        self.emit, self.weight = new(C), new()
        self.centre, self.spread = new(C), new()
        self.q_start, self.q_step = new(C), new(C, C)
        self.q_centre, self.q_spread, self.q_slope = new(C), new(), new()


class Case:
    """A spec with its parameters, data, masks and programs."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.numbers = spec, Numbers(spec)
        draw = torch.Generator().manual_seed(spec.seed + 1)
        shape = (P, N) if spec.plate else (N,)
        latent_shape = (P, N) if spec.latents_in_plate else (N,)
        self.x = torch.randn(spec.steps, *shape, generator=draw, dtype=torch.float64)
        self.v = torch.randn(latent_shape, generator=draw, dtype=torch.float64)
        self.y = torch.randint(C, (spec.steps, *latent_shape), generator=draw)
        self.rows = torch.tensor([True, False, True])  # what a mask shows
        if spec.nans and spec.mask in ("site", "distribution") and spec.masked != "latents":
            self.x[..., ~self.rows] = math.nan
            self.v[..., ~self.rows] = math.nan

    # -- the programs ----------------------------------------------------------------------------
    def model(self, *args: Tensor) -> None:
        if self._split(0) and self.spec.how[0] == "model":  # obs_mask forgets ``infer``
            mark = {"c0_unobserved": self._infer()}
            program = pyro.poutine.infer_config(self._model, lambda s: mark.get(s["name"], {}))
            program(*args)
        else:
            self._model(*args)

    def _model(self, x: Tensor, v: Tensor, y: Tensor | None = None) -> None:
        spec, n = self.spec, self.numbers
        around, of_data = (
            self._plate(spec.latents_in_plate),
            self._plate(spec.plate in ("data", "subsampled")),
        )
        with pyro.plate("data", x.shape[-1], dim=-1), around:
            z = None
            if spec.continuous == "before":
                z = self._sample("z", dist.Normal(n.spread, 1.0), "latents")
            c = None
            for t in pyro.markov(range(spec.steps)) if spec.markov else range(spec.steps):
                logits = n.start if c is None else n.step[c]
                c = self._discrete(t, dist.Categorical(logits=logits), y)
                loc = n.emit[c] if z is None else n.emit[c] + n.weight * z
                loc = self._broken(loc, x[t])
                with of_data as part:
                    obs = x[t] if spec.plate != "subsampled" else x[t][part]
                    self._sample(f"x{t}", dist.Normal(loc, 1.0), "data", obs=obs)
            if spec.continuous == "after":
                z = self._sample("z", dist.Normal(n.centre[c], 1.0), "latents")
                self._sample("v", dist.Normal(z, 1.0), "data", obs=v)

    def guide(self, x: Tensor, v: Tensor, y: Tensor | None = None) -> None:
        spec, n = self.spec, self.numbers
        with pyro.plate("data", x.shape[-1], dim=-1), self._plate(spec.latents_in_plate):
            c = None
            for t in pyro.markov(range(spec.steps)) if spec.markov else range(spec.steps):
                if self._given(t, y) or spec.how[t] == "model":
                    continue
                logits = n.q_start if c is None else n.q_step[c]
                name = self._name(t, y)
                infer = self._infer() if spec.how[t] == "guide" else {}
                c = self._sample(
                    name,
                    dist.Categorical(logits=logits),
                    "latents",
                    infer,
                    hidden=self._hidden(t, y),
                )
            if spec.continuous:
                loc = n.q_centre[c] if spec.follows and c is not None else n.q_centre[0]
                fn = dist.Normal(loc + n.q_slope * torch.nan_to_num(v), n.q_spread.exp())
                self._sample("z", fn, "latents")

    def _broken(self, loc: Tensor, x: Tensor) -> Tensor:
        """The mean of the data as it is, or wrong as the spec asks for."""
        plates = 2 if self.spec.plate else 1
        if self.spec.broken == "dim":
            return loc + loc.new_zeros(2, *[1] * max(loc.dim(), plates))
        if self.spec.broken == "number":
            return loc + 1 / x.shape[-1]
        if self.spec.broken == "left" and loc.dim() > plates:
            return loc + loc.mean(0, keepdim=True)
        return loc + torch.nan_to_num(x).mean() if self.spec.broken else loc

    def by_row(self, labels: bool) -> tuple[Any, ...]:
        """Model, guide and their arguments, with datapoints in the first dim of each."""

        def program(inside: Callable[..., None]) -> Callable[..., None]:
            def run(x: Tensor, v: Tensor, y: Tensor, rows: Tensor) -> None:
                x, v, y = (tensor.movedim(0, -1) for tensor in (x, v, y))
                kept = self.y, self.rows
                self.y, self.rows = y, rows
                try:
                    inside(x, v, y) if labels else inside(x, v)
                finally:
                    self.y, self.rows = kept

            return run

        data = [tensor.movedim(-1, 0) for tensor in (self.x, self.v, self.y)]
        return program(self.model), program(self.guide), *data, self.rows

    def args(self, labels: bool) -> tuple[Tensor, ...]:
        return (self.x, self.v, self.y) if labels else (self.x, self.v)

    def _plate(self, wanted: bool) -> Any:
        size = 1 if self.spec.plate == "subsampled" else None
        return pyro.plate("inner", P, subsample_size=size, dim=-2) if wanted else nullcontext()

    def _infer(self) -> dict[str, Any]:
        return {"enumerate": "parallel"} | ({"expand": True} if self.spec.expand else {})

    def _given(self, t: int, y: Tensor | None) -> bool:
        return y is not None and self.spec.mask != "observed"

    def _name(self, t: int, y: Tensor | None) -> str:
        return f"c{t}_unobserved" if self._split(t) else f"c{t}"

    def _split(self, t: int) -> bool:
        return self.spec.mask == "observed" and t == 0

    def _hidden(self, t: int, y: Tensor | None) -> Tensor | None:
        return ~self.rows if self._split(t) else None

    def _discrete(self, t: int, fn: Any, y: Tensor | None) -> Tensor:
        infer = self._infer() if self.spec.how[t] == "model" else {}
        if self._split(t):
            rows = self.rows.expand(self.y[t].shape)
            value: Tensor = pyro.sample(f"c{t}", fn, obs=self.y[t], obs_mask=rows, infer=infer)
            return value
        obs = y[t] if y is not None and self._given(t, y) else None
        return self._sample(f"c{t}", fn, "latents", infer, obs)

    def _sample(
        self,
        name: str,
        fn: Any,
        kind: str,
        infer: dict[str, Any] | None = None,
        obs: Tensor | None = None,
        hidden: Tensor | None = None,
    ) -> Tensor:
        with ExitStack() as stack:
            if hidden is not None:
                stack.enter_context(pyro.poutine.mask(mask=hidden))
            if self.spec.mask == "site" and self.spec.masked in (kind, "both"):
                stack.enter_context(pyro.poutine.mask(mask=self.rows))
            if self.spec.mask == "distribution" and self.spec.masked in (kind, "both"):
                fn = fn.mask(self.rows)
            value: Tensor = pyro.sample(name, fn, obs=obs, infer=infer or {})
        return value

    # -- by hand ---------------------------------------------------------------------------------
    def by_hand(self, weights: Any, labels: bool) -> tuple[Tensor, Tensor]:
        """Log-weights and ELBO terms ``(K, N)`` at the draws of some log-weights.

        Of a subsampled plate the log-weights have what is there, and the ELBO twice that.
        """
        drawn = weights.guide_trace
        self.part = weights.model_trace.nodes["inner"]["value"] if self.spec.plate else None
        pairs = [
            [self._row(drawn, k, n, labels) for n in range(N)] for k in range(self.spec.particles)
        ]
        return tuple(  # type: ignore[return-value]
            torch.stack([torch.stack([cell[i] for cell in row]) for row in pairs]) for i in (0, 1)
        )

    def _row(self, drawn: Any, k: int, n: int, labels: bool) -> tuple[Tensor, Tensor]:
        """The log-weight and the ELBO of one particle and row."""
        spec, num = self.spec, self.numbers
        places = range(P) if spec.latents_in_plate else range(1)
        visible = bool(self.rows[n])
        hides = spec.mask in ("site", "distribution") and not visible
        no_latents = hides and spec.masked in ("latents", "both")
        no_data = hides and spec.masked in ("data", "both")
        labelled = labels and spec.mask != "observed"

        def node(name: str) -> Any:
            return drawn.nodes[name]

        def name_of(t: int) -> str:
            return f"c{t}_unobserved" if self._split(t) else f"c{t}"

        enumerated = [
            (t, p)
            for t in range(spec.steps)
            for p in places
            if not labelled and spec.how[t] != "drawn"
        ]
        of_guide = [(t, p) for t, p in enumerated if spec.how[t] == "guide"]
        of_model = [(t, p) for t, p in enumerated if spec.how[t] == "model"]

        def at(value: Tensor, p: int, classes: dict) -> Tensor:
            """The entry of a drawn value."""
            nesting = 2 if spec.plate else 1
            index = {-1: n, -1 - nesting: k if spec.particles > 1 else 0}
            if spec.latents_in_plate:
                index[-2] = p
            for t in range(spec.steps):
                if spec.how[t] == "guide" and not labelled:
                    index[node(name_of(t))["infer"]["_enumerate_dim"]] = classes[t, p]
            for dim in range(-value.dim(), 0):
                i = index.get(dim, 0) if value.shape[dim] > 1 else 0
                value = value.select(dim, i).unsqueeze(dim)
            return value.reshape(())

        def latent(t: int, p: int, classes: dict) -> int:
            """The class that the latent has for the guide: as drawn or enumerated."""
            if labelled:
                return int(self._label(t, p, n))
            if (t, p) in classes:
                return int(classes[t, p])
            return int(at(node(name_of(t))["value"], p, classes))

        def used(t: int, p: int, classes: dict) -> int:
            """The class that the model goes on with."""
            if self._split(t) and visible:
                return int(self._label(t, p, n))
            return latent(t, p, classes)

        def log_cat(logits: Tensor, c: int) -> Tensor:
            return logits.log_softmax(-1)[c]

        def prior(t: int, p: int, classes: dict) -> Tensor:
            return num.start if t == 0 else num.step[used(t - 1, p, classes)]

        def q_logits(t: int, p: int, classes: dict) -> Tensor:
            before = [s for s in range(t) if spec.how[s] != "model"]
            return num.q_start if not before else num.q_step[latent(before[-1], p, classes)]

        zero = num.start.new_zeros(())

        def log_p(classes: dict, summed: set[tuple[int, int]], scale: float = 1.0) -> Tensor:
            """All terms of the model; the latents in ``summed`` have unmasked factors."""
            total = zero
            for p in places:
                z = at(node("z")["value"], p, classes) if spec.continuous else None
                if z is not None and not no_latents:
                    loc = num.spread
                    if spec.continuous == "after":
                        loc = num.centre[used(spec.steps - 1, p, classes)]
                    total = total + dist.Normal(loc, 1.0).log_prob(z)
                if z is not None and spec.continuous == "after" and not no_data:
                    v = self.v[p, n] if spec.latents_in_plate else self.v[n]
                    total = total + dist.Normal(z, 1.0).log_prob(v)
                for t in range(spec.steps):
                    if self._split(t):
                        if visible:
                            total = total + log_cat(prior(t, p, classes), self._label(t, p, n))
                        if not visible or (t, p) in summed:
                            total = total + log_cat(prior(t, p, classes), latent(t, p, classes))
                    elif not no_latents or (t, p) in summed:
                        total = total + log_cat(prior(t, p, classes), latent(t, p, classes))
                    loc = num.emit[used(t, p, classes)]
                    loc = loc + num.weight * z if spec.continuous == "before" else loc
                    if not no_data:
                        for x in self._data(t, p, n):
                            total = total + scale * dist.Normal(loc, 1.0).log_prob(x)
            return total

        def log_q(classes: dict, which: Callable[[int], bool], masked: bool) -> Tensor:
            total = zero
            for p in places:
                for t in range(spec.steps):
                    seen = not (no_latents or (self._split(t) and visible)) or not masked
                    if not labelled and spec.how[t] != "model" and which(t) and seen:
                        total = total + log_cat(q_logits(t, p, classes), latent(t, p, classes))
            return total

        def log_q_z(classes: dict) -> Tensor:
            total = zero
            if not spec.continuous or no_latents:
                return total
            before = [t for t in range(spec.steps) if spec.how[t] != "model"]
            for p in places:
                loc = num.q_centre[0]
                if spec.follows and before and not labelled:
                    loc = num.q_centre[latent(before[-1], p, classes)]
                v = torch.nan_to_num(self.v[p, n] if spec.latents_in_plate else self.v[n])
                fn = dist.Normal(loc + num.q_slope * v, num.q_spread.exp())
                total = total + fn.log_prob(at(node("z")["value"], p, classes))
            return total

        def drawn_latent(t: int) -> bool:
            return spec.how[t] == "drawn"

        # the log-weight: everything that is enumerated is summed
        weight = torch.stack(
            [
                log_p(c, set(enumerated)) - log_q(c, drawn_latent, True) - log_q_z(c)
                for c in _assignments(enumerated)
            ]
        ).logsumexp(0)
        # the ELBO: a mean over the guide's, a sum inside the logarithm over the model's
        bound, factor = zero, P if spec.plate == "subsampled" else 1
        for g in _assignments(of_guide):
            q = log_q(g, lambda t: spec.how[t] == "guide", False).exp()
            inner = torch.stack(
                [log_p(g | m, set(of_model), factor) for m in _assignments(of_model)]
            )
            each = inner.logsumexp(0) - log_q(g, lambda t: True, True) - log_q_z(g)
            bound = bound + q * each
        return weight, bound

    def _label(self, t: int, p: int, n: int) -> int:
        return int(self.y[t, p, n] if self.spec.latents_in_plate else self.y[t, n])

    def _data(self, t: int, p: int, n: int) -> Iterator[Tensor]:
        if self.spec.plate is None:
            yield self.x[t, n]
        elif self.spec.latents_in_plate:
            yield self.x[t, p, n]
        else:
            yield from self.x[t, self.part, n]


def _assignments(latents: list[tuple[int, int]]) -> Iterator[dict[tuple[int, int], int]]:
    for classes in itertools.product(range(C), repeat=len(latents)):
        yield dict(zip(latents, classes, strict=True))


def check(spec: Spec) -> None:
    """Compare a program's log-weights, ELBO and their gradients with those by hand."""
    case = Case(spec)
    parameters = list(case.numbers.parameters())
    if spec.labels_first:
        _compare(case, True, parameters)
    _compare(case, False, parameters)


def _compare(case: Case, labels: bool, parameters: list[nn.Parameter]) -> None:
    spec, args = case.spec, case.args(labels)
    weights = ppvae.log_weights(case.model, case.guide, *args, num_particles=spec.particles)
    estimator = ppvae.elbo.ELBO(spec.particles)
    labelled = labels and spec.mask != "observed"
    found = [weights.log_w]
    if spec.plate == "subsampled":
        with pytest.raises(ValueError, match="plate 'inner' takes 1 of 2 by itself"):
            estimator.evaluate(case.model, case.guide, *args)
    if spec.plate == "subsampled" and "model" in spec.how and not labelled:
        with pytest.raises(ValueError, match="a scale inside that sum has no meaning"):
            estimator.effective(weights, ppvae.elbo.State())
    else:
        found.append(estimator.effective(weights, ppvae.elbo.State()))
    for ours, hand in zip(found, case.by_hand(weights, labels), strict=False):
        torch.testing.assert_close(ours, hand, rtol=1e-9, atol=1e-9)
        slopes = [
            torch.autograd.grad(
                v.sum(), parameters, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            for v in (ours, hand)
        ]
        torch.testing.assert_close(*slopes, rtol=1e-7, atol=1e-8)
