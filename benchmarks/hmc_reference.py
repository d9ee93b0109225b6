"""What a reference posterior costs: batched HMC on a VAE trained on MNIST, 784-200-z10.

A VAE with one hidden layer of 200 tanh units in encoder and decoder and 10 latents is trained with
the ELBO on dynamically binarised MNIST. `ppvae.diagnostics.hmc` then draws from p(z | x) of the
first test images, with its defaults: 4 chains, 200 + 600 transitions of 6 leapfrog steps, R-hat
and ESS gates, and reruns of what did not pass. Time is per datapoint, gates and reruns included.

Also timed: one gradient of log p(x, z) for all chains x datapoints, with Pyro's handlers in every
call and traced to one graph, beside the same gradient written by hand in torch; and Pyro's NUTS on
two images (one chain after the other, one datapoint at a time).

    python benchmarks/hmc_reference.py            # 10 epochs, 100 images, NUTS on 2
    python benchmarks/hmc_reference.py --quick    # does it run?

The exit status is 1 if a datapoint does not pass (R-hat <= 1.01) or the time exceeds the target of
0.5 s per datapoint. The trained weights are kept under --out.
"""

from __future__ import annotations

import argparse
import functools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets
from ppvae.diagnostics.joint import Joint, traced

TARGET = 0.5  # seconds per datapoint


def trained(weights: Path, epochs: int) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(10, 200, 784, activation=nn.Tanh)), 10)
    guide = guides.Normal(nets.mlp(784, 200, 2 * 10, activation=nn.Tanh))
    if weights.exists():
        state = torch.load(weights, weights_only=True)
        model.load_state_dict(state["model"])
        guide.load_state_dict(state["guide"])
        return model, guide
    svi = ppvae.SVI(model, guide, functools.partial(torch.optim.Adam, lr=1e-3), elbo.ELBO())
    history = ppvae.fit(svi, data.load("mnist", seed=0), epochs=epochs, progress=False)
    print(f"trained {epochs} epochs: valid ELBO {history.rows[-1]['valid_bound']:.2f}")
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, weights)
    return model, guide


def by_hand(model: Any, x: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """log p(x, z) up to a constant, and its gradient, in plain torch."""
    first, _, second = model.likelihood.net.layers

    def value_and_grad(z: Tensor) -> tuple[Tensor, Tensor]:
        z = z.detach().requires_grad_()
        logits = second(torch.tanh(first(z)))
        value = -F.softplus((1 - 2 * x) * logits).sum(-1) - 0.5 * z.square().sum(-1)
        (gradient,) = torch.autograd.grad(value.sum(), z)
        return value.detach(), gradient

    return value_and_grad


def milliseconds(call: Callable[[], Any], repeats: int) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return 1e3 * sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100, help="test images, from the first")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--nuts", type=int, default=2, help="images for Pyro's NUTS")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("out/hmc_reference"))
    parser.add_argument("--quick", action="store_true", help="1 epoch, 4 images, 1 seed")
    args = parser.parse_args()
    if args.quick:
        args.images, args.epochs, args.nuts, args.seeds = 4, 1, 0, [0]
        args.out = args.out / "quick"
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    model, guide = trained(args.out / "vae.pt", args.epochs)
    x = data.load("mnist", seed=0).test.x[: args.images]

    print("| chains x datapoints | with handlers, ms | one graph, ms | by hand, ms |")
    print("|---|---|---|---|")
    for rows in sorted({min(rows, len(x)) for rows in (16, 100)}):
        joint = Joint(model, guide, x[:rows])
        u = joint.draw_q(4)
        calls = joint.value_and_grad, traced(joint.value_and_grad, u)
        hand = by_hand(model, x[:rows])
        for call in calls:
            torch.testing.assert_close(call(u)[1], hand(u)[1], rtol=1e-3, atol=1e-3)
        shown = [f"{milliseconds(functools.partial(c, u), 50):.2f}" for c in (*calls, hand)]
        print(f"| 4 x {rows} | {' | '.join(shown)} |", flush=True)

    passed = True
    for seed in args.seeds:
        cpu = time.process_time()
        draws = diagnostics.hmc(model, guide, x, seed=seed)
        cpu = (time.process_time() - cpu) / len(x)
        rerun = int((draws.reruns > 0).sum())
        print(f"\nseed {seed}: {draws}\nCPU {cpu:.2f} s per datapoint; {rerun} were run again")
        passed = passed and bool(draws.converged.all()) and draws.seconds / len(x) <= TARGET
    if args.nuts:
        oracle = diagnostics.nuts(model, x[: args.nuts], seed=0)
        print(f"\n{oracle}")
        difference = (oracle.flat("z").mean(0) - draws.flat("z").mean(0)[: args.nuts]).abs()
        sd = draws.flat("z").std(0)[: args.nuts]
        print(f"means of NUTS and HMC: at most {(difference / sd).max().item():.3f} sd apart")
    print(
        f"\nTarget, {TARGET} s per datapoint with R-hat < 1.01 on all: "
        f"{'reached' if passed else 'MISSED'}; torch {torch.__version__}, {args.threads} threads"
    )
    sys.exit(0 if passed or args.quick else 1)


if __name__ == "__main__":
    main()
