"""What a diagnosis costs: ``diagnose`` beside the bare weights, and k-hat beside ArviZ's.

    python benchmarks/diagnose.py                          # 10,000 MNIST test images, K = 1,000
    python benchmarks/diagnose.py --rows 200 --rounds 3    # a minute

The pair is a 784-200-200-z50 VAE with weights as initialised: cost does not depend on training.
"Bare" is :func:`ppvae.log_weights` over the same pieces of at most ``--max-rows`` rows, its
log-weights kept, and nothing else computed. Rounds are paired and alternate: in every other one
``diagnose`` goes first. k-hat is timed on log-weights of shape (K, rows) from N(0, 1), and checked
against ArviZ's in the same run. Peak memory is the resident set of a fresh process that runs one of
the two, less that of the same process before (Linux only).
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch

import ppvae
from ppvae import conditionals, data, diagnostics, guides, models, nets
from ppvae.diagnostics.rows import pieces


def pair() -> tuple[Any, Any]:
    """784-200-200-z50, tanh, as in Burda et al."""
    torch.manual_seed(0)
    tanh = torch.nn.Tanh
    likelihood = conditionals.Bernoulli(nets.mlp(50, 200, 200, 784, activation=tanh))
    guide = guides.Normal(nets.mlp(784, 200, 200, 2 * 50, activation=tanh))
    return models.VAE(likelihood, latent_dim=50), guide


def bare(model: Any, guide: Any, x: torch.Tensor, args: argparse.Namespace) -> torch.Tensor:
    """The log-weights and nothing else, ``(K, N)``."""
    columns = []
    with torch.no_grad(), pyro.validation_enabled(False):
        for part, sizes in pieces(len(x), args.particles, args.max_rows):
            drawn = [
                ppvae.log_weights(model, guide, x[part], num_particles=size).log_w for size in sizes
            ]
            columns.append(torch.cat(drawn))
    return torch.cat(columns, 1)


def diagnosed(model: Any, guide: Any, x: torch.Tensor, args: argparse.Namespace) -> Any:
    return ppvae.diagnose(
        model, guide, x, num_particles=args.particles, max_rows=args.max_rows, seed=0
    )


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def time_diagnose(args: argparse.Namespace) -> dict[str, Any]:
    model, guide = pair()
    x = data.load("mnist").test.x[: args.rows]
    work = {
        "bare": lambda: bare(model, guide, x, args),
        "diagnose": lambda: diagnosed(model, guide, x, args),
    }
    diagnosed(model, guide, x[:20], args)  # warm up
    rounds = []
    for number in range(args.rounds):
        order = list(work) if number % 2 == 0 else list(work)[::-1]
        rounds.append({name: seconds(work[name]) for name in order})
        one = rounds[-1]
        print(
            f"round {number}: bare {one['bare'][0]:.2f} s, diagnose {one['diagnose'][0]:.2f} s, "
            f"ratio {one['diagnose'][0] / one['bare'][0]:.3f} (CPU "
            f"{one['diagnose'][1] / one['bare'][1]:.3f})",
            flush=True,
        )
    ratios = {
        clock: [r["diagnose"][i] / r["bare"][i] for r in rounds]
        for i, clock in enumerate(("wall", "cpu"))
    }
    return {
        "rows": len(x),
        "particles": args.particles,
        "max_rows": args.max_rows,
        "bare_seconds": [r["bare"] for r in rounds],
        "diagnose_seconds": [r["diagnose"] for r in rounds],
        **{f"ratio_{clock}": values for clock, values in ratios.items()},
        **{f"ratio_{clock}_median": statistics.median(values) for clock, values in ratios.items()},
    }


def time_khat(args: argparse.Namespace) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz
    log_w = torch.randn(
        args.particles, args.rows, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    columns = log_w.numpy().T
    found = {}

    def theirs() -> None:
        with np.errstate(over="ignore"):
            found["theirs"] = arviz.psislw(columns)[1]

    def ours() -> None:
        found["ours"] = diagnostics.khat(log_w).numpy()

    ours()
    rounds = []
    for number in range(args.rounds):
        order = (ours, theirs) if number % 2 == 0 else (theirs, ours)
        rounds.append({work.__name__: seconds(work)[0] for work in order})
    speedup = [r["theirs"] / r["ours"] for r in rounds]
    error = float(np.abs(found["ours"] - found["theirs"]).max())
    ours_s, theirs_s = (statistics.median(r[name] for r in rounds) for name in ("ours", "theirs"))
    print(
        f"k-hat of {args.particles} x {args.rows}: ours {ours_s:.3f} s, ArviZ {theirs_s:.3f} s, "
        f"{statistics.median(speedup):.2f} times as fast, largest difference {error:.1e}"
    )
    return {"seconds": rounds, "speedup_median": statistics.median(speedup), "difference": error}


def peak(args: argparse.Namespace) -> dict[str, float]:
    """Peak resident MB above the start, of a fresh process each."""
    found = {}
    for name in ("bare", "diagnose"):
        command = [sys.executable, __file__, "--peak-of", name, "--rows", str(args.rows)]
        command += ["--particles", str(args.particles), "--max-rows", str(args.max_rows)]
        command += ["--threads", str(args.threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout.split()[-1])
        print(f"peak of {name}: {found[name]:.0f} MB above the start")
    return found


def peak_of(name: str, args: argparse.Namespace) -> None:
    model, guide = pair()
    x = data.load("mnist").test.x[: args.rows]
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading the data
    before = resident("VmRSS")
    (bare if name == "bare" else diagnosed)(model, guide, x, args)
    print(resident("VmHWM") - before)


def resident(field: str) -> float:
    """MB of this process: ``VmRSS`` now, ``VmHWM`` at the most."""
    status = Path("/proc/self/status").read_text()
    return float(status.split(f"{field}:")[1].split()[0]) / 1024


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000, help="test images (default: 10,000)")
    parser.add_argument("--particles", type=int, default=1000, metavar="K")
    parser.add_argument("--max-rows", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append the numbers to this .jsonl file")
    parser.add_argument("--peak-of", choices=["bare", "diagnose"], help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.peak_of:
        peak_of(args.peak_of, args)
        return
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch "
        f"{torch.__version__}, {args.threads} threads"
    )
    result = {
        "threads": args.threads,
        "diagnose": time_diagnose(args),
        "khat": time_khat(args),
        "peak_mb": peak(args),
    }
    ratio = result["diagnose"]["ratio_wall_median"]
    print(
        f"diagnose / bare weights, median of {args.rounds} rounds: {ratio:.3f} (target below 1.5)"
    )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
    if ratio >= 1.5 or result["khat"]["speedup_median"] <= 1:
        sys.exit("a target is missed")


if __name__ == "__main__":
    main()
