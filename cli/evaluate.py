"""gpt evaluate: how good a run is on text that it has not seen."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from typer import Option

from cli.console import FRAMELESS, Console, notice, print_table
from cli.options import (
    CheckpointName,
    ConversationColumns,
    Machine,
    MaxTokens,
    RunArgument,
    Seed,
    Temperature,
    TopP,
    WandB,
)
from cli.training import located
from engine.config import Count
from engine.errors import InputError


@dataclass(frozen=True)
class TextOptions:
    """These options say which texts are written, and how they are compared with the data."""

    count: Annotated[
        int, "at least 0 and at most 1000000", Option("--count", "-n", help="How many of these documents to complete.")
    ] = 200
    bleu_tokenizer: Annotated[
        str, Option(help="sacrebleu's: 13a, intl, zh, ja-mecab, ko-mecab, char, flores200 and others.")
    ] = "13a"
    rouge_tokenizer: Annotated[
        str, Option(help="rouge-score's default (stemmed words of a-z), or words: those of any script.")
    ] = "default"
    max_tokens: MaxTokens = None
    temperature: Temperature = 0.8
    top_p: TopP = 0.95
    seed: Seed = 0


def evaluate(
    path: RunArgument,
    columns: ConversationColumns,
    texts: TextOptions,
    on: Machine,
    data: Annotated[
        str | None, Option(help="Documents or conversations, as for gpt train and gpt finetune; else the run's own.")
    ] = None,
    split: Annotated[str, Option(help="validation, test or train.")] = "validation",
    tokens: Annotated[
        Count | None, Option(help="Read this many tokens; else as many as at the end of training.")
    ] = None,
    reward: Annotated[Path | None, Option(help="The run of a reward model: how does it like the answers?")] = None,
    against: Annotated[Path | None, Option(help="Another run: which of the two completes them better?")] = None,
    which: CheckpointName = "latest",
    wandb: WandB = False,
) -> None:
    """Measure a run on text it has not seen: loss, and what it writes beside what came next there.

    It goes on from the first half of documents, or answers conversations. BLEU and ROUGE compare that with
    the second half or the answer; for the built-in data a program judges the stories, too.

    Example: gpt evaluate runs/nano

    Example: gpt evaluate runs/nano-chat --data stories-instruct --against runs/nano

    Example: gpt evaluate runs/nano-chat-ppo --against runs/nano-chat --reward runs/nano-chat-reward
    """
    import dataclasses

    from engine.config import DataConfig
    from engine.run import Run
    from engine.sampling import Sampling
    from rlhf.reward_model import open_scorer
    from train import evaluation
    from train.tracking import Wandb, require_wandb

    if wandb:
        require_wandb()
    run = Run(path)
    recipe = run.read_recipe()
    source = recipe.data
    if data is not None:
        source = DataConfig(located(data), **vars(columns))
    elif recipe.alignment.method in ("dpo", "ipo"):
        # Preferences hold nothing to answer; the data that its base has learnt from does.
        source = Run(Path(str(recipe.base))).read_recipe().data
    machine = on.choose()
    contestants = [evaluation.Contestant.load(run, machine, which, notice)]
    if against is not None:
        contestants.append(evaluation.Contestant.load(Run(against), machine, "latest", notice))
    held_out = evaluation.open_held_out(source, split, run.data if data is None else None)
    scorers = {} if reward is None else {"reward": open_scorer(Run(reward), machine)}
    with Console(stderr=True) as console:
        result = evaluation.evaluate(
            contestants,
            held_out,
            tokens=tokens or recipe.data.final_evaluation_tokens,
            count=texts.count,
            sampling=Sampling(texts.temperature, top_p=texts.top_p, seed=texts.seed),
            max_tokens=texts.max_tokens,
            bleu_tokenizer=texts.bleu_tokenizer,
            rouge_tokenizer=texts.rouge_tokenizer,
            scorers=scorers,
            say=console.say,
        )
    # It is shown first: the run may be on a disk that nothing can be written to.
    heading, *rows = evaluation.evaluation_table(result)
    print_table(heading, rows, soft_wrap=True, title=held_out.name, title_justify="left", **FRAMELESS)
    for note in evaluation.evaluation_notes(result):
        print(note)
    try:
        written = evaluation.write(run, result)
        print(f"written to {written} and {run.report}")
    except (InputError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        notice(f"the result could not be written into {run.path}: {reason}")
        return
    if wandb:
        tracker = Wandb(run.path, run.path.name, dataclasses.asdict(recipe), notice)
        values = {f"{written.stem}/{key}": own.value for key, own in result["runs"][0]["measures"].items()}
        tracker.log({"step": contestants[0].step, **values})
        tracker.close()
