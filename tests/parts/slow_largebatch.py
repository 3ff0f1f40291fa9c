"""`largebatch` with a pause before each step, so that a test can hit a step that it means, and little patience with
ranks that are gone."""

from __future__ import annotations

import sys
import time
from typing import Any

from largebatch.cli import main
from largebatch.distributed import roll_call
from largebatch.training.trainer import Trainer

_train_step = Trainer._train_step


def _pause(self: Trainer, *inputs: Any) -> Any:
    time.sleep(0.15)
    return _train_step(self, *inputs)


Trainer._train_step = _pause  # type: ignore[method-assign]
roll_call._PATIENCE_SECONDS = 1.5
sys.exit(main())
