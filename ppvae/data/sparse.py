"""Sparse counts: documents as rows of a scipy matrix, made dense a batch at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .arrays import class_labels, split_rows
from .dataset import Dataset, Support
from .split import Split


class EmptyDocumentWarning(UserWarning):
    """Documents without a word of the vocabulary were dropped."""


class SparseRows:
    """A scipy matrix that answers as a tensor of rows where a `Split` and `ppvae.fit` ask.

    It is what `Split(values=..., rows=...)` keeps; what is asked for comes dense, as float32.

    Args:
        matrix: `(N, D)`, scipy sparse, or dense.

    >>> import scipy.sparse
    >>> rows = SparseRows(scipy.sparse.csr_array([[0, 2], [1, 0], [0, 0]]))
    >>> rows.shape, rows.index_select(0, torch.tensor([1, 0]))
    ((3, 2), tensor([[1., 0.],
            [0., 2.]]))
    """

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, matrix: Any) -> None:
        import scipy.sparse

        self.matrix = scipy.sparse.csr_array(matrix, dtype=np.float32)
        self.matrix.sum_duplicates()
        self.shape = tuple(self.matrix.shape)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Rows, `(B, D)`, dense."""
        return torch.from_numpy(self.matrix[index.cpu().numpy()].toarray())

    def __getitem__(self, index: Tensor | int) -> Tensor:
        if isinstance(index, Tensor):
            return self.index_select(0, index)
        return self.index_select(0, torch.tensor([index]))[0]

    def __len__(self) -> int:
        return int(self.shape[0])


def from_counts(
    counts: Any,
    vocabulary: Sequence[str] | None = None,
    y: Any = None,
    *,
    valid: float | int = 0.1,
    test: Any = 0.1,
    test_y: Any = None,
    seed: int = 0,
    name: str = "counts",
    source: str = "counts of the user",
) -> Dataset:
    """A `Dataset` of bags of words, kept sparse until a batch is made.

    Documents without a word have no perplexity and tell nothing: they are dropped, and counted in
    a warning and in `source`.

    Args:
        counts: `(N, V)` whole numbers, none negative: scipy sparse, or an array. scikit-learn's
            `CountVectorizer` makes them.
        vocabulary: V words in the order of the columns, or None.
        y: `(N,)` labels 0..C-1, or None.
        valid: documents for validation, taken from `counts`: a share in (0, 1) or a number.
        test: documents for testing, likewise; or counts of their own, `(M, V)`.
        test_y: their labels, if they are given.
        seed: of the split, 0 or more.
        name: of the data set.
        source: of the counts; the split and the dropped documents are added.

    Raises:
        TypeError: labels that are not numbers.
        ValueError: counts that are not counts, labels or a vocabulary that do not fit, or a part
            without documents.

    Warns:
        EmptyDocumentWarning: how many documents were dropped.

    >>> import scipy.sparse
    >>> documents = scipy.sparse.csr_array([[0, 2], [1, 0], [3, 1], [0, 1]])
    >>> pets = from_counts(documents, ["cat", "dog"], valid=1, test=1)
    >>> pets.support, pets.vocabulary, len(pets.train), pets.train.x.shape
    ('counts', ('cat', 'dog'), 2, torch.Size([2, 2]))
    """
    rows = count_rows(counts, "counts")
    own_test = not isinstance(test, (int, float, np.integer))
    parts = [(rows, y)]
    if own_test:
        parts.append((count_rows(test, "test"), test_y))
        if parts[1][0].shape[1] != rows.shape[1]:
            raise ValueError(
                f"test has {parts[1][0].shape[1]} columns and counts {rows.shape[1]}: count both "
                "with one vocabulary"
            )
    if vocabulary is not None:
        check_vocabulary(vocabulary, rows.shape[1])
    total = sum(len(part) for part, _ in parts)
    kept = [
        drop_empty(part, labels, label)
        for (part, labels), label in zip(parts, ("y", "test_y"), strict=False)
    ]
    dropped = total - sum(len(part) for part, _ in kept)
    if dropped:
        warnings.warn(
            f"{dropped} of {total} documents have no word of the vocabulary, and were dropped",
            EmptyDocumentWarning,
            stacklevel=2,
        )
    return split_counts(
        kept, vocabulary, valid, 0.1 if own_test else test, seed, name, source, dropped
    )


def split_counts(
    parts: list[tuple[SparseRows, Tensor | None]],
    vocabulary: Sequence[str] | None,
    valid: float | int,
    test: float | int,
    seed: int,
    name: str,
    source: str,
    dropped: int = 0,
    support: Support = "counts",
) -> Dataset:
    """A data set of one matrix, or of a training and a test matrix; by class with labels."""
    rows, labels = parts[0]
    numbers = None if labels is None else labels.numpy()
    if len(parts) == 2:
        train, chosen, rest = split_rows(len(rows), valid, 1, seed, numbers)
        index = [np.concatenate([train, rest]), chosen, np.arange(len(parts[1][0]))]
        owners = [parts[0], parts[0], parts[1]]
    else:
        index = list(split_rows(len(rows), valid, test, seed, numbers))
        owners = [parts[0]] * 3
    train_part, valid_part, test_part = (
        Split(
            cast(Tensor, matrix),
            None if y is None else y[torch.from_numpy(i)],
            rows=torch.from_numpy(i),
        )
        for (matrix, y), i in zip(owners, index, strict=True)
    )
    empty = f"; {dropped} empty documents dropped" if dropped else ""
    what = "validation" if len(parts) == 2 else "split"
    how = "at random" if labels is None else "at random by class"
    return Dataset(
        name,
        train_part,
        valid_part,
        test_part,
        support=support,
        shape=(int(rows.shape[1]),),
        num_classes=None if labels is None else int(labels.max()) + 1,
        source=f"{source}{empty}; {what} {how}, seed {seed}",
        vocabulary=None if vocabulary is None else tuple(vocabulary),
    )


def count_rows(counts: Any, name: str) -> SparseRows:
    """Sparse rows, if they are whole numbers and none is negative."""
    import scipy.sparse

    if not scipy.sparse.issparse(counts):
        counts = np.asarray(counts.detach().cpu() if isinstance(counts, Tensor) else counts)
    if len(counts.shape) != 2:
        raise ValueError(f"{name} has shape {counts.shape}: give (N, V), one row per document")
    if counts.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {counts.dtype}: give numbers of times each word occurs")
    values = counts.data if scipy.sparse.issparse(counts) else counts
    if not np.isfinite(values).all():
        raise ValueError(f"{name} has NaN or infinite values: give numbers of words")
    if (values < 0).any():
        raise ValueError(f"{name} has negative values, down to {values.min():g}: give counts")
    if (values != np.round(values)).any():
        raise ValueError(
            f"{name} has values that are not whole, such as "
            f"{values[values != np.round(values)].flat[0]:g}: give counts, not tf-idf or shares"
        )
    return SparseRows(counts)


def drop_empty(rows: SparseRows, y: Any, name: str = "y") -> tuple[SparseRows, Tensor | None]:
    """Only the documents with a word, and their labels."""
    if y is not None and np.shape(y) != (len(rows),):
        raise ValueError(
            f"{name} has shape {tuple(np.shape(y))} and there are {len(rows)} documents: give one "
            "label per document"
        )
    labels = None if y is None else class_labels(y, name)
    kept = np.flatnonzero(np.asarray(rows.matrix.sum(1)).ravel() > 0)
    if not len(kept):
        raise ValueError("no document has a word: count them with another vocabulary")
    if len(kept) == len(rows):
        return rows, labels
    return SparseRows(rows.matrix[kept]), None if labels is None else labels[torch.from_numpy(kept)]


def check_vocabulary(vocabulary: Sequence[str], width: int) -> None:
    """Raise ValueError unless there is one word for each column, none twice."""
    if len(vocabulary) != width:
        raise ValueError(
            f"vocabulary has {len(vocabulary)} words and counts {width} columns: give the "
            "vocabulary that the documents were counted with"
        )
    if len(set(vocabulary)) != width:
        twice = next(word for word in vocabulary if list(vocabulary).count(word) > 1)
        raise ValueError(f"the word {twice!r} is in vocabulary twice: add up its columns")
