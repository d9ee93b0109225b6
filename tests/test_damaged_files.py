"""Files and downloads that are damaged, foreign or hostile: an error with the file and a cure."""

import functools
import gc
import gzip
import http.server
import io
import struct
import threading
import warnings
import zipfile
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from ppvae import data
from ppvae.data import bounded, fetch

ROWS = np.random.default_rng(0).random((60, 5))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def npz(name="x", compress=False, **arrays):
    buffer = io.BytesIO()
    (np.savez_compressed if compress else np.savez)(buffer, **(arrays or {name: ROWS}))
    return buffer.getvalue()


def zipped(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/"), content)
    return buffer.getvalue()


def npy(shape, descr="<f8", content=b""):
    """An .npy file whose header says this shape, whatever follows."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def harmed(content, at=slice(60, 90)):
    raw = bytearray(content)
    raw[at] = bytes(len(raw[at]))
    return bytes(raw)


HUGE = zipped(**{"x.npy": npy((10**15,), content=bytes(10**6))})
CASES = {
    "latin.csv": ("a,é\n".encode("latin1") + b"1,2\n" * 20, "codec can't decode.*in UTF-8"),
    "cell.csv": (b'"' + b"1" * 200_000 + b'",2\n' * 2, "cell|infinite"),
    "word.csv": (b"1,2\n" + b"x" * 200_000 + b",2\n", r"holds '[x]{59}\.\.\. \(200,002 char"),
    "nul.csv": (b"\x00" * 999, ""),
    "short.csv": (b"1,2\n3,4\n", "3 rows|train needs"),
    "damaged.npz": (harmed(npz(compress=True)), "Give the keys"),
    "cut.npz": (npz()[:-60], "not a zip file"),
    "sum.npz": (harmed(npz(), slice(500, 501)), "CRC"),
    "claims.npz": (HUGE, r"'x' says 1,000,000,000,000,000 values of float64, and has 1,000,000"),
    "overflow.npz": (zipped(**{"x.npy": npy((2**62, 2**62))}), "values of float64, and has 0"),
    "objects.npz": (npz(x=np.array([{}], object)), "pickled objects"),
    "header.npz": (zipped(**{"x.npy": b"\x93NUMPY\x01\x00\xff\xff{'descr"}), ""),
    "version.npz": (zipped(**{"x.npy": b"\x93NUMPY\x09\x00"}), r"version \(9, 0\)"),
    "nan.npz": (npz(x=ROWS * np.nan), "NaN"),
    "one.npz": (npy((3,), content=bytes(24)), "one nameless array"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_damaged_table_is_named_with_a_cure(name, tmp_path):
    content, match = CASES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=rf"(?s){name}.*({match})") as caught:
        data.load(path)
    assert len(str(caught.value)) < 900


def test_sizes_are_looked_at_before_anything_is_allocated(tmp_path, monkeypatch):
    path = write(tmp_path / "large.npz", npz())
    monkeypatch.setattr(bounded, "memory", lambda: 1000.0)
    with pytest.raises(ValueError, match=r"large\.npz.*'x' takes 2.53e\+03 bytes, and the memory"):
        data.load(path)
    csv = write(tmp_path / "large.csv", b"1,2\n" * 500)
    with pytest.raises(ValueError, match=r"large\.csv.*the memory has 1e\+03"):
        data.load(csv)
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match=r"1 images of size=\(100000, 100000\) takes 5e\+10"):
        data.from_images(tmp_path, size=(100_000, 100_000))
    info = zipfile.ZipFile(path).getinfo("x.npy")
    assert info.file_size < bounded._DEFLATE * info.compress_size


def test_a_directory_that_lies_about_sizes_is_refused(tmp_path):
    raw = bytearray(npz(compress=True))
    entry = raw.rindex(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = struct.pack("<I", 2**31)  # the unpacked size
    path = write(tmp_path / "lies.npz", bytes(raw))
    with pytest.raises(ValueError, match=r"lies\.npz.*'x' states 2,147,483,648 bytes, which is"):
        data.load(path)


@pytest.mark.parametrize("how", ["limit", "cut", "junk", "sixteen bits"])
def test_images_that_cannot_be_read(how, tmp_path, monkeypatch):
    path = tmp_path / "pictures" / "one.png"
    path.parent.mkdir()
    Image.fromarray(np.zeros((20, 20), np.uint16 if how == "sixteen bits" else np.uint8)).save(path)
    if how == "limit":  # the real one takes a second to write
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    if how == "cut":
        write(path, path.read_bytes()[:-25])
    if how == "junk":
        write(path, b"\x89PNG\r\n\x1a\n" + bytes(50))
    with pytest.raises(
        ValueError, match=r"cannot read .*one\.png.*8-bit PNG, of less than 178 mil"
    ):
        data.load(path.parent)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPVAE_DATA", str(tmp_path))
    return tmp_path


HAR = {f"UCI HAR Dataset__train__{kind}_train.txt": "1 2 3\n" * 900 for kind in "Xy"}
NAMED = {
    "20newsgroups": ("20news/vocab.new.gz", gzip.compress(b"word\n" * 999)[:-9]),
    "freyfaces": ("freyfaces/freyfaces.npz", b"junk"),
    "har": ("har/UCI HAR Dataset.zip", harmed(zipped(**HAR), slice(70, 75))),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_damaged_data_set_in_the_cache_is_named(name, cache):
    where, content = NAMED[name]
    write(cache / where, content)
    with pytest.raises(ValueError, match=rf"{where.split('/')[1]}.*(again|Replace it)"):
        data.load(name)


def test_what_unpacks_to_too_much_is_refused_before_it_is(cache, monkeypatch):
    monkeypatch.setattr("ppvae.data.text.MOST_OF_A_DATA_SET", 5000)
    monkeypatch.setattr("ppvae.data.har.MOST_OF_A_DATA_SET", 5000)
    write(cache / "20news/vocab.new.gz", gzip.compress(bytes(10**6)))
    with pytest.raises(ValueError, match=r"vocab\.new\.gz.*unpacks to more than 5,000 bytes"):
        data.load("20newsgroups")
    write(cache / "har/UCI HAR Dataset.zip", zipped(**HAR))
    with pytest.raises(ValueError, match=r"would unpack to 5,400 bytes, and 5,000 are the most"):
        data.load("har")
    nested = zipped(**{"UCI HAR Dataset.zip": zipped(**HAR) + bytes(9000)})
    write(cache / "har/UCI HAR Dataset.zip", nested)
    with pytest.raises(ValueError, match=r"UCI HAR Dataset\.zip in it would unpack"):
        data.load("har")


def test_a_matlab_file_is_measured_element_by_element(tmp_path):
    def mat(*contents):
        packed = [zlib.compress(content) for content in contents]
        parts = [struct.pack("<II", 15, len(part)) + part for part in packed]
        return write(tmp_path / "a.mat", bytes(128) + b"".join(parts))

    bounded.check_mat(mat(bytes(5000), bytes(4999)), 10_000)
    bounded.check_mat(write(tmp_path / "b.mat", bytes(131)), 0)
    for contents in ([bytes(10**6)], [bytes(6000), bytes(6000)]):
        with pytest.raises(ValueError, match="more than 10,000 bytes"):
            bounded.check_mat(mat(*contents), 10_000)


# -- downloads -----------------------------------------------------------------------------------


@pytest.fixture
def site(cache, monkeypatch):
    """A web site that answers what a dictionary of paths says, and a cache without files."""
    answers = {}

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers[self.path]
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            for piece in body:
                self.wfile.write(piece)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setitem(fetch.URLS, "har", f"http://127.0.0.1:{server.server_port}/")
    yield answers
    server.shutdown()
    server.server_close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def test_downloads_follow_http_only_and_end(site, cache, monkeypatch):
    secret = write(cache / "secret", b"secret")
    to = "/file"
    ask = functools.partial(fetch.fetch, "har", "file")
    for where in (secret.as_uri(), "ftp://127.0.0.1/x", "gopher://127.0.0.1"):
        site[to] = (302, {"Location": where}, [])
        with pytest.raises(ConnectionError, match=r"har/file is not there.*Put the file there"):
            ask()
    site[to] = (302, {"Location": to}, [])  # in a circle
    with pytest.raises(ConnectionError, match="could not be saved there"):
        ask()
    monkeypatch.setattr(fetch, "MOST_OF_A_DOWNLOAD", 10**5)
    site[to] = (200, {}, (bytes(2**16) for _ in range(100)))  # no size is stated
    with pytest.raises(ConnectionError, match="more than 100,000 bytes"):
        ask()
    site[to] = (200, {"Content-Length": "999"}, [b"short"])
    with pytest.raises(ConnectionError, match="could not be saved there"):
        ask()
    assert not (cache / "har").exists()  # nothing was kept, nor a folder for it
    site["/other"] = (200, {}, [b"right"])
    site[to] = (302, {"Location": "/other"}, [])
    assert ask().read_bytes() == b"right"
    for url in ("file:///etc/passwd?", "ftp://x/", "doi:10.5281/x/"):
        monkeypatch.setitem(fetch.URLS, "omniglot", url)
        with pytest.raises(ConnectionError, match="neither http nor https"):
            fetch.fetch("omniglot", "file")


# -- arrays --------------------------------------------------------------------------------------


def test_a_masked_array_is_refused_and_one_that_hides_nothing_is_taken():
    hidden = np.ma.masked_equal(np.where(ROWS < 0.2, -999.0, ROWS), -999.0)
    count = int((ROWS < 0.2).sum())
    with pytest.raises(ValueError, match=rf"x is a masked array.*{count} of.*x\.filled\(np\.nan\)"):
        data.from_arrays(hidden)
    with pytest.raises(ValueError, match="y is a masked array"):
        data.from_arrays(ROWS, np.ma.masked_less(np.arange(60) % 3, 1))
    assert len(data.from_arrays(np.ma.asarray(ROWS)).train) == 48


@pytest.mark.parametrize(
    ("y", "match"),
    [
        (pd.Series(["cat", "dog"] * 30), r"y holds words.*np\.unique\(y, return_inverse=True\)"),
        (pd.Series(["cat", "dog"] * 30, dtype="category"), "y holds words"),
        (pd.Series([1, None] * 30, dtype="Int64"), "y has 30 NaN or infinite values"),
        (np.array(["cat", "dog"] * 30), "y holds words"),
        (np.array([{}, 3] * 30), "y holds object: give real numbers"),
    ],
)
def test_labels_that_are_no_numbers_are_named(y, match):
    with pytest.raises((TypeError, ValueError), match=match):
        data.from_arrays(ROWS, y)


def test_categories_of_numbers_and_nullable_numbers_without_gaps_are_labels():
    for y in (pd.Series([0, 1] * 30, dtype="category"), pd.Series([0, 1] * 30, dtype="Int64")):
        assert data.from_arrays(ROWS, y).num_classes == 2


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("kind", ["sparse", "meta", "quantised", "gradient", "inference"])
def test_tensors_of_odd_kinds_are_taken_or_named(kind):
    x = torch.from_numpy(ROWS).float()
    if kind == "gradient":
        assert not data.from_arrays(x.requires_grad_()).train.x.requires_grad
        return
    if kind == "inference":
        with torch.inference_mode():
            x = x.clone()
        assert len(data.from_arrays(x).train) == 48
        return
    odd = {
        "sparse": lambda: x.to_sparse(),
        "meta": lambda: x.to("meta"),
        "quantised": lambda: torch.quantize_per_tensor(x, 0.1, 0, torch.quint8),
    }[kind]()
    with pytest.raises(TypeError, match="x is a tensor without a dense block of numbers"):
        data.from_arrays(odd)
