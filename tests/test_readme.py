"""The README's Python blocks run, in order, as one session; in `make test` hardly trained."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("trained", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_readme_code_runs(trained: bool, request: pytest.FixtureRequest) -> None:
    if not trained:
        request.getfixturevalue("traced")  # nothing is built either
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    session: dict[str, object] = {}
    for block in blocks:
        code = block if trained else re.sub(r"epochs=\d+", "epochs=1", block)
        exec(compile(code, str(README), "exec"), session)
    loss = session["loss"](session["x"]) / len(session["x"])  # type: ignore[operator, arg-type]
    assert loss.isfinite()
    assert not trained or loss < 27  # nats per datapoint, after 50 epochs: trained


def test_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.split()) <= 700
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", text)
    local = [a or b for a, b in targets if not (a or b).startswith("http")]
    assert len(local) > 20
    assert [target for target in local if not (README.parent / target).exists()] == []


def test_every_example_is_in_the_gallery() -> None:
    root = README.parent
    gallery = (root / "docs" / "gallery.md").read_text(encoding="utf-8")
    scripts = {path.name for path in (root / "examples").glob("*.py")} - {"reporting.py"}
    assert {name for name in scripts if f"../examples/{name}" not in gallery} == set()
