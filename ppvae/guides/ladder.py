"""The ladder guide: up once without noise, then down along the model's own path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.chain import Chain
from ppvae.distributions import DiagonalNormal
from ppvae.guides.bottom_up import check_hierarchy
from ppvae.models.hierarchical import Hierarchical
from ppvae.program import Program, data_plate


class Ladder(Program):
    r"""The guide of the ladder VAE: each level combines what x says with what the levels above say.

    Upward, without noise: :math:`d_0 = x`, :math:`d_l = \text{block}_l(d_{l-1})`, and the head of
    each level gives :math:`\hat q_l = \mathcal N(\hat\mu_l(d_l), \hat\sigma^2_l(d_l))`. Downward,
    with the model's own :math:`p_\theta(z_l \mid z_{l+1}) = \mathcal N(\mu_{p,l}, \sigma^2_{p,l})`:

    .. math::
        q(z_L \mid x) = \hat q_L,\qquad
        q(z_l \mid z_{l+1}, x) = \mathcal N(\mu_l, \sigma_l^2),\qquad
        \frac1{\sigma_l^2} = \frac1{\hat\sigma_l^2} + \frac1{\sigma_{p,l}^2},\qquad
        \mu_l = \sigma_l^2 \left(\frac{\hat\mu_l}{\hat\sigma_l^2}
                + \frac{\mu_{p,l}}{\sigma_{p,l}^2}\right)

    That is the product of the two normals, :func:`merge`: exact where :math:`p(x \mid z_l)` is
    normal in :math:`z_l`. The conditionals are shared with the model, not copied, so training the
    guide also trains them. All levels have a closed-form KL.

    Args:
        model: its ``levels`` are used.
        blocks: the upward networks d1(x), d2(d1), ..., one for each latent; with batch norm in the
            paper.
        heads: the conditionals of d1, d2, ..., one for each latent, that give
            :math:`\hat q_l`: ``conditionals.Normal`` of a linear layer in the paper.

    Raises:
        ValueError: another number of blocks or heads than the model has latents; a block or head
            that does not take what it is given, or gives another size than the model's latent has.
        TypeError: a level to merge, of the model or a head, is not a diagonal normal; the top head
            gives no distribution, or a block one; the model is not a hierarchy.

    Source: Sønderby et al., Ladder Variational Autoencoders, 2016.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.Hierarchical(
        ...     conditionals.Bernoulli(nets.mlp(8, 64, 784)),
        ...     levels=[conditionals.Normal(nets.mlp(4, 16, 2 * 8))],
        ...     latent_dim=4,
        ... )
        >>> guide = guides.Ladder(
        ...     model,
        ...     blocks=[nets.mlp(784, 64, 32), nets.mlp(32, 32, 16)],
        ...     heads=[conditionals.Normal(nets.mlp(32, 2 * 8)),
        ...            conditionals.Normal(nets.mlp(16, 2 * 4))],
        ... )
        >>> guide(torch.zeros(5, 784)).shape  # the lowest latent
        torch.Size([5, 8])
    """

    @takes_numbers
    def __init__(
        self, model: Hierarchical, blocks: Sequence[nn.Module], heads: Sequence[nn.Module]
    ) -> None:
        super().__init__()
        needed = ("levels", "shapes", "integer")
        check_hierarchy(self, model, needed, blocks=blocks, heads=heads)
        self.blocks, self.heads = nn.ModuleList(blocks), nn.ModuleList(heads)
        self.levels = model.levels
        self._check_down(model)
        self._check_up(model)

    def _check_down(self, model: Hierarchical) -> None:
        """The model's levels run once, from the top; raises if one cannot be merged."""
        top = len(self.levels) + 1
        chain = Chain(f"z{top}", model.shapes[f"z{top}"], like=self)
        for level in range(top - 1, 0, -1):
            label = f"p(z{level} | z{level + 1})"
            _moments(chain.follow(label, f"z{level}", self.levels[level - 1]), label)

    def _check_up(self, model: Hierarchical) -> None:
        """Blocks and heads run once, from the data; raises if they do not fit."""
        chain = Chain("x", model.shapes["x"], like=self, integer=model.integer)
        for level, (block, head) in enumerate(zip(self.blocks, self.heads, strict=True), 1):
            d = chain.follow(f"block {level}", f"d{level}", block)
            if not isinstance(d, Tensor):
                seen = f"block {level} gives a {type(d).__name__}"
                raise TypeError(f"{seen}, but must give a tensor: conditionals go into heads")
            name, label, argument = f"z{level}", f"head {level}", f"heads[{level - 1}]"
            up = chain.follow(label, name, head, model.shapes[name], argument, go_on=False)
            if level <= len(self.levels):
                _moments(up, label)

    def forward(self, x: Tensor, *others: Tensor, size: int | None = None) -> Tensor:
        """Draw the latents from the top down in the plate ``"data"``; returns z1.

        Others, such as the mask of :class:`ppvae.models.Masked`, are for the first block.
        """
        up = self.upward(x, *others)
        with data_plate(x, size=size):
            z: Tensor = pyro.sample(f"z{len(up)}", up[-1])
            for level in range(len(up) - 1, 0, -1):
                down = self.levels[level - 1](z)  # the model's p(z_level | z above)
                z = pyro.sample(f"z{level}", merge(up[level - 1], down, level))
        return z

    def upward(self, x: Tensor, *others: Tensor) -> list[Any]:
        r"""What x says about each level, without the levels above: the :math:`\hat q_l`."""
        found, below = [], (x, *others)
        for block, head in zip(self.blocks, self.heads, strict=True):
            d = block(*below)
            found.append(head(d))
            below = (d,)
        return found


def merge(up: Any, down: Any, level: int = 1) -> DiagonalNormal:
    r"""The normalised product of two diagonal normals: precisions add, means weigh by precision.

    It is computed without squares of reciprocals, so tiny scales do not overflow:
    :math:`\sigma = \hat\sigma \sigma_p / \sqrt{\hat\sigma^2 + \sigma_p^2}`.

    Args:
        up: from x, batch shape ``(N,)``.
        down: from the level above, ``(N,)`` or ``(K, N)``.
        level: for messages.

    Raises:
        TypeError: one of them is not a diagonal normal.

    Example:
        >>> up = dist.Normal(torch.tensor([0.0]), 1.0).to_event(1)
        >>> down = dist.Normal(torch.tensor([3.0]), 0.5 ** 0.5).to_event(1)
        >>> q = merge(up, down)
        >>> q.mean, q.variance  # precisions 1 + 2, mean (0 * 1 + 3 * 2) / 3
        (tensor([2.0000]), tensor([0.3333]))
    """
    (up_loc, up_scale) = _moments(up, f"head {level}")
    (down_loc, down_scale) = _moments(down, f"p(z{level} | z{level + 1})")
    root = torch.hypot(up_scale, down_scale)
    share = (up_scale / root).square()  # of the mean from above: its share of the precision
    loc = up_loc + share * (down_loc - up_loc)
    return DiagonalNormal(loc, up_scale * (down_scale / root), len(up.event_shape))


def _moments(fn: Any, label: str) -> tuple[Tensor, Tensor]:
    base = getattr(fn, "base_dist", None)
    if not isinstance(fn, dist.Independent) or not isinstance(base, dist.Normal):
        seen = f"{label} gives a {type(fn).__name__}, and the ladder merges diagonal normals only"
        raise TypeError(f"{seen}: use conditionals.Normal, or guides.BottomUp")
    return base.loc, base.scale
