"""How well single codes stand for single factors of variation: seven scores of the literature.

Codes are means of q(z | x), factors whole numbers. Where a score is learned, the first
``num_train`` rows teach and the others test, so rows must come in random order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ppvae.metrics.arrays import host


class DCI(NamedTuple):
    """Scores of :func:`dci`, each in [0, 1], larger is better.

    Attributes:
        disentanglement: whether a code is important for one factor only.
        completeness: whether a factor has one important code only.
        informativeness: test accuracy of factors predicted from all codes, mean over factors.
    """

    disentanglement: float
    completeness: float
    informativeness: float


class FactorData(Protocol):
    """Images of every combination of factors, as :class:`ppvae.data.Factors` has them."""

    @property
    def sizes(self) -> Sequence[int]:
        """How many values each factor has."""

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Independent uniform factors, ``(num, F)``."""

    def index(self, factors: Tensor) -> Tensor:
        """Rows of the images that have these factors, ``(...,)`` of ``(..., F)``."""

    def __getitem__(self, rows: Tensor) -> Tensor:
        """Images, ``(n, C, H, W)``."""


Represent = Callable[[Tensor], Any]


# ------------------------------------------------------------------------------ mutual information


def mig(codes: Any, factors: Any, bins: int = 20) -> float:
    r"""The mutual information gap: the best code of a factor against the second best.

    .. math:: \frac1F \sum_k \frac{I(c_{(1)}; v_k) - I(c_{(2)}; v_k)}{H(v_k)}

    Information is that of a histogram: ``bins`` of equal width between a code's smallest and
    largest value. 1 for codes that are the factors, 0 where codes are constant or two share a
    factor. The papers take 10,000 rows: with few, empty bins add information that is not there.

    Args:
        codes: ``(N, D)`` real numbers, D >= 2.
        factors: ``(N, F)`` whole numbers, each factor with two values or more.
        bins: >= 2, of each code.

    Raises:
        ValueError: shapes that do not fit, NaN, a factor of one value, one code alone.

    Source: Chen, Li, Grosse & Duvenaud, Isolating Sources of Disentanglement, 2018, with the
        estimator of Locatello et al., Challenging Common Assumptions, 2019.

    Example:
        >>> v = np.stack(np.meshgrid(range(3), range(4)), -1).reshape(-1, 2)
        >>> round(mig(v, v), 6), mig(v[:, [0, 0]], v)
        (1.0, 0.0)
    """
    codes, factors = _arrays(codes, factors, least_codes=2)
    information = np.sort(_information(codes, factors, bins), 0)
    entropies = [_entropy(np.unique(v, return_counts=True)[1]) for v in factors.T]
    return float(np.mean((information[-1] - information[-2]) / entropies))


def modularity(codes: Any, factors: Any, bins: int = 20) -> float:
    r"""Whether a code has information on one factor only: 1 minus what it tells of the others.

    .. math:: \frac1D \sum_i \left(1 - \frac{\sum_k I_{ik}^2 - \max_k I_{ik}^2}
              {(F - 1) \max_k I_{ik}^2}\right)

    A code without any information counts 0. Information is estimated as in :func:`mig`.

    Args:
        codes: ``(N, D)`` real numbers.
        factors: ``(N, F)`` whole numbers, F >= 2, each with two values or more.
        bins: >= 2, of each code.

    Raises:
        ValueError: as :func:`mig`; a single factor.

    Source: Ridgeway & Mozer, Learning Deep Disentangled Embeddings, 2018, section 3.

    Example:
        >>> v = np.stack(np.meshgrid(range(3), range(4)), -1).reshape(-1, 2)
        >>> modularity(v, v), modularity(0 * v, v)
        (1.0, 0.0)
    """
    codes, factors = _arrays(codes, factors, least_factors=2)
    squares = _information(codes, factors, bins) ** 2
    best = squares.max(1)
    informative = best > 1e-12**2  # nats; below it is rounding
    others = (squares.sum(1) - best) / (factors.shape[1] - 1)
    return float(np.where(informative, 1 - others / np.where(informative, best, 1), 0).mean())


def factor_information(codes: Any, factors: Any, bins: int = 20) -> np.ndarray:
    """The mutual information of each code with each factor, in nats: what :func:`mig` compares.

    Estimated as there, from codes cut into bins of equal width.

    Args:
        codes: ``(N, D)`` real numbers.
        factors: ``(N, F)`` whole numbers, each with two values or more.
        bins: >= 2, of each code.

    Returns:
        ``(D, F)``; at most the entropy of the factor, log 3 for three values of equal frequency.

    Raises:
        ValueError: as :func:`mig`.

    Example:
        >>> v = np.stack(np.meshgrid(range(3), range(4)), -1).reshape(-1, 2)
        >>> factor_information(v, v).round(3)  # log 3, log 4
        array([[1.099, 0.   ],
               [0.   , 1.386]])
    """
    return _information(*_arrays(codes, factors), bins)


def _information(codes: np.ndarray, factors: np.ndarray, bins: int) -> np.ndarray:
    from sklearn.metrics import mutual_info_score

    if bins < 2:
        raise ValueError(f"bins={bins}: a code cut into one bin tells nothing, take 2 or more")
    cut = [np.digitize(c, np.histogram_bin_edges(c, bins)[:-1]) for c in codes.T]
    return np.array([[mutual_info_score(v, c) for v in factors.T] for c in cut])


def _entropy(counts: np.ndarray) -> float:
    shares = counts / counts.sum()
    return float(-(shares * np.log(shares)).sum())


# ------------------------------------------------------------------------------ prediction


def sap(
    codes: Any, factors: Any, num_train: int | None = None, squared_correlation: bool = False
) -> float:
    r"""Separated attribute predictability: a factor's best code against its second best.

    .. math:: \frac1F \sum_k \left(S_{(1)k} - S_{(2)k}\right)

    :math:`S_{ik}` is the test accuracy of a linear support vector machine that predicts factor k
    from code i alone (C = 0.01, classes weighed evenly), or the squared correlation of the two.
    Codes that are the factors reach 1 minus chance for factors of two values, and less for more,
    since a line cannot part three intervals; by squared correlation they reach 1.

    Args:
        codes: ``(N, D)`` real numbers, D >= 2.
        factors: ``(N, F)`` whole numbers, each with two values or more.
        num_train: so many rows teach; two thirds of them by default. Of squared correlations, too.
        squared_correlation: for factors whose values have an order and distances.

    Raises:
        ValueError: shapes that do not fit, NaN, one code alone, a factor with a value that is
            missing among the rows that teach.

    Source: Kumar, Sattigeri & Balakrishnan, Variational Inference of Disentangled Latent Concepts
        from Unlabeled Observations, 2018, section 3.

    Example:
        >>> v = np.stack(np.meshgrid(range(3), range(4)), -1).reshape(-1, 2)
        >>> round(sap(v, v, num_train=len(v), squared_correlation=True), 6)
        1.0
    """
    codes, factors = _arrays(codes, factors, least_codes=2)
    if squared_correlation:
        taught = _split(codes, factors, num_train, least_test=0)[0]
        scores = _squared_correlations(*taught)
    else:
        scores = _accuracies(*_split(codes, factors, num_train))
    scores = np.sort(scores, 0)
    return float(np.mean(scores[-1] - scores[-2]))


def _squared_correlations(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    codes, factors = codes - codes.mean(0), factors - factors.mean(0)
    variances = np.outer(codes.var(0), factors.var(0))
    some = np.repeat(codes.var(0)[:, None] > 1e-12, factors.shape[1], 1)
    covariances = codes.T @ factors / len(codes)
    return np.where(some, covariances**2 / np.where(some, variances, 1), 0)


def _accuracies(taught: _Rows, tested: _Rows) -> np.ndarray:
    from sklearn.svm import LinearSVC

    def accuracy(code: int, factor: int) -> float:
        machine = LinearSVC(C=0.01, class_weight="balanced", dual="auto", random_state=0)
        machine.fit(taught[0][:, [code]], taught[1][:, factor])
        return float(machine.score(tested[0][:, [code]], tested[1][:, factor]))

    shape = taught[0].shape[1], taught[1].shape[1]
    return np.array([accuracy(*at) for at in np.ndindex(shape)]).reshape(shape)


def explicitness(codes: Any, factors: Any, num_train: int | None = None) -> float:
    """Whether factors can be read off all codes by logistic regression.

    The area under the ROC curve of each value of a factor against its other values, on test rows;
    the mean over values, then over factors. 0.5 is chance, which constant codes have, 1 the best.

    Args:
        codes: ``(N, D)`` real numbers; each is brought to mean 0 and variance 1.
        factors: ``(N, F)`` whole numbers, each with two values or more.
        num_train: so many rows teach; two thirds of them by default.

    Raises:
        ValueError: shapes that do not fit, NaN, a factor with a value that is missing among the
            rows that teach or among those that test.

    Source: Ridgeway & Mozer, Learning Deep Disentangled Embeddings, 2018, section 3.

    Example:
        >>> v = np.random.default_rng(0).integers(2, size=(300, 2))
        >>> explicitness(v, v), explicitness(0 * v, v)
        (1.0, 0.5)
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    codes, factors = _arrays(codes, factors)
    (codes, factors), (test_codes, test_factors) = _split(
        codes, factors, num_train, all_tested=True
    )
    mean, scale = codes.mean(0), codes.std(0)
    scale = np.where(scale > 0, scale, 1)
    scores = []
    for own, other in zip(factors.T, test_factors.T, strict=True):
        model = LogisticRegression(max_iter=10_000).fit((codes - mean) / scale, own)
        shares = model.predict_proba((test_codes - mean) / scale)
        areas = [
            roc_auc_score(other == v, p) for v, p in zip(model.classes_, shares.T, strict=True)
        ]
        scores.append(np.mean(areas))
    return float(np.mean(scores))


def dci(
    codes: Any, factors: Any, num_train: int | None = None, num_trees: int = 100, seed: int = 0
) -> DCI:
    r"""Disentanglement, completeness and informativeness, by boosted trees.

    .. math:: D = \sum_i \rho_i \left(1 - H_F(R_{i\cdot})\right), \qquad
              C = \sum_k \rho_k \left(1 - H_D(R_{\cdot k})\right)

    :math:`R_{ik}` is the importance of code i for predicting factor k, H the entropy of what it is
    as shares, to the base of their number, and :math:`\rho` the share of all importance. Trees
    choose among equal splits by the order of the codes: that moves scores in the third digit.

    Args:
        codes: ``(N, D)`` real numbers, D >= 2. The papers take 10,000 rows to teach and 5,000 to
            test: minutes.
        factors: ``(N, F)`` whole numbers, F >= 2, each with two values or more.
        num_train: so many rows teach; two thirds of them by default.
        num_trees: boosting rounds for each factor and value.
        seed: of the trees.

    Raises:
        ValueError: shapes that do not fit, NaN, one code or factor alone, a factor with a value
            that is missing among the rows that teach.

    Source: Eastwood & Williams, A Framework for the Quantitative Evaluation of Disentangled
        Representations, 2018; with trees as in Locatello et al., 2019.

    Example:
        >>> v = np.random.default_rng(0).integers(2, size=(300, 2))
        >>> [round(score, 4) for score in dci(v, v, num_trees=10)]
        [1.0, 1.0, 1.0]
    """
    from sklearn.ensemble import GradientBoostingClassifier

    codes, factors = _arrays(codes, factors, least_codes=2, least_factors=2)
    (codes, factors), (test_codes, test_factors) = _split(codes, factors, num_train)
    trees = [
        GradientBoostingClassifier(n_estimators=num_trees, random_state=seed).fit(codes, v)
        for v in factors.T
    ]
    accuracies = [tree.score(test_codes, v) for tree, v in zip(trees, test_factors.T, strict=True)]
    importance = np.abs(np.stack([tree.feature_importances_ for tree in trees], 1))
    return DCI(_concentration(importance), _concentration(importance.T), float(np.mean(accuracies)))


def _concentration(importance: np.ndarray) -> float:
    """1 minus the entropy of each row, to the base of its length, weighed by the row's share."""
    total = importance.sum()
    if total == 0:
        return 0.0
    shares = importance + 1e-11
    shares = shares / shares.sum(1, keepdims=True)
    entropies = -(shares * np.log(shares)).sum(1) / np.log(importance.shape[1])
    return float(((1 - entropies) * importance.sum(1)).sum() / total)


# ------------------------------------------------------------------------------ interventions


def factor_vae_score(
    represent: Represent,
    factors_data: FactorData,
    *,
    num_train: int = 10_000,
    num_test: int = 5_000,
    batch_size: int = 64,
    num_variance: int = 10_000,
    seed: int = 0,
) -> float:
    """FactorVAE's score: whether the code that varies least tells which factor was held.

    Of ``batch_size`` images that share one factor, the code of least variance, relative to that
    over all images, votes for it; the score is the accuracy of the majority's classifier on other
    votes. Codes of a standard deviation below 0.05 have no vote; without any the score is 0.
    Chance is 1 / F. No image is encoded twice.

    Args:
        represent: images ``(n, C, H, W)`` to codes ``(n, D)``: the mean of q(z | x), by networks
            in evaluation mode; for example ``lambda x: guide.conditional(x.flatten(1)).mean``.
        factors_data: :class:`ppvae.data.Factors`, or what has its methods.
        num_train: votes that teach the classifier.
        num_test: votes that it is tested on.
        batch_size: images for each vote, >= 2.
        num_variance: images for the variance over all.
        seed: of the images.

    Raises:
        ValueError: a number that is too small; codes that are no finite ``(n, D)``, or differ
            between two calls with the same images; fewer than two factors that vary.

    Source: Kim & Mnih, Disentangling by Factorising, 2018, section 4.

    Example:
        >>> from ppvae import data
        >>> sprites = data.sprites(16, sizes=(3, 2, 2, 3, 3))
        >>> factor_vae_score(lambda x: x.flatten(1)[:, :5], sprites, num_train=20, num_test=10)
        0.0
    """
    _at_least(2, batch_size=batch_size, num_variance=num_variance)
    _at_least(1, num_train=num_train, num_test=num_test)
    generator, count = torch.Generator().manual_seed(seed), num_train + num_test
    held = _held_factors(factors_data, count, generator)
    some = factors_data.sample(num_variance, generator)
    factors = factors_data.sample(count * batch_size, generator)
    factors = factors.reshape(count, batch_size, -1).clone()
    at = torch.arange(count)
    factors[at, :, held] = factors[at, 0, held][:, None]
    everywhere, alike = _encode(represent, factors_data, [some, factors])
    variances = everywhere.var(0, ddof=1)
    active = np.sqrt(variances) >= 0.05
    if not active.any():
        return 0.0
    least = (alike.var(1, ddof=1)[:, active] / variances[active]).argmin(1)
    votes = np.zeros((len(factors_data.sizes), active.sum()), np.int64)
    np.add.at(votes, (held[:num_train].numpy(), least[:num_train]), 1)
    return float(np.mean(votes.argmax(0)[least[num_train:]] == held[num_train:].numpy()))


def beta_vae_score(
    represent: Represent,
    factors_data: FactorData,
    *,
    num_train: int = 10_000,
    num_test: int = 5_000,
    batch_size: int = 64,
    seed: int = 0,
) -> float:
    r"""The beta-VAE's score: which factor pairs of images share, by how far their codes lie apart.

    A logistic regression predicts the factor from
    :math:`\frac1B \sum_b \lvert z_b - z_b' \rvert` over B = ``batch_size`` pairs that share it; the
    score is its test accuracy. Chance, 1 / F, is what constant codes have. It is the most lenient
    of the scores: rotated factors reach 1 if B is large.

    Args:
        represent, factors_data, num_train, num_test, seed: as :func:`factor_vae_score` has them,
            one vote being a row of this regression.
        batch_size: pairs for each row, >= 1.

    Raises:
        ValueError: as :func:`factor_vae_score`.

    Source: Higgins et al., beta-VAE, 2017, section 3.

    Example:
        >>> from ppvae import data
        >>> sprites = data.sprites(16, sizes=(3, 2, 2, 3, 3))
        >>> constant = lambda x: x.flatten(1)[:, :5]
        >>> beta_vae_score(constant, sprites, num_train=100, num_test=50) < 0.4
        True
    """
    from sklearn.linear_model import LogisticRegression

    _at_least(1, batch_size=batch_size, num_train=num_train, num_test=num_test)
    generator, count = torch.Generator().manual_seed(seed), num_train + num_test
    held = _held_factors(factors_data, count, generator)
    pairs = [
        factors_data.sample(count * batch_size, generator).reshape(count, batch_size, -1).clone()
        for _ in range(2)
    ]
    at = torch.arange(count)
    pairs[1][at, :, held] = pairs[0][at, :, held]
    one, other = _encode(represent, factors_data, pairs)
    distances, labels = np.abs(one - other).mean(1), held.numpy()
    model = LogisticRegression(max_iter=10_000, random_state=seed)
    model.fit(distances[:num_train], labels[:num_train])
    return float(model.score(distances[num_train:], labels[num_train:]))


def _held_factors(data: FactorData, count: int, generator: torch.Generator) -> Tensor:
    """For each vote the factor that its images share, one of those that vary at all."""
    if not hasattr(data, "sizes") or not hasattr(data, "sample"):
        raise TypeError(
            f"this score draws images that share a factor: give a data.Factors, as data.sprites() "
            f"makes it, got {type(data).__name__}"
        )
    varying = torch.tensor([k for k, size in enumerate(data.sizes) if size > 1])
    if len(varying) < 2:
        raise ValueError(f"factors of sizes {tuple(data.sizes)}: two of them must vary")
    held = varying[torch.randint(len(varying), (count,), generator=generator)]
    if len(held.unique()) < 2:
        raise ValueError(f"{count} votes are of one factor only: take more (num_train, num_test)")
    return held


def _encode(
    represent: Represent, data: FactorData, factors: Sequence[Tensor], at_once: int = 512
) -> list[np.ndarray]:
    """Codes of the images that have given factors, ``(..., D)``; each image encoded once."""
    rows = [data.index(part) for part in factors]
    needed, places = torch.cat([part.flatten() for part in rows]).unique(return_inverse=True)

    def codes_of(part: Tensor) -> np.ndarray:
        with torch.no_grad():
            found = host(represent(data[part]), np.float64)
        if found.ndim != 2 or len(found) != len(part) or not np.isfinite(found).all():
            seen = f"represent gives shape {found.shape} for {len(part)} images, or NaN"
            raise ValueError(f"{seen}: give finite codes, (n, D), the mean of q(z | x)")
        return found

    first, *others = needed.split(at_once)
    codes = [codes_of(first)]
    if not np.array_equal(codes[0], codes_of(first)):
        cure = "give the mean of q(z | x), by networks in evaluation mode"
        raise ValueError(f"represent gives the same images other codes at each call: {cure}")
    codes += [codes_of(part) for part in others]
    ends = np.cumsum([part.numel() for part in rows])[:-1]
    found = np.split(np.concatenate(codes)[places.numpy()], ends)
    return [c.reshape(*part.shape, -1) for c, part in zip(found, rows, strict=True)]


# ------------------------------------------------------------------------------ checks


_Rows = tuple[np.ndarray, np.ndarray]


def _arrays(codes: Any, factors: Any, least_codes: int = 1, least_factors: int = 1) -> _Rows:
    """Both as ``(N, D)`` and ``(N, F)``, checked."""
    codes, factors = host(codes, np.float64), host(factors, np.float64)
    if codes.ndim != 2 or factors.ndim != 2 or len(codes) != len(factors) or len(codes) < 2:
        seen = f"codes has shape {codes.shape} and factors {factors.shape}"
        raise ValueError(f"{seen}: give (N, D) and (N, F), a datapoint in each row, N >= 2")
    for name, array, least in (("codes", codes, least_codes), ("factors", factors, least_factors)):
        if array.shape[1] < least:
            raise ValueError(f"{name} has {array.shape[1]} columns, and this score needs {least}")
        if not np.isfinite(array).all():
            row = (~np.isfinite(array)).any(1).argmax()
            raise ValueError(f"{name} has NaN or infinite values, the first in row {row}")
    if (factors != np.round(factors)).any():
        raise ValueError(f"factors must be whole numbers: number the values of {factors[0]}")
    for k, values in enumerate(factors.T):
        if (values == values[0]).all():
            cure = "leave it out, nothing can be learned of it"
            raise ValueError(f"factor {k} has the value {values[0]:g} in every row: {cure}")
    return codes, factors.astype(np.int64)


def _split(
    codes: np.ndarray,
    factors: np.ndarray,
    num_train: int | None,
    least_test: int = 1,
    all_tested: bool = False,
) -> tuple[_Rows, _Rows]:
    """The rows that teach and those that test; every value is among those that teach."""
    rows = len(codes)
    num = 2 * rows // 3 if num_train is None else num_train
    if not 1 <= num <= rows - least_test:
        raise ValueError(f"num_train={num} of {rows} rows: leave {least_test} or more for the test")
    parts = [("teach", factors[:num])] + [("test", factors[num:])] * all_tested
    for k, values in enumerate(factors.T):
        for what, part in parts:
            if missing := sorted(set(values.tolist()) - set(part[:, k].tolist())):
                seen = f"factor {k} has the values {missing[:3]} in none of the rows that {what}"
                raise ValueError(f"{seen}: shuffle the rows, or give more of them")
    return (codes[:num], factors[:num]), (codes[num:], factors[num:])


def _at_least(least: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name}={number}: give {least} or more")
