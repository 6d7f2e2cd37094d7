"""The rule that every kernel is held to."""

import torch
from torch import Tensor


def assert_within_twice(name: str, ours: Tensor, peer: Tensor, exact: Tensor) -> None:
    """max|ours - exact| <= 2 max|peer - exact| + tiny, where they are finite; the same infinities elsewhere, no NaN.

    `peer` is what plain PyTorch computes in our dtype, `exact` the same in float64.
    """
    assert not ours.isnan().any(), f"{name} is NaN"
    assert torch.equal(ours.isinf(), exact.isinf()), f"{name}: not the same infinities"
    finite = exact.isfinite()
    if finite.any():
        error = (ours.double() - exact)[finite].abs().max().item()
        allowed = (peer.double() - exact)[finite].abs().max().item()
        largest = exact[finite].abs().max().item()
        # Of few numbers, plain PyTorch's may happen to fall near their rounded values: grant the rounding itself.
        tiny = 1e-6 * (1 + largest) + torch.finfo(ours.dtype).eps / 2 * largest
        assert error <= 2 * allowed + tiny, f"{name} is off by {error:.3g}; plain PyTorch by {allowed:.3g}"
