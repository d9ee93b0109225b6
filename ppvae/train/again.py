"""A step for which nothing is looked up, since only a step has happened since the last one."""

from __future__ import annotations

import operator
from typing import Any

from torch import Tensor
from torch.optim.optimizer import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks as after_all
from torch.optim.optimizer import _global_optimizer_pre_hooks as before_all

from ppvae.compile.graph import copies
from ppvae.pairs import rewinder
from ppvae.train import fused_adam
from ppvae.train.captured import Before


class Again:
    """The graph of an SVI's last step on a CPU, and the update, for steps just like it.

    Before a step an SVI looks whether the pair, its modes and attributes, the optimiser's state or
    its hooks are others than before, which takes as long as some products. It can be spared where
    no code of a user's has run since: :func:`ppvae.fit` knows, and says so by ``undisturbed``.

    Args:
        svi: that has just taken a step, with ``compile``.

    Attributes:
        graph: of loss and gradient; None: the next step has to be taken as any other.
        update: the optimiser's step.
    """

    def __init__(self, svi: Any) -> None:
        graph, trained, optimizer = svi._compiled.latest, svi.trained, svi.optimizer
        spared = (
            graph is not None
            and graph.norm is not None  # a CPU's
            and svi.turns is None
            and svi.synchronize is None
            and not _runs_others(optimizer)
            and len(trained) == len(graph.parameters)
            and all(map(operator.is_, trained, graph.parameters))
        )
        self.graph: Any = graph if spared else None
        self._trained = trained
        self._buffers = [b for owned in svi._buffers for b in owned.values() if b is not None]
        self.update = getattr(optimizer, "step_again", optimizer.step)

    def takes(self, args: tuple) -> bool:
        """Whether a step on these arguments is like the last."""
        return self.graph is not None and self.graph.takes(args)

    def before(self) -> Before:
        """What the step goes back to, if it makes no update."""
        kept = list(zip(self._buffers, copies(self._buffers), strict=True))
        return Before(self._trained, kept, rewinder())

    @property
    def norm(self) -> Tensor:
        """Of the gradient."""
        norm: Tensor = self.graph.norm
        return norm

    def loss(self, args: tuple) -> Tensor:
        """The loss, with the gradient in the parameters' ``grad``."""
        loss: Tensor = self.graph(args)
        return loss


def _runs_others(optimizer: Optimizer) -> bool:
    """Whether an optimiser's step runs code that is neither torch's nor ours."""
    own = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    home = type(optimizer).__module__
    known = home.startswith("torch.optim.") or home == fused_adam.__name__
    return bool(own or before_all or after_all or not known)
