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
USES = {"svi", "compiled", "train", "diagnostics", "plots"}  # what is done with a pair
PAIR = {"models", "guides"}
ALL = {"nets", "conditionals", "weights", "elbo"} | PAIR | USES
# "ppvae" stands for the top-level package, whose names come from everywhere.
FORBIDDEN = {
    "program": ALL,
    "nets": ALL - {"nets"},
    "conditionals": ALL - {"nets", "conditionals"},
    "models": USES | {"elbo"},
    "guides": USES | {"elbo"},
    "posteriors": ALL - {"nets", "conditionals"},
    "local": USES | PAIR | {"elbo"},
    "weights": USES | PAIR | {"elbo"},
    "elbo": USES | PAIR,
    "svi": PAIR | {"train", "diagnostics", "plots"},
    "pairs": ALL,
    **dict.fromkeys(("graph", "graph_passes", "replay", "fused_adam", "optimizer"), ALL),
    "compiled": ALL - {"weights"},
    "nonfinite": ALL - {"weights"},
    "check": ALL - {"weights"},
    "site_faults": ALL - {"weights"},
    "compare": PAIR | {"train"},
    "train": PAIR | {"diagnostics"},
    **dict.fromkeys(
        ("run", "sources", "processes", "fit_checks"), PAIR | {"train", "diagnostics", "plots"}
    ),
    **dict.fromkeys(("checkpoint", "callbacks"), ALL - {"svi"}),
    "diagnostics": PAIR,
    "plots": ALL - {"plots"},
    "data": ALL,
    "metrics": ALL,
}


def imported_parts(source: str, package: str) -> Iterator[str]:
    """Yield the parts of ppvae that a module of ``package`` imports, even in a function."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{origin}.{alias.name}" for alias in node.names]
        for root, *rest in (name.split(".") for name in names):
            if root == "ppvae":
                yield rest[0] if rest and is_part(rest[0]) else "ppvae"


def is_part(name: str) -> bool:
    return name in FORBIDDEN or (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").exists()


def violations(source: str, path: Path) -> set[str]:
    """Return the forbidden imports of a module at ``path``, relative to the package."""
    part = path.with_suffix("").parts[0]
    package = ".".join(("ppvae", *path.parts[:-1]))
    if part not in FORBIDDEN:
        return set()
    return set(imported_parts(source, package)) & (FORBIDDEN[part] | {"ppvae"})


@pytest.mark.parametrize(
    "path", sorted(p.relative_to(PACKAGE) for p in PACKAGE.rglob("*.py")), ids=str
)
def test_import_directions(path: Path) -> None:
    assert violations((PACKAGE / path).read_text(encoding="utf-8"), path) == set()


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("models/vae.py", "from ppvae.elbo import ELBO", {"elbo"}),
        ("models/vae.py", "from ppvae import elbo, nets", {"elbo"}),
        ("models/vae.py", "from ..train import fit", {"train"}),
        ("models/__init__.py", "from .. import plots", {"plots"}),
        ("models/vae.py", "def f():\n    import ppvae.diagnostics.report as r", {"diagnostics"}),
        ("models/vae.py", "from ppvae import fit", {"ppvae"}),
        ("elbo/standard.py", "import ppvae", {"ppvae"}),
        ("weights.py", "from .models import VAE", {"models"}),
        ("nets.py", "from ppvae.conditionals import Normal", {"conditionals"}),
        ("models/vae.py", "from ppvae.nets import mlp\nfrom . import cvae\nimport torch", set()),
        ("train.py", "from ppvae.train.svi import SVI\nfrom .data import Dataset", set()),
    ],
)
def test_the_test_can_fail(path: str, source: str, expected: set[str]) -> None:
    assert violations(source, Path(path)) == expected


def test_import_is_light() -> None:
    code = "import sys, ppvae; print(sorted({'matplotlib', 'arviz'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
