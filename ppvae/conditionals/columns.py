"""The head of a table whose columns are of different kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent

from ppvae import distributions
from ppvae.arguments import require_functions
from ppvae.conditionals.continuous import Affine
from ppvae.conditionals.counts import NegativeBinomial
from ppvae.conditionals.heads import Bernoulli, Categorical, Conditional, Normal
from ppvae.conditionals.levels import Ordinal

Make = Callable[[nn.Module], Conditional]


class Columns(Conditional):
    r"""Independent columns of a table, each with a head of its own, in one tensor ``(N, D)``.

    .. math:: \log p(x \mid z) = \sum_d \log p_d(x_d \mid z)

    A column is given by what makes its head from a network: a head class, or a function such as
    ``lambda net: Categorical(net, 5)`` or ``functools.partial(NegativeBinomial, theta=2.0)``.
    Columns with the very same one share a head, and what it learns of its own. Values are numbers
    of one float tensor; classes are 0, 1, 2, ...

    Args:
        net: outputs ``(..., Columns.width(columns))``, those of the first head for all its
            columns, then those of the second, ...
        columns: by name, in the order of the tensor's columns.

    Raises:
        TypeError: a head is not one of independent values, as ``Multinomial``.
        ValueError: no columns; when called, if the outputs have another width.

    Example:
        >>> import torch
        >>> from functools import partial
        >>> from ppvae.conditionals import Categorical, NegativeBinomial, Normal
        >>> kinds = {
        ...     "age": Normal,
        ...     "visits": NegativeBinomial,
        ...     "job": partial(Categorical, num_classes=5),
        ... }
        >>> Columns.width(kinds)
        9
        >>> head = Columns(nn.Linear(2, 9), kinds)
        >>> x = torch.tensor([[0.3, 7.0, 4.0]])
        >>> nats = head.by_column(x, torch.zeros(1, 2))
        >>> list(nats), nats["age"].shape
        (['age', 'visits', 'job'], torch.Size([1]))

    Part of a row is hidden by ``ppvae.distributions.masked(likelihood(z), observed)``.
    """

    event_dim = 1

    def __init__(self, net: nn.Module, columns: Mapping[str, Make]) -> None:
        super().__init__(net)
        require_functions("columns", columns)
        if not columns:
            raise ValueError("Columns needs a column, columns={'age': conditionals.Normal, ...}")
        self.names = tuple(columns)
        groups = _groups(columns)
        self.places = list(groups.values())
        self.heads = nn.ModuleList(make(nn.Identity()) for make in groups)
        self.widths = _widths(groups)

    @staticmethod
    def width(columns: Mapping[str, Make]) -> int:
        """How many numbers the network has to give for these columns."""
        return sum(_widths(_groups(columns)))

    def num_outputs(self, num_values: int = 1) -> int:
        return sum(self.widths)

    def forward(self, *inputs: Tensor, offset: Tensor | None = None) -> Any:
        """The law of a row; an ``offset``, ``(N,)``, is of all columns that have a rate."""
        outputs = self.outputs(*inputs)
        if outputs.shape[-1] != sum(self.widths):
            raise ValueError(
                f"Columns needs {sum(self.widths)} outputs of its network for these columns, and "
                f"got {tuple(outputs.shape)}: its last layer has Columns.width(columns) units"
            )
        parts = []
        for head, block, at in zip(
            self.heads, outputs.split(self.widths, -1), self.places, strict=True
        ):
            given = {} if offset is None or not takes_offset(head) else {"offset": offset}
            fn = head(block, **given)
            if not isinstance(fn, Independent) or fn.event_shape != (len(at),):
                raise TypeError(
                    f"Columns: the head {type(head).__name__} of {self.names[at[0]]!r} is not one "
                    f"of independent values: its event shape is {tuple(fn.event_shape)}"
                )
            parts.append(fn.base_dist)
        return distributions.Columns(self.names, parts, self.places).to_event(1)

    def by_column(
        self, x: Tensor, *inputs: Tensor, offset: Tensor | None = None
    ) -> dict[str, Tensor]:
        """log p(x_d | z) by name of the column, ``(..., N)`` each, in nats.

        Of a density it is per unit of the column, so numbers of two columns do not compare.
        """
        return self(*inputs, offset=offset).base_dist.by_column(x)


def heads_for(
    table: Any, numbers: Make = Normal, counts: Make = NegativeBinomial
) -> dict[Any, Make]:
    r"""What :class:`Columns` needs for a table: a head for each column, by its kind.

    Numbers have ``Affine(numbers(net), loc, scale)``, with the column's own mean and standard
    deviation, so what the network predicts is about unit size and log p(x) is in the table's
    units: with s_d the scale of a number's column and v its standardised rows,

    .. math:: \log p(x \mid z) = \log p_v(v \mid z) - \sum_d \log s_d

    Counts have ``counts(net)``; binary columns :class:`Bernoulli`, categories
    :class:`Categorical`, ordered ones :class:`Ordinal` with cutpoints of their own. Columns of one
    kind and size share a head. It is a dictionary: put another head in for a column as you like.

    Args:
        table: a :class:`ppvae.data.Table`, or what has its ``columns``.
        numbers: the head of numbers, of a network.
        counts: the head of counts, of a network.

    Example:
        >>> import pandas as pd
        >>> from ppvae import data
        >>> frame = pd.DataFrame({"age": [20.5, 31.0, 64.5], "job": ["smith", "nurse", "clerk"]})
        >>> kinds = heads_for(data.Table.fit(frame))
        >>> Columns.width(kinds)  # mean and log scale of the age, three logits of the job
        5
        >>> head = Columns(nn.Linear(2, 5), kinds)
        >>> age = head(torch.zeros(1, 2)).base_dist.parts[0]
        >>> 20.5 < age.mean.item() < 64.5
        True
    """
    alike: dict[tuple[str, int], list[Any]] = {}
    for column in table.columns:
        alike.setdefault((column.kind, column.num_levels), []).append(column)
    makers = {key: _maker(*key, columns, numbers, counts) for key, columns in alike.items()}
    return {column.name: makers[column.kind, column.num_levels] for column in table.columns}


def _maker(kind: str, num_levels: int, columns: Sequence[Any], numbers: Make, counts: Make) -> Make:
    """What makes the one head of columns of a kind and size."""
    if kind == "count":
        return counts
    if kind == "binary":
        return Bernoulli
    if kind == "category":
        return lambda net: Categorical(net, num_levels)
    if kind == "ordered":
        return lambda net: Ordinal(net, num_levels, shape=len(columns))
    # in float64 until Affine rounds them
    loc, scale = torch.tensor([(c.loc, c.scale) for c in columns], dtype=torch.float64).T
    return lambda net: Affine(numbers(net), loc, scale)


def takes_offset(head: nn.Module) -> bool:
    """Whether a head has a rate, which an offset is added to."""
    inside = getattr(head, "head", None)
    if isinstance(inside, nn.Module):
        return takes_offset(inside)
    return bool(getattr(head, "rate", False))


def _groups(columns: Mapping[str, Make]) -> dict[Make, list[int]]:
    """The columns of each maker of a head."""
    groups: dict[Make, list[int]] = {}
    for i, make in enumerate(columns.values()):
        groups.setdefault(make, []).append(i)
    return groups


def _widths(groups: Mapping[Make, list[int]]) -> list[int]:
    return [make(nn.Identity()).num_outputs(len(at)) for make, at in groups.items()]
