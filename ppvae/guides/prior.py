"""The model's own prior as a guide."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pyro import poutine

from ppvae.program import Program


class Prior(Program):
    r"""Draw the latents from the model's prior: the naive proposal.

    .. math:: q(z \mid x) = p(z),\qquad \log w = \log p(x \mid z)

    With it, :func:`ppvae.diagnostics.log_evidence` is plain Monte-Carlo estimation of p(x), and of
    p(x | y) for a conditional model, as structured-prediction papers report beside importance
    sampling.

    Args:
        model: a Pyro program; its observed sites are hidden, its latents drawn.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> weights = ppvae.log_weights(model, guides.Prior(model), torch.ones(3, 4))
        >>> torch.allclose(weights.log_w, weights.log_p["x"], atol=1e-5)
        True
    """

    def __init__(self, model: Callable[..., Any]) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: Any, **kwargs: Any) -> None:
        with poutine.block(hide_fn=lambda site: site.get("is_observed", False)):
            self.model(*args, **kwargs)
