"""Print how many kernels each function would have compiled by calls with random lengths, as JSON.

`python -m tests.gpu_path.lengths`: nothing is compiled, which makes it quick. A kernel counts by its key.
"""

import json
import os
import random
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from tests import gpu_path
from tests.gpu_path.driver import full_name

CALLS = 200
LONGEST = 300
HEADS, KEY_HEADS, HEAD_DIM, WIDTH, VOCAB = 2, 1, 16, 32, 48


def tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def attention(tokens: tuple[int, ...], others: tuple[int, ...], **bounds: Any) -> None:
    """The queries are a part of a larger product, as in the model."""
    from kernels import flash_attention

    q, kv = tensor(*tokens, 3 * HEADS, HEAD_DIM)[..., :HEADS, :], tensor(*others, 2 * KEY_HEADS, HEAD_DIM)
    out, lse = flash_attention(q, *kv.chunk(2, dim=-2), window=1 + len(q), return_lse=True, **bounds)
    # A gradient of the log-sum-exp may begin anywhere in memory.
    torch.autograd.backward((out, lse), (torch.zeros_like(out), torch.zeros(lse.numel() + 1)[1:].view_as(lse)))


def dense(length: int, other: int) -> None:
    attention((1 + other % 3, length), (1 + other % 3, other))


def packed(length: int, other: int) -> None:
    bounds = torch.tensor([0, 0, length, length + other], dtype=torch.int32)[1 - other % 2 :]
    names = {f"cu_seqlens_{side}": bounds for side in "qk"} | {
        f"max_seqlen_{side}": max(length, other) for side in "qk"
    }
    attention((length + other,), (length + other,), **names)


def decode(length: int, other: int) -> None:
    from kernels import decode_attention

    batch, room = 1 + other % 5, length * other
    # A cache as large as it says would take long to set to zero.
    k, v = torch.zeros(8, 1, 2 * KEY_HEADS, HEAD_DIM, dtype=torch.bfloat16)[other % 3 :].chunk(2, dim=2)
    k, v = (each.expand(-1, room, -1, -1) for each in (k, v))
    q = torch.zeros(batch, 1 + other % 3, 3 * HEADS, HEAD_DIM, dtype=torch.bfloat16)[:, :, :HEADS]
    decode_attention(q, k[:batch], v[:batch], torch.zeros(9, dtype=torch.int64)[other % 2 :][:batch], window=room)


def paged(length: int, other: int) -> None:
    from kernels import decode_attention

    k, v = torch.zeros(2, 3, 16, KEY_HEADS, HEAD_DIM, dtype=torch.bfloat16)
    table = torch.zeros(8, length + other, dtype=torch.int32)[other % 3 :, other % 2 :][:3, :length]
    q = torch.zeros(3, 1, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    decode_attention(q, k, v, torch.zeros(3, dtype=torch.int32), block_table=table)


def norm(length: int, other: int) -> None:
    from kernels import layer_norm, rms_norm, silu_mul

    x, weight = tensor(length, WIDTH), torch.ones(WIDTH, requires_grad=True)
    y, summed = layer_norm(x, weight, residual=x)
    # Heads of a query or key, as in the model.
    heads: Any = rms_norm(tensor(length, 3 * HEADS, HEAD_DIM)[:, :HEADS], torch.ones(HEAD_DIM, requires_grad=True))
    ((y + summed).sum() + heads.sum() + silu_mul(x).sum()).backward()


def loss(length: int, other: int) -> None:
    from kernels import linear_cross_entropy, linear_log_probs

    # In fp32, since the products are made, and a CPU compiles each shape of them anew in bf16.
    hidden, weight = (tensor(rows, WIDTH, dtype=torch.float32) for rows in (length, VOCAB))
    targets = torch.zeros(length + 3, dtype=torch.int64)[other % 4 :][:length]
    linear_cross_entropy(hidden, weight, targets).backward()
    log_probs, entropy = linear_log_probs(hidden, weight, targets)
    (log_probs + entropy).sum().backward()


class Nothing:
    """A kernel that was not compiled."""

    function, packed_metadata = 0, ()

    def launch_metadata(self, *unused: Any) -> None: ...
    def run(self, *unused: Any) -> None: ...


def do_not_compile(note: Callable[[str, str], None]) -> None:
    """Tell `note` the name and the key of each kernel, in place of compiling it."""
    os.environ["GPT_KERNELS"] = "triton"  # without a probe, which would find that nothing runs
    from triton import knobs

    def take(*, key: str, fn: Any, **unused: Any) -> bool:
        note(full_name(fn.jit_function), key)
        fn.jit_function.device_caches[torch.cuda.current_device()][0][key] = Nothing()
        return True

    knobs.runtime.jit_cache_hook = take


def main() -> None:
    gpu_path.install(90)
    keys: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    do_not_compile(lambda name, key: keys[call.__name__][name].add(key))
    chance = random.Random(0)
    pairs = [(1, 1), *((chance.randint(1, LONGEST), chance.randint(1, LONGEST)) for _ in range(CALLS - 1))]
    calls: tuple[Callable[[int, int], None], ...] = (dense, packed, decode, paged, norm, loss)
    for call in calls:
        for pair in pairs:
            call(*pair)
    print(json.dumps({name: {kernel: len(each) for kernel, each in found.items()} for name, found in keys.items()}))


if __name__ == "__main__":
    main()
