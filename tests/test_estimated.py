"""Log-densities that are estimates, or lack a constant: what may still be done with the pair."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import ppvae
from ppvae import diagnostics, elbo
from registry import ALL_ESTIMATORS

CURE = "judge it otherwise"
X = torch.tensor([0.3, -1.0, 2.0, 0.1, 0.5])
EXACT = dist.Normal(0.0, math.sqrt(2.0)).log_prob(X)


class Estimated(dist.Normal):
    """A normal whose log_prob is said to be an estimate."""

    estimated = CURE


class Unnormalised(dist.Normal):
    """A normal without its constant."""

    unnormalised = CURE


class Guide(ppvae.Program):
    def __init__(self, posterior, scale):
        super().__init__()
        self.posterior, self.scale = posterior, torch.nn.Parameter(torch.tensor(scale))

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.posterior(x / 2, self.scale))


class Pair:
    def __init__(self, prior=dist.Normal, posterior=dist.Normal, scale=0.9):
        self.prior, self.guide = prior, Guide(posterior, scale)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(torch.zeros(()), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)


@pytest.fixture(params=["guide estimated", "model estimated", "model unnormalised"])
def pair(request):
    return {
        "guide estimated": Pair(posterior=Estimated),
        "model estimated": Pair(prior=Estimated),
        "model unnormalised": Pair(prior=Unnormalised),
    }[request.param]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda fn: fn,
        lambda fn: fn.expand([4]).to_event(1),
        lambda fn: fn.mask(torch.tensor(True)),
        lambda fn: fn.expand([4]).mask(torch.ones(4, dtype=torch.bool)).to_event(1),
        lambda fn: dist.TransformedDistribution(fn, dist.transforms.ExpTransform()),
    ],
    ids=["plain", "independent", "masked", "masked inside", "transformed"],
)
def test_an_estimate_is_seen_through_wrappers(wrap):
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", wrap(Estimated(torch.zeros(()), 1.0)))
            pyro.sample("x", dist.Normal(0.0, 1.0), obs=x)

    def guide(x):
        pyro.poutine.block(model, hide=["x"])(x)

    weights = ppvae.log_weights(model, guide, X, num_particles=2)
    assert weights.estimated == {"z": CURE} and not weights.unnormalised
    plain = ppvae.log_weights(Pair().model, Pair().guide, X)
    assert not plain.estimated and not plain.unnormalised


@pytest.mark.parametrize(
    "evaluate",
    [
        lambda *pair: elbo.ELBO().evaluate(*pair),
        lambda *pair: elbo.IWELBO(num_particles=5).evaluate(*pair),
        lambda *pair: elbo.RenyiELBO(num_particles=5, alpha=-1.0).evaluate(*pair),
        lambda *pair: diagnostics.log_evidence(*pair),
        lambda *pair: ppvae.diagnose(*pair),
        lambda *pair: diagnostics.gaps(*pair),
        lambda *pair: diagnostics.to_arviz(*pair),
        lambda *pair: ppvae.compare(*pair, estimators=[elbo.ELBO()]),
        lambda *pair: diagnostics.ais(*pair, num_temperatures=2),
    ],
    ids=["ELBO", "IWELBO", "Renyi", "log_evidence", "diagnose", "gaps", "arviz", "compare", "ais"],
)
def test_what_would_be_a_bound_or_log_p_is_refused_with_site_and_cure(pair, evaluate):
    with pytest.raises(ValueError, match=r"no (log-)?density") as error:
        evaluate(pair.model, pair.guide, X)
    assert "'z'" in str(error.value)


NONLINEAR = {type(e).__name__: e for e in ALL_ESTIMATORS.values() if not isinstance(e, elbo.ELBO)}


@pytest.mark.parametrize("name", NONLINEAR)
def test_a_bound_that_is_not_linear_refuses_estimates_and_takes_an_unknown_constant(name):
    estimator = NONLINEAR[name]
    for pair in (Pair(posterior=Estimated), Pair(prior=Estimated)):
        with pytest.raises(ValueError, match=r"not linear.*'z'.*elbo\.ELBO"):
            estimator.loss(pair.model, pair.guide, X)
    losses = []
    for pair in (Pair(), Pair(prior=Unnormalised)):
        torch.manual_seed(0)
        losses.append(estimator.loss(pair.model, pair.guide, X))
    assert losses[0] == losses[1]


def test_the_elbo_trains_with_an_estimate_and_gives_it_under_its_own_name(pair):
    torch.manual_seed(0)
    estimate = elbo.ELBO(num_particles=3).estimate(pair.model, pair.guide, X)
    torch.manual_seed(0)
    assert estimate.sum().item() == -elbo.ELBO(num_particles=3).loss(pair.model, pair.guide, X)


def test_fit_shows_an_estimate_keeps_no_best_and_refuses_patience(pair, tmp_path):
    def svi():
        torch.manual_seed(0)
        pair.guide.scale.data.fill_(0.9)
        return ppvae.SVI(pair.model, pair.guide, torch.optim.Adam, elbo.ELBO())

    history = ppvae.fit(svi(), X, valid=X, epochs=2, progress=False, checkpoint=tmp_path / "run")
    assert "valid_estimate" in history.rows[0] and "valid_bound" not in history.rows[0]
    assert history.best_epoch is None and "valid_estimate" in history.table()
    history.plot()
    more = ppvae.fit(
        svi(), X, valid=X, epochs=3, progress=False, checkpoint=tmp_path / "run", resume=True
    )
    assert more.column("valid_estimate")[:2] == history.column("valid_estimate")
    with pytest.raises(ValueError, match=rf"patience=2 .*'z'.*{CURE}"):
        ppvae.fit(svi(), X, valid=X, epochs=2, patience=2, progress=False)


def test_what_uses_draws_of_the_guide_alone_takes_one_without_a_density():
    pair = Pair(posterior=Estimated, scale=math.sqrt(0.5))
    annealed = diagnostics.ais(
        pair.model, pair.guide, X, start="prior", num_temperatures=50, num_chains=64, seed=0
    )
    assert ((annealed.log_evidence - EXACT).abs() < 5 * annealed.log_evidence_se + 1e-3).all()
    with pytest.raises(ValueError, match=r"that of site 'z'.*start=\"prior\""):
        diagnostics.ais(pair.model, pair.guide, X, num_temperatures=2)
    draws = diagnostics.hmc(pair.model, pair.guide, X, seed=0)
    assert draws.converged.all()
    diagnostics.compare_posteriors(pair.model, pair.guide, X, reference=draws, seed=0)

    ranks = diagnostics.sbc(pair.model, pair.guide, X, seed=0)
    assert ranks.p_value > 1e-4 and "estimate" in ranks.absent["densities"]
    statistics = {"mean": lambda x: x}
    diagnostics.predictive_check(pair.model, pair.guide, X, statistics=statistics, num_draws=20)


@pytest.mark.parametrize("prior", [Estimated, Unnormalised])
def test_samplers_of_the_posterior_refuse_a_model_without_a_density(prior):
    pair = Pair(prior=prior)
    for sampler in (diagnostics.hmc, diagnostics.metropolis, diagnostics.quadrature):
        with pytest.raises(ValueError, match=f"'z'.*{CURE}"):
            sampler(pair.model, pair.guide, X)
    with pytest.raises(ValueError, match=f"'z'.*{CURE}"):
        diagnostics.nuts(pair.model, X)
