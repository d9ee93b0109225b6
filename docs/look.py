"""Open every page of the built site in Chromium, and fail on what a reader would stumble over.

    make look                                   # after make docs
    python docs/look.py docs/_build/html --shots out/shots --only index --only gallery

Each page is loaded once and laid out four times: 1366 and 390 pixels wide, light and dark. It fails
on links, anchors and pictures that are not there, errors in the console, a page that scrolls
sideways, tables, pictures, code or formulas that are cut off, and text that its ground hides.

MathJax comes from a content delivery network. Where there is none, give its files: `npm install
mathjax@4` and ``--npm node_modules``. Without both, formulas are not typeset; that one failure is
allowed and printed, any other request that fails is not.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

from playwright.sync_api import Page, Route, sync_playwright

WIDTHS = {"desktop": (1366, 900), "phone": (390, 844)}
SCHEMES = ("light", "dark")
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/((?:@mathjax/)?mathjax[^@/]*)@[^/]+/([^?]+)")

# What is on the page, whatever its size.
CONTENTS = """() => ({
  ids: [...document.querySelectorAll('[id], a[name]')].flatMap(e => [e.id, e.getAttribute('name')]),
  links: [...document.querySelectorAll('a[href]')].map(a => a.href),
  pictures: [...document.images].filter(i => i.complete && i.naturalWidth == 0).map(i => i.src),
})"""

# What is wrong with this size and scheme, as lines.
LAYOUT = """() => {
  const found = [], root = document.documentElement;
  if (root.scrollWidth > innerWidth + 1)
    found.push(`scrolls sideways: ${root.scrollWidth} pixels in ${innerWidth}`);
  const name = e => `${e.tagName.toLowerCase()} "${(e.alt || e.textContent).trim().slice(0, 40)}"`;
  for (const e of document.querySelectorAll('article :is(table, img, pre, .math, figure)')) {
    const box = e.getBoundingClientRect();
    for (let p = e.parentElement; box.width && p; p = p.parentElement) {
      const way = getComputedStyle(p).overflowX, edge = p.getBoundingClientRect();
      if (way == 'auto' || way == 'scroll') break;
      if ((way == 'hidden' || way == 'clip') && p != document.body && p != root
          && (box.right > edge.right + 1 || box.left < edge.left - 1)) {
        found.push(`cut off: ${name(e)}`);
        break;
      }
    }
  }
  // The ratio of WCAG; 2.5 is what can still be read, not what is good.
  const rgb = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => rgb(c).slice(0, 3).map(v => (v /= 255) <= .03928 ? v / 12.92
    : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  for (const e of document.querySelectorAll('article :is(p, li, td, th, h1, h2, pre, code, a)')) {
    if (![...e.childNodes].some(n => n.nodeType == 3 && n.data.trim())) continue;
    let p = e, ground;
    for (; p; p = p.parentElement) {
      ground = rgb(getComputedStyle(p).backgroundColor);
      if (ground.length == 3 || ground[3] == 1) break;
    }
    const style = getComputedStyle(e), ink = rgb(style.color);
    if (!p || !e.getClientRects().length || ink.length > 3 || style.opacity < 1) continue;
    const [a, b] = [light(style.color), light(getComputedStyle(p).backgroundColor)];
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    if (ratio < 2.5) found.push(`contrast ${ratio.toFixed(1)}: ${name(e)}`);
  }
  return [...new Set(found)];
}"""


def chromium() -> str:
    """Path of an installed Chromium: the environment's CHROMIUM, or the first one on the path."""
    names = (os.environ.get("CHROMIUM"), "chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    if found is None:
        raise SystemExit("no Chromium: install one, or say CHROMIUM=/path/to/chrome")
    return found


def look(site: Path, pages: list[Path], shots: Path | None, npm: Path | None) -> list[str]:
    """Open pages and return what is wrong, one line each."""
    wrong: list[str] = []
    ids: dict[Path, set[str]] = {}
    links: dict[Path, list[str]] = {}
    untypeset = set()

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        page = browser.new_page()
        here: list[str] = []

        def fetch(route: Route) -> None:
            """Give the files of MathJax from a folder, if there is one; and ask for the rest."""
            found = CDN.match(route.request.url)
            if npm is not None and found and (file := npm / found[1] / found[2]).is_file():
                route.fulfill(path=file)
                return
            route.continue_()

        def failed(request: object) -> None:
            url = request.url  # type: ignore[attr-defined]
            if CDN.match(url):
                untypeset.add(page.url)
            else:
                here.append(f"cannot load {url}")

        page.route(CDN, fetch)
        page.on("requestfailed", failed)
        page.on("pageerror", lambda error: here.append(f"console: {error}"))
        page.on(
            "console",
            # a failed request is told by its own event, with its address
            lambda m: (
                m.type == "error"
                and "Failed to load resource" not in m.text
                and here.append(f"console: {m.text}")
            ),
        )
        for path in pages:
            name = path.relative_to(site).as_posix()
            here.clear()
            page.set_viewport_size({"width": 1366, "height": 900})
            page.goto(path.as_uri(), wait_until="load")
            _settle(page)
            contents = page.evaluate(CONTENTS)
            ids[path], links[path] = set(contents["ids"]), contents["links"]
            here += [f"no picture {src}" for src in contents["pictures"]]
            seen = defaultdict(list)
            for size, (width, height) in WIDTHS.items():
                page.set_viewport_size({"width": width, "height": height})
                for scheme in SCHEMES:
                    page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
                    for line in page.evaluate(LAYOUT):
                        seen[line].append(f"{size} {scheme}")
                    if shots is not None:
                        file = f"{name.removesuffix('.html').replace('/', '-')}-{size}-{scheme}.png"
                        page.screenshot(path=shots / file)
            here += [f"{line} ({', '.join(where)})" for line, where in seen.items()]
            wrong += [f"{name}: {line}" for line in here]
        browser.close()
    for path, targets in links.items():
        name = path.relative_to(site).as_posix()
        wrong += [f"{name}: {line}" for line in _dead(site, targets, ids)]
    if untypeset:
        print(f"allowed: MathJax could not be loaded, so formulas of {len(untypeset)} pages were "
              "not typeset; online, or with --npm, they are")  # fmt: skip
    return wrong


def _settle(page: Page) -> None:
    """Load lazy pictures and wait for the formulas, if MathJax is there."""
    page.evaluate("document.querySelectorAll('img').forEach(i => i.loading = 'eager')")
    page.wait_for_function("[...document.images].every(i => i.complete)")
    page.evaluate("window.MathJax && MathJax.startup && MathJax.startup.promise")


def _dead(site: Path, links: list[str], ids: dict[Path, set[str]]) -> list[str]:
    dead = []
    for link in dict.fromkeys(links):
        address, anchor = urldefrag(link)
        if not address.startswith("file:"):
            continue
        target = Path(unquote(urlparse(address).path))
        shown = os.path.relpath(target, site) + (f"#{anchor}" if anchor else "")
        if not target.is_file():
            dead.append(f"dead link {shown}")
        elif anchor and target in ids and unquote(anchor) not in ids[target]:
            dead.append(f"dead anchor {shown}")
    return dead


def main() -> None:
    """Look at a site; the exit status says whether it is in order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("site", type=Path, nargs="?", default=Path("docs/_build/html"))
    parser.add_argument("--shots", type=Path, metavar="FOLDER", help="write screenshots there")
    parser.add_argument("--npm", type=Path, metavar="FOLDER", help="node_modules with mathjax")
    parser.add_argument("--only", action="append", metavar="PAGE", help="such as gallery; repeat")
    options = parser.parse_args()
    site = options.site.resolve()
    pages = sorted(site.rglob("*.html"))
    if options.only:
        pages = [p for p in pages if p.relative_to(site).with_suffix("").as_posix() in options.only]
    if not pages:
        raise SystemExit(f"no pages in {site}: run make docs first")
    if options.shots:
        options.shots.mkdir(parents=True, exist_ok=True)
    wrong = look(site, pages, options.shots, options.npm)
    print("\n".join([*wrong, f"{len(pages)} pages, {len(wrong)} faults"]))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
