"""The settings of the exchange that `benchmark --tune` tries: which of them change a number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_ranks
from torch import nn

from largebatch.distributed.environment import Launch, Ranks, connect
from largebatch.errors import ConfigError
from largebatch.training.settings import ExecutionSettings
from largebatch.training.virtual_workers import VirtualWorkers


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    return nn.Sequential(*layers).to(memory_format=torch.channels_last)


def _weights(launch: Launch, workers: int, settings: dict[str, Any]) -> list[float]:
    """Trained for three steps; several small buckets."""
    with connect(launch, device="cpu") as ranks:
        model = _model()
        virtual = VirtualWorkers(model, ranks, virtual_workers=workers, bucket_mb=0.001, **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            with virtual.step(step) as passes:
                for pass_workers in passes:
                    images = torch.sin(torch.arange(4.0 * 3 * 64) * (1 + pass_workers.start) + step).view(4, 3, 8, 8)
                    logits = virtual(images.contiguous(memory_format=torch.channels_last))
                    virtual.backward(F.cross_entropy(logits, torch.arange(4)))
            optimizer.step()
        return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.mark.parametrize("workers", [2, 5])
def test_gradients_that_lie_in_the_buckets_give_the_same_weights(workers: int) -> None:
    plain = run_ranks(_weights, 2, workers, {})
    viewed = run_ranks(_weights, 2, workers, {"gradient_as_bucket_view": True})
    assert viewed == plain
    assert viewed[0] == viewed[1]


def test_a_static_graph_gives_the_same_weights() -> None:
    assert run_ranks(_weights, 2, 2, {"static_graph": True}) == run_ranks(_weights, 2, 2, {})


@pytest.mark.parametrize(("compression", "tolerance"), [("fp16", 2e-3), ("bf16", 2e-2)])
def test_compression_rounds_and_keeps_replicas_equal(compression: str, tolerance: float) -> None:
    plain = run_ranks(_weights, 2, 4, {"reduction": "fast"})
    first, second = run_ranks(_weights, 2, 4, {"reduction": "fast", "compression": compression})
    assert first == second
    assert first != plain[0]
    torch.testing.assert_close(torch.tensor(first), torch.tensor(plain[0]), rtol=0, atol=tolerance)


def _static_graph_error(launch: Launch) -> str:
    with connect(launch, device="cpu") as ranks, pytest.raises(ConfigError) as caught:
        VirtualWorkers(_model(), ranks, virtual_workers=3, static_graph=True)
    return str(caught.value)


def test_a_static_graph_with_several_passes_is_refused() -> None:
    assert all("execution.static_graph: a rank has 2 passes" in text for text in run_ranks(_static_graph_error, 2))


def test_one_process_may_keep_static_graph_set() -> None:
    alone = Ranks(0, 1, torch.device("cpu"), "gloo")
    VirtualWorkers(_model(), alone, virtual_workers=3, static_graph=True)


def test_compression_needs_the_fast_reduction() -> None:
    with pytest.raises(ValueError, match="compression bf16 needs reduction: fast"):
        ExecutionSettings(compression="bf16")
    assert ExecutionSettings(compression="bf16", reduction="fast").compression == "bf16"
