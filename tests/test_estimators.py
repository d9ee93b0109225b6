"""The family beyond ELBO, IWELBO and Renyi: exact expectations of values and gradients."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import TraceEnum_ELBO
from torch import Tensor, nn

import oracles
import ppvae
from oracles import BeliefGuide, BeliefNet, LinearGuide, LinearModel, assert_mean, trainable
from ppvae import elbo
from ppvae.elbo.gradients import coefficient
from ppvae.elbo.importance import log_mean_exp
from ppvae.elbo.kl import _divergence, closed_form_kl
from ppvae.program import data_plate
from registry import ALL_ESTIMATORS, DIMENSIONS

pytestmark = pytest.mark.usefixtures("float64")
DRAWS, ROWS = 40, 50


def mean_gradients(estimator: elbo.Estimator, model, guide, x: Tensor) -> Tensor:
    """Independent gradients of the loss per row of x, over all parameters: (draws, P)."""
    objective, many = estimator(model, guide), x.repeat(ROWS, *[1] * (x.dim() - 1))
    return oracles.gradients(lambda: objective(many), trainable(model, guide), DRAWS, ROWS)


# ------------------------------------------------------------------------------ bounds of K draws


BOUNDS = (
    [elbo.MIWELBO(2, gradient, num_groups=2) for gradient in elbo.MIWELBO.gradients]
    + [elbo.CIWELBO(3, gradient, beta=0.3) for gradient in elbo.CIWELBO.gradients]
    + [elbo.ThermodynamicELBO(3, g, (0.2, 0.5)) for g in ("pathwise", "score", "vimco")]
)
IN_TWO_DIMENSIONS = (
    [elbo.MIWELBO(1, gradient, num_groups=2) for gradient in elbo.MIWELBO.gradients]
    + [elbo.CIWELBO(2, gradient, beta=0.3) for gradient in elbo.CIWELBO.gradients]
    + [elbo.ThermodynamicELBO(2, g, (0.2, 0.5)) for g in ("pathwise", "score", "vimco")]
)


@pytest.mark.parametrize(
    ("latent_dim", "estimator"),
    [(1, e) for e in BOUNDS] + [(2, e) for e in IN_TWO_DIMENSIONS],
    ids=lambda e: f"{type(e).__name__}-{e.gradient}" if isinstance(e, elbo.Estimator) else f"{e}D",
)
def test_gradient_of_the_expected_bound(latent_dim: int, estimator: elbo.Estimator) -> None:
    model = LinearModel(latent_dim, 3)
    guide = LinearGuide(
        model, scale=1.4, shift=0.5, path=estimator.gradient in ("pathwise", "dreg")
    )
    x = model.draw(2)
    nodes = {2: 14, 3: 24, 4: 16}[estimator.num_draws]
    exact = oracles.linear_expected_bound(
        estimator.bound, model, guide, x, estimator.num_draws, nodes
    )
    expected = oracles.exact_gradient(-exact.sum(), trainable(model, guide))
    assert expected.abs().max() > 0.1
    assert_mean(mean_gradients(estimator, model, guide, x), expected, str(estimator))
    values = estimator.evaluate(model, guide, x.repeat(2000, 1)).reshape(2000, 2)
    assert_mean(values, exact.detach(), "value")


@pytest.mark.parametrize("gradient", elbo.PIWELBO.gradients)
def test_piwelbo_gives_each_program_its_own_bound(gradient: str) -> None:
    model = LinearModel(1, 3)
    guide = LinearGuide(model, scale=1.4, shift=0.5)
    x = model.draw(2)
    estimator = elbo.PIWELBO(2, gradient, num_groups=2)
    tight = oracles.linear_expected_bound(elbo.IWELBO(4).bound, model, guide, x, 4, 16)
    loose = elbo.MIWELBO(2, num_groups=2)
    loose = oracles.linear_expected_bound(loose.bound, model, guide, x, 4, 16)
    for_model = oracles.exact_gradient(-tight.sum(), trainable(model))
    for_guide = oracles.exact_gradient(-loose.sum(), trainable(guide))
    other = oracles.exact_gradient(-tight.sum(), trainable(guide))
    assert (for_guide - other).abs().max() > 0.05, "the two bounds must differ"
    found = mean_gradients(estimator, model, guide, x)
    assert_mean(found, torch.cat([for_model, for_guide]), gradient)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_that_change_no_digit_have_no_gradient(dtype: torch.dtype) -> None:
    """Else it is denormal numbers, with which some processors multiply many times slower."""
    log_w = torch.tensor([[-7.0], [-49.9], [-50.1], [-95.0], [-110.0]], dtype=dtype)
    value, c = coefficient(elbo.IWELBO(num_particles=5).bound, log_w)
    assert value == (torch.logsumexp(log_w, 0) - math.log(5)).sum()
    torch.testing.assert_close(c, torch.softmax(log_w, 0))
    assert c[1] > 0 and (c[2:] == 0).all()
    tiny = torch.finfo(dtype).tiny
    for estimator in (elbo.IWELBO(5), elbo.RenyiELBO(5, alpha=0.5), elbo.CIWELBO(5, beta=0.0)):
        squared = estimator.dreg_coefficient(torch.cat([log_w, log_w - 60]))
        assert not ((squared != 0) & (squared.abs() < tiny)).any()
    for extreme in (math.inf, -math.inf, math.nan):
        one = torch.tensor([[extreme], [0.0], [-100.0]], dtype=dtype)
        expected = torch.logsumexp(one, 0) - math.log(3)
        assert torch.equal(torch.isnan(log_mean_exp(one)), torch.isnan(expected))
        torch.testing.assert_close(log_mean_exp(one), expected, equal_nan=True)
    nothing = torch.full((3, 2), -math.inf, dtype=dtype)
    assert (log_mean_exp(nothing) == -math.inf).all()


def test_groups_and_mixtures_reduce_to_known_bounds() -> None:
    log_w = torch.randn(6, 4)
    iw, mean = elbo.IWELBO(6).bound(log_w), elbo.ELBO(6).bound(log_w)
    same = torch.testing.assert_close
    same(elbo.MIWELBO(6, num_groups=1).bound(log_w), iw)
    same(elbo.MIWELBO(1, num_groups=6).bound(log_w), mean)
    same(elbo.CIWELBO(6, beta=0.0).bound(log_w), iw)
    same(elbo.CIWELBO(6, beta=1.0).bound(log_w), mean)
    same(elbo.ThermodynamicELBO(6, partition=()).bound(log_w), mean)
    same(elbo.RenyiELBO(6, alpha=0.0).bound(log_w), iw)
    same(elbo.ChiUpperBound(6, order=2.0).bound(log_w), elbo.RenyiELBO(6, alpha=-1.0).bound(log_w))


# ---------------------------------------------------------------------- fixed-draw gradients


def grid_terms(model: LinearModel, guide: LinearGuide, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log p(x, z) and log q(z | x) on a fine grid of the scalar z, (G, N), and log of its step."""
    mean, scale = (x @ guide.A.T + guide.a).squeeze(-1), guide.log_scale.exp()
    z = torch.linspace(-8, 8, 4001).unsqueeze(-1)
    fit = dist.Normal(z.unsqueeze(-1) * model.weight.T + model.bias, model.log_sigma.exp())
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + fit.log_prob(x).sum(-1)
    return log_p, dist.Normal(mean, scale).log_prob(z), torch.tensor(16 / 4000).log()


def test_thermodynamic_covariance_gradient_is_that_of_the_objective() -> None:
    model = LinearModel(1, 3)
    guide = LinearGuide(model, scale=1.4, shift=0.5)
    x = model.draw(2)
    log_p, log_q, _ = grid_terms(model, guide, x)
    points = (0.0, 0.2, 0.5, 1.0)
    exact = torch.zeros(2)
    for low, high in itertools.pairwise(points):
        path = torch.softmax(low * log_p + (1 - low) * log_q, 0)
        exact = exact + (high - low) * (path * (log_p - log_q)).sum(0)
    assert (exact < model.log_evidence(x)).all()
    assert (exact > oracles.linear_elbo(model, guide, x)).all()
    estimator = elbo.ThermodynamicELBO(4000, partition=points[1:-1])
    expected = oracles.exact_gradient(-exact.sum(), trainable(model, guide))
    objective = estimator(model, guide)
    found = oracles.gradients(lambda: objective(x), trainable(model, guide), 60)
    assert_mean(found, expected, "covariance")


def belief_targets(model: BeliefNet, guide: BeliefGuide, x: Tensor) -> dict[str, Tensor]:
    """The thermodynamic objective and the chi bound of a belief net, summed over its states."""
    log_q, log_p = guide.log_q(x), model.log_joint(x)
    thermodynamic = torch.zeros(len(x))
    for low, high in itertools.pairwise((0.0, 0.2, 0.5, 1.0)):
        path = torch.softmax(low * log_p + (1 - low) * log_q, 0)
        thermodynamic = thermodynamic + (high - low) * (path * (log_p - log_q)).sum(0)
    return {"tvo": thermodynamic, "chi": 0.5 * (2 * log_p - log_q).logsumexp(0)}


def test_fixed_draw_gradients_of_discrete_latents() -> None:
    """TVO and CUBO need no sample path: exact by enumeration, many particles."""
    model, guide = BeliefNet(), BeliefGuide()
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    exact = belief_targets(model, guide, x)
    assert (exact["tvo"] < model.log_evidence(x)).all()
    assert (exact["chi"] > model.log_evidence(x)).all()
    objective = elbo.ThermodynamicELBO(4000, partition=(0.2, 0.5))(model, guide)
    found = oracles.gradients(lambda: objective(x), trainable(model, guide), 60)
    assert_mean(found, oracles.exact_gradient(-exact["tvo"].sum(), trainable(model, guide)), "tvo")
    objective = elbo.ChiUpperBound(4000)(model, guide)
    found = oracles.gradients(lambda: objective(x), trainable(guide), 60)
    assert_mean(found, oracles.exact_gradient(exact["chi"].sum(), trainable(guide)), "chi")


def test_thermodynamic_covariance_has_no_small_sample_bias_on_one_interval() -> None:
    """Without inner points it is the ELBO with leave-one-out baselines: exact at two draws."""
    model, guide = BeliefNet(), BeliefGuide()
    x = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])
    exact = oracles.belief_expected_bound(elbo.ELBO(2).bound, model, guide, x, 2)
    expected = oracles.exact_gradient(-exact.sum(), trainable(model, guide))
    estimator = elbo.ThermodynamicELBO(2, partition=())
    assert_mean(mean_gradients(estimator, model, guide, x), expected, "two draws")


@pytest.mark.parametrize("gradient", elbo.ChiUpperBound.gradients)
def test_chi_gradient_is_that_of_the_upper_bound_and_spares_the_model(gradient: str) -> None:
    model = LinearModel(1, 3)
    guide = LinearGuide(model, scale=1.6, shift=0.3)
    x = model.draw(2)
    log_p, log_q, log_step = grid_terms(model, guide, x)
    exact = 0.5 * (2 * log_p - log_q + log_step).logsumexp(0)
    assert (exact > model.log_evidence(x)).all()
    estimator = elbo.ChiUpperBound(4000, gradient)
    value = torch.stack([estimator.evaluate(model, guide, x) for _ in range(50)])
    assert (value.mean(0) <= exact + 4 * value.std(0) / 50**0.5).all()
    torch.testing.assert_close(value.mean(0), exact.detach(), atol=0.02, rtol=0)
    expected = oracles.exact_gradient(exact.sum(), trainable(guide))  # minimised
    objective = estimator(model, guide)
    found = oracles.gradients(lambda: objective(x), trainable(guide), 60)
    assert_mean(found, expected, gradient)
    objective(x).backward()
    assert all(p.grad is None for p in trainable(model))


def test_training_with_the_upper_bound_widens_the_guide_and_does_not_cheat() -> None:
    """Minimising the K-draw value itself would drive it below log p(x) without limit."""
    torch.manual_seed(0)
    model = LinearModel(1, 3)
    guide = LinearGuide(model, scale=0.5, shift=0.5)
    x = model.draw(50)
    svi = ppvae.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=0.02), elbo.ChiUpperBound(20))
    for _ in range(600):
        svi.step(x)
    exact = LinearGuide(model)
    assert (guide.log_scale - exact.log_scale).abs().max() < 0.1
    value = elbo.ChiUpperBound(2000).evaluate(model, guide, x).mean()
    assert value == pytest.approx(model.log_evidence(x).mean().item(), abs=0.02)


class TestWakeSleep:
    def setup_method(self) -> None:
        torch.manual_seed(0)

    def pair(self) -> tuple[BeliefNet, BeliefGuide, Tensor]:
        model, guide = BeliefNet(), BeliefGuide()
        return model, guide, torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0]])

    def wake(self, model: BeliefNet, guide: BeliefGuide, x: Tensor, K: int) -> Tensor:
        """Exact E sum_k w~_k grad log q(z_k), over all tuples of states; as a surrogate."""
        log_q = guide.log_q(x)
        log_w = (model.log_joint(x) - log_q).detach()
        tuples = torch.tensor(list(itertools.product(range(8), repeat=K)))
        mass = log_q.detach()[tuples].sum(1).exp()
        share = log_w[tuples].softmax(1)
        return (mass * (share * log_q[tuples]).sum(1)).sum()

    def sleep(self, model: BeliefNet, guide: BeliefGuide) -> Tensor:
        """Exact E_p(h, x) log q(h | x), over 16 x 8 values."""
        x = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)))
        return (model.log_joint(x).exp().detach() * guide.log_q(x)).sum()

    @pytest.mark.parametrize("insomnia", [1.0, 0.3, 0.0])
    def test_against_enumeration(self, insomnia: float) -> None:
        model, guide, x = self.pair()
        K = 2
        bound = oracles.belief_expected_bound(elbo.IWELBO(K).bound, model, guide, x, K).sum()
        for_model = oracles.exact_gradient(-bound, trainable(model))
        for_guide = insomnia * self.wake(model, guide, x, K)
        for_guide = for_guide + (1 - insomnia) * len(x) * self.sleep(model, guide)
        for_guide = oracles.exact_gradient(-for_guide, trainable(guide))
        found = mean_gradients(elbo.ReweightedWakeSleep(K, insomnia=insomnia), model, guide, x)
        assert_mean(found, torch.cat([for_model, for_guide]), f"insomnia {insomnia}")

    def test_dreg_has_the_same_expectation_and_vanishes_at_the_exact_guide(self) -> None:
        model = LinearModel(1, 3)
        guide = LinearGuide(model, scale=1.4, shift=0.5)
        x = model.draw(2)
        plain = mean_gradients(elbo.ReweightedWakeSleep(20), model, guide, x)
        dreg = mean_gradients(elbo.ReweightedWakeSleep(20, "dreg"), model, guide, x)
        assert_mean(dreg - plain.flip(0), 0.0, "dreg")
        exact = LinearGuide(model)
        for gradient, vanishes in (("dreg", True), ("reweighted", False)):
            loss = elbo.ReweightedWakeSleep(20, gradient)(model, exact)(x)
            largest = max(g.abs().max() for g in torch.autograd.grad(loss, trainable(exact)))
            assert (largest < 1e-10) == vanishes

    def test_weights_are_per_datapoint(self) -> None:
        """The gradient of a batch is the sum of its rows'; Pyro's weighs whole batches."""
        model, guide, x = self.pair()
        both = mean_gradients(elbo.ReweightedWakeSleep(5), model, guide, x)
        apart = [mean_gradients(elbo.ReweightedWakeSleep(5), model, guide, x[i : i + 1])
                 for i in range(2)]  # fmt: skip
        assert_mean(both - apart[0] - apart[1].flip(0), 0.0)

    def test_sleep_needs_an_observed_argument(self) -> None:
        model, guide, x = self.pair()

        def shifted(x: Tensor) -> None:
            model(x + 0.0)

        with pytest.raises(ValueError, match="observe an argument itself"):
            elbo.ReweightedWakeSleep(insomnia=0.0)(shifted, guide)(x)


# ------------------------------------------------------------------------------ plates and masks


class PixelModel(ppvae.Program):
    """z ~ N(0, 1), P pixels N(w z, 0.5): as an event, in a plate of their own, or masked."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.w = nn.Parameter(torch.tensor([0.5, -1.0, 1.5]))

    def forward(self, x: Tensor, size: int | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=x if size else None, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            if self.form == "event":
                mean = z.unsqueeze(-1) * self.w
                pyro.sample("x", dist.Normal(mean, 0.5).to_event(1), obs=x)
                return
            w, pixels, seen = self.w, x.T, torch.tensor(True)
            if self.form == "masked":  # a fourth pixel that is missing everywhere
                w, pixels = torch.cat([w, w.new_ones(1)]), torch.cat([pixels, pixels[:1] + 9.0])
                seen = torch.tensor([True, True, True, False]).unsqueeze(-1)
            with pyro.plate("pixels", len(w), dim=-2), pyro.poutine.mask(mask=seen):
                pyro.sample("x", dist.Normal(z * w.unsqueeze(-1), 0.5), obs=pixels)


class PixelGuide(ppvae.Program):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor([0.3, -0.2, 0.1]))
        self.log_scale = nn.Parameter(torch.tensor(-0.5))

    def forward(self, x: Tensor, size: int | None = None) -> None:
        with pyro.plate("data", size or len(x), subsample=x if size else None, dim=-1):
            pyro.sample("z", dist.Normal(x @ self.slope, self.log_scale.exp()))


@pytest.mark.parametrize("form", ["plate", "masked", "subsampled"])
@pytest.mark.parametrize(
    "label",
    [
        e
        for e in ALL_ESTIMATORS
        if "insomnia" not in e and not e.startswith(("Factor", *DIMENSIONS))
    ],
)  # whose latent is a vector
def test_plates_masks_and_subsampling_mean_the_same_to_every_estimator(
    label: str, form: str
) -> None:
    """Equal losses and gradients at equal draws; a minibatch's scale N / B stays outside."""
    x = torch.randn(4, 3)
    found = []
    for changed in (False, True):
        model = PixelModel(form if changed and form != "subsampled" else "event")
        guide = PixelGuide()
        torch.manual_seed(1)
        size = {"size": 40} if changed and form == "subsampled" else {}
        loss = ALL_ESTIMATORS[label](model, guide)(x, **size) / (10 if size else 1)
        gradient = oracles.exact_gradient(loss, trainable(model, guide))
        found.append(torch.cat([loss.detach().reshape(1), gradient]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-10)


class GlobalModel(ppvae.Program):
    """m ~ N(0, 1) for the whole data set, x ~ N(m, 1) for each row."""

    def forward(self, x: Tensor, size: int | None = None) -> None:
        m = pyro.sample("m", dist.Normal(x.new_zeros(()), 1.0))
        with data_plate(x, size=size):
            pyro.sample("x", dist.Normal(m, 1.0), obs=x)


class GlobalGuide(ppvae.Program):
    def __init__(self) -> None:
        super().__init__()
        self.loc = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor, size: int | None = None) -> None:
        pyro.sample("m", dist.Normal(self.loc, 0.3))


@pytest.mark.parametrize("draws", [250, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_global_latent_has_one_weight_per_batch(draws: int) -> None:
    """joint=True: exact for full data, the same in expectation for minibatches of the ELBO."""
    model, guide, x = GlobalModel(), GlobalGuide(), torch.randn(40) + 1
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(guide.loc, 0.3), torch.distributions.Normal(0.0, 1.0)
    )
    exact = dist.Normal(guide.loc, 1.0).log_prob(x).sum() - 40 * 0.5 * 0.3**2 - kl
    expected = oracles.exact_gradient(-exact, [guide.loc])
    losses, grads = {}, {}
    for way in ("full", "minibatch"):
        loss, grad = [], []
        for _ in range(draws):
            rows = torch.randperm(40)[:8] if way == "minibatch" else torch.arange(40)
            size = {"size": 40} if way == "minibatch" else {}
            value = elbo.ELBO(4).differentiable_loss(model, guide, x[rows], joint=True, **size)
            loss.append(value.detach())
            grad.append(oracles.exact_gradient(value, [guide.loc]))
        losses[way], grads[way] = torch.stack(loss), torch.stack(grad)
        assert_mean(losses[way], -exact.detach(), way)
        assert_mean(grads[way], expected, way)
    weights = ppvae.log_weights(model, guide, x, num_particles=3, joint=True)
    assert weights.log_w.shape == (3, 1)
    evidence = dist.MultivariateNormal(x.new_zeros(40), torch.eye(40) + 1.0).log_prob(x)
    bounds = torch.stack(
        [-elbo.IWELBO(50).differentiable_loss(model, guide, x, joint=True) for _ in range(200)]
    ).detach()
    oracles.assert_below(bounds, evidence.item())
    assert bounds.mean() > -losses["full"].mean()
    with pytest.raises(ValueError, match="the scale on site 'x'"):
        elbo.IWELBO(4).differentiable_loss(model, guide, x[:8], size=40, joint=True)
    apart = torch.stack([elbo.ELBO()(model, guide)(x).detach() for _ in range(draws)])
    assert_mean(apart, -exact.detach(), "one draw for all rows, weighed apart")


# ------------------------------------------------------------------------------ enumeration


class ClusterModel(ppvae.Program):
    """c ~ Categorical(3), z | c ~ N(mu_c, 1), x | z (and c if ``direct``) ~ N(z + s c, 0.8^2)."""

    def __init__(self, direct: bool = False) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([0.2, -0.1, 0.4]))
        self.loc = nn.Parameter(torch.tensor([-1.5, 0.3, 2.0]))
        self.shift = nn.Parameter(torch.tensor(0.5 if direct else 0.0))
        self.direct = direct

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            summed = {"enumerate": "parallel"}
            c = pyro.sample("c", dist.Categorical(logits=self.logits), infer=summed)
            z = pyro.sample("z", dist.Normal(self.loc[c], 1.0))
            mean = z + self.shift * c if self.direct else z + self.shift
            pyro.sample("x", dist.Normal(mean, 0.8), obs=x)


class ClusterGuide(ppvae.Program):
    """q(z | x), with or without q(c | x), z independent of c or not."""

    def __init__(self, clusters: bool, dependent: bool = False) -> None:
        super().__init__()
        self.clusters, self.dependent = clusters, dependent
        self.logits = nn.Parameter(torch.tensor([0.1, 0.2, -0.3]))
        self.offset = nn.Parameter(torch.tensor([-0.3, 0.0, 0.3]))
        self.log_scale = nn.Parameter(torch.tensor(-0.1))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            mean = 0.5 * x + self.offset[1]
            if self.clusters:
                logits = self.logits + x.unsqueeze(-1) * torch.tensor([-1.0, 0.0, 1.0])
                summed = {"enumerate": "parallel"}
                c = pyro.sample("c", dist.Categorical(logits=logits), infer=summed)
                mean = 0.5 * x + self.offset[c] if self.dependent else mean
            pyro.sample("z", dist.Normal(mean, self.log_scale.exp()))


X = torch.tensor([-2.0, 0.1, 1.3, 2.5], dtype=torch.float64)
GUIDES = {"model": (False, False), "guide": (True, False), "dependent": (True, True)}


@pytest.mark.parametrize("K", [1, 50])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("where", GUIDES)
def test_enumeration_equals_trace_enum_at_the_same_draws(where: str, direct: bool, K: int) -> None:
    model, guide = ClusterModel(direct), ClusterGuide(*GUIDES[where])
    stock = TraceEnum_ELBO(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    losses, grads = [], []
    for loss in (stock.differentiable_loss, elbo.ELBO(K).differentiable_loss):
        torch.manual_seed(1)
        losses.append(loss(model, guide, X))
        grads.append(oracles.exact_gradient(losses[-1], trainable(model, guide)))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-10)
    assert grads[0].abs().max() > 0.1


@pytest.mark.parametrize("in_guide", [False, True])
def test_data_beside_those_of_an_enumerated_latent_count(in_guide: bool) -> None:
    """v depends on z alone, so it stands outside the sum over c; TraceEnum at the same draws."""
    half, one = torch.tensor(0.5, requires_grad=True), torch.tensor([0.3, -0.4])

    def model(x: Tensor, v: Tensor) -> None:
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0))
            summed = {"enumerate": "parallel"}
            c = pyro.sample("c", dist.Bernoulli(half), infer=summed)
            pyro.sample("x", dist.Normal(z + 3 * c, 1.0), obs=x)
            pyro.sample("v", dist.Normal(2 * z, 1.0), obs=v)

    def guide(x: Tensor, v: Tensor) -> None:
        with data_plate(x):
            pyro.sample("z", dist.Normal(v / 3 + one[0], 0.7))
            if in_guide:
                c = dist.Bernoulli(logits=x + one[1])
                pyro.sample("c", c, infer={"enumerate": "parallel"})

    losses = []
    for estimator in (TraceEnum_ELBO(max_plate_nesting=1), elbo.ELBO()):
        torch.manual_seed(1)
        losses.append(estimator.differentiable_loss(model, guide, X, X.flip(0)))
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-12)


def exact_parts(model: ClusterModel, guide: ClusterGuide) -> tuple[Tensor, Tensor]:
    """E log p(x | z, c) and KL(q(c) q(z) || p) of each row, z by quadrature; differentiable."""
    points, mass = oracles.hermite(60)
    scale = guide.log_scale.exp()
    log_qc = (guide.logits + X.unsqueeze(-1) * torch.tensor([-1.0, 0.0, 1.0])).log_softmax(-1)
    mean = (
        (0.5 * X.unsqueeze(-1) + guide.offset)
        if guide.dependent
        else (0.5 * X.unsqueeze(-1) + guide.offset[1]).expand(-1, 3)
    )
    z = mean + scale * points.reshape(-1, 1, 1)  # (G, N, C)
    weight = mass.reshape(-1, 1, 1) * log_qc.exp()
    shift = model.shift * torch.arange(3) if model.direct else model.shift
    fit = dist.Normal(z + shift, 0.8).log_prob(X.unsqueeze(-1))
    log_q = log_qc + dist.Normal(mean, scale).log_prob(z)
    log_p = model.logits.log_softmax(-1) + dist.Normal(model.loc, 1.0).log_prob(z)
    return (weight * fit).sum((0, 2)), (weight * (log_q - log_p)).sum((0, 2))


@pytest.mark.parametrize("where", ["guide", "dependent"])
@pytest.mark.parametrize("beta", [1.0, 4.0])
@pytest.mark.parametrize("K", [1, 5])
def test_enumeration_with_particles_and_beta(where: str, beta: float, K: int) -> None:
    """Exact value and gradient by quadrature."""
    model, guide = ClusterModel(direct=True), ClusterGuide(*GUIDES[where])
    fit, kl = exact_parts(model, guide)
    expected = oracles.exact_gradient(-(fit - beta * kl).sum(), trainable(model, guide))
    objective, many = elbo.ELBO(K, beta=beta)(model, guide), X.repeat(ROWS)
    found = oracles.gradients(lambda: objective(many), trainable(model, guide), DRAWS, ROWS)
    assert_mean(found, expected)
    losses = torch.stack([objective(many).detach() / ROWS for _ in range(DRAWS)])
    assert_mean(losses, -(fit - beta * kl).sum().detach())


def test_importance_bound_with_an_enumerated_latent() -> None:
    """E of IWELBO-2 with c summed out, by quadrature; every gradient agrees."""
    model, guide = ClusterModel(), ClusterGuide(clusters=False)
    points, mass = oracles.hermite(40)
    pairs = torch.cartesian_prod(points, points).T.unsqueeze(-1)  # (2, G, 1)
    weight = torch.cartesian_prod(mass, mass).prod(-1).unsqueeze(-1)
    mean, scale = 0.5 * X + guide.offset[1], guide.log_scale.exp()
    z = mean + scale * pairs
    mixture = model.logits.log_softmax(-1) + dist.Normal(model.loc, 1.0).log_prob(z.unsqueeze(-1))
    log_w = mixture.logsumexp(-1) + dist.Normal(z + model.shift, 0.8).log_prob(X)
    log_w = log_w - dist.Normal(mean, scale).log_prob(z)
    exact = (weight * elbo.IWELBO(2).bound(log_w)).sum(0)
    used = [p for p in trainable(model, guide) if p is not guide.logits]  # this guide draws no c
    expected = oracles.exact_gradient(-exact.sum(), used)
    many = X.repeat(ROWS)
    for gradient in elbo.IWELBO.gradients:
        objective = elbo.IWELBO(2, gradient)(model, guide)
        if gradient == "gdreg":
            with pytest.raises(ValueError, match=r"each prior, and \['c'\] are summed out; use"):
                objective(many)
            continue
        found = oracles.gradients(lambda o=objective: o(many), used, DRAWS, ROWS)
        assert_mean(found, expected, gradient)


def test_a_guide_enumerated_latent_is_refused_by_nonlinear_bounds() -> None:
    model, guide = ClusterModel(), ClusterGuide(clusters=True)
    with pytest.raises(ValueError, match=r"latent 'c' is enumerated.*never be trained"):
        elbo.IWELBO(4)(model, guide)(X)
    with pytest.raises(ValueError, match='"stl" drops the gradient'):
        elbo.ELBO(4, "stl")(model, guide)(X)
    exact = (
        model.logits.log_softmax(-1)
        + dist.Normal(model.loc + model.shift, math.sqrt(1.64)).log_prob(X.unsqueeze(-1))
    ).logsumexp(-1)
    found = ppvae.diagnostics.log_evidence(model, guide, X, num_particles=4000)  # c cancels
    assert ((found.log_evidence - exact).abs() < 4.5 * found.log_evidence_se).all()


def test_a_weight_on_an_inseparable_kl_is_refused() -> None:
    model, guide = ClusterModel(direct=True), ClusterGuide(clusters=False)
    with pytest.raises(ValueError, match="the KL cannot be weighed"):
        elbo.ELBO(beta=4.0)(model, guide)(X)
    assert elbo.ELBO(beta=4.0)(ClusterModel(), guide)(X).isfinite()


# ---------------------------------------------------------------------- the weight on the KL


@pytest.fixture
def linear() -> tuple[LinearModel, LinearGuide, Tensor]:
    model = LinearModel(2, 4)
    guide = LinearGuide(model, scale=torch.tensor([1.3, 0.9]), shift=torch.tensor([0.4, 0.0]))
    return model, guide, model.draw(6)


def parts(model: LinearModel, guide: LinearGuide, x: Tensor) -> tuple[Tensor, Tensor]:
    """Exact E log p(x | z), (N,), and KL of each dimension, (N, D)."""
    mean, variance = x @ guide.A.T + guide.a, guide.log_scale.mul(2).exp()
    kl = 0.5 * (mean.square() + variance - 1 - variance.log())
    return oracles.linear_elbo(model, guide, x) + kl.sum(-1), kl


@pytest.mark.parametrize(
    ("per_dimension", "kl"),
    [
        (False, "mixed"),
        (True, "sampled"),
        pytest.param(False, "sampled", marks=pytest.mark.slow),
        pytest.param(True, "mixed", marks=pytest.mark.slow),
    ],
)
def test_free_bits(linear, per_dimension: bool, kl: str) -> None:
    model, guide, x = linear
    fit, rates = parts(model, guide, x)
    groups = rates.mean(0) if per_dimension else rates.sum(-1).mean(0, keepdim=True)
    for nats in (0.0, groups.mean().item() if per_dimension else 0.5 * groups.item(), 50.0):
        estimator = elbo.ELBO(400, beta=elbo.FreeBits(nats, per_dimension), kl=kl)
        exact = fit.sum() - len(x) * groups.clamp(min=nats).sum()
        objective = estimator(model, guide)
        losses = []

        def loss(objective=objective, losses=losses) -> Tensor:
            losses.append(objective(x))
            return losses[-1]

        expected = oracles.exact_gradient(-exact, trainable(model, guide))
        found = oracles.gradients(loss, trainable(model, guide), 100)
        assert_mean(found, expected, f"{nats} nats")
        assert_mean(torch.stack(losses).detach(), -exact.detach(), f"{nats} nats")


def test_capacity_follows_its_schedule(linear) -> None:
    model, guide, x = linear
    fit, rates = parts(model, guide, x)
    rate = rates.sum(-1).mean().item()
    penalty = elbo.Capacity(elbo.LinearWarmup(2, 0.5 * rate, 1.5 * rate), gamma=3.0)
    objective = elbo.ELBO(400, beta=penalty, kl="analytic")(model, guide)
    for target in (0.5 * rate, rate, 1.5 * rate):
        exact = (fit.mean() - 3.0 * abs(rate - target)) * len(x)
        objective.eval()
        draws = torch.stack([objective(x) for _ in range(100)])
        assert_mean(draws.detach(), -exact.detach())
        objective.train()
        objective(x)
    assert objective.step == 3


@pytest.mark.parametrize("log_multiplier", [0.0, 1.0])
def test_the_value_of_the_lagrangian(linear, log_multiplier: float) -> None:
    model, guide, x = linear
    fit, rates = (part.detach() for part in parts(model, guide, x))
    rate, multiplier = rates.sum(-1), math.exp(log_multiplier)
    for constraint, exact in (
        (elbo.Constraint(max_rate=0.7), fit - multiplier * (rate - 0.7)),
        (elbo.Constraint(max_distortion=3.0), -rate - multiplier * (-fit - 3.0)),
    ):
        objective = elbo.ELBO(100, beta=constraint, kl="analytic")(model, guide).eval()
        objective.state.log_multiplier.fill_(log_multiplier)
        losses = torch.stack([objective(x).detach() for _ in range(100)])
        assert_mean(losses, -exact.sum(), repr(constraint))


@pytest.mark.parametrize(
    ("constraint", "epochs", "lr"),
    [
        (elbo.Constraint(max_rate=1.0, speed=0.05), 60, 0.03),
        (elbo.Constraint(max_distortion=3.5, speed=0.05), 60, 0.03),
        pytest.param(elbo.Constraint(max_rate=1.0), 400, 0.01, marks=pytest.mark.slow),
        pytest.param(elbo.Constraint(max_distortion=3.5), 400, 0.01, marks=pytest.mark.slow),
    ],
)
def test_constraint_is_met_by_dual_ascent(
    constraint: elbo.Constraint, epochs: int, lr: float
) -> None:
    torch.manual_seed(0)
    model = LinearModel(2, 4)
    model.log_sigma.requires_grad_(False)
    guide = LinearGuide(model)
    x = model.draw(400)
    svi = ppvae.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=lr),
                    elbo.ELBO(4, beta=constraint, kl="analytic"))  # fmt: skip
    history = ppvae.fit(svi, x, epochs=epochs, batch_size=200, progress=False)
    fit, rates = parts(model, guide, x)
    if constraint.max_rate is not None:
        assert rates.sum(-1).mean().item() == pytest.approx(1.0, abs=0.1)
    else:
        assert -fit.mean().item() == pytest.approx(3.5, abs=0.1)
    weights = history.column("kl_weight")
    assert weights[0] != weights[-1], "the multiplier is logged"
    assert weights[-1] == pytest.approx(svi.objective.state.shown["kl_weight"].item())
    state = svi.objective.state_dict()
    assert "state.log_multiplier" in state
    again = elbo.ELBO(4, beta=constraint)(model, guide)
    again.load_state_dict(state)
    assert again.state.log_multiplier == svi.objective.state.log_multiplier


def test_the_multiplier_rests_in_evaluation(linear) -> None:
    model, guide, x = linear
    objective = elbo.ELBO(beta=elbo.Constraint(max_rate=0.1))(model, guide)
    objective.eval()
    objective(x)
    with torch.no_grad():
        objective.train()(x)
    assert objective.state.log_multiplier == 0 and objective.step == 0
    objective(x)
    assert objective.state.log_multiplier > 0 and objective.step == 1


@pytest.mark.parametrize("gradient", elbo.ELBO.gradients)
def test_the_multiplier_moves_once_a_step_whatever_the_gradient(linear, gradient: str) -> None:
    model, guide, x = linear
    constraint = elbo.Constraint(max_distortion=-100.0, speed=0.01, memory=0.0)
    objective = elbo.ELBO(400, gradient, beta=constraint)(model, guide)
    for step in (1, 2):
        objective(x)
        assert objective.state.log_multiplier.item() == pytest.approx(0.01 * step)


def test_in_stock_pyro_every_pair_has_a_multiplier_of_its_own(linear) -> None:
    model, guide, x = linear
    estimator = elbo.ELBO(400, beta=elbo.Constraint(max_rate=0.0, speed=0.1, memory=0.0))
    other = LinearModel(2, 4)  # two models, one guide
    rate_is_paid = [estimator.loss(pair, guide, x) for pair in (model, other)]
    for _ in range(30):
        estimator.differentiable_loss(model, guide, x)
    trained, fresh = (estimator.loss(pair, guide, x) for pair in (model, other))
    assert trained > 1.5 * rate_is_paid[0]  # 30 steps: the rate weighs about 9 times as much
    assert fresh == pytest.approx(rate_is_paid[1], abs=1)


def test_in_stock_pyro_a_schedule_goes_on_for_methods(linear) -> None:
    model, guide, x = linear
    steps: list[int] = []
    estimator = elbo.ELBO(beta=lambda step: steps.append(step) or 1.0)
    for _ in range(3):  # a bound method is a new object each time
        estimator.differentiable_loss(model.forward, guide.forward, x)
    assert steps == [0, 1, 2]


@pytest.mark.parametrize(
    ("make", "cure"),
    [
        (lambda: elbo.MIWELBO(2, num_groups=0), "num_groups must be at least 1"),
        (lambda: elbo.MIWELBO(2, num_groups=1.5), "a whole number"),
        (lambda: elbo.PIWELBO(0, num_groups=2), "num_particles must be at least 1"),
        (lambda: elbo.CIWELBO(2, beta=1.5), r"beta in \[0, 1\]"),
        (lambda: elbo.ThermodynamicELBO(4, partition=(0.5, 0.2)), "rise strictly"),
        (lambda: elbo.ThermodynamicELBO(1), "elbo.ELBO"),
        (lambda: elbo.ChiUpperBound(10, order=1.0), "order > 1"),
        (lambda: elbo.ReweightedWakeSleep(1), "num_particles >= 2"),
        (lambda: elbo.ReweightedWakeSleep(5, insomnia=2.0), "insomnia"),
        (lambda: elbo.ReweightedWakeSleep(5, "pathwise"), "use one of"),
        (lambda: elbo.FreeBits(-1.0), "nats must be >= 0"),
        (lambda: elbo.Capacity(1.0, gamma=0.0), "gamma must be positive"),
        (lambda: elbo.Constraint(), "exactly one"),
        (lambda: elbo.Constraint(max_rate=1.0, max_distortion=1.0), "exactly one"),
        (lambda: elbo.Constraint(max_rate=-1.0), "never negative"),
        (lambda: elbo.CyclicalWarmup(0), "period >= 1"),
    ],
)
def test_bad_arguments_are_refused_with_a_cure(make, cure: str) -> None:
    with pytest.raises(ValueError, match=cure):
        make()


@pytest.mark.parametrize("cls", [elbo.IWELBO, elbo.RenyiELBO, elbo.MIWELBO, elbo.PIWELBO])
def test_a_weight_on_the_kl_of_a_nonlinear_bound_is_refused(cls) -> None:
    with pytest.raises(TypeError, match="only the ELBO is a likelihood minus a KL"):
        cls(num_particles=8, beta=4.0)
    assert cls(num_particles=8).num_particles == 8


@pytest.mark.slow  # JAX is imported
def test_numpyro_gives_the_same_renyi_bound_on_shared_weights() -> None:
    """NumPyro's RenyiELBO on a pair whose draws are a point: the weights are then the same."""
    numpyro = pytest.importorskip("numpyro", reason="needs the test extra with numpyro")
    import jax
    import numpyro.distributions as ndist

    jax.config.update("jax_enable_x64", True)
    locs = torch.tensor([0.3, -0.7, 1.1])

    def model(x) -> None:
        with numpyro.plate("data", 3):
            z = numpyro.sample("z", ndist.Normal(0.0, 1.0))
            numpyro.sample("x", ndist.Normal(z, 0.5), obs=x)

    def guide(x) -> None:
        with numpyro.plate("data", 3):
            numpyro.sample("z", ndist.Normal(x / 2, 0.8))

    x = jax.numpy.asarray(locs.numpy())
    K, alpha = 5, 0.3
    loss = numpyro.infer.RenyiELBO(alpha=alpha, num_particles=K)
    found = loss.loss(jax.random.PRNGKey(0), {}, model, guide, x)

    # The draws NumPyro made: the same keys, the guide alone.
    keys = jax.random.split(jax.random.split(jax.random.PRNGKey(0))[1], K)
    log_w = []
    for key in keys:
        _, guide_key = jax.random.split(key)
        seeded = numpyro.handlers.seed(guide, guide_key)
        trace = numpyro.handlers.trace(seeded).get_trace(x)
        z = torch.tensor(trace["z"]["value"].tolist())
        log_w.append(
            dist.Normal(0.0, 1.0).log_prob(z)
            + dist.Normal(z, 0.5).log_prob(locs)
            - dist.Normal(locs / 2, 0.8).log_prob(z)
        )
    ours = elbo.RenyiELBO(K, alpha=alpha).bound(torch.stack(log_w)).sum()
    assert -float(found) == pytest.approx(ours.item(), rel=1e-10)


@pytest.mark.parametrize("where", GUIDES)
def test_one_scale_for_all_terms_of_a_sum_stands_outside_of_it(where: str) -> None:
    model, guide = (
        pyro.poutine.scale(program, scale=4.0)
        for program in (ClusterModel(), ClusterGuide(*GUIDES[where]))
    )
    losses = []
    for estimator in (TraceEnum_ELBO(max_plate_nesting=1), elbo.ELBO()):
        torch.manual_seed(1)
        losses.append(estimator.differentiable_loss(model, guide, X))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=1e-12)


def test_a_scale_inside_a_sum_over_latents_is_refused() -> None:
    model, guide = ClusterModel(direct=True), ClusterGuide(*GUIDES["model"])

    def scaled(x: Tensor) -> None:
        with data_plate(x):
            c = pyro.sample(
                "c", dist.Categorical(logits=model.logits), infer={"enumerate": "parallel"}
            )
            z = pyro.sample("z", dist.Normal(model.loc[c], 1.0))
            with pyro.poutine.scale(scale=4.0):
                pyro.sample("x", dist.Normal(z + model.shift * c, 0.8), obs=x)

    with pytest.raises(ValueError, match="a scale inside that sum has no meaning"):
        elbo.ELBO()(scaled, guide)(X)
    # enumerated in the guide too, the objective is a sum of terms, so each may have a weight
    guide = ClusterGuide(*GUIDES["guide"])
    torch.manual_seed(0)
    found = elbo.ELBO().differentiable_loss(scaled, guide, X)
    torch.manual_seed(0)
    weights = ppvae.log_weights(model, guide, X)
    q = weights.log_q["c"].exp().squeeze(-2)  # (3, N)
    others = weights.log_p["c"] + weights.log_p["z"] - weights.log_q["c"] - weights.log_q["z"]
    each = others.squeeze(-2) + 4.0 * weights.log_p["x"].squeeze(-2)
    torch.testing.assert_close(-found, (q * each).sum())


@pytest.mark.parametrize("alpha", [-0.5, -2.0, -math.inf])
def test_what_is_no_bound_is_not_reported_as_one(alpha: float) -> None:
    model = LinearModel(1, 3)
    guide = LinearGuide(model, scale=1.6, shift=0.3)
    x = model.draw(50)
    estimator = elbo.RenyiELBO(50, alpha=alpha)
    assert -estimator.loss(model, guide, x) > model.log_evidence(x).sum()  # what trains
    values = torch.stack([estimator.evaluate(model, guide, x).mean() for _ in range(100)])
    oracles.assert_below(values, model.log_evidence(x).mean().item())


def test_a_bound_without_a_coefficient_refuses_dreg_when_it_is_made() -> None:
    class Median(elbo.Estimator):
        def bound(self, log_w: Tensor) -> Tensor:
            return log_w.median(0).values

    with pytest.raises(TypeError, match="Median takes gradient='dreg' and defines no"):
        Median(3, "dreg")
    assert Median(3).num_draws == 3


@pytest.mark.usefixtures("float64")
class TestClosedFormsOfBernoullis:
    def test_a_prior_of_another_batch_shape(self) -> None:
        """torch's own KL of Bernoullis does not broadcast, and ppvae's plate does not either."""

        def model(x: Tensor) -> None:
            with data_plate(x):
                z = pyro.sample("z", dist.Bernoulli(torch.tensor([0.3])))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        share = torch.tensor([0.2, 0.5, 0.9])

        def guide(x: Tensor) -> None:
            with data_plate(x):
                pyro.sample("z", dist.Bernoulli(share))

        weights = ppvae.log_weights(model, guide, torch.zeros(3))
        closed = closed_form_kl("analytic", weights)["z"]
        exact = share * (share / 0.3).log() + (1 - share) * ((1 - share) / 0.7).log()
        torch.testing.assert_close(closed.flatten(), exact)

    def test_a_prior_of_one_number_is_that_of_every_row(self) -> None:
        share = torch.tensor([0.2, 0.5, 0.9])
        found = _divergence(dist.Bernoulli(share), dist.Bernoulli(torch.tensor([0.3])))
        exact = share * (share / 0.3).log() + (1 - share) * ((1 - share) / 0.7).log()
        torch.testing.assert_close(found, exact)

    def test_a_scaled_latent_has_none(self) -> None:
        def model(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                with poutine.scale(scale=0.5):
                    z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3)))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(x: Tensor) -> None:
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.4)))

        weights = ppvae.log_weights(model, guide, torch.zeros(3))
        assert closed_form_kl("sampled", weights) == {}
        with pytest.raises(ValueError, match="latent 'z': it is auxiliary, weighed by a poutine"):
            closed_form_kl("analytic", weights)


@pytest.mark.parametrize("much", [True, False])
def test_the_multiplier_stays_within_its_limit(linear, much: bool) -> None:
    """And the weight that is told is the KL's beside a likelihood of weight 1."""
    model, guide, x = linear
    limits = {"max_rate": 0.0 if much else 1e6}, {"max_distortion": -1e6 if much else 1e6}
    for target in limits:
        objective = elbo.ELBO(beta=elbo.Constraint(speed=1e3, **target))(model, guide)
        for _ in range(3):
            objective(x).backward()
        assert objective.state.log_multiplier == (10.0 if much else -10.0)
        objective(x)
        sign = 1 if "max_rate" in target else -1
        weight = objective.state.shown["kl_weight"].item()
        assert weight == pytest.approx(math.exp(sign * (10.0 if much else -10.0)), rel=1e-5)


def test_each_pair_has_a_state_of_its_own_in_stock_engines(linear) -> None:
    model, guide, x = linear
    other = LinearGuide(model)
    estimator = elbo.ELBO(beta=elbo.LinearWarmup(10))
    estimator.loss_and_grads(model, guide, x)
    states = [estimator.stock_state(*pair) for pair in ((model, guide), (model, other))]
    assert [state.step for state in states] == [1, 0]
    assert estimator.stock_state(model, guide) is states[0]
