"""Meshes of 8, 64 and 512 ranks in one process: PyTorch's fake process group runs rank 0's part, and sends nothing."""

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore

from engine.config import ModelConfig, OptimizerConfig, preset
from engine.model import GPT
from engine.planning import Setup, peak_memory, step_memory
from tests.engine.memory import Step, packed, peak_bytes
from tests.engine.relatives import RELATIVES
from train.optimizer import Optimizer
from train.parallel import Objective, replicate, shard

MODEL = ModelConfig(512, 64, 3, 4, 64)
RANKS = [8, 64, 512]


@contextmanager
def mesh(ranks: int) -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield init_device_mesh("cpu", (ranks,))
    finally:
        dist.destroy_process_group()


def objective_of(model: GPT) -> Objective:
    return Objective(model, model, lambda model, batch: model.loss(**batch))


def replicated(objective: Objective) -> DistributedDataParallel:
    """DDP, whose own all-reduce finds no result in the fake group: the sum of one rank's gradients is the gradient."""

    def keep(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    parallel = replicate(objective)
    parallel.register_comm_hook(None, keep)
    return parallel


def optimizer_of(model: nn.Module) -> Optimizer:
    return Optimizer(model, dataclasses.replace(OptimizerConfig(), kind="adamw"), matmul_dtype=torch.float32)


def step_of(objective: nn.Module, optimizer: Optimizer, tokens: int, model: ModelConfig = MODEL) -> Step:
    def step() -> None:
        objective(packed(tokens, model.vocab_size, model.context)).backward()
        nn.utils.clip_grad_norm_(objective.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def local_bytes(tensors: list[Tensor]) -> int:
    shards = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum(shard.numel() * shard.element_size() for shard in shards if shard.ndim)


@pytest.mark.parametrize("ranks", RANKS)
def test_a_sharded_step_runs_and_a_rank_keeps_what_the_estimate_says(ranks: int) -> None:
    with mesh(ranks) as devices:
        model = GPT(MODEL)
        objective = objective_of(model)
        shard(objective, devices)
        optimizer = optimizer_of(model)
        before = [parameter.to_local().clone() for parameter in model.parameters()]  # type: ignore[attr-defined]
        step_of(objective, optimizer, 128)()
        after = [parameter.to_local() for parameter in model.parameters()]  # type: ignore[attr-defined]
        assert any(not torch.equal(*pair) for pair in zip(before, after, strict=True))
        state = step_memory(Setup(MODEL, "adamw", 128, gpu=False, ranks=ranks, shard=True))["optimizer step"]
        assert local_bytes(list(model.parameters())) == state["weights"]
        moments = chain.from_iterable(each.state.values() for each in optimizer.optimizers)
        assert local_bytes([tensor for each in moments for tensor in each.values()]) == state["optimizer"]


@pytest.mark.parametrize("name", RELATIVES)
def test_models_of_every_family_take_a_sharded_step(name: str) -> None:
    with mesh(8) as devices:
        model = GPT(RELATIVES[name])
        objective = objective_of(model)
        shard(objective, devices)
        optimizer = Optimizer(model, OptimizerConfig(), matmul_dtype=torch.float32)
        before = {name: whole.to_local().clone() for name, whole in model.named_parameters()}  # type: ignore[attr-defined]
        step_of(objective, optimizer, 96, RELATIVES[name])()
        after = {name: whole.to_local() for name, whole in model.named_parameters()}  # type: ignore[attr-defined]
        assert not [name for name, share in after.items() if share.numel() and torch.equal(share, before[name])]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_large_model_is_sharded_as_estimated(ranks: int) -> None:
    with mesh(ranks) as devices, torch.device("meta"):
        model = GPT(preset("large").model)
        shard(model, devices)
        setup = Setup(preset("large").model, "muon", 512, ranks=ranks, shard=True)
        assert local_bytes(list(model.parameters())) == step_memory(setup)["loss"]["weights"]


@pytest.mark.parametrize("sharded", [True, False], ids=["FSDP2", "DDP"])
def test_the_peak_of_a_step_on_eight_ranks_is_within_a_tenth_of_the_estimate(sharded: bool) -> None:
    with mesh(8) as devices:

        def build() -> Step:
            model = GPT(MODEL)
            objective = objective_of(model)
            if sharded:
                shard(objective, devices)
            return step_of(objective if sharded else replicated(objective), optimizer_of(model), 256)

        measured = peak_bytes(build, steps=3)
    setup = Setup(MODEL, "adamw", 256, gpu=False, ranks=8, shard=sharded)
    assert peak_memory(setup) == pytest.approx(measured, rel=0.1)
