"""silu_mul by either backend, the Triton kernel on a GPU or interpreted on a CPU, held to float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import silu_mul
from tests.kernels.rule import assert_within_twice

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


@pytest.fixture(params=["torch", "triton"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "triton":
        pytest.importorskip("triton")
        request.getfixturevalue("triton_backend")
    else:
        request.getfixturevalue("monkeypatch").setenv("GPT_KERNELS", "torch")
    name: str = request.param
    return name


def plain(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def both(function: object, x: Tensor) -> tuple[Tensor, Tensor]:
    """The result and the gradient of a weighted sum of it."""
    leaf = x.detach().requires_grad_()
    out: Tensor = function(leaf)  # type: ignore[operator]
    direction = torch.linspace(-2, 5, out.numel(), device=DEVICE).sin().view_as(out).to(out)
    (gradient,) = torch.autograd.grad(out, leaf, direction)
    return out.detach(), gradient


SHAPES = [(3, 5, 2), (1, 6), (37, 66), (2, 0, 8), (3, 1026), (2, 3072), (4, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient_are_within_twice_the_error_of_plain_pytorch(
    kernels: str, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    # Every other one is a part of a larger tensor.
    more = 3 * (SHAPES.index(shape) % 2)
    x = (4 * torch.randn(*shape[:-1], shape[-1] + more, device=DEVICE)).to(dtype)[..., : shape[-1]]
    ours, theirs, exact = both(silu_mul, x), both(plain, x), both(plain, x.double())
    for name, mine, peer, true in zip(("y", "dx"), ours, theirs, exact, strict=True):
        assert (mine.dtype, mine.shape) == (dtype, true.shape)
        if true.numel():
            assert_within_twice(name, mine, peer, true)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_numbers_whose_exponential_overflows(kernels: str) -> None:
    x = torch.tensor([[-1e4, -100.0, 100.0, 1e4, 0.0, *[3.0] * 5]], device=DEVICE)
    y, dx = both(silu_mul, x)
    torch.testing.assert_close(y, torch.tensor([[0.0, 0.0, 300.0, 3e4, 0.0]], device=DEVICE))
    torch.testing.assert_close(dx, both(plain, x.double())[1].float())


def test_it_keeps_its_argument_alone_and_gives_the_same_bits_every_time(kernels: str) -> None:
    x = torch.randn(37, 200, device=DEVICE, dtype=torch.float16, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda each: kept.append(each) or each, lambda each: each):  # type: ignore[func-returns-value]
        silu_mul(x)
    assert [each.data_ptr() for each in kept] == [x.data_ptr()]
    for first, second in zip(both(silu_mul, x), both(silu_mul, x), strict=True):
        assert torch.equal(first, second)


def test_torch_compile_takes_it_whole(kernels: str) -> None:
    x = torch.randn(3, 4, 20, device=DEVICE, requires_grad=True)
    compiled = torch.compile(lambda x: silu_mul(x).sin().sum(), backend="aot_eager", fullgraph=True)
    ours, theirs = (torch.autograd.grad(run(x), x)[0] for run in (compiled, lambda x: plain(x).sin().sum()))
    torch.testing.assert_close(ours, theirs)


def test_gradcheck_and_no_second_derivative_that_is_wrong(kernels: str) -> None:
    x = torch.randn(2, 3, 6, device=DEVICE, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(silu_mul, x)
    leaf = x.detach().float().requires_grad_()
    (gradient,) = torch.autograd.grad(silu_mul(leaf).square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.usefixtures("triton_backend")
def test_the_operators_keep_their_promises_to_pytorch() -> None:
    pytest.importorskip("triton")
    from kernels.silu_mul_triton import silu_mul_backward, silu_mul_forward

    x = torch.randn(2, 5, 12, device=DEVICE, requires_grad=True)
    torch.library.opcheck(silu_mul_forward, (x,))
    torch.library.opcheck(silu_mul_backward, (torch.randn(2, 5, 6, device=DEVICE), x.detach()))


@pytest.mark.skipif(DEVICE == "cpu", reason="takes 13 GiB")
def test_more_numbers_than_an_int32_counts() -> None:
    x = torch.randn(2**18 + 1, 2**13, device=DEVICE, dtype=torch.bfloat16)
    ours, alone = both(silu_mul, x), both(plain, x[-1:])
    torch.testing.assert_close(ours[0][-1:], alone[0])


@pytest.mark.parametrize("x", [torch.ones(()), torch.ones(2, 3), torch.ones(2, 4, dtype=torch.int64)])
def test_what_does_not_fit_is_named(x: Tensor) -> None:
    with pytest.raises(ValueError, match=r"^x is .*expected a floating dtype and .*even width"):
        silu_mul(x)
