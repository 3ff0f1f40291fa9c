"""Image files as people have them: read as Pillow reads them, or refused by their name."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from run_folders import call, call_on, records, saved_steps, summary, tensor_hashes
from test_data_faults import imagefolder, read, truncate
from torchvision import transforms

from largebatch.data import jpeg, pictures
from largebatch.data.load import load
from largebatch.data.pictures import ArrayPicture, open_picture, random_crop, to_rgb, validation_view
from largebatch.data.settings import DataSettings
from largebatch.data.source import Pass
from largebatch.errors import DataError
from largebatch.recipe.order import EpochOrder


def pixels_of(path: Path) -> np.ndarray:
    picture = open_picture(str(path))
    return picture.crop((0, 0, picture.height, picture.width))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


NOISE = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
RAMP = np.linspace(0, 65535, 12 * 10).reshape(10, 12).astype(np.uint16)


def tiff(pixels: np.ndarray, bits: int, data: bytes, *, white: int = 1, numbers: int = 1) -> bytes:
    """An uncompressed grey TIFF; `white` and `numbers` as its tags 262 and 339 have them."""
    height, width = pixels.shape
    values = {256: width, 257: height, 258: bits, 259: 1, 262: white, 273: 8, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in {**values, 339: numbers}.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + struct.pack("<H", 10) + entries + bytes(4)


def twelve_bits(values: np.ndarray) -> bytes:
    first, second = values[:, ::2] >> 4, values[:, 1::2] >> 4
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2)
    return packed.astype(np.uint8).tobytes()


SIXTEEN_BITS = {
    "pgm": b"P5 12 10 65535\n" + RAMP.astype(">u2").tobytes(),
    "12 of 16 bits, pgm": b"P5 12 10 4095\n" + (RAMP >> 4).astype(">u2").tobytes(),
    "tiff": tiff(RAMP, 16, RAMP.tobytes()),
    "white is 0, tiff": tiff(RAMP, 16, (65535 - RAMP).tobytes(), white=0),
    "12 bits, tiff": tiff(RAMP, 12, twelve_bits(RAMP)),
    "png": saved(Image.fromarray(RAMP), "PNG"),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_sixteen_bits_are_scaled_to_eight(tmp_path: Path, kind: str) -> None:
    (tmp_path / "a.tif").write_bytes(SIXTEEN_BITS[kind])
    expected = np.rint((RAMP >> 4) / (4095 / 255) if "12" in kind else RAMP / 257).astype(np.uint8)
    assert np.array_equal(pixels_of(tmp_path / "a.tif"), np.stack([expected] * 3, axis=2))


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF"), "signed numbers"),
        (saved(Image.fromarray(RAMP.astype(np.float32)), "TIFF"), "floats"),
        (tiff(RAMP, 32, RAMP.astype(np.uint32).tobytes()), "32-bit integers"),
        (tiff(RAMP, 16, RAMP.tobytes(), numbers=2), "signed numbers"),
        (b"Pf\n1 1\n-1.0\n" + bytes(4), "floats"),
    ],
)
def test_numbers_without_a_range_are_refused_by_name(tmp_path: Path, data: bytes, kind: str) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{path}: its pixels are {kind}, which have no defined black"):
        open_picture(str(path))


def png_with_a_long_text() -> bytes:
    comments = PngInfo()
    comments.add_text("comment", "a" * 3_000_000, zip=True)
    return saved(NOISE, "PNG", pnginfo=comments)


def odd_exif() -> bytes:
    return saved(NOISE, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")


def palette_with_transparency() -> bytes:
    return saved(NOISE.convert("P"), "PNG", transparency=bytes(range(256)))


def animated() -> bytes:
    return saved(NOISE, "WEBP", lossless=True, save_all=True, append_images=[NOISE.rotate(180)])


@pytest.mark.parametrize("make", [png_with_a_long_text, odd_exif, palette_with_transparency, animated])
def test_what_pillow_warns_of_or_limits_is_read_in_silence(
    tmp_path: Path, make: Callable[[], bytes], recwarn: pytest.WarningsRecorder
) -> None:
    (tmp_path / "a.jpg").write_bytes(make())
    limits = Image.MAX_IMAGE_PIXELS
    difference = pixels_of(tmp_path / "a.jpg").astype(int) - np.asarray(NOISE)
    assert np.abs(difference).mean() < 60  # 110 to another frame
    assert not recwarn.list
    assert limits == Image.MAX_IMAGE_PIXELS is not None


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "a.jpg"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(DataError, match=rf"{path}: is not an image of a known format"):
        open_picture(str(path))


def jpeg_bytes() -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    return saved(Image.fromarray(noise).resize((320, 240)), "JPEG", quality=90)


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
        assert np.array_equal(picture_of_ours.crop((0, 0, rows, picture_of_ours.width)), expected[:rows])


def test_a_very_long_image_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    for shape in ((60_000, 1), (1, 60_001)):
        Image.new("L", shape, 200).save(path)
        view = validation_view(open_picture(str(path)), 256, 224)
        assert view.shape == (224, 224, 3)
        assert view.unique().tolist() == [200]


def test_the_limit_on_the_size_is_ours_for_every_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    for name, data in (("a.png", saved(NOISE, "PNG")), ("a.jpg", saved(NOISE, "JPEG"))):
        (tmp_path / name).write_bytes(data)
        assert open_picture(str(tmp_path / name)).width == 30
    monkeypatch.setattr(pictures, "_MOST_PIXELS", 500)
    for name in ("a.png", "a.jpg"):
        with pytest.raises(DataError, match=rf"{tmp_path / name}: 30 x 20 pixels are more than 500, too many"):
            open_picture(str(tmp_path / name))


@pytest.mark.parametrize("length", [330, 331, 1000, 1001])
def test_the_middle_of_a_long_image_is_that_of_the_whole(length: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, length, 3), dtype=np.uint8)
    chain = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(14)])
    expected = np.asarray(chain(Image.fromarray(pixels))).astype(int)
    assert np.abs(validation_view(ArrayPicture(pixels), 16, 14).numpy() - expected).max() <= 2


def test_a_large_image_becomes_ours_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "_BAND_PIXELS", 100)
    for mode in ("RGB", "CMYK", "LA"):
        converted = NOISE.convert(mode)
        assert np.array_equal(to_rgb(converted), np.asarray(converted.convert("RGB")))


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
    (train / "cat/up").symlink_to("..")
    (train / "cat/more/again").symlink_to("../../cat")
    with caplog.at_level(logging.WARNING):
        source, _ = load(imagefolder(folder), seed=0, device=torch.device("cpu"))
    assert source.images == 16 + 3
    said = " ".join(record.getMessage() for record in caplog.records)
    assert f"{train}: 1 files next to the class folders are not read" in said
    assert f"{train / 'cat'}: 1 files are not read" in said
    assert f"{train / 'cat'}: 2 links to a parent folder, or to one already read, are not followed" in said


def test_one_class_is_refused(folder: Path) -> None:
    for part in ("train", "val"):
        for path in (folder / "set" / part / "dog").iterdir():
            path.unlink()
        (folder / "set" / part / "dog").rmdir()
    with pytest.raises(DataError, match=r"only one class folder \(cat\)"):
        load(imagefolder(folder), seed=0, device=torch.device("cpu"))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_validation_image_that_is_skipped_counts_in_nothing(folder: Path, ranks: int) -> None:
    truncate(folder / "set/val/cat/1.jpg")
    options = ["data.on_error=skip", "evaluation.images_per_batch=1"]
    outcomes = call_on(ranks, "train", folder / "config.yaml", "--run-dir", folder / "run", *options)
    assert [outcome.status for outcome in outcomes] == [0] * ranks, outcomes
    assert summary(folder / "run")["val_images"] == 3
    assert summary(folder / "run")["skipped_images"] == 1
    assert records(folder / "run")[-1]["val/skipped_images"] == 1
    assert "it is left out (data.on_error: skip)" in "".join(outcome.err for outcome in outcomes)


def test_a_run_that_a_damaged_file_stopped_resumes_with_skip_and_counts_on(folder: Path) -> None:
    """The file is in the second of the two steps of each epoch."""
    first_of_step_1 = EpochOrder(16, virtual_workers=2, images_per_worker=4, seed=0).indices(1, range(2))[0]
    bad = sorted((folder / "set/train").glob("*/*"))[first_of_step_1]
    truncate(bad)
    run = folder / "run"
    options = ["schedule.epochs=2", "checkpoint={every_steps: 1, keep: 9}", "logging.every_steps=1"]
    command = ["train", folder / "config.yaml", "--run-dir", run, *options]
    assert call(*command).status == 2
    assert saved_steps(run) == [1]
    bad.rename(bad.with_suffix(".gone"))
    removed = call(*command, "data.on_error=skip")
    assert removed.status == 2
    assert "keep it and set data.on_error=skip" in removed.err
    bad.with_suffix(".gone").rename(bad)
    skip = [*command, "data.on_error=skip", "data.prefetch=2"]
    assert call(*skip).status == 0
    assert [record.get("skipped_images") for record in records(run)] == [None, 1, 1, 2]
    weights = tensor_hashes(run)
    for path in (run / "summary.json", run / "model.pt", *(run / "checkpoints").glob("step_*[34].*")):
        path.unlink()
    assert call(*skip).status == 0
    assert [record.get("skipped_images") for record in records(run)] == [None, 1, 1, 2]
    assert summary(run)["skipped_train_images"] == 2
    assert "skipped_images" not in summary(run), "that is validation's"
    assert tensor_hashes(run) == weights


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


ARRAYS = np.zeros((8, 3, 9, 9), np.uint8), np.arange(8) % 2


class NoLength(Items):
    def __len__(self) -> int:
        raise RuntimeError("no length")


def make_split(kind: str) -> Any:
    images, labels = ARRAYS
    splits: dict[str, Any] = {
        "numpy": ARRAYS,
        "backwards": (images[:, :, ::-1], labels),
        "big-endian": (images, labels.astype(">i8")),
        "list of labels": (images, labels.tolist()),
        "text": (images, np.array(["a", "b"] * 4)),
        "objects": (images, np.array([None] * 8)),
        "fractions": (images, labels + 0.7),
        "complex": (images, labels + 0j),
        "one-hot": (images, np.eye(2, dtype=np.int64)[labels]),
        "negative": (images, labels - 1),
        "channels last": (images.transpose(0, 2, 3, 1), labels),
        "16 bits": (images.astype(np.uint16), labels),
        "one class": (images, 0 * labels),
        "one class of a dataset": Items(1),
        "no length": NoLength(1),
        "iterable": iter([ARRAYS]),
        "dict": {"image": images, "label": labels},
    }
    splits["one class of a dataset"].classes = ("a",)
    return splits[kind], splits[kind]


def own_split(kind: str) -> DataSettings:
    return DataSettings(name=f"{__name__}:make_split", arguments={"kind": kind}, image_size=16)


@pytest.mark.parametrize("kind", ["numpy", "backwards", "big-endian", "list of labels"])
def test_own_arrays_are_taken(kind: str) -> None:
    assert read(own_split(kind), [0, 1, 2])[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("text", r"training set: labels must be numbers .* not <U1 \[8\]"),
        ("objects", r"training set: labels must be numbers .* not object \[8\]"),
        ("fractions", r"labels must be integers \[8\], not torch.float64"),
        ("complex", r"labels must be integers \[8\], not torch.complex128"),
        ("one-hot", r"labels must be integers \[8\], not torch.int64 \[8, 2\]"),
        ("negative", "image 0: label -1 is outside"),
        ("channels last", r"looks like \[M, H, W, C\]"),
        ("16 bits", "images must be uint8"),
        ("one class", "1 class only; a classifier needs at least two"),
        ("one class of a dataset", "1 class only; a classifier needs at least two"),
        ("no length", "training set: RuntimeError: no length"),
        ("iterable", "both a dataset with __len__ and __getitem__"),
        ("dict", "set data.classes"),
    ],
)
def test_own_sets_of_another_form_are_refused_by_what_they_are(kind: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"data.name {__name__}:make_split.*{said}"):
        load(own_split(kind), seed=0, device=torch.device("cpu"))


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
    assert "may open 32 files at most (ulimit -n), so images are decoded in the training process" in caplog.text


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


def test_validation_keeps_less_ready_where_shared_memory_is_short(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import multiprocessing
    import shutil

    used = shutil.disk_usage("/")
    for free, processes in ((2 * 3 * 768, 1), (10, 0)):  # three results of one image of 16 x 16, or none
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: used._replace(free=free))
        _, source = load(imagefolder(folder, processes=2, prefetch=1), seed=0, device=torch.device("cpu"))
        batches = source.stream([Pass(0, np.array([0, 2]))] * 2, augment=False)
        assert next(batches)[1].tolist() == [0, 1]
        assert len(multiprocessing.active_children()) == processes
        batches.close()
        del source


def test_shared_memory_that_runs_out_is_an_error_and_no_lost_batch(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr("largebatch.data.files.get_worker_info", object)
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(DataError, match=r"no shared memory left .*No space left.* --shm-size"):
        read(imagefolder(folder, processes=0), [0, 1])


def test_many_evaluations_with_loader_processes_on_two_ranks(folder: Path) -> None:
    """The short form of three times a thousand: no stop by itself, and one rank's weights."""
    from run_folders import records, tensor_hashes
    from survive import Fleet

    options = ["schedule={epochs: 20, reference_lr: 0.001}", "data.loader_processes=2", "model.name=mlp"]
    for ranks in (1, 2):
        run = folder / str(ranks)
        with Fleet(ranks, "train", folder / "config.yaml", "--run-dir", run, *options) as fleet:
            assert [outcome.status for outcome in fleet.outcomes()] == [0] * ranks, fleet.story()
        assert sum("val/loss" in record for record in records(run)) == 20
    assert tensor_hashes(folder / "1") == tensor_hashes(folder / "2")


@contextlib.contextmanager
def training_with_loaders(folder: Path) -> Iterator[subprocess.Popen]:
    """A run in a process group of its own, which has evaluated once; at the end the group is killed."""
    run = folder / "run"
    command = [sys.executable, "-m", "largebatch", "train", folder / "config.yaml", "--run-dir", run]
    options = ["schedule={epochs: 100000, reference_lr: 0.001}", "data.loader_processes=2", "model.name=mlp"]
    with (folder / "err").open("w") as err, (folder / "out").open("w") as out:
        process = subprocess.Popen([*command, *options], start_new_session=True, stdout=out, stderr=err)
        try:
            while not (run / "metrics.jsonl").exists() or "val/" not in (run / "metrics.jsonl").read_text():
                assert process.poll() is None, (folder / "err").read_text()
                time.sleep(0.05)
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def alive_in_group(group: int) -> list[str]:
    """The processes of a group that have not ended, as their lines of /proc/*/stat."""
    stats = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            stats.append(path.read_text())
    # After the name in parentheses: state, parent, process group.
    fields = [(stat, *stat.rpartition(")")[2].split()[:3]) for stat in stats]
    return [stat for stat, state, _, process_group in fields if int(process_group) == group and state != "Z"]


def test_a_signal_to_the_whole_process_group_ends_with_a_checkpoint(folder: Path) -> None:
    """As torchrun sends it: the loaders must outlive it until their rank has written."""
    with training_with_loaders(folder) as process:
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(100) == 75, (folder / "err").read_text()
    said = (folder / "err").read_text()
    assert "stopped by a signal after step" in said
    assert "Traceback" not in said
    assert list((folder / "run/checkpoints").glob("step_*.pt"))


def test_loaders_end_with_a_rank_that_is_killed(folder: Path) -> None:
    with training_with_loaders(folder) as process:
        assert len(alive_in_group(process.pid)) > 2, "the rank and its loaders"
        process.kill()
        while alive := alive_in_group(process.pid):
            time.sleep(0.05)
    assert not alive
