"""Convolutional networks of images, from and to vectors and maps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ppvae.arguments import takes_numbers
from ppvae.nets.dense import MLP, Activation, FlatBatch, Residual, hidden_layers, mlp


def _halving(
    widths: Sequence[int], activation: Activation, batch_norm: bool, residual_blocks: int
) -> list[nn.Module]:
    """Convolutions from width to width, each of which halves height and width, rounding up."""
    layers: list[nn.Module] = []
    norm = nn.BatchNorm2d if batch_norm else None
    for before, width in pairwise(widths):
        layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
        layers += _residuals(width, residual_blocks, activation, norm)
        layers += hidden_layers(width, activation, norm)
    return layers


def _doubling(
    widths: Sequence[int], activation: Activation, batch_norm: bool, residual_blocks: int
) -> list[nn.Module]:
    """Transposed convolutions from width to width, each of which doubles height and width."""
    layers: list[nn.Module] = []
    norm = nn.BatchNorm2d if batch_norm else None
    for width, after in pairwise(widths):
        layers += _residuals(width, residual_blocks, activation, norm)
        layers += hidden_layers(width, activation, norm)
        layers.append(nn.ConvTranspose2d(width, after, 4, stride=2, padding=1))
    return layers


def _residuals(
    width: int, blocks: int, activation: Activation, norm: type[nn.Module] | None
) -> list[nn.Module]:
    def half() -> list[nn.Module]:
        conv = nn.Conv2d(width, width, 3, padding=1)
        return [*hidden_layers(width, activation, norm), conv]

    return [Residual(*half(), *half()) for _ in range(blocks)]


def _halved(size: int, times: int) -> int:
    return -(-size // 2**times)  # ceil, as a stride-2 convolution with kernel 3, padding 1 gives


class ConvEncoder(nn.Module):
    """What :func:`conv_encoder` returns.

    Args:
        features: a module ``(..., C, H, W) -> (..., F)``.
        head: a network of ``(..., F)`` and the context vectors.
        shape: the image shape ``(C, H, W)``.
    """

    def __init__(self, features: nn.Module, head: MLP, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.features = features
        self.head = head
        self.shape = tuple(shape)

    def forward(self, image: Tensor, *context: Tensor) -> Tensor:
        """From an image ``(..., C, H, W)`` and vectors ``(..., D_i)`` to ``(..., out_dim)``."""
        if image.shape[-3:] != self.shape:
            wanted = ", ".join(map(str, self.shape))
            seen = f"conv_encoder takes images (..., {wanted}), but saw {tuple(image.shape)}"
            flat = f"x.unflatten(-1, ({wanted})) for flat pixels"
            cure = f"x.movedim(-1, -3) for channels last, {flat}, x.unsqueeze(-3) for no channel"
            raise ValueError(f"{seen}; use {cure}")
        return self.head(self.features(image), *context)


@takes_numbers(out_dim=1, context_dim=0, residual_blocks=0)
def conv_encoder(
    out_dim: int,
    shape: tuple[int, int, int] = (1, 28, 28),
    channels: Sequence[int] = (32, 64),
    hidden: Sequence[int] = (256,),
    context_dim: int = 0,
    activation: Activation = nn.ReLU,
    batch_norm: bool = False,
    residual_blocks: int = 0,
) -> ConvEncoder:
    """A convolutional encoder: stride-2 convolutions, then an MLP on the features and the context.

    The image is encoded once, whatever the particles of the context: features ``(N, F)`` meet a
    context ``(K, N, D)`` only in the MLP.

    Args:
        out_dim: width of the output.
        shape: image shape ``(C, H, W)``, any ``H, W >= 1``.
        channels: output channels of each convolution; each halves ``H`` and ``W`` (rounding up).
        hidden: widths of the hidden layers between the features and the output.
        context_dim: total width of the extra vectors the encoder is called with.
        activation: makes an activation module.
        batch_norm: normalise before each activation; see the module's note.
        residual_blocks: residual blocks after each convolution.

    Raises:
        ValueError: when called, for an image of another shape (channels last, flat, no channel),
            or a context of another width.

    Example:
        >>> import torch
        >>> net = conv_encoder(32, shape=(1, 28, 20), context_dim=10)
        >>> net(torch.zeros(6, 1, 28, 20), torch.zeros(5, 6, 10)).shape
        torch.Size([5, 6, 32])
    """
    layers = _halving((shape[0], *channels), activation, batch_norm, residual_blocks)
    h, w = (_halved(size, len(channels)) for size in shape[1:])
    flat = (shape[0], *channels)[-1] * h * w
    head = mlp(flat + context_dim, *hidden, out_dim, activation=activation, batch_norm=batch_norm)
    features = FlatBatch(nn.Sequential(*layers, nn.Flatten()), event_dim=3)
    return ConvEncoder(features, head, shape)


class ConvDecoder(nn.Module):
    """What :func:`conv_decoder` returns.

    Args:
        stem: a network of the inputs to flat features ``(..., F)``.
        upsample: a module ``(..., F) -> (..., C, H', W')`` with ``H' >= H`` and ``W' >= W``.
        shape: the image shape ``(C, H, W)``; the surplus is cropped.
    """

    def __init__(self, stem: MLP, upsample: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.stem = stem
        self.upsample = upsample
        self.shape = tuple(shape)

    def forward(self, *inputs: Tensor) -> Tensor:
        """From vectors ``(..., D_i)`` to an image ``(..., C, H, W)``."""
        image = self.upsample(self.stem(*inputs))
        return image[..., : self.shape[1], : self.shape[2]]


@takes_numbers(in_dim=1, residual_blocks=0)
def conv_decoder(
    in_dim: int,
    shape: tuple[int, int, int] = (1, 28, 28),
    channels: Sequence[int] = (64, 32),
    hidden: Sequence[int] = (256,),
    activation: Activation = nn.ReLU,
    batch_norm: bool = False,
    residual_blocks: int = 0,
) -> ConvDecoder:
    """A convolutional decoder: an MLP, then stride-2 transposed convolutions, then a crop.

    Args:
        in_dim: total width of the inputs, as latent and condition.
        shape: the output shape ``(C, H, W)``, returned exactly for any ``H, W >= 1``. For a head
            that predicts two numbers per value, as ``conditionals.Normal(net, event_dim=3)``, give
            ``(2 * C, H, W)``.
        channels: input channels of each transposed convolution; each doubles ``H`` and ``W``.
        hidden: widths of the hidden layers between the inputs and the first feature map.
        activation: makes an activation module.
        batch_norm: normalise before each activation; see the module's note.
        residual_blocks: residual blocks before each transposed convolution.

    Raises:
        ValueError: for no channels; when called, for inputs of the wrong total width.

    Example:
        >>> import torch
        >>> conv_decoder(16, shape=(3, 9, 7))(torch.zeros(5, 10, 16)).shape
        torch.Size([5, 10, 3, 9, 7])
    """
    if not channels:
        raise ValueError("conv_decoder needs at least one channel width, as channels=(64, 32)")
    h, w = (_halved(size, len(channels)) for size in shape[1:])
    start = (channels[0], h, w)
    stem = mlp(in_dim, *hidden, channels[0] * h * w, activation=activation, batch_norm=batch_norm)
    layers = _doubling((*channels, shape[0]), activation, batch_norm, residual_blocks)
    return ConvDecoder(stem, FlatBatch(nn.Sequential(nn.Unflatten(1, start), *layers)), shape)


@takes_numbers(width_in=1, width_out=1, residual_blocks=0)
def downsample(
    width_in: int,
    width_out: int,
    channels: Sequence[int] = (32, 64),
    activation: Activation = nn.ReLU,
    batch_norm: bool = False,
    residual_blocks: int = 0,
) -> FlatBatch:
    """From an image or a map to a smaller map: stride-2 convolutions, then one of kernel 1.

    Args:
        width_in: channels of the input.
        width_out: channels of the output.
        channels: of each convolution, which halves height and width (rounding up).
        activation: makes an activation module.
        batch_norm: normalise before each activation; see the module's note.
        residual_blocks: residual blocks after each convolution.

    Example:
        >>> import torch
        >>> downsample(1, 16)(torch.zeros(5, 10, 1, 28, 28)).shape
        torch.Size([5, 10, 16, 7, 7])
    """
    layers = _halving((width_in, *channels), activation, batch_norm, residual_blocks)
    layers.append(nn.Conv2d((width_in, *channels)[-1], width_out, 1))
    return FlatBatch(nn.Sequential(*layers), event_dim=3)


@takes_numbers(width_in=1, width_out=1, residual_blocks=0)
def upsample(
    width_in: int,
    width_out: int,
    channels: Sequence[int] = (64, 32),
    activation: Activation = nn.ReLU,
    batch_norm: bool = False,
    residual_blocks: int = 0,
) -> FlatBatch:
    """From a map to a larger map or an image: a convolution, then transposed ones of stride 2.

    Args:
        width_in: channels of the input.
        width_out: channels of the output.
        channels: input channels of each transposed convolution, which doubles height and width.
        activation: makes an activation module.
        batch_norm: normalise before each activation; see the module's note.
        residual_blocks: residual blocks before each transposed convolution.

    Raises:
        ValueError: for no channels.

    Example:
        >>> import torch
        >>> upsample(16, 1)(torch.zeros(5, 10, 16, 7, 7)).shape
        torch.Size([5, 10, 1, 28, 28])
    """
    if not channels:
        raise ValueError("upsample needs at least one channel width, as channels=(64, 32)")
    first = nn.Conv2d(width_in, channels[0], 3, padding=1)
    layers = _doubling((*channels, width_out), activation, batch_norm, residual_blocks)
    return FlatBatch(nn.Sequential(first, *layers), event_dim=3)


class MergeMaps(nn.Module):
    """A network of several maps: they are stretched to the size of the first and concatenated.

    Args:
        net: from ``(..., C, h, w)``, C the total of channels.

    Example:
        >>> import torch
        >>> net = MergeMaps(downsample(4 + 3, 2, channels=(8,)))
        >>> net(torch.zeros(5, 4, 8, 8), torch.zeros(5, 3, 2, 2)).shape
        torch.Size([5, 2, 4, 4])
    """

    @takes_numbers
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, first: Tensor, *others: Tensor) -> Tensor:
        """From maps ``(..., C_i, h_i, w_i)``, whose leading dimensions broadcast."""
        size, leading = first.shape[-2:], first.shape[:-3]
        leading = torch.broadcast_shapes(leading, *(other.shape[:-3] for other in others))
        maps = [first]
        for other in others:
            flat = interpolate(other.reshape(-1, *other.shape[-3:]), size=size, mode="nearest")
            maps.append(flat.reshape(*other.shape[:-3], *flat.shape[1:]))
        merged: Tensor = self.net(torch.cat([m.expand(leading + m.shape[-3:]) for m in maps], -3))
        return merged


class PositionEmbedding(nn.Module):
    r"""A learned vector for each place of a map, added to what stands there.

    .. math:: y_{ij} = x_{ij} + \pi_{ij}, \qquad \pi_{ij} \sim \mathcal N(0, \sigma^2 I)
              \text{ at first}

    At the end of a VQ-VAE's encoder it gives places codes of their own: those that look alike, such
    as all that are black, do not share one, and a prior that knows the place knows most of the
    code. So codes are used alike, and yet cheap.

    Args:
        dim: channels.
        shape: ``(h, w)`` of the map.
        scale: sigma >= 0, beside the size of what it is added to: where it is much larger, a code
            says the place and little else.

    Raises:
        ValueError: a negative scale; when called, a map of another shape.

    Example:
        >>> import torch
        >>> net = nn.Sequential(downsample(1, 4, channels=(8,)), PositionEmbedding(4, (7, 7), 0.5))
        >>> black = net(torch.zeros(3, 1, 14, 14))
        >>> black.shape, len(black[0].flatten(1).T.unique(dim=0))  # 49 vectors that differ
        (torch.Size([3, 4, 7, 7]), 49)

    Source: Gehring et al., Convolutional Sequence to Sequence Learning, 2017, section 3.1.
    """

    @takes_numbers(dim=1, scale=0)
    def __init__(self, dim: int, shape: tuple[int, int], scale: float = 0.5) -> None:
        super().__init__()
        if not scale >= 0:
            raise ValueError(f"PositionEmbedding: scale must be >= 0, got {scale}")
        self.vectors = nn.Parameter(scale * torch.randn(dim, *shape))

    def forward(self, x: Tensor) -> Tensor:
        """From ``(..., D, h, w)`` to the same."""
        if x.shape[-3:] != self.vectors.shape:
            raise ValueError(
                f"PositionEmbedding is for maps of shape {tuple(self.vectors.shape)}, and saw "
                f"{tuple(x.shape[-3:])}: give it the channels and (h, w) of the network before it"
            )
        return x + self.vectors
