"""What processes exchange is plain data and tensors."""

import math
from typing import Any

import pytest
import torch

from engine.processes import ALONE, _packed, _unpacked


def test_plain_data_and_tensors_come_back_as_they_were() -> None:
    tensors = [torch.arange(6.0).reshape(2, 3).T, torch.zeros(0, 4), torch.tensor(True), torch.get_rng_state()]
    value = {"held": tensors, "many": 2**62, "tiny": 5e-324, "third": 1 / 3, "none": None, "text": "\ud800 ü"}
    found = _unpacked(_packed(value))
    for before, after in zip(value.pop("held"), found.pop("held"), strict=True):  # type: ignore[call-overload]
        assert after.dtype == before.dtype and torch.equal(after, before)
    assert found == value
    assert math.isnan(_unpacked(_packed([math.nan]))[0]) and _unpacked(_packed((1, "a"))) == [1, "a"]


@pytest.mark.parametrize("value", [object(), {"a": {1}}, [print]], ids=["object", "set", "function"])
def test_what_is_no_plain_data_is_not_exchanged(value: Any) -> None:
    with pytest.raises(TypeError, match="plain data"):
        _packed(value)
    assert ALONE.collect(value) == [value]
