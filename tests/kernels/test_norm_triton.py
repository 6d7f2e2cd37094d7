"""The Triton kernels of both norms, on a GPU or interpreted, held to float64 by the rule of the torch backend."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine.config import ModelConfig
from engine.model import GPT
from kernels import layer_norm, rms_norm
from tests.kernels.rule import assert_within_twice

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.usefixtures("triton_backend"), *([pytest.mark.gpu] if DEVICE == "cuda" else [])]
# The interpreter adds bf16 wrongly (it takes the bits for numbers).
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
NAMES = ("x", "weight", "bias", "residual")


def make(
    rows: int,
    width: int,
    dtype: torch.dtype,
    *,
    bias: bool = True,
    residual: bool = True,
    parameters: torch.dtype = torch.float32,
    strided: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    # A mean far from zero and a gap between rows are what goes wrong first.
    x = (2 * random(rows, width + 3 * strided) + 3).to(dtype)[:, :width]
    made = {"x": x, "weight": random(width).to(parameters)}
    if bias:
        made["bias"] = random(width).to(parameters)
    if residual:
        made["residual"] = random(width, rows).to(dtype).T if strided else random(rows, width).to(dtype)
    return {name: tensor.to(DEVICE) for name, tensor in made.items()}


def run(
    tensors: dict[str, Tensor], dtype: torch.dtype | None = None, used: str = "both", norm: Any = layer_norm
) -> dict[str, Tensor]:
    """The results, and the gradients of a weighted sum of those that are `used`: "y", "sum" or "both"."""
    leaves = {name: each.detach().to(dtype or each.dtype).requires_grad_() for name, each in tensors.items()}
    out = norm(**leaves)
    results = dict(zip(("y", "sum"), out if isinstance(out, tuple) else (out,), strict=False))
    chosen = [each for name, each in results.items() if used in (name, "both")] or [results["y"]]
    directions = [torch.linspace(-2, 5, each.numel(), device=DEVICE).sin().view_as(each).to(each) for each in chosen]
    gradients = torch.autograd.grad(chosen, list(leaves.values()), directions, allow_unused=used == "sum")
    found = {**results, **{f"d_{name}": each for name, each in zip(leaves, gradients, strict=True)}}
    return {name: each.detach() for name, each in found.items() if each is not None}


def hold_to_the_rule(
    tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch, used: str = "both", norm: Any = layer_norm
) -> None:
    ours = run(tensors, used=used, norm=norm)
    monkeypatch.setenv("GPT_KERNELS", "torch")
    plain, exact = run(tensors, used=used, norm=norm), run(tensors, torch.float64, used, norm)
    monkeypatch.setenv("GPT_KERNELS", "triton")
    for name, truth in exact.items():
        assert ours[name].dtype == plain[name].dtype
        if truth.numel():
            assert_within_twice(name, ours[name], plain[name], truth)


CASES = st.fixed_dictionaries(
    {
        "rows": st.integers(0, 20),
        "width": st.sampled_from([1, 3, 8, 33, 128, 200, 256, 1000, 1024]),
        "bias": st.booleans(),
        "residual": st.booleans(),
        "strided": st.booleans(),
        "seed": st.integers(0, 1000),
    }
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# On a GPU every new combination is compiled first.
@settings(max_examples=10 if DEVICE == "cuda" else 20)
@given(case=CASES, same=st.booleans(), used=st.sampled_from(["both", "both", "y", "sum"]))
def test_results_and_gradients_are_within_twice_the_error_of_plain_pytorch(
    case: dict[str, Any], same: bool, used: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = make(**case, dtype=dtype, parameters=dtype if same else torch.float32)
    hold_to_the_rule(tensors, monkeypatch, used)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "width", "residual", "strided", "used"),
    [
        (0, 8, True, False, "both"), (20, 64, True, True, "both"), (19, 128, False, True, "y"),
        (5, 33, True, False, "sum"), (3, 576, True, False, "both"), (2, 9000, True, False, "y"),
    ],
)  # fmt: skip
def test_rms_norm(
    rows: int, width: int, residual: bool, strided: bool, used: str, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    parameters = torch.float32 if residual else dtype
    given = make(rows, width, dtype, bias=False, residual=residual, strided=strided, parameters=parameters)
    hold_to_the_rule(given, monkeypatch, used, rms_norm)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "width"), [(3, 2048), (3, 4096), (2, 8192), (2, 9000), (3, 16384)])
def test_wide_rows(rows: int, width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    hold_to_the_rule(make(rows, width, dtype), monkeypatch)


def test_many_rows_for_every_program(monkeypatch: pytest.MonkeyPatch) -> None:
    hold_to_the_rule(make(3000 if DEVICE == "cpu" else 50_000, 24, torch.float32), monkeypatch)


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 17 GiB")
def test_more_numbers_than_an_int32_counts() -> None:
    x = torch.randn(2**18 + 1, 8192, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(8192, device=DEVICE)
    (last,) = torch.autograd.grad(layer_norm(x, weight), x, torch.ones_like(x))
    end = x[-1:].detach().requires_grad_()
    (alone,) = torch.autograd.grad(layer_norm(end, weight), end, torch.ones_like(end))
    assert torch.equal(last[-1:], alone)


def test_more_sums_than_are_read_at_once_are_all_added_up() -> None:
    from kernels.norm_triton import sum_kernel, sum_options

    partial, total = torch.randn(700, 40, device=DEVICE), torch.empty(40, device=DEVICE)
    options = sum_options(40)
    assert options["BLOCK_P"] < 700
    sum_kernel[(3,)](partial, total, 40, 700, **options)
    assert_within_twice("sum", total, partial.sum(0), partial.double().sum(0))


def test_a_mean_far_from_zero_costs_no_accuracy(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = make(4, 300, torch.float32)
    hold_to_the_rule({**tensors, "x": tensors["x"] + 3000}, monkeypatch)


@pytest.mark.parametrize("norm", [layer_norm, rms_norm])
def test_it_gives_the_same_bits_every_time(norm: Any) -> None:
    tensors = make(70, 64, torch.float16, bias=norm is layer_norm)
    first, second = run(tensors, norm=norm), run(tensors, norm=norm)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    tensors = make(6, 40, torch.float32, bias=False)
    clean = run(tensors)
    tensors["x"][2, 5] = math.inf
    spoilt = run(tensors)
    others = torch.tensor([0, 1, 3, 4, 5], device=DEVICE)
    assert spoilt["y"][2].isnan().any() and spoilt["d_weight"].isnan().any()
    for name in ("y", "sum", "d_x", "d_residual"):
        assert torch.equal(spoilt[name][others], clean[name][others])


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_finite_differences_of_the_results(name: str) -> None:
    tensors = make(5, 24, torch.float32)
    direction = torch.randn_like(tensors[name])
    ours = run(tensors)

    def value(step: float) -> float:
        moved = run({**tensors, name: tensors[name] + step * direction})
        pairs = [(moved[each], torch.linspace(-2, 5, 120, device=DEVICE).sin().view(5, 24)) for each in ("y", "sum")]
        return float(sum((out.double() * weight.double()).sum() for out, weight in pairs))

    # Richardson's extrapolation: the error of the central difference falls with the fourth power of the step.
    coarse, fine = ((value(step) - value(-step)) / (2 * step) for step in (0.04, 0.02))
    slope = float((ours[f"d_{name}"].double() * direction.double()).sum())
    assert slope == pytest.approx((4 * fine - coarse) / 3, rel=2e-4, abs=2e-3)


@pytest.mark.parametrize(("centred", "all_arguments"), [(True, True), (True, False), (False, False)])
def test_the_operators_keep_their_promises_to_pytorch(centred: bool, all_arguments: bool) -> None:
    from kernels.norm_triton import norm_backward, norm_forward

    tensors = make(5, 20, torch.float32, bias=all_arguments, residual=all_arguments)
    given = [None if tensors.get(name) is None else tensors[name].requires_grad_() for name in NAMES]
    x, weight, bias, residual = given
    torch.library.opcheck(norm_forward, (x, residual, weight, bias, 1e-5, centred))
    x, weight = tensors["x"].detach(), tensors["weight"].detach()
    stats = torch.randn(1 + centred, 5, device=DEVICE)
    d_sum = torch.randn_like(x) if all_arguments else None
    torch.library.opcheck(norm_backward, (torch.randn_like(x), d_sum, x, weight, stats, all_arguments))


@pytest.mark.parametrize(
    ("norm", "residual", "used"),
    [*((layer_norm, residual, used) for residual in (False, True) for used in ("y", "both")), (rms_norm, True, "both")],
)
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_torch_compile_takes_it_whole(
    norm: Any, residual: bool, used: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPT_KERNELS", backend)
    made = make(5, 20, torch.float32, residual=residual, bias=norm is layer_norm)
    names, leaves = list(made), [each.requires_grad_() for each in made.values()]

    def loss(*tensors: Tensor) -> Tensor:
        given = dict(zip(names, tensors, strict=True))
        x, out = given["x"], norm(**given)
        y, summed = out if isinstance(out, tuple) else (out, x)
        return y.square().sum() + (summed.sin().sum() if used == "both" else 0.0)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    gradients = torch.autograd.grad(compiled(*leaves), leaves)
    expected = torch.autograd.grad(loss(*leaves), leaves)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("width", [0, 16385])
def test_a_width_that_does_not_fit_is_refused_by_name(width: int) -> None:
    with pytest.raises(ValueError, match=f"x is {width} wide; expected 1 to 16384"):
        layer_norm(torch.ones(2, width, device=DEVICE), torch.ones(width, device=DEVICE))


def test_float64_is_computed_in_float64() -> None:
    x = torch.randn(3, 8, device=DEVICE, dtype=torch.float64)
    out = layer_norm(x, torch.ones(8, device=DEVICE))
    assert isinstance(out, Tensor)
    centred = x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(out, centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt())


def test_the_model_learns_the_same_through_either_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    model = GPT(ModelConfig(vocab_size=50, width=32, blocks=2, heads=2, context=32)).to(DEVICE)
    tokens = torch.randint(0, 50, (2, 24), device=DEVICE)
    gradients = []
    for name in ("torch", "triton"):
        monkeypatch.setenv("GPT_KERNELS", name)
        loss = model.loss(tokens, tokens.roll(-1))
        gradients.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
