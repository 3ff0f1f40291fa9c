"""`predict`, `evaluate --per-class`, `--on` and `export`: what a run's weights say, checked against plain torch."""

from __future__ import annotations

import csv
import io
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_folder
from PIL import Image
from run_folders import DIGITS, SMALL, call, call_on
from torchvision.transforms.v2 import functional as F

from largebatch.data.known import read_known
from largebatch.models.build import build
from largebatch.models.settings import ModelSettings

NAMES = ["cat", "dog"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of two classes, and beside it the run that was trained on it."""
    folder = tmp_path_factory.mktemp("photos")
    make_folder(folder)
    generator = np.random.default_rng(0)
    for path in (folder / "set/val").rglob("*.jpg"):  # something for which resizing and cropping matter
        coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), np.uint8))
        coarse.resize((40, 30), Image.Resampling.BICUBIC).save(path, quality=95)
    outcome = call("train", folder / "config.yaml", "--run-dir", folder / "run", "ema.decay=0.5")
    assert outcome.status == 0, outcome.err
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on gray images in memory."""
    folder = tmp_path_factory.mktemp("digits")
    short = ["schedule.epochs=1", "schedule.decay.kind=none", "model.name=mlp"]
    assert call("train", DIGITS, "--run-dir", folder, *SMALL, *short).status == 0
    return folder


def in_plain_torch(run: Path, files: list[Path], weights: str = "model.pt") -> np.ndarray:
    """Probabilities, [files, classes]."""
    model = build(ModelSettings(name="resnet8"), classes=2, shape=(3, 16, 16), seed=9).eval()
    model.load_state_dict(torch.load(run / weights, weights_only=True))
    facts = json.loads((run / "inference.json").read_text())
    views = [F.resize(F.pil_to_tensor(Image.open(path).convert("RGB")), facts["resize_size"]) for path in files]
    images = torch.stack([F.to_dtype(F.center_crop(v, facts["shape"][1:]), torch.float32, scale=True) for v in views])
    with torch.no_grad():
        return model(F.normalize(images, facts["mean"], facts["std"])).softmax(1).numpy()


def rows_of(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


@pytest.mark.parametrize("weights", ["model", "ema"])
def test_predictions_are_those_of_plain_torch_in_every_form(photos: Path, weights: str) -> None:
    files = sorted((photos / "set/val").rglob("*.jpg"))
    command = ("predict", photos / "run", photos / "set/val", "--weights", weights)
    shown = [json.loads(line) for line in call(*command, "--json").out.splitlines()]
    expected = in_plain_torch(photos / "run", files, "model.pt" if weights == "model" else "model_ema.pt")
    assert [line["image"] for line in shown] == [str(path) for path in files]
    for line, row in zip(shown, expected, strict=True):
        order = row.argsort()[::-1]
        assert [one["class"] for one in line["predictions"]] == [NAMES[i] for i in order]
        assert [one["probability"] for one in line["predictions"]] == pytest.approx(row[order], abs=1e-3)
    rows = rows_of(call(*command, "--csv", "--top", "1").out)
    assert [(row["image"], row["rank"], row["class"]) for row in rows] == [
        (line["image"], "1", line["predictions"][0]["class"]) for line in shown
    ]
    first = shown[0]["predictions"][0]
    text = call(*command, "--top", "1").out.splitlines()
    assert text[0] == f"{files[0]}  {first['class']} {100 * first['probability']:.1f} %"


def test_probabilities_of_a_binary_loss_are_each_class_s_own(photos: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(photos / "run", tmp_path / "run"))
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("name: cross_entropy", "name: bce"))
    good = photos / "set/val/cat/0.jpg"
    shown = json.loads(call("predict", run, good, "--json").out)["predictions"]
    first, second = (torch.tensor(one["probability"], dtype=torch.float64) for one in shown)
    # The logits' difference is that of the softmax, too.
    assert float(first.logit() - second.logit()) == pytest.approx(
        float(torch.tensor(in_plain_torch(run, [good]).max()).logit()), abs=1e-3
    )
    assert float(first + second) != pytest.approx(1)


def test_averaged_weights_of_an_unfinished_run_are_those_of_its_checkpoint(photos: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(photos / "run", tmp_path / "run"))
    finished = call("evaluate", run, "--weights", "ema").out
    for name in ("model.pt", "model_ema.pt"):
        (run / name).unlink()
    assert call("evaluate", run, "--weights", "ema").out == finished


def test_one_of_several_processes_does_not_predict(photos: Path, monkeypatch: Any) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LARGEBATCH_RENDEZVOUS", "file:///nowhere")
    outcome = call("predict", photos / "run", photos / "set/val")
    assert outcome.status == 2
    assert "predict and export run in one process" in outcome.err


OWN_IMAGES = """
from torchvision.datasets import ImageFolder


def make(root):
    return ImageFolder(f"{root}/train"), ImageFolder(f"{root}/val")
"""


def test_an_own_dataset_is_predicted_as_it_was_validated(photos: Path, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "own_images.py").write_text(OWN_IMAGES)
    monkeypatch.syspath_prepend(str(tmp_path))
    own = ["data.name=own_images:make", f"data.arguments.root={photos / 'set'}"]
    assert call("train", photos / "config.yaml", "--run-dir", tmp_path / "run", *own).status == 0
    command = ("predict", tmp_path / "run", photos / "set/val", "--json", "--top", "1")
    shown = [json.loads(line)["predictions"][0] for line in call(*command).out.splitlines()]
    shares = in_plain_torch(tmp_path / "run", sorted((photos / "set/val").rglob("*.jpg")))
    assert [one["probability"] for one in shown] == pytest.approx(shares.max(1), abs=1e-3)
    assert json.loads((tmp_path / "run/inference.json").read_text())["resize_size"] == 20
    config = tmp_path / "run/config.yaml"
    text = config.read_text().replace("multi_label: false", "multi_label: true")
    config.write_text(text.replace("name: cross_entropy", "name: bce"))
    outcome = call("evaluate", tmp_path / "run", "--on", photos / "set/val")
    assert outcome.status == 2
    assert "--on: this run's images have any number of classes" in outcome.err


def test_odd_files_are_read_as_in_validation_and_bad_ones_named(photos: Path, tmp_path: Path) -> None:
    good = photos / "set/val/cat/0.jpg"
    image = Image.open(good)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees, which training does not either
    image.save(tmp_path / "a.png")
    image.save(tmp_path / "b.png", exif=exif)
    image.convert("CMYK").save(tmp_path / "c.tif")
    image.convert("P").save(tmp_path / "d.gif")
    (tmp_path / "e.jpg").write_bytes(good.read_bytes()[:-200])
    (tmp_path / "f.jpg").write_text("no image")
    Image.new("F", (20, 20)).save(tmp_path / "g.tif")
    outcome = call("predict", photos / "run", tmp_path, tmp_path / "missing.jpg", good, "--json")
    assert outcome.status == 2
    lines = [json.loads(line) for line in outcome.out.splitlines()]
    assert [Path(line["image"]).name for line in lines] == ["a.png", "b.png", "c.tif", "d.gif", "0.jpg"]
    assert lines[0]["predictions"] == lines[1]["predictions"]
    problems = outcome.err.splitlines()
    assert problems[0] == "4 of 9 images cannot be read:"
    for name, line in zip(("e.jpg", "f.jpg", "g.tif", "missing.jpg"), problems[1:], strict=True):
        assert line.startswith(f"  {tmp_path / name}: "), line
        assert "data.on_error" not in line


def test_a_model_of_small_gray_images_takes_image_files(digits: Path, tmp_path: Path) -> None:
    images, labels = read_known("digits", Path("data"))[1]
    for number, image in enumerate(images[:101]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{number:03d}.png")
    rows = rows_of(call("predict", digits, tmp_path, "--top", "1", "--csv").out)
    wrong = sum(int(row["class"]) != int(label) for row, label in zip(rows, labels, strict=False))
    error = json.loads(call("evaluate", digits).out)["val/top1_error"]
    assert 100 * wrong / 101 == pytest.approx(error)
    Image.new("RGB", (30, 20), (9, 99, 9)).save(tmp_path / "large.jpg")
    assert call("predict", digits, tmp_path / "large.jpg").status == 0


def test_per_class_tables_are_those_counted_by_hand_on_any_number_of_ranks(photos: Path, tmp_path: Path) -> None:
    wanted = ("evaluate", photos / "run", "evaluation.images_per_batch=1", "--per-class", "--out")
    result = json.loads(call(*wanted, tmp_path / "one").out)
    assert [outcome.status for outcome in call_on(3, *wanted, tmp_path / "three")] == [0] * 3
    for name in ("per_class.csv", "confusion.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert (tmp_path / "one/confusion.png").read_bytes()[1:4] == b"PNG"
    files = sorted((photos / "set/val").rglob("*.jpg"))
    counted = np.zeros((2, 2), int)
    for path, row in zip(files, in_plain_torch(photos / "run", files), strict=True):
        counted[NAMES.index(path.parent.name), row.argmax()] += 1
    matrix = rows_of((tmp_path / "one/confusion.csv").read_text())
    assert [[int(row[name]) for name in NAMES] for row in matrix] == counted.tolist()
    table = rows_of((tmp_path / "one/per_class.csv").read_text())
    assert [(row["class"], int(row["images"])) for row in table] == [("cat", 2), ("dog", 2)]
    assert [float(row["accuracy"]) for row in table] == pytest.approx(50.0 * counted.diagonal())
    assert result["val/top1_error"] == 100 - 25 * counted.trace()


def test_another_folder_is_evaluated_by_the_names_of_its_classes(photos: Path, tmp_path: Path) -> None:
    shutil.copytree(photos / "set/train/dog", tmp_path / "dog")
    outcome = call("evaluate", photos / "run", "--on", tmp_path, "--per-class", "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["val/images"] == 8
    shares = in_plain_torch(photos / "run", sorted((tmp_path / "dog").iterdir()))
    assert json.loads(outcome.out)["val/top1_error"] == 100 * (shares.argmax(1) != 1).mean()
    assert [row["images"] for row in rows_of((tmp_path / "out/per_class.csv").read_text())] == ["0", "8"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["predict", "RUN", "x.jpg", "--json", "--csv"], "--json and --csv exclude each other"),
        (["predict", "RUN/nowhere", "x.jpg"], "no model.pt here, and no checkpoint"),
        (["predict", "RUN", "RUN/tensorboard"], "tensorboard: no images in this"),
        (["predict", "RUN", "x.jpg", "--weights", "best"], "keeps none without checkpoint.keep_best"),
        (["evaluate", "RUN", "--weights", "worst"], "--weights: 'worst' is not one of model, ema, best"),
        (["evaluate", "RUN", "--on", "RUN/../set"], "set: the model has no class train, val"),
        (["evaluate", "RUN", "--on", "nowhere"], "nowhere: no such folder"),
        (["evaluate", "RUN", "--per-class", "--out", "RUN/model.pt"], "model.pt: File exists"),
        (["export", "RUN", "--to", "onxx"], "--to: 'onxx' is not one of safetensors, torchscript, onnx; did you mean"),
        (["export", "RUN", "--to", "torchscript", "--out", "nowhere/x.pt"], "--out: nowhere/x.pt: No such file"),
    ],
)
def test_what_is_wrong_is_one_line(photos: Path, arguments: list[str], said: str) -> None:
    outcome = call(*(argument.replace("RUN", str(photos / "run")) for argument in arguments))
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""


def test_a_library_that_is_missing_is_named(photos: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    outcome = call("export", photos / "run", "--to", "safetensors")
    assert outcome.status == 2
    assert "pip install 'largebatch[export]'" in outcome.err


def read_back(name: str, path: Path, images: torch.Tensor) -> tuple[np.ndarray, str]:
    """Logits of an exported file by the format's own library, and the metadata in it."""
    if name == "onnx":
        session = pytest.importorskip("onnxruntime").InferenceSession(str(path))
        metadata = session.get_modelmeta().custom_metadata_map["inference.json"]
        return session.run(None, {"images": images.numpy()})[0], metadata
    if name == "torchscript":
        extra = {"inference.json": ""}
        return torch.jit.load(str(path), _extra_files=extra)(images).detach().numpy(), extra["inference.json"]
    with pytest.importorskip("safetensors").safe_open(path, "pt") as file:
        model = build(ModelSettings(name="resnet8"), classes=2, shape=(3, 16, 16), seed=9).eval()
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118 (no mapping)
        return model(images).detach().numpy(), file.metadata()["inference.json"]


@pytest.mark.parametrize(("name", "libraries"), [("safetensors", 1), ("torchscript", 0), ("onnx", 3)])
def test_an_exported_file_computes_the_same_and_says_what_it_takes(
    photos: Path, tmp_path: Path, name: str, libraries: int
) -> None:
    for library in ("safetensors", "onnx", "onnxscript", "onnxruntime")[: libraries + (libraries > 1)]:
        pytest.importorskip(library)
    outcome = call("export", photos / "run", "--to", name, "--out", tmp_path / "file")
    assert (outcome.status, outcome.out) == (0, f"{tmp_path / 'file'}\n"), outcome.err
    images = torch.randn(5, 3, 16, 16)
    logits, metadata = read_back(name, tmp_path / "file", images)
    model = build(ModelSettings(name="resnet8"), classes=2, shape=(3, 16, 16), seed=9).eval()
    model.load_state_dict(torch.load(photos / "run/model.pt", weights_only=True))
    np.testing.assert_allclose(logits, model(images).detach().numpy(), rtol=1e-3, atol=1e-4)
    assert json.loads(metadata)["class_names"] == NAMES
