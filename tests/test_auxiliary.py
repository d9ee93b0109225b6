"""Networks beside a pair: what they learn, when, and that neither side's gradient reaches the other.

The oracle of a ratio is log N(z; m, s^2) - log N(z; 0, 1), which is linear in (1, z, z^2).
"""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ppvae
from compiling import inductor
from ppvae import Auxiliary, Beside, Ratio, conditionals, elbo, guides, models, nets
from ppvae.auxiliary import own_parameters
from ppvae.check.nonfinite import NonFiniteError
from ppvae.train.beside import Draws

pytestmark = pytest.mark.forks

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
SGD = functools.partial(torch.optim.SGD, lr=1e-3)
X = torch.bernoulli(torch.full((50, 4), 0.5), generator=torch.Generator().manual_seed(1))


def pair(**options):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4, **options)), latent_dim=2)
    return model, guides.Normal(nets.mlp(4, 8, 4, **options))


def critic(*extra):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(2, 8), nn.Tanh(), *extra, nn.Linear(8, 1))


def factor(gamma=5.0, net=None, optim=ADAM, beside=None, **options):
    loss = elbo.FactorELBO(gamma=gamma, ratio=critic() if net is None else net)
    return ppvae.SVI(*pair(), optim, loss, beside=beside, **options)


def tensors(svi):
    state = svi.objective.state_dict()
    return {k: v.clone() for k, v in state.items() if torch.is_tensor(v)}


def ratio_of(svi):
    return svi.objective.state.ratio


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


# -- whose gradient is whose ---------------------------------------------------------------------


def test_no_gradient_of_the_pair_reaches_the_critic():
    svi = factor()
    svi.objective(X).backward()
    assert all(p.grad is None for p in ratio_of(svi).parameters())
    assert all(p.grad is not None for p in own_parameters(svi.objective).values())


def test_no_gradient_of_the_critic_reaches_the_pair():
    svi = factor()
    svi.prepare(X)
    (turn,) = svi.turns.turns.values()
    turn.objective(X).backward()
    assert all(p.grad is None for p in own_parameters(svi.objective).values())
    assert all(p.grad is not None for p in ratio_of(svi).parameters())


def test_each_optimiser_holds_its_own_parameters():
    svi = factor()
    svi.prepare(X)
    (turn,) = svi.turns.turns.values()
    held = {id(p) for group in svi.optimizer.param_groups for p in group["params"]}
    beside = {id(p) for group in turn.optimizer.param_groups for p in group["params"]}
    assert beside == {id(p) for p in ratio_of(svi).parameters()}
    assert held | beside == {id(p) for p in svi.objective.parameters()}
    assert not held & beside


def test_gamma_zero_is_the_elbo_bit_for_bit():
    factored, plain = factor(0.0), ppvae.SVI(*pair(), ADAM)
    for svi in (factored, plain):
        svi.prepare(X)
        torch.manual_seed(3)
        svi.loss = svi.step(X)
    assert factored.loss == plain.loss
    now = tensors(factored)
    for name, value in tensors(plain).items():
        assert torch.equal(now[name], value), name


def test_the_pairs_gradient_is_that_of_finite_differences_with_t_fixed():
    svi = factor()
    svi.objective.double()
    parameter = next(p for n, p in svi.guide.named_parameters() if n.endswith("bias"))

    def loss():
        torch.manual_seed(5)
        return svi.objective(X.double())

    loss().backward()
    gradient, step = parameter.grad.clone(), 1e-6
    with torch.no_grad():
        for i in range(3):
            parameter[i] += step
            above = loss()
            parameter[i] -= 2 * step
            below = loss()
            parameter[i] += step
            assert float(above - below) / (2 * step) == pytest.approx(float(gradient[i]), rel=1e-5)


# -- what is called, and when --------------------------------------------------------------------


class Logged(Auxiliary):
    """Notes each call, and which of the pair's parameters there were."""

    def __init__(self, log):
        super().__init__()
        self.weight, self.log = nn.Parameter(torch.zeros(())), log

    def draw(self, draws):
        self.log.append("draw")
        return (draws.guide("z"),)

    def loss(self, z):
        self.log.append("loss")
        return (self.weight - z.mean()) ** 2

    def update(self, total):
        self.log.append("update")

    def report(self):
        return {"weight": self.weight}


def logged(*extra, **options):
    log = []
    model, guide = pair()
    guide.beside = Logged(log)
    svi = ppvae.SVI(model, guide, *extra, **options)
    svi.prepare(X)
    forward = svi.objective.forward

    def noted(*args, **kwargs):
        log.append("pair")
        return forward(*args, **kwargs)

    svi.objective.forward = noted
    log.clear()
    return svi, log


def test_order_and_number_of_calls():
    svi, log = logged(ADAM, beside=Beside(steps=2, burn_in=1))
    svi.step(X)
    turns = ["draw", "loss"] * 2 + ["update"]
    assert log == ["draw", "loss", "pair", *turns]
    log.clear()
    svi.step(X)
    assert log == ["pair", *turns]


def test_a_step_moves_its_own_parameters_by_its_own_optimiser():
    svi, _ = logged(ADAM, beside=Beside(torch.optim.SGD))
    before = tensors(svi)
    svi.turns((X,), {}, skipped=0)
    assert moved(before, tensors(svi)) == {"guide.beside.weight"}


def test_a_skipped_step_has_no_turn_after_it():
    svi, log = logged(ADAM, skip_nonfinite=True)
    svi.step(X)
    log.clear()
    svi.step(X * math.inf)
    assert svi.num_skipped == 1 and set(log) <= {"pair"}


def test_draws_leave_buffers_of_the_pair_and_the_mode():
    model, guide = pair(batch_norm=True)
    before = copy.deepcopy(guide.state_dict())
    with torch.no_grad():
        draws = Draws(model, guide, (X,), {})
        first, second = draws.guide("z"), draws.guide("z")
        dream = draws.model()
    assert not torch.equal(first, second)
    assert dream["x"].shape == X.shape and not torch.equal(dream["x"], X)
    assert guide.training and model.training
    for name, value in guide.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_dropout_is_off_in_forward_and_on_in_the_loss():
    ratio = Ratio(critic(nn.Dropout(0.5)), None)
    z = torch.randn(20, 2)
    assert torch.equal(ratio(z), ratio(z))
    assert ratio.training and ratio.net[2].training
    assert not torch.equal(ratio.loss(z, -z), ratio.loss(z, -z))


def test_a_deep_copy_shares_nothing():
    svi = factor()
    svi.step(X)
    other = copy.deepcopy(svi)
    before = tensors(svi)
    other.step(X)
    assert not moved(before, tensors(svi))
    name = next(iter(own_parameters(ratio_of(svi))))
    assert not torch.equal(
        dict(ratio_of(svi).named_parameters())[name], dict(ratio_of(other).named_parameters())[name]
    )


# -- whoever cannot train one raises -------------------------------------------------------------


def test_a_stock_engine_raises():
    model, guide = pair()
    loss = elbo.FactorELBO(ratio=critic())
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
    with pytest.raises(RuntimeError, match=r"Ratio has a loss of its own.*use ppvae.SVI"):
        svi.step(X)


class Tilted(ppvae.Program):
    """A model whose prior is a normal times exp T(z), with T the ratio of q(z) and the normal."""

    def __init__(self, net):
        super().__init__()
        self.net = nets.mlp(2, 8, 4)
        self.ratio = Ratio(net, self.contrast)

    @staticmethod
    def contrast(draws):
        z = draws.guide("z")
        return z, torch.randn_like(z)

    def forward(self, x):
        with ppvae.program.data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.factor("tilt", self.ratio(z))
            pyro.sample("x", dist.Bernoulli(logits=self.net(z)).to_event(1), obs=x)


def test_a_stock_engine_raises_for_one_in_a_model():
    svi = pyro.infer.SVI(
        Tilted(critic()), pair()[1], pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO()
    )
    with pytest.raises(RuntimeError, match=r"use ppvae.SVI"):
        svi.step(X)


@pytest.mark.parametrize("net", [nn.Linear(2, 2), nn.Flatten(0)], ids=["two", "flat"])
def test_a_net_without_one_number_per_row_raises_at_prepare(net):
    net = nn.Sequential(nn.Linear(2, 2), net)
    with pytest.raises(ValueError, match=r"one number per row, \(..., 1\)"):
        factor(net=net).prepare(X)


def test_an_optimiser_that_is_made_needs_one_for_the_critic():
    model, guide = pair()
    made = torch.optim.Adam([*model.parameters(), *guide.parameters()])
    loss = elbo.FactorELBO(ratio=critic())
    with pytest.raises(ValueError, match=r"needs an optimiser of its own"):
        ppvae.SVI(model, guide, made, loss).prepare(X)
    ppvae.SVI(model, guide, made, loss, beside=Beside(ADAM)).step(X)


@pytest.mark.parametrize(
    "options", [{"steps": 0}, {"steps": 1.5}, {"burn_in": -1}, {"steps": True}], ids=str
)
def test_numbers_out_of_range(options):
    with pytest.raises(ValueError, match=f"Beside: {next(iter(options))} must be a whole number"):
        Beside(**options)


def test_a_loss_that_is_not_finite_names_the_module():
    svi = factor()
    svi.step(X)
    (turn,) = svi.turns.turns.values()
    turn.objective.trains.contrast = lambda draws: (draws.guide("z") * math.nan, draws.guide("z"))
    before = {k: v.clone() for k, v in ratio_of(svi).state_dict().items()}
    with pytest.raises(NonFiniteError, match=r"step 2: Ratio 'state.ratio' beside the pair.*nan"):
        svi.step(X)
    assert not moved(before, ratio_of(svi).state_dict())


def test_contrast_of_different_shapes():
    ratio = Ratio(critic(), lambda draws: (torch.zeros(3, 2), torch.zeros(4, 2)))
    with pytest.raises(ValueError, match=r"of one shape.*\(3, 2\).*\(4, 2\)"):
        ratio.draw(None)


# -- runs that end and go on, graphs -------------------------------------------------------------


def run(svi, epochs=3, **options):
    torch.manual_seed(3)
    return ppvae.fit(svi, X, epochs=epochs, batch_size=16, progress=False, **options)


class Crash(Exception):
    pass


class CrashAt(ppvae.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, svi, loss):
        if svi.num_steps == self.step:
            raise Crash


def resumable(**options):
    gamma = elbo.LinearWarmup(8, end=5.0)
    return factor(gamma, critic(nn.Dropout(0.2)), beside=Beside(SGD_M, 3, 2), **options)


SGD_M = functools.partial(torch.optim.SGD, lr=1e-2, momentum=0.9)


def numbers(history):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


@pytest.mark.parametrize("step", [2, 6])
def test_a_killed_run_ends_as_if_it_had_not_been(tmp_path, step):
    whole = resumable()
    expected = numbers(run(whole))
    assert {"ratio_loss", "ratio_accuracy"} <= expected[0].keys()
    files = ppvae.Checkpoints(tmp_path, every_steps=1)
    with pytest.raises(Crash):
        run(resumable(), checkpoint=files, callbacks=[CrashAt(step)])
    resumed = resumable()
    history = run(resumed, checkpoint=files, resume=True)
    assert numbers(history) == expected
    assert not moved(tensors(whole), tensors(resumed))
    with pytest.raises(ppvae.CheckpointError, match="beside"):
        run(
            factor(elbo.LinearWarmup(8, end=5.0), critic(nn.Dropout(0.2))),
            **{"checkpoint": files, "resume": True},
        )


@inductor
def test_compiled_is_eager():
    svis = [
        factor(elbo.LinearWarmup(8, end=5.0), beside=Beside(SGD, 2), compile=c, optim=SGD)
        for c in (False, True)
    ]
    losses = []
    for svi in svis:
        svi.prepare(X)
        torch.manual_seed(3)
        losses.append([svi.step(X) for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    eager, compiled = map(tensors, svis)
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, rtol=1e-4, atol=1e-5)
    (turn,) = svis[1].turns.turns.values()
    assert turn.compiled.latest is not None
    assert ratio_of(svis[1]).seen[0] == pytest.approx(float(ratio_of(svis[0]).seen[0]), rel=1e-4)


# -- what a ratio learns -------------------------------------------------------------------------

M, S = 0.7, 0.6


class Features(nn.Module):
    """A linear function of (1, z, z^2)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)
        nn.init.zeros_(self.linear.weight), nn.init.zeros_(self.linear.bias)

    def forward(self, z):
        return self.linear(torch.cat([z, z.square()], -1))


def exact():
    """The closed form: T* = -log s - (z - m)^2 / (2 s^2) + z^2 / 2."""
    net = Features()
    with torch.no_grad():
        net.linear.weight.copy_(torch.tensor([[M / S**2, 0.5 - 0.5 / S**2]]))
        net.linear.bias.fill_(-math.log(S) - M**2 / (2 * S**2))
    return net


def gaussians(draws, size=20000):
    return M + S * torch.randn(size, 1), torch.randn(size, 1)


def test_the_closed_form_of_two_normals():
    z = torch.linspace(-3, 3, 7).unsqueeze(-1)
    expected = dist.Normal(M, S).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)
    torch.testing.assert_close(exact()(z), expected)


def test_at_the_closed_form_the_loss_is_quadrature_and_the_gradient_zero():
    torch.manual_seed(4)
    size, net = 200000, exact()
    a, b = gaussians(None, size)
    grid = torch.linspace(-9, 9, 20001, dtype=torch.float64)
    p, q = (dist.Normal(m, s).log_prob(grid).exp() for m, s in ((M, S), (0.0, 1.0)))
    t = (p / q).log()
    expected = torch.trapezoid(p * F.softplus(-t) + q * F.softplus(t), grid)
    terms = (F.softplus(-net(a)) + F.softplus(net(b))).detach()
    assert abs(terms.mean() - expected) < 4 * terms.std() / size**0.5
    assert float(Ratio(net, gaussians).loss(a, b).detach()) / size == pytest.approx(
        float(terms.mean())
    )
    for power in range(3):  # of each weight: the mean over draws of the loss's slope
        slopes = (-torch.sigmoid(-net(a)) * a**power + torch.sigmoid(net(b)) * b**power).detach()
        assert abs(slopes.mean()) < 4 * slopes.std() / size**0.5
    normaliser = net(b).exp().detach()
    assert abs(normaliser.mean() - 1) < 4 * normaliser.std() / size**0.5


def test_from_zero_it_converges_to_the_closed_form():
    torch.manual_seed(4)
    ratio, target = Ratio(Features(), gaussians), exact()
    optimiser = torch.optim.Adam(ratio.parameters(), lr=0.05)
    a, b = gaussians(None)
    first = float(ratio.loss(a, b).detach()) / len(a)
    assert first == pytest.approx(2 * math.log(2), rel=1e-5)
    for step in range(400):
        optimiser.param_groups[0]["lr"] = 0.05 * 0.99**step
        optimiser.zero_grad()
        (ratio.loss(*ratio.draw(None)) / len(a)).backward()
        optimiser.step()
    for name, value in ratio.net.named_parameters():  # the noise of some 100 averaged steps
        torch.testing.assert_close(value, dict(target.named_parameters())[name], atol=0.05, rtol=0)
