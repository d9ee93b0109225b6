"""How `ppvae.fit` scales over processes: time per step with 1, 2, ... of them.

Each number of processes trains the same pair on the same number of steps, under Lightning Fabric
(gloo on the CPU, NCCL on GPUs), twice: with the joint batch of the workload (strong scaling:
efficiency T_1 / (W T_W)) and with as many rows in each process (weak scaling: T_1 / T_W). One
thread per process. It prints medians over rounds, by rank 0's clock: of the step, and of the sum of
its gradients alone, with their bytes. A sum that went on during the backward pass would take at
most its own time off the step: the share "hidden". "DDP" is what it does take off: loss, gradient
and sum by torch's DistributedDataParallel, which sums in buckets of 1 MB while the backward pass
runs, over the same with the one sum behind it, as ``fit`` has it; rounds take turns.

    python benchmarks/scaling.py                                  # 1 and 2 processes, CPU
    python benchmarks/scaling.py --accelerator cuda --processes 1 2 4 8
    python benchmarks/scaling.py --quick
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch
from lightning_fabric import Fabric
from timing import alternate
from torch.nn.parallel import DistributedDataParallel
from workloads import WORKLOADS

import ppvae
from ppvae.processes import Processes


def train(fabric: Fabric, args: argparse.Namespace, name: str, rows: int) -> dict[str, Any]:
    """Milliseconds per step and per sum of gradients, and their bytes; runs in each process."""
    torch.set_num_threads(1)
    (workload,) = (w for w in WORKLOADS if w.name == name)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    svi = ppvae.SVI(*workload.pair(workload.networks()), adam, workload.bound, compile=args.compile)
    x = torch.bernoulli(torch.full((args.steps * rows, *workload.family.shape), 0.13))
    history = ppvae.fit(
        svi, x, epochs=args.rounds + 1, batch_size=rows, fabric=fabric, progress=False
    )
    step = statistics.median(history.column("seconds")[1:]) / args.steps
    gradients = [torch.zeros_like(p) for p in svi.objective.parameters()]
    found = {"ms": 1e3 * step, "bytes": sum(g.nbytes for g in gradients), "sum_ms": 0.0, "ddp": 1.0}
    processes = Processes(fabric)
    if processes.size > 1:
        seconds = []
        for _ in range(args.rounds + 1):
            processes.wait()  # also for the device
            start = time.perf_counter()
            for _ in range(args.steps):
                processes.sum_gradients(gradients)
            processes.wait()
            seconds.append((time.perf_counter() - start) / args.steps)
        found["sum_ms"] = 1e3 * statistics.median(seconds[1:])
        found["ddp"] = during_over_after(svi, processes, x[: rows // processes.size], args)
    return found


def during_over_after(
    svi: ppvae.SVI, processes: Processes, x: torch.Tensor, args: argparse.Namespace
) -> float:
    """Time of loss, gradient and sum, summed by DDP over summed in one; median over rounds."""
    wrapped = DistributedDataParallel(svi.objective, bucket_cap_mb=1)

    def after() -> None:
        svi.objective(x).backward()
        processes.sum_gradients([p.grad for p in svi.objective.parameters()])

    def during() -> None:
        wrapped(x).backward()

    def block(call: Callable[[], None]) -> float:
        processes.wait()
        start = time.perf_counter()
        for _ in range(args.steps):
            svi.objective.zero_grad()
            call()
        processes.wait()
        return time.perf_counter() - start

    with pyro.validation_enabled(False):
        blocks = {call.__name__: functools.partial(block, call) for call in (after, during)}
        alternate(blocks, 1)
        taken = alternate(blocks, args.rounds)
    return float(statistics.median(taken["during"] / taken["after"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accelerator", default="cpu")
    names = ["mlp-128-1", "conv-128-1", "hierarchical-128-1"]
    parser.add_argument("--workload", nargs="+", default=names, choices=[w.name for w in WORKLOADS])
    parser.add_argument("--steps", type=int, default=100, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="append a JSON line")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = 5, 1
    results: list[dict[str, Any]] = []
    print(
        "time in ms          gradients  scaling  processes     step      sum  efficiency  "
        "hidden <=   DDP"
    )
    for workload in (w for w in WORKLOADS if w.name in args.workload):
        first: dict[str, float] = {}
        for size in args.processes:
            for kind, rows in (("strong", workload.batch), ("weak", workload.batch * size)):
                # processes that already hold CUDA cannot be forked, and this one does not hold it
                strategy = "auto" if size == 1 else "ddp_spawn"
                fabric = Fabric(accelerator=args.accelerator, devices=size, strategy=strategy)
                row = fabric.launch(train, args, workload.name, rows)
                base = first.setdefault(kind, size * row["ms"] if kind == "strong" else row["ms"])
                row["efficiency"] = base / row["ms"] / (size if kind == "strong" else 1)
                row |= {"workload": workload.name, "processes": size, "scaling": kind}
                results.append(row)
                print(
                    f"{workload.name:18}  {row['bytes'] / 1e6:6.2f} MB  {kind:7}  {size:9}  "
                    f"{row['ms']:7.2f}  {row['sum_ms']:7.2f}  {row['efficiency']:10.2f}  "
                    f"{row['sum_ms'] / row['ms']:9.2f}  {row['ddp']:4.2f}",
                    flush=True,
                )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "a", encoding="utf-8") as lines:
            lines.write(
                json.dumps({"settings": vars(args) | {"out": None}, "rows": results}) + "\n"
            )


if __name__ == "__main__":
    main()
