"""Posteriors that can only be drawn from, against linear samplers, whose density is known."""

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
from ppvae.local import Indexed
from ppvae.train.draws import Draws

SIGMA = 0.5
WEIGHT = torch.tensor([[0.8, 0.6], [0.5, 0.7], [0.3, 0.2], [0.1, -0.3]])
ADAM = functools.partial(torch.optim.Adam, lr=1e-3, betas=(0.5, 0.999))


def linear_model():
    """Its posterior has the correlation -0.70; nothing in it is trained."""
    decoder = nn.Linear(2, 4, bias=False)
    decoder.weight.data.copy_(WEIGHT)
    decoder.requires_grad_(False)
    return models.VAE(conditionals.Normal(decoder, scale=SIGMA), latent_dim=2)


def exact(x):
    """log p(x), and p(z | x), of each row."""
    weight = WEIGHT.to(x.dtype)
    evidence = dist.MultivariateNormal(
        x.new_zeros(4), weight @ weight.T + SIGMA**2 * torch.eye(4, dtype=x.dtype)
    )
    covariance = torch.linalg.inv(torch.eye(2, dtype=x.dtype) + weight.T @ weight / SIGMA**2)
    loc = x @ weight @ covariance / SIGMA**2
    return evidence.log_prob(x), dist.MultivariateNormal(loc, covariance.expand(len(x), 2, 2))


def data(rows, seed=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return linear_model()(size=rows).to(torch.get_default_dtype())


class Linear(nn.Module):
    """z = A x + a + B noise, which is N(A x + a, B B')."""

    def __init__(self, noise_dim=2, seed=0):
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        like = {"generator": random, "dtype": torch.get_default_dtype()}
        self.A = nn.Parameter(torch.randn(2, 4, **like))
        self.a = nn.Parameter(torch.randn(2, **like))
        self.B = nn.Parameter(torch.eye(2, noise_dim) + 0.5 * torch.randn(2, noise_dim, **like))

    def forward(self, x, noise):
        return x @ self.A.T + self.a + noise @ self.B.T

    def moments(self, x):
        loc = x @ self.A.T + self.a
        return loc, self.B.square().sum(1).sqrt().expand_as(loc)

    def density(self, x):
        return dist.MultivariateNormal(x @ self.A.T + self.a, self.B @ self.B.T)


class Blind(nn.Module):
    """A ratio that tells nothing apart."""

    def forward(self, x, z):
        return 0.0 * z.sum(-1, keepdim=True)


class BestRatio(nn.Module):
    """T*, in closed form: log q(z | x) - log r(z | x) as a function of x and standardised z."""

    def __init__(self, sampler, contrast):
        super().__init__()
        self.known, self.contrast = [sampler], contrast  # not a part of it

    def forward(self, x, standard):
        (sampler,) = self.known
        loc, scale = sampler.moments(x)
        if self.contrast == "prior":
            loc, scale = torch.zeros_like(loc), torch.ones_like(scale)
        q = sampler.density(x)
        fixed = dist.MultivariateNormal(q.loc.detach(), q.covariance_matrix.detach())
        z = loc.detach() + scale.detach() * standard
        r = dist.Normal(loc.detach(), scale.detach()).to_event(1)
        return (fixed.log_prob(z) - r.log_prob(z)).unsqueeze(-1)


def best_pair(contrast, noise_dim=2):
    sampler = Linear(noise_dim)
    q = posteriors.Implicit(sampler, BestRatio(sampler, contrast), 2, noise_dim, contrast)
    return linear_model().to(torch.get_default_dtype()), guides.Amortized(q)


def pair(contrast="adaptive", width=8, noise_dim=3, condition=None, batch_norm=False):
    torch.manual_seed(0)
    extra = 0 if condition is None else 3
    sampler = nets.mlp(4 + extra + noise_dim, width, 2, activation=nn.ELU, batch_norm=batch_norm)
    net = nets.mlp(4 + extra + 2, width, 1, activation=nn.ELU)
    q = posteriors.Implicit(sampler, net, dim=2, noise_dim=noise_dim, contrast=contrast)
    return linear_model(), guides.Amortized(q, condition=condition)


CONTRASTS = pytest.mark.parametrize("contrast", ["adaptive", "prior"])


# -- with the best ratio there is, all is exact ---------------------------------------------------


@CONTRASTS
def test_with_the_best_ratio_log_q_is_that_of_a_linear_sampler(contrast, float64):
    model, guide = best_pair(contrast, noise_dim=3)
    x = data(5)
    weights = ppvae.log_weights(model, guide, x, num_particles=7)
    z = weights.guide_trace.nodes["z"]["value"]
    wanted = guide.conditional.sampler.density(x).log_prob(z)
    torch.testing.assert_close(weights.log_q["z"], wanted, rtol=1e-9, atol=1e-9)
    torch.manual_seed(0)
    estimate = elbo.ELBO(7).estimate(model, guide, x)
    torch.manual_seed(0)
    assert torch.equal(estimate, ppvae.log_weights(model, guide, x, num_particles=7).log_w.mean(0))


@CONTRASTS
def test_with_the_best_ratio_the_gradient_is_that_of_the_exact_elbo(contrast, float64):
    model, guide = best_pair(contrast)
    x, sampler = data(3), guide.conditional.sampler
    parameters = list(sampler.parameters())
    q, weight = sampler.density(x), WEIGHT.double()  # the ELBO of q = N(m, S), in closed form
    S = q.covariance_matrix
    fit = dist.Normal(q.loc @ weight.T, SIGMA).log_prob(x).sum(-1)
    fit = fit - torch.einsum("di,nij,dj->n", weight, S, weight) / (2 * SIGMA**2)
    prior = dist.MultivariateNormal(torch.zeros(2), torch.eye(2)).expand([3])
    bound = fit - torch.distributions.kl_divergence(q, prior)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(bound.sum(), parameters)])

    found = gradients(lambda: -elbo.ELBO(20)(model, guide)(x), parameters, draws=100)
    assert_mean(found, wanted, contrast)


@CONTRASTS
def test_all_gradients_of_the_elbo_are_along_the_path(contrast, float64):
    model, guide = best_pair(contrast)
    x, found = data(3), []
    for gradient in ("pathwise", "stl", "score"):
        torch.manual_seed(4)
        loss = elbo.ELBO(2, gradient=gradient)(model, guide)(x)
        found.append(torch.autograd.grad(loss, list(guide.conditional.sampler.parameters())))
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other)


def test_a_ratio_that_has_learned_nothing_puts_the_estimate_above_log_p():
    """By KL(q || r) at the posterior itself: what its correlation is worth, 0.33 nats."""
    x = data(2)
    log_p, posterior = exact(x)
    sampler = Linear()
    with torch.no_grad():
        covariance = posterior.covariance_matrix[0]
        sampler.A.copy_((WEIGHT @ covariance / SIGMA**2).T)
        sampler.a.zero_()
        sampler.B.copy_(torch.linalg.cholesky(covariance))
    guide = guides.Amortized(posteriors.Implicit(sampler, Blind(), 2, 2))
    above = -0.5 * math.log(1 - (covariance[0, 1] ** 2 / covariance.diagonal().prod()).item())
    assert 0.3 < above < 0.4
    draws = ppvae.log_weights(linear_model(), guide, x, num_particles=4_000).log_w.detach()
    assert_mean(draws, log_p + above)
    with pytest.raises(ValueError, match=r"'z' has no log-density.*start=\"prior\""):
        elbo.ELBO().evaluate(linear_model(), guide, x)


# -- draws, moments, what the ratio learns from ---------------------------------------------------


def test_each_particle_has_noise_of_its_own():
    model, guide = pair()
    q = guide.posterior(data(4)).expand((3, 4))
    assert q.batch_shape == (3, 4) and q.event_shape == (2,)
    for z in (q.rsample(), q.sample(), q.rsample((2,))[0]):
        assert z.shape == (3, 4, 2) and len(z.flatten(0, 1).unique(dim=0)) == 12
    same = data(1).expand(4, 4)
    assert len(guide.posterior(same).rsample().unique(dim=0)) == 4
    weights = ppvae.log_weights(model, guide, data(4), num_particles=3)
    assert weights.log_q["z"].shape == (3, 4) and len(weights.log_q["z"].unique()) == 12


@pytest.mark.parametrize("noise_dim", [2, 3, 20])
def test_the_moments_are_of_the_sampler_row_by_row_and_constants(noise_dim):
    sampler = Linear(noise_dim)
    hidden = lambda x, noise: sampler(x, noise)  # noqa: E731 - without its moments
    q = posteriors.Implicit(hidden, Blind(), 2, noise_dim)
    assert len(q.points) == {2: 32, 3: 36, 20: 40}[noise_dim]
    x = data(5)
    loc, scale = q.moments(x)  # of a linear sampler, exact
    torch.testing.assert_close((loc, scale), sampler.moments(x))
    assert not loc.requires_grad and not scale.requires_grad
    guide = guides.Amortized(posteriors.Implicit(nets.mlp(7, 8, 2), nets.mlp(6, 8, 1), 2, 3))
    for whole, rows in zip(
        guide.conditional.moments(x), guide.conditional.moments(x[2:3]), strict=True
    ):
        torch.testing.assert_close(whole[2:3], rows)
    constant = posteriors.Implicit(Constant(), Blind(), 2, noise_dim=2)
    assert (constant.moments(x)[1] == 1e-3).all()
    loc, scale = posteriors.Implicit(Constant(), Blind(), 2, 2, "prior").moments(x)
    assert (loc == 0).all() and (scale == 1).all()


class Constant(nn.Module):
    def forward(self, x, noise):
        return x[:, :2].expand(*noise.shape[:-1], 2)


@CONTRASTS
def test_the_contrast_has_each_draw_beside_its_own_x_and_normal_noise(contrast):
    sampler = Linear()
    with torch.no_grad():
        sampler.B.copy_(torch.tensor([[1e-2, 0.0], [0.0, 2e-2]]))
    q = posteriors.Implicit(sampler, Blind(), 2, 2, contrast)
    guide, x = guides.Amortized(q), data(2_000)
    with torch.no_grad():
        (x_q, z), (x_r, noise) = q._draws_of_both(Draws(linear_model(), guide, (x,), {}))
    assert torch.equal(x_q, x) and torch.equal(x_r, x)
    loc, scale = q.moments(x)
    back = (loc + scale * z - x @ sampler.A.T - sampler.a) / torch.tensor([1e-2, 2e-2])
    for normal in (back, noise):
        assert_mean(torch.cat([normal, normal.square()], 1), torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_what_t_is_told_of_x_gets_no_gradient_from_it():
    condition = nn.Linear(2, 3)
    _, guide = pair(condition=condition)
    x, y = data(5), torch.randn(5, 2)
    q = guide.posterior(x, y)
    q.log_prob(torch.randn(5, 2, requires_grad=True)).sum().backward()
    assert condition.weight.grad is None
    q.rsample().sum().backward()
    assert condition.weight.grad is not None


# -- it trains, and is judged by annealing --------------------------------------------------------


def trained(contrast, steps, rows=4_096, **options):
    torch.manual_seed(0)
    noise_dim = 4
    sampler = nets.mlp(4 + noise_dim, 64, 64, 2, activation=nn.ELU)
    net = nets.mlp(4 + 2, 64, 64, 1, activation=nn.ELU)
    q = posteriors.Implicit(sampler, net, 2, noise_dim, contrast)
    svi = ppvae.SVI(
        linear_model(), guides.Amortized(q), ADAM, beside=Beside(ADAM, steps=2), **options
    )
    epochs = steps * 256 // rows
    history = ppvae.fit(svi, data(rows), epochs=epochs, batch_size=256, seed=0, progress=False)
    return svi, history


def fitted_kl(guide, x):
    """How far draws are from the posterior, by their moments: KL; and their correlation."""
    with torch.no_grad():
        z = guide.posterior(x).sample((2_000,))
    centred = z - z.mean(0)
    covariance = torch.einsum("kni,knj->nij", centred, centred) / (len(z) - 1)
    q = dist.MultivariateNormal(z.mean(0), covariance)
    correlation = covariance[:, 0, 1] / covariance.diagonal(dim1=1, dim2=2).prod(1).sqrt()
    kl = torch.distributions.kl_divergence(q, exact(x)[1])
    return kl.mean().item(), correlation.mean().item()


@pytest.mark.slow
def test_it_learns_a_correlated_posterior_where_a_mean_field_cannot():
    svi, history = trained("adaptive", steps=480)
    kl, correlation = fitted_kl(svi.guide, data(200, seed=2))
    assert kl < 0.05 < 0.33 and -0.78 < correlation < -0.62
    assert 1.1 < history.rows[-1]["ratio_loss"] < 1.3  # it can tell q from r


def test_annealing_from_the_prior_or_from_fitted_moments_gives_the_evidence():
    model, guide, x = linear_model(), pair()[1], data(4)
    log_p, _ = exact(x)
    index = torch.arange(4)
    near = guides.moment_match(model, guide, x)
    found = [
        diagnostics.ais(model, guide, x, start="prior", num_temperatures=30, seed=0),
        diagnostics.ais(Indexed(model), near, x, index, num_temperatures=30, seed=0),
    ]
    for annealed in found:
        error = (annealed.log_evidence - log_p).abs()
        assert (error < 5 * annealed.log_evidence_se + 0.05).all()
    with pytest.raises(ValueError, match=r"no density.*'z' is an estimate.*start=\"prior\""):
        diagnostics.ais(model, guide, x, num_temperatures=2)


# -- laws -----------------------------------------------------------------------------------------


@CONTRASTS
def test_the_pair_is_approved_of(contrast):
    report = ppvae.check_pair(*pair(contrast), data(6))
    assert any("4 trainable parameters" in line for line in report.holds)
    assert any("3 particles at once" in line for line in report.holds)


def start(contrast="adaptive", **options):
    return ppvae.SVI(*pair(contrast, **options), ADAM, beside=Beside(ADAM, steps=2))


@CONTRASTS
def test_a_step_of_each_leaves_the_other_alone(contrast):
    svi, x = start(contrast), data(8)
    (ratio,) = auxiliaries(svi.objective).values()
    svi.objective(x).backward()
    assert all(p.grad is None for p in ratio.parameters())
    svi.prepare(x)
    before = {name: p.detach().clone() for name, p in svi.objective.named_parameters()}
    svi.step(x)
    after = dict(svi.objective.named_parameters())
    still = {name for name in after if torch.equal(after[name], before[name])}
    assert still == {"model.likelihood.net.weight"}  # which is fixed
    assert svi.turns.reported["ratio_loss"][1] == 1


def test_saved_and_loaded_it_goes_on_to_the_bit():
    x, one = data(8), start()
    one.step(x)
    saved = copy.deepcopy(one.state_dict())
    torch.manual_seed(5)
    first = [one.step(x) for _ in range(3)]
    other = start()
    with torch.no_grad():
        other.guide.conditional.points.zero_()  # the points are part of what is saved
    other.prepare(x)
    other.load_state_dict(saved)
    torch.manual_seed(5)
    assert [other.step(x) for _ in range(3)] == first


def test_a_copy_learns_from_its_own_draws():
    svi = start()
    other = copy.deepcopy(svi.guide)
    own = other.conditional
    assert own.ratio.contrast.__self__ is own
    with torch.no_grad():
        for p in own.sampler.parameters():
            p.zero_()
        (_, z), _ = own.ratio.contrast(Draws(svi.model, other, (data(8),), {}))
    assert (z == 0).all()


def test_batch_norm_in_the_sampler_is_left_by_the_ratio_as_it_was():
    svi, x = start(batch_norm=True), data(8)
    svi.prepare(x)
    (turn,) = svi.turns.turns.values()
    buffers = {name: b.clone() for name, b in svi.guide.named_buffers()}
    turn.objective(x)
    for name, buffer in svi.guide.named_buffers():
        assert name.endswith("seen") or torch.equal(buffer, buffers[name]), name


@inductor
@pytest.mark.slow
@CONTRASTS
def test_compiled_steps_are_the_eager_ones(contrast):
    x = data(8)
    found = []
    for compiled in (False, True):
        model, guide = pair(contrast)
        svi = ppvae.SVI(model, guide, ADAM, beside=Beside(ADAM, steps=2), compile=compiled)
        torch.manual_seed(3)
        found.append([svi.step(x) for _ in range(4)])
        found[-1] += [p.detach().sum().item() for p in svi.objective.parameters()]
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-4)


# -- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"noise_dim": 0}, "noise_dim must be at least 1, got 0"),
        ({"noise_dim": -2}, "noise_dim must be at least 1"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"contrast": "posterior"}, 'contrast must be "adaptive" or "prior"'),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        posteriors.Implicit(**{"sampler": Linear(), "net": Blind(), "dim": 2, "noise_dim": 2}
                            | arguments)  # fmt: skip


class Shares(nn.Module):
    """Gives no number to each particle."""

    def forward(self, x, z):
        return 0.0 * x[:, :1]


@pytest.mark.parametrize(
    ("sampler", "net", "message"),
    [
        (nets.mlp(4 + 2, 3), Blind(), r"sampler must give one z of dim=2 .*it gave \(32, 6, 3\)"),
        (lambda x, noise: x[:, :2], Blind(), r"sampler must give one z.*it gave \(6, 2\)"),
        (Linear(), nets.mlp(6, 2), r"one number per row.*it gave \(6, 2\)"),
    ],
)
def test_networks_that_do_not_fit_are_named(sampler, net, message):
    guide = guides.Amortized(posteriors.Implicit(sampler, net, 2, 2))
    with pytest.raises(ValueError, match=message):
        ppvae.SVI(linear_model(), guide, ADAM).prepare(data(6))


def test_a_ratio_that_gives_particles_one_number_is_named():
    guide = guides.Amortized(posteriors.Implicit(Linear(), Shares(), 2, 2))
    with pytest.raises(ValueError, match=r"one number for each z, \(3, 6, 1\), and gave \(6, 1\)"):
        ppvae.log_weights(linear_model(), guide, data(6), num_particles=3)


def test_moments_of_another_shape_are_named():
    sampler = Linear()
    sampler.moments = lambda x: (torch.zeros(2), torch.ones(2))
    guide = guides.Amortized(posteriors.Implicit(sampler, Blind(), 2, 2))
    with pytest.raises(ValueError, match=r"two tensors of shape \(6, 2\)"):
        guide(data(6))


@pytest.mark.parametrize("estimator", [elbo.IWELBO(5), elbo.RenyiELBO(5, alpha=0.5)])
def test_other_bounds_are_refused_before_training(estimator):
    with pytest.raises(ValueError, match=r"not linear.*'z'.*elbo\.ELBO"):
        ppvae.fit(ppvae.SVI(*pair(), ADAM, estimator), data(8), epochs=1, progress=False)


def test_it_is_a_guide_of_one_site_and_not_a_prior():
    _, guide = pair()
    q = guide.conditional

    def twice(x):
        with pyro.plate("data", len(x)):
            pyro.sample("a", q(x))
            pyro.sample("b", q(x))

    draws = Draws(linear_model(), twice, (data(6),), {})
    with pytest.raises(ValueError, match="2 of \\['a', 'b'\\] are drawn so"), torch.no_grad():
        q.ratio.draw(draws)

    class Prior(nn.Module):
        def __init__(self):
            super().__init__()
            self.q = posteriors.Implicit(nets.mlp(1 + 2, 2), nets.mlp(1 + 2, 1), 2, 2)

        def forward(self):
            return self.q(torch.zeros(6, 1))

    model = models.VAE(linear_model().likelihood, prior=Prior())
    with pytest.raises(ValueError, match="0 of \\['z'\\] are drawn so"):
        ppvae.SVI(model, guides.Normal(nets.mlp(4, 4)), ADAM).prepare(data(6))


def test_pyros_own_engine_is_refused():
    svi = pyro.infer.SVI(*pair(), pyro.optim.Adam({"lr": 1e-3}), pyro.infer.Trace_ELBO())
    with pytest.raises(RuntimeError, match=r"use ppvae\.SVI"):
        svi.step(data(6))


# -- a normal with its moments --------------------------------------------------------------------


@pytest.mark.parametrize("full", [True, False])
def test_moments_of_draws_are_those_of_the_guide(full, float64):
    model, guide = best_pair("adaptive")
    x = data(3)
    q = guide.conditional.sampler.density(x)
    near = guides.moment_match(model, guide, x, num_draws=40_000, full=full)
    normal = near.posterior(torch.arange(3))
    se = q.variance.sqrt() / 200
    assert ((normal.mean - q.mean).abs() < 5 * se).all()
    wanted = q.covariance_matrix if full else torch.diag_embed(q.variance)
    found = normal.covariance_matrix if full else torch.diag_embed(normal.variance)
    variances = q.variance.unsqueeze(-1) * q.variance.unsqueeze(-2)
    assert ((found - wanted).abs() < 5 * (2 * variances).sqrt() / 200).all()


def test_moments_need_one_real_vector_and_draws_enough():
    model, guide = pair()
    x = data(3)
    with pytest.raises(ValueError, match="num_draws must be at least 2"):
        guides.moment_match(model, guide, x, num_draws=1)
    with pytest.raises(ValueError, match="num_draws=2 are too few for a covariance in 2"):
        guides.moment_match(model, guide, x, num_draws=2)
    state = torch.random.get_rng_state()
    one, two = (guides.moment_match(model, guide, x).table.rows for _ in range(2))
    assert torch.equal(one, two) and torch.equal(state, torch.random.get_rng_state())
    guide.conditional.sampler.layers[-1].bias.data.fill_(math.nan)
    with pytest.raises(ValueError, match="'z' are NaN or infinite"):
        guides.moment_match(model, guide, x)

    def rates(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Gamma(torch.ones(len(x), 2), 1.0).to_event(1))

    with pytest.raises(ValueError, match="one latent, a vector or map of real numbers"):
        guides.moment_match(model, rates, x)
