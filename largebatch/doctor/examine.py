"""Runs every check, against what this machine has and what a config needs."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from largebatch.config import Config
from largebatch.data.load import load
from largebatch.distributed.environment import Launch, Ranks, connect
from largebatch.distributed.facilities import available_backends
from largebatch.doctor import machine, network, software, throughput
from largebatch.doctor.finding import Finding
from largebatch.doctor.machine import Demand
from largebatch.errors import UserError
from largebatch.run import build_model

_SHM = Path("/dev/shm")
_NETS = Path("/sys/class/net")


def examine(config: Config | None, run_dir: Path, ranks: int | None = None) -> Iterator[Finding]:
    """The findings, each as soon as it is known: of this machine alone, or of what `config` needs too.

    `ranks` is their number on this machine: by default one for each GPU, at least one.
    """
    gpus = software.visible_gpus()
    driver = software.ask_nvidia_smi()
    here = ranks or max(1, len(gpus))
    yield from _software(gpus, driver)
    yield from _network()
    if config is None:
        yield from _machine(run_dir, Demand(ranks=here))
        return
    demand, execution = _demand(config, here), config.execution
    tried: list[Finding] = []
    try:
        with connect(Launch(), device=execution.device, threads=execution.threads) as alone:
            tried.append(software.check_precision(execution.precision, alone.device))
            checkpoints, loader = _try_config(config, alone)
            tried.append(loader)
            demand = replace(demand, checkpoints=checkpoints)
    except UserError as error:
        problem, _, remedy = str(error).replace("\n", " ").rpartition("; ")
        tried.append(Finding("loader", "error", problem or remedy, remedy))
    yield from _machine(run_dir, demand)
    yield from tried


def _software(gpus: list[str], driver: list[str]) -> Iterator[Finding]:
    yield software.check_python()
    yield software.check_version("torch", software.installed("torch"))
    yield software.check_torchvision()
    yield software.check_backends(available_backends(), len(gpus))
    yield software.check_gpus(gpus, len(driver))
    yield from software.check_gpu_clocks(driver)


def _network() -> Iterator[Finding]:
    name = socket.gethostname()
    yield network.check_host_name(name, network.resolve(name))
    yield network.check_interfaces(os.environ, sorted(path.name for path in _NETS.glob("*")))
    yield network.check_rendezvous(os.environ)


def _machine(run_dir: Path, demand: Demand) -> Iterator[Finding]:
    root = Path("/")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield machine.check_cores(root, usable, demand)
    yield machine.check_memory(root, demand)
    yield machine.check_shared_memory(machine.free_bytes(_SHM), demand)
    yield machine.check_clocks(root)
    yield machine.check_disk(run_dir, demand)


def _demand(config: Config, ranks: int) -> Demand:
    """What is known without the data; checkpoints are not."""
    if not throughput.reads_files(config):
        return Demand(ranks=ranks, threads=config.execution.threads)
    data = config.data
    image = 3 * data.largest_train_size**2  # bytes, as a loader process hands it over: uint8
    return Demand(
        ranks=ranks,
        threads=config.execution.threads,
        loader_processes=data.loader_processes,
        shared_memory=ranks * data.loader_processes * data.prefetch * throughput.images_per_pass(config) * image,
    )


def _try_config(config: Config, alone: Ranks) -> tuple[int, Finding]:
    """Bytes of the checkpoints that will be on disk at once; and how the loader and the model go together."""
    source, _ = load(config.data.of_one_size, seed=config.seed, device=alone.device)
    state = build_model(config, source, alone).state_dict()
    weights = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    checkpoints = 2 * weights * (config.checkpoint.keep + 1)  # each holds the momentum too
    loader = throughput.measure_loader(config, source)
    model = throughput.measure_model(config, source, alone)
    return checkpoints, throughput.check_loader(loader, model, from_files=throughput.reads_files(config))
