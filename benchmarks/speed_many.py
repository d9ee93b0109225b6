"""Eight seeds in one step beside one: what `ppvae.fit_many` costs for each seed.

Columns: a compiled step of one pair; the stacked and compiled step of eight, as `fit_many` takes
it, its own rows for each; and both written by hand for these networks, with `torch.baddbmm`,
autograd and torch's fused Adam, not compiled. All run in one process, in short blocks in alternated
order; ratios are taken within a round. Shown are medians and the 10th and 90th percentile.

    python benchmarks/speed_many.py --out out/speed_many.jsonl
    python benchmarks/speed_many.py --seeds 16 --threads 2
    python benchmarks/speed_many.py --quick                     # does it run?
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from timing import alternate, parser, shown, spread, start, steps_for, timed
from torch import Tensor
from torch.nn import functional as F
from workloads import MLP, Workload

import ppvae
from ppvae.train.many import Member, Stack

BLOCK_SECONDS = 0.2
WORKLOADS = [
    Workload("64-256-z16, batch 64", MLP(64, (256,), 16), 64),
    Workload("784-200-200-z50, batch 128", MLP(), 128),
    Workload("784-200-200-z50, batch 20, K = 50", MLP(), 20, 50),
]
adam = functools.partial(torch.optim.Adam, lr=1e-4)


def one(workload: Workload, device: torch.device) -> Callable[[int], Any]:
    """Steps of one pair."""
    svi = _svi(workload, device)
    batches = workload.batches(16, device)
    return _in_turn(svi.update, batches)


def many(workload: Workload, device: torch.device, seeds: int) -> Callable[[int], Any]:
    """Steps of several pairs, stacked; each asks for its batches as the loop of `fit` does."""
    members = [Member(seed, lambda: _svi(workload, device), device) for seed in range(seeds)]
    batches = workload.batches(16, device)

    def shuffled(i: int) -> Any:
        while True:
            yield (batches[i % 16],)
            i += 1

    for i, member in enumerate(members):
        member.steps = shuffled(i)
        member.svi.prepare(batches[0])
        member.go_on()
    stack = Stack(members)
    stack.require(members)

    def run(steps: int) -> None:
        for _ in range(steps):
            stack.take(members)
            for member in members:
                member.go_on()
        assert members[-1].loss is not None
        float(members[-1].loss)

    return run


def by_hand(workload: Workload, device: torch.device, seeds: int) -> Callable[[int], Any]:
    """Steps of stacked networks, each product a batched one."""
    networks, K = workload.networks(device), workload.num_particles
    encoder, decoder = ([_stacked(layer, seeds) for layer in nets[0] if hasattr(layer, "weight")]
                        for nets in (networks.encoders, networks.decoders))  # fmt: skip
    optimizer = adam([p for layers in (encoder, decoder) for layer in layers for p in layer],
                     fused=True)  # fmt: skip
    batches = [x.expand(seeds, *x.shape) for x in workload.batches(16, device)]

    def through(layers: list[Any], h: Tensor) -> Tensor:
        for weight, bias in layers[:-1]:
            h = torch.baddbmm(bias, h, weight).tanh()
        return torch.baddbmm(layers[-1][1], h, layers[-1][0])

    def step(x: Tensor) -> Tensor:
        loc, log_scale = through(encoder, x).chunk(2, -1)
        noise = torch.randn(seeds, K, *loc.shape[1:], device=device)
        z = loc[:, None] + log_scale.exp()[:, None] * noise
        logits = through(decoder, z.flatten(1, 2)).unflatten(1, (K, -1))
        log_w = (x[:, None] * logits - F.softplus(logits)).sum(-1)
        log_w = log_w + (0.5 * (noise.square() - z.square()) + log_scale[:, None]).sum(-1)
        loss = -(log_w.logsumexp(1) - math.log(K)).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return _in_turn(step, batches)


def _stacked(layer: Any, seeds: int) -> list[torch.nn.Parameter]:
    """Weight ``(S, in, out)`` and bias ``(S, 1, out)`` of a layer."""
    weight, bias = layer.weight.detach().t(), layer.bias.detach()[None]
    return [torch.nn.Parameter(t.repeat(seeds, 1, 1)) for t in (weight, bias)]


def _svi(workload: Workload, device: torch.device) -> ppvae.SVI:
    pair = workload.pair(workload.networks(device))
    return ppvae.SVI(*pair, adam, workload.bound, compile=True)


def _in_turn(step: Callable[[Tensor], Tensor], batches: list[Tensor]) -> Callable[[int], Any]:
    count = [0]

    def run(steps: int) -> None:
        for _ in range(steps):
            count[0] += 1
            loss = step(batches[count[0] % len(batches)])
        float(loss)

    return run


def measure(workload: Workload, device: torch.device, seeds: int, args: Any) -> dict[str, Any]:
    """Times and ratios of one workload."""
    runs = {
        "one": one(workload, device),
        "many": many(workload, device, seeds),
        "hand, one": by_hand(workload, device, 1),
        "hand, many": by_hand(workload, device, seeds),
    }
    blocks = {
        name: timed(run, 1 if args.quick else steps_for(run, BLOCK_SECONDS))
        for name, run in runs.items()
    }
    taken = alternate(blocks, args.rounds)
    ratios = {
        "many / one": taken["many"] / taken["one"],
        "hand, many / one": taken["hand, many"] / taken["hand, one"],
        "many / hand, many": taken["many"] / taken["hand, many"],
    }
    return {
        "ms": {name: spread(times) for name, times in taken.items()},
        "ratios": {name: spread(values) for name, values in ratios.items()},
    }


def main() -> None:
    p = parser(__doc__, rounds=15)
    p.add_argument("--seeds", type=int, default=8, help="pairs in the stack")
    args = p.parse_args()
    device, results = start(args)
    for workload in WORKLOADS:
        run = functools.partial(measure, workload, device, args.seeds, args)
        found = results.get(f"{workload.name}, {args.seeds} seeds", run)
        print(f"{workload.name}, {args.seeds} seeds")
        for name, times in found["ms"].items():
            print(f"  {name:20} {shown(times, 3)} ms")
        for name, ratio in found["ratios"].items():
            print(f"  {name:20} {shown(ratio)}")
        print(flush=True)


if __name__ == "__main__":
    main()
