"""What the tests of the Triton kernels share."""

import os
from typing import Any

import pytest
import torch
from torch import Tensor


@pytest.fixture
def triton_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels run through Triton, and what they do not write is NaN: it must not look right by chance."""
    monkeypatch.setenv("GPT_KERNELS", "triton")
    assert torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def poisoned(make: Any) -> Any:
    def filled(*arguments: Any, **options: Any) -> Tensor:
        tensor: Tensor = make(*arguments, **options)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return filled


def pytest_runtest_logfinish() -> None:
    """End xdist's worker once the device has failed: all tests after it would fail, too. Another worker takes them."""
    if "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:  # an illegal address, say; it stays for as long as the process lives
            os._exit(1)
