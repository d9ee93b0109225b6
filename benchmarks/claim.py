"""The table of optimisation steps in docs/benchmarks.md, and the range the README quotes.

    python benchmarks/speed.py --rounds 12 --out docs/measured/speed-DATE-PROCESSOR.jsonl
    python benchmarks/claim.py        # writes docs/measured/speed.md, prints the README's range

Each file of docs/measured is one run of ``speed.py`` on an idle machine. The range is over the
medians of all of them; a test fails where the README or the table says something else.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from columns import PEERS
from timing import PACKAGES, shown

MEASURED = Path(__file__).parents[1] / "docs" / "measured"


def runs(folder: Path = MEASURED) -> dict[str, list[dict[str, Any]]]:
    """The lines of each file: one per workload."""
    return {
        path.stem: [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for path in sorted(folder.glob("speed-*.jsonl"))
    }


def fastest_peer(line: dict[str, Any]) -> tuple[str, list[float]]:
    """Which column that is not ours takes least, and the compiled step's time over its time."""
    columns = line["result"]["columns"]
    peers = [name for name, row in columns.items() if name in PEERS and "ms" in row]
    name = min(peers, key=lambda peer: columns[peer]["ms"][0])
    return name, columns[name]["ppvae-compiled"]


def claim(lines: Iterable[dict[str, Any]]) -> str:
    """The smallest and the largest median of compiled / fastest peer."""
    medians = [fastest_peer(line)[1][0] for line in lines]
    return f"{min(medians):.2f} to {max(medians):.2f}"


def workload(line: dict[str, Any]) -> str:
    return f"`{line['key'].split('/')[1]}`"


def targets(lines: list[dict[str, Any]]) -> str:
    """What is promised of each workload, and what the products of a step took."""
    rows = []
    for line in lines:
        columns, limits = line["result"]["columns"], line["result"]["limits"]
        peer, ratio = fastest_peer(line)
        share = limits["products, aten"]["ms"][0] / columns["hand"]["ms"][0]
        rows.append(
            [
                workload(line),
                f"{shown(ratio)} ({peer})",
                shown(columns[peer]["ppvae-fit"]) if "ppvae-fit" in columns else "-",
                shown(columns["pyro"]["ppvae-compiled"]),
                shown(columns["hand"]["ppvae-eager"]),
                shown(columns["ppvae-compiled"]["of_limit"]),
                f"{share:.0%}",
            ]
        )
    ratios = ["fastest peer", "fastest peer", "`pyro`", "`hand`", "matmul limit"]
    ours = ["compiled", "in `fit`", "compiled", "eager", "compiled"]
    heads = [f"{mine} / {theirs}" for mine, theirs in zip(ours, ratios, strict=True)]
    return markdown(["workload", *heads, "products in `hand`"], rows)


def by_column(
    lines: list[dict[str, Any]], title: str, cell: Callable[[dict[str, Any]], str]
) -> str:
    """A cell for every column of every workload."""
    names = [name for name, row in lines[0]["result"]["columns"].items() if "ms" in row]
    rows = []
    for line in lines:
        columns = line["result"]["columns"]
        shown_cells = [cell(columns[name]) if "ms" in columns[name] else "-" for name in names]
        rows.append([workload(line), *shown_cells])
    return markdown([title, *names], rows)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *rows])


def one_run(lines: list[dict[str, Any]]) -> str:
    """Where and when, and the tables."""
    where = lines[0]["environment"]
    versions = ", ".join(f"{name} {where[name]}" for name in PACKAGES)
    busy = "" if where["busy"] is None else f", {where['busy']:.2f} of them busy before it began"
    place = f"{where['threads']} threads, {where['cores']} cores{busy}; {versions}"
    rounds = lines[0]["settings"]["rounds"]
    memory = functools.partial(by_column, lines, "memory, MB")
    return "\n\n".join(
        [
            f"**{where['cpu']}, {where['date']}**: {place}; {rounds} rounds.",
            targets(lines),
            by_column(lines, "ms per step", lambda row: shown(row["ms"])),
            memory(lambda row: "-" if row["memory_mb"] is None else f"{row['memory_mb']:.1f}"),
        ]
    )


def page(measured: dict[str, list[dict[str, Any]]]) -> str:
    """All runs, the latest first."""
    return "\n\n".join(one_run(lines) for lines in reversed(measured.values())) + "\n"


def main() -> None:
    measured = runs()
    (MEASURED / "speed.md").write_text(page(measured), encoding="utf-8")
    print(claim(line for lines in measured.values() for line in lines))


if __name__ == "__main__":
    main()
