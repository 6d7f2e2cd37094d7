"""The losses of PPO, GRPO, DPO and IPO against closed forms, and where they converge."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.advantages import gae, k1, token_rewards
from rlhf.losses import dpo_loss, grpo_loss, ipo_loss, policy_loss, preference_margin, value_loss


def test_dpo_at_the_start_is_log_2_and_ipo_the_square_of_its_margin() -> None:
    chosen, rejected = -30 * torch.rand(2, 12)
    margin = preference_margin(chosen, rejected, chosen, rejected)
    for smoothing in (0.0, 0.1):
        assert dpo_loss(margin, beta=0.3, label_smoothing=smoothing) == pytest.approx(12 * math.log(2))
    assert ipo_loss(margin, beta=0.3) == pytest.approx(12 / (4 * 0.3**2))


def test_dpo_and_ipo_pull_chosen_up_and_rejected_down_and_ipo_rests_at_its_margin() -> None:
    zero, at = torch.zeros(1), torch.zeros(1, requires_grad=True)
    for loss in (dpo_loss, ipo_loss):
        (gradient,) = torch.autograd.grad(loss(preference_margin(at, zero, zero, zero), beta=0.5), at)
        assert gradient < 0
        (gradient,) = torch.autograd.grad(loss(preference_margin(zero, at, zero, zero), beta=0.5), at)
        assert gradient > 0
    assert ipo_loss(torch.ones(1), beta=0.5) == 0
    # Smoothed labels are content where sigmoid(beta * margin) is the share of right ones.
    margin = torch.full((1,), math.log(9) / 0.5, requires_grad=True)
    (gradient,) = torch.autograd.grad(dpo_loss(margin, beta=0.5, label_smoothing=0.1), margin)
    assert abs(float(gradient)) < 1e-6


def test_before_the_first_step_the_ratio_is_1_nothing_is_clipped_and_the_kl_is_0() -> None:
    old, advantages = -torch.rand(9), torch.randn(9)
    new = old.clone().requires_grad_()
    for loss, clipped, approx_kl in (
        policy_loss(new, old, advantages),
        grpo_loss(new, old, old, advantages, beta=0.5),
    ):
        torch.testing.assert_close(loss.detach(), -advantages.sum())
        assert clipped == 0 and approx_kl == 0
        # The ratio being 1, this is the gradient of REINFORCE.
        (gradient,) = torch.autograd.grad(loss, new)
        torch.testing.assert_close(gradient, -advantages)


def test_the_policy_loss_stops_pulling_outside_of_the_clip_range_but_not_back_into_it() -> None:
    ratios = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1])
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    new = ratios.log().requires_grad_()
    loss, clipped, approx_kl = policy_loss(new, torch.zeros(5), advantages)
    (gradient,) = torch.autograd.grad(loss, new)
    torch.testing.assert_close(loss.detach(), -torch.tensor(1.2 - 1.5 + 0.5 - 0.8 + 1.1))
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.5, -0.5, 0.0, -1.1]))
    assert clipped == 4
    torch.testing.assert_close(approx_kl, ratios.log().square().sum() / 2)


def test_a_log_ratio_beyond_all_bounds_gives_finite_losses_and_gradients() -> None:
    new = torch.tensor([-1e4, -1.0], requires_grad=True)
    old, advantages = torch.tensor([-1.0, -1e4]), -torch.ones(2)
    loss = grpo_loss(new, old, old, advantages, beta=1.0).loss
    (gradient,) = torch.autograd.grad(loss, new)
    assert loss.isfinite() and gradient.isfinite().all()


def test_grpo_settles_where_reward_less_kl_is_most() -> None:
    """Among few answers that optimum is known: the reference, times exp(reward / beta) (Rafailov et al., eq. 4)."""
    torch.manual_seed(0)
    reference = torch.randn(6, dtype=torch.float64).log_softmax(dim=-1)
    rewards, beta = torch.tensor([0.0, 1.0, -1.0, 3.0, 0.5, 0.2], dtype=torch.float64), 0.7
    best = (reference + rewards / beta).softmax(dim=-1)
    logits = reference.clone().requires_grad_()
    for _ in range(4000):
        log_probs = logits.log_softmax(dim=-1)
        drawn = log_probs.exp().detach()
        # Every answer as often as it is drawn: weighted by its share, so that nothing is left to chance.
        advantages = rewards - (drawn * rewards).sum()
        losses = [
            share * grpo_loss(new, new.detach(), before, advantage, beta=beta).loss
            for share, new, before, advantage in zip(
                drawn, log_probs.split(1), reference.split(1), advantages.split(1), strict=True
            )
        ]
        (gradient,) = torch.autograd.grad(torch.stack(losses).sum(), logits)
        with torch.no_grad():
            logits -= 0.5 * gradient
    torch.testing.assert_close(logits.softmax(dim=-1).detach(), best, atol=1e-3, rtol=0)


def test_the_value_loss_counts_the_worse_of_free_and_held() -> None:
    old, returns = torch.zeros(3), torch.ones(3)
    loss = value_loss(torch.tensor([0.1, 1.0, -1.0]), old, returns)
    # In range: 0.9^2. Beyond, towards the return: held at 0.2. Away from it: free, 2^2.
    assert loss == pytest.approx((0.81 + 0.64 + 4.0) / 2)


def test_micro_batches_add_up_to_the_step() -> None:
    a, b, c, d = -3 * torch.rand(4, 10, dtype=torch.float64)
    margin = preference_margin(a, b, c, d)
    losses: list[Callable[[slice], tuple[Tensor, ...]]] = [
        lambda part: policy_loss(a[part], b[part], c[part]),
        lambda part: (value_loss(a[part], b[part], c[part]),),
        lambda part: grpo_loss(a[part], b[part], c[part], d[part], beta=0.1),
        lambda part: (dpo_loss(margin[part], beta=0.1, label_smoothing=0.2),),
        lambda part: (ipo_loss(margin[part], beta=0.1),),
    ]
    for loss in losses:
        parts = zip(loss(slice(0, 3)), loss(slice(3, 4)), loss(slice(4, 10)), strict=True)
        together = [sum(part, torch.zeros(())) for part in parts]
        torch.testing.assert_close(torch.stack(together).double(), torch.stack(loss(slice(None))).double())


def test_what_does_not_fit_is_named() -> None:
    tokens = torch.zeros(4)
    with pytest.raises(ValueError, match=r"old_N \(3,\)"):
        policy_loss(tokens, tokens[:3], tokens)


class Bandit:
    """One prompt, six answers of one token: all that is drawn can be enumerated, and the best policy is known."""

    beta = 0.5

    def __init__(self) -> None:
        self.reference = torch.randn(6, dtype=torch.float64).log_softmax(dim=-1)
        self.rewards = torch.randn(6, dtype=torch.float64)
        # pi_ref * exp(r / beta) / Z
        self.best = (self.reference + self.rewards / self.beta).softmax(dim=-1)
        self.logits = self.reference.clone().requires_grad_()

    @property
    def log_probs(self) -> Tensor:
        return self.logits.log_softmax(dim=-1)


def test_dpo_on_a_bandit_converges_to_the_reference_tilted_by_the_rewards() -> None:
    bandit = Bandit()
    first, second = torch.triu_indices(6, 6, 1)
    wrong = torch.sigmoid(bandit.rewards[second] - bandit.rewards[first]).tolist()

    def loss() -> Tensor:
        """The expected loss under judges who prefer by Bradley and Terry: every pair, with the share of each label."""
        optimizer.zero_grad()
        now, reference = bandit.log_probs, bandit.reference
        total = torch.zeros(())
        for i, j, share in zip(first.split(1), second.split(1), wrong, strict=True):
            margin = preference_margin(now[i], now[j], reference[i], reference[j])
            total = total + dpo_loss(margin, beta=bandit.beta, label_smoothing=share) / len(wrong)
        total.backward()
        return total

    optimizer = torch.optim.LBFGS([bandit.logits], max_iter=100, tolerance_grad=1e-10, line_search_fn="strong_wolfe")
    optimizer.step(loss)
    torch.testing.assert_close(bandit.log_probs.exp().detach(), bandit.best, atol=1e-5, rtol=0)


def test_ppo_on_a_bandit_converges_to_the_reference_tilted_by_the_rewards() -> None:
    bandit = Bandit()
    optimizer = torch.optim.Adam([bandit.logits], lr=0.02, eps=1e-5)
    column = torch.ones(6, 1, dtype=torch.bool)
    for iteration in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - iteration / 300)
        old = bandit.log_probs.detach()
        kl = k1(old, bandit.reference)[:, None]
        rewards = token_rewards(kl, bandit.rewards, column[:, 0], column, beta=bandit.beta, missing_end=1.0)
        values = (old.exp() @ rewards).expand(6, 1)
        advantages = gae(rewards, values, column).advantages[:, 0]
        for _ in range(4):
            optimizer.zero_grad()
            # Weighed by its probability, each answer stands for all that would have been drawn.
            policy_loss(bandit.log_probs, old, old.exp() * advantages).loss.backward()
            optimizer.step()
    torch.testing.assert_close(bandit.log_probs.exp().detach(), bandit.best, atol=1e-4, rtol=0)
