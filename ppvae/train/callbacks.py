"""What :func:`ppvae.fit` calls while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

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


class _EpochEnd(Callback):
    """The function that ``fit(..., on_epoch_end=)`` takes, as a callback."""

    def __init__(self, function: Callable[[SVI, History], bool | None]) -> None:
        self.function = function

    def on_epoch_end(self, svi: SVI, history: History) -> bool | None:
        return self.function(svi, history)


def overridden(callbacks: Any, method: str) -> list[Any]:
    """The bound methods of those callbacks that do something there."""
    base = getattr(Callback, method)
    return [getattr(c, method) for c in callbacks if getattr(type(c), method) is not base]


def all_callbacks(on_epoch_end: Any, callbacks: Any) -> list[Callback]:
    """What ``fit`` was given, as a list."""
    called = callable(on_epoch_end) and not isinstance(on_epoch_end, (type, nn.Module))
    if on_epoch_end is not None and not called:
        raise TypeError(f"on_epoch_end takes a function of (svi, history), got {on_epoch_end!r}")
    callbacks = _as_list("callbacks", callbacks, isinstance(callbacks, Callback))
    for callback in callbacks:
        if not isinstance(callback, Callback):
            raise TypeError(
                f"callbacks takes ppvae.Callback objects, got {callback!r}; functions: on_epoch_end"
            )
    return [*callbacks] if on_epoch_end is None else [_EpochEnd(on_epoch_end), *callbacks]


def all_loggers(loggers: Any, fabric: Any) -> list[Any]:
    """What ``fit`` was given, as a list, and the Fabric's."""
    loggers = _as_list("loggers", loggers, hasattr(loggers, "log_metrics"))
    loggers += fabric.loggers if fabric is not None else []
    for logger in loggers:
        if not hasattr(logger, "log_metrics"):
            raise TypeError(f"loggers need log_metrics(metrics, step), and {logger!r} has none")
    return loggers


def _as_list(name: str, value: Any, is_one: bool) -> list[Any]:
    """What an argument holds that may be one thing or several."""
    if is_one:
        return [value]
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{name} takes one of them or a list, got {value!r}")
    return list(value)


def log(loggers: Sequence[Any], rows: Sequence[dict[str, float]]) -> None:
    """Give rows of the history to the loggers."""
    for logger in loggers:
        for row in rows:
            logger.log_metrics(row, int(row["step"]))
        if rows and hasattr(logger, "save"):
            logger.save()
