"""Ranks of different speed: who gets how many passes, when that changes, and that the weights do not."""

from __future__ import annotations

import itertools
import json
import random
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import pytest
from ranks import run_ranks
from run_folders import DIGITS, SMALL, call

from largebatch.config import read_config
from largebatch.data.load import load
from largebatch.data.memory import MemorySource
from largebatch.data.source import Batches, Pass
from largebatch.distributed.environment import Launch, connect
from largebatch.plan import make_plan
from largebatch.recipe.batch import Deal, deal_by_speed, deal_equally
from largebatch.report.metrics import open_writers
from largebatch.report.progress import Progress
from largebatch.run import make_trainer
from largebatch.training.checkpoint import CheckpointFolder
from largebatch.training.dealing import Dealer
from largebatch.training.delays import Delays
from largebatch.training.replicas import digest_of
from largebatch.training.settings import DelaySettings
from largebatch.training.stragglers import Pace


def test_no_deal_is_quicker_than_the_one_by_speed() -> None:
    drawn = random.Random(0)
    for ranks, passes in itertools.product(range(1, 5), range(4, 10)):
        of_a_pass = [drawn.uniform(0.5, 2) for _ in range(ranks)]
        counts = [c for c in itertools.product(range(1, passes + 1), repeat=ranks) if sum(c) == passes]
        best = min(max(n * s for n, s in zip(c, of_a_pass, strict=True)) for c in counts)
        dealt = deal_by_speed(deal_equally(passes, 1, ranks), of_a_pass)
        assert dealt.leaves == passes
        assert dealt.seconds(of_a_pass) == pytest.approx(best)


def pace(*of_a_pass: float, asked: int = 9, seconds: float = 1.0) -> Pace:
    return Pace(list(of_a_pass), list(of_a_pass), list(of_a_pass), asked, seconds)


def test_a_difference_that_lasts_changes_the_deal_after_what_is_prefetched() -> None:
    first = deal_equally(8, 1, 2)
    dealer = Dealer(first, measured=True)
    assert [dealer.consider(pace(1, 2)) for _ in range(2)] == [None, None]
    line = dealer.consider(pace(1.1, 2, asked=12))
    assert line is not None
    assert "from step 13 on, the ranks run 6, 2 virtual workers" in line
    assert "0.75 of the time" in line
    assert dealer.at(12) == first
    assert dealer.at(13) == dealer.newest == Deal((tuple(range(6)), (6, 7)))
    # The next change, back again, takes twice as many.
    assert sum(dealer.consider(pace(1, 1)) is None for _ in range(6)) == 5


@pytest.mark.parametrize(
    "paces",
    [
        pytest.param([pace(1, 2, seconds=0.01)] * 50, id="within_two_seconds"),
        pytest.param([pace(1, 2), pace(1, 2), pace(1.4, 1)] * 20, id="comes_and_goes"),
        pytest.param([pace(1, 1.2)] * 20, id="less_than_a_pass"),
        pytest.param([pace(0, 0)] * 20, id="not_measured"),
    ],
)
def test_noise_does_not(paces: list[Pace]) -> None:
    dealer = Dealer(deal_equally(8, 1, 2), measured=True)
    assert not any(map(dealer.consider, paces))
    assert not any(map(Dealer(deal_equally(8, 1, 2), measured=False).consider, [pace(1, 2)] * 20))


def test_plan_shows_the_deal_and_the_expected_step() -> None:
    made = json.loads(call("plan", DIGITS, "--json", "--speeds", "1,1,0.5").out)["dealt_by_speed"]
    assert (made["workers_on_rank"], made["step_passes"], made["step_passes_dealt_equally"]) == ([4, 3, 1], 4, 6)
    assert "1.50 x the images/s" in call("plan", DIGITS, "--speeds", "1,1,0.5").out


def test_delays_are_what_the_config_says() -> None:
    drawn = [Delays(DelaySettings(seconds=0.1, slow_ranks=[1], rare_share=0.05, jitter=0.1), rank) for rank in range(2)]
    usual, slow = ([d.seconds(step, leaf) for step in range(500) for leaf in range(2)] for d in drawn)
    rare = sum(seconds > 0.15 for seconds in usual) / len(usual)
    assert 0.02 < rare < 0.08
    assert sum(usual) / len(usual) == pytest.approx(0.1 * 1.05, rel=0.03)
    assert sum(slow) / sum(usual) == pytest.approx(1.5, rel=0.05)


class Restless(Dealer):
    """Any other deal at every measurement."""

    def consider(self, pace: Pace) -> str | None:
        drawn, ranks = random.Random(pace.asked), len(self.newest.passes)
        order = drawn.sample(range(8), 8)
        cuts = sorted(drawn.sample(range(1, 8), ranks - 1))
        self.change(pace.asked + 1, Deal(tuple(tuple(order[a:b]) for a, b in itertools.pairwise([0, *cuts, 8]))))
        return "changed"


class Ahead(MemorySource):
    """Asks for five passes more than it has given, as loader processes do."""

    def stream(self, passes: Iterable[Pass], *, augment: bool) -> Batches:
        waiting: deque[Pass] = deque()
        for one in itertools.chain(passes, [None] * 5):
            waiting.append(one)
            if len(waiting) > 5:
                yield self.batch(*waiting.popleft(), augment=augment)


def _train(launch: Launch, folder: Path) -> tuple[str, int]:
    """SHA-256 of the weights, and how many deals the run had."""
    config = read_config(DIGITS, [*SMALL, "logging.every_steps=1"])
    with connect(launch, device="cpu") as ranks:
        sources = load(config.data, seed=0, device=ranks.device)
        sources[0].__class__ = Ahead
        plan = make_plan(config, name="t", world_size=ranks.world_size, train_images=270, val_images=101)
        trainer = make_trainer(config, plan, ranks, sources, CheckpointFolder(folder, keep=1))
        trainer.dealer = Restless(trainer.virtual.deal, measured=True)
        trainer.run(open_writers(folder, is_main=False, first_step=0), Progress())
        deals = {trainer.dealer.at(step) for step in range(trainer.step)}
        return digest_of(trainer.virtual.model.state_dict()), len(deals)


def test_a_deal_that_changes_while_images_are_prefetched_changes_no_weight(tmp_path: Path) -> None:
    (digest, _), *others = [result for n in (1, 2, 3) for result in run_ranks(_train, n, tmp_path / str(n))]
    assert {other for other, _ in others} == {digest}
    assert all(deals > 5 for _, deals in others)
