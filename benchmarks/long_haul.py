"""Does a long run grow? Memory, descriptors and threads over many steps, eager and compiled.

    python benchmarks/long_haul.py --steps 50000

Each row is one of: steps of a small VAE in ``ppvae.fit``, eager or compiled; draws from the model
and evaluations of the bound. Resident memory is read after a tenth of the work, when everything has
been built, and at each tenth after that. "flat" is a slope over the rest that would add less than
5 % of the memory in as many steps again; descriptors and threads must not grow at all. Exit status
1 if something grows.
"""

import argparse
import functools
import gc
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch

import ppvae
from ppvae import conditionals, diagnostics, guides, models, nets

TENTHS = 10


def seen():
    """Resident bytes, open descriptors, threads of Python and of the system."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    status = Path("/proc/self/status").read_text()
    threads = int(status.split("Threads:")[1].split()[0])
    return (
        pages * os.sysconf("SC_PAGE_SIZE"),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        threads,
    )


def pair():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(4, 32, 16)), latent_dim=4)
    return model, guides.Normal(nets.mlp(16, 32, 8))


class Look(ppvae.Callback):
    """Notes what is seen after each tenth of the steps."""

    def __init__(self, every):
        self.every, self.found = every, []

    def on_step_end(self, svi, loss):
        if svi.num_steps % self.every == 0:
            self.found.append(seen())


def trained(steps, compile):
    x = torch.bernoulli(torch.full((6400, 16), 0.5))
    svi = ppvae.SVI(*pair(), functools.partial(torch.optim.Adam, lr=1e-3), compile=compile)
    look = Look(max(1, steps // TENTHS))
    ppvae.fit(
        svi, x, epochs=-(-steps // 100), batch_size=64, valid=x[:64], progress=False, callbacks=look
    )
    return look.found


def evaluated(steps):
    model, guide = pair()
    x, found = torch.bernoulli(torch.full((64, 16), 0.5)), []
    for step in range(1, steps + 1):
        with torch.no_grad():
            model(size=64)
        diagnostics.log_evidence(model, guide, x, num_particles=10)
        if step % max(1, steps // TENTHS) == 0:
            found.append(seen())
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=50_000)
    parser.add_argument("--evaluations", type=int, default=5_000)
    parser.add_argument("--only", nargs="+", choices=["eager", "compiled", "evaluation"])
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = {
        "eager": lambda: (asked.steps, trained(asked.steps, compile=False)),
        "compiled": lambda: (asked.steps, trained(asked.steps, compile=True)),
        "evaluation": lambda: (asked.evaluations, evaluated(asked.evaluations)),
    }
    grows = False
    for name in asked.only or rows:
        started = time.perf_counter()
        steps, found = rows[name]()
        memory, descriptors, python, system = np.array(found, dtype=float).T
        slope = np.polyfit(np.arange(len(memory)), memory, 1)[0] * len(memory)
        flat = slope < 0.05 * memory[0]
        steady = all(row[-1] <= row[0] for row in (descriptors, python, system))
        grows |= not (flat and steady)
        print(
            f"{name}: {steps:,} steps in {time.perf_counter() - started:.0f} s; resident memory "
            f"{memory[0] / 2**20:.1f} MB after a tenth, {memory[-1] / 2**20:.1f} MB at the end "
            f"({'flat' if flat else 'GROWS'}); descriptors {descriptors[0]:.0f} -> "
            f"{descriptors[-1]:.0f}, threads {python[0]:.0f} -> {python[-1]:.0f} "
            f"(system {system[0]:.0f} -> {system[-1]:.0f}){'' if steady else ' GROW'}",
            flush=True,
        )
    return int(grows)


if __name__ == "__main__":
    sys.exit(main())
