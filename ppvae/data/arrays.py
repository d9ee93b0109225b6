"""Users' own arrays -> ``Dataset``, checked before anything else."""

from __future__ import annotations

import math
import warnings
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ppvae.arguments import require_dense, single
from ppvae.data.dataset import Dataset, Support
from ppvae.data.frames import is_frame, numeric
from ppvae.data.gaps import require_columns, without_gaps
from ppvae.data.precision import float_type, lossy_columns, pieces, warn_of_lost_digits
from ppvae.data.split import (
    Binarize,
    Split,
    binarised,
    check_at_least,
    check_binarize,
    check_choice,
    check_unit_interval,
)

PIECE = 2**22  # values of a mapped file that are checked together
# What holds all the values of several pieces is the last of their supports in this order, but for
# halves beside counts, which are "real".
WIDENING: tuple[Support, ...] = ("binary", "unit_interval", "counts", "integer", "real")
WITHIN: dict[Support, set[Support]] = {
    "binary": {"binary"},
    "unit_interval": {"binary", "unit_interval"},
    "counts": {"binary", "counts"},
    "integer": {"binary", "counts", "integer"},
    "real": set(get_args(Support)),
}


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
    missing: Literal["mask"] | None = None,
    seed: int = 0,
    name: str = "arrays",
) -> Dataset:
    """A ``Dataset`` from arrays or tensors: checked, split at random (by class), copied.

    A file mapped into memory, ``np.load("x.npy", mmap_mode="r")``, is not copied: the training part
    stays in the file and ``ppvae.fit`` reads it batch by batch. It is checked here once, in pieces.
    The validation and test parts are read into memory: give numbers of rows.

    Numbers are stored in the default float dtype. A column that it cannot hold is named in a
    warning: whole numbers that do not stay what they are (counts beyond 2^24 in float32), errors
    above a thousandth of the column's standard deviation (timestamps, a large offset), or one in
    ten distinct values lost. Subtract the offset, or make float64 the default dtype first.

    Args:
        x: ``(N, D)`` rows, ``(N, H, W)`` or ``(N, C, H, W)`` images; finite numbers, N >= 3. Of a
            data frame, messages take the names of the columns.
        y: ``(N,)`` labels, whole numbers 0..C-1; or ``(N, D)`` real conditions; or None.
        valid: rows for validation: a share in (0, 1) or a number of rows.
        test: rows for testing, likewise.
        support: see ``Dataset``. None infers it: all in {0, 1} "binary"; all in [0, 1]
            "unit_interval"; whole numbers, none negative "counts"; whole numbers "integer"; else
            "real". ``source`` states what was inferred.
        shape: natural shape of one row, if ``x`` is flat: (1, 28, 28) for rows of 784.
        binarize: "dynamic" or "static" for ``x`` in [0, 1] read as grey levels, so that the model
            sees Bernoulli draws (see ``Split``); else None.
        flatten: store each row flat, ``(N, D)``, keeping its shape in ``shape``.
        missing: "mask": NaN in ``x``, and what a data frame calls missing, is not observed. A batch
            is then ``(x, observed)``, or ``(x, y, observed)``, as ``models.Masked`` and
            ``nets.Masked`` take it; x is 0 where nothing is observed. None: NaN is refused.
        seed: of the split and of the binarisation, 0 or more.
        name: of the data set.

    Raises:
        TypeError: arrays of objects, text or complex numbers.
        ValueError: empty, NaN or infinite ``x``, wrong rank, channels last, 8-bit images without
            ``support``, values outside ``support``, bad labels, or a split with no rows; with
            ``missing="mask"`` a row, or a column of all or of the training rows, without any value.

    Warns:
        PrecisionWarning: what columns of ``x``, or of conditions ``y``, lose.

    Example:
        >>> generator = torch.Generator().manual_seed(0)
        >>> mine = from_arrays(torch.randn(100, 3, generator=generator), torch.arange(100) % 2)
        >>> mine.support, mine.num_classes, len(mine.train), len(mine.valid), len(mine.test)
        ('real', 2, 80, 10, 10)
    """
    check_binarize(binarize)
    check_choice("missing", missing, ("mask", None))
    framed, observed = is_frame(x), None
    columns = x.columns if framed else None
    array = numbers(numeric(x, "x") if missing and framed else x, "x")
    if missing is not None:
        array, observed = without_gaps(array, columns)
    _check_rows(array, support)
    natural_shape = _natural_shape(array.shape[1:], shape)
    mapped, lossy = isinstance(x, np.memmap), lossy_columns(array)
    given = support
    if len(lossy) and support is None:  # rounding may have made whole numbers of them
        supports = {infer_support(torch.from_numpy(p.astype(np.float64))) for _, p in pieces(array)}
        given = _widest(supports)
    if mapped:
        values, found = _map_tensor(array), _support_by_pieces(array, given, binarize)
    else:
        values, found = _checked_values(array, "x", given, binarize)
    found = found if given is None else given
    warn_of_lost_digits(array, lossy, "x", columns)
    labels, num_classes = (None, None) if y is None else _labels_or_conditions(y, len(values))
    by_class = None if num_classes is None else np.asarray(labels)
    index = [torch.from_numpy(i) for i in split_rows(len(values), valid, test, seed, by_class)]
    if observed is not None:
        values[~observed] = 0
        require_columns(observed[index[0]], "the training part of x", columns)
        observed = observed.flatten(1) if flatten else observed
    values = values.flatten(1) if flatten else values

    def part(rows: Tensor, stays: bool) -> Split:
        own_y = None if labels is None else labels[rows]
        if stays:
            return Split(values, own_y, rows=rows)
        own_mask = None if observed is None else observed[rows]
        return Split(values[rows].to(torch.get_default_dtype()), own_y, observed=own_mask)

    parts = [part(rows, stays=mapped and rows is index[0]) for rows in index]
    stated = f"support {found!r} inferred" if support is None else f"support {support!r} given"
    if observed is not None:
        stated += f"; {1 - observed.double().mean():.1%} of the values missing"
    how = "at random" if num_classes is None else "at random by class"
    return Dataset(
        name,
        *binarised(parts, binarize, seed),
        support="binary" if binarize else found,
        shape=natural_shape,
        num_classes=num_classes,
        source=f"arrays of the user; {stated}; split {how}, seed {seed}",
    )


def _check_rows(array: np.ndarray, support: Support | None) -> None:
    """Raise ``ValueError`` unless ``x`` is rows or images, channels first, in known units."""
    shape = array.shape
    if array.ndim not in (2, 3, 4):
        cure = "give (N, D), (N, H, W) or (N, C, H, W); of N single numbers x[:, None]"
        raise ValueError(f"x has shape {shape}: {cure}")
    if array.ndim == 4 and shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4):
        cure = "use np.transpose(x, (0, 3, 1, 2)) or x.permute(0, 3, 1, 2) for (N, C, H, W)"
        raise ValueError(f"x has shape {shape}, channels last: {cure}")
    if array.dtype == np.uint8 and array.max() > 1 and support is None:
        raise ValueError(f"x is uint8, up to {array.max()}: give x / 255, or support='counts'")


def _natural_shape(event: tuple[int, ...], shape: tuple[int, ...] | None) -> tuple[int, ...]:
    size = math.prod(event)
    if shape is not None and not _are_sizes(shape):
        raise TypeError(f"shape={shape!r}: give sizes, such as (1, 28, 28)")
    if shape is not None and math.prod(shape) != size:
        seen = f"shape={shape} has {math.prod(shape)} values and a row of x {size}"
        raise ValueError(f"{seen}: make them agree")
    return tuple(event if shape is None else shape)


def _are_sizes(shape: Any) -> bool:
    """Whether it is a tuple or a list of whole numbers from 1."""
    return isinstance(shape, (tuple, list)) and all(
        isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 1 for n in shape
    )


def _map_tensor(array: np.ndarray) -> Tensor:
    """A mapped file as a tensor on the same memory."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")  # nor do we
        try:
            return torch.from_numpy(array)
        except (TypeError, ValueError) as error:  # other byte orders raise the latter
            raise TypeError(f"torch cannot map {array.dtype}: store float32 or uint8") from error


def _support_by_pieces(
    array: np.ndarray, support: Support | None, binarize: Binarize | None
) -> Support:
    """The support of a mapped array, found piece by piece."""
    found: set[Support] = set()
    for first, piece in pieces(array, PIECE):
        name = f"x (rows {first} to {first + len(piece) - 1})"
        found.add(_checked_values(piece, name, support, binarize)[1])
    return _widest(found)


def _widest(found: set[Support]) -> Support:
    """The support of all pieces together."""
    if "unit_interval" in found and found & {"counts", "integer"}:
        return "real"
    return max(found, key=WIDENING.index)


def _checked_values(
    array: np.ndarray, name: str, support: Support | None, binarize: Binarize | None
) -> tuple[Tensor, Support]:
    """A copy as a tensor, and the support that its values show; raises if they do not fit."""
    values = _finite(array, name)
    found = infer_support(values)
    if support is not None:
        check_choice("support", support, get_args(Support))
    if support is not None and found not in WITHIN[support]:
        low, high = float(values.min()), float(values.max())
        seen = f"support={support!r}, and x ranges from {low:g} to {high:g}"
        raise ValueError(f"{seen}: rescale x or give support={found!r}")
    if binarize is not None:
        check_unit_interval(values, f"x (binarize={binarize!r})")
    return values, found


def infer_support(values: Tensor) -> Support:
    """The narrowest support that holds all values; see ``from_arrays``.

    Example:
        >>> infer_support(torch.tensor([[0.0, 3.0]])), infer_support(torch.tensor([[0.0, 0.5]]))
        ('counts', 'unit_interval')
    """
    low, high = float(values.min()), float(values.max())
    if bool((values == values.round()).all()):
        return "integer" if low < 0 else "counts" if high > 1 else "binary"
    return "unit_interval" if low >= 0 and high <= 1 else "real"


def split_rows(
    num: int, valid: float | int, test: float | int, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Row numbers of train, valid and test: disjoint, covering, seeded, by class with labels.

    Each class is spread evenly over one ordering of all rows, so any stretch of it holds
    every class in its share, give or take a row; test is the first stretch, then valid, then train.

    Raises:
        ValueError: some part would have no rows, or ``seed`` is negative.

    Example:
        >>> [len(part) for part in split_rows(10, 0.2, 3, seed=0)]
        [5, 2, 3]
    """
    seed = single(seed)
    check_at_least(0, seed=seed)
    num_valid, num_test = _size("valid", valid, num), _size("test", test, num)
    if num_valid + num_test >= num:
        seen = f"x has {num} rows, valid takes {num_valid} and test {num_test}"
        raise ValueError(f"{seen}: train needs at least 1")
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
    share = single(share)
    if isinstance(share, float) and 0 < share < 1:
        return max(1, round(share * num))
    if isinstance(share, int) and not isinstance(share, bool) and share >= 1:
        return int(share)
    raise ValueError(f"{name}={share!r}: give a share in (0, 1) or a number of rows, 1 or more")


def numbers(array: Any, name: str) -> np.ndarray:
    """``array`` as numpy numbers, not yet of a float type."""
    columns = array.dtypes if is_frame(array) else None
    if hasattr(array, "obs") and hasattr(array, "X"):
        raise TypeError(f"{name} is an AnnData: data.from_anndata takes it, or give {name}.X")
    if hasattr(array, "tocsr"):
        raise TypeError(f"{name} is sparse: give {name}.toarray(), or counts to data.from_counts")
    if hasattr(array, "column_names") and hasattr(array, "to_pandas"):
        raise TypeError(f"{name} is a {type(array).__name__} of columns: give {name}.to_pandas()")
    if isinstance(array, Tensor):
        array = _plain(array, name)
    if isinstance(array, np.ma.MaskedArray) and np.ma.is_masked(array):
        raise ValueError(
            f"{name} is a masked array, and {int(np.ma.getmaskarray(array).sum())} of its values "
            f"are hidden: fill them in, or give {name}.filled(np.nan) and missing='mask'"
        )
    try:
        array = np.asarray(array)
    except RuntimeError as error:  # torch's, of a list of tensors
        raise TypeError(f"{name} holds tensors that numpy cannot read: {error}") from error
    except ValueError as error:  # numpy's "inhomogeneous shape"
        raise ValueError(f"{name} has rows of different lengths: pad or cut them") from error
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} {_no_numbers(array, name, columns)}")
    if array.size == 0:
        raise ValueError(f"{name} is empty, shape {array.shape}: give at least 3 rows")
    return array


def _plain(values: Tensor, name: str) -> Tensor:
    """A tensor that numpy takes; raises ``TypeError`` for one without a dense block of numbers."""
    values = require_dense(name, values).detach().cpu().resolve_conj().resolve_neg()
    small = values.dtype == torch.bfloat16 or values.element_size() == 1  # numpy has no such floats
    return values.float() if values.is_floating_point() and small else values


def _no_numbers(array: np.ndarray, name: str, columns: Any) -> str:
    """What an array holds in the place of numbers, and how to get them."""
    if hasattr(columns, "items"):
        odd = [
            f"{c!r}: {kind}"
            for c, kind in columns.items()
            if not isinstance(kind, np.dtype) or kind.kind not in "biuf"
        ]
        shown = ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
        return (
            f"has columns that are no numbers of numpy, {shown}: give {name}.astype(float) where "
            "they are numbers with missing ones (and missing='mask'), pandas.get_dummies for words"
        )
    words = array.dtype.kind == "O" and array.size and all(isinstance(v, str) for v in array.flat)
    if array.dtype.kind in "USTO" and (words or array.dtype.kind != "O"):
        how = f"as np.unique({name}, return_inverse=True)[1] does"
        return f"holds words ({array.dtype}): code them as numbers, {how}"
    return f"holds {array.dtype}: give real numbers, dense"


def _finite(array: np.ndarray, name: str) -> Tensor:
    """A copy as a tensor of the default dtype, if all is finite."""
    dtype = torch.get_default_dtype()
    with np.errstate(over="ignore"):
        values = torch.from_numpy(array.astype(float_type())).to(dtype)
    bad = ~values.isfinite()
    if bool(bad.any()):
        row = int(bad.reshape(len(bad), -1).any(1).int().argmax())
        seen = f"{int(bad.sum())} NaN or infinite values (as {dtype}), the first in row {row}"
        cure = "drop those rows or fill them in" + (
            ", or give missing='mask' if NaN is what is missing" if name == "x" else ""
        )
        raise ValueError(f"{name} has {seen}: {cure}")
    return values


def _labels_or_conditions(y: Any, num: int) -> tuple[Tensor, int | None]:
    """``y`` as int64 labels ``(N,)`` and their number, or as float conditions ``(N, D)``."""
    array = numbers(y, "y")
    if array.ndim not in (1, 2) or len(array) != num:
        seen = f"y has shape {array.shape} and x {num} rows"
        raise ValueError(f"{seen}: give ({num},) labels or ({num}, D) conditions")
    values = _finite(array, "y")
    if array.ndim == 2:
        warn_of_lost_digits(array, lossy_columns(array), "y", getattr(y, "columns", None))
        return values, None
    labels = class_labels(array, "y", ", or give (N, 1) conditions")
    return labels, int(labels.max()) + 1


def class_labels(array: Any, name: str, otherwise: str = "") -> Tensor:
    """Labels ``(N,)`` as int64, if they are whole numbers from 0; ``otherwise`` is another cure."""
    array = numbers(array, name)
    bad = ~(np.isfinite(array) & (array == np.round(array)) & (array >= 0))
    if bad.any():
        row = int(bad.argmax())
        seen = f"{int(bad.sum())} labels that are not whole numbers from 0, the first in row {row}"
        cure = f"Number the classes 0..C-1{otherwise}"
        if (array[bad] == -1).all():
            cure += (
                f"; if -1 is no label, as for models.M2, fit on the arrays themselves, (x, {name})"
            )
        raise ValueError(f"{name} has {seen}: {float(array[row]):g}. {cure}")
    return torch.from_numpy(array.astype(np.int64))
