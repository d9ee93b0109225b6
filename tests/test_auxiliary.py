"""Networks beside a pair: what they learn, when, and whose gradient reaches whom.

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
from ppvae.processes import Processes
from ppvae.train.draws import Draws
from ppvae.train.sources import source

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
    turns = ["draw"] * 2 + ["loss"] * 2 + ["update"]  # the pair does not change meanwhile
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


@pytest.mark.parametrize("extra", [[], [nn.BatchNorm1d(8)]], ids=["plain", "batch norm"])
def test_the_loss_is_that_of_each_side_by_itself(extra):
    net, (a, b) = critic(*extra), (torch.randn(20, 2), 1 + torch.randn(20, 2))
    alone = copy.deepcopy(net)
    expected = F.softplus(-alone(a)).sum() + F.softplus(alone(b)).sum()
    torch.testing.assert_close(Ratio(net, None).loss(a, b), expected)


class Nested(ppvae.Program):
    """Sites at two depths of plates; counts its runs."""

    def __init__(self):
        super().__init__()
        self.shift, self.runs = nn.Parameter(torch.zeros(())), 0

    def forward(self, x):
        self.runs += 1
        with pyro.plate("data", len(x), dim=-1):
            z = pyro.sample("z", dist.Normal(self.shift + torch.zeros(2), 1.0).to_event(1))
            with pyro.plate("words", 3, dim=-2):
                pyro.sample("w", dist.Normal(z.sum(-1), 0.01))


def test_draws_for_several_steps_are_of_one_run_and_independent():
    program, x = Nested(), torch.zeros(500, 1)
    with torch.no_grad():
        Draws(program, program, (x,), {}).guide("z")  # finds the plates
        program.runs = 0
        found = [
            (each.guide("z"), each.guide("w"), each.guide("z"))
            for each in Draws(program, program, (x,), {}, count=4).each()
        ]
    assert program.runs == 3  # one for each time a draw asks
    shapes = {tuple(tuple(value.shape) for value in draw) for draw in found}
    assert shapes == {((500, 2), (3, 500), (500, 2))}
    columns = torch.stack([z[:, 0] for draw in found for z in (draw[0], draw[2])])
    between = columns.corrcoef() - torch.eye(8)
    assert between.abs().max() < 5 / 500**0.5  # standard errors of no correlation


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


# -- FactorVAE -----------------------------------------------------------------------------------

RHO = 0.8
TC = -0.5 * math.log(1 - RHO**2)  # of two normals of variance 1 and correlation rho


class Correlation(nn.Module):
    """T* = TC - z' (S^-1 - I) z / 2 of z ~ N(0, S), S the correlation matrix."""

    def forward(self, z):
        x, y = z[..., :1], z[..., 1:]
        form = (RHO**2 * (x.square() + y.square()) - 2 * RHO * x * y) / (1 - RHO**2)
        return TC - form / 2


class Aggregate(ppvae.Program):
    """A guide whose aggregate posterior over many x ~ N(0, S - I / 10) is N(0, S)."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        with ppvae.program.data_plate(x):
            return pyro.sample("z", dist.Normal(x + self.shift, 0.1**0.5).to_event(1))


def aggregate(size):
    covariance = torch.tensor([[1.0, RHO], [RHO, 1.0]]) - 0.1 * torch.eye(2)
    x = dist.MultivariateNormal(torch.zeros(2), covariance).sample((size,))
    likelihood = conditionals.Normal(nn.Identity(), scale=1.0)
    return models.VAE(likelihood, latent_dim=2), Aggregate(), x


def test_total_correlation_of_a_normal_aggregate():
    assert pytest.approx(0.5108, abs=1e-4) == TC
    torch.manual_seed(2)
    model, guide, x = aggregate(200000)
    z = ppvae.log_weights(model, guide, x).guide_trace.nodes["z"]["value"]
    t = Correlation()(z).squeeze(-1)
    marginals = dist.Normal(0.0, 1.0).log_prob(z).sum(-1)
    joint = dist.MultivariateNormal(torch.zeros(2), torch.tensor([[1, RHO], [RHO, 1]]))
    torch.testing.assert_close(t, joint.log_prob(z) - marginals, rtol=1e-4, atol=1e-4)
    assert abs(t.mean() - TC) < 4 * t.std() / len(t) ** 0.5


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("options", [{}, {"kl": "mixed"}, {"beta": 2.0}], ids=str)
def test_the_loss_is_the_elbo_less_gamma_times_the_mean_of_t(particles, options):
    model, guide, x = aggregate(7)
    losses = []
    for loss in (
        elbo.FactorELBO(particles, gamma=3.0, ratio=Correlation(), **options),
        elbo.ELBO(particles, **options),
    ):
        torch.manual_seed(6)
        losses.append(float(loss(model, guide)(x).detach()))
    torch.manual_seed(6)
    drawn = ppvae.log_weights(model, guide, x, num_particles=particles)
    t = Correlation()(drawn.guide_trace.nodes["z"]["value"]).reshape(particles, 7)
    assert losses[0] == pytest.approx(losses[1] + 3.0 * float(t.detach().mean(0).sum()), rel=1e-5)


def test_what_is_reported_is_the_elbo():
    model, guide, x = aggregate(7)
    bounds = []
    for loss in (elbo.FactorELBO(2, gamma=3.0, ratio=Correlation(), beta=4.0), elbo.ELBO(2)):
        torch.manual_seed(6)
        bounds.append(loss.evaluate(model, guide, x))
    assert torch.equal(*bounds)


@pytest.mark.parametrize("gradient", elbo.FactorELBO.gradients)
def test_the_gradient_is_that_of_the_expectation(gradient):
    """q(z) = N(s, S) for a guide shifted by s: E T has a slope that is known in closed form."""
    torch.manual_seed(7)
    model, guide, x = aggregate(500)
    shift = torch.tensor([0.5, -0.2])
    guide.shift.data.copy_(shift)
    loss = elbo.FactorELBO(gamma=2.0, ratio=Correlation(), gradient=gradient)
    objective, found = loss(model, guide), []
    for _ in range(400):
        (slope,) = torch.autograd.grad(objective(x), [guide.shift])
        found.append(slope)
    found = torch.stack(found)
    mean = x + shift
    # -E log p(x | z) - E log p(z): (z - x) + z; gamma times the slope of T at the mean of z
    form = (torch.tensor([[RHO**2, -RHO], [-RHO, RHO**2]]) / (1 - RHO**2)) @ mean.T
    expected = ((mean - x) + mean - 2.0 * form.T).sum(0)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - expected).abs() < 4.5 * error).all()


def test_the_denominator_has_the_marginals_and_no_two_coordinates_of_a_row():
    torch.manual_seed(8)
    rows = torch.arange(6.0).unsqueeze(1).expand(6, 4)
    for _ in range(50):
        mixed = elbo.factor.shifted(rows)
        assert all(sorted(column.tolist()) == list(range(6)) for column in mixed.T)
        assert all(len(set(row.tolist())) == 4 for row in mixed)


def test_single_coordinates_teach_a_critic_no_noise():
    """A critic at 0 that adds up its coordinates: the loss has the slope 0 at any draws."""
    net = nn.Linear(2, 1)
    nn.init.zeros_(net.weight), nn.init.zeros_(net.bias)
    svi = factor(net=net)
    svi.prepare(X)
    (turn,) = svi.turns.turns.values()
    (drawn,) = turn.draw(1, (X,), {})
    turn.loss(drawn)
    assert turn.auxiliary.net.weight.grad.abs().max() < 1e-5  # of sums of about 50


def test_a_critic_finds_the_total_correlation():
    torch.manual_seed(9)
    model, guide, x = aggregate(2000)

    class Quadratic(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 1)

        def forward(self, z):
            x, y = z[..., :1], z[..., 1:]
            return self.linear(torch.cat([x.square(), y.square(), x * y], -1))

    loss = elbo.FactorELBO(gamma=0.0, ratio=Quadratic())
    rest = functools.partial(torch.optim.SGD, lr=0.0)
    svi = ppvae.SVI(model, guide, rest, loss, beside=Beside(ADAM, 300, 300))
    svi.step(x)
    z = ppvae.log_weights(model, guide, aggregate(50000)[2]).guide_trace.nodes["z"]["value"]
    assert float(ratio_of(svi)(z.detach()).mean()) == pytest.approx(
        TC, abs=0.08
    )  # of 2000 rows' noise


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"ratio": None}, TypeError, "needs ratio="),
        ({"gamma": -1.0}, ValueError, "gamma weighs the total correlation"),
        ({"gamma": "much"}, TypeError, "gamma must be a number"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        elbo.FactorELBO(**{"ratio": Correlation(), **options})


class Scalar(ppvae.Program):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        with ppvae.program.data_plate(x):
            return pyro.sample("z", dist.Normal(self.shift, 1.0))


def test_a_latent_that_is_no_vector():
    def model(x):
        with ppvae.program.data_plate(x):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)

    loss = elbo.FactorELBO(ratio=Correlation())
    with pytest.raises(ValueError, match="one per row: latent 'z' is drawn as"):
        ppvae.SVI(model, Scalar(), ADAM, loss).step(torch.zeros(5))
    with pytest.raises(ValueError, match="event shape"):
        loss(model, Scalar())(torch.zeros(5))


def test_a_latent_of_another_name():
    loss = elbo.FactorELBO(ratio=critic(), latent="code")
    with pytest.raises(ValueError, match="asks for site 'code' of the guide"):
        ppvae.SVI(*pair(), ADAM, loss).step(X)
    with pytest.raises(ValueError, match="the guide has no such latent"):
        loss(*pair())(X)


def test_fewer_rows_than_coordinates():
    svi = factor()
    with pytest.raises(ValueError, match=r"has 2 coordinates.*this batch has 1"):
        svi.step(X[:1])
    with pytest.raises(ValueError, match="this batch has 1"):  # before any step
        ppvae.fit(svi, X[:33], epochs=1, batch_size=16, progress=False)
    assert svi.num_steps == 0
    loader = torch.utils.data.DataLoader(X[:33], batch_size=16, drop_last=True)
    ppvae.fit(svi, loader, epochs=1, progress=False)


# -- one inside a pair ---------------------------------------------------------------------------


def tilted(**options):
    torch.manual_seed(0)
    return ppvae.SVI(Tilted(critic()), pair()[1], ADAM, elbo.ELBO(), **options)


def test_a_ratio_in_a_model_is_no_parameter_of_the_pair():
    svi = tilted(beside=Beside(steps=2))
    report = ppvae.check_pair(svi.model, svi.guide, X)
    assert "ratio" not in str(report)
    before = tensors(svi)
    svi.step(X)
    assert moved(before, tensors(svi)) == {n for n in before if not n.endswith("seen")}


@inductor
def test_a_compiled_pair_sees_the_ratio_move():
    runs = []
    for compile in (False, True):
        svi = tilted(compile=compile)
        svi.prepare(X)
        torch.manual_seed(3)
        runs.append([svi.step(X) for _ in range(5)])
        assert svi._compiled is None or svi._compiled.latest is not None
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)


class Mean(Auxiliary):
    """The mean of a latent's draws over all steps: buffers, and no loss."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.zeros(2))
        self.register_buffer("seen", torch.zeros(2))

    def draw(self, draws):
        z = draws.guide("z")
        self.seen.copy_(torch.stack([z.sum(), torch.tensor(float(z.numel()))]))
        return ()

    def update(self, total):
        total([self.seen])
        self.sums += self.seen

    def report(self):
        return {"mean_code": self.sums[0] / self.sums[1]}


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=[inductor, pytest.mark.slow])])
def test_one_with_buffers_alone_beside_another(compile):
    svi = factor(compile=compile)
    svi.guide.mean = Mean()
    (row,) = run(svi, epochs=1).rows
    assert svi.guide.mean.sums[1] == 50 * 2
    assert {"guide.mean.mean_code", "state.ratio.ratio_loss"} <= row.keys()
    if compile:
        assert svi._compiled.latest is not None and svi._compiled.reason is None


def test_a_frozen_critic_stays_as_it_is():
    net = critic()
    net.requires_grad_(False)
    svi = factor(net=net)
    before = tensors(svi)
    svi.step(X)
    assert not any(n.startswith("state.ratio.net") for n in moved(before, tensors(svi)))
    svi = factor()
    svi.step(X)
    ratio_of(svi).requires_grad_(False)
    before = tensors(svi)
    svi.step(X)
    assert not any(n.startswith("state.ratio.net") for n in moved(before, tensors(svi)))


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("rows", [5, 7, 12, 13, 16, 20, 33])
def test_the_fewest_rows_are_those_of_the_smallest_batch_of_any_process(rows, size):
    seen = []
    for rank in range(size):
        processes = Processes()
        processes.size, processes.rank = size, rank
        data = source("data", X[:rows], 8, None, processes, False)
        seen += [len(batch[0]) for batch, _ in data.epoch(0, 1)]
        assert data.fewest_rows() <= min(seen)
    assert data.fewest_rows() == min(seen)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("rows", [5, 8, 13, 16])
def test_the_fewest_rows_of_a_loader(rows, drop_last):
    loader = torch.utils.data.DataLoader(X[:rows], batch_size=8, drop_last=drop_last)
    data = source("data", loader, 8, None, Processes(), False)
    seen = [len(batch) for batch in loader]
    assert data.fewest_rows() == min(seen, default=data.fewest_rows())


def test_the_history_is_of_the_steps_of_its_epoch():
    svi = factor()
    svi.prepare(X)
    svi.turns.reported = {"ratio_loss": (torch.tensor(1e6), 1)}  # of steps by hand
    first, second = run(svi, epochs=2).rows
    assert first["ratio_loss"] < 2 and second["ratio_loss"] < 2


def test_a_guide_that_mixes_particles_is_refused_where_its_draws_would_be_particles():
    class Mixes(ppvae.Program):
        def __init__(self):
            super().__init__()
            self.loc = torch.nn.Parameter(torch.zeros(2))

        def forward(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z1", dist.Normal(self.loc, 1.0).to_event(1))
                pyro.sample("z", dist.Normal(z.reshape(-1, len(x), 2).sum(0), 1.0).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z1", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def svi(steps):
        loss = elbo.FactorELBO(ratio=nets.mlp(2, 8, 1))
        return ppvae.SVI(model, Mixes(), torch.optim.Adam, loss, beside=ppvae.Beside(steps=steps))

    x = torch.randn(6, 2)
    svi(1).step(x)
    with pytest.raises(ppvae.PairError, match="particle"):
        svi(3).step(x)


def test_a_ratio_with_batch_norm_sees_rows_whatever_the_particles():
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    guide, x = guides.Normal(nets.mlp(4, 8, 4)), torch.ones(8, 4)
    for particles in (1, 3):
        loss = elbo.FactorELBO(num_particles=particles, ratio=net)
        ppvae.SVI(model, guide, torch.optim.Adam, loss).step(x)


@pytest.mark.parametrize("gamma", [torch.tensor(-1.0), -1.0, torch.ones(2)])
def test_a_negative_gamma_is_refused_whatever_holds_it(gamma):
    with pytest.raises(ValueError, match="gamma"):
        elbo.FactorELBO(ratio=nets.mlp(2, 8, 1), gamma=gamma)
    with pytest.raises(ValueError, match="beta"):
        elbo.ELBO(beta=gamma)
