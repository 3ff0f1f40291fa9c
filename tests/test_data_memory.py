"""Sets in memory: contract 3 against a loop written here, the shipped digits, the generated set."""

import hashlib

import numpy as np
import pytest
import torch

from largebatch.data import known
from largebatch.data.load import load
from largebatch.data.memory import MemorySource
from largebatch.data.settings import Augmentation, DataSettings, Synthetic
from largebatch.data.source import Pass
from largebatch.errors import DataError

CPU = torch.device("cpu")
MASK = (1 << 64) - 1
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def some_images(count=23, channels=3, height=9, width=7):
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, channels, height, width), dtype=np.uint8)
    return torch.from_numpy(images), torch.from_numpy(random.integers(0, 5, count))


def make_source(images, labels, *, padding=2, flip=True, seed=3):
    channels = images.shape[1]
    return MemorySource(
        images,
        labels,
        classes=5,
        mean=MEAN[:channels],
        std=STD[:channels],
        padding=padding,
        flip=flip,
        seed=seed,
    )


def split_mix(value):
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def draw(seed, epoch, index, number):
    """The definition in whole numbers: one SplitMix64 chain over the keys, 64 draws reserved for an image."""
    key = 0
    for part in (seed, epoch, 0x4155474D):
        key = split_mix((key + 0x9E3779B97F4A7C15 + part) & MASK)
    position = index * 64 + number
    bits = split_mix(split_mix((position + 0x9E3779B97F4A7C15) & MASK) ^ key)
    return (bits >> 11) / 2**53


def reference_image(image, seed, epoch, index, padding, flip):
    channels, height, width = image.shape
    padded = np.zeros((channels, height + 2 * padding, width + 2 * padding), np.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image
    top = int(draw(seed, epoch, index, 0) * (2 * padding + 1))
    left = int(draw(seed, epoch, index, 1) * (2 * padding + 1))
    crop = padded[:, top : top + height, left : left + width]
    if flip and draw(seed, epoch, index, 2) < 0.5:
        crop = crop[:, :, ::-1]
    mean, std = (np.array(values[:channels]).reshape(-1, 1, 1) for values in (MEAN, STD))
    return (crop / 255 - mean) / std


@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_equals_a_plain_loop(channels):
    images, labels = some_images(channels=channels)
    source = make_source(images, labels)
    indices = np.array([22, 0, 7, 7, 13])
    for epoch in (0, 1, 5):
        got, got_labels = source.batch(epoch, indices)
        expected = np.stack([reference_image(images[i].numpy(), 3, epoch, i, 2, True) for i in indices.tolist()])
        assert got.dtype == torch.float32
        assert got_labels.dtype == torch.int64
        np.testing.assert_allclose(got.numpy(), expected, atol=2e-6)
        assert torch.equal(got_labels, labels[indices])


def test_an_image_is_the_same_to_the_bit_in_any_pass():
    images, labels = some_images(count=40)
    source = make_source(images, labels)
    whole, _ = source.batch(2, np.arange(40))
    other = make_source(images, labels)
    other.batch(9, np.arange(3))
    for indices in (np.array([39]), np.arange(40)[::-1], np.array([5, 4, 31]), np.arange(17)):
        again, _ = other.batch(2, indices.copy())
        assert torch.equal(again, whole[indices.copy()])


def test_draws_differ_with_epoch_and_seed_and_cover_all_places():
    images, labels = some_images(count=200)
    source = make_source(images, labels)
    first, _ = source.batch(0, np.arange(200))
    assert not torch.equal(first, source.batch(1, np.arange(200))[0])
    assert not torch.equal(first, make_source(images, labels, seed=4).batch(0, np.arange(200))[0])
    top, left, mirror = source._draws(0)
    places = {(int(t), int(le)) for t, le in zip(top, left, strict=True)}
    assert places == {(t, le) for t in range(5) for le in range(5)}
    assert 60 < int((mirror > 0).sum()) < 140


def test_without_augmentation_and_layout():
    images, labels = some_images()
    source = make_source(images, labels)
    got, _ = next(source.stream([Pass(0, np.arange(23))], augment=False))
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(got, (images / 255 - mean) / std)
    assert got.is_contiguous(memory_format=torch.channels_last)


def test_padding_zero_and_no_flip_change_nothing():
    images, labels = some_images()
    source = make_source(images, labels, padding=0, flip=False)
    assert torch.equal(source.batch(4, np.arange(23))[0], source.batch(4, np.arange(23), augment=False)[0])


def test_stream_is_lazy_and_in_order():
    images, labels = some_images()
    source = make_source(images, labels)

    def endless():
        epoch = 0
        while True:
            yield Pass(epoch, np.array([epoch % 23]))
            epoch += 1

    stream = source.stream(endless(), augment=True)
    for epoch in range(30):
        got, label = next(stream)
        assert torch.equal(got, source.batch(epoch, np.array([epoch % 23]))[0])
        assert label.item() == labels[epoch % 23]


def test_digits_are_shipped():
    settings = DataSettings(name="digits", augmentation=Augmentation(kind="none"))
    train, val = load(settings, seed=0, device=CPU)
    assert (train.images, val.images, train.classes, train.shape) == (1437, 360, 10, (1, 8, 8))
    pixels, labels = train.batch(0, np.arange(1437), augment=True)
    assert abs(pixels.mean().item()) < 1e-3
    assert abs(pixels.std().item() - 1) < 1e-3
    assert sorted(set(labels.tolist())) == list(range(10))
    few, _ = load(settings.model_copy(update={"train_images": 5}), seed=0, device=CPU)
    assert few.images == 5


def test_synthetic_is_deterministic_and_learnable():
    settings = DataSettings(
        name="synthetic",
        synthetic=Synthetic(shape=[3, 10, 6], classes=4, train_images=400, val_images=100),
        augmentation=Augmentation(kind="none"),
    )
    train, val = load(settings, seed=1, device=CPU)
    again, _ = load(settings, seed=1, device=CPU)
    other, _ = load(settings, seed=2, device=CPU)
    images, labels = train.batch(0, np.arange(400))
    assert images.shape == (400, 3, 10, 6)
    assert torch.equal(images, again.batch(0, np.arange(400))[0])
    assert not torch.equal(images, other.batch(0, np.arange(400))[0])
    # The nearest class mean of the training images recognises validation images.
    means = torch.stack([images[labels == c].mean(0).flatten() for c in range(4)])
    val_images, val_labels = val.batch(0, np.arange(100), augment=False)
    guesses = torch.cdist(val_images.flatten(1), means).argmin(1)
    assert (guesses == val_labels).float().mean() > 0.9


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.tobytes()


@pytest.fixture
def small_mnist(tmp_path, monkeypatch):
    """Four small IDX files and the checksums that make them `mnist`."""
    random = np.random.default_rng(0)
    arrays = [
        random.integers(0, 256, (6, 28, 28), dtype=np.uint8),
        np.arange(6, dtype=np.uint8),
        random.integers(0, 256, (3, 28, 28), dtype=np.uint8),
        np.arange(3, dtype=np.uint8),
    ]
    facts = {}
    for path, array in zip(known.FILES["mnist"], arrays, strict=True):
        data = idx(array)
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(data)
        facts[path] = known.FileFacts(len(data), "sha256", hashlib.sha256(data).hexdigest())
    monkeypatch.setitem(known.FILES, "mnist", facts)
    return tmp_path, arrays


def test_idx_files_are_read(small_mnist):
    root, arrays = small_mnist
    settings = DataSettings(name="mnist", root=str(root), mean=[0.0], std=[1 / 255])
    train, val = load(settings, seed=0, device=CPU)
    pixels, labels = train.batch(0, np.arange(6), augment=False)
    np.testing.assert_allclose(pixels[:, 0].numpy(), arrays[0], rtol=1e-6)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5]
    assert val.images == 3


def test_a_damaged_or_missing_file_is_named_with_the_remedy(small_mnist):
    root, _ = small_mnist
    damaged = root / list(known.FILES["mnist"])[2]
    data = bytearray(damaged.read_bytes())
    data[100] ^= 1
    damaged.write_bytes(data)
    settings = DataSettings(name="mnist", root=str(root))
    with pytest.raises(DataError, match=rf"{damaged}: damaged.*largebatch data fetch mnist --root {root}"):
        load(settings, seed=0, device=CPU)
    damaged.unlink()
    with pytest.raises(DataError, match=rf"{damaged}: cannot be read"):
        load(settings, seed=0, device=CPU)
