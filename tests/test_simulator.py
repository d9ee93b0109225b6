"""Likelihoods that can only be drawn from, against a simulator whose posterior is known."""

import copy
import functools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from compiling import inductor
from oracles import assert_mean, gradients
from ppvae import Beside, conditionals, diagnostics, elbo, guides, models, nets, posteriors
from ppvae.auxiliary import auxiliaries
from ppvae.train.draws import Draws
from ppvae.weights import dream_log_q
from test_estimated import NONLINEAR
from test_implicit import SIGMA, WEIGHT, Blind, exact, fitted_kl

ADAM = functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.999))
SLEEP = elbo.ReweightedWakeSleep(num_particles=1, insomnia=0.0)


def simulate(z):
    """x ~ N(W z, sigma^2): with this the posterior is known."""
    return z @ WEIGHT.to(z).T + SIGMA * torch.randn(len(z), 4, dtype=z.dtype)


class BestRatio(nn.Module):
    """T*: log N(x; W z, sigma^2) - log p(x)."""

    def forward(self, x, z):
        likelihood = dist.Normal(z @ WEIGHT.to(z).T, SIGMA).log_prob(x).sum(-1)
        return (likelihood - exact(x)[0]).unsqueeze(-1)


def model_of(net, simulator=simulate):
    return models.VAE(conditionals.Simulator(simulator, net, shape=4), latent_dim=2)


class Linear(ppvae.Program):
    """q(z | x) = N(A x + a, L L'); at first the posterior, moved a little."""

    def __init__(self, moved=0.0):
        super().__init__()
        _, posterior = exact(torch.eye(4, dtype=torch.get_default_dtype()))
        self.A = nn.Parameter(posterior.loc.T.contiguous())
        self.a = nn.Parameter(torch.full((2,), moved))
        self.tril = nn.Parameter(posterior.scale_tril[0].clone() * (1 + moved))

    def posterior(self, x):
        return dist.MultivariateNormal(x @ self.A.T + self.a, scale_tril=self.tril)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x))


def data(rows, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_of(Blind())(size=rows).to(torch.get_default_dtype())


def small(implicit=False):
    torch.manual_seed(0)
    model = model_of(nets.mlp(6, 8, 1, activation=nn.Tanh))
    if not implicit:
        return model, guides.Normal(nets.mlp(4, 8, 4))
    q = posteriors.Implicit(nets.mlp(4 + 3, 8, 2), nets.mlp(4 + 2, 8, 1), 2, noise_dim=3)
    return model, guides.Amortized(q)


GUIDES = pytest.mark.parametrize("implicit", [False, True], ids=["normal", "implicit"])


# -- with the best ratio there is, all is exact ---------------------------------------------------


def test_at_the_posterior_every_weight_is_one(float64):
    x = data(5)
    weights = ppvae.log_weights(model_of(BestRatio()), Linear(), x, num_particles=6)
    torch.testing.assert_close(weights.log_w, torch.zeros(6, 5), atol=1e-9, rtol=0)


def test_the_elbo_estimates_minus_the_divergence_from_the_posterior_and_its_gradient(float64):
    x, guide, model = data(3), Linear(moved=0.3), model_of(BestRatio())
    kl = torch.distributions.kl_divergence(guide.posterior(x), exact(x)[1])
    values = ppvae.log_weights(model, guide, x, num_particles=4_000).log_w.detach()
    assert_mean(values, -kl.detach())
    parameters = [guide.A, guide.a]
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(kl.sum(), parameters)])
    found = gradients(lambda: elbo.ELBO(20)(model, guide)(x), parameters, draws=100)
    assert_mean(found, wanted)


# -- draws, and what the ratio learns from --------------------------------------------------------


def test_draws_are_the_simulators_with_particles_and_more():
    torch.manual_seed(0)
    p = conditionals.Simulator(lambda z: torch.cat([z, z], 1), Blind(), shape=4)
    z = torch.randn(3, 5, 2)
    assert p(z).batch_shape == (3, 5) and p(z).event_shape == (4,)
    assert torch.equal(p(z).sample(), torch.cat([z, z], -1))
    assert torch.equal(p(z[0]).expand((3, 5)).sample((2,))[1, 2], torch.cat([z[0], z[0]], -1))
    assert not p(z).has_rsample
    image = conditionals.Simulator(lambda z: z.reshape(-1, 1, 1, 2), Blind(), shape=(1, 1, 2))
    assert image(z).sample().shape == (3, 5, 1, 1, 2)


def test_the_contrast_is_draws_of_the_model_and_those_with_another_rows_z():
    p = conditionals.Simulator(lambda z: torch.cat([z, -z], 1), Blind(), shape=4)
    model = models.VAE(p, latent_dim=2)
    with torch.no_grad():
        (x, z), (same, other) = p._draws_of_both(Draws(model, Linear(), (data(500),), {}))
    assert torch.equal(x, torch.cat([z, -z], 1)) and torch.equal(same, x)
    assert not (other == z).all(1).any() and torch.equal(other.sort(0).values, z.sort(0).values)
    assert_mean(z, 0.0)


# -- guides trained beside it ---------------------------------------------------------------------


def test_the_sleep_objective_is_log_q_of_dreams_and_trains_the_guide_alone(float64):
    x, guide, model = data(7), Linear(moved=0.3), model_of(BestRatio())
    torch.manual_seed(3)
    loss = SLEEP(model, guide)(x)
    found = torch.autograd.grad(loss, list(guide.parameters()))
    torch.manual_seed(3)
    ppvae.log_weights(model, guide, x)  # the same random numbers before the dream
    asleep = dream_log_q(model, guide, x).sum()
    assert loss.item() == -asleep.item()
    for one, other in zip(found, torch.autograd.grad(-asleep, guide.parameters()), strict=True):
        torch.testing.assert_close(one, other)
    # in expectation: minus the entropy of the posterior, less KL(p(z | x) || q)
    best = Linear()
    entropy = best.posterior(x).entropy()[0]
    with torch.no_grad():
        draws = torch.stack([-SLEEP(model, best)(x) / 7 for _ in range(100)])
    assert_mean(draws, -entropy.detach())


def test_sleep_alone_takes_a_simulator_and_no_implicit_guide():
    x = data(6)
    for share in (0.5, 1.0):
        with pytest.raises(ValueError, match=r"not linear.*'x'.*elbo\.ELBO"):
            elbo.ReweightedWakeSleep(2, insomnia=share)(*small())(x)
    with pytest.raises(ValueError, match=r"not linear.*'z'.*elbo\.ELBO"):
        SLEEP(*small(implicit=True))(x)


def test_sleep_with_a_density_trains_the_model_as_before(float64):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Normal(nn.Linear(2, 4), scale=SIGMA), latent_dim=2)
    loss = elbo.ReweightedWakeSleep(2, insomnia=0.0)(model, Linear())(data(6))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", NONLINEAR)
def test_other_bounds_are_refused(name):
    with pytest.raises(ValueError, match=r"not linear.*'x'.*elbo\.ELBO"):
        NONLINEAR[name](*small())(data(6))


def wide(implicit=False):
    torch.manual_seed(0)
    elu = functools.partial(nets.mlp, activation=nn.ELU)
    model = model_of(elu(6, 64, 64, 1))
    if implicit:
        q = posteriors.Implicit(elu(4 + 4, 64, 64, 2), elu(4 + 2, 64, 64, 1), 2, noise_dim=4)
        return model, guides.Amortized(q)
    return model, guides.Amortized(posteriors.FullNormal(elu(4, 64, 64, 5), dim=2))


@pytest.mark.slow
@GUIDES
def test_by_the_ratio_a_guide_comes_near_the_posterior(implicit):
    """So does a guide without a density: implicit p and q together."""
    model, guide = wide(implicit)
    svi = ppvae.SVI(model, guide, ADAM, beside=Beside(ADAM, steps=2))
    history = ppvae.fit(svi, data(4_096), epochs=30, batch_size=256, seed=0, progress=False)
    kl, correlation = fitted_kl(guide, data(200, seed=2))
    assert kl < 0.1 < 0.33 and -0.85 < correlation < -0.5
    name = "model.likelihood.ratio.ratio_loss" if implicit else "ratio_loss"
    assert history.rows[-1][name] < 1.0  # x and z depend on each other: it is 1.39 if T is 0


@pytest.mark.slow
def test_by_sleep_a_guide_is_calibrated():
    model, guide = wide()
    model.likelihood.ratio.requires_grad_(False)  # it has nothing to do
    svi = ppvae.SVI(model, guide, ADAM, SLEEP)
    ppvae.fit(svi, data(4_096), epochs=100, batch_size=256, seed=0, progress=False)
    assert fitted_kl(guide, data(200, seed=2))[0] < 0.02
    ranks = diagnostics.sbc(model, guide, data(2), num_simulations=1_000, seed=0)
    assert ranks.p_value > 1e-4
    assert "estimate" in ranks.absent["densities"]
    untrained = diagnostics.sbc(model, wide()[1], data(2), num_simulations=1_000, seed=0)
    assert untrained.p_value < 1e-4


@GUIDES
def test_sbc_needs_draws_alone(implicit):
    ranks = diagnostics.sbc(*small(implicit), data(2), num_simulations=100, num_draws=19, seed=0)
    assert ranks.ranks.keys() == {"z", "distance to a point"}
    exactly = diagnostics.sbc(model_of(Blind()), Linear(), data(2), seed=0)
    assert exactly.p_value > 1e-4


# -- laws -----------------------------------------------------------------------------------------


@GUIDES
def test_the_pair_is_approved_of(implicit):
    report = ppvae.check_pair(*small(implicit), data(6))
    assert any("4 trainable parameters" in line for line in report.holds)


def start(implicit=False, loss=None, **options):
    return ppvae.SVI(*small(implicit), ADAM, loss or elbo.ELBO(), beside=Beside(ADAM), **options)


@GUIDES
def test_each_ratio_learns_from_its_own_loss_alone(implicit):
    svi, x = start(implicit), data(8)
    ratios = auxiliaries(svi.objective).values()
    assert len(ratios) == 1 + implicit
    svi.objective(x).backward()
    assert all(p.grad is None for ratio in ratios for p in ratio.parameters())
    before = [p.detach().clone() for p in svi.objective.parameters()]
    svi.step(x)
    after = list(svi.objective.parameters())
    assert not any(map(torch.equal, before, after))


@GUIDES
def test_saved_and_loaded_it_goes_on_to_the_bit(implicit):
    x, one = data(8), start(implicit)
    one.step(x)
    saved = copy.deepcopy(one.state_dict())
    torch.manual_seed(5)
    first = [one.step(x) for _ in range(3)]
    other = start(implicit)
    other.prepare(x)
    other.load_state_dict(saved)
    torch.manual_seed(5)
    assert [other.step(x) for _ in range(3)] == first


def test_a_copy_learns_from_its_own_simulator():
    model, _ = small()
    other = copy.deepcopy(model)
    assert other.likelihood.ratio.contrast.__self__ is other.likelihood


@inductor
@pytest.mark.slow
@pytest.mark.parametrize("loss", [elbo.ELBO(), SLEEP], ids=["ratio", "sleep"])
def test_a_simulator_of_tensors_is_compiled(loss):
    x, found = data(8), []
    for compiled in (False, True):
        svi = start(loss=loss, compile=compiled)
        torch.manual_seed(3)
        found.append([svi.step(x) for _ in range(4)])
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4)


# -- what is refused ------------------------------------------------------------------------------


def one_row(z):
    return torch.stack([z[0], z[1], z[0], z[1]])


@pytest.mark.parametrize(
    ("simulator", "message"),
    [
        (lambda z: z, r"give x of shape \(6, 4\): of z \(6, 2\) it gave \(6, 2\)"),
        (one_row, r"take all rows of z at once.*torch\.stack\(\[simulate\(row\) for row in z\]\)"),
        (lambda z: simulate(z).tolist(), r"it gave a list"),
        (
            lambda z: simulate(z) / 0.0,
            r"NaN or infinite values in 6 of 6 rows, the first of z = \[",
        ),
        (
            lambda z: torch.cat([z.log(), z], 1),
            r"NaN or infinite values in \d of 6 rows, the first of z = \[-?\d\.\d+, -?\d\.\d+\]",
        ),
    ],
)
def test_what_a_simulator_gives_wrongly_is_named_before_training(simulator, message):
    model, guide = model_of(nets.mlp(6, 8, 1), simulator), small()[1]
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        ppvae.fit(ppvae.SVI(model, guide, ADAM), data(6), epochs=1, progress=False)


def test_bad_arguments():
    with pytest.raises(ValueError, match="shape must be at least 1, got 0"):
        conditionals.Simulator(simulate, Blind(), shape=0)
    with pytest.raises(ValueError, match=r"simulate\.requires_grad_\(False\)"):
        conditionals.Simulator(nn.Linear(2, 4), Blind(), shape=4)
    conditionals.Simulator(nn.Linear(2, 4).requires_grad_(False), Blind(), shape=4)


@pytest.mark.parametrize("net", [nets.mlp(6, 2), nets.mlp(6, 1, 4)])
def test_a_network_without_one_number_per_row_is_named(net):
    with pytest.raises(ValueError, match="one number per row"):
        ppvae.SVI(model_of(net), small()[1], ADAM).prepare(data(6))


class Shares(nn.Module):
    """Gives no number to each particle."""

    def forward(self, x, z):
        return 0.0 * x[:, :1]


def test_a_network_that_gives_particles_one_number_is_named():
    with pytest.raises(ValueError, match=r"each x and z, \(3, 6, 1\), and gave \(6, 1\)"):
        ppvae.log_weights(model_of(Shares()), small()[1], data(6), num_particles=3)


def test_one_row_has_no_other_rows_z():
    with pytest.raises(ValueError, match="batches of 2 rows or more, the last one included"):
        ppvae.fit(start(), data(5), epochs=1, batch_size=2, progress=False)


def test_a_prior_is_not_trained_without_log_p():
    likelihood = conditionals.Simulator(simulate, nets.mlp(6, 8, 1), shape=4)
    model = models.VAE(likelihood, prior=conditionals.Mixture(3, 2))
    svi = ppvae.SVI(model, small()[1], ADAM)
    with pytest.raises(ValueError, match=r"'prior\.loc'.*model\.prior\.requires_grad_\(False\)"):
        svi.prepare(data(6))
    model.prior.requires_grad_(False)
    assert math.isfinite(ppvae.SVI(model, small()[1], ADAM).step(data(6)))


def test_nothing_is_called_a_bound_or_log_p():
    pair, x = small(), data(6)
    for evaluate in (elbo.ELBO().evaluate, SLEEP.evaluate, diagnostics.log_evidence):
        with pytest.raises(
            ValueError, match=r"'x' has no log-density.*at most 0.*diagnostics\.sbc"
        ):
            evaluate(*pair, x)
    history = ppvae.fit(start(), x, valid=x, epochs=1, progress=False)
    assert "valid_estimate" in history.rows[0] and history.best_epoch is None


def test_what_simulate_writes_on_is_not_the_models_z_and_numpys_precision_is_cast():
    def rescales(z):
        a = z.numpy()
        a *= 10.0
        return a.astype("float64")[:, :1]

    simulator = conditionals.Simulator(rescales, nets.mlp(1 + 2, 8, 1), shape=1)
    z = torch.ones(4, 2)
    x = simulator(z).sample()
    assert torch.equal(z, torch.ones(4, 2)) and torch.equal(x, torch.full((4, 1), 10.0))
    assert x.dtype == z.dtype
