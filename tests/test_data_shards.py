"""Tar shards: what is packed, that training from it gives the folder's bits, and what is said of damage."""

from __future__ import annotations

import io
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks
from run_folders import Outcome, call, summary, tensor_hashes
from test_data_faults import truncate
from test_data_pictures import jpeg_bytes, smooth_picture

from largebatch.data import jpeg
from largebatch.data.catalog import IMAGENET_MEAN, IMAGENET_STD
from largebatch.data.jpegtran import with_restart_markers
from largebatch.data.load import load
from largebatch.data.pack import pack
from largebatch.data.pictures import open_picture, validation_view
from largebatch.data.pixels import Normalise
from largebatch.data.settings import DataSettings
from largebatch.data.source import Pass
from largebatch.distributed.environment import Launch

CONFIG = """
model: {name: resnet8}
data: {name: imagefolder, root: ROOT, image_size: 32, loader_processes: 0, on_error: skip}
batch: {virtual_workers: 3, images_per_worker: 2}
schedule: {epochs: 2, reference_batch: 6, warmup: {kind: none}, decay: {kind: none}}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`set`: JPEGs of every subsampling, one grey, one progressive, one PNG, one in a subfolder and a damaged one;
    `shards`: the same packed."""
    folder = tmp_path_factory.mktemp("shards")
    options = itertools.cycle([{"subsampling": 0}, {"subsampling": 1}, {"subsampling": 2}, {"progressive": True}])
    seeds = itertools.count()
    for part, name in itertools.product(("train", "val"), ("cat", "dog.s")):
        inner = folder / "set" / part / name / "inner"
        inner.mkdir(parents=True)
        for number in range(6):
            picture = smooth_picture(120 + 7 * number, 90, next(seeds))
            picture.save(inner.parent / f"{number}.a.JPEG", quality=90, **next(options))
        picture.convert("L").save(inner / "grey.jpg")
        picture.save(inner.parent / "0.a.png")
    truncate(folder / "set/train/dog.s/3.a.JPEG")
    (folder / "config.yaml").write_text(CONFIG.replace("ROOT", str(folder / "set")))
    done = call("data", "pack", folder / "set", folder / "shards", "--images-per-shard", 5, "--jobs", 3)
    assert done.status == 0, done.err
    return folder


def shards(root: Path, **options: object) -> DataSettings:
    return DataSettings(name="shards", root=str(root), image_size=32, loader_processes=0, **options)


def test_a_plain_tar_reader_finds_every_file_and_its_label(made: Path) -> None:
    """By names as WebDataset groups them: key, dot, kind."""
    for part in ("train", "val"):
        files = sorted(path for path in (made / "set" / part).rglob("*") if path.is_file())
        samples: dict[str, dict[str, bytes]] = {}
        for shard in sorted((made / "shards" / part).glob("*.tar")):
            with tarfile.open(shard) as archive:
                for member in archive:
                    key, kind = member.name.split(".")
                    samples.setdefault(key, {})[kind] = archive.extractfile(member).read()  # type: ignore[union-attr]
        assert [len(sample) for sample in samples.values()] == [2] * 16
        found = {(max(sample.values(), key=len), sample["cls"]) for sample in samples.values()}
        assert found == {(file.read_bytes(), b"1" if "dog.s" in str(file) else b"0") for file in files}


def _as_rank_with_loaders(_: Launch, command: list[str]) -> Outcome:
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # else no children
    return call(*command)


def test_training_gives_the_folders_bits(made: Path) -> None:
    """From the folder on one rank, shards (with restart markers too) on one and three; damaged files are skipped."""
    from_shards = ["data.name=shards", f"data.root={made / 'shards'}"]
    runs = {
        "folder": (1, []),
        "shards-1": (1, [*from_shards, "data.loader_processes=2"]),
        "shards-3": (3, [*from_shards, "data.loader_processes=1"]),
    }
    if shutil.which("jpegtran"):
        pack(made / "set", made / "marked", jobs=2, images_per_shard=9, restart_markers=True, report=print)
        marked = ["data.name=shards", f"data.root={made / 'marked'}"]
        runs |= {"marked-1": (1, marked), "marked-3": (3, [*marked, "data.loader_processes=1"])}
    for name, (ranks, overrides) in runs.items():
        command = ["train", str(made / "config.yaml"), "--run-dir", str(made / name), *overrides]
        for done in [call(*command)] if ranks == 1 else run_ranks(_as_rank_with_loaders, ranks, command):
            assert done.status == 0, done.err
    hashes = [tensor_hashes(made / name) for name in runs]
    assert hashes.count(hashes[0]) == len(hashes)
    for key in ("val_images", "skipped_train_images", "top1_error"):
        assert len({summary(made / name)[key] for name in runs}) == 1
    assert summary(made / "folder")["skipped_train_images"] > 0
    # The fingerprint is the same too, so a run on the folder is evaluated on the shards without further words.
    done = call("evaluate", made / "folder", *from_shards)
    assert done.status == 0, done.err


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran (libjpeg-turbo-progs) is not on this machine")
@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("width", [184, 192, 500])  # 184 pixels are 23 MCUs, a prime, or 12
def test_restart_markers_let_a_box_be_decoded_alone_to_the_same_pixels(subsampling: int, width: int) -> None:
    data = jpeg_bytes(smooth_picture(width, 100), subsampling=subsampling)
    whole, marked = jpeg.simplejpeg.decode_jpeg(data), with_restart_markers(data)
    frame = jpeg.find_frame(marked)
    assert frame is not None
    assert jpeg.segments_of(frame) is not None
    assert np.array_equal(jpeg.simplejpeg.decode_jpeg(marked), whole)
    draw = np.random.default_rng(0)
    for _ in range(40):
        height, across = draw.integers(1, 101), draw.integers(1, width + 1)
        top, left = draw.integers(0, 101 - height), draw.integers(0, width + 1 - across)
        part = jpeg.decode_box(marked, frame, (int(top), int(left), int(height), int(across)))
        assert np.array_equal(part, whole[top : top + height, left : left + across])


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran (libjpeg-turbo-progs) is not on this machine")
def test_what_cannot_get_restart_markers_stays_as_it_is() -> None:
    data = jpeg_bytes(smooth_picture(192, 100))
    for odd in (b"", data[:-100], b"text", data[:300]):
        assert with_restart_markers(odd) == odd


def test_restart_markers_need_jpegtran(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    done = call("data", "pack", made / "set", tmp_path / "p", "--restart-markers")
    assert done.status == 2
    assert "--restart-markers: jpegtran is not on this machine; install" in done.err
    assert not (tmp_path / "p").exists()


def test_a_limit_takes_the_images_that_it_takes_of_the_folder(made: Path) -> None:
    def read(settings: DataSettings) -> tuple[str, torch.Tensor]:
        source, _ = load(settings, seed=3, device=torch.device("cpu"))
        [(images, _)] = source.stream([Pass(1, np.arange(7))], augment=True)
        return source.fingerprint(), images

    ours = shards(made / "shards", train_images=7)
    theirs = ours.model_copy(update={"name": "imagefolder", "root": str(made / "set")})
    assert read(ours)[0] == read(theirs)[0]
    assert torch.equal(read(ours)[1], read(theirs)[1])


def flip_a_bit(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda part: flip_a_bit(part / "index.json", 200), "index.json: is damaged"),
        (lambda part: (part / "index.json").write_text("[]"), "index.json: is damaged"),
        (lambda part: (part / "index.json").unlink(), "index.json: cannot be read"),
        (lambda part: flip_a_bit(part / "entries.npy", 300), "entries.npy: is damaged"),
        (lambda part: (part / "names.npy").unlink(), "names.npy: cannot be read"),
        (lambda part: (part / "shard-000001.tar").unlink(), "shard-000001.tar: cannot be read .No such file"),
        (lambda part: os.truncate(part / "shard-000003.tar", 700), "shard-000003.tar: has 700 bytes"),
        (
            lambda part: flip_a_bit(part / "shard-000000.tar", 1500),
            r"shard-000000.tar: cat/0.a.JPEG: is damaged .its che",
        ),
    ],
)
def test_damage_is_named(made: Path, tmp_path: Path, spoil: Callable[[Path], None], message: str) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    spoil(tmp_path / "shards/train")
    done = call(
        *("train", made / "config.yaml", "--run-dir", tmp_path / "run"),
        *("data.name=shards", f"data.root={tmp_path / 'shards'}", "data.on_error=stop", "data.train_images=12"),
    )
    assert done.status == 2
    assert re.search(message, done.err), done.err
    assert done.err.count("\n") == 1


def test_a_damaged_image_is_skipped_as_in_a_folder(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "shards", tmp_path / "shards")
    flip_a_bit(tmp_path / "shards/train/shard-000000.tar", 1500)
    source, _ = load(shards(tmp_path / "shards", on_error="skip"), seed=3, device=torch.device("cpu"))
    [(images, _)] = source.stream([Pass(1, np.arange(2))], augment=False)
    assert torch.equal(images[0], images[1])
    assert source.skipped == 1


@pytest.mark.parametrize(
    ("source", "dest", "more", "message"),
    [
        ("none", "new", (), "none/train: cannot be read"),
        ("set", "set", (), "set/train: holds something other than a pack of this source"),
        ("set", "shards", ("--images-per-shard", 6), "shards/train: holds something other"),
        ("set", "config.yaml", (), "cannot be written .Not a directory"),
    ],
)
def test_what_cannot_be_packed(made: Path, source: str, dest: str, more: tuple[object, ...], message: str) -> None:
    done = call("data", "pack", made / source, made / dest, *map(str, more))
    assert done.status == 2
    assert re.search(message, done.err), done.err
    assert done.err.count("\n") == 1


def _pack_and_die(source: Path, dest: Path, moment: int) -> None:
    """Pack; at the `moment`-th call of any function, in any thread, die."""
    left = itertools.count(moment, -1)

    def count_down(*_: object) -> None:
        if next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count_down)
    sys.setprofile(count_down)
    pack(source, dest, jobs=2, images_per_shard=5, report=list[str]().append)


def _pack_until_killed(_: Launch, source: Path, dest: Path, kills: int, latest: int) -> None:
    """Kill a pack `kills` times and resume it; when it comes to its end, compare and begin anew."""
    random, whole = np.random.default_rng(0), contents(source.parent / "shards")
    while kills:
        if (child := os.fork()) == 0:
            _pack_and_die(source, dest, int(random.integers(latest)))
            os._exit(0)
        random.integers(latest)
        if os.waitpid(child, 0)[1]:
            kills -= 1
        else:
            assert contents(dest) == whole
            shutil.rmtree(dest)
    pack(source, dest, jobs=2, images_per_shard=5, report=list[str]().append)
    assert contents(dest) == whole


def contents(root: Path) -> dict[Path, bytes]:
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_fifty_kills_leave_what_no_kill_leaves(made: Path, tmp_path: Path) -> None:
    run_ranks(_pack_until_killed, 1, made / "set", tmp_path / "p", 50, 10_000)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def test_webdataset_shards_get_an_index(made: Path, tmp_path: Path) -> None:
    """Labels as text and as JSON, folders and dots in names, other members; read as the images by themselves."""
    files = sorted((made / "set/train").glob("*/[012].*"))
    long = "n/" + 60 * "long" + "/7"  # of more than the 100 bytes of a plain header
    samples = [
        {"a/0.jpg": 0, "a/0.cls": b"1\n"},
        {"a/1.JPEG": 1, "a/1.seg.png": b"no image of its own", "a/1.json": b'{"label": 0, "x": 2}'},
        {"just.txt": b"text"},
        {f"{long}.png": 2, f"{long}.cls": b"2"},
    ]
    contents = [{k: files[v].read_bytes() if isinstance(v, int) else v for k, v in s.items()} for s in samples]
    write_tar(tmp_path / "train/0.tar", contents[0] | contents[1])
    write_tar(tmp_path / "train/1.tar", contents[2] | contents[3])
    write_tar(tmp_path / "val/0.tar", contents[0])
    (tmp_path / "names").write_text("ant\nbee\ncow\n")
    for _ in range(2):  # the second time anew
        done = call("data", "index", tmp_path, "--class-names", tmp_path / "names")
        assert done.status == 0, done.err
    assert "train: 3 images in 2 shards; skipped samples without an image: 1" in done.out
    assert "warning: " in done.out
    assert "val: no image of class ant, cow" in done.out
    source, _ = load(shards(tmp_path), seed=3, device=torch.device("cpu"))
    assert source.class_names == ("ant", "bee", "cow")
    [(images, labels)] = source.stream([Pass(1, np.arange(3))], augment=False)
    assert labels.tolist() == [1, 0, 2]
    normalise = Normalise(IMAGENET_MEAN, IMAGENET_STD, (3, 32, 32), torch.device("cpu"))
    for image, file in zip(images, files, strict=False):
        view = validation_view(open_picture(str(file)), 37, 32)
        assert torch.equal(image, normalise(view[None])[0])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (None, "train: no .*tar in it; put the shards"),
        ({"0.jpg": b"x"}, "0.tar: 0: no label; it needs 0.cls"),
        ({"0.jpg": b"x", "0.cls": b"cat"}, "0.tar: 0: no label"),
        ({"0.jpg": b"x", "0.json": b'{"label": "cat"}'}, "0.tar: 0: no label"),
        ({"0.jpg": b"x", "0.png": b"x", "0.cls": b"1"}, "0.tar: 0: has 2 images"),
        ({"0.txt": b"x"}, "0.tar: no images in it"),
        ({"0.jpg": 20_000 * b"x", "0.cls": b"1"}, "0.tar: cannot be read to its end .*unexpected end of data"),
    ],
)
def test_shards_that_cannot_be_indexed(tmp_path: Path, members: dict[str, bytes] | None, message: str) -> None:
    if members:
        write_tar(tmp_path / "train/0.tar", members)
        if "end" in message:
            os.truncate(tmp_path / "train/0.tar", 10_000)
        write_tar(tmp_path / "val/0.tar", {"0.jpg": b"", "0.cls": b"0"})
    done = call("data", "index", tmp_path)
    assert done.status == 2
    assert re.search(message, done.err), done.err
    assert done.err.count("\n") == 1
    assert not list(tmp_path.rglob("*.json"))
