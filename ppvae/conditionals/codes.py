"""Priors and posteriors over maps of codes: each value is one of finitely many, so log p <= 0."""

from __future__ import annotations

from typing import Any, ClassVar

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor, nn
from torch.distributions import Distribution, register_kl

from ppvae.arguments import require_has, takes_numbers
from ppvae.conditionals.heads import full_precision


class CodeSupport(constraints.Constraint):
    """Maps that hold a quantiser's codes, exactly.

    Args:
        quantizer: has ``indices`` and ``lookup``.
    """

    is_discrete, event_dim = True, 3

    def __init__(self, quantizer: Any) -> None:
        self.quantizer = quantizer

    def check(self, value: Tensor) -> Tensor:
        """Whether each map holds codes alone, ``(...)``."""
        with torch.no_grad():
            codes = self.quantizer.lookup(self.quantizer.indices(value))
            return (codes == value).flatten(-3).all(-1)

    def __repr__(self) -> str:
        return f"the codes of {self.quantizer}"


class CodeDistribution(dist.TorchDistribution):
    """What distributions over maps of codes share: ``(..., D, h, w)``, of a quantiser.

    Args:
        quantizer: ``num_codes``, ``dim``, ``indices``, ``lookup``; see :mod:`ppvae.nets.codes`.
        shape: ``(h, w)``.
        batch_shape: of the distribution.
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}

    def __init__(self, quantizer: Any, shape: tuple[int, ...], batch_shape: Any = ()) -> None:
        self.quantizer, self.shape = quantizer, tuple(shape)
        event_shape = torch.Size((quantizer.dim, *shape))
        super().__init__(torch.Size(batch_shape), event_shape, validate_args=False)

    @property
    def support(self) -> CodeSupport:
        return CodeSupport(self.quantizer)

    def numbers(self, value: Tensor) -> Tensor:
        """The codes' numbers of a value, ``(..., h, w)``.

        Raises:
            ValueError: it is a map of another shape.
        """
        if value.shape[-3:] != self.event_shape:
            raise ValueError(
                f"a prior over code maps {tuple(self.event_shape)} was given a map of shape "
                f"{tuple(value.shape[-3:])}: CodePrior(shape=...) must be the (h, w) of the "
                "encoder's output, and its quantiser the guide's"
            )
        indices: Tensor = self.quantizer.indices(value)
        return indices


class CodeMap(CodeDistribution):
    r"""Codes that are independent of each other, with logits at each place.

    .. math:: \log p(z) = \sum_{ij} \log \operatorname{softmax}(\ell_{ij})_{c_{ij}}

    Args:
        quantizer: as in :class:`CodeDistribution`.
        logits: ``(..., K, h, w)``.
    """

    def __init__(self, quantizer: Any, logits: Tensor) -> None:
        self.logits = full_precision(logits)
        super().__init__(quantizer, logits.shape[-2:], logits.shape[:-3])

    def expand(self, batch_shape: Any, _instance: Any = None) -> CodeMap:
        new: CodeMap = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        logits = self.logits.expand(torch.Size(batch_shape) + self.logits.shape[-3:])
        CodeMap.__init__(new, self.quantizer, logits)
        return new

    def log_probs(self) -> Tensor:
        """Of each code at each place, ``(..., K, h, w)``."""
        return self.logits.log_softmax(-3)

    def log_prob(self, value: Tensor) -> Tensor:
        return of_numbers(self.log_probs(), self.numbers(value))

    def sample(self, sample_shape: Any = ()) -> Tensor:
        logits = self.logits.movedim(-3, -1)
        numbers = dist.Categorical(logits=logits).sample(torch.Size(sample_shape))
        values: Tensor = self.quantizer.lookup(numbers)
        return values


@register_kl(CodeMap, CodeMap)
def _kl_of_maps(q: CodeMap, p: CodeMap) -> Tensor:
    if q.quantizer is not p.quantizer:
        raise NotImplementedError("the codes of two quantisers have no KL")
    log_q, log_p = q.log_probs(), p.log_probs()
    return (log_q.exp() * (log_q - log_p)).sum((-3, -2, -1))


class CausalCodes(CodeDistribution):
    r"""Codes one after the other, in raster order, by a network.

    .. math:: \log p(z) = \sum_{i} \log \operatorname{softmax}(\mathrm{net}(c, a)_i)_{c_i}

    The network's logits at a place depend on the places before it alone, so one run of it weighs a
    whole map; a draw takes a run for each place.

    Args:
        quantizer, shape, batch_shape: as in :class:`CodeDistribution`.
        net: from numbers ``(B, h, w)`` and feature maps ``(B, C, h', w')`` to logits
            ``(B, K, h, w)``, such as :class:`ppvae.nets.CausalGRU`.
        context: feature maps ``(..., C, h', w')``.
    """

    def __init__(
        self,
        quantizer: Any,
        shape: tuple[int, ...],
        net: nn.Module,
        context: tuple[Tensor, ...] = (),
        batch_shape: Any = None,
    ) -> None:
        self.net, self.context = net, context
        if batch_shape is None:
            batch_shape = torch.broadcast_shapes(*(tensor.shape[:-3] for tensor in context))
        super().__init__(quantizer, shape, batch_shape)

    def expand(self, batch_shape: Any, _instance: Any = None) -> CausalCodes:
        return CausalCodes(self.quantizer, self.shape, self.net, self.context, batch_shape)

    def logits(self, numbers: Tensor) -> Tensor:
        """Of each code at each place, given those before: ``(..., h, w)`` to ``(..., K, h, w)``."""
        leading = torch.broadcast_shapes(numbers.shape[:-2], self.batch_shape)
        flat = numbers.expand(leading + self.shape).reshape(-1, *self.shape)
        context = [
            tensor.expand(leading + tensor.shape[-3:]).reshape(-1, *tensor.shape[-3:])
            for tensor in self.context
        ]
        logits = full_precision(self.net(flat, *context))
        if logits.shape[1:] != (self.quantizer.num_codes, *self.shape):
            raise ValueError(
                f"CodePrior(net=...): logits of {self.quantizer.num_codes} codes at each place "
                f"have shape (B, {self.quantizer.num_codes}, {self.shape[0]}, {self.shape[1]}), "
                f"and the network gave {tuple(logits.shape)}"
            )
        return logits.reshape(leading + logits.shape[1:])

    def log_prob(self, value: Tensor) -> Tensor:
        numbers = self.numbers(value)
        log_probs = self.logits(numbers).log_softmax(-3)
        return of_numbers(log_probs, numbers.expand(log_probs.shape[:-3] + self.shape))

    @torch.no_grad()
    def sample(self, sample_shape: Any = ()) -> Tensor:
        leading = torch.Size(sample_shape) + self.batch_shape
        like = next(self.quantizer.buffers(), None)
        like = next(self.quantizer.parameters()) if like is None else like
        numbers = torch.zeros(leading + self.shape, dtype=torch.long, device=like.device)
        for row in range(self.shape[0]):
            for column in range(self.shape[1]):
                logits = self.logits(numbers)[..., row, column]
                numbers[..., row, column] = dist.Categorical(logits=logits).sample()
        values: Tensor = self.quantizer.lookup(numbers)
        return values


def of_numbers(log_probs: Tensor, numbers: Tensor) -> Tensor:
    """The sum over places of what each code there has: ``(..., K, h, w)`` to ``(...)``."""
    leading = torch.broadcast_shapes(log_probs.shape[:-3], numbers.shape[:-2])
    log_probs = log_probs.expand(leading + log_probs.shape[-3:])
    numbers = numbers.expand(leading + numbers.shape[-2:])
    return log_probs.gather(-3, numbers.unsqueeze(-3)).sum((-3, -2, -1))


class CodePrior(nn.Module):
    r"""The prior p(z) of code maps: uniform, or by a network that sees the codes before.

    .. math:: \log p(z) = -h w \log K \qquad\text{or}\qquad
              \log p(z) = \sum_i \log p(c_i \mid c_1, \dots, c_{i-1}, a)

    It is a probability, so minus an ELBO with it is a code length: the nats that the codes take,
    and those that the data take given the codes. A network is trained by the same ELBO: at once
    with the pair, or afterwards, with everything else frozen. The second is maximum likelihood of
    the codes, since a deterministic guide's ELBO is a log-likelihood.

    Args:
        quantizer: that of the guide; see :mod:`ppvae.nets.codes`. It is shared, not copied.
        shape: ``(h, w)``, of the encoder's output.
        net: None: uniform; ``nets.Unigram`` (one distribution for all places),
            ``nets.CausalGRU`` or ``nets.CausalConv``, or a module of your own from numbers
            ``(B, h, w)`` and feature maps ``(B, C, h', w')`` to logits ``(B, K, h, w)``.

    Called with feature maps ``(..., C, h', w')`` it is the conditional prior, p(z | a): another
    level's codes, a label's features as ``one_hot[..., None, None]``.

    Raises:
        ValueError: a shape that is none, a network of another number of codes; when it weighs a
            value, a map of another shape.

    Example:
        >>> from ppvae import nets
        >>> prior = CodePrior(nets.Codebook(num_codes=8, dim=2), shape=(3, 3))
        >>> round(float(prior().log_prob(prior().sample())) / torch.log(torch.tensor(8.0)).item())
        -9
    """

    zeros: Tensor
    quantizer: Any

    @takes_numbers
    def __init__(
        self, quantizer: Any, shape: tuple[int, int], net: nn.Module | None = None
    ) -> None:
        super().__init__()
        require_has("quantizer", quantizer, "num_codes", "nets.Codebook(512, 64)")
        in_net = getattr(net, "num_codes", quantizer.num_codes)
        if in_net != quantizer.num_codes:
            raise ValueError(
                f"CodePrior: a network of {in_net} codes beside a quantiser of "
                f"{quantizer.num_codes}: give {type(net).__name__} the quantiser's num_codes"
            )
        self.quantizer, self.shape, self.net = quantizer, shape, net
        zeros = torch.zeros(quantizer.num_codes, 1, 1)
        self.register_buffer("zeros", zeros, persistent=False)

    def forward(self, *context: Tensor) -> CodeDistribution:
        if self.net is None:
            return CodeMap(self.quantizer, self.zeros.expand(-1, *self.shape))
        return CausalCodes(self.quantizer, self.shape, self.net, context)

    def code_length(self, values: Tensor, *context: Tensor) -> Tensor:
        """-log p(z) of each map, in nats: ``(..., D, h, w)`` to ``(...)``."""
        distribution: Distribution = self(*context)
        return -distribution.log_prob(values)
