"""A small folder of images, which several test files train on and spoil."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

CLASSES = ("cat", "dog")
PER_CLASS = 8
CONFIG = """
model: {name: resnet8}
data: {name: imagefolder, root: ROOT, image_size: 16, resize_size: 20, loader_processes: 0}
batch: {virtual_workers: 2, images_per_worker: 4}
schedule: {epochs: 1, reference_batch: 8, warmup: {kind: none}, decay: {kind: none}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as `make_folder` leaves it."""
    return make_folder(tmp_path)


def make_folder(tmp_path: Path) -> Path:
    """set/train with 16 images and set/val with 4, each of a colour of its own, and a config.yaml for them."""
    for part, count in (("train", PER_CLASS), ("val", 2)):
        for number, name in enumerate(CLASSES):
            (tmp_path / "set" / part / name).mkdir(parents=True)
            for index in range(count):
                colour = (12 * (number * count + index) + 20, 90, 100 * number + 20)
                path = tmp_path / "set" / part / name / f"{index}.jpg"
                Image.new("RGB", (40, 30), colour).save(path, quality=95)
    (tmp_path / "config.yaml").write_text(CONFIG.replace("ROOT", str(tmp_path / "set")))
    return tmp_path
