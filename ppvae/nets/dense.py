"""Networks of vectors, and what makes any network take leading dimensions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers

Activation = Callable[[], nn.Module]


def _broadcast_leading(inputs: Sequence[Tensor], event_dims: Sequence[int]) -> torch.Size:
    try:
        return torch.broadcast_shapes(
            *(x.shape[: x.dim() - n] for x, n in zip(inputs, event_dims, strict=True))
        )
    except RuntimeError:
        cure = "a condition is (N, D), one row per datapoint, to go with z of (K, N, Z)"
        raise ValueError(f"inputs {_shapes(inputs)} do not broadcast: {cure}") from None


def _shapes(inputs: Sequence[Tensor]) -> str:
    return ", ".join(str(tuple(x.shape)) for x in inputs)


def concatenate(*inputs: Tensor) -> Tensor:
    """Broadcast inputs over their leading dimensions and join them along the last one.

    Args:
        *inputs: tensors ``(..., D_i)``.

    Returns:
        A tensor ``(..., sum D_i)``; a single input is returned as it is.

    Raises:
        ValueError: if the leading dimensions do not broadcast.

    Example:
        >>> concatenate(torch.zeros(5, 10, 2), torch.ones(10, 3)).shape
        torch.Size([5, 10, 5])
    """
    if len(inputs) == 1:
        return inputs[0]
    leading = _broadcast_leading(inputs, (1,) * len(inputs))
    return torch.cat([x.expand(leading + x.shape[-1:]) for x in inputs], dim=-1)


class FlatBatch(nn.Module):
    """What :func:`flat_batch` returns.

    Args:
        net: any module whose layers want exactly one batch dimension.
        event_dim: as in :func:`flat_batch`.
    """

    @takes_numbers
    def __init__(self, net: nn.Module, event_dim: int | tuple[int, ...] = 1) -> None:
        super().__init__()
        self.net = net
        self.event_dim = event_dim

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Fold the leading dimensions, call the network, restore them."""
        event_dims = self.event_dim
        if isinstance(event_dims, int):
            event_dims = (event_dims,) * len(inputs)
        leading = _broadcast_leading(inputs, event_dims)
        flat = []
        for x, n in zip(inputs, event_dims, strict=True):
            event = x.shape[x.dim() - n :]
            # Not Size.numel(): that bakes the batch size into a symbolic trace.
            flat.append(x.expand(leading + event).reshape((math.prod(leading), *event)))
        out = self.net(*flat)
        if isinstance(out, tuple):
            return tuple(y.reshape(leading + y.shape[1:]) for y in out)
        return out.reshape(leading + out.shape[1:])


@takes_numbers
def flat_batch(net: nn.Module, event_dim: int | tuple[int, ...] = 1) -> FlatBatch:
    """Make any module see exactly one batch dimension.

    Without it a convolution fails on ``z (K, N, Z)``, and ``BatchNorm1d(K or N)`` runs and silently
    normalises over the wrong axis.

    Args:
        net: a module ``(B, ...) -> (B, ...)``, or to a tuple of those. Several inputs are
            broadcast over their leading dimensions and handed over separately.
        event_dim: how many trailing dimensions are not leading ones: 1 for vectors, 3 for images;
            a tuple gives one number per input.

    Raises:
        ValueError: when called, if the leading dimensions of several inputs do not broadcast.

    Example:
        >>> net = flat_batch(nn.Sequential(nn.Linear(2, 7), nn.BatchNorm1d(7)))
        >>> net(torch.randn(5, 7, 2)).shape
        torch.Size([5, 7, 7])
    """
    return FlatBatch(net, event_dim)


class MLP(nn.Module):
    """Layers on vectors: concatenates its inputs and checks their width.

    Args:
        layers: a module ``(..., in_features) -> (..., out)``.
        in_features: the total width of the inputs.
    """

    def __init__(self, layers: nn.Module, in_features: int) -> None:
        super().__init__()
        self.layers = layers
        self.in_features = in_features

    def forward(self, *inputs: Tensor) -> Tensor:
        """From inputs ``(..., D_i)``, with ``sum D_i = in_features``, to ``(..., out)``."""
        x = concatenate(*inputs)
        if x.shape[-1] != self.in_features:
            seen = f"{_shapes(inputs)} of total width {x.shape[-1]}"
            cure = f"make it of width {x.shape[-1]}, or flatten images with x.flatten(-3)"
            raise ValueError(f"this network takes width {self.in_features}, but saw {seen}: {cure}")
        return self.layers(x)


def hidden_layers(
    width: int, activation: Activation, norm: type[nn.Module] | None, dropout: float = 0.0
) -> list[nn.Module]:
    """What follows a linear or convolutional layer: normalisation, activation, dropout."""
    layers = [] if norm is None else [norm(width)]
    made = activation() if callable(activation) and not isinstance(activation, nn.Module) else None
    if not isinstance(made, nn.Module):
        raise TypeError(f"activation makes a module, as nn.Tanh does, got {activation!r}")
    layers.append(made)
    return [*layers, nn.Dropout(dropout)] if dropout else layers


@takes_numbers(sizes=1)
def mlp(
    *sizes: int,
    activation: Activation = nn.ReLU,
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> MLP:
    r"""A multi-layer perceptron: linear layers with activations between them.

    .. math:: h_0 = x, \quad h_{l+1} = a(W_l h_l + b_l), \quad y = W_L h_L + b_L

    Args:
        *sizes: widths, input first, output last; at least two.
        activation: makes an activation module, as ``nn.Tanh`` or ``lambda: nn.LeakyReLU(0.1)``.
        batch_norm: normalise each hidden layer before its activation; see the module's note.
        dropout: probability in [0, 1) of dropping a hidden unit.

    Raises:
        ValueError: for fewer than two sizes; when called, for inputs of the wrong total width.

    Example:
        >>> mlp(16, 256, 64)(torch.zeros(5, 10, 16)).shape
        torch.Size([5, 10, 64])
        >>> mlp(16, 256, 64)(torch.zeros(5, 10, 13), torch.zeros(10, 3)).shape
        torch.Size([5, 10, 64])
    """
    if len(sizes) < 2:
        raise ValueError(f"mlp needs two sizes, input and output, as mlp(16, 64); got {sizes}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is a probability in [0, 1), got {dropout}")
    layers: list[nn.Module] = []
    norm = nn.BatchNorm1d if batch_norm else None
    for width_in, width_out in pairwise(sizes[:-1]):
        layers.append(nn.Linear(width_in, width_out))
        layers += hidden_layers(width_out, activation, norm, dropout)
    layers.append(nn.Linear(sizes[-2], sizes[-1]))
    net: nn.Module = nn.Sequential(*layers)  # nn.Linear folds leading dimensions by itself
    return MLP(FlatBatch(net) if batch_norm else net, sizes[0])


class Residual(nn.Sequential):
    """x + layers(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


@takes_numbers(width_in=1, hidden=1, width_out=1, blocks=0)
def residual(
    width_in: int,
    hidden: int,
    width_out: int,
    blocks: int = 2,
    activation: Activation = nn.ReLU,
    batch_norm: bool = False,
    dropout: float = 0.0,
) -> MLP:
    r"""A residual MLP with pre-activation blocks (He et al., 2016, arXiv:1603.05027).

    .. math:: h_0 = W_0 x, \quad h_{l+1} = h_l + B_l\, a(A_l\, a(h_l)), \quad y = W_1 a(h_L)

    Args:
        width_in: total width of the inputs.
        hidden: width of every block.
        width_out: width of the output.
        blocks: number of residual blocks.
        activation: makes an activation module.
        batch_norm: normalise before each activation; see the module's note.
        dropout: probability in [0, 1) of dropping a unit after each activation.

    Raises:
        ValueError: when called, for inputs of the wrong total width.

    Example:
        >>> residual(16, 32, 8)(torch.zeros(5, 10, 16)).shape
        torch.Size([5, 10, 8])
    """
    norm = nn.BatchNorm1d if batch_norm else None

    def half() -> list[nn.Module]:
        return [*hidden_layers(hidden, activation, norm, dropout), nn.Linear(hidden, hidden)]

    net: nn.Module = nn.Sequential(
        nn.Linear(width_in, hidden),
        *(Residual(*half(), *half()) for _ in range(blocks)),
        *hidden_layers(hidden, activation, norm, dropout),
        nn.Linear(hidden, width_out),
    )
    return MLP(FlatBatch(net) if batch_norm else net, width_in)


class Constant(nn.Module):
    """Learned numbers, whatever it is called with: a network of nothing, for an unconditional law.

    Args:
        width: how many.

    Example:
        >>> from ppvae import posteriors
        >>> net = Constant(2 * 3 + 1)
        >>> flow = posteriors.Flow(net, posteriors.coupling(3, context_dim=1), 3, context_dim=1)
        >>> flow().sample((5,)).shape  # a prior p(z)
        torch.Size([5, 3])
    """

    @takes_numbers(width=1)
    def __init__(self, width: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(width))

    def forward(self, *inputs: Tensor) -> Tensor:
        """The numbers, ``(width,)``."""
        return self.value


class OneHot(nn.Module):
    r"""Integer labels ``(...,)`` to one-hot vectors ``(..., num_classes)`` of the default dtype.

    .. math:: y \mapsto (1[y = 0], \dots, 1[y = C - 1])

    It is one comparison, so it can be traced, takes enumerated labels, and copies nothing to the
    host. A label outside the range therefore gives a row of zeros: :meth:`check` your data once.

    Args:
        num_classes: number of classes, ``C >= 1``.

    Raises:
        ValueError: when called with labels that are not integers.

    Example:
        >>> OneHot(3)(torch.tensor([0, 2]))
        tensor([[1., 0., 0.],
                [0., 0., 1.]])
    """

    classes: Tensor
    one: Tensor

    @takes_numbers(num_classes=1)
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("classes", torch.arange(num_classes), persistent=False)
        self.register_buffer("one", torch.ones(()), persistent=False)  # follows .double(), .half()

    def forward(self, y: Tensor) -> Tensor:
        """From labels ``(...,)`` to ``(..., num_classes)``."""
        if y.is_floating_point() or y.dtype == torch.bool:
            cure = "use y.long(), or leave OneHot out if y is one-hot already"
            raise ValueError(f"OneHot takes integer labels, got {y.dtype}: {cure}")
        return (y.unsqueeze(-1) == self.classes).to(self.one.dtype)

    def check(self, y: Tensor) -> None:
        """Check a data set's labels; it reads their values, so call it once, not in a loop.

        Args:
            y: labels of shape ``(N,)``, integers in ``0 .. num_classes - 1``.

        Raises:
            ValueError: for another rank, dtype or range.

        Example:
            >>> OneHot(3).check(torch.tensor([0, 2]))
        """
        if y.dim() != 1 or y.is_floating_point() or y.dtype == torch.bool:
            seen = f"{y.dtype} of shape {tuple(y.shape)}"
            cure = "y.squeeze(-1) for (N, 1), y.argmax(-1) for one-hot rows, y.long() for floats"
            raise ValueError(f"labels must be integers of shape (N,), got {seen}: use {cure}")
        low, high = (int(y.min()), int(y.max())) if y.numel() else (0, 0)
        if not 0 <= low <= high < self.num_classes:
            cure = f"renumber them, or set num_classes={high + 1}"
            raise ValueError(
                f"labels must lie in 0 .. {self.num_classes - 1}, got {low} .. {high}: {cure}"
            )
