"""Config files, overrides, and what is said about them when they are wrong."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import Field, model_validator

from largebatch.config import Config, differences, read_config
from largebatch.configfile.loading import digest, dump_config, load_config
from largebatch.configfile.yamlcore import write_yaml
from largebatch.errors import ConfigError
from largebatch.section import Section


class Warmup(Section):
    kind: Literal["none", "constant", "gradual"] = "gradual"
    epochs: float = Field(default=5, ge=0)


class Schedule(Section):
    warmup: Warmup = Warmup()
    reference_lr: float = Field(default=0.1, gt=0)
    milestones: list[float] = Field(default=[30.0, 60.0])
    every: int | None = None

    @model_validator(mode="after")
    def _agree(self) -> Schedule:
        if self.every == 7:
            raise ValueError("every: 7 does not go with\n  the milestones")
        return self


class Optimizer(Section):
    nesterov: bool = False
    precision: Literal["fp32", "bf16"] | int = "fp32"
    sizes: int | list[int] = 3
    patience: Annotated[int, Field(gt=0)] | Literal["auto"] = "auto"
    shape: tuple[int, int] = (1, 2)
    arguments: dict[str, Any] = Field(default={})


class Root(Section):
    name: str = "run"
    seed: int = 0
    schedule: Schedule = Schedule()
    optimizer: Optimizer = Optimizer()

    @model_validator(mode="after")
    def _fit(self) -> Root:
        if self.seed == 13:
            raise ValueError("seed 13 does not go with the name")
        return self


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _load(text: str | bytes, *overrides: str, name: str = "x.yaml") -> Root:
    Path(name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_config(Path(name), overrides, Root)


def _complaint(text: str | bytes, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        _load(text, *overrides)
    return str(caught.value)


# --- what is right --------------------------------------------------------------------------------------


def test_files_merge_under_the_overrides(folder: Path) -> None:
    (folder / "deep").mkdir()
    (folder / "deep/base.yaml").write_text("extends: ../root.yaml\nschedule: {milestones: [1, 2], warmup: {epochs: 2}}")
    (folder / "root.yaml").write_text("name: root\nseed: 4\nschedule: {warmup: {kind: none}, every: 3}")
    text = "extends: deep/base.yaml\nname: top\nschedule:\n  milestones: [7]\n"
    overrides = ["seed=5", "schedule.every=null", "optimizer.arguments={a: 1}", "optimizer.arguments.b=[x]"]
    config = _load(text, *overrides)
    assert config == Root(
        name="top",
        seed=5,
        schedule=Schedule(warmup=Warmup(kind="none", epochs=2.0), milestones=[7.0], every=None),
        optimizer=Optimizer(arguments={"a": 1, "b": ["x"]}),
    )


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("1e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("007", 7),
        ("0x1f", 31),
        ("0o17", 15),
        ("+3", 3),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("True", True),
        ("false", False),
        ("Null", None),
        ("~", None),
        ("2020-01-01", "2020-01-01"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("=", "="),
        ("<<", "<<"),
        (r'"\ud83d\ude00"', "\U0001f600"),  # as JSON escapes it
    ],
)
def test_scalars_are_those_of_yaml_1_2(written: str, read: object) -> None:
    for config in [
        _load(f"optimizer: {{arguments: {{a: {written} }}}}"),
        _load("seed: 1", f"optimizer.arguments.a={written}"),
    ]:
        value = config.optimizer.arguments["a"]
        assert value == read
        assert type(value) is type(read)


@pytest.mark.usefixtures("folder")
def test_keys_are_text() -> None:
    config = _load("optimizer: {arguments: {1: a, on: b, null: c}}")
    assert config.optimizer.arguments == {"1": "a", "on": "b", "null": "c"}


@pytest.mark.usefixtures("folder")
def test_whole_numbers_do_for_numbers_and_lists_for_tuples() -> None:
    config = _load("schedule: {reference_lr: 1, milestones: [3, 4.5]}\noptimizer: {shape: [3, 4]}")
    assert config.schedule.reference_lr == 1.0
    assert type(config.schedule.milestones[0]) is float
    assert config.optimizer.shape == (3, 4)


def test_digest_is_that_of_the_values(folder: Path) -> None:
    first = _load("seed: 1\noptimizer: {arguments: {a: 1, b: 2}}")
    other_order = _load("optimizer: {arguments: {b: 2, a: 1}}\nseed: 1")
    assert digest(first) == digest(other_order)
    assert digest(Root()) == digest(_load(dump_config(Root())))  # a default of 5 is read back as 5.0
    assert digest(first) != digest(_load("seed: 2\noptimizer: {arguments: {a: 1, b: 2}}"))
    assert len(digest(first)) == 64


def test_loading_needs_no_torch() -> None:
    code = "import sys, largebatch.configfile.loading; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


# --- what is wrong --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "schedule: {warmup: {kind: gradul}}",
            "schedule.warmup.kind: 'gradul' is not one of 'none', 'constant', 'gradual'; did you mean 'gradual'?",
        ),
        ("schedule: {warmpu: {}}", "schedule.warmpu: no such key; did you mean 'warmup'?"),
        ("warmup: {kind: none}", "warmup: no such key; did you mean 'schedule.warmup'?"),
        ("zzz: 1", "zzz: no such key; the keys here are name, seed, schedule, optimizer"),
        ("Schedule: {}", "Schedule: no such key; did you mean 'schedule'?"),
        ("seed: '1'", "seed: '1' is not a whole number"),
        ("seed: true", "seed: true is not a whole number"),
        ("seed: 1.5", "seed: 1.5 is not a whole number"),
        ("seed:", "seed: null is not a whole number"),
        ("name: 3", 'name: 3 is not text; put it in quotes: \'"3"\' on a command line, "3" in a file'),
        ("schedule: {reference_lr: 0}", "schedule.reference_lr: 0 is not greater than 0"),
        ("schedule: {reference_lr: fast}", "schedule.reference_lr: 'fast' is not a number"),
        ("schedule: {reference_lr: true}", "schedule.reference_lr: true is not a number"),
        ("schedule: {warmup: {epochs: -.5}}", "schedule.warmup.epochs: -0.5 is not at least 0"),
        ("schedule: {milestones: [1, b]}", "schedule.milestones.1: 'b' is not a number"),
        ("schedule: {milestones: 3}", "schedule.milestones: 3 is not a list"),
        ("schedule: {every: x}", "schedule.every: 'x' is not a whole number or null"),
        ("schedule: {every: 7}", "schedule: every: 7 does not go with the milestones"),
        ("schedule:", "schedule: null is not a mapping of keys"),
        ("optimizer: {nesterov: yes}", "optimizer.nesterov: 'yes' is not true or false"),
        (
            "optimizer: {precision: bf61}",
            "optimizer.precision: 'bf61' is not one of 'fp32', 'bf16' or a whole number; did you mean 'bf16'?",
        ),
        ("optimizer: {sizes: [1, a]}", "optimizer.sizes.1: 'a' is not a whole number"),
        ("optimizer: {sizes: a}", "optimizer.sizes: 'a' is not a whole number or a list"),
        ("optimizer: {patience: -3}", "optimizer.patience: -3 is not greater than 0 or 'auto'"),
        ("optimizer: {arguments: [1]}", "optimizer.arguments: [1] is not a mapping"),
        ("seed: 13", "seed 13 does not go with the name"),
        ("", "is empty; write the sections of a config"),
        ("# nothing", "is empty; write the sections of a config"),
        ("- a", "['a'] is not a mapping of sections (lines of `section:`)"),
        ("seed: 1\nseed: 2", "line 2, column 1: the key 'seed' appears a second time (first on line 1)"),
        ("seed: b: c", "line 1, column 8: mapping values are not allowed here"),
        (
            "a: &x 1\nb: *x",
            "line 2, column 4: aliases (*name) are not allowed; repeat the value, or use extends",
        ),
        ("a: !!int 3", "line 1, column 4: tags (tag:yaml.org,2002:int) are not allowed"),
        ("? [a]\n: b", "line 1, column 3: a key must be a plain word"),
        ("[" * 9999, "line 1, column 51: nested deeper than 50 levels"),
        ("seed: .nan", "line 1, column 7: .nan is not a finite number"),
        ("seed: -1e999", "line 1, column 7: -1e999 is not a finite number"),
        ("seed: " + "9" * 5000, "line 1, column 7: a number of 5000 digits is too long"),
        ('name: "\\ud800"', "line 1, column 7: half of a surrogate pair is not a character"),
        ("seed: 1\nname: a\0b", "line 2, column 8: the character U+0000 is not allowed"),
        (b"seed: 1 \xff\xfe", "is not UTF-8 text (byte 0xff at offset 8)"),
        ("name: " + "x" * (1 << 20), "is larger than 1048576 bytes; a config is a small file"),
        ("extends: 3", "extends: 3 is not the name of a file"),
        ("extends: x.yaml", "extends: the files extend each other in a circle: x.yaml -> x.yaml"),
        ("extends: x.yml", "extends: x.yml: no such file; did you mean 'x.yaml'?"),
        ("extends: no/x.yaml", "extends: no/x.yaml: no such file; there is no folder 'no'"),
        ('extends: "a\\0"', "extends: a\\x00: a null byte is not allowed in a name"),
        ("extends: .", "extends: .: is a folder; name a YAML file"),
    ],
)
def test_wrong_file_is_explained(text: str | bytes, line: str) -> None:
    assert _complaint(text) == f"x.yaml: {line}"


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimiser.lr=1", "optimiser.lr: no such key; did you mean 'optimizer'?"),
        ("schedule.warmup.knd=none", "schedule.warmup.knd: no such key; did you mean 'kind'?"),
        ("schedule.warmup=3", "schedule.warmup: 3 is not a mapping of keys"),
        ("seed.x=3", "seed: {'x': 3} is not a whole number"),
        ("seed=", "seed: no value after '='; write null for none"),
        ("seed=# x", "seed: '# x' is not a whole number"),
        ("seed=-.inf", "seed: -.inf is not a finite number"),
        ("seed", "'seed' is not of the form section.key=value"),
        ("=3", "'=3' is not of the form section.key=value"),
        ("schedule..every=3", "'schedule..every=3' is not of the form section.key=value"),
        (
            "seed=*x",
            "seed: line 1, column 1: aliases (*name) are not allowed; repeat the value, or use extends",
        ),
        ("se\ned=3", "se\\ned: no such key; did you mean 'seed'?"),
    ],
)
def test_wrong_override_is_explained(override: str, line: str) -> None:
    assert _complaint("name: a", override) == f"command line: {line}"


def test_the_source_of_a_value_is_named(folder: Path) -> None:
    (folder / "root.yaml").write_text("schedule: {every: x, warmup: {kind: y}}\noptimizer: {shape: [1]}")
    (folder / "base.yaml").write_text("extends: root.yaml\nschedule: {warmup: {kind: z}}\nseed: no")
    lines = _complaint("extends: base.yaml\nname: top", "seed=on", "schedule.warmup.epochs=-1").splitlines()
    assert {line.split(": ")[1]: line.split(": ")[0] for line in lines} == {
        "seed": "command line",
        "schedule.warmup.kind": "base.yaml",
        "schedule.warmup.epochs": "command line",
        "schedule.every": "root.yaml",
        "optimizer.shape.1": "root.yaml",
    }


def test_a_circle_names_its_files(folder: Path) -> None:
    (folder / "a.yaml").write_text("extends: x.yaml")
    assert _complaint("extends: a.yaml") == (
        "a.yaml: extends: the files extend each other in a circle: x.yaml -> a.yaml -> x.yaml"
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("configs/digit.yaml", "no such file; did you mean 'digits.yaml'?"),
        ("configs", "is a folder; name a YAML file"),
        ("/dev/zero", "is larger than 1048576 bytes; a config is a small file"),
        ("x" * 300, "cannot be read: File name too long"),
    ],
)
def test_a_file_that_cannot_be_read_is_explained(folder: Path, name: str, problem: str) -> None:
    (folder / "configs").mkdir()
    (folder / "configs/digits.yaml").write_text("seed: 1")
    with pytest.raises(ConfigError) as caught:
        load_config(Path(name), [], Root)
    assert str(caught.value) == f"{name}: {problem}"


# --- anything at all ------------------------------------------------------------------------------------

_HYPOTHESIS = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

_words = st.text(max_size=12) | st.sampled_from(["1e-4", "yes", "null", "", ".5", "~", "<<", "0o17", "\x85", "a: b"])
_scalars = st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
_anything = st.recursive(
    _scalars | _words, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_words, inner, max_size=3)
)
_valid = st.fixed_dictionaries(
    {
        "name": _words,
        "seed": st.integers(14, 10**12),
        "schedule": st.fixed_dictionaries(
            {
                "warmup": st.fixed_dictionaries(
                    {
                        "kind": st.sampled_from(["none", "gradual"]),
                        "epochs": st.floats(0, 1e9) | st.integers(0, 9),
                    }
                ),
                "reference_lr": st.floats(1e-9, 1e9),
                "milestones": st.lists(st.floats(-1e9, 1e9) | st.integers(0, 9), max_size=3),
                "every": st.none() | st.integers(8, 99),
            }
        ),
        "optimizer": st.fixed_dictionaries(
            {
                "nesterov": st.booleans(),
                "precision": st.sampled_from(["fp32", "bf16", 16]),
                "sizes": st.integers() | st.lists(st.integers(), max_size=3),
                "patience": st.just("auto") | st.integers(1, 9),
                "shape": st.lists(st.integers(0, 9), min_size=2, max_size=2),
                "arguments": st.dictionaries(_words, _anything, max_size=3),
            }
        ),
    }
)
# A path and a value that it cannot take; a path of None is a key that does not exist.
_breakages = st.sampled_from(
    [
        ("seed", "7"),
        ("seed", True),
        ("seed", 1.5),
        ("name", 3),
        ("name", None),
        ("schedule", 3),
        ("schedule.warmup", ["a"]),
        ("schedule.warmup.kind", "gradually"),
        ("schedule.warmup.kind", None),
        ("schedule.warmup.epochs", -1),
        ("schedule.reference_lr", 0),
        ("schedule.reference_lr", "1e-4"),
        ("schedule.milestones", {"a": 1}),
        ("schedule.milestones", [1, "x"]),
        ("schedule.every", 1.5),
        ("schedule.every", 7),
        ("optimizer.nesterov", "yes"),
        ("optimizer.nesterov", 1),
        ("optimizer.precision", "bf17"),
        ("optimizer.precision", None),
        ("optimizer.sizes", ["a"]),
        ("optimizer.patience", 0),
        ("optimizer.shape", [1, 2, 3]),
        ("optimizer.arguments", "x"),
        ("optimizer.no_such_key", 1),
        ("schedule.warmup.no_such_key", {"a": 1, "b": 2}),
        ("no_such_section", {"a": 1, "b": 2}),
    ]
)


def _with(values: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    broken = copy.deepcopy(values)
    *sections, key = path.split(".")
    inner = broken
    for section in sections:
        inner = inner[section]
    inner[key] = value
    return broken


@pytest.mark.usefixtures("folder")
@_HYPOTHESIS
@given(values=_valid)
def test_a_config_is_read_back_from_its_own_text(values: dict[str, Any]) -> None:
    config = Root.model_validate_json(json.dumps(values))
    text = dump_config(config)
    again = _load(text)
    assert again == config
    assert dump_config(again) == text
    assert digest(again) == digest(config)


@pytest.mark.usefixtures("folder")
@_HYPOTHESIS
@given(values=_valid, breakage=_breakages, by_override=st.booleans())
def test_one_broken_thing_gives_one_line_with_its_path(
    values: dict[str, Any], breakage: tuple[str, Any], by_override: bool
) -> None:
    path, value = breakage
    if by_override:
        message = _complaint(write_yaml(values), f"{path}={json.dumps(value)}")
    else:
        message = _complaint(write_yaml(_with(values, path, value)))
    source, where, rule = message.split(": ", 2)
    assert source == ("command line" if by_override else "x.yaml")
    # The cross-field rule is the section's, and names the key itself; a part of a list is named by its index.
    expected = "schedule" if value == 7 else path
    assert where == expected or where.startswith(f"{expected}.")
    assert rule
    assert message.isprintable()


@pytest.mark.usefixtures("folder")
@_HYPOTHESIS
@given(text=st.text() | st.text(alphabet="ab:-[]{}?!&*|>'\"\\#%@, \n\t01.e~U") | st.binary())
def test_no_file_gives_anything_but_a_config_error(text: str | bytes) -> None:
    assert all(line.startswith("x.yaml: ") and line.isprintable() for line in _lines(text))


@pytest.mark.usefixtures("folder")
@_HYPOTHESIS
@given(override=st.text() | st.text(alphabet="seed=.,:[]{}&*!?'\"\\\n 01.e~U"))
def test_no_override_gives_anything_but_a_config_error(override: str) -> None:
    assert all(line.startswith("command line: ") and line.isprintable() for line in _lines("seed: 1", override))


def _lines(text: str | bytes, *overrides: str) -> list[str]:
    """What is said about the input; nothing where it happens to be right."""
    try:
        _load(text, *overrides)
    except ConfigError as error:
        return str(error).split("\n")
    return []


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("data.root=/data/my set #2", "root", "/data/my set #2"),
        ("data.root=#2", "root", "#2"),
        ("data.root=a: b", "root", "a: b"),
        ("data.root=~/sets", "root", str(Path.home() / "sets")),
        ("data.root=$SETS/one", "root", "/sets/one"),
        ("data.root=${SETS}/$no_such", "root", "/sets/$no_such"),
        ("data.train_images=1000.0", "train_images", 1000),
        ("data.train_images=1e3", "train_images", 1000),
        ("data.arguments={}", "arguments", {}),
    ],
)
def test_an_override_means_what_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, key: str, value: object
) -> None:
    monkeypatch.setenv("SETS", "/sets")
    (tmp_path / "c.yaml").write_text("data: {name: 'a.b:c', arguments: {x: 1.0}}\n")
    found = getattr(read_config(tmp_path / "c.yaml", [override]).data, key)
    assert found == value
    assert type(found) is type(value)
    assert read_config(tmp_path / "c.yaml").data.arguments == {"x": 1.0}


def test_shorter_epochs_alone_shorten_warmup_and_decay(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("schedule: {epochs: 90}\n")
    schedule = read_config(tmp_path / "c.yaml", ["schedule.epochs=9"]).schedule
    assert (schedule.epochs, schedule.warmup.epochs, schedule.decay.epochs) == (9, 0.5, [3, 6, 8])
    schedule = read_config(tmp_path / "c.yaml", ["schedule.epochs=180"]).schedule
    assert (schedule.warmup.epochs, schedule.decay.epochs) == (10, [60, 120, 160])
    with pytest.raises(ConfigError, match=r"decay.epochs ends at 30, but .* 9 epochs.*set schedule.epochs alone"):
        read_config(tmp_path / "c.yaml", ["schedule.epochs=9", "schedule.decay.epochs=[30]"])
    (tmp_path / "c.yaml").write_text("schedule: {epochs: 9, warmup: {kind: constant}}\n")
    schedule = read_config(tmp_path / "c.yaml").schedule
    assert (schedule.warmup.epochs, schedule.decay.epochs) == (0.5, [3, 6, 8]), "in a file as on the command line"
    (tmp_path / "c.yaml").write_text("schedule: {epochs: 9, warmup: {epochs: 2}, decay: {kind: none}}\n")
    schedule = read_config(tmp_path / "c.yaml").schedule
    assert (schedule.warmup.epochs, schedule.decay.epochs) == (2, [30, 60, 80]), "what is given stays"


def test_resize_size_follows_image_size(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data: {name: imagefolder, image_size: 64}\n")
    assert read_config(tmp_path / "c.yaml").data.short_side == 73
    assert read_config(tmp_path / "c.yaml", ["data.image_size=224"]).data.short_side == 256
    with pytest.raises(ConfigError, match=r"every value must be in \[0, 1\], as of pixels divided by 255"):
        read_config(tmp_path / "c.yaml", ["data.mean=[127.5]"])


def test_a_setting_says_itself_whether_it_may_differ_on_resume() -> None:
    values = {
        "batch": {"on_resize": "rescale"},
        "checkpoint": {"keep": 5},
        "health": {"straggler_factor": 3.0},
        "logging": {"every_steps": 3},
        "data": {"root": "moved", "prefetch": 2, "loader_processes": 1, "on_error": "skip", "on_change": "accept"},
        "execution": {"device": "cpu", "bucket_mb": 1.0, "timeout_minutes": 1.0},
    }
    free = Config.model_validate(values)
    assert differences(Config(), free) == []
    assert differences(free, Config.model_validate({**values, "seed": 1, "model": {"arguments": {"a": 1}}})) == [
        "model.arguments: was {}, now {'a': 1}",
        "seed: was 0, now 1",
    ]
