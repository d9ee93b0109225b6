"""A report's pictures, in a figure or on a page; ``page.html`` is the template of the page."""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ppvae.plots import diagnostics as plots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#010203"  # what matplotlib draws in; the page makes it the colour of its text


@dataclass(frozen=True)
class Picture:
    """One picture of a report: its title, what it shows in words, and how to draw it."""

    title: str
    alt: str
    draw: Callable[[Any], Any]
    height: float = 3.3  # inches on the page, of 4.4 wide: small, so that the letters are large


def khat_picture(khat: Tensor, unreliable: float) -> Picture:
    """The histogram of k-hat; ``unreliable`` is the share above 0.7."""
    return Picture(
        "Pareto k-hat",
        f"Histogram of k-hat over {len(khat)} datapoints: median {khat.nanmedian().item():.2f}, "
        f"{unreliable:.1%} above 0.7.",
        functools.partial(plots.khat_histogram, khat),
    )


def worst_picture(
    x: Tensor, khat: Tensor, worst: Tensor, image_shape: Sequence[int] | None
) -> Picture | None:
    """The datapoints ``worst`` as images, if they are images.

    Raises:
        ValueError: ``image_shape`` does not fit the data.
    """
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
    pixels = x[worst.to(x.device)].detach().cpu().double().flatten(1)
    low, high = min(0.0, pixels.min().item()), max(1.0, pixels.max().item())
    images = (pixels - low) / (high - low)
    rows, ratio = math.ceil(len(worst) / 5), image_shape[-2] / image_shape[-1]
    return Picture(
        "The datapoints with the largest k-hat",
        f"Images of datapoints {', '.join(map(str, worst.tolist()))}, worst first, each with its "
        "k-hat.",
        functools.partial(plots.worst_points, images, khat[worst], image_shape),
        height=min(3.3, 0.9 * rows * ratio + 0.2),
    )


def units_picture(site: str, kl: Tensor, active: Tensor | None) -> Picture:
    """The mean KL ``(N, D)`` of every unit of a latent."""
    mean = kl.mean(0)
    return Picture(
        f"KL of every unit of {site}",
        f"Bars of the mean KL of the {len(mean)} units of {site}, from {mean.max().item():.2f} to "
        f"{mean.min().item():.2f} nats.",
        functools.partial(plots.kl_per_unit, kl, active, site),
    )


def plane_picture(rate: float, distortion: float) -> Picture:
    """The pair as a point in the plane of rate and distortion."""
    return Picture(
        "Rate and distortion",
        f"One point at rate {rate:.2f} and distortion {distortion:.2f} nats, with lines of equal "
        "ELBO.",
        functools.partial(plots.rate_distortion, {"this pair": (rate, distortion)}),
    )


def figure(pictures: Sequence[Picture]) -> Figure:
    """All pictures in one figure."""
    from matplotlib import pyplot as plt

    columns = min(2, len(pictures))
    rows = math.ceil(len(pictures) / columns)
    made, axes = plt.subplots(
        rows, columns, figsize=(5.5 * columns, 3.8 * rows), layout="constrained", squeeze=False
    )
    for ax, picture in zip(axes.flat, pictures, strict=False):
        picture.draw(ax)
        ax.set_title(picture.title, fontsize="medium")
    for ax in axes.flat[len(pictures) :]:
        ax.set_visible(False)
    return made


def write(path: Path, page: str) -> Path:
    """Write a page to a file."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: give the name of a file in it")
    path.write_text(page, encoding="utf-8")
    return path


def framed(page: str) -> str:
    """A page inside another, such as a notebook: neither's style touches the other."""
    from markupsafe import escape

    look = "width: 100%; height: 36rem; border: 1px solid #c9ced4; border-radius: 4px"
    return f'<iframe srcdoc="{escape(page)}" style="{look}" title="Report"></iframe>'


def render(**content: Any) -> str:
    """``page.html``, filled with ``content``; what that is stands at its top."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    loader = PackageLoader("ppvae.diagnostics", "")
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    templates.filters |= {"key": _key, "rounded": _rounded, "svg": _svg}
    return templates.get_template("page.html").render(content)


def _key(name: str) -> str:
    """A table's name as an id that can be part of an address."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower())


def _rounded(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    shown = f"{value:.2f}" if abs(value) >= 0.1 or value == 0 else f"{value:.2g}"
    return shown.replace("-", "−")


def _svg(picture: Picture, number: int) -> str:
    """An inline drawing in the page's text colour; ``number`` keeps its ids apart from others'."""
    import matplotlib
    from markupsafe import Markup, escape
    from matplotlib.figure import Figure

    prefix = f"p{number}-"
    ink = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: dict[str, Any] = dict.fromkeys(ink, _INK)
    settings |= {"axes.facecolor": "none", "figure.facecolor": "none", "svg.hashsalt": prefix}
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        made = Figure(figsize=(4.4, picture.height), layout="constrained")
        picture.draw(made.subplots())
        file = io.StringIO()
        made.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue().replace(_INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    for size in ("width", "height"):  # the page decides
        svg = re.sub(rf'(<svg [^>]*?) {size}="[^"]*"', r"\1", svg, count=1)
    for reference in (r'\bid="', r"url\(#", r'href="#'):
        svg = re.sub(f"({reference})", rf"\g<1>{prefix}", svg)
    label = f'<svg role="img" aria-label="{escape(picture.alt)}" '
    return Markup(svg.replace("<svg ", label, 1))
