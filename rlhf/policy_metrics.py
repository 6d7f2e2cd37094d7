"""Reward against KL: what a policy gains on held-out prompts, and how far it goes from where it began for that."""

import io
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.chat_template import answer_ends
from engine.config import Recipe
from engine.disk import write_atomically
from engine.model import GPT
from engine.tokenizer import Tokenizer
from rlhf.advantages import k1, k3
from rlhf.prompts import Prompt
from rlhf.reward_model import Reward
from rlhf.rollout import Rollout, answer_kl, describe_answers, roll_out, rollout_log_probs, to_rows
from train.tracking import metric_parts

# The names of the best answers by the reward and by the program: plot_reward_vs_kl draws these curves as lines.
BEST_OF_N, BEST_OF_N_GOLD = "best of n", "best of n by gold"
PANELS = {"gold": "gold: the program's score", "reward": "the reward model's score"}
# In the picture KL is in proportion up to here, and by its logarithm from there on.
NEAR_KL = 4.0
COLORS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#b45309", "#0f766e")
SUSPICIONS = ("gold", "distinct_2", "ended", "length")


def measure_policy(
    policy: GPT,
    reference: GPT,
    rollout: Rollout,
    rewards: Mapping[str, Reward],
    *,
    answers: int = 1,
    temperature: float = 1.0,
    tokens_per_pass: int = 8192,
) -> dict[str, float]:
    """Measure what the policy's rollout, of `answers` to each prompt, is worth by every reward, and its KL.

    KL to the reference is in nats per answer: the mean of k1, summed over an answer's tokens, and as "kl_k3" the same
    of k3, which varies less. "X_error" is the standard error of X over prompts, "X_std" the spread of X over answers.
    """
    now, _ = rollout_log_probs(policy, rollout, temperature, tokens_per_pass)
    before, _ = rollout_log_probs(reference, rollout, temperature, tokens_per_pass)
    metrics = describe_scores("kl", to_rows(k1(now, before), rollout.mask).sum(dim=1).view(-1, answers))
    metrics["kl_k3"] = answer_kl(k3(now, before), rollout.mask)
    for name, reward in rewards.items():
        metrics |= describe_scores(name, reward(rollout.prompts, rollout.answers).view(-1, answers))
    return {**metrics, **describe_answers(rollout), "tokens": len(now)}


def describe_scores(name: str, scores_PN: Tensor) -> dict[str, float]:
    """Return the mean of N scores for each of P prompts, their spread, and the mean's standard error over prompts."""
    prompts = len(scores_PN)
    error = float(scores_PN.mean(dim=1).std()) / math.sqrt(prompts) if prompts > 1 else math.nan
    return {name: float(scores_PN.mean()), f"{name}_std": float(scores_PN.std(correction=0)), f"{name}_error": error}


def best_of_n(rollout: Rollout, most: int, by: str, rewards: Mapping[str, Reward]) -> list[dict[str, float]]:
    """Measure the best of n answers by the reward called `by`, for n = 1, 2, 4 ... up to `most`, by every reward.

    It needs no training, and is what every method is compared with. The rollout has `most` answers to each prompt: for
    a small n they are many independent draws of n, and all count. A point has "n", "kl" (at most, in nats per answer),
    and scores as of describe_scores.
    """
    scores = {name: reward(rollout.prompts, rollout.answers).view(-1, most) for name, reward in rewards.items()}
    points = []
    for n in (2**power for power in range(most.bit_length())):
        draws = {name: own[:, : most // n * n].unflatten(1, (-1, n)) for name, own in scores.items()}
        best = draws[by].argmax(dim=2, keepdim=True)
        point = {"n": n, "kl": best_of_n_kl(n)}
        for name, own in draws.items():
            point |= describe_scores(name, torch.gather(own, 2, best)[..., 0])
        points.append(point)
    return points


def best_of_n_kl(n: int) -> float:
    """Return log n - (n - 1) / n, which the KL to the model that draws n answers never exceeds (arXiv:2401.01879)."""
    return math.log(n) - (n - 1) / n


class PolicyMonitor:
    """The monitor asks a policy and its reference the same held-out prompts, and compares what they answer.

    It says once of each kind when the policy seems to game its reward. It stops no run.
    """

    def __init__(
        self,
        recipe: Recipe,
        reference: GPT,
        prompts: Sequence[Prompt],
        rewards: Mapping[str, Reward],
        tokenizer: Tokenizer,
        say: Callable[[str], None],
    ) -> None:
        self.recipe, self.reference, self.prompts, self.rewards = recipe, reference, prompts, rewards
        self.tokenizer, self.ends, self.say = tokenizer, answer_ends(tokenizer), say
        self.said: set[str] = set()
        self.begin = self.measure(reference)

    def measure(self, policy: GPT) -> dict[str, float]:
        """Return the metrics of a policy, drawn from as it is in the training."""
        temperature, most = self.recipe.alignment.temperature, self.recipe.alignment.max_tokens
        rollout = roll_out(policy, self.prompts, self.ends, temperature=temperature, max_tokens=most)
        options: dict[str, Any] = {"temperature": temperature, "tokens_per_pass": self.recipe.tokens_per_pass}
        return measure_policy(policy, self.reference, rollout, self.rewards, **options)

    def __call__(self, policy: GPT) -> dict[str, float]:
        """Return the metrics, and for each kind of suspicion 1 or 0."""
        now = self.measure(policy)
        signs = suspicions(self.begin, now)
        for kind in [kind for kind in signs if kind not in self.said]:
            self.say(f"reward hacking? {signs[kind]}; a higher --beta, or an earlier checkpoint, stays closer")
        self.said |= signs.keys()
        return {**now, **{f"suspect_{kind}": float(kind in signs) for kind in SUSPICIONS}}

    def sample(self, policy: GPT) -> list[str]:
        """Return the first prompts and the policy's answers to them, as text."""
        prompts = self.prompts[: self.recipe.loop.samples]
        asked = [self.tokenizer.decode(prompt.ids) for prompt in prompts]
        answers = map(self.tokenizer.decode, roll_out(policy, prompts, self.ends).answers)
        return [f"> {prompt}\n\n{answer}" for prompt, answer in zip(asked, answers, strict=True)]

    def notes(self) -> tuple[str, str]:
        """Say before the training begins what the policy is measured beside, and where it begins."""
        return (
            f"reference  {self.recipe.base}, step {self.recipe.base_step}",
            f"begins at  {'  '.join(metric_parts(self.begin))}, on held-out prompts",
        )


def suspicions(begin: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    """Return, by its kind, what left its sane range between the two, in words."""
    signs = {}
    if {"gold", "reward"} <= now.keys():
        # Chance alone moves the score by about its standard error.
        worse = now["gold"] < begin["gold"] - now["gold_error"]
        if worse and now["reward"] > begin["reward"]:
            change = f"from {begin['gold']:.3f} to {now['gold']:.3f} while the reward rose"
            signs["gold"] = f"the program's score fell {change} from {begin['reward']:.3f} to {now['reward']:.3f}"
    for kind, what in (("distinct_2", "the share of different word pairs"), ("ended", "the share of ended answers")):
        if now[kind] < begin[kind] / 2:
            signs[kind] = f"{what} fell from {begin[kind]:.3f} to {now[kind]:.3f}"
    if not begin["length"] / 2 <= now["length"] <= 2 * begin["length"]:
        signs["length"] = f"answers went from {begin['length']:.0f} to {now['length']:.0f} tokens"
    return signs


def plot_reward_vs_kl(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> bool:
    """Draw scores over KL, a panel for each reward. False, and no picture, where matplotlib is not installed.

    A curve is one or more points as of measure_policy or best_of_n, of several seeds or checkpoints perhaps.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [point for own in curves.values() for point in own]
    panels = {name: title for name, title in PANELS.items() if all(name in point for point in points)}
    colors = dict(zip((name for name in curves if not name.startswith(BEST_OF_N)), COLORS * len(curves), strict=False))
    figure, grid = pyplot.subplots(
        1, len(panels), figsize=(1 + 5 * len(panels), 4.5), layout="constrained", squeeze=False
    )
    for axes, (score, title) in zip(grid[0], panels.items(), strict=True):
        for name, own in curves.items():
            line = name.startswith(BEST_OF_N)
            axes.errorbar(
                [point["kl"] for point in own],
                [point[score] for point in own],
                xerr=None if line else [point.get("kl_error", 0.0) for point in own],
                yerr=[point.get(f"{score}_error", 0.0) for point in own],
                fmt={BEST_OF_N: "o-", BEST_OF_N_GOLD: "o:"}.get(name, "o"),
                color=colors.get(name, "#9db4d0"),
                ms=4 if line else 6,
                lw=1.3,
                capsize=2,
                label=name,
            )
            for point in own if line else ():
                where = {"xy": (point["kl"], point[score]), "xytext": (9, -9), "textcoords": "offset points"}
                axes.annotate(f"{point['n']:.0f}", **where, ha="center", fontsize=8, color="#64748b")
        if max(point["kl"] for point in points) > NEAR_KL:
            # Without a price on KL a policy goes so far that all the others would be squashed together.
            axes.set_xscale("symlog", linthresh=NEAR_KL, linscale=2)
            ticks = [tick for tick in (0, 1, 2, 3, 4, 10, 30, 100, 300) if tick <= 1.3 * axes.get_xlim()[1]]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("KL to the finetuned model (nats per answer)")
        axes.set_ylabel("mean score of held-out prompts")
        axes.grid(alpha=0.25)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(picture := io.BytesIO(), dpi=130)
    write_atomically(path, picture.getvalue())
    pyplot.close(figure)
    return True
