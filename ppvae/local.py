"""Inference for single datapoints, the model held fixed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.pairs import evaluation_mode, seeded
from ppvae.program import Program, module_of
from ppvae.weights import whole_weights


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
    steps: int = 1000,
    lr: float = 0.05,
    num_particles: int = 8,
    seed: int | None = 0,
) -> Tensor:
    r"""Maximise each datapoint's ELBO over the guide's parameters, the model held fixed.

    .. math:: \max_\lambda\; \sum_n \operatorname E_{q(z; \lambda_n)}
              \left[\log p(x_n, z) - \log q(z; \lambda_n)\right]

    For a guide with parameters per datapoint the terms do not share any, and Adam treats each
    number by itself, so this is N optimisations at once. All rows are in each step; the learning
    rate falls to 0 along a half cosine, which averages the noise of the last draws away. Only the
    guide's own trainable parameters move, in place.

    Args:
        model: a Pyro program; for ``guides.PerDatapoint`` an :class:`Indexed` one.
        guide: an ``nn.Module``, such as ``guide.local(x)`` of an amortised guide.
        *args: the rows as both are called, e.g. ``x, torch.arange(len(x))``.
        steps: optimisation steps, >= 1.
        lr: the first learning rate of Adam.
        num_particles: draws per datapoint and step.
        seed: draw with this seed and leave the random stream as it was; None: draw from it.

    Returns:
        The ELBO of each datapoint, averaged over the last tenth of the steps, ``(N,)`` nats: the
        parameters moved while it was taken, so estimate again for a number to report.

    Raises:
        ValueError: the guide has no trainable parameter of its own, or the ELBO is not finite.

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
    optimiser = torch.optim.Adam(moving, lr=lr)
    last = max(1, steps // 10)
    total: Tensor | None = None
    with evaluation_mode(model, guide), seeded(seed, *args), torch.enable_grad():
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
            elbo = whole_weights(model, guide, args, {}, num_particles).log_w.mean(0)
            grads = torch.autograd.grad(-elbo.sum(), moving)  # the model's are not computed
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
