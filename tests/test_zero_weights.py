"""Weights of zero, log w = -inf: bounds are the numbers of their definitions, gradients too.

What a model forbids has weight zero: a state of probability 0, a value outside a support. Oracles:
the definitions in NumPy, weights of e^-10,000 in their place, and enumeration of all draws.
"""

import contextlib
import dataclasses
import functools
import itertools
import math
from typing import ClassVar

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from ppvae import elbo
from ppvae.check.nonfinite import NonFiniteError
from ppvae.elbo import gradients
from ppvae.elbo.estimator import Estimator

INF = math.inf

# ------------------------------------------------------------------------------ values


def log_mean(values, axis=0):
    """log of the mean of exp of log-weights, in float64."""
    with np.errstate(divide="ignore"):
        return np.log(np.exp(values).mean(axis))


def tempered(log_w, beta):
    """The mean of log w under weights w^beta; 0 log 0 is 0, and of weights all zero it is -inf."""
    if np.isinf(log_w).all():
        return -INF
    weights = np.exp(beta * log_w) if beta else np.ones(len(log_w))
    logs = np.where(weights > 0, log_w, 0.0)
    return (weights * logs).sum() / weights.sum()


def by_column(function):
    return lambda log_w: np.array([function(column) for column in log_w.T])


def renyi(alpha):
    def value(log_w):
        with np.errstate(divide="ignore"):
            return np.log(np.mean(np.exp(log_w) ** (1 - alpha), 0)) / (1 - alpha)

    return value


def thermodynamic(points):
    ends = (0.0, *points, 1.0)
    return by_column(lambda c: sum((b - a) * tempered(c, a) for a, b in itertools.pairwise(ends)))


def groups_of_two(log_w):
    return log_mean(log_w.reshape(2, 2, -1), 1).mean(0)


DEFINITIONS = {
    "ELBO": (elbo.ELBO(4), lambda log_w: log_w.mean(0)),
    "IWELBO": (elbo.IWELBO(4), log_mean),
    "MIWELBO": (elbo.MIWELBO(2, num_groups=2), groups_of_two),
    "PIWELBO": (elbo.PIWELBO(2, num_groups=2), log_mean),
    "CIWELBO-0": (elbo.CIWELBO(4, beta=0.0), log_mean),
    "CIWELBO-0.5": (elbo.CIWELBO(4), lambda log_w: (log_w.mean(0) + log_mean(log_w)) / 2),
    "CIWELBO-1": (elbo.CIWELBO(4, beta=1), lambda log_w: log_w.mean(0)),
    "RenyiELBO-0.5": (elbo.RenyiELBO(4), renyi(0.5)),
    "RenyiELBO-0.9": (elbo.RenyiELBO(4, alpha=0.9), renyi(0.9)),
    "RenyiELBO-0": (elbo.RenyiELBO(4, alpha=0), renyi(0)),
    "RenyiELBO-2": (elbo.RenyiELBO(4, alpha=2.0), renyi(2.0)),
    "RenyiELBO-1.1": (elbo.RenyiELBO(4, alpha=1.1), renyi(1.1)),
    "RenyiELBO-minus1": (elbo.RenyiELBO(4, alpha=-1.0), renyi(-1.0)),
    "VR-max": (elbo.RenyiELBO(4, alpha=-INF), lambda log_w: log_w.max(0)),
    "ThermodynamicELBO": (
        elbo.ThermodynamicELBO(4, partition=(0.1, 0.5)),
        thermodynamic((0.1, 0.5)),
    ),
    "ThermodynamicELBO-one": (elbo.ThermodynamicELBO(4, partition=()), thermodynamic(())),
    "ChiUpperBound": (elbo.ChiUpperBound(4), renyi(-1.0)),
    "ReweightedWakeSleep": (elbo.ReweightedWakeSleep(4), log_mean),
    "SoftCVI": (elbo.SoftCVI(4), log_mean),
}
LOG_W = torch.tensor(
    [
        [-1.0, -1.0, -INF, -INF, -INF, -4.0],
        [-2.0, -2.0, -2.0, -INF, -INF, -4.0],
        [-0.5, -INF, -INF, -INF, -INF, -4.0],
        [-3.0, -3.0, -INF, -3.0, -INF, -4.0],
    ],
    dtype=torch.float64,
)


def test_every_estimator_has_its_definition_here():
    exported = [getattr(elbo, name) for name in elbo.__all__]
    concrete = {
        cls.__name__
        for cls in exported
        if isinstance(cls, type) and issubclass(cls, Estimator) and cls is not Estimator
    }
    # the ELBO's bound, of some pairs; another's, and a term; IWELBO's, of other weights
    concrete -= {"TCELBO", "DIPELBO", "FactorELBO", "VQELBO", "RELAX", "Plus", "AnnealedELBO"}
    assert concrete == {type(estimator).__name__ for estimator, _ in DEFINITIONS.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_bound_of_zero_weights_is_the_number_of_its_definition(name, dtype):
    estimator, definition = DEFINITIONS[name]
    with np.errstate(divide="ignore"):
        exact = torch.from_numpy(definition(LOG_W.numpy()))
    found = estimator.bound(LOG_W.to(dtype)).double()
    torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)
    assert (found[4] == -INF).all()
    almost = LOG_W.clamp(min=-1e4)  # the limit of small weights
    limit = estimator.bound(almost.to(dtype)).double()
    finite = found.isfinite()
    torch.testing.assert_close(found[finite], limit[finite], rtol=1e-6, atol=1e-6)
    assert (limit[~finite] < -200).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_baselines_of_zero_weights(dtype):
    """Of VIMCO: the bound with particle k replaced by the geometric mean of the others' weights."""
    log_w = LOG_W[:, :4].to(dtype)
    for name in ("IWELBO", "CIWELBO-0", "RenyiELBO-0.5", "VR-max"):
        estimator, definition = DEFINITIONS[name]
        for vimco in (False, True):
            put = gradients.mean_of_others(log_w) if vimco else None
            found = estimator.bound_of_others(log_w, put).double()
            for k in range(4):
                others = np.delete(LOG_W[:, :4].numpy(), k, 0)
                mean = others.mean(0, keepdims=True)
                with np.errstate(divide="ignore"):
                    exact = definition(np.concatenate([others, mean]) if vimco else others)
                torch.testing.assert_close(found[k], torch.from_numpy(exact), rtol=1e-6, atol=1e-6)


# ------------------------------------------------------------------------------ draws


@pytest.mark.parametrize(
    "estimator",
    [
        elbo.IWELBO(2, "score"),
        elbo.IWELBO(3, "score"),
        elbo.IWELBO(2, "vimco"),
        elbo.IWELBO(3, "vimco"),
        elbo.CIWELBO(3, "vimco", beta=0.0),
        elbo.RenyiELBO(3, "score", alpha=0.3),
        elbo.RenyiELBO(3, "vimco", alpha=-INF),
        elbo.MIWELBO(2, "vimco", num_groups=2),
    ],
    ids=repr,
)
def test_score_gradients_are_unbiased_over_the_steps_that_are_taken(estimator, float64):
    """Every tuple of draws of a latent with a forbidden state; of some the bound is -inf."""
    logits = torch.tensor([0.3, -0.2, 0.5], requires_grad=True)
    log_p = torch.tensor([-1.0, -2.0, -INF])
    objective, expected = 0.0, torch.zeros(3)
    for draw in itertools.product(range(3), repeat=estimator.num_draws):
        log_q = logits.log_softmax(0)[list(draw)].unsqueeze(1)
        log_w = log_p[list(draw)].unsqueeze(1) - log_q
        bound = estimator.bound(log_w).sum()
        if not bound.isfinite():
            continue
        probability = log_q.sum().exp()
        objective = objective + probability * bound
        vimco = estimator.gradient == "vimco"
        score = gradients.score(estimator.bound, estimator.bound_of_others, log_w, log_q, vimco)
        combined = gradients.with_gradient(bound, bound + score)
        (gradient,) = torch.autograd.grad(combined, logits, retain_graph=True)
        expected = expected + probability.detach() * gradient
    (exact,) = torch.autograd.grad(objective, logits)
    torch.testing.assert_close(expected, exact, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------ pairs


class Forbidding(dist.TorchDistribution):
    """A distribution with a floor under log p, where a condition on the value does not hold."""

    has_rsample = False
    arg_constraints: ClassVar = {}

    def __init__(self, base, allowed, floor):
        self.base, self.allowed, self.floor = base, allowed, floor
        self.has_enumerate_support = False
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Forbidding(self.base.expand(batch_shape), self.allowed, self.floor)

    @property
    def support(self):
        return self.base.support

    def sample(self, shape=()):
        return self.base.sample(shape)

    def log_prob(self, value):
        return torch.where(self.allowed(value), self.base.log_prob(value), self.floor)


class Model(ppvae.Program):
    """A latent, of which half of the values or one of three states are forbidden."""

    def __init__(self, discrete, floor):
        super().__init__()
        self.discrete, self.floor = discrete, floor
        self.shift = nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.discrete:
                base = dist.Categorical(torch.tensor([0.4, 0.4, 0.2]))
                prior = Forbidding(base, lambda v: v < 2, self.floor)
            else:
                prior = Forbidding(dist.Normal(0.0, 1.0), lambda v: v > 0, self.floor)
            z = pyro.sample("z", prior.expand([len(x)]))
            pyro.sample("x", dist.Normal(z + self.shift, 1.0), obs=x)


class Guide(ppvae.Program):
    def __init__(self, discrete):
        super().__init__()
        self.discrete = discrete
        self.logits = nn.Parameter(torch.tensor([0.2, -0.1, 0.4]))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            if self.discrete:
                q = dist.Categorical(logits=self.logits.expand(len(x), 3))
            else:
                q = dist.Normal(self.logits[0] + 0.2 * x, self.logits[1].exp())
            pyro.sample("z", q)


X = torch.linspace(-1.0, 1.0, 5)
# of log w = -inf for one particle, minus infinity
INFINITE = ("ELBO", "CIWELBO-0.5", "CIWELBO-1", "RenyiELBO-2", "RenyiELBO-1.1", "Thermodynamic")
K = 4  # particles, in each of two groups where there are groups


def variants():
    found = []
    for name, (estimator, _) in DEFINITIONS.items():
        for gradient in type(estimator).gradients:
            if name == "VR-max" and gradient == "dreg":
                continue
            discrete = gradient in (
                "score",
                "vimco",
                "covariance",
                "reweighted",
                "vargrad",
                "disarm",
            )
            made = dataclasses.replace(estimator, num_particles=K, gradient=gradient)
            found.append(pytest.param(name, made, discrete, id=f"{name}-{gradient}"))
    for gradient in elbo.ReweightedWakeSleep.gradients:
        dreaming = elbo.ReweightedWakeSleep(K, gradient, insomnia=0.5)
        discrete = gradient == "reweighted"
        found.append(pytest.param("wake-sleep", dreaming, discrete, id=f"dreaming-{gradient}"))
    return found


def weights_of(estimator, discrete, seed):
    """The log-weights that the estimator draws with a seed, ``(K, N)``."""
    pyro.set_rng_seed(seed)
    return ppvae.log_weights(
        Model(discrete, -INF), Guide(discrete), X, num_particles=estimator.num_draws
    ).log_w.detach()


def seed_where(estimator, discrete, wanted):
    for seed in range(1000):
        zero = weights_of(estimator, discrete, seed) == -INF
        if wanted(zero.unflatten(0, (-1, K))):
            return seed
    raise AssertionError("no seed gives such weights")


def two_are_left(zero):
    """Some weight is zero, and of each row, in each group, two are not."""
    return zero.any() and ((~zero).sum(1) >= 2).all()


def loss_and_gradients(estimator, discrete, floor, seed):
    model, guide = Model(discrete, torch.tensor(floor)), Guide(discrete)
    pyro.set_rng_seed(seed)
    loss = estimator(model, guide)(X)
    parameters = [model.shift, guide.logits]
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return loss.detach(), found


def svi_of(estimator, discrete, **options):
    unmoved = functools.partial(torch.optim.SGD, lr=0.0)
    model, guide = Model(discrete, torch.tensor(-INF)), Guide(discrete)
    svi = ppvae.SVI(model, guide, unmoved, estimator, **options)
    svi.prepare(X)
    return svi


@pytest.mark.parametrize(("name", "estimator", "discrete"), variants())
def test_a_step_with_zero_weights(name, estimator, discrete):
    """Value and gradient are those of weights of e^-10,000, or the step is refused."""
    seed = seed_where(estimator, discrete, two_are_left)
    loss, found = loss_and_gradients(estimator, discrete, -INF, seed)
    svi = svi_of(estimator, discrete)
    pyro.set_rng_seed(seed)
    if name.startswith(INFINITE):
        assert loss == INF
        with pytest.raises(NonFiniteError, match="the loss is inf"):
            svi.update(X)
        return
    limit, expected = loss_and_gradients(estimator, discrete, -1e4, seed)
    torch.testing.assert_close(loss, limit, rtol=1e-5, atol=1e-5)
    assert loss.isfinite()
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
            assert one.isfinite().all()
    pyro.set_rng_seed(seed)
    torch.testing.assert_close(svi.update(X), loss)


@pytest.mark.parametrize(("name", "estimator", "discrete"), variants())
def test_a_step_with_a_row_of_zero_weights_is_refused(name, estimator, discrete):
    seed = seed_where(estimator, discrete, lambda zero: zero.all(1).all(0).any())
    loss, _ = loss_and_gradients(estimator, discrete, -INF, seed)
    assert loss == -INF * -estimator.sign
    svi = svi_of(estimator, discrete)
    pyro.set_rng_seed(seed)
    with pytest.raises(NonFiniteError, match=r"the loss is -?inf"):
        svi.update(X)


@pytest.mark.parametrize("gradient", elbo.PIWELBO.gradients)
def test_a_group_of_zero_weights_has_a_bound_for_the_model_and_none_for_the_guide(gradient):
    estimator = elbo.PIWELBO(K, gradient, num_groups=2)
    seed = seed_where(
        estimator, False, lambda zero: zero.all(1).any() and not zero.all(1).all(0).any()
    )
    loss, _ = loss_and_gradients(estimator, False, -INF, seed)
    exact = -elbo.IWELBO(2 * K).bound(weights_of(estimator, False, seed)).sum()
    torch.testing.assert_close(loss, exact)
    svi = svi_of(estimator, False)
    pyro.set_rng_seed(seed)
    with pytest.raises(NonFiniteError, match="the gradient"):
        svi.update(X)


@pytest.mark.parametrize(("name", "estimator", "discrete"), variants())
def test_a_compiled_step_with_zero_weights(name, estimator, discrete, traced):
    """The graph itself; what is -inf or refused eagerly is so in a graph."""
    seed = seed_where(estimator, discrete, two_are_left)
    loss, found = loss_and_gradients(estimator, discrete, -INF, seed)
    svi = svi_of(estimator, discrete, compile=True)
    with contextlib.suppress(NonFiniteError):
        svi.update(X)  # builds the graph, at other draws
    pyro.set_rng_seed(seed)
    torch.testing.assert_close(svi._loss((X,), {}), loss, rtol=1e-5, atol=1e-5)
    assert traced
    if loss.isfinite():
        parameters = [svi.objective.model.shift, svi.objective.guide.logits]
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_a_dream_that_the_guide_cannot_explain_makes_no_step():
    """With the sleep term minus infinity, its gradient would be that of nothing."""

    class Blind(Guide):
        def forward(self, x):
            with pyro.plate("data", len(x)):
                q = dist.Categorical(logits=self.logits.expand(len(x), 3))
                pyro.sample("z", Forbidding(q, lambda v: v > 0, torch.tensor(-INF)))

        # never drawn where it cannot be: 0 has no probability
        def __init__(self):
            super().__init__(discrete=True)
            with torch.no_grad():
                self.logits[0] = -60.0

    estimator = elbo.ReweightedWakeSleep(4, insomnia=0.5)
    svi = ppvae.SVI(Model(True, torch.tensor(-1e4)), Blind(), loss=estimator)
    svi.prepare(X)
    with pytest.raises(NonFiniteError, match="gradient"):
        svi.update(X)


# ------------------------------------------------------------------------------ near alpha = 1


def power_mean(log_w, alpha):
    """The Rényi bound in 50 digits."""
    mpmath = pytest.importorskip("mpmath")
    with mpmath.workdps(50):
        order = 1 - mpmath.mpf(alpha)
        columns = [
            mpmath.log(sum(mpmath.exp(order * mpmath.mpf(v)) for v in column) / len(column)) / order
            for column in log_w.T.tolist()
        ]
        return torch.tensor([float(value) for value in columns], dtype=torch.float64)


ALPHAS = [0.3, 0.51, 0.9, 0.999, 1 - 1e-5, 1 - 1e-7, 1 + 1e-7, 1 + 1e-4, 1.1, 1.49, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("level", "spread"), [(-100, 3), (-1e5, 30), (-10, 0.01), (-1000, 300)])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_the_renyi_bound_is_exact_to_rounding(alpha, level, spread, dtype):
    log_w = (level + spread * torch.randn(50, 6)).to(dtype).requires_grad_()
    found = elbo.RenyiELBO(50, alpha=alpha).bound(log_w)
    (slope,) = torch.autograd.grad(found.sum(), log_w)
    eps, exact = torch.finfo(dtype).eps, log_w.detach().double()
    error = (found.double() - power_mean(exact, alpha)).abs() / exact.abs().amax(0)
    assert error.max() < 2 * eps
    centred = exact - exact.amax(0)
    weights = ((1 - alpha) * centred).softmax(0)
    # 50 terms are summed, and rounding the exponent moves a weight by that much of itself
    tolerance = 16 * eps * (1 + abs(1 - alpha) * centred.abs().amax(0))
    assert ((slope.double() - weights).abs() <= tolerance * weights + 1e-17).all()
    dreg = elbo.RenyiELBO(50, "dreg", alpha).dreg_coefficient(log_w.detach()).double()
    expected = alpha * weights + (1 - alpha) * weights.square()
    assert ((dreg - expected).abs() <= 2 * tolerance * abs(alpha) * weights + 1e-17).all()


def test_the_renyi_bound_tends_to_the_elbo():
    log_w = -100 + 3 * torch.randn(50, 20)
    for alpha in (1 - 1e-7, 1 + 1e-7):
        found = elbo.RenyiELBO(50, alpha=alpha).bound(log_w)
        torch.testing.assert_close(found, elbo.ELBO(50).bound(log_w), rtol=0, atol=3e-5)


def test_a_zero_weight_near_one():
    """log of 3/4, over 1 - alpha, beside what is left."""
    log_w, alpha = torch.tensor([[-1.0], [-2.0], [-INF], [-3.0]]), 1 - 1e-5
    left = elbo.ELBO(3).bound(log_w[[0, 1, 3]].double()) + math.log(0.75) / 1e-5
    found = elbo.RenyiELBO(4, alpha=alpha).bound(log_w)
    torch.testing.assert_close(found.double(), left, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda value: elbo.RenyiELBO(2, alpha=value), "RenyiELBO: alpha"),
        (lambda value: elbo.CIWELBO(2, beta=value), "CIWELBO: beta"),
        (lambda value: elbo.ChiUpperBound(2, order=value), "ChiUpperBound: order"),
        (lambda value: elbo.ReweightedWakeSleep(2, insomnia=value), "Sleep: insomnia"),
        (lambda value: elbo.ThermodynamicELBO(2, partition=(value,)), "ELBO: partition"),
    ],
)
@pytest.mark.parametrize(
    "value", [elbo.LinearWarmup(10), lambda step: 0.5, torch.full((2,), 0.5), "0.5", None]
)
def test_what_is_no_number_is_refused_by_name(make, name, value):
    with pytest.raises(TypeError, match=f"{name} must be a number, got .*ELBO\\(beta=...\\)"):
        make(value)


def test_a_tensor_of_one_number_is_a_number():
    assert elbo.RenyiELBO(2, alpha=torch.tensor(0.5)).alpha == 0.5
    assert elbo.ThermodynamicELBO(2, partition=(torch.tensor(0.5),)).partition == (0.5,)


def test_an_infinite_order_is_refused():
    with pytest.raises(ValueError, match="finite order"):
        elbo.ChiUpperBound(2, order=INF)
