"""What ``ppvae.fit`` adds to a step: shuffling, the progress bar, a CSV logger, bookkeeping.

Epochs of fit, from the end of one to the end of the next, so that nothing of the loop is left out.
After each step of fit, outside its clock, follow bare calls of ``svi.update``: one on a slice in
order, which indexes nothing, and one on shuffled rows, so that all see the same machine. The
progress bar draws to a terminal that discards it; the logger writes its file. Validation is off.

    python benchmarks/speed_fit.py --out out/speed_fit.jsonl
    python benchmarks/speed_fit.py --quick
"""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import tempfile
from time import perf_counter
from typing import Any

import torch
from columns import LR, waiter
from lightning_fabric.loggers import CSVLogger
from timing import parser, shown, spread, start
from torch import Tensor
from workloads import WORKLOADS

import ppvae
from ppvae import data

BATCH = 128


class Terminal(io.StringIO):
    """A terminal that nobody looks at."""

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        return len(text)


class PairedSVI(ppvae.SVI):
    """Takes two bare updates after each of its own, and keeps the time of all three apart."""

    def pair_with(self, x: Tensor, wait: Any) -> None:
        """Bare updates are on batches of x from now on."""
        self.wait, self.x, self.slices = wait, x, x.split(BATCH)
        self.begin_epoch()

    def begin_epoch(self) -> dict[str, float]:
        """Start all clocks again; returns what they showed, in seconds."""
        shown = getattr(self, "seconds", {})
        self.order = torch.randperm(len(self.x), device=self.x.device).split(BATCH)
        self.seconds = dict.fromkeys(("slices", "shuffled"), 0.0)
        self.count = 0
        return shown

    def update(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().update(*args, **kwargs)
        if not hasattr(self, "slices") or self.count == len(self.slices):
            return loss
        self.wait()  # what fit asked for is on fit's clock
        i = self.count
        for name in ("slices", "shuffled")[:: 1 if i % 2 else -1]:
            started = perf_counter()
            rows = self.slices[i] if name == "slices" else self.x.index_select(0, self.order[i])
            super().update(rows)
            self.wait()
            self.seconds[name] += perf_counter() - started
        self.count += 1
        return loss


def measure(
    compile: bool, binarised: bool, rows: int, epochs: int, device: torch.device
) -> dict[str, Any]:
    """Epochs of fit against bare steps on as many rows."""
    torch.manual_seed(0)
    workload = WORKLOADS[0]
    grey = torch.full((rows, *workload.family.shape), 0.13)
    x = torch.bernoulli(grey).to(device)
    source: Any = x
    if binarised:
        whole = data.from_arrays(
            torch.cat([grey, grey[:2]]).numpy(), valid=1, test=1, binarize="dynamic"
        )
        source = whole.train.to(device)
    model, guide = workload.pair(workload.networks(device))
    adam = functools.partial(torch.optim.Adam, lr=LR)
    svi = PairedSVI(model, guide, adam, workload.bound, compile=compile)
    svi.pair_with(x, waiter(device))
    ended: list[float] = []
    bare: list[dict[str, float]] = []
    began: list[float] = []

    def note(svi: PairedSVI, history: ppvae.History) -> None:
        ended.append(perf_counter())
        bare.append(svi.begin_epoch())
        began.append(perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(Terminal()):
        logger = CSVLogger(folder)
        ppvae.fit(
            svi, source, epochs=epochs + 1, batch_size=BATCH, on_epoch_end=note, loggers=logger
        )
    ratios: dict[str, list[float]] = {"slices": [], "shuffled": []}
    steps = len(svi.slices)
    for i in range(1, epochs + 1):  # the first epoch has the checks and the compiler in it
        inside = ended[i] - began[i - 1] - sum(bare[i].values())
        for name in ratios:
            ratios[name].append(inside / bare[i][name])
    return {
        "steps": steps,
        "ms_bare": spread([1e3 * b["slices"] / steps for b in bare[1:]]),
        **{name: spread(values) for name, values in ratios.items()},
    }


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__, rounds=10)
    p.add_argument("--rows", type=int, default=50_000, help="rows of an epoch; a round is an epoch")
    args = p.parse_args(argv)
    rows = 1_280 if args.quick else args.rows
    device, results = start(args)
    print(f"One epoch: {rows:,} x 784, batch {BATCH}, K = 1; target: at most 1.03 on slices\n")
    print("| ppvae.fit | bare step, ms | fit / bare steps on slices | ... on shuffled rows |")
    print("|---|---|---|---|", flush=True)
    for compile in (False, True):
        for binarised in (False, True):
            name = "compiled" if compile else "eager"
            name += ", binarised afresh each epoch" if binarised else ""
            task = functools.partial(measure, compile, binarised, rows, args.rounds, device)
            result = results.get(f"fit/{name}/{rows}", task)
            cells = [shown(result[key], 3) for key in ("ms_bare", "slices", "shuffled")]
            print(f"| {name} | {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
