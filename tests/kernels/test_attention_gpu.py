"""What only a GPU can show: very long sequences, tensors past 2^31 elements, the same bits at full size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import flash_attention
from kernels.attention.reference import attention_reference
from tests.kernels.rule import assert_within_twice

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(autouse=True)
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_KERNELS", "triton")


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=dtype)


def ours(tensors: list[Tensor], d_out: Tensor, **options: Any) -> list[Tensor]:
    """out, lse, dq, dk, dv."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, lse = flash_attention(*leaves, return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, leaves, d_out)]


def in_pieces(tensors: list[Tensor], d_out: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """The same by the definition, 1,024 queries at a time: the last of them stands at the last key that it is given."""
    leaves = [tensor.detach().double().requires_grad_() for tensor in tensors]
    outs, lses = [], []
    for start in range(0, d_out.shape[1], 1024):
        end = min(start + 1024, d_out.shape[1])
        q, k, v = (leaf[:, begin:end].to(dtype) for leaf, begin in zip(leaves, (start, 0, 0), strict=True))
        out, lse = attention_reference(q, k, v)
        out.backward(d_out[:, start:end].to(dtype))
        outs.append(out.detach())
        lses.append(lse.detach())
    gradients = [leaf.grad for leaf in leaves if leaf.grad is not None]
    return [torch.cat(outs, dim=1), torch.cat(lses, dim=2), *gradients]


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [32 * 1024, 128 * 1024 - 3])
def test_long_sequences_are_within_twice_the_error_of_plain_pytorch(length: int, head_dim: int) -> None:
    tensors = [random(1, length, 1, head_dim) for _ in range(3)]
    d_out = random(1, length, 1, head_dim)
    exact, plain = (in_pieces(tensors, d_out, dtype) for dtype in (torch.float64, torch.bfloat16))
    for name, mine, peer, truth in zip(
        ("out", "lse", "dq", "dk", "dv"), ours(tensors, d_out), plain, exact, strict=True
    ):
        assert_within_twice(name, mine, peer, truth)


@pytest.mark.parametrize("packed", [False, True])
def test_tensors_past_two_to_the_31_elements(packed: bool) -> None:
    if torch.cuda.mem_get_info()[0] < 60 * 2**30:
        pytest.skip("takes 60 GiB")
    sequences, length, heads, head_dim = 1025, 1024, 32, 64
    q, k, v, d_out = (random(sequences, length, heads, head_dim) for _ in range(4))
    assert q.numel() > 2**31
    last = [tensor[-1:] for tensor in (q, k, v)]
    options: dict[str, Any] = {}
    if packed:
        q, k, v, d_out = (tensor.view(-1, heads, head_dim) for tensor in (q, k, v, d_out))
        bounds = torch.arange(0, sequences + 1, dtype=torch.int32, device="cuda") * length
        options = {"cu_seqlens_q": bounds, "cu_seqlens_k": bounds, "max_seqlen_q": length, "max_seqlen_k": length}
    out, lse, *gradients = ours([q, k, v], d_out, **options)
    alone_out, alone_lse, *alone = ours(last, d_out.view(sequences, length, heads, head_dim)[-1:])
    for whole, single in zip([out, *gradients], [alone_out, *alone], strict=True):
        assert torch.equal(whole.view(sequences, length, heads, head_dim)[-1], single[0])
    assert torch.equal(lse[:, -length:] if packed else lse[-1], alone_lse[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_run_after_run_gives_the_same_bits(dtype: torch.dtype) -> None:
    tensors = [random(4, 4096, heads, 128, dtype=dtype) for heads in (16, 4, 4)]
    d_out = random(4, 4096, 16, 128, dtype=dtype)
    first = ours(tensors, d_out)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(tensors, d_out), strict=True))


def test_a_training_step_under_torch_compile_is_one_graph() -> None:
    q, k, v = (random(2, 256, 4, 64).requires_grad_() for _ in range(3))

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attention(q, k, v)
        assert isinstance(out, Tensor)
        return out.float().square().sum()

    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(q, k, v), (q, k, v))
    eager = torch.autograd.grad(loss(q, k, v), (q, k, v))
    for mine, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(mine, expected, rtol=2e-2, atol=2e-2)
