"""The fixed binary tree in which the gradients of the k virtual workers are added.

Floating-point addition is not associative, so a sum that is to be the same on any number of ranks needs one
order of addition. It is this tree: its leaves are the passes of a step (one virtual worker each, unless
`workers_per_pass` says otherwise), a node covers the leaves ``[start, stop)``, and splits at the largest
power of two below its size. N only decides who holds which leaves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

Node = tuple[int, int]
"""A subtree, as the half-open range of leaves that it covers."""
T = TypeVar("T")


def children(node: Node) -> tuple[Node, Node]:
    """The two subtrees of a node of at least two leaves."""
    start, stop = node
    middle = start + (1 << ((stop - start - 1).bit_length() - 1))
    return (start, middle), (middle, stop)


def is_node(node: Node, leaves: int) -> bool:
    """Whether the tree over `leaves` leaves has exactly this subtree."""
    start, stop = node
    span = 1 << (stop - start - 1).bit_length()  # the next power of two
    return start % span == 0 and (stop - start == span or stop == leaves)


def subtrees(block: range, leaves: int) -> list[Node]:
    """The few maximal subtrees that make up a contiguous block of leaves, left to right."""

    def inside(node: Node) -> list[Node]:
        if block.start <= node[0] and node[1] <= block.stop:
            return [node]
        if node[1] <= block.start or block.stop <= node[0]:
            return []
        left, right = children(node)
        return inside(left) + inside(right)

    return inside((0, leaves))


def combine(node: Node, parts: Mapping[Node, T], add: Callable[[T, T], T]) -> T:
    """The value of `node`, from the values of subtrees that together cover it, added in the tree's order."""
    if node in parts:
        return parts[node]
    left, right = children(node)
    return add(combine(left, parts, add), combine(right, parts, add))


def push(stack: list[tuple[Node, T]], node: Node, value: T, leaves: int, add: Callable[[T, T], T]) -> None:
    """Add the next subtree of a contiguous block to the block's partial sums (a binary counter).

    `stack` holds the maximal subtrees so far, left to right; neighbours that make a node are added at once,
    so it never holds more than about log2(leaves) values.
    """
    while stack and is_node((stack[-1][0][0], node[1]), leaves):
        left, left_value = stack.pop()
        node, value = (left[0], node[1]), add(left_value, value)
    stack.append((node, value))
