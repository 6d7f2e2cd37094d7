"""Tile sizes: one row per kernel, architecture and head dim, each with its reason.

Registers and spills are what the compiler reports for bf16, causal and packed (Triton 3.7); none of the rows spills.
No row has been timed yet.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Queries and keys per block, warps per program, stages of the load pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# (kernel, sm_90 or newer, largest head dim): tile
TABLE = {
    ("forward", True, 32): Tile(128, 64, 4, 3),  # 190 registers
    ("forward", True, 64): Tile(128, 128, 8, 2),  # 195 registers; 128/64 with 3 stages: 121
    ("forward", True, 128): Tile(128, 128, 8, 2),  # 232 registers, 160 KiB shared
    ("forward", True, 256): Tile(64, 64, 8, 2),  # 228 registers, 160 KiB shared
    ("keys", True, 32): Tile(64, 128, 8, 2),  # 190 registers
    ("keys", True, 64): Tile(64, 128, 8, 2),  # 243 registers
    ("keys", True, 128): Tile(32, 128, 8, 2),  # 230 registers; 64/128 spills, 64/64 takes all 255
    ("keys", True, 256): Tile(32, 32, 8, 1),  # 167 registers; 16/64 spills
    ("queries", True, 32): Tile(128, 64, 8, 3),  # 120 registers
    ("queries", True, 64): Tile(128, 64, 8, 3),  # 127 registers
    ("queries", True, 128): Tile(128, 64, 8, 3),  # 167 registers
    ("queries", True, 256): Tile(32, 32, 8, 1),  # 128 registers; 64/32 spills
    ("forward", False, 32): Tile(128, 64, 4, 2),  # 187 registers
    ("forward", False, 64): Tile(64, 64, 4, 2),  # 180 registers
    ("forward", False, 128): Tile(64, 64, 8, 2),  # 158 registers, 56 KiB shared
    ("forward", False, 256): Tile(64, 32, 8, 1),  # 200 registers, 52 KiB shared
    ("keys", False, 32): Tile(32, 64, 4, 2),  # 128 registers
    ("keys", False, 64): Tile(32, 64, 4, 2),  # 175 registers
    ("keys", False, 128): Tile(32, 64, 8, 2),  # 170 registers, 53 KiB shared
    ("keys", False, 256): Tile(16, 32, 8, 1),  # 164 registers, 56 KiB shared; 16/16 spills
    ("queries", False, 32): Tile(64, 32, 4, 2),  # 96 registers
    ("queries", False, 64): Tile(64, 32, 4, 2),  # 134 registers
    ("queries", False, 128): Tile(64, 32, 4, 2),  # 202 registers
    ("queries", False, 256): Tile(32, 16, 8, 1),  # 128 registers
}


def tile(kernel: str, device: torch.device, head_dim: int) -> Tile:
    """The row for a kernel ("forward", "keys" or "queries"), by the device's architecture."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)
    return row(kernel, 10 * major + minor, head_dim)


def row(kernel: str, architecture: int, head_dim: int) -> Tile:
    """The same by number: 80, 89, 90."""
    largest = next(size for size in (32, 64, 128, 256) if head_dim <= size)
    return TABLE[kernel, architecture >= 90, largest]
