"""Programs as Pyro users write them, with ``pyro.param``: who listens to the store decides."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, config_enumerate
from torch import Tensor, nn
from torch.distributions import constraints

import ppvae
from ppvae import diagnostics, elbo
from ppvae.program import local_parameters

X = torch.tensor([-0.5, 2.0])
EULER = 0.5772156649015329


def stored() -> dict[str, Tensor]:
    """Gradients of what is in Pyro's store, of the unconstrained values."""
    found = {name: p.grad for name, p in pyro.get_param_store().named_parameters()}
    return {name: gradient for name, gradient in found.items() if gradient is not None}


def closed_form(bound: Callable[..., Tensor], **values: tuple[Tensor, Any]) -> dict[str, Tensor]:
    """Minus the gradient of a bound in the unconstrained parameters, whose values are given."""
    free = {
        name: torch.distributions.transform_to(constraint).inv(value).clone().requires_grad_()
        for name, (value, constraint) in values.items()
    }
    constrained = {
        name: torch.distributions.transform_to(values[name][1])(leaf) for name, leaf in free.items()
    }
    gradients = torch.autograd.grad(-bound(**constrained), list(free.values()))
    return dict(zip(free, gradients, strict=True))


def assert_unbiased(run: Callable[[], Any], expected: dict[str, Tensor], repeats: int = 30) -> None:
    """The gradients in the store agree with what is expected, within a few standard errors."""
    found: dict[str, list[Tensor]] = {name: [] for name in expected}
    for _ in range(repeats):
        pyro.clear_param_store()
        run()
        gradients = stored()
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            found[name].append(gradient.clone())
    for name, values in found.items():
        values_ = torch.stack(values)
        error = values_.std(0) / repeats**0.5
        assert ((values_.mean(0) - expected[name]).abs() <= 4.5 * error + 1e-6).all(), name


# ------------------------------------------------------------------------------ expected gradients


def normal_pair(sampler: bool):
    def model(rows: Tensor) -> None:
        with pyro.plate("data", len(X), len(rows), rows) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[index])

    def guide(rows: Tensor) -> None:
        scale = pyro.param("scale", lambda: torch.tensor([1.0]))
        with pyro.plate("data", len(X), len(rows), rows):
            loc = pyro.param("loc", lambda: torch.zeros(len(X)), event_dim=0)
            pyro.sample("z", dist.Normal(loc, scale).has_rsample_(sampler))

    return model, guide


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("subsample", [False, True])
@pytest.mark.parametrize("gradient", ["pathwise", "stl", "score"])
def test_normal_with_minibatches_of_its_parameters(gradient, subsample, scale) -> None:
    """The plate cuts its parameters, too: a minibatch's gradient is twice the row's."""
    model, guide = normal_pair(sampler=gradient != "score")
    if scale != 1:
        model, guide = (poutine.scale(program, scale=scale) for program in (model, guide))
    estimator = elbo.ELBO(100, gradient)
    parts = [torch.tensor([0]), torch.tensor([1])] if subsample else [torch.tensor([0, 1])]

    def run() -> None:
        for rows in parts:
            estimator.loss_and_grads(model, guide, rows)

    times = scale * len(parts)
    expected = {"loc": times * torch.tensor([0.5, -2.0]), "scale": times * torch.tensor([2.0])}
    assert_unbiased(run, expected)


@pytest.mark.parametrize("gradient", ["pathwise", "stl"])
def test_beta(gradient) -> None:
    flips = torch.tensor([1.0, 1.0, 0.0])

    def model() -> None:
        with pyro.plate("data", 3):
            p = pyro.sample("p", dist.Beta(1.5, 2.0))
            pyro.sample("x", dist.Bernoulli(p), obs=flips)

    def guide() -> None:
        a = pyro.param("a", torch.tensor([2.0, 1.0, 3.0]), constraint=constraints.positive)
        b = pyro.param("b", torch.tensor(1.2), constraint=constraints.positive)
        with pyro.plate("data", 3):
            pyro.sample("p", dist.Beta(a, b))

    def bound(a: Tensor, b: Tensor) -> Tensor:
        log_p, log_not = torch.digamma(a) - torch.digamma(a + b), torch.digamma(b)
        log_not = log_not - torch.digamma(a + b)
        kl = torch.distributions.kl_divergence(dist.Beta(a, b), dist.Beta(1.5, 2.0))
        return (flips * log_p + (1 - flips) * log_not - kl).sum()

    start = {
        "a": (torch.tensor([2.0, 1.0, 3.0]), constraints.positive),
        "b": (torch.tensor(1.2), constraints.positive),
    }
    estimator = elbo.ELBO(200, gradient)
    assert_unbiased(lambda: estimator.loss_and_grads(model, guide), closed_form(bound, **start))


@pytest.mark.parametrize("sampler", [True, False])
def test_exponential(sampler) -> None:
    counts = torch.tensor([2.0, 0.0])

    def model() -> None:
        rate = pyro.param("prior", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Exponential(rate))
            pyro.sample("x", dist.Poisson(z), obs=counts)

    def guide() -> None:
        rate = pyro.param("rate", torch.tensor([1.1, 0.6]), constraint=constraints.positive)
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Exponential(rate).has_rsample_(sampler))

    def bound(prior: Tensor, rate: Tensor) -> Tensor:
        log_x = counts * (-EULER - rate.log()) - 1 / rate - torch.lgamma(counts + 1)
        return (log_x - (rate.log() - prior.log() + prior / rate - 1)).sum()

    start = {
        "prior": (torch.tensor(0.7), constraints.positive),
        "rate": (torch.tensor([1.1, 0.6]), constraints.positive),
    }
    estimator = elbo.ELBO(200, "pathwise" if sampler else "score")
    assert_unbiased(lambda: estimator.loss_and_grads(model, guide), closed_form(bound, **start))


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [(elbo.ELBO, "score"), (elbo.IWELBO, "score"), (elbo.IWELBO, "vimco")],
)
def test_discrete_draws_against_enumeration(estimator, gradient) -> None:
    K = 2

    def model() -> None:
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X)

    def guide() -> None:
        q = pyro.param("q", torch.tensor([0.4, 0.6]), constraint=constraints.unit_interval)
        with pyro.plate("data", 2):
            pyro.sample("z", dist.Bernoulli(q))

    def bound(p: Tensor, q: Tensor) -> Tensor:
        """The mean over all 2^K draws."""
        total = torch.zeros(())
        for bits in range(2**K):
            z = torch.tensor([float(bits >> k & 1) for k in range(K)])[:, None]
            log_q = dist.Bernoulli(q).log_prob(z)
            log_w = dist.Bernoulli(p).log_prob(z) + dist.Normal(z, 1.0).log_prob(X) - log_q
            total = total + (log_q.sum(0).exp() * estimator(K).bound(log_w)).sum()
        return total

    start = {
        "p": (torch.tensor(0.3), constraints.unit_interval),
        "q": (torch.tensor([0.4, 0.6]), constraints.unit_interval),
    }
    made = estimator(K, gradient)
    run = functools.partial(made.loss_and_grads, model, guide)
    assert_unbiased(run, closed_form(bound, **start), repeats=800)


@pytest.mark.parametrize("inner", [-2, -1], ids=["inner left", "inner right"])
def test_nested_plates(inner) -> None:
    outer = -3 - inner

    def model() -> None:
        with pyro.plate("data", 2, dim=outer), pyro.plate("parts", 3, dim=inner):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X[:, None] if outer == -2 else X)

    def guide() -> None:
        shape = (2, 1) if outer == -2 else (2,)
        loc, scale = pyro.param("loc", torch.zeros(shape)), pyro.param("scale", torch.ones(1))
        with pyro.plate("data", 2, dim=outer), pyro.plate("parts", 3, dim=inner):
            pyro.sample("z", dist.Normal(loc, scale))

    right = torch.tensor([1.5, -6.0])
    expected = {"loc": right[:, None] if outer == -2 else right, "scale": torch.tensor([6.0])}
    estimator = elbo.ELBO(100)
    assert_unbiased(lambda: estimator.loss_and_grads(model, guide), expected)


@pytest.mark.parametrize("where", ["model", "guide"])
def test_enumerated_as_by_stock_pyro(where, float64) -> None:
    def model() -> None:
        p = pyro.param("p", torch.tensor(0.3), constraint=constraints.unit_interval)
        with pyro.plate("data", 2):
            z = pyro.sample("z", dist.Bernoulli(p))
            pyro.sample("x", dist.Normal(z, 1.0), obs=X.double())

    def guide() -> None:
        if where == "guide":
            q = pyro.param("q", torch.tensor([0.4, 0.6]), constraint=constraints.unit_interval)
            with pyro.plate("data", 2):
                pyro.sample("z", dist.Bernoulli(q))

    pair = (
        (config_enumerate(model), guide) if where == "model" else (model, config_enumerate(guide))
    )
    results = []
    for estimator in (TraceEnum_ELBO(max_plate_nesting=1), elbo.ELBO()):
        pyro.clear_param_store()
        loss = estimator.loss_and_grads(*pair)
        results.append((loss, stored()))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-12)
    for name, gradient in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], gradient, rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------ as Pyro's own


def learned_pair(rows: int = 2):
    def model(x: Tensor) -> None:
        shift = pyro.param("shift", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        slope = pyro.param("slope", torch.tensor(0.3))
        scale = pyro.param("scale", torch.tensor(0.8), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, scale))

    return model, guide


CALLS = {
    "loss_and_grads": lambda e, pair: e.loss_and_grads(*pair, X),
    "differentiable_loss": lambda e, pair: e.differentiable_loss(*pair, X).backward(),
    "module": lambda e, pair: e(*pair)(X).backward(),
}


@pytest.mark.parametrize("call", CALLS)
def test_value_and_gradient_are_those_of_stock_pyro(call) -> None:
    found = []
    for estimator in (Trace_ELBO(), elbo.ELBO()):
        pyro.clear_param_store()
        pair = learned_pair()
        pyro.set_rng_seed(3)
        CALLS[call](estimator, pair)
        gradients = stored()
        pyro.set_rng_seed(3)
        found.append((estimator.loss(*pair, X), gradients))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1].keys() == found[1][1].keys() == {"shift", "slope", "scale"}
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient)


def test_stock_svi_takes_the_same_steps() -> None:
    ended = []
    for estimator in (Trace_ELBO(), elbo.ELBO()):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        svi = pyro.infer.SVI(*learned_pair(), pyro.optim.Adam({"lr": 0.1}), estimator)
        losses = [svi.step(X) for _ in range(5)]
        ended.append((losses, {k: v.detach() for k, v in pyro.get_param_store().items()}))
    assert ended[0][0] == pytest.approx(ended[1][0], rel=1e-5)
    for name, value in ended[0][1].items():
        torch.testing.assert_close(ended[1][1][name], value)


ESTIMATORS = [
    elbo.IWELBO(3),
    elbo.IWELBO(3, "dreg"),
    elbo.ELBO(2, "stl"),
    elbo.ELBO(2, kl="analytic"),
    elbo.ELBO(beta=elbo.LinearWarmup(10)),
    elbo.RenyiELBO(3, alpha=0.5),
    elbo.ThermodynamicELBO(4),
    elbo.ChiUpperBound(4),
    elbo.ReweightedWakeSleep(4),
]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_every_estimator_trains_what_is_in_the_store(estimator) -> None:
    svi = pyro.infer.SVI(*learned_pair(), pyro.optim.Adam({"lr": 0.01}), estimator)
    svi.step(X)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    svi.step(X)
    of_guide = isinstance(estimator, elbo.ChiUpperBound)  # which trains nothing else
    for name in {"slope", "scale"} if of_guide else before:
        assert not torch.equal(pyro.param(name), before[name]), name


def test_a_pair_without_parameters_has_a_loss_and_no_gradient() -> None:
    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    pyro.set_rng_seed(1)
    stock = Trace_ELBO().loss_and_grads(model, guide, X)
    pyro.set_rng_seed(1)
    assert elbo.ELBO().loss_and_grads(model, guide, X) == pytest.approx(stock, rel=1e-6)


def test_modules_keep_their_parameters_where_nobody_listens() -> None:
    """Beside a ``pyro.param``, in the same program."""

    class Guide(ppvae.Program):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.tensor(0.3))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.slope * x, 1.0))

    model, guide = learned_pair()[0], Guide()
    elbo.ELBO().loss_and_grads(model, guide, X)
    assert list(pyro.get_param_store()) == ["shift"]
    assert guide.slope.grad is not None and stored().keys() == {"shift"}


# ------------------------------------------------------------------------------ in ppvae's own path

EVALUATIONS = {
    "log_weights": lambda m, g: ppvae.log_weights(m, g, X).log_w,
    "evaluate": lambda m, g: elbo.IWELBO(3).evaluate(m, g, X),
    "log_evidence": lambda m, g: diagnostics.log_evidence(m, g, X, num_particles=40).mean,
    "diagnose": lambda m, g: ppvae.diagnose(m, g, X, num_particles=40),
}
TRAININGS = {
    "check_pair": lambda m, g: ppvae.check_pair(m, g, X),
    "SVI": lambda m, g: ppvae.SVI(m, g).step(X),
    "fit": lambda m, g: ppvae.fit(ppvae.SVI(m, g), X, epochs=1, progress=False),
}


@pytest.mark.parametrize("use", EVALUATIONS)
def test_what_a_stock_engine_has_trained_is_read(use) -> None:
    pair = learned_pair()
    with pytest.raises(ValueError, match=r"pyro.param\('s\w+'\) has no value.*train it first"):
        EVALUATIONS[use](*pair)
    assert len(pyro.get_param_store()) == 0
    svi = pyro.infer.SVI(*pair, pyro.optim.Adam({"lr": 0.1}), elbo.ELBO())
    svi.step(X)
    before = {name: value.detach().clone() for name, value in pyro.get_param_store().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a variance over two datapoints
        EVALUATIONS[use](*pair)
    after = dict(pyro.get_param_store().items())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_values_that_are_read_are_those_in_the_store() -> None:
    model, guide = learned_pair()
    with pyro.get_param_store().scope():
        for name, value in (("shift", 0.0), ("slope", 0.5), ("scale", 0.5**0.5)):
            pyro.param(name, torch.tensor(value))  # the exact posterior
        log_w = ppvae.log_weights(model, guide, X, num_particles=4).log_w
    torch.testing.assert_close(log_w, dist.Normal(0.0, 2**0.5).log_prob(X).expand(4, 2))


@pytest.mark.parametrize("known", [False, True], ids=["new", "in the store"])
@pytest.mark.parametrize("use", TRAININGS)
def test_training_a_param_is_refused_with_the_cure(use, known) -> None:
    pair = learned_pair()
    if known:
        elbo.ELBO().loss_and_grads(*pair, X)
    count = len(pyro.get_param_store())
    with pytest.raises(ValueError, match=r"pyro.param|no trainable parameters"):
        TRAININGS[use](*pair)
    assert len(pyro.get_param_store()) == count


def test_inside_a_strict_context_nothing_is_read() -> None:
    pair = learned_pair()
    elbo.ELBO().loss_and_grads(*pair, X)
    with local_parameters(), pytest.raises(ValueError, match="ppvae trains nothing there"):
        ppvae.log_weights(*pair, X)
    with local_parameters(), pytest.raises(ValueError, match="ppvae trains nothing there"):
        elbo.ELBO()(*pair)(X)
