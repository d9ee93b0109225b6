"""A VAE trained by several processes, on one machine or many, that can be killed at any time.

    python examples/distributed.py                                      # one process
    torchrun --standalone --nproc-per-node=2 examples/distributed.py    # two: CPU cores or GPUs

On each of two machines with 8 GPUs, with --out in a folder that they share:

    torchrun --nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500
             examples/distributed.py --out /shared/run

Interrupt it, or kill it, and give the same command again: it goes on where it ended. Asked to end
early, it ends with status 75, by which a job script knows that there is more to do. With SLURM and
with torchrun --max-restarts: "Several devices and machines" in docs/training.md.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning_fabric import Fabric
from lightning_fabric.loggers import CSVLogger

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=50, help="passes over the data")
    parser.add_argument("--batch-size", type=int, default=128, help="rows, over all processes")
    parser.add_argument("--precision", default="32-true", choices=["32-true", "bf16-mixed"])
    parser.add_argument("--out", type=Path, default=Path("out/distributed"))
    args = parser.parse_args(argv)

    # What torchrun, or srun, says about the processes; without them there is one.
    if "WORLD_SIZE" in os.environ:
        names = "LOCAL_WORLD_SIZE", "WORLD_SIZE"
    else:
        names = "SLURM_NTASKS_PER_NODE", "SLURM_NTASKS"
    here, world = (int(os.environ.get(name, 1)) for name in names)
    fabric = Fabric(
        devices=here,
        num_nodes=world // here,
        strategy="ddp" if world > 1 else "auto",
        precision=args.precision,
        loggers=CSVLogger(args.out, name="log"),
    )
    fabric.launch()

    # From here on every process does the same; fit deals the rows out and sums the gradients.
    torch.manual_seed(0)
    digits = data.load("digits")
    model = models.VAE(conditionals.Bernoulli(nets.mlp(16, 256, 64)), latent_dim=16)
    guide = guides.Normal(nets.mlp(64, 256, 2 * 16))
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO())
    history = ppvae.fit(
        svi,
        digits,
        epochs=args.epochs,
        batch_size=args.batch_size,
        checkpoint=args.out,
        resume=True,
        fabric=fabric,
    )
    if fabric.is_global_zero:
        print(history)
        if history.interrupted:
            print("interrupted: the same command goes on from here")
    if history.interrupted:
        sys.exit(75)  # EX_TEMPFAIL of sysexits.h: try again


if __name__ == "__main__":
    main()
