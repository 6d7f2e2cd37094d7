"""Data sets of the Hugging Face hub, streamed: opened once in a process, of one commit, and waited for."""

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from engine.errors import InputError, UnfinishedError
from engine.hub import PROBE_SECONDS, HubUnreachable, is_passing, overheard, reach, reason_of, refusal
from train.data.rows import PEEKED, Row
from train.data.splits import SPLIT_WORDS, Place, Source, Stream

# A Hub that goes away while it is read is waited for: it is asked again after these seconds, then after twice as
# many, up to MOST_SECONDS, and given up after PATIENCE_SECONDS.
RETRY_SECONDS, MOST_SECONDS, PATIENCE_SECONDS = 1.0, 60.0, 3600.0
Value = TypeVar("Value")


@dataclass
class HubSource(Source):
    """A data set of the Hugging Face hub, streamed."""

    path: str = ""
    config: str | None = None
    # A data set may have splits for several stages, as ultrafeedback has train_sft and train_prefs.
    stage: str = "sft"

    def describe(self) -> str:
        commit = f", commit {self.commit[:12]}" if self.commit else ""
        return f"{self.name}: {self.path} from the Hugging Face hub{commit}, streamed"

    def identity(self) -> list[Any]:
        # Data that was read before commits were noted has none.
        return [self.path, self.config, *filter(None, [self.commit])]

    def newest(self) -> str:
        """Ask the Hub for the commit that is read."""
        with self._plain_errors():
            return next(self._patiently(lambda: [newest_commit(self.path, self.config, self.commit)]))

    def streams(self) -> dict[str, Stream]:
        # Each pass has an iterable of its own: one that has waited for the Hub would begin its next pass there.
        return {split: partial(self._open, split) for split in self._splits()}

    def _open(self, split: str) -> Iterator[Iterator[Row]]:
        yield self._numbered(self._splits()[split])

    def share(self, rank: int, count: int, place: Place, size: int) -> Iterator[tuple[Place, list[Any]]]:
        if self.limit is not None:
            # With a limit, the documents must be counted from the first one on, so the files cannot be divided among
            # the processes: each process reads all rows and keeps its own.
            yield from super().share(rank, count, place, size)
            return
        rows = self._splits()["train"]
        from datasets import Dataset
        from datasets.distributed import split_dataset_by_node

        if isinstance(rows, Dataset):
            rows = rows.to_iterable_dataset()
        # The first rows are read through an iterator of their own: read from `rows`, they would advance its position,
        # which is saved.
        head = [] if self.column else [row for _, row in self._numbered(self._splits()["train"].take(PEEKED))]
        rows = split_dataset_by_node(rows, rank, count)
        if place:
            rows.load_state_dict(place)
        documents = self.pick(self._numbered(rows), head)
        while chunk := list(islice(documents, size)):
            yield place, chunk
            place = dict(rows.state_dict())

    def _splits(self) -> dict[str, Any]:
        """Return the rows of every split, from their beginning."""
        with self._plain_errors():
            commit = self.newest()
            splits = next(self._patiently(lambda: [open_set(self.path, self.config, commit)]))
        found: dict[str, Any] = {}
        for name, rows in splits.items():
            bare = name.removesuffix(f"_{self.stage}")
            found.setdefault(SPLIT_WORDS.get(bare, bare), rows)
        if len(found) == 1:
            # The only split of a data set is trained on, whatever its name: some of it will be held out.
            return {"train": next(iter(found.values()))}
        if "train" not in found:
            raise InputError(f"{self.name} has no training split, only {', '.join(found)}; choose other --data")
        return found

    def _numbered(self, rows: Any) -> Iterator[Row]:
        def rest() -> Any:
            rows.load_state_dict(rows.state_dict())
            return rows

        with self._plain_errors():
            yield from (
                (f"{self.name}, row {at}", row) for at, row in enumerate(self._patiently(lambda: rows, rest), 1)
            )

    def _patiently(
        self, ask: Callable[[], Iterable[Value]], rest: Callable[[], Iterable[Value]] | None = None
    ) -> Iterator[Value]:
        """Yield what `ask` returns. Where the Hub stops answering, say so once, wait, and yield the `rest`."""
        since, tries, online = 0.0, 0, reach()

        def stopped(reason: str) -> None:
            nonlocal since
            if self.abandoned:
                raise ConnectionError(reason)  # which ends the libraries' own retries, too
            if not since:
                since = time.monotonic()
                self.say(f"{self.name}: the Hugging Face hub does not answer ({reason}); waiting for it")

        while True:
            try:
                with overheard(stopped):
                    for each in ask():
                        since = tries = 0
                        yield each
                return
            except Exception as error:
                if not (online and is_passing(error)):
                    raise
                stopped(reason_of(error))
                until = time.monotonic() + min(RETRY_SECONDS * 2**tries, MOST_SECONDS)
                while time.monotonic() < until and not self.abandoned:
                    time.sleep(min(RETRY_SECONDS, 0.2))
                if self.abandoned or until - since > PATIENCE_SECONDS:
                    raise
                ask, tries = rest or ask, tries + 1

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Turn the errors of the many libraries below into one message that tells the user what to do."""
        try:
            yield
        except InputError:
            raise
        except ImportError as error:
            raise HubUnreachable(
                f"{self.name}: a package is missing ({reason_of(error)}); pip install datasets, or use built-in data "
                "(stories, stories-instruct) or a file"
            ) from None
        except Exception as error:
            reason, commit = reason_of(error), "--set data.revision=COMMIT"
            instead = "built-in data (stories, stories-instruct) or a local file"
            where = {"kind": "data set", "page": "datasets/", "option": commit, "instead": instead}
            if refused := refusal(error, self.name, self.path, self.commit, **where):
                raise refused from error
            if "BuilderConfig" in reason or "Config name" in reason:
                asked = f"has no config {self.config!r}" if self.config else "comes in several configs"
                names = re.search(r"\[.*\]", str(error))
                message = f"{self.path} {asked}: choose one of {names and names[0]} as {self.path}:CONFIG"
            elif "Compression type zstd not supported" in reason:
                message = f"{self.path} is compressed with zstd: pip install zstandard, and run the command again"
            else:
                message = f"{self.path} cannot be read ({reason}); choose other --data"
            # A full disk, say, does not spoil what is done.
            raise (UnfinishedError if isinstance(error, OSError) else InputError)(message) from error


@functools.cache
def newest_commit(path: str, config: str | None, revision: str | None = None) -> str:
    """Return the commit that a branch or tag of a data set stands for now, or its main branch."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    if not reach():
        return str(builder_of(path, config, None).hash)
    from huggingface_hub import HfApi

    return str(HfApi().dataset_info(path, revision=revision, timeout=PROBE_SECONDS).sha)


@functools.cache
def builder_of(path: str, config: str | None, commit: str | None) -> Any:
    """Return what makes data sets of a commit. It has asked the Hub for all but the rows, once in a process."""
    import datasets

    # The library would wait for nine minutes, with a line for each try: we do the waiting.
    for name in dir(datasets.config):
        if name.startswith("STREAMING_") and name.endswith(("_MAX_RETRIES", "_RETRY_INTERVAL")):
            setattr(datasets.config, name, int(name.endswith("_MAX_RETRIES")))
    reach()
    return datasets.load_dataset_builder(path, config, revision=commit)


def open_set(path: str, config: str | None, commit: str) -> Any:
    """Return the rows of every split, streamed; or those that were downloaded, where HF_HUB_OFFLINE is set."""
    builder = builder_of(path, config, commit)
    if reach():
        return builder.as_streaming_dataset()
    if builder.hash != commit:
        raise InputError(f"{path} was downloaded as of commit {builder.hash}, not {commit}; unset HF_HUB_OFFLINE")
    builder.download_and_prepare()
    return builder.as_dataset()
