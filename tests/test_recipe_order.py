"""Contract 2: one shuffle an epoch, cut into steps of k rows of n."""

from __future__ import annotations

import random

import numpy as np
import pytest

from largebatch.errors import ConfigError
from largebatch.recipe.batch import deal_equally
from largebatch.recipe.order import EpochOrder, evaluation_batches, permutation

IMAGES, K, N = 103, 4, 6  # 4 steps an epoch, 7 images dropped
# Never to change between versions: a checkpoint would not resume, a result would not be repeated.
FIRST_IMAGES = [1, 0, 21, 78, 41, 37, 27, 73]
FINGERPRINTS = {
    0: "6e3c513458b42880636c6a65fc47daa76651e3ad441f6fb62f75fc72f4cad4c5",
    1: "ec5632af3b145366c262b7175310dc4577eccf969ca30375dbf1bfec2cf473a0",
}


@pytest.fixture
def order() -> EpochOrder:
    return EpochOrder(IMAGES, K, N, seed=5)


def test_steps_are_consecutive_rows_of_the_epochs_shuffle(order: EpochOrder) -> None:
    assert (order.steps_per_epoch, order.dropped_images) == (4, 7)
    for epoch in range(3):
        perm = permutation(IMAGES, 5, epoch, 0)
        assert sorted(perm.tolist()) == list(range(IMAGES))
        for t in range(4):
            rows = perm[t * K * N : (t + 1) * K * N].reshape(K, N)
            step = epoch * 4 + t
            assert order.epoch_of(step) == epoch
            for worker in range(K):
                assert order.indices(step, range(worker, worker + 1)).tolist() == rows[worker].tolist()
            assert order.indices(step, range(1, 3)).tolist() == rows[1:3].ravel().tolist()


def test_an_image_comes_at_most_once_an_epoch_and_others_are_dropped_each_time(order: EpochOrder) -> None:
    dropped = []
    for epoch in range(3):
        seen = np.concatenate([order.indices(epoch * 4 + t, range(K)) for t in range(4)])
        assert len(seen) == len(set(seen.tolist())) == 96
        dropped.append(set(range(IMAGES)) - set(seen.tolist()))
    assert dropped[0] != dropped[1] != dropped[2]


def test_the_same_for_every_number_of_ranks(order: EpochOrder) -> None:
    for step in (0, 3, 4):
        whole = order.indices(step, range(K)).tolist()
        for world_size in range(1, K + 1):
            deal = deal_equally(K, 1, world_size)
            dealt = [order.indices(step, w) for rank in range(world_size) for w in deal.workers_of(rank)]
            assert np.concatenate(dealt).tolist() == whole


def test_independent_of_who_asked_before(order: EpochOrder) -> None:
    forwards = [order.indices(step, range(K)).tolist() for step in range(20)]
    for shuffle in range(3):
        steps = list(range(20))
        random.Random(shuffle).shuffle(steps)
        other = EpochOrder(IMAGES, K, N, seed=5)
        assert {step: other.indices(step, range(K)).tolist() for step in steps} == dict(enumerate(forwards))


def test_seed_and_epoch_change_the_order(order: EpochOrder) -> None:
    other = EpochOrder(IMAGES, K, N, seed=6)
    assert order.indices(0, range(K)).tolist() != other.indices(0, range(K)).tolist()
    assert order.indices(0, range(K)).tolist() != order.indices(4, range(K)).tolist()


def test_the_order_never_changes_between_versions(order: EpochOrder) -> None:
    assert order.indices(0, range(K))[:8].tolist() == FIRST_IMAGES
    assert {epoch: order.fingerprint(epoch) for epoch in FINGERPRINTS} == FINGERPRINTS


def test_every_place_is_equally_likely_for_an_image() -> None:
    places = np.stack([np.argsort(permutation(20, seed)) for seed in range(2000)])  # [shuffles, images]
    counts = np.stack([np.bincount(column, minlength=20) for column in places.T])
    chi_squared = ((counts - 100) ** 2 / 100).sum()
    degrees = 19 * 19
    assert abs(chi_squared - degrees) < 5 * (2 * degrees) ** 0.5


def test_the_only_state_is_the_number_of_images_consumed(order: EpochOrder) -> None:
    assert [order.images_consumed(step) for step in (0, 1, 9)] == [0, 24, 216]


def test_one_shuffle_per_worker_is_the_ablation_of_remark_4() -> None:
    order = EpochOrder(IMAGES, K, N, seed=5, shuffle="per_worker")
    for worker in range(K):
        own = np.concatenate([order.indices(step, range(worker, worker + 1)) for step in range(4)])
        assert own.tolist() == permutation(IMAGES, 5, 0, worker)[: 4 * N].tolist()
    seen = np.concatenate([order.indices(step, range(K)) for step in range(4)])
    assert len(set(seen.tolist())) < len(seen), "an image comes more than once in an epoch"


def test_a_minibatch_larger_than_the_set_is_an_error_with_both_numbers() -> None:
    assert EpochOrder(24, 4, 6, seed=0).steps_per_epoch == 1
    with pytest.raises(ConfigError, match=r"4 x 6 = 24 images is more than the 23 training images"):
        EpochOrder(23, 4, 6, seed=0)


def test_evaluation_takes_every_image_once() -> None:
    for images in (1, 9, 10, 11, 30):
        batches = evaluation_batches(images, 10)
        assert [i for batch in batches for i in batch] == list(range(images))
        assert all(len(batch) == 10 for batch in batches[:-1])


@pytest.mark.parametrize("images", [48, 103])
def test_repeats_are_dealt_as_timms_sampler_deals_them_to_as_many_ranks(images: int) -> None:
    sampler = pytest.importorskip("timm.data.distributed_sampler").RepeatAugSampler
    order = EpochOrder(images, K, N, seed=5, repeats=3)
    for epoch in range(2):
        perm = permutation(images, 5, epoch, 0)
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        for worker in range(K):
            ours = np.concatenate([order.indices(step, range(worker, worker + 1)) for step in steps])
            theirs = perm[list(sampler(range(images), K, worker, shuffle=False, num_repeats=3, selected_round=0))]
            assert (ours % images).tolist() == theirs[: len(ours)].tolist()
        seen = np.concatenate([order.indices(step, range(K)) for step in steps])
        assert len(set(seen.tolist())) == len(seen), "a copy comes once"
        assert order.dropped_images == images - len(set((seen % images).tolist()))
