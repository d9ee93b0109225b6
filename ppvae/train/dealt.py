"""Seeds dealt to processes, each of which trains its own, and what all of them have trained."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ppvae.processes import Processes
from ppvae.train.histories import Histories
from ppvae.train.svi import SVI


def dealt(
    train: functools.partial[Histories],
    seeds: Sequence[int],
    make: Callable[[], SVI],
    processes: Processes,
    progress: bool,
) -> Histories:
    """The result of ``train`` for all seeds, in each process of a Fabric.

    Args:
        train: called with some of the seeds, ``device`` and ``progress``; all that it was given
            before that is a number or a word has to be the same in all processes.
        seeds: at least one for each process, which gets neighbours.
        make: builds an SVI, for the pairs that other processes have trained.
        processes: those of a launched Fabric, connected.
        progress: show the bar of the first process.

    Raises:
        ValueError: fewer seeds than processes; they were given different things.
    """
    given = {k: v for k, v in train.keywords.items() if isinstance(v, (int, str, type(None)))}
    processes.require_equal({"seeds": seeds, **given})
    if len(seeds) < processes.size:
        raise ValueError(
            f"seeds: {len(seeds)} for {processes.size} processes; give each one at least"
        )
    device, bar = processes.fabric.device, progress and processes.rank == 0
    own = train(seeds[processes.part(len(seeds))], device=device, progress=bar)
    states = [_on_cpu(svi.state_dict()) for svi in own.svis]
    each = processes.gather((_plain(own), states))
    svis = dict(zip(own.seeds, own.svis, strict=True))
    for runs, states in each:
        for seed, state in zip(runs.seeds, states, strict=True):
            if seed not in svis:
                svis[seed] = _made(make, seed, state, device)
    return Histories(
        list(seeds),
        [svis[seed] for seed in seeds],
        [history for runs, _ in each for history in runs.histories],
        {seed: error for runs, _ in each for seed, error in runs.errors.items()},
        next((runs.reason for runs, _ in each if runs.reason is not None), None),
    )


def _plain(runs: Histories) -> Histories:
    """Without the pairs, whose code need not be possible to pickle."""
    return Histories(runs.seeds, [], runs.histories, runs.errors, runs.reason)


def _made(make: Callable[[], SVI], seed: int, state: Any, device: torch.device) -> SVI:
    """An SVI as another process has trained it."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        svi = make()
    svi.objective.to(device)
    svi.load_state_dict(state)
    return svi


def _on_cpu(state: Any) -> Any:
    """A state with its tensors on the CPU: another process may not have this device."""
    if isinstance(state, Tensor):
        return state.cpu()
    if isinstance(state, dict):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(map(_on_cpu, state))
    return state
