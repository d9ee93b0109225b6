"""Scores of disentanglement against reference values, by hand, and at their extremes."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ppvae import data, metrics
from ppvae.metrics.disentanglement import _concentration

# Codes made of three factors of 3, 4 and 5 values, one code of noise. The values are those of the
# reference implementation of Locatello et al. (2019), disentanglement_lib, on scikit-learn 1.9.1:
# the first 1,000 rows teach, the others test.
FIXTURE = np.load(Path(__file__).parent / "data" / "disentanglement.npz")
CODES, FACTORS = FIXTURE["codes"], FIXTURE["factors"]
GRID = np.stack(np.meshgrid(*map(range, (2, 3, 4)), indexing="ij"), -1).reshape(-1, 3)


def test_reference_values():
    taught = CODES[:1000], FACTORS[:1000]
    assert metrics.mig(*taught) == pytest.approx(0.680118, abs=1e-6)
    assert metrics.modularity(*taught) == pytest.approx(0.846553, abs=1e-6)
    assert metrics.sap(CODES, FACTORS, 1000) == pytest.approx(0.358667, abs=1e-6)
    squared = metrics.sap(CODES, FACTORS, 1000, squared_correlation=True)
    assert squared == pytest.approx(0.791889, abs=1e-6)
    explicit = [metrics.explicitness(CODES, FACTORS[:, [k]], 1000) for k in range(3)]
    assert explicit == pytest.approx([0.992035, 1, 0.972458], abs=1e-6)
    assert metrics.explicitness(CODES, FACTORS, 1000) == pytest.approx(np.mean(explicit))


def test_reference_values_of_dci():
    importance = np.array([[0.9, 0.05, 0], [0.05, 0.8, 0.1], [0.05, 0.15, 0.6], [0, 0, 0.3]])
    assert _concentration(importance) == pytest.approx(0.615257, abs=1e-6)
    assert _concentration(importance.T) == pytest.approx(0.541893, abs=1e-6)
    found = metrics.dci(CODES[:1000], FACTORS[:1000], num_train=500, num_trees=30)
    assert found[:2] == pytest.approx((0.737676, 0.769184), abs=1e-6)


def test_mig_by_its_formula():
    codes = np.array([[0.0, 0], [0, 1], [1, 0], [9, 1]])  # the first is 0, 0, 2, 19 in 20 bins
    factors = np.array([[0], [0], [1], [1]])
    log2 = np.log(2)  # the first code tells the factor, the second nothing of it
    assert metrics.mig(codes, factors) == pytest.approx((log2 - 0) / log2)
    # 0, 0, 0, 1 in two bins: I = H(1/4) - (1/2) H(1/2)
    entropy = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    assert metrics.mig(codes, factors, bins=2) == pytest.approx((entropy - log2 / 2) / log2)


SCORES = {
    "mig": metrics.mig,
    "modularity": metrics.modularity,
    "sap": metrics.sap,
    "squared": lambda c, v: metrics.sap(c, v, squared_correlation=True),
    "explicitness": metrics.explicitness,
    "dci": lambda c, v: metrics.dci(c, v, num_trees=5),
}


@pytest.mark.parametrize("name", SCORES)
def test_the_order_of_codes_and_of_factors_does_not_matter(name):
    codes, factors = CODES[:300], FACTORS[:300]
    score = SCORES[name](codes, factors)
    near = 5e-3 if name == "dci" else 1e-9  # trees break ties by order
    other = SCORES[name](codes[:, [2, 0, 3, 1]], factors)
    np.testing.assert_allclose(other, score, atol=near)
    other = SCORES[name](torch.tensor(codes), torch.tensor(factors[:, [1, 2, 0]]))
    np.testing.assert_allclose(other, score, atol=1e-9)
    assert SCORES[name](codes, factors) == score


def test_codes_that_are_the_factors():
    v = np.random.default_rng(0).permutation(np.tile(GRID, (10, 1)))
    assert metrics.mig(v, v) == pytest.approx(1, abs=0.02)  # 1 but for chance
    v = GRID  # independent to the last row
    assert metrics.mig(v, v) == pytest.approx(1)
    assert metrics.modularity(v, v) == pytest.approx(1)
    assert metrics.sap(v, v, len(v), squared_correlation=True) == pytest.approx(1)
    v = np.tile(GRID, (4, 1))
    assert metrics.explicitness(v, v, 48) == 1
    assert metrics.dci(v, v, 48, num_trees=30) == pytest.approx((1, 1, 1), abs=1e-3)
    binary = np.random.default_rng(0).integers(2, size=(2000, 2))  # the other code is chance
    assert metrics.sap(binary, binary) == pytest.approx(0.5, abs=0.05)


def test_constant_codes_have_no_score():
    v = np.tile(GRID, (4, 1))
    scores = {name: score(0 * v + 7.0, v) for name, score in SCORES.items()}
    assert scores["dci"][:2] == (0, 0)
    assert scores["explicitness"] == 0.5  # chance
    assert [scores[n] for n in ("mig", "modularity", "sap", "squared")] == [0, 0, 0, 0]
    one = np.concatenate([v[:, :1], 0 * v], 1)  # one factor of three is known
    assert metrics.mig(one, v) == pytest.approx(1 / 3)
    assert metrics.modularity(one, v) == pytest.approx(1 / 4)


@pytest.mark.parametrize(
    ("codes", "factors", "message"),
    [
        (np.ones(4), np.ones((4, 1)), r"codes has shape \(4,\) .*give \(N, D\) and \(N, F\)"),
        (np.ones((4, 2)), np.ones((3, 1)), "a datapoint in each row"),
        ([[0.0, np.nan], [0, 1]], [[0], [1]], "codes has NaN .*in row 0"),
        ([[0.0], [1]], [[0], [1]], "codes has 1 columns, and this score needs 2"),
        ([[0.0, 1], [1, 1]], [[0.5], [1]], "whole numbers"),
        ([[0.0, 1], [1, 1]], [[0, 3], [1, 3]], "factor 1 has the value 3 in every row"),
    ],
)
def test_bad_arrays(codes, factors, message):
    with pytest.raises(ValueError, match=message):
        metrics.mig(codes, factors)


def test_bad_splits_and_bins():
    v = GRID
    with pytest.raises(ValueError, match=r"factor 0 has the values .1. in none .* that teach"):
        metrics.sap(v, v, 12)
    with pytest.raises(ValueError, match=r"factor 0 has the values .0. in none .* that test"):
        metrics.explicitness(v, v, 20)
    with pytest.raises(ValueError, match="num_train=24 of 24 rows: leave 1"):
        metrics.dci(v, v, 24)
    with pytest.raises(ValueError, match="bins=1"):
        metrics.mig(v, v, bins=1)


# ------------------------------------------------------------------------------ interventions

SPRITES = data.sprites(24, sizes=(3, 2, 2, 3, 3))
VOTES = {"num_train": 300, "num_test": 200, "batch_size": 32, "num_variance": 500}
FEW = {"num_train": 300, "num_test": 200, "batch_size": 32}


class Codes:
    """What is known of each image, from the image: its row is found by its pixels."""

    def __init__(self, mixing):
        self.rows = {SPRITES[i].numpy().tobytes(): i for i in range(len(SPRITES))}
        assert len(self.rows) == len(SPRITES)
        factors = SPRITES.factors(torch.arange(len(SPRITES))).double()
        self.codes = (factors / torch.tensor(SPRITES.sizes)) @ torch.as_tensor(mixing).double()
        self.seen = 0

    def __call__(self, images):
        self.seen += len(images)
        return self.codes[[self.rows[image.numpy().tobytes()] for image in images]]


def test_scores_of_the_factors_themselves():
    known = Codes(np.eye(5))
    assert metrics.factor_vae_score(known, SPRITES, **VOTES) == 1
    assert metrics.beta_vae_score(known, SPRITES, **FEW) > 0.97
    # permuted, stretched and beside a constant
    other = Codes(3 * np.eye(5, 6)[:, [2, 5, 0, 1, 4, 3]])
    assert metrics.factor_vae_score(other, SPRITES, **VOTES) == 1


def test_variances_are_relative_to_those_over_all_images():
    """Codes with noise of a tenth of their spread: the narrowest has always the least variance."""
    known = Codes(np.eye(5))
    noise = 0.1 * torch.randn(known.codes.shape, generator=torch.Generator().manual_seed(0))
    known.codes = (known.codes + 0.3 * noise) * torch.tensor([1.0, 20.0, 3.0, 50.0, 8.0])
    assert metrics.factor_vae_score(known, SPRITES, **VOTES) > 0.99


def test_an_image_is_encoded_once():
    known = Codes(np.eye(5))
    metrics.factor_vae_score(known, SPRITES, **VOTES)
    assert known.seen <= 2 * len(SPRITES)  # twice: whether codes are the same again


def test_a_rotation_is_seen_by_the_factor_score_only():
    rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((5, 5)))[0]
    rotated = Codes(rotation)
    chance = 1 / 5
    factor = metrics.factor_vae_score(rotated, SPRITES, **VOTES)
    assert chance < factor < 0.9
    rotated = Codes(10 * rotation)  # codes so large that the regression is hardly regularised
    many = {**FEW, "num_train": 2000, "batch_size": 200}
    assert metrics.beta_vae_score(rotated, SPRITES, **many) > 0.95  # lenient, by design


def test_constant_codes_have_no_vote():
    nothing = Codes(np.zeros((5, 3)))
    assert metrics.factor_vae_score(nothing, SPRITES, **VOTES) == 0
    assert metrics.beta_vae_score(nothing, SPRITES, **FEW) < 0.4  # chance is 0.2


def test_scores_follow_the_seed():
    rotated = Codes(np.linalg.qr(np.random.default_rng(1).standard_normal((5, 5)))[0])
    few = {"num_train": 60, "num_test": 97, "batch_size": 4}
    for score in (metrics.factor_vae_score, metrics.beta_vae_score):
        torch.manual_seed(3)
        one = score(rotated, SPRITES, **few)
        torch.manual_seed(4)
        assert score(rotated, SPRITES, **few) == one
        assert len({score(rotated, SPRITES, **few, seed=seed) for seed in range(4)}) > 1


def test_a_factor_of_one_value_is_never_held():
    with_colour = data.Factors(SPRITES.images, (1, *SPRITES.sizes), ("c", *SPRITES.names))
    known = Codes(np.eye(5))
    assert metrics.factor_vae_score(known, with_colour, **VOTES) == 1


def test_bad_representations():
    score = metrics.factor_vae_score
    with pytest.raises(ValueError, match="other codes at each call: give the mean"):
        score(lambda x: torch.randn(len(x), 2), SPRITES, **VOTES)
    with pytest.raises(ValueError, match=r"gives shape \(108, 1, 24, 24\) for 108 images"):
        score(lambda x: x, SPRITES, **VOTES)
    with pytest.raises(ValueError, match="give finite codes"):
        score(lambda x: x.flatten(1) / 0, SPRITES, **VOTES)
    with pytest.raises(ValueError, match="batch_size=1: give 2"):
        score(lambda x: x.flatten(1), SPRITES, batch_size=1)
    only = data.Factors(SPRITES.images, (108,), ("row",))
    with pytest.raises(ValueError, match="two of them must vary"):
        score(lambda x: x.flatten(1), only)
