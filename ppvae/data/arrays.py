"""Users' own arrays -> `Dataset`, checked before anything else."""

from __future__ import annotations

import warnings
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from .dataset import Dataset, Support
from .split import Binarize, Split, check_binarize, check_choice, check_unit_interval

PIECE = 2**22  # values of a mapped file that are looked at together


def from_arrays(
    x: Any,
    y: Any = None,
    *,
    valid: float | int = 0.1,
    test: float | int = 0.1,
    support: Support | None = None,
    shape: tuple[int, ...] | None = None,
    binarize: Binarize | None = None,
    flatten: bool = False,
    seed: int = 0,
    name: str = "arrays",
) -> Dataset:
    """A `Dataset` from arrays or tensors: checked, split at random (by class with labels), copied.

    A file mapped into memory, `np.load("x.npy", mmap_mode="r")`, is not copied: the training part
    stays in the file and `ppvae.fit` reads it batch by batch. It is looked through once here, in
    pieces. The validation and test parts are read into memory: give numbers of rows.

    Args:
        x: `(N, D)` rows, `(N, H, W)` or `(N, C, H, W)` images; finite numbers, N at least 3.
        y: `(N,)` labels, whole numbers 0..C-1; or `(N, D)` real conditions; or None.
        valid: rows for validation: a share in (0, 1) or a number of rows.
        test: rows for testing, likewise.
        support: see `Dataset`. None infers it: all in {0, 1} "binary"; all in [0, 1]
            "unit_interval"; whole numbers, none negative "counts"; whole numbers "integer"; else
            "real". `source` states what was inferred.
        shape: natural shape of one row, if `x` is flat: (1, 28, 28) for rows of 784.
        binarize: "dynamic" or "static" for `x` in [0, 1] read as grey levels, so that the model
            sees Bernoulli draws (see `Split`); else None.
        flatten: store each row flat, `(N, D)`, keeping its shape in `shape`.
        seed: of the split and of the binarisation, 0 or more.
        name: of the data set.

    Raises:
        TypeError: arrays of objects, text or complex numbers.
        ValueError: empty, NaN or infinite `x`, wrong rank, channels last, 8-bit images without
            `support`, values outside `support`, bad labels, or a split with no rows.

    >>> generator = torch.Generator().manual_seed(0)
    >>> mine = from_arrays(torch.randn(100, 3, generator=generator), torch.arange(100) % 2)
    >>> mine.support, mine.num_classes, len(mine.train), len(mine.valid), len(mine.test)
    ('real', 2, 80, 10, 10)
    """
    check_binarize(binarize)
    mapped = isinstance(x, np.memmap)
    rows = _numbers(x, "x")
    if rows.ndim not in (2, 3, 4):
        raise ValueError(
            f"x has shape {rows.shape}: give (N, D), (N, H, W) or (N, C, H, W); "
            "use x[:, None] for N single numbers, x.reshape(len(x), -1) for deeper rows"
        )
    _check_channels(rows.shape)
    natural = _natural_shape(rows.shape[1:], shape)
    if rows.dtype == np.uint8 and rows.max() > 1 and support is None:
        raise ValueError(
            f"x holds 8-bit values (uint8) up to {rows.max()}: pass x / 255 for grey levels, or "
            "support='counts' to model the numbers themselves"
        )
    if mapped:
        values = map_tensor(rows, "x")
        found = mapped_support(rows, support, binarize)
    else:
        values = _finite(rows, "x")
        found = infer_support(values)
        check_support(values, support or found)
        if binarize is not None:
            check_unit_interval(values, f"x (binarize={binarize!r})")
    stated = f"support {found!r} inferred" if support is None else f"support {support!r} given"
    labels = None if y is None else _conditions(y, len(values))
    num_classes = int(labels.max()) + 1 if labels is not None and labels.ndim == 1 else None
    index = split_rows(
        len(values),
        valid,
        test,
        seed,
        None if num_classes is None else labels.numpy(),  # type: ignore[union-attr]
    )
    if flatten:
        values = values.flatten(1)
    train, valid_part, test_part = (
        # a seed of its own for each part, so that parts share no binarisation noise
        Split(values, part_y, binarize, 3 * seed + part, rows=i)
        if mapped and part == 0
        else Split(_gathered(values, i), part_y, binarize, 3 * seed + part)
        for part, i in enumerate(map(torch.from_numpy, index))
        for part_y in [None if labels is None else labels[i]]
    )
    how = "at random" if num_classes is None else "at random by class"
    return Dataset(
        name,
        train,
        valid_part,
        test_part,
        support="binary" if binarize else support or found,
        shape=natural,
        num_classes=num_classes,
        source=f"arrays of the user; {stated}; split {how}, seed {seed}",
    )


def map_tensor(array: np.ndarray, name: str) -> Tensor:
    """An array as a tensor on the same memory: the file, if it is mapped.

    Raises:
        TypeError: torch has no such dtype.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor do we
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError) as error:  # other byte orders raise the latter
            raise TypeError(
                f"{name} is a mapped file of dtype {array.dtype}, which torch cannot map: store it "
                "as native float32, float16 or uint8"
            ) from error


def mapped_support(array: np.ndarray, given: Support | None, binarize: Binarize | None) -> Support:
    """Look through a mapped array in pieces, as `from_arrays` does through one in memory."""
    order: list[Support] = ["binary", "unit_interval", "counts", "integer", "real"]
    step = max(1, PIECE // max(1, array[0].size))
    seen: set[Support] = set()
    for first in range(0, len(array), step):
        piece = array[first : first + step]
        values = _finite(piece, f"x (rows {first} to {first + len(piece) - 1})")
        if given is not None:
            check_support(values, given)
        if binarize is not None:
            check_unit_interval(values, f"x (binarize={binarize!r})")
        seen.add(infer_support(values))
    if "unit_interval" in seen and seen & {"counts", "integer"}:
        return "real"
    return max(seen, key=order.index)


def _gathered(values: Tensor, index: Tensor) -> Tensor:
    """Rows in the default float dtype; those of a mapped file are cast only here."""
    return values[index].to(torch.get_default_dtype())


def infer_support(values: Tensor) -> Support:
    """The narrowest support that holds all values; see `from_arrays`.

    >>> infer_support(torch.tensor([[0.0, 3.0]])), infer_support(torch.tensor([[0.0, 0.5]]))
    ('counts', 'unit_interval')
    """
    if bool((values == values.round()).all()):
        if bool((values < 0).any()):
            return "integer"
        return "counts" if bool((values > 1).any()) else "binary"
    return "unit_interval" if float(values.min()) >= 0 and float(values.max()) <= 1 else "real"


def check_support(values: Tensor, support: Support) -> None:
    """Raise ValueError unless every value lies in `support`."""
    check_choice("support", support, get_args(Support))
    found = infer_support(values)
    allowed = {
        "binary": {"binary"},
        "unit_interval": {"binary", "unit_interval"},
        "counts": {"binary", "counts"},
        "integer": {"binary", "counts", "integer"},
        "real": set(get_args(Support)),
    }
    if found not in allowed[support]:
        raise ValueError(
            f"support={support!r}, and x ranges from {float(values.min()):g} to "
            f"{float(values.max()):g} with support {found!r}: rescale x or give support={found!r}"
        )


def split_rows(
    num: int, valid: float | int, test: float | int, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of train, valid and test: disjoint, covering, seeded, by class with labels.

    Each class is spread evenly over one ordering of all rows, so any stretch of it holds
    every class in its share, give or take a row; test is the first stretch, then valid, then train.

    Raises:
        ValueError: some part would have no rows, or `seed` is negative.

    >>> [len(part) for part in split_rows(10, 0.2, 3, seed=0)]
    [5, 2, 3]
    """
    if seed < 0:
        raise ValueError(f"seed={seed}: give 0 or more")
    num_valid, num_test = _size("valid", valid, num), _size("test", test, num)
    if num_valid + num_test >= num:
        raise ValueError(
            f"x has {num} rows, valid takes {num_valid} and test {num_test}: train needs at least 1"
        )
    rng = np.random.default_rng(seed)
    order = rng.permutation(num)
    if labels is not None:
        place = np.empty(num)
        for label in np.unique(labels):
            rows = order[labels[order] == label]
            place[rows] = (np.arange(len(rows)) + rng.random(len(rows))) / len(rows)
        order = np.argsort(place, kind="stable")
    return order[num_test + num_valid :], order[num_test : num_test + num_valid], order[:num_test]


def _size(name: str, share: float | int, num: int) -> int:
    if isinstance(share, float) and 0 < share < 1:
        return max(1, round(share * num))
    if isinstance(share, (int, np.integer)) and not isinstance(share, bool) and share >= 1:
        return int(share)
    raise ValueError(f"{name}={share!r}: give a share in (0, 1) or a number of rows, 1 or more")


def _numbers(array: Any, name: str) -> np.ndarray:
    """`array` as numpy numbers, not yet of a float type."""
    if isinstance(array, Tensor):
        array = array.detach().cpu()
        array = array.float() if array.dtype == torch.bfloat16 else array  # numpy has none
    try:
        array = np.asarray(array)
    except ValueError as error:  # numpy's "inhomogeneous shape"
        raise ValueError(f"{name} has rows of different lengths: pad or cut them") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(
            f"{name} holds {array.dtype} of shape {array.shape}: give an array of real numbers "
            "(code words as numbers; .toarray() for a scipy sparse matrix)"
        )
    if array.size == 0:
        raise ValueError(f"{name} is empty, shape {array.shape}: give at least 3 rows")
    return array


def _finite(array: np.ndarray, name: str) -> Tensor:
    """A copy as a tensor of the default dtype, if all is finite."""
    dtype = torch.get_default_dtype()
    width = np.float64 if dtype == torch.float64 else np.float32
    with np.errstate(over="ignore"):
        values = torch.from_numpy(array.astype(width)).to(dtype)
    bad = ~values.isfinite()
    if bool(bad.any()):
        row = int(bad.reshape(len(bad), -1).any(1).int().argmax())
        raise ValueError(
            f"{name} has {int(bad.sum())} NaN or infinite values (as {dtype}), the first in row "
            f"{row}: drop those rows or fill them in"
        )
    return values


def _check_channels(shape: tuple[int, ...]) -> None:
    if len(shape) == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4):
        raise ValueError(
            f"x has shape {shape}, channels last: use np.transpose(x, (0, 3, 1, 2)) or "
            "x.permute(0, 3, 1, 2) for (N, C, H, W)"
        )


def _natural_shape(event: tuple[int, ...], shape: tuple[int, ...] | None) -> tuple[int, ...]:
    if shape is None:
        return tuple(event)
    if int(np.prod(shape)) != int(np.prod(event)):
        raise ValueError(
            f"shape={shape} has {int(np.prod(shape))} values and a row of x {int(np.prod(event))}, "
            f"{event}: make them agree"
        )
    return tuple(shape)


def _conditions(y: Any, num: int) -> Tensor:
    """`y` as int64 labels `(N,)` or float conditions `(N, D)`."""
    array = _numbers(y, "y")
    if array.ndim not in (1, 2) or len(array) != num:
        raise ValueError(
            f"y has shape {array.shape} and x {num} rows: give ({num},) labels or ({num}, D) "
            "conditions"
        )
    values = _finite(array, "y")
    if array.ndim == 2:
        return values
    return class_labels(array, "y", ", or give (N, 1) conditions")


def class_labels(array: Any, name: str, otherwise: str = "") -> Tensor:
    """Labels `(N,)` as int64, if they are whole numbers from 0; `otherwise` is another cure."""
    array = _numbers(array, name)
    bad = ~(np.isfinite(array) & (array == np.round(array)) & (array >= 0))
    if bad.any():
        row = int(bad.argmax())
        raise ValueError(
            f"{name} has {int(bad.sum())} labels that are not whole numbers from 0, the first in "
            f"row {row}: {float(array[row]):g}. Number the classes 0..C-1{otherwise}"
        )
    return torch.from_numpy(array.astype(np.int64))
