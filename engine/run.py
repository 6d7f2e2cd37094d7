"""A run is a folder: recipe, tokenizer, metrics, checkpoints, and what was made of them.

Its config.json holds paths relative to the folder, so that runs and data can be moved together. In memory paths are
absolute, so that nothing else depends on where the run or the working directory is.
"""

import glob
import json
import operator
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import checkpoint, disk
from engine.config import PATHS, Recipe, from_dict, override, to_dict
from engine.errors import InputError
from engine.folders import LOCK, REPLACED
from engine.tokenizer import Tokenizer, tokenizer_file

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
        disk.write_atomically(self.config, json.dumps(content, indent=2))

    def read_config(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads(self.config.read_text())
            return found
        except FileNotFoundError:
            raise InputError(
                f"{self.path} is not a run: it has no config.json; train one with `gpt train nano`"
            ) from None
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {self.config}: {error}") from None

    def read_asked(self) -> dict[str, Any]:
        """Return the options that the run was begun with, by name; none where they were not noted."""
        asked = self.read_config().get("asked") if self.config.exists() else None
        return asked if isinstance(asked, dict) else {}

    def read_recipe(self) -> Recipe:
        config = self.read_config()
        if not isinstance(config, dict) or "recipe" not in config:
            raise InputError(f"{self.config} holds no recipe")
        recipe: Recipe = from_dict(config["recipe"])
        if "folder" not in config:  # an older version kept absolute paths
            return recipe
        folders = (self.path.resolve(), Path(config["folder"]))
        return _with_paths(recipe, lambda path: path.startswith("."), lambda path: _found_from(folders, path))

    def find_checkpoint(
        self, which: str = "latest", notice: Callable[[str], None] = lambda message: None
    ) -> checkpoint.Checkpoint:
        """Return the checkpoint called "latest" or "best", or by its step. Raises InputError where there is none."""
        if which == "latest":
            found = checkpoint.latest(self.checkpoints, notice)
        elif which == "best":
            found = checkpoint.best(self.checkpoints)
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
        model = GPT(recipe.model)
        try:
            model.load_state_dict(found.tensors("model"))
        except RuntimeError:
            raise InputError(f"{found.path} does not fit the model that {self.config} describes") from None
        model.decode_int8 = runtime.precision == "int8"
        return model.to(device=runtime.device, dtype=runtime.dtype).eval(), tokenizer


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
