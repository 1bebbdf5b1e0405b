"""A run: configuration, training, checkpoints, its folder."""
