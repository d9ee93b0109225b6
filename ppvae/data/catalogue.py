"""``load``: a data set by name, or from a file or folder."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ppvae.data import binary_images, har, images, synthetic, text, typeset
from ppvae.data.dataset import Dataset
from ppvae.data.files import from_csv, from_images, from_npz
from ppvae.data.split import check_at_least

LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": images.digits,
    "typeset": typeset.typeset,
    "mnist": images.mnist,
    "fashion_mnist": images.fashion_mnist,
    "freyfaces": images.freyfaces,
    "binarized_mnist": binary_images.binarized_mnist,
    "omniglot": binary_images.omniglot,
    "har": har.har,
    "20newsgroups": text.newsgroups,
    "rcv1": text.rcv1,
    "gaussian_mixture": synthetic.gaussian_mixture,
    "linear_gaussian": synthetic.linear_gaussian,
}
NAMES = tuple(LOADERS)


def load(
    name: str | Path,
    *,
    binarize: str | None = "default",
    flatten: bool = True,
    seed: int = 0,
    **options: Any,
) -> Dataset:
    """A data set by name, or from a path to an .npz or .csv file or a folder of images.

    ==================  =====================  ===================  ================
    name                train/valid/test       shape                default binarize
    ==================  =====================  ===================  ================
    "digits"            1,297/200/300          (1, 8, 8)            "dynamic"
    "typeset"           9,600/1,200/1,200      (1, 28, 28)          "dynamic"
    "mnist"             50,000/10,000/10,000   (1, 28, 28)          "dynamic"
    "fashion_mnist"     50,000/10,000/10,000   (1, 28, 28)          "dynamic"
    "freyfaces"         1,565/200/200          (1, 28, 20)          None
    "binarized_mnist"   50,000/10,000/10,000   (1, 28, 28)          (binarised)
    "omniglot"          23,000/1,345/8,070     (1, 28, 28)          "dynamic"
    "har"               6,617/735/2,947        (561,)               (real values)
    "20newsgroups"      10,258/1,000/7,487     (1995,)              (counts)
    "rcv1"              8,000/1,000/1,000      (2000,)              (real values)
    "gaussian_mixture"  1,600/200/200          (2,)                 (real values)
    "linear_gaussian"   1,600/200/200          (8,)                 (real values)
    ==================  =====================  ===================  ================

    "mnist", "fashion_mnist", "binarized_mnist", "omniglot", "har", "20newsgroups" and "rcv1" are
    downloaded once into ``cache_folder()``; "freyfaces" must be put there. Sources and licences are
    in the docstrings of the loaders: ``data.text``, ``data.har``, ``data.binary_images``.

    Args:
        name: one of the names above, or a path; paths go to ``from_npz``, ``from_csv``,
            ``from_images``.
        binarize: "dynamic", "static", None for grey levels in [0, 1], or "default" for the one in
            the table (None for a path).
        flatten: store images as ``(N, D)`` rows; False keeps ``(N, C, H, W)``.
        seed: of random splits, of the binarisation and of synthetic data, 0 or more.
        **options: of one data set. ``num_valid``: "mnist", "fashion_mnist", "har", "20newsgroups".
            ``num``: "typeset", synthetic ones, "rcv1". ``num_words``: "20newsgroups", "rcv1".
            ``version``: "20newsgroups". ``num_components``: "gaussian_mixture". ``dim``,
            ``latent_dim``: "linear_gaussian". ``x``, ``y``: .npz. ``label``: .csv.
            ``size``, ``grey``: folders. ``valid``, ``test``, ``support``, ``shape``: all paths.

    Raises:
        ValueError: unknown name or value of an argument, corrupt file, bad data.
        TypeError: an option the data set does not have.
        ConnectionError: the file is not in the cache and cannot be downloaded.

    Example:
        >>> print(load("digits"))
        Dataset 'digits': support binary, shape (1, 8, 8), 10 classes
          rows          train 1,297, valid 200, test 300
          a batch is    (x) with rows of shape (64,)
          binarisation  dynamic (fresh seeded draw each epoch; .x is that of epoch 0)
          source        Alpaydin and Kaynak (1998), https://archive.ics.uci.edu/dataset/80, as \
bundled with scikit-learn; grey levels / 16; split at random by class, seed 0
    """
    if not isinstance(name, (str, Path)) or not str(name):
        raise TypeError(f"name={name!r}: give the name of a data set, or a path")
    check_at_least(0, seed=seed)
    if str(name) in LOADERS:
        loader = LOADERS[str(name)]
        accepted = set(inspect.signature(loader).parameters)
    else:
        loader, accepted = _for_path(name)
    options["seed"] = seed
    if "flatten" in accepted:
        options["flatten"] = flatten
    asked = not (isinstance(binarize, str) and binarize == "default")
    if "binarize" in accepted and asked:
        options["binarize"] = binarize
    elif asked and binarize is not None:
        raise ValueError(f"binarize={binarize!r} needs grey levels, and {str(name)!r} has none")
    if unknown := sorted(set(options) - accepted):
        seen = f"{str(name)!r} has no option {', '.join(unknown)}"
        raise TypeError(f"{seen}: it has {', '.join(sorted(accepted))}")
    return loader(**options)


def _for_path(name: str | Path) -> tuple[Callable[..., Dataset], set[str]]:
    """The reader for a path, and the options it takes."""
    path = Path(name)
    readers: dict[str, Callable[..., Dataset]] = {".npz": from_npz, ".csv": from_csv}
    if path.is_dir():
        reader: Callable[..., Dataset] = from_images
    elif path.is_file() and path.suffix in readers:
        reader = readers[path.suffix]
    elif path.is_file():
        raise ValueError(f"{path} is neither .npz nor .csv: convert it, or use data.from_arrays")
    else:
        near = difflib.get_close_matches(str(name).lower().replace("-", "_"), NAMES, cutoff=0.4)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        cure = f"The names are {', '.join(NAMES)}; a path is of an existing .npz, .csv or folder"
        raise ValueError(
            f"no data set, file or folder of the name {str(name)!r}: {hint}{cure} of images"
        )
    own = set(inspect.signature(reader).parameters) - {"path", "folder", "options"}
    shared = {"valid", "test", "support", "shape", "binarize", "flatten", "seed", "name"}
    return lambda **options: reader(path, **options), own | shared
