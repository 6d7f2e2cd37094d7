"""One model on many processes: whole on each (DDP), or a share of it on each (FSDP2), with every tensor a DTensor."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Recipe
from engine.errors import InputError
from engine.estimate import GIB, RESERVED, Setup, peak_memory
from engine.processes import Processes
from engine.runtime import Runtime


@dataclass(frozen=True)
class Layout:
    """Does a process hold a share of the model, or all of it; in how many parts does it take a micro-batch?"""

    shard: bool = False
    parts: int = 1
    description: str = ""


def lay_out(recipe: Recipe, runtime: Runtime) -> Layout:
    """What fits by estimate: whole where that was not asked otherwise, and in as few parts as can be.

    Decided before training: one process that runs out of memory would leave the others waiting. Raises InputError for
    what cannot be done.
    """
    count, model = runtime.processes.count, recipe.model
    if count == 1:
        return Layout()
    # A share of the batch ends where a piece does, at most one context later.
    tokens = recipe.tokens_per_pass // count + model.context

    def setup(shard: bool, parts: int) -> Setup:
        several = parts > 1 or recipe.tokens_per_pass < recipe.tokens_per_step
        kind, size, gpu = recipe.optimizer.kind, runtime.dtype.itemsize, runtime.device.type == "cuda"
        again = recipe.loop.checkpoint_activations
        # A part ends where a sequence does, too.
        at_a_time = tokens if parts == 1 else min(tokens, tokens // parts + model.context)
        return Setup(model, kind, at_a_time, size, gpu, count, shard, several, again)

    cuts = [2**power for power in range((tokens // model.context).bit_length())]
    layouts = [False, True] if recipe.loop.shard is None else [recipe.loop.shard]
    options, memory = [(shard, parts) for shard in layouts for parts in cuts], device_memory(runtime)
    shard, parts = next((each for each in options if peak_memory(setup(*each)) <= memory), options[-1])
    if shard and runtime.precision == "fp16":
        raise InputError("a sharded model cannot be trained with --precision fp16: use bf16 or fp32")
    need = f"{peak_memory(setup(shard, parts)) / GIB:.3g} of {memory / GIB:.3g} GiB at the peak, by estimate"
    how = "a share of the model on each (FSDP)" if shard else "the model on each (DDP)"
    pieces = f", micro-batches in {parts} parts" if parts > 1 else ""
    return Layout(shard, parts, f"processes  {count}, {how}{pieces}: {need}")


def device_memory(runtime: Runtime) -> int:
    """Bytes that one process can count on."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory - RESERVED
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def should_compile(recipe: Recipe, runtime: Runtime) -> bool:
    """torch.compile, where nothing else was asked for: on a GPU. On a CPU its start-up of a minute does not pay."""
    return runtime.device.type == "cuda" if recipe.loop.compile is None else recipe.loop.compile


Loss = Callable[[Any, Any], Tensor]


def compile_loss(loss: Loss, trained: nn.Module, processes: Processes) -> Loss:
    """The loss, compiled. Of many processes each block of the model is, one by one: so its gradients can travel while
    those of the next block are computed."""
    # Where compiling fails (no C compiler, say), run that part as it is.
    torch._dynamo.config.suppress_errors = True
    if processes.count == 1:
        return torch.compile(loss)
    for block in blocks(trained):
        block.compile()
    return loss


class Objective(nn.Module):
    """A batch in, its summed loss out: one module of all that is trained, whose forward DDP and FSDP can follow."""

    def __init__(self, trained: nn.Module, model: nn.Module, loss: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.trained, self.model, self.loss = trained, model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def distribute(objective: Objective, runtime: Runtime, layout: Layout) -> nn.Module:
    """The objective, ready to be trained by all processes. Before the optimizer: sharding replaces the parameters."""
    if not layout.shard:
        objective.to(runtime.device)
        return replicate(objective) if runtime.processes.count > 1 else objective
    from torch.distributed.device_mesh import init_device_mesh

    shard(objective, init_device_mesh(runtime.device.type, (runtime.processes.count,)), runtime.dtype)
    return objective


def replicate(objective: nn.Module) -> nn.parallel.DistributedDataParallel:
    return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)


def shard(module: nn.Module, mesh: Any, dtype: torch.dtype = torch.float32) -> None:
    """Deal every parameter out over the mesh, by rows. Weights travel in `dtype`, gradients in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # The model casts what it computes itself.
    narrow = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else narrow
    for block in blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def blocks(module: nn.Module) -> list[nn.Module]:
    """The Transformer blocks of all models in a module."""
    return [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part]


def synchronised(objective: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
    """For one forward and backward: are gradients exchanged now, or added up for a later pass that does?"""
    if isinstance(objective, nn.parallel.DistributedDataParallel) and not now:
        return objective.no_sync()
    if sync := getattr(objective, "set_requires_gradient_sync", None):
        sync(now)
    return contextlib.nullcontext()


def sharded(tensor: Tensor) -> bool:
    """Is it a DTensor? Asked in this way, for the class takes a second to import."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This process's share of a tensor, in place; of one that is not sharded, all of it."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def share_like(like: Tensor, tensor: Tensor) -> Tensor:
    """A tensor that every process has, sharded as another one is."""
    if not sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def deal_matrices(shares: Sequence[Tensor], like: Tensor) -> Tensor:
    """Exchange rows for whole matrices: of K matrices sharded as `like`, return those that fall to this process.

    `shares` holds this process's rows of each. [matrices, rows, columns]; without sharding these are all K.
    """
    stack = torch.stack(list(shares))
    if not sharded(like):
        return stack
    from torch.distributed.tensor import Shard

    return _stacked(stack, like, len(shares), Shard(1)).redistribute(placements=[Shard(0)]).to_local()


def deal_rows(matrices: Tensor, count: int, like: Tensor) -> list[Tensor]:
    """The way back from `deal_matrices`: return this process's rows of each of all `count` matrices."""
    if not sharded(like):
        return list(matrices.unbind())
    from torch.distributed.tensor import Shard

    by_rows = _stacked(matrices, like, count, Shard(0)).redistribute(placements=[Shard(1)])
    return list(by_rows.to_local().unbind())


def _stacked(local: Tensor, like: Tensor, count: int, placement: Any) -> Any:
    """The DTensor [count, rows, columns] of which this process holds `local`."""
    from torch.distributed.tensor import DTensor

    rows, columns = like.shape
    shape, stride = torch.Size((count, rows, columns)), (rows * columns, columns, 1)
    return DTensor.from_local(local, like.device_mesh, [placement], shape=shape, stride=stride)  # type: ignore[attr-defined]


def whole_on_host(module: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """A copy of all weights in the memory of the main process's CPU; the others only bring their shares, one by one."""
    gathered = ((name, whole(tensor.detach())) for name, tensor in module.state_dict().items())
    return {name: tensor.to("cpu", copy=True) for name, tensor in gathered if processes.main}


def shares_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A copy of tensors, or of this process's shares of them, in the CPU's memory."""
    if not any(map(sharded, tensors.values())):
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    plain = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    return DefaultStager(plain).stage(dict(tensors))  # type: ignore[return-value]
