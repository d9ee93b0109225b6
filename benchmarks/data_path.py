"""What it costs `ppvae.fit` to read the data from a file, beside data that stay in memory.

An epoch of the same steps on the same rows, three ways: a tensor in memory, the same rows in a
mapped file (`np.load(mmap_mode="r")`), and a `DataLoader` over a tensor with worker processes. The
ways take turns, in an order that is reversed every other round; ratios are taken within a round.
The file was just written, so the operating system still has it in memory: a disk can be slower
than this, never faster. `--drop` asks the system to forget the file before each epoch.

    python benchmarks/data_path.py --out out/data_path.jsonl    # a minute or two
    python benchmarks/data_path.py --device cuda --rows 500000
    python benchmarks/data_path.py --quick                      # seconds: does it run?
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import ppvae
from ppvae import conditionals, data, guides, models, nets


def pair() -> ppvae.SVI:
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(50, 200, 200, 784)), latent_dim=50)
    guide = guides.Normal(nets.mlp(784, 200, 200, 100))
    return ppvae.SVI(model, guide, functools.partial(torch.optim.Adam, lr=1e-3))


def forget(path: Path) -> None:
    """Let the operating system drop its copy of a file."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--workers", type=int, default=1, help="of the DataLoader")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--drop", action="store_true", help="read from the disk in each epoch")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="append a JSON line")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.rounds = 600, 1
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.npy"
        grey = np.random.default_rng(0).random((args.rows, 784), dtype=np.float32)
        np.save(path, grey)
        array = np.load(path, mmap_mode="r")
        file = data.from_arrays(array, binarize="dynamic", valid=1, test=1).train
        memory = data.Split(file.values[file.rows], binarize="dynamic", seed=file.seed)
        binary = TensorDataset(memory.x)
        pinned = args.device != "cpu"
        workers = {"num_workers": args.workers, "persistent_workers": args.workers > 0}
        loader = DataLoader(binary, args.batch_size, shuffle=True, pin_memory=pinned, **workers)
        sources: dict[str, Any] = {"in memory": memory, "mapped file": file, "DataLoader": loader}
        engines = {name: pair() for name in sources}

        def epoch(name: str) -> float:
            if args.drop:
                forget(path)
            history = ppvae.fit(
                engines[name],
                sources[name],
                epochs=1,
                batch_size=args.batch_size,
                device=args.device,
                progress=False,
            )
            return history.rows[0]["seconds"]  # without the checks before the first step

        for name in sources:
            epoch(name)
        seconds: dict[str, list[float]] = {name: [] for name in sources}
        for turn in range(args.rounds):
            for name in sources if turn % 2 else reversed(list(sources)):
                seconds[name].append(epoch(name))
        loader._iterator = None  # its workers stop

    steps = -(-len(memory) // args.batch_size)
    result: dict[str, Any] = {"rows": len(memory), "steps": steps, "device": args.device}
    result |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    result |= {"machine": platform.processor() or platform.machine(), "drop": args.drop}
    print(f"{len(memory)} rows, batch {args.batch_size}, {torch.get_num_threads()} threads")
    for name, each in seconds.items():
        ratios = [a / b for a, b in zip(each, seconds["in memory"], strict=True)]
        middle = statistics.median(ratios)
        low, high = np.quantile(ratios, [0.25, 0.75])
        result[name] = {"ms_per_step": 1e3 * statistics.median(each) / steps, "ratio": middle}
        ms = result[name]["ms_per_step"]
        print(f"{name:12} {ms:8.3f} ms per step, ratio {middle:.3f} [{low:.3f}, {high:.3f}]")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "a", encoding="utf-8") as lines:
            lines.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
