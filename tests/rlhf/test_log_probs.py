"""Log-probabilities of packed answers against those of each sequence alone, from whole logits."""

import torch

from engine.model import GPT
from rlhf.log_probs import answer_log_probs, mask_of, pack_answers, to_rows

PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]]
ANSWERS = [[11, 12], [13, 14, 15, 16], [17]]


def test_packed_answers_have_the_log_probabilities_of_each_alone_at_the_temperature(gpt: GPT) -> None:
    batch = pack_answers(PROMPTS, ANSWERS, gpt.config.context)
    for temperature in (1.0, 0.7):
        found, entropy = answer_log_probs(gpt, batch, temperature)
        expected, entropies = [], []
        for prompt, answer in zip(PROMPTS, ANSWERS, strict=True):
            logits = gpt.logits(gpt(torch.tensor([prompt + answer])))[0, len(prompt) - 1 : -1]
            log_probs = (logits / temperature).log_softmax(dim=-1)
            expected.append(log_probs.gather(-1, torch.tensor(answer)[:, None])[:, 0])
            entropies.append(-(log_probs.exp() * log_probs).sum(dim=-1))
        torch.testing.assert_close(found, torch.cat(expected), atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(entropy, torch.cat(entropies), atol=2e-5, rtol=1e-5)


def test_gradients_flow_into_the_whole_model_from_rows(gpt: GPT) -> None:
    log_probs, _ = answer_log_probs(gpt, pack_answers(PROMPTS, ANSWERS, gpt.config.context))
    rows = to_rows(log_probs, mask_of([2, 4, 1]))
    assert rows.shape == (3, 4) and (rows[0, 2:] == 0).all()
    assert torch.equal(rows[0, :2], log_probs[:2]) and rows[2, 0] == log_probs[6]
    rows.sum(dim=1)[1].backward()
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
