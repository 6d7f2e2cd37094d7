"""`gpt reward` as a person types it."""

from pathlib import Path

from tests.cli.conftest import LEARN, Gpt


def test_a_reward_model_is_trained_measured_and_resumed(gpt: Gpt, chat: str) -> None:
    learnt = gpt("reward", chat, "--data", "pairs.jsonl", *LEARN)
    assert learnt.code == 0, learnt.err
    assert "  accuracy " in learnt.out and "gpt chat" not in learnt.out
    told = gpt("info", "runs/small-chat-reward").out
    assert "accuracy" in told
    resumed = gpt("reward", chat, "--resume", "--steps", "3")
    assert resumed.code == 0 and "after step 2" in resumed.out
    for command in ("chat", "generate", "serve", "evaluate"):
        refused = gpt(command, "runs/small-chat-reward")
        assert refused.code == 2 and "is a reward model: it scores texts" in refused.err


def test_built_in_preferences_too_long_for_the_model_are_named(gpt: Gpt, chat: str) -> None:
    refused = gpt("reward", chat, *LEARN)
    assert refused.code == 2 and "is left for a context of 64 tokens" in refused.err and "--set" in refused.err
    assert not Path("runs/small-chat-reward/config.json").exists()
    longer = gpt("reward", chat, *LEARN, "--set", "model.context=400")
    assert longer.code == 0 and "gold order" in longer.out, longer.err


def test_mistakes_are_named(gpt: Gpt, chat: str) -> None:
    assert gpt("reward", chat, "--data", "pairs.jsonl", *LEARN).code == 0
    for arguments, expected in (
        (("runs/small",), "finetune it first"),
        ((chat, "--out", chat), "cannot become a reward model in its own folder"),
        ((chat, "--data", "nothing"), "no data is called 'nothing'"),
        ((chat, "--data", "pairs.jsonl"), "already holds a run"),
        ((chat, "--data", "chats.jsonl", "--out", "runs/other"), "columns chosen and rejected"),
        ((chat, "--data", "pairs.jsonl", "--batch", "1", "--out", "runs/other"), "--batch"),
        ((chat, "--resume", "--margin", "1"), "own recipe"),
        (("runs/small-chat-reward",), "is a reward model"),
    ):
        refused = gpt("reward", *arguments)
        assert refused.code == 2 and expected in refused.err, refused
    crossed = gpt("finetune", chat, "--out", "runs/small-chat-reward", "--resume")
    assert crossed.code == 2 and "is a reward model; name another --out" in crossed.err
