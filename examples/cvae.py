"""A conditional VAE, p(x | y): images of a given class, or the missing quadrants of an image.

    python examples/cvae.py                                        # digits given their label
    python examples/cvae.py --data typeset --latent-dim 5          # the same, larger: make demo
    python examples/cvae.py --task quadrant --missing 3            # fill in three quadrants
    python examples/cvae.py --data mnist --task quadrant --elbo iw
    python examples/cvae.py --data my.npz                          # arrays x and y of your own

Source: Sohn, Lee & Yan, Learning Structured Output Representation using Deep Conditional
Generative Models, 2015; the quadrants are those of Pyro's CVAE tutorial.
"""

from __future__ import annotations

import argparse
import functools
import math
import time
from collections.abc import Sequence
from pathlib import Path

import pyro
import reporting
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, diagnostics, guides, models, nets, plots
from ppvae.program import data_plate
from ppvae.train.fit import resolve_device

FILES = [
    "results.json",
    "posterior.nc",
    "training.png",
    "images.png",
    "class_grid.png",
    "completion.png",
    "khat.png",
    "trust.png",
    "report.html",
]


# ------------------------------------------------------------------------------ our own program


class Baseline(ppvae.Program):
    """p(x | y) without a latent: a network that guesses each missing pixel by itself."""

    def __init__(self, likelihood: nn.Module) -> None:
        super().__init__()
        self.likelihood = likelihood

    def forward(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        with data_plate(x, y):
            value: Tensor = pyro.sample("x", self.likelihood(y), obs=x)
        return value


def no_latents(x: Tensor, y: Tensor) -> None:
    """The baseline's guide: nothing to infer, so its ELBO is log p(x | y) itself."""


class VisibleAndGuess(nn.Module):
    """Features of the visible pixels: themselves, and a trained baseline's guess of the others."""

    def __init__(self, baseline: Baseline) -> None:
        super().__init__()
        self.baseline = baseline.requires_grad_(False)  # frozen

    def forward(self, y: Tensor) -> Tensor:
        return torch.cat([y, self.baseline.likelihood(y).mean], dim=-1)


# ------------------------------------------------------------------------------ the example


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = resolve_device(args.device)
    out = reporting.open_folder(args.out, args.overwrite, FILES)

    # The data: batches are (x, y), and the model is p(x | y).
    dataset = reporting.load(args)
    if args.task == "quadrant":
        dataset = data.quadrants(dataset, args.missing)  # x: missing pixels, y: visible pixels
    elif dataset.train.y is None:
        raise ValueError(
            f"{dataset.name!r} has no labels: an .npz needs an array y, a .csv --label COLUMN, "
            "images one folder for each class; or fill in images with --task quadrant"
        )
    else:
        dataset = dataset.supervised()  # y: labels, or vectors of conditions
    print(dataset)
    x, y = (part[: args.num_test].to(device) for part in dataset.test.args)

    quadrant = args.task == "quadrant"
    reporting.complete(
        args,
        rows=len(dataset.train),
        latent_dim=50 if quadrant else 8,
        hidden=[500, 500] if quadrant else [256],
    )
    pyro.set_rng_seed(args.seed)
    x_dim, z_dim, hidden = x.shape[1], args.latent_dim, args.hidden
    likelihood = reporting.likelihood(dataset, x_dim)  # a conditional that fits the data's support
    adam = functools.partial(torch.optim.Adam, lr=args.lr)
    fit = functools.partial(
        ppvae.fit,
        data=dataset,
        epochs=args.epochs,
        batch_size=args.batch_size,
        patience=args.patience,
        device=device,
        seed=args.seed,
    )
    print(f"\nTraining: at most {args.epochs} epochs, on {device}", flush=True)
    started = time.perf_counter()

    # The pair: model p(z | y) p(x | z, y), guide q(z | x, y).
    if quadrant:
        y_dim = y.shape[1]
        baseline = Baseline(likelihood(nets.mlp(y_dim, *hidden, x_dim)))
        baseline_history = fit(ppvae.SVI(baseline, no_latents, adam))
        condition = VisibleAndGuess(baseline)
        features = y_dim + x_dim
        model = models.CVAE(
            likelihood(nets.mlp(z_dim + features, *hidden, x_dim)),
            prior=conditionals.Normal(nets.mlp(features, *hidden, 2 * z_dim)),  # learned p(z | y)
            condition=condition,
        )
        guide = guides.Normal(nets.mlp(x_dim + y_dim, *hidden, 2 * z_dim))  # sees the true pixels
    else:
        condition, features = label_features(dataset)
        model = models.CVAE(
            likelihood(nets.mlp(z_dim + features, *hidden, x_dim)),
            latent_dim=z_dim,  # p(z): a standard normal, whatever y is
            condition=condition,
        )
        guide = guides.Normal(nets.mlp(x_dim + features, *hidden, 2 * z_dim), condition=condition)

    # Training: any estimator, one optimiser, one loop.
    estimator = reporting.estimator(args.elbo, args.num_particles)
    svi = ppvae.SVI(model, guide, adam, estimator)
    history = fit(svi)
    train_seconds = time.perf_counter() - started

    # Evaluation: importance sampling from the guide, log p(x | y) of each test row, and what else
    # its draws tell of the posterior; k-hat takes more than 20.
    evaluate = ppvae.diagnose if args.num_samples > 20 else diagnostics.log_evidence
    evidence = evaluate(model, guide, x, y, num_particles=args.num_samples, seed=args.seed)
    results = reporting.summary(args, dataset, history, evidence, train_seconds, device)
    results["task"] = args.task
    results["num_parameters"] = reporting.count_parameters(model, guide)
    reporting.print_summary("p(x | y)", results)

    if quadrant:
        # The three estimates of the literature, beside the network without a latent.
        by_prior = diagnostics.log_evidence(
            model, guides.Prior(model), x, y, num_particles=args.num_samples, seed=args.seed
        )
        with torch.no_grad():
            guess = baseline.likelihood(y).log_prob(x).double().cpu()
        results |= three_estimates(guess, evidence, by_prior)
        results["baseline_epochs"] = len(baseline_history.rows)

    # Files: the numbers, draws for ArviZ, pictures.
    reporting.clear(out, FILES)
    reporting.write_results(out / "results.json", args, results)
    idata = diagnostics.to_arviz(model, guide, x[:5], y[:5], num_draws=200, seed=args.seed)
    idata.to_netcdf(str(out / "posterior.nc"))
    reporting.save(history.plot(), out / "training.png")
    reporting.save_khat(evidence, out / "khat.png")
    if reporting.is_image(dataset):
        draw_images(dataset, model, guide, x[:10], y[:10], out)
        if evidence.khat.isfinite().any():
            images = whole_images(dataset, x[:200], y[:200])
            ax = plots.khat_images(images, evidence.khat[:200], dataset.shape)
            reporting.save(ax, out / "trust.png")
    else:
        print(f"\nNo pictures of x: rows of shape {dataset.shape} are not images.")
    if isinstance(evidence, diagnostics.Report):
        shape = None if quadrant or not reporting.is_image(dataset) else dataset.shape
        evidence.to_html(out / "report.html", image_shape=shape)
    reporting.print_files(out, FILES)
    if (out / "report.html").exists():
        print(f"Open {out / 'report.html'} to see which posteriors are to be trusted.")


def label_features(dataset: data.Dataset) -> tuple[nn.Module | None, int]:
    """How model and guide see y: one-hot for labels, as it is for vectors of conditions."""
    if dataset.num_classes is not None:
        return nets.OneHot(dataset.num_classes), dataset.num_classes
    assert dataset.train.y is not None
    return None, dataset.train.y.shape[1]


# ------------------------------------------------------------------------------ pictures


def generate(model: models.CVAE, y: Tensor, num: int) -> Tensor:
    """Draw z ~ p(z | y) and return the mean of p(x | z, y): ``(num, N, D)``, no pixel noise."""
    features = model.condition(y)
    z = model.prior(features).expand((len(y),)).sample((num,))
    return model.likelihood(z, features).mean


def reconstruct(model: models.CVAE, guide: guides.Normal, x: Tensor, y: Tensor) -> Tensor:
    """The mean of p(x | z, y) at the mean of q(z | x, y)."""
    return model.likelihood(guide.posterior(x, y).mean, model.condition(y)).mean


def whole_images(dataset: data.Dataset, x: Tensor, y: Tensor) -> Tensor:
    """x, or x and its visible part y, as flat grey levels."""
    if dataset.train.missing is not None:
        x = dataset.join(x, y).flatten(-len(dataset.shape))
    return reporting.to_pixels(dataset, x)


@torch.no_grad()
def draw_images(
    dataset: data.Dataset,
    model: models.CVAE,
    guide: guides.Normal,
    x: Tensor,
    y: Tensor,
    out: Path,
) -> None:
    """Originals, reconstructions and samples; then what the task is about."""
    quadrant = dataset.train.missing is not None
    image = functools.partial(whole_images, dataset, y=y)

    samples = generate(model, y, num=4)
    reconstruction = image(reconstruct(model, guide, x, y))
    ax = plots.reconstructions(image(x), reconstruction, dataset.shape, samples=image(samples[0]))
    reporting.save(ax, out / "images.png")

    if quadrant:
        guess = model.condition.baseline.likelihood(y).mean
        rows = torch.stack([torch.full_like(x, math.nan), guess, *samples, x])
        labels = ["visible", "baseline", *(f"CVAE {k + 1}" for k in range(4)), "original"]
        ax = plots.image_grid(image(rows), dataset.shape, row_labels=labels)
        reporting.save(ax, out / "completion.png")
    elif dataset.num_classes is not None:
        classes = torch.arange(min(dataset.num_classes, 20), device=x.device)
        grid = generate(model, classes, num=10).transpose(0, 1)  # (class, sample, pixel)
        ax = plots.class_grid(reporting.to_pixels(dataset, grid), dataset.shape)
        reporting.save(ax, out / "class_grid.png")


# ------------------------------------------------------------------------------ tables


def three_estimates(
    guess: Tensor, evidence: diagnostics.Evidence, by_prior: diagnostics.Evidence
) -> dict[str, float]:
    """Negative conditional log-likelihood, baseline and CVAE, estimated in three ways."""
    K = evidence.num_particles
    estimates = {
        "negative ELBO (recognition guide, the Pyro tutorial's definition)": evidence.elbo,
        f"prior Monte Carlo, z ~ p(z | y), {K} samples": by_prior.log_evidence,
        f"importance sampling from the guide, {K} samples": evidence.log_evidence,
    }
    rows = [("baseline network", reporting.number(-guess.mean().item(), standard_error(guess)))]
    for name, log_p in estimates.items():
        value, gap = -log_p.mean().item(), log_p - guess
        rows.append((
            f"CVAE, {name}",
            f"{reporting.number(value, standard_error(log_p))}   gap {gap.mean().item():.2f} "
            f"± {standard_error(gap):.2f}",
        ))  # fmt: skip
    reporting.print_table(
        "negative conditional log-likelihood [nats per image, smaller is better]", rows
    )
    elbo, prior, importance = (-log_p.mean().item() for log_p in estimates.values())
    return {
        "baseline_cll_nats": -guess.mean().item(),
        "cll_negative_elbo_nats": elbo,
        "cll_prior_monte_carlo_nats": prior,
        "cll_importance_sampling_nats": importance,
        "gap_se": standard_error(evidence.log_evidence - guess),
    }


def standard_error(values: Tensor) -> float:
    """Standard error of the mean over datapoints; NaN for a single one."""
    return values.std().item() / math.sqrt(len(values)) if len(values) > 1 else math.nan


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = reporting.parser(
        __doc__,
        out="out/cvae",
        latent_dim="8; 50 for quadrants",
        hidden="256; 500 500 for quadrants",
    )
    parser.add_argument(
        "--task",
        choices=["label", "quadrant"],
        default="label",
        help="y: the labels, or the visible quadrants of the image (default: %(default)s)",
    )
    parser.add_argument(
        "--missing",
        type=int,
        choices=[1, 2, 3],
        default=3,
        help="quadrants to fill in (default: %(default)s)",
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    reporting.run(main)
