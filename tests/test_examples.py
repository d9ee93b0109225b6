"""The examples, run as a user runs them: every task and bound, their files, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
KEYS = {
    "test_log_evidence_nats",
    "test_log_evidence_se",
    "test_elbo_nats",
    "train_seconds",
    "epochs",
    "num_parameters",
    "device",
    "num_samples",
    "settings",
    "versions",
}
SLOWLY = pytest.mark.slow
OF_CVAE = {"trust.png", "report.html"}
COMMON = {"results.json", "posterior.nc", "training.png", "khat.png"}


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch):
    """The script's own folder on the path; and its number of threads is its own affair."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(name, out, *options):
    """Run an example in this process, with --smoke; its exit code."""
    import importlib

    reporting, example = importlib.import_module("reporting"), importlib.import_module(name)
    try:
        reporting.run(
            lambda: example.main(["--smoke", "--device", "cpu", "--out", str(out), *options])
        )
    except SystemExit as stop:
        return stop.code
    return 0


def check(out, files):
    """The files that are there, and the numbers in results.json."""
    assert {path.name for path in out.iterdir()} == COMMON | files
    for path in out.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert results.keys() >= KEYS
    for key in ("test_log_evidence_nats", "test_log_evidence_se", "test_elbo_nats"):
        assert np.isfinite(results[key])
    # an estimate from K particles lies above the mean of the same log-weights, by Jensen
    assert results["test_log_evidence_nats"] >= results["test_elbo_nats"]
    return results


# ------------------------------------------------------------------------------ that they run


NAMES = {"elbo": "ELBO", "iw": "IWELBO-8", "renyi": "RenyiELBO-8"}


@pytest.mark.parametrize(
    "bound", ["elbo", *(pytest.param(b, marks=SLOWLY) for b in ("iw", "renyi"))]
)
def test_cvae_of_labels(tmp_path, bound, capsys):
    assert run("cvae", tmp_path, "--elbo", bound) == 0
    results = check(tmp_path, {"images.png", "class_grid.png"} | OF_CVAE)
    assert results["bound"] == NAMES[bound]
    assert f"{results['test_log_evidence_nats']:.2f} ±" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("missing", "bound"),
    [
        ("1", "iw"),
        pytest.param("2", "renyi", marks=SLOWLY),
        pytest.param("3", "elbo", marks=SLOWLY),
    ],
)
def test_cvae_of_quadrants(tmp_path, missing, bound, capsys):
    assert run("cvae", tmp_path, "--task", "quadrant", "--missing", missing, "--elbo", bound) == 0
    results = check(tmp_path, {"images.png", "completion.png"} | OF_CVAE)
    assert results["bound"] == NAMES[bound]
    assert results["cll_negative_elbo_nats"] == -results["test_elbo_nats"]
    assert results["cll_importance_sampling_nats"] == -results["test_log_evidence_nats"]
    table = capsys.readouterr().out
    for name in ("negative ELBO", "prior Monte Carlo", "importance sampling", "baseline network"):
        assert name in table


@pytest.mark.parametrize("bound", [pytest.param("iw", marks=SLOWLY), "renyi"])
def test_vae(tmp_path, bound):
    assert run("vae", tmp_path, "--elbo", bound) == 0
    results = check(tmp_path, {"images.png", "interpolation.png", "latent_scatter.png"})
    assert results["bound"] == NAMES[bound]


@pytest.mark.slow
def test_vae_with_two_latents_draws_the_manifold(tmp_path):
    assert run("vae", tmp_path, "--latent-dim", "2") == 0
    check(tmp_path, {"images.png", "interpolation.png", "latent_scatter.png", "manifold.png"})


def test_vae_reports_the_exact_evidence_where_it_is_known(tmp_path):
    assert run("vae", tmp_path, "--data", "linear_gaussian") == 0
    results = check(tmp_path, {"latent_scatter.png"})
    assert np.isfinite(results["exact_log_evidence_nats"])


@pytest.mark.slow
def test_the_arviz_file_holds_the_named_groups(tmp_path):
    import arviz

    assert run("cvae", tmp_path) == 0
    idata = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    assert idata.posterior["z"].dims == ("chain", "draw", "datapoint", "latent")
    assert idata.posterior["z"].shape == (1, 200, 5, 8)
    assert idata.observed_data["x"].shape == (5, 64)
    idata.close()


@pytest.mark.slow
def test_same_seed_same_numbers(tmp_path):
    numbers = []
    for seed in ("3", "3", "4"):
        out = tmp_path / str(len(numbers))
        assert run("vae", out, "--seed", seed, "--data", "linear_gaussian") == 0
        results = json.loads((out / "results.json").read_text())
        numbers.append((results["test_log_evidence_nats"], results["valid_bound_nats"]))
    assert numbers[0] == numbers[1] != numbers[2]


def test_as_a_script_it_refuses_before_any_work(tmp_path):
    (tmp_path / "results.json").write_text("mine")
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / "vae.py"), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "results.json" in done.stderr
    assert done.stdout == ""
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cvae", "vae"])
def test_as_a_script(tmp_path, name):
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), "--smoke", "--out", str(tmp_path)]
    first = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    second = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert second.returncode == 2
    assert second.stderr.startswith("error: ") and "results.json" in second.stderr
    assert second.stdout == ""  # refused before any work
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


# ------------------------------------------------------------------------------ users' own data


def arrays(kind):
    rng = np.random.default_rng(0)
    y = np.arange(120) % 3
    x = {
        "binary image": rng.random((120, 6, 5)) < 0.4,
        "grey image": rng.random((120, 1, 6, 6)),
        "colour image": rng.random((120, 3, 6, 6)),
        "real image": rng.normal(50, 9, (120, 6, 6)),
        "real": rng.normal(200, 30, (120, 7)) + y[:, None],
        "binary": rng.random((120, 9)) < 0.3,
    }[kind]
    return x, y


@pytest.mark.slow  # ten seconds together
@pytest.mark.parametrize(
    ("kind", "task"),
    [
        ("binary image", "label"),
        ("grey image", "quadrant"),
        ("colour image", "label"),
        ("colour image", "quadrant"),
        ("real image", "quadrant"),
    ],
)
def test_own_images(tmp_path, kind, task):
    x, y = arrays(kind)
    np.savez(tmp_path / "my.npz", x=x, y=y)
    out = tmp_path / "out"
    assert run("cvae", out, "--data", str(tmp_path / "my.npz"), "--task", task) == 0
    check(out, OF_CVAE | {"images.png", f"{'class_grid' if task == 'label' else 'completion'}.png"})


@pytest.mark.parametrize("kind", ["real", pytest.param("binary", marks=SLOWLY)])
def test_own_vectors_skip_the_pictures(tmp_path, kind, capsys):
    x, y = arrays(kind)
    np.savez(tmp_path / "my.npz", x=x, y=y)
    assert run("cvae", tmp_path / "cvae", "--data", str(tmp_path / "my.npz")) == 0
    check(tmp_path / "cvae", {"report.html"})
    assert run("vae", tmp_path / "vae", "--data", str(tmp_path / "my.npz")) == 0
    check(tmp_path / "vae", {"latent_scatter.png"})
    printed = capsys.readouterr().out
    assert printed.count("No pictures of x") == 2
    assert printed.count("x was standardised") == (2 if kind == "real" else 0)


def test_own_conditions_instead_of_labels(tmp_path):
    x, y = arrays("real")
    np.savez(tmp_path / "my.npz", x=x, y=np.stack([y, -y], 1) * 0.5)
    assert run("cvae", tmp_path / "out", "--data", str(tmp_path / "my.npz")) == 0
    check(tmp_path / "out", {"report.html"})


def test_own_table_with_a_label_column(tmp_path):
    x, y = arrays("real")
    lines = ["a,b,kind", *(f"{a},{b},{'uvw'[k]}" for (a, b), k in zip(x[:, :2], y, strict=True))]
    (tmp_path / "my.csv").write_text("\n".join(lines))
    options = ["--data", str(tmp_path / "my.csv"), "--label", "kind"]
    assert run("cvae", tmp_path / "out", *options) == 0
    check(tmp_path / "out", {"report.html"})


# ------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"x": np.where(np.eye(120, 7) > 0, np.nan, 1.5)}, [], "NaN or infinite"),
        ({"y": None}, [], "no labels"),
        ({"y": np.arange(119)}, [], "119"),
        ({"y": np.arange(120) - 5}, [], "labels that are not whole numbers from 0"),
        ({"x": np.arange(840).reshape(120, 7)}, [], "whole numbers"),
        ({"x": np.full((120, 7), 2.5)}, [], "constant"),
        ({"x": np.zeros((0, 7))}, [], "empty"),
        ({"x": np.array(["a"] * 120)}, [], "holds words"),
        ({}, ["--task", "quadrant"], "not images"),
        ({}, ["--shape", "3", "3"], "make them agree"),
        ({}, ["--lr", "-1"], "--lr"),
        ({}, ["--binarize", "dynamic"], "[0, 1]"),
        ({}, ["--device", "toaster"], "'toaster' is unknown"),
        ({}, ["--label", "kind"], "no option label"),
        ({}, ["--data", "digit"], "did you mean 'digits'"),
        ({}, ["--data", "missing.npz"], "no data set, file or folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, change, options, message, capsys):
    x, y = arrays("real")
    kept = {k: v for k, v in {"x": x, "y": y, **change}.items() if v is not None}
    np.savez(tmp_path / "my.npz", **kept)
    code = run("cvae", tmp_path / "out", "--data", str(tmp_path / "my.npz"), *options)
    error = capsys.readouterr().err
    assert code == 2
    assert error.splitlines()[-1].startswith("error: ") and message in error
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_asked_for_but_absent(tmp_path, capsys):
    assert run("vae", tmp_path / "out", "--device", "cuda") == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["cvae", pytest.param("vae", marks=SLOWLY)])
def test_nothing_is_overwritten_without_overwrite(tmp_path, name, capsys):
    mine = tmp_path / "images.png"
    mine.write_text("mine")
    assert run(name, tmp_path) == 2
    assert "images.png" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["images.png"]
    assert mine.read_text() == "mine"
    assert run(name, tmp_path, "--overwrite") == 0
    assert mine.read_bytes().startswith(b"\x89PNG")


def test_out_is_a_file(tmp_path, capsys):
    (tmp_path / "out").write_text("mine")
    assert run("vae", tmp_path / "out") == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("name", ["cvae", "vae"])
def test_help_states_every_default(name, capsys):
    assert run(name, "unused", "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("(default: ") >= 15 and "(default: None)" not in text


@pytest.mark.parametrize("name", ["linear_gaussian", pytest.param("digits", marks=SLOWLY)])
def test_compare_elbos(name, tmp_path, capsys):
    import importlib

    importlib.import_module("reporting")
    example = importlib.import_module("compare_elbos")
    example.main(["--smoke", "--data", name, "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert ("exact" if name == "linear_gaussian" else "IWELBO-5000") in shown
    table = (tmp_path / "estimators.csv").read_text()
    assert {"IWELBO-4 dreg", "PIWELBO-4", "ELBO-1 stl"} <= {
        r.split(",")[0] for r in table.splitlines()
    }
    assert (tmp_path / "estimators.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="already holds"):
        example.main(["--smoke", "--data", name, "--out", str(tmp_path)])


@pytest.mark.parametrize("latent_dim", [pytest.param("2", marks=SLOWLY), "3"])
def test_custom_guide(tmp_path, latent_dim, capsys):
    import importlib

    importlib.import_module("reporting")
    example = importlib.import_module("custom_guide")
    example.main(["--smoke", "--latent-dim", latent_dim, "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "instead of an encoder" in shown
    table = [row.split(",") for row in (tmp_path / "guides.csv").read_text().splitlines()]
    assert len(table) == 1 + 5 and table[0][1:3] == ["ELBO", "IWELBO-50"]
    for row in table[1:]:
        assert float(row[2]) >= float(row[1])  # by Jensen, from the same draws
    assert (tmp_path / "guides.png").exists() == (latent_dim == "2")
    with pytest.raises(ValueError, match="already holds"):
        example.main(["--smoke", "--out", str(tmp_path)])


def test_semi_implicit(tmp_path, capsys):
    assert run("semi_implicit", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "log p(x) by quadrature" in shown and "5 draws of each point" in shown
    table = [row.split(",") for row in (tmp_path / "guides.csv").read_text().splitlines()]
    assert len(table) == 1 + 3 and table[0][1:3] == ["ELBO", "IWELBO-30"]
    for row in table[1:]:
        assert float(row[2]) >= float(row[1])  # by Jensen, from the same draws
    assert (tmp_path / "ring.png").read_bytes().startswith(b"\x89PNG")


def test_implicit(tmp_path, capsys):
    assert run("implicit", tmp_path) == 0
    shown = capsys.readouterr().out
    assert "log p(x) by quadrature" in shown and "calibration on 100 simulated" in shown
    table = [row.split(",") for row in (tmp_path / "guides.csv").read_text().splitlines()]
    assert [row[0] for row in table[1:]] == ["diagonal normal", "full normal", "AVB", "AVB + AC"]
    assert len((tmp_path / "queue.csv").read_text().splitlines()) == 1 + 3
    for name in ("banana", "values", "calibration", "queue"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_posterior_diagnostics(tmp_path, capsys):
    import importlib

    import arviz

    importlib.import_module("reporting")
    example = importlib.import_module("posterior_diagnostics")
    example.main(["--smoke", "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    for words in ("Report of 40 datapoints", "Calibration, 100 sim", "Predictive check", "r_hat"):
        assert words in shown
    assert {path.name for path in tmp_path.iterdir()} == set(example.FILES)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    idata = arviz.from_netcdf(str(tmp_path / "posterior.nc"))
    assert idata.posterior["z"].shape == (1, 500, 2, 2)
    idata.close()
    with pytest.raises(ValueError, match="already holds"):
        example.main(["--smoke", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        pytest.param(
            "mixture",
            [],
            ("scikit-learn's EM", "gradient ascent", "posterior after 2 EM steps"),
            marks=SLOWLY,
        ),
        ("autoencoder", [], ("beta-VAE", "the encoder", "the same sigma^2 beta")),
        pytest.param(
            "factor",
            [],
            ("beta-TCVAE", "tc_aggregate", "completeness", "calibration.png"),
            marks=SLOWLY,
        ),
        pytest.param("few_labels", [], ("network alone", "30 labels"), marks=SLOWLY),
        pytest.param("missing", [], ("10 nearest", "Missing the lower half"), marks=SLOWLY),
        pytest.param("counts", [], ("the process itself", "scipy differs by"), marks=SLOWLY),
        pytest.param("factor_analysis", [], ("given W", "by hand", "log p(X)"), marks=SLOWLY),
        ("deconvolution", [], ("least squares", "scipy differs by", "log p(x | data)")),
        pytest.param(
            "constrained",
            [],
            ("cyclical warm-up", "free bits", "capacity", "distortion 16"),
            marks=SLOWLY,
        ),
        pytest.param(
            "hierarchical",
            [],
            ("bottom-up, fine-tuned", "ladder, fine-tuned", "active z3"),
            marks=SLOWLY,
        ),
        pytest.param(
            "nvae",
            [],
            ("-IWELBO, K = 20", "KL of z3", "z1 (4, 4, 4)"),
            marks=SLOWLY,
        ),
        pytest.param(
            "nvae",
            ["--no-balance", "--regularizer", "0", "--groups", "1", "1", "1"],
            ("KL of z3",),
            marks=SLOWLY,
        ),
        pytest.param(
            "hierarchical",
            ["--net", "conv", "--latents", "2", "3"],
            ("'z2': (3, 2, 2)", "ladder"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "hierarchical",
            ["--latents", "4", "3", "2", "1", "--guides", "ladder"],
            ("active z4",),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "hierarchical",
            ["--no-batch-norm", "--fine-tune", "0", "--warm-up", "0"],
            ("KL z3",),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_model_families(name, options, words, tmp_path, capsys):
    import importlib

    dtype = torch.get_default_dtype()
    importlib.import_module("reporting")
    example = importlib.import_module(name)
    try:
        example.main(["--quick", *options, "--device", "cpu", "--out", str(tmp_path)])
    finally:
        torch.set_default_dtype(dtype)  # the mixture runs in float64
    shown = capsys.readouterr().out
    for word in words:
        assert word in shown
    assert {path.name for path in tmp_path.iterdir()} == set(example.FILES)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="already holds"):
        example.main(["--quick", "--out", str(tmp_path)])


def test_deconvolution_finds_the_abundances(tmp_path):
    assert run("deconvolution", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    found, other = results["global and local latents"], results["non-negative least squares"]
    assert results["scipy_largest_difference"] < 1e-9
    assert found["correlation"] > 0.9 > other["correlation"]
    assert found["of_log"] > other["of_log"] + 0.05


@pytest.mark.slow  # ten seconds
def test_constraints_are_met_where_the_curves_end(tmp_path):
    import importlib

    import pandas as pd

    importlib.import_module("reporting")
    example = importlib.import_module("constrained")
    example.main(["--epochs", "40", "--particles", "50", "--out", str(tmp_path)])
    curves = pd.read_csv(tmp_path / "curves.csv", index_col="beta")
    last = curves.groupby("beta").tail(10).groupby("beta")
    end, spread = last.mean(), last.std()  # of an epoch: they go up and down
    for name, choice in example.choices(1, 8).items():
        if name.startswith(("constraint", "capacity")):
            off = abs(end[choice.sets][name] - choice.target)
            assert off < 0.05 * choice.target + 3 * spread[choice.sets][name], (name, off)
    weight = end["KL weight"]
    assert weight["constraint, low rate"] > 1 > weight["constraint, high rate"]
    assert end["rate"]["free bits"] > end["rate"]["beta = 1"]


def test_a_batch_size_that_leaves_one_row_for_batch_norm(tmp_path, capsys):
    assert run("hierarchical", tmp_path, "--batch-size", "48") == 2  # 1297 = 27 * 48 + 1
    assert "use batch_size=49" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_vade_leaves_collapsed_mixtures_out(monkeypatch, capsys):
    import argparse
    import importlib

    from ppvae import conditionals, guides, models

    importlib.import_module("reporting")
    example = importlib.import_module("vade")
    x = torch.randn(60, 2) + 10 * (torch.arange(60) % 2)[:, None]
    encoder = torch.nn.Linear(2, 4)
    encoder.weight.data.copy_(torch.eye(2).repeat(2, 1))
    encoder.bias.data.zero_()
    prior = conditionals.Mixture(2, 2)
    model = models.VaDE(conditionals.Bernoulli(torch.nn.Linear(2, 3)), prior)
    initialise, bad = model.initialise, {0, 2}

    def sometimes(codes, seed, *rest):
        if seed in bad:
            raise ValueError("components [1] of 2 collapsed")
        return initialise(codes, seed, *rest)

    monkeypatch.setattr(model, "initialise", sometimes)
    args = argparse.Namespace(num_starts=4, covariance="diag", latent_dim=2)
    clusters = example.start(model, guides.Normal(encoder), x, args, 0)
    assert sorted(clusters.bincount().tolist()) == [30, 30]
    assert "left out 2 of 4 mixtures" in capsys.readouterr().out
    bad |= {1, 3}
    with pytest.raises(ValueError, match=r"none of 4 mixtures .* collapsed"):
        example.start(model, guides.Normal(encoder), x, args, 0)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--latent-dim", "1"], "--latent-dim must be 2 or more"),
        (["--batch-size", "9"], "the critic needs as many rows"),
        (["--epochs", "0"], "--epochs must be 1 or more"),
    ],
    ids=["latents", "rows", "epochs"],
)
def test_factor_refuses_before_any_work(tmp_path, capsys, options, match):
    assert run("factor", tmp_path, *options) == 2
    assert match in capsys.readouterr().err


def test_factor_names_the_cells_that_are_missing(tmp_path, capsys):
    assert run("factor", tmp_path / "out", "--cells", str(tmp_path)) == 2
    assert "has no VAE-SEED.json" in capsys.readouterr().err


def test_vade_refuses_one_latent_before_any_work(tmp_path, capsys):
    assert run("vade", tmp_path, "--latent-dim", "1") == 2
    assert "--latent-dim must be 2 or more" in capsys.readouterr().err


@SLOWLY
def test_table(tmp_path, capsys):
    import pandas as pd

    assert run("table", tmp_path) == 0
    assert "cells are missing" in capsys.readouterr().out
    imputed = pd.read_csv(tmp_path / "imputed.csv")
    assert imputed.shape == (442, 11) and not imputed.isna().any().any()
    assert set(imputed["course"]) <= {"little", "some", "more", "much"}
    errors = pd.read_csv(tmp_path / "columns.csv", index_col="column")
    assert (errors["imputed"] < 2).all() and errors["hidden"].between(100, 170).all()
    for name in ("cells.png", "pit.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_optimal_prior(tmp_path, capsys):
    assert run("optimal_prior", tmp_path) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["optimum"] == pytest.approx(-np.log(4))
    iop = results["iop"]
    assert iop["without_log_z"] == pytest.approx(iop["elbo"] + iop["log_z"])
    for prior in ("vae", "mixture", "vamp", "iop"):
        assert results[prior]["elbo"] <= results[prior]["log_evidence"] < results["optimum"]
    names = {"bound.png", "densities.png", "draws.png", "calibration.png", "results.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert run("optimal_prior", tmp_path / "none", "--num-draws", "5") == 2
    assert "--num-draws must be 100 or more" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("levels", ["1", "2"])
def test_vq(tmp_path, levels, capsys):
    assert run("vq", tmp_path, "--levels", levels) == 0
    found = {path.name for path in tmp_path.iterdir()}
    assert found == {"results.json", "usage.png", "codes.png", "samples.png"}
    results = json.loads((tmp_path / "results.json").read_text())
    places = 16 if levels == "1" else 16 + 4
    uniform = results["parts_nats"]["uniform"]["codes"]
    assert uniform == pytest.approx(places * np.log(8), rel=1e-5)  # h w log K
    assert "gru prior" in capsys.readouterr().out
