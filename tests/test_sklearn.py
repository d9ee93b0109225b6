"""The transformer of scikit-learn: its own checks, and what it says of data."""

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_iris
from sklearn.utils.estimator_checks import check_estimator

from ppvae import conditionals, diagnostics, guides, models, nets
from ppvae.sklearn import VAETransformer

X = load_iris(return_X_y=True)[0]


@pytest.mark.slow
def test_the_checks_of_scikit_learn():
    found = check_estimator(VAETransformer(1, epochs=2, random_state=0), on_fail=None, on_skip=None)
    assert [line for line in found if line["status"] == "failed"] == []
    assert sum(line["status"] == "passed" for line in found) > 35


@pytest.fixture(scope="module")
def fitted():
    return VAETransformer(2, epochs=30, random_state=0).fit(X)


def test_codes_reconstructions_and_scores(fitted):
    codes = fitted.transform(X)
    assert codes.shape == (150, 2)
    assert np.array_equal(fitted.inverse_transform(codes), fitted.reconstruct(X))
    share = ((fitted.reconstruct(X) - X) ** 2).sum() / ((X - X.mean(0)) ** 2).sum()
    assert share < 0.2  # PCA of two components: 0.02
    found = diagnostics.log_evidence(
        fitted.model_, fitted.guide_, X, num_particles=100, seed=fitted.seed_
    )
    assert np.array_equal(fitted.score_samples(X), found.log_evidence.numpy())
    assert fitted.score(X) == pytest.approx(float(found.log_evidence.mean()), rel=1e-5)
    assert fitted.sample(5).shape == (5, 4)
    frame = clone(fitted).set_params(epochs=1).set_output(transform="pandas").fit_transform(X)
    assert list(frame) == ["vaetransformer0", "vaetransformer1"]


def test_scores_are_in_the_units_of_the_features(fitted):
    """Millimetres for centimetres: the same pair, log 10 nats less for each feature."""
    other = clone(fitted).fit(10 * X)
    assert other.score(10 * X) == pytest.approx(fitted.score(X) - 4 * np.log(10), abs=0.01)


def test_the_stream_does_not_move_and_the_state_decides(fitted):
    before = torch.get_rng_state()
    again = clone(fitted).fit(X)
    assert np.array_equal(again.transform(X), fitted.transform(X))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_pair_of_ones_own():
    def make(rows, latent_dim):
        model = models.VAE(conditionals.Poisson(nets.mlp(latent_dim, 8, rows.shape[1])), latent_dim)
        return model, guides.Normal(nets.mlp(rows.shape[1], 8, 2 * latent_dim))

    found = VAETransformer(3, make=make, epochs=1, random_state=0).fit(X.round())
    assert found.transform(X.round()).shape == (150, 3)
    assert (found.sample(4) == found.sample(4).round()).all()
