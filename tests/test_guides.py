"""Guides: each density, gradient and optimum against what is known exactly."""

import copy
import functools
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from torch import nn

import ppvae
from oracles import LinearModel, assert_mean, hermite
from ppvae import conditionals, elbo, guides, models, nets, posteriors
from ppvae.diagnostics import log_evidence
from ppvae.guides.semi_amortized import cubature, path
from ppvae.local import Indexed, fit_local
from registry import ALL_PAIRS, build

NEW = [
    "full_normal",
    "full_normal_conv",
    "low_rank_normal",
    "mixture",
    "iaf",
    "coupling",
    "spline",
    "cvae_flow",
    "per_datapoint",
    "semi_amortized",
    "semi_amortized_first_order",
]
FLOWS = {"iaf": posteriors.iaf, "coupling": posteriors.coupling, "spline": posteriors.spline}
flows = pytest.mark.parametrize("layers", FLOWS)


def vae(latent=2, dim=4):
    model = models.VAE(conditionals.Bernoulli(nets.mlp(latent, 8, dim)), latent_dim=latent)
    return model, torch.bernoulli(torch.full((6, dim), 0.5))


def correlated():
    """A linear-Gaussian model whose posterior is correlated: 3 latents, 2 values."""
    model = LinearModel(3, 2)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model, model.draw(8)


def exact_posterior(model, x):
    A, a, S = model.posterior()
    return dist.MultivariateNormal(x @ A.T + a, S)


# ------------------------------------------------------------------------------ every guide


@pytest.mark.parametrize("name", NEW)
@pytest.mark.parametrize("K", [1, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_size_and_precision(name, K, dtype):
    model, guide, args = build(name)
    model, guide = model.to(dtype), guide.to(dtype)
    args = [arg.to(dtype) if arg.is_floating_point() else arg for arg in args]
    for rows in (slice(None), slice(1)):
        loss = elbo.IWELBO(K)(model, guide).eval()(*[arg[rows] for arg in args])
        loss.backward()
        assert loss.dtype == dtype and loss.isfinite()


@pytest.mark.parametrize("name", NEW)
def test_deep_copies(name):
    model, guide, args = build(name)
    objective = elbo.IWELBO(3)(model, guide).eval()
    objective(*args).backward()  # whatever a draw leaves behind must not be in the way
    twin = copy.deepcopy(objective)
    losses = []
    for module in (objective, twin):
        pyro.set_rng_seed(1)
        losses.append(module(*args).item())
    assert losses[0] == losses[1]
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(0.1)
    pyro.set_rng_seed(1)
    assert objective(*args).item() == losses[0]


# ------------------------------------------------------------------------------ normals


@pytest.mark.usefixtures("float64")
def test_a_guide_with_a_condition_asks_for_y():
    guide = guides.Normal(nets.mlp(4 + 3, 8, 2 * 2), condition=nets.OneHot(3))
    assert guide(torch.zeros(5, 4), torch.arange(5) % 3).shape == (5, 2)
    with pytest.raises(ValueError, match="given a condition, so call it with x and y"):
        guide(torch.zeros(5, 4))


def test_normals_are_made_of_their_outputs():
    outputs = torch.randn(5, 9)
    q = posteriors.FullNormal(nn.Identity(), dim=3)(outputs)
    tril = torch.diag_embed(outputs[:, 3:6].exp())
    tril[:, 1, 0], tril[:, 2, 0], tril[:, 2, 1] = outputs[:, 6:].T
    torch.testing.assert_close(q.scale_tril, tril)
    torch.testing.assert_close(q.loc, outputs[:, :3])
    q = posteriors.LowRankNormal(nn.Identity(), rank=1)(outputs)
    W = outputs[:, 6:, None]
    torch.testing.assert_close(
        q.covariance_matrix, W @ W.mT + torch.diag_embed(outputs[:, 3:6].exp() ** 2)
    )


@pytest.mark.parametrize(
    ("head", "width", "match"),
    [
        (lambda net: posteriors.FullNormal(net, dim=3), 8, "takes 9 per row"),
        (lambda net: posteriors.LowRankNormal(net, rank=2), 9, "takes 8 per row"),
        (lambda net: posteriors.LowRankNormal(net, rank=2), 3, "takes more per row"),
        (lambda net: posteriors.Mixture(net, 2), 9, "cannot split"),
        (lambda net: posteriors.Flow(net, [], 3, 2), 9, "takes 8 per row"),
    ],
)
def test_heads_say_how_many_outputs_they_take(head, width, match):
    with pytest.raises(ValueError, match="cannot split"):
        head(nn.Identity())(torch.zeros(5, 0))
    with pytest.raises(ValueError, match=match):
        head(nn.Linear(4, width))(torch.zeros(5, 4))
    model, x = vae()
    with pytest.raises(ppvae.PairError, match=match):  # check_pair passes it on
        ppvae.check_pair(model, guides.Amortized(head(nn.Linear(4, width))), x)


def train(model, guide, x, steps=400, lr=0.05, K=8):
    """STL: at the optimum of an exact family the gradient has no noise."""
    nn.init.zeros_(guide.conditional.net.weight)
    estimator = elbo.ELBO(K, gradient="stl")(model, guide)
    optimiser = torch.optim.Adam(guide.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        estimator(x).backward()
        optimiser.step()
        schedule.step()


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_full_covariance_reaches_the_evidence_and_the_diagonal_its_own_gap():
    model, x = correlated()
    precision = torch.linalg.inv(model.posterior()[2])
    # min over diagonal q of KL(q || N(m, S)) has variances 1 / precision_dd
    gap = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert gap > 0.1
    full = guides.Amortized(posteriors.FullNormal(nn.Linear(2, 9), dim=3))
    diagonal = guides.Normal(nn.Linear(2, 6))
    for guide, expected in ((full, 0.0), (diagonal, gap)):
        train(model, guide, x, K=8 if guide is full else 32)
        with torch.no_grad():
            q = guide.posterior(x)
            covariance = torch.diag_embed(q.variance) if guide is diagonal else q.covariance_matrix
            q = dist.MultivariateNormal(q.mean, covariance)
            kl = torch.distributions.kl_divergence(q, exact_posterior(model, x))
        torch.testing.assert_close(kl, kl.new_full((8,), float(expected)), rtol=0, atol=2e-3)
    log_w = ppvae.log_weights(model, full, x, num_particles=20).log_w
    torch.testing.assert_close(log_w, model.log_evidence(x).expand(20, 8), rtol=0, atol=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_one_factor_suffices_where_the_covariance_has_one():
    model = LinearModel(2, 1)  # the posterior covariance is I minus one outer product
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = model.draw(8)
    guide = guides.Amortized(posteriors.LowRankNormal(nn.Linear(1, 6), rank=1))
    train(model, guide, x)
    with torch.no_grad():
        q = guide.posterior(x)
        q = dist.MultivariateNormal(q.mean, q.covariance_matrix)
        kl = torch.distributions.kl_divergence(q, exact_posterior(model, x))
    assert kl.max() < 2e-3


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@flows
def test_flows_reach_the_evidence_of_a_correlated_posterior(layers):
    model, x = correlated()
    transforms = FLOWS[layers](3, 2, hidden=[8])
    guide = guides.Amortized(posteriors.Flow(nn.Linear(2, 8), transforms, 3, context_dim=2))
    # splines have more to learn: after 600 steps their gap is 0.015 to 0.025, by the start
    train(model, guide, x, *((1800, 0.03) if layers == "spline" else (600, 0.02)))
    result = log_evidence(model, guide, x, num_particles=4000, seed=0)
    gap = model.log_evidence(x) - result.elbo
    # at the evidence, up to training; the diagonal's gap is above 0.1
    assert gap.abs().max() < 0.02, gap


# ------------------------------------------------------------------------------ flows


@pytest.mark.usefixtures("float64")
@flows
def test_a_flow_has_the_density_of_its_map(layers):
    flow = posteriors.Flow(nn.Linear(4, 9), FLOWS[layers](3, 3, hidden=[8]), 3, context_dim=3)
    x, noise = torch.randn(1, 4), torch.randn(3)
    slopes = jacobian(flow, x, noise)
    expected = dist.Normal(0.0, 1.0).log_prob(noise).sum() - slopes.det().abs().log()
    z = functools.reduce(lambda z, layer: layer(z), flow(x).transforms, noise[None]).detach()
    torch.testing.assert_close(flow(x).log_prob(z)[0], expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@flows
def test_log_q_of_a_draw_equals_log_q_of_its_value(layers, dtype):
    """The first from what the layers remember, the second by inversion; so for any precision."""
    transforms = FLOWS[layers](4, 3, hidden=[8])
    flow = posteriors.Flow(nn.Linear(4, 11), transforms, 4, context_dim=3).to(dtype)
    x = torch.randn(5, 4, dtype=dtype)
    q = flow(x).expand((7, 5))
    z = q.rsample()
    again = flow(x).log_prob(z.detach().clone())
    torch.testing.assert_close(q.log_prob(z), again, rtol=1e-4, atol=1e-4)
    grads = torch.autograd.grad(again.sum(), list(flow.parameters()))
    assert all(grad.isfinite().all() for grad in grads)


class AsContext(nn.Module):
    """x as the context of a flow whose location is 0 and whose scale is 1."""

    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return torch.cat([torch.zeros(*x.shape[:-1], self.size), x], -1)


@flows
def test_the_layers_of_a_flow_see_the_datapoint(layers):
    flow = posteriors.Flow(AsContext(6), FLOWS[layers](3, 4, hidden=[8]), 3, context_dim=4)
    x, noise = torch.randn(2, 4), torch.randn(1, 3).expand(2, 3)
    z = functools.reduce(lambda z, layer: layer(z), flow(x).transforms, noise)
    assert (z[0] - z[1]).abs().max() > 0.01


def jacobian(flow, x, noise):
    """Of a draw in its noise, ``(Z, Z)``."""
    transforms = flow(x).transforms

    def draw(noise):
        return functools.reduce(lambda z, layer: layer(z), transforms, noise[None])[0]

    return torch.autograd.functional.jacobian(draw, noise)


@flows
def test_location_and_scale_come_after_the_layers(layers):
    class Given(nn.Module):
        loc, raw = torch.zeros(3), torch.zeros(3)

        def forward(self, x):
            return torch.cat([self.loc.expand(5, 3), self.raw.expand(5, 3), x], -1)

    net = Given()
    flow = posteriors.Flow(net, FLOWS[layers](3, 4, hidden=[8]), 3, context_dim=4)
    x, noise = torch.randn(5, 4), torch.randn(5, 3)
    plain = functools.reduce(lambda z, layer: layer(z), flow(x).transforms, noise)
    net.loc, net.raw = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.3, -0.4, 0.0])
    moved = functools.reduce(lambda z, layer: layer(z), flow(x).transforms, noise)
    torch.testing.assert_close(moved, net.loc + net.raw.exp() * plain)


def test_two_layers_bend_every_dimension():
    """The second has the other order, or the other half."""
    x, noise = torch.randn(1, 4), torch.randn(4)
    one, two = (
        jacobian(posteriors.Flow(AsContext(8), layers, 4, context_dim=4), x, noise)
        for layers in (posteriors.iaf(4, 4, 1, [16]), posteriors.iaf(4, 4, 2, [16]))
    )
    assert (one.triu(1) == 0).all() and (one.tril(-1) != 0).any()
    assert (two.triu(1) != 0).any() and (two.tril(-1) != 0).any()
    one, two = (
        jacobian(posteriors.Flow(AsContext(8), layers, 4, context_dim=4), x, noise)
        for layers in (posteriors.coupling(4, 4, 1, [16]), posteriors.coupling(4, 4, 2, [16]))
    )
    still = torch.eye(4)
    assert torch.equal(one[:2], still[:2]) and not torch.equal(one[2:], still[2:])
    assert not any(torch.equal(row, other) for row in two for other in still)
    three, one = (len(list(posteriors.spline(4, 4, n).parameters())) for n in (3, 1))
    assert three == 3 * one


@pytest.mark.usefixtures("float64")
def test_an_autoregressive_flow_weighs_values_in_its_own_precision():
    """Pyro inverts from zeros of the default precision."""
    flow = posteriors.Flow(nn.Linear(4, 9), posteriors.iaf(3, 3, hidden=[8]), 3, 3).float()
    x, z = torch.randn(5, 4).float(), torch.randn(5, 3).float()
    assert flow(x).log_prob(z).dtype == torch.float32


@flows
def test_a_flow_that_has_drawn_knows_the_density_of_other_values(layers):
    flow = posteriors.Flow(nn.Linear(4, 11), FLOWS[layers](4, 3, hidden=[8]), 4, context_dim=3)
    x = torch.randn(5, 4)
    q = flow(x)
    other = q.rsample() + 0.3
    torch.testing.assert_close(q.log_prob(other), flow(x).log_prob(other), rtol=1e-4, atol=1e-4)


@flows
def test_a_draw_and_its_density_invert_nothing(layers, monkeypatch):
    flow = posteriors.Flow(nn.Linear(4, 11), FLOWS[layers](4, 3), 4, context_dim=3)
    q = flow(torch.randn(5, 4))
    z = q.rsample()
    for layer in q.transforms:
        monkeypatch.setattr(layer, "_inverse", lambda y: pytest.fail("inverted"))
    assert q.log_prob(z).shape == (5,)


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@flows
@pytest.mark.parametrize("gradient", ["stl", "dreg", "score"])
def test_every_gradient_of_a_flow_has_the_mean_of_the_pathwise_one(layers, gradient):
    model, x = vae()
    x = x[:2]
    transforms = FLOWS[layers](2, 2, num_layers=1 if layers == "spline" else 2, hidden=[4])
    guide = guides.Amortized(posteriors.Flow(nn.Linear(4, 6), transforms, 2, context_dim=2))
    parameters = list(guide.parameters())
    many = x.repeat(100, 1)
    family = elbo.IWELBO if gradient == "dreg" else elbo.ELBO

    def gradients(name):
        found = []
        for _ in range(60):
            loss = family(2, name)(model, guide)(many)
            found.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        return torch.stack(found) / 100

    one, other = gradients("pathwise"), gradients(gradient)
    assert_mean(one - other, 0.0, gradient)  # independent draws: the differences are independent


def test_importing_zuko_leaves_validation_on():
    posteriors.spline(2, 2)
    assert torch.distributions.Distribution._validate_args
    with pytest.raises(ValueError, match="Expected parameter scale"):
        dist.Normal(0.0, -1.0)


def test_the_first_import_of_zuko_leaves_validation_on(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "zuko"]:
        monkeypatch.delitem(sys.modules, name)
    base = torch.distributions.Distribution
    before = base._validate_args, base.arg_constraints
    try:
        posteriors.spline(2, 2)
        assert "zuko" in sys.modules and (base._validate_args, base.arg_constraints) == before
    finally:
        base._validate_args, base.arg_constraints = before


def test_without_zuko(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r"pip install 'ppvae\[flows\]'"):
        posteriors.spline(2, 2)
    assert torch.distributions.Distribution._validate_args


@pytest.mark.parametrize("layers", ["iaf", "coupling"])
def test_one_dimension_has_no_order(layers):
    with pytest.raises(
        ValueError, match=rf"{layers} needs a latent dimension of at least 2, got 1"
    ):
        FLOWS[layers](1, 2)
    posteriors.Flow(nn.Linear(4, 4), posteriors.spline(1, 2), 1, 2)(torch.ones(3, 4)).rsample()


def test_flows_of_pyro_without_context_can_be_used():
    model, x = vae()
    layers = [dist.transforms.affine_autoregressive(2, [8]), dist.transforms.planar(2)]
    guide = guides.Amortized(posteriors.Flow(nn.Linear(4, 4), layers, 2))
    elbo.IWELBO(3)(model, guide)(x).backward()
    report = ppvae.check_pair(model, guide, x)
    assert report.gradients["pathwise"] == report.gradients["score"] == ""
    assert "no inverse" in report.gradients["dreg"]


# ------------------------------------------------------------------------------ the mixture


def mixture(C=3, Z=2):
    parameters = [torch.randn(C), torch.randn(C, Z), 0.5 * torch.randn(C, Z)]
    return [p.requires_grad_() for p in parameters]


@pytest.mark.usefixtures("float64")
def test_the_mixture_is_torchs():
    logits, loc, log_scale = mixture()
    q = posteriors.MixtureOfNormals(logits, loc, log_scale.exp())
    components = dist.Normal(loc, log_scale.exp()).to_event(1)
    reference = dist.MixtureSameFamily(dist.Categorical(logits=logits), components)
    z = torch.randn(4, 5, 2)
    torch.testing.assert_close(q.log_prob(z), reference.log_prob(z))
    torch.testing.assert_close(q.mean, reference.mean)
    torch.testing.assert_close(q.variance, reference.variance)
    draws = q.sample((20_000,))
    assert_mean(draws, reference.mean.detach())
    assert_mean((draws - q.mean).square().detach(), reference.variance.detach())
    assert_mean(
        (draws[:, 0] < 0).double(), (dist.Normal(loc, log_scale.exp()).cdf(torch.zeros(()))[:, 0]
        * logits.softmax(0)).sum().detach(),
    )  # fmt: skip


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("Z", [1, 2])
@pytest.mark.parametrize("seed", [0, *(pytest.param(i, marks=pytest.mark.slow) for i in (1, 2))])
def test_the_gradient_of_a_mixtures_draws(Z, seed):
    """Of a mean, against quadrature. (Pyro's MixtureOfDiagNormals fails this for the weights.)"""
    torch.manual_seed(seed)
    logits, loc, log_scale = parameters = mixture(Z=Z)

    def f(z):
        return (1.3 * z[..., 0]).sin() * z[..., -1] + 0.3 * z[..., -1] ** 2

    points, weights = hermite(60)
    grid = torch.cartesian_prod(*[points] * Z).reshape(-1, 1, Z)
    mass = torch.cartesian_prod(*[weights] * Z).reshape(len(grid), -1).prod(-1)
    by_component = (mass[:, None] * f(loc + log_scale.exp() * grid)).sum(0)
    exact = torch.autograd.grad((logits.softmax(0) * by_component).sum(), parameters)
    found = []
    for _ in range(200):
        q = posteriors.MixtureOfNormals(logits, loc, log_scale.exp())
        grads = torch.autograd.grad(f(q.rsample((500,))).mean(), parameters)
        found.append(torch.cat([g.flatten() for g in grads]))
    assert_mean(torch.stack(found), torch.cat([g.flatten() for g in exact]))


def test_a_mixture_of_one_has_the_path_of_a_normal():
    loc, scale = torch.randn(1, 3, requires_grad=True), torch.rand(1, 3).add(0.5).requires_grad_()
    z = posteriors.MixtureOfNormals(torch.zeros(1), loc, scale).rsample((5,))
    (of_loc, of_scale) = torch.autograd.grad(z.sum(), [loc, scale])
    torch.testing.assert_close(of_loc, torch.full((1, 3), 5.0))
    noise = ((z - loc) / scale).detach().sum(0, keepdim=True)
    torch.testing.assert_close(of_scale, noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("Z", [20, 100])
def test_a_mixture_far_apart_in_many_dimensions_has_finite_gradients(Z):
    loc = torch.stack([torch.full((Z,), -20.0), torch.full((Z,), 20.0)]).requires_grad_()
    logits = torch.zeros(2, requires_grad=True)
    q = posteriors.MixtureOfNormals(logits, loc, torch.full((2, Z), 0.1))
    z = q.rsample((50,))
    assert (z.detach().abs().mean(-1) > 19).all()
    grads = torch.autograd.grad((z.square().sum() + q.log_prob(z).sum()), [logits, loc])
    assert all(grad.isfinite().all() for grad in grads)


# ------------------------------------------------------------------------------ per datapoint


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
def test_local_optima_are_the_exact_posteriors():
    model = LinearModel(2, 4)  # its posterior is diagonal
    x = model.draw(6)
    A, a, S = model.posterior()
    encoder = guides.Normal(nn.Linear(4, 4))
    local, index = encoder.local(x), torch.arange(6)
    torch.testing.assert_close(local.posterior(index).mean, encoder.posterior(x).mean)
    before = [parameter.clone() for parameter in (*model.parameters(), *encoder.parameters())]
    random = torch.get_rng_state()
    reached = fit_local(Indexed(model), local, x, index, steps=1000, num_particles=32)
    assert torch.equal(torch.get_rng_state(), random)
    now = [*model.parameters(), *encoder.parameters()]
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(now, before, strict=True))
    assert all(p.grad is None for p in local.parameters())
    with torch.no_grad():
        q = local.posterior(index)
        torch.testing.assert_close(q.mean, x @ A.T + a, rtol=0, atol=0.03)
        torch.testing.assert_close(
            q.variance.sqrt(), S.diagonal().sqrt().expand(6, 2), atol=0.03, rtol=0
        )
        exact = exact_posterior(model, x)
        q = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
        assert torch.distributions.kl_divergence(q, exact).max() < 2e-3
    torch.testing.assert_close(reached, model.log_evidence(x).detach(), rtol=0, atol=0.02)


def test_rows_are_optimised_each_for_itself():
    model, x = vae()
    encoder, index = guides.Normal(nets.mlp(4, 8, 4)), torch.arange(6)
    other = x.clone()
    other[3] = 1 - other[3]
    tables = []
    for data in (x, other):
        local = encoder.local(x)
        fit_local(Indexed(model), local, data, index, steps=20)
        tables.append(local.table.rows.detach())
    same = (tables[0] == tables[1]).all(1)
    assert same.tolist() == [True, True, True, False, True, True]


def test_a_guide_with_parameters_by_row_leaves_their_start_alone():
    model, x = vae()
    start = torch.randn(6, 4)
    kept = start.clone()
    guide = guides.PerDatapoint(conditionals.Normal(nn.Identity()), start)
    svi = ppvae.SVI(Indexed(model), guide, functools.partial(torch.optim.Adam, lr=0.1))
    svi.step(x, torch.arange(6))
    assert torch.equal(start, kept)
    assert not torch.equal(guide.posterior(torch.arange(6)).mean, kept[:, :2])


def test_local_keeps_the_family_and_leaves_the_guide_alone():
    model, x = vae()
    layers = posteriors.iaf(2, 3, hidden=[4])
    guide = guides.Amortized(posteriors.Flow(nets.mlp(4, 8, 7), layers, 2, context_dim=3))
    local, index = guide.local(x), torch.arange(6)
    z = torch.randn(6, 2)
    torch.testing.assert_close(local.posterior(index).log_prob(z), guide.posterior(x).log_prob(z))
    assert [name for name, p in local.named_parameters() if p.requires_grad] == ["table.rows"]
    assert all(p.requires_grad for p in guide.parameters())
    fit_local(Indexed(model), local, x, index, steps=5)
    with pytest.raises(TypeError, match=r"subclass of conditionals\.Conditional"):
        guides.Amortized(nn.Linear(4, 2)).local(x)
    with pytest.raises(ValueError, match="no trainable parameter that is not the model's"):
        fit_local(Indexed(model), local.requires_grad_(False), x, index)
    with pytest.raises(ValueError, match=r"must be an nn\.Module, got function"):
        fit_local(Indexed(model), lambda x, index: local(x, index), x, index)


def test_individual_inference_in_fit_and_in_evidence():
    model, x = vae()
    x = x.repeat(5, 1)
    index = torch.arange(30)
    guide = guides.PerDatapoint(conditionals.Normal(nn.Identity()), torch.zeros(30, 4))
    pair = Indexed(model), guide
    svi = ppvae.SVI(*pair, functools.partial(torch.optim.Adam, lr=0.02), elbo.ELBO(16))
    history = ppvae.fit(svi, (x, index), epochs=20, batch_size=7, valid=(x, index), progress=False)
    assert history.column("valid_bound")[-1] > history.column("valid_bound")[0]
    assert (guide.table.rows != 0).any(1).all()
    whole = log_evidence(*pair, x, index, num_particles=200, seed=0)
    chunks = log_evidence(*pair, x, index, num_particles=200, max_rows=1000, seed=1)
    gap = (whole.log_evidence - chunks.log_evidence).abs()
    assert (gap < 5 * (whole.log_evidence_se + chunks.log_evidence_se)).all()
    for wrong, match in (
        ((x, index + 1), "row numbers must lie in 0 .. 29, got 1 .. 30"),
        ((x, index.float()), "takes the row numbers as its last argument"),
        ((x,), "takes the row numbers as its last argument"),
    ):
        with pytest.raises((ppvae.PairError, ValueError), match=match):
            ppvae.check_pair(*pair, *wrong)
    with pytest.raises(ppvae.PairError, match="row numbers must lie in 0"):
        ppvae.fit(svi, (x, index.clone().index_fill(0, torch.tensor([29]), 30)), epochs=1,
                  batch_size=7, progress=False)  # fmt: skip


# ------------------------------------------------------------------------------ semi-amortised


@pytest.mark.parametrize("size", [1, 2, 7, 50])
def test_cubature_points_have_the_moments_of_the_normal(size):
    points = cubature(size, torch.zeros((), dtype=torch.float64))
    assert points.shape == (2 * size, size)
    torch.testing.assert_close(points.mean(0), points.new_zeros(size))
    covariance = points.T @ points / len(points)
    torch.testing.assert_close(covariance, torch.eye(size, dtype=torch.float64))


def exact_elbo(model, q, x):
    """Of a Gaussian q under a linear-Gaussian model, by its KL to the exact posterior."""
    q = dist.MultivariateNormal(q.mean, q.covariance_matrix)
    return model.log_evidence(x) - torch.distributions.kl_divergence(q, exact_posterior(model, x))


HEADS = {
    "diagonal": (lambda net: conditionals.Normal(net), 6),
    "full": (lambda net: posteriors.FullNormal(net, dim=3), 9),
    "low rank": (lambda net: posteriors.LowRankNormal(net, rank=1), 9),
}


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("through", [True, False])
def test_refinement_is_gradient_ascent_on_the_exact_elbo(head, steps, through):
    """Cubature is exact for a log-joint that is quadratic in z; so is the derivative through it."""
    model, x = correlated()
    make, width = HEADS[head]
    encoder = guides.Amortized(make(nn.Linear(2, width)))
    guide = guides.SemiAmortized(encoder, model, steps=steps, lr=0.05, through=through)
    outputs = start = encoder.outputs(x)
    for _ in range(steps):
        q = encoder.head(outputs)
        if head == "diagonal":
            q = dist.MultivariateNormal(q.mean, torch.diag_embed(q.variance))
        value = exact_elbo(model, q, x).sum()
        (slope,) = torch.autograd.grad(value, outputs, create_graph=True)
        outputs = outputs + 0.05 * (slope if through else slope.detach())
    refined = guide.outputs(x)
    torch.testing.assert_close(refined, outputs, rtol=1e-5, atol=1e-6)  # low rank: by differences
    direction = torch.randn_like(refined)
    parameters = list(encoder.parameters())
    one = torch.autograd.grad((refined * direction).sum(), parameters, retain_graph=True)
    other = torch.autograd.grad((outputs * direction).sum(), parameters, retain_graph=True)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with torch.no_grad():  # and without a graph
        torch.testing.assert_close(guide.outputs(x), refined)
    plain = torch.autograd.grad((start * direction).sum(), parameters)
    assert through != all(torch.allclose(a, b) for a, b in zip(one, plain, strict=True))


@pytest.mark.usefixtures("float64")
def test_many_steps_close_the_amortisation_gap():
    model, x = correlated()
    encoder = guides.Amortized(posteriors.FullNormal(nn.Linear(2, 9), dim=3))
    gaps = []
    for steps in (1, 10, 400):
        guide = guides.SemiAmortized(encoder, model, steps=steps, lr=0.03)
        with torch.no_grad():
            q = guide.posterior(x)
            gaps.append((model.log_evidence(x) - exact_elbo(model, q, x)).max().item())
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3


@pytest.mark.usefixtures("float64")
def test_rows_are_refined_each_for_itself():
    model, x = vae()
    model, x = model.double(), x.double()
    encoder = guides.Normal(nets.mlp(4, 8, 4).double())
    guide = guides.SemiAmortized(encoder, model, steps=3)
    whole = guide.outputs(x)
    for row in (0, 3):
        torch.testing.assert_close(guide.outputs(x[row : row + 1]), whole[row : row + 1])
    x.requires_grad_()
    (slope,) = torch.autograd.grad(guide.outputs(x)[2].sum(), x)
    assert (slope != 0).any(1).tolist() == [False, False, True, False, False, False]


def test_the_model_learns_through_the_refinement_and_is_not_owned():
    model, guide, (x,) = build("semi_amortized")
    owned = {id(parameter) for parameter in guide.parameters()}
    assert not owned & {id(parameter) for parameter in model.parameters()}
    for through in (True, False):
        guide.through = through
        loss = guide.outputs(x).square().sum()
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        assert any(g is not None for g in grads) == through


def test_refining_moves_no_batch_norm_statistics():
    model, _, (x,) = build("vae_conv")
    encoder = guides.Normal(nets.conv_encoder(4, (1, 6, 5), channels=(3,), hidden=(8,)))
    guide = guides.SemiAmortized(encoder, model, steps=2)
    model.train()
    before = {name: value.clone() for name, value in model.named_buffers()}
    guide(x)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())


def test_what_cannot_be_refined():
    model, x = vae()
    with pytest.raises(TypeError, match=r"guides\.Amortized\(conditional\)"):
        guides.SemiAmortized(guides.Prior(model), model)
    encoder = guides.Normal(nets.mlp(4, 8, 4))
    for wrong in ({"steps": 0}, {"lr": 0.0}):
        with pytest.raises(ValueError, match="steps >= 1 and lr > 0"):
            guides.SemiAmortized(encoder, model, **wrong)
    mixed = guides.Amortized(posteriors.Mixture(nets.mlp(4, 8, 10), 2))
    with pytest.raises(TypeError, match="MixtureOfNormals is not made of normals"):
        guides.SemiAmortized(mixed, model)(x)


@pytest.mark.usefixtures("float64")
def test_paths_are_the_distributions_own():
    """At normal noise the paths have the distributions' mean and covariance."""
    outputs = torch.randn(9)
    points = cubature(3, outputs)
    for make, width in HEADS.values():
        q = make(nn.Identity())(outputs[:width])
        size = 4 if isinstance(q, dist.LowRankMultivariateNormal) else 3
        z = path(q, cubature(size, outputs) if size == 4 else points)
        torch.testing.assert_close(z.mean(0), q.mean)
        expected = torch.diag(q.variance) if width == 6 else q.covariance_matrix
        torch.testing.assert_close((z - q.mean).T @ (z - q.mean) / len(z), expected)


# ------------------------------------------------------------------------------ point mass


@pytest.mark.usefixtures("float64")
def test_a_point_mass_learns_the_mode():
    model = LinearModel(2, 4)
    x = model.draw(8)
    guide = guides.PointMass(nn.Linear(4, 2))
    optimiser = torch.optim.Adam(guide.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 250)
    objective = elbo.ELBO()(model, guide)
    for _ in range(250):
        optimiser.zero_grad()
        loss = objective(x)
        loss.backward()
        optimiser.step()
        schedule.step()
    A, a, _ = model.posterior()
    mode = x @ A.T + a
    torch.testing.assert_close(guide(x), mode, rtol=0, atol=1e-4)
    joint = (
        dist.Normal(0.0, 1.0).log_prob(mode).sum()
        + dist.Normal(mode @ model.weight.T + model.bias, model.log_sigma.exp()).log_prob(x).sum()
    )
    torch.testing.assert_close(-loss, joint, rtol=1e-6, atol=1e-6)


def test_a_point_mass_has_no_evidence():
    model, x = vae()
    guide = guides.PointMass(nets.mlp(4, 8, 2))
    for run in (
        lambda: elbo.IWELBO(3)(model, guide)(x),
        lambda: elbo.ELBO(3)(model, guide)(x),
        lambda: log_evidence(model, guide, x, num_particles=10),
    ):
        with pytest.raises(ValueError, match="no importance weights"):
            run()
    report = ppvae.check_pair(model, guide, x)
    assert report.gradients["pathwise"] == "" and "point mass" in report.gradients["dreg"]
    assert "no evidence or k-hat" in repr(report)


# ------------------------------------------------------------------------------ autoguides


def auto(make=AutoNormal, rows=20):
    model, _ = vae()
    x = torch.bernoulli(torch.full((rows, 4), 0.5))
    return Indexed(model), guides.Auto(make, model, x), x, torch.arange(rows)


def test_an_autoguide_names_what_it_cannot_run():
    with pytest.raises(ValueError, match=r"the model fails on the data: .*width 2"):
        guides.Auto(AutoNormal, conditionals.Bernoulli(nets.mlp(2, 8, 4)), torch.ones(3, 4))
    for rows in (torch.ones(0, 4), torch.tensor(1.0), [1.0]):
        with pytest.raises(TypeError, match="data must be tensors whose rows are datapoints"):
            guides.Auto(AutoNormal, vae()[0], rows)
    with pytest.raises(TypeError, match="make must make a guide"):
        guides.Auto(lambda model, create_plates: None, vae()[0], torch.ones(3, 4))


def test_an_autoguide_has_parameters_by_row():
    model, guide, x, index = auto()
    loss = elbo.ELBO()(model, guide)(x[3:6], index[3:6])
    loss.backward()
    assert guide.auto.locs.z_unconstrained.grad.ne(0).any(1).nonzero().flatten().tolist() == [
        3,
        4,
        5,
    ]
    assert len(pyro.get_param_store()) == 0
    svi = ppvae.SVI(model, guide, functools.partial(torch.optim.Adam, lr=0.05))
    ppvae.fit(svi, (x, index), epochs=2, batch_size=6, progress=False)
    assert log_evidence(model, guide, x, index, num_particles=30, max_rows=100).elbo.shape == (20,)
    ppvae.check_pair(model, guide, x, index)
    other = auto()[1]
    other.load_state_dict(guide.state_dict())
    weights = []
    for g in (guide, other):
        pyro.set_rng_seed(1)
        weights.append(ppvae.log_weights(model, g, x, index).log_w)
    assert torch.equal(*weights)


def test_an_autoguide_weighs_as_the_same_normal_does():
    model, guide, x, _ = auto()
    with torch.no_grad():
        guide.auto.locs.z_unconstrained.normal_()
    raw = torch.cat([guide.auto.locs.z, guide.auto.scales.z.log()], -1).detach()
    same = guides.PerDatapoint(conditionals.Normal(nn.Identity()), raw)
    rows = torch.tensor([4, 11, 2])
    values = []
    for g in (guide, same):
        pyro.set_rng_seed(1)
        values.append(ppvae.log_weights(model, g, x[rows], rows, num_particles=5).log_w)
    torch.testing.assert_close(*values)


def test_a_batch_of_an_autoguide_is_a_plain_batch():
    """Its rows are a subsample to Pyro, whose factor N / B must not reach a term."""
    model, guide, x, index = auto()
    weights = ppvae.log_weights(model, guide, x[:4], index[:4])
    assert weights.scale == 1.0 and not weights.site_scales
    losses = []
    for rows in (index, *index.split(4)):
        torch.manual_seed(1)
        losses.append(elbo.ELBO(400).loss(model, guide, x[rows], rows))
    # of 20 rows: the sum over batches is the loss of all, with a standard error below 1
    assert sum(losses[1:]) == pytest.approx(losses[0], abs=5.0)


def test_an_autoguide_trains_in_stock_pyro():
    model, guide, x, index = auto()
    before = guide.auto.locs.z.detach().clone()
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    with pyro.validation_enabled():
        svi.step(x[:5], index[:5])
    moved = (guide.auto.locs.z != before).any(1)
    assert moved[:5].all()


def test_autoguides_that_flatten_are_refused():
    with pytest.raises(ValueError, match="AutoMultivariateNormal flattens"):
        auto(AutoMultivariateNormal)
    model, guide, x, index = auto(AutoDelta)
    elbo.ELBO()(model, guide)(x, index).backward()


def test_a_bare_autoguide_is_noted():
    model, x = vae()
    assert "belong to positions in the batch" in repr(ppvae.check_pair(model, AutoNormal(model), x))


def test_all_listed_guides_are_under_the_laws():
    assert set(NEW) <= ALL_PAIRS.keys()


def test_rows_of_a_larger_data_set_are_scaled_alike_in_model_and_guide():
    x, index = torch.eye(4)[:3], torch.arange(3)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    guide = guides.PerDatapoint(conditionals.Normal(nn.Identity()), torch.zeros(12, 4))
    weights = ppvae.log_weights(Indexed(model), guide, x, index, size=12)
    assert weights.scale == 4 and weights.full_size == 12 and not weights.site_scales


def test_what_a_local_fit_returns_is_the_bound_of_its_last_steps():
    """At the exact posterior every step has the ELBO log p(x)."""
    model = LinearModel(2, 4)
    model.double()
    x = model.draw(3)
    A, a, S = model.posterior()
    outputs = torch.cat([x @ A.T + a, S.flatten().expand(3, 4)], -1).detach()

    class Exact(ppvae.Program):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.outputs = model, nn.Parameter(outputs)

        def forward(self, x, index):
            with ppvae.program.data_plate(index):
                loc, covariance = self.outputs[index].split([2, 4], -1)
                covariance = covariance.unflatten(-1, (2, 2))
                pyro.sample("z", dist.MultivariateNormal(loc, covariance))

    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fit_local(Indexed(model), Exact(), x, torch.arange(3), steps=20, lr=1e-9)
    torch.testing.assert_close(found, model.log_evidence(x).detach(), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
