"""What a trained pair is used for: codes, reconstructions, new rows, log p(x), a file of it.

``rows`` has the verbs and ``sites`` what they ask of a pair's sites; ``saved`` writes a pair into a
folder and reads it back, as what ``described`` makes of modules. A room at the end: it may ask for
everything that is known of a pair, and only ``ppvae.sklearn`` asks for it.
"""

from ppvae.verbs.rows import encode, generate, log_prob, reconstruct
from ppvae.verbs.saved import Saved, load, save

__all__ = ["Saved", "encode", "generate", "load", "log_prob", "reconstruct", "save"]
