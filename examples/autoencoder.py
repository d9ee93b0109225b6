"""Autoencoder, VAE and beta-VAE as one pair with other parts; rate and distortion of sigma, beta.

    python examples/autoencoder.py
    python examples/autoencoder.py --latent-dim 8

All are trained on handwritten digits with the same two networks. The autoencoder has a point-mass
guide and a flat prior; the others a normal guide, a normal prior and a weight on the KL. Sources:
Kingma & Welling 2014; Higgins et al. 2017 (beta-VAE); Alemi et al. 2018 (rate and distortion).
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from torch import Tensor

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, plots
from ppvae.plots.common import BLUE, ORANGE

FILES = ["systems.csv", "codes.png", "images.png", "rate_distortion.csv", "rate_distortion.png"]
SIGMAS, BETAS, SIGMA = (0.1, 0.2, 0.4, 0.8), (0.25, 1.0, 4.0, 16.0), 0.2
REPEATS = 10  # of an estimate, to see its spread


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    torch.set_num_threads(1)  # the networks are small
    digits = data.load("digits")  # binary pixels, drawn anew for each epoch
    x, labels = digits.test.x[:300], digits.test.y[:300]

    # Three systems, the same networks: what is passed in differs.
    Z, trained, rows = args.latent_dim, {}, []
    for name, beta in {"autoencoder": None, "VAE": 1.0, "beta-VAE, 2": 2.0}.items():
        pyro.set_rng_seed(args.seed)
        likelihood = conditionals.Bernoulli(nets.mlp(Z, 64, 64))
        model: models.VAE
        guide: guides.Amortized
        if beta is None:
            model, guide = models.Autoencoder(likelihood, Z), guides.PointMass(nets.mlp(64, 64, Z))
        else:
            model = models.VAE(likelihood, latent_dim=Z)
            guide = guides.Normal(nets.mlp(64, 64, 2 * Z))
        seconds = train(model, guide, digits.train, 1.0 if beta is None else beta, args.epochs)
        trained[name] = (model, guide)
        rows.append({"system": name, **measure(model, guide, x, args), "train [s]": seconds})
    table = pd.DataFrame(rows).set_index("system")
    print(f"\n{len(x)} test digits, {Z} latents [nats per datapoint]; the autoencoder has no rate "
          "and no log p(x)\n")  # fmt: skip
    print(table.to_string(float_format="%.2f", na_rep="-"))
    table.to_csv(out / "systems.csv")
    print(proposals(*trained["VAE"], x, args))
    draw_codes(trained, x, labels, out)
    draw_images(trained, x, digits.shape, out)

    # Rate and distortion with a normal likelihood on grey levels: sigma moves it as beta does.
    grey = data.load("digits", binarize=None)
    y = grey.test.x[:300]
    plane = []
    for knob, values in {"sigma, beta = 1": SIGMAS, f"beta, sigma = {SIGMA}": BETAS}.items():
        for value in values:
            sigma, beta = (value, 1.0) if knob.startswith("sigma") else (SIGMA, value)
            pyro.set_rng_seed(args.seed)
            model = models.VAE(conditionals.Normal(nets.mlp(Z, 64, 64), scale=sigma), Z)
            guide = guides.Normal(nets.mlp(64, 64, 2 * Z))
            train(model, guide, grey.train, beta, args.sweep_epochs)
            rate, error = rate_and_error(model, guide, y)
            _, in_training = rate_and_error(model, guide, grey.train.x[:300])
            plane.append({"changed": knob, "sigma": sigma, "beta": beta,
                          "sigma^2 beta": sigma**2 * beta, "rate [nats]": rate,
                          "squared error": error, "in training": in_training})  # fmt: skip
    sweep = pd.DataFrame(plane)
    print("\nA normal likelihood: the same sigma^2 beta, the same place in the plane\n")
    print(sweep.to_string(index=False, float_format="%.4f"))
    sweep.to_csv(out / "rate_distortion.csv", index=False)
    draw_plane(sweep, out)
    reporting.print_files(out, FILES)


def train(
    model: models.VAE, guide: guides.Amortized, split: data.Split, beta: float, epochs: int
) -> float:
    """Seconds it took. A weight of beta on the KL is all that a beta-VAE is."""
    started = time.perf_counter()
    adam = functools.partial(torch.optim.Adam, lr=2e-3)
    svi = ppvae.SVI(model, guide, adam, elbo.ELBO(beta=beta, kl="mixed"))
    ppvae.fit(svi, split, epochs=epochs, batch_size=64, progress=False)
    return time.perf_counter() - started


@torch.no_grad()
def measure(
    model: models.VAE, guide: guides.Amortized, x: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """What the autoencoder lacks is left out."""
    if isinstance(guide, guides.PointMass):
        weights = ppvae.log_weights(model, guide, x)
        return {"-log p(x | z)": -weights.log_p["x"].mean().item()}
    report = ppvae.diagnose(model, guide, x, num_particles=args.particles, seed=args.seed)
    rate, distortion = report.rate_distortion
    return {
        "-log p(x | z)": distortion,
        "KL": rate,
        "ELBO": report.elbo.mean().item(),
        "log p(x)": report.mean,
        "active units": report.active_units,
    }


def proposals(
    model: models.VAE, guide: guides.Amortized, x: Tensor, args: argparse.Namespace
) -> str:
    """Log p(x) of the VAE by naive draws from the prior and by draws from the encoder.

    The standard deviation of an estimate is that of ``REPEATS`` with other draws, root mean square
    over the digits; one estimate's own standard error sees nothing of a mode that was not drawn.
    """
    K, lines = args.particles, []
    for name, proposal in {"the prior": guides.Prior(model), "the encoder": guide}.items():
        evidence = functools.partial(diagnostics.log_evidence, model, proposal, x, num_particles=K)
        repeats = [evidence(seed=args.seed + i) for i in range(REPEATS)]
        found = repeats[0]
        spread = torch.stack([e.log_evidence for e in repeats]).var(0).mean().sqrt()
        lines.append(f"  {name:12s}{found.mean:9.2f}   sd for one digit: {spread:.3f}, "
                     f"ESS, median: {found.ess.median():.1f} of {K}, "
                     f"k-hat above 0.7: {(found.khat > 0.7).double().mean():.0%}")  # fmt: skip
    return f"\nlog p(x) of the VAE from {K} draws of [nats per digit]\n" + "\n".join(lines)


def rate_and_error(model: models.VAE, guide: guides.Amortized, x: Tensor) -> tuple[float, float]:
    """KL(q || p) in nats, and the mean squared error of a pixel at draws of z."""
    with torch.no_grad():
        q = guide.posterior(x)
        rate = torch.distributions.kl_divergence(q, model.prior().expand(q.batch_shape))
        draws = model.likelihood(q.rsample((20,))).mean
        return rate.mean().item(), (draws - x).square().mean().item()


# ------------------------------------------------------------------------------ pictures


@torch.no_grad()
def draw_codes(trained: dict, x: Tensor, labels: Tensor, out: Path) -> None:
    """The most active two dimensions of the codes, and circles of the prior at 1 and 2 sd."""
    figure, axes = plt.subplots(1, len(trained), figsize=(4.2 * len(trained), 4), squeeze=False)
    for ax, (name, (_, guide)) in zip(axes[0], trained.items(), strict=True):
        codes = guide.posterior(x).mean
        i, j = sorted(codes.var(0).topk(2).indices.tolist())
        plots.latent_scatter(codes[:, [i, j]], labels, ax)
        if ax is not axes[0][-1]:
            ax.get_legend().remove()
        if name != "autoencoder":
            reach = max(2.1, *(abs(limit) for limit in (*ax.get_xlim(), *ax.get_ylim())))
            ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
            for radius in (1, 2):
                ax.add_patch(plt.Circle((0, 0), radius, fill=False, color="black", lw=0.8))
        ax.set(xlabel=f"z[{i}]", ylabel=f"z[{j}]", title=name)
    figure.savefig(out / "codes.png", bbox_inches="tight")
    plt.close(figure)


@torch.no_grad()
def draw_images(trained: dict, x: Tensor, shape: tuple[int, ...], out: Path) -> None:
    """Originals, then each system's reconstructions; then draws: of the prior, or between codes."""
    rows, names = [x[:10]], ["data"]
    for name, (model, guide) in trained.items():
        codes = guide.posterior(x).mean
        rows.append(model.likelihood(codes[:10]).mean)
        names.append(name)
    for name, (model, guide) in trained.items():
        codes = guide.posterior(x).mean
        if isinstance(model, models.Autoencoder):  # no prior: the normal of the codes' moments
            scale = torch.linalg.cholesky(codes.T.cov())
            z = codes.mean(0) + torch.randn(10, codes.shape[1]) @ scale.T
        else:
            z = model.prior().expand((10,)).sample()
        rows.append(model.likelihood(z).mean)
        names.append(f"{name}, drawn")
    ax = plots.class_grid(torch.stack(rows), shape, class_names=names)
    reporting.save(ax, out / "images.png")


def draw_plane(sweep: pd.DataFrame, out: Path) -> None:
    _, ax = plt.subplots(figsize=(6, 4.2))
    for (knob, rows), colour, marker in zip(
        sweep.groupby("changed", sort=False), (BLUE, ORANGE), "os", strict=True
    ):
        size = 9 if marker == "o" else 5
        ax.plot(rows["rate [nats]"], rows["squared error"], color=colour, marker=marker,
                ms=size, mec="black", mew=0.6, lw=1, label=f"changing {knob}")  # fmt: skip
        if marker == "o":
            for _, row in rows.iterrows():
                ax.annotate(f"$\\sigma$ = {row['sigma']:g}",
                            (row["rate [nats]"], row["squared error"]), xytext=(10, 5),
                            textcoords="offset points", fontsize="small")  # fmt: skip
    ax.set(xlabel="rate, KL(q || p) [nats]", ylabel="distortion, squared error per pixel")
    ax.margins(0.16, 0.12)  # room for the labels
    ax.legend()
    reporting.save(ax, out / "rate_distortion.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.small_parser(__doc__, "out/autoencoder")
    parser.add_argument("--latent-dim", type=int, default=4, help="size of z, >= 2 (default: 4)")
    parser.add_argument("--epochs", type=int, default=60, help="per system (default: 60)")
    parser.add_argument("--sweep-epochs", type=int, default=40, help="per point (default: 40)")
    parser.add_argument("--particles", type=int, default=500, metavar="K",
                        help="to evaluate (default: 500)")  # fmt: skip
    args = parser.parse_args(argv)
    if args.quick:
        args.epochs, args.sweep_epochs, args.particles = 1, 1, 50
    return args


if __name__ == "__main__":
    reporting.run(main)
