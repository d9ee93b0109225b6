"""What the reproductions share with the examples: loaded, not written again."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def example(name: str) -> ModuleType:
    """A script of examples/, which is no package, as a module: its functions and classes."""
    if name in sys.modules:
        return sys.modules[name]
    if name != "reporting":
        example("reporting")  # every example imports it
    path = Path(__file__).parent.parent / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
