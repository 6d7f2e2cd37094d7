"""Training: data, the one loop, pretraining, finetuning, evaluation and reports."""
