"""Each command as a person types it, and what it answers to a mistake."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.run import Run
from engine.tokenizer import Tokenizer
from tests.cli.conftest import SMALL, Gpt

ROOT = Path(__file__).parents[2]
HEAVY = (
    *("torch", "numpy", "datasets", "wandb", "matplotlib", "sentencepiece", "sacrebleu", "rouge_score", "pyarrow"),
    *("fastapi", "uvicorn", "pydantic"),
)
COMMANDS = [
    ("train",),
    ("finetune",),
    ("evaluate",),
    ("generate",),
    ("chat",),
    ("serve",),
    ("info",),
    ("settings",),
    ("export",),
    ("import",),
    ("tokenizer", "train"),
    ("tokenizer", "show"),
    ("data", "prepare"),
    ("data", "show"),
    ("bench-train",),
    ("bench-attention",),
    ("bench-layernorm",),
    ("bench-cross-entropy",),
    ("bench-decode-attention",),
    ("bench-quality",),
    ("bench-compile",),
    ("bench-serving",),
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help_with_an_example(gpt: Gpt, command: tuple[str, ...]) -> None:
    result = gpt(*command, "--help")
    assert result.code == 0 and "Example: gpt " + " ".join(command) in result.out


def test_help_loads_nothing_heavy() -> None:
    script = f"import sys, cli.main; print([name for name in {HEAVY} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert output.stdout.strip() == "[]"


def test_training_leaves_a_whole_run_folder(gpt: Gpt, trained: Path) -> None:
    for name in ("config.json", "tokenizer.model", "metrics.jsonl", "samples.md", "loss.png", "report.md"):
        assert (trained / name).stat().st_size > 0, name
    checkpoint = trained / "checkpoints" / "step-00000002"
    assert {path.name for path in checkpoint.iterdir()} == {
        "model.safetensors",
        "optimizer.safetensors",
        "random.safetensors",
        "state.json",
        "manifest.json",
        "evaluation.json",
    }
    config = json.loads((trained / "config.json").read_text())
    assert config["recipe"]["model"]["blocks"] == 1
    assert config["versions"]["torch"]
    report = (trained / "report.md").read_text()
    assert "bits/byte" in report and "loss.png" in report and "model.width | 16" in report


def test_a_run_tells_what_it_is(gpt: Gpt, trained: Path) -> None:
    result = gpt("info", str(trained))
    assert result.code == 0
    for part in ("nano", "16 wide", "stories", "2 steps", "step-00000002", "bits/byte", "whole"):
        assert part in result.out


def test_generate_goes_on_from_the_prompt_and_repeats_with_its_seed(gpt: Gpt, trained: Path) -> None:
    first = gpt("generate", str(trained), "Once upon", "--seed", "3", "--max-tokens", "12")
    assert first.code == 0 and first.out.startswith("Once upon")
    assert gpt("generate", str(trained), "Once upon", "--seed", "3", "--max-tokens", "12") == first
    several = gpt("generate", str(trained), "-n", "2", "--temperature", "0", "--max-tokens", "5")
    assert several.out.count("---") == 4


@pytest.mark.parametrize("chat", [True, False])
def test_a_chat_model_generates_no_further_than_its_answer(
    gpt: Gpt, trained: Path, monkeypatch: pytest.MonkeyPatch, chat: bool
) -> None:
    config = json.loads((trained / "config.json").read_text())
    config["recipe"]["chat"] = chat
    del config["sha256"]
    (trained / "config.json").write_text(json.dumps(config))
    # An older checkpoint does not know what kind of model it is.
    manifest = trained / "checkpoints/step-00000002/manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({"format": 1, "step": content["step"], "files": content["files"]}))
    end, steps = Tokenizer.load(trained / "tokenizer.model").special["<|end|>"], []

    def choose(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        steps.append(len(logits))
        return torch.full((len(logits),), end)

    monkeypatch.setenv("GPT_KERNELS", "torch")  # a native step chooses by itself
    monkeypatch.setattr("engine.batcher.choose", choose)
    for count in (1, 2):
        steps.clear()
        assert gpt("generate", str(trained), "Once", "-n", str(count), "--max-tokens", "4").code == 0
        assert steps == ([count] if chat else [count] * 4)


def test_resume_goes_on_and_a_second_run_in_the_folder_is_refused(gpt: Gpt, trained: Path) -> None:
    refused = gpt("train", "nano", "--steps", "2", "--out", str(trained), *SMALL)
    assert refused.code == 2 and "--resume" in refused.err and "--overwrite" in refused.err
    resumed = gpt("train", "nano", "--steps", "4", "--out", str(trained), "--resume")
    assert resumed.code == 0 and "after step 2" in resumed.out
    assert "4 steps" in gpt("info", str(trained)).out
    same = gpt("train", "nano", "--steps", "4", "--out", str(trained), "--resume", *SMALL)
    assert same.code == 0 and "after step 4" in same.out, same.err
    for setting in ("model.blocks=3", "model.vocab_size=300"):
        changed = gpt("train", "nano", "--out", str(trained), "--resume", *SMALL, "--set", setting)
        name, _, value = setting.partition("=")
        own = "1" if "blocks" in name else "400"
        assert changed.code == 2 and f"own recipe, where --set {name} is {own}, not {value};" in changed.err
    again = gpt("train", "nano", "--steps", "1", "--out", str(trained), "--overwrite", *SMALL)
    assert again.code == 0 and "1 steps" in gpt("info", str(trained)).out


def test_every_derived_value_is_printed_at_the_start(gpt: Gpt) -> None:
    out = gpt("train", "nano", "--tokens", "256", "--out", "run", *SMALL).out
    for part in ("0.0M parameters", "4 x 32 = 128 tokens a step", "2 steps, 256 tokens", "muon", "wsd", "TFLOP/s"):
        assert part in out


def test_prepared_data_trains_a_model(gpt: Gpt) -> None:
    Path("words.txt").write_text("<|endoftext|>\n".join(f"This is little story number {n}.\n" for n in range(300)))
    prepared = gpt("data", "prepare", "words.txt", "--out", "ready", "--vocab-size", "300")
    assert prepared.code == 0 and "train:" in prepared.out
    shown = gpt("data", "show", "ready", "--verify", "--split", "validation")
    assert "every checksum right" in shown.out and "little story" in shown.out
    train = ("train", "nano", "--data", "ready", "--steps", "2", "--out", "run", *SMALL)
    result = gpt(*train, "--verify")
    assert result.code == 0 and "ready, train: every checksum right" in result.out, result.err
    tokens = Path("ready/train/00000.tokens")
    tokens.write_bytes(tokens.read_bytes()[:-4] + b"\xff\xff" + tokens.read_bytes()[-2:])
    for command in (
        (*train[: -len(SMALL) - 2], "--out", "other", *SMALL),
        ("train", "--out", "run", "--resume", "--verify"),
    ):
        refused = gpt(*command)
        assert refused.code == 2 and "ready/train/00000.tokens is damaged: its SHA-256" in refused.err
    nothing = gpt("train", "nano", "--verify")
    assert nothing.code == 2 and "--verify checks prepared data, and stories is not" in nothing.err


def test_local_files_train_on_a_machine_that_lacks_the_optional_packages(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("<|endoftext|>\n".join(f"A little story, number {n}.\n" for n in range(300)))
    missing = ["datasets", "wandb", "matplotlib", "rouge_score", "sacrebleu", "pyarrow", "huggingface_hub", "triton"]
    script = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
sys.argv = ["gpt", "train", "nano", "--data", "words.txt", "--steps", "1", *{SMALL}]
from cli.main import main
main()
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/nano/report.md").exists() and not (tmp_path / "runs/nano/loss.png").exists()


def test_data_show_prints_documents(gpt: Gpt) -> None:
    assert gpt("data", "show", "stories", "-n", "3").out.count("---") == 3


def test_tokenizer_train_and_show(gpt: Gpt) -> None:
    Path("text.txt").write_text("the cat sat on the mat. " * 50)
    result = gpt("tokenizer", "train", "--data", "text.txt", "--vocab-size", "5000", "--out", "own.model")
    assert result.code == 0 and "the text supports" in result.out
    assert "<|endoftext|>" in gpt("tokenizer", "show", "own.model").out
    shown = gpt("tokenizer", "show", "own.model", "the cat 😀")
    assert "bytes per token" in shown.out and "'the'" in shown.out


def test_a_text_too_small_for_the_vocabulary_is_said(gpt: Gpt) -> None:
    Path("text.txt").write_text("\n\n".join(f"the cat sat on mat number {n}." for n in range(500)))
    result = gpt("train", "nano", "--data", "text.txt", "--steps", "1", "--out", "run", *SMALL[:8], *SMALL[10:])
    assert result.code == 0 and "the vocabulary is" in result.out


def test_bench_attention_leaves_figures_and_a_picture(gpt: Gpt) -> None:
    few = ("--head-dim", "32", "--lengths", "64,128", "--tokens", "128", "--full", "--only", "ours,plain,cudnn")
    result = gpt("bench-attention", *few, "--device", "cpu", "--out", "figures")
    assert result.code == 0, result.err
    for part in ("ours is the torch backend", "cudnn: no forward and backward", "D 32 full T 128: ours "):
        assert part in result.out
    (written,) = Path("figures").glob("attention-*.json")
    content = json.loads(written.read_text())
    assert content["versions"]["torch"] and content["backend"] == "torch"
    assert [point["length"] for point in content["points"]] == [64, 128]
    assert content["points"][1]["backward"]["ours"]["seconds"] > 0
    assert written.with_name(f"{written.stem}-full.png").exists()


def test_there_is_nothing_to_tune_without_a_gpu(gpt: Gpt) -> None:
    result = gpt("bench-attention", "--tune", "--device", "cpu")
    assert result.code == 2 and "gpt bench-compile" in result.err


MISTAKES = {
    "no such dtype": (["bench-compile", "--dtype", "bf61"], "did you mean bf16?"),
    "no such chip": (["bench-compile", "--model", "75"], "80, 89, 90, 100, 120"),
    "no such preset": (["train", "huge"], "nano, tiny, large"),
    "no preset": (["train"], "gpt train nano"),
    "two sizes": (["train", "nano", "--depth", "3"], "leave out one"),
    "two sizes without a preset": (["plan", "--params", "30M", "--depth", "3"], "leave out one"),
    "two lengths": (["train", "--hours", "1", "--minutes", "3"], "leave out one"),
    "no size": (["plan"], "gpt train --depth 6"),
    "no such size": (["train", "--params", "many"], "such as 30M"),
    "too deep": (["train", "--depth", "101"], "at most 100"),
    "no such setting": (["train", "nano", "--set", "model.depth=3"], "blocks"),
    "wrong type": (["train", "nano", "--set", "model.blocks=many"], "int"),
    "not a setting": (["train", "nano", "--set", "blocks"], "path=value"),
    "impossible shape": (["train", "nano", "--set", "model.heads=3"], "multiple of"),
    "two budgets": (["train", "nano", "--steps", "3", "--minutes", "3"], "exactly one"),
    "endless budget": (["train", "nano", "--minutes", "inf"], "at most"),
    "no number": (["train", "nano", "--tokens", "nan"], "at most"),
    "negative budget": (["train", "nano", "--steps", "-3"], "above 0"),
    "no such device": (["train", "nano", "--device", "tpu"], "--device"),
    "no such precision": (["train", "nano", "--precision", "int3"], "bf16"),
    "a folder of something else": (["train", "nano", "--out", "mine"], "not empty"),
    "no such file": (["train", "nano", "--data", "missing.txt"], "missing.txt"),
    "empty file": (["train", "nano", "--data", "empty.txt"], "empty"),
    "binary file": (["train", "nano", "--data", "binary.txt"], "binary.txt"),
    "not utf-8": (["train", "nano", "--data", "latin.txt"], "UTF-8"),
    "no such column": (["train", "nano", "--data", "rows.jsonl", "--column", "story"], "text"),
    "too few tokens": (["train", "nano", "--data", "few.txt", "--set", "model.vocab_size=300"], "too few"),
    "stories never end": (["train", "nano", "--epochs", "2", "--set", "data.documents=none"], "never end"),
    "not a run": (["generate", "nowhere"], "not a run"),
    "nobody to chat with": (["chat", "nowhere"], "not a run"),
    "info on nothing": (["info", "nowhere"], "not a run"),
    "resume nothing": (["train", "nano", "--resume"], "not a run"),
    "no tokenizer": (["tokenizer", "show", "nothing.model"], "nothing.model"),
    "hot": (["generate", "nowhere", "--temperature", "-1"], "temperature"),
    "no such head dim": (["bench-attention", "--head-dim", "64,48"], "it takes 32"),
    "no such provider": (["bench-attention", "--only", "ours,theirs"], "cudnn"),
    "more than all tokens": (["bench-attention", "--lengths", "256", "--tokens", "128"], "--tokens is only 128"),
    "lengths in words": (["bench-attention", "--lengths", "long"], "whole numbers"),
    "nobody to meet": (["train", "nano", "--rendezvous", "here:1"], "give both"),
    "no place to meet": (["train", "nano", "--nodes", "1", "--rendezvous", "here"], "HOST:PORT"),
    "a page's address": (["serve", "nowhere", "--cors", "https://a.example/page"], "https://a.example"),
    "no site": (["serve", "nowhere", "--cors", "nonsense"], "--cors is 'nonsense'"),
    "every site": (["serve", "nowhere", "--cors", "*"], "every page"),
    "data into a run": (["data", "prepare", "short.txt", "--out", "mine"], "thesis.txt, which is no prepared data"),
    "data into a file": (["data", "prepare", "short.txt", "--out", "short.txt"], "is a file"),
    "nothing to verify": (["data", "show", "short.txt", "--verify"], "--verify checks prepared data"),
    "almost a preset": (["train", "nanno"], "did you mean nano?"),
    "almost a setting": (["train", "nano", "--set", "model.blokcs=3"], "did you mean blocks?"),
    "a setting of a group": (["train", "nano", "--set", "blocks=3"], "did you mean model.blocks?"),
    "almost a value": (["train", "nano", "--set", "schedule.shape=cosin"], "did you mean cosine?"),
    "almost a data set": (["data", "show", "tinystory"], "did you mean tinystories?"),
    "almost a GPU": (["plan", "nano", "--gpu", "h10"], "did you mean h100?"),
    "a batch that nothing fills": (
        ["train", "nano", "--data", "few.txt", "--set", "model.vocab_size=300"],
        "loop.batch",
    ),
    "a model for no machine": (
        ["train", "nano", "--data", "short.txt", "--set", "model.width=65536", "--set", "model.blocks=1000"],
        "--set model.width=N",
    ),
    "nobody's home": (["train", "nano", "--data", "~nobody-of-that-name/x.txt"], "no such file"),
    "tiny vocabulary": (["tokenizer", "train", "--data", "short.txt", "--vocab-size", "10"], "too small"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_message_and_exit_code_2(gpt: Gpt, mistake: str) -> None:
    Path("empty.txt").write_text("")
    Path("binary.txt").write_bytes(bytes(range(256)) * 10)
    Path("latin.txt").write_bytes("caf\xe9 ".encode("latin-1") * 50)
    Path("rows.jsonl").write_text('{"text": "hello"}\n{"text": "you"}\n')
    Path("short.txt").write_text("one little story.\n\nand another one.")
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("do not delete")
    Path("few.txt").write_text("<|endoftext|>\n".join(f"story number {n}.\n" for n in range(30)))
    arguments, expected = MISTAKES[mistake]
    result = gpt(*arguments)
    assert result.code == 2
    assert result.err.startswith("error: ") and expected in result.err
    assert "Traceback" not in result.err
    assert Path("mine/thesis.txt").exists()


def test_after_a_mistake_in_the_data_the_right_command_just_works(gpt: Gpt) -> None:
    Path("empty.txt").write_text("")
    assert gpt("train", "nano", "--data", "empty.txt", "--out", "run").code == 2
    assert gpt("train", "nano", "--steps", "1", "--out", "run", *SMALL).code == 0


def test_after_a_column_that_nobody_can_read_another_one_trains_and_says_what_is_held_out(gpt: Gpt) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    texts = pyarrow.array([f"The fox sat down on stone number {n}." for n in range(60)])
    buffers = pyarrow.array([b"caf\xe9"] * 60, pyarrow.binary()).buffers()
    titles = pyarrow.Array.from_buffers(pyarrow.string(), 60, buffers)
    for folder in ("data/train", "data/validation", "data/train/.ipynb_checkpoints"):
        Path(folder).mkdir(parents=True)
        parquet.write_table(pyarrow.table({"text": texts, "title": titles}), f"{folder}/a.parquet")
    command = (
        "train",
        "nano",
        "--steps",
        "1",
        "--data",
        "data",
        "--out",
        "runs/a",
        *SMALL,
        "--set",
        "data.documents=60",
    )
    refused = gpt(*command, "--column", "title")
    assert refused.code == 2 and "a.parquet, row 1: column 'title' cannot be read" in refused.err
    trained = gpt(*command)
    assert trained.code == 0, trained.err
    assert "train      60 documents of 60 rows read\n" in trained.out
    assert "held out   the data's own validation split, by the name of the folder: validation/a.parquet" in trained.out


def test_an_interrupted_preparation_goes_on_with_resume(gpt: Gpt, monkeypatch: pytest.MonkeyPatch) -> None:
    from train import pretrain

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "prepare", interrupted)
        stopped = gpt("train", "nano", "--steps", "1", "--out", "run", *SMALL)
    assert stopped.code == 130 and "gpt train nano --out run --resume" in stopped.out
    tokenizer = Path("run/tokenizer.model").read_bytes()
    assert gpt("train", "nano", "--out", "run", "--resume").code == 0
    assert Path("run/tokenizer.model").read_bytes() == tokenizer


def test_what_is_tokenized_is_kept_when_the_preparation_fails_on_the_way(
    gpt: Gpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine.errors import UnfinishedError
    from train import pretrain

    honest = pretrain.prepare

    def full(source: Any, tokenizer: Any, folder: Any, split: str, **options: Any) -> Any:
        if split == "validation":
            raise UnfinishedError("the disk is full")
        return honest(source, tokenizer, folder, split, **options)

    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "prepare", full)
        assert gpt("train", "nano", "--steps", "1", "--out", "run", *SMALL).code == 2
    tokens = Path("run/data/train/00000.tokens")
    before = tokens.stat().st_mtime_ns
    assert "--resume" in gpt("train", "nano", "--steps", "1", "--out", "run", *SMALL).err
    assert gpt("train", "nano", "--out", "run", "--resume").code == 0
    assert tokens.stat().st_mtime_ns == before


@pytest.mark.parametrize("mistake", [["--set", "bogus=1"], ["--data", "missing.txt"], ["--device", "tpu"]], ids=str)
def test_overwrite_deletes_nothing_for_a_command_that_cannot_work(gpt: Gpt, trained: Path, mistake: list[str]) -> None:
    result = gpt("train", "nano", "--out", str(trained), "--overwrite", "--steps", "1", *SMALL, *mistake)
    assert result.code == 2
    assert gpt("info", str(trained)).code == 0 and (trained / "checkpoints/step-00000002/manifest.json").exists()


def test_overwrite_deletes_nothing_that_is_not_a_run(gpt: Gpt) -> None:
    Path("theirs").mkdir()
    Path("theirs/config.json").write_text('{"model_type": "other"}')
    assert gpt("train", "nano", "--out", "theirs", "--overwrite", "--steps", "1", *SMALL).code == 2
    assert Path("theirs/config.json").exists()


def test_resuming_on_data_that_was_prepared_anew_is_refused(gpt: Gpt) -> None:
    def prepare(word: str) -> None:
        Path("words.txt").write_text("<|endoftext|>\n".join(f"A {word} story, number {n}.\n" for n in range(300)))
        shutil.rmtree("ready", ignore_errors=True)
        assert gpt("data", "prepare", "words.txt", "--out", "ready", "--vocab-size", "300").code == 0

    prepare("little")
    assert gpt("train", "nano", "--data", "ready", "--steps", "1", "--out", "run", *SMALL).code == 0
    tokenizer = Path("run/tokenizer.model").read_bytes()
    prepare("quite different")
    refused = gpt("train", "nano", "--out", "run", "--resume", "--steps", "2")
    assert refused.code == 2 and "another tokenizer" in refused.err
    assert Path("run/tokenizer.model").read_bytes() == tokenizer


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_and_says_how_to_go_on(gpt: Gpt, number: signal.Signals, code: int) -> None:
    command = [sys.executable, "-m", "cli", "train", "nano", "--steps", "100000", "--out", "run", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        while not process.stdout.readline().startswith("step "):
            pass
        process.send_signal(number)
        said = process.stdout.read()
    assert process.returncode == code
    assert f"{number.name}: stopping after step" in said and "gpt train nano --out run --resume" in said
    done = Run(Path("run")).find_checkpoint().step
    spent = gpt("train", "nano", "--out", "run", "--resume", "--steps", "1")
    assert spent.code == 2 and f"run has done {done:,} steps" in spent.err and "nothing is left" in spent.err
    assert gpt("train", "nano", "--out", "run", "--resume", "--steps", str(done + 1)).code == 0


def test_a_run_is_resumed_as_what_it_is(gpt: Gpt, trained: Path) -> None:
    other = gpt("train", "tiny", "--out", str(trained), "--resume")
    assert other.code == 2 and "a run of nano, not of tiny: go on with it by gpt train nano --out" in other.err
    before = (trained / "config.json").read_bytes()
    spent = gpt("train", "nano", "--out", str(trained), "--resume", "--tokens", "128")
    assert spent.code == 2 and "has done 2 steps" in spent.err and (trained / "config.json").read_bytes() == before
    ended = gpt("train", "--out", str(trained), "--resume")
    assert ended.code == 0 and "has come to its end: all of its 2 steps are done" in ended.out
    tuned = gpt("finetune", str(trained), "--out", str(trained), "--resume")
    assert tuned.code == 2 and "is a pretrained run" in tuned.err and "gpt train nano --out" in tuned.err


def test_unreachable_hub_falls_back_to_stories_only_where_not_asked_for(
    gpt: Gpt, monkeypatch: pytest.MonkeyPatch
) -> None:
    from engine import hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    # It is asked once in a process.
    monkeypatch.setattr(hub, "first_failure", lambda: "no answer in 8 s")
    fallen_back = gpt("train", "tiny", "--steps", "1", "--out", "run", *SMALL)
    assert fallen_back.code == 0 and "using the built-in stories instead" in fallen_back.out
    insisted = gpt("train", "tiny", "--data", "tinystories", "--steps", "1", "--out", "other", *SMALL)
    assert insisted.code == 2 and "cannot be reached" in insisted.err


@pytest.mark.parametrize("command", ["tokenizer train --data none --out file/new.model", "bench-layernorm --out file"])
def test_where_nothing_can_be_written_is_said_before_the_work(command: str, gpt: Gpt) -> None:
    Path("file").write_text("")
    code, _, err = gpt(*command.split())
    assert code == 2 and err.startswith("error: cannot write file/") and "Not a directory" in err
