"""Images a second of one core: this package's JPEG path against torchvision's reference transform.

    python benchmarks/jpeg_throughput.py --json results/jpeg_throughput.json

The reference is what torchvision's training script does for each image: open with Pillow, RandomResizedCrop(224),
flip, to float, normalise; then the images of a batch are stacked. Two things are measured of this package:
`loader`, what a loader process does (the normalisation is the device's), and `whole`, with the normalisation on
the same core. All three run in one process with one thread, by turns, on the same 500 x 375 JPEGs of quality 92,
which the script makes itself: smooth random fields, edges and noise. Time is the process's CPU time, so that other
programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from largebatch.data.catalog import IMAGENET_MEAN, IMAGENET_STD
from largebatch.data.files import Decoder, FolderPictures, PictureSource, class_names
from largebatch.data.settings import DataSettings
from largebatch.data.source import Pass

WIDTH, HEIGHT, QUALITY, BATCH = 500, 375, 92, 32


def make_picture(random: np.random.Generator) -> Image.Image:
    """Smooth fields of several scales, a few flat shapes with edges, and a little sensor noise."""
    pixels = np.zeros((HEIGHT, WIDTH, 3))
    for cells, strength in ((3, 70), (8, 45), (25, 25), (80, 14)):
        field = random.integers(0, 256, (cells, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(field).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        pixels += (np.asarray(smooth) / 127.5 - 1) * strength
    for _ in range(6):
        top, left = random.integers(0, HEIGHT - 40), random.integers(0, WIDTH - 40)
        height, width = random.integers(20, 150, 2)
        pixels[top : top + height, left : left + width] += random.normal(0, 40, 3)
    pixels += random.normal(128, 6, (HEIGHT, WIDTH, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_folder(root: Path, images: int) -> float:
    """The ImageNet layout with one class; returns the files' mean size in kilobytes."""
    random = np.random.default_rng(0)
    for part, count in (("train", images), ("val", 1)):
        folder = root / part / "class"
        folder.mkdir(parents=True)
        for index in range(count):
            make_picture(random).save(folder / f"{index:04d}.JPEG", quality=QUALITY)
    sizes = [file.stat().st_size for file in (root / "train" / "class").iterdir()]
    return statistics.mean(sizes) / 1000


def reference(files: list[Path]) -> Callable[[int], torch.Tensor]:
    """A float32 batch made by torchvision's transforms."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224),
            transforms.RandomHorizontalFlip(),
            transforms.PILToTensor(),
            transforms.ConvertImageDtype(torch.float),
            transforms.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )

    def batch(number: int) -> torch.Tensor:
        chosen = files[number * BATCH : (number + 1) * BATCH]
        return torch.stack([transform(Image.open(file).convert("RGB")) for file in chosen])

    return batch


def measured_paths(root: Path) -> dict[str, Callable[[int], object]]:
    """The three paths, each a function of the batch's number."""
    settings = DataSettings(name="imagefolder", root=str(root), loader_processes=0)
    pictures = FolderPictures(root / "train", class_names(root))
    decoder = Decoder(pictures, settings, seed=0, augment=True, leaves_out=False)
    cpu = torch.device("cpu")
    source = PictureSource(pictures, settings, mean=IMAGENET_MEAN, std=IMAGENET_STD, seed=0, device=cpu)

    def requested(number: int) -> Pass:
        return Pass(time.perf_counter_ns() % 1000, np.arange(number * BATCH, (number + 1) * BATCH))

    return {
        "reference": reference(sorted((root / "train" / "class").iterdir())),
        "loader": lambda number: decoder[requested(number)],
        "whole": lambda number: next(source.stream([requested(number)], augment=True)),
    }


def measure(paths: dict[str, Callable[[int], object]], batches: int, rounds: int) -> dict[str, list[float]]:
    """Images a second of each round; the paths take turns within a round, and the first round is dropped."""
    speeds: dict[str, list[float]] = {name: [] for name in paths}
    for turn in range(rounds + 1):
        for name, path in paths.items():
            start = time.process_time()
            for number in range(batches):
                path(number)
            if turn > 0:
                speeds[name].append(batches * BATCH / (time.process_time() - start))
    return speeds


def report(speeds: dict[str, list[float]], kilobytes: float) -> dict[str, object]:
    """Medians, quartiles and ratios, with what they were measured on."""
    result: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": {"processor": _processor(), "cores": os.cpu_count(), "threads_used": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), **_versions()},
        "jpeg": {"size": [WIDTH, HEIGHT], "quality": QUALITY, "mean_kilobytes": round(kilobytes, 1)},
        "rounds": len(speeds["reference"]),
    }
    for name, values in speeds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        ratios = [value / base for value, base in zip(values, speeds["reference"], strict=True)]
        result[name] = {
            "images_per_second": round(middle, 1),
            "quartiles": [round(low, 1), round(high, 1)],
            "ratio_to_reference": round(statistics.median(ratios), 2),
            "ratio_range": [round(min(ratios), 2), round(max(ratios), 2)],
        }
    return result


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "torchvision", "pillow", "simplejpeg"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=4, help=f"batches of {BATCH} images in a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        kilobytes = make_folder(Path(folder), arguments.batches * BATCH)
        speeds = measure(measured_paths(Path(folder)), arguments.batches, arguments.rounds)
    result = report(speeds, kilobytes)
    print(json.dumps(result, indent=2))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
