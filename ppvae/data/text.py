"""Documents: 20 Newsgroups as counts, and the REUTERS-10K subset of RCV1 as tf-idf."""

from __future__ import annotations

import gzip
import hashlib
from typing import Any

import numpy as np

from ppvae.data.bounded import MOST_OF_A_DATA_SET, reading, unpacked
from ppvae.data.dataset import Dataset
from ppvae.data.fetch import SHA256, broken, cache_folder, fetch
from ppvae.data.sparse import (
    SparseRows,
    check_vocabulary,
    checked_counts,
    drop_empty,
    split_counts,
)
from ppvae.data.split import check_choice

RCV1_SHAPE = (804_414, 47_236)
ROOTS = ("CCAT", "ECAT", "GCAT", "MCAT")  # corporate, economics, government, markets


def newsgroups(
    version: str = "clean", num_valid: int = 1000, num_words: int = 2000, seed: int = 0
) -> Dataset:
    """20 Newsgroups as bags of words, kept sparse until a batch is made.

    The vocabulary decides a perplexity, so numbers on the two versions do not compare, nor with
    those of Miao et al. (2016), whose 2,000 words are a third.

    Args:
        version: "clean": the counts of Srivastava and Sutton (2017), 1,995 words of which the
            first, ``_eos_``, never occurs; 11,258 and 7,487 documents, after one empty document of
            each part is dropped; no labels. "sklearn": scikit-learn's download, headers, footers
            and quotations removed, its ``num_words`` most frequent words of the training part but
            for English stop words; labels are the 20 groups.
        num_valid: training documents taken for validation.
        num_words: size of the vocabulary, for "sklearn".
        seed: of the choice of the validation documents, 0 or more.

    Raises:
        ValueError: an unknown version, a corrupt file, or one that does not fit its vocabulary.
        ConnectionError: a file is not in the cache and cannot be downloaded.

    "clean" is read from ``20news/`` in the cache (``train.feat``, ``test.feat``, plain or with .gz,
    and ``vocab.new``) and downloaded if it is not there; SHA-256 of the contents are checked.
    scikit-learn checks its own download, and keeps it pickled. No licence is stated.

    Source: Lang (1995), http://qwone.com/~jason/20Newsgroups/
    """
    check_choice("version", version, ("clean", "sklearn"))
    if version == "clean":
        words = [line.split()[0] for line in _text("vocab.new").splitlines()]
        raw = [_feat(_text(f"{part}.feat"), len(words), part) for part in ("train", "test")]
        labels: list[Any] = [None, None]
        source = "counts of Srivastava and Sutton (2017), arXiv:1703.01488"
    else:
        raw, labels, words = _from_sklearn(num_words)
        source = f"scikit-learn's download, without headers, footers, quotations; {num_words} words"
    check_vocabulary(words, raw[0].shape[1])
    parts = [drop_empty(rows, y) for rows, y in zip(raw, labels, strict=True)]
    dropped = sum(map(len, raw)) - sum(len(rows) for rows, _ in parts)
    cite = f"Lang (1995), http://qwone.com/~jason/20Newsgroups/; {source}"
    return split_counts(parts, words, num_valid, 0, seed, "20newsgroups", cite, dropped)


def _text(file: str) -> str:
    """A file of the clean version, plain or gzipped in the cache, checked."""
    zipped = cache_folder() / "20news" / f"{file}.gz"
    if zipped.exists():
        with reading(zipped, "Delete it and try again"), gzip.open(zipped) as packed:
            content = unpacked(packed, MOST_OF_A_DATA_SET)
    else:
        content = _plain(file)
    published, found = SHA256[f"20news/{file}"], hashlib.sha256(content).hexdigest()
    if found != published:
        raise broken(zipped, f"is corrupt (sha256 of its contents {found}, not {published})")
    return content.decode()


def _plain(file: str) -> bytes:
    return fetch("20news", file).read_bytes()


def _feat(text: str, width: int, name: str) -> SparseRows:
    """Lines ``label index:count ...``, indices from 1."""
    import scipy.sparse

    indices, values, ends = [], [], [0]
    for line in text.splitlines():
        for pair in line.split()[1:]:
            index, _, count = pair.partition(":")
            indices.append(int(index) - 1)
            values.append(int(count))
        ends.append(len(indices))
    if indices and not 0 <= min(indices) <= max(indices) < width:
        found = f"word numbers from {min(indices) + 1} to {max(indices) + 1}"
        raise ValueError(f"{name}.feat has {found}, and the vocabulary {width} words, from 1 on")
    return SparseRows(scipy.sparse.csr_array((values, indices, ends), (len(ends) - 1, width)))


def _from_sklearn(num_words: int) -> tuple[list[SparseRows], list[np.ndarray], list[str]]:
    from sklearn import datasets
    from sklearn.feature_extraction.text import CountVectorizer

    remove = ("headers", "footers", "quotes")
    home = str(cache_folder() / "scikit_learn")
    bunches = [
        _downloaded(datasets.fetch_20newsgroups, data_home=home, subset=subset, remove=remove)
        for subset in ("train", "test")
    ]
    counter = CountVectorizer(
        max_features=num_words, stop_words="english", token_pattern="[a-z]{3,}"
    )
    counts = [counter.fit_transform(bunches[0].data), counter.transform(bunches[1].data)]
    words = counter.get_feature_names_out().tolist()
    return [checked_counts(part, "counts") for part in counts], [b.target for b in bunches], words


def rcv1(num: int | None = 10_000, num_words: int = 2000, seed: int = 0) -> Dataset:
    """REUTERS-10K: newswire stories of one root category each, as tf-idf of 2,000 words.

    Stories of RCV1-v2 with exactly one of the labels CCAT, ECAT, GCAT, MCAT (0 to 3), 685,071 of
    804,414 by Xie et al. (2016); a random ``num`` of them; the ``num_words`` words that occur in
    most of the stories with one root; each row scaled to length sqrt(num_words), so that its mean
    square is 1. Stories without a word are dropped. Rows stay sparse until a batch is made.

    The words' weights are those of the published vectors (log tf-idf over 47,236 stems), not made
    from counts as Xie et al. did, and the sample is another: accuracies are near theirs, not equal.

    Args:
        num: stories; None for all.
        num_words: words.
        seed: of the sample and of the split (80 / 10 / 10 by class), 0 or more.

    Raises:
        ValueError: the download is not RCV1-v2, or has fewer stories.
        ConnectionError: it is not in the cache and cannot be downloaded.

    The download, about 656 MB, and its checksums are scikit-learn's. For the terms of use see the
    paper's page.

    Source: Lewis, Yang, Rose and Li (2004), https://jmlr.csail.mit.edu/papers/volume5/lewis04a/
    """
    import scipy.sparse
    from sklearn import datasets

    home = cache_folder() / "scikit_learn"
    bunch = _downloaded(datasets.fetch_rcv1, data_home=str(home))
    names = list(bunch.target_names)
    if bunch.data.shape != RCV1_SHAPE or not set(ROOTS) <= set(names):
        raise broken(home, f"has an RCV1 of {bunch.data.shape}, not {RCV1_SHAPE}, or no {ROOTS}")
    roots = bunch.target.tocsc()[:, [names.index(root) for root in ROOTS]].toarray()
    single = np.flatnonzero(roots.sum(1) == 1)
    if num is not None and len(single) < num:
        raise ValueError(f"num={num}, and {len(single)} stories have one root category")
    matrix = bunch.data[single]
    frequency = np.bincount(matrix.indices, minlength=matrix.shape[1])
    words = np.sort(np.argsort(-frequency, kind="stable")[:num_words])
    rng = np.random.default_rng(seed)
    chosen = np.arange(len(single)) if num is None else rng.permutation(len(single))[:num]
    rows = scipy.sparse.csr_array(matrix[chosen][:, words])
    length = np.sqrt(np.asarray(rows.multiply(rows).sum(1))).ravel()
    scale = np.sqrt(len(words)) / np.where(length > 0, length, 1)
    sparse, y = drop_empty(
        SparseRows(rows.multiply(scale[:, None])), roots[single[chosen]].argmax(1)
    )
    cite = (
        "Lewis et al. (2004), RCV1-v2, https://jmlr.csail.mit.edu/papers/volume5/lewis04a/; "
        f"{len(chosen):,} of {len(single):,} stories with one root category; rows of length "
        f"sqrt({len(words)})"
    )
    dropped = len(chosen) - len(sparse)
    return split_counts([(sparse, y)], None, 0.1, 0.1, seed, "rcv1", cite, dropped, support="real")


def _downloaded(fetcher: Any, **options: Any) -> Any:
    """What a fetcher of scikit-learn returns; its network errors with the cure."""
    try:
        return fetcher(**options)
    except OSError as error:
        seen = f"scikit-learn's {fetcher.__name__} could not fill {options['data_home']}: {error}"
        cure = "Copy that folder from a machine with a network, or set PPVAE_DATA to where it is"
        raise ConnectionError(f"{seen}. {cure}") from error
