"""Alignment: preferences, rewards, rollouts, and the methods that learn from them, in the one training loop."""
