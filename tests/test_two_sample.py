"""A two-sample test that is local in x: exact under the null, and it finds the rows."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from ppvae import diagnostics
from ppvae.diagnostics import two_sample
from ppvae.program import data_plate


def model(x: Tensor) -> None:
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def guide_with(factor=lambda x: 1.0, shift=0.0):
    """The posterior N(x / 2, 1/2), but for a factor of its sd by row and a shift."""

    def guide(x: Tensor) -> None:
        with data_plate(x):
            pyro.sample("z", dist.Normal(x / 2 + shift, 0.5**0.5 * factor(x)))

    return guide


QUICK = {"num_simulations": 100, "num_draws": 20, "num_null": 19}
X = torch.tensor([-2.0, -1.0, 1.6, 2.4])


@pytest.mark.parametrize("runs", [25, pytest.param(400, marks=pytest.mark.slow)])
def test_p_values_of_the_posterior_are_uniform(monkeypatch, runs: int) -> None:
    """Exactly, at any row and for any classifier: here one of a few steps."""
    monkeypatch.setattr(two_sample, "_STEPS", 8)
    torch.manual_seed(0)
    each = [diagnostics.local_c2st(model, guide_with(), X, **QUICK) for _ in range(runs)]
    p = torch.stack([found.p_value for found in each])
    ranks = (20 * p).round()
    assert ((ranks - 20 * p).abs() < 1e-6).all() and ranks.min() >= 1
    for level in (0.25, 0.5, 0.75):
        se = math.sqrt(level * (1 - level) / runs)
        assert ((p <= level + 1e-6).double().mean(0) - level).abs().max() < 4.2 * se
    together = torch.tensor([found.p_value_of_all for found in each])
    assert (together <= 0.25).double().mean() < 0.25 + 4 * math.sqrt(0.25 * 0.75 / runs)


@pytest.mark.parametrize("factor", [1.5, 0.6])
def test_it_finds_the_rows_at_which_a_guide_is_wrong(factor: float) -> None:
    guide = guide_with(lambda x: torch.where(x > 0.7, factor, 1.0))
    found = diagnostics.local_c2st(model, guide, X, num_null=19, seed=1)
    assert (found.p_value[2:] == 1 / 20).all() and (found.p_value[:2] > 0.1).all()
    assert found.rejected.tolist() == [False, False, True, True]
    assert found.p_value_of_all == 1 / 20
    assert "p <= 0.05 on 2 of 4 rows" in repr(found) and "is not the posterior" in repr(found)
    exact = diagnostics.local_c2st(model, guide_with(), X, num_null=19, seed=1)
    assert exact.p_value.min() > 0.05 and "No sign" in repr(exact)


def correlated(x: Tensor) -> None:
    with data_plate(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample(
            "x", dist.Normal(z.sum(-1, keepdim=True) + torch.zeros(30), 3.0).to_event(1), obs=x
        )


def test_it_sees_a_dropped_correlation_and_wide_rows() -> None:
    """Of 30 columns, that is by principal components; each unit by itself is right."""
    # the posterior precision is I + (30 / 9) 11', its mean (30 / 9) xbar / (1 + 60 / 9) each
    precision = torch.eye(2) + 30 / 9
    covariance = precision.inverse()

    def guide_of(scale_tril: Tensor):
        def guide(x: Tensor) -> None:
            with data_plate(x):
                loc = (30 / 9 * x.mean(-1) / (1 + 60 / 9))[:, None].expand(-1, 2)
                pyro.sample("z", dist.MultivariateNormal(loc, scale_tril=scale_tril))

        return guide

    x = torch.randn(5, 30) + torch.linspace(-2, 2, 5)[:, None]
    exact, apart = torch.linalg.cholesky(covariance), covariance.diagonal().sqrt().diag()
    options = {"num_null": 19, "num_simulations": 500, "seed": 0}
    assert diagnostics.local_c2st(correlated, guide_of(exact), x, **options).p_value_of_all > 0.05
    found = diagnostics.local_c2st(correlated, guide_of(apart), x, **options)
    assert found.p_value_of_all == 1 / 20 and found.rejected.sum() >= 3


def test_latents_of_all_kinds_and_conditions() -> None:
    """Two sites, of which one is a vector and one discrete; a condition."""

    def prior(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        with data_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.5))
            mean = y[:, None].expand(-1, 3)
            return c, pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))

    def mixed(x: Tensor, y: Tensor) -> None:
        c, z = prior(x, y)
        with data_plate(x):
            pyro.sample("x", dist.Normal(c + z.sum(-1), 1.0), obs=x)

    args = torch.tensor([-3.0, 1.0, 4.0]), torch.tensor([0.0, 1.0, 0.0])
    before = torch.get_rng_state()
    found, again = (
        diagnostics.local_c2st(mixed, prior, *args, num_null=19, num_simulations=400, seed=3)
        for _ in range(2)
    )
    assert found.p_value.shape == (3,) and found.null.shape == (19, 3)
    assert found.p_value_of_all == 1 / 20  # the prior is no posterior
    assert torch.equal(found.statistic, again.statistic)
    assert torch.equal(before, torch.get_rng_state())


def test_what_is_refused() -> None:
    def summed(x: Tensor) -> None:
        with data_plate(x):
            c = pyro.sample("c", dist.Bernoulli(0.5), infer={"enumerate": "parallel"})
            pyro.sample("x", dist.Normal(c, 1.0), obs=x)

    with pytest.raises(ValueError, match="compares latents that both draw"):
        diagnostics.local_c2st(summed, lambda x: None, X)
    for name in ("num_simulations", "num_draws", "num_null", "max_rows"):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            diagnostics.local_c2st(model, guide_with(), X, **{name: 0})
