"""Laws of `ppvae.data`: splits, binarisation, quadrants, exact evidence, bad input, downloads."""

from __future__ import annotations

import functools
import gc
import gzip
import hashlib
import http.server
import threading
import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import MultivariateNormal

from ppvae import data
from ppvae.data import fetch
from ppvae.data.arrays import split_rows

PARTS = ("train", "valid", "test")


def parts(dataset):
    return [getattr(dataset, part) for part in PARTS]


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def grey(n=200, d=5, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed))


# binarisation


def test_dynamic_draws_are_a_function_of_seed_and_epoch(digits):
    train, again = digits.train, data.load("digits").train
    other = data.load("digits", seed=1).train
    assert torch.equal(train.draw(3), again.draw(3))
    assert torch.equal(train.draw(0), train.x)
    assert train.x is train.x
    assert not torch.equal(train.draw(3), train.draw(4))
    assert not torch.equal(train.draw(0), train.draw(1))
    same_values = data.Split(train.values, binarize="dynamic", seed=train.seed + 1)
    assert not torch.equal(same_values.draw(3), train.draw(3))
    assert train.seed != other.seed
    assert set(train.draw(5).unique().tolist()) == {0.0, 1.0}


def test_static_draws_stay(digits):
    split = data.Split(grey(), binarize="static")
    assert torch.equal(split.draw(7), split.x)
    assert torch.equal(split.batch(7)[0], split.args[0])


def test_the_global_random_state_is_neither_read_nor_moved(digits):
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    before = torch.get_rng_state()
    before_np = np.random.get_state()[1].copy()  # noqa: NPY002
    loaded = data.load("digits")
    first = loaded.train.draw(1)
    data.load("gaussian_mixture", num=50)
    data.load("linear_gaussian", num=50)
    assert torch.equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == before_np).all()  # noqa: NPY002
    torch.manual_seed(2)
    assert torch.equal(loaded.train.draw(1), first)


def test_the_mean_of_draws_is_the_grey_level():
    values = torch.linspace(0, 1, 11).repeat(40, 1)
    split = data.Split(values, binarize="dynamic")
    epochs = 200
    mean = torch.stack([split.draw(epoch) for epoch in range(epochs)]).mean((0, 1))
    se = (values[0] * (1 - values[0]) / (epochs * len(values))).sqrt()
    assert ((mean - values[0]).abs() <= 5 * se + 1e-6).all()
    assert mean[0] == 0
    assert mean[-1] == 1


def test_draws_do_not_depend_on_the_dtype():
    single = data.Split((grey() * 16).round() / 16, binarize="dynamic")
    double = data.Split(single.values.double(), binarize="dynamic")
    assert torch.equal(single.draw(2).double(), double.draw(2))


def test_no_binarisation_gives_grey_levels():
    digits = data.load("digits", binarize=None)
    assert digits.support == "unit_interval"
    assert digits.train.draw(1) is digits.train.values
    assert 0 < len(digits.train.x.unique()) <= 17


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_x_is_the_same_on_cuda_and_draws_there_are_reproducible(digits):
    moved = digits.to("cuda")
    assert moved.train.x.is_cuda
    assert torch.equal(moved.train.x.cpu(), digits.train.x)
    assert torch.equal(moved.train.draw(1), digits.to("cuda").train.draw(1))
    halves = data.quadrants(moved, 2)
    assert torch.equal(halves.join(*halves.test.args).flatten(1), moved.test.x)


# splits


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 60), st.integers(0, 5), st.integers(1, 4), st.booleans())
def test_splits_are_disjoint_and_cover(num, seed, classes, labelled):
    labels = np.arange(num) % classes if labelled else None
    train, valid, test = split_rows(num, 0.1, 1, seed, labels)
    assert min(map(len, (train, valid, test))) >= 1
    assert sorted(np.concatenate([train, valid, test])) == list(range(num))


def test_splits_are_stratified_and_seeded():
    labels = np.repeat([0, 1, 2], [600, 300, 100])
    mine = data.from_arrays(np.arange(1000.0)[:, None], labels, valid=100, test=0.2)
    for split in parts(mine):
        counts = split.y.bincount(minlength=3) / len(split)
        assert (counts - torch.tensor([0.6, 0.3, 0.1])).abs().max() < 0.03
        assert torch.equal(split.y, torch.from_numpy(labels)[split.x[:, 0].long()])
    for seed in range(5):  # a stretch begins and ends within a row of each class
        for rows in split_rows(1000, 100, 200, seed, labels):
            counts = np.bincount(labels[rows], minlength=3)
            assert (np.abs(counts - len(rows) * np.array([0.6, 0.3, 0.1])) <= 2).all()
    again = data.from_arrays(np.arange(1000.0)[:, None], labels, valid=100, test=0.2)
    other = data.from_arrays(np.arange(1000.0)[:, None], labels, valid=100, test=0.2, seed=1)
    assert torch.equal(mine.train.x, again.train.x)
    assert not torch.equal(mine.train.x, other.train.x)


def test_digits(digits):
    from sklearn.datasets import load_digits

    assert [len(split) for split in parts(digits)] == [1297, 200, 300]
    assert digits.shape == (1, 8, 8)
    assert digits.train.x.shape == (1297, 64)
    assert data.load("digits", flatten=False).valid.x.shape == (200, 1, 8, 8)
    rows = torch.cat([split.values for split in parts(digits)]) * 16
    stored = torch.from_numpy(load_digits().data).float()
    assert torch.equal(rows.sum(0), stored.sum(0))
    assert rows.dtype == torch.float32
    assert len({split.seed for split in parts(digits)}) == 3


def test_batches(digits):
    assert len(digits.train.batch(0)) == 1
    x, y = digits.supervised().train.batch(2)
    assert torch.equal(x, digits.train.draw(2))
    assert y.dtype == torch.int64
    assert torch.equal(y, digits.train.y)
    with pytest.raises(ValueError, match="has no y"):
        data.from_arrays(grey()).supervised()
    assert "train 1,297" in repr(digits)
    assert "(x, y)" in repr(digits.supervised())
    assert "values=(1297, 64)" in repr(digits.train)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"binarize": "often"}, "'dynamic', 'static', None"),
        ({"seed": -1}, "0 or more"),
        ({"y": torch.zeros(3)}, "one y per row"),
        ({"supervised": True}, "needs y"),
    ],
)
def test_bad_splits(options, match):
    with pytest.raises(ValueError, match=match):
        data.Split(grey(), **options)


def test_binarising_needs_the_unit_interval():
    with pytest.raises(ValueError, match=r"from 0 to 16.*rescale"):
        data.Split(torch.tensor([[0.0, 16.0]]), binarize="static")
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        data.from_arrays(grey() - 1, binarize="dynamic")


# quadrants


@pytest.mark.parametrize("missing", [1, 2, 3])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (6, 4)])
@pytest.mark.parametrize("binarize", ["dynamic", "static", None])
def test_join_inverts_quadrants_in_every_epoch(missing, shape, binarize):
    whole = data.from_arrays(grey(30, int(np.prod(shape))), shape=shape, binarize=binarize)
    cut = data.quadrants(whole, missing=missing)
    for epoch in (0, 1):
        images = cut.join(*cut.train.batch(epoch))
        assert torch.equal(images, whole.train.draw(epoch).reshape(-1, *shape))
        assert torch.equal(cut.train.draw(epoch), cut.train.batch(epoch)[0])
    assert torch.equal(cut.test.args[1], cut.test.y)
    x, y = cut.test.args
    many = cut.join(x.expand(4, *x.shape), y)
    assert many.shape == (4, 3, *shape)
    assert torch.equal(many[2], cut.join(x, y))


def test_quadrants_are_where_they_should_be():
    image = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # top left, top right, bottom left, bottom right
    whole = data.from_arrays(image.expand(9, 1, 2, 2))
    visible = {1: [1, 2, 3], 2: [1, 3], 3: [3]}
    for missing, expected in visible.items():
        x, y = data.quadrants(whole, missing).test.args
        assert y[0].tolist() == expected
        assert x[0].tolist() == [v for v in (1, 2, 3, 4) if v not in expected]
    wide = data.from_arrays(torch.arange(12.0).reshape(2, 6).expand(9, 1, 2, 6))
    x, y = data.quadrants(wide, 2).test.args
    assert (x[0].tolist(), y[0].tolist()) == ([3, 4, 5, 9, 10, 11], [0, 1, 2, 6, 7, 8])


def test_bad_quadrants(digits):
    with pytest.raises(ValueError, match="1, 2, 3"):
        data.quadrants(digits, 4)
    with pytest.raises(ValueError, match="not images"):
        data.quadrants(data.load("gaussian_mixture", num=20), 1)
    cut = data.quadrants(digits, 1)
    with pytest.raises(ValueError, match="already"):
        data.quadrants(cut, 1)
    with pytest.raises(ValueError, match=r"data\.quadrants"):
        digits.join(grey(), grey())
    with pytest.raises(ValueError, match=r"16 .* 48"):
        cut.join(*cut.test.args[::-1])


# synthetic data


def test_linear_gaussian_is_exact():
    dataset = data.load("linear_gaussian", num=20_000, dim=4, latent_dim=2, seed=3)
    w, b, sigma = data.linear_gaussian_parameters(dim=4, latent_dim=2, seed=3)
    covariance = w @ w.T + sigma**2 * torch.eye(4, dtype=w.dtype)
    x = dataset.test.x
    exact = MultivariateNormal(b, covariance).log_prob(x.double())
    torch.testing.assert_close(dataset.log_evidence(x).double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dataset.train.x.mean(0).double(), b, rtol=0, atol=0.06)
    torch.testing.assert_close(dataset.train.x.T.cov().double(), covariance, rtol=0, atol=0.1)


def test_linear_gaussian_posterior_obeys_bayes():
    parameters = data.linear_gaussian_parameters(dim=5, latent_dim=3, seed=1)
    x, z = grey(6, 5).double(), grey(6, 3, seed=1).double()
    prior = MultivariateNormal(torch.zeros(3).double(), torch.eye(3).double()).log_prob(z)
    noise = parameters.sigma**2 * torch.eye(5).double()
    likelihood = MultivariateNormal(z @ parameters.W.T + parameters.b, noise).log_prob(x)
    posterior = parameters.posterior(x).log_prob(z)
    torch.testing.assert_close(prior + likelihood - posterior, parameters.log_evidence(x))


def test_gaussian_mixture_density_integrates_to_one():
    dataset = data.load("gaussian_mixture", num=500, num_components=3)
    side = torch.linspace(-8, 8, 321)
    grid = torch.cartesian_prod(side, side)
    total = dataset.log_evidence(grid).double().exp().sum() * (side[1] - side[0]) ** 2
    assert abs(float(total) - 1) < 1e-4
    means, sigma = data.gaussian_mixture_parameters(3)
    distance = (dataset.train.x - means[dataset.train.y]).square().sum(-1)
    assert abs(float(distance.mean()) / (2 * sigma**2) - 1) < 5 * 400**-0.5
    assert dataset.num_classes == 3


def test_typeset_digits_are_a_function_of_the_seed_and_can_be_told_apart():
    """Centres of the classes read two unseen digits in three, where chance reads one in ten."""
    first, again, other = (data.load("typeset", num=400, binarize=None, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.train.x, again.train.x)
    assert not torch.equal(first.train.x, other.train.x)
    assert first.support == "unit_interval"
    assert data.load("typeset", num=100, flatten=False).train.x.unique().tolist() == [0, 1]
    centres = torch.stack([first.train.x[first.train.y == d].mean(0) for d in range(10)])
    seen = torch.cdist(other.train.x, centres).argmin(1) == other.train.y
    assert seen.float().mean() > 0.6
    with pytest.raises(ValueError, match="num"):
        data.load("typeset", num=10)


def test_bad_synthetic():
    with pytest.raises(ValueError, match="latent_dim must be at least 1"):
        data.load("linear_gaussian", latent_dim=0)
    with pytest.raises(ValueError, match="num_components must be at least 1"):
        data.load("gaussian_mixture", num_components=0)
    with pytest.raises(ValueError, match="train needs at least 1"):
        data.load("gaussian_mixture", num=2)
    with pytest.raises(ValueError, match="seed=-1"):
        data.load("linear_gaussian", seed=-1)


# users' arrays


@pytest.mark.parametrize(
    ("values", "support"),
    [
        ([[0, 1], [1, 1], [0, 0]], "binary"),
        ([[True, False]] * 3, "binary"),
        ([[0.0, 0.5]] * 3, "unit_interval"),
        ([[0, 3]] * 3, "counts"),
        ([[-1, 3]] * 3, "integer"),
        ([[-1.5, 3]] * 3, "real"),
    ],
)
def test_support_is_inferred_and_stated(values, support):
    mine = data.from_arrays(np.array(values))
    assert mine.support == support
    assert f"{support!r} inferred" in mine.source
    assert mine.train.x.dtype == torch.get_default_dtype()


def test_arrays_are_copied_and_tensors_do():
    x = np.ones((10, 2))
    mine = data.from_arrays(x)
    x[:] = 5
    assert mine.train.x.max() == 1
    tensor = torch.full((10, 2), 0.5, dtype=torch.bfloat16, requires_grad=True)
    assert not data.from_arrays(tensor).train.x.requires_grad
    conditions = data.from_arrays(x, grey(10, 3)).supervised()
    assert conditions.num_classes is None
    assert conditions.train.args[1].shape == (8, 3)
    flat = data.from_arrays(grey(10, 12).reshape(10, 1, 3, 4), flatten=True)
    assert flat.train.x.shape == (8, 12)
    assert flat.shape == (1, 3, 4)


def with_nan():
    x = np.ones((10, 2, 2))
    x[3, 1, 1] = np.nan
    x[7, 0, 0] = np.inf
    return x


X = np.ones((10, 4))


@pytest.mark.parametrize(
    ("args", "options", "error", "match"),
    [
        ((with_nan(),), {}, ValueError, "2 NaN or infinite.*row 3"),
        ((np.full((4, 2), 1e300),), {}, ValueError, r"8 NaN or infinite values \(as torch.float32"),
        ((np.zeros((0, 4)),), {}, ValueError, r"empty, shape \(0, 4\)"),
        ((np.ones(10),), {}, ValueError, r"x\[:, None\]"),
        ((np.ones((3, 1, 1, 1, 1)),), {}, ValueError, r"\(N, C, H, W\)"),
        ((np.ones((10, 8, 8, 3)),), {}, ValueError, r"channels last.*permute\(0, 3, 1, 2\)"),
        ((np.ones((2, 4)),), {}, ValueError, "train needs at least 1"),
        ((np.array([[None, 1]] * 5),), {}, TypeError, "object"),
        (([[1.0, 2.0], [1.0]] * 5,), {}, ValueError, "x has rows of different lengths"),
        ((np.array([["a", "b"]] * 5),), {}, TypeError, "x holds words .*code them as numbers"),
        (
            (pd.DataFrame({"a": pd.array([1, None] * 5, dtype="Int64"), "b": 1.0, "c": "d"}),),
            {},
            TypeError,
            r"^x has columns .*'a': Int64, 'c': (object|str).* x.astype\(float\).*dummies",
        ),
        ((X * 1j,), {}, TypeError, "complex"),
        ((np.full((5, 3), 200, dtype=np.uint8),), {}, ValueError, "x / 255"),
        ((X,), {"shape": (1, 3, 3)}, ValueError, r"shape=\(1, 3, 3\) has 9 .* 4"),
        ((X,), {"support": "reals"}, ValueError, "'real'"),
        ((-X,), {"support": "counts"}, ValueError, "support='integer'"),
        ((X / 2,), {"support": "binary"}, ValueError, "support='unit_interval'"),
        ((X * 2,), {"binarize": "dynamic"}, ValueError, "rescale"),
        ((X,), {"binarize": "yes"}, ValueError, "binarize='yes'"),
        ((X,), {"valid": 0}, ValueError, "valid=0"),
        ((X,), {"test": 1.5}, ValueError, "test=1.5"),
        ((X,), {"valid": True}, ValueError, "valid=True"),
        ((X,), {"valid": 5, "test": 5}, ValueError, "train needs at least 1"),
        ((X,), {"seed": -1}, ValueError, "seed=-1"),
        ((X, np.zeros(9)), {}, ValueError, r"y has shape \(9,\) and x 10 rows"),
        ((X, np.zeros((10, 1, 1))), {}, ValueError, "conditions"),
        ((X, np.arange(10) - 1), {}, ValueError, "1 labels .* row 0: -1"),
        ((X, np.arange(10) / 2), {}, ValueError, r"\(N, 1\) conditions"),
        ((X, np.array(["a"] * 10)), {}, TypeError, "y holds"),
        ((X, np.full((10, 1), np.nan)), {}, ValueError, "y has 10 NaN"),
        (
            (X, np.arange(10) % 3 - 1),
            {},
            ValueError,
            r"y has 4 labels .* if -1 is no label, as for models.M2, fit on the arrays themselves",
        ),
    ],
)
def test_bad_arrays(args, options, error, match):
    with pytest.raises(error, match=match):
        data.from_arrays(*args, **options)


# users' files


def noise(size=400, seed=0):
    return np.random.default_rng(seed).normal(size=size)


# name -> a column, and whether float32 loses what matters of it
COLUMNS = {
    "seconds": (1.7e9 + np.arange(400) % 60, True),
    "seconds in int64": (1_700_000_000 + np.arange(400) % 60, True),
    "seconds, some missing": (np.where(np.arange(400) % 50, 1.7e9 + 60 * noise(), 0.0), True),
    "an offset of 1e8": (1e8 + noise(), True),
    "an offset of 1e5": (1e5 + noise(), True),
    "counts beyond 2^24": (2**24 + np.arange(400), True),
    "one count beyond 2^24": (np.append(np.arange(399), 2**24 + 1), True),
    "counts in uint64": (np.array([*range(399), 2**63 + 1], np.uint64), True),
    "the largest int64": (np.append(np.arange(399), 2**63 - 1), True),
    "numbers below the smallest float32": (1e-60 * noise(), True),
    "an offset of 1e3": (1e3 + noise(), False),
    "counts up to 2^24": (2**24 - np.arange(400), False),
    "even numbers beyond 2^24": (2**24 + 2 * np.arange(400), False),
    "grey levels": (np.arange(400) % 256 / 255, False),
    "whole grey levels": (np.arange(400) % 256, False),
    "small numbers": (1e-30 * noise(), False),
    "large numbers": (1e30 * noise(), False),
    "heavy tails": (np.exp(5 * noise()), False),
    "a constant": (np.full(400, 0.1), False),
    "two values": (np.where(np.arange(400) % 2, 0.1, 0.2), False),
    "bytes": ((np.arange(400) % 2).astype(np.uint8), False),
    "halves": (noise().astype(np.float16), False),
    "flags": (np.arange(400) % 2 > 0, False),
}


@pytest.mark.parametrize("how", ["arrays", "mapped", "npz", "csv", "tensor", "y"])
@pytest.mark.parametrize("name", COLUMNS)
def test_columns_that_float32_cannot_hold_are_named(name, how, tmp_path):
    """A warning is an error here, so the others pass in silence."""
    column, lossy = COLUMNS[name]
    x = np.stack([column % 2 if column.dtype.kind == "u" else column * 0, column], 1)
    if (how == "tensor" and x.dtype == np.uint64) or (how == "csv" and float(column.max()) > 2**53):
        pytest.skip("torch hardly has it, and text is read as float64")

    def load():
        if how == "mapped":
            np.save(tmp_path / "x.npy", x)
            return data.from_arrays(np.load(tmp_path / "x.npy", mmap_mode="r"))
        if how == "npz":
            np.savez(tmp_path / "x.npz", x=x)
            return data.load(tmp_path / "x.npz")
        if how == "csv":
            rows = [f"{a!r},{b!r}" for a, b in (x * 1).tolist()]
            (tmp_path / "x.csv").write_text("\n".join(["zero,time", *rows]))
            return data.load(tmp_path / "x.csv")
        if how == "y":
            return data.from_arrays(np.zeros((400, 1)), x)
        return data.from_arrays(torch.from_numpy(x) if how == "tensor" else x)

    if not lossy:
        assert len(load().train) == 320
        return
    before, after = len(np.unique(column)), len(np.unique(column.astype(np.float32)))
    place = {"csv": "column 'time' of x", "y": r"y\[:, 1\]"}.get(how, r"x\[:, 1\]")
    match = f"float32 loses digits: {place}, .*off by .*{before} distinct values become {after}"
    with pytest.warns(data.PrecisionWarning, match=match):
        loaded = load()
    stored = loaded.train.y if how == "y" else loaded.train.x
    assert set(stored[:, 1].tolist()) <= set(column.astype(np.float32).tolist())  # not moved


def test_what_float32_cannot_hold_can_be_kept(float64):
    seconds = 1.7e9 + np.arange(400) % 60
    kept = data.from_arrays(np.stack([seconds, noise()], 1))
    assert len(kept.train.x[:, 0].unique()) == 60
    counts = scipy.sparse.csr_array(np.full((20, 2), 2**24 + 1))
    assert data.from_counts(counts).train.x.unique().tolist() == [2**24 + 1]
    with pytest.warns(data.PrecisionWarning, match="float64 loses digits"):
        data.from_arrays(np.full((20, 2), 2**53 + 1))


def test_whole_numbers_that_rounding_has_made_are_not_counts():
    with pytest.warns(data.PrecisionWarning):
        assert data.from_arrays(1e8 + noise((400, 2))).support == "real"
    with pytest.warns(data.PrecisionWarning):
        assert data.from_arrays(1e-60 * abs(noise((400, 2)))).support == "unit_interval"
    with pytest.warns(data.PrecisionWarning):
        assert data.from_arrays(np.full((20, 2), 2**24 + 1)).support == "counts"


def test_a_place_in_an_image_is_named_and_others_are_counted():
    images = np.zeros((20, 1, 2, 3))
    images[:, 0, 1] = 1e9 + noise((20, 3))
    images[:, 0, 0, 1:] = 1e9 + noise((20, 2))
    match = r"x\[:, 0, 0, 1\], .*x\[:, 0, 0, 2\], .*x\[:, 0, 1, 0\], .*2 more columns"
    with pytest.warns(data.PrecisionWarning, match=match):
        data.from_arrays(images)


def test_large_counts_are_named():
    counts = np.array([[2**24 + 1, 1]] * 20)
    for x in (counts, scipy.sparse.csr_array(counts), torch.from_numpy(counts)):
        with pytest.warns(data.PrecisionWarning, match="20 counts .* 16777217, kept as 16777216"):
            data.from_counts(x)


def test_npz(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, x=grey(20, 12).reshape(20, 1, 3, 4), y=np.arange(20) % 2, other=np.ones(20))
    mine = data.load(path)
    assert mine.name == "mine"
    assert mine.train.x.shape == (16, 12)
    assert mine.shape == (1, 3, 4)
    assert data.from_npz(path, y=None).train.y is None
    assert data.load(str(path), flatten=False, binarize="static").support == "binary"
    with pytest.raises(ValueError, match=r"keys are \['x', 'y', 'other'\]"):
        data.from_npz(path, x="images")
    with pytest.raises(TypeError, match="no option label: it has"):
        data.load(path, label=0)
    np.savez(path, x=np.array([{}, 1], dtype=object))
    with pytest.raises(ValueError, match="pickled objects are refused"):
        data.from_npz(path)
    for junk in (b"", b"junk", b"PK\x03\x04junk"):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match="cannot read"):
            data.from_npz(path)
    np.save(tmp_path / "plain.npy", np.ones(3))
    (tmp_path / "plain.npy").rename(path)
    with pytest.raises(ValueError, match="nameless"):
        data.from_npz(path)


def test_csv(tmp_path):
    path = tmp_path / "mine.csv"
    lines = [f"{i},{i % 2},{'ab'[i % 2]}" for i in range(20)]
    path.write_text("\n".join(lines))
    bare = data.from_csv(path, label=2)
    assert bare.shape == (2,)
    assert sum(map(len, parts(bare))) == 20
    assert "0=a, 1=b" in bare.source
    assert torch.equal(bare.train.y, bare.train.x[:, 1].long())
    assert data.from_csv(path, label=-1).num_classes == 2
    path.write_text("\ufeffn,parity,kind\r\n" + "\r\n".join(lines), encoding="utf-8")
    named = data.load(path, label="kind")
    assert torch.equal(named.train.x, bare.train.x)
    path.write_text("n,parity\n" + "\n".join(line[:-2] for line in lines))
    numbers = data.from_csv(path, label="parity")
    assert torch.equal(numbers.train.y, numbers.train.x[:, 0].long() % 2)


@pytest.mark.parametrize(
    ("text", "label", "match"),
    [
        ("", None, "empty"),
        ("a,b\n1,2\n3,x", None, "data row 1, column 'b' holds 'x'"),
        ("a,b\n1,2\n3,", None, "column 'b' holds ''"),
        ("a,b\n1,2\n3", None, "data row 1, column 'b' holds ''"),
        ("a,b\n1,2\n3,4,5", None, r"bad\.csv: .*in line 3, saw 3\. .*as many cells"),
        ("a,b\n1,2\n3,4", "c", r"label='c': the columns are \['a', 'b'\]"),
        ("1,2\n3,4", 2, "label=2"),
        ("1,2\nnan,4\n5,6", None, "1 NaN.*row 1"),
        ("1;2\n3;4", None, "separate by commas"),
        ("a,b", None, "x is empty"),
    ],
)
def test_bad_csv(tmp_path, text, label, match):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        data.from_csv(path, label=label)


def test_image_folders(tmp_path):
    from PIL import Image as image

    for i in range(12):
        folder = tmp_path / ("cat" if i % 2 else "dog")
        folder.mkdir(exist_ok=True)
        colour = (255, 0, 0) if i % 2 else (0, 0, 255)
        image.new("RGB", (20 + i, 30), colour).save(folder / f"{i}.png")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    mine = data.load(tmp_path, grey=False, size=(6, 4))
    assert mine.shape == (3, 6, 4)
    assert mine.num_classes == 2
    assert "0=cat, 1=dog" in mine.source
    images = mine.train.x.reshape(-1, 3, 6, 4)
    assert torch.equal(images[:, 2, 0, 0], mine.train.y.float())  # dogs are blue
    assert data.from_images(tmp_path).train.x.shape == (10, 1, 28, 28)
    flat = data.from_images(tmp_path / "cat", valid=1, test=1)
    assert flat.train.y is None
    assert flat.shape == (1, 28, 28)
    (tmp_path / "cat" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"cannot read .*broken\.png"):
        data.from_images(tmp_path)
    (tmp_path / "cat" / "broken.png").unlink()
    image.fromarray(np.full((5, 5), 1000, dtype=np.uint16)).save(tmp_path / "cat" / "deep.png")
    with pytest.raises(ValueError, match="8 bits"):
        data.from_images(tmp_path)
    image.new("L", (5, 5)).save(tmp_path / "beside.png")
    with pytest.raises(ValueError, match="beside sub-folders"):
        data.from_images(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no images"):
        data.from_images(tmp_path / "none")
    with pytest.raises(ValueError, match="no folder"):
        data.from_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"size( must be|=)"):
        data.from_images(tmp_path, size=(0, 3))


# names


@pytest.mark.parametrize(
    ("name", "options", "error", "match"),
    [
        ("minst", {}, ValueError, "did you mean 'mnist'"),
        ("fashion-mnist", {}, ValueError, "did you mean 'fashion_mnist'"),
        ("xyzzy", {}, ValueError, "The names are digits, typeset, mnist"),
        ("nothing.npz", {}, ValueError, "existing .npz"),
        ("digits", {"binarize": "maybe"}, ValueError, "binarize='maybe'"),
        ("mnist", {"binarize": "maybe"}, ValueError, "binarize='maybe'"),
        ("mnist", {"num_valid": 60_000}, ValueError, "num_valid=60000"),
        ("gaussian_mixture", {"binarize": "static"}, ValueError, "needs grey levels"),
        ("digits", {"num": 3}, TypeError, "no option num: it has binarize, flatten, seed"),
    ],
)
def test_bad_names_and_options(name, options, error, match):
    with pytest.raises(error, match=match):
        data.load(name, **options)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="neither"):
        data.load(path)
    with pytest.raises(ValueError, match=r"not an \.npz"):
        data.from_npz(path)
    with pytest.raises(ValueError, match="no file"):
        data.from_csv(tmp_path / "nowhere.csv")


# downloads


def idx(array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(head + array.tobytes())


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server with one file, its checksum known, and an empty cache; yields (file, cache)."""
    site, cache = tmp_path / "site", tmp_path / "cache"
    site.mkdir()
    file = site / "train-labels-idx1-ubyte.gz"
    file.write_bytes(idx(np.arange(5, dtype=np.uint8)))

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    handler = functools.partial(Quiet, directory=str(site))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("PPVAE_DATA", str(cache))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(fetch.URLS, "mnist", f"http://127.0.0.1:{server.server_port}/")
    md5 = hashlib.md5(file.read_bytes()).hexdigest()
    monkeypatch.setitem(fetch.MD5, f"mnist/{file.name}", md5)
    yield file, cache
    server.shutdown()
    server.server_close()
    with warnings.catch_warnings():  # the client's pooled connections end here, not in a later test
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_download_is_kept_and_not_repeated(served):
    file, cache = served
    path = fetch.fetch("mnist", file.name)
    assert path == cache / "mnist" / file.name
    assert data.cache_folder() == cache
    assert fetch.read_idx(path).tolist() == [0, 1, 2, 3, 4]
    file.unlink()
    path.chmod(0o444)
    path.parent.chmod(0o555)
    assert fetch.fetch("mnist", file.name) == path
    path.parent.chmod(0o755)


def test_a_corrupt_download_is_refused_and_not_kept(served):
    file, cache = served
    file.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"corrupt .* not kept: try again"):
        fetch.fetch("mnist", file.name)
    assert not cache.exists()
    cache.mkdir()  # the user's own folder stays
    with pytest.raises(ValueError, match="corrupt"):
        fetch.fetch("mnist", file.name)
    assert list(cache.iterdir()) == []


def test_a_corrupt_file_in_the_cache_is_refused(served):
    file, cache = served
    (cache / "mnist").mkdir(parents=True)
    (cache / "mnist" / file.name).write_bytes(b"truncated")
    with pytest.raises(ValueError, match="delete it and try again"):
        fetch.fetch("mnist", file.name)


def test_no_file_and_no_network_says_where_to_put_it(served, monkeypatch):
    file, cache = served
    file.unlink()
    with pytest.raises(ConnectionError, match="PPVAE_DATA") as caught:
        fetch.fetch("mnist", file.name)
    assert str(cache / "mnist" / file.name) in str(caught.value)
    monkeypatch.setitem(fetch.URLS, "mnist", "http://127.0.0.1:1/")  # nothing listens there
    with pytest.raises(ConnectionError, match="Put the file there yourself"):
        data.load("mnist")
    assert not cache.exists()


def test_bad_idx_files(tmp_path):
    path = tmp_path / "bad.gz"
    good = gzip.decompress(idx(np.ones((2, 3), dtype=np.uint8)))
    for raw, match in [(b"", "not an IDX"), (b"\x00\x00\x0d\x02", "not an IDX"),
                       (good[:8], "not an IDX"), (good[:-1], "truncated")]:  # fmt: skip
        path.write_bytes(gzip.compress(raw))
        with pytest.raises(ValueError, match=match):
            fetch.read_idx(path)


def test_freyfaces_absent_or_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PPVAE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"(?s)PPVAE_DATA.*frey_rawface\.mat"):
        data.load("freyfaces")
    (tmp_path / "freyfaces").mkdir()
    np.savez(tmp_path / "freyfaces" / "freyfaces.npz", faces=np.ones((1965, 28, 20), np.uint8))
    with pytest.raises(ValueError, match="does not hold the Frey faces"):
        data.load("freyfaces")


def cached(*files):
    return pytest.mark.skipif(
        not all((data.cache_folder() / file).is_file() for file in files),
        reason=f"{files[0]} is not in the cache folder",
    )


@cached("freyfaces/freyfaces.npz")
def test_freyfaces():
    faces = data.load("freyfaces")
    assert [len(split) for split in parts(faces)] == [1565, 200, 200]
    assert faces.shape == (1, 28, 20)
    assert faces.train.x.shape == (1565, 560)
    assert faces.support == "unit_interval"
    assert faces.train.x.max() == torch.tensor(238 / 255)


@cached(*(file for file in fetch.MD5 if file.startswith("mnist/")))
def test_mnist():
    mnist = data.load("mnist", num_valid=5000)
    assert [len(split) for split in parts(mnist)] == [55_000, 5000, 10_000]
    assert mnist.shape == (1, 28, 28)
    assert mnist.test.x.shape == (10_000, 784)
    assert mnist.train.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.test.y[:3].tolist() == [7, 2, 1]
    assert abs(float(mnist.train.values.mean()) - 0.1307) < 0.001


@cached(*(file for file in fetch.MD5 if file.startswith("fashion_mnist/")))
def test_fashion_mnist():
    fashion = data.load("fashion_mnist", binarize=None, flatten=False)
    assert [len(split) for split in parts(fashion)] == [50_000, 10_000, 10_000]
    assert fashion.train.x.shape == (50_000, 1, 28, 28)
