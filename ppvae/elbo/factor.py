"""FactorVAE: the evidence lower bound less a weight times the total correlation of the latent."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ppvae.auxiliary import Ratio
from ppvae.elbo.standard import ELBO
from ppvae.elbo.state import State
from ppvae.pairs import DATA_PLATE, PARTICLE_PLATE
from ppvae.weights import LogWeights


@dataclass(frozen=True, eq=False)
class FactorELBO(ELBO):
    r"""The ELBO less gamma times the total correlation of the aggregate posterior (FactorVAE).

    .. math:: \frac1N \sum_n \mathcal L_\beta(x_n)
              - \gamma\, \mathrm{KL}\Big(q(z) \,\Big\|\, \prod_j q(z_j)\Big),
              \qquad q(z) = \frac1N \sum_n q(z \mid x_n)

    The divergence is estimated as the mean of T(z), where the network T, a :class:`ppvae.Ratio`,
    learns log q(z) - sum_j log q(z_j) from the draws of a batch: each log-weight is lowered by
    gamma T(z). T is a constant in the pair's step, and its own loss reaches no encoder.
    :class:`ppvae.SVI` trains it after each step of the pair (``beside=ppvae.Beside(...)``), on
    fresh draws of the batch. Those from the denominator are the same ones put together anew:
    coordinate j of row n is that of row n + o_j, with as many distinct offsets o_j as there are
    coordinates, so no two of them are of one row. That makes what T learns of single coordinates
    cancel in the sum, and noise with it.

    An immature network drives the codes apart, so let gamma rise (``elbo.LinearWarmup``), and give
    T several steps to each of the pair's.

    Args:
        num_particles, gradient, beta, kl: as in :class:`~ppvae.elbo.ELBO`.
        gamma: the weight on the total correlation: a number >= 0, a 0-d tensor, or a callable of
            the optimisation step.
        ratio: a network from the latent, ``(..., D)``, to ``(..., 1)``; each pair gets a copy.
        latent: the name of a latent that is a vector.

    Reported bounds (:meth:`evaluate`, ``fit``'s table) are the plain ELBO.

    Raises:
        TypeError, ValueError: bad arguments; a latent that is no vector in the data plate alone, or
            is enumerated or masked; a batch with fewer rows than the latent has coordinates.

    Source: Kim & Mnih, Disentangling by Factorising, 2018.

    Example:
        >>> import ppvae
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> loss = elbo.FactorELBO(gamma=elbo.LinearWarmup(10, end=6.4), ratio=nets.mlp(2, 8, 1))
        >>> svi = ppvae.SVI(model, guide, torch.optim.Adam, loss, beside=ppvae.Beside(steps=4))
        >>> history = ppvae.fit(svi, torch.ones(20, 4), epochs=1, progress=False)
        >>> 1.2 < history.rows[0]["ratio_loss"] < 1.7  # 2 log 2: it has hardly learned yet
        True
    """

    gamma: float | Tensor | Callable[[int], float] = 10.0
    ratio: nn.Module | None = None
    latent: str = "z"

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "stl", "score")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ratio, nn.Module):
            raise TypeError(
                "FactorELBO needs ratio=, a network from the latent (..., D) to (..., 1), such as "
                f"nets.mlp(D, 256, 1), got {self.ratio!r}"
            )
        if not isinstance(self.gamma, (Real, Tensor)) and not callable(self.gamma):
            raise TypeError(
                "gamma must be a number, a 0-d tensor or a callable of the step such as "
                f"elbo.LinearWarmup, got {self.gamma!r}"
            )
        if isinstance(self.gamma, Tensor) and self.gamma.dim() != 0:
            raise ValueError(f"gamma must be one number, got a tensor {tuple(self.gamma.shape)}")
        if isinstance(self.gamma, (int, float, Tensor)) and not self.gamma >= 0:
            raise ValueError(
                f"gamma weighs the total correlation, so it must be >= 0, got {self.gamma}"
            )

    def new_state(self) -> State:
        assert self.ratio is not None
        state = super().new_state()
        state.ratio = Ratio(copy.deepcopy(self.ratio), Factors(self.latent))
        return state

    def effective(self, weights: LogWeights, state: State) -> Tensor:
        log_w = super().effective(weights, state)
        codes = self._codes(weights)
        estimate: Tensor = state.ratio(codes.flatten(0, -2)).reshape(codes.shape[:-1])
        return log_w - state.at_step(self.gamma, "gamma") * estimate

    def _codes(self, weights: LogWeights) -> Tensor:
        """The draws of the latent, ``(K or 1, N, D)``."""
        site = weights.guide_trace.nodes.get(self.latent)
        if self.latent not in weights.q or site is None:
            raise ValueError(
                f"FactorELBO(latent={self.latent!r}): the guide has no such latent, but "
                f"{list(weights.latents)}"
            )
        plates = {frame.name for frame in site["cond_indep_stack"]} - {DATA_PLATE, PARTICLE_PLATE}
        shape = tuple(site["fn"].event_shape)
        if not shape or plates or weights.enumerated or weights.joint:
            raise ValueError(
                f"the total correlation is of a vector or map per row, drawn: {self.latent!r} has "
                f"event shape {shape}, inner plates {sorted(plates)}, beside enumerated "
                f"{sorted(weights.enumerated)}; give .to_event(1), one row per datapoint"
            )
        if site["mask"] is not None:
            raise ValueError(f"latent {self.latent!r} is masked: its rows would count in the ratio")
        value: Tensor = site["value"].flatten(-len(shape))
        return value.reshape(-1, value.shape[-2], value.shape[-1])


@dataclass(frozen=True)
class Factors:
    """Draws of a latent, and draws from the product of its marginals: a contrast of a ``Ratio``."""

    latent: str

    def __call__(self, draws: Any) -> tuple[Tensor, Tensor]:
        z = draws.guide(self.latent)
        z = z.flatten(1) if z.dim() > 2 else z  # a map's units are a vector here
        return z, shifted(z, self.latent)


def shifted(z: Tensor, name: str = "z") -> Tensor:
    """Each coordinate of rows ``(N, D)`` from another row: n + o_j, offsets distinct and random.

    Raises:
        ValueError: no matrix; fewer rows than coordinates.

    Example:
        >>> rows = torch.arange(4.0).unsqueeze(1).expand(4, 3)
        >>> bool((shifted(rows).sort(1).values.diff(dim=1) > 0).all())  # of three different rows
        True
    """
    if z.dim() != 2:
        raise ValueError(
            f"the total correlation is of vectors, one per row: latent {name!r} is drawn as "
            f"{tuple(z.shape)}; give its distribution .to_event(1)"
        )
    rows, size = z.shape
    if rows < size:
        raise ValueError(
            f"latent {name!r} has {size} coordinates, which are put together from as many rows, "
            f"and this batch has {rows}: give batches of {size} rows or more, the last one included"
        )
    offsets = torch.randperm(rows, device=z.device)[:size]
    return z.gather(0, (torch.arange(rows, device=z.device).unsqueeze(1) + offsets) % rows)
