"""Pairs whose evidence, bounds and gradients are known exactly; use them in float64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import ppvae
from ppvae.program import data_plate


def assert_mean(samples: Tensor, exact: Tensor | float, what: str = "") -> None:
    """The mean of ``(S, ...)`` independent draws is ``exact``; wrongly fails once in 1e4.

    Two-sided, with a standard error from the draws, Bonferroni-corrected over the entries.
    """
    assert samples.isfinite().all(), what
    mean, se = samples.mean(0), samples.std(0) / math.sqrt(len(samples))
    limit = NormalDist().inv_cdf(1 - 1e-4 / (2 * mean.numel()))
    error = (mean - exact).abs()
    tiny = 1e-9 * (1 + mean.abs())
    assert (error <= limit * se + tiny).all(), (
        f"{what}: mean {mean}, exact {exact}, {error / se} standard errors off, limit {limit:.2f}"
    )


def assert_below(samples: Tensor, ceiling: float) -> None:
    """The mean of ``(S,)`` independent draws is at most ``ceiling``, within 4 standard errors."""
    se = samples.std() / math.sqrt(len(samples))
    assert samples.mean() <= ceiling + 4 * se, (samples.mean(), se, ceiling)


def gradients(
    loss: Callable[[], Tensor], parameters: list[Tensor], draws: int, rows: int = 1
) -> Tensor:
    """Gradients of ``draws`` independent losses, each divided by ``rows``: ``(draws, P)``."""
    found = []
    for _ in range(draws):
        grads = torch.autograd.grad(loss(), parameters)
        found.append(torch.cat([g.flatten() for g in grads]) / rows)
    return torch.stack(found)


def exact_gradient(value: Tensor, parameters: list[Tensor]) -> Tensor:
    """The gradient of an exact value, flat: ``(P,)``."""
    grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    zeros = [torch.zeros_like(p) for p in parameters]
    return torch.cat([(z if g is None else g).flatten() for g, z in zip(grads, zeros, strict=True)])


def hermite(nodes: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights with sum(w f(x)) = E f(standard normal)."""
    import numpy as np

    x, w = np.polynomial.hermite_e.hermegauss(nodes)
    return torch.tensor(x), torch.tensor(w / w.sum())


class UnreparameterisedNormal(dist.Normal):
    """A normal that can only be sampled, for score-function gradients."""

    has_rsample = False


# ------------------------------------------------------------------------------ linear-Gaussian


class LinearModel(ppvae.Program):
    """z ~ N(0, I), x | z ~ N(W z + b, sigma^2 I)."""

    def __init__(self, latent_dim: int, data_dim: int, sigma: float = 0.7, seed: int = 0) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        weight = torch.randn(data_dim, latent_dim, generator=random, dtype=torch.float64)
        if data_dim >= latent_dim:  # orthogonal columns: the posterior is diagonal
            weight = torch.linalg.qr(weight).Q * torch.linspace(0.6, 1.4, latent_dim)
        dtype = torch.get_default_dtype()
        self.weight = nn.Parameter(weight.to(dtype).contiguous())
        self.bias = nn.Parameter(torch.linspace(-0.5, 0.5, data_dim))
        self.log_sigma = nn.Parameter(torch.tensor(math.log(sigma)))

    def forward(self, x: Tensor, size: int | None = None) -> None:
        latent_dim = self.weight.shape[1]
        with data_plate(x, size=size):
            z = pyro.sample("z", dist.Normal(x.new_zeros(latent_dim), 1.0).to_event(1))
            mean = z @ self.weight.T + self.bias
            pyro.sample("x", dist.Normal(mean, self.log_sigma.exp()).to_event(1), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row."""
        covariance = self.weight @ self.weight.T
        covariance = covariance + self.log_sigma.mul(2).exp() * torch.eye(len(covariance))
        return dist.MultivariateNormal(self.bias, covariance).log_prob(x)

    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """(A, a, S): the posterior is N(A x + a, S)."""
        with torch.no_grad():
            W, precision = self.weight, torch.exp(-2 * self.log_sigma)
            S = torch.linalg.inv(torch.eye(W.shape[1]) + precision * W.T @ W)
            A = precision * S @ W.T
            return A, -A @ self.bias, S

    def draw(self, rows: int, seed: int = 1) -> Tensor:
        random = torch.Generator().manual_seed(seed)
        z = torch.randn(rows, self.weight.shape[1], generator=random, dtype=torch.float64)
        noise = torch.randn(rows, len(self.bias), generator=random, dtype=torch.float64)
        with torch.no_grad():
            x = z @ self.weight.double().T + self.bias + self.log_sigma.exp() * noise
        return x.to(self.weight.dtype)


class LinearGuide(ppvae.Program):
    """q(z | x) = N(A x + a, S): the exact posterior, moved by ``shift`` and widened by ``scale``.

    Diagonal, or with ``full`` a multivariate normal; ``path=False`` hides its sample path.
    """

    def __init__(
        self,
        model: LinearModel,
        scale: float | Tensor = 1.0,
        shift: float | Tensor = 0.0,
        full: bool = False,
        path: bool = True,
    ) -> None:
        super().__init__()
        A, a, S = model.posterior()
        self.full, self.path = full, path
        self.A, self.a = nn.Parameter(A.contiguous()), nn.Parameter(a + shift)
        if full:
            self.tril = nn.Parameter(scale * torch.linalg.cholesky(S))
        else:
            self.log_scale = nn.Parameter((S.diagonal().sqrt() * scale).log())

    def posterior(self, x: Tensor) -> dist.Distribution:
        mean = x @ self.A.T + self.a
        if self.full:
            return dist.MultivariateNormal(mean, scale_tril=self.tril)
        family = dist.Normal if self.path else UnreparameterisedNormal
        return family(mean, self.log_scale.exp()).to_event(1)

    def forward(self, x: Tensor, size: int | None = None) -> None:
        with data_plate(x, size=size):
            pyro.sample("z", self.posterior(x))


def linear_elbo(model: LinearModel, guide: LinearGuide, x: Tensor, beta: float = 1.0) -> Tensor:
    """The exact (beta-)ELBO of each row, for a diagonal guide; differentiable."""
    mean, variance = x @ guide.A.T + guide.a, guide.log_scale.mul(2).exp()
    sigma = model.log_sigma.exp()
    fit = dist.Normal(mean @ model.weight.T + model.bias, sigma).log_prob(x).sum(-1)
    spread = (model.weight.square() * variance).sum() / (2 * sigma.square())
    kl = 0.5 * (mean.square() + variance - 1 - variance.log()).sum(-1)
    return fit - spread - beta * kl


def linear_expected_bound(
    bound: Callable[[Tensor], Tensor],
    model: LinearModel,
    guide: LinearGuide,
    x: Tensor,
    particles: int,
    nodes: int,
) -> Tensor:
    """E[bound(log w)] of each row by quadrature over all particles' noise; differentiable."""
    latent_dim = model.weight.shape[1]
    points, weights = hermite(nodes)
    grid = torch.cartesian_prod(*[points] * (particles * latent_dim))
    eps = grid.reshape(-1, particles, 1, latent_dim)  # (G, K, 1, Z)
    mass = torch.cartesian_prod(*[weights] * (particles * latent_dim))
    mass = mass.reshape(len(eps), -1).prod(-1)
    scale = guide.log_scale.exp()
    mean = x @ guide.A.T + guide.a
    z = mean + scale * eps
    log_w = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_w = log_w - dist.Normal(mean, scale).log_prob(z).sum(-1)
    fit = dist.Normal(z @ model.weight.T + model.bias, model.log_sigma.exp()).log_prob(x)
    log_w = log_w + fit.sum(-1)  # (G, K, N)
    return (mass.unsqueeze(-1) * bound(log_w.movedim(1, 0))).sum(0)


# ------------------------------------------------------------------------------ two levels


class TwoLevelModel(ppvae.Program):
    """z2 ~ N(0, 1), z1 | z2 ~ N(a z2, s1^2), x | z1 ~ N(b z1, s0^2); all scalar."""

    def __init__(self, a: float = 0.8, b: float = 1.3, s1: float = 0.6, s0: float = 0.5) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(a)), nn.Parameter(torch.tensor(b))
        self.s1, self.s0 = s1, s0

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            z2 = pyro.sample("z2", dist.Normal(x.new_zeros(()), 1.0))
            z1 = pyro.sample("z1", dist.Normal(self.a * z2, self.s1))
            pyro.sample("x", dist.Normal(self.b * z1, self.s0), obs=x)

    def log_joint(self, x: Tensor, z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
        """Log p(x | z1) and log p(z1, z2)."""
        prior = dist.Normal(0.0, 1.0).log_prob(z2) + dist.Normal(self.a * z2, self.s1).log_prob(z1)
        return dist.Normal(self.b * z1, self.s0).log_prob(x), prior

    def log_evidence(self, x: Tensor) -> Tensor:
        variance = self.b**2 * (self.a**2 + self.s1**2) + self.s0**2
        return dist.Normal(0.0, variance.sqrt()).log_prob(x)


class TwoLevelGuide(ppvae.Program):
    """The exact posterior in either order, with ``shift`` and ``scale`` to make it wrong.

    Bottom-up: z1 | x, then z2 | z1. Top-down: z2 | x, then z1 | z2, x.
    """

    def __init__(
        self, model: TwoLevelModel, bottom_up: bool, shift: float = 0.0, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.bottom_up = bottom_up
        a, b, v1, v0 = model.a.item(), model.b.item(), model.s1**2, model.s0**2
        if bottom_up:
            prior = a * a + v1
            first = 1 / (1 / prior + b * b / v0)
            slopes = [first * b / v0, a / prior, 0.0]
            scales = [first**0.5, (v1 / prior) ** 0.5]
        else:
            noise = b * b * v1 + v0
            first = 1 / (1 + (a * b) ** 2 / noise)
            second = 1 / (1 / v1 + b * b / v0)
            slopes = [first * a * b / noise, second * a / v1, second * b / v0]
            scales = [first**0.5, second**0.5]
        self.slopes = nn.Parameter(torch.tensor(slopes))  # x -> first, first -> second, x -> second
        self.shift = nn.Parameter(torch.tensor([shift, -shift]))
        self.log_scale = nn.Parameter((scale * torch.tensor(scales)).log())

    def forward(self, x: Tensor) -> None:
        names = ("z1", "z2") if self.bottom_up else ("z2", "z1")
        with data_plate(x):
            first = pyro.sample(names[0], self.first(x))
            pyro.sample(names[1], self.second(x, first))

    def first(self, x: Tensor) -> dist.Normal:
        return dist.Normal(self.slopes[0] * x + self.shift[0], self.log_scale[0].exp())

    def second(self, x: Tensor, first: Tensor) -> dist.Normal:
        mean = self.slopes[1] * first + self.slopes[2] * x + self.shift[1]
        return dist.Normal(mean, self.log_scale[1].exp())


def two_level_elbo(
    model: TwoLevelModel, guide: TwoLevelGuide, x: Tensor, beta: float = 1.0
) -> Tensor:
    """The exact (beta-)ELBO of each row (quadrature of a quadratic form); differentiable."""
    points, weights = hermite(8)
    grid, mass = torch.cartesian_prod(points, points), torch.outer(weights, weights).flatten()
    q1 = guide.first(x)
    first = q1.loc + q1.scale * grid[:, :1]
    q2 = guide.second(x, first)
    second = q2.loc + q2.scale * grid[:, 1:]
    z1, z2 = (first, second) if guide.bottom_up else (second, first)
    fit, prior = model.log_joint(x, z1, z2)
    log_q = q1.log_prob(first) + q2.log_prob(second)
    return (mass.unsqueeze(-1) * (fit - beta * (log_q - prior))).sum(0)


def two_level_expected_bound(
    bound: Callable[[Tensor], Tensor],
    model: TwoLevelModel,
    guide: TwoLevelGuide,
    x: Tensor,
    K: int,
    nodes: int,
) -> Tensor:
    """E[bound(log w)] of each row by quadrature over both levels of all particles."""
    points, weights = hermite(nodes)
    axes = torch.cartesian_prod(*[points] * (2 * K)).reshape(-1, 2, K, 1)  # (G, level, K, 1)
    mass = torch.cartesian_prod(*[weights] * (2 * K)).reshape(len(axes), -1).prod(-1)
    q1 = guide.first(x)
    first = q1.loc + q1.scale * axes[:, 0]
    q2 = guide.second(x, first)
    second = q2.loc + q2.scale * axes[:, 1]
    z1, z2 = (first, second) if guide.bottom_up else (second, first)
    fit, prior = model.log_joint(x, z1, z2)
    log_w = fit + prior - q1.log_prob(first) - q2.log_prob(second)  # (G, K, N)
    return (mass.unsqueeze(-1) * bound(log_w.movedim(1, 0))).sum(0)


# ------------------------------------------------------------------------------ discrete latents


class BeliefNet(ppvae.Program):
    """h ~ Bernoulli^3, x | h ~ Bernoulli(W h + b)^4: 8 states, enumerated."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(3)
        self.prior = nn.Parameter(torch.tensor([0.5, -0.3, 0.1]))
        self.weight = nn.Parameter(2 * torch.randn(4, 3, generator=random, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.2, -0.2, 0.0, 0.4]))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            h = pyro.sample("h", dist.Bernoulli(logits=self.prior).to_event(1))
            logits = h @ self.weight.T + self.bias
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def log_joint(self, x: Tensor) -> Tensor:
        """Log p(x, h) of the 8 states: ``(8, N)``."""
        h = states()
        prior = dist.Bernoulli(logits=self.prior).log_prob(h).sum(-1)
        logits = h @ self.weight.T + self.bias
        fit = dist.Bernoulli(logits=logits.unsqueeze(1)).log_prob(x).sum(-1)
        return prior.unsqueeze(-1) + fit

    def log_evidence(self, x: Tensor) -> Tensor:
        return self.log_joint(x).logsumexp(0)


class BeliefGuide(ppvae.Program):
    """Independent Bernoullis with logits A x + a."""

    def __init__(self) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(4)
        self.weight = nn.Parameter(0.5 * torch.randn(3, 4, generator=random, dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([0.3, -0.4, 0.1]))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            logits = x @ self.weight.T + self.bias
            pyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))

    def log_q(self, x: Tensor) -> Tensor:
        """Log q(h | x) of the 8 states: ``(8, N)``."""
        logits = x @ self.weight.T + self.bias
        return dist.Bernoulli(logits=logits).log_prob(states().unsqueeze(1)).sum(-1)


def states() -> Tensor:
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)))


def belief_expected_bound(
    bound: Callable[[Tensor], Tensor], model: BeliefNet, guide: BeliefGuide, x: Tensor, K: int
) -> Tensor:
    """E[bound] of each row over all 8^K tuples of states; differentiable."""
    log_q = guide.log_q(x)
    log_w = model.log_joint(x) - log_q
    tuples = torch.tensor(list(itertools.product(range(8), repeat=K)))  # (T, K)
    mass = log_q[tuples].sum(1).exp()  # (T, N)
    return (mass * bound(log_w[tuples].movedim(1, 0))).sum(0)


class MixtureModel(ppvae.Program):
    """c ~ Categorical(3), z | c ~ N(mu_c, 1), x | z ~ N(z, 0.8^2); all scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.2, -0.1, 0.4]))
        self.loc = nn.Parameter(torch.tensor([-1.5, 0.3, 2.0]))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            c = pyro.sample("c", dist.Categorical(logits=self.logits))
            z = pyro.sample("z", dist.Normal(self.loc[c], 1.0))
            pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def log_evidence(self, x: Tensor) -> Tensor:
        log_p = dist.Normal(self.loc, math.sqrt(1 + 0.8**2)).log_prob(x.unsqueeze(-1))
        return (self.logits.log_softmax(-1) + log_p).logsumexp(-1)


class MixtureGuide(ppvae.Program):
    """q(c | x), then q(z | c, x): score function for c, sample path for z."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.1, 0.2, -0.3]))
        self.slope = nn.Parameter(torch.tensor([-0.5, 0.1, 0.6]))
        self.loc = nn.Parameter(torch.tensor([-0.8, 0.1, 0.9]))
        self.log_scale = nn.Parameter(torch.tensor([-0.2, 0.1, -0.4]))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            c = pyro.sample("c", dist.Categorical(logits=self.class_logits(x)))
            pyro.sample("z", dist.Normal(self.loc[c] + 0.5 * x, self.log_scale[c].exp()))

    def class_logits(self, x: Tensor) -> Tensor:
        return self.logits + self.slope * x.unsqueeze(-1)


def mixture_expected_bound(
    bound: Callable[[Tensor], Tensor], model: MixtureModel, guide: MixtureGuide, x: Tensor, K: int
) -> Tensor:
    """E[bound] of each row: classes enumerated, z by quadrature; differentiable."""
    points, weights = hermite(24 if K > 1 else 40)
    choices = torch.cartesian_prod(torch.arange(3), torch.arange(len(points)))
    c, eps = choices[:, 0], points[choices[:, 1]]  # (G,)
    log_qc = guide.class_logits(x).log_softmax(-1)[:, c].T  # (G, N)
    loc, scale = guide.loc[c, None] + 0.5 * x, guide.log_scale[c, None].exp()
    z = loc + scale * eps[:, None]
    log_q = log_qc + dist.Normal(loc, scale).log_prob(z)
    log_p = model.logits.log_softmax(-1)[c, None] + dist.Normal(model.loc[c, None], 1).log_prob(z)
    log_w = log_p + dist.Normal(z, 0.8).log_prob(x) - log_q  # (G, N)
    mass = log_qc.exp() * weights[choices[:, 1], None]
    tuples = torch.cartesian_prod(*[torch.arange(len(c))] * K).reshape(-1, K)
    return (mass[tuples].prod(1) * bound(log_w[tuples].movedim(1, 0))).sum(0)


def trainable(*programs: Any) -> list[Tensor]:
    """The parameters of several programs, each once."""
    return list({id(p): p for program in programs for p in program.parameters()}.values())
