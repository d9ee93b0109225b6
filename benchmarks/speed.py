"""One optimisation step, ppvae beside its peers: time, the matmul limit, peak memory.

All columns of a workload run in one process, in short blocks whose order is alternated from round
to round; ratios are taken within a round. Shown are medians over rounds, and the range from the
10th to the 90th percentile. What the columns are, and what each computes, is in columns.py; the
workloads are in workloads.py; what the limit is, in matmul.py; what the memory is, in memory.py.

    python benchmarks/speed.py --out out/speed.jsonl       # resumes: what the file has is not rerun
    python benchmarks/speed.py --workload mlp-128-1 --columns ppvae-compiled,hand,numpyro
    python benchmarks/speed.py --device cuda --out out/speed_cuda.jsonl
    python benchmarks/speed.py --quick                     # does it run?

The exit status is 1 if a column failed that should have run.
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
import statistics
import sys
import traceback
from typing import Any

import matmul
import memory
import torch
from columns import COLUMNS, PEERS, CannotRun, Column, NotOffered
from timing import alternate, parser, shown, spread, start, steps_for, timed
from workloads import MLP, WORKLOADS, Workload

BLOCK_SECONDS = 0.1


def build(
    workload: Workload, names: list[str], device: torch.device
) -> tuple[dict[str, Column], dict[str, str]]:
    """The columns that run, after one step each, and why the others do not."""
    torch._dynamo.reset()  # its limit on recompilations counts those of other workloads
    columns: dict[str, Column] = {}
    missing: dict[str, str] = {}
    losses: dict[str, float] = {}
    for name in names:
        try:
            column = COLUMNS[name](workload, device)
            loss = float(column.step(column.batches[0]))
        except NotOffered:
            missing[name] = "not offered"
        except CannotRun as reason:
            missing[name] = f"not run: {reason}"
        except Exception as error:
            traceback.print_exc()
            missing[name] = f"FAILED: {type(error).__name__}"
        else:
            columns[name] = column
            losses[name] = loss * column.loss_scale / workload.batch
    middle = statistics.median(losses.values()) if losses else 0.0
    if any(not math.isclose(loss, middle, rel_tol=0.01) for loss in losses.values()):
        raise SystemExit(f"{workload.name}: the columns do not compute the same loss: {losses}")
    return columns, missing


def measure(
    workload: Workload,
    names: list[str],
    device: torch.device,
    rounds: int,
    quick: bool,
    with_memory: bool = True,
) -> dict[str, Any]:
    """Everything about one workload."""
    columns, missing = build(workload, names, device)
    runs = {name: column.run for name, column in columns.items()}
    networks, x = workload.networks(device), workload.batches(1, device)[0]
    for library in matmul.libraries(device):
        products = matmul.training_products(networks, x, workload.num_particles, library)
        runs[f"products, {library}"] = matmul.runner(products, device)
    steps = 1 if quick else steps_for(runs["products, aten"], BLOCK_SECONDS)
    blocks = {name: timed(run, steps) for name, run in runs.items()}
    alternate(blocks, 2)  # warm up
    taken = alternate(blocks, rounds)
    limit = min((n for n in taken if n.startswith("products")), key=lambda n: spread(taken[n])[0])
    rows: dict[str, Any] = {}
    for name in names:
        if name in missing:
            rows[name] = {"missing": missing[name]}
            continue
        held = memory.measured(workload.name, name, device) if with_memory and not quick else None
        rows[name] = {
            "ms": spread(taken[name]),
            "of_limit": spread(taken[name] / taken[limit]),
            "memory_mb": held,
        }
        for ours in ("ppvae-eager", "ppvae-compiled"):
            rows[name][ours] = spread(taken[ours] / taken[name]) if ours in taken else None
    limits = {name: {"ms": spread(taken[name])} for name in taken if name.startswith("products")}
    return {"columns": rows, "limits": limits, "limit": limit, "steps_per_block": steps}


def table(result: dict[str, Any]) -> str:
    """The rows of one workload, as Markdown."""
    lines = [
        "| step | ms | compiled ppvae / it | eager ppvae / it | it / matmul limit | memory, MB |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in result["columns"].items():
        if "missing" in row:
            lines.append(f"| {name} | {row['missing']} | | | | |")
            continue
        held = "-" if row["memory_mb"] is None else f"{row['memory_mb']:.1f}"
        ratios = [shown(row[key]) for key in ("ppvae-compiled", "ppvae-eager", "of_limit")]
        lines.append(f"| {name} | {shown(row['ms'])} | {' | '.join(ratios)} | {held} |")
    for name, row in result["limits"].items():
        which = "the limit" if name == result["limit"] else ""
        lines.append(f"| {name} | {shown(row['ms'])} | | | {which} | |")
    return "\n".join(lines)


def verdict(workload: Workload, result: dict[str, Any]) -> list[str]:
    """The targets, and what was measured."""
    rows = {name: row for name, row in result["columns"].items() if "ms" in row}
    lines = []
    peers = [name for name in rows if name in PEERS]
    if peers and "ppvae-compiled" in rows:
        fastest = min(peers, key=lambda name: rows[name]["ms"][0])
        ratio = rows[fastest]["ppvae-compiled"]
        lines.append(_target(f"compiled / fastest peer ({fastest})", ratio, 0.95))
    if "hand" in rows and "ppvae-eager" in rows:
        lines.append(_target("eager / hand-written eager", rows["hand"]["ppvae-eager"], 1.15))
    if "hand" in rows and "ppvae-compiled" in rows:
        share = result["limits"]["products, aten"]["ms"][0] / rows["hand"]["ms"][0]
        ratio = rows["ppvae-compiled"]["of_limit"]
        if share >= 0.5:
            lines.append(_target("compiled / matmul limit", ratio, 1.5))
        else:
            lines.append(
                f"compiled / matmul limit: {shown(ratio)}, no target: products are {share:.0%} of "
                "the hand-written step"
            )
    if "hand-graph" in rows and "ppvae-compiled" in rows:  # on CUDA
        ratio = rows["hand-graph"]["ppvae-compiled"]
        lines.append(_target("compiled / hand-written CUDA graph", ratio, 1.1))
        if "pyro" in rows and isinstance(workload.family, MLP):
            lines.append(_target("compiled / stock Pyro", rows["pyro"]["ppvae-compiled"], 0.1))
    return lines


def _target(what: str, ratio: list[float], at_most: float) -> str:
    met = "met" if ratio[0] <= at_most else "NOT met"
    return f"{what}: {shown(ratio)}, target <= {at_most}: {met}"


def chosen_columns(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in COLUMNS:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(COLUMNS)}")
    return names


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__)
    names = [w.name for w in WORKLOADS]
    p.add_argument("--workload", action="append", choices=names, help="repeat it for several")
    p.add_argument("--columns", type=chosen_columns, default=list(COLUMNS), help="a,b,c")
    args = p.parse_args(argv)
    logging.getLogger("pyro").setLevel(logging.WARNING)  # it announces every guess of plate dims
    device, results = start(args)
    failed = False
    for workload in WORKLOADS:
        if args.workload and workload.name not in args.workload:
            continue
        key = f"step/{workload.name}/{','.join(args.columns)}"
        task = functools.partial(measure, workload, args.columns, device, args.rounds, args.quick)
        result = results.get(key, task)
        print(f"## {workload.name}: batch {workload.batch}, K = {workload.num_particles}\n")
        print(table(result), end="\n\n")
        print("\n".join(verdict(workload, result)), end="\n\n", flush=True)
        failed |= any("FAILED" in row.get("missing", "") for row in result["columns"].values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
