"""Checkpoints: files that a killed run goes on from, bit for bit."""

from __future__ import annotations

import io
import itertools
import math
import os
import pickle
import random
import re
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1  # raised when an older ppvae could not read what is written
MAGIC = "ppvae checkpoint"
_NAME = re.compile(r"step-(\d{8,})\.pt")
# What zipfile and torch.load raise for a damaged file; it depends on where the damage is.
_DAMAGE: tuple[type[Exception], ...] = (zipfile.BadZipFile, zlib.error, pickle.UnpicklingError)
_DAMAGE += (OSError, EOFError, RuntimeError, ValueError, LookupError)


class CheckpointError(RuntimeError):
    """A checkpoint cannot be read, or belongs to another run; the message says which and why."""


class Checkpoints:
    """The checkpoints of one run, in a folder of its own.

    ``step-00001200.pt`` is written after step 1200, ``best.pt`` whenever the validation bound was
    never better. A file is complete or absent, whenever the process or the machine dies: it is
    written beside its place, flushed to the disk, and only then renamed. Files hold tensors and
    numbers, no code: they are read with ``torch.load(weights_only=True)``, and a checksum tells
    whether they are whole.

    Args:
        folder: made if it is missing.
        every: write after so many epochs, >= 1; always after the last.
        every_steps: also write after each so many steps; None for ends of epochs only.
        keep: how many of the latest files stay, >= 1; ``best.pt`` always does.

    Raises:
        ValueError: a number below 1.

    Example:
        >>> import tempfile, torch
        >>> from ppvae import Checkpoints
        >>> folder = tempfile.TemporaryDirectory()
        >>> files = Checkpoints(folder.name, keep=2)
        >>> for step in (10, 20, 30):
        ...     _ = files.write({"theta": torch.ones(2)}, step)
        >>> [path.name for path in files.paths()]
        ['step-00000020.pt', 'step-00000030.pt']
        >>> files.load()["theta"]
        tensor([1., 1.])
        >>> folder.cleanup()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        every: int = 1,
        every_steps: int | None = None,
        keep: int = 2,
    ) -> None:
        if every < 1 or keep < 1 or (every_steps is not None and every_steps < 1):
            numbers = f"{every}, {every_steps} and {keep}"
            raise ValueError(f"every, every_steps and keep must be at least 1, got {numbers}")
        self.folder = Path(folder)
        self.every, self.every_steps, self.keep = every, every_steps, keep

    def paths(self) -> list[Path]:
        """The files by step, the latest last; without ``best.pt``."""
        found = (path for path in self.folder.glob("step-*.pt") if _NAME.fullmatch(path.name))
        return sorted(found, key=_number)

    @property
    def best(self) -> Path:
        """Where the state with the best validation bound is, if there was one."""
        return self.folder / "best.pt"

    def path(self, step: int) -> Path:
        """Where the state after a step is written."""
        return self.folder / f"step-{step:08d}.pt"

    def write(self, state: Mapping[str, Any], step: int, best: bool = False) -> Path:
        """Write a state; drop files beyond ``keep``.

        Args:
            state: tensors, numbers, strings and None, in dictionaries, lists and tuples.
            step: names the file.
            best: write ``best.pt`` too.

        Raises:
            TypeError: something else is in the state; nothing is written.
        """
        buffer = io.BytesIO()
        content = {"ppvae": MAGIC, "format": FORMAT, "step": step, "state": plain(state)}
        torch.save(content, buffer)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        for target in [path, self.best] if best else [path]:
            _replace(target, buffer.getbuffer())
        others = [other for other in self.paths() if other != path]
        for old in others[: max(0, len(others) + 1 - self.keep)]:
            old.unlink()
        return path

    def load(self, which: str | os.PathLike[str] = "latest") -> dict[str, Any]:
        """A state, its tensors on the CPU.

        Args:
            which: ``"latest"``, ``"best"`` or a path.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it is damaged, not a checkpoint, or of a newer ppvae. The message
                names the latest good one before it.

        Example:
            ``svi.load_state_dict(Checkpoints("runs/vae").load("best")["svi"])``
        """
        if which == "latest":
            paths = self.paths()
            if not paths:
                raise FileNotFoundError(f"no checkpoint in {self.folder}")
            path = paths[-1]
        else:
            path = self.best if which == "best" else Path(which)
        try:
            return read(path)
        except CheckpointError as error:
            for other in reversed([p for p in self.paths() if _number(p) < _number(path)]):
                try:
                    read(other)
                except CheckpointError:
                    continue
                raise CheckpointError(
                    f"{error}. The one before it is good: resume={str(other)!r}"
                ) from error
            raise

    def set_aside_after(self, step: int) -> None:
        """Rename files later than a step to ``.aside``: a run that goes on from there is now it.

        And drop what a killed process was writing.
        """
        later = [path for path in self.paths() if _number(path) > step]
        if self.best.exists() and _step(self.best) > step:
            later.append(self.best)
        for path in later:
            names = (path.with_suffix(f".pt.aside{n or ''}") for n in itertools.count())
            path.rename(next(name for name in names if not name.exists()))
        for unfinished in self.folder.glob(".*.unfinished"):
            unfinished.unlink()


def checkpoints_for(
    where: str | os.PathLike[str] | Checkpoints | None, resume: bool | str | os.PathLike[str]
) -> Checkpoints | None:
    """The folder that :func:`ppvae.fit` writes to and goes on from; None: it writes nothing.

    Raises:
        FileExistsError: another run is in it.
        ValueError: there is none to resume from.
    """
    if where is None:
        if resume:
            raise ValueError("resume needs the folder where checkpoints are: checkpoint='runs/vae'")
        return None
    files = where if isinstance(where, Checkpoints) else Checkpoints(where)
    present = files.paths() + ([files.best] if files.best.exists() else [])
    goes_on = resume if isinstance(resume, bool) else _is_in(Path(resume), files.folder)
    if present and not goes_on:
        raise FileExistsError(
            f"{files.folder} holds the checkpoints of a run ({present[-1].name}), and this one "
            "would replace them: go on with it by resume=True, or give checkpoint= another folder"
        )
    files.folder.mkdir(parents=True, exist_ok=True)  # if it fails, then before any training
    return files


def _is_in(path: Path, folder: Path) -> bool:
    return path.resolve().parent == folder.resolve()


def read(path: Path) -> dict[str, Any]:
    """The state in one file.

    Raises:
        FileNotFoundError: it is absent.
        CheckpointError: it is damaged, not a checkpoint, or of a newer ppvae.
    """
    return _content(path)["state"]


def _number(path: Path) -> float:
    """The step that a file is named after; any other name, ``best.pt`` too, is later than all."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else math.inf


def _step(path: Path) -> float:
    """The step of a file; a damaged one is later than any."""
    try:
        return float(_content(path)["step"])
    except CheckpointError:
        return math.inf


def _content(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # the checksums, which torch.load does not look at
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged or no checkpoint at all ({error})") from error
    if not isinstance(content, dict) or content.get("ppvae") != MAGIC:
        raise CheckpointError(f"{path} is not a checkpoint of ppvae.fit: load it by torch.load")
    if content["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, not {FORMAT}: update ppvae")
    return content


def plain(value: Any, where: str = "state") -> Any:
    """A copy made of what ``weights_only=True`` loads.

    Raises:
        TypeError: naming the place of what it would not.

    Example:
        >>> plain({"lr": np.float64(0.5), "names": ["a"]})
        {'lr': 0.5, 'names': ['a']}
    """
    if isinstance(value, Tensor):
        return value.detach()
    if value is None or isinstance(value, (bool, int, float, str)):
        return value.item() if isinstance(value, np.generic) else value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Counter):  # of a MultiStepLR
        return Counter(value)
    if isinstance(value, Mapping):
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)([plain(item, f"{where}[{i}]") for i, item in enumerate(value)])
    raise TypeError(
        f"{where} is {type(value).__name__}; save tensors, numbers, strings, None, lists and dicts"
    )


def rng_state() -> dict[str, Any]:
    """The state of every random stream of the process: torch (CPU, CUDA), numpy and Python."""
    # numpy's global stream, for code that still draws from it
    name, keys, position, has_gauss, gauss = np.random.get_state()  # noqa: NPY002
    version, words, python_gauss = random.getstate()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": [name, torch.from_numpy(np.asarray(keys, np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(words), python_gauss],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set every random stream as :func:`rng_state` saw it.

    Example:
        >>> saved = rng_state()
        >>> first = torch.rand(2), np.random.rand(), random.random()
        >>> set_rng_state(saved)
        >>> torch.equal(first[0], torch.rand(2)), first[1:] == (np.random.rand(), random.random())
        (True, True)
    """
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        for device, saved in zip(range(torch.cuda.device_count()), state["cuda"], strict=False):
            torch.cuda.set_rng_state(saved, device)
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))  # noqa: NPY002
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))


def _replace(target: Path, content: Any) -> None:
    """Put a file in its place at once, and on the disk."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, target)
    if os.name == "posix":  # the rename itself
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
