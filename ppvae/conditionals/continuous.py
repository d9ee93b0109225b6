"""Heads of numbers that are no counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Independent

from ppvae import distributions
from ppvae.arguments import number_or_tensor, takes_numbers
from ppvae.conditionals.counts import Positive
from ppvae.conditionals.heads import Conditional
from ppvae.conditionals.values import Around, Elementwise


class Laplace(Elementwise):
    r"""Independent real values around a median, with heavier tails than a normal law's.

    .. math:: \log p(x \mid z) = -\sum_d |x_d - \mu_d| / b_d + \log 2 b_d

    Args:
        net: outputs ``(..., D)`` medians, or with ``scale=None`` ``(..., 2 * D)``: log scales
            after them.
        scale: b: None, a number, a tensor or a :class:`Scale`, see :class:`Elementwise`.
        event_dim: number of event dimensions.

    Example:
        >>> Laplace(nn.Linear(2, 3), scale=0.5)(torch.zeros(5, 2)).stddev[0, 0]  # sqrt(2) b
        tensor(0.7071)
    """

    family = distributions.Laplace

    def __init__(self, net: nn.Module, scale: Positive = None, event_dim: int = 1) -> None:
        super().__init__(net, event_dim, scale=scale)


class StudentT(Elementwise):
    r"""Independent real values with outliers: Student t laws.

    .. math:: p(x_d \mid z) \propto
              \Big(1 + \frac{(x_d - \mu_d)^2}{\nu_d \sigma_d^2}\Big)^{-(\nu_d + 1) / 2}

    Args:
        net: outputs ``(..., D)`` locations, then blocks of log scales and log degrees of freedom
            for those that are None.
        scale: :math:`\sigma`: None, a number, a tensor or a :class:`Scale`, see
            :class:`Elementwise`.
        df: :math:`\nu`, the same. Below 2 there is no variance, below 1 no mean.
        event_dim: number of event dimensions.

    Example:
        >>> from ppvae.conditionals import Scale
        >>> StudentT(nn.Linear(2, 2 * 3), df=Scale(5.0, shape=3))(torch.zeros(4, 2)).event_shape
        torch.Size([3])
    """

    family = distributions.StudentT

    def __init__(
        self, net: nn.Module, scale: Positive = None, df: Positive = None, event_dim: int = 1
    ) -> None:
        super().__init__(net, event_dim, scale=scale, df=df)


class LogNormal(Elementwise):
    r"""Independent positive values whose logarithms are normal.

    .. math:: \log x_d \sim N(\mu_d, \sigma_d^2)

    Args:
        net: outputs ``(..., D)`` means of the logarithm, or with ``scale=None`` ``(..., 2 * D)``:
            their log scales after them.
        scale: :math:`\sigma`: None, a number, a tensor or a :class:`Scale`, see
            :class:`Elementwise`.
        event_dim: number of event dimensions.

    Example:
        >>> LogNormal(nn.Linear(2, 3), scale=0.5)(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    family = distributions.LogNormal

    def __init__(self, net: nn.Module, scale: Positive = None, event_dim: int = 1) -> None:
        super().__init__(net, event_dim, scale=scale)


class Gamma(Elementwise):
    r"""Independent positive values whose standard deviation grows with their mean.

    .. math:: \mathrm{E}\,x_d = \mu_d = e^{\ell_d},\qquad \mathrm{Var}\,x_d = \mu_d^2 / a_d

    Args:
        net: outputs ``(..., D)`` log means, or with ``concentration=None`` ``(..., 2 * D)``:
            log shapes after them.
        concentration: the shape a: None, a number, a tensor or a :class:`Scale`, see
            :class:`Elementwise`.
        event_dim: number of event dimensions.

    Example:
        >>> p = Gamma(nn.Linear(2, 3), concentration=4.0)(torch.zeros(5, 2))
        >>> torch.allclose(p.stddev, p.mean / 2)
        True
    """

    family = distributions.Gamma

    def __init__(self, net: nn.Module, concentration: Positive = None, event_dim: int = 1) -> None:
        super().__init__(net, event_dim, concentration=concentration)


class Beta(Elementwise):
    r"""Independent values between 0 and 1, without the ends.

    .. math:: x_d \sim \mathrm{Beta}(\sigma(\ell_d)\, c_d,\ \sigma(-\ell_d)\, c_d)

    At 0 and 1 the density is 0 or infinite: data that hold them are refused, and need
    :class:`ContinuousBernoulli`.

    Args:
        net: outputs ``(..., D)`` logits of the means, or with ``concentration=None``
            ``(..., 2 * D)``: log concentrations after them.
        concentration: c: None, a number, a tensor or a :class:`Scale`, see :class:`Elementwise`.
        event_dim: number of event dimensions.

    Example:
        >>> Beta(nn.Linear(2, 2 * 3))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    family = distributions.Beta

    def __init__(self, net: nn.Module, concentration: Positive = None, event_dim: int = 1) -> None:
        super().__init__(net, event_dim, concentration=concentration)


class ContinuousBernoulli(Elementwise):
    r"""Independent values in [0, 1], as grey levels; the outputs are logits.

    .. math:: p(x_d \mid z) = \frac{\ell_d}{e^{\ell_d} - 1}\, e^{\ell_d x_d}

    A density, which ``Bernoulli(grey=True)`` is not.

    Args:
        net: outputs ``(..., D)``, for images ``(..., C, H, W)``.
        event_dim: number of event dimensions.

    Example:
        >>> ContinuousBernoulli(nn.Linear(2, 64))(torch.zeros(5, 2)).event_shape
        torch.Size([64])
    """

    family = distributions.ContinuousBernoulli

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__(net, event_dim)


class VonMises(Elementwise):
    r"""Independent angles in radians.

    .. math:: p(x_d \mid z) = \frac{e^{\kappa_d \cos(x_d - \mu_d)}}{2\pi I_0(\kappa_d)}

    Args:
        net: outputs ``(..., D)`` directions (any turn), or with ``concentration=None``
            ``(..., 2 * D)``: log concentrations after them.
        concentration: :math:`\kappa`: None, a number, a tensor or a :class:`Scale`, see
            :class:`Elementwise`.
        event_dim: number of event dimensions.

    Example:
        >>> VonMises(nn.Linear(2, 2 * 3))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    family = distributions.VonMises

    def __init__(self, net: nn.Module, concentration: Positive = None, event_dim: int = 1) -> None:
        super().__init__(net, event_dim, concentration=concentration)


class Affine(Around):
    r"""Another head of data in their own units: loc + scale v, for v of that head.

    .. math:: \log p(x) = \log p_v\big((x - \mathrm{loc}) / \mathrm{scale}\big)
              - \sum_d \log \mathrm{scale}_d

    Data that are standardised before the model have evidences in standardised units. Here the
    change of units is a part of the density: data stay as they are, the network's outputs are
    about unit size, and no correction can be forgotten.

    Args:
        head: of real or positive values.
        loc: ``(D,)`` or what broadcasts to the value, as the columns' means; for positive values 0.
        scale: the same, > 0, as the columns' standard deviations.

    Raises:
        ValueError: a scale is not positive: of a constant column there is no density.

    Example:
        >>> from ppvae import conditionals
        >>> grams = torch.tensor([[3900.0], [4700.0], [4100.0]])
        >>> head = conditionals.Normal(nn.Linear(2, 1), scale=1.0)
        >>> p = Affine(head, grams.mean(0), grams.std(0))(torch.zeros(3, 2))
        >>> (p.stddev / grams.std(0))[0]
        tensor([1.])
    """

    loc: Tensor
    scale: Tensor

    @takes_numbers
    def __init__(self, head: Conditional, loc: Tensor | float, scale: Tensor | float) -> None:
        super().__init__(head)
        floats = torch.get_default_dtype()
        loc = number_or_tensor("loc", loc).to(floats)
        scale = number_or_tensor("scale", scale).to(floats)
        if not ((scale > 0) & scale.isfinite()).all():
            where = (~(scale > 0)).flatten().nonzero().flatten()[:3].tolist()
            raise ValueError(
                f"Affine: scale must be positive and finite, and is not at {where}: a constant "
                "column has no density; leave it out"
            )
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)

    def num_outputs(self, num_values: int = 1) -> int:
        return self.head.num_outputs(num_values)

    def forward(self, *inputs: Tensor, **given: Any) -> Any:
        """The law of the values in their own units."""
        fn = self.head(*inputs, **given)
        if not isinstance(fn, Independent) or fn.support.is_discrete:
            raise TypeError(
                f"Affine changes the units of independent continuous values, and "
                f"{type(self.head).__name__} is none; use that head without it"
            )
        law = distributions.Affine(fn.base_dist, self.loc, self.scale)
        return law.to_event(fn.reinterpreted_batch_ndims)
