r"""FactorVAE beside VAE, beta-VAE and beta-TCVAE, on sprites whose factors are known.

    python examples/factor.py                               # 3 seeds of 4 methods, short: minutes
    python examples/factor.py --num-seeds 1 --epochs 93 --compile
    python examples/factor.py --cells out/reproduce/factor  # draw what benchmarks/reproduce.py made
    python examples/factor.py --quick                       # a check that all runs, in seconds

All sprites are trained on, and all are scored, as in the literature. Every seed is reported: scores
differ more between seeds than between methods. Factors are used for the scores alone.

Source: Kim & Mnih, Disentangling by Factorising, 2018; Chen, Li, Grosse & Duvenaud, Isolating
Sources of Disentanglement in VAEs, 2018.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import reporting
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, metrics, models, nets, plots
from ppvae.pairs import evaluation_mode

METHODS = ["VAE", "beta", "TC", "Factor"]  # of the cells of benchmarks/reproduce_factor.py, too
LABELS = {"VAE": "VAE", "beta": "beta-VAE", "TC": "beta-TCVAE", "Factor": "FactorVAE"}
COLOURS = {"VAE": "#666666", "beta": "#E69F00", "TC": "#0072B2", "Factor": "#D55E00"}
FILES = [
    "results.json", "traversals.png", "information.png", "scores.png", "total_correlation.png",
    "calibration.png",
]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)  # steps of some milliseconds gain nothing from a second one
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    started = time.perf_counter()
    factors = data.sprites(16, sizes=(3, 3, 3, 4, 4)) if args.quick else data.sprites(32)
    args.shape = tuple(factors.images.shape[1:])
    generator = torch.Generator().manual_seed(0)
    x = factors[torch.randperm(len(factors), generator=generator)]
    found, kept = from_cells(args, x) if args.cells else trained(args, factors, x)

    report(found)
    reporting.clear(out, FILES)
    write(out, args, found, time.perf_counter() - started)
    factor, vae = kept["Factor"], kept["VAE"]
    reporting.save(draw_traversals(factor.model, factor.guide, x), out / "traversals.png")
    reporting.save(
        draw_information(factors, x, {"VAE": vae, "Factor": factor}), out / "information.png"
    )
    reporting.save(draw_scores(found), out / "scores.png")
    reporting.save(draw_total_correlation(found), out / "total_correlation.png")
    reporting.save(draw_calibration(ratio_of(factor), factor.guide, x), out / "calibration.png")
    reporting.print_files(out, FILES)


def trained(
    args: argparse.Namespace, factors: data.Factors, x: Tensor
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, ppvae.SVI]]:
    """What is reported of each method and seed, and the pairs of the first seed."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    kept: dict[str, ppvae.SVI] = {}
    for seed in range(args.seed, args.seed + args.num_seeds):
        for method in METHODS:
            track = Track(x[:2_000], max(1, args.epochs // 10))
            svi, history = train(method, x, args, seed, callbacks=[track])
            kept.setdefault(method, svi)
            numbers = evaluate(svi.model, svi.guide, x, seed)
            numbers["tc_ratio"] = tc_by_ratio(svi.guide, x, args, seed)
            numbers["scores"] = scores(svi.guide, factors, args, seed)
            numbers["epochs"] = [row for row in history.rows if "tc_gaussian" in row]
            found[method].append(numbers | {"seed": seed})
            print(f"seed {seed}, {LABELS[method]}: ELBO {numbers['elbo']:.2f}", flush=True)
    return found, kept


def from_cells(
    args: argparse.Namespace, x: Tensor
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, ppvae.SVI]]:
    """The same of cells that were trained before, the pairs by their checkpoints."""
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    kept: dict[str, ppvae.SVI] = {}
    for method in METHODS:
        for path in sorted(args.cells.glob(f"{method}-*.json")):
            cell = json.loads(path.read_text())
            found[method].append(cell | {"seed": cell["recipe"]["seed"]})
            if method not in kept:
                recipe = argparse.Namespace(**cell["recipe"], shape=args.shape)
                svi = made(method, len(x), recipe)
                svi.prepare(x[: recipe.batch_size])
                files = ppvae.Checkpoints(path.with_suffix(""))
                svi.load_state_dict(files.load(files.paths()[-1])["svi"])
                kept[method] = svi
        if not found[method]:
            raise ValueError(f"--cells {args.cells} has no {method}-SEED.json; run "
                             "benchmarks/reproduce.py factor")  # fmt: skip
    return found, kept


# ------------------------------------------------------------------------------ the pieces


def pair(
    shape: tuple[int, int, int], args: argparse.Namespace
) -> tuple[models.VAE, guides.Amortized]:
    """Networks of the images as they are, if convolutions are asked for, else of flat pixels."""
    z = args.latent_dim
    if args.channels:
        encoder: nn.Module = nets.conv_encoder(2 * z, shape, args.channels, args.hidden)
        decoder: nn.Module = nets.conv_decoder(z, shape, args.channels[::-1], args.hidden)
    else:
        size = int(np.prod(shape))
        encoder = nn.Sequential(nn.Flatten(-3), nets.mlp(size, *args.hidden, 2 * z))
        decoder = nn.Sequential(nets.mlp(z, *args.hidden[::-1], size), nn.Unflatten(-1, shape))
    model = models.VAE(conditionals.Bernoulli(decoder, event_dim=3), latent_dim=z)
    return model, guides.Normal(encoder)


def estimator(method: str, rows: int, args: argparse.Namespace) -> elbo.ELBO:
    """The bound of a method; the critic's gamma rises over the first fifth of the steps."""
    if method == "VAE":
        return elbo.ELBO(kl="mixed")
    if method == "beta":
        return elbo.ELBO(kl="mixed", beta=args.beta)
    if method == "TC":
        return elbo.TCELBO(beta=args.tc_beta, size=rows)
    steps = args.epochs * -(-rows // args.batch_size)
    gamma = elbo.LinearWarmup(max(1, steps // 5), end=args.gamma)
    return elbo.FactorELBO(kl="mixed", gamma=gamma, ratio=critic(args))


def critic(args: argparse.Namespace) -> nn.Module:
    """The network of a ratio, from a code to a number."""
    return nets.mlp(args.latent_dim, *args.critic, 1)


def made(method: str, rows: int, args: argparse.Namespace) -> ppvae.SVI:
    """A fresh pair, and what trains it by a method."""
    model, guide = pair(args.shape, args)
    beside = None
    if method == "Factor":
        adam = functools.partial(torch.optim.Adam, lr=args.critic_lr, betas=(0.5, 0.9))
        beside = ppvae.Beside(adam, steps=args.critic_steps)
    adam = functools.partial(torch.optim.Adam, lr=args.lr)
    bound = estimator(method, rows, args)
    return ppvae.SVI(model, guide, adam, bound, compile=args.compile, beside=beside)


def train(
    method: str, x: Any, args: argparse.Namespace, seed: int, **options: Any
) -> tuple[ppvae.SVI, ppvae.History]:
    """A pair trained by a method, and its history."""
    pyro.set_rng_seed(seed)
    svi = made(method, len(x), args)
    history = ppvae.fit(
        svi, x, epochs=args.epochs, batch_size=args.batch_size, seed=seed, progress=False, **options
    )
    return svi, history


class Track(ppvae.Callback):
    """The total correlation of some rows' codes, in the first and in every tenth epoch."""

    def __init__(self, x: Tensor, every: int = 10) -> None:
        self.x, self.every = x, every

    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        row = history.rows[-1]
        if row["epoch"] % self.every == 0 or row["epoch"] <= 3:
            x = self.x.to(next(svi.objective.parameters()).device)
            found = diagnostics.total_correlation(svi.guide, x, num_draws=1)
            row["tc_gaussian"] = found.gaussian
            if svi.turns is not None:
                row["tc_ratio"] = mean_ratio(ratio_of(svi), svi.guide, x)


def ratio_of(svi: ppvae.SVI) -> ppvae.Ratio:
    """The critic of a FactorELBO."""
    state: Any = svi.objective.state
    ratio: ppvae.Ratio = state.ratio
    return ratio


@torch.no_grad()
def mean_ratio(ratio: ppvae.Ratio, guide: Any, x: Tensor) -> float:
    """The mean of a critic's log-ratio over draws of q(z): the total correlation by the ratio."""
    with evaluation_mode(guide):
        z = guide.posterior(x).sample()
    return float(ratio(z).mean())


@torch.no_grad()
def means(guide: Any, x: Tensor) -> Tensor:
    """The codes: means of q(z | x)."""
    with evaluation_mode(guide):
        return torch.cat([guide.posterior(rows).mean for rows in x.split(1_000)])


@torch.no_grad()
def kl_by_unit(guide: Any, x: Tensor) -> Tensor:
    """The KL of each code from N(0, 1), mean over rows, ``(D,)`` nats."""
    prior = torch.distributions.Normal(0.0, 1.0)
    with evaluation_mode(guide):
        rates = [torch.distributions.kl_divergence(guide.posterior(rows).base_dist, prior)
                 for rows in x.split(1_000)]  # fmt: skip
    return torch.cat(rates).mean(0)


@torch.no_grad()
def evaluate(model: Any, guide: Any, x: Tensor, seed: int) -> dict[str, Any]:
    """The bound of some rows, its parts, and the total correlation of their q(z), nats."""
    likelihoods = []
    with evaluation_mode(model, guide), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for rows in x.split(1_000):
            z = guide.posterior(rows).sample()
            likelihoods.append(model.likelihood(z).log_prob(rows))
    by_unit, codes = kl_by_unit(guide, x), means(guide, x)
    reconstruction = torch.cat(likelihoods).mean().item()
    tc = diagnostics.total_correlation(guide, x, seed=seed)
    return {
        "reconstruction": reconstruction,
        "kl": by_unit.sum().item(),
        "elbo": reconstruction - by_unit.sum().item(),
        "kl_by_unit": [round(value, 4) for value in by_unit.tolist()],
        "active_units": int((codes.var(0) > 0.01).sum()),  # as Burda et al., 2016
        "tc_gaussian": tc.gaussian,
        "tc_aggregate": tc.aggregate,
        "tc_aggregate_se": tc.standard_error,
    }


def tc_by_ratio(guide: Any, x: Tensor, args: argparse.Namespace, seed: int) -> float:
    """The total correlation by a new critic, trained on draws of a guide that stays as it is."""
    with torch.random.fork_rng(devices=[]), evaluation_mode(guide), torch.no_grad():
        torch.manual_seed(seed)
        ratio = ppvae.Ratio(critic(args), lambda draws: draws)  # its loss is called by hand
        optimizer = torch.optim.Adam(ratio.parameters(), lr=1e-3)
        q = guide.posterior(x).base_dist
        for _ in range(args.ratio_steps):
            rows = torch.randint(len(x), (512,))
            z = torch.normal(q.mean[rows], q.stddev[rows])
            with torch.enable_grad():
                ratio.loss(z, elbo.factor.shifted(z)).div(len(z)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return float(ratio(q.sample()).mean())


def scores(
    guide: Any, factors: data.Factors, args: argparse.Namespace, seed: int
) -> dict[str, float]:
    """The scores of the literature at the means of q(z | x); 1 is the best, chance is not 0."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(len(factors), generator=generator)[: args.score_rows]
    codes, truth = means(guide, factors[rows]), factors.factors(rows)
    votes = {"num_train": args.votes, "num_test": args.votes // 2, "seed": seed}
    dci = metrics.dci(codes[: args.dci_rows], truth[: args.dci_rows], num_trees=args.dci_trees)
    represent = functools.partial(means, guide)
    return {
        "FactorVAE": metrics.factor_vae_score(represent, factors, **votes),
        "beta-VAE": metrics.beta_vae_score(represent, factors, **votes),
        "MIG": metrics.mig(codes, truth),
        "SAP": metrics.sap(codes, truth),
        "DCI": dci.disentanglement,
        "completeness": dci.completeness,
        "modularity": metrics.modularity(codes, truth),
    }


# ------------------------------------------------------------------------------ what is reported


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    """Median and quartiles over the seeds."""
    seeds = {method: [cell["seed"] for cell in cells] for method, cells in found.items()}
    print("\nMedian (quartiles) over seeds " + "; ".join(
        f"{', '.join(map(str, s))} of {LABELS[m]}" for m, s in seeds.items()))  # fmt: skip
    for title, keys in (
        ("nats", ["reconstruction", "kl", "elbo", "tc_gaussian", "tc_ratio", "tc_aggregate"]),
        ("scores, 1 is the best", list(found["VAE"][0]["scores"])),
    ):
        width = max(map(len, keys))
        print(f"\n  {title:<{width}}" + "".join(f"{LABELS[m]:>26}" for m in METHODS))
        for key in keys:
            values = {m: [cell.get(key, cell["scores"].get(key)) for cell in found[m]]
                      for m in METHODS}  # fmt: skip
            cells = "".join(f"{shown(values[m]):>26}" for m in METHODS)
            print(f"  {key:<{width}}{cells}")


def quartiles(values: list[float]) -> list[float]:
    """First quartile, median, third quartile; of one value thrice this."""
    if len(values) == 1:
        return values * 3
    return statistics.quantiles(values, n=4, method="inclusive")


def shown(values: list[float]) -> str:
    """Median and quartiles as text."""
    low, middle, high = (f"{value:.{2 if abs(value) > 1 else 3}f}" for value in quartiles(values))
    return f"{middle} ({low}, {high})"


def write(
    out: Path, args: argparse.Namespace, found: dict[str, list[dict[str, Any]]], seconds: float
) -> None:
    """Every number of every seed."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    whole = {"methods": found, "seconds": seconds, "settings": settings}
    (out / "results.json").write_text(json.dumps(whole, indent=2) + "\n")


@torch.no_grad()
def draw_traversals(model: Any, guide: Any, x: Tensor, columns: int = 9) -> Any:
    """The first image with one code moved at a time; codes of large KL first."""
    by_unit = kl_by_unit(guide, x)
    with evaluation_mode(model, guide):
        q = guide.posterior(x[:1])
        order = by_unit.argsort(descending=True)
        z = q.mean.expand(len(order), columns, -1).clone()
        for row, unit in enumerate(order):
            z[row, :, unit] = torch.linspace(-2.0, 2.0, columns)
        images = model.likelihood(z).mean.flatten(2)
    labels = [f"{by_unit[unit]:.2f} nats" for unit in order]
    ends = [f"{v:+.1f}" for v in torch.linspace(-2.0, 2.0, columns).tolist()]
    shape = tuple(x.shape[1:])
    return plots.image_grid(images, shape, row_labels=labels, column_labels=ends)


def draw_information(factors: data.Factors, x: Tensor, kept: dict[str, ppvae.SVI]) -> Any:
    """Mutual information of each code with each factor, as a share of the factor's entropy."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(kept), figsize=(3.6 * len(kept), 4.0))
    everything = factors[torch.arange(len(factors))]
    entropies = np.log(factors.sizes)
    for ax, (method, svi) in zip(axes, kept.items(), strict=True):
        codes, by_unit = means(svi.guide, everything), kl_by_unit(svi.guide, x)
        order = by_unit.argsort(descending=True)
        shares = (
            metrics.factor_information(codes[:, order], factors.factors(torch.arange(len(factors))))
            / entropies
        )
        picture = ax.imshow(shares, cmap="Greys", vmin=0, vmax=1, aspect="auto")
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 0.5 else "black"
            ax.text(column, row, f"{share:.2f}", ha="center", va="center", color=colour, fontsize=7)
        ax.set_xticks(range(len(factors.names)), factors.names, rotation=45, ha="right")
        ax.set_yticks(range(len(order)), [f"{by_unit[unit]:.2f}" for unit in order])
        ax.set_title(LABELS[method])
    axes[0].set_ylabel("codes, by KL [nats]")
    figure.colorbar(picture, ax=axes, label="information / entropy of the factor", shrink=0.7)
    return axes[0]


def draw_scores(found: dict[str, list[dict[str, Any]]]) -> Any:
    """Every seed's scores as points, median and quartiles as a bar."""
    from matplotlib import pyplot as plt

    names = list(found["VAE"][0]["scores"])
    _, ax = plt.subplots(figsize=(8.2, 3.6))
    for place, method in enumerate(METHODS):
        at = np.arange(len(names)) + (place - 1.5) * 0.2
        for x, name in zip(at, names, strict=True):
            values = [cell["scores"][name] for cell in found[method]]
            low, middle, high = quartiles(values)
            ax.bar(x, high - low, 0.15, low, color=COLOURS[method], alpha=0.35)
            ax.plot([x - 0.075, x + 0.075], [middle] * 2, color=COLOURS[method], lw=2,
                    label=LABELS[method] if name == names[0] else None)  # fmt: skip
            ax.plot([x] * len(values), values, ".", color=COLOURS[method], ms=4)
    scored = {"FactorVAE": "FactorVAE\nscore", "beta-VAE": "beta-VAE\nscore"}
    ax.set_xticks(range(len(names)), [scored.get(name, name) for name in names])
    ax.set(ylabel="score", ylim=(0, 1.02))
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1))
    return ax


def draw_total_correlation(found: dict[str, list[dict[str, Any]]]) -> Any:
    """Left over training, thin lines are seeds, the thick one their median; right at the end."""
    from matplotlib import pyplot as plt

    _, (ax, end) = plt.subplots(1, 2, figsize=(8.0, 3.4), width_ratios=[1.6, 1])
    kinds = {
        "tc_gaussian": "fitted\nGaussian",
        "tc_ratio": "ratio",
        "tc_aggregate": "mixture\nq(z)",
    }
    for place, method in enumerate(METHODS):
        curves = [[row["tc_gaussian"] for row in cell["epochs"]] for cell in found[method]]
        steps = [row["step"] for row in found[method][0]["epochs"]]
        for curve in curves:
            ax.plot(steps, curve, color=COLOURS[method], lw=0.6, alpha=0.5)
        ax.plot(steps, np.median(curves, 0), color=COLOURS[method], lw=2, label=LABELS[method])
        for at, kind in enumerate(kinds):
            values = [cell[kind] for cell in found[method]]
            end.plot([at + (place - 1.5) * 0.15] * len(values), values, ".", color=COLOURS[method])
    ax.set(xlabel="step", ylabel="total correlation [nats]", title="fitted Gaussian", yscale="log")
    end.set(title="at the end, every seed", yscale="log", xlim=(-0.5, 2.5))
    end.set_xticks(range(len(kinds)), list(kinds.values()))
    for each in (ax, end):
        each.spines[["top", "right"]].set_visible(False)
    ax.legend()
    return ax


@torch.no_grad()
def draw_calibration(ratio: ppvae.Ratio, guide: Any, x: Tensor) -> Any:
    """What FactorVAE's critic says of new draws, against where they came from."""
    with evaluation_mode(guide):
        z = guide.posterior(x).sample()
    return plots.ratio_calibration(ratio(z), ratio(elbo.factor.shifted(z)))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/factor")
    add = parser.add_argument
    add("--cells", type=Path, metavar="FOLDER", help="draw these cells of benchmarks/reproduce.py "
        "and train nothing; options of the training are theirs")  # fmt: skip
    add("--num-seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    add("--epochs", type=int, default=10, help="of 216 steps (default: %(default)s)")
    add("--batch-size", type=int, default=64, help="(default: %(default)s)")
    add("--latent-dim", type=int, default=10, help="size of z (default: %(default)s)")
    add("--channels", type=int, nargs="*", default=[], metavar="N",
        help="of strided convolutions, before --hidden; none: flat pixels (default)")  # fmt: skip
    add("--hidden", type=int, nargs="+", default=[128, 128], metavar="N",
        help="widths of the encoder, mirrored in the decoder (default: 128 128)")  # fmt: skip
    add("--lr", type=float, default=1e-3, help="Adam's rate (default: %(default)s)")
    add("--beta", type=float, default=4.0, help="of beta-VAE (default: %(default)s)")
    add("--tc-beta", type=float, default=2.0, help="of beta-TCVAE (default: %(default)s)")
    add("--gamma", type=float, default=6.4, help="of FactorVAE, reached after a fifth of the steps "
        "(default: %(default)s)")  # fmt: skip
    add("--critic", type=int, nargs="+", default=[128, 128], metavar="N",
        help="widths of FactorVAE's critic (default: 128 128)")  # fmt: skip
    add("--critic-steps", type=int, default=4, help="to each of the pair (default: %(default)s)")
    add("--critic-lr", type=float, default=1e-3, help="(default: %(default)s)")
    add("--compile", action="store_true", help="compile the steps; needs a C++ compiler")
    args = parser.parse_args(argv)
    for name in ("num_seeds", "epochs", "batch_size", "latent_dim", "critic_steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(args, name)}")
    if args.latent_dim < 2:
        parser.error("--latent-dim must be 2 or more: one code is independent of no other")
    if args.batch_size < args.latent_dim:
        parser.error("--batch-size must be --latent-dim or more: the critic needs as many rows")
    args.ratio_steps, args.score_rows, args.votes = 1_000, 10_000, 2_000
    args.dci_rows, args.dci_trees = 1_000, 20
    if args.quick:
        args.epochs, args.num_seeds, args.hidden, args.critic = 2, 2, [16], [16]
        args.ratio_steps, args.votes, args.dci_rows, args.dci_trees = 10, 50, 200, 2
    return args


if __name__ == "__main__":
    reporting.run(main)
