"""What `model.init_from` loads, resizes, replaces and leaves out, what `model.freeze` freezes, and timm's models."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from run_folders import ROOT, call
from torch import Tensor, nn

from largebatch.errors import ConfigError
from largebatch.models.build import build
from largebatch.models.settings import ModelSettings

INSTANT = ROOT / "configs/instant/resnet8_fp32.yaml"


def make(notes: list[str] | None = None, *, classes: int = 10, shape: Any = (3, 16, 16), **keys: Any) -> nn.Module:
    settings = ModelSettings.model_validate({"name": "resnet8", **keys})
    return build(settings, classes=classes, shape=shape, seed=0, note=None if notes is None else notes.append)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    state = make().state_dict()
    return {k: torch.rand(t.shape, generator=generator) if t.is_floating_point() else t + 3 for k, t in state.items()}


def same(model: nn.Module, weights: dict[str, Tensor], but: tuple[str, ...] = ()) -> bool:
    return all(torch.equal(t, weights[k]) for k, t in model.state_dict().items() if k not in but)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("inside", ["", "model", "state_dict"])
def test_a_file_is_loaded_whatever_wrapped_it(
    weights: dict[str, Tensor], prefix: str, inside: str, tmp_path: Path
) -> None:
    named: Any = {prefix + key: tensor for key, tensor in weights.items()}
    torch.save({inside: named, "epoch": 3} if inside else named, tmp_path / "w.pt")
    notes: list[str] = []
    assert same(make(notes, init_from=str(tmp_path / "w.pt")), weights)
    assert f"{len(weights)} tensors loaded from {tmp_path / 'w.pt'}" in notes[0]


def test_safetensors_are_loaded(weights: dict[str, Tensor], tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(weights, tmp_path / "w.safetensors")
    assert same(make(init_from=str(tmp_path / "w.safetensors")), weights)


def test_a_head_for_other_classes_is_replaced_and_the_rest_is_loaded(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save({**weights, "aux.weight": torch.zeros(2)}, tmp_path / "w.pt")
    notes: list[str] = []
    head = ("fc.weight", "fc.bias")
    model = make(notes, classes=4, init_from=str(tmp_path / "w.pt"))
    assert same(model, weights, head)
    assert torch.equal(model.fc.weight, make(classes=4).fc.weight)
    assert "replaced: the head: fc.weight, fc.bias" in notes[0]
    assert "left out: aux.weight" in notes[0]


def test_the_first_convolution_takes_gray_images(weights: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(weights, tmp_path / "w.pt")
    notes: list[str] = []
    model = make(notes, shape=(1, 16, 16), init_from=str(tmp_path / "w.pt"))
    torch.testing.assert_close(model.conv1.weight, weights["conv1.weight"].sum(1, keepdim=True))
    assert "resized: conv1.weight" in notes[0]


def test_position_embeddings_are_interpolated(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"name": "torchvision.models.vision_transformer:VisionTransformer"}
    sizes = {"patch_size": 4, "num_layers": 1, "num_heads": 1, "hidden_dim": 8, "mlp_dim": 8}
    small = make(**keys, arguments={**sizes, "image_size": 16})
    constant = torch.arange(8.0).expand(1, 17, 8)
    torch.save({**small.state_dict(), "encoder.pos_embedding": constant}, tmp_path / "w.pt")
    large = make(**keys, arguments={**sizes, "image_size": 32}, init_from=str(tmp_path / "w.pt"))
    torch.testing.assert_close(large.encoder.pos_embedding.detach(), torch.arange(8.0).expand(1, 65, 8))


def _without(weights: dict[str, Tensor], key: str) -> Any:
    return {k: t for k, t in weights.items() if k != key}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: _without(w, "conv1.weight"), "conv1.weight missing there, [16, 3, 3, 3] here"),
        (lambda w: {**w, "bn1.bias": torch.zeros(5)}, "bn1.bias [5] there, [16] here"),
        (lambda w: {**w, "bn1.bias": w["bn1.bias"] * float("nan")}, "'bn1.bias' has values that are not finite"),
        (lambda w: {"epoch": 3}, "holds no state_dict"),
        (lambda w: [1], "holds no state_dict"),
        (lambda w: {"conv1.weight": 3}, "holds no state_dict"),
        (lambda w: Path(), "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_does_not_fit_is_an_error_that_lists_names(
    weights: dict[str, Tensor], change: Any, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "w.pt"
    if change is None:
        path.write_bytes(b"damaged")
    else:
        torch.save(change(weights), path)
    with pytest.raises(ConfigError) as caught:
        make(init_from=str(path))
    assert str(caught.value).startswith(f"model.init_from: {path}")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_sources_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.pt does not exist"):
        make(init_from=str(tmp_path / "nowhere.pt"))
    with pytest.raises(ConfigError, match=r"holds neither .* nor an intact checkpoint"):
        make(init_from=str(tmp_path))
    with pytest.raises(ConfigError, match="resnet18 has no such weights; did you mean 'IMAGENET1K_V1'"):
        make(name="resnet18", init_from="torchvision:IMAGENET1K_V")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"init_from": "timm"}, "timm is for timm models"),
        ({"init_from": "torchvision:DEFAULT"}, "is for torchvision models"),
        ({"name": "resnet18", "init_from": "w.pt", "arguments": {"weights": "DEFAULT"}}, "both give initial weights"),
        ({"name": "timm:"}, "lacks a model name"),
    ],
)
def test_sources_of_another_kind_of_model_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make(**keys)


def test_weights_of_torchvision_come_by_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    state = torchvision.models.squeezenet1_1(num_classes=1000).state_dict()
    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", lambda *_, **__: state)
    notes: list[str] = []
    model = make(notes, name="squeezenet1_1", shape=(3, 64, 64), init_from="torchvision:DEFAULT")
    assert torch.equal(model.state_dict()["features.0.weight"], state["features.0.weight"])
    assert "replaced: the head: classifier.1.weight, classifier.1.bias" in notes[0]


def test_parts_by_pattern_are_frozen_and_their_batchnorm_stays_in_evaluation_mode() -> None:
    notes: list[str] = []
    model = make(notes, freeze=["conv1", "layer1.*.bn2", "bn1.*", "layer2.0.bn1.weight"])
    model.train()
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    batchnorms = {name for name, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not m.training}
    both = {f"{name}.{part}" for name in ("layer1.0.bn2", "bn1") for part in ("weight", "bias")}
    assert frozen == {"conv1.weight", "layer2.0.bn1.weight"} | both
    assert batchnorms == {"layer1.0.bn2", "bn1"}
    assert f"{len(frozen)} tensors that match" in notes[0]


@pytest.mark.parametrize(
    ("patterns", "words"),
    [(["layer9"], "did you mean 'layer"), (["conv1", "zzz*"], "'zzz*' matches no"), (["*"], "leaves no parameter")],
)
def test_patterns_that_cannot_be_meant_are_refused(patterns: list[str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(freeze=patterns)
    assert str(caught.value).startswith("model.freeze: ")
    assert words in str(caught.value)


def test_a_run_starts_from_a_run_with_frozen_parts_and_needs_its_weights_no_more(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert call("train", INSTANT, "--run-dir", first).status == 0
    given = [f"model.init_from={first}", "model.freeze=[conv1, bn1, layer1]", "data.synthetic.classes=4"]
    outcome = call("train", INSTANT, *given, "--run-dir", second)
    assert outcome.status == 0, outcome.err
    assert "tensors loaded from" in outcome.out
    assert "replaced: the head" in outcome.out
    before, after = (torch.load(folder / "model.pt", weights_only=True) for folder in (first, second))
    kept = [key for key in before if key.startswith(("conv1", "bn1", "layer1"))]
    assert all(torch.equal(before[key], after[key]) for key in kept)  # running statistics too
    assert not torch.equal(before["layer3.0.conv1.weight"], after["layer3.0.conv1.weight"])
    shutil.rmtree(first)
    assert call("evaluate", second).status == 0


def test_models_of_timm_are_built_for_the_data() -> None:
    timm = pytest.importorskip("timm")
    notes: list[str] = []
    model = make(notes, name="timm:test_vit", shape=(1, 64, 48), classes=7)
    assert model(torch.zeros(2, 1, 64, 48)).shape == (2, 7)
    assert "as the constructor of timm:test_vit leaves them" in notes[0]
    assert isinstance(make(name="timm:test_resnet", shape=(3, 32, 32)), timm.models.resnet.ResNet)
    with pytest.raises(ConfigError, match=r"timm has no model 'resnet81'; did you mean 'resnet"):
        make(name="timm:resnet81")
