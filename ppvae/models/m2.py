"""M2: a VAE whose decoder knows the class, which is known for some rows only."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import number, takes_numbers
from ppvae.chain import require_likelihood
from ppvae.distributions.labels import UNKNOWN, check_labels, one_hot, partly_known
from ppvae.models.vae import choose_prior
from ppvae.program import Program, data_plate


class NoLabelWarning(UserWarning):
    """A class that no row is labelled with."""


class Classes(nn.Module):
    """p(y): known for rows that have a label.

    Args:
        probs: of the classes, ``(C,)``.
    """

    logits: Tensor

    def __init__(self, probs: Tensor) -> None:
        super().__init__()
        self.register_buffer("logits", probs.log())

    def forward(self, y: Tensor | None) -> dist.Categorical:
        """p(y), or p(y) 1[y = label]; batch shape ``()`` or ``(N,)``."""
        found: dist.Categorical = partly_known(dist.Categorical(logits=self.logits), y, prior=True)
        return found

    def check(self, y: Tensor) -> None:
        """What :func:`ppvae.check.check_batch` asks of all labels there are."""
        check_labels(y, len(self.logits))


def _positive(probs: Any, count: int) -> Tensor:
    """``count`` positive numbers; equal ones for None."""
    if probs is None:
        return torch.ones(count)
    wanted = f"probs must be {count} positive numbers"
    try:
        given = torch.as_tensor(probs)
        good = given.shape == (count,) and bool(((given > 0) & given.isfinite()).all())
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{wanted}, got {type(probs).__name__}") from error
    if not good:
        raise ValueError(f"{wanted}, got {given.tolist()}")
    return given


class M2(Program):
    r"""Few labels: a class y and a style z make x; y is observed where it is known.

    .. math:: y \sim \mathrm{Cat}(\pi),\qquad z \sim p(z),\qquad x \sim p_\theta(x \mid z, y)

    Rows with a label have the log-weights of p(x, y), the others (y = -1) those of p(x): the class
    is summed out, so each row takes C runs of the decoder. With :class:`ppvae.guides.M2` the ELBO
    is equation 8 of the paper. The classifier q(y | x) of labelled rows, which is not in it, is
    trained by :class:`ppvae.elbo.Plus`.

    Args:
        likelihood: the conditional p(x | z, y), called with z and the class as a one-hot vector.
        latent_dim: the size of z, for the standard normal prior.
        num_classes: C >= 2.
        prior: another prior of z in its place, called without arguments.
        probs: pi, positive numbers; equal by default.

    Raises:
        ValueError: neither or both of ``latent_dim`` and ``prior`` are given; fewer than two
            classes; ``probs`` that are not C positive numbers.
        TypeError: the likelihood gives no distribution, as a bare network does.

    Source: Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative
    Models, 2014, arXiv:1406.5298.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> likelihood = conditionals.Bernoulli(nets.mlp(8 + 10, 256, 64))
        >>> model = models.M2(likelihood, latent_dim=8, num_classes=10)
        >>> model(y=torch.arange(10)).shape  # one image of each class
        torch.Size([10, 64])
        >>> posterior = conditionals.Normal(nets.mlp(64 + 10, 256, 2 * 8))
        >>> guide = guides.M2(nets.mlp(64, 256, 10), posterior)
        >>> x, y = torch.ones(3, 64), torch.tensor([7, -1, -1])
        >>> elbo.ELBO().evaluate(model, guide, x, y).shape
        torch.Size([3])
    """

    @takes_numbers(num_classes=2)
    def __init__(
        self,
        likelihood: nn.Module,
        latent_dim: int | None = None,
        num_classes: int = 10,
        prior: nn.Module | None = None,
        probs: Sequence[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        num_classes = number("num_classes", num_classes, int)
        if not 2 <= num_classes < 2**31:
            raise ValueError(f"num_classes is how many classes there are, 2 or more: {num_classes}")
        self.likelihood = likelihood
        self.prior = choose_prior(prior, latent_dim)
        self.classes = Classes(_positive(probs, num_classes))
        require_likelihood(
            self,
            lambda model: [
                torch.zeros(2, *model.prior().event_shape),
                model.one_hot(torch.zeros(2, dtype=torch.long)),
            ],
        )

    def forward(
        self, x: Tensor | None = None, y: Tensor | None = None, size: int | None = None
    ) -> Tensor:
        """Observe ``x``, ``(N, ...)``, and the labels that are known; or draw x. Returns x.

        ``y``, ``(N,)``, holds classes 0 to C - 1, and -1 where a class is not known; None: it is
        known nowhere. With ``size``, draw so many rows; or x is a minibatch of as many.
        """
        with data_plate(x, y, size=size):
            c = pyro.sample("y", self.classes(y), infer={"enumerate": "parallel"})
            z = pyro.sample("z", self.prior())
            value: Tensor = pyro.sample("x", self.likelihood(z, self.one_hot(c)), obs=x)
        return value

    def one_hot(self, y: Tensor) -> Tensor:
        """What the likelihood sees of classes ``(...,)``: vectors ``(..., C)``."""
        return one_hot(y, self.classes.logits)

    def before_fit(self, rows: int | None, x: Tensor, y: Tensor | None = None, *_: Tensor) -> None:
        """What :func:`ppvae.fit` calls: refuse data without a label, warn of a class without one.

        Of a ``DataLoader`` one batch says nothing of the others, so nothing is refused.
        """
        if y is None or len(y) != rows:
            return
        count = len(self.classes.logits)
        check_labels(y, count)
        labelled = y[y != UNKNOWN]
        if not len(labelled):
            raise ValueError(
                f"argument 'y' has no label in {rows} rows, all are {UNKNOWN}: nothing says which "
                "class is which. Give some rows their class, or leave y out to train without"
            )
        missing = sorted(set(range(count)) - set(labelled.unique().tolist()))
        if missing:
            warnings.warn(
                f"no row is labelled with classes {missing} of {count}: what the model takes them "
                "for is arbitrary. Label a row of each, or use fewer classes",
                NoLabelWarning,
                stacklevel=4,
            )
