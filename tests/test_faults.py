"""The tool that breaks lines: it tells seen, not seen and stale faults apart."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

LISTS = Path(__file__).parent / "faults"
spec = importlib.util.spec_from_file_location("faults_run", LISTS / "run.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)

SEEN = """sums.py: test_sums.py
# the sign
-    return a + b
+    return a - b
"""
NOT_SEEN = """
# the order
-    c = a * b
-    return c
+    c = b * a
+    return c
"""
KNOWN = """
! the order, which is the same
-    c = a * b
+    c = b * a
"""
STALE = """
# a line that stands twice
-    "A docstring."
+    "Another."
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the tool on a repository with a list of faults: its exit status."""
    root, lists = tmp_path / "root", tmp_path / "lists"
    root.mkdir(), lists.mkdir()
    doc = '    "A docstring."\n'
    code = f"def plus(a, b):\n{doc}    return a + b\n\n\ndef times(a, b):\n{doc}    c = a * b\n"
    (root / "sums.py").write_text(f"{code}    return c\n")
    test = (
        "import sums\n\n\ndef test():\n    assert (sums.plus(2, 3), sums.times(2, 3)) == (5, 6)\n"
    )
    (root / "test_sums.py").write_text(test)
    (root / "setup.cfg").write_text("[tool:pytest]\nmarkers =\n    slow: x\n    cuda: x\n")
    subprocess.run(["git", "init", "-q", root], check=True)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # they take a second
    monkeypatch.setattr(tool, "prepare", lambda root: monkeypatch.syspath_prepend(root))

    def call(text, *arguments):
        (lists / "sums.txt").write_text(text)
        return tool.main(["--root", str(root), "--lists", str(lists), *arguments])

    return call


@pytest.mark.forks
@pytest.mark.parametrize(
    ("faults", "status", "share"),
    [(SEEN + NOT_SEEN, 1, "1 of    2"), (SEEN + KNOWN, 0, "1 of    2")],
)
def test_a_fault_that_no_test_sees_is_told(run, capfd, faults, status, share):
    assert run(faults) == status
    out = capfd.readouterr().out
    assert "seen      sums.txt:1: sums.py: the sign" in out and f"all               {share}" in out
    assert "not seen  sums.txt:6: sums.py: the order" in out
    assert ("(listed as not seen)" in out) == (faults == SEEN + KNOWN)


@pytest.mark.forks
def test_tests_that_fail_anyway_see_nothing(run, tmp_path, capfd):
    path = tmp_path / "root" / "test_sums.py"
    path.write_text(path.read_text().replace("(5, 6)", "(5, 7)"))
    assert run(SEEN) == 1
    assert "without a fault: FAILED test_sums.py::test" in capfd.readouterr().out


def test_a_line_that_does_not_stand_once_is_told(run, capsys):
    assert run(SEEN + STALE, "--check") == 1
    assert "stale     sums.txt:6: sums.py has not once" in capsys.readouterr().out
    assert run(SEEN + NOT_SEEN, "--check") == 0
    assert run(SEEN, "--check", "no such fault") == 1


def test_a_fault_that_is_none_is_refused(run):
    with pytest.raises(SyntaxError):
        run(SEEN.replace("a - b", "a -"), "--check")
    with pytest.raises(
        SystemExit, match=r"sums.txt:1: a fault needs a head, and lines that differ"
    ):
        run(SEEN.replace("a - b", "a + b"), "--check")
