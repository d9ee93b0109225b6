"""Files that others have made: read within bounds, and every error names the file and a cure."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MOST_OF_A_DATA_SET = 2**28  # bytes of one file of a data set that is known by name, unpacked
_DEFLATE = 1032  # no stream of deflate grows by more


class _Readable(Protocol):
    def read(self, size: int = -1, /) -> bytes: ...


@contextmanager
def reading(path: Path, cure: str) -> Iterator[None]:
    """Turn whatever a library raises for a broken file into a ``ValueError`` that names it.

    Libraries raise nearly everything for a damaged file, depending on where the damage is.
    """
    try:
        yield
    except ImportError:
        raise
    except Exception as error:
        why = str(error).strip() or type(error).__name__
        why = why if len(why) <= 300 else f"{why[:300]}..."
        raise ValueError(f"cannot read {path}: {why}. {cure}") from error


def memory() -> float:
    """Bytes of memory that this machine has; infinite where it does not say.

    Example:
        >>> memory() > 2**20
        True
    """
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # Windows
        return float("inf")


def check_room(size: int, what: str) -> None:
    """Raise ``ValueError`` where so many bytes are more than the machine's memory."""
    if size > memory():
        raise ValueError(f"{what} takes {size:.3g} bytes, and the memory has {memory():.3g}")


def unpacked(file: _Readable, most: int) -> bytes:
    """What a stream gives, if that is no more than ``most`` bytes.

    Example:
        >>> import io
        >>> unpacked(io.BytesIO(b"abc"), 2)
        Traceback (most recent call last):
        ValueError: it unpacks to more than 2 bytes
    """
    found = file.read(most + 1)
    if len(found) > most:
        raise ValueError(f"it unpacks to more than {most:,} bytes")
    return found


def member(archive: zipfile.ZipFile, name: str, most: int) -> bytes:
    """A file in an archive, of ``most`` bytes at most; more is refused before it is unpacked.

    ``zipfile`` stops at the size that the archive states, and checks the checksum there.
    """
    size = archive.getinfo(name).file_size
    if size > most:
        raise ValueError(f"{name} in it would unpack to {size:,} bytes, and {most:,} are the most")
    return archive.read(name)


def npz_arrays(path: Path, keys: Sequence[str]) -> list[np.ndarray]:
    """Arrays in an .npz file, after their headers; objects are refused and nothing is unpickled.

    A header that says more values than the archive has bytes for is refused before the values are
    allocated, and so is what does not fit into memory.
    """
    with zipfile.ZipFile(path) as archive:
        for key in keys:
            info = archive.getinfo(f"{key}.npy")
            if info.file_size > info.compress_size * _DEFLATE + 64:
                raise ValueError(f"{key!r} states {info.file_size:,} bytes, which is not possible")
            check_room(info.file_size, repr(key))
            with archive.open(info) as file:
                _check_header(key, file, info.file_size)
    # a handle of our own, because numpy leaves its own open when a zip file is broken
    with path.open("rb") as handle, np.load(handle, allow_pickle=False) as file:
        return [file[key] for key in keys]


def _check_header(key: str, file: Any, size: int) -> None:
    """Raise unless the header of an .npy file of ``size`` bytes states as many."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{key!r} is of version {version} of the .npy format")
    read = np.lib.format
    header = read.read_array_header_1_0 if version == (1, 0) else read.read_array_header_2_0
    shape, _, dtype = header(file)
    if dtype.hasobject:
        raise ValueError(f"{key!r} holds pickled objects")
    values = 1
    for length in shape:
        values *= int(length)  # of Python: it does not overflow
    if values * dtype.itemsize + file.tell() != size:
        seen = f"says {values:,} values of {dtype}, and has {size - file.tell():,} bytes of them"
        raise ValueError(f"{key!r} {seen}")


def check_mat(path: Path, most: int) -> None:
    """Raise ``ValueError`` where a MATLAB file (version 5) unpacks to more than ``most`` bytes."""
    left = most
    with path.open("rb") as file:
        file.seek(128)
        while len(tag := file.read(8)) == 8:
            kind, size = (int(number) for number in np.frombuffer(tag, "<u4"))
            end = file.tell() + size
            stream = zlib.decompressobj() if kind == 15 else None  # an element that is compressed
            while stream is not None and left >= 0 and file.tell() < end:
                rest = file.read(min(2**16, end - file.tell()))
                if not rest:
                    break
                while rest and left >= 0:
                    left -= len(stream.decompress(rest, 2**20))
                    rest = stream.unconsumed_tail
            if left < 0:
                raise ValueError(f"it unpacks to more than {most:,} bytes")
            file.seek(end)
