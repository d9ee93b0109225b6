"""stub: main comes"""

from __future__ import annotations

import argparse
import functools
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, metrics, models, nets
from ppvae.pairs import evaluation_mode

METHODS = ["VAE", "beta", "TC", "Factor"]


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
    return elbo.FactorELBO(
        kl="mixed",
        gamma=elbo.LinearWarmup(max(1, args.epochs * -(-rows // args.batch_size) // 5), end=args.gamma),
        ratio=critic(args),
    )


def critic(args: argparse.Namespace) -> nn.Module:
    return nets.mlp(args.latent_dim, *args.critic, 1)


def train(method: str, x: Any, args: argparse.Namespace, seed: int, **options: Any) -> Any:
    """A pair trained by a method, and its history."""
    pyro.set_rng_seed(seed)
    model, guide = pair(args.shape, args)
    beside = None
    if method == "Factor":
        adam = functools.partial(torch.optim.Adam, lr=args.critic_lr, betas=(0.5, 0.9))
        beside = ppvae.Beside(adam, steps=args.critic_steps)
    svi = ppvae.SVI(
        model,
        guide,
        functools.partial(torch.optim.Adam, lr=args.lr),
        estimator(method, len(x), args),
        compile=args.compile,
        beside=beside,
    )
    history = ppvae.fit(
        svi, x, epochs=args.epochs, batch_size=args.batch_size, seed=seed, progress=False, **options
    )
    return svi, history


class Track(ppvae.Callback):
    """The total correlation, by a fitted Gaussian, of some rows' codes after every tenth epoch."""

    def __init__(self, x: Tensor, every: int = 10) -> None:
        self.x, self.every = x, every

    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        row = history.rows[-1]
        if row["epoch"] % self.every == 0 or row["epoch"] <= 3:
            found = diagnostics.total_correlation(svi.guide, self.x, num_draws=1)
            row["tc_gaussian"] = found.gaussian
            if svi.turns is not None:
                row["tc_ratio"] = mean_ratio(ratio_of(svi), svi.guide, self.x)


def ratio_of(svi: ppvae.SVI) -> ppvae.Ratio:
    """The critic of a FactorELBO."""
    found: ppvae.Ratio = svi.objective.state.ratio
    return found


@torch.no_grad()
def mean_ratio(ratio: ppvae.Ratio, guide: ppvae.Program, x: Tensor) -> float:
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
def evaluate(model: models.VAE, guide: Any, x: Tensor, seed: int) -> dict[str, Any]:
    """The bound of some rows, its parts, and the total correlation of their q(z), nats."""
    found: dict[str, list[Tensor]] = {"reconstruction": [], "kl": []}
    prior = torch.distributions.Normal(0.0, 1.0)
    with evaluation_mode(model, guide), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for rows in x.split(1_000):
            q = guide.posterior(rows)
            found["reconstruction"].append(model.likelihood(q.sample()).log_prob(rows))
            found["kl"].append(torch.distributions.kl_divergence(q.base_dist, prior))
        codes = means(guide, x)
    by_unit = torch.cat(found["kl"]).mean(0)
    reconstruction = torch.cat(found["reconstruction"]).mean().item()
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


def scores(guide: Any, factors: data.Factors, args: argparse.Namespace, seed: int) -> dict[str, Any]:
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
