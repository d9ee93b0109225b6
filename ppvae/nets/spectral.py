"""The regulariser of NVAE: the largest singular values of convolutions, and batch norm's scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Spectral(nn.Module):
    r"""A bound on how much a network can stretch its input, as a penalty per datapoint.

    .. math:: \lambda \Big(\sum_{\text{convolutions}} \sigma_{\max}(W)
              + \sum_{\text{batch norms}} \max_c |\gamma_c|\Big)

    with W a kernel as a matrix, its output channels by the rest. Pass it to
    ``SVI(..., regularizer=...)``, which adds it to each step's loss, times the datapoints that this
    sums over. Singular values are u' W v of vectors that are buffers, saved with the run; in
    training each call first improves them by some power iterations, so they follow the weights.
    Where weights are normalised (``torch.nn.utils.parametrizations``), W is what the layer uses.

    Args:
        module: holds the layers; several are an ``nn.ModuleList``. It is not owned: parameters and
            state stay with the pair.
        weight: lambda >= 0; NVAE's is 1e-2. It becomes a buffer, to be changed in place.
        iterations: of the power method at each call, >= 1; ten times as many here.

    Raises:
        ValueError: a number out of range; a module without such layers.
        RuntimeError: when called, if the module has other convolutions than it had here.

    Source: Vahdat & Kautz, NVAE, 2020, section 3.2; Yoshida & Miyato, Spectral Norm Regularization,
    2017.

    Example:
        >>> conv = nn.Conv2d(2, 2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = conv.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]])[..., None, None])
        >>> Spectral(nn.Sequential(conv, nn.BatchNorm2d(2)), weight=0.1)()  # 0.1 (4 + 1)
        tensor(0.5000, grad_fn=<MulBackward0>)
    """

    weight: Tensor

    def __init__(self, module: nn.Module, weight: float = 1e-2, iterations: int = 4) -> None:
        super().__init__()
        if not weight >= 0 or iterations < 1:
            seen = f"weight={weight} and iterations={iterations}"
            raise ValueError(f"Spectral needs weight >= 0 and iterations >= 1, got {seen}")
        self.iterations = iterations
        self._module = (module,)  # in a tuple: no part of this one
        matrices = self._matrices()
        if not matrices and not self._scales():
            raise ValueError("Spectral: the module has no convolution and no batch norm to look at")
        like = next(module.parameters())
        self.register_buffer("weight", like.new_tensor(float(weight)))
        for i, stack in enumerate(matrices):
            self.register_buffer(f"u{i}", F.normalize(torch.randn_like(stack[:, :, 0]), dim=1))
            self.register_buffer(f"v{i}", torch.zeros_like(stack[:, 0]))
            self._improve(i, stack.detach(), 10 * iterations)

    def forward(self) -> Tensor:
        """The penalty, 0-d, nats per datapoint; in full precision."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._penalty()

    def _penalty(self) -> Tensor:
        total = self.weight.new_zeros(())
        for i, stack in enumerate(self._matrices()):
            u, v = getattr(self, f"u{i}", None), getattr(self, f"v{i}", None)
            if u is None or u.shape != stack.shape[:2] or v is None or v.shape != stack[:, 0].shape:
                raise RuntimeError(
                    "Spectral: the module has other convolutions than when this was made; make "
                    "another one, and with it another SVI"
                )
            if self.training:
                self._improve(i, stack.detach(), self.iterations)
                u, v = getattr(self, f"u{i}"), getattr(self, f"v{i}")
            total = total + torch.einsum("go,goi,gi->", u.clone(), stack, v.clone())
        for scale in self._scales():
            total = total + scale.abs().max()
        return self.weight.clone() * total

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}"

    def singular_values(self) -> list[Tensor]:
        """Of each convolution, as far as the power iterations have come; of one shape together."""
        with torch.no_grad():
            return [
                torch.einsum("go,goi,gi->g", getattr(self, f"u{i}"), stack, getattr(self, f"v{i}"))
                for i, stack in enumerate(self._matrices())
            ]

    @torch.no_grad()
    def _improve(self, i: int, stack: Tensor, iterations: int) -> None:
        """Power iterations u <- W W' u; W W' is scaled, so one normalisation is enough for four."""
        u, v = getattr(self, f"u{i}"), getattr(self, f"v{i}")
        square = stack @ stack.mT
        square = F.normalize(square.flatten(1), dim=1).view_as(square)
        left = u.unsqueeze(-1)
        for step in range(iterations):
            left = square @ left
            if (step + 1) % 4 == 0 or step + 1 == iterations:
                left = F.normalize(left, dim=1)
        u.copy_(left.squeeze(-1))
        v.copy_(F.normalize((stack.mT @ left).squeeze(-1), dim=1))

    def _matrices(self) -> list[Tensor]:
        """The kernels as matrices, those of one shape as one stack."""
        found: dict[torch.Size, list[Tensor]] = {}
        for part in self._module[0].modules():
            if isinstance(part, _CONVOLUTIONS):
                matrix = part.weight.flatten(1)
                found.setdefault(matrix.shape, []).append(matrix)
        return [torch.stack(matrices) for matrices in found.values()]

    def _scales(self) -> list[Tensor]:
        batch_norm = nn.modules.batchnorm._BatchNorm
        parts = self._module[0].modules()
        return [p.weight for p in parts if isinstance(p, batch_norm) and p.weight is not None]
