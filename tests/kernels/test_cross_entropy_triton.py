"""The Triton backend of the fused losses, on a GPU or interpreted on a CPU, held to float64 as the other one is."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import linear_cross_entropy, linear_log_probs
from kernels.cross_entropy import row_gradients_op, row_statistics_op, summed_loss_op
from kernels.cross_entropy_torch import Options, Rows
from tests.kernels import losses
from tests.kernels.losses import problem, with_gradients
from tests.kernels.rule import assert_within_twice
from tests.kernels.test_cross_entropy import log_probs

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [
    # Beyond the vocabulary the kernel computes with what it then does not store.
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    *([pytest.mark.gpu] if DEVICE == "cuda" else []),
]
# The interpreter reads bf16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 2.0, "z_loss": 0.05}]
LOG_PROBS_OPTIONS: list[dict[str, Any]] = [{}, {"temperature": 1.5, "softcap": 3.0}]


@pytest.fixture(autouse=True)
def small_blocks(triton_backend: None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Several blocks, the last one smaller, and rows of several steps, the last one masked.
    monkeypatch.setattr("kernels.cross_entropy.block_rows", lambda *arguments, **options: 4)
    monkeypatch.setattr("kernels.cross_entropy_triton.tile", lambda vocab: (16, 4))


def both(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Every operator."""
    chosen, entropy = linear_log_probs(hidden, weight, targets, 0.8)
    return (chosen * targets).sum() + entropy.sum() + linear_cross_entropy(hidden, weight, targets)


def hold_to_the_rule(ours: Any, plain: Any, arguments: tuple[Tensor, ...], **options: Any) -> None:
    hidden, weight, targets = arguments
    exact = with_gradients(plain, hidden.double(), weight.to(hidden.dtype).double(), targets, **options)
    peer = with_gradients(plain, *arguments, **options)
    mine = with_gradients(ours, *arguments, **options)
    for name, *three in zip(("out", "dhidden", "dweight"), mine, peer, exact, strict=True):
        assert_within_twice(name, *three)


def given(dtype: torch.dtype, **sizes: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight, targets = problem(**{"rows": 9, **sizes}, device=DEVICE)
    return hidden.to(dtype), weight, targets


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("vocab", [29, 64])
def test_the_error_is_within_twice_that_of_plain_pytorch(
    reduction: str, options: dict[str, Any], dtype: torch.dtype, vocab: int
) -> None:
    arguments = given(dtype, vocab=vocab)
    hold_to_the_rule(linear_cross_entropy, losses.cross_entropy, arguments, reduction=reduction, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", LOG_PROBS_OPTIONS, ids=str)
def test_so_is_the_error_of_log_probabilities_and_entropies(options: dict[str, Any], dtype: torch.dtype) -> None:
    hold_to_the_rule(log_probs, losses.log_probs, given(dtype), **options)


# With the blocks as they run in earnest.
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("vocab", [4096, 28000, 128256])
def test_every_size_of_block_that_runs(monkeypatch: pytest.MonkeyPatch, vocab: int, dtype: torch.dtype) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("GPT_KERNELS", "triton")
    arguments = given(dtype, rows=3, vocab=vocab)
    hold_to_the_rule(linear_cross_entropy, losses.cross_entropy, arguments, reduction="sum")
    hold_to_the_rule(log_probs, losses.log_probs, arguments, temperature=0.9)


@pytest.mark.parametrize("largest", [60.0, 3e4])
def test_large_logits_do_not_overflow(largest: float) -> None:
    hidden, weight, targets = given(torch.float32)
    ours = with_gradients(linear_cross_entropy, hidden * largest, weight, targets)
    exact = with_gradients(losses.cross_entropy, hidden.double() * largest, weight.double(), targets)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_does_not_count_cannot_poison_the_others(poison: float) -> None:
    hidden, weight, targets = given(torch.float32)
    poisoned_rows = hidden.masked_fill((targets == -100)[:, None], poison)
    before = with_gradients(both, hidden, weight, targets)
    for clean, after in zip(before, with_gradients(both, poisoned_rows, weight, targets), strict=True):
        assert torch.equal(clean, after)


@pytest.mark.parametrize("target", [-1, 29, 2**40])
def test_a_target_that_there_is_none_of_gives_nan_and_reads_nothing_beyond(target: int) -> None:
    from kernels import cross_entropy_triton

    targets = torch.tensor([3, target], device=DEVICE)
    rows = Rows(torch.empty(2, device=DEVICE), torch.empty(2, device=DEVICE), None)
    logits = torch.randn(2, 29, device=DEVICE)
    wide = cross_entropy_triton.step(logits, targets, rows, None, Options(-100, None), 0.0, torch.float32)
    assert rows.log_probs is not None and wide is not None
    assert rows.log_probs.isnan().tolist() == [False, True]
    assert wide.matrix.isnan().tolist() == [[False] * 29, [True] * 29]


def test_it_gives_the_same_bits_every_time() -> None:
    arguments = given(torch.float32)
    first, second = (with_gradients(both, *arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_operators_keep_their_promises_to_pytorch() -> None:
    hidden, weight, targets = problem(rows=3, width=4, vocab=20, device=DEVICE)
    rows = [each.detach() for each in row_statistics_op(hidden, weight, targets, -100, None, 1.0, True)]
    backward = (hidden, weight, targets, *rows[1:], rows[0], None, rows[2], -100, None, 1.0, True)
    torch.library.opcheck(row_gradients_op, backward)
    hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(summed_loss_op, (hidden, weight, targets, -100, None, 0.1, True))
    torch.library.opcheck(row_statistics_op, (hidden, weight, targets, -100, 2.0, 0.7, True))


def test_torch_compile_takes_it_whole() -> None:
    arguments = given(torch.float32)
    compiled = torch.compile(both, backend="aot_eager", fullgraph=True)
    for mine, expected in zip(with_gradients(compiled, *arguments), with_gradients(both, *arguments), strict=True):
        torch.testing.assert_close(mine, expected)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("vocab", [4096, 28000])
def test_the_peak_of_memory_is_below_an_eighth_of_the_plain_one(monkeypatch: pytest.MonkeyPatch, vocab: int) -> None:
    monkeypatch.undo()
    hidden, weight, targets = problem(rows=16384, width=128, vocab=vocab, device=DEVICE)
    hidden = hidden.bfloat16()

    def peak(function: Any) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with_gradients(function, hidden, weight, targets)
        return torch.cuda.max_memory_allocated() - before

    def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return losses.cross_entropy(hidden, weight, targets)

    peak(linear_cross_entropy)  # the libraries' own memory
    assert peak(linear_cross_entropy) < peak(plain) / 8
