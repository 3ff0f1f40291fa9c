"""The stateless draws against the published SplitMix64, and their statistics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from largebatch.recipe.draws import bits, fold, mix_array, mix_int, uniform

MASK = 2**64 - 1
# The first outputs of SplitMix64 seeded with 1234567, as other implementations of it publish them.
SPLITMIX_OF_1234567 = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def splitmix_finaliser(z: int) -> int:
    """The algorithm as it is published, in exact integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def as_signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def reference_bits(index: int, *keys: int) -> int:
    """What `bits` promises for one index, in exact integers, as int64."""
    state = 0
    for key in keys:
        state = splitmix_finaliser((state + 0x9E3779B97F4A7C15 + key) & MASK)
    return as_signed(splitmix_finaliser(splitmix_finaliser((index + 0x9E3779B97F4A7C15) & MASK) ^ state))


def test_the_published_sequence() -> None:
    states = [(1234567 + i * 0x9E3779B97F4A7C15) & MASK for i in range(1, 6)]
    assert [mix_int(state) for state in states] == SPLITMIX_OF_1234567
    assert [splitmix_finaliser(state) for state in states] == SPLITMIX_OF_1234567
    signed = np.array([as_signed(state) for state in states], dtype=np.int64)
    assert mix_array(signed).view(np.uint64).tolist() == SPLITMIX_OF_1234567
    assert mix_array(torch.from_numpy(signed)).numpy().view(np.uint64).tolist() == SPLITMIX_OF_1234567


def test_numpy_torch_and_exact_integers_agree_to_the_last_bit() -> None:
    indices = np.concatenate([np.arange(-50, 200), 2**40 + np.arange(50), [2**63 - 1, -(2**63)]]).astype(np.int64)
    for keys in [(), (0,), (1, 2), (2**63, 2**64 - 1, 5), (-3, 7)]:
        expected = [reference_bits(int(i), *keys) for i in indices]
        assert bits(indices, *keys).tolist() == expected
        assert bits(torch.from_numpy(indices), *keys).tolist() == expected
        drawn, drawn_by_torch = uniform(indices, *keys), uniform(torch.from_numpy(indices), *keys)
        assert drawn.dtype == np.float64
        assert drawn_by_torch.dtype == torch.float64
        assert drawn.tolist() == drawn_by_torch.tolist() == [((e & MASK) >> 11) / 2**53 for e in expected]


def test_a_draw_does_not_depend_on_what_is_drawn_beside_it() -> None:
    many = uniform(np.arange(1000), 3, 4)
    assert uniform(np.array([17, 999, 0]), 3, 4).tolist() == many[[17, 999, 0]].tolist()


def test_moments_and_histogram_are_those_of_the_uniform_distribution() -> None:
    count = 200_000
    drawn = uniform(np.arange(count), 42, 7)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    # Five standard errors each.
    assert abs(drawn.mean() - 1 / 2) < 5 * (1 / 12 / count) ** 0.5
    assert abs(drawn.var() - 1 / 12) < 5 * (1 / 180 / count) ** 0.5
    counts = np.histogram(drawn, bins=100, range=(0, 1))[0]
    chi_squared = ((counts - count / 100) ** 2 / (count / 100)).sum()
    assert abs(chi_squared - 99) < 5 * (2 * 99) ** 0.5
    assert len(np.unique(drawn)) == count


@pytest.mark.parametrize("shift", [0, 1, 64])
def test_other_keys_and_shifted_indices_are_uncorrelated(shift: int) -> None:
    count = 20_000
    indices = np.arange(count)
    keys = [(0,), (1,), (0, 1), (1, 0), (2**40,)]
    columns = [uniform(indices + shift * i, *key) for i, key in enumerate(keys)]
    for left, right in itertools.combinations(columns, 2):
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / count**0.5


def test_neighbouring_draws_are_uncorrelated() -> None:
    drawn = uniform(np.arange(20_001), 5)
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / 20_000**0.5


def test_the_order_and_the_number_of_the_keys_count() -> None:
    keys = [(), (0,), (0, 0), (1,), (0, 1), (1, 0), (1, 0, 0)]
    assert len({fold(*key) for key in keys}) == len(keys)
