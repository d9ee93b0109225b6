"""A report as pictures and as one self-contained page; its frame is in ``page.py``."""

from __future__ import annotations

import functools
import html
import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppvae.diagnostics.page import PAGE, READING, SCRIPT, STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ppvae.diagnostics.report import Report

_SHOWN = 100  # datapoints in the table of the page, the worst ones
_IMAGES = 10
_INK = "#010203"  # what matplotlib draws in; the page makes it the colour of its text


@dataclass(frozen=True)
class Picture:
    """One picture of a report: its title, what it shows in words, and how to draw it."""

    title: str
    alt: str
    draw: Callable[[Any], Any]
    height: float = 3.3  # inches on the page, of 4.4 wide: small, so that the letters are large


def pictures(report: Report, image_shape: Sequence[int] | None) -> Iterator[Picture]:
    """The pictures that a report has."""
    from ppvae.plots import diagnostics as plots

    yield Picture(
        "Pareto k-hat",
        f"Histogram of k-hat over {len(report.khat)} datapoints: median "
        f"{report.khat.nanmedian().item():.2f}, {report.unreliable:.1%} above 0.7.",
        lambda ax: plots.khat_histogram(report.khat, ax),
    )
    if (found := worst_images(report, image_shape)) is not None:
        images, shape, worst = found
        yield Picture(
            "The datapoints with the largest k-hat",
            "Images of datapoints " + ", ".join(map(str, worst.tolist())) + ", worst first, each "
            "with its k-hat.",
            lambda ax: plots.worst_points(images, report.khat[worst], shape, ax),
            height=min(3.3, 0.9 * math.ceil(len(worst) / 5) * shape[-2] / shape[-1] + 0.2),
        )
    for name, kl in report.kl_per_dimension.items():
        active = report.active.get(name)
        yield Picture(
            f"KL of every unit of {name}",
            f"Bars of the mean KL of the {kl.shape[1]} units of {name}, from "
            f"{kl.mean(0).max().item():.2f} to {kl.mean(0).min().item():.2f} nats.",
            functools.partial(plots.kl_per_unit, kl, active, name),
        )
    rate, distortion = report.rate_distortion
    if math.isfinite(rate + distortion):
        yield Picture(
            "Rate and distortion",
            f"One point at rate {rate:.2f} and distortion {distortion:.2f} nats, with lines of "
            "equal ELBO.",
            lambda ax: plots.rate_distortion({"this pair": (rate, distortion)}, ax),
        )


def worst_images(
    report: Report, image_shape: Sequence[int] | None
) -> tuple[Tensor, Sequence[int], Tensor] | None:
    """The worst datapoints as images in [0, 1], if they are images.

    Raises:
        ValueError: ``image_shape`` does not fit the data.
    """
    x = next(arg for arg in report.pair[2] if isinstance(arg, Tensor))
    if image_shape is None:
        if x.dim() not in (3, 4) or not x.is_floating_point():
            return None
        image_shape = tuple(x.shape[1:])
    if math.prod(image_shape) != x[0].numel():
        raise ValueError(
            f"image_shape={tuple(image_shape)} does not fit datapoints of shape "
            f"{tuple(x.shape[1:])}: its product must be {x[0].numel()}"
        )
    if len(image_shape) not in (2, 3) or (len(image_shape) == 3 and image_shape[0] not in (1, 3)):
        return None
    worst = report.worst(_IMAGES)
    images = x[worst.to(x.device)].detach().cpu().double().flatten(1)
    low, high = min(0.0, images.min().item()), max(1.0, images.max().item())
    return (images - low) / (high - low), image_shape, worst


def figure(report: Report, image_shape: Sequence[int] | None) -> Figure:
    """All pictures of a report in one figure."""
    from matplotlib import pyplot as plt

    shown = list(pictures(report, image_shape))
    columns = min(2, len(shown))
    rows = math.ceil(len(shown) / columns)
    made, axes = plt.subplots(
        rows, columns, figsize=(5.5 * columns, 3.8 * rows), layout="constrained", squeeze=False
    )
    for ax, picture in zip(axes.flat, shown, strict=False):
        picture.draw(ax)
        ax.set_title(picture.title, fontsize="medium")
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    return made


def write(report: Report, path: Path, image_shape: Sequence[int] | None, title: str | None) -> Path:
    """See :meth:`ppvae.diagnostics.Report.to_html`."""
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder: give the name of a file, e.g. {path / 'report.html'}"
        )
    name = html.escape(title or "Can this posterior be trusted?")
    body = [
        f"<h1>{name}</h1>",
        f"<p>{len(report.khat):,} datapoints, K = {report.num_particles:,} particles each. All "
        "values in nats per datapoint, larger log p(x) and ELBO are better.</p>",
        '<section class="verdict"><h2>Verdict</h2><ul>',
        *(f"<li>{html.escape(sentence)}</li>" for sentence in report.verdict),
        "</ul></section>",
        "<h2>Summary</h2>",
        _table("summary", *_summary(report)),
        "<ul>",
        *(f"<li>{html.escape(what)}: {html.escape(value)}</li>" for what, value in report.facts()),
        "</ul>",
        "<h2>Pictures</h2>",
        '<div class="pictures">',
        *(_picture(i, picture) for i, picture in enumerate(pictures(report, image_shape))),
        "</div>",
    ]
    for site in report.activity:
        body += [
            f"<h2>Units of {html.escape(site)}</h2>",
            _table(f"units-{site}", *_units(report, site)),
        ]
    shown = min(_SHOWN, len(report.khat))
    which = f"The {shown} datapoints" if shown < len(report.khat) else "Datapoints"
    body += [
        "<h2>Datapoints</h2>",
        f"<p>{which} with the largest k-hat first. A heading sorts by its column.</p>",
        _table("datapoints", *_datapoints(report, shown)),
    ]
    if report.absent:
        body += ["<h2>Absent</h2><ul>"]
        body += [
            f"<li>{html.escape(what)}: {html.escape(why)}.</li>"
            for what, why in report.absent.items()
        ]
        body += ["</ul>"]
    body.append(READING)
    page = PAGE.format(title=name, style=STYLE, body="\n".join(body), script=SCRIPT)
    path.write_text(page, encoding="utf-8")
    return path


def _summary(report: Report) -> tuple[list[str], list[list[Any]]]:
    from ppvae.diagnostics.report import spread

    rows = [[name, *spread(column)] for name, column in report.columns()]
    return ["quantity", "mean", "± s.e.", "5 %", "median", "95 %"], rows


def _units(report: Report, site: str) -> tuple[list[str], list[list[Any]]]:
    columns: dict[str, Any] = {"unit": range(len(report.activity[site]))}
    if site in report.kl_per_dimension:
        columns["mean KL"] = report.kl_per_dimension[site].mean(0).tolist()
    columns["activity"] = report.activity[site].tolist()
    columns["active"] = ["yes" if a else "no" for a in report.active[site].tolist()]
    if site in report.collapsed:
        columns["collapsed"] = ["yes" if c else "no" for c in report.collapsed[site].tolist()]
    columns["mean of q(z)"] = report.marginal_mean[site].tolist()
    columns["sd of q(z)"] = report.marginal_sd[site].tolist()
    if report.aggregate is not None and site in report.aggregate.ks:
        columns["distance to the prior (KS)"] = report.aggregate.ks[site].tolist()
    return list(columns), [list(row) for row in zip(*columns.values(), strict=True)]


def _datapoints(report: Report, count: int) -> tuple[list[str], list[list[Any]]]:
    table = report.table().iloc[report.worst(count).numpy()]
    names = {
        "log_evidence": "log p(x)",
        "log_evidence_se": "± s.e.",
        "elbo": "ELBO",
        "gap_se": "± s.e. of gap",
        "ess": "ESS",
        "khat": "k-hat",
    }
    heads = [names.get(c, c.replace("kl_", "KL of ", 1)) for c in table.columns]
    rows = [[int(i), *row] for i, row in zip(table.index, table.to_numpy().tolist(), strict=True)]
    return ["datapoint", *heads], rows


def _table(name: str, heads: list[str], rows: list[list[Any]]) -> str:
    """A table whose headings sort it; the numbers it sorts by are not rounded."""
    key = re.sub(r"[^a-z0-9]+", "-", name.lower())
    number = [bool(rows) and not isinstance(cell, str) for cell in rows[0]]
    head = "".join(
        f'<th scope="col"{" class=number" * n}><button type="button">{html.escape(h)}</button></th>'
        for h, n in zip(heads, number, strict=True)
    )
    lines = []
    for row in rows:
        cells = "".join(
            f"<td>{html.escape(cell)}</td>"
            if isinstance(cell, str)
            else f'<td class="number" data-value="{cell!r}">{_number(cell)}</td>'
            for cell in row
        )
        lines.append(f"<tr>{cells}</tr>")
    label = html.escape(name.replace("-", " "))
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="Table: {label}">'
        f'<table id="{key}"><thead><tr>{head}</tr></thead>\n<tbody>' + "\n".join(lines)
    ) + "</tbody></table></div>"


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    shown = f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    return shown.replace("-", "−")


def _picture(number: int, picture: Picture) -> str:
    """An inline SVG in the colour of the page's text."""
    alt = html.escape(picture.alt, quote=True)
    svg = _svg(picture, f"p{number}-").replace("<svg ", f'<svg role="img" aria-label="{alt}" ', 1)
    return f"<figure>{svg}<figcaption>{html.escape(picture.title)}</figcaption></figure>"


def _svg(picture: Picture, prefix: str) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[str, Any] = dict.fromkeys(ink, _INK)
    settings |= {"axes.facecolor": "none", "figure.facecolor": "none", "svg.hashsalt": prefix}
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        made = Figure(figsize=(4.4, picture.height), layout="constrained")
        picture.draw(made.subplots())
        file = io.StringIO()
        made.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg ") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    # Several drawings share the page, and so its ids.
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    return svg.replace(_INK, "currentColor")
