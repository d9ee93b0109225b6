"""Ordinary programs of every kind against enumeration by hand: none may be silently wrong."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from random_programs import Spec, check

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


@settings(max_examples=200)
@given(SPECS)
def test_random_programs(spec: Spec) -> None:
    check(spec)


@pytest.mark.slow
@settings(max_examples=2500)
@given(SPECS)
def test_many_random_programs(spec: Spec) -> None:
    check(spec)
