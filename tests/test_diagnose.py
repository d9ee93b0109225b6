"""`diagnose`: every number against its closed form, every pair, and what is refused."""

import dataclasses
import math

import pandas
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import ppvae
from oracles import LinearGuide, LinearModel, assert_mean
from ppvae import conditionals, data, diagnostics, guides, models, nets
from ppvae.diagnostics import diagnose, summaries
from ppvae.diagnostics.summaries import _densities
from ppvae.diagnostics.verdict import share
from ppvae.program import data_plate
from registry import ALL_PAIRS, OWN_DRAWS, SOFT_CODES, build

EXACT = {"scale": 1.0, "shift": 0.0}
WRONG = {"scale": 1.3, "shift": 0.2}
SEEDS = [0, pytest.param(1, marks=pytest.mark.slow)]


def linear(rows=400, seed=1, **guide):
    """A linear-Gaussian pair with a posterior that is diagonal, and rows drawn from it."""
    model = LinearModel(2, 4)
    return model, LinearGuide(model, **guide), model.draw(rows, seed)


def moments(model, guide):
    """Covariances: of the guide's mean over x, of the guide, and of the posterior."""
    A, _, S = model.posterior()
    W, sigma = model.weight.detach(), model.log_sigma.exp().item()
    of_x = W @ W.T + sigma**2 * torch.eye(len(W))
    return A @ of_x @ A.T, guide.log_scale.detach().mul(2).exp().diag(), S


def kl_normal(m0, S0, S1):
    """KL(N(m0, S0) || N(0, S1)) of rows of means."""
    quadratic = (m0 * torch.linalg.solve(S1, m0.T).T).sum(-1)
    trace = torch.linalg.solve(S1, S0).trace()
    return 0.5 * (trace + quadratic - len(S0) + torch.logdet(S1) - torch.logdet(S0))


def assert_within(value, exact, se, count=3.0):
    assert abs(value - exact) <= count * se + 1e-9, (value, exact, se)


# -- closed forms on the linear-Gaussian pair --------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_evidence_and_gap(float64, seed):
    model, guide, x = linear(**WRONG)
    report = diagnose(model, guide, x, num_particles=500, seed=seed)
    exact = model.log_evidence(x).detach()
    A, a, S = model.posterior()
    q_mean = guide.posterior(x).mean.detach()
    _, Q, _ = moments(model, guide)
    gap = kl_normal(q_mean - (x @ A.T + a), Q, S)
    assert_within(report.mean, exact.mean().item(), report.mean_mc_se)
    for value, se, truth in (
        (report.log_evidence, report.log_evidence_se, exact),
        (report.gap, report.gap_se, gap),
    ):
        # Off by a constant of order 1/K, which is far below the error of one datapoint.
        assert (((value - truth) / se).abs() < 6).all()  # its law is skewed at K = 500
        ratio = ((value - truth) / se).square().mean()
        assert 0.7 < ratio < 1.4
    assert_within(report.elbo.mean().item(), (exact - gap).mean().item(),
                  (report.gap_se.square().sum().sqrt() / len(x)).item() * 2)  # fmt: skip


@pytest.mark.parametrize("guide", [EXACT, WRONG], ids=["exact", "wrong"])
def test_kl_and_reconstruction(float64, guide):
    model, guide, x = linear(**guide)
    report = diagnose(model, guide, x, num_particles=400, seed=0)
    q = guide.posterior(x)
    mean, sd = q.mean.detach(), q.variance.sqrt().detach()
    units = 0.5 * (sd.square() + mean.square() - 1) - sd.log()
    torch.testing.assert_close(report.kl_per_dimension["z"], units)
    torch.testing.assert_close(report.kl["z"], units.sum(-1))
    torch.testing.assert_close(report.rate, units.sum(-1))
    sigma, W = model.log_sigma.exp(), model.weight
    spread = (W.square() @ sd.square().T).T
    error = ((x - mean @ W.T - model.bias).square() + spread) / sigma.square()
    exact = (-0.5 * error - sigma.log() - 0.5 * math.log(2 * math.pi)).sum(-1).detach()
    assert_mean((report.reconstruction - exact)[:, None], 0.0)
    # the same draws give both sides, but for the KL, which has none
    assert_mean((report.reconstruction - report.rate - report.elbo)[:, None], 0.0)
    rate, distortion = report.rate_distortion
    assert rate == pytest.approx(units.sum(-1).mean().item())
    assert distortion == pytest.approx(-report.reconstruction.mean().item())


@pytest.mark.parametrize("scale", [1.0, 1.3])
@pytest.mark.parametrize("seed", SEEDS)
def test_mutual_information_and_aggregated_posterior(float64, scale, seed):
    model, guide, x = linear(rows=2000, seed=10 + seed, scale=scale)
    report = diagnose(model, guide, x, num_particles=21, num_aggregate=2000, seed=seed)
    B, Q, _ = moments(model, guide)
    exact = 0.5 * (torch.logdet(B + Q) - torch.logdet(Q)).item()
    found = report.aggregate
    assert_within(found.mutual_information, exact, found.mutual_information_se)
    assert_within(found.mutual_information_upper, exact, found.mutual_information_se)
    assert found.mutual_information < found.mutual_information_upper < found.ceiling
    assert found.ceiling == pytest.approx(math.log(2000))
    fit = kl_normal(torch.zeros(1, 2), B + Q, torch.eye(2)).item()
    rate_se = report.rate.std().item() / math.sqrt(2000)
    assert_within(report.marginal_kl, fit, math.hypot(rate_se, found.mutual_information_se))
    # the decomposition holds to the last digit
    assert report.rate.mean().item() == pytest.approx(
        report.mutual_information + report.marginal_kl
    )
    assert not found.prior_differs
    for mean, se in zip(report.marginal_mean["z"], (B + Q).diagonal().sqrt() / 2000**0.5,
                        strict=True):  # fmt: skip
        assert_within(mean.item(), 0.0, se.item(), 4)
    expected = (B + Q).diagonal().sqrt()
    assert ((report.marginal_sd["z"] - expected).abs() < 4 * expected / 4000**0.5).all()


def test_mutual_information_of_three_datapoints_by_its_formulas(float64):
    """Every density by hand; no datapoint is left out of q(z), or its own is."""
    x = torch.tensor([-1.0, 0.5, 2.0])

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 0.7))

    z, chosen = torch.tensor([0.3, -1.2, 1.9, 0.6]), torch.tensor([1, 0, 2, 1])
    log_q = dist.Normal(x, 0.7).log_prob(z[:, None])
    own = log_q[torch.arange(4), chosen]
    others = [[q.exp() for n, q in enumerate(row) if n != m]
              for row, m in zip(log_q, chosen, strict=True)]  # fmt: skip
    expected = own, log_q.exp().mean(1).log(), torch.tensor(others).mean(1).log()
    torch.testing.assert_close(_densities(guide, (x,), {"z": z}, chosen, 4, 1), expected)


def test_the_error_of_information_is_over_datapoints(monkeypatch):
    """Two datapoints with draws of their own: the spread of the two means, over sqrt 2."""
    own = torch.tensor([1.0, 2.0, 6.0, 5.0, 6.0, 4.0])
    monkeypatch.setattr(
        summaries, "_densities", lambda *args: (own, torch.zeros(6), torch.full((6,), -1.0))
    )
    model, guide, x = linear(rows=2)
    found = summaries.aggregate(model, guide, (x,), 100, 6, 0)
    assert found.num_draws == 6
    assert found.mutual_information == pytest.approx(4.0)
    assert found.mutual_information_se == pytest.approx(2**0.5 / 2**0.5)  # means 3 and 5
    assert found.mutual_information_upper == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0 %"), (1.0, "100 %"), (0.004, "0.4 %"), (0.0001, "0.01 %"), (0.996, "99.6 %"),
     (0.9999, "100 %"), (0.5, "50 %"), (math.nan, "none")],
)  # fmt: skip
def test_a_share_reads_all_or_nothing_only_if_it_is(value, text):
    assert share(value) == text


@pytest.mark.parametrize("how", ["poutine", "distribution"])
def test_mutual_information_is_of_what_is_drawn_whatever_is_masked(float64, how):
    """Five datapoints of one latent: I by quadrature, and the same with half of them masked."""
    means = torch.tensor([-2.0, -0.5, 0.0, 1.0, 3.0])
    seen = torch.tensor([True, False, True, False, True])
    rows = torch.arange(5.0)

    def masked(x, site, inside):
        hidden = seen[x.long()]
        with data_plate(x):
            if how == "distribution":
                return pyro.sample(site, inside.mask(hidden))
            with poutine.mask(mask=hidden):
                return pyro.sample(site, inside)

    def model(x):
        z = masked(x, "z", dist.Normal(torch.zeros_like(x), 2.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        masked(x, "z", dist.Normal(means[x.long()], 0.7))

    z = torch.linspace(-8, 9, 20_001)
    log_q = dist.Normal(means[:, None], 0.7).log_prob(z)
    ratio = log_q - (log_q.logsumexp(0) - math.log(5))
    exact = ((log_q.exp() * ratio).sum(1) * (z[1] - z[0])).mean().item()
    report = diagnose(model, guide, rows, num_particles=21, num_aggregate=20_000, seed=0)
    draws_se = 1 / math.sqrt(20_000)  # log q(z | x) / q(z) has a standard deviation below 1
    assert abs(report.mutual_information - exact) < 4.5 * draws_se
    assert report.aggregate.masked and math.isnan(report.marginal_kl)
    assert "a mask hides" in report.absent["KL(q(z) || p(z))"]


def test_mutual_information_of_far_datapoints_is_its_ceiling(float64):
    model, guide, _ = linear()
    x = 1000.0 * torch.arange(5)[:, None] * torch.ones(5, 4)
    report = diagnose(model, guide, x, num_particles=30, seed=0)
    assert report.mutual_information == pytest.approx(math.log(5))
    assert any("ceiling, log N = 1.6" in sentence for sentence in report.verdict)


def test_blocks_of_densities_change_nothing(float64):
    model, guide, x = linear(rows=37)
    values = {
        diagnose(
            model, guide, x, num_particles=21, max_rows=rows, num_aggregate=50, seed=0
        ).aggregate.mutual_information_upper.__round__(9)
        for rows in (2, 30, 100_000)
    }
    assert len(values) == 1


def test_active_units(float64):
    model, guide, x = linear(rows=1000)
    report = diagnose(model, guide, x, num_particles=30, seed=0)
    means = guide.posterior(x).mean.detach()
    torch.testing.assert_close(report.activity["z"], means.var(0))  # of these very datapoints
    B, _, _ = moments(model, guide)
    assert (
        (report.activity["z"] - B.diagonal()).abs() < 4 * B.diagonal() * (2 / 1000) ** 0.5
    ).all()
    assert report.active_units == 2
    cut = report.activity["z"].mean().item()
    again = diagnose(model, guide, x, num_particles=30, threshold=cut, seed=0)
    assert again.active["z"].tolist() == (means.var(0) > cut).tolist()
    assert again.active_units == 1


class Anonymous(dist.Normal):
    """A normal that does not tell its mean."""

    @property
    def mean(self):
        raise NotImplementedError


def test_activity_from_draws_takes_their_noise_off(float64):
    model, guide, x = linear(rows=4000)

    def quiet(x):
        with data_plate(x):
            q = guide.posterior(x).base_dist
            pyro.sample("z", Anonymous(q.loc * 0.1, q.scale).to_event(1))

    exact = (0.1 * guide.posterior(x).mean).var(0)  # 0.004 and 0.008; the noise of 21 draws: 0.02
    found = diagnose(model, quiet, x, num_particles=21, num_aggregate=0, seed=0).activity["z"]
    se = 0.03 * (2 / 4000) ** 0.5
    assert ((found - exact).abs() < 5 * se).all(), (found, exact)


def test_exact_posterior(float64):
    """Law 1: constant weights, no gap, k-hat 0, all draws effective."""
    model, guide, x = linear(**EXACT)
    report = diagnose(model, guide, x, num_particles=50, seed=0)
    torch.testing.assert_close(report.log_evidence, model.log_evidence(x).detach())
    assert report.gap.abs().max() < 1e-9
    assert (report.khat == 0).all()
    torch.testing.assert_close(report.ess, torch.full((len(x),), 50.0))
    assert "k-hat <= 0.7 on all points" in report.verdict[0]


def test_khat_orders_guides(float64):
    # The table: median k-hat -0.82, 0.17, 0.62 (30 % above 0.7), 0.85 (79 %), 1.44 (100 %), where
    # 0.17 is the fit to rounding errors of the exact posterior, here 0; errors of log p 0.00, 0.00,
    # -0.01, -0.50, -1.27.
    parameters = data.linear_gaussian_parameters()
    x = data.load("linear_gaussian").test.x.double()
    exact, root = parameters.log_evidence(x), parameters.posterior(x).scale_tril
    model = models.VAE(_LinearLikelihood(parameters), latent_dim=2).double()
    found = []
    for scale, shift in [(1.4, 0.0), (1.0, 0.0), (0.6, 0.0), (0.3, 0.0), (1.0, 3.0)]:

        def guide(x, scale=scale, shift=shift):
            q = parameters.posterior(x)
            loc = q.loc + shift * root[0].sum(-1)  # Mahalanobis distance 3 sqrt(2)
            with data_plate(x):
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale * q.scale_tril))

        report = diagnose(model, guide, x, num_particles=1000, num_aggregate=0, seed=0)
        error = (report.log_evidence - exact).mean().item()
        found.append((report.khat.median().item(), report.unreliable, error))
    medians, shares, errors = zip(*found, strict=True)
    assert medians[0] < medians[1] == 0.0 < medians[2] < medians[3] < medians[4]
    assert -1.2 < medians[0] < -0.4
    assert 0.5 < medians[2] < 0.7
    assert 0.75 < medians[3] < 1.0
    assert medians[4] > 1.0
    assert shares[0] == shares[1] == 0.0
    assert 0.15 < shares[2] < 0.45
    assert 0.65 < shares[3] < 0.9
    assert shares[4] > 0.95
    assert abs(errors[0]) < 0.01
    assert abs(errors[1]) < 1e-9
    assert -0.05 < errors[2] < 0.02
    assert -0.8 < errors[3] < -0.2
    assert errors[4] < -0.5


class _LinearLikelihood(torch.nn.Module):
    def __init__(self, parameters):
        super().__init__()
        self.values = parameters

    def forward(self, z):
        return dist.Normal(z @ self.values.W.T + self.values.b, self.values.sigma).to_event(1)


# -- every pair --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ALL_PAIRS, *SOFT_CODES])
def test_every_pair(name):
    model, guide, args = build(name)
    report = diagnose(model, guide, *args, num_particles=30, max_rows=50, seed=0)
    weights = diagnostics.log_evidence(model, guide, *args, num_particles=30, max_rows=50, seed=0)
    for column in ("log_evidence", "log_evidence_se", "ess", "khat", "elbo", "gap_se"):
        assert torch.equal(getattr(report, column), getattr(weights, column))
    for kl in report.kl.values():
        assert (kl > -1).all()
    slack = report.reconstruction - report.rate - report.elbo
    assert slack.abs().mean() < 1.0  # zero but for the draws
    for latent, kl in report.kl.items():
        by_level = {
            "ladder_conv": {"z1": 18, "z2": 9},
            "top_down": {"z1": 18, "z2": 18, "z3": 8},
            "not_at_random": {"x_missing": 5},
            "vq_soft": {"z": 12},
            "vq_levels_soft": {"z1": 16, "z2": 6},
        }
        units = by_level.get(name, {}).get(latent, 2)
        assert report.activity[latent].shape == (units,)
        if latent in report.kl_per_dimension:
            torch.testing.assert_close(report.kl_per_dimension[latent].sum(-1), kl)
        else:
            assert "KL per dimension" in " ".join(report.absent)
    assert len(report.table()) == len(args[0])
    assert repr(report).startswith(f"Report of {len(args[0])} datapoints, K = 30 particles")
    if name in OWN_DRAWS:
        assert "it has not drawn" in report.absent["mutual information"]
        return
    conditional = name in ("cvae_learned_prior", "cvae_quadrant", "vq_levels_soft")
    assert report.aggregate.prior_differs is conditional
    # with hidden latents the mean KL is not of all that is drawn
    assert math.isnan(report.marginal_kl) is (conditional or name == "not_at_random")


def test_pieces_of_particles_and_of_datapoints(float64):
    model, guide, x = linear(rows=9, **WRONG)
    whole, few, one = (
        diagnose(model, guide, x, num_particles=60, max_rows=rows, num_aggregate=0, seed=0)
        for rows in (10_000, 100, 7)
    )
    for other in (few, one):
        torch.testing.assert_close(other.kl["z"], whole.kl["z"])
        torch.testing.assert_close(other.activity["z"], whole.activity["z"])
        error = (other.log_evidence - whole.log_evidence).abs()
        se = (other.log_evidence_se.square() + whole.log_evidence_se.square()).sqrt()
        assert (error < 5 * se).all()


class Ladder(ppvae.Program):
    """u, then z given u, then x; as guide, u given x, then z given u and x."""

    def __init__(self, observe):
        super().__init__()
        self.observe = observe

    def forward(self, x):
        with data_plate(x):
            u = pyro.sample("u", dist.Normal(0.0 if self.observe else 0.3 * x[:, 0], 1.0))
            z = pyro.sample("z", dist.Normal(0.5 * u[..., None] + torch.zeros(2), 1.0).to_event(1))
            if self.observe:
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def test_several_latents(float64):
    x = torch.randn(300, 2)
    report = diagnose(Ladder(True), Ladder(False), x, num_particles=200, seed=0)
    torch.testing.assert_close(report.kl["u"], 0.5 * (0.3 * x[:, 0]).square())
    torch.testing.assert_close(report.kl["z"], torch.zeros(300))  # the same given u
    assert report.kl_per_dimension.keys() == {"z"}
    assert "KL per dimension of 'u'" in report.absent
    assert report.collapsed["z"].all()
    torch.testing.assert_close(report.activity["u"], (0.3 * x[:, 0]).var()[None])
    expected = (0.15 * x[:, 0]).var()  # of E[z | x] = 0.5 E[u | x], by draws of u
    se = 0.1 * (2 / 300) ** 0.5 * expected + 2 * expected.sqrt() * 0.5 / (200 * 300) ** 0.5
    assert ((report.activity["z"] - expected).abs() < 5 * se).all()
    exact = 0.5 * torch.log1p((0.3 * x[:, 0]).var())  # about normal: of u; z adds nothing
    found = report.aggregate
    assert_within(found.mutual_information, exact.item(), found.mutual_information_se, 4)


def mixture(enumerate_in=None, in_guide=False, reached=False):
    """c in 3 classes, z given c, x given z; enumerated or drawn."""
    centres = torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    mark = {"enumerate": "parallel"}

    def model(x):
        with data_plate(x):
            infer = mark if enumerate_in == "model" else None
            c = pyro.sample("c", dist.Categorical(torch.ones(3) / 3), infer=infer)
            z = pyro.sample("z", dist.Normal(centres[c], 1.0).to_event(1))
            shift = 0.5 * c[..., None] if reached else 0.0
            pyro.sample("x", dist.Normal(z + shift, 0.5).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            if in_guide:
                infer = mark if enumerate_in == "guide" else None
                pyro.sample("c", dist.Categorical(torch.tensor([0.2, 0.3, 0.5])), infer=infer)
            pyro.sample("z", dist.Normal(0.8 * x, 0.45).to_event(1))

    x = centres[torch.arange(40) % 3] + torch.randn(40, 2)
    family = [dist.Normal(m, 1.25**0.5).to_event(1).log_prob(x) for m in centres]
    return model, guide, x, torch.stack(family).logsumexp(0) - math.log(3)


@pytest.mark.parametrize(
    ("options", "sites", "absent"),
    [
        ({"enumerate_in": "model"}, {"c+z"}, {"KL per dimension"}),
        ({"enumerate_in": "model", "reached": True}, set(), {"KL and reconstruction"}),
        ({"enumerate_in": "guide", "in_guide": True}, {"c", "z"}, {"activity of 'c'"}),
        ({"in_guide": True}, {"c", "z"}, {"activity of 'c'", "KL per dimension of 'c'"}),
    ],
)
def test_discrete_latents(float64, options, sites, absent):
    model, guide, x, exact = mixture(**options)
    report = diagnose(model, guide, x, num_particles=2000, seed=0)
    if not options.get("reached"):
        assert (((report.log_evidence - exact) / report.log_evidence_se).abs() < 5).all()
    assert report.kl.keys() == sites
    assert absent <= report.absent.keys()
    assert (report.reconstruction is None) == (not sites)
    assert report.activity.keys() == {"z"}
    torch.testing.assert_close(report.activity["z"], (0.8 * x).var(0))
    assert math.isfinite(report.mutual_information)
    if "c" in sites:
        q = torch.tensor([0.2, 0.3, 0.5])
        kl = (q * (3 * q).log()).sum()
        torch.testing.assert_close(report.kl["c"], kl.expand(40))
    if sites:
        assert all(name in repr(report) for name in absent)


def test_guide_without_a_density_elsewhere(float64):
    class OneWay(torch.distributions.transforms.ExpTransform):
        def _inverse(self, y):
            raise KeyError("only what it has drawn itself")

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.LogNormal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            flow = dist.TransformedDistribution(dist.Normal(0.1 * x, 1.0), OneWay(cache_size=1))
            pyro.sample("z", flow.to_event(1))

    report = diagnose(model, guide, torch.randn(20, 2).exp(), num_particles=30, seed=0)
    assert report.aggregate is None
    assert math.isnan(report.mutual_information)
    assert "no density at points it has not drawn" in report.absent["mutual information"]
    assert report.activity["z"].shape == (2,)  # by draws
    assert "mutual information" in repr(report)


def test_inner_plates(float64):
    def model(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("data", len(x), dim=-1), pyro.plate("parts", 3, dim=-2):
            pyro.sample("z", dist.Normal(x.T / 2, 1.0))

    x = torch.randn(200, 3) * 2**0.5
    report = diagnose(model, guide, x, num_particles=200, num_aggregate=1000, seed=0)
    torch.testing.assert_close(report.kl["z"], 0.5 * (x / 2).square().sum(-1))
    assert "inner plate 'parts'" in report.absent["activity of 'z'"]
    exact = 3 * 0.5 * math.log(1.5)
    found = report.aggregate
    assert_within(found.mutual_information, exact, found.mutual_information_se, 4)
    assert report.aggregate.ks["z"].shape == (3,)


def test_a_scale_is_no_part_of_a_number(float64):
    """KL and reconstruction are of whole terms, whatever weight training gives them."""
    model, guide, x = linear(rows=30, **WRONG)

    def scaled(x):
        with poutine.scale(scale=0.1):
            return model(x)

    def softly(x):
        with poutine.scale(scale=3.0):
            return guide(x)

    plain, weighed = (diagnose(*pair, x, num_particles=40, num_aggregate=0, seed=0)
                      for pair in ((model, guide), (scaled, softly)))  # fmt: skip
    for name in ("kl", "kl_per_dimension"):
        torch.testing.assert_close(getattr(weighed, name)["z"], getattr(plain, name)["z"])
    torch.testing.assert_close(weighed.reconstruction, plain.reconstruction)


def test_activity_is_of_the_guide_whatever_is_masked(float64):
    model, guide, x = linear(rows=50)
    seen = torch.arange(50) % 2 == 0

    def masked(program):
        def run(x):
            with poutine.mask(mask=seen):
                program(x)

        return run

    plain, half = (diagnose(*pair, x, num_particles=30, num_aggregate=0, seed=0)
                   for pair in ((model, guide), (masked(model), masked(guide))))  # fmt: skip
    torch.testing.assert_close(half.activity["z"], plain.activity["z"])


# -- collapse, verdict, table ------------------------------------------------------------------


def test_collapse():
    model = models.VAE(conditionals.Bernoulli(nets.mlp(3, 8, 4)), latent_dim=3)

    def guide(x, live):
        with data_plate(x):
            loc = torch.stack([live[i] * x.sum(-1) for i in range(3)], -1)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    x = torch.bernoulli(torch.full((200, 4), 0.5))
    some = diagnose(model, lambda x: guide(x, [1, 0, 0]), x, num_particles=30, seed=0)
    assert some.collapsed["z"].tolist() == [False, True, True]
    assert some.active["z"].tolist() == [True, False, False]
    assert any("2 of 3 units of 'z' are collapsed" in s for s in some.verdict)
    gone = diagnose(model, lambda x: guide(x, [0, 0, 0]), x, num_particles=30, seed=0)
    assert gone.collapsed["z"].all()
    assert gone.active_units == 0
    assert any(s.startswith("Posterior collapse: q = p on every unit of 'z'") for s in gone.verdict)
    assert abs(gone.mutual_information) < 1e-6
    assert abs(gone.marginal_kl) < 1e-6
    assert (gone.aggregate.ks["z"] < 1.95 * (2 / 1000) ** 0.5).all()  # alpha 0.001


def test_verdict_of_a_narrow_guide(float64):
    model, guide, x = linear(scale=0.2)
    report = diagnose(model, guide, x, num_particles=500, seed=0)
    share = (report.khat > 0.7).double().mean().item()
    assert share > 0.5
    assert report.verdict[0].startswith(f"k-hat > 0.7 on {share:.0%}".replace("%", " %"))
    assert "Try a flow guide or more particles" in report.verdict[0]
    assert "The guide loses at least" in report.verdict[1]
    worst = report.worst(5)
    assert worst.shape == (5,)
    assert report.khat[worst[0]] == report.khat.max()
    assert (report.khat[worst].diff() <= 0).all()


def test_verdict_of_a_prior_that_does_not_fit(float64):
    model, guide, x = linear()

    def far(x):
        with data_plate(x):
            q = guide.posterior(x).base_dist
            pyro.sample("z", dist.Normal(q.loc + 5.0, q.scale).to_event(1))

    report = diagnose(model, far, x, num_particles=50, seed=0)
    assert report.marginal_kl == pytest.approx(25, rel=0.2)
    assert any("conditionals.VampPrior" in sentence for sentence in report.verdict)
    assert (report.aggregate.ks["z"] > 0.9).all()


def test_table_and_repr(float64):
    model, guide, x = linear(rows=30, **WRONG)
    report = diagnose(model, guide, x, num_particles=50, seed=0)
    table = report.table()
    assert isinstance(table, pandas.DataFrame)
    assert {"log_evidence", "elbo", "gap", "khat", "ess", "kl_z", "reconstruction"} <= set(table)
    assert table["khat"].tolist() == report.khat.tolist()
    text = repr(report)
    for words in ("log p(x)", "gap", "KL of 'z'", "Pareto k-hat", "2 of 2 active", "Verdict",
                  "mutual information", "rate, distortion"):  # fmt: skip
        assert words in text
    assert max(map(len, text.split("Verdict")[0].splitlines())) < 100


def test_seed_and_evaluation_mode():
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4, dropout=0.5)), latent_dim=2)
    guide = guides.Normal(nets.mlp(4, 8, 4, batch_norm=True))
    x = torch.bernoulli(torch.full((10, 4), 0.5))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    a, b = (diagnose(model, guide, x, num_particles=30, seed=1) for _ in range(2))
    assert torch.rand(1) == expected
    assert torch.equal(a.log_evidence, b.log_evidence)
    assert a.mutual_information == b.mutual_information
    assert model.training and guide.training
    assert len(pyro.get_param_store()) == 0


def test_memory_is_bounded():
    largest = []

    class Spy(torch.nn.Identity):
        def forward(self, z):
            largest.append(z[..., 0].numel())
            return z

    net = torch.nn.Sequential(Spy(), torch.nn.Linear(2, 4))
    model = models.VAE(conditionals.Bernoulli(net), latent_dim=2)
    x = torch.bernoulli(torch.full((150, 4), 0.5))
    guide = guides.Normal(nets.mlp(4, 8, 4))
    diagnose(model, guide, x, num_particles=64, max_rows=200, num_aggregate=0)
    assert max(largest) <= 200


def test_float32_and_one_datapoint():
    model, guide, args = build("vae_bernoulli")
    report = diagnose(model, guide, args[0][:1], num_particles=21, seed=0)
    assert report.log_evidence.dtype == torch.float64
    assert report.activity == {} and report.aggregate is None
    assert report.absent["activity and mutual information"] == "they take two datapoints"
    assert "Report of 1 datapoints" in repr(report)
    assert "nan" not in repr(report)


def test_a_guide_without_latents():
    x = torch.randn(20, 2)
    mixture = models.GaussianMixture(3, 2)
    mixture.start(x)
    report = diagnose(mixture, lambda x: None, x, num_particles=50)
    assert report.absent["activity and mutual information"] == "the guide draws no latents"
    torch.testing.assert_close(report.log_evidence.float(), mixture.log_evidence(x).detach())


def test_zero_weights_make_the_elbo_minus_infinity_in_the_table_too():
    """A mean over the finite rows alone would be an ELBO above log p(x)."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Poisson(z.relu()), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(0.3 * x, 1.0))

    x = torch.tensor([0.0, 1.0, 2.0, 4.0])
    report = diagnose(model, guide, x, num_particles=200, seed=0)
    assert report.elbo.isneginf().tolist() == [False, True, True, True]
    assert report.log_evidence.isfinite().all()
    (elbo,) = (line for line in repr(report).splitlines() if line.startswith("ELBO"))
    assert elbo.split()[1:3] == ["-inf", "-"]
    assert "The ELBO is minus infinity on 75 % of points" in repr(report)
    z = torch.linspace(1e-6, 12, 20001)  # log p(x) by the midpoint rule
    density = dist.Poisson(z).log_prob(x[1:, None]) + dist.Normal(0.0, 1.0).log_prob(z)
    exact = (density.exp().sum(1) * (z[1] - z[0])).log()
    assert ((report.log_evidence[1:] - exact).abs() < 5 * report.log_evidence_se[1:]).all()


def test_a_discrete_latent_has_ties_and_is_told_so():
    def model(x):
        with data_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.7))
            pyro.sample("x", dist.Normal(4 * c - 2, 1.0), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("c", dist.Bernoulli(0.5))

    report = diagnose(model, guide, torch.tensor([-2.0, 3.0]), num_particles=100, seed=0)
    assert report.khat.isposinf().all()
    assert "On 100 % of points k-hat is infinite because the largest" in report.verdict[1]


def test_bernoulli_latents(float64):
    """Torch's KL of Bernoullis of several particles and of the prior does not broadcast."""

    class Coins(ppvae.Program):
        def __init__(self, guide):
            super().__init__()
            self.guide, self.net = guide, nets.mlp(8 if guide else 3, 16, 3 if guide else 8)

        def forward(self, x):
            with data_plate(x):
                logits = self.net(x) if self.guide else torch.tensor([0.0, 1.0, -1.0])
                h = pyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))
                if not self.guide:
                    x_h = dist.Bernoulli(logits=3 * self.net(h)).to_event(1)
                    pyro.sample("x", x_h, obs=x)

    model, guide = Coins(guide=False), Coins(guide=True)
    x = torch.bernoulli(torch.full((12, 8), 0.5))
    report = diagnose(model, guide, x, num_particles=2000, seed=0)
    states = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    with torch.no_grad():
        prior = dist.Bernoulli(logits=torch.tensor([0.0, 1.0, -1.0])).log_prob(states).sum(-1)
        given = dist.Bernoulli(logits=3 * model.net(states)).log_prob(x[:, None]).sum(-1)
        q = guide.net(x).sigmoid()
    exact = (prior + given).logsumexp(1)
    assert ((report.log_evidence - exact).abs() < 5 * report.log_evidence_se).all()
    p = torch.tensor([0.0, 1.0, -1.0]).sigmoid()
    kl = q * (q / p).log() + (1 - q) * ((1 - q) / (1 - p)).log()
    torch.testing.assert_close(report.kl_per_dimension["h"], kl)
    assert report.active["h"].shape == (3,)


def test_two_datapoints_that_share_nothing_are_not_at_the_ceiling(float64):
    """log 2 is less than a nat, so "within a nat of the ceiling" says nothing."""
    model, _, x = linear()
    report = diagnose(model, guides.Prior(model), x[:2], num_particles=50, seed=0)
    assert report.mutual_information == pytest.approx(0.0, abs=1e-9)
    assert not any("ceiling" in sentence for sentence in report.verdict)


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_particles": 20}, "num_particles=20 is too few for k-hat.*21 or more"),
        ({"num_particles": -1}, "num_particles must be at least 1, got -1"),
        ({"num_aggregate": 2**63}, "num_aggregate must be at least 0, and below"),
        ({"threshold": 0.0}, "threshold must be positive"),
        ({"num_aggregate": -1}, "num_aggregate must be at least 0"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
    ],
)
def test_bad_arguments(options, match):
    model, guide, args = build("vae_bernoulli")
    with pytest.raises(ValueError, match=match):
        diagnose(model, guide, *args, **options)


def test_bad_data_beyond_the_first_rows():
    model, guide, args = build("vae_bernoulli")
    x = args[0].repeat(50, 1)
    x[250, 1] = 0.5
    with pytest.raises(ValueError, match=r"argument 'x': 1 of 1500 values lie outside"):
        diagnose(model, guide, x)
    x[250, 1] = math.nan
    with pytest.raises(ValueError, match="the first is row 250"):
        diagnose(model, guide, x)
    with pytest.raises(ValueError, match="no data"):
        diagnose(model, guide)


@pytest.mark.parametrize("program", ["model", "guide"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_name_datapoint_and_site(program, bad, float64):
    class Odd(dist.Normal):
        def log_prob(self, value):
            log_prob = super().log_prob(value)
            odd = (self.loc.abs() > 50).any() if program == "model" else False
            return log_prob + (bad if odd else 0.0)

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            likelihood = dist.Normal(z, 1.0).to_event(1)
            pyro.sample("x", likelihood, obs=x)
            if program == "model":
                odd = torch.where(x[:, 0] > 50, bad, 0.0)
                pyro.factor("odd", odd)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 1.0).to_event(1))
            if program == "guide":
                odd = torch.where(x[:, 0] > 50, -bad, 0.0)
                pyro.sample("odd", dist.Unit(odd), infer={"is_auxiliary": True})

    x = torch.randn(150, 1)
    x[123] = 99.0
    value = "NaN" if math.isnan(bad) else "infinite"
    with pytest.raises(ValueError, match=f"log-weight of datapoint 123 is {value} .*'odd' of the "
                                         f"{program}.*row 123"):  # fmt: skip
        diagnose(model, guide, x, num_particles=30, max_rows=100)


def test_a_datapoint_that_no_draw_explains():
    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Delta(z.round()), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x.clamp(max=50), 0.1))

    x = torch.zeros(150)
    x[120] = 99.0
    with pytest.raises(ValueError, match="weights of datapoint 120 are zero"):
        diagnose(model, guide, x, num_particles=30)


def test_a_global_that_depends_on_the_batch_is_refused():
    def model(x):
        t = pyro.sample("t", dist.Normal(0.0, 1.0))
        with data_plate(x):
            pyro.sample("x", dist.Normal(t, 1.0), obs=x)

    def guide(x):
        pyro.sample("t", dist.Normal(x.mean(), 1.0))

    with pytest.raises(ppvae.PairError, match=r"'t' of the guide: .* changes with the rows.*joint"):
        diagnose(model, guide, torch.randn(5))


def test_a_point_mass_has_no_weights():
    model, _, args = build("vae_bernoulli")

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Delta(x[:, :2], event_dim=1))

    with pytest.raises(ValueError, match="latent 'z' is a point mass in the guide"):
        diagnose(model, guide, *args)


@pytest.mark.cuda
def test_on_cuda():
    model, guide, args = build("vae_bernoulli")
    model, guide = model.cuda(), guide.cuda()
    x = args[0].repeat(50, 1).cuda()
    report = diagnose(model, guide, x, num_particles=500, seed=0)
    cpu = diagnose(model.cpu(), guide.cpu(), x.cpu(), num_particles=500, seed=0)
    assert report.khat.device.type == report.kl["z"].device.type == "cpu"
    torch.testing.assert_close(report.kl["z"], cpu.kl["z"], rtol=1e-3, atol=1e-4)
    se = (report.log_evidence_se.square() + cpu.log_evidence_se.square()).sqrt()
    assert ((report.log_evidence - cpu.log_evidence).abs() < 5 * se).all()
    error = math.hypot(report.aggregate.mutual_information_se, cpu.aggregate.mutual_information_se)
    assert abs(report.mutual_information - cpu.mutual_information) < 5 * error


@pytest.mark.parametrize(("gap", "told"), [(0.9, False), (1.1, True)])
def test_a_gap_is_told_from_a_nat_on(gap, told):
    model, guide, x = linear(rows=20)
    report = diagnose(model, guide, x, num_particles=21, num_aggregate=0, seed=0)
    report = dataclasses.replace(report, elbo=report.log_evidence - gap)
    found = [text for text in report.verdict if "guide loses" in text]
    assert bool(found) == told
    assert not told or "1.1 nats per datapoint" in found[0]
