"""Histories: what :func:`ppvae.fit_many` saw, of each seed and over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ppvae.train.history import History
from ppvae.train.svi import SVI

if TYPE_CHECKING:
    import pandas


@dataclass
class Histories:
    """What :func:`fit_many` saw, seed by seed.

    Attributes:
        seeds: in the order that they were given.
        svis: of each seed the SVI; :attr:`pairs` has model and guide.
        histories: of each seed its :class:`History`. Its ``seconds`` are those in which all members
            were trained.
        errors: what ended a member before its time, by seed; its history goes as far as it came.
        reason: why the members took turns, where ``stack="auto"`` had hoped for more; else None.

    Example:
        >>> from ppvae import Histories, History
        >>> rows = lambda *bounds: [dict(epoch=i + 1, valid_bound=b) for i, b in enumerate(bounds)]
        >>> both = [History("ELBO", rows(-9.0, -8.0)), History("ELBO", rows(-8.0, -6.0))]
        >>> Histories([0, 1], [None, None], both).summary()["valid_bound"]
               seeds  mean  quartile_1  median  quartile_3
        epoch
        1          2  -8.5       -8.75    -8.5       -8.25
        2          2  -7.0       -7.50    -7.0       -6.50
    """

    seeds: list[int]
    svis: list[SVI]
    histories: list[History]
    errors: dict[int, Exception] = field(default_factory=dict)
    reason: str | None = None

    @property
    def pairs(self) -> list[tuple[Any, Any]]:
        """Model and guide of each seed, as ``diagnose`` and ``save`` take them."""
        return [(svi.model, svi.guide) for svi in self.svis]

    def frame(self) -> pandas.DataFrame:
        """All rows of all histories, with a first column ``seed``."""
        import pandas

        found = zip(self.seeds, self.histories, strict=True)
        return pandas.DataFrame([{"seed": seed, **row} for seed, h in found for row in h.rows])

    def summary(self) -> pandas.DataFrame:
        """Mean and quartiles over the seeds, by epoch.

        Columns are pairs such as ``("valid_bound", "mean")``; ``"seeds"`` is how many have a
        number: fewer than all where members have ended.
        """
        frame = self.frame().drop(columns="seed", errors="ignore")
        if frame.empty:
            return frame
        return _spread(frame, "epoch")

    def over_seeds(self, measure: Callable[[Any, Any], Any]) -> pandas.DataFrame:
        """What is measured of each pair: mean and quartiles over the seeds.

        Members that an error has ended are left out.

        Args:
            measure: from model and guide to a frame, as :func:`ppvae.compare` makes, or to a
                dictionary of numbers.

        Returns:
            The rows are the frame's (of a dictionary one), the columns those of its numbers as in
            :meth:`summary`.

        Example:
            >>> from types import SimpleNamespace
            >>> from ppvae import Histories, History
            >>> pairs = [SimpleNamespace(model=2.0 * n, guide=1.0) for n in (1, 2)]
            >>> runs = Histories([0, 1], pairs, [History("ELBO"), History("ELBO")])
            >>> runs.over_seeds(lambda model, guide: {"sum": model + guide})["sum"]
               seeds  mean  quartile_1  median  quartile_3
            0      2   4.0         3.5     4.0         4.5
        """
        import pandas

        found = []
        for seed, pair in zip(self.seeds, self.pairs, strict=True):
            if seed not in self.errors:
                measured = measure(*pair)
                whole = isinstance(measured, pandas.DataFrame)
                found.append(measured if whole else pandas.DataFrame([measured]))
        rows = pandas.concat(found).rename_axis("row").select_dtypes("number")
        return _spread(rows.reset_index(), "row").rename_axis(found[0].index.name)

    def plot(self, ax: Any = None) -> Any:
        """Curves of all seeds, their mean and quartiles, see :func:`ppvae.plots.seed_curves`.

        Members that an error has ended are left out.
        """
        from ppvae import plots

        found = zip(self.seeds, self.histories, strict=True)
        whole = [history for seed, history in found if seed not in self.errors]
        rows = [row for history in whole for row in history.rows]
        shown = [n for n in ("valid_bound", "valid_estimate") if any(n in row for row in rows)]
        name = [*shown, "train_objective"][0]
        curves = [history.column(name) for history in whole]
        label = "training" if not shown else "validation"
        return plots.seed_curves(curves, ax=ax, name=f"{label} {self.histories[0].name}")

    def table(self) -> str:
        """The last row of each seed, their mean and quartiles, as text."""
        import pandas

        title = f"{self.histories[0].name} of {len(self.seeds)} seeds [nats per datapoint]"
        frame = self.frame()
        if frame.empty:
            return f"{title}: no epoch yet"
        numbers = ["epoch", "train_objective", "valid_bound", "valid_estimate", "skipped"]
        last = frame.groupby("seed", sort=False).tail(1).set_index("seed")
        last = last[[name for name in numbers if name in last]]
        over_seeds = last.describe().loc[["mean", "25%", "75%"]]
        whole = dict.fromkeys(("epoch", "skipped"), "{:.0f}".format)
        both = pandas.concat([last, over_seeds])
        text = both.to_string(float_format="{:.2f}".format, formatters=whole)
        ended = [f"seed {seed} has ended: {error}" for seed, error in self.errors.items()]
        return "\n".join([title, text, *ended])

    def __repr__(self) -> str:
        return self.table()


def _spread(frame: pandas.DataFrame, by: str) -> pandas.DataFrame:
    """How many numbers there are of one kind, their mean and quartiles, for each column."""
    import pandas

    groups = frame.groupby(by, sort=False)
    columns = {}
    for name in frame.columns.drop(by):
        values = groups[name]
        columns[name, "seeds"] = values.count()
        columns[name, "mean"] = values.mean()
        for q, label in ((0.25, "quartile_1"), (0.5, "median"), (0.75, "quartile_3")):
            columns[name, label] = values.quantile(q)
    return pandas.DataFrame(columns)
