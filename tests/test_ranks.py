"""Processes that disagree, raise, die or freeze: the others end too, and say which rank it was."""

import functools
import os
import pickle
import signal
import time
from datetime import timedelta

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import ppvae
from ppvae import Checkpoints, conditionals, elbo, guides, models, nets
from ppvae import processes as module
from ppvae.processes import LostProcess, Processes

pytestmark = pytest.mark.forks
X = torch.bernoulli(torch.full((50, 4), 0.5), generator=torch.Generator().manual_seed(1))


def launch(function, *args, processes=2, timeout=30.0):
    """The values of a function on all ranks, in processes forked from this one."""
    waits = timedelta(seconds=timeout)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo", timeout=waits)
    fabric = Fabric(accelerator="cpu", devices=processes, strategy=strategy)
    return pickle.loads(fabric.launch(function, *args) or pickle.dumps(None))


def pair(hidden=8):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, hidden, 4)), latent_dim=2)
    return model, guides.Normal(nets.mlp(4, 8, 4))


def fit(fabric, data=X, svi=None, **options):
    svi = svi or ppvae.SVI(*pair())
    options = {"epochs": 2, "batch_size": 16, "progress": False, "fabric": fabric, **options}
    return ppvae.fit(svi, data, **options)


def said(call):
    """The class and the text of an error."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


class At(ppvae.Callback):
    """Does something at a step."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, svi, loss):
        if svi.num_steps == self.step:
            self.do()


def loader(rows, rank):
    sampler = DistributedSampler(X[:rows], 2, rank)
    return DataLoader(TensorDataset(X[:rows]), batch_size=5, sampler=sampler)


def frozen_layer():
    model, guide = pair()
    next(model.parameters()).requires_grad_(False)
    return ppvae.SVI(model, guide)


def disagreements(folder):
    """By what differs on rank 1: the options of a rank."""
    return {
        "seed": lambda rank: {"seed": 5 + rank},
        "data": lambda rank: {"data": X[: 50 - rank]},
        "data: ": lambda rank: {"data": 1 - X if rank else X},
        "batch_size": lambda rank: {"batch_size": 16 + rank},
        "epochs": lambda rank: {"epochs": 2 + rank},
        "valid": lambda rank: {"valid": X if rank else None},
        "checkpoint": lambda rank: {"checkpoint": None if rank else folder / "one"},
        "checkpoint: every=1": lambda rank: {
            "checkpoint": Checkpoints(folder / "two", every=1 + rank)
        },
        "lr_scheduler": lambda rank: {
            "lr_scheduler": (lambda o: torch.optim.lr_scheduler.StepLR(o, 1)) if rank else None
        },
        "loss": lambda rank: {"svi": ppvae.SVI(*pair(), loss=elbo.IWELBO(num_particles=2 + rank))},
        "optimiser": lambda rank: {
            "svi": ppvae.SVI(*pair(), [torch.optim.Adam, torch.optim.SGD][rank])
        },
        "likelihood.net.layers.0.weight": lambda rank: {"svi": ppvae.SVI(*pair(8 + rank))},
        "0.weight: (8, 2) torch.float32 on rank 0; (8, 2) torch.float32, frozen on rank 1": (
            lambda rank: {"svi": frozen_layer() if rank else None}
        ),
        "batches of data: 5 on rank 0; 4 on rank 1": lambda rank: {
            "data": loader(50 - 15 * rank, rank)
        },
    }


def disagree(fabric, folder):
    rank = fabric.global_rank
    found = {
        name: said(functools.partial(fit, fabric, **options(rank)))
        for name, options in disagreements(folder).items()
    }
    agreed = said(lambda: fit(fabric, seed=3, valid=X))  # none of it has left a trace
    return pickle.dumps(Processes(fabric).gather((found, agreed)))


def test_ranks_that_disagree_are_told_before_a_step_what_differs_and_where(tmp_path):
    first, second = launch(disagree, tmp_path)
    assert first == second  # on every rank
    found, agreed = first
    assert agreed == "no error"
    for name, message in found.items():
        assert message.startswith("ValueError: the processes would work on different things"), name
        assert name in message and "rank 0" in message and "rank 1" in message, message
    assert "seed: 5 on rank 0; 6 on rank 1" in found["seed"]


class Broken(Exception):
    pass


def breaks():
    raise Broken("the disk is on fire")


def one_raises(fabric, folder):
    rank, seen = fabric.global_rank, []
    own = [At(3, breaks)] if rank == 1 else []
    cases = [
        {"callbacks": own},  # in a step
        {"lr_scheduler": 3 if rank == 1 else None},  # a wrong argument
        {"data": X * float("nan") if rank == 1 else X},
        {"checkpoint": folder / "run", "resume": rank == 0},  # beside a run that is there
    ]
    fit(fabric, checkpoint=folder / "run")
    started = time.monotonic()
    for options in cases:
        seen.append(said(lambda options=options: fit(fabric, **options)))
    seen.append(said(lambda: fit(fabric)))  # who lives on can train again
    return pickle.dumps(Processes(fabric).gather((seen, time.monotonic() - started)))


def test_a_rank_that_raises_and_lives_on_ends_the_others_at_once(tmp_path):
    (others, waited), (own, _) = launch(one_raises, tmp_path)
    assert waited < 15  # far below the time-out of 30 seconds
    assert own[-1] == others[-1] == "no error"
    kinds = ["Broken", "TypeError", "PairError", "FileExistsError"]
    for kind, mine, theirs in zip(kinds, own, others, strict=False):
        assert mine.startswith(f"{kind}: ")
        assert theirs.startswith(f"LostProcess: rank 1 has ended the run: {kind}: "), theirs
    assert "the disk is on fire" in others[0]


def vanishes(fabric, folder, how, who):
    pids = Processes(fabric).gather(os.getpid())
    rank = fabric.global_rank
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of the launcher, when one dies
    own = [At(3, lambda: os.kill(os.getpid(), how))] if rank == who else []
    started = time.monotonic()
    word = said(lambda: fit(fabric, callbacks=own))
    (folder / f"{rank}.unfinished").write_text(f"{time.monotonic() - started} {word}")
    (folder / f"{rank}.unfinished").rename(folder / f"{rank}.txt")
    while len(list(folder.glob("*.txt"))) < len(pids) - 1:
        time.sleep(0.05)
    os.kill(pids[who], signal.SIGKILL)


@pytest.mark.parametrize(
    ("how", "who", "processes"),
    [
        (signal.SIGSTOP, 1, 2),
        pytest.param(signal.SIGSTOP, 0, 2, marks=pytest.mark.slow),  # it keeps the store
        pytest.param(signal.SIGSTOP, 1, 3, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 1, 2, marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, 2, 3, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_frozen_or_killed_is_named_within_the_time_out(
    tmp_path, monkeypatch, how, who, processes
):
    monkeypatch.setattr(module, "_GRACE", 2.0)
    with pytest.raises(Exception, match="terminated with signal SIGKILL"):
        launch(vanishes, tmp_path, how, who, processes=processes, timeout=2.0)
    found = {int(path.stem): path.read_text() for path in tmp_path.glob("*.txt")}
    assert set(found) == set(range(processes)) - {who}
    for text in found.values():
        seconds, _, word = text.partition(" ")
        # the time-out, and the grace in which the others may say that they are there
        assert float(seconds) < (12 if who == 0 else 7)
        assert word.startswith("LostProcess: "), word
        assert f"rank {who} does not answer" in word or (who == 0 and "store (0" in word), word


def test_one_process_asks_nobody():
    processes = Processes()
    with processes.connected():
        processes.wait()
        assert processes.gather(3) == [3]
    assert not issubclass(LostProcess, ValueError)  # whoever catches wrong arguments sees it
