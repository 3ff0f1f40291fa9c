"""The doctor's findings for machines that are made up, and its command on this one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from run_folders import DIGITS, call

from largebatch.doctor import machine, network, software, throughput
from largebatch.doctor.finding import Finding, size
from largebatch.doctor.machine import GIB, Demand


def make_root(folder: Path, **files: str) -> Path:
    """A root with files such as proc__meminfo='...'."""
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def verdict(finding: Finding) -> str:
    """The level; anything but ok must come with a remedy."""
    assert finding.line().startswith(finding.level)
    assert bool(finding.remedy) == (finding.level != "ok")
    return finding.level


class TestMachine:
    def test_limits_of_cgroup_2_hold_for_all_below(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, proc__self__cgroup="0::/pod/box\n")
        for path, cpu, memory in (
            ("", "max 100000", "max"),
            ("pod", "150000 100000", "4096"),
            ("pod/box", "max", "max"),
        ):
            (root / "sys/fs/cgroup" / path).mkdir(parents=True, exist_ok=True)
            (root / "sys/fs/cgroup" / path / "cpu.max").write_text(cpu)
            (root / "sys/fs/cgroup" / path / "memory.max").write_text(memory)
        assert machine.core_limit(root) == 1.5
        assert machine.memory_limit(root) == 4096

    def test_limits_of_cgroup_1_within_a_container(self, tmp_path: Path) -> None:
        """There the path that /proc names does not exist, and the mount itself is the container's group."""
        root = make_root(
            tmp_path, proc__self__cgroup="4:memory:/docker/abc\n3:cpu,cpuacct:/docker/abc\n1:name=systemd:/\n0::/\n"
        )
        for path, text in (
            ("cpu,cpuacct/cpu.cfs_quota_us", "200000"),
            ("cpu,cpuacct/cpu.cfs_period_us", "100000"),
            ("memory/memory.limit_in_bytes", str(3 * GIB)),
        ):
            (root / "sys/fs/cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
            (root / "sys/fs/cgroup" / path).write_text(text)
        assert machine.core_limit(root) == 2.0
        assert machine.memory_limit(root) == 3 * GIB

    def test_no_limits(self, tmp_path: Path) -> None:
        assert machine.core_limit(tmp_path) is None
        root = make_root(tmp_path, proc__self__cgroup="4:memory:/a\n3:cpu:/\n")
        (root / "sys/fs/cgroup/memory/a").mkdir(parents=True)
        (root / "sys/fs/cgroup/memory/a/memory.limit_in_bytes").write_text("9223372036854771712")
        (root / "sys/fs/cgroup/cpu").mkdir()
        (root / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("-1")
        assert machine.memory_limit(root) is None
        assert machine.core_limit(root) is None

    def test_cores(self, tmp_path: Path) -> None:
        assert verdict(machine.check_cores(tmp_path, 8, Demand(ranks=2, threads=1, loader_processes=3))) == "ok"
        assert verdict(machine.check_cores(tmp_path, 7, Demand(ranks=2, threads=1, loader_processes=3))) == "warning"
        root = make_root(tmp_path, proc__self__cgroup="0::/\n")
        (root / "sys/fs/cgroup").mkdir(parents=True)
        (root / "sys/fs/cgroup/cpu.max").write_text("200000 100000")
        found = machine.check_cores(root, 8, Demand(ranks=2, loader_processes=1))
        assert verdict(found) == "warning"
        assert "allows 2 of 8" in found.seen
        assert "4 would run at once" in found.remedy

    def test_memory(self, tmp_path: Path) -> None:
        root = make_root(tmp_path, proc__meminfo=f"MemTotal: 99 kB\nMemAvailable:  {2 * GIB // 1024} kB\n")
        assert verdict(machine.check_memory(root, Demand(ranks=1, loader_processes=3))) == "ok"
        assert verdict(machine.check_memory(root, Demand(ranks=1, loader_processes=4))) == "warning"
        assert verdict(machine.check_memory(tmp_path / "none", Demand())) == "warning"

    @pytest.mark.parametrize(
        ("free", "needed", "level"),
        [(100, 0, "ok"), (100, 50, "ok"), (100, 51, "warning"), (100, 101, "error"), (None, 0, "ok")],
    )
    def test_shared_memory(self, free: int | None, needed: int, level: str) -> None:
        assert verdict(machine.check_shared_memory(free, Demand(shared_memory=needed))) == level

    def test_loader_processes_without_shared_memory(self) -> None:
        assert verdict(machine.check_shared_memory(None, Demand(loader_processes=1))) == "error"

    @pytest.mark.parametrize(
        ("governor", "throttled", "level"),
        [("performance", "0", "ok"), ("powersave", "0", "warning"), ("performance", "3", "warning")],
    )
    def test_clocks(self, tmp_path: Path, governor: str, throttled: str, level: str) -> None:
        for cpu in ("cpu0", "cpu1"):
            for path, text in (
                ("cpufreq/scaling_governor", governor),
                ("thermal_throttle/core_throttle_count", throttled),
            ):
                file = tmp_path / "sys/devices/system/cpu" / cpu / path
                file.parent.mkdir(parents=True)
                file.write_text(text + "\n")
        found = machine.check_clocks(tmp_path)
        assert verdict(found) == level
        assert f"throttled {2 * int(throttled)} times" in found.seen

    def test_clocks_that_are_not_told(self, tmp_path: Path) -> None:
        assert verdict(machine.check_clocks(tmp_path)) == "ok"

    def test_disk(self, tmp_path: Path) -> None:
        assert "MB/s" in machine.check_disk(tmp_path / "not/there/yet", Demand()).seen
        full = machine.check_disk(tmp_path, Demand(checkpoints=2**60))
        assert verdict(full) == "error"
        assert "the kept checkpoints need 1.049e+06 TiB" in full.remedy
        assert list(tmp_path.iterdir()) == []

    def test_a_full_disk_without_a_config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        full = shutil.disk_usage(tmp_path)._replace(free=0)
        monkeypatch.setattr(machine.shutil, "disk_usage", lambda _: full)
        assert machine.check_disk(tmp_path, Demand()).remedy == "free some, or choose another --run-dir"

    @pytest.mark.parametrize(
        ("name", "why"),
        [("a" * 300, "File name too long"), ("a" * 300 + "/b", "File name too long"), ("file", "Not a")],
    )
    def test_a_run_folder_that_could_never_be(self, tmp_path: Path, name: str, why: str) -> None:
        (tmp_path / "file").touch()
        found = machine.check_disk(tmp_path / name, Demand())
        assert verdict(found) == "error"
        assert why in found.seen

    def test_a_run_folder_below_one_that_may_not_be_searched(self, tmp_path: Path) -> None:
        (tmp_path / "closed").mkdir(mode=0)
        user = os.geteuid()
        if user == 0:
            os.seteuid(65534)  # root may search all
        try:
            found = machine.check_disk(tmp_path / "closed/run", Demand())
        finally:
            os.seteuid(user)
        assert verdict(found) == "error"
        assert "Permission denied" in found.seen

    def test_a_disk_that_takes_nothing(self) -> None:
        assert verdict(machine.check_disk(Path("/proc/self"), Demand())) == "error"


class TestNetwork:
    @pytest.mark.parametrize(
        ("addresses", "ours", "level"),
        [
            (["10.0.0.7"], True, "ok"),
            (["127.0.1.1", "10.0.0.7"], True, "ok"),
            (["127.0.1.1"], True, "warning"),
            (["::1", "127.0.0.1"], True, "warning"),
            (["fe80::1%eth0"], True, "ok"),
            ([], True, "warning"),
            (["10.9.9.9"], False, "error"),
        ],
    )
    def test_host_name(self, addresses: list[str], ours: bool, level: str) -> None:
        assert verdict(network.check_host_name("box", addresses, bind=lambda _: ours)) == level

    def test_names_and_ports_of_this_machine(self) -> None:
        assert "127.0.0.1" in network.resolve("localhost")
        assert network.resolve("no-such-host.invalid") == []
        assert network.can_bind("127.0.0.1")
        assert not network.can_bind("192.0.2.1")  # of no machine: RFC 5737

    @pytest.mark.parametrize(
        ("variables", "level"),
        [
            ({}, "ok"),
            ({"GLOO_SOCKET_IFNAME": "eth0"}, "ok"),
            ({"GLOO_SOCKET_IFNAME": "eth"}, "error"),
            ({"NCCL_SOCKET_IFNAME": "eth"}, "ok"),
            ({"NCCL_SOCKET_IFNAME": "=eth"}, "error"),
            ({"NCCL_SOCKET_IFNAME": "^docker"}, "ok"),
            ({"NCCL_SOCKET_IFNAME": "ib0"}, "error"),
        ],
    )
    def test_interfaces(self, variables: dict[str, str], level: str) -> None:
        assert verdict(network.check_interfaces(variables, ["eth0", "lo"])) == level

    def test_rendezvous(self) -> None:
        assert verdict(network.check_rendezvous({})) == "ok"
        assert verdict(network.check_rendezvous({"MASTER_ADDR": "head"}, find=lambda _: ["10.0.0.1"])) == "ok"
        unknown = network.check_rendezvous({"MASTER_ADDR": "head"}, find=lambda _: [])
        assert verdict(unknown) == "error"
        assert "MASTER_ADDR=head" in unknown.seen


class TestSoftware:
    @pytest.mark.parametrize(
        ("version", "level"),
        [("2.11.0", "ok"), ("2.15.0+cu130", "ok"), ("3.0", "ok"), ("2.9.1", "error"), (None, "error")],
    )
    def test_versions(self, version: str | None, level: str) -> None:
        assert verdict(software.check_version("torch", version)) == level

    @pytest.mark.parametrize(
        ("backends", "gpus", "level"),
        [(["gloo", "nccl"], 8, "ok"), (["gloo"], 0, "ok"), (["gloo"], 1, "warning"), ([], 0, "error")],
    )
    def test_backends(self, backends: list[str], gpus: int, level: str) -> None:
        assert verdict(software.check_backends(backends, gpus)) == level

    @pytest.mark.parametrize(
        ("names", "driver", "level"),
        [
            ([], 0, "ok"),
            ([], 2, "error"),
            (["A100, 80 GiB", "A100, 80 GiB"], 2, "ok"),
            (["A100, 80 GiB", "T4, 16 GiB"], 2, "warning"),
        ],
    )
    def test_gpus(self, names: list[str], driver: int, level: str) -> None:
        assert verdict(software.check_gpus(names, driver)) == level

    def test_a_precision_that_the_cpu_emulates(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cpu = torch.device("cpu")
        assert verdict(software.check_precision("fp32", cpu)) == "ok"
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
        assert software.check_precision("bf16", cpu).line().endswith("bf16 on cpu")
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
        slow = software.check_precision("bf16", cpu)
        assert verdict(slow) == "warning"
        assert slow.seen.startswith("this CPU has no instructions for bf16")
        assert slow.remedy.startswith("execution.precision=fp32 is faster")
        assert verdict(software.check_precision("bf16", torch.device("cuda"))) == "ok"

    def test_gpu_clocks(self) -> None:
        lines = [
            "0, NVIDIA H100, 35, 345, 1980, 0x0000000000000001",
            "1, NVIDIA H100, 88, 900, 1980, 0x0000000000000060",
            "2, Old, [N/A], [N/A], [N/A], [Not Supported]",
        ]
        idle, hot, silent = software.check_gpu_clocks(lines)
        assert [verdict(found) for found in (idle, hot, silent)] == ["ok", "warning", "ok"]
        assert "slowed down: heat, heat (hardware)" in hot.seen


@pytest.mark.parametrize(("loader", "level"), [(50.0, "warning"), (110.0, "warning"), (130.0, "ok")])
def test_loader_against_model(loader: float, level: str) -> None:
    found = throughput.check_loader(loader, 100.0, from_files=True)
    assert verdict(found) == level
    assert ("50% of the time" in found.remedy) == (loader == 50.0)


def test_sizes() -> None:
    assert [size(count) for count in (0, 1023, 1536, GIB, 3 * 1024**4)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "1 GiB",
        "3 TiB",
    ]


class TestCommand:
    def test_every_subject_has_a_line(self, tmp_path: Path) -> None:
        done = call("doctor", "--run-dir", tmp_path)
        assert done.status in (0, 1), done.err
        subjects = {line[9:26].strip() for line in done.out.splitlines()}
        assert {"torch", "GPUs", "host name", "rendezvous", "cores", "memory", "shared memory", "disk"} <= subjects
        assert done.status == any(line.startswith("error") for line in done.out.splitlines())

    def test_a_config_is_tried(self, tmp_path: Path) -> None:
        done = call("doctor", DIGITS, "--run-dir", tmp_path, "--ranks", "2", "--json")
        findings = {found["subject"]: found for found in json.loads(done.out)}
        assert "images/s per rank" in findings["loader"]["seen"]
        assert findings["precision"]["seen"] == "fp32 on cpu"
        assert "for 2 x (1 threads + 0 loaders)" in findings["cores"]["seen"]

    def test_pictures_need_loader_processes_and_shared_memory(self, tmp_path: Path) -> None:
        for part in ("train", "val"):
            for number, name in enumerate(("cat", "dog")):
                (tmp_path / part / name).mkdir(parents=True)
                Image.new("RGB", (30, 30), (100 * number, 0, 0)).save(tmp_path / part / name / "1.jpg")
        sizes = "image_size: 16, resize_size: 16, loader_processes: 1, prefetch: 2"
        (tmp_path / "x.yaml").write_text(
            f"model: {{name: resnet8}}\nbatch: {{images_per_worker: 4}}\n"
            f"data: {{name: imagefolder, root: {tmp_path}, {sizes}}}\n"
        )
        done = call("doctor", tmp_path / "x.yaml", "--run-dir", tmp_path, "--ranks", "3", "--json")
        findings = {found["subject"]: found["seen"] for found in json.loads(done.out)}
        # 3 ranks x 1 process x 2 passes of 4 images of 16 x 16 x 3 bytes
        assert findings["shared memory"].endswith("for 18 KiB of images kept ready")
        assert "for 3 x (1 threads + 1 loaders)" in findings["cores"]
        assert "images/s per rank" in findings["loader"]

    def test_a_config_whose_data_is_missing_is_an_error(self, tmp_path: Path) -> None:
        done = call("doctor", DIGITS, "data.name=mnist", f"data.root={tmp_path}/none", "--run-dir", tmp_path)
        assert done.status == 1
        assert "error    loader" in done.out
        assert "disk" in done.out
        assert "Traceback" not in done.out + done.err

    def test_run_folders_that_cannot_be(self) -> None:
        done = call("doctor", "--run-dir", "a" * 300)
        assert done.status == 1
        assert "File name too long" in done.out
        assert done.err == ""
        empty = call("doctor", "--run-dir", "")
        assert empty.status == 2
        assert "is not a folder" in empty.err

    def test_a_config_that_is_wrong_is_the_users_error(self) -> None:
        assert call("doctor", DIGITS, "batch.virtual_workers=0").status == 2
