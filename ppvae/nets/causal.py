"""Networks of code maps that see, at each place, only the places before it in raster order.

From numbers ``(B, h, w)`` and feature maps ``(B, C, h', w')`` to logits ``(B, K, h, w)``: those at
a place say which code stands there, given the codes left of it and in the rows above.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from ppvae.arguments import takes_numbers


class Unigram(nn.Module):
    """The same learned logits at each place, whatever the others hold.

    Args:
        num_codes: K.

    Example:
        >>> net = Unigram(5)
        >>> net(torch.zeros(2, 3, 4, dtype=torch.long)).shape
        torch.Size([2, 5, 3, 4])
        >>> net.initialise(torch.tensor([[0, 0, 0, 1]]))  # counts of 3.5, 1.5 and three of 0.5
        >>> net.logits.softmax(0)
        tensor([0.5385, 0.2308, 0.0769, 0.0769, 0.0769], grad_fn=<SoftmaxBackward0>)
    """

    @takes_numbers(num_codes=1)
    def __init__(self, num_codes: int) -> None:
        super().__init__()
        self.num_codes = num_codes
        self.logits = nn.Parameter(torch.zeros(num_codes))

    @torch.no_grad()
    def initialise(self, indices: Tensor) -> None:
        """Set it to how often each number occurs, half a count added: its maximum likelihood."""
        counts = torch.bincount(indices.flatten(), minlength=len(self.logits)) + 0.5
        self.logits.copy_((counts / counts.sum()).log())

    def forward(self, indices: Tensor, *context: Tensor) -> Tensor:
        """Logits ``(B, K, h, w)``."""
        return self.logits.reshape(1, -1, 1, 1).expand(len(indices), -1, *indices.shape[1:])


class CausalGRU(nn.Module):
    r"""A recurrent network along the raster: the small one.

    .. math:: h_i = \operatorname{GRU}(h_{i-1}, [\epsilon(c_{i-1}), \epsilon(c_{i-w}), \pi_i, a_i])

    It reads the code before and the code above, the place itself and the context there.

    Args:
        num_codes: K.
        shape: ``(h, w)`` of the code map.
        hidden: width of the state.
        embedding: width of a code's and of a place's embedding.
        context_dim: total channels of the feature maps that it is called with, 0 for none.

    Raises:
        ValueError: when called, a map of another shape, a context of other channels.

    Example:
        >>> net = CausalGRU(5, (3, 4), hidden=16)
        >>> net(torch.zeros(2, 3, 4, dtype=torch.long)).shape
        torch.Size([2, 5, 3, 4])
    """

    @takes_numbers(num_codes=1, hidden=1, embedding=1, context_dim=0)
    def __init__(
        self,
        num_codes: int,
        shape: tuple[int, int],
        hidden: int = 128,
        embedding: int = 32,
        context_dim: int = 0,
    ) -> None:
        super().__init__()
        self.num_codes, self.shape, self.context_dim = num_codes, tuple(shape), context_dim
        self.embedding = nn.Embedding(num_codes + 1, embedding)
        self.place = nn.Parameter(0.1 * torch.randn(shape[0] * shape[1], embedding))
        self.gru = nn.GRU(3 * embedding + context_dim, hidden, batch_first=True)
        self.head = nn.Linear(hidden, num_codes)

    def forward(self, indices: Tensor, *context: Tensor) -> Tensor:
        """Logits ``(B, K, h, w)``."""
        if indices.shape[1:] != self.shape:
            raise ValueError(
                f"CausalGRU is for code maps of shape {self.shape}, and saw "
                f"{tuple(indices.shape[1:])}: give it the shape of the encoder's output"
            )
        flat = indices.flatten(1)
        before = [self.embedding(self._shifted(flat, by)) for by in (1, self.shape[1])]
        parts = [*before, self.place.expand(len(flat), -1, -1)]
        if (features := stretched(context, self.shape, self.context_dim)) is not None:
            parts.append(features.flatten(2).transpose(1, 2))
        hidden, _ = self.gru(torch.cat(parts, -1))
        return self.head(hidden).transpose(1, 2).unflatten(2, self.shape)

    def _shifted(self, flat: Tensor, by: int) -> Tensor:
        """Each place has the number of ``by`` places before it, or that for "outside"."""
        return pad(flat, (by, 0), value=self.num_codes)[:, : flat.shape[1]]


class CausalConv(nn.Module):
    r"""A gated convolutional network, in two stacks without a blind spot: the full one.

    One stack sees all rows above, the other the places to the left and what the first one sees in
    its row; each layer is gated, :math:`\tanh(a) \, \sigma(b)`, and added to what goes in.

    Args:
        num_codes: K.
        channels: width of both stacks.
        layers: number of gated layers, >= 1; each sees one row, and one place on each side, more.
        context_dim: total channels of the feature maps that it is called with, 0 for none.

    Raises:
        ValueError: no layers; when called, a context of other channels.

    Source: van den Oord et al., Conditional Image Generation with PixelCNN Decoders, 2016,
    sections 2.1 and 2.2.

    Example:
        >>> net = CausalConv(5, channels=16, layers=2, context_dim=3)
        >>> net(torch.zeros(2, 3, 4, dtype=torch.long), torch.zeros(2, 3, 1, 1)).shape
        torch.Size([2, 5, 3, 4])
    """

    @takes_numbers(num_codes=1, channels=1, layers=1, context_dim=0)
    def __init__(
        self, num_codes: int, channels: int = 64, layers: int = 6, context_dim: int = 0
    ) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"CausalConv needs layers >= 1, got {layers}")
        self.num_codes, self.context_dim = num_codes, context_dim
        self.embedding = nn.Embedding(num_codes, channels)
        gates = 2 * channels

        def many(width: int, width_out: int, kernel: tuple[int, int] = (1, 1)) -> nn.ModuleList:
            return nn.ModuleList(nn.Conv2d(width, width_out, kernel) for _ in range(layers))

        self.above = many(channels, gates, kernel=(2, 3))
        self.left = many(channels, gates, kernel=(1, 2))
        self.down = many(gates, gates)  # from the first stack to the second
        self.out = many(channels, channels)
        self.context = many(context_dim, 2 * gates) if context_dim else None
        self.head = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(channels, channels, 1),
            nn.ReLU(),
            nn.Conv2d(channels, num_codes, 1),
        )

    def forward(self, indices: Tensor, *context: Tensor) -> Tensor:
        """Logits ``(B, K, h, w)``."""
        x = self.embedding(indices).movedim(-1, 1)
        features = stretched(context, tuple(indices.shape[1:]), self.context_dim)
        # moved by one place, so that no place sees itself; from there on the kernels end at it
        rows, places = pad(x, (0, 0, 1, 0))[:, :, :-1], pad(x, (1, 0))[..., :-1]
        for i, (above, left, down, out) in enumerate(
            zip(self.above, self.left, self.down, self.out, strict=True)
        ):
            seen = above(pad(rows, (1, 1, 1, 0)))
            own = left(pad(places, (1, 0))) + down(seen)
            if self.context is not None:
                for_rows, for_places = self.context[i](features).chunk(2, 1)
                seen, own = seen + for_rows, own + for_places
            rows, places = rows + _gated(seen), places + out(_gated(own))
        logits: Tensor = self.head(places)
        return logits


def _gated(x: Tensor) -> Tensor:
    values, gates = x.chunk(2, 1)
    return values.tanh() * gates.sigmoid()


def stretched(context: tuple[Tensor, ...], shape: tuple[int, ...], dim: int) -> Tensor | None:
    """Feature maps of any size as one map of a shape, ``(B, dim, h, w)``; None where dim is 0."""
    flat = [tuple(features.shape) for features in context if features.dim() < 4]
    if flat:
        raise ValueError(
            f"a prior over code maps takes feature maps (N, C, h, w), and was called with {flat[0]}"
            ": give features of rows as features[..., None, None]"
        )
    channels = [features.shape[1] for features in context]
    if dim and not context:
        raise ValueError(
            f"a network with context_dim={dim} was called without feature maps: give the model its "
            "condition, or the network context_dim=0"
        )
    if sum(channels) != dim:
        raise ValueError(
            f"a network with context_dim={dim} was called with feature maps of {channels} "
            f"channels: make it context_dim={sum(channels)}"
        )
    if not context:
        return None
    return torch.cat([interpolate(features, size=shape, mode="nearest") for features in context], 1)
