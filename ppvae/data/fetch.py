"""The cache folder, and files downloaded into it under a checksum."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np

URLS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
}
MD5 = {
    "mnist/train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "mnist/train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "mnist/t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "mnist/t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    "fashion_mnist/train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "fashion_mnist/train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "fashion_mnist/t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "fashion_mnist/t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}


def cache_folder() -> Path:
    """The folder data sets are kept in: `$PPVAE_DATA`, or the user's cache folder if unset.

    >>> cache_folder().is_absolute()
    True
    """
    chosen = os.environ.get("PPVAE_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import pooch

    return Path(pooch.os_cache("ppvae"))


def fetch(folder: str, file: str) -> Path:
    """Path of a file in the cache, downloaded if it is not there; its checksum always holds.

    A file that is there is only read, so the cache folder may be read-only.

    Args:
        folder: "mnist" or "fashion_mnist".
        file: name of the file.

    Raises:
        ValueError: the file in the cache or the download fails its checksum; a failed download is
            not kept.
        ConnectionError: the file is not in the cache and could not be downloaded.
    """
    import pooch

    path, md5, url = cache_folder() / folder / file, MD5[f"{folder}/{file}"], URLS[folder] + file
    if path.exists():
        found = pooch.file_hash(str(path), alg="md5")
        if found != md5:
            raise ValueError(f"{path} is corrupt (md5 {found}, not {md5}): delete it and try again")
        return path
    try:
        pooch.retrieve(url, known_hash=f"md5:{md5}", fname=file, path=path.parent)
    except ValueError as error:  # pooch checks before it moves the file into the cache
        raise ValueError(
            f"the download of {url} is corrupt (md5 is not {md5}) and was not kept: try again, or "
            f"put the right file at {path}"
        ) from error
    except OSError as error:  # requests' errors are OSErrors too
        raise ConnectionError(
            f"{path} is not there, and {url} could not be saved there: {error}. Put the file there "
            "yourself, or set the environment variable PPVAE_DATA to a folder that has "
            f"{folder}/{file} or that can be written"
        ) from error
    return path


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file, the format of MNIST.

    Two zero bytes, the type (8: uint8), the rank, the sizes as big-endian 32-bit, the values.

    Raises:
        ValueError: not such a file, or its sizes and its length disagree.
    """
    with gzip.open(path) as file:
        raw = file.read()
    rank = raw[3] if raw[:3] == b"\x00\x00\x08" and len(raw) > 3 else 0
    start = 4 + 4 * rank
    if not rank or len(raw) < start:
        raise ValueError(f"{path} starts with {raw[:4]!r}: not an IDX file of uint8")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=rank, offset=4))
    if len(raw) - start != np.prod(shape):
        raise ValueError(f"{path} says sizes {shape} and has {len(raw) - start} values: truncated?")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
