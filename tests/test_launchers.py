"""Runs that torchrun or a queue starts again, and their end: that of a run that nobody killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from ppvae import Checkpoints

ROOT = Path(__file__).parent.parent


def environment(**more):
    path = f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, **more}


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def require_same_end(folder, other):
    """Parameters, optimiser, what the estimator remembers and the history, to the bit."""
    ends = [Checkpoints(f).load() for f in (folder, other)]
    assert same(*(end["svi"] for end in ends))
    rows = [end["progress"]["history"]["rows"] for end in ends]
    one, two = ([{k: v for k, v in row.items() if k != "seconds"} for row in r] for r in rows)
    assert one == two
    streams = [[own["random"]["torch"] for own in end["processes"]] for end in ends]
    assert same(*streams)
    return one


# -- torchrun ----------------------------------------------------------------------------------

KILLED = """
import os, runpy, signal, sys
import ppvae

_, script, kill, *sys.argv[1:] = sys.argv
at = {("0", "1"): 17, ("1", "0"): 30}  # step by (life, rank); an epoch has eleven
step = at.get((os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]))


class Kill(ppvae.Callback):
    def on_step_end(self, svi, loss):
        if kill == "kill" and svi.num_steps == step:
            os.kill(os.getpid(), signal.SIGKILL)


def fit(svi, data, *, checkpoint, **options):
    files = ppvae.Checkpoints(checkpoint, every_steps=4)
    return original(svi, data, checkpoint=files, callbacks=Kill(), **options)


original, ppvae.fit = ppvae.fit, fit
runpy.run_path(script, run_name="__main__")
"""


@pytest.mark.slow
def test_workers_that_are_killed_are_started_again_and_come_to_the_same_end(tmp_path):
    """Rank 1 dies in the second epoch, then rank 0 in the third; the third life ends the run."""
    (tmp_path / "killed.py").write_text(KILLED)
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (variable,) = re.findall(r"^export (TORCH_\w+=1)\n(?=torchrun .*--max-restarts=3)", page, re.M)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=3"]
    run += ["--nproc-per-node=2", tmp_path / "killed.py", ROOT / "examples" / "distributed.py"]
    said = {}
    for kill in ("kill", "let live"):
        done = subprocess.run(
            [*run, kill, "--epochs", "4", "--out", tmp_path / kill],
            capture_output=True,
            text=True,
            timeout=300,
            env=environment(**dict([variable.split("=")])),
            check=False,
        )
        said[kill] = done.stderr
        assert done.returncode == 0, done.stderr[-2000:]
    assert said["kill"].count("failed (exitcode: -9)") == 2
    assert "failed" not in said["let live"]
    assert len(require_same_end(tmp_path / "kill", tmp_path / "let live")) == 4


# -- a queue -----------------------------------------------------------------------------------

SRUN = """#!{python}
import os, subprocess, sys
from pathlib import Path

said = os.environ
nodes, per_node = int(said["SLURM_NNODES"]), int(said["SLURM_NTASKS_PER_NODE"])
command = sys.argv[1:]
while command[0].startswith("-"):
    assert command.pop(0) == "--kill-on-bad-exit=0"
tasks = []
for rank in range(nodes * per_node):
    own = dict(SLURM_PROCID=rank, SLURM_LOCALID=rank % per_node, SLURM_NODEID=rank // per_node)
    own["SLURM_NTASKS"] = nodes * per_node
    env = {{**said, **{{name: str(value) for name, value in own.items()}}}}
    tasks.append(subprocess.Popen(command, env=env))
unfinished = Path(said["STEP"] + ".unfinished")
unfinished.write_text(" ".join(str(task.pid) for task in tasks))
unfinished.rename(said["STEP"])
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" != "requeue $SLURM_JOB_ID" ]; then exit 1; fi
touch "$REQUEUED"
kill $PPID  # SLURM ends the job that is to be queued again
"""
TASK = """#!/bin/bash
exec {python} "$@"
"""
KNOWN = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task"}
KNOWN |= {"time", "signal", "requeue", "open-mode"}


@pytest.fixture
def queue(tmp_path):
    """A folder to queue jobs in, with what stands in for SLURM on one machine; and the job."""
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n#SBATCH.*?)^```", page, re.M | re.S)
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "bin").mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "python": TASK}.items():
        (tmp_path / "bin" / name).write_text(text.format(python=sys.executable))
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def sbatch(queue, folder, signalled=None, **options):
    """Run the job, as often as it is queued again; its exit status and output in each life.

    Args:
        folder: where it runs.
        signalled: asked again and again in the first life; once it is true its time is up.
        options: of ``sbatch``, which go before those of the script.
    """
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", (queue / "job.sh").read_text(), re.M)
    options = dict(lines) | options
    assert set(options) <= KNOWN
    folder.mkdir()
    (folder / "examples").symlink_to(ROOT / "examples")
    requeued, step, lives = folder / "requeued", folder / "step", []
    while not lives or requeued.exists():
        requeued.unlink(missing_ok=True)
        step.unlink(missing_ok=True)
        env = environment(
            PATH=f"{queue / 'bin'}{os.pathsep}{os.environ['PATH']}",
            SLURM_JOB_ID=str(10_000 + os.getpid() % 10_000),  # the port follows from it
            SLURM_JOB_NAME=options["job-name"],
            SLURM_NNODES=options["nodes"],
            SLURM_NTASKS_PER_NODE=options["ntasks-per-node"],
            SLURM_NODELIST="localhost",
            STEP=str(step),
            REQUEUED=str(requeued),
        )
        if lives:
            env["SLURM_RESTART_COUNT"] = str(len(lives))
        with open(folder / "out", "w") as out:
            job = subprocess.Popen(
                ["bash", queue / "job.sh"], cwd=folder, env=env, stdout=out, stderr=out
            )
            if signalled is not None and not lives:
                name, _ = options["signal"].split("@")
                until = time.monotonic() + 120
                while not (step.exists() and signalled(folder)):
                    assert job.poll() is None and time.monotonic() < until
                    time.sleep(0.01)
                for task in step.read_text().split():
                    os.kill(int(task), getattr(signal, f"SIG{name}"))
            lives.append((job.wait(timeout=200), (folder / "out").read_text()))
    return lives


@pytest.mark.slow
def test_a_job_whose_time_is_up_is_queued_again_and_comes_to_the_same_end(queue):
    def has_begun(folder):
        return len(list(folder.glob("runs/vae/step-*.pt"))) > 0

    nodes = {"nodes": "2", "ntasks-per-node": "1"}
    (first, said), (last, _) = sbatch(queue, queue / "twice", has_begun, **nodes)
    assert said.count("interrupted: the same command goes on from here") == 1, said
    assert (first, last) == (-signal.SIGTERM, 0)
    ((status, said),) = sbatch(queue, queue / "once", **nodes)
    assert status == 0 and "interrupted" not in said
    rows = require_same_end(queue / "twice" / "runs" / "vae", queue / "once" / "runs" / "vae")
    assert len(rows) == 50


@pytest.mark.parametrize("status", [0, 1, 75, 137, 143])
def test_a_job_is_queued_again_only_where_a_signal_has_ended_it(queue, status):
    """The tasks stand in for those of the example: each ends with a status, later with 0."""
    (queue / "bin" / "python").write_text(
        f'#!/bin/bash\nif [ "$SLURM_PROCID$SLURM_RESTART_COUNT" = 1 ]; then exit {status}; fi\n'
    )
    lives = [life for life, _ in sbatch(queue, queue / "job", nodes="1")]
    assert lives == ([-signal.SIGTERM, 0] if status in (75, 143) else [status])
