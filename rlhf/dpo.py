"""DPO (Rafailov et al., arXiv:2305.18290) and IPO (arXiv:2310.12036): a policy straight from preferences."""

import torch
from torch import Tensor

from engine.config import AlignmentConfig
from engine.model import GPT
from engine.runtime import inference
from engine.tokenizer import Tokenizer
from rlhf.losses import dpo_loss, ipo_loss, preference_margin
from rlhf.preferences import PairBatch, Pairs
from rlhf.rollout import sequence_log_probs, target_answers
from train.evaluation import batches_in_order
from train.tracking import RunningMetrics


class DPO:
    """The loss of a batch of pairs, beside a frozen reference."""

    def __init__(self, config: AlignmentConfig, reference: GPT, tokenizer: Tokenizer) -> None:
        self.config, self.reference = config, reference
        self.assistant = tokenizer.special["<|assistant|>"]
        self.metrics = RunningMetrics()

    def loss(self, policy: GPT, batch: PairBatch) -> Tensor:
        """Return the loss summed over the pairs."""
        return self._loss(policy, batch, self.metrics)

    def evaluate(self, held_out: Pairs, policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        """Measure the loss, and what goes with it, on the first pairs that hold so many tokens."""
        metrics, read = RunningMetrics(), 0
        with inference(policy):
            for packed in batches_in_order(held_out, 2 * policy.config.context, tokens, tokens_per_batch):
                batch = PairBatch.of(packed).to(policy.embedding.weight.device)
                metrics.add({"loss": self._loss(policy, batch, metrics)}, batch.pairs)
                read += len(batch.tokens)
        return {**metrics.take(), "tokens": read}

    def _loss(self, policy: GPT, batch: PairBatch, metrics: RunningMetrics) -> Tensor:
        """Return the sum over the pairs. Its metrics are log-probabilities of whole answers, in nats."""
        if not batch.pairs:
            # One of many processes may have got none: 0, and gradients of 0 for those that wait for them.
            return policy.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        bounds = batch.cu_seqlens[: 2 * batch.pairs + 1]
        # Padding behind the last pair is cut off.
        pairs = PairBatch(batch.tokens[: int(bounds[-1])], batch.targets, bounds, batch.max_seqlen)
        answers = target_answers(pairs, self.assistant)
        chosen, rejected = sequence_log_probs(policy, answers).view(-1, 2).unbind(1)
        with torch.no_grad():
            was_chosen, was_rejected = sequence_log_probs(self.reference, answers).view(-1, 2).unbind(1)
        margin = preference_margin(chosen, rejected, was_chosen, was_rejected)
        sums = {
            # The share of pairs (ties half) of which the policy has moved towards the chosen answer.
            "accuracy": (margin.detach().sign() + 1).sum() / 2,
            "chosen": chosen.detach().sum(),
            "rejected": rejected.detach().sum(),
            "chosen_change": (chosen.detach() - was_chosen).sum(),
            "rejected_change": (rejected.detach() - was_rejected).sum(),
        }
        metrics.add(sums, batch.pairs)
        if self.config.method == "ipo":
            return ipo_loss(margin, beta=self.config.beta)
        return dpo_loss(margin, beta=self.config.beta, label_smoothing=self.config.label_smoothing)
