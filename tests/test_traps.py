"""Where stock Pyro 1.9.2 is wrong for VAEs, and ours is not: each fault shown, then its cure.

Named after the project's list of traps. If a test here fails because Pyro was repaired, good:
delete its half that shows the fault.
"""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import RenyiELBO, Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO
from torch import Tensor, nn

import oracles
import ppvae
from oracles import LinearGuide, LinearModel, assert_below, assert_mean, trainable
from ppvae import conditionals, elbo, guides, models, nets
from registry import build, owners

EVIDENCE = -2015.53  # log p(X) of the data below, nats, from the closed form


def linear_gaussian() -> tuple[LinearModel, LinearGuide, Tensor]:
    """N = 200, D = 8, Z = 2; the guide's ELBO is 112 nats below the evidence."""
    model = LinearModel(2, 8, sigma=0.75)
    x = model.draw(200, seed=5)
    guide = LinearGuide(model, scale=1.5, shift=0.2)
    return model, guide, x


def over_minibatches(loss, x: Tensor, rows: int, draws: int) -> Tensor:
    found = []
    for _ in range(draws):
        found.append(torch.as_tensor(loss(x[torch.randperm(len(x))[:rows]])))
    return -torch.stack(found).detach().double()


# ------------------------------------------------------------------------------ A1


@pytest.mark.usefixtures("float64")
def test_a1_the_minibatch_scale_inside_the_logsumexp() -> None:
    model, guide, x = linear_gaussian()
    exact = model.log_evidence(x).sum().item()
    assert exact == pytest.approx(EVIDENCE, abs=0.01)
    plain = oracles.linear_elbo(model, guide, x).sum().item()
    assert plain == pytest.approx(exact - 112.31, abs=0.01)

    stock = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    wrong = over_minibatches(lambda b: stock.loss(model, guide, b, size=200), x, 20, 60)
    se = wrong.std() / math.sqrt(len(wrong))
    assert wrong.mean() - 4 * se > exact + 40  # "a bound" far above the evidence

    ours = elbo.IWELBO(50)
    right = over_minibatches(lambda b: ours.loss(model, guide, b, size=200), x, 20, 60)
    assert_below(right, exact)
    tight = elbo.IWELBO(50).evaluate(model, guide, x.repeat(20, 1)).reshape(20, 200).sum(1)
    assert_mean(right, tight.mean(), "full data and minibatches")
    assert_below(tight, exact)
    assert tight.mean() > exact - 3


@pytest.mark.usefixtures("float64")
def test_a1_the_gradient_of_the_guides_scale_has_the_wrong_sign() -> None:
    model, guide, x = linear_gaussian()
    # the guide is 1.5 times too wide, so its log-scale should go down

    def gradient(estimator: pyro.infer.ELBO, subsample: bool, draws: int) -> Tensor:
        found = []
        for _ in range(draws):
            rows = torch.randperm(200)[:20] if subsample else torch.arange(200)
            guide.log_scale.grad = None
            estimator.loss_and_grads(model, guide, x[rows], size=200)
            found.append(-guide.log_scale.grad.sum())
        return torch.stack(found)

    stock = RenyiELBO(alpha=0, num_particles=20, vectorize_particles=True, max_plate_nesting=1)
    full = gradient(elbo.IWELBO(20, "dreg"), False, 60)
    assert full.mean() + 4 * full.std() / math.sqrt(60) < -9
    for kind, draws in (("dreg", 100), ("pathwise", 200)):
        batches = gradient(elbo.IWELBO(20, kind), True, draws)
        difference = batches.mean() - full.mean()
        assert difference.abs() < 4 * math.sqrt(batches.var() / draws + full.var() / 60)
        assert batches.mean() + 4 * batches.std() / math.sqrt(draws) < 0
    wrong = gradient_in_svi(stock, model, guide, x)
    assert wrong.mean() - 4 * wrong.std() / math.sqrt(len(wrong)) > 200  # wrong sign, and large


def gradient_in_svi(stock, model, guide, x: Tensor) -> Tensor:
    """Stock gradients need registered parameters: collect them inside a param-only trace."""
    found = []
    for _ in range(40):
        rows = torch.randperm(200)[:20]
        guide.log_scale.grad = None
        with poutine.trace(param_only=True):
            stock.loss_and_grads(model, guide, x[rows], size=200)
        found.append(-guide.log_scale.grad.sum())
    return torch.stack(found)


@pytest.mark.usefixtures("float64")
def test_a1_a_scale_of_one_nth_turns_iwae_into_the_elbo() -> None:
    model, guide, x = linear_gaussian()
    plain = oracles.linear_elbo(model, guide, x).sum().item()
    exact = model.log_evidence(x).sum().item()
    stock = RenyiELBO(alpha=0, num_particles=50, vectorize_particles=True, max_plate_nesting=1)
    scaled = [poutine.scale(program, scale=1 / 200) for program in (model, guide)]
    values = torch.tensor([-200 * stock.loss(*scaled, x) for _ in range(20)])
    assert abs(values.mean() - plain) < 0.1 * (exact - plain)  # K has no effect
    with pytest.raises(ValueError, match=r"elbo.ELBO"):
        elbo.IWELBO(50)(*scaled)(x)


@pytest.mark.usefixtures("float64")
def test_a1_a_loop_over_particles_mixes_minibatches() -> None:
    base, guide_base, x = linear_gaussian()

    def model(x: Tensor) -> None:
        with pyro.plate("data", 200, subsample_size=20) as rows:
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            fn = dist.Normal(z @ base.weight.T + base.bias, base.log_sigma.exp()).to_event(1)
            pyro.sample("x", fn, obs=x[rows])

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 200, subsample_size=20) as rows:
            pyro.sample("z", guide_base.posterior(x[rows]))

    share = base.log_evidence(x).sum().item() / 10
    stock = RenyiELBO(alpha=0, num_particles=10, max_plate_nesting=1)
    scaled = [poutine.scale(program, scale=0.1) for program in (model, guide)]
    wrong = torch.tensor([-stock.loss(*scaled, x) for _ in range(25)])
    assert wrong.mean() - 4 * wrong.std() / 5 > share + 3  # even at net scale one
    ours = elbo.IWELBO(10)
    right = torch.tensor([-ours.loss(model, guide, x) / 10 for _ in range(200)])
    assert_below(right, share)
    assert right.mean() > share - 3


# ------------------------------------------------------------------------------ A2


class Plain(nn.Module):
    """A pair of plain functions around networks that nobody registered."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(5, 4), nn.Linear(2, 5)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, raw = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, raw.exp()).to_event(1))


STOCK = {
    "Trace": Trace_ELBO,
    "TraceMeanField": TraceMeanField_ELBO,
    "TraceEnum": lambda: TraceEnum_ELBO(strict_enumeration_warning=False),
    "Renyi": lambda: RenyiELBO(alpha=0, num_particles=2),
}


def total_gradient(module: nn.Module) -> float:
    return sum(0.0 if p.grad is None else p.grad.abs().sum().item() for p in module.parameters())


@pytest.mark.parametrize("engine", STOCK)
def test_a2_stock_engines_silently_skip_plain_modules(engine: str) -> None:
    x = torch.bernoulli(torch.full((4, 5), 0.5))
    plain = Plain()
    STOCK[engine]().loss_and_grads(plain.model, plain.guide, x)
    assert total_gradient(plain) == 0.0  # and no warning: they are errors here
    # a Program announces itself
    model, guide, args = build("vae_bernoulli")
    with poutine.trace(param_only=True):
        STOCK[engine]().loss_and_grads(model, guide, *args)
    assert total_gradient(model) > 0 and total_gradient(guide) > 0


@pytest.mark.parametrize(
    "estimator",
    [elbo.ELBO(), elbo.ELBO(kl="mixed"), elbo.IWELBO(3), elbo.IWELBO(3, "dreg"), elbo.RenyiELBO(3)],
    ids=str,
)
def test_a2_ours_train_plain_modules(estimator: elbo.Estimator) -> None:
    x = torch.bernoulli(torch.full((4, 5), 0.5))
    plain = Plain()
    estimator.loss_and_grads(plain.model, plain.guide, x)
    assert all(p.grad.abs().sum() > 0 for p in plain.parameters())
    before = [p.detach().clone() for p in plain.parameters()]
    ppvae.SVI(plain.model, plain.guide, torch.optim.Adam, estimator).step(x)
    assert all(not torch.equal(a, b) for a, b in zip(before, plain.parameters(), strict=True))


# ------------------------------------------------------------------------------ A3


def test_a3_an_estimator_is_a_module_and_keeps_no_nesting() -> None:
    model, guide, args = build("vae_bernoulli")
    with pytest.raises(AttributeError, match="differentiable_loss"):
        RenyiELBO(num_particles=2)(model, guide)(*args)
    with pytest.raises(TypeError, match=r"use elbo.RenyiELBO or elbo.IWELBO"):
        ppvae.SVI(model, guide, torch.optim.Adam, RenyiELBO(num_particles=2))

    def deep_model(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with pyro.plate("pixels", len(x), dim=-2):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def deep_guide(x: Tensor) -> None:
        with pyro.plate("data", x.shape[-1], dim=-1):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    x = torch.randn(3, 4)
    stock = Trace_ELBO(num_particles=2, vectorize_particles=True)
    stock(model, guide)(*args)
    with pytest.raises(ValueError, match="collide at dim=-2"):
        stock(deep_model, deep_guide)(x)
    for estimator in (elbo.IWELBO(2), elbo.ELBO(2), elbo.RenyiELBO(2)):
        assert estimator(model, guide)(*args).shape == ()
        assert estimator(deep_model, deep_guide)(x).shape == ()
        assert estimator(model, guide)(*args).shape == ()


def test_a3_a_shared_network_is_optimised_once() -> None:
    model, guide, _ = build("vae_vamp_prior")
    objective = elbo.IWELBO(2)(model, guide)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in guide.parameters()}
    assert len(shared) == 4
    parameters = list(objective.parameters())
    assert len({id(p) for p in parameters}) == len(parameters)


# ------------------------------------------------------------------------------ A4


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("K", [2, 3])
def test_a4_renyi_gives_a_discrete_guide_no_gradient(K: int) -> None:
    model, guide = oracles.BeliefNet(), oracles.BeliefGuide()
    x = torch.tensor([[1.0, 0, 0, 1], [0, 1, 1, 1]])
    stock = RenyiELBO(alpha=0, num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    with poutine.trace(param_only=True):
        stock.loss_and_grads(model, guide, x)
    assert total_gradient(guide) == 0.0 and total_gradient(model) > 0
    exact = oracles.belief_expected_bound(elbo.IWELBO(K).bound, model, guide, x, K).sum()
    expected = oracles.exact_gradient(-exact, trainable(guide))
    assert expected.abs().max() > 0.1
    for gradient in ("score", "vimco"):
        objective = elbo.IWELBO(K, gradient)(model, guide)
        many = x.repeat(100, 1)
        found = oracles.gradients(lambda o=objective, many=many: o(many), trainable(guide), 40, 100)
        assert_mean(found, expected, gradient)
    with pytest.raises(ValueError, match="has no reparameterised"):
        elbo.IWELBO(K)(model, guide)(x)


@pytest.mark.usefixtures("float64")
def test_a4_a_discrete_guide_is_learned() -> None:
    """Stock: the logits stay where they were after 500 steps. Ours: the exact posterior."""

    class Coin(ppvae.Program):
        def __init__(self) -> None:
            super().__init__()
            self.logits = nn.Parameter(torch.zeros(4))

        def forward(self, x: Tensor) -> None:
            with pyro.plate("data", 4):
                pyro.sample("c", dist.Bernoulli(logits=self.logits))

    def model(x: Tensor) -> None:
        with pyro.plate("data", 4):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            pyro.sample("x", dist.Normal(2 * c - 1, 1.0), obs=x)

    x = torch.tensor([-1.0, -0.3, 0.0, 0.7])
    posterior = 2 * x  # logits: log N(x; 1, 1) - log N(x; -1, 1)
    stock, ours = Coin(), Coin()
    renyi = RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    svi = pyro.infer.SVI(model, stock, pyro.optim.Adam({"lr": 0.05}), loss=renyi)
    for _ in range(20):
        svi.step(x)
    assert (stock.logits == 0).all()
    adam = lambda p: torch.optim.Adam(p, lr=0.05, betas=(0.9, 0.9))  # noqa: E731
    svi = ppvae.SVI(model, ours, adam, elbo.IWELBO(4, "vimco"))
    for _ in range(250):
        svi.step(x)
    assert (ours.logits - posterior).abs().max() < 0.4


# ------------------------------------------------------------------------------ A5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("layout", ["event", "pixels left", "pixels right"])
def test_a5_one_weight_per_datapoint_wherever_the_plate_lies(layout: str) -> None:
    x = torch.randn(5, 3)

    def program(x: Tensor, observe: bool) -> None:
        if layout == "pixels right":  # data at -2, pixels at -1
            with pyro.plate("data", 5, dim=-2):
                z = pyro.sample("z", dist.Normal(x.new_zeros(5, 1), 1.0 if observe else 0.6))
                if observe:
                    with pyro.plate("pixels", 3, dim=-1):
                        pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            return
        with pyro.plate("data", 5, dim=-1):
            z = pyro.sample("z", dist.Normal(x.new_zeros(5), 1.0 if observe else 0.6))
            if observe and layout == "event":
                pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)
            elif observe:
                with pyro.plate("pixels", 3, dim=-2):
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    K = 10
    weights = ppvae.log_weights(
        lambda x: program(x, True), lambda x: program(x, False), x, num_particles=K
    )
    assert weights.log_w.shape == (K, 5)
    z = weights.guide_trace.nodes["z"]["value"].reshape(K, 5)
    by_hand = dist.Normal(z.unsqueeze(-1), 1.0).log_prob(x).sum(-1)
    by_hand = by_hand + dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, 0.6).log_prob(z)
    torch.testing.assert_close(weights.log_w, by_hand)


@pytest.mark.usefixtures("float64")
def test_a5_weights_of_a_whole_batch_are_refused_or_asked_for() -> None:
    """Per datapoint the bound is tight; one weight for the batch is a valid but loose bound."""
    x = torch.randn(30)

    def model(x: Tensor) -> None:  # the batch hidden in event dims
        z = pyro.sample("z", dist.Normal(torch.zeros(30), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    def plated(program):
        def run(x: Tensor) -> None:
            with pyro.plate("data", 30):
                if program is model:
                    z = pyro.sample("z", dist.Normal(0.0, 1.0))
                    pyro.sample("x", dist.Normal(z, 1.0), obs=x)
                else:
                    pyro.sample("z", dist.Normal(x / 2, 1.0))

        return run

    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum().item()
    stock = RenyiELBO(alpha=0, num_particles=10, vectorize_particles=True, max_plate_nesting=0)
    silent = torch.tensor([-stock.loss(model, guide, x) for _ in range(200)])
    estimator = elbo.IWELBO(10)
    with pytest.raises(ValueError, match=r"site '[xz]' lies outside the plate 'data'"):
        estimator(model, guide)(x)
    with pytest.raises(ppvae.PairError, match="outside the plate 'data'"):
        ppvae.SVI(model, guide, torch.optim.Adam, estimator).step(x)
    joint = torch.stack([-estimator(model, guide)(x, joint=True) for _ in range(200)])
    tight = torch.stack([-estimator(plated(model), plated(guide))(x) for _ in range(200)])
    for values in (silent, joint, tight):
        assert_below(values, exact)
    noise = (joint.var() / 200 + tight.var() / 200).sqrt()
    assert tight.mean() - joint.mean() > 4 * noise
    assert_mean(joint - silent, 0.0)


# ------------------------------------------------------------------------------ A6


def test_a6_plain_networks_break_on_particles_and_ours_do_not() -> None:
    z = torch.randn(7, 7, 2)  # K = N = 7: the dangerous case
    norm = nn.Sequential(nn.Linear(2, 7), nn.BatchNorm1d(7))
    folded = nets.flat_batch(copy.deepcopy(norm))
    wrong, right = norm(z), folded(z)
    assert wrong.shape == right.shape
    assert not torch.allclose(wrong, right)  # silently the wrong axis
    with pytest.raises(RuntimeError):
        nn.Sequential(nn.Linear(2, 8), nn.Unflatten(1, (2, 2, 2)), nn.Conv2d(2, 1, 1))(z)

    mean = norm[0](z).reshape(49, 7).mean(0)
    sd = norm[0](z).reshape(49, 7).std(0, unbiased=False)
    expected = (norm[0](z) - mean) / (sd.square() + 1e-5).sqrt()
    torch.testing.assert_close(right, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ["Trace", "TraceMeanField", "Renyi"])
@pytest.mark.parametrize("K", [6, 5])  # 6: as many particles as datapoints
def test_a6_convolutions_and_batch_norm_take_particles(engine: str, K: int) -> None:
    """In training mode all K N rows are one batch; with the same z the order does not matter."""
    cls = {"Trace": Trace_ELBO, "TraceMeanField": TraceMeanField_ELBO, "Renyi": RenyiELBO}[engine]
    model, guide, args = build("vae_conv")
    loss = cls(num_particles=K, vectorize_particles=True, max_plate_nesting=1)
    assert math.isfinite(loss.loss(model, guide, *args))
    before = owners(model)[0].state_dict()["likelihood.net.upsample.net.1.running_mean"].clone()
    log_w = ppvae.log_weights(model, guide, *args, num_particles=K).log_w
    assert log_w.shape == (K, 6)
    after = model.state_dict()["likelihood.net.upsample.net.1.running_mean"]
    assert not torch.equal(before, after)


# ------------------------------------------------------------------------------ B1


def scaled_at(place: str) -> tuple[LinearModel, LinearGuide, Tensor, list]:
    """The pair of A1 on 40 rows with a scale of 4 on z in model, guide or both."""
    model, guide, x = linear_gaussian()

    class Scaled(LinearModel):
        def forward(self, x: Tensor, size: int | None = None) -> None:
            with pyro.plate("data", len(x)):
                with poutine.scale(scale=4.0 if place != "guide" else 1.0):
                    z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                mean = z @ self.weight.T + self.bias
                pyro.sample("x", dist.Normal(mean, self.log_sigma.exp()).to_event(1), obs=x)

    scaled = Scaled(2, 8, sigma=0.75)
    with_scale = guide if place == "model" else poutine.scale(guide, scale=4.0)
    return model, guide, x[:40], [scaled, with_scale]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("place", ["both", "model", "guide"])
def test_b1_beta_as_a_scale_and_as_an_argument(place: str) -> None:
    model, guide, x, stock = scaled_at(place)
    one = oracles.linear_elbo(model, guide, x, 1.0).sum().item()
    four = oracles.linear_elbo(model, guide, x, 4.0).sum().item()
    assert four < one - 50

    def values(estimator: pyro.infer.ELBO, pair: list) -> Tensor:
        return torch.tensor([-estimator.loss(*pair, x) for _ in range(60)])

    K = 20
    trace = values(Trace_ELBO(K, vectorize_particles=True, max_plate_nesting=1), stock)
    field = values(TraceMeanField_ELBO(K, vectorize_particles=True, max_plate_nesting=1), stock)
    if place == "both":
        assert_mean(trace, four)
        assert_mean(field, four)
    elif place == "model":
        assert trace.mean() < four - 50  # neither beta
        assert_mean(field, one)  # beta is ignored
    else:
        assert trace.mean() > one + 50  # neither beta
        assert_mean(field, four)

    for kl in ("sampled", "analytic", "mixed"):
        assert_mean(values(elbo.ELBO(K, beta=4.0, kl=kl), [model, guide]), four, kl)
    # a scale of one's own is taken as Pyro takes it, or, for a closed form, refused
    assert_mean(values(elbo.ELBO(K), stock) - trace, 0.0)
    with pytest.raises(ValueError, match=r"latent 'z'.*poutine.scale"):
        elbo.ELBO(kl="analytic")(*stock)(x)
    assert_mean(values(elbo.ELBO(K, kl="mixed"), stock) - trace, 0.0)


@pytest.mark.usefixtures("float64")
def test_b1_the_closed_form_of_a_bottom_up_guide() -> None:
    model = oracles.TwoLevelModel()
    guide = oracles.TwoLevelGuide(model, bottom_up=True, shift=0.8, scale=1.4)
    x = torch.linspace(-2, 2, 5)
    exact = oracles.two_level_elbo(model, guide, x).sum()
    parameters = trainable(guide)
    expected = oracles.exact_gradient(-exact, parameters)
    many = x.repeat(200)

    def draw(objective: nn.Module) -> tuple[Tensor, Tensor]:
        values, grads = [], []
        for _ in range(50):
            loss = objective(many) / 200
            found = torch.autograd.grad(loss, parameters, allow_unused=True)
            zeros = [
                torch.zeros_like(p) if g is None else g
                for p, g in zip(parameters, found, strict=True)
            ]
            grads.append(torch.cat([g.flatten() for g in zeros]))
            values.append(loss.detach())
        return torch.stack(values), torch.stack(grads)

    with pyro.validation_enabled(False):  # else it warns
        values, grads = draw(TraceMeanField_ELBO(max_plate_nesting=1)(model, guide))
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_mean(values, -exact.detach())
    with pytest.raises(AssertionError, match="standard errors off"):
        assert_mean(grads, expected)

    with pytest.raises(ValueError, match="latent 'z1': in the model it depends on a latent"):
        elbo.ELBO(kl="analytic")(model, guide)(x)
    for kl in ("mixed", "sampled"):
        values, grads = draw(elbo.ELBO(kl=kl)(model, guide))
        assert_mean(values, -exact.detach(), kl)
        assert_mean(grads, expected, kl)
    # top-down, the closed form is right for both latents
    guide = oracles.TwoLevelGuide(model, bottom_up=False, shift=0.8, scale=1.4)
    exact, parameters = oracles.two_level_elbo(model, guide, x).sum(), trainable(guide)
    assert ppvae.log_weights(model, guide, x).kl_valid() == {"z1", "z2"}
    values, grads = draw(elbo.ELBO(kl="analytic")(model, guide))
    assert_mean(values, -exact.detach(), "analytic")
    assert_mean(grads, oracles.exact_gradient(-exact, parameters), "analytic")


def test_b1_a_mixture_prior_has_no_closed_form() -> None:
    model, guide, args = build("vae_mixture_prior")
    with pytest.raises(ValueError, match=r"latent 'z': no closed form.*MixtureSameFamily.*mixed"):
        elbo.ELBO(kl="analytic")(model, guide)(*args)
    losses = []
    for kl in ("sampled", "mixed"):
        torch.manual_seed(0)
        losses.append(elbo.ELBO(kl=kl)(model, guide)(*args).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


# ------------------------------------------------------------------------------ C2


class StockVAE(nn.Module):
    """As users write it: networks registered under fixed names."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
        self.decoder = nn.Linear(2, 5)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        Plain.model(self, x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        Plain.guide(self, x)


def moved(module: nn.Module, step) -> list[bool]:
    before = [p.detach().clone() for p in module.parameters()]
    for _ in range(3):
        step()
    return [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]


def test_c2_the_second_of_two_equal_vaes_never_trains_in_stock_pyro() -> None:
    x = torch.bernoulli(torch.full((6, 5), 0.5))
    first, second = StockVAE(), StockVAE()
    results = []
    for vae in (first, second):
        optim = pyro.optim.Adam({"lr": 0.01})
        svi = pyro.infer.SVI(vae.model, vae.guide, optim, loss=Trace_ELBO())
        results.append(moved(vae, lambda s=svi: s.step(x)))
    assert all(results[0])
    assert not any(results[1])  # no warning
    # in ours, even these do
    pyro.clear_param_store()
    for vae in (StockVAE(), StockVAE()):
        svi = ppvae.SVI(vae.model, vae.guide, torch.optim.Adam, elbo.IWELBO(2))
        assert all(moved(vae, lambda s=svi: s.step(x)))
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("stock", [True, False])
def test_c2_two_equal_programs_both_train(stock: bool) -> None:
    for _ in range(2):
        model, guide, args = build("vae_conv")
        if stock:
            optim = pyro.optim.Adam({"lr": 0.01})
            svi = pyro.infer.SVI(model, guide, optim, loss=Trace_ELBO())
        else:
            svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO())
        both = nn.ModuleList([model, guide])
        assert all(moved(both, lambda s=svi, a=args: s.step(*a)))
    assert (len(pyro.get_param_store()) > 0) == stock


def test_c2_buffers_are_saved() -> None:
    """Pyro's store has no batch-norm statistics; ``state_dict`` has."""
    x = torch.bernoulli(torch.full((6, 5), 0.5))
    vae = StockVAE()
    svi = pyro.infer.SVI(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
    svi.step(x)
    assert not any("running_mean" in name for name in pyro.get_param_store())
    model, guide, args = build("vae_conv")
    ours = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO())
    ours.step(*args)
    state = ours.state_dict()["objective"]
    names = [name for name in state if "running_mean" in name]
    assert names and all(state[name].abs().sum() > 0 for name in names)
    assert all(state[name] == 1 for name in state if "num_batches_tracked" in name)


def test_c2_local_parameters_of_pyro_break_its_own_svi_but_not_ours() -> None:
    model, guide, args = build("pyro_modules")
    with pyro.settings.context(module_local_params=True):
        model, guide, args = build("pyro_modules")
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), loss=Trace_ELBO())
        with pytest.raises(AttributeError, match="unconstrained"):
            svi.step(*args)
    svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO())
    both = nn.ModuleList([model, guide])
    assert all(moved(both, lambda: svi.step(*args)))


def test_c2_optimiser_and_step_survive_a_save_before_the_first_step() -> None:
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 5)), latent_dim=2)
    guide = guides.Normal(nets.mlp(5, 4))
    x = torch.bernoulli(torch.full((6, 5), 0.5))
    svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO())
    svi.step(x)
    other = ppvae.SVI(*copy.deepcopy((model, guide)), torch.optim.Adam, elbo.ELBO())
    other.load_state_dict(svi.state_dict())
    again = other.state_dict()["optimizer"]["state"]
    assert len(again) == len(list(svi.objective.parameters()))
    assert other.num_steps == 1
