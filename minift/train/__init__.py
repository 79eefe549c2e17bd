"""The training run: the only room that knows data, model and optimizer together."""
