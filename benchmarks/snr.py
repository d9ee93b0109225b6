r"""Gradient signal-to-noise against draws, on the toy problem of Rainforth et al. (2018).

    z ~ N(mu, I),  x | z ~ N(z, I),  q(z | x) = N(A x + b, 2/3 I),  z and x in 20 dimensions

1,024 datapoints are drawn from the model with mu ~ N(0, I). The parameters are the best ones for
these data (mu = mean of x, A = I/2, b = mu/2), each element moved by N(0, 0.01^2). For one element
of the gradient g of the bound, averaged over all datapoints,

    SNR = |E g| / sd g,

and the SNR of mu, b or A is the mean over its elements. For IWELBO-K with pathwise gradients theory
says that it grows as K^(1/2) for mu (the model) and falls as K^(-1/2) for b and A (the guide).

At large T the signal of the guide's pathwise gradient drowns: some 10^5 plain gradients would be
needed. So each replicate is a pair of gradients, the second with every draw of z reflected about
the mean of q, which has the same law; and a term of mean zero is subtracted, written by hand here,

    C = sum_k (c_k - c'_k) dlog w_k/dz dz/dphi - sum_k c_k dlog q(z_k)/dphi,   E C = 0,

with c the normalised weights (over M in M groups) and c' = their square (over M): the identity of
Tucker et al. (2018). A biased gradient would keep its bias. sd g is that of single gradients
without C: datapoints are independent given the data, so Var g is the sum of the variances of 8
blocks of them. What noise is left in the square of the mean is subtracted. "reflected" is the same
without C, "plain" without C and without reflection, from half the gradients. Standard errors are
bootstrapped over replicates. MIWELBO and PIWELBO split T draws into sqrt(T) groups of sqrt(T); the
others take K = T.

The slopes are those of large T: at small T the gradient of mu is biased towards that of the ELBO,
by a term of order 1/T that the guide's own offset causes and that is larger than the signal.

    python benchmarks/snr.py            # T = 1 ... 1,024, slopes fitted on T >= 64
    python benchmarks/snr.py --quick    # does it run?
    python benchmarks/snr.py --exact    # the gradients of the ELBO beside the exact one, a minute

Every estimator and T is one file under --out; what is there already is not run again. The exit
status is 1 if a slope misses its target or its standard error is not below 0.015; with --exact, if
a gradient is biased.

--exact takes the pair in 4 dimensions, with 16 datapoints, its parameters moved by N(0, 0.3^2) and
the scales s of q learned too, from sqrt(2/3) on. With m = A x + b the ELBO is

    -1/2 sum_d [(m - mu)^2 + (m - x)^2 + 2 s^2 - 2 log s]_d + const,

and its gradient is exact. Of plain gradients, each of L draws per datapoint, it prints the bias
over its standard error, the largest of all parameters, and the sum of their variances.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from mnist_vs_handwritten import once
from torch import Tensor, nn

import ppvae
from ppvae import elbo
from ppvae.program import local_parameters

PARTS = ("mu", "b", "A")
BLOCKS = 8  # of datapoints
BOOTSTRAPS = 400
BIAS_LIMIT = 4.5  # standard errors; exceeded by the largest of 252 normal ones in 1 of 580 runs


def square_root(draws: int) -> int:
    side = math.isqrt(draws)
    if side * side != draws:
        raise ValueError(f"{draws} draws cannot be split into as many groups as each has draws")
    return side


ESTIMATORS: dict[str, Callable[[int], elbo.Estimator]] = {
    "IWELBO": lambda T: elbo.IWELBO(num_particles=T),
    "IWELBO dreg": lambda T: elbo.IWELBO(num_particles=T, gradient="dreg"),
    "MIWELBO": lambda T: elbo.MIWELBO(square_root(T), num_groups=square_root(T)),
    "PIWELBO": lambda T: elbo.PIWELBO(square_root(T), num_groups=square_root(T)),
    "ELBO stl": lambda T: elbo.ELBO(num_particles=T, gradient="stl"),
}
# Slopes that the paper predicts as T grows, and what the benchmark demands: lowest and highest.
# None: no prediction. DReG is not in that paper; Tucker et al. (2018) predict +1/2.
THEORY = {
    "IWELBO": (0.5, -0.5),
    "IWELBO dreg": (0.5, 0.5),
    "MIWELBO": (0.5, 0.0),
    "PIWELBO": (0.5, 0.0),
    "ELBO stl": (0.5, 0.5),
}
TARGETS = {
    ("IWELBO", "mu"): (0.45, 0.55),
    ("IWELBO", "b"): (-0.55, -0.45),
    ("IWELBO", "A"): (-0.55, -0.45),
    ("IWELBO dreg", "b"): (-0.05, math.inf),
    ("IWELBO dreg", "A"): (-0.05, math.inf),
}


class Reflected(dist.Normal):
    """A normal that reflects its draws about its mean: the same law."""

    def rsample(self, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * self.loc - super().rsample(*args, **kwargs)


class Scored(dist.Normal):
    """A normal whose draws carry no gradient, so that it is trained by the score function."""

    has_rsample = False


class Model(ppvae.Program):
    """z ~ N(mu, I), x | z ~ N(z, I)."""

    def __init__(self, mu: Tensor) -> None:
        super().__init__()
        self.mu = nn.Parameter(mu)

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(self.mu, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


class Guide(ppvae.Program):
    """q(z | x) = N(A x + b, 2/3 I); it remembers its last draws."""

    def __init__(self, A: Tensor, b: Tensor) -> None:
        super().__init__()
        self.A, self.b = nn.Parameter(A), nn.Parameter(b)
        self.family: type[dist.Normal] = dist.Normal

    @property
    def scale(self) -> float | Tensor:
        return math.sqrt(2 / 3)

    def mean(self, x: Tensor) -> Tensor:
        return x @ self.A.T + self.b

    def forward(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.family(self.mean(x), self.scale).to_event(1))
        self.drawn = z.detach()


class ScaleGuide(Guide):
    """The same at first, its scales learned too."""

    def __init__(self, A: Tensor, b: Tensor) -> None:
        super().__init__(A, b)
        self.log_scale = nn.Parameter(torch.full_like(b, 0.5 * math.log(2 / 3)))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()


def problem(dim: int, datapoints: int, offset: float, seed: int) -> tuple[Model, Guide, Tensor]:
    """The pair near its best parameters, and the data ``(N, D)``, in the default dtype."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(dim) + math.sqrt(2) * normal(datapoints, dim)
    best = x.mean(0)
    mu = best + offset * normal(dim)
    A = 0.5 * torch.eye(dim, dtype=torch.float64) + offset * normal(dim, dim)
    b = 0.5 * best + offset * normal(dim)
    dtype = torch.get_default_dtype()
    return Model(mu.to(dtype)), Guide(A.to(dtype), b.to(dtype)), x.to(dtype)


def replicates(
    estimator: elbo.Estimator,
    model: Model,
    guide: Guide,
    x: Tensor,
    number: int,
    seed: int,
    blocks: int = BLOCKS,
) -> tuple[Tensor, Tensor]:
    """What blocks of data add to the gradient of mu, b and A, and to C, as drawn and reflected.

    Both ``(number, 2, blocks, P)``, float64, for the mean bound.
    """
    objective = estimator(model, guide)
    torch.manual_seed(seed)
    gradients, controls = [], []
    with local_parameters(), pyro.validation_enabled(False):
        for _ in range(number):
            state = torch.get_rng_state()
            for family in (dist.Normal, Reflected):
                guide.family = family
                torch.set_rng_state(state)
                for part in x.chunk(blocks):
                    slopes = torch.autograd.grad(-objective(part), [model.mu, guide.b, guide.A])
                    gradients.append(torch.cat([slope.flatten() for slope in slopes]).double())
                    controls.append(control(estimator, model, guide, part))
    guide.family = dist.Normal
    stacked = [torch.stack(found) / len(x) for found in (gradients, controls)]
    drawn, zero = (found.view(number, 2, blocks, -1) for found in stacked)
    return drawn, zero


@torch.no_grad()
def control(estimator: elbo.Estimator, model: Model, guide: Guide, x: Tensor) -> Tensor:
    """C at the guide's last draws, summed over the datapoints, ``(P,)``; 0 unless pathwise."""
    of_mu = torch.zeros_like(model.mu, dtype=torch.float64)
    of_mean = torch.zeros_like(x)
    if estimator.gradient == "pathwise":
        z, mean = guide.drawn.reshape(-1, *x.shape), guide.mean(x)
        groups = getattr(estimator, "num_groups", 1)
        score = (z - mean) * 1.5  # of log q, in its mean
        square = (z - model.mu).square() + (z - x).square() - 1.5 * (z - mean).square()
        log_w = -0.5 * square.sum(-1)
        c = torch.softmax(log_w.unflatten(0, (groups, -1)), 1)
        plain, doubly = ((w / groups).flatten(0, 1).unsqueeze(-1) for w in (c, c.square()))
        along = model.mu + x - 2 * z + score  # slope of log w in z, and dz/dmean = 1
        of_mean = ((plain - doubly) * along - plain * score).sum(0)
    of_b, of_A = of_mean.sum(0), of_mean.T @ x
    return torch.cat([of_mu, of_b.double(), of_A.flatten().double()])


def signal_to_noise(gradients: Tensor, controls: Tensor | float = 0.0) -> Tensor:
    """SNR of each element: gradients, and what has mean 0, ``(R, copies, blocks, P)``, to ``(P,)``.

    The copies of a replicate are averaged for the mean, whose own noise is taken off its square.
    """
    averaged = (gradients - controls).mean(1)
    signal = averaged.mean(0).sum(0).square() - averaged.var(0).sum(0) / len(gradients)
    return (signal.clamp(min=0) / gradients.var(0).sum(1).mean(0)).sqrt()


def by_part(values: Tensor, dim: int) -> dict[str, Tensor]:
    """Means over the elements of mu, b and A."""
    parts = values.split([dim, dim, dim * dim], -1)
    return {part: value.mean(-1) for part, value in zip(PARTS, parts, strict=True)}


def measure(name: str, T: int, number: int, recipe: dict[str, Any]) -> dict[str, Any]:
    dim, seed = recipe["dim"], recipe["seed"]
    model, guide, x = problem(dim, recipe["datapoints"], recipe["offset"], seed)
    started = time.perf_counter()
    gradients, controls = replicates(
        ESTIMATORS[name](T), model, guide, x, number, 10_000 * seed + T
    )
    seconds = time.perf_counter() - started
    generator = torch.Generator().manual_seed(seed)
    resampled: dict[str, dict[str, list[float]]] = {
        way: {part: [] for part in PARTS} for way in ("snr", "reflected")
    }
    for _ in range(BOOTSTRAPS):
        rows = torch.randint(number, (number,), generator=generator)
        for way, zero in (("snr", controls[rows]), ("reflected", 0.0)):
            for part, value in by_part(signal_to_noise(gradients[rows], zero), dim).items():
                resampled[way][part].append(value.item())
    values = {
        "snr": signal_to_noise(gradients, controls),
        "reflected": signal_to_noise(gradients),
        "plain": signal_to_noise(gradients[:, :1]),
    }
    found = {
        way: {part: snr.item() for part, snr in by_part(value, dim).items()}
        for way, value in values.items()
    }
    print(
        f"{name}, T = {T}: {', '.join(f'{part} {v:.4g}' for part, v in found['snr'].items())}; "
        f"{number} pairs, {seconds:.0f} s",
        flush=True,
    )
    return {
        **found,
        "bootstrap": resampled,
        "seconds": seconds,
        "torch": torch.__version__,
    }


def slope(draws: Sequence[int], values: Any) -> Any:
    """Least-squares slope of log values ``(len(draws), ...)`` on log draws."""
    t = np.log(np.asarray(draws, dtype=float))
    t = (t - t.mean()) / np.square(t - t.mean()).sum()
    return np.tensordot(t, np.log(np.asarray(values, dtype=float)), 1)


def fit(
    cells: dict, name: str, part: str, smallest: int, way: str = "snr"
) -> tuple[float, float] | None:
    """Slope over T >= smallest, and its bootstrapped standard error."""
    draws = sorted(T for key, T in cells if key == name and smallest <= T)
    if len(draws) < 2:
        return None
    with np.errstate(divide="ignore", invalid="ignore"):
        value = slope(draws, [cells[name, T][way][part] for T in draws])
        spread = slope(draws, [cells[name, T]["bootstrap"][way][part] for T in draws])
        return float(value), float(np.std(spread, ddof=1))


def table(cells: dict, numbers: Callable[[str, int], int]) -> str:
    lines = [
        "| estimator | T | SNR of mu | SNR of b | SNR of A | b, reflected | b, plain | mu, plain | "
        "pairs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (name, T), cell in cells.items():
        shown = [("snr", part) for part in PARTS] + [("reflected", "b")]
        row = [
            f"{cell[way][part]:.4g} ± {np.std(cell['bootstrap'][way][part]):.1g}"
            for way, part in shown
        ]
        row += [f"{cell['plain'][part]:.3g}" for part in ("b", "mu")]
        lines.append(f"| {name} | {T} | {' | '.join(row)} | {numbers(name, T)} |")
    return "\n".join(lines)


def slopes(cells: dict, smallest: int) -> tuple[str, bool]:
    """The table of slopes, and whether every target is reached."""
    lines = [
        "| estimator | parameters | slope ± s.e. | theory | target | reached | reflected only |",
        "|---|---|---|---|---|---|---|",
    ]
    good = True
    for name in ESTIMATORS:
        for part in PARTS:
            found = fit(cells, name, part, smallest)
            other = fit(cells, name, part, smallest, "reflected")
            if found is None or other is None:
                continue
            value, error = found
            theory = THEORY[name][part != "mu"]
            demanded, verdict = "", ""
            if (name, part) in TARGETS:
                low, high = TARGETS[name, part]
                demanded = (
                    f"{low:+.2f} to {high:+.2f}" if high < math.inf else f"{low:+.2f} or more"
                )
                reached = low <= value <= high and error < 0.015
                good, verdict = good and reached, "yes" if reached else "NO"
            lines.append(
                f"| {name} | {part} | {value:+.3f} ± {error:.3f} | {theory:+.1f} | {demanded} | "
                f"{verdict} | {other[0]:+.2f} ± {other[1]:.2f} |"
            )
    return "\n".join(lines), good


def draw_figure(cells: dict, smallest: int, path: Path) -> None:
    from matplotlib import pyplot as plt

    from ppvae.plots.common import BLUE, GREY, MARKERS, ORANGE

    colours = (BLUE, ORANGE, "#009E73", "#CC79A7", GREY)  # Okabe & Ito, for the colour-blind
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    titles = {"mu": "model parameter mu", "b": "guide parameter b"}
    for ax, (part, title) in zip(panels, titles.items(), strict=True):
        looks = zip(ESTIMATORS, colours, MARKERS, (11, 8, 8, 5, 6), strict=False)
        for name, colour, marker, size in looks:  # where they coincide the larger lie below
            draws = [T for key, T in cells if key == name]
            if not draws:
                continue
            values = np.array([cells[name, T]["snr"][part] for T in draws])
            errors = [np.std(cells[name, T]["bootstrap"]["snr"][part]) for T in draws]
            found = fit(cells, name, part, smallest)
            label = name if found is None else f"{name}, slope {found[0]:+.2f} ± {found[1]:.2f}"
            ax.errorbar(
                draws, values, errors, color=colour, marker=marker, markersize=size, linestyle="",
                label=label,
            )  # fmt: skip
            fitted = [T for T in draws if smallest <= T]
            if found is not None:
                at = np.array([min(fitted), max(fitted)], dtype=float)
                centre = np.exp(np.log(fitted).mean())
                height = np.exp(np.log(values[-len(fitted) :]).mean())
                ax.plot(at, height * (at / centre) ** found[0], color=colour, linewidth=size / 3)
            ax.plot(draws, values, color=colour, linewidth=0.8, linestyle=":")
        ax.set(
            xscale="log", yscale="log", title=f"SNR of the gradient: {title}",
            xlabel="draws per datapoint, T", ylabel="|mean| / standard deviation",
        )  # fmt: skip
        ax.grid(True, which="major", alpha=0.3)
        ax.legend()
    figure.savefig(path)
    plt.close(figure)


def slopes_of(value: Tensor, model: Model, guide: Guide) -> Tensor:
    """Gradient in all parameters, those of the model first, ``(P,)``, float64."""
    slopes = torch.autograd.grad(value, [*model.parameters(), *guide.parameters()])
    return torch.cat([slope.flatten() for slope in slopes]).double()


def exact_gradient(model: Model, guide: ScaleGuide, x: Tensor) -> Tensor:
    """That of the mean ELBO, ``(P,)``."""
    mean, log_scale = guide.mean(x), guide.log_scale
    squares = (mean - model.mu).square() + (mean - x).square()
    bound = -0.5 * (squares + 2 * (2 * log_scale).exp() - 2 * log_scale).sum(-1)
    return slopes_of(bound.mean(), model, guide)


def plain_gradients(
    gradient: str, L: int, model: Model, guide: Guide, x: Tensor, number: int, seed: int
) -> Tensor:
    """Independent gradients of the mean ELBO of L draws, ``(number, P)``."""
    objective = elbo.ELBO(L, gradient)(model, guide)
    guide.family = Scored if gradient == "score" else dist.Normal
    torch.manual_seed(seed)
    with local_parameters(), pyro.validation_enabled(False):
        found = [slopes_of(-objective(x) / len(x), model, guide) for _ in range(number)]
    return torch.stack(found)


def against_exact(draws: Sequence[int], number: int, seed: int) -> tuple[str, float]:
    """The table of ``--exact``, and the largest bias over its standard error.

    Without a baseline L > 1 draws are L independent gradients of one, averaged: no run of its own.
    """
    model, near, x = problem(dim=4, datapoints=16, offset=0.3, seed=seed)
    guide = ScaleGuide(near.A.detach(), near.b.detach())
    exact = exact_gradient(model, guide, x)
    lines = [
        "| L | gradient | largest bias / s.e. | total variance ± s.e., guide | over pathwise | "
        "total variance, model |",
        "|---|---|---|---|---|---|",
    ]
    worst = pathwise = single = 0.0
    for L in draws:
        for gradient in ("pathwise", "stl", "score"):
            found = plain_gradients(gradient, L, model, guide, x, number, 1_000 * seed + L)
            bias = (found.mean(0) - exact).abs() / (found.std(0) / math.sqrt(number))
            worst = max(worst, bias.max().item())
            squares = (found - found.mean(0)).square()
            of_model, of_guide = (
                part.sum(1) for part in squares.tensor_split([len(model.mu)], dim=1)
            )
            total, error = of_guide.mean().item(), of_guide.std().item() / math.sqrt(number)
            label = gradient
            if gradient == "pathwise":
                pathwise = total
            elif gradient == "score" and L == 1:
                single, label = total, "score, no baseline"
            elif gradient == "score":
                label = "score, leave-one-out"
                lines.append(
                    f"| {L} | score, no baseline | as L = 1 | {single / L:.4g} = {single:.4g} / "
                    f"{L} | {single / L / pathwise:.3g} | |"
                )
            lines.append(
                f"| {L} | {label} | {bias.max():.2f} | {total:.4g} ± {error:.1g} | "
                f"{total / pathwise:.3g} | {of_model.mean():.4g} |"
            )
    return "\n".join(lines), worst


def print_against_exact(number: int, seed: int) -> bool:
    """``--exact``; whether every gradient is unbiased."""
    started = time.perf_counter()
    text, worst = against_exact((1, 10, 50), number, seed)
    print(
        f"{text}\n\n{number:,} gradients each, seed {seed}; {torch.get_default_dtype()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, "
        f"{time.perf_counter() - started:.0f} s"
    )
    return worst < BIAS_LIMIT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, nargs="+", default=[1, 4, 16, 64, 256, 1024])
    parser.add_argument("--others-to", type=int, default=256, metavar="T",
                        help="most draws of estimators that have no target")  # fmt: skip
    parser.add_argument("--fit-from", type=int, default=64, help="smallest T in the fits")
    parser.add_argument("--pairs", type=int, default=48, help="replicates where T is small")
    parser.add_argument("--min-pairs", type=int, default=24, help="and where it is large")
    parser.add_argument("--estimators", nargs="+", choices=list(ESTIMATORS), metavar="NAME",
                        default=list(ESTIMATORS), help=f"of {', '.join(ESTIMATORS)}")  # fmt: skip
    parser.add_argument("--dim", type=int, default=20)
    parser.add_argument("--datapoints", type=int, default=1_024)
    parser.add_argument("--offset", type=float, default=0.01, help="sd of the moves")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out/snr"))
    parser.add_argument("--figure", type=Path, help="default: snr.png in --out")
    parser.add_argument("--quick", action="store_true", help="T = 1, 4, 16, 10 pairs")
    parser.add_argument("--exact", action="store_true", help="bias and variance instead, see above")
    parser.add_argument("--gradients", type=int, default=4_000, help="of each kind, for --exact")
    args = parser.parse_args()
    if args.exact:
        sys.exit(0 if print_against_exact(200 if args.quick else args.gradients, args.seed) else 1)
    if args.quick:
        args.draws, args.pairs, args.min_pairs, args.fit_from = [1, 4, 16], 10, 10, 1
        args.out = args.out / "quick"
    args.out.mkdir(parents=True, exist_ok=True)

    recipe = {key: getattr(args, key) for key in ("dim", "datapoints", "offset", "seed")}

    def numbers(name: str, T: int) -> int:
        """Pairs: fewer where T is large."""
        return max(args.min_pairs, min(args.pairs, round(args.pairs * (64 / T) ** 0.5)))

    cells: dict[tuple[str, int], dict[str, Any]] = {}
    wanted = [
        (name, T)
        for name in args.estimators
        for T in sorted(args.draws)
        if args.others_to >= T or any(key == name for key, _ in TARGETS)
    ]
    for T in sorted(args.draws):  # the small ones of all estimators first
        for name in (key for key, draws in wanted if draws == T):
            number = numbers(name, T)
            path = args.out / f"{name.replace(' ', '-')}-{T}-seed{args.seed}.json"
            run = functools.partial(measure, name, T, number, recipe)
            cells[name, T] = once(path, recipe | {"pairs": number}, run)
    cells = {key: cells[key] for key in wanted}
    fits, good = slopes(cells, args.fit_from)
    draw_figure(cells, args.fit_from, args.figure or args.out / "snr.png")
    print(
        f"\n{table(cells, numbers)}\n\n{fits}\n\n"
        f"D = {args.dim}, N = {args.datapoints:,}, moves N(0, {args.offset}^2), seed {args.seed}; "
        f"slopes fitted on T >= {args.fit_from}; {BOOTSTRAPS} bootstraps; "
        f"{torch.get_default_dtype()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads, "
        f"{sum(cell['seconds'] for cell in cells.values()):.0f} s"
    )
    sys.exit(0 if good or args.quick else 1)


if __name__ == "__main__":
    main()
