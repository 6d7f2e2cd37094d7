"""Pairs of a model's own answers: drawn, scored, and compared by a noisy judge."""

import json
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from random import Random

from engine.chat_template import answer_ends
from engine.errors import InputError
from engine.model import GPT
from rlhf.preferences import Preference, prefer
from rlhf.prompts import Prompts
from rlhf.reward_model import ProgramReward, Reward
from rlhf.rollout import roll_out

COLUMNS = ["prompt", "chosen", "rejected", "gold"]


@dataclass(frozen=True)
class SampledPairs:
    """Pairs, and what was left out: two answers of one text or one score, and answers that did not end."""

    pairs: list[Preference]
    same: int
    ties: int
    unfinished: int
    scores: list[float]  # of all answers
    tokens: int  # in all answers

    def describe(self) -> str:
        answers = len(self.scores)
        known = [pair.gold for pair in self.pairs if pair.gold is not None]
        right = f"; the judge is right about {sum(known) / len(known):.1%}" if known else ""
        return (
            f"{len(self.pairs):,} pairs of {answers:,} answers, mean score {sum(self.scores) / answers:.3f}{right}; "
            f"left out: {self.ties:,} ties, {self.same:,} of equal texts, {self.unfinished:,} answers that did not end"
        )


def require_sampled(path: Path) -> None:
    """Raise InputError where a line of a file is not, to the letter, as `Preference.to_json_line` writes it."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict) or [*row] != COLUMNS or json.dumps(row, ensure_ascii=False) + "\n" != line:
                raise InputError(f"line {number:,} is no pair that was sampled")


def sample_pairs(
    model: GPT,
    prompts: Prompts,
    reward: Reward,
    *,
    answers: int = 2,
    temperature: float = 1.0,
    seed: int = 0,
) -> SampledPairs:
    """Draw several answers of a model to each prompt, and let a noisy judge of their rewards compare every two of them.

    `gold` is known where the program itself gives the reward. The same seed gives the same pairs.
    """
    tokenizer, ends = prompts.tokenizer, answer_ends(prompts.tokenizer)
    asked = prompts.first(len(prompts))
    rollout = roll_out(model, asked, ends, each=answers, temperature=temperature, seed=seed)
    texts = [tokenizer.decode([token for token in answer if token not in ends]) for answer in rollout.answers]
    ended = rollout.ended.tolist()
    if isinstance(reward, ProgramReward):
        found = reward.scores(rollout.prompts, rollout.answers)
        scores, points = [score.total for score in found], [score.points for score in found]
    else:
        scores = points = reward(rollout.prompts, rollout.answers).tolist()
    rng, pairs, same, ties = Random(f"pairs {seed}"), [], 0, 0
    for number, messages in enumerate(prompts.asked):
        # An answer that was cut short would look as if it ended there.
        whole = [row for row in range(number * answers, (number + 1) * answers) if ended[row]]
        for one, other in combinations(whole, 2):
            if texts[one] == texts[other]:
                same += 1
            elif points[one] == points[other]:
                ties += 1
            else:
                pair = prefer(messages, (texts[one], texts[other]), (points[one], points[other]), rng)
                pairs.append(pair if isinstance(reward, ProgramReward) else replace(pair, gold=None))
    return SampledPairs(pairs, same, ties, ended.count(False), scores, len(rollout.sampled))
