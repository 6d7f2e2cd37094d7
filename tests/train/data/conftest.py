"""The hub, without a network."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from train.data import sources

Hub = Callable[..., None]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let the hub hold these splits of one data set, or fail with an error."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(sources, "hub_failure", lambda seconds: None)

    def publish(path: str, error: Exception | None = None, config: str | None = None, **splits: list[Any]) -> None:
        def load_dataset(asked: str, name: str | None = None, *, streaming: bool) -> Any:
            assert (asked, name, streaming) == (path, config, True)
            if error:
                raise error
            streams = {key: datasets.Dataset.from_list(rows).to_iterable_dataset() for key, rows in splits.items()}
            return datasets.IterableDatasetDict(streams)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)

    yield publish
