"""Amortised guides: programs that draw a model's latents from q(z | x)."""

from ppvae.guides.normal import Normal
from ppvae.guides.prior import Prior

__all__ = ["Normal", "Prior"]
