"""Tile sizes: per kernel, family of architectures and head dim, the row that runs, then others that wait to be timed.

Registers (of 255 a thread) and shared memory are what the compiler (Triton 3.7) says of bf16, causal and packed. No row
that runs spills there; what does with other options is listed in bench/compile_report.py. Rows for head dim 64 on sm_90
without an end (`longest`) were timed on an H200 (bench/results/attention-tiles-nvidia-h200.json): the first is the
fastest that does not spill. Elsewhere what runs is what the instructions of its inner loop allow on paper (`gpt
bench-compile --model`), in an order that was fitted to those timed rows (rank correlation 0.8 to 0.9): what counts is
the slowest unit of the chip, and how many programs a multiprocessor holds (it has 65,536 registers), as the products of
one run during the exponentials of another. The forward kernel at head dim 128 keeps the row that the H200 has run.

Short sequences have few tiles for each program. Their rows have no descriptors, which each program would have to make
first, and small tiles, of which the diagonal wastes less.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """Queries (for decode: rows) and keys per block, warps per program, stages of the load pipeline.

    descriptors: the copy engine (TMA) loads the tiles. split: tiles that need no mask have a loop of their own ("keys"
    without a window only; the other kernels always do so). longest: the row is for sequences of up to so many tokens.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    descriptors: bool = False
    split: bool = True
    longest: int | None = None


HEAD_DIMS = (32, 64, 128, 256)
# (kernel, family, largest head dim)
# fmt: off
TABLE: dict[tuple[str, str, int], tuple[Tile, ...]] = {
    ("forward", "sm_90", 32): (Tile(64, 64, 4, 2, longest=512),  # 104 registers: four programs at a time
                               Tile(64, 128, 4, 3, True),  # 150: three programs at a time
                               Tile(128, 64, 4, 3, True),  # 167: three
                               Tile(128, 128, 8, 3, True)),  # 153
    ("forward", "sm_90", 64): (Tile(64, 64, 4, 2, longest=512),  # 127 registers: four programs at a time
                               Tile(64, 128, 4, 2, True),  # 155: three programs at a time
                               Tile(128, 64, 8, 3, True),  # 109 registers: two programs at a time
                               Tile(128, 128, 8, 2, True),  # 164
                               Tile(128, 128, 8, 3, True)),  # 164
    ("forward", "sm_90", 128): (Tile(128, 128, 8, 2, True),  # 200 registers, 161 KiB
                                Tile(128, 64, 8, 3, True),  # 164
                                Tile(64, 64, 4, 3, True),  # 145, 113 KiB: two programs at a time
                                Tile(128, 128, 8, 2)),  # 246: what descriptors save
    ("forward", "sm_90", 256): (Tile(64, 32, 4, 2, True),  # 232 registers, 96 KiB: two programs at a time
                                Tile(64, 64, 8, 2, True),  # 181
                                Tile(128, 64, 8, 2, True)),  # 249
    ("keys", "sm_90", 32): (Tile(32, 64, 4, 2, longest=512),  # 154 registers: three programs at a time
                            Tile(32, 128, 4, 2, True),  # 240: two programs at a time
                            Tile(64, 128, 8, 2, True),  # 255
                            Tile(64, 64, 4, 3, True, split=False)),  # 215
    ("keys", "sm_90", 64): (Tile(32, 64, 4, 2, split=False, longest=512),  # 163 registers: three programs at a time
                            Tile(32, 64, 4, 2, True),  # 191
                            Tile(64, 128, 8, 3, True, split=False),  # 247
                            Tile(64, 64, 4, 2, True, split=False),  # 251: two programs at a time
                            Tile(64, 128, 8, 2, split=False)),  # 219
    # In one loop: two, or 64 queries, spill.
    ("keys", "sm_90", 128): (Tile(32, 64, 4, 2, True, split=False),  # 253 registers, 64 KiB: two programs at a time
                             Tile(32, 128, 8, 2, True, split=False),  # 254
                             Tile(64, 64, 8, 2, True, split=False)),  # 248
    ("keys", "sm_90", 256): (Tile(32, 32, 8, 1, True, split=False),),  # 178 registers; in two loops it spills
    ("queries", "sm_90", 32): (Tile(64, 64, 4, 2, longest=512),  # 121 registers: four programs at a time
                               Tile(64, 64, 4, 3, True),  # 113: four
                               Tile(128, 64, 8, 3, True),  # 113
                               Tile(128, 128, 8, 3, True)),  # 177
    ("queries", "sm_90", 64): (Tile(64, 64, 4, 2, longest=512),  # 168 registers: three programs at a time
                               Tile(128, 64, 8, 3, True),  # 122: two
                               Tile(64, 64, 4, 3, True),  # 122
                               Tile(128, 128, 8, 2, True)),  # 216
    ("queries", "sm_90", 128): (Tile(64, 64, 4, 2, True),  # 173 registers, 97 KiB: two programs at a time
                                Tile(128, 64, 8, 2, True),  # 182
                                Tile(128, 64, 8, 3, True),  # 180
                                Tile(128, 128, 8, 2, True)),  # 245
    ("queries", "sm_90", 256): (Tile(64, 32, 8, 2, True),  # 188 registers; with one stage it spills
                                Tile(32, 32, 8, 1, True)),  # 128
    # Decode waits for memory, not for products. What counts is how many bytes are under way: here 32 to 64 KiB for each
    # program, with two to four programs on a multiprocessor. A row is a new token of one of the heads that share a key
    # head. "decode" is for up to 16 rows, the fewest that tensor cores multiply, "decode-tall" for more. Compiled paged
    # and split.
    ("decode", "sm_90", 32): (Tile(16, 128, 4, 4), Tile(16, 64, 4, 4)),  # 78, 65 registers
    ("decode", "sm_90", 64): (Tile(16, 128, 4, 3), Tile(16, 64, 4, 4)),  # 114, 80 registers
    ("decode", "sm_90", 128): (Tile(16, 64, 4, 3), Tile(16, 32, 4, 4)),  # 164, 114 registers
    ("decode", "sm_90", 256): (Tile(16, 32, 8, 3),),  # 113 registers; 4 warps spill
    ("decode-tall", "sm_90", 32): (Tile(64, 64, 4, 4),),  # 96 registers
    ("decode-tall", "sm_90", 64): (Tile(64, 64, 4, 3),),  # 144 registers
    ("decode-tall", "sm_90", 128): (Tile(64, 32, 4, 4), Tile(64, 64, 8, 3)),  # 178, 148 registers
    ("decode-tall", "sm_90", 256): (Tile(64, 32, 8, 3),),  # 191 registers, 128 KiB
    # sm_100: its tensor cores add up in a memory of their own, and take as long for 64 rows as for 128.
    ("forward", "sm_100", 256): (Tile(128, 64, 8, 2, True),),  # 234 registers
    ("queries", "sm_100", 32): (Tile(128, 64, 4, 3, True), Tile(64, 64, 4, 3, True)),  # 159, 119 registers
    # With 4 warps the bounds are 5% higher, and windows spill.
    ("queries", "sm_100", 64): (Tile(128, 64, 8, 2, True), Tile(128, 64, 8, 3, True)),  # 127 registers
    ("queries", "sm_100", 128): (Tile(128, 64, 8, 2, True), Tile(64, 64, 4, 2, True)),  # 173, 165 registers
    ("queries", "sm_100", 256): (Tile(128, 32, 8, 1, True), Tile(64, 32, 4, 1, True)),  # 191, 186 registers
    ("keys", "sm_100", 32): (Tile(32, 64, 4, 2, True), Tile(64, 128, 8, 2, True, split=False)),
    ("keys", "sm_100", 64): (Tile(32, 64, 4, 2, True),  # 209 registers: two programs at a time
                             Tile(32, 128, 8, 2, True, split=False)),  # 184
    ("keys", "sm_100", 128): (Tile(64, 64, 4, 1, True, split=False),  # 206 registers: two programs at a time
                              Tile(64, 128, 8, 1, True, split=False)),  # 205
    # sm_120: descriptors save registers. In two loops dk and dv spill, and in one the mask waits for the tensor cores.
    ("keys", "sm_120", 32): (Tile(32, 64, 4, 2, True, split=False),),  # 161 registers: three programs at a time
    ("keys", "sm_120", 64): (Tile(32, 64, 4, 2, split=False),),  # 174 registers; with descriptors it spills
    ("keys", "sm_120", 128): (Tile(32, 64, 8, 2, split=False), Tile(32, 64, 8, 2)),  # 168, 224 registers
    ("forward", "sm_120", 32): (Tile(64, 64, 4, 2, True),  # 100 registers: four programs at a time
                                Tile(64, 128, 4, 2, True)),  # 152
    ("forward", "sm_120", 64): (Tile(64, 64, 4, 2, True),  # 140 registers: three programs at a time
                                Tile(64, 32, 4, 2, True)),  # 119
    ("forward", "sm_120", 128): (Tile(64, 32, 4, 2, True),  # 168 registers: two programs at a time
                                 Tile(64, 64, 4, 2, True)),  # 189
    ("forward", "sm_120", 256): (Tile(64, 32, 4, 1, True), Tile(64, 32, 8, 1, True)),  # 242, 172 registers
    ("queries", "sm_120", 32): (Tile(64, 64, 4, 2, True), Tile(64, 32, 4, 2, True)),  # 135, 98 registers
    ("queries", "sm_120", 64): (Tile(64, 32, 4, 2, True),),  # 169 registers: two programs at a time
    ("queries", "sm_120", 128): (Tile(64, 16, 4, 2, True), Tile(64, 32, 4, 1, True)),  # 167, 199 registers
    ("queries", "sm_120", 256): (Tile(32, 32, 4, 1, True), Tile(32, 16, 4, 1, True)),  # 202, 168 registers
    # For sm_80 and sm_89 (99 KiB of shared memory), the larger count of the two. Descriptors are turned back into
    # pointers there, at the price of spills.
    ("forward", "sm_80", 32): (Tile(128, 64, 4, 2),),  # 214 registers
    ("forward", "sm_80", 64): (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2)),  # 181, 191 registers
    ("forward", "sm_80", 128): (Tile(64, 64, 8, 2), Tile(128, 64, 8, 2)),  # 158, 245 registers
    ("forward", "sm_80", 256): (Tile(64, 32, 8, 1),),  # 202 registers
    ("keys", "sm_80", 32): (Tile(32, 64, 4, 2),),  # 208 registers
    ("keys", "sm_80", 64): (Tile(32, 64, 4, 2), Tile(32, 128, 8, 2)),  # 242, 220 registers
    ("keys", "sm_80", 128): (Tile(32, 64, 8, 2),),  # 234 registers
    ("keys", "sm_80", 256): (Tile(16, 32, 8, 1),),  # 210 registers
    ("queries", "sm_80", 32): (Tile(64, 32, 4, 2), Tile(64, 64, 4, 2)),  # 96, 180 registers
    ("queries", "sm_80", 64): (Tile(64, 32, 4, 2),),  # 176 registers
    ("queries", "sm_80", 128): (Tile(64, 32, 4, 2),),  # 216 registers
    ("queries", "sm_80", 256): (Tile(32, 16, 4, 1),),  # 212 registers
    ("decode", "sm_80", 32): (Tile(16, 128, 4, 3),),  # 80 registers
    ("decode", "sm_80", 64): (Tile(16, 64, 4, 3),),  # 72 registers
    ("decode", "sm_80", 128): (Tile(16, 32, 4, 3),),  # 112 registers
    ("decode", "sm_80", 256): (Tile(16, 16, 4, 3),),  # 150 registers
    ("decode-tall", "sm_80", 32): (Tile(64, 64, 4, 3),),  # 110 registers
    ("decode-tall", "sm_80", 64): (Tile(64, 64, 4, 3),),  # 195 registers
    ("decode-tall", "sm_80", 128): (Tile(64, 32, 4, 3),),  # 246 registers
    ("decode-tall", "sm_80", 256): (Tile(64, 16, 8, 3),),  # 220 registers
}
# fmt: on

# Exact fp32 has no tensor cores, and its tiles take twice the memory: these rows are for checks, not for speed.
_FP32 = {
    "forward": ((64, 32, 4, 1), (32, 32, 4, 1), (32, 16, 8, 1), (16, 16, 8, 1)),
    "keys": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 4, 1)),
    "queries": ((32, 32, 4, 1), (32, 32, 4, 1), (16, 16, 4, 1), (16, 16, 8, 1)),
    "decode": ((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
    "decode-tall": ((16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 16, 4, 2)),
}
TABLE |= {
    (name, "fp32", size): (Tile(*row, split=name != "keys" or size < 128),)
    for name, four in _FP32.items()
    for size, row in zip(HEAD_DIMS, four, strict=True)
}


def tile(kernel: str, device: torch.device, head_dim: int, element_size: int, length: int) -> Tile:
    """Return the row that runs for a kernel, by its name in the table, with elements of this many bytes on a device.

    `length` is that of the longest sequence, of queries or keys.
    """
    return next(running(rows(kernel, architecture(device), head_dim, element_size), length))


@cache
def architecture(device: torch.device) -> int:
    """Return the number of a GPU's architecture (80, 89, 90), and 80 for a CPU."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return 10 * major + minor


def running(found: Iterable[Tile], length: int) -> Iterator[Tile]:
    """Yield the rows that take sequences of this length; the first is the one that runs."""
    return (row for row in found if row.longest is None or length <= row.longest)


def rows(kernel: str, architecture: int, head_dim: int, element_size: int) -> tuple[Tile, ...]:
    """Return all rows for an architecture by its number (80, 89, 90); the first that takes a length runs."""
    largest = next(size for size in HEAD_DIMS if head_dim <= size)
    if kernel == "delta":  # it reads two tiles once, and has no loop: a thread takes 32 elements of each
        return (Tile(queries=4096 // largest, keys=0, warps=4, stages=1),)
    name = family(architecture, element_size)
    return TABLE.get((kernel, name, largest)) or TABLE[kernel, LIKE[name], largest]


# A family without rows of its own for a kernel takes those of another.
LIKE = {"sm_100": "sm_90", "sm_120": "sm_80"}


def family(architecture: int, element_size: int) -> str:
    """Return "fp32", or the oldest architecture of those that take the same rows.

    sm_90 has TMA, wgmma and 227 KiB of shared memory, sm_100 also memory that its tensor cores add up in. sm_120, the
    consumer chip, has TMA, and beyond that the tensor cores and the shared memory of sm_89.
    """
    if element_size > 2:
        return "fp32"
    return next((f"sm_{least}" for least in (120, 100, 90) if architecture >= least), "sm_80")


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has, and 1 for a CPU."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
