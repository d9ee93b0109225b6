r"""Normalising flows: a diagonal normal's noise, bent by invertible layers that see the datapoint.

.. math:: z = \mu(x) + \sigma(x) \odot T_L \circ \dots \circ T_1(\epsilon;\, h(x)), \qquad
          \epsilon \sim N(0, I)

The layers are Pyro's transforms, or zuko's. A layer without inverse in closed form is invertible
all the same at its own draws, which it remembers, so ``log_prob`` of a draw costs nothing extra.
Of other values, and so for gradients at leaves, the cost is:

================================  =======================  =======================================
layers                            draw + its log-density   log-density of a value given
================================  =======================  =======================================
:func:`iaf`                       1 pass per layer         Z passes per layer, one after the other
:func:`coupling`, :func:`spline`  1 pass per layer         1 (spline: 3) passes per layer
================================  =======================  =======================================

Every gradient of :mod:`ppvae.elbo` is right for all three: ``"pathwise"`` and ``"score"`` weigh the
flow's own draws, ``"stl"`` and ``"dreg"`` weigh leaves cut from them. Pyro's planar, radial and
Sylvester flows have no inverse, so they cannot take ``"stl"`` and ``"dreg"``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyro.distributions as dist
import pyro.distributions.transforms as T
import torch
from pyro.distributions import constraints
from pyro.distributions.conditional import ConditionalTransformModule
from pyro.nn import ConditionalAutoRegressiveNN
from torch import Tensor, nn
from torch.distributions import Transform

from ppvae.arguments import takes_numbers
from ppvae.conditionals import Conditional
from ppvae.distributions import DiagonalNormal, ForAnyDtype
from ppvae.posteriors.normals import check_width


class Flow(Conditional):
    r"""A normalising flow whose location, scale and context come from the network.

    Args:
        net: outputs ``(..., 2 * Z + context_dim)``: Z means, Z raw scales, then the context h.
        transforms: the layers, first applied first: :func:`iaf`, :func:`coupling`,
            :func:`spline`, or any of Pyro's conditional or unconditional transform modules.
        dim: latent dimension Z.
        context_dim: size of the context; the transforms must have been built for it.
        positive: maps raw scales to (0, inf).

    Raises:
        ValueError: when called, if the network has another number of outputs.

    Source: Rezende & Mohamed, Variational Inference with Normalizing Flows, 2015.

    Example:
        >>> q = Flow(nn.Linear(8, 2 * 3 + 4), iaf(3, context_dim=4), dim=3, context_dim=4)
        >>> z = q(torch.zeros(5, 8)).rsample((10,))
        >>> z.shape, q(torch.zeros(5, 8)).log_prob(z).shape
        (torch.Size([10, 5, 3]), torch.Size([10, 5]))
    """

    @takes_numbers(dim=1, context_dim=0)
    def __init__(
        self,
        net: nn.Module,
        transforms: Iterable[nn.Module],
        dim: int,
        context_dim: int = 0,
        positive: Callable[[Tensor], Tensor] = torch.exp,
    ) -> None:
        super().__init__(net)
        self.transforms = nn.ModuleList(transforms)
        self.dim = dim
        self.context_dim = context_dim
        self.positive = positive

    def forward(self, *inputs: Tensor) -> dist.TransformedDistribution:
        outputs = self.outputs(*inputs)
        width = 2 * self.dim + self.context_dim
        check_width(outputs, width, f"Flow(dim={self.dim}, context_dim={self.context_dim})")
        loc, raw, context = outputs.split([self.dim, self.dim, self.context_dim], -1)
        layers = [
            layer.condition(context) if isinstance(layer, ConditionalTransformModule) else layer
            for layer in self.transforms
        ]
        # A cache, so that the layers below are asked about the very tensor that they made.
        place = T.AffineTransform(loc, self.positive(raw), event_dim=1, cache_size=1)
        base = DiagonalNormal(torch.zeros_like(loc), 1.0)
        return TransformedDistribution(base, [*layers, place])


class TransformedDistribution(ForAnyDtype, dist.TransformedDistribution):
    """Pyro's, for values of any dtype; its last layer has a location."""

    def parameter(self) -> Tensor:
        """That location."""
        loc: Tensor = self.transforms[-1].loc
        return loc


@takes_numbers(dim=1, context_dim=0, num_layers=1)
def iaf(
    dim: int, context_dim: int, num_layers: int = 2, hidden: Sequence[int] = (64,)
) -> nn.ModuleList:
    r"""Inverse autoregressive layers, each in the reverse order of the one before.

    .. math:: y_d = \mu_d(y_{<d}, h) + \sigma_d(y_{<d}, h)\, \epsilon_d

    Args:
        dim: latent dimension Z >= 2.
        context_dim: size of the context h, >= 1.
        num_layers: number of layers, >= 1.
        hidden: widths of each layer's masked network, each >= Z.

    Raises:
        ValueError: for one latent dimension, which has no order.

    Source: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016,
        equation 10; the layers are Pyro's ``ConditionalAffineAutoregressive``.

    Example:
        >>> len(iaf(16, context_dim=32, num_layers=3))
        3
    """
    _require_two(dim, "iaf", hidden)
    layers = []
    for i in range(num_layers):
        order = torch.arange(dim) if i % 2 == 0 else torch.arange(dim).flip(0)
        net = _Autoregressive(
            dim,
            context_dim,
            list(hidden),
            permutation=order,
            skip_connections=True,
            nonlinearity=nn.ELU(),
        )
        layers.append(T.ConditionalAffineAutoregressive(net))
    return nn.ModuleList(layers)


@takes_numbers(dim=1, context_dim=0, num_layers=1)
def coupling(
    dim: int, context_dim: int, num_layers: int = 4, hidden: Sequence[int] = (64,)
) -> nn.ModuleList:
    r"""Affine coupling layers; between two of them the order of the dimensions is reversed.

    .. math:: y_{\le d} = \epsilon_{\le d}, \qquad
              y_{>d} = \mu(\epsilon_{\le d}, h) + \sigma(\epsilon_{\le d}, h)\, \epsilon_{>d}

    Args:
        dim: latent dimension Z >= 2; the first half of it steers the rest.
        context_dim: size of the context h, >= 1.
        num_layers: number of layers; with fewer than 2, half the dimensions stay normal.
        hidden: widths of each layer's network.

    Raises:
        ValueError: for one latent dimension, which has no halves.

    Source: Dinh, Sohl-Dickstein & Bengio, Density Estimation using Real NVP, 2017; the layers are
        Pyro's ``ConditionalAffineCoupling``.

    Example:
        >>> len(coupling(16, context_dim=32, num_layers=4))  # and three reversals
        7
    """
    _require_two(dim, "coupling", hidden)
    layers: list[nn.Module] = []
    for i in range(num_layers):
        layers += [_Reverse()] if i else []
        layer = T.conditional_affine_coupling(dim, context_dim, hidden_dims=list(hidden))
        layers.append(layer)
    return nn.ModuleList(layers)


@takes_numbers(dim=1, context_dim=0, num_layers=1, bins=1)
def spline(
    dim: int,
    context_dim: int,
    num_layers: int = 2,
    hidden: Sequence[int] = (64,),
    bins: int = 8,
) -> nn.ModuleList:
    """Neural spline coupling layers: monotonic rational-quadratic splines on [-5, 5].

    Args:
        dim: latent dimension Z >= 1.
        context_dim: size of the context h, >= 1.
        num_layers: number of layers; for Z >= 2 each reverses the roles of the halves.
        hidden: widths of each layer's network.
        bins: number of bins of each spline.

    Raises:
        ImportError: ``zuko`` is not installed.

    Source: Durkan, Bekasov, Murray & Papamakarios, Neural Spline Flows, 2019; the layers are
        zuko's.

    Example:
        >>> q = Flow(nn.Linear(8, 2 * 3 + 4), spline(3, context_dim=4), dim=3, context_dim=4)
        >>> q(torch.zeros(5, 8)).rsample().shape
        torch.Size([5, 3])
    """
    nsf = _import_zuko().flows.NSF(
        features=dim,
        context=context_dim,
        transforms=num_layers,
        bins=bins,
        hidden_features=tuple(hidden),
        passes=2,
    )
    return nn.ModuleList([_Spline(nsf.transform)])


def _require_two(dim: int, name: str, hidden: Sequence[int]) -> None:
    if dim < 2:
        raise ValueError(f"{name} needs a latent dimension of at least 2, got {dim}: use spline")
    if not hidden:
        raise ValueError(f"{name} needs widths, as hidden=(64,), got none")


def _import_zuko() -> Any:
    """Import zuko without its side effect of switching validation off for all distributions."""
    base = torch.distributions.Distribution
    validation = base._validate_args, base.arg_constraints
    try:
        import zuko
    except ImportError as error:
        raise ImportError("neural spline flows need zuko: pip install 'ppvae[flows]'") from error
    finally:
        base._validate_args, base.arg_constraints = validation  # type: ignore[method-assign]
    return zuko


class _Autoregressive(ConditionalAutoRegressiveNN):
    """Pyro inverts with zeros of the default dtype, whatever that of the flow is.

    It also loops over the permutation, which a graph can only do over Python numbers.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        permutation = self._buffers.pop("permutation")
        assert permutation is not None
        self.permutation = permutation.tolist()

    def forward(self, x: Tensor, context: Tensor) -> Any:
        return super().forward(x.to(context.dtype), context)


class _Reverse(ConditionalTransformModule):
    """The dimensions in reverse order, whatever the context."""

    def condition(self, context: Tensor) -> Transform:
        return _Reversal(cache_size=1)  # a new one: what it remembers is that of one draw


class _Reversal(Transform):
    domain = codomain = constraints.real_vector
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return x.flip(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return y.flip(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return x.new_zeros(x.shape[:-1])


class _Spline(ConditionalTransformModule):
    """A lazy transform of zuko as a conditional transform of Pyro."""

    def __init__(self, lazy: nn.Module) -> None:
        super().__init__()
        self.lazy = lazy

    def condition(self, context: Tensor) -> Transform:
        return _Remembering(self.lazy(context))


class _Remembering(Transform):
    """A transform of zuko that remembers its last value, inverse and log-determinant."""

    domain = codomain = constraints.real_vector
    bijective = True

    def __init__(self, inner: Any) -> None:
        super().__init__(cache_size=1)
        self.inner = inner
        self._last: Any = None

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self.inner.call_and_ladj(x)
        self._last = x, y, log_det
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        return self.inner.inv(y)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        if self._last is not None and self._last[0] is x and self._last[1] is y:
            return self._last[2]
        return self.inner.call_and_ladj(x)[1]
