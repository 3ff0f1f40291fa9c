"""What is not finite is never applied; replicas that differ are found, and the odd one named."""

from __future__ import annotations

import hashlib
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from run_folders import records, saved_steps, tensor_hashes
from survive import Fleet, newest_step, run_to_the_end, training
from torch import Tensor, nn

from largebatch.distributed.environment import Launch, connect
from largebatch.errors import HealthError
from largebatch.recipe.draws import bits
from largebatch.training.checkpoint import CheckpointFolder
from largebatch.training.facts import FactReader
from largebatch.training.replicas import check_replicas
from largebatch.training.trainer import Trainer
from largebatch.training.virtual_workers import VirtualWorkers

BAD_STEP, BAD_WORKER = 10, 5


def digest(trainer: Trainer) -> str:
    state = [v for v in trainer.virtual.model.state_dict().values() if v.is_floating_point()]  # no step counters
    state += [v for s in trainer.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)]
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in state)).hexdigest()


def _spoil_an_image(_: int, lag: int = 0) -> None:
    """One pixel of one image of one virtual worker at one step is NaN; says if anything moved all the same.

    `lag`: steps after which facts are read, 1 on a GPU.
    """
    open_step, forward, train_step, make = (
        VirtualWorkers.step,
        VirtualWorkers.__call__,
        Trainer._train_step,
        FactReader.__init__,
    )
    now = {"step": -1}

    def step_of(self: VirtualWorkers, step: int, **options: Any) -> Any:
        now["step"] = step
        return open_step(self, step, **options)

    def spoil(self: VirtualWorkers, images: Tensor) -> Tensor:
        if now["step"] == BAD_STEP and self._pass.leaf == BAD_WORKER:
            images = images.clone()
            images[1, 0, 2, 3] = float("nan")
        return forward(self, images)

    def watch(self: Trainer, *inputs: Any) -> Any:
        before = digest(self)
        try:
            facts = train_step(self, *inputs)
        finally:
            if self.step == BAD_STEP + 1:
                print("SAME" if digest(self) == before else "MOVED", flush=True)
        return facts

    def late(self: FactReader, device: torch.device) -> None:
        make(self, device)
        self._lag = lag

    VirtualWorkers.step = step_of  # type: ignore[method-assign]
    VirtualWorkers.__call__ = spoil  # type: ignore[assignment,method-assign]
    Trainer._train_step = watch  # type: ignore[method-assign]
    FactReader.__init__ = late  # type: ignore[assignment,method-assign]


FORMS = {
    "fp32": [],
    "fp16": ["execution.precision=fp16"],
    "lr_inside": ["optimizer.momentum_form=lr_inside"],
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_that_is_not_finite_stops_the_run_before_its_update(tmp_path: Path, form: str, world_size: int) -> None:
    with Fleet(world_size, *training(tmp_path, *FORMS[form]), prepare=_spoil_an_image) as fleet:
        outcomes = fleet.outcomes()
    # Eight workers on three ranks: 0 and 1, 2 to 4, 5 to 7.
    culprit = 0 if world_size == 1 else 2
    for outcome in outcomes:
        assert outcome.status == 3
        assert f"step {BAD_STEP}: not finite: the loss on rank {culprit}: virtual workers [{BAD_WORKER}]" in outcome.err
        assert "The newest checkpoint is of step 9." in outcome.err
        assert "Traceback" not in outcome.err
        assert "MOVED" not in outcome.out
        if form != "fp16" or world_size == 3:
            assert "SAME" in outcome.out
    assert newest_step(tmp_path) == 9


@pytest.mark.parametrize("form", FORMS)
def test_skipping_gives_the_same_bits_on_any_number_of_ranks(tmp_path: Path, form: str) -> None:
    counts = (1, 2, 3) if form == "fp32" else (1, 3)
    found = []
    for count in counts:
        run_dir = tmp_path / str(count)
        command = training(run_dir, *FORMS[form], "health.on_not_finite=skip")
        with Fleet(count, *command, prepare=_spoil_an_image) as fleet:
            outcomes = fleet.outcomes()
            assert [outcome.status for outcome in outcomes] == [0] * count, fleet.story()
        assert "MOVED" not in outcomes[0].out
        skipped = {line["step"]: line["skipped_steps"] for line in records(run_dir) if "skipped_steps" in line}
        assert skipped == {12: 1}, "the record after 12 covers the steps 9 to 11"
        assert all(line["train/loss"] is not None for line in records(run_dir))
        found.append((tensor_hashes(run_dir), records(run_dir)))
    assert all(one == found[0] for one in found)
    weights = torch.load(tmp_path / "1/model.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in weights.values() if tensor.is_floating_point())


def _write_slowly(rank: int) -> None:
    """Checkpoints take longer than the steps between the newest and the bad one."""
    _spoil_an_image(rank)
    save = CheckpointFolder.save

    def slowly(self: CheckpointFolder, step: int, data: bytes) -> Path:
        time.sleep(0.5)
        return save(self, step, data)

    CheckpointFolder.save = slowly  # type: ignore[method-assign]


def test_the_checkpoint_that_is_being_written_counts_on_every_rank(tmp_path: Path) -> None:
    with Fleet(3, *training(tmp_path), prepare=_write_slowly) as fleet:
        assert all("The newest checkpoint is of step 9." in outcome.err for outcome in fleet.outcomes())


def _spoil_a_gradient(rank: int) -> None:
    """Rank 0's last pass of step 10 has a gradient that is infinite, and a loss that is not."""
    backward = VirtualWorkers.backward
    open_step = VirtualWorkers.step
    here = {"step": -1}

    def step_of(self: VirtualWorkers, step: int, **options: Any) -> Any:
        here["step"] = step
        return open_step(self, step, **options)

    def spoil(self: VirtualWorkers, loss: torch.Tensor, **options: Any) -> None:
        if rank == 0 and here["step"] == BAD_STEP and self._pass.last:
            weight = next(self.model.parameters())
            handle = weight.register_hook(lambda gradient: torch.full_like(gradient, math.inf))
            backward(self, loss, **options)
            handle.remove()
        else:
            backward(self, loss, **options)

    VirtualWorkers.step = step_of  # type: ignore[method-assign]
    VirtualWorkers.backward = spoil  # type: ignore[method-assign]


@pytest.mark.parametrize("world_size", [1, 2])
def test_gradients_that_are_not_finite_are_found_though_every_loss_is(tmp_path: Path, world_size: int) -> None:
    with Fleet(world_size, *training(tmp_path), prepare=_spoil_a_gradient) as fleet:
        for outcome in fleet.outcomes():
            assert outcome.status == 3
            assert f"step {BAD_STEP}: not finite: the summed gradients, though every loss is finite" in outcome.err
            assert "Traceback" not in outcome.err


def test_after_a_stop_the_run_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    run_to_the_end(1, tmp_path / "undisturbed")
    with Fleet(2, *training(tmp_path / "run"), prepare=_spoil_an_image) as fleet:
        assert [outcome.status for outcome in fleet.outcomes()] == [3, 3]
    run_to_the_end(3, tmp_path / "run")
    assert tensor_hashes(tmp_path / "run") == tensor_hashes(tmp_path / "undisturbed")


def test_facts_that_are_read_late_still_come_before_a_checkpoint(tmp_path: Path) -> None:
    # On a GPU step 10 is known to be bad only when step 11 is under way; a checkpoint is due after it.
    with Fleet(2, *training(tmp_path, "checkpoint.every_steps=1"), prepare=_spoil_an_image, prepare_args=(1,)) as fleet:
        for outcome in fleet.outcomes():
            assert outcome.status == 3
            assert f"step {BAD_STEP}: not finite" in outcome.err
    assert saved_steps(tmp_path)[-1] == BAD_STEP


# ---- replicas


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 3))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.body(inputs)


def flip_bit(tensor: Tensor, draw: int) -> None:
    """Flip one bit of `tensor` in place; again, and it is as before."""
    data = tensor.view(-1).view(torch.uint8).numpy()
    place = int(bits(np.arange(1), 11, draw)[0] % np.uint64(8 * data.size))
    data[place // 8] ^= 1 << place % 8


def _flip_and_check(launch: Launch, flips: int) -> list[str]:
    """What `check_replicas` says to each of so many bits, flipped one after another; "" for nothing."""
    torch.manual_seed(3)
    model = _Small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 5)).square().sum().backward()
    optimizer.step()
    momentum = [state["momentum_buffer"] for state in optimizer.state.values()]
    kinds = [list(model.parameters()), momentum, [b for b in model.buffers() if b.dim()]]
    said = []
    with connect(launch) as ranks:
        for flip in range(flips):
            tensors = [tensor.detach() for tensor in kinds[flip % 3]]
            tensor = tensors[flip % len(tensors)]
            if launch.rank == flip % launch.world_size:
                flip_bit(tensor, flip)
            try:
                check_replicas(model, optimizer, ranks, step=flip)
                said.append("")
            except HealthError as error:
                said.append(str(error))
            if launch.rank == flip % launch.world_size:
                flip_bit(tensor, flip)
            check_replicas(model, optimizer, ranks, step=flip)
    return said


def test_20_of_20_flipped_bits_are_found_and_the_rank_named() -> None:
    for said in run_ranks(_flip_and_check, 3, 20):
        assert len(said) == 20
        for flip, text in enumerate(said):
            assert f"after step {flip}: rank {flip % 3} differs" in text
        assert "the optimizer's momentum_buffer of body." in said[1]
        assert "running_" in said[2]


def test_two_ranks_cannot_say_who_is_right() -> None:
    for said in run_ranks(_flip_and_check, 2, 2):
        assert all("ranks 0, 1 disagree, and no majority says which is right" in text for text in said)


def _flip_in_training(rank: int, victim: int, bit: int, kind: str) -> None:
    """After step 5 of `victim` one bit of one weight, momentum or running statistic is another."""
    train_step = Trainer._train_step

    def flip(self: Trainer, *inputs: Any) -> Any:
        facts = train_step(self, *inputs)
        if rank == victim and self.step == 5:
            state = next(iter(self.optimizer.state.values()))["momentum_buffer"]
            tensor = {
                "weight": next(self.virtual.model.parameters()).detach(),
                "momentum": state,
                "statistic": next(b for b in self.virtual.model.buffers() if b.dim()),
            }[kind]
            tensor.view(-1).view(torch.int32)[0] ^= 1 << bit
        return facts

    Trainer._train_step = flip  # type: ignore[method-assign]


@pytest.mark.parametrize(
    # The last bit of a momentum may be rounded away again before anybody looks; then nothing is wrong any more.
    ("victim", "bit", "kind"),
    [(2, 0, "weight"), (1, 14, "momentum"), (0, 14, "statistic"), (1, 30, "weight")],
)
def test_a_flipped_bit_stops_the_run_within_m_steps(tmp_path: Path, victim: int, bit: int, kind: str) -> None:
    never = "checkpoint={every_epochs: null, every_steps: 100}"
    options = ["health.replica_check_every_steps=4", never]
    with Fleet(3, *training(tmp_path, *options), prepare=_flip_in_training, prepare_args=(victim, bit, kind)) as fleet:
        outcomes = fleet.outcomes()
    for outcome in outcomes:
        assert outcome.status == 3
        assert f"rank {victim} differs" in outcome.err
        (step,) = (text.split(":")[0] for text in outcome.err.split("after step ")[1:2])
        # A bit of the exponent may make the next step overflow: then the replicas are compared at once.
        assert 5 < int(step) <= 8
    assert saved_steps(tmp_path) == []
