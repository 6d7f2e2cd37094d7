"""Data sets of the Hugging Face hub as rows, streamed. What its many layers raise becomes one plain message."""

import contextlib
import re
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from engine.errors import InputError
from train.data.rows import PEEKED, Row
from train.data.splits import SPLIT_WORDS, Place, Source, Stream

PROBE_SECONDS = 8


class HubUnreachable(InputError):  # noqa: N818
    """The Hugging Face hub did not answer. The data set itself may be fine: a command may fall back to other data."""


@dataclass
class HubSource(Source):
    """A data set of the Hugging Face hub, streamed."""

    path: str = ""
    config: str | None = None
    # A data set may have splits for several stages, as ultrafeedback has train_sft and train_prefs.
    stage: str = "sft"

    def describe(self) -> str:
        return f"{self.name}: {self.path} from the Hugging Face hub, streamed"

    def identity(self) -> list[Any]:
        return [self.path, self.config]

    def streams(self) -> dict[str, Stream]:
        return {split: partial(map, self._numbered, [rows]) for split, rows in self._splits().items()}

    def share(self, rank: int, count: int, place: Place, size: int) -> Iterator[tuple[Place, list[Any]]]:
        if self.limit is not None:
            # Only counting finds the first so many documents of all, whichever file they are in.
            yield from super().share(rank, count, place, size)
            return
        rows = self._splits()["train"]
        from datasets import Dataset
        from datasets.distributed import split_dataset_by_node

        if isinstance(rows, Dataset):
            rows = rows.to_iterable_dataset()
        # These are looked at apart, since the place in a stream of rows is that of the last one that was read.
        head = [] if self.column else list(rows.take(PEEKED))
        rows = split_dataset_by_node(rows, rank, count)
        if place:
            rows.load_state_dict(place)
        documents = self.pick(self._numbered(rows), head)
        while chunk := list(islice(documents, size)):
            yield place, chunk
            place = dict(rows.state_dict())

    def _splits(self) -> dict[str, Any]:
        try:
            import datasets
            from huggingface_hub import constants
        except ImportError:
            raise HubUnreachable(
                f"{self.name}: the datasets package is missing; pip install datasets, or use built-in data (stories, "
                "stories-instruct) or a file"
            ) from None
        # Offline, only a copy that was downloaded whole will do, and such copies are not streamed.
        offline = constants.HF_HUB_OFFLINE
        if not offline and (failure := hub_failure(PROBE_SECONDS)):
            raise self._unreachable(failure)
        with self._plain_errors():
            splits = datasets.load_dataset(self.path, self.config, streaming=not offline)
        found: dict[str, Any] = {}
        for name, rows in splits.items():
            bare = name.removesuffix(f"_{self.stage}")
            found.setdefault(SPLIT_WORDS.get(bare, bare), rows)
        if len(found) == 1:
            return {"train": next(iter(found.values()))}
        if "train" not in found:
            raise InputError(f"{self.name} has no training split, only {', '.join(found)}; choose other --data")
        return found

    def _numbered(self, rows: Iterable[Any]) -> Iterator[Row]:
        with self._plain_errors():
            yield from ((f"{self.name}, row {at}", row) for at, row in enumerate(rows, 1))

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turn what the hub's many layers raise into one message that can be acted on."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            layers = {base.__module__.partition(".")[0] for base in type(error).__mro__}
            if isinstance(error, FileNotFoundError):
                message = f"{self.path}: no such data set on the hub, or not for you, and no such file ({reason})"
            elif "BuilderConfig" in reason or "Config name" in reason:
                asked = f"has no config {self.config!r}" if self.config else "comes in several configs"
                names = re.search(r"\[.*\]", str(error))
                message = f"{self.path} {asked}: choose one of {names and names[0]} as {self.path}:CONFIG"
            elif isinstance(error, OSError) or layers & {"httpx", "httpx2", "requests", "aiohttp", "urllib3"}:
                raise self._unreachable(reason) from error
            else:
                message = f"{self.path} cannot be read ({reason}); choose other --data"
            raise InputError(message) from error

    def _unreachable(self, reason: str) -> HubUnreachable:
        from huggingface_hub import constants

        return HubUnreachable(
            f"{self.name}: the Hugging Face hub at {constants.ENDPOINT} cannot be reached ({reason}); check the "
            "network, HF_ENDPOINT and HF_HUB_OFFLINE, or use built-in data (stories, stories-instruct) or a local file"
        )


def hub_failure(seconds: float) -> str | None:
    """Return why the hub does not answer within so many seconds: its own client tries for half a minute or more."""
    from huggingface_hub import constants, get_session

    failure = [f"no answer in {seconds} s"]

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
            failure.clear()
        except Exception as error:
            failure[0] = str(error) or type(error).__name__

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return failure[0] if failure else None
