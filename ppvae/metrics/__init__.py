"""Numbers from the literature that are not bounds: clustering scores, perplexity of documents.

They are functions of tensors or arrays, and know nothing of pairs; a room that imports no other.
"""

from ppvae.metrics.clustering import (
    Clustering,
    UnusedClusterWarning,
    adjusted_rand_index,
    clustering,
    clustering_accuracy,
    mutual_information,
)
from ppvae.metrics.perplexity import Perplexity, perplexity

__all__ = [
    "Clustering",
    "Perplexity",
    "UnusedClusterWarning",
    "adjusted_rand_index",
    "clustering",
    "clustering_accuracy",
    "mutual_information",
    "perplexity",
]
