"""fit_many: one pair for each of several seeds, trained together."""

from __future__ import annotations

import functools
import operator
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from ppvae.arguments import number, takes_numbers
from ppvae.compile.graph import copies, unmoved
from ppvae.compile.stacked import Rows, StackedGradients
from ppvae.elbo.estimator import Estimator
from ppvae.intake import part_of
from ppvae.pairs import NotCompiled, seeded
from ppvae.processes import Processes
from ppvae.program import one_thread
from ppvae.train import refusals
from ppvae.train.batches import Batch
from ppvae.train.captured import Before, Begun
from ppvae.train.checkpoint import Checkpoints, checkpoints_for
from ppvae.train.dealt import dealt
from ppvae.train.fit import Steps, begin, next_batch, sources, train
from ppvae.train.fused_adam import AllAtOnce
from ppvae.train.histories import Histories
from ppvae.train.interrupt import interrupts
from ppvae.train.loaded import Loaded
from ppvae.train.refusals import resolve_device
from ppvae.train.run import Run
from ppvae.train.svi import SVI


@takes_numbers
def fit_many(
    make: Callable[[], SVI],
    data: Any,
    *,
    seeds: Iterable[int],
    epochs: int,
    batch_size: int = 128,
    valid: Any = None,
    patience: int | None = None,
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None = None,
    device: str | torch.device | None = None,
    checkpoint: str | os.PathLike[str] | Checkpoints | None = None,
    resume: bool = False,
    progress: bool = True,
    stack: bool | str = "auto",
    fabric: Any = None,
) -> Histories:
    """Train a pair from several seeds, all in one step, each as it would be trained alone.

    For each seed this is ::

        torch.manual_seed(seed)
        svi = make()
        history = ppvae.fit(svi, data, seed=seed, epochs=epochs, ...)

    with the same numbers up to rounding: initial parameters, order of rows, draws, optimiser,
    clipping, patience. Losses and gradients of all members are one graph, in which each matrix
    product is a batched one; it is compiled if ``make`` says ``compile``. A member whose patience
    is over moves no more. A member whose loss or gradient is not finite ends alone
    (or, with ``skip_nonfinite``, leaves out that step), with a warning.

    Pairs cannot be stacked if no graph can be traced (:doc:`/compiling`), their structures differ,
    a draw needs random numbers that depend on a value (a Gamma, Poisson or Bernoulli draw; not
    those of a likelihood), or something stands beside them (:class:`ppvae.Beside`). Then the
    members take their steps in turn, with the same result, and a warning says why.

    Args:
        make: builds an :class:`ppvae.SVI`, everything in it new; it sets no seed itself.
        data, epochs, batch_size, valid, patience, lr_scheduler, device, progress: as of
            :func:`ppvae.fit`; a ``DataLoader`` or a data set of torch is not taken, since each seed
            has an order of its own. ``lr_scheduler`` makes a schedule for each.
        seeds: whole numbers >= 0, all different.
        checkpoint: a folder, in which each seed has one of its own, ``seed-3``, as ``fit`` writes
            it; a :class:`ppvae.Checkpoints` says how often and how many.
        resume: True: each member goes on from its latest checkpoint, if there is one.
        stack: ``"auto"``; True raises where the pairs cannot be stacked; False takes turns.
        fabric: a launched ``lightning_fabric.Fabric``, in place of ``device``: each process is
            given all seeds, trains its part of them on its device, and gets the result of all.

    Returns:
        :class:`ppvae.Histories`: of each seed its history and its pair.

    Raises:
        ValueError: seeds that are equal, a ``make`` that sets a seed or whose pairs share
            parameters; and what ``fit`` raises before the first step.
        NotCompiled: with ``stack=True``.
        NonFiniteError: no member is left.
        RuntimeError: another process has raised, was killed or does not answer.

    Example:
        >>> import torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> def make():
        ...     model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        ...     return ppvae.SVI(model, guides.Normal(nets.mlp(4, 8, 2 * 2)))
        >>> x = torch.bernoulli(torch.full((40, 4), 0.5))
        >>> runs = ppvae.fit_many(make, x, seeds=range(3), epochs=2, progress=False)
        >>> len(runs.pairs), runs.frame().shape[0]
        (3, 6)
    """
    some = functools.partial(
        _train,
        make,
        data,
        epochs=epochs,
        batch_size=batch_size,
        valid=valid,
        patience=patience,
        lr_scheduler=lr_scheduler,
        checkpoint=checkpoint,
        resume=resume,
        stack=stack,
    )
    processes = Processes(fabric, alone=fabric is None)
    with processes.connected():
        seeds = _checked(seeds, make, stack)
        if fabric is None:
            runs = some(seeds, device=device, progress=progress)
        elif device is None:
            runs = dealt(some, seeds, make, processes, progress)
        else:
            raise ValueError(f"device={device!r}: a Fabric has one of its own, so leave it out")
    if len(runs.errors) == len(seeds):
        raise runs.errors[seeds[0]]
    return runs


def _train(
    make: Callable[[], SVI],
    data: Any,
    seeds: list[int],
    *,
    device: str | torch.device | None,
    progress: bool,
    epochs: int,
    batch_size: int,
    valid: Any,
    patience: int | None,
    lr_scheduler: Callable[[torch.optim.Optimizer], LRScheduler] | None,
    checkpoint: str | os.PathLike[str] | Checkpoints | None,
    resume: bool,
    stack: bool | str,
) -> Histories:
    """:func:`fit_many` of this process alone, but that errors of all members do not raise."""
    with one_thread(), torch.random.fork_rng(), ExitStack() as open_until_end:
        valid = part_of(data, "valid", None) if valid is None else part_of(valid, "valid", valid)
        refusals.check_arguments(
            epochs, batch_size, None, patience, valid, lr_scheduler, device, None
        )
        files = [checkpoints_for(_place(checkpoint, seed), resume) for seed in seeds]
        target = None if device is None else resolve_device(device)
        members = [Member(seed, make, target) for seed in seeds]
        _require_apart(members)
        processes = Processes(alone=True)
        of_batches = (batch_size, target, processes, files[0] is not None)
        cut = sources(members[0].svi, data, valid, seeds[0], None, *of_batches)
        if any(isinstance(part, Loaded) for part in cut):
            raise ValueError(
                "a DataLoader has one order of rows, and each seed needs its own: give tensors, "
                "arrays, a frame or a ppvae.data.Dataset, or call ppvae.fit for each seed"
            )
        cut[0].keep_drawn()
        for member, own_files in zip(members, files, strict=True):
            with member.stream.current():
                run = member.run = begin(
                    member.svi,
                    *cut,
                    processes=processes,
                    target=target,
                    callbacks=[],
                    loggers=[],
                    lr_scheduler=lr_scheduler,
                    files=own_files,
                    epochs=epochs,
                    seed=member.seed,
                    patience=patience,
                )
                open_until_end.enter_context(run.folder(resume))
                if resume:
                    run.resume(resume)
        _fall_in(members)
        # a stack of one is its member
        steps = Stack(members) if stack and len(members) > 1 else InTurn()
        open_until_end.callback(steps.close)
        disabled = None if progress else True  # None: in a terminal
        done = sum(len(member.run.progress.history.rows) for member in members)
        total = epochs * len(members)
        bar = tqdm(total=total, initial=done, unit="epoch", disable=disabled)
        open_until_end.enter_context(bar)
        interrupt = open_until_end.enter_context(interrupts(files[0] is not None))
        for member in members:
            member.steps = open_until_end.enter_context(closing(train(member.run, bar, interrupt)))
            member.go_on()
        while waiting := [member for member in members if member.batch is not None]:
            if isinstance(steps, Stack):
                try:
                    steps.require(waiting)
                except NotCompiled as error:
                    if stack is True:
                        raise NotCompiled(f"stack=True, but {error}") from error
                    why = f"not stacked, so the members take turns: {error}"
                    warnings.warn(why, RuntimeWarning, stacklevel=3)
                    steps.close()
                    steps = InTurn(str(error))
            for alike in _by_shape(waiting):
                steps.take(alike)
            for member in waiting:
                if member.error is None:
                    member.go_on()
    errors = {member.seed: member.error for member in members if member.error is not None}
    svis, histories = [m.svi for m in members], [m.run.progress.history for m in members]
    return Histories(seeds, svis, histories, errors, steps.reason)


class Member:
    """One of the pairs, its random stream, and how far its run is.

    Attributes:
        run: what trains it.
        steps: its loop, that yields batches and is sent losses.
        batch: what the next step is taken on; None: the run is over.
        loss: of the last step.
        error: what ended it before its time.
    """

    run: Run
    steps: Steps
    batch: Batch | None = None
    loss: Tensor | None = None

    def __init__(self, seed: int, make: Callable[[], SVI], target: torch.device | None) -> None:
        self.seed = seed
        self.error: Exception | None = None
        torch.manual_seed(seed)
        self.svi = make()
        if not isinstance(self.svi, SVI):
            raise TypeError(f"make must build a ppvae.SVI, and returned {type(self.svi).__name__}")
        parameter = next(self.svi.objective.parameters(), torch.empty(0))
        self.stream = Stream(target or parameter.device)

    def go_on(self) -> None:
        """Let its loop say what the next step is taken on."""
        with self.stream.current(), self.alone():
            self.batch = next_batch(self.steps, self.loss)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, a loss, gradient or parameter that is not finite ends this member only."""
        try:
            yield
        except FloatingPointError as error:
            self.batch, self.error = None, error
            warnings.warn(
                f"seed {self.seed} has ended, and the others go on: {error}",
                RuntimeWarning,
                stacklevel=5,
            )


class Stream:
    """The random stream of one member: of the CPU, and of the device that draws are made on.

    Args:
        device: of the pair; the stream begins as the process's own is now.

    Attributes:
        generator: what its draws on that device come from.
    """

    def __init__(self, device: torch.device) -> None:
        pairs = [(torch.default_generator, torch.Generator())]
        if device.type == "cuda":
            torch.cuda.init()
            index = torch.cuda.current_device() if device.index is None else device.index
            pairs.append((torch.cuda.default_generators[index], torch.Generator(device)))
        self._pairs, self.generator = pairs, pairs[-1][1]
        self._leave()

    def state(self) -> Tensor:
        """Of the CPU's."""
        return self._pairs[0][1].get_state()

    def _leave(self) -> None:
        for usual, own in self._pairs:
            own.set_state(usual.get_state())

    @contextmanager
    def current(self) -> Iterator[None]:
        """Inside, what is drawn is drawn from this stream."""
        for usual, own in self._pairs:
            usual.set_state(own.get_state())
        try:
            yield
        finally:
            self._leave()


class InTurn:
    """Steps of each member by itself.

    Args:
        reason: why not at once; None: nobody asked for that.
    """

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason

    def take(self, members: Sequence[Member]) -> None:
        """A step of each on its batch."""
        for member in members:
            assert member.batch is not None
            with member.stream.current(), member.alone():
                member.loss = member.svi.update(*member.batch)

    def close(self) -> None:
        """Nothing is left to be done."""


class Stack:
    """Steps of several members at once: one graph of loss and gradient for a shape of batches.

    Args:
        members: all of them.
    """

    reason = None

    def __init__(self, members: Sequence[Member]) -> None:
        self.members, self._rows = members, Rows()
        self._graphs: dict[Any, StackedGradients] = {}
        self._adams: dict[Any, AllAtOnce] = {}  # by the graph whose gradients they take

    def require(self, members: Sequence[Member]) -> None:
        """Build the graphs for the next step of some members.

        Raises:
            NotCompiled: they cannot be stacked.
        """
        for alike in _by_shape(members):
            if _shapes(alike[0]) not in self._graphs:
                started = time.perf_counter()
                try:
                    self._graphs[_shapes(alike[0])] = self._graph(self._batches(alike))
                except ValueError as error:  # of a member that has ended, and is run once more
                    raise NotCompiled(str(error)) from error
                for member in self.members:
                    member.svi.stack_seconds += time.perf_counter() - started

    def _graph(self, batches: Sequence[Batch]) -> StackedGradients:
        svis = [member.svi for member in self.members]
        for svi, batch in zip(svis, batches, strict=True):
            if not isinstance(svi.elbo, Estimator):
                raise NotCompiled(f"the loss is {type(svi.elbo).__name__} of Pyro")
            if svi.turns is not None:
                raise NotCompiled("something with a loss of its own stands beside the pair")
            _require_still(svi, batch)
        objectives = [svi.objective for svi in svis]
        return StackedGradients(objectives, batches, self._rows, bool(svis[0].compile))

    def _batches(self, members: Sequence[Member]) -> list[Batch]:
        """A batch of each; of those that take no step anybody's."""
        return [m.batch if m in members else members[0].batch for m in self.members]  # type: ignore[misc]

    def take(self, members: Sequence[Member]) -> None:
        """A step of each on its batch; the batches are of one shape."""
        key = _shapes(members[0])
        graph = self._graphs[key]
        streams = [member.stream for member in self.members]
        states, kept = [stream.state() for stream in streams], copies(graph.buffers)
        active = [i for i, member in enumerate(self.members) if member in members]
        generators = [stream.generator for stream in streams]
        losses, norms, gradients = graph(self._batches(members), generators, active)
        if len(active) == len(self.members) and self._update(key, losses, norms, gradients):
            for member, loss in zip(self.members, losses.unbind(), strict=True):
                member.loss = loss
                member.svi.num_steps += 1
            return
        self._adams.clear()
        for i, member in enumerate(self.members):
            buffers, values = [rows[i] for rows in graph.buffers], [rows[i] for rows in kept]
            before = Before(
                member.svi.trained,
                list(zip(buffers, values, strict=True)),
                None if member.svi.withholds else functools.partial(torch.set_rng_state, states[i]),
            )
            if i not in active:
                before.put_back()
                continue
            graph.give(gradients, i)
            norm = norms[i] if _are(member.svi.trained, graph.members[i].parameters) else None
            batch = member.batch
            assert batch is not None
            with member.alone():
                begun = Begun(before, losses[i], losses[i])
                member.loss = member.svi.end_step(begun, batch, {}, norm)
                member.svi.num_steps += 1

    def _update(self, key: Any, losses: Tensor, norms: Tensor, gradients: list[Tensor]) -> bool:
        """Update all members by one call, if that is what each would do; whether it was."""
        svis, graph = [member.svi for member in self.members], self._graphs[key]
        clip_norm = svis[0].clip_norm
        if not bool((losses + norms).isfinite().all()):
            return False
        if key not in self._adams:
            trained = zip(svis, graph.members, strict=True)
            if not all(_are(svi.trained, member.parameters) for svi, member in trained):
                return False
            if any(svi.clip_norm != clip_norm for svi in svis):
                return False
            optimizers = [svi.optimizer for svi in svis if svi.optimizer is not None]
            try:
                self._adams[key] = AllAtOnce(optimizers, graph.parameters, self._rows.of)
            except ValueError:
                return False
        if clip_norm is not None:
            scale = (clip_norm / (norms + 1e-6)).clamp(max=1.0)  # as torch's clip_grads_with_norm_
            for gradient in gradients:
                gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
        return self._adams[key].step(gradients)

    def close(self) -> None:
        """Let each member have parameters in memory of its own."""
        for member in self.members:
            member.svi.objective.zero_grad()
        self._rows.give_back()


def _are(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


def _shapes(member: Member) -> Any:
    assert member.batch is not None
    return tuple((tensor.shape, tensor.dtype) for tensor in member.batch)


def _by_shape(members: Sequence[Member]) -> list[list[Member]]:
    """Members whose batches are of one shape; a run that was resumed may be behind another."""
    found: dict[Any, list[Member]] = {}
    for member in members:
        found.setdefault(_shapes(member), []).append(member)
    return list(found.values())


def _require_still(svi: SVI, batch: Batch) -> None:
    """Raise ``NotCompiled`` for programs that change numbers of theirs, which a graph would not."""
    objective = svi.objective

    def numbers() -> dict[tuple[int, str], Any]:
        return {
            (i, name): value
            for i, part in enumerate(objective.modules())
            if part is not objective.state
            for name, value in vars(part).items()
            if isinstance(value, (int, float, str))
        }

    with unmoved(objective), seeded(0, *objective.parameters()), torch.no_grad():
        before = numbers()
        svi.evaluate_loss(*batch)
        changed = [name for (_, name), value in numbers().items() - before.items()]
    if changed:
        raise NotCompiled(
            f"a program changes its {changed[0]!r} from step to step, which a graph would keep; "
            "make it a tensor, changed in place"
        )


def _fall_in(members: Sequence[Member]) -> None:
    """Let members that were saved a checkpoint later than others go back, and all be in step.

    Up to rounding it would make no difference.
    """
    taken = [member.run.svi.num_steps for member in members if not member.run.is_over()]
    for member in members:
        run = member.run
        if run.files is not None and taken and run.svi.num_steps > min(taken):
            path = run.files.path(min(taken))
            if path.exists():
                with member.stream.current():
                    run.resume(path)


def _place(checkpoint: Any, seed: int) -> Any:
    """Where the checkpoints of one seed are."""
    if isinstance(checkpoint, Checkpoints):
        settings = {key: getattr(checkpoint, key) for key in ("every", "every_steps", "keep")}
        return Checkpoints(checkpoint.folder / f"seed-{seed}", **settings)
    is_path = isinstance(checkpoint, (str, os.PathLike)) and checkpoint != ""
    return Path(checkpoint) / f"seed-{seed}" if is_path else checkpoint


def _checked(seeds: Iterable[int], make: Any, stack: Any) -> list[int]:
    """The seeds, if these arguments mean something."""
    if not callable(make) or isinstance(make, (SVI, torch.nn.Module)):
        raise TypeError(f"make must be a function that builds a ppvae.SVI, got {make!r}")
    if not isinstance(stack, (bool, str)) or stack not in (True, False, "auto"):
        raise ValueError(f'stack must be True, False or "auto", got {stack!r}')
    if not isinstance(seeds, Iterable):
        raise TypeError(f"seeds takes whole numbers, such as range(8), got {seeds!r}")
    found = [number("seeds", seed, int) for seed in seeds]
    if not found or len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(f"seeds must be different whole numbers >= 0, got {found}")
    return found


def _require_apart(members: Sequence[Member]) -> None:
    """Refuse members that are one another's copies, or share what they train."""
    owner: dict[int, Member] = {}
    states: dict[bytes, Member] = {}
    for member in members:
        state = member.stream.generator.get_state().numpy().tobytes()
        if (other := states.setdefault(state, member)) is not member:
            raise ValueError(
                f"make sets a seed itself, so that the pairs of seeds {other.seed} and "
                f"{member.seed} are the same: leave torch.manual_seed out of it"
            )
        for name, parameter in member.svi.objective.named_parameters():
            other = owner.setdefault(id(parameter), member)
            if other is not member and parameter.requires_grad:
                raise ValueError(
                    f"the pairs of seeds {other.seed} and {member.seed} share the parameter "
                    f"{name!r}: build all that is trained inside make, or freeze it"
                )
