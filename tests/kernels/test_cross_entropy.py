"""linear_cross_entropy: loss and gradients against F.cross_entropy on whole logits, and the memory it saves."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import kernels.cross_entropy
from kernels import linear_cross_entropy

REDUCTIONS = ("mean", "sum", "none")
OPTIONS: list[dict[str, Any]] = [{}, {"softcap": 2.0}, {"z_loss": 0.1}, {"softcap": 3.0, "z_loss": 0.05}]


def plainly(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    softcap: float | None = None,
    z_loss: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    logits = F.linear(hidden, weight.to(hidden.dtype))
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    flat = logits.reshape(-1, logits.shape[-1])
    losses = F.cross_entropy(flat, targets.reshape(-1), ignore_index=ignore_index, reduction="none")
    counts = targets.reshape(-1) != ignore_index
    losses = losses + z_loss * torch.where(counts, flat.logsumexp(-1).square(), 0.0)
    if reduction == "none":
        return losses.reshape(targets.shape)
    return losses.sum() / counts.sum() if reduction == "mean" else losses.sum()


def problem(
    rows: int = 37, width: int = 12, vocab: int = 29, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(rows, width), torch.randn(vocab, width)
    targets = torch.randint(vocab, (rows,))
    targets[::5] = ignore_index
    return hidden, weight, targets


def with_gradients(function: Any, hidden: Tensor, weight: Tensor, targets: Tensor, **options: Any) -> list[Tensor]:
    hidden, weight = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = function(hidden, weight, targets, **options)
    direction = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    return [loss, *torch.autograd.grad(loss, (hidden, weight), direction)]


@pytest.fixture(params=[256, 8], ids=["one block", "many blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.cross_entropy, "SMALLEST_BLOCK", request.param)
    monkeypatch.setattr(kernels.cross_entropy, "BLOCK_BYTES", 0)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("ignore_index", [-100, 3])
def test_loss_and_gradients_are_those_of_cross_entropy_on_whole_logits(
    reduction: str, options: dict[str, Any], ignore_index: int
) -> None:
    hidden, weight, targets = problem(ignore_index=ignore_index)
    settings = {"reduction": reduction, "ignore_index": ignore_index, **options}
    ours = with_gradients(linear_cross_entropy, hidden.double(), weight.double(), targets, **settings)
    exact = with_gradients(plainly, hidden.double(), weight.double(), targets, **settings)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.usefixtures("block")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_the_error_is_within_twice_that_of_plain_pytorch(
    reduction: str, options: dict[str, Any], dtype: torch.dtype, weight_dtype: torch.dtype
) -> None:
    hidden, weight, targets = problem()
    hidden, weight = hidden.to(dtype), weight.to(weight_dtype)
    settings = {"reduction": reduction, **options}
    # With fp32 weights both multiply what is left of them in bf16: that is the function whose error is measured.
    exact = with_gradients(plainly, hidden.double(), weight.to(dtype).double(), targets, **settings)
    plain = with_gradients(plainly, hidden, weight, targets, **settings)
    ours = with_gradients(linear_cross_entropy, hidden, weight, targets, **settings)
    assert [each.dtype for each in ours] == [torch.float32, dtype, weight_dtype]
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        allowed = 2 * (theirs.double() - true).abs().max() + 1e-6 * (1 + true.abs().max())
        assert (mine.double() - true).abs().max() <= allowed


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_passes_gradcheck(reduction: str, options: dict[str, Any]) -> None:
    hidden, weight, targets = problem(rows=4, width=3, vocab=5)
    leaves = hidden.double().requires_grad_(), weight.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda hidden, weight: linear_cross_entropy(hidden, weight, targets, reduction=reduction, **options), leaves
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e38])
def test_a_row_that_does_not_count_cannot_poison_the_others(reduction: str, poison: float) -> None:
    hidden, weight, targets = problem()
    clean = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    hidden[targets == -100] = poison
    poisoned = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    for before, after in zip(clean, poisoned, strict=True):
        assert torch.equal(before, after)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("rows", [0, 6])
def test_where_nothing_counts_the_gradients_are_zero_and_the_loss_is_that_of_cross_entropy(
    reduction: str, rows: int
) -> None:
    hidden, weight, targets = problem(rows=rows)
    targets[:] = -100
    loss, *gradients = with_gradients(linear_cross_entropy, hidden, weight, targets, reduction=reduction)
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
    torch.testing.assert_close(loss, expected, equal_nan=True)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("largest", [60.0, 3e4])
def test_large_logits_do_not_overflow(largest: float) -> None:
    hidden, weight, targets = problem()
    ours = with_gradients(linear_cross_entropy, hidden * largest, weight, targets)
    exact = with_gradients(plainly, hidden.double() * largest, weight.double(), targets)
    for mine, true in zip(ours, exact, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-4, atol=1e-4)


def test_leading_dimensions_and_strides_do_not_matter() -> None:
    hidden, weight, targets = problem(rows=24)
    shaped = hidden.view(2, 3, 4, -1).transpose(0, 1), weight, targets.view(2, 3, 4).transpose(0, 1)
    losses = linear_cross_entropy(*shaped, reduction="none")
    assert losses.shape == (3, 2, 4)
    torch.testing.assert_close(
        losses.transpose(0, 1).flatten(), linear_cross_entropy(hidden, weight, targets, reduction="none")
    )


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return made


def test_the_meter_of_the_next_test_sees_whole_logits() -> None:
    with LargestTensor() as plain:
        plainly(torch.randn(64, 8), torch.randn(128, 8), torch.zeros(64, dtype=torch.int64))
    assert plain.elements == 64 * 128


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "z_loss": 1e-4}], ids=str)
def test_the_logits_are_never_whole_in_memory(reduction: str, options: dict[str, Any]) -> None:
    tokens, width, vocab = 4096, 8, 4096
    hidden, weight = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    targets = torch.randint(vocab, (tokens,))
    with LargestTensor() as ours:
        linear_cross_entropy(hidden, weight, targets, reduction=reduction, **options).sum().backward()
    assert ours.elements <= tokens * vocab // 8


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("hidden", {"hidden": torch.ones(3, 5)}),
        ("weight", {"weight": torch.ones(6, 5)}),
        ("targets", {"targets": torch.zeros(4, dtype=torch.int64)}),
        ("targets", {"targets": torch.zeros(3)}),
        ("hidden", {"hidden": torch.ones(3, 4, dtype=torch.int64)}),
        ("softcap", {"softcap": 0.0}),
        ("reduction", {"reduction": "average"}),
    ],
)
def test_an_argument_that_does_not_fit_is_named(match: str, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {
        "hidden": torch.ones(3, 4),
        "weight": torch.ones(6, 4),
        "targets": torch.zeros(3, dtype=torch.int64),
    }
    with pytest.raises(ValueError, match=match):
        linear_cross_entropy(**(given | change))


def test_without_gradients_there_is_one_matrix_product_per_block() -> None:
    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Products.count += func in (torch.ops.aten.mm.default, torch.ops.aten.addmm_.default)
            return func(*args, **(kwargs or {}))

    hidden, weight = torch.randn(8, 4), torch.randn(16, 4, requires_grad=True)
    with torch.no_grad(), Products():
        linear_cross_entropy(hidden, weight, torch.arange(8))
    assert Products.count == 1


def test_the_mean_in_half_precision_keeps_small_gradients() -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(4096, 8).half(), torch.randn(512, 8)
    weight.requires_grad_()
    (2.0**14 * linear_cross_entropy(hidden, weight, torch.randint(0, 512, (4096,)))).backward()
    assert weight.grad is not None and (weight.grad != 0).float().mean() > 0.99
