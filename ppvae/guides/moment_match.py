"""A guide with a density, from the moments of the draws of one that may have none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from ppvae import conditionals, posteriors
from ppvae.arguments import takes_numbers
from ppvae.guides.per_datapoint import PerDatapoint
from ppvae.pairs import (
    Program,
    evaluation_mode,
    own_path,
    particle_plate,
    sample_sites,
    seeded,
    structure,
    trace,
)

LEAST_SCALE = 1e-3


@takes_numbers
@torch.no_grad()
def moment_match(
    model: Program,
    guide: Program,
    *args: Any,
    num_draws: int = 256,
    full: bool = True,
    seed: int | None = 0,
) -> PerDatapoint:
    r"""A normal posterior for each datapoint, with the moments of a guide's draws.

    .. math:: q_n(z) = N(\bar z_n, C_n),\qquad z_{1..M} \sim q(z \mid x_n)

    It gives a guide that can only be drawn from (``posteriors.Implicit``) a density near by: a
    start for :func:`ppvae.diagnostics.ais`, or a proposal for ``log_evidence``. What comes out
    holds for the model, however far the normal is from the guide.

    Args:
        model, guide: Pyro programs with one latent, a vector or map of real numbers.
        *args: the rows as both are called, e.g. ``x``.
        num_draws: M of each row, more than the latent has dimensions.
        full: with correlations; False: variances only.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.

    Returns:
        :class:`~ppvae.guides.PerDatapoint`, for the rows' numbers as last argument and the model
        wrapped in ``ppvae.local.Indexed``. Standard deviations are at least 1e-3.

    Raises:
        ValueError: another latent, too few draws, draws that are not finite.

    Example:
        >>> import ppvae
        >>> from ppvae import conditionals, diagnostics, guides, models, nets, posteriors
        >>> from ppvae.local import Indexed
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> q = posteriors.Implicit(nets.mlp(4 + 3, 8, 2), nets.mlp(4 + 2, 8, 1), 2, noise_dim=3)
        >>> x = torch.ones(3, 4)
        >>> near = guides.moment_match(model, guides.Amortized(q), x)
        >>> found = diagnostics.ais(Indexed(model), near, x, torch.arange(3), num_temperatures=20)
        >>> found.log_evidence.shape
        torch.Size([3])
    """
    if num_draws < 2:
        raise ValueError(f"moment_match: num_draws must be at least 2, got {num_draws}")
    with own_path(), evaluation_mode(model, guide), seeded(seed, *args):
        found = structure(model, guide, args, {})
        with particle_plate(found, num_draws):
            sites = sample_sites(trace(guide, args, {}))
    name, z, shape = _only_vector(sites, found.nesting)
    dim = z.shape[-1]
    if not z.isfinite().all():
        raise ValueError(f"moment_match: the guide's draws of {name!r} are NaN or infinite")
    if full and num_draws <= dim:
        raise ValueError(
            f"moment_match: num_draws={num_draws} are too few for a covariance in {dim} "
            f"dimensions: give more than {dim}, or full=False"
        )
    loc = z.mean(0)
    if not full:
        outputs = torch.cat([loc, z.std(0).clamp(min=LEAST_SCALE).log()], -1)
        return PerDatapoint(_laid_out(conditionals.Normal(nn.Identity()), shape), outputs, name)
    centred = z - loc
    covariance = torch.einsum("mni,mnj->nij", centred, centred) / (num_draws - 1)
    least = LEAST_SCALE**2 * torch.eye(dim, dtype=z.dtype, device=z.device)
    tril = torch.linalg.cholesky(covariance + least)
    row, column = torch.tril_indices(dim, dim, -1, device=z.device)
    log_scale = tril.diagonal(dim1=-2, dim2=-1).log()
    outputs = torch.cat([loc, log_scale, tril[:, row, column]], -1)
    normal = posteriors.FullNormal(nn.Identity(), dim).to(z.device)
    return PerDatapoint(_laid_out(normal, shape), outputs, name)


def _laid_out(head: conditionals.Conditional, shape: tuple[int, ...]) -> conditionals.Conditional:
    return head if len(shape) == 1 else conditionals.Reshaped(head, shape)


def _only_vector(sites: dict[str, Any], nesting: int) -> tuple[str, Tensor, tuple[int, ...]]:
    """Name, draws ``(M, N, D)`` and event shape of a guide's one latent."""
    name, site = next(iter(sites.items()))
    support = site["fn"].support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    event = tuple(site["fn"].event_shape)
    plain = event and site["value"].dim() == 2 + len(event) and nesting == 1
    if len(sites) != 1 or not plain or support is not constraints.real:
        shapes = {name: tuple(site["fn"].event_shape) for name, site in sites.items()}
        raise ValueError(
            "moment_match takes a guide with one latent, a vector or map of real numbers "
            f"for each datapoint; this one has {shapes} in {nesting} plates"
        )
    return name, site["value"].flatten(2), event
