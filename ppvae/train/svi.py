"""SVI: one optimisation step of a pair under any estimator."""

from __future__ import annotations

import functools
import math
import operator
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro.infer
import pyro.optim
import torch
from torch import Tensor, nn

from ppvae.arguments import require_programs, takes_numbers
from ppvae.auxiliary import auxiliaries
from ppvae.check.nonfinite import NonFiniteError, bad_gradients, blame
from ppvae.check.pair import Checks, check_batch
from ppvae.check.programs import PairError
from ppvae.compile import cuda_graph
from ppvae.compile.compiled import Compiled, CompiledGradients
from ppvae.compile.fixed import Fixed
from ppvae.compile.graph import copies, unmoved
from ppvae.elbo import ELBO, Estimator
from ppvae.pairs import (
    NotCompiled,
    cuda_devices,
    own_path,
    rewinder,
    seeded,
    structure,
    unnoticed,
)
from ppvae.program import local_parameters, method_owners, require_own_parameters
from ppvae.train.again import Again
from ppvae.train.beside import Beside, Turns
from ppvae.train.captured import Before, Begun, Captures, withheld
from ppvae.train.optimizer import build_optimizer, check_optim, left_out, take_up
from ppvae.weights import log_weights
from ppvae.wrapped import argument_labels, title

_CURES = "Lower the learning rate, clip (SVI(clip_norm=...)), bound the predicted scale"


class SVI(pyro.infer.SVI):
    r"""Stochastic variational inference with parameters in modules and one fused optimiser.

    Used like ``pyro.infer.SVI``; Pyro's global parameter store is not touched. What is frozen
    (``requires_grad_(False)``) is not trained until it is frozen no more; networks and parameters
    that are put in the place of others, or added, are trained from the next step on, each with a
    fresh state of the optimiser.

    Args:
        model, guide: Pyro programs: ``ppvae.Program``, any ``nn.Module`` or ``PyroModule``, or a
            method of one. They may share modules.
        optim: a ``torch.optim`` class or a factory ``parameters -> optimiser`` such as
            ``functools.partial(torch.optim.Adam, lr=1e-3)``; a torch optimiser; or a ``PyroOptim``
            with one dictionary of arguments. Where torch has a fused implementation it is used,
            unless ``fused`` is set. An optimiser trains what it holds; if that is not all, a
            warning names the rest.
        loss: an estimator from :mod:`ppvae.elbo`; or a Pyro ELBO that is differentiable
            (``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceEnum_ELBO``).
        clip_norm: largest allowed global 2-norm of the gradient of the loss (summed over the
            batch), over what the optimiser holds; None for no clipping.
        compile: trace loss and gradient into one graph and compile it, at the first step with
            arguments of a shape; needs a C++ compiler on the CPU. ``True`` raises where that is
            not possible, ``"auto"`` says why once and runs eagerly. See :mod:`ppvae.compile`.
        beside: how auxiliaries of the pair are trained, such as the ratio network of
            :class:`ppvae.elbo.FactorELBO`; None: one step after each of the pair's, with an
            optimiser made by ``optim``.
        regularizer: a module whose ``forward()`` is a penalty per datapoint, a 0-d tensor, such as
            :class:`ppvae.nets.Spectral`. A step's loss, and so ``train_objective``, has it times
            the datapoints that it sums over. It is compiled, moved and saved with the pair; no
            evaluation sees it. It should hold no parameters but the pair's.
        num_rows: of the data set that batches are cut from by hand, >= 1: what the terms of global
            latents are shared out over. :func:`ppvae.fit` knows it, and a data plate with a size.
        skip_nonfinite: go on, without an update, after a step whose loss or gradient is not
            finite, and count it; by default it raises.

    Attributes:
        num_steps: optimisation steps taken, skipped ones included.
        num_rows: as above; ``fit`` sets it to the rows of its data.
        synchronize: called with the gradients before they are clipped and used, e.g. to sum them
            over processes; None for one process. ``fit`` sets it.
        autocast: makes the context in which the loss is computed. ``fit`` sets it.
        undisturbed: whether nothing but a step has happened since the last one, so that the next
            one need not look for changes. ``fit`` sets it; a step sets it back to False.

    Raises:
        PairError: at the first step, if the pair or the batch is wrong, before any update.
        ValueError, TypeError: an optimiser or loss that cannot work.
        NotCompiled: with ``compile=True``, where no graph can be built.
        NonFiniteError: a loss or gradient is NaN or infinite; nothing has been updated by it.

    Example:
        >>> import functools, torch, ppvae
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> _ = torch.manual_seed(0)
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> adam = functools.partial(torch.optim.Adam, lr=1e-2)
        >>> svi = ppvae.SVI(model, guide, adam, elbo.IWELBO(num_particles=8))
        >>> x = torch.bernoulli(torch.full((20, 4), 0.5))
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> losses[-1] < losses[0]
        True
    """

    @takes_numbers
    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        optim: Any = torch.optim.Adam,
        loss: pyro.infer.ELBO | None = None,
        *,
        clip_norm: float | None = None,
        compile: bool | str = False,
        skip_nonfinite: bool = False,
        beside: Beside | None = None,
        regularizer: nn.Module | None = None,
        num_rows: int | None = None,
    ) -> None:
        require_programs(model=model, guide=guide)
        loss = loss if loss is not None else ELBO()
        check_optim(optim)
        _check_arguments(loss, clip_norm, compile)
        self.model, self.guide, self.elbo, self.clip_norm = model, guide, loss, clip_norm
        self.objective: nn.Module = loss(model, guide)
        if not isinstance(loss, Estimator):  # Pyro's own objective misses modules of methods
            self.objective.owners = method_owners(model, guide)
        if regularizer is not None:
            _check_regularizer(regularizer, loss)
            self.objective.regularizer = regularizer
        self.regularizer = regularizer
        if num_rows is not None and not 1 <= num_rows < 2**63:
            raise ValueError(f"num_rows must be at least 1, and below 2 ** 63, got {num_rows}")
        self.num_rows = num_rows
        self._rows_asked = False  # whether it is known if these matter
        self.optim = optim
        self.optimizer: torch.optim.Optimizer | None = None
        self.num_steps = self.num_epochs = 0
        self.compile, self.skip_nonfinite, self.beside = compile, skip_nonfinite, beside
        self.turns: Turns | None = None  # of the auxiliaries, where the pair has some
        self.synchronize: Callable[[list[Tensor]], None] | None = None
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.undisturbed = False
        self._compiled: Compiled | None = None
        self._fixed: Fixed | None = None  # what the optimiser was made for
        self._foreign_refused = False  # whether a loss has been looked through for parameters
        self._left_out: dict[str, nn.Parameter] = {}  # not held by the optimiser
        self._warned: set[str] = set()  # names of those, once a warning has been given
        self._buffers: list[dict[str, Tensor | None]] = []  # of modules: a move replaces tensors
        self._skipped: Any = 0  # on a GPU a tensor, so that nothing waits for it
        self._captures = Captures()
        self._again: Again | None = None
        self.stack_seconds = 0.0  # of building graphs that it shares with other pairs
        self._reported = (0, 0)  # steps and skipped steps when check_finite was last called

    def __repr__(self) -> str:
        optim = self.optimizer if self.optimizer is not None else self.optim
        made = optim.func if isinstance(optim, functools.partial) else optim
        name = (
            made.__name__ if callable(made) and hasattr(made, "__name__") else type(made).__name__
        )
        settings = optim.keywords if isinstance(optim, functools.partial) else {}
        if self.optimizer is not None:
            settings = {"lr": self.optimizer.param_groups[0]["lr"]}
        shown = ", ".join(f"{key}={value!r}" for key, value in settings.items())
        size = sum(p.numel() for p in self.objective.parameters() if p.requires_grad)
        return (
            f"SVI of {title(self.model)} and {title(self.guide)}, {size:,} parameters\n"
            f"  loss       {self.elbo!r}\n"
            f"  optimiser  {name}({shown})\n"
            f"  steps      {self.num_steps}, compile={self.compile!r}"
        )

    def prepare(self, *args: Any, **kwargs: Any) -> Checks:
        """Check the pair on a batch and build the optimiser; :meth:`step` does it when needed.

        Returns:
            What :func:`ppvae.check.pair.check_batch` returns.
        """
        for name, arg in zip(argument_labels(self.model, len(args)), args, strict=True):
            if isinstance(arg, Tensor) and arg.is_inference():
                raise PairError(
                    f"argument {name!r} was made in inference mode, and a step differentiates "
                    f"through what it computes of it: give {name}.clone()"
                )
            if isinstance(arg, Tensor) and arg.grad_fn is not None:
                raise PairError(
                    f"argument {name!r} was computed of what takes a gradient: give {name}.detach()"
                    ", or make what computes it a part of the guide, or of the model, to train it"
                )
        K = self.particles_at_once
        if auxiliaries(self.objective):  # whose draws for all their steps are particles of one run
            K = max(K, (self.beside or Beside()).steps)
        checks = check_batch(self.model, self.guide, *args, num_particles=K, **kwargs)
        self._check_globals(args, kwargs)
        if self.optimizer is None:
            self._build()
        if self.turns is not None:
            self.turns.check(args, kwargs)
        return checks

    def _check_globals(self, args: tuple, kwargs: dict) -> None:
        """Raise ``PairError`` for global latents whose terms would get another weight than 1."""
        pair = self.model, self.guide
        if kwargs.get("joint"):
            return
        try:
            with pyro.validation_enabled(False):
                found = structure(*pair, args, kwargs)
        except (RuntimeError, ValueError):  # the step will say what is wrong with the batch
            return
        self._rows_asked = True
        if not found.has_globals:
            return
        if not isinstance(self.elbo, Estimator) or auxiliaries(self.objective):
            what = "auxiliaries are" if isinstance(self.elbo, Estimator) else "Pyro's losses are"
            raise PairError(
                f"the pair has global latents, and {what} not done with these: use an estimator of "
                "ppvae.elbo alone, or one weight for the whole batch, joint=True"
            )
        with own_path(), unnoticed(*pair), pyro.validation_enabled(False):
            weights = log_weights(*pair, *args, **kwargs)
        if self.num_rows is None and weights.scale == 1:
            raise PairError(
                f"the pair has global latents ({', '.join(weights.global_p)}), and how many rows "
                "the data set has is not known: SVI(num_rows=len(x)), also for all data at once. "
                "Else each batch would be taken for all data"
            )
        self.objective.num_rows = self.num_rows  # type: ignore[assignment]  # a graph is of it

    def _build(self) -> None:
        self.optimizer = build_optimizer(self.optim, self.objective)
        self._look_at_pair()

    def _take_up(self) -> None:
        """Train what the pair consists of by now: networks and parameters have been replaced."""
        assert self.optimizer is not None
        self.objective.owners = method_owners(self.model, self.guide)
        take_up(self.optimizer, self.optim, self.objective)
        self._look_at_pair()

    def _look_at_pair(self) -> None:
        if self._fixed is None:
            self._fixed = Fixed(self.objective, (self.model, self.guide))
        self._fixed.look()
        self._foreign_refused = False
        self._buffers = [m._buffers for m in self.objective.modules() if m._buffers]
        assert self.optimizer is not None
        self._left_out = left_out(self.optimizer, self.objective)
        if self.turns is not None:
            self.turns.take_up()
        elif auxiliaries(self.objective):
            self.turns = Turns(self)
        self._warn_of_left_out()

    def _warn_of_left_out(self) -> None:
        """Warn once of each parameter that requires a gradient and that nobody updates."""
        names = [name for name, p in self._left_out.items() if p.requires_grad]
        names = [name for name in names if name not in self._warned]
        self._warned.update(names)
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            warnings.warn(
                f"the optimiser does not hold {', '.join(names[:3])}{more}, so they stay as they "
                "are; give it all parameters of the pair, or freeze these: requires_grad_(False)",
                stacklevel=5,
            )

    @property
    def build_seconds(self) -> float:
        """Time spent compiling."""
        built = self._compiled.build_seconds if self._compiled is not None else 0.0
        built += self.stack_seconds
        return built + (self.turns.build_seconds if self.turns is not None else 0.0)

    # -- a step ----------------------------------------------------------------------------------
    def step(self, *args: Any, **kwargs: Any) -> float:
        """One optimisation step on a batch; returns the loss, summed over the batch, in nats."""
        return self.update(*args, **kwargs).item()

    def update(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; the loss as a 0-d tensor, so that nothing waits for the device."""
        if self.undisturbed and self._compiled is not None and not kwargs:
            self.undisturbed = False
            again = self._again = self._again or Again(self)
            if again.takes(args):
                loss = self._step(args, kwargs, again)
                self.num_steps += 1
                return loss
        self.look_anew()
        if not self._rows_asked and self.optimizer is not None:  # its state was loaded
            self._check_globals(args, kwargs)
        if self.optimizer is None:
            self.prepare(*args, **kwargs)
        elif self._fixed is not None and self._fixed.renew():
            self._take_up()
        elif self._left_out:
            self._warn_of_left_out()
        if self.turns is not None and self.num_steps == 0:
            self.turns.burn_in(args, kwargs)
        key = self._captures.key(self, args, kwargs)
        before = self._skipped + 0 if self.turns is not None else 0  # a tensor changes in place
        if key is None:
            loss = self._step(args, kwargs)
        else:
            loss = self._captures.step(key, self, args, kwargs)
        if self.turns is not None:
            self.turns(args, kwargs, self._skipped - before)
        self.num_steps += 1
        return loss

    def look_anew(self) -> None:
        """Let the next step look at the pair and the optimiser, whatever ``undisturbed`` says."""
        self.undisturbed, self._again = False, None

    def _step(self, args: tuple, kwargs: dict, again: Again | None = None) -> Tensor:
        """Loss and gradient, over all processes and clipped; the update, if they are finite.

        Args:
            again: what the step is taken with, where it is like the last.
        """
        begun = self._begin(args, kwargs, again)
        self._synchronize(begun)
        known = () if again is None else (again.norm, again.update)
        return self.end_step(begun, args, kwargs, *known)

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the optimiser updates, once it is built."""
        groups = self.optimizer.param_groups if self.optimizer is not None else []
        return [p for group in groups for p in group["params"] if p.requires_grad]

    @property
    def withholds(self) -> bool:
        """Whether an update that must not be is withheld on the device, and nothing waits."""
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        first = next((p for group in groups for p in group["params"] if p.requires_grad), None)
        on_gpu = first is not None and cuda_graph.is_gpu(first)
        return on_gpu and all(group.get("fused") for group in groups)

    def before_step(self) -> Before:
        """What a step that makes no update goes back to; no parameter has a gradient any more."""
        assert self.optimizer is not None
        buffers = [b for owned in self._buffers for b in owned.values() if b is not None]
        kept = list(zip(buffers, copies(buffers), strict=True))
        # not all of the pair: gradients that nobody sets to zero would add up in the norm
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        trained = self.trained
        return Before(trained, kept, None if self.withholds else rewinder(*trained[:1]))

    def _begin(self, args: tuple, kwargs: dict, again: Again | None = None) -> Begun:
        """Loss and gradient of this process."""
        before = self.before_step() if again is None else again.before()
        try:
            loss = self._loss(args, kwargs) if again is None else again.loss(args)
        except (RuntimeError, ValueError) as error:
            loss = self._loss_of_failed_draw(error, before.rewind, args, kwargs)
        total = loss  # over the processes, which must agree on whether the step is finite
        if self.synchronize is not None:
            total = loss.clone()
            for parameter in before.parameters:  # so that every process has the same ones
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
        return Begun(before, loss, total)

    def _synchronize(self, begun: Begun) -> None:
        if self.synchronize is not None:
            gradients = [p.grad for p in begun.before.parameters]
            self.synchronize([*gradients, begun.total])  # type: ignore[list-item]

    def end_step(
        self,
        begun: Begun,
        args: tuple,
        kwargs: dict,
        norm: Tensor | None = None,
        update: Callable[[], Any] | None = None,
    ) -> Tensor:
        """The update, if loss and gradient are finite; returns the loss.

        Args:
            begun: the loss, where the gradients are those that parameters have.
            args, kwargs: of the step.
            norm: of the gradient, if known.
            update: the optimiser's step, if it is another function.
        """
        optimizer, (before, loss, total) = self.optimizer, begun
        assert optimizer is not None
        if norm is None:
            norm = self._norm(before.parameters)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(before.parameters, self.clip_norm, norm)
        if before.rewind is None:
            # nothing waits for the device: the optimiser reads found_inf there, and does nothing
            bad = ~torch.isfinite(total + norm)
            self._skipped += bad.long()
            for buffer, value in before.buffers:
                buffer.copy_(torch.where(bad, value, buffer))
            rates = self._captures.rates
            with withheld(optimizer, bad), nullcontext() if rates is None else rates.read():
                optimizer.step()
            return loss
        if not math.isfinite(float(total) + float(norm)):
            before.put_back()
            self._skip(float(total), before.rewind, args, kwargs)
            return loss
        (update or optimizer.step)()
        return loss

    def _loss(self, args: tuple, kwargs: dict) -> Tensor:
        """The loss, detached, with the gradient in the parameters' ``grad``."""
        if self.compile:
            compiled = self._compiled_loss(args, kwargs)
            if compiled is not None:
                return compiled
        with (
            local_parameters(),
            pyro.validation_enabled(False),  # validated once, in prepare
            torch.enable_grad(),
            self.autocast(),
        ):
            loss: Tensor = self.objective(*args, **kwargs)
        if not self._foreign_refused:
            require_own_parameters(loss, self.objective)
            self._foreign_refused = True
        loss.backward()
        return loss.detach()

    def _compiled_loss(self, args: tuple, kwargs: dict) -> Tensor | None:
        """The same by a compiled graph; None if there is none for these arguments."""
        if self._compiled is None:
            programs, required = (self.model, self.guide), self.compile is True
            self._compiled = Compiled(
                self.objective, CompiledGradients, required, programs, self._fixed
            )
        with self.autocast():
            return self._compiled(args, kwargs)

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of the gradient; a graph on a CPU has it, where these are its parameters."""
        graph = self._compiled.latest if self._compiled is not None else None
        if graph is not None and graph.norm is not None and self.synchronize is None:
            own = graph.parameters
            if len(own) == len(parameters) and all(map(operator.is_, own, parameters)):
                return graph.norm
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients and all(g.is_cpu and not cuda_graph.is_gpu(g) for g in gradients):
            # get_total_norm takes twice as long: it sorts them by device and stacks their norms
            norms = [torch.linalg.vector_norm(gradient).item() for gradient in gradients]
            return torch.linalg.vector_norm(torch.tensor(norms, dtype=gradients[0].dtype))
        return nn.utils.get_total_norm(gradients)

    # -- a loss or gradient that is not finite ---------------------------------------------------
    @property
    def num_skipped(self) -> int:
        """Steps without an update because their loss or gradient was not finite."""
        return int(self._skipped)

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteError` if a step since the last call was not finite.

        On the CPU the step itself has raised. On a GPU the step has withheld its update instead of
        waiting for the device; ``fit`` calls this each epoch and before it saves.
        """
        if self.turns is not None:
            self.turns.check_finite()
        (steps, skipped), now = self._reported, self.num_skipped
        self._reported = (self.num_steps, now)
        if now > skipped and not self.skip_nonfinite:
            raise NonFiniteError(
                f"loss or gradient of {now - skipped} of the steps {steps + 1} to {self.num_steps} "
                f"was NaN or infinite, and nothing was updated. {_CURES}; the same steps on the "
                "CPU name the site"
            )

    def _loss_of_failed_draw(
        self, error: Exception, rewind: Callable[[], None] | None, args: tuple, kwargs: dict
    ) -> Tensor:
        """NaN, if a sampler raised because it was given NaN; any other error is raised again."""
        parameter = next(self.objective.parameters())
        # only on the CPU the site can be named
        if isinstance(error, NotCompiled) or cuda_graph.is_gpu(parameter) or rewind is None:
            raise error
        site = self._site(rewind, args, kwargs)
        if not site:
            raise error
        if not self.skip_nonfinite:
            raise self._nonfinite("a draw is not possible", site) from error
        return torch.full((), math.nan, dtype=parameter.dtype, device=parameter.device)

    def _skip(self, loss: float, rewind: Callable[[], None], args: tuple, kwargs: dict) -> None:
        """Count a step that made no update, or raise."""
        if not self.skip_nonfinite:
            seen = f"the loss is {loss:.6g}"
            if math.isfinite(loss):
                seen += f", but {bad_gradients(self.objective)}"
            raise self._nonfinite(seen, self._site(rewind, args, kwargs))
        self._skipped += 1

    def _site(self, rewind: Callable[[], None], args: tuple, kwargs: dict) -> str:
        """The site that makes the loss not finite: the pair is run again at its draws."""
        draws = getattr(self.elbo, "num_draws", self.elbo.num_particles)
        devices = cuda_devices(*self.objective.parameters())
        with unmoved(self.objective), torch.random.fork_rng(devices=devices), self.autocast():
            rewind()
            return blame(self.model, self.guide, *args, num_particles=draws, **kwargs)

    def _nonfinite(self, seen: str, site: str) -> NonFiniteError:
        return NonFiniteError(
            f"step {self.num_steps + 1}: {seen}; {site or 'no site of this process shows why'}. "
            f"Nothing has been updated. {_CURES}, or leave such steps out "
            "(SVI(skip_nonfinite=True))"
        )

    # -- evaluation and state --------------------------------------------------------------------
    @property
    def evaluator(self) -> Estimator:
        """The estimator whose bound is reported; for an ELBO of Pyro's, which scales, this one."""
        if isinstance(self.elbo, Estimator):
            return self.elbo
        return ELBO(num_particles=self.elbo.num_particles)

    def full_size(self, *args: Any, **kwargs: Any) -> float:
        """How many datapoints the loss of a batch sums over: N, or that of a plate with a size."""
        with (
            unmoved(self.objective),
            seeded(0, *args),
            torch.no_grad(),
            local_parameters(),
            pyro.validation_enabled(False),
        ):
            K = self.particles_at_once
            return log_weights(self.model, self.guide, *args, num_particles=K, **kwargs).full_size

    @property
    def particles_at_once(self) -> int:
        """How many particles a program is run with; Pyro's ELBOs take one by one unless told."""
        if isinstance(self.elbo, Estimator):
            return self.elbo.num_draws
        return self.elbo.num_particles if self.elbo.vectorize_particles else 1

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss on a batch, without a step."""
        with torch.no_grad(), local_parameters():
            return self.objective(*args, **kwargs).item()

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers, the step count and the optimiser's state; no pickled code."""
        optimizer = self.optimizer.state_dict() if self.optimizer is not None else None
        objective = self.objective.state_dict()
        counts = {k: getattr(self, k) for k in ("num_steps", "num_epochs", "num_skipped")}
        beside = self.turns.state_dict() if self.turns is not None else None
        return {"objective": objective, "optimizer": optimizer, "auxiliary": beside, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state made by :meth:`state_dict` of an equal pair."""
        self.objective.load_state_dict(state["objective"])
        self.num_steps, self.num_epochs = state["num_steps"], state["num_epochs"]
        self._skipped = state["num_skipped"]
        self._captures = Captures()
        self.look_anew()
        self._reported = (self.num_steps, self.num_skipped)
        if state["optimizer"] is not None:
            if self.optimizer is None:
                self._build()
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])
            if self.turns is not None:
                self.turns.load_state_dict(state["auxiliary"])


def _check_regularizer(regularizer: Any, loss: Any) -> None:
    """Raise ``TypeError`` for a penalty that cannot be added to a loss."""
    if not isinstance(regularizer, nn.Module):
        seen = f"got a {type(regularizer).__name__}"
        raise TypeError(f"regularizer must be a module, which is saved with the run, {seen}")
    if not isinstance(loss, Estimator):
        raise TypeError(
            f"regularizer needs an estimator of ppvae.elbo: {type(loss).__name__} of Pyro is a "
            "loss of its own"
        )


def _check_arguments(loss: Any, clip_norm: float | None, compile: bool | str) -> None:
    """Raise for what :class:`SVI` cannot work with."""
    if not isinstance(loss, pyro.infer.ELBO) or not hasattr(loss, "differentiable_loss"):
        raise TypeError(
            f"loss must be an estimator from ppvae.elbo, or a differentiable Pyro ELBO, got "
            f"{loss!r}; for pyro.infer.RenyiELBO use elbo.RenyiELBO or elbo.IWELBO"
        )
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive, got {clip_norm}; use None for no clipping")
    if not isinstance(compile, (bool, str)) or compile not in (True, False, "auto"):
        raise ValueError(f'compile must be True, False or "auto", got {compile!r}')
    if compile is True and not isinstance(loss, Estimator):
        raise ValueError(
            f"compile=True needs an estimator of ppvae.elbo: {type(loss).__name__} of Pyro looks "
            'at its value, which a graph cannot; use elbo.ELBO() or compile="auto"'
        )
