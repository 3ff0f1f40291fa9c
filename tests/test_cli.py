"""The command line: what is frozen, exit statuses, and that no bad input ever ends in a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from run_folders import DIGITS, ROOT, SMALL, Outcome, call

from largebatch.cli import app

IMAGENET = str(ROOT / "configs/imagenet_resnet50_8k.yaml")
# What scripts rely on: these stay. Commands may be added.
FROZEN = {
    "train": {"CONFIG", "[section.key=value]...", "--run-dir", "--resume", "--replay"},
    "evaluate": {"RUN", "[section.key=value]...", "--on", "--out", "--per-class", "--weights"},
    "predict": {"RUN", "IMAGE...", "--top", "--json", "--csv", "--weights"},
    "export": {"RUN", "--to", "--out", "--weights"},
    "plan": {"[CONFIG]", "[section.key=value]...", "--ranks", "--json", "--from", "--speeds"},
    "config show": {"CONFIG", "[section.key=value]..."},
    "config schema": set(),
    "data fetch": {"NAME", "--root"},
}
PLAN_NAMES = {
    "global_batch",
    "virtual_workers",
    "images_per_worker",
    "world_size",
    "workers_on_rank",
    "steps_per_epoch",
    "total_steps",
    "dropped_images",
    "reference_lr",
    "peak_lr",
    "warmup_steps",
    "decay_steps",
    "warnings",
}


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher around these commands."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def commands(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name, command


class TestFrozen:
    def test_commands_and_their_options(self) -> None:
        found = {
            name: {p.metavar if p.param_type_name == "argument" else p.opts[0] for p in command.params}
            for name, command in commands(typer.main.get_command(app))
        }
        assert {name: found.get(name) for name in FROZEN} == FROZEN

    def test_every_command_explains_itself(self) -> None:
        for name, command in commands(typer.main.get_command(app)):
            outcome = call(*name.split(), "--help")
            assert outcome.status == 0
            assert "Usage:" in outcome.out
            assert command.help, name
            for parameter in command.params:
                assert parameter.help, f"{name} {parameter.name}"

    def test_help_and_configs_need_no_torch(self) -> None:
        code = (
            "import sys; from largebatch.cli import main\n"
            "assert main(['--help']) == 0\n"
            f"assert main(['plan', {DIGITS!r}]) == 0\n"
            f"assert main(['config', 'show', {DIGITS!r}]) == 0\n"
            "assert main(['config', 'schema']) == 0\n"
            "sys.exit('torch' in sys.modules)"
        )
        done = python(code)
        assert done.returncode == 0, done.stderr

    def test_it_is_a_module_too(self) -> None:
        command = [sys.executable, "-m", "largebatch", "plan", "nope.yaml"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr) == (2, "nope.yaml: no such file\n")

    def test_a_terminal_that_knows_no_paragraph_sign(self) -> None:
        done = python(
            f"import sys; from largebatch.cli import main; sys.exit(main(['plan', {DIGITS!r}]))",
            PYTHONIOENCODING="ascii",
        )
        assert done.returncode == 0, done.stderr
        assert "\\xa7" in done.stdout


# ---- bad input: exit status 2, what is wrong, no traceback

BAD_COMMANDS: dict[str, tuple[list[str], str]] = {
    "no_command": ([], "Usage:"),
    "unknown_command": (["trian"], "No such command"),
    "unknown_option": (["train", DIGITS, "--bogus"], "No such option: --bogus"),
    "no_config": (["train"], "Missing argument 'CONFIG'"),
    "option_without_value": (["train", DIGITS, "--run-dir"], "requires an argument"),
    "missing_file": (["train", "nope.yaml"], "nope.yaml: no such file"),
    "nearest_file": (["plan", str(ROOT / "configs/digit.yaml")], "did you mean 'digits.yaml'"),
    "a_folder": (["plan", str(ROOT)], "is a folder"),
    "null_byte": (["plan", "a\0b"], "null byte"),
    "surrogate": (["plan", "\udcff.yaml"], "no such file"),
    "resume_maybe": (["train", DIGITS, "--resume", "maybe"], "'maybe' is not one of 'auto', 'never'"),
    "ranks_0": (["plan", DIGITS, "--ranks", "0"], "--ranks"),
    "ranks_a_word": (["plan", DIGITS, "--ranks", "two"], "--ranks"),
    "ranks_beyond_k": (["plan", DIGITS, "--ranks", "9"], "too few for 9 ranks"),
    "speeds_0": (["plan", DIGITS, "--speeds", "1,0"], "--speeds: '1,0' is not a list of numbers"),
    "speeds_of_others": (["plan", DIGITS, "--speeds", "1,2", "--ranks", "3"], "are those of 2 ranks, and"),
    "no_run": (["evaluate", "/nope"], "no model.pt here"),
    "run_a_file": (["evaluate", DIGITS], "no model.pt here"),
    "unknown_set": (["data", "fetch", "mnits"], "unknown set"),
    "set_without_download": (["data", "fetch", "imagenet"], "cannot be downloaded"),
    "schema_with_argument": (["config", "schema", "x"], "unexpected extra argument"),
}
BAD_OVERRIDES = {
    "unknown_key": ("schedule.warmpu.epochs=5", "schedule.warmpu.epochs: no such key; did you mean 'warmup'?"),
    "no_equals": ("schedule.epochs", "not of the form section.key=value"),
    "no_key": ("=5", "not of the form section.key=value"),
    "no_value": ("schedule.epochs=", "no value after '='"),
    "a_word_for_a_number": ("schedule.epochs=many", "schedule.epochs: 'many' is not a number"),
    "a_number_for_a_switch": ("execution.compile=1", "execution.compile: 1 is not true or false"),
    "not_a_choice": ("execution.precision=fp8", "'fp8' is not one of 'fp32', 'bf16', 'fp16'"),
    "infinite": ("schedule.reference_lr=.inf", "not a finite number"),
    "negative_seed": ("seed=-1", "seed: -1 is not at least 0"),
    "huge_seed": ("seed=18446744073709551616", "seed: 18446744073709551616 is not less than"),
    "huge_threads": ("execution.threads=1000000", "execution.threads: 1000000 is not at most 1024"),
    "huge_timeout": ("execution.timeout_minutes=1e300", "execution.timeout_minutes"),
    "huge_decay": ("optimizer.weight_decay=1e300", "optimizer.weight_decay"),
    "minibatch_beyond_the_set": ("batch.virtual_workers=1000", "more than the 270 training images"),
    "passes_that_do_not_divide": ("execution.workers_per_pass=3", "3 does not divide batch.virtual_workers 8"),
    "unknown_model": ("model.name=resnet9", "did you mean"),
    "model_that_is_none": ("model.name=os:path", "not a function or class"),
    "model_that_cannot_be_made": ("model.name=torch.nn:Linear", "failed when called"),
    "model_without_parameters": ("model.name=torch.nn:Identity", "has no parameters to train"),
    "own_set_that_is_missing": ("data.name=nowhere:f", "cannot be imported"),
    "means_for_other_channels": ("data.mean=[0.1, 0.2]", "2 values for 1 channels"),
    "no_gpu": ("execution.device=cuda", "torch sees no GPU"),
    "nccl_without_gpu": ("execution.backend=nccl", "'nccl' needs a GPU"),
}


def assert_refused(outcome: Outcome, problem: str) -> None:
    assert outcome.status == 2, outcome.err
    assert problem in outcome.err
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize(("arguments", "problem"), BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_bad_command_is_refused(arguments: list[str], problem: str) -> None:
    assert_refused(call(*arguments), problem)


@pytest.mark.parametrize(("override", "problem"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES.keys())
def test_a_bad_value_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, problem: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert_refused(call("train", DIGITS, "--run-dir", tmp_path / "run", *SMALL, override), problem)
    assert not (tmp_path / "run/checkpoints").exists()


def test_several_bad_values_are_all_told() -> None:
    outcome = call("plan", DIGITS, "seed=-1", "schedule.epochs=many", "model.nmae=mlp")
    assert_refused(outcome, "seed")
    assert "schedule.epochs" in outcome.err
    assert "model.nmae" in outcome.err


def test_a_config_that_is_no_yaml_is_refused_by_line(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("model: {name: resnet8}\nbatch: [1, 2\n")
    assert_refused(call("train", tmp_path / "bad.yaml"), f"{tmp_path}/bad.yaml: line ")


def test_a_missing_set_names_the_command_that_fetches_it(tmp_path: Path) -> None:
    config, root = ROOT / "configs/fashion_mnist.yaml", f"data.root={tmp_path}/none"
    outcome = call("train", config, "--run-dir", tmp_path / "run", root)
    assert_refused(outcome, f"largebatch data fetch fashion-mnist --root {tmp_path}/none")
    assert str(tmp_path / "none/FashionMNIST/raw/train-images-idx3-ubyte") in outcome.err


def test_too_little_memory_is_told_with_what_takes_less(tmp_path: Path) -> None:
    model = f"model={{name: mlp, hidden: [{10**13}]}}"  # more bytes than any address can name
    assert_refused(call("train", DIGITS, "--run-dir", tmp_path / "run", *SMALL, model), "Run fewer images at once")


class TestRunFolder:
    def test_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        assert_refused(call("train", DIGITS, "--run-dir", tmp_path / "run", *SMALL), "is a file; give a folder")

    def test_one_below_a_file_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert_refused(call("train", DIGITS, "--run-dir", tmp_path / "file/run", *SMALL), "give a folder that can be")

    def test_one_that_cannot_be_made_is_refused(self) -> None:
        assert_refused(call("train", DIGITS, "--run-dir", "/proc/nope/run", *SMALL), "give a folder that can be")

    def test_a_name_that_is_too_long_is_refused(self, tmp_path: Path) -> None:
        outcome = call("train", DIGITS, "--run-dir", tmp_path / ("x" * 300), *SMALL)
        assert_refused(outcome, "give a folder that can be")

    @pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
    def test_one_without_permission_is_refused(self, tmp_path: Path) -> None:
        tmp_path.chmod(0o500)
        assert_refused(call("train", DIGITS, "--run-dir", tmp_path, *SMALL), "give a folder that can be")

    def test_it_is_named_after_the_config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "tiny.yaml").write_text(f"extends: {DIGITS}\n")
        small = [*SMALL, "schedule.epochs=1", "schedule.decay.kind=none", "model.name=mlp"]
        outcome = call("train", "tiny.yaml", *small)
        assert outcome.status == 0, outcome.err
        assert "see runs/tiny" in outcome.out
        assert (tmp_path / "runs/tiny/model.pt").exists()


class TestPrefix:
    """Errors carry the rank where there are several; what is wrong for all is said once a machine."""

    @pytest.mark.parametrize(
        ("variables", "lines"),
        [
            ({}, ["nope.yaml: no such file"]),
            ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}, ["nope.yaml: no such file"]),
            ({"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}, ["[rank 0] nope.yaml: no such file"]),
            ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, []),
            ({"RANK": "8", "LOCAL_RANK": "0", "WORLD_SIZE": "16"}, ["[rank 8] nope.yaml: no such file"]),
            ({"SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, ["nope.yaml: no such file"]),
            (
                {"SLURM_PROCID": "8", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "16"},
                ["[rank 8] nope.yaml: no such file"],
            ),
            ({"SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "16"}, []),
        ],
    )
    def test_of_a_config_error(
        self, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], lines: list[str]
    ) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        outcome = call("train", "nope.yaml")
        assert outcome.status == 2
        assert outcome.err.splitlines() == lines

    def test_of_an_error_that_may_be_one_ranks_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        outcome = call("train", DIGITS)
        assert outcome.status == 2
        assert outcome.err.startswith("[rank 1] WORLD_SIZE=2 but MASTER_ADDR")


# ---- plan


class TestPlan:
    def test_imagenet_at_8k_needs_no_data(self) -> None:
        outcome = call("plan", IMAGENET, "--json", "--ranks", "256", "data.root=/nowhere")
        assert outcome.status == 0, outcome.err
        made = json.loads(outcome.out)
        assert made.keys() >= PLAN_NAMES
        expected = {
            "global_batch": 8192,
            "virtual_workers": 256,
            "images_per_worker": 32,
            "world_size": 256,
            "workers_on_rank": [1] * 256,
            "steps_per_epoch": 156,
            "total_steps": 90 * 156,
            "dropped_images": 1_281_167 - 156 * 8192,
            "reference_lr": 0.1,
            "warmup_steps": 780,
            "decay_steps": [4680, 9360, 12480],
            "warnings": [],
        }
        assert {name: made[name] for name in expected} == expected
        assert made["peak_lr"] == pytest.approx(3.2)

    def test_in_words(self) -> None:
        text = call("plan", IMAGENET, "--ranks", "3").out
        assert "8192 = 256 virtual workers x 32 images" in text
        assert "3, each running 86 or 85 virtual workers" in text
        assert "3.2 = 0.1 x 8192/256: the linear scaling rule" in text
        assert "780 steps, gradual, from 0.1 to 3.2" in text
        assert "at steps 4680, 9360, 12480" in text
        assert "each epoch drops 3215" in text

    @pytest.mark.parametrize(("ranks", "workers"), [(1, [8]), (2, [4, 4]), (3, [2, 3, 3]), (8, [1] * 8)])
    def test_workers_are_dealt_to_ranks(self, ranks: int, workers: list[int]) -> None:
        made = json.loads(call("plan", DIGITS, "--json", "--ranks", str(ranks)).out)
        assert made["workers_on_rank"] == workers

    @pytest.mark.parametrize(
        ("override", "warning"),
        [
            ("batch.virtual_workers=512", "beyond 8192"),
            ("batch.images_per_worker=16", "not the paper's 32"),
            ("schedule.warmup.epochs=0.5", "only 78 steps"),
            ("optimizer.weight_decay=0.05", "is typical of AdamW"),
            ("optimizer.layer_decay=0.75", "it is for weights to start from"),
            ("loss.name=bce", "SGD needs a larger schedule.reference_lr"),
            ("loss={name: bce, target_threshold: 0.2}", "loss.target_threshold 0.2 does nothing"),
            ("ema={decay: 0.99999, warmup: false}", "more updates than the run's 14040"),
        ],
    )
    def test_warnings(self, override: str, warning: str) -> None:
        found = json.loads(call("plan", IMAGENET, "--json", override).out)["warnings"]
        assert any(warning in text for text in found)

    def test_adamw_with_what_is_sgds_warns_of_each_and_says_why_its_rate_grows_with_the_root(self) -> None:
        odd = ["schedule={lr_rule: linear, scale: loss, warmup: {kind: none}}", "optimizer={kind: adamw}"]
        found = json.loads(call("plan", IMAGENET, "--json", *odd).out)["warnings"]
        for text, said in zip(
            found, ("lr_rule", "reference_lr 0.1", "without a warmup", "weight_decay", "scale loss"), strict=True
        ):
            assert said in text
        usual = [
            "schedule={lr_rule: sqrt, reference_lr: 0.001, warmup: {start_lr: 1.0e-6}}",
            "optimizer={kind: adamw, weight_decay: 0.05, clip_norm: 1.0}",
            "loss.label_smoothing=0.1",
        ]
        outcome = call("plan", IMAGENET, *usual)
        assert "warning" not in outcome.out
        assert "0.00565685 = 0.001 x sqrt(8192/256): the square-root rule, usual for adamw, whose update" in outcome.out
        assert "780 steps, gradual, from 1e-06 to 0.00565685" in outcome.out
        assert "weight decay 0.05 (except normalisation layers and biases), gradients clipped to norm 1" in outcome.out
        assert "cross_entropy, label smoothing 0.1" in outcome.out


# ---- config


class TestConfig:
    def test_show_round_trips(self, tmp_path: Path) -> None:
        shown = call("config", "show", DIGITS, "seed=5", "schedule.decay.epochs=[3, 4.5]")
        assert shown.status == 0, shown.err
        assert yaml.safe_load(shown.out)["schedule"]["decay"]["epochs"] == [3, 4.5]
        (tmp_path / "shown.yaml").write_text(shown.out)
        again = call("config", "show", tmp_path / "shown.yaml")
        assert again.out == shown.out

    def test_schema_describes_every_key(self) -> None:
        schema = json.loads(call("config", "schema").out)
        shown = yaml.safe_load(call("config", "show", DIGITS).out)
        assert set(schema["properties"]) == {*shown, "extends"}
        assert self._undescribed(schema, schema, shown) == []

    def _undescribed(self, part: dict[str, Any], schema: dict[str, Any], shown: dict[str, Any]) -> list[str]:
        """The keys of `shown`, a part of a whole config, that an editor could say nothing about."""
        assert part["type"] == "object"
        assert part["additionalProperties"] is False
        missing = []
        for key, value in shown.items():
            found = part["properties"][key]
            if "$ref" in found:
                found = {**schema["$defs"][found["$ref"].removeprefix("#/$defs/")], **found}
                missing += [f"{key}.{inner}" for inner in self._undescribed(found, schema, value)]
            else:
                assert {"type", "anyOf", "enum", "const"} & found.keys(), f"{key} may be anything"
            if not found.get("description"):
                missing.append(key)
        return missing


def test_an_empty_run_dir_is_not_the_current_folder() -> None:
    outcome = call("train", DIGITS, "--run-dir", "", "--resume", "never")
    assert outcome.status == 2
    assert "--run-dir" in outcome.err
    assert "is not a folder" in outcome.err
