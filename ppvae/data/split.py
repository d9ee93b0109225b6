"""`Split`: one part of a data set, and how it is binarised."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Binarize = Literal["dynamic", "static"]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    r"""One part (train, valid or test) of a data set.

    With `binarize`, `values` are grey levels :math:`g \in [0, 1]` and the model sees
    :math:`x_{nd} \sim \mathrm{Bernoulli}(g_{nd})`, drawn from a generator of its own: a function
    of `(seed, epoch)` and of nothing else, so the global random state is neither read nor moved.
    Epoch 0 is drawn on the CPU wherever the values are, so `x` is the same on every device;
    later epochs are drawn where the values are, so on CUDA they differ from those of the CPU.

    Args:
        values: `(N, *event)`, the rows as stored: grey levels in [0, 1] if `binarize` is set, else
            what the model sees.
        y: `(N,)` int64 labels in 0..C-1, `(N, D)` float conditions, or None.
        binarize: "dynamic" (a fresh draw each epoch), "static" (one draw for good) or None.
        seed: of the binarisation, 0 or more.
        supervised: whether a batch is `(x, y)` instead of `(x,)`.
        missing: `(D_missing,)` positions in a flat row that become `x`; None for all.
            `quadrants` sets it and `visible`.
        visible: `(D_visible,)` positions in a flat row that become `y`; None to leave `y` alone.

    Raises:
        ValueError: lengths differ, `binarize` is unknown, grey levels leave [0, 1], `seed`
            is negative, or `supervised` is set without `y`.

    Source: dynamic binarisation as in Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519.

    >>> split = Split(torch.full((1000, 4), 0.3), binarize="dynamic")
    >>> bool((split.draw(1) == split.draw(1)).all()), bool((split.draw(1) == split.draw(2)).all())
    (True, False)
    """

    values: Tensor
    y: Tensor | None = None
    binarize: Binarize | None = None
    seed: int = 0
    supervised: bool = False
    missing: Tensor | None = None
    visible: Tensor | None = None

    def __post_init__(self) -> None:
        check_binarize(self.binarize)
        if self.seed < 0:
            raise ValueError(f"seed={self.seed}: give 0 or more")
        if self.y is not None and len(self.y) != len(self.values):
            raise ValueError(
                f"y has {len(self.y)} rows and values {len(self.values)}: give one y per row"
            )
        if self.supervised and self.y is None:
            raise ValueError("supervised=True needs y, and y is None: give labels or conditions")
        if self.binarize is not None:
            check_unit_interval(self.values, f"values (binarize={self.binarize!r})")

    @cached_property
    def x(self) -> Tensor:
        """What the model sees, `(N, *event)`; with binarisation the draw of epoch 0, kept.

        Evaluate on this: it does not change.

        >>> from ppvae import data
        >>> data.load("digits").test.x.unique()
        tensor([0., 1.])
        """
        return _columns(self._rows(0), self.missing)

    def draw(self, epoch: int) -> Tensor:
        """What the model sees in one epoch, `(N, *event)`.

        Args:
            epoch: 0, 1, 2, ...; epoch 0 is `x`.

        Returns:
            A fresh seeded draw for "dynamic" binarisation; `x` otherwise.

        >>> from ppvae import data
        >>> train = data.load("digits").train
        >>> torch.equal(train.draw(0), train.x), torch.equal(train.draw(1), train.x)
        (True, False)
        """
        return self.batch(epoch)[0]

    def batch(self, epoch: int) -> tuple[Tensor, ...]:
        """What the model is called with in one epoch: `(x,)`, or `(x, y)` when supervised.

        Args:
            epoch: 0, 1, 2, ...

        >>> from ppvae import data
        >>> [tuple(t.shape) for t in data.load("digits").supervised().train.batch(3)]
        [(1297, 64), (1297,)]
        """
        if self.binarize != "dynamic" or epoch == 0:
            return self.args
        rows = self._rows(epoch)
        x = _columns(rows, self.missing)
        if not self.supervised:
            return (x,)
        # the visible pixels must come from the same draw as the missing ones
        y = self.y if self.visible is None else _columns(rows, self.visible)
        assert y is not None
        return (x, y)

    @property
    def args(self) -> tuple[Tensor, ...]:
        """What the model is called with in evaluation: `(x,)`, or `(x, y)` when supervised.

        >>> from ppvae import data
        >>> len(data.load("digits").test.args)
        1
        """
        if self.supervised:
            assert self.y is not None
            return (self.x, self.y)
        return (self.x,)

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on `device`.

        >>> Split(torch.zeros(2, 3)).to("cpu").values.device
        device(type='cpu')
        """
        moved = {
            name: None if tensor is None else tensor.to(device)
            for name, tensor in {
                "y": self.y,
                "missing": self.missing,
                "visible": self.visible,
            }.items()
        }
        return replace(self, values=self.values.to(device), **moved)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        y = None if self.y is None else tuple(self.y.shape)
        return (
            f"Split(values={tuple(self.values.shape)}, y={y}, binarize={self.binarize!r}, "
            f"seed={self.seed}, supervised={self.supervised})"
        )

    def _rows(self, epoch: int) -> Tensor:
        """Whole rows as the model would see them, before `missing` and `visible` pick columns."""
        if self.binarize is None:
            return self.values
        device = torch.device("cpu") if epoch == 0 else self.values.device
        # SeedSequence mixes the pair, so that neighbouring seeds and epochs share no stream
        mixed = np.random.SeedSequence([self.seed, epoch]).generate_state(1, np.uint64)[0]
        generator = torch.Generator(device).manual_seed(int(mixed))
        # float32 whatever the dtype of the values, so that the draw does not depend on it
        uniform = torch.rand(
            self.values.shape, generator=generator, device=device, dtype=torch.float32
        )
        return uniform.lt_(self.values.to(device)).to(self.values)


def _columns(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows[:, index]


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: use {', '.join(map(repr, choices))}")


def check_binarize(binarize: object) -> None:
    """Raise ValueError unless `binarize` is "dynamic", "static" or None."""
    check_choice("binarize", binarize, (*get_args(Binarize), None))


def check_unit_interval(values: Tensor, name: str) -> None:
    """Raise ValueError unless all values lie in [0, 1]."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(
            f"{name} must lie in [0, 1], and range from {low:g} to {high:g}: rescale them (divide "
            "8-bit pixels by 255)"
        )
