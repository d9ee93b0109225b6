"""Which heads the columns of data could have, and how well each does without a latent."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.conditionals.continuous import (
    Affine,
    Beta,
    ContinuousBernoulli,
    Gamma,
    Laplace,
    LogNormal,
    StudentT,
    VonMises,
)
from ppvae.conditionals.counts import NegativeBinomial, Poisson, ZeroInflated
from ppvae.conditionals.heads import Bernoulli, Categorical, Conditional, Normal
from ppvae.conditionals.levels import DiscretizedLogistic
from ppvae.data.arrays import numbers
from ppvae.data.frames import is_frame, numeric
from ppvae.distributions.supports import heads_that_fit

MAX_VALUES, MAX_ROWS = 200_000, 2000  # that are looked at
MAX_CLASSES = 20
MAX_SINGLE = 30  # of more columns, those of one kind are one entry
Make = Callable[[nn.Module], Conditional]


@dataclass(frozen=True)
class Candidates:
    """The heads that a column, or the columns of one kind, could have.

    Attributes:
        kind: what the values are.
        columns: names of the columns.
        reason: what in the values speaks for or against a candidate.
        scores: nats per value of held-out rows, by candidate, the mean over the columns; each
            column has its own constant parameters. Larger is better, among candidates of one kind.
        by_column: the same for each column, ``(D,)``.
    """

    kind: str
    columns: tuple[str, ...]
    reason: str
    scores: dict[str, float]
    by_column: dict[str, Tensor]

    def __str__(self) -> str:
        more = f" and {len(self.columns) - 3} more" if len(self.columns) > 3 else ""
        lines = [f"{', '.join(self.columns[:3])}{more}: {self.kind}"]
        lines += [f"  {self.reason}"] if self.reason else []
        lines += [f"  {name:<32}{score:9.2f}" for name, score in self.scores.items()]
        return "\n".join(lines)


class Suggestions(tuple[Candidates, ...]):
    """:class:`Candidates` by column or by kind of column; printed, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        head = "candidates, and nats per held-out value without a latent (larger is better)"
        return "\n".join([head, *map(str, self)])

    __repr__ = __str__


def suggest(split: Any, names: Sequence[str] | None = None, seed: int = 0) -> Suggestions:
    """Name heads whose support holds the data, with reasons and held-out scores.

    Nothing is chosen: the scores are of constant parameters, one set for each column, and a
    latent explains some of what they leave. A large difference is worth heeding, as between
    ``Poisson`` and ``NegativeBinomial``; a small one says little.

    Args:
        split: a :class:`ppvae.data.Split` or the data set that it is the ``train`` of, a frame, or
            values ``(N, ...)``. Every fifth row of a random order is held out; of large data some
            rows are looked at, and where values are missing (``missing="mask"``; NaN in a frame or
            an array) each column's observed ones.
        names: of the columns; their numbers, or a frame's own, if None.
        seed: of the order of the rows.

    Returns:
        One entry for each column; of more than 30, one for all columns of a kind.

    Raises:
        TypeError: no numbers, or several arrays.
        ValueError: fewer than ten rows, or values of a column, names of another number than
            columns, or infinite values.

    Example:
        >>> counts = torch.poisson(torch.tensor([1.0, 9.0]).repeat(250)).reshape(500, 1)
        >>> suggest(counts)[0].kind, list(suggest(counts)[0].scores)
        ('counts', ['Poisson', 'NegativeBinomial', 'ZeroInflated(NegativeBinomial)', ...])
    """
    split = getattr(split, "train", split)  # of a data set
    if is_frame(split):
        names = list(split.columns) if names is None else names
        array = numeric(split, "the frame")
    elif isinstance(split, tuple):
        raise TypeError(
            "suggest looks at one array, and was given several: give x alone, NaN where it is "
            "missing, or a part of data.from_arrays(x, y, missing='mask')"
        )
    else:
        array = numbers(getattr(split, "x", split), "split")
    x = torch.from_numpy(array.astype(float))
    observed = getattr(split, "observed", None)
    observed = ~x.isnan() if observed is None else observed.cpu()
    x = torch.where(observed, x, 0.0).reshape(len(x), -1)
    observed = observed.reshape(x.shape)
    labels = tuple(str(name) for name in (names if names is not None else range(x.shape[1])))
    if (
        len(x) < 10
        or observed.sum(0).min() < 10
        or len(labels) != x.shape[1]
        or not x.isfinite().all()
    ):
        raise ValueError(
            f"suggest needs ten finite values in each column and a name for each, and got x "
            f"{tuple(x.shape)} with {int((~x.isfinite()).sum())} infinite values, at least "
            f"{int(observed.sum(0).min())} that are not missing, and {len(labels)} names"
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x = x[order[: min(MAX_ROWS, max(200, MAX_VALUES // x.shape[1]))]]
    observed = observed[order[: len(x)]]
    gaps = not bool(observed.all())
    groups: dict[tuple[str, int], list[int]] = {}
    for column, values in enumerate(x.unbind(1)):
        values = values[observed[:, column]]
        constant = bool((values == values[0]).all())
        kind = "constant" if constant else heads_that_fit(values)[0]
        alone = gaps or (len(labels) <= MAX_SINGLE and not constant)
        single = column if alone else -1
        groups.setdefault((kind, single), []).append(column)
    return Suggestions(
        _candidates(kind, x[observed[:, at].all(1)][:, at], [labels[i] for i in at])
        for (kind, _), at in groups.items()
    )


def _candidates(kind: str, x: Tensor, names: list[str]) -> Candidates:
    if kind == "constant":
        return Candidates(kind, tuple(names), "leave them out: they have no density", {}, {})
    held, train = x[::5], x[torch.arange(len(x)) % 5 != 0]
    found = {}
    for name, (make, given) in _heads(kind, x, train).items():
        found[name] = _held_out(make, given, train, held)
    means = {name: terms.mean().item() for name, terms in found.items()}
    return Candidates(kind, tuple(names), _reason(kind, x), means, found)


def _heads(kind: str, x: Tensor, train: Tensor) -> dict[str, tuple[Make, dict[str, Any]]]:
    """Makers of the candidates, started near the data: by their units, or by an offset."""
    mean, sd = train.mean(0), train.std(0)
    by_mean = {"offset": mean.clamp(min=1e-3).log().expand(len(x), -1)}
    unit = torch.where(sd > 0, sd, torch.ones_like(sd))

    def scaled(head: Any, loc: Any = mean, scale: Tensor = unit) -> tuple[Make, dict[str, Any]]:
        return lambda net: Affine(head(net), loc, scale), {}

    real = {name: scaled(head) for name, head in _REAL.items()}
    low, high = int(x.min()), int(x.max())
    levels = partial(DiscretizedLogistic, num_levels=max(high - low + 1, 2), low=low)
    if kind == "0 and 1":
        return {"Bernoulli": (Bernoulli, {})}
    if kind == "counts":
        heads: dict[str, tuple[Make, dict[str, Any]]] = {
            "Poisson": (Poisson, by_mean),
            "NegativeBinomial": (NegativeBinomial, by_mean),
            "ZeroInflated(NegativeBinomial)": (
                lambda net: ZeroInflated(NegativeBinomial(net)),
                by_mean,
            ),
        }
        if high < MAX_CLASSES:
            heads["Categorical"] = partial(Categorical, num_classes=high + 1), {}
        return heads | ({"DiscretizedLogistic": (levels, {})} if high < 1000 else {})
    if kind == "whole numbers of either sign":
        return {"DiscretizedLogistic": (levels, {})} if high - low < 1000 else real
    if kind == "positive numbers":
        medians = train.log().mean(0).exp()
        ratio = {"LogNormal": scaled(LogNormal, 0.0, medians), "Gamma": scaled(Gamma, 0.0, mean)}
        return ratio | real
    if kind.startswith("numbers"):
        inside = {"ContinuousBernoulli": (ContinuousBernoulli, {}), "Normal": real["Normal"]}
        return inside | ({"Beta": (Beta, {})} if "ends" not in kind else {})
    if low >= -4 and high <= 3 and bool((x.abs() <= math.pi).all()):
        return real | {"VonMises, if these are angles": (VonMises, {})}
    return real


_REAL = {"Normal": Normal, "Laplace": Laplace, "StudentT": StudentT}


class _Constant(nn.Module):
    """The same outputs for every row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.outputs = nn.Parameter(torch.zeros(width, dtype=torch.double))

    def forward(self, rows: Tensor) -> Tensor:
        """Outputs ``(N, width)``."""
        return self.outputs.expand(len(rows), -1)


def _held_out(make: Make, given: dict[str, Any], train: Tensor, held: Tensor) -> Tensor:
    """Nats per held-out value of each column, parameters by maximum likelihood."""
    width = make(nn.Identity()).num_outputs(train.shape[1])
    head = make(_Constant(width)).double()

    def terms(x: Tensor) -> Tensor:
        cut = {name: value[: len(x)] for name, value in given.items()}
        each: Tensor = head(x, **cut).base_dist.log_prob(x)
        return each.mean(0)

    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = -terms(train).sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        return terms(held)


def _reason(kind: str, x: Tensor) -> str:
    """What in the values speaks for or against a candidate, for columns of one kind."""
    mean, variance = x.mean(0), x.var(0)
    if kind == "counts":
        ratio = (variance / mean).median().item()
        zeros, expected = (x == 0).double().mean().item(), (-mean).exp().mean().item()
        text = f"variance / mean {ratio:.2f} (Poisson: 1), "
        text += f"zeros {zeros:.1%} (Poisson: {expected:.1%})"
        sums = x.sum(1)
        same = x.shape[1] > 1 and bool((sums == sums[0]).all())
        shares = "; all rows have the same sum: Multinomial, DirichletMultinomial"
        return text + (shares if same else "")
    if kind == "positive numbers":
        skew = (((x.log() - x.log().mean(0)) / x.log().std(0)) ** 3).mean().item()
        return f"sd / mean {(variance.sqrt() / mean).median():.2f}, skewness of the log {skew:.2f}"
    if "ends" in kind:
        ends = ((x == 0) | (x == 1)).double().mean().item()
        return f"{ends:.1%} are 0 or 1, where a Beta density is 0 or infinite"
    if kind == "real numbers":
        kurtosis = (((x - mean) / variance.sqrt()) ** 4).mean().item()
        return f"kurtosis {kurtosis:.2f} (normal: 3; larger: outliers)"
    return ""
