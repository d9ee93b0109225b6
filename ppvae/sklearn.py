"""A VAE as a transformer of scikit-learn, for its pipelines, searches and clones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from ppvae.conditionals import Affine, Normal, Scale
from ppvae.data.table import Column, Table
from ppvae.guides import Normal as NormalGuide
from ppvae.models import VAE
from ppvae.nets import Columns, mlp
from ppvae.train.fit import fit
from ppvae.train.svi import SVI
from ppvae.verbs import encode, generate, log_prob, reconstruct

Pair = tuple[Callable[..., Any], Callable[..., Any]]


class VAETransformer(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    r"""Codes of a VAE in place of features, with the interface of ``PCA``.

    The pair is that of ``make``; by default a normal likelihood with one learned scale for each
    feature, in the features' own units, and a diagonal normal guide, of one hidden layer each.

    Args:
        latent_dim: number of codes, 1 or more.
        make: a function of ``X`` ``(N, D)`` float32 and of ``latent_dim`` that gives a model and a
            guide of one latent ``"z"``; None: the default pair.
        epochs: passes over the data.
        batch_size: rows of a step.
        learning_rate: of Adam.
        num_particles: K of :meth:`score_samples`.
        random_state: of the initial parameters, the training, and all draws; torch's own stream is
            left as it was.

    Attributes:
        model_, guide_: the trained pair, for everything else in ppvae.
        history_: :class:`ppvae.History` of the training.

    Example:
        >>> from sklearn.datasets import load_iris
        >>> from sklearn.pipeline import make_pipeline
        >>> from sklearn.linear_model import LogisticRegression
        >>> from ppvae.sklearn import VAETransformer
        >>> X, y = load_iris(return_X_y=True)
        >>> steps = VAETransformer(2, epochs=20, random_state=0), LogisticRegression()
        >>> make_pipeline(*steps).fit(X, y).score(X, y) > 0.8
        True
    """

    def __init__(
        self,
        latent_dim: int = 2,
        *,
        make: Callable[..., Pair] | None = None,
        epochs: int = 50,
        batch_size: int = 64,
        learning_rate: float = 1e-2,
        num_particles: int = 100,
        random_state: Any = None,
    ) -> None:
        self.latent_dim = latent_dim
        self.make = make
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.num_particles = num_particles
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> VAETransformer:
        """Train a pair on ``X``, ``(N, D)``, N >= 2; ``y`` is not looked at."""
        rows = torch.from_numpy(self._rows(X, reset=True))
        seed = int(check_random_state(self.random_state).randint(2**31))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model_, self.guide_ = (self.make or _pair)(rows, self.latent_dim)
            svi = SVI(self.model_, self.guide_, self._adam)
            self.history_ = fit(
                svi,
                rows,
                epochs=self.epochs,
                batch_size=self.batch_size,
                seed=seed,
                progress=False,
            )
        self.seed_ = seed
        self._n_features_out = encode(self.guide_, rows[:1]).shape[1]
        return self

    def transform(self, X: Any) -> np.ndarray:
        """The means of q(z | x), ``(N, latent_dim)``."""
        check_is_fitted(self)
        codes: np.ndarray = encode(self.guide_, self._rows(X))
        return codes

    def inverse_transform(self, X: Any) -> np.ndarray:
        """The means of p(x | z) at codes ``X``, ``(N, latent_dim)``: ``(N, D)``."""
        check_is_fitted(self)
        codes = torch.as_tensor(np.asarray(X), dtype=torch.float32)
        with torch.no_grad():
            mean: torch.Tensor = self.model_.likelihood(codes).mean  # type: ignore[attr-defined]
        return mean.numpy()

    def reconstruct(self, X: Any) -> np.ndarray:
        """Rows after the bottleneck, ``(N, D)``."""
        check_is_fitted(self)
        found: np.ndarray = reconstruct(self.model_, self.guide_, self._rows(X))
        return found

    def score_samples(self, X: Any) -> np.ndarray:
        """log p(x) of each row by importance sampling, ``(N,)``, nats in the units of ``X``."""
        check_is_fitted(self)
        nats: np.ndarray = log_prob(
            self.model_,
            self.guide_,
            self._rows(X),
            num_particles=self.num_particles,
            seed=self.seed_,
        )
        return nats

    def score(self, X: Any, y: Any = None) -> float:
        """The mean log p(x), nats per row: larger is better."""
        return float(np.mean(self.score_samples(X)))

    def sample(self, n_samples: int = 1) -> np.ndarray:
        """New rows, ``(n_samples, D)``; the same at each call."""
        check_is_fitted(self)
        rows: torch.Tensor = generate(self.model_, n_samples, seed=self.seed_)
        return rows.numpy()

    def _rows(self, X: Any, reset: bool = False) -> np.ndarray:
        least = 2 if reset else 1
        rows: np.ndarray = validate_data(
            self, X, reset=reset, dtype=np.float32, ensure_min_samples=least
        )
        return np.ascontiguousarray(rows)

    def _adam(self, parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.learning_rate)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.non_deterministic = True  # scores are Monte Carlo estimates
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def _pair(rows: torch.Tensor, latent_dim: int) -> Pair:
    """A model and a guide of numbers in their own units; a constant column has the scale 1."""
    width = rows.shape[1]
    loc, scale = rows.mean(0), rows.std(0)
    scale = torch.where((scale > 0) & scale.isfinite(), scale, 1.0)
    head = Normal(mlp(latent_dim, 32, width), scale=Scale(1.0, width))
    units = zip(loc.tolist(), scale.tolist(), strict=True)
    table = Table(tuple(Column(i, "number", "float32", (), *unit) for i, unit in enumerate(units)))
    encoder = torch.nn.Sequential(Columns(table), mlp(width, 32, 2 * latent_dim))
    return VAE(Affine(head, loc, scale), latent_dim), NormalGuide(encoder)
