"""The frame of a report's page: HTML, style, the script that sorts, how to read it."""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { --ink: #1a1c1e; --paper: #ffffff; --soft: #f1f3f5; --line: #c9ced4; --mark: #0060a0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaed; --paper: #15181b; --soft: #21262b; --line: #454c54; --mark: #7cc0f5; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 70rem; margin: 0 auto; padding: 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; margin: 2rem 0 0.5rem; }
.verdict { background: var(--soft); border-left: 4px solid var(--mark); padding: 0.1rem 1rem; }
.verdict h2 { margin-top: 0.7rem; }
ul { padding-left: 1.3rem; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, button:focus-visible, summary:focus-visible {
  outline: 2px solid var(--mark); outline-offset: 1px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { padding: 0.25rem 0.7rem; border-bottom: 1px solid var(--line); white-space: nowrap;
  text-align: left; }
th.number, td.number { text-align: right; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button::after { content: " \\2195"; opacity: 0.55; }
th[aria-sort="ascending"] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort="descending"] button::after { content: " \\2193"; opacity: 1; }
.pictures { display: grid; gap: 1.5rem; align-items: end;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; }
figure svg { width: 100%; height: auto; display: block; }
figcaption { text-align: center; font-size: 0.92rem; }
dt { font-weight: 600; } dd { margin: 0 0 0.5rem 1rem; }
"""

# "#sort=datapoints.2.descending" in the address sorts on loading, as clicking does.
SCRIPT = """
"use strict";
function key(cell) {
  const value = cell.dataset.value;
  if (value === undefined) return cell.textContent;
  return value === "inf" ? Infinity : value === "-inf" ? -Infinity : Number(value);
}
function sort(table, column, direction) {
  const sign = direction === "descending" ? -1 : 1;
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((a, b) => {
    const x = key(a.cells[column]), y = key(b.cells[column]);
    if (typeof x === "string") return sign * x.localeCompare(y);
    if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
    return x === y ? 0 : sign * (x < y ? -1 : 1);
  });
  table.tBodies[0].append(...rows);
  Array.from(table.tHead.rows[0].cells).forEach((head, i) => {
    if (i === column) head.setAttribute("aria-sort", direction);
    else head.removeAttribute("aria-sort");
  });
}
document.querySelectorAll("table").forEach(table => {
  Array.from(table.tHead.rows[0].cells).forEach((head, i) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "descending";
      sort(table, i, down ? "ascending" : "descending");
    });
  });
});
const asked = /^#sort=([a-z0-9-]+)[.]([0-9]+)[.](ascending|descending)$/.exec(location.hash);
if (asked && document.getElementById(asked[1])) {
  sort(document.getElementById(asked[1]), Number(asked[2]), asked[3]);
}
"""

READING = """
<details><summary>How to read this page</summary><dl>
<dt>log p(x)</dt><dd>Importance sampling from the guide with K draws: in expectation a lower bound,
close where k-hat is small.</dd>
<dt>k-hat</dt><dd>Shape of the tail of the importance weights. Below 0.5 good, to 0.7 usable, above
it the estimate of log p(x) and its standard error are not to be trusted, and the guide is far
from the posterior.</dd>
<dt>gap</dt><dd>log p(x) less the ELBO: KL(q(z | x) || p(z | x)), what the guide loses.</dd>
<dt>ESS</dt><dd>Effective sample size of the weights, of K.</dd>
<dt>active unit</dt><dd>The variance over datapoints of its posterior mean exceeds the
threshold.</dd>
<dt>collapsed unit</dt><dd>Its KL is below 0.01 nats on 99 % of datapoints.</dd>
<dt>mutual information</dt><dd>Of datapoint and latents under the guide; the mean rate is this and
KL(q(z) || p(z)), the misfit of prior and aggregated posterior.</dd>
<dt>rate and distortion</dt><dd>KL(q(z | x) || p(z)) and −E log p(x | z); their sum is −ELBO.</dd>
</dl></details>
"""
