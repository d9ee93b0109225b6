"""Sparse counts: documents as rows of a scipy matrix, made dense a batch at a time."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ppvae.data.arrays import class_labels, split_rows
from ppvae.data.dataset import Dataset, Support
from ppvae.data.precision import PrecisionWarning, changed, float_type
from ppvae.data.split import Split


class EmptyDocumentWarning(UserWarning):
    """Documents without a word of the vocabulary were dropped."""


class SparseRows:
    """A scipy matrix that answers as a tensor of rows where a ``Split`` and ``ppvae.fit`` ask.

    It is what ``Split(values=..., rows=...)`` keeps; what is asked for comes dense, in the default
    float dtype that there was when it was made.

    Args:
        matrix: ``(N, D)``, scipy sparse, or dense.
        dtype: of NumPy; None: that of the default float dtype.

    Example:
        >>> import scipy.sparse
        >>> rows = SparseRows(scipy.sparse.csr_array([[0, 2], [1, 0], [0, 0]]))
        >>> rows.shape, rows.index_select(0, torch.tensor([1, 0]))
        ((3, 2), tensor([[1., 0.],
                [0., 2.]]))
    """

    device = torch.device("cpu")

    def __init__(self, matrix: Any, dtype: Any = None) -> None:
        import scipy.sparse

        self.matrix = scipy.sparse.csr_array(matrix, dtype=float_type() if dtype is None else dtype)
        self.matrix.sum_duplicates()
        self.dtype = torch.from_numpy(self.matrix.data[:0]).dtype
        self.shape = tuple(self.matrix.shape)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """Rows, ``(B, D)``, dense."""
        return torch.from_numpy(self.matrix[index.cpu().numpy()].toarray())

    def __getitem__(self, index: Tensor | int) -> Tensor:
        if isinstance(index, Tensor):
            return self.index_select(0, index)
        return self.index_select(0, torch.tensor([index]))[0]

    def __len__(self) -> int:
        return int(self.shape[0])


class SparseArguments:
    """What a program is called with, of which some stays sparse until a batch is made.

    It answers as a ``Split`` with ``rows`` does, where ``ppvae.fit`` asks.

    Args:
        columns: tensors and :class:`SparseRows` of N rows each, in the order of the arguments.

    Example:
        >>> import scipy.sparse
        >>> x = SparseRows(scipy.sparse.csr_array([[0, 2], [1, 0], [0, 0]]))
        >>> both = SparseArguments([x, torch.tensor([5, 6, 7])])
        >>> both.present(*both.read(torch.tensor([1])), epoch=1, key=0)
        (tensor([[1., 0.]]), tensor([6]))
    """

    binarize, seed = None, 0

    def __init__(self, columns: Sequence[Tensor | SparseRows]) -> None:
        lengths = [len(column) for column in columns]
        if len(set(lengths)) > 1:
            raise ValueError(f"the arguments have {lengths} rows: give each as many")
        self.columns = tuple(columns)
        self.rows = torch.arange(lengths[0])

    def read(self, index: Tensor) -> tuple[Tensor, ...]:
        """The same rows of each argument, dense."""
        return tuple(column.index_select(0, index.to(column.device)) for column in self.columns)

    def present(self, *batch: Tensor, epoch: int, key: int) -> tuple[Tensor, ...]:
        """The rows as they are."""
        return batch

    def __len__(self) -> int:
        return len(self.rows)


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
    """A ``Dataset`` of bags of words, kept sparse until a batch is made.

    Documents without a word have no perplexity and tell nothing: they are dropped, and counted in
    a warning and in ``source``.

    Args:
        counts: ``(N, V)`` whole numbers, none negative: scipy sparse, or an array. scikit-learn's
            ``CountVectorizer`` makes them.
        vocabulary: V words in the order of the columns, or None.
        y: ``(N,)`` labels 0..C-1, or None.
        valid: documents for validation, taken from ``counts``: a share in (0, 1) or a number.
        test: documents for testing, likewise; or counts of their own, ``(M, V)``.
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
        PrecisionWarning: counts that the default float dtype does not hold.

    Example:
        >>> import scipy.sparse
        >>> documents = scipy.sparse.csr_array([[0, 2], [1, 0], [3, 1], [0, 1]])
        >>> pets = from_counts(documents, ["cat", "dog"], valid=1, test=1)
        >>> pets.support, pets.vocabulary, len(pets.train), pets.train.x.shape
        ('counts', ('cat', 'dog'), 2, torch.Size([2, 2]))
    """
    parts = [(checked_counts(counts, "counts"), y, "y")]
    if not isinstance(test, (int, float, np.integer)):
        parts.append((checked_counts(test, "test"), test_y, "test_y"))
    widths = [rows.shape[1] for rows, _, _ in parts]
    if widths[-1] != widths[0]:
        seen = f"test has {widths[1]} columns and counts {widths[0]}"
        raise ValueError(f"{seen}: count both with one vocabulary")
    if vocabulary is not None:
        check_vocabulary(vocabulary, widths[0])
    kept = [drop_empty(*part) for part in parts]
    total = sum(len(rows) for rows, _, _ in parts)
    dropped = total - sum(len(rows) for rows, _ in kept)
    if dropped:
        warnings.warn(
            f"{dropped} of {total} documents have no word of the vocabulary, and were dropped",
            EmptyDocumentWarning,
            stacklevel=2,
        )
    return split_counts(kept, vocabulary, valid, test, seed, name, source, dropped)


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
    """A data set of one matrix, or of a training and a test matrix (then ``test`` says nothing)."""
    rows, labels = parts[0]
    own_test = len(parts) == 2
    by_class = None if labels is None else labels.numpy()
    train, chosen, rest = split_rows(len(rows), valid, 1 if own_test else test, seed, by_class)
    index = [train, chosen, rest]
    if own_test:
        index = [np.concatenate([train, rest]), chosen, np.arange(len(parts[1][0]))]

    def part(owner: tuple[SparseRows, Tensor | None], numbers: np.ndarray) -> Split:
        where = torch.from_numpy(numbers)
        return Split(
            cast(Tensor, owner[0]), None if owner[1] is None else owner[1][where], rows=where
        )

    empty = f"; {dropped} empty documents dropped" if dropped else ""
    what = "validation" if own_test else "split"
    how = "at random" if labels is None else "at random by class"
    return Dataset(
        name,
        part(parts[0], index[0]),
        part(parts[0], index[1]),
        part(parts[-1], index[2]),
        support=support,
        shape=(int(rows.shape[1]),),
        num_classes=None if labels is None else int(labels.max()) + 1,
        source=f"{source}{empty}; {what} {how}, seed {seed}",
        vocabulary=None if vocabulary is None else tuple(vocabulary),
    )


def checked_counts(counts: Any, name: str) -> SparseRows:
    """Sparse rows, if they are whole numbers and none is negative."""
    import scipy.sparse

    if not scipy.sparse.issparse(counts):
        counts = np.asarray(counts.detach().cpu() if isinstance(counts, Tensor) else counts)
    if len(counts.shape) != 2 or counts.dtype.kind not in "biuf":
        raise ValueError(f"{name} holds {counts.dtype} of shape {counts.shape}: give counts (N, V)")
    values = counts.data if scipy.sparse.issparse(counts) else counts
    bad = ~(np.isfinite(values) & (values >= 0) & (values == np.round(values)))
    if bad.any():
        seen = f"{bad.sum()} values that are NaN, negative or not whole"
        example = f"such as {values[bad].flat[0]:g}"
        raise ValueError(f"{name} has {seen}, {example}: give counts, not tf-idf or shares")
    if (lost := changed(values)).any():
        first = values[lost].flat[0]
        warnings.warn(
            f"{name} has {lost.sum()} counts that {torch.get_default_dtype()} does not hold, such "
            f"as {int(first)}, kept as {int(first.astype(float_type()))}; for whole numbers above "
            "2**24 call torch.set_default_dtype(torch.float64) before all else",
            PrecisionWarning,
            stacklevel=3,
        )
    return SparseRows(counts)


def drop_empty(rows: SparseRows, y: Any, name: str = "y") -> tuple[SparseRows, Tensor | None]:
    """Only the documents with a word, and their labels."""
    if y is not None and np.shape(y) != (len(rows),):
        cure = f"give one label per document, ({len(rows)},)"
        raise ValueError(f"{name} has shape {tuple(np.shape(y))}: {cure}")
    labels = None if y is None else class_labels(y, name)
    kept = np.flatnonzero(np.asarray(rows.matrix.sum(1)).ravel() > 0)
    if not len(kept):
        raise ValueError("no document has a word: count them with another vocabulary")
    if len(kept) == len(rows):
        return rows, labels
    return SparseRows(rows.matrix[kept]), None if labels is None else labels[torch.from_numpy(kept)]


def check_vocabulary(vocabulary: Sequence[str], width: int) -> None:
    """Raise ``ValueError`` unless there is one word for each column, none twice."""
    if len(vocabulary) != width:
        seen = f"vocabulary has {len(vocabulary)} words and counts {width} columns"
        raise ValueError(f"{seen}: give the vocabulary that the documents were counted with")
    if len(set(vocabulary)) != width:
        twice = next(word for word in vocabulary if list(vocabulary).count(word) > 1)
        raise ValueError(f"the word {twice!r} is in vocabulary twice: add up its columns")
