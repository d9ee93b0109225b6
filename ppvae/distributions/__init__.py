r"""Distributions whose log-densities cost less per particle, or are exact where Pyro's are not.

A vector of values is ``.to_event(n)`` of the single ones. Parameters that must be positive are
given by their logarithms. :func:`masked` hides single values of any of them.
"""

from ppvae.distributions.columns import Columns
from ppvae.distributions.continuous import (
    Affine,
    Beta,
    ContinuousBernoulli,
    Gamma,
    Laplace,
    LogNormal,
    StudentT,
    VonMises,
)
from ppvae.distributions.counts import (
    BetaBinomial,
    DirichletMultinomial,
    Multinomial,
    NegativeBinomial,
    Poisson,
    ZeroInflated,
)
from ppvae.distributions.labels import partly_known
from ppvae.distributions.levels import DiscretizedLogistic, Ordinal
from ppvae.distributions.reshaped import Reshaped
from ppvae.distributions.supports import masked
from ppvae.distributions.values import Law
from ppvae.distributions.vectors import (
    BinaryVector,
    DiagonalNormal,
    NoInverse,
    UnitNormal,
    WordCounts,
)
from ppvae.distributions.vectors import ForAnyDtype as ForAnyDtype
from ppvae.distributions.vectors import MultivariateNormal as MultivariateNormal
from ppvae.distributions.vectors import promoted as promoted

__all__ = [
    "Affine",
    "Beta",
    "BetaBinomial",
    "BinaryVector",
    "Columns",
    "ContinuousBernoulli",
    "DiagonalNormal",
    "DirichletMultinomial",
    "DiscretizedLogistic",
    "Gamma",
    "Laplace",
    "Law",
    "LogNormal",
    "Multinomial",
    "NegativeBinomial",
    "NoInverse",
    "Ordinal",
    "Poisson",
    "Reshaped",
    "StudentT",
    "UnitNormal",
    "VonMises",
    "WordCounts",
    "ZeroInflated",
    "masked",
    "partly_known",
]
