"""gpt export and gpt import, as a person types them."""

import io
import json
import sys
from pathlib import Path

import pytest

from engine.run import Run
from tests.cli.conftest import SMALL, Gpt
from tests.train.data.hub import Hub


def test_a_run_goes_out_and_comes_back_and_says_the_same(gpt: Gpt, trained: Path) -> None:
    out = gpt("export", str(trained), "--out", "hf")
    assert out.code == 0 and "from_pretrained('hf')" in out.out
    names = {path.name for path in Path("hf").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md"}
    assert all(f"hf/{name}: " in out.out for name in names)
    back = gpt("import", "hf", "--out", "runs/back")
    assert back.code == 0 and "gpt generate runs/back" in back.out
    info = gpt("info", "runs/back").out
    assert (
        "runs/back (hf)" in info
        and "imported" in info
        and "budget" not in info
        and "step-00000000: not evaluated, whole" in info
    )
    words = ("Once upon", "--temperature", "0", "--max-tokens", "8", "--precision", "fp32")
    assert gpt("generate", "runs/back", *words).out == gpt("generate", str(trained), *words).out
    assert "<|assistant|>" in gpt("tokenizer", "show", "runs/back").out


def test_a_run_becomes_one_file_for_llama_cpp(gpt: Gpt, trained: Path) -> None:
    out = gpt("export", str(trained), "--gguf", "--out", "it's.gguf", "--precision", "fp32")
    assert out.code == 0 and """llama-completion -m 'it'"'"'s.gguf' -no-cnv -p""" in out.out, out.err
    assert gpt("export", str(trained), "--gguf", "--out", "half.gguf").code == 0
    sizes = [Path(name).stat().st_size for name in ("it's.gguf", "half.gguf")]
    assert 1.5 < sizes[0] / sizes[1] < 2 and not list(Path().glob(".writing*"))
    for message, options in {
        "half.gguf is there already; choose another file with --out": ("--gguf", "--out", "half.gguf"),
        "--precision is 'fp8'; it must be fp32, fp16, bf16, int8": ("--gguf", "--out", "new", "--precision", "fp8"),
        "--precision belongs to --gguf": ("--out", "new", "--precision", "fp16"),
        "--license and --base-model belong to the README": ("--gguf", "--out", "new", "--license", "mit"),
    }.items():
        refused = gpt("export", str(trained), *options)
        assert refused.code == 2 and message in refused.err and not Path("new").exists()


def test_an_imported_model_is_finetuned_and_chats(gpt: Gpt, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpt("export", str(trained), "--out", "hf").code == 0 and gpt("import", "hf", "--out", "back").code == 0
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"Hello.\n"), encoding="utf-8"))
    said = gpt("chat", "back", "--max-tokens", "3")
    assert said.code == 0 and "base model" in said.err
    rows = [{"prompt": f"say {n}", "response": f"{n}!"} for n in range(100)]
    Path("chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tuned = gpt("finetune", "back", "--data", "chats.jsonl", "--steps", "1", "--batch", "2")
    assert tuned.code == 0 and Run(Path("back-chat")).tokenizer.name == "tokenizer.json", tuned.err
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"say 7\n"), encoding="utf-8"))
    said = gpt("chat", "back-chat", "--max-tokens", "3")
    assert said.code == 0 and "base model" not in said.err


def test_nothing_is_written_into_a_folder_that_holds_something(gpt: Gpt, trained: Path) -> None:
    before = sorted(trained.rglob("*"))
    for command in ("export", "import"):
        result = gpt(command, str(trained), "--out", str(trained))
        assert result.code == 2 and "not an empty folder" in result.err and "--out" in result.err
    assert sorted(trained.rglob("*")) == before


def test_what_the_hub_would_refuse_in_a_card_is_refused(gpt: Gpt, trained: Path) -> None:
    for option, bad in (("--license", "My own"), ("--base-model", "../base")):
        refused = gpt("export", str(trained), "--out", "hf", option, bad)
        assert refused.code == 2 and option in refused.err and repr(bad) in refused.err and not Path("hf").exists()


def test_what_is_no_model_is_refused(gpt: Gpt) -> None:
    Path("empty").mkdir()
    missing = gpt("import", "empty", "--out", "run")
    assert missing.code == 2 and "config.json" in missing.err
    Path("empty/config.json").write_text('{"model_type": "gpt2"}')
    other = gpt("import", "empty", "--out", "run")
    assert other.code == 2 and "'gpt_neox'" in other.err and not Path("run").exists()
    owner = gpt("import", "HuggingFaceTB", "--out", "run")
    assert owner.code == 2 and "there is no folder HuggingFaceTB; a model of the Hub is named as OWNER" in owner.err
    path = gpt("import", "./missing", "--out", "run")
    assert path.code == 2 and "there is no folder ./missing" in path.err


def test_data_is_prepared_with_an_imported_tokenizer_and_trained_on(gpt: Gpt, trained: Path) -> None:
    assert gpt("export", str(trained), "--out", "hf").code == 0 and gpt("import", "hf", "--out", "back").code == 0
    Path("words.txt").write_text("<|endoftext|>\n".join(f"A little story, number {n}.\n" for n in range(300)))
    prepared = gpt("data", "prepare", "words.txt", "--out", "ready", "--tokenizer", "back", "--workers", "1")
    assert prepared.code == 0 and "little story" in gpt("data", "show", "ready").out
    assert gpt("train", "nano", "--data", "ready", "--steps", "1", "--out", "run", *SMALL).code == 0
    assert Run(Path("run")).tokenizer.name == "tokenizer.json" and gpt("generate", "run", "--max-tokens", "3").code == 0
    resumed = gpt("train", "nano", "--out", "run", "--resume", "--steps", "2")
    assert resumed.code == 0, resumed.err


def test_an_imported_tokenizer_serves_wherever_one_is_named(gpt: Gpt, trained: Path) -> None:
    assert gpt("export", str(trained), "--out", "hf").code == 0 and gpt("import", "hf", "--out", "back").code == 0
    Path("words.txt").write_text("\n\n".join(f"A little story, number {n}." for n in range(600)))
    tuned = gpt("finetune", "back", "--data", "words.txt", "--steps", "1", "--batch", "2", "--set", "loop.samples=0")
    assert tuned.code == 0, tuned.err
    # A run, a folder of prepared data and a file.
    for number, name in enumerate(("back", "back-tuned/data", "back/tokenizer.json")):
        prepared = gpt("data", "prepare", "words.txt", "--out", f"ready-{number}", "--tokenizer", name)
        assert prepared.code == 0, prepared.err
        assert "tokens, fingerprint" in gpt("tokenizer", "show", name).out
    for data in ((), ("--data", "ready-1")):
        measured = gpt("evaluate", "back-tuned", "-n", "1", "--max-tokens", "2", *data)
        assert measured.code == 0 and "words.txt, validation" in measured.out, measured.err


def test_a_model_of_the_hub_becomes_a_run_that_says_where_it_is_from(gpt: Gpt, trained: Path, hub: Hub) -> None:
    assert gpt("export", str(trained), "--out", "hf").code == 0
    files = {path.name: path.read_bytes() for path in Path("hf").iterdir()}
    commit = hub.publish("owner/model", files)
    hub.publish("owner/model", files | {"config.json": b"{}"})
    named = gpt("import", "owner/model", "--out", "runs/named", "--revision", commit)
    assert named.code == 0 and gpt("import", "hf", "--out", "runs/local").code == 0, named.err
    recipes = [Run(Path("runs", name)).read_recipe() for name in ("named", "local")]
    assert recipes[0].model == recipes[1].model and recipes[0].data.revision == commit
    info = gpt("info", "runs/named").out
    assert "runs/named (owner/model)" in info and f"imported, commit {commit}" in info
    assert "owner/model" in gpt("export", "runs/named", "--out", "again").out + Path("again/README.md").read_text()
    refused = gpt("import", "owner/other", "--out", "runs/other")
    assert refused.code == 2 and "no such model on the hub" in refused.err and not Path("runs/other").exists()
    refused = gpt("import", "hf", "--out", "runs/other", "--revision", "main")
    assert refused.code == 2 and "--revision is for models of the Hub" in refused.err


def test_an_imported_model_may_see_less_than_it_could(gpt: Gpt, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpt("export", str(trained), "--out", "hf").code == 0
    monkeypatch.setattr("cli.huggingface.MUCH", 4000)  # its 32 tokens take 4,096 bytes
    less = gpt("import", "hf", "--out", "less", "--context", "16")
    assert less.code == 0 and "context 16," in less.out and Run(Path("less")).read_recipe().model.context == 16
    whole = gpt("import", "hf", "--out", "whole")
    assert "--context" not in less.err and "a text of all 32 tokens takes 4,096 bytes for its keys" in whole.err
    more = gpt("import", "hf", "--out", "more", "--context", "33")
    assert more.code == 2 and "--context is 33; it must be at most the model's own, 32" in more.err
    # A step of its finetuning has as many tokens with another context, unless the batch is said.
    assert "batch     1024 x 16 = 16,384" in gpt("plan", "whole", "--gpu", "4090", "--context", "16").out
    said = gpt("plan", "whole", "--gpu", "4090", "--context", "16", "--set", "loop.batch=512").out
    assert "batch     512 x 16 = 8,192" in said
