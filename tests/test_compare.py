"""ppvae.compare: its numbers against exact ones."""

from __future__ import annotations

import math

import pyro.infer
import pytest
import torch
from torch import nn

import oracles
import ppvae
from oracles import LinearGuide, LinearModel, trainable
from ppvae import elbo
from ppvae.diagnostics import compare_estimators
from ppvae.diagnostics.compare_estimators import PeakMemory


@pytest.fixture
def pair(float64):
    model = LinearModel(2, 4)
    return model, LinearGuide(model, scale=1.3, shift=0.3), model.draw(30)


def test_bounds_and_gaps(pair) -> None:
    model, guide, x = pair
    exact = model.log_evidence(x).detach()
    table = ppvae.compare(
        model, guide, x, [elbo.ELBO(), elbo.IWELBO(4), elbo.IWELBO(4, "dreg")], repeats=100,
        log_evidence=exact, timing_rounds=2,
    )  # fmt: skip
    assert list(table.index) == ["ELBO-1", "IWELBO-4", "IWELBO-4 dreg"]
    assert list(table["particles"]) == [1, 4, 4]
    assert table.attrs["reference"] == "exact"
    assert table.attrs["log_evidence"] == pytest.approx(exact.mean().item())
    mean = oracles.linear_elbo(model, guide, x).mean().item()
    row = table.loc["ELBO-1"]
    assert abs(row["bound"] - mean) < 4 * row["bound_se"]
    assert row["gap"] == pytest.approx(exact.mean().item() - row["bound"])
    assert table.loc["IWELBO-4", "gap"] < row["gap"]
    assert (table["ms"] > 0).all() and (table["peak_mb"] > 0).all()


def test_without_the_exact_evidence_it_is_estimated(pair) -> None:
    model, guide, x = pair
    table = ppvae.compare(model, guide, (x,), {"mine": elbo.ELBO()}, repeats=2, timing_rounds=0)
    assert table.attrs["reference"] == "IWELBO-5000"
    exact = model.log_evidence(x).mean().item()
    assert table.attrs["log_evidence"] == pytest.approx(exact, abs=0.01)
    assert list(table.index) == ["mine"] and "ms" not in table


def test_gradient_noise_is_that_of_repeated_gradients(pair) -> None:
    """Variance against independent draws; SNR against the exact gradient's norm."""
    model, guide, x = pair
    table = ppvae.compare(
        model, guide, x, [elbo.ELBO(), elbo.ELBO(16)], repeats=400, timing_rounds=0,
        log_evidence=model.log_evidence(x).detach(), seed=3,
    )  # fmt: skip
    objective = elbo.ELBO()(model, guide)
    draws = oracles.gradients(lambda: objective(x), trainable(guide), 400, len(x))
    variance = draws.var(0).sum().item()
    # tr of a sample variance of 400 draws: its relative standard error is below sqrt(2 / 399)
    assert table.loc["ELBO-1", "var_guide"] == pytest.approx(variance, rel=6 * math.sqrt(4 / 399))
    ratio = table.loc["ELBO-1", "var_guide"] / table.loc["ELBO-16", "var_guide"]
    assert ratio == pytest.approx(16, rel=6 * math.sqrt(4 / 399))
    exact = -oracles.linear_elbo(model, guide, x).mean()
    signal = oracles.exact_gradient(exact, trainable(guide)).norm().item()
    row = table.loc["ELBO-16"]
    assert row["snr_guide"] == pytest.approx(signal / math.sqrt(row["var_guide"]), rel=0.1)


def test_the_floor_tells_noise_from_signal(float64) -> None:
    """At the exact guide the pathwise gradient of the guide has mean zero: noise only."""
    model = LinearModel(2, 4)
    x = model.draw(30)
    table = ppvae.compare(
        model, LinearGuide(model), x, [elbo.IWELBO(4)], repeats=100, timing_rounds=0,
        log_evidence=model.log_evidence(x).detach(),
    )  # fmt: skip
    row = table.iloc[0]
    assert row["snr_guide"] < 1.5 * row["snr_floor_guide"]
    assert row["snr_model"] > 2 * row["snr_floor_model"]


def test_nothing_is_trained_or_drawn(pair) -> None:
    model, guide, x = pair
    before = {k: v.clone() for k, v in [*model.state_dict().items(), *guide.state_dict().items()]}
    random = torch.get_rng_state()
    ppvae.compare(model, guide, x, [elbo.IWELBO(2)], repeats=2, timing_rounds=1)
    assert torch.equal(random, torch.get_rng_state())
    after = {**model.state_dict(), **guide.state_dict()}
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert all(p.grad is None for p in trainable(model, guide)) and model.training


def test_a_frozen_pair_has_no_gradient_to_measure(pair) -> None:
    model, guide, x = pair
    model.requires_grad_(False), guide.requires_grad_(False)
    table = ppvae.compare(model, guide, x, [elbo.ELBO()], repeats=2, timing_rounds=1)
    assert math.isnan(table.loc["ELBO-1", "snr_guide"]) and table.loc["ELBO-1", "bound"] < 0


def test_bad_use(pair) -> None:
    model, guide, x = pair
    with pytest.raises(ValueError, match="given twice"):
        ppvae.compare(model, guide, x, [elbo.ELBO(), elbo.ELBO()])
    with pytest.raises(ValueError, match="repeats must be at least 2"):
        ppvae.compare(model, guide, x, [elbo.ELBO()], repeats=1)
    with pytest.raises(ppvae.PairError, match="argument 'x'"):
        ppvae.compare(model, guide, torch.full_like(x, math.nan), [elbo.ELBO()])
    for wrong in ([], [pyro.infer.Trace_ELBO()], {"a": elbo.ELBO}):
        with pytest.raises(TypeError, match=r"values from ppvae\.elbo"):
            ppvae.compare(model, guide, x, wrong)
    for evidence in (-2.0, torch.zeros(len(x) + 1)):
        with pytest.raises(ValueError, match="one value per datapoint"):
            ppvae.compare(model, guide, x, [elbo.ELBO()], log_evidence=evidence)


def test_peak_memory_counts_what_is_alive_at_once() -> None:
    net = nn.Sequential(nn.Linear(10, 1000), nn.Tanh(), nn.Linear(1000, 1))
    x = torch.zeros(50, 10)
    with PeakMemory() as one, torch.no_grad():
        for _ in range(20):
            net(x)
    hidden = 50 * 1000 * 4
    assert 2 * hidden <= one.peak < 4 * hidden  # before and after tanh; not twenty times that
    del net
    with PeakMemory() as kept:
        held = [torch.zeros(1000) for _ in range(7)]
    assert kept.peak == 7 * 4000 and len(held) == 7


def test_the_signal_to_noise_ratio_by_its_formula(pair, monkeypatch) -> None:
    """||E g|| / sqrt(tr Var g), with tr Var / repeats taken off the squared norm of the mean."""
    model, guide, x = pair
    parameters = trainable(guide)
    draws = [[torch.randn_like(p) + 0.5 for p in parameters] for _ in range(6)]
    given = iter(draws)

    def gradient(objective, args, every):
        by_parameter = dict(zip(parameters, next(given), strict=True))
        return [by_parameter.get(p) for p in every]

    monkeypatch.setattr(compare_estimators, "_gradient", gradient)
    model.requires_grad_(False)
    found = compare_estimators._gradient_noise(elbo.ELBO()(model, guide), (x,), 6)
    flat = torch.stack([torch.cat([g.flatten() for g in draw]) for draw in draws]).double()
    total = flat.var(0).sum()
    signal = flat.mean(0).square().sum() - total / 6
    assert found["var_guide"] == pytest.approx(total.item(), rel=1e-5)
    assert found["snr_guide"] == pytest.approx((signal / total).sqrt().item(), rel=1e-5)
    # of normal noise alone, ||mean||^2 less its expectation has the variance 2 sum (v / repeats)^2
    chance = math.sqrt(2 * (flat.var(0) / 6).square().sum())
    assert found["snr_floor_guide"] == pytest.approx(math.sqrt(2 * chance / total), rel=1e-5)
