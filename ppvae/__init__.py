"""ppvae: variational autoencoders as probabilistic programs.

Every VAE is a Pyro ``model``/``guide`` pair; every bound and every diagnostic is a function of
their log-weights.
"""

from ppvae import (
    conditionals,
    data,
    diagnostics,
    elbo,
    guides,
    metrics,
    models,
    nets,
    plots,
    posteriors,
    program,
)
from ppvae.auxiliary import Auxiliary, Ratio
from ppvae.check.nonfinite import NonFiniteError
from ppvae.check.pair import check_pair
from ppvae.check.programs import PairError
from ppvae.diagnostics import diagnose, impute
from ppvae.diagnostics.compare_estimators import compare
from ppvae.pairs import NotCompiled
from ppvae.program import Program
from ppvae.train.alternate import alternate
from ppvae.train.beside import Beside
from ppvae.train.callbacks import Callback
from ppvae.train.checkpoint import CheckpointError, Checkpoints
from ppvae.train.ex_post import fit_prior
from ppvae.train.fit import fit
from ppvae.train.histories import Histories
from ppvae.train.history import History
from ppvae.train.many import fit_many
from ppvae.train.svi import SVI
from ppvae.verbs import encode, generate, load, log_prob, reconstruct, save
from ppvae.weights import LogWeights, log_weights

__version__ = "0.1.0"
__all__ = [
    "SVI",
    "Auxiliary",
    "Beside",
    "Callback",
    "CheckpointError",
    "Checkpoints",
    "Histories",
    "History",
    "LogWeights",
    "NonFiniteError",
    "NotCompiled",
    "PairError",
    "Program",
    "Ratio",
    "alternate",
    "check_pair",
    "compare",
    "conditionals",
    "data",
    "diagnose",
    "diagnostics",
    "elbo",
    "encode",
    "fit",
    "fit_many",
    "fit_prior",
    "generate",
    "guides",
    "impute",
    "load",
    "log_prob",
    "log_weights",
    "metrics",
    "models",
    "nets",
    "plots",
    "posteriors",
    "program",
    "reconstruct",
    "save",
]
