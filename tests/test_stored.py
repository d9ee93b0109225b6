"""Rows of files and stores: the order of windows, what is read, and runs that are killed."""

import functools
import itertools
import os
import random
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import ppvae
from ppvae import CheckpointError, Checkpoints, conditionals, data, guides, models, nets
from ppvae.data.columnar import Shards, stays
from ppvae.intake import for_training
from ppvae.processes import Processes
from ppvae.train.checkpoint import plain
from ppvae.train.sources import source

pytestmark = [
    pytest.mark.forks,
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata 0.11
]

N, D = 101, 4
RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (N, D), dtype=np.uint8)
X = (GREY > 127).astype(np.float32)
Y = RNG.integers(0, 3, N)
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def vae():
    torch.manual_seed(0)
    model = models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, D)), latent_dim=2)
    return ppvae.SVI(model, guides.Normal(nets.mlp(D, 8, 4)), ADAM)


def cvae():
    torch.manual_seed(0)
    likelihood = conditionals.Bernoulli(nets.mlp(2 + 3, 8, D))
    model = models.CVAE(likelihood, latent_dim=2, condition=nets.OneHot(3))
    return ppvae.SVI(model, guides.Normal(nets.mlp(D + 3, 8, 4), condition=nets.OneHot(3)), ADAM)


def fit(svi, train, **options):
    options = {"epochs": 3, "batch_size": 16, "progress": False, **options}
    torch.manual_seed(3)
    return ppvae.fit(svi, train, **options)


def numbers(history):
    return [{k: v for k, v in row.items() if "seconds" not in k} for row in history.rows]


class Chunks:
    """A user's own store: slices, and where its chunks begin. It notes what it is asked for."""

    def __init__(self, x, offsets):
        self.x, self.chunk_offsets, self.asked = x, np.asarray(offsets), []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, which):
        self.asked.append((which.start, which.stop))
        return self.x[which]


class Picks:
    """A user's own store that finds rows one by one; they must be asked for in their order."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        assert index.dtype == np.int64
        assert (np.diff(index) > 0).all()
        return {"x": self.x[index]}


def mapped(folder, array, name="x.npy"):
    np.save(folder / name, array)
    return np.load(folder / name, mmap_mode="r")


def h5(folder, chunks=(9, D)):
    h5py = pytest.importorskip("h5py")
    path = folder / f"x{chunks}.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("x", data=X, chunks=chunks)
    return h5py.File(path, "r")["x"]


def zarr_array(folder):
    zarr = pytest.importorskip("zarr")
    path = str(folder / "x.zarr")
    if not (folder / "x.zarr").exists():
        zarr.create_array(store=path, shape=X.shape, chunks=(9, D), dtype="float32")[:] = X
    return zarr.open_array(path, mode="r")


def table(x=X, y=Y):
    pa = pytest.importorskip("pyarrow")
    rows = pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), D)
    return pa.table({"y": y, "x": rows})


def parquet(folder):
    whole = table()
    import pyarrow.parquet as pq

    pq.write_table(whole, folder / "x.parquet", row_group_size=9)
    return pq.ParquetFile(folder / "x.parquet")


def folder_of_parquet(folder):
    """Three shards, of which the second is empty."""
    whole = table()
    import pyarrow.dataset
    import pyarrow.parquet as pq

    (folder / "shards").mkdir(exist_ok=True)
    for i, part in enumerate((whole.slice(0, 50), whole.slice(0, 0), whole.slice(50))):
        pq.write_table(part, folder / f"shards/{i}.parquet", row_group_size=9)
    return pyarrow.dataset.dataset(folder / "shards", format="parquet")


def hugging_face(**columns):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({k: v.tolist() for k, v in columns.items()})


def grey(folder):
    return data.Stored(
        mapped(folder, GREY),
        window=32,
        transform=lambda x: x / 255,
        binarize="dynamic",
        seed=5,
    )


# name -> what holds X (or X and Y), made anew in each life of a run
UNIFORM = {
    "mapped": lambda folder: mapped(folder, X),
    "index": lambda folder: data.Stored(Picks(X)),
    "shards": lambda folder: data.Stored(X[:40], X[:0], mapped(folder, X[40:])),
    "table": lambda folder: table().select(["x"]),
    "hugging_face": lambda folder: hugging_face(x=X),
}
WINDOWS = {
    "windows": lambda folder: data.Stored(mapped(folder, X), window=32),
    "own": lambda folder: data.Stored(Chunks(X, [0, 9, 30, 31, 80, N]), window=40),
    "h5": lambda folder: data.Stored(h5(folder), window=40),
    "zarr": lambda folder: data.Stored(zarr_array(folder), window=40),
}
LABELLED = {
    "tuple": lambda folder: (mapped(folder, X), Y),
    "dict": lambda folder: data.Stored({"y": Y, "x": Chunks(X, [0, 50, N])}, window=20),
    "columns": lambda folder: table(),
    "parquet": lambda folder: data.Stored(parquet(folder), window=40),
    "folder": lambda folder: data.Stored(folder_of_parquet(folder), window=40),
    "hugging_face_xy": lambda folder: hugging_face(x=X, y=Y),
}
ALL = {**UNIFORM, **WINDOWS, **LABELLED}


def prepared(name, folder):
    svi = cvae() if name in LABELLED else vae()
    return svi, for_training(ALL[name](folder), "data", 16, 0, svi.model, svi.guide)


# -- what is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_every_store_gives_the_rows_that_are_asked_for(name, tmp_path):
    _, stored = prepared(name, tmp_path)
    assert isinstance(stored, data.Stored)
    assert len(stored) == N
    part = stored[10:90]
    for rows, offset in ((stored, 0), (part, 10)):
        index = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))[:30]
        got = rows.present(*rows.read(index), epoch=1, key=0)
        assert torch.equal(got[0], torch.from_numpy(X)[index + offset])
        if name in LABELLED:
            assert torch.equal(got[1], torch.from_numpy(Y)[index + offset])
            assert got[1].dtype == torch.int64
    assert len(part) == 80
    assert len(part[:0]) == 0


@pytest.mark.parametrize("name", UNIFORM)
def test_rows_found_one_by_one_train_as_a_tensor_does(name, tmp_path):
    one, other = vae(), vae()
    expected = fit(one, torch.from_numpy(X), valid=X[:21])
    found = fit(
        other, UNIFORM[name](tmp_path), valid=data.Stored(mapped(tmp_path, X[:21], "v.npy"))
    )
    assert numbers(found) == numbers(expected)
    for p, q in zip(one.objective.parameters(), other.objective.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("name", ["tuple", "columns", "hugging_face_xy"])
def test_labels_stay_beside_their_rows(name, tmp_path):
    expected = fit(cvae(), (torch.from_numpy(X), torch.from_numpy(Y)))
    assert numbers(fit(cvae(), LABELLED[name](tmp_path))) == numbers(expected)


def test_a_mask_stays_beside_its_rows(tmp_path):
    def masked():
        torch.manual_seed(0)
        model = models.Masked(models.VAE(conditionals.Bernoulli(nets.mlp(2, 8, D)), latent_dim=2))
        return ppvae.SVI(model, guides.Normal(nets.Masked(nets.mlp(2 * D, 8, 4))), ADAM)

    observed = RNG.random(X.shape) < 0.7
    expected = fit(masked(), (torch.from_numpy(X), torch.from_numpy(observed)))
    found = fit(masked(), (mapped(tmp_path, X), mapped(tmp_path, observed, "m.npy")))
    assert numbers(found) == numbers(expected)


@pytest.mark.parametrize("name", ["windows", "own", "h5", "parquet"])
def test_epochs_differ_and_follow_the_seed(name, tmp_path):
    _, stored = prepared(name, tmp_path)
    order = [torch.cat([*stored.order(*key)]).tolist() for key in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert order[0] == order[1]
    assert len({tuple(o) for o in order}) == 3
    assert all(sorted(o) == list(range(N)) for o in order)


@pytest.mark.parametrize("wide", [2, 3, 7, 16])
def test_a_batch_mixes_a_window_and_each_chunk_is_read_once(wide):
    """20 chunks of 40 rows: the rows of a place are of w neighbours in the order of chunks."""
    store = Chunks(np.arange(800.0)[:, None], np.arange(0, 801, 40))
    stored = data.Stored(store, window=40 * wide)
    assert stored.in_window == wide
    places = [*stored.order(seed=3, epoch=2)]
    assert len(places) == 20 - wide + 1
    seen = [set((place // 40).tolist()) for place in places]
    assert all(len(chunks) == wide for chunks in seen)
    for one, other in itertools.pairwise(seen):
        assert len(one & other) == wide - 1  # one leaves, one enters
    assert sorted(torch.cat(places).tolist()) == list(range(800))
    # a chunk that is seen from w places has its rows spread evenly over them
    counts = torch.stack([(place // 40).bincount(minlength=20) for place in places])
    inner = counts[:, (counts > 0).sum(0) == min(wide, len(places))]
    assert inner[inner > 0].max() <= -(-40 // min(wide, len(places)))
    other = [set((place // 40).tolist()) for place in stored.order(seed=3, epoch=3)]
    assert other != seen
    store.asked.clear()
    cut = source("data", stored, 16, None, Processes(), False)
    batches = [batch for (batch,), _ in cut.epoch(3, 2)]
    assert torch.cat(batches).flatten().tolist() == torch.cat(places).tolist()
    assert sorted(store.asked) == [(i, i + 40) for i in range(0, 800, 40)]
    store.asked.clear()
    assert torch.cat([x for (x,) in cut.evaluation()]).flatten().tolist() == list(range(800))
    assert len(store.asked) <= 20
    # after a resume, nothing that came before is read
    store.asked.clear()
    later = [
        batch
        for (batch,), _ in source("data", stored[:], 16, None, Processes(), False).epoch(3, 2, 30)
    ]
    assert torch.equal(torch.cat(later), torch.cat(batches[30:]))
    needed = {int(row) // 40 for row in torch.cat(places)[30 * 16 :]}
    assert len(store.asked) == len(needed)


def test_where_rows_end_up_is_even_within_the_window():
    """Of each row inside, all w places are equally likely: counts over seeds, five errors wide."""
    stored = data.Stored(Chunks(np.zeros((60, 1)), np.arange(0, 61, 6)), window=18)
    epochs, counts = 400, torch.zeros(3)
    for epoch in range(1, epochs + 1):
        places = [*stored.order(0, epoch)]
        row = 31
        where = next(i for i, place in enumerate(places) if row in place)
        chunks = torch.stack([(place // 6 == row // 6).any() for place in places]).nonzero()
        if len(chunks) == 3:
            counts[where - int(chunks[0])] += 1
    share, total = counts / counts.sum(), counts.sum()
    assert ((share - 1 / 3).abs() < 5 * (2 / 9 / total).sqrt()).all()


def test_at_most_a_window_and_one_are_in_memory():
    stored = data.Stored(Chunks(np.arange(200.0)[:, None], np.arange(0, 201, 10)), window=50)
    cut = source("data", stored, 7, None, Processes(), False)
    for _ in cut.epoch(0, 1):
        assert len(stored._held) <= stored.in_window + 1 == 6


def test_small_chunks_are_read_together_and_large_ones_two_at_least():
    assert data.Stored(Chunks(X, np.arange(N + 1)), window=32).stretch == 2
    large = data.Stored(Chunks(X, [0, 50, N]), window=10)
    assert (large.in_window, large.stretch) == (2, 51)


@pytest.mark.parametrize("batch_size", [7, 16, 101, 500])
def test_batches_that_do_not_divide_and_more_than_all_rows(batch_size, tmp_path):
    stored = data.Stored(Chunks(X, [0, 30, 60, N]), window=60)
    cut = source("data", stored, batch_size, None, Processes(), False)
    sizes = [rows for _, rows in cut.epoch(0, 1)]
    assert sum(sizes) == N
    assert set(sizes[:-1]) <= {batch_size}
    assert fit(vae(), stored, batch_size=batch_size, valid=stored).rows[-1]["epoch"] == 3


def test_binarised_bytes_are_drawn_anew_and_repeat_themselves(tmp_path):
    stored = grey(tmp_path)
    rows = stored.read(torch.arange(N))
    draws = [stored.present(*rows, epoch=e, key=0)[0] for e in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert set(draws[0].unique().tolist()) == {0.0, 1.0}
    assert numbers(fit(vae(), stored, valid=stored)) == numbers(
        fit(vae(), grey(tmp_path), valid=grey(tmp_path))
    )
    with pytest.raises(ValueError, match=r"binarize='dynamic'\) must lie in \[0, 1\]"):
        fit(vae(), data.Stored(GREY, binarize="dynamic"))


def test_an_evaluator_takes_a_part(tmp_path):
    svi = vae()
    stored = data.Stored(mapped(tmp_path, X), window=32)
    one = ppvae.diagnose(svi.model, svi.guide, stored[5:25], num_particles=50, seed=0)
    other = ppvae.diagnose(svi.model, svi.guide, X[5:25], num_particles=50, seed=0)
    assert torch.equal(one.log_evidence, other.log_evidence)


def test_a_double_pair_keeps_float64(tmp_path):
    svi = vae()
    svi.objective.double()
    whole = mapped(tmp_path, X.astype(np.float64) / 3)
    stored = for_training(whole, "data", 16, 0, svi.model, svi.guide)
    assert stored.present(*stored.read(torch.arange(3)), epoch=1, key=0)[0].dtype == torch.float64


def test_columns_of_single_numbers_are_stacked_by_a_transform():
    columns = {name: X[:, i] for i, name in enumerate("abcd")}
    stored = data.Stored(columns, transform=lambda row: torch.stack(list(row.values()), 1))
    expected = fit(vae(), torch.from_numpy(X), seed=-2)
    assert numbers(fit(vae(), stored, seed=-2)) == numbers(expected)
    assert fit(vae(), data.Stored(X, window=32), seed=-2).rows


def test_numbers_of_other_kinds():
    for kind in ("uint16", "uint32", ">f4", "float16", "bool"):
        got = data.Stored(X.astype(kind), window=9).read(torch.tensor([5, 3]))[0]
        assert torch.equal(got.float(), torch.from_numpy(X)[[5, 3]])


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: data.Stored(), TypeError, "no rows: give an array"),
        (lambda: data.Stored(3), TypeError, "int is no store"),
        (lambda: data.Stored((X, Y[1:])), ValueError, r"have \[101, 100\] rows"),
        (lambda: data.Stored(X, window=0), ValueError, "window=0"),
        (lambda: data.Stored(X, binarize="static"), ValueError, "binarize='static' is unknown"),
        (lambda: data.Stored(Chunks(X, [0, 50, 30])), ValueError, "must ascend from 0 to 101"),
        (lambda: data.Stored(Chunks(X, [0, 500])), ValueError, "end at 500, and there are 101"),
        (lambda: data.Stored(X)[3], TypeError, r"consecutive rows, as in stored\[:1000\]"),
        (lambda: fit(vae(), data.Stored(X[:0])), ValueError, "data is empty"),
        (lambda: fit(vae(), data.Stored({"a": X})), TypeError, "its rows are a mapping of 'a'"),
        (lambda: fit(vae(), data.Stored(np.array(["a", "b"]))), TypeError, "the rows hold <U1"),
        (
            lambda: fit(vae(), data.Stored(X, transform=lambda x: x.numpy())),
            TypeError,
            "transform must give tensors, and gives ndarray",
        ),
    ],
)
def test_what_is_no_store_is_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_columns_with_gaps_or_of_several_lengths_are_refused():
    pa = pytest.importorskip("pyarrow")
    for column, words in (
        (pa.array([[1.0], None]), "column 'x' has 1 gaps"),
        (pa.array([[1.0], [1.0, 2.0]]), "lists of 1 to 2 numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            data.Stored(pa.table({"x": column})).read(torch.arange(2))


def test_lists_and_tensors_in_columns():
    pa = pytest.importorskip("pyarrow")
    images = np.arange(24.0).reshape(4, 2, 3)
    columns = {
        "lists": pa.array(images.tolist()),
        "tensors": pa.FixedShapeTensorArray.from_numpy_ndarray(images),
    }
    for column in columns.values():
        got = data.Stored(pa.table({"x": column}).slice(1)).read(torch.tensor([2, 0]))[0]
        assert torch.equal(got, torch.from_numpy(images[[3, 1]]))


def test_what_stays_where_it_is(tmp_path):
    whole = mapped(tmp_path, X)
    assert stays(whole)
    assert stays(whole[3:])
    assert stays(h5(tmp_path))
    assert not any(map(stays, (whole * 2, X, torch.from_numpy(X), "x.parquet", [X], {"x": X})))


def test_shards_pick_and_cut_alike():
    parts = [np.arange(5), np.arange(0), np.arange(5, 12)]
    both = Shards(parts)
    index = np.array([0, 4, 5, 11])
    assert both[index].tolist() == index.tolist()
    assert both[3:9].tolist() == [*range(3, 9)]
    one, other = Chunks(np.arange(5), [0, 2, 5]), Chunks(np.arange(5, 12), [0, 3, 7])
    assert Shards([one, np.arange(5, 12)]).chunk_offsets.tolist() == [0, 2, 5, 12]
    chunked = Shards([one, other])
    assert chunked.chunk_offsets.tolist() == [0, 2, 5, 8, 12]
    assert chunked[4:7].tolist() == [4, 5, 6]


class StopAt(ppvae.Callback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, svi, loss):
        if svi.num_steps == self.step:
            raise InterruptedError


@pytest.mark.parametrize("name", ["mapped", "windows", "own"])
def test_a_run_is_not_continued_with_a_changed_file(name, tmp_path):
    files = Checkpoints(tmp_path / "run", every_steps=2)
    train = ALL[name](tmp_path)
    with pytest.raises(InterruptedError):
        fit(vae(), train, checkpoint=files, callbacks=[StopAt(3)])
    del train
    other = X.copy()
    other[-1] = 1 - other[-1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "X", other)
        with pytest.raises(CheckpointError, match=r"data: .*101 stored rows.* now"):
            fit(vae(), ALL[name](tmp_path), checkpoint=files, resume=True)
    fit(vae(), ALL[name](tmp_path), checkpoint=files, resume=True)


# -- streams that know where they are ----------------------------------------------------------


class Counter(IterableDataset):
    """Rows of shards, and a state: where it is. It begins each later epoch where it was put."""

    def __init__(self, knows=True):
        self.place, self.put, self.given = 0, 0, 0
        if not knows:
            self.state_dict = self.load_state_dict = None

    def __iter__(self):
        for i in range(self.put, N):
            self.place, self.given = i + 1, self.given + 1
            yield torch.from_numpy(X[i])

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.put = state["place"]


class Buffered(Counter):
    """It mixes rows in a buffer, which its state does not have: as a data set of Hugging Face."""

    def __iter__(self):
        rng, held = random.Random(7), []
        for row in super().__iter__():
            held.append(row)
            if len(held) > 10:
                yield held.pop(rng.randrange(len(held)))
        yield from held


class NotPlain(Counter):
    def state_dict(self):
        return {"place": self.place, "lock": object()}


@pytest.mark.parametrize(
    ("make", "again"),
    [(Counter, 96), (Buffered, None), (NotPlain, 96 + 64), (lambda: loader_of_none(), None)],
)
def test_a_stream_goes_on_where_it_was_and_each_row_is_read_once(make, again, tmp_path):
    """What is left of the epoch, the batch that is compared, and the batch of the check."""

    def loader(stream):
        return stream if isinstance(stream, DataLoader) else DataLoader(stream, 16)

    expected = fit(vae(), loader(make()))
    files = Checkpoints(tmp_path / "run", every_steps=5)
    with pytest.raises(InterruptedError):
        fit(vae(), loader(make()), checkpoint=files, callbacks=[StopAt(6)])
    stream = make()
    found = fit(vae(), loader(stream), checkpoint=files, resume=True)
    assert numbers(found) == numbers(expected)
    if again is not None:
        rest = N - 4 * 16 if make is Counter else N
        assert stream.given == 16 + rest + 2 * N


def loader_of_none():
    """A loader whose stream has no state."""
    return DataLoader([torch.from_numpy(row) for row in X], 16)


def stateful(workers=0, shuffle=False, stream=True, rows=None, generator=None):
    loaders = pytest.importorskip("torchdata.stateful_dataloader")
    if rows is None:
        rows = Counter() if stream else [torch.from_numpy(row) for row in X]
    return loaders.StatefulDataLoader(
        rows, 16, num_workers=workers, shuffle=shuffle or None, generator=generator
    )


def shards(shuffle=False):
    rows = hugging_face(x=X).to_iterable_dataset(num_shards=4)
    rows = rows.shuffle(seed=1, buffer_size=20) if shuffle else rows
    return rows.with_format("torch")


STREAMS = {
    "counter": lambda folder: DataLoader(Counter(), 16),
    "counter_steps": lambda folder: DataLoader(Counter(), 16),
    "stateful_steps": lambda folder: stateful(shuffle=True, stream=False),
    "stateful_hugging_face": lambda folder: stateful(rows=shards()),
    "stateful_hugging_face_workers": lambda folder: stateful(workers=2, rows=shards()),
    "buffered": lambda folder: DataLoader(Buffered(), 16),
    "hugging_face_stream": lambda folder: shards(),
    "hugging_face_shuffled": lambda folder: shards(shuffle=True),
    "stateful": lambda folder: stateful(),
    "stateful_shuffled": lambda folder: stateful(shuffle=True, stream=False),
    "stateful_generator": lambda folder: stateful(
        shuffle=True, stream=False, generator=torch.Generator().manual_seed(5)
    ),
    "stateful_workers": lambda folder: stateful(workers=2, shuffle=True, stream=False),
}


# -- killed ------------------------------------------------------------------------------------

KILLED = {**ALL, "grey": grey, **STREAMS}


def killable(name, folder, result, kill_at=None):
    """A run that goes on from what is there; what it ends with is written to a file."""

    class Kill(ppvae.Callback):
        def on_step_end(self, svi, loss):
            if svi.num_steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    svi = cvae() if name in LABELLED else vae()
    train = KILLED[name](folder)
    files = Checkpoints(folder / result.stem, every_steps=3, keep=2)
    valid = (X[:21], Y[:21]) if name in LABELLED else X[:21]
    steps = {"steps_per_epoch": 9} if "steps" in name else {}  # the loader has 7
    history = fit(
        svi, train, valid=valid, checkpoint=files, resume=True, callbacks=[Kill()], **steps
    )
    found = {"rows": numbers(history), "svi": plain(svi.state_dict())}
    torch.save(found, result.with_suffix(".unfinished"))
    result.with_suffix(".unfinished").replace(result)


def life(*args):
    """One life of a run, in a fork of this process or, if that has threads, anew; its id."""
    if args[0] == "zarr":
        name, folder, result, kill_at = (*args, None)[:4]
        here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
        call = f"killable({name!r}, Path({str(folder)!r}), Path({str(result)!r}), {kill_at})"
        code = f"{here}; from test_stored import *; {call}"
        return os.posix_spawn(sys.executable, [sys.executable, "-c", code], os.environ)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            killable(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return torch.equal(one, other) if torch.is_tensor(one) else one == other


def require(name):
    """Skip here, and not in a fork, where a package is absent."""
    for word, package in (
        ("hugging_face", "datasets"),
        ("stateful", "torchdata.stateful_dataloader"),
        ("zarr", "zarr"),
        ("table", "pyarrow"),
        ("columns", "pyarrow"),
        ("parquet", "pyarrow"),
        ("folder", "pyarrow"),
        ("h5", "h5py"),
    ):
        if word in name:
            pytest.importorskip(package)


@pytest.mark.parametrize("name", KILLED)
def test_a_run_that_was_killed_ends_as_if_it_had_not(name, tmp_path):
    """It dies of SIGKILL at a step drawn at random, inside the second or third epoch."""
    require(name)
    step = random.Random(name).choice([s for s in range(8, 21) if s % 3])
    assert os.waitpid(life(name, tmp_path, tmp_path / "whole.pt"), 0)[1] == 0
    status = os.waitpid(life(name, tmp_path, tmp_path / "cut.pt", step), 0)[1]
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [path.name for path in Checkpoints(tmp_path / "cut").paths()]
    assert os.waitpid(life(name, tmp_path, tmp_path / "cut.pt"), 0)[1] == 0
    whole, cut = (torch.load(tmp_path / f"{which}.pt") for which in ("whole", "cut"))
    assert same(whole, cut)


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_many_random_moments(name, tmp_path):
    require(name)
    started = time.perf_counter()
    assert os.waitpid(life(name, tmp_path, tmp_path / "whole.pt"), 0)[1] == 0
    seconds, rng, killed = time.perf_counter() - started, random.Random(name), 0
    files = Checkpoints(tmp_path / "cut", every_steps=3, keep=2)
    for _ in range(200):
        before, pid = files.paths(), life(name, tmp_path, tmp_path / "cut.pt")
        if killed < 8:
            while files.paths() == before and not (tmp_path / "cut.pt").exists():
                time.sleep(0.005)  # it has come further than the life before
            time.sleep(rng.uniform(0.0, 0.15) * seconds)
            os.kill(pid, signal.SIGKILL)
        status = os.waitpid(pid, 0)[1]
        killed += os.WIFSIGNALED(status)
        if (tmp_path / "cut.pt").exists():
            break
    whole, cut = (torch.load(tmp_path / f"{which}.pt") for which in ("whole", "cut"))
    assert killed >= 1
    assert same(whole, cut)
