"""``diagnostics.log_evidence`` at K = 5000: time against the matmul limit, and memory.

The pair is 784-200-200-z50, untrained, on random binary images; time does not depend on either. A
block evaluates some images. The limit is the forward products of one encoder and K decoder passes
for as many images, in pieces of 10,000 rows. The hand-written evaluator takes pieces of the same
size, under ``no_grad``, and returns log p(x) alone; ppvae's also returns standard errors, ESS,
k-hat and the ELBO, from float64 sums.

    python benchmarks/evidence.py --out out/evidence.jsonl
    python benchmarks/evidence.py --full        # then the 10,000 images at once, with the clock on
"""

from __future__ import annotations

import argparse
import functools
import math
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from columns import waiter
from matmul import Products, libraries, linear, runner
from memory import rise
from timing import alternate, parser, set_threads, shown, spread, start, timed
from torch import Tensor, nn
from torch.nn import functional as F
from workloads import MLP, Networks, Workload

from ppvae import diagnostics

ROWS = 10_000  # (particle, image) rows of a piece


def ours(
    workload: Workload, device: torch.device, compile: bool = False
) -> Callable[[Tensor], Tensor]:
    """The default call, or the compiled one; its graph is built in the first call."""
    model, guide = workload.pair(workload.networks(device))
    K = workload.num_particles

    def evaluate(x: Tensor) -> Tensor:
        evidence = diagnostics.log_evidence(model, guide, x, num_particles=K, compile=compile)
        return evidence.log_evidence

    return evaluate


def handwritten(
    workload: Workload, device: torch.device, compile: bool = False
) -> Callable[[Tensor], Tensor]:
    """An expert's evaluator: pieces, ``no_grad``, the densities as in the hand-written step."""
    networks, K = workload.networks(device), workload.num_particles
    images = max(1, ROWS // K)
    particles = min(K, ROWS)
    log_weights = torch.compile(_log_weights, fullgraph=True) if compile else _log_weights

    @torch.no_grad()
    def evaluate(x: Tensor) -> Tensor:
        values = []
        for part in x.split(images):
            drawn = [
                log_weights(networks, part, min(particles, K - first))
                for first in range(0, K, particles)
            ]
            values.append(torch.cat(drawn).logsumexp(0) - math.log(K))
        return torch.cat(values)

    return evaluate


def _log_weights(networks: Networks, x: Tensor, particles: int) -> Tensor:
    loc, log_scale = networks.encoders[0](x).chunk(2, -1)
    noise = torch.randn(particles, *loc.shape, device=x.device)
    z = loc + log_scale.exp() * noise
    costs = F.softplus((1 - 2 * x) * networks.decoders[0](z)).sum(-1)
    return (0.5 * (noise.square() - z.square()) + log_scale).sum(-1) - costs


def forward_products(
    workload: Workload, images: int, device: torch.device, library: str
) -> Products:
    """The products of one evaluation of so many images."""
    networks = workload.networks(device)
    pieces, rest = divmod(images * workload.num_particles, ROWS)

    def of(network: nn.Module, rows: int) -> Products:
        linears = [m for m in network.modules() if isinstance(m, nn.Linear)]
        return [linear(m.weight, rows, library=library)[0] for m in linears if rows]

    decoder = networks.decoders[0]
    return of(networks.encoders[0], images) + pieces * of(decoder, ROWS) + of(decoder, rest)


EVALUATORS = {
    "ppvae-eager": ours,
    "ppvae-compiled": functools.partial(ours, compile=True),
    "hand": handwritten,
    "hand-compile": functools.partial(handwritten, compile=True),
}


def measure(workload: Workload, rounds: int, images: int, device: torch.device) -> dict[str, Any]:
    """Time of all, and memory of the evaluators."""
    torch._dynamo.reset()
    x = workload.batches(1, device)[0]
    wait = waiter(device)
    runs: dict[str, Callable[[int], Any]] = {}
    for name, build in EVALUATORS.items():
        evaluate = build(workload, device)

        def run(times: int, evaluate: Callable[[Tensor], Tensor] = evaluate) -> None:
            for _ in range(times):
                evaluate(x)
            wait()

        runs[name] = run
    for library in libraries(device):
        products = forward_products(workload, images, device, library)
        runs[f"products, {library}"] = runner(products, device)
    blocks = {name: timed(run, 1) for name, run in runs.items()}
    alternate(blocks, 1)
    taken = alternate(blocks, rounds)
    limit = min((n for n in taken if n.startswith("products")), key=lambda n: spread(taken[n])[0])
    rows: dict[str, Any] = {}
    for name, values in taken.items():
        rows[name] = {"ms_per_image": spread(values / images)}
        if name in EVALUATORS:
            rows[name]["of_limit"] = spread(values / taken[limit])
            rows[name]["memory_mb"] = memory_of(name, workload, device)
    return {"images": images, "limit": limit, "rows": rows}


def whole(workload: Workload, device: torch.device) -> dict[str, Any]:
    """10,000 images in one compiled call."""
    x = torch.cat(workload.batches(-(-10_000 // workload.batch), device))[:10_000]
    started = perf_counter()
    ours(workload, device, compile=True)(x)
    waiter(device)()
    return {"seconds": perf_counter() - started}


def memory_of(name: str, workload: Workload, device: torch.device) -> float:
    """Peak memory of one evaluation above what is held before it, MB, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", name, "--device", str(device)]
    command += ["--threads", str(torch.get_num_threads()), "--images", str(workload.batch)]
    command += ["--particles", str(workload.num_particles)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"memory of {name}:\n{done.stderr}")
    return float(done.stdout.splitlines()[-1])


def child(args: argparse.Namespace) -> None:
    """Print the memory of one evaluator."""
    set_threads(args.threads)
    device = torch.device(args.device)
    workload = Workload("evidence", MLP(), args.images, args.particles)
    evaluate = EVALUATORS[args.memory_of](workload, device)
    x = workload.batches(1, device)[0]
    evaluate(x)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        evaluate(x)
        print((torch.cuda.max_memory_allocated(device) - held) / 1e6)
    else:
        print(rise(lambda: evaluate(x)))


def main(argv: list[str] | None = None) -> int:
    p = parser(__doc__, rounds=10)
    p.add_argument("--images", type=int, default=100, help="of one block")
    p.add_argument("--particles", type=int, default=5000, help="K")
    p.add_argument("--full", action="store_true", help="also 10,000 images in one call")
    p.add_argument("--memory-of", choices=list(EVALUATORS), help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    if args.memory_of:
        child(args)
        return 0
    if args.quick:
        args.images, args.particles = 4, 100
    device, results = start(args)
    workload = Workload("evidence", MLP(), args.images, args.particles)
    task = functools.partial(measure, workload, args.rounds, args.images, device)
    result = results.get(f"evidence/{args.images}/{args.particles}", task)
    print(f"K = {args.particles}, {args.images} images a block; target: at most 1.5 limits, 1 GB\n")
    print("| evaluator | ms per image | it / matmul limit | memory, MB |\n|---|---|---|---|")
    for name, row in result["rows"].items():
        ratio = shown(row.get("of_limit")) if name in EVALUATORS else ""
        held = f"{row['memory_mb']:.0f}" if name in EVALUATORS else ""
        ratio = "the limit" if name == result["limit"] else ratio
        print(f"| {name} | {shown(row['ms_per_image'])} | {ratio} | {held} |", flush=True)
    if args.full:
        call = functools.partial(whole, workload, device)
        seconds = results.get(f"evidence/full/{args.particles}", call)["seconds"]
        print(f"\n10,000 images in one call: {seconds:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
