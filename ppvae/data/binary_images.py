"""Binary images: OMNIGLOT as IWAE uses it, and MNIST in Larochelle's fixed binarisation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppvae.data.bounded import check_mat
from ppvae.data.dataset import Dataset
from ppvae.data.fetch import broken, fetch
from ppvae.data.split import Binarize, Split, binarised, check_binarize

OMNIGLOT_ROWS = (24_345, 8_070)  # train with validation, test
OMNIGLOT_VALID = 1_345
_MOST_OF_CHARDATA = 2**29  # bytes unpacked, which are 0.2e9
MNIST_ROWS = {"train": 50_000, "valid": 10_000, "test": 10_000}


def omniglot(binarize: Binarize | None = "dynamic", flatten: bool = True, seed: int = 0) -> Dataset:
    """28x28 handwritten characters of 50 alphabets, as in IWAE: 23,000/1,345/8,070.

    The split is that of the authors' code: rows permuted by NumPy's ``RandomState(123)``, the last
    1,345 for validation; whatever ``seed`` is, which moves the binarisation. Images are turned
    upright (the file has them transposed). Labels are the alphabets. No checksum is published:
    shapes, the range [0, 1] and one label per row are checked.

    Raises:
        ValueError: ``omniglot/chardata.mat`` is not that file.
        ConnectionError: it is not in the cache and cannot be downloaded.

    Source: Lake, Salakhutdinov, Tenenbaum (2015), https://github.com/brendenlake/omniglot (MIT
    licence); resized by Burda et al. (2016), https://github.com/yburda/iwae
    """
    check_binarize(binarize)
    (x, y), (x_test, y_test) = _chardata(flatten)
    order = torch.from_numpy(np.random.RandomState(123).permutation(len(x)))
    train, valid = order[:-OMNIGLOT_VALID], order[-OMNIGLOT_VALID:]
    parts = [Split(x[train], y[train]), Split(x[valid], y[valid]), Split(x_test, y_test)]
    return Dataset(
        "omniglot",
        *binarised(parts, binarize, seed),
        support="binary" if binarize else "unit_interval",
        shape=(1, 28, 28),
        num_classes=50,
        source="Lake et al. (2015), https://github.com/brendenlake/omniglot, as resized by Burda "
        "et al. (2016), https://github.com/yburda/iwae; validation: 1,345 rows as in their code",
    )


def _chardata(flatten: bool) -> list[tuple[Tensor, Tensor]]:
    """Images and labels of the training and of the test part, checked."""
    import scipy.io

    path, parts = fetch("omniglot", "chardata.mat"), []
    try:
        check_mat(path, _MOST_OF_CHARDATA)
        file = scipy.io.loadmat(path, variable_names=["data", "testdata", "target", "testtarget"])
        arrays = [
            [np.asarray(file[prefix + key], np.float64).T for key in ("data", "target")]
            for prefix in ("", "test")
        ]
    except Exception as error:  # scipy has many for a broken file
        raise broken(path, f"is not IWAE's chardata.mat: {error!r}") from error
    for (grey, one_hot), rows in zip(arrays, OMNIGLOT_ROWS, strict=True):
        one_label = len(one_hot) == rows and (one_hot.sum(1) == 1).all()
        if grey.shape != (rows, 784) or not 0 <= grey.min() < grey.max() <= 1 or not one_label:
            seen = (
                f"images {grey.shape} in [{grey.min():g}, {grey.max():g}], labels {one_hot.shape}"
            )
            wanted = f"{rows} rows of 784 in [0, 1] with one label each"
            raise broken(path, f"is not IWAE's chardata.mat: it has {seen}, not {wanted}")
        upright = np.ascontiguousarray(grey.reshape(-1, 1, 28, 28).swapaxes(2, 3))
        x = torch.from_numpy(upright).to(torch.get_default_dtype())
        y = torch.from_numpy(one_hot.argmax(1).astype(np.int64))
        parts.append((x.flatten(1) if flatten else x, y))
    return parts


def binarized_mnist(flatten: bool = True, seed: int = 0) -> Dataset:
    """MNIST binarised once, by Larochelle, as the file is: 50,000/10,000/10,000, no labels.

    Fixed pixels are overfitted: log p(x) is about 2 nats lower than with dynamic binarisation
    (Burda et al., 2016), and does not compare with it. SHA-256 are those of TensorFlow Datasets.
    No licence is stated with the files.

    Args:
        flatten: store ``(N, 784)``; False keeps ``(N, 1, 28, 28)``.
        seed: has no effect; nothing is drawn.

    Raises:
        ValueError: a file is corrupt.
        ConnectionError: a file is not in the cache and cannot be downloaded.

    Source: Larochelle and Murray (2011),
    http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/
    """
    train, valid, test = (
        Split(_amat(fetch("binarized_mnist", f"binarized_mnist_{part}.amat"), rows, flatten))
        for part, rows in MNIST_ROWS.items()
    )
    return Dataset(
        "binarized_mnist",
        train,
        valid,
        test,
        support="binary",
        shape=(1, 28, 28),
        source="Larochelle and Murray (2011), http://www.cs.toronto.edu/~larocheh/public/datasets/"
        "binarized_mnist/; split as the files are",
    )


def _amat(path: Path, rows: int, flatten: bool) -> Tensor:
    """Lines of 784 digits 0 or 1 with one character between them."""
    raw = np.frombuffer(path.read_bytes(), np.uint8)
    bits = raw.reshape(rows, -1)[:, ::2] - ord("0") if raw.size == rows * 784 * 2 else raw
    if bits.shape != (rows, 784) or bits.max() > 1:
        wanted = f"{rows:,} lines of 784 were expected, each 0 or 1"
        raise broken(path, f"has {raw.size:,} bytes, where {wanted}")
    values = torch.from_numpy(bits).to(torch.get_default_dtype())
    return values if flatten else values.reshape(-1, 1, 28, 28)
