"""The container that rows came in, which is the one that what was made of them goes out in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ppvae.data.frames import backend_of, frame_of_numbers, is_frame
from ppvae.intake import tensors
from ppvae.wrapped import argument_names


class Container:
    """What rows came in, and so what goes out.

    Args:
        args: what a verb was given.
        table: a ``data.Table``, or None.
    """

    def __init__(self, args: Sequence[Any], table: Any) -> None:
        self.args, self.table = tuple(args), table
        self.first: Any = self.args[0] if self.args else None

    def coded(self, value: Any) -> Any:
        """A frame with words as its table's numbers."""
        coded = self.table is not None and is_frame(value)
        return self.table.to_tensor(value) if coded else value

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
