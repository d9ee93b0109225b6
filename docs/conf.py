"""Sphinx configuration; `make docs` builds the site and runs its examples."""

import doctest
import hashlib
import logging
import os
from pathlib import Path

import ppvae

project = "ppvae"
author = "The ppvae authors"
copyright = "2026, The ppvae authors"
version = release = ppvae.__version__

extensions = [
    "myst_nb",  # myst_parser, and pages that are notebooks: the course
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = "ppvae"

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# The course is executed once for all builders, and again when a lesson or the package changes.
_here = Path(__file__).parent
_sources = [*Path(ppvae.__file__).parent.rglob("*.py"), _here / "course" / "checks.py"]
_digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(_sources))).hexdigest()[:12]
nb_execution_mode = "cache"
nb_execution_cache_path = str(_here / "_build" / f"lessons-{_digest}")
nb_execution_timeout = 300  # seconds a cell
nb_execution_raise_on_error = True
nb_output_stderr = "warn"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the examples have it
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, on a kernel without ipywidgets
logging.getLogger("traitlets").setLevel(logging.WARNING)

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

# Examples in docstrings are run by pytest, those in {doctest} blocks of the pages by Sphinx.
doctest_test_doctest_blocks = ""
# Not Sphinx's IGNORE_EXCEPTION_DETAIL: an error message shown is an error message checked.
doctest_default_flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
doctest_global_setup = """
import pyro
import torch

pyro.set_rng_seed(0)
torch.set_num_threads(1)  # small networks: more threads are no faster, and slow on a shared machine
"""
