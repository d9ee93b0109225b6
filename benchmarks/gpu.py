"""Whether the CUDA path works and what it is worth: one command for a machine with a GPU.

    python benchmarks/gpu.py --out out/gpu --seconds 570
    python benchmarks/gpu.py --out out/gpu --rehearse      # the same stages on a CPU, tiny

Needs no network. Each stage is a process with a deadline and writes as it goes; time that it leaves
is that of the later ones.

smoke    eager, compiled and captured steps agree; nothing waits for the device in a hundred replays
tests    ``pytest -m cuda``: tests.xml, tests.log
speed    speed.py on two workloads beside what one writes by hand: speed.jsonl, speed.md
burda    20 epochs of ``ppvae.fit``, 784-200-200-z50, batch 20, K = 50; a step's time by the 9.77
         million steps of Burda et al. (2016): burda.json
profile  the kernels of one replay: profile.txt

env.json has the machine, and of each stage how it ended. Exit status: 0 well, 1 a test or the smoke
failed, 2 no CUDA, 3 a target of speed.py is missed, 4 out of time.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from timing import environment
from torch import Tensor, nn
from workloads import MLP, Workload

import ppvae
from ppvae import data, elbo

HERE = Path(__file__).resolve().parent
SHARES = {"smoke": 15, "tests": 35, "speed": 25, "burda": 15, "profile": 10}  # of the time
COLUMNS = "ppvae-compiled,ppvae-eager,hand,hand-compile,hand-overhead,hand-graph,pyro"
BURDA_STEPS = 3280 * 59_600 // 20  # the paper's 3,280 epochs
SMALL = Workload("small", MLP(data=100, hidden=(50,), latent=5), 20)
WELL, FAILED, NO_CUDA, MISSED, LATE = range(5)


class Certain(ppvae.Program):
    """A guide without draws, so that losses are equal to the last digits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            loc, _ = self.net(x).chunk(2, -1)
            pyro.sample("z", dist.Delta(loc, event_dim=1))


# ------------------------------------------------------------------------------ stages


def smoke(device: torch.device, out: Path, tiny: bool) -> None:
    """Raise if captured steps are not the eager ones, or wait for the device."""
    batches = SMALL.batches(8, device)
    ends = []
    for compile in (False, True):
        model, guide = SMALL.pair(SMALL.networks(device))
        certain = Certain(guide.conditional.net)
        adam = functools.partial(torch.optim.Adam, lr=1e-3)
        loss = elbo.ELBO(beta=elbo.LinearWarmup(50))
        svi = ppvae.SVI(model, certain, adam, loss, compile=compile, clip_norm=10.0)
        losses = [svi.update(x) for x in batches]  # eager, built, captured
        if compile and device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        losses += [svi.update(batches[i % 8]) for i in range(5 if tiny else 100)]
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        ends.append(torch.stack(losses).tolist())
        print(f"compile={compile}: {_captures(svi)} captured, last loss {ends[-1][-1]:.4f}")
    if device.type == "cuda" and _captures(svi) != 1:
        raise SystemExit("no step was captured")
    worst = max(abs(a - b) / abs(a) for a, b in zip(*ends, strict=True))
    print(f"largest relative difference of a loss: {worst:.2g}")
    if not worst < 1e-3:
        raise SystemExit("captured steps have other losses than eager ones")
    _smoke_of_draws(SMALL, device, 20 if tiny else 400)


def _smoke_of_draws(workload: Workload, device: torch.device, number: int) -> None:
    """Where nothing is learned, losses of both kinds of step have one mean."""
    x, means, errors = workload.batches(1, device)[0], [], []
    for compile in (False, True):
        still = functools.partial(torch.optim.Adam, lr=0.0)
        pair = workload.pair(workload.networks(device))
        svi = ppvae.SVI(*pair, still, elbo.ELBO(kl="sampled"), compile=compile)
        losses = torch.stack([svi.update(x) for _ in range(number)]).double()
        if losses.unique().numel() < number // 2:
            raise SystemExit("replays do not draw anew")
        means.append(float(losses.mean()))
        errors.append(float(losses.std()) / math.sqrt(number))
    apart = abs(means[0] - means[1]) / math.hypot(*errors)
    print(f"mean loss: eager {means[0]:.3f}, compiled {means[1]:.3f}, {apart:.1f} errors apart")
    if apart > 4.5:
        raise SystemExit("compiled steps draw otherwise than eager ones")


def _captures(svi: ppvae.SVI) -> int:
    return sum(step is not None for step in svi._captures.steps.values())


def burda(device: torch.device, out: Path, tiny: bool) -> None:
    """A pilot of the longest cell of Burda et al. on images of noise; writes after each epoch."""
    workload = SMALL if tiny else Workload("mlp-20-50", MLP(), 20, 50)
    rows, epochs = (60, 2) if tiny else (59_600, 20)
    shape = rows, *workload.family.shape
    grey = torch.rand(shape, generator=torch.Generator().manual_seed(0)).pow(4).numpy()
    model, guide = workload.pair(workload.networks())
    adam = functools.partial(torch.optim.Adam, lr=1e-3, eps=1e-4)
    svi = ppvae.SVI(model, guide, adam, workload.bound, compile=True)
    steps = -(-rows // workload.batch)

    def write(svi: ppvae.SVI, history: ppvae.History) -> None:
        seconds = [row["seconds"] for row in history.rows]
        each = min(seconds) / steps
        found = {
            "us_per_step": sorted(1e6 * s / steps for s in seconds),
            "build_seconds": svi.build_seconds,
            "bound": [row["train_objective"] for row in history.rows],
            "captured": _captures(svi),
            "steps_of_the_paper": BURDA_STEPS,
            "hours_for_them": each * BURDA_STEPS / 3600,
        }
        (out / "burda.json").write_text(json.dumps(found, indent=1))

    dataset = data.from_arrays(grey, binarize="dynamic")
    ppvae.fit(
        svi, dataset, epochs=epochs, batch_size=workload.batch, device=device, on_epoch_end=write
    )
    print((out / "burda.json").read_text())


def profile(device: torch.device, out: Path, tiny: bool) -> None:
    """The kernels of a replay, the longest first."""
    from torch.profiler import ProfilerActivity

    workload = SMALL if tiny else Workload("mlp-20-50", MLP(), 20, 50)
    model, guide = workload.pair(workload.networks(device))
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    svi = ppvae.SVI(model, guide, adam, workload.bound, compile=True)
    x = workload.batches(1, device)[0]
    for _ in range(5):
        svi.step(x)
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as found:
        svi.step(x)
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    (out / "profile.txt").write_text(found.key_averages().table(sort_by=order, row_limit=80))
    print(f"{len(found.events())} events")


STAGES: dict[str, Callable[[torch.device, Path, bool], None]] = {
    "smoke": smoke,
    "burda": burda,
    "profile": profile,
}


# ------------------------------------------------------------------------------ all of it


def command(stage: str, out: Path, rehearse: bool) -> tuple[list[str], Path]:
    """What runs a stage, and the file that has what it prints."""
    if stage == "tests":
        # only files that have such tests: the others take a minute to look through, and packages
        tests = sorted((HERE.parent / "tests").glob("test_*.py"))
        where = [str(path) for path in tests if "mark.cuda" in path.read_text(encoding="utf-8")]
        options = ["-m", "cuda", "-q", "--continue-on-collection-errors"]
        return [
            "-m",
            "pytest",
            *options,
            f"--junitxml={out / 'tests.xml'}",
            *(where[:1] if rehearse else where),
        ], out / "tests.log"
    if stage == "speed":
        columns = "ppvae-eager,hand" if rehearse else COLUMNS
        names = ["mlp-128-1"] if rehearse else ["mlp-20-50", "mlp-128-1"]
        options = [f"--workload={name}" for name in names] + [f"--columns={columns}"]
        options += ["--device=cpu", "--quick"] if rehearse else ["--device=cuda"]
        script = str(HERE / "speed.py")
        return [script, *options, f"--out={out / 'speed.jsonl'}"], out / "speed.md"
    options = [f"--stage={stage}", f"--out={out}", *["--rehearse"] * rehearse]
    return [str(HERE / "gpu.py"), *options], out / f"{stage}.log"


def run(stage: str, out: Path, rehearse: bool, seconds: float) -> dict[str, Any]:
    """Run a stage to its end or its deadline."""
    words, printed = command(stage, out, rehearse)
    started = time.monotonic()
    with printed.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=HERE.parent,
            start_new_session=True,  # so that the compiler's processes can be ended with it
        )
        try:
            status: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
    return {"status": status, "seconds": round(time.monotonic() - started, 1)}


def verdict(stages: dict[str, dict[str, Any]], out: Path, rehearse: bool) -> int:
    """The exit status."""
    # what pytest says where it found no test, as in a rehearsal that skips them all, is 5
    allowed = {"tests": (0, 5)} if rehearse else {}
    if any(
        found["status"] is not None and found["status"] not in allowed.get(stage, (0,))
        for stage, found in stages.items()
    ):
        return FAILED
    if any(found["status"] is None for found in stages.values()):
        return LATE
    missed = "NOT met" in (out / "speed.md").read_text()
    return MISSED if missed and not rehearse else WELL


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--out", type=Path, required=True, help="a folder for what is found")
    p.add_argument("--seconds", type=float, default=570.0, help="for all stages together")
    p.add_argument("--rehearse", action="store_true", help="on a CPU; the numbers mean nothing")
    p.add_argument("--stage", choices=list(STAGES), help="this one alone, without a deadline")
    args = p.parse_args(argv)
    end = time.monotonic() + args.seconds
    device = torch.device("cpu" if args.rehearse else "cuda")
    if not args.rehearse and not torch.cuda.is_available():
        print("no CUDA: torch sees no GPU here; --rehearse runs the stages on a CPU")
        return NO_CUDA
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if args.stage:
        STAGES[args.stage](device, out, args.rehearse)
        return WELL
    where = environment(device) | {"cuda": torch.version.cuda, "rehearsal": args.rehearse}
    if device.type == "cuda":
        where["capability"] = torch.cuda.get_device_capability()
        where["driver"] = _driver()
    stages: dict[str, dict[str, Any]] = {}
    for stage, share in SHARES.items():
        left = sum(SHARES[name] for name in SHARES if name not in stages)
        stages[stage] = run(stage, out, args.rehearse, (end - time.monotonic()) * share / left)
        status = verdict(stages, out, args.rehearse) if len(stages) == len(SHARES) else None
        found = {"where": where, "stages": stages, "status": status}
        (out / "env.json").write_text(json.dumps(found, indent=1))
        print(f"{stage}: {stages[stage]}", flush=True)
    assert status is not None
    return status


def _driver() -> str:
    """The driver's version, or why it is not known."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
