r"""Distributions as Pyro has them, with log-densities that cost less per particle.

Each computes what does not depend on the particles once, before plates expand it.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

__all__ = ["BinaryVector", "DiagonalNormal", "NoInverse", "UnitNormal", "WordCounts"]


class NoInverse(ValueError):
    """A distribution can only weigh its own draws: as a flow without an inverse."""


class _Vector(dist.Independent):
    """``Independent(base, event_dim)`` whose base is made when it is asked for.

    A leaf sets its parameters, calls :meth:`_declare`, and defines ``_parameters`` and ``_family``.
    """

    _family: ClassVar[Any]
    _parameters: dict[str, Tensor]
    _validate_args = False  # not the base's, which need not exist

    def _declare(self, event_dim: int, validate_args: bool | None, **parameters: Tensor) -> None:
        if event_dim < 1:
            raise ValueError(f"{type(self).__name__} needs event_dim >= 1, got {event_dim}")
        shape = _broadcast([tensor.shape for tensor in parameters.values()])
        if event_dim > len(shape):
            raise ValueError(f"parameters of shape {tuple(shape)} have no {event_dim} event dims")
        self._parameters, self.reinterpreted_batch_ndims = parameters, event_dim
        self._batch_shape, self._event_shape = shape[:-event_dim], shape[-event_dim:]
        default = torch.distributions.Distribution._validate_args  # Pyro's setting changes it
        self._validate_args = default if validate_args is None else validate_args
        if self._validate_args:
            self.base_dist  # noqa: B018 - checks the parameters

    @property
    def base_dist(self) -> Any:
        made = self.__dict__.get("_made")
        if made is None:
            shape = self.batch_shape + self.event_shape
            expanded = {name: value.expand(shape) for name, value in self._parameters.items()}
            made = self._family(**expanded, validate_args=self._validate_args)
            self.__dict__["_made"] = made
        return made

    def expand(self, batch_shape: Any, _instance: Any = None) -> Any:
        new = self._get_checked_instance(type(self), _instance)
        new.__dict__.update(self.__dict__)
        new.__dict__.pop("_made", None)
        new.__dict__.pop("_drawn", None)
        new._batch_shape = torch.Size(batch_shape)
        return new

    def _event_dims(self) -> tuple[int, ...]:
        return tuple(range(-self.reinterpreted_batch_ndims, 0))


class DiagonalNormal(_Vector):
    r"""``Normal(loc, scale).to_event(event_dim)`` with a cheaper log-density.

    .. math:: \log p(x) = -\tfrac12 \sum_d \Big(\frac{x_d - \mu_d}{\sigma_d}\Big)^2
              - \sum_d \log\sigma_d - \tfrac D2 \log 2\pi

    The constants are computed for ``loc`` and ``scale`` as given, before plates and particles
    expand them, and are added after the sum. Everything else, KL included, is that of
    ``Independent(Normal)``.

    Args:
        loc: means, ``(..., *event_shape)``.
        scale: positive standard deviations, a float or anything that broadcasts to ``loc``.
        event_dim: number of trailing event dimensions, >= 1.
        log_scale: log of ``scale``, where that is known.

    Raises:
        ValueError: for ``event_dim < 1``.

    Example:
        >>> q = DiagonalNormal(torch.zeros(10, 3), 1.0)
        >>> q.batch_shape, q.event_shape
        (torch.Size([10]), torch.Size([3]))
    """

    _family = dist.Normal
    has_rsample = True

    def __init__(
        self,
        loc: Tensor,
        scale: Tensor | float,
        event_dim: int = 1,
        validate_args: bool | None = None,
        log_scale: Tensor | None = None,
    ) -> None:
        scale = scale if isinstance(scale, Tensor) else loc.new_full((), scale)
        self._log_scale = log_scale
        self._declare(event_dim, validate_args, loc=loc, scale=scale)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        loc, scale = self._parameters["loc"], self._parameters["scale"]
        shape = self._extended_shape(torch.Size(sample_shape))
        noise = torch.randn(shape, dtype=loc.dtype, device=loc.device)
        value = loc + scale * noise
        self._drawn = value, noise
        return value

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        loc, scale = self._parameters["loc"], self._parameters["scale"]
        if value.is_floating_point():  # torch takes the wider type of the two
            return self._of_noise((value - loc) / scale)
        return self._of_noise((value.double() - loc).to(loc.dtype) / scale)

    def log_prob_along_path(self, value: Tensor) -> Tensor:
        r"""Log q of its own last draw, as the parameters move both: a function of the noise.

        .. math:: \log q(\mu + \sigma \epsilon) = -\tfrac12 \sum_d \epsilon_d^2
                  - \sum_d \log\sigma_d - \tfrac D2 \log 2\pi

        The same number and the same total derivative in the parameters as :meth:`log_prob`, in
        fewer operations; but it has no slope in ``value``. Any other value goes there.

        Example:
            >>> q = DiagonalNormal(torch.zeros(3), torch.full((3,), 2.0))
            >>> z = q.rsample()
            >>> torch.allclose(q.log_prob_along_path(z), q.log_prob(z))
            True
        """
        drawn, noise = self.__dict__.get("_drawn", (None, None))
        return self._of_noise(noise) if drawn is value else self.log_prob(value)

    def _of_noise(self, noise: Tensor) -> Tensor:
        squares = noise.square().sum(self._event_dims())
        scale = self._parameters["scale"]
        log_scale = scale.log() if self._log_scale is None else self._log_scale
        if log_scale.dim() == 0:
            log_scale = math.prod(self.event_shape) * log_scale
        else:
            log_scale = _expanded(log_scale, self.event_shape).sum(self._event_dims())
        constant = 0.5 * math.log(2 * math.pi) * math.prod(self.event_shape)
        return _expanded(-0.5 * squares - (log_scale + constant), self.batch_shape)


class UnitNormal(DiagonalNormal):
    r"""``Normal(0, 1)`` of the event shape of ``loc``, which must be zeros.

    .. math:: \log p(x) = -\tfrac12 \sum_d x_d^2 - \tfrac D2 \log 2\pi

    Example:
        >>> UnitNormal(torch.zeros(2)).log_prob(torch.zeros(2))  # -log 2 pi
        tensor(-1.8379)
    """

    def __init__(self, loc: Tensor, validate_args: bool | None = None) -> None:
        super().__init__(loc, 1.0, loc.dim(), validate_args)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        constant = 0.5 * math.log(2 * math.pi) * math.prod(self.event_shape)
        squares = promoted(value, self._parameters["loc"]).square().sum(self._event_dims())
        return _expanded(-0.5 * squares - constant, self.batch_shape)


class BinaryVector(_Vector):
    r"""``Bernoulli(logits=logits).to_event(event_dim)`` with a cheaper log-density.

    .. math:: \log p(x) = \sum_d x_d \log \pi_d + (1 - x_d) \log(1 - \pi_d)
              = -\sum_d \log\left(1 + e^{(1 - 2 x_d) \ell_d}\right) \quad (x_d \in \{0, 1\})

    The second form needs fewer passes over the values, and the sign :math:`1 - 2x` is formed
    before particles expand it. With ``grey=True`` the first form is used,
    for targets in [0, 1]: minus a cross-entropy, not a density.

    Args:
        logits: :math:`\ell`, ``(..., *event_shape)``.
        event_dim: number of trailing event dimensions, >= 1.
        grey: accept targets in [0, 1].

    Raises:
        ValueError: for ``event_dim < 1``.

    Example:
        >>> import torch
        >>> from ppvae.distributions import BinaryVector
        >>> BinaryVector(torch.zeros(5, 3)).log_prob(torch.ones(5, 3))[0]  # 3 log(1/2)
        tensor(-2.0794)
    """

    has_rsample = False

    def __init__(
        self,
        logits: Tensor,
        event_dim: int = 1,
        grey: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        self._grey = grey
        self._declare(event_dim, validate_args, logits=logits)

    @property
    def _family(self) -> Any:
        return _GreyBernoulli if self._grey else dist.Bernoulli

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        logits = self._parameters["logits"]
        value = promoted(value, logits)  # of bytes, 1 - 2 x would wrap around
        if self._grey:
            costs = nn.functional.softplus(logits) - value * logits
        else:
            costs = nn.functional.softplus((1 - 2 * value) * logits)
        return _expanded(-costs.sum(self._event_dims()), self.batch_shape)


class WordCounts(dist.TorchDistribution):
    r"""Word counts of a document, as the log-probability of its words in a given order.

    .. math:: \log p(c) = \sum_v c_v \log \mathrm{softmax}(\ell)_v

    This is NVDM's convention (Miao, Yu and Blunsom, 2016, arXiv:1511.06038). It is not a
    distribution over counts: that is the multinomial, whose log-probability is larger by the
    coefficient :math:`\log n! - \sum_v \log c_v!` with :math:`n = \sum_v c_v`, a constant of the
    data.

    Args:
        logits: unnormalised log-probabilities of the words, ``(..., V)``.
        total_count: number of words ``n``, an int or an integer tensor that broadcasts to the
            batch shape. Only :meth:`sample` uses it.

    Example:
        >>> WordCounts(torch.zeros(4)).log_prob(torch.tensor([2.0, 1.0, 0.0, 0.0])).exp()
        tensor(0.0156)
    """

    arg_constraints: ClassVar = {"logits": constraints.independent(constraints.real, 1)}
    support = constraints.independent(constraints.nonnegative_integer, 1)
    logits: Tensor
    total_count: Tensor | int | None

    def __init__(
        self,
        logits: Tensor,
        total_count: Tensor | int | None = None,
        validate_args: bool | None = None,
    ) -> None:
        self.logits = logits
        self.total_count = total_count
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> WordCounts:
        new = self._get_checked_instance(WordCounts, _instance)
        batch_shape = torch.Size(batch_shape)
        # Parameters stay as given: log_prob broadcasts, and log_softmax is not repeated.
        new.logits, new.total_count = self.logits, self.total_count
        super(WordCounts, new).__init__(batch_shape, self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    @property
    def mean(self) -> Tensor:
        """Expected counts, ``n softmax(logits)``; needs ``total_count``."""
        n = torch.as_tensor(self._require_total_count()).unsqueeze(-1)
        return n * self.logits.softmax(-1).expand(self.batch_shape + self.event_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        if self._validate_args:
            self._validate_sample(value)
        log_prob = (promoted(value, self.logits) * self.logits.log_softmax(-1)).sum(-1)
        return _expanded(log_prob, self.batch_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``total_count`` words; it reads the largest count on the host."""
        n = torch.as_tensor(self._require_total_count(), device=self.logits.device)
        with torch.no_grad():
            shape = self._extended_shape(torch.Size(sample_shape))
            longest = int(n.max())
            logits = self.logits.expand(shape)
            words = dist.Categorical(logits=logits).sample((longest,)).movedim(0, -1)
            kept = torch.arange(longest, device=n.device) < n.unsqueeze(-1)
            counts = torch.zeros(shape, dtype=logits.dtype, device=logits.device)
            return counts.scatter_add(-1, words, kept.expand(words.shape).to(counts))

    def _require_total_count(self) -> Tensor | int:
        if self.total_count is None:
            raise ValueError("WordCounts needs total_count=... to be drawn, or obs= to be observed")
        return self.total_count


def promoted(value: Tensor, parameter: Tensor) -> Tensor:
    """A value with at least the precision of a parameter: what is computed of it has that, too."""
    if value.dtype == parameter.dtype:
        return value
    return value.to(torch.promote_types(value.dtype, parameter.dtype))


class ForAnyDtype:
    """Makes ``log_prob`` take values of any dtype, in front of a distribution with a ``loc``.

    Numbers that are wider than the parameters are refused, unless ``mixes``: networks, and some of
    torch's factorisations, take one dtype, and shorter numbers may not differ any more.
    """

    mixes: ClassVar[bool] = False

    def log_prob(self, value: Tensor) -> Tensor:
        parameter: Tensor = self.parameter()
        value = promoted(value, parameter)
        if value.dtype != parameter.dtype and not self.mixes:
            raise TypeError(
                f"{type(self).__name__}: the value is {value.dtype} and the parameters "
                f"{parameter.dtype}; give value.to({parameter.dtype}), or make the pair "
                f"{value.dtype} by model.to({value.dtype}) and guide.to({value.dtype})"
            )
        log_prob: Tensor = super().log_prob(value)  # type: ignore[misc]
        return log_prob

    def parameter(self) -> Tensor:
        """One that says which dtype all of them have."""
        loc: Tensor = self.loc  # type: ignore[attr-defined]
        return loc


class MultivariateNormal(ForAnyDtype, dist.MultivariateNormal):
    """Pyro's, for values of any dtype."""

    mixes = True


def _broadcast(shapes: list[torch.Size]) -> torch.Size:
    """``torch.broadcast_shapes``, which is Python, only where it is needed."""
    longest = max(shapes, key=len)
    if all(shape in (longest, ()) for shape in shapes):
        return longest
    return torch.broadcast_shapes(*shapes)


def _expanded(values: Tensor, shape: torch.Size) -> Tensor:
    """Values broadcast to at least a shape."""
    if values.shape[max(0, values.dim() - len(shape)) :] == shape:
        return values
    return values.expand(_broadcast([values.shape, shape]))


class _GreyBernoulli(dist.Bernoulli):
    """A Bernoulli whose log_prob accepts targets in [0, 1]: minus the cross-entropy."""

    support = constraints.unit_interval
    has_enumerate_support = False
