"""Models: one file per family, each a Pyro program that reads on one screen."""

from ppvae.models.cvae import CVAE
from ppvae.models.vae import VAE

__all__ = ["CVAE", "VAE"]
