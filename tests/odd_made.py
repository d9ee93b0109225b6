"""What is made oddly: a valid call of each constructor, and the kind of each of its arguments."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pyro.infer.autoguide import AutoNormal
from torch import nn

from odd_values import X, pair
from ppvae import (
    Ratio,
    alternate,
    conditionals,
    data,
    diagnostics,
    elbo,
    guides,
    models,
    nets,
    posteriors,
)

HERE = tempfile.TemporaryDirectory()
WORDS = {
    "latent",
    "gradient",
    "kl",
    "kind",
    "site",
    "support",
    "contrast",
    "activation",
    "positive",
}
SEEDS = {"seed"}
NUMBERS = {
    "dropout", "weight", "decay", "restart", "scale", "spread", "mean", "std", "lr", "start", "end",
    "rising", "gamma", "nats", "alpha", "order", "speed", "memory", "max_rate", "max_distortion",
    "insomnia", "commitment", "temperature", "limit", "floor", "init", "beta", "delta", "diagonal",
    "off_diagonal", "schedule", "fill", "concentration", "theta", "df", "loc",
}  # fmt: skip
COUNTS = {
    "dim", "latent_dim", "context_dim", "num_layers", "bins", "num_components", "num_classes",
    "num_words", "length", "size", "num_particles", "num_groups", "steps", "period", "cycles",
    "num_codes", "hidden", "embedding", "channels", "layers", "out", "expansion", "blocks",
    "width_in", "width_out", "in_dim", "out_dim", "residual_blocks", "latent_channels", "cells",
    "block_cells", "block_expansion", "out_channels", "width", "iterations", "sign", "event_dim",
    "num_levels", "low", "total_count", "num_candidates", "num_pseudo_inputs", "rank", "noise_dim",
    "num_mixing", "per_class", "missing", "num_temperatures", "every", "burn_in", "num_draws",
}  # fmt: skip
SIZES = {"shape", "levels_of", "sizes", "groups_of"}


def of(function, **valid):
    """An entry; each argument's kind is that of its name, or what its value shows."""
    kinds = {}
    for name, value in valid.items():
        if name in SEEDS:
            kinds[name] = "seed"
        elif isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
            kinds[name] = "sizes"
        elif name in COUNTS:
            kinds[name] = "count"
        elif name in NUMBERS:
            kinds[name] = "number"
        elif callable(value) and name not in WORDS:
            kinds[name] = "program"
        else:
            kinds[name] = "thing"

    def made():
        torch.manual_seed(0)
        return {
            name: value() if isinstance(value, type(lambda: 0)) and name not in WORDS else value
            for name, value in valid.items()
        }

    return function, made, kinds


def net(*sizes):
    return lambda: nets.mlp(*sizes)


C, M, G, P, E = conditionals, models, guides, posteriors, elbo
Z4 = net(2, 8, 4)


def bernoulli(width=2):
    return lambda: C.Bernoulli(nets.mlp(width, 8, 4))


def normal(width_in=4, width=2):
    return lambda: C.Normal(nets.mlp(width_in, 8, 2 * width))


def codebook():
    return nets.Codebook(4, 2)


def as_tuple(value):
    """What goes by position, one or several."""
    return value if isinstance(value, (tuple, list)) else (value,)


def files():
    """A folder with a table, arrays and images."""
    folder = Path(HERE.name) / "files"
    if not folder.exists():
        folder.mkdir()
        (folder / "a.csv").write_text("a,b\n" + "1,2.5\n0,3.5\n" * 20)
        np.savez(folder / "a.npz", x=X.numpy(), y=np.arange(12) % 2)
        for i in range(12):
            Image.new("L", (6, 6), color=20 * i).save(folder / f"{i}.png")
    return folder


def path_of_maps():
    cell = nets.flat_batch(nn.Conv2d(2 + 1, 2, 1), event_dim=3)
    return nets.TopDown((2, 4, 4), [nets.Group(nets.Zeros(1), nets.Joined(cell))])


def hierarchy():
    return M.Hierarchical(
        C.Bernoulli(nets.mlp(2, 8, 4)), [C.Normal(nets.mlp(2, 8, 4))], latent_dim=2
    )


MADE = {
    "conditionals.Normal": of(C.Normal, net=net(2, 8, 8), event_dim=1, positive=torch.exp),
    "conditionals.Normal with scale": of(C.Normal, net=Z4, scale=0.5),
    "conditionals.Bernoulli": of(C.Bernoulli, net=Z4, event_dim=1, grey=False),
    "conditionals.Beta": of(C.Beta, net=Z4, concentration=3.0, event_dim=1),
    "conditionals.BetaBinomial": of(
        C.BetaBinomial, net=Z4, total_count=3, concentration=3.0, event_dim=1
    ),
    "conditionals.Categorical": of(C.Categorical, net=Z4, num_classes=2, event_dim=1),
    "conditionals.ContinuousBernoulli": of(C.ContinuousBernoulli, net=Z4, event_dim=1),
    "conditionals.DirichletMultinomial": of(
        C.DirichletMultinomial, net=Z4, concentration=3.0, total_count=5
    ),
    "conditionals.DiscretizedLogistic": of(
        C.DiscretizedLogistic, net=net(2, 8, 12), num_levels=5, num_components=1, low=0, event_dim=1
    ),
    "conditionals.Gamma": of(C.Gamma, net=Z4, concentration=3.0, event_dim=1),
    "conditionals.Laplace": of(C.Laplace, net=Z4, scale=0.5, event_dim=1),
    "conditionals.LogNormal": of(C.LogNormal, net=Z4, scale=0.5, event_dim=1),
    "conditionals.Multinomial": of(C.Multinomial, net=Z4, total_count=5),
    "conditionals.BagOfWords": of(C.BagOfWords, net=Z4, total_count=5),
    "conditionals.NegativeBinomial": of(C.NegativeBinomial, net=Z4, theta=3.0, event_dim=1),
    "conditionals.Ordinal": of(C.Ordinal, net=Z4, num_levels=3, shape=(4,), event_dim=1),
    "conditionals.Poisson": of(C.Poisson, net=Z4, event_dim=1),
    "conditionals.StudentT": of(C.StudentT, net=Z4, scale=0.5, df=4.0, event_dim=1),
    "conditionals.VonMises": of(C.VonMises, net=Z4, concentration=3.0, event_dim=1),
    "conditionals.ZeroInflated": of(
        C.ZeroInflated, head=lambda: C.Poisson(nets.mlp(2, 8, 8))
    ),
    "conditionals.Affine": of(C.Affine, head=bernoulli(), loc=0.5, scale=2.0),
    "conditionals.Reshaped": of(C.Reshaped, head=bernoulli(), shape=(2, 2)),
    "conditionals.Scale": of(C.Scale, init=0.5, shape=(4,)),
    "conditionals.StandardNormal": of(C.StandardNormal, dim=2),
    "conditionals.StandardNormal of a shape": of(C.StandardNormal, dim=(2, 3, 3)),
    "conditionals.Mixture": of(C.Mixture, num_components=2, dim=2, spread=1.0),
    "conditionals.VampPrior": of(
        C.VampPrior, posterior=normal(), num_pseudo_inputs=3, shape=(4,), mean=0.5, std=0.1,
        support="unit_interval",
    ),
    "conditionals.OptimalPrior": of(
        C.OptimalPrior, base=lambda: C.StandardNormal(2), net=net(2, 8, 1), latent="z",
        num_candidates=10,
    ),
    "conditionals.CodePrior": of(
        C.CodePrior, quantizer=codebook, shape=(2, 2), net=lambda: nets.Unigram(4)
    ),
    "conditionals.SoftNormal": of(
        C.SoftNormal, net=lambda: nn.Identity(), event_dim=3, limit=5.0, floor=0.01
    ),
    "conditionals.Simulator": of(
        C.Simulator, simulate=lambda: torch.sin, net=net(6, 8, 1), shape=(4,)
    ),
    "conditionals.Columns": of(
        C.Columns, net=Z4, columns=lambda: {"a": C.Poisson, "b": C.Bernoulli}
    ),
    "posteriors.FullNormal": of(P.FullNormal, net=net(4, 8, 5), dim=2, positive=torch.exp),
    "posteriors.LowRankNormal": of(P.LowRankNormal, net=net(4, 8, 6), rank=1, positive=torch.exp),
    "posteriors.Mixture": of(P.Mixture, net=net(4, 8, 10), num_components=2, positive=torch.exp),
    "posteriors.Flow": of(
        P.Flow, net=net(4, 8, 6), transforms=lambda: P.coupling(2, 2), dim=2, context_dim=2,
        positive=torch.exp,
    ),
    "posteriors.coupling": of(P.coupling, dim=2, context_dim=2, num_layers=2, hidden=(8,)),
    "posteriors.iaf": of(P.iaf, dim=2, context_dim=2, num_layers=2, hidden=(8,)),
    "posteriors.spline": of(P.spline, dim=2, context_dim=2, num_layers=2, hidden=(8,), bins=4),
    "posteriors.GumbelCodes": of(
        P.GumbelCodes, net=lambda: nn.Identity(), quantizer=codebook, temperature=1.0
    ),
    "posteriors.Implicit": of(
        P.Implicit, sampler=net(6, 8, 2), net=net(6, 8, 1), dim=2, noise_dim=2, contrast="adaptive"
    ),
    "posteriors.SemiImplicit": of(
        P.SemiImplicit, mixing=normal(), head=normal(6), num_mixing=3
    ),
    "models.VAE": of(M.VAE, likelihood=bernoulli(), latent_dim=2),
    "models.VAE with a prior": of(
        M.VAE, likelihood=bernoulli(), prior=lambda: C.StandardNormal(2)
    ),
    "models.CVAE": of(
        M.CVAE, likelihood=bernoulli(4), latent_dim=2, condition=lambda: nets.OneHot(2)
    ),
    "models.M2": of(M.M2, likelihood=bernoulli(4), latent_dim=2, num_classes=2),
    "models.NVDM": of(M.NVDM, num_words=5, latent_dim=2, length=4),
    "models.Autoencoder": of(M.Autoencoder, likelihood=bernoulli(), latent_dim=2),
    "models.GaussianMixture": of(M.GaussianMixture, num_components=2, dim=2, full=True),
    "models.Hierarchical": of(
        M.Hierarchical, likelihood=bernoulli(), levels=lambda: [normal(2)()], latent_dim=2
    ),
    "models.Masked": of(M.Masked, model=lambda: pair()["model"], site="x"),
    "models.MissingNotAtRandom": of(
        M.MissingNotAtRandom, likelihood=bernoulli(), missing=lambda: nets.SelfMasking(4),
        latent_dim=2,
    ),
    "models.VaDE": of(M.VaDE, likelihood=bernoulli(), prior=lambda: C.Mixture(2, 2)),
    "models.TopDown": of(
        M.TopDown,
        path=lambda: path_of_maps(),
        likelihood=lambda: C.Bernoulli(nets.flat_batch(nn.Conv2d(2, 1, 1), 3), event_dim=3),
    ),
    "models.CodeHierarchy": of(
        M.CodeHierarchy, likelihood=bernoulli(), bottom=lambda: C.StandardNormal(2),
        top=lambda: C.StandardNormal(2),
    ),
    "guides.Normal": of(G.Normal, net=net(4, 8, 4), positive=torch.exp, latent="z"),
    "guides.Normal with a condition": of(
        G.Normal, net=net(6, 8, 4), condition=lambda: nets.OneHot(2)
    ),
    "guides.Amortized": of(G.Amortized, conditional=normal(), latent="z"),
    "guides.PointMass": of(G.PointMass, net=net(4, 8, 2), latent="z"),
    "guides.PerDatapoint": of(
        G.PerDatapoint, head=lambda: normal()().without_net(), outputs=lambda: torch.zeros(3, 4),
        latent="z",
    ),
    "guides.Prior": of(G.Prior, model=lambda: pair()["model"]),
    "guides.Quantized": of(
        G.Quantized, encoder=lambda: nn.Identity(), quantizer=codebook, latent="z"
    ),
    "guides.QuantizedLevels": of(
        G.QuantizedLevels, lower=lambda: nn.Identity(), upper=lambda: nn.Identity(),
        merge=lambda: nn.Identity(), quantizers=lambda: (codebook(), codebook()),
    ),
    "guides.SemiAmortized": of(
        G.SemiAmortized, guide=lambda: pair()["guide"], model=lambda: pair()["model"], steps=2,
        lr=0.1, through=True,
    ),
    "guides.Responsibilities": of(
        G.Responsibilities, model=lambda: M.GaussianMixture(2, 2), draw=False, latent="c"
    ),
    "guides.M2": of(G.M2, classifier=net(4, 8, 2), posterior=normal(6), draw=False),
    "guides.BottomUp": of(
        G.BottomUp, model=hierarchy, levels=lambda: [normal()(), normal(2)()]
    ),
    "guides.Ladder": of(
        G.Ladder, model=hierarchy, blocks=lambda: [nets.mlp(4, 8, 4), nets.mlp(4, 8, 4)],
        heads=lambda: [normal()(), normal()()],
    ),
    "guides.WithMissing": of(
        G.WithMissing, guide=lambda: pair()["guide"],
        model=lambda: M.MissingNotAtRandom(bernoulli()(), nets.SelfMasking(4), 2),
    ),
    "guides.Auto": of(
        lambda make, model, data: G.Auto(make, model, data), make=lambda: AutoNormal,
        model=lambda: pair()["model"], data=lambda: X,
    ),
    "nets.mlp": of(
        lambda sizes, **o: nets.mlp(*as_tuple(sizes), **o), sizes=(4, 8, 2), activation=nn.ReLU,
        batch_norm=False, dropout=0.1,
    ),
    "nets.residual": of(
        nets.residual, width_in=4, hidden=8, width_out=2, blocks=1, activation=nn.ReLU,
        batch_norm=False, dropout=0.1,
    ),
    "nets.conv_encoder": of(
        nets.conv_encoder, out_dim=4, shape=(1, 8, 8), channels=(2, 4), hidden=(8,),
        context_dim=0, activation=nn.ReLU, residual_blocks=0,
    ),
    "nets.conv_decoder": of(
        nets.conv_decoder, in_dim=4, shape=(1, 8, 8), channels=(4, 2), hidden=(8,),
        activation=nn.ReLU, residual_blocks=0,
    ),
    "nets.downsample": of(nets.downsample, width_in=1, width_out=2, channels=(2, 4)),
    "nets.upsample": of(nets.upsample, width_in=2, width_out=1, channels=(4, 2)),
    "nets.encoder_cell": of(nets.encoder_cell, channels=4, out=4, down=False),
    "nets.decoder_cell": of(nets.decoder_cell, channels=4, out=4, size=(4, 4), expansion=2),
    "nets.nvae": of(
        nets.nvae, shape=(1, 8, 8), groups=(1, 1), channels=4, latent_channels=2, blocks=1,
        cells=1, expansion=2, block_cells=1, block_expansion=2, out_channels=1,
    ),
    "nets.FSQ": of(nets.FSQ, levels=(3, 5)),
    "nets.CausalConv": of(nets.CausalConv, num_codes=4, channels=4, layers=1, context_dim=0),
    "nets.CausalGRU": of(
        nets.CausalGRU, num_codes=4, shape=(2, 2), hidden=4, embedding=3, context_dim=0
    ),
    "nets.Codebook": of(nets.Codebook, num_codes=4, dim=2, decay=0.9, restart=1.0, ema=True),
    "nets.CodeTable": of(nets.CodeTable, num_codes=4, dim=2),
    "nets.Unigram": of(nets.Unigram, num_codes=4),
    "nets.Combine": of(nets.Combine, channels=4, out=2),
    "nets.Constant": of(nets.Constant, width=4),
    "nets.Zeros": of(nets.Zeros, channels=4),
    "nets.OneHot": of(nets.OneHot, num_classes=3),
    "nets.SqueezeExcitation": of(nets.SqueezeExcitation, channels=16),
    "nets.PositionEmbedding": of(nets.PositionEmbedding, dim=2, shape=(2, 2), scale=0.5),
    "nets.SelfMasking": of(nets.SelfMasking, dim=4, sign=0),
    "nets.Spectral": of(
        nets.Spectral, module=lambda: nn.Conv2d(2, 2, 3), weight=0.01, iterations=2
    ),
    "nets.Masked": of(nets.Masked, net=net(8, 8, 4), fill=0.0, channel=True, event_dim=1),
    "nets.FlatBatch": of(nets.FlatBatch, net=lambda: nn.BatchNorm1d(4), event_dim=1),
    "nets.flat_batch": of(nets.flat_batch, net=lambda: nn.BatchNorm1d(4), event_dim=1),
    "nets.Joined": of(nets.Joined, net=net(4, 8, 2)),
    "nets.MergeMaps": of(nets.MergeMaps, net=lambda: nn.Conv2d(4, 2, 1)),
    "nets.Cell": of(nets.Cell, branch=lambda: nn.Identity(), skip=lambda: nn.Identity()),
    "nets.Group": of(nets.Group, prior=lambda: nn.Identity(), absorb=lambda: nn.Identity()),
    "nets.Tower": of(nets.Tower, stages=lambda: [nn.Identity()]),
    "nets.TopDown": of(
        nets.TopDown, start=(2, 4, 4),
        groups=lambda: list(path_of_maps().groups),
    ),
    "elbo.ELBO": of(E.ELBO, num_particles=2, gradient="pathwise", beta=1.0, kl="sampled"),
    "elbo.IWELBO": of(E.IWELBO, num_particles=2, gradient="pathwise"),
    "elbo.CIWELBO": of(E.CIWELBO, num_particles=2, gradient="pathwise", beta=0.5),
    "elbo.MIWELBO": of(E.MIWELBO, num_particles=2, gradient="pathwise", num_groups=2),
    "elbo.PIWELBO": of(E.PIWELBO, num_particles=2, gradient="pathwise", num_groups=2),
    "elbo.TCELBO": of(
        E.TCELBO, num_particles=1, gradient="pathwise", beta=1.0, kl="sampled", alpha=1.0,
        gamma=1.0, size=12,
    ),
    "elbo.DIPELBO": of(E.DIPELBO, kind="I", diagonal=1.0, off_diagonal=1.0, beta=1.0),
    "elbo.FactorELBO": of(
        E.FactorELBO, num_particles=1, beta=1.0, gamma=2.0,
        ratio=lambda: nets.mlp(2, 8, 1), latent="z",
    ),
    "elbo.VQELBO": of(E.VQELBO, beta=1.0, commitment=0.25),
    "elbo.ChiUpperBound": of(E.ChiUpperBound, num_particles=5, order=2.0),
    "elbo.RenyiELBO": of(E.RenyiELBO, num_particles=2, alpha=0.5),
    "elbo.ReweightedWakeSleep": of(E.ReweightedWakeSleep, num_particles=2, insomnia=0.5),
    "elbo.ThermodynamicELBO": of(
        E.ThermodynamicELBO, num_particles=2, partition=lambda: (0.1, 0.5)
    ),
    "elbo.Balanced": of(E.Balanced, schedule=0.5, alpha=lambda: {"z": 1.0}),
    "elbo.Capacity": of(E.Capacity, nats=3.0, gamma=10.0),
    "elbo.FreeBits": of(E.FreeBits, nats=0.5, per_dimension=False),
    "elbo.Constraint": of(E.Constraint, max_rate=1.0, speed=0.01, memory=0.9),
    "elbo.LinearWarmup": of(E.LinearWarmup, steps=3, start=0.0, end=1.0),
    "elbo.CyclicalWarmup": of(
        E.CyclicalWarmup, period=4, cycles=2, rising=0.5, start=0.0, end=1.0
    ),
    "elbo.Objective": of(
        E.Objective, model=lambda: pair()["model"], guide=lambda: pair()["guide"],
        elbo=lambda: E.ELBO(),
    ),
    "Ratio": of(Ratio, net=net(2, 8, 1), contrast=lambda: lambda draws: None),
    "alternate": of(
        lambda optim, turns, steps: alternate(optim, *as_tuple(turns), steps=steps),
        optim=lambda: torch.optim.Adam, turns=lambda: [nn.Linear(2, 2), nn.Linear(2, 2)], steps=2,
    ),
    "data.sprites": of(data.sprites, size=16, sizes=(3, 4, 2, 3, 3), full_turn=False),
    "data.linear_gaussian_parameters": of(
        data.linear_gaussian_parameters, dim=4, latent_dim=2, seed=0
    ),
    "data.gaussian_mixture_parameters": of(
        data.gaussian_mixture_parameters, num_components=3
    ),
    "data.quadrants": of(
        data.quadrants,
        dataset=lambda: data.from_arrays(torch.rand(20, 1, 4, 4).round(), support="binary"),
        missing=2,
    ),
    "data.from_counts": of(
        data.from_counts, counts=lambda: np.arange(80).reshape(20, 4), valid=0.1, test=0.1, seed=0,
    ),
    "data.Split": of(data.Split, values=lambda: X, seed=0),
    "data.from_csv": of(data.from_csv, path=lambda: files() / "a.csv", label="a"),
    "data.from_npz": of(data.from_npz, path=lambda: files() / "a.npz", x="x", y="y"),
    "data.from_images": of(data.from_images, folder=files, size=(4, 4), grey=True),
    "diagnostics.sigmoid_schedule": of(
        diagnostics.sigmoid_schedule, num_temperatures=5, delta=4.0
    ),
    "diagnostics.khat": of(diagnostics.khat, log_w=lambda: torch.randn(100, 3)),
}  # fmt: skip
