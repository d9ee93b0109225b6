"""A compiled step of NVAE beside the eager one, in turns in one process: milliseconds and memory.

The networks and the batch of the CPU recipe in `reproduce_nvae.py`, with its regulariser, balanced
KLs and Adamax; channels last, one thread unless `--threads` says otherwise. Memory is by how much
the resident memory rises in three steps. The build takes minutes of processor time, and less where
the compiler finds its files again.

    python benchmarks/speed_nvae.py --out out/speed_nvae.jsonl
    python benchmarks/speed_nvae.py --quick
"""

from __future__ import annotations

import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import reproduce_nvae
import torch
from memory import rise
from timing import alternate, parser, shown, spread, start, steps_for, timed
from torch import Tensor, nn

import ppvae
from ppvae import elbo, nets

RECIPE = reproduce_nvae.BASE
MOST = 0.8


def svi(compile: bool) -> ppvae.SVI:
    """As the recipe trains it, in the middle of the warm-up."""
    pyro.set_rng_seed(0)
    model, guide = reproduce_nvae.build(RECIPE)
    spectral = nets.Spectral(nn.ModuleList([model, guide]), RECIPE["regularizer"])
    adamax = functools.partial(torch.optim.Adamax, lr=RECIPE["lr"], eps=1e-3, foreach=True)
    beta = elbo.Balanced(elbo.LinearWarmup(10_000, start=1e-4), model.balance)
    bound = elbo.ELBO(kl="analytic", beta=beta)
    return ppvae.SVI(model, guide, adamax, bound, regularizer=spectral, compile=compile)


def measure(x: Tensor, rounds: int, compile: bool = True) -> dict[str, Any]:
    """Milliseconds and MB of both steps, their ratio, and the processor seconds of the build."""
    eager, compiled = svi(False), svi(compile)
    started = time.process_time()
    losses = []
    for one in (compiled, eager):
        pyro.set_rng_seed(1)
        losses.append(one.step(x))
    if not np.isclose(*losses, rtol=1e-3):
        raise SystemExit(f"the steps do not compute the same loss: {losses}")

    def several(one: ppvae.SVI, steps: int) -> None:
        for _ in range(steps):
            one.step(x)

    both = {"eager": eager, "compiled": compiled}
    runs = {name: functools.partial(several, one) for name, one in both.items()}
    built = time.process_time() - started
    steps = steps_for(runs["eager"], 0.5)
    blocks = {name: timed(run, steps) for name, run in runs.items()}
    alternate(blocks, 2)  # warm up
    taken = alternate(blocks, rounds)
    tell = Path("/proc/self/clear_refs").exists()
    return {
        "ms": {name: spread(values) for name, values in taken.items()},
        "mb": {name: rise(lambda run=run: run(3)) if tell else None for name, run in runs.items()},
        "ratio": spread(taken["compiled"] / taken["eager"]),
        "build_seconds": compiled.build_seconds,
        "own_cpu_seconds": built,
    }


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__).parse_args(argv)
    args.threads = args.threads or 1
    _, results = start(args)
    x = torch.bernoulli(torch.full((4 if args.quick else RECIPE["batch_size"], 1, 28, 28), 0.2))
    task = functools.partial(measure, x, args.rounds, compile=not args.quick)
    found = results.get(f"nvae/{args.threads}", task)
    print("| step | ms | MB |\n|---|---|---|")
    for name, times in found["ms"].items():
        memory = found["mb"][name]
        print(f"| {name} | {shown(times, 0)} | {'-' if memory is None else f'{memory:.0f}'} |")
    met = "met" if found["ratio"][0] <= MOST else "NOT met"
    print(f"\ncompiled / eager: {shown(found['ratio'])}, target <= {MOST}: {met}")
    print(f"build: {found['build_seconds']:.0f} s, {found['own_cpu_seconds']:.0f} of this process")


if __name__ == "__main__":
    main()
