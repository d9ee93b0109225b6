"""Which part of ppvae may import which, read from the source; CONTRIBUTING.md draws it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

import ppvae

PACKAGE = Path(ppvae.__file__).parent
DENSITIES = {"distributions", "conditionals"}
PAIR = {
    "arguments",
    "auxiliary",
    "wrapped",
    "program",
    "pairs",
    "latents",
    "terms",
    "enumeration",
    "global_latents",
    "weights",
}
# A part may import itself and these, in functions and for types too. "ppvae", the top-level
# package, is for nobody: its names come from everywhere.
MAY_IMPORT: dict[str, set[str]] = {
    # what a pair is
    "arguments": set(),
    "auxiliary": {"arguments"},
    "wrapped": set(),
    "program": {"wrapped"},
    "pairs": {"wrapped", "program", "distributions"},
    "latents": {"pairs"},
    "terms": {"pairs", "distributions"},
    "enumeration": {"terms"},
    "global_latents": {"latents", "pairs", "terms"},
    "weights": {"arguments", "pairs", "latents", "terms", "enumeration", "global_latents"},
    "local": PAIR,
    "processes": set(),
    "intake": {"data", "program", "wrapped"},
    "chain": {"pairs"},
    # what programs are made of
    "nets": {"arguments", "auxiliary"},
    "distributions": set(),
    "conditionals": {
        "arguments",
        "distributions",
        "auxiliary",
        "data",
        "pairs",
        "terms",
    },  # optimal
    "posteriors": DENSITIES | {"arguments", "auxiliary"},
    "models": DENSITIES | {"arguments", "program", "chain", "wrapped"},
    "guides": DENSITIES | PAIR | {"local", "chain", "models", "posteriors"},
    # what is done with a pair
    "elbo": PAIR,
    "check": PAIR | {"distributions", "intake"},
    "compile": PAIR,
    "train": PAIR | {"elbo", "check", "compile", "data", "intake", "plots", "processes"},
    "diagnostics": PAIR
    | {"distributions", "local", "elbo", "check", "compile", "intake", "plots", "processes"},
    "verbs": PAIR | {"check", "data", "diagnostics", "distributions", "intake", "train"},
    "sklearn": {"conditionals", "data", "guides", "models", "nets", "train", "verbs"},
    # what knows no pair
    "data": {"arguments"},
    "metrics": set(),
    "plots": set(),
}


def imports(source: str, package: str) -> Iterator[str]:
    """Yield the modules of ppvae that a module of ``package`` imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        yield from (module_of(name) for name in names if name.split(".")[0] == "ppvae")


def module_of(name: str) -> str:
    """The module that a dotted name lies in, or is."""
    parts = name.split(".")
    while len(parts) > 1 and not is_module(Path(*parts[1:])):
        parts.pop()
    return ".".join(parts)


def is_module(path: Path) -> bool:
    return (PACKAGE / path).is_dir() or (PACKAGE / path).with_suffix(".py").exists()


def part_of(module: str) -> str:
    """``"elbo"`` of ``"ppvae.elbo.standard"``; ``"ppvae"`` of the package itself."""
    return [*module.split("."), "ppvae"][1] if "." in module else "ppvae"


def violations(source: str, path: Path) -> set[str]:
    """Return the parts that a module at ``path``, relative to the package, must not import."""
    own = path.with_suffix("").parts[0]
    if own == "__init__":
        return set()
    package = ".".join(("ppvae", *path.parts[:-1]))
    return {part_of(module) for module in imports(source, package)} - MAY_IMPORT[own] - {own}


SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_import_directions(path: Path) -> None:
    assert violations((PACKAGE / path).read_text(encoding="utf-8"), path) == set()


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle; an empty list if there are none."""
    left = {module: set(targets) for module, targets in graph.items()}
    while free := [module for module, targets in left.items() if not targets & left.keys()]:
        for module in free:
            del left[module]
    path: list[str] = []
    while left and (not path or path.count(path[-1]) < 2):
        targets = left[path[-1]] if path else set(left)
        path.append(min(targets & left.keys()))
    return path[path.index(path[-1]) :] if path else []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {}
    for path in SOURCES:
        if path.name != "__init__.py":  # a package's imports are its exports
            source = (PACKAGE / path).read_text(encoding="utf-8")
            module = ".".join(("ppvae", *path.with_suffix("").parts))
            found = set(imports(source, module.rpartition(".")[0]))
            graph[module] = {other for other in found if other != module}
    assert circle(graph) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"a"}}
    assert circle(graph) in (["b", "c", "b"], ["c", "b", "c"])
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("models/vae.py", "from ppvae.elbo import ELBO", {"elbo"}),
        ("models/vae.py", "from ppvae import elbo, nets", {"elbo", "nets"}),
        ("models/vae.py", "from ..train.fit import fit", {"train"}),
        ("models/__init__.py", "from .. import plots", {"plots"}),
        ("models/vae.py", "def f():\n    import ppvae.diagnostics.report as r", {"diagnostics"}),
        ("models/vae.py", "from ppvae import fit", {"ppvae"}),
        ("elbo/standard.py", "import ppvae", {"ppvae"}),
        ("elbo/standard.py", "from ppvae.train.svi import SVI", {"train"}),
        ("weights.py", "from .models import VAE", {"models"}),
        ("nets/dense.py", "from ppvae.conditionals import Normal", {"conditionals"}),
        ("models/vae.py", "from ppvae.conditionals import Normal\nfrom . import cvae", set()),
        ("train/fit.py", "from ppvae.train.svi import SVI\nfrom ..data import Dataset", set()),
    ],
)
def test_the_test_can_fail(path: str, source: str, expected: set[str]) -> None:
    assert violations(source, Path(path)) == expected


def test_import_is_light() -> None:
    code = "import sys, ppvae, ppvae.plots; print({'matplotlib', 'arviz'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
