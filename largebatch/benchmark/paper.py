"""The paper's own cluster through the performance model: the worked example of docs/performance_model.md."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from largebatch.benchmark.forecast import ASSUMED_LATENCY, ASSUMED_OVERHEAD
from largebatch.benchmark.performance import (
    Layout,
    Message,
    Parameters,
    Prediction,
    allreduce_seconds,
    expected_maximum,
    messages,
    predict,
)

GRADIENTS = 100e6  # bytes, §4
BACKWARD = 0.120  # seconds, §4
RANKS_PER_SERVER, SERVERS = 8, 44  # 352 GPUs at a minibatch of 11,264, §5.5
ETHERNET = 50e9 / 8  # bytes a second, §4
REPORTED_INCREASE, REPORTED_EFFICIENCY = 0.12, 0.90  # §5.5
HOURS_ON_ONE_SERVER, EPOCHS, IMAGES, SERVER_BATCH = 29, 90, 1_281_167, 256  # §1, §5.1
STEP = HOURS_ON_ONE_SERVER * 3600 / (EPOCHS * IMAGES / SERVER_BATCH)
INSIDE_RATE = 20e9  # bytes a second: an assumption
INSIDE_LATENCY = 10e-6  # seconds: an assumption


@dataclass(frozen=True)
class WorkedExample:
    """The paper's 44 servers by the model, relative to one server; seconds."""

    step_on_one_server: float
    communication: float
    """All-reduce of all gradients over 44 servers, if nothing hid it."""
    hidden: Prediction
    """Everything that can be hidden behind the backward pass is."""
    increase_hidden: float
    """Time of a step over that on one server, less 1."""
    increase_unhidden: float
    """The same if each second of communication cost the step a second."""
    contention_for_reported: float
    """Share of the hidden communication that the step would have to lose for the reported increase."""
    jitter_for_reported: float
    """Standard deviation of a GPU's compute, in seconds, that alone would give the reported increase."""


def worked_example() -> WorkedExample:
    """The model at the paper's figures; see `assumptions` for what the paper does not say."""
    sent = layer_messages()
    quiet = Parameters(
        compute=STEP,
        latency_inside=INSIDE_LATENCY,
        seconds_per_byte_inside=1 / INSIDE_RATE,
        latency_between=ASSUMED_LATENCY,
        network_overhead=ASSUMED_OVERHEAD,
    )
    one, all_ = (Layout(servers * RANKS_PER_SERVER, RANKS_PER_SERVER) for servers in (1, SERVERS))

    def at(layout: Layout, parameters: Parameters) -> Prediction:
        return predict(parameters, sent, layout, algorithm="two_level", rate=ETHERNET)

    hidden, alone = at(all_, quiet), at(one, quiet)
    contended = replace(quiet, contention=1.0)
    unhidden, unhidden_alone = at(all_, contended), at(one, contended)
    # Both steps are linear in contention and in jitter: what makes their ratio the reported one?
    ratio = 1 + REPORTED_INCREASE
    missing = ratio * alone.step - hidden.step
    by_contention = (unhidden.step - hidden.step) - ratio * (unhidden_alone.step - alone.step)
    by_jitter = expected_maximum(all_.ranks) - ratio * expected_maximum(one.ranks)
    return WorkedExample(
        step_on_one_server=alone.step,
        communication=hidden.communication,
        hidden=hidden,
        increase_hidden=hidden.step / alone.step - 1,
        increase_unhidden=unhidden.step / unhidden_alone.step - 1,
        contention_for_reported=missing / by_contention,
        jitter_for_reported=missing / by_jitter,
    )


def layer_messages() -> list[Message]:
    """ResNet-50's gradients, one message for each convolution with its BatchNorm and one for the classifier.

    The backward pass takes the last 120 ms of a step; a layer takes its share of the multiplications, and its
    gradients are ready when it has been passed. Sizes are scaled to the paper's 100 MB.
    """
    layers = _layers()
    total_size, total_work = (sum(layer[i] for layer in layers) for i in (0, 1))
    done, sent = 0.0, []
    for size, work in reversed(layers):
        done += work / total_work
        sent.append(Message(GRADIENTS * size / total_size, 1 - BACKWARD * (1 - done) / STEP))
    return sent


def _layers() -> list[tuple[int, int]]:
    """(parameters, multiplications for an image) of ResNet-50's layers, first to last."""
    from torchvision.models import resnet50

    layers: list[list[int]] = []

    def note(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        parameters = sum(p.numel() for p in module.parameters(recurse=False))
        if isinstance(module, nn.BatchNorm2d):
            layers[-1][0] += parameters
            return
        assert isinstance(module.weight, Tensor)
        layers.append([parameters, module.weight.numel() * output[0, 0].numel() if output.dim() > 2 else parameters])

    # Shapes alone: on the meta device nothing is computed.
    with torch.device("meta"):
        model = resnet50()
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.BatchNorm2d | nn.Linear):
                module.register_forward_hook(note)
        model(torch.empty(1, 3, 224, 224))
    return [(parameters, work) for parameters, work in layers]


def assumptions() -> Sequence[str]:
    """Every figure of the example with where it is from."""
    return (
        f"Gradients: {GRADIENTS / 1e6:.0f} MB; backward pass: {1000 * BACKWARD:.0f} ms; {RANKS_PER_SERVER} GPUs per "
        f"server, {SERVERS} servers, {8e-9 * ETHERNET:.0f} Gbit/s Ethernet (§4, §5.5).",
        f"A step on one server: {1000 * STEP:.1f} ms, from {HOURS_ON_ONE_SERVER} hours for {EPOCHS} epochs at a "
        f'minibatch of {SERVER_BATCH} (§1). This agrees with the other figures: an epoch takes "over 16 minutes" '
        f"(over {1000 * 16 * 60 / (IMAGES / SERVER_BATCH):.1f} ms a step) on one server, one hour for 256 GPUs at 90 % "
        "efficiency, 30 seconds an epoch on 352 GPUs (§5.5).",
        "Everything except the backward pass comes before it, so nothing after it hides communication.",
        "Each layer takes a share of the backward pass in proportion to its multiplications; its gradients are sent as "
        "soon as it is done (the paper aggregates layer by layer), one message after another.",
        f"Network overhead: {ASSUMED_OVERHEAD:.2f}, since §4 needs about 15 Gbit/s to move 12.8.",
        f"Latency between servers: {1e6 * ASSUMED_LATENCY:.0f} µs per message. Not in the paper.",
        f"Inside a server: {INSIDE_RATE / 1e9:.0f} GB/s, {1e6 * INSIDE_LATENCY:.0f} µs per message. Not in the paper.",
        "Inside a server a ring, between servers recursive halving and doubling (§4).",
        "No jitter, and hidden communication does not slow down the compute. Not in the paper; the result shows that "
        "one of the two must be wrong.",
    )


def as_markdown() -> str:
    """The example as the documentation holds it."""
    example = worked_example()
    between = messages("two_level", GRADIENTS, Layout(SERVERS * RANKS_PER_SERVER, RANKS_PER_SERVER), ETHERNET)
    wire = allreduce_seconds(Parameters(compute=0.0, network_overhead=ASSUMED_OVERHEAD), between)
    lines = [
        "Assumptions, with their source:",
        "",
        *(f"{number}. {text}" for number, text in enumerate(assumptions(), 1)),
        "",
        "| | model | paper |",
        "| --- | --- | --- |",
        f"| step on one server | {1000 * example.step_on_one_server:.1f} ms | {1000 * STEP:.1f} ms (29 h) |",
        f"| all-reduce over {SERVERS} servers, alone | {1000 * example.communication:.1f} ms, of which the Ethernet's "
        f"bytes {1000 * wire:.1f} ms | – |",
        f"| exposed communication | {1000 * example.hidden.exposed_communication:.2f} ms | – |",
        f"| longer step on {SERVERS} servers, all hidden | {100 * example.increase_hidden:+.1f} % | "
        f"{100 * REPORTED_INCREASE:+.0f} % |",
        f"| longer step, nothing hidden | {100 * example.increase_unhidden:+.1f} % | "
        f"{100 * REPORTED_INCREASE:+.0f} % |",
        f"| efficiency relative to one server | {100 / (1 + example.increase_hidden):.1f} % (hidden), "
        f"{100 / (1 + example.increase_unhidden):.1f} % (not) | ~{100 * REPORTED_EFFICIENCY:.0f} % |",
        "",
        f"The reported {100 * REPORTED_INCREASE:+.0f} % lies between the two. It results if a step loses "
        f"{100 * example.contention_for_reported:.0f} % of the time of the communication it hides (copies from GPUs to "
        "hosts, NCCL's kernels and sums on CPUs take resources from the compute), or if the compute time of a GPU "
        f"varies by {1000 * example.jitter_for_reported:.1f} ms ({100 * example.jitter_for_reported / STEP:.1f} % of "
        "a step, standard deviation), since each step waits for the slowest of 352. The Ethernet is not the limit: "
        f"the bytes need {1000 * wire:.0f} ms, and {1000 * BACKWARD:.0f} ms are available.",
    ]
    return "\n".join(lines)
