"""How the cost of a step grows: with the batch, with K, with latent layers, with parameter tensors.

The same columns, blocks and ratios as speed.py, over workloads that differ in one size each.

    python benchmarks/speed_scaling.py --out out/speed_scaling.jsonl
    python benchmarks/speed_scaling.py --quick --only batch
"""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from columns import PEERS
from speed import chosen_columns, measure
from timing import parser, shown, start
from workloads import MLP, Hierarchical, Workload

COLUMNS = ["ppvae-eager", "ppvae-compiled", "hand", "hand-compile", "pyro", "numpyro"]
GROWING: dict[str, list[Workload]] = {
    "batch": [Workload(f"batch {n}", MLP(), n) for n in (8, 32, 128, 512, 2048)],
    "K": [Workload(f"K {k}, batch 20", MLP(), 20, k) for k in (1, 5, 50, 500)],
    "layers": [
        Workload(f"{n} latent layers of 32", Hierarchical((32,) * n, (128,) * n), 128)
        for n in (1, 2, 3, 5, 8)
    ],
    "tensors": [
        Workload(f"{4 * (n + 1)} parameter tensors", MLP(hidden=(64,) * n), 128)
        for n in (1, 4, 16, 48)
    ],
}


def line(name: str, result: dict[str, Any], columns: list[str]) -> str:
    """One size: ms of every column, and the two ratios that matter."""
    rows = result["columns"]
    cells = [shown(rows[c]["ms"]) if "ms" in rows[c] else rows[c]["missing"] for c in columns]
    limit = result["limits"][result["limit"]]["ms"]
    peers = [c for c in columns if c in PEERS and "ms" in rows[c]]
    ratios = [None, None]
    if peers:
        fastest = min(peers, key=lambda c: rows[c]["ms"][0])
        ratios[0] = rows[fastest]["ppvae-compiled"]
    if "hand" in peers:
        ratios[1] = rows["hand"]["ppvae-eager"]
    return f"| {name} | {' | '.join([*cells, shown(limit), *map(shown, ratios)])} |"


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__, rounds=15)
    p.add_argument("--only", action="append", choices=list(GROWING), help="repeat it for several")
    p.add_argument("--columns", type=chosen_columns, default=COLUMNS, help="a,b,c")
    args = p.parse_args(argv)
    logging.getLogger("pyro").setLevel(logging.WARNING)
    device, results = start(args)
    failed = False
    heads = [*args.columns, "matmul limit", "compiled / fastest peer", "eager / hand"]
    for what, workloads in GROWING.items():
        if args.only and what not in args.only:
            continue
        print(f"| ms per step | {' | '.join(heads)} |")
        print("|---" * (len(heads) + 1) + "|", flush=True)
        for w in workloads:
            key = f"scaling/{w.name}/{','.join(args.columns)}"
            task = functools.partial(
                measure, w, args.columns, device, args.rounds, args.quick, with_memory=False
            )
            result = results.get(key, task)
            print(line(w.name, result, args.columns), flush=True)
            failed |= any("FAILED" in r.get("missing", "") for r in result["columns"].values())
        print()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
