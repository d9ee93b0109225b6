"""EM for mixtures of normals: its steps as functions of tensors, and the data that it refuses.

:class:`ppvae.models.GaussianMixture` and :class:`ppvae.models.VaDE` call them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

COLLAPSED = 1e-5  # smallest variance of a component, where the data's columns have variance 1
# Largest reg_covar, by the same measure. Added to a normal's own variance, a share r of it costs
# (log(1 + r) - r / (1 + r)) / 2 = r^2 / 4 nats per dimension of a row, nearly: here 1e-4.
NEGLIGIBLE = 0.02
FLOOR = 1e-6  # added to variances fitted to codes; one that is no larger has collapsed
# of a collapsed component, whose likelihood grows without limit
CURE = """Start elsewhere (another seed), use fewer components or full=False, drop columns of x \
that are sums of others, stop earlier, or go by m_step with a larger reg_covar, such as 1e-3 where \
the columns have variance 1 (x / x.std(0))"""
Parameters = tuple[Tensor, Tensor, Tensor]  # weights (C,), means (C, D), covariances


class CollapsedComponent(ValueError):
    """A component has shrunk to a point or a plane, where the likelihood has no maximum."""


def start(x: Tensor, num_components: int, full: bool, seed: int) -> Parameters:
    """Equal weights, means at different rows of x, and the variances of x."""
    rows = x.unique(dim=0)
    _require_as_many(len(rows), f"different points ({len(x)} rows)", num_components)
    random = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=random)[:num_components].to(x.device)
    variance = x.var(0, correction=0).expand(num_components, -1)
    return x.new_ones(num_components), rows[chosen], variance.diag_embed() if full else variance


def m_step(x: Tensor, responsibilities: Tensor, full: bool, reg_covar: float) -> Parameters:
    """The maximum of the ELBO at given q(c | x): weighted counts, means and covariances.

    Raises:
        CollapsedComponent: a component has no points, or no spread in some direction.
    """
    counts = responsibilities.sum(0)
    _require(counts > 10 * torch.finfo(x.dtype).eps, "has no points", counts)
    loc = responsibilities.T @ x / counts.unsqueeze(-1)
    apart = x - loc.unsqueeze(1)  # (C, N, D)
    weighted = responsibilities.T.unsqueeze(-1) * apart
    if full:
        covariance = weighted.mT @ apart / counts.reshape(-1, 1, 1)
        covariance = covariance + reg_covar * torch.eye(x.shape[1]).to(x)
    else:
        covariance = (weighted * apart).sum(1) / counts.unsqueeze(-1) + reg_covar
    require_spread(x, covariance, counts)
    return counts, loc, covariance


def require_spread(x: Tensor, covariance: Tensor, counts: Tensor) -> None:
    """Raise :class:`CollapsedComponent` unless every component has some, as compared with x."""
    sd = x.std(0, correction=0)
    if covariance.dim() == 3:
        least = torch.linalg.eigvalsh(covariance / (sd * sd.unsqueeze(-1)))[:, 0]
    else:
        least = (covariance / sd.square()).amin(-1)
    what = "has collapsed: it has next to no spread in some direction"
    _require(least > COLLAPSED, what, counts)


def _require(good: Tensor, what: str, counts: Tensor) -> None:
    if not good.all():
        bad = int((~good).nonzero()[0])
        held = f"it holds {counts[bad]:.3g} of {counts.sum():.0f} points"
        raise CollapsedComponent(f"component {bad} {what} ({held}). {CURE}")


def raw_parameters(
    weights: Tensor, loc: Tensor, covariance: Tensor, shape: torch.Size, full: bool
) -> dict[str, Tensor]:
    """The parameters of :class:`ppvae.models.GaussianMixture` by name, from what they stand for."""
    wanted = (shape[:1], shape, (*shape, shape[1]) if full else shape)
    given = {"weights": weights, "loc": loc, "covariance": covariance}
    for (name, value), size in zip(given.items(), wanted, strict=True):
        if value.shape != size:
            raise ValueError(f"{name} must be {tuple(size)} here, got {tuple(value.shape)}")
        check_finite(name, value)
    if (weights <= 0).any():
        raise ValueError(f"weights must be positive, got {weights.tolist()}; leave components out")
    logits = (weights / weights.sum()).log()
    factor = _cholesky(covariance)
    if not full:
        return {"logits": logits, "loc": loc, "log_scale": factor.log()}
    log_scale = factor.diagonal(dim1=-2, dim2=-1).log()
    return {"logits": logits, "loc": loc, "log_scale": log_scale, "lower": factor.tril(-1)}


def _cholesky(covariance: Tensor) -> Tensor:
    """The Cholesky factors of covariances, ``(C, D, D)``; roots of variances, ``(C, D)``."""
    if covariance.dim() == 2:
        good, factor = (covariance > 0).all(-1), covariance.sqrt()
        what = "must be positive variances"
    else:
        factor, failed = torch.linalg.cholesky_ex(covariance)
        sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
        uneven = (covariance - covariance.mT).abs() > 1e-3 * sd.unsqueeze(-1) * sd.unsqueeze(-2)
        good = (failed == 0) & ~uneven.any(-1).any(-1)
        what = "must be symmetric and positive definite"
    if not good.all():
        bad = int((~good).nonzero()[0])
        seen = f"that of component {bad} is {covariance[bad].tolist()}"
        cure = "give the covariance itself, not standard deviations, a Cholesky factor or logs"
        raise ValueError(f"covariance {what}, but {seen}; {cure}")
    return factor


def check_points(x: Tensor, num_components: int, dim: int) -> None:
    """Raise ``ValueError`` unless x is as many finite rows, no column of them constant."""
    if x.dim() != 2 or x.shape[1] != dim:
        raise ValueError(f"x must be (N, {dim}) for this mixture, got {tuple(x.shape)}")
    _require_as_many(len(x), "points", num_components)
    check_finite("x", x, "drop such rows: x[x.isfinite().all(1)]")
    constant = (x == x[:1]).all(0)
    if constant.any():
        seen = f"column {int(constant.nonzero()[0])} of x is constant"
        cure = "so the likelihood grows without limit along it; drop such columns"
        raise ValueError(f"{seen}, {cure}: x[:, x.std(0) > 0]")


def check_responsibilities(x: Tensor, responsibilities: Tensor, num_components: int) -> None:
    """Raise ``ValueError`` unless they are q(c | x), ``(N, C)``."""
    shape, cure = (len(x), num_components), "take guide.posterior(x).probs"
    if responsibilities.shape != shape:
        wanted, found = f"{shape} for {len(x)} rows of x", tuple(responsibilities.shape)
        raise ValueError(f"responsibilities must be {wanted}, got {found}; {cure}")
    check_finite("responsibilities", responsibilities, cure)
    least = float(responsibilities.min())
    if least < 0:
        raise ValueError(f"responsibilities must be probabilities, got values down to {least:.3g}")


def check_reg_covar(x: Tensor, reg_covar: float) -> None:
    """Raise ``ValueError`` unless it is small beside every column's variance."""
    least, column = x.var(0, correction=0).min(0)
    limit = NEGLIGIBLE * float(least)
    if not 0 <= reg_covar <= limit:
        wanted = f"0 and {NEGLIGIBLE} of the smallest variance of x, {least:.3g} (column {column})"
        cure = f"Scale the data (x / x.std(0)), drop such columns, or give {limit / 2:.1e}"
        raise ValueError(f"reg_covar must lie between {wanted}, got {reg_covar:.3g}. {cure}")


def check_finite(name: str, value: Tensor, cure: str = "give finite numbers") -> None:
    """Raise ``ValueError`` if there is a NaN or an infinity."""
    bad = (~value.isfinite()).nonzero()
    if len(bad):
        first = bad[0].tolist()
        raise ValueError(f"{name} has {len(bad)} NaN or infinite values, first at {first}; {cure}")


def require_different(x: Tensor, rows: int | None, count: int) -> None:
    """Raise ``ValueError`` for fewer rows, or fewer different ones, than there are components.

    Args:
        x: rows, of any shape.
        rows: of the data set, or None if not known; only if x has all of them are they compared.
        count: of the components.
    """
    if rows is not None:
        _require_as_many(rows, "points", count)
    if len(x) == rows and len(x[:1000].unique(dim=0)) < count:  # of the first, in no time
        _require_as_many(len(x.unique(dim=0)), f"different points ({rows} rows)", count)


def _require_as_many(found: int, what: str, count: int) -> None:
    if found < count:
        cure = f"use at most {found} components, or more data"
        raise ValueError(f"{found} {what} are fewer than the {count} components; {cure}")


def fit_codes(
    codes: Tensor, shape: torch.Size, seed: int, num_starts: int, covariance: str
) -> tuple[Any, Tensor, Tensor]:
    """A mixture fitted to an encoder's codes by scikit-learn; its means and variances, ``shape``.

    Raises:
        ValueError: codes that cannot be fitted, or a component that has collapsed.
    """
    from sklearn.mixture import GaussianMixture

    count, dim = shape
    if num_starts < 1:
        raise ValueError(f"num_starts must be at least 1, got {num_starts}")
    if covariance not in ("diag", "full"):
        raise ValueError(f'covariance must be "diag" or "full", got {covariance!r}')
    _check_codes(codes, count, dim)
    mixture = GaussianMixture(
        count,
        covariance_type=covariance,
        tol=1e-4,
        max_iter=300,
        n_init=num_starts,
        random_state=seed,
        reg_covar=FLOOR,
    )
    mixture.fit(codes.detach().cpu().double().numpy())
    sizes = len(codes) * torch.as_tensor(mixture.weights_)
    loc, variances = torch.as_tensor(mixture.means_), torch.as_tensor(mixture.covariances_)
    if covariance == "full":
        variances = variances.diagonal(dim1=1, dim2=2)
    bad = (sizes < 2) | (variances < 2 * FLOOR).any(1)
    if bad.any():
        seen = f"components {bad.nonzero().flatten().tolist()} of {count} collapsed in the fit"
        cure = "give another seed, fewer clusters, more codes, or codes without duplicates"
        raise ValueError(f"{seen}: {cure}")
    return mixture, loc, variances


def _check_codes(codes: Tensor, count: int, dim: int) -> None:
    if codes.dim() != 2 or codes.shape[1] != dim:
        raise ValueError(f"codes have shape {tuple(codes.shape)}: give (N, {dim}) for this prior")
    if len(codes) < count:
        raise ValueError(f"{len(codes)} codes are fewer than the {count} clusters: give more rows")
    check_finite("codes", codes, "the encoder diverged in pretraining")
    constant = (codes.double().var(0) < FLOOR).nonzero().flatten().tolist()
    if constant:
        raise ValueError(f"dimensions {constant} of the codes are constant: pretrain longer")
