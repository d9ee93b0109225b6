"""Images of every combination of known factors: sprites drawn here, dSprites, 3D Shapes."""

from __future__ import annotations

import math
import os
import shutil
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ppvae.arguments import takes_numbers
from ppvae.data.arrays import from_arrays
from ppvae.data.bounded import check_room, npz_arrays, reading
from ppvae.data.dataset import Dataset
from ppvae.data.files import existing

_MOST_OF_DSPRITES = 2**32  # bytes of its images, which are 3.02e9


@dataclass(frozen=True, eq=False, repr=False)
class Factors:
    """Images of all combinations of factors, in the order of an odometer: the last runs fastest.

    ``factors[rows]`` are images ``(n, C, H, W)`` in [0, 1], of the default dtype.

    Args:
        images: ``(N, C, H, W)`` bytes, in memory or in a file: 0 and 1 if binary, else 0 to 255.
        sizes: how many values each factor has; N is their product.
        names: of the factors.
        support: "binary" or "unit_interval", see :class:`Dataset`.
        name: of the data set.
        source: citation.

    Raises:
        ValueError: the grid is not complete, or images are no bytes of that shape.

    Example:
        >>> from ppvae import data
        >>> sprites = data.sprites(16, sizes=(3, 2, 2, 3, 3))
        >>> sprites
        Factors 'sprites': 108 images (1, 16, 16); 3 shape, 2 scale, 2 orientation, 3 x, 3 y
        >>> sprites[sprites.index([2, 1, 0, 1, 1])].shape
        torch.Size([1, 16, 16])
    """

    images: Any
    sizes: tuple[int, ...]
    names: tuple[str, ...]
    support: Literal["binary", "unit_interval"] = "binary"
    name: str = "factors"
    source: str = ""

    def __post_init__(self) -> None:
        if self.support not in ("binary", "unit_interval"):
            raise ValueError(f'support must be "binary" or "unit_interval", got {self.support!r}')
        if len(self.names) != len(self.sizes) or min(self.sizes, default=0) < 1:
            raise ValueError(f"sizes={self.sizes} and names={self.names}: give one >= 1 for each")
        shape, rows = tuple(self.images.shape), math.prod(self.sizes)
        if len(shape) != 4 or str(self.images.dtype).split(".")[-1] != "uint8":
            raise ValueError(f"images are {self.images.dtype} {shape}: give uint8 (N, C, H, W)")
        if shape[0] != rows:
            seen = f"{shape[0]} images, and sizes={self.sizes} have {rows} combinations"
            raise ValueError(f"{seen}: give one image of each")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, rows: Any) -> Tensor:
        rows = self._checked(rows, len(self), "row")
        once, places = rows.unique(return_inverse=True)  # in order and each once, as files are read
        found = self.images[once] if isinstance(self.images, Tensor) else self.images[once.numpy()]
        images = torch.as_tensor(found)[places].to(torch.get_default_dtype())
        return images if self.support == "binary" else images / 255

    def index(self, factors: Any) -> Tensor:
        """Rows of the images that have given factors, ``(..., F) -> (...)``.

        Raises:
            ValueError: another number of factors, or one out of range, by name.

        Example:
            >>> from ppvae import data
            >>> data.sprites(16, sizes=(3, 2, 2, 3, 3)).index([[0, 0, 0, 0, 2], [1, 0, 0, 0, 0]])
            tensor([ 2, 36])
        """
        values = torch.as_tensor(factors)
        if values.dim() == 0 or values.shape[-1] != len(self.sizes):
            raise ValueError(f"factors have shape {tuple(values.shape)}: give (..., F), {self}")
        rows = torch.zeros(values.shape[:-1], dtype=torch.int64)
        for column, size, name in zip(values.unbind(-1), self.sizes, self.names, strict=True):
            rows = rows * size + self._checked(column, size, f"factor {name!r}")
        return rows

    def factors(self, index: Any) -> Tensor:
        """The factors of given rows, ``(...) -> (..., F)``: the inverse of :meth:`index`.

        Raises:
            ValueError: a row out of range.

        Example:
            >>> from ppvae import data
            >>> data.sprites(16, sizes=(3, 2, 2, 3, 3)).factors(36)
            tensor([1, 0, 0, 0, 0])
        """
        rows, found = self._checked(index, len(self), "row"), []
        for size in reversed(self.sizes):
            found.append(rows % size)
            rows = rows // size
        return torch.stack(found[::-1], -1)

    def sample(self, num: int, generator: torch.Generator | None = None) -> Tensor:
        """Independent factors, each uniform, ``(num, F)``.

        Example:
            >>> from ppvae import data
            >>> data.sprites(16, sizes=(3, 2, 2, 3, 3)).sample(4).shape
            torch.Size([4, 5])
        """
        columns = [torch.randint(size, (num,), generator=generator) for size in self.sizes]
        return torch.stack(columns, -1)

    def dataset(self, num: int | None = None, seed: int = 0, **options: Any) -> Dataset:
        """A :class:`Dataset` of the images; ``y`` of each part holds their factors, ``(n, F)``.

        Images in a mapped file stay there if all are taken; others take four bytes a pixel.

        Args:
            num: so many images, drawn without replacement; None for all.
            seed: of the draw and of the split.
            **options: ``valid``, ``test``, ``flatten`` of :func:`from_arrays`.

        Raises:
            ValueError: ``num`` out of range, and as :func:`from_arrays`.

        Example:
            >>> from ppvae import data
            >>> digits = data.sprites(16, sizes=(3, 2, 2, 3, 3)).dataset()
            >>> digits.support, digits.shape, len(digits.train), digits.train.y.shape
            ('binary', (1, 16, 16), 86, torch.Size([86, 5]))
        """
        if num is not None and not 3 <= num <= len(self):
            raise ValueError(f"num={num}: give 3 to {len(self)} images, or None for all")
        rows = torch.arange(len(self))
        if num is not None:
            generator = torch.Generator().manual_seed(seed)
            rows = torch.randperm(len(self), generator=generator)[:num].sort().values
        stays = num is None and isinstance(self.images, np.memmap) and self.support == "binary"
        x = self.images if stays else self[rows]
        made = from_arrays(
            x,
            self.factors(rows).to(torch.get_default_dtype()),
            support=self.support,
            seed=seed,
            name=self.name,
            **options,
        )
        return replace(made, source=f"{self.source}; split at random, seed {seed}")

    def _checked(self, values: Any, size: int, what: str) -> Tensor:
        found = torch.as_tensor(values)
        whole = found.to(torch.int64)
        bad = (whole != found) | (whole < 0) | (whole >= size)
        if bad.any():
            raise ValueError(f"{what} {found[bad][0].item()} of {self}: give 0 to {size - 1}")
        return whole.cpu()

    def __repr__(self) -> str:
        sizes = ", ".join(f"{n} {name}" for n, name in zip(self.sizes, self.names, strict=True))
        shape = tuple(self.images.shape[1:])
        return f"Factors {self.name!r}: {len(self):,} images {shape}; {sizes}"


# ------------------------------------------------------------------------------ drawn here

NAMES = ("shape", "scale", "orientation", "x", "y")


@takes_numbers(size=8)
def sprites(
    size: int = 32, sizes: tuple[int, ...] = (3, 4, 8, 12, 12), full_turn: bool = False
) -> Factors:
    """White squares, ellipses and hearts on black, ``(1, size, size)``, in all combinations.

    As dSprites, drawn here: no download. A pixel is white if half of it or more is inside, by 16
    points of it. Sprites of scale 1 are 5/8 of the image wide, or what leaves room for all places,
    those of the first scale half of that; places are whole pixels apart, about the middle.

    Args:
        size: of an image, pixels.
        sizes: how many values shape (at most 3), scale, orientation, x and y have.
        full_turn: orientations in [0, 2 pi), as dSprites has them: a square then looks the same in
            four of them, an ellipse in two, and no code can tell these apart. Else in [0, pi/2):
            every combination is another image, so far as pixels allow (by default, all are).

    Raises:
        ValueError: sizes that are not five numbers >= 1, more than three shapes, an image too
            small for so many places.

    Source: after Matthey, Higgins, Hassabis & Lerchner, dSprites, 2017.

    Example:
        >>> sprites()
        Factors 'sprites': 13,824 images (1, 32, 32); 3 shape, 4 scale, 8 orientation, 12 x, 12 y
    """
    if size >= 2**15:
        raise ValueError(f"size={size}: give a number of pixels, below {2**15}")
    if len(sizes) != 5 or min(sizes) < 1 or sizes[0] > 3:
        raise ValueError(f"sizes={sizes}: give five numbers >= 1 for {NAMES}, at most 3 shapes")
    radius = min(5 * size // 16, (size + 1 - max(sizes[3:])) // 2)
    if radius < max(2, size // 8):
        cure = "draw images of 8 pixels or more, and of 4/3 of the places"
        raise ValueError(f"size={size} leaves no room for sprites in sizes={sizes}: {cure}")
    num_shapes, num_scales, num_turns, _, _ = sizes
    scales = np.linspace(0.5, 1, num_scales) if num_scales > 1 else np.ones(1)
    turns = np.arange(num_turns) / num_turns * (2 * np.pi if full_turn else np.pi / 2)
    patches = _patches(radius, scales, turns)[:num_shapes]
    images = np.zeros((*sizes, size, size), np.uint8)
    for i, left in enumerate(_places(size - 2 * radius, sizes[3])):
        for j, top in enumerate(_places(size - 2 * radius, sizes[4])):
            down, right = slice(top, top + 2 * radius), slice(left, left + 2 * radius)
            images[:, :, :, i, j, down, right] = patches
    source = "drawn by ppvae.data.sprites, after Matthey et al. (2017), dSprites"
    rows = torch.from_numpy(images).reshape(-1, 1, size, size)
    return Factors(rows, tuple(sizes), NAMES, name="sprites", source=source)


def _places(room: int, num: int) -> list[int]:
    """Where a sprite's patch may begin: evenly spaced by whole pixels, in the middle."""
    step = room // (num - 1) if num > 1 else 0
    first = (room - step * (num - 1)) // 2
    return [first + step * i for i in range(num)]


def _patches(radius: int, scales: np.ndarray, turns: np.ndarray) -> np.ndarray:
    """Every shape, scale and orientation, ``(3, scales, turns, 2 radius, 2 radius)``."""
    fine = (np.arange(8 * radius) + 0.5) / (4 * radius) - 1  # centres of quarter pixels
    x, y = np.meshgrid(fine, -fine)  # y points up
    scales, turns = scales[:, None, None, None], turns[:, None, None]
    u = (x * np.cos(turns) + y * np.sin(turns)) / scales
    v = (y * np.cos(turns) - x * np.sin(turns)) / scales
    p, q = 1.32 * u, 1.32 * v + 0.15  # the heart's middle in the circle
    inside = np.stack(
        [
            np.maximum(abs(u), abs(v)) <= 0.68,
            u**2 + (v / 0.5) ** 2 <= 0.95,
            (p**2 + q**2 - 1) ** 3 <= p**2 * q**3,
        ]
    )
    by_pixel = inside.reshape(*inside.shape[:3], 2 * radius, 4, 2 * radius, 4)
    return by_pixel.mean((-3, -1)) >= 0.5


# ------------------------------------------------------------------------------ files


def dsprites(path: str | Path) -> Factors:
    """dSprites from its file: 737,280 images ``(1, 64, 64)``, 3 GB, which stay in a mapped file.

    The first call unpacks the images beside the file, as ``NAME.imgs.npy``. Factors of one value
    (the colour) are left out.

    Args:
        path: of ``dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz``, from
            https://github.com/google-deepmind/dsprites-dataset

    Raises:
        ValueError: no such file, a key it lacks, images that are not every combination in order.

    Source: Matthey, Higgins, Hassabis & Lerchner, dSprites, 2017.
    """
    path = existing(path)
    with reading(path, "Give the .npz file of dSprites"):
        with zipfile.ZipFile(path) as archive:
            if missing := {"imgs", "latents_classes"} - {n[:-4] for n in archive.namelist()}:
                raise ValueError(f"it has no {sorted(missing)}")
            if archive.getinfo("imgs.npy").file_size > _MOST_OF_DSPRITES:
                raise ValueError(f"its images are larger than {_MOST_OF_DSPRITES:,} bytes")
            unpacked = path.with_suffix(".imgs.npy")
            if not unpacked.exists() or unpacked.stat().st_mtime < path.stat().st_mtime:
                half = unpacked.with_suffix(f".{os.getpid()}.tmp")
                try:
                    with archive.open("imgs.npy") as packed, half.open("wb") as file:
                        shutil.copyfileobj(packed, file, 2**24)
                    half.replace(unpacked)
                finally:
                    half.unlink(missing_ok=True)
        (classes,) = npz_arrays(path, ["latents_classes"])
    names, sizes = _grid(path, classes, ("color", *NAMES))
    images = np.load(unpacked, mmap_mode="r")[:, None]
    return Factors(images, sizes, names, "binary", "dsprites", "Matthey et al. (2017), dSprites")


def shapes3d(path: str | Path) -> Factors:
    """3D Shapes from its file: 480,000 images ``(3, 64, 64)``, read when they are asked for.

    Args:
        path: of ``3dshapes.h5``, from https://github.com/google-deepmind/3d-shapes

    Raises:
        ImportError: ``h5py`` is not installed.
        ValueError: no such file, a key it lacks, images that are not every combination in order.

    Source: Burgess & Kim, 3D Shapes Dataset, 2018.
    """
    try:
        import h5py
    except ImportError as error:
        raise ImportError("3D Shapes need h5py: pip install 'ppvae[h5]'") from error
    path = existing(path)
    with reading(path, "Give the HDF5 file of 3D Shapes"):
        with h5py.File(path) as file:
            if missing := {"images", "labels"} - set(file):
                raise ValueError(f"it has no {sorted(missing)}")
            check_room(8 * file["labels"].size, "its labels")
            labels, shape = file["labels"][:], file["images"].shape
            dtype = file["images"].dtype
    classes = np.stack([np.unique(c, return_inverse=True)[1] for c in labels.T], 1)
    own = ("floor_hue", "wall_hue", "object_hue", "scale", "shape", "orientation")
    names, sizes = _grid(path, classes, own)
    images = _ChannelsFirst(path, shape, dtype)
    source = "Burgess and Kim (2018), 3D Shapes"
    return Factors(images, sizes, names, "unit_interval", "shapes3d", source)


class _ChannelsFirst:
    """Images of an HDF5 file, opened for each read, so that no handle outlives it."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: Any) -> None:
        self.path, self.dtype = path, dtype
        self.shape = (shape[0], *shape[3:], *shape[1:3])

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        import h5py

        with h5py.File(self.path) as file:
            return np.moveaxis(file["images"][rows], -1, 1)


def _grid(
    path: Path, classes: np.ndarray, names: tuple[str, ...]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and sizes of the factors that vary, if all combinations are there, in order."""
    if classes.ndim != 2 or classes.shape[1] != len(names):
        raise ValueError(f"{path} has factors {classes.shape}: they should be (N, {len(names)})")
    sizes = classes.max(0) + 1
    rows = math.prod(sizes.tolist())
    ordered = rows == len(classes) and np.array_equal(
        np.ravel_multi_index(tuple(classes.T), tuple(sizes)), np.arange(rows)
    )
    if not ordered:
        seen = f"{path} has {len(classes)} images, of {rows} combinations of {names}"
        raise ValueError(f"{seen}, or in another order: give the whole file")
    kept = [k for k, size in enumerate(sizes) if size > 1]
    return tuple(names[k] for k in kept), tuple(int(sizes[k]) for k in kept)
