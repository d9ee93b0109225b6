"""What an encoder sees of a table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Columns(nn.Module):
    r"""The columns of a table as features of about unit size: put it before an encoder's network.

    Numbers, ordered levels and binary columns are standardised; counts :math:`c` are
    :math:`\log(1 + c)`, standardised; a category of C levels is C features, one of them 1. A NaN, a
    cell that is missing, gives features of 0: that is the mean of a number, and no level of a
    category. Numbers behind the table's columns, such as a mask or a condition, pass as they are.

    Args:
        table: a :class:`ppvae.data.Table`, or what has its ``columns``.

    Attributes:
        out_features: how many features D columns make.

    Raises:
        ValueError: when called, with fewer numbers than the table has columns.

    Example:
        >>> import pandas as pd
        >>> from ppvae import data, nets
        >>> frame = pd.DataFrame({"age": [20.0, 30.0, 64.0], "job": ["smith", "nurse", "clerk"]})
        >>> table = data.Table.fit(frame)
        >>> features = nets.Columns(table)
        >>> features(table.to_tensor(frame))  # the age; clerk, nurse, smith
        tensor([[-0.8824,  0.0000,  0.0000,  1.0000],
                [-0.2038,  0.0000,  1.0000,  0.0000],
                [ 1.0862,  1.0000,  0.0000,  0.0000]])
        >>> net = nn.Sequential(features, nets.mlp(features.out_features, 16, 4))
        >>> net(table.to_tensor(frame)).shape
        torch.Size([3, 4])
    """

    loc: Tensor
    scale: Tensor
    counts: Tensor
    single: Tensor

    def __init__(self, table: Any) -> None:
        super().__init__()
        columns = list(table.columns)
        self.num_columns = len(columns)
        self.categories = tuple(
            (i, column.num_levels) for i, column in enumerate(columns) if column.kind == "category"
        )
        single = [(i, c) for i, c in enumerate(columns) if c.kind != "category"]
        floats = torch.get_default_dtype()
        self.register_buffer("single", torch.tensor([i for i, _ in single], dtype=torch.long))
        self.register_buffer("counts", torch.tensor([c.kind == "count" for _, c in single]).bool())
        self.register_buffer("loc", torch.tensor([c.loc for _, c in single], dtype=floats))
        self.register_buffer("scale", torch.tensor([c.scale for _, c in single], dtype=floats))
        self.out_features = len(single) + sum(num for _, num in self.categories)

    def forward(self, x: Tensor) -> Tensor:
        """From ``(..., D + E)`` to ``(..., out_features + E)``."""
        if x.shape[-1] < self.num_columns:
            raise ValueError(
                f"the table has {self.num_columns} columns, and the rows are {tuple(x.shape)}"
            )
        single = x[..., self.single]
        # clamped, so that what is not a count makes no NaN in a gradient
        logs = torch.where(self.counts, single, 0.0).clamp(min=0.0).log1p()
        values = (torch.where(self.counts, logs, single) - self.loc) / self.scale
        features = [torch.where(single.isnan(), 0.0, values)]
        for i, num in self.categories:
            levels = torch.arange(num, device=x.device)
            features.append((x[..., i, None] == levels).to(x.dtype))
        return torch.cat([*features, x[..., self.num_columns :]], -1)

    def extra_repr(self) -> str:
        return f"{self.num_columns} columns, {self.out_features} features"
