"""Heads of counts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ppvae import distributions
from ppvae.arguments import takes_numbers
from ppvae.conditionals.heads import Conditional, Scale
from ppvae.conditionals.values import Around, Elementwise

Positive = float | Tensor | Scale | None


class Poisson(Elementwise):
    r"""Independent counts; the network's outputs are their log rates.

    .. math:: x_d \sim \mathrm{Poisson}(e^{\mathrm{offset} + \ell_d})

    Args:
        net: outputs ``(..., D)``.
        event_dim: number of event dimensions.

    An offset, the log exposure of a row (its time, its area, its library size), is an argument of
    the call, so that no network has to learn it: ``self.likelihood(z, offset=offset)`` in a model
    of your own; the second argument of :class:`ppvae.models.VAE`.

    Example:
        >>> import torch
        >>> p = Poisson(nn.Linear(2, 3))
        >>> hours = torch.tensor([1.0, 10.0])
        >>> rates = p(torch.zeros(2, 2), offset=hours.log()).mean
        >>> torch.allclose(rates[1], 10 * rates[0])
        True
    """

    family = distributions.Poisson
    rate = True

    def __init__(self, net: nn.Module, event_dim: int = 1) -> None:
        super().__init__(net, event_dim)


class NegativeBinomial(Elementwise):
    r"""Independent counts that vary more than Poisson's.

    .. math:: \mathrm{E}\,x_d = \mu_d = e^{\mathrm{offset} + \ell_d},\qquad
              \mathrm{Var}\,x_d = \mu_d + \mu_d^2 / \theta_d

    Args:
        net: outputs ``(..., D)`` log means, or with ``theta=None`` ``(..., 2 * D)``: log thetas
            after them.
        theta: the inverse dispersion: None, a number, a tensor or a :class:`Scale`, see
            :class:`Elementwise`; ``Scale(shape=D)`` is one for each feature.
        event_dim: number of event dimensions.

    Example:
        >>> import torch
        >>> p = NegativeBinomial(nn.Linear(2, 3), theta=Scale(2.0, shape=3))(torch.zeros(5, 2))
        >>> torch.allclose(p.variance, p.mean + p.mean**2 / 2)
        True
    """

    family = distributions.NegativeBinomial
    rate = True

    def __init__(self, net: nn.Module, theta: Positive = None, event_dim: int = 1) -> None:
        super().__init__(net, event_dim, theta=theta)


class BetaBinomial(Elementwise):
    r"""Independent numbers of successes in n trials, whose probabilities vary.

    .. math:: x_d \sim \mathrm{Binomial}(n, \pi_d),\qquad
              \pi_d \sim \mathrm{Beta}(\sigma(\ell_d)\, c_d,\ \sigma(-\ell_d)\, c_d)

    Args:
        net: outputs ``(..., D)`` logits of the mean shares, or with ``concentration=None``
            ``(..., 2 * D)``: log concentrations after them.
        total_count: n, a whole number or a tensor of them that broadcasts to the value. Where it
            differs from row to row, give it in the call: ``self.likelihood(z, total_count=n)``.
        concentration: c: None, a number, a tensor or a :class:`Scale`, see :class:`Elementwise`.
        event_dim: number of event dimensions.

    Raises:
        ValueError: when called, if ``total_count`` is given neither here nor there.

    Example:
        >>> import torch
        >>> p = BetaBinomial(nn.Linear(2, 3), total_count=10, concentration=5.0)(torch.zeros(4, 2))
        >>> bool(((p.mean > 0) & (p.mean < 10)).all())
        True
    """

    family = distributions.BetaBinomial

    def __init__(
        self,
        net: nn.Module,
        total_count: int | Tensor | None = None,
        concentration: Positive = None,
        event_dim: int = 1,
    ) -> None:
        super().__init__(net, event_dim, concentration=concentration)
        if isinstance(total_count, Tensor):
            self.register_buffer("total_count", total_count)
        else:
            self.total_count = total_count

    def forward(  # type: ignore[override]
        self, *inputs: Tensor, total_count: int | Tensor | None = None
    ) -> Any:
        """The law of the values, of ``total_count`` trials where that differs by row."""
        blocks = self.split(self.outputs(*inputs), self.num_blocks)
        return self.law(blocks, total_count=total_count).to_event(self.event_dim)

    def law(self, blocks: Any, offset: Any = None, total_count: int | Tensor | None = None) -> Any:
        n = self.total_count if total_count is None else total_count
        if n is None:
            raise ValueError(
                "BetaBinomial does not know the number of trials: BetaBinomial(net, total_count=10)"
                ", or in the call, likelihood(z, total_count=n) with n (N, 1) or (N, D)"
            )
        logits, *others = blocks
        log_concentration = self._log("concentration", logits)
        if log_concentration is None:
            log_concentration = others[0]
        return distributions.BetaBinomial(logits, log_concentration, n)


class ZeroInflated(Around):
    r"""Counts with more zeros than a head of counts explains.

    .. math:: p(x_d) = \sigma(g_d)\, [x_d = 0] + \sigma(-g_d)\, p_0(x_d)

    Args:
        head: a head of counts; its network gives D numbers more than the head needs, the gate
            logits :math:`g`, last.

    Raises:
        TypeError: the head is not one of independent counts.

    Example:
        >>> import torch
        >>> p = ZeroInflated(NegativeBinomial(nn.Linear(2, 2 * 3), theta=2.0))(torch.zeros(5, 2))
        >>> p.event_shape
        torch.Size([3])
    """

    head: Elementwise

    @takes_numbers
    def __init__(self, head: Elementwise) -> None:
        counts = isinstance(head, Elementwise) and getattr(head.family, "support", None) is not None
        if not counts or not head.family.support.is_discrete:
            raise TypeError(
                f"ZeroInflated needs a head of independent counts, as Poisson(net), and was given "
                f"{type(head).__name__}"
            )
        super().__init__(head)

    def num_outputs(self, num_values: int = 1) -> int:
        return self.head.num_outputs(num_values) + num_values

    def forward(self, *inputs: Tensor, **given: Any) -> Any:
        """The law of the values; an ``offset`` or a ``total_count`` is that of the head."""
        *blocks, gate = self.head.split(self.outputs(*inputs), self.head.num_blocks + 1)
        law = distributions.ZeroInflated(self.head.law(blocks, **given), gate)
        return law.to_event(self.event_dim)


class Multinomial(Conditional):
    r"""How the n counts of a row fall on V categories.

    .. math:: \log p(x) = \log n! - \sum_v \log x_v! + \sum_v x_v \log\mathrm{softmax}(\ell)_v

    Given n, the row's own sum. :class:`BagOfWords` leaves out the coefficient, which no
    parameter changes.

    Args:
        net: outputs ``(..., V)``, one logit per category.
        total_count: n, needed only to sample; or in the call, ``likelihood(z, total_count=n)``.

    Example:
        >>> import torch
        >>> Multinomial(nn.Linear(2, 4))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    event_dim = 1

    def __init__(self, net: nn.Module, total_count: int | None = None) -> None:
        super().__init__(net)
        self.total_count = total_count

    def num_outputs(self, num_values: int = 1) -> int:
        return num_values

    def forward(self, *inputs: Tensor, total_count: int | Tensor | None = None) -> Any:
        """The law of a row's counts."""
        n = self.total_count if total_count is None else total_count
        return distributions.Multinomial(self.outputs(*inputs), n)


class DirichletMultinomial(Elementwise):
    r"""How the n counts of a row fall on V categories, with shares that vary from row to row.

    .. math:: x \sim \mathrm{Multinomial}(n, \pi),\qquad
              \pi \sim \mathrm{Dirichlet}(c\, \mathrm{softmax}(\ell))

    Args:
        net: outputs ``(..., V)`` logits of the mean shares, or with ``concentration=None``
            ``(..., V + 1)``: log c after them.
        concentration: c, one for a row: None, a number or a :class:`Scale`, see
            :class:`Elementwise`.
        total_count: n, needed only to sample; or in the call, ``likelihood(z, total_count=n)``.

    Example:
        >>> import torch
        >>> DirichletMultinomial(nn.Linear(2, 4 + 1))(torch.zeros(5, 2)).event_shape
        torch.Size([4])
    """

    def __init__(
        self, net: nn.Module, concentration: Positive = None, total_count: int | None = None
    ) -> None:
        super().__init__(net, concentration=concentration)
        self.total_count = total_count

    def num_outputs(self, num_values: int = 1) -> int:
        return num_values + (self.concentration is None)

    def forward(  # type: ignore[override]
        self, *inputs: Tensor, total_count: int | Tensor | None = None
    ) -> Any:
        """The law of a row's counts."""
        logits = self.outputs(*inputs)
        log_c = self._log("concentration", logits)
        if log_c is None:
            logits, log_c = logits[..., :-1], logits[..., -1]
        n = self.total_count if total_count is None else total_count
        return distributions.DirichletMultinomial(logits, log_c, n)
