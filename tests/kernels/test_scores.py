"""Scores of a layer multiplied in half precision: in fp32 from the product on, and as those of an fp32 product."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kernels import cross_entropy, linear_cross_entropy, linear_log_probs, linear_scores

HALF = [torch.bfloat16, torch.float16]


def layer(rows: int, vocab: int = 4096, width: int = 64) -> tuple[Tensor, Tensor]:
    return F.layer_norm(torch.randn(rows, width), (width,)), torch.randn(vocab, width) / 2


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("rows", [1, 3, 512])
@pytest.mark.parametrize("amx", [False, True])
def test_they_are_those_of_an_fp32_product(
    amx: bool, rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "AMX", amx)
    hidden, weight = (each.to(dtype) for each in layer(rows))
    scores, exact = linear_scores(hidden, weight), hidden.float() @ weight.float().T
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, exact, rtol=1e-5, atol=2e-4)
    torch.testing.assert_close(scores.log_softmax(-1), exact.log_softmax(-1), rtol=0, atol=5e-4)
    assert torch.equal(scores.argmax(-1), exact.argmax(-1))
    best, second = scores.topk(2).values.T
    assert (best > second).all()
    # The test can tell: of as many rows, rounded, some tie.
    assert rows < 512 or dtype == torch.float16 or (exact.to(dtype).topk(2).values.diff() == 0).any()


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_shapes_a_buffer_and_weights_of_another_dtype(dtype: torch.dtype) -> None:
    hidden, weight = layer(6, vocab=29, width=16)
    hidden, wide = hidden.to(dtype), torch.promote_types(dtype, torch.float32)
    scores = linear_scores(hidden.view(2, 3, 16), weight)
    torch.testing.assert_close(
        scores, (hidden.to(wide) @ weight.to(dtype).to(wide).T).view(2, 3, 29), rtol=1e-4, atol=1e-4
    )
    padded = torch.empty(6, 32, dtype=wide)[:, :29]
    assert torch.equal(linear_scores(hidden, weight, out=padded), scores.view(6, 29)) and torch.equal(
        padded, scores.view(6, 29)
    )
    assert linear_scores(hidden[0], weight).shape == (29,)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_gradients_flow(dtype: torch.dtype) -> None:
    leaves = [each.to(dtype).requires_grad_() for each in layer(5, vocab=29, width=16)]
    direction = torch.randn(5, 29)
    ours = torch.autograd.grad(linear_scores(*leaves), leaves, direction)
    hidden, weight = (each.detach().float() for each in leaves)
    for mine, exact in zip(ours, (direction @ weight, direction.T @ hidden), strict=True):
        torch.testing.assert_close(mine.float(), exact, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_on_a_gpu_it_is_one_product_whose_result_is_fp32(dtype: torch.dtype) -> None:
    with FakeTensorMode(), torch.inference_mode():
        hidden, weight = torch.empty(2, 3, 16, device="cuda", dtype=dtype), torch.empty(29, 16, device="cuda")
        scores = linear_scores(hidden, weight)
        assert (scores.shape, scores.dtype, scores.device.type) == ((2, 3, 29), torch.float32, "cuda")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_losses_and_log_probabilities_are_taken_from_them(dtype: torch.dtype) -> None:
    hidden, weight = (each.to(dtype) for each in layer(64))
    targets = torch.randint(4096, (64,))
    log_p = (hidden.float() @ weight.float().T).log_softmax(-1)
    chosen, entropy = linear_log_probs(hidden, weight, targets)
    torch.testing.assert_close(chosen, log_p.gather(1, targets[:, None])[:, 0], rtol=0, atol=1e-3)
    torch.testing.assert_close(entropy, -(log_p.exp() * log_p).sum(-1), rtol=0, atol=1e-3)
    # The sum of few rows, in which roundings do not even out.
    for gradients in (False, True):
        loss = linear_cross_entropy(hidden[:1].requires_grad_(gradients), weight, targets[:1])
        torch.testing.assert_close(loss.detach(), -log_p[0, targets[0]], rtol=0, atol=1e-3)
