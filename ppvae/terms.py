"""The term of a site: its log-density at its value, masked, with one number per datapoint.

Unscaled always: what ``poutine.scale`` or a subsampled plate multiplies a term by is kept apart.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from opt_einsum import get_symbol
from pyro.distributions.torch_distribution import MaskedDistribution
from torch import Tensor
from torch.distributions import Bernoulli, Independent

from ppvae.distributions import NoInverse as NoInverse
from ppvae.distributions.supports import filled
from ppvae.pairs import DATA_PLATE, PARTICLE_PLATE, Site, law

# The letters of (K, N), which a term of an enumerated latent has beside its own.
PARTICLE, DATAPOINT = get_symbol(0), get_symbol(1)


# In Pyro's own densities bytes wrap around, and halves lose digits.
_NARROW = {torch.bool, torch.uint8, torch.int8, torch.int16, torch.float16, torch.bfloat16}


class Letters(dict[Any, str]):
    """A letter for each dim that is not ``(K, N)``: enumerated latents and inner plates."""

    def __missing__(self, key: Any) -> str:
        letter = self[key] = get_symbol(2 + len(self))
        return letter


class Term(NamedTuple):
    """What a site adds to log p or log q, in nats.

    Attributes:
        values: ``(K or 1, N or 1)``; if it depends on enumerated latents, left of these a dim for
            each of them, and for each inner plate it lies in.
        letters: of the dims left of ``(K, N)``.
        plates: letters of the inner plates that the site lies in, whatever their size.
    """

    values: Tensor
    letters: str = ""
    plates: frozenset[str] = frozenset()


def term(
    site: Site,
    leftmost: int,
    joint: bool = False,
    letters: Letters | None = None,
    values: Tensor | None = None,
) -> Term:
    """The term of a site of a traced pair.

    Args:
        site: of a trace.
        leftmost: the leftmost plate dim of the pair (negative, or 0 without plates).
        joint: sum the data plate too.
        letters: of the pair's enumerated latents and inner plates, so far as they are known.
        values: of the site's batch shape, in the place of :func:`log_density`.

    Raises:
        ValueError: the site lies outside the data plate, or has a dim that nothing declares.
    """
    if values is None:
        values = log_density(site)
    dim_to_id = site["infer"].get("_dim_to_id", {})
    values = _declared(site, values, dim_to_id)
    beyond = values.dim() + leftmost  # dims left of all plates
    enumerated = [d for d in range(-values.dim(), leftmost) if values.shape[d] > 1]
    if not enumerated:
        values = values.reshape(values.shape[beyond:]) if beyond > 0 else values
        return Term(sum_plates(site, values, leftmost, joint))

    letters = Letters() if letters is None else letters
    data_dim, particle_dim = _dims(site, joint)
    plates = {
        frame.dim: letters["plate", frame.name]
        for frame in site["cond_indep_stack"]
        if frame.dim is not None and frame.dim not in (data_dim, particle_dim)
    }
    names = plates | {dim: letters["latent", dim_to_id[dim]] for dim in enumerated}
    left = [dim for dim in sorted(names) if values.shape[dim] > 1]
    sizes = [1 if dim is None else values.shape[dim] for dim in (particle_dim, data_dim)]
    last = [dim for dim in (particle_dim, data_dim) if dim is not None]
    others = [dim for dim in range(-values.dim(), 0) if dim not in left + last]  # of size 1
    values = values.permute(*others, *left, *last)
    values = values.reshape(*values.shape[len(others) : len(others) + len(left)], *sizes)
    return Term(values, "".join(names[dim] for dim in left), frozenset(plates.values()))


def laid_out(term: Term, site: Site, letters: Letters) -> Tensor:
    """A term without latents in the batch shape of a site: the reverse of :func:`term`."""
    frames = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.dim is not None}
    names = {DATA_PLATE: DATAPOINT, PARTICLE_PLATE: PARTICLE}
    wanted = [
        names.get(frames[dim], letters["plate", frames[dim]]) if dim in frames else ""
        for dim in range(min(frames), 0)
    ]
    present = term.letters + PARTICLE + DATAPOINT
    sizes = dict(zip(present, term.values.shape, strict=True))
    order = [present.index(letter) for letter in wanted if letter and letter in present]
    others = [i for i in range(len(present)) if i not in order]  # of size 1
    values = term.values.permute(others + order)
    return values.reshape([sizes.get(letter, 1) for letter in wanted])


# ------------------------------------------------------------------------------ the log-density


def log_density(site: Site, along_path: bool = False) -> Tensor:
    """A site's log-density: unscaled, masked, at least float32, of its batch shape.

    What a mask hides is replaced before the density is asked for, so NaN there, or a value outside
    the support, has no gradient either.

    Args:
        site: of a trace.
        along_path: as a function of the noise the draw was made from, see
            :meth:`ppvae.distributions.DiagonalNormal.log_prob_along_path`.
    """
    fn, value, mask = site["fn"], site["value"], site["mask"]
    if isinstance(mask, Tensor) and site["is_observed"]:
        value = filled(value, mask, fn)
    if site["is_observed"] and isinstance(value, Tensor):
        whole = not value.is_floating_point() and isinstance(law(fn), Bernoulli)
        if whole or value.dtype in _NARROW:  # torch's Bernoulli takes floats alone
            value = value.to(torch.get_default_dtype())
    try:
        if along_path:
            density = getattr(fn, "log_prob_along_path", fn.log_prob)
            values: Tensor = density(value, *site["args"], **site["kwargs"])
        elif isinstance(fn, (MaskedDistribution, Independent)):
            values = _masked_density(fn, value)
        else:
            values = fn.log_prob(value, *site["args"], **site["kwargs"])
    except NoInverse as error:
        raise NoInverse(f"site {site['name']!r}: {error}") from error
    except KeyError as error:
        if "intermediates cache" not in str(error):  # what Pyro's flows without an inverse say
            raise
        raise NoInverse(
            f"the flow of site {site['name']!r} (planar, radial, Sylvester, ...) has no inverse, "
            "so it can only weigh its own draws"
        ) from error
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    return masked(values, mask)


def masked(values: Tensor, mask: Any) -> Tensor:
    """Values of a batch shape, 0 where a mask (a tensor, a bool or None) hides them."""
    if mask is None or mask is True:
        return values
    if mask is False:
        return torch.zeros_like(values)
    return torch.where(mask, values, values.new_zeros(()))


def _masked_density(fn: Any, value: Tensor) -> Tensor:
    """``fn.log_prob(value)``, values that a mask inside of ``fn`` hides replaced first."""
    if isinstance(fn, MaskedDistribution) and isinstance(fn._mask, Tensor):
        inside = filled(value, fn._mask, fn.base_dist)
        try:
            values = _masked_density(fn.base_dist, inside)
        except NoInverse:  # a draw of its own is inside the support
            values = _masked_density(fn.base_dist, value)
        return masked(values, fn._mask)
    if isinstance(fn, Independent) and distribution_mask(fn) is not None:
        values = _masked_density(fn.base_dist, value)
        n = fn.reinterpreted_batch_ndims
        return values.flatten(-n).sum(-1) if n else values
    values = fn.log_prob(value)
    return values


def distribution_mask(fn: Any) -> Any:
    """The mask that a distribution itself carries (``.mask(...)``), or None."""
    while isinstance(fn, Independent):
        fn = fn.base_dist
    return fn._mask if isinstance(fn, MaskedDistribution) else None


def not_a_density(fn: Any, why: str) -> str:
    """Why ``fn.log_prob`` is no log-density; "" for one that is, as are nearly all.

    Args:
        fn: a distribution, or one inside of ``Independent``, masks, transforms.
        why: the attribute that says so: ``"estimated"``, a function of the value that is learned
            or drawn in the place of the log-density, or ``"unnormalised"``, the log-density but
            for a constant that is not known.
    """
    while fn is not None:
        if reason := getattr(fn, why, ""):
            return str(reason)
        fn = getattr(fn, "base_dist", None)
    return ""


def unmasked(fn: Any) -> Any:
    """A distribution without the masks it carries, inside of ``Independent`` too."""
    while isinstance(fn, MaskedDistribution):
        fn = fn.base_dist
    if isinstance(fn, Independent) and distribution_mask(fn) is not None:
        return type(fn)(unmasked(fn.base_dist), fn.reinterpreted_batch_ndims)
    return fn


# ------------------------------------------------------------------------------ plates


def sum_plates(site: Site, values: Tensor, leftmost: int, joint: bool = False) -> Tensor:
    """Sum values of a site's batch shape over its inner plates.

    Args:
        site: gives the plates.
        values: of the site's batch shape; dims left of ``leftmost`` are kept.
        leftmost: the leftmost plate dim of the pair (negative, or 0 without plates).
        joint: sum the data plate too.

    Returns:
        ``(..., K or 1, N or 1)``.
    """
    data_dim, particle_dim = _dims(site, joint)
    if values.dim() < -leftmost:
        values = values.reshape((1,) * (-leftmost - values.dim()) + values.shape)
    summed = [dim for dim in range(leftmost, 0) if dim not in (particle_dim, data_dim)]
    if summed:
        values = values.sum(summed)
    if particle_dim is None:
        values = values.unsqueeze(-1 if data_dim is None else -2)
    if data_dim is None:
        values = values.unsqueeze(-1)
    return values


def sum_whole(site: Site, values: Tensor) -> Tensor:
    """Values of a site's batch shape, summed over all its plates at their full size: 0-d."""
    return _declared(site, values, {}).sum()


def leftmost_plate(sites: list[Site]) -> int:
    """The leftmost plate dim, particles included; enumeration dims lie left of it."""
    dims = [frame.dim for site in sites for frame in site["cond_indep_stack"]]
    return min([dim for dim in dims if dim is not None], default=0)


def _declared(site: Site, values: Tensor, dim_to_id: dict[int, int]) -> Tensor:
    """Values with the full size of every plate; ``ValueError`` for a dim that nothing declares."""
    sizes = {frame.dim: frame.size for frame in site["cond_indep_stack"]}
    shape = values.shape
    missing = False
    for i, size in enumerate(shape):
        dim = i - len(shape)
        if size == 1:
            missing = missing or sizes.get(dim, 1) > 1
        elif dim not in dim_to_id and sizes.get(dim) != size:
            raise ValueError(_undeclared(site, shape))
    deepest = min([dim for dim in sizes if dim is not None], default=0)
    if missing or -deepest > len(shape):
        wanted = [sizes.get(dim, 1) for dim in range(deepest, 0)]
        values = values.expand(torch.broadcast_shapes(shape, wanted))
    return values


def _undeclared(site: Site, shape: torch.Size) -> str:
    plates = {f.name: (f.dim, f.size) for f in site["cond_indep_stack"] if f.dim is not None}
    plates = {name.replace(PARTICLE_PLATE, "particles"): at for name, at in plates.items()}
    return (
        f"site {site['name']!r} has log-probabilities of shape {tuple(shape)}, and its plates "
        f"(dim, size) are {plates}: each dim must be one of them. Declare it with .to_event(1), "
        "or align the shapes of its value and parameters, which are counted from the right"
    )


def _dims(site: Site, joint: bool) -> tuple[int | None, int | None]:
    """Where the data plate and the particle plate lie at a site (negative dims)."""
    data_dim = particle_dim = None
    for frame in site["cond_indep_stack"]:
        if frame.name == DATA_PLATE:
            data_dim = frame.dim
        elif frame.name == PARTICLE_PLATE:
            particle_dim = frame.dim
    if joint:
        return None, particle_dim
    if data_dim is None:
        raise ValueError(
            f"site {site['name']!r} lies outside the plate {DATA_PLATE!r}, so there is no weight "
            f"per datapoint (its plates: {[f.name for f in site['cond_indep_stack']]}). Put it "
            f'inside `with pyro.plate("{DATA_PLATE}", len(x)):` in both model and guide; if it is '
            "a global latent, ask for one weight per batch with joint=True, in log_weights(...) or "
            "as svi.step(x, joint=True)"
        )
    return data_dim, particle_dim
