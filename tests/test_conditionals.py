"""Conditionals: densities against closed forms, shapes under plates, precision, tracing."""

import math
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import nn
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from ppvae import conditionals, distributions, nets
from ppvae.auxiliary import own_parameters
from ppvae.terms import log_density

K, N, Z, D = 3, 4, 2, 5


@pytest.fixture(autouse=True)
def _float64():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    with pyro.validation_enabled(True):
        yield
    torch.set_default_dtype(torch.float32)


def _posterior():
    return conditionals.Normal(nets.mlp(D, 8, 2 * Z))


def _real(*shape):
    return torch.randn(shape)


def _binary(*shape):
    return torch.randint(2, shape).to(torch.get_default_dtype())


def _counts(*shape):
    return torch.randint(5, shape).to(torch.get_default_dtype())


def _unit(*shape):
    return torch.rand(shape).clamp(0.01, 0.99)


def _positive(*shape):
    return torch.rand(shape) + 0.1


def _levels(size, low=0):
    return lambda *shape: torch.randint(low, low + size, shape).to(torch.get_default_dtype())


KINDS = {
    "size": conditionals.Normal,
    "visits": partial(conditionals.NegativeBinomial, theta=2.0),
    "weight": conditionals.Normal,
    "job": partial(conditionals.Categorical, num_classes=3),
    "grade": partial(conditionals.Ordinal, num_levels=3),
}


def _table(*shape):
    draws = (_real, _counts, _real, _levels(3), _levels(3))
    return torch.cat([draw(*shape[:-1], 1) for draw in draws], -1)


def _scale():
    return conditionals.Scale(0.7, (D,))


# name of an export -> variants: (make a conditional, draw a value of its support, event shape)
LIKELIHOODS = {
    "Normal": [
        (lambda: conditionals.Normal(nets.mlp(Z, 8, 2 * D)), _real, (D,)),
        (
            lambda: conditionals.Normal(nets.mlp(Z, 2 * D), positive=nn.functional.softplus),
            _real,
            (D,),
        ),
        (lambda: conditionals.Normal(nets.mlp(Z, 8, D), scale=0.3), _real, (D,)),
        (
            lambda: conditionals.Normal(
                nets.conv_decoder(Z, (4, 6, 5), (3,), hidden=()), event_dim=3
            ),
            _real,
            (2, 6, 5),
        ),
    ],
    "SoftNormal": [
        (lambda: conditionals.SoftNormal(nets.mlp(Z, 8, 2 * D), event_dim=1), _real, (D,)),
        (
            lambda: conditionals.SoftNormal(nets.conv_decoder(Z, (4, 6, 5), (3,), hidden=())),
            _real,
            (2, 6, 5),
        ),
    ],
    "Scale": [
        (lambda: conditionals.Normal(nets.mlp(Z, 8, D), conditionals.Scale(0.7)), _real, (D,)),
        (
            lambda: conditionals.Normal(nets.mlp(Z, 8, D), conditionals.Scale(0.7, (D,))),
            _real,
            (D,),
        ),
        (
            lambda: conditionals.Normal(
                nets.conv_decoder(Z, (2, 6, 5), (3,), hidden=()),
                conditionals.Scale(0.7, (2, 1, 1)),
                event_dim=3,
            ),
            _real,
            (2, 6, 5),
        ),
    ],
    "Bernoulli": [
        (lambda: conditionals.Bernoulli(nets.mlp(Z, 8, D)), _binary, (D,)),
        (
            lambda: conditionals.Bernoulli(nets.mlp(Z, 8, D), grey=True),
            lambda *shape: torch.rand(shape),
            (D,),
        ),
        (
            lambda: conditionals.Bernoulli(
                nets.conv_decoder(Z, (1, 6, 5), (3,), hidden=()), event_dim=3
            ),
            _binary,
            (1, 6, 5),
        ),
    ],
    "Categorical": [
        (
            lambda: conditionals.Categorical(nets.mlp(Z, 8, D * 7), 7),
            lambda *shape: torch.randint(7, shape),
            (D,),
        ),
        (
            lambda: conditionals.Categorical(nets.mlp(Z, 8, 7), 7, event_dim=0),
            lambda *shape: torch.randint(7, shape),
            (),
        ),
        (
            lambda: conditionals.Categorical(
                nets.conv_decoder(Z, (2 * 7, 6, 5), (3,), hidden=()), 7, event_dim=3
            ),
            lambda *shape: torch.randint(7, shape),
            (2, 6, 5),
        ),
    ],
    "BagOfWords": [
        (lambda: conditionals.BagOfWords(nets.mlp(Z, 8, D), total_count=9), _counts, (D,))
    ],
}
LIKELIHOODS |= {
    "Poisson": [(lambda: conditionals.Poisson(nets.mlp(Z, 8, D)), _counts, (D,))],
    "NegativeBinomial": [
        (lambda: conditionals.NegativeBinomial(nets.mlp(Z, 8, 2 * D)), _counts, (D,)),
        (lambda: conditionals.NegativeBinomial(nets.mlp(Z, 8, D), _scale()), _counts, (D,)),
    ],
    "ZeroInflated": [
        (
            lambda: conditionals.ZeroInflated(conditionals.NegativeBinomial(nets.mlp(Z, 8, 3 * D))),
            _counts,
            (D,),
        ),
    ],
    "BetaBinomial": [
        (lambda: conditionals.BetaBinomial(nets.mlp(Z, 8, 2 * D), 5), _counts, (D,)),
        (
            lambda: conditionals.BetaBinomial(
                nets.mlp(Z, 8, D), torch.tensor([4, 5, 6, 7, 8]), _scale()
            ),
            _counts,
            (D,),
        ),
    ],
    "Multinomial": [(lambda: conditionals.Multinomial(nets.mlp(Z, 8, D), 9), _counts, (D,))],
    "DirichletMultinomial": [
        (lambda: conditionals.DirichletMultinomial(nets.mlp(Z, D + 1), None, 9), _counts, (D,)),
        (
            lambda: conditionals.DirichletMultinomial(
                nets.mlp(Z, D), conditionals.Scale(2.0), total_count=9
            ),
            _counts,
            (D,),
        ),
    ],
    "DiscretizedLogistic": [
        (lambda: conditionals.DiscretizedLogistic(nets.mlp(Z, 2 * D), 8), _levels(8), (D,)),
        (
            lambda: conditionals.DiscretizedLogistic(
                nets.conv_decoder(Z, (3 * 3 * 2, 6, 5), (3,), hidden=()), 8, 3, -4, event_dim=3
            ),
            _levels(8, -4),
            (2, 6, 5),
        ),
    ],
    "Ordinal": [
        (lambda: conditionals.Ordinal(nets.mlp(Z, 8, D), 4), _levels(4), (D,)),
        (lambda: conditionals.Ordinal(nets.mlp(Z, 8, D), 2, D), _levels(2), (D,)),
    ],
    "ContinuousBernoulli": [
        (lambda: conditionals.ContinuousBernoulli(nets.mlp(Z, 8, D)), _unit, (D,)),
    ],
    "Beta": [(lambda: conditionals.Beta(nets.mlp(Z, 8, 2 * D)), _unit, (D,))],
    "Laplace": [(lambda: conditionals.Laplace(nets.mlp(Z, 8, 2 * D)), _real, (D,))],
    "StudentT": [
        (lambda: conditionals.StudentT(nets.mlp(Z, 8, 3 * D)), _real, (D,)),
        (lambda: conditionals.StudentT(nets.mlp(Z, 8, D), _scale(), 5.0), _real, (D,)),
    ],
    "LogNormal": [(lambda: conditionals.LogNormal(nets.mlp(Z, 8, 2 * D)), _positive, (D,))],
    "Gamma": [
        (lambda: conditionals.Gamma(nets.mlp(Z, 8, 2 * D)), _positive, (D,)),
        (
            lambda: conditionals.Gamma(nets.mlp(Z, 1), conditionals.Scale(1.0), event_dim=0),
            _positive,
            (),
        ),
    ],
    "VonMises": [(lambda: conditionals.VonMises(nets.mlp(Z, 8, 2 * D)), _real, (D,))],
    "Affine": [
        (
            lambda: conditionals.Affine(
                conditionals.Normal(nets.mlp(Z, 8, 2 * D)), torch.randn(D), torch.rand(D) + 1
            ),
            _real,
            (D,),
        ),
        (
            lambda: conditionals.Affine(conditionals.Gamma(nets.mlp(Z, 2 * D)), 0.0, 3.0),
            _positive,
            (D,),
        ),
    ],
    "Columns": [
        (
            lambda: conditionals.Columns(nets.mlp(Z, 8, conditionals.Columns.width(KINDS)), KINDS),
            _table,
            (D,),
        ),
    ],
}
PRIORS = {
    "StandardNormal": [
        (lambda: conditionals.StandardNormal(Z), _real, (Z,)),
        (lambda: conditionals.StandardNormal((2, 3, 3)), _real, (2, 3, 3)),
    ],
    "Mixture": [
        (lambda: conditionals.Mixture(6, Z), _real, (Z,)),
        (lambda: conditionals.Mixture(6, (2, 3, 3)), _real, (2, 3, 3)),
    ],
    "VampPrior": [
        (lambda: conditionals.VampPrior(_posterior(), 6, D, mean=0.5), _real, (Z,)),
        (lambda: conditionals.VampPrior(_posterior(), 6, (D,), support="real"), _real, (Z,)),
    ],
}
PRIORS["OptimalPrior"] = [
    (
        lambda: conditionals.OptimalPrior(
            conditionals.StandardNormal(Z), nets.mlp(Z, 8, 1), num_candidates=20
        ),
        _real,
        (Z,),
    )
]
# priors of codes are for codes alone, simulators have no density: test_vq.py, test_simulator.py
NOT_CONDITIONALS = {"Conditional", "CodePrior", "Elementwise", "Reshaped", "Simulator"}
NOT_CONDITIONALS |= {"heads_for", "suggest"}


def _variants(table, marks=()):
    return [
        pytest.param(*variant, id=f"{name}-{i}", marks=marks)
        for name, variants in table.items()
        for i, variant in enumerate(variants)
    ]


likelihoods = pytest.mark.parametrize(("make", "draw", "event"), _variants(LIKELIHOODS))
priors = pytest.mark.parametrize(("make", "draw", "event"), _variants(PRIORS))
everything = pytest.mark.parametrize(("make", "draw", "event"), _variants(LIKELIHOODS | PRIORS))


def test_every_export_is_tested():
    assert set(LIKELIHOODS) | set(PRIORS) | NOT_CONDITIONALS == set(conditionals.__all__)


# ---------------------------------------------------------------- laws of every conditional


@likelihoods
@pytest.mark.parametrize("leading", [(N,), (K, N), (2, K, N)])
def test_batch_shape_is_the_leading_dimensions(make, draw, event, leading):
    p = make()(torch.randn(*leading, Z))
    assert (p.batch_shape, p.event_shape) == (leading, event)
    assert p.log_prob(draw(N, *event)).shape == leading
    assert p.sample().shape == leading + event


@likelihoods
def test_particles_equal_a_loop(make, draw, event):
    conditional, z, x = make(), torch.randn(K, N, Z), draw(N, *event)
    together = conditional(z).log_prob(x)
    loop = torch.stack([conditional(row).log_prob(x) for row in z])
    torch.testing.assert_close(together, loop)


@everything
def test_shapes_inside_plates(make, draw, event):
    """A particle plate and a data plate expand an unexpanded distribution to (K, N)."""
    conditional = make()

    def program():
        with pyro.plate("particles", K, dim=-2), pyro.plate("data", N, dim=-1):
            pyro.sample("free", conditional(torch.randn(Z)))
            return pyro.sample("x", conditional(torch.ones(Z)), obs=draw(N, *event))

    trace = pyro.poutine.trace(program).get_trace()
    trace.compute_log_prob()
    assert trace.nodes["free"]["value"].shape == (K, N, *event)
    values = trace.nodes["free"]["value"].flatten(0, 1)
    assert len(values.unique(dim=0)) > 1 or event == ()
    assert trace.nodes["free"]["log_prob"].shape == (K, N)
    assert trace.nodes["x"]["log_prob"].shape == (K, N)
    expected = conditional(torch.ones(Z)).expand((N,)).log_prob(trace.nodes["x"]["value"])
    torch.testing.assert_close(trace.nodes["x"]["log_prob"], expected.expand(K, N))


@everything
def test_every_parameter_gets_a_gradient(make, draw, event):
    conditional, z = make(), torch.randn(N, Z)
    value = conditional(z).log_prob(draw(N, *event)).sum()
    own = own_parameters(conditional)  # those of a ratio are constants to the density
    assert value.requires_grad or not own
    if value.requires_grad:
        value.backward()
    for key, parameter in own.items():
        assert parameter.grad is not None, key
        assert parameter.grad.abs().sum() > 0, key


@everything
def test_log_prob_is_float32_under_bf16(make, draw, event):
    torch.set_default_dtype(torch.float32)
    conditional, x = make(), draw(N, *event)
    z = torch.randn(N, Z)
    full = conditional(z).expand((N,)).log_prob(x)
    with torch.autocast("cpu", torch.bfloat16):
        p = conditional(z).expand((N,))
        mixed = p.log_prob(x)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed, full, rtol=0.1, atol=0.3)
    low = conditional.bfloat16()(z.bfloat16()).expand((N,)).log_prob(x)
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, full, rtol=0.1, atol=0.3)


@everything
def test_modules_convert_to_float64(make, draw, event):
    torch.set_default_dtype(torch.float32)
    conditional = make().double()
    p = conditional(torch.randn(N, Z, dtype=torch.float64)).expand((N,))
    assert p.log_prob(draw(N, *event).double()).dtype == torch.float64


ONE_OF_EACH = {name: variants[:1] for name, variants in (LIKELIHOODS | PRIORS).items()}
TRACED = {"Normal", "Bernoulli", "Categorical", "NegativeBinomial", "Columns", "Mixture"}


@pytest.mark.parametrize(
    ("make", "draw", "event"),  # one of each, and a convolutional one
    _variants({name: some for name, some in ONE_OF_EACH.items() if name in TRACED})
    + _variants(
        {name: some for name, some in ONE_OF_EACH.items() if name not in TRACED}
        | {"image": LIKELIHOODS["Bernoulli"][2:]},
        marks=pytest.mark.slow,
    ),
)
def test_log_prob_and_gradient_trace_with_symbolic_shapes(make, draw, event):
    conditional = make()
    parameters, buffers = dict(conditional.named_parameters()), dict(conditional.named_buffers())
    own = own_parameters(conditional)

    def log_prob(parameters, buffers, z, x):
        p = torch.func.functional_call(conditional, parameters | buffers, (z,))
        value = p.expand(x.shape[:1]).log_prob(x).sum() + 0 * z.sum()
        return value, torch.autograd.grad(value, [z, *(parameters[name] for name in own)])

    def inputs(n):
        return parameters, buffers, torch.randn(n, Z, requires_grad=True), draw(n, *event)

    with pyro.validation_enabled(False):
        graph = make_fx(log_prob, tracing_mode="symbolic")(*inputs(N))
        other = inputs(7)
        torch.testing.assert_close(graph(*other), log_prob(*other))


@likelihoods
def test_values_can_be_hidden(make, draw, event):
    """NaN under a mask counts 0 and has no gradient, alone and as a site of a pair."""
    conditional, z, x = make(), torch.randn(K, N, Z), draw(N, *event)
    x = x.to(torch.get_default_dtype())
    observed = torch.rand(x.shape) < 0.6
    gaps = torch.where(observed, x, math.nan)
    if isinstance(conditional(z), distributions.WordCounts):
        with pytest.raises(TypeError, match="no log-probability of single values"):
            distributions.masked(conditional(z), observed)
        return
    fn = conditional(z)
    each = (fn.base_dist if event else fn).log_prob(x)
    expected = torch.where(observed, each, 0.0).reshape(K, N, -1).sum(-1)

    def program():
        with pyro.plate("particles", K, dim=-2), pyro.plate("data", N, dim=-1):
            fn = distributions.masked(conditional(z), observed)
            pyro.sample("x", fn, obs=gaps)

    trace = pyro.poutine.trace(program).get_trace()
    alone = distributions.masked(conditional(z), observed).log_prob(gaps)
    for found in (alone, log_density(trace.nodes["x"])):
        torch.testing.assert_close(found, expected)
        slopes = torch.autograd.grad(found.sum(), list(conditional.parameters()))
        assert all(slope.isfinite().all() for slope in slopes)


@priors
def test_priors_ignore_their_context(make, draw, event):
    prior, z = make(), draw(K, N, *event)
    bare, given = prior(), prior(torch.randn(N, 9))
    assert bare.batch_shape == given.batch_shape == ()
    torch.testing.assert_close(bare.log_prob(z), given.log_prob(z))
    torch.testing.assert_close(bare.expand((K, N)).log_prob(z), bare.log_prob(z))
    assert bare.expand((K, N)).log_prob(z).shape == (K, N)


# ---------------------------------------------------------------- densities


def test_normal_predicted_scale_is_exp_of_log_sigma():
    conditional = _posterior()
    x, z = torch.randn(N, D), torch.randn(N, Z)
    loc, raw = conditional.net(x).detach().chunk(2, -1)
    expected = stats.norm(loc.numpy(), raw.exp().numpy()).logpdf(z.numpy()).sum(-1)
    torch.testing.assert_close(conditional(x).log_prob(z).detach(), torch.tensor(expected))
    conditional.positive = nn.functional.softplus
    scale = nn.functional.softplus(raw)
    torch.testing.assert_close(conditional(x).stddev, scale)
    expected = stats.norm(loc.numpy(), scale.numpy()).logpdf(z.numpy()).sum(-1)
    torch.testing.assert_close(conditional(x).log_prob(z).detach(), torch.tensor(expected))


def test_normal_splits_images_on_channels():
    net = nets.conv_decoder(Z, (4, 6, 5), (3,), hidden=())
    z = torch.randn(N, Z)
    p = conditionals.Normal(net, event_dim=3)(z)
    torch.testing.assert_close(p.mean, net(z)[:, :2])
    torch.testing.assert_close(p.stddev, net(z)[:, 2:].exp())


@pytest.mark.parametrize("event_dim", [1, 2, 3])
@pytest.mark.parametrize("scale_shape", ["float", (), (5,), (1, 5), (2, 1, 1), (4, 2, 3, 5)])
@pytest.mark.parametrize("batch", [None, (4,), (6, 4)])
def test_diagonal_normal_is_independent_normal(event_dim, scale_shape, batch):
    loc = torch.randn(4, 2, 3, 5)
    scale = 0.7 if scale_shape == "float" else torch.rand(scale_shape) + 0.5
    p = distributions.DiagonalNormal(loc, scale, event_dim)
    expected = dist.Normal(loc, scale).to_event(event_dim)
    if batch is not None:
        batch = torch.Size(batch) + loc.shape[1 : 4 - event_dim]
        p, expected = p.expand(batch), expected.expand(batch)
    assert p.shape() == expected.shape()
    assert p.batch_shape == expected.batch_shape
    value = torch.randn(6, 4, 2, 3, 5)
    torch.testing.assert_close(p.log_prob(value), expected.log_prob(value))
    torch.testing.assert_close(p.log_prob(value[0]), expected.log_prob(value[0]))
    torch.testing.assert_close(p.entropy(), expected.entropy())
    torch.manual_seed(1)
    draw = p.rsample((2,))
    torch.manual_seed(1)
    torch.testing.assert_close(draw, expected.rsample((2,)))


def test_diagonal_normal_has_the_closed_form_kl():
    loc, scale = torch.randn(N, Z), torch.rand(N, Z) + 0.1
    q = distributions.DiagonalNormal(loc, scale).expand((K, N))
    kl = kl_divergence(q, conditionals.StandardNormal(Z)().expand((K, N)))
    expected = 0.5 * (scale**2 + loc**2 - 1 - 2 * scale.log()).sum(-1)
    torch.testing.assert_close(kl, expected.expand(K, N))


def test_bernoulli_and_its_grey_form():
    net, z = nets.mlp(Z, D), torch.randn(N, Z)
    probs = net(z).sigmoid()
    x, grey = _binary(N, D), torch.rand(N, D)

    def cross_entropy(x):
        return (x * probs.log() + (1 - x) * (1 - probs).log()).sum(-1)

    torch.testing.assert_close(conditionals.Bernoulli(net)(z).log_prob(x), cross_entropy(x))
    p = conditionals.Bernoulli(net, grey=True)(z)
    torch.testing.assert_close(p.log_prob(grey), cross_entropy(grey))
    torch.testing.assert_close(p.expand((K, N)).log_prob(grey)[1], cross_entropy(grey))
    # Not a density over [0, 1]: it does not integrate to one.
    grid = torch.linspace(0, 1, 1001).unsqueeze(-1)
    single = conditionals.Bernoulli(nn.Identity(), grey=True)(torch.ones(1))
    assert abs(torch.trapezoid(single.log_prob(grid).exp(), dx=1e-3) - 1) > 0.3


def test_categorical_logits_of_a_value_are_side_by_side():
    net, z, x = nets.mlp(Z, D * 7), torch.randn(N, Z), torch.randint(7, (N, D))
    table = net(z).reshape(N, D, 7).log_softmax(-1)
    expected = sum(table[torch.arange(N), d, x[:, d]] for d in range(D))
    torch.testing.assert_close(conditionals.Categorical(net, 7)(z).log_prob(x), expected)


def test_categorical_image_classes_are_on_the_channel_dimension():
    net = nets.conv_decoder(Z, (2 * 7, 6, 5), (3,), hidden=())
    z, x = torch.randn(N, Z), torch.randint(7, (N, 2, 6, 5))
    p = conditionals.Categorical(net, 7, event_dim=3)(z)
    logits = net(z).reshape(N, 2, 7, 6, 5)
    expected = -nn.functional.cross_entropy(logits.movedim(2, 1), x, reduction="none")
    torch.testing.assert_close(p.log_prob(x), expected.sum((1, 2, 3)))


def test_bag_of_words_is_the_multinomial_less_its_coefficient():
    net, z, counts = nets.mlp(Z, D), torch.randn(N, Z), _counts(N, D)
    log_prob = conditionals.BagOfWords(net)(z).log_prob(counts)
    for i in range(N):
        n = int(counts[i].sum())
        full = torch.distributions.Multinomial(n, logits=net(z)[i]).log_prob(counts[i])
        coefficient = math.lgamma(n + 1) - torch.lgamma(counts[i] + 1).sum()
        torch.testing.assert_close(log_prob[i], full - coefficient)


def test_word_counts_samples():
    logits = torch.randn(2, 1, D)
    n = torch.tensor([0, 3, 4000])
    p = distributions.WordCounts(logits, n).expand((2, 3))
    draw = p.sample((7,))
    assert draw.shape == (7, 2, 3, D)
    torch.testing.assert_close(draw.sum(-1), n.to(draw).expand(7, 2, 3))
    torch.testing.assert_close(
        draw[..., 2, :].mean(0) / 4000, logits[:, 0].softmax(-1), atol=0.02, rtol=0
    )
    torch.testing.assert_close(p.mean[:, 1], 3 * logits[:, 0].softmax(-1))
    with pytest.raises(ValueError, match=r"total_count=.*obs="):
        distributions.WordCounts(logits).sample()


def test_mixture_integrates_to_one():
    prior = conditionals.Mixture(5, 2, spread=2.0)
    nn.init.normal_(prior.logits)
    nn.init.normal_(prior.log_scale, std=0.3)
    axis = torch.linspace(-14, 14, 561)
    grid = torch.cartesian_prod(axis, axis)
    total = prior().log_prob(grid).exp().sum() * (axis[1] - axis[0]) ** 2
    assert abs(total.item() - 1) < 1e-6


def test_mixture_is_the_weighted_sum_and_can_be_initialised():
    prior = conditionals.Mixture(2, Z)
    assert not torch.equal(prior.loc[0], prior.loc[1])
    weights, loc, scale = torch.tensor([0.25, 0.75]), torch.randn(2, Z), torch.rand(2, Z) + 0.1
    prior.initialise(2 * weights, loc, scale)
    z = torch.randn(K, N, Z)
    expected = sum(
        weights[c] * dist.Normal(loc[c], scale[c]).log_prob(z).sum(-1).exp() for c in (0, 1)
    )
    torch.testing.assert_close(prior().log_prob(z), expected.log())
    torch.testing.assert_close(prior.weights().probs, weights)
    with pytest.raises(ValueError, match="log_scale has shape"):
        prior.initialise(weights, loc, scale[:, :1])


@pytest.mark.parametrize("support", ["unit_interval", "real"])
def test_vamp_prior_is_the_mixture_of_posteriors(support):
    posterior = _posterior()
    prior = conditionals.VampPrior(posterior, 6, D, mean=0.5, std=1.0, support=support)
    u = prior.pseudo_inputs.clamp(0, 1) if support == "unit_interval" else prior.pseudo_inputs
    z = torch.randn(K, N, Z)
    each = torch.stack([posterior(row).log_prob(z) for row in u])
    torch.testing.assert_close(prior().log_prob(z), each.exp().mean(0).log())


def test_vamp_prior_calls_the_shared_encoder_once():
    posterior = _posterior()
    prior = conditionals.VampPrior(posterior, 6, D)
    calls = []
    posterior.net.register_forward_hook(lambda *args: calls.append(args[1][0].shape))
    prior().expand((K, N)).log_prob(torch.randn(K, N, Z))
    assert calls == [(6, D)]
    assert prior.posterior is posterior


def test_vamp_prior_starts_at_rows_at_random():
    data = torch.rand(40, D).clamp(0.05, 0.95)
    chosen = [conditionals.VampPrior(_posterior(), 6, D, data=data).pseudo_inputs for _ in range(2)]
    rows = [sorted((data == u).all(1).nonzero().item() for u in of_one) for of_one in chosen]
    assert all(len(set(found)) == 6 for found in rows)
    assert rows[0] != rows[1] and list(range(6)) not in rows


def test_vamp_prior_from_binary_data_still_trains():
    """At exactly 0 and 1 hardtanh has gradient 0, so rows of binary data must be moved inside."""
    data = _binary(20, D)
    prior = conditionals.VampPrior(_posterior(), 6, D, data=data)
    rows = {tuple(row) for row in data.tolist()}
    assert all(tuple(row) in rows for row in prior.pseudo_inputs.round().tolist())
    prior().log_prob(torch.randn(N, Z)).sum().backward()
    assert (prior.pseudo_inputs.grad != 0).all()


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("make", "bad"),
    [
        (lambda: conditionals.Bernoulli(nets.mlp(Z, D)), torch.full((N, D), 0.5)),
        (lambda: conditionals.Bernoulli(nets.mlp(Z, D), grey=True), torch.full((N, D), 1.1)),
        (lambda: conditionals.Categorical(nets.mlp(Z, D * 7), 7), torch.full((N, D), 7)),
        (lambda: conditionals.Categorical(nets.mlp(Z, D * 7), 7), torch.full((N, D), 0.5)),
        (lambda: conditionals.BagOfWords(nets.mlp(Z, D)), torch.full((N, D), -1.0)),
        (lambda: conditionals.BagOfWords(nets.mlp(Z, D)), torch.full((N, D), 0.5)),
        (lambda: conditionals.Normal(nets.mlp(Z, D), 1.0), torch.full((N, D), math.nan)),
        (lambda: conditionals.StandardNormal(D), torch.full((N, D), math.nan)),
        (lambda: conditionals.Mixture(3, D), torch.full((N, D), math.nan)),
    ],
)
def test_supports_are_validated_only_when_pyro_validates(make, bad):
    conditional, z = make(), torch.randn(N, Z)
    with pytest.raises(ValueError, match="support"):
        conditional(z).log_prob(bad)
    with pytest.raises(ValueError, match="support"):
        conditional(z).expand((N,)).log_prob(bad)
    if bad.max() != 7:  # an out-of-range class is an index error whatever the flag
        with pyro.validation_enabled(False):
            conditional(z).log_prob(bad)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: conditionals.Normal(nets.mlp(Z, 5))(torch.zeros(N, Z)), "2 \\* D"),
        (lambda: conditionals.Normal(nets.mlp(Z, 5), scale=-1.0), "positive"),
        (lambda: conditionals.Normal(nets.mlp(Z, 5), scale=torch.tensor([1.0, -1.0])), "positive"),
        (lambda: conditionals.Scale(0.0), "positive"),
        (lambda: conditionals.Scale(0), "positive"),
        (lambda: conditionals.Scale(math.nan), "positive"),
        (lambda: conditionals.Scale(-1, shape=3), "positive"),
        (lambda: conditionals.Categorical(nets.mlp(Z, 5), 3)(torch.zeros(N, Z)), "D \\* 3"),
        (lambda: distributions.DiagonalNormal(torch.zeros(3), 1.0, event_dim=0), "event_dim"),
        (lambda: distributions.BinaryVector(torch.zeros(3), event_dim=0), "event_dim"),
        (lambda: conditionals.VampPrior(_posterior(), 3, D, support="unit"), "unit_interval"),
        (lambda: conditionals.VampPrior(_posterior(), 3, D, data=torch.zeros(2, D)), "at least 3"),
        (
            lambda: conditionals.VampPrior(
                conditionals.Bernoulli(nn.Linear(D, D), event_dim=2), 3, D
            )(),
            "event_dim",
        ),
    ],
)
def test_errors_say_what_to_do(call, match):
    with pytest.raises(ValueError, match=match):
        call()


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: conditionals.Scale(12), r"Scale\(12\): .*12\.0, .*Scale\(shape=12\)"),
        (lambda: conditionals.Scale(init=np.int64(12)), "not a size"),
        (lambda: conditionals.Scale((12,)), "Scale: init is the initial sigma, got tuple"),
        (lambda: conditionals.Scale(torch.ones(12)), "shape="),
        (lambda: conditionals.Normal(nets.mlp(Z, 12), 12), r"Normal\(12\): .*12\.0"),
        (lambda: conditionals.Normal(nets.mlp(Z, 12), "learned"), "Normal: .* got str"),
        (lambda: conditionals.Normal(nets.mlp(Z, 12), True), "Normal: .* got bool"),
    ],
)
def test_a_size_is_no_standard_deviation(call, match):
    with pytest.raises(TypeError, match=match):
        call()


def test_scales_show_their_value_and_shape():
    """``Scale(12.0)`` is a sigma of 12, and what is printed says so."""
    assert repr(conditionals.Scale(12.0)) == "Scale(sigma=12, shape=())"
    scale = conditionals.Scale(0.5, shape=3)
    assert repr(scale) == "Scale(sigma=0.5, shape=(3,))"
    with torch.no_grad():
        scale.log_scale[0] = math.log(0.25)
    assert repr(scale) == "Scale(sigma=0.25..0.5, shape=(3,))"
    assert conditionals.Scale(1, (3,))().tolist() == [1.0, 1.0, 1.0]
    head = conditionals.Normal(nn.Linear(Z, 3), scale)
    assert "sigma=0.25..0.5" in repr(head)
    assert "scale=0.3" in repr(conditionals.Normal(nn.Linear(Z, 3), 0.3))
    fixed = conditionals.Normal(nn.Linear(Z, 3), torch.tensor([0.5, 1.0, 2.0]))
    assert "scale=0.5..2, shape=(3,)" in repr(fixed)


def test_a_tensor_of_scales_moves_and_is_saved_with_its_head():
    sigma, z, x = torch.rand(D) + 0.5, torch.randn(N, Z), torch.randn(N, D)
    head = conditionals.Normal(nets.mlp(Z, D), sigma)
    exact = dist.Normal(head.outputs(z), sigma).to_event(1).log_prob(x)
    torch.testing.assert_close(head(z).log_prob(x), exact)
    other = conditionals.Normal(nets.mlp(Z, D), torch.ones(D))
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(z).log_prob(x), exact)
    assert head.to("meta").scale.is_meta
    assert other.float()(z.float()).log_prob(x.float()).dtype == torch.float32
    assert not [name for name, _ in other.named_parameters() if "scale" in name]


def test_a_conditional_needs_forward():
    with pytest.raises(NotImplementedError, match="forward"):
        conditionals.Conditional(nn.Identity())(torch.zeros(1))


@pytest.mark.parametrize("grey", [False, True])
def test_binary_vector_equals_pyro(grey, float64):
    logits = 5 * torch.randn(2, 3, 4)
    value = torch.rand(3, 4) if grey else torch.bernoulli(torch.full((3, 4), 0.5))
    p = distributions.BinaryVector(logits, event_dim=2, grey=grey).expand((5, 2))
    expected = -torch.nn.functional.binary_cross_entropy_with_logits(
        logits, value.expand(2, 3, 4), reduction="none"
    ).sum((-1, -2))
    torch.testing.assert_close(p.log_prob(value), expected.expand(5, 2))
    q = distributions.BinaryVector(torch.randn(4))
    p = distributions.BinaryVector(torch.randn(4))
    plain = [dist.Bernoulli(logits=d.base_dist.logits).to_event(1) for d in (q, p)]
    torch.testing.assert_close(kl_divergence(q, p), kl_divergence(*plain))


def test_binary_vector_is_accurate_in_float32_at_large_logits():
    logits = torch.tensor([60.0, -60.0, 60.0])
    p = distributions.BinaryVector(logits)
    torch.testing.assert_close(p.log_prob(torch.tensor([1.0, 0.0, 0.0])), torch.tensor(-60.0))


@pytest.mark.parametrize("scale", [(), (3,), (4, 3)])
def test_log_q_along_the_path_has_the_same_value_and_total_derivative(scale):
    """In the parameters; any value but the last draw of this very object is weighed as such."""
    loc = torch.randn(4, 3, dtype=torch.double, requires_grad=True)
    raw = torch.randn(scale, dtype=torch.double, requires_grad=True)
    for log_scale in (None, raw):
        q = distributions.DiagonalNormal(loc, raw.exp(), log_scale=log_scale).expand((2, 4))
        z = q.rsample()
        along = q.log_prob_along_path(z)
        expected = dist.Normal(loc, raw.exp().expand(4, 3)).to_event(1).expand((2, 4)).log_prob(z)
        torch.testing.assert_close(along, expected)
        weights = torch.randn_like(along)
        found = torch.autograd.grad(
            (weights * along).sum(), [loc, raw], retain_graph=True, allow_unused=True
        )
        wanted = torch.autograd.grad((weights * expected).sum(), [loc, raw], retain_graph=True)
        assert found[0] is None  # the path's and the density's own slopes cancel
        torch.testing.assert_close(wanted[0], torch.zeros_like(loc))
        torch.testing.assert_close(found[1], wanted[1])

        leaf = z.detach().requires_grad_()
        for value in (leaf, z + 0, q.expand((2, 4)).rsample()):
            (slope,) = torch.autograd.grad(
                q.log_prob_along_path(value).sum(), value, retain_graph=True
            )
            torch.testing.assert_close(slope, -(value - loc) / raw.exp() ** 2)
        assert q.expand((5, 2, 4)).log_prob_along_path(z).requires_grad


def test_pseudo_inputs_start_around_their_mean():
    prior = conditionals.VampPrior(nn.Identity(), 500, 20, mean=5.0, std=0.1, support="real")
    u = prior.inputs().detach()
    assert u.shape == (500, 20)
    assert abs(u.mean().item() - 5.0) < 4.5 * 0.1 / 100  # of 10,000 numbers
    assert abs(u.std().item() / 0.1 - 1) < 4.5 / (2 * 10_000) ** 0.5
