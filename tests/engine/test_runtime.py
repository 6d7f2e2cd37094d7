"""The machine: what can be chosen, and randomness that can be put back."""

import ctypes
import random
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import runtime
from engine.errors import InputError
from engine.runtime import Runtime, choose, inference, measured_peak, random_state, seed_everything, set_random_state

CPU = torch.device("cpu")
CPU_FLAGS = Path("/proc/cpuinfo")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_precision_is_a_dtype(precision: str, dtype: torch.dtype) -> None:
    chosen = choose("cpu", precision)
    assert chosen == Runtime(CPU, precision) and chosen.dtype == dtype
    assert "cpu" in chosen.describe() and precision in chosen.describe()


@pytest.mark.parametrize(
    ("device", "precision", "expected"),
    [
        ("cuda:99", "auto", "--device cuda:99 cannot be used.*--device cpu"),
        ("toaster", "auto", "--device toaster cannot be used"),
        *(
            (device, "auto", "it takes auto, cpu, cuda or cuda:N")
            for device in ("meta", "mps", "xla", "cpu:1", "cuda:-1", "")
        ),
        ("cpu", "bf61", "did you mean bf16?"),
        ("cpu", "fp8", "'fp8'.*auto, fp32, bf16, fp16"),
        ("cpu", "fp16", "needs a GPU"),
    ],
)
def test_what_this_machine_cannot_do_is_refused_by_name(device: str, precision: str, expected: str) -> None:
    with pytest.raises(InputError, match=expected):
        choose(device, precision)


@pytest.mark.parametrize(
    ("kernels", "expected"), [("foo", "'foo'; expected torch or triton"), ("triton", "on cpu: .*unset")]
)
def test_kernels_that_cannot_run_here_are_refused(kernels: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPT_KERNELS", kernels)
    monkeypatch.setattr(runtime, "why_not_triton", lambda device: "no driver\nat all")
    with pytest.raises(InputError, match=expected):
        choose("cpu", "fp32")


@pytest.mark.skipif(not CPU_FLAGS.exists(), reason="the flags of the CPU are known on Linux alone")
def test_bf16_is_chosen_where_the_cpu_multiplies_it() -> None:
    flags = set(CPU_FLAGS.read_text().split())
    expected = bool(flags & {"amx_bf16", "avx512_bf16", "bf16"})
    assert runtime.cpu_multiplies_bf16() == expected
    assert choose("cpu").precision == ("bf16" if expected else "fp32")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_cpu(native: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "cpu_multiplies_bf16", lambda: native)
    assert choose("cpu").precision == expected


@pytest.mark.parametrize(("capability", "expected"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")])
def test_auto_follows_the_gpu(capability: tuple[int, int], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert runtime.native_precision(torch.device("cuda")) == expected


def test_a_gpu_without_our_kernels_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "H200")
    monkeypatch.setattr(runtime, "why_not_triton", lambda device: "no compiler\nat all")
    gpu = Runtime(torch.device("cuda", 1), "bf16")
    for name, expected in (("triton", ""), ("torch", ", slow without our kernels (no compiler)")):
        monkeypatch.setattr(runtime, "backend", lambda device, name=name: name)
        assert gpu.describe() == f"H200, bf16{expected}"


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), torch.rand(()).item()


@pytest.mark.parametrize("seed", [0, 1, 2**40])
def test_a_seed_fixes_every_generator(seed: int) -> None:
    seed_everything(seed)
    first = draws()
    seed_everything(seed)
    assert draws() == first
    seed_everything(seed + 1)
    assert not set(draws()) & set(first)


@pytest.fixture
def settings_restored() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("settings_restored")
def test_the_determinism_switch_is_off_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    seed_everything(0)
    assert not torch.are_deterministic_algorithms_enabled()
    seed_everything(0, deterministic=True)
    assert torch.are_deterministic_algorithms_enabled()


def test_the_random_state_can_be_put_back() -> None:
    state = random_state(CPU)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    first = torch.rand(5)
    torch.rand(17)
    set_random_state(state, CPU)
    assert torch.equal(torch.rand(5), first)


@pytest.mark.parametrize("training", [True, False])
def test_inference_records_no_gradients_and_puts_the_mode_back(training: bool) -> None:
    model = torch.nn.Dropout().train(training)
    with pytest.raises(RuntimeError, match="inside"), inference(model):
        assert not model.training and torch.is_inference_mode_enabled()
        raise RuntimeError("inside")
    assert model.training == training and not torch.is_inference_mode_enabled()


def test_peaks_are_measured() -> None:
    chosen = choose("cpu", "fp32")
    assert measured_peak(chosen, seconds=0.0) > 1e8
    assert chosen.peak_memory() > 10 * 2**20


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc is told what to keep"
)
def test_freed_memory_stays_with_the_process() -> None:
    choose("cpu")
    libc = ctypes.CDLL(None)
    libc.malloc.restype = libc.sbrk.restype = ctypes.c_void_p
    for _ in range(2):  # what is freed once, glibc takes for a usual size
        pieces = [ctypes.c_void_p(libc.malloc(10 * 2**20)) for _ in range(8)]
        end = libc.sbrk(0)
        for piece in pieces:
            libc.free(piece)
        assert libc.sbrk(0) == end
