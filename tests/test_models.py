"""The models against torchvision's, the published sizes and the formulas of the initialisation."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from largebatch.errors import ConfigError
from largebatch.models.build import build
from largebatch.models.normalisation import batchnorm_modules
from largebatch.models.settings import ModelSettings, known_names


def _build(name: str, shape: tuple[int, int, int] = (3, 32, 32), seed: int = 0, **keys: object) -> nn.Module:
    return build(ModelSettings.model_validate({"name": name, **keys}), classes=10, shape=shape, seed=seed)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture(scope="module")
def resnet50() -> nn.Module:
    return build(ModelSettings(), classes=1000, shape=(3, 224, 224), seed=1)


def test_resnet50_is_torchvisions(resnet50: nn.Module) -> None:
    plain = torchvision.models.resnet50()
    plain.load_state_dict(resnet50.state_dict(), strict=True)
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(plain.eval()(images), resnet50.eval()(images), rtol=0, atol=0)
    assert _size(resnet50) == 25_557_032
    assert resnet50.layer2[0].conv2.stride == (2, 2)  # the paper: stride 2 in the 3×3 layer
    assert resnet50.layer2[0].conv1.stride == (1, 1)


def test_resnet50_has_106_batchnorm_tensors(resnet50: nn.Module) -> None:
    found = batchnorm_modules(resnet50)
    assert len(found) == 53
    assert len([p for _, module in found for p in module.parameters()]) == 106
    assert sum(name.endswith("downsample.1") for name, _ in found) == 4
    names = [name for name, _ in resnet50.named_modules()]
    assert [name for name, _ in found] == sorted((name for name, _ in found), key=names.index)


def test_batchnorm_modules_goes_by_type() -> None:
    model = nn.Sequential(nn.SyncBatchNorm(3), nn.GroupNorm(1, 3), nn.InstanceNorm2d(3), nn.BatchNorm1d(3))
    assert [name for name, _ in batchnorm_modules(model)] == ["0", "3"]


def test_convolutions_and_classifier_follow_the_paper(resnet50: nn.Module) -> None:
    for module in resnet50.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            expected, count = math.sqrt(2 / fan_out), module.weight.numel()
        elif isinstance(module, nn.Linear):
            expected, count = 0.01, module.weight.numel()
            assert torch.count_nonzero(module.bias) == 0
        else:
            continue
        # The standard error of a mean is std/sqrt(count), of a standard deviation std/sqrt(2 count).
        assert abs(module.weight.mean().item()) < 5 * expected / math.sqrt(count)
        assert abs(module.weight.std().item() - expected) < 5 * expected / math.sqrt(2 * count)


@pytest.mark.parametrize(
    ("name", "last", "blocks"),
    [("resnet18", "bn2", 8), ("resnext50_32x4d", "bn3", 16), ("resnet20", "bn2", 9)],
)
@pytest.mark.parametrize("last_gamma", [0.0, 1.0, 0.25])
def test_last_gamma_is_in_the_last_batchnorm_of_each_block_only(
    name: str, last: str, blocks: int, last_gamma: float
) -> None:
    model = _build(name, last_gamma=last_gamma)
    lasts = 0
    for path, module in batchnorm_modules(model):
        is_last = path.startswith("layer") and path.endswith(last)
        lasts += is_last
        assert torch.all(module.weight == (last_gamma if is_last else 1.0)), path
        assert torch.all(module.bias == 0), path
    assert lasts == blocks


def test_a_block_starts_as_the_identity() -> None:
    block = _build("resnet8").layer1[0]
    images = torch.rand(2, 16, 8, 8)
    torch.testing.assert_close(block(images), images, rtol=0, atol=0)


@pytest.mark.parametrize(("name", "millions"), [("resnet20", 0.27), ("resnet32", 0.46), ("resnet56", 0.85)])
def test_small_resnets_have_the_published_size(name: str, millions: float) -> None:
    model = _build(name)
    assert round(_size(model) / 1e6, 2) == millions
    depth = int(name.removeprefix("resnet"))
    assert len([m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]) == depth


def test_a_small_resnet_half_as_wide_has_a_quarter_of_the_weights_between_its_channels() -> None:
    model = _build("resnet8", (1, 28, 28), width=8)
    # Weights by hand: the first convolution, six within the stages, BatchNorm's γ and β after each, the classifier.
    convolutions = 9 * (1 * 8 + 2 * 8 * 8 + (8 * 16 + 16 * 16) + (16 * 32 + 32 * 32))
    assert _size(model) == convolutions + 2 * (3 * 8 + 2 * 16 + 2 * 32) + 32 * 10 + 10
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_small_resnet_subsamples_and_pads_with_zeros() -> None:
    shortcut = _build("resnet8").layer2[0].downsample
    images = torch.rand(2, 16, 7, 7)
    out = shortcut(images)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], images[:, :, ::2, ::2])
    assert torch.count_nonzero(out[:, :8]) == torch.count_nonzero(out[:, 24:]) == 0


@pytest.mark.parametrize("name", ["resnet8", "resnet20", "resnet18", "mlp"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (4, 15, 9)])
def test_every_image_shape_gives_logits(name: str, shape: tuple[int, int, int]) -> None:
    model = _build(name, shape).to(memory_format=torch.channels_last)
    images = torch.rand(3, *shape).to(memory_format=torch.channels_last)
    logits = model(images)
    assert logits.shape == (3, 10)
    assert torch.isfinite(logits).all()


def test_mlp_is_the_one_of_the_note() -> None:
    model = _build("mlp", (1, 28, 28))
    widths = [784, 100, 100, 100, 100, 10]
    assert _size(model) == sum(a * b + b for a, b in itertools.pairwise(widths))
    for layer in model.hidden:
        expected = math.sqrt(2 / layer.in_features)
        assert abs(layer.weight.std().item() - expected) < 5 * expected / math.sqrt(2 * layer.weight.numel())
    assert 0.009 < model.fc.weight.std().item() < 0.011
    assert _size(_build("mlp", (1, 8, 8), hidden=[])) == 64 * 10 + 10


def test_weights_depend_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = _build("resnet8", seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(6)
    again, other = _build("resnet8", seed=7), _build("resnet8", seed=8)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_own_initialisation_is_left_alone() -> None:
    model = _build("resnet18", initialisation="own")
    assert torch.all(model.layer1[0].bn2.weight == 1)
    assert torch.count_nonzero(model.fc.bias) > 0  # torch's own draw for a Linear


_OWN_MODELS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, classes, shape, width=4):
        super().__init__()
        self.conv = nn.Conv2d(shape[0], width, 3)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)
        self.scale = nn.Parameter(torch.full((1,), 3.0))
        self.seen = (classes, shape, width)
    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))

def plain(*, width):
    return nn.Linear(width, 2)

def nothing():
    return {"not": "a model"}

def broken(classes):
    raise RuntimeError("no weights\\nhere")

def lazy():
    return nn.LazyLinear(3)

constant = 3
"""


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_models_of_the_test.py").write_text(_OWN_MODELS)
    (tmp_path / "broken_module_of_the_test.py").write_text("x = 1\nraise SystemExit(3)\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("own_models")
def test_own_model_gets_what_its_signature_names() -> None:
    path = "own_models_of_the_test"
    model = _build(f"{path}:Net", (1, 9, 9), arguments={"width": 6})
    assert model.seen == (10, (1, 9, 9), 6)
    assert torch.count_nonzero(model.fc.bias) > 0  # own weights are kept
    assert model.scale.item() == 3.0
    assert _build(f"{path}:plain", arguments={"width": 5}).in_features == 5
    drawn = _build(f"{path}:Net", (1, 9, 9), initialisation="paper")
    assert torch.count_nonzero(drawn.fc.bias) == 0
    assert torch.all(drawn.bn.weight == 1)  # a BatchNorm outside any block that we know


@pytest.mark.usefixtures("own_models")
@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module_here:net", ["cannot be imported", "No module named 'no_such_module_here'"]),
        (
            "broken_module_of_the_test:net",
            ["cannot be imported", "SystemExit", "broken_module_of_the_test.py:2"],
        ),
        ("own_models_of_the_test:Nett", ["has no 'Nett'", "did you mean 'Net'?"]),
        ("own_models_of_the_test:constant", ["is not a function or class"]),
        ("own_models_of_the_test:nothing", ["returned a dict, not an nn.Module"]),
        ("own_models_of_the_test:lazy", ["lazy layers"]),
        (
            "own_models_of_the_test:broken",
            ["RuntimeError: no weights\\nhere", "own_models_of_the_test.py:23"],
        ),
        ("own_models_of_the_test:plain", ["TypeError", "width"]),
    ],
)
def test_own_model_that_fails_is_named_with_the_reason(path: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        _build(path)
    message = str(caught.value)
    assert message.startswith(f"model.name: {path!r}")
    assert "\n" not in message
    for word in words:
        assert word in message


def test_argument_that_torchvision_does_not_take_is_named() -> None:
    with pytest.raises(ConfigError, match=r"model\.name: 'resnet18' failed when called with .*depth=3"):
        _build("resnet18", arguments={"depth": 3})


def test_known_names_are_torchvisions_and_ours() -> None:
    theirs = torchvision.models.list_models(module=torchvision.models)
    assert sorted(known_names()) == sorted([*theirs, "resnet8", "resnet20", "resnet32", "resnet56", "mlp"])


@pytest.mark.parametrize("name", ["shufflenet_v2_x0_5", "mobilenet_v3_small", "squeezenet1_0", "googlenet", "vit_b_32"])
def test_a_model_of_torchvision_has_a_head_for_the_classes_and_takes_the_images_channels(name: str) -> None:
    model = _build(name, (1, 64, 64)).eval()
    assert model(torch.zeros(2, 1, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"name": "resnet5"}, r"'resnet5' is not a known model; did you mean 'resnet56'\?"),
        ({"name": "ResNet50"}, "did you mean 'resnet50'"),
        ({"name": "zzz"}, "one of resnet8, .*mlp, or .*torchvision .*package.module:function"),
        ({"name": "a.b:"}, "not of the form package.module:function"),
        ({"name": "a b:c"}, "not of the form package.module:function"),
        ({"hidden": [3]}, "hidden: .* is for the mlp"),
        ({"name": "mlp", "hidden": [0]}, "at least 1"),
        ({"width": 8}, "width: 8 is for resnet8, resnet20, resnet32, resnet56; resnet50 does not take it"),
        ({"name": "resnet8", "width": 0}, "greater than or equal to 1"),
        ({"name": "mlp", "arguments": {"width": 1}}, "arguments: mlp takes none; seen width"),
        ({"initialisation": "own", "last_gamma": 1.0}, "last_gamma: 1 needs initialisation: paper"),
        ({"initialisation": "paper", "arguments": {"weights": "DEFAULT"}}, "weights would be overwritten"),
        ({"arguments": {"num_classes": 3}}, "num_classes comes from the data set"),
        ({"last_gamma": 1.5}, "less than or equal to 1"),
    ],
)
def test_impossible_settings_are_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelSettings.model_validate(keys)
