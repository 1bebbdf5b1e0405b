"""Analysis of routing after a run: counts, traces, replay, FLOPs."""
