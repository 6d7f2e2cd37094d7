"""Linear layer and cross-entropy in one, without ever holding the [tokens, vocab] logits."""
