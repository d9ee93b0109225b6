"""Finite sets of code vectors: a network's output to the nearest of them, and back to numbers.

A quantiser has ``num_codes``, ``dim``, and four ways to be called: itself, from an output to the
code, exactly, with the straight-through gradient; ``indices`` from a code to its number and
``lookup`` back; ``squared_distances`` from an output to all codes. Codes are maps: ``(..., D, h,
w)``, one vector of D numbers at each of h x w places; numbers are ``(..., h, w)``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, distributed, nn

from ppvae.arguments import takes_numbers
from ppvae.auxiliary import Auxiliary

_RESTART_EVERY = 20  # steps


class _Table(nn.Module):
    """What a table of K code vectors does: ``codes (K, D)`` are a parameter or a buffer."""

    codes: Tensor
    num_codes: int
    dim: int

    def table(self) -> Tensor:
        """The codes, ``(K, D)``, as they enter the pair."""
        return self.codes

    def indices(self, values: Tensor) -> Tensor:
        """The number of the nearest code, the lowest of several: ``(..., h, w)`` of maps."""
        return _scores(check_map(self, values), self.table()).argmin(-3)

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes of numbers: ``(..., h, w)`` to ``(..., D, h, w)``."""
        return self.table()[indices].movedim(-1, -3)

    def squared_distances(self, raw: Tensor) -> Tensor:
        """From each place to each code: ``(..., D, h, w)`` to ``(..., K, h, w)``."""
        return squared_distances(check_map(self, raw), self.table())

    def extra_repr(self) -> str:
        return f"num_codes={self.num_codes}, dim={self.dim}"


class CodeTable(_Table):
    r"""K code vectors as parameters of the pair, for :class:`ppvae.posteriors.GumbelCodes`.

    Args:
        num_codes: K >= 2.
        dim: D >= 1, the channels of a map of codes.

    Raises:
        ValueError: sizes out of range; when called, a map with other channels.

    Example:
        >>> table = CodeTable(num_codes=8, dim=2)
        >>> numbers = torch.randint(8, (5, 3, 3))
        >>> torch.equal(table.indices(table.lookup(numbers)), numbers)
        True
    """

    @takes_numbers(num_codes=1, dim=1)
    def __init__(self, num_codes: int, dim: int) -> None:
        super().__init__()
        check_sizes("CodeTable", num_codes, dim)
        self.num_codes, self.dim = num_codes, dim
        self.codes = nn.Parameter(torch.randn(num_codes, dim))


class Codebook(_Table, Auxiliary):
    r"""K code vectors that follow what is assigned to them: VQ-VAE's vector quantisation.

    .. math:: c = \arg\min_k \lVert z_e - e_k \rVert^2, \qquad
              z = e_c + z_e - \operatorname{sg}(z_e)

    z is exactly a code, and its gradient is handed to the encoder's output as it is
    (straight-through). The codes get none. After each step of the pair they become the mean of
    the outputs that were assigned to them, over about 1 / (1 - decay) steps:

    .. math:: N_k \leftarrow N_k + w_t (n_k - N_k), \quad m_k \leftarrow m_k + w_t (s_k - m_k),
              \quad e_k = m_k / N_k, \qquad w_t = \frac{1 - \gamma}{1 - \gamma^t}

    with counts :math:`n_k` and sums :math:`s_k` of the joint batch of all processes; the weight
    makes the average free of its start at 0. A code that is hardly used is put where an output of
    the encoder is, chosen at random, and its averages with it: in the first step, and then every
    20 steps.

    Only outputs with a gradient are learned from, in training mode: with a frozen encoder, or in
    evaluation, the codes stay. The history shows ``code_perplexity``, the exponential of the
    entropy of the averaged usage, K for codes used alike.

    Args:
        num_codes: K >= 2.
        dim: D >= 1, the channels of the encoder's output.
        decay: gamma in [0, 1).
        restart: how many outputs per step a code must be used for, on average, >= 0; 0: no code
            is moved.
        ema: False: the codes are learned by their own loss instead, :math:`\lVert
            \operatorname{sg}(z_e) - e_c \rVert^2` summed, with an optimiser of their own
            (:class:`ppvae.Beside`).

    Raises:
        ValueError: numbers out of range; when called, an output with other channels.

    Source: van den Oord, Vinyals & Kavukcuoglu, Neural Discrete Representation Learning, 2017,
    section 3 and appendix A.1; Dhariwal et al., Jukebox, 2020, section 3 (restarts).

    Example:
        >>> book = Codebook(num_codes=2, dim=1, restart=0)
        >>> book.codes.copy_(torch.tensor([[0.0], [10.0]]))
        tensor([[ 0.],
                [10.]])
        >>> raw = torch.tensor([1.0, 3.0, 7.0]).reshape(3, 1, 1, 1).requires_grad_()
        >>> book(raw).flatten().tolist()
        [0.0, 0.0, 10.0]
        >>> book.update(lambda tensors: None)
        >>> book.codes.flatten().tolist()  # the means of what was assigned
        [2.0, 7.0]
    """

    usage: Tensor
    moments: Tensor
    updates: Tensor
    seen: Tensor
    sums: Tensor
    squares: Tensor
    offered: Tensor

    @takes_numbers(num_codes=1, dim=1)
    def __init__(
        self,
        num_codes: int,
        dim: int,
        decay: float = 0.99,
        restart: float = 1.0,
        ema: bool = True,
    ) -> None:
        super().__init__()
        check_sizes("Codebook", num_codes, dim)
        if not 0 <= decay < 1:
            raise ValueError(f"Codebook: decay must lie in [0, 1), got {decay}")
        if not 0 <= restart < math.inf:
            raise ValueError(f"Codebook: restart counts uses per step, >= 0, got {restart}")
        self.num_codes, self.dim, self.decay, self.restart = num_codes, dim, decay, restart
        self.ema = ema
        codes = torch.randn(num_codes, dim)
        if ema:
            self.register_buffer("codes", codes)
        else:
            self.codes = nn.Parameter(codes)
        # averages over steps, of what the joint batch assigned to each code
        self.register_buffer("usage", torch.zeros(num_codes))
        self.register_buffer("moments", torch.zeros(num_codes, dim))
        self.register_buffer("updates", torch.zeros(()))
        # of the latest batch: how many outputs, their sum, their squares, and some of them
        self.register_buffer("seen", torch.zeros(num_codes), persistent=False)
        self.register_buffer("sums", torch.zeros(num_codes, dim), persistent=False)
        self.register_buffer("squares", torch.zeros(()), persistent=False)
        self.register_buffer("offered", torch.zeros(num_codes, dim), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """The nearest codes of an encoder's outputs, ``(..., D, h, w)``, straight-through."""
        index = self.indices(raw.detach())
        if self.training and raw.requires_grad:
            self._record(raw.detach(), index)
        return straight_through(raw, self.lookup(index).to(raw.dtype))

    def table(self) -> Tensor:
        """The codes, ``(K, D)``, as they enter the pair: constants."""
        return self.codes.detach()

    def distortion(self, raw: Tensor, codes: Tensor) -> Tensor:
        """Squared distance of outputs and codes, of each map: ``(..., D, h, w)`` to ``(...)``."""
        return (raw - codes.detach()).square().sum((-3, -2, -1))

    def _record(self, raw: Tensor, index: Tensor) -> None:
        """Write down what a batch assigns to the codes, and an output at random for each."""
        rows = raw.movedim(-3, -1).reshape(-1, self.dim).to(self.sums.dtype)
        index = index.flatten()
        self.seen.copy_(
            torch.zeros_like(self.seen).index_add(0, index, torch.ones_like(rows[:, 0]))
        )
        self.sums.copy_(torch.zeros_like(self.sums).index_add(0, index, rows))
        self.squares.copy_(rows.square().sum())
        order = torch.randperm(len(rows), device=rows.device)
        places = torch.arange(self.num_codes, device=rows.device) % len(rows)
        self.offered.copy_(rows[order[places]])

    def loss(self, *drawn: Tensor) -> Tensor | None:
        if self.ema:
            return None
        # sum ||z_e - e_c||^2 needs no more of the outputs than their counts, sums and squares
        scale = (self.seen * self.codes.square().sum(1)).sum()
        return scale - 2 * (self.sums * self.codes).sum() + self.squares

    @torch.no_grad()
    def update(self, total: Callable[[list[Tensor]], None]) -> None:
        rank, size = _this_process()
        number = torch.arange(self.num_codes, device=self.seen.device)
        own = (number % size == rank).to(self.seen.dtype)  # whose output a code would be moved to
        offered = self.offered * own.unsqueeze(1)
        total([self.seen, self.sums, offered, own])

        learned = self.seen.sum() > 0
        self.updates += learned
        weight = (1 - self.decay) / (1 - self.decay**self.updates)
        weight = torch.where(learned, weight, 0.0)
        self.usage.lerp_(self.seen, weight)
        self.moments.lerp_(self.sums, weight)
        usage = self.usage.unsqueeze(1)
        if self.ema:
            self.codes.copy_(torch.where(usage > 1e-5, self.moments / usage, self.codes))

        due = learned & (self.updates % _RESTART_EVERY == 1)
        dead = (due & (self.usage < self.restart) & (own > 0)).unsqueeze(1)
        self.codes.copy_(torch.where(dead, offered, self.codes))
        self.usage.copy_(torch.where(dead.squeeze(1), self.restart, self.usage))
        self.moments.copy_(torch.where(dead, self.restart * self.codes, self.moments))
        for buffer in (self.seen, self.sums, self.squares):
            buffer.zero_()

    def report(self) -> dict[str, Tensor]:
        share = self.usage / self.usage.sum()
        return {"code_perplexity": torch.special.entr(share).sum().exp()}


class FSQ(nn.Module):
    r"""Finite scalar quantisation: each channel rounded to one of a few levels, no codebook.

    .. math:: b_i = h_i \tanh(\tilde z_i + \operatorname{atanh}(o_i / h_i)) - o_i, \qquad
              z_i = \operatorname{round}(b_i) / \lfloor L_i / 2 \rfloor

    with :math:`h_i = (L_i - 1)(1 + 10^{-3}) / 2`, and :math:`o_i = 1/2` where :math:`L_i` is even,
    else 0. The value is exactly a code, and its gradient is that of b over the same divisor.
    Outputs are standardised over the batch first, with running statistics in evaluation mode:
    those of an untrained encoder are small, and would all be rounded to one code. Codes are fixed,
    so there is nothing to commit to: train with ``elbo.ELBO()``.

    Args:
        levels: numbers of levels, one per channel, each >= 2; there are ``prod(levels)`` codes.

    Raises:
        TypeError: levels that are no whole numbers.
        ValueError: no levels, or fewer than two of one; when called, a map with other channels.

    Source: Mentzer et al., Finite Scalar Quantization: VQ-VAE Made Simple, 2024, section 3.

    Example:
        >>> fsq = FSQ([3, 4])
        >>> fsq.num_codes, fsq.lookup(torch.arange(12).reshape(3, 4))[0].unique().tolist()
        (12, [-1.0, 0.0, 1.0])
    """

    reach: Tensor
    offset: Tensor
    divisor: Tensor
    strides: Tensor

    @takes_numbers
    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ: levels are numbers >= 2, one per channel, got {tuple(levels)}")
        self.levels, self.dim, self.num_codes = tuple(levels), len(levels), math.prod(levels)
        self.norm = nn.BatchNorm1d(self.dim, affine=False)
        count = torch.tensor(self.levels)
        strides = torch.tensor([math.prod(self.levels[:i]) for i in range(self.dim)])
        for name, value in {
            "reach": (count - 1) * (1 + 1e-3) / 2,
            "offset": (count % 2 == 0) * 0.5,
            "divisor": count // 2,
            "strides": strides,
        }.items():
            self.register_buffer(name, value.reshape(-1, 1, 1), persistent=False)

    def forward(self, raw: Tensor) -> Tensor:
        """The codes of an encoder's outputs, ``(..., D, h, w)``, straight-through."""
        bounded = self._bounded(raw)
        return straight_through(bounded / self.divisor, bounded.round() / self.divisor)

    def _bounded(self, raw: Tensor) -> Tensor:
        raw = check_map(self, raw)
        rows = raw.movedim(-3, -1)
        flat = rows.reshape(-1, self.dim)
        # as a codebook's, its statistics follow outputs that have a gradient
        learning = self.training and flat.requires_grad
        mean, var = self.norm.running_mean, self.norm.running_var
        flat = nn.functional.batch_norm(flat, mean, var, training=learning)
        standard = flat.reshape(rows.shape).movedim(-1, -3)
        shift = torch.atanh(self.offset / self.reach)
        return torch.tanh(standard + shift) * self.reach - self.offset

    def indices(self, values: Tensor) -> Tensor:
        """The number of each code: ``(..., D, h, w)`` to ``(..., h, w)``."""
        digits = (check_map(self, values) * self.divisor).round().long() + self.divisor
        return (digits * self.strides).sum(-3)

    def lookup(self, indices: Tensor) -> Tensor:
        """The codes of numbers: ``(..., h, w)`` to ``(..., D, h, w)``."""
        count = torch.tensor(self.levels, device=indices.device).reshape(-1, 1, 1)
        digits = indices.unsqueeze(-3) // self.strides % count - self.divisor
        return digits.to(self.reach.dtype) / self.divisor

    def squared_distances(self, raw: Tensor) -> Tensor:
        """From each place, standardised and bounded, to each code: ``(..., K, h, w)``."""
        numbers = torch.arange(self.num_codes, device=raw.device).reshape(-1, 1, 1)
        codes = self.lookup(numbers).reshape(self.num_codes, self.dim)
        return squared_distances(self._bounded(raw) / self.divisor, codes)

    def extra_repr(self) -> str:
        return f"levels={self.levels}"


# ------------------------------------------------------------------------------ what they share


def straight_through(smooth: Tensor, value: Tensor) -> Tensor:
    """``value``, to the last digit, with the gradient of ``smooth``."""
    return value.detach() + (smooth - smooth.detach())


def squared_distances(values: Tensor, codes: Tensor) -> Tensor:
    """Squared distances to all codes, ``(..., K, h, w)``."""
    squares = values.square().sum(-3, keepdim=True)
    return (squares + 2 * _scores(values, codes)).clamp(min=0)


def _scores(values: Tensor, codes: Tensor) -> Tensor:
    """Half the squared distance less what all codes have in common, ``(..., K, h, w)``."""
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    with torch.autocast(values.device.type, enabled=False):
        products = values.movedim(-3, -1) @ codes.to(values.dtype).T
        return (0.5 * codes.square().sum(1) - products).movedim(-1, -3)


def check_sizes(name: str, num_codes: int, dim: int) -> None:
    """Raise ``ValueError`` unless there are two codes or more, of one number or more."""
    if num_codes < 2 or dim < 1:
        raise ValueError(
            f"{name} needs num_codes >= 2 and dim >= 1, got num_codes={num_codes}, dim={dim}"
        )


def check_map(quantizer: nn.Module, values: Tensor) -> Tensor:
    """Values, if they are maps with the channels of the codes; else ``ValueError``."""
    if values.dim() < 3 or values.shape[-3] != quantizer.dim:
        raise ValueError(
            f"{type(quantizer).__name__} has codes of {quantizer.dim} numbers, so it takes maps "
            f"(..., {quantizer.dim}, h, w), and saw {tuple(values.shape)}: give the encoder that "
            "many output channels, or the quantiser that dim"
        )
    return values


def _this_process() -> tuple[int, int]:
    """Rank and number of the processes that train together."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
