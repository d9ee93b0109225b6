"""Numbers from the literature that are not bounds: clustering scores, disentanglement, perplexity.

They are functions of tensors or arrays, and know nothing of pairs; a room that imports no other.
"""

from ppvae.metrics.classification import error_rate
from ppvae.metrics.clustering import (
    Clustering,
    UnusedClusterWarning,
    adjusted_rand_index,
    clustering,
    clustering_accuracy,
    mutual_information,
)
from ppvae.metrics.codes import code_perplexity
from ppvae.metrics.disentanglement import (
    DCI,
    FactorData,
    beta_vae_score,
    dci,
    explicitness,
    factor_information,
    factor_vae_score,
    mig,
    modularity,
    sap,
)
from ppvae.metrics.perplexity import Perplexity, perplexity

__all__ = [
    "DCI",
    "Clustering",
    "FactorData",
    "Perplexity",
    "UnusedClusterWarning",
    "adjusted_rand_index",
    "beta_vae_score",
    "clustering",
    "clustering_accuracy",
    "code_perplexity",
    "dci",
    "error_rate",
    "explicitness",
    "factor_information",
    "factor_vae_score",
    "mig",
    "modularity",
    "mutual_information",
    "perplexity",
    "sap",
]
