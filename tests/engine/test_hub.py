"""Models of the Hub: what is fetched, how often, and what is said where that cannot be."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from engine import disk, progress
from engine.errors import DiskError, InputError, UnfinishedError
from engine.hub import HubUnreachable, fetch_model
from engine.progress import Told
from tests.train.data.hub import BREAK, Hub

WEIGHTS = bytes(range(256)) * 400
FILES = {"config.json": b"{}", "tokenizer.json": b"[]", "chat_template.jinja": b"{{ messages }}"}
OTHERS = ("onnx/config.json", "onnx/model.safetensors", "pytorch_model.bin", "consolidated.safetensors", "run.py")


def fetch(name: str = "owner/model", revision: str | None = None) -> tuple[Path, list[str]]:
    said: list[str] = []
    return fetch_model(name, revision, said.append), said


def part_of(hub: Hub) -> Path:
    return Path(constants.HF_HUB_CACHE, "models--owner--model/blobs", f"{digest(WEIGHTS)}.incomplete")


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("names", [["model.safetensors"], [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]])
def test_what_a_model_is_read_from_is_fetched_once_and_nothing_else(hub: Hub, names: list[str]) -> None:
    weights = {name: WEIGHTS[n:] for n, name in enumerate(names)}
    commit = hub.publish("owner/model", FILES | weights | dict.fromkeys(OTHERS, b"x"))
    told: list[float] = []

    @contextmanager
    def listen(what: str, total: float | None, unit: str) -> Iterator[Told]:
        assert (what, unit) == ("fetching owner/model", "MB")
        yield told.append
        assert total == pytest.approx(told[-1]) == sum(map(len, weights.values())) / 1e6

    with progress.shown(listen):
        folder, said = fetch()
    assert folder.name == commit and said == [] and told == sorted(told)
    assert {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")} == FILES | weights
    files = hub.count("GET .*/resolve/")
    assert fetch() == (folder, []) and files == len(FILES | weights) == hub.count("GET .*/resolve/")


def test_a_file_is_gone_on_with_in_this_process_and_in_the_next(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)  # what comes less of is lost
    hub.publish("owner/model", FILES | {"model.safetensors": WEIGHTS})
    half = len(WEIGHTS) // 2
    hub.trouble("GET .*safetensors", BREAK, 2)
    folder, said = fetch()
    assert hub.ranges == [f"bytes={half}-", f"bytes={half + half // 2}-"] and len(said) == 1
    assert "owner/model: the connection was cut" in said[0]
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS

    other = WEIGHTS[::-1]
    hub.publish("owner/model", FILES | {"model.safetensors": other})
    hub.trouble("GET .*safetensors", BREAK, 1)
    hub.trouble("GET .*safetensors", 503, 1)
    with pytest.raises(HubUnreachable, match=r"owner/model: the Hugging Face hub at .* cannot be reached"):
        fetch()
    hub.ranges.clear()
    folder, said = fetch()
    assert hub.ranges == [f"bytes={half}-"] and (folder / "model.safetensors").read_bytes() == other


@pytest.mark.parametrize("left", [b"x" * 1000, b"x" * len(WEIGHTS), b"x" * (len(WEIGHTS) + 1)])
def test_a_part_that_is_damaged_is_thrown_away(hub: Hub, left: bytes) -> None:
    hub.publish("owner/model", FILES | {"model.safetensors": WEIGHTS})
    part_of(hub).parent.mkdir(parents=True)
    part_of(hub).write_bytes(left)
    with pytest.raises(UnfinishedError, match=r"owner/model: model.safetensors came damaged"):
        fetch()
    assert (fetch()[0] / "model.safetensors").read_bytes() == WEIGHTS


def test_a_revision_is_fetched_and_without_a_network_what_was_fetched_serves(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = (hub.publish("owner/model", FILES | {"model.safetensors": WEIGHTS[n:]}) for n in range(2))
    assert fetch(revision=old)[0].name == old and fetch()[0].name == new
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = hub.count()
    assert fetch(revision=old)[0].name == old and fetch()[0].name == new and hub.count() == asked
    with pytest.raises(HubUnreachable, match=r"check the network, HF_ENDPOINT and HF_HUB_OFFLINE, or use a folder"):
        fetch("owner/other")


@pytest.mark.parametrize(
    ("name", "revision", "message"),
    [
        ("owner/gated", None, r"owner/gated is gated: ask for access at http[^ ]*[0-9]/owner/gated, and log in"),
        ("owner/missing", None, r"owner/missing: no such model on the hub.*private, log in with `hf auth login`"),
        ("owner/model", "v9", "owner/model has no commit v9; choose another with --revision"),
        ("owner/pickled", None, "owner/pickled has no model.safetensors; pickles are not read"),
    ],
)
def test_what_the_hub_refuses_is_said_plainly(hub: Hub, name: str, revision: str | None, message: str) -> None:
    for each in ("owner/model", "owner/gated"):
        hub.publish(each, FILES | {"model.safetensors": WEIGHTS})
    hub.publish("owner/pickled", FILES | {"pytorch_model.bin": WEIGHTS})
    hub.gated["owner/gated"] = 401
    with pytest.raises(InputError, match=message) as caught:
        fetch(name, revision)
    assert not isinstance(caught.value, HubUnreachable)


def test_a_disk_without_room_is_said_before_anything_is_fetched(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.publish("owner/model", FILES | {"model.safetensors": WEIGHTS})
    monkeypatch.setattr(disk, "free", lambda path: 1000)
    with pytest.raises(DiskError, match=r"owner/model: 102,400 bytes are to be fetched, and 1,000 bytes are free"):
        fetch()
    assert hub.count("GET .*/resolve/") == 0


def test_a_hub_that_is_away_is_said_to_be(hub: Hub) -> None:
    with hub.away(), pytest.raises(HubUnreachable, match=r"owner/model: .* cannot be reached"):
        fetch()
    assert hub.gone == 0 != math.inf
