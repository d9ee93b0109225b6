"""A head of vectors as a head of feature maps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ppvae import distributions
from ppvae.arguments import takes_numbers
from ppvae.conditionals.heads import Conditional
from ppvae.conditionals.values import Around


class Reshaped(Around):
    r"""A conditional of vectors whose values are laid out as feature maps, row by row.

    .. math:: p(z \mid x) = p_\text{head}(\operatorname{flatten}(z) \mid x)

    For posteriors and priors that relate the units of a latent to each other, which are written for
    vectors: full covariance, mixtures, flows. Heads of independent values take maps themselves,
    with ``event_dim=3``.

    Args:
        head: of vectors, with D values; its network gives what it takes for a vector.
        shape: of a map, as ``(C, H, W)``, with C H W = D.

    Raises:
        ValueError: when called, if the head has another number of values.

    Example:
        >>> import torch
        >>> from ppvae import nets, posteriors
        >>> head = posteriors.FullNormal(nets.mlp(64, 8 * 11 // 2), dim=8)
        >>> q = Reshaped(head, (2, 2, 2))(torch.zeros(5, 64))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2, 2, 2]))
    """

    @takes_numbers
    def __init__(self, head: Conditional, shape: tuple[int, ...]) -> None:
        super().__init__(head)
        self.shape = tuple(shape)

    @property
    def event_dim(self) -> int:
        return len(self.shape)

    def num_outputs(self, num_values: int = 1) -> int:
        return self.head.num_outputs(num_values)

    def forward(self, *inputs: Tensor) -> Any:
        return distributions.Reshaped(self.head(*inputs), self.shape)

    def extra_repr(self) -> str:
        return f"shape={self.shape}"
