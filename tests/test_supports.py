"""Latents on circles, spheres, simplices and in matrices: every evaluator is right, or refuses."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import biject_to

import ppvae
from ppvae import diagnostics, elbo
from ppvae.check.behaviour import Turn
from ppvae.check.programs import PairError
from ppvae.program import data_plate

X = torch.tensor([0.2, 1.5])
SD = 0.7  # of the data, around the mean of what a latent holds


def prior(name, rows):
    """A prior of each support; VonMises far from uniform, and cut where it has mass."""
    one = torch.ones(rows)
    return {
        "Normal": lambda: dist.Normal(0 * one, 1.0),
        "LogNormal": lambda: dist.LogNormal(0 * one, 0.5),
        "HalfNormal": lambda: dist.HalfNormal(one),
        "Gamma": lambda: dist.Gamma(3 * one, 2.0),
        "Beta": lambda: dist.Beta(2 * one, 3.0),
        "Uniform": lambda: dist.Uniform(-one, 2.0),
        "VonMises": lambda: dist.VonMises(2.5 * one, 1.0),
        "Dirichlet": lambda: dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0]).expand(rows, 3)),
        "LKJCholesky": lambda: dist.LKJCholesky(2, torch.tensor(2.0)).expand([rows]),
        "ProjectedNormal": lambda: dist.ProjectedNormal(torch.tensor([1.0, 0.0, 0.5])).expand(
            [rows]
        ),
    }[name]()


def pair(name):
    """The prior as guide: log-weights are right on every support."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", prior(name, len(x)))
            seen = z.reshape(*z.shape[: z.dim() - len(z_event(name))], -1)
            level = seen @ torch.arange(1.0, seen.shape[-1] + 1) if z_event(name) else z
            pyro.sample("x", dist.Normal(level, SD), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", prior(name, len(x)))

    return model, guide


def z_event(name):
    return prior(name, 1).event_shape


SCALARS = ("Normal", "LogNormal", "HalfNormal", "Gamma", "Beta", "Uniform", "VonMises")
VECTORS = ("Dirichlet", "LKJCholesky")


def exact(name, x=X):
    """log p(x) and E[z | x]: the midpoint rule in z itself, with torch's own densities."""
    if name in SCALARS:
        low, high = {
            "Normal": (-9, 9), "Beta": (0, 1), "Uniform": (-1, 2), "VonMises": (-math.pi, math.pi)
        }.get(name, (0, 40))  # fmt: skip
        n = 400_000
        z = low + (high - low) * (torch.arange(n) + 0.5) / n
        log_p, cell, level = prior(name, n).log_prob(z), (high - low) / n, z
    elif name == "Dirichlet":  # over z1, z2, the last is what is left
        n = 1500
        one = (torch.arange(n) + 0.5) / n
        a, b = torch.meshgrid(one, one, indexing="ij")
        inside = a + b < 1 - 1e-9
        z = torch.stack([a, b, 1 - a - b], -1)[inside]
        log_p = dist.Dirichlet(torch.tensor([2.0, 1.0, 3.0]), validate_args=False).log_prob(z)
        cell, level = 1 / n**2, z @ torch.tensor([1.0, 2.0, 3.0])
    else:  # the correlation r of two has density (1 - r^2)^(eta - 1), eta = 2
        n = 400_000
        r = -1 + 2 * (torch.arange(n) + 0.5) / n
        log_p, cell = (0.75 * (1 - r**2)).log(), 2 / n
        level = 1.0 + 3 * r + 4 * (1 - r**2).sqrt()
        z = r
    terms = log_p + dist.Normal(level, SD).log_prob(x[:, None])
    weights = terms.softmax(-1)
    return terms.logsumexp(-1) + math.log(cell), weights @ z


@pytest.fixture
def x(float64):
    return X.double()


@pytest.mark.parametrize("name", SCALARS + VECTORS)
def test_log_evidence(name, x):
    model, guide = pair(name)
    ppvae.check_pair(model, guide, x)
    found = diagnostics.log_evidence(model, guide, x, num_particles=20_000, seed=0)
    assert ((found.log_evidence - exact(name, x)[0]).abs() < 5 * found.log_evidence_se).all()


@pytest.mark.parametrize("name", SCALARS + VECTORS)
def test_quadrature(name, x):
    found = diagnostics.quadrature(*pair(name), x, num_points=321)
    # the midpoint rule of the oracle is inexact at edges where the density jumps
    tolerance = 2e-3 if name == "Dirichlet" else 1e-6
    torch.testing.assert_close(found.log_evidence, exact(name, x)[0], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", SCALARS + VECTORS)
@pytest.mark.parametrize("start", ["guide", "prior"])
def test_annealing(name, start, x):
    found = diagnostics.ais(
        *pair(name), x, start=start, num_chains=200, num_temperatures=15, seed=0
    )
    error = (found.log_evidence - exact(name, x)[0]).abs()
    assert (error < 5 * found.log_evidence_se + 1e-3).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALARS + VECTORS)
def test_annealing_from_above(name, x):
    model, guide = pair(name)
    draws = diagnostics.hmc(model, guide, x, seed=0)
    found = diagnostics.reverse_ais(
        model, guide, x, draws=draws, num_chains=64, num_temperatures=100, seed=0
    )
    error = (found.log_evidence - exact(name, x)[0]).abs()
    assert (error < 5 * found.log_evidence_se + 0.02).all()
    assert diagnostics.bdmc(model, guide, x, num_temperatures=50, seed=0).gap.abs().max() < 0.3


def moments_are_right(name, draws, x, rhat=1.01):
    z = draws.draws["z"]
    if name == "Dirichlet":
        assert torch.allclose(z.sum(-1), torch.ones(()))
    z = z[..., 1, 0] if name == "LKJCholesky" else z
    z, mean = z.reshape(*z.shape[:3], -1), exact(name, x)[1].reshape(len(x), -1)
    assert (draws.rhat <= rhat).all()
    flat = z.flatten(0, 1)
    error = (flat.mean(0) - mean).abs()
    assert (error < 5 * flat.std(0) / draws.ess.sqrt()[:, None] + 1e-3).all(), error


@pytest.mark.slow
@pytest.mark.parametrize("name", SCALARS + VECTORS)
@pytest.mark.parametrize("method", ["hmc", "metropolis"])
def test_chains(method, name, x):
    draws = getattr(diagnostics, method)(*pair(name), x, seed=1, max_reruns=3)
    moments_are_right(name, draws, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in SCALARS + VECTORS if n != "VonMises"])
def test_nuts(name, x):
    draws = diagnostics.nuts(pair(name)[0], x[:1], num_draws=700, seed=0)
    moments_are_right(name, draws, x[:1], rhat=1.05)


@pytest.mark.parametrize("name", ["VonMises", "ProjectedNormal"])
def test_nuts_refuses_what_it_would_get_wrong(name):
    why = "is an angle" if name == "VonMises" else "has no unconstrained coordinates"
    with pytest.raises(ValueError, match=f"latent 'z'.*{why}.*use diagnostics"):
        diagnostics.nuts(pair(name)[0], X)


def test_a_sphere_has_no_coordinates(x):
    """No chain, no annealing, no grid; a step, evidence and a report are as of any other pair."""
    model, guide = pair("ProjectedNormal")
    for call in ("hmc", "metropolis", "ais", "bdmc", "quadrature"):
        with pytest.raises(ValueError, match=r"latent 'z' \(ProjectedNormal, .*no unconstrained"):
            getattr(diagnostics, call)(model, guide, x)
    assert "equal event shapes and support" in str(ppvae.check_pair(model, guide, x))
    found = diagnostics.log_evidence(model, guide, x, num_particles=2000, seed=0)
    report = ppvae.diagnose(model, guide, x, num_particles=2000, seed=1)
    spread = (found.log_evidence_se**2 + report.log_evidence_se**2).sqrt()
    assert ((found.log_evidence - report.log_evidence).abs() < 5 * spread).all()


# -- angles ------------------------------------------------------------------------------------


def test_turn_is_a_density(float64):
    u = torch.linspace(-8, 8, 4001)
    turn = Turn()
    z = turn(u)
    torch.testing.assert_close(turn.log_abs_det_jacobian(u, z).exp().sum() * (u[1] - u[0]),
                               torch.tensor(2 * math.pi))  # fmt: skip
    inside = u.abs() < 5
    torch.testing.assert_close(turn.inv(z[inside]), u[inside], atol=1e-6, rtol=1e-6)
    ends = torch.tensor([-math.pi, math.pi])
    assert turn.inv(ends).isfinite().all() and turn.inv(ends.float()).isfinite().all()


AROUND_ZERO = dist.VonMises(torch.tensor(0.0), torch.tensor(1.0))


def on_circle(q, p=AROUND_ZERO):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", p.expand([len(x)]))
            pyro.sample("x", dist.VonMises(z, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", q.expand([len(x)]))

    return model, guide


def test_a_guide_over_the_line_counts_an_angle_many_times(float64):
    """p(x, z) is periodic, so its integral over the line is infinite, however narrow q is."""
    x = X.double()
    mixed = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.VonMises(torch.tensor([0.0, 2.0]), 3.0)
    )
    for prior_ in (AROUND_ZERO, mixed):
        for sd in (1e-3, 1.0, 100.0):
            model, guide = on_circle(dist.Normal(torch.tensor(0.0), sd), prior_)
            for call in (
                lambda: ppvae.check_pair(model, guide, x),  # noqa: B023
                lambda: ppvae.SVI(model, guide).step(x),  # noqa: B023
                lambda: diagnostics.log_evidence(model, guide, x),  # noqa: B023
                lambda: ppvae.diagnose(model, guide, x),  # noqa: B023
            ):
                with pytest.raises(
                    PairError, match=r"'z': .* is an angle in \(-pi, pi\], and Norm"
                ):
                    call()


@pytest.mark.parametrize("q", [
    dist.VonMises(torch.tensor(1.0), torch.tensor(0.5)),
    dist.Uniform(torch.tensor(-math.pi), torch.tensor(math.pi)),
])  # fmt: skip
def test_guides_within_one_turn_are_right(q):
    x = X
    model, guide = on_circle(q)
    assert ppvae.check_pair(model, guide, x).notes == ()
    n = 100_000
    z = -math.pi + 2 * math.pi * (torch.arange(n, dtype=torch.float64) + 0.5) / n
    one = z.new_ones(())
    right = dist.VonMises(0 * one, one).log_prob(z) + dist.VonMises(z, one).log_prob(
        x.double()[:, None]
    )
    right = right.logsumexp(-1) + math.log(2 * math.pi / n)
    found = diagnostics.log_evidence(model, guide, x, num_particles=20_000, seed=0)
    assert ((found.log_evidence - right).abs() < 5 * found.log_evidence_se).all()
    assert (elbo.ELBO(5000).evaluate(model, guide, x) < right).all()
    found = diagnostics.quadrature(model, guide, x)  # in float32
    assert ((found.log_evidence - right).abs() < 1e-4).all()


def test_an_autoguide_of_an_angle_is_refused():
    model, _ = on_circle(dist.Uniform(-1.0, 1.0))
    guide = pyro.infer.autoguide.AutoNormal(model)
    with pytest.raises(PairError, match="is an angle"):
        ppvae.check_pair(model, guide, X)


def test_observed_angles_may_be_in_any_turn():
    model, guide = on_circle(dist.VonMises(torch.tensor(1.0), torch.tensor(0.5)))
    near, far = (ppvae.log_weights(model, guide, X + turn).log_w for turn in (0.0, 2 * math.pi))
    assert near.shape == far.shape
    ppvae.check_pair(model, guide, X + 2 * math.pi)


# -- what a guide's support means ----------------------------------------------------------------


def supports(q, p):
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", p.expand([len(x)]))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", q.expand([len(x)]))

    return " ".join(ppvae.check_pair(model, guide, X).notes)


LARGER, SMALLER = "the model does not allow", "the ELBO stays a lower bound"
UNIT, WIDE = dist.Uniform(0.0, 1.0), dist.Uniform(-100.0, 100.0)


@pytest.mark.parametrize(("q", "p", "larger", "smaller"), [
    (dist.Normal(0.0, 1.0), WIDE, True, False),
    (WIDE, dist.Normal(0.0, 1.0), False, True),
    (dist.LogNormal(-3.0, 0.1), UNIT, True, False),
    (UNIT, dist.Gamma(2.0, 1.0), False, True),
    (dist.Uniform(0.2, 2.01), dist.Uniform(0.0, 2.0), True, True),
    (dist.Beta(2.0, 2.0), UNIT, False, False),
    (dist.Gamma(2.0, 1.0), dist.LogNormal(0.0, 1.0), False, False),
])  # fmt: skip
def test_which_support_exceeds_which(q, p, larger, smaller):
    said = supports(q, p)
    assert (LARGER in said, SMALLER in said) == (larger, smaller), said


def test_a_draw_outside_says_what_follows():
    with pytest.raises(
        PairError, match=r"outside the model's support, .*: the prior is 0 there.*-inf"
    ):
        supports(dist.Uniform(2.0, 3.0), UNIT)


def test_nan_is_no_matter_of_support():
    with pytest.raises(PairError, match="'z': the guide draws 2 NaN of 2 values"):
        supports(dist.Normal(math.nan, 1.0, validate_args=False), dist.Normal(0.0, 1.0))


def test_every_support_of_torch_has_what_is_said():
    """The map that is used is torch's, but for angles."""
    for name in SCALARS + VECTORS:
        fn = prior(name, 2)
        there = ppvae.check.behaviour.coordinates(fn)
        if name == "VonMises":
            assert isinstance(there, Turn)
        else:
            assert type(there) is type(biject_to(fn.support))


# ------------------------------------------------------------------------------ masked latents

ROWS = torch.tensor([0.3, -1.2, 2.0])
SHOWN = torch.tensor([True, False, True])


def masked_pair(data_too, in_guide):
    """z ~ N(0, 1), x ~ N(z, 1) under a guide N(x / 2, 0.8); a mask hides z in the second row."""

    def model(x, shown):
        with data_plate(x):
            with pyro.poutine.mask(mask=shown):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            with pyro.poutine.mask(mask=shown if data_too else True):
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, shown):
        with data_plate(x), pyro.poutine.mask(mask=shown if in_guide else True):
            pyro.sample("z", dist.Normal(x / 2, 0.8))

    return model, guide


@pytest.mark.parametrize(
    ("data_too", "in_guide"), [(True, True), (False, True), (False, False)], ids=str
)
def test_where_a_latent_is_masked_all_evaluators_mean_what_a_log_weight_means(data_too, in_guide):
    """Of a hidden row: the guide's draws count as the prior's; or, hidden in the model, a flat one.

    So log p(x) there is 0, the log of the mean of N(x; z, 1) over the guide, or over the line.
    """
    model, guide = masked_pair(data_too, in_guide)
    hidden = torch.zeros(3)
    if in_guide and not data_too:
        hidden = dist.Normal(ROWS / 2, (1 + 0.8**2) ** 0.5).log_prob(ROWS)
    exact = torch.where(SHOWN, dist.Normal(0.0, 2**0.5).log_prob(ROWS), hidden).double()
    grid = diagnostics.quadrature(model, guide, ROWS, SHOWN)
    torch.testing.assert_close(grid.log_evidence, exact, atol=1e-4, rtol=0)
    sampled = diagnostics.log_evidence(model, guide, ROWS, SHOWN, num_particles=20_000, seed=0)
    assert ((sampled.log_evidence - exact).abs() < 5 * sampled.log_evidence_se + 1e-5).all()
    for start in ("guide", "prior"):
        found = diagnostics.ais(model, guide, ROWS, SHOWN, num_chains=64, start=start, seed=0)
        error = (found.log_evidence - exact).abs()
        assert (error < 5 * found.log_evidence_se + 0.02).all(), start


@pytest.mark.slow
def test_chains_where_a_latent_is_masked():
    """A hidden latent has the guide's law."""
    draws = diagnostics.hmc(*masked_pair(True, True), ROWS, SHOWN, seed=0)
    assert draws.converged.all()
    scale = torch.where(SHOWN, 0.5**0.5, 0.8)
    assert ((draws.mean("z") - ROWS / 2).abs() < 0.1).all()
    assert ((draws.sd("z") - scale).abs() < 0.1).all()


def test_a_density_that_does_not_fall_is_no_density():
    """However many points the grid has: it reaches where it reaches."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
            pyro.factor("undone", -dist.Normal(0.0, 1.0).log_prob(z))
            pyro.sample("x", dist.Normal(torch.zeros(()), 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    with pytest.raises(ValueError, match="of datapoint 0 lacks a part"):
        diagnostics.quadrature(model, guide, ROWS, num_points=2001)
