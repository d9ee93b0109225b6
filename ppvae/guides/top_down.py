"""The guide of a deep hierarchy: the model's own path, with what the data say at each step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.guides.bottom_up import check_hierarchy
from ppvae.models.top_down import TopDown as Model
from ppvae.pairs import evaluation_mode
from ppvae.program import Program, data_plate


class TopDown(Program):
    r"""Walks the model's path, and moves each prior by what the data say.

    .. math:: s_l = \text{prior}_l(h_l),\qquad d_l = \text{head}_l(h_l, e_l(x)),\qquad
              q(z_l \mid z_{l+1}, \dots, z_L, x) = \mathcal N(s_l + d_l)

    With s the means and log-scales of the prior, the mean is moved by the first half of d, and the
    scale multiplied by the exponential of the second: where d = 0 the KL of a group is 0, whatever
    the prior. With ``residual=False`` q is N(d_l).

    The model takes over this walk, so the path runs once in a step, forward and backward, and batch
    norm counts one batch. Only where the model's latents are not the very tensors drawn here, or
    the path has been changed since, does it walk again.

    Args:
        model: its ``path`` and its ``normal`` are used.
        encoder: from x to a list of features e, one for each latent, the top first.
        heads: of h and e, one for each latent, the top first; each gives as many numbers as the
            prior of its group.
        residual: whether d is an offset from the prior's parameters.

    Raises:
        ValueError: another number of features or heads than the model has latents; a head that
            fails for its h and e, or gives another shape than the latent has.
        TypeError: the model is no ``models.TopDown``; the encoder gives no list of tensors.

    Source: Vahdat & Kautz, NVAE, 2020, section 3.2.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> parts = nets.nvae((1, 8, 8), groups=(1, 2), channels=4, blocks=1)
        >>> model = models.TopDown(parts.path, conditionals.Bernoulli(parts.out, event_dim=3))
        >>> guide = guides.TopDown(model, parts.encoder, parts.heads)
        >>> {name: tuple(z.shape) for name, z in guide(torch.zeros(5, 1, 8, 8)).items()}
        {'z3': (5, 4, 2, 2), 'z2': (5, 4, 4, 4), 'z1': (5, 4, 4, 4)}
    """

    path: Any

    @takes_numbers
    def __init__(
        self, model: Model, encoder: nn.Module, heads: Sequence[nn.Module], residual: bool = True
    ) -> None:
        super().__init__()
        check_hierarchy(self, model, ("path", "normal", "shapes"), heads=heads)
        self.path, self.normal = model.path, model.normal
        self.encoder, self.heads, self.residual = encoder, nn.ModuleList(heads), residual
        self._check(model)

    def forward(self, x: Tensor, *others: Tensor, size: int | None = None) -> dict[str, Tensor]:
        """Draw the latents from the top down in the plate ``"data"``; returns them by name.

        Others, such as the mask of :class:`ppvae.models.Masked`, are for the encoder.
        """
        features = self.encoder(x, *others)
        said = dict(zip(self.path.names, zip(self.heads, features, strict=True), strict=True))
        steps: dict[str, tuple[Tensor, Tensor]] = {}

        def draw(name: str, stats: Tensor, h: Tensor) -> Tensor:
            head, features = said[name]
            offset = head(h, features)
            z: Tensor = pyro.sample(name, self.normal(stats + offset if self.residual else offset))
            steps[name] = stats, z
            return z

        with data_plate(x, size=size):
            h = self.path(draw)
        self.path.remember(steps, h)
        return {name: z for name, (_, z) in steps.items()}

    def _check(self, model: Model) -> None:
        """The encoder and a walk, once, on zeros; raises if features or heads do not fit."""
        dtype = torch.long if model.integer else model.path.start.dtype
        x = model.path.start.new_zeros((2, *model.shapes["x"]), dtype=dtype)
        with evaluation_mode(self), torch.no_grad():
            try:
                features = self.encoder(x)
            except (RuntimeError, ValueError) as error:
                seen = f"encoder fails for x of shape {tuple(x.shape)}"
                raise ValueError(f"TopDown: {seen}, which the likelihood gives: {error}") from error
            if not isinstance(features, (list, tuple)) or not all(map(torch.is_tensor, features)):
                seen = f"encoder gives a {type(features).__name__}"
                raise TypeError(f"TopDown: {seen}, and must give a list of tensors, the top first")
            if len(features) != len(self.heads):
                seen = f"encoder gives {len(features)} features"
                raise ValueError(f"TopDown: {seen}, and the path has {len(self.heads)} groups")
            said = dict(zip(self.path.names, zip(self.heads, features, strict=True), strict=True))

            def draw(name: str, stats: Tensor, h: Tensor) -> Tensor:
                head, e = said[name]
                seen = f"e of shape {tuple(e.shape[1:])} and h of {tuple(h.shape[-3:])}"
                try:
                    offset = head(h, e)
                    fn = self.normal(stats + offset if self.residual else offset)
                except (RuntimeError, ValueError) as error:
                    text = f"TopDown: the head of {name} does not fit {seen}"
                    raise ValueError(f"{text}; features go the top first: {error}") from error
                if tuple(fn.event_shape) != model.shapes[name]:
                    gives = f"the head of {name} gives {tuple(fn.event_shape)} for {seen}"
                    raise ValueError(f"TopDown: {gives}, and it is {model.shapes[name]}")
                return fn.mean.expand(2, *fn.event_shape)

            self.path(draw)
