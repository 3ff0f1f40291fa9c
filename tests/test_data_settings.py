"""The `data` section and what is known without the disk."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from largebatch.data.catalog import known_set
from largebatch.data.settings import Augmentation, DataSettings, Synthetic
from largebatch.errors import ConfigError


def test_facts_of_the_known_sets():
    imagenet = known_set(DataSettings(name="imagenet", image_size=160, resize_size=184))
    assert imagenet is not None
    assert (imagenet.train_images, imagenet.val_images, imagenet.classes) == (1_281_167, 50_000, 1000)
    assert imagenet.shape == (3, 160, 160)
    fashion = known_set(DataSettings())
    assert fashion is not None
    assert (fashion.train_images, fashion.val_images, fashion.shape) == (60_000, 10_000, (1, 28, 28))


def test_facts_honour_the_settings():
    settings = DataSettings(name="cifar10", train_images=100, val_images=99_999, mean=[0.1, 0.2, 0.3])
    known = known_set(settings)
    assert known is not None
    assert (known.train_images, known.val_images) == (100, 10_000)
    assert known.mean == (0.1, 0.2, 0.3)
    made = known_set(DataSettings(name="synthetic", synthetic=Synthetic(shape=[2, 5, 6], classes=3)))
    assert made is not None
    assert (made.classes, made.shape, len(made.std)) == (3, (2, 5, 6), 2)


def test_only_the_disk_knows():
    assert known_set(DataSettings(name="imagefolder")) is None
    assert known_set(DataSettings(name="package.module:function")) is None


def test_mean_that_does_not_fit_the_channels():
    with pytest.raises(ConfigError, match=r"data\.mean: 2 values .*3 channels"):
        known_set(DataSettings(name="cifar10", mean=[0.5, 0.5]))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "fashion_mnist"}, "did you mean 'fashion-mnist'"),
        ({"name": "mnist", "augmentation": Augmentation(kind="resized_crop")}, "image files"),
        ({"name": "imagenet", "augmentation": Augmentation(kind="crop")}, "sets in memory"),
        ({"resize_size": 200}, "less than image_size"),
        ({"std": [0.0]}, "above 0"),
        ({"loader_processes": -1}, "greater than or equal to 0"),
        ({"nonsense": 1}, "Extra inputs"),
    ],
)
def test_impossible_settings(wrong, message):
    with pytest.raises(ValidationError, match=message):
        DataSettings(**wrong)


@pytest.mark.parametrize("wrong", [{"scale": [0.5, 0.1]}, {"scale": [0.0, 1.0]}, {"ratio": [2.0, 1.0]}])
def test_impossible_augmentation(wrong):
    with pytest.raises(ValidationError, match="needs 0 <"):
        Augmentation(**wrong)


def test_settings_and_catalog_are_free_of_torch():
    code = "import sys, largebatch.data.settings, largebatch.data.catalog; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
