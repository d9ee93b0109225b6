"""``Dataset``: train, validation and test parts, and what is known about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from html import escape
from typing import Literal, get_args

import torch
from torch import Tensor

from ppvae.data.split import Split, check_choice

Support = Literal["binary", "unit_interval", "real", "counts", "integer"]


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Train, validation and test parts, and what is known about them.

    Args:
        name: of the data set.
        train: the part to fit.
        valid: the part to choose by.
        test: the part to report on.
        support: what a value the model sees can be: "binary" {0, 1}, "unit_interval" [0, 1],
            "real", "counts" 0, 1, 2, ..., or "integer" (whole numbers of either sign). All are
            stored in the default float dtype, which networks and Pyro's distributions take.
        shape: natural shape of one row, such as (1, 28, 28), also when rows are stored flat. After
            ``quadrants`` it is the shape of the whole image.
        num_classes: C for labels 0..C-1, else None.
        source: citation, address, and how the data were split.
        log_evidence: exact log p(x), ``(N, D) -> (N,)`` in nats, where it is known; else None.
        vocabulary: for counts of words, the words in the order of the columns; else None.

    Raises:
        ValueError: an unknown support.

    Example:
        >>> from ppvae import data
        >>> digits = data.load("digits")
        >>> digits.support, digits.shape, digits.num_classes, len(digits.train)
        ('binary', (1, 8, 8), 10, 1297)
    """

    name: str
    train: Split
    valid: Split
    test: Split
    support: Support
    shape: tuple[int, ...]
    num_classes: int | None = None
    source: str = ""
    log_evidence: Callable[[Tensor], Tensor] | None = None
    vocabulary: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        check_choice("support", self.support, get_args(Support))

    def supervised(self) -> Dataset:
        """The same data set whose batches are ``(x, y)``.

        Raises:
            ValueError: the data set has no ``y``.

        Example:
            >>> from ppvae import data
            >>> [tuple(t.shape) for t in data.load("digits").supervised().test.args]
            [(300, 64), (300,)]
        """
        if self.train.y is None:
            raise ValueError(f"data set {self.name!r} has no y: load one with labels, or pass y")
        return self.map_splits(lambda split: replace(split, supervised=True))

    def to(self, device: torch.device | str) -> Dataset:
        """The same data set with its tensors on ``device``.

        Example:
            >>> from ppvae import data
            >>> data.load("digits").to("cpu").train.x.device
            device(type='cpu')
        """
        return self.map_splits(lambda split: split.to(device))

    def map_splits(self, change: Callable[[Split], Split]) -> Dataset:
        """The same data set with ``change`` applied to train, valid and test.

        Example:
            >>> from ppvae import data
            >>> other = data.load("digits").map_splits(lambda split: replace(split, seed=1))
            >>> other.test.seed
            1
        """
        return replace(
            self, train=change(self.train), valid=change(self.valid), test=change(self.test)
        )

    def join(self, x: Tensor, y: Tensor) -> Tensor:
        """Put the parts made by ``quadrants`` together again, for plotting.

        Args:
            x: ``(..., D_missing)`` missing pixels, such as ``(K, N, D_missing)`` predictions.
            y: ``(..., D_visible)`` visible pixels; leading dimensions broadcast with those of x.

        Returns:
            Images, ``(..., *shape)``.

        Raises:
            ValueError: the data set did not come from ``quadrants``, or widths do not match.

        Example:
            >>> from ppvae import data
            >>> halves = data.quadrants(data.load("digits"), missing=2)
            >>> tuple(halves.join(*halves.test.args).shape)
            (300, 1, 8, 8)
        """
        missing, visible = self.train.missing, self.train.visible
        if missing is None or visible is None:
            raise ValueError(f"{self.name!r} was not cut: join is for what data.quadrants returns")
        if x.shape[-1:] != missing.shape or y.shape[-1:] != visible.shape:
            wanted = f"{len(missing)} (missing pixels) and {len(visible)} (visible pixels)"
            raise ValueError(
                f"last sizes of x and y are {x.shape[-1]} and {y.shape[-1]}, not {wanted}"
            )
        leading = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        image = x.new_empty(*leading, len(missing) + len(visible))
        image[..., missing.to(x.device)] = x
        image[..., visible.to(x.device)] = y.to(x)
        return image.reshape(*leading, *self.shape)

    def __repr__(self) -> str:
        binarisation = {
            "dynamic": "dynamic (fresh seeded draw each epoch; .x is that of epoch 0)",
            "static": "static (one seeded draw)",
            None: "none",
        }[self.train.binarize]
        classes = "" if self.num_classes is None else f", {self.num_classes} classes"
        exact = "" if self.log_evidence is None else ", log p(x) known"
        widths = ", ".join(str(tuple(t.shape[1:])) for t in self.train.args)
        names = "x, y" if self.train.supervised else "x"
        names += "" if self.train.observed is None else ", observed"
        sizes = f"train {len(self.train):,}, valid {len(self.valid):,}, test {len(self.test):,}"
        return (
            f"Dataset {self.name!r}: support {self.support}, shape {self.shape}{classes}{exact}\n"
            f"  rows          {sizes}\n"
            f"  a batch is    ({names}) with rows of shape {widths}\n"
            f"  binarisation  {binarisation}\n"
            f"  source        {self.source}"
        )

    def _repr_html_(self) -> str:
        head, *lines = repr(self).splitlines()
        rows = (
            f"<tr><th>{escape(line[2:16].strip())}</th>"
            f"<td style='text-align: left'>{escape(line[16:])}</td></tr>"
            for line in lines
        )
        return f"<p>{escape(head)}</p><table>{''.join(rows)}</table>"
