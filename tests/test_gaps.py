"""Gaps, comparisons with a reference, and their pictures, against closed forms."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from torch import nn

from oracles import LinearGuide, LinearModel, linear_elbo
from ppvae import conditionals, diagnostics, guides, models, nets, plots, posteriors
from ppvae.check.programs import PairError
from ppvae.diagnostics.compare_posteriors import _sliced
from ppvae.diagnostics.gaps import _elbo
from ppvae.local import Indexed, fit_local
from ppvae.program import data_plate
from ppvae.weights import log_weights


class Correlated(LinearModel):
    """A linear-Gaussian model whose posterior is correlated, so a diagonal q cannot be exact."""

    def __init__(self):
        super().__init__(2, 5)
        with torch.no_grad():
            self.weight.copy_(self.weight @ torch.tensor([[1.0, 0.9], [0.0, 0.6]]))


class Encoder(guides.Amortized):
    """Amortised with an affine network that is set, not trained."""

    def __init__(self, weight, outputs):
        net = nn.Linear(weight.shape[1], len(outputs))
        with torch.no_grad():
            net.weight.zero_()
            net.weight[: len(weight)].copy_(weight)
            net.bias.copy_(outputs)
        super().__init__(conditionals.Normal(net))


def problem(rows=10, scale=1.5, shift=0.3):
    """Model, a wrong diagonal guide, data, and the exact gaps of each row."""
    model = Correlated()
    x = model.draw(rows)
    A, a, S = model.posterior()
    best = S.inverse().diagonal().rsqrt()  # the best diagonal q has the precisions' diagonal
    guide = Encoder(A, torch.cat([a + shift, (scale * best).log()]))
    approximation = 0.5 * (S.logdet() - 2 * best.log().sum())  # KL(q* || p), the same for all x
    P = S.inverse()
    shifts = torch.full((2,), shift)
    sd = scale * best
    total = 0.5 * ((P.diagonal() * sd**2).sum() + shifts @ P @ shifts - 2 + S.logdet()) - (
        sd.log().sum()
    )
    return model, guide, x, approximation.abs(), total - approximation.abs()


def test_gaps_equal_their_closed_form(float64):
    model, guide, x, approximation, amortisation = problem()
    with torch.no_grad():
        exact = model.log_evidence(x)
    found = diagnostics.gaps(
        model, guide, x, num_particles=4000, steps=400, num_temperatures=50, seed=0
    )
    # the closed forms agree with an independent ELBO
    linear = LinearGuide(model)
    A, a, _ = model.posterior()
    with torch.no_grad():
        linear.A.copy_(A), linear.a.copy_(a + 0.3)
        linear.log_scale.copy_(guide.conditional.net.bias[2:])
        bound = linear_elbo(model, linear, x)
    torch.testing.assert_close(exact - bound, (approximation + amortisation).expand(10))
    for value, se, truth in (
        (found.log_evidence, found.log_evidence_se, exact),
        (found.elbo, found.elbo_se, bound),
        (found.approximation, found.approximation_se, approximation),
        (found.amortisation, found.amortisation_se, amortisation),
    ):
        assert ((value - truth).abs() < 4.5 * se + 2e-3).all(), ((value - truth) / se).abs().max()
    assert "Monte Carlo" in repr(found) and "own family" in repr(found)
    table = found.table()
    assert table.loc["total gap", "mean"] == pytest.approx(found.total.mean().item())


def test_standard_errors_by_their_formulas(float64):
    """Over datapoints sd / sqrt N; each difference has the errors of its own two terms."""
    draw = torch.Generator().manual_seed(0)
    log_p, bound, best = torch.randn(3, 9, generator=draw)
    log_p_se, bound_se, best_se = torch.rand(3, 9, generator=draw)
    found = diagnostics.Gaps(
        log_p, log_p_se, None, None, bound, bound_se, {"own": best}, {"own": best_se}, "exact"
    )
    torch.testing.assert_close(found.approximation_se, torch.hypot(log_p_se, best_se))
    torch.testing.assert_close(found.amortisation_se, torch.hypot(bound_se, best_se))
    table = found.table()
    for name, values, variance in (
        ("log p(x)", log_p, log_p_se**2),
        ("total gap", log_p - bound, log_p_se**2 + bound_se**2),
        ("approximation gap", log_p - best, log_p_se**2 + best_se**2),
        ("amortisation gap", best - bound, bound_se**2 + best_se**2),
    ):
        row = table.loc[name]
        assert row["mean"] == pytest.approx(values.mean().item())
        assert row["se"] == pytest.approx(values.std().item() / 3)
        assert row["mc_se"] == pytest.approx(variance.sum().sqrt().item() / 9)


def test_the_bound_of_a_pair_with_dropout_is_that_of_evaluation(float64):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 12, dropout=0.9)), latent_dim=2)
    guide = guides.Normal(nets.mlp(12, 8, 4, dropout=0.9))
    x = torch.bernoulli(torch.full((4, 12), 0.5))
    found = diagnostics.gaps(
        model, guide, x, log_evidence=torch.zeros(4), num_particles=500, steps=1, seed=0
    )
    assert model.training and guide.training
    model.eval(), guide.eval()
    with torch.no_grad():
        log_w = log_weights(model, guide, x, num_particles=20_000).log_w
    se = torch.hypot(found.elbo_se, log_w.std(0) / math.sqrt(20_000))
    assert ((found.elbo - log_w.mean(0)).abs() < 4.5 * se).all()


@pytest.mark.parametrize("rows", [2, pytest.param(6, marks=pytest.mark.slow)])
def test_known_evidence_and_a_richer_family(float64, rows):
    """With full covariance and a known log p(x), nothing is left: q* is the posterior."""
    model, guide, x, approximation, _ = problem(rows=rows)
    exact = model.log_evidence(x).detach()
    with torch.no_grad():
        outputs = torch.cat([guide.outputs(x), torch.zeros(rows, 1)], -1)
    full = guides.PerDatapoint(posteriors.FullNormal(nn.Identity(), 2), outputs)
    found = diagnostics.gaps(
        model,
        guide,
        x,
        local={"own family": guide.local(x), "full covariance": full},
        log_evidence=exact,
        steps=600,
        seed=0,
    )
    assert (found.log_evidence_se == 0).all() and "as given" in found.note
    rest = found.log_evidence - found.local["full covariance"]
    assert rest.abs().max() < 5e-3
    assert ((found.approximation - approximation).abs() < 4.5 * found.approximation_se + 2e-3).all()
    assert "approximation gap, full covariance" in found.table().index


@pytest.mark.parametrize("method", ["exact", pytest.param("HMC", marks=pytest.mark.slow)])
def test_upper_side_from_posterior_draws(float64, method):
    model, guide, x, _, _ = problem(rows=5)
    exact = model.log_evidence(x).detach()
    if method == "HMC":
        draws = diagnostics.hmc(model, guide, x, seed=0)
    else:
        A, a, S = model.posterior()
        draws = fake_reference(x @ A.T + a + torch.randn(4, 100, 5, 2) @ torch.linalg.cholesky(S).T)
    found = diagnostics.gaps(
        model, guide, x, reference=draws, steps=100, num_temperatures=30, seed=0
    )
    assert draws.converged.all() and f"reverse AIS from {method} draws, if exact" in found.note
    assert ((found.upper - exact).abs() < 4.5 * found.upper_se + 1e-3).all()
    assert "upper - lower" in found.table().index


def test_amortisation_dominates_for_an_untrained_encoder():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 12)), latent_dim=2)
    guide = guides.Normal(nets.mlp(12, 8, 4))
    x = torch.bernoulli(torch.full((8, 12), 0.5))
    before = {k: v.clone() for k, v in (model.state_dict() | guide.state_dict()).items()}
    state = torch.random.get_rng_state()
    found = diagnostics.gaps(model, guide, x, steps=200, num_temperatures=20, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = model.state_dict() | guide.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())  # nothing was trained
    assert (found.amortisation > found.approximation).all()
    assert "amortisation dominates" in repr(found)


def test_conditional_pair_and_one_datapoint():
    torch.manual_seed(0)
    one_hot = nets.OneHot(3)
    model = models.CVAE(
        conditionals.Bernoulli(nets.mlp(2 + 3, 8, 5)), latent_dim=2, condition=one_hot
    )
    guide = guides.Normal(nets.mlp(5 + 3, 8, 4), condition=one_hot)
    x, y = torch.ones(1, 5), torch.tensor([2])
    found = diagnostics.gaps(model, guide, x, y, steps=20, num_temperatures=5, seed=0)
    assert found.total.shape == (1,) and found.total.isfinite().all()
    assert "neither dominates" in repr(found)  # one datapoint has no standard error


def test_bad_use(float64):
    model, guide, x, _, _ = problem(rows=3)
    with pytest.raises(ValueError, match=r"LinearGuide has no method local.*PerDatapoint"):
        diagnostics.gaps(model, LinearGuide(model), x)
    with pytest.raises(PairError, match="'x' is empty"):
        diagnostics.gaps(model, guide, x[:0])
    with pytest.raises(ValueError, match=r"one value per datapoint, \(3,\), got shape \(2,\)"):
        diagnostics.gaps(model, guide, x, log_evidence=torch.zeros(2))
    with pytest.raises(ValueError, match="num_particles must be at least 2"):
        diagnostics.gaps(model, guide, x, num_particles=1)
    with pytest.raises(ValueError, match="local must name at least one family"):
        diagnostics.gaps(model, guide, x, local={})
    draws = fake_reference(torch.randn(2, 20, 5, 2))
    with pytest.raises(ValueError, match="reference is of 5 datapoints, but the data have 3"):
        diagnostics.gaps(model, guide, x, reference=draws)
    with pytest.raises(ValueError, match="the reference has 5 datapoints"):
        diagnostics.compare_posteriors(model, guide, x, reference=draws)


# -- comparison ----------------------------------------------------------------------------------


def fake_reference(z, converged=None):
    """Independent draws as a reference: exact, without running a chain."""
    N = z.shape[2]
    good = torch.ones(N, dtype=torch.bool) if converged is None else converged
    return diagnostics.PosteriorDraws(
        {"z": z},
        z,
        z.sum(-1),
        torch.where(good, 1.0, 2.0),
        torch.full((N,), 1e4),
        torch.ones(N),
        torch.zeros(N, dtype=torch.long),
        torch.ones(N),
        torch.zeros(N, dtype=torch.long),
        "exact",
        0.0,
    )


def normal_problem(mean, covariance, rows=3):
    """z ~ N(0, I) in the model; a guide N(mean, covariance), the same for every row."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1e6), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.MultivariateNormal(mean.expand(rows, 2), covariance))

    return model, guide, torch.zeros(rows)


@pytest.mark.parametrize("rows", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_comparison_equals_closed_forms(float64, rows):
    """Normals: W2 of marginals is sqrt(dmean^2 + dsd^2); sliced is its mean over directions."""
    mean, covariance = torch.tensor([0.5, 0.0]), torch.tensor([[0.25, 0.0], [0.0, 1.0]])
    model, guide, x = normal_problem(mean, covariance, rows)
    rho = 0.8
    exact = torch.tensor([[1.0, rho], [rho, 1.0]])
    z = torch.randn(4, 2500, rows, 2) @ torch.linalg.cholesky(exact).T
    found = diagnostics.compare_posteriors(
        model, guide, x, reference=fake_reference(z), num_directions=400, seed=0
    )
    assert found.names == ("z[0]", "z[1]")
    close = {"atol": 0.06, "rtol": 0}  # 10,000 draws: about four standard errors
    for seen, truth in (
        (found.mean_error, mean),
        (found.sd_ratio, torch.tensor([0.5, 1.0])),
        (found.wasserstein2, torch.tensor([math.sqrt(0.5**2 + 0.5**2), 0.0])),
    ):
        torch.testing.assert_close(seen, truth.expand(rows, 2), **close)
    # W1 of N(.5, .5^2) to N(0, 1): the mean of |d + s e| is that of a folded normal
    folded = 0.5 * (math.sqrt(2 / math.pi) * math.exp(-0.5) + math.erf(1 / math.sqrt(2)))
    assert ((found.wasserstein1[:, 0] - folded).abs() < 0.06).all()
    torch.testing.assert_close(found.correlation_error, torch.full((rows,), rho), **close)
    angles = torch.linspace(0, math.pi, 2000)
    d = torch.stack([angles.cos(), angles.sin()])
    spread = (d * (covariance @ d)).sum(0).sqrt() - (d * (exact @ d)).sum(0).sqrt()
    sliced = ((mean @ d).square() + spread.square()).mean().sqrt()
    torch.testing.assert_close(found.sliced, sliced.expand(rows), **close)
    assert (found.floor < 0.1).all()
    text = repr(found)
    assert "differs on 100%" in text and "too narrow" in text and "misses correlations" in text
    assert len(found.table()) == 2 * rows and len(found.summary()) == rows


@pytest.mark.parametrize("start", ["guide", "prior"])
def test_annealing_starts_at_the_best_of_the_first_family(monkeypatch, start):
    model = LinearModel(2, 3)
    guide, x, asked = LinearGuide(model), model.draw(4), {}
    families = {
        name: guides.PerDatapoint(conditionals.Normal(nn.Identity()), torch.zeros(4, 4))
        for name in "ab"
    }

    def ais(model, guide, *args, **options):
        asked.update(model=model, guide=guide, args=args, options=options)
        zeros = torch.zeros(4, dtype=torch.float64)
        return SimpleNamespace(log_evidence=zeros + 2.0, log_evidence_se=zeros + 0.1)

    monkeypatch.setattr(sys.modules["ppvae.diagnostics.gaps"], "ais", ais)
    found = diagnostics.gaps(model, guide, x, local=families, num_particles=2, steps=1,
                             start=start, num_temperatures=7, num_chains=3, seed=0)  # fmt: skip
    assert asked["guide"] is families["a"] and asked["model"].model is model
    assert torch.equal(asked["args"][0], x) and asked["args"][1].tolist() == [0, 1, 2, 3]
    assert asked["options"]["start"] == start and asked["options"]["num_temperatures"] == 7
    assert (found.log_evidence == 2.0).all() and (found.log_evidence_se == 0.1).all()
    assert f"7 temperatures from {'q*' if start == 'guide' else 'the prior'}" in found.note


def test_the_sliced_distance_is_a_root_mean_square_over_directions():
    """Of two draws each along two axes: W2 is 1 along the first, and 7 along the second."""
    first = torch.tensor([[[0.0, 0.0]], [[2.0, 4.0]]])
    second = torch.tensor([[[3.0, 11.0]], [[1.0, 7.0]]])
    found = _sliced(first, second, torch.eye(2))
    torch.testing.assert_close(found, torch.tensor([math.sqrt((1 + 49) / 2)]))


def test_an_exact_guide_is_not_told_from_the_reference(float64):
    model, guide, x = normal_problem(torch.zeros(2), torch.eye(2))
    found = diagnostics.compare_posteriors(
        model, guide, x, reference=fake_reference(torch.randn(4, 500, 3, 2)), seed=0
    )
    assert (found.sliced < 2 * found.floor).all()
    assert "not told from the reference" in repr(found)


def test_rows_that_did_not_converge_are_nan(float64):
    model, guide, x = normal_problem(torch.zeros(2), torch.eye(2))
    good = torch.tensor([True, False, True])
    reference = fake_reference(torch.randn(4, 100, 3, 2), good)
    assert (reference.mean("z").isnan().any(-1) == ~good).all()
    found = diagnostics.compare_posteriors(model, guide, x, reference=reference, seed=0)
    for values in (found.mean_error, found.sd_ratio, found.wasserstein1, found.sliced):
        assert (values.reshape(3, -1).isnan().any(-1) == ~good).all()
    assert "1 datapoints did not converge" in repr(found)
    nothing = fake_reference(torch.randn(4, 100, 3, 2), torch.zeros(3, dtype=torch.bool))
    found = diagnostics.compare_posteriors(model, guide, x, reference=nothing, seed=0)
    assert "no datapoint of the reference converged" in repr(found)


@pytest.mark.slow
def test_comparison_with_hmc_on_a_linear_pair(float64):
    """The whole way: HMC, then q x0.6 is seen as 0.6."""
    model = LinearModel(2, 5)
    x = model.draw(4)
    draws = diagnostics.hmc(model, LinearGuide(model, 0.6), x, seed=0)
    found = diagnostics.compare_posteriors(
        model, LinearGuide(model, 0.6), x, reference=draws, seed=0
    )
    assert ((found.sd_ratio - 0.6).abs() < 0.1).all() and (found.mean_error.abs() < 0.2).all()


def test_indexed_guides_are_compared_too():
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    guide = guides.Normal(nets.mlp(4, 8, 4))
    x, index = torch.ones(3, 4), torch.arange(3)
    local = guide.local(x)
    reference = fake_reference(torch.randn(2, 50, 3, 2))
    found = diagnostics.compare_posteriors(Indexed(model), local, x, index, reference=reference)
    assert found.sliced.isfinite().all()


# -- pictures --------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_contours_enclose_the_mass_they_say():
    q, p = 0.5 * torch.randn(4000, 3), torch.randn(4000, 3)
    ax = plots.posterior_contours(q, p, latents=(2, 0), mass=(0.5, 0.9))
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("z[2]", "z[0]")
    lines = [c for c in ax.collections if hasattr(c, "get_paths") and len(c.get_paths()) == 2]
    radii = []
    for contour in lines[-2:]:  # reference, then guide
        for path in contour.get_paths():
            radii.append(np.linalg.norm(path.vertices, axis=1).mean())
    # 90 % and 50 % regions of a standard normal in two dimensions: sqrt(-2 log(1 - mass))
    expected = [math.sqrt(-2 * math.log(1 - m)) for m in (0.9, 0.5)]
    assert radii == pytest.approx([*expected, *(0.5 * r for r in expected)], rel=0.15)


def test_intervals_show_quantiles():
    q, p = torch.randn(400, 3) + 5, torch.randn(400, 3)
    ax = plots.posterior_intervals(q, p)
    medians = [line.get_xdata() for line in ax.lines]
    np.testing.assert_allclose(medians[0], np.quantile(p.double().numpy(), 0.5, axis=0))
    np.testing.assert_allclose(medians[1], np.quantile(q.double().numpy(), 0.5, axis=0))


def test_gap_bars_are_the_means():
    one = SimpleNamespace(approximation=[1.0, 3.0], amortisation=[0.5, 0.5])
    two = SimpleNamespace(approximation=torch.tensor([-0.1]), amortisation=torch.tensor([0.4]))
    ax = plots.gap_bars({"one": one, "two": two})
    heights = [bar.get_height() for bar in ax.patches]
    bottoms = [bar.get_y() for bar in ax.patches]
    assert heights == pytest.approx([2.0, -0.1, 0.5, 0.4])
    assert bottoms[2:] == pytest.approx([2.0, 0.0])
    with pytest.raises(ValueError, match="no gaps to draw"):
        plots.gap_bars({})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.posterior_contours(torch.randn(9, 2), torch.randn(9)), "must be"),
        (lambda: plots.posterior_contours(*[torch.randn(9, 2)] * 2, latents=(0, 2)), "latents"),
        (lambda: plots.posterior_contours(*[torch.randn(9, 2)] * 2, mass=(1.0,)), "mass must lie"),
        (
            lambda: plots.posterior_contours(torch.randn(9, 2), torch.full((9, 2), math.nan)),
            "did not converge is NaN",
        ),
        (lambda: plots.posterior_intervals(torch.randn(9, 2), torch.randn(9, 3)), "same d"),
    ],
)
def test_bad_pictures(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_error_of_a_bound_is_that_of_a_mean_of_draws(float64):
    model, guide, x, _, _ = problem(rows=2)
    found, error = _elbo(model, guide, (x,), 4000, 100_000)
    log_w = log_weights(model, guide, x, num_particles=4000).log_w.detach()
    torch.testing.assert_close(error, log_w.std(0) / math.sqrt(4000), rtol=0.2, atol=0.0)
    assert ((found - log_w.mean(0)).abs() < 4.5 * math.sqrt(2) * error).all()


def test_fitting_a_local_guide_leaves_no_gradients_behind():
    model = LinearModel(2, 3)
    x, index = model.draw(4), torch.arange(4)
    local = guides.PerDatapoint(conditionals.Normal(nn.Identity()), torch.zeros(4, 4))
    (table,) = local.parameters()
    fit_local(Indexed(model), local, x, index, steps=2)
    assert (table != 0).all()
    assert all(p.grad is None for p in [*local.parameters(), *model.parameters()])
