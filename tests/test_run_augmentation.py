"""Every way to vary images gives the same weights on any number of ranks, and after a kill on another number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import DIGITS, SMALL, call, records, tensor_hashes, train_digits, train_digits_until_killed

MIXED = "data.augmentation={mixup_alpha: 0.4, cutmix_alpha: 1.0}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """96 and 12 small image files of 10 classes, which tell themselves apart by their colours."""
    root = tmp_path_factory.mktemp("images")
    for part, count in (("train", 96), ("val", 12)):
        for number in range(count):
            path = root / part / str(number % 10) / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            colours = np.random.default_rng([number % 10, number // 40]).integers(0, 256, (3, 3, 3), dtype=np.uint8)
            Image.fromarray(colours).resize((24, 20), Image.Resampling.BICUBIC).save(path)
    return root


def test_weights_do_not_depend_on_ranks_loaders_or_kills(tmp_path: Path, folder: Path) -> None:
    common = [
        *SMALL,
        "schedule={epochs: 2, decay: {kind: none}}",
        f"data={{name: imagefolder, root: {folder}, image_size: 16, val_image_size: 20}}",
        "data.progressive_resizing=[[0, 12], [1, 16]]",
        "data.augmentation={kind: auto, auto_augment: trivialaugment, color_jitter: [0.4, 0.4, 0.4, 0.1], repeats: 2}",
    ]

    one = tmp_path / "one"
    outcome = call("train", DIGITS, "--run-dir", one, *common)
    assert outcome.status == 0, outcome.err
    other, without_loaders = tmp_path / "other", [*common, "data.loader_processes=0"]
    train_digits_until_killed(other, 2, 3, *without_loaders)
    train_digits(other, 3, *without_loaders)
    assert tensor_hashes(one) == tensor_hashes(other)
    assert records(one) == records(other)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([MIXED, "batch.images_per_worker=1"], "batch.images_per_worker 1 leaves it none to blend with"),
        (["data.augmentation.repeats=2", "batch.shuffle=per_worker"], "data.augmentation.repeats 2 deals copies"),
        (["data.val_image_size=9"], "for image files; digits has images of one size"),
        (
            ["data={name: imagefolder, progressive_resizing: [[2, 16], [2, 32]]}", "data.augmentation.kind=auto"],
            "progressive_resizing [[2, 16], [2, 32]]: needs [epoch, pixels] with growing epochs",
        ),
        (["data.augmentation.mixup_alpha=-1"], "data.augmentation.mixup_alpha: -1"),
        (["data.augmentation.auto_augment=ra"], "data.augmentation.auto_augment: 'ra'"),
        (["data.augmentation.color_jitter=[0.4, 0.4, 0.4, 0.6]"], "the hue, the last value, is at most 0.5"),
        (["data.augmentation.color_jitter=[0.4, 0.4]"], "data.augmentation.color_jitter"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], said: str) -> None:
    outcome = call("plan", DIGITS, *overrides)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
