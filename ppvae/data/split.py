"""``Split``: one part of a data set, and how it is binarised."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from ppvae.arguments import require_dense, single

Binarize = Literal["dynamic", "static"]


@dataclass(frozen=True, eq=False, repr=False)
class Split:
    r"""One part (train, valid or test) of a data set.

    With ``binarize``, ``values`` are grey levels :math:`g \in [0, 1]` and the model sees
    :math:`x_{nd} \sim \mathrm{Bernoulli}(g_{nd})`, drawn from a generator of its own: a function
    of ``(seed, epoch)`` and of nothing else, so the global random state is neither read nor moved.
    Epoch 0 is drawn on the CPU wherever the values are, so ``x`` is the same on every device;
    later epochs are drawn where the values are, so on CUDA they differ from those of the CPU.

    Args:
        values: ``(N, *event)``, the rows as stored: grey levels in [0, 1] if ``binarize`` is set,
            else what the model sees.
        y: ``(N,)`` int64 labels in 0..C-1, ``(N, D)`` float conditions, or None.
        binarize: "dynamic" (a fresh draw each epoch), "static" (one draw for good) or None.
        seed: of the binarisation, 0 or more.
        supervised: whether a batch is ``(x, y)`` instead of ``(x,)``.
        missing: ``(D_missing,)`` positions in a flat row that become ``x``; None for all.
            ``quadrants`` sets it and ``visible``.
        visible: ``(D_visible,)`` positions in a flat row that become ``y``; None to leave ``y``
            alone.
        rows: ``(N,)`` which rows of ``values`` are this part, for values that stay where they are,
            such as a file mapped into memory: ``ppvae.fit`` then reads a batch when it needs it,
            and binarises it on the device. None: ``values`` are the rows, and move with ``to``.
        observed: which values are there, bool of the shape of ``values``: then it is the last
            argument of a batch, ``(x, observed)`` or ``(x, y, observed)``; None: all are.

    Raises:
        TypeError: ``observed`` is not bool; no tensor, or one without a dense block of numbers.
        ValueError: lengths differ, ``observed`` has another shape or stands beside ``rows``,
            ``binarize`` is unknown, grey levels leave [0, 1], ``seed`` is negative, or
            ``supervised`` is set without ``y``.

    Source: dynamic binarisation as in Burda, Grosse, Salakhutdinov (2016), arXiv:1509.00519.

    Example:
        >>> part = Split(torch.full((1000, 4), 0.3), binarize="dynamic")
        >>> torch.equal(part.draw(1), part.draw(1)), torch.equal(part.draw(1), part.draw(2))
        (True, False)
    """

    values: Tensor
    y: Tensor | None = None
    binarize: Binarize | None = None
    seed: int = 0
    supervised: bool = False
    missing: Tensor | None = None
    visible: Tensor | None = None
    rows: Tensor | None = None
    observed: Tensor | None = None

    def __post_init__(self) -> None:
        check_binarize(self.binarize)
        object.__setattr__(self, "seed", single(self.seed))
        check_at_least(0, seed=self.seed)
        held = {"y": self.y, "rows": self.rows, "observed": self.observed}
        for name, tensor in {"values": self.values, **held}.items():
            if tensor is None and name != "values":
                continue
            is_tensor = isinstance(tensor, Tensor) or not hasattr(tensor, "index_select")
            if is_tensor and require_dense(name, tensor).dim() == 0:
                raise ValueError(f"{name} is a single number: give rows, {name}[None]")
        if self.y is not None and len(self.y) != len(self):
            raise ValueError(f"y has {len(self.y)} rows and values {len(self)}: give one y per row")
        if self.supervised and self.y is None:
            raise ValueError("supervised=True needs y, and y is None: give labels or conditions")
        if self.observed is not None:
            if self.observed.dtype != torch.bool:
                raise TypeError(f"observed is {self.observed.dtype}: give bool, ~x.isnan()")
            if self.observed.shape != self.values.shape or self.rows is not None:
                seen = f"observed has shape {tuple(self.observed.shape)}, values "
                seen += (
                    f"{tuple(self.values.shape)} {'with' if self.rows is not None else 'no'} rows"
                )
                raise ValueError(f"{seen}: give one bool for each value, and no rows")
        if self.rows is not None and self.binarize == "static":
            raise ValueError("binarize='static' keeps one draw of all rows: use 'dynamic' here")
        if self.binarize is not None and self.rows is None:  # else from_arrays has checked them
            check_unit_interval(self.values, f"values (binarize={self.binarize!r})")

    @cached_property
    def x(self) -> Tensor:
        """What the model sees, ``(N, *event)``; with binarisation the draw of epoch 0, kept.

        Evaluate on this: it does not change. With ``rows`` it is read into memory.

        Example:
            >>> from ppvae import data
            >>> data.load("digits").test.x.unique()
            tensor([0., 1.])
        """
        return _columns(self._whole_rows(0), self.missing)

    def draw(self, epoch: int) -> Tensor:
        """What the model sees in one epoch, ``(N, *event)``.

        Args:
            epoch: 0, 1, 2, ...; epoch 0 is ``x``.

        Returns:
            A fresh seeded draw for "dynamic" binarisation; ``x`` otherwise.

        Example:
            >>> from ppvae import data
            >>> train = data.load("digits").train
            >>> torch.equal(train.draw(0), train.x), torch.equal(train.draw(1), train.x)
            (True, False)
        """
        return self.batch(epoch)[0]

    def batch(self, epoch: int) -> tuple[Tensor, ...]:
        """What the model is called with in one epoch: ``(x,)``, or ``(x, y)`` when supervised.

        With ``observed``, that comes last.

        Args:
            epoch: 0, 1, 2, ...

        Raises:
            ValueError: for later epochs of a part with ``rows``.

        Example:
            >>> from ppvae import data
            >>> [tuple(t.shape) for t in data.load("digits").supervised().train.batch(3)]
            [(1297, 64), (1297,)]
        """
        if self.binarize != "dynamic" or epoch == 0:
            return self.args
        if self.rows is not None:
            raise ValueError("with rows an epoch is binarised batch by batch: use read and present")
        return self._arguments(self._whole_rows(epoch), self.y)

    def read(self, index: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows as they are stored, and their ``y``, for ``present``: copies, on the host.

        They are read in the order of the file, and returned in that of ``index``.

        Args:
            index: ``(B,)`` which of the N rows of this part.

        Example:
            >>> values = torch.arange(10.0)[:, None]
            >>> part = Split(values, rows=torch.tensor([7, 5, 3]))
            >>> len(part), part.read(torch.tensor([2, 0]))[0].flatten()
            (3, tensor([3., 7.]))
        """
        stored = index if self.rows is None else self.rows[index]
        ascending, order = stored.sort()
        values = self.values.index_select(0, ascending)
        values = torch.empty_like(values).index_copy_(0, order, values)
        return values, None if self.y is None else self.y.index_select(0, index)

    def present(
        self, values: Tensor, y: Tensor | None, epoch: int, key: int = 0
    ) -> tuple[Tensor, ...]:
        """What the model is called with for rows from ``read``, wherever they have been moved.

        Args:
            values: ``(B, *event)``, of any dtype; cast to the default float dtype.
            y: ``(B,)`` or ``(B, D)``, or None.
            epoch: 0, 1, 2, ...
            key: tells the batches of an epoch apart: a draw is a function of (seed, epoch, key).

        Example:
            >>> part = Split(torch.full((4, 3), 0.5), binarize="dynamic", rows=torch.arange(4))
            >>> rows = part.read(torch.tensor([0, 2]))
            >>> torch.equal(part.present(*rows, 1, 7)[0], part.present(*rows, 1, 7)[0])
            True
        """
        values = values.to(torch.get_default_dtype())
        if self.binarize is not None:
            values = bernoulli(values, values.device, (self.seed, epoch, key))
        return self._arguments(values, y)

    @property
    def args(self) -> tuple[Tensor, ...]:
        """What the model is called with in evaluation: ``(x,)``, or ``(x, y)`` when supervised.

        Example:
            >>> from ppvae import data
            >>> len(data.load("digits").test.args)
            1
        """
        args = (self.x, cast(Tensor, self.y)) if self.supervised else (self.x,)
        return args if self.observed is None else (*args, self.observed)

    def to(self, device: torch.device | str) -> Split:
        """The same split with its tensors on ``device``; with ``rows`` it stays where it is.

        Example:
            >>> Split(torch.zeros(2, 3)).to("cpu").values.device
            device(type='cpu')
        """
        if self.rows is not None:
            return self
        parts = ("values", "y", "missing", "visible", "observed")
        tensors = {name: getattr(self, name) for name in parts}
        moved = {name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None}
        return replace(self, **moved)

    def __len__(self) -> int:
        return len(self.values if self.rows is None else self.rows)

    def __repr__(self) -> str:
        y = None if self.y is None else tuple(self.y.shape)
        return (
            f"Split(values={(len(self), *self.values.shape[1:])}, y={y}, "
            f"binarize={self.binarize!r}, seed={self.seed}, supervised={self.supervised}"
            f"{'' if self.rows is None else ', read in batches'}"
            f"{'' if self.observed is None else f', {self.observed.double().mean():.0%} observed'})"
        )

    def _whole_rows(self, epoch: int) -> Tensor:
        """Rows as the model would see them, before ``missing`` and ``visible`` pick columns."""
        values = self.values
        if self.rows is not None:
            values = values.index_select(0, self.rows).to(torch.get_default_dtype())
        if self.binarize is None:
            return values
        device = torch.device("cpu") if epoch == 0 else values.device
        return bernoulli(values, device, (self.seed, epoch))

    def _arguments(self, whole_rows: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """``(x,)`` or ``(x, y)``; visible pixels come from the same draw as missing ones."""
        x = _columns(whole_rows, self.missing)
        last = () if self.observed is None else (self.observed,)
        if not self.supervised:
            return (x, *last)
        y = cast(Tensor, y) if self.visible is None else _columns(whole_rows, self.visible)
        return (x, y, *last)


def with_labels(split: Split, per_class: int, seed: int = 0) -> Split:
    """A part of which some rows of each class have their label, and all others -1: few labels.

    Its batches are ``(x, y)``. Which rows they are is a function of the seed alone. The part that
    was given has the labels still, to count errors by.

    Args:
        split: with labels ``y``, ``(N,)``, integers from 0; -1 where they are not known already.
        per_class: how many rows of each class keep their label, at least 1.
        seed: of the choice.

    Raises:
        ValueError: no labels, or fewer rows of a class than ``per_class``.
        TypeError: a data set or a tensor in the place of a part.

    Example:
        >>> from ppvae import data
        >>> train = with_labels(data.load("digits").train, per_class=3)
        >>> len(train), int((train.y >= 0).sum()), [t.dtype for t in train.args]
        (1297, 30, [torch.float32, torch.int64])
    """
    if not isinstance(split, Split):
        raise TypeError(
            f"split must be a part of a data set, as dataset.train, got {type(split).__name__}"
        )
    check_at_least(1, per_class=per_class)
    check_at_least(0, seed=seed)
    y = split.y
    if y is None or y.dim() != 1 or y.is_floating_point():
        seen = "None" if y is None else f"{y.dtype} of shape {tuple(y.shape)}"
        raise ValueError(f"split must have labels y, integers of shape (N,), and its y is {seen}")
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(int(seed))).to(y.device)
    kept = torch.full_like(y, -1)
    for label in y[y >= 0].unique().tolist():
        rows = order[y[order] == label]
        if len(rows) < per_class:
            raise ValueError(
                f"per_class={per_class}, and class {label} has {len(rows)} rows: give a smaller "
                "number, or more rows of it"
            )
        kept[rows[:per_class]] = label
    return replace(split, y=kept, supervised=True)


def binarised(
    splits: Iterable[Split], binarize: Binarize | None, seed: int
) -> tuple[Split, Split, Split]:
    """Train, valid and test, each with a seed of its own, so that their draws share no noise."""
    train, valid, test = (
        replace(split, binarize=binarize, seed=3 * seed + part) for part, split in enumerate(splits)
    )
    return train, valid, test


def bernoulli(probabilities: Tensor, device: torch.device, key: tuple[int, ...]) -> Tensor:
    """Draws that are a function of the key."""
    # SeedSequence mixes it, so that neighbouring seeds and epochs share no stream
    mixed = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    generator = torch.Generator(device).manual_seed(int(mixed))
    # float32 whatever the dtype of the values, so that the draw does not depend on it
    uniform = torch.rand(
        probabilities.shape, generator=generator, device=device, dtype=torch.float32
    )
    return uniform.lt_(probabilities.to(device)).to(probabilities)


def _columns(rows: Tensor, positions: Tensor | None) -> Tensor:
    return rows if positions is None else rows[:, positions.to(rows.device)]


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise ``ValueError`` unless ``value`` is one of ``choices``."""
    if not any(
        value is choice or (isinstance(value, str) and value == choice) for choice in choices
    ):
        raise ValueError(f"{name}={value!r} is unknown: use {', '.join(map(repr, choices))}")


def check_at_least(least: int, **arguments: int) -> None:
    """Raise ``ValueError`` unless every argument is ``least`` or more."""
    for name, value in arguments.items():
        if not isinstance(value, (int, np.integer)) or isinstance(value, (bool, np.timedelta64)):
            raise TypeError(f"{name}={value!r}: give a whole number, {least} or more")
        if not least <= value < 2**64:
            raise ValueError(f"{name}={value}: give {least} or more, of 64 bits")


def check_binarize(binarize: object) -> None:
    """Raise ``ValueError`` unless ``binarize`` is "dynamic", "static" or None."""
    check_choice("binarize", binarize, (*get_args(Binarize), None))


def check_unit_interval(values: Tensor, name: str) -> None:
    """Raise ``ValueError`` unless all values lie in [0, 1]."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        raise ValueError(f"{name} must lie in [0, 1], and range from {low:g} to {high:g}: rescale")
