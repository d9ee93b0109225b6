"""Laws of single values: against mpmath, against their own sums and draws, and as heads."""

import itertools
import math

import mpmath
import pyro.distributions as dist
import pytest
import torch
from mpmath import mp

import ppvae
from ppvae import conditionals, distributions, guides, models, nets

# ------------------------------------------------------------------------------ exact densities


def sigma(x):
    return 1 / (1 + mp.exp(-x))


def poisson(x, log_rate):
    return x * log_rate - mp.exp(log_rate) - mp.loggamma(x + 1)


def negative_binomial(x, log_mean, log_theta):
    mu, theta = mp.exp(log_mean), mp.exp(log_theta)
    value = mp.loggamma(x + theta) - mp.loggamma(theta) - mp.loggamma(x + 1)
    return value + theta * mp.log(theta / (theta + mu)) + x * mp.log(mu / (theta + mu))


def beta_binomial(x, logits, log_c, n=10):
    a, b = mp.exp(log_c) * sigma(logits), mp.exp(log_c) * sigma(-logits)
    return mp.log(mp.binomial(n, x)) + log_beta(x + a, n - x + b) - log_beta(a, b)


def log_beta(a, b):
    return mp.loggamma(a) + mp.loggamma(b) - mp.loggamma(a + b)


def zero_inflated(x, log_rate, gate):
    p = sigma(-gate) * mp.exp(poisson(x, log_rate))
    return mp.log(p + (sigma(gate) if x == 0 else 0))


def discretized_logistic(x, *parameters):
    """Two components of which the parameters are given as logits, means, log scales."""
    l0, l1, m0, m1, s0, s1 = parameters
    weight = mp.exp(l0) / (mp.exp(l0) + mp.exp(l1))
    both = []
    for m, s in ((m0, s0), (m1, s1)):
        high = mp.mpf(1) if x == 255 else sigma((x + 0.5 - m) / mp.exp(s))
        low = mp.mpf(0) if x == 0 else sigma((x - 0.5 - m) / mp.exp(s))
        both.append(high - low)
    return mp.log(weight * both[0] + (1 - weight) * both[1])


def ordinal(x, predictor, first):
    cuts = [first, first + mp.mpf(2) ** -10, first + mp.mpf(2) ** -10 + 3]
    high = mp.mpf(1) if x == 3 else sigma(cuts[int(x)] - predictor)
    low = mp.mpf(0) if x == 0 else sigma(cuts[int(x) - 1] - predictor)
    return mp.log(high - low)


def continuous_bernoulli(x, a):
    return a * x if a == 0 else mp.log(a / mp.expm1(a)) + a * x


def beta(x, logits, log_c):
    a, b = mp.exp(log_c) * sigma(logits), mp.exp(log_c) * sigma(-logits)
    return (a - 1) * mp.log(x) + (b - 1) * mp.log(1 - x) - log_beta(a, b)


def laplace(x, loc, log_scale):
    return -abs(x - loc) / mp.exp(log_scale) - log_scale - mp.log(2)


def student(x, loc, log_scale, log_df):
    v = mp.exp(log_df)
    constant = mp.loggamma((v + 1) / 2) - mp.loggamma(v / 2) - mp.log(mp.pi * v) / 2 - log_scale
    return constant - (v + 1) / 2 * mp.log(1 + ((x - loc) / mp.exp(log_scale)) ** 2 / v)


def log_normal(x, loc, log_scale):
    y = (mp.log(x) - loc) / mp.exp(log_scale)
    return -y * y / 2 - log_scale - mp.log(2 * mp.pi) / 2 - mp.log(x)


def gamma(x, log_mean, log_a):
    a = mp.exp(log_a)
    return a * (log_a - log_mean) - mp.loggamma(a) + (a - 1) * mp.log(x) - a * x / mp.exp(log_mean)


def von_mises(x, loc, log_kappa):
    kappa = mp.exp(log_kappa)
    return kappa * mp.cos(x - loc) - mp.log(2 * mp.pi) - log_bessel(kappa)


def log_bessel(kappa):
    """log I0; its series where mpmath's own would take long."""
    if kappa < 1000:
        return mp.log(mpmath.besseli(0, kappa))
    term = total = mp.mpf(1)
    for k in range(1, 25):
        term *= mp.mpf((2 * k - 1) ** 2) / (k * 8 * kappa)
        total += term
    return kappa - mp.log(2 * mp.pi * kappa) / 2 + mp.log(total)


def grid(*axes):
    return list(itertools.product(*axes))


BIG = (-6.0, -1.0, 0.3, 5.0, 12.0, 17.0, 23.0)  # logarithms: up to 1e10
# name -> (make the law, its exact log-density, points (value, parameters ...))
LAWS = {
    "Poisson": (
        distributions.Poisson,
        poisson,
        grid((0.0, 1.0, 7.0, 1e4), (-20.0, -1.0, 0.7, 9.2)),
    ),
    "NegativeBinomial": (
        distributions.NegativeBinomial,
        negative_binomial,
        grid((0.0, 3.0, 250.0), (-4.0, 0.7, 5.5), BIG),
    ),
    "ZeroInflated": (
        lambda rate, gate: distributions.ZeroInflated(distributions.Poisson(rate), gate),
        zero_inflated,
        grid((0.0, 1.0, 40.0), (-3.0, 0.7, 4.0), (-30.0, -1.0, 0.0, 30.0)),
    ),
    "BetaBinomial": (
        lambda logits, c: distributions.BetaBinomial(logits, c, 10),
        beta_binomial,
        grid((0.0, 4.0, 10.0), (-8.0, -0.4, 0.0, 3.0), BIG),
    ),
    "DiscretizedLogistic": (
        lambda *p: distributions.DiscretizedLogistic(
            *(torch.stack(pair, -1) for pair in (p[:2], p[2:4], p[4:])), num_levels=256
        ),
        discretized_logistic,
        grid(
            (0.0, 3.0, 128.0, 255.0),
            (0.3,),
            (-1.0,),
            (-5.0, 127.4),
            (128.0, 300.0),
            (-2.1, 0.7),
            (5.0,),
        ),
    ),
    "Ordinal": (
        lambda eta, first: distributions.Ordinal(eta, first, torch.tensor([2**-10, 3.0]).to(eta)),
        ordinal,
        grid((0.0, 1.0, 2.0, 3.0), (-40.0, -1.0, 0.0, 30.0), (-1.0, 2.0)),
    ),
    "ContinuousBernoulli": (
        distributions.ContinuousBernoulli,
        continuous_bernoulli,
        grid((0.0, 0.3, 1.0), (-100.0, -5.0, -0.61, -0.59, -0.1, 1e-3, 0.5, 0.7, 17.0, 100.0)),
    ),
    "Beta": (
        distributions.Beta,
        beta,
        grid((1e-6, 0.3, 0.999), (-4.0, 0.0, 2.0), (-6.0, -1.0, 0.7, 5.0, 12.0)),
    ),
    "Laplace": (
        distributions.Laplace,
        laplace,
        grid((-7.0, 0.25, 1e3), (-2.0, 3.0), (-5.0, 0.0, 4.0)),
    ),
    "StudentT": (
        distributions.StudentT,
        student,
        grid((-30.0, 0.2, 1.5), (0.0, 2.0), (-3.0, 0.5), (-4.0, 1.1, 5.0, 13.8, 18.4, 23.0)),
    ),
    "LogNormal": (
        distributions.LogNormal,
        log_normal,
        grid((1e-5, 0.7, 3e4), (-2.0, 3.0), (-1.0, 0.0, 2.0)),
    ),
    "Gamma": (
        distributions.Gamma,
        gamma,
        grid((1e-3, 0.7, 300.0), (-2.0, 0.0, 5.0), (-6.0, 0.3, 5.0, 12.0)),
    ),
    "VonMises": (
        distributions.VonMises,
        von_mises,
        grid((-3.0, 0.0, 1.0, 3.1), (0.0, 2.5), (-5.0, 0.0, 3.9, 5.2, 5.4, 11.5, 16.0)),
    ),
}


def test_every_law_has_an_exact_density():
    other = {
        "Affine",
        "Columns",
        "Multinomial",
        "DirichletMultinomial",
        "Law",
        "NoInverse",
        "Reshaped",
        "masked",
        "partly_known",
    }
    vectors = {"BinaryVector", "DiagonalNormal", "UnitNormal", "WordCounts"}  # test_conditionals.py
    assert set(LAWS) | other | vectors == set(distributions.__all__)


def relative(found, exact):
    exact = torch.tensor([float(e) for e in exact], dtype=torch.double)
    return ((found.double() - exact).abs() / exact.abs().clamp(min=1)).max().item()


def errors(name, dtype):
    """The largest error of the log-density, and of its slope in each parameter."""
    make, exact, points = LAWS[name]
    columns = [torch.tensor(column, dtype=dtype) for column in zip(*points, strict=True)]
    value, *parameters = [column.requires_grad_(i > 0) for i, column in enumerate(columns)]
    log_prob = make(*parameters).log_prob(value)
    assert log_prob.dtype == dtype and log_prob.shape == value.shape
    slopes = torch.autograd.grad(log_prob.sum(), parameters)
    with mp.workdps(60):
        at = [[mp.mpf(n) for n in row] for row in torch.stack(columns, 1).tolist()]
        worst = relative(log_prob.detach(), [exact(*row) for row in at])
        found = 0.0
        for i, slope in enumerate(slopes, start=1):
            order = tuple(int(j == i) for j in range(len(columns)))[1:]
            true = [mp.diff(lambda *p, x=row[0]: exact(x, *p), row[1:], order) for row in at]
            found = max(found, relative(slope, true))
    return worst, found


# float32 rounds at 6e-8; of a few terms that cancel there is some more
LIMITS = {torch.float32: (3e-7, 5e-7), torch.float64: (1e-10, 1e-9)}


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("name", LAWS)
def test_value_and_gradient_are_those_of_sixty_digits(name, dtype):
    found = errors(name, dtype)
    assert all(error <= limit for error, limit in zip(found, LIMITS[dtype], strict=True)), found


SHARES = (0.5, -1.0, 3.0)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("log_c", [None, -4.0, 1.0, 12.0, 23.0])
def test_rows_of_counts_are_those_of_sixty_digits(log_c, dtype):
    logits = torch.tensor(SHARES, dtype=dtype, requires_grad=True)
    counts = torch.tensor([[0, 0, 0], [3, 0, 4], [1000, 20, 1_000_000]], dtype=dtype)
    with mp.workdps(60):
        total = sum(mp.exp(n) for n in SHARES)
        exact = []
        for row in counts.tolist():
            n = mp.mpf(sum(row))
            value = mp.loggamma(n + 1) - sum(mp.loggamma(x + 1) for x in row)
            if log_c is None:
                value += sum(
                    x * mp.log(mp.exp(a) / total) for x, a in zip(row, SHARES, strict=True)
                )
            else:
                c = mp.exp(log_c)
                value += mp.loggamma(c) - mp.loggamma(n + c)
                for x, a in zip(row, SHARES, strict=True):
                    alpha = c * mp.exp(a) / total
                    value += mp.loggamma(x + alpha) - mp.loggamma(alpha)
            exact.append(value)
    p = distributions.Multinomial(logits)
    if log_c is not None:
        p = distributions.DirichletMultinomial(logits, torch.tensor(log_c, dtype=dtype))
    assert relative(p.log_prob(counts), exact) <= LIMITS[dtype][1]  # terms of 1e7 cancel


def test_the_multinomials_sum_to_one(float64):
    rows = torch.tensor([r for r in itertools.product(range(7), repeat=3) if sum(r) == 6]).double()
    logits = torch.randn(3)
    for p in (
        distributions.Multinomial(logits),
        distributions.DirichletMultinomial(logits, torch.tensor(0.7)),
    ):
        assert abs(p.log_prob(rows).exp().sum().item() - 1) < 1e-10


# ------------------------------------------------------------------------------ totals and draws

T = torch.tensor
# name -> a law, and points with weights that make a sum or an integral over its support
COUNTS = torch.arange(0.0, 3000.0), None
UNIT = (lambda t: torch.sigmoid(t)), torch.linspace(-40, 40, 40_001, dtype=torch.double)
HALF = (lambda t: t.exp()), torch.linspace(-30, 12, 40_001, dtype=torch.double)
LINE = (lambda t: t.sinh()), torch.linspace(-14, 14, 40_001, dtype=torch.double)
TURN = (lambda t: t), torch.linspace(-math.pi, math.pi, 40_001, dtype=torch.double)[1:]
EXAMPLES = {
    "Poisson": (lambda: distributions.Poisson(T(1.2)), COUNTS),
    "NegativeBinomial": (lambda: distributions.NegativeBinomial(T(1.2), T(0.4)), COUNTS),
    "ZeroInflated": (
        lambda: distributions.ZeroInflated(distributions.NegativeBinomial(T(1.2), T(0.4)), T(-0.5)),
        COUNTS,
    ),
    "BetaBinomial": (
        lambda: distributions.BetaBinomial(T(-0.4), T(1.0), 10), (torch.arange(11.0), None)),
    "DiscretizedLogistic": (
        lambda: distributions.DiscretizedLogistic(
            T([0.3, -0.5]), T([-4.0, 5.0]), T([1.0, 0.2]), num_levels=16, low=-6
        ),
        (torch.arange(-6.0, 10.0), None),
    ),
    "Ordinal": (
        lambda: distributions.Ordinal(T(0.4), T(-1.0), T([0.5, 2.0])), (torch.arange(4.0), None)),
    "ContinuousBernoulli": (lambda: distributions.ContinuousBernoulli(T(-3.0)), UNIT),
    "ContinuousBernoulli-flat": (lambda: distributions.ContinuousBernoulli(T(0.01)), UNIT),
    "Beta": (lambda: distributions.Beta(T(0.4), T(1.0)), UNIT),
    "Laplace": (lambda: distributions.Laplace(T(0.4), T(-0.5)), LINE),
    "StudentT": (lambda: distributions.StudentT(T(0.4), T(-0.5), T(3.0)), LINE),
    "LogNormal": (lambda: distributions.LogNormal(T(0.4), T(-0.5)), HALF),
    "Gamma": (lambda: distributions.Gamma(T(0.4), T(0.7)), HALF),
    "VonMises": (lambda: distributions.VonMises(T(0.4), T(0.7)), TURN),
    "Affine": (
        lambda: distributions.Affine(distributions.Gamma(T(0.4), T(0.7)), 0.0, T(2.5)), HALF),
}  # fmt: skip
examples = pytest.mark.parametrize("name", EXAMPLES)


def points(name):
    """Values over the support, and the weight of each in a sum or an integral."""
    where, u = EXAMPLES[name][1]
    if u is None:
        return where.double(), torch.ones_like(where).double()
    u = u.double().requires_grad_()
    value = where(u)
    (slope,) = torch.autograd.grad(value.sum(), u)
    value, cell = value.detach(), (u[1] - u[0]).item()
    inside = (value > 0) & (value < 1) if (where, None) == (UNIT[0], None) else value == value
    return value[inside], (slope * cell)[inside]


def moments(name, *of):
    """Means of functions, by the sum or integral, of the total mass."""
    value, weight = points(name)
    density = EXAMPLES[name][0]().log_prob(value).exp() * weight
    return [(density * f(value)).sum().item() for f in of]


@examples
def test_the_total_is_one_and_the_moments_are_those_of_the_density(name, float64):
    mass, mean, square = moments(name, torch.ones_like, lambda x: x, torch.square)
    law = EXAMPLES[name][0]()
    assert abs(mass - 1) < 1e-6  # of the integrals; sums are exact
    assert law.mean.item() == pytest.approx(mean, abs=1e-5) or name == "VonMises"
    if name != "VonMises":  # of angles torch's variance is the circular one
        assert law.variance.item() == pytest.approx(square - mean**2, rel=1e-4)


@examples
def test_draws_are_of_the_density(name, float64):
    """Mean, square, and the share below two points, each within 4.5 standard errors."""
    law = EXAMPLES[name][0]().expand((3, 1))
    with torch.no_grad():
        draws = law.sample((20_000,))
    assert draws.shape == (20_000, 3, 1)
    draws = draws.flatten()
    assert law.support.check(draws).all() or name == "Affine"
    low, high = draws.quantile(T([0.3, 0.8])).tolist()
    functions = [lambda x: x, lambda x: x.clamp(-20, 20).square()]
    functions += [lambda x, at=at: (x <= at).double() for at in (low, high)]
    exact = moments(name, *functions)
    for f, mean in zip(functions, exact, strict=True):
        found = f(draws)
        se = found.std().item() / len(found) ** 0.5
        # quantiles of these very draws; a step of the integral's grid
        assert abs(found.mean().item() - mean) < 4.5 * se + 1e-4


def test_draws_of_rows_of_counts():
    logits, n = T([0.5, -1.0, 1.0]), 40
    shares = logits.softmax(-1)
    for log_c, extra in ((None, 1.0), (1.0, (n + math.e) / (1 + math.e))):
        p = distributions.Multinomial(logits, n)
        if log_c is not None:
            p = distributions.DirichletMultinomial(logits, T(log_c), n)
        draws = p.expand((4000,)).sample()
        assert (draws.sum(-1) == n).all()
        variance = n * shares * (1 - shares) * extra
        assert ((draws.mean(0) - n * shares).abs() < 4.5 * (variance / 4000).sqrt()).all()
        fourth = (draws - n * shares).pow(4).mean(0)
        se = ((fourth - variance**2) / 4000).sqrt()
        assert ((draws.var(0) - variance).abs() < 4.5 * se).all()
        torch.testing.assert_close(p.mean, n * shares)


PAIRS_WITH_KL = {
    "Poisson": ([1.2], [0.3]),
    "Laplace": ([0.4, -0.5], [-0.2, 0.6]),
    "LogNormal": ([0.4, -0.5], [-0.2, 0.3]),
    "Gamma": ([0.4, 0.7], [-0.2, 1.1]),
    "Beta": ([0.4, 1.5], [-0.2, 1.0]),
    "ContinuousBernoulli": ([-3.0], [1.0]),
}


@pytest.mark.parametrize("name", PAIRS_WITH_KL)
def test_kl(name, float64):
    """Where torch has a closed form, through the heads' own ``to_event``."""
    make = getattr(distributions, name)
    p, q = (make(*(T(v).expand(2) for v in values)) for values in PAIRS_WITH_KL[name])
    found = torch.distributions.kl_divergence(p.to_event(1), q.to_event(1)).item()
    value, weight = points(name)
    one, other = (make(*(T(v) for v in values)) for values in PAIRS_WITH_KL[name])
    terms = one.log_prob(value)
    terms = terms.exp() * (terms - other.log_prob(value)) * weight
    assert found == pytest.approx(2 * terms.nan_to_num().sum().item(), abs=2e-5)


def test_draws_of_a_continuous_bernoulli_have_a_sample_path(float64):
    a = T([-30.0, -1.0, 1e-6, 1.0, 30.0]).requires_grad_()
    law = distributions.ContinuousBernoulli(a)
    draws = law.rsample((100_000,))
    (slope,) = torch.autograd.grad(draws.mean(0).sum(), a)
    (exact,) = torch.autograd.grad(law.mean.sum(), a)
    torch.testing.assert_close(slope, exact, atol=3e-3, rtol=0.05)
    torch.testing.assert_close(exact, law.variance)  # an exponential family


# ------------------------------------------------------------------------------ extremes


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("size", [40.0, -40.0])
def test_gradients_are_finite_where_networks_are_far_off(name, size):
    make, _, rows = LAWS[name]
    value = torch.tensor([row[0] for row in rows])
    one = torch.full_like(value, size)
    for i in range(len(rows[0]) - 1):
        columns = list(zip(*rows, strict=True))[1:]
        parameters = [torch.tensor(column).requires_grad_() for column in columns]
        parameters[i] = one.clone().requires_grad_()
        log_prob = make(*parameters).log_prob(value)
        assert log_prob.isfinite().all()
        slopes = torch.autograd.grad(log_prob.sum(), parameters)
        assert all(slope.isfinite().all() for slope in slopes), i


# ------------------------------------------------------------------------------ heads

Z, N, D = 2, 4, 3


def test_an_offset_multiplies_the_rate_of_each_row():
    off, z = torch.randn(N), torch.randn(5, N, Z)
    net = torch.nn.Linear(Z, 3 * D)
    for head in (
        conditionals.Poisson(torch.nn.Linear(Z, D)),
        conditionals.NegativeBinomial(torch.nn.Linear(Z, 2 * D)),
        conditionals.ZeroInflated(conditionals.NegativeBinomial(net)),
    ):
        rates = head(z).mean * off.exp().unsqueeze(-1)
        for given in (off, off.unsqueeze(-1), off.unsqueeze(-1).expand(N, D)):
            torch.testing.assert_close(head(z, offset=given).mean, rates)


@pytest.mark.parametrize("labels", [False, True])
def test_models_and_guides_pass_an_offset_on(labels):
    """To the rates of the likelihood, and to the network of q(z | x) as one more input."""
    classes = 3 if labels else 0
    likelihood = conditionals.Poisson(nets.mlp(Z + classes, D))
    one_hot = nets.OneHot(3) if labels else None
    model = models.CVAE(likelihood, Z, condition=one_hot) if labels else models.VAE(likelihood, Z)
    guide = guides.Normal(nets.mlp(D + classes + 1, 2 * Z), condition=one_hot)
    x, y, off = torch.poisson(torch.ones(N, D)), torch.tensor([0, 1, 2, 0]), torch.randn(N)
    args = (x, y, off) if labels else (x, off)
    ppvae.check_pair(model, guide, *args)
    weights = ppvae.log_weights(model, guide, *args)
    z = weights.guide_trace.nodes["z"]["value"]
    rates = (likelihood.net(z, *([one_hot(y)] if labels else [])) + off.unsqueeze(-1)).exp()
    expected = dist.Poisson(rates).to_event(1).log_prob(x)
    torch.testing.assert_close(weights.log_p["x"].flatten(), expected)
    by_hand = guide.conditional(x, *([one_hot(y)] if labels else []), off.unsqueeze(-1))
    torch.testing.assert_close(guide.posterior(*args).mean, by_hand.mean)
    given = {"y": y, "offset": off} if labels else {"offset": off}
    assert model(**given).shape == (N, D)
    refined = guides.SemiAmortized(guide, model, steps=1, lr=1e-12)
    torch.testing.assert_close(refined.posterior(*args).mean, by_hand.mean)
    torch.testing.assert_close(guide.local(*args).posterior(torch.arange(N)).mean, by_hand.mean)


@pytest.mark.parametrize(
    ("offset", "error", "match"),
    [
        (torch.zeros(N + 1), ValueError, r"offset has shape \(5,\), and there are \(4,\) rows"),
        (torch.zeros(N, D + 1), ValueError, "for each row"),
        (torch.zeros(5, N, D), ValueError, "for each row"),
        (torch.zeros(N, dtype=torch.long), TypeError, "the log of the exposures, as floats"),
    ],
)
def test_offsets_that_are_none(offset, error, match):
    with pytest.raises(error, match=match):
        conditionals.Poisson(torch.nn.Linear(Z, D))(torch.zeros(N, Z), offset=offset)
    with pytest.raises(TypeError, match="Gamma has no rate"):
        conditionals.Gamma(torch.nn.Linear(Z, 2 * D))(torch.zeros(N, Z), offset=torch.zeros(N))


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: conditionals.Gamma(net(2), concentration=-1.0), ValueError, "must be positive"),
        (lambda: conditionals.Gamma(net(2), torch.zeros(2)), ValueError, "must be positive"),
        (lambda: conditionals.Gamma(net(2), "learned"), TypeError, "a Scale for a learned one"),
        (lambda: run(conditionals.Gamma(net(3))), ValueError, r"make it 2 \* D, or give conc"),
        (lambda: run(conditionals.Beta(net(3), event_dim=0)), ValueError, "make it 2, or give"),
        (lambda: run(conditionals.BetaBinomial(net(2))), ValueError, "the number of trials"),
        (lambda: conditionals.ZeroInflated(conditionals.Gamma(net(2))), TypeError, "given Gamma"),
        (lambda: conditionals.ZeroInflated(net(2)), TypeError, "given Linear"),
        (lambda: conditionals.Ordinal(net(2), 1), ValueError, "at least 2, got 1"),
        (lambda: conditionals.DiscretizedLogistic(net(2), 1), ValueError, "at least 2, got 1"),
        (
            lambda: conditionals.Affine(conditionals.Normal(net(2)), 0.0, torch.tensor([1.0, 0])),
            ValueError,
            r"not at \[1\]: a constant column has no density",
        ),
        (
            lambda: run(conditionals.Affine(conditionals.Poisson(net(2)), 0.0, 1.0)),
            TypeError,
            "Poisson is none",
        ),
        (lambda: conditionals.Columns(net(2), {}), ValueError, "needs a column"),
        (
            lambda: run(conditionals.Columns(net(2), {"a": conditionals.Normal, "b": POISSON})),
            ValueError,
            "needs 3 outputs",
        ),
        (
            lambda: run(conditionals.Columns(net(1), {"a": conditionals.Multinomial})),
            TypeError,
            "head Multinomial of 'a' is not one of independent values",
        ),
        (
            lambda: distributions.masked(POISSON(net(2))(torch.zeros(1, Z)), torch.ones(1, 2)),
            TypeError,
            "must be bool",
        ),
        (lambda: conditionals.suggest(torch.zeros(9, 2)), ValueError, "ten finite values in each"),
        (lambda: conditionals.suggest(torch.full((20, 2), math.nan)), ValueError,
         "at least 0 that are not missing"),
        (lambda: conditionals.suggest(torch.full((20, 2), math.inf)), ValueError, "40 infinite"),
        (lambda: conditionals.suggest((torch.ones(20, 2), torch.ones(20, 2).bool())), TypeError,
         "one array, and was given several"),
        (lambda: conditionals.suggest([["a", "b"]] * 20), TypeError, "holds words"),
        (lambda: conditionals.suggest(torch.zeros(20, 2), names="abc"), ValueError, "3 names"),
    ],
)  # fmt: skip
def test_errors_say_what_to_do(call, error, match):
    with pytest.raises(error, match=match):
        call()


POISSON = conditionals.Poisson


def net(width):
    return torch.nn.Linear(Z, width)


def run(head):
    return head(torch.zeros(N, Z))


def test_trials_and_totals_of_each_row_are_arguments_of_the_call():
    n, z = torch.tensor([[3.0], [10.0], [0.0], [7.0]]), torch.randn(5, N, Z)
    head = conditionals.BetaBinomial(net(D), concentration=2.0)
    fn = head(z, total_count=n)
    torch.testing.assert_close(fn.mean, n * head(z, total_count=1).mean)
    assert (fn.sample() <= n).all()
    for make in (conditionals.Multinomial, conditionals.DirichletMultinomial):
        rows = make(net(D + (make is not conditionals.Multinomial)))
        assert torch.equal(rows(z, total_count=n[:, 0]).sample().sum(-1), n[:, 0].expand(5, N))


def test_columns_are_their_heads_side_by_side(float64):
    """Blocks of the network by head, values by column, and nats by name."""
    kinds = {
        "a": conditionals.Normal,
        "n": POISSON,
        "b": conditionals.Normal,
        "k": lambda net: conditionals.Categorical(net, 3),
    }
    assert conditionals.Columns.width(kinds) == 2 * 2 + 1 + 3
    head, z, off = conditionals.Columns(net(8), kinds), torch.randn(5, N, Z), torch.randn(N)
    x = torch.stack([torch.randn(N), T([0.0, 2, 1, 5]), torch.randn(N), T([0.0, 2, 1, 1])], 1)
    outputs = head.net(z)
    normal = torch.distributions.Normal(outputs[..., :2], outputs[..., 2:4].exp())
    terms = normal.log_prob(x[:, [0, 2]])
    count = torch.distributions.Poisson((outputs[..., 4] + off).exp()).log_prob(x[:, 1])
    job = torch.distributions.Categorical(logits=outputs[..., 5:]).log_prob(x[:, 3])
    fn = head(z, offset=off)
    torch.testing.assert_close(fn.log_prob(x), terms.sum(-1) + count + job)
    found = head.by_column(x, z, offset=off)
    expected = {"a": terms[..., 0], "n": count, "b": terms[..., 1], "k": job}
    assert found.keys() == expected.keys()
    for name, nats in expected.items():
        torch.testing.assert_close(found[name], nats)
    assert fn.sample().shape == (5, N, 4)
    torch.testing.assert_close(fn.mean[..., [0, 2]], normal.mean)


def test_affine_has_the_evidence_of_data_in_their_own_units(float64):
    """It is that of standardised data, less the logarithm of the units."""
    inside, z = conditionals.StudentT(net(3 * D)), torch.randn(N, Z)
    loc, scale = T([70.0, -3.0, 0.0]), T([10.0, 0.1, 1.0])
    x = loc + scale * torch.randn(N, D)
    found = conditionals.Affine(inside, loc, scale)(z).log_prob(x)
    expected = inside(z).log_prob((x - loc) / scale) - scale.log().sum()
    torch.testing.assert_close(found, expected)
    torch.manual_seed(0)
    draw = conditionals.Affine(inside, loc, scale)(z).sample()
    torch.manual_seed(0)
    torch.testing.assert_close(draw, loc + scale * inside(z).sample())


def test_heads_without_their_network():
    """What a guide with parameters per row is made of, around another head too."""
    z = torch.randn(N, Z)
    heads = [
        conditionals.Gamma(net(2 * D)),
        conditionals.Affine(conditionals.Normal(net(2 * D)), 1.0, 2.0),
        conditionals.ZeroInflated(conditionals.Poisson(net(2 * D))),
    ]
    for head in heads:
        x = head(z).sample()
        torch.testing.assert_close(head.without_net()(head.net(z)).log_prob(x), head(z).log_prob(x))
        assert head.num_outputs(D) == 2 * D and not list(head.without_net().parameters())


# ------------------------------------------------------------------------------ suggestions


def held_out(x):
    """The rows that are held out, and the others, in the order of seed 0."""
    x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    return x[::5], x[torch.arange(len(x)) % 5 != 0]


def test_scores_are_of_the_largest_likelihood(float64):
    """Where that has a closed form."""
    counts, real = torch.poisson(torch.full((500, 1), 3.0)), 50 + 7 * torch.randn(500, 1)
    real[0] = -1.0
    bits = torch.bernoulli(torch.full((500, 1), 0.2))
    found = [entry.scores for entry in conditionals.suggest(torch.cat([counts, real, bits], 1))]
    for scores, name, x, law in (
        (found[0], "Poisson", counts, lambda t: dist.Poisson(t.mean())),
        (found[1], "Normal", real, lambda t: dist.Normal(t.mean(), t.std(correction=0))),
        (found[2], "Bernoulli", bits, lambda t: dist.Bernoulli(t.mean())),
    ):  # fmt: skip
        held, train = held_out(x)
        assert scores[name] == pytest.approx(law(train).log_prob(held).mean().item(), abs=1e-5)


def test_suggestions_tell_kinds_and_what_speaks_for_a_head():
    torch.manual_seed(1)
    rates = torch.distributions.Gamma(1.0, 0.25).sample((500,))
    table = torch.stack([torch.poisson(rates), torch.ones(500), torch.randn(500).exp()], 1)
    before = torch.get_rng_state()
    found = conditionals.suggest(table, names=["visits", "one", "cost"])
    assert torch.equal(torch.get_rng_state(), before)
    assert [entry.columns for entry in found] == [("visits",), ("one",), ("cost",)]
    assert [entry.kind for entry in found] == ["counts", "constant", "positive numbers"]
    visits, one, cost = (entry.scores for entry in found)
    assert visits["NegativeBinomial"] > visits["Poisson"] + 0.3 and not one
    assert cost["LogNormal"] > cost["Normal"] + 0.3
    assert "variance / mean" in str(found) and "leave them out" in str(found)
    many = conditionals.suggest(torch.poisson(torch.ones(50, 40)))
    assert len(many) == 1 and "0, 1, 2 and 37 more: counts" in str(many)
    assert many[0].by_column["Poisson"].shape == (40,)
