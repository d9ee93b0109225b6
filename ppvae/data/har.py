"""HAR: what a person with a smartphone is doing."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch

from ppvae.data.arrays import split_rows
from ppvae.data.bounded import MOST_OF_A_DATA_SET, member, reading
from ppvae.data.dataset import Dataset
from ppvae.data.fetch import broken, fetch
from ppvae.data.split import Split

FEATURES = 561
# rows of walking, upstairs, downstairs, sitting, standing, lying, as the data set's page has them
COUNTS = {
    "train": (1226, 1073, 986, 1286, 1374, 1407),
    "test": (496, 471, 420, 491, 532, 537),
}


def har(num_valid: int = 735, seed: int = 0) -> Dataset:
    """Human activity from a smartphone's sensors: 561 features in [-1, 1], 6 activities.

    7,352 rows of 21 people to train on, of which ``num_valid`` validate, at random by class (so of
    the same people), and 2,947 of 9 others to test on. It is not the HHAR of Jiang et al. (2017),
    which has other phones and 10,200 rows. No checksum is published: shapes, the range and the
    number of rows of each class are checked.

    Args:
        num_valid: rows for validation.
        seed: of their choice, 0 or more.

    Raises:
        ValueError: the file is not that data set.
        ConnectionError: it is not in the cache and cannot be downloaded.

    Source: Anguita, Ghio, Oneto, Parra and Reyes-Ortiz (2013), https://doi.org/10.24432/C54S4K
    (CC BY 4.0)
    """
    path = fetch("har", "UCI HAR Dataset.zip")
    (x, y), (x_test, y_test) = (_read(path, part) for part in ("train", "test"))
    train, valid, rest = split_rows(len(x), num_valid, 1, seed, y.numpy())
    train = np.concatenate([train, rest])
    return Dataset(
        "har",
        Split(x[train], y[train]),
        Split(x[valid], y[valid]),
        Split(x_test, y_test),
        support="real",
        shape=(FEATURES,),
        num_classes=len(COUNTS["train"]),
        source="Anguita et al. (2013), https://doi.org/10.24432/C54S4K; test: 9 people of their "
        f"own; validation: {num_valid:,} training rows at random by class, seed {seed}",
    )


def _read(path: Path, part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Features and labels from 0, checked."""
    with reading(path, "It is not the UCI HAR data set: delete it and try again"):
        with zipfile.ZipFile(path) as outer:
            inner = [name for name in outer.namelist() if name.endswith("UCI HAR Dataset.zip")]
            # the repository's newer download is a zip of that zip
            most = MOST_OF_A_DATA_SET
            raw = io.BytesIO(member(outer, inner[0], most)) if inner else None
            with zipfile.ZipFile(raw) if raw is not None else outer as file:
                names = (f"UCI HAR Dataset/{part}/{kind}_{part}.txt" for kind in "Xy")
                x, y = (np.loadtxt(io.BytesIO(member(file, name, most))) for name in names)
    shape, counts = (sum(COUNTS[part]), FEATURES), np.bincount(y.astype(np.int64))[1:].tolist()
    bounded = x.size > 0 and abs(x).max() <= 1
    if x.shape != shape or tuple(counts) != COUNTS[part] or not bounded:
        seen = f"{part} has shape {x.shape} and {counts} rows of each activity"
        wanted = f"{shape} in [-1, 1] and {COUNTS[part]}"
        raise broken(path, f"is not the UCI HAR data set: {seen}, not {wanted}")
    labels = torch.from_numpy(y.astype(np.int64)) - 1
    return torch.from_numpy(x).to(torch.get_default_dtype()), labels
