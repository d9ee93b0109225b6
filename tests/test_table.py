"""Tables: what columns are, the exact inverse, densities in the table's units, what is refused."""

import math

import numpy as np
import pandas as pd
import pytest
import torch
from pandas.testing import assert_frame_equal

import ppvae
from ppvae import conditionals, data, guides, models, nets


def people(num: int = 60, missing: float = 0.0) -> pd.DataFrame:
    """A frame with a column of each kind and dtype, under an index of its own."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(
        {
            "income": np.exp(rng.normal(10.0, 0.5, num)),
            "visits": rng.poisson(3.0, num),
            "job": rng.choice(["clerk", "nurse", "smith"], num),
            "smokes": rng.random(num) < 0.3,
            "grade": pd.Categorical(
                rng.choice(["lo", "mid", "hi"], num), ["lo", "mid", "hi"], ordered=True
            ),
            "city": pd.Categorical(rng.choice(["Ulm", "Bern"], num), ["Ulm", "Bern", "Graz"]),
            "sex": rng.choice(["f", "m"], num).astype(object),
            "change": rng.integers(-5, 5, num),
            "rooms": pd.array(rng.integers(0, 9, num), dtype="Int64"),
            "owner": pd.array(rng.random(num) < 0.5, dtype="boolean"),
        },
        index=pd.Index(np.arange(num) + 7, name="id"),
    )
    if not missing:
        return frame
    kept = {
        name: (column.astype(object) if column.dtype == bool else column).where(
            rng.random(num) > missing
        )
        for name, column in frame.items()
    }
    return pd.DataFrame(kept)


@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_a_frame_comes_back_as_it_was(missing):
    frame = people(missing=missing)
    table = data.Table.fit(frame)
    x = table.to_tensor(frame, torch.float64)
    assert_frame_equal(table.to_frame(x, frame.index), frame)
    assert np.array_equal(x.isnan().numpy(), frame.isna().to_numpy())


def test_what_columns_are():
    kinds = {c.name: c.kind for c in data.Table.fit(people(missing=0.2)).columns}
    assert kinds == {
        "income": "number",
        "visits": "count",
        "job": "category",
        "smokes": "binary",
        "grade": "ordered",
        "city": "category",  # a level that does not occur is a level
        "sex": "binary",
        "change": "number",
        "rooms": "count",
        "owner": "binary",
    }


def test_columns_are_found_by_name():
    frame = people()
    table = data.Table.fit(frame)
    turned = frame[list(frame)[::-1]].assign(other="x")
    assert torch.equal(table.to_tensor(turned), table.to_tensor(frame))


def test_a_level_of_few_rows_keeps_its_code():
    frame = people()
    table = data.Table.fit(frame)
    one = frame[frame.job == "smith"]
    assert set(table.to_tensor(one)[:, 2].tolist()) == {2.0}
    assert_frame_equal(table.to_frame(table.to_tensor(one, torch.float64), one.index), one)


def test_evidence_is_in_the_units_of_the_table(float64):
    """Grams for kilograms: log p(x) falls by the log of the factor, and by nothing else."""
    frame = people()[["income", "change", "visits", "job", "grade", "smokes"]]
    cents = frame.assign(income=100.0 * frame.income, change=3.0 * frame.change)

    def nats(frame):
        table = data.Table.fit(frame, {"change": "number"})
        kinds = conditionals.heads_for(table)
        torch.manual_seed(0)
        head = conditionals.Columns(nets.mlp(2, 8, conditionals.Columns.width(kinds)), kinds)
        guide = guides.Normal(
            torch.nn.Sequential(
                features := nets.Columns(table), nets.mlp(features.out_features, 8, 4)
            )
        )
        x = table.to_tensor(frame)
        torch.manual_seed(1)
        return ppvae.log_weights(models.VAE(head, latent_dim=2), guide, x).log_w

    shift = nats(frame) - nats(cents)
    assert torch.allclose(shift, torch.full_like(shift, math.log(100.0) + math.log(3.0)), atol=1e-9)


def test_the_density_of_a_number_is_a_normal_of_its_units(float64):
    frame = people()[["income", "change"]]
    table = data.Table.fit(frame)
    head = conditionals.Columns(
        nets.Constant(conditionals.Columns.width(kinds := conditionals.heads_for(table))), kinds
    )
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.zero_()  # standardised: mean 0 and log scale 0
    x = table.to_tensor(frame)
    by_hand = torch.distributions.Normal(x.mean(0), x.std(0)).log_prob(x)
    found = head.by_column(x, torch.zeros(len(x), 1))
    assert torch.allclose(torch.stack([*found.values()], 1), by_hand, atol=1e-12)


def test_features_are_of_unit_size_and_zero_where_cells_are_missing(float64):
    frame = people(missing=0.3)
    table = data.Table.fit(frame)
    x = table.to_tensor(frame)
    features = nets.Columns(table)(torch.cat([x, torch.full((len(x), 2), 9.0)], -1))
    assert features.shape == (len(x), nets.Columns(table).out_features + 2)
    assert (features[:, -2:] == 9.0).all()
    single = [i for i, c in enumerate(table.columns) if c.kind != "category"]
    values = features[:, : len(single)].masked_fill(x[:, single].isnan(), math.nan)
    assert torch.allclose(values.nanmean(0), torch.zeros(len(single)), atol=1e-12)
    assert (features[:, : len(single)][x[:, single].isnan()] == 0).all()
    job = features[:, len(single) : len(single) + 3]
    assert torch.equal(job.sum(1), (~x[:, 2].isnan()).double())


def test_gradients_through_features_are_finite_where_cells_are_missing():
    table = data.Table.fit(people())
    x = table.to_tensor(people(missing=0.3)).requires_grad_()
    nets.Columns(table)(x).sum().backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.assign(job="nurse"), "column 'job' is 'nurse' in all rows"),
        (lambda f: f.assign(income=2.5), "column 'income' is 2.5 in all rows"),
        (lambda f: f.assign(income=np.nan), "column 'income' has no cell that is not missing"),
        (lambda f: f.assign(job=[f"n{i}" for i in range(60)]), "column 'job' has 60 different"),
        (
            lambda f: f.assign(income=["unknown", *map(str, range(59))]),
            "column 'income' holds numbers and 'unknown'",
        ),
        (
            lambda f: f.assign(income=pd.Series(["?", *range(59)], f.index, dtype=object)),
            "column 'income' holds numbers and words, such as 0 and '[?]'",
        ),
        (
            lambda f: f.assign(income=pd.date_range("2020", periods=60)),
            "column 'income' holds Timestamp",
        ),
        (lambda f: f.assign(income=[np.inf, *range(59)]), "column 'income' has 1 infinite"),
        (lambda f: pd.concat([f, f[["job"]]], axis=1), "column 'job' is in the frame twice"),
        (lambda f: f[:0], "the frame is empty"),
        (lambda f: f.to_numpy(), "a frame of pandas or polars is needed, got ndarray"),
    ],
)
def test_what_no_table_is_fitted_to(change, words):
    with pytest.raises((TypeError, ValueError), match=words):
        data.Table.fit(change(people()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.drop(columns="grade"), "the frame has no column 'grade' of the table; it has"),
        (
            lambda f: f.assign(job=f.job.where(f.job != "nurse", "baker")),
            "column 'job' has .* cells of levels that the table was not fitted to, such as 'baker'",
        ),
        (lambda f: f.assign(visits=f.visits - 4), "column 'visits' is a count, and has"),
        (lambda f: f.assign(visits=f.visits + 0.5), "column 'visits' is a count, and has"),
        (lambda f: f.assign(income="lots"), "column 'income' holds words, such as 'lots'"),
        (lambda f: f.assign(smokes="no"), "column 'smokes' has 60 cells of levels .* 'no'"),
    ],
)
def test_what_rows_of_a_table_cannot_be(change, words):
    table = data.Table.fit(people())
    with pytest.raises((TypeError, ValueError), match=words):
        table.to_tensor(change(people()))


def test_what_stands_for_no_level():
    table = data.Table.fit(people())
    x = table.to_tensor(people())
    for code in (0.5, 3.0, -1.0):
        x[4, 2] = code
        with pytest.raises(ValueError, match=r"column 'job' has .*stands for none of its 3 levels"):
            table.to_frame(x)
    with pytest.raises(ValueError, match=r"not [(]N, 10[)]"):
        table.to_frame(x[:, :3])


def test_kinds_are_what_the_user_says():
    frame = pd.DataFrame({"year": [1990, 1991, 2020], "stars": [1, 3, 5], "dose": [2.0, 4.0, 2.0]})
    kinds = {"year": "number", "stars": "ordered", "dose": "binary"}
    table = data.Table.fit(frame, kinds)
    assert {c.name: c.kind for c in table.columns} == kinds
    x = table.to_tensor(frame, torch.float64)
    assert x[:, 1:].T.tolist() == [[0.0, 1.0, 2.0], [0.0, 1.0, 0.0]]
    assert_frame_equal(table.to_frame(x), frame)
    with pytest.raises(ValueError, match="kinds names columns that are not there"):
        data.Table.fit(frame, {"age": "number"})
    with pytest.raises(ValueError, match="kinds has 'real': use 'number'"):
        data.Table.fit(frame, {"year": "real"})
    with pytest.raises(ValueError, match="column 'year' has 3 different values, not 2"):
        data.Table.fit(frame, {"year": "binary"})
    with pytest.raises(ValueError, match="column 'job' holds words without an order"):
        data.Table.fit(people(), {"job": "ordered"})
    with pytest.raises(ValueError, match="column 'job' holds words, such as 'clerk', no numbers"):
        data.Table.fit(people(), {"job": "number"})
    with pytest.raises(ValueError, match="holds True and False, no numbers: use 'binary'"):
        data.Table.fit(pd.DataFrame({"a": [True, False]}), {"a": "number"})
    with pytest.raises(TypeError, match="kinds says a kind by column"):
        data.Table.fit(frame, ["year"])


def test_cells_that_say_the_same_in_other_words():
    table = data.Table.fit(pd.DataFrame({"a": [0, 1], "b": [1.5, 2.0]}))
    x = table.to_tensor(pd.DataFrame({"a": [True, False], "b": [0.5, 1.0]}))
    assert x.tolist() == [[1.0, 0.5], [0.0, 1.0]]
    assert table.to_frame(x.numpy())["a"].tolist() == [1, 0]
    with pytest.raises(TypeError, match="column 'b' holds True and False, not numbers"):
        table.to_tensor(pd.DataFrame({"a": [0, 1], "b": [True, False]}))
    with pytest.raises(ValueError, match="column 'a' has one cell: drop it, or fit"):
        data.Table.fit(pd.DataFrame({"a": [0]}))


def test_whole_numbers_beyond_float64_are_named():
    large = pd.DataFrame({"a": np.array([2**63 + 2**12, 1, 2], np.uint64)})
    table = data.Table.fit(large)
    assert_frame_equal(table.to_frame(table.to_tensor(large, torch.float64)), large)
    names = pd.DataFrame({"id": [2**60, 2**60 + 1, 3]})
    with pytest.warns(data.PrecisionWarning, match="column 'id' .* whole numbers beyond 2.53"):
        data.Table.fit(names).to_tensor(names, torch.float64)


def test_float32_names_what_it_loses():
    seconds = 1_700_000_000.0 + np.arange(60)
    frame = people().assign(income=seconds)
    table = data.Table.fit(frame)
    with pytest.warns(data.PrecisionWarning, match="column 'income' of the frame"):
        table.to_tensor(frame)
    assert table.to_tensor(frame, torch.float64)[:, 0].tolist() == seconds.tolist()


def test_frames_of_polars_come_back_as_they_were():
    pl = pytest.importorskip("polars")
    frame = pl.DataFrame(
        {
            "income": [1.5, None, 2.5, 0.1],
            "visits": [0, 3, None, 1],
            "job": ["smith", "nurse", None, "clerk"],
            "smokes": [True, False, None, True],
            "grade": pl.Series(["lo", "hi", None, "lo"], dtype=pl.Enum(["lo", "mid", "hi"])),
            "city": pl.Series(["Ulm", "Bern", None, "Graz"], dtype=pl.Categorical),
            "rooms": pl.Series([1, 2, 3, 4], dtype=pl.UInt8),
        }
    )
    table = data.Table.fit(frame, {"grade": "ordered"})
    assert table.columns[4].levels == ("lo", "mid", "hi")
    again = table.to_frame(table.to_tensor(frame, torch.float64))
    assert again.equals(frame)
    assert again.schema == frame.schema
