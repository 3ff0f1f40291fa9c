"""Every switch that changes numbers: the same bits on 1, 2 and 3 ranks, and after a kill and a resume."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import DIGITS, SMALL, call, saved_steps, summary, train_digits, train_digits_until_killed

SHORT = ["schedule.epochs=1", "schedule.decay.kind=none"]
# Switches that do not touch each other share a run.
SWITCHES = {
    "adamw, clip_norm, layer_decay, label_smoothing": [
        "optimizer={kind: adamw, weight_decay: 0.05, clip_norm: 0.5, layer_decay: 0.8, no_decay: [conv1]}",
        "schedule={reference_lr: 0.003, warmup: {start_lr: 1.0e-5}}",
        "loss.label_smoothing=0.1",
    ],
    "lamb, clip_value, cosine to a final rate, bce on mixed targets, fp16": [
        "optimizer={kind: lamb, weight_decay: 0.05, clip_value: 0.01}",
        "schedule={reference_lr: 0.01, decay: {kind: cosine, final_lr: 0.001}}",
        "loss={name: bce, label_smoothing: 0.1, target_threshold: 0.2}",
        "data.augmentation.mixup_alpha=0.2",
        "execution.precision=fp16",
    ],
    "mixup, cutmix, randaugment, random erasing, repeats, two workers in a pass": [
        "data.augmentation={mixup_alpha: 0.4, cutmix_alpha: 1.0, mixup_prob: 0.9, repeats: 3}",
        "data.augmentation={auto_augment: randaugment, random_erasing: 0.5}",
        "execution.workers_per_pass=2",
    ],
    "lars, own loss": [
        "optimizer={kind: lars, trust_coefficient: 0.01}",
        "loss={name: 'torch.nn:CrossEntropyLoss', arguments: {label_smoothing: 0.1}}",
        "execution={workers_per_pass: 2, gradient_as_bucket_view: true}",
    ],
}


@pytest.mark.parametrize("overrides", SWITCHES.values(), ids=SWITCHES)
def test_a_switch_gives_the_same_bits_on_any_ranks_and_after_a_kill(overrides: list[str], tmp_path: Path) -> None:
    arguments = [*SHORT, *overrides]
    alone, moved = tmp_path / "alone", tmp_path / "moved"
    outcome = call("train", DIGITS, "--run-dir", alone, *SMALL, *arguments)
    assert outcome.status == 0, outcome.err
    train_digits_until_killed(moved, 2, 3, *arguments)
    assert saved_steps(moved)[-1] < 8
    train_digits(moved, 3, *arguments)
    assert summary(moved)["weights_sha256"] == summary(alone)["weights_sha256"]
