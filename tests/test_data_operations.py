"""Operations on single images against torchvision's own, under the same draws."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from largebatch.data.memory import MemorySource
from largebatch.data.operations import make_operations
from largebatch.data.settings import Augmentation
from largebatch.recipe.draws import fold

SEED, EPOCH = 5, 2
INDICES = np.array([40, 3, 1000, 7, 12, 8])
BILINEAR = {"interpolation": v2.InterpolationMode.BILINEAR}
CASES = {
    "randaugment": ({"auto_augment": "randaugment", "ra_num_ops": 3}, [v2.RandAugment(3, 9, **BILINEAR)]),
    "trivialaugment": ({"auto_augment": "trivialaugment"}, [v2.TrivialAugmentWide(**BILINEAR)]),
    "jitter": ({"color_jitter": [0.4, 0.3, 0.2, 0.1]}, [v2.ColorJitter(0.4, 0.3, 0.2, 0.1)]),
    "erasing": ({"random_erasing": 0.7}, []),
    "all": (
        {"auto_augment": "trivialaugment", "color_jitter": [0.4, 0.0, 0.0, 0.0], "random_erasing": 0.7},
        [v2.TrivialAugmentWide(**BILINEAR), v2.ColorJitter(0.4)],
    ),
}


def make_images(channels: int) -> Tensor:
    smooth = torch.rand(len(INDICES), channels, 5, 4, generator=torch.Generator().manual_seed(0))
    return (v2.functional.resize(smooth, [20, 16]) * 255).byte().permute(0, 2, 3, 1).contiguous()


def varied(images: Tensor, indices: np.ndarray, epoch: int = EPOCH, **how: Any) -> Tensor:
    images = images.clone()
    operations = make_operations(Augmentation(**how), mean=[0.4] * images.shape[3], seed=SEED)
    assert operations is not None
    operations(images, epoch, indices)
    return images


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_each_image_is_as_torchvision_makes_it_under_a_seed_of_its_own(case: str, channels: int) -> None:
    how, chain = CASES[case]
    images = make_images(channels)
    ours = varied(images, INDICES, **how)
    chain = [*chain, v2.PILToTensor(), v2.RandomErasing(how.get("random_erasing", 0.0), value=[102.0])]
    with torch.random.fork_rng(devices=[]):
        for image, expected, index in zip(images, ours, INDICES.tolist(), strict=True):
            torch.manual_seed(fold(SEED, EPOCH, index, 0x4F504552) >> 1)
            picture = Image.fromarray(image.squeeze(2).numpy())
            assert torch.equal(v2.Compose(chain)(picture).permute(1, 2, 0), expected)
    assert not torch.equal(ours, images)


@pytest.mark.parametrize("case", CASES)
def test_the_company_the_threads_and_the_generator_do_not_matter(case: str) -> None:
    how, _ = CASES[case]
    images = make_images(3)
    together, state, threads = varied(images, INDICES, **how), torch.get_rng_state(), torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        backwards = varied(images.flip(0), INDICES[::-1].copy(), **how).flip(0)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(together, backwards)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(together, varied(images, INDICES, EPOCH + 1, **how))


def test_nothing_is_made_where_nothing_is_asked_for() -> None:
    assert make_operations(Augmentation(mixup_alpha=1.0), mean=[0.5], seed=0) is None


def test_a_set_in_memory_is_varied_in_training_only() -> None:
    images, how = make_images(3).permute(0, 3, 1, 2), Augmentation(auto_augment="trivialaugment")
    operations = make_operations(how, mean=[0.5] * 3, seed=SEED)
    like = {"classes": 6, "mean": [0.5] * 3, "std": [0.5] * 3, "seed": SEED}
    source = MemorySource(images, torch.arange(6), **like, operations=operations)
    plain, _ = source.batch(0, np.arange(6), augment=False)
    first, again = (source.batch(0, np.arange(6))[0] for _ in range(2))
    assert torch.equal(first, again)
    expected = varied(images.permute(0, 2, 3, 1), np.arange(6), 0, auto_augment="trivialaugment")
    torch.testing.assert_close(first, (expected.permute(0, 3, 1, 2) / 255 - 0.5) / 0.5)
    torch.testing.assert_close(plain, (images / 255 - 0.5) / 0.5)


def test_copies_of_an_image_differ_and_the_first_is_as_without_repeats() -> None:
    images, like = make_images(3).permute(0, 3, 1, 2), {"classes": 6, "mean": [0.5] * 3, "std": [0.5] * 3, "padding": 4}
    once, thrice = (MemorySource(images, torch.arange(6), **like, repeats=r) for r in (1, 3))
    pixels, labels = thrice.batch(2, np.arange(18))
    assert labels.tolist() == [*range(6)] * 3
    assert torch.equal(pixels[:6], once.batch(2, np.arange(6))[0])
    assert not torch.equal(pixels[:6], pixels[6:12])
    assert not torch.equal(pixels[6:12], pixels[12:])
