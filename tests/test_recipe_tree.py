"""The fixed tree of additions, and who runs which virtual workers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import pytest

from largebatch.errors import ConfigError
from largebatch.recipe.batch import BatchSettings, block, deal_passes, deal_workers
from largebatch.recipe.tree import Node, children, combine, is_node, push, subtrees

MOST_LEAVES = 17


def join(left: str, right: str) -> str:
    """An addition that is neither associative nor commutative: it shows who was added to whom."""
    return f"({left}{right})"


def whole_tree(leaves: int) -> tuple[str, list[Node]]:
    """The expression and the nodes of the tree, made another way: pair neighbours, level by level."""
    nodes = [(i, i + 1) for i in range(leaves)]
    level = [(node, f"{node[0]:x}.") for node in nodes]
    while len(level) > 1:
        paired = [
            ((left[0][0], right[0][1]), join(left[1], right[1]))
            for left, right in zip(level[::2], level[1::2], strict=False)
        ]
        nodes += [node for node, _ in paired]
        level = paired + (level[-1:] if len(level) % 2 else [])
    return level[0][1], nodes


def partial_sums(leaves: range, total: int) -> list[tuple[Node, str]]:
    """What a rank holds when it has run its block."""
    stack: list[tuple[Node, str]] = []
    for leaf in leaves:
        push(stack, (leaf, leaf + 1), f"{leaf:x}.", total, join)
    return stack


def cuts(leaves: int) -> Iterator[list[range]]:
    """Every way to cut the leaves into contiguous blocks for small trees, the balanced ones for large trees."""
    if leaves > 10:
        yield from ([block(leaves, parts, i) for i in range(parts)] for parts in range(1, leaves + 1))
        return
    for places in itertools.product([False, True], repeat=leaves - 1):
        edges = [0, *(i for i, cut in enumerate(places, start=1) if cut), leaves]
        yield [range(*edge) for edge in itertools.pairwise(edges)]


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_any_cut_into_blocks_gives_the_same_expression(leaves: int) -> None:
    expected, _ = whole_tree(leaves)
    for blocks in cuts(leaves):
        parts = dict(itertools.chain.from_iterable(partial_sums(part, leaves) for part in blocks))
        assert combine((0, leaves), parts, join) == expected


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_nodes_are_those_of_pairing_neighbours_level_by_level(leaves: int) -> None:
    _, nodes = whole_tree(leaves)
    for start, stop in itertools.combinations(range(leaves + 1), 2):
        assert is_node((start, stop), leaves) == ((start, stop) in nodes)
    for node in nodes:
        if node[1] - node[0] > 1:
            left, right = children(node)
            assert left in nodes
            assert right in nodes
            assert (left[0], left[1], right[1]) == (node[0], right[0], node[1])


@pytest.mark.parametrize("leaves", range(1, MOST_LEAVES + 1))
def test_a_block_is_held_as_its_maximal_subtrees_few_of_them(leaves: int) -> None:
    for start, stop in itertools.combinations(range(leaves + 1), 2):
        held = subtrees(range(start, stop), leaves)
        assert [leaf for node in held for leaf in range(*node)] == list(range(start, stop))
        assert all(is_node(node, leaves) for node in held)
        assert not any(is_node((left[0], right[1]), leaves) for left, right in itertools.combinations(held, 2)), (
            "two of them make a node: not maximal"
        )
        assert held == [node for node, _ in partial_sums(range(start, stop), leaves)]
        assert len(held) <= max(1, 2 * math.ceil(math.log2(stop - start + 1)))


def test_the_stack_of_a_single_rank_stays_logarithmic() -> None:
    stack: list[tuple[Node, float]] = []
    deepest = 0
    for leaf in range(1000):
        push(stack, (leaf, leaf + 1), 1.0, 1000, lambda a, b: a + b)
        deepest = max(deepest, len(stack))
    assert stack == [((0, 1000), 1000.0)]
    assert deepest <= math.ceil(math.log2(1000))


@pytest.mark.parametrize("workers_per_pass", [1, 2, 3])
def test_every_worker_runs_once_in_order_and_ranks_differ_by_at_most_a_pass(workers_per_pass: int) -> None:
    for passes in range(1, 13):
        workers = passes * workers_per_pass
        for world_size in range(1, passes + 1):
            dealt = deal_passes(workers, workers_per_pass, world_size)
            assert [p for part in dealt for p in part] == list(range(passes))
            counts = deal_workers(workers, workers_per_pass, world_size)
            assert counts == [len(part) * workers_per_pass for part in dealt]
            assert sum(counts) == workers
            assert max(counts) - min(counts) <= workers_per_pass
            assert min(counts) > 0


def test_the_minibatch_is_k_workers_of_n_images() -> None:
    assert BatchSettings(virtual_workers=256, images_per_worker=32).global_batch == 8192


def test_too_many_ranks_is_an_error_that_says_how_many_fit() -> None:
    with pytest.raises(ConfigError, match=r"8 virtual workers make 8 passes.* 9 ranks.*at most 8 ranks"):
        deal_passes(8, 1, 9)
    with pytest.raises(ConfigError, match=r"workers_per_pass 4 make 2 passes.*at most 2 ranks"):
        deal_passes(8, 4, 3)


def test_passes_that_do_not_come_out_even_are_an_error() -> None:
    with pytest.raises(ConfigError, match=r"workers_per_pass: 3 does not divide batch.virtual_workers 8"):
        deal_passes(8, 3, 1)
