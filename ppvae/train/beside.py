"""What ``SVI`` does with the auxiliaries of a pair after each of its steps."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from ppvae.auxiliary import Auxiliary, auxiliaries, own_parameters
from ppvae.check.nonfinite import NonFiniteError, bad_gradients
from ppvae.compile import cuda_graph
from ppvae.compile.compiled import Compiled, CompiledGradients, CompiledOutputs
from ppvae.compile.graph import unmoved
from ppvae.pairs import Program, seeded
from ppvae.program import local_parameters, method_owners
from ppvae.train.captured import withheld
from ppvae.train.draws import Draws
from ppvae.train.optimizer import build_optimizer, check_optim, take_up


@dataclass(frozen=True)
class Beside:
    """How the auxiliaries of a pair are trained: ``ppvae.SVI(..., beside=ppvae.Beside(steps=4))``.

    After each step of the pair, every :class:`ppvae.Auxiliary` in it, in the order of the modules,
    takes ``steps`` steps on new draws for the same rows; then their buffers are updated. The guide
    does not change meanwhile, so it is run once, for the draws of all these steps. A step of the
    pair that was not finite, and skipped, has none after it. Learning-rate schedules and
    ``clip_norm`` are the pair's.

    Args:
        optim: a ``torch.optim`` class or a factory ``parameters -> optimiser``; None: as the pair's
            own, which must be a class or factory then.
        steps: of each auxiliary after each step of the pair, >= 1.
        burn_in: further ones before the pair's first step, on its batch, >= 0.

    Raises:
        ValueError, TypeError: numbers out of range; an optimiser that was made for other
            parameters.

    Example:
        >>> import functools
        >>> Beside(functools.partial(torch.optim.Adam, lr=1e-4, betas=(0.5, 0.9)), steps=4).burn_in
        0
    """

    optim: Any = None
    steps: int = 1
    burn_in: int = 0

    def __post_init__(self) -> None:
        if self.optim is not None:
            check_optim(self.optim)
        if isinstance(self.optim, torch.optim.Optimizer):
            raise TypeError("Beside(optim=...) takes a class or a factory: each auxiliary gets one")
        for name, least in (("steps", 1), ("burn_in", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Beside: {name} must be a whole number >= {least}, got {value!r}")


class AuxiliaryObjective(nn.Module):
    """A pair and one of its auxiliaries as a module whose ``forward(*args)`` is the latter's loss.

    Attributes:
        trains: the auxiliary, whose parameters are all that it is differentiated by.
    """

    def __init__(self, model: Program, guide: Program, auxiliary: Auxiliary) -> None:
        super().__init__()
        self.model, self.guide, self.trains = model, guide, auxiliary
        self.owners = method_owners(model, guide)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return self.trains.loss(*self.draw(*args, **kwargs))

    @torch.no_grad()
    def draw(self, *args: Any, _count: int = 1, **kwargs: Any) -> list[Tensor]:
        """What so many losses are functions of, one after the other."""
        draws = Draws(self.model, self.guide, args, kwargs, _count)
        return [tensor for each in draws.each() for tensor in self.trains.draw(each)]


class AuxiliaryLoss(nn.Module):
    """The loss of an auxiliary as a module whose ``forward`` takes what was drawn.

    Attributes:
        trains: the auxiliary.
    """

    def __init__(self, auxiliary: Auxiliary) -> None:
        super().__init__()
        self.trains = auxiliary

    def forward(self, *drawn: Tensor) -> Tensor | None:
        return self.trains.loss(*drawn)


class Turn:
    """One auxiliary: its loss, its optimiser, and steps with both.

    Args:
        name: of the auxiliary, for messages.
        svi: whose pair it stands beside.
        auxiliary: the module.
        optim: makes the optimiser.
    """

    def __init__(self, name: str, svi: Any, auxiliary: Auxiliary, optim: Any) -> None:
        self.name, self.auxiliary, self.optim = name, auxiliary, optim
        self.objective = AuxiliaryObjective(svi.model, svi.guide, auxiliary)
        self.optimizer: torch.optim.Optimizer | None = None
        self._own = list(own_parameters(auxiliary).values())
        if self.trained():
            self.optimizer = build_optimizer(optim, auxiliary)
        self.compiled: Compiled | None = None
        self.drawing: Compiled | None = None
        if svi.compile and self.optimizer is not None:
            required, build = svi.compile is True, functools.partial(CompiledOutputs, self._draw)
            self.drawing = Compiled(self.objective, build, required, (svi.model, svi.guide))
            self.compiled = Compiled(AuxiliaryLoss(auxiliary), CompiledGradients, required)

    def _draw(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        return self.objective.draw(*args, **kwargs)

    def trained(self) -> list[nn.Parameter]:
        """The parameters that its loss trains."""
        return [p for p in self._own if p.requires_grad]

    def take_up(self) -> None:
        """Train what the auxiliary consists of by now."""
        self.objective.owners = method_owners(self.objective.model, self.objective.guide)
        self._own = list(own_parameters(self.auxiliary).values())
        if self.optimizer is not None:
            take_up(self.optimizer, self.optim, self.auxiliary)

    def draw(self, count: int, args: tuple, kwargs: dict) -> list[tuple[Tensor, ...]]:
        """What so many losses are functions of."""
        if self.drawing is not None:
            drawn = self.drawing(args, {**kwargs, "_count": count})
            if drawn is not None:
                return _parts(drawn, count)
        return self.draw_eagerly(count, args, kwargs)

    def draw_eagerly(self, count: int, args: tuple, kwargs: dict) -> list[tuple[Tensor, ...]]:
        """The same without a graph."""
        with local_parameters(), pyro.validation_enabled(False):
            return _parts(self._draw(*args, _count=count, **kwargs), count)

    def loss(self, drawn: tuple[Tensor, ...]) -> Tensor | None:
        """The loss, detached, with the gradient in its own parameters; None: nothing to train."""
        parameters = self.trained()
        if self.optimizer is None or not parameters:
            with torch.no_grad():
                self.auxiliary.loss(*drawn)
            return None
        if self.compiled is not None and (loss := self.compiled(drawn, {})) is not None:
            return loss
        with torch.enable_grad():
            loss = self.auxiliary.loss(*drawn)
            if loss is None:
                return None
            gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        return loss.detach()

    def step(self, drawn: tuple[Tensor, ...], svi: Any, skipped: Any) -> Any:
        """One step of its own; returns whether it was withheld, as a number or 0-d tensor."""
        with svi.autocast():
            loss = self.loss(drawn)
        if loss is None:
            return 0
        assert self.optimizer is not None
        parameters = self.trained()
        if svi.synchronize is not None:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            loss = loss.clone()
            svi.synchronize([*(p.grad for p in parameters), loss])
        graph = self.compiled.latest if self.compiled is not None else None
        if graph is not None and graph.norm is not None and svi.synchronize is None:
            norm = graph.norm
        else:
            norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        fused = all(group.get("fused") for group in self.optimizer.param_groups)
        if cuda_graph.is_gpu(loss) and fused:
            # nothing waits for the device: the optimiser reads found_inf there, and does nothing
            bad = ~torch.isfinite(loss + norm)
            left_out = bad | torch.as_tensor(skipped, device=loss.device).bool()
            with withheld(self.optimizer, left_out):
                self.optimizer.step()
            return bad.long()
        if math.isfinite(float(loss) + float(norm)):
            self.optimizer.step()
            return 0
        if not svi.skip_nonfinite:
            seen = f"its loss is {float(loss):.6g}"
            if math.isfinite(float(loss)):
                seen += f", but {bad_gradients(self.auxiliary)}"
            raise NonFiniteError(f"step {svi.num_steps + 1}: {self.blamed}; {seen}. {CURES}")
        return 1

    @property
    def blamed(self) -> str:
        """The auxiliary, as a message names it."""
        return f"{type(self.auxiliary).__name__} {self.name!r} beside the pair"


def _parts(drawn: Sequence[Tensor], count: int) -> list[tuple[Tensor, ...]]:
    """A list cut into so many tuples of one length."""
    size = len(drawn) // count
    return [tuple(drawn[i * size : (i + 1) * size]) for i in range(count)]


CURES = "Lower the learning rate of Beside(optim=...), or bound what its network is given"


class Turns:
    """All auxiliaries of a pair; see :class:`Beside`.

    Args:
        svi: the :class:`ppvae.SVI`, with its objective.

    Attributes:
        reported: sums of what each has reported, by column of the history, and of how often;
            ``fit`` empties it at the end of an epoch.

    Raises:
        ValueError: there is no factory of optimisers.
    """

    def __init__(self, svi: Any) -> None:
        self.svi, self.settings = svi, svi.beside or Beside()
        self.optim = svi.optim if self.settings.optim is None else self.settings.optim
        self.turns: dict[str, Turn] = {}
        self.withheld: Any = 0  # steps of auxiliaries; on a GPU a tensor
        self._raised_at = 0
        self.reported: dict[str, tuple[Any, int]] = {}
        self.take_up()

    def take_up(self) -> None:
        """Train the auxiliaries that the pair has by now."""
        kept, self.turns = self.turns, {}
        for name, auxiliary in auxiliaries(self.svi.objective).items():
            if name in kept and kept[name].auxiliary is auxiliary:
                kept[name].take_up()
                self.turns[name] = kept[name]
            else:
                if own_parameters(auxiliary) and isinstance(self.optim, torch.optim.Optimizer):
                    raise ValueError(
                        f"{type(auxiliary).__name__} {name!r} beside the pair needs an optimiser of"
                        " its own, and optim= is one that was made already: give "
                        "SVI(beside=ppvae.Beside(optim=torch.optim.Adam))"
                    )
                self.turns[name] = Turn(name, self.svi, auxiliary, self.optim)

    def check(self, args: tuple, kwargs: dict) -> None:
        """Draw and take each loss once, unnoticed, so that what is wrong raises before training."""
        with local_parameters(), pyro.validation_enabled(False), torch.no_grad():
            for turn in self.turns.values():
                with unmoved(self.svi.objective), seeded(0, *args):
                    for drawn in turn.draw_eagerly(self.settings.steps, args, kwargs):
                        turn.auxiliary.loss(*drawn)

    def burn_in(self, args: tuple, kwargs: dict) -> None:
        """The steps before the pair's first."""
        self._steps(self.settings.burn_in, args, kwargs, 0)

    def __call__(self, args: tuple, kwargs: dict, skipped: Any) -> None:
        """What follows a step of the pair.

        Args:
            args, kwargs: the batch.
            skipped: whether that step was withheld; on a GPU a tensor.
        """
        if not isinstance(skipped, Tensor) and skipped:
            return
        self._steps(self.settings.steps, args, kwargs, skipped)
        total = self.svi.synchronize or (lambda tensors: None)
        several = len(self.turns) > 1
        for name, turn in self.turns.items():
            withheld = isinstance(skipped, Tensor)  # or not: it is known on the device
            kept = [(b, b.clone()) for b in turn.auxiliary.buffers()] if withheld else []
            with torch.no_grad():
                turn.auxiliary.update(total)
                if withheld:
                    for buffer, value in kept:
                        buffer.copy_(torch.where(skipped.bool(), value, buffer))
                for key, value in turn.auxiliary.report().items():
                    column = f"{name}.{key}" if several else key
                    so_far, count = self.reported.get(column, (0.0, 0))
                    self.reported[column] = so_far + value.detach().clone(), count + 1

    def _steps(self, number: int, args: tuple, kwargs: dict, skipped: Any) -> None:
        for turn in self.turns.values():
            for begun in range(0, number, self.settings.steps):
                count = min(self.settings.steps, number - begun)
                with self.svi.autocast():
                    drawn = turn.draw(count, args, kwargs)
                for one in drawn:
                    self.withheld = self.withheld + turn.step(one, self.svi, skipped)

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteError` if a step since the last call was withheld."""
        before, self._raised_at = self._raised_at, int(self.withheld)
        if self._raised_at > before and not self.svi.skip_nonfinite:
            blamed = " or ".join(turn.blamed for turn in self.turns.values())
            raise NonFiniteError(
                f"a loss or gradient of {blamed} was NaN or infinite in "
                f"{self._raised_at - before} of its steps up to {self.svi.num_steps}. {CURES}"
            )

    @property
    def build_seconds(self) -> float:
        """Time spent compiling."""
        compiled = [c for turn in self.turns.values() for c in (turn.drawing, turn.compiled)]
        return sum(graphs.build_seconds for graphs in compiled if graphs is not None)

    def facts(self) -> str:
        """What must be the same in a resumed run."""
        made = {
            name: f"{type(turn.optimizer).__name__}({turn.optimizer.defaults})"
            for name, turn in self.turns.items()
            if turn.optimizer is not None
        }
        return f"steps={self.settings.steps}, burn_in={self.settings.burn_in}, {made}"

    def state_dict(self) -> dict[str, Any]:
        """The optimisers' states, by name, and how many steps were withheld."""
        states = {
            name: turn.optimizer.state_dict()
            for name, turn in self.turns.items()
            if turn.optimizer is not None
        }
        return {"optimizers": states, "withheld": int(self.withheld)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`."""
        self.withheld = self._raised_at = state["withheld"]
        for name, saved in state["optimizers"].items():
            optimizer = self.turns[name].optimizer
            assert optimizer is not None
            optimizer.load_state_dict(saved)
