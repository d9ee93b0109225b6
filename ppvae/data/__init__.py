"""Data sets as ``Dataset`` values: built-in ones by name, users' own, image quadrants.

Example:
    >>> from ppvae import data
    >>> data.load("digits").train.x.shape
    torch.Size([1297, 64])
"""

from ppvae.data.annotated import from_anndata
from ppvae.data.arrays import from_arrays
from ppvae.data.catalogue import NAMES, load
from ppvae.data.dataset import Dataset
from ppvae.data.factors import Factors, dsprites, shapes3d, sprites
from ppvae.data.fetch import cache_folder
from ppvae.data.files import from_csv, from_images, from_npz
from ppvae.data.precision import PrecisionWarning
from ppvae.data.quadrant import quadrants
from ppvae.data.sparse import EmptyDocumentWarning, from_counts
from ppvae.data.split import Split, with_labels
from ppvae.data.stored import Stored
from ppvae.data.synthetic import (
    GaussianMixture,
    LinearGaussian,
    gaussian_mixture_parameters,
    linear_gaussian_parameters,
)
from ppvae.data.table import Column, Table

__all__ = [
    "NAMES",
    "Column",
    "Dataset",
    "EmptyDocumentWarning",
    "Factors",
    "GaussianMixture",
    "LinearGaussian",
    "PrecisionWarning",
    "Split",
    "Stored",
    "Table",
    "cache_folder",
    "dsprites",
    "from_anndata",
    "from_arrays",
    "from_counts",
    "from_csv",
    "from_images",
    "from_npz",
    "gaussian_mixture_parameters",
    "linear_gaussian_parameters",
    "load",
    "quadrants",
    "shapes3d",
    "sprites",
    "with_labels",
]
