"""Guides by the other KL: reweighted wake-sleep, and classification of draws."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppvae.elbo.estimator import Estimator
from ppvae.elbo.gradients import coefficient, through_draws, with_gradient
from ppvae.elbo.importance import log_mean_exp, normalised, require_number
from ppvae.elbo.state import State
from ppvae.pairs import Leaves
from ppvae.weights import LogWeights, drawn_log_q, dream_log_q, not_densities, weigh


@dataclass(frozen=True, eq=False)
class ReweightedWakeSleep(Estimator):
    r"""Reweighted wake-sleep: the model ascends IWELBO-K, the guide an inclusive KL.

    .. math::
        \theta:&\quad \nabla_\theta\, \mathcal L_K(x) = \sum_k \tilde w_k\, \nabla_\theta
            \log p(x, z_k) \\
        \phi:&\quad a \sum_k \tilde w_k\, \nabla_\phi \log q(z_k \mid x)
            + (1 - a)\, \nabla_\phi \log q(\hat z \mid \hat x),\qquad (\hat z, \hat x) \sim p

    with normalised weights per datapoint. The first term is *wake-phi*, the second *sleep*. Neither
    is the gradient of a bound; nothing needs a reparameterised sampler, so discrete latents train.
    The reported value is IWELBO-K.

    With ``insomnia=0`` the model's density may be an estimate, as that of a
    ``conditionals.Simulator``: there are no weights then, the model is not trained, and the value
    is the mean of log q(z | x) over the model's own draws, one for each row of the batch. That is
    neural posterior estimation.

    Args:
        num_particles: K >= 2; with one, wake-phi only raises log q of its own draws.
        gradient: ``"reweighted"`` as above, or ``"dreg"``: wake-phi through reparameterised draws,
            :math:`\sum_k (\tilde w_k - \tilde w_k^2)\, \partial_z \ell_k\, \partial_\phi z_k`.
        insomnia: a in [0, 1], the share of wake-phi.

    Invalid for latents that are enumerated in the guide, and for K = 1 unless ``insomnia=0``.

    Source: Bornschein & Bengio, Reweighted Wake-Sleep, 2015; Tucker et al. 2018 for ``"dreg"``.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> elbo.ReweightedWakeSleep(num_particles=5)(model, guide)(torch.ones(3, 4)).shape
        torch.Size([])
    """

    num_particles: int = 10
    gradient: str = "reweighted"
    insomnia: float = 1.0

    gradients: ClassVar[tuple[str, ...]] = ("reweighted", "dreg")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "insomnia")
        if not 0 <= self.insomnia <= 1:
            raise ValueError(f"insomnia is a share in [0, 1], got {self.insomnia}")
        if self.num_particles < 2 and self.insomnia > 0:
            raise ValueError(
                "wake-phi compares particles, so it needs num_particles >= 2 (or insomnia=0: "
                "sleep only)"
            )

    def bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        K = self.num_particles
        leaves = Leaves()
        weights = weigh(model, guide, args, kwargs, K, leaves=leaves)
        traces = weights.model_trace, weights.guide_trace
        in_model, in_guide = (not_densities("estimated", drawn) for drawn in traces)
        if self.insomnia == 0 and in_model and not in_guide:
            return weights.scale * dream_log_q(model, guide, *args, **kwargs).sum()
        log_w = self.effective(weights, state)
        value, shares = coefficient(self.bound, log_w)
        if not torch.is_grad_enabled():
            return weights.scale * value
        gradient: Any = (shares * self.effective(weights.stop_guide(), state)).sum()
        if self.insomnia > 0:
            gradient = gradient + self.insomnia * self._wake(weights, log_w, shares, leaves)
        if self.insomnia < 1:
            asleep = dream_log_q(model, guide, *args, **kwargs).sum()
            # of a dream that the guide cannot explain there is no gradient, and no step
            possible = torch.where(asleep.detach().isfinite(), 1.0, math.nan)
            gradient = gradient + (1 - self.insomnia) * possible * asleep
        return weights.scale * with_gradient(value, gradient)

    def _wake(self, weights: LogWeights, log_w: Tensor, shares: Tensor, leaves: Leaves) -> Tensor:
        if self.gradient == "dreg":
            self.require_reparameterised(weights)
            c = shares - shares.square()
            return through_draws(c, log_w, leaves, hidden=torch.zeros_like(c))
        return (shares * drawn_log_q(weights)).sum()


@dataclass(frozen=True, eq=False)
class SoftCVI(Estimator):
    r"""Soft contrastive inference: the model ascends IWELBO-K, the guide tells draws apart.

    Which of K draws of the guide is from the posterior? If the others are from :math:`q^\alpha`,
    the posterior says :math:`y`, the guide :math:`\hat y`, and it descends their cross-entropy:

    .. math:: y = \operatorname{softmax}_k\big(\log p(x, z_k) - \alpha \log q(z_k)\big),\quad
              \hat y = \operatorname{softmax}_k\big((1 - \alpha) \log q(z_k)\big),\quad
              \phi: \sum_k (y_k - \hat y_k)\, \nabla_\phi \log q(z_k)

    at fixed draws. With alpha = 1 that is wake-phi of :class:`ReweightedWakeSleep` with a control
    variate, :math:`\tilde w_k - 1/K`. At the exact posterior it is 0 for every draw, which wake-phi
    is not. It is the gradient of no bound; the value reported is IWELBO-K.

    Args:
        num_particles: K >= 2.
        gradient: ``"contrastive"``.
        negative: alpha in [0, 1].

    Source: Ward, Beaumont & Fasiolo, SoftCVI, 2024, arXiv:2407.15687.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> elbo.SoftCVI(num_particles=5)(model, guide)(torch.ones(3, 4)).shape
        torch.Size([])
    """

    num_particles: int = 10
    gradient: str = "contrastive"
    negative: float = 0.75

    gradients: ClassVar[tuple[str, ...]] = ("contrastive",)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number(self, "negative")
        if not 0 <= self.negative <= 1:
            raise ValueError(f"negative is a power of q in [0, 1], got {self.negative}")
        if self.num_particles < 2:
            raise ValueError("SoftCVI tells draws from each other, so it needs num_particles >= 2")

    def bound(self, log_w: Tensor) -> Tensor:
        return log_mean_exp(log_w)

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        weights = weigh(model, guide, args, kwargs, self.num_particles, leaves=Leaves())
        log_w = self.effective(weights, state)
        value, share = coefficient(self.bound, log_w)
        for_model = (share * self.effective(weights.stop_guide(), state)).sum()
        log_q = drawn_log_q(weights)
        power = (1 - self.negative) * log_q.detach()
        labels, guesses = normalised(log_w.detach() + power), normalised(power)
        gradient = for_model + ((labels - guesses) * log_q).sum()
        return weights.scale * with_gradient(value, gradient)
