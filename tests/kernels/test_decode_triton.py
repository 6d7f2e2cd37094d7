"""The decode kernels, on a GPU or interpreted on a CPU, held to float64 by the rule of the torch backend."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import ModelConfig
from engine.model import GPT, KVCache
from kernels import decode_attention, flash_attention
from kernels.attention.reference import attention_reference
from kernels.tiles import Tile
from tests.kernels.rule import assert_within_twice

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("triton_backend"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
on_a_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no CUDA device")
# The interpreter multiplies bf16 wrongly (it takes the bits for numbers).
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def use(monkeypatch: pytest.MonkeyPatch, splits: int, tile: Tile | None = None) -> None:
    monkeypatch.setattr("kernels.attention.decode.splits", lambda *arguments: splits)
    if tile:
        monkeypatch.setattr("kernels.tiles.tile", lambda *arguments: tile)


def random(*shape: int, seed: int, strided: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if strided:  # heads before tokens in memory, and a gap between rows
        shape = (shape[0], shape[2], shape[1], shape[3] + 8)
        return torch.randn(shape, generator=generator).transpose(1, 2)[..., :-8].to(DEVICE)
    return torch.randn(shape, generator=generator).to(DEVICE)


def one_by_one(tensors: list[Tensor], lengths: list[int], dtype: torch.dtype, **options: Any) -> Tensor:
    """Each sequence by itself, by the definition."""
    q, k, v = (tensor.to(dtype) for tensor in tensors)
    parts = zip(q.split(1), k.split(1), v.split(1), lengths, strict=True)
    return torch.cat([attention_reference(q, k[:, :n], v[:, :n], **options)[0] for q, k, v, n in parts])


def spoiled(cache: Tensor, lengths: list[int]) -> Tensor:
    """NaN where a sequence has not come to yet."""
    cache = cache.clone(memory_format=torch.preserve_format)
    for row, length in enumerate(lengths):
        cache[row, length:] = float("nan")
    return cache


def paged(cache: Tensor, lengths: list[int], size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The same keys in blocks of `size`, shuffled, and a table that names nothing that is there beyond the lengths."""
    batch, keys, heads, head_dim = cache.shape
    blocks = -(-keys // size)
    order = torch.randperm(batch * blocks + 2, generator=torch.Generator().manual_seed(seed))[: batch * blocks]
    padded = cache.new_full((batch, blocks * size, heads, head_dim), float("nan"))
    padded[:, :keys] = cache
    shuffled = cache.new_full((batch * blocks + 2, size, heads, head_dim), float("nan"))
    shuffled[order.to(DEVICE)] = padded.view(-1, size, heads, head_dim)
    table = order.view(batch, blocks).int()
    for row, length in enumerate(lengths):
        table[row, -(-length // size) :] = 2**30
    return shuffled, table.to(DEVICE)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    capacity, queries = draw(st.integers(1, 100)), draw(st.sampled_from([1, 1, 2, 5, 16]))
    batch = draw(st.integers(1, 2))
    length = st.one_of(st.integers(0, capacity), st.just(capacity), st.just(min(queries - 1, capacity)))
    return {
        "capacity": capacity,
        "queries": queries,
        "heads": draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (1, 4)])),
        "head_dim": draw(st.sampled_from([16, 24, 64, 80, 256])),
        "lengths": draw(st.lists(length, min_size=batch, max_size=batch)),
        "length_dtype": draw(st.sampled_from([torch.int32, torch.int64])),
        "options": {
            "scale": draw(st.sampled_from([None, 0.3])),
            "window": draw(st.sampled_from([None, None, 1, 7, 40, 2**31])),
            "softcap": draw(st.sampled_from([None, None, 3.0])),
        },
        "block": draw(st.sampled_from([None, None, 5, 16, 32])),
        "strided": draw(st.booleans()),
        "splits": draw(st.sampled_from([1, 2, 4, 32])),
        "tile": draw(st.sampled_from([Tile(16, 16, 4, 2), Tile(16, 32, 4, 3), Tile(32, 16, 4, 3)])),
        "seed": draw(st.integers(0, 1000)),
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12)
@given(case=cases())
def test_outputs_are_within_twice_the_error_of_plain_pytorch_and_what_lies_beyond_a_length_is_not_seen(
    case: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, case["splits"], case["tile"])
    key_heads, group = case["heads"]
    lengths, seed, strided, head_dim = case["lengths"], case["seed"], case["strided"], case["head_dim"]
    q = random(len(lengths), case["queries"], key_heads * group, head_dim, seed=seed, strided=strided).to(dtype)
    k, v = (
        random(len(lengths), case["capacity"], key_heads, head_dim, seed=seed + i, strided=strided).to(dtype)
        for i in (1, 2)
    )
    exact, plain = (one_by_one([q, k, v], lengths, each, **case["options"]) for each in (torch.float64, dtype))
    k, v = (spoiled(each, lengths) for each in (k, v))
    table = None
    if case["block"]:
        (k, table), (v, _) = (paged(each, lengths, case["block"], seed) for each in (k, v))
    cache_lengths = torch.tensor(lengths, dtype=case["length_dtype"], device=DEVICE)
    ours = decode_attention(q, k, v, cache_lengths, block_table=table, **case["options"])
    assert ours.dtype == dtype and ours.is_contiguous()
    assert_within_twice("out", ours, plain, exact)


# With the tiles of the table, as they run in earnest: 2 rows, and 24.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("head_dim", [32, 64, 96, 128, 256])
def test_every_row_of_the_table_that_runs(
    head_dim: int, queries: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, splits=1)
    q = random(1, queries, 2, head_dim, seed=0).to(dtype)
    k, v = (random(1, 160, 1, head_dim, seed=seed).to(dtype) for seed in (1, 2))
    exact, plain = (one_by_one([q, k, v], [150], each) for each in (torch.float64, dtype))
    ours = decode_attention(q, spoiled(k, [150]), spoiled(v, [150]), torch.tensor([150], device=DEVICE))
    assert_within_twice("out", ours, plain, exact)


@pytest.mark.parametrize("options", [{}, {"window": 9, "softcap": 2.0}], ids=str)
@pytest.mark.parametrize("splits", [1, 8])
def test_it_is_flash_attention_where_the_cache_is_full(
    splits: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, splits, Tile(16, 16, 4, 2))
    q = random(1, 5, 4, 32, seed=0)
    k, v = (random(1, 70, 2, 32, seed=seed) for seed in (1, 2))
    ours = decode_attention(q, k, v, torch.tensor([70], device=DEVICE), **options)
    torch.testing.assert_close(ours, flash_attention(q, k, v, **options), rtol=1e-5, atol=1e-5)


def test_the_number_of_splits_fills_a_gpu_and_depends_on_no_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.attention.decode import splits

    class H200:
        multi_processor_count = 132

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: H200)
    cuda = torch.device("cuda")
    assert splits(16, 1, 32 * 1024, cuda) == 32  # a batch of one with 16 heads: 512 programs
    assert splits(4, 4, 32 * 1024, cuda) == 128
    assert splits(4, 4, 1024, cuda) == 4  # not fewer than 256 keys each
    assert splits(1024, 1, 1024, cuda) == 1  # filled without
    assert splits(1024, 1, 32 * 1024, cuda) == 8  # so that no program has more than 4,096 keys
    assert splits(1, 1, 2**20, cuda) == 256
    assert splits(32, 512, 512, cuda) == 1  # a prompt: its rows would make many parts
    assert splits(1, 1, 0, cuda) == 1


def test_a_short_sequence_in_a_large_cache_is_split_too(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, splits=4, tile=Tile(16, 16, 4, 2))
    made: list[Tensor] = []
    empty = torch.empty

    def kept(*sizes: Any, **options: Any) -> Tensor:
        made.append(empty(*sizes, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", kept)
    q, k = random(2, 1, 1, 16, seed=0), random(2, 512, 1, 16, seed=1)
    decode_attention(q, k, k, torch.tensor([64, 20], device=DEVICE))
    (lse,) = (each[:, 0, 0] for each in made if each.shape == (2, 1, 1, 4))
    assert lse.isfinite().tolist() == [[True, True, True, True], [True, True, False, False]]
    assert not lse.isnan().any()


def test_it_gives_the_same_bits_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, splits=8, tile=Tile(16, 16, 4, 2))
    q, k, v = random(2, 1, 4, 32, seed=0), *(random(2, 120, 2, 32, seed=seed) for seed in (1, 2))
    lengths = torch.tensor([120, 31], device=DEVICE)
    first, second = (decode_attention(q, k, v, lengths) for _ in range(2))
    assert torch.equal(first, second)


def test_no_sequence_and_no_query_give_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    k = torch.zeros(0, 8, 1, 16, device=DEVICE)
    assert decode_attention(k[:, :1], k, k, torch.zeros(0, dtype=torch.int64, device=DEVICE)).shape == (0, 1, 1, 16)
    k = torch.zeros(2, 8, 1, 16, device=DEVICE)
    lengths = torch.tensor([8, 8], device=DEVICE)
    assert decode_attention(k[:, :0], k, k, lengths).shape == (2, 0, 1, 16)
    assert decode_attention(k[:, :1], k[:, :0], k[:, :0], 0 * lengths).eq(0).all()


def test_the_operator_keeps_its_promises_to_pytorch() -> None:
    from kernels.attention.op import attention_decode

    q, k = random(2, 1, 2, 16, seed=0), random(2, 20, 1, 16, seed=1)
    lengths = torch.tensor([20, 7], device=DEVICE)
    torch.library.opcheck(attention_decode, (q, k, k.clone(), lengths, None, 0.25, None, None))
    table = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32, device=DEVICE)
    torch.library.opcheck(attention_decode, (q, k, k.clone(), lengths.int(), table, 0.25, 5, 2.0))


def test_torch_compile_takes_it_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, splits=2)
    q, k, v = random(2, 1, 4, 16, seed=0), *(random(2, 40, 2, 16, seed=seed) for seed in (1, 2))
    lengths = torch.tensor([40, 7], device=DEVICE)

    def step(q: Tensor, lengths: Tensor) -> Tensor:
        return 2 * decode_attention(q, k, v, lengths - 1, window=30)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(q, lengths), step(q, lengths))


def test_there_is_no_gradient_and_no_silence_about_it() -> None:
    q = random(1, 1, 2, 16, seed=0).requires_grad_()
    k = random(1, 20, 2, 16, seed=1)
    out = decode_attention(q, k, k, torch.tensor([20], device=DEVICE))
    with pytest.raises(RuntimeError, match="no autograd formula"):
        out.sum().backward()


def test_what_the_kernels_cannot_take_is_refused_by_name() -> None:
    lengths = torch.tensor([4], device=DEVICE)
    q = torch.randn(1, 4, 1, 288, device=DEVICE)
    with pytest.raises(ValueError, match="q has head dim 288"):
        decode_attention(q, q, q, lengths)
    q, cache = torch.randn(1, 1, 1, 16, device=DEVICE), torch.randn(1, 4, 1, 32, device=DEVICE)
    with pytest.raises(ValueError, match="v_cache has stride 2"):
        decode_attention(q, cache[..., :16], cache[..., ::2], lengths)


def test_the_model_says_the_same_through_either_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    config = ModelConfig(vocab_size=50, width=32, blocks=2, heads=2, context=32)
    model = GPT(config).to(DEVICE)
    tokens = torch.randint(0, 50, (2, 14), device=DEVICE)
    said = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("GPT_KERNELS", name)
        cache = KVCache(config, 2, config.context, device=DEVICE, dtype=torch.float32)
        hidden = []
        with torch.no_grad():
            for part in tokens.split([11, 1, 2], dim=1):
                hidden.append(model(part, cache=cache))
                cache.lengths += part.shape[1]
        said.append(torch.cat(hidden, dim=1))
    torch.testing.assert_close(*said, rtol=1e-4, atol=1e-4)


@on_a_gpu
def test_a_cuda_graph_is_replayed_while_the_sequences_grow() -> None:
    q = random(2, 1, 8, 64, seed=0).bfloat16()
    k, v = (random(2, 4096, 2, 64, seed=seed).bfloat16() for seed in (1, 2))
    lengths = torch.tensor([1, 600], device=DEVICE)
    decode_attention(q, k, v, lengths)  # compiled before it is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, lengths)
    for grown in ([2, 601], [4096, 4095], [0, 1]):
        lengths.copy_(torch.tensor(grown))
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, v, lengths))


@on_a_gpu
def test_caches_past_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("takes 12 GiB")
    keys, heads, head_dim = 2**17 + 5, 66, 256
    k, v = (torch.randn(1, keys, heads, head_dim, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    assert k.numel() > 2**31
    q = torch.randn(1, 1, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
    lengths = torch.tensor([keys], device=DEVICE)
    last = [each[:, :, -1:].contiguous() for each in (q, k, v)]
    exact, plain = (one_by_one(last, [keys], dtype) for dtype in (torch.float64, torch.bfloat16))
    assert_within_twice("out", decode_attention(q, k, v, lengths)[:, :, -1:], plain, exact)
    k, v = (each.view(-1, 1, heads, head_dim) for each in (k, v))  # blocks of one key: their numbers are large, too
    table = torch.arange(keys, device=DEVICE, dtype=torch.int32)[None]
    assert_within_twice("paged", decode_attention(q, k, v, lengths, block_table=table)[:, :, -1:], plain, exact)
