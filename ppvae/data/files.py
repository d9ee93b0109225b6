"""Users' own files -> ``Dataset``: .npz, .csv, folders of images. Nothing is unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ppvae.arguments import takes_numbers
from ppvae.data.arrays import from_arrays
from ppvae.data.bounded import check_room, npz_arrays, reading
from ppvae.data.dataset import Dataset

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")


@takes_numbers
def from_npz(path: str | Path, x: str = "x", y: str | None = "y", **options: Any) -> Dataset:
    """A ``Dataset`` from arrays in an .npz file; pickled objects are refused, never loaded.

    Args:
        path: of the file.
        x: key of the data.
        y: key of the labels or conditions, None for none. A file without the default key "y" is
            taken as unlabelled.
        **options: passed on to ``from_arrays``.

    Raises:
        ValueError: no such file, not an .npz file, a key it lacks, or pickled objects.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.npz"
        >>> np.savez(path, x=np.eye(20), y=np.arange(20) % 2)
        >>> from_npz(path).support
        'binary'
    """
    path = existing(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} is not an .npz file: save one with np.savez(path, x=x, y=y)")
    with reading(path, "Give the keys of arrays of numbers; pickled objects are refused"):
        with path.open("rb") as file:
            if file.read(6) == b"\x93NUMPY":
                raise ValueError("it holds one nameless array")
        with zipfile.ZipFile(path) as archive:
            keys = [name.removesuffix(".npy") for name in archive.namelist()]
        if x not in keys or (y is not None and y != "y" and y not in keys):
            raise ValueError(f"wanted x={x!r} and y={y!r}, and the keys are {keys}")
        arrays = npz_arrays(path, [x] if y is None or y not in keys else [x, y])
    with _naming(path):
        return from_arrays(*arrays, **{"name": path.stem, **options})


def from_csv(path: str | Path, label: str | int | None = None, **options: Any) -> Dataset:
    r"""A ``Dataset`` from a comma-separated table of numbers, with or without a line of names.

    The first line is taken for names if any cell in it is not a number.

    Args:
        path: of the file, UTF-8.
        label: name or index (negative from the end) of the column of labels. Labels in words are
            numbered in alphabetical order, and ``source`` says which is which.
        **options: passed on to ``from_arrays``.

    Raises:
        ValueError: no such file, text or empty cells among the numbers (row and column named),
            lines that are too long, or no such label column.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "mine.csv"
        >>> _ = path.write_text("a,b,kind\n" + "0.5,1.5,cat\n-1,2,dog\n" * 10)
        >>> mine = from_csv(path, label="kind")
        >>> mine.shape, mine.num_classes, mine.source.split(";")[-1]
        ((2,), 2, ' labels 0=cat, 1=dog')
    """
    import pandas

    path, label = existing(path), _as_label(label)
    with reading(path, "Give a table in UTF-8, not empty, with as many cells in each line"):
        check_room(path.stat().st_size, "it")
        table = pandas.read_csv(  # cells as text, so that a word stays what it was
            path, header=None, dtype=object, keep_default_na=False, encoding="utf-8-sig"
        )
    names = [str(j) for j in table]
    # labels may be words, so their column does not tell a line of names from a line of data
    skipped = label % len(names) if isinstance(label, int) else None
    if not all(_is_number(cell) for j, cell in table.loc[0].items() if j != skipped):
        names, table = table.loc[0].str.strip().tolist(), table.drop(0)
    words = None
    if label is not None:
        column = _column(label, names, path)
        words = table.pop(column).str.strip().to_numpy()
        del names[column]
    x = pandas.DataFrame(_as_numbers(table.to_numpy(), names, path), columns=names)
    options = {"name": path.stem, **options}
    with _naming(path):
        if words is None or all(map(_is_number, words)):
            return from_arrays(x, None if words is None else words.astype(np.float64), **options)
        return _with_named_labels(x, words, **options)


@takes_numbers
def from_images(
    folder: str | Path, size: tuple[int, int] = (28, 28), grey: bool = True, **options: Any
) -> Dataset:
    """A ``Dataset`` from a folder of 8-bit images, ``(N, C, H, W)``, pixels / 255 in [0, 1].

    Images are turned upright (EXIF), converted to grey or RGB (transparency is dropped) and
    resized to ``size`` with a bilinear filter, without keeping the aspect ratio. Images in
    sub-folders are labelled by sub-folder, numbered in alphabetical order and named in ``source``.
    Files that are not images by their suffix, and hidden ones, are left out.

    Args:
        folder: of images, or of one folder of images per class.
        size: height and width in pixels.
        grey: one channel if True, else the three of RGB.
        **options: passed on to ``from_arrays``.

    Raises:
        ValueError: no such folder, no images, images both beside and inside sub-folders, a file
            that cannot be read, or more than 8 bits per channel.
        ImportError: pillow is not installed.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> folder = Path(tempfile.mkdtemp())
        >>> for i in range(10):
        ...     Image.new("L", (40, 30), color=20 * i).save(folder / f"{i}.png")
        >>> from_images(folder).shape
        (1, 28, 28)
    """
    folder = as_path("folder", folder)
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}: check the path")
    if not _is_size(size):
        raise ValueError(f"size={size!r}: give (height, width) in pixels, each 1 or more")
    sub_folders = sorted(sub for sub in folder.iterdir() if sub.is_dir() and sub.name[0] != ".")
    beside = _images_in(folder)
    inside = [path for sub in sub_folders for path in _images_in(sub)]
    if beside and inside:
        cure = "put every image in a sub-folder (labels) or none"
        raise ValueError(f"{folder} has images beside sub-folders with images: {cure}")
    paths = beside or inside
    if not paths:
        raise ValueError(f"{folder} has no images: looked for {', '.join(IMAGE_SUFFIXES)}")
    values = len(paths) * size[0] * size[1] * (1 if grey else 3)
    with _naming(folder):
        check_room(5 * values, f"{len(paths)} images of size={size}")  # a byte, and four as float32
    x = np.stack([_pixels(path, size, grey) for path in paths]) / np.float32(255)
    options = {"name": folder.name, **options}
    with _naming(folder):
        if beside:
            return from_arrays(x, **options)
        return _with_named_labels(x, np.array([path.parent.name for path in paths]), **options)


def _is_size(size: Any) -> bool:
    """Whether it is height and width."""
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        return False
    return all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) for n in size) and (
        min(size) >= 1
    )


def _images_in(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    )


def _pixels(path: Path, size: tuple[int, int], grey: bool) -> np.ndarray:
    """One image as uint8 ``(C, H, W)``."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ImportError("reading images needs pillow: pip install pillow") from error
    with reading(path, "Save it anew as 8-bit PNG, of less than 178 million pixels"):
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # convert would clip these to white
                raise ValueError(f"mode {image.mode!r} has more than 8 bits per channel")
            upright = ImageOps.exif_transpose(image).convert("L" if grey else "RGB")
            small = upright.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(small, dtype=np.uint8)
    return pixels[None] if grey else pixels.transpose(2, 0, 1)


def _with_named_labels(x: Any, words: np.ndarray, **options: Any) -> Dataset:
    """``from_arrays`` for labels in words, numbered in alphabetical order, named in ``source``."""
    kinds, codes = np.unique(words, return_inverse=True)
    dataset = from_arrays(x, codes.reshape(-1), **options)
    named = ", ".join(f"{code}={kind}" for code, kind in enumerate(kinds))
    return replace(dataset, source=f"{dataset.source}; labels {named}")


def as_path(name: str, path: str | Path) -> Path:
    """The path, if it is one; what is empty would be the folder one is in."""
    if not isinstance(path, (str, Path)) or not str(path):
        raise TypeError(f"{name} must be the path of a file or folder, got {path!r}")
    return Path(path)


def existing(path: str | Path) -> Path:
    """The path, if there is a file."""
    path = as_path("path", path)
    if not path.is_file():
        raise ValueError(f"no file {path}: check the path")
    return path


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of what file the values are that are refused."""
    try:
        yield
    except (ValueError, TypeError) as error:
        raise type(error)(f"{path}: {error}") from error


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _as_numbers(cells: np.ndarray, names: list[str], path: Path) -> np.ndarray:
    """Cells of text as float64; raises ``ValueError`` naming the first that is no number."""
    try:
        return cells.astype(np.float64)
    except ValueError as error:
        row, column = next(
            (i, j) for i, j in np.ndindex(cells.shape) if not _is_number(cells[i, j])
        )
        cell = repr(cells[row, column])
        cell = cell if len(cell) <= 60 else f"{cell[:60]}... ({len(cell):,} characters)"
        seen = f"data row {row}, column {names[column]!r} holds {cell}, not a number"
        cure = "fill empty cells, separate by commas, and name a column of words as label="
        raise ValueError(f"{path}: {seen}: {cure}") from error


def _as_label(label: Any) -> str | int | None:
    if isinstance(label, np.integer):
        return int(label)
    if label is not None and (not isinstance(label, (str, int)) or isinstance(label, bool)):
        raise TypeError(f"label must be the name or number of a column, got {label!r}")
    return label


def _column(label: str | int, names: list[str], path: Path) -> int:
    if isinstance(label, int) and -len(names) <= label < len(names):
        return label % len(names)
    if label in names:
        return names.index(str(label))
    raise ValueError(f"{path} has no column label={label!r}: the columns are {names}")
