"""One model on many processes: a copy on each (DDP), or a share of it on each (FSDP2), with every tensor a DTensor."""

import contextlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Recipe
from engine.errors import InputError
from engine.planning import GIB, RESERVED, Setup, peak_memory, step_memory, total
from engine.processes import Processes
from engine.runtime import Runtime, free_memory

# The loss of a model on a batch, summed.
Loss = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Layout:
    """The layout of training: a share of the model on each process or all of it, and the parts of a micro-batch."""

    shard: bool = False
    parts: int = 1
    description: str = ""


def lay_out(recipe: Recipe, runtime: Runtime) -> Layout:
    """Choose a layout that should fit: the whole model unless asked otherwise, and as few parts as possible.

    Decided before training: one process that runs out of memory would leave the others waiting, and on a CPU it is
    killed. Raises InputError for what cannot be done.
    """
    count, model = runtime.processes.count, recipe.model
    if count == 1 and runtime.device.type == "cuda":
        return Layout()
    # A share of the batch ends where a sequence does, at most one context later.
    tokens = recipe.tokens_per_pass // count + model.context

    def memory_for(shard: bool, parts: int) -> int:
        several = parts > 1 or recipe.tokens_per_pass < recipe.tokens_per_step
        kind, size, gpu = recipe.optimizer.kind, runtime.dtype.itemsize, runtime.device.type == "cuda"
        again = recipe.loop.checkpoint_activations
        # A part ends where a sequence does, too.
        at_a_time = tokens if parts == 1 else min(tokens, tokens // parts + model.context)
        return peak_memory(Setup(model, kind, at_a_time, size, gpu, count, shard, several, again, recipe.lora))

    cuts = [2**power for power in range((tokens // model.context).bit_length())]
    layouts = [False] if count == 1 else [False, True] if recipe.loop.shard is None else [recipe.loop.shard]
    memory = free_memory(runtime.device) if count == 1 else device_memory(runtime)
    options = [(shard, parts) for shard in layouts for parts in cuts]
    shard, parts = next((each for each in options if memory_for(*each) <= memory), options[-1])
    if shard and runtime.precision == "fp16":
        raise InputError("a sharded model cannot be trained with --precision fp16: use bf16 or fp32")
    need = f"{memory_for(shard, parts) / GIB:.3g} of {memory / GIB:.3g} GiB at the peak, by estimate"
    how = "a share of the model on each (FSDP)" if shard else "the model on each (DDP)"
    if count == 1:
        return Layout(False, parts, f"memory     micro-batches in {parts} parts: {need}") if parts > 1 else Layout()
    cut = f", micro-batches in {parts} parts" if parts > 1 else ""
    return Layout(shard, parts, f"processes  {count}, {how}{cut}: {need}")


def require_memory(recipe: Recipe, runtime: Runtime) -> None:
    """Raise InputError where not even the model's state fits into memory, before anything is read or written."""
    count = runtime.processes.count
    # How many tokens the vocabulary will have is not known yet.
    model, shard = replace(recipe.model, vocab_size=1), count > 1 and recipe.loop.shard is not False
    size = runtime.dtype.itemsize if recipe.lora.rank else 4
    setup = Setup(model, recipe.optimizer.kind, 1, size, ranks=count, shard=shard, lora=recipe.lora)
    need = total(step_memory(setup)["optimizer step"])
    if need > (there := device_memory(runtime)):
        raise InputError(
            f"weights, gradients and the optimizer's state of this model take {need / GIB:,.1f} GiB, and there are "
            f"{there / GIB:,.1f}; choose a smaller one with --set model.width=N or model.blocks=N, or more --gpus"
        )


def device_memory(runtime: Runtime) -> int:
    """Return the bytes that one process can count on."""
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_properties(runtime.device).total_memory - RESERVED
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def should_compile(recipe: Recipe, runtime: Runtime) -> bool:
    """Return whether to use torch.compile; unless told, on a GPU. On a CPU the minute to start it does not pay."""
    return runtime.device.type == "cuda" if recipe.loop.compile is None else recipe.loop.compile


def compile_loss(loss: Loss, trained: nn.Module, processes: Processes) -> Loss:
    """Return the loss, compiled. Several processes compile each block of the model instead.

    Then the gradients of a block can travel while those of the block before it are computed.
    """
    # Where compiling fails (no C compiler, say), that part runs as it is.
    torch._dynamo.config.suppress_errors = True
    if processes.count == 1:
        return torch.compile(loss)
    for block in blocks(trained):
        block.compile()
    return loss


class Objective(nn.Module):
    """A module of all that is trained. DDP and FSDP can follow its forward, from a batch to its summed loss."""

    def __init__(self, trained: nn.Module, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.trained, self.model, self.loss = trained, model, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


def distribute(objective: Objective, runtime: Runtime, layout: Layout) -> nn.Module:
    """Return the objective as all processes train it. Call it before making the optimizer: it replaces parameters."""
    if not layout.shard:
        objective.to(runtime.device)
        return replicate(objective) if runtime.processes.count > 1 else objective
    from torch.distributed.device_mesh import init_device_mesh

    shard(objective, init_device_mesh(runtime.device.type, (runtime.processes.count,)), runtime.dtype)
    return objective


def replicate(objective: nn.Module) -> nn.parallel.DistributedDataParallel:
    return nn.parallel.DistributedDataParallel(objective, gradient_as_bucket_view=True)


def shard(module: nn.Module, mesh: Any, dtype: torch.dtype = torch.float32) -> None:
    """Split every parameter over the mesh, by rows. Weights travel in `dtype`, gradients in fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # The model itself casts what it computes.
    narrow = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    policy = MixedPrecisionPolicy() if dtype == torch.float32 else narrow
    for block in blocks(module):
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def blocks(module: nn.Module) -> list[nn.Module]:
    """Return the Transformer blocks of all models in a module."""
    return [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part]


def synchronised(objective: nn.Module, now: bool) -> contextlib.AbstractContextManager[Any]:
    """Frame one forward and backward: `now` exchanges the gradients; else they add up for a later pass that does."""
    if isinstance(objective, nn.parallel.DistributedDataParallel) and not now:
        return objective.no_sync()
    if sync := getattr(objective, "set_requires_gradient_sync", None):
        sync(now)
    return contextlib.nullcontext()


def missing_parts(own: int, processes: Processes) -> int:
    """Return how many parts this process has fewer than the one with the most. All must call it at once.

    The weights of a sharded model travel from process to process for every part, forward and backward. One that
    took fewer parts than the others would not be there for the last exchanges, and they would wait for it for ever.
    """
    return int(max(count for (count,) in processes.gather(own, of="counts of parts"))) - own


def sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, without importing the class, which takes a second."""
    return hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """Return this process's share of a tensor, without a copy; all of it where it is not sharded."""
    return tensor.to_local() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: Tensor) -> Tensor:
    """Return the complete tensor, from the shares of all processes."""
    return tensor.full_tensor() if sharded(tensor) else tensor  # type: ignore[attr-defined]


def share_like(like: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor that every process has, sharded as another one is."""
    if not sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def exchange_rows(stack: Tensor, like: Tensor, count: int, *, back: bool = False) -> Tensor:
    """Exchange this process's rows of `count` matrices, sharded as `like`, for some whole matrices; or `back`.

    [count, own rows, columns] becomes [own matrices, rows, columns]. Without sharding a process has all rows of all.
    """
    if not sharded(like):
        return stack
    from torch.distributed.tensor import DTensor, Shard

    rows, columns = like.shape
    before, after = (Shard(0), Shard(1)) if back else (Shard(1), Shard(0))
    shape, stride = torch.Size((count, rows, columns)), (rows * columns, columns, 1)
    dealt = DTensor.from_local(stack, like.device_mesh, [before], shape=shape, stride=stride)  # type: ignore[attr-defined]
    return dealt.redistribute(placements=[after]).to_local()


def sum_of_shares(own: Tensor, like: Tensor) -> Tensor:
    """Return the sum over all processes of what each has made of its share of a tensor sharded as `like`."""
    if not sharded(like):
        return own
    from torch.distributed.tensor import DTensor, Partial

    return DTensor.from_local(own, like.device_mesh, [Partial()]).full_tensor()  # type: ignore[attr-defined]


def whole_on_host(module: nn.Module, processes: Processes) -> dict[str, Tensor]:
    """Return a copy of all weights in the main process's CPU memory; the others only send their shares, one by one."""
    gathered = ((name, whole(tensor.detach())) for name, tensor in module.state_dict().items())
    return {name: tensor.to("cpu", copy=True) for name, tensor in gathered if processes.main}


def shares_on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a copy of tensors, or of this process's shares of them, in CPU memory."""
    if not any(map(sharded, tensors.values())):
        return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    plain = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    return DefaultStager(plain).stage(dict(tensors))  # type: ignore[return-value]
