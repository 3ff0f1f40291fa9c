"""Image files as people have them: read as Pillow reads them, or refused by their name."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_data_faults import imagefolder, read, truncate

from largebatch.data import jpeg
from largebatch.data.load import load
from largebatch.data.pictures import open_picture, random_crop, validation_view
from largebatch.data.settings import DataSettings
from largebatch.data.source import Pass
from largebatch.errors import DataError


def pixels_of(path: Path) -> np.ndarray:
    picture = open_picture(str(path))
    return picture.top(picture.height)


RAMP = np.linspace(0, 65535, 12 * 10).reshape(10, 12).astype(np.uint16)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name.endswith("pgm"):
        path.write_bytes(b"P5 12 10 65535\n" + RAMP.astype(">u2").tobytes())
    else:
        Image.fromarray(RAMP).save(path)
    expected = np.rint(RAMP / 257).astype(np.uint8)
    assert np.array_equal(pixels_of(path), np.stack([expected] * 3, axis=2))


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_numbers_without_a_range_are_refused_by_name(tmp_path: Path, dtype: Any, kind: str) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP.astype(dtype)).save(path)
    with pytest.raises(DataError, match=rf"{path}: its pixels are {kind}"):
        open_picture(str(path))


def jpeg_bytes() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize((320, 240)).save(out, "JPEG", quality=90)
    return out.getvalue()


def scan_parameters_of_0(data: bytes) -> bytes:
    at = data.index(b"\xff\xda")
    return data[: at + 11] + b"\0\0\0" + data[at + 14 :]


def jfif_2_01(data: bytes) -> bytes:
    at = data.index(b"JFIF\0") + 5
    return data[:at] + b"\x02\x01" + data[at + 2 :]


def bytes_before_a_marker(data: bytes) -> bytes:
    at = data.index(b"\xff\xdb")
    return data[:at] + b"\0\0\0" + data[at:]


def bytes_before_the_end(data: bytes) -> bytes:
    return data[:-2] + b"\x11\x22\x33\x44" + data[-2:]


@pytest.mark.parametrize("change", [scan_parameters_of_0, jfif_2_01, bytes_before_a_marker, bytes_before_the_end])
@pytest.mark.parametrize("quick", [True, False], ids=["simplejpeg", "Pillow"])
def test_a_jpeg_with_a_flaw_that_most_programs_accept(
    tmp_path: Path, change: Callable[[bytes], bytes], quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quick:
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    path = tmp_path / "a.jpg"
    path.write_bytes(change(jpeg_bytes()))
    with Image.open(path) as picture:
        expected = np.array(picture.convert("RGB"))
    picture_of_ours = open_picture(str(path))
    for rows in (1, 100, 240):
        assert np.array_equal(picture_of_ours.top(rows)[:rows], expected[:rows])


def test_a_very_long_image_takes_little_memory_and_a_too_large_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    Image.new("L", (60_000, 1), 200).save(path)
    view = validation_view(open_picture(str(path)), 256, 224)
    assert view.shape == (224, 224, 3)
    assert view.unique().tolist() == [200]
    large = tmp_path / "large.png"
    Image.new("1", (20_000, 20_000)).save(large)
    with pytest.raises(DataError, match=rf"{large}: 20000 x 20000 pixels are more than 268,435,456"):
        open_picture(str(large))


def test_a_narrow_ratio_still_gives_a_crop_of_a_pixel() -> None:
    draws = [0.0] * 23
    for height, width in ((4, 400), (400, 4), (1, 9)):
        for ratio in ([0.01, 0.011], [90.0, 100.0]):
            top, left, h, w = random_crop(draws, height, width, [0.9, 1.0], ratio)
            assert h > 0
            assert w > 0
            assert top + h <= height
            assert left + w <= width


def test_what_is_read_and_what_is_reported(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    train = folder / "set/train"
    (train / "cat/more/deep").mkdir(parents=True)
    image = Image.new("RGB", (30, 30))
    for name in ("more/deep/x.gif", "more/y.jfif", "z.JPE", "._0.jpg", ".hidden/a.jpg"):
        (train / "cat" / name).parent.mkdir(exist_ok=True)
        image.save(train / "cat" / name, "GIF" if name.endswith("gif") else "JPEG")
    (train / "cat/notes.txt").write_text("")
    (train / "list.csv").write_text("")
    with caplog.at_level(logging.WARNING):
        source, _ = load(imagefolder(folder), seed=0, device=torch.device("cpu"))
    assert source.images == 16 + 3
    said = " ".join(record.getMessage() for record in caplog.records)
    assert f"{train}: 1 files beside the class folders are not read" in said
    assert f"{train / 'cat'}: 1 files are not read" in said


def test_one_class_is_refused(folder: Path) -> None:
    for part in ("train", "val"):
        for path in (folder / "set" / part / "dog").iterdir():
            path.unlink()
        (folder / "set" / part / "dog").rmdir()
    with pytest.raises(DataError, match=r"one class folder only \(cat\)"):
        load(imagefolder(folder), seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_validation_image_that_is_skipped_counts_in_nothing(folder: Path, ranks: int) -> None:
    from run_folders import call_on, records, summary

    truncate(folder / "set/val/cat/1.jpg")
    options = ["data.on_error=skip", "evaluation.images_per_batch=1"]
    outcomes = call_on(ranks, "train", folder / "config.yaml", "--run-dir", folder / "run", *options)
    assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes
    assert summary(folder / "run")["val_images"] == 3
    assert summary(folder / "run")["skipped_images"] == 1
    assert records(folder / "run")[-1]["val/skipped_images"] == 1
    assert "it is left out (data.on_error: skip)" in "".join(outcome.err for outcome in outcomes)


class Items:
    """A dataset that gives whatever it was made with."""

    classes = ("a", "b")

    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        if isinstance(self.item, Exception):
            raise self.item
        return self.item


IMAGE = torch.zeros(3, 20, 20, dtype=torch.uint8)


def make_items(kind: str) -> tuple[Any, Any]:
    items = {
        "dict": {"image": IMAGE, "label": 0},
        "text label": (IMAGE, "cat"),
        "no label": (IMAGE, None),
        "one-hot": (IMAGE, torch.tensor([0, 1])),
        "fraction": (IMAGE, 0.7),
        "float image": (IMAGE.float(), 0),
        "raises": RuntimeError("DataLoader worker is a word in this message"),
        "not implemented": NotImplementedError("no AVIF"),
        "numpy": (np.zeros((20, 20, 3), np.uint8), np.int64(1)),
        "tensor label": (IMAGE, torch.tensor([1])),
        "lambda": (IMAGE, 1),
    }
    dataset = Items(items[kind])
    if kind == "lambda":
        dataset.extra = lambda: None  # type: ignore[attr-defined]
    return dataset, dataset


def own(kind: str, processes: int) -> DataSettings:
    return DataSettings(
        name=f"{__name__}:make_items",
        arguments={"kind": kind},
        image_size=16,
        resize_size=16,
        loader_processes=processes,
    )


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("dict", r"image 1: the dataset gives a dict; it must give \(image, label\)"),
        ("text label", "image 1: label 'cat' is not an integer"),
        ("no label", "image 1: label None is not an integer"),
        ("one-hot", r"image 1: label torch.int64 \[2\] is not an integer"),
        ("fraction", "image 1: label 0.7 is not an integer"),
        ("float image", r"image 1: an image must be .* not torch.float32 \[3, 20, 20\]"),
        ("raises", "image 1: RuntimeError: 'DataLoader worker is a word|image 1: RuntimeError: DataLoader worker"),
        ("not implemented", "image 1: NotImplementedError: no AVIF"),
    ],
)
def test_an_own_dataset_that_gives_something_else_is_named(kind: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read(own(kind, 0), [1])


@pytest.mark.parametrize("kind", ["numpy", "tensor label"])
def test_an_own_dataset_may_give_numpy(kind: str) -> None:
    assert read(own(kind, 0), [0, 1])[1].tolist() == [1, 1]


def test_an_error_in_a_loader_process_is_the_datasets_own(folder: Path) -> None:
    with pytest.raises(DataError, match=r"RuntimeError.*DataLoader worker is a word"):
        read(own("raises", 1), [1])
    with pytest.raises(DataError, match=r"cannot be sent to a loader process.*set data.loader_processes=0"):
        read(own("lambda", 1), [1])
    assert read(own("lambda", 0), [1])[1].tolist() == [1]


def test_loaders_stay_from_one_evaluation_to_the_next_and_end_with_the_source(folder: Path) -> None:
    import multiprocessing

    settings = imagefolder(folder, processes=2)
    _, source = load(settings, seed=0, device=torch.device("cpu"))
    seen = set()
    for _ in range(3):
        batches = list(source.stream([Pass(0, np.array([i])) for i in range(4)], augment=False))
        assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 1, 1]
        seen.add(tuple(sorted(child.pid or 0 for child in multiprocessing.active_children())))
    assert len(seen) == 1
    assert len(seen.pop()) == 2
    del source
    assert not multiprocessing.active_children()


def test_without_descriptors_images_are_decoded_in_the_process(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (32, 32))
    monkeypatch.setattr(resource, "setrlimit", lambda *_: None)
    with caplog.at_level(logging.WARNING):
        images, _, _ = read(imagefolder(folder, processes=2), [0, 1])
    assert len(images) == 2
    assert "may open 32 files only (ulimit -n), so images are decoded in the training process" in caplog.text


def test_too_little_shared_memory_is_said_before_a_process_starts(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import shutil

    used = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: used._replace(free=1000))
    with pytest.raises(DataError, match=r"0 MiB free, and what loader processes keep ready .* --shm-size"):
        read(imagefolder(folder, processes=2), [0, 1])
    monkeypatch.undo()
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert len(read(imagefolder(folder, processes=2), [0, 1])[0]) == 2
