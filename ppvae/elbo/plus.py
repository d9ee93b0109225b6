"""A bound plus a term of its own: what a pair should do beside explaining its data."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from torch import Tensor

from ppvae.elbo.estimator import DataPlate, Estimator
from ppvae.elbo.state import State
from ppvae.weights import LogWeights

Term = Callable[..., Tensor]


class Plus(Estimator):
    r"""Any estimator, with a weighted term of each datapoint added to what is maximised.

    .. math:: \sum_n B(x_n) + \alpha\, t(x_n)

    for instance the classifier's log q(y | x) of the rows that have a label
    (:func:`ppvae.guides.log_q_of_labels`), which the bound of M2 leaves out.

    The term is of the objective alone. Every reported bound (:meth:`evaluate`, ``fit``'s
    ``valid_bound``) is the estimator's own; ``train_objective`` has the term in it. Its gradient is
    taken of the term as it stands: it draws nothing by score functions. Of an upper bound, which
    is minimised, it is taken off.

    Args:
        estimator: whose bound and gradient it is.
        term: ``term(model, guide, *args) -> (N,)``, larger is better; called as the pair is. Its
            parameters are the pair's.
        weight: alpha: a number, a 0-d tensor, or a callable of the optimisation step
            (``elbo.LinearWarmup``), which the history shows as ``term_weight``.

    Raises:
        TypeError, ValueError: bad arguments; at a loss, a term that is not ``(N,)``, or a pair
            without a plate ``"data"``.

    Source: Kingma, Rezende, Mohamed & Welling, Semi-supervised Learning with Deep Generative
    Models, 2014, equation 9.

    Example:
        >>> import torch
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.M2(conditionals.Bernoulli(nets.mlp(2 + 3, 4)), 2, num_classes=3)
        >>> guide = guides.M2(nets.mlp(4, 3), conditionals.Normal(nets.mlp(4 + 3, 2 * 2)))
        >>> loss = elbo.Plus(elbo.ELBO(), guides.log_q_of_labels, weight=10.0)
        >>> x, y = torch.ones(2, 4), torch.tensor([1, -1])
        >>> loss(model, guide)(x, y).shape, loss.evaluate(model, guide, x, y).shape
        (torch.Size([]), torch.Size([2]))
    """

    estimator: Estimator
    term: Term
    weight: float | Tensor | Callable[[int], float]

    def __init__(
        self,
        estimator: Estimator,
        term: Term,
        weight: float | Tensor | Callable[[int], float] = 1.0,
    ) -> None:
        if not isinstance(estimator, Estimator):
            raise TypeError(f"estimator must be one of ppvae.elbo, got {estimator!r}")
        if not callable(term) or isinstance(term, type):
            raise TypeError(f"term must be a function (model, guide, *args) -> (N,), got {term!r}")
        if not isinstance(weight, (Real, Tensor)) and not callable(weight):
            raise TypeError(
                "weight must be a number, a 0-d tensor or a callable of the step such as "
                f"elbo.LinearWarmup, got {weight!r}"
            )
        if isinstance(weight, Tensor) and weight.dim() != 0:
            raise ValueError(f"weight must be one number, got a tensor {tuple(weight.shape)}")
        if not callable(weight) and not math.isfinite(weight):
            raise ValueError(f"weight must be a finite number, got {weight!r}")
        values = {"estimator": estimator, "term": term, "weight": weight}
        same = ("num_particles", "gradient", "sign", "gradients", "beta")
        values |= {name: getattr(estimator, name) for name in same if hasattr(estimator, name)}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        term = getattr(self.term, "__qualname__", repr(self.term))
        return f"Plus({self.estimator!r}, {term}, weight={self.weight!r})"

    @property
    def num_draws(self) -> int:
        return self.estimator.num_draws

    def bound(self, log_w: Tensor) -> Tensor:
        return self.estimator.bound(log_w)

    def effective(self, weights: LogWeights, state: State) -> Tensor:
        return self.estimator.effective(weights, state)

    def new_state(self) -> State:
        return self.estimator.new_state()

    def advance(self, state: State) -> None:
        self.estimator.advance(state)

    def evaluate(self, model: Callable, guide: Callable, *args: Any, **kwargs: Any) -> Tensor:
        """The estimator's bound, without the term."""
        return self.estimator.evaluate(model, guide, *args, **kwargs)

    def surrogate(
        self, model: Callable, guide: Callable, args: tuple, kwargs: dict, state: State
    ) -> Tensor:
        with DataPlate() as data:
            value = self.estimator.surrogate(model, guide, args, kwargs, state)
        plate = data.found("elbo.Plus adds a term")
        passed = {name: given for name, given in kwargs.items() if name != "joint"}
        term = self.term(model, guide, *args, **passed)
        if not isinstance(term, Tensor) or term.shape != (plate.size,):
            seen = tuple(term.shape) if isinstance(term, Tensor) else type(term).__name__
            raise ValueError(
                f"the term of elbo.Plus must be one number for each of the {plate.size} rows, "
                f"(N,), got {seen}: sum what belongs to a row, and do not average over rows"
            )
        scale = self.sign * plate.full_size / plate.size
        return value + scale * state.at_step(self.weight, "term_weight") * term.sum()
