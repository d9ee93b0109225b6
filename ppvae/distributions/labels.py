"""Class labels that are known for some rows: observed there, latent elsewhere, in one batch."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import Categorical
from torch import Tensor
from torch.distributions import kl_divergence, register_kl

UNKNOWN = -1


class PartlyKnown(Categorical):
    """What :func:`partly_known` returns: certain of a class where it is known.

    Args:
        logits: normalised, ``(..., C)``; 0 at a known class and -inf at all others.
        known_log_prob: ``(...)``, the log-probability of a known class; 0 where it is not known.
    """

    def __init__(
        self, logits: Tensor, known_log_prob: Tensor, validate_args: bool | None = None
    ) -> None:
        self.known_log_prob = known_log_prob
        super().__init__(logits=logits, validate_args=validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob: Tensor = super().log_prob(value) + self.known_log_prob
        return log_prob

    def expand(self, batch_shape: Any, _instance: Any = None) -> PartlyKnown:
        shape = torch.Size(batch_shape)
        logits = self.logits.expand(shape + self.logits.shape[-1:])
        return PartlyKnown(logits, self.known_log_prob.expand(shape), validate_args=False)


@register_kl(Categorical, PartlyKnown)
def _(q: Any, p: Any) -> Tensor:
    plain = Categorical(logits=p.logits, validate_args=False)
    return kl_divergence(q, plain) - p.known_log_prob


@register_kl(PartlyKnown, PartlyKnown)
def _(q: Any, p: Any) -> Tensor:
    # of two that are certain of one class nothing is left but how probable that was
    plain = Categorical(logits=q.logits, validate_args=False)
    return kl_divergence(plain, p) + q.known_log_prob


def partly_known(categorical: Any, y: Tensor | None, prior: bool = False) -> Any:
    r"""A class that is known for some rows of a batch, and latent in the others.

    .. math:: q(y = c) = \begin{cases} 1[c = y_n] \\ q_n(c) \end{cases}\qquad
              p(y = c) = \begin{cases} \pi_c\, 1[c = y_n] & y_n \text{ known} \\
              \pi_c & y_n = -1 \end{cases}

    The first is for the guide; the second, with ``prior=True``, for the model, at a site of the
    same name. Both are to be enumerated, ``infer={"enumerate": "parallel"}``, or both drawn. A row
    with a known class then has the log-weights of p(x, y), another one those of p(x), whatever the
    bound, and nothing in a compiled graph depends on which rows these are. Of the second the
    probabilities of a known row sum to p(y) and not to 1, since the label is data.

    Args:
        categorical: a ``pyro.distributions.Categorical`` over C classes, of batch shape ``(N,)`` or
            ``()``.
        y: whole numbers ``(N,)``: 0 to C - 1, or -1 where the class is not known; None: nowhere.
        prior: whether ``categorical`` is the model's p(y).

    Raises:
        TypeError: ``categorical`` is no ``Categorical``.
        ValueError: labels that are not integers ``(N,)``; with validation on, others than -1 to
            C - 1. (Without, such a row has p(x, y) = 0, which no entry point takes.)

    Source: Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative
    Models, 2014, equations 6 and 7, in one batch.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> classes = dist.Categorical(torch.tensor([0.2, 0.5, 0.3]))
        >>> y = torch.tensor([2, -1])
        >>> every = torch.arange(3).unsqueeze(-1)
        >>> partly_known(classes, y).log_prob(every).exp().T.round(decimals=4)
        tensor([[0.0000, 0.0000, 1.0000],
                [0.2000, 0.5000, 0.3000]])
        >>> partly_known(classes, y, prior=True).log_prob(every).exp().T.round(decimals=4)
        tensor([[0.0000, 0.0000, 0.3000],
                [0.2000, 0.5000, 0.3000]])
    """
    if not isinstance(categorical, Categorical):
        raise TypeError(
            f"partly_known is of a pyro.distributions.Categorical, got a "
            f"{type(categorical).__name__}"
        )
    if y is None:
        return categorical
    logits = categorical.logits
    num_classes = logits.shape[-1]
    check_labels(y, num_classes, values=bool(categorical._validate_args))
    match = y.unsqueeze(-1) == torch.arange(num_classes, device=y.device)
    logits = logits.expand(*torch.broadcast_shapes(logits.shape[:-1], y.shape), num_classes)
    zero, known = logits.new_zeros(()), match.any(-1)
    offset = torch.where(match, logits, zero).sum(-1) if prior else zero.expand(known.shape)
    if prior:  # what is no class has probability 0
        offset = torch.where(known | (y == UNKNOWN), offset, -math.inf)
    certain = torch.where(match, zero, -math.inf)
    logits = torch.where(known.unsqueeze(-1), certain, logits)
    return PartlyKnown(logits, offset, validate_args=False)


def one_hot(y: Tensor, like: Tensor) -> Tensor:
    """Classes ``(...)`` as vectors ``(..., C)``, of the number and dtype of logits ``like``."""
    every = torch.arange(like.shape[-1], device=y.device)
    return (y.unsqueeze(-1) == every).to(like.dtype)


def check_labels(y: Tensor, num_classes: int, values: bool = True) -> None:
    """Raise ``ValueError`` unless labels are integers ``(N,)``, and from -1 to C - 1.

    Args:
        y: the labels.
        num_classes: C.
        values: whether to look at them, which waits for the device.
    """
    if y.dim() != 1 or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise ValueError(
            f"labels must be integers of shape (N,), -1 where unknown, got {y.dtype} of shape "
            f"{tuple(y.shape)}: use y.long() for floats (-1 for NaN), y.argmax(-1) for one-hot rows"
        )
    if not values or not y.numel():
        return
    low, high = int(y.min()), int(y.max())
    if low < UNKNOWN or high >= num_classes:
        raise ValueError(
            f"labels must lie in 0 .. {num_classes - 1}, or be -1 where unknown, got {low} .. "
            f"{high}: number the classes from 0, or set num_classes={high + 1}"
        )
