"""A pair's densities at given latents, in unconstrained coordinates: chains x datapoints.

HMC, Metropolis, annealing, quadrature and the gaps evaluate log p(x, z), log p(z) and log q(z | x)
here and nowhere else.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine import Trace
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import Transform
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae.check.behaviour import coordinates, is_real, same_support
from ppvae.check.programs import require_runs
from ppvae.check.sites import describe, latent_support
from ppvae.diagnostics.rows import (
    check_data,
    check_pair_and_data,
    check_rows,
    naming_positions,
    rows_per_piece,
    take,
)
from ppvae.enumeration import sum_out, total
from ppvae.global_latents import require_of_rows
from ppvae.latents import check_latents
from ppvae.pairs import (
    DATA_PLATE,
    PARTICLE_PLATE,
    Enumerate,
    Site,
    evaluation_mode,
    is_discrete,
    is_enumerated,
    kind,
    own_path,
    replay,
    sample_sites,
    structure,
    trace,
    unconditioned,
    unnoticed,
)
from ppvae.terms import (
    Letters,
    NoInverse,
    Term,
    distribution_mask,
    log_density,
    masked,
    term,
    unmasked,
)
from ppvae.weights import not_densities, require_densities, require_whole


@dataclass(frozen=True)
class Layout:
    """Where a latent lies in the unconstrained vector of a datapoint.

    Attributes:
        plates: sizes of the plate dims right of the chains, 1 where the site is in no plate.
        data_dim: which of them is the data plate, a negative batch dim.
        inner: sizes of the plates inside a datapoint that the site is in.
        unconstrained: its event shape in unconstrained coordinates.
        size: how many coordinates it takes per datapoint.
    """

    plates: tuple[int, ...]
    data_dim: int
    inner: tuple[int, ...]
    unconstrained: tuple[int, ...]
    size: int

    def pack(self, values: Tensor) -> Tensor:
        """``(C, *plates, *event)`` to ``(C, N, size)``."""
        position = len(self.plates) + 1 + self.data_dim
        return values.movedim(position, 1).flatten(2) if values.dim() > 2 else values.unsqueeze(-1)

    def unpack(self, u: Tensor) -> Tensor:
        """``(C, N, size)`` to ``(C, *plates, *event)``."""
        position = len(self.plates) + self.data_dim
        inner = self.plates[:position] + self.plates[position + 1 :]
        values = u.reshape(*u.shape[:2], *inner, *self.unconstrained)
        return values.movedim(1, position + 1)


class Joint:
    r"""log p(x_n, z) of each datapoint as a function of unconstrained latents u.

    .. math:: \ell(u) = \log p(x, T(u)) + \log |\det T'(u)|

    T maps onto the supports of the model's latents (``biject_to``), site by site as the model is
    run, so a support may depend on other latents. Latents that are marked
    ``infer={"enumerate": "parallel"}``, in the model or in the guide, are summed out. Inner plates
    are part of a datapoint's u. Programs run in evaluation mode.

    Args:
        model, guide: Pyro programs; the guide says how deep plates nest, and gives draws.
        *args: data, as both are called.

    Attributes:
        layouts: :class:`Layout` of each latent, in the order of the model.
        dim: D, the number of unconstrained coordinates per datapoint.
        num_datapoints: N.
        dtype, device: of u.

    Raises:
        ValueError: a latent is discrete and not enumerated, or lies outside the data plate; the
            pair does not fit; the data are empty or not finite.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         rate = pyro.sample("rate", dist.Gamma(2., 1.))
        ...         pyro.sample("x", dist.Poisson(rate), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("rate", dist.Gamma(2. + x, 2.))  # the exact posterior
        >>> joint = Joint(model, guide, torch.tensor([1., 3.]))
        >>> u = torch.zeros(5, 2, 1)  # five chains; rate = exp(u) = 1
        >>> value, gradient = joint.value_and_grad(u)
        >>> value[0]  # log p(x, rate) + log |d rate / d u|
        tensor([-2.0000, -3.7918])
        >>> gradient[0].T
        tensor([[1., 3.]])
    """

    def __init__(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any) -> None:
        check_rows(model, args)
        self.model, self.guide, self.args = model, guide, args
        self._all_args = args
        try:
            self._look()
        except (ValueError, RuntimeError, TypeError, AttributeError, IndexError):
            check_data(model, args)  # NaN that no mask hides is the reason, if there is any
            require_runs(args, model=model, guide=guide)  # or a program by itself
            raise
        if self.auxiliary:  # there are no log-weights, and the guide gives draws only
            check_data(model, args)
        else:
            check_pair_and_data(model, guide, args, estimates=True)  # of the guide

    def _look(self) -> None:
        """Find the latents and where they lie, for these rows."""
        model, guide, args = self.model, self.guide, self.args
        with own_path(), unnoticed(model, guide):
            self._structure = structure(model, guide, args, {})
            with self._chains(2):
                drawn = trace(guide, args, {})
                scored = replay(model, drawn, args, {})
        require_whole({"model": scored, "guide": drawn}, args, {})
        require_densities(scored)
        self._no_density = [
            name for why in ("estimated", "unnormalised") for name in not_densities(why, drawn)
        ]
        sites, guide_sites = sample_sites(scored), sample_sites(drawn)
        check_latents(sites, guide_sites)
        self._enumerated = {
            name for name, site in {**guide_sites, **sites}.items() if is_enumerated(site)
        }
        self.auxiliary = sorted(guide_sites.keys() - sites.keys())
        self.observed = frozenset(name for name, site in sites.items() if site["is_observed"])
        self.layouts: dict[str, Layout] = {}
        for name, site in sites.items():
            if not site["is_observed"] and name not in self._enumerated:
                self.layouts[name] = _layout(site, self._leftmost)
        if not self.layouts:
            raise ValueError("the model has no continuous latent, so there is nothing to sample")
        self._masked = any(map(_hides, sites.values()))
        hidden = [] if self.auxiliary else [n for n in self.layouts if _hides(guide_sites[n])]
        self._hidden = sorted(hidden)
        example = sites[next(iter(self.layouts))]["value"]
        self.dtype, self.device = example.dtype, example.device
        self.dim = sum(layout.size for layout in self.layouts.values())
        first = next(iter(self.layouts.values()))
        self.num_datapoints = first.plates[first.data_dim]
        self._same_support = all(
            same_support(sites[name]["fn"], guide_sites[name]["fn"]) for name in self.layouts
        )

    def rows(self, index: Tensor | slice) -> Joint:
        """The same pair on some datapoints."""
        part = copy.copy(self)
        part.args = take(self.args, index)
        part._look()
        return part

    def blocks(self, num_chains: int, max_rows: int) -> Iterator[tuple[slice, Joint]]:
        """Slices of datapoints with the pair on each, as large as ``max_rows`` allows."""
        size = rows_per_piece(num_chains, max_rows)
        if size >= self.num_datapoints:
            yield slice(None), self
            return
        for begin in range(0, self.num_datapoints, size):
            part = slice(begin, begin + size)
            yield part, self.rows(part)

    # -- densities -------------------------------------------------------------------------------
    def __call__(self, u: Tensor) -> Tensor:
        """log p(x, u), ``(C, N, D)`` to ``(C, N)``, in nats."""
        return self._sum(self.terms(u).values(), u)

    def prior_and_joint(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(u), unmasked, and log p(x, u), each ``(C, N)``."""
        terms = self.terms(u)
        latents = terms
        if self._masked or self._hidden:
            latents = self._terms(self.model, u, masks=False)
        prior = self._sum([term for name, term in latents.items() if name not in self.observed], u)
        return prior, self._sum(terms.values(), u)

    def log_q(self, u: Tensor) -> Tensor:
        """log q(u | x) of the guide, unmasked, ``(C, N)``.

        Raises:
            ValueError: the guide cannot be evaluated at given latents: a flow without inverse,
                auxiliary latents, or another support than the model's.
        """
        if self.auxiliary:
            raise _no_density(f"its auxiliary latents {self.auxiliary} would be integrated out")
        for site in self._no_density:
            raise _no_density(f"that of site {site!r} is an estimate, or not normalised")
        if not self._same_support:
            raise _no_density("its support is not the model's")
        try:
            return self._sum(self._terms(self.guide, u, masks=False).values(), u)
        except NoInverse as error:
            raise _no_density(str(error)) from error

    def value_and_grad(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x, u) ``(C, N)`` and its gradient ``(C, N, D)``."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            value = self(u)
            (gradient,) = torch.autograd.grad(value.sum(), u)
        return value.detach(), gradient

    def terms(self, u: Tensor) -> dict[str, Term]:
        """The model's terms by site, each broadcastable to ``(..., C, N)``.

        What a mask hides in the guide has the guide's own density, as in a log-weight: one more
        term.
        """
        terms = self._terms(self.model, u)
        if self._hidden:
            shown = self._sum(self._terms(self.guide, u).values(), u)
            terms[f"{', '.join(self._hidden)} where masked"] = Term(self.log_q(u) - shown)
        return terms

    # -- draws and coordinates -------------------------------------------------------------------
    @torch.no_grad()
    def draw_q(self, chains: int) -> Tensor:
        """Independent draws of the guide, ``(C, N, D)``."""
        with self._running(), self._chains(chains):
            drawn = trace(self.guide, self.args, {})
            return self._pack(replay(self.model, drawn, self.args, {}))

    @torch.no_grad()
    def draw_prior(self, chains: int) -> Tensor:
        """Independent draws of the prior, ``(C, N, D)``."""
        with self._running(), self._chains(chains):
            return self._pack(trace(unconditioned(self.model), self.args, {}))

    def coordinates(self, drawn: Trace) -> Tensor:
        """u of the latents in a trace of the model that has no plate of chains, ``(N, D)``."""
        return self._pack(drawn)[0]

    @torch.no_grad()
    def constrain(self, u: Tensor) -> dict[str, Tensor]:
        """The latents at u by site, each ``(C, N, ...)``: inner plates, then event dims."""
        with self._running(), self._chains(len(u)), _Given(self._unpack(u)):
            sites = sample_sites(trace(self.model, self.args, {}))
        values = {}
        for name, layout in self.layouts.items():
            value = _value(sites[name], self._leftmost)
            value = value.movedim(len(layout.plates) + 1 + layout.data_dim, 1)
            shape = (*value.shape[:2], *layout.inner, *sites[name]["fn"].event_shape)
            values[name] = value.reshape(shape)
        return values

    def require_finite(self, u: Tensor, start: str) -> None:
        """Raise ``ValueError`` unless log p(x, u) is finite: which datapoint, which site."""
        with torch.no_grad():
            terms = self.terms(u)
        if self._sum(terms.values(), u).isfinite().all():
            return
        for name, (values, *_) in terms.items():
            finite = values.isfinite()
            bad = ~finite.expand(*finite.shape[:-2], *u.shape[:2]).flatten(0, -2).all(0)
            if bad.any():
                rows = bad.nonzero().flatten().tolist()
                other = "guide" if start == "prior" else "prior"
                raise ValueError(
                    f"site {name!r} is NaN or infinite at draws of the {start} for {len(rows)} of "
                    f"{self.num_datapoints} datapoints, the first is datapoint {rows[0]}; look at "
                    f"the model's output there, or begin at draws of the {other}"
                )

    # -- inside ----------------------------------------------------------------------------------
    @property
    def _leftmost(self) -> int:
        return -1 - self._structure.nesting

    def _chains(self, chains: int) -> Any:
        """The plate of chains, left of all others; for one chain too, so shapes do not vary."""
        return pyro.plate(PARTICLE_PLATE, chains, dim=-1 - self._structure.nesting)

    @contextmanager
    def _running(self) -> Iterator[None]:
        with own_path(), evaluation_mode(self.model, self.guide), pyro.validation_enabled(False):
            with naming_positions(self.model, self.guide, self._all_args):
                yield

    def _pack(self, drawn: Trace) -> Tensor:
        sites, parts = sample_sites(drawn), []
        for name, layout in self.layouts.items():
            fn, value = sites[name]["fn"], _value(sites[name], self._leftmost)
            value = value if is_real(latent_support(fn)) else coordinates(fn).inv(value)
            parts.append(layout.pack(value))
        return torch.cat(parts, -1)

    def _unpack(self, u: Tensor) -> dict[str, Tensor]:
        parts = u.split([layout.size for layout in self.layouts.values()], -1)
        return {
            name: layout.unpack(part)
            for (name, layout), part in zip(self.layouts.items(), parts, strict=True)
        }

    def _terms(self, program: Callable[..., Any], u: Tensor, masks: bool = True) -> dict[str, Term]:
        """Log-density of each site at u, Jacobian included; that of latents masked, or not."""
        if self._enumerated:
            marked = poutine.infer_config(program, self._mark)
            program = Enumerate(False, first_available_dim=self._leftmost - 1)(marked)
        with self._running(), _Given(self._unpack(u)) as given, self._chains(len(u)):
            sites = sample_sites(trace(program, self.args, {}))
            letters = Letters()
            return {name: self._term(site, given, letters, masks) for name, site in sites.items()}

    def _mark(self, site: Site) -> dict[str, Any]:
        return {"enumerate": "parallel"} if site["name"] in self._enumerated else {}

    def _term(self, site: Site, given: _Given, letters: Letters, masks: bool) -> Term:
        # a mask does not hide how a latent is summed out
        if site["name"] in self._enumerated or (not masks and not site["is_observed"]):
            site = {**site, "fn": unmasked(site["fn"]), "mask": None}
        values = log_density(site)
        if site["name"] in given.log_det:
            values = values + masked(given.log_det[site["name"]], site["mask"])
        return term(site, self._leftmost, letters=letters, values=values)

    def _sum(self, terms: Iterable[Term], u: Tensor) -> Tensor:
        return total(sum_out(terms)).expand(u.shape[:2])


def traced(function: Callable[..., Any], *example: Tensor) -> Callable[..., Any]:
    """A function of tensors of these shapes as one graph, without Pyro's handlers in each call.

    Several times faster where tensors are small. The function itself is returned if it cannot be
    traced, or if the graph does not give the same at another point.
    """
    example = tuple(tensor.contiguous() for tensor in example)
    try:
        graph = make_fx(lambda *tensors: function(*tensors))(*example)  # methods, too
        other = [0.9 * tensor.flip(0) + 0.05 for tensor in example]
        pairs = zip(graph(*other), function(*other), strict=True)
        same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-4, equal_nan=True) for a, b in pairs)
    except Exception:  # whatever is really wrong is raised by the function itself, when called
        return function
    if not same:
        return function

    @torch.no_grad()  # the gradient is in the graph, so nothing else has to be followed
    def call(*tensors: Tensor) -> Any:
        return graph(*(tensor.contiguous() for tensor in tensors))  # strides are in it as well

    return call


def _hides(site: Site) -> bool:
    """Whether a latent's term is masked."""
    masks = site["mask"], distribution_mask(site["fn"])
    return not site["is_observed"] and any(mask is not None for mask in masks)


def _no_density(why: str) -> ValueError:
    return ValueError(f'the guide has no density at given latents: {why}; use start="prior"')


class _Given(Messenger):
    """Sets each latent to its value at given unconstrained coordinates."""

    def __init__(self, unconstrained: dict[str, Tensor]) -> None:
        super().__init__()
        self.unconstrained = unconstrained
        self.log_det: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: Any) -> None:
        u = self.unconstrained.get(msg["name"])
        if u is None or msg["is_observed"]:
            return
        if is_real(latent_support(msg["fn"])):
            msg["value"] = u
        else:
            transform = coordinates(msg["fn"])
            msg["value"] = transform(u)
            log_det = transform.log_abs_det_jacobian(u, msg["value"])
            extra = transform.codomain.event_dim - msg["fn"].event_dim
            if extra < 0:  # the transform acts on less than an event
                log_det = log_det.flatten(extra).sum(-1)
            self.log_det[msg["name"]] = log_det
        msg["done"] = True


def _value(site: Site, leftmost: int) -> Tensor:
    """A site's value, expanded to all its plates: ``(C, *plates, *event)``."""
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"]}
    batch = [sizes.get(dim, 1) for dim in range(leftmost, 0)]
    value: Tensor = site["value"].expand(*batch, *site["fn"].event_shape)
    return value


def require_coordinates(name: str, fn: Any) -> Transform:
    """:func:`~ppvae.check.behaviour.coordinates`; ``ValueError`` if a latent has none."""
    try:
        return coordinates(fn)
    except NotImplementedError as error:
        support = latent_support(fn)
        where = "unknown support" if support is None else describe(support)
        raise ValueError(
            f"latent {name!r} ({kind(fn)}, {where}) has no unconstrained coordinates to sample or "
            "integrate in; use diagnostics.log_evidence, or draw real numbers in model and guide "
            "and map them onto the support there"
        ) from error


def _layout(site: Site, leftmost: int) -> Layout:
    """The layout of a latent of a trace with a plate of chains."""
    name, fn = site["name"], site["fn"]
    if is_discrete(fn):
        raise ValueError(
            f"latent {name!r} is discrete ({type(fn).__name__}), so it has no gradient; sum it "
            'out: mark it infer={"enumerate": "parallel"} in the model'
        )
    frames = [frame for frame in site["cond_indep_stack"] if frame.name == DATA_PLATE]
    require_of_rows({name: site}, "there is no posterior per datapoint")
    value, data_dim = _value(site, leftmost), frames[0].dim
    event = tuple(require_coordinates(name, fn).inv(value).shape[-leftmost:])
    plates = tuple(value.shape[1:-leftmost])
    inside = {f.dim for f in site["cond_indep_stack"]} - {data_dim}
    inner = tuple(size for i, size in enumerate(plates) if i - len(plates) in inside)
    return Layout(plates, data_dim, inner, event, math.prod(inner + event))
