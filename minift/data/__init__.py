"""From files to batches: tokenizer, chat template, rows, labels, padding and packing. Knows nothing of models."""
