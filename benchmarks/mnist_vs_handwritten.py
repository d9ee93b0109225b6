"""A VAE on dynamic MNIST: `ppvae.SVI` + `ppvae.fit` beside a loop written in plain PyTorch.

The network is that of Burda et al. (2016), one stochastic layer: 784-200-200-z50-200-200-784,
tanh, log-sigma heads, Glorot uniform weights, zero biases, output bias = logit of the clipped mean
training image. Both sides have the same initial weights (per seed), data, batch size, Adam(1e-3),
epochs and K = 1; each shuffles, binarises and draws its noise with its own code. Both are evaluated
by `ppvae.diagnostics.log_evidence` (IWELBO-5000) on the same fixed binarisation of the test images;
the first seed's also by an evaluator written in plain PyTorch, on the first of those images.

    python benchmarks/mnist_vs_handwritten.py            # 3 seeds, 30 epochs, 2,000 test images
    python benchmarks/mnist_vs_handwritten.py --quick    # does it run?

Every training and evaluation is one file under --out; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LATENT = 50
SIDES = ("ppvae", "handwritten")

# ------------------------------------------------------- the same start for both, in plain PyTorch


def networks(seed: int, mean_image: Tensor) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder to (mean, log-sigma) and decoder to logits, initialised as in section 1's recipe."""
    torch.manual_seed(seed)
    encoder, decoder = (
        nn.Sequential(
            nn.Linear(a, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, b)
        )
        for a, b in ((784, 2 * LATENT), (LATENT, 784))
    )
    for layer in [*encoder, *decoder]:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
    # One Glorot layer per head: a joint (200 -> 100) layer would have narrower weights.
    for head in encoder[-1].weight.data.chunk(2):
        nn.init.xavier_uniform_(head)
    decoder[-1].bias.data.copy_(torch.logit(mean_image.clamp(0.001, 0.999)))
    return encoder, decoder


# ------------------------------------------------------- the loop and evaluator written by hand


def log_weight(encoder: nn.Module, decoder: nn.Module, x: Tensor, particles: int) -> Tensor:
    """Log p(x, z) - log q(z | x) for z ~ q, ``(K, N)``; constants of the two normals cancel."""
    mean, log_sigma = encoder(x).chunk(2, -1)
    noise = torch.randn(particles, *mean.shape)
    z = mean + log_sigma.exp() * noise
    logits = decoder(z)
    cross_entropy = F.binary_cross_entropy_with_logits(
        logits, x.expand_as(logits), reduction="none"
    )
    log_ratio = 0.5 * noise.square() + log_sigma - 0.5 * z.square()
    return log_ratio.sum(-1) - cross_entropy.sum(-1)


def train_by_hand(
    encoder: nn.Module, decoder: nn.Module, grey: Tensor, seed: int, epochs: int, batch_size: int
) -> list[float]:
    """Minimise minus the sampled ELBO; the mean training ELBO of each epoch."""
    torch.manual_seed(1_000 + seed)
    optimizer = torch.optim.Adam(
        [*encoder.parameters(), *decoder.parameters()], lr=1e-3, fused=True
    )
    history = []
    for _ in range(epochs):
        total = 0.0
        binary = torch.bernoulli(grey)
        for rows in torch.randperm(len(grey)).split(batch_size):
            optimizer.zero_grad()
            loss = -log_weight(encoder, decoder, binary[rows], 1).sum()
            loss.backward()
            optimizer.step()
            total -= loss.item()
        history.append(total / len(grey))
    return history


def evaluate_by_hand(
    encoder: nn.Module, decoder: nn.Module, x: Tensor, particles: int, seed: int
) -> Tensor:
    """IWELBO-K of each image, ``(N,)``."""
    torch.manual_seed(seed)
    with torch.no_grad():
        log_w = [log_weight(encoder, decoder, pair, particles) for pair in x.split(2)]
        return torch.cat([torch.logsumexp(w.double(), 0) for w in log_w]) - math.log(particles)


# ------------------------------------------------------- the same with ppvae


def pair(encoder: nn.Sequential, decoder: nn.Sequential) -> tuple[Any, Any]:
    """A ppvae model and guide that start from these networks' weights."""
    from ppvae import conditionals, guides, models, nets

    model = models.VAE(
        conditionals.Bernoulli(nets.mlp(LATENT, 200, 200, 784, activation=nn.Tanh)), LATENT
    )
    guide = guides.Normal(nets.mlp(784, 200, 200, 2 * LATENT, activation=nn.Tanh))
    model.likelihood.net.layers.load_state_dict(decoder.state_dict())
    guide.conditional.net.layers.load_state_dict(encoder.state_dict())
    return model, guide


def train_with_ppvae(
    model: Any, guide: Any, train: Any, seed: int, epochs: int, batch_size: int
) -> list[float]:
    """`SVI` and `fit`; the mean training ELBO of each epoch."""
    import ppvae
    from ppvae import elbo

    torch.manual_seed(2_000 + seed)
    svi = ppvae.SVI(model, guide, functools.partial(torch.optim.Adam, lr=1e-3), elbo.ELBO())
    history = ppvae.fit(svi, train, epochs=epochs, batch_size=batch_size, seed=seed, progress=False)
    return history.column("train_objective")


# ------------------------------------------------------- runs, one file each


def once(path: Path, recipe: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``run`` returns, from the file if it is there, else run and written."""
    if path.exists():
        found = json.loads(path.read_text())
        if found["recipe"] != recipe:
            sys.exit(f"{path} was made with {found['recipe']}, not {recipe}: give another --out")
        return found
    result = {"recipe": recipe, **run()}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1))
    part.replace(path)
    return result


def train(side: str, seed: int, recipe: dict[str, Any], weights: Path) -> dict[str, Any]:
    from ppvae import data

    split = data.load("mnist", seed=seed).train
    encoder, decoder = networks(seed, split.values.mean(0))
    started = time.perf_counter()
    if side == "ppvae":
        model, guide = pair(encoder, decoder)
        history = train_with_ppvae(model, guide, split, seed, **recipe)
        encoder, decoder = guide.conditional.net.layers, model.likelihood.net.layers
    else:
        history = train_by_hand(encoder, decoder, split.values, seed, **recipe)
    seconds = time.perf_counter() - started
    torch.save({"encoder": encoder.state_dict(), "decoder": decoder.state_dict()}, weights)
    print(f"{side} seed {seed}: train ELBO {history[-1]:.2f} nats, {seconds:.0f} s", flush=True)
    return {"train_elbo": history, "seconds": seconds}


def load(weights: Path) -> tuple[nn.Sequential, nn.Sequential]:
    encoder, decoder = networks(0, torch.full((784,), 0.5))
    state = torch.load(weights, weights_only=True)
    encoder.load_state_dict(state["encoder"])
    decoder.load_state_dict(state["decoder"])
    return encoder, decoder


def evaluate(weights: Path, by_hand: bool, num_test: int, num_particles: int) -> dict[str, Any]:
    from ppvae import data, diagnostics

    x = data.load("mnist").test.x[:num_test]
    encoder, decoder = load(weights)
    started = time.perf_counter()
    if by_hand:
        values = evaluate_by_hand(encoder, decoder, x, num_particles, seed=1)
        result = {"mean": values.mean().item(), "values": values.tolist()}
    else:
        evidence = diagnostics.log_evidence(
            *pair(encoder, decoder), x, num_particles=num_particles, seed=0
        )
        result = {
            "mean": evidence.mean,
            "mean_se": evidence.mean_se,
            "mean_mc_se": evidence.mean_mc_se,
            "elbo": evidence.elbo.mean().item(),
            "khat_above_0.7": (evidence.khat > 0.7).double().mean().item(),
            "values": evidence.log_evidence.tolist(),
            "mc_se": evidence.log_evidence_se.tolist(),
        }
    result["seconds"] = time.perf_counter() - started
    who = "handwritten evaluator" if by_hand else "log_evidence"
    print(f"{weights.stem}: {who} {result['mean']:.3f}, {result['seconds']:.0f} s", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--num-test", type=int, default=2_000, help="test images, from the first")
    parser.add_argument("--num-check", type=int, default=500, help="of those, by hand too")
    parser.add_argument("--num-particles", type=int, default=5_000)
    parser.add_argument("--out", type=Path, default=Path("out/mnist_vs_handwritten"))
    parser.add_argument("--quick", action="store_true", help="1 epoch, 2 seeds, 20 test images")
    args = parser.parse_args()
    if args.quick:
        args.epochs, args.seeds, args.num_test, args.num_particles = 1, 2, 20, 200
        args.out = args.out / "quick"
    args.out.mkdir(parents=True, exist_ok=True)

    recipe = {"epochs": args.epochs, "batch_size": args.batch_size}
    scoring = {"num_test": args.num_test, "num_particles": args.num_particles}
    checking = scoring | {"num_test": min(args.num_check, args.num_test)}
    trained: dict[tuple[str, int], dict[str, Any]] = {}
    scored: dict[tuple[str, int], dict[str, Any]] = {}
    runs = [(s, n) for n in range(args.seeds) for s in (SIDES if n % 2 == 0 else SIDES[::-1])]
    for side, seed in runs:
        weights = args.out / f"{side}-seed{seed}.pt"
        trained[side, seed] = once(
            weights.with_suffix(".train.json"),
            recipe,
            functools.partial(train, side, seed, recipe, weights),
        )
    for side, seed in runs:
        weights = args.out / f"{side}-seed{seed}.pt"
        scored[side, seed] = once(
            weights.with_suffix(f".test{args.num_test}.json"),
            recipe | scoring,
            functools.partial(evaluate, weights, False, **scoring),
        )
    crossed = {}
    for side in SIDES:
        weights = args.out / f"{side}-seed0.pt"
        crossed[side] = once(
            weights.with_suffix(f".byhand{checking['num_test']}.json"),
            recipe | checking,
            functools.partial(evaluate, weights, True, **checking),
        )
    print(
        "\n"
        + report(args.seeds, trained, scored, crossed)
        + f"\n\n{args.epochs} epochs, batch {args.batch_size}, first {args.num_test:,} test "
        f"images, K = {args.num_particles:,}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )


def report(seeds: int, trained: dict, scored: dict, crossed: dict) -> str:
    """The table, the paired difference and the check of the evaluator, as Markdown."""
    lines = [
        "| seed | ppvae, log p(x) | handwritten, log p(x) | difference | ppvae, train ELBO | "
        "handwritten, train ELBO | ppvae, s | handwritten, s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    differences = []
    for seed in range(seeds):
        ours, other = (scored[side, seed]["mean"] for side in SIDES)
        differences.append(ours - other)
        elbos = [f"{trained[side, seed]['train_elbo'][-1]:.2f}" for side in SIDES]
        seconds = [f"{trained[side, seed]['seconds']:.0f}" for side in SIDES]
        lines.append(
            f"| {seed} | {ours:.3f} | {other:.3f} | {ours - other:+.3f} | "
            f"{' | '.join(elbos)} | {' | '.join(seconds)} |"
        )
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(seeds) if seeds > 1 else math.nan
    lines += [
        "",
        f"Mean difference, ppvae - handwritten: {mean:+.3f} nats, paired standard error "
        f"{error:.3f} ({seeds} seeds); target: at most 0.3 either way.",
        "",
        "| weights, seed 0 | test images | log_evidence | handwritten evaluator | difference | "
        "its Monte-Carlo s.e. |",
        "|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        number = len(crossed[side]["values"])
        ours = statistics.mean(scored[side, 0]["values"][:number])
        other = crossed[side]["mean"]
        squares = [error**2 for error in scored[side, 0]["mc_se"][:number]]
        error = math.sqrt(2 * sum(squares)) / number  # two independent estimates
        lines.append(
            f"| {side} | {number:,} | {ours:.3f} | {other:.3f} | {ours - other:+.3f} | "
            f"{error:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
