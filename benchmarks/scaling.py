"""How `ppvae.fit` scales over processes: time per step with 1, 2, ... of them.

Each number of processes trains the same pair on the same number of steps, under Lightning Fabric
(gloo on the CPU, NCCL on GPUs), twice: with the joint batch fixed (strong scaling: perfect is
1 / W) and with the rows per process fixed (weak scaling: perfect is 1). One thread per process.
It prints the median over rounds, and the bytes that an all-reduce moves; rank 0's clock.

    python benchmarks/scaling.py                                  # 1 and 2 processes, CPU
    python benchmarks/scaling.py --accelerator cuda --processes 1 2 4 8 --hidden 2048
    python benchmarks/scaling.py --quick
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric

import ppvae
from ppvae import conditionals, guides, models, nets


def train(fabric: Fabric, args: argparse.Namespace, batch_size: int) -> dict[str, Any]:
    """Seconds per step, in rounds of one epoch; runs in each process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    h = args.hidden
    model = models.VAE(conditionals.Bernoulli(nets.mlp(50, h, h, 784)), latent_dim=50)
    guide = guides.Normal(nets.mlp(784, h, h, 100))
    svi = ppvae.SVI(
        model, guide, functools.partial(torch.optim.Adam, lr=1e-3), compile=args.compile
    )
    x = torch.bernoulli(torch.full((args.steps * batch_size, 784), 0.3))
    history = ppvae.fit(
        svi, x, epochs=args.rounds + 1, batch_size=batch_size, fabric=fabric, progress=False
    )
    seconds = [second / args.steps for second in history.column("seconds")[1:]]
    parameters = sum(p.numel() for p in svi.objective.parameters())
    return {"ms": 1e3 * statistics.median(seconds), "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--accelerator", default="cpu")
    parser.add_argument("--batch-size", type=int, default=256, help="of the joint batch, strong")
    parser.add_argument("--hidden", type=int, default=200)
    parser.add_argument("--steps", type=int, default=100, help="per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="append a JSON line")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.rounds = 5, 1
    results: list[dict[str, Any]] = []
    for size in args.processes:
        for kind, batch_size in (
            ("strong", args.batch_size),
            ("weak", args.batch_size // args.processes[-1] * size),
        ):
            # processes that already hold CUDA cannot be forked, and this one does not hold it
            fabric = Fabric(
                accelerator=args.accelerator,
                devices=size,
                strategy="auto" if size == 1 else "ddp_spawn",
            )
            found = fabric.launch(train, args, batch_size)
            results.append({"processes": size, "scaling": kind, "batch_size": batch_size, **found})
    megabytes = 4 * results[0]["parameters"] / 1e6
    print(f"{results[0]['parameters']:,} parameters: {megabytes:.2f} MB per all-reduce")
    print("scaling  processes  batch  ms per step  against the first")
    first: dict[str, float] = {}
    for row in results:
        base = first.setdefault(row["scaling"], row["ms"])
        print(
            f"{row['scaling']:7}  {row['processes']:9}  {row['batch_size']:5}  {row['ms']:11.3f}  "
            f"{row['ms'] / base:.3f}"
        )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "a", encoding="utf-8") as lines:
            lines.write(
                json.dumps({"settings": vars(args) | {"out": None}, "rows": results}) + "\n"
            )


if __name__ == "__main__":
    main()
