"""The commands that train share this: from options to a recipe, the folder of the run, and how a run ends."""

import contextlib
import dataclasses
import glob
import operator
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from cli.console import Console, notice
from cli.launch import GO_ON, launch, rank_here
from cli.options import DerivedOptions, Length, TrainingOptions, given_settings, recipe_options
from engine.errors import GRACE, DiskError, InputError, UnfinishedError
from engine.folders import PATIENCE_SECONDS, Writer, one_writer

if TYPE_CHECKING:
    from engine.checkpoint import Checkpoint
    from engine.config import DataConfig, Recipe
    from engine.run import Run
    from train.stage import Outcome

Config = TypeVar("Config")

# The settings of options whose values need more than to be put into a recipe.
SETTINGS = {"data": "data.source", "reward": "alignment.reward", "implicit": "reward.implicit", "batch": "loop.batch"}
PRETRAINED, FINETUNED, REWARD_MODEL = "a pretrained run", "a finetuned run", "a reward model"


def named_recipe(name: str) -> "Recipe":
    """Return the recipe of a preset, or of a run by its folder."""
    from engine.config import PRESETS, preset
    from engine.run import Run

    if name not in PRESETS and os.path.isdir(name):  # noqa: PTH112 (Path's fails for a long name)
        return Run(Path(name)).read_recipe()
    return preset(name)


def located(data: str) -> str:
    """Return the absolute path where `data` is a path or a glob: a run may be resumed from another folder."""
    path = Path(os.path.expanduser(data))  # noqa: PTH111 (Path's fails for an unknown user)
    return str(path.resolve()) if path.exists() or glob.has_magic(data) else data


def adjust(recipe: "Recipe", values: Mapping[str, object], settings: Sequence[str] | None) -> "Recipe":
    """Return the recipe with the settings of options, then those of --set. None and "auto" leave a setting as it is."""
    from engine import config
    from engine.run import Run

    chosen = {name: value for name, value in values.items() if value not in (None, "auto")}
    budget = {name.removeprefix("budget."): chosen.pop(name) for name in list(chosen) if name.startswith("budget.")}
    adjusted = recipe
    if budget:
        length = config.BudgetConfig(**budget)  # type: ignore[arg-type]
        if length.tokens is not None:
            length = config.BudgetConfig(tokens=int(length.tokens))
        adjusted = dataclasses.replace(recipe, budget=length)
    adjusted = adjust_group(adjusted, "", chosen, settings)
    asked = {*chosen, *(setting.partition("=")[0].strip() for setting in settings or ())}
    if (origin := adjusted.optimizer.origin) and (own := [name for name in asked if name.endswith("_rate")]):
        adjusted = config.override(adjusted, "optimizer.origin", f"{origin}; as asked: {', '.join(sorted(own))}")
    if adjusted.model.context != recipe.model.context and "loop.batch" not in asked:
        begun = Run(Path(recipe.base)).read_recipe() if recipe.base else recipe
        # The batch of an imported model comes of its context, and of PPO and GRPO it is a number of answers.
        if begun.data.source == config.IMPORTED and recipe.alignment.method == "none":
            adjusted = config.override(adjusted, "loop.batch", config.step_rows(adjusted.model.context))
    if adjusted.scores != recipe.scores:
        raise InputError("model.scalar_head and reward.implicit make reward models: train one with `gpt reward RUN`")
    return adjusted


def adjust_group(config: Config, prefix: str, values: Mapping[str, object], settings: Sequence[str] | None) -> Config:
    """Return a group of settings with those of options and of --set whose dotted names begin with `prefix`."""
    from engine.config import PATHS, override, override_text

    for name, value in values.items():
        if name.startswith(prefix):
            config = override(config, name.removeprefix(prefix), value)
    texts = []
    for setting in settings or ():
        name, _, value = setting.partition("=")
        if name.strip() in PATHS:
            setting = f"{name}={located(value.strip())}"
        if setting.startswith(prefix):
            texts.append(setting.removeprefix(prefix))
    return override_text(config, *texts)


def data_config(options: TrainingOptions, default: str) -> "DataConfig":
    """Return the data that was asked for, or else `default`, with its columns."""
    from engine.config import DataConfig

    return adjust_group(DataConfig(source=located(options.data or default)), "data.", given_settings(options), None)


def begin_with(
    base: Path, suffix: str, options: DerivedOptions, kind: str, make: "Callable[[Run, Checkpoint], Recipe]"
) -> "tuple[Recipe, Run]":
    """Return the recipe and the folder of a run that begins with another; with --resume its own recipe.

    The folder is BASE-`suffix` unless --out names it, and BASE-tuned where no chat model is made.
    """
    from engine.run import Run
    from train.finetune import recognise_base

    if options.resume:
        target = Run(options.out or base.with_name(f"{base.name}-{suffix}"))
        recipe = recognise_base(resumed(target, kind, options), target, Run(base))
    else:
        recipe = make(Run(base), Run(base).find_checkpoint(options.checkpoint))
        target = Run(options.out or base.with_name(f"{base.name}-{suffix if recipe.chat else 'tuned'}"))
        if target.path.resolve() == base.resolve():
            raise InputError(f"{base} cannot become {kind} in its own folder; choose another with --out")
    return adjust(recipe, given_settings(options), None if options.resume else options.setting), target


def resumed(target: "Run", kind: str, options: TrainingOptions) -> "Recipe":
    """Return the recipe of a run to go on with. Raises InputError where it is of another kind, or would change."""
    recipe = target.read_recipe()
    found, command = kind_and_command(target, recipe)
    if found != kind:
        raise InputError(f"{target.path} is {found}; name another --out, or go on with it: {command}")
    refuse_changes(options, recipe, target.read_asked())
    return recipe


def refuse_changes(options: TrainingOptions, recipe: "Recipe", asked: Mapping[str, Any]) -> None:
    """Raise InputError if an option has another value than in the run that --resume goes on with.

    A value is the run's own where its recipe has it, or where it was `asked` for when the run began: what came of that
    may have been settled by the data, as the vocabulary is, or by the base.
    """
    asked = {"checkpoint": str(recipe.base_step), **asked}
    but = "; its length may change: --steps, --tokens, --epochs or --minutes" if isinstance(options, Length) else ""
    for name, (value, marks) in recipe_options(options).items():
        if name == "overwrite":
            raise InputError("--overwrite deletes the run that --resume goes on with: leave out one of them")
        flag, path = f"--{name.replace('_', '-')}", next((mark for mark in marks if isinstance(mark, str)), None)
        known, wanted = asked.get(name), {(path or SETTINGS.get(name)): value}
        if name == "setting":
            texts = [each.partition("=") for each in value if not (isinstance(known, list) and each in known)]
            wanted = {place.strip(): text for place, _, text in texts}
        for place, each in wanted.items():
            if known == each or (place and adjust_group(recipe, "", {}, [f"{place}={each}"]) == recipe):
                continue
            own = operator.attrgetter(place)(recipe) if place else asked.get(name, "not given")
            what = f"--set {place}" if name == "setting" else flag
            raise InputError(f"--resume goes on with the run's own recipe, where {what} is {own}, not {each}{but}")


def kind_and_command(run: "Run", recipe: "Recipe", base: Path | str | None = None) -> tuple[str, str]:
    """Return what a run is, and the command that goes on with it. `base` is the run that it began with, as typed."""
    from engine.config import PRESETS
    from engine.runs import kind_of

    base = base or recipe.base
    known = {
        "pretrain": (PRETRAINED, f"train {recipe.name}" if recipe.name in PRESETS else "train"),
        "finetune": (FINETUNED, f"finetune {base}"),
        "reward": (REWARD_MODEL, f"reward {base}"),
        "ipo": ("a run of ipo", f"rlhf dpo {base} --ipo"),
    }
    if (kind := kind_of(recipe)) == "import":
        return "an imported model", f"gpt finetune {run.path}"
    what, command = known.get(kind, (f"a run of {kind}", f"rlhf {kind} {base}"))
    return what, f"gpt {command} --out {run.path} --resume"


def make_room(folder: Writer, run: "Run", overwrite: bool, check: Callable[[], object]) -> None:
    """Refuse a folder that holds something else. A run that is there is replaced where that was asked for."""
    if not folder.before:
        return
    if not run.config.exists():
        raise InputError(f"{run.path} is not empty and holds no run; choose another folder with --out")
    if not overwrite:
        raise InputError(
            f"{run.path} already holds a run: --resume goes on with it, --out puts this one elsewhere, "
            "--overwrite deletes it"
        )
    # Only a run is deleted, and only for a command that can work.
    run.read_recipe()
    check()
    folder.replace("the run", notice)


def is_of_use(data: Path, error: BaseException) -> bool:
    """Return whether a command that failed on the way can go on with what it has tokenized into the folder `data`.

    Once the input is mended, that would be in the way.
    """
    if not isinstance(error, Exception):
        return True
    mendable = isinstance(error, InputError) and not isinstance(error, UnfinishedError)
    return not mendable and any(data.glob("*/*.json"))


def distribute(options: TrainingOptions) -> None:
    """Go on in as many processes as were asked for, unless this is one of them; this one then ends when they do."""
    if (options.gpus or options.nodes or options.rendezvous) and rank_here() is None:
        raise typer.Exit(launch(options.gpus or 1, options.nodes, options.rendezvous))


def start(
    stage: "Callable[..., Outcome]",
    recipe: "Recipe",
    run: "Run",
    options: TrainingOptions,
    base: Path | None = None,
    check: Callable[[], object] = lambda: None,
) -> None:
    """Run the training and say how it ended. Exit code 1 where it failed, 128 + signal where it was stopped."""
    import torch
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from engine import config, precision, processes, runtime
    from engine.run import RUN_FILES
    from train.stage import TrainingError
    from train.tracking import read_metrics

    machine = runtime.choose(options.device, recipe.precision)
    together = processes.join(machine.device, recipe.loop.timeout_minutes)
    machine = dataclasses.replace(machine, processes=together)

    held = contextlib.ExitStack()

    def begin() -> tuple[dict[str, Any], bool]:
        # Processes that were started again, or joined by another machine, go on with what they began.
        again = GO_ON in os.environ or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"

        def keep(error: BaseException) -> bool:
            # What is read while training may show as late as then that it cannot be trained on.
            refused = isinstance(error, InputError) and not isinstance(error, UnfinishedError)
            begun = run.begun and not (refused and not run.has_checkpoint())
            return begun or options.resume or again or is_of_use(run.data, error)

        patience = PATIENCE_SECONDS if again else 0.0
        folder = held.enter_context(one_writer(run.path, RUN_FILES, keep=keep, patience=patience, say=notice))
        if again and run.config.exists():
            return config.to_dict(run.read_recipe()), True
        if not options.resume:
            make_room(folder, run, options.overwrite, check)
            run.asked = {name: value for name, (value, _) in recipe_options(options).items() if name != "overwrite"}
        if recipe.precision != "auto":
            return config.to_dict(recipe), options.resume
        # One process decides for all.
        chosen, why = precision.for_training(machine, recipe.model)
        if why:
            console.say(f"precision  {why} here, by a few steps of one block")
        return config.to_dict(config.override(recipe, "precision", chosen.precision)), options.resume

    console = Console()
    go_on = f"go on with: {kind_and_command(run, recipe, base)[1]}"
    try:
        with console, held:
            content, resume = together.from_main(begin)
            recipe = config.from_dict(content)
            machine = dataclasses.replace(machine, precision=recipe.precision)
            for logged in read_metrics(run.metrics) if resume and console.draws else ():
                console.curve.add(logged)
            outcome = stage(recipe, run, machine, console, resume=resume, wandb=options.wandb)
    except TrainingError as failure:
        console.say(f"training failed: {failure}")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        console.say(f"stopped at once, what came after the last checkpoint is lost; {go_on}")
        raise typer.Exit(130) from None
    except DiskError as refusal:
        raise DiskError(f"{refusal}; then {go_on if run.config.exists() else 'run the same command again'}") from None
    except InputError:
        raise
    except Exception as error:
        if together.count == 1:
            raise
        if isinstance(error, processes.LostProcessError):
            # Whoever was lost has the first word: the agent hears of it, and ends the others.
            time.sleep(2 * GRACE)
            print(f"error: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
            # The agent reads this, and starts nobody again where it is the same again.
            with contextlib.suppress(OSError):
                get_error_handler().record_exception(RuntimeError(f"{type(error).__name__} in step {together.step}"))
        # An orderly end would wait for the other processes, which may be gone, or wait for this one.
        os._exit(1)
    if together.count > 1:
        torch.distributed.destroy_process_group()
    if outcome.stopped_by is not None:
        console.say(f"saved {outcome.checkpoint.path}; {go_on}")
        raise typer.Exit(128 + outcome.stopped_by)
    console.say(f"report     {run.report}")
    if run.loss_plot.exists():
        console.say(f"loss plot  {run.loss_plot}")
    tries = [] if recipe.chat else [f'gpt generate {run.path} "Once upon a time"']
    for line, command in enumerate([*tries, f"gpt chat {run.path}"] if not recipe.scores else []):
        console.say(f"{'' if line else 'try it':11}{command}")
