"""Crops and decoding against Pillow and torchvision."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms
from torchvision.transforms import functional

from largebatch.data.jpeg import decode_box, find_frame, segments_of
from largebatch.data.pictures import (
    CROP_DRAWS,
    ArrayPicture,
    open_picture,
    random_crop,
    resize,
    training_view,
    validation_view,
)
from largebatch.data.pixels import image_draws
from largebatch.data.settings import Augmentation

SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def smooth_picture(width=500, height=375, seed=0):
    random = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, strength in ((4, 80), (20, 30), (70, 12)):
        field = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += (np.asarray(field.resize((width, height), Image.Resampling.BICUBIC)) / 127.5 - 1) * strength
    pixels += random.normal(128, 4, (height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def jpeg_bytes(picture, **options):
    out = io.BytesIO()
    picture.save(out, "JPEG", **{"quality": 92, **options})
    return out.getvalue()


@pytest.mark.parametrize(("width", "height"), [(500, 375), (300, 400), (900, 100)])
def test_crop_distribution_is_torchvisions(width, height):
    count = 4000
    torch.manual_seed(0)
    fake = torch.empty(3, height, width)
    theirs = np.array([transforms.RandomResizedCrop.get_params(fake, list(SCALE), list(RATIO)) for _ in range(count)])
    draws = image_draws(np.arange(count), CROP_DRAWS, seed=1, epoch=0).tolist()
    ours = np.array([random_crop(d, height, width, SCALE, RATIO) for d in draws])
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()

    def statistics(boxes):
        top, left, h, w = boxes.T
        return {
            "area": h * w / (height * width),
            "log ratio": np.log(w / h),
            "vertical place": top / np.maximum(height - h, 1),
            "horizontal place": left / np.maximum(width - w, 1),
        }

    mine, reference = statistics(ours), statistics(theirs)
    for name, values in mine.items():
        # Kolmogorov-Smirnov distance of two samples; 0.0436 would be exceeded once in 1000 comparisons.
        grid = np.sort(np.concatenate([values, reference[name]]))
        ranks = [np.searchsorted(np.sort(v), grid, side="right") / count for v in (values, reference[name])]
        assert np.abs(ranks[0] - ranks[1]).max() < 0.0436, name


@pytest.mark.parametrize(("width", "height"), [(1000, 100), (100, 1000), (120, 100), (7, 1)])
def test_fallback_is_torchvisions_centre_crop(width, height):
    impossible = (50.0, 60.0)
    theirs = transforms.RandomResizedCrop.get_params(torch.empty(3, height, width), list(impossible), list(RATIO))
    assert random_crop([0.5] * CROP_DRAWS, height, width, impossible, RATIO) == tuple(theirs)


@pytest.mark.parametrize("box", [(0, 0, 375, 500), (10, 20, 300, 350), (200, 300, 90, 101), (0, 5, 60, 70)])
def test_crop_of_a_jpeg_equals_the_reference_pipeline(tmp_path, box):
    path = tmp_path / "picture.jpg"
    path.write_bytes(jpeg_bytes(smooth_picture()))
    top, left, height, width = box
    picture = Image.open(path).convert("RGB")
    reference = functional.resized_crop(picture, top, left, height, width, [224, 224])
    ours = resize(open_picture(str(path)), box, (224, 224)).numpy()
    difference = np.abs(ours.astype(int) - np.asarray(reference))
    assert difference.mean() < 0.3
    assert difference.max() <= 2


def test_training_view_uses_its_draws():
    picture = ArrayPicture(np.array(smooth_picture(80, 60)))
    how = Augmentation()
    draws = [0.9, 0.5, *[0.0] * 18, 0.3, 0.6, 0.7]
    box = random_crop(draws, 60, 80, how.scale, how.ratio)
    plain = training_view(picture, draws, 32, how)
    assert torch.equal(plain, resize(picture, box, (32, 32)))
    mirrored = training_view(picture, [*draws[:-1], 0.2], 32, how)
    assert torch.equal(mirrored, plain.flip(1))
    assert torch.equal(training_view(picture, [*draws[:-1], 0.2], 32, Augmentation(flip=False)), plain)


@pytest.mark.parametrize(("width", "height"), [(500, 375), (333, 501), (40, 41)])
def test_validation_view_is_torchvisions(width, height):
    picture = smooth_picture(width, height)
    chain = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    difference = np.abs(
        validation_view(ArrayPicture(np.array(picture)), 256, 224).numpy().astype(int) - np.asarray(chain(picture))
    )
    assert difference.mean() < 0.3
    assert difference.max() <= 2


@pytest.mark.parametrize("size", [(203, 151), (320, 64), (41, 97)])
@pytest.mark.parametrize("subsampling", [0, 1, 2, None])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_rows": 2}, {"restart_marker_blocks": 1}]
)
def test_a_part_of_a_jpeg_is_bit_for_bit_that_of_the_whole(size, subsampling, options):
    """Of grey ones (None) too; a marker after each MCU makes the most segments that there can be."""
    pytest.importorskip("simplejpeg")
    width, height = size
    picture = smooth_picture(width, height)
    if subsampling is None:
        data = jpeg_bytes(picture.convert("L"), **options)
    else:
        data = jpeg_bytes(picture, subsampling=subsampling, **options)
    whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    frame = find_frame(data)
    assert (frame.height, frame.width) == (height, width)
    assert (frame.scan_at > 0) == ("progressive" not in options)
    assert (segments_of(frame) is not None) == any("restart" in name for name in options)
    random = np.random.default_rng(0)
    for _ in range(60):
        top, left = (int(random.integers(side)) for side in (height, width))
        box = (top, left, int(random.integers(height - top)) + 1, int(random.integers(width - left)) + 1)
        part = decode_box(data, frame, box)
        assert np.array_equal(part, whole[top : top + box[2], left : left + box[3]])


def test_grey_cmyk_and_other_formats_become_rgb(tmp_path):
    picture = smooth_picture(64, 48)
    expected = np.asarray(picture).astype(int)
    for name, mode, worst in (
        ("cmyk.jpg", "CMYK", 12),
        ("plain.png", "RGB", 0),
        ("plain.bmp", "RGB", 0),
        ("palette.png", "P", 60),
    ):
        path = tmp_path / name
        picture.convert(mode).save(path)
        opened = open_picture(str(path))
        pixels = opened.crop((0, 0, 48, 64))
        assert pixels.shape == (48, 64, 3)
        assert np.abs(pixels - expected).mean() <= worst, name
    picture.convert("L").save(tmp_path / "grey.jpg", quality=95)
    grey = open_picture(str(tmp_path / "grey.jpg")).crop((0, 0, 48, 64))
    assert np.array_equal(grey[..., 0], grey[..., 2])
    assert np.abs(grey[..., 0] - np.asarray(picture.convert("L")).astype(int)).mean() < 2
