r"""Several levels of latents: the bottom-up guide and the ladder, side by side.

    python examples/hierarchical.py                                   # three levels, digits
    python examples/hierarchical.py --latents 16 8 4 2 --hidden 64 48 32 16
    python examples/hierarchical.py --net conv --latents 4 4 4        # levels are feature maps
    python examples/hierarchical.py --data mnist --epochs 200 --warm-up 40 --batch-size 256 \
        --latents 64 32 16 8 4 --hidden 512 256 128 64 32             # the paper's widths; hours

Both have the same generative networks. The KL and the active units of every level are followed
over training, then the pair is fine-tuned with K = 10. Sources: Burda et al. 2016 (fine-tuning
bound); Sønderby et al. 2016 (ladder, batch norm, warm-up).
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pyro
import reporting
import torch
from matplotlib import pyplot as plt
from pyro import poutine
from torch import Tensor, nn

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, models, nets, plots
from ppvae.models.hierarchical import softplus_variance
from ppvae.pairs import evaluation_mode, seeded
from ppvae.train.fit import resolve_device

FILES = ["levels.csv", "levels_over_training.csv", "levels.png", "images.png"]
Pair = tuple[models.Hierarchical, dict[str, ppvae.Program]]

# ------------------------------------------------------------------------------ the pairs


def mlp_pair(pixels: int, latents: Sequence[int], hidden: Sequence[int], norm: bool) -> Pair:
    """z1, ..., zL are vectors; two hidden layers between neighbours, as wide as the level above."""

    def dense(*widths: int) -> nn.Module:
        layers: list[nn.Module] = []
        for a, b in pairwise(widths):
            layers += [nn.Linear(a, b), *[nn.BatchNorm1d(b)] * norm, nn.LeakyReLU(0.1)]
        return nets.flat_batch(nn.Sequential(*layers))

    def normal(width: int, size: int, before: nn.Module | None = None) -> nn.Module:
        linear = [nn.Linear(width, 2 * size), *[nn.BatchNorm1d(2 * size)] * norm]
        net = nets.flat_batch(nn.Sequential(*linear))
        net = net if before is None else nn.Sequential(before, net)
        return conditionals.Normal(net, positive=softplus_variance)

    first = dense(latents[0], hidden[0], hidden[0])
    model = models.Hierarchical(
        conditionals.Bernoulli(nn.Sequential(first, nn.Linear(hidden[0], pixels))),
        levels=[
            normal(h, below, dense(above, h, h))  # p(z below | z above)
            for (below, above), h in zip(pairwise(latents), hidden[1:], strict=True)
        ],
        latent_dim=latents[-1],
    )
    blocks = [dense(a, h, h) for a, h in pairwise([pixels, *hidden])]
    heads = [normal(h, z) for h, z in zip(hidden, latents, strict=True)]
    given = [pixels, *latents[:-1]]  # what q of each level is computed from, bottom-up
    up = [normal(h, z, dense(a, h, h)) for a, h, z in zip(given, hidden, latents, strict=True)]
    return model, {
        "bottom-up": guides.BottomUp(model, up),
        "ladder": guides.Ladder(model, blocks, heads),
    }


def conv_pair(
    shape: Sequence[int], latents: Sequence[int], hidden: Sequence[int], norm: bool
) -> Pair:
    """z1, ..., zL are feature maps, each half the size of the one below it; numbers of channels."""
    sizes = [tuple(shape[1:])]
    for _ in latents:
        sizes.append(tuple(-(-side // 2) for side in sizes[-1]))

    def conv(a: int, b: int, stride: int = 1, to: tuple[int, ...] | None = None) -> nn.Module:
        layers = [] if to is None else [nn.Upsample(size=to)]
        layers += [nn.Conv2d(a, b, 3, stride, 1), *[nn.BatchNorm2d(b)] * norm, nn.LeakyReLU(0.1)]
        return nets.flat_batch(nn.Sequential(*layers), event_dim=3)

    def normal(width: int, size: int, before: nn.Module | None = None) -> nn.Module:
        linear = [nn.Conv2d(width, 2 * size, 1), *[nn.BatchNorm2d(2 * size)] * norm]
        net = nets.flat_batch(nn.Sequential(*linear), event_dim=3)
        net = net if before is None else nn.Sequential(before, net)
        return conditionals.Normal(net, event_dim=3, positive=softplus_variance)

    last = nets.flat_batch(nn.Conv2d(hidden[0], shape[0], 3, padding=1), event_dim=3)
    first = conv(latents[0], hidden[0], to=sizes[0])
    model = models.Hierarchical(
        conditionals.Bernoulli(nn.Sequential(first, last), event_dim=3),
        levels=[
            normal(h, below, conv(above, h, to=size))
            for (below, above), h, size in zip(
                pairwise(latents), hidden[1:], sizes[1:-1], strict=True
            )
        ],
        prior=conditionals.StandardNormal((latents[-1], *sizes[-1])),
    )
    blocks = [conv(a, h, 2) for a, h in pairwise([shape[0], *hidden])]
    heads = [normal(h, z) for h, z in zip(hidden, latents, strict=True)]
    given = [shape[0], *latents[:-1]]
    up = [normal(h, z, conv(a, h, 2)) for a, h, z in zip(given, hidden, latents, strict=True)]
    return model, {
        "bottom-up": guides.BottomUp(model, up),
        "ladder": guides.Ladder(model, blocks, heads),
    }


# ------------------------------------------------------------------------------ the run


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    out = reporting.open_folder(args.out, args.overwrite, FILES)
    device = resolve_device(args.device)
    dataset = data.load(args.data)
    if args.net == "conv":
        dataset = images(dataset)
    if len(dataset.train) < 10_000:
        torch.set_num_threads(1)  # the networks are small
    x = dataset.test.x[: args.num_test].to(device)
    steps = -(-len(dataset.train) // args.batch_size) * args.warm_up
    beta = elbo.LinearWarmup(steps) if args.warm_up else 1.0

    finals, courses, trained = [], {}, {}
    for name in args.guides:
        pyro.set_rng_seed(args.seed)
        build = mlp_pair if args.net == "mlp" else conv_pair
        size = x.shape[1] if args.net == "mlp" else x.shape[1:]
        model, by_name = build(size, args.latents, args.hidden, not args.no_batch_norm)
        guide = by_name[name]
        print(f"\n{name}: {model.shapes}, on {device}", flush=True)
        course = Levels(x[:500], args.every)
        train = functools.partial(
            fit, model, guide, dataset, device=device, course=course, args=args
        )
        train(elbo.ELBO(beta=beta), epochs=args.epochs, lr=args.lr)
        finals.append({"pair": name, **evaluate(model, guide, x, args)})
        if args.fine_tune:
            train(elbo.IWELBO(num_particles=10), epochs=args.fine_tune, lr=args.lr / 4)
            finals.append({"pair": f"{name}, fine-tuned", **evaluate(model, guide, x, args)})
        courses[name], trained[name] = course.table(), (model, guide)

    table = pd.DataFrame(finals).set_index("pair")
    print(f"\n{len(x)} test rows of {dataset.name} [nats per datapoint, larger is better; KL and "
          "active units by level]\n")  # fmt: skip
    print(table.to_string(float_format="%.2f"))
    table.to_csv(out / "levels.csv")
    pd.concat(courses, names=["pair", "row"]).to_csv(out / "levels_over_training.csv")
    draw_levels(courses, args, out)
    draw_images(trained, dataset, x, out)
    reporting.print_files(out, FILES)


def fit(
    model: models.Hierarchical, guide: ppvae.Program, dataset: data.Dataset, bound: elbo.Estimator,
    epochs: int, lr: float, device: torch.device, course: Levels, args: argparse.Namespace,
) -> None:  # fmt: skip
    """The parameters of model and guide, each once; those of the levels are both's."""
    adam = functools.partial(torch.optim.Adam, lr=lr)
    svi = ppvae.SVI(model, guide, adam, bound, compile=args.compile)
    ppvae.fit(svi, dataset, epochs=epochs, batch_size=args.batch_size, device=device,
              seed=args.seed, callbacks=[course], progress=False)  # fmt: skip


class Levels(ppvae.Callback):
    """KL and active units of every level, while it trains."""

    def __init__(self, x: Tensor, every: int) -> None:
        self.x, self.every, self.epoch = x, every, 0
        self.rows: list[dict[str, float]] = []

    def on_epoch_end(self, svi: ppvae.SVI, history: ppvae.History) -> None:
        self.epoch += 1  # of both stages
        if self.epoch == 1 or self.epoch % self.every == 0:
            self.rows.append({"epoch": self.epoch, **by_level(svi.model, svi.guide, self.x)})

    def table(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)


@torch.no_grad()
def by_level(model: Any, guide: Any, x: Tensor) -> dict[str, float]:
    """KL(q || p) of each level in nats, and how many of its units have more than 0.01.

    A mean of log q - log p over 25 draws for each row. The variance of posterior means, which
    counts active units of a single level, would count units here that only follow those above.
    """
    kl = {}
    with evaluation_mode(model, guide), seeded(0, x):
        weights = ppvae.log_weights(model, guide, x, num_particles=25)
    for name in sorted(weights.latents):
        q, p = weights.guide_trace.nodes[name], weights.model_trace.nodes[name]
        log_ratio = [site["fn"].base_dist.log_prob(site["value"]) for site in (q, p)]
        kl[name] = (log_ratio[0] - log_ratio[1]).mean((0, 1))  # particles and rows: one per unit
    totals = {f"KL {name}": rate.sum().item() for name, rate in kl.items()}
    return totals | {f"active {name}": int((rate > 0.01).sum()) for name, rate in kl.items()}


def evaluate(
    model: models.Hierarchical, guide: ppvae.Program, x: Tensor, args: argparse.Namespace
) -> dict[str, float]:
    found = diagnostics.log_evidence(
        model, guide, x, num_particles=args.num_samples, seed=args.seed
    )
    bounds = {"ELBO": found.elbo.mean().item(), "log p(x)": found.mean, "se": found.mean_se}
    return bounds | by_level(model, guide, x)


def images(dataset: data.Dataset) -> data.Dataset:
    """Flat pixels to (1, H, W): data.load's rows may be either."""
    if len(dataset.train.args[0].shape) == 4:
        return dataset
    return data.load(dataset.name, flatten=False)


# ------------------------------------------------------------------------------ pictures


def draw_levels(courses: dict[str, pd.DataFrame], args: argparse.Namespace, out: Path) -> None:
    figure, axes = plt.subplots(2, len(courses), figsize=(5.2 * len(courses), 6.4), squeeze=False,
                                sharex=True, sharey="row")  # fmt: skip
    for column, (name, table) in zip(axes.T, courses.items(), strict=True):
        for ax, what, unit in zip(
            column, ("KL", "active"), (" [nats]", " units, KL > 0.01 nats"), strict=True
        ):
            levels = {c.split()[1]: table[c].tolist() for c in table if c.startswith(f"{what} ")}
            plots.levels_over_training(table["epoch"].tolist(), levels, what + unit, ax)
            for end, text in ((args.warm_up, "end of warm-up"), (args.epochs, "K = 10")):
                if end and end < table["epoch"].max():
                    ax.axvline(end, color="black", lw=0.8, ls=":")
                    ax.annotate(text, (end, 0.97), xycoords=("data", "axes fraction"), ha="right",
                                va="top", rotation=90, rotation_mode="default", xytext=(-5, 0),
                                textcoords="offset points", fontsize="small",
                                bbox={"fc": "white", "lw": 0, "pad": 0.5})  # fmt: skip
        column[0].set(title=name, xlabel="")
    for row in axes:
        for ax in row[1:]:
            ax.set_ylabel("")
    figure.savefig(out / "levels.png")
    plt.close(figure)


@torch.no_grad()
def draw_images(trained: dict[str, Any], dataset: data.Dataset, x: Tensor, out: Path) -> None:
    """What each level decides: levels from l on as the guide has them, those below drawn anew."""
    rows, names = [x[:10]], ["data"]
    for name, (model, guide) in trained.items():
        model.eval(), guide.eval()
        sites = poutine.trace(guide).get_trace(x[:10]).nodes
        top = len(model.levels) + 1
        for lowest in range(1, top + 2):
            kept = {f"z{i}": sites[f"z{i}"]["value"] for i in range(lowest, top + 1)}
            drawn = poutine.trace(poutine.condition(model, data=kept)).get_trace(size=10)
            rows.append(model.likelihood(drawn.nodes["z1"]["value"]).mean)
            what = f"z{lowest}" if lowest == top else f"z{lowest}..z{top}"
            names.append(f"{name}: {what if lowest <= top else 'nothing'} kept")
    stacked = torch.stack([row.cpu().flatten(1) for row in rows])
    ax = plots.class_grid(stacked, dataset.shape, class_names=names)
    reporting.save(ax, out / "images.png")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--data", choices=["digits", "mnist"], default="digits", help="(default: digits)")
    add("--net", choices=["mlp", "conv"], default="mlp", help="(default: mlp)")
    add("--guides", nargs="+", choices=["bottom-up", "ladder"], default=["bottom-up", "ladder"],
        help="(default: both)")  # fmt: skip
    add("--latents", type=int, nargs="+", metavar="Z", help="sizes of z1, z2, ...: units, or "
        "channels of feature maps (default: 16 8 4; conv: 4 4 4)")  # fmt: skip
    add("--hidden", type=int, nargs="+", metavar="H", help="hidden units or channels of each level "
        "(default: 64 32 16, and halved for each further level; conv: 16)")  # fmt: skip
    add("--no-batch-norm", action="store_true")
    add("--epochs", type=int, default=40, help="(default: 40)")
    add("--warm-up", type=int, default=15, metavar="EPOCHS",
        help="the weight on the KL rises to 1 over these; 0: none (default: 15)")  # fmt: skip
    add("--fine-tune", type=int, default=5, metavar="EPOCHS",
        help="with IWELBO of K = 10 on the same pair (default: 5)")  # fmt: skip
    add("--lr", type=float, default=2e-3, help="Adam's (default: 0.002)")
    add("--batch-size", type=int, default=64, help="(default: 64)")
    add("--every", type=int, default=5, metavar="EPOCHS", help="look at levels (default: 5)")
    add("--num-samples", type=int, default=500, metavar="K", help="to evaluate (default: 500)")
    add("--num-test", type=int, default=1000, metavar="N", help="(default: 1000)")
    add("--compile", action="store_true", help="each step as one graph")
    add("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    add("--seed", type=int, default=0, help="(default: 0)")
    add("--out", type=Path, default=Path("out/hierarchical"), metavar="FOLDER")
    add("--overwrite", action="store_true")
    add("--quick", "--smoke", dest="quick", action="store_true",
        help="a check that all runs, in seconds")  # fmt: skip
    args = parser.parse_args(argv)
    conv = args.net == "conv"
    args.latents = args.latents or ([4, 4, 4] if conv else [16, 8, 4])
    levels = range(len(args.latents))
    args.hidden = args.hidden or [16 if conv else max(64 >> level, 8) for level in levels]
    if len(args.hidden) != len(args.latents):
        raise ValueError(
            f"--hidden has {len(args.hidden)} entries and --latents {len(args.latents)}: give one "
            "of each for every level"
        )
    if args.quick:
        args.epochs, args.warm_up, args.fine_tune, args.every = 2, 1, 1, 1
        args.num_samples, args.num_test = 30, 40
    return args


if __name__ == "__main__":
    reporting.run(main)
