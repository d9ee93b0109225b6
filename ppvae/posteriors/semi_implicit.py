r"""Semi-implicit posteriors: a simple distribution whose parameters are themselves drawn.

.. math:: q(z \mid x) = \int q(z \mid \psi)\, q(\psi \mid x)\, d\psi

The integral has no closed form in general, so this density has none either. A mean over draws of
psi stands for it, and whether the one that drew z is among them decides what the mean is good for:
see :class:`SemiImplicit`.
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.conditionals import Conditional
from ppvae.distributions import NoInverse


class SemiImplicit(Conditional):
    r"""The posterior q(z | x) as a continuous mixture: psi is drawn given x, and z given psi.

    .. math:: \psi_0, \dots, \psi_J \sim q(\psi \mid x), \quad z \sim q(z \mid \psi_0), \qquad
              \log \hat q(z) = \log \frac{1}{J + 1} \sum_{j=0}^{J} q(z \mid \psi_j)

    Neither the density of psi nor that of z is ever computed. But once the psi are drawn,
    :math:`\hat q` is a density like any other, a mixture; and z is a draw of it, since all the psi
    are alike and it does not matter that it was the first that drew z. So

    .. math:: E\left[\frac{p(x, z)}{\hat q(z)}\right] = p(x)

    exactly, at any J: the ELBO and IWELBO are bounds, all their gradients are right, and k-hat and
    ``log_evidence`` mean what they say. The larger J is, the tighter they are.

    The price is that :math:`\hat q` belongs to a draw, so only the draws themselves can be weighed:
    ``log_prob`` of any other tensor raises :class:`~ppvae.distributions.NoInverse`. It cannot be a
    prior, ``ais`` takes ``start="prior"``, and no mutual information is reported.

    Args:
        mixing: q(psi | x), a conditional of what the guide calls it with, whose draws of shape
            ``(..., N, P)`` have a sample path; ``conditionals.Normal(encoder)`` will do, since the
            head can bend it. Its density need not exist.
        head: q(z | psi), a conditional of psi alone, with a sample path and a density;
            ``conditionals.Normal(net)`` with a ``net`` from P to 2 Z numbers.
        num_mixing: J >= 1, how many psi are drawn beside the one that draws z. All are new for each
            particle and row: a call with K particles holds ``(J + 1, K, N, P)`` numbers of psi, and
            runs the head on them. Evaluators count K N of them as ``max_rows``.

    Raises:
        TypeError: ``mixing`` or ``head`` is no conditional.
        ValueError: ``num_mixing < 1``; when drawn from, one has no sample path, or no event dims.

    Source: Yin & Zhou, Semi-Implicit Variational Inference, 2018, arXiv:1805.11183.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> encoder = conditionals.Normal(nets.mlp(8, 16, 2 * 3))
        >>> q = SemiImplicit(encoder, conditionals.Normal(nets.mlp(3, 16, 2 * 2)), num_mixing=10)
        >>> z = q(torch.zeros(5, 8)).rsample()
        >>> z.shape
        torch.Size([5, 2])

        The ELBO of q itself lies, on average, between those with and without :math:`\psi_0`:

        >>> x = torch.zeros(500, 8)
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 16, 8)), latent_dim=2)
        >>> below = elbo.ELBO().evaluate(model, guides.Amortized(q), x).mean()
        >>> above = elbo.ELBO().estimate(model, guides.Amortized(q.without_own()), x).mean()
        >>> bool(below < above)
        True
    """

    @takes_numbers(num_mixing=0)
    def __init__(self, mixing: Conditional, head: Conditional, num_mixing: int) -> None:
        nn.Module.__init__(self)  # the network is that of the mixing
        for name, part in (("mixing", mixing), ("head", head)):
            if not isinstance(part, Conditional):
                raise TypeError(
                    f"SemiImplicit({name}) must be a conditional, as conditionals.Normal(net), or "
                    f"a subclass of conditionals.Conditional; got {type(part).__name__}"
                )
        if not isinstance(num_mixing, int) or num_mixing < 1:
            raise ValueError(f"SemiImplicit(num_mixing) must be at least 1, got {num_mixing!r}")
        self.mixing = mixing
        self.head = head
        self.num_mixing = num_mixing
        self.own = True

    def forward(self, *inputs: Tensor) -> ContinuousMixture:
        mixing = self.mixing(*inputs)
        _require_path("mixing", mixing, "for a psi of a few values take posteriors.Mixture")
        family = ContinuousMixture if self.own else MixtureWithoutOwn
        return family(mixing, self.head, self.num_mixing)

    def without_own(self) -> SemiImplicit:
        r"""The same posterior, weighed without the :math:`\psi_0` that drew z; parameters shared.

        .. math:: \log \hat q(z) = \log \frac1J \sum_{j=1}^{J} q(z \mid \psi_j), \qquad
                  E \log \hat q(z) \le \log q(z)

        It is defined at every z, and an estimate (``estimated``): what ``elbo.ELBO().estimate``
        makes of it is above the ELBO of q on average, and may be far above log p(x). With the ELBO
        that it is evaluated beside, this says how much a larger ``num_mixing`` could gain.
        """
        other = copy.copy(self)
        other.own = False
        return other

    @property
    def net(self) -> nn.Module:  # type: ignore[override]
        """The network of ``mixing``: what sees x."""
        return self.mixing.net

    def without_net(self) -> SemiImplicit:
        """The posterior given the parameters of q(psi | x); the head is shared."""
        other = copy.copy(self)
        other._modules = {**self._modules, "mixing": self.mixing.without_net()}
        return other

    def extra_repr(self) -> str:
        return f"num_mixing={self.num_mixing}" + ("" if self.own else ", own=False")


class ContinuousMixture(dist.TorchDistribution):
    r"""What :class:`SemiImplicit` returns: draws, and log-densities of the last one.

    Args:
        mixing: the distribution of psi; its batch shape is that of z.
        head: from psi to the distribution of z.
        num_mixing: J >= 1.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    has_rsample = True

    def __init__(self, mixing: Any, head: Any, num_mixing: int) -> None:
        self.mixing, self.head, self.num_mixing = mixing, head, num_mixing
        self._z: Any = None  # of which the event shape and the support are known
        self._drawn: Any = None, None
        super().__init__(mixing.batch_shape, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> ContinuousMixture:
        new = self._get_checked_instance(type(self), _instance)
        mixing = self.mixing.expand(torch.Size(batch_shape))
        ContinuousMixture.__init__(new, mixing, self.head, self.num_mixing)
        return new

    @property
    def event_shape(self) -> torch.Size:
        """That of z, which only the head knows: it is asked once."""
        return self._known().event_shape

    @property
    def support(self) -> Any:
        """That of z given psi."""
        return self._known().support

    def _known(self) -> Any:
        if self._z is None:
            with torch.no_grad():
                self._z = self.given(self.mixing.sample((1,)))
        return self._z

    def given(self, psi: Tensor) -> Any:
        """q(z | psi), checked, its batch shape that of psi."""
        q = self.head(psi)
        _require_path("head", q, "a discrete z needs another guide")
        wanted = psi.shape[: psi.dim() - self.mixing.event_dim]
        if q.batch_shape != wanted:
            raise ValueError(
                f"SemiImplicit(head) gives batch shape {tuple(q.batch_shape)} for psi of shape "
                f"{tuple(psi.shape)}, in the place of {tuple(wanted)}: declare all dims of one row "
                "by .to_event(...), and fold leading dims in networks (nets.flat_batch)"
            )
        self._z = q
        return q

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draw J + 1 new psi for each z."""
        q = self.given(self.mixing.rsample((self.num_mixing + 1, *sample_shape)))
        z: Tensor = q.rsample()[0]
        self._drawn = z, q
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        drawn, q = self._drawn
        if getattr(value, "_cut_from", value) is not drawn:
            raise NoInverse(
                "a semi-implicit posterior can only weigh its own draws, each by the psi that it "
                "came from"
            )
        return _log_mean(q.log_prob(value))


class MixtureWithoutOwn(ContinuousMixture):
    """The same, weighed by J draws of psi that are made once, whatever drew the value."""

    _psi: Tensor | None = None

    @property
    def estimated(self) -> str:
        """Why ``log_prob`` is no log-density."""
        return (
            f"it is a mean over {self.num_mixing} draws of psi without the one that drew z; for a "
            "bound use the posterior that without_own() was called on, for the other side "
            "elbo.ELBO().estimate"
        )

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        z: Tensor = self.given(self.mixing.rsample(sample_shape)).rsample()
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        if self._psi is None:
            self._psi = self.mixing.rsample((self.num_mixing,))
        extra = value.dim() - len(self.batch_shape) - self.event_dim
        J, *rest = self._psi.shape
        q = self.given(self._psi.reshape(J, *(1,) * extra, *rest))
        return _log_mean(q.log_prob(value))


def _log_mean(log_densities: Tensor) -> Tensor:
    return log_densities.logsumexp(0) - math.log(len(log_densities))


def _require_path(part: str, fn: Any, cure: str) -> None:
    """Raise unless a part gives a distribution whose draws carry gradients."""
    if not fn.has_rsample:
        raise ValueError(
            f"SemiImplicit({part}): {type(fn).__name__} has no reparameterised sampler, and "
            f"gradients go along the draws; {cure}"
        )
    if not fn.event_shape:
        raise ValueError(
            f"SemiImplicit({part}) gives batch shape {tuple(fn.batch_shape)} and no event: declare "
            "the dims of one row by .to_event(1)"
        )
