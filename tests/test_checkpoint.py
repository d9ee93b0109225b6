"""Checkpoints: a run that was killed ends as if it had not been; nothing saved is ever lost."""

import copy
import enum
import errno
import functools
import io
import itertools
import os
import pathlib
import random
import signal
import threading
import time
import zipfile
from collections import Counter, namedtuple

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ppvae
from ppvae import CheckpointError, Checkpoints, conditionals, data, elbo, guides, models, nets
from ppvae.processes import Processes
from ppvae.train.checkpoint import digest, plain, read
from ppvae.train.sources import source

pytestmark = pytest.mark.forks

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
X = torch.bernoulli(torch.full((50, 4), 0.5), generator=torch.Generator().manual_seed(1))
GREY = torch.rand(50, 4, generator=torch.Generator().manual_seed(2))


def vae(loss=None, optim=ADAM, hidden=8, **options):
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, hidden, 4, **options)), latent_dim=2)
    return ppvae.SVI(model, guides.Normal(nets.mlp(4, hidden, 4, **options)), optim, loss)


def fit(svi, train=X, **options):
    options = {"epochs": 4, "batch_size": 16, "progress": False, **options}
    torch.manual_seed(3)
    return ppvae.fit(svi, train, **options)


def numbers(history):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


def leaves(state, where=""):
    """Every tensor and number of a state, by place."""
    if isinstance(state, dict):
        for key, value in state.items():
            yield from leaves(value, f"{where}/{key}")
    elif isinstance(state, (list, tuple)):
        for key, value in enumerate(state):
            yield from leaves(value, f"{where}/{key}")
    else:
        yield where, state


def assert_equal(a, b):
    a, b = dict(leaves(a)), dict(leaves(b))
    assert a.keys() == b.keys()
    for key, value in a.items():
        same = torch.equal(value, b[key]) if torch.is_tensor(value) else value == b[key]
        assert same, (key, value, b[key])


class Crash(Exception):
    pass


class CrashAt(ppvae.Callback):
    """Raises after some step, or at the end of an epoch before anything of it is saved."""

    def __init__(self, step=None, epoch=None):
        self.step, self.epoch = step, epoch

    def on_step_end(self, svi, loss):
        if svi.num_steps == self.step:
            raise Crash

    def on_epoch_end(self, svi, history):
        if svi.num_epochs == self.epoch:
            raise Crash


# -- exact resume ------------------------------------------------------------------------------


class Noisy(Dataset):
    """Rows with noise from all three random streams."""

    def __len__(self):
        return len(X)

    def __getitem__(self, i):
        flip = torch.rand(4) < 0.1
        flip[int(np.random.randint(4))] = True  # noqa: NPY002
        flip[random.randrange(4)] = True
        return (X[i] + flip.float()) % 2


def loader(**options):
    return DataLoader(TensorDataset(X), batch_size=16, **options)


def seeded_loader():
    return loader(shuffle=True, generator=torch.Generator().manual_seed(5))


SCENARIOS = {
    "plain": ({}, lambda: {}),
    "sgd": ({"optim": functools.partial(torch.optim.SGD, lr=1e-3, momentum=0.9)}, lambda: {}),
    "iwae": ({"loss": elbo.IWELBO(num_particles=3)}, lambda: {}),
    "warm-up": ({"loss": elbo.ELBO(beta=elbo.LinearWarmup(9))}, lambda: {"valid": X}),
    "constraint": ({"loss": elbo.ELBO(beta=elbo.Constraint(max_rate=0.1))}, lambda: {}),
    "batch norm, dropout": ({"batch_norm": True, "dropout": 0.3}, lambda: {"valid": X[:20]}),
    "patience": ({}, lambda: {"valid": X[:20], "patience": 1}),
    "step lr": (
        {},
        lambda: {"lr_scheduler": functools.partial(lr_scheduler.StepLR, step_size=1, gamma=0.5)},
    ),
    "multi-step lr": (
        {},
        lambda: {"lr_scheduler": functools.partial(lr_scheduler.MultiStepLR, milestones=[1, 2, 2])},
    ),
    "plateau": (
        {},
        lambda: {
            "valid": X[:20],
            "lr_scheduler": functools.partial(
                lr_scheduler.ReduceLROnPlateau, mode="max", threshold_mode="abs", patience=0
            ),
        },
    ),
    "one cycle": (
        {},
        lambda: {
            "lr_scheduler": functools.partial(lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=20)
        },
    ),
    "binarisation": ({}, lambda: {"train": data.Split(GREY, binarize="dynamic", seed=2)}),
    "streamed": (
        {},
        lambda: {"train": data.Split(GREY, binarize="dynamic", rows=torch.randperm(50))},
    ),
    "loader": ({}, lambda: {"train": loader(shuffle=True), "valid": loader(shuffle=True)}),
    "loader, generator": ({}, lambda: {"train": seeded_loader(), "valid": seeded_loader()}),
    "loader, worker": ({}, lambda: {"train": loader(shuffle=True, num_workers=1)}),
    "loader, transforms": ({}, lambda: {"train": DataLoader(Noisy(), 16, shuffle=True)}),
    "loader, transforms in workers": (
        {},
        lambda: {"train": DataLoader(Noisy(), 16, shuffle=True, num_workers=2)},
    ),
}


SLOWLY = pytest.mark.slow
SLOW = {"sgd", "iwae", "step lr", "one cycle", "plateau", "loader, generator", "loader, worker"}
SLOW |= {"loader, transforms in workers"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=SLOWLY) if n in SLOW else n for n in SCENARIOS]
)
def test_a_run_that_crashed_ends_as_if_it_had_not(name, tmp_path):
    pair, arguments = SCENARIOS[name]

    def run(folder, crash=None, **options):
        svi = vae(**pair)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        return svi, fit(svi, **arguments(), checkpoint=folder, callbacks=[crash], **options)

    whole, expected = run(Checkpoints(tmp_path / "whole", every_steps=1), CrashAt())
    steps = expected.rows[-1]["step"]
    crashed = Checkpoints(tmp_path / "crashed", every_steps=2, keep=1)
    # in the middle, after an epoch's last step, at its end, and after the first of the next
    for crash in (CrashAt(3), CrashAt(4), CrashAt(epoch=1), CrashAt(5), CrashAt(epoch=3)):
        if (crash.step or 4 * crash.epoch) <= steps:
            with pytest.raises(Crash):
                run(crashed, crash, resume=True)
    resumed, history = run(crashed, CrashAt(), resume=True)
    assert numbers(history) == numbers(expected)
    assert history.best_epoch == expected.best_epoch
    assert history.stopped_early == expected.stopped_early
    assert_equal(resumed.state_dict(), whole.state_dict())
    for name in ("scheduler", "processes"):  # the random streams among them
        assert_equal(crashed.load()[name], Checkpoints(tmp_path / "whole").load()[name])
    # and once it is over, another call only tells what was
    again, told = run(crashed, CrashAt(), resume=True)
    assert numbers(told) == numbers(expected)
    assert_equal(again.state_dict(), whole.state_dict())


@pytest.mark.slow
def test_a_compiled_run_that_crashed_ends_as_if_it_had_not(tmp_path):
    def compiled():
        svi = vae(loss=elbo.ELBO(beta=elbo.LinearWarmup(9)))
        return ppvae.SVI(svi.model, svi.guide, ADAM, svi.elbo, compile=True)

    options = {"callbacks": CrashAt(), "valid": X[:20]}
    whole = compiled()
    expected = fit(whole, **options)
    options |= {"checkpoint": Checkpoints(tmp_path, every_steps=1), "resume": True}
    for crash in (CrashAt(3), CrashAt(6)):
        with pytest.raises(Crash):
            fit(compiled(), **(options | {"callbacks": crash}))
    resumed = compiled()
    assert numbers(fit(resumed, **options)) == numbers(expected)
    assert_equal(resumed.state_dict(), whole.state_dict())


@pytest.mark.cuda
def test_a_run_on_cuda_that_crashed_ends_as_if_it_had_not(tmp_path):
    options = {"callbacks": CrashAt(), "valid": X[:20], "device": "cuda"}
    whole = vae(dropout=0.3, batch_norm=True)
    expected = fit(whole, **options)
    options |= {"checkpoint": Checkpoints(tmp_path, every_steps=1), "resume": True}
    with pytest.raises(Crash):
        fit(vae(dropout=0.3, batch_norm=True), **(options | {"callbacks": CrashAt(6)}))
    resumed = vae(dropout=0.3, batch_norm=True)
    assert numbers(fit(resumed, **options)) == numbers(expected)
    assert_equal(resumed.state_dict(), whole.state_dict())


def test_checkpoints_change_nothing(tmp_path):
    options = {"valid": X[:20], "patience": 2}
    plain_run, saved_run = vae(dropout=0.3), vae(dropout=0.3)
    expected = numbers(fit(plain_run, **options))
    checkpoint = Checkpoints(tmp_path, every_steps=1)
    assert numbers(fit(saved_run, **options, checkpoint=checkpoint)) == expected
    assert_equal(plain_run.state_dict(), saved_run.state_dict())


def test_a_finished_run_can_be_made_longer(tmp_path):
    expected, svi = vae(), vae()
    long = fit(expected, epochs=6)
    fit(svi, epochs=2, checkpoint=tmp_path)
    resumed = vae()
    assert numbers(fit(resumed, epochs=6, checkpoint=tmp_path, resume=True)) == numbers(long)
    assert_equal(resumed.state_dict(), expected.state_dict())


def test_patience_may_grow(tmp_path, monkeypatch):
    bounds = [-3.0, -4.0, -5.0, -2.0, -6.0, -7.0, -8.0]
    monkeypatch.setattr("ppvae.train.fit.mean_bound", lambda svi, *args: bounds[svi.num_epochs - 1])
    options = {"valid": X, "epochs": 7, "checkpoint": tmp_path, "resume": True}
    first = fit(vae(), patience=2, **options)
    assert (first.stopped_early, len(first.rows), first.best_epoch) == (True, 3, 1)
    second = fit(vae(), patience=3, **options)
    assert (second.stopped_early, len(second.rows), second.best_epoch) == (True, 7, 4)


def test_a_second_run_of_the_same_svi_has_its_own_epochs(tmp_path):
    svi = vae()
    fit(svi)
    history = fit(svi, checkpoint=tmp_path)
    assert history.column("epoch") == [5, 6, 7, 8]
    resumed = vae()
    again = fit(resumed, checkpoint=tmp_path, resume=True)
    assert numbers(again) == numbers(history)
    assert_equal(resumed.state_dict(), svi.state_dict())


def test_every_random_stream_goes_on(tmp_path):
    """Callbacks that draw, from whatever stream, draw on."""
    drawn = []

    class Draws(ppvae.Callback):
        def on_epoch_end(self, svi, history):
            streams = random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002
            drawn.append(streams)

    def run(epochs, seed, **options):
        random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        drawn.clear()
        fit(vae(), epochs=epochs, callbacks=[Draws()], **options)
        return list(drawn)

    whole = run(4, seed=7)
    first = run(2, seed=7, checkpoint=tmp_path)
    assert first + run(4, seed=8, checkpoint=tmp_path, resume=True) == whole


def test_a_callback_finds_its_state_again(tmp_path):
    class Counts(ppvae.Callback):
        count = 0

        def on_step_end(self, svi, loss):
            self.count += 1

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    with pytest.raises(Crash):
        fit(vae(), callbacks=[Counts(), CrashAt(epoch=3)], checkpoint=tmp_path)
    counts = Counts()
    fit(vae(), callbacks=[counts, CrashAt()], checkpoint=tmp_path, resume=True)
    assert counts.count == 16


def test_a_run_that_a_callback_stopped_is_over(tmp_path):
    def enough(svi, history):
        return len(history.rows) == 2

    expected = fit(vae(), checkpoint=tmp_path, on_epoch_end=enough)
    again = fit(vae(), checkpoint=tmp_path, on_epoch_end=enough, resume=True)
    assert len(expected.rows) == len(again.rows) == 2


# -- killed ------------------------------------------------------------------------------------


def killable(folder, result):
    """A run that can be killed and started again at any time; what it ends with goes to a file."""
    svi = vae(loss=elbo.ELBO(beta=elbo.LinearWarmup(9)), batch_norm=True, dropout=0.2)
    train = data.Split(GREY, binarize="dynamic", seed=2)
    files = Checkpoints(folder, every_steps=1, keep=2)
    decay = functools.partial(lr_scheduler.ExponentialLR, gamma=0.9)
    valid = data.Split(GREY[:20], binarize="static")
    history = fit(
        svi,
        train,
        valid=valid,
        epochs=6,
        patience=20,
        lr_scheduler=decay,
        checkpoint=files,
        resume=True,
    )
    unfinished = result.with_suffix(".unfinished")  # it may be killed here, too
    torch.save({"rows": numbers(history), "svi": plain(svi.state_dict())}, unfinished)
    unfinished.replace(result)


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory):
    """What a run that nobody kills ends with, and how long it takes."""
    folder = tmp_path_factory.mktemp("unkilled")
    started = time.perf_counter()
    killable(folder / "run", folder / "result.pt")
    expected = torch.load(folder / "result.pt") | {"best": best_of(folder / "run")}
    return expected, time.perf_counter() - started


def best_of(folder):
    """The state in best.pt, and its step."""
    state = Checkpoints(folder).load("best")
    return {"step": state["svi"]["num_steps"], "objective": state["svi"]["objective"]}


def in_child(function, *args):
    """Run a function in a fork of this process, which has imported all it needs."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


def everything_is_readable(folder):
    files = [*folder.glob("step-*.pt"), *folder.glob("best.pt")]
    for path in files:
        read(path)
    return len(files)


def outlives_kills(tmp_path, unkilled, kills, seed):
    expected, seconds = unkilled
    rng = random.Random(seed)
    folder, result, killed, unfinished = tmp_path / "run", tmp_path / "result.pt", 0, 0
    while not result.exists():
        pid = in_child(killable, folder, result)
        if killed < kills:
            # short lives, so that there are enough of them; longer where there was no progress
            time.sleep(rng.uniform(0.03, 0.05 + seconds / kills))
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        killed += os.WIFSIGNALED(status)
        unfinished += len(list(folder.glob(".*.unfinished")))
        everything_is_readable(folder)
    assert_equal(torch.load(result) | {"best": best_of(folder)}, expected)
    return killed, unfinished


def test_killed_at_random_moments(tmp_path, unkilled):
    killed, _ = outlives_kills(tmp_path, unkilled, kills=4, seed=0)
    assert killed >= 2


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path, unkilled):
    killed = unfinished = 0
    for seed in range(20):
        if killed >= 20 and unfinished >= 1:
            break
        folder = tmp_path / str(seed)
        folder.mkdir()
        counts = outlives_kills(folder, unkilled, kills=10, seed=seed)
        killed, unfinished = killed + counts[0], unfinished + counts[1]
    assert killed >= 20
    assert unfinished >= 1  # some died while a checkpoint was being written


@pytest.mark.parametrize(
    "call",
    ["write", "replace", *(pytest.param(c, marks=SLOWLY) for c in ("fsync", "folder", "unlink"))],
)
def test_killed_while_writing(call, tmp_path, unkilled):
    """Each moment of the ninth file: all files stay readable, the run ends as it would have."""
    folder, result = tmp_path / "run", tmp_path / "result.pt"

    def die(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(60)

    class Half(io.FileIO):
        def write(self, content):
            super().write(content[:1000])
            die()

    def run():
        files = itertools.count(1)
        replace = ppvae.train.checkpoint.replace_file

        def dying(target, content):
            if next(files) == 9:
                if call == "write":
                    ppvae.train.checkpoint.open = Half
                elif call == "unlink":  # in its place, and the old ones not yet dropped
                    replace(target, content)
                    die()
                elif call == "folder":
                    ppvae.train.checkpoint.os.open = die
                else:
                    setattr(ppvae.train.checkpoint.os, call, die)
            replace(target, content)

        ppvae.train.checkpoint.replace_file = dying
        killable(folder, result)

    status = os.waitpid(in_child(run), 0)[1]
    assert os.WIFSIGNALED(status)
    assert everything_is_readable(folder) >= 2
    assert os.waitpid(in_child(killable, folder, result), 0)[1] == 0
    assert_equal(torch.load(result) | {"best": best_of(folder)}, unkilled[0])
    assert not list(folder.glob(".*.unfinished"))


def killed_at(number, folder, result):
    """Run until just before the given one of all writes, flushes, renames and removals."""
    calls = itertools.count()

    def before(function):
        def call(*args, **kwargs):
            if next(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)
            return function(*args, **kwargs)

        return call

    class Dying(io.FileIO):
        write = before(io.FileIO.write)

    module = ppvae.train.checkpoint
    module.open = Dying
    for name in ("fsync", "replace"):
        setattr(module.os, name, before(getattr(os, name)))
    for name in ("unlink", "rename"):
        setattr(module.Path, name, before(getattr(module.Path, name)))
    killable(folder, result)


@pytest.mark.parametrize(
    "numbers",
    [range(25, 150, 25), pytest.param(range(400), marks=pytest.mark.slow)],
    ids=["some", "all"],
)
def test_a_kill_before_any_one_operation_heals_itself(numbers, tmp_path, unkilled):
    """And best.pt, at once, is what the latest file says is the best."""
    died = 0
    for number in numbers:
        folder, result = tmp_path / f"run{number}", tmp_path / f"result{number}.pt"
        killed = os.WIFSIGNALED(os.waitpid(in_child(killed_at, number, folder, result), 0)[1])
        if not killed:
            break
        died += 1
        everything_is_readable(folder)
        if paths := Checkpoints(folder).paths():
            latest = read(paths[-1])
            if best := latest["progress"]["history"]["best_epoch"]:
                assert best_of(folder)["step"] == 4 * best
        assert os.waitpid(in_child(killable, folder, result), 0)[1] == 0
        assert_equal(torch.load(result) | {"best": best_of(folder)}, unkilled[0])
    assert died >= 5


def test_a_damaged_best_is_healed_or_said(tmp_path, monkeypatch):
    bounds = {4: -5.0, 8: -3.0, 12: -2.0, 16: -4.0}
    monkeypatch.setattr("ppvae.train.fit.mean_bound", lambda svi, *args: bounds[svi.num_steps])
    fit(vae(), valid=X, epochs=3, checkpoint=tmp_path)  # the latest is the best
    files = Checkpoints(tmp_path)
    whole = files.best.read_bytes()
    files.best.write_bytes(whole[:-50])
    assert files.load("best")["svi"]["num_steps"] == 12 and files.best.read_bytes() == whole
    files.best.write_bytes(whole[:-50])
    fit(vae(), valid=X, checkpoint=tmp_path, resume=True)
    assert files.best.read_bytes() == whole
    files.best.write_bytes(whole[:-50])
    with pytest.warns(UserWarning, match=r"best\.pt is damaged.*now best\.pt\.aside"):
        fit(vae(), valid=X, epochs=4, checkpoint=tmp_path, resume=True)
    assert not files.best.exists() and (tmp_path / "best.pt.aside").exists()


# -- two runs, and what the system refuses -----------------------------------------------------


def test_a_second_run_in_the_folder_is_refused_with_the_name_of_the_first(tmp_path):
    class Second(ppvae.Callback):
        def on_step_end(self, svi, loss):
            if svi.num_steps == 2:
                other = vae()
                with pytest.raises(FileExistsError, match=f"by process {os.getpid()} on "):
                    fit(other, checkpoint=tmp_path, resume=True)
                assert other.num_steps == 0

    fit(vae(), checkpoint=tmp_path, callbacks=[Second()])
    fit(vae(), epochs=5, checkpoint=tmp_path, resume=True)  # it has let go
    pid = in_child(killed_at, 60, tmp_path / "killed", tmp_path / "result.pt")
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert (tmp_path / "killed" / ".run").exists()  # what it left behind keeps nobody out
    killable(tmp_path / "killed", tmp_path / "result.pt")


def test_a_full_disk_is_said_with_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    fit(vae(), epochs=2, checkpoint=tmp_path)
    before = {path.name: path.read_bytes() for path in Checkpoints(tmp_path).paths()}

    class Full(io.FileIO):
        def write(self, content):
            super().write(content[:100])
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ppvae.train.checkpoint, "open", Full, raising=False)
        with pytest.raises(OSError, match=r"No space left.*make room.*step-00000012\.pt"):
            fit(vae(), epochs=3, checkpoint=tmp_path, resume=True)
    assert {path.name: path.read_bytes() for path in Checkpoints(tmp_path).paths()} == before
    assert not list(tmp_path.glob(".*.unfinished"))
    fit(vae(), epochs=3, checkpoint=tmp_path, resume=True)


def test_a_folder_that_is_read_only_is_refused_before_a_step(tmp_path, monkeypatch):
    def denied(*args, **kwargs):  # as a folder does; root may write anywhere
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(pathlib.Path, "touch", denied)
    svi = vae()
    with pytest.raises(PermissionError, match="give checkpoint= another folder"):
        fit(svi, checkpoint=tmp_path)
    assert svi.num_steps == 0


# -- interrupted -------------------------------------------------------------------------------


class Signals(ppvae.Callback):
    """Sends a signal to this process after some step."""

    def __init__(self, step=None, number=signal.SIGINT, times=1):
        self.step, self.number, self.times = step, number, times

    def on_step_end(self, svi, loss):
        if svi.num_steps == self.step:
            for _ in range(self.times):
                signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", [6, 8])
def test_a_signal_ends_the_step_and_writes(step, number, tmp_path):
    expected = fit(vae(), callbacks=[Signals()])
    before = signal.getsignal(number)
    svi = vae()
    history = fit(svi, callbacks=[Signals(step, number)], checkpoint=tmp_path)
    assert history.interrupted
    assert svi.num_steps == step
    assert len(history.rows) == 1
    assert signal.getsignal(number) is before
    resumed = fit(svi, callbacks=[Signals()], checkpoint=tmp_path, resume=True)  # as in a notebook
    assert not resumed.interrupted
    assert numbers(resumed) == numbers(expected)


def test_a_signal_in_validation_ends_after_the_epoch(tmp_path, monkeypatch):
    bound = ppvae.train.fit.mean_bound

    def interrupted(svi, *args):
        if svi.num_epochs == 2:
            signal.raise_signal(signal.SIGINT)
        return bound(svi, *args)

    expected = fit(vae(), valid=X)
    monkeypatch.setattr("ppvae.train.fit.mean_bound", interrupted)
    history = fit(vae(), valid=X, checkpoint=tmp_path)
    assert (len(history.rows), history.interrupted) == (2, True)
    assert numbers(fit(vae(), valid=X, checkpoint=tmp_path, resume=True)) == numbers(expected)


def test_a_second_interrupt_raises_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit(vae(), callbacks=[Signals(6, times=2)], checkpoint=tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert len(Checkpoints(tmp_path).paths()) == 1  # that of the first epoch


def test_without_checkpoints_an_interrupt_raises():
    with pytest.raises(KeyboardInterrupt):
        fit(vae(), callbacks=[Signals(6)])


def test_in_another_thread_signals_are_left_alone(tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(fit(vae(), checkpoint=tmp_path)))
    thread.start()
    thread.join()
    assert len(done[0].rows) == 4


# -- files -------------------------------------------------------------------------------------


def test_the_latest_and_the_best_are_kept(tmp_path, monkeypatch):
    bounds = iter([-5.0, -3.0, -4.0, -6.0])
    monkeypatch.setattr("ppvae.train.fit.mean_bound", lambda *args: next(bounds))
    seen = []

    class Notes(ppvae.Callback):
        def on_checkpoint(self, svi, path):
            seen.append(path.name)
            assert path.exists()

    files = Checkpoints(tmp_path, keep=2)
    svi = vae()
    history = fit(svi, valid=X, checkpoint=files, callbacks=[Notes()])
    assert [path.name for path in files.paths()] == ["step-00000012.pt", "step-00000016.pt"]
    assert seen == [f"step-{step:08d}.pt" for step in (4, 8, 12, 16)]
    best = files.load("best")
    assert best["svi"]["num_steps"] == 8 == 4 * history.best_epoch
    other = vae()
    other.prepare(X)
    other.load_state_dict(best["svi"])
    assert other.num_steps == 8
    assert_equal(files.load()["svi"], plain(svi.state_dict()))


@pytest.mark.parametrize(("every", "steps"), [(1, 5), (3, 3), (9, 2)])
def test_every_so_many_epochs_and_after_the_last(every, steps, tmp_path):
    fit(vae(), epochs=5, checkpoint=Checkpoints(tmp_path, every=every, keep=9))
    found = [int(path.stem[5:]) for path in Checkpoints(tmp_path).paths()]
    assert found == [4 * e for e in range(1, 6) if e % every == 0 or e == 5][-steps:]


def test_every_so_many_steps_of_the_whole_run(tmp_path):
    """An epoch has 4 steps, so a count within it would write after steps 3, 7 and 11."""
    files = Checkpoints(tmp_path, every=9, every_steps=3, keep=9)
    fit(vae(), epochs=3, checkpoint=files)
    assert [int(path.stem[5:]) for path in files.paths()] == [3, 6, 9, 12]


def test_any_damage_is_noticed(tmp_path):
    path = Checkpoints(tmp_path).write({"a": torch.arange(500.0), "b": 1}, 7)
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        offsets = [info.header_offset for info in archive.infolist()]
        sizes = [info.file_size for info in archive.infolist()]
    assert len(good) > 2000
    for cut in (0, 1, 100, len(good) // 2, len(good) - 1):
        path.write_bytes(good[:cut])
        with pytest.raises(CheckpointError, match=r"step-00000007\.pt is damaged"):
            read(path)
    big = offsets[sizes.index(max(sizes))] + 500
    for place in (big, big + 700, big + 1400):
        bad = bytearray(good)
        bad[place] ^= 1
        path.write_bytes(bad)
        with pytest.raises(CheckpointError, match="wrong checksum"):
            read(path)


def test_numbers_that_are_not_what_was_written_are_noticed_by_the_digest(tmp_path):
    state = {"a": torch.arange(500.0), "b": [1, ("x", None)], "c": torch.tensor(True)}
    path = Checkpoints(tmp_path).write(state, 7)
    content = torch.load(path)
    for change in (
        lambda c: c["state"]["a"][17].add_(1e-3),
        lambda c: c["state"].update(a=c["state"]["a"].double()),
        lambda c: c["state"].update(a=c["state"]["a"].reshape(2, -1)),
        lambda c: c["state"].update(b=[1.0, ("x", None)]),
        lambda c: c["state"].update(b=[1, ["x", None]]),
        lambda c: c["state"].pop("c"),
        lambda c: c.update(step=8),
        lambda c: c.update(best=True),
        lambda c: c.pop("digest"),
    ):
        changed = copy.deepcopy(content)
        change(changed)
        torch.save(changed, path)
        with pytest.raises(CheckpointError, match=r"is damaged: its (content|digest)"):
            read(path)
    for name, wrong in itertools.product(("format", "step", "state"), (None, "1", [2.0])):
        torch.save(content | {name: wrong}, path)
        with pytest.raises(CheckpointError, match=rf"is damaged: its {name} is absent or"):
            read(path)
    for wrong in ({"best": torch.ones(2)}, {"format": True}, {"format": 0, "digest": None}):
        torch.save(content | wrong, path)
        with pytest.raises(CheckpointError, match=r"is damaged: its"):
            read(path)
    old = {k: v for k, v in content.items() if k not in ("digest", "best")} | {"format": 1}
    torch.save(old, path)  # before there was a digest
    assert torch.equal(read(path)["a"], state["a"])


@pytest.mark.parametrize("mask", [1, 128])
def test_damage_anywhere_is_noticed_or_harmless(mask, tmp_path):
    """In the names and offsets of the archive, too: never another error, never other data."""
    path = Checkpoints(tmp_path).write({"a": torch.arange(5.0), "b": [1, "x"]}, 7)
    good = path.read_bytes()
    refused = 0
    for place in range(0, len(good), 2):
        bad = bytearray(good)
        bad[place] ^= mask
        path.write_bytes(bad)
        try:
            state = read(path)
        except CheckpointError:
            refused += 1
        else:
            assert torch.equal(state["a"], torch.arange(5.0)) and state["b"] == [1, "x"]
    assert refused > 100


def test_foreign_and_newer_files(tmp_path):
    path = tmp_path / "step-00000001.pt"
    path.write_text("not a checkpoint")
    with pytest.raises(CheckpointError, match="no checkpoint at all"):
        read(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of ppvae\.fit"):
        read(path)
    torch.save(vae().model, path)  # code: weights_only refuses it
    with pytest.raises(CheckpointError, match="no checkpoint at all"):
        read(path)
    newer = ppvae.train.checkpoint.FORMAT + 1
    torch.save({"ppvae": ppvae.train.checkpoint.MAGIC, "format": newer, "state": {}}, path)
    with pytest.raises(CheckpointError, match=rf"has format {newer}, .* update ppvae"):
        read(path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*step-00000002\.pt"):
        read(tmp_path / "step-00000002.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint in"):
        Checkpoints(tmp_path / "empty").load()
    Checkpoints(tmp_path).write({"mine": 1}, 2)
    with pytest.raises(CheckpointError, match=r"not written by ppvae\.fit"):
        fit(vae(), checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("keep", range(1, 8))
def test_the_latest_files_are_kept_and_no_fewer(keep, tmp_path):
    files = Checkpoints(tmp_path, keep=keep)
    written = []
    for step in range(1, 12):
        written.append(files.write({}, step))
        assert files.paths() == written[-keep:]


def test_the_one_before_a_damaged_file_is_offered_and_taken(tmp_path):
    expected = fit(vae(), epochs=5)
    fit(vae(), checkpoint=Checkpoints(tmp_path, keep=4))
    _, good, middle, last = Checkpoints(tmp_path).paths()  # the latest good one, not the first
    for path in (middle, last):
        path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError) as caught:
        fit(vae(), epochs=5, checkpoint=tmp_path, resume=True)
    assert f"resume={str(good)!r}" in str(caught.value)
    assert "step-00000016.pt is damaged" in str(caught.value)
    history = fit(vae(), epochs=5, checkpoint=tmp_path, resume=str(good))
    assert numbers(history) == numbers(expected)
    names = {path.name for path in tmp_path.iterdir()}
    assert {f"{middle.name}.aside", f"{last.name}.aside"} <= names  # nothing is thrown away


def test_the_one_before_is_found_by_its_step(tmp_path, monkeypatch):
    """However the folder is written, and after more than 99,999,999 steps."""
    monkeypatch.chdir(tmp_path)
    files = Checkpoints("run", keep=9)
    written = [files.write({"a": step}, step) for step in (99_999_999, 100_000_000, 100_000_001)]
    assert files.paths() == written
    written[1].write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=r"before it is good: resume='run/step-99999999\.pt'"):
        files.load(tmp_path / written[1])
    files.set_aside_after(99_999_999)
    assert files.paths() == written[:1]


def test_going_back_sets_the_later_files_aside(tmp_path, monkeypatch):
    monkeypatch.setattr("ppvae.train.fit.mean_bound", lambda svi, *args: float(svi.num_steps))
    fit(vae(), valid=X, checkpoint=Checkpoints(tmp_path, keep=9))
    second = Checkpoints(tmp_path).paths()[1]
    before = Checkpoints(tmp_path).best.read_bytes()
    monkeypatch.chdir(tmp_path.parent)
    for _ in range(2):  # given as a relative path; twice, and the first .aside files stay
        history = fit(
            vae(),
            valid=X,
            checkpoint=Checkpoints(tmp_path, keep=9),
            resume=second.relative_to(tmp_path.parent),
        )
        assert len(history.rows) == 4
        assert [path.name[:13] for path in Checkpoints(tmp_path).paths()][-1] == "step-00000016"
    names = sorted(path.name for path in tmp_path.glob("*aside*"))
    assert [name for name in names if "best" in name] == ["best.pt.aside", "best.pt.aside1"]
    assert len(names) == 6
    assert (tmp_path / "best.pt.aside").read_bytes() == before


def test_what_cannot_be_saved_is_named(tmp_path):
    with pytest.raises(TypeError, match=r"state\['a'\]\[1\] is set"):
        Checkpoints(tmp_path).write({"a": [1, {2}]}, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_state_is_never_written(tmp_path):
    class Breaks(ppvae.Callback):
        def on_epoch_end(self, svi, history):
            if svi.num_epochs == 3:
                with torch.no_grad():
                    next(svi.model.parameters()).fill_(torch.nan)

    with pytest.raises(FloatingPointError, match="became NaN or infinite at step 12"):
        fit(vae(), callbacks=Breaks(), checkpoint=Checkpoints(tmp_path, keep=9))
    assert [p.name for p in Checkpoints(tmp_path).paths()] == [
        "step-00000004.pt",
        "step-00000008.pt",
    ]


def test_a_step_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path):
    class Breaks(ppvae.Callback):
        def on_step_end(self, svi, loss):
            if svi.num_steps == 9:
                with torch.no_grad():
                    next(svi.model.parameters()).fill_(torch.inf)

    with pytest.raises(FloatingPointError, match="step 10"):
        fit(vae(), callbacks=[Breaks()], checkpoint=tmp_path)
    assert Checkpoints(tmp_path).paths()[-1].name == "step-00000008.pt"
    everything_is_readable(tmp_path)


# -- refusals ----------------------------------------------------------------------------------


def test_a_folder_with_a_run_is_not_written_over(tmp_path):
    fit(vae(), checkpoint=tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    svi = vae()
    with pytest.raises(FileExistsError, match=r"holds the checkpoints of a run .*resume=True"):
        fit(svi, checkpoint=tmp_path)
    elsewhere = tmp_path / "other"
    fit(vae(), epochs=1, checkpoint=elsewhere)
    with pytest.raises(FileExistsError, match="holds the checkpoints of a run"):
        fit(svi, checkpoint=tmp_path, resume=Checkpoints(elsewhere).paths()[-1])
    assert svi.num_steps == 0
    assert {p: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_folder_that_cannot_be_is_refused_before_a_step(tmp_path):
    (tmp_path / "file").write_text("mine")
    svi = vae()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            fit(svi, checkpoint=folder)
    assert svi.num_steps == 0


def test_what_is_saved_has_no_gradient_and_keeps_its_counter():
    theta = torch.nn.Parameter(torch.ones(2))
    kept = plain({"leaf": theta, "product": 2 * theta, "milestones": Counter([3, 3, 5])})
    assert not kept["leaf"].requires_grad and not kept["product"].requires_grad
    assert torch.equal(kept["product"], torch.full((2,), 2.0))
    assert sorted(kept["milestones"].elements()) == [3, 3, 5]  # as MultiStepLR asks for them


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path):
    state = {"a": np.float64(0.5), "b": np.float32(0.25), "c": [np.int64(3)], "d": np.bool_(True),
             "e": np.str_("word"), "f": 2}  # fmt: skip
    files = Checkpoints(tmp_path)
    files.write(state, 1)
    assert files.load() == {"a": 0.5, "b": 0.25, "c": [3], "d": True, "e": "word", "f": 2}


class Phase(str, enum.Enum):
    WARM = "warm"


class Mine(torch.Tensor):
    pass


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({pathlib.PurePosixPath("x"): 1.0}, "has the key PurePosixPath"),
        ({Phase.WARM: 1.0}, "a Phase of"),
        ({(1, Phase.WARM): 1.0}, "a tuple of"),
        ({torch.float32: 1.0}, "a dtype of torch"),
        ({"phase": Phase.WARM}, r"\['phase'\] is Phase"),
        ({"deep": [{"level": signal.SIGINT}]}, r"\['deep'\]\[0\]\['level'\] is Signals"),
        ({"t": torch.ones(2).as_subclass(Mine)}, r"\['t'\] is Mine"),
        ({"pair": Pair(1, 2)}, r"\['pair'\] is Pair"),
        ({"set": {1}}, r"\['set'\] is set"),
        ({"array": np.ones(2)}, r"\['array'\] is ndarray, of numpy"),
        ({"s": torch.ones(2, 2).to_sparse()}, r"\['s'\] is a tensor without a dense block"),
        ({"m": torch.ones(2, device="meta")}, r"\['m'\] is a tensor without"),
    ],
)
def test_a_state_that_could_not_be_read_again_is_refused_before_a_step(state, named, tmp_path):
    class Keeps(ppvae.Callback):
        def state_dict(self):
            return state

    svi = vae()
    with pytest.raises(TypeError, match=rf"^Keeps\.state_dict\(\).*{named}"):
        fit(svi, checkpoint=tmp_path, callbacks=[Keeps()])
    assert svi.num_steps == 0
    with pytest.raises(TypeError, match=named):
        Checkpoints(tmp_path).write(state, 1)
    assert not Checkpoints(tmp_path).paths()


def test_what_is_saved_is_read_with_the_same_types(tmp_path):
    state = {
        "a": True, "b": 2**70, "c": 1 + 2j, "d": b"x", "e": None, "f": (1, [2.5, ()]),
        1: {2.5: {(1, "x"): "y"}}, "nan": float("inf"),
        "t": [torch.ones(2, dtype=torch.bfloat16), torch.ones((), dtype=torch.complex64),
              torch.ones(0, 3), torch.arange(6).reshape(2, 3).T, torch.tensor([True])],
    }  # fmt: skip
    Checkpoints(tmp_path).write(state, 1)
    found = Checkpoints(tmp_path).load()
    assert repr(found) == repr(state)


def two_groups(parameters):
    return torch.optim.Adam([{"params": parameters[:2]}, {"params": parameters[2:]}], lr=0.01)


def test_resume_starts_afresh_where_there_is_nothing(tmp_path):
    expected = numbers(fit(vae()))
    assert numbers(fit(vae(), checkpoint=tmp_path / "new" / "run", resume=True)) == expected


@pytest.mark.parametrize(
    ("pair", "options", "match"),
    [
        ({"hidden": 9}, {}, r"belongs to another model or guide; 6 of 8 .*\(8, 2\).* \(9, 2\)"),
        ({"batch_norm": True}, {}, "weight: .* then, absent now"),
        ({"loss": elbo.IWELBO(num_particles=2)}, {}, r'loss: "ELBO.*" then, "IWELBO.*" now'),
        ({"optim": torch.optim.Adam}, {}, "optimiser: 'Adam.lr=0.01.* then, 'Adam.lr=0.001"),
        ({"optim": two_groups}, {}, r"parameters in its groups: \[8\] then, \[2, 6\] now"),
        ({}, {"seed": 1}, "seed: 0 then, 1 now"),
        ({}, {"batch_size": 10}, "batch_size: 16 then, 10 now"),
        ({}, {"train": X[:40]}, r"data: '\(50, 4\).*' then, '\(40, 4\)"),
        ({}, {"train": 1 - X}, r"data: '\(50, 4\) float32, checksum"),
        ({}, {"valid": X}, "valid: 'none' then"),
        ({}, {"valid": X, "patience": 3}, "patience: 'none' then, 'some' now"),
        (
            {},
            {"lr_scheduler": functools.partial(lr_scheduler.StepLR, step_size=1)},
            "lr_scheduler: 'NoneType' then, 'StepLR' now",
        ),
    ],
)
def test_a_run_is_not_continued_by_another(pair, options, match, tmp_path):
    fit(vae(), checkpoint=tmp_path)
    svi = vae(**pair)
    before = [p.clone() for p in svi.objective.parameters()]
    with pytest.raises(CheckpointError, match=f"(?s){match}"):
        fit(svi, checkpoint=tmp_path, resume=True, **options)
    assert all(torch.equal(a, b) for a, b in zip(before, svi.objective.parameters(), strict=True))
    assert svi.num_steps == 0


def test_a_run_is_not_continued_with_other_validation_data(tmp_path):
    fit(vae(), valid=X[:20], checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=r"valid: '\(20, 4\).*' then, '\(20, 4\).*' now"):
        fit(vae(), valid=X[20:40], checkpoint=tmp_path, resume=True)


@pytest.mark.parametrize("rows", [3, 64, 500])
def test_a_fingerprint_is_of_every_tensor_from_end_to_end(rows):
    def facts(*tensors):
        return source("data", tensors, 16, None, Processes(), False).facts()

    x, y = torch.zeros(rows, 2), torch.zeros(rows, dtype=torch.long)
    found = {facts(x, y)}
    for row in (0, -1):
        other, label = x.clone(), y.clone()
        other[row, 1] = label[row] = 1
        found |= {facts(other, y), facts(x, label)}
    assert len(found) == 5
    assert facts(x.clone(), y.clone()) in found


def test_a_run_is_not_continued_with_another_clip_norm(tmp_path):
    for clip_norm in (1.0, 2.0):
        svi = vae()
        svi.clip_norm = clip_norm
        if clip_norm == 1.0:
            fit(svi, checkpoint=tmp_path)
        else:
            with pytest.raises(CheckpointError, match=r"clip_norm: 1\.0 then, 2\.0 now"):
                fit(svi, checkpoint=tmp_path, resume=True)


def test_a_loader_that_does_not_repeat_itself_is_refused(tmp_path):
    class Stream(IterableDataset):
        def __init__(self, start):
            self.start = start

        def __iter__(self):
            return iter(X[self.start :])

    options = {"checkpoint": Checkpoints(tmp_path, every_steps=1)}
    with pytest.raises(Crash):
        fit(vae(), DataLoader(Stream(0), 10), callbacks=[CrashAt(3)], **options)
    with pytest.raises(CheckpointError, match="does not yield the batches again"):
        fit(vae(), DataLoader(Stream(7), 10), callbacks=[CrashAt()], resume=True, **options)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"resume": True}, ValueError, "resume needs the folder"),
        ({"callbacks": [print]}, TypeError, r"ppvae\.Callback objects.*on_epoch_end"),
        ({"loggers": [print]}, TypeError, r"log_metrics\(metrics, step\)"),
    ],
)
def test_bad_arguments(options, error, match):
    with pytest.raises(error, match=match):
        fit(vae(), **options)


@pytest.mark.parametrize("options", [{"every": 0}, {"every_steps": 0}, {"keep": 0}])
def test_bad_arguments_of_checkpoints(options, tmp_path):
    with pytest.raises(ValueError, match="must be at least 1"):
        Checkpoints(tmp_path, **options)


@pytest.mark.parametrize(
    "place",
    [("progress", "history"), ("svi", "optimizer"), ("svi", "num_steps"), ("processes",),
     ("processes", 0, "random"), ("processes", 0, "count")],
)  # fmt: skip
def test_a_whole_file_without_a_part_of_the_run_holds_no_run(place, tmp_path):
    """Written by something else: the digest is right."""
    fit(vae(), checkpoint=tmp_path, epochs=1)
    path = Checkpoints(tmp_path).paths()[-1]
    content = torch.load(path)
    held = content["state"]
    for name in place[:-1]:
        held = held[name]
    held[place[-1]] = None
    del content["digest"]
    torch.save(content | {"digest": digest(content)}, path)
    with pytest.raises(CheckpointError, match=f"holds no run, for want of '{place[-1]}'"):
        fit(vae(), checkpoint=tmp_path, epochs=2, resume=True)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_states_that_hold_themselves_and_odd_tensors():
    circle = []
    circle.append(circle)
    for state in ({"a": circle}, {"a": torch.nested.nested_tensor([torch.ones(2)])}):
        with pytest.raises(TypeError, match=r"holds itself|without a dense block"):
            plain(state)
    for odd in (np.datetime64("2020-01-01"), np.zeros(1, "i4,i4")[0], np.timedelta64(3)):
        with pytest.raises(TypeError, match=r"state\['a'\] is"):
            plain({"a": odd})
    turned = torch.tensor([1 + 2j]).conj()
    assert plain({"a": turned})["a"].resolve_conj().tolist() == [1 - 2j]
    digest(plain({"a": turned}))


def test_what_stands_where_a_checkpoint_would_is_no_file(tmp_path):
    (tmp_path / "step-00000004.pt").mkdir()
    with pytest.raises(CheckpointError, match="is no file"):
        fit(vae(), checkpoint=tmp_path, epochs=1, resume=True)
    with pytest.raises(ValueError, match="null character"):
        Checkpoints("a\0b")
    with pytest.raises(OSError, match="no checkpoint can be written there"):
        fit(vae(), checkpoint=tmp_path / ("x" * 300), epochs=1)
