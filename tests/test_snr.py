"""Law 7: the signal-to-noise ratio of gradients against K, with the code of benchmarks/snr.py."""

import importlib
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oracles import assert_mean
from ppvae import elbo

DRAWS, REPLICATES, DIM = (16, 64, 256), 12, 20
Statistic = Callable[[Tensor, Tensor], Tensor]
Found = dict[str, list[tuple[Tensor, Tensor]]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(DRAWS[:2], id="K to 64"),
        pytest.param(DRAWS, id="K to 256", marks=pytest.mark.slow),
    ],
)
def gradients(request: pytest.FixtureRequest) -> Found:
    """By gradient, per K: replicates of gradients, and a term of mean 0; mu and b come first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        snr = importlib.import_module("snr")
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            torch.manual_seed(0)
            x = math.sqrt(2) * torch.randn(128, DIM)
            mu = x.mean(0) + 0.5
            # The guide is nearly right, so that its error does not tilt the gradient of mu.
            model, guide = snr.Model(mu), snr.Guide(0.5 * torch.eye(DIM), 0.5 * mu + 0.05)
            return {
                gradient: [
                    snr.replicates(
                        elbo.IWELBO(K, gradient), model, guide, x, REPLICATES, seed=K, blocks=2
                    )
                    for K in request.param
                ]
                for gradient in ("pathwise", "dreg")
            }
        finally:
            torch.set_default_dtype(before)


def slope(by_draws: list[tuple[Tensor, Tensor]], statistic: Statistic) -> tuple[float, float]:
    """Slope of log statistic on log K, and its standard error by the jackknife."""
    t = torch.tensor(DRAWS[: len(by_draws)], dtype=torch.float64).log()
    t = (t - t.mean()) / (t - t.mean()).square().sum()

    def fit(rows: Tensor) -> float:
        values = [statistic(gradient[rows], zero[rows]) for gradient, zero in by_draws]
        return (t @ torch.stack(values).log()).item()

    everything = torch.arange(REPLICATES)
    without = torch.tensor([fit(everything[everything != r]) for r in everything])
    return fit(everything), math.sqrt(REPLICATES - 1) * without.std(correction=0).item()


def signal(part: slice) -> Statistic:
    """The norm of the mean; the two copies and the blocks of data are put together."""
    return lambda gradient, zero: (gradient - zero).mean((0, 1)).sum(0)[part].norm()


def signal_to_noise(part: slice) -> Statistic:
    """The norm of the mean over the root of the total variance, which blocks of data add up to."""
    size = signal(part)
    return lambda gradient, zero: (
        size(gradient, zero) / gradient[..., part].var(0).mean(0).sum().sqrt()
    )


MODEL, GUIDE = slice(0, DIM), slice(DIM, 2 * DIM)


@pytest.mark.parametrize(
    ("gradient", "part", "theory"),
    [
        ("pathwise", MODEL, 0.5),
        ("pathwise", GUIDE, -0.5),
        ("dreg", MODEL, 0.5),
        ("dreg", GUIDE, 0.5),
    ],
    ids=["pathwise, model", "pathwise, guide", "dreg, model", "dreg, guide"],
)
def test_signal_to_noise_against_particles(
    gradients: Found, gradient: str, part: slice, theory: float
) -> None:
    value, error = slope(gradients[gradient], signal_to_noise(part))
    assert error < 0.025
    assert abs(value - theory) < 0.03 + 3 * error, (value, error)  # 0.03: K is finite


def test_doubly_reparameterised_gradient_has_the_pathwise_signal(gradients: Found) -> None:
    # The signal falls as 1/K. A biased gradient, as with plain weights, would have a constant one.
    for gradient in ("pathwise", "dreg"):
        fall, error = slope(gradients[gradient], signal(GUIDE))
        assert error < 0.02
        assert abs(fall + 1) < 0.03 + 3 * error, (gradient, fall, error)
    for (dreg, _), (pathwise, zero) in zip(gradients["dreg"], gradients["pathwise"], strict=True):
        torch.testing.assert_close(dreg, pathwise - zero, rtol=1e-7, atol=1e-12)
        assert_mean(zero[..., GUIDE].sum(2).mean(1), 0.0, "the term of mean 0")
