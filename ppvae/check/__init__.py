"""What is looked at before work is spent on a pair, and after a step that went wrong.

``pair`` asks all questions, ``sites`` answers those about single sites, ``behaviour`` those that
take running the pair, ``nonfinite`` names the site that made a loss NaN. A room that reads pairs
and log-weights and changes nothing: it imports neither estimators nor training.
"""

from ppvae.check.nonfinite import NonFiniteError, blame
from ppvae.check.pair import PairError, PairReport, check_batch, check_pair

__all__ = ["NonFiniteError", "PairError", "PairReport", "blame", "check_batch", "check_pair"]
