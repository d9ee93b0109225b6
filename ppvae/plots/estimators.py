"""What ``ppvae.compare`` measured: bounds, signal-to-noise ratio, variance against time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ppvae.plots.common import BLUE, MARKERS, PALETTE, axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def bound_against_particles(table: Any, ax: Axes | None = None) -> Axes:
    """Draw every family's bound against the number of draws, and log p(x) as a line.

    Args:
        table: DataFrame of ``ppvae.compare``; rows of one ``family`` are joined. Error bars are two
            standard errors.
        ax: Axes to draw on.

    Returns:
        The axes.

    Example:
        >>> import pandas
        >>> from matplotlib import pyplot as plt
        >>> table = pandas.DataFrame({"family": ["IWELBO"] * 2, "particles": [1, 8],
        ...                           "bound": [-5.0, -4.2], "bound_se": [0.1, 0.05]})
        >>> table.attrs = {"log_evidence": -4.0, "reference": "exact"}
        >>> bound_against_particles(table).get_xlabel()
        'draws per datapoint'
        >>> plt.close("all")
    """
    ax = _families(table, "bound", axes(ax), error="bound_se")
    ax.axhline(table.attrs["log_evidence"], color="black", linestyle="--", linewidth=1,
               label=f"log p(x), {table.attrs['reference']}")  # fmt: skip
    ax.set_ylabel("bound [nats per datapoint]")
    _legend(ax)
    return ax


def snr_against_particles(table: Any, part: str = "guide", ax: Axes | None = None) -> Axes:
    """Draw the gradient's signal-to-noise ratio against the number of draws, both logarithmic.

    Args:
        table: DataFrame of ``ppvae.compare``.
        part: ``"guide"`` or ``"model"``: whose gradient.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: for another part.

    Example:
        >>> import pandas
        >>> from matplotlib import pyplot as plt
        >>> table = pandas.DataFrame({"family": ["IWELBO"] * 2, "particles": [1, 8],
        ...                           "snr_guide": [2.0, 1.0]})
        >>> snr_against_particles(table).get_yscale()
        'log'
        >>> plt.close("all")
    """
    _check_part(part)
    ax = _families(table[table[f"snr_{part}"] > 0], f"snr_{part}", axes(ax))
    ax.set_yscale("log")
    ax.set_ylabel(f"signal-to-noise ratio, {part} gradient")
    _legend(ax)
    return ax


def variance_against_time(table: Any, part: str = "guide", ax: Axes | None = None) -> Axes:
    """Draw the gradient's variance against the time of a loss and gradient, both logarithmic.

    Lower left is better; a dotted line is what averaging more of the first estimator would buy.

    Args:
        table: DataFrame of ``ppvae.compare``, with times.
        part: ``"guide"`` or ``"model"``: whose gradient.
        ax: Axes to draw on.

    Returns:
        The axes.

    Raises:
        ValueError: for another part, or a table without times or variances.

    Example:
        >>> import pandas
        >>> from matplotlib import pyplot as plt
        >>> table = pandas.DataFrame({"family": ["ELBO", "IWELBO"], "particles": [1, 8],
        ...                           "var_guide": [2.0, 1.0], "ms": [1.0, 3.0]})
        >>> variance_against_time(table).get_xlabel()
        'loss and gradient [ms]'
        >>> plt.close("all")
    """
    _check_part(part)
    from matplotlib.ticker import NullLocator

    shown = table[table[f"var_{part}"] > 0]
    if "ms" not in table or shown.empty:
        raise ValueError(
            f"no times, or no variance of the {part} gradient: call compare with timing_rounds >= "
            "1 and an estimator that trains it"
        )
    ax = axes(ax)
    for i, (family, rows) in enumerate(shown.groupby("family", sort=False)):
        ax.plot(rows["ms"], rows[f"var_{part}"], color=PALETTE[i % 10], marker=MARKERS[i % 10],
                linewidth=1, label=family)  # fmt: skip
    first = shown.iloc[0]
    ends = [shown["ms"].min(), shown["ms"].max()]
    ax.plot(ends, [first[f"var_{part}"] * first["ms"] / ms for ms in ends], color=BLUE,
            linestyle=":", linewidth=1, label=f"averaging {first['family']}")  # fmt: skip
    ax.set(xscale="log", yscale="log", xlabel="loss and gradient [ms]",
           ylabel=f"variance of the {part} gradient [nats²]")  # fmt: skip
    low, high = ax.get_xlim()
    ticks = [n * 10.0**e for e in range(-4, 7) for n in (1, 2, 5) if low <= n * 10.0**e <= high]
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.xaxis.set_minor_locator(NullLocator())
    _legend(ax)
    _number_points(ax, shown, f"var_{part}")
    return ax


def _number_points(ax: Axes, rows: Any, column: str) -> None:
    """Write the number of draws beside each point, where neither a point nor a number is."""
    ax.figure.canvas.draw()  # settles the layout, which says where points are on the page
    points = ax.transData.transform(rows[["ms", column]].to_numpy(dtype=float))
    points *= 72 / ax.figure.dpi  # pixels to the unit of font sizes
    taken = [(x, y, 4.0, 4.0) for x, y in points]  # centre and half the size
    for (x, y), (_, row) in zip(points, rows.iterrows(), strict=True):
        text = str(row["particles"])
        width = 2.5 * len(text)
        for right, up in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
            u, v = x + right * (4.5 + width), y + 5 * up
            if all(abs(u - a) >= width + w or abs(v - b) >= 3 + h for a, b, w, h in taken):
                taken.append((u, v, width, 3.0))
                ax.annotate(text, (row["ms"], row[column]), (u - x, v - y), ha="center",
                            va="center", fontsize="x-small", textcoords="offset points",
                            color="#4A4A4A")  # fmt: skip
                break


def _check_part(part: str) -> None:
    if part not in ("guide", "model"):
        raise ValueError(f'part must be "guide" or "model", got {part!r}')


def _families(table: Any, column: str, ax: Axes, error: str | None = None) -> Axes:
    for i, (family, rows) in enumerate(table.groupby("family", sort=False)):
        rows = rows.sort_values("particles")
        spread = 2 * rows[error] if error else None
        ax.errorbar(rows["particles"], rows[column], yerr=spread, color=PALETTE[i % 10],
                    marker=MARKERS[i % 10], linewidth=1.2, capsize=2, label=family)  # fmt: skip
    ax.set_xscale("log", base=2)
    ticks = sorted(set(table["particles"]))
    ax.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    ax.minorticks_off()
    ax.set_xlabel("draws per datapoint")
    return ax


def _legend(ax: Axes) -> None:
    """Above the axes, where it covers nothing."""
    ax.legend(frameon=False, fontsize="x-small", ncols=3, loc="lower left", bbox_to_anchor=(0, 1))
