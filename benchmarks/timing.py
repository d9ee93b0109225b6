"""Timing side by side, results that can be resumed, and where they were measured."""

from __future__ import annotations

import argparse
import datetime
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from time import perf_counter, sleep
from typing import Any

import numpy as np
import torch

import ppvae

MIN_ROUNDS = 10
MOST_BUSY = 0.5  # cores that others may use while something is measured
PACKAGES = ("torch", "pyro-ppl", "numpyro", "jax", "pythae")


# ------------------------------------------------------------------------------ measuring


def alternate(blocks: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, Any]:
    """What every block returns, ``(rounds,)`` by name.

    Within a round all run once. The order starts one further on in each round, and is reversed in
    every other one, so that drift and neighbours are shared out; ratios are taken within rounds.
    """
    names = list(blocks)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        turn = names[r % len(names) :] + names[: r % len(names)]
        for name in turn if r % 2 == 0 else turn[::-1]:
            taken[name].append(blocks[name]())
    return {name: np.array(values) for name, values in taken.items()}


def timed(run: Callable[[int], Any], steps: int) -> Callable[[], float]:
    """A block: one step outside the clock, for caches and threads, then the mean of some, in ms."""

    def block() -> float:
        run(1)
        started = perf_counter()
        run(steps)
        return 1e3 * (perf_counter() - started) / steps

    return block


def steps_for(run: Callable[[int], Any], seconds: float) -> int:
    """How many steps take about so long, 3 to 200."""
    run(3)
    started = perf_counter()
    run(3)
    return min(200, max(3, round(3 * seconds / (perf_counter() - started))))


def spread(values: Iterable[float]) -> list[float]:
    """The median, and the 10th and 90th percentile over rounds."""
    return [float(q) for q in np.quantile(np.array(values), (0.5, 0.1, 0.9))]


def shown(values: list[float] | None, digits: int = 2) -> str:
    """A spread as text."""
    if values is None:
        return "-"
    median, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{median} [{low}, {high}]"


# ------------------------------------------------------------------------------ settings


def parser(description: str | None, rounds: int = 30) -> argparse.ArgumentParser:
    """The options that all the speed scripts share."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    p.add_argument("--threads", type=int, help="threads of torch and of JAX; default: torch's")
    p.add_argument("--rounds", type=int, default=rounds, help=f"at least {MIN_ROUNDS}")
    p.add_argument("--quick", action="store_true", help="does it run? The numbers mean nothing")
    p.add_argument("--denormals", action="store_true", help="keep such numbers, as torch does")
    p.add_argument("--out", type=Path, help="append to this file of JSON lines; skip what is there")
    return p


def start(args: argparse.Namespace) -> tuple[torch.device, Results]:
    """Settle threads, device and rounds, open the results, and say where this runs."""
    if args.quick:
        args.rounds = 2
    elif args.rounds < MIN_ROUNDS:
        raise SystemExit(f"--rounds must be at least {MIN_ROUNDS} (or --quick), got {args.rounds}")
    device = torch.device(args.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: no CUDA device here")
    set_threads(args.threads or torch.get_num_threads(), args.denormals)
    where = environment(device)
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    if where["busy"] is not None and where["busy"] > MOST_BUSY and not args.quick:
        seen = f"{where['busy']:.2f} cores are busy with something else"
        if args.out is not None:
            raise SystemExit(f"{seen}: nothing is written to {args.out}; wait, or go without --out")
        print(f"note: {seen}; expect wide spreads", flush=True)
    print(flush=True)
    settings = {"rounds": args.rounds, "quick": args.quick, "denormals": args.denormals}
    return device, Results(args.out, where, settings)


def set_threads(threads: int, denormals: bool = False) -> None:
    """The same number for torch and for XLA; call it before JAX is first used."""
    torch.set_num_threads(threads)
    os.environ["NPROC"] = str(threads)  # what XLA sizes its CPU pools by
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # on a GPU, leave room for torch
    os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"  # float32 on a GPU too, as torch has it
    torch.backends.cudnn.allow_tf32 = False
    torch.set_flush_denormal(not denormals)  # XLA flushes them, too


def environment(device: torch.device) -> dict[str, Any]:
    """Where and with what the numbers are measured."""
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "load": [round(v, 2) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "busy": busy_cores(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "ppvae": f"{ppvae.__version__} ({source_hash()})",
        "date": datetime.date.today().isoformat(),
    }


def busy_cores(seconds: float = 3.0) -> float | None:
    """How many cores were in use over some seconds; None where the system does not say.

    Not the load average: after one script of several in a row it shows that script for minutes.
    """
    try:
        before = _ticks()
        sleep(seconds)
        used, total = (after - b for after, b in zip(_ticks(), before, strict=True))
    except OSError:
        return None
    return round((os.cpu_count() or 1) * used / max(total, 1), 2)


def _ticks() -> tuple[int, int]:
    """Ticks of all cores together since the start of the system: in use, and all."""
    user, nice, system, idle, waiting, *rest = map(int, Path("/proc/stat").read_text().split()[1:9])
    used = user + nice + system + sum(rest)
    return used, used + idle + waiting


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def source_hash() -> str:
    """Of ppvae and these scripts, so that a resumed run never mixes two states of the code."""
    files = [*Path(ppvae.__file__).parent.rglob("*.py"), *Path(__file__).parent.glob("*.py")]
    return hashlib.sha256(b"".join(f.read_bytes() for f in sorted(files))).hexdigest()[:8]


# ------------------------------------------------------------------------------ results


class Results:
    """A file of JSON lines, one per measurement; without a path, only this run's memory."""

    def __init__(self, path: Path | None, where: dict[str, Any], settings: dict[str, Any]) -> None:
        self.path, self.where, self.settings = path, where, settings
        self.lines: list[dict[str, Any]] = []
        if path is not None and path.exists():
            for text in path.read_text().splitlines():
                try:
                    self.lines.append(json.loads(text))
                except json.JSONDecodeError:
                    continue  # the line a killed run was writing
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of this name, if the file has it from the same code, settings and place."""
        for line in self.lines:
            if line["key"] == key and self._comparable(line):
                print(f"{key}: from {self.path}, {line['environment']['date']}")
                found: dict[str, Any] = line["result"]
                return found
        result = measure()
        line = {
            "key": key,
            "result": result,
            "environment": self.where,
            "settings": self.settings,
        }
        self.lines.append(line)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
        return result

    def _comparable(self, line: dict[str, Any]) -> bool:
        changing = ("load", "busy", "date")
        here, there = self.where, line["environment"]
        return line["settings"] == self.settings and all(
            there.get(name) == here[name] for name in here if name not in changing
        )
