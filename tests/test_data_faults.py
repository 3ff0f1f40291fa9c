"""Faults in a folder of pictures: the command names the file and stops, or, asked to, skips it the same everywhere."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_folders import call, call_on, records, tensor_hashes
from torch import Tensor

from largebatch.data.load import load
from largebatch.data.pictures import open_picture
from largebatch.data.settings import DataSettings
from largebatch.data.source import Pass
from largebatch.errors import DataError


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def as_text(path: Path) -> None:
    path.write_text("not a picture")


def empty_class(path: Path) -> None:
    for part in ("train", "val"):
        (path.parents[2] / part / "ant").mkdir()


def convert(mode: str) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with Image.open(path) as picture:
            converted = picture.convert(mode)
        converted.save(path)

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (truncate, "train/dog/2.jpg: is damaged"),
        (as_text, "train/dog/2.jpg: is not an image"),
        (empty_class, "train/ant: no images in this class folder"),
    ],
)
def test_the_command_stops_and_names_the_file(folder: Path, spoil: Callable[[Path], None], message: str) -> None:
    spoil(folder / "set/train/dog/2.jpg")
    done = call("train", folder / "config.yaml", "--run-dir", folder / "run")
    assert done.status == 2
    assert message in done.err
    assert "Traceback" not in done.err
    assert not (folder / "run/model.pt").exists()


def test_an_unreadable_file() -> None:
    """For a user to whom permissions apply, which root is for a moment."""
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        bad = Path(folder) / "bad.jpg"
        Image.new("RGB", (40, 30)).save(bad)
        bad.chmod(0)
        os.seteuid(65534)
        try:
            with pytest.raises(DataError, match=rf"^{bad}: cannot be read .Permission denied."):
                open_picture(str(bad))
        finally:
            os.seteuid(0)


@pytest.mark.parametrize("mode", ["CMYK", "L"])
def test_cmyk_and_grey_are_no_faults(folder: Path, mode: str) -> None:
    convert(mode)(folder / "set/train/dog/2.jpg")
    assert call("train", folder / "config.yaml", "--run-dir", folder / "run").status == 0


class Labelled:
    """A dataset of one's own, with a label that no class has, and a picture that raises."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.labels[index] == 77:
            raise KeyError("lost")
        return torch.full((3, 20, 20), 10 * index, dtype=torch.uint8), self.labels[index]


def make_labelled() -> tuple[Labelled, Labelled]:
    return Labelled([0, 1, 9, 1, 0, 77]), Labelled([0, 1])


def own(**options: Any) -> DataSettings:
    return DataSettings(
        name=f"{__name__}:make_labelled", classes=2, image_size=16, resize_size=16, loader_processes=0, **options
    )


def read(settings: DataSettings, *passes: list[int], augment: bool = False) -> tuple[Tensor, Tensor, int]:
    """All images and labels of the passes, and how many pictures were skipped."""
    source, _ = load(settings, seed=3, device=torch.device("cpu"))
    batches = list(source.stream([Pass(1, np.array(indices)) for indices in passes], augment=augment))
    return torch.cat([images for images, _ in batches]), torch.cat([labels for _, labels in batches]), source.skipped


def test_a_label_out_of_range_and_a_dataset_that_raises_are_named() -> None:
    with pytest.raises(DataError, match=r"training set, image 2: label 9 is outside 0\.\.1"):
        read(own(), [1, 2])
    with pytest.raises(DataError, match=r"training set, image 5: KeyError: 'lost' \(.*test_data_faults.py:\d+\)"):
        read(own(), [5])
    _, labels, skipped = read(own(on_error="skip"), [1, 2, 5])
    assert labels.tolist() == [1, 1, 0]  # 3 stands in for 2, and 0 for 5, the last
    assert skipped == 2


def imagefolder(folder: Path, processes: int = 0, **options: Any) -> DataSettings:
    return DataSettings(
        name="imagefolder",
        root=str(folder / "set"),
        image_size=16,
        resize_size=20,
        loader_processes=processes,
        on_error="skip",
        **options,
    )


def test_the_next_good_picture_stands_in(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The last two of a class are bad, so the first of the next class comes twice more, with its own label."""
    good, good_labels, _ = read(imagefolder(folder), list(range(16)))
    for number in (6, 7):
        truncate(folder / f"set/train/cat/{number}.jpg")
    with caplog.at_level(logging.WARNING):
        images, labels, skipped = read(imagefolder(folder), list(range(16)), [6])
    expected = [*range(6), 8, 8, *range(8, 16), 8]
    assert torch.equal(images, good[expected])
    assert torch.equal(labels, good_labels[expected])
    assert skipped == 2 + 1 + 2  # 6 passes over 7 too
    named = [record.getMessage().split(": ")[1] for record in caplog.records]
    assert named == [str(folder / f"set/train/cat/{number}.jpg") for number in (6, 7)]


def test_the_same_stands_in_whatever_the_passes_and_processes(folder: Path) -> None:
    as_text(folder / "set/train/cat/3.jpg")
    whole = read(imagefolder(folder), list(range(16)), augment=True)
    parts = read(imagefolder(folder, processes=2), *([2 * i, 2 * i + 1] for i in range(8)), augment=True)
    assert torch.equal(whole[0], parts[0])
    assert whole[2] == parts[2] == 1


def test_a_folder_that_is_gone_is_not_skipped(folder: Path) -> None:
    for path in (folder / "set/train").glob("*/*.jpg"):
        as_text(path)
    with pytest.raises(DataError, match="100 image files in a row are unusable"):
        read(imagefolder(folder), [0])


def test_skipping_gives_the_same_weights_on_two_ranks(folder: Path) -> None:
    truncate(folder / "set/train/cat/7.jpg")
    as_text(folder / "set/train/dog/2.jpg")
    hashes, counted = [], []
    for ranks in (1, 2):
        run = folder / f"run-{ranks}"
        outcomes = call_on(ranks, "train", folder / "config.yaml", "--run-dir", run, "data.on_error=skip")
        assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes
        hashes.append(tensor_hashes(run))
        counted.append([record.get("skipped_images", 0) for record in records(run)][-1])
    assert hashes[0] == hashes[1]
    assert counted[0] == counted[1] > 0
