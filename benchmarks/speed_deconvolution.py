"""A step of the deconvolution model, global and local latents together, beside stock Pyro's.

Model and guide are those of `examples/deconvolution.py`: an AutoNormal of the globals, an encoder
of the abundances, one draw. Stock Pyro's programs are written as its users write them: a plate with
the size of the data, `pyro.module`, its NegativeBinomial or its GammaPoisson (as cell2location
has it; they are the same law), Trace_ELBO, its Adam, validation off. All start from the same
parameters. Before anything is timed the losses of three steps at the same draws are compared: they
are equal to 1e-4.

    python benchmarks/speed_deconvolution.py --threads 1 --out out/deconvolution.jsonl
    python benchmarks/speed_deconvolution.py --quick
"""

from __future__ import annotations

import argparse
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from example_scripts import example
from pyro import poutine
from pyro.infer.autoguide import AutoNormal, init_to_mean
from timing import alternate, parser, shown, spread, start, steps_for, timed
from torch import Tensor

import ppvae
from ppvae import elbo, guides

SIZES = {"spots": 400, "genes": 200, "types": 6, "width": 64, "batch": 100}
LR, TARGET = 5e-3, 3.0
BLOCK_SECONDS = 0.2
AUTONORMAL = functools.partial(AutoNormal, init_loc_fn=init_to_mean, init_scale=0.05)
Step = Callable[[Tensor], Any]


class Workload:
    """Counts, and the networks and globals that every column starts from."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes, self.script = sizes, example("deconvolution")
        pyro.set_rng_seed(0)
        options = argparse.Namespace(types=sizes["types"], genes=sizes["genes"])
        self.model, truth = self.script.make(options)
        self.x = self.script.draw_spots(self.model, truth, sizes["spots"])["x"]
        self.batches = self.x.split(sizes["batch"])

    def encoder(self) -> torch.nn.Module:
        torch.manual_seed(1)
        found: torch.nn.Module = self.script.Encoder(
            self.sizes["genes"], self.sizes["width"], self.sizes["types"]
        )
        return found


def ours(workload: Workload, compile: bool) -> Step:
    """``ppvae.SVI`` on the example's pair."""
    local = guides.Normal(workload.encoder())
    guide = guides.Global(AUTONORMAL, workload.model, workload.x, local=local)
    adam = functools.partial(torch.optim.Adam, lr=LR)
    rows = len(workload.x)
    svi = ppvae.SVI(workload.model, guide, adam, elbo.ELBO(), compile=compile, num_rows=rows)
    return svi.update


def stock(workload: Workload, likelihood: str) -> Step:
    """``pyro.infer.SVI`` on the same, in its own programs."""
    encoder, reference = workload.encoder(), workload.model.reference
    types, genes = reference.shape
    shapes = {"sensitivity": (genes,), "correction": (types, genes), "log_theta": (genes,)}
    priors, rows = workload.script.PRIORS, len(workload.x)

    def plate(x: Tensor) -> Any:
        return pyro.plate("data", rows, subsample=torch.arange(len(x)))

    def model(x: Tensor) -> None:
        drawn = {}
        for name, (loc, scale) in priors.items():
            law = dist.Normal(torch.full(shapes[name], loc), scale)
            drawn[name] = pyro.sample(name, law.to_event(len(shapes[name])))
        signatures = reference * drawn["correction"].exp()
        with plate(x):
            z = pyro.sample("z", dist.Normal(x.new_zeros(types), 1.0).to_event(1))
            mean = z.exp() @ signatures * drawn["sensitivity"].exp()
            theta = drawn["log_theta"].exp()
            if likelihood == "GammaPoisson":
                law = dist.GammaPoisson(theta, theta / mean)
            else:
                law = dist.NegativeBinomial(theta, logits=mean.log() - drawn["log_theta"])
            pyro.sample("x", law.to_event(1), obs=x)

    auto = AUTONORMAL(poutine.block(model, expose=list(priors)))
    auto._pyro_name = f"AutoNormal, {likelihood}"  # names in the store are the program's own
    auto(workload.batches[0])  # sets itself up, which draws

    def guide(x: Tensor) -> None:
        pyro.module(f"encoder, {likelihood}", encoder)
        auto(x)
        with plate(x):
            loc, log_scale = encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": LR}), pyro.infer.Trace_ELBO())

    def step(x: Tensor) -> float:
        with pyro.validation_enabled(False):
            return svi.step(x) * len(x) / rows  # its loss is one of all rows

    return step


COLUMNS: dict[str, Callable[[Workload], Step]] = {
    "ppvae-compiled": functools.partial(ours, compile=True),
    "ppvae-eager": functools.partial(ours, compile=False),
    "pyro, NegativeBinomial": functools.partial(stock, likelihood="NegativeBinomial"),
    "pyro, GammaPoisson": functools.partial(stock, likelihood="GammaPoisson"),
}


def first_losses(workload: Workload, steps: dict[str, Step]) -> dict[str, list[float]]:
    """Losses of three steps per row, in nats, all from the same seed; so gradients agree, too."""
    found = {}
    for name, step in steps.items():
        pyro.set_rng_seed(3)
        batch = workload.batches[0]
        found[name] = [float(step(batch)) / len(batch) for _ in range(3)]
    for losses in zip(*found.values(), strict=True):
        if any(not math.isclose(loss, losses[0], rel_tol=1e-4) for loss in losses):
            raise SystemExit(f"the columns do not compute the same losses: {found}")
    return found


def runner(step: Step, batches: tuple[Tensor, ...]) -> Callable[[int], None]:
    """So many steps, batch after batch."""

    def run(steps: int) -> None:
        for i in range(steps):
            step(batches[i % len(batches)])

    return run


def measure(sizes: dict[str, int], rounds: int, quick: bool) -> dict[str, Any]:
    """Milliseconds of each column, and its ratio to ppvae's two, within rounds."""
    pyro.clear_param_store()
    workload = Workload(sizes)
    steps = {name: make(workload) for name, make in COLUMNS.items()}
    losses = first_losses(workload, steps)
    runs = {name: runner(step, workload.batches) for name, step in steps.items()}
    blocks = {
        name: timed(run, 1 if quick else steps_for(run, BLOCK_SECONDS))
        for name, run in runs.items()
    }
    alternate(blocks, 2)  # warm up
    taken = alternate(blocks, rounds)
    return {
        name: {
            "ms": spread(taken[name]),
            "loss": losses[name],
            "of_compiled": spread(taken[name] / taken["ppvae-compiled"]),
            "of_eager": spread(taken[name] / taken["ppvae-eager"]),
        }
        for name in taken
    }


def main(argv: list[str] | None = None) -> None:
    p = parser(__doc__)
    for name, size in SIZES.items():
        p.add_argument(f"--{name}", type=int, default=size, help=f"(default: {size})")
    args = p.parse_args(argv)
    logging.getLogger("pyro").setLevel(logging.WARNING)
    _, results = start(args)
    sizes = {name: getattr(args, name) for name in SIZES}
    key = "deconvolution/" + ",".join(f"{name}={size}" for name, size in sizes.items())
    rows = results.get(key, functools.partial(measure, sizes, args.rounds, args.quick))
    print(f"## {key}\n")
    print("| step | ms | it / compiled ppvae | it / eager ppvae | losses of steps 1 and 3 |")
    print("|---|---|---|---|---|")
    for name, r in rows.items():
        ratios = f"{shown(r['of_compiled'])} | {shown(r['of_eager'])}"
        print(f"| {name} | {shown(r['ms'])} | {ratios} | {r['loss'][0]:.4f}, {r['loss'][-1]:.4f} |")
    fastest = min((n for n in rows if n.startswith("pyro")), key=lambda n: rows[n]["ms"][0])
    ratio = rows[fastest]["of_compiled"]
    met = "met" if ratio[0] >= TARGET else "NOT met"
    print(f"\n{fastest} / compiled ppvae: {shown(ratio)}, target >= {TARGET:g}: {met}")


if __name__ == "__main__":
    main()
