"""The cost of one optimisation step, and of `ppvae.fit` around it.

Part 1 times `ppvae.SVI.step` beside the same step in stock Pyro and in plain PyTorch, on a VAE
784-200-200-z50-200-200-784 with tanh and Adam(1e-3). Part 2 times an epoch of `ppvae.fit` beside
bare calls of `svi.update` on the same rows: after each step of fit, outside its clock, one on a
slice in order (nothing is indexed) and one on shuffled rows.

The competitors of part 1 run in one process, in short blocks, in an order that is reversed every
other round; ratios are taken within a round, and their median and quartiles reported, so that other
work on the machine disturbs both sides of a ratio alike. "CPU" ratios are of the process's CPU
time, which other work disturbs less still. Milliseconds are context only.

    python benchmarks/speed_step.py --out out/speed.jsonl    # a few minutes; appends one JSON line
    python benchmarks/speed_step.py --quick                  # seconds: does it run?
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import logging
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ppvae
from ppvae import conditionals, elbo, guides, models, nets

WORKLOADS = [(128, 1), (20, 50), (100, 5)]
Step = Callable[[Tensor], float]


def encoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(784, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 100)
    )


def decoder() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(50, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 784)
    )


# ------------------------------------------------------------------------------ the competitors


def pair() -> tuple[models.VAE, guides.Normal]:
    """The VAE as a user of ppvae writes it."""
    model = models.VAE(conditionals.Bernoulli(nets.mlp(50, 200, 200, 784, activation=nn.Tanh)), 50)
    return model, guides.Normal(nets.mlp(784, 200, 200, 100, activation=nn.Tanh))


def ours(num_particles: int) -> Step:
    model, guide = pair()
    loss = elbo.ELBO() if num_particles == 1 else elbo.IWELBO(num_particles=num_particles)
    return ppvae.SVI(model, guide, functools.partial(torch.optim.Adam, lr=1e-3), loss).step


def stock_loss(num_particles: int) -> pyro.infer.ELBO:
    if num_particles == 1:
        return pyro.infer.Trace_ELBO()
    return pyro.infer.RenyiELBO(alpha=0, num_particles=num_particles, vectorize_particles=True)


class StockVAE(nn.Module):
    """The VAE as Pyro's own example writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder(), decoder()

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            loc = x.new_zeros(x.shape[0], 50)
            z = pyro.sample("z", dist.Normal(loc, torch.ones_like(loc)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def stock(num_particles: int, validate: bool) -> Step:
    vae = StockVAE()
    optim = pyro.optim.Adam({"lr": 1e-3})
    return _validating(
        pyro.infer.SVI(vae.model, vae.guide, optim, stock_loss(num_particles)).step, validate
    )


def ours_in_stock(num_particles: int) -> Step:
    """Our pair, stock Pyro's engine: what our engine alone adds or saves."""
    optim = pyro.optim.Adam({"lr": 1e-3})
    return _validating(pyro.infer.SVI(*pair(), optim, stock_loss(num_particles)).step, False)


def _validating(step: Step, validate: bool) -> Step:
    def wrapped(x: Tensor) -> float:
        with pyro.validation_enabled(validate):
            return step(x)

    return wrapped


def handwritten(num_particles: int) -> Step:
    """Fused Adam; noise reused for log q; constants dropped; the cross-entropy as one softplus."""
    enc, dec = encoder(), decoder()
    optimizer = torch.optim.Adam([*enc.parameters(), *dec.parameters()], lr=1e-3, fused=True)

    def step(x: Tensor) -> float:
        optimizer.zero_grad()
        loc, log_scale = enc(x).chunk(2, -1)
        noise = torch.randn(num_particles, *loc.shape)
        z = loc + log_scale.exp() * noise
        log_ratio = (0.5 * (noise.square() - z.square()) + log_scale).sum(-1)
        log_w = log_ratio - F.softplus((1 - 2 * x) * dec(z)).sum(-1)
        loss = -(torch.logsumexp(log_w, 0) - float(np.log(num_particles))).sum()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def competitors(num_particles: int) -> dict[str, Step]:
    return {
        "ppvae": ours(num_particles),
        "stock Pyro": stock(num_particles, validate=True),
        "stock Pyro, validation off": stock(num_particles, validate=False),
        "ppvae pair in stock Pyro, validation off": ours_in_stock(num_particles),
        "hand-written PyTorch": handwritten(num_particles),
    }


# ------------------------------------------------------------------------------ timing


def interleave(
    blocks: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, np.ndarray[Any, np.dtype[np.float64]]]:
    """Wall and CPU seconds of every block in every round, ``(rounds, 2)`` by name."""
    names, seconds = list(blocks), {name: [] for name in blocks}
    for r in range(rounds):
        turn = names[r % len(names) :] + names[: r % len(names)]
        for name in turn if r % 2 == 0 else turn[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            blocks[name]()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return {name: np.array(values) for name, values in seconds.items()}


def quartiles(values: Any) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return [float(q) for q in np.quantile(values, (0.25, 0.5, 0.75))]


def shown(q: list[float], unit: str = "") -> str:
    return f"{q[1]:.2f}{unit} [{q[0]:.2f}, {q[2]:.2f}]"


def time_steps(batch: int, num_particles: int, rounds: int, steps: int) -> dict[str, Any]:
    """Part 1 for one workload."""
    pyro.clear_param_store()
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((batch, 784), 0.13))
    functions = competitors(num_particles)
    first = {name: step(x) for name, step in functions.items()}
    mean = sum(first.values()) / len(first)
    if any(abs(loss / mean - 1) > 0.02 for loss in first.values()):  # untrained: all near 784 log 2
        raise SystemExit(f"the competitors do not compute the same loss: {first}")

    def block(step: Step) -> None:
        for _ in range(steps):
            step(x)

    blocks = {name: functools.partial(block, step) for name, step in functions.items()}
    interleave(blocks, 2)  # warm up
    seconds = interleave(blocks, rounds)
    return {
        name: {
            "ms": quartiles(1e3 * taken[:, 0] / steps),
            "ratio": quartiles(seconds["ppvae"][:, 0] / taken[:, 0]),
            "cpu_ratio": quartiles(seconds["ppvae"][:, 1] / taken[:, 1]),
        }
        for name, taken in seconds.items()
    }


class PairedSVI(ppvae.SVI):
    """Times its updates, and after each one takes two bare ones outside fit's clock."""

    slices: tuple[Tensor, ...] = ()

    def reset(self, x: Tensor, batch_size: int) -> None:
        self.x, self.slices = x, x.split(batch_size)
        self.order = torch.randperm(len(x)).split(batch_size)
        self.count = 0
        self.seconds = dict.fromkeys(("inside", "paused", "in order", "shuffled"), 0.0)

    def update(self, *args: Any, **kwargs: Any) -> Tensor:
        if self.count == len(self.slices):
            return super().update(*args, **kwargs)
        started = time.perf_counter()
        loss = super().update(*args, **kwargs)
        paused = self._add("inside", started)
        for name in ("in order", "shuffled")[:: 1 if self.count % 2 else -1]:
            started = time.perf_counter()
            if name == "in order":
                super().update(self.slices[self.count])
            else:
                super().update(self.x.index_select(0, self.order[self.count]))
            self._add(name, started)
        self.count += 1
        self._add("paused", paused)
        return loss

    def _add(self, name: str, started: float) -> float:
        now = time.perf_counter()
        self.seconds[name] += now - started
        return now


def time_fit(rows: int, rounds: int, batch_size: int = 128) -> dict[str, Any]:
    """Part 2: an epoch of fit over ``rows`` binary images, a bare step of each kind per step."""
    torch.manual_seed(0)
    grey = torch.full((rows, 784), 0.13)
    x = torch.bernoulli(grey)
    svi = PairedSVI(*pair(), functools.partial(torch.optim.Adam, lr=1e-3), elbo.ELBO())
    steps = -(-rows // batch_size)
    measured: dict[str, list[float]] = {}
    for r in range(rounds):
        svi.reset(x, batch_size)
        started = time.perf_counter()
        history = ppvae.fit(svi, x, epochs=1, batch_size=batch_size, seed=r, progress=False)
        whole = time.perf_counter() - started
        taken = svi.seconds
        loop = history.rows[0]["seconds"] - taken["paused"]
        for key, value in {
            "ms_per_step": 1e3 * loop / steps,
            "own_percent": 100 * (loop / taken["inside"] - 1),
            "in_order_percent": 100 * (loop / taken["in order"] - 1),
            "shuffled_percent": 100 * (loop / taken["shuffled"] - 1),
            "checks_steps": steps * (whole - history.rows[0]["seconds"]) / loop,
        }.items():
            measured.setdefault(key, []).append(value)

    split = ppvae.data.from_arrays(grey.numpy(), valid=1, test=1, binarize="dynamic").train
    valid = [(batch,) for batch in x[: rows // 5].split(batch_size)]
    blocks = {
        "redraw": functools.partial(split.batch, 1),
        "validation": lambda: ppvae.train.mean_bound(svi, iter(valid), 0),
        "steps": lambda: [svi.update(batch) for batch in svi.slices[:20]],
    }
    others = interleave(blocks, max(3, rounds))
    step = others["steps"][:, 0] / min(20, steps)
    for name in ("redraw", "validation"):
        measured[f"{name}_steps"] = list(others[name][:, 0] / step)
    return {"rows": rows, "steps": steps} | {k: quartiles(v) for k, v in measured.items()}


# ------------------------------------------------------------------------------ report


def environment() -> dict[str, Any]:
    """Where and with what the numbers were measured."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models_ = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = models_[0].split(":", 1)[1].strip() if models_ else cpu
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(v, 1) for v in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "ppvae": ppvae.__version__,
        "date": datetime.date.today().isoformat(),
    }


def steps_table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| batch, K | step | ms | ppvae / it, wall | ppvae / it, CPU |",
        "|---|---|---|---|---|",
    ]
    for workload, rows in results.items():
        for name, row in rows.items():
            ratios = (
                ("1", "1") if name == "ppvae" else (shown(row["ratio"]), shown(row["cpu_ratio"]))
            )
            lines.append(f"| {workload} | {name} | {shown(row['ms'])} | {' | '.join(ratios)} |")
    return "\n".join(lines)


def fit_table(result: dict[str, Any]) -> str:
    rows = {
        "fit's loop less the time inside `svi.update`, relative to that time, %": "own_percent",
        "fit's loop against `svi.update` on slices in order (indexes nothing), %": (
            "in_order_percent"
        ),
        "fit's loop against `svi.update` on shuffled rows (`index_select`), %": "shuffled_percent",
        "one step in fit, ms": "ms_per_step",
        "apart, once per call of fit: checks of pair and data, in steps' time": "checks_steps",
        "apart, per epoch: dynamic binarisation of the training set, in steps' time": (
            "redraw_steps"
        ),
        "apart, per epoch: validation bound on a fifth as many rows, in steps' time": (
            "validation_steps"
        ),
    }
    title = f"{result['rows']:,} x 784, {result['steps']} steps of 128"
    lines = [f"| one epoch: {title} | median [quartiles] |", "|---|---|"]
    return "\n".join(lines + [f"| {text} | {shown(result[key])} |" for text, key in rows.items()])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, little data")
    parser.add_argument("--rounds", type=int, default=40, help="rounds of part 1")
    parser.add_argument("--steps", type=int, default=5, help="steps per block of part 1")
    parser.add_argument("--fit-rounds", type=int, default=7, help="rounds of part 2")
    parser.add_argument("--fit-rows", type=int, default=50_000, help="rows of part 2")
    parser.add_argument("--threads", type=int, help="torch threads; default: torch's own choice")
    parser.add_argument("--out", type=Path, help="append the results to this file, one JSON line")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps, args.fit_rounds, args.fit_rows = 4, 2, 2, 2_560
    if args.threads is not None:
        torch.set_num_threads(args.threads)

    logging.getLogger("pyro").setLevel(logging.WARNING)  # it announces every guess of plate dims
    where = environment()
    print(", ".join(f"{key} {value}" for key, value in where.items()), end="\n\n", flush=True)
    results = {}
    for batch, num_particles in WORKLOADS:
        key = f"{batch}, {num_particles}"
        results[key] = time_steps(batch, num_particles, args.rounds, args.steps)
    print(steps_table(results), end="\n\n", flush=True)
    fit = time_fit(args.fit_rows, args.fit_rounds)
    print(fit_table(fit))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: value for key, value in vars(args).items() if key != "out"}
        record = {"environment": where, "settings": settings, "steps": results, "fit": fit}
        with args.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
