"""A mixture of normals in the data space: the latent-variable model whose log p(x) is exact."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.distributions import DiagonalNormal, MultivariateNormal
from ppvae.models import expectation_maximisation as em
from ppvae.models.expectation_maximisation import CollapsedComponent
from ppvae.program import Program, data_plate

__all__ = ["CollapsedComponent", "GaussianMixture"]


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

    @takes_numbers(num_components=1, dim=1)
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
        return MultivariateNormal(self.loc[c], scale_tril=self.scale_tril()[c])

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
        new = em.raw_parameters(weights, loc, covariance, self.loc.shape, self.lower is not None)
        for name, value in new.items():
            self.get_parameter(name).copy_(value)

    @torch.no_grad()
    def start(self, x: Tensor, seed: int = 0) -> None:
        """Start at equal weights, means at different rows of x, and the variances of x.

        Raises:
            ValueError: x has fewer different rows than there are components, a constant column, or
                NaN or infinite values.
        """
        em.check_points(x, *self.loc.shape)
        self.initialise(*em.start(x, len(self.logits), self.lower is not None, seed))

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
        em.check_points(x, *self.loc.shape)
        em.check_responsibilities(x, responsibilities, len(self.logits))
        em.check_reg_covar(x, reg_covar)
        self.initialise(*em.m_step(x, responsibilities, self.lower is not None, reg_covar))

    @torch.no_grad()
    def before_fit(self, rows: int | None, x: Tensor, *_: Tensor) -> Callable[[], None] | None:
        """What :func:`ppvae.fit` calls: refuse too few points, and watch for a collapse.

        Args:
            rows: of the data set, or None if they are not known.
            x: all of them; or a batch, by whose spread a collapse is then judged.

        Returns:
            What to call after each epoch, :meth:`require_spread`; None if x has no spread itself.
        """
        em.require_different(x, rows, len(self.logits))
        x = x.to(self.loc)
        if len(x) == rows:
            em.check_points(x, *self.loc.shape)
        sd = x.std(0, correction=0)
        if not (sd > 0).all():
            return None
        least = sd.log() + math.log(em.COLLAPSED) / 2

        def after_epoch() -> None:
            # The square of a diagonal entry of the factor is no less than the smallest eigenvalue.
            if (self.log_scale < least).any():
                self.require_spread(x)

        return after_epoch

    @torch.no_grad()
    def require_spread(self, x: Tensor) -> None:
        """Raise :class:`CollapsedComponent` if a component has; for training by gradients."""
        for name, parameter in self.named_parameters():
            em.check_finite(name, parameter, "training has diverged: take a smaller step")
        factor = self.scale_tril()
        full = factor @ factor.mT
        covariance = full.diagonal(dim1=-2, dim2=-1) if self.lower is None else full
        em.require_spread(x, covariance, len(x) * self.weights().probs)
