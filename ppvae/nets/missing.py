"""Networks of rows with gaps, and of what makes gaps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ppvae.arguments import number_or_tensor, takes_numbers


class Masked(nn.Module):
    r"""A network that sees values and which of them are observed.

    .. math:: \mathrm{net}([\,o \odot x + (1 - o) \odot c,\ o\,])

    It is called as ``(x, observed)``, or ``(x, y, observed)`` with a condition between. What is not
    observed may hold any number, NaN included: it is replaced by c. Without ``channel`` the network
    cannot tell a gap from a value c, as in the paper on MIWAE, where c = 0 is the mean.

    Args:
        net: its input is twice as wide as x: the filled values, then 1 where they are observed
            (twice the channels of images).
        fill: c: a number; a tensor that broadcasts to the values, which is a buffer; or an
            ``nn.Parameter``, learned.
        channel: whether the network sees the mask. If not, its input is as wide as x.
        event_dim: number of event dimensions, 1 for vectors, 3 for images.

    Called with x alone, everything is observed.

    Raises:
        TypeError: when called, if the mask is not bool.
        ValueError: when called, if the mask has not the shape of x.

    Source: Mattei & Frellsen, MIWAE, 2019; the mask as input: Collier, Nazabal & Williams, VAEs in
    the presence of missing data, 2020.

    Example:
        >>> net = Masked(nn.Identity())
        >>> x = torch.tensor([[1.0, float("nan")]])
        >>> net(x, ~x.isnan())
        tensor([[1., 0., 1., 0.]])
    """

    @takes_numbers
    def __init__(
        self,
        net: nn.Module,
        fill: float | Tensor = 0.0,
        channel: bool = True,
        event_dim: int = 1,
    ) -> None:
        super().__init__()
        self.net, self.channel, self.event_dim = net, channel, event_dim
        if isinstance(fill, nn.Parameter):
            self.fill: Tensor = fill
        else:
            self.register_buffer(
                "fill", number_or_tensor("fill", fill).to(torch.get_default_dtype())
            )

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        """From ``x``, what else the network takes, and bools of the shape of x."""
        *others, observed = others or (torch.ones_like(x, dtype=torch.bool),)  # type: ignore[assignment]
        if observed.dtype != torch.bool:
            raise TypeError(
                f"nets.Masked is called as (x, observed), and observed is {observed.dtype}: give "
                "bool, ~x.isnan()"
            )
        if observed.dim() != x.dim() or observed.shape[1:] != x.shape[1:]:
            raise ValueError(
                f"nets.Masked: observed has shape {tuple(observed.shape)}, and x {tuple(x.shape)}: "
                "give one bool for each value"
            )
        filled = torch.where(observed, x.to(self.fill.dtype), self.fill)
        if self.channel:
            filled = torch.cat([filled, observed.to(filled.dtype)], -self.event_dim)
        out: Tensor = self.net(filled, *others)
        return out


class SelfMasking(nn.Module):
    r"""The logit of a value being missing, a line in that value itself.

    .. math:: \operatorname{logit} P(m_d = 1 \mid x) = a_d + b_d\, x_d

    For ``conditionals.Bernoulli(nets.SelfMasking(D))``, the mechanism p(m | x) of
    :class:`ppvae.models.MissingNotAtRandom`. A sign of b that is known (large values are the ones
    not told) makes it identifiable more often: that is ``sign``.

    Args:
        dim: D.
        sign: 1 or -1: b_d is ``sign`` times a positive number; 0: any.

    Raises:
        ValueError: another sign.

    Source: Ipsen, Mattei & Frellsen, not-MIWAE, 2021, section 3 ("self-masking", "known").

    Example:
        >>> SelfMasking(3)(torch.ones(5, 3)).shape  # at 0, a half of each column is missing
        torch.Size([5, 3])
    """

    @takes_numbers(dim=1)
    def __init__(self, dim: int, sign: int = 0) -> None:
        super().__init__()
        if sign not in (-1, 0, 1):
            raise ValueError(f"SelfMasking: sign must be 1, -1 or 0 for any, got {sign!r}")
        self.sign = sign
        self.intercept = nn.Parameter(torch.zeros(dim))
        self.slope = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the shape of x."""
        slope = self.sign * nn.functional.softplus(self.slope) if self.sign else self.slope
        return self.intercept + slope * x
