"""Alignment: the reward model. Above the storey of training, whose loop it shares."""
