"""Training little: LoRA, where it goes in a model, merging it, and its files."""
