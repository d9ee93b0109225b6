"""TCELBO and DIPELBO against sums by hand, NumPy and enumeration; total correlation of q(z)."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from compiling import assert_compiled_is_eager
from oracles import assert_mean, trainable
from ppvae import conditionals, diagnostics, elbo, guides, models, nets, posteriors
from ppvae.elbo import State
from ppvae.elbo.disentangling import log_aggregate
from ppvae.program import data_plate
from ppvae.weights import weigh

pytestmark = pytest.mark.usefixtures("float64")
N, D, Z = 6, 4, 3


def pair(seed=0):
    torch.manual_seed(seed)
    model = models.VAE(conditionals.Normal(nets.mlp(Z, 8, D), scale=0.5), latent_dim=Z)
    return model, guides.Normal(nets.mlp(D, 8, 2 * Z)), torch.randn(N, D)


def terms(estimator, model, guide, x, num_particles=1, **kwargs):
    """log w and what the estimator makes of it, at the same draws."""
    weights = weigh(model, guide, (x,), kwargs, num_particles)
    return weights, estimator.effective(weights, State())


# ------------------------------------------------------------------------------ TCELBO


def draws_and_moments(weights):
    site = weights.guide_trace.nodes["z"]
    value, fn = site["value"], site["fn"].base_dist
    shape = (weights.num_particles, *value.shape[-2:])
    return [v.reshape(shape) for v in (value, fn.mean, fn.stddev)]


def aggregate_by_hand(z, mean, scale, n, k, size, dims):
    """The estimate of q(z) over some dimensions at draw k of row n, as the formula has it."""
    found, rows = 0.0, z.shape[1]
    for m in range(rows):
        share = 1 / size if m == n else (size - 1) / (size * (rows - 1))
        one = dist.Normal(mean[k, m, dims], scale[k, m, dims]).log_prob(z[k, n, dims])
        found = found + share * one.sum().exp()
    return found.log()


@pytest.mark.parametrize("num_particles", [1, 2])
def test_value_and_gradient_by_hand(num_particles):
    model, guide, x = pair()
    estimator = elbo.TCELBO(num_particles, alpha=0.5, beta=6.0, gamma=2.0, size=50)
    weights, found = terms(estimator, model, guide, x, num_particles)
    z, mean, scale = draws_and_moments(weights)
    wanted = torch.zeros_like(found)
    for k, n in itertools.product(range(num_particles), range(N)):
        joint = aggregate_by_hand(z, mean, scale, n, k, 50, list(range(Z)))
        marginals = sum(aggregate_by_hand(z, mean, scale, n, k, 50, [j]) for j in range(Z))
        log_q = dist.Normal(mean, scale).log_prob(z)[k, n].sum()
        log_p = dist.Normal(0.0, 1.0).log_prob(z[k, n]).sum()
        wanted[k, n] = (
            weights.log_p["x"].reshape(num_particles, N)[k, n]
            - 0.5 * (log_q - joint)
            - 6.0 * (joint - marginals)
            - 2.0 * (marginals - log_p)
        )
    torch.testing.assert_close(found, wanted)
    parameters = trainable(model, guide)
    by_hand = torch.autograd.grad(wanted.sum(), parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), parameters), by_hand)


def test_equal_weights_are_the_elbo_whatever_the_estimate():
    model, guide, x = pair()
    for size in (N, 10**6):
        weights, found = terms(elbo.TCELBO(size=size), model, guide, x)
        assert torch.equal(found, weights.log_w)  # all 1: to the bit
        for weight in (0.0, 4.0):
            parts = elbo.TCELBO(alpha=weight, beta=weight, gamma=weight, size=size)
            whole = elbo.ELBO(beta=weight).effective(weights, State())
            torch.testing.assert_close(parts.effective(weights, State()), whole)


def normal(mean, scale):
    return dist.Normal(mean, scale)


def test_the_mean_of_the_estimate_over_batches_is_the_aggregate():
    """Every batch of 3 of 7 rows that holds row n, each as likely as any other."""
    mean, scale = torch.randn(7, 2), torch.rand(7, 2) + 0.3
    z = normal(mean, scale).sample()
    exact = normal(mean, scale).log_prob(z[:, None]).sum(-1).exp().mean(1)
    by_unit = normal(mean, scale).log_prob(z[:, None]).exp().mean(1)
    for n in range(7):
        others = [m for m in range(7) if m != n]
        found, found_by_unit = [], []
        for two in itertools.combinations(others, 2):
            for place in range(3):  # a row's own weight is where the row is
                rows = [*two[:place], n, *two[place:]]
                joint, _ = log_aggregate(normal(mean[rows], scale[rows]), z[rows], 7)
                found.append(joint[0, place].exp())
                one = normal(mean[rows, :1], scale[rows, :1])
                found_by_unit.append(log_aggregate(one, z[rows, :1], 7)[1][0, place].exp())
        torch.testing.assert_close(torch.stack(found).mean(), exact[n])
        torch.testing.assert_close(torch.stack(found_by_unit).mean(), by_unit[n, 0])


def test_it_is_the_mean_of_the_published_weights():
    """1/N for itself, (N - M) / (N M) for one other row, 1/M for the rest, with M = B - 1."""
    mean, scale = torch.randn(5, 1), torch.rand(5, 1) + 0.3
    z = normal(mean, scale).sample()
    densities = normal(mean, scale).log_prob(z[:, None])[..., 0].exp()
    size, M = 40, 4
    for n in range(5):
        found = []
        for odd in set(range(5)) - {n}:
            shares = torch.full((5,), 1 / M)
            shares[n], shares[odd] = 1 / size, (size - M) / (size * M)
            assert shares.sum().item() == pytest.approx(1)
            found.append(shares @ densities[n])
        joint, _ = log_aggregate(normal(mean, scale), z, size)
        torch.testing.assert_close(torch.stack(found).mean(), joint[0, n].exp())


def test_the_whole_data_set_has_the_aggregate_itself():
    mean, scale = torch.randn(5, 2), torch.rand(5, 2) + 0.3
    z = normal(mean, scale).sample()
    densities = normal(mean, scale).log_prob(z[:, None])
    joint, marginals = log_aggregate(normal(mean, scale), z, 5)
    torch.testing.assert_close(joint[0], densities.sum(-1).exp().mean(1).log())
    torch.testing.assert_close(marginals[0], densities.exp().mean(1).log().sum(-1))


class Bits(ppvae.Program):
    """Two bits, and data that both make; q(bits | x) for three rows."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor([[0.3, -0.8], [1.0, 0.2], [-0.5, 0.6]]))

    def forward(self, x):
        with data_plate(x):
            pyro.sample("z", dist.Bernoulli(logits=self.logits).to_event(1))


def bits_model(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Bernoulli(x.new_full((2,), 0.4)).to_event(1))
        pyro.sample("x", dist.Normal(z @ z.new_tensor([1.0, -2.0]), 1.0), obs=x)


def test_the_score_gradient_is_that_of_the_enumerated_objective():
    guide, x = Bits(), torch.tensor([0.5, -1.0, 2.0])
    points = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))  # (4, 2)
    densities = dist.Bernoulli(logits=guide.logits).log_prob(points[:, None])  # (4, 3, 2)
    log_q = densities.sum(-1)
    joint = log_q.exp().mean(1).log()
    marginals = densities.exp().mean(1).log().sum(-1)
    log_p = dist.Bernoulli(torch.tensor(0.4)).log_prob(points).sum(-1)
    log_x = dist.Normal((points @ torch.tensor([1.0, -2.0]))[:, None], 1.0).log_prob(x)
    at = log_x - 0.5 * (log_q - joint[:, None]) - (3 * (joint - marginals))[:, None]
    at = at - (2 * (marginals - log_p))[:, None]
    (exact,) = torch.autograd.grad((log_q.exp() * at).sum(), guide.logits)
    estimator = elbo.TCELBO(20, gradient="score", alpha=0.5, beta=3.0, gamma=2.0, size=3)
    torch.manual_seed(0)
    grads = torch.stack(
        [-torch.autograd.grad(estimator(bits_model, guide)(x), guide.logits)[0] for _ in range(300)]
    )
    for found, wanted in zip(grads.flatten(1).T, exact.flatten(), strict=True):
        assert_mean(found, wanted)


# ------------------------------------------------------------------------------ DIPELBO


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("num_particles", [1, 2])
def test_dip_by_numpy(kind, num_particles):
    model, guide, x = pair()
    estimator = elbo.DIPELBO(
        num_particles, beta=2.0, kind=kind, diagonal=5.0, off_diagonal=lambda step: 3.0 + step
    )
    weights, found = terms(estimator, model, guide, x, num_particles)
    _, mean, scale = (v[0].detach().numpy() for v in draws_and_moments(weights))
    covariance = np.cov(mean, rowvar=False, bias=True)
    if kind == "II":
        covariance = covariance + np.diag((scale**2).mean(0))
    off = covariance - np.diag(np.diag(covariance))
    penalty = 3 * (off**2).sum() + 5 * ((np.diag(covariance) - 1) ** 2).sum()
    plain = elbo.ELBO(num_particles, beta=2.0).effective(weights, State())
    torch.testing.assert_close(found, plain - penalty)


def test_the_gradient_of_dip_is_that_of_its_value():
    model, guide, x = pair()
    estimator = elbo.DIPELBO(kind="II", kl="analytic", diagonal=5.0, off_diagonal=3.0)
    (*_, bias) = guide.parameters()

    def value(shift=0.0):
        with torch.no_grad():
            bias[-1] += shift
        torch.manual_seed(0)
        loss = estimator(model, guide)(x)
        with torch.no_grad():
            bias[-1] -= shift
        return loss

    slope = torch.autograd.grad(value(), bias)[0][-1]
    assert slope.item() == pytest.approx(((value(1e-5) - value(-1e-5)) / 2e-5).item(), rel=1e-6)


# ------------------------------------------------------------------------------ both

ESTIMATORS = {
    "tc": lambda **kwargs: elbo.TCELBO(beta=6.0, size=50, **kwargs),
    "dip": lambda **kwargs: elbo.DIPELBO(diagonal=5.0, off_diagonal=2.0, **kwargs),
}
both = pytest.mark.parametrize("make", ESTIMATORS.values(), ids=ESTIMATORS)


@both
def test_evaluation_is_of_the_elbo(make):
    model, guide, x = pair()
    torch.manual_seed(1)
    found = make(num_particles=4).evaluate(model, guide, x)
    torch.manual_seed(1)
    assert torch.equal(found, elbo.ELBO(4).evaluate(model, guide, x))
    assert make().evaluate(model, guide, x[:1]).shape == (1,)  # where training needs two rows


@pytest.mark.parametrize(
    "estimator",
    [
        elbo.TCELBO(2, beta=elbo.LinearWarmup(3, 0.0, 5.0), gamma=lambda step: 1 + step, size=50),
        elbo.DIPELBO(2, diagonal=elbo.LinearWarmup(2), off_diagonal=2.0, kind="II"),
    ],
    ids=["tc", "dip"],
)
def test_schedules_change_in_a_compiled_step(traced, estimator):
    x = pair()[2]
    assert_compiled_is_eager(lambda: pair()[:2], [(x,)] * 3, estimator)
    assert len(traced) == 1
    first, later = State(), State()
    later.count()
    weights, _ = terms(estimator, *pair()[:2], x)
    assert not torch.equal(estimator.effective(weights, first), estimator.effective(weights, later))


def test_a_minibatch_of_a_plate_and_its_size():
    model, guide, x = pair()

    sized = [lambda x, program=program: program(x, size=50) for program in (model, guide)]
    torch.manual_seed(1)
    scaled = ESTIMATORS["tc"]()(*sized)(x)
    torch.manual_seed(1)
    torch.testing.assert_close(scaled * N / 50, ESTIMATORS["tc"]()(model, guide)(x))
    with pytest.raises(ValueError, match="size=40, and the data plate has 50 rows"):
        elbo.TCELBO(beta=2.0, size=40)(*sized)(x)


@both
def test_pairs_that_are_refused(make):
    model, guide, x = pair()
    full = guides.Amortized(posteriors.FullNormal(nets.mlp(D, 8, Z * (Z + 3) // 2), Z))
    with pytest.raises(ValueError, match=r"latent 'z'.*not \(6, 3\) of MultivariateNormal"):
        make()(model, full)(x)
    with pytest.raises(ValueError, match="this one has 1: give more"):
        make()(model, guide)(x[:1])
    levels = [conditionals.Normal(nets.mlp(Z, 2 * Z))]
    deep = models.Hierarchical(conditionals.Normal(nets.mlp(Z, D), scale=1.0), levels, latent_dim=Z)
    up = [conditionals.Normal(nets.mlp(width, 2 * Z)) for width in (D, Z)]
    with pytest.raises(ValueError, match=r"is of one latent, .* not of \['z1', 'z2'\]"):
        make()(deep, guides.BottomUp(deep, up))(x)
    scaled = [pyro.poutine.scale(program, scale=0.5) for program in (model, guide)]
    with pytest.raises(ValueError, match=r"'z' has a mask or a poutine\.scale"):
        make()(*scaled)(x)
    masked = [pyro.poutine.mask(p, mask=torch.arange(N) < 4) for p in (model, guide)]
    with pytest.raises(ValueError, match=r"'z' has a mask or a poutine\.scale"):
        make()(*masked)(x)


def scalar(x):
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def scalar_guide(x):
    with data_plate(x):
        pyro.sample("z", dist.Normal(x, 1.0))


def test_a_latent_that_is_no_vector_is_refused():
    with pytest.raises(ValueError, match=r"independent ones, \(N, D\), not \(6,\) of Normal"):
        elbo.TCELBO(beta=2.0, size=50)(scalar, scalar_guide)(torch.zeros(N))


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: elbo.TCELBO(beta=6.0), TypeError, "size"),
        (lambda: elbo.TCELBO(size=1), ValueError, "number of training datapoints, >= 2: got 1"),
        (lambda: elbo.TCELBO(size=2.5), ValueError, "got 2.5"),
        (lambda: elbo.TCELBO(gamma=-1.0, size=9), ValueError, "TCELBO: gamma must be >= 0, got -1"),
        (lambda: elbo.TCELBO(alpha="1", size=9), TypeError, "alpha must be a number or a schedule"),
        (lambda: elbo.TCELBO(beta=elbo.FreeBits(1.0), size=9), TypeError, "beta must be a number"),
        (lambda: elbo.TCELBO(kl="analytic", size=9), ValueError, "takes no kl='analytic'"),
        (lambda: elbo.TCELBO(gradient="stl", size=9), ValueError, "gradient='stl' is not defined"),
        (lambda: elbo.DIPELBO(diagonal=1.0), TypeError, "off_diagonal"),
        (lambda: elbo.DIPELBO(diagonal=1.0, off_diagonal=None), TypeError, "off_diagonal must be"),
        (lambda: elbo.DIPELBO(diagonal=1, off_diagonal=1, kind="III"), ValueError, "got 'III'"),
    ],
)
def test_bad_arguments(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_more_rows_than_the_data_set_has():
    model, guide, x = pair()
    with pytest.raises(ValueError, match="size=5, and the data plate has 6 rows"):
        elbo.TCELBO(beta=2.0, size=5)(model, guide)(x)


# ------------------------------------------------------------------------------ total correlation


def encoder(mean, scale):
    """A guide whose q(z | row n) has the n-th mean and scale."""
    net = nn.Linear(len(mean), 2 * mean.shape[1], bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.cat([mean, scale.log()], 1).T)
    return guides.Normal(net), torch.eye(len(mean))


def test_a_gaussian_aggregate_has_its_exact_total_correlation():
    """Covariance of the means and mean variance add up to variances 1 and correlation 0.8."""
    wanted = torch.tensor([[1.0, 0.8], [0.8, 1.0]])
    left = wanted - 0.1 * torch.eye(2)
    means = torch.randn(400, 2)
    means = means - means.mean(0)
    means = means @ torch.linalg.cholesky(means.T @ means / 400).inverse().T
    means = means @ torch.linalg.cholesky(left).T
    guide, x = encoder(means, torch.full((400, 2), 0.1**0.5))
    found = diagnostics.total_correlation(guide, x, num_draws=4000)
    assert found.gaussian == pytest.approx(-0.5 * math.log(1 - 0.8**2), abs=1e-10)
    assert found.gaussian == pytest.approx(0.5108, abs=1e-4)
    # a mixture of 400 Gaussians, nearly that Gaussian
    assert abs(found.aggregate - found.gaussian) < 4 * found.standard_error < 0.2


@pytest.mark.parametrize("num_draws", [2, 3000])
def test_the_aggregate_is_that_of_the_mixture(num_draws):
    """Against quadrature in the plane; the mean over seeds where draws are few."""
    mean = torch.tensor([[-1.0, 0.5], [1.5, 1.0], [0.2, -1.2]])
    scale = torch.tensor([[0.5, 0.9], [0.7, 0.4], [0.6, 0.6]])
    guide, x = encoder(mean, scale)
    grid = torch.linspace(-7, 7, 701)
    points = torch.cartesian_prod(grid, grid)
    densities = normal(mean, scale).log_prob(points[:, None])
    joint = densities.sum(-1).exp().mean(1)
    product = densities.exp().mean(1).prod(-1)
    exact = (joint * (joint.log() - product.log())).sum() * (grid[1] - grid[0]) ** 2
    if num_draws == 2:  # rows 0 and 2 only: fewer draws than rows are spread over the rows
        found = diagnostics.total_correlation(guide, x, num_draws=2)
        assert math.isfinite(found.aggregate) and found.standard_error > 0
        return
    found = torch.tensor(
        [
            diagnostics.total_correlation(guide, x, num_draws=300, seed=s).aggregate
            for s in range(99)
        ]
    )
    assert_mean(found, exact)
    one = diagnostics.total_correlation(guide, x, num_draws=num_draws)
    assert one == diagnostics.total_correlation(guide, x, num_draws=num_draws, max_pairs=7)


def test_bits_against_enumeration():
    guide, x = Bits(), torch.zeros(3)
    points = torch.tensor(list(itertools.product([0.0, 1.0], repeat=2)))
    densities = dist.Bernoulli(logits=guide.logits).log_prob(points[:, None])
    joint = densities.sum(-1).exp().mean(1)
    exact = (joint * (joint.log() - densities.exp().mean(1).prod(-1).log())).sum().detach()
    found = torch.tensor(
        [diagnostics.total_correlation(guide, x, num_draws=99, seed=s).aggregate for s in range(99)]
    )
    assert_mean(found, exact)


def test_total_correlation_refuses():
    _, guide, x = pair()
    full = guides.Amortized(posteriors.FullNormal(nets.mlp(D, 8, Z * (Z + 3) // 2), Z))
    with pytest.raises(ValueError, match=r"draws \{'z': 'MultivariateNormal'\}, and total_corr"):
        diagnostics.total_correlation(full, x)
    with pytest.raises(ValueError, match="rows must be at least 2"):
        diagnostics.total_correlation(guide, x[:1])
    with pytest.raises(ValueError, match="num_draws must be at least 1"):
        diagnostics.total_correlation(guide, x, num_draws=0)
