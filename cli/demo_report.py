"""The report of `gpt demo`: each method's true and proxy score against its KL, over seeds, and samples."""

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine import records
from engine.chat_template import answer_ends
from engine.disk import write_atomically
from engine.run import Run, versions
from engine.runtime import choose
from engine.tokenizer import Tokenizer
from rlhf.policy_metrics import BEST_OF_N, BEST_OF_N_GOLD, plot_reward_vs_kl
from rlhf.prompts import encode_prompts, open_prompts
from rlhf.reward_model import ProgramReward
from rlhf.rollout import roll_out

SHOWN = 3
REPORTED = ("gold_accuracy", "accuracy", "calibration_error", "pairs")
RESULT = "result.json"
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
    reward = Run(folder / "chat-reward").find_checkpoint().evaluation() or {}
    result = {
        "seed": seed,
        "seconds": dict(seconds),
        "finetuned": begin,
        "reward_model": {name: reward.get(name) for name in REPORTED},
        "methods": methods,
        BEST_OF_N: curves[BEST_OF_N],
        BEST_OF_N_GOLD: curves[BEST_OF_N_GOLD],
        "versions": versions(),
    }
    write_atomically(folder / RESULT, json.dumps(result, indent=1))
    return result


def write_demo_report(folder: Path, results: Sequence[Mapping[str, Any]], samples: Path) -> list[str]:
    """Write report.md and frontier.png; `samples` is the demo whose models are asked. Returns the table's lines."""
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
    seconds = [sum(result["seconds"].values()) for result in results]
    order = _spread([result["reward_model"]["gold_accuracy"] for result in results])
    picture = ["![score against KL](frontier.png)", ""] if plot_reward_vs_kl(curves, folder / "frontier.png") else []
    moved = ["In the picture every seed is moved to begin where the average one does.", ""] if results[1:] else []
    lines = [
        "# From stories to an aligned chat model",
        "",
        f"{statistics.mean(seconds) / 60:.1f} minutes{f' for each of {len(results)} seeds' if results[1:] else ''}. "
        "Gold is the program's score of answers to held-out requests, 0 to 1; reward is the reward model's (0 and 1: "
        "mean and deviation of the finetuned model's answers); KL is to the finetuned model, in nats per answer. "
        f"The reward model puts {order} of held-out pairs in gold order.",
        "",
        *table,
        "",
        *picture,
        *moved,
        "## Before and after",
        "",
        *_samples(samples, [*methods]),
        "## Seconds",
        "",
        *(f"- {name}: {_spread([each['seconds'][name] for each in results], 0)}" for name in results[0]["seconds"]),
        "",
    ]
    write_atomically(folder / "report.md", "\n".join(lines))
    return table


def _spread(values: Sequence[float], digits: int = 3) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def _mean(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {key: statistics.mean(point[key] for point in points) for key in points[0]}


def _samples(folder: Path, methods: Sequence[str]) -> list[str]:
    machine, chat = choose("cpu", "fp32"), Run(folder / "chat")
    tokenizer, recipe = Tokenizer.load(chat.tokenizer), chat.read_recipe()
    prompts = encode_prompts(open_prompts(recipe.data), "validation", tokenizer, recipe.model.context, SHOWN)
    asked, gold, ends = prompts.first(SHOWN), ProgramReward(tokenizer), answer_ends(tokenizer)
    lines = [[f"> {messages[-1].content}", ""] for messages in prompts.asked]
    for name in ("chat", *methods):
        model, _ = Run(folder / name).load_model(machine)
        answers = roll_out(model, asked, ends).answers
        for own, answer, score in zip(lines, answers, gold(asked, answers).tolist(), strict=True):
            text = tokenizer.decode([token for token in answer if token not in ends])
            own += [f"**{name}** ({score:.2f}): {text}", ""]
    return [line for own in lines for line in own]
