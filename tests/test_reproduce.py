"""The reproductions: their frame, and whether each system's cells run."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from ppvae import data

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def reproduce(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import reproduce

    return reproduce


def test_a_cell_is_run_once_and_only_by_its_recipe(reproduce, tmp_path, capsys):
    runs = []

    def run(recipe, folder):
        runs.append(recipe)
        return {"score": recipe["epochs"] + 0.5}

    system, path = SimpleNamespace(run=run), tmp_path / "one.json"
    first = reproduce.cell(system, {"epochs": 2, "hidden": (3, 4)}, path)
    again = reproduce.cell(system, {"epochs": 2, "hidden": (3, 4)}, path)
    assert first == again == json.loads(path.read_text())
    assert len(runs) == 1 and first["score"] == 2.5
    assert {"wall_seconds", "cpu_seconds", "torch", "threads"} <= first.keys()
    assert first["device"] == "cpu"  # whether or not there is a GPU
    with pytest.raises(SystemExit, match="give another --out"):
        reproduce.cell(system, {"epochs": 3, "hidden": (3, 4)}, path)


def test_a_cell_that_fails_leaves_nothing(reproduce, tmp_path):
    def run(recipe, folder):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce.cell(SimpleNamespace(run=run), {}, tmp_path / "one.json")
    assert not list(tmp_path.iterdir())


def test_unknown_cells_are_named(reproduce, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "iwae", "--cells", "3L-50"])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert "no cell ['3L-50'] in iwae; it has ['1L-1'" in capsys.readouterr().err


def test_the_papers_schedules(reproduce, monkeypatch, capsys):
    systems = [reproduce.SYSTEMS[name] for name in ("avb", "iop", "iwae", "ladder", "nvae")]
    for system in systems:
        for recipe in system.CELLS.values():
            longer = system.full(recipe)
            assert longer.keys() == recipe.keys()
            assert all(longer[key] >= recipe[key] for key in ("num_test", "seed"))
    stages = reproduce.reproduce_iwae.full(reproduce.reproduce_iwae.BASE)["num_stages"]
    assert sum(3**i for i in range(stages)) == 3_280
    system = reproduce.reproduce_factor
    for recipe in system.CELLS.values():
        assert system.full(recipe).keys() == recipe.keys()
    rows = 3 * 6 * 40 * 32 * 32
    assert system.full(system.BASE)["epochs"] * rows // 64 == 299_520  # whole epochs
    monkeypatch.setattr(sys, "argv", ["reproduce.py", "nvdm", "--full"])
    with pytest.raises(SystemExit):
        reproduce.main()
    assert "not for nvdm" in capsys.readouterr().err


@pytest.mark.slow
def test_factor_vae_on_the_file_of_dsprites(reproduce, monkeypatch, tmp_path):
    """The paper's recipe, cut short, from a small file of that form: networks, mapped images."""
    sprites = data.sprites(64, sizes=(3, 2, 4, 4, 4))
    classes = sprites.factors(torch.arange(len(sprites)))
    path = tmp_path / "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
    color = torch.zeros(len(sprites), 1, dtype=classes.dtype)
    classes = torch.cat([color, classes], 1).numpy()
    np.savez(path, imgs=sprites.images[:, 0].numpy(), latents_classes=classes)
    monkeypatch.setenv("PPVAE_DATA", str(tmp_path))
    system = reproduce.reproduce_factor
    recipe = system.full(system.CELLS["Factor-0"]) | {"epochs": 1, "critic": [8], "compile": False}
    recipe |= {"ratio_steps": 5, "votes": 20, "dci_rows": 200, "dci_trees": 1}
    found = system.run(recipe, tmp_path / "Factor-0")
    assert found["steps"] == 6 and len(found["kl_by_unit"]) == 10  # 382 of 384 images


def test_codes_of_cifar_images(reproduce, monkeypatch, tmp_path, capsys):
    """The recipe of 10,000 steps, cut short, from a small file of that form."""
    system = reproduce.reproduce_vq
    whole = system.full(system.CELLS["mnist-1"])
    assert (whole["steps"], whole["codes"], whole["batch_size"]) == (10_000, 512, 32)
    assert whole["steps"] % (whole["num_train"] // whole["batch_size"]) == 0  # whole epochs
    command = ["reproduce.py", "vq", "--full", "--quick", "--cells", "mnist-1"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path)])
    monkeypatch.setenv("PPVAE_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="write CIFAR-10 there"):
        reproduce.main()
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (96, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", x=images)
    reproduce.main()
    found = json.loads((tmp_path / "vq" / "quick" / "mnist-1.json").read_text())
    assert found["steps"] == 3 and found["recipe"]["codes"] == 8
    assert 0.9 < found["nmse"] < 1.5  # of noise nothing can be learned in three steps
    assert 1 <= found["perplexity_in_batches"] <= found["perplexity"] <= 8
    assert "| mnist-1 | " in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_networks_of_codes_of_cifar_images_train(reproduce, monkeypatch, tmp_path):
    system = reproduce.reproduce_vq
    images = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "cifar10.npz", x=images)
    monkeypatch.setenv("PPVAE_DATA", str(tmp_path))
    recipe = system.full(system.CELLS["mnist-1"]) | {"steps": 2, "num_train": 64}
    found = system.run(recipe, tmp_path / "run")
    assert found["steps"] == 2 and 0.9 < found["nmse"] < 1.5
    assert 1 <= found["perplexity"] <= 512


@pytest.mark.slow
def test_the_whole_networks_of_nvae_train(reproduce, monkeypatch, tmp_path):
    """Two steps of the recipe of 400 epochs, on noise: 33 million parameters."""
    system = reproduce.reproduce_nvae
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    noise = data.from_arrays(images, valid=1, test=4, binarize="dynamic")
    monkeypatch.setattr(system.data, "load", lambda *_, **__: noise)
    recipe = system.full(system.CELLS["seed-0"])
    cut = {"epochs": 1, "num_train": 4, "batch_size": 2, "num_test": 2, "num_evidence": 2}
    found = system.run(recipe | cut | {"num_samples": 2}, tmp_path / "run")
    assert found["parameters"] == 33_494_750 and len(found["kl"]) == 15
    assert all(np.isfinite([found["elbo"], found["log_evidence"], *found["train_objective"]]))
    assert found["elbo"] < -200  # of noise nothing is learned in two steps


@pytest.mark.parametrize("name", ["ladder", "bottom-up"])
def test_renormalise_gives_the_moments_of_all_rows(reproduce, name):
    system = reproduce.SYSTEMS["ladder"]
    model, guides = system.hierarchical.mlp_pair(6, [3, 2], [5, 4], True)
    x = torch.rand(50, 6).round()
    system.renormalise(model, guides[name], x)
    first = guides[name].blocks[0] if name == "ladder" else guides[name].levels[0]
    linear = next(module for module in first.modules() if isinstance(module, nn.Linear))
    norm = next(module for module in first.modules() if isinstance(module, nn.BatchNorm1d))
    torch.testing.assert_close(norm.running_mean, linear(x).mean(0))
    torch.testing.assert_close(norm.running_var, linear(x).var(0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ppvae.metrics.UnusedClusterWarning")
@pytest.mark.parametrize(
    "name",
    ["avb", "cvae", "factor", "iop", "iwae", "ladder", "m2", "miwae", "nvae", "nvdm", "vade", "vq"],
)
def test_every_cell_runs_when_it_is_cut_short(reproduce, monkeypatch, tmp_path, capsys, name):
    system = reproduce.SYSTEMS[name]
    needed = {"nvdm": "20newsgroups", "factor": "digits", "m2": "digits"}.get(name, "mnist")
    try:
        data.load(needed)
    except OSError as error:
        pytest.skip(f"{needed} is not in the cache and cannot be fetched: {error}")
    monkeypatch.setattr(sys, "argv", ["reproduce.py", name, "--quick", "--out", str(tmp_path)])
    reproduce.main()
    written = {path.stem for path in (tmp_path / name / "quick").glob("*.json")}
    assert written == set(system.CELLS)
    table = capsys.readouterr().out
    assert "|---|" in table and "nan" not in table
