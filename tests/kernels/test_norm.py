"""layer_norm and rms_norm: values, gradients and dtypes, with and without the residual addition."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import layer_norm, rms_norm


def definition(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, ...]:
    summed = x if residual is None else x + residual
    centred = summed if rms else summed - summed.mean(-1, keepdim=True)
    normal = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return normal if bias is None else normal + bias, summed


def tensors(
    shape: tuple[int, ...], bias: bool, residual: bool, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> dict[str, Tensor]:
    made = {"x": (torch.randn(shape) * 3 + 1).to(dtype), "weight": torch.randn(shape[-1]).to(parameter_dtype)}
    if bias:
        made["bias"] = torch.randn(shape[-1]).to(parameter_dtype)
    if residual:
        made["residual"] = torch.randn(shape).to(dtype)
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def outputs_and_gradients(function: Any, given: dict[str, Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    given = {name: tensor.detach().to(dtype or tensor.dtype).requires_grad_() for name, tensor in given.items()}
    out = function(**given)
    out = out if isinstance(out, tuple) else (out,)
    directions = [torch.linspace(-1, 1, each.numel()).sin().view_as(each).to(each.dtype) for each in out]
    return [*out, *torch.autograd.grad(out, list(given.values()), directions)]


@pytest.mark.parametrize("shape", [(7, 33), (2, 3, 128), (1, 5), (0, 16)], ids=str)
@pytest.mark.parametrize(("norm", "bias"), [(layer_norm, False), (layer_norm, True), (rms_norm, False)])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
    ids=str,
)
def test_values_and_gradients_are_those_of_the_definition(
    norm: Any, shape: tuple[int, ...], bias: bool, residual: bool, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    given = tensors(shape, bias, residual, dtype, parameter_dtype)

    def exactly(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Any:
        both = definition(x, weight, bias, residual, 1e-5, norm is rms_norm)
        return both if residual is not None else both[0]

    ours = outputs_and_gradients(norm, given, None)
    plain = outputs_and_gradients(exactly, given, dtype)
    exact = outputs_and_gradients(exactly, given, torch.float64)
    kinds = [dtype] * (2 if residual else 1) + [tensor.dtype for tensor in given.values()]
    assert [each.dtype for each in ours] == kinds
    for mine, theirs, true in zip(ours, plain, exact, strict=True):
        if true.numel():
            allowed = 2 * (theirs.double() - true).abs().max() + 1e-6 * (1 + true.abs().max())
            assert (mine.double() - true).abs().max() <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradients_of_weight_and_bias_do_not_wear_off_over_many_rows(dtype: torch.dtype) -> None:
    given = tensors((4096, 8), True, False, dtype, torch.float32)
    out = layer_norm(**given)  # type: ignore[arg-type]
    assert isinstance(out, Tensor)
    exact = given["x"].detach().double()
    normal = (exact - exact.mean(-1, keepdim=True)) / exact.std(-1, correction=0, keepdim=True)
    weight, _ = torch.autograd.grad(out, (given["weight"], given["bias"]), normal.sign().to(dtype), retain_graph=True)
    bias = torch.autograd.grad(out, given["bias"], torch.ones_like(out))[0]
    torch.testing.assert_close(weight.double(), normal.abs().sum(0), rtol=1e-4, atol=0)
    assert torch.equal(bias, torch.full((8,), 4096.0))
    out = rms_norm(given["x"], given["weight"])
    assert isinstance(out, Tensor)
    normal = exact * exact.square().mean(-1, keepdim=True).rsqrt()
    weight = torch.autograd.grad(out, given["weight"], normal.sign().to(dtype))[0]
    torch.testing.assert_close(weight.double(), normal.abs().sum(0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rms_norm_keeps_what_it_normalised_and_the_weight_alone(dtype: torch.dtype) -> None:
    x, weight = tensors((6, 8), False, False, dtype, torch.float32).values()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):  # type: ignore[func-returns-value]
        _, summed = rms_norm(x, weight, residual=x)
        rms_norm(x.detach(), weight)
    assert [each.data_ptr() for each in kept] == [each.data_ptr() for each in (summed, weight, x, weight)]


def test_heads_that_are_a_part_of_a_larger_product() -> None:
    qkv = torch.randn(5, 4 * 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(16, dtype=torch.float64, requires_grad=True)
    heads = qkv[:, 16:48].view(5, 2, 16)
    ours, exact = rms_norm(heads, weight, eps=1e-6), definition(heads, weight, None, None, 1e-6, True)[0]
    assert isinstance(ours, Tensor)
    torch.testing.assert_close(ours, exact)
    direction = torch.randn_like(exact)
    for mine, theirs in zip(
        *(torch.autograd.grad(each, (qkv, weight), direction) for each in (ours, exact)), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_it_passes_gradcheck() -> None:
    given = tensors((3, 5), True, True, torch.float64, torch.float64)
    x, weight, bias, residual = given.values()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, residual: layer_norm(x, weight, bias, residual=residual), (x, weight, bias, residual)
    )
    assert torch.autograd.gradcheck(
        lambda x, weight, residual: rms_norm(x, weight, residual=residual), (x, weight, residual)
    )


def test_eps_keeps_a_constant_row_finite() -> None:
    x = torch.full((2, 8), 5.0, requires_grad=True)
    out = layer_norm(x, torch.ones(8), eps=1e-3)
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 8)) and x.grad is not None and x.grad.isfinite().all()
    x = torch.zeros(2, 8, requires_grad=True)
    out = rms_norm(x, torch.ones(8))
    assert isinstance(out, Tensor)
    out.sum().backward()
    assert torch.equal(out, torch.zeros(2, 8)) and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("weight", {"weight": torch.ones(3)}),
        ("bias", {"bias": torch.ones(3)}),
        ("residual", {"residual": torch.ones(4)}),
        ("residual", {"residual": torch.ones(2, 4, dtype=torch.bfloat16)}),
        ("residual", {"residual": torch.ones(2, 4, device="meta")}),
        ("weight", {"weight": torch.ones(4, device="meta")}),
        ("weight", {"weight": torch.ones(4, dtype=torch.int64)}),
        ("x", {"x": torch.ones(2, 4, dtype=torch.int64)}),
        ("x", {"x": torch.ones(()), "weight": torch.ones(())}),
        ("eps", {"eps": -1e-5}),
        ("eps", {"eps": float("nan")}),
    ],
)
def test_an_argument_that_does_not_fit_is_named(name: str, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"x": torch.ones(2, 4), "weight": torch.ones(4)} | change
    with pytest.raises(ValueError, match=f"^{name} "):
        layer_norm(**given)
    if "bias" not in change:
        with pytest.raises(ValueError, match=f"^{name} "):
            rms_norm(**given)
