"""Preferences between a model's own answers: drawn, scored, and told apart by a noisy judge."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from random import Random

from engine.chat_template import answer_ends
from engine.model import GPT
from rlhf.preferences import Preference, judge
from rlhf.prompts import Prompts
from rlhf.rewards import ProgramReward, Reward
from rlhf.rollout import roll_out


@dataclass(frozen=True)
class SampledPairs:
    """Pairs, and what was left out: two answers that are the same text, or the judge's score is; unfinished answers."""

    pairs: list[Preference]
    same: int
    ties: int
    unfinished: int
    scores: list[float]  # of all answers

    def describe(self) -> str:
        answers = len(self.scores)
        known = [pair.gold for pair in self.pairs if pair.gold is not None]
        right = f"; the judge is right about {sum(known) / len(known):.1%}" if known else ""
        return (
            f"{len(self.pairs):,} pairs of {answers:,} answers, mean score {sum(self.scores) / answers:.3f}{right}; "
            f"left out: {self.ties:,} ties, {self.same:,} of equal texts, {self.unfinished:,} answers that did not end"
        )


def sample_pairs(
    model: GPT,
    prompts: Prompts,
    reward: Reward,
    *,
    answers: int = 2,
    temperature: float = 1.0,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda answers, tokens: None,
) -> SampledPairs:
    """Answers of the model, several to each prompt, and every two of them as a noisy judge of their rewards likes them.

    `gold` is known where the program itself gives the reward. The same seed gives the same pairs.
    """
    tokenizer, ends = prompts.tokenizer, answer_ends(prompts.tokenizer)
    asked = [prompt for prompt in prompts.first(len(prompts)) for _ in range(answers)]
    rollout = roll_out(model, asked, ends, temperature=temperature, seed=seed, progress=progress)
    texts = [tokenizer.decode([token for token in answer if token not in ends]) for answer in rollout.answers]
    ended = rollout.ended.tolist()
    if isinstance(reward, ProgramReward):
        judged = reward.scores(asked, rollout.answers)
        scores, worth = [score.total for score in judged], [score.points for score in judged]
    else:
        scores = worth = reward(asked, rollout.answers).tolist()
    rng, pairs, same, ties = Random(f"pairs {seed}"), [], 0, 0
    for number, messages in enumerate(prompts.asked):
        # Cut short and then closed, an answer would be another one.
        whole = [row for row in range(number * answers, (number + 1) * answers) if ended[row]]
        for one, other in combinations(whole, 2):
            if texts[one] == texts[other]:
                same += 1
            elif worth[one] == worth[other]:
                ties += 1
            else:
                pairs.append(judge(messages, (texts[one], texts[other]), (worth[one], worth[other]), rng))
    if not isinstance(reward, ProgramReward):
        pairs = [Preference(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]
    return SampledPairs(pairs, same, ties, ended.count(False), scores)


def to_json_line(pair: Preference) -> str:
    """A pair as rlhf.preference_sources.read_preferences reads it."""
    turns = [{"role": message.role, "content": message.content} for message in pair.prompt]
    prompt = turns[0]["content"] if len(turns) == 1 else turns
    row = {"prompt": prompt, "chosen": pair.chosen, "rejected": pair.rejected, "gold": pair.gold}
    return json.dumps(row, ensure_ascii=False) + "\n"
