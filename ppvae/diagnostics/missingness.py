"""A report by the share of each row that a mask hides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ppvae.diagnostics.evidence import Evidence
from ppvae.diagnostics.missing import hidden_site
from ppvae.diagnostics.rows import evaluating, pieces, rows_first, take
from ppvae.pairs import trace

if TYPE_CHECKING:
    import pandas


def by_missingness(
    report: Evidence, pair: Sequence[Any], kl: Tensor | None, bins: int | Sequence[float]
) -> pandas.DataFrame:
    """What ``Report.by_missingness`` says."""
    import pandas

    model, guide, args = pair
    shares, counts = [], []
    with evaluating(model, guide, args, 0):
        for part, _ in pieces(len(report.khat), 1, 2_500):
            _, site, mask = hidden_site(trace(model, take(args, part), {}))
            visible = rows_first(site, mask).flatten(1).cpu()
            shares.append(1 - visible.double().mean(1))
            counts.append(visible.sum(1))
    share, count = torch.cat(shares), torch.cat(counts).double()
    edges = _edges(bins, share)
    which = torch.bucketize(share, edges[1:-1].contiguous())  # a share at an edge is below it
    lines = []
    for i in which.unique().tolist():
        rows = which == i
        line = {
            "share missing": f"{share[rows].min():.0%} to {share[rows].max():.0%}",
            "rows": int(rows.sum()),
            "nats per observed value": _ratio(report.log_evidence[rows], count[rows]),
            "log p(x)": report.log_evidence[rows].mean().item(),
            "gap": report.gap[rows].mean().item(),
            "KL": math.nan if kl is None else kl[rows].mean().item(),
            "ESS": report.ess[rows].median().item(),
            "k-hat": report.khat[rows].median().item(),
            "k-hat > 0.7": (report.khat[rows] > 0.7).double().mean().item(),
        }
        lines.append(line)
    return pandas.DataFrame(lines).set_index("share missing")


def _ratio(nats: Tensor, counts: Tensor) -> float:
    return (nats.sum() / counts.sum()).item() if counts.sum() else math.nan


def _edges(bins: int | Sequence[float], share: Tensor) -> Tensor:
    """Edges of intervals: of as many rows each, or as they are given."""
    if isinstance(bins, int) and not isinstance(bins, bool) and bins >= 1:
        levels = torch.linspace(0, 1, bins + 1, dtype=share.dtype)
        return share.quantile(levels, interpolation="higher")
    edges = torch.as_tensor(bins, dtype=share.dtype)
    if edges.dim() != 1 or len(edges) < 2 or bool((edges.diff() <= 0).any()):
        raise ValueError(
            f"bins={bins!r}: give how many, or the edges of shares in ascending order, (0, 0.5, 1)"
        )
    return edges
