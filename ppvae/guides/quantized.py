"""Guides whose latent is the code nearest to a network's output: VQ-VAE and VQ-VAE-2."""

from __future__ import annotations

import copy
import math
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor, nn

from ppvae.arguments import number, takes_numbers
from ppvae.conditionals import Conditional
from ppvae.conditionals.codes import CodeDistribution, CodeMap
from ppvae.guides.amortized import Amortized
from ppvae.program import Program, data_plate

Self = TypeVar("Self", bound="_Softened")


class _Softened(Program):
    """A guide with conditionals that quantise."""

    def soften(self: Self, tau: float) -> Self:
        r"""The same guide with codes that are uncertain, :math:`q(c) \propto e^{-d_c^2 / \tau}`.

        Its draws differ, so it has importance weights: ``elbo.IWELBO``, ``log_evidence``, k-hat.
        Networks and codes are shared, not copied.

        Args:
            tau: > 0, finite, of the size of a squared distance between codes that are neighbours.

        Raises:
            TypeError, ValueError: tau is no positive number.
        """
        tau = number("tau", tau, float)
        if not 0 < tau < math.inf:
            raise ValueError(f"soften: tau must be positive and finite, got {tau}")
        softened = copy.copy(self)
        softened._modules = dict(self._modules)
        for name, part in self._modules.items():
            if isinstance(part, Quantizing):
                softened._modules[name] = other = copy.copy(part)
                other.tau = tau
        return softened


class Quantized(_Softened, Amortized):
    r"""The guide of a VQ-VAE: all probability on the code nearest to the encoder's output.

    .. math:: q(z \mid x) = 1 \;\text{ for }\; z = e_c, \quad
              c = \arg\min_k \lVert z_e(x) - e_k \rVert^2

    at each place of a map. The code is one of a finite set, so log q = 0 is a probability, and
    the ELBO is a bound on log p(x), unlike that of a :class:`PointMass`: minus it is the length of
    a code for x, in nats, that says c first and then x given c. The gradient passes the encoder's
    output straight through; train with :class:`ppvae.elbo.VQELBO`.

    Args:
        encoder: from x to ``(..., D, h, w)``.
        quantizer: ``nets.Codebook`` or ``nets.FSQ``, or another such as in
            :mod:`ppvae.nets.codes`; the same object as in the model's ``conditionals.CodePrior``.
        condition: from ``y`` to features, which ``encoder(x, features)`` gets; y itself if None.
        latent: the name of the latent site.

    Raises:
        ValueError: for more than one particle, since all draws are equal; when called, if the
            encoder's output has other channels than the codes.

    Source: van den Oord, Vinyals & Kavukcuoglu, Neural Discrete Representation Learning, 2017.

    Example:
        >>> import math, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> book = nets.Codebook(num_codes=8, dim=2)
        >>> encoder = nn.Sequential(nn.Linear(16, 2 * 9), nn.Unflatten(-1, (2, 3, 3)))
        >>> decoder = nn.Sequential(nn.Flatten(-3), nn.Linear(2 * 9, 16))
        >>> prior = conditionals.CodePrior(book, shape=(3, 3))
        >>> model = models.VAE(conditionals.Bernoulli(decoder), prior=prior)
        >>> weights = ppvae.log_weights(model, guides.Quantized(encoder, book), torch.ones(5, 16))
        >>> float(weights.log_q["z"][0, 0]), round(float(weights.log_p["z"][0, 0]) / math.log(8))
        (0.0, -9)
    """

    conditional: Quantizing

    @takes_numbers
    def __init__(
        self,
        encoder: nn.Module,
        quantizer: Any,
        condition: nn.Module | None = None,
        latent: str = "z",
    ) -> None:
        super().__init__(Quantizing(encoder, quantizer), condition, latent)

    def indices(self, x: Tensor, y: Tensor | None = None, *others: Tensor | None) -> Tensor:
        """The numbers of the codes of each row, ``(N, h, w)``."""
        return self.conditional.indices(*self.inputs(x, y, *others))


class QuantizedLevels(_Softened):
    r"""The guide of a VQ-VAE-2: a coarse map of codes, and a fine one that takes it into account.

    .. math:: h = f_1(x), \qquad z_2 = e_{c_2}\!\left[f_2(h)\right], \qquad
              z_1 = e_{c_1}\!\left[g(h, z_2)\right]

    with the nearest codes, as in :class:`Quantized`. The latents are ``"z2"`` and ``"z1"``.

    Args:
        lower: from x to features h, ``(..., C, h1, w1)``.
        upper: from h to ``(..., D2, h2, w2)``.
        merge: from h and z2 to ``(..., D1, h1, w1)``; it is called as ``merge(h, z2)``.
        quantizers: those of z1 and of z2, in this order; other objects.

    A label y, which the model's prior may depend on, is taken and not used; the mask of
    :class:`ppvae.models.Masked` is for ``lower``, as ``nets.Masked(net, event_dim=3)``.

    Raises:
        ValueError: one quantiser for both levels; else as :class:`Quantized`.

    Source: Razavi, van den Oord & Vinyals, Generating Diverse High-Fidelity Images with VQ-VAE-2,
    2019, section 3.1.
    """

    @takes_numbers
    def __init__(
        self,
        lower: nn.Module,
        upper: nn.Module,
        merge: nn.Module,
        quantizers: tuple[nn.Module, nn.Module],
    ) -> None:
        super().__init__()
        fine, coarse = quantizers
        if fine is coarse:
            raise ValueError(
                "QuantizedLevels: both levels have one quantiser, which learns from its latest "
                "call alone; give each level its own"
            )
        self.lower = lower
        self.top, self.bottom = Quantizing(upper, coarse), Quantizing(merge, fine)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *others: Tensor | None,
        size: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw z1 and z2 in the plate ``"data"``; arguments as the model's."""
        with data_plate(x, size=size):
            features = self._features(x, y, *others)
            z2: Tensor = pyro.sample("z2", self.top(features))
            z1: Tensor = pyro.sample("z1", self.bottom(features, z2))
        return z1, z2

    def indices(
        self, x: Tensor, y: Tensor | None = None, *others: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The numbers of the codes of each row: z1's ``(N, h1, w1)``, z2's ``(N, h2, w2)``."""
        features = self._features(x, y, *others)
        z2 = self.top.point(features)
        return self.bottom.indices(features, z2), self.top.quantizer.indices(z2)

    def _features(self, x: Tensor, *others: Tensor | None) -> Tensor:
        """h, of x and of what of it is observed."""
        masks = [o for o in others if o is not None and o.dtype == torch.bool and o.dim() > 1]
        features: Tensor = self.lower(x, *masks)
        return features


class Quantizing(Conditional):
    """A network and a quantiser: the code nearest to the output, or uncertain ones.

    Args:
        net: to ``(..., D, h, w)``.
        quantizer: as in :class:`Quantized`.
        tau: None: the nearest code; else see :meth:`Quantized.soften`.
    """

    quantizer: Any

    def __init__(self, net: nn.Module, quantizer: Any, tau: float | None = None) -> None:
        super().__init__(net)
        self.quantizer, self.tau = quantizer, tau

    def point(self, *inputs: Tensor) -> Tensor:
        """The nearest codes, ``(..., D, h, w)``."""
        codes: Tensor = self.quantizer(self.outputs(*inputs))
        return codes

    def indices(self, *inputs: Tensor) -> Tensor:
        """Their numbers, ``(..., h, w)``."""
        numbers: Tensor = self.quantizer.indices(self.point(*inputs))
        return numbers

    def forward(self, *inputs: Tensor) -> CodeDistribution:
        raw = self.outputs(*inputs)
        if self.tau is not None:
            return CodeMap(self.quantizer, -self.quantizer.squared_distances(raw) / self.tau)
        return PointCodes(self.quantizer, self.quantizer(raw), raw)


class PointCodes(CodeDistribution):
    """All probability on one map of codes; its draw has the quantiser's gradient.

    Args:
        quantizer: whose codes they are.
        value: the codes, ``(..., D, h, w)``.
        raw: the output that they are nearest to.
    """

    has_rsample = deterministic = True

    def __init__(self, quantizer: Any, value: Tensor, raw: Tensor) -> None:
        super().__init__(quantizer, value.shape[-2:], value.shape[:-3])
        self.value, self.raw = value, raw

    def distortion(self) -> Tensor | None:
        """Squared distance of output and codes, ``(...)``; None where codes are fixed (FSQ)."""
        measure = getattr(self.quantizer, "distortion", None)
        return None if measure is None else measure(self.raw, self.value)

    def expand(self, batch_shape: Any, _instance: Any = None) -> PointCodes:
        if len(batch_shape) > len(self.batch_shape):
            raise ValueError(
                "the guide's codes are deterministic, so all draws are equal: train with one "
                "particle, elbo.VQELBO(); for importance weights give guide.soften(tau)"
            )
        return self

    def log_prob(self, value: Tensor) -> Tensor:
        same = (value == self.value).flatten(-3).all(-1)
        return torch.zeros_like(same, dtype=self.value.dtype).masked_fill(~same, -torch.inf)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.value.expand(self._extended_shape(torch.Size(sample_shape)))
