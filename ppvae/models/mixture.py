"""A mixture of normals in the data space: the latent-variable model whose log p(x) is exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.distributions import DiagonalNormal
from ppvae.program import Program, data_plate

COLLAPSED = 1e-5  # smallest variance of a component, where the data's columns have variance 1
# Largest reg_covar, by the same measure. Added to a normal's own variance, a share r of it costs
# (log(1 + r) - r / (1 + r)) / 2 = r^2 / 4 nats per dimension of a row, nearly: here 1e-4.
NEGLIGIBLE = 0.02


class CollapsedComponent(ValueError):
    """A component has shrunk to a point or a plane, where the likelihood has no maximum."""


class GaussianMixture(Program):
    r"""A mixture of normals, its cluster summed out exactly.

    .. math:: c \sim \text{Cat}(\pi),\qquad x \mid c \sim \mathcal N(\mu_c, \Sigma_c),\qquad
              p(x) = \sum_c \pi_c\, \mathcal N(x;\, \mu_c, \Sigma_c)

    The site ``"c"`` is marked for enumeration. With a guide that leaves it out every bound is
    log p(x) itself, and training is maximum likelihood. With
    :class:`~ppvae.guides.Responsibilities` the ELBO is the function that EM maximises, in the guide
    and in the model by turns: :meth:`m_step` is the second half.

    Args:
        num_components: C >= 1.
        dim: D, the size of x.
        full: whether :math:`\Sigma_c` has all its entries, or only its diagonal.

    Attributes:
        logits: unnormalised log-weights, ``(C,)``.
        loc: means, ``(C, D)``; draws from N(0, I) at first, see :meth:`start`.
        log_scale, lower: of the Cholesky factor of :math:`\Sigma_c`, the logarithm of the diagonal,
            ``(C, D)``, and what is below it, ``(C, D, D)``; without ``full`` there is no ``lower``.

    Source: Dempster, Laird & Rubin, Maximum likelihood from incomplete data via the EM algorithm,
    1977; Neal & Hinton, A view of the EM algorithm, 1998 (as maximisation of one bound).

    Example:
        >>> from ppvae import guides, models
        >>> corner = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
        >>> x = torch.cat([corner - 5, corner + 5])
        >>> model = models.GaussianMixture(2, dim=2)
        >>> model.start(x)
        >>> guide = guides.Responsibilities(model)
        >>> for _ in range(20):
        ...     guide.e_step(model)
        ...     model.m_step(x, guide.posterior(x).probs)
        >>> model.loc.detach().sort(0).values.round(decimals=2)  # 5 below and above each mean
        tensor([[-4.6700, -5.0000],
                [ 5.3300,  5.0000]])
    """

    def __init__(self, num_components: int, dim: int, full: bool = True) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_components))
        self.loc = nn.Parameter(torch.randn(num_components, dim))
        self.log_scale = nn.Parameter(torch.zeros(num_components, dim))
        self.lower = nn.Parameter(torch.zeros(num_components, dim, dim)) if full else None

    def forward(self, x: Tensor | None = None, size: int | None = None) -> Tensor:
        """Observe ``x``, ``(N, D)``; or draw ``size`` new rows if x is None. Returns x."""
        with data_plate(x, size=size):
            c = pyro.sample("c", self.weights(), infer={"enumerate": "parallel"})
            value: Tensor = pyro.sample("x", self.component(c), obs=x)
        return value

    # -- densities -----------------------------------------------------------------------------
    def weights(self) -> dist.Categorical:
        """p(c)."""
        return dist.Categorical(logits=self.logits)

    def component(self, c: Tensor) -> dist.TorchDistribution:
        """p(x | c), of the batch shape of ``c``."""
        if self.lower is None:
            return DiagonalNormal(self.loc[c], self.log_scale.exp()[c])
        return dist.MultivariateNormal(self.loc[c], scale_tril=self.scale_tril()[c])

    def scale_tril(self) -> Tensor:
        r"""The Cholesky factors of :math:`\Sigma_c`, ``(C, D, D)``."""
        diagonal = torch.diag_embed(self.log_scale.exp())
        return diagonal if self.lower is None else diagonal + self.lower.tril(-1)

    def log_joint(self, x: Tensor) -> Tensor:
        """Log p(x, c) of every cluster, ``(N, C)``."""
        every = torch.arange(len(self.logits), device=x.device)
        log_joint: Tensor = self.weights().logits + self.component(every).log_prob(x.unsqueeze(-2))
        return log_joint

    def log_evidence(self, x: Tensor) -> Tensor:
        """Log p(x) of each row, exact, ``(N,)``, nats."""
        return self.log_joint(x).logsumexp(-1)

    def posterior(self, x: Tensor) -> dist.Categorical:
        """p(c | x), the responsibilities, exact; batch shape ``(N,)``."""
        return dist.Categorical(logits=self.log_joint(x))

    # -- parameters without gradients ----------------------------------------------------------
    @torch.no_grad()
    def initialise(self, weights: Tensor, loc: Tensor, covariance: Tensor) -> None:
        r"""Set the parameters.

        Args:
            weights: ``(C,)``, positive; normalised if they do not sum to one.
            loc: ``(C, D)``.
            covariance: :math:`\Sigma_c`, ``(C, D, D)``; without ``full``, variances ``(C, D)``.

        Raises:
            ValueError: another shape, a value that is NaN or infinite, a weight or a variance that
                is not positive, a covariance that is not symmetric and positive definite.
        """
        shapes = self.logits.shape, self.loc.shape, self.loc.shape
        if self.lower is not None:
            shapes = (*shapes[:2], self.lower.shape)
        given = {"weights": weights, "loc": loc, "covariance": covariance}
        for (name, value), shape in zip(given.items(), shapes, strict=True):
            if value.shape != shape:
                raise ValueError(
                    f"{name} must be {tuple(shape)} for this mixture, got {tuple(value.shape)}"
                )
            _require_finite(name, value)
        if (weights <= 0).any():
            raise ValueError(
                f"weights must be positive, got {weights.tolist()}; a cluster without weight is "
                "one component fewer"
            )
        tril = self._cholesky(covariance)
        self.logits.copy_((weights / weights.sum()).log())
        self.loc.copy_(loc)
        if self.lower is None:
            self.log_scale.copy_(tril.log())
        else:
            self.log_scale.copy_(tril.diagonal(dim1=-2, dim2=-1).log())
            self.lower.copy_(tril.tril(-1))

    def _cholesky(self, covariance: Tensor) -> Tensor:
        """The Cholesky factors of covariances, ``(C, D, D)``; roots of variances, ``(C, D)``."""
        if self.lower is None:
            good, tril = (covariance > 0).all(-1), covariance.sqrt()
            what = "must be positive variances"
        else:
            tril, failed = torch.linalg.cholesky_ex(covariance)
            sd = covariance.diagonal(dim1=-2, dim2=-1).sqrt()
            uneven = (covariance - covariance.mT).abs() > 1e-3 * sd.unsqueeze(-1) * sd.unsqueeze(-2)
            good = (failed == 0) & ~uneven.any(-1).any(-1)
            what = "must be symmetric and positive definite"
        if not good.all():
            bad = int((~good).nonzero()[0])
            raise ValueError(
                f"covariance {what}, but that of component {bad} is {covariance[bad].tolist()}; "
                "give the covariance itself, not standard deviations, a Cholesky factor or logs"
            )
        return tril

    @torch.no_grad()
    def start(self, x: Tensor, seed: int = 0) -> None:
        """Start at equal weights, means at different rows of x, and the variances of x.

        Raises:
            ValueError: x has fewer different rows than there are components, a constant column, or
                NaN or infinite values.
        """
        rows = self._require_points(x).unique(dim=0)
        C = len(self.logits)
        _require_as_many(len(rows), f"different points ({len(x)} rows)", C)
        random = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(rows), generator=random)[:C].to(x.device)
        variance = x.var(0, correction=0).expand(C, -1)
        covariance = variance if self.lower is None else torch.diag_embed(variance)
        self.initialise(torch.ones_like(self.logits), rows[chosen], covariance)

    @torch.no_grad()
    def m_step(self, x: Tensor, responsibilities: Tensor, reg_covar: float = 1e-6) -> None:
        r"""Set the parameters to the maximum of the ELBO at given q(c | x), in closed form.

        .. math:: N_c = \sum_n q_{nc},\quad \pi_c = \frac{N_c}{N},\quad
                  \mu_c = \frac1{N_c} \sum_n q_{nc} x_n,\quad
                  \Sigma_c = \frac1{N_c} \sum_n q_{nc} (x_n - \mu_c)(x_n - \mu_c)^\top + r I

        Args:
            x: ``(N, D)``, all the data.
            responsibilities: q(c | x_n), ``(N, C)``.
            reg_covar: r >= 0, added to the variances, as scikit-learn does. It is in the squared
                units of x, and lowers log p(x) unless it is small beside the variances.

        Raises:
            ValueError: fewer points than components, a column of x is constant, NaN or infinite
                values, responsibilities of another shape, or ``reg_covar`` above 0.02 of the
                smallest variance of a column of x.
            CollapsedComponent: a component has no points, or no spread in some direction.
        """
        self._require_points(x)
        self._require_inputs(x, responsibilities, reg_covar)
        counts = responsibilities.sum(0)
        self._require(counts > 10 * torch.finfo(x.dtype).eps, "has no points", counts)
        loc = responsibilities.T @ x / counts.unsqueeze(-1)
        apart = x - loc.unsqueeze(1)  # (C, N, D)
        weighted = responsibilities.T.unsqueeze(-1) * apart
        if self.lower is None:
            covariance = (weighted * apart).sum(1) / counts.unsqueeze(-1) + reg_covar
        else:
            covariance = weighted.mT @ apart / counts.reshape(-1, 1, 1)
            covariance = covariance + reg_covar * torch.eye(x.shape[1]).to(x)
        self._require_spread(x, covariance, counts)
        self.initialise(counts, loc, covariance)

    @torch.no_grad()
    def before_fit(self, rows: int | None, x: Tensor, *_: Tensor) -> Callable[[], None] | None:
        """What :func:`ppvae.fit` calls: refuse the data, and look for a collapse after each epoch.

        Args:
            rows: of the data set, or None if they are not known.
            x: all of them; or a batch, by whose spread a collapse is then judged.

        Returns:
            What raises :class:`CollapsedComponent` if a component has; None where x does not show
            the spread of each column.

        Raises:
            ValueError: fewer points than components, fewer different points, a constant column.
        """
        require_different(x, rows, len(self.logits))
        x = x.to(self.loc)
        if len(x) == rows:
            self._require_points(x)
        sd = x.std(0, correction=0)
        if not (sd > 0).all():
            return None
        least = sd.log() + math.log(COLLAPSED) / 2

        def after_epoch() -> None:
            # The square of a diagonal entry of the factor is no less than the smallest eigenvalue.
            if (self.log_scale < least).any():
                self.require_spread(x)

        return after_epoch

    def require_spread(self, x: Tensor) -> None:
        """Raise :class:`CollapsedComponent` if a component has; for training by gradients."""
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                _require_finite(name, parameter, "training has diverged: take a smaller step")
            tril = self.scale_tril()
            covariance = tril @ tril.mT
            if self.lower is None:
                covariance = covariance.diagonal(dim1=-2, dim2=-1)
            self._require_spread(x, covariance, len(x) * self.weights().probs)

    def _require_spread(self, x: Tensor, covariance: Tensor, counts: Tensor) -> None:
        sd = x.std(0, correction=0)
        if covariance.dim() == 3:
            least = torch.linalg.eigvalsh(covariance / (sd * sd.unsqueeze(-1)))[:, 0]
        else:
            least = (covariance / sd.square()).amin(-1)
        what = "has collapsed: it has next to no spread in some direction"
        self._require(least > COLLAPSED, what, counts)

    def _require(self, good: Tensor, what: str, counts: Tensor) -> None:
        if not good.all():
            bad = int((~good).nonzero()[0])
            raise CollapsedComponent(
                f"component {bad} {what} (it holds {float(counts[bad]):.3g} of "
                f"{float(counts.sum()):.0f} points), and the likelihood grows without limit there. "
                "Start elsewhere (another seed), use fewer components, drop columns of x that are "
                "sums of others, take full=False, stop earlier, or go by m_step with a larger "
                "reg_covar, such as 1e-3 where the columns have variance 1 (x / x.std(0))"
            )

    def _require_inputs(self, x: Tensor, responsibilities: Tensor, reg_covar: float) -> None:
        N, C = len(x), len(self.logits)
        cure = "take model.posterior(x).probs, or guide.posterior(x).probs"
        if responsibilities.shape != (N, C):
            raise ValueError(
                f"responsibilities must be ({N}, {C}) for {N} rows of x and {C} components, got "
                f"{tuple(responsibilities.shape)}; {cure}"
            )
        _require_finite("responsibilities", responsibilities, cure)
        if (responsibilities < 0).any():
            raise ValueError(
                "responsibilities must be probabilities, got values down to "
                f"{float(responsibilities.min()):.3g}; {cure}"
            )
        least, column = x.var(0, correction=0).min(0)
        if not 0 <= reg_covar <= NEGLIGIBLE * float(least):
            raise ValueError(
                f"reg_covar must lie between 0 and {NEGLIGIBLE} of the smallest variance of x, "
                f"which is {float(least):.3g} (column {int(column)}), got {reg_covar:.3g}: more "
                "than that would be added to the variances at the cost of log p(x). Scale the data "
                "(x / x.std(0)), drop a column that is nearly constant, or pass a smaller "
                f"reg_covar, such as {NEGLIGIBLE / 2 * float(least):.1e}"
            )

    def _require_points(self, x: Tensor) -> Tensor:
        C, D = self.loc.shape
        if x.dim() != 2 or x.shape[1] != D:
            raise ValueError(f"x must be (N, {D}) for this mixture, got {tuple(x.shape)}")
        _require_as_many(len(x), "points", C)
        _require_finite("x", x, "drop such rows: x[x.isfinite().all(1)]")
        constant = (x == x[:1]).all(0)
        if constant.any():
            raise ValueError(
                f"column {int(constant.nonzero()[0])} of x is constant, so the likelihood grows "
                "without limit along it; drop such columns: x[:, x.std(0) > 0]"
            )
        return x


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
        raise ValueError(
            f"{found} {what} are fewer than the {count} components; use at most {found} "
            "components, or more data"
        )


def _require_finite(name: str, value: Tensor, cure: str = "give finite numbers") -> None:
    bad = (~value.isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"{name} has {len(bad)} NaN or infinite values, the first at {bad[0].tolist()}; {cure}"
        )
