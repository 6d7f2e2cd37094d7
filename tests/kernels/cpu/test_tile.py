"""The micro-kernel and the packing of its weights, against float64."""

import numpy as np
import pytest
import torch

from kernels.cpu.jit import native
from kernels.cpu.pack import pack, strip_size, strips
from kernels.cpu.tile import STRIP, multiply


@native
def product(x, packed, size, depth, out, add):
    for strip in range(out.shape[1] // STRIP):
        multiply(
            x, 0, x.shape[1], packed, strip * size, STRIP, depth, out, strip * STRIP, out.shape[1], len(x), STRIP, add
        )


@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8"])
def test_products_are_right_at_odd_sizes_and_the_same_in_any_batch(kind: str) -> None:
    for columns, depth in ((1, 1), (64, 32), (130, 77), (200, 160)):
        weight = torch.randn(columns, depth)
        packed, size = pack(weight, kind), strip_size(depth, kind)
        assert len(packed) == strips(columns) * size
        held = weight.bfloat16().double() if kind == "bf16" else weight.double()
        x = torch.zeros(13, strips(depth) * STRIP)
        x[:, :depth] = torch.randn(13, depth)
        exact = x[:, :depth].double() @ held.T
        whole = np.full((13, strips(columns) * STRIP), np.nan, np.float32)
        product(x.numpy(), packed.numpy(), size, depth, whole, 0)
        off = (torch.from_numpy(whole)[:, :columns].double() - exact).abs().max()
        torchs = (x[:, :depth] @ held.float().T - exact).abs().max()
        # An int8 number is off by at most half of the 127th part of the largest of its 32, and its scale by 2^-9.
        assert off <= (0.15 * depth**0.5 if kind == "int8" else 2 * torchs + 1e-6)
        assert not whole[:, columns:].any()
        for rows in range(1, 13):
            part = np.ones((rows, whole.shape[1]), np.float32)
            product(x[:rows].numpy(), packed.numpy(), size, depth, part, 0)
            assert np.array_equal(part, whole[:rows])
        product(x.numpy(), packed.numpy(), size, depth, added := np.ones_like(whole), 1)
        assert np.allclose(added, whole + 1, atol=1e-4)


def test_a_row_of_zeros_stays_zero_in_int8() -> None:
    out = np.ones((1, STRIP), np.float32)
    product(
        np.full((1, STRIP), 1e3, np.float32),
        pack(torch.zeros(5, 64), "int8").numpy(),
        strip_size(64, "int8"),
        64,
        out,
        0,
    )
    assert not out.any()
