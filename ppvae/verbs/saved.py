"""A trained pair in a folder: saved and loaded without pickle, and without importing by name."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import io
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ppvae.arguments import require_programs
from ppvae.data.table import Column, Table
from ppvae.program import module_of
from ppvae.train.checkpoint import CheckpointError, digest, plain, read_tensors, replace_file
from ppvae.verbs.described import Describing, NotDescribed, Rebuilding
from ppvae.wrapped import title

FORMAT = 1  # raised when an older ppvae could not read what is written
_NAME = "pair.json"

Program = Callable[..., Any]


class Saved(NamedTuple):
    """What :func:`ppvae.load` gives: ``model, guide, table = ppvae.load(folder)``."""

    model: Any
    guide: Any
    table: Table | None


def save(
    folder: str | os.PathLike[str], model: Program, guide: Program, table: Table | None = None
) -> Path:
    """Write a pair into a folder: its parameters, buffers and modes, and what it is made of.

    A pair of ppvae's own models, guides and conditionals and of ``torch.nn`` is described whole,
    what model and guide share included. Of a program of your own there are its tensors by name, and
    :func:`ppvae.load` asks for a function that makes the pair. What was there is replaced at once:
    a process that dies leaves the old pair or the new one.

    ``pair.json`` is the description, ``weights-....pt`` the tensors, in torch's archive of tensors
    alone. An optimiser is not saved: to go on training, see ``checkpoint=`` of :func:`ppvae.fit`.

    Args:
        folder: made if it is missing.
        model, guide: Pyro programs.
        table: the ``data.Table`` of their rows.

    Returns:
        The path of ``pair.json``.

    Raises:
        TypeError: a tensor without a dense block of memory; levels of a table that are no words or
            numbers.
        OSError: the folder cannot be written to.

    Example:
        >>> import tempfile, torch, ppvae
        >>> from ppvae import conditionals, guides, models, nets
        >>> model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, 4)), latent_dim=2)
        >>> guide = guides.Normal(nets.mlp(4, 8, 2 * 2))
        >>> folder = tempfile.TemporaryDirectory()
        >>> _ = save(folder.name, model, guide)
        >>> pair = load(folder.name)
        >>> both = [(model, guide), (pair.model, pair.guide)]
        >>> first, second = (ppvae.log_prob(*p, torch.ones(3, 4), num_particles=9) for p in both)
        >>> torch.equal(first, second)
        True
        >>> folder.cleanup()
    """
    folder = _path(folder)
    require_programs(model=model, guide=guide)
    if not isinstance(table, Table | None):
        raise TypeError(f"table must be a data.Table, got {type(table).__name__}")
    found = Describing()
    state = plain(_owners(model, guide).state_dict(), "the pair")
    content: dict[str, Any] = {"format": FORMAT, "versions": _versions()}
    try:
        pair = {
            name: _described(found, p, name) for name, p in (("model", model), ("guide", guide))
        }
        content |= {"pair": pair, "modules": found.modules}
    except NotDescribed as error:
        found = Describing()
        content["needs_make"] = str(error)
    content["table"] = None if table is None else _of_table(found, table)
    tensors = {"described": [plain(t, "a tensor of the pair") for t in found.tensors]}
    if "needs_make" in content:
        tensors["state"] = state
    content["sources"] = _sources(model, guide)
    content["names"] = {name: list(tensor.shape) for name, tensor in state.items()}
    content["digest"] = digest([content, tensors])
    content["weights"] = f"weights-{content['digest'][:16]}.pt"
    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    folder.mkdir(parents=True, exist_ok=True)
    replace_file(folder / content["weights"], buffer.getbuffer())
    replace_file(folder / _NAME, json.dumps(content, indent=1).encode())
    for old in folder.glob("weights-*.pt"):
        if old.name != content["weights"]:
            old.unlink()
    return folder / _NAME


def load(
    folder: str | os.PathLike[str], make: Callable[[], tuple[Program, Program]] | None = None
) -> Saved:
    """The pair that :func:`ppvae.save` wrote into a folder, on the CPU.

    Its log-weights are those of the saved pair bit for bit, on the same machine and versions and at
    the same seed. Files hold names of classes of ppvae and ``torch.nn`` alone; nothing in them is
    imported or run.

    Args:
        folder: what was given to ``save``.
        make: for a pair with programs of your own: a function that makes ``(model, guide)`` as they
            were made before; the saved tensors are then put into them. An autoguide that makes its
            parameters in its first run must have run.

    Returns:
        :class:`Saved`: ``model, guide, table``.

    Raises:
        FileNotFoundError: there is no pair in the folder.
        CheckpointError: it is damaged, or of a newer ppvae.
        TypeError: the pair has parts that are not ppvae's, and ``make`` is not given; or it gives
            no pair.
        ValueError: the pair that ``make`` made has other tensors.

    Warns:
        UserWarning: the source of one of your classes is not what it was.
    """
    folder = _path(folder)
    if make is not None and (not callable(make) or isinstance(make, nn.Module)):
        raise TypeError(f"make must be a function that makes (model, guide), got {make!r}")
    content, tensors = _read(folder)
    described = tensors["described"]
    try:
        empty = Rebuilding([], described)
        table = None if content["table"] is None else _to_table(empty._value(content["table"]))
        if make is None and "needs_make" not in content:
            modules = Rebuilding(content["modules"], described).modules
            pair = content["pair"]
            return Saved(modules[pair["model"]], modules[pair["guide"]], table)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / _NAME} cannot be rebuilt ({error}): it was written by "
            f"{content['versions']}, and this is {_versions()}; load it with these, or by make="
        ) from error
    if make is None:
        raise TypeError(
            f"{content['needs_make']}, which is not ppvae's, so the file cannot say how it is "
            "made: give make=, a function that makes (model, guide) as they were"
        )
    made = make()
    if not isinstance(made, tuple) or len(made) != 2:
        raise TypeError(f"make must give (model, guide), got {type(made).__name__}")
    _put(made, content, tensors, described)
    return Saved(*made, table)


def _described(found: Describing, program: Program, name: str) -> int:
    if not isinstance(program, nn.Module):
        raise NotDescribed(f"the {name} is {title(program)}, a {type(program).__name__}")
    return found.module(program, name)


def _owners(model: Program, guide: Program) -> nn.ModuleDict:
    """The modules of both programs, by whose names tensors are known."""
    owners = {"model": module_of(model), "guide": module_of(guide)}
    return nn.ModuleDict({name: owner for name, owner in owners.items() if owner is not None})


def _put(made: tuple[Any, Any], content: Any, tensors: Any, described: list[Tensor]) -> None:
    """Give a pair that has just been made the tensors of the one that was saved."""
    if "state" not in tensors:
        modules = Rebuilding(content["modules"], described).modules
        pair = content["pair"]
        tensors["state"] = _owners(modules[pair["model"]], modules[pair["guide"]]).state_dict()
    owners = _owners(*made)
    own = {name: list(value.shape) for name, value in owners.state_dict().items()}
    if odd := sorted(name for name in own.keys() ^ content["names"].keys()):
        kind = "no such tensor was saved" if odd[0] in own else "it lacks this tensor"
        raise ValueError(f"make() gives another pair: {odd[0]!r}, {kind}, and {len(odd) - 1} more")
    if wrong := [name for name in own if own[name] != content["names"][name]]:
        seen = f"{wrong[0]!r} is {own[wrong[0]]} and was {content['names'][wrong[0]]}"
        raise ValueError(f"make() gives another pair: {seen}")
    owners.load_state_dict(tensors["state"])
    now = _sources(*made)
    if changed := [name for name in now if content["sources"].get(name) != now[name]]:
        warnings.warn(
            f"the source of {', '.join(changed)} is not what it was when the pair was saved: its "
            "log-weights may be others",
            stacklevel=3,
        )


def _path(folder: Any) -> Path:
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path, got {type(folder).__name__}")
    return Path(folder)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / _NAME
    if not path.is_file():
        raise FileNotFoundError(f"no pair in {folder}: there is no {_NAME}")
    try:
        content = json.loads(path.read_text())
        number, name, said = content["format"], content.pop("weights"), content.pop("digest")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged ({error})") from error
    if number > FORMAT:
        raise CheckpointError(f"{path} has format {number}, not {FORMAT}: update ppvae")
    if Path(name).name != name:
        raise CheckpointError(f"{path} is damaged: {name!r} is no file of its folder")
    tensors = read_tensors(folder / name)
    if digest([content, tensors]) != said:
        raise CheckpointError(f"{folder} is damaged: its content is not what was written")
    return content, tensors


def _versions() -> dict[str, str]:
    return {"ppvae": sys.modules["ppvae"].__version__, "torch": str(torch.__version__)}


def _sources(model: Program, guide: Program) -> dict[str, str]:
    """A hash of the source of each class that is not ppvae's or torch's, where there is one."""
    kinds = {type(m) for owner in _owners(model, guide).values() for m in owner.modules()}
    found = {}
    for kind in kinds:
        if kind.__module__.partition(".")[0] in ("ppvae", "torch", "pyro"):
            continue
        try:
            source = inspect.getsource(kind)
        except (OSError, TypeError):  # defined in a console
            continue
        hashed = hashlib.blake2b(source.encode(), digest_size=8).hexdigest()
        found[f"{kind.__module__}.{kind.__qualname__}"] = hashed
    return dict(sorted(found.items()))


def _of_table(found: Describing, table: Table) -> Any:
    try:
        return found.value({"backend": table.backend, "columns": _rows(table)}, "table")
    except NotDescribed as error:
        raise TypeError(f"{error}: save tables whose levels are words or numbers") from None


def _rows(table: Table) -> list[tuple[Any, ...]]:
    return [dataclasses.astuple(column) for column in table.columns]


def _to_table(held: dict[str, Any]) -> Table:
    return Table(tuple(Column(*row) for row in held["columns"]), held["backend"])
