"""What the tasks of plugins share: data sets and image models."""
