"""The Hugging Face hub: whether it answers, what its refusals mean, and models fetched into its own cache."""

import contextlib
import fcntl
import functools
import hashlib
import io
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from engine import disk
from engine.errors import DiskError, InputError, UnfinishedError
from engine.progress import Told, listener

# What the Hub calls a model or a data set: its owner, and its own name.
HUB_NAME = r"\w[\w.-]*/\w[\w.-]*"
# The seconds that the Hub may take to answer at first. Its own client would try for half a minute or more.
PROBE_SECONDS = 8
# The loggers of the libraries' own retries, of requests and of rows, and of files.
RETRYING = ("huggingface_hub.utils._http", "datasets.utils.file_utils")
FETCHING = ("huggingface_hub.utils._http", "huggingface_hub.file_download")
NETWORK = {"httpx", "httpx2", "requests", "aiohttp", "urllib3"}
# What a model is read from. Many are there in other formats, too, of which pickles may run any code.
MODEL_FILES = ["model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json", "config.json"]
MODEL_FILES += ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
MODEL_FILES += ["chat_template.json", "chat_template.jinja"]


class HubUnreachable(UnfinishedError):  # noqa: N818
    """The Hugging Face hub did not answer. What it has may be fine: a command may fall back to other data."""


def fetch_model(name: str, revision: str | None, say: Callable[[str], None]) -> Path:
    """Return the folder of a model of the Hub, in the cache of its library; it is named by the commit.

    What is there is not fetched again, and a file that was cut is gone on with. Raises InputError for what is refused.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    try:
        if reach():
            info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=PROBE_SECONDS)
            files = [each for each in info.siblings or () if any(fnmatch(each.rfilename, kind) for kind in MODEL_FILES)]
            if not any(each.rfilename.endswith(".safetensors") for each in files):
                raise InputError(f"{name} has no model.safetensors; pickles are not read, since they may run any code")
            _fetch_large(name, str(info.sha), [each for each in files if each.lfs], say)
        return Path(snapshot_download(name, revision=revision, allow_patterns=MODEL_FILES))
    except InputError:
        raise
    except Exception as error:
        refused = refusal(error, name, name, revision, kind="model", page="", option="--revision", instead="a folder")
        raise refused or UnfinishedError(f"{name} cannot be fetched ({reason_of(error)})") from error


def _fetch_large(name: str, commit: str, files: Sequence[Any], say: Callable[[str], None]) -> None:
    """Put files into the cache by their SHA-256. The library alone (2.4) begins anew what another process left cut."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.file_download import http_get, repo_folder_name
    from huggingface_hub.utils import build_hf_headers

    blobs = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="model"), "blobs")
    files = [each for each in files if not (blobs / each.lfs.sha256).exists()]
    parts = [blobs / f"{each.lfs.sha256}.incomplete" for each in files]
    done, total = 0, sum(each.size for each in files)
    rest, room = total - sum(part.stat().st_size for part in parts if part.exists()), disk.free(blobs)
    if rest > room:
        more = f"{disk.in_words(rest)} are to be fetched, and {disk.in_words(room)} are free at {blobs}"
        raise DiskError(f"{name}: {more}: make room there, or set HF_HOME to a folder on another disk")
    blobs.mkdir(parents=True, exist_ok=True)
    cut = functools.cache(lambda: say(f"{name}: the connection was cut; trying to go on from there"))
    with listener.get()(f"fetching {name}", total / 1e6, "MB") as tell, overheard(lambda _: cut(), FETCHING):
        for part, each in zip(parts, files, strict=True):
            with _Part(part, "a+b") as file:
                fcntl.lockf(file, fcntl.LOCK_EX)  # another process may fetch the same
                file.tell_megabytes, file.before = tell, done
                url, there = hf_hub_url(name, each.rfilename, revision=commit), min(file.seek(0, 2), each.size)
                http_get(url, file, resume_size=there, expected_size=each.size, headers=build_hf_headers())
                file.seek(0)
                if hashlib.file_digest(file, "sha256").hexdigest() != each.lfs.sha256:
                    part.unlink()
                    raise UnfinishedError(f"{name}: {each.rfilename} came damaged; the same command fetches it anew")
            with contextlib.suppress(FileNotFoundError):  # the other one was first
                part.rename(part.with_suffix(""))
            done += each.size


class _Part(io.FileIO):
    """A file that tells how many million bytes it holds by now, with those of files before it."""

    tell_megabytes: Told
    before = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.tell_megabytes((self.before + self.tell()) / 1e6)
        return written


def refusal(
    error: Exception, name: str, path: str, revision: str | None, *, kind: str, page: str, option: str, instead: str
) -> InputError | None:
    """Return what an error of the Hub's library means, and what to do; None for another error.

    `path` is the Hub's name, `page` what its page's address has before it, and `instead` what is there without a Hub.
    """
    from huggingface_hub import constants

    reason, kinds = reason_of(error), {type(each).__name__ for each in chain_of(error)}
    log_in = "log in with `hf auth login`, or set HF_TOKEN"
    if is_passing(error):
        return HubUnreachable(
            f"{name}: the Hugging Face hub at {constants.ENDPOINT} cannot be reached ({reason}); check the network, "
            f"HF_ENDPOINT and HF_HUB_OFFLINE, or use {instead}"
        )
    if "GatedRepoError" in kinds or "is a gated dataset" in reason:
        message = f"{path} is gated: ask for access at {constants.ENDPOINT}/{page}{path}, and {log_in} as who has it"
    elif "RevisionNotFoundError" in kinds:
        message = f"{path} has no commit {revision}; choose another with {option}"
    elif isinstance(error, FileNotFoundError) or "RepositoryNotFoundError" in kinds:
        message = f"{path}: no such {kind} on the hub, and none here; if it is private, {log_in}"
    else:
        return None
    # A full disk, say, does not spoil what is done.
    return (UnfinishedError if isinstance(error, OSError) else InputError)(message)


def reach() -> bool:
    """Return whether the Hub is to be asked at all: not if HF_HUB_OFFLINE is set. Raises ConnectionError of silence."""
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE and (failure := first_failure()):
        raise ConnectionError(failure)
    return not constants.HF_HUB_OFFLINE


@functools.cache
def first_failure() -> str | None:
    """Return why the Hub does not answer when it is first asked."""
    return hub_failure(PROBE_SECONDS)


@contextlib.contextmanager
def overheard(stopped: Callable[[str], None], loggers: Sequence[str] = RETRYING) -> Iterator[None]:
    """Within the block the libraries do not write of their own retries, but `stopped` is told."""

    def tell(record: logging.LogRecord) -> bool:
        stopped(record.getMessage().partition(" thrown while")[0].strip("'"))
        return False

    for name in loggers:
        logging.getLogger(name).addFilter(tell)
    try:
        yield
    finally:
        for name in loggers:
            logging.getLogger(name).removeFilter(tell)


def chain_of(error: BaseException | None) -> list[BaseException]:
    """Return an error and those that led to it, the first of them last."""
    return [] if error is None else [error, *chain_of(error.__cause__ or error.__context__)]


def is_passing(error: Exception) -> bool:
    """Return whether an error is of the network, or of a Hub that has too much to do: what time may mend."""
    for each in chain_of(error):
        if (response := getattr(each, "response", None)) is not None:
            return response.status_code in (408, 429) or response.status_code >= 500
        layers = {base.__module__.partition(".")[0] for base in type(each).__mro__}
        if isinstance(each, ConnectionError | TimeoutError) or layers & NETWORK:
            return True
    return False


def reason_of(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def hub_failure(seconds: float) -> str | None:
    """Return why the Hub does not answer within this many seconds, or None if it does."""
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
