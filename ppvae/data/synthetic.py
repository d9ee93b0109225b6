"""Synthetic data sets whose log p(x) is known exactly."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributions import LowRankMultivariateNormal, MultivariateNormal

from ppvae.arguments import takes_numbers
from ppvae.data.arrays import from_arrays
from ppvae.data.dataset import Dataset
from ppvae.data.split import check_at_least


class LinearGaussian(NamedTuple):
    r"""Probabilistic principal component analysis, with its exact evidence and posterior.

    .. math:: z \sim N(0, I), \quad x \mid z \sim N(W z + b, \sigma^2 I), \quad
        x \sim N(b, W W^\top + \sigma^2 I)

    Parameters are float64. Source: Tipping and Bishop (1999), J. R. Stat. Soc. B 61(3).

    Example:
        >>> parameters = linear_gaussian_parameters(dim=8, latent_dim=2)
        >>> parameters.W.shape, parameters.b.shape, parameters.sigma
        (torch.Size([8, 2]), torch.Size([8]), 0.5)
    """

    W: Tensor
    b: Tensor
    sigma: float

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, ``(..., dim) -> (...)``; in float64 on the CPU.

        Example:
            >>> linear_gaussian_parameters().log_evidence(torch.zeros(3, 8)).shape
            torch.Size([3])
        """
        variances = torch.full_like(self.b, self.sigma**2)
        marginal = LowRankMultivariateNormal(self.b, self.W, variances)
        return marginal.log_prob(x.to("cpu", torch.float64)).to(x)

    def posterior(self, x: Tensor) -> MultivariateNormal:
        r"""Exact posterior of z, in float64 on the CPU: with :math:`M = I + W^\top W / \sigma^2`,

        .. math:: z \mid x \sim N(M^{-1} W^\top (x - b) / \sigma^2, M^{-1})

        Args:
            x: ``(..., dim)``.

        Example:
            >>> linear_gaussian_parameters().posterior(torch.zeros(3, 8)).loc.shape
            torch.Size([3, 2])
        """
        gain = self.W.T / self.sigma**2
        covariance = torch.linalg.inv(torch.eye(len(gain), dtype=gain.dtype) + gain @ self.W)
        loc = (x.to("cpu", torch.float64) - self.b) @ gain.T @ covariance
        return MultivariateNormal(loc, covariance)


@takes_numbers(dim=1, latent_dim=1)
def linear_gaussian_parameters(dim: int = 8, latent_dim: int = 2, seed: int = 0) -> LinearGaussian:
    """The W, b and sigma that ``load("linear_gaussian")`` draws its data with.

    Entries of W are N(0, 1 / latent_dim), those of b are N(0, 1), sigma is 0.5.

    Args:
        dim: of x, 1 or more.
        latent_dim: of z, 1 or more.
        seed: 0 or more.

    Raises:
        ValueError: a dimension below 1 or a negative seed.

    Example:
        >>> linear_gaussian_parameters(seed=3).b.dtype
        torch.float64
    """
    check_at_least(1, dim=dim, latent_dim=latent_dim)
    rng = _stream(seed, 0)
    weight = rng.standard_normal((dim, latent_dim)) / math.sqrt(latent_dim)
    return LinearGaussian(torch.from_numpy(weight), torch.from_numpy(rng.standard_normal(dim)), 0.5)


def linear_gaussian(num: int = 2000, dim: int = 8, latent_dim: int = 2, seed: int = 0) -> Dataset:
    """``num`` rows of x = W z + b + sigma eps; train, valid and test are 80, 10 and 10 %.

    ``log_evidence`` is exact; W, b, sigma are ``linear_gaussian_parameters`` of the same arguments.

    Example:
        >>> tiny = linear_gaussian(num=100)
        >>> tiny.log_evidence(tiny.test.x).shape
        torch.Size([10])
    """
    parameters = linear_gaussian_parameters(dim, latent_dim, seed)
    rng = _stream(seed, 1)
    z, eps = rng.standard_normal((num, latent_dim)), rng.standard_normal((num, dim))
    mean = torch.from_numpy(z) @ parameters.W.T + parameters.b
    x = mean + parameters.sigma * torch.from_numpy(eps)
    return replace(
        from_arrays(x, support="real", seed=seed, name="linear_gaussian"),
        source=f"synthetic: x = W z + b + {parameters.sigma} eps, {latent_dim} latent dimensions, "
        f"as in Tipping and Bishop (1999); seed {seed}",
        log_evidence=parameters.log_evidence,
    )


class GaussianMixture(NamedTuple):
    r"""Mixture of round Gaussians with equal weights, with its exact evidence.

    .. math:: y \sim \mathrm{Uniform}(0..C-1), \quad x \mid y \sim N(\mu_y, \sigma^2 I)

    Example:
        >>> gaussian_mixture_parameters(num_components=5).means.shape
        torch.Size([5, 2])
    """

    means: Tensor
    sigma: float

    def log_evidence(self, x: Tensor) -> Tensor:
        """Exact log p(x) in nats, ``(..., 2) -> (...)``; in float64 on the CPU.

        Example:
            >>> gaussian_mixture_parameters().log_evidence(torch.zeros(3, 2)).shape
            torch.Size([3])
        """
        far = (x.to("cpu", torch.float64)[..., None, :] - self.means).square().sum(-1)
        count, dim = self.means.shape
        log_norm = dim / 2 * math.log(2 * math.pi * self.sigma**2) + math.log(count)
        return ((-far / (2 * self.sigma**2)).logsumexp(-1) - log_norm).to(x)


@takes_numbers(num_components=1)
def gaussian_mixture_parameters(num_components: int = 5) -> GaussianMixture:
    """The mixture ``load("gaussian_mixture")`` draws from: means on a circle, sigma 0.5.

    The radius is 4.

    Raises:
        ValueError: fewer than 1 component.

    Example:
        >>> gaussian_mixture_parameters().sigma
        0.5
    """
    check_at_least(1, num_components=num_components)
    angle = 2 * math.pi * torch.arange(num_components, dtype=torch.float64) / num_components
    return GaussianMixture(4 * torch.stack([angle.cos(), angle.sin()], -1), 0.5)


def gaussian_mixture(num: int = 2000, num_components: int = 5, seed: int = 0) -> Dataset:
    """``num`` points in the plane, labelled by component; parts are 80, 10 and 10 %.

    ``log_evidence`` is exact; ``gaussian_mixture_parameters`` gives the means and sigma.

    Example:
        >>> gaussian_mixture(num=100).num_classes
        5
    """
    mixture = gaussian_mixture_parameters(num_components)
    rng = _stream(seed, 1)
    y = torch.from_numpy(rng.integers(num_components, size=num))
    x = mixture.means[y] + mixture.sigma * torch.from_numpy(rng.standard_normal((num, 2)))
    return replace(
        from_arrays(x, y, support="real", seed=seed, name="gaussian_mixture"),
        num_classes=num_components,  # also where the last component happens to have no points
        source=f"synthetic: {num_components} round Gaussians of sigma {mixture.sigma} on a circle "
        f"of radius 4; split at random by class, seed {seed}",
        log_evidence=mixture.log_evidence,
    )


def _stream(seed: int, number: int) -> np.random.Generator:
    """Streams 0 (parameters) and 1 (data) of a seed: ``num`` does not change the former."""
    check_at_least(0, seed=seed)
    return np.random.default_rng([seed, number])
