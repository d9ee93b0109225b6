"""Estimators side by side on dynamic MNIST: one network, one start, the same batches for all.

The network is that of Burda et al. (2016), one stochastic layer: 784-200-200-z50-200-200-784,
tanh, log-sigma heads, initialised as in benchmarks/mnist_vs_handwritten.py. For a seed, all
estimators share the initial weights, the order of the images and their binarisation (drawn afresh
at each use); each draws its own latent noise from the same seed. Adam(1e-3, eps=1e-4), batch 20,
losses summed over the batch, as in that paper; its 3,280 epochs are cut to one, so the numbers say
how estimators compare early in training, and nothing about the paper's table.

Every pair is evaluated by `ppvae.diagnostics.log_evidence` on the same fixed binarisation of the
first test images, with the same draws of noise, so that differences are paired by image.

    python benchmarks/mnist_estimators.py            # 2 seeds, 2,500 steps, 500 test images
    python benchmarks/mnist_estimators.py --quick    # does it run?

Every training and evaluation is one file under --out; what is there already is not run again. The
exit status is 1 if IWELBO-50 with DReG is worse than pathwise by more than 2 standard errors.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mnist_vs_handwritten import load, networks, once, pair
from torch import Tensor

from ppvae import elbo

ESTIMATORS: dict[str, elbo.Estimator] = {
    "IWELBO-50": elbo.IWELBO(num_particles=50),
    "IWELBO-50-dreg": elbo.IWELBO(num_particles=50, gradient="dreg"),
    "IWELBO-64": elbo.IWELBO(num_particles=64),
    "MIWELBO-8x8": elbo.MIWELBO(num_particles=8, num_groups=8),
    "PIWELBO-8x8": elbo.PIWELBO(num_particles=8, num_groups=8),
    "ELBO-64": elbo.ELBO(num_particles=64),
}
# Differences that are asked about: first minus second.
PAIRS = [
    ("IWELBO-50-dreg", "IWELBO-50"),
    ("IWELBO-64", "ELBO-64"),
    ("PIWELBO-8x8", "IWELBO-64"),
    ("MIWELBO-8x8", "IWELBO-64"),
    ("PIWELBO-8x8", "MIWELBO-8x8"),
]


def batches(grey: Tensor, seed: int, steps: int, batch_size: int) -> Iterator[Tensor]:
    """Binarised minibatches, the same for every estimator of a seed."""
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for _ in range(steps):
        if not rows:
            order = torch.randperm(len(grey), generator=generator)
            rows = list(order[: len(grey) // batch_size * batch_size].split(batch_size))
        yield torch.bernoulli(grey[rows.pop()], generator=generator)


def train(name: str, seed: int, recipe: dict[str, Any], weights: Path) -> dict[str, Any]:
    import ppvae
    from ppvae import data

    grey = data.load("mnist", seed=0).train.values
    model, guide = pair(*networks(seed, grey.mean(0)))
    adam = functools.partial(torch.optim.Adam, lr=recipe["lr"], eps=recipe["eps"])
    svi = ppvae.SVI(model, guide, adam, ESTIMATORS[name])
    torch.manual_seed(3_000 + seed)
    losses, wall, cpu = [], [], []
    for x in batches(grey, seed, recipe["steps"], recipe["batch_size"]):
        clock, process = time.perf_counter(), time.process_time()
        losses.append(svi.step(x) / len(x))
        wall.append(1e3 * (time.perf_counter() - clock))
        cpu.append(1e3 * (time.process_time() - process))
    torch.save(
        {
            "encoder": guide.conditional.net.layers.state_dict(),
            "decoder": model.likelihood.net.layers.state_dict(),
        },
        weights,
    )
    hundreds = [-statistics.mean(losses[i : i + 100]) for i in range(0, len(losses), 100)]
    print(
        f"{name} seed {seed}: own bound {hundreds[-1]:.2f} nats over the last steps, "
        f"{statistics.median(cpu):.1f} ms CPU per step, {sum(wall) / 1e3:.0f} s",
        flush=True,
    )
    return {
        "bound_by_100_steps": hundreds,
        "ms_per_step": statistics.median(wall[1:] or wall),
        "cpu_ms_per_step": statistics.median(cpu[1:] or cpu),
        "seconds": sum(wall) / 1e3,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def evaluate(name: str, weights: Path, num_test: int, num_particles: int) -> dict[str, Any]:
    from ppvae import data, diagnostics

    x = data.load("mnist", seed=0).test.x[:num_test]
    started = time.perf_counter()
    evidence = diagnostics.log_evidence(
        *pair(*load(weights)), x, num_particles=num_particles, seed=0
    )
    seconds = time.perf_counter() - started
    print(f"{weights.stem}: log p(x) {evidence.mean:.3f}, {seconds:.0f} s", flush=True)
    return {
        "mean": evidence.mean,
        "mean_se": evidence.mean_se,
        "mean_mc_se": evidence.mean_mc_se,
        "elbo": evidence.elbo.mean().item(),
        "ess": evidence.ess.median().item(),
        "khat_above_0.7": (evidence.khat > 0.7).double().mean().item(),
        "values": evidence.log_evidence.tolist(),
        "seconds": seconds,
    }


def difference(scored: dict, first: str, second: str, seeds: list[int]) -> tuple[float, float]:
    """Mean over seeds and images of log p(x), first minus second; its s.e. over images."""
    by_seed = [
        torch.tensor(scored[first, seed]["values"]) - torch.tensor(scored[second, seed]["values"])
        for seed in seeds
    ]
    by_image = torch.stack(by_seed).double().mean(0)
    return by_image.mean().item(), by_image.std().item() / math.sqrt(len(by_image))


def report(trained: dict, scored: dict, recipe: dict[str, Any]) -> str:
    """The tables of values, costs and paired differences, as Markdown."""
    done = sorted({seed for _, seed in scored})
    lines = [
        "| estimator | seed | log p(x) ± s.e. over images | ELBO | ESS, median | k-hat > 0.7 |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | {seed} | {r['mean']:.2f} ± {r['mean_se']:.2f} | {r['elbo']:.2f} | "
        f"{r['ess']:.0f} | {r['khat_above_0.7']:.0%} |"
        for name in ESTIMATORS
        for seed in done
        if (r := scored.get((name, seed)))
    ]
    lines += [
        "",
        "| estimator | draws per image | decoder rows per step | CPU ms per step | "
        "wall ms per step |",
        "|---|---|---|---|---|",
    ]
    for name, estimator in ESTIMATORS.items():
        runs = [run for (key, _), run in trained.items() if key == name]
        if runs:
            cpu, wall = (
                statistics.mean(run[key] for run in runs)
                for key in ("cpu_ms_per_step", "ms_per_step")
            )
            draws = estimator.num_draws
            lines.append(
                f"| {name} | {draws} | {draws * recipe['batch_size']:,} | {cpu:.1f} | {wall:.1f} |"
            )
    lines += [
        "",
        "| log p(x), first - second | by seed | mean ± s.e. over images | s.e. over seeds |",
        "|---|---|---|---|",
    ]
    for first, second in PAIRS:
        both = [s for s in done if (first, s) in scored and (second, s) in scored]
        if both:
            value, error = difference(scored, first, second, both)
            each = [difference(scored, first, second, [seed])[0] for seed in both]
            over = f"{statistics.stdev(each) / math.sqrt(len(each)):.2f}" if len(each) > 1 else "-"
            lines.append(
                f"| {first} - {second} | {', '.join(f'{d:+.2f}' for d in each)} | "
                f"{value:+.3f} ± {error:.3f} | {over} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=2_500, help="2,500 = one epoch at batch 20")
    parser.add_argument("--batch-size", type=int, default=20)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), metavar="NAME",
                        default=list(ESTIMATORS), help=f"of {', '.join(ESTIMATORS)}")  # fmt: skip
    parser.add_argument("--num-test", type=int, default=500, help="test images, from the first")
    parser.add_argument("--num-particles", type=int, default=1_000)
    parser.add_argument("--out", type=Path, default=Path("out/mnist_estimators"))
    parser.add_argument("--quick", action="store_true", help="5 steps, 1 seed, 10 test images")
    args = parser.parse_args()
    if args.quick:
        args.steps, args.seeds, args.num_test, args.num_particles = 5, [0], 10, 100
        args.out = args.out / "quick"
    args.out.mkdir(parents=True, exist_ok=True)

    recipe = {"steps": args.steps, "batch_size": args.batch_size, "lr": 1e-3, "eps": 1e-4}
    scoring = {"num_test": args.num_test, "num_particles": args.num_particles}
    trained: dict[tuple[str, int], dict[str, Any]] = {}
    scored: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in args.seeds:
        for name in args.estimators:
            weights = args.out / f"{name}-seed{seed}.pt"
            trained[name, seed] = once(
                weights.with_suffix(".train.json"),
                recipe,
                functools.partial(train, name, seed, recipe, weights),
            )
            scored[name, seed] = once(
                weights.with_suffix(f".test{args.num_test}.json"),
                recipe | scoring,
                functools.partial(evaluate, name, weights, **scoring),
            )
    print(
        "\n"
        + report(trained, scored, recipe)
        + f"\n\n{args.steps:,} steps of batch {args.batch_size}, seeds {args.seeds}, first "
        f"{args.num_test:,} test images, K = {args.num_particles:,}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    if not {"IWELBO-50-dreg", "IWELBO-50"} <= set(args.estimators):
        return
    value, error = difference(scored, "IWELBO-50-dreg", "IWELBO-50", args.seeds)
    reached = value >= -2 * error
    print(
        f"Target, DReG at least as good as pathwise at K = 50: {'reached' if reached else 'MISSED'}"
        f" ({value:+.3f} nats, paired standard error {error:.3f})"
    )
    sys.exit(0 if reached or args.quick else 1)


if __name__ == "__main__":
    main()
