"""Who runs which virtual workers."""

from __future__ import annotations

import pytest

from largebatch.errors import ConfigError
from largebatch.recipe.batch import BatchSettings, Deal, deal_equally


@pytest.mark.parametrize("workers_per_pass", [1, 2, 3])
def test_every_worker_runs_once_in_order_and_ranks_differ_by_at_most_a_pass(workers_per_pass: int) -> None:
    for passes in range(1, 13):
        workers = passes * workers_per_pass
        for world_size in range(1, passes + 1):
            deal = deal_equally(workers, workers_per_pass, world_size)
            assert [p for part in deal.passes for p in part] == list(range(passes))
            run = [w for rank in range(world_size) for part in deal.workers_of(rank) for w in part]
            assert run == list(range(workers))
            counts = deal.workers_on_rank()
            assert sum(counts) == workers
            assert max(counts) - min(counts) <= workers_per_pass
            assert min(counts) > 0


def test_the_minibatch_is_k_workers_of_n_images() -> None:
    assert BatchSettings(virtual_workers=256, images_per_worker=32).global_batch == 8192


def test_too_many_ranks_is_an_error_that_says_how_many_fit() -> None:
    with pytest.raises(ConfigError, match=r"8 virtual workers make 8 passes.* 9 ranks.*at most 8 ranks"):
        deal_equally(8, 1, 9)
    with pytest.raises(ConfigError, match=r"workers_per_pass 4 make 2 passes.*at most 2 ranks"):
        deal_equally(8, 4, 3)


def test_passes_that_do_not_come_out_even_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"workers_per_pass: 3 does not divide batch.virtual_workers 8"):
        deal_equally(8, 3, 1)


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        (((0, 1), (1, 2)), "each pass must be dealt to one rank"),
        (((0, 1), (3,)), "each pass must be dealt to one rank"),
        (((0, 1), ()), "rank 1 has none"),
    ],
)
def test_a_deal_gives_each_pass_to_one_rank_and_each_rank_a_pass(passes: tuple[tuple[int, ...], ...], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        Deal(passes)
