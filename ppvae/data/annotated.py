"""AnnData, the container of single-cell counts: what a program is called with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ppvae.data.sparse import SparseRows
from ppvae.data.table import Table


def from_anndata(
    annotated: Any,
    layer: str | None = None,
    covariates: Sequence[str] | Table = (),
    offset: str | None = None,
) -> dict[str, Any]:
    r"""The arguments of a model of counts, by name, for ``fit`` and every evaluator.

    ``x`` are the counts, sparse if they are stored so: ``ppvae.fit`` makes them dense a batch at a
    time (an evaluator makes all that it is given dense, so give it some of the cells). ``y`` are
    covariates of the cells as features: one for each level of a word column, and one for each
    number, standardised. ``offset`` is the log exposure, for heads with a rate: by default none,

    .. math:: \text{offset}_n = \log \sum_g x_{ng} \quad\text{with offset="library"}

    Args:
        annotated: an ``anndata.AnnData`` of N cells.
        layer: the name of the counts among its ``layers``; None: its ``X``.
        covariates: columns of its ``obs``; or the ``Table`` that was fitted to these columns of all
            cells, so that the levels of some cells have the same places.
        offset: "library", a column of ``obs`` that holds exposures > 0, or None.

    Returns:
        ``x``, and ``y`` and ``offset`` where they are asked for.

    Raises:
        ValueError: no such layer or column; a cell without a count, or with an exposure that is
            not positive, for an offset.

    Example:
        >>> from types import SimpleNamespace
        >>> import pandas as pd, scipy.sparse
        >>> obs = pd.DataFrame({"batch": ["a", "b", "b"]}, index=["cell1", "cell2", "cell3"])
        >>> cells = SimpleNamespace(X=scipy.sparse.csr_array([[0, 2], [1, 0], [3, 1]]), obs=obs)
        >>> data = from_anndata(cells, covariates=["batch"], offset="library")
        >>> data["y"].tolist(), data["offset"].exp()
        ([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], tensor([2., 1., 4.]))
    """
    x = annotated.X if layer is None else _named(annotated.layers, layer, "layers")
    if x is None:
        raise ValueError("the AnnData has no X: name one of its layers, layer='counts'")
    found: dict[str, Any] = {"x": SparseRows(x) if hasattr(x, "tocsr") else np.asarray(x)}
    obs = annotated.obs
    if not isinstance(covariates, Table) and covariates:
        for name in covariates:
            _named(obs, name, "obs")
        covariates = Table.fit(obs[list(covariates)])
    if isinstance(covariates, Table):
        found["y"] = features(covariates, obs)
    if offset == "library":
        total, seen = np.asarray(x.sum(1)).ravel(), "has no count"
    elif offset is not None:
        total, seen = _named(obs, offset, "obs").to_numpy(float), f"has no {offset!r} above 0"
    if offset is not None:
        bad = np.flatnonzero(~(total > 0))
        if len(bad):
            raise ValueError(
                f"cell {obs.index[bad[0]]!r} {seen}, as have {len(bad) - 1} more, so it has no log "
                "exposure: leave these cells out"
            )
        found["offset"] = torch.from_numpy(np.log(total)).to(torch.get_default_dtype())
    return found


def features(table: Table, frame: Any) -> torch.Tensor:
    """Columns as features of about unit size, ``(N, E)``: what is not words is standardised."""
    codes, parts = table.to_tensor(frame, torch.float64), []
    for column, values in zip(table.columns, codes.T, strict=True):
        if bool(values.isnan().any()):
            raise ValueError(f"column {column.name!r} has missing cells: fill them, or drop it")
        if column.levels:
            parts.append((values[:, None] == torch.arange(column.num_levels)).double())
        else:
            values = values.log1p() if column.kind == "count" else values
            parts.append(((values - column.loc) / column.scale)[:, None])
    return torch.cat(parts, 1).to(torch.get_default_dtype())


def _named(held: Any, name: str, where: str) -> Any:
    if name not in held:
        has = ", ".join(map(repr, list(held)[:8]))
        raise ValueError(f"the AnnData has no {name!r} in its {where}: it has {has or 'nothing'}")
    return held[name]
