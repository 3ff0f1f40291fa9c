"""Every way to vary images gives the same weights on any number of ranks, and after a kill on another number."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_folders import DIGITS, call, records, tensor_hashes, train_digits, train_digits_until_killed

SHORT = ["schedule.epochs=1", "schedule.decay.kind=none"]
MIXED = "data.augmentation={mixup_alpha: 0.4, cutmix_alpha: 1.0}"


@pytest.mark.parametrize("overrides", [pytest.param([MIXED, "execution.workers_per_pass=2"], id="mixup_and_cutmix")])
def test_weights_do_not_depend_on_ranks_or_kills(tmp_path: Path, overrides: list[str]) -> None:
    one, other, plain = (tmp_path / name for name in ("one", "other", "plain"))
    train_digits(one, 1, *SHORT, *overrides)
    train_digits_until_killed(other, 2, 3, *SHORT, *overrides)
    train_digits(other, 3, *SHORT, *overrides)
    assert tensor_hashes(one) == tensor_hashes(other)
    assert records(one) == records(other)
    train_digits(plain, 1, *SHORT, *[override for override in overrides if "data." not in override])
    assert tensor_hashes(plain) != tensor_hashes(one)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([MIXED, "batch.images_per_worker=1"], "batch.images_per_worker 1 leaves it none to blend with"),
        (["data.augmentation.mixup_alpha=-1"], "data.augmentation.mixup_alpha: -1"),
    ],
)
def test_what_does_not_fit_is_one_line(overrides: list[str], said: str) -> None:
    outcome = call("plan", DIGITS, *overrides)
    assert outcome.status == 2
    assert said in outcome.err
    assert outcome.err.count("\n") == 1
