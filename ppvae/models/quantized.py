"""VQ-VAE-2: a fine and a coarse map of codes, p(z2) p(z1 | z2) p(x | z1, z2)."""

from __future__ import annotations

import pyro
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.program import Program, data_plate


class CodeHierarchy(Program):
    r"""Two levels of codes, the fine one given the coarse one; both given a label, if there is one.

    .. math:: z_2 \sim p(z_2 \mid y), \qquad z_1 \sim p(z_1 \mid z_2, y), \qquad
              x \sim p_\theta(x \mid z_1, z_2)

    A VQ-VAE of one level is ``models.VAE(likelihood, prior=conditionals.CodePrior(...))``.

    Args:
        likelihood: p(x | z1, z2), called as ``likelihood(z1, z2)``.
        bottom: p(z1 | z2), a ``conditionals.CodePrior`` called with z2, and y's features, as maps.
        top: p(z2), a ``conditionals.CodePrior`` called with y's features as a map.
        condition: from a label ``y`` to features ``(..., C)``, e.g. ``nets.OneHot(10)``; None:
            without labels.

    Raises:
        ValueError: a condition without labels, or labels without a condition.

    Source: Razavi, van den Oord & Vinyals, Generating Diverse High-Fidelity Images with VQ-VAE-2,
    2019, section 3.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, models, nets
        >>> fine, coarse = nets.Codebook(8, dim=2), nets.Codebook(4, dim=3)
        >>> bottom = conditionals.CodePrior(fine, (4, 4), nets.CausalConv(8, 8, 2, context_dim=3))
        >>> up = nn.Upsample(scale_factor=2)
        >>> class Decoder(nn.Module):
        ...     def forward(self, z1, z2):
        ...         return torch.cat([z1, up(z2)], -3).sum(-3, keepdim=True)
        >>> likelihood = conditionals.Bernoulli(Decoder(), event_dim=3)
        >>> model = models.CodeHierarchy(likelihood, bottom, conditionals.CodePrior(coarse, (2, 2)))
        >>> model(size=5).shape
        torch.Size([5, 1, 4, 4])
    """

    @takes_numbers
    def __init__(
        self,
        likelihood: nn.Module,
        bottom: nn.Module,
        top: nn.Module,
        condition: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.likelihood, self.bottom, self.top = likelihood, bottom, top
        self.condition = condition

    def forward(
        self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """Observe ``x``, ``(N, ...)``, or draw: ``size`` rows, or one for each y. Returns x."""
        if (self.condition is None) != (y is None):
            raise ValueError(
                "this model has no condition, and was given labels y: make it with condition=, as "
                "nets.OneHot(10)" if y is not None else
                "this model has a condition, so call it with labels: data as a tuple (x, y), or "
                "dataset.supervised()"
            )  # fmt: skip
        context = (
            () if y is None or self.condition is None else (self.condition(y)[..., None, None],)
        )
        with data_plate(x, y, size=size):
            z2 = pyro.sample("z2", self.top(*context))
            z1 = pyro.sample("z1", self.bottom(z2, *context))
            value: Tensor = pyro.sample("x", self.likelihood(z1, z2), obs=x)
        return value
