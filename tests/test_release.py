"""What a release is made of says the same everywhere."""

import configparser
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
