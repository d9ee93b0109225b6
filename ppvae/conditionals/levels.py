"""Heads of whole numbers of a range, whose order counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ppvae import distributions
from ppvae.arguments import takes_numbers
from ppvae.conditionals.heads import full_precision
from ppvae.conditionals.values import Elementwise


class DiscretizedLogistic(Elementwise):
    r"""Independent levels low, ..., low + L - 1, as 8-bit grey levels: mixtures of logistic laws.

    .. math:: p(x_d \mid z) = \sum_m \pi_{dm} \Big[
              \sigma\Big(\frac{x_d + \frac12 - \mu_{dm}}{s_{dm}}\Big)
              - \sigma\Big(\frac{x_d - \frac12 - \mu_{dm}}{s_{dm}}\Big)\Big]

    Probabilities of levels: they compare with :class:`Categorical`'s, and not with densities of
    pixel / 255. The network's means and scales are in units of half the range, in which the
    levels run from -1 to 1.

    Args:
        net: outputs ``(..., 2 * D)``: means, then log scales; with M components
            ``(..., 3 * M * D)``: logits of the first component for all D values, of the second,
            ..., then the means, then the log scales.
        num_levels: L, at least 2.
        num_components: M.
        low: the lowest level.
        event_dim: number of event dimensions.

    Raises:
        ValueError: fewer than two levels, or no component.

    Example:
        >>> p = DiscretizedLogistic(nn.Linear(2, 2 * 64), num_levels=256)(torch.zeros(5, 2))
        >>> p.sample().shape
        torch.Size([5, 64])
    """

    family = distributions.DiscretizedLogistic

    @takes_numbers(num_levels=2, num_components=1)
    def __init__(
        self,
        net: nn.Module,
        num_levels: int,
        num_components: int = 1,
        low: int = 0,
        event_dim: int = 1,
    ) -> None:
        if num_levels < 2 or num_components < 1:
            seen = f"num_levels={num_levels}, num_components={num_components}"
            raise ValueError(f"DiscretizedLogistic needs two levels and a component, got {seen}")
        super().__init__(net, event_dim)
        self.num_levels, self.num_components, self.low = num_levels, num_components, low

    @property
    def num_blocks(self) -> int:
        return 2 if self.num_components == 1 else 3 * self.num_components

    def law(self, blocks: Sequence[Tensor], offset: Any = None) -> Any:
        m = self.num_components
        loc, log_scale = (torch.stack([*part], -1) for part in (blocks[-2 * m : -m], blocks[-m:]))
        logits = torch.stack([*blocks[:m]], -1) if m > 1 else torch.zeros_like(loc)
        half = (self.num_levels - 1) / 2
        log_scale = log_scale + log_scale.new_full((), half).log()
        return self.family(
            logits, self.low + half * (1 + loc), log_scale, self.num_levels, self.low
        )


class Ordinal(Elementwise):
    r"""Independent ordered categories 0, ..., C - 1, as ratings or grades.

    .. math:: p(x_d \le c \mid z) = \sigma(\kappa_c - \eta_d),\qquad
              \kappa_c = \kappa_0 + \sum_{i \le c} \mathrm{softplus}(r_i)

    The network gives one number :math:`\eta` for each value; the cutpoints :math:`\kappa` are
    learned, and start where all categories are equally probable at :math:`\eta = 0`.

    Args:
        net: outputs ``(..., D)``.
        num_levels: C, at least 2.
        shape: ``()`` for the same cutpoints for all values, ``D`` for cutpoints for each.
        event_dim: number of event dimensions.

    Raises:
        ValueError: fewer than two levels.

    Example:
        >>> p = Ordinal(nn.Linear(2, 3), num_levels=4)
        >>> p(torch.zeros(5, 2)).base_dist.cutpoints.sigmoid().detach()
        tensor([0.2500, 0.5000, 0.7500])
    """

    family = distributions.Ordinal

    @takes_numbers(num_levels=2)
    def __init__(
        self,
        net: nn.Module,
        num_levels: int,
        shape: int | tuple[int, ...] = (),
        event_dim: int = 1,
    ) -> None:
        if num_levels < 2:
            raise ValueError(f"Ordinal needs two levels at least, got num_levels={num_levels}")
        super().__init__(net, event_dim)
        size = (shape,) if isinstance(shape, int) else tuple(shape)
        cuts = (torch.arange(1.0, num_levels) / num_levels).logit()
        self.first = nn.Parameter(cuts[0].expand(size).clone())
        raw = cuts.diff().expm1().log().expand(*size, -1)
        self.raw_gaps = nn.Parameter(raw.clone()) if num_levels > 2 else None

    def law(self, blocks: Sequence[Tensor], offset: Any = None) -> Any:
        first = full_precision(self.first)
        raw = first.new_zeros(0) if self.raw_gaps is None else full_precision(self.raw_gaps)
        return self.family(blocks[0], first, nn.functional.softplus(raw, threshold=40.0))
