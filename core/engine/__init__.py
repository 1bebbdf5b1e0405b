"""The engine: builds layers, and owns the order of events around a training step."""
