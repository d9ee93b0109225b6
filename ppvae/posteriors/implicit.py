"""Posteriors that can only be drawn from: adversarial variational Bayes."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.auxiliary import Ratio, drawn_with
from ppvae.conditionals.heads import full_precision

NUM_POINTS = 32  # at least, at which a sampler's moments are taken
LEAST_SCALE = 1e-3


class Implicit(nn.Module):
    r"""A posterior that is a network of x and of noise, without a density: what AVB trains.

    .. math:: z = \mathrm{sampler}(x, \epsilon),\quad \epsilon \sim N(0, I);\qquad
              \log q(z \mid x) \approx T(x, \tilde z) + \log r(z \mid x),\quad
              \tilde z = \frac{z - \mu(x)}{\sigma(x)}

    The network T, a :class:`ppvae.Ratio`, learns the logarithm of q(z | x) / r(z | x) from draws of
    both, after each step of the pair. With ``contrast="adaptive"`` r is the normal distribution
    with the moments mu and sigma of q(z | x): T has only its shape to learn. They are constants to
    gradients, sigma is at least 1e-3. A sampler may have a method ``moments(x)`` that gives both,
    ``(N, dim)`` each; else they are taken at 32 points of noise, or twice its dimensions, the same
    for every x: a linear sampler's are then exact. With ``"prior"`` r is N(0, I), z itself is given
    to T, and the more q and r are apart the worse it learns. The prior p(z) is the model's own,
    whichever it is.

    log q is an estimate, so the ELBO is no bound: a network that cannot tell q from r gives a value
    that is too large. Only :class:`ppvae.elbo.ELBO` trains it, pathwise or ``"stl"``, which is the
    same here; judge the pair by ``diagnostics.ais(start="prior")``, or from a normal that
    ``guides.moment_match`` gives.

    Args:
        sampler: from x, ``(N, ...)``, and noise, ``(..., N, noise_dim)``, to z, ``(..., N, dim)``;
            networks of ``nets`` broadcast and concatenate the two.
        net: T, from x and z, as the sampler has them, to ``(..., N, 1)``.
        dim: of z, a vector, >= 1.
        noise_dim: of the noise, >= 1. Draws of fewer dimensions than z lie on a surface, and have
            no ratio.
        contrast: ``"adaptive"`` or ``"prior"``.

    Raises:
        ValueError: bad arguments; a sampler or a network that gives another shape; when SVI meets
            it, a guide in which not one site is drawn from it.

    Source: Mescheder, Nowozin & Geiger, Adversarial Variational Bayes, 2017, section 3.3 for the
    adaptive contrast. Their moments are of a batch of noise; here of points that stay.

    Example:
        >>> import ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> q = Implicit(nets.mlp(4 + 3, 8, 2), nets.mlp(4 + 2, 8, 1), dim=2, noise_dim=3)
        >>> svi = ppvae.SVI(model, guides.Amortized(q), beside=ppvae.Beside(steps=2))
        >>> history = ppvae.fit(svi, torch.ones(20, 4), epochs=2, progress=False)
        >>> q(torch.ones(5, 4)).sample((3,)).shape
        torch.Size([3, 5, 2])
        >>> ppvae.elbo.ELBO().evaluate(model, svi.guide, torch.ones(5, 4))
        Traceback (most recent call last):
        ValueError: site 'z' has no log-density, so there is no bound and no log p(x) made of ...
    """

    points: Tensor

    @takes_numbers(dim=1, noise_dim=1)
    def __init__(
        self,
        sampler: nn.Module,
        net: nn.Module,
        dim: int,
        noise_dim: int,
        contrast: Literal["adaptive", "prior"] = "adaptive",
    ) -> None:
        super().__init__()
        if contrast not in ("adaptive", "prior"):
            raise ValueError(
                f'Implicit: contrast must be "adaptive" or "prior", the distribution that q is '
                f"compared with, got {contrast!r}"
            )
        if noise_dim < dim:
            raise ValueError(
                f"Implicit: draws of noise_dim={noise_dim} numbers lie on a surface in dim={dim} "
                "dimensions, and have no density that a ratio could learn: give noise_dim >= dim"
            )
        self.sampler, self.dim, self.noise_dim = sampler, dim, noise_dim
        self.contrast = contrast
        self.ratio = Ratio(net, self._draws_of_both)
        self.register_buffer("points", opposite_points(noise_dim))

    def forward(self, *inputs: Tensor) -> Sampled:
        loc, scale = self.moments(*inputs)
        return Sampled(self, inputs, loc, scale)

    @torch.no_grad()
    def moments(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of r(z | x), ``(N, dim)`` each."""
        rows = len(inputs[0])
        if self.contrast == "prior":
            zero = full_precision(self.points.new_zeros(rows, self.dim))
            return zero, torch.ones_like(zero)
        if hasattr(self.sampler, "moments"):
            moments: Any = self.sampler.moments
            loc, scale = moments(*inputs)
            if loc.shape != (rows, self.dim) or scale.shape != (rows, self.dim):
                raise ValueError(
                    f"sampler.moments must give two tensors of shape {(rows, self.dim)}, means and "
                    f"standard deviations, and gave {tuple(loc.shape)} and {tuple(scale.shape)}"
                )
            loc, scale = full_precision(loc), full_precision(scale)
        else:
            z = self.drawn(inputs, self.points.unsqueeze(1).expand(-1, rows, -1))
            loc, scale = z.mean(0), z.std(0, correction=0)
        return loc, scale.clamp(min=LEAST_SCALE)

    def drawn(self, inputs: tuple[Tensor, ...], noise: Tensor) -> Tensor:
        """The sampler's z, ``(..., N, dim)``, of noise ``(..., N, noise_dim)``."""
        z: Tensor = full_precision(self.sampler(*inputs, noise))
        if z.shape != (*noise.shape[:-1], self.dim):
            seen = ", ".join(str(tuple(tensor.shape)) for tensor in (*inputs, noise))
            raise ValueError(
                f"Implicit: the sampler must give one z of dim={self.dim} for each row of the "
                f"noise, {(*noise.shape[:-1], self.dim)}: of inputs {seen}, the noise "
                f"last, it gave {tuple(z.shape)}"
            )
        return z

    def _draws_of_both(self, draws: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Fresh draws of q(z | x) and of r(z | x), standardised, each with its x."""
        fn, z = drawn_with(self.ratio, draws.guide_sites(), "guide")
        standard = fn.standardised(z)
        return (*fn.inputs, standard), (*fn.inputs, torch.randn_like(standard))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, noise_dim={self.noise_dim}, contrast={self.contrast!r}"


def opposite_points(dim: int) -> Tensor:
    """Points of a standard normal in pairs of opposite ones along random axes, ``(M, dim)``.

    Their mean is 0 and their covariance I, exactly: a few points at random would be off by much.
    """
    axes = torch.linalg.qr(torch.randn(math.ceil(NUM_POINTS / (2 * dim)), dim, dim)).Q
    lengths = torch.randn(len(axes), dim).norm(dim=1)
    lengths = lengths * (dim / lengths.square().mean()).sqrt()
    points = lengths[:, None, None] * axes
    return torch.cat([points, -points]).flatten(0, 1)


class Sampled(dist.TorchDistribution):
    """What :class:`Implicit` returns: reparameterised draws, and an estimate of their density.

    Each draw has noise of its own, particles included.

    Args:
        made_by: has the sampler and the ratio.
        inputs: x, one row for each of N datapoints.
        loc, scale: moments of r(z | x), ``(N, dim)``, constants.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True
    estimated = (
        "it can only be drawn from, and a classifier stands for its density; judge the pair by "
        'diagnostics.ais(start="prior")'
    )

    def __init__(
        self,
        made_by: Implicit,
        inputs: tuple[Tensor, ...],
        loc: Tensor,
        scale: Tensor,
        validate_args: bool | None = None,
    ) -> None:
        self.made_by, self.inputs, self.loc, self.scale = made_by, inputs, loc, scale
        self.ratio, self.log_ratio = made_by.ratio, made_by.ratio.held()
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Sampled:
        new = self._get_checked_instance(Sampled, _instance)
        for name in ("made_by", "inputs", "loc", "scale", "ratio", "log_ratio"):
            setattr(new, name, getattr(self, name))  # they broadcast
        super(Sampled, new).__init__(torch.Size(batch_shape), self.event_shape, False)
        new._validate_args = self._validate_args
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.batch_shape + (self.made_by.noise_dim,)
        noise = torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device)
        return self.made_by.drawn(self.inputs, noise.to(self.made_by.points.dtype))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def standardised(self, value: Tensor) -> Tensor:
        """z less the mean of r, over its standard deviation."""
        return (value - self.loc) / self.scale

    def log_prob(self, value: Tensor) -> Tensor:
        """T(x, z) + log r(z | x): its gradient is that of a draw z alone.

        The rest of the gradient of log q, in its parameters, is 0 in expectation.
        """
        standard = self.standardised(value)
        log_ratio = self.log_ratio(*(x.detach() for x in self.inputs), standard)
        if log_ratio.shape != standard.shape[:-1]:
            raise ValueError(
                "Implicit: its network must give one number for each z, "
                f"{(*standard.shape[:-1], 1)}, and gave {(*log_ratio.shape, 1)}: let it broadcast "
                "x over particles, as nets do"
            )
        normal = -0.5 * (standard.square() + math.log(2 * math.pi)) - self.scale.log()
        return log_ratio + normal.sum(-1)
