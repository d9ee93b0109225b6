"""Peak memory of the steps of one column on one workload; a process of its own for each.

On a CPU: by how much the resident memory rises during steps, over what is resident between them
(parameters, optimiser, code), freed memory given back first. Linux only. On CUDA: what the device
gave out by the end, over what it had given out before the column was built (so everything, and
what allocators keep).

    python benchmarks/memory.py mlp-20-50 hand --threads 2     # prints MB

Other scripts call it, and take the last line it prints.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from columns import COLUMNS
from timing import set_threads
from workloads import WORKLOADS

STEPS = 3


def resident(field: str) -> float:
    """``VmRSS`` or ``VmHWM`` of this process, MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e6


def rise(run: Callable[[], object]) -> float:
    """MB by which resident memory rises while ``run()`` runs."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    run()
    return resident("VmHWM") - before


def measured(workload: str, column: str, device: torch.device) -> float | None:
    """MB, from a fresh process; None where this system cannot tell."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    command = [sys.executable, __file__, workload, column, "--device", str(device)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {column} on {workload}:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workload", choices=[w.name for w in WORKLOADS])
    parser.add_argument("column", choices=list(COLUMNS))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    set_threads(args.threads)
    device = torch.device(args.device)
    workload = next(w for w in WORKLOADS if w.name == args.workload)
    if device.type == "cuda":
        torch.zeros(1, device=device)  # the context
        free = torch.cuda.mem_get_info(device)[0]
        COLUMNS[args.column](workload, device).run(2 + STEPS)
        print((free - torch.cuda.mem_get_info(device)[0]) / 1e6)
        return
    column = COLUMNS[args.column](workload, device)
    column.run(2 + STEPS)
    print(rise(lambda: column.run(STEPS)))


if __name__ == "__main__":
    main()
