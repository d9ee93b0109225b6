"""Odd calls of the public API are taken, or refused by an error that names the argument."""

import pytest

import odd_calls


@pytest.mark.parametrize(
    ("calls", "seed"), [(40, 1), pytest.param(2000, 0, marks=pytest.mark.slow)]
)
def test_an_odd_call_is_taken_or_named(calls, seed, capsys):
    found, wrong = odd_calls.attack(calls, seed)
    assert not wrong
    assert found["named"] > 0.6 * calls and found["taken"] > 0


@pytest.mark.parametrize("entry", odd_calls.ENTRIES)
@pytest.mark.slow
def test_a_call_with_nothing_odd_is_taken(entry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    function, valid, _ = odd_calls.ENTRIES[entry]
    function(**valid())


def test_what_is_wrong_is_seen():
    def call():
        raise KeyError("x")

    assert odd_calls.verdict("fit", {"data": "words"}, call) == "KeyError: 'x'"

    def unnamed():
        raise ValueError("bad input")

    assert odd_calls.verdict("fit", {"seed": "a word"}, unnamed).startswith("no name: ValueError")
    assert odd_calls.verdict("fit", {"seed": "a word"}, lambda: None) == "taken"
