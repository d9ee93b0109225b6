"""What is called oddly: a valid call of each function, and the kind of each of its arguments."""

import tempfile
from pathlib import Path

import numpy as np
import pandas
import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure

import ppvae
from odd_made import MADE
from odd_values import X, pair
from ppvae import check, conditionals, data, diagnostics, elbo, guides, metrics, models, nets, plots

CHAINS = {"num_chains": 2, "num_warmup": 20, "num_draws": 8, "max_reruns": 0}
HERE = tempfile.TemporaryDirectory()


def of_pair(function, cheap, kinds, rows="x"):
    """An evaluator: model, guide, data by position, and its options."""

    def call(model, guide, x, **options):
        return function(model, guide, x, **options)

    def valid():
        return {**pair(), rows: X, **{k: v() if callable(v) else v for k, v in cheap.items()}}

    own = {"model": "program", "guide": "program", rows: "rows"}
    return (call if rows == "x" else function), valid, {**own, **kinds}


def fitted(**options):
    svi = options.pop("svi", None) or ppvae.SVI(**pair())
    return ppvae.fit(svi, options.pop("data"), progress=False, **options)


def stepped(x):
    return ppvae.SVI(**pair()).step(x)


def made(function, *positional):
    """A constructor, some of whose arguments go by position."""

    def call(**options):
        first = [options.pop(name) for name in positional]
        return function(*first, **options)

    return call


def counts(*names):
    return dict.fromkeys(names, "count")


def draws_of(rows=3):
    torch.manual_seed(0)
    return diagnostics.hmc(*pair().values(), X[:rows], num_leapfrog=1, seed=0, **CHAINS)


def of_masked(function, cheap, kinds):
    """An evaluator of a pair whose data have a mask."""

    def call(model, guide, x, observed, **options):
        return function(model, guide, x, observed, **options)

    def valid():
        torch.manual_seed(0)
        guide = guides.Normal(nets.Masked(nets.mlp(2 * 4, 8, 4)))
        model = models.Masked(pair()["model"])
        return {"model": model, "guide": guide, "x": X, "observed": X > 0, **cheap}

    kinds = {"model": "program", "guide": "program", "x": "rows", "observed": "mask", **kinds}
    return call, valid, kinds


def m2_pair():
    torch.manual_seed(0)
    posterior = conditionals.Normal(nets.mlp(4 + 2, 8, 2 * 2))
    return (
        models.M2(conditionals.Bernoulli(nets.mlp(2 + 2, 8, 4)), latent_dim=2, num_classes=2),
        guides.M2(nets.mlp(4, 8, 2), posterior),
    )


def few_labels(data, y, term, weight):
    svi = ppvae.SVI(*m2_pair(), loss=elbo.Plus(elbo.ELBO(), term, weight))
    return ppvae.fit(svi, (data, y), epochs=1, progress=False)


def labelled():
    return data.Split(X, torch.arange(12) % 2)


def saved_pair():
    folder = Path(HERE.name) / "pair"
    if not folder.exists():
        ppvae.save(folder, *pair().values())
    return folder


def shared_scale(x):
    """A global latent and no local one."""
    s = pyro.sample("s", dist.LogNormal(0.0, 0.3))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(torch.zeros(4), s).to_event(1), obs=x)


def guessed_scale(x):
    pyro.sample("s", dist.LogNormal(-0.3, 0.1))


def of_globals(function, cheap, kinds):
    """An evaluator of a pair with a global latent."""
    call, _, known = of_pair(function, cheap, kinds)
    valid = {"model": shared_scale, "guide": guessed_scale, "x": X, **cheap}
    return call, lambda: dict(valid), known


GLOBAL = {"seed": "seed", **counts("num_globals", "num_particles", "max_rows")}
CHAIN = {**counts("num_chains", "num_warmup", "num_draws", "max_rows", "max_reruns"),
         "step_size": "number", "start": "thing", "seed": "seed"}  # fmt: skip
ANNEAL = {**counts("num_chains", "num_temperatures", "num_leapfrog", "max_rows"),
          "start": "thing", "temperatures": "rows", "seed": "seed"}  # fmt: skip
FEW = {"num_chains": 2, "num_temperatures": 3, "num_leapfrog": 1}
ENTRIES = {
    "fit": (
        fitted,
        lambda: {"data": X, "epochs": 1},
        {
            "data": "rows", "valid": "rows", "seed": "seed", "lr_scheduler": "thing",
            "device": "thing", "checkpoint": "thing", "resume": "thing", "callbacks": "thing",
            "loggers": "thing", "fabric": "thing", "on_epoch_end": "thing",
            **counts("epochs", "batch_size", "patience", "steps_per_epoch"),
        },
    ),
    "SVI": (
        ppvae.SVI,
        pair,
        {"model": "program", "guide": "program", "optim": "thing", "loss": "thing",
         "clip_norm": "number", "compile": "thing", "beside": "thing", "regularizer": "thing",
         **counts("num_rows")},
    ),
    "SVI.step": (stepped, lambda: {"x": X}, {"x": "rows"}),
    "Checkpoints": (
        made(ppvae.Checkpoints, "folder"),
        lambda: {"folder": Path(HERE.name) / "run"},
        {"folder": "thing", **counts("every", "every_steps", "keep")},
    ),
    "check_pair": of_pair(ppvae.check_pair, {}, {}),
    "log_weights": of_pair(ppvae.log_weights, {}, counts("num_particles")),
    "diagnose": of_pair(
        ppvae.diagnose, {"num_particles": 30},
        {**counts("num_particles", "max_rows", "num_aggregate", "num_globals"),
         "threshold": "number", "seed": "seed"},
    ),
    "log_evidence": of_pair(
        diagnostics.log_evidence, {"num_particles": 5},
        {**counts("num_particles", "max_rows"), "seed": "seed", "compile": "thing"},
    ),
    "compare": of_pair(
        ppvae.compare,
        {"estimators": lambda: [elbo.ELBO()], "repeats": 2, "evidence_particles": 5,
         "timing_rounds": 0},
        {**counts("repeats", "evidence_particles", "timing_rounds"), "estimators": "thing",
         "log_evidence": "rows", "seed": "seed"},
        rows="data",
    ),
    "ais": of_pair(diagnostics.ais, FEW, ANNEAL),
    "bdmc": of_pair(diagnostics.bdmc, FEW, ANNEAL),
    "reverse_ais": of_pair(
        diagnostics.reverse_ais,
        {**FEW, "draws": lambda: draws_of(12)},
        {**ANNEAL, "draws": "thing"},
    ),
    "hmc": of_pair(
        diagnostics.hmc, {**CHAINS, "num_leapfrog": 1},
        {**CHAIN, **counts("num_leapfrog"), "target_accept": "number"},
    ),
    "metropolis": of_pair(
        diagnostics.metropolis, {**CHAINS, "thin": 1}, {**CHAIN, **counts("thin")}
    ),
    "quadrature": of_pair(
        diagnostics.quadrature, {"num_points": 33, "tolerance": 10.0},
        {**counts("num_points", "max_rows"), "tolerance": "number", "seed": "seed"},
    ),
    "sbc": of_pair(
        diagnostics.sbc, {"num_simulations": 100, "num_draws": 19},
        {**counts("num_simulations", "num_draws", "max_rows"), "seed": "seed",
         "test_quantities": "thing"},
    ),
    "predictive_check": of_pair(
        diagnostics.predictive_check,
        {"statistics": lambda: {"mean": lambda x: x.mean(-1)}, "num_draws": 20},
        {**counts("num_draws", "max_rows"), "statistics": "thing", "site": "thing", "seed": "seed"},
    ),
    "to_arviz": of_pair(
        diagnostics.to_arviz, {"num_draws": 3},
        {**counts("num_draws"), "coords": "thing", "dims": "thing", "seed": "seed"},
    ),
    "total_correlation": (
        made(diagnostics.total_correlation, "guide", "x"),
        lambda: {"guide": pair()["guide"], "x": X},
        {"guide": "program", "x": "rows", **counts("num_draws", "max_pairs"), "seed": "seed"},
    ),
    "from_arrays": (
        data.from_arrays,
        lambda: {"x": X},
        {"x": "rows", "y": "rows", "valid": "number", "test": "number", "support": "thing",
         "shape": "thing", "binarize": "thing", "seed": "seed"},
    ),
    "load": (
        made(data.load, "name"),
        lambda: {"name": "digits"},
        {"name": "thing", "binarize": "thing", "seed": "seed"},
    ),
    "sprites": (data.sprites, lambda: {"size": 16}, {"size": "count", "sizes": "thing"}),
    "ELBO": (elbo.ELBO, dict, {**counts("num_particles"), "gradient": "thing", "beta": "thing"}),
    "IWELBO": (elbo.IWELBO, dict, {**counts("num_particles"), "gradient": "thing"}),
    "MIWELBO": (elbo.MIWELBO, dict, counts("num_particles", "num_groups")),
    "RenyiELBO": (elbo.RenyiELBO, dict, {**counts("num_particles"), "alpha": "number"}),
    "LinearWarmup": (elbo.LinearWarmup, lambda: {"steps": 3}, counts("steps")),
    "VAE": (
        made(models.VAE),
        lambda: {"likelihood": conditionals.Bernoulli(nets.mlp(2, 8, 4)), "latent_dim": 2},
        {"likelihood": "program", **counts("latent_dim"), "prior": "thing"},
    ),
    "guides.Normal": (
        made(guides.Normal, "net"), lambda: {"net": nets.mlp(4, 8, 4)}, {"net": "program"}
    ),
    "conditionals.Bernoulli": (
        made(conditionals.Bernoulli, "net"), lambda: {"net": nets.mlp(2, 8, 4)}, {"net": "program"}
    ),
    "mlp": (
        lambda sizes, **options: nets.mlp(*sizes, **options),
        lambda: {"sizes": (4, 8, 2)},
        {"dropout": "number", "activation": "thing"},
    ),
    "encode": (
        made(ppvae.encode, "guide", "x"),
        lambda: {"guide": pair()["guide"], "x": X},
        {"guide": "program", "x": "rows", "statistic": "thing", "table": "thing", "seed": "seed",
         **counts("num_draws", "max_rows")},
    ),
    "reconstruct": of_pair(
        ppvae.reconstruct, {},
        {"statistic": "thing", "table": "thing", "seed": "seed", **counts("max_rows")},
    ),
    "generate": (
        made(ppvae.generate, "model", "size"),
        lambda: {"model": pair()["model"], "size": 3},
        {"model": "program", "like": "thing", "table": "thing", "seed": "seed",
         **counts("size", "max_rows")},
    ),
    "log_prob": of_pair(
        ppvae.log_prob, {"num_particles": 5},
        {"with_se": "thing", "table": "thing", "seed": "seed",
         **counts("num_particles", "max_rows")},
    ),
    "impute": of_masked(
        ppvae.impute, {"num_particles": 30},
        {"site": "thing", "seed": "seed", **counts("num_particles", "num_draws", "max_rows")},
    ),
    "simulated_divergence": of_pair(
        diagnostics.simulated_divergence, {"num_simulations": 100, "num_draws": 2},
        {"seed": "seed", **counts("num_simulations", "num_draws", "max_rows")},
    ),
    "local_c2st": of_pair(
        diagnostics.local_c2st, {"num_simulations": 100, "num_draws": 20, "num_null": 19},
        {"seed": "seed", **counts("num_simulations", "num_draws", "num_null", "max_rows")},
    ),
    "log_predictive": of_globals(
        diagnostics.log_predictive, {"num_globals": 3, "num_particles": 2}, GLOBAL
    ),
    "joint_evidence": of_globals(
        diagnostics.joint_evidence, {"num_globals": 3, "num_particles": 2}, GLOBAL
    ),
    "given_globals": of_globals(diagnostics.given_globals, {}, {"seed": "seed"}),
    "save": (
        made(ppvae.save, "folder"),
        lambda: {"folder": Path(HERE.name) / "saved", **pair()},
        {"folder": "thing", "model": "program", "guide": "program", "table": "thing"},
    ),
    "ppvae.load": (
        made(ppvae.load, "folder"),
        lambda: {"folder": saved_pair()},
        {"folder": "thing", "make": "thing"},
    ),
    "Table.fit": (
        data.Table.fit,
        lambda: {"frame": pandas.DataFrame({"a": ["b", "c"] * 6, "d": X[:, 0].numpy()})},
        {"frame": "frame", "kinds": "thing"},
    ),
    "with_labels": (
        data.with_labels,
        lambda: {"split": labelled(), "per_class": 2},
        {"split": "split", "per_class": "count", "seed": "seed"},
    ),
    "Plus": (
        elbo.Plus,
        lambda: {"estimator": elbo.ELBO(), "term": lambda model, guide, x: x.sum(-1)},
        {"estimator": "thing", "term": "program", "weight": "number"},
    ),
    "M2": (
        models.M2,
        lambda: {"likelihood": conditionals.Bernoulli(nets.mlp(2 + 3, 8, 4)), "latent_dim": 2,
                 "num_classes": 3},
        {"likelihood": "program", "prior": "thing", "probs": "thing",
         **counts("latent_dim", "num_classes")},
    ),
    "fit of M2": (
        few_labels,
        lambda: {"data": X, "y": torch.arange(12) % 3 - 1, "weight": 0.5,
                 "term": guides.log_q_of_labels},
        {"data": "rows", "y": "labels", "term": "thing", "weight": "number"},
    ),
    "Masked": (models.Masked, lambda: {"model": pair()["model"]},
               {"model": "program", "site": "thing"}),
    "check_pair of Masked": of_masked(ppvae.check_pair, {}, {}),
    "fit_prior": (
        made(ppvae.fit_prior, "prior", "guide", "data"),
        lambda: {"prior": conditionals.Mixture(2, 2), "guide": pair()["guide"], "data": X,
                 "epochs": 1, "progress": False},
        {"prior": "program", "guide": "program", "data": "rows", "optim": "thing",
         "latent": "thing", "seed": "seed", **counts("epochs", "batch_size")},
    ),
    "structure": (
        made(check.structure, "program", "x"),
        lambda: {"program": pair()["model"], "x": X},
        {"program": "program", "x": "rows"},
    ),
    "plates": (
        plots.plates,
        lambda: {"model": check.structure(pair()["model"], X), "ax": Figure().subplots()},
        {"model": "thing", "guide": "thing", "ax": "thing"},
    ),
    "typeset": (
        data.load, lambda: {"name": "typeset", "num": 100},
        {"num": "count", "binarize": "thing", "flatten": "thing", "seed": "seed"},
    ),
    "clustering_accuracy": (
        metrics.clustering_accuracy,
        lambda: {"labels": np.arange(12) % 3, "clusters": np.arange(12) % 2},
        {"labels": "rows", "clusters": "rows"},
    ),
} | MADE  # fmt: skip
