"""The report of `gpt demo`: each method's true and proxy score against its KL, over seeds; and conversations."""

import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from cli.conversation import prompt_room
from engine import records
from engine.chat_template import Message, answer_ends, answer_prompt, trim
from engine.disk import write_atomically
from engine.model import GPT
from engine.run import Run, versions
from engine.runtime import choose
from engine.tokenizer import Tokenizer
from rlhf.policy_metrics import BEST_OF_N, BEST_OF_N_GOLD, plot_reward_vs_kl
from rlhf.prompts import Prompt
from rlhf.reward_model import ProgramReward
from rlhf.rollout import roll_out
from train.data.stories import StoryRequest, story_conversations

TALKS = 256  # so many held-out conversations are led with each model
REPORTED = ("gold_accuracy", "accuracy", "calibration_error", "pairs")
RESULT = "result.json"
TURNS = ("first answer", "second", "third", "fourth")
# The columns of the table: the figure of a method that each holds, and its digits.
COLUMNS = {
    "gold": ("gold", 3),
    "reward": ("reward", 2),
    "KL": ("kl", 2),
    "gain, deviations": ("gain_in_deviations", 2),
    "gain, of best-of-n's": ("share_of_best_of_n", 2),
    "... by gold": ("share_of_best_of_n_by_gold", 2),
}


def read_demo(folder: Path, seconds: Mapping[str, float], seed: int) -> dict[str, Any]:
    """Return the figures of one demo, from what its commands have written; they are kept in its result.json."""
    curves = records.read(folder / "chat" / "best-of-n.json", dict[str, Any])["curves"]
    (begin, *_, most), gold = curves[BEST_OF_N], curves[BEST_OF_N_GOLD][-1]["gold"]
    methods = {name: points[0] for name, points in curves.items() if not name.startswith(BEST_OF_N)}
    for point in methods.values():
        gain = point["gold"] - begin["gold"]
        point["gain_in_deviations"] = gain / begin["gold_std"]
        point["share_of_best_of_n"] = gain / (most["gold"] - begin["gold"])
        point["share_of_best_of_n_by_gold"] = gain / (gold - begin["gold"])
    reward, chat = Run(folder / "chat-reward").find_checkpoint().evaluation() or {}, Run(folder / "chat")
    tokenizer, room = Tokenizer.load(chat.tokenizer), prompt_room(chat.read_recipe().model.context)
    talks = [*islice(story_conversations("validation", turns=len(TURNS)), TALKS)]
    machine, start = choose("cpu", "fp32"), time.perf_counter()
    models = {name: Run(folder / name).load_model(machine)[0] for name in ("chat", *methods)}
    led = {name: lead_talks(model, tokenizer, talks, room) for name, model in models.items()}
    result = {
        "seed": seed,
        "seconds": {**seconds, "conversations": time.perf_counter() - start},
        "finetuned": begin,
        "reward_model": {name: reward.get(name) for name in REPORTED},
        "methods": methods,
        "turns": {name: golds for name, (golds, _) in led.items()},
        "asked": [request.text for request in talks[0]],
        "said": {name: said for name, (_, said) in led.items()},
        BEST_OF_N: curves[BEST_OF_N],
        BEST_OF_N_GOLD: curves[BEST_OF_N_GOLD],
        "versions": versions(),
    }
    write_atomically(folder / RESULT, json.dumps(result, indent=1))
    return result


def lead_talks(
    model: GPT, tokenizer: Tokenizer, talks: Sequence[Sequence[StoryRequest]], room: int
) -> tuple[list[float], list[tuple[str, float]]]:
    """Ask a model all requests of conversations, as somebody at `gpt chat` would: it goes on from its own answers.

    A prompt takes at most `room` tokens. Returns the mean gold of the answers of each turn, and the answers to the
    first conversation, with their scores.
    """
    score, ends = ProgramReward(tokenizer), answer_ends(tokenizer)
    talked: list[list[Message]] = [[] for _ in talks]
    golds, said = [], []
    for turn, asked in enumerate(zip(*talks, strict=True)):
        for messages, request in zip(talked, asked, strict=True):
            messages.append(Message("user", request.text))
        seen = (answer_prompt(tokenizer, trim(tokenizer, messages, room)[0]) for messages in talked)
        prompts = [Prompt(tuple(ids), request.facts) for ids, request in zip(seen, asked, strict=True)]
        answers = roll_out(model, prompts, ends, seed=turn).answers
        for messages, answer in zip(talked, answers, strict=True):
            messages.append(Message("assistant", tokenizer.decode([token for token in answer if token not in ends])))
        scores = score(prompts, answers)
        golds.append(float(scores.mean()))
        said.append((talked[0][-1].content, float(scores[0])))
    return golds, said


def write_demo_report(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Write report.md and frontier.png; a conversation of the first result is shown. Returns the tables' lines."""
    methods = {name: [result["methods"][name] for result in results] for name in results[0]["methods"]}
    best, by_gold = (
        [_mean(points) for points in zip(*(result[name] for result in results), strict=True)]
        for name in (BEST_OF_N, BEST_OF_N_GOLD)
    )
    begin = best[0]
    curves = {BEST_OF_N: best, BEST_OF_N_GOLD: by_gold}
    for name, points in methods.items():
        # A point gets the scores that a seed's gains would have led to from the average finetuned model.
        curves[name] = [
            point | {score: point[score] - result[BEST_OF_N][0][score] + begin[score] for score in ("gold", "reward")}
            for point, result in zip(points, results, strict=True)
        ]
    table = [
        f"| | {' | '.join(COLUMNS)} |",
        f"|---{'|---' * len(COLUMNS)}|",
        f"| finetuned | {begin['gold']:.3f} | {begin['reward']:.2f} | 0 | | | |",
    ]
    for by, point in (("", best[-1]), (" by gold", by_gold[-1])):
        scores = f"{point['gold']:.3f} | {point['reward']:.2f} | at most {point['kl']:.2f}"
        table.append(f"| best of {point['n']:.0f}{by} | {scores} | | | |")
    for name, points in methods.items():
        columns = [_spread([point[key] for point in points], digits) for key, digits in COLUMNS.values()]
        table.append(f"| {name} | {' | '.join(columns)} |")
    turns = [f"| gold | {' | '.join(TURNS)} | least later, less the first |", f"|---{'|---' * (len(TURNS) + 1)}|"]
    for name in results[0]["turns"]:
        golds = [result["turns"][name] for result in results]
        cells = [_spread(own) for own in zip(*golds, strict=True)]
        cells.append(_spread([min(later) - first for first, *later in golds]))
        turns.append(f"| {'finetuned' if name == 'chat' else name} | {' | '.join(cells)} |")
    seconds = [sum(result["seconds"].values()) for result in results]
    order = _spread([result["reward_model"]["gold_accuracy"] for result in results])
    picture = ["![score against KL](frontier.png)", ""] if plot_reward_vs_kl(curves, folder / "frontier.png") else []
    moved = ["In the picture every seed is moved to begin where the average one does.", ""] if results[1:] else []
    lines = [
        "# From stories to an aligned chat model",
        "",
        f"{statistics.mean(seconds) / 60:.1f} minutes{f' for each of {len(results)} seeds' if results[1:] else ''}. "
        "Gold is the program's score of answers to held-out requests, 0 to 1 (a quarter of "
        "them first ones; before the others stand true stories); reward is the reward model's (0 and 1: "
        "mean and deviation of the finetuned model's answers); KL is to the finetuned model, in nats per answer. "
        f"The reward model puts {order} of held-out pairs in gold order.",
        "",
        *table,
        "",
        *picture,
        *moved,
        f"In {TALKS} held-out conversations each model is asked {len(TURNS)} times, for new stories and for changes to "
        "the last one, and goes on from its own answers, as in `gpt chat`:",
        "",
        *turns,
        "",
        "## Before and after",
        "",
        *_samples(results[0]),
        "## Seconds",
        "",
        *(f"- {name}: {_spread([each['seconds'][name] for each in results], 0)}" for name in results[0]["seconds"]),
        "",
    ]
    write_atomically(folder / "report.md", "\n".join(lines))
    return [*table, "", *turns]


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _mean(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.mean(point[key] for point in points) for key in points[0]}


def _samples(result: Mapping[str, Any]) -> Iterator[str]:
    """Show what each model answers to the requests of one conversation."""
    for turn, request in enumerate(result["asked"]):
        yield from (f"> {request}", "")
        for name, answers in result["said"].items():
            text, score = answers[turn]
            yield from (f"**{name}** ({score:.2f}): {text}", "")
