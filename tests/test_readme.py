"""The README's Python blocks run, in order, as one session."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_readme_code_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 3
    session: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), session)
    loss = session["loss"](session["x"]) / len(session["x"])  # type: ignore[operator, arg-type]
    assert loss < 27  # nats per datapoint, after 50 epochs: trained
