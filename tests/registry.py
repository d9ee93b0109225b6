"""Every pair and every estimator that the laws are tested on. A new one is tested by being listed.

``build(name)`` gives ``(model, guide, args)``: small, in float32, seeded. Each pair has the single
latent ``"z"``, hierarchies ``"z1"``, ``"z2"``, ``"z3"``, all with a sample path.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn

from ppvae import conditionals, elbo, guides, models, nets, posteriors
from ppvae.elbo import Estimator
from ppvae.local import Indexed
from ppvae.program import Program, data_plate, module_of

Pair = tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]
N, D, Z = 6, 5, 2


def binary(*shape: int) -> Tensor:
    return torch.bernoulli(torch.full((N, *shape), 0.4))


def tanh(*sizes: int) -> nn.Module:
    return nets.mlp(*sizes, activation=nn.Tanh)


def vae_bernoulli() -> Pair:
    model = models.VAE(conditionals.Bernoulli(tanh(Z, 8, D)), latent_dim=Z)
    return model, guides.Normal(tanh(D, 8, 2 * Z)), (binary(D),)


def vae_normal(scale: Any, width: int = D) -> Pair:
    model = models.VAE(conditionals.Normal(tanh(Z, 8, width), scale=scale), latent_dim=Z)
    guide = guides.Normal(tanh(D, 8, 2 * Z), positive=nn.Softplus())
    return model, guide, (torch.randn(N, D),)


def vae_categorical() -> Pair:
    model = models.VAE(conditionals.Categorical(tanh(Z, 8, D * 4), num_classes=4), latent_dim=Z)
    x = torch.randint(4, (N, D))
    return model, guides.Normal(Scaled(tanh(D, 8, 2 * Z), 4)), (x,)


class Scaled(nn.Module):
    """Integer data to [0, 1] before a network."""

    def __init__(self, net: nn.Module, size: int) -> None:
        super().__init__()
        self.net, self.size = net, size

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.net(x / self.size, *others)


def vae_bag_of_words() -> Pair:
    model = models.VAE(conditionals.BagOfWords(tanh(Z, 7), total_count=7), latent_dim=Z)
    return model, guides.Normal(tanh(7, 8, 2 * Z)), (torch.poisson(torch.ones(N, 7)),)


def nvdm() -> Pair:
    guide = guides.Normal(tanh(7, 8, 2 * Z))
    return models.NVDM(7, Z, length=7), guide, (torch.poisson(torch.ones(N, 7)),)


def vae_counts() -> Pair:
    """Over-dispersed counts with zeros beyond, and the log exposure of each row."""
    head = conditionals.NegativeBinomial(tanh(Z, 8, 2 * D), theta=conditionals.Scale(2.0, (D,)))
    model = models.VAE(conditionals.ZeroInflated(head), latent_dim=Z)
    guide = guides.Normal(Scaled(tanh(D + 1, 8, 2 * Z), 4))
    return model, guide, (torch.poisson(2 * torch.ones(N, D)), torch.randn(N))


def vae_shares() -> Pair:
    likelihood = conditionals.DirichletMultinomial(tanh(Z, 8, D + 1), total_count=9)
    model = models.VAE(likelihood, latent_dim=Z)
    guide = guides.Normal(Scaled(tanh(D, 8, 2 * Z), 4))
    return model, guide, (torch.poisson(2 * torch.ones(N, D)),)


def vae_levels() -> Pair:
    """Grey levels under a mixture of logistic laws."""
    head = conditionals.DiscretizedLogistic(tanh(Z, 8, 3 * 2 * D), num_levels=16, num_components=2)
    model = models.VAE(head, latent_dim=Z)
    x = torch.randint(16, (N, D)).to(torch.get_default_dtype())
    return model, guides.Normal(Scaled(tanh(D, 8, 2 * Z), 16)), (x,)


def affine_weight(net: nn.Module) -> nn.Module:
    return conditionals.Affine(conditionals.StudentT(net), 70.0, 10.0)


def vae_columns() -> Pair:
    """A table with a column for every head of single values."""
    kinds: dict[str, Any] = {
        "weight": affine_weight,
        "visits": conditionals.Poisson,
        "claims": conditionals.NegativeBinomial,
        "hits": partial(conditionals.BetaBinomial, total_count=5),
        "job": partial(conditionals.Categorical, num_classes=3),
        "smoker": conditionals.Bernoulli,
        "grade": partial(conditionals.Ordinal, num_levels=3),
        "share": conditionals.Beta,
        "grey": conditionals.ContinuousBernoulli,
        "error": conditionals.Laplace,
        "income": conditionals.LogNormal,
        "cost": conditionals.Gamma,
        "direction": conditionals.VonMises,
        "age": conditionals.Normal,
    }
    width = conditionals.Columns.width(kinds)
    model = models.VAE(conditionals.Columns(tanh(Z, 8, width), kinds), latent_dim=Z)
    whole = torch.randint(3, (N, 7)).to(torch.get_default_dtype())
    whole[:, 5] = whole[:, 5].clamp(max=1)  # in the order above, one that is continuous first
    inside = 0.1 + 0.8 * torch.rand(N, 6)
    x = torch.cat([70 + torch.randn(N, 1), whole[:, 1:], inside, torch.randn(N, 1)], 1)
    return model, guides.Normal(Scaled(tanh(len(kinds), 8, 2 * Z), 10)), (x,)


def gaps() -> tuple[Tensor, Tensor]:
    """Rows with NaN, one of which has nothing else, and which values are there."""
    observed = torch.rand(N, D) < 0.6
    observed[0] = False
    return torch.randn(N, D).masked_fill(~observed, math.nan), observed


def vae_masked() -> Pair:
    model, _, _ = vae_normal(None, 2 * D)
    fill = nn.Parameter(torch.zeros(D))
    guide = guides.Normal(nets.Masked(tanh(2 * D, 8, 2 * Z), fill))
    return models.Masked(model), guide, gaps()


def not_at_random() -> Pair:
    likelihood = conditionals.Normal(tanh(Z, 8, 2 * D))
    missing = conditionals.Bernoulli(nets.SelfMasking(D, sign=1))
    model = models.MissingNotAtRandom(likelihood, missing, latent_dim=Z)
    guide = guides.Normal(nets.Masked(tanh(2 * D, 8, 2 * Z)))
    return model, guides.WithMissing(guide, model), gaps()


def vae_mixture_prior() -> Pair:
    likelihood = conditionals.Bernoulli(tanh(Z, 8, D))
    model = models.VAE(likelihood, prior=conditionals.Mixture(3, Z))
    return model, guides.Normal(tanh(D, 8, 2 * Z)), (binary(D),)


def vae_vamp_prior() -> Pair:
    guide = guides.Normal(tanh(D, 8, 2 * Z))
    prior = conditionals.VampPrior(guide.conditional, 4, D, mean=0.5, std=0.1)
    model = models.VAE(conditionals.Bernoulli(tanh(Z, 8, D)), prior=prior)
    return model, guide, (binary(D),)


def vae_optimal_prior() -> Pair:
    """Normalised at the weights it starts with."""
    guide, x = guides.Normal(tanh(D, 8, 2 * Z)), binary(D)
    prior = conditionals.OptimalPrior(conditionals.StandardNormal(Z), tanh(Z, 8, 1))
    prior.normalize(guide, x)
    return models.VAE(conditionals.Bernoulli(tanh(Z, 8, D)), prior=prior), guide, (x,)


def vae_conv() -> Pair:
    shape = (1, 6, 5)
    decoder = nets.conv_decoder(Z, shape, channels=(3,), hidden=(8,), batch_norm=True)
    model = models.VAE(conditionals.Bernoulli(decoder, event_dim=3), latent_dim=Z)
    encoder = nets.conv_encoder(2 * Z, shape, channels=(3,), hidden=(8,), batch_norm=True)
    return model, guides.Normal(encoder), (binary(*shape),)


def vae_residual() -> Pair:
    likelihood = conditionals.Bernoulli(nets.residual(Z, 8, D, blocks=1, batch_norm=True))
    guide = guides.Normal(nets.residual(D, 8, 2 * Z, blocks=1))
    return models.VAE(likelihood, latent_dim=Z), guide, (binary(D),)


def cvae_labels() -> Pair:
    one_hot = nets.OneHot(3)
    likelihood = conditionals.Bernoulli(tanh(Z + 3, 8, D))
    model = models.CVAE(likelihood, latent_dim=Z, condition=one_hot)
    guide = guides.Normal(tanh(D + 3, 8, 2 * Z), condition=one_hot)
    return model, guide, (binary(D), torch.randint(3, (N,)))


def cvae_learned_prior() -> Pair:
    one_hot = nets.OneHot(3)
    prior = conditionals.Normal(tanh(3, 2 * Z))
    likelihood = conditionals.Bernoulli(tanh(Z + 3, 8, D))
    model = models.CVAE(likelihood, prior=prior, condition=one_hot)
    guide = guides.Normal(tanh(D + 3, 8, 2 * Z), condition=one_hot)
    return model, guide, (binary(D), torch.randint(3, (N,)))


def cvae_quadrant() -> Pair:
    """The hidden three quarters of an image given the visible one, features shared."""
    features = tanh(4, 6)
    prior = conditionals.Normal(tanh(6, 2 * Z))
    likelihood = conditionals.Bernoulli(tanh(Z + 6, 8, 12))
    model = models.CVAE(likelihood, prior=prior, condition=features)
    guide = guides.Normal(tanh(12 + 6, 8, 2 * Z), condition=features)
    return model, guide, (binary(12), binary(4))


def amortized(make: Callable[[nn.Module], nn.Module], width: int) -> Pair:
    """A guide that differs by its conditional, a head on a network of some width."""
    model = models.VAE(conditionals.Bernoulli(tanh(Z, 8, D)), latent_dim=Z)
    return model, guides.Amortized(make(tanh(D, 8, width))), (binary(D),)


def flow(layers: Callable[..., Any], **options: Any) -> Pair:
    def make(net: nn.Module) -> nn.Module:
        return posteriors.Flow(net, layers(Z, 3, hidden=[4], **options), Z, context_dim=3)

    return amortized(make, 2 * Z + 3)


def full_normal_conv() -> Pair:
    model, _, args = vae_conv()
    encoder = nets.conv_encoder(5, (1, 6, 5), channels=(3,), hidden=(8,), batch_norm=True)
    return model, guides.Amortized(posteriors.FullNormal(encoder, dim=Z)), args


def cvae_flow() -> Pair:
    model, _, args = cvae_labels()
    layers = posteriors.coupling(Z, 3, num_layers=2, hidden=[4])
    conditional = posteriors.Flow(tanh(D + 3, 8, 2 * Z + 3), layers, Z, context_dim=3)
    return model, guides.Amortized(conditional, condition=model.condition), args


def upward(width_in: int, width: int) -> nn.Module:
    """One block of a ladder's upward pass, with batch norm."""
    layers = nn.Sequential(nn.Linear(width_in, width), nn.BatchNorm1d(width), nn.Tanh())
    return nets.flat_batch(layers)


def hierarchical() -> Pair:
    levels = [conditionals.Normal(tanh(Z, 6, 2 * Z)) for _ in range(2)]
    model = models.Hierarchical(conditionals.Bernoulli(tanh(Z, 8, D)), levels, latent_dim=Z)
    up = [conditionals.Normal(tanh(width, 6, 2 * Z)) for width in (D, Z, Z)]
    return model, guides.BottomUp(model, up), (binary(D),)


def ladder() -> Pair:
    """Three levels, batch norm upward."""
    model, _, args = hierarchical()
    blocks = [upward(D, 8), upward(8, 6), upward(6, 4)]
    heads = [conditionals.Normal(nn.Linear(width, 2 * Z), positive=softplus) for width in (8, 6, 4)]
    return model, guides.Ladder(model, blocks, heads), args


def softplus(raw: Tensor) -> Tensor:
    return nn.functional.softplus(raw)


def ladder_conv() -> Pair:
    """Two levels of feature maps, z1 (2, 3, 3) and z2 (1, 3, 3), under a vector."""

    def conv(a: int, b: int, norm: bool = False, stride: int = 1) -> nn.Module:
        layers = [nn.Conv2d(a, b, 3, stride, padding=1)]
        layers += [nn.BatchNorm2d(b), nn.Tanh()] if norm else []
        return nets.flat_batch(nn.Sequential(*layers), event_dim=3)

    def maps(net: nn.Module) -> nn.Module:
        return conditionals.Normal(net, event_dim=3)

    unfold = nn.Sequential(tanh(Z, 2 * 9), nn.Unflatten(-1, (2, 3, 3)))
    up = nn.Upsample(scale_factor=2)
    image = nets.flat_batch(nn.Sequential(up, nn.Conv2d(2, 1, 3, padding=1)), event_dim=3)
    likelihood = conditionals.Bernoulli(image, event_dim=3)
    model = models.Hierarchical(likelihood, [maps(conv(1, 4)), maps(unfold)], latent_dim=Z)
    blocks = [conv(1, 4, True, stride=2), conv(4, 4, True), nn.Sequential(conv(4, 2), nn.Flatten())]
    heads = [maps(conv(4, 4)), maps(conv(4, 2)), conditionals.Normal(nn.Linear(18, 2 * Z))]
    return model, guides.Ladder(model, blocks, heads), (binary(1, 6, 6),)


def top_down() -> Pair:
    """Two scales of one and two groups, images of an odd size, batch norm everywhere."""
    shape = (1, 6, 5)
    parts = nets.nvae(shape, (1, 2), channels=2, latent_channels=2, blocks=1, expansion=1)
    model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
    for part in nn.ModuleList([*parts[:3], *parts.heads]).modules():
        if isinstance(part, nets.SqueezeExcitation):  # of so few units all may be off
            nn.init.constant_(part.gates[0].bias, 2.0)
    return model, guides.TopDown(model, parts.encoder, parts.heads), (binary(*shape),)


def semi_implicit() -> Pair:
    head = conditionals.Normal(tanh(3, 8, 2 * Z))
    return amortized(
        lambda net: posteriors.SemiImplicit(conditionals.Normal(net), head, num_mixing=4), 2 * 3
    )


def per_datapoint() -> Pair:
    """Six of ten rows, not in order."""
    model = models.VAE(conditionals.Bernoulli(tanh(Z, 8, D)), latent_dim=Z)
    guide = guides.PerDatapoint(conditionals.Normal(nn.Identity()), 0.3 * torch.randn(10, 2 * Z))
    return Indexed(model), guide, (binary(D), torch.tensor([7, 0, 3, 9, 1, 4]))


def semi_amortized(through: bool) -> Pair:
    model, encoder, args = vae_bernoulli()
    return model, guides.SemiAmortized(encoder, model, steps=2, lr=0.1, through=through), args


class PyroModel(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Linear](Z, D)
        self.sigma = PyroParam(torch.tensor(0.8), constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Z), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), self.sigma).to_event(1), obs=x)


class PyroGuide(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.loc = PyroModule[nn.Linear](D, Z)
        self.scale = PyroParam(torch.full((Z,), 0.5), constraints.positive)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.loc(x), self.scale).to_event(1))


def pyro_modules() -> Pair:
    return PyroModel(), PyroGuide(), (torch.randn(N, D),)


class TutorialVAE(nn.Module):
    """As in Pyro's VAE tutorial: two methods that call ``pyro.module``."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, 2 * Z), nn.Linear(Z, D)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc, scale = x.new_zeros(x.shape[0], Z), x.new_ones(x.shape[0], Z)
            z = pyro.sample("latent", dist.Normal(loc, scale).to_event(1))
            pyro.sample("obs", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("latent", dist.Normal(loc, raw.exp()).to_event(1))


def tutorial() -> Pair:
    vae = TutorialVAE()
    return vae.model, vae.guide, (binary(D),)


ALL_PAIRS: dict[str, Callable[[], Pair]] = {
    "vae_bernoulli": vae_bernoulli,
    "vae_normal_predicted_scale": lambda: vae_normal(None, 2 * D),
    "vae_normal_fixed_scale": lambda: vae_normal(0.7),
    "vae_normal_learned_scale": lambda: vae_normal(conditionals.Scale(0.7)),
    "vae_normal_scale_per_dim": lambda: vae_normal(conditionals.Scale(0.7, (D,))),
    "vae_categorical": vae_categorical,
    "vae_bag_of_words": vae_bag_of_words,
    "vae_counts": vae_counts,
    "vae_shares": vae_shares,
    "vae_levels": vae_levels,
    "vae_columns": vae_columns,
    "vae_masked": vae_masked,
    "not_at_random": not_at_random,
    "nvdm": nvdm,
    "vae_mixture_prior": vae_mixture_prior,
    "vae_vamp_prior": vae_vamp_prior,
    "vae_optimal_prior": vae_optimal_prior,
    "vae_conv": vae_conv,
    "vae_residual": vae_residual,
    "cvae_labels": cvae_labels,
    "cvae_learned_prior": cvae_learned_prior,
    "cvae_quadrant": cvae_quadrant,
    "full_normal": lambda: amortized(lambda net: posteriors.FullNormal(net, Z), Z * (Z + 3) // 2),
    "full_normal_conv": full_normal_conv,
    "low_rank_normal": lambda: amortized(lambda net: posteriors.LowRankNormal(net, 1), 3 * Z),
    "mixture": lambda: amortized(lambda net: posteriors.Mixture(net, 2), 2 * (1 + 2 * Z)),
    "iaf": lambda: flow(posteriors.iaf),
    "coupling": lambda: flow(posteriors.coupling, num_layers=2),
    "spline": lambda: flow(posteriors.spline, num_layers=1, bins=3),
    "cvae_flow": cvae_flow,
    "semi_implicit": semi_implicit,
    "per_datapoint": per_datapoint,
    "semi_amortized": lambda: semi_amortized(through=True),
    "semi_amortized_first_order": lambda: semi_amortized(through=False),
    "hierarchical": hierarchical,
    "ladder": ladder,
    "ladder_conv": ladder_conv,
    "top_down": top_down,
    "pyro_modules": pyro_modules,
    "tutorial": tutorial,
}


def implicit(contrast: str = "adaptive") -> Pair:
    model, _, args = vae_bernoulli()
    sampler, net = tanh(D + 3, 8, Z), tanh(D + Z, 8, 1)
    q = posteriors.Implicit(sampler, net, Z, noise_dim=3, contrast=contrast)
    return model, guides.Amortized(q), args


def cvae_implicit() -> Pair:
    model, _, args = cvae_labels()
    q = posteriors.Implicit(tanh(D + 3 + 2, 8, Z), tanh(D + 3 + Z, 8, 1), Z, noise_dim=2)
    return model, guides.Amortized(q, condition=model.condition), args


def simulator() -> Pair:
    def simulate(z: Tensor) -> Tensor:
        return z.repeat(1, 3)[:, :D] + torch.randn(len(z), D)

    likelihood = conditionals.Simulator(simulate, tanh(D + Z, 8, 1), shape=D)
    model = models.VAE(likelihood, latent_dim=Z)
    return model, guides.Normal(tanh(D, 8, 2 * Z)), (torch.randn(N, D),)


# A log-density is an estimate, so these have no bound, and the laws of bounds are not theirs.
ESTIMATED: dict[str, Callable[[], Pair]] = {
    "implicit": implicit,
    "implicit_prior_contrast": lambda: implicit("prior"),
    "cvae_implicit": cvae_implicit,
    "simulator": simulator,
}


def m2() -> Pair:
    """Three of six rows labelled, classes of unequal probability."""
    likelihood = conditionals.Bernoulli(tanh(Z + 3, 8, D))
    model = models.M2(likelihood, Z, num_classes=3, probs=[0.2, 0.5, 0.3])
    guide = guides.M2(tanh(D, 8, 3), conditionals.Normal(tanh(D + 3, 8, 2 * Z)))
    return model, guide, (binary(D), torch.tensor([0, -1, 2, -1, -1, 1]))


# Their guides enumerate, so nonlinear bounds and "stl" do not train them; tests/test_few_labels.py.
ENUMERATED: dict[str, Callable[[], Pair]] = {"m2": m2}


def vq(prior: nn.Module | None = None) -> Pair:
    """Maps of 3 x 2 codes."""
    book = nets.Codebook(4, Z)
    likelihood = conditionals.Bernoulli(nets.upsample(Z, 1, channels=(4,)), event_dim=3)
    model = models.VAE(likelihood, prior=conditionals.CodePrior(book, (3, 2), prior))
    guide = guides.Quantized(nets.downsample(1, Z, channels=(4,)), book)
    return model, guide, (binary(1, 6, 4),)


def vq_levels() -> Pair:
    """Maps of 4 x 2 codes given maps of 2 x 1, both given a label."""
    labels, fine, coarse = nets.OneHot(3), nets.Codebook(4, Z), nets.Codebook(3, 3)
    bottom = conditionals.CodePrior(fine, (4, 2), nets.CausalConv(4, 4, 1, context_dim=3 + 3))
    top = conditionals.CodePrior(coarse, (2, 1), nets.CausalGRU(3, (2, 1), 4, context_dim=3))
    image = nets.MergeMaps(nets.upsample(Z + 3, 1, channels=(4,)))
    model = models.CodeHierarchy(conditionals.Bernoulli(image, event_dim=3), bottom, top, labels)
    guide = guides.QuantizedLevels(
        nets.downsample(1, 4, channels=(4,)),
        nets.downsample(4, 3, channels=(4,)),
        nets.MergeMaps(nets.flat_batch(nn.Conv2d(4 + 3, Z, 1), event_dim=3)),
        (fine, coarse),
    )
    return model, guide, (binary(1, 8, 4), torch.randint(3, (N,)))


def fsq() -> Pair:
    model, _, args = vq()
    quantizer = nets.FSQ([3, 2])
    prior = conditionals.CodePrior(quantizer, (3, 2), nets.Unigram(6))
    guide = guides.Quantized(nets.downsample(1, Z, channels=(4,)), quantizer)
    return models.VAE(model.likelihood, prior=prior), guide, args


def softened(pair: Pair) -> Pair:
    model, guide, args = pair
    return model, guide.soften(0.5), args


# All draws of the first are equal: log q = 0, and more than one is refused, so the laws of weights,
# of k-hat and of bounds of several particles are those of the softened ones. These draw codes
# without a path, so laws of gradients along one are not theirs: tests/test_vq.py.
CODES: dict[str, Callable[[], Pair]] = {
    "vq": vq,
    "vq_unigram": lambda: vq(nets.Unigram(4)),
    "vq_levels": vq_levels,
    "fsq": fsq,
}
SOFT_CODES: dict[str, Callable[[], Pair]] = {
    "vq_soft": lambda: softened(vq(nets.CausalGRU(4, (3, 2), 4))),
    "vq_levels_soft": lambda: softened(vq_levels()),
}


class FactorAnalysis(Program):
    """Loadings and noise of all rows, factors of each."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(D))

    def forward(self, x: Tensor) -> None:
        loadings = pyro.sample("W", dist.Normal(torch.zeros(D, Z), 1.0).to_event(2))
        with pyro.plate("features", D):
            sd = pyro.sample("sd", dist.LogNormal(torch.zeros(()), 0.3))
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(Z), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ loadings.T + self.shift, sd).to_event(1), obs=x)


def factor_analysis() -> Pair:
    model, x = FactorAnalysis(), torch.randn(N, D)
    return model, guides.Global(AutoNormal, model, x, local=guides.Normal(tanh(D, 8, 2 * Z))), (x,)


# With latents outside the data plate: what is of rows alone refuses them; tests/test_globals.py.
GLOBAL: dict[str, Callable[[], Pair]] = {"factor_analysis": factor_analysis}


def build(name: str, seed: int = 0) -> Pair:
    """A fresh pair with its data; the same seed gives the same parameters and data."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return (ALL_PAIRS | ESTIMATED | ENUMERATED | CODES | SOFT_CODES | GLOBAL)[name]()


def owners(*programs: Callable[..., Any]) -> list[nn.Module]:
    """The modules of a pair, each once."""
    found = [module_of(program) for program in programs]
    return list({id(module): module for module in found if module is not None}.values())


class Nothing(nn.Module):
    """A ratio of equal densities."""

    def forward(self, z: Tensor) -> Tensor:
        return 0.0 * z.sum(-1, keepdim=True)


# Arguments of every exported estimator, besides num_particles and gradient. An exported one that
# is missing here fails collection.
ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "ELBO": [
        {},
        {"beta": 4.0},
        {"kl": "mixed"},
        {"beta": elbo.FreeBits(1e-3)},
        {"beta": elbo.Capacity(2.0, gamma=10.0)},
        {"beta": elbo.Balanced(0.5)},
        {"beta": elbo.Constraint(max_rate=1.0)},
    ],
    # the laws are of a bound's value, so its network has learned nothing: T = 0
    "FactorELBO": [{"ratio": Nothing()}],
    "VQELBO": [{"commitment": 0.0}],  # with more, of codes alone: tests/test_vq.py
    "RELAX": [{}],
    "IWELBO": [{}],
    # with a step, the weights of the exact guide are not constant
    "AnnealedELBO": [{"step": 0.0, "num_temperatures": 2}, {"step": 0.3, "num_temperatures": 2}],
    "MIWELBO": [{"num_groups": 2}],
    "PIWELBO": [{"num_groups": 2}],
    "CIWELBO": [{"beta": 0.3}],
    "ChiUpperBound": [{}],
    "ThermodynamicELBO": [{}],
    "ReweightedWakeSleep": [{}, {"insomnia": 0.5}],
    "SoftCVI": [{}, {"negative": 1.0}],
    "TCELBO": [{"beta": 4.0, "size": 40}, {"alpha": 0.5, "gamma": 2.0, "size": 40}],
    "DIPELBO": [
        {"diagonal": 5.0, "off_diagonal": 2.0},
        {"diagonal": 5.0, "off_diagonal": 2.0, "kind": "II"},
    ],
    "RenyiELBO": [{"alpha": 0.5}, {"alpha": -math.inf}],
}


def all_estimators() -> dict[str, Estimator]:
    found = {}
    exported = [getattr(elbo, name) for name in elbo.__all__]
    concrete = [
        cls
        for cls in exported
        if isinstance(cls, type)
        and issubclass(cls, Estimator)
        and cls is not Estimator
        and cls is not elbo.Plus  # any of the others, with a term: tests/test_few_labels.py
    ]
    missing = {cls.__name__ for cls in concrete} ^ ARGUMENTS.keys()
    assert not missing, f"tests/registry.py ARGUMENTS and ppvae.elbo.__all__ differ in {missing}"
    for cls in concrete:
        for arguments, gradient in itertools.product(ARGUMENTS[cls.__name__], cls.gradients):
            if arguments.get("kl", "sampled") != "sampled" and gradient != "pathwise":
                continue  # refused, see test_gradients.py
            weighed = isinstance(arguments.get("beta"), elbo.penalties.Penalty)
            if weighed and gradient in ("vargrad", "disarm", "straight_through", "gumbel"):
                continue  # as with a number
            if arguments.get("alpha") == -math.inf and gradient == "dreg":
                continue  # refused, see test_gradients.py
            label = "-".join([cls.__name__, *(f"{k}={v}" for k, v in arguments.items()), gradient])
            count = 4 if gradient == "disarm" else 3  # pairs
            found[label] = cls(num_particles=count, gradient=gradient, **arguments)
    return found


ALL_ESTIMATORS: dict[str, Estimator] = all_estimators()


def one_of_each() -> set[str]:
    """The estimators that `make test` has where all are too slow: each gradient, each argument."""
    found: dict[Any, str] = {}
    for label, estimator in ALL_ESTIMATORS.items():
        name, *arguments, gradient = (
            type(estimator).__name__,
            *label.split("-")[1:-1],
            estimator.gradient,
        )
        found.setdefault((name, "gradient", gradient), label)
        found.setdefault((name, *arguments), label)
    return set(found.values())


ONE_OF_EACH: set[str] = one_of_each()


BESIDE = {"vae_optimal_prior"}  # with a network beside them, which stock engines refuse to train
OTHER_LATENTS = {"hierarchical", "ladder", "ladder_conv", "top_down", "tutorial"}  # than "z"
# Estimators that compare the dimensions of one latent refuse these pairs.
DIMENSIONS = ("TCELBO", "DIPELBO")
WITHOUT_DIMENSIONS = {
    *("full_normal", "full_normal_conv", "low_rank_normal", "mixture"),
    *(
        "iaf",
        "coupling",
        "spline",
        "cvae_flow",
        "hierarchical",
        "ladder",
        "ladder_conv",
        "top_down",
    ),
    "semi_implicit",
    "not_at_random",
}
# Pairs whose guide can only weigh its own draws.
OWN_DRAWS = {"semi_implicit"}
# Pairs whose slope in z jumps, at a ReLU or a bound of a transform.
JUMPING = {
    *("vae_conv", "vae_residual", "full_normal_conv"),
    *("coupling", "spline", "cvae_flow", "top_down"),
}
# Pairs whose model's dreams are none of the guide's: it draws x_missing, or a mask of its own.
NO_DREAMS = OWN_DRAWS | {"not_at_random"}
WEIGHS_ANY = [pair for pair in ALL_PAIRS if pair not in OWN_DRAWS]


def cross() -> Iterator[Any]:
    """All pairs with all estimators; beyond a cross of both, marked slow."""
    pairs = {"vae_bernoulli": ALL_ESTIMATORS, "vae_vamp_prior": ONE_OF_EACH}
    labels = {"ELBO-pathwise", "IWELBO-dreg", "ReweightedWakeSleep-reweighted"}
    for pair, (label, estimator) in itertools.product(ALL_PAIRS, ALL_ESTIMATORS.items()):
        if isinstance(estimator, elbo.FactorELBO) and pair in OTHER_LATENTS:
            continue  # it is told a latent's name
        if isinstance(getattr(estimator, "beta", 1), elbo.penalties.Penalty) and pair in BESIDE:
            continue  # its KL lacks a constant
        if estimator.sign < 0 and pair == "tutorial":
            continue  # one module holds both programs: which parameters are the guide's?
        if label.startswith(DIMENSIONS) and pair in WITHOUT_DIMENSIONS:
            continue
        if pair in OWN_DRAWS and isinstance(estimator, elbo.AnnealedELBO):
            continue  # it moves them
        if pair in JUMPING and getattr(estimator, "step", 0.0):
            continue  # and differentiates the slope
        if pair in NO_DREAMS and getattr(estimator, "insomnia", 1.0) < 1:
            continue  # the model's dreams are none of the guide's draws
        fast = label in labels or label in pairs.get(pair, ())
        marks = [] if fast else [pytest.mark.slow]
        yield pytest.param(pair, estimator, id=f"{label}-{pair}", marks=marks)
