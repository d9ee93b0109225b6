"""The guide of a hierarchical model that goes the other way: from the data up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.chain import Chain
from ppvae.models.hierarchical import Hierarchical
from ppvae.program import Program, data_plate


class BottomUp(Program):
    r"""Draws each level of a hierarchy from the one below it.

    .. math:: z_1 \sim q_\phi(z_1 \mid x),\qquad z_l \sim q_\phi(z_l \mid z_{l-1})

    The model draws :math:`z_l` from the level above, which this guide draws from :math:`z_l`. So
    only the top level has a closed-form KL: use ``kl="sampled"`` or ``"mixed"``.

    Args:
        model: what it is a guide of; only its shapes are used.
        levels: the conditionals q(z1 | x), q(z2 | z1), ..., one for each latent.

    Raises:
        ValueError: another number of levels than the model has, or a level that does not take
            what the one below gives, or gives another size than the model's latent has.
        TypeError: a level gives no distribution; the model is not a hierarchy.

    Source: Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016 (two levels);
    Sønderby et al., Ladder Variational Autoencoders, 2016.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.Hierarchical(
        ...     conditionals.Bernoulli(nets.mlp(8, 64, 784)),
        ...     levels=[conditionals.Normal(nets.mlp(4, 16, 2 * 8))],
        ...     latent_dim=4,
        ... )
        >>> up = [nets.mlp(784, 64, 2 * 8), nets.mlp(8, 16, 2 * 4)]
        >>> guide = guides.BottomUp(model, [conditionals.Normal(net) for net in up])
        >>> guide(torch.zeros(5, 784)).shape  # the top latent
        torch.Size([5, 4])
    """

    @takes_numbers
    def __init__(self, model: Hierarchical, levels: Sequence[nn.Module]) -> None:
        super().__init__()
        check_hierarchy(self, model, ("shapes", "integer"), levels=levels)
        self.levels = nn.ModuleList(levels)
        chain = Chain("x", model.shapes["x"], like=self, integer=model.integer)
        for level, conditional in enumerate(levels, 1):
            below, name = ("x" if level == 1 else f"z{level - 1}"), f"z{level}"
            label, argument = f"q({name} | {below})", f"levels[{level - 1}]"
            chain.follow(label, name, conditional, model.shapes[name], argument)

    def forward(self, x: Tensor, *others: Tensor, size: int | None = None) -> Tensor:
        """Draw z1, z2, ... in the plate ``"data"``; returns the top one.

        Others, such as the mask of :class:`ppvae.models.Masked`, are for the lowest conditional.
        """
        with data_plate(x, size=size):
            below = (x, *others)
            for level, conditional in enumerate(self.levels, 1):
                z: Tensor = pyro.sample(f"z{level}", conditional(*below))
                below = (z,)
        return z


def check_hierarchy(
    guide: Program, model: Any, needed: Sequence[str], **given: Sequence[nn.Module]
) -> None:
    """Raise unless the model is a hierarchy, and each list has an entry for each of its latents."""
    kind = type(guide).__name__
    if not all(hasattr(model, name) for name in needed):
        wanted = f"a models.Hierarchical, got a {type(model).__name__}"
        raise TypeError(f"{kind}(model) must be {wanted}; for one latent use guides.Normal")
    latents = [name for name in model.shapes if name != "x"]
    for argument, modules in given.items():
        if len(modules) != len(latents):
            seen = f"{len(modules)} entries, but the model has {len(latents)} latents {latents}"
            raise ValueError(f"{kind}({argument}) has {seen}; give one for each, the lowest first")
