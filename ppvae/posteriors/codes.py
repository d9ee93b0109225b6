"""Codes that are drawn: a categorical posterior over a quantiser's codes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ppvae.arguments import require_has, takes_numbers
from ppvae.conditionals import Conditional
from ppvae.conditionals.codes import CodeMap


class GumbelCodes(Conditional):
    r"""The posterior over code maps with a probability for each code, at each place.

    .. math:: q(z \mid x) = \prod_{ij} \operatorname{softmax}(\ell_{ij}(x))_{c_{ij}}

    Draws are exact, and so are log q and the KL: against a uniform prior log K less the entropy,
    at each place. Only the gradient is not: a draw takes the code with the largest
    :math:`\ell_k + g_k`, with Gumbel noise g, and its slope is that of the mean code under
    softmax((l + g) / temperature). That biases it, the less the lower the temperature, while its
    noise grows. With ``elbo.ELBO(kl="analytic")`` the KL's gradient is exact; a sampled one is
    taken along the same path. The slope of a learned prior in the codes is left out, as it is for
    a deterministic guide.

    Args:
        net: outputs logits ``(..., K, h, w)``.
        quantizer: ``nets.CodeTable``, whose codes the pair trains, or another of
            :mod:`ppvae.nets.codes`; the same object as in ``conditionals.CodePrior``.
        temperature: > 0; None: draws without a path, for ``gradient="vimco"`` or ``"score"``,
            which have no bias.

    Raises:
        ValueError: a temperature that is not positive; when called, if there is not one logit per
            code.

    Source: Jang, Gu & Poole, Categorical Reparameterization with Gumbel-Softmax, 2017, section
    2.2 (straight-through).

    Example:
        >>> from ppvae import conditionals, nets
        >>> table = nets.CodeTable(num_codes=8, dim=2)
        >>> q = GumbelCodes(nn.Conv2d(1, 8, 1), table)(torch.zeros(5, 1, 3, 3))
        >>> z = q.rsample()
        >>> z.shape, torch.equal(table.lookup(table.indices(z)), z)
        (torch.Size([5, 2, 3, 3]), True)
    """

    quantizer: Any

    @takes_numbers
    def __init__(self, net: nn.Module, quantizer: Any, temperature: float | None = 1.0) -> None:
        super().__init__(net)
        if temperature is not None and not temperature > 0:
            raise ValueError(f"GumbelCodes: temperature must be positive or None: {temperature}")
        require_has("quantizer", quantizer, "num_codes", "nets.Codebook(512, 64)")
        self.quantizer, self.temperature = quantizer, temperature

    def forward(self, *inputs: Tensor) -> CodeMap:
        logits = self.outputs(*inputs)
        if logits.dim() < 3 or logits.shape[-3] != self.quantizer.num_codes:
            raise ValueError(
                f"GumbelCodes has {self.quantizer.num_codes} codes, so its network gives logits "
                f"(..., {self.quantizer.num_codes}, h, w), and gave {tuple(logits.shape)}"
            )
        if self.temperature is None:
            return CodeMap(self.quantizer, logits)
        return GumbelCodeMap(self.quantizer, logits, self.temperature)


class GumbelCodeMap(CodeMap):
    """A :class:`~ppvae.conditionals.codes.CodeMap` whose draws have a straight-through gradient.

    Args:
        quantizer, logits: as there.
        temperature: of the softmax whose slope a draw has.
    """

    has_rsample = True

    def __init__(self, quantizer: Any, logits: Tensor, temperature: float) -> None:
        super().__init__(quantizer, logits)
        self.temperature = temperature

    def expand(self, batch_shape: Any, _instance: Any = None) -> CodeMap:
        new = super().expand(batch_shape)
        new.__dict__.pop("_drawn", None)
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = torch.Size(sample_shape) + self.logits.shape
        noise = torch.empty(shape, dtype=self.logits.dtype, device=self.logits.device)
        noise = noise.exponential_().clamp(min=torch.finfo(noise.dtype).tiny)
        perturbed = self.log_probs() - noise.log()  # of Gumbel noise
        numbers, soft = perturbed.argmax(-3), (perturbed / self.temperature).softmax(-3)
        count = torch.arange(self.quantizer.num_codes, device=numbers.device).reshape(-1, 1, 1)
        table = self.quantizer.lookup(count).flatten(1).detach()
        mean = (soft.movedim(-3, -1) @ table).movedim(-1, -3)
        value: Tensor = self.quantizer.lookup(numbers) + (mean - mean.detach())
        self._drawn = value, soft
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if value.is_leaf and value.requires_grad:
            raise NotImplementedError("a probability of codes has no slope in them")
        return super().log_prob(value)

    def log_prob_along_path(self, value: Tensor) -> Tensor:
        """Log q of its own last draw, with the draw's straight-through slope, too."""
        drawn, soft = self.__dict__.get("_drawn", (None, None))
        log_prob = self.log_prob(value)
        if drawn is not value or soft is None:
            return log_prob
        path = (soft * self.log_probs().detach()).sum((-3, -2, -1))
        return log_prob + (path - path.detach())
