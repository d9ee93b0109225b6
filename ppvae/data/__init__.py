"""Data sets as `Dataset` values: built-in ones by name, users' own, image quadrants.

>>> from ppvae import data
>>> data.load("digits").train.x.shape
torch.Size([1297, 64])
"""

from .arrays import from_arrays
from .catalogue import NAMES, load
from .dataset import Dataset
from .fetch import cache_folder
from .files import from_csv, from_images, from_npz
from .quadrant import quadrants
from .sparse import EmptyDocumentWarning, from_counts
from .split import Split
from .synthetic import (
    GaussianMixture,
    LinearGaussian,
    gaussian_mixture_parameters,
    linear_gaussian_parameters,
)

__all__ = [
    "NAMES",
    "Dataset",
    "EmptyDocumentWarning",
    "GaussianMixture",
    "LinearGaussian",
    "Split",
    "cache_folder",
    "from_arrays",
    "from_counts",
    "from_csv",
    "from_images",
    "from_npz",
    "gaussian_mixture_parameters",
    "linear_gaussian_parameters",
    "load",
    "quadrants",
]
