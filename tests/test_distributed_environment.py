"""Which process am I: what torchrun, srun, an allocation's shell and a bare shell set, and what contradicts."""

from __future__ import annotations

import socket

import pytest
import torch
from ranks import run_ranks

from largebatch.distributed.environment import (
    RENDEZVOUS,
    Launch,
    Ranks,
    choose_backend,
    choose_device,
    connect,
    first_host,
    read_launch,
)
from largebatch.errors import ConfigError, UserError

# As torchrun sets them on the second of two machines with four processes each.
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
# As srun sets them for `srun --nodes=2 --ntasks-per-node=2`, third task; sbatch's own are among them.
SRUN = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_JOB_NODELIST": "gpu[03-04]",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


class TestTorchrun:
    def test_all_of_it(self) -> None:
        assert read_launch(TORCHRUN) == Launch(5, 8, 1, 4, "torchrun", "env://")

    def test_it_goes_before_slurm(self) -> None:
        """torchrun is started by srun, once a machine."""
        assert read_launch(SRUN | TORCHRUN) == read_launch(TORCHRUN)

    def test_a_rendezvous_of_ones_own_needs_no_address(self) -> None:
        given = {"RANK": "1", "WORLD_SIZE": "2", RENDEZVOUS: "file:///shared/here"}
        assert read_launch(given) == Launch(1, 2, 1, 2, "environment", "file:///shared/here")

    def test_one_process_needs_no_address(self) -> None:
        assert read_launch({"RANK": "0", "WORLD_SIZE": "1"}) == Launch(0, 1, 0, 1, "environment", "env://")

    @pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
    def test_what_is_missing_is_named(self, name: str) -> None:
        with pytest.raises(UserError, match=name):
            read_launch({key: value for key, value in TORCHRUN.items() if key != name})

    @pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
    @pytest.mark.parametrize("value", ["", "two", "-1", "1.5", "²", " "])
    def test_what_is_no_number_is_named(self, name: str, value: str) -> None:
        with pytest.raises(UserError, match=f"{name} is {value!r}"):
            read_launch(TORCHRUN | {name: value})

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"RANK": "8"}, "RANK=8 and WORLD_SIZE=8"),
            ({"WORLD_SIZE": "0"}, "RANK=5 and WORLD_SIZE=0"),
            ({"LOCAL_RANK": "4"}, "LOCAL_RANK=4 and LOCAL_WORLD_SIZE=4"),
        ],
    )
    def test_what_contradicts_is_named(self, changes: dict[str, str], problem: str) -> None:
        with pytest.raises(UserError, match=problem):
            read_launch(TORCHRUN | changes)


class TestSlurm:
    def test_all_of_it(self) -> None:
        assert read_launch(SRUN) == Launch(2, 4, 0, 2, "srun", "tcp://gpu03:24567")

    def test_an_address_of_ones_own(self) -> None:
        given = SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5555"}
        assert read_launch(given).init_method == "tcp://10.0.0.1:5555"
        assert read_launch(SRUN | {RENDEZVOUS: "file:///shared/here"}).init_method == "file:///shared/here"

    def test_every_task_meets_at_the_same_place(self) -> None:
        launches = [
            read_launch(SRUN | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2)}) for rank in range(4)
        ]
        assert [launch.rank for launch in launches] == [0, 1, 2, 3]
        assert len({launch.init_method for launch in launches}) == 1

    @pytest.mark.parametrize(
        "given",
        [
            pytest.param({}, id="a_bare_shell"),
            # salloc without a job step: the shell stays on the login machine.
            pytest.param({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "n[1-2]"}, id="salloc"),
            # sbatch's script is task 0 of the batch step, whatever the job's number of tasks.
            pytest.param(
                {
                    "SLURM_JOB_ID": "7",
                    "SLURM_NTASKS": "4",
                    "SLURM_PROCID": "0",
                    "SLURM_LOCALID": "0",
                    "SLURM_NODEID": "0",
                    "SLURM_JOB_NODELIST": "n[1-2]",
                    "SLURM_TASKS_PER_NODE": "2(x2)",
                },
                id="sbatch",
            ),
            # salloc with LaunchParameters=use_interactive_step: a step of one task.
            pytest.param(
                SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"},
                id="interactive_step",
            ),
            pytest.param(SRUN | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, id="srun_of_one_task"),
        ],
    )
    def test_one_process_stays_alone(self, given: dict[str, str]) -> None:
        assert read_launch(given) == Launch()

    @pytest.mark.parametrize(
        "name", ["SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_JOB_ID", "MASTER_PORT"]
    )
    @pytest.mark.parametrize("value", ["", "two", "-1", "²"])
    def test_what_is_no_number_is_named(self, name: str, value: str) -> None:
        with pytest.raises(UserError, match=f"{name} is {value!r}"):
            read_launch(SRUN | {name: value})

    @pytest.mark.parametrize("name", ["SLURM_LOCALID", "SLURM_JOB_ID"])
    def test_what_is_missing_is_named(self, name: str) -> None:
        with pytest.raises(UserError, match=f"{name} is None"):
            read_launch({key: value for key, value in SRUN.items() if key != name})

    def test_a_rank_beyond_the_step_is_named(self) -> None:
        with pytest.raises(UserError, match="SLURM_PROCID=4 and SLURM_STEP_NUM_TASKS=4"):
            read_launch(SRUN | {"SLURM_PROCID": "4"})

    def test_no_nodes_are_named(self) -> None:
        with pytest.raises(UserError, match="names no host"):
            read_launch(SRUN | {"SLURM_STEP_NODELIST": "", "SLURM_JOB_NODELIST": ""})

    @pytest.mark.parametrize(
        ("nodelist", "host"),
        [
            ("node1", "node1"),
            ("node1,node2", "node1"),
            ("node[1-3]", "node1"),
            ("gpu[03-07,9],login1", "gpu03"),
            ("gpu[003,005]", "gpu003"),
            ("gpu[9-12]", "gpu9"),
            ("login,gpu[1-2]", "login"),
            ("rack-2-node[10-11]", "rack-2-node10"),
            ("node[1-2]-ib0", "node1-ib0"),
            ("node1.cluster.org", "node1.cluster.org"),
            ("ip-10-0-0-[5,7]", "ip-10-0-0-5"),
        ],
    )
    def test_the_first_host_of_a_node_list(self, nodelist: str, host: str) -> None:
        assert first_host(nodelist) == host

    @pytest.mark.parametrize("nodelist", ["", " ", "[1-2]", ",node1"])
    def test_a_node_list_without_a_first_host(self, nodelist: str) -> None:
        with pytest.raises(UserError, match="names no host"):
            first_host(nodelist)


class TestDeviceAndBackend:
    """With as many GPUs as each test says."""

    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
        return request.param

    @pytest.mark.parametrize(
        ("gpus", "asked", "device"),
        [
            (0, "auto", "cpu"),
            (0, "cpu", "cpu"),
            (4, "auto", "cuda:1"),
            (4, "cuda", "cuda:1"),
            (4, "cpu", "cpu"),
            (1, "auto", "cuda:0"),
        ],
        indirect=["gpus"],
    )
    def test_device(self, gpus: int, asked: str, device: str) -> None:
        assert choose_device(asked, Launch(5, 8, 1, 4)) == torch.device(device)

    @pytest.mark.parametrize("gpus", [0], indirect=True)
    def test_cuda_without_a_gpu(self, gpus: int) -> None:
        with pytest.raises(UserError, match=r"execution.device: 'cuda'.*choose 'cpu' or 'auto'"):
            choose_device("cuda", Launch())

    @pytest.mark.parametrize(
        ("gpus", "asked", "device", "backend"),
        [
            (0, "auto", "cpu", "gloo"),
            (4, "auto", "cuda", "nccl"),
            (4, "nccl", "cuda", "nccl"),
            (4, "gloo", "cuda", "gloo"),
            (4, "auto", "cpu", "gloo"),
            (3, "auto", "cuda", "gloo"),  # four ranks share three GPUs: NCCL refuses that
        ],
        indirect=["gpus"],
    )
    def test_backend(self, gpus: int, asked: str, device: str, backend: str) -> None:
        assert choose_backend(asked, torch.device(device), Launch(5, 8, 1, 4)) == backend

    @pytest.mark.parametrize("gpus", [1], indirect=True)
    @pytest.mark.parametrize(("on_node", "auto"), [("4", "nccl"), ("1", "gloo"), (None, "gloo")])
    def test_tasks_that_slurm_has_bound_to_a_gpu_each(
        self, gpus: int, on_node: str | None, auto: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With --gpus-per-task=1 each of the four tasks sees one GPU, and none of them the others'."""
        monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
        if on_node is not None:
            monkeypatch.setenv("SLURM_GPUS_ON_NODE", on_node)
        assert choose_backend("auto", torch.device("cuda"), Launch(5, 8, 1, 4, "srun")) == auto

    @pytest.mark.parametrize(("gpus", "device"), [(0, "cpu"), (3, "cuda")], indirect=["gpus"])
    def test_nccl_without_a_gpu_for_each_rank(self, gpus: int, device: str) -> None:
        with pytest.raises(UserError, match=r"execution.backend: 'nccl'.*4 ranks.*'gloo' or 'auto'"):
            choose_backend("nccl", torch.device(device), Launch(5, 8, 1, 4))


# ---- the group


def _meet(launch: Launch, _: None = None) -> list[object]:
    with connect(launch, device="cpu", threads=1) as ranks:
        assert torch.get_num_threads() == 1
        rows = torch.zeros(ranks.world_size)
        rows[ranks.rank] = ranks.rank + 1
        ranks.barrier()
        return [
            ranks.is_main,
            ranks.sum(rows).tolist(),
            ranks.broadcast(b"from main" if ranks.is_main else None),
            ranks.gather({"rank": ranks.rank}),
            ranks.from_main(lambda: f"said by {ranks.rank}"),
        ]


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_speak_with_each_other(world_size: int) -> None:
    everyone = [{"rank": rank} for rank in range(world_size)]
    sums = [rank + 1.0 for rank in range(world_size)]
    for rank, heard in enumerate(run_ranks(_meet, world_size)):
        assert heard == [rank == 0, sums, b"from main", everyone, "said by 0"]


def _fail_on_main(launch: Launch) -> str:
    def fail() -> None:
        raise ConfigError("no good")

    with connect(launch, device="cpu") as ranks:
        try:
            ranks.from_main(fail)
        except ConfigError as error:
            return str(error)
    return "went on"


def test_what_rank_0_alone_finds_ends_every_rank() -> None:
    assert run_ranks(_fail_on_main, 3) == ["no good"] * 3


def _lose_rank_1(launch: Launch) -> str:
    try:
        with connect(launch, device="cpu") as ranks:
            if ranks.rank == 1:
                raise UserError("only here")
            ranks.barrier()
    except (UserError, RuntimeError) as error:
        return str(error)
    return "went on"


def test_a_rank_that_stops_does_not_leave_the_others_waiting() -> None:
    told = run_ranks(_lose_rank_1, 3, timeout=60.0)
    assert told[1] == "only here"
    assert "went on" not in told


def test_ranks_that_cannot_meet_say_so() -> None:
    """Rank 1 of 2, and nobody else comes."""
    launch = Launch(1, 2, 1, 2, "environment", "tcp://127.0.0.1:1")
    with (
        pytest.raises(UserError, match=r"the 2 ranks \(environment, tcp://127.0.0.1:1\) could not connect"),
        connect(launch, device="cpu", timeout_seconds=1.0),
    ):
        pass


def test_one_process_makes_no_group() -> None:
    with connect(Launch(), device="cpu") as ranks:
        assert ranks == Ranks(0, 1, torch.device("cpu"), "gloo")
        assert not torch.distributed.is_initialized()


def test_another_program_on_the_port_is_no_reason_to_wait_for_ever() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        launch = Launch(1, 2, 1, 2, "environment", f"tcp://127.0.0.1:{silent.getsockname()[1]}")
        with (
            pytest.raises(UserError, match=r"another program listens there|could not connect"),
            connect(launch, device="cpu", timeout_seconds=1.0),
        ):
            pytest.fail("nobody can be met here")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("rack[0-3]node[0-7]", "rack0node0"),
        ("a[1-2][3-4]", "a13"),
        ("a[07-12,15]b,c1", "a07b"),
        ("gpu[3],x", "gpu3"),
    ],
)
def test_the_first_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_an_ipv6_address_of_slurm() -> None:
    slurm = {
        "SLURM_PROCID": "1",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_LOCALID": "0",
        "MASTER_ADDR": "::1",
    }
    assert read_launch(slurm).init_method == "tcp://[::1]:20007"
