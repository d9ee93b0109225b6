"""``typeset``: 28x28 digits drawn here from the typefaces that matplotlib brings along."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.random import Generator

from ppvae.data.arrays import from_arrays
from ppvae.data.dataset import Dataset
from ppvae.data.split import Binarize, check_at_least, check_binarize

SIDE = 28  # pixels
FINE = 4  # a pixel is the mean of so many by so many points
TYPEFACES = tuple(
    f"{family}{style}"
    for family, styles in {
        "DejaVuSans": ("", "-Oblique", "-Bold", "-BoldOblique"),
        "DejaVuSansMono": ("", "-Oblique", "-Bold", "-BoldOblique"),
        "DejaVuSerif": ("", "-Italic", "-Bold", "-BoldItalic"),
        "STIXGeneral": ("", "Italic", "Bol", "BolIta"),
        "cm": ("r10", "b10", "ss10", "tt10"),
    }.items()
    for style in styles
)


def typeset(
    num: int = 12_000, binarize: Binarize | None = "dynamic", flatten: bool = True, seed: int = 0
) -> Dataset:
    """28x28 digits in twenty typefaces, turned, slanted, stretched and moved; no download.

    Each of ``num`` images has a digit, a typeface, an angle of N(0, 7 degrees), a slant of
    N(0, 0.15), a width and a height of 20 pixels times exp(N(0, 0.1)), and a place of N(0, 1)
    pixels off the middle in either direction, all independent. 10 % validate and 10 % test, by
    digit; ``y`` is the digit. The typefaces are those of the installed matplotlib: another version
    of it may draw another pixel.

    Args:
        num: of images, 100 or more.
        binarize: "dynamic", "static" or None, see :class:`Split`.
        flatten: store rows ``(N, 784)``; False keeps ``(N, 1, 28, 28)``.
        seed: of the images, of the split and of the binarisation, 0 or more.

    Raises:
        ValueError: an argument out of range.

    Example:
        >>> from ppvae import data
        >>> data.load("typeset", num=200).train.x.shape
        torch.Size([160, 784])
    """
    check_at_least(100, num=num)
    check_at_least(0, seed=seed)
    check_binarize(binarize)
    if num >= 2**31:
        raise ValueError(f"num={num}: give less than 2 ** 31 images")
    if not isinstance(flatten, bool):
        raise TypeError(f"flatten must be True or False, got {flatten!r}")
    from PIL import Image

    rng = np.random.default_rng([seed, 4])
    masters = [_masters(name) for name in TYPEFACES]
    digits = rng.integers(10, size=num)
    pixels = np.empty((num, 1, SIDE, SIDE), np.float32)
    fine, resample = (SIDE * FINE, SIDE * FINE), Image.Resampling.BILINEAR
    for row, digit in enumerate(digits):
        master = masters[rng.integers(len(masters))][digit]
        drawn = master.transform(fine, Image.Transform.AFFINE, _affine(rng), resample)
        pixels[row, 0] = np.asarray(drawn.reduce(FINE), np.float32) / 255
    made = from_arrays(
        pixels,
        digits,
        binarize=binarize,
        flatten=flatten,
        support=None if binarize else "unit_interval",
        seed=seed,
        name="typeset",
    )
    source = "drawn by ppvae.data in 20 typefaces of DejaVu, STIX and Computer Modern"
    return replace(made, source=f"{source}; split at random by class, seed {seed}")


def _masters(typeface: str) -> list:
    """The ten digits of a typeface, white on black, each 20 pixels high in the middle."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    path = Path(matplotlib.get_data_path(), "fonts", "ttf", f"{typeface}.ttf")
    side, found = SIDE * FINE, []
    # Points to the em that make a zero 20 pixels high: typefaces differ in how much of it they use.
    top, bottom = ImageFont.truetype(str(path), 1000).getbbox("0")[1::2]
    font = ImageFont.truetype(str(path), round(1000 * 20 * FINE / (bottom - top)))
    for digit in "0123456789":
        image = Image.new("L", (side, side))
        left, top, right, bottom = font.getbbox(digit)
        corner = ((side - left - right) / 2, (side - top - bottom) / 2)
        ImageDraw.Draw(image).text(corner, digit, fill=255, font=font)
        found.append(image)
    return found


def _affine(rng: Generator) -> tuple[float, ...]:
    """Where each point of a new image lies in its master: the inverse of a random affine map."""
    angle, slant = math.radians(7) * rng.standard_normal(), 0.15 * rng.standard_normal()
    width, height = np.exp(0.1 * rng.standard_normal(2))
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    inverse = np.linalg.inv(turn @ np.array([[1, slant], [0, 1]]) @ np.diag([width, height]))
    middle = np.full(2, SIDE * FINE / 2)
    shift = middle - inverse @ (middle + FINE * rng.standard_normal(2))
    return (*inverse[0], shift[0], *inverse[1], shift[1])
