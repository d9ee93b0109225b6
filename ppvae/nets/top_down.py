"""A path from the top latent down to the data, whatever its steps are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers

Draw = Callable[[Tensor, Tensor], Tensor]


class TopDown(nn.Module):
    r"""A path of groups: each draws one latent, given what the groups above have left.

    .. math:: h_L = h,\qquad s_l = \text{prior}_l(h_l),\qquad z_l \sim p(z_l \mid s_l),\qquad
              h_{l-1} = \text{absorb}_l(h_l, z_l)

    So :math:`z_l` may depend on all latents above it, not on the next one alone. A group is any
    module called as ``group(h, draw)``: it calls ``draw(s, h)`` once, with the parameters s of its
    prior, gets the latent back, and returns the next h. :class:`Group` is one; who walks the path
    says what ``draw`` does. The first group is the top, with ``"zL"``; the last one has ``"z1"``.

    Args:
        start: the event shape of the first h, ``(C, H, W)``, which is a learned constant.
        groups: from the top down.

    Attributes:
        names: ``"zL"``, ..., ``"z1"``.

    Raises:
        ValueError: there is no group.

    Source: Sønderby et al., Ladder Variational Autoencoders, 2016; Vahdat & Kautz, NVAE, 2020.

    Example:
        >>> import torch
        >>> from ppvae.nets import flat_batch
        >>> cell = flat_batch(nn.Conv2d(2 + 1, 2, 3, padding=1), event_dim=3)
        >>> path = TopDown((2, 4, 4), [Group(Zeros(1), Joined(cell))])
        >>> path(lambda name, stats, h: torch.ones(5, 1, 4, 4)).shape  # every latent is 1
        torch.Size([5, 2, 4, 4])
    """

    @takes_numbers
    def __init__(self, start: Sequence[int], groups: Sequence[nn.Module]) -> None:
        super().__init__()
        if not groups:
            raise ValueError("groups of nets.TopDown are one for each latent, and none was given")
        self.start = nn.Parameter(torch.rand(tuple(start)))
        self.groups = nn.ModuleList(groups)
        self.names = [f"z{level}" for level in range(len(groups), 0, -1)]
        self._walk = _Walk()

    def forward(self, draw: Callable[[str, Tensor, Tensor], Tensor]) -> Tensor:
        """Walk the path; ``draw(name, s, h)`` gives each latent. Returns the last h."""
        h: Tensor = self.start
        for name, group in zip(self.names, self.groups, strict=True):
            h = group(h, lambda stats, h, name=name: draw(name, stats, h))
        return h

    def remember(self, steps: dict[str, tuple[Tensor, Tensor]], h: Tensor) -> None:
        """Keep a walk for the next one who asks: s and z by name, and the last h."""
        self._walk.kept = steps, h, self._state()

    def recall(self) -> tuple[dict[str, tuple[Tensor, Tensor]], Tensor] | None:
        """The walk that was kept last, once; None if the path is not what it was then."""
        kept, self._walk.kept = self._walk.kept, None
        if kept is None:
            return None
        steps, h, state = kept
        now = self._state()
        same = all(old is new for old, new in zip(state[0], now[0], strict=False))
        return (steps, h) if same and state[1:] == now[1:] else None

    def _state(self) -> tuple[Any, ...]:
        """What a walk depends on besides its latents: which tensors, their contents, the modes."""
        tensors = [*self.parameters(), *self.buffers()]
        modes = [part.training for part in self.modules()]
        autocast = torch.is_autocast_enabled(self.start.device.type)
        return tensors, [t._version for t in tensors], modes, torch.is_grad_enabled(), autocast


class _Walk:
    """Holds what is remembered; copies and pickles of a path remember nothing."""

    kept: Any = None

    def __deepcopy__(self, memo: Any) -> _Walk:
        return _Walk()

    def __reduce__(self) -> Any:
        return _Walk, ()


class Group(nn.Module):
    """One step of a :class:`TopDown` path, of two networks.

    Args:
        prior: from h to the parameters of p(z | h), for a normal ``(..., 2 * C, H, W)``.
        absorb: from h and z to the next h.

    Example:
        >>> import torch
        >>> from ppvae.nets import flat_batch
        >>> group = Group(Zeros(1), Joined(flat_batch(nn.Conv2d(3, 2, 1), event_dim=3)))
        >>> group(torch.zeros(2, 4, 4), lambda stats, h: stats[:1]).shape
        torch.Size([2, 4, 4])
    """

    @takes_numbers
    def __init__(self, prior: nn.Module, absorb: nn.Module) -> None:
        super().__init__()
        self.prior, self.absorb = prior, absorb

    def forward(self, h: Tensor, draw: Draw) -> Tensor:
        z = draw(self.prior(h), h)
        absorbed: Tensor = self.absorb(h, z)
        return absorbed


class Zeros(nn.Module):
    """Means and log-scales 0, for the top latent, which has nothing above it.

    Args:
        channels: of the latent.

    Example:
        >>> import torch
        >>> Zeros(3)(torch.ones(5, 16, 4, 4)).shape
        torch.Size([6, 4, 4])
    """

    @takes_numbers(channels=1)
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, h: Tensor) -> Tensor:
        return h.new_zeros(2 * self.channels, *h.shape[-2:])


class Joined(nn.Module):
    """Calls a network with its inputs joined along the channels.

    Args:
        net: of ``(..., C_1 + C_2 + ..., H, W)``; it folds leading dimensions itself, see
            :func:`flat_batch`.

    Example:
        >>> import torch
        >>> from ppvae.nets import flat_batch
        >>> net = Joined(flat_batch(nn.Conv2d(5, 2, 1), event_dim=3))
        >>> net(torch.zeros(3, 4, 4), torch.zeros(6, 2, 4, 4)).shape  # h is a constant, z is not
        torch.Size([6, 2, 4, 4])
    """

    @takes_numbers
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *inputs: Tensor) -> Tensor:
        leading = torch.broadcast_shapes(*(x.shape[:-3] for x in inputs))
        joined = torch.cat([x.expand(leading + x.shape[-3:]) for x in inputs], -3)
        output: Tensor = self.net(joined)
        return output


# ------------------------------------------------------------------------------ NVAE's cells
