"""Train on more rows than fit into memory: MB/s, memory, and how long the steps wait for data.

Images of 3 x 64 x 64 bytes are written to a file, the system is asked to forget it, and
``ppvae.fit`` takes steps of a small pair for some seconds of an epoch, with a checkpoint on the
way; then a new call goes on from it, and says how long its first step took to come. ``RSS`` is
without the pages of mapped files, which the system takes back when it needs them. The file is
removed in the end, and there must be room for it and 15 GB more.

    python benchmarks/larger_than_memory.py --gb 48 --kinds mapped windows
    python benchmarks/larger_than_memory.py --gb 8 --kinds parquet zarr    # needs pyarrow, zarr
    python benchmarks/larger_than_memory.py --quick
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ppvae
from ppvae import conditionals, data, guides, models, nets

EVENT = 3 * 64 * 64
BLOCK = 4096  # rows that are written at once; those of a row group
BATCH = 256


def blocks(rows: int) -> Any:
    """The same noise again and again, each row with its number in its first bytes."""
    noise = np.random.default_rng(0).integers(0, 256, (BLOCK, EVENT), dtype=np.uint8)
    for start in range(0, rows, BLOCK):
        noise[:, :8] = np.arange(start, start + BLOCK)[:, None].view(np.uint8)
        yield start, noise[: rows - start]


def write_npy(path: Path, rows: int) -> None:
    file = np.lib.format.open_memmap(path, "w+", np.uint8, (rows, EVENT))
    offset = file.offset
    del file
    with path.open("r+b") as out:
        out.seek(offset)
        for _, block in blocks(rows):
            out.write(block)
        os.fsync(out.fileno())


def write_parquet(path: Path, rows: int) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    width = EVENT // 4  # Parquet has no numbers of fewer bits than 32
    kind = pa.list_(pa.int32(), width)
    schema = pa.schema({"x": kind})
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as out:
        for _, block in blocks(rows):
            flat = pa.array(block.view(np.int32).reshape(-1))
            column = pa.FixedSizeListArray.from_arrays(flat, width)
            out.write_table(pa.table({"x": column}), row_group_size=BLOCK)


def write_zarr(path: Path, rows: int) -> None:
    import zarr

    chunks = (1024, EVENT)
    array = zarr.create_array(
        store=str(path), shape=(rows, EVENT), chunks=chunks, dtype="uint8", compressors=None
    )
    for start, block in blocks(rows):
        array[start : start + len(block)] = block


def opened(kind: str, path: Path) -> data.Stored:
    window: int | None = None
    if kind == "parquet":
        import pyarrow.parquet as pq

        rows: Any = pq.ParquetFile(path)
    elif kind == "zarr":
        import zarr

        rows = zarr.open_array(path, mode="r")
    else:
        rows = np.load(path, mmap_mode="r")
        window = 16_384 if kind == "windows" else None
    return data.Stored(rows, window=window, transform=pooled)


def pooled(batch: Any) -> Any:
    """Means of 64 pixels: all bytes are used, and the pair is small."""
    x = batch["x"].view(torch.uint8) if isinstance(batch, dict) else batch
    return x.view(-1, 192, 64).float().mean(2) / 255


def forget(path: Path) -> None:
    """Ask the system to drop what it keeps of a file, or of the files in a folder."""
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def pair() -> ppvae.SVI:
    torch.manual_seed(0)
    model = models.VAE(conditionals.Normal(nets.mlp(8, 64, 192), scale=0.1), latent_dim=8)
    guide = guides.Normal(nets.mlp(192, 64, 2 * 8))
    return Timed(model, guide, functools.partial(torch.optim.Adam, lr=1e-3))


class Timed(ppvae.SVI):
    """Seconds in steps, and when the first and the last one ended."""

    working, began, ended, steps = 0.0, 0.0, 0.0, 0

    def update(self, *args: Any) -> Any:
        start = time.perf_counter()
        loss = super().update(*args)
        self.ended = time.perf_counter()
        if not self.steps:
            self.began = self.ended
        else:
            self.working += self.ended - start
        self.steps += 1
        return loss


class Enough(Exception):
    """The seconds are over."""


class Watch(ppvae.Callback):
    """Stop after some seconds of steps; note the memory that is the process's own."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.peak = seconds, 0

    def on_step_end(self, svi: Any, loss: Any) -> None:
        if svi.steps % 20 == 1:
            status = Path("/proc/self/status").read_text()
            self.peak = max(self.peak, int(status.split("RssAnon:")[1].split()[0]) // 1024)
        if svi.ended - svi.began > self.seconds:
            raise Enough


def measure(kind: str, path: Path, seconds: float, folder: Path) -> dict[str, Any]:
    """MB/s, the share of time that steps waited, MB of memory, seconds to go on."""
    forget(path)
    stored, watch = opened(kind, path), Watch(seconds)
    files = ppvae.Checkpoints(folder / f"run-{kind}", every_steps=100, keep=1)
    run = functools.partial(
        ppvae.fit, data=stored, epochs=1, batch_size=BATCH, checkpoint=files, progress=False
    )
    svi: Any = pair()
    with contextlib.suppress(Enough):
        run(svi, callbacks=[watch])
    wall = svi.ended - svi.began
    again: Any = pair()
    started = time.perf_counter()
    with contextlib.suppress(Enough):
        run(again, callbacks=[Watch(0.0)], resume=True)
    return {
        "share": svi.steps * BATCH / len(stored),
        "mb": (svi.steps - 1) * BATCH * EVENT / 1e6 / wall,
        "waiting": 1 - svi.working / wall,
        "rss": watch.peak,
        "resumed": again.began - started if again.steps else 0.0,
    }


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--gb", type=float, default=48.0, help="of the file")
    p.add_argument("--kinds", nargs="+", default=["mapped", "windows"])
    p.add_argument("--seconds", type=float, default=60.0, help="of steps, for each kind")
    p.add_argument("--folder", type=Path, default=None, help="where there is room for the file")
    p.add_argument("--quick", action="store_true")
    args = p.parse_args(argv)
    if args.quick:
        args.gb, args.seconds = 0.1, 1.0
    rows = int(args.gb * 1e9) // EVENT
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    print(f"{rows:,} rows of {EVENT:,} bytes, {args.gb:g} GB; memory {memory:.0f} GB")
    print("| kind | part of an epoch | MB/s | time waiting | RSS | first step after resume |")
    print("|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder, written = Path(name), None
        for kind in args.kinds:
            ending = {"mapped": "npy", "windows": "npy"}.get(kind, kind)
            path = folder / f"x.{ending}"
            if written not in (None, path):
                shutil.rmtree(written) if written.is_dir() else written.unlink()
            if written != path:
                if shutil.disk_usage(folder).free < (args.gb + 15) * 1e9:
                    print(f"{folder} has no room for {args.gb:g} GB and 15 GB more")
                    return 1
                started = time.perf_counter()
                {"npy": write_npy, "parquet": write_parquet, "zarr": write_zarr}[ending](path, rows)
                seconds = time.perf_counter() - started
                print(f"(written in {seconds:.0f} s, {1e3 * args.gb / seconds:.0f} MB/s)")
                written = path
            found = measure(kind, path, args.seconds, folder)
            print(
                f"| {kind} | {found['share']:.1%} | {found['mb']:.0f} | {found['waiting']:.0%} | "
                f"{found['rss']} MB | {found['resumed']:.2f} s |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
