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
import itertools
import os
import random
import re
import sys
import tempfile
import warnings

import pyro
import torch

from odd_entries import ENTRIES
from odd_values import KINDS

# (entry, argument, what the message says): why it need not name the argument
ALLOWED = {
    ("", "x", "loss depends on a parameter"): "data that are a parameter, by their shape",
    ("", "data", "loss depends on a parameter"): "the same",
    ("", "model", "the likelihood generates"): "the likelihood is the model's",
    ("", "model", "the network of"): "named by its conditional",
    ("", "observed", "argument 1"): "models.Masked has no name for it",
    ("", "observed", "fails when called"): "the same: it is shown with its type",
    ("", "x", "a DataLoader cuts batches"): "evaluators take their data by position",
    ("", "data", "a DataLoader cuts batches"): "the same",
    ("ppvae.load", "folder", "there is no pair.json"): "an OSError that names the folder",
    ("Table.fit", "frame", "column '"): "named more closely",
    ("fit of M2", "y", "data must be"): "data are (x, y)",
    ("fit of M2", "weight", "the loss is"): "too large a number, in the first step",
    ("fit of M2", "weight", "argument"): "as the term",
    ("fit of M2", "term", "argument"): "a function of the user's that takes others",
    ("log_weights", "x", ""): "it runs the programs as they are, and checks nothing",
    ("log_weights", "model", ""): "the same",
    ("log_weights", "guide", ""): "the same",
    ("", "likelihood", "the levels do not chain"): "it is the last of them",
    ("", "latent_dim", "the levels do not chain"): "of the first of them",
    ("", "likelihood", "the network of"): "named by its conditional",
    ("", "path", "the levels do not chain"): "the walk down the path",
    ("conditionals.OptimalPrior", "base", "nothing says how many rows"): "a model, not a prior",
    ("conditionals.OptimalPrior", "base", "non-empty list"): "a head, called without inputs",
    ("conditionals.OptimalPrior", "net", "the network of a ratio"): "it is that network",
    ("conditionals.OptimalPrior", "net", "meta tensors"): "it is run once, without memory",
    ("Ratio", "net", "the network of a ratio"): "it is that network",
    ("data.from_csv", "label", "labels that are not whole"): "of the column -1, which there is",
    ("alternate", "turns", "a part"): "by its number",
    ("alternate", "turns", "part "): "the same",
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
