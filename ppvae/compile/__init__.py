"""A pair's loss and gradient, or its log-weights, as one compiled graph.

``compiled`` keeps graphs and says what each depends on, ``graph`` traces and compiles one,
``passes`` makes it faster, ``cuda_graph`` captures a whole step. This room knows pairs and
log-weights; it imports no estimator, and nothing of training.
"""

from ppvae.compile.compiled import Compiled, CompiledGradients, CompiledWeights
from ppvae.pairs import NotCompiled

__all__ = ["Compiled", "CompiledGradients", "CompiledWeights", "NotCompiled"]
