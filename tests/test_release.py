"""What a release is made of says the same everywhere."""

import configparser
import importlib.util
import re
from pathlib import Path

import yaml

import ppvae

ROOT = Path(__file__).parents[1]


def requirements() -> dict[str, str]:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = config["options"]["install_requires"].split("\n")
    found = [re.fullmatch(r"([\w-]+)\s*(.*)", line.strip()) for line in lines]
    return {match[1]: match[2] for match in found if match}


def test_the_conda_recipe_asks_for_what_setup_cfg_asks_for() -> None:
    recipe = yaml.safe_load((ROOT / "packaging/conda-forge.yaml").read_text(encoding="utf-8"))
    assert recipe["context"]["version"] == ppvae.__version__
    lines = [line.partition(" ") for line in recipe["requirements"]["run"]]
    names = {"pytorch": "torch", "matplotlib-base": "matplotlib"}
    ours = {names.get(name, name): versions for name, _, versions in lines}
    assert ours.pop("python")
    assert ours == requirements()


def test_every_requirement_is_pinned_and_has_its_reason() -> None:
    pinned = (ROOT / "constraints.txt").read_text(encoding="utf-8").lower()
    reasons = (ROOT / "docs/design.md").read_text(encoding="utf-8").split("## Dependencies")[1]
    for name in requirements():
        assert re.search(rf"^{name}==", pinned, re.MULTILINE), name
        assert f"`{name}`" in reasons, name


def test_every_figure_has_the_command_that_makes_it() -> None:
    spec = importlib.util.spec_from_file_location("figures", ROOT / "docs/figures.py")
    assert spec and spec.loader
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    made = [figure for pictures in figures.COMMANDS.values() for figure in pictures]
    assert sorted(made) == sorted(path.stem for path in (ROOT / "docs/figures").glob("*.png"))
    for command, pictures in figures.COMMANDS.items():
        script = re.findall(r"python (\S+\.py)", command)[-1]
        source = (ROOT / script).read_text(encoding="utf-8")
        for file in pictures.values():
            assert file in source or script == "benchmarks/inference_gaps.py", (script, file)
