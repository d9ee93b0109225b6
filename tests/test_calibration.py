"""Simulation-based calibration and predictive checks, against what must and must not be found."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

import ppvae
from oracles import LinearGuide, LinearModel
from ppvae import conditionals, diagnostics, guides, models, nets
from ppvae.diagnostics.uniformity import chi_square, departure, ecdf_band
from ppvae.program import data_plate
from registry import ALL_PAIRS, OWN_DRAWS, SOFT_CODES, build

LEVELS = [0.1, 0.5, 0.9]


def correlated():
    """A linear-Gaussian model whose posterior correlates the latents by -0.8."""
    model = LinearModel(2, 4)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.9], [0.9, 1.0], [0.5, 0.6], [0.3, 0.2]]))
    return model, model.draw(10)


def dropped(model):
    """The exact means and standard deviations, but independent units."""
    A, a, S = model.posterior()
    assert abs(S[0, 1] / (S[0, 0] * S[1, 1]).sqrt()) > 0.5

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x @ A.T + a, S.diagonal().sqrt()).to_event(1))

    return guide


# -- must be uniform, must be rejected ---------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_the_exact_guide_is_calibrated(float64, seed):
    model, x = correlated()
    found = diagnostics.sbc(model, LinearGuide(model, full=True), x, seed=seed)
    assert found.p_value > 0.01
    assert set(found.ranks) == {"z", "log p(x, z)", "log q(z | x)", "distance to a point"}
    _, lower, upper = found.band(0.9999)
    for ranks in found.ranks.values():
        for column in ranks.T.numpy():
            ecdf = np.bincount(column, minlength=100).cumsum()[:-1] / 1000
            assert (lower <= ecdf).all()
            assert (ecdf <= upper).all()
    for name, shares in found.coverage(LEVELS).items():
        for level, share in zip(LEVELS, shares, strict=True):
            se = math.sqrt(level * (1 - level) / 1000)
            assert ((share - level).abs() < 4.5 * se).all(), name
    assert "No sign of miscalibration in 1000 simulations" in found.verdict[0]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("fault", ["scale", "shift", "correlation"])
def test_a_wrong_guide_is_rejected(float64, fault, seed):
    model, x = correlated()
    guide = {
        "scale": lambda: LinearGuide(model, full=True, scale=0.7),
        "shift": lambda: LinearGuide(model, full=True, shift=0.3),
        "correlation": lambda: dropped(model),
    }[fault]()
    found = diagnostics.sbc(model, guide, x, seed=seed)
    assert found.p_value < 1e-4
    assert "is not the posterior" in found.verdict[0]
    if fault == "correlation":  # which single units cannot see
        assert found.p_values["z"].min() > 1e-4
        assert found.p_values["log p(x, z)"] < 1e-4
        assert "together are not: q drops a dependence" in found.verdict[1]
    else:
        word = {"scale": "too narrow", "shift": "shifted"}[fault]
        assert word in found.verdict[1]
    if fault == "scale":  # a normal's central 50 % and 90 % sets, scaled
        for level in (0.5, 0.9):
            inside = stats.norm.ppf(0.5 + level / 2) * 0.7
            expected = stats.norm.cdf(inside) - stats.norm.cdf(-inside)
            share = found.coverage([level])["z"][0]
            se = math.sqrt(expected * (1 - expected) / 1000)
            # the interval is that of 99 draws, so a little off itself
            assert ((share - expected).abs() < 4.5 * se + 0.01).all()


def test_a_wide_guide(float64):
    model, x = correlated()
    found = diagnostics.sbc(model, LinearGuide(model, full=True, scale=1.5), x, seed=0)
    assert "too wide" in found.verdict[1]


def test_density_sets_hold_their_level(float64):
    model, x = correlated()
    shares = diagnostics.sbc(model, LinearGuide(model, full=True, scale=0.7), x, seed=0)
    # highest-density sets of two units: chi-square with 2 degrees of freedom
    for level in (0.5, 0.9):
        expected = stats.chi2.cdf(0.49 * stats.chi2.ppf(level, 2), 2)
        share = shares.coverage([level])["log q(z | x)"].item()
        assert abs(share - expected) < 4.5 * math.sqrt(expected * (1 - expected) / 1000) + 0.01


def test_balls_about_a_point_hold_their_level_or_not(float64):
    model, x = correlated()

    def of(guide, seed=0, count=400):
        return diagnostics.sbc(model, guide, x, num_simulations=count, seed=seed)

    exact = [of(LinearGuide(model, full=True), seed) for seed in range(40)]
    p = torch.cat([found.p_values["distance to a point"] for found in exact])
    assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-4  # the false alarms are those stated
    assert (p < 0.05).sum() <= stats.binom.ppf(1 - 1e-4, 40, 0.05)
    shares = torch.cat([found.coverage(LEVELS)["distance to a point"] for found in exact], 1)
    for level, share in zip(LEVELS, shares.mean(1).tolist(), strict=True):
        assert abs(share - level) < 4 * math.sqrt(level * (1 - level) / 16_000)
    # too narrow a guide, and the prior, whose draws have the right marginal
    narrow = of(LinearGuide(model, full=True, scale=0.7))
    assert narrow.p_values["distance to a point"] < 1e-4

    def prior(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))

    found = of(prior, count=4000)
    assert found.p_values["z"].min() > 1e-4 > found.p_values["distance to a point"]


def test_own_test_quantities(float64):
    model, x = correlated()
    tests = {"difference": lambda z, x: z["z"][..., 0] - z["z"][..., 1]}
    good = diagnostics.sbc(
        model, LinearGuide(model, full=True), x, test_quantities=tests, seed=0, max_rows=4000
    )
    assert good.p_value > 0.01
    assert good.ranks["difference"].shape == (1000, 1)
    bad = diagnostics.sbc(model, dropped(model), x, test_quantities=tests, seed=0)
    assert bad.p_values["difference"] < 1e-4
    assert "'difference': q is too narrow" in " ".join(bad.verdict)
    tests = {"all": lambda z, x: z["z"]}
    with pytest.raises(ValueError, match=r"test quantity 'all' must give \(..., S\)"):
        diagnostics.sbc(model, LinearGuide(model), x, test_quantities=tests)


# -- the tests of uniformity -------------------------------------------------------------------


def test_chi_square_is_scipys(float64):
    ranks = torch.randint(100, (777, 3))
    ranks[:100, 2] = 3
    ours = chi_square(ranks, 99)
    for column, p in zip(ranks.T.numpy(), ours.tolist(), strict=True):
        counts = np.bincount(column // 5, minlength=20)
        assert p == pytest.approx(stats.chisquare(counts).pvalue, rel=1e-9)
    assert ours[2] < 1e-6 < ours[:2].min()
    with pytest.raises(ValueError, match="even bins"):
        chi_square(torch.randint(101, (500, 1)), 100)


@pytest.mark.parametrize(("S", "L"), [(50, 9), (200, 19), (1000, 99)])
def test_the_band_holds_whole_ecdfs_with_its_level(S, L):
    points, lower, upper = ecdf_band(S, L, 0.9)
    random = np.random.default_rng(1)
    counts = random.multinomial(S, np.full(L + 1, 1 / (L + 1)), size=20_000)
    ecdf = counts.cumsum(1)[:, :-1] / S
    inside = ((ecdf >= lower - 1e-12) & (ecdf <= upper + 1e-12)).all(1).mean()
    se = math.sqrt(0.09 / 20_000 + 0.09 / 2000)  # its own level comes from 2,000 simulations
    assert abs(inside - 0.9) < 4.5 * se
    assert (lower < points).all() and (points < upper).all()
    with pytest.raises(ValueError, match="level"):
        ecdf_band(S, L, 1.0)


# -- every pair --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL_PAIRS)
def test_every_pair(name):
    model, guide, args = build(name)
    if name == "not_at_random":  # the mask that the model draws is none of the arguments
        with pytest.raises(ValueError, match="'missing' is none of the arguments"):
            diagnostics.sbc(model, guide, *args, num_simulations=120, num_draws=19, seed=0)
        return
    found = diagnostics.sbc(model, guide, *args, num_simulations=120, num_draws=19, seed=0)
    assert all(len(ranks) == 120 for ranks in found.ranks.values())
    assert all(ranks.min() >= 0 and ranks.max() <= 19 for ranks in found.ranks.values())
    densities = {"distance to a point", "log p(x, z)"}
    densities |= set() if name in OWN_DRAWS else {"log q(z | x)"}
    assert densities <= found.ranks.keys() and len(densities | found.absent.keys()) == 3
    latents = found.ranks.keys() - densities
    for latent in latents:
        assert found.ranks[latent].shape == (120, 2) or name in ("ladder_conv", "top_down")
    exact = diagnostics.sbc(
        model, guides.Prior(model), *args, num_simulations=200, num_draws=19, seed=0
    )
    # The prior is calibrated for every unit (but log p(x, z) sees that it ignores x).
    limit = 1e-3 if len(latents) == 1 else 1e-4  # of the smallest of more units
    assert min(exact.p_values[latent].min() for latent in latents) > limit


def test_conditions_are_kept():
    class Model(ppvae.Program):
        def forward(self, x, y):
            with data_plate(x, y):
                z = pyro.sample("z", dist.Normal(10.0 * y, 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    class Guide(ppvae.Program):
        def forward(self, x, y):
            with data_plate(x, y):
                pyro.sample("z", dist.Normal((10.0 * y + x) / 2, 0.5**0.5))

    x, y = torch.full((3,), 1e6), torch.tensor([0.0, 1.0, 2.0])
    assert diagnostics.sbc(Model(), Guide(), x, y, seed=0).p_value > 0.01


def test_every_condition_is_simulated():
    """The guide is wrong for the second of two conditions only."""

    def model(x, y):
        with data_plate(x, y):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with data_plate(x, y):
            pyro.sample("z", dist.Normal(x / 2 + y, 0.5**0.5))

    x, y = torch.zeros(2), torch.tensor([0.0, 3.0])
    options = {"num_simulations": 200, "num_draws": 19, "seed": 0}
    assert diagnostics.sbc(model, guide, x, y, **options).p_value < 1e-4
    assert diagnostics.sbc(model, guide, x, 0 * y, **options).p_value > 0.01


def test_many_uniform_quantities_are_no_evidence():
    """P(p <= 0.05) <= 0.05 under uniform ranks, of however many units; and each counts."""
    p = [
        diagnostics.Calibration({"z": torch.randint(20, (200, 40))}, 19, {}).p_value
        for _ in range(60)
    ]
    assert sum(value <= 0.05 for value in p) <= 10  # P(11 or more) < 2e-4; of the least, 87 %
    ranks = torch.arange(20).repeat(20).unsqueeze(1).repeat(1, 40)
    ranks[:60, 7] = 0
    found = diagnostics.Calibration({"z": ranks}, 19, {})
    assert found.p_value == pytest.approx(40 * found.p_values["z"][7].item())


def discrete(probs):
    """c in {0, 1}, x = c flipped with probability 0.2; and a guide that says 1 with ``probs``."""

    def model(x, infer=None):
        with data_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer=infer)
            pyro.sample("x", dist.Bernoulli(0.2 + 0.6 * c), obs=x)

    def guide(x, infer=None):
        with data_plate(x):
            pyro.sample("c", dist.Bernoulli(torch.where(x > 0, probs[1], probs[0])), infer=infer)

    return model, guide


def test_each_unit_is_told_how_it_departs():
    """Three units of 1000 ranks: at both ends, in the middle, and all high."""
    ranks = torch.arange(1000) % 100
    ends, middle = torch.where(ranks < 50, ranks // 5, 99 - ranks // 10), 40 + ranks // 5
    columns = torch.stack([ends, middle, 50 + ranks // 2], 1)
    said = diagnostics.Calibration({"z": columns}, 99, {}).verdict[1:]
    assert len(said) == 3
    for unit, kind in enumerate(("too narrow", "too wide", "shifted")):
        assert any(f"unit {unit}:" in text and kind in text for text in said), said


def test_a_unit_is_named_by_its_own_evidence_among_all():
    """Of ten units one of p = 0.002 is no news; the one of 1e-9 is named alone."""
    found = diagnostics.Calibration({"z": torch.arange(1000)[:, None].repeat(1, 10) % 100}, 99, {})
    p = torch.full((10,), 0.5)
    p[3], p[7] = 1e-9, 0.002
    vars(found)["p_values"] = {"z": p}  # which is computed once
    head, said = found.verdict
    assert found.p_value == pytest.approx(1e-8) and "p = 1e-08" in head
    assert "'z', unit 3:" in said


@pytest.mark.parametrize(("errors", "found"), [(2.9, "other"), (3.1, "narrow"), (-3.1, "wide")])
def test_a_spread_counts_from_three_standard_errors_on(errors, found):
    """Of S uniform u the mean of (u - 1/2)^2 is 1/12, with standard error 1 / sqrt(180 S)."""
    S, L = 400, 10**7
    half = (1 / 12 + errors / math.sqrt(180 * S)) ** 0.5
    place = torch.tensor([0.5 - half, 0.5 + half], dtype=torch.float64).repeat(S // 2)
    assert departure((place * (L + 1) - 0.5).round().long(), L) == found


@pytest.mark.parametrize(("errors", "found"), [(2.9, "other"), (3.1, "shifted")])
def test_a_shift_counts_from_three_standard_errors_on(errors, found):
    """The mean of u has standard error 1 / sqrt(12 S)."""
    S, L = 400, 10**7
    place = (torch.arange(S, dtype=torch.float64) + 0.5) / S + errors / math.sqrt(12 * S)
    assert departure((place * (L + 1) - 0.5).round().long(), L) == found


def test_ties_are_broken_at_random():
    exact = torch.tensor([0.3 * 0.2 / (0.3 * 0.2 + 0.7 * 0.8), 0.3 * 0.8 / (0.3 * 0.8 + 0.7 * 0.2)])
    x = torch.zeros(1)
    assert diagnostics.sbc(*discrete(exact), x, seed=0).p_value > 0.01
    assert diagnostics.sbc(*discrete(exact.flip(0)), x, seed=0).p_value < 1e-4


def test_summed_out_latents_have_no_rank():
    mark = {"enumerate": "parallel"}

    def deep(x):
        with data_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.3), infer=mark)
            z = pyro.sample("z", dist.Normal(c, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def of_z(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, 1.0))

    found = diagnostics.sbc(deep, of_z, torch.zeros(1), seed=0)
    assert set(found.ranks) == {"z", "distance to a point"}
    assert "densities" in found.absent
    assert "densities" in repr(found)


def test_pieces_and_seed(float64):
    model, x = correlated()
    guide = LinearGuide(model, full=True)
    a = diagnostics.sbc(model, guide, x, num_simulations=300, max_rows=1000, seed=0)
    b = diagnostics.sbc(model, guide, x, num_simulations=300, max_rows=1000, seed=0)
    assert all(torch.equal(a.ranks[n], b.ranks[n]) for n in a.ranks)
    assert a.num_simulations == 300
    assert a.p_value > 0.01


def test_repr(float64):
    model, x = correlated()
    text = repr(diagnostics.sbc(model, LinearGuide(model, scale=0.7), x, seed=0))
    assert text.startswith("Calibration, 1000 simulations, 99 draws each")
    assert "z[0]" in text and "log q(z | x)" in text and "Verdict" in text


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_simulations": 99}, "num_simulations must be at least 100"),
        ({"num_draws": 18}, "num_draws must be at least 19"),
        ({"max_rows": 0}, "max_rows must be at least 1"),
    ],
)
def test_bad_arguments(options, match):
    model, guide, args = build("vae_bernoulli")
    with pytest.raises(ValueError, match=match):
        diagnostics.sbc(model, guide, *args, **options)


def test_what_cannot_be_simulated():
    words = models.VAE(conditionals.BagOfWords(nets.mlp(2, 7)), latent_dim=2)
    guide = guides.Normal(nets.mlp(7, 4))
    with pytest.raises(ValueError, match="cannot be drawn from the model: WordCounts needs total"):
        diagnostics.sbc(words, guide, torch.poisson(torch.ones(5, 7)))

    def copies(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=2 * x)

    def q(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(x, 1.0).to_event(1))

    with pytest.raises(ValueError, match="'x' is none of the arguments; observe an argument"):
        diagnostics.sbc(copies, q, torch.randn(5, 2))
    with pytest.raises(ValueError, match=r"levels must lie in \(0, 1\)"):
        diagnostics.sbc(*discrete(torch.tensor([0.1, 0.6])), torch.zeros(1)).coverage([1.5])


def test_a_guide_that_fails_on_simulated_data_is_not_ranked():
    """Draws that are NaN lie below nothing, and would look like a guide that is too narrow."""

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):  # exp overflows at x = 0.89
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2, (100 * x).exp()).to_event(1))

    with pytest.raises(ValueError, match=r"on data drawn from the model.*site 'z' of the guide"):
        diagnostics.sbc(model, guide, torch.zeros(2, 1), seed=0)


# -- predictive checks -------------------------------------------------------------------------

MEAN = {"mean": lambda x: x.mean(-1), "first squared": lambda x: x[:, 0].square()}


def test_prior_predictive_p_values_are_uniform(float64):
    model, _ = correlated()
    x = model.draw(400)
    found = diagnostics.predictive_check(
        model, guides.Prior(model), x, statistics=MEAN, num_draws=400, seed=0
    )
    for name, p in found.p_values.items():
        assert stats.kstest(p.numpy(), "uniform").pvalue > 1e-3, name
        assert 1e-3 < found.p_value[name] < 1 - 1e-3
    assert found.replicated["mean"].shape == (400, 400)
    torch.testing.assert_close(found.observed["mean"], x.mean(-1))


def test_replicates_follow_the_posterior_predictive(float64):
    model, x = correlated()
    guide = LinearGuide(model, full=True)
    found = diagnostics.predictive_check(
        model, guide, x, statistics=MEAN, num_draws=4000, max_rows=900, seed=0
    )
    A, a, S = model.posterior()
    W = model.weight.detach().mean(0)
    mean = (x @ A.T + a) @ W + model.bias.detach().mean()
    variance = W @ S @ W + model.log_sigma.exp().item() ** 2 / 4
    drawn = found.replicated["mean"]
    assert ((drawn.mean(0) - mean).abs() < 5 * (variance / 4000) ** 0.5).all()
    assert ((drawn.var(0) / variance - 1).abs() < 5 * (2 / 4000) ** 0.5).all()


def test_the_table_of_a_predictive_check_by_hand():
    """Of 200 draws of four rows: two rows out of their range, on either side."""
    drawn = torch.arange(200.0, dtype=torch.float64)[:, None].repeat(1, 4)
    drawn[:, 3] = 199 - drawn[:, 3]  # so that k / 2 + 49.75 is the mean over rows
    observed = torch.tensor([-1.0, 200.0, 99.5, 50.0], dtype=torch.float64)
    check = diagnostics.PredictiveCheck({"ink": observed}, {"ink": drawn}, "x")
    assert check.p_values["ink"].tolist() == pytest.approx([1.0, 0.0, 0.5, 0.7475])
    assert check.p_value["ink"] == 125 / 200  # from k = 75 on it is above 87.125
    row = repr(check).splitlines()[-1].split()
    assert row == ["ink", "87.12", "99.5", "29", "0.625", "50.0%"]


def test_ties_count_half():
    model, guide, args = build("vae_bernoulli")
    constant = {"one": lambda x: torch.ones(len(x))}
    found = diagnostics.predictive_check(model, guide, *args, statistics=constant, num_draws=20)
    assert found.p_value["one"] == 0.5
    assert (found.p_values["one"] == 0.5).all()


def test_misfit_is_seen(float64):
    model, _ = correlated()
    x = model.draw(200) + 3.0
    found = diagnostics.predictive_check(
        model, guides.Prior(model), x, statistics=MEAN, num_draws=200, seed=0
    )
    assert found.p_value["mean"] == 0.0
    assert "mean" in repr(found) and "0.000" in repr(found)


@pytest.mark.parametrize("name", [*ALL_PAIRS, *SOFT_CODES])
def test_predictive_check_of_every_pair(name):
    model, guide, args = build(name)
    total = {"sum": lambda x: x.flatten(1).nansum(1)}
    site = "x" if name == "not_at_random" else None
    found = diagnostics.predictive_check(
        model, guide, *args, statistics=total, num_draws=30, site=site, max_rows=50, seed=0
    )
    torch.testing.assert_close(
        found.observed["sum"], args[0].flatten(1).nansum(1).double(), check_dtype=False
    )
    assert found.replicated["sum"].isfinite().all()
    assert found.replicated["sum"].shape == (30, len(args[0]))


@pytest.mark.parametrize(("of_data", "of_model"), [
    (torch.float64, torch.float64),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
    (torch.uint8, torch.float32),
])  # fmt: skip
def test_ties_count_half_in_every_precision(of_data, of_model):
    """A mean of ten pixels is a multiple of 0.1, of the data as of the draws: mid-p values."""
    pixels, rows, draws = 10, 300, 300
    p = torch.full((pixels,), 0.3, dtype=of_model)

    def model(x):
        with data_plate(x):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=of_model), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(p + 0 * z).to_event(1), obs=x)

    def guide(x):
        with data_plate(x):
            pyro.sample("z", dist.Normal(torch.zeros(1, dtype=of_model), 1.0).to_event(1))

    x = torch.bernoulli(p.expand(rows, pixels)).to(of_data)
    mean = {"mean": lambda v: v.mean(-1)}
    found = diagnostics.predictive_check(
        model, guide, x, statistics=mean, num_draws=draws, max_rows=4000, seed=1
    )
    ones = x.sum(-1).numpy()
    exact = torch.as_tensor(
        stats.binom.sf(ones, pixels, 0.3) + 0.5 * stats.binom.pmf(ones, pixels, 0.3)
    )
    # of one row by itself, p is a mean of draws that are 0, 1/2 or 1
    z = (found.p_values["mean"] - exact).sum() / (exact * (1 - exact) / draws).sum().sqrt()
    assert z.abs() < 4.5, z


def test_bad_predictive_checks():
    model, guide, args = build("vae_bernoulli")

    def check(**options):
        options = {"statistics": MEAN, **options}
        return diagnostics.predictive_check(model, guide, *args, **options)

    with pytest.raises(ValueError, match="num_draws must be at least 20"):
        check(num_draws=19)
    with pytest.raises(ValueError, match="statistics is empty"):
        check(statistics={})
    with pytest.raises(ValueError, match=r"statistic 'mean' must give one value per row, \(6,\)"):
        check(statistics={"mean": lambda x: x.mean()})
    with pytest.raises(ValueError, match=r"statistic 'log' is NaN for 6 of 6 rows, first in row 0"):
        check(statistics={"log": lambda x: (x.sum(-1) - 9.0).log()})
    with pytest.raises(ValueError, match=r"site='y': name one of the observed sites \['x'\]"):
        check(site="y")


def test_figures():
    from matplotlib import pyplot as plt

    model, guide, args = build("vae_bernoulli")
    found = diagnostics.sbc(model, guide, *args, num_simulations=100, num_draws=19, seed=0)
    assert len(found.plot().axes) == 2
    check = diagnostics.predictive_check(model, guide, *args, statistics=MEAN, num_draws=20)
    assert [ax.get_xlabel() for ax in check.plot().axes] == [
        "mean, mean over datapoints",
        "first squared, mean over datapoints",
    ]
    plt.close("all")
