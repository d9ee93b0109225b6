"""The mixture of normals and EM, against scikit-learn, enumeration and the exact log p(x)."""

import functools
import io

import pyro
import pytest
import torch
from pyro import poutine
from torch.utils.data import DataLoader, TensorDataset

import ppvae
from oracles import assert_mean
from ppvae import elbo, guides, models
from ppvae.models.expectation_maximisation import check_reg_covar, start
from ppvae.models.mixture import CollapsedComponent

pytestmark = pytest.mark.usefixtures("float64")
BOUND = elbo.ELBO()


def no_guide(x, size=None):
    """The cluster is summed out in the model: there is nothing left to infer."""


def three_clusters(rows=180):
    random = torch.Generator().manual_seed(2)
    noise = torch.randn(3, rows // 3, 2, generator=random)
    shapes = torch.tensor(
        [[[1.0, 0.0], [0.8, 0.4]], [[0.5, 0.0], [0.0, 1.2]], [[0.7, 0.0], [-0.5, 0.6]]]
    )
    centres = torch.tensor([[-2.0, 0.0], [1.5, 1.5], [1.0, -2.5]])
    return (noise @ shapes.mT + centres.unsqueeze(1)).reshape(-1, 2)


def started(x, full=True, C=3):
    model = models.GaussianMixture(C, 2, full=full)
    model.start(x)
    return model


def em(model, x, steps, **options):
    guide = guides.Responsibilities(model)
    for _ in range(steps):
        guide.e_step(model)
        model.m_step(x, guide.posterior(x).probs, **options)


def covariance(model):
    tril = model.scale_tril()
    return tril @ tril.mT


def sklearn_mixture(model, x, steps, full=True, **options):
    """scikit-learn's EM from the model's present parameters."""
    from sklearn.mixture import GaussianMixture

    precision = torch.linalg.inv(covariance(model))
    precision = precision if full else precision.diagonal(dim1=-2, dim2=-1)
    return GaussianMixture(
        len(model.logits),
        covariance_type="full" if full else "diag",
        weights_init=model.weights().probs.detach().numpy(),
        means_init=model.loc.detach().numpy().copy(),
        precisions_init=precision.detach().numpy(),
        init_params="random_from_data",
        max_iter=steps,
        tol=0.0,
        random_state=0,
        **options,
    )


# ------------------------------------------------------------------------------ EM


@pytest.mark.filterwarnings("ignore:Best performing initialization did not converge")
@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("steps", [1, 40])
def test_em_equals_scikit_learn(full, steps):
    x = three_clusters()
    model = started(x, full)
    theirs = sklearn_mixture(model, x, steps, full).fit(x.numpy())
    em(model, x, steps)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=1e-6)
    close(model.weights().probs.detach(), torch.tensor(theirs.weights_))
    close(model.loc.detach(), torch.tensor(theirs.means_))
    ours = covariance(model).detach()
    close(ours if full else ours.diagonal(dim1=1, dim2=2), torch.tensor(theirs.covariances_))
    close(model.log_evidence(x).detach(), torch.tensor(theirs.score_samples(x.numpy())))
    close(model.posterior(x).probs.detach(), torch.tensor(theirs.predict_proba(x.numpy())))


@pytest.mark.parametrize("full", [True, False])
def test_the_bound_touches_the_evidence_and_neither_falls(full):
    x = three_clusters()
    model = started(x, full)
    guide = guides.Responsibilities(model)
    before = model.log_evidence(x).sum()
    for _ in range(15):
        guide.e_step(model)
        touching = BOUND.evaluate(model, guide, x)
        torch.testing.assert_close(touching, model.log_evidence(x), rtol=0, atol=1e-10)
        model.m_step(x, guide.posterior(x).probs, reg_covar=0.0)
        evidence, bound = model.log_evidence(x), BOUND.evaluate(model, guide, x)
        assert bound.sum() >= touching.sum() - 1e-9
        assert evidence.sum() >= before - 1e-9
        gap = torch.distributions.kl_divergence(guide.posterior(x), model.posterior(x))
        torch.testing.assert_close(evidence - bound, gap, rtol=0, atol=1e-10)
        assert gap.sum() > 0
        before = evidence.sum()


def test_the_m_step_is_where_the_gradient_of_the_bound_vanishes():
    x = three_clusters()
    for full in (True, False):
        model = started(x, full)
        guide = guides.Responsibilities(model)
        objective = BOUND(model, guide)
        objective(x).backward()
        before = {name: p.grad.abs().max() for name, p in model.named_parameters()}
        assert all(size > 0.1 for name, size in before.items())
        objective.zero_grad()
        model.m_step(x, guide.posterior(x).probs, reg_covar=0.0)
        objective(x).backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.abs().max() < 1e-9, name


# ------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize("estimator", [elbo.ELBO(), elbo.IWELBO(3)])
def test_without_a_guide_every_bound_is_the_evidence(estimator):
    x = three_clusters()
    model = started(x)
    torch.testing.assert_close(
        estimator.evaluate(model, no_guide, x), model.log_evidence(x).detach()
    )
    loss = estimator(model, no_guide)(x)
    loss.backward()
    by_bound = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (-model.log_evidence(x).sum()).backward()
    torch.testing.assert_close(by_bound, [p.grad for p in model.parameters()])


def test_gradient_of_the_bound_at_the_e_step_is_that_of_the_evidence():
    """Fisher's identity."""
    x = three_clusters()
    model = started(x)
    BOUND(model, guides.Responsibilities(model))(x).backward()
    by_bound = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    (-model.log_evidence(x).sum()).backward()
    torch.testing.assert_close(by_bound, [p.grad for p in model.parameters()])


@pytest.mark.filterwarnings("ignore:Best performing initialization did not converge")
def test_gradient_ascent_reaches_the_likelihood_of_scikit_learn():
    x = three_clusters()
    model = started(x)
    theirs = sklearn_mixture(model, x, 500, reg_covar=0.0).fit(x.numpy())
    objective = BOUND(model, no_guide)
    optimiser = torch.optim.LBFGS(
        objective.parameters(), max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-12
    )

    def closure():
        optimiser.zero_grad()
        loss = objective(x)
        loss.backward()
        return loss

    optimiser.step(closure)
    assert model.log_evidence(x).mean().item() == pytest.approx(theirs.score(x.numpy()), abs=1e-6)


def test_fit_trains_it_by_minibatches():
    x = three_clusters()
    model = started(x)
    before = model.log_evidence(x).mean()
    adam = functools.partial(torch.optim.Adam, lr=0.05)
    svi = ppvae.SVI(model, no_guide, adam, elbo.ELBO())
    ppvae.fit(svi, x, epochs=10, batch_size=60, progress=False)
    assert model.log_evidence(x).mean() > before + 0.1
    model.require_spread(x)


@pytest.mark.parametrize(
    "estimator", [elbo.ELBO(), elbo.ELBO(3), elbo.ELBO(2, kl="mixed"), elbo.ELBO(gradient="stl")]
)
@pytest.mark.parametrize("full", [True, False])
def test_one_component_is_one_normal(estimator, full):
    x = three_clusters(30)
    model = models.GaussianMixture(1, 2, full)
    for parameter in model.parameters():
        parameter.data.normal_()
    normal = torch.distributions.MultivariateNormal(model.loc[0], scale_tril=model.scale_tril()[0])
    parameters = [p for name, p in model.named_parameters() if name != "logits"]
    exact = torch.autograd.grad(-normal.log_prob(x).sum(), parameters)
    loss = estimator(model, no_guide)(x)
    torch.testing.assert_close(loss, -normal.log_prob(x).sum())
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), exact)
    torch.testing.assert_close(estimator.evaluate(model, no_guide, x), normal.log_prob(x).detach())


# ------------------------------------------------------------------------------ Monte Carlo


def drawn(model):
    """The same model, its cluster not marked to be summed out."""
    return poutine.infer_config(model, config_fn=lambda site: {"enumerate": None})


def test_prior_sampling_is_unbiased_with_the_variance_of_enumeration():
    x = three_clusters()[::30]
    model = started(x)
    em(model, three_clusters(), 5)
    weights = ppvae.log_weights(model, guides.Prior(drawn(model)), x, num_particles=20_000)
    assert weights.enumerated == {}
    w, p = weights.log_w.exp().detach(), model.log_evidence(x).exp().detach()
    assert_mean(w, p, "mean")
    likelihood = (model.log_joint(x) - model.weights().logits).exp()  # p(x | c)
    variance = (model.weights().probs * likelihood.square()).sum(-1) - p.square()
    assert_mean((w - p).square(), variance.detach(), "variance")


def test_the_optimal_proposal_has_no_variance():
    x = three_clusters()[::30]
    model = started(x)
    weights = ppvae.log_weights(
        model, guides.Responsibilities(model, draw=True), x, num_particles=50
    )
    exact = model.log_evidence(x).expand(50, -1)
    torch.testing.assert_close(weights.log_w, exact, rtol=0, atol=1e-10)


def test_draws_have_the_moments_of_the_mixture():
    x = three_clusters()
    model = started(x)
    em(model, x, 5, reg_covar=0.0)
    with torch.no_grad():
        draws = model(size=20_000)
    assert_mean(draws, x.mean(0), "mean")  # EM matches the first two moments of its data
    assert_mean(draws.square(), x.square().mean(0), "square")


# ------------------------------------------------------------------------------ bad data


def test_fewer_points_than_components():
    model = models.GaussianMixture(5, 2)
    with pytest.raises(ValueError, match="3 points are fewer than the 5 components"):
        model.start(torch.randn(3, 2))
    with pytest.raises(ValueError, match="3 points are fewer than the 5 components"):
        model.m_step(torch.randn(3, 2), torch.full((3, 5), 0.2))
    with pytest.raises(ValueError, match=r"2 different points \(40 rows\)"):
        model.start(torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(20, 1))
    with pytest.raises(ValueError, match=r"x must be \(N, 2\)"):
        model.start(torch.randn(30, 3))
    with pytest.raises(ValueError, match=r"covariance must be \(5, 2, 2\)"):
        model.initialise(torch.ones(5), torch.zeros(5, 2), torch.ones(5, 2))


@pytest.mark.parametrize("full", [True, False])
def test_a_component_on_one_point_is_named(full):
    x = torch.cat([three_clusters(), torch.tensor([[30.0, 30.0]])])
    model = started(x, full, C=2)
    wide = covariance(model).detach()
    loc = torch.tensor([[0.0, 0.0], [30.0, 30.0]])
    model.initialise(torch.ones(2), loc, wide if full else wide.diagonal(dim1=1, dim2=2))
    with pytest.raises(CollapsedComponent, match=r"component 1 has collapsed.*holds 1 of 181"):
        em(model, x, 20)
    em(model, x, 20, reg_covar=0.1)  # the cure
    assert model.log_evidence(x).isfinite().all()


def test_an_empty_component_and_a_constant_column_are_named():
    x = three_clusters()
    q = torch.zeros(len(x), 3)
    q[:, 0] = q[:, 2] = 0.5
    with pytest.raises(CollapsedComponent, match="component 1 has no points"):
        started(x).m_step(x, q)
    flat = torch.cat([x[:, :1], torch.full((len(x), 1), 0.3)], 1)
    with pytest.raises(ValueError, match="column 1 of x is constant"):
        models.GaussianMixture(2, 2).m_step(flat, torch.full((len(x), 2), 0.5))
    line = torch.stack([x[:, 0], 2 * x[:, 0]], 1)
    with pytest.raises(CollapsedComponent, match=r"component 0 has collapsed.*sums of others"):
        models.GaussianMixture(2, 2).m_step(line, torch.full((len(x), 2), 0.5))


@pytest.mark.parametrize("full", [True, False])
def test_an_absolute_reg_covar_cannot_lower_the_evidence_of_data_in_small_units(full):
    z = 1e-4 * torch.randn(500, 2)
    model = models.GaussianMixture(1, 2, full)
    model.start(z)
    before = model.log_evidence(z).mean()
    with pytest.raises(ValueError, match=r"reg_covar must lie .* 0.02 .*-09 .*column [01].*1e-06.*"
                       r"Scale the data .* give \d.\de-1\d"):  # fmt: skip
        em(model, z, 1)
    assert torch.equal(model.log_evidence(z).mean(), before)
    em(model, z, 1, reg_covar=0.0199 * z.var(0, correction=0).min().item())
    assert model.log_evidence(z).mean() > before - 2.2e-4  # nearly 1e-4 per dimension
    scaled = z / z.std(0)
    model.start(scaled)
    before = model.log_evidence(scaled).mean()
    em(model, scaled, 1)
    assert model.log_evidence(scaled).mean() > before - 1e-9
    for wrong in (-1e-6, float("nan")):
        with pytest.raises(ValueError, match="reg_covar must lie between 0 and"):
            em(model, scaled, 1, reg_covar=wrong)


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_data_that_are_not_finite_are_named(full, wrong):
    x = three_clusters()
    model = started(x, full)
    q = model.posterior(x).probs
    before = [p.clone() for p in model.parameters()]
    holed = x.clone()
    holed[7, 1] = wrong
    for call in (lambda: model.start(holed), lambda: model.m_step(holed, q)):
        with pytest.raises(ValueError, match=r"x has 1 NaN or infinite values, .*\[7, 1\].*drop"):
            call()
    q[4, 2] = wrong
    with pytest.raises(ValueError, match=r"responsibilities has 1 NaN or .*\[4, 2\]"):
        model.m_step(x, q)
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
    model.loc.data[0, 0] = wrong
    with pytest.raises(ValueError, match=r"loc has 1 NaN or .*diverged"):
        model.require_spread(x)


@pytest.mark.parametrize("shape", [(180, 2), (90, 3), (3, 180), (180,)])
def test_responsibilities_of_another_shape_are_named(shape):
    x = three_clusters()
    with pytest.raises(ValueError, match=r"responsibilities must be \(180, 3\) for 180 rows"):
        started(x).m_step(x, torch.full(shape, 0.5))
    with pytest.raises(ValueError, match=r"must be probabilities, got values down to -1"):
        started(x).m_step(x, torch.tensor([-1.0, 1.0, 1.0]).repeat(180, 1))  # logs, for example


@pytest.mark.parametrize("full", [True, False])
def test_parameters_that_are_none_of_a_mixture_are_refused(full):
    model = models.GaussianMixture(2, 2, full)
    before = [p.clone() for p in model.parameters()]
    one, loc = torch.ones(2), torch.zeros(2, 2)
    good = torch.eye(2).expand(2, 2, 2) if full else torch.ones(2, 2)
    bad = good.clone()
    bad[1] = -bad[1]
    cases = [
        ((torch.tensor([1.5, -0.5]), loc, good), r"weights must be positive, got \[1.5, -0.5\]"),
        ((one, loc / 0, good), "loc has 4 NaN"),
        ((one, loc, good * torch.nan), "covariance has . NaN"),
        ((one, loc, bad), r"covariance must be .*positive.*of component 1 is .*-1.0"),
    ]
    if full:
        lower = torch.tensor([[1.0, 0.0], [0.5, 1.0]]).expand(2, 2, 2)
        cases.append(((one, loc, lower), r"symmetric.*of component 0 is.*not .*a Cholesky factor"))
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            model.initialise(*arguments)
    torch.testing.assert_close(list(model.parameters()), before, rtol=0, atol=0)
    model.initialise(one, loc, good)
    assert torch.equal(model.log_scale, loc)


@pytest.mark.parametrize("full", [True, False])
def test_units_of_the_columns_do_not_matter(full):
    """No false alarm where one column is in kilometres and the other in millimetres."""
    x = three_clusters() * torch.tensor([1e-4, 1e3])
    model = started(x, full)
    em(model, x, 10, reg_covar=0.0)
    model.require_spread(x)
    same = started(three_clusters(), full)
    em(same, three_clusters(), 10, reg_covar=0.0)
    # The start of both takes the same rows, sorted by the first column.
    torch.testing.assert_close(model.posterior(x).probs, same.posterior(three_clusters()).probs)


def test_a_component_that_collapsed_under_gradients_is_named():
    x = three_clusters()
    for full in (True, False):
        model = started(x, full)
        model.require_spread(x)
        with torch.no_grad():
            model.log_scale[2, 1] = -12.0
        with pytest.raises(CollapsedComponent, match="component 2"):
            model.require_spread(x)


def by_gradients(x, C, full=True, lr=0.05, **options):
    """The SVI of a mixture, and `fit` of it."""
    model = models.GaussianMixture(C, 2, full)
    svi = ppvae.SVI(model, no_guide, functools.partial(torch.optim.Adam, lr=lr))
    return svi, functools.partial(ppvae.fit, svi, x, **{"progress": False, **options})


def loaded(x, **options):
    return DataLoader(TensorDataset(x), **options)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (three_clusters()[:3], "3 points are fewer than the 5 components; use at most 3"),
        (loaded(three_clusters()[:3]), "3 points are fewer than the 5 components"),
        (three_clusters()[:1].repeat(10, 1), r"1 different points \(10 rows\) are fewer than"),
        (three_clusters()[:4].repeat(400, 1), r"4 different points \(1600 rows\)"),
        (three_clusters() * torch.tensor([1.0, 0.0]), "column 1 of x is constant"),
    ],
)
def test_fit_refuses_too_few_points_before_its_first_step(x, message):
    if isinstance(x, torch.Tensor):
        x = x.double()  # made before the fixture
    svi, fit = by_gradients(x, C=5, epochs=5)
    if isinstance(x, DataLoader):
        svi.objective.float()
    with pytest.raises(ValueError, match=message):
        fit()
    assert svi.num_steps == 0


@pytest.mark.parametrize("batch_size", [pytest.param(1, marks=pytest.mark.slow), 2, 60])
def test_a_batch_may_have_fewer_points_than_components(batch_size):
    x = three_clusters(60)
    late = torch.cat([x[:1].repeat(1500, 1), x])  # whose first rows are all alike
    for data in (x, late, loaded(x, batch_size=batch_size)):
        svi, fit = by_gradients(data, C=4, lr=1e-3, epochs=1, batch_size=batch_size)
        fit()
        assert svi.num_steps > 0


def test_batches_that_are_made_elsewhere_are_no_rows():
    batches = list(three_clusters(60).split(20))[:3]
    svi, fit = by_gradients(DataLoader(batches, batch_size=None), C=4, lr=1e-3, epochs=1)
    fit()
    assert svi.num_steps == 3


@pytest.mark.parametrize(
    ("full", "batch_size"),  # of a loader
    [
        (True, None),
        (False, 60),
        pytest.param(False, None, marks=pytest.mark.slow),
        pytest.param(True, 60, marks=pytest.mark.slow),
    ],
)
def test_fit_names_a_component_that_collapses(full, batch_size, tmp_path):
    """Half the rows are one point: a density without limit sits on it."""
    x = three_clusters(30)
    x = torch.cat([x, x[:1].repeat(30, 1)])
    rows = loaded(x, batch_size=batch_size) if batch_size else x
    svi, fit = by_gradients(rows, 3, full, lr=0.02, epochs=1000, batch_size=60)
    svi.model.start(x)
    files = ppvae.Checkpoints(tmp_path, every=50)
    with pytest.raises(CollapsedComponent, match=r"component 0 has collapsed.* of 60 points"):
        fit(checkpoint=files)
    assert 50 < svi.num_steps < 1000 and files.paths()
    assert all(p.isfinite().all() for p in svi.model.parameters())


# ------------------------------------------------------------------------------ as a pair


@pytest.mark.parametrize("full", [True, False])
def test_it_is_a_pair(full):
    x = three_clusters(30)
    model = started(x, full)
    guide = guides.Responsibilities(model)
    ppvae.check_pair(model, guide, x)
    ppvae.check_pair(model, no_guide, x)
    scaled = BOUND(model, guide)(x[:10], size=30)
    torch.testing.assert_close(scaled, 3 * BOUND(model, guide)(x[:10]))
    assert not [p for p in guide.parameters() if p.requires_grad]
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    other = models.GaussianMixture(3, 2, full=full)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other.log_evidence(x), model.log_evidence(x))
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize(
    ("guided", "C"),
    [
        (False, 1),
        (True, 3),
        pytest.param(True, 1, marks=pytest.mark.slow),
        pytest.param(False, 3, marks=pytest.mark.slow),
    ],
)
def test_compiled_equals_eager(guided, C, monkeypatch):
    import torch._inductor.compile_fx as inductor

    monkeypatch.setattr(inductor, "compile_fx", lambda graph, inputs: lambda *a: graph(*a))
    torch.set_default_dtype(torch.float32)  # as it is used; the fixture sets it back
    x = three_clusters(30)
    losses = []
    for compiled in (False, True):
        model = started(x, C=C)
        guide = guides.Responsibilities(model) if guided else no_guide
        svi = ppvae.SVI(model, guide, torch.optim.Adam, elbo.ELBO(), compile=compiled)
        losses.append([svi.step(x) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("full", [False, True])
def test_em_starts_at_the_variances_of_the_data(full):
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(0))
    weights, loc, covariance = start(x, 3, full, seed=1)
    variance = (x - x.mean(0)).square().sum(0) / 7
    expected = (variance.diag() if full else variance).expand(3, *([2] * (1 + full)))
    assert torch.equal(weights, torch.ones(3)) and len(loc.unique(dim=0)) == 3
    torch.testing.assert_close(covariance, expected)


def test_the_limit_of_reg_covar_is_that_of_the_column_with_least_variance():
    x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([10.0, 1.0])
    with pytest.raises(ValueError, match=r"smallest variance of x, .* \(column 1\), got 0.5"):
        check_reg_covar(x, 0.5)
    check_reg_covar(x, 0.01)
