"""VQ-VAE: the evidence lower bound less what keeps the encoder at its codes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

from torch import Tensor

from ppvae.elbo.standard import ELBO
from ppvae.elbo.state import State
from ppvae.pairs import kind
from ppvae.terms import masked, term
from ppvae.weights import LogWeights


@dataclass(frozen=True, eq=False)
class VQELBO(ELBO):
    r"""The ELBO less a weight times the squared distance of encoder and codes (VQ-VAE).

    .. math:: \mathcal L(x) - \lambda \sum_{\text{places}}
              \lVert z_e(x) - \operatorname{sg}(e_c) \rVert^2

    for each latent of the guide that is a code (:class:`ppvae.guides.Quantized`). The guide is
    deterministic, so the first term is log p(x | z) + log p(z), without sampling noise; its
    gradient reaches the encoder straight through the code. The codes themselves are constants
    here: :class:`ppvae.nets.Codebook` learns them after each step.

    Everything is in nats per datapoint. The paper's weight belongs to means: beta times the mean
    over a code map of :math:`D_z` numbers, beside a squared error over the data's variance, the
    mean over :math:`D_x` numbers. With ``conditionals.Normal(net, scale=sigma)``, sigma^2 being
    the data's variance, that is ``commitment = beta * D_x / (2 * D_z)``.

    Args:
        num_particles, gradient, beta, kl: as in :class:`~ppvae.elbo.ELBO`.
        commitment: lambda >= 0, a number, a 0-d tensor or a callable of the optimisation step.

    Reported bounds (:meth:`evaluate`, ``fit``'s table) are the plain ELBO: minus it is a code
    length.

    Raises:
        TypeError, ValueError: bad arguments; no latent of the guide is a code with a distance.

    Source: van den Oord, Vinyals & Kavukcuoglu, Neural Discrete Representation Learning, 2017,
    equation 3.

    Example:
        >>> import torch, ppvae
        >>> from torch import nn
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> book = nets.Codebook(num_codes=8, dim=2)
        >>> encoder = nn.Sequential(nn.Linear(16, 2 * 9), nn.Unflatten(-1, (2, 3, 3)))
        >>> decoder = nn.Sequential(nn.Flatten(-3), nn.Linear(2 * 9, 16))
        >>> prior = conditionals.CodePrior(book, shape=(3, 3))
        >>> model = models.VAE(conditionals.Bernoulli(decoder), prior=prior)
        >>> guide = guides.Quantized(encoder, book)
        >>> svi = ppvae.SVI(model, guide, loss=elbo.VQELBO(commitment=1.0))
        >>> x = torch.bernoulli(torch.full((40, 16), 0.5))
        >>> history = ppvae.fit(svi, x, epochs=2, progress=False)
        >>> {"train_objective", "code_perplexity"} <= history.rows[0].keys()
        True
    """

    commitment: float | Tensor | Callable[[int], float] = 0.25

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "stl", "score")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.commitment, (Real, Tensor)) and not callable(self.commitment):
            raise TypeError(
                "commitment must be a number, a 0-d tensor or a callable of the step such as "
                f"elbo.LinearWarmup, got {self.commitment!r}"
            )
        if isinstance(self.commitment, (int, float)) and not self.commitment >= 0:
            raise ValueError(
                f"commitment weighs a squared distance, so it must be >= 0, got {self.commitment}"
            )

    def effective(self, weights: LogWeights, state: State) -> Tensor:
        log_w = super().effective(weights, state)
        if isinstance(self.commitment, (int, float)) and self.commitment == 0:
            return log_w
        return log_w - state.at_step(self.commitment) * self._distortion(weights)

    def _distortion(self, weights: LogWeights) -> Tensor:
        """Squared distances of outputs and codes, summed over latents, ``(K or 1, N)``."""
        found, kinds = [], []
        for name in weights.latents:
            site = weights.guide_trace.nodes[name]
            fn: Any = site["fn"]
            while not hasattr(fn, "distortion") and hasattr(fn, "base_dist"):
                fn = fn.base_dist
            kinds.append(f"{name!r} ({kind(fn)})")
            values = fn.distortion() if hasattr(fn, "distortion") else None
            if values is not None:
                values = masked(values, site["mask"])
                found.append(
                    term(site, weights.leftmost, weights.joint, weights.letters, values).values
                )
        if not found:
            raise ValueError(
                f"VQELBO: no latent has a distance of encoder and code, but {', '.join(kinds)}; "
                "use elbo.ELBO() where codes are drawn or fixed (FSQ), or guides.Quantized with a "
                "nets.Codebook"
            )
        total: Tensor = sum(found[1:], found[0])
        return total
