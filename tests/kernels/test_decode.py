"""decode_attention: each sequence of a batch against its own share of the cache. The torch backend."""

from typing import Any

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


@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 6}, {"softcap": 2.0}, {"window": 5, "softcap": 2.0}], ids=str
)
@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize("lengths", [[11, 11, 11], [0, 2, 13], [16, 5, 9]], ids=str)
def test_window_softcap_and_pages_equal_the_reference(new: int, lengths: list[int], options: dict[str, Any]) -> None:
    q = torch.randn(3, new, 4, 16, dtype=torch.float64)
    keys, values = torch.randn(2, 3, 16, 2, 16, dtype=torch.float64)
    table = torch.tensor([[7, 2, 4, 0], [8, 10, 1, 6], [11, 3, 9, 5]], dtype=torch.int32)
    shuffled = [torch.empty(12, 4, 2, 16, dtype=torch.float64) for _ in range(2)]
    for cache, pages in zip((keys, values), shuffled, strict=True):
        pages[table.long()] = cache.view(3, 4, 4, 2, 16)
    keys[:, max(lengths) :], values[:, max(lengths) :] = float("nan"), float("nan")
    for row, length in enumerate(lengths):
        table[row, -(-length // 4) :] = -1
    counts = torch.tensor(lengths, dtype=torch.int32)
    whole = decode_attention(q, keys, values, counts, **options)
    from_pages = decode_attention(q, shuffled[0], shuffled[1], counts, block_table=table, **options)
    torch.testing.assert_close(from_pages, whole)
    for row, length in enumerate(lengths):
        part = keys[row : row + 1, :length], values[row : row + 1, :length]
        torch.testing.assert_close(whole[row], attention_reference(q[row : row + 1], *part, **options)[0][0])


CACHE, LENGTHS, TABLE = torch.zeros(2, 8, 2, 16), torch.ones(2).long(), torch.zeros(2, 3).int()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"q": CACHE[0]}, r"q has shape \(8, 2, 16\); expected \[batch, length, heads, head_dim\]"),
        ({"q": CACHE.int()}, "q is torch.int32; expected a floating dtype"),
        ({"k_cache": CACHE.half()}, "k_cache is torch.float16, v_cache torch.float32; expected the dtype of q"),
        ({"v_cache": CACHE[:, :4]}, "v_cache has shape .2, 4, 2, 16.; expected that of k_cache"),
        ({"q": CACHE[..., :8]}, "k_cache has head dim 16; expected that of q, 8"),
        ({"q": CACHE[:, :, :1]}, "q has 1 heads; expected a multiple of the 2 heads of k_cache"),
        ({"q": CACHE[:1], "cache_lengths": LENGTHS[:1]}, "k_cache has batch 2; expected that of q, 1"),
        ({"cache_lengths": LENGTHS[:1]}, r"cache_lengths is torch.int64 \(1,\); expected int32 or int64 \[2\]"),
        ({"cache_lengths": LENGTHS.float()}, "cache_lengths is torch.float32"),
        ({"cache_lengths": LENGTHS.to("meta")}, "cache_lengths is on meta; expected the device of q"),
        ({"block_table": TABLE[0]}, r"block_table is torch.int32 \(3,\); expected int32 \[2, blocks\]"),
        ({"block_table": TABLE.to("meta")}, "block_table is on meta"),
        ({"block_table": TABLE.long()}, "block_table is torch.int64"),
        ({"block_table": TABLE, "k_cache": CACHE[:, :0], "v_cache": CACHE[:, :0]}, "k_cache has blocks of 0 keys"),
        ({"scale": 0.0}, "scale is 0.0"),
        ({"window": 0}, "window is 0"),
        ({"softcap": -1.0}, "softcap is -1.0"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(wrong: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"q": CACHE, "k_cache": CACHE, "v_cache": CACHE, "cache_lengths": LENGTHS}
    with pytest.raises(ValueError, match=message):
        decode_attention(**{**arguments, **wrong})
