"""What ``ppvae.fit`` pays to read data that are not in memory, beside data that are.

Epochs of the same steps on as many rows, three ways: a tensor in memory, the same rows in a mapped
file (``np.load(mmap_mode="r")``), and a ``DataLoader`` over a tensor with worker processes. The
first two are binarised afresh in each epoch; the ways take turns. The file was just written, so the
operating system still has it in memory: a disk can be slower than this, never faster. ``--drop``
asks the system to forget the file before each epoch.

    python benchmarks/data_path.py --out out/data_path.jsonl
    python benchmarks/data_path.py --device cuda --rows 500000
    python benchmarks/data_path.py --quick
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from columns import LR
from timing import alternate, parser, shown, spread, start
from torch.utils.data import DataLoader, TensorDataset
from workloads import WORKLOADS

import ppvae
from ppvae import data

BATCH = 128


def measure(
    compile: bool, rows: int, rounds: int, workers: int, drop: bool, device: torch.device
) -> dict[str, Any]:
    """Ms per step of each way, and what that is of data in memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        np.save(path, np.random.default_rng(0).random((rows + 2, 784), dtype=np.float32))
        mapped = np.load(path, mmap_mode="r")
        file = data.from_arrays(mapped, binarize="dynamic", valid=1, test=1).train
        memory = data.Split(file.values[file.rows], binarize="dynamic", seed=file.seed)
        loader = DataLoader(
            TensorDataset(memory.x),
            BATCH,
            shuffle=True,
            pin_memory=device.type == "cuda",
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        sources = {"in memory": memory, "mapped file": file, "DataLoader": loader}
        blocks = {
            name: functools.partial(epoch, engine(compile), source, path if drop else None, device)
            for name, source in sources.items()
        }
        alternate(blocks, 1)  # the checks and the compiler are in it
        taken = alternate(blocks, rounds)
        loader._iterator = None  # its workers stop
    return {
        name: {"ms": spread(ms), "ratio": spread(ms / taken["in memory"])}
        for name, ms in taken.items()
    }


def engine(compile: bool) -> ppvae.SVI:
    torch.manual_seed(0)
    workload = WORKLOADS[0]
    model, guide = workload.pair(workload.networks(torch.device("cpu")))
    adam = functools.partial(torch.optim.Adam, lr=LR)
    return ppvae.SVI(model, guide, adam, workload.bound, compile=compile)


def epoch(svi: ppvae.SVI, source: Any, dropped: Path | None, device: torch.device) -> float:
    """Ms per step of the second epoch: in the first one, batches from elsewhere are checked."""

    def forget(*_: Any) -> None:
        if dropped is not None:
            with dropped.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    history = ppvae.fit(
        svi,
        source,
        epochs=2,
        batch_size=BATCH,
        device=device,
        progress=False,
        on_epoch_end=forget,
    )
    first, second = history.rows
    ms: float = 1e3 * second["seconds"] / (second["step"] - first["step"])
    return ms


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__, rounds=10)
    p.add_argument("--rows", type=int, default=20_000, help="rows of an epoch; a round is an epoch")
    p.add_argument("--workers", type=int, default=1, help="of the DataLoader")
    p.add_argument("--drop", action="store_true", help="read from the disk in each epoch")
    args = p.parse_args(argv)
    rows = 600 if args.quick else args.rows
    device, results = start(args)
    print(f"One epoch: {rows:,} x 784, batch {BATCH}, K = 1; workers {args.workers}\n")
    print("| step | data | ms per step | of that in memory |")
    print("|---|---|---|---|", flush=True)
    for compile in (False, True):
        name = "compiled" if compile else "eager"
        task = functools.partial(
            measure, compile, rows, args.rounds, args.workers, args.drop, device
        )
        result = results.get(f"data/{name}/{rows}/{args.workers}/{args.drop}", task)
        for way, row in result.items():
            print(f"| {name} | {way} | {shown(row['ms'])} | {shown(row['ratio'])} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
