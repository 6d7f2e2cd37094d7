"""DPO (Rafailov et al., arXiv:2305.18290) and IPO (arXiv:2310.12036): a policy straight from preferences."""

import torch
from torch import Tensor

from engine.config import AlignmentConfig
from engine.model import GPT
from engine.runtime import inference
from engine.tokenizer import Tokenizer
from rlhf.log_probs import sequence_log_probs, target_answers
from rlhf.losses import dpo_loss, ipo_loss
from rlhf.preferences import Pairs
from rlhf.train_reward import PairBatch
from train.evaluate import whole_pieces
from train.tracking import RunningMetrics


class DPO:
    """The loss of a batch of pairs, beside a frozen reference."""

    def __init__(self, config: AlignmentConfig, reference: GPT, tokenizer: Tokenizer) -> None:
        self.config, self.reference = config, reference
        self.assistant = tokenizer.special["<|assistant|>"]
        self.measures = RunningMetrics()

    def loss(self, policy: GPT, batch: PairBatch) -> Tensor:
        """Summed over the pairs."""
        return self._loss(policy, batch, self.measures)

    def evaluate(self, held_out: Pairs, policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        """The loss and what goes with it on the first pairs that hold so many tokens."""
        measures, read = RunningMetrics(), 0
        with inference(policy):
            for piece in whole_pieces(held_out, 2 * policy.config.context, tokens, tokens_per_batch):
                batch = PairBatch.of(piece).to(policy.embedding.weight.device)
                measures.add({"loss": self._loss(policy, batch, measures)}, batch.pairs)
                read += len(batch.tokens)
        return {**measures.take(), "tokens": read}

    def _loss(self, policy: GPT, batch: PairBatch, measures: RunningMetrics) -> Tensor:
        """Summed over the pairs. What is measured beside it: log-probabilities of whole answers, in nats."""
        if not batch.pairs:
            # Of many processes one may have got none: 0, and gradients of 0 for those that wait for them.
            return policy.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        bounds = batch.cu_seqlens[: 2 * batch.pairs + 1]
        # Padding behind the last pair is cut off.
        pairs = PairBatch(batch.tokens[: int(bounds[-1])], batch.targets, bounds, batch.max_seqlen)
        targeted = target_answers(pairs, self.assistant)
        now = sequence_log_probs(policy, targeted).view(-1, 2)
        with torch.no_grad():
            before = sequence_log_probs(self.reference, targeted).view(-1, 2)
        (chosen, rejected), (was_chosen, was_rejected) = now.unbind(1), before.unbind(1)
        four = (chosen, rejected, was_chosen, was_rejected)
        if self.config.method == "ipo":
            found = ipo_loss(*four, 1, beta=self.config.beta)
        else:
            found = dpo_loss(*four, 1, beta=self.config.beta, label_smoothing=self.config.label_smoothing)
        sums = {
            "accuracy": found.accuracy,
            "chosen": chosen.detach().sum(),
            "rejected": rejected.detach().sum(),
            "chosen_change": (chosen.detach() - was_chosen).sum(),
            "rejected_change": (rejected.detach() - was_rejected).sum(),
        }
        measures.add(sums, batch.pairs)
        return found.loss
