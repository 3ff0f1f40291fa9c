"""`largebatch` with a pause before each step, so that a test can hit a step that it means; without one as soon as the
file exists that the variable QUICK_FROM names, if it is set."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from largebatch.cli import main
from largebatch.training.trainer import Trainer

_train_step = Trainer._train_step


def _pause(self: Trainer, *inputs: Any) -> Any:
    if not os.path.exists(os.environ.get("QUICK_FROM", "")):
        time.sleep(0.15)
    return _train_step(self, *inputs)


Trainer._train_step = _pause  # type: ignore[method-assign]
sys.exit(main())
