"""What :func:`ppvae.fit` calls while it trains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from ppvae.train.history import History
    from ppvae.train.svi import SVI


class Callback:
    """Base of callbacks for ``fit(..., callbacks=[...])``: override what is needed.

    With several processes each of them calls its own copy. A callback with a state of its own
    returns it from :meth:`state_dict`, and finds it again after a resume.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> class Decay(ppvae.Callback):
        ...     '''An average of the parameters, for evaluation.'''
        ...     average = None
        ...     def on_step_end(self, svi, loss):
        ...         now = torch.nn.utils.parameters_to_vector(svi.objective.parameters()).detach()
        ...         self.average = now if self.average is None else self.average.lerp(now, 0.01)
        ...     def state_dict(self):
        ...         return {"average": self.average}
        ...     def load_state_dict(self, state):
        ...         self.average = state["average"]
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> svi = ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 2 * 2)))
        >>> decay = Decay()
        >>> _ = ppvae.fit(svi, torch.ones(20, 4), epochs=2, callbacks=[decay], progress=False)
        >>> decay.average.shape
        torch.Size([136])
    """

    def on_step_end(self, svi: SVI, loss: Tensor) -> None:
        """After each step; ``loss`` is on the device: reading it as a number waits for it."""

    def on_epoch_end(self, svi: SVI, history: History) -> bool | None:
        """After validation; ``history.rows[-1]`` may be added to. Return True to stop."""

    def on_checkpoint(self, svi: SVI, path: Path) -> None:
        """After a checkpoint was written."""

    def state_dict(self) -> dict[str, Any]:
        """What to find again after a resume: tensors, numbers, strings, lists, dictionaries."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned."""


def overridden(callbacks: Any, method: str) -> list[Any]:
    """The bound methods of those callbacks that do something there."""
    base = getattr(Callback, method)
    return [getattr(c, method) for c in callbacks if getattr(type(c), method) is not base]
