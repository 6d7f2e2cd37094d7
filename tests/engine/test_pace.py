"""How fast a CPU trains a model of some size, by the steps of others."""

import pytest
import torch

from engine import laws, pace
from engine.model import GPT
from engine.runtime import Runtime

HERE = Runtime(torch.device("cpu"), "fp32")


def test_a_size_that_was_timed_has_its_own_speed_and_others_one_between(monkeypatch: pytest.MonkeyPatch) -> None:
    speeds = {2: 1e9, 3: 4e9, 4: 5e9, 6: 6e9, 8: 7e9}
    monkeypatch.setattr(pace, "_timed", lambda machine, depth: speeds[depth])
    work = {depth: laws.shape(depth).flops_per_token for depth in range(1, 30)}
    for depth, speed in speeds.items():
        assert pace.training_flops(HERE, work[depth]) == pytest.approx(speed)
    assert pace.training_flops(HERE, (work[2] * work[3]) ** 0.5) == pytest.approx(2e9)
    assert speeds[4] < pace.training_flops(HERE, work[5]) < speeds[6]
    assert pace.training_flops(HERE, work[1]) == speeds[2] and pace.training_flops(HERE, work[29]) == speeds[8]


def test_only_what_is_near_is_timed_and_once_and_no_draw_of_a_run_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    real = GPT

    def model(shape: object) -> torch.nn.Module:
        timed.append(shape)
        return real(shape)  # type: ignore[arg-type]

    monkeypatch.setattr(pace, "GPT", model)
    pace._timed.cache_clear()
    before = torch.get_rng_state()
    found = [pace.training_flops(HERE, 0.5 * laws.shape(2).flops_per_token) for _ in range(2)]
    assert timed == [laws.shape(2)] and found[0] == found[1] and 1e8 < found[0] < 1e14
    assert torch.equal(torch.get_rng_state(), before)
    pace._timed.cache_clear()
