"""What the examples share and VAEs have no part in: options, the out folder, tables, files."""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import pyro
import torch
from matplotlib import style
from torch import Tensor

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, plots

matplotlib.use("Agg")  # pictures go to files
style.use("ppvae.plots.style")

SMOKE_ROWS = 200  # of each part of the data


# ------------------------------------------------------------------------------ options


def small_parser(description: str | None, out: str) -> argparse.ArgumentParser:
    """A parser with what every example has that brings its own data."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--quick", "--smoke", dest="quick", action="store_true",
                        help="a check that all runs, in seconds")  # fmt: skip
    parser.add_argument("--device", choices=["cpu", "auto"], default="cpu", help="CPU only")
    return parser


def parser(
    description: str, out: str, latent_dim: str = "8", hidden: str = "256"
) -> argparse.ArgumentParser:
    """A parser with the options of every example; the arguments are defaults as --help has them."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = functools.partial(_add, parser)
    add("--data", default="digits", help=f"one of {', '.join(data.NAMES)}; or your own .npz "
        "(arrays x and y), .csv, or folder of images")  # fmt: skip
    add("--label", metavar="COLUMN", help="label column of a .csv: name or number "
        "(default: no labels)")  # fmt: skip
    add("--shape", type=_positive, nargs="+", metavar="N", help="shape of one image if your rows "
        "are flat, e.g. 1 28 28 (default: as the data are stored)")  # fmt: skip
    add("--binarize", choices=["default", "dynamic", "static", "none"], default="default",
        help="draw 0/1 pixels from grey levels: each epoch, once, or not at all (digits and mnist: "
        "dynamic; your own data: none)")  # fmt: skip
    add("--elbo", choices=["elbo", "iw", "renyi"], default="elbo",
        help="bound to maximise: ELBO, IWELBO, or Renyi's with alpha = 0.5")  # fmt: skip
    add("--num-particles", type=_positive, metavar="K", help="particles per datapoint in training "
        "(default: 1 for elbo, 8 for iw and renyi)")  # fmt: skip
    add("--epochs", type=_positive, metavar="N", help="passes over the training data (default: 50 "
        "from 10,000 training rows on, else 200)")  # fmt: skip
    add("--patience", type=_positive, metavar="N", help="stop after so many epochs without a "
        "better validation bound, and go back to the best (default: epochs / 10)")  # fmt: skip
    add("--batch-size", type=_positive, metavar="N", help="datapoints per step (default: 128 from "
        "10,000 training rows on, else 64)")  # fmt: skip
    add("--latent-dim", type=_positive, metavar="N", help=f"size of z (default: {latent_dim})")
    add("--hidden", type=_positive, nargs="+", metavar="N", help="widths of the hidden layers of "
        f"each network (default: {hidden})")  # fmt: skip
    add("--lr", type=float, default=1e-3, help="Adam's learning rate")
    add("--num-samples", type=_particles, default=1000, metavar="K",
        help="particles per datapoint in the evaluation, 2 or more")  # fmt: skip
    add("--num-test", type=_positive, default=2000, metavar="N",
        help="evaluate on so many test rows at most, the first ones")  # fmt: skip
    add("--device", default="auto", help="auto (CUDA if there is one), cpu, cuda, cuda:1, ...")
    add("--seed", type=_seed, default=0, help="of initialisation, shuffling and draws; the split "
        "of the data does not depend on it")  # fmt: skip
    add("--out", type=Path, default=Path(out), metavar="FOLDER", help="where the files go")
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--smoke", action="store_true", help="one short epoch, a small network, few rows: a check "
        "that all runs, in seconds")  # fmt: skip
    return parser


def _add(parser: argparse.ArgumentParser, name: str, help: str, **options: Any) -> None:
    shown = options.get("default") is not None
    parser.add_argument(name, help=help + " (default: %(default)s)" * shown, **options)


def _whole(text: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, {least} or more")
    return int(text)


_positive = functools.partial(_whole, least=1)
_particles = functools.partial(_whole, least=2)  # a standard error needs two
_seed = functools.partial(_whole, least=0)


def complete(args: argparse.Namespace, rows: int, latent_dim: int, hidden: list[int]) -> None:
    """Fill in the options whose default depends on the data or the task; one thread if small."""
    if not (0 < args.lr < math.inf):
        raise ValueError(f"--lr {args.lr}: give a positive number, such as 0.001")
    large = rows >= 10_000
    if not large:
        # Steps of a millisecond gain nothing from a second thread; on a busy machine, where threads
        # wait for each other, the digits took 177 s with two and 15 s with one.
        torch.set_num_threads(1)
    chosen = {
        "epochs": 50 if large else 200,
        "batch_size": 128 if large else 64,
        "latent_dim": latent_dim,
        "hidden": hidden,
        "num_particles": 1 if args.elbo == "elbo" else 8,
    }
    if args.smoke:
        chosen |= {"epochs": 1, "hidden": [16]}
        args.num_samples = min(args.num_samples, 50)
    for name, value in chosen.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.patience = args.patience or max(3, args.epochs // 10)


def estimator(name: str, num_particles: int) -> elbo.Estimator:
    """The bound that --elbo names."""
    if name == "elbo":
        return elbo.ELBO(num_particles=num_particles, kl="mixed")  # closed-form KL where it exists
    if name == "iw":
        return elbo.IWELBO(num_particles=num_particles)
    return elbo.RenyiELBO(num_particles=num_particles, alpha=0.5)


# ------------------------------------------------------------------------------ data


def load(args: argparse.Namespace) -> data.Dataset:
    """The data set that --data names; real values are standardised, and that is printed."""
    options: dict[str, Any] = {}
    if args.label is not None:
        options["label"] = int(args.label) if args.label.lstrip("-").isdigit() else args.label
    if args.shape is not None:
        options["shape"] = tuple(args.shape)
    binarize = None if args.binarize == "none" else args.binarize
    try:
        dataset = data.load(args.data, binarize=binarize, **options)
    except TypeError as error:  # an option this data set does not have, or an array of words
        raise ValueError(str(error)) from error
    if dataset.support in ("counts", "integer"):
        raise ValueError(
            f"x of {dataset.name!r} holds whole numbers (support {dataset.support!r}). As "
            "word counts, write a pair with conditionals.BagOfWords; as measurements, standardise "
            "them first: x = (x - x.mean(0)) / x.std(0); as 8-bit pixels, divide by 255"
        )
    if dataset.support == "real" and dataset.log_evidence is None:
        dataset = standardise(dataset)
    if args.smoke:
        dataset = dataset.map_splits(
            lambda s: replace(
                s, values=s.values[:SMOKE_ROWS], y=None if s.y is None else s.y[:SMOKE_ROWS]
            )
        )
    return dataset


def standardise(dataset: data.Dataset) -> data.Dataset:
    """Mean 0 and standard deviation 1 on the training part, per column, or overall for images."""
    values = dataset.train.values
    dims = tuple(range(values.dim())) if is_image(dataset) else 0
    mean, std = values.mean(dims), values.std(dims)
    constant = (std < 1e-6 * (1 + mean.abs())).flatten().nonzero().flatten().tolist()
    if constant:
        raise ValueError(
            f"x is constant in columns {constant[:5]} ({len(constant)} in all), where a Normal "
            "likelihood has no bound: drop them"
        )
    change = (
        f"{-std.log():.2f} nats per pixel" if std.dim() == 0 else f"{-std.log().sum():.2f} nats"
    )
    print(
        "x was standardised with the training mean and standard deviation: log-densities below are "
        f"those of the\nstandardised data; add {change} for the original units."
    )
    return dataset.map_splits(lambda split: replace(split, values=(split.values - mean) / std))


def likelihood(dataset: data.Dataset, width: int) -> Callable[..., torch.nn.Module]:
    """The conditional that fits the data's support; call it with a network of ``width`` outputs."""
    if dataset.support == "real":  # one learned sigma per column, or one for all pixels
        shape = () if is_image(dataset) else (width,)
        return lambda net: conditionals.Normal(net, scale=conditionals.Scale(shape=shape))
    if dataset.support == "unit_interval":
        print(
            "x lies in [0, 1] and is not binary: log p below is minus the Bernoulli cross-entropy, "
            "no density, and\ndoes not compare with that of binarised data (--binarize dynamic)."
        )
        return functools.partial(conditionals.Bernoulli, grey=True)
    return conditionals.Bernoulli


def is_image(dataset: data.Dataset) -> bool:
    """Whether rows can be drawn: shape (H, W), (1, H, W) or (3, H, W)."""
    shape = dataset.shape
    return len(shape) == 2 or (len(shape) == 3 and shape[0] in (1, 3))


def to_pixels(dataset: data.Dataset, images: Tensor) -> Tensor:
    """Values as grey levels in [0, 1] for the plots; real ones by their range in training."""
    if dataset.support == "real":
        low, high = dataset.train.values.min(), dataset.train.values.max()
        images = (images - low.to(images)) / (high - low).to(images)
    return images.clamp(0, 1)


# ------------------------------------------------------------------------------ results


def open_folder(folder: Path, overwrite: bool, files: Iterable[str]) -> Path:
    """Make the out folder, and refuse it if a file of an earlier run would be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: give a folder")
    present = [name for name in files if (folder / name).exists()]
    if present and not overwrite:
        raise ValueError(
            f"{folder} already holds {', '.join(present)}: give another --out, or --overwrite to "
            "replace them"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def of_seeds(count: int) -> str:
    """How far a mean or median over runs can be trusted."""
    return f"{count} seeds" if count > 1 else "one seed: what another gives is not known"


def clear(folder: Path, files: Iterable[str]) -> None:
    """Remove the files of an earlier run, now that new ones are ready: no mixture of two runs."""
    for name in files:
        (folder / name).unlink(missing_ok=True)


def save(ax: Any, path: Path) -> None:
    """Write the figure of some axes as PNG."""
    from matplotlib import pyplot as plt

    ax.figure.savefig(path, bbox_inches="tight")
    plt.close(ax.figure)


def save_khat(evidence: diagnostics.Evidence, path: Path) -> None:
    """Write the picture of k-hat, if K was large enough to know it."""
    if evidence.khat.isfinite().any():
        save(plots.khat(evidence.khat), path)
    else:
        print(f"\nNo {path.name}: k-hat needs --num-samples above 20.")


def print_files(folder: Path, files: Iterable[str]) -> None:
    """Print what was written."""
    print(f"\nWritten to {folder}: {', '.join(f for f in files if (folder / f).exists())}")


def print_table(title: str, rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values in two columns."""
    rows = list(rows)
    width = max(len(name) for name, _ in rows)
    print(f"\n{title}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")


def number(value: float, se: float | None = None) -> str:
    """A value in nats, with its standard error if there is one."""
    return f"{value:9.2f}" + (f" ± {se:.2f}" if se is not None else "")


def count_parameters(*modules: torch.nn.Module) -> int:
    """Trainable parameters, each counted once, also where modules share it."""
    found = {p for module in modules for p in module.parameters() if p.requires_grad}
    return sum(p.numel() for p in found)


def summary(
    args: argparse.Namespace,
    dataset: data.Dataset,
    history: ppvae.History,
    evidence: diagnostics.Evidence,
    train_seconds: float,
    device: torch.device,
) -> dict[str, Any]:
    """The numbers of a run, by the names they have in results.json."""
    best = history.rows[(history.best_epoch or len(history.rows)) - 1]
    return {
        "data": dataset.name,
        "binarisation": dataset.train.binarize or "none",
        "bound": history.name,
        "train_bound_nats": best["train_objective"],
        "valid_bound_nats": best["valid_bound"],
        "test_log_evidence_nats": evidence.mean,
        "test_log_evidence_se": evidence.mean_se,
        "test_log_evidence_mc_se": evidence.mean_mc_se,
        "test_elbo_nats": evidence.elbo.mean().item(),
        "num_samples": evidence.num_particles,
        "num_test": len(evidence.elbo),
        "ess_median": evidence.ess.median().item(),
        "khat_above_0.7": (evidence.khat > 0.7).double().mean().item(),
        "train_seconds": train_seconds,
        "seconds_per_epoch": statistics.mean(history.column("seconds")),
        "epochs": len(history.rows),
        "best_epoch": int(best["epoch"]),
        "device": str(device),
    }


def print_summary(density: str, results: dict[str, Any]) -> None:
    """Print the short table; ``density`` says what was modelled, such as ``"p(x | y)"``."""
    r, K = results, results["num_samples"]
    rows = [
        (f"train {r['bound']}, mean over epoch {r['best_epoch']}", number(r["train_bound_nats"])),
        (f"validation {r['bound']}, after it", number(r["valid_bound_nats"])),
        (
            f"test log {density}, {K} importance samples",
            number(r["test_log_evidence_nats"], r["test_log_evidence_se"])
            + f"   (standard error over {r['num_test']} rows)",
        ),
        ("test ELBO", number(r["test_elbo_nats"])),
        ("effective sample size, median", f"{r['ess_median']:9.0f} of {K}"),
        ("rows with k-hat above 0.7", f"{r['khat_above_0.7']:9.1%}"),
        (
            "time per epoch",
            f"{r['seconds_per_epoch']:9.3f} s, {r['epochs']} epochs; training took "
            f"{r['train_seconds']:.1f} s on {r['device']}",
        ),
        ("parameters", f"{r['num_parameters']:9,d}"),
    ]
    if "exact_log_evidence_nats" in r:
        exact = number(r["exact_log_evidence_nats"])
        rows.insert(3, (f"test log {density}, exact, of the process that made the data", exact))
    print_table(
        f"{r['data']}, {density}, binarisation {r['binarisation']} "
        "[nats per datapoint, larger is better]",
        rows,
    )


def write_results(path: Path, args: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the numbers with all settings and versions as JSON."""
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    versions = {
        "ppvae": ppvae.__version__,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "python": platform.python_version(),
    }
    finite = {
        k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in results.items()
    }
    whole = {**finite, "settings": settings, "versions": versions}
    path.write_text(json.dumps(whole, indent=2) + "\n")


def run(main: Callable[[], None]) -> None:
    """Run an example; what a user can put right is one line and exit code 2, not a traceback."""
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing more was written")
