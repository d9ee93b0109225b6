"""Image data sets: digits, MNIST, Fashion-MNIST, Frey faces."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ppvae.data.arrays import from_arrays
from ppvae.data.bounded import npz_arrays, reading
from ppvae.data.dataset import Dataset
from ppvae.data.fetch import cache_folder, fetch, read_idx
from ppvae.data.split import Binarize, Split, binarised, check_binarize

FREY_SHA256 = "2438ba4f0d2a6bd8bac43de756141eaa33c8d248dd613d464bdb1210d9b7af78"  # of the pixels
FREY_RECIPE = """To make it, get https://cs.nyu.edu/~roweis/data/frey_rawface.mat, and run
    import numpy, scipy.io
    faces = scipy.io.loadmat('frey_rawface.mat')['ff'].T.reshape(-1, 28, 20)
    numpy.savez_compressed('freyfaces.npz', faces=faces.astype('uint8'))"""


def digits(binarize: Binarize | None = "dynamic", flatten: bool = True, seed: int = 0) -> Dataset:
    """8x8 handwritten digits bundled with scikit-learn, grey levels / 16; 1,297/200/300 by class.

    Source: Alpaydin and Kaynak (1998), https://archive.ics.uci.edu/dataset/80

    Example:
        >>> digits(binarize=None).support
        'unit_interval'
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    dataset = from_arrays(
        bunch.images[:, None] / 16,
        bunch.target,
        valid=200,
        test=300,
        binarize=binarize,
        flatten=flatten,
        seed=seed,
        name="digits",
    )
    return replace(
        dataset,
        source="Alpaydin and Kaynak (1998), https://archive.ics.uci.edu/dataset/80, as bundled "
        f"with scikit-learn; grey levels / 16; split at random by class, seed {seed}",
    )


def mnist(
    binarize: Binarize | None = "dynamic",
    flatten: bool = True,
    seed: int = 0,
    num_valid: int = 10_000,
) -> Dataset:
    """28x28 handwritten digits, grey levels / 255; the last ``num_valid`` training rows validate.

    Source: LeCun, Bottou, Bengio, Haffner (1998), http://yann.lecun.com/exdb/mnist/
    """
    cite = "LeCun et al. (1998), http://yann.lecun.com/exdb/mnist/"
    return _mnist_like("mnist", cite, binarize, flatten, seed, num_valid)


def fashion_mnist(
    binarize: Binarize | None = "dynamic",
    flatten: bool = True,
    seed: int = 0,
    num_valid: int = 10_000,
) -> Dataset:
    """28x28 pictures of clothes, grey levels / 255; the last ``num_valid`` training rows validate.

    Source: Xiao, Rasul, Vollgraf (2017), https://github.com/zalandoresearch/fashion-mnist
    """
    cite = "Xiao et al. (2017), https://github.com/zalandoresearch/fashion-mnist"
    return _mnist_like("fashion_mnist", cite, binarize, flatten, seed, num_valid)


def _mnist_like(
    name: str, cite: str, binarize: Binarize | None, flatten: bool, seed: int, num_valid: int
) -> Dataset:
    check_binarize(binarize)
    if not 1 <= num_valid < 60_000:
        raise ValueError(f"num_valid={num_valid}: give 1 to 59,999 of the 60,000 training rows")
    (x, y), (x_test, y_test) = (
        _images_and_labels(name, part, flatten) for part in ("train", "t10k")
    )
    cut = len(x) - num_valid
    parts = [Split(x[:cut], y[:cut]), Split(x[cut:], y[cut:]), Split(x_test, y_test)]
    return Dataset(
        name,
        *binarised(parts, binarize, seed),
        support="binary" if binarize else "unit_interval",
        shape=(1, 28, 28),
        num_classes=10,
        source=f"{cite}; grey levels / 255; validation: the last {num_valid:,} rows of the "
        "training file",
    )


def _images_and_labels(name: str, part: str, flatten: bool) -> tuple[Tensor, Tensor]:
    pixels = read_idx(fetch(name, f"{part}-images-idx3-ubyte.gz"))
    labels = read_idx(fetch(name, f"{part}-labels-idx1-ubyte.gz"))
    grey = torch.from_numpy(pixels.copy()).to(torch.get_default_dtype()).div_(255)[:, None]
    return grey.flatten(1) if flatten else grey, torch.from_numpy(labels.astype(np.int64))


def freyfaces(binarize: Binarize | None = None, flatten: bool = True, seed: int = 0) -> Dataset:
    """1,965 video frames of a face, 28x20, pixels / 255 in [0, 1]; 1,565/200/200 at random.

    A density of these values is per unit of pixel / 255: for a density per 8-bit grey level take
    ``log p(x) - 560 log 255``. Neighbouring frames are alike, so a random split makes the test rows
    easier than new video would be; it is the split of the literature.

    The file ``freyfaces/freyfaces.npz`` must be in the cache: nobody offers it for download
    without a pickle. The error says how to make it.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: its pixels are not those of the Frey faces.

    Source: Roweis (1998), https://cs.nyu.edu/~roweis/data.html
    """
    path = cache_folder() / "freyfaces" / "freyfaces.npz"
    if not path.is_file():
        cure = "put it there, or set PPVAE_DATA to a folder with freyfaces/freyfaces.npz"
        raise FileNotFoundError(f"no file {path}: {cure}. {FREY_RECIPE}")
    with reading(path, "Replace it, or load it as your own data with data.from_npz"):
        faces = np.ascontiguousarray(npz_arrays(path, ["faces"])[0])
    # of the pixels, not of the file, so that a file made by the recipe above passes too
    if hashlib.sha256(faces.tobytes()).hexdigest() != FREY_SHA256:
        cure = "replace it, or load it as your own data with data.from_npz"
        raise ValueError(f"{path} does not hold the Frey faces, uint8 (1965, 28, 20): {cure}")
    dataset = from_arrays(
        faces.reshape(-1, 1, 28, 20) / 255,
        valid=200,
        test=200,
        support=None if binarize else "unit_interval",
        binarize=binarize,
        flatten=flatten,
        seed=seed,
        name="freyfaces",
    )
    return replace(
        dataset,
        source="Roweis (1998), https://cs.nyu.edu/~roweis/data.html; pixels / 255, densities are "
        f"per unit of pixel / 255; split at random, seed {seed}",
    )
