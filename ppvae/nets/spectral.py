"""The regulariser of NVAE: the largest singular values of convolutions, and batch norm's scales."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppvae.arguments import require_has, takes_numbers

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Spectral(nn.Module):
    r"""A bound on how much a network can stretch its input, as a penalty per datapoint.

    .. math:: \lambda \Big(\sum_{\text{convolutions}} \sigma_{\max}(W)
              + \sum_{\text{batch norms}} \max_c |\gamma_c|\Big)

    with W a kernel as a matrix, its output channels by the rest. Pass it to
    ``SVI(..., regularizer=...)``, which adds it to each step's loss, times the datapoints that this
    sums over. Singular values are the norms of ``W' u``; the u are buffers, saved with the run; in
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

    @takes_numbers(weight=0, iterations=1)
    def __init__(self, module: nn.Module, weight: float = 1e-2, iterations: int = 4) -> None:
        super().__init__()
        require_has("module", module, "modules", "nets.nvae(...).path")
        if not weight >= 0 or iterations < 1:
            seen = f"weight={weight} and iterations={iterations}"
            raise ValueError(f"Spectral needs weight >= 0 and iterations >= 1, got {seen}")
        self.iterations = iterations
        self._module = (module,)  # in a tuple: no part of this one
        stacks = self._stacks()
        if not stacks and not self._scales():
            raise ValueError("Spectral: the module has no convolution and no batch norm to look at")
        like = next(module.parameters())
        self.register_buffer("weight", like.new_tensor(float(weight)))
        self._shapes = [stack.shape for stack in stacks]
        for i, (size, places) in enumerate(_sizes(self._shapes).items()):
            vectors = [torch.randn_like(stacks[place][:, :, 0]) for place in places]
            u = torch.cat([_padded(vector, size) for vector in vectors])
            self.register_buffer(f"u{i}", F.normalize(u, dim=1))
        self._improve(stacks, 10 * iterations)

    def forward(self) -> Tensor:
        """The penalty, 0-d, nats per datapoint; in full precision."""
        with torch.autocast(self.weight.device.type, enabled=False):
            return self._penalty()

    def _penalty(self) -> Tensor:
        stacks = self._stacks()
        if [stack.shape for stack in stacks] != self._shapes:
            raise RuntimeError(
                "Spectral: the module has other convolutions than when this was made; make "
                "another one, and with it another SVI"
            )
        if self.training:
            self._improve(stacks, self.iterations)
        total = self.weight.new_zeros(())
        for values in self._values(stacks):
            total = total + values.sum()
        for scales in self._scales():
            total = total + scales.abs().amax(1).sum()
        return self.weight.clone() * total

    def extra_repr(self) -> str:
        return f"iterations={self.iterations}"

    def singular_values(self) -> list[Tensor]:
        """Of each convolution, as far as the power iterations have come; of one shape together."""
        with torch.no_grad():
            return self._values(self._stacks())

    def _values(self, stacks: list[Tensor]) -> list[Tensor]:
        """|W' u| of each kernel, whose gradient is u v'."""
        found = {}
        for i, places in enumerate(_sizes(self._shapes).values()):
            u = getattr(self, f"u{i}").clone()  # the next call writes on it
            for place, part in zip(places, u.split([len(stacks[p]) for p in places]), strict=True):
                row = part[:, None, : stacks[place].shape[1]] @ stacks[place]
                found[place] = torch.linalg.vector_norm(row, dim=(1, 2))
        return [found[place] for place in range(len(stacks))]

    @torch.no_grad()
    def _improve(self, stacks: list[Tensor], iterations: int) -> None:
        """Power iterations u <- W W' u, of all kernels of about one size at once.

        W W' is scaled, so one normalisation is enough for four. Where W is 0, u stays.
        """
        for i, (size, places) in enumerate(_sizes(self._shapes).items()):
            squares = [stacks[place] @ stacks[place].mT for place in places]
            square = torch.cat([_padded(s, size, size) for s in squares])
            square = F.normalize(square.flatten(1), dim=1).view_as(square)
            u = getattr(self, f"u{i}")
            left = u.unsqueeze(-1)
            for step in range(iterations):
                left = square @ left
                if (step + 1) % 4 == 0 or step + 1 == iterations:
                    left = F.normalize(left, dim=1)
            u.copy_(torch.where(left.any(1), left.squeeze(-1), u))

    def _stacks(self) -> list[Tensor]:
        """The kernels as matrices of no more rows than columns, those of one shape as one stack."""
        found: dict[torch.Size, list[Tensor]] = {}
        for part in self._module[0].modules():
            if isinstance(part, _CONVOLUTIONS):
                matrix = part.weight.flatten(1)
                matrix = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
                found.setdefault(matrix.shape, []).append(matrix)
        return [torch.stack(matrices) for matrices in found.values()]

    def _scales(self) -> list[Tensor]:
        """The scales of batch norms, those of one size as one stack."""
        found: dict[torch.Size, list[Tensor]] = {}
        for part in self._module[0].modules():
            if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.weight is not None:
                found.setdefault(part.weight.shape, []).append(part.weight)
        return [torch.stack(scales) for scales in found.values()]


def _sizes(shapes: list[torch.Size]) -> dict[int, list[int]]:
    """Which stacks are padded to how many rows: to 32, or the next power of two."""
    found: dict[int, list[int]] = {}
    for place, (_, rows, _) in enumerate(shapes):
        found.setdefault(max(32, 1 << (rows - 1).bit_length()), []).append(place)
    return found


def _padded(values: Tensor, columns: int, rows: int | None = None) -> Tensor:
    """Zeros behind the last dimension, and behind the one before it."""
    margins = [0, columns - values.shape[-1]]
    return F.pad(values, margins if rows is None else [*margins, 0, rows - values.shape[-2]])
