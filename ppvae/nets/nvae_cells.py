"""NVAE: the cells that the steps of its path are made of, and the whole of its networks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.nets.dense import FlatBatch, flat_batch
from ppvae.nets.top_down import Group, Joined, TopDown, Zeros


class SqueezeExcitation(nn.Module):
    r"""Scales each channel by a number in (0, 1) that depends on the means of all channels.

    .. math:: y_c = x_c \, \operatorname{sigmoid}\big(W_2 \operatorname{relu}(W_1 \bar x)\big)_c

    Args:
        channels: C; the hidden layer has max(C / 16, 4) units.

    Source: Hu, Shen & Sun, Squeeze-and-Excitation Networks, 2018.

    Example:
        >>> import torch
        >>> SqueezeExcitation(8)(torch.ones(2, 8, 4, 4)).shape
        torch.Size([2, 8, 4, 4])
    """

    @takes_numbers(channels=1)
    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.gates = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.gates(x.mean((-2, -1)))
        return x * gates[..., None, None]


class Cell(nn.Module):
    """A residual cell: skip(x) + 0.1 branch(x); the factor keeps a deep stack near its input.

    Args:
        branch: the layers.
        skip: what stands for x where sizes differ.

    Example:
        >>> import torch
        >>> Cell(nn.Identity(), nn.Identity())(torch.ones(1))
        tensor([1.1000])
    """

    @takes_numbers
    def __init__(self, branch: nn.Module, skip: nn.Module) -> None:
        super().__init__()
        self.branch, self.skip = branch, skip

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.skip(x) + 0.1 * self.branch(x)
        return y


@takes_numbers(channels=1, out=1)
def encoder_cell(channels: int, out: int | None = None, down: bool = False) -> Cell:
    """NVAE's cell of the encoder: batch norm, swish, 3 x 3 convolution, twice; then gates.

    Args:
        channels: C of the input.
        out: C of the output; None: the same.
        down: halve height and width, rounding up.

    Example:
        >>> import torch
        >>> encoder_cell(4, 8, down=True)(torch.zeros(2, 4, 7, 7)).shape
        torch.Size([2, 8, 4, 4])
    """
    out = channels if out is None else out
    stride = 2 if down else 1
    branch = nn.Sequential(
        _norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, stride, padding=1),
        _norm(out), nn.SiLU(), nn.Conv2d(out, out, 3, padding=1),
        SqueezeExcitation(out),
    )  # fmt: skip
    pool = [nn.AvgPool2d(2, ceil_mode=True)] if down else []
    return Cell(branch, nn.Sequential(*pool, *_widen(channels, out)))


@takes_numbers(channels=1, out=1, expansion=1)
def decoder_cell(
    channels: int, out: int | None = None, size: Sequence[int] | None = None, expansion: int = 6
) -> Cell:
    """NVAE's cell of the decoder: a depthwise 5 x 5 convolution of many channels; then gates.

    Args:
        channels: C of the input.
        out: C of the output; None: the same.
        size: height and width to enlarge to; None: as they are.
        expansion: how many times as many channels the depthwise convolution has as the input.

    Example:
        >>> import torch
        >>> decoder_cell(8, 4, size=(7, 7))(torch.zeros(2, 8, 4, 4)).shape
        torch.Size([2, 4, 7, 7])
    """
    out, wide = channels if out is None else out, channels * expansion
    enlarge = [] if size is None else [nn.Upsample(tuple(size))]
    branch = nn.Sequential(
        *enlarge,
        _norm(channels), nn.Conv2d(channels, wide, 1),
        _norm(wide), nn.SiLU(), nn.Conv2d(wide, wide, 5, padding=2, groups=wide),
        _norm(wide), nn.SiLU(), nn.Conv2d(wide, out, 1),
        _norm(out), SqueezeExcitation(out),
    )  # fmt: skip
    return Cell(branch, nn.Sequential(*_widen(channels, out), *enlarge))


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, momentum=0.05)


def _widen(channels: int, out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, 1)] if out != channels else []


# ------------------------------------------------------------------------------ all networks


class Combine(nn.Module):
    """What a guide reads: conv(e + conv(h)), of the path's h and the encoder's e of a group.

    Args:
        channels: C of h and e.
        out: C of the output.

    Example:
        >>> import torch
        >>> Combine(4, 6)(torch.zeros(4, 7, 7), torch.zeros(5, 4, 7, 7)).shape
        torch.Size([5, 6, 7, 7])
    """

    @takes_numbers(channels=1, out=1)
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.of_h = flat_batch(nn.Conv2d(channels, channels, 1), event_dim=3)
        self.both = flat_batch(nn.Conv2d(channels, out, 3, padding=1), event_dim=3)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        output: Tensor = self.both(e + self.of_h(h))
        return output


class Tower(nn.Module):
    """An encoder with an output for each group: the features before each stage is left.

    Args:
        stages: from the data up; all but the first start with the features of the one below.

    Example:
        >>> import torch
        >>> tower = Tower([nn.Conv2d(1, 2, 1), nn.Conv2d(2, 3, 1)])
        >>> [e.shape[1] for e in tower(torch.ones(5, 1, 4, 4))]
        [3, 2]
    """

    @takes_numbers
    def __init__(self, stages: Sequence[nn.Module]) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """From x to the features of each group, the top first."""
        features = [x]
        for stage in self.stages:
            features.append(stage(features[-1]))
        return features[:0:-1]


class NVAE(NamedTuple):
    """What :func:`nvae` returns.

    Attributes:
        path: for ``models.TopDown``.
        out: from the last h to an image.
        encoder: from x to the features of each group.
        heads: from h and these features to the offsets of q(z_l | x) from the prior.
    """

    path: TopDown
    out: FlatBatch
    encoder: Tower
    heads: list[Combine]


@takes_numbers(
    channels=1,
    latent_channels=1,
    blocks=0,
    cells=0,
    expansion=1,
    block_cells=0,
    block_expansion=1,
    out_channels=1,
)
def nvae(
    shape: Sequence[int] = (1, 28, 28),
    groups: Sequence[int] = (1, 2),
    channels: int = 12,
    latent_channels: int = 4,
    blocks: int = 2,
    cells: int = 1,
    expansion: int = 3,
    block_cells: int = 1,
    block_expansion: int = 3,
    out_channels: int | None = None,
) -> NVAE:
    """NVAE's networks for images: encoder, path of groups, and what follows it.

    The image is halved ``blocks`` times before the first groups, and once between scales; each
    halving doubles the channels, and rounds an odd height or width up.

    Args:
        shape: of an image, ``(C, H, W)``, values in [0, 1].
        groups: how many latents there are at each scale, the top first.
        channels: of the features at the size of the image.
        latent_channels: of each latent.
        blocks: halvings below the lowest scale.
        cells: of the encoder at each group, and of the path before each but the first.
        expansion: of the path's cells.
        block_cells: in each of the blocks, on either side.
        block_expansion: of those that follow the path.
        out_channels: of the output, for a likelihood with more than one number per value.

    Raises:
        ValueError: a number below 1, or more halvings than the image has; the message has the
            sizes.

    Source: Vahdat & Kautz, NVAE: A Deep Hierarchical Variational Autoencoder, 2020. Where an image
    is halved, the skip has a mean over 2 x 2 pixels and a 1 x 1 convolution.

    Example:
        >>> import torch
        >>> nets = nvae((1, 28, 28), groups=(1, 2))
        >>> [tuple(e.shape[1:]) for e in nets.encoder(torch.zeros(2, 1, 28, 28))]
        [(96, 4, 4), (48, 7, 7), (48, 7, 7)]
        >>> sum(p.numel() for p in nn.ModuleList([*nets[:3], *nets.heads]).parameters())
        585041
    """
    sizes = _sizes(shape, groups, blocks)
    _require_positive(
        channels=channels, latent_channels=latent_channels, cells=cells, expansion=expansion,
        block_cells=block_cells, block_expansion=block_expansion,
    )  # fmt: skip
    widths = [channels * 2**i for i in range(len(sizes))]

    # up: a stage of the tower for each group
    stages, pending = [], [_Centred(), nn.Conv2d(shape[0], channels, 3, padding=1)]
    for i in range(blocks):
        pending += [encoder_cell(widths[i]) for _ in range(block_cells - 1)]
        pending.append(encoder_cell(widths[i], widths[i + 1], down=True))
    for i, count in zip(range(blocks, len(sizes)), reversed(groups), strict=True):
        for _ in range(count):
            pending += [encoder_cell(widths[i]) for _ in range(cells)]
            stages.append(flat_batch(nn.Sequential(*pending), event_dim=3))
            pending = []
        if i + 1 < len(sizes):
            pending = [encoder_cell(widths[i], widths[i + 1], down=True)]

    # down: what follows a latent, up to the next one, is one network
    steps, heads = [], []
    places = [
        i for i, n in zip(reversed(range(len(sizes))), groups, strict=False) for _ in range(n)
    ]
    for place, i in enumerate(places):
        width, below = widths[i], places[place + 1 : place + 2]
        prior: nn.Module = Zeros(latent_channels)
        if place:
            layers = [nn.ELU(), nn.Conv2d(width, 2 * latent_channels, 1)]
            prior = flat_batch(nn.Sequential(*layers), event_dim=3)
        absorb: list[nn.Module] = [nn.Conv2d(width + latent_channels, width, 1)]
        for j in below:
            if j < i:
                absorb.append(decoder_cell(width, widths[j], sizes[j], expansion))
            absorb += [decoder_cell(widths[j], expansion=expansion) for _ in range(cells)]
        steps.append(Group(prior, Joined(flat_batch(nn.Sequential(*absorb), event_dim=3))))
        heads.append(Combine(width, 2 * latent_channels))

    after: list[nn.Module] = []
    for i in reversed(range(blocks)):
        after.append(decoder_cell(widths[i + 1], widths[i], sizes[i], block_expansion))
        after += [
            decoder_cell(widths[i], expansion=block_expansion) for _ in range(block_cells - 1)
        ]
    after += [nn.ELU(), nn.Conv2d(channels, out_channels or shape[0], 3, padding=1)]
    path = TopDown((widths[-1], *sizes[-1]), steps)
    return NVAE(path, flat_batch(nn.Sequential(*after), event_dim=3), Tower(stages), heads)


class _Centred(nn.Module):
    """[0, 1] to [-1, 1]."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * x - 1


def _sizes(shape: Sequence[int], groups: Sequence[int], blocks: int) -> list[tuple[int, int]]:
    """Height and width after each halving, the image's first."""
    if len(shape) != 3 or min(shape) < 1:
        raise ValueError(f"nets.nvae: shape is (C, H, W) of an image, got {tuple(shape)}")
    if not groups or min(groups) < 1 or blocks < 0:
        seen = f"groups={tuple(groups)} and blocks={blocks}"
        raise ValueError(f"nets.nvae: each scale needs a group, and blocks >= 0, got {seen}")
    sizes = [(shape[1], shape[2])]
    for _ in range(blocks + len(groups) - 1):
        h, w = sizes[-1]
        if (h, w) == (1, 1):
            raise ValueError(
                f"nets.nvae: {blocks} blocks and {len(groups)} scales halve an image of "
                f"{shape[1]} x {shape[2]} {blocks + len(groups) - 1} times, and after "
                f"{len(sizes) - 1} it is 1 x 1; use fewer blocks, or fewer entries in groups"
            )
        sizes.append((-(-h // 2), -(-w // 2)))
    return sizes


def _require_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"nets.nvae: {name} must be at least 1, got {value}")
