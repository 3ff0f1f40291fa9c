"""One rank of one run, in a process of its own: the same `train` that the command line calls."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from largebatch.distributed.environment import Launch
from largebatch.errors import HealthError, Preempted, RanksLost, UserError


def work(config_file: Path, run_dir: Path, name: str, launch: Launch, log: Path, gpu: int | None) -> None:
    """Train the config in `config_file` in `run_dir` as the rank that `launch` says; what is printed goes to `log`.

    Ends the process with the exit status that the command line would have.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the runner alone decides
    _print_into(log)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(gpu)
    from largebatch.config import read_config
    from largebatch.run import train

    try:
        train(read_config(config_file), run_dir, name=name, resume="auto", launch=launch)
    except (UserError, HealthError, Preempted, RanksLost) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(error.exit_status)
    except Exception:
        sys.stderr.write(traceback.format_exc())
        sys.exit(1)


def _print_into(log: Path) -> None:
    """Send what this process and its libraries print to the end of `log`."""
    sys.stdout.flush()
    sys.stderr.flush()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.close(descriptor)


def _stop_with_parent() -> None:
    """When the runner is gone for whatever reason, stop as on a signal: with a checkpoint."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is started by the runner"
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
