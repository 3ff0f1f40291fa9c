"""Contract 8: every image once, on any number of ranks, and the same numbers to the last bit."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn

from largebatch.data.memory import MemorySource
from largebatch.data.source import Batches, Pass
from largebatch.distributed.environment import Launch, connect
from largebatch.training.evaluation import evaluate

IMAGES, BATCHES, CLASSES = 107, (1, 10, 50, 107, 200), 8


class CountingSource(MemorySource):
    """Remembers which images it gave."""

    seen: list[int]

    def stream(self, passes: Iterable[Pass], *, augment: bool) -> Batches:
        """The images as they are; evaluation never augments."""
        assert not augment
        self.seen = []
        for given in passes:
            self.seen += given.indices.tolist()
            yield self.batch(given.epoch, given.indices, augment=False)


def source(classes: int = CLASSES) -> CountingSource:
    generator = torch.Generator().manual_seed(0)
    return CountingSource(
        torch.randint(0, 256, (IMAGES, 1, 4, 4), generator=generator, dtype=torch.uint8),
        torch.randint(0, classes, (IMAGES,), generator=generator),
        classes=classes,
        mean=[0.5],
        std=[0.25],
    )


def make_model(classes: int = CLASSES) -> nn.Module:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, classes))
    model[2].running_mean.uniform_(-1, 1)
    return model


def evaluate_all(launch: Launch) -> list[tuple[dict[str, float], list[int]]]:
    """For every batch size: the result, and the images that this rank evaluated."""
    results = []
    with connect(launch, device="cpu") as ranks:
        for images_per_batch in BATCHES:
            images = source()
            result = evaluate(make_model(), images, ranks, images_per_batch=images_per_batch)
            results.append((result, images.seen))
    return results


@functools.cache
def results(world_size: int) -> list[list[tuple[dict[str, float], list[int]]]]:
    return run_ranks(evaluate_all, world_size)


def plain_loop(classes: int = CLASSES) -> dict[str, float]:
    """One image after the other, in plain Python where it matters."""
    images, model = source(classes), make_model(classes).eval()
    loss, wrong, wrong_of_five = 0.0, 0, 0
    for index in range(IMAGES):
        pixels, labels = images.batch(0, np.array([index]), augment=False)
        with torch.no_grad():
            logits = model(pixels)[0].tolist()
        label = int(labels)
        ranking = sorted(range(classes), key=lambda c: -logits[c])
        loss += math.log(sum(math.exp(x) for x in logits)) - logits[label]
        wrong += ranking[0] != label
        wrong_of_five += label not in ranking[:5]
    return {
        "val/loss": loss / IMAGES,
        "val/top1_error": 100 * wrong / IMAGES,
        "val/top5_error": 100 * wrong_of_five / IMAGES,
        "val/images": IMAGES,
    }


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_image_once_and_the_numbers_of_a_plain_loop(world_size: int) -> None:
    expected = plain_loop()
    assert 0 < expected["val/top5_error"] < expected["val/top1_error"] < 100
    for size in range(len(BATCHES)):
        seen = Counter(image for rank in results(world_size) for image in rank[size][1])
        assert seen == Counter(range(IMAGES))
        for rank in results(world_size):
            assert rank[size][0] == pytest.approx(expected, rel=1e-6)
            assert rank[size][0]["val/images"] == IMAGES


def test_the_same_to_the_last_bit_on_any_number_of_ranks() -> None:
    alone = [result for result, _ in results(1)[0]]
    for world_size in (2, 3, 4):
        for rank in results(world_size):
            assert [result for result, _ in rank] == alone


def test_five_classes_have_no_error_among_the_best_five() -> None:
    with connect(Launch(), device="cpu") as ranks:
        result = evaluate(make_model(4), source(4), ranks, images_per_batch=20)
    expected = plain_loop(4)
    del expected["val/top5_error"]
    assert result == pytest.approx(expected, rel=1e-6)


def test_the_model_goes_back_to_training_and_keeps_its_statistics() -> None:
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with connect(Launch(), device="cpu") as ranks:
        for training in (True, False):
            model.train(training)
            evaluate(model, source(), ranks, images_per_batch=20)
            assert model.training == training
    after: dict[str, Tensor] = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_a_source_that_loses_images_is_found_out() -> None:
    class Short(CountingSource):
        def batch(self, epoch: int, indices: np.ndarray, augment: bool = True) -> tuple[Tensor, Tensor]:
            images, labels = super().batch(epoch, indices, augment)
            return images[1:], labels[1:]

    short = source()
    short.__class__ = Short
    with connect(Launch(), device="cpu") as ranks, pytest.raises(AssertionError, match=r"evaluated 101.* of 107"):
        evaluate(make_model(), short, ranks, images_per_batch=20)
