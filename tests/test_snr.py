"""Law 7: the signal-to-noise ratio of gradients against K, with the code of benchmarks/snr.py."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from oracles import assert_mean
from ppvae import elbo

DRAWS, REPLICATES, DIM = (16, 64, 256), 16, 20
Statistic = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def gradients() -> dict[str, list[Tensor]]:
    """By gradient, per K: replicates of the gradients ``(R, 2, blocks, P)``; mu comes first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
        snr = __import__("snr")
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
                    )[..., : 2 * DIM]  # mu and b
                    for K in DRAWS
                ]
                for gradient in ("pathwise", "dreg")
            }
        finally:
            torch.set_default_dtype(before)


def slope(by_draws: list[Tensor], statistic: Statistic) -> tuple[float, float]:
    """Slope of log statistic on log K, and its standard error by the jackknife."""
    t = torch.tensor(DRAWS, dtype=torch.float64).log()
    t = (t - t.mean()) / (t - t.mean()).square().sum()

    def fit(rows: Tensor) -> float:
        return (t @ torch.stack([statistic(g[rows]).log() for g in by_draws])).item()

    everything = torch.arange(REPLICATES)
    without = torch.tensor([fit(everything[everything != r]) for r in everything])
    return fit(everything), math.sqrt(REPLICATES - 1) * without.std(correction=0).item()


def signal_to_noise(part: slice) -> Statistic:
    """Root mean square over elements of |mean| / sd; copies of a replicate are averaged first."""

    def statistic(gradients: Tensor) -> Tensor:
        g = gradients[..., part]
        averaged = g.mean(1)
        signal = averaged.mean(0).sum(0).square() - averaged.var(0).sum(0) / len(g)
        return (signal / g.var(0).sum(1).mean(0)).mean().sqrt()

    return statistic


MODEL, GUIDE = slice(0, DIM), slice(DIM, 2 * DIM)


@pytest.mark.parametrize(
    ("gradient", "part", "theory"),
    [("pathwise", MODEL, 0.5), ("pathwise", GUIDE, -0.5), ("dreg", MODEL, 0.5)],
    ids=["model", "guide", "model, dreg"],
)
def test_signal_to_noise_of_pathwise_gradients_against_particles(
    gradients: dict[str, list[Tensor]], gradient: str, part: slice, theory: float
) -> None:
    value, error = slope(gradients[gradient], signal_to_noise(part))
    assert error < 0.04
    assert abs(value - theory) < 0.03 + 4 * error, (value, error)  # 0.03: K is finite


def test_doubly_reparameterised_gradient_keeps_its_signal(
    gradients: dict[str, list[Tensor]],
) -> None:
    value, error = slope(gradients["dreg"], signal_to_noise(GUIDE))
    assert error < 0.04
    assert value > -0.05 + 4 * error, (value, error)
    # The signal itself must be the pathwise one, which falls as 1/K: a biased gradient has more.
    for dreg, pathwise in zip(gradients["dreg"], gradients["pathwise"], strict=True):
        assert_mean((dreg - pathwise).sum(2).mean(1), 0.0, "DReG - pathwise")
    fall, error = slope(gradients["dreg"], lambda g: g[..., GUIDE].mean((0, 1)).sum(0).norm())
    assert abs(fall + 1) < 0.05 + 4 * error, (fall, error)
