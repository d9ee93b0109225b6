"""Posteriors: conditionals q(z | x) beyond the diagonal normal, for ``guides.Amortized``.

Each is a head on a network, as those of :mod:`ppvae.conditionals` are, so it can stand wherever a
conditional can: as a learned prior p(z | y), or in a VampPrior; but for :class:`SemiImplicit`,
which weighs its own draws only.
"""

from ppvae.posteriors.flows import Flow, coupling, iaf, spline
from ppvae.posteriors.implicit import Implicit
from ppvae.posteriors.mixture import Mixture, MixtureOfNormals
from ppvae.posteriors.normals import FullNormal, LowRankNormal
from ppvae.posteriors.semi_implicit import SemiImplicit

__all__ = [
    "Flow",
    "FullNormal",
    "Implicit",
    "LowRankNormal",
    "Mixture",
    "MixtureOfNormals",
    "SemiImplicit",
    "coupling",
    "iaf",
    "spline",
]
