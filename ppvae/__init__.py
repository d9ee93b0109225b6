"""ppvae: variational autoencoders as probabilistic programs.

Every VAE is a Pyro ``model``/``guide`` pair; every bound and every diagnostic is a function of
their log-weights.
"""

from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, program
from ppvae.check import PairError, check_pair
from ppvae.compare import compare
from ppvae.program import Program
from ppvae.svi import SVI
from ppvae.train import History, fit
from ppvae.weights import LogWeights, log_weights

__version__ = "0.1.0"
__all__ = [
    "SVI",
    "History",
    "LogWeights",
    "PairError",
    "Program",
    "check_pair",
    "compare",
    "conditionals",
    "data",
    "diagnostics",
    "elbo",
    "fit",
    "guides",
    "log_weights",
    "models",
    "nets",
    "program",
]
