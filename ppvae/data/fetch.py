"""The cache folder, and files downloaded into it under a checksum."""

from __future__ import annotations

import gzip
import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ppvae.data.bounded import MOST_OF_A_DATA_SET, reading, unpacked

MOST_OF_A_DOWNLOAD = 2**30  # bytes; the largest has 61 million
URLS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion_mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "binarized_mnist": "http://www.cs.toronto.edu/~larocheh/public/datasets/binarized_mnist/",
    "omniglot": "https://github.com/yburda/iwae/raw/master/datasets/OMNIGLOT/",
    "har": "https://archive.ics.uci.edu/ml/machine-learning-databases/00240/",
    "20news": "https://raw.githubusercontent.com/sophieburkhardt/dirichlet-vae-topic-models/"
    "3d3593654272b01877ae70a07f9e3b562987830d/data/20news/",
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
SHA256 = {
    "binarized_mnist/binarized_mnist_train.amat": (
        "ad693b29f94c14277b095f5238ddefbbdaaae0939789dd2f4f0205278cee3e4d"
    ),
    "binarized_mnist/binarized_mnist_valid.amat": (
        "1de3d397c40fe8eeb33dafd4099a1f665ec01e96d9be234aaeeac8a34930e2e2"
    ),
    "binarized_mnist/binarized_mnist_test.amat": (
        "e6687bfea3f820c174f33b7865140b2a2dd2930ef786f35d45795fc193b5ab2c"
    ),
    "20news/train.feat": "6c4b612d03bb54c68c923ae7b689398c4a7bd1046b0874332dfe0a0c42830143",
    "20news/test.feat": "5e5beaff3c66affeb08aeefb69e40e3e1c52360cdad2df03e7df2ecb6b79fad0",
    "20news/vocab.new": "75594f361e317a8c8fafca9846e903143ff25bb57ac4207ff850ef4245eb94bb",
}


def cache_folder() -> Path:
    """The folder data sets are kept in: ``$PPVAE_DATA``, or the user's cache folder if unset.

    Example:
        >>> cache_folder().is_absolute()
        True
    """
    chosen = os.environ.get("PPVAE_DATA")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import pooch

    return Path(pooch.os_cache("ppvae"))


def fetch(folder: str, file: str) -> Path:
    """Path of a file in the cache, downloaded if it is not there; a known checksum always holds.

    A file that is there is only read, so the cache folder may be read-only. Of files without a
    published checksum (OMNIGLOT, HAR) the loader checks the contents.

    Args:
        folder: a key of ``URLS``.
        file: name of the file.

    Raises:
        ValueError: the file in the cache or the download fails its checksum; a failed download is
            not kept, nor are folders made for it.
        ConnectionError: the file is not in the cache and could not be downloaded.
    """
    import pooch

    path, url, key = cache_folder() / folder / file, URLS[folder] + quote(file), f"{folder}/{file}"
    kind, published = ("md5", MD5[key]) if key in MD5 else ("sha256", SHA256.get(key))
    if path.exists():
        found = pooch.file_hash(str(path), alg=kind)
        if published not in (None, found):
            raise broken(path, f"is corrupt ({kind} {found}, not {published})")
        return path
    made = [folder for folder in path.parents if not folder.exists()]  # by pooch, innermost first
    try:
        known_hash = None if published is None else f"{kind}:{published}"
        pooch.retrieve(
            url, known_hash=known_hash, fname=file, path=path.parent, downloader=_download
        )
    except OSError as error:  # requests' errors are OSErrors, and some are ValueErrors too
        seen = f"{path} is not there, and {url} could not be saved there: {error}"
        cure = f"Put the file there yourself, or set PPVAE_DATA to a folder that has {key}"
        raise ConnectionError(f"{seen}. {cure}, or that can be written") from error
    except ValueError as error:  # pooch checks before it moves the file into the cache
        seen = f"the download of {url} is corrupt ({kind} is not {published}) and was not kept"
        raise ValueError(f"{seen}: try again, or put the right file at {path}") from error
    finally:
        with suppress(OSError):  # not empty: the file is there
            for empty in made:
                empty.rmdir()
    return path


def _download(url: str, output_file: Any, pooch: Any, check_only: bool = False) -> None:
    """Download for ``pooch``: over http and https only, redirects too, and not without end."""
    import requests

    if not url.startswith(("http://", "https://")):
        raise ConnectionError(f"{url} is neither http nor https")
    # a session follows redirects to these two only: it has no adapter for others
    with requests.get(url, stream=True, timeout=30) as response, open(output_file, "wb") as file:
        response.raise_for_status()
        for piece in response.iter_content(2**16):
            if file.tell() > MOST_OF_A_DOWNLOAD:
                raise ConnectionError(f"it has more than {MOST_OF_A_DOWNLOAD:,} bytes")
            file.write(piece)


def broken(path: Path, what: str) -> ValueError:
    """The error for a file that is not what it should be."""
    return ValueError(f"{path} {what}: delete it and try again")


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in a gzipped IDX file, the format of MNIST.

    Two zero bytes, the type (8: uint8), the rank, the sizes as big-endian 32-bit, the values.

    Raises:
        ValueError: not such a file, or its sizes and its length disagree.
    """
    with reading(path, "Delete it and try again"), gzip.open(path) as file:
        raw = unpacked(file, MOST_OF_A_DATA_SET)
    rank = raw[3] if raw[:3] == b"\x00\x00\x08" and len(raw) > 3 else 0
    start = 4 + 4 * rank
    if not rank or len(raw) < start:
        raise broken(path, f"starts with {raw[:4]!r}: not an IDX file of uint8")
    shape = tuple(int(size) for size in np.frombuffer(raw, ">u4", count=rank, offset=4))
    if len(raw) - start != np.prod(shape):
        raise broken(path, f"says sizes {shape} and has {len(raw) - start} values: truncated?")
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)
