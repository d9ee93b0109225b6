"""Numbers as NumPy and torch make them, and things that are none."""

import math

import numpy as np
import pytest
import torch

import ppvae
from ppvae import conditionals, diagnostics, guides, models, nets
from ppvae.arguments import takes_numbers

X = torch.bernoulli(torch.full((12, 4), 0.5), generator=torch.Generator().manual_seed(1))


def pair():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    return model, guides.Normal(nets.mlp(4, 8, 4))


@takes_numbers
def takes(whole: int, real: float = 1.0, maybe: int | None = None, other: int | str = 3, *, k=None):
    return whole, real, maybe, other, k


@pytest.mark.parametrize("three", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_any_make_are_pythons(three):
    found = takes(three, three, maybe=three)
    assert found[:3] == (3, 3.0, 3) and [type(v) for v in found[:3]] == [int, float, int]


def test_what_is_left_alone():
    assert takes(1, maybe=None, other=np.int64(2), k="x")[3:] == (np.int64(2), "x")
    assert takes(1, np.float32(0.5))[1] == 0.5 and takes(1, math.inf)[1] == math.inf


@pytest.mark.parametrize("none", ["3", None, True, np.True_, [3], np.array([3]), 2.5, math.nan, 1j])
def test_what_is_no_whole_number_is_named(none):
    with pytest.raises(TypeError, match=r"^whole must be a whole number, got"):
        takes(none)
    with pytest.raises(TypeError, match=r"^whole must be"):
        takes(whole=none)


def test_a_float_that_is_whole_is_given_its_cure_and_a_long_one_its_size():
    with pytest.raises(TypeError, match=r"whole must be a whole number, got 16\.0: give whole=16"):
        takes(16.0)
    with pytest.raises(ValueError, match="whole takes more than 64 bits"):
        takes(2**64)


CALLS = {
    "batch_size": lambda m, g, v: ppvae.fit(
        ppvae.SVI(m, g), X, epochs=1, progress=False, batch_size=v
    ),
    "seed": lambda m, g, v: ppvae.fit(ppvae.SVI(m, g), X, epochs=1, progress=False, seed=v),
    "num_particles": lambda m, g, v: diagnostics.log_evidence(m, g, X, num_particles=v),
    "max_rows": lambda m, g, v: ppvae.diagnose(m, g, X, num_particles=30, max_rows=v),
    "num_draws": lambda m, g, v: diagnostics.to_arviz(m, g, X, num_draws=v),
}


@pytest.mark.parametrize("argument", CALLS)
def test_entry_points_take_numpys_numbers_and_name_what_is_none(argument):
    number = 30 if argument != "max_rows" else 7
    CALLS[argument](*pair(), np.int64(number))
    for value, error in (("16", TypeError), (16.5, TypeError), (2**70, ValueError)):
        with pytest.raises(error, match=f"^{argument} "):
            CALLS[argument](*pair(), value)


@pytest.mark.parametrize("seed", [0, 2**40 + 1, 2**63 - 1, 2**64 - 1])
def test_any_seed_of_64_bits(seed):
    first, second = (
        ppvae.fit(ppvae.SVI(*pair()), X, epochs=1, batch_size=5, progress=False, seed=seed)
        for _ in range(2)
    )
    assert first.column("train_objective") == second.column("train_objective")
    diagnostics.log_evidence(*pair(), X, num_particles=5, seed=seed)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"callbacks": 3}, "callbacks takes one of them or a list, got 3"),
        ({"on_epoch_end": "x"}, "on_epoch_end takes a function"),
        ({"loggers": 3.5}, "loggers takes one of them or a list"),
        ({"fabric": 5}, r"fabric takes a lightning_fabric\.Fabric"),
        ({"checkpoint": 5}, "checkpoint takes a folder"),
        ({"checkpoint": "x", "resume": 5}, "resume takes True, False or the path"),
    ],
)
def test_what_fit_is_given_is_named_before_a_step(options, match):
    svi = ppvae.SVI(*pair())
    with pytest.raises(TypeError, match=match):
        ppvae.fit(svi, X, epochs=1, progress=False, **options)
    assert svi.num_steps == 0
