"""The head of a table whose columns are of different kinds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.distributions import Independent

from ppvae import distributions
from ppvae.conditionals.heads import Conditional

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
        if not columns:
            raise ValueError("Columns needs a column: {'age': conditionals.Normal, ...}")
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
