"""What a policy gained and how far it went for it: scores on held-out prompts, against the KL to where it began."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from engine.model import GPT
from rlhf.advantages import k1, k3
from rlhf.log_probs import to_rows
from rlhf.rewards import Prompt, Reward
from rlhf.rollout import answer_kl, describe_answers, roll_out, rollout_log_probs

# What is chosen by the reward, and by the program: the curves that plot_frontier draws as lines.
BEST_OF_N, BEST_OF_N_GOLD = "best of n", "best of n by gold"
PANELS = {"gold": "gold: the program's score", "reward": "the reward model's score"}
# In the picture KL is in proportion up to here, and by its logarithm from there on.
NEAR_KL = 4.0
COLORS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#b45309", "#0f766e")


def measure_policy(
    policy: GPT,
    reference: GPT,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    ends: frozenset[int],
    *,
    answers: int = 1,
    temperature: float = 1.0,
    max_tokens: int | None = None,
    tokens_per_pass: int = 8192,
    seed: int = 0,
) -> dict[str, float]:
    """What `answers` answers to each prompt are worth by every reward, and their KL to the reference.

    KL is in nats per answer: the mean of k1, summed over an answer's tokens, and as "kl_k3" the same of k3, which
    varies less. Of what has an "_error", that is the standard error over prompts; "_std" is the spread of answers.
    The same seed gives the same result.
    """
    asked = [prompt for prompt in prompts for _ in range(answers)]
    rollout = roll_out(policy, asked, ends, temperature=temperature, max_tokens=max_tokens, seed=seed)
    now, _ = rollout_log_probs(policy, rollout, temperature, tokens_per_pass)
    before, _ = rollout_log_probs(reference, rollout, temperature, tokens_per_pass)
    measured = describe_scores("kl", to_rows(k1(now, before), rollout.mask).sum(dim=1).view(-1, answers))
    measured["kl_k3"] = answer_kl(k3(now, before), rollout.mask)
    for name, reward in rewards.items():
        measured |= describe_scores(name, reward(asked, rollout.answers).view(-1, answers))
    return {**measured, **describe_answers(rollout), "tokens": len(now)}


def describe_scores(name: str, scores_PN: Tensor) -> dict[str, float]:
    """The mean of N scores for each of P prompts, their deviation, and the mean's standard error over prompts."""
    prompts = len(scores_PN)
    error = float(scores_PN.mean(dim=1).std()) / math.sqrt(prompts) if prompts > 1 else math.nan
    return {name: float(scores_PN.mean()), f"{name}_std": float(scores_PN.std(correction=0)), f"{name}_error": error}


def plot_frontier(curves: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> bool:
    """Draw scores over KL, a panel for each reward. False, and no picture, where matplotlib is not installed.

    A curve is one or more points as of measure_policy, of several seeds or checkpoints perhaps. KL is on a line up to
    NEAR_KL, and beyond that, where a point lies there, on a logarithmic one.
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
                axes.annotate(
                    f"{point['n']:.0f}",
                    (point["kl"], point[score]),
                    xytext=(9, -9),
                    textcoords="offset points",
                    ha="center",
                    fontsize=8,
                    color="#64748b",
                )
        if max(point["kl"] for point in points) > NEAR_KL:
            # A policy that no price on KL held back would squash all the others.
            axes.set_xscale("symlog", linthresh=NEAR_KL, linscale=2)
            ticks = [tick for tick in (0, 1, 2, 3, 4, 10, 30, 100, 300) if tick <= 1.3 * axes.get_xlim()[1]]
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.minorticks_off()
        axes.set_title(title, fontsize=11)
        axes.set_xlabel("KL to the finetuned model (nats per answer)")
        axes.set_ylabel("mean score of held-out prompts")
        axes.grid(alpha=0.25)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return True
