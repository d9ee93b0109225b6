"""A long run in parts: together all of the tests, none twice."""

import itertools

import pytest

from conftest import shard


@pytest.mark.parametrize("count", [0, 1, 7, 8, 100])
@pytest.mark.parametrize("parts", [1, 3, 8])
def test_shards_are_all_of_the_tests_once(count, parts):
    items = list(range(count))
    found = [shard(items, f"{part}/{parts}") for part in range(1, parts + 1)]
    assert sorted(itertools.chain(*found)) == items
    sizes = list(map(len, found))
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("which", ["0/8", "9/8", "1", "1/0", "-1/8", "1/8x", "a/b", ""])
def test_a_shard_that_is_none_is_refused(which):
    with pytest.raises(pytest.UsageError, match="I/N with 1 <= I <= N"):
        shard(range(8), which)
