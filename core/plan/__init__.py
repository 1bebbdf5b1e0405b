"""Plans: memory, bytes and time of a training step on many ranks, before anything runs there."""
