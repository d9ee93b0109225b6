"""Over-dispersed counts, as of genes in cells: negative binomial against Poisson, and the truth.

    python examples/counts.py               # made here: two batches; 40 seconds
    python examples/counts.py --dispersion 30   # nearly Poisson
    python examples/counts.py --smoke       # a check that all runs, in seconds

Cells lie on a plane (z), each gene answers in its own way, a batch changes the genes' rates, and a
cell is read to its own depth, its library size. Batch and library size are known: one is a
condition, the other an offset of the log mean. Since the data are made here, the log p(x) of the
process itself is known, by quadrature: no model can be better on average.

Source: Lopez, Regier, Cole, Jordan & Yosef, Deep generative modeling for single-cell
transcriptomics, 2018, of which this is the likelihood with known library sizes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import reporting
import scipy.special
import scipy.stats
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, diagnostics, guides, models, nets, plots

FILES = ["results.json", "dispersion.png", "nats.png", "khat.png", "latent.png"]
BATCHES = 2


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(1)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    cells = Cells(args.genes, args.dispersion, args.seed)
    train, valid, test = (cells.draw(n, seed) for seed, n in enumerate(args.rows))
    zeros = float((test[0] == 0).float().mean())
    print(f"{args.rows[0]} cells of {args.genes} genes; {zeros:.0%} zeros")

    heads = {
        "Poisson": conditionals.Poisson,
        "NegativeBinomial": lambda net: conditionals.NegativeBinomial(
            net,
            theta=conditionals.Scale(1.0, args.genes),  # one dispersion for each gene
        ),
    }
    statistics = {
        "variance / mean": lambda x: x.var(-1) / x.mean(-1),
        "share of zeros": lambda x: (x == 0).float().mean(-1),
        "largest count": lambda x: x.amax(-1),
    }
    pairs, evidence, checks, results = {}, {}, {}, {}
    for name, head in heads.items():
        pyro.set_rng_seed(args.seed)
        model, guide = pairs[name] = pair(head, args)
        adam = functools.partial(torch.optim.Adam, lr=args.lr)
        started = time.perf_counter()
        history = ppvae.fit(
            ppvae.SVI(model, guide, adam),
            train,
            valid=valid,
            epochs=args.epochs,
            batch_size=100,
            patience=20,
            seed=args.seed,
        )
        seconds = time.perf_counter() - started
        evidence[name] = diagnostics.log_evidence(
            model, guide, *test, num_particles=args.num_samples, seed=args.seed
        )
        checks[name] = diagnostics.predictive_check(
            model, guide, *test, statistics=statistics, num_draws=100, seed=args.seed
        )
        print(f"\n{name}: {len(history.rows)} epochs, {seconds:.0f} s\n{checks[name]}")
        results[name] = numbers(evidence[name], checks[name]) | independent(
            name, model, guide, test
        )

    truth = cells.log_evidence(*test)
    results["truth"] = {"log_evidence": float(truth.mean())}
    gain = evidence["NegativeBinomial"].log_evidence - evidence["Poisson"].log_evidence
    results["gain"] = {"nats": float(gain.mean()), "se": standard_error(gain)}
    table(evidence, truth, gain, results)
    reporting.clear(out, FILES)
    reporting.write_results(out / "results.json", args, results)
    draw_dispersion(pairs, test, out / "dispersion.png")
    draw_nats(evidence, truth, out / "nats.png")
    draw_khat(evidence, out / "khat.png")
    draw_latent(pairs["NegativeBinomial"][1], test, out / "latent.png")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ the pair


def pair(head: Any, args: argparse.Namespace) -> tuple[models.CVAE, guides.Normal]:
    """p(z) p(x | z, batch, size), where the size scales the mean; q(z | x, batch, size)."""
    decoder = nets.mlp(args.latent_dim + BATCHES, args.width, args.genes)
    model = models.CVAE(head(decoder), args.latent_dim, condition=nets.OneHot(BATCHES))
    encoder = nets.mlp(args.genes + BATCHES + 1, args.width, 2 * args.latent_dim)
    return model, guides.Normal(LogCounts(encoder), condition=nets.OneHot(BATCHES))


class LogCounts(nn.Module):
    """A network of log(1 + counts), and of what else is known."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *known: Tensor) -> Tensor:
        found: Tensor = self.net(x.log1p(), *known)
        return found


# ------------------------------------------------------------------------------ the data


class Cells:
    """The process: negative binomial counts around log-linear means."""

    def __init__(self, genes: int, dispersion: float, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        self.weight = 0.6 * torch.randn(2, genes, generator=random)
        self.base = 0.5 + torch.randn(genes, generator=random)
        self.shift = 0.5 * torch.randn(BATCHES, genes, generator=random)
        # of each gene its own: variance = mean + mean^2 / theta
        self.theta = dispersion * (0.5 * torch.randn(genes, generator=random)).exp()

    def log_mean(self, z: Tensor, batch: Tensor, log_size: Tensor) -> Tensor:
        return z @ self.weight + self.base + self.shift[batch] + log_size.unsqueeze(-1)

    def draw(self, rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Counts, batches and log library sizes."""
        with torch.random.fork_rng():
            torch.manual_seed(1000 + seed)
            z, batch = torch.randn(rows, 2), torch.arange(rows) % BATCHES
            log_size = 0.5 * torch.randn(rows)
            mean = self.log_mean(z, batch, log_size).exp()
            return (
                torch.poisson(dist.Gamma(self.theta, self.theta / mean).sample()),
                batch,
                log_size,
            )

    def log_evidence(self, x: Tensor, batch: Tensor, log_size: Tensor, points: int = 161) -> Tensor:
        """log p(x | batch, size) of the process, by a grid over the plane, ``(N,)``."""
        line = torch.linspace(-6, 6, points, dtype=torch.float64)
        z = torch.cartesian_prod(line, line)
        log_prior = dist.Normal(0.0, 1.0).log_prob(z).sum(-1) + 2 * math.log(12 / (points - 1))
        found = []
        for counts, b, size in zip(x.double(), batch, log_size.double(), strict=True):
            mean = (z @ self.weight.double() + self.base + self.shift[b] + size).exp()
            theta = self.theta.double()
            logits = mean.log() - theta.log()
            law = torch.distributions.NegativeBinomial(theta, logits=logits, validate_args=False)
            found.append((log_prior + law.log_prob(counts).sum(-1)).logsumexp(0))
        return torch.stack(found)


# ------------------------------------------------------------------------------ numbers


def numbers(evidence: diagnostics.Evidence, check: diagnostics.PredictiveCheck) -> dict[str, Any]:
    return {
        "log_evidence": evidence.mean,
        "log_evidence_se": evidence.mean_se,
        "elbo": float(evidence.elbo.mean()),
        "khat_above_0.7": float((evidence.khat > 0.7).double().mean()),
        "p_values": check.p_value,
    }


@torch.no_grad()
def independent(name: str, model: models.CVAE, guide: Any, test: Any) -> dict[str, float]:
    """The same log p(x) by scipy's laws and numpy's sums, at the same draws, of 20 rows."""
    model, guide = copy.deepcopy(model).double(), copy.deepcopy(guide).double()
    some = [part.double() if part.is_floating_point() else part for part in (p[:20] for p in test)]
    pyro.set_rng_seed(0)
    weights = ppvae.log_weights(model, guide, *some, num_particles=50)
    value, q = weights.guide_trace.nodes["z"]["value"], guide.posterior(*some)
    x, _, log_size = (part.numpy() for part in some)
    outputs = model.likelihood.net(value, model.condition(some[1])).numpy()
    mean = np.exp(outputs[..., : x.shape[1]] + log_size[:, None])
    if name == "Poisson":
        log_x = scipy.stats.poisson.logpmf(x, mean)
    else:
        theta = model.likelihood.theta().numpy()
        log_x = scipy.stats.nbinom.logpmf(x, theta, theta / (theta + mean))
    log_z = scipy.stats.norm.logpdf(value.numpy())
    log_q = scipy.stats.norm.logpdf(value.numpy(), q.mean.numpy(), q.stddev.numpy())
    log_w = log_x.sum(-1) + log_z.sum(-1) - log_q.sum(-1)
    by_scipy = scipy.special.logsumexp(log_w, axis=0) - math.log(len(log_w))
    ours = (weights.log_w.logsumexp(0) - math.log(len(log_w))).numpy()
    return {"scipy_largest_difference": float(np.abs(by_scipy - ours).max())}


def standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values))


def table(
    evidence: dict[str, diagnostics.Evidence], truth: Tensor, gain: Tensor, results: dict[str, Any]
) -> None:
    rows = []
    for name, found in evidence.items():
        r = results[name]
        rows.append((
            name,
            f"{reporting.number(found.mean, found.mean_se)}   k-hat > 0.7 on "
            f"{r['khat_above_0.7']:.0%} of cells; scipy differs by "
            f"{r['scipy_largest_difference']:.1e} at most",
        ))  # fmt: skip
    rows.append(
        ("the process itself", reporting.number(float(truth.mean()), standard_error(truth)))
    )
    rows.append(
        ("NegativeBinomial - Poisson", reporting.number(float(gain.mean()), standard_error(gain)))
    )
    reporting.print_table(
        f"log p(x | batch, library size) of {len(truth)} held-out cells [nats per cell]", rows
    )


# ------------------------------------------------------------------------------ pictures


@torch.no_grad()
def draw_dispersion(pairs: dict[str, Any], test: Any, path: Path) -> None:
    """Each gene's variance against its mean, depth divided out, of data and of draws."""
    from matplotlib import pyplot as plt

    x, batch, log_size = test
    _, every = plt.subplots(1, len(pairs), figsize=(9, 4), sharey=True)
    for ax, (name, (model, guide)) in zip(every, pairs.items(), strict=True):
        z = guide.posterior(*test).sample()
        law = model.likelihood(z, model.condition(batch), offset=log_size)
        for counts, label, style in ((x, "data", "o"), (law.sample(), f"drawn, {name}", "x")):
            mean = counts.mean(0).clamp(min=0.01)
            spread = (counts - law.mean).square().mean(0).clamp(min=0.01)
            ax.plot(mean, spread, style, ms=5, mfc="none", label=label)
        line = torch.tensor([float(x.mean(0).min()), float(x.mean(0).max())])
        ax.plot(line, line, "k--", lw=1, label="variance = mean")
        ax.set(xscale="log", yscale="log", xlabel="mean count of a gene")
        ax.legend()
    every[0].set_ylabel("mean squared distance from E[x | z]")
    reporting.save(every[0], path)


def draw_nats(evidence: dict[str, diagnostics.Evidence], truth: Tensor, path: Path) -> None:
    """Of each cell what a model loses to the process that made it, by the cell's own log p."""
    from matplotlib import pyplot as plt

    _, ax = plt.subplots(figsize=(5.5, 4))
    for name, found in evidence.items():
        lost = truth - found.log_evidence.double()
        label = f"{name}: {float(lost.mean()):.1f} nats"
        ax.hist(
            lost.clamp(-10, 150).numpy(), bins=np.linspace(-10, 150, 65), alpha=0.6, label=label
        )
    xlabel = "log p(x) of the process - log p(x) of the model, nats (150 and more in the last bar)"
    ax.set_xlabel(xlabel, fontsize="small")
    ax.set_ylabel("held-out cells")
    ax.legend(title="mean loss")
    reporting.save(ax, path)


def draw_khat(evidence: dict[str, diagnostics.Evidence], path: Path) -> None:
    from matplotlib import pyplot as plt

    _, every = plt.subplots(1, len(evidence), figsize=(9, 3.4), sharey=True)
    for ax, (name, found) in zip(every, evidence.items(), strict=True):
        plots.khat_histogram(found.khat, ax=ax)
        ax.set_title(name)
    reporting.save(every[0], path)


@torch.no_grad()
def draw_latent(guide: guides.Normal, test: Any, path: Path) -> None:
    """Means of q(z | x) by batch: what the condition explains, z need not."""
    ax = plots.latent_scatter(
        guide.posterior(*test).mean[:, :2], labels=test[1], class_names=["batch 0", "batch 1"]
    )
    ax.get_legend().set_title("")
    ax.set_title("means of q(z | x)")
    reporting.save(ax, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, out="out/counts")
    add: Any = functools.partial(parser.add_argument, help="(default: %(default)s)")
    add("--rows", type=int, nargs=3, default=[2000, 300, 300], metavar="N")
    add("--genes", type=int, default=40)
    add("--dispersion", type=float, default=1.5, metavar="THETA")
    add("--latent-dim", type=int, default=2)
    add("--width", type=int, default=64)
    add("--epochs", type=int, default=150)
    add("--lr", type=float, default=3e-3)
    add("--num-samples", type=int, default=1000, metavar="K")
    args = parser.parse_args(argv)
    if args.quick:
        args.rows, args.epochs, args.num_samples, args.width = [200, 50, 30], 2, 50, 16
    return args


if __name__ == "__main__":
    reporting.run(main)
