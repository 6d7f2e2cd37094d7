"""The hub on loopback, which the real datasets and huggingface_hub of this process and of its children ask."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.hub import first_failure
from tests.train.data.hub import Hub
from train.data import hub as client

FILES = "/{repo_id}/resolve/{revision}/{filename}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    pytest.importorskip("datasets")
    cache = tmp_path / "cache"
    with Hub() as server:
        # The libraries have read these when they were imported; children will.
        for name, value in (
            ("huggingface_hub.constants.ENDPOINT", server.url),
            ("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", server.url + FILES),
            ("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub")),
            ("huggingface_hub.constants.HF_HUB_OFFLINE", False),
            ("datasets.config.HF_ENDPOINT", server.url),
            ("datasets.config.HF_HUB_OFFLINE", False),
            ("datasets.config.HF_DATASETS_CACHE", cache / "datasets"),
        ):
            monkeypatch.setattr(name, value)
        for name, value in (("HF_ENDPOINT", server.url), ("HF_HOME", str(cache)), ("HF_HUB_OFFLINE", "0")):
            monkeypatch.setenv(name, value)
        # Waiting would take seconds. This is everybody's sleep: our own waiting only looks at the clock meanwhile.
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        for name in ("RETRY_SECONDS", "MOST_SECONDS"):
            monkeypatch.setattr(client, name, 0.01)
        for cached in (first_failure, client.newest_commit, client.builder_of):
            cached.cache_clear()
        yield server
        for cached in (first_failure, client.newest_commit, client.builder_of):
            cached.cache_clear()
        server.shutdown()
