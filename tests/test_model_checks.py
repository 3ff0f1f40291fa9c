"""What a model must be to be trained, and which of the weights that it brings are kept."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import ROOT, call
from torch import nn

from largebatch.errors import ConfigError
from largebatch.models.build import build
from largebatch.models.check import check_forward
from largebatch.models.settings import ModelSettings

SHAPE = (3, 8, 8)
_MODELS = """
import torch
from torch import nn
from torch.nn.utils import parametrizations


class Net(nn.Module):
    def __init__(self, outputs=10):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, outputs)
        self.calls = 0

    def features(self, x):
        self.calls += 1
        return self.bn(self.conv(x)).relu().mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


class Output(Net):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        out = super().forward(x)
        return {
            "tuple": (out, out), "dict": {"logits": out}, "none": None, "nan": out * float("nan"),
            "three": out[:, :, None], "long": out.argmax(1), "detached": out.detach(), "squeezed": out[0],
            "raises": x,
        }[self.change] if self.change != "raises" else 1 / 0


class Pooled(Net):
    def features(self, x):
        return self.bn(self.conv(x).amax((2, 3), keepdim=True)).flatten(1)


class Changed(Net):
    def __init__(self, what):
        super().__init__()
        if what == "unused":
            self.spare = nn.Linear(2, 2)
        elif what == "complex":
            self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
        elif what == "half":
            self.fc.half()
        elif what == "double":
            self.fc.double()
        elif what == "syncbn":
            self.bn = nn.SyncBatchNorm(4)
        elif what == "lazy":
            self.fc = nn.LazyLinear(10)
        elif what == "lazybuffer":
            self.bn = nn.LazyBatchNorm2d(affine=False)
        elif what == "meta":
            self.fc.to("meta")
        elif what == "memory":
            self.twin = nn.Linear(4, 10)
            self.twin.weight = nn.Parameter(self.fc.weight.data)
        elif what == "frozen":
            self.requires_grad_(False)
        elif what == "inf":
            self.fc.bias.data[3] = float("inf")


def head(**kwargs):
    return Net(kwargs.get("num_classes", 1000))


def strict(**kwargs):
    return Net(**kwargs)


def brought(**kwargs):
    model = Net()
    nn.init.constant_(model.fc.weight, 5.0)
    model.bn.requires_grad_(False).weight.fill_(7.0)
    model.bn.eval()
    parametrizations.weight_norm(model.conv)
    return model


def evaluating():
    return Net().eval()


def tied():
    model = Net()
    model.again = model.fc
    return model
"""


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models_to_check.py").write_text(_MODELS)
    monkeypatch.syspath_prepend(tmp_path)


def make(name: str, notes: list[str] | None = None, **keys: Any) -> nn.Module:
    settings = ModelSettings.model_validate({"name": f"models_to_check:{name}", **keys})
    return build(settings, classes=10, shape=SHAPE, seed=0, note=None if notes is None else notes.append)


def check(model: nn.Module, images: int = 2, classes: int = 10) -> None:
    batch = torch.ones(images, *SHAPE).cumsum(3)
    check_forward(model, "own:model", classes=classes, images=batch, autocast=contextlib.nullcontext)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("tuple", "the output is a tuple, not one tensor [2, 10]"),
        ("dict", "the output is a dict"),
        ("none", "the output is a NoneType"),
        ("nan", "not finite before training"),
        ("three", "float32 [2, 10, 1], and [2, 10] is needed for 10 classes"),
        ("long", "int64 [2]"),
        ("squeezed", "float32 [10]"),
        ("detached", "does not require grad"),
        ("raises", "ZeroDivisionError"),
    ],
)
def test_an_output_that_is_not_logits_is_named(change: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(make("Output", arguments={"change": change}))
    message = str(caught.value)
    assert message.startswith("model.name: 'own:model' on 2 random images [2, 3, 8, 8]")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize("outputs", [1000, 3, 1])
def test_outputs_must_be_as_many_as_classes(outputs: int) -> None:
    model = make("Net", arguments={"outputs": outputs})
    check(model, classes=outputs)
    with pytest.raises(ConfigError, match=rf"float32 \[2, {outputs}\], and \[2, 2\] is needed for 2 classes"):
        check(model, classes=2)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("complex", "'phase' is complex64"),
        ("half", "'fc.weight' is float16"),
        ("double", "'fc.weight' is float64"),
        ("syncbn", "'bn' is a SyncBatchNorm"),
        ("lazy", "lazy layers, 'fc.weight'"),
        ("lazybuffer", "lazy layers, 'bn.running_mean'"),
        ("meta", "'fc.weight' is on the meta device"),
        ("memory", "'fc.weight' and 'twin.weight' share their memory"),
        ("frozen", "no parameters to train"),
        ("inf", "'fc.bias' has values that are not finite"),
    ],
)
def test_tensors_that_cannot_be_trained_are_named(what: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make("Changed", arguments={"what": what})
    assert str(caught.value).startswith("model.name: 'models_to_check:Changed': ")
    assert words in str(caught.value)


def test_parameters_that_the_loss_does_not_reach_are_named() -> None:
    with pytest.raises(ConfigError, match=r"does not depend on the parameter 'spare.weight' and 1 more"):
        check(make("Changed", arguments={"what": "unused"}))
    check(make("tied"))


def test_one_image_and_one_pixel_are_too_few_for_batchnorm() -> None:
    check(make("Pooled"), images=2)
    check(make("Net"), images=1)
    with pytest.raises(ConfigError, match=r"raise batch\.images_per_worker"):
        check(make("Pooled"), images=1)


def test_the_check_leaves_no_trace() -> None:
    model = make("Net")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    buffers = [id(b) for b in model.buffers()]
    model.bn.eval()
    state = torch.random.get_rng_state()
    check(model)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [id(b) for b in model.buffers()] == buffers
    assert (model.calls, model.training, model.bn.training) == (0, True, False)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_function_of_kwargs_is_given_the_number_of_classes() -> None:
    assert make("head").fc.out_features == 10
    assert make("strict").fc.out_features == 10  # whose class knows no num_classes
    assert make("strict", arguments={"outputs": 4}).fc.out_features == 4
    model = build(ModelSettings(name="torchvision.models:shufflenet_v2_x0_5"), classes=7, shape=(3, 32, 32), seed=0)
    assert model.fc.out_features == 7


def test_weights_that_a_model_brings_are_kept() -> None:
    notes: list[str] = []
    model = make("brought", notes)
    assert torch.all(model.fc.weight == 5)
    assert torch.all(model.bn.weight == 7)
    assert "as the constructor of models_to_check:brought leaves them" in notes[0]
    assert "frozen BatchNorm    bn" in notes[0]
    model.train()
    model.bn.train()
    assert (model.training, model.conv.training, model.bn.training) == (True, True, False)


def test_the_papers_initialisation_spares_what_is_frozen_and_names_it() -> None:
    notes: list[str] = []
    model = make("brought", notes, initialisation="paper")
    assert 0 < model.fc.weight.std() < 0.02
    assert torch.all(model.bn.weight == 7)
    assert "by the paper's initialisation (§5.1), last γ 0" in notes[0]
    assert "frozen or parametrized layers: conv, bn" in notes[0]


def test_a_model_that_is_returned_in_evaluation_mode_as_a_whole_is_trained() -> None:
    assert make("evaluating").train().bn.training


def test_training_refuses_with_one_line_before_it_starts(tmp_path: Path) -> None:
    config = ROOT / "configs/instant/resnet8_fp32.yaml"
    run_dir = tmp_path / "run"
    outcome = call("train", config, "model.name=googlenet", "model.arguments={aux_logits: true}", "--run-dir", run_dir)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert "model.name: 'googlenet'" in outcome.err
