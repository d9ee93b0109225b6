"""The guide of M2: a classifier, and an encoder that knows the class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers
from ppvae.distributions.labels import UNKNOWN, check_labels, one_hot, partly_known
from ppvae.program import Program, data_plate
from ppvae.wrapped import innermost, owner_of, title


class M2(Program):
    r"""q(y | x) q(z | x, y), with y certain where it is known.

    .. math:: q_\phi(y, z \mid x) = q_\phi(y \mid x)\, q_\phi(z \mid x, y)

    Args:
        classifier: a network from x to C logits.
        posterior: the conditional q(z | x, y), called with x and the class as a one-hot vector,
            as ``conditionals.Normal(nets.mlp(D + C, 256, 2 * latent_dim))``.
        draw: draw y instead of enumerating it: one run of encoder and decoder instead of C, and a
            gradient of y by ``"score"`` or ``"vimco"``. Bounds that are not linear in the
            log-weights, such as ``elbo.IWELBO``, train the classifier only so.

    Source: Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative
    Models, 2014.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, guides, nets
        >>> posterior = conditionals.Normal(nets.mlp(64 + 10, 32, 2 * 8))
        >>> guide = guides.M2(nets.mlp(64, 32, 10), posterior)
        >>> guide.classes(torch.zeros(5, 64)).probs.shape  # q(y | x)
        torch.Size([5, 10])
    """

    @takes_numbers
    def __init__(self, classifier: nn.Module, posterior: nn.Module, draw: bool = False) -> None:
        super().__init__()
        self.classifier = classifier
        self.conditional = posterior
        self.draw = draw

    def classes(self, x: Tensor, *others: Tensor) -> dist.Categorical:
        """q(y | x), whether or not y is known: batch shape ``(N,)``."""
        return dist.Categorical(logits=self.classifier(x, *others))

    def posterior(self, x: Tensor, y: Tensor, *others: Tensor) -> Any:
        """q(z | x, y) for classes ``(..., N)``, none of them -1."""
        return self.conditional(x, one_hot(y, self.classes(x, *others).logits), *others)

    def forward(
        self, x: Tensor, y: Tensor | None = None, *others: Tensor, size: int | None = None
    ) -> Tensor:
        """Draw z, ``(C, N, latent_dim)``, one for each class, in the plate ``"data"``.

        ``y``, ``(N,)``, holds classes, and -1 where they are not known; None: nowhere. Where it
        is drawn, or the guide is run by itself, z is ``(N, latent_dim)``. Others, such as the mask
        of :class:`ppvae.models.Masked`, are for both networks.
        """
        infer = {} if self.draw else {"enumerate": "parallel"}
        with data_plate(x, size=size):
            classes = self.classes(x, *others)
            c = pyro.sample("y", partly_known(classes, y), infer=infer)
            law = self.conditional(x, one_hot(c, classes.logits), *others)
            z: Tensor = pyro.sample("z", law)
        return z


def log_q_of_labels(
    model: Any,
    guide: Any,
    x: Tensor,
    y: Tensor | None = None,
    *others: Tensor,
    size: int | None = None,
) -> Tensor:
    r"""log q(y | x) of rows that have a label, 0 of the others, ``(N,)``: a term of ``elbo.Plus``.

    The bound of a labelled row has no q(y | x), so only this trains the classifier on labels. With
    the weight :math:`\alpha N / N_l` of ``elbo.Plus``, for :math:`N_l` labels in N rows, it is
    the paper's term, alpha N times the mean over labelled rows (its equation 9 has alpha = 0.1).

    Args:
        model: not asked.
        guide: has ``classes(x)``, q(y | x), as :class:`M2` does.
        x: ``(N, ...)``.
        y: classes ``(N,)``, -1 where they are not known.
        others: what ``classes`` takes behind x, such as a mask.
        size: of the data set that these rows are a minibatch of, as the pair takes it; not asked.

    Raises:
        TypeError: the guide has no ``classes``.
        ValueError: no y, or labels that are not integers ``(N,)``.

    Example:
        >>> import torch
        >>> from ppvae import guides, nets
        >>> guide = guides.M2(nets.mlp(4, 3), posterior=torch.nn.Identity())
        >>> _ = [p.data.zero_() for p in guide.parameters()]
        >>> guides.log_q_of_labels(None, guide, torch.ones(2, 4), torch.tensor([2, -1]))
        tensor([-1.0986,  0.0000], grad_fn=<WhereBackward0>)
    """
    if y is None:
        raise ValueError("log_q_of_labels is of labels: train on (x, y), y = -1 where unknown")
    classes: Callable[..., Any] | None = getattr(owner_of(innermost(guide)), "classes", None)
    if classes is None:
        raise TypeError(
            f"log_q_of_labels asks a guide for q(y | x), and {title(guide)} has no method "
            "classes(x) that returns it, as guides.M2 has"
        )
    logits = classes(x, *others).logits
    check_labels(y, logits.shape[-1], values=False)
    known = y != UNKNOWN
    chosen = logits.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(known, chosen, chosen.new_zeros(()))


class Labelled:
    r"""The mean of log q(y | x) over labelled rows of its own: a term of ``elbo.Plus``.

    .. math:: t = \frac1S \sum_{s=1}^S \log q(y_s \mid x_s)

    the same for each row of the batch. It has the expectation of :func:`log_q_of_labels` times N /
    N_l, so with the weight alpha it is the paper's term, too. But where labels are few, most
    batches have none or one: here the classifier sees S of them at each step.

    Args:
        x, y: the labelled rows, ``(N_l, ...)`` and classes ``(N_l,)``.
        size: S, how many are drawn at each step, with replacement; None: all, none drawn.
        draw: from rows to what the pair sees of them, such as ``torch.bernoulli`` for grey levels
            that are binarised anew in each epoch; None: the rows as they are.

    Raises:
        ValueError: no rows, different lengths, or labels that are not integers from 0.

    Example:
        >>> import torch
        >>> from ppvae import data, elbo, guides
        >>> train = data.with_labels(data.load("digits").train, per_class=3)
        >>> known = train.y >= 0
        >>> term = guides.Labelled(train.values[known], train.y[known], draw=torch.bernoulli)
        >>> elbo.Plus(elbo.IWELBO(), term, weight=10.0)
        Plus(IWELBO(num_particles=1, gradient='pathwise'), Labelled(30 rows), weight=10.0)
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        size: int | None = None,
        draw: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if not len(x) or len(x) != len(y):
            raise ValueError(f"give labelled rows and a label of each, got {len(x)} and {len(y)}")
        if y.dim() != 1 or y.is_floating_point() or y.min() < 0:
            raise ValueError(
                "these rows are labelled: y must be integers from 0, (N,), got "
                f"{y.dtype} of shape {tuple(y.shape)}; leave out rows with y = -1"
            )
        if size is not None and size < 1:
            raise ValueError(f"size is how many rows are drawn at each step, 1 or more: {size}")
        self.x, self.y, self.size, self.draw = x, y, size, draw

    def __repr__(self) -> str:
        drawn = "" if self.size is None else f", {self.size} at each step"
        return f"Labelled({len(self.x)} rows{drawn})"

    def __call__(self, model: Any, guide: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """The term, ``(N,)``, for a batch of N rows."""
        rows, labels = self.x.to(x.device), self.y.to(x.device)
        if self.size is not None:
            chosen = torch.randint(len(rows), (self.size,), device=x.device)
            rows, labels = rows[chosen], labels[chosen]
        rows = rows if self.draw is None else self.draw(rows)
        return log_q_of_labels(model, guide, rows, labels).mean().expand(len(x))
