"""Sphinx configuration; `make docs` builds the site and runs its examples."""

import doctest
import hashlib
import logging
import os
import re
import sys
from pathlib import Path

import ppvae

sys.path.insert(0, str(Path(__file__).parent))  # plate_diagrams

project = "ppvae"
author = "The ppvae authors"
copyright = "2026, The ppvae authors"
version = release = ppvae.__version__

extensions = [
    "myst_nb",  # myst_parser, and pages that are notebooks: the course
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
]
exclude_patterns = ["_build", "measured"]
templates_path = ["_templates"]
html_static_path = ["_static"]
html_css_files = ["ppvae.css"]

# Names of other packages link to their pages. Their indices are read over the network, which a
# build on a train or in a sandbox has not: it asks for them by PPVAE_DOCS_ONLINE=1.
if os.environ.get("PPVAE_DOCS_ONLINE") or os.environ.get("READTHEDOCS"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "pyro": ("https://docs.pyro.ai/en/stable", None),
        "arviz": ("https://python.arviz.org/en/stable", None),
    }

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
nb_merge_streams = True  # one block for all that a cell prints
os.environ.setdefault("OMP_NUM_THREADS", "1")  # as the examples have it
os.environ["PYTHONWARNINGS"] = "ignore:IProgress not found"  # tqdm, on a kernel without ipywidgets
logging.getLogger("traitlets").setLevel(logging.WARNING)

autosummary_ignore_module_all = False  # a page for each name of __all__, wherever it is defined
autosummary_imported_members = True
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

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


def mend_backlinks(app, pagename, templatename, context, doctree):
    """Let [docs] beside a source find names that a module lends to another one's page.

    viewcode writes one module's name before all of a file's anchors; a page is named as its anchor.
    """
    if pagename.startswith("_modules/") and "body" in context:
        pattern = r'api/([\w.]+\.(\w+))\.html#[\w.]*?\.\2((?:\.\w+)*)"'
        context["body"] = re.sub(pattern, r'api/\1.html#\1\3"', context["body"])


def setup(app):
    """Draw the diagrams of programs.md, from the programs, before its pictures are looked for."""
    import plate_diagrams

    app.connect("html-page-context", mend_backlinks)
    app.connect("builder-inited", lambda app: plate_diagrams.draw())
