r"""NVAE: a deep hierarchy of feature maps, trained in balance, seen group by group.

    python examples/nvae.py                                   # handwritten digits, 8 x 8
    python examples/nvae.py --data mnist --blocks 2 --batch-size 32 --epochs 3 \
        --channels 12 --expansion 3                           # half a million parameters
    python examples/nvae.py --quick                           # a check that all runs, in seconds

Residual normal posteriors, cells with depthwise convolutions and gates, a warm-up that balances the
KL of the groups, and a regulariser of singular values, as in the paper. What it writes: samples at
four temperatures, interpolations of all groups and of some, and the KL of each group over training.

Source: Vahdat & Kautz, NVAE: A Deep Hierarchical Variational Autoencoder, 2020.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, plots
from ppvae.pairs import evaluation_mode, seeded
from ppvae.train.fit import resolve_device

FILES = ["results.json", "groups.csv", "groups.png", "samples.png", "interpolation.png"]
TEMPERATURES = [0.4, 0.6, 0.8, 1.0]
Pair = tuple[models.TopDown, guides.TopDown]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    device = resolve_device(args.device)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    dataset = data.load(args.data, flatten=False)
    x = dataset.test.x[: args.num_test].to(device)
    pyro.set_rng_seed(args.seed)
    model, guide = build(tuple(x.shape[1:]), args)
    size = reporting.count_parameters(model, guide)
    print(f"{dataset}\n\n{size:,} parameters, on {device}; latents {latents_of(model)}", flush=True)

    course = Groups(x[:200], args.every)
    train(model, guide, dataset, args, device=device, callbacks=[course])
    found = diagnostics.log_evidence(model, guide, x, num_particles=args.num_samples)
    kl = by_group(model, guide, x)
    reporting.print_table(
        f"{len(x)} test rows [nats per datapoint]",
        [
            ("-ELBO", reporting.number(-found.elbo.mean().item())),
            (f"-IWELBO, K = {args.num_samples}", reporting.number(-found.mean, found.mean_se)),
            *((f"KL of {name}", reporting.number(value)) for name, value in kl.items()),
        ],
    )

    reporting.clear(out, FILES)
    results = {
        "negative_elbo": -found.elbo.mean().item(),
        "negative_iwelbo": -found.mean,
        "kl": kl,
        "parameters": size,
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    course.write(out / "groups.csv")
    reporting.save(course.plot(), out / "groups.png")
    reporting.save(draw_samples(model, dataset), out / "samples.png")
    reporting.save(draw_interpolations(model, guide, x, dataset), out / "interpolation.png")
    reporting.print_files(out, FILES)


# ------------------------------------------------------------------------------ the pair


def build(shape: tuple[int, ...], args: argparse.Namespace) -> Pair:
    """The paper's pair at the sizes asked for, laid out for convolutions on a CPU or GPU."""
    parts = nets.nvae(
        shape, args.groups, args.channels, args.latent_channels, args.blocks, args.cells,
        args.expansion, args.block_cells, args.block_expansion,
    )  # fmt: skip
    model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
    guide = guides.TopDown(model, parts.encoder, parts.heads)
    for program in (model, guide):
        program.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, guide


def latents_of(model: models.TopDown) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in model.shapes.items() if name != "x")


def train(
    model: models.TopDown,
    guide: guides.TopDown,
    dataset: Any,
    args: argparse.Namespace,
    seed: int | None = None,
    **options: Any,
) -> ppvae.History:
    """Adamax, its rate along a cosine; the KL weighed from 1e-4 to 1 over a share of the steps."""
    rows = len(dataset) if isinstance(dataset, data.Split) else len(dataset.train)
    steps = math.ceil(rows / args.batch_size) * args.epochs
    beta: Any = elbo.LinearWarmup(max(1, round(args.warm_up * steps)), start=1e-4)
    if args.balance:
        beta = elbo.Balanced(beta, model.balance)
    spectral = None
    if args.regularizer:
        spectral = nets.Spectral(nn.ModuleList([model, guide]), args.regularizer)
    # foreach: one call for all tensors
    adamax = functools.partial(
        torch.optim.Adamax, lr=args.lr, eps=1e-3, weight_decay=args.weight_decay, foreach=True
    )
    bound = elbo.ELBO(kl="analytic", beta=beta)
    svi = ppvae.SVI(model, guide, adamax, bound, regularizer=spectral, compile=args.compile)
    history = ppvae.fit(
        svi,
        dataset,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed if seed is None else seed,
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(
            optimizer, functools.partial(rate, args=args)
        ),
        **options,
    )
    if history.interrupted:
        raise KeyboardInterrupt
    return history


def rate(epoch: int, args: argparse.Namespace) -> float:
    """The learning rate of an epoch as a share of the largest: up to it, then along a cosine."""
    if epoch < args.lr_warm_up:
        return (epoch + 1) / (args.lr_warm_up + 1)
    if not args.falls:
        return 1.0
    turn = (epoch - args.lr_warm_up) / max(1, args.epochs - args.lr_warm_up)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * turn))


# ------------------------------------------------------------------------------ what is reported


@torch.no_grad()
def by_group(model: ppvae.Program, guide: ppvae.Program, x: Tensor) -> dict[str, float]:
    """KL(q || p) of each group in nats, the top first; closed forms, a mean over rows."""
    bound, total = elbo.ELBO(kl="analytic"), dict.fromkeys(model.path.names, 0.0)
    with evaluation_mode(model, guide), seeded(0, x):
        for rows in x.split(500):
            _, rates = bound.terms(ppvae.log_weights(model, guide, rows))
            for name in total:
                total[name] += rates[name].sum().item() / len(x)
    return total


class Groups(ppvae.Callback):
    """The KL of each group while it trains, by `--every`-th epoch."""

    def __init__(self, x: Tensor, every: int) -> None:
        self.x, self.every = x, every
        self.rows: list[dict[str, float]] = []

    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        epoch = len(history.rows)
        if epoch == 1 or epoch % self.every == 0:
            found = by_group(svi.model, svi.guide, self.x)
            row = {"epoch": epoch, "kl_weight": history.rows[-1]["kl_weight"]}
            self.rows.append(row | found)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows = state["rows"]

    def write(self, path: Path) -> None:
        lines = [",".join(self.rows[0])]
        lines += [",".join(f"{value:.6g}" for value in row.values()) for row in self.rows]
        path.write_text("\n".join(lines) + "\n")

    def plot(self) -> Any:
        """The KL of each group against epochs."""
        _, ax = plt.subplots(figsize=(5.6, 3.4))
        epochs = [row["epoch"] for row in self.rows]
        groups = [name for name in self.rows[0] if name.startswith("z")]
        levels = {name: [row[name] for row in self.rows] for name in groups}
        plots.levels_over_training(epochs, levels, "KL [nats]", ax)
        rising = [row["epoch"] for row in self.rows if row["kl_weight"] < 1]
        if rising and rising[-1] < epochs[-1]:
            ax.axvline(rising[-1], color="black", lw=0.8, ls=":")
            ax.annotate("end of warm-up", (rising[-1], 0.97), xycoords=("data", "axes fraction"),
                        ha="right", va="top", rotation=90, fontsize="small",
                        xytext=(-4, 0), textcoords="offset points")  # fmt: skip
        return ax


@torch.no_grad()
def draw_samples(model: models.TopDown, dataset: data.Dataset, columns: int = 12) -> Any:
    """Means of p(x | z) at latents of each temperature; the same noise in each row."""
    rows = []
    with evaluation_mode(model):
        for t in TEMPERATURES:
            with seeded(0, model.path.start):
                rows.append(model.decode(columns, temperature=t).mean.flatten(1))
    labels = [f"t = {t:g}" for t in TEMPERATURES]
    return plots.image_grid(pixels(torch.stack(rows), dataset), dataset.shape, row_labels=labels)


@torch.no_grad()
def draw_interpolations(
    model: models.TopDown, guide: guides.TopDown, x: Tensor, dataset: data.Dataset, steps: int = 9
) -> Any:
    """From one image's latents to another's: all of them, the top one alone, all but the top one.

    On straight lines; the groups that are not moved stay those of the first image.
    """
    with evaluation_mode(model, guide), seeded(0, x):
        ends = guide(x[:4])
        share = torch.linspace(0, 1, steps, device=x.device).reshape(-1, 1, 1, 1)
        rows, labels = [], []
        top = model.path.names[0]
        for pair in (0, 2):
            for what, moved in (
                ("all latents", set(ends)),
                ("the top alone", {top}),
                ("all but the top", set(ends) - {top}),
            ):
                given = {
                    name: (1 - share * (name in moved)) * z[pair]
                    + share * (name in moved) * z[pair + 1]
                    for name, z in ends.items()
                }
                rows.append(model.decode(steps, given=given).mean.flatten(1))
                labels.append(what)
    return plots.image_grid(pixels(torch.stack(rows), dataset), dataset.shape, row_labels=labels)


def pixels(images: Tensor, dataset: data.Dataset) -> Tensor:
    return reporting.to_pixels(dataset, images.cpu())


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=["digits", "mnist"], default="digits", help="(default: %(default)s)")
    add("--groups", type=int, nargs="+", default=[1, 2], metavar="N", help="latents at each scale, "
        "the top first (default: 1 2)")  # fmt: skip
    add("--channels", type=int, default=16, help="at the size of the image, doubled at each "
        "halving (default: %(default)s)")  # fmt: skip
    add("--latent-channels", type=int, default=4, help="of each latent (default: %(default)s)")
    add("--blocks", type=int, default=1, help="halvings below the groups (default: %(default)s)")
    add("--cells", type=int, default=1, help="per group (default: %(default)s)")
    add("--expansion", type=int, default=3, help="of the groups' cells (default: %(default)s)")
    add("--block-cells", type=int, default=1, help="in a block (default: %(default)s)")
    add("--block-expansion", type=int, default=3, help="of its cells (default: %(default)s)")
    add("--epochs", type=int, default=60, help="(default: %(default)s)")
    add("--batch-size", type=int, default=64, help="(default: %(default)s)")
    add("--lr", type=float, default=5e-3, help="Adamax's largest (default: %(default)s)")
    add("--lr-warm-up", type=int, default=0, metavar="EPOCHS", help="before it is reached "
        "(default: %(default)s)")  # fmt: skip
    add("--constant-lr", dest="falls", action="store_false", help="no cosine")
    add("--weight-decay", type=float, default=0.0, help="(default: %(default)s)")
    add("--warm-up", type=float, default=0.3, help="share of the steps over which the weight on "
        "the KL rises (default: %(default)s)")  # fmt: skip
    add("--no-balance", dest="balance", action="store_false", help="one weight for all groups")
    add("--regularizer", type=float, default=1e-2, help="lambda of singular values and batch norm; "
        "0: none (default: %(default)s)")  # fmt: skip
    add("--every", type=int, default=2, metavar="EPOCHS", help="look at the groups (default: "
        "%(default)s)")  # fmt: skip
    add("--num-samples", type=int, default=100, metavar="K", help="to evaluate (default: "
        "%(default)s)")  # fmt: skip
    add("--num-test", type=int, default=300, metavar="N", help="(default: %(default)s)")
    add("--compile", action="store_true", help="compile the step: minutes, and a C++ compiler")
    add("--device", default="auto", help="auto, cpu, cuda (default: %(default)s)")
    add("--seed", type=int, default=0, help="(default: %(default)s)")
    add("--out", type=Path, default=Path("out/nvae"), metavar="FOLDER")
    add("--overwrite", action="store_true", help="replace files of an earlier run in --out")
    add("--quick", "--smoke", dest="quick", action="store_true",
        help="a check that all runs, in seconds")  # fmt: skip
    args = parser.parse_args(argv)
    for name in ("epochs", "batch_size", "every", "num_samples", "num_test"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be 1 or more")
    if not 0 <= args.warm_up <= 1:
        raise ValueError(f"--warm-up is a share of the steps, in [0, 1], got {args.warm_up}")
    if args.quick:
        args.channels, args.epochs, args.every = 4, 2, 1
        args.batch_size, args.num_samples, args.num_test = 256, 20, 30
    if args.device != "cuda":
        torch.set_num_threads(1)  # small steps gain nothing from a second
    return args


if __name__ == "__main__":
    reporting.run(main)
