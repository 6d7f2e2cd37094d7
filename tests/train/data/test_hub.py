"""The Hub as it is: its layouts and refusals, what it is asked, its outages, and commits that come meanwhile."""

import gzip
import json
import math
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from cli.main import app
from engine.config import Recipe, override
from engine.errors import InputError, UnfinishedError
from engine.run import Run
from engine.tokenizer import Tokenizer
from rlhf.preferences import open_preferences
from tests.train import team
from tests.train.conftest import Recorder, Train
from tests.train.data.hub import BREAK, Hub, lines, parquet_file
from tests.train.test_loop import losses
from train.data import hub as client
from train.data import stream
from train.data.hub import HubUnreachable
from train.data.shards import prepare
from train.data.sources import DataConfig, open_source, pinned
from train.data.stream import StreamLoader
from train.loop import Loop

TEXTS = [f"The fox number {n} " + "ran home and " * (n % 9) for n in range(96)]
SETS: dict[str, Callable[[list[str]], bytes]] = {
    "train-{:02}.parquet": lambda texts: parquet_file([{"text": text} for text in texts], group=3),
    "train_{:02}.jsonl": lambda texts: lines({"text": text, "metadata": {"n": [1]}} for text in texts),
    "train_{:02}.jsonl.gz": lambda texts: gzip.compress(lines({"text": text} for text in texts)),
}


def publish(hub: Hub, kind: str = "train-{:02}.parquet", files: int = 12, mark: str = "") -> str:
    parts = {kind.format(n): SETS[kind]([mark + text for text in TEXTS[n::files]]) for n in range(files)}
    return hub.publish("owner/name", parts | {"README.md": b"---\nlicense: mit\n---\n"})


def in_order(files: int) -> list[str]:
    return [text for n in range(files) for text in TEXTS[n::files]]


def read(name: str = "owner/name", commit: str | None = None) -> tuple[list[Any], list[str]]:
    """The rows of the training split, and what was said meanwhile."""
    said: list[str] = []
    source = open_source(name, commit=commit)
    source.say = said.append
    rows: Iterable[Any] = chain.from_iterable(source.streams()["train"]())
    return [row["text"] for _, row in rows], said


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize(("trouble", "times"), [(BREAK, 1), (BREAK, 7), (503, 8), (429, 13), (502, 1)])
def test_every_row_comes_once_whatever_the_hub_does(hub: Hub, kind: str, trouble: int | str, times: int) -> None:
    publish(hub, kind, files=3)
    assert read() == (in_order(3), [])
    for place in range(3):
        hub.trouble(f"GET .*{kind.format(place)}", trouble, times, **{"Retry-After": "1"})
        rows, said = read()
        assert rows == in_order(3) and len(said) == 1
        assert "owner/name: the Hugging Face hub does not answer (" in said[0] and "waiting for it" in said[0]


def test_a_busy_hub_is_waited_for_from_the_first_request_on(hub: Hub) -> None:
    publish(hub)
    for pattern in ("api/datasets/owner/name$", "README", "name.py", "revision", "tree"):
        hub.trouble(pattern, 503, 7)
        hub.trouble(pattern, 429, 1)
    rows, _ = read()
    assert rows == in_order(12) and [trouble[2] for trouble in hub.troubles] == [0] * 10


def test_a_hub_that_stays_away_is_given_up_and_said_to_be_away(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(hub)
    monkeypatch.setattr(client, "PATIENCE_SECONDS", 0.05)
    (rows,) = open_source("owner/name").streams()["train"]()
    next(iter(rows))
    with hub.away(), pytest.raises(HubUnreachable, match="cannot be reached"):
        list(rows)


def test_a_loader_that_is_closed_does_not_wait_for_the_hub(
    hub: Hub, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(hub)
    monkeypatch.setattr(stream, "CHUNK_DOCUMENTS", 4)
    monkeypatch.setattr(client, "RETRY_SECONDS", 1000.0)
    source = open_source("owner/name", column="text")
    loader = StreamLoader(source, tokenizer, prepare(source, tokenizer, tmp_path, "validation"), 48, 16)
    source.say = lambda message: threading.Timer(0.1, loader.close).start()
    with hub.away(), pytest.raises(HubUnreachable):
        while True:
            next(loader)


def test_a_damaged_file_is_no_outage(hub: Hub) -> None:
    hub.publish("owner/name", {"train.parquet": SETS["train-{:02}.parquet"](TEXTS)[:-9] + b"123456789"})
    with pytest.raises(InputError, match=r"owner/name cannot be read .*choose other --data") as caught:
        read()
    assert not isinstance(caught.value, UnfinishedError)


def test_hh_rlhf_has_a_folder_for_each_part_and_one_of_something_else(hub: Hub) -> None:
    said = [f"\n\nHuman: {n}\n\nAssistant:" for n in range(9)]
    rows = [{"chosen": f"{each} yes", "rejected": f"{each} no"} for each in said]
    files = {f"{part}-base/{split}.jsonl.gz": rows for part in ("harmless", "helpful") for split in ("train", "test")}
    files["red-team-attempts/red_team_attempts.jsonl.gz"] = [{"transcript": "x", "rating": "1"}]
    hub.publish("Anthropic/hh-rlhf", {name: gzip.compress(lines(each)) for name, each in files.items()})
    source = open_preferences(pinned(DataConfig("hh-rlhf")))
    assert len([*source.documents("train"), *source.documents("validation")]) == 18
    assert len(list(source.documents("test"))) == 18


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("owner/gated", r"owner/gated is gated: ask for access at .*/datasets/owner/gated.*`hf auth login`.*HF_TOKEN"),
        ("owner/granted", r"owner/granted is gated: ask for access"),
        ("owner/missing", r"owner/missing: no such data set on the hub.*private, log in with `hf auth login`"),
        ("owner/parts", r"owner/parts comes in several configs: choose one of \['all', 'another'\] as owner"),
        ("owner/parts:c", r"owner/parts has no config 'c': choose one of \['all', 'another'\]"),
        ("owner/script", r"owner/script cannot be read \(Dataset scripts are no longer supported"),
    ],
)  # fmt: skip
def test_what_the_hub_refuses_is_said_plainly(hub: Hub, name: str, message: str) -> None:
    for each in ("owner/gated", "owner/granted"):
        hub.rows(each, train=["a"])
    hub.gated |= {"owner/gated": 401, "owner/granted": 403}
    hub.rows("owner/parts", "all", train=["a"])
    hub.publish("owner/script", {"script.py": b""})
    with pytest.raises(InputError, match=message) as caught:
        read(name)
    assert not isinstance(caught.value, HubUnreachable)


def test_a_set_in_zstd_names_the_package_that_reads_it_and_is_read_with_it(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A frame of one block that is stored as it is, in bytes that any version of the format has.
    text = lines({"contents": f"The fox number {n}"} for n in range(3))
    header = b"\x28\xb5\x2f\xfd\x20" + bytes([len(text)]) + (len(text) << 3 | 1).to_bytes(3, "little")
    hub.publish("owner/packed", {"train_00.jsonl.zst": header + text})
    with monkeypatch.context() as without:
        without.delitem(pytest.importorskip("fsspec.compression").compr, "zstd", raising=False)
        with pytest.raises(InputError, match="owner/packed is compressed with zstd: pip install zstandard"):
            read("owner/packed")
    pytest.importorskip("zstandard", reason="zstandard is not installed")
    rows: Iterable[Any] = chain.from_iterable(open_source("owner/packed").streams()["train"]())
    assert [row["contents"] for _, row in rows] == [f"The fox number {n}" for n in range(3)]


def test_a_token_opens_a_gated_set(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.rows("owner/gated", train=[{"text": "a"}])
    hub.gated["owner/gated"] = 401
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    assert read("owner/gated")[0] == ["a"]


def test_a_branch_is_pinned_to_its_commit_and_an_unknown_one_refused(hub: Hub) -> None:
    old, new = publish(hub), publish(hub, mark="New. ")
    assert (
        pinned(DataConfig("owner/name")).revision == pinned(DataConfig("owner/name", revision="main")).revision == new
    )
    assert (read(commit=old)[0], read()[0][0]) == (in_order(12), "New. " + TEXTS[0])
    assert open_source("owner/name", commit=old).fingerprint() != open_source("owner/name", commit=new).fingerprint()
    with pytest.raises(InputError, match=r"owner/name has no commit other; choose another with --set data.revision"):
        pinned(DataConfig("owner/name", revision="other"))
    with pytest.raises(InputError, match=r"data.revision is for data sets of the Hub, which stories is not"):
        pinned(DataConfig("stories", revision="main"))


def test_an_interrupted_preparation_goes_on_with_its_commit(hub: Hub, prepared: Path, tmp_path: Path) -> None:
    command = ["data", "prepare", "owner/name", "--out", str(tmp_path / "out"), "--tokenizer", str(prepared)]
    commit = publish(hub, files=2)
    app(command, standalone_mode=False)
    # The set is opened once, with eleven requests; two passes read its two files, and the first one looks at them.
    assert hub.count() <= 11 + 3 * 2
    expected = (tmp_path / "out/validation/index.json").read_bytes()
    shutil.rmtree(tmp_path / "out/validation")
    publish(hub, mark="New. ")
    client.newest_commit.cache_clear()
    app(command, standalone_mode=False)
    assert (tmp_path / "out/validation/index.json").read_bytes() == expected and commit.encode() in expected


def test_offline_a_downloaded_set_is_read_in_its_commit_alone(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    old, new = publish(hub), publish(hub, mark="New. ")
    datasets.load_dataset("owner/name")
    for module in ("huggingface_hub.constants", "datasets.config"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    assert pinned(DataConfig("owner/name")).revision == new
    assert (read()[0][0], read(commit=new)[0][0]) == ("New. " + TEXTS[0], "New. " + TEXTS[0])
    # datasets would return the new one.
    with pytest.raises(InputError, match=f"owner/name was downloaded as of commit {new}, not {old}; unset HF_HUB_OFF"):
        read(commit=old)


@pytest.fixture
def streamed(small: Recipe, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(stream, "CHUNK_DOCUMENTS", 4)
    for path, value in {
        "data.source": "owner/name", "data.stream": True, "data.tokenizer": str(prepared),
        "data.column": "text", "data.documents": None, "data.holdout": 0.1, "budget.steps": 6,
        "loop.micro_batch": 2,
    }.items():  # fmt: skip
        small = override(small, path, value)
    return small


def interrupt(self: Recorder, said: str) -> None:
    if "waiting for it" in said:
        os.kill(os.getpid(), signal.SIGINT)


def test_a_streamed_run_keeps_its_commit_asks_little_and_waits(
    hub: Hub, streamed: Recipe, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = publish(hub)
    _, recorder = train(streamed, "whole")
    assert json.loads((tmp_path / "whole/config.json").read_text())["recipe"]["data"]["revision"] == commit
    # The set is opened once, with ten requests or so. Validation and training each read its twelve files once a pass;
    # how far a second pass has come at the end depends on the threads.
    assert hub.count("api/datasets/owner/name$") == 1 and hub.count(r"name\.py") == 1
    files = hub.count(r"GET .*\.parquet")
    assert hub.count() - files <= 12 and files <= 12 + 2 * 12 + 1
    with monkeypatch.context() as patch:
        # The Hub goes for good, and as the run waits for it, in the middle of a step, it is asked to stop.
        patch.setattr(Loop, "on_step", lambda self, done: setattr(hub, "gone", math.inf))
        patch.setattr(Recorder, "say", interrupt)
        outcome, _ = train(streamed, "stopped")
    assert outcome.stopped_by is signal.SIGINT and outcome.step < 5
    hub.gone = 0
    # What is published meanwhile is another run's.
    publish(hub, mark="New. ")
    for cached in (client.newest_commit, client.builder_of):
        cached.cache_clear()

    def leave(self: Loop, done: int) -> None:
        if done == outcome.step + 1:
            hub.gone = 9

    monkeypatch.setattr(Loop, "on_step", leave)
    hub.requests.clear()
    _, recorder = train(Run(tmp_path / "stopped").read_recipe(), "stopped", resume=True)
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    assert hub.gone == 0 and sum("waiting for it" in line for line in recorder.said) == 1
    assert not hub.count(f"resolve/(?!{commit})") and not hub.count("api/datasets/owner/name$")


def use(url: str, cache: str, rank: int) -> None:
    """Ask this hub."""
    os.environ |= {"HF_ENDPOINT": url, "HF_HOME": cache, "HF_HUB_OFFLINE": "0"}


def test_two_processes_read_one_commit_and_resume_it(hub: Hub, streamed: Recipe, tmp_path: Path) -> None:
    publish(hub)
    trick = partial(use, hub.url, str(tmp_path / "cache"))
    team.train_on(override(streamed, "loop.save_every", 3), tmp_path / "whole", 2, trick=trick)
    # The main process has asked for the commit; each has opened the set once.
    assert hub.count("api/datasets/owner/name$") == 1 and hub.count(r"name\.py") == 2
    # As if it had been killed after a checkpoint.
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/step-00000006")
    publish(hub, mark="New. ")
    team.train_on(Run(tmp_path / "stopped").read_recipe(), tmp_path / "stopped", 2, trick=trick)
    assert hub.count("api/datasets/owner/name$") == 1 and hub.count(r"name\.py") == 4
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
