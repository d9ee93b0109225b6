"""The page of a report: what is on it, and how a real browser shows it."""

import html
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from ppvae import conditionals, diagnostics, guides, models, nets
from ppvae.diagnostics.html import units_picture, worst_picture
from registry import build

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))),
    None,
)
browser = pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome on the PATH")
TITLE = "Digits <&> their posterior"


def diagnose(rows=120, seed=0):
    torch.manual_seed(seed)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(3, 8, 16)), latent_dim=3)
    guide = guides.Normal(nets.mlp(16, 8, 6))
    x = torch.bernoulli(torch.full((rows, 16), 0.3))
    return diagnostics.diagnose(model, guide, x, num_particles=50, num_aggregate=200, seed=seed)


@pytest.fixture(scope="module")
def report():
    return diagnose()


@pytest.fixture(scope="module")
def page(report, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    assert report.to_html(path, image_shape=(4, 4), title=TITLE) == path
    return path


class Outline(HTMLParser):
    """Ids, open tags, table cells."""

    VOID = frozenset({"meta", "br", "link", "img", "input"})

    def __init__(self):
        super().__init__()
        self.ids, self.open, self.tags, self.cells = [], [], [], {}
        self.table = None

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append((tag, attrs))
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "table":
            self.table = attrs["id"]
            self.cells[self.table] = []
        if tag == "tr":
            self.cells[self.table].append([])
        if tag == "td":
            self.cells[self.table][-1].append(attrs.get("data-value"))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if "id" in dict(attrs):
            self.ids.append(dict(attrs)["id"])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(text):
    found = Outline()
    found.feed(text)
    assert not found.open
    return found


# -- the file ----------------------------------------------------------------------------------


def test_one_file_with_nothing_from_elsewhere(page):
    text = page.read_text(encoding="utf-8")
    assert list(page.parent.iterdir()) == [page]
    tags = outline(text).tags
    for tag, attrs in tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "xlink:href", "srcset", "action"):
            assert attrs.get(name, "#").startswith(("#", "data:")), (tag, attrs)
    assert "@import" not in text
    assert not re.search(r"url\((?!#|&quot;#)", text)
    policy = next(a["content"] for t, a in tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert len(text) < 1_000_000


def test_structure(page, report):
    text = page.read_text(encoding="utf-8")
    found = outline(text)
    assert len(found.ids) == len(set(found.ids))
    referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert referred <= set(found.ids)
    assert '<html lang="en">' in text
    assert 'name="viewport" content="width=device-width' in text
    assert f"<title>{html.escape(TITLE)}</title>" in text
    drawings = [a for t, a in found.tags if t == "svg"]
    assert len(drawings) == 4
    assert all(a["role"] == "img" and len(a["aria-label"]) > 30 for a in drawings)
    assert not any("width" in a or "height" in a for a in drawings)
    for sentence in report.verdict:
        assert sentence in html.unescape(text)
    assert "#010203" not in text
    assert "prefers-color-scheme: dark" in text


def test_tables_hold_the_numbers(page, report):
    cells = outline(page.read_text(encoding="utf-8")).cells
    assert cells.keys() == {"summary", "units-z", "datapoints"}
    rows = cells["datapoints"][1:]
    worst = report.worst(100)
    assert [int(row[0]) for row in rows] == worst.tolist()
    assert [float(row[1]) for row in rows] == report.log_evidence[worst].tolist()
    assert [float(row[7]) for row in rows] == report.khat[worst].tolist()
    assert len(cells["units-z"]) == 1 + 3
    assert [float(row[1]) for row in cells["units-z"][1:]] == pytest.approx(
        report.kl_per_dimension["z"].mean(0).tolist()
    )
    assert len(cells["summary"]) == 1 + 7


@pytest.mark.slow
def test_without_images_and_of_every_kind(tmp_path):
    report = diagnose(rows=3)
    text = report.to_html(tmp_path / "plain.html").read_text(encoding="utf-8")
    assert len([t for t, _ in outline(text).tags if t == "svg"]) == 3
    for name in ("vae_conv", "cvae_quadrant", "vae_vamp_prior"):
        model, guide, args = build(name)
        found = diagnostics.diagnose(model, guide, *args, num_particles=21, seed=0)
        text = found.to_html(tmp_path / f"{name}.html").read_text(encoding="utf-8")
        drawings = [a for t, a in outline(text).tags if t == "svg"]
        assert ("Images of datapoints" in str(drawings)) == (name == "vae_conv")
        assert ("<h2>Absent</h2>" in text) == (name != "vae_conv")
    assert found.plot().axes[0].has_data()


def test_what_is_refused(report, tmp_path):
    with pytest.raises(ValueError, match=r"image_shape=\(5, 5\) does not fit .*must be 16"):
        report.to_html(tmp_path / "a.html", image_shape=(5, 5))
    with pytest.raises(ValueError, match="is a folder: give the name of a file"):
        report.to_html(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_worst_points_have_their_own_khat_and_the_height_of_their_rows():
    """Six images, twice as wide as high, of which row 4 is the worst: two rows of five."""
    x, khat = (
        torch.arange(7.0)[:, None].expand(7, 8) / 7,
        torch.tensor([0, 0.1, 0.2, 0, 0.9, 0.3, 0]),
    )
    worst = torch.tensor([4, 5, 2, 1, 0, 3])
    picture = worst_picture(x, khat, worst, (2, 4))
    images, values, shape = picture.draw.args
    assert (images[:, 0] * 7).round().tolist() == worst.tolist() and shape == (2, 4)
    assert torch.equal(values, khat[worst])
    assert picture.height == pytest.approx(0.9 * 2 * 0.5 + 0.2)
    assert "datapoints 4, 5, 2, 1, 0, 3, worst first" in picture.alt


def test_units_are_described_from_the_largest_to_the_smallest():
    kl = torch.tensor([[0.2, 3.0, 1.0], [0.4, 1.0, 1.0]])
    assert "the 3 units of z, from 2.00 to 0.30 nats" in units_picture("z", kl, None).alt


def test_figure(report):
    from matplotlib import pyplot as plt

    figure = report.plot(image_shape=(4, 4))
    assert [ax.get_title() for ax in figure.axes] == [
        "Pareto k-hat",
        "The datapoints with the largest k-hat",
        "KL of every unit of z",
        "Rate and distortion",
    ]
    plt.close("all")


# -- in a browser ------------------------------------------------------------------------------


def browse(path, *options, fragment=""):
    """The page's DOM after its script has run, and what the browser wrote to its console."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    command += [f"--user-data-dir={path.parent / 'profile'}", *options, "--dump-dom"]
    done = subprocess.run(
        [*command, path.as_uri() + fragment], capture_output=True, text=True, timeout=60, check=True
    )
    assert "</html>" in done.stdout, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def framed(page: Path, name: str, width: int, script: str) -> Path:
    """A page that shows ``page`` in a frame so wide, and runs ``script`` on it."""
    text = html.escape(page.read_text(encoding="utf-8"), quote=True)
    outer = page.with_name(name)
    outer.write_text(
        f'<!DOCTYPE html><title>no</title><body><iframe width="{width}" height="900" '
        f'style="border:0" srcdoc="{text}"></iframe><script>'
        "const frame = document.querySelector('iframe');"
        "frame.onload = () => { const page = frame.contentDocument, view = frame.contentWindow;"
        f"document.title = {script}; }};</script></body>",
        encoding="utf-8",
    )
    return outer


def title(dom):
    return html.unescape(re.search(r"<title>(.*?)</title>", dom, re.DOTALL).group(1))


@browser
@pytest.mark.slow
def test_no_error_on_the_console(page):
    _, console = browse(page)
    assert console == []
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text(encoding="utf-8") + "<script>nothing()</script>", "utf-8")
    assert browse(broken)[1]  # the test can fail


@browser
@pytest.mark.parametrize("direction", ["ascending", "descending"])
def test_tables_sort(page, report, direction):
    dom, console = browse(page, fragment=f"#sort=datapoints.1.{direction}")
    assert console == []
    shown = [float(row[1]) for row in outline(dom).cells["datapoints"][1:]]
    expected = sorted(report.log_evidence[report.worst(100)].tolist())
    assert shown == (expected if direction == "ascending" else expected[::-1])
    heads = [a for t, a in outline(dom).tags if t == "th"]
    assert [a["aria-sort"] for a in heads if "aria-sort" in a] == [direction]


@browser
@pytest.mark.slow
def test_a_click_sorts_and_a_second_one_turns(page):
    script = """(() => {
      const head = page.querySelectorAll('#datapoints th')[5];
      const column = () => Array.from(page.querySelectorAll('#datapoints tbody tr'))
        .map(row => Number(row.cells[5].dataset.value));
      head.querySelector('button').click();
      const once = column();
      head.querySelector('button').click();
      const twice = column();
      const down = once.every((v, i) => i === 0 || once[i - 1] >= v);
      const up = twice.every((v, i) => i === 0 || twice[i - 1] <= v);
      return [down, up, head.getAttribute('aria-sort')].join(' ');
    })()"""
    dom, console = browse(framed(page, "click.html", 900, script))
    assert (title(dom), console) == ("true true ascending", [])


@browser
@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 360, 1200])
def test_no_sideways_scrolling(page, width):
    script = "page.documentElement.scrollWidth - page.documentElement.clientWidth"
    dom, _ = browse(framed(page, f"width{width}.html", width, script))
    assert title(dom) == "0"
    wide = page.with_name("wide-page.html")
    wide.write_text(
        page.read_text(encoding="utf-8").replace("<main>", "<main><pre>" + "x" * 400 + "</pre>"),
        "utf-8",
    )
    dom, _ = browse(framed(wide, "wide.html", width, script))
    assert int(title(dom)) > 0  # the test can fail


CONTRAST = """(() => {
  const light = text => {
    const [r, g, b] = text.match(/[0-9.]+/g).slice(0, 3).map(Number).map(c => {
      c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const style = e => view.getComputedStyle(e);
  const back = e => { while (style(e).backgroundColor === 'rgba(0, 0, 0, 0)') e = e.parentElement;
    return style(e).backgroundColor; };
  let worst = 99;
  for (const e of page.querySelectorAll('h1, p, li, td, th button, figcaption, summary, dd')) {
    const [a, b] = [light(style(e).color), light(back(e))].sort((x, y) => y - x);
    worst = Math.min(worst, (a + 0.05) / (b + 0.05)); }
  return style(page.body).backgroundColor + ' ' + style(page.querySelector('svg')).color + ' '
    + worst.toFixed(1);
})()"""


@browser
@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(page, scheme):
    setting = f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}"
    dom, _ = browse(framed(page, f"{scheme}.html", 900, CONTRAST), setting)
    paper, ink, contrast = re.fullmatch(r"rgb\((.*?)\) rgb\((.*?)\) (.*)", title(dom)).groups()
    assert (sum(map(int, paper.split(","))) < 200) == (scheme == "dark")
    assert (sum(map(int, ink.split(","))) > 500) == (scheme == "dark")  # that of the drawings
    assert float(contrast) > 7  # WCAG AAA
