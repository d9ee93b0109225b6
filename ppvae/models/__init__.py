"""Models: one file per family, each a Pyro program that reads on one screen."""

from ppvae.models.autoencoder import Autoencoder
from ppvae.models.cvae import CVAE
from ppvae.models.hierarchical import Hierarchical
from ppvae.models.m2 import M2, NoLabelWarning
from ppvae.models.masked import Masked, MissingNotAtRandom
from ppvae.models.mixture import GaussianMixture
from ppvae.models.nvdm import NVDM
from ppvae.models.quantized import CodeHierarchy
from ppvae.models.top_down import TopDown
from ppvae.models.vade import VaDE
from ppvae.models.vae import VAE

__all__ = [
    "CVAE",
    "M2",
    "NVDM",
    "VAE",
    "Autoencoder",
    "CodeHierarchy",
    "GaussianMixture",
    "Hierarchical",
    "Masked",
    "MissingNotAtRandom",
    "NoLabelWarning",
    "TopDown",
    "VaDE",
]
