"""A stand-in for SLURM on one machine: `sbatch`, `srun` and `scontrol requeue`, by the name it has.

`sbatch` reads the #SBATCH lines of a job script, and options before its name, and runs it. When
the time is up (here: when the newest checkpoint in the folder $SLURM_STAND_IN_FOLDER has the next
of the steps in $SLURM_STAND_IN_STEPS) it sends the signal of `--signal`: as SLURM does, to the
processes that srun started, or with `B:` to the batch shell alone. A job that was put back with
`scontrol requeue` ends at once, and runs again. `srun` sets in each task what Lightning Fabric
reads, and returns the largest exit status, 128 + its number for a signal.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

STATE = Path("slurm-stand-in")  # in the folder of the job: ids of its tasks, and `requeued`


def sbatch(*words):
    first = next(i for i, word in enumerate(words) if not word.startswith("--"))
    given, script, *arguments = words[:first], *words[first:]
    text = Path(script).read_text(encoding="utf-8")
    in_script = " ".join(re.findall(r"^#SBATCH\s+(.*)$", text, re.MULTILINE)).split()
    options = dict(word.removeprefix("--").partition("=")[::2] for word in [*in_script, *given])
    tasks, nodes = int(options["ntasks-per-node"]), int(options["nodes"])
    batch, name = re.fullmatch(r"(B:)?(\w+)@\d+", options["signal"]).groups()
    number = getattr(signal, f"SIG{name}")
    environment = {
        **os.environ,
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_JOB_NAME": "stand-in",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NNODES": str(nodes),
        "SLURM_NTASKS": str(tasks * nodes),
        "SLURM_NTASKS_PER_NODE": str(tasks),
    }
    ends = [int(step) for step in os.environ.get("SLURM_STAND_IN_STEPS", "").split()]
    folder = Path(os.environ.get("SLURM_STAND_IN_FOLDER", "."))
    STATE.mkdir(exist_ok=True)
    for restart in range(10):
        (STATE / "requeued").unlink(missing_ok=True)
        environment["SLURM_RESTART_COUNT"] = str(restart)
        job = subprocess.Popen(["bash", script, *arguments], env=environment)
        while ends and job.poll() is None:
            steps = [int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.pt")]
            if max(steps, default=0) >= ends[0]:
                del ends[0]
                ids = (STATE / "tasks").read_text(encoding="utf-8").split()
                for process in [job.pid] if batch else map(int, ids):
                    os.kill(process, number)
                break
            time.sleep(0.01)
        status = job.wait()
        if not (STATE / "requeued").exists():
            return status
        if "requeue" not in options:
            sys.exit("scontrol: the job may not be requeued")
    return 1


def srun(*command):
    while command[0].startswith("--"):  # options of srun
        command = command[1:]
    size = int(os.environ["SLURM_NTASKS"])
    tasks = []
    for rank in range(size):
        node, here = divmod(rank, int(os.environ["SLURM_NTASKS_PER_NODE"]))
        own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(here), "SLURM_NODEID": str(node)}
        tasks.append(subprocess.Popen(command, env={**os.environ, **own}))
    (STATE / "tasks").write_text(" ".join(str(task.pid) for task in tasks), encoding="utf-8")
    statuses = [task.wait() for task in tasks]
    return max(128 - status if status < 0 else status for status in statuses)


def scontrol(verb, job):
    assert (verb, job) == ("requeue", os.environ["SLURM_JOB_ID"])
    (STATE / "requeued").touch()
    os.kill(os.getppid(), signal.SIGTERM)  # nothing behind it in the script is reached
    return 0


if __name__ == "__main__":
    sys.exit(globals()[Path(sys.argv[0]).name](*sys.argv[1:]))
