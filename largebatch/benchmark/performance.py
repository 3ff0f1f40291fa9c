"""A model of the time of a step on N ranks. Pure arithmetic: seconds, bytes, bytes a second."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

ALGORITHMS = ("ring", "halving_doubling", "two_level")
"""What an all-reduce may do: a ring over all ranks; recursive halving and doubling (§4 of the paper), its short
distances inside a node; a ring inside each node and halving/doubling between nodes."""

COMMUNICATION = (
    "latency_inside", "seconds_per_byte_inside", "latency_between", "network_overhead", "host_per_byte",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """N ranks on nodes of `ranks_per_node`."""

    ranks: int
    ranks_per_node: int

    @property
    def on_node(self) -> int:
        """Ranks of a node that take part."""
        return min(self.ranks, self.ranks_per_node)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class Parameters:
    """All that the model knows of a machine and a training; zero for what does not occur."""

    compute: float
    """Mean seconds of forward and backward of one rank's step."""
    jitter: float = 0.0
    """Standard deviation of that, over ranks and steps: the step waits for the slowest of N."""
    other: float = 0.0
    """Seconds of optimizer and the rest."""
    data_wait: float = 0.0
    """Seconds that real data add."""
    latency_inside: float = 0.0
    """Seconds of a message inside a node, without its bytes."""
    seconds_per_byte_inside: float = 0.0
    latency_between: float = 0.0
    """Seconds of a message between nodes, without its bytes."""
    network_overhead: float = 0.0
    """Seconds a byte takes between nodes, times the nominal rate: 1 for a network at its nominal rate."""
    host_per_byte: float = 0.0
    """Seconds that a byte between nodes takes besides, whatever the rate (copies, sums)."""
    contention: float = 0.0
    """Seconds that the step loses for each second of communication hidden behind its compute."""

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@dataclass(frozen=True)
class Message:
    """A part of the gradients: its bytes, and when in the compute (0 to 1) it is ready."""

    size: float
    ready: float


@dataclass(frozen=True)
class Prediction:
    """The step at one N, in seconds."""

    step: float
    compute: float
    exposed_communication: float
    communication: float
    """Of all messages, hidden or not."""
    limit: str
    """The largest cost besides one rank's own compute."""


def messages(algorithm: str, size: float, layout: Layout, rate: float) -> dict[str, float]:
    """Coefficients of one all-reduce of `size` bytes: its time is their sum times the `COMMUNICATION` parameters.

    `rate` is the nominal rate between nodes; a node's ranks share its link.
    """
    m, s, n = layout.on_node, layout.nodes, layout.ranks
    inside = (_messages("ring", m), _volume(m))
    between = (_messages("halving_doubling", s), _volume(s))
    if algorithm == "halving_doubling":
        inside = (_messages("halving_doubling", m), _volume(m))
    elif algorithm == "ring":
        # Across nodes every turn waits for the message between two of them; the ring leaves each node once.
        inside, between = (inside, (0.0, 0.0)) if s == 1 else ((0.0, 0.0), (2.0 * (n - 1), _volume(n)))
    return {
        "latency_inside": inside[0],
        "seconds_per_byte_inside": inside[1] * size,
        "latency_between": between[0],
        "network_overhead": between[1] * size / rate,
        "host_per_byte": between[1] * size,
    }


def _messages(algorithm: str, ranks: int) -> float:
    """Messages that follow one another in an all-reduce."""
    return 2.0 * (ranks - 1 if algorithm == "ring" else math.ceil(math.log2(ranks)))


def _volume(ranks: int) -> float:
    """Bytes that each of `ranks` sends, over those of the buffer (§4)."""
    return 2.0 * (ranks - 1) / ranks


def allreduce_seconds(parameters: Parameters, coefficients: Mapping[str, float]) -> float:
    """Seconds of what `messages` describes."""
    return sum(getattr(parameters, name) * value for name, value in coefficients.items())


@functools.cache
def expected_maximum(count: int) -> float:
    """The mean of the largest of `count` standard normal numbers."""
    # E[max] is the integral over x of [x > 0] - cdf(x)^count; beyond 9 both ends are below 1e-18.
    width = 1e-3
    cdf = (0.5 * math.erfc(-(x + 0.5) * width / math.sqrt(2.0)) for x in range(-9000, 9000))
    return width * (9000 - math.fsum(value**count for value in cdf))


def replay(sent: Sequence[Message], compute: float, seconds: Callable[[float], float]) -> tuple[float, float]:
    """(when the last message has arrived, seconds of all of them), sent one after another as each gets ready.

    `seconds` gives those of a message of that many bytes; the time counts from the start of the compute.
    """
    free = total = 0.0
    for message in sent:
        needed = seconds(message.size)
        free = max(free, message.ready * compute) + needed
        total += needed
    return free, total


def predict(
    parameters: Parameters, sent: Sequence[Message], layout: Layout, *, algorithm: str, rate: float
) -> Prediction:
    """The step on `layout`; `rate` is the nominal rate between nodes, which one node does not use."""
    p = parameters
    waiting = p.jitter * expected_maximum(layout.ranks)
    compute = p.compute + waiting

    def seconds(size: float) -> float:
        return allreduce_seconds(p, messages(algorithm, size, layout, rate)) if layout.ranks > 1 else 0.0

    arrived, communication = replay(sent, compute, seconds)
    uncovered = max(0.0, arrived - compute)
    slowed = p.contention * (communication - min(uncovered, communication))
    terms = {"waiting for the slowest rank": waiting, "data": p.data_wait, "communication beside compute": slowed}
    if communication:
        whole = messages(algorithm, sum(message.size for message in sent), layout, rate)
        latencies = {name: whole[name] * (len(sent) if name in _BY_MESSAGE else 1) for name in whole}
        for name, value in latencies.items():
            terms[_TERMS[name]] = uncovered * getattr(p, name) * value / communication
    limit = max(terms, key=lambda name: terms[name])
    return Prediction(
        step=compute + uncovered + slowed + p.other + p.data_wait,
        compute=compute,
        exposed_communication=uncovered + slowed,
        communication=communication,
        limit=limit if terms[limit] > 0.01 * p.compute else "compute",
    )


_BY_MESSAGE = ("latency_inside", "latency_between")
_TERMS = {
    "latency_inside": "latency inside a node",
    "seconds_per_byte_inside": "bandwidth inside a node",
    "latency_between": "latency between nodes",
    "network_overhead": "bandwidth between nodes",
    "host_per_byte": "hosts' own work on bytes between nodes",
}
