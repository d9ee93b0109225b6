"""What ``ppvae.fit`` adds to a step: shuffling, the progress bar, a CSV logger, bookkeeping.

Epochs of fit, from the end of one to the end of the next, so that nothing of the loop is left out.
After each epoch of fit, outside its clock, follow as many bare calls of ``svi.update`` on slices in
order, which index nothing, and on shuffled rows, so that all see the same machine. The
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


def bare(svi: ppvae.SVI, x: Tensor, shuffled: bool, wait: Any) -> float:
    """The seconds of an epoch of ``svi.update``, on slices in order or on shuffled rows."""
    order = torch.randperm(len(x), device=x.device).split(BATCH)
    wait()
    started = perf_counter()
    for rows, slice in zip(order, x.split(BATCH), strict=True):
        svi.update(x.index_select(0, rows) if shuffled else slice)
    wait()
    return perf_counter() - started


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
    svi = ppvae.SVI(model, guide, adam, workload.bound, compile=compile)
    wait = waiter(device)
    ended: list[float] = []
    began: list[float] = []
    seconds: dict[str, list[float]] = {"slices": [], "shuffled": []}

    def note(svi: ppvae.SVI, history: ppvae.History) -> None:
        wait()
        ended.append(perf_counter())
        for name in ("slices", "shuffled")[:: 1 if len(ended) % 2 else -1]:
            seconds[name].append(bare(svi, x, name == "shuffled", wait))
        began.append(perf_counter())

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(Terminal()):
        logger = CSVLogger(folder)
        ppvae.fit(
            svi, source, epochs=epochs + 1, batch_size=BATCH, on_epoch_end=note, loggers=logger
        )
    steps = len(x.split(BATCH))
    inside = [ended[i] - began[i - 1] for i in range(1, epochs + 1)]
    ratios = {
        name: spread([fit / alone for fit, alone in zip(inside, taken[1:], strict=True)])
        for name, taken in seconds.items()  # the first epoch has the checks and the compiler in it
    }
    ms = spread([1e3 * alone / steps for alone in seconds["slices"][1:]])
    return {"steps": steps, "ms_bare": ms, **ratios}


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
