"""The papers' numbers, trained again: one system at a time, in cells that are not run twice.

    python benchmarks/reproduce.py iwae                         # every cell, then the table
    python benchmarks/reproduce.py iwae --cells 2L-50 1L-50     # these; others in another process
    python benchmarks/reproduce.py iwae --report                # only the table of what is there
    python benchmarks/reproduce.py iwae --quick                 # does it run?
    python benchmarks/reproduce.py iwae --full --device cuda    # the paper's schedule: not run yet

A cell is one training with its evaluation, written to ``out/reproduce/SYSTEM/CELL.json`` with its
recipe, versions and seconds. A cell that is there is not run again; one that was killed goes on
from its last checkpoint. The recipes are in ``reproduce_SYSTEM.py``, the results in
``docs/reproduction.md``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import reproduce_avb
import reproduce_cvae
import reproduce_factor
import reproduce_iop
import reproduce_iwae
import reproduce_ladder
import reproduce_m2
import reproduce_miwae
import reproduce_nvae
import reproduce_nvdm
import reproduce_vade
import reproduce_vq
import torch

# Each module has CELLS, from a cell's name to its recipe; QUICK, what a recipe is cut to;
# run(recipe, folder), which trains and evaluates; report(found), the table as Markdown; and, where
# the recipes are shorter than the paper's, full(recipe), which is the paper's, and takes a device.
SYSTEMS: dict[str, ModuleType] = {
    "avb": reproduce_avb,
    "cvae": reproduce_cvae,
    "factor": reproduce_factor,
    "iop": reproduce_iop,
    "iwae": reproduce_iwae,
    "ladder": reproduce_ladder,
    "m2": reproduce_m2,
    "miwae": reproduce_miwae,
    "nvae": reproduce_nvae,
    "nvdm": reproduce_nvdm,
    "vade": reproduce_vade,
    "vq": reproduce_vq,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("system", choices=list(SYSTEMS))
    parser.add_argument("--cells", nargs="+", metavar="CELL", help="all, unless given")
    parser.add_argument("--out", type=Path, default=Path("out/reproduce"))
    parser.add_argument("--report", action="store_true", help="run nothing, print the table")
    parser.add_argument("--quick", action="store_true", help="every cell, cut to seconds")
    parser.add_argument("--full", action="store_true", help="as long as the paper's schedule")
    parser.add_argument("--device", default="cpu", help="where to train, where --full is defined")
    args = parser.parse_args()
    system = SYSTEMS[args.system]
    if (args.full or args.device != "cpu") and not hasattr(system, "full"):
        known = ", ".join(name for name, module in SYSTEMS.items() if hasattr(module, "full"))
        parser.error(f"--full and --device are for {known}, not for {args.system}")
    unknown = set(args.cells or []) - set(system.CELLS)
    if unknown:
        parser.error(f"no cell {sorted(unknown)} in {args.system}; it has {list(system.CELLS)}")
    folder = args.out / args.system / ("quick" if args.quick else "full" if args.full else "")
    folder.mkdir(parents=True, exist_ok=True)

    found = {}
    for name, recipe in system.CELLS.items():
        chosen = not args.report and (args.cells is None or name in args.cells)
        path = folder / f"{name}.json"
        if chosen or path.exists():
            recipe = system.full(recipe) if args.full else recipe
            recipe = recipe | system.QUICK if args.quick else recipe
            found[name] = cell(system, recipe, path, args.device)
    print(system.report(found) if found else f"nothing in {folder} yet")


def cell(
    system: ModuleType, recipe: dict[str, Any], path: Path, device: str = "cpu"
) -> dict[str, Any]:
    """What the recipe gives: from its file if it is there, else run and written."""
    recipe = json.loads(json.dumps(recipe))  # as it will be read again
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        if found["recipe"] != recipe:
            sys.exit(f"{path} was made with {found['recipe']}, not {recipe}: give another --out")
        return found
    print(f"{path.stem}: {recipe}", flush=True)
    wall, cpu = time.perf_counter(), time.process_time()
    place = {} if device == "cpu" else {"device": device}
    result = system.run(recipe | place, path.with_suffix(""))
    found = {
        "recipe": recipe,
        **result,
        # of this process: of a run that was resumed, from there on
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": device if device == "cpu" else torch.cuda.get_device_name(device),
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(found, indent=1))
    part.replace(path)
    return found


if __name__ == "__main__":
    main()
