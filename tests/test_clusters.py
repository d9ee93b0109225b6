"""What torchrun and SLURM do to a run: kill it, start it again, put it back into the queue."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppvae import Checkpoints

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "distributed.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
EPOCHS = "12"  # of 11 steps

# The example as it is, but rank 1 is killed in the fifth step of the fourth epoch, and, in the life
# after that, rank 0 in the fourth of the seventh.
KILLED = f"""
import functools, os, runpy, signal
import ppvae

class Kill(ppvae.Callback):
    life = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    step = {{("0", "1"): 38, ("1", "0"): 70}}.get(life)
    def on_step_end(self, svi, loss):
        if svi.num_steps == self.step:
            os.kill(os.getpid(), signal.SIGKILL)

ppvae.fit = functools.partial(ppvae.fit, callbacks=Kill())
runpy.run_path({str(EXAMPLE)!r}, run_name="__main__")
"""


def run(command, folder, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment,
        check=False,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run of two processes saves that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole")
    done = run(
        [*TORCHRUN, "--nproc-per-node=2", EXAMPLE, "--epochs", EPOCHS, "--out", "run"], folder
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return Checkpoints(folder / "run").load()


def assert_same(one, other):
    """The same in two checkpoints, but for seconds and the streams that the example never seeds."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            if "seconds" not in str(key) and key not in ("numpy", "python"):
                assert_same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            assert_same(mine, theirs)
    elif torch.is_tensor(one):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_run_is_that_of_none_killed(tmp_path, whole):
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    restarts = [*TORCHRUN, "--max-restarts=3", "--nproc-per-node=2"]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # of each restart
    done = run([*restarts, script, "--epochs", EPOCHS, "--out", "run"], tmp_path, **own_store)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("exitcode: -9") == 2
    assert_same(whole, Checkpoints(tmp_path / "run").load())

    # as elastic torchrun does when a machine is gone and --nnodes=1:2 goes on without it
    done = run(
        [*TORCHRUN, "--nproc-per-node=1", EXAMPLE, "--epochs", "13", "--out", "run"], tmp_path
    )
    assert done.returncode != 0
    assert "processes: 2 then, 1 now" in done.stderr


@pytest.fixture
def queue(tmp_path):
    """Queue the job of the page, with a stand-in for SLURM; what becomes of it."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)
    (tmp_path / "job.sh").write_text(script, encoding="utf-8")
    (tmp_path / "bin").mkdir()
    stand_in = (ROOT / "tests" / "slurm.py").read_text(encoding="utf-8")
    commands = dict.fromkeys(("sbatch", "srun", "scontrol"), f"#!{sys.executable}\n{stand_in}")

    def sbatch(*words, task=f'exec {sys.executable} "$@"', **environment):
        for name, text in {**commands, "python": f"#!/bin/bash\n{task}\n"}.items():
            (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
            (tmp_path / "bin" / name).chmod(0o755)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        return run([tmp_path / "bin" / "sbatch", *words], tmp_path, PATH=path, **environment)

    (tmp_path / "examples").symlink_to(ROOT / "examples")
    return sbatch


@pytest.mark.slow
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_job_of_slurm_that_is_requeued_twice(tmp_path, whole, queue, nodes):
    done = queue(
        *(f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", "job.sh", "--epochs", EPOCHS),
        SLURM_STAND_IN_FOLDER="runs/digits",
        SLURM_STAND_IN_STEPS="33 77",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("interrupted: the same command goes on from here") == 2
    assert_same(whole, Checkpoints(tmp_path / "runs" / "digits").load())


@pytest.mark.parametrize(
    ("end", "status", "lives"),
    [
        ("exit 0", 0, 1),
        ("exit 1", 1, 1),
        ("exit 75", 0, 2),  # fit was interrupted
        ("kill -TERM $$", 0, 2),  # the signal came outside of fit
        ("kill -KILL $$", 137, 1),
    ],
)
def test_a_job_is_requeued_where_a_signal_has_ended_it(queue, end, status, lives):
    """Of two tasks that stand in for Python one ends so, in the job's first life."""
    task = f'echo began; if [ "$SLURM_PROCID $SLURM_RESTART_COUNT" = "1 0" ]; then {end}; fi'
    done = queue("job.sh", task=task)
    assert (done.returncode, done.stdout.count("began")) == (status, 2 * lives)
