"""Every way to vary images gives the same weights on any number of ranks, and after a kill on another number."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import DIGITS, SMALL, call, records, tensor_hashes, train_digits, train_digits_until_killed

SHORT = ["schedule.epochs=1", "schedule.decay.kind=none"]
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


@pytest.mark.parametrize(
    ("overrides", "files"),
    [
        pytest.param([MIXED, "execution.workers_per_pass=2"], False, id="mixup_and_cutmix"),
        pytest.param(["data.augmentation={auto_augment: randaugment, random_erasing: 0.5}"], False, id="randaugment"),
        pytest.param(
            ["data.augmentation={auto_augment: trivialaugment, color_jitter: [0.4, 0.4, 0.4, 0.1]}"],
            True,
            id="trivialaugment_of_files",
        ),
    ],
)
def test_weights_do_not_depend_on_ranks_loaders_or_kills(
    tmp_path: Path, folder: Path, overrides: list[str], files: bool
) -> None:
    data = f"data={{name: imagefolder, root: {folder}, image_size: 16, augmentation: {{kind: resized_crop}}}}"
    common = [*SMALL, *SHORT, *([data, "schedule.epochs=2"] if files else [])]

    def train_here(name: str, *arguments: str) -> Path:
        outcome = call("train", DIGITS, "--run-dir", tmp_path / name, *common, *arguments)
        assert outcome.status == 0, outcome.err
        return tmp_path / name

    one = train_here("one", *overrides)
    other, without_loaders = tmp_path / "other", [*common, *overrides, "data.loader_processes=0"]
    train_digits_until_killed(other, 2, 3, *without_loaders)
    train_digits(other, 3, *without_loaders)
    assert tensor_hashes(one) == tensor_hashes(other)
    assert records(one) == records(other)
    plain = train_here("plain", *[override for override in overrides if "data." not in override])
    assert tensor_hashes(plain) != tensor_hashes(one)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([MIXED, "batch.images_per_worker=1"], "batch.images_per_worker 1 leaves it none to blend with"),
        (["data.augmentation.mixup_alpha=-1"], "data.augmentation.mixup_alpha: -1"),
        (["data.augmentation.auto_augment=ra"], "data.augmentation.auto_augment: 'ra'"),
        (["data.augmentation.color_jitter=[0.4, 0.4, 0.4, 0.6]"], "the hue, the last one, is 0.5 at most"),
        (["data.augmentation.color_jitter=[0.4, 0.4]"], "data.augmentation.color_jitter"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], said: str) -> None:
    outcome = call("plan", DIGITS, *overrides)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
