"""KL estimates, rewards per token, GAE, whitening, groups and the price of KL, against closed forms."""

import pytest
import torch
from torch import Tensor

from rlhf.advantages import adapted_beta, gae, group_advantages, k1, k2, k3, token_rewards, whiten

NAN = float("nan")
MASK = torch.tensor(
    [
        [True, True, True, True, True, True],
        [True, True, True, False, False, False],
        [False, False, True, True, True, False],
        [True, False, True, False, False, True],
        [True, False, False, False, False, False],
    ]
)


def real_and_padding(mask: Tensor) -> Tensor:
    """Random numbers where the mask is True, NaN elsewhere."""
    return torch.randn(mask.shape, dtype=torch.float64).masked_fill(~mask, NAN)


def brute_force(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """O(T^2): the sum over all later tokens of (gamma lam)^distance times the critic's one-step error there."""
    after = [*values[1:].tolist(), 0.0]
    errors = [float(r) + gamma * n - float(v) for r, v, n in zip(rewards, values, after, strict=True)]
    steps = range(len(errors))
    return torch.tensor(
        [sum((gamma * lam) ** (later - t) * errors[later] for later in steps[t:]) for t in steps], dtype=torch.float64
    )


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0), (0.7, 1.0), (0.7, 0.0)])
def test_gae_is_the_sum_over_all_later_errors_in_rows_of_any_mask(gamma: float, lam: float) -> None:
    rewards, values = real_and_padding(MASK), real_and_padding(MASK)
    advantages, returns = gae(rewards, values, MASK, gamma=gamma, lam=lam)
    for row, mask in enumerate(MASK):
        expected = brute_force(rewards[row, mask], values[row, mask], gamma, lam)
        torch.testing.assert_close(advantages[row, mask], expected)
        torch.testing.assert_close(returns[row, mask], expected + values[row, mask])
    assert (advantages[~MASK] == 0).all() and (returns[~MASK] == 0).all()


def test_lambda_1_gives_returns_that_do_not_depend_on_the_critic_and_lambda_0_one_step_errors() -> None:
    rewards, values = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[0.3, -0.7, 5.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(gae(rewards, values, mask, lam=1.0).returns, torch.tensor([[7.0, 6.0, 4.0]]))
    errors = gae(rewards, values, mask, lam=0.0).advantages
    torch.testing.assert_close(errors, torch.tensor([[0.0, 7.7, -1.0]]))


def test_whitened_tokens_have_mean_0_and_variance_1_and_padding_changes_nothing() -> None:
    values = 3 * real_and_padding(MASK) + 5
    whitened = whiten(values, MASK)
    assert whitened[MASK].mean().abs() < 1e-12
    assert whitened[MASK].var(correction=0) == pytest.approx(1)
    assert (whitened[~MASK] == 0).all()
    assert torch.equal(whiten(values.nan_to_num(1e6), MASK), whitened)


def test_equal_values_whiten_to_nothing_rather_than_to_infinity() -> None:
    assert whiten(torch.full((2, 6), 7.0), MASK[:2]).abs().max() < 1e-3


def test_group_advantages_sum_to_0_in_every_group_and_undecided_groups_are_counted() -> None:
    scores = torch.cat((torch.randn(4, 7), torch.full((2, 7), 0.3)))
    advantages, undecided = group_advantages(scores)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(6), atol=1e-5, rtol=0)
    torch.testing.assert_close(advantages[:4].std(dim=1), torch.ones(4), atol=1e-3, rtol=0)
    assert undecided == 2 and (advantages[4:] == 0).all()


def test_k1_and_k3_have_the_kl_for_their_mean() -> None:
    policy, reference = torch.randn(2, 50, dtype=torch.float64).mul(2).log_softmax(dim=-1)
    exact = (policy.exp() * (policy - reference)).sum()
    for estimate in (k1, k3):
        torch.testing.assert_close((policy.exp() * estimate(policy, reference)).sum(), exact)
    assert (k3(policy, reference) >= 0).all() and (k1(policy, reference) < 0).any()
    assert (k3(policy, policy) == 0).all()


def test_the_gradient_of_k2_is_that_of_the_kl_however_far_the_policy_has_gone() -> None:
    reference = torch.randn(50, dtype=torch.float64).mul(2).log_softmax(dim=-1)
    for away in (0.1, 1.0, 8.0):
        logits = (reference + away * torch.randn(50, dtype=torch.float64)).requires_grad_()
        policy = logits.log_softmax(dim=-1)
        (exact,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
        # The mean over tokens that the policy draws, of which each has its own gradient.
        drawn = policy.exp().detach()
        (found,) = torch.autograd.grad((drawn * k2(policy, reference)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, exact)
        (other,) = torch.autograd.grad((drawn * k3(policy, reference)).sum(), logits)
        assert away < 1 or (other - exact).norm() > 0.3 * exact.norm()


def test_the_score_comes_at_the_last_token_and_kl_costs_at_every_one() -> None:
    kl = real_and_padding(MASK)
    scores, ended = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]), torch.tensor([True, True, True, True, False])
    rewards = token_rewards(kl, scores, ended, MASK, beta=0.5, missing_end=10.0)
    expected = (-0.5 * kl).masked_fill(~MASK, 0.0)
    for row, (last, score) in enumerate([(5, 1.0), (2, 2.0), (4, 3.0), (5, 4.0), (0, -5.0)]):
        expected[row, last] += score
    torch.testing.assert_close(rewards, expected)


def test_an_adaptive_price_of_kl_moves_towards_its_target_by_20_percent_at_most() -> None:
    for kl, error in ((6.0, 0.0), (6.6, 0.1), (600.0, 0.2), (-3.0, -0.2)):
        assert adapted_beta(0.1, kl, target=6.0, answers=1000) == pytest.approx(0.1 * (1 + error / 10))


def test_what_does_not_fit_is_named() -> None:
    values = torch.zeros(5, 6)
    with pytest.raises(ValueError, match=r"mask_BT is torch.float32 \(5, 6\); expected bool"):
        gae(values, values, values)
    with pytest.raises(ValueError, match=r"rewards_BT \(5, 5\)"):
        gae(values[:, :5], values, MASK)
    with pytest.raises(ValueError, match=r"lam 1\.5"):
        gae(values, values, MASK, lam=1.5)
    with pytest.raises(ValueError, match="two answers at least"):
        group_advantages(torch.zeros(3, 1))
    with pytest.raises(ValueError, match="a row without a token"):
        token_rewards(values, values[:, 0], MASK[:, 0], MASK & MASK[:, :1], beta=1, missing_end=1)
