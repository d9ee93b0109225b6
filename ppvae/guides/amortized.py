"""Amortized guides: one latent, q(z | x), computed by a network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae import conditionals
from ppvae.arguments import takes_numbers
from ppvae.guides.per_datapoint import PerDatapoint
from ppvae.program import Program, data_plate


class Amortized(Program):
    r"""The amortised guide: draw z from a conditional of x, in the plate ``"data"``.

    .. math:: z_n \sim q_\phi(z \mid x_n)

    Guides of this form differ by the conditional that is passed in: a diagonal normal
    (:class:`Normal` is the shorthand), full covariance, low rank, a mixture, a flow.

    Args:
        conditional: from ``x`` to a distribution; from :mod:`ppvae.posteriors` or
            :mod:`ppvae.conditionals`, or your own subclass of ``conditionals.Conditional``. In
            the form q(z | x, y) it is called as ``conditional(x, features of y)``.
        condition: from ``y`` to features, e.g. ``nets.OneHot(10)``; y itself if None.
        latent: the name of the latent site.

    The distribution q(z | x) itself is ``guide.posterior(x)``: written here and nowhere else.

    Example:
        >>> import torch
        >>> from ppvae import guides, nets, posteriors
        >>> net = nets.mlp(64, 256, 16 * 19 // 2)
        >>> guide = guides.Amortized(posteriors.FullNormal(net, dim=16))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 16])
    """

    @takes_numbers
    def __init__(
        self, conditional: nn.Module, condition: nn.Module | None = None, latent: str = "z"
    ) -> None:
        super().__init__()
        self.conditional = conditional
        self.condition = condition if condition is not None else nn.Identity()
        self.latent = latent

    def posterior(self, x: Tensor, y: Tensor | None = None, *others: Tensor | None) -> Any:
        """q(z | x), or q(z | x, y): batch shape ``(N,)``, event shape ``(latent_dim,)``."""
        return self.conditional(*self.inputs(x, y, *others))

    def inputs(
        self, x: Tensor, y: Tensor | None = None, *others: Tensor | None
    ) -> tuple[Tensor, ...]:
        """What the conditional's network is called with; numbers ``(N,)`` are one feature each."""
        if y is None and not isinstance(self.condition, nn.Identity):
            cure = "call it with x and y: data as a tuple (x, y), or dataset.supervised()"
            raise ValueError(f"this guide was given a condition, so {cure}")
        features = [] if y is None else [self.condition(y)]
        features += [other for other in others if other is not None]
        return (x, *(f if f.dim() > 1 else f.unsqueeze(-1) for f in features))

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *others: Tensor | None,
        size: int | None = None,
    ) -> Tensor:
        """Draw z, ``(N, latent_dim)``, in the plate ``"data"``; arguments as the model's.

        Others are an offset, and the mask of :class:`ppvae.models.Masked`; of a model without y the
        first of them is ``y`` here. The network sees each as it sees any condition, since p(z | x)
        depends on the exposure of x.
        """
        with data_plate(x, size=size):
            z: Tensor = pyro.sample(self.latent, self.posterior(x, y, *others))
        return z

    def outputs(self, x: Tensor, y: Tensor | None = None, *others: Tensor | None) -> Tensor:
        """What the network gives for each row: the parameters of q(z | x), ``(N, ...)``."""
        inputs = self.inputs(x, y, *others)
        outputs: Tensor = _network_and_head(self.conditional).outputs(*inputs)
        return outputs

    @property
    def head(self) -> nn.Module:
        """The conditional without its network: from :meth:`outputs` to q(z | x)."""
        return _network_and_head(self.conditional).without_net()

    def local(self, x: Tensor, y: Tensor | None = None, *others: Tensor | None) -> PerDatapoint:
        """The same family with parameters of its own for each row, started where this guide is.

        Whatever else the head has, as the layers of a flow, is copied and stays fixed.
        """
        with torch.no_grad():
            head = copy.deepcopy(self.head).requires_grad_(False)
            return PerDatapoint(head, self.outputs(x, y, *others), self.latent)


class Normal(Amortized):
    r"""The mean-field amortised guide: a diagonal normal whose moments a network computes.

    .. math:: q(z \mid x) = \mathcal N\left(\mu_\phi(x), \operatorname{diag} \sigma_\phi(x)^2\right)

    Shorthand for ``Amortized(conditionals.Normal(net))``.

    Args:
        net: from ``x`` to ``2 * latent_dim`` numbers: loc and raw scale. In the conditional form
            q(z | x, y) it is called as ``net(x, features of y)``; ``nets`` concatenate.
        condition: from ``y`` to features, e.g. ``nets.OneHot(10)``; y itself if None.
        positive: raw scale to scale: ``torch.exp`` (log-sigma) or ``torch.nn.Softplus()``.
        latent: the name of the latent site.

    Source: Kingma & Welling, Auto-Encoding Variational Bayes, 2014.

    Example:
        >>> import torch
        >>> from ppvae import guides, nets
        >>> guide = guides.Normal(nets.mlp(64, 256, 2 * 16))
        >>> guide(torch.zeros(5, 64)).shape
        torch.Size([5, 16])
    """

    @takes_numbers
    def __init__(
        self,
        net: nn.Module,
        condition: nn.Module | None = None,
        positive: Callable[[Tensor], Tensor] = torch.exp,
        latent: str = "z",
    ) -> None:
        super().__init__(conditionals.Normal(net, positive=positive), condition, latent)


def _network_and_head(conditional: nn.Module) -> conditionals.Conditional:
    """A conditional whose network and head can be told apart."""
    if isinstance(conditional, conditionals.Conditional):
        return conditional
    seen = f"{type(conditional).__name__} does not say which part of it is the network"
    raise TypeError(f"{seen}: make it a subclass of conditionals.Conditional, which has a net")
