"""Runs in which adapters learn: every stage that begins with a run, to its end and after a stop."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from engine.config import AlignmentConfig, BudgetConfig, DataConfig, LoraConfig, Recipe, override
from engine.errors import InputError
from engine.huggingface import export, import_
from engine.model import GPT
from engine.run import Run
from engine.runtime import Runtime, choose
from rlhf import align as alignment
from rlhf import reward_model
from rlhf.align import align, alignment_recipe
from rlhf.reward_model import RewardModel, load_reference, reward_recipe, train_reward
from tests.rlhf.test_policy import likes_small_ids
from tests.train.conftest import Recorder
from tests.train.team import train_on
from train import trainer
from train.finetune import finetune, finetuning_recipe
from train.loop import Loop
from train.stage import Outcome
from train.tracking import read_metrics

CPU = choose("cpu", "fp32")
KINDS = ("finetune", "reward", "implicit", "dpo", "ppo", "grpo")
Learn = Callable[..., tuple[Outcome, Run]]


def begin(kind: str, chat: Run, folder: Path, likes_foxes: DataConfig) -> tuple[Any, Recipe]:
    """What trains, and its recipe: at rates at which a few steps show."""
    found = chat.find_checkpoint()
    if kind == "finetune":
        rows = [{"prompt": f"say {n}", "response": "fox fox!"} for n in range(60)]
        (folder / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = DataConfig(source=str(folder / "chats.jsonl"), evaluation_tokens=600, final_evaluation_tokens=600)
        return finetune, override(finetuning_recipe(chat, found, data), "optimizer.adapter_rate", 0.01)
    if kind in ("reward", "implicit"):
        return train_reward, reward_recipe(chat, found, likes_foxes, 0.003, implicit=kind == "implicit")
    config = AlignmentConfig(method=kind, beta=0.2, answers=16, max_tokens=8, kl_budget=100.0)  # type: ignore[arg-type]
    data = dataclasses.replace(likes_foxes, chosen_column=None)
    recipe = alignment_recipe(chat, found, data, config, rounds=6, rate=0.003, batch=4 if kind == "dpo" else 8)
    return align, override(recipe, "optimizer.critic_rate", 0.003)


@pytest.fixture
def learn(chat: Run, tmp_path: Path, likes_foxes: DataConfig, monkeypatch: pytest.MonkeyPatch) -> Learn:
    """Train a stage with adapters in tmp_path/NAME."""
    monkeypatch.setattr(reward_model, "open_reward", lambda *_: likes_small_ids)
    monkeypatch.setattr(alignment, "HELD_OUT", 4)
    # Seconds of measuring and of drawing, in each.
    monkeypatch.setattr(trainer, "measured_peak", lambda runtime: 1e9)
    monkeypatch.setattr(trainer, "write_report", lambda *_: None)

    def run(kind: str, name: str = "run", *, steps: int = 6, runtime: Runtime = CPU, **rest: Any) -> Any:
        target = Run(tmp_path / name)
        stage, recipe = begin(kind, chat, tmp_path, likes_foxes)
        recipe = override(dataclasses.replace(recipe, lora=LoraConfig(rank=4)), "precision", runtime.precision)
        recipe = dataclasses.replace(recipe, budget=BudgetConfig(steps=steps))
        for setting, value in {"loop.save_every": 4, "loop.evaluate_every": 100, "loop.samples": 0, **rest}.items():
            recipe = override(recipe, setting, value) if "." in setting else recipe
        resume = rest.get("resume", False)
        return stage(target.read_recipe() if resume else recipe, target, runtime, Recorder(), resume=resume), target

    return run


def trained(run: Run, name: str = "model") -> dict[str, Tensor]:
    return run.find_checkpoint().tensors(name)


def losses(run: Run) -> list[float]:
    return [line["loss"] for line in read_metrics(run.metrics) if "loss" in line]


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_learn_and_a_resumed_run_is_bit_equal(kind: str, learn: Learn, chat: Run) -> None:
    _, run = learn(kind)
    names = ("model", "critic") if kind == "ppo" else ("model",)
    before, base = {name: trained(run, name) for name in names}, trained(chat)
    for weights in before.values():
        moved = {name for name, weight in base.items() if not torch.equal(weights[name], weight)}
        # A new head, of rewards or values, learns as it is.
        assert moved == ({"head.weight"} if len(weights["head.weight"]) == 1 else set())
        assert all(weight.abs().sum() > 0 for name, weight in weights.items() if "lora_" in name)
    assert {name.split("/")[0] for name in trained(run, "optimizer")} == {
        f"{'' if len(names) == 1 else 'policy.' if module == 'model' else 'critic.'}{name}"
        for module, weights in before.items()
        for name, weight in weights.items()
        if "lora_a" in name or "lora_b" in name or (name == "head.weight" and len(weight) == 1)
    }

    whole = losses(run)
    shutil.rmtree(run.find_checkpoint().path)
    learn(kind, resume=True)
    assert losses(run) == whole
    for name, weights in before.items():
        again = trained(run, name)
        assert all(torch.equal(again[each], weight) for each, weight in weights.items())


@pytest.mark.parametrize("kind", ["implicit", "dpo", "ppo", "grpo"])
def test_the_reference_has_the_memory_of_the_model_and_stays_the_base(
    kind: str, learn: Learn, chat: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    references: list[GPT] = []
    models: list[Any] = []

    def remember(*arguments: Any) -> GPT:
        references.append(load_reference(*arguments))
        return references[0]

    class Watched(Loop):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            models.extend(self.modules.values())

    monkeypatch.setattr(reward_model, "load_reference", remember)
    monkeypatch.setattr(alignment, "load_reference", remember)
    monkeypatch.setattr(trainer, "Loop", Watched)
    learn(kind, runtime=choose("cpu", "bf16"), steps=2)
    (reference,), plain = references, GPT(models[0].config)
    places = {name: each.data_ptr() for name, each in reference.named_parameters()}
    assert len(models) == (2 if kind == "ppo" else 1)
    for model in models:
        own = {name: each.data_ptr() for name, each in model.named_parameters() if not each.requires_grad}
        assert all(places[name] == place for name, place in own.items() if name != "head.weight")
    plain.load_state_dict(trained(chat))
    plain.compute_dtype = torch.bfloat16
    tokens = torch.randint(300, (2, 30))
    with torch.no_grad():
        assert torch.equal(plain(tokens), reference(tokens)) and not torch.equal(plain(tokens), models[0](tokens))


def test_the_critic_goes_on_from_a_reward_model_that_has_adapters_itself(learn: Learn, tmp_path: Path) -> None:
    _, judge = learn("reward")
    merged = RewardModel.load(judge, CPU)
    learn("ppo", "aligned", **{"alignment.reward": str(judge.path)})
    critic = trained(Run(tmp_path / "aligned"), "critic")
    for name, weight in merged.named_parameters():
        assert torch.equal(critic[name], weight) == (name != "head.weight")


def test_whoever_reads_such_a_run_sees_a_plain_model(learn: Learn, chat: Run, tmp_path: Path) -> None:
    before = losses(learn("finetune", steps=20, **{"optimizer.adapter_rate": 0.02})[1])
    assert before[-1] < before[0] - 0.3
    model, _ = Run(tmp_path / "run").load_model(CPU)
    assert type(model) is GPT and {*model.state_dict()} == {*trained(chat)}
    export(Run(tmp_path / "run"), tmp_path / "out")
    theirs = load_file(tmp_path / "out" / "model.safetensors")
    assert not any("lora" in name for name in theirs)
    import_(tmp_path / "out", tmp_path / "back")
    back, _ = Run(tmp_path / "back").load_model(CPU)
    for name, weight in model.blocks.state_dict().items():
        torch.testing.assert_close(back.blocks.state_dict()[name], weight, rtol=0, atol=1e-6)
    # What goes on from there has adapters only if they are asked for again, beside the merged weights.
    recipe = finetuning_recipe(Run(tmp_path / "run"), Run(tmp_path / "run").find_checkpoint(), DataConfig("x"))
    assert recipe.lora.rank == 0


def test_another_rank_is_another_model(learn: Learn, tmp_path: Path) -> None:
    learn("finetune", steps=1)
    run = Run(tmp_path / "run")
    run.write_recipe(override(run.read_recipe(), "lora.rank", 8))
    with pytest.raises(InputError, match=r"lora.rank is 8 by .*config.json, but .* was made with 4"):
        run.load_model(CPU)


@pytest.mark.parametrize(("kind", "shard"), [("dpo", False), ("finetune", True)])
def test_two_processes_learn_what_one_does(
    kind: str, shard: bool, chat: Run, likes_foxes: DataConfig, tmp_path: Path
) -> None:
    _, recipe = begin(kind, chat, tmp_path, likes_foxes)
    recipe = dataclasses.replace(recipe, lora=LoraConfig(rank=3), budget=BudgetConfig(steps=5))
    for name, value in {"precision": "fp32", "loop.samples": 0, "loop.checkpoint_activations": shard}.items():
        recipe = override(recipe, name, value)
    train_on(recipe, tmp_path / "one", 1)
    train_on(override(recipe, "loop.shard", shard), tmp_path / "two", 2)
    one, two = Run(tmp_path / "one"), Run(tmp_path / "two")
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)
    assert trained(one).keys() == trained(two).keys()
    torch.testing.assert_close(trained(two), trained(one), rtol=0, atol=1e-4)
