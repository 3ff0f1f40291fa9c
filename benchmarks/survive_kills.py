"""50 runs, each killed by SIGKILL at a random moment, resumed on another number of ranks, and compared bit by bit with
an undisturbed run.

python benchmarks/survive_kills.py [KILLS] [OUT.json]      (50, results/survive/kills.json; about 5 minutes)

Victims in turn: one rank, all ranks, the process that writes a checkpoint (in its middle), and, each tenth time,
torchrun's agent, after which the same command is given again.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # the same parts as the tests': ranks that can be killed one by one

from run_folders import records, tensor_hashes  # noqa: E402
from survive import Fleet, newest_step, run_to_the_end, training  # noqa: E402

from largebatch.recipe.draws import uniform  # noqa: E402
from largebatch.report.environment import describe_environment  # noqa: E402
from largebatch.report.files import write_json_atomically  # noqa: E402
from largebatch.training.checkpoint import CheckpointFolder  # noqa: E402

CADENCE = 2
STEPS = 16
OFTEN = [f"checkpoint.every_steps={CADENCE}", "logging.every_steps=1"]
SEED = 2017
PATIENCE = 60.0


def die_in_write(rank: int, step: int, share: float) -> None:
    """Rank 0 dies with `share` of the first checkpoint from `step` on written."""
    save = CheckpointFolder.save

    def write_a_part(self: CheckpointFolder, saved: int, data: bytes) -> Path:
        if saved >= step:
            (self._folder / f"step_{saved:08d}.tmp").write_bytes(data[: int(share * len(data))])
            os.kill(os.getpid(), signal.SIGKILL)
        return save(self, saved, data)

    if rank == 0:
        CheckpointFolder.save = write_a_part  # type: ignore[method-assign]


def kill_ranks(run_dir: Path, world_size: int, victims: list[int], step: float, delay: float) -> None:
    """SIGKILL to `victims`, `delay` seconds after a checkpoint of `step` or later is whole."""
    with Fleet(world_size, *training(run_dir, *OFTEN)) as fleet:
        fleet.until(lambda: newest_step(run_dir) >= step)
        time.sleep(delay)
        fleet.send(signal.SIGKILL, *victims)
        fleet.outcomes(PATIENCE)


def kill_writer(run_dir: Path, world_size: int, step: float, share: float) -> None:
    """SIGKILL in the middle of writing."""
    command = training(run_dir, *OFTEN)
    with Fleet(world_size, *command, prepare=die_in_write, prepare_args=(step, share)) as fleet:
        fleet.outcomes(PATIENCE)


def kill_agent(run_dir: Path, world_size: int, step: float, delay: float) -> None:
    """SIGKILL to torchrun alone; its ranks find out by themselves."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    agent = subprocess.Popen(
        [*launcher, str(ROOT / "tests/parts/slow_largebatch.py"), *training(run_dir, *OFTEN)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
    )
    deadline = time.monotonic() + PATIENCE
    while newest_step(run_dir) < step and time.monotonic() < deadline and agent.poll() is None:
        time.sleep(0.005)
    time.sleep(delay)
    agent.kill()
    agent.wait()


def disturb(number: int, run_dir: Path, undisturbed: Path) -> dict[str, Any]:
    """Kill a run, resume it, and report what was lost."""
    moment, delay, choice, resume = uniform(np.arange(4), SEED, number).tolist()
    world_size, step = 2 + number % 2, 1 + int(moment * (STEPS - 4))
    kind = "agent" if number % 10 == 9 else ("one rank", "all ranks", "while writing")[number % 3]
    if kind == "agent":
        kill_agent(run_dir, 2, step, 0.1 * delay)
    elif kind == "while writing":
        kill_writer(run_dir, world_size, step, delay)
    else:
        victims = list(range(world_size)) if kind == "all ranks" else [int(choice * world_size)]
        kill_ranks(run_dir, world_size, victims, step, 0.1 * delay)
    reached, saved = records(run_dir)[-1]["step"] if (run_dir / "metrics.jsonl").exists() else 0, newest_step(run_dir)
    then = 1 + int(resume * 3)
    out = run_to_the_end(then, run_dir, *OFTEN)[0].out
    return {
        "kill": number,
        "victim": kind,
        "ranks": 2 if kind == "agent" else world_size,
        "ranks_after": then,
        "step_recorded_before": reached,
        "checkpoint_on_disk": saved,
        "steps_lost": max(0, reached - saved),
        "passed_over_as_damaged": out.count("is damaged and passed over"),
        "bit_identical": tensor_hashes(run_dir) == tensor_hashes(undisturbed),
        "records_identical": records(run_dir) == records(undisturbed),
    }


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 50
    out = Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "results/survive/kills.json"
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_to_the_end(1, folder / "undisturbed", *OFTEN)
        found = []
        for number in range(kills):
            found.append(disturb(number, folder / f"run{number}", folder / "undisturbed"))
            print(found[-1], flush=True)
    result = {
        "kills": len(found),
        "bit_identical": sum(f["bit_identical"] and f["records_identical"] for f in found),
        "cadence_steps": CADENCE,
        "steps": STEPS,
        "most_steps_lost": max(f["steps_lost"] for f in found),
        "median_steps_lost": statistics.median(f["steps_lost"] for f in found),
        "seconds": round(time.monotonic() - started),
        "runs": found,
        "environment": describe_environment(),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(out, result)
    print(f"{result['bit_identical']} of {len(found)} bit-identical, at most {result['most_steps_lost']} steps lost")
    sys.exit(result["bit_identical"] != len(found))


if __name__ == "__main__":
    main()
