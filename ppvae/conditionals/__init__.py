r"""Conditionals: modules whose ``forward`` returns a Pyro distribution.

An encoder ``q(z | x)``, a decoder ``p(x | z)`` and a prior ``p(z)`` are all conditionals, so each
density is written in exactly one place::

    z = pyro.sample("z", self.prior())
    pyro.sample("x", self.likelihood(z), obs=x)

The batch shape is the inputs' leading dimensions, the rest are event dimensions. A learned
conditional prior ``p(z | y)`` is ``Normal(net)`` called with ``y``; the unconditional priors ignore
what they are called with, so they can stand in its place. Parameters below float32 (autocast,
bf16 modules) are cast to float32 before the distribution is formed. Validation follows
``pyro.enable_validation``.

A room of densities: it imports distributions, and nothing that is done with pairs; only
``optimal.py`` knows pairs, since its normaliser runs a guide.
"""

from ppvae.conditionals.codes import CodePrior
from ppvae.conditionals.columns import Columns, heads_for
from ppvae.conditionals.continuous import (
    Affine,
    Beta,
    ContinuousBernoulli,
    Gamma,
    Laplace,
    LogNormal,
    StudentT,
    VonMises,
)
from ppvae.conditionals.counts import (
    BetaBinomial,
    DirichletMultinomial,
    Multinomial,
    NegativeBinomial,
    Poisson,
    ZeroInflated,
)
from ppvae.conditionals.heads import (
    BagOfWords,
    Bernoulli,
    Categorical,
    Conditional,
    Normal,
    Scale,
    SoftNormal,
)
from ppvae.conditionals.levels import DiscretizedLogistic, Ordinal
from ppvae.conditionals.optimal import OptimalPrior
from ppvae.conditionals.priors import Mixture, StandardNormal, VampPrior
from ppvae.conditionals.reshaped import Reshaped
from ppvae.conditionals.simulator import Simulator
from ppvae.conditionals.suggest import suggest
from ppvae.conditionals.values import Elementwise

__all__ = [
    "Affine",
    "BagOfWords",
    "Bernoulli",
    "Beta",
    "BetaBinomial",
    "Categorical",
    "CodePrior",
    "Columns",
    "Conditional",
    "ContinuousBernoulli",
    "DirichletMultinomial",
    "DiscretizedLogistic",
    "Elementwise",
    "Gamma",
    "Laplace",
    "LogNormal",
    "Mixture",
    "Multinomial",
    "NegativeBinomial",
    "Normal",
    "OptimalPrior",
    "Ordinal",
    "Poisson",
    "Reshaped",
    "Scale",
    "Simulator",
    "SoftNormal",
    "StandardNormal",
    "StudentT",
    "VampPrior",
    "VonMises",
    "ZeroInflated",
    "heads_for",
    "suggest",
]
