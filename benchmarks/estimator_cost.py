"""Variance of a gradient against what it costs, for every estimator, on three pairs: one chart.

Left, a linear-Gaussian pair of eight latents whose guide is a fifth too wide and off by 0.1;
middle, a belief net of 20 bits on binarised digits, after 300 steps of DisARM; right, a hierarchy
of two levels on the same, after 300 steps of the ELBO, of which only p(z1 | z2) is looked at.
The cost is decoder rows per datapoint, counted by a hook, of one loss and its gradient; the table
has the CPU milliseconds (`time.process_time`, one thread, median of 15) too. The variance is
relative, tr Var g / |E g|^2, so that bounds of different slopes compare; it says nothing of bias.

    python benchmarks/estimator_cost.py                 # table and docs/figures/estimator_cost.png
    python benchmarks/estimator_cost.py --quick --out out/quick.png
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, elbo, guides, models, nets
from ppvae.diagnostics.rows import trainable
from ppvae.program import data_plate

ROWS, BITS = 64, 20


class Counted(nn.Module):
    """A decoder that counts the rows it is given."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.rows = net, 0

    def forward(self, z: Tensor) -> Tensor:
        self.rows += z[..., 0].numel()
        return self.net(z)


class Belief(ppvae.Program):
    """Bits under a decoder."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.likelihood = conditionals.Bernoulli(decoder)

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            h = pyro.sample("h", dist.Bernoulli(torch.full((BITS,), 0.5)).to_event(1))
            pyro.sample("x", self.likelihood(h), obs=x)


class BeliefGuide(ppvae.Program):
    """Independent bits by an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.posterior = conditionals.Bernoulli(nets.mlp(64, 50, BITS))

    def forward(self, x: Tensor) -> None:
        with data_plate(x):
            pyro.sample("h", self.posterior(x))


def digits() -> Tensor:
    return (data.load("digits").train.x.flatten(1) > 0.5).float()


def trained(model, guide, x: Tensor, loss, steps: int) -> None:
    svi = ppvae.SVI(model, guide, lambda p: torch.optim.Adam(p, lr=3e-3), loss)
    for _ in range(steps):
        svi.step(x[torch.randperm(len(x))[:100]])


def linear(steps: int):
    truth = data.linear_gaussian_parameters(dim=12, latent_dim=8)
    x = data.load("linear_gaussian", num=ROWS, dim=12, latent_dim=8).train.x[:ROWS]
    decoder = nn.Linear(8, 12)
    decoder.weight.data, decoder.bias.data = truth.W.float(), truth.b.float()
    posterior = truth.posterior(x)
    encoder = nn.Linear(12, 16)
    slope = torch.linalg.lstsq(
        torch.cat([x, torch.ones(len(x), 1)], 1).double(), posterior.loc
    ).solution.float()
    scale = posterior.covariance_matrix[0].diagonal().sqrt().float()
    encoder.weight.data = torch.cat([slope[:-1].T, torch.zeros(8, 12)])
    encoder.bias.data = torch.cat([slope[-1] + 0.1, (1.2 * scale).log()])
    counted = Counted(decoder)
    model = models.VAE(conditionals.Normal(counted, scale=truth.sigma), latent_dim=8)
    listed = [elbo.ELBO(K) for K in (1, 8, 32)]
    listed += [elbo.ELBO(K, "stl") for K in (1, 8, 32)]
    listed += [elbo.ELBO(K, "vargrad") for K in (8, 32)]
    for K in (8, 32):
        listed += [elbo.IWELBO(K), elbo.IWELBO(K, "dreg"), elbo.ThermodynamicELBO(K)]
        listed += [elbo.ReweightedWakeSleep(K), elbo.SoftCVI(K)]
        listed += [elbo.AnnealedELBO(1, num_temperatures=K - 2, step=0.5)]
    return model, guides.Normal(encoder), x, counted, listed, "guide"


def belief(steps: int):
    counted, x = Counted(nets.mlp(BITS, 50, 64)), digits()
    model, guide = Belief(counted), BeliefGuide()
    trained(model, guide, x, elbo.ELBO(4, "disarm"), steps)
    listed = [elbo.ELBO(1, "score")]
    for K in (2, 8, 32):
        listed += [elbo.ELBO(K, gradient) for gradient in ("score", "vargrad", "disarm")]
        listed += [elbo.ELBO(K, "straight_through"), elbo.ELBO(K, "gumbel"), elbo.RELAX(K)]
    for K in (8, 32):
        listed += [elbo.IWELBO(K, "vimco"), elbo.ReweightedWakeSleep(K), elbo.SoftCVI(K)]
        listed += [elbo.ThermodynamicELBO(K)]
    return model, guide, x[:ROWS], counted, listed, "guide"


def hierarchy(steps: int):
    counted, x = Counted(nets.mlp(6, 50, 64)), digits()
    levels = [conditionals.Normal(nets.mlp(4, 30, 12))]
    model = models.Hierarchical(conditionals.Bernoulli(counted), levels, latent_dim=4)
    up = [conditionals.Normal(nets.mlp(64, 50, 12)), conditionals.Normal(nets.mlp(6, 30, 8))]
    guide = guides.BottomUp(model, up)
    trained(model, guide, x, elbo.ELBO(), steps)
    for parameter in counted.parameters():
        parameter.requires_grad_(False)
    listed = [elbo.ELBO(K) for K in (1, 8, 32)]
    for K in (2, 8, 32):
        listed += [elbo.IWELBO(K), elbo.IWELBO(K, "dreg"), elbo.IWELBO(K, "gdreg")]
    return model, guide, x[:ROWS], counted, listed, "model"


PAIRS = {
    "linear-Gaussian, the guide's gradient": linear,
    "20 bits, the guide's gradient": belief,
    "two levels, the prior's gradient": hierarchy,
}


def measured(make, repeats: int, steps: int):
    """The table of ``ppvae.compare``, with decoder rows and CPU time."""
    torch.manual_seed(0)
    model, guide, x, counted, listed, part = make(steps)
    table = ppvae.compare(
        model, guide, x, listed, repeats=repeats, timing_rounds=0, evidence_particles=1000
    )
    rows, times = [], []
    for estimator in listed:
        objective = estimator(model, guide)
        parameters, seconds = trainable(objective), []
        for turn in range(16):
            counted.rows = 0
            started = time.process_time()
            torch.autograd.grad(objective(x), parameters, allow_unused=True)
            if turn:
                seconds.append(time.process_time() - started)
        rows.append(counted.rows / len(x))
        times.append(1e3 * statistics.median(seconds))
    table["decoder_rows"], table["cpu_ms"] = rows, times
    table["relative_variance"] = table[f"snr_{part}"] ** -2.0
    table["seen"] = table[f"snr_{part}"] > table[f"snr_floor_{part}"]
    return table[["family", "decoder_rows", "cpu_ms", "bound", "relative_variance", "seen"]]


def draw(tables, path: Path) -> None:
    from matplotlib import pyplot as plt

    families = list(dict.fromkeys(f for table in tables.values() for f in table["family"]))
    colours, markers = plt.get_cmap("tab20").colors, "osD^vP*X"
    looks = {
        f: {"color": colours[i % 20], "marker": markers[i % 8]} for i, f in enumerate(families)
    }
    figure, axes = plt.subplots(1, len(tables), figsize=(13, 5.6), layout="constrained")
    for ax, (name, table) in zip(axes, tables.items(), strict=True):
        for family, rows in table[table["seen"]].groupby("family", sort=False):
            line = "--" if "biased" in family else "-"
            ax.plot(
                rows["decoder_rows"], rows["relative_variance"], line, ms=6, **looks[family]
            )  # fmt: skip
        seen = table[table["seen"]]["relative_variance"].map(math.log10)
        ends = 10.0 ** math.floor(seen.min()), 10.0 ** math.ceil(seen.max())
        ax.set(xscale="log", yscale="log", ylim=ends, title=name)
        ax.set(xlabel="decoder rows per datapoint")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("variance of the gradient / its squared mean")
    handles = [
        plt.Line2D([], [], linestyle="--" if "biased" in f else "-", label=f, **looks[f])
        for f in families
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=9, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("docs/figures/estimator_cost.png"))
    parser.add_argument("--quick", action="store_true", help="try everything, measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    repeats, steps = (5, 5) if options.quick else (options.repeats, 300)
    tables = {}
    for name, make in PAIRS.items():
        tables[name] = measured(make, repeats, steps)
        print(f"\n{name}\n{tables[name].to_string(float_format=lambda v: f'{v:.4g}')}", flush=True)
    draw(tables, options.out)
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
