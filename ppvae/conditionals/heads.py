"""Heads: what a network's outputs are read as, the likelihoods p(x | z) and encoders q(z | x)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import number_or_tensor, takes_numbers
from ppvae.distributions import BinaryVector, DiagonalNormal, WordCounts


def full_precision(x: Tensor) -> Tensor:
    """Cast bfloat16 and float16 to float32, so that log-probabilities are summed in float32."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


class Conditional(nn.Module):
    """Base of the heads: a network, its outputs in float32 at least, and ``forward``.

    Write your own head by returning a distribution of :meth:`outputs`.

    Args:
        net: a network from the inputs to the distribution's parameters, as ``nets.mlp(...)``.

    Example:
        >>> class Poisson(Conditional):
        ...     def forward(self, *inputs):
        ...         return dist.Poisson(self.outputs(*inputs).exp()).to_event(1)
        >>> Poisson(nn.Linear(2, 3))(torch.zeros(5, 2)).event_shape
        torch.Size([3])
    """

    @takes_numbers
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def outputs(self, *inputs: Tensor) -> Tensor:
        """Call the network; bfloat16 and float16 outputs become float32.

        Raises:
            TypeError: the network cannot take the dtype of an input.
        """
        try:
            return full_precision(self.net(*inputs))
        except RuntimeError as error:
            if "type" in str(error):  # torch has many words for it
                self._require_dtype(inputs, error)
            raise

    def without_net(self) -> Conditional:
        """The head alone: called with what :meth:`outputs` gives. All else is shared."""
        head = copy.copy(self)
        head._modules = {**self._modules, "net": nn.Identity()}
        return head

    def _require_dtype(self, inputs: tuple[Tensor, ...], error: RuntimeError) -> None:
        """Raise ``TypeError`` if an input has another dtype than the network's parameters."""
        weights = {p.dtype for p in self.net.parameters() if p.is_floating_point()}
        for x in inputs:
            if len(weights) == 1 and x.dtype not in weights:
                (dtype,) = weights
                double = ", or make the pair float64: model.double(), guide.double()"
                raise TypeError(
                    f"the network of {type(self).__name__} has {dtype} parameters, and was given "
                    f"{x.dtype}: give x.to({dtype}){double if x.dtype == torch.float64 else ''}"
                ) from error

    def forward(self, *inputs: Tensor) -> dist.TorchDistribution:
        """The distribution given the inputs."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(*inputs)")

    def num_outputs(self, num_values: int = 1) -> int:
        """How many numbers the network has to give for so many values."""
        raise NotImplementedError(f"{type(self).__name__} must define num_outputs(num_values)")


class Scale(nn.Module):
    r"""A learned positive scale, :math:`\sigma = e^{s}`, of :class:`Normal` and other heads.

    Args:
        init: initial value of sigma, > 0. It is not a size, so whole numbers other than 1 are
            refused: for a sigma of 12 write 12.0.
        shape: ``()`` for one scale, ``64`` for one per dimension, ``(3, 1, 1)`` for one per
            channel: anything that broadcasts to the value.

    Raises:
        TypeError: ``init`` is no number, or a whole one.
        ValueError: it is not positive.

    Example:
        >>> Scale(0.5)()
        tensor(0.5000, grad_fn=<ExpBackward0>)
        >>> Scale(0.5, shape=64)
        Scale(sigma=0.5, shape=(64,))
        >>> Scale(64)
        Traceback (most recent call last):
        TypeError: Scale(64): init is the initial sigma, not a size; for a sigma of 64 write ...
    """

    def __init__(self, init: float = 1.0, shape: int | tuple[int, ...] = ()) -> None:
        super().__init__()
        _check_sigma(init, "Scale", "init is the initial sigma")
        size = _shape(shape=shape)
        self.log_scale = nn.Parameter(torch.full(size, math.log(init)))

    def forward(self) -> Tensor:
        """The scale."""
        return full_precision(self.log_scale).exp()

    def extra_repr(self) -> str:
        return f"sigma={_range(self().detach())}, shape={tuple(self.log_scale.shape)}"


@takes_numbers
def _shape(shape: int | tuple[int, ...]) -> tuple[int, ...]:
    return (shape,) if isinstance(shape, int) else shape


def _check_sigma(sigma: Any, owner: str, meaning: str) -> None:
    """Raise unless a number can be meant as a standard deviation."""
    if not isinstance(sigma, Real) or isinstance(sigma, bool):
        cure = "give a number, and shape=... for one per dimension"
        raise TypeError(f"{owner}: {meaning}, got {type(sigma).__name__}; {cure}")
    if not 0 < float(sigma) < math.inf:
        raise ValueError(f"{owner}: {meaning}, which must be positive and finite, got {sigma}")
    if isinstance(sigma, Integral) and sigma != 1:
        cure = f"for a sigma of {sigma} write {sigma}.0, for one per dimension Scale(shape={sigma})"
        raise TypeError(f"{owner}({sigma}): {meaning}, not a size; {cure}")


def _range(sigma: Tensor) -> str:
    low, high = sigma.min().item(), sigma.max().item()
    return f"{low:.4g}" if low == high else f"{low:.4g}..{high:.4g}"


class Normal(Conditional):
    r"""A diagonal normal; its scale predicted by the network, fixed, or learned.

    .. math:: N(\mu(x), \mathrm{diag}\,\sigma^2), \quad
              (\mu, s) = \mathrm{net}(x), \quad \sigma = \mathrm{positive}(s)

    The value of continuous data is a density: it depends on the data's scaling.

    Args:
        net: outputs ``(..., D)``, or with ``scale=None`` ``(..., 2 * D)``: the means first, then
            the raw scales. For images (``event_dim=3``) they are split on the channel dimension:
            ``(..., 2 * C, H, W)``.
        scale: None: predicted; a float > 0, or a tensor of them that broadcasts to the value:
            fixed (a tensor is a buffer: it moves and is saved with the module); a
            :class:`Scale`: learned. Whole numbers other than 1 are refused, see there.
        event_dim: number of event dimensions, 1 for vectors, 3 for images.
        positive: maps raw scales to (0, inf). ``torch.exp`` makes them log-sigmas (not
            log-variances), as in IWAE (arXiv:1509.00519); the ladder VAE (arXiv:1602.02282) uses
            ``torch.nn.functional.softplus``.

    Raises:
        TypeError: for a fixed scale that is a whole number, or nothing of the above.
        ValueError: for a fixed scale that is not positive; when called, if the outputs do not
            split in two.

    Example:
        >>> q = Normal(nn.Linear(8, 2 * 3))(torch.zeros(5, 8))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    def __init__(
        self,
        net: nn.Module,
        scale: float | Tensor | Scale | None = None,
        event_dim: int = 1,
        positive: Callable[[Tensor], Tensor] = torch.exp,
    ) -> None:
        super().__init__(net)
        if isinstance(scale, Tensor) and not isinstance(scale, nn.Parameter):
            scale = number_or_tensor("scale", scale)
            if not ((scale > 0) & (scale < math.inf)).all():
                seen = _range(scale.detach())
                raise ValueError(f"Normal: scale must be positive and finite, and is {seen}")
            self.register_buffer("scale", scale)
        else:
            if scale is not None and not isinstance(scale, (nn.Module, nn.Parameter)):
                _check_sigma(scale, "Normal", "scale is the fixed sigma")
            self.scale = scale
        self.event_dim = event_dim
        self.positive = positive

    def num_outputs(self, num_values: int = 1) -> int:
        return num_values * (2 if self.scale is None else 1)

    def forward(self, *inputs: Tensor) -> DiagonalNormal:
        outputs = self.outputs(*inputs)
        if self.scale is not None:
            scale = self.scale() if isinstance(self.scale, nn.Module) else self.scale
            if isinstance(scale, Tensor) and scale.dtype != outputs.dtype:
                scale = scale.to(outputs.dtype)
            return DiagonalNormal(outputs, scale, self.event_dim)
        loc, raw = _halves(outputs, "Normal", self.event_dim)
        log_scale = raw if self.positive is torch.exp else None
        return DiagonalNormal(loc, self.positive(raw), self.event_dim, log_scale=log_scale)

    def extra_repr(self) -> str:
        if isinstance(self.scale, Tensor):
            return f"scale={_range(self.scale.detach())}, shape={tuple(self.scale.shape)}"
        return f"scale={self.scale}" if isinstance(self.scale, Real) else ""


class SoftNormal(Conditional):
    r"""A diagonal normal whose mean and log-scale are clamped softly; the normals of NVAE.

    .. math:: N(\mu, \mathrm{diag}\,\sigma^2), \quad (m, s) = \mathrm{net}(x), \quad
              \mu = c \tanh(m / c), \quad \sigma = e^{c \tanh(s / c)} + \sigma_0

    So neither leaves a range that a closed-form KL can be computed in, and near 0 both are as they
    would be without. At outputs of 0 it is N(0, (1 + sigma_0)^2).

    Args:
        net: outputs ``(..., 2 * C, H, W)``, means first, split on the first event dimension; by
            default its input is these numbers.
        event_dim: number of event dimensions, 1 for vectors, 3 for feature maps.
        limit: c > 0, which means and log-scales stay below in absolute value.
        floor: sigma_0 >= 0, added to sigma.

    Raises:
        ValueError: a limit or floor out of range; when called, outputs that do not split in two.

    Source: Vahdat & Kautz, NVAE, 2020 (its code).

    Example:
        >>> q = SoftNormal(event_dim=1)(torch.tensor([1.0, 1e6, 0.0, -1e6]))
        >>> q.mean, q.stddev
        (tensor([0.9869, 5.0000]), tensor([1.0100, 0.0167]))
    """

    @takes_numbers
    def __init__(
        self,
        net: nn.Module | None = None,
        event_dim: int = 3,
        limit: float = 5.0,
        floor: float = 0.01,
    ) -> None:
        super().__init__(nn.Identity() if net is None else net)
        if not limit > 0 or not floor >= 0:
            seen = f"limit={limit} and floor={floor}"
            raise ValueError(f"SoftNormal needs limit > 0 and floor >= 0, got {seen}")
        self.event_dim, self.limit, self.floor = event_dim, limit, floor

    def forward(self, *inputs: Tensor) -> DiagonalNormal:
        clamped = self.limit * torch.tanh(self.outputs(*inputs) / self.limit)
        loc, log_scale = _halves(clamped, "SoftNormal", self.event_dim)
        return DiagonalNormal(loc, log_scale.exp() + self.floor, self.event_dim)


def _halves(outputs: Tensor, owner: str, event_dim: int) -> tuple[Tensor, Tensor]:
    """Means and raw scales; raises if the outputs do not split in two."""
    if outputs.shape[-event_dim] % 2:
        where = f"dimension {-event_dim} of the outputs {tuple(outputs.shape)}"
        raise ValueError(f"{owner} splits {where} in two: make it 2 * D, or give a scale")
    loc, raw = outputs.chunk(2, dim=-event_dim)
    return loc, raw


class Bernoulli(Conditional):
    r"""Independent binary values; the network's outputs are their logits.

    .. math:: \log p(x \mid z) = \sum_d x_d \log \pi_d + (1 - x_d) \log(1 - \pi_d)

    With ``grey=True`` the same formula takes :math:`x_d \in [0, 1]`. That is minus a cross-entropy,
    and its best value is minus the entropy of the targets, not 0. It is **not** the log-density of
    continuous data, and bounds with it do not compare with those of binarised data (grey MNIST:
    tens of nats apart).

    Args:
        net: outputs ``(..., D)``, for images ``(..., C, H, W)``.
        event_dim: number of event dimensions, 1 for vectors, 3 for images.
        grey: accept values in [0, 1]; by default they must be 0 or 1.

    Raises:
        ValueError: by ``log_prob`` with validation on, for values outside the support.

    Example:
        >>> Bernoulli(nn.Linear(2, 3))(torch.zeros(5, 2)).log_prob(torch.ones(5, 3)).shape
        torch.Size([5])
    """

    def __init__(self, net: nn.Module, event_dim: int = 1, grey: bool = False) -> None:
        super().__init__(net)
        self.event_dim = event_dim
        self.grey = grey

    def num_outputs(self, num_values: int = 1) -> int:
        return num_values

    def forward(self, *inputs: Tensor) -> BinaryVector:
        return BinaryVector(self.outputs(*inputs), self.event_dim, self.grey)


class Categorical(Conditional):
    r"""Independent whole values, 0 to ``num_classes`` - 1.

    .. math:: \log p(x \mid z) = \sum_d \log \mathrm{softmax}(\ell_d)_{x_d}

    Args:
        net: outputs ``(..., D * num_classes)``, the logits of a value side by side; for images
            ``(..., C * num_classes, H, W)``. With ``event_dim=0``, ``(..., num_classes)`` for one
            value without event dimension, as a label or a cluster.
        num_classes: number of classes.
        event_dim: number of event dimensions of the value: 0, 1 for vectors, 3 for images.

    Raises:
        ValueError: when called, if the outputs do not split into classes; by ``log_prob`` with
            validation on, for values outside the support.

    Example:
        >>> p = Categorical(nn.Linear(2, 3 * 256), num_classes=256)(torch.zeros(5, 2))
        >>> p.batch_shape, p.event_shape
        (torch.Size([5]), torch.Size([3]))
    """

    @takes_numbers
    def __init__(self, net: nn.Module, num_classes: int, event_dim: int = 1) -> None:
        super().__init__(net)
        self.num_classes = num_classes
        self.event_dim = event_dim

    def num_outputs(self, num_values: int = 1) -> int:
        return num_values * self.num_classes

    def forward(self, *inputs: Tensor) -> dist.TorchDistribution:
        outputs = self.outputs(*inputs)
        if self.event_dim == 0:
            return dist.Categorical(logits=outputs)
        channels = outputs.shape[-self.event_dim]
        if channels % self.num_classes:
            where = f"dimension {-self.event_dim} of the outputs {tuple(outputs.shape)}"
            raise ValueError(f"Categorical splits {where} by class: make it D * {self.num_classes}")
        logits = outputs.unflatten(-self.event_dim, (-1, self.num_classes))
        logits = logits.movedim(-self.event_dim, -1)
        return dist.Categorical(logits=logits).to_event(self.event_dim)


class BagOfWords(Conditional):
    r"""Word counts given a latent, NVDM's likelihood; see :class:`WordCounts`.

    .. math:: \log p(c \mid z) = \sum_v c_v \log \mathrm{softmax}(\mathrm{net}(z))_v

    It is the probability of the words as a sequence. The multinomial's is larger by
    :math:`\log n! - \sum_v \log c_v!`; perplexities are defined without it.

    Args:
        net: outputs ``(..., V)``, one logit per word of the vocabulary.
        total_count: number of words per document, needed only to sample.

    Raises:
        ValueError: by ``log_prob`` with validation on, for values that are not counts.

    Example:
        >>> BagOfWords(nn.Linear(2, 2000))(torch.zeros(5, 2)).event_shape
        torch.Size([2000])
    """

    def __init__(self, net: nn.Module, total_count: int | None = None) -> None:
        super().__init__(net)
        self.total_count = total_count

    def num_outputs(self, num_values: int = 1) -> int:
        return num_values

    def forward(self, *inputs: Tensor) -> WordCounts:
        return WordCounts(self.outputs(*inputs), self.total_count)
