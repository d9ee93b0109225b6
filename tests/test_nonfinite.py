"""A loss or gradient that is not finite: what is said, and that nothing has moved."""

import functools
import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from ppvae import conditionals, elbo, guides, models, nets
from ppvae.check.nonfinite import NonFiniteError, blame
from registry import ALL_ESTIMATORS, build

N, D, Z = 6, 5, 2
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
X = torch.randn(N, D, generator=torch.Generator().manual_seed(1))
BAD = X.clone()
BAD[3, 1] = math.inf


@pytest.fixture
def traced(monkeypatch):
    """Run the traced graph itself, without the compiler."""
    import torch._inductor.compile_fx

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", lambda graph, inputs: graph)


class Model(ppvae.Program):
    """Each hook is one way to go wrong: a scale of zero, a slope of zero to the half, a net."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(Z, D)
        self.scale, self.root = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Z), 1.0).to_event(1))
            loc = self.net(z) + self.root.abs().sqrt()
            pyro.sample("x", dist.Normal(loc, self.scale).to_event(1), obs=x)


def pair():
    torch.manual_seed(0)
    return Model(), guides.Normal(nets.mlp(D, 8, 2 * Z))


def whole_state(svi):
    """Parameters, buffers, the optimiser's moments, the estimator's multipliers."""
    found = {f"objective.{k}": v for k, v in svi.objective.state_dict().items()}
    for index, moments in svi.optimizer.state_dict()["state"].items():
        found.update({f"optimizer.{index}.{k}": v for k, v in moments.items()})
    return {k: v.clone() for k, v in found.items() if torch.is_tensor(v)}


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def broken(svi, how):
    """A step that will fail: the batch to give, after a change of a parameter if need be."""
    with torch.no_grad():
        if how == "scale":
            svi.model.scale.zero_()
        elif how == "root":
            svi.model.root.zero_()
    return BAD if how == "data" else X


CASES = {
    "scale": r"step 3: the loss is nan; site 'x' of the model: .*Normal\(loc: .*scale: 0 to 0\)",
    "data": r"step 3: the loss is nan; site 'z' of the guide: .*Normal\(loc: .*not finite",
    "root": r"step 3: the loss is \d.*gradient of model\.root is not finite; site 'x' of the model",
}


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("how", CASES)
def test_the_error_names_step_site_and_parameters_and_nothing_moves(traced, how, compile):
    svi = ppvae.SVI(*pair(), ADAM, elbo.ELBO(2), compile=compile)
    for _ in range(2):
        svi.step(X)
    x = broken(svi, how)
    before = whole_state(svi)
    random = torch.get_rng_state()
    with pytest.raises(NonFiniteError, match=CASES[how]) as error:
        svi.step(x)
    for cure in ("learning rate", "clip_norm", "skip_nonfinite=True"):
        assert cure in str(error.value)
    assert_same_state(before, whole_state(svi))
    assert svi.num_steps == 2
    assert isinstance(error.value, FloatingPointError)
    assert not torch.equal(torch.get_rng_state(), random)  # it did draw, as any step does
    if how == "data":
        assert 0 < svi.step(X) < 1000  # and it can go on
        assert svi.num_steps == 3


def test_the_site_is_named_by_the_draws_that_failed():
    """They are rare: other draws of the same pair show nothing."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Z), 1.0).to_event(1))
            loc = z.where(z < 3.0, math.nan).sum(-1, keepdim=True)
            pyro.sample("x", dist.Normal(loc.expand(*loc.shape[:-1], D), 1.0).to_event(1), obs=x)

    def train(svi):
        for _ in range(10_000):
            svi.step(X)

    for seed in range(2):
        torch.manual_seed(seed)
        svi = ppvae.SVI(model, guides.Normal(nn.Linear(D, 2 * Z)), torch.optim.SGD)
        svi.prepare(X)
        with torch.no_grad():
            svi.guide.conditional.net.weight.zero_(), svi.guide.conditional.net.bias.zero_()
        svi.optimizer.param_groups[0]["lr"] = 0.0
        with pytest.raises(NonFiniteError, match=r"the loss is nan; site 'x' of the model"):
            train(svi)


@pytest.mark.parametrize("label", ALL_ESTIMATORS)
@pytest.mark.parametrize("name", ["vae_bernoulli", "vae_normal_predicted_scale"])
def test_every_estimator(name, label):
    model, guide, (x,) = build(name)
    svi = ppvae.SVI(model, guide, ADAM, ALL_ESTIMATORS[label])
    svi.step(x)
    before = whole_state(svi)
    x = x.clone()
    x[2, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"step 2: .*site '[zx]' of the (guide|model)"):
        svi.step(x)
    assert_same_state(before, whole_state(svi))


def test_the_buffers_and_the_multiplier_stay_good():
    """A mean of a bad batch would stay in the running statistics for ever."""
    torch.manual_seed(0)
    net = nets.mlp(Z, 8, D, batch_norm=True)
    model = models.VAE(conditionals.Normal(net, 0.7), latent_dim=Z)
    guide = guides.Normal(nets.mlp(D, 8, 2 * Z, batch_norm=True))
    loss = elbo.ELBO(beta=elbo.Constraint(max_rate=1.0))
    svi = ppvae.SVI(model, guide, ADAM, loss, skip_nonfinite=True)
    svi.step(X)
    before = whole_state(svi)
    assert math.isnan(svi.step(BAD))
    assert_same_state(before, whole_state(svi))
    assert math.isfinite(svi.step(X))


@pytest.mark.parametrize("compile", [False, True])
def test_skipped_steps_are_counted_and_kept_in_the_state(traced, compile):
    svi = ppvae.SVI(*pair(), ADAM, compile=compile, skip_nonfinite=True)
    svi.step(X)
    good = whole_state(svi)
    for _ in range(3):
        assert not math.isfinite(svi.step(BAD))
    assert_same_state(good, whole_state(svi))
    assert (svi.num_steps, svi.num_skipped) == (4, 3)
    svi.check_finite()
    svi.step(X)
    assert (svi.num_steps, svi.num_skipped) == (5, 3)
    assert any(not torch.equal(good[k], v) for k, v in whole_state(svi).items())
    file = io.BytesIO()
    torch.save(svi.state_dict(), file)
    file.seek(0)
    other = ppvae.SVI(*pair(), ADAM, compile=compile, skip_nonfinite=True)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert (other.num_steps, other.num_skipped) == (5, 3)
    other.step(BAD)
    assert other.num_skipped == 4


def test_a_skipped_step_is_no_step_of_the_run_without_it():
    """What comes after is what would have come after the same draws."""
    ends = []
    for bad in (True, False):
        svi = ppvae.SVI(*pair(), ADAM, skip_nonfinite=True)
        for i in range(4):
            torch.manual_seed(i)
            if i != 2:
                svi.step(X)
            elif bad:
                svi.step(BAD)
        ends.append(whole_state(svi))
    assert_same_state(*ends)


def test_check_finite_says_nothing_on_a_cpu():
    svi = ppvae.SVI(*pair(), ADAM)
    svi.check_finite()
    svi.step(X)
    assert svi.check_finite() is None
    with pytest.raises(NonFiniteError):
        svi.step(BAD)
    assert svi.check_finite() is None


def test_a_gradient_too_large_for_its_norm():
    """Each entry is finite, their norm is not: the message must say what is wrong."""

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(Z), 1.0).to_event(1))
            pyro.factor("steep", 1e25 * self.slope + 0.0 * z.sum(-1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x)

    class Steep(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.net, self.slope = nn.Linear(Z, D), nn.Parameter(torch.zeros(()))

        forward = model

    svi = ppvae.SVI(Steep(), pair()[1], ADAM)
    with pytest.raises(NonFiniteError, match=r"model\.slope"):
        svi.step(X)


def test_a_draw_that_fails_is_reported_with_its_site():
    """torch refuses to draw from probabilities that are NaN."""

    class Coins(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(Z, D)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                b = pyro.sample("b", dist.Bernoulli(x.new_full((Z,), 0.5)).to_event(1))
                pyro.sample("x", dist.Normal(self.net(b), 1.0).to_event(1), obs=x)

    class Posterior(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(D, Z)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("b", dist.Bernoulli(logits=self.net(x)).to_event(1))

    for skip in (False, True):
        svi = ppvae.SVI(
            Coins(), Posterior(), ADAM, elbo.ELBO(gradient="score"), skip_nonfinite=skip
        )
        svi.step(X)
        if skip:
            assert math.isnan(svi.step(X * math.nan))
            assert svi.num_skipped == 1
            continue
        with pytest.raises(NonFiniteError, match=r"step 2: .*site 'b' of the guide"):
            svi.step(X * math.nan)


def test_pyros_own_losses():
    svi = ppvae.SVI(*pair(), ADAM, pyro.infer.Trace_ELBO(), skip_nonfinite=False)
    svi.step(X)
    broken(svi, "scale")
    before = whole_state(svi)
    with pytest.warns(UserWarning, match="Encountered NaN"), pytest.raises(NonFiniteError):
        svi.step(X)
    assert_same_state(before, whole_state(svi))


# -- blame -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_particles", [1, 3])
def test_blame_finds_the_first_site_and_row(num_particles):
    model, guide = pair()
    assert blame(model, guide, X, num_particles=num_particles) == ""
    reason = blame(model, guide, BAD, num_particles=num_particles)
    assert reason.startswith("site 'z' of the guide: ")
    with torch.no_grad():
        model.scale.fill_(math.nan)
    reason = blame(model, guide, X, num_particles=num_particles)
    assert reason.startswith("site 'x' of the model: scale not finite; Normal(loc: ")
    assert "scale: none finite, " in reason


@pytest.mark.parametrize("num_particles", [1, 3])
def test_blame_of_a_density_names_the_row(num_particles):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, x.abs()), obs=x)  # a scale of zero

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.tensor([1.0, 2.0, 0.0, 0.0])
    reason = blame(model, guide, x, num_particles=num_particles)
    assert "for 2 of 4 datapoints, the first is row 2" in reason
    assert reason.endswith("scale: 0 to 2)")


# -- on a GPU ----------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("compile", [False, True])
def test_on_a_gpu_the_update_is_withheld_and_told_later(compile):
    svi = ppvae.SVI(*[program.cuda() for program in pair()], ADAM, compile=compile)
    x, bad = X.cuda(), BAD.cuda()
    for _ in range(4):
        svi.step(x)
    svi.check_finite()
    before = {k: v.clone() for k, v in svi.objective.state_dict().items() if torch.is_tensor(v)}
    svi.update(bad)
    after = svi.objective.state_dict()
    assert all(torch.equal(v, after[k]) for k, v in before.items())
    assert svi.num_skipped == 1
    svi.update(x)
    with pytest.raises(NonFiniteError, match=r"1 of the steps 5 to 6.*on the CPU name the site"):
        svi.check_finite()
    svi.check_finite()  # told once
    assert math.isfinite(svi.step(x))
    assert any(not torch.equal(v, svi.objective.state_dict()[k]) for k, v in before.items())


@pytest.mark.cuda
def test_skipped_steps_on_a_gpu():
    programs = [program.cuda() for program in pair()]
    svi = ppvae.SVI(*programs, ADAM, compile=True, skip_nonfinite=True)
    for x in (X, X, X, BAD, X, BAD):
        svi.update(x.cuda())
    svi.check_finite()
    assert (svi.num_steps, svi.num_skipped) == (6, 2)


def test_a_prior_that_is_not_finite_is_of_the_model():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.tensor(math.nan), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    assert blame(model, guide, X[:, 0]).startswith("site 'z' of the model: loc not finite")


def test_a_class_that_a_row_cannot_have_is_not_blamed():
    """Rows with a label give the other classes a logit of minus infinity."""
    x, y = torch.bernoulli(torch.full((8, 4), 0.5)), torch.arange(8) % 3 - 1
    posterior = conditionals.Normal(nets.mlp(4 + 2, 8, 2 * 2))
    model = models.M2(conditionals.Bernoulli(nets.mlp(2 + 2, 8, 4)), 2, num_classes=2)
    guide = guides.M2(nets.mlp(4, 8, 2), posterior)
    assert blame(model, guide, x, y) == ""
    loss = elbo.Plus(elbo.ELBO(), lambda model, guide, x, y: None)
    with pytest.raises(ValueError, match=r"term of elbo\.Plus must be one number for each"):
        ppvae.SVI(model, guide, torch.optim.Adam, loss).step(x, y)
