"""`gpt rlhf` as a person types it: a chat model, a reward model, and what becomes of the one by the other."""

import json
from pathlib import Path

import pytest
import torch

from engine.run import Run
from tests.cli.conftest import LEARN, Gpt
from tests.train.conftest import stop_after
from train.tracking import read_metrics

# Two rounds of two steps.
SMALL_ROUNDS = (
    *("--rounds", "2", "--batch", "2", "--set", "alignment.group=2", "--set", "alignment.answers=4"),
    *("--set", "alignment.passes=1", "--set", "alignment.max_tokens=6", "--set", "loop.samples=1"),
)


@pytest.fixture
def rewarded(gpt: Gpt, chat: str) -> str:
    """The chat model, beside which there is a reward model."""
    learnt = gpt("reward", chat, "--data", "pairs.jsonl", *LEARN)
    assert learnt.code == 0, learnt.err
    return chat


def test_ppo_stopped_and_resumed_is_bit_equal_to_ppo_that_never_stopped(
    gpt: Gpt, rewarded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = ("--kl-target", "0.5")
    whole = gpt("rlhf", "ppo", rewarded, "--out", "runs/whole", *SMALL_ROUNDS, *target)
    assert whole.code == 0, whole.err
    for part in ("begins at  reward", "round 1  reward", "round 2  reward", "KL 0.00  length", "gpt chat runs/whole"):
        assert part in whole.out
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        stopped = gpt("rlhf", "ppo", rewarded, *SMALL_ROUNDS, *target)
    assert stopped.code == 130 and f"gpt rlhf ppo {rewarded} --out {rewarded}-ppo --resume" in stopped.out
    for change in (("--beta", "1"), (*SMALL_ROUNDS, "--kl-target", "0.25"), ("--rounds", "3")):
        changed = gpt("rlhf", "ppo", rewarded, "--resume", *change)
        assert changed.code == 2 and "own recipe" in changed.err and "--steps" not in changed.err
    crossed = gpt("rlhf", "grpo", rewarded, "--out", f"{rewarded}-ppo", "--resume")
    assert crossed.code == 2 and "is a run of ppo" in crossed.err
    resumed = gpt("rlhf", "ppo", rewarded, *SMALL_ROUNDS, *target, "--resume")
    assert resumed.code == 0 and "after step 3" in resumed.out, resumed.err
    ours, theirs = (Run(Path(path)) for path in (f"{rewarded}-ppo", "runs/whole"))
    for name in ("model", "critic", "optimizer"):
        pairs = zip(*(run.find_checkpoint().tensors(name).values() for run in (ours, theirs)), strict=True)
        assert all(torch.equal(mine, other) for mine, other in pairs)
    prices = [[line["beta"] for line in read_metrics(run.metrics) if "beta" in line] for run in (ours, theirs)]
    assert prices[0] == prices[1] and len(set(prices[0])) == 2


def test_grpo_dpo_and_ipo_make_runs_that_chat(gpt: Gpt, rewarded: str) -> None:
    done = gpt("rlhf", "grpo", rewarded, *SMALL_ROUNDS, "--beta", "0.1")
    assert done.code == 0 and "round 2  reward" in done.out, done.err
    pairs = ("--data", "pairs.jsonl", "--steps", "2", "--batch", "4", "--set", "loop.samples=1")
    done = gpt("rlhf", "dpo", rewarded, *pairs, "--label-smoothing", "0.1", "--beta", "0.2")
    assert done.code == 0 and "accuracy" in done.out and "begins at  KL 0.00  length" in done.out, done.err
    done = gpt("rlhf", "dpo", rewarded, *pairs, "--ipo")
    assert done.code == 0 and "runs/small-chat-ipo by ipo" in done.out, done.err
    for method in ("grpo", "dpo", "ipo"):
        assert gpt("generate", f"{rewarded}-{method}", "--max-tokens", "3").code == 0
    assert gpt("rlhf", "dpo", rewarded, "--resume", "--steps", "3").code == 0
    crossed = gpt("finetune", rewarded, "--out", f"{rewarded}-dpo", "--resume")
    assert crossed.code == 2 and "is a run of dpo" in crossed.err


def test_the_best_of_n_and_policies_beside_it(gpt: Gpt, rewarded: str) -> None:
    few = ("-n", "4", "--prompts", "3")
    done = gpt("rlhf", "best-of-n", rewarded, rewarded, *few)
    assert done.code == 0 and "best of 4" in done.out and "at most 0.64" in done.out, done.err
    written = json.loads(Path(rewarded, "best-of-n.json").read_text())
    best, itself = written["curves"]["best of n"], written["curves"]["small-chat"]
    assert [point["n"] for point in best] == [1, 2, 4] and best[0]["reward"] < best[2]["reward"]
    assert itself[0]["kl"] == 0 and Path(rewarded, "best-of-n.png").exists()


def test_pairs_are_sampled_for_reward_models_and_dpo(gpt: Gpt, rewarded: str) -> None:
    few = ("--prompts", "40", "--answers", "8", "--judge", f"{rewarded}-reward", "--out", "new/pairs.jsonl")
    done = gpt("rlhf", "pairs", rewarded, *few)
    assert done.code == 0 and "40 prompts of" in done.out and "answers that did not end" in done.out, done.err
    rows = [json.loads(line) for line in Path("new/pairs.jsonl").read_text().splitlines()]
    assert len(rows) > 3 and all(row["prompt"].startswith("say ") and row["gold"] is None for row in rows)
    assert gpt("rlhf", "pairs", rewarded, *few).code == 2
    before = Path("new/pairs.jsonl").read_text()
    assert gpt("rlhf", "pairs", rewarded, *few, "--overwrite").code == 0
    assert Path("new/pairs.jsonl").read_text() == before


def test_mistakes_are_named_before_anything_is_deleted(gpt: Gpt, chat: str) -> None:
    Path("play.txt").write_text("Speak, owl, speak! The night is long.\n\n" * 300)
    assert gpt("rlhf", "dpo", chat, "--data", "pairs.jsonl", "--steps", "1", "--batch", "4").code == 0
    for arguments, expected in (
        (("ppo", chat), "gpt reward runs/small-chat"),
        (("ppo", chat, "--reward", "runs/none"), "is not a run"),
        (("ppo", chat, "--reward", chat), "is no reward model"),
        (("ppo", chat, "--reward", "program"), "built-in requests alone"),
        (("ppo", chat, "--reward", "program", "--data", "play.txt"), "holds documents"),
        (("ppo", chat, "--reward", "program", "--set", "alignment.bet=1"), "no setting is called"),
        (("grpo", chat, "--reward", "program", "--group", "3"), "divide 128 answers"),
        (("grpo", chat, "--reward", "program", "--data", "nothing"), "no data is called"),
        (("dpo", chat, "--data", "pairs.jsonl"), "already holds a run"),
        (("dpo", chat, "--data", "chats.jsonl", "--out", "runs/new"), "columns chosen and rejected"),
        (("dpo", chat, "--data", "pairs.jsonl", "--batch", "1", "--out", "runs/new"), "--batch"),
        (("dpo", chat, "--data", "pairs.jsonl", "--out", chat, "--overwrite"), "a run of dpo in its own folder"),
        (("dpo", "runs/small", "--data", "pairs.jsonl"), "finetune it first"),
        (("pairs", chat), "built-in requests alone"),
        (("best-of-n", chat, "--reward", "program"), "built-in requests alone"),
    ):
        again = ("--out", "runs/small-chat-dpo", "--overwrite") if arguments[0] in ("ppo", "grpo") else ()
        refused = gpt("rlhf", *arguments, *again)
        assert refused.code == 2 and expected in refused.err, (arguments, refused)
    assert gpt("generate", "runs/small-chat-dpo", "--max-tokens", "2").code == 0
