"""The table of families in cli/README.md, a test for each cell: small random models, as transformers writes them.

Every command below takes what `gpt import` made, as it takes what was trained here.
"""

import io
import json
import re
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from engine.batcher import Batcher, Request
from engine.chat_template import Message, answer_ends, answer_prompt
from engine.run import Run
from engine.runtime import Runtime
from engine.sampling import Sampling
from engine.tokenizer import Tokenizer
from tests.cli.conftest import Gpt
from tests.cli.pretrained import FAMILIES, pretrained

ROOT = Path(__file__).resolve().parents[2]
SMALL = ("--steps", "1", "--batch", "2", "--set", "loop.samples=0", "--set", "data.final_evaluation_tokens=300")


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each family."""
    found = {name: tmp_path_factory.mktemp(name) / name for name in FAMILIES}
    for name, folder in found.items():
        pretrained(name, folder)
    return found


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def run(gpt: Gpt, folders: dict[str, Path], family: str) -> Run:
    """A run of the family, imported."""
    done = gpt("import", str(folders[family]), "--out", "runs/model")
    assert done.code == 0 and "128" in done.out, done.err
    return Run(Path("runs/model"))


def theirs(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def go_on(model: Any, ids: list[int], count: int = 8) -> list[int]:
    """What transformers writes after these ids, the likeliest, without a thought of an end."""
    options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count, "pad_token_id": 0}
    return list(model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist())


def test_import(run: Run, folders: dict[str, Path], family: str) -> None:
    model, tokenizer = run.load_model(Runtime(torch.device("cpu"), "fp32"))
    ids = answer_prompt(tokenizer, [Message("user", "Where is my hat?")])
    with torch.inference_mode():
        ours = model.logits(model(torch.tensor([ids])))[0]
        torch.testing.assert_close(ours, theirs(folders[family])(torch.tensor([ids])).logits[0], atol=1e-4, rtol=1e-4)
    recipe = run.read_recipe()
    assert recipe.model.family == family and recipe.chat and recipe.tokens_per_step == 16_384


def test_export(gpt: Gpt, run: Run, folders: dict[str, Path], family: str) -> None:
    done = gpt("export", str(run.path), "--out", "back")
    assert done.code == 0, done.err
    before, after = theirs(folders[family]), theirs(Path("back"))
    assert type(before) is type(after)
    torch.testing.assert_close(after.state_dict(), before.state_dict(), atol=0, rtol=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert Path("back", name).read_bytes() == (folders[family] / name).read_bytes()


def test_chat(gpt: Gpt, run: Run, folders: dict[str, Path], family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer.load(run.tokenizer)
    written = go_on(theirs(folders[family]), answer_prompt(tokenizer, [Message("user", "Hello.")]))
    answer = tokenizer.decode(list(takewhile(lambda token: token not in answer_ends(tokenizer), written)))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello.\n")))
    said = gpt("chat", str(run.path), "--max-tokens", "8", "--temperature", "0", "--precision", "fp32")
    assert said.code == 0 and "base model" not in said.err, said.err
    assert said.out == f"{answer}\n"


def test_finetune(gpt: Gpt, run: Run) -> None:
    rows = [{"prompt": f"say {n}", "response": f"{n}!"} for n in range(60)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = gpt("finetune", str(run.path), "--data", "chats.jsonl", *SMALL)
    assert tuned.code == 0, tuned.err
    optimizer = Run(Path("runs/model-chat")).read_recipe().optimizer
    assert optimizer.kind == "adamw" and optimizer.matrix_rate == pytest.approx(0.09 / 32)
    assert gpt("export", "runs/model-chat", "--out", "back").code == 0
    assert theirs(Path("back")).config.model_type == run.read_recipe().model.family


def test_dpo(gpt: Gpt, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.reward_model.USUAL_WIDTH", 8)  # a quarter of what these models are
    rows = [{"prompt": f"say {n}", "chosen": f"{n}!", "rejected": f"{n}?"} for n in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    aligned = gpt("rlhf", "dpo", str(run.path), "--data", "pairs.jsonl", *SMALL)
    assert aligned.code == 0, aligned.err
    assert Run(Path("runs/model-dpo")).read_recipe().optimizer.matrix_rate == pytest.approx(3e-5 / 4)
    first = json.loads(Run(Path("runs/model-dpo")).metrics.read_text().splitlines()[0])
    assert first["loss"] == pytest.approx(0.6931, abs=1e-3)  # the policy is the reference yet


def test_native_cpu(run: Run, folders: dict[str, Path], family: str) -> None:
    model, tokenizer = run.load_model(Runtime(torch.device("cpu"), "fp32"))
    ids = tokenizer.encode("Where is my hat? asked the bear.")
    batcher = Batcher(model, slots=1)
    assert batcher.native is not None
    batcher.submit(Request(ids, Sampling(temperature=0.0), max_tokens=30))
    found = []
    while not batcher.idle:
        found += [step.token for step in batcher.step()]
    assert found == go_on(theirs(folders[family]), ids, 30)


def test_compiled(run: Run) -> None:
    model, tokenizer = run.load_model(Runtime(torch.device("cpu"), "fp32"))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.tensor([tokenizer.encode("A bear.")]))  # the next length is any length
    ids, found = torch.tensor([tokenizer.encode("Where is my hat? asked the bear.")]), []
    for hidden in (compiled, model):
        model.zero_grad()
        value = hidden(ids)
        value.square().sum().backward()
        gradients = (parameter.grad for parameter in model.parameters() if parameter.grad is not None)
        found.append([value.detach(), *gradients])
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def test_the_table_of_families_has_a_row_for_each_and_a_test_behind_each_cell() -> None:
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", (ROOT / "cli/README.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == set(FAMILIES) and {cells.count("yes") for _, cells in rows} == {7}
