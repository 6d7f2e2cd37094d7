"""DPO (Rafailov et al., arXiv:2305.18290) and IPO (arXiv:2310.12036): a policy straight from preferences."""

import torch
from torch import Tensor

from engine.config import AlignmentConfig
from engine.model import GPT
from engine.runtime import inference
from engine.tokenizer import Tokenizer
from rlhf.log_probs import answer_log_probs
from rlhf.losses import dpo_loss, ipo_loss
from rlhf.preferences import Pairs
from rlhf.train_reward import PairBatch
from train.averages import Measures
from train.data.loader import IGNORE_INDEX, Batch
from train.evaluate import whole_pieces


class DPO:
    """The loss of a batch of pairs, beside a frozen reference."""

    def __init__(self, config: AlignmentConfig, reference: GPT, tokenizer: Tokenizer) -> None:
        self.config, self.reference = config, reference
        self.assistant = tokenizer.special["<|assistant|>"]
        self.measures = Measures()

    def loss(self, policy: GPT, batch: PairBatch) -> Tensor:
        """Summed over the pairs."""
        return self._loss(policy, batch, self.measures)

    def evaluate(self, held_out: Pairs, policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        """The loss and what goes with it on the first pairs that hold so many tokens."""
        measures, read = Measures(), 0
        with inference(policy):
            for piece in whole_pieces(held_out, 2 * policy.config.context, tokens, tokens_per_batch):
                batch = PairBatch.of(piece).to(policy.embedding.weight.device)
                measures.add({"loss": self._loss(policy, batch, measures)}, batch.pairs)
                read += len(batch.tokens)
        return {**measures.take(), "tokens": read}

    def _loss(self, policy: GPT, batch: PairBatch, measures: Measures) -> Tensor:
        """Summed over the pairs. What is measured beside it: log-probabilities of whole answers, in nats."""
        if not batch.pairs:
            # Of many processes one may have got none: 0, and gradients of 0 for those that wait for them.
            return policy.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)
        targeted = self._answers(batch)
        now = _sums(policy, targeted)
        with torch.no_grad():
            before = _sums(self.reference, targeted)
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

    def _answers(self, batch: PairBatch) -> PairBatch:
        """The same pairs, with the tokens of their answers as targets; padding behind the last pair is cut off."""
        bounds = batch.cu_seqlens[: 2 * batch.pairs + 1]
        tokens = batch.tokens[: int(bounds[-1])]
        places = torch.arange(len(tokens), device=tokens.device)
        sequence = torch.bucketize(places, bounds[1:], right=True)
        begins = torch.zeros(len(bounds) - 1, dtype=torch.int64, device=tokens.device)
        # No text spells this piece: where it stands last, the answer begins.
        begins = begins.scatter_reduce(0, sequence, places * (tokens == self.assistant), "amax")
        targets = tokens.roll(-1).masked_fill(places < begins[sequence], IGNORE_INDEX)
        targets[bounds[1:].long() - 1] = IGNORE_INDEX
        return PairBatch(tokens, targets, bounds, batch.max_seqlen)


def _sums(model: GPT, batch: Batch) -> Tensor:
    """Log-probabilities of whole answers: fp32 [pairs, chosen and rejected]."""
    log_probs, _ = answer_log_probs(model, batch)
    places = (batch.targets != IGNORE_INDEX).nonzero()[:, 0]
    sequence = torch.bucketize(places, batch.cu_seqlens[1:], right=True)
    sums = torch.zeros(len(batch.cu_seqlens) - 1, device=log_probs.device).index_add(0, sequence, log_probs)
    return sums.view(-1, 2)
