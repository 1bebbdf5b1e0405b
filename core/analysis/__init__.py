"""Routing analysed after the fact: counts, traces, replay, FLOPs."""
