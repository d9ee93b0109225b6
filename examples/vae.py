"""A VAE, p(x): train it, ask how good it is, and look at what it learned.

    python examples/vae.py                                  # handwritten digits, 8 latents
    python examples/vae.py --latent-dim 2                   # adds the picture of the 2-D manifold
    python examples/vae.py --data mnist --elbo iw --num-particles 50
    python examples/vae.py --data my.npz                    # an array x of your own

Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2014.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Sequence
from pathlib import Path

import pyro
import reporting
import torch
from torch import Tensor

import ppvae
from ppvae import data, diagnostics, guides, models, nets, plots
from ppvae.train.fit import resolve_device

FILES = [
    "results.json",
    "posterior.nc",
    "training.png",
    "khat.png",
    "latent_scatter.png",
    "images.png",
    "interpolation.png",
    "manifold.png",
]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = resolve_device(args.device)
    out = reporting.open_folder(args.out, args.overwrite, FILES)

    # The data: batches are (x,).
    dataset = reporting.load(args)
    print(dataset)
    (x,) = (part[: args.num_test].to(device) for part in dataset.test.args)
    reporting.complete(args, rows=len(dataset.train), latent_dim=8, hidden=[256])

    # The pair: model p(z) p(x | z), guide q(z | x).
    pyro.set_rng_seed(args.seed)
    x_dim, z_dim, hidden = x.shape[1], args.latent_dim, args.hidden
    likelihood = reporting.likelihood(dataset, x_dim)  # a conditional that fits the data's support
    model = models.VAE(likelihood(nets.mlp(z_dim, *hidden, x_dim)), latent_dim=z_dim)
    guide = guides.Normal(nets.mlp(x_dim, *hidden, 2 * z_dim))

    # Training: any estimator, one optimiser, one loop.
    print(f"\nTraining: at most {args.epochs} epochs, on {device}", flush=True)
    started = time.perf_counter()
    adam = functools.partial(torch.optim.Adam, lr=args.lr)
    estimator = reporting.estimator(args.elbo, args.num_particles)
    svi = ppvae.SVI(model, guide, adam, estimator)
    history = ppvae.fit(
        svi,
        dataset,
        epochs=args.epochs,
        batch_size=args.batch_size,
        patience=args.patience,
        device=device,
        seed=args.seed,
    )
    train_seconds = time.perf_counter() - started

    # Evaluation: importance sampling from the guide, log p(x) of each test row.
    evidence = diagnostics.log_evidence(
        model, guide, x, num_particles=args.num_samples, seed=args.seed
    )
    results = reporting.summary(args, dataset, history, evidence, train_seconds, device)
    results["num_parameters"] = reporting.count_parameters(model, guide)
    if dataset.log_evidence is not None:  # synthetic data whose truth is known
        results["exact_log_evidence_nats"] = dataset.log_evidence(x.cpu()).mean().item()
    reporting.print_summary("p(x)", results)

    # Files: the numbers, draws for ArviZ, pictures.
    reporting.clear(out, FILES)
    reporting.write_results(out / "results.json", args, results)
    idata = diagnostics.to_arviz(model, guide, x[:5], num_draws=200, seed=args.seed)
    idata.to_netcdf(str(out / "posterior.nc"))
    reporting.save(history.plot(), out / "training.png")
    reporting.save_khat(evidence, out / "khat.png")
    draw_latents(guide, x, dataset.test.y, out)
    if reporting.is_image(dataset):
        draw_images(dataset, model, guide, x, out)
    else:
        print(f"\nNo pictures of x: rows of shape {dataset.shape} are not images.")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ pictures


@torch.no_grad()
def draw_latents(guide: guides.Normal, x: Tensor, labels: Tensor | None, out: Path) -> None:
    """Posterior means of the test rows in the two dimensions where they vary most."""
    means = guide.posterior(x).mean
    if means.shape[1] == 1:
        print("\nNo latent_scatter.png: it needs two latent dimensions.")
        return
    i, j = sorted(means.var(0).topk(2).indices.tolist())
    labels = labels[: len(x)] if labels is not None and labels.dim() == 1 else None
    ax = plots.latent_scatter(means[:, [i, j]], labels)
    ax.set(xlabel=f"z[{i}]", ylabel=f"z[{j}]")
    ax.set_title("posterior means" + f", most active 2 of {means.shape[1]}" * (means.shape[1] > 2))
    reporting.save(ax, out / "latent_scatter.png")


@torch.no_grad()
def draw_images(
    dataset: data.Dataset, model: models.VAE, guide: guides.Normal, x: Tensor, out: Path
) -> None:
    """Originals, reconstructions and samples; interpolations; the manifold. All are means of x."""

    def image(x: Tensor) -> Tensor:
        return reporting.to_pixels(dataset, x)

    def decode(z: Tensor) -> Tensor:
        return image(model.likelihood(z).mean)

    z = guide.posterior(x[:10]).mean
    samples = decode(model.prior().expand((len(z),)).sample())
    ax = plots.reconstructions(image(x[:10]), decode(z), dataset.shape, samples)
    reporting.save(ax, out / "images.png")

    start, end = z[: len(z) // 2, None], z[-(len(z) // 2) :, None]  # (rows, 1, z_dim)
    if len(start):
        share = torch.linspace(0, 1, 9, device=z.device)[:, None]
        ax = plots.interpolation(decode(start + share * (end - start)), dataset.shape)
        reporting.save(ax, out / "interpolation.png")

    if z.shape[1] == 2:
        grid = torch.distributions.Normal(0.0, 1.0).icdf(torch.linspace(0.02, 0.98, 15))
        images = decode(torch.cartesian_prod(grid, grid).to(z))
        reporting.save(plots.manifold(images, dataset.shape, grid), out / "manifold.png")
    else:
        print("\nNo manifold.png: it needs --latent-dim 2.")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    return reporting.parser(__doc__, out="out/vae").parse_args(argv)


if __name__ == "__main__":
    reporting.run(main)
