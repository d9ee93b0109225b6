"""Semi-amortised inference: the encoder's guess, improved by a few gradient steps per datapoint."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.distributions import Reshaped
from ppvae.guides.amortized import Amortized
from ppvae.pairs import evaluation_mode
from ppvae.program import Program, data_plate
from ppvae.weights import log_weights


class SemiAmortized(Program):
    r"""An amortised guide whose outputs are refined by gradient ascent on the ELBO of each row.

    .. math:: \lambda_n^{(0)} = \mathrm{encoder}(x_n), \qquad
              \lambda_n^{(t+1)} = \lambda_n^{(t)} + \eta\, \nabla_\lambda
              \frac1S \sum_{s=1}^S \log \frac{p(x_n, z_s)}{q(z_s;\, \lambda)}, \qquad
              z_s = z(\epsilon_s;\, \lambda)

    The noise is not random: :math:`\epsilon_s` are the S = 2 Z points :math:`\pm\sqrt Z q_d` with
    orthonormal :math:`q_d`, whose mean is 0 and covariance exactly I. (A few fixed random draws
    would be overfitted, and fresh ones would make q(z | x) another density at each call.) So
    q(z | x) is a function of the row alone, and all K particles come from one refinement, which
    costs 2 Z rows of the decoder per datapoint and step. The model is in evaluation mode there.

    Args:
        guide: an :class:`Amortized` guide, normal or flow.
        model: the model of the pair. It is used, not owned: its parameters are the model's.
        steps: number of steps, >= 1.
        lr: their length :math:`\eta`. The gradient is that of one datapoint's ELBO in nats, so
            images need small steps; if the refined ELBO is no better, lower it.
        through: differentiate through the steps, which costs second derivatives but gives the
            gradient of the very bound that is reported, for encoder and model. False: the steps
            are constants to automatic differentiation, so the encoder's gradient is taken at the
            refined outputs, as if it had made them: cheaper, and biased.

    Raises:
        TypeError: the guide is not amortised, or (when called) draws without a noise to fix.
        ValueError: for steps or lr out of range.

    Source: Kim, Wiseman, Miller, Sontag & Rush, Semi-Amortized Variational Autoencoders, 2018
        (with momentum and fresh noise; differentiated through the steps, as here by default).

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, diagnostics, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> encoder = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> guide = guides.SemiAmortized(encoder, model, steps=10, lr=0.1)
        >>> x = torch.ones(3, 4)
        >>> before = diagnostics.log_evidence(model, encoder, x, num_particles=1000, seed=0).elbo
        >>> after = diagnostics.log_evidence(model, guide, x, num_particles=1000, seed=0).elbo
        >>> bool((after > before).all())
        True
    """

    @takes_numbers(steps=0, lr=0)
    def __init__(
        self,
        guide: Amortized,
        model: Callable[..., Any],
        steps: int = 5,
        lr: float = 0.1,
        through: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(guide, Amortized):
            wanted = "a guides.Amortized(conditional), or a shorthand such as guides.Normal"
            raise TypeError(f"guide: SemiAmortized refines {wanted}, got a {type(guide).__name__}")
        if steps < 1 or not lr > 0:
            raise ValueError(f"SemiAmortized needs steps >= 1 and lr > 0, got {steps} and {lr}")
        self.guide = guide
        self._model = (model,)  # in a tuple, so that it is no submodule
        self._inner = _Given(guide.latent)
        self.steps, self.lr, self.through = steps, lr, through

    @property
    def latent(self) -> str:
        """The name of the latent site."""
        return self.guide.latent

    def posterior(self, x: Tensor, y: Tensor | None = None, *others: Tensor | None) -> Any:
        """q(z | x) after refinement."""
        return self.guide.head(self.outputs(x, y, *others))

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *others: Tensor | None,
        size: int | None = None,
    ) -> Tensor:
        """Draw z, ``(N, latent_dim)``; arguments as the model's."""
        posterior = self.posterior(x, y, *others)
        with data_plate(x, size=size):
            z: Tensor = pyro.sample(self.latent, posterior)
        return z

    def outputs(self, x: Tensor, y: Tensor | None = None, *others: Tensor | None) -> Tensor:
        """The refined parameters of q(z | x), ``(N, ...)``."""
        through = self.through and torch.is_grad_enabled()
        outputs = self.guide.outputs(x, y, *others)
        args = tuple(tensor for tensor in (x, y, *others) if tensor is not None)
        # Particles, replays and leaves are about the draw of z to come, not about these.
        with poutine.block(expose_types=["param"]), evaluation_mode(*self._model):
            with torch.enable_grad():
                for _ in range(self.steps):
                    in_graph = through and outputs.requires_grad
                    current = outputs if in_graph else outputs.detach().requires_grad_()
                    elbo = self._elbo(current, args)  # rows share nothing, so neither do slopes
                    (slope,) = torch.autograd.grad(elbo, current, create_graph=through)
                    outputs = (current if through else outputs) + self.lr * slope
        return outputs

    def _elbo(self, outputs: Tensor, args: tuple[Tensor, ...]) -> Tensor:
        """The sum over rows of the ELBO by cubature; each point is a row of its own."""
        size = noise_size(self.guide.head(outputs))
        times, rows = 2 * size, outputs.shape[0]
        outputs = _repeat(outputs, times)
        args = tuple(_repeat(tensor, times) for tensor in args)
        points = cubature(size, outputs).unsqueeze(1).expand(-1, rows, -1)
        fn = self.guide.head(outputs)
        self._inner.drawn = fn, path(fn, points.flatten(0, 1))
        try:
            return log_weights(*self._model, self._inner, *args).log_w.sum() / times
        finally:
            self._inner.drawn = None


def cubature(size: int, like: Tensor) -> Tensor:
    """Points ``(2 * size, size)`` with mean 0 and covariance I, as far out as normal draws are.

    The rows of a sine transform, which is orthonormal, and their negatives; dtype and device are
    those of ``like``.
    """
    i = torch.arange(1, size + 1, dtype=like.dtype, device=like.device)
    waves = (torch.outer(i, i) * (math.pi / (size + 1))).sin() * math.sqrt(2 * size / (size + 1))
    return torch.cat([waves, -waves])


def noise_size(fn: Any) -> int:
    """How many standard normals a draw of a distribution is made of."""
    if isinstance(fn, dist.LowRankMultivariateNormal):
        return math.prod(fn.event_shape) + fn._unbroadcasted_cov_factor.shape[-1]
    if isinstance(fn, Reshaped):
        return noise_size(fn.base_dist)
    return math.prod(fn.event_shape)


def path(fn: Any, noise: Tensor) -> Tensor:
    r"""The draw that a distribution makes of standard normal noise, :math:`z(\epsilon; \lambda)`.

    Raises:
        TypeError: for a distribution without such a path.
    """
    if isinstance(fn, Reshaped):
        return path(fn.base_dist, noise).unflatten(-1, fn.event_shape)
    if isinstance(fn, dist.TransformedDistribution):
        z = path(fn.base_dist, noise)
        for transform in fn.transforms:
            z = transform(z)
        return z
    if isinstance(fn, dist.MultivariateNormal):
        return fn.loc + (fn._unbroadcasted_scale_tril @ noise.unsqueeze(-1)).squeeze(-1)
    if isinstance(fn, dist.LowRankMultivariateNormal):
        factor, diagonal = fn._unbroadcasted_cov_factor, fn._unbroadcasted_cov_diag
        low, own = noise.split([factor.shape[-1], diagonal.shape[-1]], -1)
        return fn.loc + (factor @ low.unsqueeze(-1)).squeeze(-1) + diagonal.sqrt() * own
    if isinstance(fn, dist.Independent) and isinstance(fn.base_dist, dist.Normal):
        return fn.base_dist.loc + fn.base_dist.scale * noise.unflatten(-1, fn.event_shape)
    raise TypeError(f"a draw of {type(fn).__name__} is not made of normals: use a normal or a flow")


def _repeat(tensor: Tensor, times: int) -> Tensor:
    """The rows of a tensor, all of them ``times`` over."""
    return tensor.unsqueeze(0).expand(times, *tensor.shape).flatten(0, 1)


class _Given(Program):
    """A guide that takes a given value as its draw."""

    def __init__(self, latent: str) -> None:
        super().__init__()
        self.latent = latent
        self.drawn: tuple[Any, Tensor] | None = None  # only while refining

    def forward(self, *args: Tensor) -> None:
        assert self.drawn is not None
        fn, z = self.drawn
        with data_plate(*args), _SetValue(z):
            pyro.sample(self.latent, fn)


class _SetValue(Messenger):
    """Draws nothing: the value is given."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def _pyro_sample(self, msg: Any) -> None:
        msg["value"], msg["done"] = self.value, True
