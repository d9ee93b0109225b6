"""Reference posteriors: HMC, Metropolis, NUTS, annealing and quadrature against exact answers."""

import dataclasses
import functools
import math
import re
import sys
import warnings
from statistics import NormalDist
from types import SimpleNamespace

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import ppvae
from oracles import LinearGuide, LinearModel, MixtureModel, TwoLevelGuide, TwoLevelModel
from ppvae import conditionals, diagnostics, guides, models, nets
from ppvae.check.programs import PairError
from ppvae.diagnostics import chains as chains_of
from ppvae.diagnostics.annealing import Path as AnnealedPath
from ppvae.diagnostics.chains import ESS_PER_CHAIN, RHAT, Point, convergence
from ppvae.diagnostics.hmc import JITTER, leapfrog
from ppvae.diagnostics.joint import Joint, traced
from ppvae.local import Indexed
from ppvae.pairs import simulate
from ppvae.program import data_plate
from registry import ALL_PAIRS, build

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


def limit(count):
    """So many standard errors that one of `count` exceeds them once in 1e4 tests."""
    return NormalDist().inv_cdf(1 - 1e-4 / (2 * count))


def ess(draws, method):
    """ArviZ's effective sample size of each column of ``(chain, draw, N, d)``, ``(N, d)``."""
    values = draws.double().numpy()
    found = [
        [float(arviz.ess(values[:, :, n, d], method=method)) for d in range(values.shape[3])]
        for n in range(values.shape[2])
    ]
    return torch.tensor(found, dtype=torch.float64)


def assert_moments(draws, mean, sd):
    """Mean and sd of ``(chain, draw, N, d)`` are exact within errors that their ESS gives."""
    flat = draws.flatten(0, 1)
    errors = (flat.mean(0) - mean).abs() / (sd / ess(draws, "mean").sqrt())
    assert errors.max() < limit(errors.numel()), errors.max()
    # sd of s is about sd / sqrt(2 n) for a normal posterior
    spread = (flat.std(0) / sd - 1).abs() * (2 * ess(draws, "sd")).sqrt()
    assert spread.max() < limit(spread.numel()), spread.max()
    # all datapoints and latents together: a bias of one percent shows
    squares = ((draws - mean) / sd).square()
    pooled = squares.mean() - 1
    se = squares.flatten(0, 1).std(0) / ess(squares, "mean").sqrt()
    assert pooled.abs() < limit(1) * se.square().sum().sqrt() / se.numel(), pooled


def linear(rows=12, scale=1.0, shift=0.0, latent=2):
    model = LinearModel(latent, 5)
    x = model.draw(rows)
    A, a, S = model.posterior()
    with torch.no_grad():
        return model, LinearGuide(model, scale, shift), x, (x @ A.T + a, S), model.log_evidence(x)


@functools.cache
def chains(rows):
    """A linear pair, its posterior and evidence, and HMC on it, run once: nobody changes it."""
    model, guide, x, posterior, exact = linear(rows=rows, scale=0.5, shift=0.4)
    return model, guide, x, posterior, exact, diagnostics.hmc(model, guide, x, seed=1)


def decoder_pair(latent, data_dim=60, sharp=3.0, rows=8, seed=0):
    """A random sharpened Bernoulli decoder, as in the measurements, and data drawn from it."""
    torch.manual_seed(seed)
    net = nets.mlp(latent, 40, data_dim, activation=nn.Tanh)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(sharp)
    model = models.VAE(conditionals.Bernoulli(net), latent_dim=latent)
    with torch.no_grad():
        x = model(size=rows)
    return model, guides.Prior(model), x


# -- the log-joint ------------------------------------------------------------------------------


def test_joint_equals_the_formula(float64):
    model, guide, x, _, _ = linear()
    joint = Joint(model, guide, x)
    u = torch.randn(3, len(x), 2)
    prior = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    fit = dist.Normal(u @ model.weight.T + model.bias, model.log_sigma.exp()).log_prob(x).sum(-1)
    torch.testing.assert_close(joint(u), prior + fit)
    torch.testing.assert_close(joint.prior_and_joint(u), (prior, prior + fit))
    torch.testing.assert_close(joint.log_q(u), guide.posterior(x).log_prob(u))
    value, gradient = joint.value_and_grad(u)
    leaf = u.clone().requires_grad_()
    expected = torch.autograd.grad(joint(leaf).sum(), leaf)[0]
    torch.testing.assert_close((value, gradient), ((prior + fit).detach(), expected))
    assert all(p.grad is None for p in model.parameters())


def test_joint_is_that_of_log_weights(float64):
    """log p - log q at the guide's own draws is what ppvae.log_weights gives."""
    torch.manual_seed(3)
    model, guide = TwoLevelModel(), TwoLevelGuide(TwoLevelModel(), bottom_up=True, scale=0.7)
    x = torch.randn(4)
    joint = Joint(model, guide, x)
    torch.manual_seed(5)
    u = joint.draw_q(6)
    torch.manual_seed(5)
    weights = ppvae.log_weights(model, guide, x, num_particles=6)
    torch.testing.assert_close(joint(u) - joint.log_q(u), weights.log_w.detach())
    assert list(joint.layouts) == ["z2", "z1"] and joint.dim == 2


def test_supports_are_transformed(float64):
    """Positive, bounded by another latent, and a simplex: densities of u integrate to p(x)."""

    def model(x):
        with data_plate(x):
            scale = pyro.sample("scale", dist.Gamma(2.0, 3.0))
            share = pyro.sample("share", dist.Uniform(torch.zeros(()), scale))
            pyro.sample("x", dist.Normal(share, 0.5), obs=x)

    def guide(x):
        with data_plate(x):
            scale = pyro.sample("scale", dist.Gamma(torch.full_like(x, 2.0), 3.0))
            pyro.sample("share", dist.Uniform(torch.zeros(()), scale))

    x = torch.tensor([0.2, 1.0])
    found = diagnostics.quadrature(model, guide, x, num_points=321)
    torch.manual_seed(0)
    scale = dist.Gamma(2.0, 3.0).sample((400_000, 1))
    weights = dist.Normal(scale * torch.rand(400_000, 1), 0.5).log_prob(x).exp()
    se = weights.std(0) / math.sqrt(len(weights)) / weights.mean(0)
    assert ((found.log_evidence - weights.mean(0).log()).abs() < 4 * se).all()
    joint = Joint(model, guide, x)
    u = joint.draw_q(7)
    values = joint.constrain(u)
    assert (values["share"] < values["scale"]).all() and (values["share"] > 0).all()
    log_det = joint(u) - sum(t.detach() for t in constrained_terms(model, x, values))
    # exp for the first; for the second, a sigmoid times the first
    exact = 2 * values["scale"].log() + nn.functional.logsigmoid(torch.stack([u, -u]))[..., 1].sum(
        0
    )
    torch.testing.assert_close(log_det.detach(), exact)


def constrained_terms(model, x, values):
    with pyro.plate("chains", 7, dim=-2):
        given = pyro.poutine.condition(model, values)
        trace = pyro.poutine.trace(given).get_trace(x)
    trace.compute_log_prob()
    return [trace.nodes[name]["log_prob"] for name in ("scale", "share", "x")]


@pytest.mark.slow
def test_simplex_latent_has_one_coordinate_less(float64):
    def model(x):
        with data_plate(x):
            p = pyro.sample("p", dist.Dirichlet(torch.ones(3)))
            pyro.sample("x", dist.Categorical(p), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("p", dist.Dirichlet(torch.ones(len(x), 3)))

    x = torch.tensor([0, 2])
    joint = Joint(model, guide, x)
    assert joint.dim == 2
    draws = diagnostics.hmc(model, guide, x, seed=0)
    assert draws.draws["p"].shape == (4, 600, 2, 3) and draws.converged.all()
    counts = 1 + nn.functional.one_hot(x, 3)  # conjugate
    exact = dist.Dirichlet(counts.double())
    assert_moments(draws.draws["p"], exact.mean, exact.variance.sqrt())
    torch.testing.assert_close(
        diagnostics.quadrature(model, guide, x).log_evidence,
        torch.full((2,), -math.log(3)),
        atol=1e-8,
        rtol=0,
    )


def test_inner_plates_belong_to_a_datapoint(float64):
    """Two latents in an inner plate, left or right of the data plate, as in one vector."""

    def make(data_dim):
        def model(x):
            with pyro.plate("data", 3, dim=data_dim), pyro.plate("parts", 2, dim=-3 - data_dim):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
                pyro.sample("x", dist.Normal(z, 0.5), obs=x)

        def guide(x):
            with pyro.plate("data", 3, dim=data_dim), pyro.plate("parts", 2, dim=-3 - data_dim):
                pyro.sample("z", dist.Normal(0.8 * x, 0.5))

        return model, guide

    parts = torch.randn(3, 2)
    right, left = Joint(*make(-2), parts), Joint(*make(-1), parts.T.contiguous())
    u = torch.randn(5, 3, 2)
    exact = dist.Normal(u, 0.5).log_prob(parts) + dist.Normal(0.0, 1.0).log_prob(u)
    for joint in (right, left):
        assert joint.num_datapoints == 3 and joint.dim == 2
        torch.testing.assert_close(joint(u), exact.sum(-1))
        torch.testing.assert_close(joint.constrain(u)["z"], u)
        torch.testing.assert_close(joint.draw_q(400).mean(0), 0.8 * parts, atol=0.15, rtol=0)


@pytest.mark.slow
def test_enumerated_latents_are_summed_out(float64):
    class Model(MixtureModel):
        def forward(self, x):
            with data_plate(x):
                c = pyro.sample(
                    "c", dist.Categorical(logits=self.logits), infer={"enumerate": "parallel"}
                )
                z = pyro.sample("z", dist.Normal(self.loc[c], 1.0))
                pyro.sample("x", dist.Normal(z, 0.8), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.5 * x, 1.0))

    model, x = Model(), torch.tensor([-1.0, 0.4, 3.0])
    exact = model.log_evidence(x).detach()
    found = diagnostics.quadrature(model, guide, x)
    torch.testing.assert_close(found.log_evidence, exact, atol=1e-8, rtol=0)
    draws = diagnostics.hmc(model, guide, x, seed=1)
    assert draws.converged.all()
    assert_moments(draws.draws["z"].unsqueeze(-1), found.mean, found.sd)
    annealed = diagnostics.ais(model, guide, x, start="prior", seed=1)
    assert_within(annealed, exact)


def test_the_prior_of_a_latent_is_over_what_is_summed_out(float64):
    """z of either of two components: p(z) is their mixture, log p(x, z) that and log p(x | z)."""
    loc = torch.tensor([-2.0, 1.0])
    x = torch.tensor([0.3, -1.0])

    def model(x):
        with data_plate(x):
            probs = torch.tensor([0.3, 0.7])
            c = pyro.sample("c", dist.Categorical(probs), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(loc[c], 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0))

    u = torch.randn(3, 2, 1)
    mixture = dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.3, 0.7])),
                                     dist.Normal(loc, 0.5))  # fmt: skip
    prior = mixture.log_prob(u[..., 0])
    expected = prior, prior + dist.Normal(u[..., 0], 1.0).log_prob(x)
    torch.testing.assert_close(Joint(model, guide, x).prior_and_joint(u), expected)


def test_latents_that_the_guide_enumerates_are_summed_out_too(float64):
    """log p(x, z) and log q(z | x), with c summed out of both."""
    model = MixtureModel()

    def guide(x):
        with data_plate(x):
            q = dist.Categorical(torch.tensor([0.2, 0.5, 0.3]))
            c = pyro.sample("c", q, infer={"enumerate": "parallel"})
            pyro.sample("z", dist.Normal(model.loc.detach()[c], 2.0))

    x, u = torch.tensor([-1.0, 0.4, 3.0]), torch.randn(5, 3, 1)
    joint = Joint(model, guide, x)
    assert list(joint.layouts) == ["z"]
    parts = dist.Normal(model.loc, 1.0).log_prob(u) + model.logits.log_softmax(-1)
    exact = parts.logsumexp(-1) + dist.Normal(u.squeeze(-1), 0.8).log_prob(x)
    torch.testing.assert_close(joint(u), exact)
    parts = dist.Normal(model.loc, 2.0).log_prob(u) + torch.tensor([0.2, 0.5, 0.3]).log()
    torch.testing.assert_close(joint.log_q(u), parts.logsumexp(-1))
    assert joint.draw_q(4).shape == joint.draw_prior(4).shape == (4, 3, 1)


def test_a_label_that_is_given_is_data(float64):
    """Marked to be summed out, for other calls: where it is given, a mask hides its term."""
    seen = torch.tensor([True, False, True])

    def model(x, y):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            with poutine.mask(mask=seen):
                fn = dist.Bernoulli(logits=2 * z)
                pyro.sample("y", fn, obs=y, infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(z, 0.5), obs=x)

    def guide(x, y):
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.8 * x, 0.5))

    x, y = torch.tensor([0.3, -1.0, 1.2]), torch.tensor([0.0, 1.0, 1.0])
    z = torch.linspace(-8, 8, 4001).unsqueeze(-1)
    log_p = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, 0.5).log_prob(x)
    log_p = log_p + torch.where(seen, dist.Bernoulli(logits=2 * z).log_prob(y), 0.0)
    exact = log_p.logsumexp(0) + math.log(16 / 4000)
    torch.testing.assert_close(diagnostics.quadrature(model, guide, x, y).log_evidence, exact)


def test_densities_are_traced(float64):
    """One graph in place of Pyro's handlers, of a method too; what cannot be traced stays."""
    model, guide, x, _, _ = linear(rows=4)
    joint, u = Joint(model, guide, x), torch.randn(3, 4, 2)
    density = joint.value_and_grad
    graph = traced(density, u)
    assert graph is not density
    for other in (2 * u, u[:1].expand(3, -1, -1), u.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(graph(other), density(other))
    path = AnnealedPath(joint, "guide", diagnostics.sigmoid_schedule(3), 1, 3)
    assert all(not hasattr(graph, "__func__") for graph in path.graphs.values())
    assert path.graphs

    def untraceable(u):
        return (u if u.sum() > 0 else -u,)

    assert traced(untraceable, u) is untraceable


def test_rows_are_the_same_datapoints(float64):
    model, guide, x, _, _ = linear()
    joint, u = Joint(model, guide, x), torch.randn(3, 12, 2)
    rows = torch.tensor([7, 2])
    torch.testing.assert_close(joint.rows(rows)(u[:, rows]), joint(u)[:, rows])


# -- HMC, Metropolis, NUTS ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "rows"),
    [
        ("guide", 4),
        pytest.param("guide", 20, marks=pytest.mark.slow),
        pytest.param("prior", 20, marks=pytest.mark.slow),
    ],
)
def test_hmc_moments_are_exact(float64, start, rows):
    model, guide, x, (mean, S), _, draws = chains(rows)
    if start == "prior":
        draws = diagnostics.hmc(model, guide, x, start=start, seed=1)
    assert draws.converged.all(), draws
    assert draws.draws["z"].shape == (4, 600, rows, 2)
    assert_moments(draws.draws["z"], mean, S.diagonal().sqrt())
    correlation = torch.stack([torch.corrcoef(z.T)[0, 1] for z in draws.flat("z").transpose(0, 1)])
    exact = S[0, 1] / (S[0, 0] * S[1, 1]).sqrt()
    assert ((correlation - exact).abs() < limit(rows) / math.sqrt(300)).all()


@pytest.mark.slow
def test_wide_jitter_mixes_the_variances(monkeypatch):
    """Trap: with steps of one length, trajectories are periodic and variances mix slowly."""
    model, guide, x = decoder_pair(10, data_dim=100, sharp=2.0, rows=16)
    failed = {}
    for jitter in ((0.3, 1.2), (0.8, 1.2), (1.0, 1.0)):
        monkeypatch.setattr(sys.modules["ppvae.diagnostics.hmc"], "JITTER", jitter)
        draws = diagnostics.hmc(model, guide, x, max_reruns=0, seed=0)
        failed[jitter] = int((~draws.converged).sum())
    assert failed[0.3, 1.2] < failed[0.8, 1.2] < failed[1.0, 1.0], failed
    assert failed[0.3, 1.2] <= 4 and failed[1.0, 1.0] >= 12, failed


def test_trajectories_are_jittered_over_their_range(monkeypatch):
    """Where the density is flat, a point moves by jitter x step x scale x momentum at each step."""
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)  # momenta of 1
    u, zero = torch.zeros(500, 2, 1), torch.zeros(500, 2)
    step, scale = torch.tensor([0.1, 0.2]), torch.tensor([[1.0], [3.0]])
    point, probability, _ = leapfrog(
        lambda u: (zero, torch.zeros_like(u)), Point(u, zero, u), step, scale, 5
    )
    assert (probability == 1).all()
    jitter = point.u / (5 * step.unsqueeze(-1) * scale)
    low, high = JITTER
    width = high - low
    assert jitter.min() >= low and jitter.max() <= high + 1e-6
    assert jitter.min() < low + 0.02 * width and jitter.max() > high - 0.02 * width
    assert jitter.unique().numel() > 900  # each chain's and datapoint's own


@pytest.mark.parametrize("value", [math.nan, -math.inf, -5_000.0])
def test_a_trajectory_that_diverges_is_counted_and_left(value):
    u, zero = torch.randn(3, 2, 2), torch.zeros(3, 2)
    broken = torch.tensor([False, True])
    point, probability, diverged = leapfrog(
        lambda u: (torch.where(broken, value, zero), torch.zeros_like(u)),
        Point(u, zero, torch.zeros_like(u)), torch.tensor([0.1, 0.1]), torch.ones(2, 2), 3,
    )  # fmt: skip
    assert (diverged == broken).all()
    assert (probability == torch.where(broken, 0.0, 1.0)).all()
    assert torch.equal(point.u[:, 1], u[:, 1]) and (point.value == 0).all()
    assert (point.u[:, 0] != u[:, 0]).all()


def test_scales_are_those_of_the_last_window():
    """Chains whose spread is 5 in the first window of the warm-up and 0.5 in the second."""
    joint = SimpleNamespace(
        num_datapoints=1, dim=2, value_and_grad=lambda u: (u.sum(-1), torch.zeros_like(u))
    )
    settings = chains_of.Settings(4, 100, 8, 1, 0.8, None, "guide")
    generator, drawn, seen = torch.Generator().manual_seed(0), [], []

    def transition(point, step, scale):
        seen.append(scale)
        spread = 5.0 if len(drawn) < 40 else 0.5
        drawn.append(spread * torch.randn(4, 1, 2, generator=generator))
        return point._replace(u=drawn[-1]), torch.full((4, 1), 0.8), torch.zeros(4, 1)

    begin = torch.full((1, 2), 7.0)
    _, _, scale = chains_of._warm_up(joint, transition, settings, torch.zeros(4, 1, 2), begin)
    expected = begin
    for window in (drawn[20:40], drawn[40:80]):
        n = 4 * len(window)
        variance = torch.stack(window).flatten(0, 1).var(0)
        expected = ((n * variance + 5 * 0.01 * expected.square()) / (n + 5)).sqrt()
    torch.testing.assert_close(scale, expected)
    assert seen[39] is begin and seen[80] is scale


@pytest.mark.slow
def test_hmc_with_correlated_and_unequal_scales(float64):
    """A posterior with correlation 0.8 and scales 100 apart, which unscaled HMC would not mix."""
    scales, rho = torch.tensor([0.05, 5.0]), 0.8
    covariance = scales.outer(scales) * torch.tensor([[1.0, rho], [rho, 1.0]])

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))
            pyro.sample("x", dist.Normal(z.sum(-1), 1e3), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1))

    draws = diagnostics.hmc(model, guide, torch.zeros(5), seed=0)
    assert draws.converged.all(), draws
    assert_moments(draws.draws["z"], torch.zeros(5, 2), scales)


@pytest.mark.slow
def test_hmc_on_a_decoder_against_quadrature():
    """A nonlinear posterior in two dimensions (float32, Bernoulli decoder)."""
    model, guide, x = decoder_pair(2)
    draws = diagnostics.hmc(model, guide, x, seed=2, max_reruns=3)
    exact = diagnostics.quadrature(model, guide, x)
    passed = draws.converged
    assert passed.sum() >= 7, draws
    error = (draws.mean("z") - exact.mean)[passed].abs() / exact.sd[passed]
    se = 1 / ess(draws.draws["z"], "mean").sqrt()[passed]
    assert (error < limit(error.numel()) * se).all(), (error / se).max()
    ratio = (draws.sd("z") / exact.sd)[passed]
    assert ratio.min() > 0.9 and ratio.max() < 1.1


def test_gates_are_arvizs(float64):
    model, guide, x, _, _ = linear(rows=3)
    draws = diagnostics.hmc(model, guide, x, num_draws=100, max_reruns=0, seed=0)
    seen = torch.cat([draws.unconstrained, draws.log_joint.unsqueeze(-1)], -1).numpy()
    for n in range(3):
        columns = [seen[:, :, n, d] for d in range(3)]
        assert draws.rhat[n] == max(float(arviz.rhat(c)) for c in columns)
        bulk = [float(arviz.ess(c, method="bulk")) for c in columns]
        tail = [float(arviz.ess(c, method="tail", prob=(0.05, 0.95))) for c in columns]
        assert draws.ess[n] == min(bulk + tail)
    joint = Joint(model, guide, x)
    flat = draws.unconstrained.flatten(0, 1)
    torch.testing.assert_close(draws.log_joint.flatten(0, 1), joint(flat).detach())


@pytest.mark.parametrize(("step_size", "accept"), [(50.0, 0.05), (1e-4, 0.99)])
def test_a_bad_step_size_fails_the_gate(float64, step_size, accept):
    """Too large: frozen chains, divergences. Too small: chains that have not moved."""
    model, guide, x, _, _ = linear(rows=4)
    draws = diagnostics.hmc(
        model, guide, x, step_size=step_size, num_warmup=0, num_draws=50, seed=0
    )
    assert not draws.converged.any()
    assert draws.mean("z").isnan().all() and draws.sd("z").isnan().all()
    assert "4 of 4 datapoints did not pass" in repr(draws)
    assert (draws.accept < accept).all() if step_size > 1 else (draws.accept > accept).all()
    assert (draws.divergences > 0).all() == (step_size > 1)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, True),
        ({"rhat": 1.011}, False),
        ({"rhat": math.nan}, False),
        ({"ess": 399.0}, False),
        ({"ess": math.nan}, False),
        ({"divergences": 4}, True),  # of 4,000 transitions
        ({"divergences": 5}, False),
    ],
)
def test_each_gate_by_itself(changes, passes):
    z = torch.randn(4, 1000, 1, 2)
    seen = {"rhat": 1.0, "ess": 4000.0, "accept": 0.8, "divergences": 0, "step_size": 1.0}
    columns = {name: torch.tensor([value]) for name, value in (seen | changes).items()}
    draws = diagnostics.PosteriorDraws(
        draws={"z": z},
        unconstrained=z,
        log_joint=z.sum(-1),
        reruns=torch.zeros(1, dtype=torch.long),
        method="HMC",
        seconds=1.0,
        **columns,
    )
    assert draws.converged.tolist() == [passes]
    assert draws.mean("z").isfinite().all() == passes


def test_frozen_chains_have_no_rhat():
    draws = torch.randn(4, 50, 3, 2)
    draws[1, :, 0] = 0.3  # one chain of the first datapoint does not move
    draws[2, 10, 1, 1] = math.inf
    rhat, size = convergence(draws)
    assert rhat.isnan().tolist() == [True, True, False]
    assert size.isnan().tolist() == [True, True, False]


def test_separate_modes_fail_the_gate(float64):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 3.0))
            pyro.sample("x", dist.Normal(z.abs(), 0.1), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 3.0))

    torch.manual_seed(0)
    x = torch.tensor([4.0, 4.0])
    draws = diagnostics.hmc(
        model, guide, x, num_chains=8, num_draws=200, num_warmup=50, max_reruns=0, seed=3
    )
    assert not draws.converged.any() and (draws.rhat > 1.3).all()


@pytest.mark.slow
def test_only_failed_datapoints_run_again(float64):
    """With few draws some fail; those that pass keep their draws bit for bit."""
    model, guide, x, (mean, S), _ = linear(rows=12)
    options = {"num_draws": 250, "num_leapfrog": 3, "seed": 0}
    once = diagnostics.hmc(model, guide, x, max_reruns=0, **options)
    more = diagnostics.hmc(model, guide, x, max_reruns=3, **options)
    failed = ~once.converged
    assert 0 < failed.sum() < 12, once
    assert ((more.reruns > 0) == failed).all()
    kept = once.unconstrained[:, :, ~failed]
    assert torch.equal(more.unconstrained[:, :, ~failed], kept)
    assert more.converged.sum() > once.converged.sum()
    assert more.step_size[failed].mean() < once.step_size[failed].mean()
    good = more.converged
    assert_moments(more.draws["z"][:, :, good], mean[good], S.diagonal().sqrt())


def test_seed_blocks_and_stream(float64):
    model, guide, x, (mean, S), _ = linear(rows=5)
    options = {"num_draws": 40, "num_warmup": 20, "max_reruns": 0}
    before = torch.random.get_rng_state()
    first = diagnostics.hmc(model, guide, x, seed=7, **options)
    assert torch.equal(torch.random.get_rng_state(), before)
    again = diagnostics.hmc(model, guide, x, seed=7, **options)
    assert torch.equal(first.unconstrained, again.unconstrained)
    cut = diagnostics.hmc(model, guide, x, seed=7, max_rows=8, **options)  # two rows at once
    assert cut.unconstrained.shape == first.unconstrained.shape
    assert ((cut.flat("z").mean(0) - mean).abs() < 0.5 * S.diagonal().sqrt()).all()
    one = diagnostics.hmc(model, guide, x[:1], seed=7, **options)
    assert one.unconstrained.shape == (4, 40, 1, 2)


def test_convolutional_pair_and_modes_are_left_alone():
    shape = (1, 6, 5)
    net = nets.conv_decoder(2, shape, channels=(3,), hidden=(8,), batch_norm=True)
    model = models.VAE(conditionals.Bernoulli(net, event_dim=3), latent_dim=2).train()
    guide = guides.Normal(nets.conv_encoder(4, shape, channels=(3,), hidden=(8,)))
    x = torch.bernoulli(torch.full((3, *shape), 0.4))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    draws = diagnostics.hmc(model, guide, x, num_draws=50, num_warmup=20, max_reruns=0, seed=0)
    assert draws.unconstrained.isfinite().all() and model.training
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert not pyro.get_param_store().keys()


@pytest.mark.parametrize(
    ("rows", "options"),
    [(10, {"num_warmup": 500, "thin": 4}), pytest.param(50, {}, marks=pytest.mark.slow)],
)
def test_metropolis_moments_are_exact(float64, rows, options):
    model, guide, x, (mean, S), _ = linear(rows=rows, scale=2.0)
    draws = diagnostics.metropolis(model, guide, x, seed=1, **options)
    assert draws.method == "Metropolis" and ((draws.accept - 0.3).abs() < 0.1).all()
    assert_moments(draws.draws["z"], mean, S.diagonal().sqrt())
    good = draws.converged
    assert good.any() and draws.mean("z")[good].isfinite().all()


def test_a_random_walk_moves_in_units_of_each_scale(monkeypatch):
    """By step x scale x noise, where it is accepted; everything else stays."""
    module = sys.modules["ppvae.diagnostics.metropolis"]
    monkeypatch.setattr(module, "sample", lambda joint, transition, *rest: (joint, transition))
    model, guide, x, _, _ = linear(rows=3)
    joint, transition = diagnostics.metropolis(model, guide, x)
    u = torch.zeros(2, 3, 2)
    move = transition(joint, u)
    point = Point(u, joint(u).detach(), torch.ones_like(u))
    step, scale = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([[1.0, 5.0]] * 3)
    monkeypatch.setattr(torch, "randn_like", torch.ones_like)
    proposal = u + step[:, None] * scale
    change = joint(proposal).detach() - point.value
    for drawn in (0.0, 1.0):  # every proposal accepted, and none
        monkeypatch.setattr(
            torch, "rand_like", lambda like, drawn=drawn: torch.full_like(like, drawn)
        )
        moved, probability, _ = move(point, step, scale)
        torch.testing.assert_close(probability, change.clamp(max=0.0).exp())
        torch.testing.assert_close(moved.u, u if drawn else proposal)
        torch.testing.assert_close(moved.value, joint(moved.u).detach())


def test_of_a_chain_every_so_many_draws_are_kept(float64):
    """A chain that counts its transitions: 20 of warm-up, then each fifth is kept."""
    model, guide, x, _, _ = linear(rows=3)

    def make(joint, u):
        def count(point, step, scale):
            return point._replace(u=point.u + 1, value=point.value + 1), point.value * 0 + 0.6, (
                torch.zeros_like(point.value)
            )  # fmt: skip

        return count

    settings = chains_of.Settings(4, 20, 8, 5, 0.8, None, "guide")
    torch.manual_seed(0)
    draws = chains_of._run(Joint(model, guide, x), make, settings, "count", 0)
    steps = draws.unconstrained - draws.unconstrained[:, :1]
    expected = 5.0 * torch.arange(8.0)[:, None, None]
    torch.testing.assert_close(steps, expected.expand_as(steps))
    torch.testing.assert_close(draws.accept, torch.full((3,), 0.6))
    torch.manual_seed(0)
    start = Joint(model, guide, x).draw_q(4)
    torch.testing.assert_close(draws.unconstrained[:, 0], start + 20 + 5)


class Chains:
    """In the place of Pyro's MCMC: draws of two sites that are told from chain to chain."""

    made = 0

    def __init__(self, kernel, num_draws, num_warmup, **options):
        Chains.made += 1
        self.kernel, self.draws = kernel, num_draws

    def run(self, *args):
        self.kernel.step_size = 0.1 * Chains.made
        self.kernel.model(*args)
        (x,) = args
        values = torch.linspace(0, 1, self.draws)[:, None] + 10 * Chains.made + x
        self.samples = {"z": values, "w": torch.stack([values, -values], -1)}

    def get_samples(self):
        return self.samples

    def diagnostics(self):
        return {
            "acceptance rate": {"chain 0": 0.2 * Chains.made},
            "divergences": {"chain 0": list(range(Chains.made))},
        }


def test_what_nuts_makes_of_pyros_chains(monkeypatch):
    """Two chains of two datapoints: whose draws they are, their sums, means and densities."""
    module = sys.modules["ppvae.diagnostics.nuts"]
    monkeypatch.setattr(module, "MCMC", Chains)
    monkeypatch.setattr(module, "PyroNUTS", lambda model: SimpleNamespace(model=model))
    monkeypatch.setattr(Chains, "made", 0)
    modes = []

    class Model(ppvae.Program):
        def forward(self, x):
            modes.append(self.training)
            with data_plate(x):
                z = pyro.sample("z", dist.Normal(0.0, 10.0))
                w = pyro.sample("w", dist.Normal(0.0, torch.ones(2)).to_event(1))
                pyro.sample("x", dist.Normal(z + w.sum(-1), 1.0), obs=x)

    x = torch.tensor([0.5, -0.5])
    draws = diagnostics.nuts(Model(), x, num_chains=2, num_draws=8, seed=0)
    assert not any(modes)
    row = torch.linspace(0, 1, 8)
    z = torch.stack([torch.stack([row + 10 * (2 * n + c + 1) + x[n] for n in range(2)], -1)
                     for c in range(2)])  # fmt: skip
    w = torch.stack([z, -z], -1)
    torch.testing.assert_close(draws.draws, {"z": z, "w": w})
    torch.testing.assert_close(draws.unconstrained, torch.cat([z[..., None], w], -1))
    log_p = dist.Normal(0.0, 10.0).log_prob(z) + dist.Normal(0.0, 1.0).log_prob(w).sum(-1)
    torch.testing.assert_close(draws.log_joint, log_p + dist.Normal(z, 1.0).log_prob(x))
    torch.testing.assert_close(draws.accept, torch.tensor([0.3, 0.7]))
    assert draws.divergences.tolist() == [3, 7]
    torch.testing.assert_close(draws.step_size, torch.tensor([0.2, 0.4]))


@pytest.mark.slow
def test_nuts_agrees_with_hmc_and_quadrature():
    model, guide, x = decoder_pair(2, rows=2, sharp=2.0)
    oracle = diagnostics.nuts(model, x, num_chains=2, num_warmup=150, num_draws=300, seed=0)
    draws = diagnostics.hmc(model, guide, x, seed=0)
    exact = diagnostics.quadrature(model, guide, x)
    assert oracle.draws["z"].shape == (2, 300, 2, 2) and draws.converged.all()
    for found in (oracle, draws):
        error = (found.flat("z").mean(0) - exact.mean).abs() / exact.sd
        se = 1 / ess(found.draws["z"], "mean").sqrt()
        assert (error < limit(4) * se).all(), found.method
    # log p(x, z): NUTS's own run of the model against the joint
    joint = Joint(model, guide, x)
    seen = joint(oracle.flat("z")).detach()
    torch.testing.assert_close(oracle.log_joint.flatten(0, 1), seen, atol=1e-3, rtol=1e-4)


# -- annealing and quadrature -------------------------------------------------------------------


def assert_within(annealed, exact):
    """log E w is log p(x): every datapoint within standard errors and the log's own bias."""
    error = (annealed.log_evidence - exact).abs()
    bias = annealed.log_evidence_se.square()  # of the log of a mean, to first order half of it
    assert (error < limit(len(error)) * annealed.log_evidence_se + bias + 1e-8).all(), (
        error / annealed.log_evidence_se
    ).max()


@pytest.mark.parametrize(
    ("start", "rows"),
    [
        ("guide", 4),
        pytest.param("guide", 20, marks=pytest.mark.slow),
        pytest.param("prior", 20, marks=pytest.mark.slow),
    ],
)
def test_annealing_from_both_sides_is_exact(float64, start, rows):
    model, guide, x, _, exact, draws = chains(rows)
    options = {"start": start, "num_temperatures": 40, "num_chains": 32, "seed": 2}
    assert_within(diagnostics.ais(model, guide, x, **options), exact)
    upper = diagnostics.reverse_ais(model, guide, x, draws=draws, **options)
    assert upper.side == "upper" and "if these are exact" in upper.note
    assert_within(upper, exact)


def given(draws):
    """Draws of the posterior of some rows, as a chain without a fault would make them."""
    N = draws.shape[2]
    ones, zeros = torch.ones(N), torch.zeros(N, dtype=torch.long)
    return diagnostics.PosteriorDraws(
        {"z": draws}, draws, draws.sum(-1), ones, ones * 1e4, ones, zeros, ones, zeros, "exact", 0.0
    )


@pytest.fixture
def far_apart(float64, monkeypatch):
    """A pair, rows whose posteriors lie far apart, exact draws of them; and no transitions.

    Each row then needs draws of its own.
    """
    monkeypatch.setattr(sys.modules["ppvae.diagnostics.annealing"], "REFRESH", 0)
    model = LinearModel(2, 4, sigma=0.2)
    x = 10 * model.draw(4)
    A, a, S = model.posterior()
    noise = torch.randn(2, 8, 4, 2) @ torch.linalg.cholesky(S).T
    return model, LinearGuide(model, scale=1.1), x, given(x @ A.T + a + noise)


def test_reverse_annealing_takes_the_draws_of_its_own_rows(far_apart):
    model, guide, x, draws = far_apart
    options = {"num_temperatures": 3, "num_chains": 8, "seed": 2, "draws": draws}
    exact = model.log_evidence(x).detach()
    for max_rows in (16, 10**6):  # two rows, all at once
        found = diagnostics.reverse_ais(model, guide, x, max_rows=max_rows, **options)
        assert ((found.log_evidence - exact).abs() < 1.0).all(), max_rows


def test_reverse_annealing_takes_all_chains_in_turn_spread_over_each(far_apart, monkeypatch):
    model, guide, x, _ = far_apart
    place = torch.arange(2.0)[:, None, None, None] * 100 + torch.arange(9.0)[:, None, None]
    draws = given(place.expand(2, 9, 4, 2).clone())
    seen = []

    def run(self, u, reverse):
        seen.append(u[:, 0, 0].tolist())
        return torch.zeros(u.shape[:2]), torch.ones(u.shape[1])

    monkeypatch.setattr(AnnealedPath, "run", run)
    for count in (6, 5):
        diagnostics.reverse_ais(
            model, guide, x, draws=draws, num_temperatures=1, num_chains=count, seed=0
        )
    assert seen == [[0, 100, 4, 104, 8, 108], [0, 100, 4, 104, 8]]


def test_reverse_annealing_from_chains_that_have_not_converged_is_nan(far_apart):
    model, guide, x, draws = far_apart
    rhat = torch.ones(4)
    rhat[[1, 3]] = 2.0
    draws = dataclasses.replace(draws, rhat=rhat)
    assert (~draws.converged).nonzero().flatten().tolist() == [1, 3]
    found = diagnostics.reverse_ais(
        model, guide, x, draws=draws, num_temperatures=2, num_chains=4, seed=2
    )
    for values in (found.log_evidence, found.log_evidence_se, found.ess):
        assert values.isnan().nonzero().flatten().tolist() == [1, 3]


def test_the_ends_of_a_path_and_the_scales_between(float64):
    """From r = p(z) or q(z | x) to p(x, z); in precision between those of the ends."""
    model, guide, x, _, _ = linear(rows=3, scale=2.0)
    joint = Joint(model, guide, x)
    u = torch.randn(5, 3, 2)
    prior = dist.Normal(0.0, 1.0).log_prob(u).sum(-1)
    for start, base in (("prior", prior), ("guide", guide.posterior(x).log_prob(u))):
        torch.manual_seed(0)
        path = AnnealedPath(joint, start, torch.tensor([0.0, 0.25, 1.0]), 3, 8)
        found = [end.detach() for end in path.ends(u)]
        torch.testing.assert_close(found, [base.detach(), joint(u).detach()])
        first, between, last = (scale.pow(-2) for scale in path.scales)
        torch.testing.assert_close(between, 0.75 * first + 0.25 * last)
        torch.manual_seed(0)  # the pilot's first draws
        begin = joint.draw_prior(200) if start == "prior" else joint.draw_q(200)
        torch.testing.assert_close(path.scales[0], begin.std(0))


def test_the_gap_of_a_sandwich_is_signed():
    """By chance the sides may cross: only the mean gap bounds anything."""

    def side(values):
        zeros = torch.zeros(2, dtype=torch.float64)
        return diagnostics.AnnealedEvidence(
            torch.tensor(values, dtype=torch.float64), zeros, zeros, zeros[None], zeros, "lower", ""
        )

    both = diagnostics.Sandwich(side([-1.0, -2.0]), side([-0.5, -2.25]), ())
    assert both.gap.tolist() == [0.5, -0.25]


def test_chains_are_refreshed_at_the_posterior(float64):
    """Transitions from exact draws leave these exact, however far away the guide is."""
    model, guide, x, (mean, S), _ = linear(rows=3, scale=0.5, shift=3.0)
    joint = Joint(model, guide, x)
    torch.manual_seed(0)
    path = AnnealedPath(joint, "guide", torch.tensor([0.0, 0.5, 1.0]), 3, 8)
    u = mean + torch.randn(2000, 3, 2) @ torch.linalg.cholesky(S).T
    moved = path.refreshed(u)
    assert ((moved - u).abs().amax(-1) > 0).double().mean() > 0.9
    error = (moved.mean(0) - mean).abs() / (S.diagonal() / len(u)).sqrt()
    assert error.max() < limit(error.numel())
    spread = (moved.std(0) / S.diagonal().sqrt() - 1).abs() * math.sqrt(2 * len(u))
    assert spread.max() < limit(spread.numel())


def test_bdmc_starts_each_row_at_its_own_latents(far_apart):
    model, guide, x, _ = far_apart
    both = diagnostics.bdmc(model, guide, x, num_temperatures=3, num_chains=8, max_rows=16, seed=4)
    exact = model.log_evidence(both.args[0]).detach()
    assert ((both.upper.log_evidence - exact).abs() < 5.0).all()


@pytest.mark.parametrize("rows", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_annealing_is_unbiased_with_few_temperatures(float64, rows):
    """E w = p(x) for any path: the mean of exp(log w - log p) over many chains is 1."""
    model, guide, x, _, exact = linear(rows=rows, scale=0.7, shift=0.3)
    for temperatures in (1, 4):
        found = diagnostics.ais(
            model, guide, x, num_temperatures=temperatures, num_chains=4000, max_rows=10**6, seed=3
        )
        ratio = (found.log_w - exact).exp()
        se = ratio.std(0) / math.sqrt(len(ratio))
        assert ((ratio.mean(0) - 1).abs() < limit(rows) * se).all()


@pytest.mark.parametrize("rows", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_bdmc_sandwiches_the_evidence(float64, monkeypatch, rows):
    """On data drawn from the model: lower <= log p(x) <= upper in the mean, and both close in."""
    # the simulated latents as they are: transitions would hide wrong ones
    monkeypatch.setattr(sys.modules["ppvae.diagnostics.annealing"], "REFRESH", 0)
    model, guide, x, _, _ = linear(rows=rows, scale=0.5, shift=0.5)
    gaps = []
    for temperatures in (2, 40):
        both = diagnostics.bdmc(
            model, guide, x, num_temperatures=temperatures, num_chains=4, seed=4
        )
        with torch.no_grad():
            exact = model.log_evidence(both.args[0])
        assert not torch.equal(both.args[0], x)
        below, above = exact - both.lower.log_evidence, both.upper.log_evidence - exact
        for side in (below, above):
            assert side.mean() > -4 * side.std() / math.sqrt(rows)
        gaps.append(both.gap.mean())
    assert gaps[1] < gaps[0] / 2, gaps


def test_simulated_latents_are_posterior_draws(float64):
    model, _, x, _, _ = linear(rows=400)
    (new,), dream = simulate(model, (x,), {})
    A, a, S = model.posterior()
    z = torch.linalg.solve_triangular(
        torch.linalg.cholesky(S), (dream.nodes["z"]["value"] - new @ A.T - a).T, upper=False
    ).detach()
    assert (z.mean(1).abs() < limit(4) / math.sqrt(400)).all()
    assert ((z.square().mean(1) - 1).abs() < limit(4) * math.sqrt(2 / 400)).all()


def test_annealing_beats_importance_sampling_from_a_poor_guide(float64):
    """q shifted by 1.5 sd, ten latents: IS with 5,000 draws is nats below, AIS is not."""
    model = LinearModel(10, 12, sigma=0.5)
    x = model.draw(8)
    _, _, S = model.posterior()
    with torch.no_grad():
        exact = model.log_evidence(x)
    guide = LinearGuide(model, scale=0.7, shift=1.5 * S.diagonal().sqrt())
    sampled = diagnostics.log_evidence(model, guide, x, num_particles=5000, seed=0)
    annealed = diagnostics.ais(model, guide, x, num_temperatures=100, seed=0)
    assert (exact - sampled.log_evidence).mean() > 1.0
    assert (exact - annealed.log_evidence).mean().abs() < 0.15
    assert sampled.khat.median() > 0.7


def test_quadrature_is_exact(float64):
    for latent in (1, 2):
        model, guide, x, (mean, S), exact = linear(latent=latent, scale=0.1, shift=3.0)
        found = diagnostics.quadrature(model, guide, x)
        assert (found.log_evidence - exact).abs().max() < 1e-8
        assert (found.mean - mean).abs().max() < 1e-8
        assert (found.covariance - S).abs().max() < 1e-8
        assert found.error.max() < 1e-8
        assert found.axes.shape == (12, latent, 161)


def test_quadrature_finds_a_narrow_posterior(float64):
    """A thousandth of the prior's width, between the points of the first grid."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1e-3), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    x = torch.tensor([0.31234, -1.7])
    found = diagnostics.quadrature(model, guide, x)
    exact = dist.Normal(0.0, math.sqrt(1 + 1e-6)).log_prob(x)
    torch.testing.assert_close(found.log_evidence, exact, atol=1e-8, rtol=0)
    with pytest.raises(ValueError, match=r"does not resolve the posterior of 2 datapoints"):
        diagnostics.quadrature(model, guide, x, num_points=33, tolerance=1e-14)


def several_modes(locs, sds, latent=1):
    """A mixture of normals as prior, data that hardly move it, and log p(x) of each datapoint."""
    locs, sds = torch.tensor(locs)[:, None].expand(-1, latent), torch.tensor(sds)
    weights = torch.ones(len(sds)) / len(sds)

    def model(x):
        with data_plate(x):
            parts = dist.Normal(locs, sds[:, None].expand(-1, latent)).to_event(1)
            z = pyro.sample("z", dist.MixtureSameFamily(dist.Categorical(weights), parts))
            pyro.sample("x", dist.Normal(z.sum(-1), 2.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), latent), 1.0).to_event(1))

    x = torch.tensor([-0.7, 0.4, 1.9])
    sd = (4 + latent * sds**2).sqrt()
    exact = dist.Normal(locs.sum(-1), sd).log_prob(x[:, None]) + weights.log()
    return model, guide, x, exact.logsumexp(-1)


@pytest.mark.parametrize(("locs", "sds", "points"), [
    ([-2.0, 2.0], [0.02, 0.02], 1201),
    ([-2.0, 2.0], [0.001, 0.001], 20_001),
    ([-2.0, 0.3, 2.5], [0.01, 0.01, 0.01], 3201),
    ([-2.0, 0.3, 2.5], [0.01, 0.04, 0.02], 3201),
    ([-1.0, 0.3], [1.0, 0.002], 12_001),  # in the middle of a wide one
    ([-1.0, 0.3, 0.9], [1.0, 0.002, 0.01], 12_001),
])  # fmt: skip
def test_quadrature_finds_all_modes_or_says_that_it_cannot(float64, locs, sds, points):
    model, guide, x, exact = several_modes(locs, sds)
    with pytest.raises(ValueError, match="does not resolve the posterior of 3") as refused:
        diagnostics.quadrature(model, guide, x)
    found = diagnostics.quadrature(model, guide, x, num_points=points)
    torch.testing.assert_close(found.log_evidence, exact, atol=1e-8, rtol=0)
    if max(sds) == 1:  # one mode in another: it is told to double the points until they do
        return
    needed = int(re.search(r"num_points=161 to (\d+)", str(refused.value))[1])
    assert needed < 10 * points
    found = diagnostics.quadrature(model, guide, x, num_points=needed)
    torch.testing.assert_close(found.log_evidence, exact, atol=1e-8, rtol=0)


@pytest.mark.parametrize("locs", [[-1.0, 1.0], [-1.0, 0.2, 1.3]])
def test_quadrature_finds_all_modes_of_two_latents(float64, locs):
    model, guide, x, exact = several_modes(locs, [0.1] * len(locs), latent=2)
    found = diagnostics.quadrature(model, guide, x[:2], num_points=161)
    torch.testing.assert_close(found.log_evidence, exact[:2], atol=1e-8, rtol=0)
    model, guide, x, exact = several_modes(locs, [0.004] * len(locs), latent=2)
    with pytest.raises(ValueError, match="does not resolve the posterior of 2"):
        diagnostics.quadrature(model, guide, x[:2])


@pytest.mark.parametrize("sd", [0.1, 0.004, 0.001])
def test_quadrature_finds_both_signs(float64, sd):
    """x is the square of z: two narrow modes of the likelihood, far from most draws."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z**2, sd), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros_like(x), 1.0))

    x = torch.tensor([0.5, 1.0, 1.7])
    z = torch.linspace(-4, 4, 1_000_001)
    joint = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z**2, sd).log_prob(x[:, None])
    exact = joint.logsumexp(1) + math.log(8e-6)
    found = diagnostics.quadrature(model, guide, x, num_points=161 if sd == 0.1 else 20_001)
    torch.testing.assert_close(found.log_evidence, exact, atol=1e-7, rtol=0)
    assert found.mean.abs().max() < 1e-8
    if sd < 0.1:
        with pytest.raises(ValueError, match="does not resolve the posterior of 3"):
            diagnostics.quadrature(model, guide, x)


@pytest.mark.slow
def test_evidence_methods_agree_on_a_decoder():
    """AIS from the prior and from a poor guide, importance sampling, quadrature: Z = 2."""
    model, prior, x = decoder_pair(2, sharp=2.0)
    torch.manual_seed(1)
    guide = guides.Normal(nets.mlp(60, 20, 4, activation=nn.Tanh))  # untrained
    exact = diagnostics.quadrature(model, guide, x).log_evidence
    for start in ("guide", "prior"):
        found = diagnostics.ais(model, guide, x, start=start, num_chains=32, seed=5)
        assert_within(found, exact)
    naive = diagnostics.log_evidence(model, prior, x, num_particles=20_000, seed=0)
    error = (naive.log_evidence - exact).abs()
    assert (error < limit(8) * naive.log_evidence_se + naive.log_evidence_se.square()).all()


@pytest.mark.slow
def test_gaussian_fitted_to_hmc_draws_is_a_good_proposal():
    """HMC, then IS from a normal fitted to its draws: k-hat small, evidence as quadrature's."""
    model, guide, x = decoder_pair(2, sharp=2.0)
    exact = diagnostics.quadrature(model, guide, x).log_evidence
    z = diagnostics.hmc(model, guide, x, seed=0).flat("z")
    covariance = torch.stack([torch.cov(column.T) for column in z.transpose(0, 1)])

    mean = z.mean(0)

    def fitted(x, rows):
        with data_plate(x):
            pyro.sample("z", dist.MultivariateNormal(mean[rows], 1.5 * covariance[rows]))

    rows = torch.arange(len(x))
    found = diagnostics.log_evidence(Indexed(model), fitted, x, rows, num_particles=4000, seed=0)
    assert (found.log_evidence - exact).abs().max() < 0.1 and found.khat.median() < 0.7


def test_schedule():
    betas = diagnostics.sigmoid_schedule(10)
    assert betas[0] == 0 and betas[-1] == 1 and (betas.diff() > 0).all()
    torch.testing.assert_close(betas + betas.flip(0), torch.ones_like(betas))  # symmetric


# -- bad use ---------------------------------------------------------------------------------------


def test_discrete_latents_are_refused():
    model = MixtureModel()

    def guide(x):
        with data_plate(x):
            pyro.sample("c", dist.Categorical(torch.ones(len(x), 3)))
            pyro.sample("z", dist.Normal(x, 1.0))

    for call in (diagnostics.hmc, diagnostics.metropolis, diagnostics.ais, diagnostics.quadrature):
        with pytest.raises(ValueError, match=r"latent 'c' is discrete.*enumerate.*parallel"):
            call(model, guide, torch.zeros(2))


def test_empty_selection_and_bad_data():
    model, guide, x, _, _ = linear()
    for call in (diagnostics.hmc, diagnostics.ais, diagnostics.quadrature, diagnostics.metropolis):
        with pytest.raises(PairError, match="'x' is empty"):
            call(model, guide, x[:0])
        with pytest.raises(PairError, match="row 1"):
            call(model, guide, torch.where(torch.arange(12).unsqueeze(-1) == 1, math.nan, x))
    with pytest.raises(PairError, match="'x' is empty"):
        diagnostics.nuts(model, x[:0])


def test_non_finite_start_names_site_and_datapoint():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            scale = torch.where(x > 4, math.nan, 1.0)
            pyro.sample("x", dist.Normal(z, scale, validate_args=False), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0))

    x = torch.tensor([0.0, 1.0, 5.0, 6.0])
    message = "'x' of the model: .* NaN or infinite for 2 of 4 datapoints, the first is row 2"
    far = torch.cat([torch.zeros(200), x])  # beyond the rows that the pair is tried on
    far_message = (
        r"site 'x' is NaN or infinite at draws of the guide for 2 of 204 datapoints, the first is "
        r"datapoint 202; .* or begin at draws of the prior"
    )
    for call in (diagnostics.hmc, diagnostics.ais, diagnostics.metropolis):
        with pytest.raises(ValueError, match=message):
            call(model, guide, x)
        with pytest.raises(ValueError, match=far_message):
            call(model, guide, far, max_rows=10_000)


def test_supports_agree_if_their_coordinates_do(float64):
    """A log-normal guide of a Gamma latent: both in (0, inf), by u = log z."""

    def model(x):
        with data_plate(x):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("rate", dist.LogNormal((1 + x / 2).log(), 0.6))

    x = torch.tensor([0.0, 3.0, 8.0])
    result = diagnostics.ais(model, guide, x, num_temperatures=30, seed=0)
    exact = dist.NegativeBinomial(2.0, probs=torch.tensor(0.5)).log_prob(x)
    assert ((result.log_evidence - exact).abs() < 5 * result.log_evidence_se + 1e-3).all()


@pytest.mark.parametrize("name", ALL_PAIRS)
def test_every_pair_has_a_density(name):
    """Every kind of prior has coordinates, a density and a gradient in them."""
    model, guide, args = build(name)
    joint = Joint(model, guide, *args)
    u = joint.draw_q(2)
    value, gradient = joint.value_and_grad(u)
    assert value.shape == u.shape[:2] and value.isfinite().all() and gradient.isfinite().all()


def test_a_mixture_prior(float64):
    """A VampPrior, say: torch knows no map onto a mixture's support, which is its components'."""
    logits, locs = torch.tensor([0.3, 0.7]).log(), torch.tensor([[-2.0, 0.0], [2.0, 1.0]])

    def model(x):
        with data_plate(x):
            parts = dist.Normal(locs, 0.7).to_event(1)
            prior = dist.MixtureSameFamily(dist.Categorical(logits=logits), parts)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))

    x = torch.tensor([[1.0, 0.5], [0.2, 0.0]])
    exact = (logits + dist.Normal(locs, 1.49**0.5).log_prob(x[:, None]).sum(-1)).logsumexp(1)
    found = diagnostics.quadrature(model, guide, x)
    torch.testing.assert_close(found.log_evidence, exact)
    annealed = diagnostics.ais(model, guide, x, num_temperatures=50, num_chains=64, seed=0)
    assert ((annealed.log_evidence - exact).abs() < 5 * annealed.log_evidence_se + 1e-3).all()
    draws = diagnostics.hmc(model, guide, x, num_draws=100, max_reruns=0, seed=0)
    assert ((draws.flat("z").mean(0) - found.mean).abs() < 0.5 * found.sd).all()


def test_intervals_of_other_ends_are_other_coordinates():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Uniform(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, high=0.5):
        with data_plate(x):
            pyro.sample("z", dist.Uniform(0.0, high))

    x = torch.zeros(2)
    with pytest.raises(ValueError, match="its support is not the model's"):
        diagnostics.ais(model, guide, x, num_temperatures=5)
    result = diagnostics.ais(model, lambda x: guide(x, 1.0), x, num_temperatures=20, seed=0)
    exact = math.log(dist.Normal(0.0, 1.0).cdf(torch.tensor(1.0)).item() - 0.5)
    assert ((result.log_evidence - exact).abs() < 5 * result.log_evidence_se + 1e-3).all()


def test_arviz_is_asked_for_before_the_chains_run(monkeypatch):
    model, guide, x, _, _ = linear(rows=2)
    monkeypatch.setitem(sys.modules, "arviz", None)
    monkeypatch.setattr(Joint, "draw_q", None)
    with pytest.raises(ImportError, match="pip install arviz"):
        diagnostics.hmc(model, guide, x)
    with pytest.raises(ImportError, match="pip install arviz"):
        diagnostics.nuts(model, x)


def test_nuts_refuses_discrete_latents():
    """Pyro sums them out, and log p(x, z) at its draws would be at a random state of theirs."""

    def model(x):
        with data_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"'c' is discrete \(Bernoulli\).*diagnostics.hmc"):
        diagnostics.nuts(model, torch.zeros(2))


def test_latent_outside_the_data_plate():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="'z' lies outside the plate 'data'"):
        diagnostics.hmc(model, guide, torch.zeros(3))


def test_guides_without_a_density_say_so():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    flow = dist.transforms.Planar(2)

    def planar(x):
        base = dist.Normal(torch.zeros(len(x), 2), 1.0).to_event(1)
        with data_plate(x):
            pyro.sample("z", dist.TransformedDistribution(base, [flow]))

    def auxiliary(x):
        with data_plate(x):
            a = pyro.sample("a", dist.Normal(x, 1.0), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Normal(torch.stack([a, a], -1), 1.0).to_event(1))

    x = torch.zeros(3)
    for guide, why in ((planar, "no inverse"), (auxiliary, "auxiliary latents")):
        with pytest.raises(ValueError, match=f'{why}.*start="prior"'):
            diagnostics.ais(model, guide, x, num_temperatures=3)
        found = diagnostics.ais(model, guide, x, num_temperatures=3, start="prior")
        assert found.log_evidence.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 1}, "num_chains must be at least 2"),
        ({"num_draws": 3}, "num_draws must be at least 8"),
        ({"num_warmup": 5}, "num_warmup must be at least 20"),
        ({"num_leapfrog": 0}, "num_leapfrog must be at least 1"),
        ({"step_size": -1.0}, "step_size must be positive"),
        ({"target_accept": 1.0}, "target_accept must lie"),
        ({"start": "encoder"}, 'start must be "guide" or "prior"'),
    ],
)
def test_bad_settings(options, message):
    model, guide, x, _, _ = linear(rows=2)
    with pytest.raises(ValueError, match=message):
        diagnostics.hmc(model, guide, x, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_chains": 1}, "num_chains must be at least 2"),
        ({"num_temperatures": 0}, "num_temperatures must be at least 1"),
        ({"temperatures": torch.tensor([0.0, 0.5])}, "from 0 to 1"),
        ({"temperatures": torch.tensor([0.0, 0.7, 0.5, 1.0])}, "must rise"),
        ({"temperatures": torch.tensor([0.0, 0.5, 0.5, 1.0])}, "must rise"),
        ({"start": "encoder"}, 'start must be "guide" or "prior"'),
    ],
)
def test_bad_annealing(options, message):
    model, guide, x, _, _ = linear(rows=2)
    with pytest.raises(ValueError, match=message):
        diagnostics.ais(model, guide, x, **options)


def test_quadrature_refuses_many_latents():
    model, guide, x, _, _ = linear(rows=2, latent=3)
    with pytest.raises(ValueError, match="this model has 3 per datapoint"):
        diagnostics.quadrature(model, guide, x)


def test_draws_of_other_data_are_refused(float64):
    model, guide, x, _, _ = linear(rows=3)
    draws = diagnostics.hmc(model, guide, x, num_draws=20, num_warmup=20, max_reruns=0)
    with pytest.raises(ValueError, match="draws are of 3 datapoints"):
        diagnostics.reverse_ais(model, guide, x[:2], draws=draws)
    with pytest.raises(ValueError, match="fewer than num_chains"):
        diagnostics.reverse_ais(model, guide, x, draws=draws, num_chains=1000)


def test_verdict_says_what_to_do(float64):
    draws = chains(4)[-1]
    assert "all 4 datapoints passed" in repr(draws)
    assert draws.rhat.max() <= RHAT and draws.ess.min() >= 4 * ESS_PER_CHAIN


def test_draws_of_the_guide_are_unconstrained(float64):
    """log p - log q of the coordinates is that of the positive values: both change alike."""

    def model(x):
        with data_plate(x):
            rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(rate), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("rate", dist.Gamma(2.5 + x, 2.0))

    x = torch.tensor([0.0, 1.0, 4.0])
    joint = Joint(model, guide, x)
    torch.manual_seed(5)
    u = joint.draw_q(6)
    torch.manual_seed(5)
    weights = ppvae.log_weights(model, guide, x, num_particles=6)
    torch.testing.assert_close(joint(u) - joint.log_q(u), weights.log_w.detach())
    drawn = weights.guide_trace.nodes["rate"]["value"]
    torch.testing.assert_close(u[..., 0], drawn.log())


def test_a_rerun_is_of_the_datapoints_that_failed(float64, monkeypatch):
    """Each datapoint keeps the draws that were made at its own data."""
    model, guide, x, _, _ = linear(rows=4)

    def run(joint, make, settings, method, rerun):
        rows = len(joint.args[0])
        values = joint.args[0][:, :1].expand(2, 8, rows, 1) + rerun
        rhat = torch.ones(rows).masked_fill((joint.args[0] == x[2]).all(1) & (rerun == 0), 2.0)
        zeros, ess = torch.zeros(rows), torch.full((rows,), 1e6)
        names = [field.name for field in dataclasses.fields(diagnostics.PosteriorDraws)]
        given = {"draws": {"z": values}, "unconstrained": values, "log_joint": values[..., 0]}
        given |= {"rhat": rhat, "ess": ess, "method": method, "seconds": 0.0}
        return diagnostics.PosteriorDraws(**{name: given.get(name, zeros) for name in names})

    monkeypatch.setattr(chains_of, "_run", run)
    found = diagnostics.hmc(model, guide, x, num_draws=8, num_chains=2)
    expected = x[:, 0] + torch.tensor([0.0, 0.0, 1.0, 0.0])
    assert torch.equal(found.unconstrained[0, 0, :, 0], expected)
