from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.image import imread

from largebatch.report.figure import draw, explain, panels, plain
from largebatch.report.metrics import open_writers
from largebatch.report.plots import draw_curves, with_jumps


def write(run_dir: Path, records: list[dict[str, float]]) -> None:
    writer = open_writers(run_dir, is_main=True, first_step=0)
    for record in records:
        writer.write(record)
    writer.close()


def pixels_of(picture: np.ndarray, colour: str) -> int:
    wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return int(np.all(np.isclose(picture[..., :3], wanted, atol=0.02), axis=-1).sum())


def test_each_curve_is_in_the_picture(tmp_path: Path) -> None:
    records: list[dict[str, float]] = []
    for step in range(1, 101):
        records.append({"step": step, "epoch": step / 50, "train/loss": 1 / step, "lr": 0.1})
        records[-1]["train/top1_error"] = 90 / step
    records[49]["val/top1_error"] = 30.0
    records[99]["val/top1_error"] = 20.0
    write(tmp_path, records)
    assert draw_curves(tmp_path, pytest.fail)
    picture = imread(tmp_path / "curves.png")
    height, width = picture.shape[:2]
    assert width >= 800
    for colour in ("#4c78a8", "#e45756", "#54a24b"):
        assert pixels_of(picture, colour) > 100
    # Training curves fill the two upper panels, the learning rate the lowest.
    assert pixels_of(picture[: height // 3], "#4c78a8") > 100
    assert pixels_of(picture[height // 3 : 2 * height // 3], "#4c78a8") > 100
    assert pixels_of(picture[height // 2 :], "#54a24b") > 100
    assert pixels_of(picture[2 * height // 3 :], "#4c78a8") == 0


@pytest.mark.parametrize("loss", [float("nan"), 1.0])
def test_one_record_and_a_loss_that_is_not_finite_can_be_drawn(tmp_path: Path, loss: float) -> None:
    write(tmp_path, [{"step": 1, "epoch": 1.0, "train/loss": loss}])
    assert draw_curves(tmp_path, pytest.fail)


def test_what_cannot_be_drawn_is_a_warning(tmp_path: Path) -> None:
    warnings: list[str] = []
    write(tmp_path, [])
    assert not draw_curves(tmp_path, warnings.append)
    assert "curves.png could not be drawn (DataError: " in warnings[0]
    assert "no metric records" in warnings[0]
    (tmp_path / "curves.png").mkdir()
    write(tmp_path, [{"step": 1, "epoch": 1.0, "train/loss": 1.0}])
    assert not draw_curves(tmp_path, warnings.append)
    assert "curves.png could not be drawn (IsADirectoryError" in warnings[1]


@pytest.mark.parametrize("name", ["lr_$_$0.1", r"$\frac{$", "_hidden", "a^b_{c}", "b\udcff"])
def test_names_are_text_and_never_formulas(tmp_path: Path, name: str) -> None:
    def make() -> Any:
        figure, (axes,) = panels(size=(4, 3))
        axes.plot([0, 1], label=plain(name))
        legend = axes.legend()
        assert len(legend.get_texts()) == 1
        axes.set_xticks([0], [plain(name)])
        explain(figure, name, name)
        return figure

    with mpl.rc_context({"text.usetex": True}):
        assert draw(tmp_path / "x.png", make, pytest.fail)


def test_the_learning_rate_falls_in_a_step_at_the_step_of_the_plan() -> None:
    points = [(0.8, 1.0), (1.2, 0.1), (2.2, 0.1)]
    assert with_jumps(points, [1.0]) == [(0.8, 1.0), (1.0, 1.0), (1.0, 0.1), (1.2, 0.1), (2.2, 0.1)]
    assert with_jumps(points, []) == points


def test_importing_the_reports_imports_neither_matplotlib_nor_tensorboard() -> None:
    code = (
        "import sys, largebatch.report.plots, largebatch.report.metrics, largebatch.report.progress\n"
        "slow = {'matplotlib', 'tensorboard', 'torch'} & set(sys.modules)\n"
        "assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
