"""Laws over every pair and every estimator, and on pairs with a known evidence."""

import inspect
import io
import itertools
import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import oracles
import ppvae
from oracles import LinearGuide, LinearModel, assert_below, assert_mean, trainable
from ppvae import elbo, guides, models
from ppvae.auxiliary import own_parameters
from ppvae.elbo import State
from ppvae.local import Indexed
from ppvae.program import data_plate, local_parameters
from registry import (
    ALL_ESTIMATORS,
    ALL_PAIRS,
    BESIDE,
    CODES,
    ESTIMATED,
    SOFT_CODES,
    WEIGHS_ANY,
    build,
    cross,
    owners,
)

crossed = pytest.mark.parametrize(("pair", "estimator"), list(cross()))
unweighted = [e for e in ALL_ESTIMATORS if not e.startswith(("ELBO-beta", "AnnealedELBO-step=0.3"))]


# ------------------------------------------------------------------------------ 1. exact guide


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("full", [False, True], ids=["diagonal", "full covariance"])
@pytest.mark.parametrize("latent_dim", [1, 2, 10])
def test_exact_guide_gives_the_evidence_as_every_weight(latent_dim: int, full: bool) -> None:
    # 2 < 10: with full covariance the columns of W need not be orthogonal
    model = LinearModel(latent_dim, 5 if full and latent_dim == 10 else latent_dim + 2)
    guide = LinearGuide(model, full=full)
    x = model.draw(7)
    exact = model.log_evidence(x)
    log_w = ppvae.log_weights(model, guide, x, num_particles=6).log_w
    assert log_w.shape == (6, 7)
    torch.testing.assert_close(log_w, exact.expand(6, 7), rtol=0, atol=1e-10)
    for label in unweighted:
        if "mixed" in label and full:
            continue  # equal in expectation only
        bound = ALL_ESTIMATORS[label].evaluate(model, guide, x)
        torch.testing.assert_close(bound, exact, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("bottom_up", [True, False])
def test_exact_two_level_guide_gives_the_evidence(bottom_up: bool) -> None:
    model = oracles.TwoLevelModel()
    guide = oracles.TwoLevelGuide(model, bottom_up)
    x = torch.linspace(-2, 2, 5)
    log_w = ppvae.log_weights(model, guide, x, num_particles=4).log_w
    torch.testing.assert_close(log_w, model.log_evidence(x).expand(4, 5), rtol=0, atol=1e-10)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    "label", [e for e in unweighted if ("stl" in e or "dreg" in e) and "insomnia" not in e]
)
@pytest.mark.parametrize("latent_dim", [1, 2, 10])
def test_stl_and_dreg_vanish_at_the_exact_guide(label: str, latent_dim: int) -> None:
    model = LinearModel(latent_dim, latent_dim + 2)
    guide = LinearGuide(model)
    x = model.draw(7)
    loss = ALL_ESTIMATORS[label](model, guide)(x)
    grads = torch.autograd.grad(loss, trainable(guide), retain_graph=True)
    assert max(g.abs().max() for g in grads) < 1e-10
    # the model's own gradient does not: it is that of some weights' mean, log p(x) in expectation
    if ALL_ESTIMATORS[label].sign < 0:
        return  # an upper bound trains the guide alone
    assert all(g.abs().max() > 1e-3 for g in torch.autograd.grad(loss, trainable(model)))


# ------------------------------------------------------------------------------ 2. wrong guide


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("scale", [0.6, 1.5])
def test_bounds_lie_below_the_evidence_and_iwelbo_rises_with_k(scale: float) -> None:
    model = LinearModel(2, 4)
    guide = LinearGuide(model, scale=scale, shift=0.3)
    x = model.draw(5)
    exact = model.log_evidence(x).sum().item()
    many = x.repeat(2000, 1)
    particles = [1, 2, 4, 16]
    log_w = ppvae.log_weights(model, guide, many, num_particles=max(particles)).log_w.detach()
    values = []
    for K in particles:
        bound = elbo.IWELBO(K).bound(log_w[:K]).reshape(2000, 5).sum(1)
        assert_below(bound, exact)
        values.append(bound)
    for fewer, more in itertools.pairwise(values):  # the same draws: paired
        gain = more - fewer
        assert gain.mean() > 4 * gain.std() / math.sqrt(len(gain))
    assert_mean(values[0], oracles.linear_elbo(model, guide, x).sum().detach())
    for estimator in (elbo.ELBO(4), elbo.RenyiELBO(4, alpha=0.5), elbo.RenyiELBO(4, alpha=3.0)):
        assert_below(estimator.bound(log_w[:4]).reshape(2000, 5).sum(1), exact)


class Subsampled(LinearModel):
    """A pair on a whole data set that draws its own minibatch."""

    def forward(self, x: Tensor, size: int | None = None) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            mean = z @ self.weight.T + self.bias
            fn = dist.Normal(mean, self.log_sigma.exp()).to_event(1)
            pyro.sample("x", fn, obs=x[rows])


class SubsampledGuide(LinearGuide):
    def forward(self, x: Tensor, size: int | None = None) -> None:
        with pyro.plate("data", len(x), subsample_size=2) as rows:
            pyro.sample("z", self.posterior(x[rows]))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("label", "way"),
    [
        ("ELBO", "full"),
        ("ELBO", "by hand"),
        ("IWELBO", "full"),
        ("IWELBO", "size"),
        ("IWELBO", "subsample_size"),
        ("IWELBO dreg", "size"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("ELBO", "size"),
                ("ELBO", "subsample_size"),
                ("IWELBO", "by hand"),
                ("IWELBO dreg", "full"),
                ("IWELBO dreg", "subsample_size"),
                ("IWELBO dreg", "by hand"),
            ]
        ),
    ],
)
def test_full_data_and_minibatches_have_the_same_expectation(label: str, way: str) -> None:
    own = way == "subsample_size"
    model = (Subsampled if own else LinearModel)(1, 3)
    guide = (SubsampledGuide if own else LinearGuide)(model, scale=1.6, shift=0.4)
    x = model.draw(6)
    K = 2
    estimator = {
        "ELBO": elbo.ELBO(K),
        "IWELBO": elbo.IWELBO(K),
        "IWELBO dreg": elbo.IWELBO(K, "dreg"),
    }[label]
    objective, parameters = estimator(model, guide), trainable(model, guide)
    exact = -oracles.linear_expected_bound(estimator.bound, model, guide, x, K, nodes=40).sum()

    def loss() -> Tensor:
        if way in ("full", "subsample_size"):
            return objective(x)
        rows = torch.randperm(6)[:2]
        return objective(x[rows], size=6) if way == "size" else 3 * objective(x[rows])

    losses, grads = [], []
    for _ in range(150):
        value = loss()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, parameters)]))
        losses.append(value.detach())
    assert_mean(torch.stack(losses), exact.detach(), "value")
    assert_mean(torch.stack(grads), oracles.exact_gradient(exact, parameters), "gradient")


# ------------------------------------------------------------------------------ 4. analytic KL


def repeated_losses(estimator: elbo.ELBO, model, guide, x: Tensor, draws: int = 3000) -> Tensor:
    weights = ppvae.log_weights(model, guide, x.repeat(draws, 1))
    return estimator.effective(weights, State())[0].reshape(draws, len(x)).sum(1).detach()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("beta", [1.0, 4.0])
def test_analytic_and_sampled_kl_have_the_same_mean(beta: float) -> None:
    model = LinearModel(2, 4, sigma=3.0)  # a weak likelihood: the KL is most of the noise
    guide = LinearGuide(model, scale=0.5, shift=1.0)
    x = model.draw(5)
    exact = oracles.linear_elbo(model, guide, x, beta).sum().detach()
    values = {
        kl: repeated_losses(elbo.ELBO(beta=beta, kl=kl), model, guide, x)
        for kl in ("sampled", "analytic", "mixed")
    }
    for kl, value in values.items():
        assert_mean(value, exact, kl)
    assert values["analytic"].var() < 0.5 * values["sampled"].var()
    assert values["mixed"].var() < 0.5 * values["sampled"].var()


@pytest.mark.usefixtures("float64")
def test_the_analytic_kl_may_be_noisier_where_the_guide_is_good() -> None:
    """Not a law, in spite of folklore: at the exact posterior the sampled form has no noise."""
    model = LinearModel(2, 4)
    guide = LinearGuide(model)
    x = model.draw(5)
    assert repeated_losses(elbo.ELBO(), model, guide, x).std() < 1e-10
    assert repeated_losses(elbo.ELBO(kl="analytic"), model, guide, x).std() > 1.0


# ------------------------------------------------------------------------------ 5. every pair


@crossed
def test_every_parameter_gets_a_gradient(pair: str, estimator: elbo.Estimator) -> None:
    model, guide, args = build(pair)
    objective = estimator(model, guide)
    objective.eval()  # in training mode batch norm takes away the bias before it
    objective(*args).backward()
    parameters = own_parameters(objective)
    assert parameters
    if estimator.sign < 0:  # an upper bound trains the guide alone
        trained = {id(p) for module in owners(guide) for p in module.parameters()}
        parameters = {name: p for name, p in parameters.items() if id(p) in trained}
    for name, parameter in parameters.items():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("pair", ESTIMATED)
def test_every_parameter_gets_a_gradient_from_an_estimate_or_is_the_ratios(pair: str) -> None:
    model, guide, args = build(pair)
    objective = elbo.ELBO(3)(model, guide)
    objective(*args).backward()
    for name, parameter in objective.named_parameters():
        if ".ratio." in name:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def of_one_draw(pair: str) -> elbo.Estimator:
    """Where all draws are equal, or have no path."""
    if pair in SOFT_CODES:
        return elbo.ELBO(gradient="score")
    return elbo.ELBO() if pair == "fsq" else elbo.VQELBO()


@pytest.mark.parametrize("pair", [*ALL_PAIRS, *ESTIMATED, *CODES, *SOFT_CODES])
def test_save_and_load_reproduce_the_log_weights(pair: str) -> None:
    model, guide, args = build(pair)
    bound = elbo.ELBO(3) if pair in ESTIMATED else elbo.IWELBO(3)
    bound, draws = (bound, 4) if pair not in CODES | SOFT_CODES else (of_one_draw(pair), 1)
    first = ppvae.SVI(model, guide, torch.optim.Adam, bound)
    for _ in range(2):  # moves parameters and batch-norm statistics
        first.step(*args)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    other_model, other_guide, _ = build(pair, seed=1)
    second = ppvae.SVI(other_model, other_guide, torch.optim.Adam, bound)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    assert second.num_steps == 2

    def log_w(svi: ppvae.SVI) -> Tensor:
        pyro.set_rng_seed(7)
        svi.objective.eval()
        return ppvae.log_weights(svi.model, svi.guide, *args, num_particles=draws).log_w

    assert torch.equal(log_w(first), log_w(second))
    first.objective.train()
    second.objective.train()
    losses = []
    for svi in (first, second):  # the optimiser's state came along
        pyro.set_rng_seed(8)
        losses.append([svi.step(*args) for _ in range(2)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("pair", [*WEIGHS_ANY, *ESTIMATED, *SOFT_CODES])
def test_k_particles_at_once_equal_k_one_by_one(pair: str) -> None:
    """Written out here with stock handlers, so this also checks what a log-weight is."""
    model, guide, args = build(pair)
    for module in owners(model, guide):
        module.eval()
    K = 3
    weights = ppvae.log_weights(model, guide, *args, num_particles=K)
    with local_parameters(), torch.no_grad():
        for k in range(K):
            drawn = {n: weights.guide_trace.nodes[n]["value"][k] for n in weights.latents}
            at_draws = poutine.condition(guide, data=drawn)
            guide_trace = poutine.trace(at_draws).get_trace(*args)
            trace = poutine.trace(poutine.condition(model, data=drawn)).get_trace(*args)
            guide_trace.compute_log_prob()
            trace.compute_log_prob()
            log_q = sum(guide_trace.nodes[name]["log_prob"] for name in weights.latents)
            sites = [*weights.latents, *weights.observed]
            log_p = sum(trace.nodes[name]["log_prob"] for name in sites)
            torch.testing.assert_close(weights.log_w[k], log_p - log_q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", CODES)
def test_every_parameter_gets_a_gradient_from_one_draw(pair: str) -> None:
    """What a codebook holds is no parameter of the pair: averages, or FSQ's levels."""
    model, guide, args = build(pair)
    objective = of_one_draw(pair)(model, guide)
    objective(*args).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


@crossed
def test_three_ways_to_train_agree(pair: str, estimator: elbo.Estimator) -> None:
    """ppvae.SVI, stock SVI and the module: the same loss, the same step, at the same seed."""
    results = []
    beside = isinstance(estimator, elbo.FactorELBO) or pair in BESIDE  # see their own tests
    refused = {"stock"} if beside else set()
    for way in ("ppvae", "stock", "module"):
        if way in refused:
            continue
        pyro.clear_param_store()
        model, guide, args = build(pair)
        for module in owners(model, guide):
            module.eval()  # in training mode batch norm takes away the bias before it
        pyro.set_rng_seed(3)
        if way == "ppvae":
            loss = ppvae.SVI(model, guide, torch.optim.SGD, estimator).step(*args)
        elif way == "stock":
            optim = pyro.optim.SGD({"lr": 1e-3})
            loss = pyro.infer.SVI(model, guide, optim, loss=estimator).step(*args)
        else:
            objective = estimator(model, guide)
            optim = torch.optim.SGD(objective.parameters())
            value = objective(*args)
            value.backward()
            optim.step()
            loss = value.item()
        values = [
            p.detach().clone() for m in owners(model, guide) for p in own_parameters(m).values()
        ]
        results.append((loss, values))
    (loss, values), *others = results
    if estimator.sign < 0:  # an upper bound trains the guide alone
        values = values[-len(list(owners(guide)[0].parameters())) :]
        others = [(other, v[-len(values) :]) for other, v in others]
    before = [p for m in owners(*build(pair)[:2]) for p in own_parameters(m).values()]
    before = before[-len(values) :]
    assert all(not torch.equal(a, b) for a, b in zip(before, values, strict=True))
    for other_loss, other_values in others:
        assert other_loss == pytest.approx(loss, rel=1e-6)
        torch.testing.assert_close(other_values, values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pair", [*ALL_PAIRS, *CODES, *SOFT_CODES])
def test_evaluating_a_pair_changes_nothing(pair: str) -> None:
    model, guide, args = build(pair)
    modules = owners(model, guide)
    for module in modules:
        module.eval()
    before = [{k: v.clone() for k, v in m.state_dict().items()} for m in modules]
    estimator = elbo.IWELBO(2) if pair not in CODES else of_one_draw(pair)
    bound = estimator.evaluate(model, guide, *args)
    assert bound.shape == (len(args[0]),) and not bound.requires_grad
    for module, state in zip(modules, before, strict=True):
        torch.testing.assert_close(dict(module.state_dict()), state, rtol=0, atol=0)
    assert len(pyro.get_param_store()) == 0


def test_a_plate_of_a_data_set_scales_the_loss_only() -> None:
    model, guide, (x,) = build("vae_bernoulli")
    losses = []
    for size in (None, 60):
        pyro.set_rng_seed(0)
        losses.append(elbo.IWELBO(4)(model, guide)(x, size=size).item())
    assert losses[1] == pytest.approx(10 * losses[0], rel=1e-6)
    assert data_plate(x, size=60).size == 60


TAKE_A_SIZE = [pair for pair in ALL_PAIRS if pair not in ("pyro_modules", "tutorial")]


@pytest.mark.parametrize("pair", [*TAKE_A_SIZE, *ESTIMATED, *CODES, "responsibilities"])
def test_every_pair_knows_that_its_rows_are_some_of_more(pair: str) -> None:
    """Model and guide: plates that differ would be refused."""
    if pair == "responsibilities":
        model: Any = models.GaussianMixture(2, dim=3)
        guide: Any = guides.Responsibilities(model)
        args: Any = (torch.randn(6, 3),)
    else:
        model, guide, args = build(pair)
    rows = len(args[0])
    pyro.set_rng_seed(0)
    plain = ppvae.log_weights(model, guide, *args)
    pyro.set_rng_seed(0)
    weights = ppvae.log_weights(model, guide, *args, size=10 * rows)
    assert weights.scale == 10.0 and not weights.site_scales
    torch.testing.assert_close(weights.log_w, plain.log_w)


@pytest.mark.parametrize("pair", [*TAKE_A_SIZE, *ESTIMATED, *CODES])
def test_models_draw_the_rows_that_they_are_not_given(pair: str) -> None:
    model, _, args = build(pair)
    if isinstance(model, Indexed):
        return
    model.eval()
    second = list(inspect.signature(model.forward).parameters)[1]  # y, or an offset
    masked = isinstance(model, (models.Masked, models.MissingNotAtRandom))
    given = {second: args[1]} if len(args) > 1 and not masked else {"size": 6}
    drawn = model(**given)
    assert drawn.shape == args[0].shape and not torch.equal(drawn, args[0])
