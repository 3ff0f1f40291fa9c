"""Ranks that meet: the ones that do not come are named."""

from __future__ import annotations

import datetime
import threading

import pytest
import torch.distributed as dist

from largebatch.distributed.meeting import name_attempt
from largebatch.errors import UserError


def test_under_torchrun_the_rank_that_never_comes_is_named() -> None:
    store = dist.HashStore()

    def come(rank: int) -> None:
        with pytest.raises(UserError):
            name_attempt(store, rank=rank, world_size=4, timeout=datetime.timedelta(seconds=3))

    others = [threading.Thread(target=come, args=(rank,)) for rank in (1, 3)]
    for thread in others:
        thread.start()
    with pytest.raises(UserError, match=r"rank 2 of 4 did not join within 0\.0333333 minutes"):
        name_attempt(store, rank=0, world_size=4, timeout=datetime.timedelta(seconds=2))
    for thread in others:
        thread.join(timeout=30)
        assert not thread.is_alive()
