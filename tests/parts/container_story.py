"""The image that docker/Dockerfile makes, used as docs/launching.md says, by an unprivileged user.

    docker build -f docker/Dockerfile -t largebatch .
    python tests/parts/container_story.py docker largebatch results/survive/container.json

Takes two minutes on two cores. Needs root, for folders that belong to others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from hosts import ROOT, wait_until
from run_folders import summary, tensor_hashes

INSTANT = "instant/resnet8_fp32"
HOME = "/home/largebatch"
# Long enough to be stopped on the way, and saved by the stop alone.
LONG = ["digits", "schedule.epochs=20", "checkpoint.every_epochs=null"]


class Image:
    """An image, its engine, and the host's folders that are mounted in it."""

    def __init__(self, engine: str, name: str, folder: Path, *, owner: int = 1000) -> None:
        self.engine, self.name, self.folder = engine, name, folder
        self.runs = folder / "runs"
        for mounted in (self.runs, folder / "data"):
            mounted.mkdir(parents=True)
            os.chown(mounted, owner, owner)

    def start(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        """Start a container; it says on standard output and error what it has to say."""
        mounts = [f"--volume={self.folder / name}:{HOME}/{name}" for name in ("runs", "data")]
        return subprocess.Popen(
            [self.engine, "run", "--rm", "--shm-size=64m", *mounts, *options, self.name, *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str, options: tuple[str, ...] = (), status: int = 0) -> str:
        """What a container says that ends with `status`."""
        container = self.start(*command, options=options)
        said, _ = container.communicate(timeout=300)
        assert container.returncode == status, f"{command}: status {container.returncode}\n{said}"
        return said.strip()

    def python(self, code: str) -> str:
        return self.run("-c", code, options=("--entrypoint=python",))


def on_host(*command: str | Path) -> str:
    """A largebatch command outside of the container."""
    done = subprocess.run(
        [sys.executable, "-m", "largebatch", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    return done.stdout.strip()


def who_runs(image: Image) -> dict[str, object]:
    """The user and what he may do, and what is installed."""
    told = image.python(
        "import json, os, platform, torch, torchvision;"
        "print(json.dumps({'user': os.getuid(), 'folder': os.getcwd(), 'may_write_to_opt': os.access('/opt', os.W_OK),"
        "'python': platform.python_version(), 'torch': torch.__version__, 'torchvision': torchvision.__version__}))"
    )
    return json.loads(told)


def instant_configs(image: Image, host: Path) -> dict[str, object]:
    """Each finishes; the first one, on one rank and on two, with the bits that the host has."""
    on_host("train", INSTANT, "--run-dir", host / "instant")
    finished = []
    for config in sorted((ROOT / "configs/instant").glob("*.yaml")):
        image.run("train", f"instant/{config.stem}")
        finished.append(config.stem)
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "largebatch")
    image.run(*two, "train", INSTANT, "--run-dir", "runs/two", options=("--entrypoint=python",))
    assert summary(image.runs / "two")["world_size"] == 2
    folders = [host / "instant", image.runs / "resnet8_fp32", image.runs / "two"]
    owners = {path.stat().st_uid for path in image.runs.rglob("*")}
    return {
        "finished": finished,
        "same_bits_on_the_host_and_on_one_and_two_ranks_in_it": len({str(tensor_hashes(f)) for f in folders}) == 1,
        "users_that_own_the_runs": sorted(owners),
    }


def other_commands(image: Image) -> dict[str, object]:
    """`evaluate` on a mounted run and `plan`, against what the training and the host say."""
    found = json.loads(image.run("evaluate", "runs/resnet8_fp32"))
    planned = image.run("plan", "imagenet_resnet50_8k", "--ranks=8", "--json")
    return {
        "evaluate_repeats_the_error_of_the_training": found["val/top1_error"]
        == summary(image.runs / "resnet8_fp32")["top1_error"],
        "plan_is_that_of_the_host": json.loads(planned)
        == json.loads(on_host("plan", "imagenet_resnet50_8k", "--ranks=8", "--json")),
    }


def stop_and_go_on(image: Image, host: Path) -> dict[str, object]:
    """`docker stop` in the middle of a training, and the same command again."""
    on_host("train", *LONG, "--run-dir", host / "long")
    container = image.start("train", *LONG, options=("--name=largebatch-story",))
    metrics = image.runs / "digits/metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") > 2, "training in the container", 120)
    begun = time.monotonic()
    subprocess.run([image.engine, "stop", "--time=120", "largebatch-story"], check=True, stdout=subprocess.DEVNULL)
    said, _ = container.communicate(timeout=30)
    seconds = time.monotonic() - begun
    again = image.run("train", *LONG)
    return {
        "status": container.returncode,
        "said": said.strip().splitlines()[-1],
        "seconds": round(seconds, 1),
        "then": next(line for line in again.splitlines() if line.startswith("resuming")),
        "weights_bit_identical_to_an_undisturbed_run_on_the_host": tensor_hashes(image.runs / "digits")
        == tensor_hashes(host / "long"),
    }


def folders_of_others(image: Image) -> dict[str, object]:
    """Mounted folders that belong to root: an error that says so; to another user: for him it works."""
    roots = Image(image.engine, image.name, image.folder / "roots", owner=0)
    others = Image(image.engine, image.name, image.folder / "others", owner=1234)
    said = roots.run("train", INSTANT, status=2)
    others.run("train", INSTANT, options=("--user=1234",))
    owners = {path.stat().st_uid for path in others.runs.rglob("*")}
    return {"of_root": {"status": 2, "said": said}, "of_user_1234_with_--user=1234": {"owners": sorted(owners)}}


def main(engine: str, name: str, output: Path) -> int:
    with tempfile.TemporaryDirectory() as temporary:
        host = Path(temporary)
        image = Image(engine, name, host / "mounted")
        result = {
            "command": "python tests/parts/container_story.py ENGINE IMAGE results/survive/container.json",
            "engine": subprocess.run([engine, "--version"], capture_output=True, text=True, check=True).stdout.strip(),
            "inside": who_runs(image),
            "instant_configs": instant_configs(image, host),
            "other_commands": other_commands(image),
            "stopped_by_the_engine": stop_and_go_on(image, host),
            "mounted_folders": folders_of_others(image),
            "not_tried": "--gpus, and the CPU wheels of another index",
        }
    output.write_text(json.dumps(result, indent=2) + "\n")
    print(output.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
