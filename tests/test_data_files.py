"""Folders of pictures and sets of your own: the stream, its processes, and what it says of bad input."""

import itertools
import multiprocessing
import os

import numpy as np
import pytest
import torch
from PIL import Image

from largebatch.data.load import load
from largebatch.data.settings import Augmentation, DataSettings
from largebatch.data.source import Pass
from largebatch.errors import ConfigError, DataError

CPU = torch.device("cpu")
CLASSES = ("cat", "dog", "emu")


def save_picture(path, seed):
    random = np.random.default_rng(seed)
    cells = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    cells.resize((60 + seed, 50), Image.Resampling.BICUBIC).save(path, quality=90)


@pytest.fixture
def folder(tmp_path):
    """train/ with 4 pictures and val/ with 2 in each of three classes."""
    seeds = itertools.count()
    for part, count in (("train", 4), ("val", 2)):
        for name in CLASSES:
            (tmp_path / part / name).mkdir(parents=True)
            for number in range(count):
                save_picture(tmp_path / part / name / f"{number}.JPEG", next(seeds))
    return tmp_path


def settings_for(folder, processes=0, **options):
    return DataSettings(
        name="imagefolder", root=str(folder), image_size=24, resize_size=32, loader_processes=processes, **options
    )


def read_all(source, passes, augment=True):
    return list(source.stream([Pass(epoch, np.array(indices)) for epoch, indices in passes], augment=augment))


def test_folder_is_numbered_in_sorted_order(folder):
    train, val = load(settings_for(folder), seed=0, device=CPU)
    assert (train.images, val.images, train.classes, train.shape) == (12, 6, 3, (3, 24, 24))
    [(images, labels)] = read_all(train, [(0, range(12))], augment=False)
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert images.dtype == torch.float32
    assert images.shape == (12, 3, 24, 24)
    # The second picture of dog, by hand.
    picture = Image.open(folder / "train" / "dog" / "1.JPEG").convert("RGB")
    width, height = picture.size
    small = picture.resize((int(32 * width / height), 32), Image.Resampling.BILINEAR)
    left, top = round((small.width - 24) / 2), 4
    expected = np.asarray(small.crop((left, top, left + 24, top + 24))) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.abs(images[5].permute(1, 2, 0).numpy() - expected).max() < 2 / 255 / 0.22


@pytest.mark.parametrize(
    "how",
    [
        Augmentation(),
        Augmentation(auto_augment="trivialaugment", color_jitter=[0.4, 0.4, 0.4, 0.1], random_erasing=0.5),
    ],
)
def test_pixels_do_not_depend_on_processes_or_passes(folder, how):
    alone, _ = load(settings_for(folder, processes=0, augmentation=how), seed=5, device=CPU)
    helped, _ = load(settings_for(folder, processes=2, prefetch=1, augmentation=how), seed=5, device=CPU)
    [(whole, _)] = read_all(alone, [(3, range(12))])
    chunks = [[11, 0], [5], [6, 7, 8, 1], [2, 3, 4, 9, 10]]
    for got, indices in zip(read_all(helped, [(3, c) for c in chunks]), chunks, strict=True):
        assert torch.equal(got[0], whole[indices])
    [(later, _), (other, _)] = read_all(alone, [(4, range(12)), (3, range(12))])
    assert not torch.equal(later, whole)
    assert torch.equal(other, whole)
    [(copies, labels)] = read_all(helped, [(3, [7, 7 + 12])])  # of image 7, as `EpochOrder` numbers them
    assert torch.equal(copies[0], whole[7])
    assert not torch.equal(copies[1], whole[7])
    assert labels.tolist() == [1, 1]


def test_the_epoch_decides_the_size_of_training_images_and_validation_has_its_own(folder):
    sizes = {"progressive_resizing": [[1, 12], [3, 32]], "val_image_size": 28, "processes": 1}
    train, val = load(settings_for(folder, **sizes), seed=5, device=CPU)
    assert (train.shape, val.shape) == ((3, 24, 24), (3, 28, 28))
    seen = read_all(train, [(epoch, [1, 2]) for epoch in range(5)])
    assert [images.shape[2:] for images, _ in seen] == [(size, size) for size in (24, 12, 12, 32, 32)]
    for size, epoch in ((12, 2), (32, 4)):
        alone, _ = load(settings_for(folder).model_copy(update={"image_size": size}), seed=5, device=CPU)
        assert torch.equal(read_all(alone, [(epoch, [1, 2])])[0][0], seen[epoch][0])
    _, wide = load(settings_for(folder).model_copy(update={"image_size": 28}), seed=5, device=CPU)
    assert torch.equal(*(read_all(source, [(0, [4])], augment=False)[0][0] for source in (val, wide)))


def test_augmentation_none_is_the_validation_view(folder):
    plain, _ = load(settings_for(folder, augmentation=Augmentation(kind="none")), seed=0, device=CPU)
    augmented = read_all(plain, [(1, [0, 7])])[0][0]
    assert torch.equal(augmented, read_all(plain, [(0, [0, 7])], augment=False)[0][0])


def test_endless_passes_and_closing_ends_the_processes(folder):
    train, _ = load(settings_for(folder, processes=2), seed=0, device=CPU)
    before = torch.get_rng_state()
    stream = train.stream((Pass(e, np.array([e % 12])) for e in itertools.count()), augment=True)
    for _ in range(5):
        next(stream)
    assert torch.equal(before, torch.get_rng_state())
    assert len(multiprocessing.active_children()) == 2
    stream.close()
    assert multiprocessing.active_children() == []


def test_fewer_images_are_spread_over_the_classes(folder):
    train, val = load(settings_for(folder, train_images=6, val_images=100), seed=0, device=CPU)
    assert (train.images, val.images) == (6, 6)
    assert read_all(train, [(0, range(6))])[0][1].tolist() == [0, 0, 1, 1, 2, 2]


def truncate(path):
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])


def scramble(path):
    data = bytearray(path.read_bytes())
    data[2:600] = bytes(598)
    path.write_bytes(data)


FAULTS = {
    "truncated": (truncate, "is damaged"),
    "scrambled": (scramble, "is damaged|is not an image"),
    "text": (lambda path: path.write_text("hello, this is not a picture"), "is not an image"),
    "empty": (lambda path: path.write_bytes(b""), "is not an image"),
    "vanished": (lambda path: path.unlink(), "cannot be read"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("processes", [0, 2])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_in_one_line(folder, fault, processes):
    train, _ = load(settings_for(folder, processes), seed=0, device=CPU)
    bad = folder / "train" / "dog" / "2.JPEG"
    damage, words = FAULTS[fault]
    damage(bad)
    with pytest.raises(DataError, match=rf"^{bad}: ({words}).*replace the file, or set data.on_error=skip$") as caught:
        read_all(train, [(0, [0, 1]), (0, [6, 7])])
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    assert multiprocessing.active_children() == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(folder):
    train, _ = load(settings_for(folder), seed=0, device=CPU)
    (folder / "train" / "cat" / "0.JPEG").chmod(0)
    with pytest.raises(DataError, match=r"0.JPEG: cannot be read .Permission denied"):
        read_all(train, [(0, [0])])


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "train" / "fox").mkdir(), "train/fox: this class folder is missing in .*val;"),
        (lambda root: (root / "val" / "fox").mkdir(), "val/fox: this class folder is missing in .*train;"),
        (lambda root: (root / "val").rename(root / "test"), "val: cannot be read .No such file"),
        (
            lambda root: [(root / part / "ant").mkdir() for part in ("train", "val")],
            "train/ant: no images in this class folder",
        ),
    ],
)
def test_a_wrong_layout_names_the_folder(folder, spoil, message):
    spoil(folder)
    with pytest.raises(DataError, match=message):
        load(settings_for(folder), seed=0, device=CPU)


def test_no_class_folders(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    with pytest.raises(DataError, match="train: no class folders in it"):
        load(settings_for(tmp_path), seed=0, device=CPU)


def test_imagenet_must_be_imagenet(folder):
    settings = settings_for(folder).model_copy(update={"name": "imagenet"})
    with pytest.raises(DataError, match="train: 12 files in 3 classes, but imagenet has 1281167 in 1000"):
        load(settings, seed=0, device=CPU)


# Sets of one's own, found by import path as a user's would be.


class Squares:
    """Map-style: PIL images and tensors by turns."""

    classes = ("a", "b", "c")

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        pixels = torch.full((3, 40, 30), 20 * index, dtype=torch.uint8)
        return (pixels if index % 2 else Image.fromarray(pixels.permute(1, 2, 0).numpy())), self.labels[index]


def make_datasets(labels):
    return Squares(labels), Squares([0, 1])


def make_tensors(labels, shape=(3, 5, 5)):
    images = torch.arange(len(labels)).view(-1, *[1] * len(shape)).expand(-1, *shape).to(torch.uint8)
    return (images, torch.tensor(labels)), (images[:2], torch.tensor(labels[:2]))


def nothing():
    return None


def own(function, **options):
    return DataSettings(name=f"{__name__}:{function}", image_size=24, resize_size=32, **options)


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))


@pytest.mark.parametrize("processes", [0, 1])
def test_own_dataset(processes):
    settings = own("make_datasets", arguments={"labels": [2, 0, 1]}, loader_processes=processes)
    train, val = load(settings, seed=0, device=CPU)
    assert (train.images, val.images, train.classes) == (3, 2, 3)
    [(images, labels)] = read_all(train, [(0, [2, 1])])
    assert labels.tolist() == [1, 0]
    torch.testing.assert_close(images[0], torch.full((3, 24, 24), (40 / 255 - 0.5) / 0.25))


def test_own_tensors():
    settings = own("make_tensors", arguments={"labels": [3, 0, 1]}, mean=[0.0] * 3, std=[1.0] * 3)
    train, val = load(settings, seed=0, device=CPU)
    assert (train.images, val.images, train.classes, train.shape) == (3, 2, 4, (3, 5, 5))
    [(images, labels)] = read_all(val, [(0, [1])], augment=False)
    torch.testing.assert_close(images, torch.full((1, 3, 5, 5), 1 / 255))
    assert labels.tolist() == [0]


@pytest.mark.parametrize("processes", [0, 1])
def test_own_label_outside_the_classes(processes):
    settings = own("make_datasets", arguments={"labels": [0, 3]}, loader_processes=processes)
    train, _ = load(settings, seed=0, device=CPU)
    with pytest.raises(DataError, match=r"training set, image 1: label 3 is outside 0\.\.2"):
        read_all(train, [(0, [0, 1])])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (own("make_tensors", arguments={"labels": [0, 7]}, classes=5), DataError, r"image 1: label 7 .* 0\.\.4"),
        (own("make_tensors", arguments={"labels": [-1, 1]}), DataError, "image 0: label -1 is outside"),
        (own("make_tensors", arguments={"labels": [0.5, 1.0]}), DataError, r"labels must be integers \[2\]"),
        (own("make_tensors", arguments={"labels": [1], "shape": [5, 5]}), DataError, "images must be uint8"),
        (own("make_datasets", arguments={"labels": [1]}, augmentation=Augmentation(kind="crop")), ConfigError, "crop"),
        (
            own(
                "make_tensors",
                arguments={"labels": [0, 1], "shape": [2, 5, 5]},
                mean=[0.5] * 2,
                std=[0.5] * 2,
                augmentation=Augmentation(auto_augment="randaugment"),
            ),
            ConfigError,
            "for images of 1 or 3 channels, and these have 2",
        ),
        (own("make_datasets", arguments={"labels": []}), DataError, "training set: the dataset has no images"),
        (own("nothing"), DataError, r"must return \(train, val\), not None"),
        (own("absent"), DataError, "cannot be imported .*absent"),
        (own("CLASSES"), DataError, "is a tuple, not a function"),
        (DataSettings(name="no_such_module:f"), DataError, "cannot be imported .No module named"),
    ],
)
def test_own_set_with_a_fault(settings, error, message):
    with pytest.raises(error, match=message):
        load(settings, seed=0, device=CPU)
