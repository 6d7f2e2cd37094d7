"""A run is a folder: recipe, tokenizer, metrics, checkpoints, and what was made of them.

Its config.json holds paths relative to the folder, so that runs and data can be moved together. In memory paths are
absolute, so that nothing else depends on where the run or the working directory is.
"""

import contextlib
import difflib
import glob
import hashlib
import operator
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import checkpoint, disk, records
from engine.config import PATHS, Recipe, from_dict, override, settings, to_dict
from engine.errors import InputError
from engine.folders import LOCK, REPLACED
from engine.tokenizer import Tokenizer, read_tokenizer, tokenizer_file

if TYPE_CHECKING:
    from engine.model import GPT
    from engine.runtime import Runtime

# The paths of all files that commands write: into a folder of prepared data, and into a run. What is being written has
# a name of its own until it is whole.
PREPARED_FILES = re.compile(
    rf"{re.escape(LOCK)}|(\.writing-)?tokenizer\.(model|json|tmp)"
    r"|(train|validation|test)/((\.writing-)?(index|unfinished)\.json|\d{5,}\.(tokens|starts)(\.tmp)?)"
)
RUN_FILES = re.compile(
    rf"{re.escape(LOCK)}|data/({PREPARED_FILES.pattern})|wandb/.*|(\.writing-)?("
    r"(config|answers|best-of-n|evaluation-.*)\.json|(metrics|pairs)\.jsonl|tokenizer\.(model|json)|wandb-id"
    r"|(samples|report)\.md|(loss|best-of-n)\.png)"
    r"|checkpoints/(\.writing-.*|(damaged-)?step-\d{8,}/(\.writing-)?"
    r"((model|critic|random|optimizer(-\d+-of-\d+)?)\.safetensors|(state|manifest|evaluation)\.json))"
)
# What makes of the same weights another model, beside the settings of the model itself.
IDENTITY = ("chat", "reward.implicit", "reward.beta", "alignment.method", "base_step", "base_weights", "lora.rank")
MEND = f"bring it back from a copy (if you have changed it yourself, delete its line {records.SEAL})"


@dataclass(frozen=True)
class Config:
    """What a run's config.json holds."""

    recipe: dict[str, Any]
    folder: str | None = None  # older versions kept absolute paths instead
    versions: dict[str, str] = field(default_factory=dict)
    asked: dict[str, Any] = field(default_factory=dict)  # the options that the run was begun with


class Run:
    """A run's folder: where everything is, and how to read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.begun = False  # has this process begun to train it?
        self.asked: dict[str, Any] | None = None  # the options that a new run was begun with, as they were typed
        self.config = path / "config.json"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.data = path / "data"
        self.samples = path / "samples.md"
        self.loss_plot = path / "loss.png"
        self.report = path / "report.md"

    @property
    def tokenizer(self) -> Path:
        return tokenizer_file(self.path)

    def begin(self) -> None:
        """Note that all is ready to train. From here on the folder keeps this run; what it has replaced is deleted."""
        self.begun = True
        shutil.rmtree(self.path / REPLACED, ignore_errors=True)

    def add_samples(self, step: int, texts: Sequence[str]) -> None:
        """Write down what the model said after `step` steps."""
        disk.append(self.samples, f"## Step {step:,}\n\n" + "\n\n---\n\n".join(texts) + "\n\n")

    def has_checkpoint(self) -> bool:
        return bool(checkpoint.checkpoints(self.checkpoints))

    def write_recipe(self, recipe: Recipe) -> None:
        folder = self.path.resolve()
        recipe = _with_paths(recipe, os.path.isabs, lambda path: _seen_from(folder, path))
        # The place of the folder is kept, too: it tells where the paths led before the folder was moved.
        asked = self.read_asked() if self.asked is None else self.asked
        content = {"recipe": to_dict(recipe), "asked": asked, "folder": str(folder), "versions": versions()}
        disk.write_atomically(self.config, records.dumps(content))

    def read_config(self) -> dict[str, Any]:
        """Return what config.json holds. Raises InputError where it is missing or damaged."""
        try:
            return vars(records.read(self.config, Config, MEND))
        except FileNotFoundError:
            raise InputError(f"{self.path} is not a run: it has no config.json; {_instead(self.path)}") from None
        except OSError as error:
            raise InputError(f"cannot read {self.config}: {error.strerror}") from None

    def read_asked(self) -> dict[str, Any]:
        """Return the options that the run was begun with, by name; none where they were not noted."""
        return dict(self.read_config()["asked"]) if self.config.exists() else {}

    def read_recipe(self) -> Recipe:
        config = self.read_config()
        try:
            recipe: Recipe = from_dict(config["recipe"])
        except InputError as error:
            raise InputError(f"{self.config} is damaged: {error}; {MEND}") from None
        if config["folder"] is None:
            return recipe
        folders = (self.path.resolve(), Path(config["folder"]))
        return _with_paths(recipe, lambda path: path.startswith("."), lambda path: _found_from(folders, path))

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """Return what a checkpoint of this run needs to be the same model: settings, and the tokenizer's SHA-256."""
        own = {name: value for name, value, _ in settings(recipe) if name.startswith("model.") or name in IDENTITY}
        return own | {"tokenizer": read_tokenizer(self.tokenizer, lambda model: hashlib.sha256(model).hexdigest())}

    def require_identity(self, found: checkpoint.Checkpoint, recipe: Recipe | None = None) -> None:
        """Compare the run, or `recipe`, which it is to go on with, with what a checkpoint was made with.

        Raises InputError with the file and what differs.
        """
        if not (saved := found.manifest().identity):  # a checkpoint of an older version
            return
        now, where = self.identity(recipe or self.read_recipe()), "the options" if recipe else str(self.config)
        for name in [name for name, value in saved.items() if now.get(name) != value]:
            if name == "tokenizer":
                raise InputError(
                    f"{self.tokenizer} is damaged, or another run's: {found.path} was made with a tokenizer whose "
                    f"SHA-256 is {saved[name]}; bring it back from a copy of the run, or of the data that it learnt"
                )
            raise InputError(
                f"{name} is {now.get(name)!r} by {where}, but {found.path} was made with {saved[name]!r}, and would "
                f"be another model; {'leave the option out' if recipe else f'set it back, or {MEND}'}"
            )

    def find_checkpoint(
        self,
        which: str = "latest",
        notice: Callable[[str], None] = lambda message: None,
        recipe: Recipe | None = None,
    ) -> checkpoint.Checkpoint:
        """Return the checkpoint called "latest" or "best", or by its step.

        Raises InputError where there is none, or where the run (or `recipe`) is not the one that it was made with.
        """
        if which == "latest":
            found = checkpoint.latest(self.checkpoints, notice)
        elif which == "best":
            found = checkpoint.best(self.checkpoints, notice)
        else:
            steps = {str(each.step): each for each in checkpoint.checkpoints(self.checkpoints)}
            found = steps.get(which)
            if found is None:
                raise InputError(f"{self.path} has no checkpoint {which!r}; it has {', '.join(steps) or 'none'}")
        if found is None:
            self.read_config()
            if which == "latest" and self.has_checkpoint():
                raise InputError(f"every checkpoint of {self.path} is damaged; train it again")
            raise InputError(f"{self.path} has no {which} checkpoint; has its training begun?")
        if which != "latest":
            try:
                found.verify()
            except checkpoint.DamagedCheckpointError as damage:
                raise InputError(f"{damage}; choose another checkpoint") from None
        self.require_identity(found, recipe)
        return found

    def load_model(
        self, runtime: "Runtime", which: str = "latest", notice: Callable[[str], None] = lambda message: None
    ) -> tuple["GPT", Tokenizer]:
        """Return the model for generation and evaluation, its weights in the runtime's dtype, and its tokenizer."""
        from engine.model import GPT

        recipe = self.read_recipe()
        if recipe.scores:
            raise InputError(f"{self.path} is a reward model: it scores texts and writes none; name {recipe.base}")
        found = self.find_checkpoint(which, notice)
        tokenizer = Tokenizer.load(self.tokenizer)
        if (tokens := tokenizer.vocab_size) != (built := recipe.model.vocab_size):
            raise InputError(f"{self.tokenizer} has {tokens} tokens; the model of this run was built for {built}")
        weights = found.weights()
        # The sizes come first: a model of damaged settings may not even fit into memory.
        fits = sum(weight.numel() for weight in weights.values()) == recipe.model.parameters
        model = GPT(recipe.model) if fits else None
        try:
            fits = model is not None and bool(model.load_state_dict(weights))
        except RuntimeError:
            fits = False
        if model is None or not fits:
            raise InputError(f"{found.path} does not fit the model that {self.config} describes")
        model.decode_int8 = runtime.precision == "int8"
        return model.to(device=runtime.device, dtype=runtime.dtype).eval(), tokenizer


def run_folders(folder: Path, depth: int = 3) -> Iterator[Path]:
    """Yield the folder where it is a run, whole or not; else the runs in it, down to this depth, by their paths."""
    if checkpoint.checkpoints(folder / "checkpoints") or _is_ours(folder / "config.json"):
        yield folder
    elif depth:
        for each in sorted(folder.iterdir()):
            if each.is_dir() and not each.name.startswith("."):
                with contextlib.suppress(PermissionError):
                    # A link may lead to a run on another disk, and must not lead in a circle.
                    yield from run_folders(each, 0 if each.is_symlink() else depth - 1)


def _is_ours(config: Path) -> bool:
    """Return whether a config.json may be a run's: exported models have one, too."""
    try:
        return b'"recipe"' in config.read_bytes()
    except OSError as error:
        return not isinstance(error, FileNotFoundError | NotADirectoryError)


def _instead(path: Path) -> str:
    """Say what may be meant by a path that is no run: those in it, or one that is called like it."""
    beside = [each for each in (path, Path("runs"), path.parent) if each.is_dir()]
    found = {each.absolute(): each for folder in beside for each in _runs_near(folder, 1 + (folder == Path("runs")))}
    found.pop(path.absolute(), None)
    if inside := [str(each) for each in found.values() if path in each.parents]:
        more = f" and {len(inside) - 3} more" if len(inside) > 3 else ""
        return f"it holds runs: {', '.join(inside[:3])}{more}"
    names = {each.name: each for each in found.values()}
    if like := difflib.get_close_matches(path.name, names, 1):
        return f"did you mean {names[like[0]]}?"
    return "`gpt runs` lists those that there are" if found else "train one with `gpt train nano`"


def _runs_near(folder: Path, depth: int) -> list[Path]:
    with contextlib.suppress(OSError):
        return list(run_folders(folder, depth))
    return []


def _with_paths(recipe: Recipe, which: Callable[[str], bool], change: Callable[[str], str]) -> Recipe:
    """Return the recipe with the paths changed that `which` picks."""
    for name in PATHS:
        path = operator.attrgetter(name)(recipe)
        if path is not None and which(path):
            recipe = override(recipe, name, change(path))
    return recipe


def _seen_from(folder: Path, path: str) -> str:
    """Return the path relative to the folder, with a dot first; as it is where only the root is common to both."""
    if os.path.commonpath([folder, path]) == folder.anchor:
        return path
    relative = os.path.relpath(path, folder)
    return relative if relative.startswith("..") else f"./{relative}"


def _found_from(folders: tuple[Path, ...], path: str) -> str:
    """Return the absolute path, seen from the first of the folders from which it leads to something."""
    found = [os.path.normpath(folder / path) for folder in folders]
    return next((each for each in found if _exists(Path(each))), found[0])


def _exists(path: Path) -> bool:
    """Return whether the path leads to something. A glob does where the folder exists in which it looks."""
    while glob.has_magic(str(path)) and not path.exists():
        path = path.parent
    return path.exists()


def versions() -> dict[str, str]:
    """Return what a result depends on beside the recipe: versions, the platform, and the git commit if there is one."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("torch", "triton", "sentencepiece"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["commit"] = _commit()
    return found


def _commit() -> str:
    checkout = Path(__file__).resolve().parent.parent
    # Without this, the commit could be that of somebody else's checkout into which the package was installed.
    if not (checkout / ".git").exists():
        return "not a checkout"
    command = ["git", "describe", "--always", "--dirty"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()
