"""DPO (Rafailov et al., arXiv:2305.18290) and IPO (arXiv:2310.12036): a policy straight from preferences."""

import torch
from torch import Tensor

from engine.config import AlignmentConfig
from engine.model import GPT
from engine.runtime import inference
from engine.tokenizer import Tokenizer
from rlhf.experience import Measures
from rlhf.log_probs import answer_log_probs
from rlhf.losses import PreferenceLoss, dpo_loss, ipo_loss
from rlhf.preferences import Pairs
from rlhf.train_reward import PairBatch, PairLoader
from train.data.loader import IGNORE_INDEX, Batch


class DPO:
    """The loss of a batch of pairs, beside a frozen reference."""

    def __init__(self, config: AlignmentConfig, reference: GPT, tokenizer: Tokenizer) -> None:
        self.config, self.reference = config, reference
        self.assistant = tokenizer.special["<|assistant|>"]
        self.measures = Measures()

    def loss(self, policy: GPT, batch: Batch) -> Tensor:
        """Summed over the pairs."""
        found, measured = self.measure(policy, batch)
        self.measures.add(measured)
        return found.loss * ((len(batch.cu_seqlens) - 1) // 2)

    def evaluate(self, held_out: Pairs, policy: GPT, tokens: int, tokens_per_batch: int) -> dict[str, float]:
        """The loss and what goes with it on the first pairs that hold so many tokens."""
        context, read = policy.config.context, 0
        measures = Measures()
        loader = PairLoader(
            held_out, max(tokens_per_batch, 2 * context), 2 * context, seed=0, shuffle=False, epochs=1, whole=True
        )
        with inference(policy):
            for batch in loader:
                found, measured = self.measure(policy, batch.to(policy.embedding.weight.device))
                measures.add({"loss": found.loss, **measured})
                read += len(batch.tokens)
                if read >= tokens:
                    break
        loader.close()
        return {**measures.take(), "tokens": read}

    def measure(self, policy: GPT, batch: Batch) -> tuple[PreferenceLoss, dict[str, Tensor]]:
        """The mean loss over the pairs of a batch, and log-probabilities of chosen and rejected answers, in nats."""
        targeted = self._answers(batch)
        now = _sums(policy, targeted)
        with torch.no_grad():
            before = _sums(self.reference, targeted)
        (chosen, rejected), (was_chosen, was_rejected) = now.unbind(1), before.unbind(1)
        four, pairs = (chosen, rejected, was_chosen, was_rejected), len(now)
        if self.config.method == "ipo":
            found = ipo_loss(*four, pairs, beta=self.config.beta)
        else:
            found = dpo_loss(*four, pairs, beta=self.config.beta, label_smoothing=self.config.label_smoothing)
        return found, {
            "accuracy": found.accuracy,
            "chosen": chosen.detach().mean(),
            "rejected": rejected.detach().mean(),
            "chosen_change": (chosen.detach() - was_chosen).mean(),
            "rejected_change": (rejected.detach() - was_rejected).mean(),
        }

    def _answers(self, batch: Batch) -> Batch:
        """The same pairs, with the tokens of their answers as targets; padding behind the last pair is cut off."""
        bounds = batch.cu_seqlens[: len(batch.cu_seqlens) - (len(batch.cu_seqlens) + 1) % 2]
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
