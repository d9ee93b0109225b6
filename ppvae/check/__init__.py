"""What is looked at before work is spent on a pair, and after a step that went wrong.

``pair`` asks all questions, of which the others answer some: ``data`` those about tensors,
``sites`` about single sites, ``apart`` whether rows and particles keep apart, ``behaviour`` what a
pair is fit for; ``report`` writes the answers down. ``structure`` says what a program is made of,
``nonfinite`` names the site that made a loss NaN. A room that reads pairs and log-weights and
changes nothing: it imports neither estimators nor training.
"""

from ppvae.check.nonfinite import NonFiniteError, blame
from ppvae.check.pair import PairReport, check_batch, check_pair, check_values
from ppvae.check.programs import PairError
from ppvae.check.structure import Structure, structure

__all__ = [
    "NonFiniteError",
    "PairError",
    "PairReport",
    "Structure",
    "blame",
    "check_batch",
    "check_pair",
    "check_values",
    "structure",
]
