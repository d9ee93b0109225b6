"""ELBOs that take off what ties the codes of a latent to each other, without another network."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar

import torch
from torch import Tensor

from ppvae.elbo.kl import independent_units
from ppvae.elbo.penalties import Penalty
from ppvae.elbo.standard import ELBO
from ppvae.elbo.state import Schedule, State
from ppvae.pairs import DATA_PLATE, PARTICLE_PLATE, Site
from ppvae.weights import LogWeights


@dataclass(frozen=True, eq=False)
class TCELBO(ELBO):
    r"""The ELBO with its KL in three parts, each with a weight: beta-TCVAE.

    .. math:: \mathbb E\left[\log p(x \mid z)\right]
              - \alpha\, I(x; z)
              - \beta\, \mathrm{KL}\Big(q(z) \,\Big\|\, \prod_j q(z_j)\Big)
              - \gamma \sum_j \mathrm{KL}\left(q(z_j) \,\|\, p(z_j)\right)

    with :math:`I = \mathbb E \log q(z \mid x) / q(z)`; with all weights 1 it is the sampled ELBO,
    exactly. The middle part is the total correlation. The aggregate q(z) over ``size`` datapoints
    is estimated from the batch, for a draw of row n of B rows by

    .. math:: \hat q(z) = \frac1N q(z \mid x_n)
              + \frac{N - 1}{N (B - 1)} \sum_{m \ne n} q(z \mid x_m)

    which has the mean q(z) over batches, and is q(z) for the whole data set. It is the mean of the
    published minibatch stratified sampling over which row has the odd weight; published code puts
    1/N on the first column in the place of a row's own. The log of an estimate is biased: the
    parts are a gradient, and no number to report (:func:`ppvae.diagnostics.total_correlation` is
    one). :meth:`evaluate` is the ELBO.

    Args:
        num_particles: K >= 1.
        gradient: ``"pathwise"`` or ``"score"``.
        alpha, beta, gamma: numbers, 0-d tensors or schedules of the step.
        size: N >= 2, datapoints in the training set; by name.

    Raises:
        TypeError: no ``size``, or a weight that is none of these: a penalty, say.
        ValueError: bad arguments; at a step, a latent that is no vector of independent dimensions
            in the guide, another latent beside it, a mask or a ``poutine.scale`` on it, fewer than
            two rows, more of them than ``size``.

    Source: Chen, Li, Grosse & Duvenaud, Isolating Sources of Disentanglement in VAEs, 2018; the
        first column: https://github.com/rtqichen/beta-tcvae/issues/1

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> loss = elbo.TCELBO(beta=6.0, size=1000)(model, guide)
        >>> loss(torch.ones(5, 4)).shape
        torch.Size([])
    """

    alpha: float | Tensor | Schedule = 1.0
    gamma: float | Tensor | Schedule = 1.0
    size: int = field(kw_only=True)

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "score")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            _require_weight(self, name, getattr(self, name))
        if self.kl != "sampled":
            raise ValueError(f"TCELBO parts log q - log p at draws, so it takes no kl={self.kl!r}")
        if not isinstance(self.size, Integral) or self.size < 2:
            raise ValueError(f"size is the number of training datapoints, >= 2: got {self.size!r}")

    def effective(self, weights: LogWeights, state: State) -> Tensor:
        given: dict[str, Any] = {n: getattr(self, n) for n in ("alpha", "beta", "gamma")}
        plain = ELBO(self.num_particles).effective(weights, state)
        if all(isinstance(weight, (int, float)) and weight == 1 for weight in given.values()):
            return plain
        name, site, units, dims = latent_units(self, weights)
        rows = weights.log_w.shape[1]
        if rows > self.size or (weights.scale != 1 and round(weights.full_size) != self.size):
            seen = f"size={self.size}, and the data plate has {round(weights.full_size)} rows"
            raise ValueError(f"{seen}: give the number of training datapoints")
        joint, marginals = log_aggregate(units, site["value"], self.size, dims)
        log_q, log_p = weights.log_q[name], weights.log_p[name]
        parts = (log_q - joint, joint - marginals, marginals - log_p)
        for (column, weight), part in zip(given.items(), parts, strict=True):
            plain = plain - (state.at_step(weight, column) - 1) * part
        return plain


def log_aggregate(units: Any, value: Tensor, size: int, dims: int = 1) -> tuple[Tensor, Tensor]:
    """Log of the estimated aggregate at each draw, and of its marginals' product, ``(K, N)``.

    Args:
        units: q of the dimensions of rows, of batch shape ``(N, D)`` or ``(K, N, D)``.
        value: the draws, of that shape.
        size: how many datapoints the rows are of.
        dims: in how many dimensions the units are: 1 for ``(N, D)``, 3 for ``(N, C, H, W)``.
    """
    data = -1 - dims
    rows = value.shape[data]
    densities = units.log_prob(value.movedim(data, 0).unsqueeze(data)).flatten(-dims)
    if densities.dim() == 3:  # (N, K, N, D): draw n of row m
        densities = densities.unsqueeze(1)
    if densities.dtype in (torch.float16, torch.bfloat16):
        densities = densities.float()
    others = math.log((size - 1) / (size * (rows - 1)))
    shares = densities.new_full((rows, 1, rows), others)
    own = torch.eye(rows, dtype=torch.bool, device=value.device).unsqueeze(1)
    shares = shares.masked_fill(own, -math.log(size))
    joint = (densities.sum(-1) + shares).logsumexp(-1)
    marginals = (densities + shares.unsqueeze(-1)).logsumexp(-2).sum(-1)
    return joint.T, marginals.T


@dataclass(frozen=True, eq=False)
class DIPELBO(ELBO):
    r"""The ELBO minus how far the covariance of the codes is from the identity: DIP-VAE.

    .. math:: \mathcal L(x) - \lambda_\text{od} \sum_{i \ne j} C_{ij}^2
              - \lambda_\text{d} \sum_i (C_{ii} - 1)^2

    C is the covariance of the means of q(z | x) over the batch (I), or of the aggregate q(z),
    which adds the mean of their variances to the diagonal (II); divided by N, not N - 1. What is
    taken off is the same for every datapoint. :meth:`evaluate` is the ELBO.

    Args:
        num_particles, beta, kl: as :class:`ELBO` has them.
        gradient: ``"pathwise"`` or ``"score"``.
        diagonal: the weight :math:`\lambda_\text{d}`, a number >= 0 or a schedule; by name. The
            paper takes ten times ``off_diagonal`` with kind I and as much as it with II.
        off_diagonal: the weight :math:`\lambda_\text{od}`, likewise.
        kind: ``"I"`` or ``"II"``.

    Raises:
        TypeError: a weight is missing, or no number or schedule.
        ValueError: bad arguments; at a step, what :class:`TCELBO` raises of the latent.

    Source: Kumar, Sattigeri & Balakrishnan, Variational Inference of Disentangled Latent Concepts
        from Unlabeled Observations, 2018, equations 6 and 7.

    Example:
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> loss = elbo.DIPELBO(diagonal=10.0, off_diagonal=1.0)(model, guide)
        >>> loss(torch.ones(5, 4)).shape
        torch.Size([])
    """

    kind: str = "I"
    diagonal: float | Tensor | Schedule = field(kw_only=True)
    off_diagonal: float | Tensor | Schedule = field(kw_only=True)

    gradients: ClassVar[tuple[str, ...]] = ("pathwise", "score")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("diagonal", "off_diagonal"):
            _require_weight(self, name, getattr(self, name))
        if not isinstance(self.kind, str) or self.kind not in ("I", "II"):
            raise ValueError(f'kind must be "I" or "II", got {self.kind!r}')

    def effective(self, weights: LogWeights, state: State) -> Tensor:
        plain = super().effective(weights, state)
        _, _, units, dims = latent_units(self, weights)
        covariance = code_covariance(units, with_variance=self.kind == "II", dims=dims)
        diagonal = covariance.diagonal()
        off = covariance.square().sum() - diagonal.square().sum()
        penalty = state.at_step(self.off_diagonal, "off_diagonal") * off
        penalty = penalty + state.at_step(self.diagonal, "diagonal") * (diagonal - 1).square().sum()
        return plain - penalty


def code_covariance(units: Any, with_variance: bool, dims: int = 1) -> Tensor:
    """Covariance of the means over all rows, ``(D, D)``; with their variances that of q(z)."""
    means = units.mean.flatten(-dims).flatten(0, -2)
    centred = means - means.mean(0)
    covariance = centred.T @ centred / len(means)
    if with_variance:
        covariance = covariance + units.variance.flatten(-dims).flatten(0, -2).mean(0).diag()
    return covariance


def latent_units(estimator: ELBO, weights: LogWeights) -> tuple[str, Site, Any, int]:
    """Name, site, units' distribution and their dims of the one latent, in the data plate.

    Raises:
        ValueError: the pair has none such.
    """
    who, names = type(estimator).__name__, list(weights.q)
    if len(names) != 1 or names[0] not in weights.p or weights.enumerated or weights.joint:
        raise ValueError(f"{who} is of one latent, drawn in guide and model, not of {names}")
    name, rows = names[0], weights.log_w.shape[1]
    site = weights.guide_trace.nodes[name]
    found = independent_units(site)
    plates = {frame.name: frame.dim for frame in site["cond_indep_stack"]}
    inner = plates.keys() - {DATA_PLATE, PARTICLE_PLATE} or plates.get(DATA_PLATE) != -1
    if found is None or inner:
        raise ValueError(
            f"{who} compares the dimensions of latent {name!r}, so the guide must draw a vector or "
            f"map of independent ones, (N, D), not {tuple(site['value'].shape)} of "
            f"{type(site['fn']).__name__}: .to_event(1), no inner plate"
        )
    units, mask, dims = found
    if (mask is not None and mask is not True) or name in {n for _, n in weights.site_scales}:
        cure = "leave out its rows, and weigh by the estimator's arguments"
        raise ValueError(f"{who}: latent {name!r} has a mask or a poutine.scale: {cure}")
    if rows < 2:
        raise ValueError(f"{who} compares the rows of a batch, and this one has {rows}: give more")
    return name, site, units, dims


def _require_weight(estimator: ELBO, name: str, weight: Any) -> None:
    known = isinstance(weight, (int, float, Tensor)) or callable(weight)
    if not known or isinstance(weight, Penalty):
        seen = f"{type(estimator).__name__}: {name} must be a number or a schedule of the step"
        raise TypeError(f"{seen}, got {weight!r}")
    if isinstance(weight, (int, float)) and not weight >= 0:
        raise ValueError(f"{type(estimator).__name__}: {name} must be >= 0, got {weight}")
