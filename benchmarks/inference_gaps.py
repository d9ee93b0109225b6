"""Which inference gap dominates, for which guide? The question of Cremer et al. (2018).

VAEs with a diagonal normal, a full-covariance normal and a flow (four affine coupling layers) as
guide are trained with the ELBO, one particle, Adam(1e-3) falling to 1e-4, batch 128. For the first
test images the gap log p(x) - ELBO is then split by `ppvae.diagnostics.gaps`: q* has parameters of
its own for each image (1,000 steps of Adam from the encoder's output), log p(x) is annealed
importance sampling from q*, its upper side reverse annealing from HMC draws. For the diagonal
guide the best full-covariance q of each image is found too, for the same decoder. `bdmc` says how
far annealing is from the truth on images that the model itself draws.

A flow's q* moves location, scale and context of each image; its layers stay as trained.

    digits: 64-100-100-z8, 400 epochs;  MNIST, dynamically binarised: 784-200-200-z10 and z50

    python benchmarks/inference_gaps.py digits          # 400 epochs, 100 test images
    python benchmarks/inference_gaps.py mnist           # 20 epochs, 100 test images, z10 and z50
    python benchmarks/inference_gaps.py mnist --quick   # does it run?

Every training and evaluation is one file under --out; what is there already is not run again. One
thread. A picture for each size of z: the first guide's posterior of one image, and all gaps.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mnist_vs_handwritten import once
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, plots, posteriors

GUIDES = ("diagonal", "full covariance", "flow")
PROBLEMS: dict[str, list[tuple[int, tuple[int, ...], int]]] = {  # latents, hidden layers, epochs
    "digits": [(8, (100, 100), 400)],
    "mnist": [(10, (200, 200), 20), (50, (200, 200), 20)],
}
CONTEXT = 32


def pair(dim: int, latent: int, hidden: tuple[int, ...], family: str) -> tuple[Any, Any]:
    def mlp(first: int, last: int) -> nn.Module:
        return nets.mlp(first, *hidden, last, activation=nn.Tanh)

    model = models.VAE(conditionals.Bernoulli(mlp(latent, dim)), latent_dim=latent)
    if family == "diagonal":
        return model, guides.Normal(mlp(dim, 2 * latent))
    if family == "full covariance":
        net = mlp(dim, latent * (latent + 3) // 2)
        return model, guides.Amortized(posteriors.FullNormal(net, latent))
    flow = posteriors.Flow(
        mlp(dim, 2 * latent + CONTEXT), posteriors.coupling(latent, CONTEXT), latent, CONTEXT
    )
    return model, guides.Amortized(flow)


def train(
    name: str, shape: tuple[int, tuple[int, ...], int], family: str, seed: int, weights: Path
) -> dict[str, Any]:
    latent, hidden, epochs = shape
    dataset = data.load(name, seed=0)
    torch.manual_seed(seed)
    model, guide = pair(dataset.train.x[0].numel(), latent, hidden, family)
    adam = functools.partial(torch.optim.Adam, lr=1e-3)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO())
    started = time.perf_counter()
    history = ppvae.fit(
        svi,
        dataset,
        epochs=epochs,
        lr_scheduler=lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1 ** (1 / epochs)),
        seed=seed,
        progress=False,
    )
    torch.save({"model": model.state_dict(), "guide": guide.state_dict()}, weights)
    seconds = time.perf_counter() - started
    valid = history.rows[-1]["valid_bound"]
    print(f"{weights.stem}: valid ELBO {valid:.2f}, {seconds:.0f} s", flush=True)
    return {"valid_elbo": valid, "seconds": seconds, "torch": torch.__version__}


def full_covariance(guide: Any, x: Tensor, latent: int) -> nn.Module:
    """The full-covariance family with parameters per image, started at a diagonal guide."""
    with torch.no_grad():
        outputs = guide.outputs(x)
    below = outputs.new_zeros(len(x), latent * (latent - 1) // 2)
    head = posteriors.FullNormal(nn.Identity(), latent)
    return guides.PerDatapoint(head, torch.cat([outputs, below], -1))


def trained(dim: int, shape: tuple[int, tuple[int, ...], int], family: str, weights: Path) -> Any:
    model, guide = pair(dim, shape[0], shape[1], family)
    state = torch.load(weights, weights_only=True)
    model.load_state_dict(state["model"])
    guide.load_state_dict(state["guide"])
    return model, guide


def measure(
    name: str,
    shape: tuple[int, tuple[int, ...], int],
    family: str,
    weights: Path,
    images: int,
    steps: int,
    temperatures: int,
    draws: int,
    seed: int,
) -> dict[str, Any]:
    latent = shape[0]
    x = data.load(name, seed=0).test.x[:images].flatten(1)
    model, guide = trained(x.shape[1], shape, family, weights)

    seconds, started = {}, time.perf_counter()

    def lap(part: str) -> None:
        nonlocal started
        seconds[part] = time.perf_counter() - started
        started = time.perf_counter()

    reference = diagnostics.hmc(model, guide, x, num_draws=draws, seed=seed)
    lap("hmc")
    print(reference, flush=True)
    local = {"own family": guide.local(x)}
    if family == "diagonal":
        local["full covariance"] = full_covariance(guide, x, latent)
    gaps = diagnostics.gaps(
        model,
        guide,
        x,
        local=local,
        reference=reference,
        steps=steps,
        num_temperatures=temperatures,
        seed=seed,
    )
    lap("gaps")
    print(gaps, flush=True)
    compared = diagnostics.compare_posteriors(model, guide, x, reference=reference, seed=seed)
    lap("compare")
    print(compared, flush=True)
    sandwich = diagnostics.bdmc(model, guide, x, num_temperatures=temperatures, seed=seed)
    lap("bdmc")
    print(sandwich, flush=True)
    evidence = diagnostics.log_evidence(model, guide, x, num_particles=1000, seed=seed)
    assert gaps.upper is not None
    return {
        "log_evidence": gaps.log_evidence.tolist(),
        "log_evidence_se": gaps.log_evidence_se.tolist(),
        "upper": gaps.upper.tolist(),
        "elbo": gaps.elbo.tolist(),
        "elbo_se": gaps.elbo_se.tolist(),
        "local": {k: v.tolist() for k, v in gaps.local.items()},
        "local_se": {k: v.tolist() for k, v in gaps.local_se.items()},
        "bdmc_gap": sandwich.gap.tolist(),
        "hmc": {
            "converged": int(reference.converged.sum()),
            "worst_rhat": reference.rhat.max().item(),
            "median_ess": reference.ess.median().item(),
            "seconds_per_datapoint": reference.seconds / images,
        },
        "sd_ratio": compared.sd_ratio.nanmedian().item(),
        "correlation_error": compared.correlation_error.nanmedian().item(),
        "sliced": compared.sliced.nanmedian().item(),
        "khat_above_0.7": (evidence.khat > 0.7).double().mean().item(),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }


def draw(found: dict[str, dict[str, Any]], pair: tuple[Any, Any], x: Tensor, path: Path) -> None:
    """One image's posterior beside HMC: two latents, all latents; and the gaps of every guide."""
    from matplotlib import pyplot as plt

    plt.style.use("ppvae.plots.style")
    hmc = diagnostics.hmc(*pair, x, num_draws=1000, seed=0)
    compared = diagnostics.compare_posteriors(*pair, x, reference=hmc, seed=0)
    guide, reference = compared.guide_draws[:, 0], compared.reference_draws[:, 0]
    related = torch.corrcoef(reference.T).abs().fill_diagonal_(0)
    two = sorted(divmod(int(related.argmax()), len(related)))
    figure, axes = plt.subplots(1, 3, figsize=(12, 4.2))
    plots.posterior_contours(guide, reference, (two[0], two[1]), ax=axes[0])
    plots.posterior_intervals(guide, reference, ax=axes[1])
    gaps = {}
    for family, r in found.items():
        log_p, bound, best = (torch.tensor(values) for values in
                              (r["log_evidence"], r["elbo"], r["local"]["own family"]))  # fmt: skip
        gaps[family.replace(" ", "\n")] = SimpleNamespace(
            approximation=log_p - best, amortisation=best - bound
        )
    plots.gap_bars(gaps, axes[2])
    figure.savefig(path)
    plt.close(figure)


def mean(values: Tensor, digits: int = 2) -> str:
    values = values[~values.isnan()]
    se = values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return f"{values.mean().item():.{digits}f} ± {se:.{digits}f}"


def report(found: dict[tuple[str, str], dict[str, Any]]) -> str:
    lines = [
        "| problem | guide | log p(x) | ELBO | total gap | approximation | amortisation | "
        "approximation, full cov. q* | upper - lower | BDMC gap | k-hat > 0.7 | HMC passed |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (problem, family), r in found.items():
        log_p, bound = torch.tensor(r["log_evidence"]), torch.tensor(r["elbo"])
        best = torch.tensor(r["local"]["own family"])
        full = r["local"].get("full covariance")
        lines.append(
            f"| {problem} | {family} | {mean(log_p)} | {mean(bound)} | {mean(log_p - bound)} | "
            f"{mean(log_p - best)} | {mean(best - bound)} | "
            f"{mean(log_p - torch.tensor(full)) if full else ''} | "
            f"{mean(torch.tensor(r['upper']) - log_p, 3)} | {mean(torch.tensor(r['bdmc_gap']), 3)} "
            f"| {r['khat_above_0.7']:.0%} | {r['hmc']['converged']} of {len(log_p)} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", choices=list(PROBLEMS))
    parser.add_argument("--latents", type=int, nargs="+", help="only these latent sizes")
    parser.add_argument("--guides", nargs="+", choices=GUIDES, default=list(GUIDES))
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--images", type=int, default=100, help="test images, from the first")
    parser.add_argument("--steps", type=int, default=1_000, help="of the local optimisation")
    parser.add_argument("--temperatures", type=int, default=200)
    parser.add_argument("--draws", type=int, default=600, help="of HMC, per chain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/inference_gaps"))
    parser.add_argument("--quick", action="store_true", help="1 epoch, 4 images, few draws")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.quick:
        args.epochs, args.images, args.steps = 1, 4, 20
        args.temperatures, args.draws, args.out = 10, 200, args.out / "quick"
    args.out.mkdir(parents=True, exist_ok=True)

    scoring = {"images": args.images, "steps": args.steps, "temperatures": args.temperatures}
    scoring |= {"draws": args.draws, "seed": args.seed}
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for latent, hidden, epochs in PROBLEMS[args.data]:
        if args.latents and latent not in args.latents:
            continue
        shape = (latent, hidden, args.epochs or epochs)
        for family in args.guides:
            stem = f"{args.data}-z{latent}-{family.replace(' ', '-')}-seed{args.seed}"
            weights = args.out / f"{stem}.pt"
            recipe = {"latent": latent, "hidden": list(hidden), "epochs": shape[2]}
            once(
                args.out / f"{stem}.train.json",
                recipe,
                functools.partial(train, args.data, shape, family, args.seed, weights),
            )
            found[f"{args.data} z{latent}", family] = once(
                args.out / f"{stem}.gaps.json",
                recipe | scoring,
                functools.partial(measure, args.data, shape, family, weights, **scoring),
            )
            print("\n" + report(found) + "\n", flush=True)
        x = data.load(args.data, seed=0).test.x[:1].flatten(1)
        weights = (
            args.out
            / f"{args.data}-z{latent}-{args.guides[0].replace(' ', '-')}-seed{args.seed}.pt"
        )
        own = {family: found[f"{args.data} z{latent}", family] for family in args.guides}
        draw(own, trained(x.shape[1], shape, args.guides[0], weights), x,
             args.out / f"{args.data}-z{latent}.png")  # fmt: skip
    print(f"{scoring}; torch {torch.__version__}, 1 thread")


if __name__ == "__main__":
    main()
