"""The kernels and their peers: attention, decode attention, norms, and the last layer with its loss."""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import cycle
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import harness, plain
from bench.harness import Case, Figures, Function, Tensors, as_it_is
from engine.runtime import Runtime, wall_seconds
from kernels import decode_attention, flash_attention, layer_norm, linear_cross_entropy, rms_norm
from kernels.attention.reference import attention_reference

WIDTH = 2048  # heads times head dim
BLOCK = 16  # keys, of the paged cache
# So much is read, at least, between two readings of the same cache: several times what the nearer memories hold.
BYTES_BETWEEN = 2**28
# These are measured unless others are asked for. A CPU gets through less in the two or three minutes of a run.
LENGTHS = {"cuda": (512, 1024, 2048, 4096, 8192, 16384), "cpu": (128, 256, 512, 1024)}
TOKENS = {"cuda": 16384, "cpu": 1024}  # batch times length
BATCHES = {"cuda": (1, 8, 64), "cpu": (1, 8)}
KEYS = {"cuda": (1024, 4096, 16384, 32768), "cpu": (256, 1024)}
WIDTHS = {"cuda": (256, 512, 768, 1024, 2048, 4096), "cpu": (256, 768, 1024)}
ROWS = {"cuda": 16384, "cpu": 4096}
# Vocabulary and width: the presets nano and tiny, then Llama 3's vocabulary with the width of its 1B and 8B models.
SHAPES = {
    "cuda": ((4096, 128), (28000, 256), (128256, 2048), (128256, 4096)),
    "cpu": ((4096, 128), (28000, 256), (128256, 256)),
}
LOSS_TOKENS = {"cuda": 16384, "cpu": 2048}
ATTENTION = ("ours", "packed", "plain", "flash", "efficient", "cudnn", "flex")
DECODE = ("ours", "paged", "plain", "flash", "efficient", "cudnn", "flex")
NORMS = ("ours", "torch", "compiled")
LOSSES = {"ours": linear_cross_entropy, "plain": plain.cross_entropy, "half": plain.half_cross_entropy}


def random_tensors(runtime: Runtime, *sizes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(size, device=runtime.device, dtype=runtime.dtype) for size in sizes]


@functools.lru_cache(maxsize=1)
def compiled(function: Function, *case: Any) -> Function:
    # It is compiled for one case alone: dynamic shapes are slower, and torch compiles a function only so many times.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


@contextmanager
def compiled_to_repeat(function: Function, *case: Any) -> Iterator[Function]:
    """Yield it such that a backward pass can run again: it may else write over what it reads."""
    import torch._functorch.config

    with torch._functorch.config.patch(donated_buffer=False):
        yield compiled(function, *case)


@contextmanager
def sdpa(backend: str, **options: Any) -> Iterator[Function]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        yield partial(F.scaled_dot_product_attention, **options)


FUSED = {
    "flash": partial(sdpa, "FLASH_ATTENTION"),
    "efficient": partial(sdpa, "EFFICIENT_ATTENTION"),
    "cudnn": partial(sdpa, "CUDNN_ATTENTION"),
}


@contextmanager
def flex(device: torch.device, *case: Any, causal: int = 0, grouped: bool = False) -> Iterator[Function]:
    """Yield flex attention, with a causal mask for this many queries and keys, if any."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None
    if causal:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, causal, causal, device=str(device))
    with compiled_to_repeat(flex_attention, *case) as run:
        yield partial(run, block_mask=mask, enable_gqa=grouped)


def liked(name: str, tensor: Tensor) -> Tensor:
    """Return it dense in the layout that a provider likes: ours [B, T, H, D], the others [B, H, T, D]; or back."""
    return tensor if name in ("ours", "packed", "paged") else tensor.transpose(1, 2).contiguous()


def attention(runtime: Runtime, head_dim: int, causal: bool, length: int, batch: int, width: int = WIDTH) -> Case:
    """Attention as in training, with as many queries as keys, in FLOP/s of the matrix products alone."""
    heads, device = width // head_dim, runtime.device
    size = (batch, length, heads, head_dim)
    shape = {"head_dim": head_dim, "causal": causal, "length": length, "batch": batch, "width": width}
    forward = 4 * batch * length**2 * width / (2 if causal else 1)
    # The backward has five products where the forward has two.
    flops = {"forward": forward, "backward": 2.5 * forward}

    @contextmanager
    def written_out() -> Iterator[Function]:
        scores_bytes = 4 * batch * heads * length**2
        # A GPU says that it has no more memory; on a CPU the system would end the process.
        if device.type == "cpu" and 4 * scores_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2:
            raise MemoryError(f"the score matrices take {scores_bytes / 2**30:.0f} GiB each")
        yield partial(plain.attention, hidden=plain.future(length, device) if causal else None)

    bounds = torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device)
    ends: Any = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": length, "max_seqlen_k": length}

    def packed(*qkv: Tensor) -> Tensor:
        out: Any = flash_attention(*(each.flatten(0, 1) for each in qkv), causal=causal, **ends)
        return out.view(size)

    return Case(
        place={**shape, "heads": heads},
        providers={
            "ours": as_it_is(partial(flash_attention, causal=causal)),
            "packed": as_it_is(packed),
            "plain": written_out,
            **{name: partial(provider, is_causal=causal) for name, provider in FUSED.items()},
            "flex": partial(flex, device, *size, causal=length * causal),
        },
        exact=lambda q, k, v: attention_reference(q, k, v, causal=causal)[0],
        draw=lambda: (random_tensors(runtime, size, size, size), random_tensors(runtime, size)),
        arrange=liked,
        rates=lambda direction, seconds: {"flops_per_second": flops[direction] / seconds},
        small=lambda: attention(runtime, head_dim, causal, 512, 1, 512),
        checked=("head_dim", "causal"),
    )


def decode(
    runtime: Runtime, copied: float, head_dim: int, group: int, batch: int, keys: int, width: int = WIDTH
) -> Case:
    """One new token for each sequence, whose part of the cache is full, so that peers need no mask.

    Calls run one after the other as in generation, and each reads another cache, until the nearer memories have
    forgotten the first. `group`: query heads per key head; `copied`: the bytes per second that a copy moves.
    """
    key_heads = width // head_dim // group
    query, cache = (batch, 1, key_heads * group, head_dim), (batch, keys, key_heads, head_dim)
    shape = {"batch": batch, "keys": keys, "head_dim": head_dim, "group": group, "width": width}
    cache_bytes = 2 * batch * keys * key_heads * head_dim * runtime.dtype.itemsize

    @contextmanager
    def ours(pages: bool) -> Iterator[Function]:
        lengths = torch.full((batch,), keys, dtype=torch.int32, device=runtime.device)
        attend = partial(decode_attention, cache_lengths=lengths)
        # Blocks in disorder: each sequence reads its own keys, which softmax takes in any order.
        first = torch.arange(batch, device=runtime.device)[:, None] * (keys // BLOCK)
        table = (torch.rand(batch, keys // BLOCK, device=runtime.device).argsort() + first).int()
        blocks = (-1, BLOCK, key_heads, head_dim)
        yield (lambda q, k, v: attend(q, k.view(blocks), v.view(blocks), block_table=table)) if pages else attend

    def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain.attention(q.view(batch, key_heads, group, head_dim), k, v).view(q.shape)

    def clock(attend: Function, arguments: Tensors, _: Tensors, direction: str, device: torch.device) -> Figures:
        q, *read = arguments
        others = [[torch.randn_like(each) for each in read] for _ in range(BYTES_BETWEEN // cache_bytes)]
        turns = cycle([read, *others])
        with torch.inference_mode():
            return {"seconds": harness.median_seconds(lambda: attend(q, *next(turns)), device, in_a_row=True)}

    return Case(
        place={**shape, "cache_bytes": cache_bytes},
        providers={
            "ours": partial(ours, False),
            "paged": partial(ours, True),
            "plain": as_it_is(written_out),
            **{name: partial(provider, enable_gqa=group > 1) for name, provider in FUSED.items()},
            "flex": partial(flex, runtime.device, *cache, grouped=group > 1),
        },
        exact=lambda q, k, v: attention_reference(q, k, v)[0],
        draw=lambda: (random_tensors(runtime, query, cache, cache), ()),
        arrange=liked,
        directions=("",),
        clock=clock,
        rates=lambda _, seconds: bandwidth(cache_bytes, seconds, cache_bytes / copied),
        small=lambda: decode(runtime, copied, head_dim, group, 2, 512, 512),
        checked=("head_dim", "group"),
    )


def bandwidth(moved: int, seconds: float, copy: float) -> Figures:
    return {"bytes_per_second": moved / seconds, "share": copy / seconds}


def norm(runtime: Runtime, rows: int, width: int, residual: bool, rms: bool = False) -> Case:
    """LayerNorm or RMSNorm, without or with the addition of a residual stream, beside a copy of as many bytes.

    Forward: x is read, y written. Backward: dy and x are read, dx written. With the addition one tensor more is read,
    and in the forward one more written. The parameters' few bytes are not counted.
    """
    x, weight, outputs = (rows, width), (width,), 1 + residual
    numbers = {"forward": 2 * outputs * rows * width, "backward": (2 + outputs) * rows * width}

    @functools.cache
    def copy(direction: str) -> float:
        source = torch.randn(numbers[direction] // 2, device=runtime.device, dtype=runtime.dtype)
        return clock(torch.clone, [source], [], "forward", runtime.device)["seconds"]

    def clock(function: Function, arguments: Tensors, out: Tensors, direction: str, device: torch.device) -> Figures:
        if device.type == "cpu":
            return harness.clock(function, arguments, out, direction, device)
        # Most widths take less time than the host needs to launch them, so that host time would be all that is seen.
        size = sum(each.nbytes for each in (*arguments, *out))
        with torch.cuda.stream(torch.cuda.Stream(device)):
            turns = []
            for _ in range(1 + BYTES_BETWEEN // size):
                inputs, gradients = ([each.clone() for each in group] for group in (arguments, out))
                turns.append(harness.prepare(function, inputs, gradients, direction))
            return {"seconds": harness.graph_seconds(turns, device)}

    def ours(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Any:
        return (rms_norm if rms else layer_norm)(x, weight, residual=residual)

    theirs = partial(plain.norm, function=F.rms_norm if rms else F.layer_norm)

    return Case(
        place={"width": width, "residual": residual},
        providers={
            "ours": as_it_is(ours),
            "torch": as_it_is(theirs),
            "compiled": partial(compiled_to_repeat, theirs, rows, width, residual),
        },
        exact=theirs,
        draw=lambda: (random_tensors(runtime, x, weight, *[x] * residual), random_tensors(runtime, *[x] * outputs)),
        clock=clock,
        rates=lambda way, seconds: bandwidth(numbers[way] * runtime.dtype.itemsize, seconds, copy(way)),
    )


def loss(runtime: Runtime, tokens: int, vocab: int, width: int) -> Case:
    """The last layer and its loss: time, and the memory that a call adds to its arguments, gradients included.

    The weight is kept in fp32 and multiplied in the precision of the run, as in training. `seconds` is forward and
    backward, `forward_seconds` forward alone where no gradient is wanted.
    """

    def draw() -> tuple[Tensors, Tensors]:
        torch.manual_seed(0)
        (hidden,) = random_tensors(runtime, (tokens, width))
        # Logits have the size of one. In place: a copy would count as memory that was held before.
        weight = torch.randn(vocab, width, device=runtime.device).mul_(width**-0.5)
        return [hidden, weight, torch.randint(vocab, (tokens,), device=runtime.device)], ()

    def clock(function: Function, arguments: Tensors, _: Tensors, direction: str, device: torch.device) -> Figures:
        # On a CPU one call: it is seconds long, and the peers want to take turns.
        seconds = harness.median_seconds if device.type == "cuda" else wall_seconds
        both = seconds(loss_step(function, arguments), device)
        with torch.no_grad():
            return {"seconds": both, "forward_seconds": seconds(lambda: function(*arguments), device)}

    def finish(name: str) -> Figures:
        work = partial(warmed_up, name, runtime, tokens, vocab, width)
        return {"peak_bytes": harness.added_memory(work, runtime, fresh=runtime.device.type == "cpu")}

    return Case(
        place={"vocab": vocab, "width": width},
        providers={
            **{name: as_it_is(function) for name, function in LOSSES.items()},
            "compiled": lambda: nullcontext(compiled(plain.cross_entropy, tokens, vocab, width)),
        },
        exact=plain.half_cross_entropy,
        draw=draw,
        directions=("figures",),
        points="shapes",
        prepare=loss_step,
        clock=clock,
        finish=finish,
        small=lambda: loss(runtime, 256, 1000, 64),
    )


def loss_step(function: Function, arguments: Tensors, *_: Any) -> Function:
    """Return a function of no arguments to the loss and its two gradients."""
    leaves = [each.detach().requires_grad_() for each in arguments[:2]]

    def step() -> list[Tensor]:
        value = function(*leaves, arguments[2])
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    return step


def warmed_up(name: str, runtime: Runtime, tokens: int, vocab: int, width: int) -> Function:
    """Return a step after a first one: what libraries keep is not counted."""
    case = loss(runtime, tokens, vocab, width)
    # A process on a CPU has one peak, which cannot be reset, so that little must do.
    first = case if runtime.device.type == "cuda" else loss(runtime, 256, 256, 64)
    with case.providers[name]() as function:
        loss_step(function, first.draw()[0])()
        return loss_step(function, case.draw()[0])
