"""What torchrun and SLURM do to a run: kill it, start it again, put it back into the queue."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ppvae import Checkpoints

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples" / "distributed.py"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
EPOCHS = "12"  # of 11 steps

# The example as it is, but rank 1 is killed once, in the fifth step of the fourth epoch.
KILLED = f"""
import functools, os, runpy, signal, sys
from pathlib import Path
import ppvae

class Kill(ppvae.Callback):
    def on_step_end(self, svi, loss):
        if svi.num_steps == 38 and os.environ["RANK"] == "1" and not Path("killed").exists():
            Path("killed").touch()
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


def test_torchrun_restarts_a_killed_worker_and_the_run_is_that_of_none_killed(tmp_path, whole):
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    restarts = [*TORCHRUN, "--max-restarts=3", "--nproc-per-node=2"]
    own_store = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # of each restart
    done = run([*restarts, script, "--epochs", EPOCHS, "--out", "run"], tmp_path, **own_store)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "killed").exists()
    assert "exitcode: -9" in done.stderr
    assert_same(whole, Checkpoints(tmp_path / "run").load())

    # as elastic torchrun does when a machine is gone and --nnodes=1:2 goes on without it
    done = run(
        [*TORCHRUN, "--nproc-per-node=1", EXAMPLE, "--epochs", "13", "--out", "run"], tmp_path
    )
    assert done.returncode != 0
    assert "processes: 2 then, 1 now" in done.stderr


def test_a_job_of_slurm_that_is_requeued_twice(tmp_path, whole):
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", page, re.DOTALL)
    (tmp_path / "job.sh").write_text(script, encoding="utf-8")
    (tmp_path / "bin").mkdir()
    stand_in = (ROOT / "tests" / "slurm.py").read_text(encoding="utf-8")
    commands = dict.fromkeys(("sbatch", "srun", "scontrol"), f"#!{sys.executable}\n{stand_in}")
    for name, text in {**commands, "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n'}.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = run(
        [tmp_path / "bin" / "sbatch", "job.sh", "--epochs", EPOCHS],
        tmp_path,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        SLURM_STAND_IN_FOLDER="runs/digits",
        SLURM_STAND_IN_STEPS="33 77",
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("interrupted: the same command goes on from here") == 2
    assert_same(whole, Checkpoints(tmp_path / "runs" / "digits").load())
