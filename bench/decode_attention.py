"""Decode attention, ours and its peers in one process: bytes of cache read per second, beside those that a copy moves.

One new token for each sequence, whose part of the cache is full, so that peers need no mask. Calls run one after the
other as in generation, in a CUDA graph where there is a GPU, and each reads another cache, until the nearer memories
have forgotten the first. All are compared with float64 at a small size before they get a figure.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import cycle, product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.timing import TOLERANCE, copy_bandwidth, median_seconds, outcome
from engine.runtime import Runtime
from kernels import decode_attention
from kernels.attention.reference import attention_reference
from kernels.backend import backend

WIDTH = 2048  # query heads times head dim
HEAD_DIMS = (64, 128)
GROUPS = (1, 4)
BATCHES = {"cuda": (1, 8, 64), "cpu": (1, 8)}
KEYS = {"cuda": (1024, 4096, 16384, 32768), "cpu": (256, 1024)}
BLOCK = 16  # keys, of the paged cache
# What is read between two readings of the same cache, at least: several times what the nearer memories hold.
BYTES_BETWEEN = 2**28

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    batch: int
    keys: int
    head_dim: int
    group: int  # query heads per key head
    width: int = WIDTH

    @property
    def key_heads(self) -> int:
        return self.width // self.head_dim // self.group

    def cache_bytes(self, element_size: int) -> int:
        return 2 * self.batch * self.keys * self.key_heads * self.head_dim * element_size


@contextmanager
def ours(shape: Shape, device: torch.device) -> Iterator[Attend]:
    lengths = torch.full((shape.batch,), shape.keys, dtype=torch.int32, device=device)
    yield lambda q, k, v: decode_attention(q, k, v, lengths)


@contextmanager
def paged(shape: Shape, device: torch.device) -> Iterator[Attend]:
    """Blocks in disorder: each sequence reads its own keys, which softmax takes in any order."""
    lengths = torch.full((shape.batch,), shape.keys, dtype=torch.int32, device=device)
    blocks = shape.keys // BLOCK
    first = torch.arange(shape.batch, device=device)[:, None] * blocks
    table = (torch.rand(shape.batch, blocks, device=device).argsort() + first).int()
    size = (-1, BLOCK, shape.key_heads, shape.head_dim)
    yield lambda q, k, v: decode_attention(q, k.view(size), v.view(size), lengths, block_table=table)


@contextmanager
def plain(shape: Shape, device: torch.device) -> Iterator[Attend]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.view(shape.batch, shape.key_heads, shape.group, shape.head_dim)
        return ((q @ k.mT * shape.head_dim**-0.5).softmax(-1) @ v).view(shape.batch, -1, 1, shape.head_dim)

    yield attend


def sdpa(name: str) -> "Provider":
    @contextmanager
    def provider(shape: Shape, device: torch.device) -> Iterator[Attend]:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        with sdpa_kernel(getattr(SDPBackend, name)):
            yield lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=shape.group > 1)

    return provider


@contextmanager
def flex(shape: Shape, device: torch.device) -> Iterator[Attend]:
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    run = torch.compile(flex_attention, dynamic=False)
    yield lambda q, k, v: run(q, k, v, enable_gqa=shape.group > 1)


Provider = Callable[[Shape, torch.device], AbstractContextManager[Attend]]
PROVIDERS: dict[str, Provider] = {
    "ours": ours,
    "paged": paged,
    "plain": plain,
    "flash": sdpa("FLASH_ATTENTION"),
    "efficient": sdpa("EFFICIENT_ATTENTION"),
    "cudnn": sdpa("CUDNN_ATTENTION"),
    "flex": flex,
}
# flex is compiled anew at every point.
DEFAULT = ("ours", "paged", "plain", "flash", "efficient", "cudnn")


def bench_decode_attention(
    runtime: Runtime,
    *,
    head_dims: Sequence[int] = HEAD_DIMS,
    groups: Sequence[int] = GROUPS,
    batches: Sequence[int] = BATCHES["cuda"],
    keys: Sequence[int] = KEYS["cuda"],
    providers: Sequence[str] = DEFAULT,
) -> Iterator[dict[str, Any]]:
    """The result so far, after every point: for each provider seconds, bytes of cache per second and their `share` of
    what a copy reads and writes, or the `reason` why there are none."""
    result: dict[str, Any] = {
        "precision": runtime.precision,
        "backend": backend(runtime.device),
        "copy_bytes_per_second": copy_bandwidth(runtime.device),
        "checks": [],
        "points": [],
    }
    for head_dim, group in product(head_dims, groups):
        small = Shape(2, 512, head_dim, group, width=512)
        verdicts = {name: outcome(check, name, small, runtime) for name in providers}
        result["checks"].append({"head_dim": head_dim, "group": group, **verdicts})
        for batch, length in product(batches, keys):
            shape = Shape(batch, length, head_dim, group)
            figures = {
                name: verdict
                if "reason" in verdict
                else outcome(timed, name, shape, runtime, result["copy_bytes_per_second"])
                for name, verdict in verdicts.items()
            }
            size = shape.cache_bytes(runtime.dtype.itemsize)
            result["points"].append({**vars(shape), "cache_bytes": size, **figures})
            yield result


def check(name: str, shape: Shape, runtime: Runtime) -> dict[str, float]:
    """The relative error, against float64. Raises ArithmeticError for one that rounding does not explain."""
    q, k, v = inputs(name, shape, runtime)
    with PROVIDERS[name](shape, runtime.device) as attend:
        found = swapped(name, attend(q, k, v))
    exact, _ = attention_reference(*(swapped(name, each).double() for each in (q, k, v)))
    error = ((found - exact).norm() / exact.norm()).item()
    # Not `>`: NaN is wrong too.
    if not error <= TOLERANCE[runtime.precision]:
        raise ArithmeticError(f"wrong: the relative error is {error:.2g}")
    return {"relative_error": error}


def timed(name: str, shape: Shape, runtime: Runtime, copied: float) -> dict[str, float]:
    size = shape.cache_bytes(runtime.dtype.itemsize)
    q, k, v = inputs(name, shape, runtime)
    others = [(torch.randn_like(k), torch.randn_like(v)) for _ in range(BYTES_BETWEEN // size)]
    with PROVIDERS[name](shape, runtime.device) as attend, torch.inference_mode():
        turns = cycle([(k, v), *others])
        seconds = seconds_in_a_row(lambda: attend(q, *next(turns)), runtime.device)
    return {"seconds": seconds, "bytes_per_second": size / seconds, "share": size / seconds / copied}


def seconds_in_a_row(function: Callable[[], Any], device: torch.device) -> float:
    """Of one call among many. Emptying the L2 cache between them, as median_seconds does, would leave it full of lines
    that have yet to be written, at the cost of the call that follows."""
    if device.type != "cuda":
        return median_seconds(function, device)
    from triton.testing import do_bench_cudagraph

    with torch.cuda.device(device):
        return do_bench_cudagraph(function, rep=10, return_mode="median") / 1000


def inputs(name: str, shape: Shape, runtime: Runtime) -> tuple[Tensor, Tensor, Tensor]:
    """Random q, k, v, dense in the layout of the provider."""
    queries = (shape.batch, 1, shape.key_heads * shape.group, shape.head_dim)
    keys = (shape.batch, shape.keys, shape.key_heads, shape.head_dim)
    q, k, v = (
        torch.randn(size if name in ("ours", "paged") else (size[0], size[2], size[1], size[3]), device=runtime.device,
                    dtype=runtime.dtype)
        for size in (queries, keys, keys)
    )  # fmt: skip
    return q, k, v


def swapped(name: str, tensor: Tensor) -> Tensor:
    """From the layout of a provider, [B, T, H, D] of ours and [B, H, T, D] of the peers, to the first."""
    return tensor if name in ("ours", "paged") else tensor.transpose(1, 2)
