"""Kill training runs at random moments, resume them, and compare with runs that nobody killed.

    python tests/attacks/kills.py --kills 1000

Each life of a run is a fork of this process, which has imported and compiled all it needs; SIGKILL
comes at a random moment, before, within and after the writing of checkpoints. After each kill every
file must be readable. A run that came to its end must have the history, the parameters, the
optimiser's state and the best file of the uninterrupted one, bit for bit. Exit status 1 if not.
"""

import argparse
import contextlib
import copy
import functools
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # its workers do not survive a fork

import torch
from lightning_fabric import Fabric
from torch.utils.data import DataLoader, IterableDataset

import ppvae
from ppvae import Checkpoints, conditionals, data, elbo, guides, models, nets, processes
from ppvae.train.checkpoint import plain, read

GREY = torch.rand(50, 6, generator=torch.Generator().manual_seed(1))
KINDS = ("eager", "compiled", "two ranks", "stream")
LIVES = 10  # kills of one run, then it may come to its end


class Stream(IterableDataset):
    """Rows without an end, the same ones each time it begins."""

    def __iter__(self):
        generator = torch.Generator().manual_seed(3)
        while True:
            yield torch.bernoulli(torch.full((6,), 0.5), generator=generator)


def build(kind):
    """A pair with batch norm, dropout and a warm-up, compiled or not."""
    torch.manual_seed(0)
    how = {} if kind == "compiled" else {"batch_norm": True, "dropout": 0.2}
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 16, 6, **how)), latent_dim=2)
    guide = guides.Normal(nets.mlp(6, 16, 4, **how))
    loss = elbo.ELBO(beta=elbo.LinearWarmup(9))
    adam = functools.partial(torch.optim.Adam, lr=1e-2)
    svi = ppvae.SVI(model, guide, adam, loss, compile=kind == "compiled")
    if kind == "compiled":  # once, in the parent: forks have the graph
        svi.prepare(GREY[:10].round())
        fresh = copy.deepcopy(svi.state_dict())
        ppvae.fit(
            svi, GREY.round(), epochs=1, batch_size=16, valid=GREY[:20].round(), progress=False
        )
        svi.load_state_dict(fresh)
    return svi


def run(kind, svi, folder, result, fabric=None):
    """What can be killed and started again at any time; its end goes to a file."""
    torch.manual_seed(7)
    options = {"epochs": 6, "batch_size": 16, "patience": 20, "progress": False, "resume": True}
    options["lr_scheduler"] = functools.partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.9)
    train, valid = (
        data.Split(GREY, binarize="dynamic", seed=2),
        data.Split(GREY[:20], binarize="static"),
    )
    if kind == "stream":
        train, options["steps_per_epoch"] = DataLoader(Stream(), batch_size=16), 4
    if kind == "compiled":
        train, valid = GREY.round(), GREY[:20].round()
    files = Checkpoints(folder, every_steps=1, keep=2)
    history = ppvae.fit(svi, train, valid=valid, checkpoint=files, fabric=fabric, **options)
    if fabric is None or fabric.global_rank == 0:
        rows = [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]
        unfinished = result.with_suffix(".unfinished")
        torch.save({"rows": rows, "svi": plain(svi.state_dict())}, unfinished)
        unfinished.replace(result)


def live(kind, svi, folder, result):
    """One life, in a fork with a process group of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        said = os.open(result.with_suffix(".said"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(said, 1), os.dup2(said, 2)
        if kind == "two ranks":
            fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork")
            fabric.launch(lambda fabric: run(kind, build(kind), folder, result, fabric))
        else:
            run(kind, svi, folder, result)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def children(pid):
    with contextlib.suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


def kill(rng, pid):
    """Everything at once, as a power cut does; of two ranks sometimes one of them only."""
    ranks = children(pid)
    if len(ranks) == 2 and rng.random() < 0.5:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rng.choice(ranks), signal.SIGKILL)
    else:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)


def wait(pid):
    """How a life ended: 0, what it failed with, or minus the signal that killed it.

    What is left of its group, two ranks may be, goes with it.
    """
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)
    return status


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def ended(folder, result):
    """What a run ended with: of best.pt the step and the parameters."""
    best = Checkpoints(folder).load("best")["svi"]
    state = {"step": best["num_steps"], "objective": best["objective"]}
    return torch.load(result, weights_only=True) | {"best": state}


def attack(kind, kills, rng, where):
    """Kill so many times: numbers of kills, finished runs, equal ones and unreadable files."""
    svi = build(kind)
    started = time.perf_counter()
    if wait(live(kind, svi, where / "whole", where / "whole.pt")):
        raise RuntimeError((where / "whole.said").read_text())
    seconds, expected = time.perf_counter() - started, ended(where / "whole", where / "whole.pt")
    count = {"kills": 0, "finished": 0, "equal": 0, "unreadable": 0}
    number = 0
    while count["kills"] < kills:
        number += 1
        folder, result, lives = where / f"run{number}", where / f"run{number}.pt", 0
        while not result.exists():
            pid = live(kind, svi, folder, result)
            is_killed = lives < LIVES
            if is_killed:
                time.sleep(rng.uniform(0.02, 0.3 * seconds))
                kill(rng, pid)
            status = wait(pid)
            lives += 1
            count["kills"] += is_killed and status != 0
            # a rank whose other rank was killed raises; nobody else may
            if status > 0 and (kind != "two ranks" or lives > 2 * LIVES):
                said = result.with_suffix(".said").read_text(errors="replace")
                raise RuntimeError(f"{kind}: a life of run {number} failed:\n{said}")
            for path in [*folder.glob("step-*.pt"), *folder.glob("best.pt")]:
                try:
                    read(path)
                except Exception as error:
                    count["unreadable"] += 1
                    print(f"{kind}: {path.name} after kill {count['kills']}: {error}", flush=True)
        count["finished"] += 1
        equal = same(ended(folder, result), expected)
        count["equal"] += equal
        if not equal:
            print(f"{kind}: run {number} ended differently", flush=True)
    return count


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="over all kinds together")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(arguments)
    torch.set_num_threads(1)
    processes._GRACE = 0.5  # of two ranks one is often gone
    total = {}
    for kind in asked.kinds:
        with tempfile.TemporaryDirectory() as where:
            share = -(-asked.kills // len(asked.kinds))
            found = attack(kind, share, random.Random(f"{asked.seed} {kind}"), Path(where))
        print(f"{kind}: {found}", flush=True)
        total = {name: total.get(name, 0) + number for name, number in found.items()}
    print(
        f"{total['kills']:,} kills with {total['finished']:,} finished runs, {total['equal']:,} of "
        f"them bit-identical; {total['unreadable']} unreadable files"
    )
    return 0 if total["finished"] == total["equal"] and not total["unreadable"] else 1


if __name__ == "__main__":
    sys.exit(main())
