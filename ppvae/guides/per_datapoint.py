"""Individual inference: no encoder, but parameters of its own for each datapoint."""

from __future__ import annotations

import pyro
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.program import Program, data_plate


class PerDatapoint(Program):
    r"""The guide without amortisation: q(z | x_n) has its own parameters :math:`\lambda_n`.

    .. math:: z_n \sim q(z;\, \lambda_n), \qquad n = \text{index of the row}

    Called like any guide, with one more argument, the last: the row numbers of the batch. The
    model is wrapped in :class:`ppvae.local.Indexed`, which ignores them; ``fit`` and
    ``log_evidence`` then cut data and numbers alike. With Adam, rows outside a minibatch still
    move by its momentum: where the rows are few, train on all at once.

    Args:
        head: from parameters ``(N, ...)`` to a distribution of batch shape ``(N,)``: a
            conditional whose net is ``nn.Identity()``.
        outputs: the initial parameters of all rows, ``(N_total, ...)``, e.g.
            ``torch.zeros(len(x), 2 * latent_dim)``. ``guide.local(x)`` starts at an encoder.
        latent: the name of the latent site.

    Raises:
        ValueError: when called, if the last argument is not row numbers.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> from ppvae.local import Indexed
        >>> x = torch.bernoulli(torch.full((20, 4), 0.5))
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> head = conditionals.Normal(torch.nn.Identity())
        >>> guide = guides.PerDatapoint(head, torch.zeros(20, 2 * 2))
        >>> svi = ppvae.SVI(Indexed(model), guide)
        >>> history = ppvae.fit(svi, (x, torch.arange(20)), epochs=2, batch_size=5, progress=False)
        >>> guide.posterior(torch.tensor([0, 7])).mean.shape
        torch.Size([2, 2])
    """

    @takes_numbers
    def __init__(self, head: nn.Module, outputs: Tensor, latent: str = "z") -> None:
        super().__init__()
        if not isinstance(outputs, Tensor):
            raise TypeError(f"outputs must be a tensor, a row for each datapoint, got {outputs!r}")
        self.head = head
        self.table = Table(outputs)
        self.latent = latent

    def posterior(self, index: Tensor) -> pyro.distributions.Distribution:
        """q(z; lambda_n) of the rows of that number."""
        fn: pyro.distributions.Distribution = self.head(self.table(index))
        return fn

    def forward(self, *args: Tensor, size: int | None = None) -> Tensor:
        """Draw z, ``(N, latent_dim)``; called as ``guide(x, index)`` or ``guide(x, y, index)``."""
        index = args[-1]
        with data_plate(index, size=size):
            z: Tensor = pyro.sample(self.latent, self.posterior(index))
        return z


class Table(nn.Module):
    """Rows of numbers to learn; from row numbers ``(N,)`` to ``(N, ...)``.

    Args:
        rows: their initial values, ``(N_total, ...)``.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows = nn.Parameter(rows.detach().clone())

    def forward(self, index: Tensor) -> Tensor:
        """The rows of that number."""
        if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
            wanted = "takes the row numbers as its last argument, integers (N,)"
            seen = f"{index.dtype} of shape {tuple(index.shape)}"
            cure = "add torch.arange(len(x)), and wrap the model in ppvae.local.Indexed"
            raise ValueError(f"this guide {wanted}, got {seen}: {cure}")
        return self.rows.index_select(0, index)

    def check(self, index: Tensor) -> None:
        """Check a data set's row numbers once; raises ``ValueError``."""
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < len(self.rows):
            seen = f"{int(index.min())} .. {int(index.max())}"
            raise ValueError(f"row numbers must lie in 0 .. {len(self.rows) - 1}, got {seen}")
