"""The watch over a policy says what looks like reward hacking, once of each kind."""

import pytest

from engine.model import GPT
from rlhf.watch import Watch, suspicions

BEGIN = {"reward": 0.0, "gold": 0.7, "gold_error": 0.05, "length": 100.0, "ended": 0.9, "distinct_2": 0.3}


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        ({"reward": 1.0, "gold": 0.9, "length": 150.0, "distinct_2": 0.2}, set()),
        ({"reward": 1.0, "gold": 0.6}, {"gold"}),
        ({"reward": 1.0, "gold": 0.68}, set()),
        ({"reward": -1.0, "gold": 0.6}, set()),
        ({"distinct_2": 0.1}, {"distinct_2"}),
        ({"ended": 0.4, "length": 201.0}, {"ended", "length"}),
        ({"length": 49.0}, {"length"}),
    ],
)
def test_what_leaves_its_range_is_suspect(change: dict[str, float], kinds: set[str]) -> None:
    assert suspicions(BEGIN, {**BEGIN, **change}).keys() == kinds


def test_without_a_reward_or_gold_the_rest_is_watched() -> None:
    few = {name: BEGIN[name] for name in ("length", "ended", "distinct_2")}
    assert suspicions(few, {**few, "ended": 0.1}).keys() == {"ended"}


def test_each_kind_is_said_once_and_kept_in_the_measures(gpt: GPT) -> None:
    said: list[str] = []
    states = iter([BEGIN, {**BEGIN, "length": 10.0}, {**BEGIN, "length": 9.0, "ended": 0.0}, BEGIN])
    watch = Watch(lambda policy: dict(next(states)), gpt, said.append)
    found = [watch(gpt) for _ in range(3)]
    assert len(said) == 2 and "from 100 to 10 tokens" in said[0] and "ended answers fell" in said[1]
    assert [each["suspect_length"] for each in found] == [1, 1, 0] and found[1]["suspect_ended"] == 1
    assert found[0]["suspect_gold"] == 0 and found[0]["length"] == 10
