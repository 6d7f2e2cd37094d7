"""decode_attention: each sequence of a batch against its own share of the cache."""

import pytest
import torch

from kernels import decode_attention
from kernels.attention.reference import attention_reference


@pytest.mark.parametrize("new", [1, 2, 5])
@pytest.mark.parametrize(("heads", "group"), [(2, 1), (2, 3)])
@pytest.mark.parametrize("scale", [None, 0.2])
def test_each_sequence_equals_the_reference_on_its_own_part_of_the_cache(
    new: int, heads: int, group: int, scale: float | None
) -> None:
    lengths = [5, 6, 13, 16]
    q = torch.randn(4, new, heads * group, 16, dtype=torch.float64)
    keys, values = torch.randn(2, 4, 16, heads, 16, dtype=torch.float64)
    for row, length in enumerate(lengths):
        # What lies beyond a sequence's end is left over from something else.
        keys[row, length:], values[row, length:] = 1e4, -1e4
    out = decode_attention(q, keys, values, torch.tensor(lengths), scale=scale)
    for row, length in enumerate(lengths):
        part = keys[row : row + 1, :length], values[row : row + 1, :length]
        torch.testing.assert_close(out[row], attention_reference(q[row : row + 1], *part, scale=scale)[0][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_error_is_within_twice_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    q = torch.randn(2, 1, 4, 32).to(dtype)
    keys, values = torch.randn(2, 2, 20, 2, 32).to(dtype)
    ours = decode_attention(q, keys, values, torch.tensor([20, 20]))
    exact = attention_reference(q.double(), keys.double(), values.double())[0]
    plain = attention_reference(q, keys, values)[0]
    assert ours.dtype == dtype
    assert (ours - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-6


def test_a_query_before_the_first_key_gives_zero() -> None:
    keys, values = torch.randn(2, 1, 4, 2, 16)
    out = decode_attention(torch.randn(1, 3, 2, 16), keys, values, torch.tensor([1]))
    assert torch.equal(out[:, :2], torch.zeros(1, 2, 2, 16)) and out[:, 2].ne(0).all()
