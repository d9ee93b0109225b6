"""How long the compiled step takes to build, with an empty compiler cache and with a filled one.

Each build is a process of its own; the clock runs from after the imports and the building of pair
and data to the end of the first step. The two builds of a round share a cache that starts empty.

    python benchmarks/speed_build.py --out out/speed_build.jsonl
"""

from __future__ import annotations

import argparse
import functools
import os
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

import torch
from columns import COLUMNS, waiter
from timing import parser, set_threads, shown, spread, start
from workloads import WORKLOADS

BUILT = ("ppvae-compiled", "hand-compile")


def child(args: argparse.Namespace) -> None:
    """Build one step, and print the seconds it took."""
    set_threads(args.threads)
    device = torch.device(args.device)
    column = COLUMNS[args.column](next(w for w in WORKLOADS if w.name == args.child), device)
    started = perf_counter()
    column.step(column.batches[0])
    waiter(device)()
    print(perf_counter() - started)


def measure(workload: str, column: str, rounds: int, device: torch.device) -> dict[str, Any]:
    """Seconds, cold and warm."""
    seconds: dict[str, list[float]] = {"cold": [], "warm": []}
    command = [sys.executable, __file__, "--child", workload, "--column", column]
    command += ["--device", str(device), "--threads", str(torch.get_num_threads())]
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as cache:
            own = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
            for state in seconds:
                done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
                if done.returncode:
                    raise RuntimeError(f"building {column} on {workload}:\n{done.stderr}")
                seconds[state].append(float(done.stdout.splitlines()[-1]))
    return {state: spread(values) for state, values in seconds.items()}


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    p.add_argument("--builds", type=int, default=3, help="cold builds of each, in place of rounds")
    p.add_argument("--workload", action="append", choices=[w.name for w in WORKLOADS])
    p.add_argument("--child", help=argparse.SUPPRESS)
    p.add_argument("--column", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.child:
        child(args)
        return 0
    builds = 1 if args.quick else args.builds
    device, results = start(args)
    print("| first step, seconds | cold | warm |\n|---|---|---|", flush=True)
    for workload in args.workload or [w.name for w in WORKLOADS]:
        for column in BUILT:
            task = functools.partial(measure, workload, column, builds, device)
            result = results.get(f"build/{workload}/{column}/{builds}", task)
            cold, warm = (shown(result[state], 1) for state in ("cold", "warm"))
            print(f"| {workload}, {column} | {cold} | {warm} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
