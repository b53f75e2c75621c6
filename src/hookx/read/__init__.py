"""A run read back: features, their activations, datasets and joins."""
