"""The order of the data: permutations, from seed and position alone."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fewstep.data.order import sample_index


@given(st.integers(1, 200), st.integers(0, 2**63), st.integers(0, 2**40))
@settings(max_examples=30)
def test_an_epoch_is_a_permutation(n: int, seed: int, epoch: int) -> None:
    assert sorted(sample_index(seed, epoch * n + place, n) for place in range(n)) == list(range(n))


@given(st.integers(1, 2**62), st.integers(0, 2**62), st.integers(0, 2**63))
def test_any_number_of_items_and_any_position(n: int, position: int, seed: int) -> None:
    index = sample_index(seed, position, n)
    assert 0 <= index < n
    assert index == sample_index(seed, position, n)


def test_the_order_is_what_it_always_was() -> None:
    """A resumed run relies on it across versions."""
    order = [8, 7, 4, 6, 3, 0, 1, 5, 9, 2, 7, 4, 9, 2, 1, 8, 0, 3, 5, 6]
    assert [sample_index(42, position, 10) for position in range(20)] == order


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(sample_index(seed, epoch * 50 + i, 50) for i in range(50)) for seed in range(4) for epoch in range(4)
    }
    assert len(orders) == 16


def test_every_order_is_equally_likely() -> None:
    counts = Counter(tuple(sample_index(3, epoch * 4 + i, 4) for i in range(4)) for epoch in range(2400))
    assert set(counts) == set(permutations(range(4)))
    chi_squared = sum((count - 100) ** 2 / 100 for count in counts.values())
    assert chi_squared < 50  # 23 degrees of freedom: 1 in 1000 is 49.7


def test_neighbours_are_not_kept_together() -> None:
    """No trace of the files' order: steps of +1 are as rare as chance makes them."""
    n = 2000
    order = [sample_index(1, i, n) for i in range(n)]
    assert sum(b - a == 1 for a, b in pairwise(order)) < 8
    first_half = sum(index < n // 2 for index in order[: n // 2])
    assert abs(first_half - n / 4) < 5 * (n / 16) ** 0.5


@pytest.mark.parametrize(("position", "n"), [(0, 0), (-1, 5)])
def test_nonsense_is_refused(position: int, n: int) -> None:
    with pytest.raises(ValueError, match="allowed"):
        sample_index(0, position, n)
