"""Every container of rows gives what its tensors give: in training, in each evaluator."""

import inspect

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import ppvae
from ppvae import conditionals, data, diagnostics, elbo, guides, intake, models, nets

N, D = 40, 3
RNG = np.random.default_rng(0)
X = RNG.poisson(1.0, (N, D)).astype(np.float32)
Y = np.eye(2, dtype=np.float32)[RNG.integers(0, 2, N)]


class Rows(torch.utils.data.Dataset):
    """A data set of torch: one row at a time."""

    def __init__(self, x, y=None, as_dict=False):
        self.x, self.y, self.as_dict = torch.from_numpy(x), y, as_dict

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if self.as_dict:
            return {"y": torch.from_numpy(self.y[i]), "x": self.x[i]}
        return self.x[i] if self.y is None else (self.x[i], torch.from_numpy(self.y[i]))


class AnnDataLike:
    """What an AnnData is known by."""

    def __init__(self, X):
        self.X, self.obs, self.obs_names = X, None, None

    def __len__(self):
        return len(self.X)


def hugging_face(columns):
    datasets = pytest.importorskip("datasets")
    return datasets.Dataset.from_dict({k: v.tolist() for k, v in columns.items()})


def annotated(x):
    anndata = pytest.importorskip("anndata")
    return anndata.AnnData(x)


def polars(x):
    return pytest.importorskip("polars").DataFrame(x, schema=list("abc"))


CONTAINERS = {
    "ndarray": lambda: X,
    "float64": lambda: X.astype(np.float64),
    "integers": lambda: X.astype(np.int64),
    "frame": lambda: pd.DataFrame(X, columns=list("abc")),
    "frame Int64": lambda: pd.DataFrame(X).astype("Int64"),
    "polars": lambda: polars(X),
    "TensorDataset": lambda: TensorDataset(torch.from_numpy(X)),
    "Dataset": lambda: Rows(X),
    "dictionary": lambda: {"x": X},
    "scipy": lambda: scipy.sparse.csr_matrix(X),
    "scipy coo": lambda: scipy.sparse.coo_array(X),
    "like AnnData": lambda: AnnDataLike(scipy.sparse.csr_matrix(X)),
    "AnnData": lambda: annotated(scipy.sparse.csr_matrix(X)),
    "Hugging Face": lambda: hugging_face({"x": X}),
    "split": lambda: data.Split(torch.from_numpy(X)),
}
CONDITIONAL = {
    "arrays": lambda: (X, Y),
    "frames": lambda: (pd.DataFrame(X), pd.DataFrame(Y)),
    "TensorDataset": lambda: (TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)),),
    "Dataset": lambda: (Rows(X, Y),),
    "Dataset of dictionaries": lambda: (Rows(X, Y, as_dict=True),),
    "dictionary": lambda: ({"y": Y, "x": pd.DataFrame(X)},),
    "sparse and dense": lambda: (scipy.sparse.csr_array(X), Y),
    "Hugging Face": lambda: (hugging_face({"y": Y, "x": X}),),
}


def counts_pair(seed=0):
    torch.manual_seed(seed)
    likelihood = conditionals.Poisson(nets.mlp(2, 8, D))
    return models.VAE(likelihood, latent_dim=2), guides.Normal(nets.mlp(D, 8, 4))


def conditional_pair():
    torch.manual_seed(0)
    likelihood = conditionals.Poisson(nets.mlp(2 + 2, 8, D))
    return models.CVAE(likelihood, latent_dim=2), guides.Normal(nets.mlp(D + 2, 8, 4))


@pytest.mark.parametrize("name", CONTAINERS)
def test_an_evaluator_takes_every_container(name):
    pair = counts_pair()
    expected = diagnostics.log_evidence(*pair, torch.from_numpy(X), num_particles=5, seed=0)
    found = diagnostics.log_evidence(*pair, CONTAINERS[name](), num_particles=5, seed=0)
    assert torch.equal(found.log_evidence, expected.log_evidence)


@pytest.mark.parametrize("name", CONDITIONAL)
def test_an_evaluator_takes_several_arguments(name):
    pair = conditional_pair()
    both = torch.from_numpy(X), torch.from_numpy(Y)
    expected = diagnostics.log_evidence(*pair, *both, num_particles=5, seed=0)
    found = diagnostics.log_evidence(*pair, *CONDITIONAL[name](), num_particles=5, seed=0)
    assert torch.equal(found.log_evidence, expected.log_evidence)


def trained(pair, given, lr=0.01, **options):
    svi = ppvae.SVI(*pair, lambda parameters: torch.optim.SGD(parameters, lr=lr), elbo.ELBO())
    history = ppvae.fit(svi, given, epochs=2, progress=False, **options)
    return history.rows[-1]["train_objective"], history.rows[-1]["valid_bound"]


@pytest.mark.parametrize("name", CONTAINERS)
def test_fit_takes_every_container(name):
    """A data set of rows is shuffled by its loader: other draws for the rows, same validation."""
    lr = 0.0 if name in ("Dataset", "Hugging Face") else 0.01
    found, expected = (
        trained(counts_pair(1), given, lr, valid=given, batch_size=16)
        for given in (CONTAINERS[name](), torch.from_numpy(X))
    )
    assert found[1] == expected[1]
    assert found[0] == expected[0] or lr == 0.0


@pytest.mark.parametrize("name", CONDITIONAL)
def test_fit_takes_several_arguments(name):
    given = CONDITIONAL[name]()
    given = given[0] if len(given) == 1 else given
    both = torch.from_numpy(X), torch.from_numpy(Y)
    lr = 0.0 if "Dataset of" in name or name in ("Dataset", "Hugging Face") else 0.01
    found, expected = (
        trained(conditional_pair(), one, lr, valid=one, batch_size=16) for one in (given, both)
    )
    assert found[1] == expected[1]
    assert found[0] == expected[0] or lr == 0.0


def test_sparse_rows_stay_sparse_until_a_batch_is_made(monkeypatch):
    seen = []
    real = data.sparse.SparseRows.index_select

    def index_select(self, dim, index):
        seen.append(len(index))
        return real(self, dim, index)

    monkeypatch.setattr(data.sparse.SparseRows, "index_select", index_select)
    trained(counts_pair(), scipy.sparse.csr_array(X), valid=X, batch_size=8)
    assert max(seen) == 8
    assert sum(seen) >= 2 * N


def test_every_evaluator_takes_arrays():
    """Whoever is called with rows has the decorator: a new one cannot be forgotten."""
    taking = {
        name
        for name in diagnostics.__all__
        if inspect.isfunction(function := getattr(diagnostics, name))
        and "args" in inspect.signature(function).parameters
    }
    assert {"ais", "diagnose", "gaps", "hmc", "nuts", "quadrature", "sbc", "to_arviz"} <= taking
    sentinel = {"no such argument": X}
    pair = counts_pair()
    for name in taking:
        function = getattr(diagnostics, name)
        programs = [p for p in inspect.signature(function).parameters if p in ("model", "guide")]
        with pytest.raises(TypeError, match="the data are a mapping of 'no such argument'"):
            function(*pair[: len(programs)], sentinel)


def test_compare_check_pair_and_fit_prior_take_frames():
    pair, frame = counts_pair(), pd.DataFrame(X)
    options = {"repeats": 2, "evidence_particles": 20, "timing_rounds": 0}
    found, expected = (
        ppvae.compare(*pair, given, [elbo.ELBO()], **options)
        for given in (frame, torch.from_numpy(X))
    )
    assert found.bound.equals(expected.bound)
    assert "fits together" in str(ppvae.check_pair(*pair, frame))
    prior = conditionals.Mixture(2, 2)
    assert ppvae.fit_prior(prior, pair[1], frame, epochs=1, progress=False).rows


def test_a_double_pair_keeps_float64():
    model, guide = (program.double() for program in counts_pair())
    values = RNG.poisson(1.0, (N, D)) + 0.0
    assert intake.tensors([values], model, guide)[0].dtype == torch.float64
    assert intake.tensors([scipy.sparse.csr_array(values)], model, guide)[0].dtype == torch.float64
    diagnostics.log_evidence(model, guide, pd.DataFrame(values), num_particles=5)
    seconds = 1_700_000_000.0 + np.arange(N)[:, None] * np.ones(D)
    assert intake.tensors([seconds], model)[0][:, 0].tolist() == seconds[:, 0].tolist()


@pytest.mark.parametrize("make", [np.asarray, pd.DataFrame, scipy.sparse.csr_array], ids=str)
def test_float32_names_what_it_loses(make):
    seconds = 1_700_000_000.0 + np.arange(N)[:, None] * np.ones(D)
    with pytest.warns(data.PrecisionWarning, match="float32 loses digits"):
        intake.tensors([make(seconds)], lambda x: None)


def test_what_is_not_the_first_argument_keeps_its_kind():
    labels, hidden = np.arange(N, dtype=np.int32), X > 0
    given = [X, labels, hidden, pd.Series(labels), pd.DataFrame(X > 0), None, 3]
    found = intake.tensors(given, lambda x: None)
    assert [getattr(value, "dtype", value) for value in found] == [
        torch.float32,
        torch.int64,
        torch.bool,
        torch.int64,
        torch.bool,
        None,
        3,
    ]


def test_arrays_are_copied():
    x = X.copy()
    (tensor,) = intake.tensors([x], lambda x: None)
    tensor.zero_()
    assert np.array_equal(x, X)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.from_numpy(X))


class NotData:
    pass


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: pd.DataFrame({"a": [1.0, 2.0], "job": ["x", "y"]}), "words, such as 'job'.*Table"),
        (lambda: pd.DataFrame({"a": pd.date_range("2020", periods=2)}), "column 'a' holds"),
        (lambda: np.array([["a", "b"], ["c", "d"]]), "x holds words"),
        (lambda: np.array([[None, 1], [2, 3]]), "x holds object"),
        (lambda: {"z": X}, "a mapping of 'z', and the model takes 'x'"),
        (lambda: Rows(X[:0]), "no rows"),
    ],
)
def test_what_is_no_data_for_anybody(given, words):
    pair = counts_pair()
    with pytest.raises((TypeError, ValueError), match=words):
        diagnostics.log_evidence(*pair, given())
    with pytest.raises((TypeError, ValueError), match=words):
        trained(pair, given())


class Lazy:
    """As a LazyFrame of polars: what it will be, and no rows."""

    columns = dtypes = ("a", "b")

    def collect(self):
        raise AssertionError("nobody asked for this work")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Lazy, r"a Lazy holds no rows yet: give frame.collect\(\)"),
        (lambda: pytest.importorskip("polars").LazyFrame({"a": [1.0], "b": [2.0]}), "no rows yet"),
    ],
)
def test_a_frame_that_is_a_plan(make, words):
    pair, frame = counts_pair(), make()
    for call in (
        lambda: trained(pair, frame),
        lambda: ppvae.encode(pair[1], frame),
        lambda: ppvae.log_prob(*pair, frame),
        lambda: data.Table.fit(frame),
        lambda: data.from_arrays(frame),
        lambda: conditionals.suggest(frame),
    ):
        with pytest.raises(TypeError, match=words):
            call()


def test_a_data_set_whose_columns_are_no_arguments():
    pair, rows = counts_pair(), hugging_face({"a": X[:, 0], "b": X[:, 1]})
    words = r"has the columns 'a', 'b', and the model takes 'x'.*data.to_pandas\(\)"
    for call in (lambda: trained(pair, rows), lambda: ppvae.log_prob(*pair, rows)):
        with pytest.raises(TypeError, match=words):
            call()
    with pytest.raises(TypeError, match=r"give x.to_pandas\(\)"):
        data.from_arrays(rows)
    assert len(data.from_arrays(rows.to_pandas()).train)


def test_arrays_that_have_a_function_of_their_own():
    with pytest.raises(TypeError, match=r"x is sparse: .* data\.from_counts"):
        data.from_arrays(scipy.sparse.csr_matrix(X))
    with pytest.raises(TypeError, match=r"x is an AnnData: data\.from_anndata takes it"):
        data.from_arrays(AnnDataLike(X))


def test_what_is_no_data_for_an_evaluator():
    pair = counts_pair()
    with pytest.raises(TypeError, match="a DataLoader cuts batches for training"):
        ppvae.diagnose(*pair, DataLoader(TensorDataset(torch.from_numpy(X))))
    with pytest.raises(TypeError, match="Stream is a stream"):
        ppvae.diagnose(*pair, Stream())


def test_what_fit_does_not_take():
    svi = ppvae.SVI(*counts_pair(), torch.optim.SGD, elbo.ELBO())
    for given in (NotData(), None, [], ["x"], {"x": "y"}, X[0, 0]):
        with pytest.raises(TypeError, match="data must be arrays, tensors, a frame"):
            ppvae.fit(svi, given, epochs=1)
    with pytest.raises(ValueError, match="have \\[40, 39\\] rows"):
        ppvae.fit(svi, (scipy.sparse.csr_array(X), X[1:]), epochs=1)


def test_a_stream_of_torch_trains():
    svi = ppvae.SVI(*counts_pair(), torch.optim.SGD, elbo.ELBO())
    history = ppvae.fit(svi, Stream(), epochs=2, batch_size=16, progress=False)
    assert [row["step"] for row in history.rows] == [3, 6]


def test_a_frame_may_have_columns_called_train_and_valid():
    frame = pd.DataFrame(X, columns=["train", "valid", "test"])
    svi = ppvae.SVI(*counts_pair(), torch.optim.SGD, elbo.ELBO())
    assert "valid_bound" not in ppvae.fit(svi, frame, epochs=1, progress=False).rows[0]


def test_a_data_set_is_shuffled_by_the_seed():
    orders = [
        torch.cat([*intake.for_training(Rows(X), "data", 16, seed, *counts_pair())]).tolist()
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def cells():
    """Counts of two batches of cells, stored sparse, with another layer."""
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(["b1", "b2"] * (N // 2)),
            "age": np.linspace(20.0, 60.0, N),
            "hours": np.linspace(1.0, 2.0, N),
        },
        index=[f"cell{i}" for i in range(N)],
    )
    counts = scipy.sparse.csr_matrix(X + 1)
    anndata = pytest.importorskip("anndata")
    return anndata.AnnData(counts * 2.0, obs=obs, layers={"counts": counts})


def test_cells_have_counts_covariates_and_a_library_size():
    annotated = cells()
    found = data.from_anndata(annotated, "counts", ["batch", "age"], offset="library")
    assert list(found) == ["x", "y", "offset"]
    x = intake.tensors([found["x"]], lambda x: None)[0]
    assert np.array_equal(x.numpy(), X + 1)
    assert np.allclose(found["offset"].exp(), (X + 1).sum(1))
    assert found["y"][:2, :2].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert abs(found["y"][:, 2].mean()) < 1e-6 and abs(found["y"][:, 2].std() - 1) < 1e-6
    hours = data.from_anndata(annotated, offset="hours")
    assert np.allclose(hours["offset"].exp(), annotated.obs["hours"], rtol=1e-6)
    assert np.array_equal(intake.tensors([hours["x"]], lambda x: None)[0], 2 * (X + 1))


# anndata 0.12 with pandas 3.1, whenever it cuts
@pytest.mark.filterwarnings("ignore:The 'mode.chained_assignment' option")
def test_levels_of_some_cells_keep_their_places():
    annotated = cells()
    table = data.Table.fit(annotated.obs[["batch"]])
    some = annotated[1::2].copy()  # the levels of the others are dropped from such a part
    assert data.from_anndata(some, covariates=table)["y"][0].tolist() == [0.0, 1.0]


def test_cells_train_and_are_evaluated():
    torch.manual_seed(0)
    likelihood = conditionals.NegativeBinomial(nets.mlp(2 + 2, 8, 2 * D))
    model = models.CVAE(likelihood, latent_dim=2)
    guide = guides.Normal(nets.mlp(D + 2 + 1, 8, 4))
    found = data.from_anndata(cells(), covariates=["batch"], offset="library")
    history = trained((model, guide), found, valid=found, batch_size=16)
    assert np.isfinite(history).all()
    dense = {name: torch.as_tensor(np.asarray(v)) for name, v in found.items() if name != "x"}
    given = torch.from_numpy(2 * (X + 1)), dense["y"], dense["offset"]
    sparse = diagnostics.log_evidence(model, guide, found, num_particles=5, seed=0)
    by_hand = diagnostics.log_evidence(model, guide, *given, num_particles=5, seed=0)
    assert torch.equal(sparse.log_evidence, by_hand.log_evidence)


def test_cells_that_cannot_be():
    annotated = cells()
    with pytest.raises(ValueError, match="no 'raw' in its layers: it has 'counts'"):
        data.from_anndata(annotated, "raw")
    with pytest.raises(ValueError, match="no 'site' in its obs: it has 'batch', 'age', 'hours'"):
        data.from_anndata(annotated, covariates=["site"])
    annotated.X = annotated.X.multiply(np.arange(N)[:, None] != 3).tocsr()
    with pytest.raises(ValueError, match="cell 'cell3' has no count, as have 0 more"):
        data.from_anndata(annotated, offset="library")
    annotated.obs["hours"] = 0.0
    with pytest.raises(ValueError, match="cell 'cell0' has no 'hours' above 0"):
        data.from_anndata(annotated, offset="hours")
    annotated.obs.loc["cell4", "age"] = np.nan
    with pytest.raises(ValueError, match="column 'age' has missing cells"):
        data.from_anndata(annotated, covariates=["age"])


def test_a_tensor_of_inference_mode_is_copied_where_gradients_are_taken():
    with torch.inference_mode():
        x = torch.zeros(3, 2)
        assert intake.tensors((x,))[0] is x
    (copied,) = intake.tensors((x,))
    assert not copied.is_inference()
    assert torch.equal(copied, x)
