"""Odd calls of the public API: each is taken, or refused by an error that names the argument.

    python tests/odd_calls.py --calls 2000

A call is one of ``ENTRIES`` with one or two of its arguments replaced by something odd of the
argument's kind. What may come out is a result, or a ``ValueError`` or ``TypeError`` (``PairError``
is one) whose message names an argument that was replaced. What else is allowed is in ``ALLOWED``,
with the reason.
"""

import argparse
import collections
import contextlib
import enum
import itertools
import math
import os
import random
import re
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pandas
import pyro
import torch
from torch import nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, metrics, models, nets

X = torch.bernoulli(torch.full((12, 4), 0.5), generator=torch.Generator().manual_seed(1))
CHAINS = {"num_chains": 2, "num_warmup": 20, "num_draws": 8, "max_reruns": 0}
HERE = tempfile.TemporaryDirectory()


class Colour(enum.Enum):
    RED = 1


class Mine(torch.Tensor):
    pass


def pair():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
    return {"model": model, "guide": guides.Normal(nets.mlp(4, 8, 4))}


def inference(x):
    with torch.inference_mode():
        return x.clone()


# -- what is odd, by the kind of an argument: name and how it is made -----------------------------

THINGS = {
    "None": lambda: None,
    "a word": lambda: "three",
    "an empty word": lambda: "",
    "bytes": lambda: b"3",
    "a list": lambda: [3],
    "an empty list": lambda: [],
    "a dictionary": lambda: {"a": 3},
    "an object": object,
    "a class": lambda: int,
    "an enum": lambda: Colour.RED,
    "a complex number": lambda: 2 + 1j,
    "a function": lambda: lambda *args: None,
    "a generator": lambda: (i for i in range(3)),
    "two numbers": lambda: np.array([3, 4]),
    "a tensor of two": lambda: torch.ones(2),
    "an empty tensor": lambda: torch.ones(0),
    "a network": lambda: nn.Linear(2, 2),
    "nan": lambda: math.nan,
    "True": lambda: True,
    "a missing value": lambda: pandas.NA,
    "a time": lambda: np.datetime64("2020-01-01"),
}
COUNTS = {
    "zero": lambda: 0,
    "minus one": lambda: -1,
    "2 ** 63": lambda: 2**63,
    "2 ** 70": lambda: 2**70,
    "- 2 ** 63": lambda: -(2**63),
    "a half": lambda: 2.5,
    "a whole float": lambda: 3.0,
    "infinity": lambda: math.inf,
    "numpy's three": lambda: np.int64(3),
    "a tensor of three": lambda: torch.tensor(3),
    "an unsigned three": lambda: np.uint8(3),
}
NUMBERS = {
    "minus infinity": lambda: -math.inf,
    "infinity": lambda: math.inf,
    "minus one": lambda: -1.0,
    "zero": lambda: 0.0,
    "a large number": lambda: 1e308,
    "a whole number of 70 bits": lambda: 2**70,
    "numpy's half": lambda: np.float32(0.5),
    "a tensor of a half": lambda: torch.tensor(0.5),
}
ROWS = {
    "an array": lambda: X.numpy(),
    "lists": lambda: X.tolist(),
    "a frame": lambda: pandas.DataFrame(X.numpy()),
    "sparse": lambda: X.to_sparse(),
    "sparse rows": lambda: X.to_sparse_csr(),
    "meta": lambda: X.to("meta"),
    "quantised": lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.quint8),
    "complex": lambda: X.to(torch.complex64),
    "long": lambda: X.long(),
    "bool": lambda: X.bool(),
    "half": lambda: X.half(),
    "double": lambda: X.double(),
    "with a gradient": lambda: X.clone().requires_grad_(),
    "a function of one with a gradient": lambda: X.clone().requires_grad_() * 1.0,
    "in inference mode": lambda: inference(X),
    "a parameter": lambda: nn.Parameter(X.clone()),
    "of no rows": lambda: X[:0],
    "of no columns": lambda: X[:, :0],
    "one row": lambda: X[:1],
    "a vector": lambda: X[:, 0],
    "0-d": lambda: X[0, 0],
    "images": lambda: X.reshape(12, 1, 2, 2),
    "too wide": lambda: torch.cat([X, X], 1),
    "NaN": lambda: X * math.nan,
    "infinite": lambda: X / 0,
    "negative": lambda: -X - 1,
    "expanded": lambda: X[:1].expand(12, 4),
    "transposed": lambda: X.T.contiguous().T,
    "a subclass": lambda: X.as_subclass(Mine),
    "masked": lambda: np.ma.masked_equal(X.numpy(), 1.0),
    "words": lambda: np.array([["a"] * 4] * 12),
    "nested": lambda: torch.nested.nested_tensor([X[0], X[1]]),
    "a tuple": lambda: (X, X),
    "a loader": lambda: torch.utils.data.DataLoader(X, 4),
    "a data set": lambda: torch.utils.data.TensorDataset(X),
}
PROGRAMS = {
    "a class of programs": lambda: models.VAE,
    "a function of nothing": lambda: lambda: None,
    "a function without sites": lambda: lambda x: x,
    "a distribution": lambda: pyro.distributions.Normal(0.0, 1.0),
    "another width": lambda: models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 5)), latent_dim=2),
    "a conditional": lambda: conditionals.Bernoulli(nets.mlp(2, 8, 4)),
    "a double one": lambda: pair()["model"].double(),
    "on meta": lambda: pair()["model"].to("meta"),
}
KINDS = {
    "count": THINGS | COUNTS,
    "number": THINGS | NUMBERS,
    "seed": THINGS | COUNTS,
    "rows": THINGS | ROWS,
    "program": THINGS | PROGRAMS,
    "thing": THINGS | {"minus one": lambda: -1, "infinity": lambda: math.inf},
}


# -- what is called: a valid call, and the kind of each argument ----------------------------------


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
         "clip_norm": "number", "compile": "thing", "beside": "thing", "regularizer": "thing"},
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
        {**counts("num_particles", "max_rows", "num_aggregate"), "threshold": "number",
         "seed": "seed"},
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
    "clustering_accuracy": (
        metrics.clustering_accuracy,
        lambda: {"labels": np.arange(12) % 3, "clusters": np.arange(12) % 2},
        {"labels": "rows", "clusters": "rows"},
    ),
}  # fmt: skip

# (entry, argument, what the message says): why it need not name the argument
ALLOWED = {
    ("", "x", "loss depends on a parameter"): "data that are a parameter, by their shape",
    ("", "data", "loss depends on a parameter"): "the same",
    ("", "model", "the likelihood generates"): "the likelihood is the model's",
    ("", "model", "the network of"): "named by its conditional",
    ("log_weights", "x", ""): "it runs the programs as they are, and checks nothing",
    ("log_weights", "model", ""): "the same",
    ("log_weights", "guide", ""): "the same",
    ("quadrature", "num_points", "the grid does not resolve"): "too few of them, by the datapoint",
}


def odd_calls(seed=0):
    """Calls without an end: entry, what is odd of which argument, and the call itself."""
    rng = random.Random(seed)
    while True:
        entry = rng.choice(list(ENTRIES))
        function, valid, kinds = ENTRIES[entry]
        how_many = 1 if rng.random() < 0.8 or len(kinds) < 2 else 2
        names = rng.sample(list(kinds), how_many)
        odd = {name: rng.choice(list(KINDS[kinds[name]])) for name in names}

        def call(function=function, valid=valid, kinds=kinds, odd=odd):
            arguments = valid()
            for name, what in odd.items():
                arguments[name] = KINDS[kinds[name]][what]()
            return function(**arguments)

        yield entry, odd, call


def verdict(entry, odd, call):
    """Taken, named, allowed, or what is wrong with the error."""
    torch.manual_seed(0)
    pyro.clear_param_store()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            call()
    except Exception as error:
        kind = type(error).__name__
        text = str(error)
        if any(e in ("", entry) and name in odd and words in text for e, name, words in ALLOWED):
            return "allowed"
        if not isinstance(error, (ValueError, TypeError)):
            return f"{kind}: {text[:200]}"
        called = {"data": "(data|x)", "valid": "(valid|x)"}  # the programs call them x
        if any(re.search(rf"\b{called.get(name, name)}\b", text) for name in odd):
            return "named"
        return f"no name: {kind}: {text[:200]}"
    return "taken"


def attack(calls, seed=0):
    """Counts of verdicts, and the calls that went wrong."""
    found, wrong = collections.Counter(), []
    with tempfile.TemporaryDirectory() as folder, inside(folder):  # a word may be a checkpoint's
        return _attack(calls, seed, found, wrong)


@contextlib.contextmanager
def inside(folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _attack(calls, seed, found, wrong):
    for entry, odd, call in itertools.islice(odd_calls(seed), calls):
        said = verdict(entry, odd, call)
        found[said if said in ("taken", "named", "allowed") else "wrong"] += 1
        if said not in ("taken", "named", "allowed"):
            wrong.append((entry, odd, said))
    return found, wrong


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found, wrong = attack(asked.calls, asked.seed)
    for entry, odd, said in wrong:
        print(f"{entry} {odd}\n    {said}")
    print(
        f"{asked.calls:,} odd calls: {found['named']:,} refused by the argument's name, "
        f"{found['taken']:,} taken, {found['allowed']:,} allowed, {found['wrong']:,} wrong"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
