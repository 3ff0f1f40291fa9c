"""mixup and CutMix against torchvision's and timm's, on the same draws."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from largebatch.data.mixing import Mixing
from largebatch.data.settings import Augmentation
from largebatch.recipe.draws import uniform

CLASSES, SEED, STEP, N = 5, 3, 11, 6
IMAGES = torch.randn(4 * N, 3, 14, 10, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4 * N) * 7 % CLASSES
WORKERS = range(8, 12)


def mixing(**settings: float) -> Mixing:
    return Mixing(Augmentation(**settings), classes=CLASSES, seed=SEED)


def draws(worker: int) -> list[float]:
    return uniform(np.arange(5), SEED, STEP, worker, 0x4D495855).tolist()


def test_mixup_is_torchvisions_with_a_share_from_beta() -> None:
    images, targets = mixing(mixup_alpha=0.4)(IMAGES, LABELS, STEP, WORKERS)
    for row, worker in enumerate(WORKERS):
        own = slice(row * N, (row + 1) * N)
        share = scipy.stats.beta.ppf(draws(worker)[2], 0.4, 0.4)
        operation = v2.MixUp(num_classes=CLASSES)
        inputs = {"labels": LABELS[own], "batch_size": N, "lam": share}
        assert torch.equal(images[own], operation.transform(IMAGES[own], inputs))
        torch.testing.assert_close(targets[own], operation.transform(inputs["labels"], inputs), rtol=0, atol=1e-7)


def test_cutmix_is_torchvisions_with_the_share_of_the_area_that_is_left() -> None:
    images, targets = mixing(cutmix_alpha=1.0)(IMAGES, LABELS, STEP, WORKERS)
    for row, worker in enumerate(WORKERS):
        own = slice(row * N, (row + 1) * N)
        _, _, lam, x, y = draws(worker)  # Beta(1, 1) is the uniform distribution
        half = 0.5 * math.sqrt(1 - lam)
        x, y, w, h = int(10 * x), int(14 * y), int(half * 10), int(half * 14)
        box = (max(x - w, 0), max(y - h, 0), min(x + w, 10), min(y + h, 14))
        share = 1 - (box[2] - box[0]) * (box[3] - box[1]) / 140
        inputs = {"labels": LABELS[own], "batch_size": N, "box": box, "lam_adjusted": share}
        operation = v2.CutMix(num_classes=CLASSES)
        assert torch.equal(images[own], operation.transform(IMAGES[own], inputs))
        torch.testing.assert_close(targets[own], operation.transform(inputs["labels"], inputs), rtol=0, atol=1e-7)


def test_loss_with_label_smoothing_is_that_of_timms_mixed_targets() -> None:
    mixup_target = pytest.importorskip("timm.data.mixup").mixup_target
    mix = mixing(mixup_alpha=0.8)
    logits = torch.randn(2, CLASSES, generator=torch.Generator().manual_seed(1))
    for step in range(5):
        _, targets = mix(IMAGES[:2], LABELS[:2], step, range(1))  # of two images, the neighbour is also timm's flip
        theirs = mixup_target(LABELS[:2], CLASSES, mix.draw(step, 0, 14, 10)[0], smoothing=0.1)
        loss = -(theirs * logits.log_softmax(1)).sum(1).mean()  # timm's SoftTargetCrossEntropy
        torch.testing.assert_close(F.cross_entropy(logits, targets, label_smoothing=0.1), loss)


def test_workers_mix_alone_and_by_draws_of_seed_step_and_worker() -> None:
    mix = mixing(mixup_alpha=1.0, cutmix_alpha=1.0)
    together = mix(IMAGES, LABELS, STEP, WORKERS)
    for row, worker in enumerate(WORKERS):
        own = slice(row * N, (row + 1) * N)
        alone = mix(
            IMAGES[own].contiguous(memory_format=torch.channels_last), LABELS[own], STEP, range(worker, worker + 1)
        )
        assert alone[0].is_contiguous(memory_format=torch.channels_last)
        for ours, expected in zip(alone, together, strict=True):
            assert torch.equal(ours, expected[own])
    shares = {mix.draw(step, worker, 14, 10) for step in range(9) for worker in range(9)}
    assert len({share for share, _ in shares}) > 60


def test_how_often_is_mixup_prob_and_mixup_switch_prob() -> None:
    mix = mixing(mixup_alpha=0.2, cutmix_alpha=1.0, mixup_prob=0.8, mixup_switch_prob=0.25)
    drawn = [mix.draw(step, worker, 64, 64) for step in range(100) for worker in range(40)]
    assert np.mean([share == 1 and box is None for share, box in drawn]) == pytest.approx(0.2, abs=0.03)
    assert np.mean([box is not None for _, box in drawn]) == pytest.approx(0.8 * 0.25, abs=0.03)
    shares = [share for share, box in drawn if box is None and share < 1]
    assert scipy.stats.kstest(shares, scipy.stats.beta(0.2, 0.2).cdf).pvalue > 1e-3
