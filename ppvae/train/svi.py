"""SVI: one optimisation step of a pair under any estimator."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro.infer
import pyro.optim
import torch
from torch import Tensor, nn

from ppvae.check.nonfinite import NonFiniteError, bad_gradients, blame
from ppvae.check.pair import Checks, check_batch
from ppvae.compile.compiled import Compiled, CompiledGradients
from ppvae.compile.cuda_graph import CudaGraph
from ppvae.compile.graph import unmoved
from ppvae.elbo import ELBO, Estimator
from ppvae.pairs import NotCompiled
from ppvae.program import local_parameters, method_owners, require_own_parameters
from ppvae.train.optimizer import build_optimizer


class SVI(pyro.infer.SVI):
    r"""Stochastic variational inference with parameters in modules and one fused optimiser.

    Used like ``pyro.infer.SVI``; Pyro's global parameter store is not touched.

    Args:
        model, guide: Pyro programs: ``ppvae.Program``, any ``nn.Module`` or ``PyroModule``, or a
            method of one. They may share modules.
        optim: a ``torch.optim`` class or a factory ``parameters -> optimiser`` such as
            ``functools.partial(torch.optim.Adam, lr=1e-3)``; a torch optimiser; or a ``PyroOptim``
            with one dictionary of arguments. Where torch has a fused implementation it is used,
            unless ``fused`` is set.
        loss: an estimator from :mod:`ppvae.elbo`; or a Pyro ELBO that is differentiable
            (``Trace_ELBO``, ``TraceMeanField_ELBO``, ``TraceEnum_ELBO``).
        clip_norm: largest allowed global 2-norm of the gradient of the loss (summed over the
            batch), over what the optimiser holds; None for no clipping.
        compile: trace loss and gradient into one graph and compile it, at the first step with
            arguments of a shape; needs a C++ compiler on the CPU. ``True`` raises where that is
            not possible, ``"auto"`` says why once and runs eagerly. See :mod:`ppvae.compiled`.
        skip_nonfinite: go on, without an update, after a step whose loss or gradient is not
            finite, and count it; by default it raises.

    Attributes:
        num_steps: optimisation steps taken, skipped ones included.
        synchronize: called with the gradients before they are clipped and used, e.g. to sum them
            over processes; None for one process. ``fit`` sets it.
        autocast: makes the context in which the loss is computed. ``fit`` sets it.

    Raises:
        PairError: at the first step, if the pair or the batch is wrong, before any update.
        ValueError, TypeError: an optimiser or loss that cannot work.
        NotCompiled: with ``compile=True``, where no graph can be built.
        NonFiniteError: a loss or gradient is NaN or infinite; nothing has been updated by it.

    Example:
        >>> import functools, torch, ppvae
        >>> from ppvae import conditionals, elbo, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> adam = functools.partial(torch.optim.Adam, lr=1e-2)
        >>> svi = ppvae.SVI(model, guide, adam, elbo.IWELBO(num_particles=8))
        >>> x = torch.bernoulli(torch.full((20, 4), 0.5))
        >>> losses = [svi.step(x) for _ in range(100)]
        >>> losses[-1] < losses[0]
        True
    """

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
    ) -> None:
        loss = loss if loss is not None else ELBO()
        if not isinstance(loss, pyro.infer.ELBO) or not hasattr(loss, "differentiable_loss"):
            raise TypeError(
                f"loss must be an estimator from ppvae.elbo, or a differentiable Pyro ELBO, got "
                f"{loss!r}; for pyro.infer.RenyiELBO use elbo.RenyiELBO or elbo.IWELBO"
            )
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(
                f"clip_norm must be positive, got {clip_norm}; use None for no clipping"
            )
        if compile not in (True, False, "auto"):
            raise ValueError(f'compile must be True, False or "auto", got {compile!r}')
        if compile is True and not isinstance(loss, Estimator):
            raise ValueError(
                f"compile=True needs an estimator of ppvae.elbo: {type(loss).__name__} of Pyro "
                'looks at its value, which a graph cannot; use elbo.ELBO() or compile="auto"'
            )
        self.model, self.guide, self.elbo, self.clip_norm = model, guide, loss, clip_norm
        self.objective: nn.Module = loss(model, guide)
        if not isinstance(loss, Estimator):  # Pyro's own module of a pair does not look for them
            self.objective.owners = method_owners(model, guide)
        self.optim = optim
        self.optimizer: torch.optim.Optimizer | None = None
        self.num_steps = self.num_epochs = 0
        self.compile, self.skip_nonfinite = compile, skip_nonfinite
        self.synchronize: Callable[[list[Tensor]], None] | None = None
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._compiled: Compiled | None = None
        self._buffers: list[dict[str, Tensor | None]] = []  # by module: moving one replaces them
        self._skipped: Any = 0  # on a GPU a tensor, so that nothing waits for it
        self._checked = (0, 0)  # steps and skipped steps when check_finite last looked

    @property
    def num_skipped(self) -> int:
        """Steps without an update because their loss or gradient was not finite."""
        return int(self._skipped)

    @property
    def build_seconds(self) -> float:
        """Time spent compiling."""
        return self._compiled.build_seconds if self._compiled is not None else 0.0

    def prepare(self, *args: Any, **kwargs: Any) -> Checks:
        """Check the pair on a batch and build the optimiser; :meth:`step` does it when needed.

        Returns:
            What :func:`ppvae.check.pair.check_batch` returns.
        """
        checks = check_batch(self.model, self.guide, *args, **kwargs)
        if self.optimizer is None:
            self._build()
        return checks

    def _build(self) -> None:
        self.optimizer = build_optimizer(self.optim, self.objective)
        self._buffers = [m._buffers for m in self.objective.modules() if m._buffers]

    def update(self, *args: Any, **kwargs: Any) -> Tensor:
        """One step; the loss as a 0-d tensor, so that nothing waits for the device."""
        if self.optimizer is None:
            self.prepare(*args, **kwargs)
        assert self.optimizer is not None
        key = self._capture_key(args, kwargs)
        replays = self._compiled.replays if self._compiled is not None else {}
        if key in replays:
            assert self._compiled is not None
            self._compiled.advance(key[0])
            loss = replays[key](args)
        else:
            loss = self._step(args, kwargs)
            if key is not None:  # the step has been taken, so all it needs is there
                replays[key] = CudaGraph(lambda *args: self._step(args, kwargs), args)
        self.num_steps += 1
        return loss

    def _step(self, args: tuple, kwargs: dict) -> Tensor:
        """Loss and gradient, over all processes, clipped, and the optimiser."""
        assert self.optimizer is not None
        random = torch.get_rng_state()
        buffers = [b for owned in self._buffers for b in owned.values() if b is not None]
        kept = [buffer.clone() for buffer in buffers]
        # only what is optimised: gradients of other parameters are never set to zero
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for parameter in parameters:
            parameter.grad = None
        loss = self._differentiate(args, kwargs, random)
        over_all = loss  # all processes decide alike whether a step is finite
        if self.synchronize is not None:
            over_all = loss.clone()
            self.synchronize([*(_gradient(parameter) for parameter in parameters), over_all])
        norm = self._norm(parameters)
        if self.clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.clip_norm, norm)
        if self._withholds(loss):
            bad = ~torch.isfinite(over_all + norm)
            self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
            self._skipped += bad.long()
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(torch.where(bad, value, buffer))
        elif not math.isfinite(float(over_all) + float(norm)):
            for buffer, value in zip(buffers, kept, strict=True):
                buffer.copy_(value)
            if not self.skip_nonfinite:
                what = f"the loss is {float(over_all):.6g}"
                if math.isfinite(float(over_all)):
                    what += f", but {bad_gradients(self.objective)}"
                raise self._nonfinite(what, self._site(random, args, kwargs))
            self._skipped += 1
            return loss
        self.optimizer.step()
        return loss

    def _norm(self, parameters: list[nn.Parameter]) -> Tensor:
        """The norm of the gradient; a graph has it, where these are its parameters."""
        graph = self._compiled.latest if self._compiled is not None else None
        if graph is not None and self.synchronize is None:
            known = graph.parameters
            if len(known) == len(parameters) and all(map(operator.is_, known, parameters)):
                norm: Tensor = graph.norm
                return norm
        gradients = [p.grad for p in parameters if p.grad is not None]
        if gradients and all(gradient.is_cpu for gradient in gradients):
            # get_total_norm takes as long again to sort them by device and to stack their norms
            norms = [torch.linalg.vector_norm(gradient).item() for gradient in gradients]
            return torch.linalg.vector_norm(torch.tensor(norms, dtype=gradients[0].dtype))
        return nn.utils.get_total_norm(gradients)

    def _withholds(self, loss: Tensor) -> bool:
        """Whether the optimiser looks itself, on the device, at whether the step is finite."""
        assert self.optimizer is not None
        return loss.is_cuda and all(group.get("fused") for group in self.optimizer.param_groups)

    def _capture_key(self, args: tuple, kwargs: dict) -> Any:
        """What a captured step depends on besides the values of tensors; None: do not capture."""
        assert self.optimizer is not None
        groups = self.optimizer.param_groups
        first = groups[0]["params"][0]
        if not (self.compile and first.is_cuda and self.synchronize is None):
            return None
        if not all(group.get("fused") and "capturable" in group for group in groups):
            return None
        if not isinstance(groups[0]["lr"], Tensor):  # what changes is read from the device
            self._skipped = torch.as_tensor(self._skipped, device=first.device)
            for group in groups:
                group["capturable"] = True
                group["lr"] = torch.as_tensor(float(group["lr"]), device=first.device)
        if self._compiled is None or not self._compiled.built(
            key := self._compiled.key(args, kwargs)
        ):
            return None
        fixed = [sorted((k, v) for k, v in g.items() if k not in ("params", "lr")) for g in groups]
        moments = [t.data_ptr() for t in self.optimizer.state[first].values()]
        return key, self.clip_norm, str(fixed), tuple(moments)

    def _differentiate(self, args: tuple, kwargs: dict, random: Tensor) -> Tensor:
        """The loss, detached, with the gradient in the parameters' ``grad``."""
        try:
            return self._loss(args, kwargs)
        except NotCompiled:
            raise
        except (RuntimeError, ValueError) as error:
            # a sampler given NaN raises; on the CPU the site can be named
            parameter = next(self.objective.parameters())
            site = "" if parameter.is_cuda else self._site(random, args, kwargs)
            if not site:
                raise
            if not self.skip_nonfinite:
                raise self._nonfinite("a draw is not possible", site) from error
            return torch.full((), math.nan, dtype=parameter.dtype, device=parameter.device)

    def _loss(self, args: tuple, kwargs: dict) -> Tensor:
        if self.compile:
            if self._compiled is None:
                self._compiled = Compiled(self.objective, CompiledGradients, self.compile is True)
            with self.autocast():
                compiled = self._compiled(args, kwargs)
            if compiled is not None:
                return compiled
        with (
            local_parameters(),
            pyro.validation_enabled(False),  # validated once, in prepare
            torch.enable_grad(),
            self.autocast(),
        ):
            loss: Tensor = self.objective(*args, **kwargs)
            if self.num_steps == 0:
                require_own_parameters(loss, self.objective)
        loss.backward()
        return loss.detach()

    def check_finite(self) -> None:
        """Raise :class:`NonFiniteError` if a step since the last call was not finite.

        On the CPU the step itself has raised. On a GPU the step has withheld its update instead of
        waiting for the device; ``fit`` calls this each epoch and before it saves.
        """
        (since, known), skipped = self._checked, self.num_skipped
        self._checked = (self.num_steps, skipped)
        if skipped > known and not self.skip_nonfinite:
            raise NonFiniteError(
                f"the loss or gradient of {skipped - known} of the steps {since + 1} to "
                f"{self.num_steps} was NaN or infinite; they made no update. Lower the learning "
                "rate, clip the gradient (SVI(clip_norm=...)), or bound the predicted scale; the "
                "same steps on the CPU name the site"
            )

    def _site(self, random: Tensor, args: tuple, kwargs: dict) -> str:
        """The site that makes the loss not finite: the pair is run again at its draws."""
        draws = getattr(self.elbo, "num_draws", self.elbo.num_particles)
        with unmoved(self.objective), torch.random.fork_rng(devices=[]), self.autocast():
            torch.set_rng_state(random)
            return blame(self.model, self.guide, *args, num_particles=draws, **kwargs)

    def _nonfinite(self, what: str, site: str) -> NonFiniteError:
        return NonFiniteError(
            f"step {self.num_steps + 1}: {what}; {site or 'no site of this process shows why'}. "
            "Nothing has been updated. Lower the learning rate, clip the gradient "
            "(SVI(clip_norm=...)), bound the predicted scale, or go on without such steps "
            "(SVI(skip_nonfinite=True))"
        )

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One optimisation step on a batch; returns the loss, summed over the batch, in nats."""
        return self.update(*args, **kwargs).item()

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """The loss on a batch, without a step."""
        with torch.no_grad(), local_parameters():
            loss: float = self.objective(*args, **kwargs).item()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """Parameters, buffers, the step count and the optimiser's state; no pickled code."""
        optimizer = self.optimizer.state_dict() if self.optimizer is not None else None
        objective = self.objective.state_dict()
        counts = {"num_steps": self.num_steps, "num_epochs": self.num_epochs}
        counts["num_skipped"] = self.num_skipped
        return {"objective": objective, "optimizer": optimizer, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state made by :meth:`state_dict` of an equal pair."""
        self.objective.load_state_dict(state["objective"])
        self.num_steps, self.num_epochs = state["num_steps"], state["num_epochs"]
        self._skipped = state["num_skipped"]
        if self._compiled is not None:
            self._compiled.replays.clear()
        self._checked = (self.num_steps, self.num_skipped)
        if state["optimizer"] is not None:
            if self.optimizer is None:
                self._build()
            assert self.optimizer is not None
            self.optimizer.load_state_dict(state["optimizer"])


def _gradient(parameter: Tensor) -> Tensor:
    """A parameter's gradient; zeros where it has none, so that every process has one."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad
