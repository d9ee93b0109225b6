"""Loaders of published data sets, on small files made here, and on the real ones if at hand."""

import functools
import gc
import gzip
import hashlib
import http.server
import io
import threading
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.io
import scipy.sparse
import torch

from ppvae import data
from ppvae.data import binary_images, fetch, har, text


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and no network."""
    monkeypatch.setenv("PPVAE_DATA", str(tmp_path))
    nowhere = dict.fromkeys(fetch.URLS, "http://127.0.0.1:9/")
    monkeypatch.setattr(fetch, "URLS", nowhere)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path


def put(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


NAMES = ["binarized_mnist", "omniglot", "har", "20newsgroups"]


@pytest.mark.parametrize("name", NAMES)
def test_without_the_file_and_the_network_the_cure_is_said(name, cache):
    with pytest.raises(ConnectionError, match=r"(?s)Put the file there .*PPVAE_DATA"):
        data.load(name)


# ------------------------------------------------------------------------------ downloads


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web site with the folder `site`, and an empty cache."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    folder = tmp_path / "site"
    folder.mkdir()
    server = http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder))
    )
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("PPVAE_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    here = dict.fromkeys(fetch.URLS, f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(fetch, "URLS", here)
    yield folder
    server.shutdown()
    server.server_close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_a_download_is_checked_by_sha256(site, monkeypatch):
    digest = put(site / "vocab.new", b"a 0\n")
    monkeypatch.setitem(fetch.SHA256, "20news/vocab.new", digest)
    assert fetch.fetch("20news", "vocab.new").read_bytes() == b"a 0\n"
    put(data.cache_folder() / "20news" / "vocab.new", b"b 0\n")
    with pytest.raises(ValueError, match=r"corrupt \(sha256 .*delete it"):
        fetch.fetch("20news", "vocab.new")
    monkeypatch.setitem(fetch.SHA256, "20news/test.feat", digest)
    put(site / "test.feat", b"other")
    with pytest.raises(ValueError, match="not kept"):
        fetch.fetch("20news", "test.feat")
    assert not (data.cache_folder() / "20news" / "test.feat").exists()


def test_a_name_with_blanks_is_downloaded_whole(site, monkeypatch):
    monkeypatch.setattr(har, "COUNTS", {"train": (2, 1), "test": (1, 1)})
    put(site / "UCI HAR Dataset.zip", har_zip())
    assert len(data.load("har", num_valid=1).train) == 2
    assert (data.cache_folder() / "har" / "UCI HAR Dataset.zip").is_file()


# ------------------------------------------------------------------------------ 20 Newsgroups

FEAT = {
    "train": "1 1:2 3:1\n1 2:1\n1 \n1 1:1 2:3\n",
    "test": "1 3:4\n1 \n",
    "vocab": "a 0\nb 0\nc 0\n",
}


def put_news(cache, monkeypatch, zipped=False, **changed):
    files = FEAT | changed
    for part, name in (("train", "train.feat"), ("test", "test.feat"), ("vocab", "vocab.new")):
        content = files[part].encode()
        monkeypatch.setitem(fetch.SHA256, f"20news/{name}", hashlib.sha256(content).hexdigest())
        if zipped:
            put(cache / "20news" / f"{name}.gz", gzip.compress(content))
        else:
            put(cache / "20news" / name, content)


@pytest.mark.parametrize("zipped", [False, True])
def test_newsgroups_clean(cache, monkeypatch, zipped):
    put_news(cache, monkeypatch, zipped)
    news = data.load("20newsgroups", num_valid=1)
    assert (len(news.train), len(news.valid), len(news.test)) == (2, 1, 1)
    assert "2 empty documents dropped" in news.source
    assert news.vocabulary == ("a", "b", "c") and news.support == "counts" and news.shape == (3,)
    rows = torch.cat([news.train.x, news.valid.x]).tolist()
    assert sorted(rows) == [[0, 1, 0], [1, 3, 0], [2, 0, 1]]
    assert news.test.x.tolist() == [[0, 0, 4]]


def test_newsgroups_that_do_not_fit(cache, monkeypatch):
    put_news(cache, monkeypatch, vocab="a 0\nb 0\n")
    with pytest.raises(ValueError, match="word numbers from 1 to 3, and the vocabulary 2 words"):
        data.load("20newsgroups", num_valid=1)
    put_news(cache, monkeypatch, train="1 0:2\n1 1:1")
    with pytest.raises(ValueError, match="from 0 to 1"):
        data.load("20newsgroups", num_valid=1)
    put_news(cache, monkeypatch, zipped=True)
    put(cache / "20news" / "train.feat.gz", gzip.compress(b"1 1:2\n"))
    with pytest.raises(ValueError, match="sha256 of its contents"):
        data.load("20newsgroups")
    with pytest.raises(ValueError, match="version='raw' is unknown"):
        data.load("20newsgroups", version="raw")


def test_newsgroups_of_scikit_learn(cache, monkeypatch):
    posts = {
        "train": ["gun law gun", "the", "space orbit", "orbit moon orbit", "law court"] * 2,
        "test": ["law law zebra", "zebra"],
    }
    asked = []

    def fetcher(data_home, subset, remove):
        asked.append(remove)
        return SimpleNamespace(data=posts[subset], target=np.arange(len(posts[subset])) % 2)

    monkeypatch.setattr("sklearn.datasets.fetch_20newsgroups", fetcher)
    news = data.load("20newsgroups", version="sklearn", num_words=4, num_valid=2)
    assert asked == [("headers", "footers", "quotes")] * 2
    assert set(news.vocabulary) >= {"gun", "law", "orbit"} and len(news.vocabulary) == 4
    assert news.num_classes == 2 and news.test.y.tolist() == [0]
    assert len(news.train) + len(news.valid) == 8  # "the" is a stop word
    assert "3 empty documents dropped" in news.source

    def offline(**options):
        raise OSError("no route to host")

    monkeypatch.setattr("sklearn.datasets.fetch_20newsgroups", offline)
    with pytest.raises(ConnectionError, match=r"no route to host.*PPVAE_DATA"):
        data.load("20newsgroups", version="sklearn")


def have(*files):
    return pytest.mark.skipif(
        not all((data.cache_folder() / file).is_file() for file in files),
        reason=f"{files[0]} is not in the cache folder",
    )


@have("20news/train.feat.gz", "20news/test.feat.gz", "20news/vocab.new")
def test_the_real_newsgroups():
    news = data.load("20newsgroups")
    assert (len(news.train), len(news.valid), len(news.test)) == (10_258, 1_000, 7_487)
    words = [part.values.matrix.sum() for part in (news.train, news.test)]
    assert words == [991_493, 629_312]
    assert len(news.vocabulary) == 1995 and news.vocabulary[1:4] == ("write", "one", "use")
    assert (news.test.x.sum(1) > 0).all()


# ------------------------------------------------------------------------------ RCV1


def test_rcv1(monkeypatch, cache):
    """40 stories of 9 stems; two have two roots, one has none of the common stems."""
    rng = np.random.default_rng(0)
    tfidf = rng.random((40, 9)) * (rng.random((40, 9)) < 0.5)
    tfidf[:, 8] = 0.1 * (np.arange(40) == 5)  # a rare stem
    tfidf[5, :8] = 0
    labels = np.zeros((40, 6), int)
    roots = np.arange(40) % 4
    names = np.array(["C11", "CCAT", "ECAT", "G1", "GCAT", "MCAT"])
    columns = np.array([1, 2, 4, 5])
    labels[np.arange(40), columns[roots]] = 1
    labels[[3, 8], 4], labels[[3, 8], 1] = 1, 1
    labels[:, 0] = 1  # no root
    bunch = SimpleNamespace(
        data=scipy.sparse.csr_matrix(tfidf), target=scipy.sparse.csr_matrix(labels),
        target_names=names,
    )  # fmt: skip
    monkeypatch.setattr(text, "RCV1_SHAPE", (40, 9))
    monkeypatch.setattr("sklearn.datasets.fetch_rcv1", lambda data_home: bunch)
    single = labels[:, columns].sum(1) == 1
    news = data.load("rcv1", num=None, num_words=4)
    assert f"{single.sum()} of {single.sum()} stories" in news.source
    assert "empty documents dropped" in news.source  # the one with the rare stem at least
    rows = torch.cat([part.x for part in (news.train, news.valid, news.test)])
    y = torch.cat([part.y for part in (news.train, news.valid, news.test)])
    torch.testing.assert_close((rows**2).mean(1), torch.ones(len(rows)))  # length sqrt(4)
    common = np.sort(np.argsort(-(tfidf[single] > 0).sum(0), kind="stable")[:4])
    kept = tfidf[single][:, common]
    expected = {
        (tuple(np.round(2 * row / np.linalg.norm(row), 4)), label)
        for row, label in zip(kept, roots[single], strict=True)
        if row.any()
    }
    assert {
        (tuple(np.round(row.double().numpy(), 4)), label)
        for row, label in zip(rows, y.tolist(), strict=True)
    } == expected
    assert news.num_classes == 4 and news.support == "real"

    few = data.load("rcv1", num=20, num_words=9)
    assert [len(part) for part in (few.train, few.valid, few.test)] == [16, 2, 2]
    with pytest.raises(ValueError, match="num=39, and 38 stories"):
        data.load("rcv1", num=39)
    monkeypatch.setattr(text, "RCV1_SHAPE", (41, 9))
    with pytest.raises(ValueError, match=r"scikit_learn has .*delete it"):
        data.load("rcv1")


# ------------------------------------------------------------------------------ HAR


def har_zip(nested=False, change=None):
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for part, y in (("train", [2, 1, 1]), ("test", [1, 2])):
            x = rng.uniform(-1, 1, (len(y), 561))
            if change == "range" and part == "test":
                x[0, 0] = 1.5
            table = "\n".join("  ".join(f"{v:.7e}" for v in row) for row in x)
            file.writestr(f"UCI HAR Dataset/{part}/X_{part}.txt", table)
            y = [1, 1] if change == "labels" and part == "test" else y
            file.writestr(f"UCI HAR Dataset/{part}/y_{part}.txt", "\n".join(map(str, y)))
    if not nested:
        return buffer.getvalue()
    outer = io.BytesIO()
    with zipfile.ZipFile(outer, "w") as file:
        file.writestr("UCI HAR Dataset.zip", buffer.getvalue())
    return outer.getvalue()


@pytest.mark.parametrize("nested", [False, True])
def test_har(cache, monkeypatch, nested):
    monkeypatch.setattr(har, "COUNTS", {"train": (2, 1), "test": (1, 1)})
    put(cache / "har" / "UCI HAR Dataset.zip", har_zip(nested))
    dataset = data.load("har", num_valid=1)
    assert (len(dataset.train), len(dataset.valid), len(dataset.test)) == (2, 1, 2)
    assert dataset.shape == (561,) and dataset.num_classes == 2 and dataset.support == "real"
    assert dataset.test.y.tolist() == [0, 1]
    assert sorted([*dataset.train.y.tolist(), *dataset.valid.y.tolist()]) == [0, 0, 1]


def test_har_that_is_not(cache, monkeypatch):
    path = cache / "har" / "UCI HAR Dataset.zip"
    put(path, har_zip())
    with pytest.raises(ValueError, match=r"\(3, 561\) and \[2, 1\] rows .*1226"):
        data.load("har")
    monkeypatch.setattr(har, "COUNTS", {"train": (2, 1), "test": (1, 1)})
    for content in (har_zip(change="range"), har_zip(change="labels"), b"no zip", har_zip()[:-99]):
        put(path, content)
        with pytest.raises(ValueError, match=r"is not the UCI HAR data set.*delete it"):
            data.load("har", num_valid=1)


def test_the_published_sizes_of_har():
    assert [sum(har.COUNTS[part]) for part in ("train", "test")] == [7352, 2947]


# ------------------------------------------------------------------------------ binary images


def put_omniglot(cache, rows=(30, 8), **changed):
    rng = np.random.default_rng(0)
    one_hot = [np.eye(50)[rng.integers(50, size=n)].T for n in rows]
    content = {
        "data": rng.random((784, rows[0])), "testdata": rng.random((784, rows[1])),
        "target": one_hot[0], "testtarget": one_hot[1],
    } | changed  # fmt: skip
    (cache / "omniglot").mkdir(exist_ok=True)
    scipy.io.savemat(cache / "omniglot" / "chardata.mat", content)
    return content


def test_omniglot(cache, monkeypatch):
    monkeypatch.setattr(binary_images, "OMNIGLOT_ROWS", (30, 8))
    monkeypatch.setattr(binary_images, "OMNIGLOT_VALID", 5)
    content = put_omniglot(cache)
    characters = data.load("omniglot", binarize=None)
    assert [len(p) for p in (characters.train, characters.valid, characters.test)] == [25, 5, 8]
    # as IWAE's code does it: Fortran order turns the images, RandomState(123) permutes the rows
    turned = content["data"].T.reshape((-1, 28, 28)).reshape((-1, 784), order="F")
    permuted = turned[np.random.RandomState(123).permutation(30)]
    found = torch.cat([characters.train.x, characters.valid.x])
    torch.testing.assert_close(found, torch.tensor(permuted).float())
    assert characters.test.y.tolist() == content["testtarget"].argmax(0).tolist()
    assert characters.num_classes == 50 and characters.support == "unit_interval"
    images = data.load("omniglot", flatten=False)
    assert images.train.x.shape == (25, 1, 28, 28) and images.support == "binary"
    assert torch.equal(images.test.values.flatten(1), characters.test.x)


def test_omniglot_that_is_not(cache, monkeypatch):
    put_omniglot(cache)
    with pytest.raises(ValueError, match="24345 rows of 784"):
        data.load("omniglot")
    monkeypatch.setattr(binary_images, "OMNIGLOT_ROWS", (30, 8))
    for changed in ({"data": 2 * np.ones((784, 30))}, {"target": np.ones((50, 30))}):
        put_omniglot(cache, **changed)
        with pytest.raises(ValueError, match="is not IWAE's chardata"):
            data.load("omniglot")
    scipy.io.savemat(cache / "omniglot" / "chardata.mat", {"other": np.ones(3)})
    with pytest.raises(ValueError, match="is not IWAE's chardata"):
        data.load("omniglot")
    put(cache / "omniglot" / "chardata.mat", b"not a mat file")
    with pytest.raises(ValueError, match="is not IWAE's chardata"):
        data.load("omniglot")


def amat(bits):
    return "".join(" ".join(map(str, row)) + "\n" for row in bits).encode()


def test_binarized_mnist(cache, monkeypatch):
    rows = {"train": 5, "valid": 2, "test": 3}
    monkeypatch.setattr(binary_images, "MNIST_ROWS", rows)
    rng = np.random.default_rng(0)
    bits = {part: rng.integers(2, size=(n, 784)) for part, n in rows.items()}
    for part, x in bits.items():
        file = f"binarized_mnist_{part}.amat"
        digest = put(cache / "binarized_mnist" / file, amat(x))
        monkeypatch.setitem(fetch.SHA256, f"binarized_mnist/{file}", digest)
    mnist = data.load("binarized_mnist")
    for part, x in bits.items():
        assert getattr(mnist, part).x.int().tolist() == x.tolist()
        assert torch.equal(getattr(mnist, part).draw(3), getattr(mnist, part).x)
    assert mnist.support == "binary" and mnist.train.y is None
    assert data.load("binarized_mnist", flatten=False).test.x.shape == (3, 1, 28, 28)
    with pytest.raises(ValueError, match="needs grey levels"):
        data.load("binarized_mnist", binarize="dynamic")

    file = "binarized_mnist_test.amat"
    for content in (amat(bits["test"])[:-2], amat(2 * bits["test"]), b""):
        digest = put(cache / "binarized_mnist" / file, content)
        monkeypatch.setitem(fetch.SHA256, f"binarized_mnist/{file}", digest)
        with pytest.raises(ValueError, match="3 lines of 784 were expected"):
            data.load("binarized_mnist")
