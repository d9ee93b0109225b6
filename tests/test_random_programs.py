"""Ordinary programs of every kind against enumeration by hand: none may be silently wrong."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppvae.check import PairError, check_batch
from random_programs import Case, Spec, check

HOW = st.lists(st.sampled_from(["drawn", "model", "guide"]), min_size=1, max_size=3).map(tuple)
SPECS = st.builds(
    Spec,
    how=HOW,
    markov=st.booleans(),
    continuous=st.sampled_from([None, "before", "after"]),
    follows=st.booleans(),
    plate=st.sampled_from([None, "all", "data", "subsampled"]),
    mask=st.sampled_from([None, "site", "distribution", "observed"]),
    masked=st.sampled_from(["latents", "data", "both"]),
    nans=st.booleans(),
    expand=st.booleans(),
    labels_first=st.booleans(),
    particles=st.sampled_from([1, 3]),
    seed=st.integers(0, 1000),
)


def check_all(spec: Spec, labels: bool) -> None:
    """What every entry point asks about the program."""
    model, guide, *args = Case(spec).by_row(labels)
    check_batch(model, guide, *args, num_particles=spec.particles)


@settings(max_examples=200)
@given(SPECS)
def test_random_programs(spec: Spec) -> None:
    check(spec)


@pytest.mark.slow
@settings(max_examples=2500)
@given(SPECS)
def test_many_random_programs(spec: Spec) -> None:
    check(spec)


@settings(max_examples=60)
@given(SPECS, st.booleans())
def test_what_is_computed_is_approved(spec: Spec, labels: bool) -> None:
    check_all(spec, labels)


@settings(max_examples=100)
@given(SPECS, st.booleans(), st.sampled_from(["rows", "number", "dim", "left"]))
def test_what_is_wrong_is_never_approved(spec: Spec, labels: bool, broken: str) -> None:
    with pytest.raises(PairError):
        check_all(dataclasses.replace(spec, broken=broken), labels)


@pytest.mark.slow
@settings(max_examples=1000)
@given(SPECS, st.booleans())
def test_what_is_computed_is_approved_of_many(spec: Spec, labels: bool) -> None:
    check_all(spec, labels)


@pytest.mark.slow
@settings(max_examples=1500)
@given(SPECS, st.booleans(), st.sampled_from(["rows", "number", "dim", "left"]))
def test_what_is_wrong_is_never_approved_of_many(spec: Spec, labels: bool, broken: str) -> None:
    with pytest.raises(PairError):
        check_all(dataclasses.replace(spec, broken=broken), labels)
