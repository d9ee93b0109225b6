"""Checkpoints: files that a killed run goes on from, bit for bit."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import os
import pickle
import random
import re
import socket
import warnings
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from torch import Tensor, nn

from ppvae.arguments import takes_numbers

FORMAT = 2  # raised when an older ppvae could not read what is written; 1 had no digest
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
    numbers, no code: they are read with ``torch.load(weights_only=True)``, and a digest of all that
    is in them tells whether they are whole. One run at a time writes to a folder.

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

    @takes_numbers
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
        if not isinstance(folder, (str, os.PathLike)):
            raise TypeError(f"folder must be a path, got {folder!r}")
        if not os.fspath(folder):
            raise ValueError("folder is empty, and would be where the program was started")
        if "\0" in str(folder):
            raise ValueError(f"folder has a null character, which no path has: {folder!r}")
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
            OSError: the disk is full, or the folder cannot be written to.
        """
        buffer = io.BytesIO()
        content = {"ppvae": MAGIC, "format": FORMAT, "step": step, "best": best}
        content["state"] = plain(state)
        torch.save({**content, "digest": digest(content)}, buffer)
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.path(step)
        # if the process dies between the two, the first says that it is the best
        for target in [path, self.best] if best else [path]:
            replace_file(target, buffer.getbuffer())
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

        Of a run that was killed before it had written ``best.pt``, that is written now.

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
        if path == self.best:
            self._complete_best()
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

        And drop what a killed process was writing, or write what it had no time to.
        """
        for path in [path for path in self.paths() if _number(path) > step]:
            _set_aside(path)
        damage = None
        if self.best.exists():
            try:
                if _content(self.best)["step"] > step:
                    _set_aside(self.best)
            except CheckpointError as error:
                damage = error
        self._complete_best()
        if damage is not None and not _is_whole(self.best):
            where = _set_aside(self.best)
            warnings.warn(
                f"{damage}. It is now {where.name}, and best.pt will be written at the next epoch "
                "that is better than all before",
                stacklevel=2,
            )
        for unfinished in self.folder.glob(".*.unfinished"):
            unfinished.unlink()

    def _complete_best(self) -> None:
        """Write ``best.pt`` where the latest file says that it is the best, and it is another."""
        for path in self.paths()[-1:]:
            try:
                latest = _content(path)
            except CheckpointError:
                return
            if latest["best"] and not _is_whole(self.best, latest["step"]):
                replace_file(self.best, path.read_bytes())

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out of the folder; the system lets go of it when the process dies.

        Raises:
            FileExistsError: another process has it; the message says which.
        """
        about = self.folder / ".run"
        lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        try:
            with _naming(self.folder):
                lock.acquire()
        except filelock.Timeout as error:
            who = about.read_text() if about.exists() else "another process"
            raise FileExistsError(
                f"{self.folder} is being written to by {who}: give checkpoint= another folder, or "
                "end that run first"
            ) from error
        except NotImplementedError:  # a file system without locks
            yield
            return
        try:
            with _naming(self.folder):
                about.write_text(f"process {os.getpid()} on {socket.gethostname()}")
            yield
        finally:
            about.unlink(missing_ok=True)
            lock.release()


def checkpoints_for(
    where: str | os.PathLike[str] | Checkpoints | None, resume: bool | str | os.PathLike[str]
) -> Checkpoints | None:
    """The folder that :func:`ppvae.fit` writes to and goes on from; None: it writes nothing.

    Raises:
        FileExistsError: another run is in it.
        OSError: it cannot be made or written to.
        ValueError: there is none to resume from.
    """
    if not isinstance(resume, (bool, str, os.PathLike)):
        raise TypeError(f"resume takes True, False or the path of a checkpoint, got {resume!r}")
    if where is None:
        if resume:
            raise ValueError("resume needs the folder where checkpoints are: checkpoint='runs/vae'")
        return None
    if not isinstance(where, (str, os.PathLike, Checkpoints)) or where == "":
        raise TypeError(f"checkpoint takes a folder or a ppvae.Checkpoints, got {where!r}")
    files = where if isinstance(where, Checkpoints) else Checkpoints(where)
    with _naming(files.folder):  # if it fails, then before any training
        files.folder.mkdir(parents=True, exist_ok=True)
        tried = files.folder / f".{os.getpid()}.unfinished"
        tried.touch()
        tried.unlink(missing_ok=True)  # another run in the folder tidies up
    require_unused(files, resume)
    return files


def require_unused(files: Checkpoints, resume: bool | str | os.PathLike[str]) -> None:
    """Raise ``FileExistsError`` if a run is in the folder that this one does not go on with."""
    present = files.paths() + ([files.best] if files.best.exists() else [])
    goes_on = resume if isinstance(resume, bool) else _is_in(Path(resume), files.folder)
    if present and not goes_on:
        raise FileExistsError(
            f"{files.folder} holds the checkpoints of a run ({present[-1].name}), and this one "
            "would replace them: go on with it by resume=True, or give checkpoint= another folder"
        )


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


def _is_whole(path: Path, step: int | None = None) -> bool:
    """Whether a file is there and whole, and of this step if one is given."""
    try:
        return step in (None, _content(path)["step"])
    except (FileNotFoundError, CheckpointError):
        return False


def _set_aside(path: Path) -> Path:
    names = (path.with_suffix(f".pt.aside{n or ''}") for n in itertools.count())
    return path.rename(next(name for name in names if not name.exists()))


def read_tensors(path: Path) -> Any:
    """What torch has written, tensors and plain values alone, on the CPU.

    Raises:
        FileNotFoundError: it is absent.
        CheckpointError: it is damaged, or holds something else.
    """
    if not path.exists():
        raise FileNotFoundError(f"no checkpoint {path}")
    if not path.is_file():
        raise CheckpointError(f"{path} is no file: move it away")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # the checksums, which torch.load does not look at
        if damaged is not None:
            raise zipfile.BadZipFile(f"wrong checksum in {damaged}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        what = str(error).partition("\n")[0]
        if "eights" in what and "only" in what:  # torch says how to load it all the same
            what = "it holds code, or objects that are neither tensors nor plain values"
        raise CheckpointError(f"{path} is damaged or no checkpoint at all ({what})") from error


def _content(path: Path) -> dict[str, Any]:
    content = read_tensors(path)
    if not isinstance(content, dict) or content.get("ppvae") != MAGIC:
        raise CheckpointError(f"{path} is not a checkpoint of ppvae.fit: load it by torch.load")
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise CheckpointError(f"{path} has format {content['format']}, not {FORMAT}: update ppvae")
    said = content.pop("digest", None)
    found = {"best": False, **content}
    kinds = {"format": int, "step": int, "state": dict, "best": bool}
    wrong = [name for name, kind in kinds.items() if type(found.get(name)) is not kind]
    # a file of format 1 has no digest
    if wrong or (said is None and content["format"] != 1):
        seen = f"{wrong[0] if wrong else 'digest'} is absent or of the wrong type"
        raise CheckpointError(f"{path} is damaged: its {seen}")
    if said is not None and said != digest(content):
        raise CheckpointError(f"{path} is damaged: its content is not what was written")
    return found


def digest(value: Any) -> str:
    """A hash of all tensors, numbers and words in a state, as :func:`plain` gives it.

    Example:
        >>> digest({"theta": torch.ones(2)}) == digest({"theta": torch.ones(2, 1)})
        False
    """
    found = hashlib.blake2b(digest_size=16)

    def add(item: Any) -> None:
        if isinstance(item, Tensor):
            found.update(f"{item.dtype} {tuple(item.shape)}".encode())
            flat = item.cpu().contiguous()  # a single number may have a stride of 0
            flat = flat.as_strided((flat.numel(),), (1,))
            found.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(item, dict):
            found.update(f"{type(item).__name__} {len(item)}".encode())
            for key, inner in item.items():
                add(key)
                add(inner)
        elif isinstance(item, (list, tuple)):
            found.update(f"{type(item).__name__} {len(item)}".encode())
            for inner in item:
                add(inner)
        else:
            found.update(f"{type(item).__name__} {item!r};".encode())

    add(value)
    return found.hexdigest()


_DEEPEST = 100  # levels of lists and dictionaries
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


def plain(value: Any, where: str = "state") -> Any:
    """A copy made of what ``weights_only=True`` loads, and as that loads it.

    Raises:
        TypeError: naming the place of what it would not, or what holds itself.

    Example:
        >>> plain({"lr": np.float64(0.5), "names": ["a"]})
        {'lr': 0.5, 'names': ['a']}
    """
    if type(value) in (Tensor, nn.Parameter, nn.Buffer):
        odd = value.layout != torch.strided or value.is_quantized or value.is_meta
        if odd or value.is_nested:
            raise TypeError(
                f"{where} is a tensor without a dense block of memory ({value.layout}, "
                f"{value.dtype}, {value.device}); save {where}.to_dense() or its parts"
            )
        value = value.detach().resolve_conj().resolve_neg()
        whole = value.untyped_storage().nbytes() <= value.numel() * value.element_size()
        return value if whole else value.clone()  # of a row of many, torch would save them all
    if isinstance(value, np.generic) and value.dtype.kind in "biufcSU":  # no times, no records
        value = value.item()
    if type(value) in _PLAIN:
        return value
    if where.count("[") > _DEEPEST:
        raise TypeError(f"{where[:60]}... holds itself, or is more than {_DEEPEST} levels deep")
    if type(value) is Counter:  # of a MultiStepLR
        return Counter(plain(dict(value), where))
    if isinstance(value, Mapping):
        return {_key(key, where): plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)([plain(item, f"{where}[{i}]") for i, item in enumerate(value)])
    raise TypeError(
        f"{where} is {type(value).__name__}, of {type(value).__module__}; save tensors, numbers, "
        "strings, None, lists and dicts"
    )


def _key(key: Any, where: str) -> Any:
    if isinstance(key, np.generic):
        key = key.item()
    if type(key) in _PLAIN or (type(key) is tuple and all(type(k) in _PLAIN for k in key)):
        return key
    raise TypeError(
        f"{where} has the key {key!r}, a {type(key).__name__} of {type(key).__module__}; use "
        "strings or numbers"
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


def replace_file(target: Path, content: Any) -> None:
    """Put a file in its place at once, and on the disk."""
    unfinished = target.with_name(f".{target.name}.unfinished")
    with _naming(target):
        try:
            with open(unfinished, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            unfinished.unlink(missing_ok=True)  # of a full disk, it takes what is left
            raise
        os.replace(unfinished, target)
        if os.name == "posix":  # the rename itself
            folder = os.open(target.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say of an error of the file system what could not be written, and what helps."""
    try:
        yield
    except filelock.Timeout:
        raise
    except OSError as error:
        raise type(error)(
            error.errno,
            f"{error.strerror}: no checkpoint can be written there. What was written before stays; "
            "make room or give checkpoint= another folder, and resume",
            str(path),
        ) from error
