"""History: what :func:`ppvae.fit` saw, epoch by epoch."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class History:
    """What :func:`fit` saw, one row per epoch.

    Attributes:
        name: what the numbers are, e.g. ``"IWELBO-8"``.
        rows: per epoch: ``epoch`` (from 1, going on over calls of ``fit``), ``step`` (updates so
            far), ``train_objective`` (the mean over the epoch of what is maximised, any weight on
            the KL included), ``valid_bound`` (the bound on log p(x), its weight always 1; absent
            without validation data; ``valid_estimate`` where a log-density is an estimate, so that
            there is no bound), ``kl_weight`` and other weights of the estimator, such as ``gamma``,
            where they change, ``skipped`` (updates withheld, with ``SVI(skip_nonfinite=True)``),
            ``lr``, ``seconds`` (training only). Nats per datapoint, larger is better.
        best_epoch: the epoch with the largest validation bound after warm-up, or None.
        stopped_early: whether patience ran out.
        interrupted: whether Ctrl-C or a termination signal ended it before its time.

    Example:
        >>> from ppvae import History
        >>> history = History("ELBO", [dict(epoch=1, step=10, train_objective=-9.5, seconds=0.1)])
        >>> print(history.table())
        ELBO [nats per datapoint]
        epoch  step  train_objective  seconds
            1    10            -9.50     0.10
    """

    name: str
    rows: list[dict[str, float]] = field(default_factory=list)
    best_epoch: int | None = None
    stopped_early: bool = False
    interrupted: bool = False

    def column(self, name: str) -> list[float]:
        """One column, e.g. ``history.column("valid_bound")``; NaN where a row lacks it."""
        return [row.get(name, math.nan) for row in self.rows]

    def table(self, last: int = 10) -> str:
        """The last rows, and the best, as text."""
        chosen = self.rows[-last:]
        if self.best_epoch is not None and self.best_epoch < chosen[0]["epoch"]:
            chosen = [row for row in self.rows if row["epoch"] == self.best_epoch] + chosen
        if not chosen:
            return f"{self.name}: no epoch yet"
        heads = list(dict.fromkeys(head for row in chosen for head in row))
        form = {"epoch": ".0f", "step": ".0f", "lr": ".2e"}
        cells = [
            [format(row[h], form.get(h, ".2f")) if h in row else "" for h in heads]
            for row in chosen
        ]
        widths = [max(len(h), *(len(row[i]) for row in cells)) for i, h in enumerate(heads)]
        lines = [
            "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True))
            for row in [heads, *cells]
        ]
        for i, row in enumerate(chosen):
            if row["epoch"] == self.best_epoch:
                lines[i + 1] += "  (best)"
        return "\n".join([f"{self.name} [nats per datapoint]", *lines])

    def plot(self, ax: Any = None) -> Any:
        """Training and validation curve, see :func:`ppvae.plots.training_curve`."""
        from ppvae import plots

        names = [n for n in ("valid_bound", "valid_estimate") if any(n in row for row in self.rows)]
        valid = self.column(names[0]) if names else None
        return plots.training_curve(self.column("train_objective"), valid, ax=ax, name=self.name)

    def __repr__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        import pandas

        frame = pandas.DataFrame(self.rows)
        caption = f"{self.name} [nats per datapoint]"
        if self.best_epoch is not None:
            caption += f", best in epoch {self.best_epoch}"
        whole = {"epoch": "{:.0f}".format, "step": "{:.0f}".format, "lr": "{:.2e}".format}
        table = frame.to_html(
            index=False, max_rows=20, float_format="{:.2f}".format, na_rep="", formatters=whole
        )
        return table.replace("<thead>", f"<caption>{html.escape(caption)}</caption><thead>", 1)
