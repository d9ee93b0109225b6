"""The course: every blank fails, every answer is right, and a checker tells 5 % from nothing.

The site's build runs the lessons whole. Here are only the cells that an exercise consists of, by
their tags: ``given`` (imports and what the exercise starts from), ``exercise`` and ``answer``.
"""

import re
import sys
from pathlib import Path

import pytest
import torch

COURSE = Path(__file__).parent.parent / "docs" / "course"
LESSONS = sorted(COURSE.glob("[0-9]*.md"))
CELL = re.compile(r"^```\{code-cell\}[^\n]*\n(?::tags: \[([^\]]*)\]\n)?(.*?)^```$", re.M | re.S)


def cells(lesson):
    """Tags and source of each code cell."""
    text = lesson.read_text()
    return [(set(re.split(r",\s*", tags or "")), code) for tags, code in CELL.findall(text)]


@pytest.fixture
def checks(monkeypatch):
    monkeypatch.syspath_prepend(str(COURSE))
    import checks

    yield checks
    sys.modules.pop("checks")


def test_there_are_thirteen_lessons():
    assert [lesson.name[:2] for lesson in LESSONS] == [f"{i:02d}" for i in range(1, 14)]


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_a_lesson_has_three_exercises_and_fits_in_250_lines(lesson):
    kinds = [tags & {"exercise", "answer"} for tags, _ in cells(lesson)]
    assert [kind for kind in kinds if kind] == [{"exercise"}, {"answer"}] * 3
    assert len(lesson.read_text().splitlines()) <= 250


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda lesson: lesson.stem)
def test_blanks_fail_answers_pass_and_wrong_ones_do_not(lesson, checks, monkeypatch, capsys):
    space, compared = {}, []

    def off(got, exact, tolerance=1e-4):
        """5 % and a little off: refused, or the checker checks nothing."""
        with pytest.raises(checks.NotYet, match="got"):
            checks.check(1.05 * checks.tensor(got) + 0.02, exact, tolerance)
        compared.append(got)

    for tags, code in cells(lesson):
        run = compile(code, lesson.name, "exec")
        if "given" in tags:
            exec(run, space)
        elif "exercise" in tags:
            assert {"raises-exception", "remove-output"} <= tags  # the notebook runs on
            with pytest.raises(checks.NotYet, match="still blank"):
                exec(run, space)
        elif "answer" in tags:
            assert "hide-cell" in tags
            exec(run, space)
            assert "right" in capsys.readouterr().out
            count = len(compared)
            exec(run, {**space, "check": off})
            assert len(compared) > count


def test_the_checker_refuses_what_is_no_number_or_of_another_shape(checks):
    checks.check([1.0, 200.01], torch.tensor([1.0, 200.0]))
    for got, exact in [
        (float("nan"), 0.0),
        (1.001, 1.0),
        (torch.zeros(2), torch.zeros(3)),
        ([1.03, 200.0], [1.0, 200.0]),
    ]:
        with pytest.raises(checks.NotYet):
            checks.check(got, exact)
