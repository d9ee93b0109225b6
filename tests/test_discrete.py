"""Gradients of discrete latents, by enumeration of all draws or quadrature of the noise."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import oracles
import ppvae
from oracles import BeliefGuide, BeliefNet, LinearGuide, LinearModel, exact_gradient, trainable
from ppvae import elbo
from ppvae.check import check_pair
from ppvae.program import data_plate
from registry import build

X = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 0, 0]], dtype=torch.float64)
pytestmark = pytest.mark.usefixtures("float64")


class Classes(ppvae.Program):
    """Two latents of three classes each, as numbers or one-hot, and what four pixels show."""

    def __init__(self, one_hot: bool) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(5)
        self.one_hot = one_hot
        self.prior = nn.Parameter(torch.tensor([[0.5, -0.3, 0.1], [0.0, 0.4, -0.6]]))
        self.weight = nn.Parameter(torch.randn(4, 2, 3, generator=random, dtype=torch.float64))

    def law(self, logits: Tensor) -> dist.Distribution:
        kind = dist.OneHotCategorical if self.one_hot else dist.Categorical
        return kind(logits=logits).to_event(1)

    def pixels(self, hot: Tensor) -> Tensor:
        return torch.einsum("...ck,pck->...p", hot, self.weight)

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            c = pyro.sample("c", self.law(self.prior))
            hot = c if self.one_hot else nn.functional.one_hot(c, 3).to(x.dtype)
            pyro.sample("x", dist.Bernoulli(logits=self.pixels(hot)).to_event(1), obs=x)


class ClassesGuide(ppvae.Program):
    def __init__(self, model: Classes) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(6)
        self.law = model.law
        self.weight = nn.Parameter(torch.randn(6, 4, generator=random, dtype=torch.float64))

    def logits(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).unflatten(-1, (2, 3))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            pyro.sample("c", self.law(self.logits(x)))


def classes_elbo(model: Classes, guide: ClassesGuide, x: Tensor) -> Tensor:
    """The exact ELBO of all rows, over the 9 states; differentiable."""
    total = x.new_zeros(())
    log_q = guide.logits(x).log_softmax(-1)
    for c in itertools.product(range(3), repeat=2):
        hot = nn.functional.one_hot(torch.tensor(c), 3).to(x.dtype)
        q = (log_q * hot).sum((-2, -1))
        p = (model.prior.log_softmax(-1) * hot).sum()
        fit = dist.Bernoulli(logits=model.pixels(hot)).log_prob(x).sum(-1)
        total = total + (q.exp() * (p + fit - q)).sum()
    return total


def by_intervals(p: Tensor, monkeypatch, loss, parameters) -> Tensor:
    """The expected gradient over uniform noise of the shape of p, on whose places it depends.

    Between p and 1 - p nothing changes, so each bit has three intervals.
    """
    flat = p.flatten()
    cuts = torch.stack([0 * flat, torch.minimum(flat, 1 - flat), torch.maximum(flat, 1 - flat)])
    cuts = torch.cat([cuts, torch.ones_like(flat)[None]])
    mass, middle = cuts.diff(dim=0), (cuts[1:] + cuts[:-1]) / 2
    total = torch.zeros(sum(q.numel() for q in parameters))
    places = torch.arange(len(flat))
    for choice in itertools.product(range(3), repeat=len(flat)):
        chosen = torch.tensor(choice)
        u = middle[chosen, places].reshape(p.shape)
        monkeypatch.setattr(torch, "rand_like", lambda like, u=u: u.reshape(like.shape))
        total += mass[chosen, places].prod() * exact_gradient(loss(), parameters)
    return total


# ------------------------------------------------------------------------------ DisARM


@pytest.mark.parametrize("beta", [1.0, 3.0])
def test_disarm_has_the_exact_mean(beta, monkeypatch) -> None:
    model, guide = BeliefNet(), BeliefGuide()
    parameters = trainable(model, guide)
    for row in X.split(1):
        log_q = guide.log_q(row)
        prior = dist.Bernoulli(logits=model.prior).log_prob(oracles.states()).sum(-1)[:, None]
        log_p = model.log_joint(row) - prior + beta * (prior - log_q)
        expected = exact_gradient(-(log_q.exp() * log_p).sum(), parameters)
        p = (row @ guide.weight.T + guide.bias).sigmoid().detach()
        objective = elbo.ELBO(2, "disarm", beta=beta)(model, guide)
        found = by_intervals(p, monkeypatch, lambda o=objective, r=row: o(r), parameters)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("one_hot", [False, True])
def test_disarm_of_classes_has_the_exact_mean(one_hot, monkeypatch) -> None:
    model = Classes(one_hot)
    guide = ClassesGuide(model)
    parameters = trainable(model, guide)
    for row in X[:2].split(1):
        expected = exact_gradient(-classes_elbo(model, guide, row), parameters)
        q = guide.logits(row).softmax(-1).detach()
        p = torch.stack([q[..., 0], q[..., 1] / (1 - q[..., 0])], -1)  # of stopping at a class
        objective = elbo.ELBO(2, "disarm")(model, guide)
        found = by_intervals(p, monkeypatch, lambda o=objective, r=row: o(r), parameters)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_the_draws_of_a_pair_have_the_law_of_the_guide() -> None:
    model = Classes(False)
    guide = ClassesGuide(model)
    from ppvae.elbo.discrete import Antithetic
    from ppvae.weights import weigh

    weights = weigh(model, guide, (X,), {}, 20_000, leaves=Antithetic())
    c = weights.guide_trace.nodes["c"]["value"]
    share = nn.functional.one_hot(c, 3).double()
    q = guide.logits(X).softmax(-1).detach()
    for half in share.chunk(2):  # each of independent draws
        error = (half.mean(0) - q).abs() / (q * (1 - q) / len(half)).sqrt()
        assert error.max() < 4.8
    binary = weigh(BeliefNet(), BeliefGuide(), (X,), {}, 2000, leaves=Antithetic())
    one, other = binary.guide_trace.nodes["h"]["value"].chunk(2)
    assert ((one - one.mean(0)) * (other - other.mean(0))).mean(0).max() < 0


def test_disarm_is_less_noisy_than_leaving_one_out() -> None:
    model, guide = BeliefNet(), BeliefGuide()
    many, noise = X.repeat(50, 1), {}
    for gradient in ("score", "disarm"):
        objective = elbo.ELBO(2, gradient)(model, guide)
        found = oracles.gradients(lambda o=objective: o(many), trainable(guide), 200, 50)
        noise[gradient] = found.var(0).sum().item()
    assert noise["disarm"] < 0.92 * noise["score"], noise


# ------------------------------------------------------------------------------ vargrad, score


def with_draws(monkeypatch, draws: Tensor) -> None:
    """Bernoullis draw these, ``(K, 1, 3)``."""
    monkeypatch.setattr(
        torch.distributions.Bernoulli,
        "sample",
        lambda self, shape=(): draws[: 1 if len(self._extended_shape(shape)) < 3 else None].reshape(
            self._extended_shape(shape)
        ),
    )


def over_tuples(monkeypatch, guide, row: Tensor, K: int, loss, parameters) -> Tensor:
    """The expected gradient over all 8^K tuples of states."""
    mass = guide.log_q(row).exp().detach()[:, 0]
    total = torch.zeros(sum(p.numel() for p in parameters))
    for choice in itertools.product(range(8), repeat=K):
        with_draws(monkeypatch, oracles.states()[list(choice)].unsqueeze(1))
        total += mass[list(choice)].prod() * exact_gradient(loss(), parameters)
    return total


@pytest.mark.parametrize("gradient", ["vargrad", "score"])
@pytest.mark.parametrize("K", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_vargrad_and_leaving_one_out_have_the_exact_mean(gradient, K, monkeypatch) -> None:
    model, guide, row = BeliefNet(), BeliefGuide(), X[:1]
    parameters = trainable(model, guide)
    exact = oracles.belief_expected_bound(elbo.ELBO().bound, model, guide, row, 1)
    objective = elbo.ELBO(K, gradient)(model, guide)
    found = over_tuples(monkeypatch, guide, row, K, lambda: objective(row), parameters)
    torch.testing.assert_close(found, exact_gradient(-exact.sum(), parameters), rtol=0, atol=1e-10)


@pytest.mark.parametrize("K", [2, 5])
def test_vargrad_is_that_of_the_variance_and_leaving_one_out_but_for_its_own_score(K) -> None:
    """At the same draws, for discrete and for continuous latents."""
    linear = LinearModel(2, 4)
    pairs = [
        (BeliefNet(), BeliefGuide(), X),
        (linear, LinearGuide(linear, scale=1.4, shift=0.3, path=False), linear.draw(3)),
    ]
    for model, guide, x in pairs:
        parameters, found = trainable(guide), {}
        for gradient in ("vargrad", "score"):
            torch.manual_seed(2)
            found[gradient] = exact_gradient(elbo.ELBO(K, gradient)(model, guide)(x), parameters)
        torch.manual_seed(2)
        weights = ppvae.log_weights(model, guide, x, num_particles=K)
        log_q = ppvae.weights.drawn_log_q(weights)
        if "h" not in weights.q:  # its score is that of the value, not of the path to it
            z = weights.guide_trace.nodes["z"]["value"].detach()
            log_q = guide.posterior(x).expand(z.shape[:-1]).log_prob(z)
            log_w = weights.log_w.detach() - (log_q - log_q.detach())
        else:
            log_w = weights.log_w
        variance = exact_gradient(0.5 * log_w.var(0).sum(), parameters)
        torch.testing.assert_close(found["vargrad"], variance, rtol=0, atol=1e-12)
        own = exact_gradient(log_q.mean(0).sum(), parameters)
        torch.testing.assert_close(found["score"], variance + own, rtol=1e-10, atol=1e-10)


def test_vargrad_vanishes_at_the_exact_posterior() -> None:
    model = LinearModel(2, 4)
    guide = LinearGuide(model)
    x = model.draw(5)
    grads = torch.autograd.grad(elbo.ELBO(4, "vargrad")(model, guide)(x), trainable(guide))
    assert max(g.abs().max() for g in grads) < 1e-10


# ------------------------------------------------------------------------------ RELAX


class Coin(ppvae.Program):
    """One bit, and four pixels; each row has parameters of its own, so a gradient for each."""

    def __init__(self, rows: int = 1) -> None:
        super().__init__()
        self.prior = nn.Parameter(torch.tensor(0.3).repeat(rows))
        self.weight = nn.Parameter(torch.tensor([1.5, -2.0, 0.7, 0.2]).repeat(rows, 1))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            h = pyro.sample("h", dist.Bernoulli(logits=self.prior))
            logits = h.unsqueeze(-1) * self.weight
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


class CoinGuide(ppvae.Program):
    def __init__(self, rows: int = 1) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.tensor(-0.6).repeat(rows))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            pyro.sample("h", dist.Bernoulli(logits=self.logit))


def noises(p: float, nodes: int = 30) -> Tensor:
    """u, v and mass of a grid that is exact for what is smooth on either side of 1 - p: (3, G)."""
    points, masses = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(nodes))
    points, masses = (points + 1) / 2, masses / 2
    parts = []
    for low, high in ((0.0, 1 - p), (1 - p, 1.0)):
        u = torch.cartesian_prod(low + (high - low) * points, points)
        mass = torch.outer((high - low) * masses, masses).flatten()
        parts.append(torch.stack([u[:, 0], u[:, 1], mass]))
    return torch.cat(parts, 1)


def with_noise(monkeypatch, *values: Tensor) -> None:
    noise = iter(values)
    monkeypatch.setattr(torch, "rand_like", lambda like: next(noise).reshape(like.shape))


@pytest.mark.parametrize("control", [(1.0, math.log(0.5)), (0.3, 0.0), (0.0, 0.0)])
def test_relax_has_the_exact_mean_whatever_its_control(control, monkeypatch) -> None:
    u, v, mass = noises(torch.tensor(-0.6).sigmoid().item())
    model, guide, row = Coin(len(u)), CoinGuide(len(u)), X[1:2]
    objective = elbo.RELAX(1)(model, guide)
    objective.state.control.copy_(torch.tensor(control))
    with_noise(monkeypatch, u, v)
    parameters = trainable(model, guide)
    grads = torch.autograd.grad(objective(row.expand(len(u), -1)), parameters)
    found = [torch.einsum("g,g...->...", mass, grad) for grad in grads]

    model, guide = Coin(), CoinGuide()
    b = torch.tensor([[0.0], [1.0]])
    log_q = dist.Bernoulli(logits=guide.logit).log_prob(b)
    fit = dist.Bernoulli(logits=b.unsqueeze(-1) * model.weight).log_prob(row).sum(-1)
    exact = (log_q.exp() * (fit + dist.Bernoulli(logits=model.prior).log_prob(b) - log_q)).sum()
    expected = torch.autograd.grad(-exact, trainable(model, guide))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other[0], rtol=0, atol=1e-9)


def test_what_relax_learns_descends_the_square_of_its_gradient(monkeypatch) -> None:
    u, v = torch.rand(2, 40)
    guide, row = CoinGuide(40), X[1:2].expand(40, -1)
    objective = elbo.RELAX(1)(Coin(40), guide)
    hard, p = (u > 1 - guide.logit.sigmoid()).double(), guide.logit.sigmoid().detach()

    def squared(control: Tensor) -> Tensor:
        objective.state.control.copy_(control)
        with_noise(monkeypatch, u, v)
        (grad,) = torch.autograd.grad(objective.eval()(row), guide.logit)
        return (-grad + (hard - p)).square().sum()  # without the score of log q itself

    start = torch.tensor([0.8, -0.4])
    numeric = torch.stack(
        [(squared(start + h) - squared(start - h)) / 2e-5 for h in 1e-5 * torch.eye(2)]
    )
    objective.state.control.copy_(start)
    with_noise(monkeypatch, u, v)
    objective.train()(row)
    torch.testing.assert_close(objective.state.latest_slope, numeric, rtol=1e-6, atol=1e-6)
    assert ((objective.state.control - start).sign() == -numeric.sign()).all()
    assert ppvae.SVI(Coin(), CoinGuide(), loss=elbo.RELAX(2)).state_dict()


def test_relax_learns_less_variance() -> None:
    torch.manual_seed(0)
    model, guide = BeliefNet(), BeliefGuide()
    many, noise = X.repeat(10, 1), {}
    fixed, learned = (elbo.RELAX(2, speed=speed)(model, guide) for speed in (0.0, 0.05))
    for _ in range(60):
        learned(many).backward()
    learned.eval()
    score = elbo.ELBO(2, "score")(model, guide)
    for name, objective in {"score": score, "rebar": fixed, "relax": learned}.items():
        found = oracles.gradients(lambda o=objective: o(many), trainable(guide), 150, 10)
        noise[name] = found.var(0).sum().item()
    assert noise["relax"] < noise["rebar"] < 0.7 * noise["score"], noise
    assert learned.state.control.tolist() != fixed.state.control.tolist()


# ------------------------------------------------------------------------------ biased


def test_straight_through_and_gumbel_are_biased_and_by_how_much(monkeypatch) -> None:
    """Against enumeration: straight-through exactly, over all states; Gumbel by many draws."""
    model, guide, row = BeliefNet(), BeliefGuide(), X[:1]
    parameters = trainable(guide)
    exact = oracles.belief_expected_bound(elbo.ELBO().bound, model, guide, row, 1)
    expected = exact_gradient(-exact.sum(), parameters)
    objective = elbo.ELBO(1, "straight_through")(model, guide)
    with monkeypatch.context() as patched:
        found = over_tuples(patched, guide, row, 1, lambda: objective(row), parameters)
    bias = (found - expected).norm() / expected.norm()
    assert 0.05 < bias < 1.0, bias
    # the model's own gradient has none
    ones = torch.autograd.grad(objective(X.repeat(2000, 1)), trainable(model))
    assert all(g.isfinite().all() for g in ones)
    gumbel = elbo.ELBO(1, "gumbel")(model, guide)
    many = row.repeat(500, 1)
    draws = oracles.gradients(lambda: gumbel(many), parameters, 100, 500)
    with pytest.raises(AssertionError, match="standard errors off"):
        oracles.assert_mean(draws, expected)
    assert 0.02 < (draws.mean(0) - expected).norm() / expected.norm() < 1.0


@pytest.mark.parametrize("gradient", ["straight_through", "gumbel"])
@pytest.mark.parametrize("kind", ["binary", "one_hot"])
def test_biased_draws_have_the_law_and_the_value_of_exact_ones(gradient, kind) -> None:
    if kind == "binary":
        model, guide, name = BeliefNet(), BeliefGuide(), "h"
        probability = (X @ guide.weight.T + guide.bias).sigmoid()
    else:
        model = Classes(True)
        guide, name = ClassesGuide(model), "c"
        probability = guide.logits(X).softmax(-1)
    from ppvae.elbo.discrete import THROUGH
    from ppvae.weights import weigh

    weights = weigh(model, guide, (X,), {}, 20_000, leaves=THROUGH[gradient]())
    value = weights.guide_trace.nodes[name]["value"]
    assert value.requires_grad and ((value == 0) | (value == 1)).all()
    p = probability.detach()
    error = (value.detach().mean(0) - p).abs() / (p * (1 - p) / 20_000).sqrt()
    assert error.max() < 4.8


def test_the_table_of_compare_says_biased() -> None:
    model, guide = BeliefNet(), BeliefGuide()
    listed = [elbo.ELBO(2, "disarm"), elbo.ELBO(2, "gumbel"), elbo.RELAX(2)]
    table = ppvae.compare(model, guide, X, listed, timing_rounds=0, repeats=5)
    assert list(table.index) == ["ELBO-2 disarm", "ELBO-2 gumbel (biased)", "RELAX-2"]


# ------------------------------------------------------------------------------ refusals


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="num_particles must be even, got 3"):
        elbo.ELBO(3, "disarm")
    with pytest.raises(ValueError, match='"vargrad" compares particles'):
        elbo.ELBO(1, "vargrad")
    with pytest.raises(ValueError, match="speed of learning"):
        elbo.RELAX(speed=-1.0)
    with pytest.raises(ValueError, match='use kl="sampled"'):
        elbo.ELBO(2, "disarm", kl="analytic")
    model = Classes(False)
    guide = ClassesGuide(model)
    for gradient in ("straight_through", "gumbel"):
        with pytest.raises(ValueError, match="'c' is Categorical; use gradient=\"score\""):
            elbo.ELBO(2, gradient)(model, guide)(X)
    with pytest.raises(ValueError, match="draws latents of Bernoulli, and site 'c'"):
        elbo.RELAX(2)(model, guide)(X)
    mixture = oracles.MixtureModel(), oracles.MixtureGuide()
    with pytest.raises(ValueError, match="draws latents of Bernoulli, and site 'c'"):
        elbo.RELAX(2)(*mixture)(torch.tensor([-2.0, 0.5]))
    elbo.ELBO(2, "disarm")(*mixture)(torch.tensor([-2.0, 0.5])).backward()  # c on x alone
    assert mixture[1].logits.grad.abs().sum() > 0

    def chain(x):
        with data_plate(x):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))

    def model_of_chain(x):
        with data_plate(x):
            a = pyro.sample("a", dist.Bernoulli(0.3))
            b = pyro.sample("b", dist.Bernoulli(0.2 + 0.5 * a))
            pyro.sample("x", dist.Normal(a + b, 1.0), obs=x)

    for estimator in (elbo.ELBO(2, "disarm"), elbo.RELAX(2)):
        with pytest.raises(ValueError, match="'b' depends on 'a' in the guide"):
            estimator(model_of_chain, chain)(torch.zeros(3))
    model, guide, args = build("m2")
    with pytest.raises(ValueError, match="drops the gradient of log q, which an enumerated"):
        elbo.ELBO(2, "vargrad")(model, guide)(*args)
    assert check_pair(BeliefNet(), BeliefGuide(), X).gradients["score"] == ""
