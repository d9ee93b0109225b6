"""KL(q || p) of a latent: in closed form, under any masks, and unit by unit."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from pyro.distributions import Delta
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Independent, kl_divergence

from ppvae.pairs import Site, law
from ppvae.terms import masked, sum_plates, sum_whole
from ppvae.weights import LogWeights


def closed_form_kl(kl: str, weights: LogWeights, of_globals: bool = False) -> dict[str, Tensor]:
    """KL(q || p) of the latents that an ``ELBO(kl=kl)`` takes in closed form.

    Args:
        kl: of the ELBO.
        weights: log-weights.
        of_globals: of the global latents, instead of those of rows.

    Returns:
        By latent, ``(K or 1, N)`` each, or 0-d, in nats.

    Raises:
        ValueError: with ``kl="analytic"``, for a latent that has none or where it is not valid.
    """
    if kl == "sampled":
        return {}
    valid, closed = weights.kl_valid(), {}
    scaled = {name for _, name in weights.site_scales}
    for name in weights.global_q if of_globals else weights.q:
        q, p = weights.guide_trace.nodes[name], weights.model_trace.nodes.get(name)
        if p is None or name in scaled or (weights.enumerated and not of_globals):
            reason = "it is auxiliary, weighed by a poutine.scale, or beside an enumerated latent"
        elif name not in valid:
            reason = (
                "in the model it depends on a latent that the guide draws from it, so the closed "
                "form would not be its expected log q - log p"
            )
        else:
            try:
                divergence = _masked_divergence(q["fn"], p["fn"], q["mask"], p["mask"])
                if of_globals:
                    closed[name] = sum_whole(q, divergence)
                else:
                    closed[name] = sum_plates(q, divergence, weights.leftmost, weights.joint)
                continue
            except NotImplementedError:
                kinds = f"KL({_kind(q['fn'])} || {_kind(p['fn'])})"
                reason = f"no closed form is known for {kinds}, or for its masks"
        if kl == "analytic":
            raise ValueError(
                f'kl="analytic" is not possible for latent {name!r}: {reason}. Use kl="mixed" '
                '(closed form where valid, draws elsewhere) or kl="sampled"'
            )
    return closed


def _entropy(q: Any, p: Any) -> Tensor:
    """H(q), of the batch shape that both have together."""
    entropy: Tensor = q.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape)).entropy()
    return entropy


def _kind(fn: Any) -> str:
    """The name of a distribution inside its ``Independent`` and masks."""
    while hasattr(fn, "base_dist") and type(fn).__name__ not in ("TransformedDistribution",):
        fn = fn.base_dist
    return type(fn).__name__


def _masked_divergence(q: Any, p: Any, q_mask: Any, p_mask: Any) -> Tensor:
    r"""The mean of log q - log p, of the batch shape, each masked by its own masks.

    .. math:: m_p \left(\mathrm{KL}(q \| p) + H(q)\right) - m_q H(q)

    Masks are those of the program and those that the distributions carry. Where they are the same
    ones it is the masked KL; whether others are equal is not asked, since their values may differ
    in the next call of a graph.
    """
    masks = (q_mask, *_masks(q)), (p_mask, *_masks(p))
    if len(masks[0]) == len(masks[1]) and all(map(operator.is_, *masks)):
        return masked(_through_masks(q, p, _divergence), q_mask)
    cross = _through_masks(p, q, lambda p, q: _divergence(q, p) + _entropy(q, p))
    return masked(cross, p_mask) - masked(_through_masks(q, p, _entropy), q_mask)


def _through_masks(fn: Any, other: Any, compute: Callable[[Any, Any], Tensor]) -> Tensor:
    """What is computed of two distributions, masked and summed as the first one says."""
    if isinstance(fn, MaskedDistribution):
        while isinstance(other, MaskedDistribution):
            other = other.base_dist
        return masked(_through_masks(fn.base_dist, other, compute), fn._mask)
    if isinstance(other, MaskedDistribution):
        return _through_masks(fn, other.base_dist, compute)
    if isinstance(fn, Independent) and isinstance(other, Independent):
        n = fn.reinterpreted_batch_ndims
        if n == other.reinterpreted_batch_ndims and n > 0 and _masks(fn) + _masks(other):
            return _through_masks(fn.base_dist, other.base_dist, compute).flatten(-n).sum(-1)
    return compute(fn, other)


def _masks(fn: Any) -> tuple[Any, ...]:
    """The masks that a distribution carries, the outermost first."""
    found: tuple[Any, ...] = ()
    while isinstance(fn, (MaskedDistribution, Independent)):
        if isinstance(fn, MaskedDistribution):
            found = (*found, fn._mask)
        fn = fn.base_dist
    return found


def _divergence(q: Any, p: Any) -> Tensor:
    """KL(q || p) of equal batch shapes: that of Bernoullis does not broadcast in torch."""
    if q.batch_shape != p.batch_shape:
        shape = torch.broadcast_shapes(q.batch_shape, p.batch_shape)
        q, p = q.expand(shape), p.expand(shape)
    kl: Tensor = kl_divergence(q, p)
    if isinstance(law(q), Delta):  # Pyro leaves out the density that a point is given
        kl = kl + _density_of_point(q)
    return kl


def _density_of_point(fn: Any) -> Tensor:
    if isinstance(fn, Independent):
        inside, n = _density_of_point(fn.base_dist), fn.reinterpreted_batch_ndims
        return inside.flatten(-n).sum(-1) if n else inside
    density: Tensor = fn.log_density
    return density


def dimension_rates(weights: LogWeights, name: str, closed: bool) -> Tensor:
    """log q - log p (or KL) of every dimension of a latent, ``(D, K or 1, N)``."""
    sites = weights.guide_trace.nodes.get(name), weights.model_trace.nodes.get(name)
    found = [independent_units(site) for site in sites if site is not None]
    units = [unit for unit in found if unit is not None]
    if len(units) < 2 or weights.enumerated:
        raise ValueError(
            f"FreeBits(per_dimension=True) needs the rate of each dimension of latent {name!r}, so "
            "guide and model must both draw it from a vector or map of independent dimensions "
            "(.to_event(1)); use per_dimension=False"
        )
    (q, q_mask, dims), (p, p_mask, _) = units
    if closed:
        rates = _masked_divergence(q, p, q_mask, p_mask)
        return _by_dimension(weights, sites[0], rates, dims)

    def rate(program: str, site: Site, fn: Any, mask: Any) -> Tensor:
        scale = weights.site_scales.get((program, name), 1.0)
        scale = over_units(scale, dims) if isinstance(scale, Tensor) and scale.dim() else scale
        rates = masked(fn.log_prob(site["value"]), mask) * scale
        return _by_dimension(weights, site, rates, dims)

    return rate("guide", sites[0], q, q_mask) - rate("model", sites[1], p, p_mask)


def independent_units(site: Site) -> tuple[Any, Any, int] | None:
    """The distribution of the units of a vector or map, their mask, and how many dims they are in.

    None: the units depend on each other.
    """
    fn, mask = site["fn"], site["mask"]
    while isinstance(fn, MaskedDistribution):
        mask = fn._mask if mask is None else mask & fn._mask
        fn = fn.base_dist
    dims = len(fn.event_shape)
    if not isinstance(fn, Independent) or not dims or fn.reinterpreted_batch_ndims != dims:
        return None
    return fn.base_dist, over_units(mask, dims) if isinstance(mask, Tensor) else mask, dims


def over_units(values: Tensor, dims: int) -> Tensor:
    """Values of rows, with so many dimensions of size one behind."""
    return values[(..., *[None] * dims)]


def _by_dimension(weights: LogWeights, site: Site, values: Tensor, dims: int) -> Tensor:
    """Values of a vector's or map's units, batch and event shape, as ``(D, K or 1, N)``."""
    values = values.flatten(-dims)
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"]}
    shape = [sizes.get(dim, 1) for dim in range(weights.leftmost, 0)]
    values = values.expand(*shape, values.shape[-1]).movedim(-1, 0)
    return sum_plates(site, values, weights.leftmost, weights.joint)
