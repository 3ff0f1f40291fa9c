"""The commands that use a run: `evaluate`, `predict` and `export`. torch is imported when one of them runs."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from largebatch.arguments import Overrides, folder_name
from largebatch.errors import UserError
from largebatch.wording import printable

if TYPE_CHECKING:
    from largebatch.use.predict import Prediction

Run = Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.", show_default=False)]
Weights = Annotated[
    str, typer.Option(metavar="model|ema|best", help="The last weights, their average, or the best evaluation's.")
]


def evaluate(
    run: Run,
    overrides: Overrides = None,
    weights: Weights = "model",
    on: Annotated[
        Path | None, typer.Option(parser=folder_name, help="A folder of other images to evaluate on: CLASS/*.jpg.")
    ] = None,
    per_class: Annotated[
        bool, typer.Option("--per-class", help="Also write each class's accuracy and the confusion matrix.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option(parser=folder_name, help="Folder for --per-class.  [default: RUN]")
    ] = None,
) -> None:
    """Evaluate a run's model.pt, or its newest checkpoint, on all validation images: exact on any number of ranks."""
    _check_weights(weights)
    from largebatch.distributed.environment import read_launch
    from largebatch.use.evaluate import evaluate_run

    launch = read_launch()
    result = evaluate_run(run, overrides or [], launch, which=weights, on=on)
    if launch.rank != 0:
        return
    if per_class:
        from largebatch.report.per_class import write_per_class

        write_per_class(out or run, result.class_names, result.confusion.numpy(), warn=_note)
    print(json.dumps(result.metrics))


def predict(
    run: Run,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Image files, or folders of them.", show_default=False)
    ],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show, most likely first.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="A line of JSON for each image.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="CSV: image, rank, class, probability.")] = False,
    weights: Weights = "model",
) -> None:
    """Say which classes a run's model sees in image files, which are read as its validation images are.

    What cannot be read is named at the end, and makes the exit status 2; the rest is predicted.
    """
    _check_weights(weights)
    if as_json and as_csv:
        raise UserError("--json and --csv exclude each other; give one of them")
    from largebatch.use.model import load_trained
    from largebatch.use.predict import files_of
    from largebatch.use.predict import predict as predict_files

    files = list(files_of(images))
    show: Callable[[Prediction], None] = _show_json if as_json else _csv_shower() if as_csv else _show
    problems = []
    for prediction in predict_files(load_trained(run, which=weights, device="auto"), files, top=top):
        if prediction.problem:
            problems.append(prediction.problem)
        else:
            show(prediction)
    if problems:
        named = "\n".join(f"  {printable(problem)}" for problem in problems)
        raise UserError(f"{len(problems)} of {len(files)} images cannot be read:\n{named}")


def _show(prediction: Prediction) -> None:
    classes = ", ".join(f"{name} {100 * share:.1f} %" for name, share in prediction.classes)
    print(printable(f"{prediction.image}  {classes}"))


def _show_json(prediction: Prediction) -> None:
    classes = [{"class": name, "probability": share} for name, share in prediction.classes]
    print(json.dumps({"image": prediction.image, "predictions": classes}))


def _csv_shower() -> Callable[[Prediction], None]:
    write = csv.writer(sys.stdout, lineterminator="\n").writerow
    write(["image", "rank", "class", "probability"])

    def show(prediction: Prediction) -> None:
        for rank, (name, share) in enumerate(prediction.classes, start=1):
            write([prediction.image, rank, name, f"{share:.6f}"])

    return show


def export(
    run: Run,
    to: Annotated[str, typer.Option(metavar="safetensors|torchscript|onnx", help="The format.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Output file.  [default: RUN/model.<format>]", show_default=False),
    ] = None,
    weights: Weights = "model",
) -> None:
    """Write a run's model in a format that other programs read, and compare what was written with the model."""
    _check_weights(weights)
    from largebatch.use.export import check_format
    from largebatch.use.export import export as write
    from largebatch.use.model import load_trained

    check_format(to)
    path = out or run / f"model{'' if weights == 'model' else f'_{weights}'}.{to}"
    write(load_trained(run, which=weights, device="cpu"), to, path)
    print(path)


def _check_weights(name: str) -> None:
    if name not in ("model", "ema", "best"):
        raise UserError(f"--weights: {name!r} is not one of model, ema, best")


def _note(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)
