"""Inference for single datapoints, the model held fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.pairs import Leaves, evaluation_mode, kind, law, seeded
from ppvae.program import Program, module_of
from ppvae.weights import weigh, whole_weights


class Indexed(Program):
    """A model that takes the batch's row numbers as one more, last, argument and ignores them.

    For guides that have parameters per datapoint, such as ``guides.PerDatapoint``: ``fit``,
    ``log_evidence`` and the rest then cut the row numbers as they cut the data.

    Args:
        model: a Pyro program.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> x = torch.ones(3, 4)
        >>> guide = guides.PerDatapoint(conditionals.Normal(torch.nn.Identity()), torch.zeros(3, 4))
        >>> ppvae.log_weights(Indexed(model), guide, x, torch.arange(3)).log_w.shape
        torch.Size([1, 3])
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args[:-1], **kwargs)


@takes_numbers
def fit_local(
    model: Callable[..., Any],
    guide: nn.Module,
    *args: Any,
    steps: int | None = None,
    lr: float = 0.05,
    num_particles: int = 8,
    natural: bool = False,
    seed: int | None = 0,
) -> Tensor:
    r"""Maximise each datapoint's ELBO over the guide's parameters, the model held fixed.

    .. math:: \max_\lambda\; \sum_n \operatorname E_{q(z; \lambda_n)}
              \left[\log p(x_n, z) - \log q(z; \lambda_n)\right]

    For a guide with parameters per datapoint the terms do not share any, and Adam treats each
    number by itself, so this is N optimisations at once. All rows are in each step; the learning
    rate falls to 0 along a half cosine, which averages the noise of the last draws away. Only the
    guide's own trainable parameters move, in place.

    With ``natural=True`` a step is the natural gradient, of a guide that is one normal latent with
    a row of parameters for each datapoint: :math:`\lambda_n \mathrel{+}= \rho F_n^{-1} g_n`, F the
    Fisher information of :math:`q(z; \lambda_n)`, exact; g by STL from draws in mirrored pairs; at
    most a KL divergence of 1/2 nat at once; rho falls as above, from 1. Then 50 steps do what
    1000 of Adam's do, whatever the parametrisation of the normal.

    Args:
        model: a Pyro program; for ``guides.PerDatapoint`` an :class:`Indexed` one.
        guide: an ``nn.Module``, such as ``guide.local(x)`` of an amortised guide.
        *args: the rows as both are called, e.g. ``x, torch.arange(len(x))``.
        steps: optimisation steps, >= 1; None: 1000, or 50 natural ones.
        lr: the first learning rate of Adam; not asked for by natural steps.
        num_particles: draws per datapoint and step; for natural steps even.
        natural: take natural gradients.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.

    Returns:
        The ELBO of each datapoint, averaged over the last tenth of the steps, ``(N,)`` nats: the
        parameters moved while it was taken, so estimate again for a number to report.

    Raises:
        ValueError: the guide has no trainable parameter of its own, or the ELBO is not finite;
            natural steps of a guide that is no normal latent with parameters by row.

    Source: Amari, Natural Gradient Works Efficiently in Learning, 1998; Roeder et al. 2017 (STL).

    Example:
        >>> import torch
        >>> from ppvae import conditionals, guides, models, nets
        >>> from ppvae.diagnostics import log_evidence
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> encoder, x = guides.Normal(nets.mlp(4, 8, 2 * 2)), torch.ones(3, 4)
        >>> local, index = encoder.local(x), torch.arange(3)
        >>> _ = fit_local(Indexed(model), local, x, index, steps=200)
        >>> def elbo(model, guide, *args):
        ...     return log_evidence(model, guide, *args, num_particles=5000, seed=0).elbo
        >>> bool((elbo(Indexed(model), local, x, index) > elbo(model, encoder, x)).all())
        True
    """
    if steps is None:
        steps = 50 if natural else 1000
    if steps < 1 or num_particles < 1:
        raise ValueError(f"steps and num_particles must be >= 1, got {steps}, {num_particles}")
    if not isinstance(guide, torch.nn.Module):
        seen = f"guide must be an nn.Module, got {type(guide).__name__}"
        raise ValueError(f"{seen}; pass guide.local(x), or guides.PerDatapoint(...)")
    owner = module_of(model)
    fixed = {id(p) for p in owner.parameters()} if owner is not None else set()
    moving = [p for p in guide.parameters() if p.requires_grad and id(p) not in fixed]
    if not moving:
        seen = f"{type(guide).__name__} has no trainable parameter that is not the model's"
        raise ValueError(f"{seen}: pass guide.local(x) of an amortised guide")
    if natural:
        _require_paired(num_particles)
    optimiser = torch.optim.SGD(moving, lr=1.0) if natural else torch.optim.Adam(moving, lr=lr)
    first, last = optimiser.param_groups[0]["lr"], max(1, steps // 10)
    total: Tensor | None = None
    with evaluation_mode(model, guide), seeded(seed, *args), torch.enable_grad():
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = first * 0.5 * (1 + math.cos(math.pi * step / steps))
            if natural:
                elbo, grads = _natural_step(model, guide, args, num_particles, moving)
            else:
                elbo = whole_weights(model, guide, args, {}, num_particles).log_w.mean(0)
                grads = list(torch.autograd.grad(-elbo.sum(), moving))  # the model's are not
            for parameter, gradient in zip(moving, grads, strict=True):
                parameter.grad = gradient
            optimiser.step()
            if step >= steps - last:
                total = elbo.detach() if total is None else total + elbo.detach()
    for parameter in moving:
        parameter.grad = None
    assert total is not None
    if not (finite := total.isfinite()).all():
        bad = f"{int((~finite).sum())} of {len(total)} datapoints"
        raise ValueError(f"the ELBO of {bad} is NaN or infinite after {steps} steps: lower lr={lr}")
    return total / last


class _Mirrored(Leaves):
    """Draws of a normal in pairs about its mean, cut as :class:`Leaves` does."""

    def _pyro_post_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and isinstance(law(msg["fn"]), _NORMALS):
            loc, K = law(msg["fn"]).loc, len(msg["value"])
            half = msg["value"][: K // 2]
            msg["value"] = torch.cat([half, 2 * loc[: K // 2] - half])
        super()._pyro_post_sample(msg)


_NORMALS = (torch.distributions.Normal, torch.distributions.MultivariateNormal)


def _require_paired(num_particles: int) -> None:
    if num_particles % 2:
        raise ValueError(f"natural=True draws in pairs: num_particles is even, got {num_particles}")


def _natural_step(
    model: Callable[..., Any],
    guide: nn.Module,
    args: tuple[Any, ...],
    num_particles: int,
    moving: list[nn.Parameter],
) -> tuple[Tensor, list[Tensor]]:
    """The ELBO of each row, and what the parameters are moved against."""
    leaves = _Mirrored()
    weights = weigh(model, guide, args, {}, num_particles, leaves=leaves)
    latents = [weights.guide_trace.nodes[name] for name in weights.q]
    rows = weights.log_w.shape[1]
    if (
        len(latents) != 1
        or len(leaves.pairs) != 1
        or len(moving) != 1
        or not isinstance(law(latents[0]["fn"]), _NORMALS)
        or moving[0].dim() != 2
        or len(moving[0]) < rows
    ):
        seen = ", ".join(f"{site['name']!r} ({kind(site['fn'])})" for site in latents)
        raise ValueError(
            "natural=True takes a guide of one normal latent whose parameters are one table with a "
            f"row for each datapoint, such as guides.Normal(...).local(x); this one has {seen} and "
            f"parameters {[tuple(p.shape) for p in moving]}. Leave natural out"
        )
    ((z, leaf),) = leaves.pairs
    elbo = weights.log_w.mean(0)
    (slope,) = torch.autograd.grad(elbo.sum(), leaf)
    (ascent,) = torch.autograd.grad((slope * z).sum(), moving, retain_graph=True)
    roots = _root_of_fisher(law(latents[0]["fn"]), moving[0])  # (P_z, rows, P)
    fisher = torch.einsum("inp,inq->npq", roots, roots)
    size = fisher.diagonal(dim1=-2, dim2=-1)
    damping = 1e-6 * size.amax(-1, keepdim=True) + torch.finfo(size.dtype).tiny
    fisher = fisher + torch.diag_embed(damping.expand_as(size))
    natural = torch.linalg.solve(fisher, ascent)
    divergence = 0.5 * (natural * ascent).sum(-1, keepdim=True)  # about, of a whole step
    natural = natural * (_RADIUS / divergence.clamp(min=_RADIUS)).sqrt()
    return elbo, [-natural]


_RADIUS = 0.5  # nats


def _root_of_fisher(normal: Any, table: Tensor) -> Tensor:
    r"""Rows whose products are the Fisher information of a normal in a table of parameters.

    .. math:: F_{ij} = (L^{-1} \partial_i m) \cdot (L^{-1} \partial_j m)
              + \tfrac12 \langle S_i, S_j \rangle,\qquad
              S_i = L^{-1} \partial_i L + (L^{-1} \partial_i L)^\top
    """
    loc = normal.loc[0]
    D = loc.shape[-1]

    def by_parameter(values: Tensor) -> Tensor:
        """The slopes of columns ``(N, C)`` of the rows' numbers, ``(C, N, P)``."""
        columns = [
            torch.autograd.grad(column.sum(), table, retain_graph=True, allow_unused=True)[0]
            for column in values.unbind(-1)
        ]
        return torch.stack([torch.zeros_like(table) if c is None else c for c in columns])

    means = by_parameter(loc)
    if isinstance(normal, torch.distributions.Normal):
        scale = normal.scale[0]
        inverse = scale.detach().T.unsqueeze(-1).reciprocal()
        scales = by_parameter(scale) * inverse
        return torch.cat([means * inverse, math.sqrt(2.0) * scales])
    L = normal.scale_tril[0]
    fixed = L.detach()
    i, j = torch.tril_indices(D, D, device=L.device)
    moved = torch.zeros(D, D, *table.shape, dtype=table.dtype, device=table.device)
    moved[i, j] = by_parameter(L[..., i, j])
    whitened = torch.linalg.solve_triangular(
        fixed, torch.cat([means.unsqueeze(1), moved], 1).permute(2, 0, 1, 3).flatten(2), upper=False
    ).unflatten(2, (D + 1, -1))  # (N, D, 1 + D, P)
    own = whitened[:, :, 1:]
    both = (own + own.transpose(1, 2)) * math.sqrt(0.5)
    return torch.cat([whitened[:, :, 0], both.flatten(1, 2)], 1).transpose(0, 1)
