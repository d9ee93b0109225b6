"""Evidence and k-hat, against ArviZ and against exact answers."""

import dataclasses
import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets
from ppvae.diagnostics.evidence import summarise

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import arviz


class LinearGaussian(ppvae.Program):
    """The model `data.load("linear_gaussian")` is drawn from."""

    def __init__(self, parameters):
        super().__init__()
        self.parameters_ = parameters

    def forward(self, x):
        W, b, sigma = self.parameters_
        with pyro.plate("data", len(x)):
            prior = dist.Normal(torch.zeros(W.shape[1], dtype=W.dtype), 1.0).to_event(1)
            z = pyro.sample("z", prior)
            pyro.sample("x", dist.Normal(z @ W.T + b, sigma).to_event(1), obs=x)


class Posterior(ppvae.Program):
    """The exact posterior, its standard deviations times `scale`, moved by `shift` of them."""

    def __init__(self, parameters, scale=1.0, shift=0.0):
        super().__init__()
        self.parameters_, self.scale, self.shift = parameters, scale, shift

    def forward(self, x):
        exact = self.parameters_.posterior(x)
        root = exact.scale_tril
        loc = exact.loc + self.shift * root.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=self.scale * root))


class Spy(nn.Identity):
    """Counts the rows a decoder is called with."""

    largest = 0

    def forward(self, z):
        self.largest = max(self.largest, z[..., 0].numel())
        return z


PARAMETERS = data.linear_gaussian_parameters()
ROWS = data.load("linear_gaussian").test.x.double()
EXACT = PARAMETERS.log_evidence(ROWS)
X = torch.bernoulli(torch.full((10, 4), 0.5), generator=torch.Generator().manual_seed(1))


def lg(scale=1.0, shift=0.0):
    return LinearGaussian(PARAMETERS), Posterior(PARAMETERS, scale, shift)


def vae(**options):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4, **options)), latent_dim=2)
    return model, guides.Normal(nets.mlp(4, 8, 2 * 2, **options))


# -- k-hat -------------------------------------------------------------------------------------


def arviz_khat(log_w):
    with np.errstate(over="ignore"):  # inside its fit
        values = [float(arviz.psislw(column.numpy())[1]) for column in log_w.T]
    return torch.tensor(values, dtype=torch.float64)


TAILS = {
    "normal": lambda K: torch.randn(K, 12),
    "light": lambda K: -torch.rand(K, 12),
    "pareto": lambda K: torch.linspace(0.1, 2.0, 12) * -torch.rand(K, 12).log(),
    "wide": lambda K: 30 * torch.randn(K, 12),
    "far": lambda K: 1e3 * torch.randn(K, 12) - 1e5,
    "ties": lambda K: (3 * torch.randn(K, 12)).round() / 3,
    "few values": lambda K: torch.randint(2, (K, 12)).double(),
    "one outlier": lambda K: torch.randn(K, 12).index_fill(0, torch.tensor([3]), 200.0),
}


@pytest.mark.parametrize("K", [21, 25, 100, 1000, 5000])
@pytest.mark.parametrize("tail", TAILS)
def test_khat_is_arvizs(tail, K, float64):
    log_w = TAILS[tail](K)
    ours, theirs = diagnostics.khat(log_w), arviz_khat(log_w)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_khat_of_weights_that_are_zero(float64):
    log_w = torch.randn(1000, 5)
    log_w[:5, 0] = log_w[:990, 1] = log_w[:400, 2] = -math.inf
    log_w[:996, 3] = -math.inf  # four weights left: no tail
    torch.testing.assert_close(diagnostics.khat(log_w)[:3], arviz_khat(log_w)[:3])
    assert diagnostics.khat(log_w)[:3].ne(0).all()
    assert diagnostics.khat(log_w)[3] == math.inf == arviz_khat(log_w)[3]
    log_w[:, 0], log_w[3, 1], log_w[3, 2] = -math.inf, math.nan, math.inf
    assert diagnostics.khat(log_w).isnan().tolist() == [True, True, True, False, False]


def test_khat_ignores_a_constant_and_the_order(float64):
    log_w = torch.randn(400, 300)  # more columns than are fitted at once
    expected = diagnostics.khat(log_w)
    torch.testing.assert_close(diagnostics.khat(log_w + 700.0), expected, rtol=0, atol=1e-9)
    assert torch.equal(diagnostics.khat(log_w[torch.randperm(400)]), expected)
    assert torch.equal(diagnostics.khat(log_w[:, 270:280]), expected[270:280])


def test_khat_of_float32():
    log_w = torch.randn(1000, 20)
    expected = arviz_khat(log_w.double())
    torch.testing.assert_close(diagnostics.khat(log_w), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, -1000.0, 1e-3])
def test_khat_of_constant_weights(dtype, value):
    exact = torch.full((100, 3), value, dtype=dtype)
    assert diagnostics.khat(exact).tolist() == [0.0, 0.0, 0.0]
    rounded = exact + 4 * torch.finfo(dtype).eps * max(abs(value), 1) * torch.randn_like(exact)
    assert diagnostics.khat(rounded).tolist() == [0.0, 0.0, 0.0]
    assert (diagnostics.khat(exact + 0.1 * torch.randn_like(exact)) != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("level", [0.0, -1e3, 1e4, -1e5, 1e6, -1e7])
@pytest.mark.parametrize("spread", [1.0, 10.0])
def test_khat_of_weights_that_vary_far_from_zero(level, spread, dtype):
    """A constant factor of the weights is none of its business, so long as they are not rounded."""
    log_w = (level + spread * -torch.rand(1000, 40, dtype=torch.float64).log()).to(dtype)
    found = diagnostics.khat(log_w)
    torch.testing.assert_close(found, diagnostics.khat(log_w.double() - level), rtol=0, atol=1e-6)
    torch.testing.assert_close(found, arviz_khat(log_w.double()), rtol=0, atol=1e-6)
    assert (found != 0).all()


@pytest.mark.parametrize(
    ("level", "spread"), [(1e3, 0.01), (1e4, 0.05), (1e5, 0.1), (1e6, 0.4), (1e7, 0.6), (1e8, 9.0)]
)
def test_khat_of_float32_is_zero_only_for_what_is_rounding(level, spread):
    """Twice the spread in nats is the range; a unit in the last place is 8 nats at 1e8."""
    log_w = level + spread * (2 * torch.rand(1000, 20) - 1)
    varies = log_w.amax(0) > log_w.amin(0)
    assert torch.equal(diagnostics.khat(log_w) != 0, varies)


@pytest.mark.parametrize("D", [10, 1000, 100_000])
def test_khat_of_an_exact_guide_in_float32(D):
    """log w is a sum of D rounded terms, -142,000 for the last."""
    x, W = torch.randn(D, dtype=torch.float64), torch.randn(D, dtype=torch.float64)
    precision = 1 + W.square().sum()
    exact = dist.Normal(W @ x / precision, precision.rsqrt())
    z = exact.sample((200,)).float()
    w, data = W.float(), x.float()
    log_p = torch.stack([dist.Normal(v * w, 1.0).log_prob(data).sum() for v in z])
    log_q = dist.Normal(exact.loc.float(), exact.scale.float()).log_prob(z)
    log_w = (log_p + dist.Normal(0.0, 1.0).log_prob(z) - log_q).unsqueeze(1)
    assert log_w.amax() > log_w.amin()
    assert diagnostics.khat(log_w).tolist() == [0.0]


@pytest.mark.parametrize("K", [1, 2, 5, 20])
def test_khat_of_too_few_draws(K):
    assert diagnostics.khat(torch.randn(K, 3)).isnan().all()
    assert diagnostics.khat(torch.randn(K, 3)).shape == (3,)


def test_khat_wants_two_dimensions():
    with pytest.raises(ValueError, match=r"\(K, N\), got torch\.float32 \(100,\)"):
        diagnostics.khat(torch.randn(100))


def test_khat_orders_guides(float64):
    # traps.md E: medians -0.82, 0.17 (exact up to rounding there), 0.62, 0.85, 1.44
    medians = {}
    for scale, shift in [(1.4, 0.0), (1.0, 0.0), (0.6, 0.0), (0.3, 0.0), (1.0, 3.0)]:
        pair = lg(scale, shift)
        result = diagnostics.log_evidence(*pair, ROWS[:30], num_particles=1000, seed=0)
        medians[scale, shift] = result.khat.median().item()
    assert medians[1.4, 0.0] < 0.0
    assert medians[1.0, 0.0] == 0.0  # the exact posterior: constant weights
    assert 0.3 < medians[0.6, 0.0] < 0.75
    assert 0.7 < medians[0.3, 0.0] < 1.2
    assert medians[1.0, 3.0] > 0.7


# -- log-evidence ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("scale", [0.8, 1.3])
def test_log_evidence_is_exact_within_its_error(scale, seed, float64):
    result = diagnostics.log_evidence(*lg(scale), ROWS, num_particles=500, seed=seed)
    error = result.log_evidence - EXACT
    assert abs(error.mean()) < 4 * result.mean_mc_se
    # each within its own error too, as often as a normal is
    assert ((error / result.log_evidence_se).abs() < 3).double().mean() > 0.97
    assert result.log_evidence.shape == result.ess.shape == result.khat.shape == (200,)
    assert (result.elbo < result.log_evidence).all()


def test_exact_posterior_has_no_error(float64):
    result = diagnostics.log_evidence(*lg(), ROWS, num_particles=50)
    torch.testing.assert_close(result.log_evidence, EXACT, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.elbo, EXACT, rtol=0, atol=1e-10)
    torch.testing.assert_close(result.ess, torch.full((200,), 50.0), rtol=1e-9, atol=0)
    assert (result.log_evidence_se < 1e-10).all()
    assert (result.khat == 0).all()


def test_the_standard_error_is_calibrated(float64):
    repeats = 200
    x = ROWS[:4].repeat(repeats, 1)  # one call: the draws of equal rows are independent
    result = diagnostics.log_evidence(*lg(1.3), x, num_particles=300, seed=0)
    error = (result.log_evidence - EXACT[:4].repeat(repeats)).reshape(repeats, 4)
    ratio = error.std(0) / result.log_evidence_se.reshape(repeats, 4).mean(0)
    assert ((ratio - 1).abs() < 4 / math.sqrt(2 * repeats)).all()


def test_the_formulas(float64):
    model, guide = lg(0.7)
    result = diagnostics.log_evidence(model, guide, ROWS[:6], num_particles=40, seed=5)
    torch.manual_seed(5)
    log_w = ppvae.log_weights(model, guide, ROWS[:6], num_particles=40).log_w
    w = log_w.exp()
    torch.testing.assert_close(result.log_evidence, w.mean(0).log())
    torch.testing.assert_close(result.ess, w.sum(0).square() / w.square().sum(0))
    torch.testing.assert_close(result.log_evidence_se, w.std(0) / math.sqrt(40) / w.mean(0))
    torch.testing.assert_close(result.elbo, log_w.mean(0))
    torch.testing.assert_close(result.khat, diagnostics.khat(log_w))
    assert result.num_particles == 40
    assert result.mean == pytest.approx(result.log_evidence.mean().item())
    assert result.mean_se == pytest.approx(result.log_evidence.std().item() / math.sqrt(6))
    se = result.log_evidence_se.square().sum().sqrt() / 6
    assert result.mean_mc_se == pytest.approx(se.item())


def test_small_probabilities_do_not_underflow(float64):
    result = diagnostics.log_evidence(*lg(1.2), ROWS[:3] + 100.0, num_particles=100)
    torch.testing.assert_close(
        result.log_evidence, PARAMETERS.log_evidence(ROWS[:3] + 100.0), rtol=0, atol=0.5
    )
    assert (result.log_evidence < -1000).all()


@pytest.mark.parametrize("max_rows", [1, 7, 30, 64, 10_000])
def test_chunks_bound_the_rows_and_change_nothing_else(max_rows, float64):
    result = diagnostics.log_evidence(
        *lg(1.2), ROWS[:9], num_particles=30, max_rows=max_rows, seed=1
    )
    error = result.log_evidence - EXACT[:9]
    assert (error.abs() < 5 * result.log_evidence_se).all()
    assert len(set(result.log_evidence.tolist())) == 9

    torch.set_default_dtype(torch.float32)
    spy = Spy()
    model, guide = vae()
    model.likelihood = conditionals.Bernoulli(nn.Sequential(spy, nn.Linear(2, 4)))
    diagnostics.log_evidence(model, guide, X, num_particles=30, max_rows=max_rows)
    torch.set_default_dtype(torch.float64)
    assert spy.largest <= max(max_rows, 10)  # 10: the plates are counted with one draw of each
    if max_rows <= 64:
        assert spy.largest >= min(max_rows, 30)


def test_the_unreliable_share_is_of_points_with_a_khat(float64):
    found = diagnostics.log_evidence(*lg(1.2), ROWS[:5], num_particles=30, seed=0)
    khat = torch.tensor([0.9, math.nan, 0.2, math.inf, 0.7])
    assert dataclasses.replace(found, khat=khat).unreliable == 0.5
    assert math.isnan(dataclasses.replace(found, khat=khat * math.nan).unreliable)


def test_chunks_have_the_same_distribution(float64):
    x = ROWS[:1].repeat(150, 1)
    values = [
        diagnostics.log_evidence(*lg(1.3), x, num_particles=10, max_rows=rows).log_evidence
        for rows in (7, 10_000)
    ]
    se = math.sqrt(sum(v.var().item() / 150 for v in values))
    assert abs(values[0].mean() - values[1].mean()) < 4 * se
    assert 0.75 < values[0].std() / values[1].std() < 1.35


def test_a_seed_leaves_the_random_stream():
    pair = vae()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a = diagnostics.log_evidence(*pair, X, num_particles=30, seed=1)
    assert torch.rand(1) == expected
    b = diagnostics.log_evidence(*pair, X, num_particles=30, seed=1)
    assert torch.equal(a.log_evidence, b.log_evidence)
    c = diagnostics.log_evidence(*pair, X, num_particles=30, seed=2)
    assert not torch.equal(a.log_evidence, c.log_evidence)
    torch.manual_seed(1)
    d = diagnostics.log_evidence(*pair, X, num_particles=30)
    assert torch.equal(a.log_evidence, d.log_evidence)
    assert not torch.equal(
        d.log_evidence, diagnostics.log_evidence(*pair, X, num_particles=30).log_evidence
    )


def test_evaluation_mode_for_a_while():
    model, guide = vae(batch_norm=True, dropout=0.5)
    guide.eval()
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    seen = []
    model.likelihood.register_forward_hook(lambda module, *_: seen.append(module.training))
    result = diagnostics.log_evidence(model, guide, X, num_particles=30)
    assert not any(seen)
    assert model.training
    assert not guide.training
    assert all(torch.equal(buffers[k], v) for k, v in model.state_dict().items())
    assert not result.log_evidence.requires_grad
    with pytest.raises(ValueError, match="at least 2"):
        diagnostics.log_evidence(model, guide, X, num_particles=1)
    assert model.training


def test_evidence_is_float64_on_the_cpu():
    result = diagnostics.log_evidence(*vae(), X, num_particles=30)
    for name in ("log_evidence", "log_evidence_se", "ess", "khat", "elbo"):
        assert getattr(result, name).dtype == torch.float64
        assert getattr(result, name).device.type == "cpu"
    assert (result.ess >= 1).all()
    assert (result.ess <= 30 + 1e-9).all()


def test_expectation_is_the_iwelbo():
    model, guide = vae()
    rows = X.repeat(500, 1)
    ours = diagnostics.log_evidence(model, guide, rows, num_particles=5).log_evidence
    bound = elbo.IWELBO(num_particles=5).evaluate(model, guide, rows).double()
    se = math.sqrt((ours.var().item() + bound.var().item()) / 5000)
    assert abs(ours.mean() - bound.mean()) < 4 * se


def test_prior_as_guide_agrees(float64):
    model, guide = lg(1.1)
    good = diagnostics.log_evidence(model, guide, ROWS[:20], num_particles=500)
    naive = diagnostics.log_evidence(
        model, guides.Prior(model), ROWS[:20], num_particles=5000, max_rows=100_000
    )
    se = (good.log_evidence_se.square() + naive.log_evidence_se.square()).sqrt()
    assert ((good.log_evidence - naive.log_evidence).abs() < 4.5 * se).all()
    assert naive.ess.median() < good.ess.median() * 40
    assert naive.khat.median() > good.khat.median()


def test_conditional_pair():
    class Shifted(ppvae.Program):
        def forward(self, x, y):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(y.double(), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Guide(ppvae.Program):
        def forward(self, x, y):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal((x + y) / 2, 0.8))

    x, y = torch.randn(40, dtype=torch.float64), torch.arange(40) % 3
    result = diagnostics.log_evidence(
        Shifted(), Guide(), x, y, num_particles=500, max_rows=1700, seed=0
    )
    exact = dist.Normal(y.double(), math.sqrt(2)).log_prob(x)
    assert ((result.log_evidence - exact).abs() < 4.5 * result.log_evidence_se).all()


def test_one_datapoint_and_two_particles():
    result = diagnostics.log_evidence(*vae(), X[:1], num_particles=2)
    assert result.log_evidence.shape == (1,)
    assert result.khat.isnan().all()
    assert math.isnan(result.mean_se)
    assert result.mean_mc_se == pytest.approx(result.log_evidence_se.item())
    assert "K = 2" in repr(result)


def test_report(float64):
    text = repr(diagnostics.log_evidence(*lg(0.3), ROWS, num_particles=1000, seed=0))
    lines = text.splitlines()
    assert "200 datapoints, K = 1000" in lines[0]
    assert "nats per datapoint" in lines[0]
    assert lines[1].startswith(f"log p(x)  {EXACT.mean():.0f}"[:-1])
    assert "Monte Carlo" in lines[1]
    assert "gap" in lines[2]
    share = int(lines[4].split("above 0.7 on ")[1].split("%")[0])
    assert 60 < share <= 100


@pytest.mark.parametrize(
    ("args", "options", "match"),
    [
        ((X,), {"num_particles": 1}, "num_particles must be at least 2"),
        ((X,), {"max_rows": 0}, "max_rows"),
        ((X,), {"compile": "yes"}, 'compile must be True, False or "auto"'),
        ((), {}, "no data"),
        ((X[:0],), {}, "'x' is empty"),
        ((X * math.nan,), {}, "40 NaN"),
    ],
)
def test_bad_arguments(args, options, match):
    with pytest.raises(ValueError, match=match):
        diagnostics.log_evidence(*vae(), *args, **options)


@pytest.mark.cuda
def test_evidence_on_cuda():
    model, guide = (program.cuda() for program in vae())
    torch.cuda.manual_seed(3)
    expected = torch.rand(1, device="cuda")
    torch.cuda.manual_seed(3)
    a = diagnostics.log_evidence(model, guide, X.cuda(), num_particles=2000, seed=1)
    assert torch.rand(1, device="cuda") == expected
    b = diagnostics.log_evidence(model, guide, X.cuda(), num_particles=2000, seed=1)
    assert torch.equal(a.log_evidence, b.log_evidence)
    assert a.khat.device.type == a.log_evidence.device.type == "cpu"
    cpu = diagnostics.log_evidence(model.cpu(), guide.cpu(), X, num_particles=2000, seed=1)
    se = (a.log_evidence_se.square() + cpu.log_evidence_se.square()).sqrt()
    assert ((a.log_evidence - cpu.log_evidence).abs() < 4.5 * se).all()


def test_a_datapoint_without_weight_is_named_by_its_place_in_the_data():
    log_w = torch.zeros(30, 5)
    log_w[:, 2] = -math.inf
    with pytest.raises(ValueError, match="all 30 weights of datapoint 302 are zero"):
        summarise(log_w, 300)
