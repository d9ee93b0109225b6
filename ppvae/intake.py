"""Data as people have them -> the tensors that a program is called with, and back.

The one place that knows the containers: everything that takes data asks :func:`tensors`, or
:func:`for_training` where a batch may be made later. What a container is, is told by what it can
do, so none of their libraries is needed.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    default_collate,
)

from ppvae.data.arrays import numbers
from ppvae.data.columnar import is_hugging_face, stays
from ppvae.data.frames import backend_of, frame_of_numbers, is_frame, numeric
from ppvae.data.precision import lossy_columns, warn_of_lost_digits
from ppvae.data.sparse import SparseArguments, SparseRows
from ppvae.data.stored import Stored, in_order
from ppvae.data.table import Table
from ppvae.program import module_of
from ppvae.wrapped import Last, argument_labels, argument_names

P = ParamSpec("P")
R = TypeVar("R")


def takes_rows(function: Callable[P, R]) -> Callable[P, R]:
    """Give an evaluator tensors in its ``*args``, whatever container they come in.

    What is before ``*args`` are the programs; the first of them says what its arguments are called.

    Example:
        >>> @takes_rows
        ... def total(program, *args):
        ...     return [arg.sum().item() for arg in args]
        >>> total(lambda x, y: None, {"y": np.ones(3), "x": np.zeros((3, 2))})
        [0.0, 3.0]
    """
    named = [*inspect.signature(function).parameters.values()]
    kinds = [parameter.kind for parameter in named]
    start = kinds.index(inspect.Parameter.VAR_POSITIONAL)

    @functools.wraps(function)
    def call(*given: P.args, **kwargs: P.kwargs) -> R:
        programs, args = given[:start], given[start:]
        if programs:
            args = tensors(args, *programs)
        return function(*programs, *args, **kwargs)  # type: ignore[arg-type]

    return call


def tensors(args: Sequence[Any], *programs: Any) -> tuple[Any, ...]:
    """What programs are called with: tensors, and what holds no rows as it is.

    Tensors stay as they are. Of other arrays the first becomes floats of the programs' dtype, and
    so do floats behind it; whole numbers behind it are labels, and stay whole, as do masks.

    Args:
        args: arrays, frames and tensors in the order of the arguments; or one container of all of
            them: a mapping by their names, a ``TensorDataset``, a data set of torch or Hugging
            Face, a split of a ``ppvae.data.Dataset``, an AnnData (its ``X``).
        programs: whose arguments they are; the first says their names.

    Raises:
        TypeError: words or objects; a ``DataLoader``, a mapping of other names.

    Warns:
        PrecisionWarning: what float64 and large whole numbers lose.

    Example:
        >>> x, y = tensors([np.zeros((2, 3)), np.array([1, 0])], lambda x, y: None)
        >>> x.dtype, y.dtype
        (torch.float32, torch.int64)
    """
    if all(isinstance(arg, Tensor) for arg in args):
        return tuple(map(_ordinary, args))
    found = _columns(args, programs)
    return tuple(_dense(value) for value in found)


def for_training(data: Any, label: str, batch_size: int, seed: int, *programs: Any) -> Any:
    """What :func:`ppvae.fit` cuts its batches from: tensors, a split, or a ``DataLoader``.

    Sparse rows stay sparse, and the rows of a file or a store where they are, with what is given
    beside them. Those of a data set of torch come by a ``DataLoader``, shuffled by the seed.

    Raises:
        TypeError: it is no container of rows.
    """
    if isinstance(data, (DataLoader, Tensor)) or _is_split(data):
        return data
    if isinstance(data, Stored) or any(map(stays, _parts(data))):
        return _stored(data, label, programs)
    if _is_dataset(data):
        rows = _with_tensors(data, programs)
        if isinstance(rows, IterableDataset) or (
            hasattr(rows, "__iter__") and not hasattr(rows, "__len__")
        ):
            return DataLoader(rows, batch_size)
        if not hasattr(rows, "__len__"):
            raise TypeError(
                f"{label}: {type(data).__name__} does not say how many rows it has: give it a "
                "__len__, or a DataLoader with a sampler of its own"
            )
        if not len(rows):
            raise ValueError(f"{label} is empty: {type(data).__name__} has no rows")
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(rows, batch_size, shuffle=label == "data", generator=generator)
    given = data if isinstance(data, (tuple, list)) else (data,)
    found = _columns(given, programs)
    odd = [value for value in found if not isinstance(value, (Tensor, SparseRows))]
    if odd or not found:
        seen = ", ".join(dict.fromkeys(type(value).__name__ for value in odd)) or "nothing"
        raise TypeError(
            f"{label} must be arrays, tensors, a frame, a mapping of these, a data set or a "
            f"DataLoader, got {seen}"
        )
    if any(isinstance(value, SparseRows) for value in found):
        return SparseArguments(found)
    return found


def _parts(data: Any) -> Sequence[Any]:
    """One container, or what a tuple, a list or a dictionary holds."""
    if isinstance(data, Mapping):
        return list(data.values())
    return data if isinstance(data, (tuple, list)) else [data]


def _stored(data: Any, label: str, programs: Sequence[Any]) -> Stored:
    """Rows in a store, in the order of the programs' arguments and in their precision."""
    if is_hugging_face(data):
        _require_arguments(data, programs)
    found = copy(data) if isinstance(data, Stored) else Stored(data)
    if not len(found):
        raise ValueError(f"{label} is empty: {type(data).__name__} has no rows")
    names = argument_names(programs[0]) if programs else []

    def arranged(got: Any) -> Sequence[Any]:
        if isinstance(got, Mapping):
            return by_name(got, names, f"{label}: its rows are")
        return in_order(got)

    found.arranged, found.dtype = arranged, _dtype(programs)
    return found


def part_of(data: Any, name: str, otherwise: Any) -> Any:
    """The split of a ``ppvae.data.Dataset`` by its name; of other data what is given for it."""
    part = getattr(data, name, None)  # a frame may have a column of this name
    return part if _is_split(part) or isinstance(part, DataLoader) else otherwise


def _columns(args: Sequence[Any], programs: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments one by one, sparse ones still sparse."""
    if len(args) == 1:
        args = _unpacked(args[0], programs)
    dtype = _dtype(programs)
    labels = argument_labels(programs[0] if programs else None, len(args))
    return tuple(_rows(arg, labels[i], i == 0, dtype) for i, arg in enumerate(args))


def _unpacked(data: Any, programs: Sequence[Any]) -> Sequence[Any]:
    """The arguments that one container holds."""
    if isinstance(data, DataLoader):
        raise TypeError("a DataLoader cuts batches for training; give its dataset here")
    if isinstance(data, TensorDataset):
        return data.tensors
    if _is_split(data):
        args: Sequence[Any] = data.args
        return args
    if isinstance(data, Stored):  # all of it, so a part: stored[:1000]
        rows = _stored(data, "the data", programs)
        return rows.present(*rows.read(torch.arange(len(rows))), epoch=0, key=0)
    if _is_dataset(data):
        if isinstance(data, IterableDataset) or not hasattr(data, "__len__"):
            raise TypeError(f"{type(data).__name__} is a stream: give tensors, or data with rows")
        if not len(data):
            raise ValueError(f"no data: {type(data).__name__} has no rows")
        rows = _with_tensors(data, programs)
        data = default_collate([rows[i] for i in range(len(rows))])
        if isinstance(data, (tuple, list)):
            return data
    if isinstance(data, Mapping):
        return by_name(data, argument_names(programs[0]) if programs else [], "the data are")
    return [data]


def by_name(data: Mapping[Any, Any], names: Sequence[str], label: str) -> list[Any]:
    """A mapping's values in the order of a program's arguments.

    Raises:
        TypeError: names that the program has not, or without one that comes before another.
    """
    last = [name for name in names if isinstance(name, Last) and name in data]
    count = len(data) - len(last)
    absent = [name for name in names[:count] if name not in data or name in last]
    unknown = [name for name in data if name not in names]
    if absent or unknown:
        has = ", ".join(map(repr, data))
        takes = ", ".join(map(repr, names)) or "none by name"
        raise TypeError(
            f"{label} a mapping of {has}, and the model takes {takes}: rename or drop columns, or "
            "name the model's arguments so"
        )
    return [data[name] for name in names if name in data]


def _is_split(data: Any) -> bool:
    return hasattr(data, "batch") and hasattr(data, "args")


def _is_dataset(data: Any) -> bool:
    """A data set of torch or Hugging Face, whose rows are asked for one by one."""
    torch_own = isinstance(data, Dataset) and not isinstance(data, TensorDataset)
    return torch_own or _is_hugging_face(data)


def _is_hugging_face(data: Any) -> bool:
    return hasattr(data, "with_format") and hasattr(data, "column_names") and hasattr(data, "map")


def _with_tensors(data: Any, programs: Sequence[Any]) -> Any:
    """A data set whose rows are tensors; raises ``TypeError`` if its columns are no arguments."""
    if not _is_hugging_face(data):
        return data
    _require_arguments(data, programs)
    return data.with_format("torch")


def _require_arguments(data: Any, programs: Sequence[Any]) -> None:
    """Raise ``TypeError`` for columns of Hugging Face none of which is an argument."""
    columns, names = data.column_names, argument_names(programs[0]) if programs else []
    if columns and names and not set(columns) & set(names):
        raise TypeError(
            f"the data set has the columns {', '.join(map(repr, columns[:5]))}, and the model "
            f"takes {', '.join(map(repr, names))}: give data.to_pandas() if they are columns of "
            f"one table, or rename one, data.rename_column({columns[0]!r}, {names[0]!r})"
        )


def _dtype(programs: Sequence[Any]) -> torch.dtype:
    """The float dtype of the programs' parameters; of a pair without, the default."""
    modules = [module_of(program) for program in programs]
    found = (p.dtype for m in modules if m is not None for p in m.parameters())
    return next((d for d in found if d.is_floating_point), torch.get_default_dtype())


def _ordinary(value: Tensor) -> Tensor:
    """A tensor that gradients can be taken through: not one of inference mode."""
    made_elsewhere = value.is_inference() and not torch.is_inference_mode_enabled()
    return value.clone() if made_elsewhere else value


def _rows(value: Any, name: str, is_first: bool, dtype: torch.dtype) -> Any:
    """One argument: a tensor, sparse rows, or what holds no rows."""
    if isinstance(value, Tensor):
        return _ordinary(value)
    if isinstance(value, SparseRows):
        return value
    if hasattr(value, "obs") and hasattr(value, "X"):  # AnnData
        return _rows(value.X, f"{name} (its X)", is_first, dtype)
    floats = np.float64 if dtype == torch.float64 else np.float32
    if hasattr(value, "tocsr"):
        held = value.tocsr().data[:, None]
        if len(held) and floats == np.float32:
            warn_of_lost_digits(held, lossy_columns(held), name)
        return SparseRows(value, floats)
    columns = None
    if is_frame(value):
        columns = list(value.columns)
        value = numeric(value, name)
    elif hasattr(value, "to_numpy"):  # a column of a frame
        value = value.to_numpy()
    if not hasattr(value, "__array__") or np.ndim(value) == 0:
        return value
    array = numbers(value, name)
    if array.dtype.kind == "b" and not is_first:
        return torch.tensor(array)
    if array.dtype.kind in "iu" and not is_first:
        return torch.from_numpy(array.astype(np.int64))
    if dtype != torch.float64 and array.ndim > 1:
        with np.errstate(invalid="ignore"):
            warn_of_lost_digits(array, lossy_columns(array), name, columns)
    return torch.from_numpy(array.astype(floats)).to(dtype)


def _dense(value: Any) -> Any:
    return value[torch.arange(len(value))] if isinstance(value, SparseRows) else value


# -- and back -----------------------------------------------------------------------------------


class Container:
    """What rows came in, and so what goes out.

    Args:
        args: what a verb was given.
        table: a ``data.Table``, or None.
    """

    def __init__(self, args: Sequence[Any], table: Any) -> None:
        if not isinstance(table, Table | None):
            raise TypeError(f"table must be a data.Table, got {type(table).__name__}")
        self.args, self.table = tuple(args), table
        self.first: Any = self.args[0] if self.args else None

    def coded(self, value: Any) -> Any:
        """A frame with words as its table's numbers."""
        if self.table is None or not is_frame(value):
            return value
        return self.table.to_tensor(value)

    def tensors(self, *programs: Any) -> tuple[Any, ...]:
        """What the programs are called with; of several frames the first is the rows."""
        args, names = self.args, argument_names(programs[0])
        if len(args) == 1 and isinstance(self.first, Mapping):
            rows = names[0] if names and names[0] in self.first else next(iter(self.first), None)
            by_name, self.first = self.first, self.first.get(rows)
            args = ({**by_name, rows: self.coded(self.first)},)
        else:
            args = (*map(self.coded, args[:1]), *args[1:])
        return tensors(args, *programs)

    def each(self, values: Mapping[str, Tensor], like_data: bool = False) -> Any:
        """One container, or of several sites a dictionary."""
        if not values:
            raise ValueError("there is nothing to give back: no such site in the plate 'data'")
        boxed = {name: self.one(value, name, like_data) for name, value in values.items()}
        return boxed if len(boxed) > 1 else next(iter(boxed.values()))

    def one(self, value: Tensor, name: str = "z", like_data: bool = False) -> Any:
        """A tensor in the container of the rows; ``like_data``: it has their columns."""
        value, framed = value.detach(), is_frame(self.first)
        index = getattr(self.first, "index", None) if framed else None  # polars has none
        index = index if index is not None and len(index) == len(value) else None
        if like_data and self.table is not None:
            return self.table.to_frame(self.table.nearest(value), index)
        if self.first is None or isinstance(self.first, (Tensor, Dataset)):
            return value
        array = value.cpu().numpy()
        if not framed or array.ndim > 2:
            return array
        names = [name] if array.ndim == 1 else [f"{name}{i}" for i in range(array.shape[1])]
        if like_data and len(names) == len(self.first.columns):
            names = list(self.first.columns)
        return frame_of_numbers(backend_of(self.first), array, names, index)
