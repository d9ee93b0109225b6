"""Break the package line by line, and see which of the tests notice: `make faults`.

The lists beside this file hold one-line faults, a block each:

    ppvae/elbo/chi.py: tests/test_estimators.py
    # mean over the wrong axis
    -        return log_w.mean(0)
    +        return log_w.mean(1)

The head names the file and what pytest is called with; the next faults of that file may leave it
out. Each fault is put into a copy of the repository and the tests are run until one fails. A fault
whose old lines do not stand in the file exactly once is stale: write it anew, or take it out.
A line ``! why`` instead of ``# what`` marks one that no test sees.
"""

from __future__ import annotations

import argparse
import collections
import importlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

LISTS = Path(__file__).parent


class Fault(NamedTuple):
    """One broken line."""

    area: str  # the list it is in
    place: str  # the line of the list
    file: str
    tests: tuple[str, ...]
    what: str
    old: str
    new: str
    survives: bool  # known to be seen by no test


def read(path: Path) -> list[Fault]:
    """The faults of one list."""
    faults, file, tests = [], "", ()
    blocks = collections.defaultdict(list)
    start = None
    for number, line in enumerate(path.read_text().splitlines(), 1):
        start = None if not line.strip() else start or number
        if start is not None:
            blocks[start].append(line)
    for number, lines in blocks.items():
        place, what, old, new, survives = f"{path.name}:{number}", [], [], [], False
        for line in lines:
            if line.startswith("-"):
                old.append(line[1:])
            elif line.startswith("+"):
                new.append(line[1:])
            elif line.startswith(("#", "!")):
                survives = survives or line[0] == "!"
                what.append(line[1:].strip())
            else:
                file, _, rest = line.partition(":")
                tests = tuple(rest.split())
        if old == new or not old or not tests:
            raise SystemExit(f"{place}: a fault needs a head, and lines that differ, got {lines}")
        text = [f"{line}\n" for line in old], [f"{line}\n" for line in new]
        both = "".join(text[0]), "".join(text[1])
        faults.append(Fault(path.stem, place, file, tests, " ".join(what), *both, survives))
    return faults


def broken(fault: Fault, root: Path) -> str | None:
    """The file with the fault in it; None: it is stale."""
    path = root / fault.file
    text = "\n" + path.read_text() if path.exists() else ""  # so that every line begins alike
    if text.count("\n" + fault.old) != 1:
        return None
    text = text.replace("\n" + fault.old, "\n" + fault.new)[1:]
    compile(text, fault.place, "exec")  # a fault that is no Python would always be seen
    return text


def copy(root: Path, target: Path) -> None:
    """What git knows of, as it is in the working tree."""
    wanted = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others"]
    names = subprocess.run([*wanted, "--exclude-standard"], capture_output=True, check=True).stdout
    for name in names.decode().split("\0"):
        if name and (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)


def run(tests: tuple[str, ...], root: Path, minutes: float) -> tuple[str, str]:
    """Whether the tests fail, ``"seen"``, and the first that does."""
    asked = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=no"]
    asked += ["-m", "not slow and not cuda", *tests]
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()  # of a process that has imported what takes long
        if child == 0:
            code = 9
            try:
                os.setsid()
                os.chdir(root)
                os.dup2(output.fileno(), 1)
                os.dup2(output.fileno(), 2)
                sys.stdout = sys.stderr = os.fdopen(1, "w", closefd=False)
                import pytest

                code = int(pytest.main(asked))
            finally:
                sys.stdout.flush()
                os._exit(code)
        end, status = time.monotonic() + 60 * minutes, None
        while status is None and time.monotonic() < end:
            done, found = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(found) if done else None
            time.sleep(0.05)
        if status is None:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "seen", f"not done in {minutes:g} minutes"
        output.seek(0)
        lines = output.read().splitlines()
    if status == 0:
        return "not seen", ""
    first = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if status < 0 or (status in (1, 2) and first):  # 2: the tests cannot even be imported
        return "seen", first[0] if first else f"signal {-status}"
    raise SystemExit(f"pytest ended with {status}:\n" + "\n".join(lines[-20:]))


def prepare(root: Path) -> None:
    """Import what every test imports, but for the package, and let children find the copy."""
    os.environ["PYTHONPATH"] = str(root)
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(root))
    for name in ("torch", "pyro", "pyro.infer.autoguide", "sklearn.mixture"):
        importlib.import_module(name)
    sys.modules["torch"].set_num_threads(1)  # a fork has no threads but its own


def main(arguments: list[str] | None = None) -> int:
    """Run the faults that are asked for; 1 if one is stale, or not seen and not marked so."""
    about, _, _ = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("words", nargs="*", help="only faults with one of them in list, file, text")
    parser.add_argument("--lists", type=Path, default=LISTS, help="the folder of the lists")
    parser.add_argument("--root", type=Path, default=LISTS.parents[1], help="the repository")
    parser.add_argument("--check", action="store_true", help="only look for stale ones")
    parser.add_argument("--minutes", type=float, default=10.0, help="of each, at most")
    options = parser.parse_args(arguments)

    faults = [fault for path in sorted(options.lists.glob("*.txt")) for fault in read(path)]
    if options.words:
        faults = [f for f in faults if any(word in " ".join(map(str, f)) for word in options.words)]
    stale = [fault for fault in faults if broken(fault, options.root) is None]
    for fault in stale:
        print(f"stale     {fault.place}: {fault.file} has not once: {fault.old.strip()}")
    if options.check or not faults:
        print(f"{len(faults)} faults, {len(stale)} stale")
        return int(bool(stale) or not faults)

    counts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    wrong, failed = bool(stale), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy(options.root, root)
        prepare(root)
        for fault in faults:
            text = broken(fault, root)
            if text is None:
                counts[fault.area]["stale"] += 1
                continue
            path, begun = root / fault.file, time.monotonic()
            whole = path.read_text()
            try:
                path.write_text(text)
                result, first = run(fault.tests, root, options.minutes)
            finally:
                path.write_text(whole)
            counts[fault.area][result] += 1
            failed += [first.split(" ", 1)[1].split(" - ")[0]] if "::" in first else []
            wrong = wrong or (result != "seen" and not fault.survives)
            note = " (listed as not seen)" if fault.survives else ""
            seconds = time.monotonic() - begun
            print(f"{result:9} {fault.place}: {fault.file}: {fault.what}{note}", end=" ")
            print(f"[{seconds:.0f} s] {first}", flush=True)
        if failed:
            result, first = run(tuple(dict.fromkeys(failed)), root, 60.0)
            if result == "seen":
                print(f"without a fault: {first}, so what it saw counts for nothing")
                wrong = True
    total: collections.Counter[str] = sum(counts.values(), collections.Counter())
    for area, found in [*counts.items(), ("all", total)]:
        run_at_all = found["seen"] + found["not seen"]
        share = f"{found['seen'] / run_at_all:4.0%}" if run_at_all else "   -"
        rest = f", {found['stale']} stale" if found["stale"] else ""
        print(f"{area:14} {found['seen']:4} of {run_at_all:4} seen {share}{rest}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
