"""Values of every dtype: the log-density of the same numbers in float64, or one error that helps.

Data come as bytes, booleans or halves as often as they come as floats.
"""

import copy
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ppvae
from ppvae import conditionals, diagnostics, elbo, guides, metrics, models, nets, posteriors
from ppvae.distributions import BinaryVector, DiagonalNormal, UnitNormal, WordCounts
from ppvae.terms import log_density

N, D, Z, CONTEXT = 6, 5, 2, 3
WHOLE = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*WHOLE, *HALVES, torch.float32, torch.float64]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def flow(layers, **options):
    layers = layers(D, CONTEXT, hidden=(8,), **options)
    return posteriors.Flow(nets.mlp(Z, 2 * D + CONTEXT), layers, D, context_dim=CONTEXT)


# name -> a head, and the largest whole number it is asked about: a byte wraps around beyond 255
HEADS = {
    "Bernoulli": (lambda: conditionals.Bernoulli(nets.mlp(Z, D)), 1),
    "Bernoulli-grey": (lambda: conditionals.Bernoulli(nets.mlp(Z, D), grey=True), 1),
    "Normal": (lambda: conditionals.Normal(nets.mlp(Z, 2 * D)), 100),
    "Normal-fixed": (lambda: conditionals.Normal(nets.mlp(Z, D), scale=0.3), 100),
    "Normal-tensor": (lambda: conditionals.Normal(nets.mlp(Z, D), scale=torch.rand(D) + 1), 100),
    "Normal-Scale": (
        lambda: conditionals.Normal(nets.mlp(Z, D), conditionals.Scale(shape=D)),
        100,
    ),
    "Categorical": (lambda: conditionals.Categorical(nets.mlp(Z, D * 101), 101), 100),
    "Categorical-label": (lambda: conditionals.Categorical(nets.mlp(Z, 101), 101, 0), 100),
    "BagOfWords": (lambda: conditionals.BagOfWords(nets.mlp(Z, D), 9), 100),
    "Poisson": (lambda: conditionals.Poisson(nets.mlp(Z, D)), 100),
    "NegativeBinomial": (lambda: conditionals.NegativeBinomial(nets.mlp(Z, 2 * D)), 100),
    "ZeroInflated": (
        lambda: conditionals.ZeroInflated(conditionals.Poisson(nets.mlp(Z, 2 * D))),
        100,
    ),
    "BetaBinomial": (lambda: conditionals.BetaBinomial(nets.mlp(Z, 2 * D), 100), 100),
    "Multinomial": (lambda: conditionals.Multinomial(nets.mlp(Z, D)), 100),
    "DirichletMultinomial": (
        lambda: conditionals.DirichletMultinomial(nets.mlp(Z, D + 1)),
        100,
    ),
    "DiscretizedLogistic": (
        lambda: conditionals.DiscretizedLogistic(nets.mlp(Z, 6 * D), 101, 2),
        100,
    ),
    "Ordinal": (lambda: conditionals.Ordinal(nets.mlp(Z, D), 101), 100),
    "ContinuousBernoulli": (lambda: conditionals.ContinuousBernoulli(nets.mlp(Z, D)), 1),
    "Beta": (lambda: conditionals.Beta(nets.mlp(Z, 2 * D)), 1),
    "Laplace": (lambda: conditionals.Laplace(nets.mlp(Z, 2 * D)), 100),
    "StudentT": (lambda: conditionals.StudentT(nets.mlp(Z, 3 * D)), 100),
    "LogNormal": (lambda: conditionals.LogNormal(nets.mlp(Z, 2 * D)), 100),
    "Gamma": (lambda: conditionals.Gamma(nets.mlp(Z, 2 * D)), 100),
    "VonMises": (lambda: conditionals.VonMises(nets.mlp(Z, 2 * D)), 100),
    "Affine": (
        lambda: conditionals.Affine(conditionals.Normal(nets.mlp(Z, 2 * D)), 1.0, torch.ones(D)),
        100,
    ),
    "Columns": (
        lambda: conditionals.Columns(
            nets.mlp(Z, 10),
            dict.fromkeys("abc", conditionals.NegativeBinomial)
            | dict.fromkeys("de", conditionals.Normal),
        ),
        100,
    ),
    "StandardNormal": (lambda: conditionals.StandardNormal(D), 100),
    "Mixture": (lambda: conditionals.Mixture(3, D), 100),
    "VampPrior": (
        lambda: conditionals.VampPrior(conditionals.Normal(nets.mlp(4, 2 * D)), 3, 4),
        100,
    ),
    "FullNormal": (lambda: posteriors.FullNormal(nets.mlp(Z, D * (D + 3) // 2), D), 100),
    "LowRankNormal": (lambda: posteriors.LowRankNormal(nets.mlp(Z, 3 * D), 1), 100),
    "posteriors.Mixture": (lambda: posteriors.Mixture(nets.mlp(Z, 2 * (1 + 2 * D)), 2), 100),
    "iaf": (lambda: flow(posteriors.iaf), 1),
    "coupling": (lambda: flow(posteriors.coupling), 1),
    "spline": (lambda: flow(posteriors.spline, num_layers=1, bins=3), 1),
}
POSITIVE = {"LogNormal", "Gamma"}
# torch factorises, and a flow's networks multiply, numbers of one dtype only
ONE_DTYPE = {"LowRankNormal", "iaf", "coupling", "spline"}


def test_every_head_is_swept():
    exported = {*conditionals.__all__, *posteriors.__all__}
    exported -= {"Conditional", "Elementwise", "suggest", "heads_for", "Scale", "Flow"}
    # no density, or one of their own draws or of codes alone: their own tests have float64
    exported -= {"Simulator", "Implicit", "SemiImplicit", "GumbelCodes", "CodePrior"}
    exported -= {"OptimalPrior", "SoftNormal", "Reshaped"}  # tests of their own, test_maps.py
    tested = {name.split("-")[0].split(".")[-1] for name in HEADS}
    assert exported - {"MixtureOfNormals"} <= tested


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, id=f"{name}-{dtype}")
        for name in HEADS
        for dtype in DTYPES
        if name != "Beta" or dtype not in WHOLE
    ],
)
def test_log_prob_is_that_of_the_same_numbers(name, dtype, wide):
    make, largest = HEADS[name]
    own = torch.float64 if wide else torch.float32
    head = make().to(own)
    exact = copy.deepcopy(head).double()
    z = torch.randn(N, Z, dtype=own)
    largest = 1 if dtype == torch.bool else largest
    lowest = 1 if name in POSITIVE else 0
    x = torch.randint(lowest, largest + 1, (N, *head(z).event_shape)).to(dtype)
    x = x / 2 + 0.25 if name == "Beta" else x
    if name in ONE_DTYPE and dtype == torch.float64 and not wide:
        with pytest.raises(TypeError, match=r"value is torch.float64 .*float32; give value.to"):
            head(z).log_prob(x)
        return
    found = head(z).log_prob(x)
    torch.testing.assert_close(
        found.double(),
        exact(z.double()).log_prob(x.double()),
        rtol=1e-9 if wide else 3e-4 if name == "iaf" else 1e-5,
        atol=1e-9 if wide else 1e-4,
    )
    whole = not dtype.is_floating_point or dtype in HALVES
    # a value picks a logit; torch solves for the difference of value and mean in its own dtype
    always = name.startswith("Categorical") or name == "FullNormal"
    assert found.dtype == (own if whole or always else torch.promote_types(dtype, own))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_numbers_that_overflow_in_half_precision(dtype):
    """The square of 300 is 90,000, more than float16 holds."""
    x = torch.full((3,), 300.0, dtype=dtype)
    for fn in (UnitNormal(torch.zeros(3)), DiagonalNormal(torch.zeros(3), 1.0)):
        exact = 3 * dist.Normal(0.0, 1.0).log_prob(x[0].double())
        torch.testing.assert_close(fn.log_prob(x).double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_whole_numbers_beyond_float32_under_a_normal(dtype):
    """1e9 + 1 is no float32, but its distance from a mean of 1e9 is."""
    x = torch.tensor([10**9, 10**9 + 1, 10**9 + 5])
    found = DiagonalNormal(torch.full((3,), 1e9), 2.0).log_prob(x.to(dtype))
    exact = dist.Normal(1e9, 2.0).log_prob(x.double()).sum()
    torch.testing.assert_close(found.double(), exact.double(), rtol=1e-6, atol=0)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool], ids=str)
def test_whole_numbers_under_a_mask_and_under_pyros_bernoulli(dtype):
    x = torch.tensor([[0, 1, 1], [1, 0, 0]])
    law = dist.Bernoulli(logits=torch.tensor([0.3, -1.0, 2.0])).expand([2, 3])
    for fn in (law.to_event(1), law.mask(x.bool()).to_event(1)):
        site = {"name": "x", "fn": fn, "mask": None, "is_observed": True, "args": (), "kwargs": {}}
        found = log_density({**site, "value": x.to(dtype)})
        assert torch.equal(found, log_density({**site, "value": x.float()}))


def test_bytes_do_not_wrap_around():
    ones = torch.ones(1, 2, dtype=torch.uint8)
    exact = -2 * math.log1p(math.exp(-3.0))
    assert BinaryVector(torch.full((1, 2), 3.0)).log_prob(ones).item() == pytest.approx(exact)
    counts = torch.full((2,), 255, dtype=torch.uint8)
    found = WordCounts(torch.tensor([0.0, 1.0])).log_prob(counts)
    exact = 255 * torch.tensor([0.0, 1.0], dtype=torch.float64).log_softmax(0).sum()
    assert found.item() == pytest.approx(exact.item())


# ------------------------------------------------------------------------------ pairs


class Casting(nn.Module):
    """A user's own network, which takes data of any dtype."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.to(next(self.net.parameters()).dtype))


LIKELIHOODS = ["Bernoulli", "Bernoulli-grey", "Normal", "Normal-Scale", "Categorical", "BagOfWords"]


def pair(likelihood, own):
    torch.manual_seed(0)
    model = models.VAE(HEADS[likelihood][0](), latent_dim=Z)
    guide = guides.Normal(Casting(nets.mlp(D, 2 * Z)))
    return model.to(own), guide.to(own)


def values(likelihood, x, own=torch.float32):
    """What is reported of a pair, and what a step maximised, of tensors and of a DataLoader."""
    model, guide = pair(likelihood, own)
    ppvae.check_pair(model, guide, x)
    torch.manual_seed(1)
    found = [elbo.ELBO().evaluate(model, guide, x), elbo.IWELBO(3).evaluate(model, guide, x)]
    evidence = diagnostics.log_evidence(model, guide, x, num_particles=30, seed=0)
    found.append(evidence.log_evidence)
    for data in (x, DataLoader(TensorDataset(x), batch_size=N)):
        model, guide = pair(likelihood, own)
        torch.manual_seed(2)
        svi = ppvae.SVI(model, guide)
        history = ppvae.fit(svi, data, epochs=2, batch_size=N, progress=False)
        found.append(torch.tensor(history.column("train_objective")))
    return [value.double() for value in found]


@dtypes
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_a_pair_reports_what_it_reports_of_the_same_numbers_as_floats(likelihood, dtype):
    x = torch.randint(2, (N, D))
    found, exact = values(likelihood, x.to(dtype)), values(likelihood, x.float())
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@dtypes
def test_a_network_of_another_dtype_says_so(dtype, wide):
    own, x = torch.float64 if wide else torch.float32, torch.randint(2, (N, D)).to(dtype)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(Z, D)), latent_dim=Z).to(own)
    guide = guides.Normal(nets.mlp(D, 2 * Z)).to(own)
    if dtype == own:
        ppvae.check_pair(model, guide, x)
        return
    message = f"network of Normal has {own} parameters, and was given {dtype}: give x.to\\({own}\\)"
    for data in (x, DataLoader(TensorDataset(x), batch_size=N)):
        with pytest.raises(ppvae.PairError, match=message):
            ppvae.fit(ppvae.SVI(model, guide), data, epochs=1, progress=False)
    with pytest.raises(ppvae.PairError, match=message):
        ppvae.check_pair(model, guide, x)
    with pytest.raises(TypeError, match=message):
        elbo.ELBO().evaluate(model, guide, x)


def test_another_fault_of_a_network_stays_what_it_is():
    class Broken(nn.Linear):
        def forward(self, x):
            raise RuntimeError("no memory")

    with pytest.raises(RuntimeError, match="no memory"):
        conditionals.Normal(Broken(3, 4))(torch.zeros(N, 3, dtype=torch.float64))


@dtypes
@pytest.mark.parametrize("full", [False, True])
def test_a_gaussian_mixture_of_values_of_any_dtype(dtype, full):
    model = models.GaussianMixture(3, D, full)
    guide, x = guides.Responsibilities(model), torch.randint(2, (N, D)).to(dtype)
    found = elbo.ELBO().evaluate(model, guide, x).double()
    torch.testing.assert_close(found, model.double().log_evidence(x.double()), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------ metrics


@dtypes
def test_scores_of_clusters_of_any_dtype(dtype):
    clusters, labels = torch.tensor([1, 1, 0, 0, 0]), torch.tensor([0, 0, 1, 1, 0])
    exact = metrics.clustering(clusters, labels, 2)
    assert metrics.clustering(clusters.to(dtype), labels.to(dtype), 2) == exact
    if dtype != torch.bfloat16:  # numpy has none
        array = clusters.to(dtype).numpy()
        assert metrics.clustering(array, labels.to(dtype).numpy(), 2) == exact
    assert metrics.clustering(clusters.numpy().astype(np.longdouble), labels, 2) == exact


@dtypes
def test_perplexity_of_any_dtype(dtype):
    words = torch.full((300,), 1 if dtype == torch.bool else 100)
    log_p = -2.0 * torch.arange(1, 301)
    for given in (log_p.to(dtype) if dtype.is_floating_point else log_p,):
        found = metrics.perplexity(given, words.to(dtype))
        assert found == metrics.perplexity(given.double(), words.double())
