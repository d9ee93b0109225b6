"""Structured output prediction: given some quadrants of an image, predict the others."""

from __future__ import annotations

from dataclasses import replace

import torch

from ppvae.data.dataset import Dataset
from ppvae.data.split import Split, check_choice


def quadrants(dataset: Dataset, missing: int) -> Dataset:
    """The data set whose batches are ``(x, y)``: missing pixels ``x`` given visible pixels ``y``.

    ========  =========================  =============================
    missing   y, visible                 x, missing
    ========  =========================  =============================
    1         all but the bottom right   the bottom right
    2         the left half              the right half
    3         the bottom left            all but the bottom left
    ========  =========================  =============================

    Both are flat and in row-major order, ``(N, D_missing)`` and ``(N, D_visible)``. The image is
    binarised as a whole, so in each epoch ``x`` and ``y`` come from the same draw. Of an odd height
    or width the bottom or right part has the extra row or column. ``Dataset.join`` is the inverse.

    Args:
        dataset: of images: ``shape`` is (H, W) or (C, H, W), H and W at least 2.
        missing: number of quadrants to predict: 1, 2 or 3.

    Raises:
        ValueError: another number, or not images.

    Source: Sohn, Lee, Yan (2015), Learning structured output representation using deep
    conditional generative models; quadrants as in the CVAE tutorial of Pyro.

    Example:
        >>> from ppvae import data
        >>> cut = quadrants(data.load("digits"), missing=3)
        >>> [tuple(t.shape) for t in cut.train.batch(0)]
        [(1297, 48), (1297, 16)]
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(f"dataset must be a data.Dataset, as data.load(...) gives, got {dataset!r}")
    check_choice("missing", missing, (1, 2, 3))
    shape = dataset.shape
    if len(shape) not in (2, 3) or min(shape[-2:]) < 2:
        raise ValueError(f"{dataset.name!r} has rows of shape {shape}, not images: give (C, H, W)")
    if dataset.train.observed is not None:
        raise ValueError("the data have missing values of their own, which no quadrant can hide")
    if dataset.train.missing is not None:
        raise ValueError(f"{dataset.name!r} is cut already: give the data set it was made from")
    bottom, right = shape[-2] // 2, shape[-1] // 2
    hidden = torch.zeros(shape, dtype=torch.bool)
    if missing == 1:
        hidden[..., bottom:, right:] = True
    elif missing == 2:
        hidden[..., right:] = True
    else:
        hidden[...] = True
        hidden[..., bottom:, :right] = False
    hidden_pixels, visible_pixels = (mask.flatten().nonzero()[:, 0] for mask in (hidden, ~hidden))

    def cut(split: Split) -> Split:
        flat = replace(split, values=split.values.flatten(1))
        device = flat.values.device
        x_pixels, y_pixels = hidden_pixels.to(device), visible_pixels.to(device)
        return replace(
            flat, y=flat.x[:, y_pixels], supervised=True, missing=x_pixels, visible=y_pixels
        )

    name = f"{dataset.name}, {missing} of 4 quadrants missing"
    return replace(dataset.map_splits(cut), name=name, num_classes=None, log_evidence=None)
