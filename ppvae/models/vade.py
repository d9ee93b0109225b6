"""Variational deep embedding: a VAE whose prior is a mixture, one component per cluster."""

from __future__ import annotations

from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae import conditionals
from ppvae.arguments import takes_numbers
from ppvae.chain import require_likelihood
from ppvae.distributions import DiagonalNormal
from ppvae.models import expectation_maximisation as em
from ppvae.program import Program, data_plate


class VaDE(Program):
    r"""Clusters in the latent space of a VAE.

    .. math:: c \sim \mathrm{Cat}(\pi),\qquad z \sim N(\mu_c, \operatorname{diag} \sigma_c^2),\qquad
              x \sim p_\theta(x \mid z)

    The cluster is summed out: c is marked ``infer={"enumerate": "parallel"}``, and a guide draws z
    alone. That equals ``models.VAE(likelihood, prior=prior)`` with the same modules, draw by draw,
    since :math:`\sum_c p(c)\, p(z \mid c)` is the density of the mixture. It is what the paper's
    bound becomes with the best q(c | x, z), which is p(c | z).

    Args:
        likelihood: the conditional p(x | z); ``Bernoulli(..., grey=True)`` for grey levels, which
            are not binarised in the paper.
        prior: the mixture p(c) p(z | c), one component per cluster.

    Raises:
        TypeError: the prior has no clusters, or the likelihood gives no distribution, as a bare
            network does.

    The prior's own start is arbitrary, and from there all data end in a few clusters: train an
    autoencoder first, then call :meth:`initialise` with its codes, as ``examples/vade.py`` does.

    Source: Jiang, Zheng, Tan, Tang and Zhou, Variational Deep Embedding, 2017, arXiv:1611.05148.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, models, nets
        >>> likelihood = conditionals.Bernoulli(nets.mlp(8, 256, 64))
        >>> model = models.VaDE(likelihood, conditionals.Mixture(10, 8))
        >>> model(c=torch.arange(10)).shape  # one image of each cluster
        torch.Size([10, 64])
    """

    @takes_numbers
    def __init__(self, likelihood: nn.Module, prior: conditionals.Mixture) -> None:
        super().__init__()
        if not all(callable(getattr(prior, name, None)) for name in ("weights", "components")):
            wanted = f"a mixture as conditionals.Mixture is, got a {type(prior).__name__}"
            raise TypeError(f"VaDE(prior) must be {wanted}; without clusters take models.VAE")
        self.likelihood = likelihood
        self.prior = prior
        require_likelihood(self, lambda model: [torch.zeros(2, *prior.components().event_shape)])

    def forward(
        self, x: Tensor | None = None, c: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """Observe ``x``, ``(N, ...)``, or draw it; given clusters ``c``, ``(N,)``, or all of them.

        With ``size``, draw so many rows; or x is a minibatch of a data set of that many rows.

        Raises:
            ValueError: with validation on, c is not integers in ``0 .. C - 1``.
        """
        with data_plate(x, c, size=size):
            cluster = self.prior.weights()
            if c is not None and cluster._validate_args:  # off where a step is traced
                self._check_clusters(c)
            c = pyro.sample("c", cluster, obs=c, infer={"enumerate": "parallel"})
            z = pyro.sample("z", self.component(c))
            value: Tensor = pyro.sample("x", self.likelihood(z), obs=x)
        return value

    def _num_clusters(self) -> int:
        return int(self.prior.weights().logits.shape[-1])

    def _check_clusters(self, c: Tensor) -> None:
        count = self._num_clusters()
        if c.is_floating_point() or c.dtype == torch.bool or ((c < 0) | (c >= count)).any():
            seen = f"{c.dtype} from {c.min().item()} to {c.max().item()}"
            cure = f"one draw of each is model(c=torch.arange({count}))"
            raise ValueError(f"c must be integers in 0 .. {count - 1}, got {seen}; {cure}")

    def component(self, c: Tensor) -> DiagonalNormal:
        """p(z | c) for clusters ``(..., N)``."""
        components = self.prior.components().base_dist
        return DiagonalNormal(components.loc[c], components.scale[c])

    def before_fit(self, rows: int | None, x: Tensor, *_: Tensor) -> None:
        """What :func:`ppvae.fit` calls: refuse fewer rows, or different ones, than clusters.

        Nothing is checked after an epoch: the ELBO has a bound where a component is narrow, since
        q(z | x) would have to be as narrow. A cluster without rows is found by
        :func:`ppvae.metrics.clustering`.
        """
        em.require_different(x, rows, self._num_clusters())

    def responsibilities(self, z: Tensor) -> Tensor:
        r"""p(c | z), ``(..., C)`` for z ``(..., Z)``.

        .. math:: p(c \mid z) = \frac{\pi_c N(z; \mu_c, \sigma_c^2)}
                                {\sum_{c'} \pi_{c'} N(z; \mu_{c'}, \sigma_{c'}^2)}

        Example:
            >>> import torch
            >>> from ppvae import conditionals, models, nets
            >>> likelihood = conditionals.Bernoulli(nets.mlp(2, 8, 64))
            >>> model = models.VaDE(likelihood, conditionals.Mixture(3, 2, spread=0.0))
            >>> model.responsibilities(torch.zeros(5, 2))[0]
            tensor([0.3333, 0.3333, 0.3333], grad_fn=<SelectBackward0>)
        """
        log_p_z = self.prior.components().log_prob(z.unsqueeze(-2))
        return (self.prior.weights().logits + log_p_z).softmax(-1)

    def clusters(self, posterior: Any, num_samples: int = 100) -> Tensor:
        r"""The paper's q(c | x) (its equation 16), ``(N, C)``, by draws from q(z | x).

        .. math:: q(c \mid x) = \mathrm E_{q(z \mid x)}\, p(c \mid z)

        The cluster of a row is the argmax. At the mean of q(z | x) instead of draws, as in the
        authors' test script: ``model.responsibilities(posterior.mean)``.

        Args:
            posterior: q(z | x) of N rows, as ``guide.posterior(x)``.
            num_samples: draws per row, >= 1.

        Example:
            >>> import torch
            >>> from ppvae import conditionals, guides, models, nets
            >>> likelihood = conditionals.Bernoulli(nets.mlp(2, 8, 64))
            >>> model = models.VaDE(likelihood, conditionals.Mixture(3, 2))
            >>> guide = guides.Normal(nets.mlp(64, 8, 2 * 2))
            >>> model.clusters(guide.posterior(torch.zeros(5, 64))).shape
            torch.Size([5, 3])
        """
        if num_samples < 1:
            raise ValueError(f"num_samples must be at least 1, got {num_samples}")
        with torch.no_grad():
            return self.responsibilities(posterior.sample((num_samples,))).mean(0)

    @torch.no_grad()
    def initialise(
        self, codes: Tensor, seed: int = 0, num_starts: int = 10, covariance: str = "diag"
    ) -> Any:
        """Start the prior at a mixture fitted to codes, with equal weights, as the paper does.

        Args:
            codes: ``(N, Z)``, of a pretrained encoder: ``guide.posterior(x).mean``.
            seed: of scikit-learn's k-means starts.
            num_starts: fits, >= 1, of which the most likely is taken; the authors' code makes one.
            covariance: of the components in EM: ``"diag"``, as in the paper, or ``"full"``, which
                finds clusters of correlated codes. The prior takes the variances.

        Returns:
            The fitted ``GaussianMixture``: its ``predict(codes)`` is the baseline AE + GMM.

        Raises:
            ValueError: fewer codes than clusters, codes of another size, NaN or infinite codes, a
                constant dimension, or a component that has collapsed on fewer than two codes.

        Example:
            >>> import torch
            >>> from ppvae import conditionals, models, nets
            >>> likelihood = conditionals.Bernoulli(nets.mlp(2, 8, 64))
            >>> model = models.VaDE(likelihood, conditionals.Mixture(2, 2))
            >>> codes = torch.randn(100, 2) + 10 * (torch.arange(100) % 2)[:, None]
            >>> _ = model.initialise(codes)
            >>> model.prior.loc[:, 0].abs().round().sort().values.tolist()
            [0.0, 10.0]
        """
        mixture, loc, variances = em.fit_codes(
            codes, self.prior.loc.shape, seed, num_starts, covariance
        )
        weights, like = torch.ones(len(loc)), self.prior.loc
        self.prior.initialise(weights.to(like), loc.to(like), variances.sqrt().to(like))
        return mixture
