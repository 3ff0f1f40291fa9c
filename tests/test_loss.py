"""The losses against torch's and timm's, and what is said of a loss of the user's own that cannot be trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from run_folders import DIGITS, SMALL, call
from torch import Tensor, nn

from largebatch.errors import ConfigError
from largebatch.training.loss import Loss, make_loss
from largebatch.training.settings import LossSettings

N, CLASSES = 6, 5
LOGITS = torch.randn(N, CLASSES, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(N) % CLASSES
BLENDED = 0.7 * F.one_hot(LABELS, CLASSES) + 0.3 * F.one_hot(LABELS.roll(1), CLASSES)


def loss(soft: bool = False, **keys: Any) -> Loss:
    settings = LossSettings.model_validate(keys)
    return make_loss(settings, classes=CLASSES, images=N, soft=soft, device=torch.device("cpu"))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", [LABELS, BLENDED], ids=["labels", "blended"])
def test_cross_entropy_with_label_smoothing_is_its_formula(targets: Tensor, smoothing: float) -> None:
    wanted = F.one_hot(targets, CLASSES).float() if targets.ndim == 1 else targets
    wanted = wanted * (1 - smoothing) + smoothing / CLASSES
    expected = -(wanted * LOGITS.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss(label_smoothing=smoothing)(LOGITS, targets), expected)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_bce_is_timms(smoothing: float, threshold: float | None) -> None:
    timm_loss = pytest.importorskip("timm.loss")
    theirs = timm_loss.BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    ours = loss(name="bce", label_smoothing=smoothing, target_threshold=threshold)
    torch.testing.assert_close(ours(LOGITS, LABELS), theirs(LOGITS, LABELS))
    # timm smooths blended targets where it blends them.
    smoothed = BLENDED * (1 - smoothing) + smoothing / CLASSES
    torch.testing.assert_close(ours(LOGITS, BLENDED), theirs(LOGITS, smoothed))


def test_bce_without_switches_is_torchs_and_full_precision_under_autocast() -> None:
    expected = F.binary_cross_entropy_with_logits(LOGITS, F.one_hot(LABELS, CLASSES).float())
    torch.testing.assert_close(loss(name="bce")(LOGITS, LABELS), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(name="bce")(LOGITS.bfloat16(), LABELS).dtype == torch.float32


def focal(logits: Tensor, targets: Tensor, gamma: float = 2.0) -> Tensor:
    each = F.cross_entropy(logits, targets, reduction="none")
    return (1 - (-each).exp()) ** gamma * each


def test_own_loss_gives_a_number_for_the_images_or_for_each() -> None:
    assert logits_are_float32(loss(name=f"{__name__}:focal", arguments={"gamma": 0.0}))
    each = loss(name=f"{__name__}:focal", arguments={"gamma": 0.0})
    whole = loss(name="torch.nn:CrossEntropyLoss", arguments={"label_smoothing": 0.1})
    torch.testing.assert_close(each(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS))
    torch.testing.assert_close(whole(LOGITS, LABELS), F.cross_entropy(LOGITS, LABELS, label_smoothing=0.1))
    soft = loss(soft=True, name="torch.nn:BCEWithLogitsLoss")
    torch.testing.assert_close(soft(LOGITS, BLENDED), F.binary_cross_entropy_with_logits(LOGITS, BLENDED))


def logits_are_float32(own: Loss) -> bool:
    return own(LOGITS.bfloat16(), LABELS).dtype == torch.float32


class Learned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))


def total(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def matrix(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.sigmoid()


def infinite(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.sum() / 0


def constant(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.ones(())


def number(logits: Tensor, targets: Tensor) -> float:
    return 1.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("total", "a sum; return the mean over the images"),
        ("matrix", r"returned torch.float32 \[6, 5\]; return the mean over the images, or one number for each, \[6\]"),
        ("infinite", "not finite"),
        ("constant", "has no gradient"),
        ("number", "returned 1.0; return the mean"),
        ("Learned", "has parameters, which nothing trains"),
        ("CLASSES", "is not a function or class"),
        ("focla", "has no 'focla'; did you mean 'focal'"),
    ],
)
def test_own_losses_that_cannot_be_trained(name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        loss(name=f"{__name__}:{name}")
    assert str(caught.value).startswith("loss.name: ")


def test_own_loss_that_raises_says_where() -> None:
    with pytest.raises(ConfigError, match=r"random logits \[6, 5\] and targets int64 \[6\]: failed: TypeError: .*gama"):
        loss(name=f"{__name__}:focal", arguments={"gama": 1})


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["loss.name=focal"], "loss: name: 'focal' is not cross_entropy or bce"),
        (["loss.target_threshold=0.2"], "loss: target_threshold: 0.2 is for bce"),
        (["loss.name=a.b:c", "loss.label_smoothing=0.1"], "loss: label_smoothing: a.b:c does not take it"),
        (["loss.label_smoothing=1.0"], "loss.label_smoothing: 1 is not less than 1"),
        (["loss.name=no_such_module:f"], "loss.name: 'no_such_module:f' cannot be imported"),
    ],
)
def test_a_mistake_is_one_line_before_training(overrides: list[str], said: str, tmp_path: Any) -> None:
    outcome = call("train", DIGITS, "--run-dir", tmp_path, *SMALL, *overrides)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert said in outcome.err
